"""What --egress says, nft's text of it, and what a refused packet tells. Pure."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from types import SimpleNamespace

import dns.message
import dns.rrset
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dolium.errors import InvalidArgument
from dolium.network.base import Refused
from dolium.network.dns import pins, wire
from dolium.network.egress import Allow, parse, pin_text, pinned, table_text
from dolium.network.refusals import _parts, _told, _told6


def test_what_is_allowed() -> None:
    assert parse(["allow=PyPI.org.:443", "allow=10.0.0.0/8", "allow=192.0.2.1:53/udp", "allow=*.debian.org", "none"]) == (
        Allow("pypi.org", None, 443, "tcp"), Allow(network=IPv4Network("10.0.0.0/8")),
        Allow(network=IPv4Network("192.0.2.1/32"), port=53, protocol="udp"), Allow("*.debian.org"))
    assert parse(["none"]) == ()


@pytest.mark.parametrize("text", ["", "pypi.org", "allow", "allow=", "allow=a:0", "allow=a:65536", "allow=a:x", "allow=a:1/icmp",
                                  "allow=10.0.0.1/8", "allow=10.0.0", "allow=a b", "allow=-x", "allow=*", "allow=a.*.b", "allow=::1",
                                  "allow=x;flush ruleset", "allow=" + "a." * 127 + "a.b", "deny=pypi.org", "allow=a:443}"])
def test_what_is_not_understood(text: str) -> None:
    with pytest.raises(InvalidArgument, match="invalid --egress"):
        parse([text])


@given(st.text(max_size=30))
def test_nothing_a_user_wrote_comes_into_the_text_as_it_is(text: str) -> None:
    try:
        allowed = parse([f"allow={text}"])
    except InvalidArgument:
        return
    made = table_text(allowed) + pin_text(pinned(allowed, text.lower(), [("192.0.2.1", 5)]))
    plain = table_text([]) + "".join(str(one.network or "") + one.protocol + str(one.port or "") for one in allowed)
    assert set(made) <= set(plain) | set("add delete element inet dolium-egress ports whole {} ip daddr dport accept timeout 0123456789./,;s\n")


def test_a_name_covers_itself_and_a_star_what_is_below() -> None:
    one, star = parse(["allow=pypi.org", "allow=*.pypi.org"])
    assert [one.covers(name) for name in ("pypi.org", "a.pypi.org", "notpypi.org", "")] == [True, False, False, False]
    assert [star.covers(name) for name in ("pypi.org", "a.b.pypi.org", "notpypi.org")] == [False, True, False]


def test_pins_are_of_the_ports_of_their_name() -> None:
    allowed = parse(["allow=a.test:443", "allow=a.test:53/udp", "allow=b.test", "allow=192.0.2.0/24:80"])
    text = pin_text(pinned(allowed, "a.test", [("192.0.2.1", 300), ("192.0.2.2", 1 << 30)]))
    assert "192.0.2.1 . tcp . 443 timeout 310s" in text
    assert "192.0.2.1 . udp . 53 timeout 310s" in text
    assert "192.0.2.2 . tcp . 443 timeout 86410s" in text
    assert "whole" not in text
    assert "add element inet dolium-egress whole { 192.0.2.9 timeout 10s }" in pin_text(
        pinned(allowed, "b.test", [("192.0.2.9", 0)]))
    assert pin_text(pinned(allowed, "c.test", [("192.0.2.9", 5)])) == ""
    assert pin_text(pinned(allowed, "b.test", [])) == ""
    assert "ip daddr 192.0.2.0/24 tcp dport 80 accept" in table_text(allowed)


def test_names_that_share_an_address_do_not_shorten_each_others_time(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    monkeypatch.setattr(pins, "in_thread", lambda work: SimpleNamespace(run=texts.append))
    made = pins.Pins(-1, ["allow=long.test:443", "allow=short.test:443"])
    for name, ttl in (("long.test", 300), ("short.test", 5), ("other.test", 5)):
        made.pin(name, [("192.0.2.1", ttl)])
    assert len(texts) == 2
    assert all("192.0.2.1 . tcp . 443 timeout 310s" in text for text in texts)


def test_addresses_of_an_answer() -> None:
    query = dns.message.make_query("www.a.test", "A")
    reply = dns.message.make_response(query)
    reply.answer += [dns.rrset.from_text("www.a.test.", 60, "IN", "CNAME", "a.test."),
                     dns.rrset.from_text("a.test.", 30, "IN", "A", "192.0.2.1", "192.0.2.2")]
    assert sorted(wire.addresses_in(reply.to_wire())) == [("192.0.2.1", 30), ("192.0.2.2", 30)]
    assert wire.addresses_in(query.to_wire()) == []
    reply.set_rcode(3)
    assert wire.addresses_in(reply.to_wire()) == []


@given(st.binary(max_size=200))
def test_whatever_comes_is_read_to_its_end(data: bytes) -> None:
    wire.addresses_in(data)
    wire.addresses_in(b"\0\1\x81\x80\0\1\0\2\0\0\0\0" + data)
    _parts(data)


def test_what_a_refused_packet_tells() -> None:
    def packet(protocol: int, rest: bytes) -> bytes:
        return bytes([0x45]) + bytes(8) + bytes([protocol]) + bytes(2) + bytes(4) + IPv4Address("192.0.2.7").packed + rest
    assert _told(packet(6, struct.pack("!HH", 5, 443)), incoming=False) == Refused("192.0.2.7", "tcp", 443)
    assert _told(packet(17, struct.pack("!HH", 5, 53)), incoming=False) == Refused("192.0.2.7", "udp", 53)
    assert _told(packet(1, b"\x08\0"), incoming=False) == Refused("192.0.2.7", "icmp", 0)
    assert _told(packet(6, b"\0"), incoming=False) == Refused("192.0.2.7", "tcp", 0)
    incoming = packet(6, struct.pack("!HH", 5, 80))[:12] + IPv4Address("192.0.2.8").packed + packet(6, struct.pack("!HH", 5, 80))[16:]
    assert _told(incoming, incoming=True) == Refused("192.0.2.8", "tcp", 80, True)
    six = bytes([0x60, 0, 0, 0, 0, 20, 6, 64]) + IPv6Address("fd00::8").packed + IPv6Address("fd00::7").packed + struct.pack("!HH", 5, 443)
    assert _told6(six, incoming=False) == Refused("fd00::7", "tcp", 443) and _told6(six[:40], incoming=False) == Refused("fd00::7", "tcp", 0)
    assert _told6(six, incoming=True) == Refused("fd00::8", "tcp", 443, True)
