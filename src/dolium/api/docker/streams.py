"""What flows: attach, exec start, logs, stats, events."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web

from dolium import policy
from dolium.api.docker.common import CONTAINERS, ENGINE, EXECS, body, filters, flag, gone, label_matches, stream
from dolium.api.docker.errors import known
from dolium.api.docker.models import moment
from dolium.api.hijack import Connection, detach_bytes
from dolium.engine import logs, model
from dolium.engine.events import Event
from dolium.engine.model import Container
from dolium.engine.stats import sample
from dolium.errors import DoliumError, FailedPrecondition, InvalidArgument, Unimplemented
from dolium.isolation.base import Attachment

routes = web.RouteTableDef()

MULTIPLEXED, RAW = "application/vnd.docker.multiplexed-stream", "application/vnd.docker.raw-stream"


def keys_of(request: web.Request, given: str = "") -> bytes:
    """Detach keys as bytes. Raises InvalidArgument."""
    try:
        return detach_bytes(given or request.query.get("detachKeys") or policy.DETACH_KEYS)
    except ValueError as error:
        raise InvalidArgument(f"Invalid detach keys: {error}") from error


@routes.post("/containers/{name}/attach")
async def attach(request: web.Request) -> web.StreamResponse:
    """The connection goes to the container's shim, now or at its start."""
    containers = request.app[CONTAINERS]
    container = request.app[ENGINE].find(request.match_info["name"])
    if container.status == model.PAUSED:
        raise FailedPrecondition(f"container {container.id} is paused, unpause the container before attach")
    tty = bool(container.config.get("Tty"))
    options: dict[str, Any] = {
        "stdin": flag(request, "stdin") and bool(container.config.get("OpenStdin")), "stdout": flag(request, "stdout"),
        "stderr": flag(request, "stderr") and not tty, "mux": not tty, "detach_keys": keys_of(request) if tty else b"",
    }
    await request.read()
    connection = Connection(request)
    connection.answer(RAW if tty else MULTIPLEXED)
    if flag(request, "logs"):
        await _replay(connection.fd, containers.log_path(container), tty)
    if not flag(request, "stream"):
        os.close(connection.fd)
        return connection.release()
    attachment = Attachment(connection.fd, options)
    with contextlib.suppress(DoliumError):  # ended just now: the client sees the end of its stream
        await containers.attach(container, attachment)
    return connection.release()


async def _replay(fd: int, path: str, tty: bool) -> None:
    """What the log holds, to a client that may never read it: no thread waits for one."""
    records = logs.read_all(path)
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as client:
        client.setblocking(False)
        while lines := await asyncio.to_thread(list, itertools.islice(records, 256)):
            data = b"".join(line.text.encode("utf-8", "surrogateescape") if tty else framed(line) for line in lines)
            await asyncio.get_running_loop().sock_sendall(client, data)


def framed(line: logs.Line, text: str | None = None) -> bytes:
    """A log line in Docker's 8-byte frame."""
    data = (line.text if text is None else text).encode("utf-8", "surrogateescape")
    return bytes((2 if line.stream == "stderr" else 1, 0, 0, 0)) + len(data).to_bytes(4, "big") + data


@routes.post("/exec/{id}/start")
async def exec_start(request: web.Request) -> web.StreamResponse:
    """Detached: 200 when it runs. Else the connection goes to the shim; a failure comes before the 101."""
    execs = request.app[EXECS]
    one = execs.find(request.match_info["id"])
    wish = await body(request)
    size = wish.get("ConsoleSize") or [0, 0]
    if wish.get("Detach"):
        await asyncio.shield(execs.start(one, [], size=(size[0], size[1])))
        return web.Response(status=200)
    tty = bool(one.config.get("Tty"))
    execs.check(one)
    options = {"stdin": bool(one.config.get("AttachStdin")), "stdout": bool(one.config.get("AttachStdout")),
               "stderr": bool(one.config.get("AttachStderr")) and not tty, "mux": not tty,
               "detach_keys": keys_of(request, one.config.get("DetachKeys") or "") if tty else b""}
    connection = Connection(request)
    # The 101 must stand before the first byte of output, the error before the 101: the shim gets the socket only with
    # the launch, and writes behind what is written here.
    connection.answer(RAW if tty else MULTIPLEXED)
    try:
        keep = os.dup(connection.fd)
        try:
            await asyncio.shield(execs.start(one, [Attachment(connection.fd, options)], size=(size[0], size[1])))
        except Exception as error:  # noqa: BLE001 - a bug, too, is told where the answer has begun
            text = f"OCI runtime exec failed: exec failed: {known(request, error)}\r\n".encode()
            with contextlib.suppress(OSError):
                os.write(keep, text if tty else bytes((2, 0, 0, 0)) + len(text).to_bytes(4, "big") + text)
        finally:
            os.close(keep)
    finally:
        response = connection.release()
    return response


# -- logs --


def _time_limit(text: str | None) -> float | None:
    """``since`` and ``until``: Unix seconds with a fraction, or RFC 3339."""
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        return moment(text)


