"""Pure: as much of DNS's wire form (RFC 1035, EDNS of RFC 6891) as a server needs that answers names and passes the rest on.

Written here and not taken from dnspython, whose messages would be most of the process's memory. The unit tests read every
answer with dnspython.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address, ip_address

A, PTR, AAAA, ANY, OPT = 1, 12, 28, 255, 41
TAG = 65315  # an EDNS option of the range for local use (RFC 6891, section 9): what one host's server asks another's
TAG_BYTES = 12
IN = 1
NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED = 0, 1, 2, 3, 4, 5
_QR, _AA, _TC, _RD, _RA, _OPCODE = 0x8000, 0x0400, 0x0200, 0x0100, 0x0080, 0x7800
_HEADER = struct.Struct("!HHHHHH")
PLAIN_SIZE = 512  # of an answer by UDP when the client names no larger one
LARGE_SIZE = 1232  # what passes everywhere in one piece
_REVERSE, _REVERSE6 = ".in-addr.arpa", ".ip6.arpa"


@dataclass(frozen=True, slots=True)
class Query:
    """One question. ``name``: in lower case, without the last dot; ``question``: its bytes as they came; ``size``: how large
    an answer by UDP may be; ``edns``: did it say so? ``tag``: what the answer repeats, b"" for nothing."""

    id: int
    flags: int
    name: str
    kind: int
    question: bytes
    size: int = PLAIN_SIZE
    edns: bool = False
    tag: bytes = b""


@dataclass(frozen=True, slots=True)
class Found:
    """What is known of a name, which may be nothing of the kind that was asked for; or of an address."""

    addresses: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


def parse(data: bytes) -> Query:
    """A query of one question. Raises ValueError."""
    if len(data) < 12:
        raise ValueError("cut short")
    identity, flags, questions, answers, authorities, more = _HEADER.unpack_from(data)
    if flags & _QR or questions != 1 or answers or authorities:
        raise ValueError("not a query of one question")
    labels, at = [], 12
    while True:
        if at >= len(data):
            raise ValueError("cut short")
        length = data[at]
        if length == 0:
            break
        if length > 63 or at + 1 + length > len(data) or at - 12 + length > 253:
            raise ValueError("not a name")
        # a dot in a label does not part names: as it is, it would make the text that of another one
        labels.append(data[at + 1 : at + 1 + length].replace(b".", rb"\046"))
        at += 1 + length
    end = at + 5
    if end > len(data):
        raise ValueError("cut short")
    kind, group = struct.unpack_from("!HH", data, at + 1)
    if group not in (IN, ANY):
        raise ValueError("not of the class IN")
    size, edns, tag = PLAIN_SIZE, False, b""
    if more and len(data) >= end + 11 and data[end] == 0 and struct.unpack_from("!H", data, end + 1)[0] == OPT:
        size, edns = max(PLAIN_SIZE, struct.unpack_from("!H", data, end + 3)[0]), True
        tag = _tag(data, end)
    name = b".".join(labels).decode("ascii", "surrogateescape").lower()
    return Query(identity, flags, name, kind, data[12:end], size, edns, tag)


def question(query: Query, identity: int, tag: bytes) -> bytes:
    """The same question, with an id and a tag of one's own, to another host's server."""
    return _HEADER.pack(identity, 0, 1, 0, 0, 1) + query.question + _opt(tag)


def _opt(tag: bytes = b"") -> bytes:
    option = struct.pack("!HH", TAG, len(tag)) + tag if tag else b""
    return b"\0" + struct.pack("!HHIH", OPT, LARGE_SIZE, 0, len(option)) + option


def _tag(data: bytes, at: int) -> bytes:
    """Of the OPT record at a place: its one option, when that is a tag; b"" for another, or what is cut short."""
    if len(data) < at + 11 + 4 + TAG_BYTES:
        return b""
    code, length = struct.unpack_from("!HH", data, at + 11)
    return data[at + 15:at + 15 + TAG_BYTES] if (code, length) == (TAG, TAG_BYTES) else b""


def answer(query: Query, code: int, addresses: Sequence[str] = (), names: Sequence[str] = (), *, ttl: int = 600,
           size: int = 0) -> bytes:
    """An answer with A and AAAA records or PTR records. ``size``: what it must not exceed, 0 for no limit: records that do
    not fit are left out and the client is told to ask by TCP."""
    records = [_record(AAAA if ":" in address else A, ttl, ip_address(address).packed) for address in addresses]
    records += [_record(PTR, ttl, encode(name)) for name in names]
    tail = _opt(query.tag) if query.edns else b""
    flags = _QR | _AA | _RA | (query.flags & (_RD | _OPCODE)) | code
    body, count = query.question, 0
    for record in records:
        if size and 12 + len(body) + len(record) + len(tail) > size:
            flags |= _TC
            break
        body += record
        count += 1
    return _HEADER.pack(query.id, flags, 1, count, 0, bool(tail)) + body + tail


def _record(kind: int, ttl: int, data: bytes) -> bytes:
    return struct.pack("!HHHIH", 0xC00C, kind, IN, ttl, len(data)) + data


def malformed(data: bytes) -> bytes:
    """The answer to what cannot be read; b"" when there is nobody to answer."""
    if len(data) < 12 or data[2] & 0x80:
        return b""
    identity, flags = struct.unpack_from("!HH", data)
    code = FORMERR if not flags & _OPCODE else NOTIMP
    return _HEADER.pack(identity, _QR | (flags & (_RD | _OPCODE)) | code, 0, 0, 0, 0)


def encode(name: str) -> bytes:
    """A name as labels, not compressed. Raises ValueError."""
    labels = [label.encode("ascii", "surrogateescape") for label in name.rstrip(".").split(".")]
    if not all(0 < len(label) < 64 for label in labels) or sum(map(len, labels)) + len(labels) > 254:
        raise ValueError(f"not a name: {name!r}")
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"


def reverse_of(name: str) -> str:
    """The address that a name below in-addr.arpa or ip6.arpa (RFC 3596) stands for; "" for another name."""
    digits = name.removesuffix(_REVERSE6).split(".")
    if name.endswith(_REVERSE6) and len(digits) == 32 and all(len(digit) == 1 for digit in digits):
        try:
            return str(IPv6Address(bytes.fromhex("".join(reversed(digits)))))
        except ValueError:
            return ""
    if not name.endswith(_REVERSE):
        return ""
    try:
        return str(IPv4Address(".".join(reversed(name.removesuffix(_REVERSE).split(".")))))
    except AddressValueError:
        return ""


def answers_query(reply: bytes, query: bytes) -> bool:
    """Is this a reply to what was asked: the same id, and the same question? (RFC 5452, section 9.1)"""
    if len(reply) < 12 or reply[:2] != query[:2] or not reply[2] & 0x80:
        return False
    count = struct.unpack_from("!H", reply, 4)[0]
    if not count:
        return True  # an error may come without
    end = 12
    while end < len(query) and query[end]:
        end += 1 + query[end]
    end += 5
    return reply[12:end].lower() == query[12:end].lower()


def told(reply: bytes, asked: bytes) -> Found | None:
    """What another host's server says to a ``question``; None when it knows nothing. Raises ValueError when it is no answer
    to that: another id, question or tag, or not in the form that ``answer`` writes."""
    try:
        identity, flags, questions, answers, authorities, more = _HEADER.unpack_from(reply)
        end = _after_name(asked, 12) + 4
        if identity != int.from_bytes(asked[:2], "big") or not flags & _QR or (questions, authorities, more) != (1, 0, 1):
            raise ValueError("not an answer to this")
        if reply[12:end] != asked[12:end]:
            raise ValueError("an answer to another question")
        at, addresses, names = end, [], []
        for _ in range(answers):
            at = _after_name(reply, at)
            kind, group, _, length = struct.unpack_from("!HHIH", reply, at)
            data, at = reply[at + 10:at + 10 + length], at + 10 + length
            if group == IN and (kind, length) in ((A, 4), (AAAA, 16)):
                addresses.append(str(ip_address(data)))
            elif group == IN and kind == PTR:
                names.append(_plain_name(data))
            else:
                raise ValueError("a record that was not asked for")
        if len(reply) < at + 3 or reply[at] or struct.unpack_from("!H", reply, at + 1)[0] != OPT:
            raise ValueError("no tag")
        if _tag(reply, at) != _tag(asked, end):
            raise ValueError("another tag")
    except (struct.error, IndexError) as error:
        raise ValueError("cut short") from error
    return Found(tuple(addresses), tuple(names)) if flags & 15 == NOERROR else None


def _plain_name(data: bytes) -> str:
    """A name that is not compressed, of letters that host names have and ``_``. Raises ValueError, IndexError."""
    labels, at = [], 0
    while data[at]:
        label = data[at + 1:at + 1 + data[at]]
        if data[at] > 63 or not label.replace(b"-", b"").replace(b"_", b"").isalnum():
            raise ValueError("not a host's name")
        labels.append(label)
        at += 1 + data[at]
    if at + 1 != len(data) or at > 254:
        raise ValueError("not a name")
    return b".".join(labels).decode("ascii").lower()


def addresses_in(reply: bytes) -> list[tuple[str, int]]:
    """The A records of a reply's answers, each with its time to live in seconds; [] for what cannot be read."""
    try:
        _, flags, questions, answers, _, _ = _HEADER.unpack_from(reply)
        if not flags & _QR or flags & 15:
            return []
        at, found = 12, []
        for _ in range(questions):
            at = _after_name(reply, at) + 4
        for _ in range(answers):
            at = _after_name(reply, at)
            kind, group, ttl, length = struct.unpack_from("!HHIH", reply, at)
            at += 10
            if kind == A and group == IN and length == 4 and at + 4 <= len(reply):
                found.append((str(IPv4Address(reply[at:at + 4])), ttl))
            at += length
        return found
    except (struct.error, IndexError):
        return []


def _after_name(data: bytes, at: int) -> int:
    """Where the name at a place ends. Raises IndexError."""
    while data[at]:
        if data[at] & 0xC0:
            return at + 2
        at += 1 + data[at]
    return at + 1
