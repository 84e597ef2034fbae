"""Named and anonymous volumes of the driver local.

    volumes/NAME/_data     what is in it; or where it is mounted, when the options say so
    volumes/NAME/disk      the file system it is in, when it has a size and the host's own cannot count
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from dolium import faults
from dolium.errors import FailedPrecondition, InvalidArgument, NotFound
from dolium.linux import criu, disk_file, quota, syscalls
from dolium.trash import delete
from dolium.volumes import local

_log = logging.getLogger(__name__)
LONGEST_NAME = 255
NAME = re.compile(r"^[a-zA-Z0-9][a-zA-Z0-9_.-]+\Z")
_FILLING, _FILLED = ".dolium-filling", ".dolium-filled"
faults.register("volume.made", "volume.recorded", "volume.mounted", "volume.filled", "volume.removed")


class Rows(Protocol):
    """Where records are kept; the engine's database."""

    def rows(self, table: str) -> list[dict[str, Any]]:
        """All documents."""

    def put_row(self, table: str, name: str, doc: dict[str, Any]) -> None:
        """Insert or replace."""

    def delete_row(self, table: str, name: str) -> None:
        """Idempotent."""


@dataclass(slots=True)
class Volume:
    """``created``: seconds since 1970; ``fresh``: nothing was ever mounted from it, so an image may fill it; ``owner``: the
    container that it was made for."""

    name: str
    created: float
    anonymous: bool = False
    fresh: bool = True
    labels: dict[str, str] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    owner: str = ""


