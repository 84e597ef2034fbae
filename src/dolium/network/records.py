"""Pure: a user-defined network as it is stored, and what a wish for one says in Docker's form, of ``/networks/create``."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address, IPv6Network, NetmaskValueError
from typing import Any, NamedTuple, TypeAlias

from dolium.errors import FailedPrecondition, InvalidArgument, PermissionDenied, Unimplemented

VERSION = 2
PREDEFINED = ("bridge", "host", "none")
NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*\Z")
WITH_IPV6 = ("bridge", "ipvlan", "macvlan", "overlay")
DRIVERS = ("bridge", "cni", "ipvlan", "macvlan", "overlay")
VXLAN_PORT, WIREGUARD_PORT, NAMES_PORT = 4789, 51820, 4795
MODES = {"macvlan": ("bridge", "private", "vepa", "passthru"), "ipvlan": ("l2", "l3", "l3s")}
FLAGS = ("bridge", "private", "vepa")
_Network: TypeAlias = IPv4Network | IPv6Network
_MAPPED = IPv6Network("::ffff:0:0/96")
_LINK = re.compile(r"[a-zA-Z0-9_.-]{1,15}\Z")
_BRIDGE = "com.docker.network.bridge."
MTU = "com.docker.network.driver.mtu"
PREFIX = "com.docker.network.container_iface_prefix"
_FLAGS = {f"{_BRIDGE}enable_icc", f"{_BRIDGE}enable_ip_masquerade"}
_KNOWN = {*_FLAGS, f"{_BRIDGE}name", f"{_BRIDGE}host_binding_ipv4", MTU, PREFIX}


@dataclass(frozen=True, slots=True)
class Record:
    """One network. ``gateway`` "" is the subnet's first host; ``within``: where addresses nobody asked for come from, "" is
    all of the subnet; ``reserved``: by name, never given; ``ipv6``: has it IPv6 too, with ``subnet6`` and so on?"""

    name: str
    id: str
    driver: str = "bridge"
    created: str = ""
    subnet: str = ""
    gateway: str = ""
    within: str = ""
    reserved: dict[str, str] = field(default_factory=dict)
    internal: bool = False
    attachable: bool = False
    labels: dict[str, str] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    version: int = VERSION
    ipv6: bool = False
    subnet6: str = ""
    gateway6: str = ""
    within6: str = ""
    reserved6: dict[str, str] = field(default_factory=dict)

    @property
    def short(self) -> str:
        """What kernel objects carry of the id."""
        return self.id[:12]

    @property
    def link(self) -> str:
        """The bridge's name by wish; ""."""
        return self.options.get(f"{_BRIDGE}name", "")

    @property
    def talk(self) -> bool:
        """May its containers reach each other?"""
        return _flag(self.options.get(f"{_BRIDGE}enable_icc", "true"))

    @property
    def masquerade(self) -> bool:
        """Do its containers go out by the host's address?"""
        return _flag(self.options.get(f"{_BRIDGE}enable_ip_masquerade", "true"))

    @property
    def host_ip(self) -> str:
        """Where its ports are published when nobody says where; "" is everywhere."""
        return self.options.get(f"{_BRIDGE}host_binding_ipv4", "")

    @property
    def parent(self) -> str:
        """The host's link that containers of a macvlan or an ipvlan share; "" for one made for the network."""
        return self.options.get("parent", "")

    @property
    def mode(self) -> str:
        """Of a macvlan or an ipvlan."""
        return self.options.get(f"{self.driver}_mode") or MODES[self.driver][0]

    @property
    def flag(self) -> str:
        """Of an ipvlan: may its containers reach each other?"""
        return self.options.get("ipvlan_flag") or FLAGS[0]

    @property
    def vni(self) -> int:
        """The number of an overlay, the same on all its hosts: that of its name and subnet when none is given."""
        given = self.options.get("vni")
        digest = hashlib.sha256(f"{self.name} {self.subnet}".encode()).digest()
        return int(given) if given else int.from_bytes(digest[:3], "big") or 1

    @property
    def encrypted(self) -> bool:
        """Of an overlay."""
        return "encrypted" in self.options

    @property
    def tunnel_port(self) -> int:
        """The UDP port by which an overlay goes from host to host; 0 of others."""
        if self.driver != "overlay":
            return 0
        return int(self.options.get("port") or (WIREGUARD_PORT if self.encrypted else VXLAN_PORT))

    @property
    def names_port(self) -> int:
        """The UDP port by which an overlay's hosts ask each other for names; 0 when they do not."""
        return int(self.options.get("names_port", NAMES_PORT))

    @property
    def peers(self) -> tuple[IPv4Address, ...]:
        """Hosts of an overlay that its options name."""
        return tuple(map(IPv4Address, _list(self.options.get("peers", ""))))

    @property
    def mtu(self) -> int:
        """0 when it is not said."""
        return int(self.options.get(MTU) or 0)

    @property
    def prefix(self) -> str:
        """How the names of its links begin in a container."""
        return self.options.get(PREFIX) or "eth"

    def to_doc(self) -> dict[str, Any]:
        """The stored form."""
        return asdict(self)

    @classmethod
    def from_doc(cls, doc: Mapping[str, Any]) -> Record:
        """Of a stored form of this version, or of the first one, which had no IPv6. Raises KeyError, TypeError."""
        return cls(**{**doc, "version": VERSION})


