"""The tunnels below an encrypted overlay: WireGuard, whose keys all hosts make of one secret and each other's addresses.

Nobody exchanges keys: a host's private key is a MAC of its address under the secret, so that who has the secret, and the
list of hosts, knows every public key. All hosts of an overlay trust each other as those that share a network do, and no
one else has the secret. A host's address within the tunnels is link-local, made of its public key: a packet that comes
from it was sent by the key's owner, or WireGuard drops it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import socket
import stat
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from dolium.errors import FailedPrecondition
from dolium.network.netlink import NETLINK_GENERIC, Netlink, attribute, generic

HEADERS = 60
"""Bytes that it takes of each packet below, by IPv4."""
_LEAST, _MOST = 32, 4096
_SET_DEVICE = 1
_IFINDEX, _PRIVATE_KEY, _FLAGS, _LISTEN_PORT, _PEERS = 1, 3, 5, 6, 8
_REPLACE_PEERS = 1
_PEER_KEY, _PEER_FLAGS, _PEER_ENDPOINT, _PEER_ALLOWED = 1, 3, 4, 9
_REMOVE, _REPLACE_ALLOWED = 1, 2
_ALLOWED_FAMILY, _ALLOWED_ADDRESS, _ALLOWED_BITS = 1, 2, 3
_NESTED = 0x8000
_AT_ONCE = 64
"""Peers in a message: an attribute has at most 64 KiB."""


@dataclass(frozen=True, slots=True)
class Key:
    """A host's. ``address``: within the tunnels."""

    private: bytes
    public: bytes
    address: IPv6Address


@dataclass(frozen=True, slots=True)
class Peer:
    """Another host: its address on the network below, and the public half of its key."""

    host: IPv4Address
    public: bytes
    address: IPv6Address


def read_secret(path: str) -> bytes:
    """The secret in a file, which nobody but its owner may read. Blocks. Raises FailedPrecondition."""
    try:
        with open(path, "rb") as file:
            mode, text = os.fstat(file.fileno()).st_mode, file.read(_MOST + 1).strip()
    except OSError as error:
        raise FailedPrecondition(f"the key file {path}: {error.strerror}", errno=error.errno) from error
    if not stat.S_ISREG(mode) or mode & 0o077:
        raise FailedPrecondition(f"the key file {path} can be read by others, or is no file", hint=f"chmod 600 {path}")
    if not _LEAST <= len(text) <= _MOST:
        raise FailedPrecondition(f"the key file {path} has {len(text)} bytes, not {_LEAST} to {_MOST}",
                                 hint=f"head -c 32 /dev/urandom | base64 > {path}, and the same file on all hosts")
    return text


def key_of(secret: bytes, number: int, host: IPv4Address) -> Key:
    """Of a host in the overlay of that number."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    raw = hmac.digest(secret, b"dolium overlay 1 " + struct.pack("!I", number) + host.packed, "sha256")
    private = X25519PrivateKey.from_private_bytes(raw)
    public = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    address = IPv6Address(b"\xfe\x80" + bytes(6) + hashlib.sha256(b"dolium overlay 1 " + public).digest()[:8])
    return Key(private.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption()), public, address)


def peer_of(secret: bytes, number: int, host: IPv4Address) -> Peer:
    """Another host, as this one knows it."""
    key = key_of(secret, number, host)
    return Peer(host, key.public, key.address)


# -- messages --

def device_messages(family: int, index: int, private: bytes, port: int, peers: Sequence[Peer],
                    gone: Sequence[Peer] | None = None) -> list[bytes]:
    """What a WireGuard link is told: its key and port, and peers, in place of all it had, or of those that are ``gone``."""
    first = attribute(_PRIVATE_KEY, private) + attribute(_LISTEN_PORT, struct.pack("=H", port))
    if gone is None:
        first += attribute(_FLAGS, struct.pack("=I", _REPLACE_PEERS))
    told = [*map(_removed, gone or ()), *(_peer(one, port) for one in peers)]
    parts = [told[at:at + _AT_ONCE] for at in range(0, len(told), _AT_ONCE)] or [[]]
    found = []
    for number, part in enumerate(parts):
        body = attribute(_IFINDEX, struct.pack("=I", index)) + (b"" if number else first)
        if part:
            body += attribute(_PEERS | _NESTED, b"".join(part))
        found.append(generic(family, _SET_DEVICE, body))
    return found


def _removed(peer: Peer) -> bytes:
    return attribute(_NESTED, attribute(_PEER_KEY, peer.public) + attribute(_PEER_FLAGS, struct.pack("=I", _REMOVE)))


def _peer(peer: Peer, port: int) -> bytes:
    endpoint = struct.pack("=H", socket.AF_INET) + struct.pack("!H", port) + peer.host.packed + bytes(8)
    allowed = attribute(_NESTED, attribute(_ALLOWED_FAMILY, struct.pack("=H", socket.AF_INET6))
                        + attribute(_ALLOWED_ADDRESS, peer.address.packed) + attribute(_ALLOWED_BITS, b"\x80"))
    return attribute(_NESTED, attribute(_PEER_KEY, peer.public) + attribute(_PEER_FLAGS, struct.pack("=I", _REPLACE_ALLOWED))
                     + attribute(_PEER_ENDPOINT, endpoint) + attribute(_PEER_ALLOWED | _NESTED, allowed))


def configure(index: int, key: Key, port: int, peers: Iterable[Peer], gone: Iterable[Peer] | None = None) -> None:
    """Tell a link of the caller's network namespace its key, its port and its peers, in place of all it had, or of those
    that are ``gone``: what goes on with the others is not disturbed then. Blocks. Raises OSError (EADDRINUSE)."""
    control = Netlink(NETLINK_GENERIC)
    try:
        family = control.family("wireguard")
        for message in device_messages(family, index, key.private, port, list(peers), None if gone is None else list(gone)):
            control.request(message)
    finally:
        control.close()
