"""``update`` and ``events``: limits of a running container, and what it uses. Imported by those commands only."""

from __future__ import annotations

import json

from dolium.errors import FailedPrecondition, InvalidArgument
from dolium.runtime import cgroups, state
from dolium.runtime import plan as P
from dolium.runtime.plan import Plan
from dolium.runtime.spec import load
from dolium.runtime.statistics import UNLIMITED, Folders, statistics

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dolium.linux.cgroup import tree
    from dolium.runtime.facts import Facts
    from dolium.runtime.lifecycle import Context

TICK_MS = 1000  # how often `events` looks for an OOM kill

# flag: where in linux.resources, and what it is: a number, bytes (64m; -1 is no limit), a text
UPDATE_FLAGS: dict[str, tuple[str, str, str]] = {
    "blkio-weight": ("blockIO", "weight", "number"),
    "cpu-period": ("cpu", "period", "number"),
    "cpu-quota": ("cpu", "quota", "number"),
    "cpu-burst": ("cpu", "burst", "number"),
    "cpu-share": ("cpu", "shares", "number"),
    "cpu-rt-period": ("cpu", "realtimePeriod", "number"),
    "cpu-rt-runtime": ("cpu", "realtimeRuntime", "number"),
    "cpuset-cpus": ("cpu", "cpus", "text"),
    "cpuset-mems": ("cpu", "mems", "text"),
    "cpu-idle": ("cpu", "idle", "number"),
    "memory": ("memory", "limit", "bytes"),
    "memory-reservation": ("memory", "reservation", "bytes"),
    "memory-swap": ("memory", "swap", "bytes"),
    "pids-limit": ("pids", "limit", "number"),
}


def _value(flag: str, kind: str, text: str) -> int | str:
    if kind == "text":
        return text
    digits, factor = text, 1
    if kind == "bytes" and text[-1:].lower() in ("b", "k", "m", "g", "t"):
        digits, factor = text[:-1], 1024 ** "bkmgt".index(text[-1].lower())
    try:
        return int(digits) * factor
    except ValueError:
        raise InvalidArgument(f"invalid value {text!r} for --{flag}") from None


def wished(options: dict[str, Any], facts: Facts, path: str) -> dict[str, Any]:
    """``linux.resources`` of an update, from its flags or from a file (``path``; "-" is standard input)."""
    if path:
        text = facts.stdin() if path == "-" else facts.read(path)
        if text is None:
            raise InvalidArgument(f"resources file {path}: no such file")
        try:
            given = json.loads(text)
        except ValueError as error:
            raise InvalidArgument(f"resources {path} are not valid JSON: {error}") from error
        if not isinstance(given, dict):
            raise InvalidArgument(f"resources {path}: the top level must be an object")
        # unchanged values may be left out or be 0, as in runc's own form
        return {room: {key: value for key, value in part.items() if value not in (0, "", None)}
                if isinstance(part, dict) else part for room, part in given.items()}
    found: dict[str, Any] = {}
    for flag, (room, key, kind) in UPDATE_FLAGS.items():
        if flag in options and (value := _value(flag, kind, options[flag])) not in (0, ""):
            found.setdefault(room, {})[key] = value
    return found


def schemata(options: dict[str, Any], path: str) -> dict[str, str]:
    """What an update's flags say of ``linux.intelRdt``; with a file they are ignored, as all others."""
    flags = {"l3-cache-schema": "l3CacheSchema", "mem-bw-schema": "memBwSchema"}
    return {} if path else {key: options[flag] for flag, key in flags.items() if options.get(flag)}


def _shown(value: int) -> int:
    return UNLIMITED if value < 0 else value


