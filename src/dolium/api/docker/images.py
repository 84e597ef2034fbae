"""/images: pull, load, import, list, inspect, history, tag, remove."""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import json
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from dolium.api.docker import models
from dolium.api.docker.common import ENGINE, before_moment, filters, flag, label_matches, stream
from dolium.api.docker.uploads import uploaded
from dolium.errors import DoliumError, InvalidArgument, NotFound
from dolium.images.auth import Credentials, decode_header
from dolium.images.progress import Progress, ProgressEvent
from dolium.images.reference import Reference
from dolium.images.view import Image
from dolium.units import format_size

routes = web.RouteTableDef()


def registry_credentials(request: web.Request) -> Credentials | None:
    """What X-Registry-Auth says. Raises InvalidArgument."""
    header = request.headers.get("X-Registry-Auth")
    if not header:
        return None
    return Credentials.parse(decode_header(header))


def _bar(current: int, total: int) -> str:
    if total <= 0:
        return ""
    done = min(int(50 * current / total), 50)
    head = ">" if done < 50 else ""
    return f"[{('=' * done + head)[:50]:<50}] {format_size(current):>8}/{format_size(total)}"


def progress_json(event: ProgressEvent) -> dict[str, Any]:
    """A progress event as a line of Docker's JSON stream."""
    if event.aux is not None:
        return {"progressDetail": {}, "aux": dict(event.aux)}
    row: dict[str, Any] = {"status": event.status}
    if event.id:
        row["id"] = event.id
    if event.total or event.current:
        row["progressDetail"] = {"current": event.current, "total": event.total}
        row["progress"] = _bar(event.current or 0, event.total or 0)
    else:
        row["progressDetail"] = {}
    return row


async def streamed(request: web.Request, work: Callable[[Progress], Awaitable[object]]) -> web.StreamResponse:
    """Run work, sending its progress; an error after the first byte is the stream's last line, as Docker's is."""
    queue: asyncio.Queue[ProgressEvent | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def progress(event: ProgressEvent) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, event)

    async def run() -> object:
        try:
            return await work(progress)
        finally:
            loop.call_soon(queue.put_nowait, None)

    task = asyncio.create_task(run())
    first = await queue.get()
    if first is None and task.done() and task.exception() is not None:
        error = task.exception()
        assert error is not None
        raise error
    response = await stream(request)
    event = first
    try:
        while event is not None:
            await response.write(json.dumps(progress_json(event)).encode() + b"\r\n")
            event = await queue.get()
        await task
    except DoliumError as error:
        row = {"errorDetail": {"message": str(error)}, "error": str(error)}
        await response.write(json.dumps(row).encode() + b"\r\n")
    except ConnectionError:
        task.cancel()  # the client has gone: what was downloaded stays for the next try
        await asyncio.wait({task})
    return response


@routes.post("/images/create")
async def create(request: web.Request) -> web.StreamResponse:
    """Pull (``fromImage``) or import (``fromSrc``). ``allPlatforms`` is dolium's own, here and below."""
    engine = request.app[ENGINE]
    source, name, tag = (request.query.get(key, "") for key in ("fromSrc", "fromImage", "tag"))
    platform = request.query.get("platform") or None
    if name:
        every = not tag and ":" not in name.rpartition("/")[2] and "@" not in name
        reference = f"{name}@{tag}" if tag.startswith("sha256:") else f"{name}:{tag}" if tag else name
        Reference.parse(reference)
        credentials = registry_credentials(request)

        async def pull(progress: Progress) -> None:
            tags = await engine.images.remote_tags(name, credentials=credentials) if every else []
            for target in [f"{name}:{one}" for one in tags if not one.startswith("sha256-")] if every else [reference]:
                image = await engine.images.pull(target, platform=platform, all_platforms=flag(request, "allPlatforms"),
                                                 credentials=credentials, progress=progress)
                engine.events.publish("image", "pull", target, {"name": name, "id": image.id})

        return await streamed(request, pull)
    if source != "-":
        raise InvalidArgument(f"import from {source!r} is not supported", hint="give the tar on standard input: -")
    repository = request.query.get("repo", "")
    target = f"{repository}:{tag}" if repository and tag else repository or None
    async with uploaded(request) as file:
        image = await engine.images.import_tar(file, name=target, changes=request.query.getall("changes", []),
                                               message=request.query.get("message", ""), platform=platform)
    engine.events.publish("image", "import", image.id, {})
    response = await stream(request)
    await response.write(json.dumps({"status": image.id}).encode() + b"\r\n")
    return response