def _flag(text: str) -> bool:
    return text.strip().lower() in ("1", "t", "true")


def check_name(name: str) -> str:
    """Raises InvalidArgument, PermissionDenied in Docker's words."""
    if not NAME.match(name):
        raise InvalidArgument(f"invalid network name {name!r}: only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed")
    if name in PREDEFINED or name == "default":
        raise PermissionDenied(f"operation is not permitted on predefined {name} network")
    return name


def wished(doc: Mapping[str, Any], identity: str, created: str) -> Record:
    """The record that a wish asks for, without a subnet when it names none. Raises InvalidArgument, PermissionDenied,
    Unimplemented."""
    name = check_name(str(doc.get("Name") or ""))
    driver = doc.get("Driver") or "bridge"
    if driver not in DRIVERS:
        raise InvalidArgument(f"could not find plugin {driver} in v1 plugin registry: plugin not found",
                              hint=f"the drivers are {', '.join(DRIVERS)}")
    for key, what in (("Ingress", "--ingress"), ("ConfigOnly", "--config-only")):
        if doc.get(key):
            raise Unimplemented(f"network {name}: {what} is not supported in this version")
    if doc.get("EnableIPv4") is False:
        raise Unimplemented(f"network {name}: a network without IPv4 is not supported in this version",
                            hint="leave --ipv4=false out")
    six = bool(doc.get("EnableIPv6"))
    if six and driver not in WITH_IPV6:
        raise Unimplemented(f"network {name}: --ipv6 is not supported by the driver {driver}",
                            hint="a CNI network's addresses are what its plugins say" if driver == "cni" else
                            f"it is by {', '.join(WITH_IPV6)}")
    if (doc.get("ConfigFrom") or {}).get("Network"):
        raise Unimplemented(f"network {name}: --config-from is not supported in this version")
    if doc.get("Scope") not in (None, "", "local"):
        raise InvalidArgument(f"network {name}: scope {doc['Scope']!r} is not local")
    options = _texts(doc.get("Options"), "option")
    _check_options(name, options)
    if driver in MODES:
        _check_shared(name, driver, options, internal=bool(doc.get("Internal")))
    four, other = _addresses(name, doc.get("IPAM") or {}, six=six)
    subnet, gateway, within, reserved = four
    if driver == "cni":
        if subnet or doc.get("Internal"):
            raise InvalidArgument(f"network {name}: a CNI network's addresses are what its plugins say")
        _check_cni(name, options)
    if driver == "overlay":
        _check_overlay(name, options)
        if not within:
            raise InvalidArgument(f"network {name}: each host of an overlay gives addresses of a range of its own",
                                  hint="--subnet 10.9.0.0/16 --ip-range 10.9.1.0/24 here, 10.9.2.0/24 on the next one")
        gateway = gateway or _first_host(IPv4Network(subnet), IPv4Network(within))
        if six:
            if not other.within:
                raise InvalidArgument(f"network {name}: each host of an overlay gives addresses of a range of its own",
                                      hint="--subnet fd00:9::/64 --ip-range fd00:9::1:0/112 here, fd00:9::2:0/112 there")
            first = _first_host(IPv6Network(other.subnet), IPv6Network(other.within))
            other = other._replace(gateway=other.gateway or first)
    return Record(name=name, id=identity, driver=driver, created=created, subnet=subnet, gateway=gateway, within=within,
                  reserved=reserved, internal=bool(doc.get("Internal")), attachable=bool(doc.get("Attachable")),
                  labels=_texts(doc.get("Labels"), "label"), options=options, ipv6=six, subnet6=other.subnet,
                  gateway6=other.gateway, within6=other.within, reserved6=other.reserved)


