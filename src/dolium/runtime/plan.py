"""The launch plan: kernel operations as data, with their stages, labels and binary form.

A plan is a list of operations. Each has a code, a stage, a label for people ("mount proc on /proc") and arguments of
the kinds its signature names: ``i`` integer, ``s`` bytes or str, ``l`` list of bytes or str. The C executor decodes the
same table (``native/executor/ops.def``). Cold module: imports nothing at run time.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

PLAN_VERSION = 1
FLAG_OLD_MOUNT_API = 1
FLAG_DEBUG = 2  # the front tells each operation and its time

PARENT_BEFORE_CLONE = 0
PARENT_AFTER_CLONE = 1
CHILD_BEFORE_PIVOT = 2
PARENT_BEFORE_PIVOT = 3
CHILD_AFTER_PIVOT = 4
PARENT_CREATED = 5
AFTER_START = 6
PARENT_STARTED = 7
AFTER_EXIT = 8
ON_FAILURE = 9

STAGES = (
    "parent-before-clone",
    "parent-after-clone",
    "child-before-pivot",
    "parent-before-pivot",
    "child-after-pivot",
    "parent-created",
    "after-start",
    "parent-started",
    "after-exit",
    "on-failure",
)

OPTIONAL = 1  # a failure is recorded, not fatal
# A failure here runs only the clean-ups before it in the plan: what the others would remove was not made by this plan.
# On a clean-up: it is for that case alone.
NOTHING_OURS = 2

MOUNT_COPY_UP = 0x10000  # mount_fs: what the target held is copied into the new file system

# The last slots are the shim's: the container's ends of its standard input, output and error.
SLOTS = 256
SLOT_STDIN, SLOT_STDOUT, SLOT_STDERR = 250, 251, 252

# name: (code, signature). Codes are never used again.
OPS: dict[str, tuple[int, str]] = {
    "print": (1, "is"),
    "exit_code": (2, "i"),
    "log_file": (3, "si"),
    "mkdir": (4, "sii"),
    "write_file": (5, "ssii"),
    "unlink": (6, "s"),
    "remove_dir": (7, "s"),
    "lock": (8, "s"),
    "open_path": (9, "isi"),
    "listen": (10, "is"),
    "connect": (11, "is"),
    "start": (12, "s"),
    "signal": (13, "iii"),
    "wait_gone": (14, "iii"),
    "hook": (16, "sllis"),
    "hold": (17, ""),
    "again": (18, "is"),
    "adopt": (19, "sii"),
    "open_tree": (30, "isii"),
    "mount_attr": (32, "iiiiii"),
    "user_namespace": (33, "iss"),
    "cg_mkdir": (40, "isii"),
    "cg_write": (41, "ssi"),
    "cg_join": (42, "i"),
    "cg_clone": (47, "i"),
    "cg_kill": (43, "l"),
    "cg_rmdir": (44, "s"),
    "cg_bpf_devices": (45, "ss"),
    "cg_frozen": (46, "si"),
    "ns_open": (50, "isi"),
    "ns_join": (51, "ii"),
    "clone": (52, "ii"),
    "proc_write": (55, "ss"),
    "become_root": (56, ""),
    "unshare": (57, "i"),
    "propagation": (70, "i"),
    "root_attach": (71, "i"),
    "mount_fs": (72, "sslisi"),
    "mount_tree": (73, "isii"),
    "mknod": (74, "siiiii"),
    "symlink": (75, "ss"),
    "mask": (76, "li"),
    "readonly": (77, "l"),
    "pivot": (79, "i"),
    "console": (81, "iii"),
    "mkdir_in_root": (82, "si"),
    "remount": (85, "sii"),
    "sysctl": (100, "ss"),
    "hostname": (101, "s"),
    "domainname": (102, "s"),
    "rlimit": (104, "iii"),
    "umask": (105, "i"),
    "keyring": (106, "s"),
    "setsid": (107, ""),
    "stdio": (108, "iii"),
    "user": (109, "iil"),
    "capabilities": (110, "iiii"),
    "no_new_privs": (111, ""),
    "seccomp": (112, "is"),
    "cwd": (113, "s"),
    "find_executable": (114, "sl"),
    "wait_start": (115, "i"),
    "preserve_fds": (116, "i"),
    "exec": (117, "sll"),
    "keep_caps": (118, ""),
    "drop_bounding": (119, "i"),
    "scheduler": (121, "s"),
    "io_priority": (122, "i"),
    "affinity": (123, "s"),
    "personality": (124, "i"),
    "memory_policy": (125, "is"),
    "seccomp_listener": (126, "isis"),
    "lsm": (128, "ss"),
    "enter_time": (129, ""),
    "close": (130, "i"),
    "loopback": (131, ""),
    "send_pidfd": (132, "is"),
    "take_back": (133, ""),
}
NAMES = {code: name for name, (code, _) in OPS.items()}

ENCODED_KEPT = 2048
_encoded: dict[tuple[object, ...] | None, bytes] = {}

PID = "\x01p"  # replaced by init's pid in templates
START_TIME = "\x01s"  # replaced by init's start time, clock ticks


class Op:
    """One operation. ``args`` follow the signature of ``OPS[name]``."""

    __slots__ = ("args", "flags", "label", "name", "stage")

    def __init__(self, stage: int, name: str, label: str, args: tuple[object, ...], flags: int = 0) -> None:
        self.stage = stage
        self.name = name
        self.label = label
        self.args = args
        self.flags = flags

    def __repr__(self) -> str:
        return f"<{STAGES[self.stage]} {self.label!r} {self.name}{self.args!r}>"


class Plan:
    """Operations in the order in which each stage runs them."""

    __slots__ = ("flags", "ops")

    def __init__(self, flags: int = 0) -> None:
        self.flags = flags
        self.ops: list[Op] = []

    def add(self, stage: int, name: str, label: str, *args: object, optional: bool = False,
            nothing_ours: bool = False) -> None:
        """Append an operation; its arguments are checked against the signature when the plan is encoded."""
        flags = (OPTIONAL if optional else 0) | (NOTHING_OURS if nothing_ours else 0)
        self.ops.append(Op(stage, name, label, args, flags))

    def stage(self, stage: int) -> Iterator[Op]:
        """The operations of one stage, in order."""
        return (op for op in self.ops if op.stage == stage)

    def named(self, name: str) -> list[Op]:
        """The operations of one name, in order."""
        return [op for op in self.ops if op.name == name]

    def part(self, stage: int) -> Plan:
        """A plan of one stage's operations."""
        plan = Plan(self.flags)
        plan.ops = list(self.stage(stage))
        return plan

    def describe(self) -> str:
        """A text a person reads: stage by stage, one line an operation. Running nothing."""
        lines = []
        for number, stage in enumerate(STAGES):
            ops = list(self.stage(number))
            if ops:
                lines.append(stage)
                lines.extend(f"  {op.label}{' (optional)' if op.flags & OPTIONAL else ''}" for op in ops)
        return "\n".join(lines) + "\n"

    def encode(self) -> bytes:
        """The binary form the executor reads (little-endian). Raises ValueError when an operation is malformed."""
        parts = [b"DOLM", PLAN_VERSION.to_bytes(2, "little"), self.flags.to_bytes(2, "little"),
                 len(self.ops).to_bytes(4, "little")]
        for op in self.ops:
            # most operations are the same in every launch of one host
            key: tuple[object, ...] | None = (op.stage, op.name, op.flags, op.label, op.args)
            try:
                known = _encoded.get(key)
            except TypeError:  # a list among the arguments
                known = key = None
            if known is not None:
                parts.append(known)
                continue
            code, signature = OPS[op.name]
            if len(signature) != len(op.args):
                raise ValueError(f"{op.name} takes {len(signature)} arguments, got {len(op.args)}")
            body = bytearray(encode_string(op.label))
            for kind, arg in zip(signature, op.args, strict=True):
                if kind == "i" and isinstance(arg, int):
                    # masks of 64 bits are unsigned, the field is signed: the bits are what counts
                    body += (arg & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little")
                elif kind == "s" and isinstance(arg, (bytes, str)):
                    body += encode_string(arg)
                elif kind == "l" and isinstance(arg, (list, tuple)):
                    body += encode_list(arg)
                else:
                    raise ValueError(f"{op.name}: argument {arg!r} is not of kind {kind}")
            head = code.to_bytes(2, "little") + bytes((op.stage, op.flags)) + len(body).to_bytes(4, "little")
            known = head + bytes(body)
            parts.append(known)
            if key is not None and len(known) < 1024:
                if len(_encoded) >= ENCODED_KEPT:
                    _encoded.clear()
                _encoded[key] = known
        return b"".join(parts)


def encode_string(value: str | bytes) -> bytes:
    """u32 length, bytes, NUL. A str is encoded as the file system does (surrogateescape)."""
    raw = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
    return len(raw).to_bytes(4, "little") + raw + b"\0"


def encode_list(values: Sequence[str | bytes] | Iterable[str | bytes]) -> bytes:
    """u32 count, then each string."""
    encoded = [encode_string(value) for value in values]
    return len(encoded).to_bytes(4, "little") + b"".join(encoded)


def decode(data: bytes) -> Plan:
    """The plan of a binary form. Raises ValueError. The executor has its own decoder; this one is for tests and tools."""
    if data[:4] != b"DOLM" or int.from_bytes(data[4:6], "little") != PLAN_VERSION or len(data) < 12:
        raise ValueError("not a launch plan of this version")
    plan = Plan(int.from_bytes(data[6:8], "little"))
    at = 12
    for _ in range(int.from_bytes(data[8:12], "little")):
        end = at + 8 + int.from_bytes(data[at + 4 : at + 8], "little")
        if len(data) < at + 8 or len(data) < end:
            raise ValueError("cut short")
        code = int.from_bytes(data[at : at + 2], "little")
        stage, flags = data[at + 2], data[at + 3]
        if code not in NAMES or stage >= len(STAGES):
            raise ValueError("unknown operation or stage")
        name = NAMES[code]
        label, at = _string(data, at + 8)
        args: list[object] = []
        for kind in OPS[name][1]:
            if kind == "i":
                args.append(int.from_bytes(data[at : at + 8], "little", signed=True))
                at += 8
            elif kind == "s":
                value, at = _string(data, at)
                args.append(value)
            else:
                count = int.from_bytes(data[at : at + 4], "little")
                at += 4
                values = []
                for _ in range(count):
                    value, at = _string(data, at)
                    values.append(value)
                args.append(values)
        if at != end:
            raise ValueError(f"{name}: bytes left over")
        plan.ops.append(Op(stage, name, label.decode("utf-8", "surrogateescape"), tuple(args), flags))
    if at != len(data):
        raise ValueError("bytes left over")
    return plan


def _string(data: bytes, at: int) -> tuple[bytes, int]:
    size = int.from_bytes(data[at : at + 4], "little")
    if at + 4 + size >= len(data) or data[at + 4 + size] != 0:
        raise ValueError("malformed string")
    return data[at + 4 : at + 4 + size], at + 5 + size
