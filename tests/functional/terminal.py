"""A program at a terminal of its own, as a person sees it."""

from __future__ import annotations

import os
import pty
import select
import termios
import time

from daemon import Daemon


class Terminal:
    """A program in a pty of a given size."""

    def __init__(self, engine: Daemon, *words: str, size: tuple[int, int] = (24, 80), **env: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execvpe(words[0], list(words), {**engine.env, **env})
        termios.tcsetwinsize(self.fd, size)
        self.text = ""

    def expect(self, what: str, deadline: float = 20.0) -> str:
        """Read until the text appears; what was read up to then."""
        end = time.monotonic() + deadline
        while what not in self.text:
            left = end - time.monotonic()
            assert left > 0, f"{what!r} did not appear in {self.text!r}"
            if select.select([self.fd], [], [], left)[0]:
                try:
                    data = os.read(self.fd, 65536)
                except OSError:
                    data = b""
                assert data, f"{what!r} did not appear in {self.text!r} before the end"
                self.text += data.decode(errors="replace")
        before, _, self.text = self.text.partition(what)
        return before + what

    def send(self, data: bytes) -> None:
        os.write(self.fd, data)

    def end(self) -> int:
        """Its exit code, with what it still writes read."""
        while True:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                os.close(self.fd)
                return os.waitstatus_to_exitcode(status)
            if select.select([self.fd], [], [], 0.05)[0]:
                try:
                    self.text += os.read(self.fd, 65536).decode(errors="replace")
                except OSError:
                    os.close(self.fd)
                    return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
