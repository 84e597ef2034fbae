"""/containers/NAME/archive: ``docker cp`` both ways, as tar streams, through fds opened inside the container's root."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ctypes
import json
import os
import stat
import tarfile
import threading
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from aiohttp import web

from dolium import depth
from dolium.api.docker.common import CONTAINERS, ENGINE
from dolium.engine import changes
from dolium.engine.model import Container
from dolium.engine.rootfs import open_subpath
from dolium.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from dolium.images.difference import inside
from dolium.linux import syscalls
from dolium.native import program
from dolium.units import rfc3339

routes = web.RouteTableDef()
_AHEAD = 8
"""Pieces of an export, a quarter of a megabyte each, that wait for their client."""


def _path(request: web.Request) -> str:
    path = request.query.get("path", "")
    if not path:
        raise InvalidArgument("bad parameter: path is required")
    return "/" + path.lstrip("/")


def _go_mode(mode: int) -> int:
    """Go's os.FileMode bits, which the client reads."""
    bits = mode & 0o777
    for kind, bit in ((stat.S_ISDIR, 31), (stat.S_ISLNK, 27), (stat.S_ISBLK, 26), (stat.S_ISFIFO, 25), (stat.S_ISSOCK, 24)):
        if kind(mode):
            bits |= 1 << bit
    if stat.S_ISCHR(mode):
        bits |= 1 << 26 | 1 << 21
    for flag_bit, bit in ((stat.S_ISUID, 23), (stat.S_ISGID, 22), (stat.S_ISVTX, 20)):
        if mode & flag_bit:
            bits |= 1 << bit
    return bits


def _open(root: int, path: str, container: Container) -> int:
    """An O_PATH fd of the path itself, its last component not followed when it is a link."""
    folder, _, name = path.rstrip("/").rpartition("/")
    try:
        if not name or path.endswith("/"):
            return syscalls.open_in_root(root, path, os.O_PATH)
        parent = syscalls.open_in_root(root, folder or "/", os.O_PATH | os.O_DIRECTORY)
        try:
            return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        finally:
            os.close(parent)
    except OSError as error:
        if error.errno in (2, 20):
            raise NotFound(f"Could not find the file {path} in container {container.name}") from error
        raise


LINKS_FOLLOWED = 40
"""As many as the kernel follows in one path."""


def _resolved(root: int, path: str) -> str:
    """Where a path leads inside the root, all links followed, as text: what is there is opened anew by whoever asks for it.
    What does not exist leads to itself. Raises InvalidArgument for too many links."""
    done, left, followed = "", path.split("/"), 0
    while left:
        name = left.pop(0)
        if name in ("", "."):
            continue
        if name == "..":
            done = done.rpartition("/")[0]
            continue
        try:
            parent = syscalls.open_in_root(root, done or "/", os.O_PATH | os.O_DIRECTORY)
            try:
                target = os.readlink(name, dir_fd=parent)
            finally:
                os.close(parent)
        except OSError:  # not a link, or nothing there
            done = f"{done}/{name}"
            continue
        followed += 1
        if followed > LINKS_FOLLOWED:
            raise InvalidArgument(f"{path}: too many levels of symbolic links")
        if target.startswith("/"):
            done = ""
        left = target.split("/") + left
    return done or "/"


def _stat_header(fd: int, path: str, target: str = "") -> str:
    """``target``: where a link leads, for who wants to follow it."""
    info = os.fstat(fd)
    value: dict[str, Any] = {"name": os.path.basename(path.rstrip("/")) or "/", "size": info.st_size,
                             "mode": _go_mode(info.st_mode), "mtime": rfc3339(info.st_mtime), "linkTarget": target}
    return base64.b64encode(json.dumps(value).encode()).decode()


@routes.head("/containers/{name}/archive")
async def head(request: web.Request) -> web.Response:
    """What is there, in a header."""
    engine = request.app[ENGINE]
    container, path = engine.find(request.match_info["name"]), _path(request)
    async with _view(request, container, path) as (root, place, own):
        fd = _open(root, place, container)
        try:
            target = ""
            if stat.S_ISLNK(os.fstat(fd).st_mode):
                # in a volume of a container that does not run, the root is the volume
                target = _resolved(root, place) if own else os.readlink("", dir_fd=fd)
            header = _stat_header(fd, path, target)
        finally:
            os.close(fd)
    return web.Response(headers={"X-Docker-Container-Path-Stat": header})


