"""Commands that take things out: save, export, commit, diff."""

from __future__ import annotations

import json
import os

from dolium.cli import output
from dolium.cli.context import Context
from dolium.cli.flags import Command, Flag, UsageError
from dolium.cli.images import ALL_PLATFORMS
from dolium.cli.stream import write_all
from dolium.cli.transport import Client, Response, query, quote

OUTPUT = Flag("-o --output", "str", "the file, in place of standard output", "FILE")
SAVE = Command("save", "IMAGE [IMAGE ...]",
               "Write images to an archive that docker load and everything that reads OCI layouts understand.",
               [OUTPUT, ALL_PLATFORMS],
               minimum=1, examples=["dolium save -o all.tar debian:12 web:3", "dolium save web:3 | ssh there dolium load"])
EXPORT = Command("export", "CONTAINER", "Write a container's root file system as a tar.", [OUTPUT], minimum=1, maximum=1)
COMMIT = Command("commit", "CONTAINER [NAME[:TAG]]", "Make an image of what a container has changed.", [
    Flag("-a --author", "str", "who made it", "TEXT"), Flag("-m --message", "str", "a comment"),
    Flag("-c --change", "list", "a Dockerfile instruction", "INSTRUCTION"),
    Flag("-p --pause", "bool", "freeze the container meanwhile (the default)", default=True)], minimum=1, maximum=2,
    examples=["dolium commit -c 'CMD [\"app\"]' web web:4", "dolium commit --pause=false web"])
DIFF = Command("diff", "CONTAINER", "List what a container has changed: A added, C changed, D deleted.", [
    Flag("--format", "str", "table or json", "FORMAT")], minimum=1, maximum=1)


def _to_output(context: Context, response: Response, path: str | None) -> None:
    """The body to a file, which appears whole or not at all, or to standard output, which must be no terminal."""
    if path in (None, "-"):
        context.stdout.flush()
        for chunk in response.chunks():
            write_all(context.stdout_fd, chunk)
        return
    assert path is not None
    place = context.path(path)
    beside = f"{place}.part-{os.getpid()}"
    try:
        with open(beside, "xb") as file:
            for chunk in response.chunks():
                file.write(chunk)
        os.replace(beside, place)
    except BaseException as error:
        if os.path.exists(beside):
            os.unlink(beside)
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise UsageError(f"{path}: {error.strerror}") from error
        raise


def _check_output(context: Context, path: str | None, what: str) -> None:
    if path is None and context.is_terminal(context.stdout_fd):
        raise UsageError(f"cowardly refusing to {what} to a terminal: use -o FILE or a pipe")


def save(client: Client, context: Context, words: list[str]) -> int:
    """``dolium save``."""
    options, names = SAVE.parse(words)
    if options.get("help"):
        context.stdout.write(SAVE.usage())
        return 0
    context.own_process()
    _check_output(context, options["output"], "save")
    _to_output(context, client.open("GET", "/images/get" + query(names=names, allPlatforms=options["all_platforms"])),
               options["output"])
    return 0


def export(client: Client, context: Context, words: list[str]) -> int:
    """``dolium export``."""
    options, names = EXPORT.parse(words)
    if options.get("help"):
        context.stdout.write(EXPORT.usage())
        return 0
    context.own_process()
    _check_output(context, options["output"], "export")
    _to_output(context, client.open("GET", f"/containers/{quote(names[0])}/export"), options["output"])
    return 0


def commit(client: Client, context: Context, words: list[str]) -> int:
    """``dolium commit``."""
    options, names = COMMIT.parse(words)
    if options.get("help"):
        context.stdout.write(COMMIT.usage())
        return 0
    target = "/commit" + query(
        container=names[0], repo=names[1] if len(names) > 1 else None, author=options["author"],
        comment=options["message"], changes=options["change"], pause="1" if options["pause"] else "0")
    context.say(client.call("POST", target)["Id"])
    return 0


def diff(client: Client, context: Context, words: list[str]) -> int:
    """``dolium diff``."""
    options, names = DIFF.parse(words)
    if options.get("help"):
        context.stdout.write(DIFF.usage())
        return 0
    rows = client.call("GET", f"/containers/{quote(names[0])}/changes") or []
    if options["format"] == "json":
        for row in rows:
            context.say(json.dumps(row))
        return 0
    if options["format"] not in (None, "", "table"):
        for row in rows:
            context.say(output.template(options["format"], {**row, "Type": "CAD"[row["Kind"]]}))
        return 0
    for row in rows:
        context.say(f"{'CAD'[row['Kind']]} {row['Path']}")
    return 0
