"""``dolium network``: networks of users' own, and who is in them."""

from __future__ import annotations

import json

from dolium.cli import output
from dolium.cli.containers import FORMAT, filter_query
from dolium.cli.context import Context
from dolium.cli.flags import Command, Flag, UsageError, pairs
from dolium.cli.transport import ApiError, Client, query, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

LS = Command("network ls", "", "List networks.", [
    Flag("-q --quiet", "bool", "ids only"), Flag("--no-trunc", "bool", "whole ids"),
    Flag("-f --filter", "list", "name=…, driver=…, label=…, dangling=true, type=custom", "KEY=VALUE"), FORMAT], maximum=0)
CREATE = Command("network create", "NAME", "Make a network, whose containers reach each other, also by name.", [
    Flag("-d --driver", "str", "bridge, macvlan, ipvlan, overlay or cni", "DRIVER"),
    Flag("--subnet", "list", "its addresses; a free subnet is chosen without", "10.1.0.0/24"),
    Flag("--ip-range", "list", "the part of them that is given to containers that do not ask for one", "10.1.0.128/25"),
    Flag("--gateway", "list", "the host's address in it", "ADDRESS"),
    Flag("--aux-address", "list", "an address that is never given", "NAME=ADDRESS"),
    Flag("--internal", "bool", "no way out of it, and none into it"),
    Flag("--attachable", "bool", "accepted: every network is"),
    Flag("--ipv6", "bool", "IPv6 addresses, too: of a second --subnet, else of one chosen from fd00::/8"),
    Flag("-o --opt", "list", "a driver's option: com.docker.network.driver.mtu=1400 …", "KEY=VALUE"),
    Flag("--label", "list", "a label", "KEY=VALUE")], minimum=1, maximum=1,
    examples=["dolium network create lab", "dolium run -d --name db --network lab …",
              "dolium run --rm --network lab busybox ping -c1 db"])
RM = Command("network rm", "NETWORK [NETWORK ...]", "Remove networks that no container is in.",
             [Flag("-f --force", "bool", "pass over one that is not there")], minimum=1)
INSPECT = Command("network inspect", "NETWORK [NETWORK ...]", "Print all that is known, as JSON.",
                  [Flag("-f --format", "str", "json or a template", "FORMAT")], minimum=1)
PRUNE = Command("network prune", "", "Remove networks that no container uses, running or not.", [
    Flag("-f --force", "bool", "do not ask"), Flag("--filter", "list", "until=24h, label=…", "KEY=VALUE")], maximum=0)
CONNECT = Command("network connect", "NETWORK CONTAINER", "Bring a container into one more network, running or not.", [
    Flag("--ip", "str", "its address there", "ADDRESS"), Flag("--ip6", "str", "its IPv6 address there", "ADDRESS"),
    Flag("--alias", "list", "one more name there", "NAME"),
    Flag("--mac-address", "str", "address of its link", "MAC")], minimum=2, maximum=2)
DISCONNECT = Command("network disconnect", "NETWORK CONTAINER", "Take a container out of a network, running or not.", [
    Flag("-f --force", "bool", "pass over one that is not in it")], minimum=2, maximum=2)


def listing(client: Client, context: Context, words: list[str]) -> int:
    """``dolium network ls``."""
    options, _ = LS.parse(words)
    if options.get("help"):
        context.stdout.write(LS.usage())
        return 0
    rows = client.call("GET", "/networks" + query(filters=filter_query(options["filter"])))
    digits = 64 if options["no_trunc"] else 12
    if options["quiet"]:
        for row in rows:
            context.say(row["Id"][:digits])
        return 0
    cells = []
    for row in sorted(rows, key=lambda row: str(row["Name"])):
        subnets = [str(pool.get("Subnet", "")) for pool in row["IPAM"].get("Config") or []]
        cells.append([row["Id"][:digits], row["Name"], row["Driver"], ",".join(subnets) or "-",
                      "yes" if row["Internal"] else "-"])
    output.listing(context, options["format"], ["NETWORK ID", "NAME", "DRIVER", "SUBNET", "INTERNAL"], rows, cells)
    return 0


