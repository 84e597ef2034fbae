"""Limits as files of cgroup v2 (kernel Documentation/admin-guide/cgroup-v2.rst). Pure. Cold module."""

from __future__ import annotations

from dolium.linux.cgroup.v1 import rdma

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

Write = tuple[str, str]


def weight_of_shares(shares: int) -> int:
    """cpu.weight (1 to 10000) for v1 shares (2 to 262144), the linear map that runc and crun document."""
    return 0 if shares == 0 else 1 + ((shares - 2) * 9999) // 262142


def weight_of_blkio(weight: int) -> int:
    """io.weight (1 to 10000) for a blkio weight (10 to 1000)."""
    return 0 if weight == 0 else 1 + (weight - 10) * 9999 // 990


def _limit(value: int) -> str:
    return "max" if value < 0 else str(value)


def memory(limits: dict[str, Any]) -> list[Write]:
    """Memory and swap; the specification's swap counts both, v2's only swap."""
    writes: list[Write] = []
    limit, swap = limits.get("limit"), limits.get("swap")
    if limit:
        writes.append(("memory.max", _limit(limit)))
    if swap:
        if swap < 0:
            writes.append(("memory.swap.max", "max"))
        elif limit and limit > 0:
            writes.append(("memory.swap.max", str(max(swap - limit, 0))))
    if limits.get("reservation"):
        writes.append(("memory.low", _limit(limits["reservation"])))
    return writes


def cpu(limits: dict[str, Any]) -> list[Write]:
    """Shares as weight, quota and period as cpu.max, cpuset."""
    writes: list[Write] = []
    if limits.get("shares"):
        writes.append(("cpu.weight", str(weight_of_shares(limits["shares"]))))
    if limits.get("idle") is not None:
        writes.append(("cpu.idle", str(limits["idle"])))
    quota, period = limits.get("quota"), limits.get("period")
    if quota or period:
        writes.append(("cpu.max", f"{quota if quota and quota > 0 else 'max'} {period or 100000}"))
    if limits.get("burst") is not None:
        writes.append(("cpu.max.burst", str(limits["burst"])))
    if limits.get("cpus"):
        writes.append(("cpuset.cpus", limits["cpus"]))
    if limits.get("mems"):
        writes.append(("cpuset.mems", limits["mems"]))
    return writes


def block_io(limits: dict[str, Any]) -> list[Write]:
    """Weight and io.max."""
    writes: list[Write] = []
    if limits.get("weight"):
        writes.append(("io.weight", f"default {weight_of_blkio(limits['weight'])}"))
    writes.extend(("io.weight", f"{device['major']}:{device['minor']} {weight_of_blkio(device['weight'])}")
                  for device in limits.get("weightDevice") or [] if device.get("weight"))
    for key, word in (("throttleReadBpsDevice", "rbps"), ("throttleWriteBpsDevice", "wbps"),
                      ("throttleReadIOPSDevice", "riops"), ("throttleWriteIOPSDevice", "wiops")):
        writes.extend(("io.max", f"{device['major']}:{device['minor']} {word}={device['rate']}")
                      for device in limits.get(key) or [])
    return writes


def writes_for(resources: dict[str, Any]) -> list[Write]:
    """All writes for ``linux.resources`` but devices, which are a BPF program."""
    writes = memory(resources.get("memory") or {})
    writes += cpu(resources.get("cpu") or {})
    limit = (resources.get("pids") or {}).get("limit")
    if limit is not None:
        writes.append(("pids.max", str(limit) if limit > 0 else "max"))
    writes += block_io(resources.get("blockIO") or {})
    for entry in resources.get("hugepageLimits") or []:
        writes.append((f"hugetlb.{entry['pageSize']}.max", str(entry["limit"])))
    writes.extend(("rdma.max", line) for line in rdma(resources.get("rdma") or {}))
    writes.extend((file, str(value)) for file, value in (resources.get("unified") or {}).items())
    return writes


# What v1 alone has: no file of v2 means the same.
_GONE = (("memory", "swappiness"), ("memory", "disableOOMKiller"), ("memory", "kernelTCP"), ("cpu", "realtimePeriod"),
         ("cpu", "realtimeRuntime"), ("blockIO", "leafWeight"), ("network", "classID"), ("network", "priorities"))


def inconvertible(resources: dict[str, Any]) -> list[str]:
    """Fields of ``linux.resources`` that are set and that v2 cannot hold (config-linux.md, Unified: an error)."""
    return [f"{room}.{key}" for room, key in _GONE if (resources.get(room) or {}).get(key)]


def controllers_needed(writes: list[Write]) -> list[str]:
    """Controllers that must be in the parents' cgroup.subtree_control for these files to exist."""
    found = dict.fromkeys(file.split(".")[0] for file, _ in writes)
    return [name for name in found if name in ("cpu", "cpuset", "io", "memory", "pids", "hugetlb", "rdma")]
