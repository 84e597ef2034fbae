"""Seccomp profiles to BPF programs. Cold module, imported only when a program is not in the cache.

The profile is the specification's ``linux.seccomp`` (config-linux.md, Seccomp), the program is what seccomp(2) takes. It
decides as libseccomp's would with runc's rule for newer calls in front: a test interprets both. The differences are
deliberate, each has a test:

- names come from newer kernel headers than Debian's libseccomp has (``syscall_numbers``), so rules for newer calls hold;
- runc's rule also holds for the machine's own architecture where the profile does not list it;
- i386 has semop and semtimedop only behind ipc: libseccomp writes rules for them under impossible numbers too;
- every rule decides by itself. libseccomp 2.5.4 links two rules into each other, and may not end, where both go on after
  a comparison other than equality; it drops one that ends on a word that an earlier one compares the opposite way; and its
  program may test a word that it did not load, where the filter it prints for people is right. Ours is as the latter.
"""

from __future__ import annotations

from dolium.errors import InvalidArgument
from dolium.linux.seccomp_bpf import LIMIT, assemble
from dolium.linux.seccomp_rules import decide, known_names, multiplexed
from dolium.linux.syscall_numbers import NUMBERS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dolium.linux.seccomp_bpf import Ranges
    from dolium.linux.seccomp_rules import Calls, Comparison

KILL = 0x00000000
_ERRNO = 0x00050000
_ACTIONS = {
    "SCMP_ACT_KILL": KILL,
    "SCMP_ACT_KILL_THREAD": KILL,
    "SCMP_ACT_KILL_PROCESS": 0x80000000,
    "SCMP_ACT_TRAP": 0x00030000,
    "SCMP_ACT_ERRNO": _ERRNO,
    "SCMP_ACT_NOTIFY": 0x7FC00000,
    "SCMP_ACT_TRACE": 0x7FF00000,
    "SCMP_ACT_LOG": 0x7FFC0000,
    "SCMP_ACT_ALLOW": 0x7FFF0000,
}
# the largest number that goes with an action: MAX_ERRNO, and what seccomp's data has room for
_WITH_NUMBER = {"SCMP_ACT_ERRNO": 4095, "SCMP_ACT_TRACE": 0xFFFF}
# defaults under which a call may happen although the profile does not know it
_PERMISSIVE = ("SCMP_ACT_ALLOW", "SCMP_ACT_LOG", "SCMP_ACT_TRACE")
_OPERATORS = ("SCMP_CMP_NE", "SCMP_CMP_LT", "SCMP_CMP_LE", "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_MASKED_EQ")
_ARCHITECTURES = {"SCMP_ARCH_X86": "i386", "SCMP_ARCH_X86_64": "x86_64", "SCMP_ARCH_X32": "x32", "SCMP_ARCH_ARM": "arm",
                  "SCMP_ARCH_AARCH64": "aarch64"}
# AUDIT_ARCH_* of linux/audit.h: what the kernel puts into seccomp_data.arch; x32 is x86-64 with a bit in the number
_AUDIT = {"x86_64": 0xC000003E, "i386": 0x40000003, "aarch64": 0xC00000B7, "arm": 0x40000028}
_X32_BIT = 0x40000000
_LAST = (1 << 32) - 1
_EPERM, _ENOSYS = 1, 38
_MAX_VALUE = (1 << 64) - 1


def _action(name: str, errno_ret: int | None, field: str, errno_field: str) -> int:
    if name not in _ACTIONS:
        raise InvalidArgument(f"{field}: {name!r} is not an action dolium knows")
    if name in _WITH_NUMBER:
        number, most = _EPERM if errno_ret is None else errno_ret, _WITH_NUMBER[name]
        if not 0 <= number <= most:
            raise InvalidArgument(f"{errno_field}: {number}: {name} takes 0 to {most}")
        return _ACTIONS[name] | number
    if errno_ret is not None:
        raise InvalidArgument(f"{errno_field}: {name} does not return a number", hint="leave it out, or use SCMP_ACT_ERRNO")
    return _ACTIONS[name]


