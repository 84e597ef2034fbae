"""``dolium volume``: folders that outlive containers."""

from __future__ import annotations

import json

from dolium.cli import output
from dolium.cli.containers import FORMAT, filter_query
from dolium.cli.context import Context
from dolium.cli.flags import Command, Flag, UsageError, pairs
from dolium.cli.transport import ApiError, Client, query, quote

LS = Command("volume ls", "", "List volumes.", [
    Flag("-q --quiet", "bool", "names only"),
    Flag("-f --filter", "list", "name=…, label=…, driver=…, dangling=true", "KEY=VALUE"), FORMAT], maximum=0)
CREATE = Command("volume create", "[NAME]", "Make a volume; without a name an anonymous one, which prune removes.", [
    Flag("-d --driver", "str", "local", "DRIVER"), Flag("--label", "list", "a label", "KEY=VALUE"),
    Flag("-o --opt", "list", "a driver's option", "KEY=VALUE"), Flag("--name", "str", "another place for the name", "NAME")],
    maximum=1)
INSPECT = Command("volume inspect", "VOLUME [VOLUME ...]", "Print all that is known, as JSON.",
                  [Flag("-f --format", "str", "json or a template", "FORMAT")], minimum=1)
RM = Command("volume rm", "VOLUME [VOLUME ...]", "Remove volumes that no container mounts, and what is in them.",
             [Flag("-f --force", "bool", "pass over one that is not there")], minimum=1)
ATTACH = Command("volume attach", "CONTAINER VOLUME:/TARGET[:ro]", "Mount a volume in a container that runs, and at its "
                 "starts from now on. The volume is made when it is not there.", [], minimum=2, maximum=2)
DETACH = Command("volume detach", "CONTAINER VOLUME|/TARGET", "Take a volume out of a container. What is in it stays.", [
    Flag("-f --force", "bool", "also while processes have files open in it, which they keep")], minimum=2, maximum=2)
PRUNE = Command("volume prune", "", "Remove anonymous volumes that no container mounts, and with --all named ones.", [
    Flag("-a --all", "bool", "named ones, too"), Flag("--filter", "list", "label=…, label!=…", "KEY=VALUE"),
    Flag("-f --force", "bool", "do not ask")], maximum=0)


def listing(client: Client, context: Context, words: list[str]) -> int:
    """``dolium volume ls``."""
    options, _ = LS.parse(words)
    if options.get("help"):
        context.stdout.write(LS.usage())
        return 0
    rows = client.call("GET", "/volumes" + query(filters=filter_query(options["filter"])))["Volumes"]
    if options["quiet"]:
        for row in rows:
            context.say(row["Name"])
        return 0
    cells = [[row["Driver"], row["Name"]] for row in rows]
    output.listing(context, options["format"], ["DRIVER", "VOLUME NAME"], rows, cells)
    return 0


def create(client: Client, context: Context, words: list[str]) -> int:
    """``dolium volume create``."""
    options, names = CREATE.parse(words)
    if options.get("help"):
        context.stdout.write(CREATE.usage())
        return 0
    if options["name"] and names:
        raise UsageError("conflicting options: cannot specify a volume-name through both --name and as a positional arg")
    made = client.call("POST", "/volumes/create", {
        "Name": options["name"] or (names[0] if names else ""), "Driver": options["driver"] or "local",
        "DriverOpts": pairs(options["opt"], "--opt"),
        "Labels": {key: text for key, _, text in (label.partition("=") for label in options["label"])}})
    context.say(made["Name"])
    return 0


def inspect(client: Client, context: Context, words: list[str]) -> int:
    """``dolium volume inspect``."""
    options, names = INSPECT.parse(words)
    if options.get("help"):
        context.stdout.write(INSPECT.usage())
        return 0
    found = [client.call("GET", f"/volumes/{quote(name)}") for name in names]
    if options["format"] and options["format"] != "json":
        for row in found:
            context.say(output.template(options["format"], row))
        return 0
    context.say(json.dumps(found, indent=None if options["format"] else 4))
    return 0


def remove(client: Client, context: Context, words: list[str]) -> int:
    """``dolium volume rm``."""
    options, names = RM.parse(words)
    if options.get("help"):
        context.stdout.write(RM.usage())
        return 0
    failed = 0
    for name in names:
        try:
            client.call("DELETE", f"/volumes/{quote(name)}")
            context.say(name)
        except ApiError as error:
            if not (options["force"] and error.status == 404):
                context.complain(str(error))
                failed = 1
    return failed


def attach(client: Client, context: Context, words: list[str]) -> int:
    """``dolium volume attach``."""
    options, names = ATTACH.parse(words)
    if options.get("help"):
        context.stdout.write(ATTACH.usage())
        return 0
    done = client.call("POST", f"/dolium/containers/{quote(names[0])}/volumes", {"Volume": names[1]})
    context.say(f"{done['Name']}:{done['Destination']}")
    return 0


def detach(client: Client, context: Context, words: list[str]) -> int:
    """``dolium volume detach``."""
    options, names = DETACH.parse(words)
    if options.get("help"):
        context.stdout.write(DETACH.usage())
        return 0
    done = client.call("DELETE", f"/dolium/containers/{quote(names[0])}/volumes" + query(
        volume=names[1], force="1" if options["force"] else ""))
    context.say(f"{done['Name']}:{done['Destination']}")
    return 0


def prune(client: Client, context: Context, words: list[str]) -> int:
    """``dolium volume prune``."""
    from dolium.cli.disk import sure

    options, _ = PRUNE.parse(words)
    if options.get("help"):
        context.stdout.write(PRUNE.usage())
        return 0
    which = "all" if options["all"] else "anonymous"
    if not options["force"] and not sure(
            context, f"This will remove {which} local volumes not used by at least one container."):
        return 0
    wanted = [*options["filter"], *(["all=true"] * options["all"])]
    done = client.call("POST", "/volumes/prune" + query(filters=filter_query(wanted)))
    if done["VolumesDeleted"]:
        context.say("\n".join(["Deleted Volumes:", *done["VolumesDeleted"], ""]))
    context.say(f"Total reclaimed space: {output.size(done['SpaceReclaimed'])}")
    return 0
