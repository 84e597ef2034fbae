"""The pull-through cache's program: puts the cache, the HTTP server and the caller's credentials together."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

from dolium.api.mirror import serve
from dolium.cli import credentials
from dolium.cli.context import Context
from dolium.cli.mirror import parse
from dolium.cli.transport import ApiError
from dolium.errors import DoliumError, InvalidArgument
from dolium.images.auth import Credentials
from dolium.images.mirror import Mirror
from dolium.images.platform import Platform
from dolium.images.reference import is_domain
from dolium.units import parse_size


async def run(context: Context, words: list[str]) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code. Raises DoliumError, ApiError, OSError."""
    options, names, host, port = parse(words)
    upstream = options["upstream"] or "docker.io"
    if not is_domain(upstream):
        raise InvalidArgument(f"invalid --upstream: {upstream!r}", hint="a registry as names have it: HOST or HOST:PORT")

    def find(domain: str) -> Credentials | None:
        return Credentials.parse(credentials.find(context, credentials.key_of(domain)))

    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    tls = (context.path(options["tls_cert"]), context.path(options["tls_key"])) if options["tls_cert"] else None
    cache = Mirror(
        Path(context.path(options["store"] or "/var/lib/dolium-mirror")),
        etc=Path(context.path(options["etc_root"] or "/etc")), upstream=upstream, credentials=find,
        fresh=60.0 if options["fresh"] is None else float(options["fresh"]),
        limit=parse_size(options["max_size"], name="--max-size") if options["max_size"] else 0)
    if lost := await cache.recover():
        context.complain(f"{lost} blobs were torn when the machine went down: they are fetched again when asked for")
    listening: asyncio.Future[int] = loop.create_future()
    task = asyncio.ensure_future(serve(cache, host, port, tls=tls, stop=stop, listening=listening))
    either: set[asyncio.Future[Any]] = {task, listening}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    if not listening.done():
        await task
        return 1
    context.say(f"listening on {host}:{listening.result()}, process {os.getpid()}")
    context.stdout.flush()
    platform = Platform.parse(options["platform"]) if options["platform"] else None
    failed = 0
    for name in names:
        try:
            context.say(f"{name}: {await cache.prefetch(name, platform)} blobs are here")
        except DoliumError as error:
            context.complain(f"{name}: {error}")
            failed = 1
        context.stdout.flush()
    await task
    return failed


def entry() -> int:
    """The program."""
    context = Context.of_process()
    try:
        return asyncio.run(run(context, context.argv[1:]))
    except (DoliumError, ApiError) as error:
        context.complain(f"mirror: {error}")
    except OSError as error:
        context.complain(f"mirror: {error.filename or ''} {error.strerror or error}")
    return 1


if __name__ == "__main__":
    sys.exit(entry())
