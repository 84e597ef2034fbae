"""Our programs decide as libseccomp's with runc's rule in front: both are interpreted on generated profiles and calls.

Calls are of x86-64, i386 and the x32 bit, with six 64-bit arguments made of the values in the rules, of what is beside them,
and of either half alone. Where libseccomp's program differs from the filter that it prints for people, the latter counts.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from seccomp_reference import (
    ACTIONS,
    ALLOW,
    ENOSYS,
    ERRNO,
    I386,
    LIBRARY,
    OPERATORS,
    X32_BIT,
    X86_64,
    Newer,
    Reference,
    Text,
    check,
    reference,
    run_filter,
)

from dolium.linux import seccomp
from dolium.linux.syscall_numbers import NUMBERS

pytestmark = [pytest.mark.skipif(LIBRARY is None, reason="needs libseccomp2"), pytest.mark.timeout(300)]

ALL = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]
MULTIPLEXED = ["socket", "accept", "semop", "msgget"]
NAMES = ["read", "clone", "execve", "personality", "rt_sigaction", "_llseek", "chown32", "nosuch", *MULTIPLEXED]
EDGES = [0, 1, 2, 5, 0xFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF, 1 << 32, (1 << 32) + 1, (1 << 32) + 5, 1 << 33, 1 << 63,
         (1 << 64) - 1]
EVERY = (1 << 64) - 1
values = st.sampled_from(EDGES) | st.integers(0, EVERY)
SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


def comparisons(operators: dict[str, list[str]], most: int) -> st.SearchStrategy[list[dict[str, Any]]]:
    """Of different arguments. ``operators``: of a rule's ``only`` comparison, of the ``last`` of several, of ``others``."""

    def build(drawn: tuple[list[int], list[tuple[int, int, int]]]) -> list[dict[str, Any]]:
        indexes, details = drawn
        made = []
        for index, (choice, value, other) in zip(indexes, details, strict=False):
            allowed = operators["only" if len(indexes) == 1 else "last" if index == max(indexes) else "others"]
            made.append({"index": index, "op": f"SCMP_CMP_{allowed[choice % len(allowed)]}", "value": value, "valueTwo": other})
        return made

    return st.tuples(st.lists(st.integers(0, 5), max_size=most, unique=True),
                     st.lists(st.tuples(st.integers(0, 41), values, values), min_size=most, max_size=most)).map(build)


ANY = {"only": list(OPERATORS), "last": list(OPERATORS), "others": list(OPERATORS)}
# With several rules for a call: the shapes that libseccomp 2.5.4 gets wrong are left to the tests below.
JOINED = {"only": list(OPERATORS), "last": ["EQ", "MASKED_EQ", "GT", "GE"], "others": ["EQ", "MASKED_EQ"]}