async def _lines(request: web.Request, container: Container, path: str) -> AsyncIterator[logs.Line]:
    tail = request.query.get("tail") or "all"
    count = None if tail == "all" else int(tail) if tail.lstrip("-").isdigit() else None
    count = None if count is not None and count < 0 else count
    engine = request.app[ENGINE]

    def running() -> bool:
        now = engine.containers.get(container.id)
        return flag(request, "follow") and now is not None and (now.live or now.starting or now.status == model.RESTARTING)

    if flag(request, "follow"):
        async for line in logs.follow(path, running, count=count):
            yield line
    else:
        for line in logs.tail(path, count) if count is not None else logs.read_all(path):
            yield line


@routes.get("/containers/{name}/logs")
async def container_logs(request: web.Request) -> web.StreamResponse:
    """Frames, or raw for a terminal. Read from the file: a slow reader holds up nobody."""
    container = request.app[ENGINE].find(request.match_info["name"])
    wanted = {name for name in ("stdout", "stderr") if flag(request, name)}
    if not wanted:
        raise InvalidArgument("Bad parameters: you must choose at least one stream")
    if (container.host_config.get("LogConfig") or {}).get("Type") == "none":
        raise Unimplemented("configured logging driver does not support reading")
    tty = bool(container.config.get("Tty"))
    since, until = _time_limit(request.query.get("since")), _time_limit(request.query.get("until"))
    response = await stream(request, RAW if tty else MULTIPLEXED)
    with contextlib.suppress(ConnectionError):
        async for line in _lines(request, container, request.app[CONTAINERS].log_path(container)):
            if line.stream not in wanted:
                continue
            if since is not None or until is not None:
                at = moment(line.time)
                if (since is not None and at < since) or (until is not None and at > until):
                    continue
            text = f"{line.time} {line.text}" if flag(request, "timestamps") else line.text
            await response.write(text.encode() if tty else framed(line, text))
            if gone(request):
                break
    return response


# -- stats --


@routes.get("/containers/{name}/stats")
async def stats(request: web.Request) -> web.StreamResponse:
    """Once a second, or once."""
    engine = request.app[ENGINE]
    container = engine.find(request.match_info["name"])
    once = not flag(request, "stream", True)
    response = await stream(request)
    before: dict[str, Any] = {}
    if once and not flag(request, "one-shot"):
        before = sample(engine, container)
        await asyncio.sleep(1)
    with contextlib.suppress(ConnectionError):
        while not gone(request) and container.id in engine.containers:
            now = sample(engine, container)
            row = {**now, "precpu_stats": before.get("cpu_stats") or {"cpu_usage": {"total_usage": 0}},
                   "preread": before.get("read") or "0001-01-01T00:00:00Z"}
            await response.write(json.dumps(row).encode() + b"\n")
            before = now
            if once:
                break
            await asyncio.sleep(1)
    return response


# -- events --


def _event_json(event: Event) -> bytes:
    row: dict[str, Any] = {
        "Type": event.kind, "Action": event.action, "Actor": {"ID": event.actor, "Attributes": event.attributes},
        "scope": "local", "time": event.time_ns // 1_000_000_000, "timeNano": event.time_ns,
    }
    if event.kind in ("container", "image"):
        row |= {"status": event.action, "id": event.actor}
        if "image" in event.attributes:
            row["from"] = event.attributes["image"]
    return json.dumps(row).encode() + b"\n"


def _event_matches(event: Event, wanted: dict[str, list[str]]) -> bool:
    for key, values in wanted.items():
        if key == "type" and event.kind not in values:
            return False
        if key == "event" and not any(event.action == value or event.action.split(":")[0] == value for value in values):
            return False
        if key in ("container", "image", "volume", "network"):
            name = event.attributes.get("name", "")
            if event.kind != key or not any(value in (event.actor, name) or event.actor.startswith(value)
                                            for value in values):
                return False
        if key == "label" and not label_matches(event.attributes, values):
            return False
    return True


@routes.get("/events")
async def events(request: web.Request) -> web.StreamResponse:
    """Past ones from ``since`` on, then as they come, until ``until`` or the client has enough."""
    bus, wanted = request.app[ENGINE].events, filters(request)
    since, until = _time_limit(request.query.get("since")), _time_limit(request.query.get("until"))
    queue = bus.subscribe()
    response = await stream(request)
    try:
        for event in bus.since(int(since * 1e9)) if since is not None else []:
            if (until is None or event.time_ns / 1e9 <= until) and _event_matches(event, wanted):
                await response.write(_event_json(event))
        while until is None or time.time() < until:
            try:
                async with asyncio.timeout(1.0 if until is None else min(1.0, max(until - time.time(), 0.01))):
                    next_event = await queue.get()
            except TimeoutError:
                if gone(request):
                    break
                continue
            if next_event is None:
                break
            if _event_matches(next_event, wanted):
                await response.write(_event_json(next_event))
    except ConnectionError:
        return response
    finally:
        bus.unsubscribe(queue)
    return response
