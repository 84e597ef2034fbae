"""Which process a shim's record means."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from dolium.isolation.shim import ShimHandle, is_alive


def test_a_shim_is_known_by_pid_start_time_and_boot() -> None:
    """The same numbers after a reboot are somebody else's."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    this = ShimHandle("/nowhere", "x", os.getpid(), int(fields[19]), boot, "nonce")
    assert is_alive(this)
    assert not is_alive(replace(this, boot_id="6f1a2c1e-0000-4000-8000-000000000001"))
    assert not is_alive(replace(this, start_time=this.start_time + 1))
