"""Answers of the name server, read by dnspython; who is called what; questions passed on to servers of the test's own."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.reversename
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dolium.network import egress
from dolium.network.dns import forward, wire
from dolium.network.dns.forward import Forwarder
from dolium.network.dns.names import Entry, Names
from dolium.network.dns.server import Sandbox, Server

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: port 53")


def server(*, into: bool = False) -> tuple[Server, Sandbox]:
    made = Server()
    made.names.put("1", "one", Entry("a" * 64, ("web", "db"), "10.0.0.2"))
    made.names.put("1", "one", Entry("b" * 64, ("App", "db"), "10.0.0.3"))
    made.names.put("1", "one", Entry("d" * 64, ("six",), "10.0.0.4", "fd00:1::4"))
    made.names.put("2", "two", Entry("c" * 64, ("far",), "10.1.0.2"))
    return made, Sandbox(["1"], [], into)


def asked(made: Server, sandbox: Sandbox, name: str, kind: str = "A", *, tcp: bool = False, **more: int) -> dns.message.Message:
    query = dns.message.make_query(name, kind, **more)  # type: ignore[arg-type]
    reply = made._local(sandbox, query.to_wire(), tcp=tcp)
    assert reply is not None
    found = dns.message.from_wire(reply)
    assert query.is_response(found) and found.flags & dns.flags.RA and found.opcode() == 0
    return found


def values(message: dns.message.Message) -> set[str]:
    return {str(item) for rrset in message.answer for item in rrset}


def test_names_of_the_networks_it_is_in_and_no_others() -> None:
    made, inside = server()
    assert values(asked(made, inside, "web")) == {"10.0.0.2"} == values(asked(made, inside, "WEB.one"))
    assert values(asked(made, inside, "db")) == {"10.0.0.2", "10.0.0.3"} and values(asked(made, inside, "app")) == {"10.0.0.3"}
    assert asked(made, inside, "far").rcode() == dns.rcode.SERVFAIL  # and is not asked for in the world
    both = Sandbox(["1", "2"], None, True)
    assert values(asked(made, both, "far.two")) == {"10.1.0.2"}
    assert made._local(both, dns.message.make_query("far.one", "A").to_wire(), tcp=False) is None  # others are asked
    made.names.drop("b" * 64)
    assert values(asked(made, inside, "db")) == {"10.0.0.2"}


def test_a_name_that_is_known_has_no_address_of_the_other_kind() -> None:
    made, inside = server()
    found = asked(made, inside, "web", "AAAA")
    assert found.rcode() == dns.rcode.NOERROR and not found.answer
    assert values(asked(made, inside, "web", "ANY")) == {"10.0.0.2"}


def test_ipv6_addresses_of_names() -> None:
    made, inside = server()
    assert values(asked(made, inside, "six", "AAAA")) == {"fd00:1::4"} and values(asked(made, inside, "six")) == {"10.0.0.4"}
    assert values(asked(made, inside, "six", "ANY")) == {"10.0.0.4", "fd00:1::4"}
    name = dns.reversename.from_address("fd00:1::4")
    assert values(asked(made, inside, str(name), "PTR")) == {"six.one."}
    assert wire.reverse_of(str(name)[:-1].upper().lower()) == "fd00:1::4"
    for wrong in ("x" + str(name)[1:-1], str(name)[2:-1], "ip6.arpa", "1.0.0.10.ip6.arpa"):
        assert wire.reverse_of(wrong) == ""


def test_a_restricted_one_is_told_no_ipv6_address() -> None:
    made, inside = server()
    inside.pins = Pinned()  # type: ignore[assignment]
    query = dns.message.make_query("six", "AAAA").to_wire()
    reply = dns.message.from_wire(asyncio.run(made._restricted(inside, query, tcp=False)))
    assert reply.rcode() == dns.rcode.NOERROR and not reply.answer
    query = dns.message.make_query("six", "ANY").to_wire()
    assert values(dns.message.from_wire(asyncio.run(made._restricted(inside, query, tcp=False)))) == {"10.0.0.4"}
    assert inside.pins.told == ["10.0.0.4"]  # type: ignore[attr-defined]


class Pinned:
    """Allows all, and keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def allows(self, name: str) -> bool:
        return True

    def pin(self, name: str, addresses: list[tuple[str, int]]) -> None:
        self.told += [address for address, _ in addresses]


def test_look_ups_by_address() -> None:
    made, inside = server()
    assert values(asked(made, inside, "3.0.0.10.in-addr.arpa", "PTR")) == {"app.one."}
    assert asked(made, inside, "2.0.1.10.in-addr.arpa", "PTR").rcode() == dns.rcode.SERVFAIL


def test_an_answer_that_is_too_large_says_so() -> None:
    made, inside = server()
    for number in range(100):
        made.names.put("1", "one", Entry(f"{number:064d}", ("many",), f"10.2.0.{number}"))
    short = asked(made, inside, "many")
    assert short.flags & dns.flags.TC and 0 < len(values(short)) < 100
    assert len(values(asked(made, inside, "many", use_edns=0, payload=4096))) == 100
    whole = asked(made, inside, "many", tcp=True)
    assert len(values(whole)) == 100 and not whole.flags & dns.flags.TC


