"""``bridge``: the default network. A container has a veth pair on the instance's bridge, an address of its subnet, the
bridge as its gateway, and published ports by nftables.

What is in use is kept here in memory, and rebuilt from the containers' records when a daemon starts; the database has
only the subnet. Blocking work runs in this driver's own threads.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import IPv4Address, IPv4Network
from typing import Any, TypeVar

from dolium import faults
from dolium.errors import DoliumError, Internal
from dolium.network import netlink, pool
from dolium.network.addresses import AddressPool, check_mac, mac_for
from dolium.network.base import Known, NetworkRequest, Prepared
from dolium.network.drivers.base import Rows
from dolium.network.firewall import Firewall, Nft, Publication, udp_ports
from dolium.network.netlink import Netlink
from dolium.network.pool import LINK, Pool, Slot
from dolium.network.ports import ANY, Ports, Published
from dolium.network.switch import Switch, as_error, choosing, enable_forwarding

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
faults.register("network.record.put", "network.table.made", "network.ports.added", "network.ports.removed")
VERSION = 1
_TABLE = "networks"
_THREADS = 4
_GRACE_SECONDS = 2.0
"""How long a released link may take to go with its namespace, before it is removed."""
FILL_PAUSE = 0.03
"""Seconds before a pool that is not empty is filled again: the start that took from it does not share the processor, the
interpreter and the rtnl lock with that work."""


@dataclass(slots=True)
class _Held:
    """What a container has. ``link``: the host end's index, 0 when it is not known."""

    address: IPv4Address
    mac: str
    ports: tuple[Published, ...]
    link: int = 0


