"""Scheduling, I/O priority, CPU affinity, personality and memory policy of a process: from the specification's words to what
the kernel's calls take (config.md, Linux Process; config-linux.md). Pure. Cold module."""

from __future__ import annotations

from dolium.runtime.spec import wrong

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dolium.runtime.plan import Plan

POLICIES = {"SCHED_OTHER": 0, "SCHED_FIFO": 1, "SCHED_RR": 2, "SCHED_BATCH": 3, "SCHED_ISO": 4, "SCHED_IDLE": 5,
            "SCHED_DEADLINE": 6}
SCHED_FLAGS = {"SCHED_FLAG_RESET_ON_FORK": 1, "SCHED_FLAG_RECLAIM": 2, "SCHED_FLAG_DL_OVERRUN": 4,
               "SCHED_FLAG_KEEP_POLICY": 8, "SCHED_FLAG_KEEP_PARAMS": 16, "SCHED_FLAG_UTIL_CLAMP_MIN": 32,
               "SCHED_FLAG_UTIL_CLAMP_MAX": 64}
IO_CLASSES = {"IOPRIO_CLASS_RT": 1, "IOPRIO_CLASS_BE": 2, "IOPRIO_CLASS_IDLE": 3}
DOMAINS = {"LINUX": 0, "LINUX32": 8}
MEMORY_MODES = {"MPOL_DEFAULT": 0, "MPOL_PREFERRED": 1, "MPOL_BIND": 2, "MPOL_INTERLEAVE": 3, "MPOL_LOCAL": 4,
                "MPOL_PREFERRED_MANY": 5, "MPOL_WEIGHTED_INTERLEAVE": 6}
MEMORY_FLAGS = {"MPOL_F_NUMA_BALANCING": 1 << 13, "MPOL_F_RELATIVE_NODES": 1 << 14, "MPOL_F_STATIC_NODES": 1 << 15}
SCHED_ATTR_SIZE = 48
NODES_MAX = 1024


def _word(words: dict[str, int], value: object, field: str) -> int:
    if not isinstance(value, str) or value not in words:
        raise wrong(field, f"{value!r} is none of {', '.join(words)}")
    return words[value]


def _number(value: object, field: str, low: int, high: int) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise wrong(field, f"{value!r} is not a number from {low} to {high}")
    return value


def _object(value: object, field: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong(field, "must be an object")
    return value


def _flags(words: dict[str, int], given: object, field: str) -> int:
    if given is not None and not isinstance(given, list):
        raise wrong(field, "must be an array")
    total = 0
    for index, name in enumerate(given or []):
        total |= _word(words, name, f"{field}[{index}]")
    return total


def scheduler(given: object, field: str) -> bytes:
    """``struct sched_attr`` (sched_setattr(2)) of ``process.scheduler``. Raises InvalidArgument."""
    value = _object(given, field)
    policy = _word(POLICIES, value.get("policy"), f"{field}.policy")
    u64 = (1 << 64) - 1
    nice = _number(value.get("nice"), f"{field}.nice", -20, 19)
    priority = _number(value.get("priority"), f"{field}.priority", 0, 99)
    if priority and policy not in (1, 2):
        raise wrong(f"{field}.priority", "is for SCHED_FIFO and SCHED_RR alone")
    times = [_number(value.get(key), f"{field}.{key}", 0, u64) for key in ("runtime", "deadline", "period")]
    if any(times) and policy != POLICIES["SCHED_DEADLINE"]:
        raise wrong(f"{field}.runtime", "runtime, deadline and period are for SCHED_DEADLINE alone")
    parts = [(SCHED_ATTR_SIZE, 4), (policy, 4), (_flags(SCHED_FLAGS, value.get("flags"), f"{field}.flags"), 8),
             (nice & 0xFFFFFFFF, 4), (priority, 4), *((time, 8) for time in times)]
    return b"".join(number.to_bytes(size, "little") for number, size in parts)


def io_priority(given: object, field: str) -> int:
    """What ioprio_set(2) takes for ``process.ioPriority``. Raises InvalidArgument."""
    value = _object(given, field)
    priority = _number(value.get("priority"), f"{field}.priority", 0, 7)
    return _word(IO_CLASSES, value.get("class"), f"{field}.class") << 13 | priority


def numbers(text: object, field: str, limit: int = 8192) -> set[int]:
    """The numbers of a list as cpuset(7) writes it: 0-3,7. Raises InvalidArgument."""
    found: set[int] = set()
    for part in str(text).split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        digits = first.isascii() and first.isdigit() and last.isascii() and last.isdigit()
        if not digits or not int(first) <= int(last) < limit:
            raise wrong(field, f"{text!r} is not a list like 0-3,7")
        found.update(range(int(first), int(last) + 1))
    return found


def mask(members: set[int]) -> bytes:
    """A bit mask of whole 64-bit longs."""
    value = 0
    for number in members:
        value |= 1 << number
    return value.to_bytes((max(members, default=0) // 64 + 1) * 8, "little")


def affinity(given: object, field: str) -> dict[str, bytes]:
    """``initial`` and ``final`` masks of ``process.execCPUAffinity``, those that are named. Raises InvalidArgument."""
    value = _object(given, field)
    return {key: mask(numbers(value[key], f"{field}.{key}")) for key in ("initial", "final") if value.get(key)}


def personality(given: object, field: str) -> int:
    """What personality(2) takes for ``linux.personality``. Raises InvalidArgument."""
    value = _object(given, field)
    if value.get("flags"):
        raise wrong(f"{field}.flags", "the specification names no flag yet")
    return _word(DOMAINS, value.get("domain"), f"{field}.domain")


def memory_policy(given: object, field: str) -> tuple[int, bytes]:
    """(mode with flags, mask of nodes) of ``linux.memoryPolicy`` for set_mempolicy(2). Raises InvalidArgument."""
    value = _object(given, field)
    mode = _word(MEMORY_MODES, value.get("mode"), f"{field}.mode")
    nodes = mask(numbers(value["nodes"], f"{field}.nodes", NODES_MAX)) if value.get("nodes") else b""
    if mode in (MEMORY_MODES["MPOL_BIND"], MEMORY_MODES["MPOL_INTERLEAVE"]) and not nodes:
        raise wrong(f"{field}.nodes", f"{value['mode']} needs nodes")
    # the kernel counts one bit less than it is told
    return mode | _flags(MEMORY_FLAGS, value.get("flags"), f"{field}.flags"), nodes + bytes(8) if nodes else b""


def check(process: dict[str, Any], field: str) -> None:
    """Refuse what the kernel could not be given. Raises InvalidArgument naming the field."""
    for key, read in (("scheduler", scheduler), ("ioPriority", io_priority), ("execCPUAffinity", affinity)):
        if process.get(key) is not None:
            read(process[key], f"{field}.{key}")


def add(plan: Plan, stage: int, process: dict[str, Any]) -> None:
    """Scheduling and I/O priority, while the process still has the rights to raise them."""
    if process.get("scheduler") is not None:
        plan.add(stage, "scheduler", f"set process.scheduler {process['scheduler']['policy']}",
                 scheduler(process["scheduler"], "process.scheduler"))
    if process.get("ioPriority") is not None:
        plan.add(stage, "io_priority", f"set process.ioPriority {process['ioPriority']['class']}",
                 io_priority(process["ioPriority"], "process.ioPriority"))
