"""The relay of ::1, with a firewall that is played: where a port leads, half-closes, and what cannot be passed on."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest

from dolium.errors import Internal
from dolium.network import relay
from dolium.network.relay import Relay, target_in


class Told:
    """Stands for ``Nft``: every port leads to one server of the test's."""

    def __init__(self, port: int) -> None:
        self.port = port

    def run(self, text: str) -> str:
        asked = int(text.rstrip(" }\n").rpartition(" ")[2])
        if not self.port:
            raise Internal("nft: no such element")
        return f"table ip6 x {{\n elements = {{ tcp . {asked} : ::1 . {self.port} }}\n}}\n"


def test_where_a_port_leads() -> None:
    text = "map targets {\n elements = { tcp . 80 : fd00::5 . 8080,\n tcp . 18080 : fd00::6 . 81 }\n}"
    assert target_in(text, 80) == ("fd00::5", 8080) and target_in(text, 18080) == ("fd00::6", 81)
    assert target_in(text, 8080) is None and target_in("", 80) is None


async def passed_on(target: int, body: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> Relay:
    made = Relay("x", Told(target))  # type: ignore[arg-type]
    server = await asyncio.start_server(made.talk, "::1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
    try:
        await body(reader, writer)
        await asyncio.wait_for(made.idle.wait(), 5)
    finally:
        writer.close()
        server.close()
    return made


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection tracking is behind these: the port that was meant is that of the relay itself."""
    real = asyncio.trsock.TransportSocket.getsockopt

    def getsockopt(self: object, level: int, option: int, *size: int) -> object:
        if option == relay._ORIGINAL_DST and level == socket.IPPROTO_IPV6:
            return b"\0\0" + (80).to_bytes(2, "big") + bytes(24)
        return real(self, level, option, *size)  # type: ignore[arg-type]
    monkeypatch.setattr(asyncio.trsock.TransportSocket, "getsockopt", getsockopt)


@pytest.mark.usefixtures("direct")
def test_bytes_both_ways_and_a_half_close() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read(-1) + b" heard")  # all, until the client has ended its side
        writer.close()

    async def run() -> None:
        target = await asyncio.start_server(echo, "::1", 0)

        async def body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"x" * 300000)
            writer.write_eof()
            assert await reader.read(-1) == b"x" * 300000 + b" heard"

        made = await passed_on(target.sockets[0].getsockname()[1], body)
        assert not made.talking
        target.close()

    asyncio.run(run())


@pytest.mark.usefixtures("direct")
@pytest.mark.parametrize("published", [True, False])
def test_what_cannot_be_passed_on_is_reset(published: bool) -> None:
    async def run() -> None:
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as closed:
            port = closed.getsockname()[1]

        async def body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with pytest.raises(ConnectionResetError):
                await reader.read(-1)

        await passed_on(port if published else 0, body)

    asyncio.run(run())