class BridgeDriver:
    """``warnings``: what an administrator should know, a sentence each; set by ``start``."""

    name = "bridge"

    def __init__(self, instance: str, store: Rows, *, pool_size: int = pool.SIZE) -> None:
        self._instance, self._store, self._pool_size = instance, store, pool_size
        self._ports = Ports()
        self._held: dict[str, _Held] = {}
        self._gone: dict[int, str] = {}
        self._reaping: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(_THREADS, "network")
        self._filling = self._closing = self._made = False
        self._row: dict[str, Any] = {}
        self._broken: DoliumError | None = Internal("the bridge network was not started")
        self.warnings: list[str] = []
        self._conntrack: Netlink
        self._switch: Switch
        self._firewall: Firewall
        self._nft: Nft
        self._pool: Pool
        self._addresses: AddressPool

    async def _run(self, work: Callable[..., _T], *arguments: Any, **named: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, functools.partial(work, *arguments, **named))

    # -- start --

    async def start(self, live: dict[str, dict[str, Any]]) -> None:
        """A host that cannot have a bridge (no privilege, no nftables) has the other networks all the same: the reason
        is logged, and is every ``attach``'s error."""
        try:
            await self._start(live)
            self._broken = None
        except OSError as error:
            self._broken = as_error(error, "cannot make the bridge network")
        except DoliumError as error:
            self._broken = error
        if self._broken is not None:
            _log.error("no bridge network: %s", self._broken)
            self.warnings = [f"no bridge network: {self._broken}"]
            await self._clear_quietly(keep=bool(live))
            return
        for warning in self.warnings:
            _log.warning("%s", warning)
        self._fill()

    async def _start(self, live: dict[str, dict[str, Any]]) -> None:
        self._nft = await self._run(Nft)
        self._conntrack, self._switch = Netlink(netlink.NETLINK_NETFILTER), Switch(self._instance)
        self._firewall = Firewall(self._instance, self._switch.name, self._nft)
        self._pool = Pool(lambda: pool.make(self._switch.host, self._instance, self._switch.mtu), self._pool_size)
        self._made = True
        self._row = next((row for row in self._store.rows(_TABLE) if row.get("name") == self.name), {})
        stored = IPv4Network(self._row["subnet"]) if self._row else None
        lock = choosing()
        await self._run(lock.__enter__)
        try:
            subnet = await self._run(self._switch.plan, stored, keep=bool(live))
            forwarding = await self._run(enable_forwarding)
            self._put(subnet, forwarding)
            self._addresses = AddressPool(subnet)
            await self._run(self._switch.make, subnet, keep=bool(live))
        finally:
            await self._run(lock.__exit__, None, None, None)
        links = await self._run(self._switch.sweep, live)
        for container, endpoint in live.items():
            self._adopt(container, endpoint, links.get(container, 0))
        await self._run(self._firewall.replace, subnet, {
            container: Publication(held.address, held.ports) for container, held in self._held.items() if held.ports})
        faults.point("network.table.made")
        self.warnings = [
            f"the chain {chain} drops forwarded packets by policy: containers have no network beyond the host "
            f"(let {self._switch.name} pass in it, or set its policy to accept)"
            for chain in await self._run(self._firewall.foreign_drops)]

    def _put(self, subnet: IPv4Network, forwarding: bool) -> None:
        row = {"version": VERSION, "name": self.name, "subnet": str(subnet),
               "created": self._row.get("created") or datetime.now(UTC).isoformat().replace("+00:00", "Z"),
               "forwarding_set": forwarding or bool(self._row.get("forwarding_set"))}
        if row != self._row:
            self._store.put_row(_TABLE, self.name, row)
            self._row = row
        faults.point("network.record.put")

    def _adopt(self, container: str, endpoint: dict[str, Any], link: int) -> None:
        try:
            ports = tuple(Published.from_dict(doc) for doc in endpoint.get("ports") or [])
            held = _Held(IPv4Address(endpoint["ip"]), str(endpoint["mac"]), ports, link)
        except (KeyError, ValueError) as error:
            _log.error("the record of container %s has no endpoint one can read: %r", container[:12], error)
            return
        if not self._addresses.adopt(str(held.address)):
            _log.warning("the address %s of container %s is not of %s, or another's too", held.address, container[:12],
                         self._addresses.subnet)
        self._ports.adopt(container, held.ports)
        self._held[container] = held

    # -- the pool --

    def _fill(self) -> None:
        if not self._filling and not self._closing:
            self._filling = True
            self._task(self._fill_all())

    async def _fill_all(self) -> None:
        try:
            if len(self._pool):
                await asyncio.sleep(FILL_PAUSE)
            while not self._closing and await self._run(self._pool.fill):
                continue
        except (OSError, RuntimeError) as error:
            # no fd, no memory, no thread: a start that finds the pool empty makes its own, and its caller is told
            _log.warning("cannot prepare network namespaces: %s", error)
        finally:
            self._filling = False

    def _task(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def pool_figures(self) -> dict[str, int]:
        """``ready``: prepared namespaces now; ``taken`` and ``missed``: starts that found one, that did not."""
        if self._broken is not None:
            return {"ready": 0, "taken": 0, "missed": 0}
        return {"ready": len(self._pool), "taken": self._pool.taken, "missed": self._pool.missed}

    # -- a container's --

    async def attach(self, request: NetworkRequest, known: Known | None) -> Prepared:
        """Everything or nothing. Raises as ``NetworkManager.prepare``."""
        if self._broken is not None:
            raise type(self._broken)(self._broken.message, hint=self._broken.hint, errno=self._broken.errno)
        container = request.container
        if container in self._held:
            raise Internal(f"container {container[:12]} has a place on the bridge already")
        mac = check_mac(request.mac) if request.mac else ""
        address = self._addresses.allocate(request.address)
        held = _Held(address, mac or mac_for(address), ())
        self._held[container] = held
        try:
            held.ports = self._ports.reserve(container, request.ports)
            endpoint = {
                "network": self.name, "ip": str(address), "prefix": self._addresses.subnet.prefixlen,
                "gateway": str(self._addresses.gateway), "mac": held.mac, "link": LINK,
                "ports": [port.as_dict() for port in held.ports]}
            if known is not None:
                known(endpoint)
            slot = await self._run(self._connect, container, held, request.namespace)
        except BaseException:
            await self.detach(container)
            raise
        finally:
            self._fill()
        slot.control.close()
        return Prepared(slot.fd, endpoint)

    def _connect(self, container: str, held: _Held, namespace: int) -> Slot:
        slot = self._plugged(container, held, namespace)
        try:
            if held.ports:
                self._firewall.add(container, Publication(held.address, held.ports))
                faults.point("network.ports.added")
                self._forget_flows(*(netlink.flush_udp_port(
                    port.host_port, None if port.host_ip == ANY else IPv4Address(port.host_ip))
                    for port in udp_ports(held.ports)))
        except BaseException as error:
            slot.close()
            if isinstance(error, OSError):
                raise as_error(error, f"cannot publish ports of container {container[:12]}") from error
            raise
        return slot

    def _plugged(self, container: str, held: _Held, namespace: int) -> Slot:
        """A slot on the bridge, with its address. A bridge that somebody has removed is made anew."""
        try:
            return self._plug(container, held, namespace)
        except OSError as error:
            if self._switch.host.link(index=self._switch.index) is not None:
                raise as_error(error, f"cannot join container {container[:12]} to {self._switch.name}") from error
        _log.warning("the bridge %s was removed: it is made anew", self._switch.name)
        try:
            self._switch.make(self._addresses.subnet, keep=True)
            others = [other for other, it in list(self._held.items()) if it.link and other != container]
            self._switch.sweep(others, remove=False)
            return self._plug(container, held, namespace)
        except OSError as error:
            raise as_error(error, f"cannot make the bridge {self._switch.name} anew") from error

    def _plug(self, container: str, held: _Held, namespace: int) -> Slot:
        try:
            slot = self._pool.take() if namespace < 0 else pool.make(
                self._switch.host, self._instance, self._switch.mtu, os.dup(namespace))
        except OSError as error:
            raise as_error(error, "cannot make a network namespace with a link") from error
        held.link = slot.host
        try:
            self._switch.plug(slot, container, held.address, self._addresses.subnet, held.mac, hairpin=bool(held.ports))
        except BaseException:
            slot.close()  # whatever half of it was done goes with it
            raise
        return slot

    def _forget_flows(self, *messages: bytes) -> None:
        if not messages:
            return
        try:
            self._conntrack.request(*messages)
        except OSError as error:
            _log.warning("UDP flows to ports that changed may go astray until they time out: conntrack: %s", error)

    async def detach(self, container: str) -> None:
        """The link is left to its namespace's end; when something holds that (a container that joined it), the link is
        removed after a while. The error of removing ports is raised when all else is done."""
        held = self._held.get(container)
        if held is None:
            return
        try:
            if held.ports:
                await self._run(self._unpublish, container, held)
        finally:
            if self._held.get(container) is held:
                del self._held[container]
                self._ports.release(container)
                self._addresses.release(held.address)
                if held.link:
                    self._gone[held.link] = container
                    self._reap_later()

    def _unpublish(self, container: str, held: _Held) -> None:
        self._firewall.remove(container)
        faults.point("network.ports.removed")
        if udp_ports(held.ports):
            self._forget_flows(netlink.flush_udp_to(held.address))

    def _reap_later(self) -> None:
        if self._reaping is None and not self._closing:
            self._reaping = asyncio.get_running_loop().call_later(_GRACE_SECONDS, self._reap)

    def _reap(self) -> None:
        self._reaping = None
        gone, self._gone = self._gone, {}
        self._task(self._reap_all(gone))

    async def _reap_all(self, gone: dict[int, str]) -> None:
        try:
            await self._run(self._switch.reap, gone)
        except OSError as error:
            _log.warning("cannot remove links of ended containers: %s", error)

    # -- what one sees --

    def describe(self) -> dict[str, Any]:
        """See Driver. Empty but for the driver's options before ``start``."""
        if self._broken is not None:
            return {}
        subnet = self._addresses.subnet
        return {
            "Created": self._row.get("created", ""),
            "IPAM": {"Driver": "default", "Options": None,
                     "Config": [{"Subnet": str(subnet), "Gateway": str(self._addresses.gateway)}]},
            "Containers": {container: {
                "Name": "", "EndpointID": hashlib.sha256(f"{self._instance}:{container}".encode()).hexdigest(),
                "MacAddress": held.mac,
                "IPv4Address": f"{held.address}/{subnet.prefixlen}", "IPv6Address": ""}
                for container, held in self._held.items()},
            "Options": {
                "com.docker.network.bridge.default_bridge": "true",
                "com.docker.network.bridge.enable_icc": "true",
                "com.docker.network.bridge.enable_ip_masquerade": "true",
                "com.docker.network.bridge.host_binding_ipv4": ANY,
                "com.docker.network.bridge.name": self._switch.name,
                "com.docker.network.driver.mtu": str(self._switch.mtu)}}

    async def close(self) -> None:
        """With live containers the bridge and the table stay, and go on working; with none, nothing is left."""
        self._closing = True
        if self._reaping is not None:
            self._reaping.cancel()
        while self._tasks:
            await asyncio.gather(*self._tasks)
        try:
            if self._made:
                await self._run(self._clear, keep=bool(self._held))
        except OSError as error:
            raise as_error(error, "cannot remove the bridge network") from error
        finally:
            self._ports.close()
            self._threads.shutdown(wait=False)

    async def _clear_quietly(self, *, keep: bool) -> None:
        try:
            if self._made:
                await self._run(self._clear, keep=keep)
        except (OSError, DoliumError) as error:
            _log.warning("what was made of the bridge network remains: %s", error)
        self._ports.close()
        self._held.clear()

    def _clear(self, *, keep: bool) -> None:
        self._made = False
        unused = self._pool.close()
        try:
            self._switch.reap([*self._gone, *unused], seconds=_GRACE_SECONDS)
            if not keep:
                self._switch.remove()
                self._firewall.delete()
        finally:
            self._switch.close()
            self._nft.close()
            self._conntrack.close()
