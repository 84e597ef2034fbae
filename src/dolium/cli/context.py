"""What surrounds one call of the command line; the only place of cli/ that looks at the process itself.

Everything else takes a Context, so that a warm process can serve a caller whose environment is not its own.
"""

from __future__ import annotations

import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class Writer(Protocol):
        """What a standard stream is used for here."""

        def write(self, text: str, /) -> int:
            """Say it."""

        def flush(self) -> None:
            """Say it now."""

SOCKET = "/run/dolium/dolium.sock"


def terminal_size() -> tuple[int, int]:
    """(rows, columns) of this process's terminal, zeros when it has none."""
    for fd in range(3):
        try:
            size = os.get_terminal_size(fd)
        except OSError:
            continue
        return size.lines, size.columns
    return 0, 0


class Context:
    """argv, environment, cwd and standard streams of the caller."""

    __slots__ = ("argv", "cwd", "env", "stderr", "stdin_fd", "stdout", "stdout_fd")

    def __init__(self, argv: list[str], env: dict[str, str], cwd: str, stdout: Writer, stderr: Writer) -> None:
        self.argv = argv
        self.env = env
        self.cwd = cwd
        self.stdout = stdout
        self.stderr = stderr
        self.stdin_fd, self.stdout_fd = 0, 1

    @classmethod
    def of_process(cls) -> Context:
        """This process's own."""
        try:
            cwd = os.getcwd()
        except OSError:
            cwd = "/"  # the folder was removed; commands that take no path still work
        return cls(sys.argv, dict(os.environ), cwd, sys.stdout, sys.stderr)

    @property
    def socket(self) -> str:
        """Path of the daemon's socket: DOLIUM_HOST, then DOCKER_HOST, then the default."""
        host = self.env.get("DOLIUM_HOST") or self.env.get("DOCKER_HOST") or f"unix://{SOCKET}"
        return host.removeprefix("unix://")

    @property
    def starts_daemon(self) -> bool:
        """Only dolium's own default socket is served by a daemon this command line may start."""
        return not self.env.get("DOLIUM_HOST") and not self.env.get("DOCKER_HOST")

    def path(self, path: str) -> str:
        """A path seen from the caller's cwd."""
        return os.path.normpath(os.path.join(self.cwd, path))

    def own_process(self) -> None:
        """Called by what only a process of the caller's own can do: start a daemon, read or write its files."""

    def read_text(self, path: str) -> str:
        """A file of the caller's. Raises OSError."""
        with open(self.path(path), encoding="utf-8") as file:
            return file.read()

    def is_terminal(self, fd: int) -> bool:
        """Is standard stream 0, 1 or 2 a terminal?"""
        return os.isatty(fd)

    def window_size(self) -> tuple[int, int]:
        """(rows, columns) of the terminal, zeros when there is none."""
        return terminal_size()

    def now(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def say(self, text: str) -> None:
        """A line on standard output."""
        self.stdout.write(text + "\n")

    def complain(self, text: str) -> None:
        """A line on standard error, behind what was said already."""
        self.stdout.flush()
        self.stderr.write(f"dolium: {text}\n")
        self.stderr.flush()
