"""One layer, from blob to directory: decompress, hash and untar at the same time, none of it under the GIL.

    thread 1   read and decompress (igzip, zstandard)             bounded queue of 1 MiB chunks
    thread 2   SHA-256 of the uncompressed stream: the diff ID    bounded queue
    thread 3   write into the pipe
    process    dolium-untar, which alone touches the target directory

The compressed bytes were hashed when the blob entered the content store; the diff ID is compared here, before the
caller renames the directory into place.
"""

from __future__ import annotations

import hashlib
import os
import queue
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from dolium import native
from dolium.errors import DoliumError, Internal, InvalidArgument, PermissionDenied, ResourceExhausted
from dolium.images import decompress

_QUEUE = 8
_MESSAGE_MAX = 4096
_FULL = (28, 122)  # ENOSPC, EDQUOT
_DENIED = (1, 13, 30)  # EPERM, EACCES, EROFS


@dataclass(frozen=True, slots=True)
class Unpacked:
    """``diff_id`` of the stream, entries in it, and the sum of its files' sizes in bytes."""

    diff_id: str
    entries: int
    size: int


class Cancelled(Exception):
    """The caller's event was set; the target directory is half written."""


class _Stop(Exception):
    """Another part of the pipeline ended; this one has nothing to say about why."""


class Source(Protocol):
    """Where compressed bytes come from."""

    def read(self, size: int = ..., /) -> bytes | None:
        """Up to ``size`` bytes; none at the end."""


class _Counted:
    """A source that reports how far it has been read."""

    def __init__(self, file: Source, report: Callable[[int], None]) -> None:
        self._file = file
        self._report = report
        self._done = 0

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size) or b""
        self._done += len(data)
        self._report(self._done)
        return data


class _Pipeline:
    """Bounded hand-over between threads that can be stopped from any of them. None in a queue is the end."""

    def __init__(self, cancel: threading.Event) -> None:
        self.cancel = cancel
        self.stopped = threading.Event()
        self.failure: BaseException | None = None

    def run(self, work: Callable[[], None]) -> threading.Thread:
        def guarded() -> None:
            try:
                work()
            except _Stop:
                return
            except BaseException as error:  # noqa: BLE001 - handed to the thread that waits, which raises it
                self.failure = self.failure or error
                self.stopped.set()

        thread = threading.Thread(target=guarded, name="unpack", daemon=True)
        thread.start()
        return thread

    def _check(self) -> None:
        if self.stopped.is_set() or self.cancel.is_set():
            raise _Stop

    def put(self, line: queue.Queue[bytes | None], data: bytes | None) -> None:
        while True:
            self._check()
            try:
                line.put(data, timeout=0.1)
                return
            except queue.Full:
                continue

    def get(self, line: queue.Queue[bytes | None]) -> bytes | None:
        while True:
            self._check()
            try:
                return line.get(timeout=0.1)
            except queue.Empty:
                continue

    def drain(self, line: queue.Queue[bytes | None]) -> Iterator[bytes]:
        while (data := self.get(line)) is not None:
            yield data


def unpack(
    blob: Source,
    target: Path,
    *,
    diff_id: str | None,
    report: Callable[[int], None] = lambda done: None,
    cancel: threading.Event | None = None,
    stop: Callable[[], None] = lambda: None,
    apply: bool = False,
    unprivileged: bool = False,
) -> Unpacked:
    """Unpack a layer into the empty directory ``target``. Blocks; meant for a worker thread.

    ``report`` gets the compressed bytes read so far, in another thread; ``stop`` is called to end a ``blob.read`` that
    waits there when nobody needs its bytes any more. ``apply`` carries whiteouts out instead of
    writing them down for overlay; ``unprivileged`` leaves out owners, devices and privileged xattrs.

    Raises InvalidArgument when the layer is damaged, leaves its directory, or does not hash to ``diff_id``;
    ResourceExhausted on a full disk; Cancelled. The directory is then half written and the caller's to remove.
    """
    flags = ["--apply"] * apply + ["--no-chown"] * unprivileged
    pipeline = _Pipeline(cancel or threading.Event())
    plain: queue.Queue[bytes | None] = queue.Queue(_QUEUE)
    hashed: queue.Queue[bytes | None] = queue.Queue(_QUEUE)
    digest = hashlib.sha256()
    root = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        process = subprocess.Popen(
            [native.program("dolium-untar"), *flags, str(root)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=(root,), env={}, bufsize=0,
        )
    finally:
        os.close(root)

    def decompressing() -> None:
        for data in decompress.chunks(cast(BinaryIO, _Counted(blob, report))):
            pipeline.put(plain, data)
        pipeline.put(plain, None)

    def hashing() -> None:
        for data in pipeline.drain(plain):
            digest.update(data)
            pipeline.put(hashed, data)
        pipeline.put(hashed, None)

    with process:
        threads = [pipeline.run(decompressing), pipeline.run(hashing)]
        try:
            _feed(process, pipeline.drain(hashed))
        except _Stop:
            process.kill()
        except BrokenPipeError:
            pipeline.stopped.set()
        finally:
            pipeline.stopped.set()
            stop()
            for thread in threads:
                thread.join()
        output, message = _finish(process)
    if pipeline.failure is not None:
        raise pipeline.failure
    if pipeline.cancel.is_set():
        raise Cancelled
    if process.returncode != 0:
        raise _failure(process.returncode, output, message)
    entries, size = output.split()
    found = "sha256:" + digest.hexdigest()
    if diff_id is not None and found != diff_id:
        raise InvalidArgument(f"the layer has the wrong content: its diff ID is {found}, the image says {diff_id}")
    return Unpacked(found, int(entries), int(size))


def _feed(process: subprocess.Popen[bytes], chunks: Iterator[bytes]) -> None:
    if process.stdin is None:
        raise Internal("dolium-untar was started without a pipe")
    fd = process.stdin.fileno()
    for data in chunks:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view):]


def _finish(process: subprocess.Popen[bytes]) -> tuple[str, str]:
    """What the program said; both outputs are a line each and fit their pipes, so none is left waiting."""
    output, message = process.communicate()
    return output.decode("ascii", "replace"), message[:_MESSAGE_MAX].decode("utf-8", "replace").strip()


def _failure(code: int, output: str, message: str) -> DoliumError:
    """The error for what dolium-untar said: the number on its output is errno, 0 when the archive is at fault."""
    if code != 1:
        return Internal(f"dolium-untar ended with {code}: {message}")
    number = int(output) if output.strip().isdigit() else 0
    if number in _FULL:
        return ResourceExhausted(message, errno=number)
    if number in _DENIED:
        return PermissionDenied(message, errno=number)
    return InvalidArgument(message, errno=number or None)
