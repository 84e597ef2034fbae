"""What ``dolium-runtime features`` tells (OCI features.md, features-linux.md): what this version does, no more, whatever the
host has of it. Cold module."""

from __future__ import annotations

from dolium.linux import capabilities, mounts
from dolium.runtime.spec import HOOKS, NAMESPACES, OCI_VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SECCOMP_ACTIONS = ("SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_KILL_THREAD",
                   "SCMP_ACT_LOG", "SCMP_ACT_NOTIFY", "SCMP_ACT_TRACE", "SCMP_ACT_TRAP")
SECCOMP_OPERATORS = ("SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT", "SCMP_CMP_MASKED_EQ",
                     "SCMP_CMP_NE")
SECCOMP_FLAGS = ("SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC",
                 "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV")


def features() -> dict[str, Any]:
    """The features object of this build."""
    from dolium.linux.cgroup import systemd
    from dolium.runtime import attributes

    options = sorted({*mounts.ATTRIBUTES, *(f"r{name}" for name in mounts.ATTRIBUTES), *mounts.PROPAGATIONS, "bind",
                      "rbind", "idmap", "ridmap", "tmpcopyup", *mounts.WHOLE, *mounts.IGNORED} - {"", "remount"})
    return {
        "ociVersionMin": "1.0.0",
        "ociVersionMax": OCI_VERSION,
        "hooks": list(HOOKS),
        "mountOptions": options,
        "linux": {
            "namespaces": list(NAMESPACES),
            "capabilities": list(capabilities.NAMES),
            "cgroup": {"v1": True, "v2": True, "systemd": True, "systemdUser": True, "rdma": True},
            "seccomp": {"enabled": True, "actions": list(SECCOMP_ACTIONS), "operators": list(SECCOMP_OPERATORS),
                        "knownFlags": list(SECCOMP_FLAGS), "supportedFlags": list(SECCOMP_FLAGS),
                        "archs": ["SCMP_ARCH_X86", "SCMP_ARCH_X86_64", "SCMP_ARCH_X32", "SCMP_ARCH_ARM",
                                  "SCMP_ARCH_AARCH64"]},
            "apparmor": {"enabled": True},
            "selinux": {"enabled": True},
            "intelRdt": {"enabled": True, "schemata": True, "monitoring": True},
            "memoryPolicy": {"modes": list(attributes.MEMORY_MODES), "flags": list(attributes.MEMORY_FLAGS)},
            "mountExtensions": {"idmap": {"enabled": True}},
            "netDevices": {"enabled": True},
        },
        "potentiallyUnsafeConfigAnnotations": [systemd.ANNOTATION],
    }
