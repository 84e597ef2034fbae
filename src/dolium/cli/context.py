"""What surrounds one call of the command line; the only place of cli/ that looks at the process itself.

Everything else takes a Context, so that a warm process can serve a caller whose environment is not its own.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TextIO

SOCKET = "/run/dolium/dolium.sock"


class Context:
    """argv, environment, cwd and standard streams of the caller."""

    __slots__ = ("argv", "cwd", "env", "stderr", "stdin_fd", "stdout", "stdout_fd")

    def __init__(self, argv: list[str], env: dict[str, str], cwd: str, stdout: TextIO, stderr: TextIO) -> None:
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

    def say(self, text: str) -> None:
        """A line on standard output."""
        self.stdout.write(text + "\n")

    def complain(self, text: str) -> None:
        """A line on standard error, behind what was said already."""
        self.stdout.flush()
        self.stderr.write(f"dolium: {text}\n")
        self.stderr.flush()
