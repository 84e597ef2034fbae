"""``linux.intelRdt``: a class of service in resctrl (config-linux.md, IntelRdt; the kernel's resctrl documentation).
Pure. Cold module, imported only when it is asked for."""

from __future__ import annotations

from dolium.runtime import plan as P
from dolium.runtime.plan import PID
from dolium.runtime.spec import strings, take, wrong

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dolium.runtime.facts import Facts
    from dolium.runtime.plan import Plan

ROOT = "/sys/fs/resctrl"
FIELD = "linux.intelRdt"
_MONITORS = {"enableCMT": b"llc_occupancy", "enableMBM": b"mbm_total_bytes"}


def _lines(rdt: dict[str, Any]) -> list[str]:
    """The lines of ``schemata``, in the order in which they are written."""
    cache, bandwidth = rdt.get("l3CacheSchema") or "", rdt.get("memBwSchema") or ""
    found = [line for line in cache.split("\n") if line and not (bandwidth and line.startswith("MB:"))]
    found += [bandwidth] if bandwidth else []
    given = rdt.get("schemata") or []
    return found + (given.split("\n") if isinstance(given, str) else given)


def check(rdt: dict[str, Any]) -> None:
    """Refuse what cannot be written. Raises InvalidArgument naming the field."""
    for key in ("closID", "l3CacheSchema", "memBwSchema"):
        take(rdt, key, "string", FIELD)
    for key in ("enableCMT", "enableMBM", "enableMonitoring"):
        take(rdt, key, "boolean", FIELD)
    if not isinstance(rdt.get("schemata"), str):
        strings(rdt, "schemata", FIELD)
    name = rdt.get("closID")
    if name is not None and (not name or name.startswith(".") or "/" in name or "\n" in name
                             or name in ("info", "mon_data", "mon_groups")):
        raise wrong(f"{FIELD}.closID", f"{name!r} is not the name of a class of service")
    bandwidth = rdt.get("memBwSchema")
    if bandwidth and (not bandwidth.startswith("MB:") or "\n" in bandwidth):
        raise wrong(f"{FIELD}.memBwSchema", "must be one line that begins with MB:")


def _told(text: bytes) -> set[str]:
    """Lines as they are compared: the kernel pads them, and the order of domains does not matter."""
    found = set()
    for line in text.decode("utf-8", "replace").splitlines():
        resource, _, domains = line.strip().partition(":")
        for domain in domains.split(";"):
            number, _, value = domain.partition("=")
            found.add(f"{resource}:{number.strip()}={value.strip().lstrip('0') or '0'}")
    return found


def folders(rdt: dict[str, Any], identity: str) -> list[str]:
    """What a container has of its own there, innermost first: to be removed with it."""
    own = [] if rdt.get("closID") else [f"{ROOT}/{identity}"]
    return [f"{ROOT}/{rdt.get('closID') or identity}/mon_groups/{identity}", *own] if rdt.get("enableMonitoring") else own


def add(plan: Plan, rdt: dict[str, Any], identity: str, facts: Facts) -> None:
    """Make or check the class of service, put init into it. Raises InvalidArgument where there is no resctrl."""
    if facts.stat(f"{ROOT}/schemata") is None:
        raise wrong(FIELD, f"there is no resctrl file system at {ROOT}",
                    "mount it (mount -t resctrl resctrl /sys/fs/resctrl) where the processor has RDT, or leave it out")
    for key, feature in _MONITORS.items():
        if rdt.get(key) and feature not in (facts.read(f"{ROOT}/info/L3_MON/mon_features") or b"").split():
            raise wrong(f"{FIELD}.{key}", "the processor cannot monitor that")
    folder, lines = f"{ROOT}/{rdt.get('closID') or identity}", _lines(rdt)
    there = facts.read(f"{folder}/schemata") if rdt.get("closID") else None
    if rdt.get("closID") and there is None and not lines:
        raise wrong(f"{FIELD}.closID", f"{folder} does not exist, and no schema is given to make it with")
    if there is not None and not _told("\n".join(lines).encode()) <= _told(there):
        raise wrong(f"{FIELD}.closID", f"{folder} exists with another schemata")
    if there is None:
        plan.add(P.PARENT_BEFORE_CLONE, "mkdir", f"{FIELD}: make {folder}", folder, 0o755, 0 if rdt.get("closID") else 2)
        for line in lines:
            plan.add(P.PARENT_BEFORE_CLONE, "cg_write", f"{FIELD}: write {line} to {folder}", f"{folder}/schemata",
                     f"{line}\n", 0)
    if rdt.get("enableMonitoring"):
        group = f"{folder}/mon_groups/{identity}"
        plan.add(P.PARENT_BEFORE_CLONE, "mkdir", f"{FIELD}.enableMonitoring: make {group}", group, 0o755, 2)
    join(plan, rdt, identity)
    remove(plan, P.ON_FAILURE, rdt, identity)


def join(plan: Plan, rdt: dict[str, Any], identity: str) -> None:
    """Put the new process into the class of service, then into the group that is monitored: in this order."""
    groups = [f"{ROOT}/{rdt.get('closID') or identity}"]
    if rdt.get("enableMonitoring"):
        groups.append(f"{groups[0]}/mon_groups/{identity}")
    for group in groups:
        plan.add(P.PARENT_AFTER_CLONE, "write_file", f"{FIELD}: put the process into {group}", f"{group}/tasks", PID, 0o644,
                 0)


def update(plan: Plan, facts: Facts, config: dict[str, Any], identity: str, pid: int, wished: dict[str, str]) -> None:
    """``update --l3-cache-schema`` and ``--mem-bw-schema``: the lines that are named, in the container's class of
    service; one that had none gets one of its own, as with runc. ``config`` is changed. Raises InvalidArgument."""
    linux = config.setdefault("linux", {})
    had = linux.get("intelRdt")
    check(wished)
    if facts.stat(f"{ROOT}/schemata") is None:
        raise wrong(FIELD, f"there is no resctrl file system at {ROOT}",
                    "mount it (mount -t resctrl resctrl /sys/fs/resctrl) where the processor has RDT")
    folder = f"{ROOT}/{(had or {}).get('closID') or identity}"
    before = facts.read(f"{folder}/schemata")
    if before is None:
        plan.add(P.PARENT_BEFORE_CLONE, "mkdir", f"{FIELD}: make {folder}", folder, 0o755, 0)
        plan.add(P.ON_FAILURE, "cg_rmdir", f"{FIELD}: remove {folder}", folder)
        plan.add(P.PARENT_BEFORE_CLONE, "write_file", f"{FIELD}: put init into {folder}", f"{folder}/tasks", str(pid), 0o644,
                 0)
    for line in _lines(wished):
        plan.add(P.PARENT_BEFORE_CLONE, "cg_write", f"{FIELD}: write {line} to {folder}", f"{folder}/schemata", f"{line}\n",
                 0)
    for kept in (before or b"").splitlines():
        plan.add(P.ON_FAILURE, "cg_write", f"{FIELD}: put {folder} back", f"{folder}/schemata", kept.strip() + b"\n", 0,
                 optional=True)
    linux["intelRdt"] = {**(had or {}), **wished}


def remove(plan: Plan, stage: int, rdt: dict[str, Any], identity: str) -> None:
    """Take away what the container had of its own."""
    for folder in folders(rdt, identity):
        plan.add(stage, "cg_rmdir", f"{FIELD}: remove {folder}", folder)