def _texts(value: Any, what: str) -> dict[str, str]:
    if not isinstance(value or {}, dict) or not all(isinstance(text, str) for text in (value or {}).values()):
        raise InvalidArgument(f"a network's {what}s are an object of texts")
    return dict(value or {})


def _check_options(name: str, options: Mapping[str, str]) -> None:
    for key, value in options.items():
        if key.startswith("com.docker.network.") and key not in _KNOWN:
            raise InvalidArgument(f"network {name}: option {key} is not supported",
                                  hint=f"known are {', '.join(sorted(_KNOWN))}")
        if key in _FLAGS and value.strip().lower() not in ("1", "t", "true", "0", "f", "false"):
            raise InvalidArgument(f"network {name}: option {key}: {value!r} is neither true nor false")
    link, mtu, prefix = options.get(f"{_BRIDGE}name"), options.get(MTU), options.get(PREFIX)
    if link is not None and (not _LINK.match(link) or link in (".", "..")):
        raise InvalidArgument(f"network {name}: {link!r} is not a name for a link", hint="at most 15 of [a-zA-Z0-9_.-]")
    if prefix is not None and not re.fullmatch(r"[a-z][a-z0-9_-]{0,10}", prefix):
        raise InvalidArgument(f"network {name}: {prefix!r} is not how a link's name can begin")
    if mtu and not (mtu.isascii() and mtu.isdigit() and 68 <= int(mtu) <= 65535):
        raise InvalidArgument(f"network {name}: invalid MTU {mtu!r}", hint="68 to 65535")
    if options.get(f"{_BRIDGE}host_binding_ipv4"):
        _address(options[f"{_BRIDGE}host_binding_ipv4"], f"network {name}: option host_binding_ipv4")


def _check_shared(name: str, driver: str, options: Mapping[str, str], *, internal: bool) -> None:
    """Options of a macvlan or an ipvlan. Raises InvalidArgument."""
    choices = {f"{driver}_mode": MODES[driver], **({"ipvlan_flag": FLAGS} if driver == "ipvlan" else {})}
    for key, value in options.items():
        if key.startswith(_BRIDGE) or (key not in choices and key.partition("_")[0] in MODES):
            raise InvalidArgument(f"network {name}: {key} is no option of the driver {driver}",
                                  hint=f"known are parent, {', '.join(sorted(choices))}, {MTU}, {PREFIX}")
        if value not in choices.get(key, (value,)):
            raise InvalidArgument(f"network {name}: {key}: {value!r} is none of {', '.join(choices[key])}")
    parent = options.get("parent", "")
    if parent and (not _LINK.match(parent) or parent == "lo"):
        raise InvalidArgument(f"network {name}: {parent!r} is not a link whose network containers can share")
    if parent and internal:
        raise InvalidArgument(f"network {name}: with --internal there is no parent: nothing leads out")


