"""Limits as files of cgroup v2 (kernel Documentation/admin-guide/cgroup-v2.rst). Pure. Cold module."""

from __future__ import annotations

from dolium.linux.cgroup.v1 import rdma

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

Write = tuple[str, str]

CONTROLLERS = ("cpu", "cpuset", "io", "memory", "pids", "hugetlb", "rdma", "misc")

# What only v1 has a file for: below ``linux.resources``, and what to say about it.
_V1_ONLY = {
    ("memory", "swappiness"): "there is no swappiness of a cgroup",
    ("memory", "disableOOMKiller"): "the OOM killer cannot be switched off",
    ("memory", "kernelTCP"): "TCP buffers have no limit of their own",
    ("cpu", "realtimePeriod"): "realtime tasks are not limited",
    ("cpu", "realtimeRuntime"): "realtime tasks are not limited",
    ("blockIO", "leafWeight"): "there are no leaf weights",
    ("network", "classID"): "packets are not tagged (match on the cgroup's path)",
    ("network", "priorities"): "packets are not tagged (match on the cgroup's path)",
}


# Files that a kernel may lack, by the field that asks for them.
MAY_LACK = {"memory.swap.max": "memory.swap", "cpu.idle": "cpu.idle", "cpu.max.burst": "cpu.burst",
            "io.weight": "blockIO.weight"}
NO_SWAP = ("0", "max")  # values of memory.swap.max that hold where there is no swap


def refused(resources: dict[str, Any]) -> tuple[str, str] | None:
    """The first field below ``linux.resources`` that v2 cannot hold, and why; None when all are fine."""
    for (room, key), why in _V1_ONLY.items():
        value = (resources.get(room) or {}).get(key)
        if value or (value == 0 and key == "swappiness"):
            return f"{room}.{key}", why
    for index, device in enumerate((resources.get("blockIO") or {}).get("weightDevice") or []):
        if device.get("leafWeight"):
            return f"blockIO.weightDevice[{index}].leafWeight", "there are no leaf weights"
    limits = resources.get("memory") or {}
    if (limits.get("swap") or 0) > 0 and (limits.get("limit") or 0) <= 0:
        return "memory.swap", "it counts memory and swap together, so it needs memory.limit beside it"
    return None


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
    elif limit and limit < 0:
        writes.append(("memory.swap.max", "max"))
    if limits.get("reservation"):
        writes.append(("memory.low", _limit(limits["reservation"])))
    return writes


def cpu(limits: dict[str, Any]) -> list[Write]:
    """Shares as weight, quota and period as cpu.max, cpuset."""
    writes: list[Write] = []
    if limits.get("shares"):
        writes.append(("cpu.weight", str(weight_of_shares(limits["shares"]))))
    if limits.get("idle") is not None:
        # an idle group has no weight: it is written before the group becomes idle, or after it ceased to be
        writes.insert(0 if limits["idle"] == 0 else len(writes), ("cpu.idle", str(limits["idle"])))
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


def block_io(limits: dict[str, Any], weights: str = "") -> list[Write]:
    """Weight (``weights``: as a layout has it; BFQ's are from 1 to 1000) and io.max."""
    writes: list[Write] = []
    file = f"io.{weights}weight"
    pairs = [("default", limits.get("weight")), *((f"{device['major']}:{device['minor']}", device.get("weight"))
                                                  for device in limits.get("weightDevice") or [])]
    writes += [(file, f"{of} {weight if weights else weight_of_blkio(weight)}") for of, weight in pairs if weight]
    for key, word in (("throttleReadBpsDevice", "rbps"), ("throttleWriteBpsDevice", "wbps"),
                      ("throttleReadIOPSDevice", "riops"), ("throttleWriteIOPSDevice", "wiops")):
        writes.extend(("io.max", f"{device['major']}:{device['minor']} {word}={device['rate']}")
                      for device in limits.get(key) or [])
    return writes


def writes_for(resources: dict[str, Any], weights: str = "") -> list[Write]:
    """All writes for ``linux.resources`` but devices, which are a BPF program; ``weights``: as a layout has it."""
    writes = memory(resources.get("memory") or {})
    writes += cpu(resources.get("cpu") or {})
    limit = (resources.get("pids") or {}).get("limit")
    if limit is not None:
        writes.append(("pids.max", str(limit) if limit > 0 else "max"))
    writes += block_io(resources.get("blockIO") or {}, weights)
    for entry in resources.get("hugepageLimits") or []:
        writes += [(f"hugetlb.{entry['pageSize']}.{kind}max", str(entry["limit"])) for kind in ("", "rsvd.")]
    writes.extend(("rdma.max", value) for value in rdma(resources))
    writes.extend((file, str(value)) for file, value in (resources.get("unified") or {}).items())
    return writes


def controllers_needed(writes: list[Write]) -> list[str]:
    """Controllers that must be in the parents' cgroup.subtree_control for these files to exist."""
    found = dict.fromkeys(file.split(".")[0] for file, _ in writes)
    return [name for name in found if name in CONTROLLERS]