def rules(operators: dict[str, list[str]], most: int, names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {"names": st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True), "action": st.sampled_from(sorted(ACTIONS)),
         "args": comparisons(operators, most), "errnoRet": st.sampled_from([None, 2, 3, 4094])},
    ).map(lambda one: {key: value for key, value in one.items() if value and (
        key != "errnoRet" or one["action"] in ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE"))})


def profiles(of_rules: st.SearchStrategy[list[dict[str, Any]]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({
        "defaultAction": st.sampled_from([name for name in sorted(ACTIONS) if name != "SCMP_ACT_NOTIFY"]),
        "architectures": st.permutations(ALL).flatmap(lambda order: st.integers(0, 3).map(lambda count: list(order)[:count])),
        "syscalls": of_rules})


def probes(profile: dict[str, Any], generator: random.Random, each: int) -> list[tuple[int, int, tuple[int, ...]]]:
    """Calls near what the rules name: (AUDIT_ARCH, number, arguments)."""
    near, numbers = {0}, {0, X32_BIT - 1, X32_BIT, X32_BIT + 1, 2 * X32_BIT, 3 * X32_BIT, (1 << 32) - 1, 102, 117, 456, 457, 500}
    for rule in profile["syscalls"]:
        for one in rule.get("args") or []:
            for value in (one["value"], one["valueTwo"]):
                near |= {value, value - 1, value + 1, value ^ 1 << 32, value & 0xFFFFFFFF, value >> 32 << 32, value + (1 << 32)}
        for name in rule["names"]:
            numbers |= {table[name] + step for table in NUMBERS.values() if name in table for step in (-1, 0, 1)}
    words = [value & EVERY for value in sorted(near)] + [1, 2, 5, 13]
    return [(arch, number, tuple(generator.choice(words) for _ in range(6)))
            for number in sorted(numbers) if number >= 0 for arch in (X86_64, I386, 0xC00000B7) for _ in range(each)]


def compare(profile: dict[str, Any], found: Reference, calls: list[tuple[int, int, tuple[int, ...]]]) -> int:
    """How many calls libseccomp's program decides otherwise than its text."""
    program = seccomp.compile_profile(profile, "x86_64")
    check(program)
    text = Text(found.text)
    newer = Newer(profile)
    wrong = 0
    for arch, number, arguments in calls:
        if newer.holds(arch, number):
            expected = ERRNO | ENOSYS
        else:
            expected = text.decide(arch, number, arguments)
            wrong += expected != run_filter(found.program, number, arguments, arch)
        assert run_filter(program, number, arguments, arch) == expected, (hex(arch), hex(number), [hex(one) for one in arguments])
    return wrong


@SETTINGS
@given(profiles(st.lists(rules(JOINED, 3, NAMES), max_size=6)), st.sampled_from([1, 2]), st.integers(0, 1 << 32))
def test_several_rules_for_a_call(profile: dict[str, Any], optimize: int, seed: int) -> None:
    # libseccomp 2.5.4's binary tree of no rule at all is damaged
    found = reference(profile, optimize if profile["syscalls"] else 1)
    assume(found is not None)
    assert found is not None
    wrong = compare(profile, found, probes(profile, random.Random(seed), 12))
    event(f"refused as a conflict: {bool(found.refused)}, program and text differ: {bool(wrong)}")


@SETTINGS
@given(profiles(st.lists(rules(ANY, 6, NAMES), max_size=6)), st.integers(0, 1 << 32))
def test_one_rule_for_a_call_with_any_comparisons(profile: dict[str, Any], seed: int) -> None:
    seen: set[str] = set()
    for rule in profile["syscalls"]:
        rule["names"] = [name for name in rule["names"] if name not in seen][:1]
        seen.update(rule["names"])
        if seen & set(MULTIPLEXED):
            seen.update(MULTIPLEXED)  # they meet behind socketcall and ipc
    profile["syscalls"] = [rule for rule in profile["syscalls"] if rule["names"]]
    found = reference(profile, 1)
    assert found is not None and found.refused == []
    compare(profile, found, probes(profile, random.Random(seed), 12))


@SETTINGS
@given(profiles(st.lists(rules(ANY, 0, NAMES[:5]), max_size=6)), st.integers(0, 1 << 32))
def test_the_programs_themselves_are_equal_without_conditions(profile: dict[str, Any], seed: int) -> None:
    """With any condition, libseccomp's may test a word that it did not load (below)."""
    found = reference(profile, 1)
    assert found is not None
    assert compare(profile, found, probes(profile, random.Random(seed), 1)) == 0


@pytest.mark.parametrize("capabilities", [set(), {"CAP_SYS_ADMIN"}, {"CAP_SYS_PTRACE", "CAP_BPF", "CAP_NET_ADMIN"}])
@pytest.mark.parametrize("default", [None, "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_LOG", "SCMP_ACT_ERRNO"])
def test_dockers_profile(capabilities: set[str], default: str | None) -> None:
    """Every number there is, with arguments near those of its rules; with other defaults than its own, too."""
    path = Path("/usr/share/containers/seccomp.json")
    if not path.exists():
        pytest.skip("needs the package golang-github-containers-common")
    profile = seccomp.resolve_profile(json.loads(path.read_text()), capabilities, "amd64", (6, 1))
    for rule in profile["syscalls"]:
        # newer than Debian's libseccomp
        rule["names"] = [name for name in rule["names"] if NUMBERS["x86_64"].get(name, 0) <= 456]
    if default:
        profile["defaultAction"] = default
        profile.pop("defaultErrnoRet", None)
    generator = random.Random(1)
    every = [(arch, first + number, tuple(generator.choice(EDGES) for _ in range(6)))
             for first, arch in ((0, X86_64), (X32_BIT, X86_64), (0, I386)) for number in range(600)]
    # of libseccomp's own program, nothing is decided otherwise than it prints
    assert compare(profile, Reference(profile), [*every, *probes(profile, generator, 2)]) == 0


# -- where libseccomp 2.5.4 is wrong, and ours is not --


def of_read(*groups: list[tuple[int, str, int]]) -> dict[str, Any]:
    return {"defaultAction": "SCMP_ACT_ALLOW", "architectures": [], "syscalls": [
        {"names": ["read"], "action": "SCMP_ACT_ERRNO", "errnoRet": number + 1,
         "args": [{"index": index, "op": f"SCMP_CMP_{operator}", "value": value, "valueTwo": 0} for index, operator, value in group]}
        for number, group in enumerate(groups)]}


def test_a_word_that_was_not_loaded_is_not_tested() -> None:
    profile = of_read([(0, "LT", 5), (2, "GE", 5)], [(0, "LT", 2 << 32), (1, "GT", 0)])
    arguments = (0xB, 4, 0, 0, 0, 0)  # the second rule holds
    program = seccomp.compile_profile(profile, "x86_64")
    assert run_filter(program, 0, arguments) == Text(Reference(profile).text).decide(X86_64, 0, arguments) == ERRNO | 2
    assert run_filter(Reference(profile, 1).program, 0, arguments) == ALLOW  # when this fails, libseccomp was mended
    # on i386, one call behind socketcall is enough: it never loads the number
    simple = {"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86"],
              "syscalls": [{"names": ["accept"], "action": "SCMP_ACT_ERRNO"}]}
    assert run_filter(seccomp.compile_profile(simple, "x86_64"), 102, (5, 0, 0, 0, 0, 0), I386) == ERRNO | 1
    assert run_filter(Reference(simple, 1).program, 102, (5, 0, 0, 0, 0, 0), I386) == ALLOW


def test_rules_that_go_on_after_an_inequality_decide_each_by_itself() -> None:
    profile = of_read([(0, "GT", 10), (2, "LE", 5)], [(0, "GT", 0xFFFFFFFE), (2, "LE", 10)])
    program = seccomp.compile_profile(profile, "x86_64")
    for first, third, expected in ((0xB, 5, ERRNO | 1), (0xB, 6, ALLOW), (0xFFFFFFFF, 6, ERRNO | 2), (1 << 32, 10, ERRNO | 2)):
        assert run_filter(program, 0, (first, 0, third, 0, 0, 0)) == expected
    found = reference(profile, 1)
    assert found is None or Text(found.text).decide(X86_64, 0, (0xB, 0, 6, 0, 0, 0)) == ERRNO | 2  # though 0xb is not that large


def test_a_rule_that_ends_on_the_opposite_of_another_is_kept() -> None:
    profile = of_read([(2, "EQ", 0)], [(1, "EQ", 255), (2, "NE", 0)])
    profile["architectures"] = ["SCMP_ARCH_X86"]
    arguments = (0, 255, 7, 0, 0, 0)
    assert run_filter(seccomp.compile_profile(profile, "x86_64"), 3, arguments, I386) == ERRNO | 2
    assert run_filter(Reference(profile, 1).program, 3, arguments, I386) == ALLOW
