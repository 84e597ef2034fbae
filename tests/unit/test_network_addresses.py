"""The address pool against a model; subnets."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dolium.errors import AlreadyExists, InvalidArgument, ResourceExhausted
from dolium.network.addresses import AddressPool, candidates, check_mac, choose_subnet, mac_for

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


def test_macs() -> None:
    assert mac_for(IPv4Address("172.18.0.2")) == "02:42:ac:12:00:02"
    assert check_mac("02:42:AC:12:00:02") == "02:42:ac:12:00:02"
    for bad in ("", "02:42", "01:00:5e:00:00:01", "00:00:00:00:00:00", "02-42-ac-12-00-02", "02:42:ac:12:00:02:03"):
        with pytest.raises(InvalidArgument):
            check_mac(bad)
