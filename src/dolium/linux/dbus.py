"""D-Bus, as much of it as talking to systemd takes: method calls, their answers and signals, each with a deadline.

The D-Bus specification's names are used (message, header field, signature). Values are Python's: int, bool, str, bytes or a
list for an array, a tuple or list for a struct, ``(signature, value)`` for a variant. No file descriptors, no big-endian
messages, no services. ``docs/dependencies.md`` says why no library. Cold module: it runs on a container's start.
"""

from __future__ import annotations

import _socket
import time

from dolium.errors import DeadlineExceeded, FailedPrecondition, Unavailable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

CALL, RETURN, ERROR, SIGNAL = 1, 2, 3, 4  # message types
PATH, INTERFACE, MEMBER, ERROR_NAME, REPLY_SERIAL, DESTINATION, SENDER, SIGNATURE = range(1, 9)  # header fields
NO_REPLY = 1
MESSAGE_LIMIT = 1 << 27  # the specification's

_ALIGN = {"y": 1, "b": 4, "n": 2, "q": 2, "i": 4, "u": 4, "x": 8, "t": 8, "s": 4, "o": 4, "g": 1, "a": 4, "(": 8, "{": 8,
          "v": 1}
_SIGNED = "nix"
_NUMBERS = "ybnqiuxt"

BUS, BUS_PATH = "org.freedesktop.DBus", "/org/freedesktop/DBus"


