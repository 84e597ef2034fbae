"""Mount options, capabilities and seccomp profiles."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import pytest

from dolium.errors import InvalidArgument
from dolium.linux import capabilities, mounts, seccomp
from dolium.runtime import seccomp_cache
from dolium.runtime.facts import Facts

A = mounts.ATTRIBUTES


@pytest.mark.parametrize(("options", "set_", "clear"), [
    (["ro"], mounts.ATTR_RDONLY, 0), (["ro", "rw"], 0, mounts.ATTR_RDONLY), (["rw", "ro"], mounts.ATTR_RDONLY, 0),
    (["nosuid", "nodev", "noexec"], 0x0E, 0), (["noexec", "exec"], 0, mounts.ATTR_NOEXEC),
    (["noatime"], mounts.ATTR_NOATIME, mounts.ATTR_ATIME_FIELD),
    (["noatime", "strictatime"], mounts.ATTR_STRICTATIME, mounts.ATTR_ATIME_FIELD),
    (["noatime", "relatime"], 0, mounts.ATTR_ATIME_FIELD),
    (["defaults", "async", ""], 0, 0),
])
def test_attributes_the_last_wins(options: list[str], set_: int, clear: int) -> None:
    parsed = mounts.Options(options)
    assert (parsed.set, parsed.clear & ~parsed.set) == (set_, clear & ~set_)
    assert parsed.data == [] and parsed.recursive_set == parsed.recursive_clear == 0


def test_recursive_attributes_propagation_binds_and_data() -> None:
    parsed = mounts.Options(["rbind", "rro", "rnoexec", "rslave", "size=5", "mode=700", "tmpcopyup", "uid=0"])
    assert parsed.recursive_set == mounts.ATTR_RDONLY | mounts.ATTR_NOEXEC and parsed.set == 0
    assert parsed.propagation == mounts.MS_SLAVE | mounts.MS_REC and parsed.bind == "rbind" and parsed.copy_up
    assert parsed.data == ["size=5", "mode=700", "uid=0"]


def test_capability_numbers_are_the_kernels() -> None:
    assert [capabilities.NUMBERS[name] for name in ("CAP_CHOWN", "CAP_NET_ADMIN", "CAP_SYS_ADMIN", "CAP_CHECKPOINT_RESTORE")] \
        == [0, 12, 21, 40]
    assert capabilities.mask(["CAP_CHOWN", "CAP_SYS_ADMIN"]) == 1 << 21 | 1
    assert capabilities.names(1 << 21 | 1) == ["CAP_CHOWN", "CAP_SYS_ADMIN"] and capabilities.names(0) == []
    with pytest.raises(KeyError):
        capabilities.mask(["CAP_NOSUCH"])
    last = Path("/proc/sys/kernel/cap_last_cap")
    if last.exists():
        assert len(capabilities.NAMES) <= int(last.read_text()) + 1


PROFILE: dict[str, Any] = {
    "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1,
    "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]},
                {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": ["SCMP_ARCH_ARM"]}],
    "syscalls": [
        {"names": ["read"], "action": "SCMP_ACT_ALLOW"},
        {"names": ["mount"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
        {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "excludes": {"caps": ["CAP_SYS_ADMIN"]},
         "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_MASKED_EQ"}]},
        {"names": ["arch_prctl"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["amd64"]}},
        {"names": ["ptrace"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "4.8"}},
        {"names": ["old"], "action": "SCMP_ACT_ALLOW", "excludes": {"minKernel": "4.8"}},
        {"name": "single", "action": "SCMP_ACT_ALLOW", "excludes": {"arches": ["arm64"]}},
    ],
}


def names(*arguments: Any) -> list[str]:
    return [name for rule in seccomp.resolve_profile(PROFILE, *arguments)["syscalls"] for name in rule["names"]]


def test_conditions_of_dockers_profile() -> None:
    assert names(set(), "amd64", (6, 1)) == ["read", "clone", "arch_prctl", "ptrace", "single"]
    assert names({"CAP_SYS_ADMIN"}, "arm64", (6, 1)) == ["read", "mount", "ptrace"]
    assert names(set(), "arm64", (4, 7)) == ["read", "clone", "old"]
    resolved = seccomp.resolve_profile(PROFILE, set(), "arm64", (6, 1))
    assert resolved["architectures"] == ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"] and resolved["defaultErrnoRet"] == 1
    assert resolved["syscalls"][1] == {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": PROFILE["syscalls"][2]["args"]}


def run_filter(program: bytes, number: int, arguments: tuple[int, ...] = (0,) * 6, arch: int = 0xC000003E) -> int:
    """Classic BPF over struct seccomp_data."""
    data = number.to_bytes(4, "little") + arch.to_bytes(4, "little") + bytes(8)
    data += b"".join((value & (1 << 64) - 1).to_bytes(8, "little") for value in arguments)
    at = accumulator = 0
    for _ in range(5000):
        instruction = program[at * 8 : at * 8 + 8]
        code = int.from_bytes(instruction[:2], "little")
        yes, no, k = instruction[2], instruction[3], int.from_bytes(instruction[4:], "little")
        at += 1
        if code == 0x20:
            accumulator = int.from_bytes(data[k : k + 4], "little")
        elif code == 0x06:
            return k
        elif code == 0x05:
            at += k
        elif code == 0x54:
            accumulator &= k
        else:
            test = {0x15: accumulator == k, 0x25: accumulator > k, 0x35: accumulator >= k}[code]
            at += yes if test else no
    raise AssertionError("it does not end")


needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="system call numbers of x86-64")
ALLOW, ERRNO = 0x7FFF0000, 0x00050000


@needs_x86
def test_a_compiled_profile_decides_as_it_says() -> None:
    program = seccomp.compile_profile({
        "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": ["mkdir", "nosuchcall"], "action": "SCMP_ACT_ERRNO", "errnoRet": 99},
            {"names": ["chmod"], "action": "SCMP_ACT_ERRNO"},
            {"names": ["socket"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 0, "value": 16, "op": "SCMP_CMP_EQ"},
                                                                       {"index": 2, "value": 9, "op": "SCMP_CMP_EQ"}]},
            {"names": ["personality"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"},
                                                                            {"index": 0, "value": 2, "op": "SCMP_CMP_EQ"}]}]})
    assert run_filter(program, 0) == ALLOW
    assert run_filter(program, 83) == ERRNO | 99 and run_filter(program, 90) == ERRNO | 1
    assert run_filter(program, 41, (16, 0, 9, 0, 0, 0)) == ERRNO | 1 and run_filter(program, 41, (16, 0, 8, 0, 0, 0)) == ALLOW
    assert [run_filter(program, 135, (value, 0, 0, 0, 0, 0)) for value in (0, 1, 2)] == [ALLOW, ERRNO | 1, ERRNO | 1]


@needs_x86
def test_dockers_own_profile_compiles_and_refuses_what_it_should() -> None:
    path = Path("/usr/share/containers/seccomp.json")
    if not path.exists():
        pytest.skip("needs the package golang-github-containers-common")
    resolved = seccomp.resolve_profile(json.loads(path.read_text()), set(), "amd64", (6, 1))
    program = seccomp.compile_profile(resolved)
    assert run_filter(program, 0) == ALLOW and run_filter(program, 246) != ALLOW  # read; kexec_load


@pytest.mark.parametrize(("profile", "words"), [
    ({"defaultAction": "SCMP_ACT_X"}, "defaultAction: 'SCMP_ACT_X'"),
    ({"defaultAction": "SCMP_ACT_NOTIFY"}, "SCMP_ACT_NOTIFY is not supported"),
    ({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["X"]}, "architectures: 'X' is unknown"),
    ({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"], "action": "X"}]}, r"syscalls\[0\].action"),
    ({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ERRNO", "args": [{"op": "X"}]}]},
     r"syscalls\[0\].args: 'X' is not an operator"),
])
def test_what_a_profile_cannot_say(profile: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        seccomp.compile_profile(profile)


def test_the_cache_is_keyed_by_profile_and_machine_and_distrusts_a_damaged_program() -> None:
    profile = {"defaultAction": "SCMP_ACT_ALLOW"}
    key = seccomp_cache.digest(profile, "x86_64")
    assert key == seccomp_cache.digest(dict(profile), "x86_64") != seccomp_cache.digest(profile, "aarch64")
    path = f"/cache/{key}.bpf"
    hit = Facts({f"read:{path}": [b"0", b"\0" * 16]})
    assert seccomp_cache.program(profile, "x86_64", hit, "/cache") == (b"\0" * 16, None)
    for bad in ([b"0", b"\0" * 15], [b"0", b""], [b"2"]):
        compiled, keep = seccomp_cache.program(profile, "x86_64", Facts({f"read:{path}": bad}), "/cache")
        assert keep == path and compiled and len(compiled) % 8 == 0
