"""``linux.netDevices``: links of the runtime's network namespace that move into the container's (config-linux.md). Pure.
Cold module, imported only when there are some.

A link keeps its permanent addresses of global scope, takes a new name where one is given, and comes up. What becomes of it
when the container's namespace ends is the kernel's affair: hardware returns, virtual links are gone.
"""

from __future__ import annotations

from dolium.linux import links
from dolium.runtime import deeds
from dolium.runtime import plan as P
from dolium.runtime.spec import take, wrong

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dolium.runtime.facts import Facts
    from dolium.runtime.plan import Plan


LIMIT_MS = 30_000


def _name(text: str, field: str) -> str:
    raw = text.encode("utf-8", "surrogateescape")
    if not raw or len(raw) > links.NAME_MAX or text in (".", "..") or set(text) & set("/:%\0") or text.split() != [text]:
        raise wrong(field, f"{text!r} is not the name of a link")
    if text == "lo":  # the kernel would find out when the link is in the container already, and it would be lost there
        raise wrong(field, "every network namespace has a lo of its own")
    return text


def check(linux: dict[str, Any]) -> dict[str, str]:
    """Name on the host to name inside. Raises InvalidArgument naming the field."""
    given = take(linux, "netDevices", "object", "linux") or {}
    if given and not any(entry.get("type") == "network" for entry in linux.get("namespaces") or []):
        raise wrong("linux.netDevices", "needs a network namespace in linux.namespaces: the container has the runtime's own")
    found: dict[str, str] = {}
    for name, value in given.items():
        field = f"linux.netDevices.{name}"
        if not isinstance(value, dict):
            raise wrong(field, "must be an object")
        inside = _name(take(value, "name", "string", field) or name, f"{field}.name")
        if inside in found.values():
            raise wrong(field, f"another device is to be called {inside!r} too")
        found[_name(name, field)] = inside
    return found


def add(plan: Plan, linux: dict[str, Any], facts: Facts) -> None:
    """Move them, by a program of ours, once the new process is in its namespace. Raises InvalidArgument for a link that is
    not there."""
    devices = check(linux)
    if not devices:
        return
    listed = (facts.read("/proc/self/net/dev") or b"").decode("utf-8", "surrogateescape")
    present = {line.partition(":")[0].strip() for line in listed.splitlines()}
    for name in devices:
        if name not in present:
            raise wrong(f"linux.netDevices.{name}", "there is no such link in the runtime's network namespace")
    deeds.add(plan, P.PARENT_AFTER_CLONE, f"linux.netDevices: move {', '.join(devices)} to the container",
              "dolium.linux.link_calls", {"pid": deeds.PID_LATER, "devices": devices}, LIMIT_MS)
