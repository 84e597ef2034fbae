"""What a create request asks to have mounted: -v, --mount, --tmpfs, --volumes-from and the image's VOLUME. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from posixpath import normpath
from typing import Any

from dolium.engine.model import Mount
from dolium.engine.request import strings
from dolium.errors import InvalidArgument
from dolium.units import parse_size
from dolium.volumes.local import check as check_options

VOLUME_NAME = re.compile(r"^[a-zA-Z0-9][a-zA-Z0-9_.-]+\Z")
_PROPAGATIONS = ("private", "rprivate", "slave", "rslave", "shared", "rshared")
_KINDS = {"bind": "BindOptions", "volume": "VolumeOptions", "tmpfs": "TmpfsOptions"}
_TMPFS_FLAGS = ("ro", "rw", "exec", "noexec", "suid", "nosuid", "dev", "nodev", "atime", "noatime", "diratime", "nodiratime",
                "relatime", "norelatime", "strictatime", "nostrictatime", "sync", "async", "dirsync")
_TMPFS_KEYS = ("size", "mode", "uid", "gid", "nr_inodes", "nr_blocks", "huge", "mpol")
_PROC_FILES = frozenset(f"/proc/{name}" for name in (
    "cpuinfo", "diskstats", "loadavg", "meminfo", "net/dev", "slabinfo", "stat", "swaps", "uptime",
    "sys/crypto/fips_enabled", "sys/kernel/ns_last_pid"))
_IDS = re.compile(r"\d{1,10}-\d{1,10}-\d{1,10}(#\d{1,10}-\d{1,10}-\d{1,10})*\Z", re.ASCII)


def parse_mounts(config: dict[str, Any], host: dict[str, Any], lent: Sequence[Mount] = ()) -> list[Mount]:
    """One mount a target. ``lent`` are those of --volumes-from, which give way to what is asked for outright, as the image's
    volumes give way to all. Volumes come without a source: the engine fills it in. Raises InvalidArgument.
    """
    driver = host.get("VolumeDriver") or "local"
    if driver != "local":
        raise InvalidArgument(f"volume driver {driver!r} is not available", hint="this version has the driver local")
    found: dict[str, Mount] = {}
    for bind in strings(host.get("Binds"), "Binds"):
        _add(found, _bind(bind))
    for entry in host.get("Mounts") or []:
        _add(found, _mount(entry))
    for target, options in (host.get("Tmpfs") or {}).items():
        _add(found, Mount("tmpfs", "", _target(target), options=_tmpfs_words(options.split(","))))
    given = {mount.target: mount for mount in lent}
    found = {**given, **found}
    for target in config.get("Volumes") or {}:
        clean = _target(target)
        if clean not in found:
            found[clean] = Mount("volume", "", clean, anonymous=True)
    for mount in found.values():
        _spare_proc(mount)
    return sorted(found.values(), key=lambda mount: mount.target.count("/"))


def from_others(text: str) -> tuple[str, bool]:
    """(container, read-only?) of one --volumes-from. Raises InvalidArgument."""
    name, colon, mode = text.partition(":")
    if not name:
        raise InvalidArgument(f"volumes-from specification cannot be an empty string: {text!r}")
    words = mode.split(",") if colon else []
    if any(word not in ("ro", "rw", "z", "Z") for word in words) or {"ro", "rw"} <= set(words):
        raise InvalidArgument(f"invalid mode: {mode}", hint="NAME, NAME:ro or NAME:rw")
    return name, "ro" in words


def lend(mounts: Sequence[Mount], read_only: bool) -> list[Mount]:
    """What another container's volumes and host folders are in one that takes them over: never filled from its image."""
    return [replace(mount, read_only=mount.read_only or read_only, no_copy=True)
            for mount in mounts if mount.kind in ("bind", "volume")]


def mappings(text: str) -> dict[str, list[dict[str, int]]]:
    """uidMappings and gidMappings of ``uids=0-1000-1#1-2000-5;gids=…`` (id on the disk, id that is seen, how many).
    Raises InvalidArgument."""
    found: dict[str, list[dict[str, int]]] = {}
    for part in text.split(";"):
        kind, _, ids = part.partition("=")
        if kind not in ("uids", "gids") or not _IDS.match(ids) or f"{kind[:3]}Mappings" in found:
            raise InvalidArgument(f"invalid idmap {text!r}", hint="uids=0-100000-65536;gids=0-100000-65536, or idmap alone")
        triples = [[int(number) for number in one.split("-")] for one in ids.split("#")]
        if any(size == 0 or max(inside, outside) + size > (1 << 32) - 1 for inside, outside, size in triples):
            raise InvalidArgument(f"invalid idmap {text!r}: ids end at 4294967294, and a range has one at least")
        for column in (0, 1):
            ranges = sorted((one[column], one[2]) for one in triples)
            if any(low + size > after for (low, size), (after, _) in pairwise(ranges)):
                raise InvalidArgument(f"invalid idmap {text!r}: its ranges overlap")
        found[f"{kind[:3]}Mappings"] = [{"containerID": inside, "hostID": outside, "size": size}
                                        for inside, outside, size in triples]
    if len(found) < 2:
        raise InvalidArgument(f"invalid idmap {text!r}: it needs uids and gids")
    return found