@routes.post("/images/load")
async def load(request: web.Request) -> web.StreamResponse:
    """``docker load``: an archive in the body."""
    engine = request.app[ENGINE]
    async with uploaded(request) as file:
        images = await engine.images.load(file, all_platforms=flag(request, "allPlatforms"))
    response = await stream(request)
    for image in images:
        for text in [f"Loaded image: {tag}\n" for tag in image.repo_tags] or [f"Loaded image ID: {image.id}\n"]:
            await response.write(json.dumps({"stream": text}).encode() + b"\r\n")
        engine.events.publish("image", "load", image.id, {})
    return response


@routes.get("/images/get")
async def save_several(request: web.Request) -> web.StreamResponse:
    """``docker save`` of several: ``names``."""
    return await _save(request, [name for entry in request.query.getall("names", []) for name in entry.split(",") if name])


@routes.get("/images/{name:.+}/get")
async def save(request: web.Request) -> web.StreamResponse:
    """``docker save`` of one."""
    return await _save(request, [request.match_info["name"]])


async def _save(request: web.Request, names: list[str]) -> web.StreamResponse:
    engine = request.app[ENGINE]
    if not names:
        raise InvalidArgument("no image to save was named")
    images, read = engine.images.saving(names, all_platforms=flag(request, "allPlatforms"))
    response = web.StreamResponse(headers={"Content-Type": "application/x-tar"})
    async with contextlib.aclosing(read()) as pieces:
        async for data in pieces:  # held from its first piece on; what is wrong before that is told as a status
            if not response.prepared:
                await response.prepare(request)
            await response.write(data)
    for image in images:
        engine.events.publish("image", "save", image.record.id, {})
    return response


@routes.post("/images/prune")
async def prune(request: web.Request) -> web.Response:
    """``docker image prune``: those without a tag, with ``dangling=false`` all that no container was made from."""
    engine, wanted = request.app[ENGINE], filters(request)
    for key in wanted:
        if key not in ("dangling", "until", "label", "label!"):
            raise InvalidArgument(f"invalid filter '{key}'")
    dangling = (wanted.get("dangling") or ["true"])[0] in ("true", "1")
    until = before_moment(wanted)

    def goes(image: Image) -> bool:
        config = engine.images.config(image.id)
        return not (
            (dangling and image.repo_tags) or (until and models.moment(config.created) >= until)
            or not label_matches(dict(config.labels), wanted.get("label") or [])
            or any(label_matches(dict(config.labels), [label]) for label in wanted.get("label!") or []))

    removals, freed = await engine.prune_images(goes)
    for removal in removals:
        if removal.kind == "Untagged" or removal.value.startswith("sha256:"):
            engine.events.publish("image", "untag" if removal.kind == "Untagged" else "delete", removal.value, {})
    engine.events.publish("image", "prune", "", {"reclaimed": str(freed)})
    return web.json_response({"ImagesDeleted": [{one.kind: one.value} for one in removals] or None,
                              "SpaceReclaimed": freed})


