"""What takes room on the disk, and what may go: system df, system prune, image prune."""

from __future__ import annotations

import json

from dolium.cli import output
from dolium.cli.containers import FORMAT, filter_query
from dolium.cli.context import Context
from dolium.cli.flags import Command, Flag, UsageError
from dolium.cli.transport import Client, query

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DF = Command("system df", "", "Show what takes room on the disk, and how much of it may go.", [
    Flag("-v --verbose", "bool", "every image, container and volume"), FORMAT], maximum=0)
_FILTER = Flag("--filter", "list", "until=24h, label=…, label!=…", "KEY=VALUE")
_FORCE = Flag("-f --force", "bool", "do not ask")
PRUNE_IMAGES = Command("image prune", "", "Remove images without a name, and with --all all that no container uses.", [
    Flag("-a --all", "bool", "named ones, too"), _FILTER, _FORCE], maximum=0)
PRUNE = Command("system prune", "", "Remove stopped containers and images without a name.", [
    Flag("-a --all", "bool", "all images that no container uses"), Flag("--volumes", "bool", "anonymous volumes, too"),
    _FILTER, _FORCE], maximum=0)


def _share(part: int, whole: int) -> str:
    return f"{output.size(part)} ({100 * part // whole}%)" if whole else output.size(part)


def _summary(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each kind: how many, how many in use, bytes, bytes that may go."""
    images, containers, volumes = found["Images"], found["Containers"], found["Volumes"]
    live = [one for one in containers if one["State"] in ("running", "paused", "restarting")]
    used = sum(one["Size"] - one["SharedSize"] for one in images if one["Containers"])
    return [
        {"Type": "Images", "TotalCount": len(images), "Active": sum(1 for one in images if one["Containers"]),
         "Size": found["LayersSize"], "Reclaimable": max(found["LayersSize"] - used, 0)},
        {"Type": "Image blobs", "TotalCount": len(images), "Active": sum(1 for one in images if one["Containers"]),
         "Size": found.get("Dolium", {}).get("ContentSize", 0), "Reclaimable": 0},
        {"Type": "Containers", "TotalCount": len(containers), "Active": len(live),
         "Size": sum(one["SizeRw"] for one in containers),
         "Reclaimable": sum(one["SizeRw"] for one in containers if one not in live)},
        {"Type": "Local Volumes", "TotalCount": len(volumes),
         "Active": sum(1 for one in volumes if one["UsageData"]["RefCount"]),
         "Size": sum(one["UsageData"]["Size"] for one in volumes),
         "Reclaimable": sum(one["UsageData"]["Size"] for one in volumes if not one["UsageData"]["RefCount"])},
    ]


def usage(client: Client, context: Context, words: list[str]) -> int:
    """``dolium system df``."""
    options, _ = DF.parse(words)
    if options.get("help"):
        context.stdout.write(DF.usage())
        return 0
    found = client.call("GET", "/system/df")
    if options["verbose"] and options["format"] == "json":
        context.say(json.dumps(found))
        return 0
    if options["verbose"]:
        _every(context, found)
        return 0
    rows = _summary(found)
    cells = [[row["Type"], str(row["TotalCount"]), str(row["Active"]), output.size(row["Size"]),
              _share(row["Reclaimable"], row["Size"])] for row in rows]
    output.listing(context, options["format"], ["TYPE", "TOTAL", "ACTIVE", "SIZE", "RECLAIMABLE"], rows, cells)
    return 0


def _every(context: Context, found: dict[str, Any]) -> None:
    context.say("Images space usage:\n")
    cells = []
    for one in found["Images"]:
        for tag in one["RepoTags"] or ["<none>:<none>"]:
            repository, _, word = tag.rpartition(":")
            cells.append([repository, word, one["Id"].removeprefix("sha256:")[:12], output.size(one["Size"]),
                          output.size(one["SharedSize"]), output.size(one["Size"] - one["SharedSize"]),
                          str(one["Containers"])])
    output.table(context, ["REPOSITORY", "TAG", "IMAGE ID", "SIZE", "SHARED SIZE", "UNIQUE SIZE", "CONTAINERS"], cells)
    context.say("\nContainers space usage:\n")
    output.table(context, ["CONTAINER ID", "IMAGE", "SIZE", "STATUS", "NAMES"], [
        [one["Id"][:12], one["Image"], output.size(one["SizeRw"]), one["Status"], one["Names"][0].removeprefix("/")]
        for one in found["Containers"]])
    context.say("\nLocal Volumes space usage:\n")
    output.table(context, ["VOLUME NAME", "LINKS", "SIZE"], [
        [one["Name"], str(one["UsageData"]["RefCount"]), output.size(one["UsageData"]["Size"])] for one in found["Volumes"]])


def sure(context: Context, warning: str) -> bool:
    """Ask on the terminal; without one there is nobody to say yes."""
    context.own_process()
    if not context.is_terminal(context.stdin_fd):
        raise UsageError(f"{warning} There is nobody to ask: give --force")
    context.stdout.write(f"WARNING! {warning}\nAre you sure you want to continue? [y/N] ")
    context.stdout.flush()
    with open(context.stdin_fd, "r", closefd=False) as stream:
        return stream.readline().strip().lower() in ("y", "yes")


def _deleted_images(context: Context, done: dict[str, Any]) -> int:
    rows = done.get("ImagesDeleted") or []
    if rows:
        context.say("Deleted Images:")
        for row in rows:
            for kind, value in row.items():
                context.say(f"{kind.lower()}: {value}")
        context.say("")
    return int(done["SpaceReclaimed"])


def prune_images(client: Client, context: Context, words: list[str]) -> int:
    """``dolium image prune``."""
    options, _ = PRUNE_IMAGES.parse(words)
    if options.get("help"):
        context.stdout.write(PRUNE_IMAGES.usage())
        return 0
    what = "all images without at least one container associated to them" if options["all"] else "all dangling images"
    if not options["force"] and not sure(context, f"This will remove {what}."):
        return 0
    wanted = [*options["filter"], f"dangling={'false' if options['all'] else 'true'}"]
    freed = _deleted_images(context, client.call("POST", "/images/prune" + query(filters=filter_query(wanted))))
    context.say(f"Total reclaimed space: {output.size(freed)}")
    return 0


def prune(client: Client, context: Context, words: list[str]) -> int:
    """``dolium system prune``."""
    options, _ = PRUNE.parse(words)
    if options.get("help"):
        context.stdout.write(PRUNE.usage())
        return 0
    parts = ["all stopped containers", "all networks not used by at least one container",
             *(["all anonymous volumes not used by at least one container"] * options["volumes"]),
             "all images without at least one container associated to them" if options["all"] else "all dangling images"]
    if not options["force"] and not sure(context, f"This will remove {', '.join(parts)}."):
        return 0
    freed = 0
    filters = query(filters=filter_query(options["filter"]))
    kinds = [("Containers", f"/containers/prune{filters}")] + [("Volumes", "/volumes/prune")] * options["volumes"]
    for kind, target in kinds:
        done = client.call("POST", target)
        freed += done["SpaceReclaimed"]
        if done[f"{kind}Deleted"]:
            context.say("\n".join([f"Deleted {kind}:", *done[f"{kind}Deleted"], ""]))
    networks = client.call("POST", f"/networks/prune{filters}")["NetworksDeleted"]
    if networks:
        context.say("\n".join(["Deleted Networks:", *networks, ""]))
    wanted = [*options["filter"], f"dangling={'false' if options['all'] else 'true'}"]
    freed += _deleted_images(context, client.call("POST", "/images/prune" + query(filters=filter_query(wanted))))
    context.say(f"Total reclaimed space: {output.size(freed)}")
    return 0
