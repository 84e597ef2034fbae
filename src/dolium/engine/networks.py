"""Containers in networks: what a request wishes, a start's endpoints, and networks of containers that run."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from dolium.engine import request
from dolium.engine.engine import Engine, cleanup_step
from dolium.engine.etc_files import update_etc_files
from dolium.engine.model import Container
from dolium.errors import DoliumError, FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, Unimplemented
from dolium.network.addresses import check_mac
from dolium.network.base import Endpoint, NetworkRequest, Place, Prepared, endpoints

ALONE = ("none", "host")  # networks that go with no other
DEFAULT = "bridge"
Settings = dict[str, Any]


def mode_of(container: Container) -> str:
    """Its NetworkMode, with the default by name."""
    mode = container.host_config.get("NetworkMode") or "default"
    return DEFAULT if mode == "default" else str(mode)


def wished_networks(engine: Engine, host: dict[str, Any], networking: Any) -> dict[str, Settings]:
    """Endpoint settings by network's name, NetworkMode's first, of a create request; {} when that is all. ``host``'s
    NetworkMode becomes a name.

    A network that is not there yet is left for the start to miss. Raises InvalidArgument, Unimplemented in Docker's words.
    """
    wishes = (networking or {}).get("EndpointsConfig") or {} if isinstance(networking or {}, dict) else None
    if not isinstance(wishes, dict) or not all(isinstance(wish or {}, dict) for wish in wishes.values()):
        raise InvalidArgument("NetworkingConfig.EndpointsConfig must be an object of objects")
    mode = host.get("NetworkMode") or "default"
    if mode.startswith("container:"):
        if wishes:
            raise InvalidArgument("conflicting options: a container that joins another's network has none of its own")
        return {}
    first = _known_name(engine, DEFAULT if mode == "default" else mode)
    if mode != "default":
        host["NetworkMode"] = first
    named: dict[str, Any] = {first: {}}
    for name, wish in wishes.items():
        key = first if name in ("default", mode) else _known_name(engine, name)
        named[key] = wish or {}
    found = {name: settings(name, wish) for name, wish in named.items()}
    if found == {first: {}} and first != "none":
        return {}
    alone = [name for name in found if name in ALONE]
    if alone and len(found) > 1:
        raise InvalidArgument("container cannot be connected to multiple networks with one of the networks in "
                              f"{'private (none)' if alone[0] == 'none' else alone[0]} mode")
    return found


def _known_name(engine: Engine, reference: str) -> str:
    try:
        return str(engine.network.find(reference)["Name"])
    except NotFound:
        return reference


def settings(name: str, wish: Settings) -> Settings:
    """What is kept of Docker's EndpointSettings. Raises InvalidArgument, Unimplemented."""
    if name == "default":
        name = DEFAULT
    own = wish.get("IPAMConfig") or {}
    address, six, mac = own.get("IPv4Address") or "", own.get("IPv6Address") or "", wish.get("MacAddress") or ""
    aliases, links = wish.get("Aliases") or [], wish.get("Links") or []
    if own.get("LinkLocalIPs"):
        raise Unimplemented(f"network {name}: link-local addresses are not supported in this version")
    if links:
        raise Unimplemented(f"network {name}: --link is not supported in this version", hint="name the container, or use "
                            "--network-alias")
    if not isinstance(aliases, list) or not all(isinstance(alias, str) and alias for alias in aliases):
        raise InvalidArgument(f"network {name}: aliases are a list of names")
    predefined = name in (DEFAULT, *ALONE)
    if (address or six) and predefined:
        raise InvalidArgument("user specified IP address is supported on user defined networks only")
    if aliases and predefined:
        raise InvalidArgument("network-scoped aliases are only supported for user-defined networks")
    if mac:
        check_mac(mac)
    found = {"Aliases": list(dict.fromkeys(aliases)), "IPv4Address": address, "IPv6Address": six, "MacAddress": mac}
    return {key: value for key, value in found.items() if value}