def create(client: Client, context: Context, words: list[str]) -> int:
    """``dolium network create``."""
    options, names = CREATE.parse(words)
    if options.get("help"):
        context.stdout.write(CREATE.usage())
        return 0
    pools: list[dict[str, Any]] = [{"Subnet": subnet} for subnet in options["subnet"]]
    for flag, key in (("ip_range", "IPRange"), ("gateway", "Gateway")):
        for value in options[flag]:
            pool = _pool(pools, value, flag.replace("_", "-"))
            if key in pool:
                raise UsageError(f"--{flag.replace('_', '-')} {value}: {pool['Subnet']} has {pool[key]} already")
            pool[key] = value
    for name, value in pairs(options["aux_address"], "--aux-address").items():
        _pool(pools, value, "aux-address").setdefault("AuxiliaryAddresses", {})[name] = value
    made = client.call("POST", "/networks/create", {
        "Name": names[0], "Driver": options["driver"] or "bridge", "Internal": options["internal"],
        "Attachable": options["attachable"], "EnableIPv6": options["ipv6"], "IPAM": {"Driver": "default", "Config": pools},
        "Options": pairs(options["opt"], "--opt"), "Labels": pairs(options["label"], "--label")})
    context.say(made["Id"])
    return 0


def _pool(pools: list[dict[str, Any]], value: str, flag: str) -> dict[str, Any]:
    """The pool whose subnet is of the value's family. Raises UsageError."""
    for pool in pools:
        if (":" in pool["Subnet"]) == (":" in value):
            return pool
    raise UsageError(f"--{flag} {value}: there is no --subnet for it")


def remove(client: Client, context: Context, words: list[str]) -> int:
    """``dolium network rm``."""
    options, names = RM.parse(words)
    if options.get("help"):
        context.stdout.write(RM.usage())
        return 0
    failed = 0
    for name in names:
        try:
            client.call("DELETE", f"/networks/{quote(name)}")
            context.say(name)
        except ApiError as error:
            if not (options["force"] and error.status == 404):
                context.complain(str(error))
                failed = 1
    return failed


def inspect(client: Client, context: Context, words: list[str]) -> int:
    """``dolium network inspect``."""
    options, names = INSPECT.parse(words)
    if options.get("help"):
        context.stdout.write(INSPECT.usage())
        return 0
    found = [client.call("GET", f"/networks/{quote(name)}") for name in names]
    if options["format"] and options["format"] != "json":
        for row in found:
            context.say(output.template(options["format"], row))
        return 0
    context.say(json.dumps(found, indent=None if options["format"] else 4))
    return 0


def prune(client: Client, context: Context, words: list[str]) -> int:
    """``dolium network prune``."""
    from dolium.cli.disk import sure

    options, _ = PRUNE.parse(words)
    if options.get("help"):
        context.stdout.write(PRUNE.usage())
        return 0
    if not options["force"] and not sure(context, "This removes all networks that no container uses."):
        return 0
    done = client.call("POST", "/networks/prune" + query(filters=filter_query(options["filter"])))
    for name in done["NetworksDeleted"] or []:
        context.say(name)
    return 0


def connect(client: Client, context: Context, words: list[str]) -> int:
    """``dolium network connect``."""
    options, names = CONNECT.parse(words)
    if options.get("help"):
        context.stdout.write(CONNECT.usage())
        return 0
    client.call("POST", f"/networks/{quote(names[0])}/connect", {"Container": names[1], "EndpointConfig": {
        "Aliases": options["alias"], "MacAddress": options["mac_address"] or "",
        "IPAMConfig": {key: options[flag] for flag, key in (("ip", "IPv4Address"), ("ip6", "IPv6Address"))
                       if options[flag]} or None}})
    return 0


def disconnect(client: Client, context: Context, words: list[str]) -> int:
    """``dolium network disconnect``."""
    options, names = DISCONNECT.parse(words)
    if options.get("help"):
        context.stdout.write(DISCONNECT.usage())
        return 0
    client.call("POST", f"/networks/{quote(names[0])}/disconnect", {"Container": names[1], "Force": options["force"]})
    return 0
