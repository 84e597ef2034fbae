"""What a container uses, from its groups' files, in the form of runc's ``events --stats``. For ``resources`` alone."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dolium.linux.cgroup import tree
    from dolium.runtime.facts import Facts

UNLIMITED = 0x7FFFFFFFFFFFF000  # what v1 shows for no limit: the largest number of whole pages
UNLIMITED_V2 = 2**64 - 1  # what runc shows where a v2 file says "max"
TICK_NS = 10_000_000  # cpuacct.stat counts hundredths of a second

CPUSET_FLAGS = ("cpu_exclusive", "mem_hardwall", "mem_exclusive", "memory_migrate", "memory_spread_page",
                "memory_spread_slab", "memory_pressure", "sched_load_balance", "sched_relax_domain_level")
# v1's files by the key, the first that has a line is taken: that of BFQ, of CFQ, of throttling (all devices)
BLKIO_V1 = {
    "ioServiceBytesRecursive": ("bfq.io_service_bytes_recursive", "io_service_bytes_recursive",
                                "throttle.io_service_bytes_recursive", "throttle.io_service_bytes"),
    "ioServicedRecursive": ("bfq.io_serviced_recursive", "io_serviced_recursive", "throttle.io_serviced_recursive",
                            "throttle.io_serviced"),
    "ioQueueRecursive": ("bfq.io_queued_recursive", "io_queued_recursive"),
    "ioServiceTimeRecursive": ("bfq.io_service_time_recursive", "io_service_time_recursive"),
    "ioWaitTimeRecursive": ("bfq.io_wait_time_recursive", "io_wait_time_recursive"),
    "ioMergedRecursive": ("bfq.io_merged_recursive", "io_merged_recursive"),
    "ioTimeRecursive": ("bfq.time_recursive", "time_recursive"),
    "sectorsRecursive": ("bfq.sectors_recursive", "sectors_recursive"),
}
MEMORY_V1 = {"usage": "", "swap": "memsw.", "kernel": "kmem.", "kernelTCP": "kmem.tcp."}
BLKIO_V2 = {"rbytes": ("ioServiceBytesRecursive", "Read"), "wbytes": ("ioServiceBytesRecursive", "Write"),
            "rios": ("ioServicedRecursive", "Read"), "wios": ("ioServicedRecursive", "Write")}


class Folders:
    """A container's cgroup files as facts. ``folder``: of a controller, None where it is not mounted."""

    def __init__(self, facts: Facts, layout: tree.Layout, folders: list[str]) -> None:
        self.facts = facts
        self.layout = layout
        self.folders = folders

    def folder(self, controller: str) -> str | None:
        base = self.layout.v1.get(controller) if self.layout.v1 else self.layout.unified
        return next((folder for folder in self.folders if base and folder.startswith(f"{base}/")), None)

    def want(self, controller: str, *files: str) -> list[str]:
        """Questions for these files."""
        folder = self.folder(controller)
        return [] if folder is None else [f"read:{folder}/{file}" for file in files]

    def read(self, controller: str, file: str) -> bytes | None:
        folder = self.folder(controller)
        return None if folder is None else self.facts.read(f"{folder}/{file}")

    def number(self, controller: str, file: str) -> int | None:
        """None when absent; no limit is UNLIMITED, on v2 UNLIMITED_V2."""
        text = (self.read(controller, file) or b"").strip()
        if text == b"max":
            return UNLIMITED_V2
        return int(text) if text.lstrip(b"-").isdigit() else None

    def lines(self, controller: str, file: str) -> list[list[str]]:
        """The words of each line."""
        return [line.split() for line in (self.read(controller, file) or b"").decode("utf-8", "replace").splitlines()]

    def table(self, controller: str, file: str) -> dict[str, int]:
        """Lines of a word and a number."""
        return {line[0]: int(line[1]) for line in self.lines(controller, file)
                if len(line) == 2 and line[1].lstrip("-").isdigit()}


def statistics(files: Folders, page_sizes: list[str]) -> dict[str, Any]:
    """What the container uses, in runc's form: nanoseconds, bytes, numbers. ``page_sizes``: of the kernel's huge pages, as
    the hugetlb controller names its files (2MB). runc counts network interfaces of its own making: none here."""
    v1 = bool(files.layout.v1)
    _fetch(files, page_sizes)
    return {"cpu": _cpu_v1(files) if v1 else _cpu_v2(files), "cpuset": _cpuset(files),
            "memory": _memory_v1(files) if v1 else _memory_v2(files), "pids": _pids(files),
            "blkio": _blkio_v1(files) if v1 else _blkio_v2(files), "hugetlb": _hugetlb(files, page_sizes), "intel_rdt": {},
            "network_interfaces": None}


