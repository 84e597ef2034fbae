"""Requests to the daemon: HTTP/1.1 over its unix socket, as little of it as both sides need.

``http.client`` and ``socket`` would cost 15 ms of every start; the C module ``_socket`` is what they stand on.
"""

from __future__ import annotations

import _socket
import json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any


STREAM_EXIT, STREAM_FAILURE, STREAM_NOTE = 4, 5, 6


class ApiError(Exception):
    """The daemon said no. ``status`` is HTTP's; 0 when it broke off."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class NoDaemon(Exception):
    """Nobody listens at the socket."""


class Outcome:
    """How a session ended: ``exit_code``, or ``failure`` (message, code), or neither when it was detached or had no end
    of its own. ``identity``: what the daemon calls the other side."""

    __slots__ = ("exit_code", "failure", "identity")

    def __init__(self, identity: str = "") -> None:
        self.identity = identity
        self.exit_code: int | None = None
        self.failure: dict[str, Any] | None = None

    def take(self, stream: int, data: bytes) -> bool:
        """A frame that is not output; True when it is the last."""
        if stream == STREAM_NOTE:
            self.identity = data.decode()
        elif stream == STREAM_EXIT:
            self.exit_code = int(data)
        elif stream == STREAM_FAILURE:
            self.failure = json.loads(data)
        return stream in (STREAM_EXIT, STREAM_FAILURE)


class Response:
    """Status, headers and the body as it comes."""

    def __init__(self, sock: _socket.socket | None, buffer: bytes = b"") -> None:
        """From a socket, or of bytes that are there already."""
        self.sock = sock
        self.buffer = buffer
        head = self._until(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        self.status = int(lines[0].split()[1])
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}

    def _more(self) -> bool:
        data = self.sock.recv(65536) if self.sock is not None else b""
        self.buffer += data
        return bool(data)

    def _until(self, mark: bytes) -> bytes:
        while mark not in self.buffer:
            if not self._more():
                raise ApiError(0, "the daemon closed the connection")
        head, _, self.buffer = self.buffer.partition(mark)
        return head

    def _exactly(self, size: int) -> bytes:
        while len(self.buffer) < size:
            if not self._more():
                raise ApiError(0, "the daemon closed the connection in the middle of an answer")
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    def chunks(self) -> Iterator[bytes]:
        """The body, piece by piece."""
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int(self._until(b"\r\n").split(b";")[0], 16):
                yield self._exactly(size)
                self._exactly(2)
            return
        if "content-length" in self.headers:
            left = int(self.headers["content-length"])
            while left > 0:
                if not self.buffer and not self._more():
                    raise ApiError(0, "the daemon closed the connection in the middle of an answer")
                data, self.buffer = self.buffer[:left], self.buffer[left:]
                left -= len(data)
                yield data
            return
        if self.status in (204, 304):
            return
        while self.buffer or self._more():
            data, self.buffer = self.buffer, b""
            yield data

    def read(self) -> bytes:
        """The whole body."""
        return b"".join(self.chunks())

    def lines(self) -> Iterator[dict[str, Any]]:
        """The objects of a JSON stream."""
        pending = b""
        for chunk in self.chunks():
            *complete, pending = (pending + chunk).split(b"\n")
            for line in complete:
                if line.strip():
                    yield json.loads(line)
        if pending.strip():
            yield json.loads(pending)


def connect(path: str) -> _socket.socket:
    """A connection. Raises NoDaemon, ApiError."""
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        sock.connect(path)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        sock.close()
        raise NoDaemon(path) from error
    except PermissionError as error:
        sock.close()
        raise ApiError(0, f"connect to {path}: permission denied: are you root, or in the group docker?") from error
    except OSError as error:
        sock.close()
        raise ApiError(0, f"connect to {path}: {error.strerror}") from error
    return sock


class Client:
    """Requests over one socket path; a connection each."""

    def __init__(self, path: str) -> None:
        self.path = path

    def open(self, method: str, target: str, body: Any = None, *, upgrade: bool = False,
             stream: Iterator[bytes] | None = None, headers: dict[str, str] | None = None) -> Response:
        """Send a request, return the answer with its body unread. Raises ApiError for 4xx and 5xx, NoDaemon."""
        more = dict(headers or {})
        if stream is not None:
            more |= {"Transfer-Encoding": "chunked", "Content-Type": "application/x-tar"}
        sock = connect(self.path)
        sock.sendall(request_text(method, target, body, upgrade=upgrade, headers=more))
        if stream is not None:
            try:
                for part in stream:
                    if part:
                        sock.sendall(f"{len(part):x}\r\n".encode() + part + b"\r\n")
                sock.sendall(b"0\r\n\r\n")
            except (BrokenPipeError, ConnectionResetError):
                pass  # the daemon said no before it had read all: its answer, below, says why
        return checked(Response(sock), bodiless=method == "HEAD")

    def _stream(self, method: str, target: str, body: Any) -> Response:
        sock = connect(self.path)
        sock.sendall(stream_request(method, target, body))
        return checked(Response(sock))

    def call(self, method: str, target: str, body: Any = None) -> Any:
        """The answer's JSON value, None when there is no body."""
        text = self.open(method, target, body).read()
        return json.loads(text) if text.strip() else None

    def session(self, method: str, target: str, body: Any = None, *, stdin: bool = False, tty: bool = False,
                sig_proxy: bool = False, kind: str = "containers", bare: bool = False, last: bool = False,
                on_note: Callable[[str], None] | None = None) -> Outcome:
        """A stream of frames from its first to its last, relayed to this process's own standard streams.

        ``bare``: output without frames; ``last``: an exit code that comes is the command's, nothing else is to be done (whom
        it spares a question may end with it); ``on_note``: called with the other side's id. Raises NoDaemon, ApiError when
        there is no stream.
        """
        from dolium.cli.stream import Session

        return Session(self, self._stream(method, target, body),
                       stdin_fd=0 if stdin else None, tty=tty, kind=kind, sig_proxy=sig_proxy, bare=bare,
                       on_note=on_note).run()


