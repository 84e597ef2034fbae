"""Which process a shim's record means; what an exec has compiled."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dolium.isolation import process
from dolium.isolation.launcher import Launcher
from dolium.isolation.shim import ShimHandle, is_alive
from dolium.linux.cgroup.tree import Layout
from dolium.runtime.plan import Plan


def test_a_shim_is_known_by_pid_start_time_and_boot() -> None:
    """The same numbers after a reboot are somebody else's."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    this = ShimHandle("/nowhere", "x", os.getpid(), int(fields[19]), boot, "nonce")
    assert is_alive(this)
    assert not is_alive(replace(this, boot_id="6f1a2c1e-0000-4000-8000-000000000001"))
    assert not is_alive(replace(this, start_time=this.start_time + 1))


def test_the_same_exec_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled: list[tuple[int, str]] = []

    def compile(config: Any, asked: Any, facts: Any, pid: int, start_time: int, launch: Any, folders: list[str]) -> Plan:
        compiled.append((pid, asked["args"][0]))
        return Plan()

    monkeypatch.setattr(process, "compile_exec", compile)
    one = process.ProcessIsolation(Launcher(str(tmp_path), lambda path: None), Layout({}, "/sys/fs/cgroup"), str(tmp_path))
    config: dict[str, Any] = {"linux": {"namespaces": [{"type": "network"}]}}

    def ask(pid: int = 7, word: str = "true", groups: str = "0::/a\n") -> bytes:
        return one._exec_plan("id", config, {"args": [word]}, pid, 1, groups)

    assert ask() == ask()
    assert compiled == [(7, "true")]
    ask(pid=8)
    ask(word="false")
    ask(groups="0::/b\n")
    assert len(compiled) == 4
    for number in range(process.EXEC_PLANS_KEPT):
        ask(pid=100 + number)
    ask()  # the one used longest ago went
    assert len(compiled) == 5 + process.EXEC_PLANS_KEPT
