"""systemd's view of a container: the name of its scope, where its group is, its limits as properties. Pure, cold module.

Names and properties are the ones runc uses (its docs/systemd.md): the properties keep systemd from writing other values when
it realizes the unit again; the files, written afterwards, hold what systemd has no property for, to the last digit.
"""

from __future__ import annotations

from dolium.errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# A property: its name, D-Bus signature and value.
Property = tuple[str, str, object]

INFINITY = (1 << 64) - 1
SECOND = 1_000_000  # systemd's durations are microseconds
ANNOTATION = "org.systemd.property."


class Unit:
    """A container's scope. ``name``: of the unit; ``slice``: the unit above; ``group``: its cgroup, as a path below the root
    of the hierarchy."""

    __slots__ = ("group", "name", "slice")

    def __init__(self, name: str, slice_name: str, manager: str) -> None:
        self.name = name
        self.slice = slice_name
        self.group = f"{manager}{slice_path(slice_name)}/{name}"


def slice_path(name: str) -> str:
    """The folder of a slice: a dash is a step down, ``a-b.slice`` is ``/a.slice/a-b.slice``. Raises ValueError."""
    if name == "-.slice":
        return ""
    parts = name.removesuffix(".slice").split("-")
    if not name.endswith(".slice") or "/" in name or "" in parts:
        raise ValueError(f"{name!r} is not the name of a slice")
    return "".join(f"/{'-'.join(parts[: end + 1])}.slice" for end in range(len(parts)))


def unit_of(cgroups_path: str, identity: str, uid: int) -> Unit:
    """The scope for ``linux.cgroupsPath``: ``slice:prefix:name``; each part may be empty. Raises InvalidArgument."""
    field = "config.json: linux.cgroupsPath"
    parts = cgroups_path.split(":") if cgroups_path else ["", "dolium", identity]
    if len(parts) != 3:
        raise InvalidArgument(f'{field}: expected "slice:prefix:name" for the systemd cgroup driver, got {cgroups_path!r}')
    slice_name, prefix, name = parts[0] or ("user.slice" if uid else "system.slice"), parts[1], parts[2] or identity
    if name.endswith(".slice"):
        raise InvalidArgument(f"{field}: {name!r} is a slice; a container is a scope in one", hint="leave .slice out")
    unit = f"{prefix}-{name}.scope"
    if "/" in unit or len(unit) > 255 or unit.startswith("."):
        raise InvalidArgument(f"{field}: {unit!r} is not the name of a unit")
    try:
        return Unit(unit, slice_name, f"/user.slice/user-{uid}.slice/user@{uid}.service" if uid else "")
    except ValueError as error:
        raise InvalidArgument(f"{field}: {error}") from None


def start_properties(unit: Unit, identity: str, annotations: dict[str, str], limits: list[Property]) -> list[Property]:
    """What a scope is started with, but PIDs: who starts it knows the pid. What annotations say comes last."""
    return [("Description", "s", f"dolium container {identity}"), ("Slice", "s", unit.slice), ("Delegate", "b", True),
            ("MemoryAccounting", "b", True), ("CPUAccounting", "b", True), ("IOAccounting", "b", True),
            ("TasksAccounting", "b", True), ("DefaultDependencies", "b", False), *limits, *annotated(annotations)]


def annotated(annotations: dict[str, str]) -> list[Property]:
    """Properties that ``org.systemd.property.NAME`` annotations ask for, with a value in GVariant's text form; a NAME that
    ends with Sec is in seconds and becomes systemd's USec. Raises InvalidArgument."""
    found: list[Property] = []
    for key, text in annotations.items():
        if not key.startswith(ANNOTATION):
            continue
        name = key.removeprefix(ANNOTATION)
        try:
            if not name.isalnum() or not name.isascii():
                raise ValueError("is not the name of a property")
            signature, value = variant(text.strip())
            if name.endswith("Sec") and not name.endswith("USec"):
                if not isinstance(value, int) or isinstance(value, bool):
                    raise ValueError("is not a number of seconds")
                name, signature, value = f"{name.removesuffix('Sec')}USec", "t", value * SECOND
        except ValueError as error:
            raise InvalidArgument(f"config.json: annotations.{key}: {text!r} {error}") from None
        found.append((name, signature, value))
    return found


