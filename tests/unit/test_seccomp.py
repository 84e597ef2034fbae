"""The seccomp compiler by itself: what programs decide, what is refused, the tables of calls, the cache."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from seccomp_reference import ALLOW, ENOSYS, ERRNO, I386, KILL, LIBRARY, TOKENS, X32_BIT, X86_64, check, run_filter

from dolium.errors import InvalidArgument
from dolium.linux import seccomp
from dolium.linux.syscall_numbers import NUMBERS
from dolium.runtime import seccomp_cache
from dolium.runtime.facts import Facts

ROOT = Path(__file__).resolve().parents[2]
TRAP = 0x00030000
AARCH64, ARM = 0xC00000B7, 0x40000028


def argument(index: int, operator: str, value: int, other: int = 0) -> dict[str, Any]:
    return {"index": index, "op": f"SCMP_CMP_{operator}", "value": value, "valueTwo": other}


def rule(names: str, action: str = "SCMP_ACT_ERRNO", *arguments: dict[str, Any], errno: int | None = None) -> dict[str, Any]:
    made: dict[str, Any] = {"names": names.split(), "action": action}
    if arguments:
        made["args"] = list(arguments)
    if errno is not None:
        made["errnoRet"] = errno
    return made


def profile(*rules: dict[str, Any], default: str = "SCMP_ACT_ALLOW", arches: str = "") -> dict[str, Any]:
    return {"defaultAction": default, "architectures": [f"SCMP_ARCH_{name}" for name in arches.split()], "syscalls": list(rules)}


def compiled(*rules: dict[str, Any], default: str = "SCMP_ACT_ALLOW", arches: str = "", machine: str = "x86_64") -> bytes:
    program = seccomp.compile_profile(profile(*rules, default=default, arches=arches), machine)
    check(program)
    return program


# -- Docker's format --

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


# -- what a program decides --


def test_a_compiled_profile_decides_as_it_says() -> None:
    program = compiled(rule("mkdir nosuchcall", errno=99), rule("chmod"),
                       rule("socket", "SCMP_ACT_ERRNO", argument(0, "EQ", 16), argument(2, "EQ", 9)),
                       rule("personality", "SCMP_ACT_ERRNO", argument(0, "EQ", 1), argument(0, "EQ", 2)))
    assert run_filter(program, 0) == ALLOW
    assert run_filter(program, 83) == ERRNO | 99 and run_filter(program, 90) == ERRNO | 1
    assert run_filter(program, 41, (16, 0, 9, 0, 0, 0)) == ERRNO | 1 and run_filter(program, 41, (16, 0, 8, 0, 0, 0)) == ALLOW
    # a second comparison of one argument means OR
    assert [run_filter(program, 135, (value, 0, 0, 0, 0, 0)) for value in (0, 1, 2)] == [ALLOW, ERRNO | 1, ERRNO | 1]


@pytest.mark.parametrize(("action", "value"), [
    ("KILL", 0), ("KILL_THREAD", 0), ("KILL_PROCESS", 0x80000000), ("TRAP", TRAP), ("ERRNO", ERRNO | 1), ("NOTIFY", 0x7FC00000),
    ("TRACE", 0x7FF00001), ("LOG", 0x7FFC0000), ("ALLOW", ALLOW)])
def test_every_action(action: str, value: int) -> None:
    program = compiled(rule("read", f"SCMP_ACT_{action}"), default="SCMP_ACT_TRAP" if action == "LOG" else "SCMP_ACT_LOG")
    assert run_filter(program, 0) == value
    if action in ("ERRNO", "TRACE"):
        assert run_filter(compiled(rule("read", f"SCMP_ACT_{action}", errno=77)), 0) == value - 1 + 77


@pytest.mark.parametrize("value", [0, 5, 0xFFFFFFFF, 1 << 32, (7 << 32) + 5, (1 << 64) - 1])
@pytest.mark.parametrize("operator", ["NE", "LT", "LE", "EQ", "GE", "GT"])
def test_comparisons_are_of_64_bits(operator: str, value: int) -> None:
    program = compiled(rule("read", "SCMP_ACT_TRAP", argument(3, operator, value)))
    for given in {value, value + 1, value - 1, value ^ 1 << 32, value & 0xFFFFFFFF, value >> 32 << 32, 0, (1 << 64) - 1}:
        given &= (1 << 64) - 1
        holds = {"NE": given != value, "LT": given < value, "LE": given <= value, "EQ": given == value, "GE": given >= value,
                 "GT": given > value}[operator]
        assert run_filter(program, 0, (9, 9, 9, given, 9, 9)) == (TRAP if holds else ALLOW), hex(given)


def test_masks_and_both_halves() -> None:
    program = compiled(rule("clone", "SCMP_ACT_TRAP", argument(0, "MASKED_EQ", 0xF_0000_000F, 0x3_0000_0001)))
    assert run_filter(program, 56, (0xF3_0000_FF01, 0, 0, 0, 0, 0)) == TRAP
    assert [run_filter(program, 56, (one, 0, 0, 0, 0, 0)) for one in (0x3_0000_0002, 1, 0x2_0000_0001)] == [ALLOW] * 3
    everything = compiled(rule("clone", "SCMP_ACT_TRAP", argument(0, "MASKED_EQ", 0, 5)))
    assert run_filter(everything, 56, (1, 2, 3, 4, 5, 6)) == TRAP  # no bit is compared


def test_a_rule_without_conditions_beats_those_with_some_and_the_first_of_them_holds() -> None:
    program = compiled(rule("read", "SCMP_ACT_TRAP", argument(0, "EQ", 1)), rule("read", errno=2), rule("read", errno=3),
                       rule("read", "SCMP_ACT_KILL", argument(0, "EQ", 2)))
    assert {run_filter(program, 0, (value, 0, 0, 0, 0, 0)) for value in range(4)} == {ERRNO | 2}


@pytest.mark.parametrize(("rules", "arguments"), [
    ([rule("read", "SCMP_ACT_ERRNO", argument(0, "EQ", 1)), rule("read", "SCMP_ACT_TRAP", argument(1, "EQ", 1))], (1, 1)),
    ([rule("read", "SCMP_ACT_ERRNO", argument(0, "GT", 1)), rule("read", "SCMP_ACT_TRAP", argument(0, "LT", 9))], (5, 0)),
    ([rule("read", "SCMP_ACT_ERRNO", argument(0, "LT", 9)), rule("read", "SCMP_ACT_TRAP", argument(0, "EQ", 5))], (5, 0)),
    ([rule("read", "SCMP_ACT_ERRNO", argument(0, "GE", 2)), rule("read", "SCMP_ACT_TRAP", argument(0, "GE", 4))], (5, 0)),
    ([rule("read", "SCMP_ACT_ERRNO", argument(0, "LT", 9)), rule("read", "SCMP_ACT_TRAP", argument(0, "LT", 7))], (5, 0)),
], ids=["later argument", "less before greater", "equal before less", "larger bound", "smaller bound"])
def test_where_conditions_overlap_the_order_is_not_the_profiles(rules: list[dict[str, Any]], arguments: tuple[int, int]) -> None:
    for order in (rules, rules[::-1]):
        assert run_filter(compiled(*order), 0, (*arguments, 0, 0, 0, 0)) == TRAP


def test_a_conflicting_rule_is_dropped() -> None:
    one, two = rule("read", "SCMP_ACT_TRAP", argument(0, "EQ", 5)), rule("read", "SCMP_ACT_KILL", argument(0, "EQ", 5))
    assert run_filter(compiled(one, two), 0, (5, 0, 0, 0, 0, 0)) == TRAP
    assert run_filter(compiled(two, one), 0, (5, 0, 0, 0, 0, 0)) == KILL
    # longer, then shorter with another action: the shorter one would swallow it
    longer = rule("read", "SCMP_ACT_KILL", argument(0, "EQ", 5), argument(1, "EQ", 6))
    assert run_filter(compiled(longer, one), 0, (5, 0, 0, 0, 0, 0)) == ALLOW


# -- architectures --


def test_architectures_have_numbers_of_their_own_and_the_rest_is_killed() -> None:
    program = compiled(rule("read", "SCMP_ACT_TRAP"), arches="X86_64 X86 X32")
    assert [run_filter(program, number, arch=arch) for number, arch in
            ((0, X86_64), (X32_BIT, X86_64), (3, I386), (0, I386), (3, X86_64))] == [TRAP, TRAP, TRAP, ALLOW, ALLOW]
    assert run_filter(program, 0, arch=AARCH64) == KILL
    only = compiled(rule("read", "SCMP_ACT_TRAP"))
    assert run_filter(only, 3, arch=I386) == KILL and run_filter(only, X32_BIT) == KILL
    assert run_filter(only, 0xFFFFFFFF) == ALLOW  # -1: a tracer skips the call
    there = compiled(rule("read", "SCMP_ACT_TRAP"), arches="ARM", machine="aarch64")
    assert [run_filter(there, number, arch=arch) for number, arch in ((63, AARCH64), (3, ARM), (63, ARM), (0, X86_64))] == [
        TRAP, TRAP, ALLOW, KILL]


@pytest.mark.parametrize(("arch", "number", "low_only"), [(X86_64, 0, False), (X86_64, X32_BIT, True), (I386, 3, True)])
def test_32_bit_architectures_compare_the_low_half(arch: int, number: int, low_only: bool) -> None:
    program = compiled(rule("read", "SCMP_ACT_TRAP", argument(0, "EQ", 0x1_0000_0005)), arches="X86 X32")
    assert run_filter(program, number, (5, 0, 0, 0, 0, 0), arch) == (TRAP if low_only else ALLOW)
    assert run_filter(program, number, (0x1_0000_0005, 0, 0, 0, 0, 0), arch) == TRAP


def test_i386_has_calls_behind_socketcall_and_ipc_too() -> None:
    program = compiled(rule("socket", "SCMP_ACT_TRAP", argument(0, "EQ", 16), argument(1, "EQ", 3)), rule("semop shmat", "SCMP_ACT_TRAP"),
                       arches="X86")
    assert run_filter(program, 359, (16, 3, 0, 0, 0, 0), I386) == TRAP and run_filter(program, 359, (2, 3, 0, 0, 0, 0), I386) == ALLOW
    # the first argument says which call it is, the others are compared as they are: libseccomp's reading
    assert run_filter(program, 102, (1, 3, 0, 0, 0, 0), I386) == TRAP and run_filter(program, 102, (1, 4, 0, 0, 0, 0), I386) == ALLOW
    assert run_filter(program, 102, (2, 3, 0, 0, 0, 0), I386) == ALLOW
    assert [run_filter(program, 117, (which, 0, 0, 0, 0, 0), I386) for which in (1, 2, 21)] == [TRAP, ALLOW, TRAP]
    assert run_filter(program, 397, arch=I386) == TRAP
    # no call has the impossible number under which libseccomp writes semop
    assert run_filter(program, (-201) & 0xFFFFFFFF, arch=I386) == ALLOW


# -- calls that are newer than the profile --


@pytest.mark.parametrize(("default", "newer"), [
    ("ERRNO", True), ("KILL", True), ("KILL_PROCESS", True), ("TRAP", True), ("ALLOW", False), ("LOG", False), ("TRACE", False)])
def test_calls_newer_than_the_profile_give_enosys(default: str, newer: bool) -> None:
    program = compiled(rule("read openat2", "SCMP_ACT_ALLOW"), rule("mseal", f"SCMP_ACT_{default}"), default=f"SCMP_ACT_{default}",
                       arches="X86_64 X86 X32")
    value = run_filter(program, 1)
    assert value not in (ERRNO | ENOSYS, ALLOW) or default == "ALLOW"
    # mseal (462) is named, though its rule says no more than the default
    for number, arch in ((462, X86_64), (X32_BIT + 462, X86_64), (462, I386)):
        assert run_filter(program, number, arch=arch) == value
        assert run_filter(program, number + 1, arch=arch) == (ERRNO | ENOSYS if newer else value)
    assert run_filter(program, 1000) == (ERRNO | ENOSYS if newer else value)


def test_where_no_call_is_known_none_is_newer() -> None:
    program = compiled(rule("nosuch", "SCMP_ACT_ALLOW"), default="SCMP_ACT_ERRNO", arches="X86_64")
    assert run_filter(program, 1000) == ERRNO | 1


# -- programs --


def test_a_long_program_jumps_further_than_255() -> None:
    names = sorted(NUMBERS["x86_64"])[:300]
    program = compiled(*(rule(name, "SCMP_ACT_ERRNO", argument(index % 6, "EQ", index + (index << 32)), argument((index + 1) % 6, "GT", index),
                              errno=index + 1) for index, name in enumerate(names)))
    assert len(program) // 8 > 2000
    for index, name in enumerate(names):
        arguments = [0] * 6
        arguments[index % 6], arguments[(index + 1) % 6] = index + (index << 32), index + 1
        assert run_filter(program, NUMBERS["x86_64"][name], tuple(arguments)) == ERRNO | index + 1, name
        arguments[(index + 1) % 6] = index
        assert run_filter(program, NUMBERS["x86_64"][name], tuple(arguments)) == ALLOW


def test_a_program_the_kernel_would_not_take_is_refused() -> None:
    rules = [rule(name, "SCMP_ACT_ERRNO", *(argument(at, "NE", index * 64 + at) for at in range(6)))
             for index, name in enumerate(sorted(NUMBERS["x86_64"]))]
    with pytest.raises(InvalidArgument, match=r"linux\.seccomp\.syscalls: the program has \d+ instructions, the kernel takes 4096"):
        seccomp.compile_profile(profile(*rules), "x86_64")


@pytest.mark.parametrize(("profile", "words"), [
    ({"defaultAction": "SCMP_ACT_X"}, "defaultAction: 'SCMP_ACT_X'"),
    ({"defaultAction": "SCMP_ACT_NOTIFY"}, "SCMP_ACT_NOTIFY is not supported"),
    ({"defaultAction": "SCMP_ACT_ALLOW", "defaultErrnoRet": 1}, "defaultErrnoRet: SCMP_ACT_ALLOW does not return a number"),
    (profile(rule("read", errno=4096)), r"syscalls\[0\]\.errnoRet: 4096: SCMP_ACT_ERRNO takes 0 to 4095"),
    (profile(rule("read", errno=-1)), r"syscalls\[0\]\.errnoRet: -1"),
    (profile(rule("read", "SCMP_ACT_KILL", errno=5)), r"syscalls\[0\]\.errnoRet: SCMP_ACT_KILL does not"),
    (profile(rule("read", "SCMP_ACT_KILL", argument(6, "EQ", 1))), r"syscalls\[0\]\.args: index 6"),
    (profile(rule("read", "SCMP_ACT_KILL", argument(0, "EQ", 1 << 64))), r"syscalls\[0\]\.args: a value does not fit"),
    ({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["X"]}, "architectures: 'X' is unknown"),
    ({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"], "action": "X"}]}, r"syscalls\[0\].action"),
    ({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ERRNO", "args": [{"op": "X"}]}]},
     r"syscalls\[0\].args: 'X' is not an operator"),
])
def test_what_a_profile_cannot_say(profile: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        seccomp.compile_profile(profile, "x86_64")


def test_a_machine_without_a_table_is_named() -> None:
    with pytest.raises(InvalidArgument, match="riscv64"):
        seccomp.compile_profile(profile(), "riscv64")
    with pytest.raises(InvalidArgument, match="SCMP_ARCH_X32 without"):
        seccomp.compile_profile(profile(arches="X32"), "aarch64")


# -- flags and the listener --


@pytest.mark.parametrize(("names", "notify", "value"), [
    ([], False, 0), (["TSYNC"], False, 1), (["LOG"], False, 2), (["SPEC_ALLOW"], False, 4), (["LOG", "SPEC_ALLOW"], False, 6),
    (["WAIT_KILLABLE_RECV"], True, 32), (["TSYNC"], True, 0)])
def test_flags(names: list[str], notify: bool, value: int) -> None:
    made = {**profile(rule("read", "SCMP_ACT_NOTIFY" if notify else "SCMP_ACT_TRAP")), "listenerPath": "/agent",
            "flags": [f"SECCOMP_FILTER_FLAG_{name}" for name in names]}
    assert seccomp_cache.flags(made) == value and seccomp_cache.needs_listener(made) is notify


def test_flags_that_cannot_be() -> None:
    with pytest.raises(InvalidArgument, match=r"linux\.seccomp\.flags\[0\]: 'X' is not a flag"):
        seccomp_cache.flags({**profile(), "flags": ["X"]})
    with pytest.raises(InvalidArgument, match="WAIT_KILLABLE_RECV needs SCMP_ACT_NOTIFY"):
        seccomp_cache.flags({**profile(), "flags": ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]})


def test_listeners_that_cannot_be() -> None:
    with pytest.raises(InvalidArgument, match=r"linux\.seccomp\.listenerPath is not set"):
        seccomp_cache.flags(profile(rule("read", "SCMP_ACT_NOTIFY")))
    with pytest.raises(InvalidArgument, match=r"syscalls\[1\]: SCMP_ACT_NOTIFY cannot be used for the write syscall"):
        seccomp_cache.flags({**profile(rule("read"), rule("write", "SCMP_ACT_NOTIFY")), "listenerPath": "/agent"})
    assert not seccomp_cache.needs_listener({**profile(rule("read")), "listenerPath": "/nobody/answers/and/none/is/asked"})


# -- tables --


def script() -> Any:
    spec = importlib.util.spec_from_file_location("syscall_tables", ROOT / "packaging" / "syscall_tables.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_what_the_script_makes() -> None:
    made = script()
    folder = made.ziglang_headers()
    if folder is None:
        pytest.skip("needs ziglang")
    assert made.render(made.tables(folder)) == made.TARGET.read_text()


@pytest.mark.parametrize(("architecture", "header"), [("x86_64", "unistd_64.h"), ("i386", "unistd_32.h"), ("x32", "unistd_x32.h")])
def test_the_tables_agree_with_the_machines_headers(architecture: str, header: str) -> None:
    path = Path("/usr/include/x86_64-linux-gnu/asm") / header
    if not path.exists():
        pytest.skip("needs linux-libc-dev of x86-64")
    found = script().read(path.read_text())
    assert len(found) > 300 and {name: NUMBERS[architecture].get(name) for name in found} == found


@pytest.mark.skipif(LIBRARY is None, reason="needs libseccomp2")
@pytest.mark.parametrize(("architecture", "token"), [
    ("x86_64", "X86_64"), ("i386", "X86"), ("x32", "X32"), ("arm", "ARM"), ("aarch64", "AARCH64")])
def test_the_tables_agree_with_libseccomps(architecture: str, token: str) -> None:
    assert LIBRARY is not None
    first = X32_BIT if architecture == "x32" else 0
    numbers = [*range(first, first + 600), *range(0xF0000, 0xF0010)]
    theirs = {LIBRARY.seccomp_syscall_resolve_num_arch(TOKENS[f"SCMP_ARCH_{token}"], number): number for number in numbers}
    theirs.pop(None)
    assert len(theirs) > 250
    assert {name.decode(): NUMBERS[architecture].get(name.decode()) for name in theirs} == {
        name.decode(): number for name, number in theirs.items()}


# -- the cache --

RELEASE = {seccomp_cache.RELEASE: [b"0", b"6.1.0\n"]}
FOLDER, FILE = [b"0", b"16832 0 0 0"], [b"0", b"33152 0 0 0"]  # 0700 and 0600, root's


def kept(folder: list[bytes], file: list[bytes], content: list[bytes], uid: int = 0) -> tuple[bytes, str | None]:
    made = profile()
    path = f"/cache/{seccomp_cache.digest(made, 'x86_64', '6.1.0')}.bpf"
    return seccomp_cache.program(made, "x86_64", Facts({**RELEASE, "stat:/cache": folder, f"stat:{path}": file, f"read:{path}": content}),
                                 "/cache", uid)


def test_the_cache_is_keyed_by_what_the_program_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    made = profile(rule("read"))
    key = seccomp_cache.digest(made, "x86_64", "6.1.0")
    assert key == seccomp_cache.digest({**made, "flags": ["SECCOMP_FILTER_FLAG_LOG"], "listenerMetadata": "m"}, "x86_64", "6.1.0")
    others = [seccomp_cache.digest(made, "aarch64", "6.1.0"), seccomp_cache.digest(made, "x86_64", "6.1.1"),
              seccomp_cache.digest(profile(), "x86_64", "6.1.0")]
    monkeypatch.setattr(seccomp_cache, "COMPILER_VERSION", 0)
    assert len({key, *others, seccomp_cache.digest(made, "x86_64", "6.1.0")}) == 5


@pytest.mark.parametrize("uid", [0, 1000])
def test_a_kept_program_is_used_when_it_is_roots_or_the_callers(uid: int) -> None:
    assert kept(FOLDER, FILE, [b"0", b"\0" * 16], uid) == (b"\0" * 16, None)
    own = [[b"0", f"{mode} {uid} 0 0".encode()] for mode in (0o040700, 0o100644)]
    assert kept(*own, [b"0", b"\0" * 16], uid) == (b"\0" * 16, None)


@pytest.mark.parametrize("content", [[b"0", b"\0" * 15], [b"0", b""], [b"2"], [b"13"]], ids=["length", "empty", "absent", "denied"])
def test_a_damaged_program_is_compiled_anew(content: list[bytes]) -> None:
    program, keep = kept(FOLDER, FILE, content)
    check(program)
    assert keep


@pytest.mark.parametrize(("folder", "file", "keeps"), [
    (FOLDER, [b"0", b"33152 1000 0 0"], True), (FOLDER, [b"0", f"{0o100620} 0 0 0".encode()], True), (FOLDER, FOLDER, True),
    ([b"0", b"16832 1000 0 0"], FILE, False), ([b"0", f"{0o040770} 0 0 0".encode()], FILE, False), ([b"13"], FILE, False),
    ([b"2"], [b"2"], True),
], ids=["another's file", "others may write it", "no file", "another's folder", "others may write there", "denied", "absent"])
def test_a_program_that_others_may_have_written_is_not_used(folder: list[bytes], file: list[bytes], keeps: bool) -> None:
    program, keep = kept(folder, file, [b"0", b"\0" * 16])
    assert program != b"\0" * 16 and (keep is not None) is keeps


def test_the_compiler_imports_nothing_but_itself() -> None:
    """On the cold path it is a miss of the cache, not a reason to load half of Python."""
    for name in ("seccomp", "seccomp_bpf", "seccomp_rules", "syscall_numbers"):
        text = (ROOT / "src" / "dolium" / "linux" / f"{name}.py").read_text()
        text = re.sub(r"(?m)^if TYPE_CHECKING:\n(?:    .*\n|\n)+", "", text)
        imports = re.findall(r"(?m)^ *(?:from|import) +(\S+)", text)
        assert {one for one in imports if not one.startswith("dolium.")} <= {"__future__", "posix"}


def test_the_kernel_takes_dockers_profile() -> None:
    """Loaded in a child that can do no more than leave; needs no rights with no_new_privs."""
    path = Path("/usr/share/containers/seccomp.json")
    if not path.exists():
        pytest.skip("needs the package golang-github-containers-common")
    if os.uname().machine != "x86_64":
        pytest.skip("numbers of x86-64")
    import ctypes

    program = seccomp.compile_profile(seccomp.resolve_profile(json.loads(path.read_text()), set(), "amd64", (6, 1)), "x86_64")
    check(program)
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(program)

    class Sock(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    child = os.fork()
    if not child:
        libc.prctl(38, 1, 0, 0, 0)
        failed = libc.syscall(317, 1, 0, ctypes.byref(Sock(len(program) // 8, ctypes.addressof(buffer))))
        refused = libc.syscall(246, 0, 0, 0, 0)  # kexec_load
        os._exit(9 if failed else 0 if refused == -1 and ctypes.get_errno() == 1 and libc.syscall(1000) == -1
                 and ctypes.get_errno() == ENOSYS else 8)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