@routes.get("/images/json")
async def listing(request: web.Request) -> web.Response:
    """``docker images``."""
    engine, wanted = request.app[ENGINE], filters(request)
    for key in wanted:
        if key not in ("reference", "dangling", "label", "before", "since", "until"):
            raise InvalidArgument(f"invalid filter '{key}'")
    rows, until = [], before_moment(wanted)
    limits = {key: [engine.images.config(engine.images.resolve(name).id).created for name in wanted.get(key, ())]
              for key in ("before", "since")}
    for image in engine.images.images():
        users = sum(1 for container in engine.containers.values() if container.image_id == image.id)
        row = models.image_summary(image, users)
        config = engine.images.config(image.id)
        row["Labels"] = dict(config.labels)
        if "reference" in wanted:  # shows the matching names only, as Docker does
            row["RepoTags"] = [tag for tag in image.repo_tags
                               if any(_reference_matches(tag, pattern) for pattern in wanted["reference"])]
            shown = {tag.rpartition(":")[0] for tag in row["RepoTags"]}
            row["RepoDigests"] = [digest for digest in row["RepoDigests"] if digest.partition("@")[0] in shown
                                  or any(_reference_matches(digest, pattern) for pattern in wanted["reference"])]
            if not row["RepoTags"] and not row["RepoDigests"]:
                continue
        if "dangling" in wanted and (wanted["dangling"][0] in ("true", "1")) == bool(image.repo_tags):
            continue
        if not label_matches(row["Labels"], wanted.get("label") or []):
            continue
        created = models.moment(config.created)
        if any(created >= models.moment(limit) for limit in limits["before"]) or \
                any(created <= models.moment(limit) for limit in limits["since"]):
            continue
        if until and created >= until:
            continue
        rows.append(row)
    return web.json_response(rows)


def _reference_matches(name: str, pattern: str) -> bool:
    """``name``: REPOSITORY:TAG or REPOSITORY@DIGEST."""
    repository = name.partition("@")[0] if "@" in name else name.rpartition(":")[0]
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(repository, pattern)


@routes.get("/images/{name:.+}/json")
async def inspect(request: web.Request) -> web.Response:
    """``docker image inspect``."""
    engine = request.app[ENGINE]
    return web.json_response(models.image_inspect(engine, engine.images.resolve(request.match_info["name"])))


@routes.get("/images/{name:.+}/history")
async def history(request: web.Request) -> web.Response:
    """``docker history``."""
    engine = request.app[ENGINE]
    image = engine.images.resolve(request.match_info["name"])
    return web.json_response([
        {"Id": line.id, "Created": int(models.moment(line.created)), "CreatedBy": line.created_by,
         "Tags": list(line.tags) or None, "Size": line.size, "Comment": line.comment}
        for line in engine.images.history(image.id)])


@routes.post("/images/{name:.+}/push")
async def push(request: web.Request) -> web.StreamResponse:
    """``docker push``: one tag, or all tags of the repository when none is given. A digest is pushed as such."""
    engine, name, tag = request.app[ENGINE], request.match_info["name"], request.query.get("tag", "")
    reference = Reference.parse(f"{name}@{tag}" if tag.startswith("sha256:") else f"{name}:{tag}" if tag else name)
    credentials = registry_credentials(request)
    targets = [reference.familiar()]
    if reference.tag is None and reference.digest is None:
        targets = [tagged for image in engine.images.images() for tagged in image.repo_tags
                   if Reference.parse(tagged).name == reference.name]
        if not targets:
            raise NotFound(f"An image does not exist locally with the tag: {reference.familiar_name}")

    async def push_all(progress: Progress) -> None:
        for target in targets:
            await engine.images.push(target, all_platforms=flag(request, "allPlatforms"), credentials=credentials,
                                     progress=progress)
            engine.events.publish("image", "push", target, {"name": reference.familiar_name})

    return await streamed(request, push_all)


@routes.post("/images/{name:.+}/tag")
async def tag(request: web.Request) -> web.Response:
    """Another name."""
    engine = request.app[ENGINE]
    repository, word = request.query.get("repo", ""), request.query.get("tag", "")
    image = engine.images.tag(request.match_info["name"], f"{repository}:{word}" if word else repository)
    engine.events.publish("image", "tag", image.id, {"name": repository})
    return web.Response(status=201)


@routes.delete("/images/{name:.+}")
async def remove(request: web.Request) -> web.Response:
    """``docker rmi``."""
    engine = request.app[ENGINE]
    done = await engine.remove_image(request.match_info["name"], force=flag(request, "force"))
    for removal in done:
        engine.events.publish("image", "untag" if removal.kind == "Untagged" else "delete", removal.value, {})
    return web.json_response([{removal.kind: removal.value} for removal in done])
