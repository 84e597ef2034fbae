"""``dolium lease``: what keeps blobs that no image names."""

from __future__ import annotations

from dolium.cli import output
from dolium.cli.containers import FORMAT
from dolium.cli.context import Context
from dolium.cli.flags import Command, Flag, UsageError
from dolium.cli.transport import ApiError, Client, query

LS = Command("lease ls", "", "List leases, those of pulls too.", [Flag("-q --quiet", "bool", "ids only"), FORMAT], maximum=0)
CREATE = Command("lease create", "ID [DIGEST ...]", "Keep blobs, whether an image names them or not.", [
    Flag("--seconds", "int", "for how long; for ever without", "N"), Flag("--label", "list", "of the lease", "KEY=VALUE")],
    minimum=1)
RM = Command("lease rm", "ID [ID ...]", "End leases: what they alone kept is removed.", [], minimum=1)


def listing(client: Client, context: Context, words: list[str]) -> int:
    """``dolium lease ls``."""
    options, _ = LS.parse(words)
    if options.get("help"):
        context.stdout.write(LS.usage())
        return 0
    rows = client.call("GET", "/dolium/leases")
    if options["quiet"]:
        for row in rows:
            context.say(row["Id"])
        return 0
    cells = [[row["Id"], row["Created"][:19], row["Expires"][:19] or "never", str(len(row["Blobs"])),
              ",".join(f"{key}={value}" for key, value in sorted(row["Labels"].items()))] for row in rows]
    output.listing(context, options["format"], ["ID", "CREATED", "EXPIRES", "BLOBS", "LABELS"], rows, cells)
    return 0


def create(client: Client, context: Context, words: list[str]) -> int:
    """``dolium lease create``."""
    options, names = CREATE.parse(words)
    if options.get("help"):
        context.stdout.write(CREATE.usage())
        return 0
    labels = {}
    for entry in options["label"]:
        key, equals, value = entry.partition("=")
        if not equals:
            raise UsageError(f"invalid argument {entry!r} for --label: write KEY=VALUE")
        labels[key] = value
    made = client.call("POST", "/dolium/leases" + query(name=names[0], seconds=options["seconds"]),
                       {"Blobs": names[1:], "Labels": labels})
    context.say(made["Id"])
    return 0


def remove(client: Client, context: Context, words: list[str]) -> int:
    """``dolium lease rm``."""
    options, names = RM.parse(words)
    if options.get("help"):
        context.stdout.write(RM.usage())
        return 0
    failed = 0
    for name in names:
        try:
            client.call("DELETE", "/dolium/leases" + query(name=name))
            context.say(name)
        except ApiError as error:
            context.complain(str(error))
            failed = 1
    return failed
