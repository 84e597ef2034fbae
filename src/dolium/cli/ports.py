"""``dolium port``: what a container publishes, and changes of it."""

from __future__ import annotations

from dolium.cli import bodies, output
from dolium.cli.context import Context
from dolium.cli.flags import Command, UsageError
from dolium.cli.transport import Client, query, quote

PORT = Command("port", "CONTAINER [PORT[/udp]]", "List what a container publishes: its port, and where on the host. "
               "`dolium port add CONTAINER [ADDRESS:]PORT:PORT[/udp] ...` publishes more while it runs, "
               "`dolium port rm CONTAINER [[ADDRESS:]PORT:]PORT[/udp] ...` less.", [], minimum=1)


def port(client: Client, context: Context, words: list[str]) -> int:
    """``dolium port``, with ``add`` and ``rm``: they take two arguments more at least, the listing has two at most."""
    options, names = PORT.parse(words)
    if options.get("help"):
        context.stdout.write(PORT.usage())
        return 0
    if len(names) > 2:
        if names[0] not in ("add", "rm"):
            raise UsageError("dolium port takes CONTAINER [PORT[/udp]], or add or rm, a container and ports")
        return (_add if names[0] == "add" else _remove)(client, names[1], names[2:])
    published = client.call("GET", f"/containers/{quote(names[0])}/json")["NetworkSettings"]["Ports"]
    wanted = names[1] if len(names) > 1 else ""
    if wanted and "/" not in wanted:
        wanted += "/tcp"
    shown = [(key, f"{output.host_text(one['HostIp'])}:{one['HostPort']}")
             for key, entries in sorted(published.items(), key=_order) if wanted in ("", key) for one in entries or []]
    if wanted and not shown:
        context.complain(f"no public port '{names[1]}' published for {names[0]}")
        return 1
    for key, place in shown:
        context.say(place if wanted else f"{key} -> {place}")
    return 0


def _order(item: tuple[str, object]) -> tuple[int, str]:
    number, _, protocol = item[0].partition("/")
    return int(number), protocol


def _add(client: Client, container: str, values: list[str]) -> int:
    bindings, _ = bodies.ports(values)
    client.call("POST", f"/dolium/containers/{quote(container)}/ports", {"PortBindings": bindings})
    return 0


def _remove(client: Client, container: str, values: list[str]) -> int:
    bindings, _ = bodies.ports(values)
    for key, entries in bindings.items():
        for entry in entries:
            client.call("DELETE", f"/dolium/containers/{quote(container)}/ports" + query(
                port=key, host_ip=entry["HostIp"], host_port=entry["HostPort"]))
    return 0
