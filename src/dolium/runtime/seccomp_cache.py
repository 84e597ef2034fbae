"""The program for ``linux.seccomp``, from the cache or by libseccomp. Cold module: on a hit nothing more is imported."""

from __future__ import annotations

import json

from dolium.runtime import plan as P

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dolium.runtime.facts import Facts
    from dolium.runtime.plan import Plan

CACHE_VERSION = 1


def digest(profile: dict[str, Any], machine: str) -> str:
    """The cache's key: profile, machine and the version of this module's output."""
    import _blake2  # the C module itself: hashlib would bring OpenSSL in

    text = json.dumps([CACHE_VERSION, machine, profile], sort_keys=True).encode()
    value: str = _blake2.blake2b(text, digest_size=20).hexdigest()
    return value


def program(profile: dict[str, Any], machine: str, facts: Facts, folder: str) -> tuple[bytes, str | None]:
    """(program, path to keep it at or None when it came from there). Raises InvalidArgument naming the field."""
    path = f"{folder}/{digest(profile, machine)}.bpf"
    kept = facts.read(path)
    if kept is not None and kept and len(kept) % 8 == 0:
        return kept, None
    from dolium.linux.seccomp import compile_profile

    return compile_profile(profile), path


def keep(plan: Plan, folder: str, path: str | None, compiled: bytes) -> None:
    """Have the front write the program, by rename; a cache that cannot be written is no failure."""
    if path is None:
        return
    plan.add(P.PARENT_BEFORE_CLONE, "mkdir", f"make {folder}", folder, 0o700, 1, optional=True)
    plan.add(P.PARENT_BEFORE_CLONE, "write_file", f"keep {path}", path, compiled.replace(b"\x01", b"\x01\x01"), 0o600, 1,
             optional=True)
