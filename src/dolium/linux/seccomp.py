"""Seccomp profiles to BPF programs, by libseccomp through ctypes. Imported only when a program is not in the cache.

The profile is the specification's ``linux.seccomp``; the program is what seccomp(2) takes. libseccomp takes 3 to 18 ms
for Docker's profile, so callers keep the program under the profile's digest.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
from typing import Any

from dolium.errors import InvalidArgument, Unimplemented

_ACTIONS = {
    "SCMP_ACT_KILL": 0x00000000,
    "SCMP_ACT_KILL_THREAD": 0x00000000,
    "SCMP_ACT_KILL_PROCESS": 0x80000000,
    "SCMP_ACT_TRAP": 0x00030000,
    "SCMP_ACT_ERRNO": 0x00050000,
    "SCMP_ACT_TRACE": 0x7FF00000,
    "SCMP_ACT_LOG": 0x7FFC0000,
    "SCMP_ACT_ALLOW": 0x7FFF0000,
}
_OPERATORS = {
    "SCMP_CMP_NE": 1,
    "SCMP_CMP_LT": 2,
    "SCMP_CMP_LE": 3,
    "SCMP_CMP_EQ": 4,
    "SCMP_CMP_GE": 5,
    "SCMP_CMP_GT": 6,
    "SCMP_CMP_MASKED_EQ": 7,
}
_ARCHITECTURES = {
    "SCMP_ARCH_X86": 0x40000003,
    "SCMP_ARCH_X86_64": 0xC000003E,
    "SCMP_ARCH_X32": 0x4000003E,
    "SCMP_ARCH_ARM": 0x40000028,
    "SCMP_ARCH_AARCH64": 0xC00000B7,
}
_ATTRIBUTE_NNP = 3
_ATTRIBUTE_OPTIMIZE = 8
_EPERM = 1
_EEXIST = 17
FLAGS = {"SECCOMP_FILTER_FLAG_TSYNC": 1, "SECCOMP_FILTER_FLAG_LOG": 2, "SECCOMP_FILTER_FLAG_SPEC_ALLOW": 4}


class _Comparison(ctypes.Structure):
    _fields_ = [("arg", ctypes.c_uint), ("op", ctypes.c_int), ("datum_a", ctypes.c_uint64), ("datum_b", ctypes.c_uint64)]


def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    except OSError as error:
        raise Unimplemented(f"linux.seccomp: libseccomp cannot be loaded: {error}",
                            hint="install the package libseccomp2, or leave linux.seccomp out") from error
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_release.argtypes = [ctypes.c_void_p]
    library.seccomp_release.restype = None
    library.seccomp_arch_add.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
    library.seccomp_arch_native.restype = ctypes.c_uint32
    library.seccomp_attr_set.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32]
    library.seccomp_syscall_resolve_name.argtypes = [ctypes.c_char_p]
    library.seccomp_rule_add_array.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint,
                                               ctypes.POINTER(_Comparison)]
    library.seccomp_export_bpf.argtypes = [ctypes.c_void_p, ctypes.c_int]
    return library


def _action(name: str, errno_ret: int | None, field: str) -> int:
    if name not in _ACTIONS:
        raise InvalidArgument(f"{field}: {name!r} is not an action dolium knows",
                              hint="SCMP_ACT_NOTIFY is not supported in this version" if "NOTIFY" in name else "")
    value = _ACTIONS[name]
    if name in ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE"):
        value |= (_EPERM if errno_ret is None else errno_ret) & 0xFFFF
    return value


def compile_profile(profile: dict[str, Any]) -> bytes:
    """The BPF program (8 bytes an instruction) for a ``linux.seccomp`` object.

    Raises InvalidArgument naming the field, Unimplemented when libseccomp is missing. System calls that libseccomp does
    not know are left out, as other runtimes do; the default action holds for them.
    """
    library = _library()
    default = _action(profile.get("defaultAction", ""), profile.get("defaultErrnoRet"), "linux.seccomp.defaultAction")
    context = library.seccomp_init(default)
    if not context:
        raise InvalidArgument("linux.seccomp.defaultAction: libseccomp refuses it")
    try:
        library.seccomp_attr_set(context, _ATTRIBUTE_NNP, 0)
        library.seccomp_attr_set(context, _ATTRIBUTE_OPTIMIZE, 2)
        for name in profile.get("architectures") or []:
            if name not in _ARCHITECTURES:
                raise InvalidArgument(f"linux.seccomp.architectures: {name!r} is unknown")
            result = library.seccomp_arch_add(context, _ARCHITECTURES[name])
            if result not in (0, -_EEXIST):
                raise InvalidArgument(f"linux.seccomp.architectures: {name}: {os.strerror(-result)}")
        for index, rule in enumerate(profile.get("syscalls") or []):
            _add_rule(library, context, rule, default, f"linux.seccomp.syscalls[{index}]")
        return _export(library, context)
    finally:
        library.seccomp_release(context)


def _add_rule(library: ctypes.CDLL, context: int, rule: dict[str, Any], default: int, field: str) -> None:
    action = _action(rule.get("action", ""), rule.get("errnoRet"), f"{field}.action")
    if action == default:
        return
    arguments = rule.get("args") or []
    # libseccomp joins by AND and takes an argument once; the specification's second comparison of an argument means OR
    indexes = [argument.get("index", 0) for argument in arguments]
    groups = [arguments] if len(set(indexes)) == len(indexes) else [[argument] for argument in arguments]
    for name in rule.get("names") or []:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number == -1:
            continue
        for group in groups:
            array = (_Comparison * max(len(group), 1))()
            for slot, argument in zip(array, group, strict=False):
                operator = argument.get("op", "")
                if operator not in _OPERATORS:
                    raise InvalidArgument(f"{field}.args: {operator!r} is not an operator")
                slot.arg, slot.op = argument.get("index", 0), _OPERATORS[operator]
                slot.datum_a, slot.datum_b = argument.get("value", 0), argument.get("valueTwo", 0)
            result = library.seccomp_rule_add_array(context, action, number, len(group), array)
            if result not in (0, -_EEXIST):
                raise InvalidArgument(f"{field}: {name}: {os.strerror(-result)}")


def _export(library: ctypes.CDLL, context: int) -> bytes:
    fd = os.memfd_create("seccomp")
    try:
        result = library.seccomp_export_bpf(context, fd)
        if result:
            raise InvalidArgument(f"linux.seccomp: libseccomp cannot make the program: {os.strerror(-result)}")
        return os.pread(fd, os.fstat(fd).st_size, 0)
    finally:
        os.close(fd)


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
    if profile.get("defaultErrnoRet") is not None:
        resolved["defaultErrnoRet"] = profile["defaultErrnoRet"]
    return resolved


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
