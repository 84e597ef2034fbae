"""Reading the log file a shim writes: Docker's json-file lines, rotated (name, name.1 …), followed while it grows."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

POLL = 0.05  # seconds between looks at a followed file: inotify costs an fd and a watch for every follower


@dataclass(frozen=True, slots=True)
class Line:
    """One record. ``text`` may lack its newline (a long line goes over several records). ``time``: RFC 3339."""

    text: str
    stream: str
    time: str


def _parse(raw: bytes) -> Line | None:
    try:
        record = json.loads(raw)
        return Line(record["log"], record["stream"], record["time"])
    except (ValueError, KeyError, TypeError):
        return None  # a record cut off by a crash of the machine


def files(path: str) -> list[str]:
    """The log's files, oldest first."""
    found = [path]
    number = 1
    while os.path.exists(f"{path}.{number}"):
        found.append(f"{path}.{number}")
        number += 1
    return found[::-1]


def _records(name: str) -> Iterator[Line]:
    with contextlib.suppress(FileNotFoundError), open(name, "rb") as file:
        for raw in file:
            line = _parse(raw) if raw.endswith(b"\n") else None
            if line is not None:
                yield line


def read_all(path: str) -> Iterator[Line]:
    """Every record there is, oldest first."""
    for name in files(path):
        yield from _records(name)


def tail(path: str, count: int) -> list[Line]:
    """The last ``count`` records."""
    if count <= 0:
        return []
    kept: list[Line] = []
    for name in reversed(files(path)):
        with contextlib.suppress(FileNotFoundError), open(name, "rb") as file:
            lines = [line for line in map(_parse, file.read().splitlines()) if line is not None]
            kept = lines[-(count - len(kept)) :] + kept
        if len(kept) >= count:
            break
    return kept


async def follow(path: str, running: Callable[[], bool], *, count: int | None = None) -> AsyncIterator[Line]:
    """Records from the last ``count`` (None: the first) on, as they are written, until the container has ended.

    Reads from the file, so a reader that is slow or stops holds up nobody.
    """
    while not os.path.exists(path):
        if not running():
            return
        await asyncio.sleep(POLL)
    older = list(files(path)[:-1])
    file = open(path, "rb")
    try:
        # One handle reads the current file from here on: no record falls between what was there and what comes.
        *complete, pending = file.read().split(b"\n")
        first = [one for one in map(_parse, complete) if one is not None]
        if count is None:
            for name in older:
                for line in _records(name):
                    yield line
        elif len(first) < count:
            before: list[Line] = []
            for name in reversed(older):
                before = list(_records(name)) + before
                if len(before) + len(first) >= count:
                    break
            first = before + first
        for line in first if count is None else first[max(len(first) - count, 0) :]:
            yield line
        while True:
            alive = running()
            chunk = file.read(1 << 16)
            if chunk:
                *complete, pending = (pending + chunk).split(b"\n")
                for raw in complete:
                    parsed = _parse(raw)
                    if parsed is not None:
                        yield parsed
                continue
            if _rotated(file.fileno(), path):
                file.close()
                file, pending = open(path, "rb"), b""
                continue
            if not alive:
                return
            await asyncio.sleep(POLL)
    finally:
        file.close()


def _rotated(fd: int, path: str) -> bool:
    try:
        return os.stat(path).st_ino != os.fstat(fd).st_ino
    except FileNotFoundError:
        return False
