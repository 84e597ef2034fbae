"""dolium's own requests about the image store: what Docker's API has no word for."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from aiohttp import web

from dolium.api.docker.common import ENGINE, body, flag, number
from dolium.api.docker.images import registry_credentials, streamed
from dolium.api.docker.uploads import uploaded
from dolium.errors import InvalidArgument
from dolium.images import artifacts
from dolium.images.auth import Credentials, decode_header
from dolium.images.check import Problem
from dolium.images.manifest import Descriptor, parse_artifact
from dolium.images.progress import Progress
from dolium.images.records import ArtifactRecord, Lease
from dolium.images.reference import Reference
from dolium.images.repair import Check
from dolium.units import rfc3339

routes = web.RouteTableDef()


def _name(request: web.Request) -> str:
    name = request.query.get("name", "")
    if not name:
        raise InvalidArgument("name is missing")
    return name


def _all_credentials(request: web.Request) -> dict[str, Credentials]:
    """X-Registry-Config: credentials by registry."""
    header = request.headers.get("X-Registry-Config")
    value = decode_header(header) if header else {}
    if not isinstance(value, dict):
        raise InvalidArgument("X-Registry-Config is no JSON object")
    found = {key: Credentials.parse(entry) for key, entry in value.items()}
    return {key: entry for key, entry in found.items() if entry is not None}


# Checking


def _problem(problem: Problem) -> dict[str, Any]:
    return {"Kind": problem.kind, "Subject": problem.subject, "Problem": problem.text, "Images": problem.images,
            "Outcome": problem.outcome, "Repaired": problem.repaired}


@routes.post("/dolium/check")
async def check(request: web.Request) -> web.Response:
    """Look at the whole store; ``quick`` leaves out unpacked files, ``repair`` fetches or drops what is broken."""
    engine = request.app[ENGINE]
    work = Check(engine.images, quick=flag(request, "quick"), credentials=_all_credentials(request),
                 before_layers=engine.roots.drop_spares)
    problems = await work.run()
    for container in engine.containers.values():
        lost = [chain for chain in container.chain_ids if not engine.images.snapshots.has_layer(chain)]
        if lost:
            problems.append(Problem("container", container.id, f"has lost layer {', '.join(lost)}"))
    if flag(request, "repair"):
        await work.repair()
        for problem in problems:
            if problem.kind == "container":
                chains = engine.containers[problem.subject].chain_ids if problem.subject in engine.containers else []
                problem.repaired = all(map(engine.images.snapshots.has_layer, chains))
                problem.outcome = "its layers are there again" if problem.repaired else "remove it"
    return web.json_response({"Problems": [_problem(one) for one in problems], "Blobs": work.blobs, "Layers": work.layers,
                              "Images": len(engine.images.records()), "Artifacts": len(engine.images.artifacts())})


# Leases


def _lease(lease: Lease) -> dict[str, Any]:
    return {"Id": lease.id, "Created": rfc3339(lease.created), "Expires": rfc3339(lease.expires) if lease.expires else "",
            "Blobs": list(lease.blobs), "Labels": dict(lease.labels)}


@routes.get("/dolium/leases")
async def leases(request: web.Request) -> web.Response:
    """All leases."""
    return web.json_response([_lease(lease) for lease in request.app[ENGINE].images.leases()])


@routes.post("/dolium/leases")
async def lease_create(request: web.Request) -> web.Response:
    """Body: ``Blobs`` (digests), ``Labels``; ``name``; ``seconds`` it lives, for ever without."""
    wish = await body(request)
    blobs, labels = wish.get("Blobs") or [], wish.get("Labels") or {}
    if not isinstance(blobs, list) or not all(isinstance(one, str) for one in blobs) or not isinstance(labels, dict) \
            or not all(isinstance(value, str) for value in labels.values()):
        raise InvalidArgument("Blobs must be a list of digests, Labels an object of strings")
    made = request.app[ENGINE].images.lease(_name(request), life=number(request, "seconds") or 0, blobs=blobs, labels=labels)
    return web.json_response(_lease(made), status=201)


@routes.delete("/dolium/leases")
async def lease_end(request: web.Request) -> web.Response:
    """End a lease: what it alone kept goes."""
    request.app[ENGINE].images.end_lease(_name(request))
    return web.Response(status=204)


# What registries have


def _descriptor(descriptor: Descriptor) -> dict[str, Any]:
    return descriptor.as_json()


@routes.get("/distribution/{name:.+}/json")
async def distribution(request: web.Request) -> web.Response:
    """Docker's: the descriptor and platforms of a name in its registry."""
    descriptor, data = await request.app[ENGINE].images.remote_manifest(
        request.match_info["name"], credentials=registry_credentials(request))
    found = json.loads(data)
    entries = [entry for entry in found.get("manifests") or [] if isinstance(entry, dict)]
    platforms = [entry["platform"] for entry in entries if "platform" in entry]
    return web.json_response({"Descriptor": {"mediaType": descriptor.media_type, "digest": descriptor.digest,
                                             "size": descriptor.size}, "Platforms": platforms})


