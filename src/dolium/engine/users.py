"""``--user`` resolved inside a container's root: uid, gid, groups, home (Docker's rules). Pure but for two files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dolium.errors import InvalidArgument

Reader = Callable[[str], bytes | None]


@dataclass(frozen=True, slots=True)
class User:
    """Who runs. ``groups``: additional gids, sorted."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


def _rows(text: bytes | None, fields: int) -> list[list[str]]:
    rows = []
    for line in (text or b"").decode("utf-8", "replace").splitlines():
        parts = line.split(":")
        numbers = parts[2:4] if fields == 6 else parts[2:3]
        if len(parts) >= fields and not line.startswith("#") and all(part.isascii() and part.isdigit() for part in numbers):
            rows.append(parts)  # the image wrote it: a line that makes no sense is passed over
    return rows


def resolve(spec: str, read: Reader, extra_groups: Iterable[str] = ()) -> User:
    """``""``, ``uid``, ``name``, ``uid:gid``, ``name:group``. ``read`` gives a file inside the root or None.

    Raises InvalidArgument with Docker's words when a name is not in the container's passwd or group file.
    """
    name, colon, group = spec.partition(":")
    passwd = _rows(read("/etc/passwd"), 6)
    groups = _rows(read("/etc/group"), 4)
    uid, gid, home, login = 0, 0, "/", ""
    wanted = name or "0"
    row = next((row for row in passwd if row[0] == wanted), None)
    if row is None and wanted.isdigit():
        row = next((row for row in passwd if row[2] == wanted), None)
    if row is not None:
        login, uid, gid, home = row[0], _identifier(row[2], "uid"), _identifier(row[3], "gid"), row[5] or "/"
    elif wanted.isdigit():
        uid = _identifier(wanted, "uid")
        home = "/root" if uid == 0 and not passwd else "/"
    else:
        raise InvalidArgument(f"unable to find user {name}: no matching entries in passwd file")
    if colon and group:
        gid = _group(group, groups)
        additional: set[int] = set()
    else:
        additional = {int(entry[2]) for entry in groups if login and login in entry[3].split(",") and entry[2].isdigit()}
    additional.update(_group(extra, groups) for extra in extra_groups)
    return User(uid, gid, tuple(sorted(additional)), home)


def _group(name: str, groups: list[list[str]]) -> int:
    row = next((row for row in groups if row[0] == name), None)
    if row is not None:
        return _identifier(row[2], "gid")
    if name.isdigit():
        return _identifier(name, "gid")
    raise InvalidArgument(f"unable to find group {name}: no matching entries in group file")


def _identifier(text: str, what: str) -> int:
    value = int(text)
    if value > 0xFFFFFFFE:
        raise InvalidArgument(f"{what} {text} is out of range: uids and gids must be in range 0-4294967294")
    return value
