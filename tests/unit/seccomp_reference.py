"""What seccomp programs are compared with: libseccomp itself, runc's rule for newer calls, and a classic BPF interpreter."""

from __future__ import annotations

import ctypes
import os
import pickle
import re
import select
import signal
import time
from typing import Any

ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0
ENOSYS = 38
ACTIONS = {"SCMP_ACT_KILL": 0, "SCMP_ACT_KILL_THREAD": 0, "SCMP_ACT_KILL_PROCESS": 0x80000000, "SCMP_ACT_TRAP": 0x00030000,
           "SCMP_ACT_ERRNO": ERRNO, "SCMP_ACT_NOTIFY": 0x7FC00000, "SCMP_ACT_TRACE": 0x7FF00000, "SCMP_ACT_LOG": 0x7FFC0000,
           "SCMP_ACT_ALLOW": ALLOW}
OPERATORS = ("NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ")
X86_64, I386, X32_BIT = 0xC000003E, 0x40000003, 0x40000000
TOKENS = {"SCMP_ARCH_X86": 0x40000003, "SCMP_ARCH_X86_64": 0xC000003E, "SCMP_ARCH_X32": 0x4000003E, "SCMP_ARCH_ARM": 0x40000028,
          "SCMP_ARCH_AARCH64": 0xC00000B7}
EEXIST = 17


class Comparison(ctypes.Structure):
    _fields_ = [("arg", ctypes.c_uint), ("op", ctypes.c_int), ("datum_a", ctypes.c_uint64), ("datum_b", ctypes.c_uint64)]


def library() -> ctypes.CDLL | None:
    """libseccomp with its prototypes, None when it is not installed."""
    try:
        found = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        return None
    pointer, unsigned, integer = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int
    for name, arguments in {
        "seccomp_init": [unsigned], "seccomp_release": [pointer], "seccomp_arch_add": [pointer, unsigned],
        "seccomp_attr_set": [pointer, integer, unsigned], "seccomp_export_bpf": [pointer, integer], "seccomp_export_pfc": [pointer, integer],
        "seccomp_rule_add_array": [pointer, unsigned, integer, ctypes.c_uint, ctypes.POINTER(Comparison)],
        "seccomp_syscall_resolve_name": [ctypes.c_char_p], "seccomp_syscall_resolve_name_arch": [unsigned, ctypes.c_char_p],
        "seccomp_syscall_resolve_num_arch": [unsigned, integer],
    }.items():
        getattr(found, name).argtypes = arguments
    found.seccomp_init.restype = pointer
    found.seccomp_syscall_resolve_num_arch.restype = ctypes.c_char_p
    return found


LIBRARY = library()