class Volumes:
    """All volumes of one instance."""

    def __init__(self, root: str, rows: Rows) -> None:
        self._root = root
        self._rows = rows
        self._making = asyncio.Lock()
        os.makedirs(root, mode=0o711, exist_ok=True)
        self._volumes = {doc["name"]: Volume(**doc) for doc in rows.rows("volumes")}

    def path(self, name: str) -> str:
        """The folder that is mounted."""
        return f"{self._root}/{name}/_data"

    def get(self, name: str) -> Volume:
        """Raises NotFound in Docker's words."""
        if name not in self._volumes:
            raise NotFound(f"get {name}: no such volume")
        return self._volumes[name]

    def all(self) -> list[Volume]:
        """All, by name."""
        return [self._volumes[name] for name in sorted(self._volumes)]

    async def ensure(self, name: str = "", *, labels: dict[str, str] | None = None, driver: str = "local",
                     options: dict[str, str] | None = None, owner: str = "") -> Volume:
        """The volume of a name, made when it is absent; "" makes an anonymous one, ``owner``'s. Raises InvalidArgument,
        FailedPrecondition, ResourceExhausted."""
        if driver not in ("", "local"):
            raise InvalidArgument(f"volume driver {driver!r} is not available", hint="this version has the driver local")
        options = dict(options or {})
        local.check(options)
        if len(name) > LONGEST_NAME:
            raise InvalidArgument(f"the volume name {name[:40]}… has more than {LONGEST_NAME} characters")
        if name and name not in self._volumes and not NAME.match(name):
            raise InvalidArgument(f"{name!r} includes invalid characters for a local volume name, only "
                                  "[a-zA-Z0-9][a-zA-Z0-9_.-] are allowed")
        async with self._making if options else contextlib.nullcontext():  # a disk is made off the loop
            if name in self._volumes:
                return self._volumes[name]
            volume = Volume(name or secrets.token_hex(32), time.time(), anonymous=not name, labels=labels or {},
                            options=options, owner="" if name else owner)
            try:
                if "size" in options:
                    await asyncio.to_thread(self._make_sized, volume)
                else:
                    os.makedirs(self.path(volume.name), mode=0o755, exist_ok=True)
                faults.point("volume.made")
                self._put(volume)
            except BaseException:
                self._drop_unrecorded(volume.name)
                raise
            faults.point("volume.recorded")
            return volume

    def _make_sized(self, volume: Volume) -> None:
        path, disk = self.path(volume.name), self._disk(volume.name)
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{disk}.new")
        allowed = local.size(volume.options)
        if quota.is_btrfs(self._root):
            quota.make_limited_subvolume(path, allowed)
            return
        os.makedirs(path, mode=0o755, exist_ok=True)
        if not quota.limit_project(path, allowed):
            # it has its name once there is a record
            disk_file.make(f"{disk}.new", allowed, "volume size")

    def _disk(self, name: str) -> str:
        return f"{self._root}/{name}/disk"

    def disk(self, name: str) -> str:
        """The file that holds all of it; "" when it lies in its folder."""
        disk = self._disk(name)
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{disk}.new", disk)
        return disk if os.path.exists(disk) else ""

    def _put(self, volume: Volume) -> None:
        self._rows.put_row("volumes", volume.name, asdict(volume))
        self._volumes[volume.name] = volume

    def _mounted(self, below: str) -> list[str]:
        """Mount points at a path and below it, the last one first."""
        with open("/proc/self/mountinfo", errors="surrogateescape") as file:
            places = [mount.place for mount in criu.mounts(file.read())]
        real = os.path.realpath(below)
        return [place for place in reversed(places) if place == real or place.startswith(f"{real}/")]

    def mount(self, volume: Volume) -> bool:
        """What its options name is mounted at its folder; False when they name nothing. Idempotent. Blocks. Raises
        FailedPrecondition."""
        path = self.path(volume.name)
        disk = self.disk(volume.name) if "size" in volume.options else ""
        if "type" not in volume.options and not disk:
            return False
        if self._mounted(path):
            return True
        if disk:
            try:
                fd = disk_file.mount(disk)
                try:
                    syscalls.move_mount(fd, path)
                finally:
                    os.close(fd)
            except OSError as error:
                raise FailedPrecondition(f"mount volume {volume.name}: {disk}: {error.strerror}", errno=error.errno,
                                         hint="a volume with a size needs loop devices here") from error
            if volume.fresh:
                with contextlib.suppress(OSError):
                    os.rmdir(f"{path}/lost+found")
        else:
            local.mount(volume.options, path)
        faults.point("volume.mounted")
        return True

    def unmount(self, volume: Volume) -> None:
        """What ``mount`` did is undone. Idempotent. Blocks. Raises OSError."""
        if volume.options:
            for place in self._mounted(self.path(volume.name)):
                syscalls.unmount(place)

    def fill(self, volume: Volume, copy: Callable[[str], None]) -> None:
        """First use: ``copy`` puts the image's content into the folder it is given, which then becomes the volume's, by
        rename. A volume that has content keeps it, and a tmpfs begins empty. Blocks."""
        path, beside = self.path(volume.name), f"{self._root}/{volume.name}/_fill"
        if not volume.fresh or not local.kept(volume.options):
            return
        if volume.options:
            self._fill_within(path, copy)
            return
        with contextlib.suppress(FileNotFoundError):
            delete(beside)
        if not os.listdir(path):
            os.mkdir(beside, 0o755)
            copy(beside)
            os.rename(beside, path)

    def _fill_within(self, path: str, copy: Callable[[str], None]) -> None:
        """As ``fill``, where the folder is a mount point or is counted: its content is complete, and then it is moved."""
        filling, filled = f"{path}/{_FILLING}", f"{path}/{_FILLED}"
        if not os.path.exists(filled):
            with contextlib.suppress(FileNotFoundError):
                delete(filling)
            if os.listdir(path):
                return
            os.mkdir(filling, 0o755)
            copy(filling)
            os.rename(filling, filled)
        faults.point("volume.filled")
        for name in os.listdir(filled):
            os.rename(f"{filled}/{name}", f"{path}/{name}")
        info = os.stat(filled)
        os.chown(path, info.st_uid, info.st_gid)
        os.chmod(path, info.st_mode & 0o7777)
        os.rmdir(filled)

    def used(self, volume: Volume) -> None:
        """Something is mounted from it: no image fills it any more."""
        if volume.fresh:
            volume.fresh = False
            self._put(volume)

    def remove(self, name: str, users: Sequence[str]) -> str:
        """Remove a volume nobody uses: its folder goes aside, then its record. Raises NotFound, FailedPrecondition.

        Returns where the content is, which the caller deletes (it may take long); ``recover`` does it otherwise.
        """
        self.get(name)
        if users:
            raise FailedPrecondition(f"remove {name}: volume is in use - [{', '.join(users)}]")
        aside = f"{self._root}/.trash-{secrets.token_hex(8)}"
        self._unmount_below(f"{self._root}/{name}")  # else what is mounted would be deleted
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{self._root}/{name}", aside)
        faults.point("volume.removed")
        self._rows.delete_row("volumes", name)
        del self._volumes[name]
        return aside

    def _unmount_below(self, folder: str) -> None:
        try:
            for place in self._mounted(folder):
                syscalls.unmount(place)
        except OSError as error:
            raise FailedPrecondition(f"remove {folder}: it cannot be unmounted: {error.strerror}") from error

    def _drop_unrecorded(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.rmdir(self.path(name))  # only when empty: never anyone's data
        with contextlib.suppress(OSError):
            os.unlink(f"{self._disk(name)}.new")
        with contextlib.suppress(OSError):
            os.rmdir(f"{self._root}/{name}")

    def recover(self, users: Callable[[str], bool]) -> None:
        """Drop what a dead daemon left: half removed volumes, folders that have no record yet, and nameless volumes of
        containers that were not made after all. What no container has any more (``users`` tells) is unmounted."""
        for volume in self.all():
            if volume.owner and volume.fresh and not users(volume.name):
                self.remove(volume.name, ())  # to the trash, which is emptied below
        for name in os.listdir(self._root):
            if name not in self._volumes or not users(name):
                try:
                    self._unmount_below(f"{self._root}/{name}")
                except FailedPrecondition as error:
                    _log.warning("%s", error)
                    continue
            if name.startswith(".trash-"):
                with contextlib.suppress(OSError):
                    delete(f"{self._root}/{name}")
            elif name not in self._volumes:
                self._drop_unrecorded(name)
