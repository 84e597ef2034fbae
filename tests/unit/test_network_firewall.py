"""What is said to nftables, and what is done when it does not work; the library is played."""

from __future__ import annotations

import json
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest

from dolium.errors import Internal
from dolium.network.firewall import Bridge, Firewall, Publication, drops_in, element_text, table_text
from dolium.network.ports import Published

SUBNET = IPv4Network("172.18.0.0/16")
DEFAULT = [Bridge("dol0123abcd", SUBNET)]
ONE = Publication(IPv4Address("172.18.0.2"), (
    Published(80, "tcp", "0.0.0.0", 8080), Published(53, "udp", "0.0.0.0", 53), Published(81, "tcp", "127.0.0.1", 8081)))


class Recorder:
    """Stands for ``Nft``: keeps what it is told, refuses what it is told to refuse."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.refuse, self.answer = "", '{"nftables": []}'

    def run(self, text: str) -> str:
        self.said.append(text)
        if self.refuse and text.startswith(self.refuse):
            raise Internal("nft: no")
        return self.answer

    def close(self) -> None:
        self.said.append("closed")


def firewall() -> tuple[Firewall, Recorder]:
    recorder = Recorder()
    return Firewall("0123abcd", recorder), recorder  # type: ignore[arg-type]


def test_a_container_s_ports_are_two_elements_lists() -> None:
    assert element_text("add", "dolium-x", "cafe", ONE) == (
        'add element ip dolium-x any { tcp . 8080 comment "cafe" : 172.18.0.2 . 80, '
        'udp . 53 comment "cafe" : 172.18.0.2 . 53 }\n'
        'add element ip dolium-x one { 127.0.0.1 . tcp . 8081 comment "cafe" : 172.18.0.2 . 81 }\n')
    assert element_text("delete", "dolium-x", "cafe", ONE) == (
        "delete element ip dolium-x any { tcp . 8080, udp . 53 }\n"
        "delete element ip dolium-x one { 127.0.0.1 . tcp . 8081 }\n")
    assert element_text("add", "dolium-x", "cafe", Publication(ONE.address, ())) == ""


@pytest.mark.parametrize("container", ["", 'x" : 1.1.1.1 . 1', "a\nflush ruleset", "a b", "a" * 129])
def test_nothing_else_gets_into_a_command(container: str) -> None:
    with pytest.raises(ValueError):
        element_text("add", "dolium-x", container, ONE)


def test_the_table_is_replaced_whole() -> None:
    text = table_text("dolium-x", [Bridge("dolx", SUBNET)], {"cafe": ONE})
    assert text.startswith("add table ip dolium-x\ndelete table ip dolium-x\ntable ip dolium-x {")
    assert text.endswith(element_text("add", "dolium-x", "cafe", ONE))
    assert 'ip saddr 172.18.0.0/16 oifname != "dolx" masquerade' in text
    assert text.count("{") == text.count("}")


def test_what_an_overlay_carries_is_not_tracked() -> None:
    gateways = (IPv4Address("10.9.1.1"), IPv6Address("fd00:9::1:1"))
    text = table_text("dolium-x", [Bridge("dolx", SUBNET), Bridge(
        "doly", IPv4Network("10.9.0.0/16"), subnet6=IPv6Network("fd00:9::/64"), tunnel=4789, gateways=gateways)], {})
    assert text.count("notrack") == 4
    assert 'iifname "doly" ip saddr 10.9.0.0/16 ip daddr 10.9.0.0/16 ip daddr != { 10.9.1.1 } notrack' in text
    assert 'iifname "doly" ip6 saddr fd00:9::/64 ip6 daddr fd00:9::/64 ip6 daddr != { fd00:9::1:1 } notrack' in text
    assert text.count("udp dport { 4789 } notrack") == 2
    assert "notrack" not in table_text("dolium-x", [Bridge("dolx", SUBNET)], {})


def test_add_and_remove_are_small_and_idempotent() -> None:
    wall, nft = firewall()
    wall.replace(DEFAULT, {})
    wall.add("cafe", ONE)
    assert wall.add("cafe", ONE) == (), "what is published already is not told again"
    wall.remove("cafe")
    wall.remove("cafe")
    assert [text.partition(" ")[0] for text in nft.said] == ["list", "add", "add", "delete"]
    assert nft.said[2] == element_text("add", "dolium-0123abcd", "cafe", ONE)


def test_some_ports_of_a_container_come_and_go() -> None:
    wall, nft = firewall()
    wall.replace(DEFAULT, {"cafe": ONE})
    more = Published(53, "udp", "0.0.0.0", 5353)
    both = Publication(ONE.address, (*ONE.ports, more))
    assert wall.add("cafe", both) == (more,)
    assert nft.said[-1] == element_text("add", "dolium-0123abcd", "cafe", Publication(ONE.address, (more,)))
    wall.remove("cafe", ONE.ports)
    assert nft.said[-1] == element_text("delete", "dolium-0123abcd", "cafe", ONE)
    wall.remove("cafe", ONE.ports)
    wall.remove("cafe")
    assert nft.said[-1] == element_text("delete", "dolium-0123abcd", "cafe", Publication(ONE.address, (more,)))
    assert len(nft.said) == 5


def test_a_lost_table_is_made_anew_with_what_should_be_in_it() -> None:
    wall, nft = firewall()
    wall.replace(DEFAULT, {"cafe": ONE})
    two = Publication(IPv4Address("172.18.0.3"), (Published(1, "tcp", "0.0.0.0", 1),))
    nft.refuse = "add element"
    wall.add("beef", two)
    assert nft.said[-1] == table_text("dolium-0123abcd", DEFAULT, {"cafe": ONE, "beef": two})
    nft.refuse = "delete element"
    wall.remove("cafe")
    assert nft.said[-1] == table_text("dolium-0123abcd", DEFAULT, {"beef": two})


def test_a_failure_changes_nothing() -> None:
    wall, nft = firewall()
    wall.replace(DEFAULT, {})
    nft.refuse = "add"
    with pytest.raises(Internal):
        wall.add("cafe", ONE)
    assert wall.remove("cafe") is None


def test_foreign_chains_that_drop() -> None:
    def chain(family: str, table: str, hook: str, policy: str) -> dict[str, object]:
        return {"chain": {"family": family, "table": table, "name": "FORWARD", "hook": hook, "policy": policy}}

    listing = json.dumps({"nftables": [
        {"metainfo": {}}, chain("ip", "filter", "forward", "drop"), chain("inet", "fw", "forward", "accept"),
        chain("ip", "filter", "input", "drop"), chain("ip6", "filter", "forward", "drop"),
        chain("ip", "dolium-x", "forward", "drop"), chain("inet", "firewalld", "forward", "drop"),
        {"chain": {"family": "ip", "table": "nat", "name": "DOCKER"}}]})
    assert drops_in(listing, "dolium-x") == ["ip filter FORWARD", "inet firewalld FORWARD"]
    assert drops_in(listing, "dolium-x", six=True) == ["ip filter FORWARD", "ip6 filter FORWARD", "inet firewalld FORWARD"]


SIX = [Bridge("doly", SUBNET, subnet6=IPv6Network("fd00:1::/64"))]
BOTH = Publication(IPv4Address("172.18.0.2"), (
    Published(80, "tcp", "0.0.0.0", 8080), Published(80, "tcp", "::", 8080), Published(53, "udp", "fd00::9", 53),
    Published(81, "tcp", "::1", 9)),
    IPv6Address("fd00:1::2"))


def test_ipv6_has_a_table_of_its_own_while_a_bridge_has_it() -> None:
    assert element_text("add", "dolium-x", "cafe", BOTH) == (
        'add element ip dolium-x any { tcp . 8080 comment "cafe" : 172.18.0.2 . 80 }\n'
        "add element ip6 dolium-x loopback { tcp . 8080, tcp . 9 }\n"
        "add element ip6 dolium-x targets { tcp . 8080 : fd00:1::2 . 80, tcp . 9 : fd00:1::2 . 81 }\n"
        'add element ip6 dolium-x any { tcp . 8080 comment "cafe" : fd00:1::2 . 80 }\n'
        'add element ip6 dolium-x one { fd00::9 . udp . 53 comment "cafe" : fd00:1::2 . 53 }\n')
    text = table_text("dolium-x", [*DEFAULT, *SIX], {"cafe": BOTH})
    four, six = text.split("add table ip6 dolium-x\n")
    assert '"dol0123abcd"' in four and '"doly"' in four and "ip6" not in four
    assert '"dol0123abcd"' not in six and 'ip6 saddr fd00:1::/64 oifname != "doly" masquerade' in six
    assert "redirect" not in six and "redirect to :7000" in table_text("dolium-x", SIX, {}, relay=7000)
    wall, nft = firewall()
    wall.replace(SIX, {})
    wall.replace(DEFAULT)
    assert nft.said[-1].count("ip6") == 2 and "delete table ip6 dolium-0123abcd" in nft.said[-1]
    wall.replace(DEFAULT)
    assert "ip6" not in nft.said[-1]  # a kernel without it is not asked


def test_a_killed_daemon_s_table_for_ipv6_goes() -> None:
    wall, nft = firewall()
    nft.answer = json.dumps({"nftables": [{"table": {"family": "ip6", "name": "dolium-0123abcd"}}]})
    wall.replace(DEFAULT, {})
    assert "delete table ip6 dolium-0123abcd" in nft.said[-1]
