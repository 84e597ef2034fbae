"""Limits as files of cgroup v1 (kernel Documentation/admin-guide/cgroup-v1). Pure. Cold module."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# A write: controller, file, value.
Write = tuple[str, str, str]

# Devices every container may use, as runc grants them: type, major, minor, access. None is a wildcard.
DEFAULT_DEVICES: tuple[tuple[str, int | None, int | None, str], ...] = (
    ("c", None, None, "m"),
    ("b", None, None, "m"),
    ("c", 1, 3, "rwm"),
    ("c", 1, 8, "rwm"),
    ("c", 1, 7, "rwm"),
    ("c", 5, 0, "rwm"),
    ("c", 1, 5, "rwm"),
    ("c", 1, 9, "rwm"),
    ("c", 136, None, "rwm"),
    ("c", 5, 2, "rwm"),
)


# Files that a kernel may lack, by the field that asks for them.
MAY_LACK = {
    "cpu.cfs_burst_us": "cpu.burst", "cpu.idle": "cpu.idle", "cpu.rt_period_us": "cpu.realtimePeriod",
    "cpu.rt_runtime_us": "cpu.realtimeRuntime", "memory.memsw.limit_in_bytes": "memory.swap",
    "memory.soft_limit_in_bytes": "memory.reservation", "memory.kmem.tcp.limit_in_bytes": "memory.kernelTCP",
    "memory.swappiness": "memory.swappiness", "memory.oom_control": "memory.disableOOMKiller",
    "blkio.weight": "blockIO.weight", "blkio.weight_device": "blockIO.weightDevice",
    "blkio.leaf_weight": "blockIO.leafWeight", "blkio.leaf_weight_device": "blockIO.weightDevice.leafWeight",
}


def memory(limits: dict[str, Any]) -> list[Write]:
    """``linux.resources.memory``; bytes, -1 is no limit, 0 as good as none given, as runc has it. The swap limit counts
    memory and swap together on v1."""
    writes: list[Write] = []
    limit, swap = limits.get("limit"), limits.get("swap")
    if limit:
        writes.append(("memory", "memory.limit_in_bytes", str(limit)))
    if swap:
        writes.append(("memory", "memory.memsw.limit_in_bytes", str(swap)))
    for key, file in (("reservation", "memory.soft_limit_in_bytes"), ("kernelTCP", "memory.kmem.tcp.limit_in_bytes"),
                      ("swappiness", "memory.swappiness")):
        if limits.get(key) or (key == "swappiness" and limits.get(key) is not None):
            writes.append(("memory", file, str(limits[key])))
    if limits.get("disableOOMKiller"):
        writes.append(("memory", "memory.oom_control", "1"))
    return writes


def cpu(limits: dict[str, Any]) -> list[Write]:
    """``linux.resources.cpu``: shares, quota and period in microseconds, realtime, cpus, mems; 0 is as good as none given,
    but of burst and idle."""
    writes: list[Write] = []
    for key, controller, file in (
        ("shares", "cpu", "cpu.shares"),
        ("period", "cpu", "cpu.cfs_period_us"),
        ("quota", "cpu", "cpu.cfs_quota_us"),
        ("burst", "cpu", "cpu.cfs_burst_us"),
        ("realtimePeriod", "cpu", "cpu.rt_period_us"),
        ("realtimeRuntime", "cpu", "cpu.rt_runtime_us"),
        ("idle", "cpu", "cpu.idle"),
        ("cpus", "cpuset", "cpuset.cpus"),
        ("mems", "cpuset", "cpuset.mems"),
    ):
        value = limits.get(key)
        if value or (value == 0 and key in ("burst", "idle")):
            writes.append((controller, file, str(value)))
    return writes


def pids(limits: dict[str, Any]) -> list[Write]:
    """``linux.resources.pids``: a limit of 0 or less means none."""
    limit = limits.get("limit")
    return [] if limit is None else [("pids", "pids.max", str(limit) if limit > 0 else "max")]


def block_io(limits: dict[str, Any], weights: str = "") -> list[Write]:
    """``linux.resources.blockIO``: weight (10 to 1000; ``weights``: as a layout has it) and throttles in bytes or operations
    a second."""
    writes: list[Write] = []
    for key, file in (("weight", f"blkio.{weights}weight"), ("leafWeight", "blkio.leaf_weight")):
        if limits.get(key):
            writes.append(("blkio", file, str(limits[key])))
        writes.extend(("blkio", f"{file}_device", f"{device['major']}:{device['minor']} {device[key]}")
                      for device in limits.get("weightDevice") or [] if device.get(key))
    for key, file in (
        ("throttleReadBpsDevice", "blkio.throttle.read_bps_device"),
        ("throttleWriteBpsDevice", "blkio.throttle.write_bps_device"),
        ("throttleReadIOPSDevice", "blkio.throttle.read_iops_device"),
        ("throttleWriteIOPSDevice", "blkio.throttle.write_iops_device"),
    ):
        writes.extend(("blkio", file, f"{device['major']}:{device['minor']} {device['rate']}")
                      for device in limits.get(key) or [])
    return writes


def devices(rules: list[dict[str, Any]]) -> list[Write]:
    """``linux.resources.devices``, then what every container may use. Rules are written in their order."""
    writes: list[Write] = []
    for rule in rules:
        kind = rule.get("type") or "a"
        file = "devices.allow" if rule.get("allow") else "devices.deny"
        if kind == "a" and rule.get("major") is None and rule.get("minor") is None:
            writes.append(("devices", file, "a"))
            continue
        for one in ("b", "c") if kind == "a" else (kind,):
            writes.append(("devices", file, f"{one} {_number(rule.get('major'))}:{_number(rule.get('minor'))} "
                                            f"{rule.get('access') or 'rwm'}"))
    if rules:
        writes.extend(("devices", "devices.allow", f"{kind} {_number(major)}:{_number(minor)} {access}")
                      for kind, major, minor, access in DEFAULT_DEVICES)
    return writes


def rdma(resources: dict[str, Any]) -> list[str]:
    """``linux.resources.rdma`` as values of rdma.max, the same in both versions: one a device."""
    words = (("hcaHandles", "hca_handle"), ("hcaObjects", "hca_object"))
    return [" ".join([name, *(f"{word}={limits[key]}" for key, word in words if limits.get(key) is not None)])
            for name, limits in (resources.get("rdma") or {}).items()]


def _number(value: int | None) -> str:
    return "*" if value is None or value < 0 else str(value)


def writes_for(resources: dict[str, Any], weights: str = "") -> list[Write]:
    """All writes for ``linux.resources`` in an order in which the kernel takes them; ``weights``: as a layout has it."""
    writes = memory(resources.get("memory") or {})
    writes += cpu(resources.get("cpu") or {})
    writes += pids(resources.get("pids") or {})
    writes += block_io(resources.get("blockIO") or {}, weights)
    for limit in resources.get("hugepageLimits") or []:
        for kind in ("", "rsvd."):
            writes.append(("hugetlb", f"hugetlb.{limit['pageSize']}.{kind}limit_in_bytes", str(limit["limit"])))
    writes.extend(("rdma", "rdma.max", value) for value in rdma(resources))
    network = resources.get("network") or {}
    if network.get("classID") is not None:
        writes.append(("net_cls", "net_cls.classid", str(network["classID"])))
    writes.extend(("net_prio", "net_prio.ifpriomap", f"{entry['name']} {entry['priority']}")
                  for entry in network.get("priorities") or [])
    return writes + devices(resources.get("devices") or [])
