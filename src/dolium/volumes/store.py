"""Named and anonymous volumes of the local driver: ``volumes/NAME/_data``."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from dolium import faults
from dolium.errors import FailedPrecondition, InvalidArgument, NotFound
from dolium.trash import delete

NAME = re.compile(r"^[a-zA-Z0-9][a-zA-Z0-9_.-]+\Z")
faults.register("volume.made", "volume.removed")


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
    """``created``: seconds since 1970; ``fresh``: nothing was ever mounted from it, so an image may fill it."""

    name: str
    created: float
    anonymous: bool = False
    fresh: bool = True
    labels: dict[str, str] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)


class Volumes:
    """All volumes of one instance."""

    def __init__(self, root: str, rows: Rows) -> None:
        self._root = root
        self._rows = rows
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

    def ensure(self, name: str = "", *, labels: dict[str, str] | None = None, driver: str = "local",
               options: dict[str, str] | None = None) -> Volume:
        """The volume of a name, made when it is absent; "" makes an anonymous one. Raises InvalidArgument."""
        if driver not in ("", "local"):
            raise InvalidArgument(f"volume driver {driver!r} is not available", hint="this version has the driver local")
        if options:
            raise InvalidArgument(f"volume options {sorted(options)} are not supported by this version's local driver")
        if name in self._volumes:
            return self._volumes[name]
        if name and not NAME.match(name):
            raise InvalidArgument(f"{name!r} includes invalid characters for a local volume name, only "
                                  "[a-zA-Z0-9][a-zA-Z0-9_.-] are allowed")
        volume = Volume(name or secrets.token_hex(32), time.time(), anonymous=not name, labels=labels or {})
        os.makedirs(self.path(volume.name), mode=0o755, exist_ok=True)
        faults.point("volume.made")
        self._put(volume)
        return volume

    def _put(self, volume: Volume) -> None:
        self._rows.put_row("volumes", volume.name, asdict(volume))
        self._volumes[volume.name] = volume

    def fill(self, volume: Volume, copy: Callable[[str], None]) -> None:
        """First use: ``copy`` puts the image's content into the folder it is given, which then becomes the volume's, by
        rename. A volume that has content keeps it. Blocks."""
        path, beside = self.path(volume.name), f"{self._root}/{volume.name}/_fill"
        with contextlib.suppress(FileNotFoundError):
            delete(beside)
        if volume.fresh and not os.listdir(path):
            os.mkdir(beside, 0o755)
            copy(beside)
            os.rename(beside, path)

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
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{self._root}/{name}", aside)
        faults.point("volume.removed")
        self._rows.delete_row("volumes", name)
        del self._volumes[name]
        return aside

    def recover(self) -> None:
        """Drop what a dead daemon left: half removed volumes, and folders that have no record yet."""
        for name in os.listdir(self._root):
            if name.startswith(".trash-"):
                with contextlib.suppress(OSError):
                    delete(f"{self._root}/{name}")
            elif name not in self._volumes:
                with contextlib.suppress(OSError):
                    os.rmdir(f"{self._root}/{name}/_data")  # only when empty: never anyone's data
                    os.rmdir(f"{self._root}/{name}")
