"""``dolium mirror``: a registry that fills itself from others, in the foreground."""

from __future__ import annotations

import os
import sys

from dolium.cli.context import Context
from dolium.cli.flags import Command, Flag, UsageError
from dolium.cli.transport import Client

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MIRROR = Command("mirror", "[IMAGE ...]",
                 "Serve as a registry what other registries have, and keep it: the images named are fetched at once.", [
    Flag("-l --listen", "str", "where to listen (127.0.0.1:5001)", "ADDRESS:PORT"),
    Flag("--upstream", "str", "the registry of names that say none (docker.io)", "REGISTRY"),
    Flag("--store", "str", "where to keep it (/var/lib/dolium-mirror)", "DIR"),
    Flag("--max-size", "str", "how much to keep; what was read longest ago goes first", "SIZE"),
    Flag("--fresh", "int", "seconds before a tag is asked for again (60)", "SECONDS"),
    Flag("--platform", "str", "of the images named, in place of all", "linux/arm64"),
    Flag("--tls-cert", "str", "certificate, as PEM", "FILE"), Flag("--tls-key", "str", "its key", "FILE"),
    Flag("--etc-root", "str", "folder of registries' settings (/etc)", "DIR")],
    examples=["dolium mirror --max-size 20g",
              "dolium pull 127.0.0.1:5001/library/debian:12        # from docker.io",
              "dolium pull 127.0.0.1:5001/quay.io/team/app:1       # from quay.io"])



def parse(words: list[str]) -> tuple[dict[str, Any], list[str], str, int]:
    """(flags, images, address, port). Raises UsageError."""
    options, names = MIRROR.parse(words)
    host, colon, port = (options["listen"] or "127.0.0.1:5001").rpartition(":")
    if not options.get("help") and (not colon or not port.isdigit() or int(port) > 65535):
        raise UsageError(f"--listen {options['listen']}: write ADDRESS:PORT")
    if bool(options["tls_cert"]) != bool(options["tls_key"]):
        raise UsageError("--tls-cert and --tls-key go together")
    return options, names, host.strip("[]"), int(port) if port.isdigit() else 0


def mirror(client: Client, context: Context, words: list[str]) -> int:  # noqa: RET503 - it ends in exec
    """``dolium mirror``. Ends with SIGTERM or SIGINT."""
    if parse(words)[0].get("help"):
        context.stdout.write(MIRROR.usage())
        return 0
    context.own_process()
    context.stdout.flush()
    # This process has no site-packages; the server needs them, and takes its place.
    os.execve(sys.executable, [sys.executable, "-I", "-m", "dolium.mirror", *words], context.env)
