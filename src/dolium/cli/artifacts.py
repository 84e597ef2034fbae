"""Commands on what registries keep beside images: artifact, manifest; and the check of the store."""

from __future__ import annotations

import json
import os
import tarfile
import tempfile

from dolium.cli import credentials, output
from dolium.cli.containers import FORMAT
from dolium.cli.context import Context
from dolium.cli.copying import pack_files
from dolium.cli.flags import Command, Flag, UsageError
from dolium.cli.images import Bars
from dolium.cli.transport import ApiError, Client, Response, query

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_QUIET = Flag("-q --quiet", "bool", "no progress")
PULL = Command("artifact pull", "NAME", "Fetch an artifact from a registry.", [_QUIET], minimum=1, maximum=1)
PUSH = Command("artifact push", "NAME", "Send an artifact to its registry.", [_QUIET], minimum=1, maximum=1)
LS = Command("artifact ls", "", "List artifacts.", [_QUIET, FORMAT], maximum=0)
INSPECT = Command("artifact inspect", "NAME", "Print an artifact's manifest and what else is known.", [],
                  minimum=1, maximum=1)
RM = Command("artifact rm", "NAME [NAME ...]", "Remove artifacts.", [], minimum=1)
ADD = Command("artifact add", "NAME FILE [FILE ...]", "Make an artifact of files.", [
    Flag("--type", "str", "what it is, as a media type", "TYPE"),
    Flag("--annotation", "list", "of the manifest", "KEY=VALUE"),
    Flag("--subject", "str", "the image here that it is about", "IMAGE")], minimum=2)
EXTRACT = Command("artifact extract", "NAME FOLDER", "Write an artifact's files into a folder.", [], minimum=2, maximum=2)
MANIFEST = Command("manifest inspect", "NAME", "Print a manifest or index as the registry has it.", [
    Flag("-v --verbose", "bool", "its descriptor too")], minimum=1, maximum=1)
REFERRERS = Command("manifest referrers", "NAME", "List what refers to an image in its registry: signatures and the like.", [
    Flag("--artifact-type", "str", "only of this type", "TYPE"), FORMAT], minimum=1, maximum=1)
CHECK = Command("system check", "", "Verify every digest and reference of the image store, and name what is broken.", [
    Flag("-r --repair", "bool", "fetch what is broken from its registry, or drop it"),
    Flag("--quick", "bool", "leave out the unpacked files"), FORMAT], maximum=0)


def _follow(context: Context, response: Response, quiet: bool) -> None:
    file: Any = context.stdout
    bars = Bars(file, os.isatty(context.stdout_fd))
    for row in response.lines():
        if "error" in row or not quiet:
            bars.show(row)


def pull(client: Client, context: Context, words: list[str]) -> int:
    """``dolium artifact pull``."""
    options, names = PULL.parse(words)
    if options.get("help"):
        context.stdout.write(PULL.usage())
        return 0
    context.own_process()
    _follow(context, client.open("POST", "/dolium/artifacts/pull" + query(name=names[0]),
                                 headers=credentials.header(context, names[0])), options["quiet"])
    return 0


def push(client: Client, context: Context, words: list[str]) -> int:
    """``dolium artifact push``."""
    options, names = PUSH.parse(words)
    if options.get("help"):
        context.stdout.write(PUSH.usage())
        return 0
    context.own_process()
    _follow(context, client.open("POST", "/dolium/artifacts/push" + query(name=names[0]),
                                 headers=credentials.header(context, names[0])), options["quiet"])
    return 0


def listing(client: Client, context: Context, words: list[str]) -> int:
    """``dolium artifact ls``."""
    options, _ = LS.parse(words)
    if options.get("help"):
        context.stdout.write(LS.usage())
        return 0
    rows = client.call("GET", "/dolium/artifacts")
    if options["quiet"]:
        for row in rows:
            context.say(row["Name"])
        return 0
    now = context.now()
    cells = [[row["Name"], row["Digest"].removeprefix("sha256:")[:12], row["ArtifactType"],
              f"{output.ago(now - row['Created'])} ago", output.size(row["Size"])] for row in rows]
    output.listing(context, options["format"], ["NAME", "DIGEST", "TYPE", "CREATED", "SIZE"], rows, cells)
    return 0


def inspect(client: Client, context: Context, words: list[str]) -> int:
    """``dolium artifact inspect``."""
    options, names = INSPECT.parse(words)
    if options.get("help"):
        context.stdout.write(INSPECT.usage())
        return 0
    context.say(json.dumps(client.call("GET", "/dolium/artifacts" + query(name=names[0])), indent=4))
    return 0