def _fetch(files: Folders, page_sizes: list[str]) -> None:
    """All files in one round of questions."""
    if files.layout.v1:
        entry = ("limit_in_bytes", "usage_in_bytes", "max_usage_in_bytes", "failcnt")
        wanted = {"cpuacct": [f"cpuacct.{key}" for key in ("stat", "usage_all", "usage", "usage_percpu")],
                  "cpu": ["cpu.stat"],
                  "cpuset": ["cpuset.cpus", "cpuset.mems", *(f"cpuset.{key}" for key in CPUSET_FLAGS)],
                  "memory": ["memory.stat", *(f"memory.{part}{key}" for part in MEMORY_V1.values() for key in entry)],
                  "pids": ["pids.current", "pids.max"],
                  "blkio": [f"blkio.{name}" for names in BLKIO_V1.values() for name in names],
                  "hugetlb": [f"hugetlb.{size}.{key}" for size in page_sizes for key in entry]}
    else:
        memory = ("stat", "current", "max", "peak", "events", "pressure", "swap.current", "swap.max")
        wanted = {"cpu": ["cpu.stat", "cpu.pressure"], "cpuset": ["cpuset.cpus.effective", "cpuset.mems.effective"],
                  "memory": [f"memory.{key}" for key in memory], "pids": ["pids.current", "pids.max"],
                  "io": ["io.stat", "io.pressure"],
                  "hugetlb": [f"hugetlb.{size}.{key}" for size in page_sizes for key in ("current", "events")]}
    files.facts.want(*(query for controller, names in wanted.items() for query in files.want(controller, *names)))


def _given(entries: dict[str, Any], *always: str) -> dict[str, Any]:
    """Without what is 0 or empty, but for ``always``."""
    return {key: value for key, value in entries.items() if value or key in always}


def _pids(files: Folders) -> dict[str, int]:
    limit = files.number("pids", "pids.max")
    return _given({"current": files.number("pids", "pids.current") or 0, "limit": limit if limit != UNLIMITED_V2 else 0})


def _throttling(table: dict[str, int], spent: int) -> dict[str, int]:
    return _given({"periods": table.get("nr_periods", 0), "throttledPeriods": table.get("nr_throttled", 0),
                   "throttledTime": spent})


def _cpu_v1(files: Folders) -> dict[str, Any]:
    ticks = files.table("cpuacct", "cpuacct.stat")
    throttled = files.table("cpu", "cpu.stat")
    by_cpu = [line for line in files.lines("cpuacct", "cpuacct.usage_all") if len(line) == 3 and line[0].isdigit()]
    usage = {"total": files.number("cpuacct", "cpuacct.usage") or 0,
             "percpu": [int(word) for word in (files.read("cpuacct", "cpuacct.usage_percpu") or b"").split()],
             "percpu_kernel": [int(line[2]) for line in by_cpu], "percpu_user": [int(line[1]) for line in by_cpu],
             "kernel": ticks.get("system", 0) * TICK_NS, "user": ticks.get("user", 0) * TICK_NS}
    return {"usage": _given(usage, "kernel", "user"),
            "throttling": _throttling(throttled, throttled.get("throttled_time", 0))}


def _cpu_v2(files: Folders) -> dict[str, Any]:
    table = files.table("cpu", "cpu.stat")
    usage = {"total": table.get("usage_usec", 0) * 1000, "kernel": table.get("system_usec", 0) * 1000,
             "user": table.get("user_usec", 0) * 1000}
    return {"usage": _given(usage, "kernel", "user"),
            "throttling": _throttling(table, table.get("throttled_usec", 0) * 1000),
            **_pressure(files, "cpu", "cpu.pressure")}


def _pressure(files: Folders, controller: str, file: str) -> dict[str, Any]:
    """Pressure stall information: averages in per cent, the total in microseconds. Absent where the kernel has none."""
    found: dict[str, dict[str, float]] = {}
    for words in files.lines(controller, file):
        pairs = dict(word.partition("=")[::2] for word in words[1:])
        try:
            found[words[0]] = {**{key: float(pairs[key]) for key in ("avg10", "avg60", "avg300")},
                               "total": int(pairs["total"])}
        except (LookupError, ValueError):  # not such a line
            continue
    return {"psi": found} if found else {}


