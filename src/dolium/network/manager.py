"""All networks of an instance: the engine's ``NetworkManager``, over one driver per kind of network."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import secrets
import socket
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from dolium import faults
from dolium.errors import AlreadyExists, DoliumError, FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from dolium.network import pool
from dolium.network.antispoof import Sources
from dolium.network.base import (
    Endpoint,
    Known,
    NetworkRequest,
    Peer,
    Place,
    PortBinding,
    Prepared,
    Refused,
    endpoints,
    named,
)
from dolium.network.dns.across import Across
from dolium.network.dns.client import Known as NameServerKnown
from dolium.network.dns.client import NameServer
from dolium.network.dns.outside import Outside
from dolium.network.drivers.base import Driver, Others, Rows
from dolium.network.drivers.bridge import BridgeDriver
from dolium.network.drivers.bridge_network import DEFAULT
from dolium.network.drivers.cni import CniDriver
from dolium.network.drivers.none import NoneDriver
from dolium.network.drivers.shared_link import SharedLinkDriver
from dolium.network.local import default_route
from dolium.network.policies import Policies, restricted
from dolium.network.ports import Published
from dolium.network.records import MODES, PREDEFINED, VERSION, Record, wished
from dolium.network.switch import as_error

_log = logging.getLogger(__name__)
_INSTANCE = re.compile(r"[0-9a-f]{8}")
_CONTAINER = re.compile(r"[0-9a-f]{12,64}")
_TABLE = "networks"
_OF_ALL = ("servers", "egress", "ingress")
"""Keys of the first endpoint that are of the container, not of that network."""
faults.register("network.record.put", "network.record.deleted")


class Networks:
    """Implements ``dolium.network.base.NetworkManager``. All methods are called on one event loop."""

    def __init__(self, instance: str, store: Rows, *, run_dir: str, pool_size: int = pool.SIZE,
                 default6: str | None = None) -> None:
        """``instance``: 8 hex digits, in the name of every kernel object; ``run_dir``: the instance's folder for what
        does not outlive a boot: the name server's socket and log; ``default6``: as ``records.default_subnet6``."""
        if not _INSTANCE.fullmatch(instance):
            raise ValueError(f"an instance is 8 hex digits, not {instance!r}")
        self.instance, self.run_dir = instance, run_dir
        self._store, self._default6 = store, default6
        self._dns = NameServer(run_dir, instance)
        self._bridge = BridgeDriver(instance, self._settled, self._subnets_but("bridge"),
                                    self._set_across,
                                    run_dir=run_dir, pool_size=pool_size)
        self._none = NoneDriver()
        self._drivers: dict[str, Driver] = {"none": self._none, "bridge": self._bridge, "overlay": self._bridge,
                                           "cni": CniDriver(run_dir)}
        for kind in MODES:
            self._drivers[kind] = SharedLinkDriver(kind, instance, self._subnets_but(kind))
        self.on_refused: Callable[[str, Refused], None] = lambda container, refused: None
        self.peer_of: Callable[[str], Peer] = lambda container: Peer()
        self._policies = Policies(instance, self._sources, lambda container: self.peer_of(container),
                                  lambda container, refused: self.on_refused(container, refused))
        self._row: dict[str, Any] = {}
        self._records: dict[str, Record] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    def _set_across(self, network: str, across: Across | None) -> None:
        self._dns.set_across(network, across)
        self._task(self._dns.tell_across(network))

    def _subnets_but(self, name: str) -> Others:
        """Of the networks of all drivers but one."""
        def others() -> list[Driver]:
            return [driver for driver in set(self._drivers.values()) if driver.name != name]

        return Others(lambda: [subnet for driver in others() for subnet in driver.subnets()],
                      lambda: [subnet for driver in others() for subnet in driver.subnets6()])

    def _sources(self, name: str) -> Sources | None:
        return self._drivers[self._records[name].driver if name in self._records else "bridge"].sources(name)

    @property
    def warnings(self) -> list[str]:
        """What an administrator should know (a foreign chain that drops all forwarded packets); after ``start``."""
        return list(self._bridge.warnings)

    def pool_figures(self) -> dict[str, int]:
        """``ready``, ``taken``, ``missed``: the pool of prepared namespaces, for memory figures and tests."""
        return self._bridge.pool_figures()

    def identity(self, name: str) -> str:
        """The id of a network that is always there."""
        return hashlib.sha256(f"{self.instance}:{name}".encode()).hexdigest()

    # -- start --

    async def start(self, live: dict[str, Endpoint], namespace_of: Callable[[str], int] | None = None) -> None:
        """See NetworkManager. Endpoints of networks that are not ours (host, another container's) are passed over."""
        rows = {row["name"]: row for row in self._store.rows(_TABLE)}
        self._row = rows.pop(DEFAULT, {})
        self._records = {}
        for name, row in rows.items():
            try:
                self._records[name] = Record.from_doc(row)
            except (KeyError, TypeError) as error:
                _log.error("the record of network %s cannot be read: %r", name, error)
        stored6 = self._row.get("subnet6", "")
        default = Record(DEFAULT, self.identity(DEFAULT), created=self._row.get("created") or _now(),
                         subnet=self._row.get("subnet", ""), ipv6=self._default6 is not None,
                         subnet6=self._default6 or (stored6 if self._default6 is not None else ""))
        on_it = any(one["network"] == DEFAULT for first in live.values() for one in endpoints(first) if one.get("network"))
        if on_it and (default.ipv6, default.subnet6) != (bool(stored6), stored6):
            _log.warning("the default network's IPv6 stays as it was (%s) until a daemon starts without a container on it",
                         stored6 or "none")
            default = replace(default, ipv6=bool(stored6), subnet6=stored6)
        for driver in dict.fromkeys(self._drivers.values()):
            mine = {container: [one for one in endpoints(first) if self._driver_of(one) is driver]
                    for container, first in live.items()}
            records = [record for record in (default, *self._records.values()) if self._drivers[record.driver] is driver]
            await driver.start(records, {container: found for container, found in mine.items() if found})
        known = {}
        for container, first in live.items():
            if named(first) and namespace_of is not None:
                try:
                    known[container] = self._known(first, namespace_of(container))
                except OSError as error:
                    _log.warning("container %s has no name server: %s", container[:12], error)
        await self._policies.start(live, namespace_of)
        await self._dns.adopt(known)
        if self._records and not known:
            self._task(self._dns.prepare())

    def _settled(self, record: Record, forwarding: bool, forwarding6: bool) -> None:
        row = {"version": VERSION, "name": DEFAULT, "subnet": record.subnet, "subnet6": record.subnet6,
               "created": record.created,
               "forwarding_set": forwarding or bool(self._row.get("forwarding_set")),
               "forwarding6_set": forwarding6 or bool(self._row.get("forwarding6_set"))}
        if row != self._row:
            self._store.put_row(_TABLE, DEFAULT, row)
            self._row = row
        faults.point("network.record.put")

    def _driver_of(self, endpoint: Endpoint) -> Driver | None:
        name = str(endpoint.get("network") or "")
        if name == "none":
            return self._none
        if name == DEFAULT:
            return self._bridge
        record = self._records.get(name)
        return self._drivers[record.driver] if record is not None and endpoint.get("network_id") else None

    # -- a container's --

    async def prepare(self, request: NetworkRequest, known: Known | None = None) -> Prepared:
        """See NetworkManager. A caller that is cancelled leaves nothing behind either."""
        if not _CONTAINER.fullmatch(request.container):
            raise InvalidArgument(f"invalid container id: {request.container!r}")
        task = self._task(self._prepare(request, known))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._task(self._undo(request.container, task))
            raise

    async def _prepare(self, request: NetworkRequest, known: Known | None) -> Prepared:
        container = request.container
        found: list[Endpoint] = []
        try:
            for place in (Place(request.mode, request.address, request.mac, request.names, address6=request.address6),
                          *request.others):
                found.append(self._reserve(container, replace(place, bandwidth=request.bandwidth)))
            # what has a way out comes first: it has the default route, and the ports
            found.sort(key=lambda endpoint: not endpoint["gateway"])
            first, *others = found
            for endpoint in found:
                endpoint["link"] = self._link_name(endpoint, found)
            driver = self._must(first)
            if first["gateway"]:
                driver.publish(container, first, request.ports)
            if others:
                first["others"] = others
            if request.egress is not None:
                first["egress"] = list(request.egress)
            if request.ingress is not None:
                first["ingress"] = list(request.ingress)
            if request.servers is not None and named(first):
                first["servers"] = list(request.servers)
            if request.own_stack and named(first):
                if driver is not self._bridge or not first["gateway"]:
                    raise FailedPrecondition(f"network {first['network']} is not a bridge, or internal: who has a network "
                                             "stack of its own (isolation gvisor) finds no name server there",
                                             hint="isolation process does")
                first["name_server"] = first["gateway"]
            if known is not None and not any(self._must(endpoint).late for endpoint in found):
                known(first)
            await self._policies.placed(container, found)
            naming = self._name_early(container, first, driver, request.namespace)
            try:
                fd = await driver.make(container, first, request.namespace)
            except BaseException:
                await self._unname(container, naming)
                raise
            way6 = _way6(found)
            try:
                for endpoint in others:
                    await self._must(endpoint).join(container, endpoint, fd, default=False, default6=endpoint is way6)
                if any(self._must(endpoint).late for endpoint in found):
                    await self._policies.placed(container, found)
                if restricted(first):
                    await self._policies.enter(container, first, fd)
                if naming is not None:
                    await naming
                elif named(first):
                    await self._attach_names(container, first, fd, fresh=True)
            except BaseException:
                await self._unname(container, naming)
                os.close(fd)
                raise
        except BaseException:
            await self._policies.leave(container)
            for endpoint in found:
                await self._must(endpoint).release(container, endpoint)
            raise
        return Prepared(fd, first)

    def _reserve(self, container: str, place: Place) -> Endpoint:
        name = self._name(place.network)
        if name == "host":
            raise PermissionDenied("container cannot be connected to multiple networks with one of the networks in host "
                                   "mode")
        driver: Driver = self._none if name == "none" else self._drivers[
            self._records[name].driver if name in self._records else "bridge"]
        if place.address6 and not (name in self._records and self._records[name].ipv6):
            raise InvalidArgument(f"network {name} has no IPv6: a container has no address {place.address6} there",
                                  hint="make one by network create --ipv6")
        endpoint = driver.reserve(container, replace(place, network=name))
        if name not in PREDEFINED:
            endpoint["names"] = list(place.names)
        if any(place.bandwidth):
            endpoint["bandwidth"] = list(place.bandwidth)
        return endpoint

    # -- names --

    def _known(self, first: Endpoint, namespace: int, *, fresh: bool = False,
               sockets: Sequence[socket.socket] = ()) -> NameServerKnown:
        found = endpoints(first)
        return NameServerKnown(namespace, first.get("servers"), {
            endpoint["network_id"]: (endpoint["network"], endpoint["names"], endpoint["ip"], endpoint.get("ip6", ""))
            for endpoint in found if "names" in endpoint}, any(endpoint["gateway"] for endpoint in found), fresh, sockets,
            egress=first.get("egress"), outside=Outside(first["ip"], first["name_server"], first.get("name_port", 0))
            if first.get("name_server") else None)

    def _attach_names(self, container: str, first: Endpoint, namespace: int, *, fresh: bool) -> Coroutine[Any, Any, None]:
        """The namespace's fd is needed no longer than this call."""
        what = f"cannot give container {container[:12]} a name server"
        prepared = self._bridge.take_sockets(container)
        if first.get("name_server"):
            for sock in prepared:
                sock.close()
            prepared = ()
        try:
            known = self._known(first, os.dup(namespace), fresh=fresh, sockets=prepared)
        except OSError as error:
            raise as_error(error, what) from error

        async def attach() -> None:
            try:
                await self._dns.attach(container, known)
            except OSError as error:
                raise as_error(error, what) from error
            if known.outside is not None:
                first["name_port"] = known.outside.port

        return attach()

    def _name_early(self, container: str, first: Endpoint, driver: Driver, namespace: int) -> asyncio.Task[None] | None:
        """Tell the name server while the link is made, where all is known before: a namespace that is prepared with its
        sockets, and nothing that must be in it first."""
        if (driver is not self._bridge or namespace >= 0 or not named(first) or restricted(first)
                or first.get("name_server") or any(self._must(endpoint).late for endpoint in endpoints(first))):
            return None
        fd = self._bridge.claim(container, first)
        return self._task(self._attach_names(container, first, fd, fresh=True)) if fd >= 0 else None

    async def _unname(self, container: str, naming: asyncio.Task[None] | None) -> None:
        """After a failure: its error is the one that counts."""
        if naming is not None:
            await asyncio.wait([naming])
            if not naming.cancelled() and naming.exception() is None:
                await self._dns.gone(container)

    async def _renamed(self, container: str, first: Endpoint, namespace: int) -> None:
        """Its networks are others than they were, or its name."""
        there = self._dns.known(container)
        if not named(first):
            await self._dns.gone(container)
        elif there is None:
            await self._attach_names(container, first, namespace, fresh=False)
        else:
            now = self._known(first, there.namespace)
            there.names, there.forward = now.names, now.forward
            await self._dns.change(container)

    async def rename(self, container: str, first: Endpoint, old: str, new: str) -> None:
        """See NetworkManager."""
        for endpoint in endpoints(first):
            if "names" in endpoint:
                endpoint["names"] = [new if name == old else name for name in endpoint["names"]]
        await asyncio.shield(self._task(self._policies.renamed()))
        known = self._dns.known(container)
        if known is not None:  # one that could not be given a name server has none to tell
            await asyncio.shield(self._task(self._renamed(container, first, known.namespace)))

    def _must(self, endpoint: Endpoint) -> Driver:
        driver = self._driver_of(endpoint)
        assert driver is not None
        return driver

    def _link_name(self, endpoint: Endpoint, among: list[Endpoint]) -> str:
        if endpoint["network"] == "none":
            return ""
        record = self._records.get(endpoint["network"])
        prefix = record.prefix if record is not None else "eth"
        used = {one["link"] for one in among}
        return next(name for number in range(len(among) + 1) if (name := f"{prefix}{number}") not in used)

    async def _undo(self, container: str, task: asyncio.Task[Prepared]) -> None:
        await asyncio.wait([task])
        if not task.cancelled() and task.exception() is None:
            os.close(task.result().fd)
            await self._release(container, task.result().endpoint)

    def _task(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def release(self, container: str, endpoint: Endpoint) -> None:
        """See NetworkManager. What another container has by now (an old record's address) is not touched."""
        await asyncio.shield(self._task(self._release(container, endpoint)))

    async def _release(self, container: str, first: Endpoint) -> None:
        await self._policies.leave(container)
        known = self._dns.forget(container)
        if known is not None:
            self._task(self._dns.tell_gone(container, known))  # nobody waits for the answer
        failure: DoliumError | None = None
        for endpoint in endpoints(first):
            driver = self._driver_of(endpoint)
            try:
                if driver is not None:
                    await driver.release(container, endpoint)
            except DoliumError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    async def connect(self, container: str, place: Place, namespace: int, first: Endpoint,
                      ports: tuple[PortBinding, ...] = ()) -> Endpoint:
        """See NetworkManager."""
        return await asyncio.shield(self._task(self._connect(container, place, namespace, first, ports)))

    async def _connect(self, container: str, place: Place, namespace: int, first: Endpoint,
                       ports: tuple[PortBinding, ...]) -> Endpoint:
        found = [dict(endpoint) for endpoint in endpoints(first) if endpoint.get("network")]
        if any(endpoint["network"] == "none" for endpoint in found) or self._name(place.network) == "none":
            raise PermissionDenied("container cannot be connected to multiple networks with one of the networks in private "
                                   "(none) mode")
        new = self._reserve(container, place)
        driver = self._must(new)
        first_way_out = bool(new["gateway"]) and not any(endpoint["gateway"] for endpoint in found)
        try:
            new["link"] = self._link_name(new, found)
            if first_way_out:
                driver.publish(container, new, ports)
            if restricted(first):  # it may have had no network when this daemon started
                await self._policies.resume(container, first, namespace)
            await self._policies.placed(container, [*found, new])
            await driver.join(container, new, namespace, default=first_way_out, default6=_way6(found) is None)
            after = _ordered([new, *found] if first_way_out else [*found, new])
            after |= {key: first[key] for key in _OF_ALL if key in first}  # also of one that had no network any more
            await self._renamed(container, after, namespace)
        except BaseException:
            await driver.leave(container, new, namespace)
            await self._policies.placed(container, found)
            raise
        return after

    async def disconnect(self, container: str, network: str, namespace: int, first: Endpoint) -> Endpoint:
        """See NetworkManager."""
        return await asyncio.shield(self._task(
            self._disconnect(container, network, namespace, first)))

    async def _disconnect(self, container: str, network: str, namespace: int, first: Endpoint) -> Endpoint:
        found = [dict(endpoint) for endpoint in endpoints(first)]
        gone = next((endpoint for endpoint in found if endpoint.get("network") == network), None)
        if gone is None:
            raise NotFound(f"container {container} is not connected to the network {network}")
        had6 = _way6(found) is gone
        found.remove(gone)
        await self._policies.placed(container, found)
        try:
            await self._must(gone).leave(container, gone, namespace)
        except BaseException:
            await self._policies.placed(container, [gone, *found])
            raise
        heir = next((endpoint for endpoint in found if endpoint["gateway"]), None)
        if heir is not None and gone["gateway"] and gone["network"] == first["network"]:
            found.remove(heir)
            found.insert(0, heir)
            await self._inherit(container, heir, gone, namespace)
        heir6 = _way6(found)
        if had6 and heir6 is not None:
            await self._route(namespace, heir6["link"], heir6["gateway6"])
        after = _ordered(found)
        await self._renamed(container, after, namespace)
        return after

    async def _inherit(self, container: str, heir: Endpoint, gone: Endpoint, namespace: int) -> None:
        """The default route went with its link, and the ports: the next network has them now."""
        driver = self._must(heir)
        try:
            driver.publish(container, heir, [PortBinding(port["container_port"], port["protocol"], port["host_ip"],
                                                         port["host_port"]) for port in gone["ports"]
                                                if ":" not in port["host_ip"] or heir.get("ip6")])
            await driver.expose(container, heir)
        except DoliumError as error:
            _log.warning("ports of container %s are not published any more: %s", container[:12], error)
        await self._route(namespace, heir["link"], heir["gateway"])

    async def _route(self, namespace: int, link: str, gateway: str) -> None:
        try:
            await asyncio.to_thread(default_route, namespace, link, gateway)
        except FileExistsError:
            _log.debug("the container has a default route of its own")
        except OSError as error:
            _log.warning("no default route by %s: %s", link, error)

    # -- ports --

    async def publish(self, container: str, first: Endpoint, ports: tuple[PortBinding, ...]) -> Endpoint:
        """See NetworkManager."""
        return await asyncio.shield(self._task(self._publish(container, dict(first), ports)))

    async def _publish(self, container: str, first: Endpoint, ports: tuple[PortBinding, ...]) -> Endpoint:
        driver = self._driver_of(first) if first.get("gateway") else None
        if driver is None or not driver.publishes:
            raise FailedPrecondition("it has no network whose ports can be published",
                                     hint="connect it to a bridge network that is not internal")
        before = first["ports"]
        driver.publish(container, first, ports)
        try:
            await driver.expose(container, first)
        except BaseException:
            await driver.withdraw(container, first, [Published.from_dict(port) for port in first["ports"]
                                                     if port not in before])
            raise
        return first

    async def withdraw(self, container: str, first: Endpoint, ports: tuple[PortBinding, ...]) -> Endpoint:
        """See NetworkManager."""
        return await asyncio.shield(self._task(self._withdraw(container, dict(first), ports)))

    async def _withdraw(self, container: str, first: Endpoint, ports: tuple[PortBinding, ...]) -> Endpoint:
        there = [Published.from_dict(port) for port in first.get("ports") or []]
        gone = [one for one in there for port in ports
                if (one.container_port, one.protocol) == (port.container_port, port.protocol)
                and port.host_ip in ("", one.host_ip) and port.host_port in (0, one.host_port)]
        if not gone:
            raise NotFound("no such port is published")
        await self._must(first).withdraw(container, first, gone)
        return first

    # -- networks --

    def _name(self, reference: str) -> str:
        """Of a network, by its name, its id, or how that begins. Raises NotFound, InvalidArgument."""
        if reference in PREDEFINED or reference in self._records:
            return reference
        ids = {record.id: name for name, record in self._records.items()}
        ids |= {self.identity(name): name for name in PREDEFINED}
        found = [name for identity, name in ids.items() if reference and identity.startswith(reference)]
        if len(found) > 1 and reference not in ids:
            raise InvalidArgument(f"network {reference} is ambiguous ({len(found)} matches found based on ID prefix)")
        if not found:
            raise NotFound(f"network {reference} not found")
        return ids.get(reference) or found[0]

    async def create(self, wish: dict[str, Any]) -> str:
        """See NetworkManager."""
        record = wished(wish, secrets.token_hex(32), _now())
        if record.name in self._records:
            raise AlreadyExists(f"network with name {record.name} already exists")
        self._records[record.name] = record  # the name is taken from now on
        task = self._task(self._create(record))
        return await asyncio.shield(task)

    async def _create(self, record: Record) -> str:
        try:
            made = await self._drivers[record.driver].create(record)
            try:
                self._store.put_row(_TABLE, made.name, made.to_doc())
                faults.point("network.record.put")
            except BaseException:
                await self._drivers[record.driver].remove(made.name)
                raise
        except BaseException:
            self._records.pop(record.name, None)
            raise
        self._records[record.name] = made
        self._task(self._dns.prepare())
        return made.id

    async def remove(self, reference: str) -> str:
        """See NetworkManager."""
        name = self._name(reference)
        if name in PREDEFINED:
            raise PermissionDenied(f"{name} is a pre-defined network and cannot be removed")
        await asyncio.shield(self._task(self._remove(self._records[name])))
        return name

    async def _remove(self, record: Record) -> None:
        users = self._drivers[record.driver].describe(record.name).get("Containers") or {}
        if users:
            raise PermissionDenied(f"error while removing network: network {record.name} id {record.id} has active "
                                   "endpoints",
                                   hint=f"containers {', '.join(sorted(user[:12] for user in users))}")
        self._store.delete_row(_TABLE, record.name)
        faults.point("network.record.deleted")
        try:
            await self._drivers[record.driver].remove(record.name)
        except BaseException:
            self._store.put_row(_TABLE, record.name, record.to_doc())
            raise
        self._records.pop(record.name, None)
        if not self._records:
            await self._dns.rest()

    def find(self, reference: str) -> dict[str, Any]:
        """See NetworkManager."""
        return self._described(self._name(reference))

    def describe(self) -> list[dict[str, Any]]:
        """See NetworkManager; ``Containers``' names are the caller's to fill in."""
        return [self._described(name) for name in (*PREDEFINED, *sorted(self._records))]

    def _described(self, name: str) -> dict[str, Any]:
        record = self._records.get(name) or Record(name, self.identity(name))
        own = {} if name in ("none", "host") else self._drivers[record.driver].describe(name)
        return {"Name": name, "Id": record.id, "Created": record.created or "0001-01-01T00:00:00Z", "Scope": "local",
                "Driver": {"none": "null", "host": "host"}.get(name, record.driver), "EnableIPv4": True,
                "EnableIPv6": record.ipv6,
                "IPAM": {"Driver": "default", "Options": None, "Config": []}, "Internal": record.internal,
                "Attachable": record.attachable, "Ingress": False, "ConfigFrom": {"Network": ""}, "ConfigOnly": False,
                "Containers": {}, "Options": record.options, "Labels": record.labels, **own}

    async def close(self) -> None:
        """See NetworkManager. With no live container nothing of the instance is left in the kernel."""
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self._policies.close()
        await self._dns.close()
        for driver in dict.fromkeys(self._drivers.values()):
            await driver.close()


def _way6(found: list[Endpoint]) -> Endpoint | None:
    """The endpoint with the default route of IPv6: the first one that has a way out."""
    return next((endpoint for endpoint in found if endpoint.get("gateway6")), None)


def _ordered(found: list[Endpoint]) -> Endpoint:
    """The first endpoint with the others in it."""
    if not found:
        return {}
    whole = {key: endpoint[key] for endpoint in reversed(found) for key in _OF_ALL if key in endpoint}
    first, *others = [{key: value for key, value in endpoint.items() if key not in ("others", *_OF_ALL)}
                      for endpoint in found]
    return {**first, **({"others": others} if others else {}), **whole}


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