@given(st.binary(max_size=300))
def test_whatever_comes_is_answered_or_passed_over(data: bytes) -> None:
    made, inside = server()
    reply = made._local(inside, data, tcp=False)
    assert reply is not None
    if reply:
        assert reply[:2] == data[:2] and reply[2] & 0x80 and reply[3] & 15 in (0, wire.FORMERR, wire.SERVFAIL, wire.NOTIMP)


@given(st.lists(st.text("abcXYZ019-_", min_size=1, max_size=63), min_size=1, max_size=4))
def test_names_are_read_as_dnspython_writes_them(labels: list[str]) -> None:
    name = ".".join(labels)
    if len(name) < 250:
        assert wire.parse(dns.message.make_query(name, "A").to_wire()).name == name.lower()
        assert wire.encode(name)[-1] == 0


def test_a_label_with_a_dot_is_no_name_of_several() -> None:
    for labels in ([b"pypi.org", b""], [b"x.pypi", b"org", b""], [b"x.pypi.org", b""]):
        name = wire.parse(dns.message.make_query(dns.name.Name(labels), "A").to_wire()).name
        assert not any(one.covers(name) for one in egress.parse(["allow=pypi.org", "allow=*.pypi.org"])), name


def test_names_that_cannot_be() -> None:
    for name in ("a" * 64, "", "a..b", ".".join(["a" * 60] * 5)):
        with pytest.raises(ValueError):
            wire.encode(name)
    assert wire.reverse_of("1.2.3.in-addr.arpa") == "" == wire.reverse_of("x.2.3.4.in-addr.arpa") == wire.reverse_of("in-addr.arpa")


# -- passed on --

@contextmanager
def upstream(address: str, *answers: bytes | None) -> Iterator[list[bytes]]:
    """A server on port 53 of a loopback address; each answer is what to send back to one question (None: the right one)."""
    seen: list[bytes] = []
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((address, 53))

    def run() -> None:
        for answer in answers:
            data, client = sock.recvfrom(4096)
            if not data:
                return
            seen.append(data)
            reply = dns.message.make_response(dns.message.from_wire(data))
            if answer is not None:
                sock.sendto(answer, client)  # a forgery first
            sock.sendto(reply.to_wire(), client)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
            end.sendto(b"", (address, 53))
        thread.join(5)
        sock.close()


def ask(forwarder: Forwarder, servers: list[str]) -> bytes | None:
    query = dns.message.make_query("example.org", "A").to_wire()

    async def run() -> bytes | None:
        return await forwarder.ask(query, servers, tcp=False)

    reply = asyncio.run(run())
    assert reply is None or reply[:2] == query[:2]
    return reply


@needs_root
def test_a_server_that_hangs_is_asked_last_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "SECONDS", 0.2)
    forwarder = Forwarder()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent, upstream("127.7.7.8", None, None, None) as seen:
        silent.bind(("127.7.7.7", 53))
        assert ask(forwarder, ["127.7.7.7", "127.7.7.8"]) is not None
        assert ask(forwarder, ["127.7.7.7", "127.7.7.8"]) is not None
        silent.setblocking(False)
        silent.recv(4096)
        with pytest.raises(BlockingIOError):
            silent.recv(4096)  # it was asked once
        assert len(seen) == 2
    assert ask(forwarder, ["127.7.7.9"]) is None and forwarder.asked == 0


@needs_root
def test_what_answers_something_else_is_no_answer() -> None:
    forged = dns.message.make_response(dns.message.make_query("example.com", "A")).to_wire()
    with upstream("127.7.7.8", forged) as seen:
        reply = ask(Forwarder(), ["127.7.7.8"])
    assert reply is not None and b"org" in reply and len(seen) == 1


def test_one_that_asks_without_end_leaves_room_for_others() -> None:
    class Slow(Forwarder):
        async def ask(self, query: bytes, servers: object, *, tcp: bool) -> bytes | None:
            self.asked += 1
            await asyncio.Event().wait()
            return None

    async def run() -> tuple[int, bytes]:
        slow = Slow()
        made, greedy = Server(slow), Sandbox(["1"], [], True)
        query = dns.message.make_query("example.org", "A").to_wire()
        waiting = [asyncio.create_task(made._elsewhere(greedy, query, tcp=False)) for _ in range(300)]
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        return slow.asked, next(iter(done)).result()

    under_way, refused = asyncio.run(run())
    assert under_way == 128 and dns.message.from_wire(refused).rcode() == dns.rcode.SERVFAIL


def test_the_hosts_servers_are_read_again_when_they_change(tmp_path: Path) -> None:
    file = tmp_path / "resolv.conf"
    forwarder = Forwarder(str(file))
    assert forwarder.host_servers() == ["8.8.8.8", "8.8.4.4"]
    file.write_text("# nameserver 9.9.9.9\nnameserver 192.0.2.1\n")
    assert forwarder.host_servers() == ["192.0.2.1"]
    file.with_suffix(".new").write_text("nameserver 192.0.2.2\nnameserver ::1\n")
    file.with_suffix(".new").rename(file)
    assert forwarder.host_servers() == ["192.0.2.2", "::1"]


def test_names_are_shuffled() -> None:
    names = Names(lambda found: found.reverse())
    for number in (1, 2):
        names.put("1", "one", Entry(str(number), ("x",), f"10.0.0.{number}"))
    assert names.addresses(["1"], "X") == ["10.0.0.2", "10.0.0.1"]