def compile_profile(profile: dict[str, Any], machine: str | None = None) -> bytes:
    """The BPF program (8 bytes an instruction) for a ``linux.seccomp`` object.

    ``machine``: uname's name of the architecture the container runs on, always part of the program; None for this one.
    Calls nobody knows are left out: the default action, or ENOSYS, holds for them. Raises InvalidArgument naming the field.
    """
    default = _action(profile.get("defaultAction", ""), profile.get("defaultErrnoRet"), "linux.seccomp.defaultAction",
                      "linux.seccomp.defaultErrnoRet")
    if profile["defaultAction"] == "SCMP_ACT_NOTIFY":
        raise InvalidArgument("linux.seccomp.defaultAction: SCMP_ACT_NOTIFY is not supported as the default: "
                              "the calls that hand the listener over would wait for the listener")
    architectures = _architectures(profile, machine)
    rules: list[tuple[int, str, list[Comparison]]] = []
    names: set[str] = set()
    known = known_names()
    for index, rule in enumerate(profile.get("syscalls") or []):
        field = f"linux.seccomp.syscalls[{index}]"
        action = _action(rule.get("action", ""), rule.get("errnoRet"), f"{field}.action", f"{field}.errnoRet")
        groups = _groups(rule.get("args") or [], field)
        names.update(rule.get("names") or [])
        if action != default:
            rules += [(action, name, group) for name in rule.get("names") or [] if name in known for group in groups]
    calls = decide(rules, architectures)
    newer = None if profile["defaultAction"] in _PERMISSIVE else _ERRNO | _ENOSYS
    sections = [(_AUDIT[architecture], _ranges(architecture, calls, names, default, newer), default)
                for architecture in architectures if architecture != "x32"]
    program = assemble(sections, KILL)
    if len(program) // 8 > LIMIT:
        raise InvalidArgument(f"linux.seccomp.syscalls: the program has {len(program) // 8} instructions, "
                              f"the kernel takes {LIMIT}",
                              hint="fewer rules with args, or fewer architectures")
    return program


def _architectures(profile: dict[str, Any], machine: str | None) -> list[str]:
    """The machine's own first, then those of the profile."""
    if machine is None:
        import posix

        machine = posix.uname().machine
    if machine not in ("x86_64", "aarch64"):
        raise InvalidArgument(f"linux.seccomp: no system call numbers for {machine}")
    found = [machine]
    for name in profile.get("architectures") or []:
        if name not in _ARCHITECTURES:
            raise InvalidArgument(f"linux.seccomp.architectures: {name!r} is unknown")
        if _ARCHITECTURES[name] not in found:
            found.append(_ARCHITECTURES[name])
    if "x32" in found and "x86_64" not in found:
        raise InvalidArgument("linux.seccomp.architectures: SCMP_ARCH_X32 without SCMP_ARCH_X86_64")
    return found


def _groups(arguments: list[dict[str, Any]], field: str) -> list[list[Comparison]]:
    """A rule's comparisons: all of a group must hold, of any group.

    By the specification all must hold; a second comparison of the same argument means OR, as runc takes it.
    """
    made: list[Comparison] = []
    for argument in arguments:
        operator, index = argument.get("op", ""), argument.get("index") or 0
        if operator not in _OPERATORS:
            raise InvalidArgument(f"{field}.args: {operator!r} is not an operator")
        if not 0 <= index <= 5:
            raise InvalidArgument(f"{field}.args: index {index}: a system call has arguments 0 to 5")
        value, other = argument.get("value") or 0, argument.get("valueTwo") or 0
        if not (0 <= value <= _MAX_VALUE and 0 <= other <= _MAX_VALUE):
            raise InvalidArgument(f"{field}.args: a value does not fit 64 bits")
        made.append((index, operator.removeprefix("SCMP_CMP_"), value, other))
    if len({one[0] for one in made}) == len(made):
        return [made]
    return [[one] for one in made]


