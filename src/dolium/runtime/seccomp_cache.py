"""The program for ``linux.seccomp``, from the cache or compiled. Cold module: on a hit nothing more is imported.

A kept program is executed by the kernel as it is, so where it lies is checked: folder and file must belong to root or to the
caller and be written by nobody else, otherwise the program is compiled anew and not kept there.
"""

from __future__ import annotations

import json

from dolium.errors import DoliumError, InvalidArgument
from dolium.runtime import plan as P

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dolium.runtime.facts import Facts
    from dolium.runtime.plan import Plan

COMPILER_VERSION = 2
"""Part of the key: raised whenever the compiler gives another program for the same profile."""

RELEASE = "read:/proc/sys/kernel/osrelease"
"""The query the key needs, to be asked for together with others."""

_FLAGS = {"SECCOMP_FILTER_FLAG_TSYNC": 1, "SECCOMP_FILTER_FLAG_LOG": 2, "SECCOMP_FILTER_FLAG_SPEC_ALLOW": 4,
          "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV": 32}
_TSYNC, _WAIT_KILLABLE_RECV = 1, 32
_S_IFMT, _S_IFREG, _S_IFDIR, _OTHERS_WRITE = 0o170000, 0o100000, 0o040000, 0o022


def needs_listener(profile: dict[str, Any]) -> bool:
    """Whether a rule has SCMP_ACT_NOTIFY: seccomp(2) is then asked for a listener (SECCOMP_FILTER_FLAG_NEW_LISTENER), whose
    fd goes to ``linux.seccomp.listenerPath``. Raises InvalidArgument for what runc refuses too."""
    found = False
    for index, rule in enumerate(profile.get("syscalls") or []):
        if rule.get("action") == "SCMP_ACT_NOTIFY":
            found = True
            if "write" in (rule.get("names") or []):
                raise InvalidArgument(
                    f"linux.seccomp.syscalls[{index}]: SCMP_ACT_NOTIFY cannot be used for the write syscall")
    if found and not profile.get("listenerPath"):
        raise InvalidArgument("linux.seccomp.listenerPath is not set, but a rule has SCMP_ACT_NOTIFY",
                              hint="name the unix socket of the agent that answers")
    return found


def flags(profile: dict[str, Any]) -> int:
    """seccomp(2)'s flags, without SECCOMP_FILTER_FLAG_NEW_LISTENER. Raises InvalidArgument naming the field.

    Where the profile names none, none is set; runc would set SPEC_ALLOW, which since Linux 5.16 changes nothing.
    """
    value = 0
    for index, name in enumerate(profile.get("flags") or []):
        if name not in _FLAGS:
            raise InvalidArgument(f"linux.seccomp.flags[{index}]: {name!r} is not a flag dolium knows")
        value |= _FLAGS[name]
    listener = needs_listener(profile)
    if value & _WAIT_KILLABLE_RECV and not listener:
        raise InvalidArgument("linux.seccomp.flags: SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV needs SCMP_ACT_NOTIFY")
    # The process that becomes the container's has one thread: TSYNC changes nothing. With a listener there is a second one
    # for a moment, which hands the fd over and must not be filtered.
    return value & ~_TSYNC if listener else value


def digest(profile: dict[str, Any], machine: str, release: str) -> str:
    """The cache's key: profile, machine, kernel release, and the version of the compiler."""
    import _blake2  # the C module itself: hashlib would bring OpenSSL in

    # flags and listener are not part of the program: containers that differ in them share it
    rules = {key: profile.get(key) for key in ("defaultAction", "defaultErrnoRet", "architectures", "syscalls")}
    text = json.dumps([COMPILER_VERSION, machine, release, rules], sort_keys=True).encode()
    value: str = _blake2.blake2b(text, digest_size=20).hexdigest()
    return value


def program(profile: dict[str, Any], machine: str, facts: Facts, folder: str, uid: int = 0) -> tuple[bytes, str | None]:
    """(program, path to keep it at, or None when it came from there or may not be kept). ``uid``: the caller's.

    Raises InvalidArgument naming the field; Need when a fact is missing.
    """
    facts.want(RELEASE)
    release = (facts.read("/proc/sys/kernel/osrelease") or b"").decode().strip()
    path = f"{folder}/{digest(profile, machine, release)}.bpf"
    facts.want(f"stat:{folder}", f"stat:{path}", f"read:{path}")
    safe = False
    try:
        place, file = facts.stat(folder), facts.stat(path)
        safe = place is None or _is_ours(place, _S_IFDIR, uid)
        if safe and file is not None and _is_ours(file, _S_IFREG, uid):
            kept = facts.read(path)
            if kept and len(kept) % 8 == 0:
                return kept, None
    except DoliumError:
        pass  # what cannot be read is no cache
    from dolium.linux.seccomp import compile_profile

    return compile_profile(profile, machine), path if safe else None


def _is_ours(stat: tuple[int, int, int, int], kind: int, uid: int) -> bool:
    mode, owner = stat[0], stat[1]
    return mode & _S_IFMT == kind and owner in (0, uid) and not mode & _OTHERS_WRITE


def keep(plan: Plan, folder: str, path: str | None, compiled: bytes) -> None:
    """Have the front write the program, by rename; a cache that cannot be written is no failure."""
    if path is None:
        return
    plan.add(P.PARENT_BEFORE_CLONE, "mkdir", f"make {folder}", folder, 0o700, 1, optional=True)
    plan.add(P.PARENT_BEFORE_CLONE, "write_file", f"keep {path}", path, compiled.replace(b"\x01", b"\x01\x01"), 0o600, 1,
             optional=True)
