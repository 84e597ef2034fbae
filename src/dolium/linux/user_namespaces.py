"""User namespaces as fds, made without a process that stays in them.

A process with threads cannot make one, so unshare(1) of util-linux does, which is on every Debian.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from dolium.errors import FailedPrecondition, Internal


@dataclass(frozen=True, slots=True)
class IdMap:
    """``size`` ids from ``inside`` on are the host's from ``outside`` on."""

    inside: int
    outside: int
    size: int


def make(uids: Sequence[IdMap], gids: Sequence[IdMap], *, network: bool = False) -> tuple[int, int]:
    """(a user namespace, a network namespace it owns or -1), as fds. Blocks for some milliseconds.

    Raises FailedPrecondition when the kernel makes none (user.max_user_namespaces), Internal when it refuses the maps.
    """
    words = ["unshare", "--user", *(["--net"] if network else []), "--", "cat"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          bufsize=0) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(b"x")
        if process.stdout.read(1) != b"x":  # cat answers from inside
            text = process.stderr.read().decode(errors="replace").strip()
            raise FailedPrecondition(f"make a user namespace: {text}")
        for name, maps in (("uid_map", uids), ("gid_map", gids)):
            try:
                with open(f"/proc/{process.pid}/{name}", "w") as file:
                    file.write("".join(f"{one.inside} {one.outside} {one.size}\n" for one in maps))
            except OSError as error:
                raise Internal(f"write {name}: {error.strerror}", errno=error.errno) from error
        user = os.open(f"/proc/{process.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return user, os.open(f"/proc/{process.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC) if network else -1
        except BaseException:
            os.close(user)
            raise