def value_of(name: str, number: int | None) -> int:
    return ACTIONS[name] | ((1 if number is None else number) & 0xFFFF if name in ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE") else 0)


def add_rules(profile: dict[str, Any], context: int, default: int) -> list[str]:
    """Feed libseccomp as runc does; the calls whose rules it refused as conflicts."""
    assert LIBRARY is not None
    refused = []
    for rule in profile.get("syscalls") or []:
        action = value_of(rule["action"], rule.get("errnoRet"))
        if action == default:
            continue
        arguments = rule.get("args") or []
        indexes = [one["index"] for one in arguments]
        groups = [arguments] if len(set(indexes)) == len(indexes) else [[one] for one in arguments]
        for name in rule["names"]:
            number = LIBRARY.seccomp_syscall_resolve_name(name.encode())
            if number == -1:
                continue
            for group in groups:
                array = (Comparison * max(1, len(group)))()
                for slot, one in zip(array, group, strict=False):
                    slot.arg, slot.op = one["index"], OPERATORS.index(one["op"].removeprefix("SCMP_CMP_")) + 1
                    slot.datum_a, slot.datum_b = one["value"], one.get("valueTwo", 0)
                result = LIBRARY.seccomp_rule_add_array(context, action, number, len(group), array)
                assert result in (0, -EEXIST), (name, result)
                if result:
                    refused.append(name)
    return refused


class Reference:
    """libseccomp's answer. ``program``: BPF; ``text``: the same filter as it prints it for people, from the rules it kept and
    not from the program; ``refused``: calls of which it refused a rule as a conflict."""

    def __init__(self, profile: dict[str, Any], optimize: int = 2) -> None:
        assert LIBRARY is not None
        default = value_of(profile["defaultAction"], profile.get("defaultErrnoRet"))
        context = LIBRARY.seccomp_init(default)
        assert context
        try:
            LIBRARY.seccomp_attr_set(context, 8, optimize)
            for name in profile.get("architectures") or []:
                assert LIBRARY.seccomp_arch_add(context, TOKENS[name]) in (0, -EEXIST)
            self.refused = add_rules(profile, context, default)
            self.program = _exported(LIBRARY.seccomp_export_bpf, context)
            LIBRARY.seccomp_attr_set(context, 8, 1)  # the tree of numbers is not what matters
            self.text = _exported(LIBRARY.seccomp_export_pfc, context).decode()
        finally:
            LIBRARY.seccomp_release(context)


def _exported(export: Any, context: int) -> bytes:
    fd = os.memfd_create("seccomp")
    try:
        assert export(context, fd) == 0
        return os.pread(fd, os.fstat(fd).st_size, 0)
    finally:
        os.close(fd)


def reference(profile: dict[str, Any], optimize: int = 2, seconds: float = 2.0) -> Reference | None:
    """The same from a process of its own, None when it crashes or does not end: libseccomp 2.5.4 links a list into itself
    for some overlapping rules of several arguments."""
    near, far = os.pipe()
    child = os.fork()
    if not child:
        try:
            made = Reference(profile, optimize)
            with open(far, "wb", closefd=False) as file:
                file.write(pickle.dumps((made.program, made.text, made.refused)))
        finally:
            os._exit(0)
    os.close(far)
    try:
        content = b""
        end = time.monotonic() + seconds
        while True:
            ready, _, _ = select.select([near], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                os.kill(child, signal.SIGKILL)
                return None
            part = os.read(near, 1 << 20)
            if not part:
                break
            content += part
    finally:
        os.close(near)
        os.waitpid(child, 0)
    if not content:
        return None
    made = Reference.__new__(Reference)
    made.program, made.text, made.refused = pickle.loads(content)
    return made


_LINE = re.compile(r"( *)(?:if \(\$(arch|syscall|a\d)(?:\.(hi|lo)32)?(?: & 0x(\w+))? (==|>|>=) (\d+)\)|(else)|action (\S+);)$")
_NAMED = {"KILL": 0, "KILL_PROCESS": 0x80000000, "TRAP": 0x00030000, "ERRNO": ERRNO, "TRACE": 0x7FF00000, "LOG": 0x7FFC0000,
          "ALLOW": ALLOW}


class Text:
    """libseccomp's filter for people, as something that decides: the first action whose conditions hold."""

    def __init__(self, text: str) -> None:
        self.sections: dict[str, list[Any]] = {}
        section = ""
        levels: dict[int, list[Any]] = {0: []}
        for line in text.splitlines():
            if line.startswith("# filter for arch "):
                section = line.split()[4]
            if not line or line.lstrip().startswith("#"):
                continue
            match = _LINE.match(line)
            assert match, line
            space, word, half, mask, sign, value, otherwise, action = match.groups()
            depth = len(space)
            if word == "arch":
                levels[2] = self.sections[section] = []
            elif otherwise:
                levels[depth + 2] = levels[depth][-1][2]
            elif action:
                name, _, number = action.partition("(")
                levels[depth].append(int(name, 16) if name.startswith("0x") else _NAMED[name] | int(number.rstrip(")") or 0))
            else:
                # what is tested, what follows when it holds, what follows when it does not
                test = (word, half, int(mask, 16) if mask else (1 << 64) - 1, sign, int(value))
                levels[depth].append((test, [], []))
                levels[depth + 2] = levels[depth][-1][1]

    def decide(self, arch: int, number: int, arguments: tuple[int, ...]) -> int:
        section = {X86_64: "x86_64", I386: "x86"}.get(arch)
        if section == "x86_64" and number >= X32_BIT and ("x32" in self.sections or number != 0xFFFFFFFF):
            section = "x32"
        if section not in self.sections:
            return KILL
        found = self._run(self.sections[section], number, arguments)
        assert found is not None
        return found

    def _run(self, body: list[Any], number: int, arguments: tuple[int, ...]) -> int | None:
        for one in body:
            if isinstance(one, int):
                return one
            (word, half, mask, sign, value), yes, no = one
            if word == "syscall":
                have = number
            else:
                have = arguments[int(word[1])]
                have = have >> 32 if half == "hi" else have & 0xFFFFFFFF
            have &= mask
            holds = have == value if sign == "==" else have > value if sign == ">" else have >= value
            found = self._run(yes if holds else no, number, arguments)
            if found is not None:
                return found
        return None


class Newer:
    """runc's rule: a call newer than all that the profile names gives ENOSYS before libseccomp's program is asked."""

    def __init__(self, profile: dict[str, Any]) -> None:
        assert LIBRARY is not None
        self.last: dict[str, int] = {}
        if profile["defaultAction"] in ("SCMP_ACT_ALLOW", "SCMP_ACT_LOG", "SCMP_ACT_TRACE"):
            return
        # the machine's own architecture is always one: a deliberate difference from runc
        for name in {"SCMP_ARCH_X86_64", *(profile.get("architectures") or [])}:
            self.last[name] = max([0, *(LIBRARY.seccomp_syscall_resolve_name_arch(TOKENS[name], call.encode())
                                        for rule in profile.get("syscalls") or [] for call in rule["names"])])

    def holds(self, audit: int, number: int) -> bool:
        name = {X86_64: "SCMP_ARCH_X86_64", I386: "SCMP_ARCH_X86"}.get(audit, "")
        if audit == X86_64 and number & X32_BIT:
            name = "SCMP_ARCH_X32"
        last = self.last.get(name, 0)
        return bool(last) and number > last


def run_filter(program: bytes, number: int, arguments: tuple[int, ...] = (0,) * 6, arch: int = X86_64) -> int:
    """What a classic BPF program gives for a call; arguments are 64 bits wide."""
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


def check(program: bytes) -> None:
    """What the kernel asks of a program: known instructions, jumps that stay inside, a return at every end, 4096 at most."""
    count = len(program) // 8
    assert 0 < count <= 4096 and len(program) % 8 == 0
    reached = {0}
    for at in range(count):
        code, yes, no, k = (int.from_bytes(program[at * 8 : at * 8 + 2], "little"), program[at * 8 + 2], program[at * 8 + 3],
                            int.from_bytes(program[at * 8 + 4 : at * 8 + 8], "little"))
        assert code in (0x20, 0x06, 0x05, 0x54, 0x15, 0x25, 0x35), hex(code)
        assert at in reached, f"instruction {at} is never reached"
        if code == 0x20:
            assert k % 4 == 0 and k < 64
        targets = {0x06: (), 0x05: (at + 1 + k,), 0x20: (at + 1,), 0x54: (at + 1,)}.get(code, (at + 1 + yes, at + 1 + no))
        assert all(target < count for target in targets)
        reached.update(targets)