_TYPES = {"boolean": "b", "byte": "y", "int16": "n", "uint16": "q", "int32": "i", "uint32": "u", "int64": "x", "uint64": "t"}


def variant(text: str) -> tuple[str, Any]:
    """Signature and value of GVariant text: booleans, numbers (``uint64 5``), strings, arrays of strings."""
    if text in ("true", "false"):
        return "b", text == "true"
    if len(text) >= 2 and text[0] in "'\"" and text[-1] == text[0] and text[0] not in text[1:-1] and "\\" not in text:
        return "s", text[1:-1]
    if text.startswith("[") and text.endswith("]"):
        items = [variant(part.strip()) for part in text[1:-1].split(",")] if text[1:-1].strip() else []
        if any(signature != "s" for signature, _ in items):
            raise ValueError("is an array, but not of strings")
        return "as", [value for _, value in items]
    kind, _, digits = text.rpartition(" ")
    if (not kind or kind in _TYPES) and digits.lstrip("-").isascii() and digits.lstrip("-").isdigit():
        return _TYPES.get(kind, "i"), int(digits)
    raise ValueError("is not a value in GVariant's text form")


def properties(resources: dict[str, Any]) -> list[Property]:
    """``linux.resources`` as properties for cgroup v2. Devices are not among them: the BPF program is ours, and systemd
    leaves programs alone that it has not attached."""
    from dolium.linux.cgroup import v2

    found: list[Property] = []
    files: dict[str, str] = {}
    for file, value in v2.writes_for({**resources, "blockIO": None, "hugepageLimits": None, "rdma": None}):
        if file == "io.max" or (file == "io.weight" and not value.startswith("default ")):
            continue
        files[file] = value
    weight = (resources.get("blockIO") or {}).get("weight")
    if weight:
        found.append(("IOWeight", "t", v2.weight_of_blkio(weight)))
    for file, name in (("memory.max", "MemoryMax"), ("memory.high", "MemoryHigh"), ("memory.low", "MemoryLow"),
                       ("memory.min", "MemoryMin"), ("memory.swap.max", "MemorySwapMax"), ("pids.max", "TasksMax"),
                       ("cpu.weight", "CPUWeight")):
        if file in files and (files[file] == "max" or files[file].isdigit()):
            found.append((name, "t", INFINITY if files[file] == "max" else int(files[file])))
    if "cpu.max" in files:
        found += _quota(files["cpu.max"].split())
    for file, name in (("cpuset.cpus", "AllowedCPUs"), ("cpuset.mems", "AllowedMemoryNodes")):
        if file in files:
            found.append((name, "ay", mask(files[file], f"config.json: linux.resources.cpu.{file.removeprefix('cpuset.')}")))
    return found


def _quota(words: list[str]) -> list[Property]:
    """cpu.max as runc gives it to systemd: the share of a second, rounded up to what systemd shows (10 ms)."""
    period = int(words[1]) if len(words) > 1 and words[1].isdigit() else 100_000
    if words[0] == "max" or not words[0].isdigit():
        share = INFINITY
    else:
        share = int(words[0]) * SECOND // period
        share += -share % 10_000
    return [("CPUQuotaPerSecUSec", "t", share), ("CPUQuotaPeriodUSec", "t", period)]


def mask(text: str, field: str) -> list[int]:
    """A list of CPUs (``0-3,8``) as the bytes of a mask, lowest first. Raises InvalidArgument naming the field."""
    bits = 0
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not all(word.isascii() and word.isdigit() for word in (first, last)) or not int(first) <= int(last) < 8192:
            raise InvalidArgument(f"{field}: {text!r} is not a list such as 0-3,8")
        bits |= (1 << int(last) + 1) - (1 << int(first))
    return list(bits.to_bytes((bits.bit_length() + 7) // 8, "little"))
