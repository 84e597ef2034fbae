"""What the name servers of an overlay's hosts say to each other: hosts are addresses of the loopback link here."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator

import dns.message
import dns.rcode
import dns.reversename
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dolium.network.dns import across as module
from dolium.network.dns import wire
from dolium.network.dns.across import Across, Neighbours
from dolium.network.dns.forward import Forwarder
from dolium.network.dns.names import Entry, Names
from dolium.network.dns.server import Sandbox, Server
from dolium.network.dns.wire import Found

HERE, THERE, STRANGER = "127.1.0.1", "127.1.0.2", "127.1.0.3"
TAG = bytes(range(12))


def query(name: str, kind: str = "A") -> wire.Query:
    return wire.parse(dns.message.make_query(name, kind).to_wire())


def reverse(address: str) -> str:
    return str(dns.reversename.from_address(address))


@pytest.fixture
def port() -> Iterator[int]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.1.0.9", 0))
        yield sock.getsockname()[1]


def overlay(port: int, own: str, *peers: str, vni: int = 7) -> Across:
    return Across("Far", vni, port, (own,), peers, ("10.9.0.0/16", "fd00:9::/64"))


def names(*entries: Entry, network: str = "n") -> Names:
    made = Names()
    for entry in entries:
        made.put(network, "Far", entry)
    return made


ALL = (Entry("a" * 64, ("db", "store"), "10.9.2.1", "fd00:9::2:1"), Entry("b" * 64, ("plain",), "10.9.2.2"))


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await work()

    asyncio.run(bounded())


def test_what_one_says_the_other_reads() -> None:
    asked = wire.question(query("db"), 9, TAG)
    seen = dns.message.from_wire(asked)  # it is DNS
    assert (seen.id, seen.edns, [(one.otype, one.to_wire()) for one in seen.options]) == (9, 0, [(wire.TAG, TAG)])
    parsed = wire.parse(asked)
    assert (parsed.tag, parsed.name) == (TAG, "db")
    for found in (Found(("10.9.2.1", "fd00:9::2:1")), Found(names=("db.far", "x_1.far")), Found()):
        assert wire.told(wire.answer(parsed, wire.NOERROR, found.addresses, found.names), asked) == found
    assert wire.told(wire.answer(parsed, wire.NXDOMAIN), asked) is None
    many = [f"10.9.{high}.{low}" for high in range(4) for low in range(250)]
    large = wire.told(wire.answer(parsed, wire.NOERROR, many, size=wire.LARGE_SIZE), asked)
    assert large is not None and 50 < len(large.addresses) < 100


def test_an_answer_to_another_question_is_none() -> None:
    asked = wire.question(query("db"), 9, TAG)
    good = wire.answer(wire.parse(asked), wire.NOERROR, ["10.9.2.1"])
    assert wire.told(good, asked) == Found(("10.9.2.1",))
    for wrong in (wire.question(query("db"), 10, TAG), wire.question(query("dc"), 9, TAG), wire.question(query("db"), 9, TAG[::-1]),
                  wire.question(query("db", "AAAA"), 9, TAG)):
        with pytest.raises(ValueError, match=r"another|not an answer"):
            wire.told(good, wrong)
    for bad in (asked, good[:-1], good[:-16] + bytes(16), b"", wire.answer(query("db"), wire.NOERROR, ["10.9.2.1"])):
        with pytest.raises(ValueError, match=r"."):
            wire.told(bad, asked)
    spaced = wire.answer(wire.parse(asked), wire.NOERROR, names=["a b.far"])
    with pytest.raises(ValueError, match="not a host's name"):
        wire.told(spaced, asked)


@given(st.binary(max_size=80), st.integers(0, 200))
def test_whatever_comes_as_an_answer_is_read_or_refused(data: bytes, cut: int) -> None:
    asked = wire.question(query("db"), 9, TAG)
    good = wire.answer(wire.parse(asked), wire.NOERROR, ["10.9.2.1"], ["db.far"])
    for reply in (data, good[:cut] + data, good[:12] + data + good[cut:]):
        try:
            wire.told(reply, asked)
        except ValueError:
            continue


def test_hosts_ask_each_other_and_strangers_are_told_nothing(port: int) -> None:
    async def work() -> None:
        here, there = Neighbours(names(), 600), Neighbours(names(*ALL), 600)
        assert here.put("m", overlay(port, HERE, THERE)) == "" == there.put("n", overlay(port, THERE, HERE))
        assert here.networks() == ["m"] and here.asked_about(["x", "m"]) and not here.asked_about(["x"])
        assert await here.ask(["m"], query("DB")) == Found(("10.9.2.1",))
        assert await here.ask(["m"], query("store.far", "AAAA")) == Found(("fd00:9::2:1",))
        assert await here.ask(["m"], query("plain", "AAAA")) == Found()  # it is there, and has none
        assert await here.ask(["m"], query("nobody")) is None
        for address in ("10.9.2.1", "fd00:9::2:1"):
            assert await here.ask(["m"], query(reverse(address), "PTR")) == Found(names=("db.far",))
        assert await here.ask(["m"], query(reverse("10.8.2.1"), "PTR")) is None
        assert await here.ask(["other"], query("db")) is None
        # a stranger, and a host of the network that asks about another's number
        loop = asyncio.get_running_loop()
        for source, number, answered in ((STRANGER, 7, False), (HERE, 8, False), (HERE, 7, True)):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock, \
                    socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as after:
                sock.bind((source, 0))
                after.bind((HERE, 0))
                for one, vni in ((sock, number), (after, 7)):
                    await loop.sock_sendto(one, wire.question(query("db"), 1, struct.pack("!I8s", vni, b"")), (THERE, port))
                await loop.sock_recv(after, 2000)  # what came first was read first
                try:
                    assert bool(sock.recv(2000)) == answered
                except BlockingIOError:
                    assert not answered
        there.put("n", None)
        here.close()
        there.close()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((THERE, port))  # nobody listens any more

    run(work)


def test_a_host_that_hangs_is_waited_for_once(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        here, other = Neighbours(names(), 600), Neighbours(names(ALL[1]), 600)
        here.put("n", overlay(port, HERE, THERE, STRANGER))
        other.put("n", overlay(port, STRANGER, HERE))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as hung:
            hung.bind((THERE, port))
            assert await here.ask(["n"], query("plain")) == Found(("10.9.2.2",))  # nobody waits for the other one
            monkeypatch.setattr(module, "SECONDS", 0.05)
            assert await here.ask(["n"], query("db")) is None
            monkeypatch.setattr(module, "SECONDS", 1000.0)  # from now on nothing may wait for it
            monkeypatch.setattr(module, "PROBE_SECONDS", 0.0)
            for _ in range(3):
                assert await here.ask(["n"], query("db")) is None
        # it comes back: the first question that it answers makes it one to wait for
        back = Neighbours(names(ALL[0]), 600)
        back.put("n", overlay(port, THERE, HERE))
        while ("n", THERE) in here._silent:
            assert await here.ask(["n"], query("db")) in (None, Found(("10.9.2.1",)))
        assert await here.ask(["n"], query("db")) == Found(("10.9.2.1",))
        for one in (here, other, back):
            one.close()

    run(work)


def test_a_question_that_is_lost_is_sent_again(port: int) -> None:
    async def work() -> None:
        here, loop = Neighbours(names(), 600), asyncio.get_running_loop()
        here.put("n", overlay(port, HERE, THERE))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as other:
            other.bind((THERE, port))
            asking = loop.create_task(here.ask(["n"], query("db")))
            first, _ = await loop.sock_recvfrom(other, 2000)
            again, source = await loop.sock_recvfrom(other, 2000)
            assert first == again
            await loop.sock_sendto(other, wire.answer(wire.parse(again), wire.NOERROR, ["10.9.2.1"]), source)
            assert await asking == Found(("10.9.2.1",))
        here.close()

    run(work)


def test_lies_of_a_host_and_forged_answers_are_not_believed(port: int) -> None:
    async def work() -> None:
        here, loop = Neighbours(names(), 600), asyncio.get_running_loop()
        here.put("n", overlay(port, HERE, THERE))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as other, \
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            other.bind((THERE, port))
            stranger.bind((STRANGER, port))

            async def told(name: str, kind: str, *addresses: str, says: tuple[str, ...] = ()) -> Found | None:
                asking = loop.create_task(here.ask(["n"], query(name, kind)))
                data, source = await loop.sock_recvfrom(other, 2000)
                asked = wire.parse(data)
                forged = wire.answer(asked, wire.NOERROR, ["10.9.6.6"])
                stranger.sendto(forged, source)
                for wrong in (dataclasses.replace(asked, id=asked.id ^ 1), dataclasses.replace(asked, tag=TAG)):
                    other.sendto(wire.answer(wrong, wire.NOERROR, ["10.9.6.6"]), source)
                other.sendto(wire.answer(asked, wire.NOERROR, addresses, says), source)
                return await asking

            assert await told("db", "A", "10.9.2.1") == Found(("10.9.2.1",))
            assert await told("db", "A", "10.9.2.1", "192.0.2.1") is None  # not of the network
            assert await told("db", "AAAA", "fd00:8::1") is None
            assert await told(reverse("10.9.2.1"), "PTR", says=("db.far",)) == Found(names=("db.far",))
            assert await told(reverse("10.9.2.1"), "PTR", says=("db.example.org",)) is None
        here.close()

    run(work)


def test_a_port_in_use_is_said_and_tried_again(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LISTEN_SECONDS", 0.01)

    async def work() -> None:
        here, there = Neighbours(names(), 600), Neighbours(names(*ALL), 600)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind((THERE, port))
            assert "in use" in there.put("n", overlay(port, THERE, HERE))
        here.put("n", overlay(port, HERE, THERE))
        while await here.ask(["n"], query("db")) is None:
            here.put("n", overlay(port, HERE, THERE))  # as one that has not been asked yet
        here.close()
        there.close()

    run(work)


def test_containers_are_told_what_other_hosts_know_and_the_world_is_asked_last(port: int) -> None:
    class World(Forwarder):
        names: list[str] = []

        async def ask(self, query: bytes, servers: object, *, tcp: bool) -> bytes | None:
            self.names.append(wire.parse(query).name)
            return None

    class Pinned:
        pinned: list[str] = []

        def allows(self, name: str) -> bool:
            return name == "db"

        def pin(self, name: str, addresses: list[tuple[str, int]]) -> None:
            self.pinned += [address for address, _ in addresses]

    async def work() -> None:
        made, there = Server(World()), Neighbours(names(*ALL), 600)
        await made.command({"op": "across", "network": "n", "across": overlay(port, HERE, THERE).wish()}, [])
        assert (await made.command({"op": "hello"}, []))["across"] == ["n"]
        there.put("n", overlay(port, THERE, HERE))

        async def told(sandbox: Sandbox, name: str, kind: str = "A") -> tuple[int, set[str]]:
            asked = dns.message.make_query(name, kind)
            if sandbox.pins is None:
                reply = made._local(sandbox, asked.to_wire(), tcp=False)
                if reply is None:
                    reply = await made._elsewhere(sandbox, asked.to_wire(), tcp=False)
            else:
                reply = await made._restricted(sandbox, asked.to_wire(), tcp=False)
            assert reply is not None
            found = dns.message.from_wire(reply)
            assert asked.is_response(found)
            return found.rcode(), {str(item) for rrset in found.answer for item in rrset}

        free, internal, alone = Sandbox(["n"], [], True), Sandbox(["n"], [], False), Sandbox(["x"], [], False)
        for sandbox in (free, internal):
            assert await told(sandbox, "db") == (dns.rcode.NOERROR, {"10.9.2.1"})
            assert await told(sandbox, reverse("10.9.2.1"), "PTR") == (dns.rcode.NOERROR, {"db.far."})
        assert World.names == []
        assert await told(internal, "nobody") == (dns.rcode.SERVFAIL, set()) == await told(alone, "db")
        assert World.names == []
        assert await told(free, "nobody") == (dns.rcode.SERVFAIL, set())
        assert World.names == ["nobody"]
        kept = Sandbox(["n"], [], True, pins=Pinned())  # type: ignore[arg-type]
        assert await told(kept, "db") == (dns.rcode.NOERROR, {"10.9.2.1"}) and Pinned.pinned == ["10.9.2.1"]
        assert await told(kept, "db", "ANY") == (dns.rcode.NOERROR, {"10.9.2.1"})  # no IPv6
        assert await told(kept, "plain") == (dns.rcode.REFUSED, set())
        assert await told(kept, reverse("10.9.2.2"), "PTR") == (dns.rcode.NOERROR, {"plain.far."})
        assert await told(kept, reverse("10.9.2.9"), "PTR") == (dns.rcode.REFUSED, set())
        assert World.names == ["nobody"]
        made.neighbours.close()
        there.close()

    run(work)
