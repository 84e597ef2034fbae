"""CRIU's command line for a container: what lies outside of it, and the names both sides of a checkpoint know that by. Pure.

What CRIU cannot find from inside the container's namespaces has to be said on dump and given back on restore: bind mounts,
the host's device nodes on masks, the ends of pipes, files opened before the container had a root, namespaces of others.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

MODES = {"soft": "soft", "full": "full", "strict": "strict", "ignore": "ignore"}


class Mount:
    """A line of mountinfo: mount id, the file system's folder that is mounted, where, and the type."""

    __slots__ = ("identity", "kind", "place", "root")

    def __init__(self, line: str) -> None:
        fields = line.split(" ")
        self.identity = int(fields[0])
        self.root = unescaped(fields[3])
        self.place = unescaped(fields[4])
        self.kind = fields[fields.index("-") + 1]


def unescaped(text: str) -> str:
    """A path of mountinfo, where blank, tab, newline and backslash are three octal digits."""
    head, *rest = text.split("\\")
    return head + "".join(chr(int(part[:3], 8)) + part[3:] for part in rest)


def mounts(mountinfo: str) -> list[Mount]:
    """All mounts of a process, in the order in which they were made."""
    return [Mount(line) for line in mountinfo.splitlines()]


CLOSED_ON_EXEC = 0o2000000  # O_CLOEXEC among the flags of a descriptor


def fdinfo(text: str) -> dict[str, str]:
    """The fields of ``/proc/PID/fdinfo/N``."""
    return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)


def identity(fields: dict[str, str]) -> str:
    """Mount id and inode: the same for all descriptors of a file. Raises ValueError when the kernel does not tell the inode
    (it does since 5.14)."""
    if "ino" not in fields:
        raise ValueError("this kernel does not tell the inodes of open files")
    return f"{int(fields['mnt_id']):x}:{int(fields['ino']):x}"


def external_fd(target: str, fields: dict[str, str], known: set[int]) -> str | None:
    """CRIU's name for an open file that the container does not have itself: a pipe's, or that of a file on a mount outside
    (``known``: mount ids inside). None for any other. Raises ValueError as :func:`identity`."""
    if target.startswith("pipe:["):
        return target
    if not target.startswith("/") or target.startswith("/memfd:") or int(fields["mnt_id"]) in known:
        return None
    return f"file[{identity(fields)}]"


def sockets(net_unix: str) -> set[str]:
    """Inodes in ``/proc/PID/net/unix``."""
    return {line.split()[6] for line in net_unix.splitlines()[1:] if line}


def externals(names: Iterable[tuple[str, str]]) -> list[str]:
    """--external for mounts: (what CRIU knows, what it stands for)."""
    return [f"--external=mnt[{key}]:{value}" for key, value in names]


def errors(log: str, most: int = 3) -> list[str]:
    """The last errors of a log, without time stamps and without saying one twice."""
    found: dict[str, None] = {}
    for line in log.splitlines():
        _, error, rest = line.partition("Error (")
        if error:
            text = rest.partition("): ")[2].strip()
            found.pop(text, None)
            found[text] = None
    return list(found)[-most:]
