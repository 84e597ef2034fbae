"""Mount options and capabilities."""

from __future__ import annotations

from pathlib import Path

import pytest

from dolium.linux import capabilities, mounts

A = mounts.ATTRIBUTES


@pytest.mark.parametrize(("options", "set_", "clear"), [
    (["ro"], mounts.ATTR_RDONLY, 0), (["ro", "rw"], 0, mounts.ATTR_RDONLY), (["rw", "ro"], mounts.ATTR_RDONLY, 0),
    (["nosuid", "nodev", "noexec"], 0x0E, 0), (["noexec", "exec"], 0, mounts.ATTR_NOEXEC),
    (["noatime"], mounts.ATTR_NOATIME, mounts.ATTR_ATIME_FIELD),
    (["noatime", "strictatime"], mounts.ATTR_STRICTATIME, mounts.ATTR_ATIME_FIELD),
    (["noatime", "relatime"], 0, mounts.ATTR_ATIME_FIELD),
    (["defaults", "async", "", "acl", "noacl", "silent", "loud", "iversion", "noiversion"], 0, 0),
])
def test_attributes_the_last_wins(options: list[str], set_: int, clear: int) -> None:
    parsed = mounts.Options(options)
    assert (parsed.set, parsed.clear & ~parsed.set) == (set_, clear & ~set_)
    assert parsed.data == [] and parsed.recursive_set == parsed.recursive_clear == 0


def test_options_that_are_several() -> None:
    assert mounts.Options(["size=1m,mode=700", "lowerdir=/a,b:/c", "uid=0"]).data == ["size=1m", "mode=700", "lowerdir=/a,b:/c", "uid=0"]


@pytest.mark.parametrize(("path", "tidied"), [("/a//b/", "/a/b"), ("a/./b", "/a/b"), ("/a/../../b", "/b"), ("..", "/"), ("/", "/"),
                                              ("/a/..b/...", "/a/..b/...")])
def test_a_destination_is_tidied(path: str, tidied: str) -> None:
    assert mounts.tidy(path) == tidied


def test_recursive_attributes_propagation_binds_and_data() -> None:
    parsed = mounts.Options(["rbind", "rro", "rnoexec", "rslave", "size=5", "mode=700", "tmpcopyup", "uid=0"])
    assert parsed.recursive_set == mounts.ATTR_RDONLY | mounts.ATTR_NOEXEC and parsed.set == 0
    assert parsed.propagation == mounts.MS_SLAVE | mounts.MS_REC and parsed.bind == "rbind" and parsed.copy_up
    assert parsed.data == ["size=5", "mode=700", "uid=0"]


def test_capability_numbers_are_the_kernels() -> None:
    assert [capabilities.NUMBERS[name] for name in ("CAP_CHOWN", "CAP_NET_ADMIN", "CAP_SYS_ADMIN", "CAP_CHECKPOINT_RESTORE")] \
        == [0, 12, 21, 40]
    assert capabilities.mask(["CAP_CHOWN", "CAP_SYS_ADMIN"]) == 1 << 21 | 1
    assert capabilities.names(1 << 21 | 1) == ["CAP_CHOWN", "CAP_SYS_ADMIN"] and capabilities.names(0) == []
    with pytest.raises(KeyError):
        capabilities.mask(["CAP_NOSUCH"])
    last = Path("/proc/sys/kernel/cap_last_cap")
    if last.exists():
        assert len(capabilities.NAMES) <= int(last.read_text()) + 1
