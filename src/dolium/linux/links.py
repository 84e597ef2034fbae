"""Messages to the kernel's routing sockets (rtnetlink(7)) about links and their addresses, and what it lists. Pure."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

RTM_NEWLINK, RTM_GETLINK, RTM_NEWADDR, RTM_GETADDR = 16, 18, 20, 22
DONE, ERROR = 3, 2  # of a list; of an answer, a zero in it is an acknowledgement
_REQUEST, _ACK, _DUMP, _CREATE, _EXCL = 1, 4, 0x300, 0x400, 0x200
_IFLA_IFNAME, _IFLA_NET_NS_FD = 3, 28
_IFA_LOCAL, _IFA_BROADCAST, _IFA_ANYCAST, _IFA_FLAGS = 2, 4, 5, 8
_IFF_UP, _IFA_F_PERMANENT = 1, 0x80
_SCOPE_GLOBAL = 0
NAME_MAX = 15


def _message(kind: int, flags: int, body: bytes) -> bytes:
    return (16 + len(body)).to_bytes(4, "little") + kind.to_bytes(2, "little") + (_REQUEST | flags).to_bytes(
        2, "little") + bytes(8) + body


def _attribute(kind: int, data: bytes) -> bytes:
    head = (4 + len(data)).to_bytes(2, "little") + kind.to_bytes(2, "little")
    return head + data + bytes(-len(data) % 4)


def _link(index: int, flags: int, change: int) -> bytes:
    return b"".join(number.to_bytes(4, "little") for number in (0, index, flags, change))


def listing(request: int) -> bytes:
    """Ask for all links (RTM_GETLINK) or addresses (RTM_GETADDR)."""
    return _message(request, _DUMP, bytes(4))


def up(index: int) -> bytes:
    """Bring a link up."""
    return _message(RTM_NEWLINK, _ACK, _link(index, _IFF_UP, _IFF_UP))


def move(index: int, name: str, namespace: int) -> bytes:
    """Move a link, by a name of its own, to the network namespace of an fd."""
    attributes = (_attribute(_IFLA_IFNAME, name.encode("utf-8", "surrogateescape") + b"\0")
                  + _attribute(_IFLA_NET_NS_FD, namespace.to_bytes(4, "little")))
    return _message(RTM_NEWLINK, _ACK, _link(index, 0, 0) + attributes)


def address(told: bytes, index: int) -> bytes:
    """Give a link an address as `addresses` told it of another."""
    return _message(RTM_NEWADDR, _ACK | _CREATE | _EXCL, told[:4] + index.to_bytes(4, "little") + told[8:])


def outcome(answer: bytes) -> int:
    """The errno of an acknowledgement, 0 when all went well."""
    return -int.from_bytes(answer[16:20], "little", signed=True) if answer[4:6] == ERROR.to_bytes(2, "little") else 71


def ended(data: bytes) -> bool:
    """Does a part of a list hold its end, or an error?"""
    at = 0
    while at + 16 <= len(data):
        if int.from_bytes(data[at + 4 : at + 6], "little") in (DONE, ERROR):
            return True
        at += max(int.from_bytes(data[at : at + 4], "little") + 3 & ~3, 16)
    return False


def _messages(data: bytes, kind: int) -> Iterator[bytes]:
    at, head = 0, {RTM_NEWLINK: 16, RTM_NEWADDR: 8}[kind]
    while at + 16 <= len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        if size < 16:
            return
        if int.from_bytes(data[at + 4 : at + 6], "little") == kind and size >= 16 + head and at + size <= len(data):
            yield data[at + 16 : at + size]
        at += (size + 3) & ~3


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= 4:
        size = int.from_bytes(data[:2], "little")
        if size < 4:
            return
        yield int.from_bytes(data[2:4], "little") & 0x3FFF, data[4:size]
        data = data[(size + 3) & ~3 :]


def indexes(links: bytes) -> dict[str, int]:
    """Name to index of every link in a list of them (RTM_GETLINK)."""
    found = {}
    for body in _messages(links, RTM_NEWLINK):
        for kind, data in _attributes(body[16:]):
            if kind == _IFLA_IFNAME:
                found[data.rstrip(b"\0").decode("utf-8", "surrogateescape")] = int.from_bytes(body[4:8], "little")
    return found


def addresses(told: bytes, index: int) -> list[bytes]:
    """The permanent addresses of global scope that a link has (RTM_GETADDR), each as ``address`` takes it:
    what names the link, or counts the lifetime, is left out."""
    found = []
    for body in _messages(told, RTM_NEWADDR):
        flags = body[2]
        attributes = list(_attributes(body[8:]))
        for kind, data in attributes:
            if kind == _IFA_FLAGS:
                flags = int.from_bytes(data, "little")
        if int.from_bytes(body[4:8], "little") != index or body[3] != _SCOPE_GLOBAL or not flags & _IFA_F_PERMANENT:
            continue
        kept = b"".join(_attribute(kind, data) for kind, data in attributes
                        if kind in (1, _IFA_LOCAL, _IFA_BROADCAST, _IFA_ANYCAST))
        found.append(body[:2] + bytes(2) + bytes(4) + kept)
    return found
