"""A session with a container: the terminal or pipes on this side, the shim on the other.

The terminal is raw only while the session lasts, and is restored on every way out. Ctrl-C and other signals go to the
container; a changed window size too.
"""

from __future__ import annotations

import _signal
import os
import select

from dolium.cli.context import terminal_size
from dolium.cli.transport import ApiError, Client, NoDaemon, Outcome, Response, query

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from collections.abc import Callable
    from types import FrameType
    from typing import Any

FORWARDED = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGCONT", "SIGALRM")


class Terminal:
    """A terminal in raw mode for the length of a ``with`` block."""

    def __init__(self, fd: int, raw: bool) -> None:
        self._fd = fd
        self._raw = raw
        self._saved: list[Any] | None = None

    def __enter__(self) -> Terminal:
        if self._raw and os.isatty(self._fd):
            import termios

            self._saved = termios.tcgetattr(self._fd)
            new = list(self._saved)
            new[0] &= ~(termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP | termios.INLCR | termios.IGNCR
                        | termios.ICRNL | termios.IXON)
            new[1] &= ~termios.OPOST
            new[2] = new[2] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
            new[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
            termios.tcsetattr(self._fd, termios.TCSADRAIN, new)
        return self

    def __exit__(self, *_: object) -> None:
        if self._saved is not None:
            import termios

            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._saved)


class Session:
    """Relays until the container's side ends. Signals and sizes go to what the first note names, or ``identity``."""

    def __init__(self, client: Client, response: Response, *, stdin_fd: int | None, tty: bool, kind: str,
                 sig_proxy: bool = True, bare: bool = False, identity: str = "",
                 on_note: Callable[[str], None] | None = None) -> None:
        assert response.sock is not None
        self._client = client
        self._sock: _socket.socket = response.sock
        self._pending = response.buffer
        self._stdin: int | None = stdin_fd
        self._tty = tty
        self._kind = kind  # containers or exec
        self._sig_proxy = sig_proxy
        self._queue: list[int] = []
        self._bare = bare
        self._on_note = on_note
        self._outcome = Outcome(identity)

    def run(self) -> Outcome:
        """Returns when the other side is done."""
        wake, alarm = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        before = self._install()
        old = _signal.set_wakeup_fd(alarm)
        try:
            with Terminal(self._stdin if self._stdin is not None else 0, self._tty and self._stdin is not None):
                self._relay(wake)
        finally:
            _signal.set_wakeup_fd(old)
            for number, handler in before.items():
                _signal.signal(number, handler)
            os.close(wake)
            os.close(alarm)
        return self._outcome

    def _install(self) -> dict[int, Any]:
        names = list(FORWARDED) if self._sig_proxy and self._kind == "containers" else []
        if self._tty:
            names.append("SIGWINCH")
        before = {}
        for name in names:
            number = int(getattr(_signal, name))
            before[number] = _signal.signal(number, self._caught)
        return before

    def _caught(self, number: int, frame: FrameType | None) -> None:
        self._queue.append(int(number))

    def _relay(self, wake: int) -> None:
        poll = select.poll()
        poll.register(self._sock.fileno(), select.POLLIN)
        poll.register(wake, select.POLLIN)
        if self._stdin is not None:
            poll.register(self._stdin, select.POLLIN)
        while True:
            if not self._take_frames():
                return
            for fd, _ in poll.poll():
                if fd == wake:
                    os.read(wake, 512)
                    self._signals()
                elif fd == self._sock.fileno():
                    data = self._sock.recv(65536)
                    if not data:
                        return
                    self._pending += data
                elif not self._send_input():
                    poll.unregister(fd)

    def _send_input(self) -> bool:
        assert self._stdin is not None
        try:
            data = os.read(self._stdin, 65536)
        except OSError:
            data = b""  # the terminal has gone
        try:
            if data:
                self._sock.sendall(data)
                return True
            self._sock.shutdown(1)
        except OSError:
            return False  # the container's side has ended; its last output is still to be read
        return False

    def _signals(self) -> None:
        while self._queue:
            number = self._queue.pop(0)
            identity = self._outcome.identity
            if not identity:
                self._queue.insert(0, number)
                return
            try:
                if number == int(_signal.SIGWINCH):
                    rows, columns = terminal_size()
                    self._client.call("POST", f"/{self._kind}/{identity}/resize{query(h=rows, w=columns)}")
                else:
                    self._client.call("POST", f"/containers/{identity}/kill{query(signal=number)}")
            except (ApiError, NoDaemon):
                continue  # it ended meanwhile; its exit is on the way

    def _take_frames(self) -> bool:
        if self._bare:
            write_all(1, self._pending)
            self._pending = b""
            return True
        while len(self._pending) >= 8:
            size = int.from_bytes(self._pending[4:8], "big")
            if len(self._pending) < 8 + size:
                return True
            stream, data = self._pending[0], self._pending[8 : 8 + size]
            self._pending = self._pending[8 + size :]
            if stream in (1, 2):
                write_all(stream, data)
            elif self._outcome.take(stream, data):
                return False
            else:
                if self._on_note is not None:
                    self._on_note(self._outcome.identity)
                self._signals()
        return True


def write_all(fd: int, data: bytes) -> None:
    """To a pipe, file or terminal; one that is non-blocking is waited for. BrokenPipeError passes through."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            select.select([], [fd], [])