class ContainerNetworks:
    """Starts, ends and changes of containers' networks; the container's lock is its caller's, but for ``connect`` and
    ``disconnect``, which take it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    # -- a start's --

    async def begin(self, container: Container, namespace: int) -> asyncio.Task[Prepared] | None:
        """The container's endpoint is known when this returns; its namespace is made meanwhile, or furnished."""
        mode = mode_of(container)
        if mode == "host" or mode.startswith("container:"):
            container.network = {"network": "host" if mode == "host" else ""}
            return None
        ports = request.published(container.host_config, container.config)
        wished = container.endpoint_settings
        first = wished.get(mode) or {}
        servers, egress, ingress = (container.host_config.get(key) for key in ("Dns", "Egress", "Ingress"))
        loop = asyncio.get_running_loop()
        known: asyncio.Future[Endpoint] = loop.create_future()
        making = loop.create_task(self._engine.network.prepare(
            NetworkRequest(container.id, mode, tuple(ports),
                           first.get("MacAddress") or container.config.get("MacAddress") or "",
                           first.get("IPv4Address") or "", namespace,
                           tuple(_place(container, name, wish) for name, wish in wished.items() if name != mode),
                           _names(container, first), tuple(servers) if servers else None,
                           tuple(egress) if egress else None, tuple(ingress) if ingress else None,
                           request.bandwidth(container.host_config), first.get("IPv6Address") or "",
                           not self._engine.backend(container).live), known.set_result))
        either: set[asyncio.Future[Any]] = {known, making}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        except BaseException:
            making.cancel()
            await asyncio.wait([making])  # it undoes what it did
            raise
        container.network = known.result() if known.done() else (await making).endpoint
        return making

    async def drop(self, container: Container, making: asyncio.Task[Prepared] | None) -> None:
        """Give back the network of a launch that failed; one that could not be made has left nothing."""
        if making is None:
            return
        try:
            prepared = await asyncio.shield(making)
        except DoliumError:
            return  # the launch's error
        os.close(prepared.fd)
        await self.release(container, container.network)

    async def release(self, container: Container, endpoint: Endpoint) -> None:
        """Of one that has ended. A failure is logged: what is left goes at the next start of a daemon."""
        try:
            await self._engine.network.release(container.id, endpoint)
        except DoliumError as failure:
            cleanup_step(f"release the network of {container.name}", failure)

    def tell(self, container: Container, action: str) -> None:
        """Events of all its networks; ``action``: connect, disconnect."""
        for endpoint in endpoints(container.network):
            if endpoint.get("network"):
                self._event(container, endpoint["network"], action)

    def _event(self, container: Container, name: str, action: str) -> None:
        try:
            network = self._engine.network.find(name)
        except NotFound:
            return
        self._engine.events.publish("network", action, network["Id"], {"name": name, "type": network["Driver"],
                                                                       "container": container.id})

    async def renamed(self, container: Container, old: str) -> None:
        """It has another name now, in its networks too."""
        if container.live:
            await self._engine.network.rename(container.id, container.network, old, container.name)
            self._engine.record(container)

    # -- changes --

    async def connect(self, network: str, reference: str, wish: Settings) -> None:
        """``docker network connect``. Raises NotFound, InvalidArgument, PermissionDenied, FailedPrecondition."""
        engine = self._engine
        container = engine.find(reference)
        name = str(engine.network.find(network)["Name"])
        kept = settings(name, wish)
        async with engine.lock(container.id):
            container = engine.find(container.id)
            mode = mode_of(container)
            if mode.startswith("container:") or "host" in (mode, name):
                raise PermissionDenied("container sharing network namespace with another container or host cannot be "
                                       "connected to any other network")
            wished = wished_of(container)
            if name == "none" or "none" in wished:
                raise PermissionDenied("container cannot be connected to multiple networks with one of the networks in "
                                       "private (none) mode")
            if name in wished:
                raise PermissionDenied(f"endpoint with name {container.name} already exists in network {name}")
            engine.check_live(container, f"connect to {name}:")
            if container.live:
                namespace, before = self._namespace(container), container.network
                host = container.host_config
                of_all = (("servers", "Dns"), ("egress", "Egress"), ("ingress", "Ingress"))
                whole = {key: list(host[name]) for key, name in of_all if host.get(name)}
                try:
                    container.network = await engine.network.connect(
                        container.id, _place(container, name, kept), namespace,
                        {**before, **whole},
                        tuple(request.published(container.host_config, container.config)))
                finally:
                    os.close(namespace)
                update_etc_files(engine.paths.container(container.id), container, before)
            if not wished:
                container.host_config["NetworkMode"] = name
            container.endpoint_settings = {**wished, name: kept}
            engine.record(container)
        if container.live:
            self._event(container, name, "connect")

    async def disconnect(self, network: str, reference: str) -> None:
        """``docker network disconnect``. Raises NotFound, PermissionDenied, FailedPrecondition."""
        engine = self._engine
        container = engine.find(reference)
        name = str(engine.network.find(network)["Name"])
        async with engine.lock(container.id):
            container = engine.find(container.id)
            mode = mode_of(container)
            if mode == "host" or mode.startswith("container:"):
                raise PermissionDenied("container cannot be disconnected from host network or connected to host network")
            wished = wished_of(container)
            if name not in wished:
                raise PermissionDenied(f"container {container.id} is not connected to network {name}")
            engine.check_live(container, f"disconnect from {name}:")
            if container.live:
                namespace, before = self._namespace(container), container.network
                try:
                    container.network = await engine.network.disconnect(container.id, name, namespace, container.network)
                finally:
                    os.close(namespace)
                update_etc_files(engine.paths.container(container.id), container, before)
            del wished[name]
            container.endpoint_settings = wished
            if name == mode:
                container.host_config["NetworkMode"] = next(iter(wished), "none")
            engine.record(container)
        if container.live:
            self._event(container, name, "disconnect")

    def _namespace(self, container: Container) -> int:
        try:
            return os.open(f"/proc/{container.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise FailedPrecondition(f"container {container.name} ended just now") from error


def wished_of(container: Container) -> dict[str, Settings]:
    """Its networks by name; one that has been taken out of its last one has none."""
    mode = mode_of(container)
    return dict(container.endpoint_settings) or ({} if mode == "none" or mode.startswith("container:") else {mode: {}})


def _names(container: Container, wish: Settings) -> tuple[str, ...]:
    names = [container.name, *(wish.get("Aliases") or []), container.short_id, container.config.get("Hostname") or ""]
    return tuple(dict.fromkeys(filter(None, names)))


def _place(container: Container, name: str, wish: Settings) -> Place:
    return Place(name, wish.get("IPv4Address") or "", wish.get("MacAddress") or "", _names(container, wish),
                 request.bandwidth(container.host_config), wish.get("IPv6Address") or "")
