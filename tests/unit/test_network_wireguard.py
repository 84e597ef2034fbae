"""Keys of an encrypted overlay, and what WireGuard is told, read back by pyroute2. Pure, but for the key files."""

from __future__ import annotations

import struct
from base64 import b64encode
from ipaddress import IPv4Address, IPv6Network
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink.generic.wireguard import wgmsg

from dolium.errors import FailedPrecondition
from dolium.network.wireguard import Peer, device_messages, key_of, read_secret

HOST, OTHER = IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2")


@given(st.binary(min_size=32, max_size=64), st.integers(1, (1 << 24) - 1))
def test_keys_are_made_of_secret_network_and_host(secret: bytes, number: int) -> None:
    one, other = key_of(secret, number, HOST), key_of(secret, number, OTHER)
    assert one == key_of(secret, number, HOST)
    assert len({one, other, key_of(secret, number - 1, HOST), key_of(secret + b"x", number, HOST)}) == 4
    ours, theirs = (X25519PrivateKey.from_private_bytes(key.private) for key in (one, other))
    assert ours.exchange(X25519PublicKey.from_public_bytes(other.public)) == theirs.exchange(
        X25519PublicKey.from_public_bytes(one.public))
    assert one.address in IPv6Network("fe80::/64") and one.address != other.address


def test_what_a_link_is_told() -> None:
    key = key_of(b"s" * 32, 7, HOST)
    peers = [Peer(IPv4Address(0x0A000000 + number), bytes([number] * 32), key_of(b"s" * 32, 7, OTHER).address)
             for number in range(100)]
    messages = device_messages(30, 5, key.private, 51820, peers)
    seen = []
    for number, data in enumerate(messages):
        assert struct.unpack_from("=IHH", data) == (len(data), 30, 5)
        message = wgmsg(data)
        message.decode()
        assert (message["cmd"], message["version"], message.get_attr("WGDEVICE_A_IFINDEX")) == (1, 1, 5)
        assert message.get_attr("WGDEVICE_A_LISTEN_PORT") == (None if number else 51820)
        assert message.get_attr("WGDEVICE_A_FLAGS") == (None if number else 1), "only the first one drops who was there"
        for peer in message.get_attr("WGDEVICE_A_PEERS"):
            endpoint, allowed = peer.get_attr("WGPEER_A_ENDPOINT"), peer.get_attr("WGPEER_A_ALLOWEDIPS")
            seen.append((endpoint["addr"], b64encode(peers[len(seen)].public) == peer.get_attr("WGPEER_A_PUBLIC_KEY")))
            assert endpoint["port"] == 51820
            assert [one["addr"] for one in allowed] == [f"{peers[0].address}/128"]
    assert seen == [(str(peer.host), True) for peer in peers]
    (change,) = device_messages(30, 5, key.private, 51820, peers[:1], peers[1:2])
    message = wgmsg(change)
    message.decode()
    assert message.get_attr("WGDEVICE_A_FLAGS") is None, "nobody else is disturbed"
    assert [peer.get_attr("WGPEER_A_FLAGS") for peer in message.get_attr("WGDEVICE_A_PEERS")] == [1, 2]
    (alone,) = device_messages(30, 5, key.private, 1, [])
    message = wgmsg(alone)
    message.decode()
    assert message.get_attr("WGDEVICE_A_FLAGS") == 1 and message.get_attr("WGDEVICE_A_PEERS") is None


def test_a_key_file_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"x" * 32 + b"\n")
    path.chmod(0o644)
    with pytest.raises(FailedPrecondition, match="can be read by others"):
        read_secret(str(path))
    path.chmod(0o600)
    assert read_secret(str(path)) == b"x" * 32
    path.write_bytes(b"x" * 31)
    with pytest.raises(FailedPrecondition, match="31 bytes"):
        read_secret(str(path))
    for wrong in (tmp_path, tmp_path / "none"):
        with pytest.raises(FailedPrecondition):
            read_secret(str(wrong))
