"""Commands on images."""

from __future__ import annotations

import os

from dolium.cli import credentials, output
from dolium.cli.containers import FORMAT, filter_query, read_chunks
from dolium.cli.context import Context
from dolium.cli.flags import Command, Flag, UsageError
from dolium.cli.transport import ApiError, Client, query, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

ALL_PLATFORMS = Flag("--all-platforms", "bool", "the whole index: the images of all platforms")
PULL = Command("pull", "IMAGE [IMAGE ...]", "Fetch images from their registries.", [
    Flag("-a --all-tags", "bool", "all tags of the repository"), Flag("-q --quiet", "bool", "no progress"),
    Flag("--platform", "str", "of an image for another machine", "linux/arm64"), ALL_PLATFORMS],
    minimum=1, examples=["dolium pull 127.0.0.1:5000/debian:12", "dolium pull --all-platforms 127.0.0.1:5000/debian:12"])
IMAGES = Command("images", "[NAME]", "List images.", [
    Flag("-q --quiet", "bool", "ids only"), Flag("-a --all", "bool", "all"), Flag("--no-trunc", "bool", "whole ids"),
    Flag("--digests", "bool", "digests too"), FORMAT,
    Flag("-f --filter", "list", "reference=…, dangling=…, label=…, before=…, since=…, until=…", "KEY=VALUE")], maximum=1)
RMI = Command("rmi", "IMAGE [IMAGE ...]", "Remove images.", [
    Flag("-f --force", "bool", "even when containers were made of it")], minimum=1)
TAG = Command("tag", "IMAGE NAME[:TAG]", "Give an image another name.", [], minimum=2, maximum=2)
LOAD = Command("load", "", "Load images from an archive (docker save, OCI layout) on standard input or in a file.", [
    Flag("-i --input", "str", "the file", "FILE"), Flag("-q --quiet", "bool", "say nothing"), ALL_PLATFORMS], maximum=0)
IMPORT = Command("import", "FILE|- [NAME[:TAG]]", "Make an image of a root file system's tar.", [
    Flag("-c --change", "list", "a Dockerfile instruction", "INSTRUCTION"), Flag("-m --message", "str", "a comment"),
    Flag("--platform", "str", "what it is for", "linux/arm64")], minimum=1, maximum=2)
HISTORY = Command("history", "IMAGE", "Show how an image was made.", [
    Flag("-q --quiet", "bool", "ids only"), Flag("--no-trunc", "bool", "whole lines"), FORMAT], minimum=1, maximum=1)

class Bars:
    """Progress of a pull: bars that are drawn again in place on a terminal, plain lines elsewhere."""

    def __init__(self, file: Any, live: bool) -> None:
        self._file = file
        self._live = live
        self._rows: dict[str, int] = {}
        self._said: dict[str, str] = {}

    def show(self, row: dict[str, Any]) -> None:
        """One line of the daemon's stream. Raises ApiError for an error line."""
        if "error" in row:
            raise ApiError(500, row["error"])
        identity, status = row.get("id", ""), row.get("status", "")
        if "aux" in row:
            return
        text = f"{identity}: {status}" if identity else status
        if not self._live:
            if self._said.get(identity) != status:
                self._said[identity] = status
                if status not in ("Downloading", "Extracting", "Pushing"):
                    self._file.write(text + "\n")
            return
        detail = row.get("progressDetail") or {}
        if detail.get("total"):
            done = min(detail["current"] / detail["total"], 1.0)
            width = max(min(_columns(self._file) - len(text) - 26, 40), 5)
            filled = int(width * done)
            text += f" [{'=' * filled}{'>' if filled < width else ''}{' ' * (width - filled - 1)}]"
            text += f" {output.size(detail['current'])}/{output.size(detail['total'])}"
        if not identity:
            self._file.write(text + "\n")
            self._rows = {key: position + 1 for key, position in self._rows.items()}
            return
        if identity not in self._rows:
            self._rows = {key: position + 1 for key, position in self._rows.items()}
            self._rows[identity] = 1
            self._file.write(text + "\n")
        else:
            up = self._rows[identity]
            self._file.write(f"\x1b[{up}A\r\x1b[2K{text}\x1b[{up}B\r")
        self._file.flush()

def _columns(file: Any) -> int:
    try:
        return os.get_terminal_size(file.fileno()).columns
    except OSError:
        return 80

def pull_image(client: Client, context: Context, image: str, platform: str | None, *, quiet: bool,
               to_stderr: bool = False, every: bool = False, all_platforms: bool = False) -> None:
    """Pull (``every``: all tags) with bars where the output is a terminal. Raises ApiError."""
    context.own_process()
    file: Any = context.stderr if to_stderr else context.stdout
    name, _, digest = image.partition("@")
    if not digest:
        last = image.rpartition("/")[2]
        tag = last.partition(":")[2] or ("" if every else "latest")
        name = image[: len(image) - len(last)] + last.partition(":")[0]
    bars = Bars(file, os.isatty(file.fileno()))
    response = client.open("POST", "/images/create" + query(fromImage=name, tag=digest or tag, platform=platform,
                                                                allPlatforms=all_platforms),
                           headers=credentials.header(context, image))
    for row in response.lines():
        if not quiet or "error" in row:
            bars.show(row)
    if quiet and not to_stderr:
        context.say(image)