def remove(client: Client, context: Context, words: list[str]) -> int:
    """``dolium artifact rm``."""
    options, names = RM.parse(words)
    if options.get("help"):
        context.stdout.write(RM.usage())
        return 0
    failed = 0
    for name in names:
        try:
            context.say(client.call("DELETE", "/dolium/artifacts" + query(name=name))["Digest"])
        except ApiError as error:
            context.complain(str(error))
            failed = 1
    return failed


def add(client: Client, context: Context, words: list[str]) -> int:
    """``dolium artifact add``."""
    options, names = ADD.parse(words)
    if options.get("help"):
        context.stdout.write(ADD.usage())
        return 0
    context.own_process()
    for annotation in options["annotation"]:
        if "=" not in annotation:
            raise UsageError(f"invalid argument {annotation!r} for --annotation: write KEY=VALUE")
    paths = [context.path(name) for name in names[1:]]
    for path in paths:
        if not os.path.isfile(path):
            raise UsageError(f"{path}: no such file")
    target = "/dolium/artifacts/add" + query(name=names[0], type=options["type"], annotation=options["annotation"],
                                             subject=options["subject"])
    context.say(json.loads(client.open("POST", target, stream=pack_files(paths)).read())["Digest"])
    return 0


def extract(client: Client, context: Context, words: list[str]) -> int:
    """``dolium artifact extract``."""
    options, names = EXTRACT.parse(words)
    if options.get("help"):
        context.stdout.write(EXTRACT.usage())
        return 0
    context.own_process()
    folder = context.path(names[1])
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryFile() as spool:
        for chunk in client.open("GET", "/dolium/artifacts/files" + query(name=names[0])).chunks():
            spool.write(chunk)
        spool.seek(0)
        with tarfile.open(fileobj=spool, mode="r:") as archive:
            for member in archive:
                data = archive.extractfile(member)
                if data is None or "/" in member.name or member.name in ("", ".", ".."):
                    raise ApiError(0, f"the daemon sent a name that leaves the folder: {member.name!r}")
                with open(os.path.join(folder, member.name), "wb") as file:
                    while piece := data.read(1 << 18):
                        file.write(piece)
                context.say(member.name)
    return 0


def manifest(client: Client, context: Context, words: list[str]) -> int:
    """``dolium manifest inspect``."""
    options, names = MANIFEST.parse(words)
    if options.get("help"):
        context.stdout.write(MANIFEST.usage())
        return 0
    context.own_process()
    answer = client.open("GET", "/dolium/manifest" + query(name=names[0]), headers=credentials.header(context, names[0]))
    found = json.loads(answer.read())
    context.say(json.dumps(found if options["verbose"] else found["Manifest"], indent=4))
    return 0


def referrers(client: Client, context: Context, words: list[str]) -> int:
    """``dolium manifest referrers``."""
    options, names = REFERRERS.parse(words)
    if options.get("help"):
        context.stdout.write(REFERRERS.usage())
        return 0
    context.own_process()
    answer = client.open("GET", "/dolium/referrers" + query(name=names[0], type=options["artifact_type"]),
                         headers=credentials.header(context, names[0]))
    rows = json.loads(answer.read())["Referrers"]
    cells = [[row["digest"], row.get("artifactType", ""), output.size(row.get("size", 0))] for row in rows]
    output.listing(context, options["format"], ["DIGEST", "ARTIFACT TYPE", "SIZE"], rows, cells)
    return 0


def check(client: Client, context: Context, words: list[str]) -> int:
    """``dolium system check``: 0 when all is whole or was repaired, else 1."""
    options, _ = CHECK.parse(words)
    if options.get("help"):
        context.stdout.write(CHECK.usage())
        return 0
    context.own_process()
    target = "/dolium/check" + query(repair=options["repair"], quick=options["quick"])
    answer = client.open("POST", target, headers=credentials.every(context) if options["repair"] else {})
    found = json.loads(answer.read())
    rows = found["Problems"]
    left = [row for row in rows if not row["Repaired"]]
    if options["format"] == "json":
        context.say(json.dumps(found))
        return 1 if left else 0
    for row in rows:
        outcome = f": {row['Outcome']}" if row["Outcome"] else ""
        context.say(f"{row['Kind']} {row['Subject']}: {row['Problem']}{outcome}")
    counts = ", ".join(f"{found[kind]} {kind.lower()}" for kind in ("Images", "Artifacts", "Blobs", "Layers"))
    context.say(f"{counts}: {f'{len(rows)} problems, {len(left)} remain' if rows else 'all whole'}")
    return 1 if left else 0
