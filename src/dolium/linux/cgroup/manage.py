"""Ending and removing groups from the daemon's side: what is left when a shim died. Blocks for at most its deadline."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable

DEADLINE = 10.0


def processes(folder: str) -> list[int]:
    """Pids in a group and the groups below it; empty when it is gone."""
    found: list[int] = []
    for base, _, files in os.walk(folder):
        if "cgroup.procs" in files:
            with contextlib.suppress(OSError), open(f"{base}/cgroup.procs") as file:
                found += [int(line) for line in file]
    return found


def kill(folders: Iterable[str]) -> None:
    """SIGKILL what is in the groups now."""
    for folder in folders:
        for pid in processes(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def kill_and_remove(folders: Iterable[str]) -> list[str]:
    """SIGKILL all that is in the groups and remove them; returns the folders that could not be removed.

    The kernel gives no event for an emptied v1 group: looked at again after a growing pause, up to DEADLINE.
    """
    remaining = [folder for folder in folders if os.path.isdir(folder)]
    deadline, pause = time.monotonic() + DEADLINE, 0.0005
    while remaining:
        for folder in remaining:
            kill([folder])
            with contextlib.suppress(OSError), open(f"{folder}/freezer.state", "w") as file:
                file.write("THAWED")
        remaining = [folder for folder in remaining if not _remove(folder)]
        if remaining and time.monotonic() > deadline:
            break
        if remaining:
            time.sleep(pause)
            pause = min(pause * 2, 0.02)
    return remaining


def _remove(folder: str) -> bool:
    for base, _, _ in os.walk(folder, topdown=False):
        try:
            os.rmdir(base)
        except FileNotFoundError:
            continue
        except OSError:
            return False
    return True


def freezer_file(folders: Iterable[str]) -> tuple[str, str, str] | None:
    """(file, word to freeze, word to thaw) among a group's folders: the v1 freezer, else cgroup.freeze."""
    listed = list(folders)
    for folder in listed:
        if os.path.exists(f"{folder}/freezer.state"):
            return f"{folder}/freezer.state", "FROZEN", "THAWED"
    for folder in listed:
        if os.path.exists(f"{folder}/cgroup.freeze"):
            return f"{folder}/cgroup.freeze", "1", "0"
    return None


def freeze(folders: Iterable[str], frozen: bool) -> None:
    """Freeze or thaw and wait until it is so. Raises OSError, TimeoutError after DEADLINE."""
    found = freezer_file(folders)
    if found is None:
        raise OSError(95, "no cgroup hierarchy here can freeze")
    path, freeze_word, thaw_word = found
    word = freeze_word if frozen else thaw_word
    # v2 says in another file when the last one is frozen
    v2 = path.endswith("cgroup.freeze")
    told, state = (f"{path.removesuffix('freeze')}events", f"frozen {word}") if v2 else (path, word)
    deadline, pause = time.monotonic() + DEADLINE, 0.0005
    while True:
        with open(path, "w") as file:
            file.write(word)
        with open(told) as file:
            if state in file.read().splitlines():
                return
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} does not become {word}")
        time.sleep(pause)
        pause = min(pause * 2, 0.02)