def pull(client: Client, context: Context, words: list[str]) -> int:
    """``dolium pull``."""
    options, names = PULL.parse(words)
    if options.get("help"):
        context.stdout.write(PULL.usage())
        return 0
    failed = 0
    for name in names:
        try:
            if options["all_tags"] and ("@" in name or ":" in name.rpartition("/")[2]):
                raise UsageError("tag can't be used with --all-tags/-a")
            pull_image(client, context, name, options["platform"], quiet=options["quiet"], every=options["all_tags"],
                       all_platforms=options["all_platforms"])
        except ApiError as error:
            context.complain(str(error))
            failed = 1
    return failed

def images(client: Client, context: Context, words: list[str]) -> int:
    """``dolium images``."""
    options, names = IMAGES.parse(words)
    if options.get("help"):
        context.stdout.write(IMAGES.usage())
        return 0
    wanted = [*options["filter"], *(f"reference={name}" for name in names)]
    rows = client.call("GET", "/images/json" + query(filters=filter_query(wanted)))
    cells, shown = [], []
    now = context.now()
    for row in rows:
        digests = {digest.rpartition("@")[0]: digest.rpartition("@")[2] for digest in row["RepoDigests"]}
        named = [tuple(tag.rpartition(":")[::2]) for tag in row["RepoTags"]]
        tagged = {repository for repository, _ in named}
        named += [(repository, "<none>") for repository in digests if repository not in tagged]  # pulled by digest
        for repository, word in named or [("<none>", "<none>")]:
            identity = row["Id"] if options["no_trunc"] else row["Id"].removeprefix("sha256:")[:12]
            digest = [digests.get(repository, "<none>")] if options["digests"] else []
            cells.append([repository, word, *digest, identity, f"{output.ago(now - row['Created'])} ago",
                          output.size(row["Size"])])
            shown.append(row)
    if options["quiet"]:
        for identity in dict.fromkeys(line[-3] for line in cells):
            context.say(identity)
        return 0
    titles = ["REPOSITORY", "TAG", *(["DIGEST"] if options["digests"] else []), "IMAGE ID", "CREATED", "SIZE"]
    output.listing(context, options["format"], titles, shown, cells)
    return 0

def remove(client: Client, context: Context, words: list[str]) -> int:
    """``dolium rmi``."""
    options, names = RMI.parse(words)
    if options.get("help"):
        context.stdout.write(RMI.usage())
        return 0
    failed = 0
    for name in names:
        try:
            for line in client.call("DELETE", f"/images/{quote(name)}{query(force=options['force'])}"):
                for kind, value in line.items():
                    context.say(f"{kind}: {value}")
        except ApiError as error:
            context.complain(str(error))
            failed = 1
    return failed

def tag(client: Client, context: Context, words: list[str]) -> int:
    """``dolium tag``."""
    options, names = TAG.parse(words)
    if options.get("help"):
        context.stdout.write(TAG.usage())
        return 0
    client.call("POST", f"/images/{quote(names[0])}/tag{query(repo=names[1])}")
    return 0

def _input(context: Context, path: str | None) -> Iterator[bytes]:
    if path in (None, "-"):
        if os.isatty(context.stdin_fd):
            raise UsageError("requested load from stdin, but stdin is empty: give --input FILE or a pipe")
        with open(context.stdin_fd, "rb", closefd=False) as stream:
            yield from read_chunks(stream)
        return
    assert path is not None
    try:
        with open(context.path(path), "rb") as file:
            yield from read_chunks(file)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error

def load(client: Client, context: Context, words: list[str]) -> int:
    """``dolium load``."""
    options, _ = LOAD.parse(words)
    if options.get("help"):
        context.stdout.write(LOAD.usage())
        return 0
    context.own_process()
    source = options["input"]
    if source not in (None, "-") and not os.path.exists(context.path(source)):
        raise UsageError(f"{source}: no such file")
    target = "/images/load" + query(quiet=options["quiet"], allPlatforms=options["all_platforms"])
    for row in client.open("POST", target, stream=_input(context, source)).lines():
        if "error" in row:
            raise ApiError(500, row["error"])
        if not options["quiet"]:
            context.stdout.write(row.get("stream") or row.get("status", "") + "\n")
    return 0

def import_(client: Client, context: Context, words: list[str]) -> int:
    """``dolium import``."""
    options, names = IMPORT.parse(words)
    if options.get("help"):
        context.stdout.write(IMPORT.usage())
        return 0
    context.own_process()
    if names[0] != "-" and not os.path.exists(context.path(names[0])):
        raise UsageError(f"{names[0]}: no such file")
    target = "/images/create" + query(fromSrc="-", repo=names[1] if len(names) > 1 else None, changes=options["change"],
                                      message=options["message"], platform=options["platform"])
    for row in client.open("POST", target, stream=_input(context, names[0])).lines():
        if "error" in row:
            raise ApiError(500, row["error"])
        context.say(row.get("status", ""))
    return 0

def history(client: Client, context: Context, words: list[str]) -> int:
    """``dolium history``."""
    options, names = HISTORY.parse(words)
    if options.get("help"):
        context.stdout.write(HISTORY.usage())
        return 0
    rows = client.call("GET", f"/images/{quote(names[0])}/history")
    now = context.now()
    cells = []
    for row in rows:
        command = row["CreatedBy"] if options["no_trunc"] or len(row["CreatedBy"]) <= 45 else row["CreatedBy"][:44] + "…"
        cells.append([row["Id"].removeprefix("sha256:")[:12], f"{output.ago(now - row['Created'])} ago", command,
                      output.size(row["Size"]), row["Comment"]])
    if options["quiet"]:
        for line in cells:
            context.say(line[0])
        return 0
    output.listing(context, options["format"], ["IMAGE", "CREATED", "CREATED BY", "SIZE", "COMMENT"], rows, cells)
    return 0

