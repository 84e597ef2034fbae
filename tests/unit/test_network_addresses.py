"""The address pool against a model; subnets."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dolium.errors import AlreadyExists, InvalidArgument, ResourceExhausted
from dolium.network.addresses import (
    AddressPool,
    AddressPool6,
    candidates,
    check_mac,
    choose_subnet,
    choose_subnet6,
    mac_for,
)
from dolium.network.records import Record, wished

SMALL = IPv4Network("172.18.0.0/28")


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = AddressPool(SMALL)
        self.used: set[IPv4Address] = set()
        self.last: list[IPv4Address] = []

    @rule()
    def allocate(self) -> None:
        if len(self.used) == 13:
            with pytest.raises(ResourceExhausted):
                self.pool.allocate()
            return
        address = self.pool.allocate()
        assert address not in self.used
        assert address in list(SMALL.hosts())[1:]
        free = set(list(SMALL.hosts())[1:]) - self.used
        if len(free) > 1 and self.last:
            assert address != self.last[-1]
        self.used.add(address)

    @rule(last=st.integers(0, 20))
    def wish(self, last: int) -> None:
        text = f"172.18.0.{last}"
        address = IPv4Address(text)
        if address not in list(SMALL.hosts())[1:]:
            with pytest.raises(InvalidArgument):
                self.pool.allocate(text)
        elif address in self.used:
            with pytest.raises(AlreadyExists):
                self.pool.allocate(text)
        else:
            assert self.pool.allocate(text) == address
            self.used.add(address)

    @rule(last=st.integers(0, 20))
    def adopt(self, last: int) -> None:
        address = IPv4Address(f"172.18.0.{last}")
        expected = address in list(SMALL.hosts())[1:] and address not in self.used
        assert self.pool.adopt(str(address)) is expected
        if expected:
            self.used.add(address)

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        address = data.draw(st.sampled_from(sorted(self.used)))
        self.pool.release(address)
        self.pool.release(address)
        self.used.remove(address)

    @invariant()
    def counted(self) -> None:
        assert len(self.pool) == len(self.used)


TestPool = PoolMachine.TestCase


def test_in_order_and_not_reused_at_once() -> None:
    pool = AddressPool(IPv4Network("172.18.0.0/16"))
    assert str(pool.gateway) == "172.18.0.1" and pool.capacity == 65533
    first = pool.allocate()
    assert str(first) == "172.18.0.2"
    pool.release(first)
    assert [str(pool.allocate()) for _ in range(2)] == ["172.18.0.3", "172.18.0.4"]


@given(st.integers(2, 200))
def test_a_released_address_comes_back_last(count: int) -> None:
    pool = AddressPool(IPv4Network("172.18.0.0/24"))
    given_out = [pool.allocate() for _ in range(count)]
    pool.release(given_out[-1])
    rest = [pool.allocate() for _ in range(pool.capacity - count)]
    assert given_out[-1] not in rest
    assert pool.allocate() == given_out[-1]


def test_the_one_after_the_highest_adopted_is_next() -> None:
    pool = AddressPool(IPv4Network("172.18.0.0/16"))
    assert pool.adopt("172.18.0.9") and pool.adopt("172.18.0.3")
    assert str(pool.allocate()) == "172.18.0.10"


@pytest.mark.parametrize("text", ["", "x", "172.18.0", "172.18.0.0", "172.18.255.255", "10.0.0.1", "::1"])
def test_what_is_no_address_is_not_adopted(text: str) -> None:
    assert not AddressPool(IPv4Network("172.18.0.0/16")).adopt(text)


def test_subnets_that_are_routed_are_passed_over() -> None:
    assert choose_subnet([]) == IPv4Network("172.18.0.0/16")
    default = IPv4Network("0.0.0.0/0")
    assert choose_subnet([default, IPv4Network("172.18.4.0/24")]) == IPv4Network("172.19.0.0/16")
    assert choose_subnet([IPv4Network("172.16.0.0/12"), IPv4Network("192.168.1.7/32")]) == IPv4Network("192.168.16.0/20")
    with pytest.raises(ResourceExhausted):
        choose_subnet([IPv4Network("172.16.0.0/12"), IPv4Network("192.168.0.0/16")])


@given(st.lists(st.sampled_from(list(candidates())), max_size=20))
def test_never_an_overlap(taken: list[IPv4Network]) -> None:
    assert not any(choose_subnet(taken).overlaps(network) for network in taken)


def test_ipv6_addresses() -> None:
    pool = AddressPool6(IPv6Network("fd00:1::/64"), reserved=[IPv6Address("fd00:1::3")])
    assert str(pool.gateway) == "fd00:1::1" and pool.capacity == 2**64 - 3
    assert [str(pool.allocate()) for _ in range(2)] == ["fd00:1::2", "fd00:1::4"]
    assert str(pool.allocate("fd00:1:0:0:ffff:ffff:ffff:ffff")) == "fd00:1::ffff:ffff:ffff:ffff"
    for wrong in ("fd00:1::", "fd00:1::1", "fd00:1::3", "fd00:2::2", "10.0.0.1", "fd00:1::9%eth0"):
        with pytest.raises(InvalidArgument):
            pool.allocate(wrong)
    with pytest.raises(AlreadyExists):
        pool.allocate("fd00:1::2")
    small = AddressPool6(IPv6Network("fd00:1::/64"), within=IPv6Network("fd00:1::8/126"), gateway=IPv6Address("fd00:1::9"))
    assert [str(small.allocate()) for _ in range(3)] == ["fd00:1::8", "fd00:1::a", "fd00:1::b"]
    with pytest.raises(ResourceExhausted, match="IPv6"):
        small.allocate()
    small.release(IPv6Address("fd00:1::a"))
    assert str(small.allocate()) == "fd00:1::a" and not small.adopt("fd00:1::a") and small.adopt("fd00:1::77")


@given(st.text("0123456789abcdef", min_size=8, max_size=8), st.integers(1, 5))
def test_an_instance_s_own_ipv6_subnets(instance: str, count: int) -> None:
    taken = [IPv6Network("::/0")]
    for _ in range(count):
        taken.append(choose_subnet6(instance, taken))
    own = taken[1].supernet(new_prefix=48)
    assert own.subnet_of(IPv6Network("fd00::/8")) and len(set(taken)) == count + 1
    assert all(one.prefixlen == 64 and one.subnet_of(own) for one in taken[1:])
    with pytest.raises(ResourceExhausted):
        choose_subnet6(instance, [IPv6Network("fc00::/7")])


def test_a_wish_for_ipv6_and_a_record_from_before_it() -> None:
    def wish(driver: str, *subnets: dict[str, object], **more: object) -> Record:
        return wished({"Name": "n", "Driver": driver, "EnableIPv6": True, "IPAM": {"Config": list(subnets)}, **more}, "0" * 64, "")

    made = wish("bridge", {"Subnet": "fd00:1::/64", "Gateway": "fd00:1::9", "IPRange": "fd00:1::/80",
                           "AuxiliaryAddresses": {"a": "fd00:1::8"}}, {"Subnet": "10.0.0.0/24"})
    assert (made.subnet, made.subnet6, made.gateway6, made.within6) == ("10.0.0.0/24", "fd00:1::/64", "fd00:1::9", "fd00:1::/80")
    assert made.reserved6 == {"a": "fd00:1::8"} and made.ipv6 and Record.from_doc(made.to_doc()) == made
    far = wish("overlay", {"Subnet": "10.9.0.0/16", "IPRange": "10.9.2.0/24"}, {"Subnet": "fd00:9::/64", "IPRange": "fd00:9::2:0/112"})
    assert (far.gateway, far.gateway6) == ("10.9.2.0", "fd00:9::2:0")
    for driver, subnets in (("bridge", [{"Subnet": "fd00:1::/64"}, {"Subnet": "fd00:2::/64"}]),
                            ("bridge", [{"Subnet": "fd00:1::1/64"}]), ("bridge", [{"Subnet": "::ffff:10.0.0.0/104"}]),
                            ("bridge", [{"Subnet": "fd00:1::/64", "IPRange": "10.0.0.0/24"}]),
                            ("bridge", [{"Subnet": "fd00:1::/64", "Gateway": "fd00:1::"}]),
                            ("overlay", [{"Subnet": "10.9.0.0/16", "IPRange": "10.9.2.0/24"}, {"Subnet": "fd00:9::/64"}])):
        with pytest.raises(InvalidArgument):
            wish(driver, *subnets)
    old = {key: value for key, value in Record("n", "0" * 64, subnet="10.0.0.0/24").to_doc().items() if "6" not in key}
    assert Record.from_doc({**old, "version": 1}) == Record("n", "0" * 64, subnet="10.0.0.0/24")


def test_macs() -> None:
    assert mac_for(IPv4Address("172.18.0.2")) == "02:42:ac:12:00:02"
    assert check_mac("02:42:AC:12:00:02") == "02:42:ac:12:00:02"
    for bad in ("", "02:42", "01:00:5e:00:00:01", "00:00:00:00:00:00", "02-42-ac-12-00-02", "02:42:ac:12:00:02:03"):
        with pytest.raises(InvalidArgument):
            check_mac(bad)
