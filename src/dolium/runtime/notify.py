"""``NOTIFY_SOCKET``: a container's readiness reaches the manager that waits for it (sd_notify(3)), as runc passes it on.
Pure. Cold module, imported only where the caller's environment names one.

The container gets a socket of its own, at ``/run/notify/notify.sock``: the manager's may be out of its reach, and would take
whatever it is told. From ``start`` on a program of ours listens there (``linux/notify_calls.py``), passes READY=1 on, once,
and ends. ``start`` and ``run --detach`` return then, or when the container has ended.
"""

from __future__ import annotations

from dolium.linux import mounts as km
from dolium.runtime import deeds, state
from dolium.runtime import plan as P

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dolium.runtime.facts import Facts
    from dolium.runtime.plan import Plan

INSIDE = "/run/notify"
SOCKET = "notify.sock"
FOLDER, HELPER = "notify", "notify.helper"  # in the state folder: what is bound, and who listens
CURSOR = b"notify"
LOOK_MS = 50
LIMIT_MS = 10_000


def prepare(plan: Plan, folder: str, process: dict[str, Any]) -> None:
    """The folder that the container sees, and its environment."""
    plan.add(P.PARENT_BEFORE_CLONE, "mkdir", f"make {folder}/{FOLDER}", f"{folder}/{FOLDER}", 0o755, 0)
    kept = [entry for entry in process.get("env") or [] if not entry.startswith("NOTIFY_SOCKET=")]
    process["env"] = [*kept, f"NOTIFY_SOCKET={INSIDE}/{SOCKET}"]


def bind(plan: Plan, stage: int, source: str, slot: int) -> None:
    """Show it in the container: nothing can be made in it from there."""
    attributes = km.ATTR_RDONLY | km.ATTR_NOSUID | km.ATTR_NODEV | km.ATTR_NOEXEC
    plan.add(stage, "open_tree", f"NOTIFY_SOCKET: {source}", slot, source, 0, 1)
    plan.add(stage, "mount_attr", f"attributes of {INSIDE}", slot, attributes, 0, km.MS_PRIVATE, 0, -1)
    plan.add(P.CHILD_BEFORE_PIVOT, "mount_tree", f"bind {source} on {INSIDE}", slot, INSIDE, 1, 0)


def listen(plan: Plan, stage: int, folder: str, host: str, pid: int, *, main: bool, nothing_ours: bool = False) -> None:
    """Have somebody listen before the program runs. ``main``: the manager is told the container's pid too: the caller
    will not be there. ``nothing_ours``: of the operation."""
    deeds.add(plan, stage, f"NOTIFY_SOCKET: listen for {folder}", "dolium.linux.notify_calls",
              {"socket": f"{folder}/{FOLDER}/{SOCKET}", "helper": f"{folder}/{HELPER}", "host": host, "pid": pid,
               "main": main}, LIMIT_MS, nothing_ours=nothing_ours)


def wait(plan: Plan) -> None:
    """Come back to see whether it is ready."""
    plan.add(P.PARENT_BEFORE_CLONE, "again", "wait for READY=1", LOOK_MS, CURSOR)


def look(plan: Plan, facts: Facts, folder: str) -> Plan:
    """Done, when the one who listens has ended."""
    text = (facts.read(f"{folder}/{HELPER}") or b"").split()
    if len(text) == 2 and state.alive(facts, int(text[0]), int(text[1])):
        wait(plan)
    return plan
