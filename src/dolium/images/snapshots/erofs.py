"""Layers as EROFS files, mounted read-only from the file: nothing of a layer can be changed in place, and where the kernel
and the file system have fs-verity no byte of it on the disk either.

    layers/HEX/image     the layer
    layers/HEX/verity    its fs-verity digest, when there is one

One mount of each layer serves all containers, so that they share its pages.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dolium import faults
from dolium.errors import FailedPrecondition, Internal, NotFound, ResourceExhausted
from dolium.images.snapshots.held import HeldMount
from dolium.images.snapshots.layers import FolderLayers, mapped
from dolium.linux import loop, syscalls, verity

KEPT = 256
"""Layers that stay mounted; those used longest ago are unmounted first, and again when they are asked for."""
faults.register("driver.packed")


class ErofsLayers(FolderLayers):
    """Implements ``Layers`` by files. Needs mkfs.erofs to make them."""

    content = "image"

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._mounted: OrderedDict[str, HeldMount] = OrderedDict()
        self._lock = threading.Lock()  # roots are made ahead in a thread

    def commit_layer(self, chain_id: str, prepared: Path) -> None:
        """See ``Layers``. Raises FailedPrecondition without mkfs.erofs."""
        if self.has_layer(chain_id):
            self.abort_layer(prepared)
            return
        image = prepared.parent / self.content
        try:
            _pack(prepared, image)
            sealed = verity.enable(str(image))
            if sealed is not None:
                (prepared.parent / "verity").write_text(sealed)
        except BaseException:
            self.abort_layer(prepared)
            raise
        faults.point("driver.packed")
        aside = prepared.parent.with_name(f"{prepared.parent.name}-unpacked")
        os.rename(prepared, aside)  # the folder's name is no layer's, so it is dropped should we die here
        super().commit_layer(chain_id, prepared)
        self.trash.discard(str(aside))

    def remove_layer(self, chain_id: str) -> None:
        """See ``Layers``. Containers that have it mounted keep it."""
        with self._lock:
            held = self._mounted.pop(chain_id, None)
        if held is not None:
            held.close()
        super().remove_layer(chain_id)

    @contextmanager
    def lowers(self, chain_ids: Sequence[str], user_namespace: int = -1) -> Iterator[Sequence[str | int]]:
        """See ``FolderLayers``."""
        if not chain_ids:
            with mapped([str(self._empty)], user_namespace) as empty:
                yield empty
            return
        copies: list[int] = []
        try:
            for chain_id in reversed(chain_ids):
                copies.append(self._copy(chain_id))
                if user_namespace >= 0:
                    syscalls.set_idmap(copies[-1], user_namespace)
            yield copies
        finally:
            for fd in copies:
                os.close(fd)
            with self._lock:
                while len(self._mounted) > KEPT:
                    self._mounted.popitem(last=False)[1].close()

    def _copy(self, chain_id: str) -> int:
        """A mount of the same file system as all others of the layer."""
        with self._lock:
            held = self._mounted.get(chain_id) or _mount(self.path(chain_id))
            self._mounted[chain_id] = held
            self._mounted.move_to_end(chain_id)
            return held.copy()

    def close(self) -> None:
        """See ``FolderLayers``."""
        while self._mounted:
            self._mounted.popitem()[1].close()
        super().close()


def _pack(folder: Path, image: Path) -> None:
    try:
        done = subprocess.run(["mkfs.erofs", "-d0", str(image), str(folder)], capture_output=True, check=False,
                              stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise FailedPrecondition("the erofs snapshotter needs mkfs.erofs", hint="apt-get install erofs-utils") from error
    if done.returncode:
        text = (done.stderr or done.stdout).decode(errors="replace").strip()
        disk = shutil.disk_usage(image.parent)
        kind = ResourceExhausted if "No space left" in text or disk.free < 1 << 16 else Internal
        raise kind(f"make {image}: mkfs.erofs: {text or done.returncode}")


def _mount(image: Path) -> HeldMount:
    """From the file itself (Linux 6.12, not on tmpfs), else by a loop device. A sealed file must be the one it was."""
    try:
        fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFound(f"layer sha256:{image.parent.name} is not unpacked") from error
    try:
        expected = image.with_name("verity")
        if expected.exists() and verity.measure(fd) != expected.read_text():
            raise Internal(f"{image} is not the file that was sealed: its fs-verity digest differs",
                           hint="remove the image and pull it again")
        name = f"/proc/self/fd/{fd}"  # the very file that was looked at
        try:
            return HeldMount.make("erofs", name, read_only=True, later=str(image))
        except OSError as error:
            if error.errno not in (errno.ENOTBLK, errno.EINVAL):
                raise Internal(f"mount {image}: {error.strerror}", errno=error.errno) from error
        try:
            held, device = loop.attach(name, read_only=True)
            try:
                return HeldMount.make("erofs", device, read_only=True)
            finally:
                os.close(held)
        except OSError as error:
            raise FailedPrecondition(f"mount {image}: {error.strerror}", errno=error.errno,
                                     hint="this kernel needs a loop device for it") from error
    finally:
        os.close(fd)