def _add(found: dict[str, Mount], mount: Mount) -> None:
    if mount.target in found:
        raise InvalidArgument(f"Duplicate mount point: {mount.target}")
    found[mount.target] = mount


def _target(path: str) -> str:
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            parts = parts[:-1]
        elif part not in ("", "."):
            parts.append(part)
    if not path.startswith("/"):
        raise InvalidArgument(f"invalid mount path: '{path}' mount path must be absolute")
    if not parts:
        raise InvalidArgument("invalid specification: destination can't be '/'")
    return "/" + "/".join(parts)


def _spare_proc(mount: Mount) -> None:
    """Nothing of an image or a volume takes the place of /proc, whose masks would lie on that then; only what is proc
    itself, or a file of those that tools like lxcfs make (the list is runc's). Raises InvalidArgument."""
    inside = mount.target == "/proc" or mount.target.startswith("/proc/")
    of_proc = mount.kind == "bind" and normpath(mount.source).split("/")[:2] == ["", "proc"]
    if inside and not of_proc and not (mount.kind == "bind" and mount.target in _PROC_FILES):
        raise InvalidArgument(f"invalid mount: {mount.target!r} cannot be mounted because it is inside /proc")


def _tmpfs_words(words: list[str]) -> list[str]:
    """Raises InvalidArgument for an option no tmpfs has, which the kernel would only name at the start."""
    kept = [word for word in words if word]
    for number, word in enumerate(kept):
        key, equals, value = word.partition("=")
        if equals == "" and word in (*_TMPFS_FLAGS, *_PROPAGATIONS):
            continue
        if not value or key not in _TMPFS_KEYS:
            raise InvalidArgument(f"invalid tmpfs option [{word!r}]", hint="such as size=64m, mode=1777, uid=1000, noexec")
        if key == "size" and not value.endswith("%"):
            size = parse_size(value, name="tmpfs size")
            if "." in value:  # the kernel reads whole numbers
                kept[number] = f"size={size}"
        if key == "mode" and not re.fullmatch(r"[0-7]{1,5}", value, re.ASCII):
            raise InvalidArgument(f"invalid tmpfs option [{word!r}]: {value} is no octal mode")
    return kept


def _bind(text: str) -> Mount:
    parts = text.split(":")
    if len(parts) == 1:
        return Mount("volume", "", _target(text), anonymous=True)
    if len(parts) > 3 or not parts[0] or not parts[1]:
        raise InvalidArgument(f"invalid volume specification: '{text}'")
    source, target = parts[0], _target(parts[1])
    options = parts[2].split(",") if len(parts) == 3 else []
    mount = Mount("bind" if source.startswith("/") else "volume", source if source.startswith("/") else "", target)
    if mount.kind == "volume":
        if not VOLUME_NAME.match(source):
            raise InvalidArgument(f"invalid volume specification: '{text}': {source!r} includes invalid characters for a "
                                  "local volume name", hint="use an absolute path for a host folder")
        mount.name = source
    for option in options:
        if option in ("ro", "rw"):
            mount.read_only = option == "ro"
        elif option == "nocopy" and mount.kind == "volume":
            mount.no_copy = True
        elif option in _PROPAGATIONS and mount.kind == "bind":
            mount.propagation = option
        elif (option == "idmap" or option.startswith("idmap=")) and mount.kind == "bind":
            mount.idmap = _idmap(option)
        elif option not in ("z", "Z", "cached", "delegated", "consistent", ""):  # SELinux labels nothing here
            raise InvalidArgument(f"invalid mode: {option}")
    return mount


def parse_volume(text: str) -> Mount:
    """``NAME:/target[:ro]``: what -v takes, of a volume with a name. Raises InvalidArgument."""
    if "\0" in text:
        raise InvalidArgument(f"{text!r}: a zero byte is in no path")
    if ":" not in text:
        raise InvalidArgument(f"{text!r} names no volume and its place", hint="NAME:/target, or NAME:/target:ro")
    mount = _bind(text)
    if mount.kind != "volume":
        raise InvalidArgument(f"{text!r} names no volume", hint="NAME:/target, or NAME:/target:ro")
    return mount


