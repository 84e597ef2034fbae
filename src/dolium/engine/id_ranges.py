"""Which host ids a container's user namespace gets: none, those of ``--userns-remap``, or a range of its own.

Nothing that containers share belongs to a range: layers and volumes are mounted with their owners mapped. So a range is free
again when its container is removed, and any container may have any.
"""

from __future__ import annotations

import pwd
from collections.abc import Iterable, Sequence
from typing import Any

from dolium.errors import InvalidArgument, NotFound, ResourceExhausted

SIZE = 65536
"""Ids of a container."""
POOL = (0x70000000, 4096)
"""First id and ranges for ``--userns auto`` where /etc/subuid says nothing: above what distributions, containers of systemd
and ordinary users' ranges use."""
USERS = ("dolium", "containers")
"""Whose entries in /etc/subuid and /etc/subgid say otherwise."""


def subordinate(path: str, user: str) -> tuple[int, int] | None:
    """The first (id, how many) of a user's name or uid in /etc/subuid or /etc/subgid; None without one."""
    names = {user}
    try:
        names.add(str(pwd.getpwnam(user).pw_uid))
    except KeyError:
        names.add(user)
    try:
        with open(path) as file:
            for line in file:
                name, _, rest = line.strip().partition(":")
                first, _, count = rest.partition(":")
                if name in names and first.isdigit() and count.isdigit():
                    return int(first), int(count)
    except FileNotFoundError:
        return None
    return None


def remapped(user: str) -> list[int]:
    """The range of ``--userns-remap USER`` ("default" is dockremap). Raises NotFound, InvalidArgument."""
    name = "dockremap" if user == "default" else user.partition(":")[0]
    uids, gids = subordinate("/etc/subuid", name), subordinate("/etc/subgid", name)
    if uids is None or gids is None:
        raise NotFound(f"--userns-remap {user}: {name} has no entry in /etc/{'subuid' if uids is None else 'subgid'}",
                       hint=f"echo {name}:{POOL[0]}:{SIZE} >> both files")
    if uids != gids or uids[1] < SIZE:
        raise InvalidArgument(f"--userns-remap {user}: {name} needs the same {SIZE} ids in /etc/subuid and /etc/subgid",
                              hint=f"there are {uids[1]} from {uids[0]} on, and {gids[1]} from {gids[0]} on")
    return [uids[0], SIZE]


def pool() -> tuple[int, int]:
    """(first id, ranges) that ``--userns auto`` takes from."""
    for user in USERS:
        found = subordinate("/etc/subuid", user)
        if found is not None and found == subordinate("/etc/subgid", user):
            return found[0], found[1] // SIZE
    return POOL


def free(taken: Iterable[Sequence[int]]) -> list[int]:
    """A range nobody has an id of. ``taken``: (first, how many) of those in use, none for a container without one; they
    need not begin where ours do: another pool, or --userns-remap, gave them. Raises ResourceExhausted."""
    first, count = pool()
    used: set[int] = set()
    for ids in taken:
        if ids:
            used.update(range((ids[0] - first) // SIZE, (ids[0] + ids[1] - 1 - first) // SIZE + 1))
    for number in range(count):
        if number not in used:
            return [first + number * SIZE, SIZE]
    raise ResourceExhausted(f"--userns auto: all {count} ranges of ids are taken",
                            hint=f"give the user {USERS[0]} more in /etc/subuid and /etc/subgid")


def check(host: dict[str, Any]) -> None:
    """What a user namespace cannot have, in Docker's words. Raises InvalidArgument."""
    if host.get("Privileged"):
        raise InvalidArgument("privileged mode is incompatible with user namespaces. You must run the container in the host "
                              "namespace when running privileged mode", hint="--userns host")
    for key, what in (("NetworkMode", "network"), ("PidMode", "PID")):
        if host.get(key) == "host":
            raise InvalidArgument(f"cannot share the host's {what} namespace when user namespaces are enabled",
                                  hint="--userns host")
