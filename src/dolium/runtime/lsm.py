"""Labels of Linux Security Modules: ``process.apparmorProfile``, ``process.selinuxLabel``, ``linux.mountLabel`` (config.md,
config-linux.md). A kernel that does not enforce them refuses them here, before anything is changed. Cold module, imported
only when there is a label."""

from __future__ import annotations

from dolium.runtime.spec import wrong

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dolium.runtime.facts import Facts
    from dolium.runtime.plan import Plan

APPARMOR_ENABLED = "/sys/module/apparmor/parameters/enabled"
APPARMOR_EXEC = "/proc/self/attr/apparmor/exec"  # since Linux 5.8; before, and as the first module, attr/exec
SELINUX_ENABLED = "/sys/fs/selinux/enforce"
UNLABELLED = ("proc", "sysfs", "mqueue")  # the kernel labels these itself


def apparmor_enabled(facts: Facts) -> bool:
    """Whether the kernel enforces AppArmor."""
    return (facts.read(APPARMOR_ENABLED) or b"").strip() == b"Y"


def selinux_enabled(facts: Facts) -> bool:
    """Whether the kernel has an SELinux policy."""
    return facts.read(SELINUX_ENABLED) is not None


def add(plan: Plan, stage: int, process: dict[str, Any], facts: Facts) -> None:
    """What the program is to run under. Raises InvalidArgument naming the field."""
    profile, label = process.get("apparmorProfile"), process.get("selinuxLabel")
    # without AppArmor every process is unconfined already
    if profile and not (profile == "unconfined" and not apparmor_enabled(facts)):
        if not apparmor_enabled(facts):
            raise wrong("process.apparmorProfile", "AppArmor is not enabled in this host's kernel",
                        "leave it out, or boot with apparmor=1 security=apparmor")
        file = APPARMOR_EXEC if facts.stat(APPARMOR_EXEC) is not None else "/proc/self/attr/exec"
        plan.add(stage, "lsm", f"process.apparmorProfile {profile} (is it loaded?)", file.removeprefix("/proc/"),
                 f"exec {profile}")
    if label:
        if not selinux_enabled(facts):
            raise wrong("process.selinuxLabel", "SELinux is not enabled in this host's kernel", "leave it out")
        plan.add(stage, "lsm", f"process.selinuxLabel {label}", "self/attr/exec", label)


def mount_options(label: str, kind: str, facts: Facts) -> list[str]:
    """What a new file system is mounted with for ``linux.mountLabel``. Raises InvalidArgument."""
    if not selinux_enabled(facts):
        raise wrong("linux.mountLabel", "SELinux is not enabled in this host's kernel", "leave it out")
    return [] if kind in UNLABELLED else [f"context={label}"]