_OVERLAY = ("peers", "peers_file", "vni", "port", "local", "names_port", "encrypted", "key_file")


def _list(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def default_subnet6(settings: Mapping[str, Any], what: str) -> str | None:
    """Of daemon.json's ``ipv6`` and ``fixed-cidr-v6``: the IPv6 subnet of the default network, "" for one that is found,
    None when it has no IPv6. ``what``: the file's name. Raises FailedPrecondition."""
    wanted, subnet = settings.get("ipv6", False), settings.get("fixed-cidr-v6", "")
    if not isinstance(wanted, bool) or not isinstance(subnet, str):
        raise FailedPrecondition(f"{what}: ipv6 is true or false, fixed-cidr-v6 a text")
    if not wanted:
        return None
    try:
        return _pool("bridge", {}, _network(subnet, "fixed-cidr-v6")).subnet if subnet else ""
    except InvalidArgument as error:
        raise FailedPrecondition(f"{what}: {error.message}", hint=error.hint) from error


def _check_overlay(name: str, options: Mapping[str, str]) -> None:
    """Options of an overlay. Raises InvalidArgument, Unimplemented."""
    if "encrypted" in options or "key_file" in options:
        if options.get("encrypted") not in ("", "true"):
            raise InvalidArgument(f"network {name}: a key_file is that of an encrypted overlay", hint="-o encrypted")
        if not options.get("key_file", "").startswith("/"):
            raise InvalidArgument(f"network {name}: an encrypted overlay needs the absolute path of a file with a secret",
                                  hint="-o key_file=/path, the same file on all hosts: head -c 32 /dev/urandom | base64")
        if not options.get("local"):
            raise InvalidArgument(f"network {name}: an encrypted overlay needs this host's address, as the others know it",
                                  hint="-o local=ADDRESS")
    for key in options:
        if key not in (*_OVERLAY, MTU, PREFIX, *_FLAGS):
            raise InvalidArgument(f"network {name}: {key} is no option of the driver overlay",
                                  hint=f"known are {', '.join(_OVERLAY)}, {MTU}, {PREFIX}")
    for key, least, most in (("vni", 1, (1 << 24) - 1), ("port", 1, 65535), ("names_port", 0, 65535)):
        value = options.get(key)
        if value is not None and not (value.isascii() and value.isdigit() and least <= int(value) <= most):
            raise InvalidArgument(f"network {name}: {key}: {value!r} is not {least} to {most}")
    for word in (*_list(options.get("peers", "")), *filter(None, [options.get("local")])):
        if "/" in word:
            raise InvalidArgument(f"network {name}: {word} is not the address of one host")
        _address(word, f"network {name}: a host of an overlay")
    path = options.get("peers_file")
    if path is not None and not path.startswith("/"):
        raise InvalidArgument(f"network {name}: peers_file: {path!r} is not an absolute path")


def _check_cni(name: str, options: Mapping[str, str]) -> None:
    """Options of a CNI network. Raises InvalidArgument."""
    for key in options:
        if key not in ("config", "bin", PREFIX):
            raise InvalidArgument(f"network {name}: {key} is no option of the driver cni",
                                  hint=f"known are config, bin, {PREFIX}")
    if not options.get("config", "").startswith("/"):
        raise InvalidArgument(f"network {name}: the driver cni needs a configuration",
                              hint="-o config=/etc/cni/net.d/NAME.conflist")
    if any(not folder.startswith("/") for folder in options.get("bin", "/").split(":")):
        raise InvalidArgument(f"network {name}: bin is a list of absolute paths, with : between")


def _first_host(subnet: _Network, within: _Network) -> str:
    """Of a host's range: its own gateway."""
    first = within.network_address
    return str(first + 1 if first == subnet.network_address else first)


class _Pool(NamedTuple):
    """What is said of one family."""

    subnet: str = ""
    gateway: str = ""
    within: str = ""
    reserved: dict[str, str] = {}


def _addresses(name: str, ipam: Mapping[str, Any], *, six: bool) -> tuple[_Pool, _Pool]:
    """Of IPv4 and of IPv6."""
    if ipam.get("Driver") not in (None, "", "default"):
        raise InvalidArgument(f"network {name}: IPAM driver {ipam['Driver']!r} is not available",
                              hint="the driver is default")
    found: dict[int, _Pool] = {}
    for entry in ipam.get("Config") or []:
        if not any(entry.values()):
            continue
        if not entry.get("Subnet"):
            if entry.get("IPRange") or entry.get("Gateway") or entry.get("AuxiliaryAddresses"):
                raise InvalidArgument(f"network {name}: an address range, a gateway or reserved addresses need a subnet")
            continue
        subnet = _network(entry["Subnet"], f"network {name}: subnet")
        if subnet.version == 6 and not six:
            raise InvalidArgument(f"network {name}: {subnet} is an IPv6 subnet", hint="add --ipv6")
        if subnet.version in found:
            raise InvalidArgument(f"network {name}: a network has one IPv{subnet.version} subnet here")
        found[subnet.version] = _pool(name, entry, subnet)
    return found.get(4) or _Pool(), found.get(6) or _Pool()


def _pool(name: str, entry: Mapping[str, Any], subnet: _Network) -> _Pool:
    if subnet.prefixlen > subnet.max_prefixlen - 2 or subnet.is_loopback or subnet.is_multicast:
        raise InvalidArgument(f"network {name}: {subnet} is not a subnet for containers", hint="it needs two hosts at least")
    if isinstance(subnet, IPv6Network) and (subnet.is_link_local or subnet.overlaps(_MAPPED) or not subnet.prefixlen):
        raise InvalidArgument(f"network {name}: {subnet} is not a subnet for containers",
                              hint="a /64 of fd00::/8, or one of your own")
    gateway, within = "", ""
    if entry.get("Gateway"):
        gateway = _inside(entry["Gateway"], subnet, f"network {name}: gateway")
    if entry.get("IPRange"):
        found = _network(entry["IPRange"], f"network {name}: address range")
        if not _is_part(found, subnet):
            raise InvalidArgument(f"network {name}: the address range {found} is not of the subnet {subnet}")
        within = str(found)
    reserved = {str(key): _inside(value, subnet, f"network {name}: reserved address {key}")
                for key, value in (entry.get("AuxiliaryAddresses") or {}).items()}
    return _Pool(str(subnet), gateway, within, reserved)


def _is_part(inner: _Network, outer: _Network) -> bool:
    return inner.version == outer.version and inner.network_address in outer and inner.prefixlen >= outer.prefixlen


def _network(text: str, what: str) -> _Network:
    if "%" in text:
        raise InvalidArgument(f"{what} {text}: a scope is no part of it")
    try:
        return IPv6Network(text) if ":" in text else IPv4Network(text)
    except (AddressValueError, NetmaskValueError, ValueError) as error:
        raise InvalidArgument(f"{what} {text}: {error}") from error


def _address(text: str, what: str) -> IPv4Address:
    try:
        return IPv4Address(text.partition("/")[0])
    except AddressValueError as error:
        raise InvalidArgument(f"{what}: {error}") from error


def _inside(text: str, subnet: _Network, what: str) -> str:
    plain = text.partition("/")[0]
    if "%" in plain:
        raise InvalidArgument(f"{what} {text}: a scope is no part of it")
    try:
        address = IPv6Address(plain) if isinstance(subnet, IPv6Network) else IPv4Address(plain)
    except AddressValueError as error:
        raise InvalidArgument(f"{what}: {error}") from error
    last = subnet.broadcast_address if subnet.version == 4 else None  # IPv6 has none
    if address not in subnet or address in (subnet.network_address, last):
        raise InvalidArgument(f"{what} {address} is no host's address in {subnet}")
    return str(address)