def _ranges(architecture: str, calls: dict[str, Calls], names: set[str], default: int, newer: int | None) -> Ranges:
    """Every number of an architecture as the kernel sees it, from 0 on. ``newer``: the action for calls that are newer than
    all the profile names (runc's rule), None when the default holds for them."""
    if architecture != "x86_64":
        return _table(architecture, calls, names, default, newer, 0)
    # Four quarters by the two upper bits. libseccomp takes everything from the x32 bit on as x32; where x32 is not meant it
    # kills, but for -1, which a tracer sets to skip a call. runc's rule comes first, and looks at the x32 bit alone.
    ranges = _table("x86_64", calls, names, default, newer, 0)
    known = ranges[-1][1] == newer
    if "x32" in calls:
        upper = _table("x32", calls, names, default, newer, _X32_BIT)
        last = default
    else:
        upper = [(_X32_BIT, KILL)]
        last = KILL
    ranges += [*upper, (2 * _X32_BIT, newer if known and newer is not None else last), (3 * _X32_BIT, upper[-1][1])]
    return ranges if "x32" in calls else [*ranges, (_LAST, default)]


def _table(architecture: str, calls: dict[str, Calls], names: set[str], default: int, newer: int | None,
           first: int) -> Ranges:
    decided = calls[architecture]
    ranges: Ranges = [(first, default)]
    for number in sorted(decided):
        if ranges[-1][0] == number:
            ranges.pop()
        ranges += [(number, decided[number]), (number + 1, default)]
    numbers = NUMBERS[architecture]
    newest = max((numbers[name] for name in names if name in numbers and not multiplexed(architecture, name)), default=0)
    if newer is not None and newest:
        while ranges[-1][0] > newest:
            ranges.pop()
        ranges.append((newest + 1, newer))
    return ranges


def resolve_profile(profile: dict[str, Any], capabilities: set[str], architecture: str,
                    kernel: tuple[int, int]) -> dict[str, Any]:
    """Docker's profile format (``archMap``, ``includes``, ``excludes``) to the specification's ``linux.seccomp``.

    ``capabilities``: the container's bounding set; ``architecture``: Go's name (``amd64``); ``kernel``: version.
    """
    native = {"amd64": "SCMP_ARCH_X86_64", "arm64": "SCMP_ARCH_AARCH64"}[architecture]
    architectures = list(profile.get("architectures") or [])
    for entry in profile.get("archMap") or []:
        if entry.get("architecture") == native:
            architectures = [native, *(entry.get("subArchitectures") or [])]
    rules = []
    for rule in profile.get("syscalls") or []:
        if not _applies(rule, capabilities, architecture, kernel):
            continue
        kept = {key: rule[key] for key in ("names", "action", "args", "errnoRet") if rule.get(key)}
        if "name" in rule:
            kept["names"] = [rule["name"]]
        rules.append(kept)
    resolved = {"defaultAction": profile["defaultAction"], "architectures": architectures, "syscalls": rules}
    return resolved | {key: profile[key] for key in ("defaultErrnoRet", "flags", "listenerPath", "listenerMetadata")
                       if profile.get(key) is not None}


def _applies(rule: dict[str, Any], capabilities: set[str], architecture: str, kernel: tuple[int, int]) -> bool:
    includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
    if includes.get("arches") and architecture not in includes["arches"]:
        return False
    if architecture in (excludes.get("arches") or []):
        return False
    if not set(includes.get("caps") or []) <= capabilities or capabilities & set(excludes.get("caps") or []):
        return False
    if includes.get("minKernel") and kernel < _version(includes["minKernel"]):
        return False
    return not (excludes.get("minKernel") and kernel >= _version(excludes["minKernel"]))


def _version(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor or 0)