def request_text(method: str, target: str, body: Any, *, upgrade: bool = False, headers: dict[str, str] | None = None,
                 version: str = "1.1") -> bytes:
    """A request's head and JSON body. ``version`` 1.0: the answer's body is as it is, up to the end of the connection."""
    data = b"" if body is None else json.dumps(body).encode()
    head = [f"{method} {target} HTTP/{version}", "Host: dolium", "User-Agent: dolium"]
    head += [f"{name}: {value}" for name, value in (headers or {}).items()]
    head += ["Connection: Upgrade", "Upgrade: tcp"] if upgrade else ["Connection: close"]
    if "Transfer-Encoding" not in (headers or {}) and (body is not None or method in ("POST", "PUT")):
        head += [f"Content-Length: {len(data)}", "Content-Type: application/json"]
    return ("\r\n".join(head) + "\r\n\r\n").encode() + data


def stream_request(method: str, target: str, body: Any) -> bytes:
    """A request answered by a stream, an upgrade or (GET) a body: both end with the connection, and so does a refusal."""
    return request_text(method, target, body, upgrade=method == "POST", version="1.0")


def checked(response: Response, *, bodiless: bool = False) -> Response:
    """The response; raises ApiError for 4xx and 5xx. ``bodiless``: to a HEAD, its length is of a body that never comes."""
    if response.status < 400:
        return response
    text = b"" if bodiless else response.read()
    try:
        message = json.loads(text)["message"]
    except (ValueError, KeyError, TypeError):
        message = text.decode("utf-8", "replace").strip() or f"status {response.status}"
    raise ApiError(response.status, message)


def quote(text: str) -> str:
    """Percent-encoding for a path segment or a query value."""
    keep = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~"
    return "".join(chr(byte) if byte in keep else f"%{byte:02X}" for byte in text.encode("utf-8", "surrogateescape"))


def query(**values: object) -> str:
    """``?a=b``; None and False are left out, True is 1."""
    parts = []
    for name, value in values.items():
        if value is None or value is False or value == "":
            continue
        for one in value if isinstance(value, list) else [value]:
            parts.append(f"{name}={quote('1' if one is True else str(one))}")
    return "?" + "&".join(parts) if parts else ""
