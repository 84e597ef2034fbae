"""Sequences nobody thought of: networks made and removed, containers that come, go, are connected and publish, and daemons
that come back. After each step all is as a model says; after each sequence the host is as it was."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import subprocess
import tempfile
from collections.abc import Coroutine
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule
from packets import FORWARD6, SECONDS, Bench, inside, links, nothing_left, tables

from dolium.errors import AlreadyExists, DoliumError, NotFound, PermissionDenied
from dolium.network.base import NetworkRequest, Place, PortBinding, endpoints
from dolium.network.netlink import Netlink

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.leaves("children")]
T = TypeVar("T")
SEQUENCES, SOME, STEPS = 100, 8, 10
PORTS = range(18400, 18404)


class Machine(RuleBasedStateMachine):
    """``model``: by container, its networks with the host's ports of the first that has a way out."""

    networks = Bundle("networks")
    containers = Bundle("containers")

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.undo = contextlib.ExitStack()
        self.instance = secrets.token_hex(4)
        self.undo.enter_context(nothing_left(self.instance))
        folder = self.undo.enter_context(tempfile.TemporaryDirectory())
        self.bench = Bench(Path(folder), self.instance)
        self.internal: dict[str, bool] = {"bridge": False}
        self.model: dict[str, list[str]] = {}
        self.ports: dict[int, str] = {}  # of the host: whose
        self.six: set[str] = set()  # networks with IPv6
        self.ports6: set[int] = set()  # of ``ports``, those that are at IPv6 addresses too
        self.relays: list[subprocess.Popen[bytes]] = []

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def endpoint(self, container: str) -> dict[str, Any]:
        return self.bench.prepared[container].endpoint

    def first(self, container: str) -> str:
        """Its network with the ports and the default route; ""."""
        return next((name for name in self.model[container] if not self.internal[name]), "")

    @initialize(target=networks)
    def begin(self) -> str:
        self.do(self.bench.networks.start({}))
        return "bridge"

    @rule(target=networks, name=st.sampled_from(["red", "green", "blue"]), internal=st.booleans(), six=st.booleans())
    def create(self, name: str, internal: bool, six: bool) -> Any:
        if name in self.internal:
            with pytest.raises(AlreadyExists):
                self.do(self.bench.networks.create({"Name": name}))
            return multiple()
        six = six and FORWARD6.exists()
        self.do(self.bench.networks.create({"Name": name, "Internal": internal, "EnableIPv6": six}))
        self.internal[name] = internal
        if six:
            self.six.add(name)
        return name

    @rule(name=networks)
    def remove(self, name: str) -> None:
        if name == "bridge" or any(name in names for names in self.model.values()):
            if name in self.internal:
                with pytest.raises(PermissionDenied):
                    self.do(self.bench.networks.remove(name))
        elif name in self.internal:
            self.do(self.bench.networks.remove(name))
            del self.internal[name]
            self.six.discard(name)
        else:
            with pytest.raises(NotFound):
                self.do(self.bench.networks.remove(name))

    @rule(target=containers, name=networks, port=st.none() | st.sampled_from(PORTS))
    def up(self, name: str, port: int | None) -> Any:
        container = secrets.token_hex(32)
        ports = () if port is None else (PortBinding(80, "tcp", "", port),)
        request = NetworkRequest(container, name, ports, names=(f"c{container[:6]}",))
        taken = port in self.ports and not self.internal.get(name, True)
        if name not in self.internal or taken:
            with pytest.raises(DoliumError):
                self.do(self.bench.networks.prepare(request))
            return multiple()
        self.bench.prepared[container] = self.do(self.bench.networks.prepare(request))
        self.model[container] = [name]
        if port is not None and not self.internal[name]:
            self._published(container, port)
        return container

    def _published(self, container: str, port: int) -> None:
        self.ports[port] = container
        if self.first(container) in self.six:
            self.ports6.add(port)
        else:
            self.ports6.discard(port)

    @rule(container=consumes(containers))
    def down(self, container: str) -> None:
        self.do(self.bench.down(container))
        del self.model[container]
        self.ports = {port: owner for port, owner in self.ports.items() if owner != container}

    @rule(container=containers, name=networks)
    def connect(self, container: str, name: str) -> None:
        prepared = self.bench.prepared[container]
        work = self.bench.networks.connect(container, Place(name, names=(f"c{container[:6]}",)), prepared.fd, prepared.endpoint)
        if name not in self.internal or name in self.model[container]:
            with pytest.raises(DoliumError):
                self.do(work)
            return
        without = not self.first(container)
        prepared.endpoint = self.do(work)
        self.model[container].insert(0 if without and not self.internal[name] else len(self.model[container]), name)

    @rule(container=containers, name=networks)
    def disconnect(self, container: str, name: str) -> None:
        prepared = self.bench.prepared[container]
        work = self.bench.networks.disconnect(container, name, prepared.fd, prepared.endpoint)
        if name not in self.model[container]:
            with pytest.raises(NotFound):
                self.do(work)
            return
        prepared.endpoint = self.do(work)
        self.model[container].remove(name)
        if not self.first(container):
            self.ports = {port: owner for port, owner in self.ports.items() if owner != container}
        if self.first(container) not in self.six:  # the next one has them, but no IPv6
            self.ports6 = {port for port in self.ports6 if self.ports.get(port) != container}

    @rule(container=containers, port=st.sampled_from(PORTS))
    def publish(self, container: str, port: int) -> None:
        prepared = self.bench.prepared[container]
        work = self.bench.networks.publish(container, prepared.endpoint, (PortBinding(81, "tcp", "", port),))
        if port in self.ports or not self.first(container):
            with pytest.raises(DoliumError):
                self.do(work)
            return
        prepared.endpoint = self.do(work)
        self._published(container, port)

    @rule(container=containers, port=st.sampled_from(PORTS))
    def withdraw(self, container: str, port: int) -> None:
        prepared = self.bench.prepared[container]
        there = next((one for one in prepared.endpoint.get("ports") or [] if one["host_port"] == port), None)
        work = self.bench.networks.withdraw(
            container, prepared.endpoint, (PortBinding(there["container_port"] if there else 81, "tcp", "", port),))
        if self.ports.get(port) != container:
            with pytest.raises(NotFound):
                self.do(work)
            return
        prepared.endpoint = self.do(work)
        del self.ports[port]

    @rule()
    def another_daemon(self) -> None:
        name_server, relay = self.bench.networks._dns._child, self.bench.networks._bridge._loopback._child
        if relay is not None:  # it ends when the next daemon's has taken over
            self.relays.append(relay)
        self.do(self.bench.networks.close())
        self.bench.networks = type(self.bench.networks)(self.instance, self.bench.store, run_dir=str(self.bench.folder))
        self.do(self.bench.networks.start(
            {container: prepared.endpoint for container, prepared in self.bench.prepared.items()},
            lambda container: os.dup(self.bench.prepared[container].fd)))
        self.bench.networks._dns._child = name_server  # this process is the first daemon, too: it has to wait for it

    @invariant()
    def all_is_as_it_should_be(self) -> None:
        if "bridge" not in {one["Name"] for one in self.bench.networks.describe()} or not self.bench.networks._row:
            return  # not begun
        there = {one["Name"]: one for one in self.bench.networks.describe() if one["Driver"] == "bridge"}
        assert set(there) == set(self.internal)
        for name, described in there.items():
            assert set(described["Containers"]) == {one for one, names in self.model.items() if name in names}
            subnet = IPv4Network(described["IPAM"]["Config"][0]["Subnet"])
            given = [one["IPv4Address"].partition("/")[0] for one in described["Containers"].values()]
            assert len(given) == len(set(given)) and all(IPv4Address(address) in subnet for address in given)
        for container, names in self.model.items():
            assert [one["network"] for one in endpoints(self.endpoint(container))] == names
            mine = {port["host_port"] for port in self.endpoint(container).get("ports") or []}
            assert mine == {port for port, owner in self.ports.items() if owner == container}
            way6 = next((one for one in endpoints(self.endpoint(container)) if one.get("gateway6")), None)
            assert self._default6(container) == ({way6["link"]} if way6 is not None else set())
        assert self._listed("ip", "any") == set(self.ports)
        if self.six:
            ports6 = {port for port in self.ports6 if port in self.ports}
            assert self._listed("ip6", "any") == self._listed("ip6", "targets") == ports6
        else:
            assert f"table ip6 dolium-{self.instance}" not in tables()

    def _listed(self, family: str, name: str) -> set[int]:
        text = subprocess.run(["nft", "list", "map", family, f"dolium-{self.instance}", name], check=True, capture_output=True,
                              text=True).stdout
        return {port for port in PORTS if f"tcp . {port} " in text}

    def _default6(self, container: str) -> set[str]:
        """The links of the default routes of IPv6 in its namespace."""
        with contextlib.closing(inside(self.bench.prepared[container].fd, Netlink)) as there:
            names = {link.index: link.name for link in there.links()}
            return {names[route.link] for route in there.routes6() if not route.network.prefixlen and route.link > 1}

    def teardown(self) -> None:
        try:
            for container in list(self.bench.prepared):
                self.do(self.bench.down(container))
            for name in [name for name in self.internal if name != "bridge"]:
                self.do(self.bench.networks.remove(name))
            self.do(self.bench.networks.close())
            for relay in self.relays:
                relay.wait(SECONDS)
            assert links(self.instance) == set()
            assert f"dolium-{self.instance}" not in tables()
        finally:
            self.loop.close()
            self.undo.close()


_SETTINGS = settings(stateful_step_count=STEPS, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True,
                     database=None)


class TestSomeSequences(Machine.TestCase):  # type: ignore[misc,name-defined]
    settings = settings(_SETTINGS, max_examples=SOME)


@pytest.mark.crash
@pytest.mark.timeout(600)
class TestAHundredSequences(Machine.TestCase):  # type: ignore[misc,name-defined]
    """Not that it crashes anything: it takes minutes, and `make test-crash` has them."""

    settings = settings(_SETTINGS, max_examples=SEQUENCES)