@routes.get("/dolium/manifest")
async def manifest(request: web.Request) -> web.Response:
    """The manifest or index of a name in its registry, as it is there."""
    descriptor, data = await request.app[ENGINE].images.remote_manifest(
        _name(request), credentials=registry_credentials(request))
    return web.json_response({"Descriptor": _descriptor(descriptor), "Manifest": json.loads(data)})


@routes.get("/dolium/referrers")
async def referrers(request: web.Request) -> web.Response:
    """What refers to a name in its registry: descriptors, with artifact types and annotations."""
    digest, found = await request.app[ENGINE].images.referrers(
        _name(request), artifact_type=request.query.get("type", ""), credentials=registry_credentials(request))
    return web.json_response({"Digest": digest, "Referrers": found})


# Artifacts


def _artifact(record: ArtifactRecord) -> dict[str, Any]:
    return {"Name": Reference.parse(record.name).familiar(), "Digest": record.digest, "ArtifactType": record.artifact_type,
            "MediaType": record.media_type, "Created": int(record.created), "Size": sum(size for _, size in record.blobs)}


@routes.get("/dolium/artifacts")
async def artifact_list(request: web.Request) -> web.Response:
    """All artifacts; with ``name`` one, with its manifest."""
    images = request.app[ENGINE].images
    if "name" not in request.query:
        return web.json_response([_artifact(record) for record in images.artifacts()])
    record, data = images.artifact(_name(request))
    return web.json_response(_artifact(record) | {"Manifest": json.loads(data)})


@routes.post("/dolium/artifacts/pull")
async def artifact_pull(request: web.Request) -> web.StreamResponse:
    """Fetch one; progress as Docker's JSON stream."""
    engine, name, credentials = request.app[ENGINE], _name(request), registry_credentials(request)

    async def work(progress: Progress) -> None:
        await engine.images.pull_artifact(name, credentials=credentials, progress=progress)
        engine.events.publish("artifact", "pull", name, {})

    return await streamed(request, work)


@routes.post("/dolium/artifacts/push")
async def artifact_push(request: web.Request) -> web.StreamResponse:
    """Send one; progress as Docker's JSON stream."""
    engine, name, credentials = request.app[ENGINE], _name(request), registry_credentials(request)
    engine.images.artifact(name)

    async def work(progress: Progress) -> None:
        await engine.images.push_artifact(name, credentials=credentials, progress=progress)
        engine.events.publish("artifact", "push", name, {})

    return await streamed(request, work)


@routes.post("/dolium/artifacts/add")
async def artifact_add(request: web.Request) -> web.Response:
    """Make one of the files of a tar, the body: ``type``, ``annotation`` (KEY=VALUE), ``subject``, an image here."""
    engine = request.app[ENGINE]
    pairs = [entry.partition("=") for entry in request.query.getall("annotation", [])]
    async with uploaded(request) as file:
        record = await engine.images.make_artifact(
            _name(request), file, artifact_type=request.query.get("type", ""),
            annotations={key: value for key, _, value in pairs}, subject=request.query.get("subject", ""))
    return web.json_response(_artifact(record), status=201)


@routes.get("/dolium/artifacts/files")
async def artifact_files(request: web.Request) -> web.StreamResponse:
    """A tar of an artifact's files."""
    engine = request.app[ENGINE]
    record, data = engine.images.artifact(_name(request))
    response = web.StreamResponse(headers={"Content-Type": "application/x-tar"})
    await response.prepare(request)
    pieces = artifacts.archive(engine.images.content, parse_artifact(data, record.media_type))
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            await response.write(piece)
    return response


@routes.delete("/dolium/artifacts")
async def artifact_remove(request: web.Request) -> web.Response:
    """Remove one."""
    digest = request.app[ENGINE].images.drop_artifact(_name(request))
    return web.json_response({"Digest": digest})
