"""dolium's own requests: one round trip where Docker's API takes five. Create, attach, start and wait; or exec.

The connection is answered with 101 and goes to the shim, which speaks Docker's frames; stream 4 carries the exit code
as its last frame, stream 5 a failure (JSON: message, status, code); stream 6 the id, before any output.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os

from aiohttp import web

from dolium.api.docker.common import CONTAINERS, EXECS, body
from dolium.api.docker.containers import split_create
from dolium.api.docker.errors import known, status_of
from dolium.api.docker.streams import keys_of
from dolium.api.hijack import Connection
from dolium.engine.containers import launch_exit_code
from dolium.errors import DoliumError, InvalidArgument
from dolium.isolation.base import Attachment

routes = web.RouteTableDef()
STREAM_EXIT, STREAM_FAILURE, STREAM_NOTE = 4, 5, 6


def frame(stream: int, data: bytes) -> bytes:
    """Docker's 8-byte header and the data."""
    return bytes((stream, 0, 0, 0)) + len(data).to_bytes(4, "big") + data


def _send(fd: int, stream: int, data: bytes) -> None:
    with contextlib.suppress(OSError):  # the client has gone: nobody to tell
        os.write(fd, frame(stream, data))


def _send_failure(fd: int, error: DoliumError, message: str, code: int) -> None:
    _send(fd, STREAM_FAILURE, json.dumps({"message": message, "status": status_of(error), "code": code}).encode())


@routes.post("/dolium/run")
async def run(request: web.Request) -> web.StreamResponse:
    """Body: ``name``, ``container`` (Docker's create body), ``rootfs``, ``platform``, ``stdin``, ``detach_keys``. Failures
    before the container exists are plain HTTP errors; later ones a frame of stream 5."""
    wish = await body(request)
    containers = request.app[CONTAINERS]
    if not isinstance(wish.get("container"), dict):
        raise InvalidArgument("container must be an object")
    config, host, networking = split_create(wish["container"])
    tty = bool(config.get("Tty"))
    # what the client got wrong is told before anything is made and before the connection is taken over
    keys = keys_of(request, wish.get("detach_keys") or "") if tty else b""
    # late: with --rm the client is told when the container is gone, and its name, image and ports are free
    options = {"stdin": bool(wish.get("stdin")), "stdout": True, "stderr": not tty, "mux": True, "exit_frame": True,
               "late": bool(host.get("AutoRemove")), "detach_keys": keys}
    container = await containers.create(wish.get("name") or "", config, host, networking,
                                        rootfs=wish.get("rootfs") or "", starting=True,
                                        platform=str(wish.get("platform") or ""))
    connection: Connection | None = None
    try:
        connection = Connection(request)
        connection.answer("application/vnd.docker.multiplexed-stream")
    except (DoliumError, OSError):  # the client has gone before it was told anything
        if connection is not None:
            os.close(connection.fd)
        await containers.remove(container.id, force=True, volumes=True)
        raise
    keep = os.dup(connection.fd)
    try:
        # known to the client before any output: it may have to send a signal or a new window size
        _send(keep, STREAM_NOTE, container.id.encode())
        await containers.attach(container, Attachment(connection.fd, options))
        await asyncio.shield(containers.start(container.id))
    except Exception as error:  # noqa: BLE001 - a bug is no success: the answer has begun, so the stream tells it
        text = str(told := known(request, error))
        _send_failure(keep, told, text, launch_exit_code(text))
    finally:
        os.close(keep)
        response = connection.release()
    return response


@routes.post("/dolium/exec")
async def execute(request: web.Request) -> web.StreamResponse:
    """Body: ``container``, ``exec`` (Docker's exec config), ``size``, ``detach_keys``."""
    wish = await body(request)
    execs = request.app[EXECS]
    config = wish.get("exec")
    if not isinstance(config, dict):
        raise InvalidArgument("exec must be an object")
    tty = bool(config.get("Tty"))
    one = execs.create(str(wish.get("container") or ""), config)
    size = wish.get("size") or [0, 0]
    options = {"stdin": bool(config.get("AttachStdin")), "stdout": True, "stderr": not tty, "mux": True, "exit_frame": True,
               "detach_keys": keys_of(request, wish.get("detach_keys") or "") if tty else b""}
    connection = Connection(request)
    connection.answer("application/vnd.docker.multiplexed-stream")
    keep = os.dup(connection.fd)
    try:
        _send(keep, STREAM_NOTE, one.id.encode())
        await asyncio.shield(execs.start(one, [Attachment(connection.fd, options)], size=(size[0], size[1])))
    except Exception as error:  # noqa: BLE001 - as above
        told = known(request, error)
        _send_failure(keep, told, f"OCI runtime exec failed: exec failed: {told}", one.exit_code or 126)
    finally:
        os.close(keep)
        response = connection.release()
    return response


@routes.post("/dolium/stop")
async def stop_daemon(request: web.Request) -> web.Response:
    """End the daemon; containers live on. The answer says whose end to wait for."""
    request.app[STOP].set()
    return web.json_response({"pid": os.getpid()})


STOP = web.AppKey("stop", asyncio.Event)
