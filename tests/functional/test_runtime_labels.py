"""Security modules: an AppArmor profile is enforced where the kernel has AppArmor; where it has not, each field is named."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bundles import Bundle, Runtime, bundle, needs, runtime

__all__ = ["bundle", "runtime"]
pytestmark = needs

ENABLED = Path("/sys/module/apparmor/parameters/enabled")
APPARMOR = ENABLED.exists() and ENABLED.read_text() == "Y\n"
NAME = f"dolium-test-{os.getpid()}"
PROFILE = f"profile {NAME} flags=(attach_disconnected) {{ file, capability, network, signal, deny /tmp/secret rw, }}\n"


@pytest.fixture
def profile() -> Iterator[str]:
    """A loaded profile that denies one file."""
    if not APPARMOR or shutil.which("apparmor_parser") is None:
        pytest.skip("needs a kernel with AppArmor enabled and the package apparmor (the VM has both)")
    load = ["apparmor_parser", "--skip-cache", "--quiet"]
    subprocess.run([*load, "--add"], input=PROFILE, text=True, check=True)
    try:
        yield NAME
    finally:
        subprocess.run([*load, "--remove"], input=PROFILE, text=True, check=True)


SCRIPT = "cat /proc/self/attr/current; echo x > /tmp/other && echo x > /tmp/secret"


@pytest.mark.parametrize("user", [False, True])
def test_a_profile_holds_for_init_and_exec(runtime: Runtime, bundle: Bundle, profile: str, user: bool) -> None:
    bundle.process["apparmorProfile"] = profile
    if user:
        bundle.namespace("user", "")
        bundle.linux["uidMappings"] = bundle.linux["gidMappings"] = [{"containerID": 0, "hostID": 0, "size": 65536}]
    for no_new_privs in (False, True):
        bundle.process["noNewPrivileges"] = no_new_privs
        result = runtime.run(bundle.sh(SCRIPT), code=None)
        assert result.out == f"{profile} (enforce)\n" and "/tmp/secret: Permission denied" in result.err, result
    runtime.started(bundle.sh("exec sleep 1000"), identity="d")
    result = runtime("exec", "d", "sh", "-c", SCRIPT, code=None)
    assert result.out == f"{profile} (enforce)\n" and "/tmp/secret: Permission denied" in result.err


def test_an_exec_may_have_a_profile_of_its_own(runtime: Runtime, bundle: Bundle, profile: str) -> None:
    runtime.started(bundle.sh("exec sleep 1000"))
    assert runtime("exec", "c", "cat", "/proc/self/attr/current").out == "unconfined\n"
    assert runtime("exec", "--apparmor", profile, "c", "cat", "/proc/self/attr/current").out == f"{profile} (enforce)\n"


def test_a_profile_that_is_not_loaded(runtime: Runtime, bundle: Bundle, profile: str) -> None:
    bundle.process["apparmorProfile"] = f"{profile}-absent"
    result = runtime.run(bundle.sh("echo never"), code=1)
    assert result.out == "" and f"process.apparmorProfile {profile}-absent (is it loaded?): ENOENT" in result.err
    assert runtime.left() == [] and bundle.groups() == []


def test_a_label_is_written_to_a_true_proc_alone(runtime: Runtime, bundle: Bundle, profile: str) -> None:
    """CVE-2025-52881: an exec's label, where the container has files of its own for /proc."""
    bundle.config["mounts"] = [entry for entry in bundle.config["mounts"] if entry["destination"] != "/proc"]
    bundle.linux.update(maskedPaths=[], readonlyPaths=[])
    files = [bundle.rootfs / "proc/self/attr" / name for name in ("exec", "apparmor/exec")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("untouched")
    runtime.started(bundle.sh("exec sleep 1000"))
    assert "/proc is no proc file system" in runtime("exec", "--apparmor", profile, "c", "true", code=255).err
    assert all(file.read_text() == "untouched" for file in files)


@pytest.mark.parametrize(("field", "value", "there"), [
    ("process.apparmorProfile", "docker-default", APPARMOR),
    ("process.selinuxLabel", "system_u:system_r:container_t:s0", os.path.exists("/sys/fs/selinux/enforce")),
    ("linux.mountLabel", "system_u:object_r:container_file_t:s0", os.path.exists("/sys/fs/selinux/enforce")),
    ("linux.intelRdt", {"schemata": ["L3:0=f"]}, os.path.exists("/sys/fs/resctrl/schemata")),
])
def test_what_the_kernel_has_not_is_named(runtime: Runtime, bundle: Bundle, field: str, value: Any, there: bool) -> None:
    if there:
        pytest.skip(f"this kernel has what {field} needs")
    room, _, key = field.partition(".")
    bundle.config[room][key] = value
    result = runtime.run(bundle.sh("echo never"), code=1)
    assert result.out == "" and result.err.startswith(f"dolium-runtime: config.json: {field}: "), result
    assert runtime.left() == [] and bundle.groups() == []


def test_exec_names_it_too(runtime: Runtime, bundle: Bundle) -> None:
    runtime.started(bundle.sh("exec sleep 1000"))
    assert "process.selinuxLabel: SELinux is not enabled" in runtime("exec", "--process-label", "a:b:c:d", "c", "true", code=255).err
    assert runtime("exec", "--apparmor", "unconfined", "c", "echo", "ok").out == "ok\n"