class Refused(FailedPrecondition):
    """The other side answered with an error; ``name`` is D-Bus's name for it."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{message} ({name})")
        self.name = name


def split(signature: str) -> list[str]:
    """The complete types of a signature: ``a(sv)u`` is ``a(sv)`` and ``u``. Raises ValueError."""
    found, at = [], 0
    while at < len(signature):
        end = _end(signature, at)
        found.append(signature[at:end])
        at = end
    return found


def _end(signature: str, at: int) -> int:
    if at >= len(signature):
        raise ValueError(f"signature {signature!r} is cut short")
    kind = signature[at]
    if kind == "a":
        return _end(signature, at + 1)
    if kind in "({":
        close = ")" if kind == "(" else "}"
        at += 1
        while signature[at : at + 1] != close:
            at = _end(signature, at)
        return at + 1
    if kind not in _ALIGN:
        raise ValueError(f"signature {signature!r}: {kind!r} is no type")
    return at + 1


def marshal(signature: str, values: Sequence[Any]) -> bytes:
    """Values in the wire form, little-endian. Raises ValueError, TypeError, OverflowError for what does not fit."""
    out = bytearray()
    for kind, value in zip(split(signature), values, strict=True):
        _write(out, kind, value)
    return bytes(out)


def _pad(out: bytearray, to: int) -> None:
    out += bytes(-len(out) % to)


def _write(out: bytearray, kind: str, value: Any) -> None:
    first = kind[0]
    _pad(out, _ALIGN[first])
    if first in _NUMBERS:
        out += int(value).to_bytes(1 if first == "y" else _ALIGN[first], "little", signed=first in _SIGNED)
    elif first in "so":
        raw = value.encode()
        out += len(raw).to_bytes(4, "little") + raw + b"\0"
    elif first == "g":
        out += bytes((len(value),)) + value.encode() + b"\0"
    elif first == "v":
        _write(out, "g", value[0])
        _write(out, value[0], value[1])
    elif first == "a":
        start = len(out)
        out += bytes(4)
        _pad(out, _ALIGN[kind[1]])
        body = len(out)  # the padding before the first element does not count
        for item in value:
            _write(out, kind[1:], item)
        out[start : start + 4] = (len(out) - body).to_bytes(4, "little")
    else:
        for part, item in zip(split(kind[1:-1]), value, strict=True):
            _write(out, part, item)


def unmarshal(signature: str, data: bytes) -> list[Any]:
    """The values of a body. Raises ValueError when it is malformed."""
    values, at = [], 0
    for kind in split(signature):
        value, at = _read(data, at, kind)
        values.append(value)
    return values


def _take(data: bytes, at: int, size: int) -> tuple[bytes, int]:
    if at + size > len(data):
        raise ValueError("cut short")
    return data[at : at + size], at + size


def _read(data: bytes, at: int, kind: str) -> tuple[Any, int]:
    first = kind[0]
    at += -at % _ALIGN[first]
    if first in _NUMBERS:
        raw, at = _take(data, at, _ALIGN[first])
        number = int.from_bytes(raw, "little", signed=first in _SIGNED)
        return (bool(number) if first == "b" else number), at
    if first in "sog":
        raw, at = _take(data, at, 1 if first == "g" else 4)
        raw, at = _take(data, at, int.from_bytes(raw, "little"))
        return raw.decode("utf-8", "replace"), at + 1
    if first == "v":
        inner, at = _read(data, at, "g")
        value, at = _read(data, at, inner)
        return (inner, value), at
    if first == "a":
        raw, at = _take(data, at, 4)
        at += -at % _ALIGN[kind[1]]
        end = at + int.from_bytes(raw, "little")
        if end > len(data):
            raise ValueError("an array is cut short")
        items = []
        while at < end:
            item, at = _read(data, at, kind[1:])
            items.append(item)
        return items, at
    parts = []
    for part in split(kind[1:-1]):
        value, at = _read(data, at, part)
        parts.append(value)
    return tuple(parts), at


class Message:
    """One message: type, serial, header fields (number to value), body values."""

    __slots__ = ("body", "fields", "kind", "serial")

    def __init__(self, kind: int, serial: int, fields: dict[int, Any], body: list[Any]) -> None:
        self.kind = kind
        self.serial = serial
        self.fields = fields
        self.body = body


_FIELD_KINDS = {PATH: "o", INTERFACE: "s", MEMBER: "s", ERROR_NAME: "s", REPLY_SERIAL: "u", DESTINATION: "s", SENDER: "s",
                SIGNATURE: "g"}


def encode(kind: int, serial: int, fields: dict[int, Any], signature: str, values: Sequence[Any], flags: int = 0) -> bytes:
    """A whole message."""
    body = marshal(signature, values)
    if signature:
        fields = {**fields, SIGNATURE: signature}
    header = marshal("yyyyuua(yv)", [ord("l"), kind, flags, 1, len(body), serial,
                                     [(number, (_FIELD_KINDS[number], value)) for number, value in fields.items()]])
    return header + bytes(-len(header) % 8) + body


def decode(data: bytes) -> tuple[Message, int] | None:
    """The first message in ``data`` and its length; None while it is not complete. Raises ValueError."""
    if len(data) < 16:
        return None
    if data[0:1] != b"l" or data[3] != 1:
        raise ValueError("not a little-endian message of D-Bus 1")
    body_size, serial, fields_size = (int.from_bytes(data[at : at + 4], "little") for at in (4, 8, 12))
    start = 16 + fields_size
    start += -start % 8
    if start + body_size > MESSAGE_LIMIT:
        raise ValueError(f"a message of {start + body_size} bytes")
    if len(data) < start + body_size:
        return None
    listed = unmarshal("yyyyuua(yv)", data[: 16 + fields_size])[6]
    fields = {number: value for number, (_, value) in listed}
    body = unmarshal(fields.get(SIGNATURE, ""), data[start : start + body_size])
    return Message(data[1], serial, fields, body), start + body_size


def unix_paths(address: str) -> list[str]:
    """Where to connect to for an address (``unix:path=…;unix:abstract=…``): paths, an abstract one begins with NUL."""
    found = []
    for one in address.split(";"):
        transport, _, rest = one.partition(":")
        pairs = dict(pair.partition("=")[::2] for pair in rest.split(","))
        for key, before in (("path", ""), ("abstract", "\0")):
            if transport == "unix" and pairs.get(key):
                found.append(before + _unescaped(pairs[key]))
    return found


def _unescaped(text: str) -> str:
    head, *rest = text.split("%")
    return head + "".join(chr(int(part[:2], 16)) + part[2:] for part in rest)


class Bus:
    """A connection to a message bus. ``seconds``: the time limit of everything that waits, each for itself.

    Raises Unavailable when nobody is there, DeadlineExceeded when there is no answer in time, Refused for an error.
    """

    def __init__(self, address: str, uid: int, seconds: float) -> None:
        self._seconds = seconds
        self._serial = 0
        self._data = b""
        self._signals: list[Message] = []
        self._address = address
        self._end = time.monotonic() + seconds
        self._sock = self._connect(unix_paths(address))
        try:
            self._let_in(uid)
        except BaseException:
            self._sock.close()
            raise

    def _let_in(self, uid: int) -> None:
        self._send(b"\0AUTH EXTERNAL " + str(uid).encode().hex().encode() + b"\r\n")
        while b"\r\n" not in self._data:
            self._receive("authentication")
        if not self._data.startswith(b"OK "):
            said = self._data[:60].decode("utf-8", "replace").strip()
            raise Unavailable(f"D-Bus at {self._address} refused uid {uid}: {said}")
        self._data = self._data.partition(b"\r\n")[2]
        self._send(b"BEGIN\r\n")
        self.call(BUS, BUS_PATH, BUS, "Hello")

    def close(self) -> None:
        """End the connection."""
        self._sock.close()

    def _connect(self, paths: list[str]) -> _socket.socket:
        why = "it is not a unix socket's address"
        for path in paths:
            sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
            try:
                sock.settimeout(self._seconds)
                sock.connect(path)
                return sock
            except OSError as error:
                sock.close()
                why = error.strerror or str(error)
        raise Unavailable(f"D-Bus at {self._address}: {why}")

    def _late(self, what: str) -> DeadlineExceeded:
        return DeadlineExceeded(f"D-Bus at {self._address}: no answer to {what} within {self._seconds:g} s")

    def _send(self, data: bytes) -> None:
        try:
            self._sock.sendall(data)
        except TimeoutError:
            raise self._late("a message that was sent") from None
        except OSError as error:
            raise Unavailable(f"D-Bus at {self._address}: {error.strerror}") from error

    def _receive(self, what: str) -> None:
        left = self._end - time.monotonic()
        if left <= 0:
            raise self._late(what)
        self._sock.settimeout(left)
        try:
            data = self._sock.recv(65536)
        except TimeoutError:
            raise self._late(what) from None
        except OSError as error:
            raise Unavailable(f"D-Bus at {self._address}: {error.strerror}") from error
        if not data:
            raise Unavailable(f"D-Bus at {self._address} closed the connection")
        self._data += data

    def _next(self, what: str) -> Message:
        while True:
            try:
                found = decode(self._data)
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise Unavailable(f"D-Bus at {self._address} sent what is no message: {error}") from error
            if found is not None:
                self._data = self._data[found[1] :]
                return found[0]
            self._receive(what)

    def send(self, destination: str, path: str, interface: str, member: str, signature: str = "", *values: Any,
             flags: int = 0) -> int:
        """Send a method call; its serial. Nobody waits for an answer."""
        self._serial += 1
        fields = {PATH: path, DESTINATION: destination, INTERFACE: interface, MEMBER: member}
        self._send(encode(CALL, self._serial, fields, signature, values, flags))
        return self._serial

    def call(self, destination: str, path: str, interface: str, member: str, signature: str = "", *values: Any) -> list[Any]:
        """Call a method and wait for its answer's values."""
        self._end = time.monotonic() + self._seconds
        serial = self.send(destination, path, interface, member, signature, *values)
        while True:
            message = self._next(member)
            if message.kind == SIGNAL:
                self._signals.append(message)
            elif message.fields.get(REPLY_SERIAL) != serial:
                continue
            elif message.kind == ERROR:
                text = message.body[0] if message.body and isinstance(message.body[0], str) else "an error"
                raise Refused(str(message.fields.get(ERROR_NAME, "")), text)
            else:
                return message.body

    def subscribe(self, interface: str, member: str) -> None:
        """Ask the bus for a signal."""
        self.call(BUS, BUS_PATH, BUS, "AddMatch", "s", f"type='signal',interface='{interface}',member='{member}'")

    def wait(self, member: str, fits: Callable[[list[Any]], bool], seconds: float) -> list[Any]:
        """The values of the first signal of that name that fits; those that came during calls are looked at first."""
        self._end, kept = time.monotonic() + seconds, self._seconds
        self._seconds = seconds
        try:
            while True:
                message = self._signals.pop(0) if self._signals else self._next(f"the signal {member}")
                if message.kind == SIGNAL and message.fields.get(MEMBER) == member and fits(message.body):
                    return message.body
        finally:
            self._seconds = kept
