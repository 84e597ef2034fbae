"""The D-Bus wire form, and a client against a bus made of a socket and a thread."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dolium.errors import DeadlineExceeded, DoliumError, Unavailable
from dolium.linux import dbus
from dolium.linux.cgroup import systemd_calls

BASIC = {"y": st.integers(0, 255), "b": st.booleans(), "n": st.integers(-1 << 15, (1 << 15) - 1), "q": st.integers(0, 65535),
         "i": st.integers(-1 << 31, (1 << 31) - 1), "u": st.integers(0, (1 << 32) - 1), "x": st.integers(-1 << 63, (1 << 63) - 1),
         "t": st.integers(0, (1 << 64) - 1), "s": st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)}


def typed() -> st.SearchStrategy[tuple[str, Any]]:
    """A complete type with a value of it."""
    basic = st.sampled_from(sorted(BASIC)).flatmap(lambda kind: st.tuples(st.just(kind), BASIC[kind]))

    def wider(inner: st.SearchStrategy[tuple[str, Any]]) -> st.SearchStrategy[tuple[str, Any]]:
        structs = st.lists(inner, min_size=1, max_size=4).map(
            lambda parts: (f"({''.join(kind for kind, _ in parts)})", tuple(value for _, value in parts)))
        arrays = inner.flatmap(lambda one: st.integers(0, 3).map(lambda count: (f"a{one[0]}", [one[1]] * count)))
        return structs | arrays | inner.map(lambda one: ("v", one))

    return st.recursive(basic, wider, max_leaves=8)


@given(st.lists(typed(), max_size=5))
def test_what_is_marshalled_is_unmarshalled(values: list[tuple[str, Any]]) -> None:
    signature = "".join(kind for kind, _ in values)
    assert dbus.split(signature) == [kind for kind, _ in values]
    assert dbus.unmarshal(signature, dbus.marshal(signature, [value for _, value in values])) == [value for _, value in values]


def test_the_wire_form_of_the_specification() -> None:
    """Alignment, as "Marshaling" has it: an array's length does not count the padding before its first element."""
    assert dbus.marshal("yu", [1, 2]) == b"\1\0\0\0\2\0\0\0"
    assert dbus.marshal("s", ["foo"]) == b"\3\0\0\0foo\0"
    assert dbus.marshal("at", [[5]]) == b"\x08\0\0\0\0\0\0\0\5\0\0\0\0\0\0\0"
    assert dbus.marshal("at", [[]]) == b"\0\0\0\0\0\0\0\0"
    assert dbus.marshal("v", [("u", 7)]) == b"\1u\0\0\7\0\0\0"
    assert dbus.marshal("a(sv)", [[("A", ("b", True))]]) == (
        b"\x10\0\0\0\0\0\0\0" + b"\1\0\0\0A\0" + b"\1b\0" + b"\0\0\0" + b"\1\0\0\0")


@given(st.binary(max_size=200))
def test_bytes_that_are_no_message_are_an_error_that_is_expected(data: bytes) -> None:
    for lead in (b"", b"l\1\0\1\0\0\0\0\1\0\0\0\0\0\0\0", b"l\2\0\1\4\0\0\0\1\0\0\0\x20\0\0\0"):
        with contextlib.suppress(ValueError, KeyError, IndexError, TypeError):  # what Bus turns into Unavailable
            assert dbus.decode(lead + data) is None or len(lead + data) >= 16


@pytest.mark.parametrize("signature", ["a", "(s", "z", "a(", "aa"])
def test_signatures_that_are_none(signature: str) -> None:
    with pytest.raises(ValueError, match="signature"):
        dbus.split(signature)


def test_addresses() -> None:
    assert dbus.unix_paths("unix:path=/run/a%20b,guid=1;tcp:host=x;unix:abstract=/tmp/c") == ["/run/a b", "\0/tmp/c"]


