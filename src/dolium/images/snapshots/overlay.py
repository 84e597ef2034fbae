"""The overlay driver: layers stacked by overlayfs, a container an upper and a work directory above them.

    snapshots/active/KEY/{upper,work}     a container's; inside its disk when it has one
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dolium import faults
from dolium.errors import FailedPrecondition, NotFound
from dolium.images.snapshots.base import MountOptions, Usage
from dolium.images.snapshots.driver import Driver
from dolium.images.snapshots.layers import FolderLayers, mapped
from dolium.images.snapshots.places import tree_usage
from dolium.linux import syscalls

faults.register("snapshot.prepared")


class OverlaySnapshotter(Driver):
    """Implements ``Snapshotter`` over any kind of layers."""

    def __init__(self, layers: FolderLayers, name: str = "overlay") -> None:
        super().__init__(layers)
        self.name = name

    def prepare(self, key: str, chain_ids: Sequence[str], *, owner: tuple[int, int] = (0, 0), size: int = 0) -> None:
        """See ``Snapshotter``. The merged root shows upper's own attributes: they are copied from the top layer."""
        self.check(chain_ids)
        with self._layers.lowers(chain_ids[-1:]) as layers:
            top = os.stat(layers[0])
        mode = stat.S_IMODE(top.st_mode) if chain_ids else 0o755
        uid, gid = owner if owner != (0, 0) else (top.st_uid, top.st_gid)
        self._places.make(key, size)
        try:
            path = self._places.inside(key)
            for name in ("upper", "work"):
                os.mkdir(f"{path}/{name}", 0o755)
                if (uid, gid) != (os.geteuid(), os.getegid()):
                    os.chown(f"{path}/{name}", uid, gid)
            os.chmod(f"{path}/upper", mode)
        except BaseException:
            self._places.remove(key)
            raise
        faults.point("snapshot.prepared")

    def mount(self, key: str, chain_ids: Sequence[str], options: MountOptions) -> int:
        """See ``Snapshotter``."""
        disk, path = self._places.disk(key), self._places.inside(key)
        if not os.path.isdir(f"{path}/upper"):
            raise FailedPrecondition(f"snapshot {key[:12]} was made by another snapshotter than {self.name}")
        mark = f"{path}/work/work/incompat"  # a volatile mount's
        if os.path.exists(mark):
            shutil.rmtree(mark)
        before = "" if disk else f"{path}/"
        with ExitStack() as used:
            on = disk.copy() if disk else -1
            if disk:
                used.callback(os.close, on)
            layers = used.enter_context(mapped([options.lower], options.user_namespace) if options.lower
                                        else self._layers.lowers(chain_ids, options.user_namespace))
            lowest = used.enter_context(mapped([options.lowest] if options.lowest else [], options.user_namespace))
            return syscalls.mount_overlay([*layers, *lowest], f"{before}upper", f"{before}work", on=on,
                                          volatile=options.volatile)

    @contextmanager
    def written(self, key: str) -> Iterator[Path | None]:
        """See ``Snapshotter``."""
        path = self._places.inside(key) / "upper"
        if not path.is_dir():
            raise NotFound(f"no snapshot {key}")
        yield path

    @contextmanager
    def image(self, chain_ids: Sequence[str], options: MountOptions) -> Iterator[int]:
        """See ``Snapshotter``."""
        with self._read_only("", chain_ids, options) as root:
            yield root

    @contextmanager
    def view(self, key: str, chain_ids: Sequence[str], options: MountOptions) -> Iterator[int]:
        """See ``Snapshotter``. The writable layer is the highest of those that are only read."""
        with self.written(key) as upper, self._read_only(str(upper), chain_ids, options) as root:
            yield root

    @contextmanager
    def _read_only(self, upper: str, chain_ids: Sequence[str], options: MountOptions) -> Iterator[int]:
        with ExitStack() as used:
            layers = used.enter_context(mapped([options.lower], options.user_namespace) if options.lower
                                        else self._layers.lowers(chain_ids, options.user_namespace))
            lowest = used.enter_context(mapped([options.lowest] if options.lowest else [], options.user_namespace))
            found = [*([upper] if upper else []), *layers, *lowest]
            if len(found) > 1:
                root = syscalls.mount_overlay(found, "", "")
            else:  # overlayfs wants two
                place = found[0] if isinstance(found[0], str) else f"/proc/self/fd/{found[0]}"
                root = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            used.callback(os.close, root)
            yield root

    def usage(self, key: str) -> Usage:
        """See ``Snapshotter``."""
        with self.written(key) as path:
            assert path is not None
            return tree_usage(path)
