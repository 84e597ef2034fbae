"""Commands of two words: ``dolium image …``, ``dolium system …`` and the like; most have a short form, too."""

from __future__ import annotations

from dolium.cli.context import Context
from dolium.cli.flags import UsageError
from dolium.cli.transport import Client

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# group: {command: (module, function, what it does)}
GROUPS = {
    "image": {
        "ls": ("images", "images", "list images"),
        "pull": ("images", "pull", "fetch an image from a registry"),
        "push": ("registries", "push", "send an image to a registry"),
        "inspect": ("groups", "inspect_image", "print all that is known, as JSON"),
        "history": ("images", "history", "show how an image was made"),
        "tag": ("images", "tag", "give an image another name"),
        "rm": ("images", "remove", "remove images"),
        "prune": ("disk", "prune_images", "remove images nobody uses"),
        "save": ("archives", "save", "write images to an archive"),
        "load": ("images", "load", "load images from an archive"),
        "import": ("images", "import_", "make an image of a root file system"),
    },
    "artifact": {
        "pull": ("artifacts", "pull", "fetch an artifact from a registry"),
        "push": ("artifacts", "push", "send an artifact to its registry"),
        "ls": ("artifacts", "listing", "list artifacts"),
        "inspect": ("artifacts", "inspect", "print all that is known, as JSON"),
        "add": ("artifacts", "add", "make an artifact of files"),
        "extract": ("artifacts", "extract", "write an artifact's files into a folder"),
        "rm": ("artifacts", "remove", "remove artifacts"),
    },
    "lease": {
        "ls": ("leases", "listing", "list leases"),
        "create": ("leases", "create", "keep blobs, whether an image names them or not"),
        "rm": ("leases", "remove", "end leases"),
    },
    "manifest": {
        "inspect": ("artifacts", "manifest", "print a manifest or index as the registry has it"),
        "referrers": ("artifacts", "referrers", "list what refers to an image in its registry"),
    },
    "network": {
        "ls": ("networks", "listing", "list networks"),
        "create": ("networks", "create", "make a network"),
        "connect": ("networks", "connect", "bring a container into a network"),
        "disconnect": ("networks", "disconnect", "take a container out of a network"),
        "inspect": ("networks", "inspect", "print all that is known, as JSON"),
        "rm": ("networks", "remove", "remove networks"),
        "prune": ("networks", "prune", "remove networks nobody uses"),
    },
    "system": {
        "check": ("artifacts", "check", "verify the image store, and repair it"),
        "df": ("disk", "usage", "show what takes room"),
        "prune": ("disk", "prune", "remove what nobody uses"),
        "info": ("system", "info", "facts about the daemon and this machine"),
        "events": ("system", "events", "print what happens"),
    },
    "volume": {
        "ls": ("volumes", "listing", "list volumes"),
        "create": ("volumes", "create", "make a volume"),
        "inspect": ("volumes", "inspect", "print all that is known, as JSON"),
        "rm": ("volumes", "remove", "remove volumes"),
        "prune": ("volumes", "prune", "remove volumes nobody uses"),
        "attach": ("volumes", "attach", "mount one in a container that runs"),
        "detach": ("volumes", "detach", "take one out of a container that runs"),
    },
}
_ALIASES = {"list": "ls", "remove": "rm"}


def _usage(name: str) -> str:
    lines = [f"usage: dolium {name} COMMAND [flags] [arguments]", "", "commands:"]
    lines += [f"  {command:<12}{about}" for command, (_, _, about) in GROUPS[name].items()]
    return "\n".join(lines) + "\n"


def _run(name: str, client: Client, context: Context, words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        context.stdout.write(_usage(name))
        return 0
    word = _ALIASES.get(words[0], words[0])
    if word not in GROUPS[name]:
        raise UsageError(f"{words[0]!r} is not a command of dolium {name}")
    module, function, _ = GROUPS[name][word]
    package = __import__(f"dolium.cli.{module}", fromlist=[function])
    command: Callable[[Client, Context, list[str]], int] = getattr(package, function)
    return command(client, context, words[1:])


def image(client: Client, context: Context, words: list[str]) -> int:
    """``dolium image``."""
    return _run("image", client, context, words)


def artifact(client: Client, context: Context, words: list[str]) -> int:
    """``dolium artifact``."""
    return _run("artifact", client, context, words)


def lease(client: Client, context: Context, words: list[str]) -> int:
    """``dolium lease``."""
    return _run("lease", client, context, words)


def manifest(client: Client, context: Context, words: list[str]) -> int:
    """``dolium manifest``."""
    return _run("manifest", client, context, words)


def network(client: Client, context: Context, words: list[str]) -> int:
    """``dolium network``."""
    return _run("network", client, context, words)


def system(client: Client, context: Context, words: list[str]) -> int:
    """``dolium system``."""
    return _run("system", client, context, words)


def volume(client: Client, context: Context, words: list[str]) -> int:
    """``dolium volume``."""
    return _run("volume", client, context, words)


def inspect_image(client: Client, context: Context, words: list[str]) -> int:
    """``dolium image inspect``."""
    from dolium.cli.containers import inspect

    return inspect(client, context, ["--type", "image", *words])
