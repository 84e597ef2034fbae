"""The kinds of ``linux.resources`` and ``linux.timeOffsets`` (config-linux.md): what is no number is named before a file of
a cgroup is written. Cold module."""

from __future__ import annotations

from dolium.runtime.spec import objects, take, wrong

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# room: (integers, booleans, strings)
_ROOMS: dict[str, tuple[str, str, str]] = {
    "memory": ("limit reservation swap kernel kernelTCP swappiness", "disableOOMKiller useHierarchy checkBeforeUpdate", ""),
    "cpu": ("shares quota burst period realtimeRuntime realtimePeriod idle", "", "cpus mems"),
    "pids": ("limit", "", ""),
    "blockIO": ("weight leafWeight", "", ""),
    "network": ("classID", "", ""),
}
# list, where: (integers that must be there, integers, strings that must be there)
_LISTS: dict[tuple[str, str], tuple[str, str, str]] = {
    ("blockIO", "weightDevice"): ("major minor", "weight leafWeight", ""),
    **{("blockIO", f"throttle{way}Device"): ("major minor rate", "", "")
       for way in ("ReadBps", "WriteBps", "ReadIOPS", "WriteIOPS")},
    ("network", "priorities"): ("priority", "", "name"),
    ("", "hugepageLimits"): ("limit", "", "pageSize"),
}


def check_resources(resources: dict[str, Any]) -> None:
    """Raises InvalidArgument naming the field."""
    for room, (integers, booleans, texts) in _ROOMS.items():
        field = f"linux.resources.{room}"
        part = take(resources, room, "object", "linux.resources") or {}
        for kind, keys in (("integer", integers), ("boolean", booleans), ("string", texts)):
            for key in keys.split():
                take(part, key, kind, field)
    for (room, key), (needed, integers, texts) in _LISTS.items():
        parent = (resources.get(room) or {}) if room else resources
        field = f"linux.resources.{room}" if room else "linux.resources"
        for index, entry in enumerate(objects(parent, key, field)):
            where = f"{field}.{key}[{index}]"
            for name in needed.split():
                take(entry, name, "integer", where, required=True)
            for name in integers.split():
                take(entry, name, "integer", where)
            for name in texts.split():
                if "/" in take(entry, name, "string", where, required=True):
                    raise wrong(f"{where}.{name}", "must not contain '/'")
    for name, device in (take(resources, "rdma", "object", "linux.resources") or {}).items():
        if not isinstance(device, dict) or not device.keys() & {"hcaHandles", "hcaObjects"}:
            raise wrong(f"linux.resources.rdma.{name}", "must be an object with hcaHandles, hcaObjects or both")
        for key in ("hcaHandles", "hcaObjects"):
            take(device, key, "integer", f"linux.resources.rdma.{name}")


def check_offsets(linux: dict[str, Any]) -> None:
    """Raises InvalidArgument naming the field."""
    for clock, offset in (take(linux, "timeOffsets", "object", "linux") or {}).items():
        field = f"linux.timeOffsets.{clock}"
        if clock not in ("monotonic", "boottime"):
            raise wrong(field, "the clocks of a time namespace are monotonic and boottime")
        if not isinstance(offset, dict):
            raise wrong(field, "must be an object")
        for key in ("secs", "nanosecs"):
            take(offset, key, "integer", field)
