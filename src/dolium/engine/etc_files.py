"""/etc/hosts, hostname and resolv.conf as Docker injects them: files in the container's own folder, bind mounted."""

from __future__ import annotations

import ipaddress
import json
import os

from dolium.engine.model import Container
from dolium.errors import InvalidArgument
from dolium.network.base import Endpoint, endpoints, named
from dolium.network.dns.sandbox import ADDRESS as NAME_SERVER

RESOLV_CONF = "/etc/resolv.conf"
ETC_FILES = ("hosts", "hostname", "resolv.conf")
ENDPOINT = "network.json"
_FALLBACK = ("8.8.8.8", "8.8.4.4")


def hosts_text(hostname: str, domain: str, addresses: list[str], extra: list[str]) -> str:
    """The hosts file. ``addresses``: its own; ``extra``: ``name:address`` of --add-host."""
    lines = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback", "fe00::0\tip6-localnet",
             "ff00::0\tip6-mcastprefix", "ff02::1\tip6-allnodes", "ff02::2\tip6-allrouters"]
    for entry in extra:
        name, _, host_address = entry.partition(":")
        lines.append(f"{host_address}\t{name}")
    names = f"{hostname}.{domain} {hostname}" if domain else hostname
    lines += [f"{address}\t{names}" for address in addresses]
    return "\n".join(lines) + "\n"


def resolv_text(host_text: str, servers: list[str], search: list[str], options: list[str], *, isolated: bool) -> str:
    """resolv.conf: the host's, overridden by --dns, --dns-search and --dns-option.

    ``isolated``: the container has a loopback of its own, on which a host's local resolver does not answer.
    """
    found: dict[str, list[str]] = {"nameserver": [], "search": [], "options": []}
    for line in host_text.splitlines():
        words = line.split("#")[0].split(";")[0].split()
        if len(words) > 1 and words[0] in ("nameserver", "search", "domain", "options"):
            key = "search" if words[0] == "domain" else words[0]
            if key == "nameserver":
                found[key].append(words[1])
            else:
                found[key] = words[1:]
    if isolated:
        found["nameserver"] = [server for server in found["nameserver"] if not _is_loopback(server)]
    names = servers or found["nameserver"] or (list(_FALLBACK) if isolated else [])
    searches = [] if search == ["."] else search or found["search"]
    lines = [f"nameserver {server}" for server in names]
    if searches:
        lines.append("search " + " ".join(searches))
    if options or found["options"]:
        lines.append("options " + " ".join(options or found["options"]))
    return "\n".join(lines) + "\n"


def host_options(host_text: str) -> list[str]:
    """The options of the host's resolv.conf that say nothing about dots."""
    found: list[str] = []
    for line in host_text.splitlines():
        words = line.split("#")[0].split(";")[0].split()
        if words[:1] == ["options"]:
            found = [word for word in words[1:] if not word.startswith("ndots:")]
    return found


def _is_loopback(server: str) -> bool:
    try:
        return ipaddress.ip_address(server.partition("%")[0]).is_loopback
    except ValueError:
        return False


def check_extra_hosts(entries: list[str], gateway: str) -> list[str]:
    """--add-host entries with ``host-gateway`` filled in. Raises InvalidArgument."""
    done = []
    for entry in entries:
        name, colon, address = entry.partition(":")
        if address == "host-gateway":
            address = gateway
        try:
            ipaddress.ip_address(address.strip("[]"))
        except ValueError as error:
            raise InvalidArgument(f"bad format for add-host: {entry!r}", hint="write name:address") from error
        if not name or not colon:
            raise InvalidArgument(f"bad format for add-host: {entry!r}", hint="write name:address")
        done.append(f"{name}:{address.strip('[]')}")
    return done


def _texts(container: Container, network: Endpoint) -> dict[str, str]:
    """The three files' content, in these networks. Raises InvalidArgument."""
    host, config = container.host_config, container.config
    hostname = config["Hostname"]
    found = [endpoint for endpoint in endpoints(network) if endpoint.get("ip")]
    gateway = next((endpoint["gateway"] for endpoint in found if endpoint["gateway"]), "") or "127.0.0.1"
    extra = check_extra_hosts(list(host.get("ExtraHosts") or []), gateway)
    text = ""
    if os.path.exists(RESOLV_CONF):
        with open(RESOLV_CONF, errors="replace") as file:
            text = file.read()
    shares_host = (host.get("NetworkMode") or "") == "host"
    if shares_host:
        hostname = os.uname().nodename if not config.get("Hostname") else hostname
    servers, options = list(host.get("Dns") or []), list(host.get("DnsOptions") or [])
    if named(network):
        # the name server asks --dns, or the host's servers, itself; a name without a dot is asked for as it is
        servers = [network.get("name_server") or NAME_SERVER]
        options = options or [*host_options(text), "ndots:0"]
    return {
        "hosts": hosts_text(hostname, config.get("Domainname") or "",
                            [endpoint[key] for endpoint in found for key in ("ip", "ip6") if endpoint.get(key)], extra),
        "hostname": f"{hostname}\n",
        "resolv.conf": resolv_text(text, servers, list(host.get("DnsSearch") or []), options, isolated=not shares_host),
    }


def write_etc_files(folder: str, container: Container) -> None:
    """Write the three files for one start. Raises InvalidArgument."""
    for name, content in _texts(container, container.network).items():
        _write(folder, name, content, container)


def write_endpoint(folder: str, container: Container) -> None:
    """The network of a start, until the record has it: a container that was launched when the daemon died keeps it."""
    _replace(f"{folder}/{ENDPOINT}", json.dumps(container.network).encode(), 0o600)


def read_endpoint(folder: str) -> Endpoint:
    """What ``write_endpoint`` wrote; {} without."""
    try:
        with open(f"{folder}/{ENDPOINT}") as file:
            found = json.load(file)
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def update_etc_files(folder: str, container: Container, before: Endpoint) -> None:
    """A container that runs is in other networks than ``before``: its own addresses in hosts change, and its name servers,
    where it has not changed the file itself. Raises OSError."""
    old, new = _texts(container, before), _texts(container, container.network)
    with open(f"{folder}/resolv.conf", errors="surrogateescape") as file:
        if file.read() == old["resolv.conf"] != new["resolv.conf"]:
            _write(folder, "resolv.conf", new["resolv.conf"], container)
    gone, come = (set(one["hosts"].splitlines()) - set(other["hosts"].splitlines())
                  for one, other in ((old, new), (new, old)))
    with open(f"{folder}/hosts", errors="surrogateescape") as file:
        kept = [line for line in file.read().splitlines() if line not in gone]
    lines = [*kept, *(line for line in new["hosts"].splitlines() if line in come and line not in kept)]
    _write(folder, "hosts", "".join(f"{line}\n" for line in lines), container)


def _write(folder: str, name: str, content: str, container: Container) -> None:
    owner = container.owner if container.ids else None
    _replace(f"{folder}/{name}", content.encode("utf-8", "surrogateescape"), 0o644, owner)


def _replace(path: str, data: bytes, mode: int, owner: tuple[int, int] | None = None) -> None:
    # Written in place: a running container's bind mount shows the same inode. Cut only where it was longer: ext4 writes
    # a file that was emptied out to the disk when it is closed.
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, mode)
    try:
        _write_all(fd, data)
        if os.fstat(fd).st_size != len(data):
            os.truncate(fd, len(data))
        os.fchmod(fd, mode)
        if owner is not None:
            os.fchown(fd, *owner)
    finally:
        os.close(fd)


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data):]
