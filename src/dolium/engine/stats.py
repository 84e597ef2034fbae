"""Figures of a running container, from its cgroup, in the shape of Docker's stats object (one floor above reads it)."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

from dolium.engine.engine import Engine
from dolium.engine.model import Container
from dolium.linux.cgroup import manage
from dolium.units import rfc3339


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""  # the controller is not there, or the container just ended


def _pairs(text: str) -> dict[str, int]:
    return {words[0]: int(words[1]) for line in text.splitlines() if len(words := line.split()) == 2 and words[1].isdigit()}


def _system_ns() -> int:
    """CPU time of the whole machine, nanoseconds."""
    ticks = sum(int(value) for value in _read("/proc/stat").splitlines()[0].split()[1:9])
    return ticks * (1_000_000_000 // os.sysconf("SC_CLK_TCK"))


def _cpu(engine: Engine, group: str) -> dict[str, Any]:
    layout = engine.layout
    folder = layout.v1_path("cpuacct", group)
    if folder is not None:
        total = int(_read(f"{folder}/cpuacct.usage") or 0)
        stat = _pairs(_read(f"{folder}/cpuacct.stat"))
        tick = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
        user, system = stat.get("user", 0) * tick, stat.get("system", 0) * tick
        throttling = _pairs(_read(f"{layout.v1_path('cpu', group)}/cpu.stat"))
    else:
        stat = _pairs(_read(f"{layout.unified}{group}/cpu.stat"))
        total, user, system = (stat.get(key, 0) * 1000 for key in ("usage_usec", "user_usec", "system_usec"))
        throttling = {**stat, "throttled_time": stat.get("throttled_usec", 0) * 1000}
    return {
        "cpu_usage": {"total_usage": total, "usage_in_kernelmode": system, "usage_in_usermode": user},
        "system_cpu_usage": _system_ns(), "online_cpus": os.cpu_count() or 1,
        "throttling_data": {
            "periods": throttling.get("nr_periods", 0), "throttled_periods": throttling.get("nr_throttled", 0),
            "throttled_time": throttling.get("throttled_time", 0)},
    }


def _memory(engine: Engine, group: str) -> dict[str, Any]:
    folder = engine.layout.v1_path("memory", group)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if folder is not None:
        usage, limit = _read(f"{folder}/memory.usage_in_bytes"), _read(f"{folder}/memory.limit_in_bytes")
        peak = _read(f"{folder}/memory.max_usage_in_bytes")
    else:
        folder = f"{engine.layout.unified}{group}"
        usage, limit, peak = (_read(f"{folder}/memory.{name}") for name in ("current", "max", "peak"))
    number = int(limit) if limit.strip().isdigit() else total
    return {"usage": int(usage or 0), "max_usage": int(peak or 0), "limit": min(number, total),
            "stats": _pairs(_read(f"{folder}/memory.stat"))}


def _networks(pid: int) -> dict[str, dict[str, int]]:
    found = {}
    for line in _read(f"/proc/{pid}/net/dev").splitlines()[2:]:
        name, _, rest = line.partition(":")
        values = [int(value) for value in rest.split()]
        if name.strip() == "lo" or len(values) < 16:
            continue
        found[name.strip()] = {
            "rx_bytes": values[0], "rx_packets": values[1], "rx_errors": values[2], "rx_dropped": values[3],
            "tx_bytes": values[8], "tx_packets": values[9], "tx_errors": values[10], "tx_dropped": values[11]}
    return found


def _block_io(engine: Engine, group: str) -> list[dict[str, Any]]:
    """Bytes by device and direction."""
    folder = engine.layout.v1_path("blkio", group)
    rows = []
    for line in _read(f"{engine.layout.unified}{group}/io.stat").splitlines() if engine.layout.pure_v2 else []:
        device, *fields = line.split()  # 254:0 rbytes=… wbytes=… rios=…
        values = dict(field.split("=", 1) for field in fields if "=" in field)
        major, _, minor = device.partition(":")
        rows += [{"major": int(major), "minor": int(minor), "op": op, "value": int(values[key])}
                 for op, key in (("read", "rbytes"), ("write", "wbytes")) if key in values]
    for line in _read(f"{folder}/blkio.throttle.io_service_bytes").splitlines() if folder else []:
        words = line.split()
        if len(words) == 3 and words[1] in ("Read", "Write"):
            major, minor = words[0].split(":")
            rows.append({"major": int(major), "minor": int(minor), "op": words[1].lower(), "value": int(words[2])})
    return rows


def sample(engine: Engine, container: Container) -> dict[str, Any]:
    """One reading. A container that does not run reads as zeros, as Docker's does."""
    base: dict[str, Any] = {"id": container.id, "name": f"/{container.name}", "read": rfc3339(time.time()), "num_procs": 0,
                            "storage_stats": {}}
    if not container.live:
        return {**base, "cpu_stats": {"cpu_usage": {"total_usage": 0}}, "memory_stats": {}, "pids_stats": {},
                "blkio_stats": {}}
    group = engine.container_group(container.id)
    pids: dict[str, int] = {}
    folder = engine.layout.v1_path("pids", group) or f"{engine.layout.unified}{group}"
    with contextlib.suppress(ValueError):
        pids["current"] = int(_read(f"{folder}/pids.current") or len(manage.processes(folder)))
    limit = _read(f"{folder}/pids.max").strip()
    if limit.isdigit():
        pids["limit"] = int(limit)
    return {**base, "cpu_stats": _cpu(engine, group), "memory_stats": _memory(engine, group), "pids_stats": pids,
            "blkio_stats": {"io_service_bytes_recursive": _block_io(engine, group)}, "networks": _networks(container.pid)}
