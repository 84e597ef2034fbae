"""What --ingress says, whom it means, and nft's text of it and of the table against forged addresses. Pure."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dolium.errors import InvalidArgument
from dolium.network import antispoof
from dolium.network.antispoof import Guarded
from dolium.network.base import Peer
from dolium.network.ingress import Allow, parse, table_text

WEB = Peer("web", {"tier": "front", "empty": ""}), {"one": ["10.9.0.2", "fd00::2"], "two": ["10.8.0.2"]}
DB = Peer("db", {"tier": "back"}), {"one": ["10.9.0.3"]}


def test_what_is_allowed() -> None:
    assert parse(["allow=web:80", "allow=label:tier=front:53/udp", "allow=label:a.b/c=x:y", "allow=label:tier", "allow=network:one",
                  "allow=10.0.0.0/8:22", "allow=[fd00::/8]", "allow=[fd00::1]:53/udp", "none"]) == (
        Allow("web", port=80, protocol="tcp"), Allow(label="tier", value="front", port=53, protocol="udp"),
        Allow(label="a.b/c", value="x:y"), Allow(label="tier"), Allow(place="one"),
        Allow(network=IPv4Network("10.0.0.0/8"), port=22, protocol="tcp"), Allow(network=IPv6Network("fd00::/8")),
        Allow(network=IPv6Network("fd00::1/128"), port=53, protocol="udp"))
    assert parse(["none"]) == ()


@pytest.mark.parametrize("text", ["", "web", "allow", "allow=", "allow=web:0", "allow=web:65536", "allow=web:x", "allow=web:1/icmp",
                                  "allow=10.0.0.1/8", "allow=a b", "allow=-x", "allow=label:", "allow=label:=x", "allow=network:",
                                  "allow=network:a b", "allow=::1", "allow=[fd00::1/8]", "allow=[10.0.0.1", "allow=[]", "allow=x;flush ruleset", "deny=web", "allow=web:80}"])
def test_what_is_not_understood(text: str) -> None:
    with pytest.raises(InvalidArgument, match="invalid --ingress"):
        parse([text])


@pytest.mark.parametrize(("text", "lines"), [
    ("allow=web:80", ["ip saddr { 10.8.0.2, 10.9.0.2 } tcp dport 80 accept", "ip6 saddr { fd00::2 } tcp dport 80 accept"]),
    ("allow=label:tier:53/udp", ["ip saddr { 10.8.0.2, 10.9.0.2, 10.9.0.3 } udp dport 53 accept",
                                 "ip6 saddr { fd00::2 } udp dport 53 accept"]),
    ("allow=label:tier=back", ["ip saddr { 10.9.0.3 } accept"]),
    ("allow=label:empty=", ["ip saddr { 10.8.0.2, 10.9.0.2 } accept", "ip6 saddr { fd00::2 } accept"]),
    ("allow=network:two", ["ip saddr { 10.8.0.2 } accept"]),
    ("allow=[fd00::/64]:22", ["ip6 saddr fd00::/64 tcp dport 22 accept"]),
    ("allow=192.0.2.0/24:22", ["ip saddr 192.0.2.0/24 tcp dport 22 accept"])])
def test_whom_a_rule_means(text: str, lines: list[str]) -> None:
    assert [found.strip() for found in table_text(parse([text]), [WEB, DB]).splitlines() if "saddr" in found] == lines


@pytest.mark.parametrize("text", ["allow=nobody", "allow=label:tier=x", "allow=label:other", "allow=network:three"])
def test_a_rule_that_means_nobody_lets_nobody_in(text: str) -> None:
    assert table_text(parse([text]), [WEB, DB]) == table_text((), [WEB, DB])


@given(st.text(max_size=30))
def test_nothing_a_user_wrote_comes_into_the_text_as_it_is(text: str) -> None:
    try:
        allowed = parse([f"allow={text}"])
    except InvalidArgument:
        return
    peers = [(Peer(text, {text: text}), {text: ["192.0.2.1", "2001:db8::1"]})]
    plain = table_text((), []) + "ip6 saddr { 192.0.2.1 2001:db8::1 } dport accept" + "".join(
        str(one.network or "") + one.protocol + str(one.port or "") for one in allowed)
    assert set(table_text(allowed, peers)) <= set(plain)


def test_the_table_against_forged_addresses() -> None:
    assert antispoof.table_text("dolium-x", Guarded()) == "add table bridge dolium-x\ndelete table bridge dolium-x\n"
    text = antispoof.table_text("dolium-x", Guarded({"dv1"}, set(), {("dv1", "10.0.0.2"), ("dv2", "10.0.0.3"), ("dv2", "fd00::3")}))
    assert 'set guarded { type ifname; elements = { "dv1" }; }' in text
    assert '"dv1" . 10.0.0.2, "dv2" . 10.0.0.3 }' in text and '{ "dv2" . fd00::3 }' in text
    assert "set uplinks { type ifname; }" in text
    with pytest.raises(ValueError, match="dv"):
        antispoof.table_text("dolium-x", Guarded({'dv" }'}))
