"""The systemd cgroup driver: a container's group is a scope that systemd made, with the same limits as properties and files.

systemd wants a process when it makes a scope, and gets the container's own: the child of clone3, before it goes on. The talk
over D-Bus is a program that the plan runs (deeds.py). Imported by containers that have a unit alone.
"""

from __future__ import annotations

from dolium.errors import Unimplemented
from dolium.linux.cgroup import systemd
from dolium.runtime import deeds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dolium.linux.cgroup import tree
    from dolium.runtime.facts import Facts
    from dolium.runtime.plan import Plan

BOOTED = "/run/systemd/system"  # sd_booted(3)
CALLS = "dolium.linux.cgroup.systemd_calls"
LIMIT_MS = 90_000  # each call in it has a deadline of its own


class Driver:
    """Where systemd is asked. ``uid`` 0: the system's manager, else that user's."""

    def __init__(self, env: dict[str, str], uid: int) -> None:
        self.uid = uid
        if uid == 0:
            self.bus = env.get("DBUS_SYSTEM_BUS_ADDRESS") or "unix:path=/run/dbus/system_bus_socket"
        else:
            self.bus = (env.get("DBUS_SESSION_BUS_ADDRESS")
                        or f"unix:path={env.get('XDG_RUNTIME_DIR') or f'/run/user/{uid}'}/bus")

    def request(self, verb: str, unit: str, **more: Any) -> dict[str, Any]:
        """What systemd_calls.py reads."""
        return {"verb": verb, "bus": self.bus, "uid": self.uid, "unit": unit, **more}

    def start(self, plan: Plan, stage: int, unit: systemd.Unit, identity: str, annotations: dict[str, str],
              resources: dict[str, Any]) -> None:
        """Put the child into a new scope. A name in use is another's: nothing is undone then."""
        wanted = systemd.start_properties(unit, identity, annotations, systemd.properties(resources))
        deeds.add(plan, stage, f"start systemd unit {unit.name}", CALLS,
                  self.request("start", unit.name, pid=deeds.PID_LATER, group=unit.group, properties=wanted), LIMIT_MS,
                  nothing_ours=True)

    def hold(self, plan: Plan, stage: int, unit: systemd.Unit, identity: str, annotations: dict[str, str],
             resources: dict[str, Any]) -> None:
        """A new scope for processes that somebody else makes: until then one of ours is in it (ten minutes at most)."""
        wanted = systemd.start_properties(unit, identity, annotations, systemd.properties(resources))
        deeds.add(plan, stage, f"start systemd unit {unit.name}", CALLS,
                  self.request("hold", unit.name, group=unit.group, properties=wanted), LIMIT_MS, nothing_ours=True)

    def stop(self, plan: Plan, stage: int, unit: str) -> None:
        """Stop the scope. Without systemd's answer the rest of a clean-up goes on: an empty scope goes away by itself."""
        deeds.add(plan, stage, f"stop systemd unit {unit}", CALLS, self.request("stop", unit), LIMIT_MS, optional=True)

    def change(self, plan: Plan, stage: int, unit: str, resources: dict[str, Any], *, optional: bool = False) -> None:
        """New limits as properties; none when systemd has no property for any of them."""
        changed = systemd.properties(resources)
        if changed:
            deeds.add(plan, stage, f"set properties of systemd unit {unit}", CALLS,
                      self.request("set", unit, properties=changed), LIMIT_MS, optional=optional)


def require(facts: Facts, layout: tree.Layout) -> None:
    """Raises Unimplemented where there is no systemd to ask, or cgroup v1 hierarchies beside it."""
    if facts.stat(BOOTED) is None:
        raise Unimplemented("--systemd-cgroup: this host was not booted with systemd (there is no /run/systemd/system)",
                            hint="leave the flag out: the cgroupfs driver needs no systemd")
    if not layout.pure_v2:
        raise Unimplemented("--systemd-cgroup: this host has cgroup v1 hierarchies; the systemd driver is for cgroup v2",
                            hint="boot with systemd.unified_cgroup_hierarchy=1, or leave the flag out")