def _numbers(text: bytes | None) -> list[int]:
    """Of a list like 0-3,7."""
    found: list[int] = []
    for part in (text or b"").decode().strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            found.extend(range(int(first), int(last or first) + 1))
    return found


def _cpuset(files: Folders) -> dict[str, Any]:
    if files.layout.v1:
        cpus, mems = files.read("cpuset", "cpuset.cpus"), files.read("cpuset", "cpuset.mems")
    else:  # what it has, also when it is not its own
        cpus, mems = files.read("cpuset", "cpuset.cpus.effective"), files.read("cpuset", "cpuset.mems.effective")
    flags = {key: files.number("cpuset", f"cpuset.{key}") or 0 if files.layout.v1 else 0 for key in CPUSET_FLAGS}
    return {**_given({"cpus": _numbers(cpus), "mems": _numbers(mems)}), **flags}


def _entry_v1(files: Folders, controller: str, prefix: str) -> dict[str, int]:
    names = {"limit": "limit_in_bytes", "usage": "usage_in_bytes", "max": "max_usage_in_bytes", "failcnt": "failcnt"}
    return _given({key: files.number(controller, f"{prefix}{file}") or 0 for key, file in names.items()}, "limit", "failcnt")


def _memory_v1(files: Folders) -> dict[str, Any]:
    raw = files.table("memory", "memory.stat")
    parts = {key: _entry_v1(files, "memory", f"memory.{prefix}") for key, prefix in MEMORY_V1.items()}
    return {**_given({"cache": raw.get("cache", 0)}), **parts, "raw": raw}


def _memory_v2(files: Folders) -> dict[str, Any]:
    """Swap is shown as v1 has it, memory and swap together."""
    raw = files.table("memory", "memory.stat")
    used, limit = files.number("memory", "memory.current") or 0, files.number("memory", "memory.max") or 0
    swap = files.number("memory", "memory.swap.max")
    both = UNLIMITED_V2 if UNLIMITED_V2 in (swap, limit) else (swap or 0) + limit
    events = files.table("memory", "memory.events")
    usage = {"limit": limit, "usage": used, "max": files.number("memory", "memory.peak") or 0,
             "failcnt": events.get("max", 0)}
    swapped = {"limit": both, "usage": (files.number("memory", "memory.swap.current") or 0) + used, "failcnt": 0}
    nothing = {"limit": 0, "failcnt": 0}
    return {**_given({"cache": raw.get("file", 0)}), "usage": _given(usage, "limit", "failcnt"),
            "swap": nothing if swap is None else _given(swapped, "limit", "failcnt"), "kernel": nothing,
            "kernelTCP": nothing, "raw": raw, **_pressure(files, "memory", "memory.pressure")}


def _hugetlb(files: Folders, page_sizes: list[str]) -> dict[str, Any]:
    found = {}
    for size in page_sizes:
        if files.layout.v1:
            entry = _entry_v1(files, "hugetlb", f"hugetlb.{size}.")
            del entry["limit"]
            there = files.read("hugetlb", f"hugetlb.{size}.usage_in_bytes") is not None
        else:
            entry = {"usage": files.number("hugetlb", f"hugetlb.{size}.current") or 0,
                     "failcnt": files.table("hugetlb", f"hugetlb.{size}.events").get("max", 0)}
            there = files.read("hugetlb", f"hugetlb.{size}.current") is not None
        if there:
            found[size] = _given(entry, "failcnt")
    return found


def _blkio_v1(files: Folders) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, names in BLKIO_V1.items():
        for name in names:
            rows = []
            for line in files.lines("blkio", f"blkio.{name}"):
                words = " ".join(line).replace(":", " ").split()
                if len(words) in (3, 4) and all(word.isdigit() for word in (*words[:2], words[-1])):
                    rows.append(_given({"major": int(words[0]), "minor": int(words[1]), "value": int(words[-1]),
                                        "op": words[2] if len(words) == 4 else ""}))
            if rows:
                found[key] = rows
                break
    return found


def _blkio_v2(files: Folders) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for words in files.lines("io", "io.stat"):
        major, colon, minor = words[0].partition(":") if words else ("", "", "")
        if not colon or not (major + minor).isdigit():
            continue
        for word in words[1:]:
            name, _, value = word.partition("=")
            if name in BLKIO_V2 and value.isdigit():
                key, operation = BLKIO_V2[name]
                found.setdefault(key, []).append(
                    _given({"major": int(major), "minor": int(minor), "op": operation, "value": int(value)}))
    return {**found, **_pressure(files, "io", "io.pressure")}
