"""The overlay driver: every layer a directory, a container an upper and a work directory beside it.

    snapshots/layers/HEX/fs               one layer, HEX of its chain ID, in the form overlayfs reads
    snapshots/layers/NAME.tmp-RANDOM/fs   being unpacked
    snapshots/active/KEY/{upper,work}     a container's
    snapshots/empty                       the lower directory of an image without layers: overlayfs wants one
    snapshots/trash/                      renamed aside, deleted later
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Sequence
from pathlib import Path

from dolium import faults
from dolium.errors import AlreadyExists, InvalidArgument, NotFound
from dolium.images.reference import check_digest
from dolium.images.snapshots.base import Rootfs, Usage
from dolium.trash import Trash

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", re.ASCII)
_HEX = re.compile(r"[0-9a-f]{64}", re.ASCII)
faults.register("snapshot.layer.begun", "snapshot.layer.renamed", "snapshot.layer.removed", "snapshot.begun",
                "snapshot.prepared", "snapshot.removed")


class OverlaySnapshotter:
    """Implements ``Snapshotter`` under one directory, which one process writes."""

    def __init__(self, root: Path) -> None:
        """Use ``root`` (the ``snapshots`` directory), made if it is missing."""
        self._root = root
        self._layers, self._active = root / "layers", root / "active"
        self._empty = root / "empty"
        # Others must not reach set-user-id programs of layers through the host's paths.
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in (self._layers, self._active, self._empty):
            path.mkdir(exist_ok=True)
        self._trash = Trash(str(root / "trash"))

    @property
    def root(self) -> Path:
        """See ``Snapshotter``."""
        return self._root

    # Layers

    def layer_path(self, chain_id: str) -> Path:
        """The layer's own root directory, whether it exists or not."""
        return self._layers / check_digest(chain_id).removeprefix("sha256:") / "fs"

    def has_layer(self, chain_id: str) -> bool:
        """See ``Snapshotter``."""
        return self.layer_path(chain_id).is_dir()

    def begin_layer(self, name: str) -> Path:
        """See ``Snapshotter``."""
        stem = name.removeprefix("sha256:")
        path = self._layers / f"{stem}.tmp-{secrets.token_hex(6)}" / "fs"
        path.parent.mkdir(mode=0o755)
        path.mkdir(mode=0o755)
        faults.point("snapshot.layer.begun")
        return path

    def commit_layer(self, chain_id: str, prepared: Path) -> None:
        """See ``Snapshotter``."""
        target = self.layer_path(chain_id).parent
        try:
            os.rename(prepared.parent, target)
        except OSError:
            if not self.has_layer(chain_id):
                raise
            self.abort_layer(prepared)
            return
        faults.point("snapshot.layer.renamed")

    def abort_layer(self, prepared: Path) -> None:
        """See ``Snapshotter``."""
        self._discard(prepared.parent)

    def remove_layer(self, chain_id: str) -> None:
        """See ``Snapshotter``."""
        self._discard(self.layer_path(chain_id).parent)
        faults.point("snapshot.layer.removed")

    def layers(self) -> list[str]:
        """See ``Snapshotter``."""
        return [f"sha256:{name}" for name in os.listdir(self._layers) if _HEX.fullmatch(name)]

    # Snapshots

    def prepare(self, key: str, chain_ids: Sequence[str], *, owner: tuple[int, int] = (0, 0)) -> Rootfs:
        """See ``Snapshotter``. The merged root shows upper's own attributes: they are copied from the top layer."""
        path = self._snapshot(key)
        lowerdirs = self._lowerdirs(chain_ids)
        top = os.stat(lowerdirs[0])
        mode = stat.S_IMODE(top.st_mode) if chain_ids else 0o755
        uid, gid = owner if owner != (0, 0) else (top.st_uid, top.st_gid)
        try:
            os.mkdir(path, 0o755)
        except FileExistsError:
            raise AlreadyExists(f"snapshot {key} exists already") from None
        faults.point("snapshot.begun")
        try:
            for name in ("upper", "work"):
                os.mkdir(f"{path}/{name}", 0o755)
                if (uid, gid) != (os.geteuid(), os.getegid()):
                    os.chown(f"{path}/{name}", uid, gid)
            os.chmod(f"{path}/upper", mode)
        except OSError:
            self._discard(path)
            raise
        faults.point("snapshot.prepared")
        return Rootfs(lowerdirs, path / "upper", path / "work")

    def rename(self, key: str, new: str) -> None:
        """See ``Snapshotter``."""
        try:
            os.rename(self._snapshot(key), self._snapshot(new))
        except FileNotFoundError:
            raise NotFound(f"no snapshot {key}") from None
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            raise AlreadyExists(f"snapshot {new} exists already") from None

    def rootfs(self, key: str, chain_ids: Sequence[str]) -> Rootfs:
        """See ``Snapshotter``."""
        path = self._snapshot(key)
        if not path.is_dir():
            raise NotFound(f"no snapshot {key}")
        return Rootfs(self._lowerdirs(chain_ids), path / "upper", path / "work")

    def remove(self, key: str) -> None:
        """See ``Snapshotter``."""
        self._discard(self._snapshot(key))
        faults.point("snapshot.removed")

    def usage(self, key: str) -> Usage:
        """See ``Snapshotter``."""
        path = self._snapshot(key) / "upper"
        if not path.is_dir():
            raise NotFound(f"no snapshot {key}")
        return tree_usage(path)

    def hurry(self) -> None:
        """See ``Snapshotter``."""
        self._trash.hurry()

    def active(self) -> list[str]:
        """See ``Snapshotter``."""
        return os.listdir(self._active)

    # House-keeping

    def recover(self) -> None:
        """See ``Snapshotter``."""
        for name in os.listdir(self._layers):
            if not _HEX.fullmatch(name):
                self._discard(self._layers / name)
        for name in os.listdir(self._active):
            if name.startswith("."):  # half made by dolium 0.1
                self._discard(self._active / name)
        self._trash.recover()

    def close(self) -> None:
        """See ``Snapshotter``."""
        self._trash.close()

    def _snapshot(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise InvalidArgument(f"invalid snapshot key {key!r}")
        return self._active / key

    def _lowerdirs(self, chain_ids: Sequence[str]) -> tuple[Path, ...]:
        paths = tuple(self.layer_path(chain_id) for chain_id in reversed(chain_ids))
        for path in paths:
            if not path.is_dir():
                raise NotFound(f"layer sha256:{path.parent.name} is not unpacked")
        return paths or (self._empty,)

    def _discard(self, path: Path) -> None:
        self._trash.discard(str(path))


def tree_usage(path: Path) -> Usage:
    """Space and inodes under a directory; one that vanishes meanwhile is left out."""
    size = inodes = 0
    seen: set[tuple[int, int]] = set()
    waiting = [path]
    while waiting:
        try:
            entries = list(os.scandir(waiting.pop()))
        except FileNotFoundError:
            continue
        for entry in entries:
            try:
                info = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if info.st_nlink > 1 and not stat.S_ISDIR(info.st_mode):
                if (info.st_dev, info.st_ino) in seen:
                    continue
                seen.add((info.st_dev, info.st_ino))
            size += info.st_blocks * 512
            inodes += 1
            if stat.S_ISDIR(info.st_mode):
                waiting.append(Path(entry.path))
    return Usage(size, inodes)
