"""The ground: folders to be deleted are renamed aside at once, and deleted later by one thread.

Deleting is never on a caller's way. It takes a millisecond where the rename takes a twentieth; and ext4 does not use an
inode again in the first five seconds, but looks at each of those anew whenever it makes one: what was deleted in the middle
of work makes all that follows slower. So nothing is, as long as more keeps coming.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import secrets
import shutil
import subprocess
import threading
import time
from collections import deque

_log = logging.getLogger(__name__)
QUIET, LATEST = 1.0, 10.0
"""Seconds: a deletion begins when nothing else was thrown away for the first, in any case after the second."""
MOST = 512
"""Folders that wait; with more, deletions begin."""


class Trash:
    """One folder of things on their way out, on the file system of what is thrown away."""

    def __init__(self, folder: str) -> None:
        """Use ``folder``, made if it is missing."""
        os.makedirs(folder, mode=0o700, exist_ok=True)
        self._folder = folder
        self._word, self._numbers = secrets.token_hex(4), itertools.count()  # names that no earlier process gave
        self._waiting: deque[tuple[str, float]] = deque()  # path, when it was thrown away
        self._last = 0.0
        self._some, self._now = threading.Event(), threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def discard(self, path: str) -> bool:
        """Rename into the trash and leave: the name is free when this returns. False when there was nothing. Raises
        OSError."""
        aside = f"{self._folder}/{os.path.basename(path)}-{self._word}-{next(self._numbers)}"
        try:
            os.rename(path, aside)
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.ENOSPC, errno.EDQUOT):
                raise
            # somebody gave it a file system of its own; or there is no room for one more name, and this makes some
            delete(path)
            self.hurry()
            return True
        self._last = time.monotonic()
        self._add(aside, self._last)
        return True

    def recover(self) -> None:
        """What an earlier process left."""
        for name in os.listdir(self._folder):
            self._add(f"{self._folder}/{name}", 0.0)

    def _add(self, path: str, given: float) -> None:
        self._waiting.append((path, given))
        if not self._some.is_set():  # the thread is woken once for many
            self._some.set()
            with self._starting:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._work, name="trash", daemon=True)
                    self._thread.start()

    def _work(self) -> None:
        while True:
            self._some.wait()
            self._some.clear()
            while self._waiting:
                path, given = self._waiting[0]
                while len(self._waiting) <= MOST and not self._closing:
                    left = min(self._last + QUIET, given + LATEST) - time.monotonic()
                    if left <= 0 or self._now.wait(left):
                        break
                self._waiting.popleft()
                _delete(path)
            if self._closing:
                return
            self._now.clear()

    def hurry(self) -> None:
        """Delete what is there now without waiting for quiet: the disk is full."""
        if self._waiting:
            self._now.set()

    def close(self) -> None:
        """Delete what is left, and wait for it. Nothing is thrown away any more."""
        self._closing = True
        self._now.set()
        self._some.set()
        if self._thread is not None:
            self._thread.join()


def delete(path: str) -> None:
    """Delete a folder, however deep it is. Blocks. Raises OSError; what is left stays.

    A container, or an image, makes folders deeper than Python's calls and a process's fds go: rm(1) needs neither.
    """
    try:
        shutil.rmtree(path)
        return
    except RecursionError:
        pass
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
    done = subprocess.run(["rm", "-rf", "--one-file-system", "--", path], stdin=subprocess.DEVNULL, capture_output=True,
                          check=False)
    if done.returncode:
        raise OSError(errno.ENOTEMPTY, done.stderr.decode(errors="replace").strip()[-200:] or "rm failed", path)


def _delete(path: str) -> None:
    """What cannot be deleted now is tried again at the next start, by ``recover``."""
    try:
        delete(path)
    except OSError as error:
        _log.warning("delete %s: %s", path, error)
