"""Mount options as people write them, in the terms of the new mount API (mount_setattr(2), fsopen(2)). Cold module."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

MS_RDONLY = 1
MS_BIND = 1 << 12
MS_REC = 1 << 14
MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20

ATTR_RDONLY = 0x01
ATTR_NOSUID = 0x02
ATTR_NODEV = 0x04
ATTR_NOEXEC = 0x08
ATTR_NOATIME = 0x10
ATTR_STRICTATIME = 0x20
ATTR_ATIME_FIELD = 0x70
ATTR_NODIRATIME = 0x80
ATTR_NOSYMFOLLOW = 0x200000

# option: (attributes set, attributes cleared)
ATTRIBUTES: dict[str, tuple[int, int]] = {
    "ro": (ATTR_RDONLY, 0),
    "rw": (0, ATTR_RDONLY),
    "nosuid": (ATTR_NOSUID, 0),
    "suid": (0, ATTR_NOSUID),
    "nodev": (ATTR_NODEV, 0),
    "dev": (0, ATTR_NODEV),
    "noexec": (ATTR_NOEXEC, 0),
    "exec": (0, ATTR_NOEXEC),
    "noatime": (ATTR_NOATIME, ATTR_ATIME_FIELD),
    "atime": (0, ATTR_ATIME_FIELD),
    "relatime": (0, ATTR_ATIME_FIELD),
    "norelatime": (0, ATTR_ATIME_FIELD),
    "strictatime": (ATTR_STRICTATIME, ATTR_ATIME_FIELD),
    "nostrictatime": (0, ATTR_ATIME_FIELD),
    "nodiratime": (ATTR_NODIRATIME, 0),
    "diratime": (0, ATTR_NODIRATIME),
    "nosymfollow": (ATTR_NOSYMFOLLOW, 0),
    "symfollow": (0, ATTR_NOSYMFOLLOW),
}
PROPAGATIONS: dict[str, int] = {
    "private": MS_PRIVATE,
    "rprivate": MS_PRIVATE | MS_REC,
    "slave": MS_SLAVE,
    "rslave": MS_SLAVE | MS_REC,
    "shared": MS_SHARED,
    "rshared": MS_SHARED | MS_REC,
    "unbindable": MS_UNBINDABLE,
    "runbindable": MS_UNBINDABLE | MS_REC,
}

# Of a file system as a whole; the kernel takes them of any type's options.
WHOLE = ("sync", "dirsync", "lazytime", "nolazytime", "mand")
# What mount(8) knows and no file system is told: the default, or of no effect on a mount of today.
IGNORED = ("", "defaults", "async", "nomand", "loud", "silent", "remount", "acl", "noacl", "iversion", "noiversion")


def tidy(path: str) -> str:
    """An absolute path of a name for each part, as filepath.Clean has it: what leads out of the root ends at it."""
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            parts = parts[:-1]
        elif part not in ("", "."):
            parts.append(part)
    return "/" + "/".join(parts)


class Options:
    """Parsed options of one mount.

    ``set``, ``clear``: attributes of the mount itself; ``recursive_set``, ``recursive_clear``: of all below too;
    ``bind``: None, ``bind`` or ``rbind``; ``propagation``: MS_* flags or 0; ``data``: options for the file system;
    ``copy_up``: tmpcopyup was asked for; ``idmap``: None, ``idmap`` or ``ridmap``.
    """

    __slots__ = ("bind", "clear", "copy_up", "data", "idmap", "propagation", "recursive_clear", "recursive_set", "set")

    def __init__(self, options: Iterable[str]) -> None:
        self.set = self.clear = self.recursive_set = self.recursive_clear = self.propagation = 0
        self.bind: str | None = None
        self.idmap: str | None = None
        self.copy_up = False
        self.data: list[str] = []
        for option in options:
            self._take(option)

    def _take(self, option: str) -> None:
        if option in ATTRIBUTES:
            add, remove = ATTRIBUTES[option]
            self.set = self.set & ~remove | add
            self.clear = self.clear & ~add | remove
        elif option in ("bind", "rbind"):
            self.bind = option
        elif option in ("idmap", "ridmap"):
            self.idmap = option
        elif option in PROPAGATIONS:
            self.propagation = PROPAGATIONS[option]
        elif option[:1] == "r" and option[1:] in ATTRIBUTES:
            add, remove = ATTRIBUTES[option[1:]]
            self.recursive_set = self.recursive_set & ~remove | add
            self.recursive_clear = self.recursive_clear & ~add | remove
        elif option == "tmpcopyup":
            self.copy_up = True
        elif option in ("async", "nomand"):  # the default; of two that contradict each other the last holds
            self.data = [one for one in self.data if one != {"async": "sync", "nomand": "mand"}[option]]
        elif option not in IGNORED:
            # runc joins them, the kernel takes them apart again; an overlay's folders may have commas of their own
            self.data += [option] if "dir=" in option else option.split(",")