def update(context: Context, facts: Facts, identity: str, resources: dict[str, Any], rdt: dict[str, str]) -> Plan:
    """``update``: write the limits that are named, leave the others; ``rdt``: of ``linux.intelRdt``. Nothing is left half
    changed: what was written before a refusal is written back."""
    where = state.load(facts, context.root, identity)
    if state.status(facts, where) == "stopped":
        raise FailedPrecondition(f"container not running: {identity}")
    if not where.folders and not rdt:
        raise FailedPrecondition(f"container {identity} has no cgroup of its own: its caller had no right to make one")
    text = facts.read(f"{where.folder}/config.json")
    if text is None:
        raise FailedPrecondition(f"{where.folder}/config.json is missing")
    config = load(text, f"{where.folder}/config.json")
    before = (config.get("linux") or {}).get("resources") or {}
    memory = resources.get("memory") or {}
    if memory.get("limit") == -1 and not memory.get("swap") and (before.get("memory") or {}).get("swap"):
        resources = {**resources, "memory": {**memory, "swap": -1}}  # it counts both: no limit of one means none of both
    merged = json.loads(text)
    kept = merged.setdefault("linux", {}).setdefault("resources", {})
    for room, part in resources.items():
        kept[room] = {**(kept.get(room) or {}), **part} if isinstance(part, dict) else part
    try:
        load(json.dumps(merged).encode(), "update")
    except InvalidArgument as error:
        raise InvalidArgument(error.message.replace("config.json: linux.", ""), hint=error.hint) from None
    if "devices" in resources and not isinstance(resources["devices"], list):
        raise InvalidArgument("resources: devices: must be an array")
    layout = cgroups.layout(facts)
    files = Folders(facts, layout, where.folders)
    wanted = {**resources, "memory": _complete_memory(files, resources, config)}
    try:
        cgroups.check(facts, layout, wanted)
    except InvalidArgument as error:
        raise InvalidArgument(error.message.replace("config.json: linux.", ""), hint=error.hint) from None
    _check_memory(files, wanted["memory"])
    plan = Plan()
    plan.add(P.PARENT_BEFORE_CLONE, "lock", f"lock {where.folder}", where.folder)
    group = _group(layout, where.folders) if where.folders else ""
    if where.unit:
        from dolium.runtime.systemd import Driver

        driver = Driver(context.env, context.uid)
        driver.change(plan, P.PARENT_BEFORE_CLONE, where.unit, wanted)
        driver.change(plan, P.ON_FAILURE, where.unit, {room: before[room] for room in wanted if room in before},
                      optional=True)
    if layout.pure_v2:
        cgroups.enable_controllers(plan, P.PARENT_BEFORE_CLONE, group, wanted)
    cgroups.add_limits(plan, P.PARENT_BEFORE_CLONE, layout, group, wanted)
    _swap_in_order(plan, files, wanted["memory"])
    # the files of v1's device rules cannot be read: the rules before are written again
    written = [op for op in plan.named("cg_write")
               if not str(op.args[0]).endswith(("/cgroup.subtree_control", "/devices.allow", "/devices.deny"))]
    facts.want(*(f"read:{op.args[0]}" for op in written))
    for op in reversed(written):
        was = (facts.read(str(op.args[0])) or b"").strip()
        if was:
            plan.add(P.ON_FAILURE, "cg_write", f"put {op.args[0]} back", op.args[0], was, 1, optional=True)
    if resources.get("devices"):
        rules = before.get("devices") or [{"allow": True}]
        cgroups.add_limits(plan, P.ON_FAILURE, layout, group, {"devices": rules})
    if rdt:
        from dolium.runtime import rdt as resctrl

        resctrl.update(plan, facts, merged, identity, where.pid, rdt)
    path = f"{where.folder}/config.json"
    plan.add(P.PARENT_BEFORE_CLONE, "write_file", f"write {path}", path,
             json.dumps(merged).encode().replace(b"\x01", b"\x01\x01"), 0o600, 1)
    return plan


def _group(layout: tree.Layout, folders: list[str]) -> str:
    base = layout.folders[0] if layout.folders else layout.unified or ""
    return folders[0].removeprefix(base)


