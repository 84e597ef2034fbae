"""``bridge``: the default network and those that users make; ``overlay``: one with a way to other hosts. A container has a
veth pair on a network's bridge, an address of its subnet, the bridge as its gateway, and published ports by nftables.

What is in use is kept here in memory, and rebuilt from the containers' records when a daemon starts; the database has
the networks alone. Blocking work runs in this driver's own threads.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any, TypeVar

from dolium import faults
from dolium.errors import AlreadyExists, DoliumError, FailedPrecondition, Internal, NotFound, Unimplemented
from dolium.network import ipv6, netlink, pool
from dolium.network.addresses import choose_subnet, choose_subnet6
from dolium.network.antispoof import Sources
from dolium.network.base import Endpoint, Place, PortBinding
from dolium.network.dns.across import Across
from dolium.network.dns.sandbox import open_sockets
from dolium.network.drivers.base import Others
from dolium.network.drivers.bridge_network import DEFAULT, BridgeNetwork, Held
from dolium.network.firewall import Firewall, Nft, udp_ports
from dolium.network.loopback import Loopback
from dolium.network.netlink import Netlink
from dolium.network.overlay import Overlay
from dolium.network.pool import LINK, Pool, Slot
from dolium.network.ports import ANY6, LOOPBACK6, Ports, Published, host_address
from dolium.network.records import Record
from dolium.network.switch import Switch, as_error, choosing, default_mtu, enable_forwarding, owner

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
faults.register("network.table.made", "network.ports.added", "network.ports.removed")
_THREADS = 4
_GRACE_SECONDS = 2.0
"""How long a released link may take to go with its namespace, before it is removed."""
PEERS_SECONDS = 2.0
"""Between looks at the files that name the hosts of overlays."""
FILL_PAUSE = 0.03
"""Seconds before a pool that is not empty is filled again: the start that took from it does not share the processor, the
interpreter and the rtnl lock with that work."""


class BridgeDriver:
    """``warnings``: what an administrator should know, a sentence each; set by ``start``. ``settled`` is told the default
    network's record when its subnet is known, before anything of it is made, and which kinds of forwarding were turned on
    (IPv4, IPv6), then and later."""

    name, publishes, late = "bridge", True, False

    def __init__(self, instance: str, settled: Callable[[Record, bool, bool], None],
                 others: Others, across: Callable[[str, Across | None], None], *,
                 run_dir: str, pool_size: int = pool.SIZE) -> None:
        """``others``: the subnets of networks of other drivers; ``across`` is told how an overlay's other hosts are asked
        for names, by the network's id, whenever that changes; ``run_dir``: as of ``Networks``."""
        self._instance, self._settled, self._others, self._pool_size = instance, settled, others, pool_size
        self._across, self._asked_across = across, dict[str, Across]()
        self._ports = Ports()
        self._loopback = Loopback(f"dolium-{instance}", run_dir)
        self._networks: dict[str, BridgeNetwork] = {}
        self._gone: dict[int, str] = {}
        self._reaping: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._threads = ThreadPoolExecutor(_THREADS, "network")
        self._filling = self._closing = self._made = False
        self._mtu = 1500
        self._broken: DoliumError | None = Internal("the bridge network was not started")
        self._changing = asyncio.Lock()  # one network is made or removed at a time
        self.warnings: list[str] = []
        self._conntrack: Netlink
        self._host: Netlink
        self._firewall: Firewall
        self._nft: Nft
        self._pool: Pool
        self._named: Pool  # with sockets for the name server; filled once there is a network with names
        self._sockets: dict[str, tuple[socket.socket, ...]] = {}
        self._claimed: dict[str, Slot] = {}

    async def _run(self, work: Callable[..., _T], *arguments: Any, **named: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, functools.partial(work, *arguments, **named))

    # -- start --

    async def start(self, records: Sequence[Record], live: dict[str, list[Endpoint]]) -> None:
        """``records`` has the default network's too. A host that cannot have a bridge (no privilege, no nftables) has the
        other networks all the same: the reason is logged, and is every ``reserve``'s error."""
        try:
            await self._start(records, live)
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
        self._watch()
        self._fill()

    async def _start(self, records: Sequence[Record], live: dict[str, list[Endpoint]]) -> None:
        self._nft = await self._run(Nft)
        self._conntrack, self._host = Netlink(netlink.NETLINK_NETFILTER), Netlink()
        self._firewall = Firewall(self._instance, self._nft)
        self._mtu = await self._run(default_mtu, self._host)
        self._pool = Pool(lambda: pool.make(self._host, self._instance, self._mtu), self._pool_size)
        self._named = Pool(self._make_named, self._pool_size)
        self._made = True
        self._networks = {record.name: BridgeNetwork(record, self._switch(record)) for record in records}
        default = self._networks[DEFAULT]
        used = {endpoint["network"] for found in live.values() for endpoint in found}
        lock = choosing()
        await self._run(lock.__enter__)
        try:
            stored = IPv4Network(default.record.subnet) if default.record.subnet else None
            others = [IPv4Network(record.subnet) for record in records if record.subnet and record.name != DEFAULT]
            subnet = await self._run(default.switch.plan, stored, others, keep=DEFAULT in used)
            forwarding = await self._run(enable_forwarding)
            forwarding6 = any(map(_routed6, records)) and await self._run(ipv6.enable_forwarding, self._host)
            subnet6 = await self._run(self._default_subnet6, default.record, records)
            default.settle(replace(default.record, subnet=str(subnet), subnet6=subnet6))
            self._settled(default.record, forwarding, forwarding6)
            await self._run(default.switch.make, subnet, default.addresses.gateway, keep=DEFAULT in used,
                            six=default.six)
            default.broken = None
        finally:
            await self._run(lock.__exit__, None, None, None)
        for network in self._networks.values():
            if not network.default:
                await self._resume(network)
        await self._adopt(live)
        if not self._loopback.asked:
            await self._loopback.unwanted()
        await self._run(self._firewall.replace, self._rules(), {
            container: held.publication for network in self._networks.values()
            for container, held in network.held.items() if held.ports})
        faults.point("network.table.made")
        self.warnings = [_drops(chain, default.switch.name) for chain in await self._run(self._firewall.foreign_drops)]

    def _switch(self, record: Record) -> Switch:
        if record.name == DEFAULT:
            return Switch(self._instance, self._host, mtu=self._mtu)
        if record.driver == "overlay":
            return Overlay(self._instance, self._host, record, self._mtu)
        return Switch(self._instance, self._host, record.short, record.link, record.mtu or self._mtu)

    def _rules(self) -> list[Any]:
        rules = [network.rule() for network in self._networks.values() if network.broken is None]
        if any(one.subnet6 is not None for one in rules):
            self._firewall.relay = self._loopback.port
        return rules

    async def _resume(self, network: BridgeNetwork) -> None:
        """A user's network, which an earlier daemon has made. One that cannot be is named in the log; the rest works."""
        try:
            network.settle(network.record)
            await self._run(network.switch.make, network.subnet, network.addresses.gateway, keep=True, six=network.six)
            network.broken = None
        except OSError as error:
            network.broken = as_error(error, f"cannot make the network {network.record.name}")
        except DoliumError as error:
            network.broken = error
        if network.broken is not None:
            _log.error("network %s: %s", network.record.name, network.broken)
        self._tell(network)

    def _tell(self, network: BridgeNetwork) -> None:
        """Who has an overlay's names, when that is not what was said last."""
        now = network.switch.across if isinstance(network.switch, Overlay) else None
        if now != self._asked_across.get(network.record.id):
            self._across(network.record.id, now)
            if now is None:
                del self._asked_across[network.record.id]
            else:
                self._asked_across[network.record.id] = now

    async def _adopt(self, live: dict[str, list[Endpoint]]) -> None:
        """What live containers have is theirs; every other link of the instance goes."""
        kept = {index for network in self._networks.values() for index in network.switch.indices}
        for name, network in self._networks.items():
            mine = {container: next(one for one in found if one["network"] == name)
                    for container, found in live.items() if any(one["network"] == name for one in found)}
            if network.broken is not None:
                continue
            links = await self._run(network.switch.sweep, mine)
            kept.update(links.values())
            for container, endpoint in mine.items():
                self._adopt_one(network, container, endpoint, links.get(container, 0))
        await self._run(self._sweep, kept)

    def _sweep(self, kept: set[int]) -> None:
        default = self._networks[DEFAULT].switch
        broken = {network.record.short for network in self._networks.values() if network.broken is not None}
        for link in self._host.links():
            found = owner(self._instance, link)
            # what belongs to a network that could not be resumed is left alone
            if found is not None and link.index not in kept and found[1] not in broken:
                default.delete(link.index)

    def _adopt_one(self, network: BridgeNetwork, container: str, endpoint: Endpoint, link: int) -> None:
        try:
            ports = tuple(Published.from_dict(doc) for doc in endpoint.get("ports") or [])
            held = Held(IPv4Address(endpoint["ip"]), str(endpoint["mac"]), ports, link,
                        IPv6Address(endpoint["ip6"]) if endpoint.get("ip6") else None)
        except (KeyError, ValueError) as error:
            _log.error("the record of container %s has no endpoint one can read: %r", container[:12], error)
            return
        wrong = network.adopt(held)
        if wrong:
            _log.warning("the address %s of container %s is not of %s, or another's too", wrong, container[:12],
                         network.record.name)
        if ports:
            self._ports.adopt(container, ports)
            self._relay(ports)
        network.held[container] = held

    def _relay(self, ports: Iterable[Published]) -> None:
        """What leads from ::1 to a container needs a relay."""
        if any(port.protocol == "tcp" and port.host_ip in (ANY6, LOOPBACK6) for port in ports):
            self._loopback.wanted()

    # -- the pool --

    def _fill(self) -> None:
        if not self._filling and not self._closing:
            self._filling = True
            self._task(self._fill_all())

    async def _fill_all(self) -> None:
        try:
            if len(self._pool):
                await asyncio.sleep(FILL_PAUSE)
            while not self._closing and (await self._run(self._pool.fill) or (
                    len(self._networks) > 1 and await self._run(self._named.fill))):
                continue
            if len(self._networks) == 1:  # the last one was removed meanwhile
                self._gone |= dict.fromkeys(self._named.drain(), "")
        except (OSError, RuntimeError) as error:
            # no fd, no memory, no thread: a start that finds the pool empty makes its own, and its caller is told
            _log.warning("cannot prepare network namespaces: %s", error)
        finally:
            self._filling = False

    def _make_named(self) -> Slot:
        slot = pool.make(self._host, self._instance, self._mtu)
        try:
            slot.sockets = open_sockets(slot.fd, fresh=True)
        except BaseException:
            slot.close()
            raise
        return slot

    def claim(self, container: str, endpoint: Endpoint) -> int:
        """A prepared namespace that ``make`` will take for it, with the name server's sockets in it: its fd, which stays
        this driver's; -1 when there is none."""
        slot = None if self._network(endpoint["network"]).default else self._named.take_ready()
        if slot is None:
            return -1
        self._claimed[container] = slot
        self._sockets[container], slot.sockets = slot.sockets, ()
        return slot.fd

    def take_sockets(self, container: str) -> tuple[socket.socket, ...]:
        """The name server's sockets in a container's namespace, when that was prepared with them; once."""
        return self._sockets.pop(container, ())

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

    def _network(self, name: str) -> BridgeNetwork:
        if self._broken is not None:
            raise type(self._broken)(self._broken.message, hint=self._broken.hint, errno=self._broken.errno)
        if name not in self._networks:
            raise NotFound(f"network {name} not found")
        return self._networks[name]

    def reserve(self, container: str, place: Place) -> Endpoint:
        """See Driver."""
        return self._network(place.network).reserve(container, place)

    def publish(self, container: str, endpoint: Endpoint, ports: Sequence[PortBinding]) -> None:
        """See Driver."""
        network = self._network(endpoint["network"])
        host_ip = network.record.host_ip
        wanted = [replace(port, host_ip=port.host_ip or host_ip) for port in ports] if host_ip else ports
        held = network.held[container]
        for port in wanted:
            _check_six(network, held, port)
        held.ports = (*held.ports, *self._ports.reserve(container, wanted, six=held.address6 is not None))
        self._relay(held.ports)
        endpoint["ports"] = [port.as_dict() for port in held.ports]

    async def make(self, container: str, endpoint: Endpoint, namespace: int) -> int:
        """See Driver."""
        network = self._network(endpoint["network"])
        try:
            slot = await self._run(self._connect, network, container, endpoint, namespace, default=True, default6=True)
        finally:
            self._fill()
            self._tell(network)
        slot.control.close()
        if slot.sockets:
            self._sockets[container] = slot.sockets
        return slot.fd

    async def join(self, container: str, endpoint: Endpoint, namespace: int, *, default: bool, default6: bool) -> None:
        """See Driver."""
        network = self._network(endpoint["network"])
        slot = await self._run(self._connect, network, container, endpoint, namespace, default=default, default6=default6)
        self._tell(network)
        slot.close()

    def _connect(self, network: BridgeNetwork, container: str, endpoint: Endpoint, namespace: int, *, default: bool,
                 default6: bool) -> Slot:
        slot = self._plugged(network, container, endpoint, namespace, default, default6)
        try:
            self._open(network, container)
        except BaseException:
            slot.close()
            raise
        return slot

    def _open(self, network: BridgeNetwork, container: str) -> None:
        """Its ports, in the firewall."""
        held = network.held[container]
        if not held.ports:
            return
        try:
            new = self._firewall.add(container, held.publication)
            faults.point("network.ports.added")
            self._forget_flows(*map(_flows_to, udp_ports(new)))
        except OSError as error:
            raise as_error(error, f"cannot publish ports of container {container[:12]}") from error

    async def expose(self, container: str, endpoint: Endpoint) -> None:
        """See Driver."""
        network = self._network(endpoint["network"])
        held = network.held[container]

        def work() -> None:
            if held.link:
                self._host.request(netlink.set_hairpin(held.link))
            self._open(network, container)

        await self._run(work)

    async def withdraw(self, container: str, endpoint: Endpoint, ports: Sequence[Published]) -> None:
        """See Driver."""
        network = self._network(endpoint["network"])
        held = network.held[container]

        def work() -> None:
            self._firewall.remove(container, ports)
            faults.point("network.ports.removed")
            self._forget_flows(*map(_flows_to, udp_ports(ports)))

        await self._run(work)
        self._ports.withdraw(container, ports)
        held.ports = tuple(port for port in held.ports if port not in ports)
        endpoint["ports"] = [port.as_dict() for port in held.ports]

    def _plugged(self, network: BridgeNetwork, container: str, endpoint: Endpoint, namespace: int, default: bool,
                 default6: bool) -> Slot:
        """A slot on the bridge, with its address. A bridge that somebody has removed is made anew."""
        switch = network.switch
        try:
            return self._plug(network, container, endpoint, namespace, default, default6)
        except OSError as error:
            if self._host.link(index=switch.index) is not None:
                raise as_error(error, f"cannot join container {container[:12]} to {switch.name}") from error
        _log.warning("the bridge %s was removed: it is made anew", switch.name)
        try:
            switch.make(network.subnet, network.addresses.gateway, keep=True, six=network.six)
            switch.sweep([other for other, it in list(network.held.items()) if it.link and other != container])
            return self._plug(network, container, endpoint, namespace, default, default6)
        except OSError as error:
            raise as_error(error, f"cannot make the bridge {switch.name} anew") from error

    def _plug(self, network: BridgeNetwork, container: str, endpoint: Endpoint, namespace: int, default: bool,
              default6: bool) -> Slot:
        held, switch = network.held[container], network.switch
        six = network.six_of(held, default=default6)
        try:
            slot = self._claimed.pop(container, None) if namespace < 0 else pool.make(
                self._host, self._instance, switch.mtu, os.dup(namespace), endpoint["link"])
            if slot is None:
                slot = (self._pool if network.default else self._named).take()
        except OSError as error:
            raise as_error(error, "cannot make a network namespace with a link") from error
        held.link = slot.host
        try:
            if namespace < 0 and endpoint["link"] != LINK:
                slot.control.request(netlink.set_link(slot.inside, name=endpoint["link"]))
            if six is not None:
                ipv6.enable_inside(slot.fd, endpoint["link"])
            switch.plug(slot, container, held.address, network.subnet, held.mac,
                        gateway=IPv4Address(endpoint["gateway"]) if default and endpoint["gateway"] else None,
                        hairpin=bool(held.ports), alone=not network.record.talk,
                        mtu=switch.mtu if switch.mtu != self._mtu else 0, bandwidth=endpoint.get("bandwidth") or (0, 0),
                        six=six)
        except BaseException:
            # whatever half of it was done goes with it; in a namespace that lives, it is taken away
            slot.close()
            if namespace >= 0:
                switch.delete(slot.host)
            raise
        return slot

    def _forget_flows(self, *messages: bytes) -> None:
        if not messages:
            return
        try:
            self._conntrack.request(*messages)
        except OSError as error:
            _log.warning("UDP flows to ports that changed may go astray until they time out: conntrack: %s", error)

    async def leave(self, container: str, endpoint: Endpoint, namespace: int) -> None:
        """See Driver. The link goes at once."""
        network = self._networks.get(endpoint["network"])
        held = network.held.get(container) if network is not None else None
        if network is None or held is None:
            return
        link, held.link = held.link, 0
        try:
            if link:
                await self._run(network.switch.delete, link)
        except OSError as error:
            held.link = link
            raise as_error(error, f"cannot take container {container[:12]} out of {network.record.name}") from error
        await self.release(container, endpoint)

    async def release(self, container: str, endpoint: Endpoint) -> None:
        """The link is left to its namespace's end; when something holds that (a container that joined it), the link is
        removed after a while. The error of removing ports is raised when all else is done."""
        for sock in self.take_sockets(container):
            sock.close()
        slot = self._claimed.pop(container, None)
        if slot is not None:  # it never came to be made
            slot.close()
        network = self._networks.get(endpoint["network"])
        held = network.held.get(container) if network is not None else None
        if network is None or held is None:
            return
        try:
            if held.ports:
                await self._run(self._unpublish, container, held)
        finally:
            if network.held.get(container) is held:
                del network.held[container]
                if held.ports:
                    self._ports.release(container)
                network.give_back(held)
                if held.link:
                    self._gone[held.link] = container
                    self._reap_later()

    def _unpublish(self, container: str, held: Held) -> None:
        self._firewall.remove(container)
        faults.point("network.ports.removed")
        if udp_ports(held.ports):
            self._forget_flows(*(netlink.flush_udp_to(address) for address in (held.address, held.address6) if address))

    def _reap_later(self) -> None:
        if self._reaping is None and not self._closing:
            self._reaping = asyncio.get_running_loop().call_later(_GRACE_SECONDS, self._reap)

    def _reap(self) -> None:
        self._reaping = None
        gone, self._gone = self._gone, {}
        self._task(self._reap_all(gone))

    async def _reap_all(self, gone: dict[int, str]) -> None:
        try:
            await self._run(self._networks[DEFAULT].switch.reap, gone)
        except OSError as error:
            _log.warning("cannot remove links of ended containers: %s", error)

    # -- networks --

    async def create(self, record: Record) -> Record:
        """See Driver. What a killed daemon leaves of one that has no record goes at the next start."""
        self._network(DEFAULT)
        async with self._changing:
            lock = choosing()
            await self._run(lock.__enter__)
            try:
                record = await self._run(self._with_subnets, record)
                if _routed6(record) and await self._run(ipv6.enable_forwarding, self._host):
                    self._settled(self._networks[DEFAULT].record, False, True)
                network = BridgeNetwork(record, self._switch(record))
                network.settle(record)
                await self._make(network)
                if network.six is not None:
                    await self._warn_of(network)
            finally:
                await self._run(lock.__exit__, None, None, None)
        self._tell(network)
        return record

    async def _warn_of(self, network: BridgeNetwork) -> None:
        """Chains that drop IPv6 do not matter before there is a network with it."""
        for chain in await self._run(self._firewall.foreign_drops):
            if chain.startswith("ip6 ") and not any(f" {chain} " in warning for warning in self.warnings):
                self.warnings.append(_drops(chain, network.switch.name))
                _log.warning("%s", self.warnings[-1])

    def subnets(self) -> list[IPv4Network]:
        """Of all its networks that can be used."""
        return [network.subnet for network in self._networks.values() if network.broken is None]

    def subnets6(self) -> list[IPv6Network]:
        """As ``subnets``."""
        return [network.addresses6.subnet for network in self._networks.values() if network.addresses6 is not None]

    def _with_subnets(self, record: Record) -> Record:
        """Raises Unimplemented, FailedPrecondition without IPv6, ResourceExhausted, AlreadyExists in Docker's words."""
        record = self._with_subnet(record)
        if not record.ipv6:
            return record
        ipv6.check(record.name, self._switch(record).mtu)
        mine = [*self._others.subnets6(), *self.subnets6()]
        if not record.subnet6:
            routes = [route.network for route in self._host.routes6()]
            return replace(record, subnet6=str(choose_subnet6(self._instance, [*routes, *mine])))
        if any(IPv6Network(record.subnet6).overlaps(other) for other in mine):
            raise AlreadyExists(f"network {record.name}: {record.subnet6}: Pool overlaps with other one on this address "
                                "space")
        return record

    def _default_subnet6(self, default: Record, records: Sequence[Record]) -> str:
        """"" without IPv6. Raises Unimplemented, FailedPrecondition, ResourceExhausted."""
        if not default.ipv6:
            return ""
        ipv6.check(DEFAULT, self._mtu)
        others = [IPv6Network(one.subnet6) for one in records if one.ipv6 and one.name != DEFAULT] + self._others.subnets6()
        if not default.subnet6:
            return str(choose_subnet6(self._instance, [*(route.network for route in self._host.routes6()), *others]))
        if any(IPv6Network(default.subnet6).overlaps(other) for other in others):
            raise FailedPrecondition(f"the default network's {default.subnet6} overlaps with that of another network",
                                     hint="another fixed-cidr-v6 in daemon.json")
        return default.subnet6

    def _with_subnet(self, record: Record) -> Record:
        """Raises ResourceExhausted, AlreadyExists in Docker's words."""
        mine = [*self._others.subnets(), *self.subnets()]
        if not record.subnet:
            routes = [route.network for route in self._host.routes() if route.network.prefixlen]
            return replace(record, subnet=str(choose_subnet([*routes, *mine])))
        if any(IPv4Network(record.subnet).overlaps(other) for other in mine):
            raise AlreadyExists(f"network {record.name}: {record.subnet}: Pool overlaps with other one on this address "
                                "space")
        return record

    async def _make(self, network: BridgeNetwork) -> None:
        name = network.record.name
        self._networks[name] = network
        try:
            await self._run(network.switch.make, network.subnet, network.addresses.gateway, keep=True, six=network.six)
            network.broken = None
            await self._run(self._firewall.replace, self._rules())
            self._watch()
            self._fill()
        except BaseException as error:
            del self._networks[name]
            try:
                await self._run(network.switch.remove)
                if network.broken is None:
                    await self._run(self._firewall.replace, self._rules())
            except (OSError, DoliumError) as failure:
                _log.warning("what was made of the network %s remains until the next start: %s", name, failure)
            if isinstance(error, OSError):
                raise as_error(error, f"cannot make the network {name}") from error
            raise

    def _watched(self) -> list[BridgeNetwork]:
        return [network for network in self._networks.values()
                if isinstance(network.switch, Overlay) and network.switch.peers_file and network.broken is None]

    def _watch(self) -> None:
        """Begin to look at the files with overlays' hosts: they may be on a file system that tells nobody of changes."""
        if self._watcher is None and self._watched():
            self._watcher = asyncio.get_running_loop().create_task(self._watch_files())

    async def _watch_files(self) -> None:
        while networks := self._watched():
            await asyncio.sleep(PEERS_SECONDS)
            for network in networks:
                try:
                    if network in self._watched() and isinstance(network.switch, Overlay):
                        await self._run(network.switch.sync)
                        self._tell(network)
                except OSError as error:
                    _log.warning("network %s: its hosts cannot be told: %s", network.record.name, error)
        self._watcher = None

    async def remove(self, name: str) -> None:
        """See Driver. No container comes in any more from the moment this is asked for."""
        async with self._changing:
            network = self._network(name)
            if network.held:
                raise FailedPrecondition(f"network {name} has active endpoints")
            del self._networks[name]
            try:
                if network.broken is None:
                    await self._run(self._firewall.replace, self._rules())
                await self._run(network.switch.remove)
                if len(self._networks) == 1:
                    self._gone |= dict.fromkeys(self._named.drain(), "")
                    self._reap_later()
            except OSError as error:
                self._networks[name] = network
                raise as_error(error, f"cannot remove the network {name}") from error
        self._tell(network)

    def describe(self, name: str) -> dict[str, Any]:
        """See Driver. Empty before ``start``."""
        network = self._networks.get(name)
        return network.describe(self._instance) if network is not None and self._broken is None else {}

    def sources(self, name: str) -> Sources | None:
        """See Driver."""
        network = self._networks.get(name)
        if network is None:
            return None
        uplinks = (network.switch.wire,) if isinstance(network.switch, Overlay) else ()
        return Sources({container: network.switch.link_name(container) for container in network.held}, uplinks)

    # -- the end --

    async def close(self) -> None:
        """With live containers the bridges and the table stay, and go on working; with none, nothing is left."""
        self._closing = True
        if self._reaping is not None:
            self._reaping.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait([self._watcher])
        while self._tasks:
            await asyncio.gather(*self._tasks)
        try:
            if self._made:
                keep = any(network.held for network in self._networks.values())
                await self._loopback.close(keep=keep)
                await self._run(self._clear, keep=keep)
        except OSError as error:
            raise as_error(error, "cannot remove the bridge network") from error
        finally:
            self._ports.close()
            self._threads.shutdown(wait=False)

    async def _clear_quietly(self, *, keep: bool) -> None:
        try:
            if self._made:
                await self._loopback.close(keep=keep)
                await self._run(self._clear, keep=keep)
        except (OSError, DoliumError) as error:
            _log.warning("what was made of the bridge network remains: %s", error)
        self._ports.close()
        for network in self._networks.values():
            network.held.clear()

    def _clear(self, *, keep: bool) -> None:
        self._made = False
        unused = [*self._pool.close(), *self._named.close()]
        try:
            self._networks[DEFAULT].switch.reap([*self._gone, *unused], seconds=_GRACE_SECONDS)
            if not keep:
                for network in self._networks.values():
                    network.switch.remove()
                self._firewall.delete()
        finally:
            self._host.close()
            self._nft.close()
            self._conntrack.close()


def _drops(chain: str, bridge: str) -> str:
    return (f"the chain {chain} drops forwarded packets by policy: containers have no network beyond the host "
            f"(let {bridge} pass in it, or set its policy to accept)")


def _routed6(record: Record) -> bool:
    """Does the host forward IPv6 for it?"""
    return record.ipv6 and not record.internal


def _check_six(network: BridgeNetwork, held: Held, port: PortBinding) -> None:
    """Can it be published at that IPv6 address of the host? Raises InvalidArgument, FailedPrecondition, Unimplemented."""
    if ":" not in port.host_ip:
        return
    address = host_address(port.host_ip)
    if held.address6 is None:
        raise FailedPrecondition(f"cannot publish at [{address}]: the container has no IPv6 address, since the network "
                                 f"{network.record.name} has no IPv6", hint="make one by network create --ipv6")
    if address.is_loopback and port.protocol == "udp":
        raise Unimplemented("cannot publish UDP at [::1]: the kernel lets no answer through to it",
                            hint="publish at 127.0.0.1")


def _flows_to(port: Published) -> bytes:
    """The request that forgets the UDP flows to a port of the host."""
    return netlink.flush_udp_port(port.host_port, ip_address(port.host_ip))