def _idmap(option: str) -> str:
    _, equals, text = option.partition("=")
    if not equals:
        return "idmap"
    mappings(text)
    return text


def _wrong(kind: str, why: str) -> InvalidArgument:
    return InvalidArgument(f"invalid mount config for type \"{kind}\": {why}")


def _mount(entry: dict[str, Any]) -> Mount:
    kind, source = entry.get("Type") or "volume", entry.get("Source") or ""
    if kind not in _KINDS:
        raise _wrong(kind, "mount type unknown")
    if not entry.get("Target"):
        raise _wrong(kind, "field Target must not be empty")
    for other, field in _KINDS.items():
        if other != kind and entry.get(field):
            raise _wrong(kind, f"field {field} must not be specified")
    try:
        target = _target(entry["Target"])
    except InvalidArgument as error:
        raise _wrong(kind, str(error)) from None
    options, read_only = entry.get(_KINDS[kind]) or {}, bool(entry.get("ReadOnly"))
    if kind == "bind":
        return _bind_mount(source, target, read_only, options)
    if kind == "tmpfs":
        if source:
            raise _wrong(kind, "field Source must not be specified")
        size, mode = options.get("SizeBytes") or 0, options.get("Mode") or 0
        if not isinstance(size, int) or not isinstance(mode, int) or size < 0 or mode < 0:
            raise _wrong(kind, "SizeBytes and Mode must be numbers, not negative")
        words = ([f"size={size}"] if size else []) + ([f"mode={mode:o}"] if mode else [])
        for pair in options.get("Options") or []:
            words.append("=".join(pair))
        return Mount("tmpfs", "", target, read_only, options=_tmpfs_words(words))
    return _volume_mount(source, target, read_only, options)


def _bind_mount(source: str, target: str, read_only: bool, options: dict[str, Any]) -> Mount:
    if not source:
        raise _wrong("bind", "field Source must not be empty")
    if not source.startswith("/"):
        raise _wrong("bind", f"invalid mount path: '{source}' mount path must be absolute")
    propagation = options.get("Propagation") or ""
    if propagation and propagation not in _PROPAGATIONS:
        raise _wrong("bind", f"invalid propagation mode: {propagation}")
    recursive = ""
    if options.get("ReadOnlyForceRecursive"):
        if options.get("ReadOnlyNonRecursive"):
            raise _wrong("bind", "ReadOnlyForceRecursive and ReadOnlyNonRecursive exclude each other")
        if not read_only or options.get("NonRecursive"):
            raise _wrong("bind", "ReadOnlyForceRecursive needs ReadOnly, and excludes NonRecursive")
        recursive = "readonly"
    elif options.get("NonRecursive"):
        recursive = "disabled"
    elif options.get("ReadOnlyNonRecursive"):
        if not read_only:
            raise _wrong("bind", "ReadOnlyNonRecursive needs ReadOnly")
        recursive = "writable"
    idmap = options.get("IDMap") or ""
    return Mount("bind", source, target, read_only, propagation=propagation, recursive=recursive,
                 must_exist=not options.get("CreateMountpoint"), idmap=_idmap(idmap) if idmap else "")


def _volume_mount(source: str, target: str, read_only: bool, options: dict[str, Any]) -> Mount:
    subpath, driver = options.get("Subpath") or "", options.get("DriverConfig") or {}
    if not source and read_only:
        raise _wrong("volume", "must not set ReadOnly mode when using anonymous volumes")
    if not source and subpath:
        raise _wrong("volume", "must not set Subpath when using anonymous volumes")
    if source and not VOLUME_NAME.match(source):
        raise _wrong("volume", f"{source!r} includes invalid characters for a local volume name")
    if subpath and (subpath.startswith("/") or ".." in subpath.split("/")):
        raise _wrong("volume", "subpath must be a relative path within the volume")
    if driver.get("Name") not in (None, "", "local"):
        raise InvalidArgument(f"volume driver {driver['Name']!r} is not available", hint="this version has the driver local")
    asked = driver.get("Options") or {}
    if not isinstance(asked, dict) or not all(isinstance(text, str) for text in asked.values()):
        raise _wrong("volume", "DriverConfig.Options must be an object of texts")
    if asked:
        check_options(asked)
    return Mount("volume", "", target, read_only, name=source, anonymous=not source, no_copy=bool(options.get("NoCopy")),
                 subpath=subpath, labels=dict(options.get("Labels") or {}), driver_options=dict(asked))