def _complete_memory(files: Folders, resources: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """v2 counts swap alone, the specification both: a new swap limit needs the memory limit that holds."""
    memory = dict(resources.get("memory") or {})
    if not files.layout.v1 and memory.get("swap") and not memory.get("limit"):
        before = (((config.get("linux") or {}).get("resources") or {}).get("memory") or {}).get("limit")
        if before and before > 0:
            memory["limit"] = before
    return memory


def _check_memory(files: Folders, memory: dict[str, Any]) -> None:
    """``memory.checkBeforeUpdate``: a limit below what is used now would kill (config-linux.md, Memory)."""
    limit = memory.get("limit") or 0
    if not memory.get("checkBeforeUpdate") or limit <= 0:
        return
    usage = files.number("memory", "memory.usage_in_bytes" if files.layout.v1 else "memory.current")
    if usage is not None and usage > limit:
        raise FailedPrecondition(f"unable to set memory limit to {limit} (current usage: {usage})",
                                 hint="memory.checkBeforeUpdate refuses a limit that the container is above already")


def _swap_in_order(plan: Plan, files: Folders, memory: dict[str, Any]) -> None:
    """v1 holds limit <= memory and swap at every moment: when both rise, memory and swap together goes first."""
    if not files.layout.v1 or memory.get("limit") is None or memory.get("swap") is None:
        return
    now = files.number("memory", "memory.memsw.limit_in_bytes")
    if now is None or _shown(memory["limit"]) <= now:
        return
    ops = plan.ops
    at = [number for number, op in enumerate(ops) if str(op.args[0]).endswith(
        ("/memory.limit_in_bytes", "/memory.memsw.limit_in_bytes"))]
    if len(at) == 2:
        ops[at[0]], ops[at[1]] = ops[at[1]], ops[at[0]]


# -- events --


def milliseconds(text: str) -> int:
    """Of a Go duration: 5s, 500ms, 1m30s. Raises InvalidArgument."""
    units = {"h": 3_600_000.0, "m": 60_000.0, "s": 1000.0, "ms": 1.0, "us": 0.001, "ns": 0.000001}
    total, at = 0.0, 0
    while at < len(text):
        start = at
        while at < len(text) and (text[at].isdigit() or text[at] == "."):
            at += 1
        middle = at
        while at < len(text) and not (text[at].isdigit() or text[at] == "."):
            at += 1
        number, unit = text[start:middle], text[middle:at]
        if unit not in units or not number.strip(".") or number.count(".") > 1 or not number.isascii():
            raise InvalidArgument(f"invalid duration {text!r}", hint="write 5s, 500ms or 1m30s")
        total += float(number) * units[unit]
    if total < 1:
        raise InvalidArgument("duration interval must be greater than 0")
    return int(total)


def _oom_kills(files: Folders) -> int:
    file = "memory.oom_control" if files.layout.v1 else "memory.events"
    return files.table("memory", file).get("oom_kill", 0)


def events(context: Context, facts: Facts, identity: str, *, interval: int, once: bool, cursor: bytes) -> Plan:
    """``events``: a line of statistics every ``interval`` milliseconds and one for each OOM kill, until the container ends;
    ``once``: the statistics alone. ``cursor`` is what the call before handed on: OOM kills seen, milliseconds to wait."""
    where = state.load(facts, context.root, identity)
    status = state.status(facts, where)
    if status == "stopped":
        if cursor:
            return Plan()
        raise FailedPrecondition(f"container {identity} is not running")
    files = Folders(facts, cgroups.layout(facts), where.folders)
    plan = Plan()

    def say(kind: str, data: dict[str, Any] | None = None) -> None:
        line = {"type": kind, "id": identity, **({"data": data} if data is not None else {})}
        plan.add(P.PARENT_BEFORE_CLONE, "print", "print", 1, json.dumps(line, separators=(",", ":")) + "\n")

    if once:
        say("stats", statistics(files, cgroups.page_sizes(facts)))
        return plan
    kills = _oom_kills(files)
    seen, left = (int(part) for part in cursor.split()) if cursor else (kills, interval)
    if kills > seen:
        say("oom")
    if left <= 0:
        say("stats", statistics(files, cgroups.page_sizes(facts)))
        left = interval
    pause = min(left, TICK_MS)
    plan.add(P.PARENT_BEFORE_CLONE, "again", "wait", pause, f"{kills} {left - pause}")
    return plan
