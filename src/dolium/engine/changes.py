"""What a container has changed: ``diff``, ``commit`` and ``export``."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dolium.engine import model
from dolium.engine.containers import Containers
from dolium.engine.engine import Engine
from dolium.engine.model import Container
from dolium.errors import FailedPrecondition, NotFound
from dolium.images.changes import apply_changes
from dolium.images.difference import Difference, differences, pack
from dolium.images.flight import settled
from dolium.images.view import Image

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NOT_THE_IMAGE_S = ("Image", "Hostname", "Domainname", "AttachStdin", "AttachStdout", "AttachStderr", "Tty", "OpenStdin",
                    "StdinOnce", "NetworkDisabled", "MacAddress", "StopTimeout")
"""Keys of a container's Config that are of this container, not of an image made from it."""


async def diff(engine: Engine, reference: str) -> list[Difference]:
    """``docker diff``: paths added, changed and deleted. Raises NotFound."""
    container = engine.find(reference)

    def work() -> list[Difference]:
        with engine.roots.lower(container) as lower, engine.roots.written(container) as upper:
            return differences(upper, lower)

    async with engine.lock(container.id):
        _still_there(engine, container)
        return await asyncio.to_thread(work)


def _still_there(engine: Engine, container: Container) -> None:
    if container.id not in engine.containers:
        raise NotFound(f"No such container: {container.id}")


def settings(container: Container, own: dict[str, Any], changes: Iterable[str]) -> dict[str, object]:
    """The new image's ``config``: the container's, what the request says (an image's Config, as Docker's clients may send),
    then ``--change`` instructions. Raises InvalidArgument.
    """
    merged: dict[str, object] = {key: value for key, value in container.config.items()
                                 if key not in _NOT_THE_IMAGE_S and value not in (None, "", [], {})}
    merged |= {key: value for key, value in own.items() if key not in _NOT_THE_IMAGE_S and value not in (None, "", [], {})}
    return apply_changes(merged, changes)


async def commit(
    engine: Engine, containers: Containers, reference: str, *, name: str | None, author: str, message: str, pause: bool,
    changes: Iterable[str], own: dict[str, Any],
) -> Image:
    """``docker commit``: the container's changes as a new layer on its image. ``pause`` freezes a running one meanwhile.

    Raises NotFound, InvalidArgument, FailedPrecondition (a container of a host's folder has no image), ResourceExhausted.
    """
    container = engine.find(reference)
    if not container.image_id:
        raise FailedPrecondition(f"container {container.name} has no image: it runs on the host's {container.rootfs}",
                                 hint="dolium diff lists what it changed, dolium cp fetches it")
    config = settings(container, own, changes)
    frozen = pause and container.status == model.RUNNING
    if frozen:
        await containers.pause(container.id, True)
    try:
        async with engine.lock(container.id):
            _still_there(engine, container)

            def write(out: Callable[[bytes], object]) -> int:
                with engine.roots.written(container) as upper:
                    folder = os.open(upper, _FOLDER)
                    try:
                        return pack(folder, out, layer=True, ids=engine.roots.ids_written(container))
                    finally:
                        os.close(folder)

            image = await engine.images.commit(
                container.image_id, write, config, name=name, author=author, message=message,
                command=" ".join([container.path, *container.args]))
    finally:
        if frozen:
            with contextlib.suppress(FailedPrecondition):  # it ended, or somebody let it go on
                await containers.pause(container.id, False)
    engine.event(container, "commit", comment=message, imageID=image.id, imageRef=name or "")
    return image


async def export(engine: Engine, reference: str, write: Callable[[bytes], object]) -> None:
    """``docker export``: the root as a tar, without what is mounted in it. ``write`` is called in a thread.

    Raises NotFound, FailedPrecondition (a host's folder with this daemon's own state in it), and what ``write`` raises.
    """
    container = engine.find(reference)
    state, whole = os.path.realpath(engine.paths.data), os.path.realpath(container.rootfs)
    if container.rootfs and os.path.commonpath([state, whole]) == whole:
        raise FailedPrecondition(f"container {container.name} runs on the host's {container.rootfs}, which has dolium's own "
                                 "state in it", hint="dolium diff lists what it changed, dolium cp fetches it")
    held = contextlib.ExitStack()

    def work(root: int) -> None:
        folder = os.open(".", _FOLDER, dir_fd=root)
        try:
            pack(folder, write, layer=False, ids=container.ids)
        finally:
            os.close(folder)

    # a thread of its own: the client that reads may be slow, and others wait for the shared ones
    own = ThreadPoolExecutor(1, thread_name_prefix="export")
    try:
        async with engine.lock(container.id):  # what is mounted is not taken away, nor its fd another's, meanwhile
            _still_there(engine, container)
            mounting = asyncio.ensure_future(asyncio.to_thread(held.enter_context, engine.roots.view(container)))
            await settled(mounting)  # also when cancelled, so that it is undone
        reading = asyncio.get_running_loop().run_in_executor(own, work, mounting.result())
        await settled(reading)  # nothing is closed that it reads
        reading.result()
    finally:
        own.shutdown(wait=False)
        await asyncio.to_thread(held.close)