def _pack(fd: int, name: str, out: int, ids: Sequence[int] = ()) -> None:
    """Tar what the fd names into a pipe's end, which is closed. Links are packed as links; nothing is followed out of
    the tree. A reader that has gone ends it quietly. ``ids``: the range whose ids are seen inside, from 0."""
    with contextlib.suppress(BrokenPipeError), open(out, "wb") as file, \
            tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        depth.run(_add(archive, fd, name, ids))


class _Object:
    """An fd for ``gettarinfo``, which asks for its number and name."""

    def __init__(self, fd: int) -> None:
        self.name = f"/proc/self/fd/{fd}"  # the object itself, also a link; never a name that could be another's by now
        self._fd = fd

    def fileno(self) -> int:
        return self._fd


_LIBC = ctypes.CDLL(None, use_errno=True)  # loaded before a fork
_CLONE_NEWUSER = 0x10000000


def _become_root_of(user: int) -> None:
    """In a child before exec: what it makes belongs to the root of the user namespace. Raises OSError."""
    if _LIBC.setns(user, _CLONE_NEWUSER) < 0:
        raise OSError(ctypes.get_errno(), "setns")
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def _add(archive: tarfile.TarFile, fd: int, name: str, ids: Sequence[int]) -> depth.Steps[None]:
    """One entry and what is below it, each looked at and opened through one fd: the container, which may put a link in
    the place of a folder or file at any moment, cannot lead us elsewhere."""
    entry: Any = _Object(fd)
    if stat.S_ISSOCK(os.fstat(fd).st_mode):
        return  # a tar has no word for one
    info = archive.gettarinfo(arcname=name, fileobj=entry)
    info.uid, info.gid = inside(info.uid, ids), inside(info.gid, ids)
    if info.issym():
        info.linkname = os.readlink("", dir_fd=fd)
    if info.isreg():
        with open(entry.name, "rb") as content:
            archive.addfile(info, content)
        return
    archive.addfile(info)
    if not info.isdir():
        return
    folder = os.open(entry.name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for below in sorted(os.listdir(folder)):
            try:
                child = os.open(below, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            except FileNotFoundError:
                continue  # removed meanwhile
            try:
                yield _add(archive, child, f"{name}/{below}", ids)
            finally:
                os.close(child)
    finally:
        os.close(folder)


@contextlib.asynccontextmanager
async def _view(request: web.Request, container: Container, path: str) -> AsyncIterator[tuple[int, str, bool]]:
    """(root, the path in it, is it the container's own root?). The volumes and host folders of a container that does not run
    are not mounted: a path below one is looked up in its source."""
    engine = request.app[ENGINE]
    async with contextlib.AsyncExitStack() as held:
        if not container.live:  # nobody starts or removes it meanwhile
            await held.enter_async_context(engine.lock(container.id))
            if container.id not in engine.containers:
                raise NotFound(f"No such container: {container.id}")
        root = await held.enter_async_context(engine.roots.opened(container))
        inside = [mount for mount in container.mounts
                  if mount.kind in ("bind", "volume") and f"{path}/".startswith(f"{mount.target}/")]
        if container.live or not inside:
            yield root, path, True
            return
        mount = max(inside, key=lambda one: len(one.target))
        volumes = request.app[CONTAINERS].volumes
        held.push_async_callback(volumes.release, container)
        await volumes.mount(container, root)
        rest = path[len(mount.target) :]
        if mount.subpath:
            source, folder = open_subpath(mount), True
            held.callback(os.close, source)
            if not stat.S_ISDIR(os.fstat(source).st_mode):
                raise FailedPrecondition(f"{path} is a file in volume {mount.name}: start the container first")
        else:
            folder = os.path.isdir(mount.source)
            source = os.open(mount.source if folder else os.path.dirname(mount.source),
                             os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            held.callback(os.close, source)
        yield source, rest or "/" if folder else f"/{os.path.basename(mount.source)}{rest}", False


@routes.get("/containers/{name}/archive")
async def get(request: web.Request) -> web.StreamResponse:
    """A tar of a path."""
    engine = request.app[ENGINE]
    container, path = engine.find(request.match_info["name"]), _path(request)
    async with _view(request, container, path) as (root, place, own):
        fd = _open(root, place, container)
        try:
            kind = stat.S_IFMT(os.fstat(fd).st_mode)
            if kind not in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
                raise InvalidArgument(f"{path} is no file, folder or link")
            response = web.StreamResponse(headers={"Content-Type": "application/x-tar",
                                                   "X-Docker-Container-Path-Stat": _stat_header(fd, path)})
            await response.prepare(request)
            # a volume of a container that does not run is seen as it is on the disk: with the owners inside
            ids = container.ids if own else []
            await _send_tar(response, fd, os.path.basename(path.rstrip("/")) or "/", ids)
        finally:
            os.close(fd)
    return response


async def _send_tar(response: web.StreamResponse, fd: int, name: str, ids: Sequence[int]) -> None:
    """A thread packs into a pipe, the loop sends what comes out."""
    out, into = os.pipe2(os.O_CLOEXEC)
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), open(out, "rb", buffering=0))
    task = asyncio.create_task(asyncio.to_thread(_pack, fd, name, into, ids))
    try:
        while chunk := await reader.read(1 << 16):
            await response.write(chunk)
    finally:
        transport.close()
        await task


@routes.get("/containers/{name}/export")
async def export(request: web.Request) -> web.StreamResponse:
    """``docker export``: the root as a tar, without volumes and what else is mounted in it."""
    engine, name = request.app[ENGINE], engine_name(request)
    pieces: asyncio.Queue[bytes | None] = asyncio.Queue()
    loop, room = asyncio.get_running_loop(), threading.Semaphore(_AHEAD)

    def write(data: bytes) -> None:
        room.acquire()  # the client reads at its own pace
        if task.cancelled() or left.is_set():
            raise BrokenPipeError
        loop.call_soon_threadsafe(pieces.put_nowait, data)

    left = threading.Event()
    task = asyncio.ensure_future(changes.export(engine, name, write))
    task.add_done_callback(lambda done: pieces.put_nowait(None))
    response = web.StreamResponse(headers={"Content-Type": "application/x-tar"})
    try:
        while (data := await pieces.get()) is not None:
            room.release()
            if not response.prepared:
                await response.prepare(request)
            await response.write(data)
    finally:
        left.set()
        room.release()
        with contextlib.suppress(BrokenPipeError):
            await asyncio.shield(task)
    engine.event(engine.find(name), "export")
    return response


def engine_name(request: web.Request) -> str:
    """The id of the container in the path. Raises NotFound."""
    return request.app[ENGINE].find(request.match_info["name"]).id


@routes.put("/containers/{name}/archive")
async def put(request: web.Request) -> web.Response:
    """Unpack a tar into a folder, by the same program that unpacks layers: no entry leaves the folder."""
    engine = request.app[ENGINE]
    container, path = engine.find(request.match_info["name"]), _path(request)
    for mount in container.mounts:
        if mount.read_only and (path == mount.target or path.startswith(f"{mount.target}/")):
            raise PermissionDenied(f"container path {path} is marked read-only")
    if container.host_config.get("ReadonlyRootfs") and not any(
            path == mount.target or path.startswith(f"{mount.target}/") for mount in container.mounts):
        raise PermissionDenied("container rootfs is marked read-only")
    async with _view(request, container, path) as (root, place, own):
        try:
            fd = syscalls.open_in_root(root, place, os.O_RDONLY | os.O_DIRECTORY)
        except NotADirectoryError as error:
            raise InvalidArgument("extraction point is not a directory") from error
        except FileNotFoundError as error:
            raise NotFound(f"Could not find the file {path} in container {container.name}") from error
        try:
            mapped = bool(container.ids) and own
            user = await request.app[CONTAINERS].user_namespace(container) if mapped else -1
            # by an fd: root of a user namespace need not reach the folder that the program lies in
            untar = os.open(program("dolium-untar"), os.O_RDONLY | os.O_CLOEXEC)
            try:
                process = await asyncio.create_subprocess_exec(
                    f"/proc/self/fd/{untar}", "--apply", str(fd), pass_fds=[fd, untar], stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
                    preexec_fn=partial(_become_root_of, user) if mapped else None)
            finally:
                os.close(untar)
                if user >= 0:
                    os.close(user)
            assert process.stdin is not None and process.stderr is not None
            # a program that ended early has its message read below
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                async for chunk in request.content.iter_chunked(1 << 18):
                    process.stdin.write(chunk)
                    await process.stdin.drain()
            process.stdin.close()
            message = (await process.stderr.read()).decode("utf-8", "replace").strip()
            if await process.wait():
                raise InvalidArgument(f"unpack into {path}: {message}")
        finally:
            os.close(fd)
    return web.Response(status=200)