class FakeBus:
    """Accepts one client, lets it in, and answers each call by ``script(message) -> [bytes to send]``; None: never."""

    def __init__(self, place: Path, script: Callable[[dbus.Message], list[bytes] | None]) -> None:
        self.address = f"unix:path={place}"
        self.calls: list[dbus.Message] = []
        self._script = script
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(place))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        client, _ = self._listener.accept()
        client.settimeout(20)
        data = b""
        with client, contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it had heard enough
            while b"\r\n" not in data:
                data += client.recv(4096)
            assert data.startswith(b"\0AUTH EXTERNAL 30\r\n")
            client.sendall(b"OK 0123\r\n")
            data = data.partition(b"\r\n")[2]
            while True:
                while not data.startswith(b"l"):
                    data = data.removeprefix(b"BEGIN\r\n")
                    more = client.recv(4096) if not data else b""
                    if not data and not more:
                        return
                    data += more
                found = dbus.decode(data)
                if found is None:
                    more = client.recv(4096)
                    if not more:
                        return
                    data += more
                    continue
                data = data[found[1] :]
                self.calls.append(found[0])
                answers = self._script(found[0])
                for answer in answers or []:
                    client.sendall(answer)

    def members(self) -> list[str]:
        return [message.fields[dbus.MEMBER] for message in self.calls]

    def close(self) -> None:
        self._listener.close()
        self._thread.join(30)
        assert not self._thread.is_alive()


def reply(message: dbus.Message, signature: str = "", *values: Any) -> bytes:
    return dbus.encode(dbus.RETURN, 1000 + message.serial, {dbus.REPLY_SERIAL: message.serial}, signature, values)


def refusal(message: dbus.Message, name: str, text: str) -> bytes:
    return dbus.encode(dbus.ERROR, 1000 + message.serial, {dbus.REPLY_SERIAL: message.serial, dbus.ERROR_NAME: name}, "s", [text])


def removed(job: str, result: str) -> bytes:
    fields = {dbus.PATH: systemd_calls.PATH, dbus.INTERFACE: systemd_calls.MANAGER, dbus.MEMBER: "JobRemoved"}
    return dbus.encode(dbus.SIGNAL, 9, fields, "uoss", [1, job, "c.scope", result])


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Callable[[Callable[[dbus.Message], list[bytes] | None]], FakeBus]]:
    made: list[FakeBus] = []

    def make(script: Callable[[dbus.Message], list[bytes] | None]) -> FakeBus:
        made.append(FakeBus(tmp_path / "bus", script))
        return made[0]

    yield make
    for one in made:
        one.close()


def stop(address: str, seconds: float = 20) -> None:
    bus = dbus.Bus(address, 0, seconds)
    try:
        systemd_calls.Manager(bus).stop("c.scope")
    finally:
        bus.close()


def test_a_job_is_awaited_though_its_end_is_told_first(fake: Any) -> None:
    """The signal may come before the answer that names the job; another job's end is not ours."""
    def script(message: dbus.Message) -> list[bytes]:
        if message.fields[dbus.MEMBER] == "StopUnit":
            assert message.body == ["c.scope", "replace"]
            return [removed("/job/8", "failed"), removed("/job/7", "done"), reply(message, "o", "/job/7")]
        return [reply(message)]

    bus = fake(script)
    stop(bus.address)
    assert bus.members() == ["Hello", "AddMatch", "Subscribe", "StopUnit", "ResetFailedUnit"]


@pytest.mark.parametrize(("name", "why"), [("org.freedesktop.systemd1.NoSuchUnit", None), ("org.freedesktop.DBus.Error.X", "no!")])
def test_errors_have_a_name(fake: Any, name: str, why: str | None) -> None:
    bus = fake(lambda message: [refusal(message, name, "no!")] if message.fields[dbus.MEMBER] == "StopUnit" else [reply(message)])
    if why is None:
        stop(bus.address)
    else:
        with pytest.raises(dbus.Refused, match=why):
            stop(bus.address)


def test_a_job_that_fails(fake: Any) -> None:
    bus = fake(lambda message: [reply(message, "o", "/job/7"), removed("/job/7", "timeout")])
    with pytest.raises(DoliumError, match=r"job for c.scope ended as 'timeout'"):
        stop(bus.address)


@pytest.mark.parametrize("silent", ["Hello", "StopUnit"])
def test_no_answer_has_a_deadline(fake: Any, silent: str) -> None:
    bus = fake(lambda message: None if message.fields[dbus.MEMBER] == silent else [reply(message)])
    with pytest.raises(DeadlineExceeded, match=f"no answer to {silent} within 0.2 s"):
        stop(bus.address, 0.2)


def test_answers_that_are_none(fake: Any) -> None:
    bus = fake(lambda message: [b"HTTP/1.1 400 Bad Request\r\n\r\n"])
    with pytest.raises(Unavailable, match="what is no message"):
        stop(bus.address)


def test_nobody_there(tmp_path: Path) -> None:
    for address in (f"unix:path={tmp_path}/absent", "tcp:host=localhost"):
        with pytest.raises(Unavailable, match="D-Bus at"):
            dbus.Bus(address, 0, 1)
