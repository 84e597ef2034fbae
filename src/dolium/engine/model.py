"""A container as the engine keeps it: a record that is stored as one JSON document, version 1."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

DOC_VERSION = 1

# created -> running <-> paused -> exited -> running …; restarting between two runs of a restart policy
CREATED, RUNNING, PAUSED, RESTARTING, REMOVING, EXITED, DEAD = (
    "created", "running", "paused", "restarting", "removing", "exited", "dead")
STATES = (CREATED, RUNNING, PAUSED, RESTARTING, REMOVING, EXITED, DEAD)
LIVE = (RUNNING, PAUSED)


@dataclass(slots=True)
class Mount:
    """A bind mount, volume or tmpfs of a container. ``kind``: bind, volume, tmpfs; ``name``: the volume's.

    ``recursive``: what of the source's own mounts, in the words of Docker's ``bind-recursive``: "" for all, ``disabled``,
    ``writable`` (only the top is read-only), ``readonly``; ``subpath``: a place in the volume; ``must_exist``: a missing
    source is not made; ``idmap``: "", ``idmap`` for the container's user namespace, or mappings ``uids=…;gids=…``.
    """

    kind: str
    source: str
    target: str
    read_only: bool = False
    name: str = ""
    anonymous: bool = False
    propagation: str = ""
    no_copy: bool = False
    options: list[str] = field(default_factory=list)
    recursive: str = ""
    subpath: str = ""
    must_exist: bool = False
    idmap: str = ""
    labels: dict[str, str] = field(default_factory=dict)  # of a volume that is made for it
    driver_options: dict[str, str] = field(default_factory=dict)  # of such a one
    pending: str = ""  # attach, detach: under way in a container that runs


@dataclass(slots=True)
class Container:
    """Everything that is remembered. Times are seconds since 1970, 0 for never.

    ``config`` and ``host_config`` have the keys of Docker's API, completed from the image at create. ``starting`` is the
    intent that is stored before a launch; ``pid`` and ``start_time`` name init while it lives.
    """

    id: str
    name: str
    created: float
    image: str  # what the user wrote
    image_id: str  # "" for --rootfs
    chain_ids: list[str]
    rootfs: str  # the lower folder of --rootfs PATH:O, else ""
    config: dict[str, Any]
    host_config: dict[str, Any]
    path: str
    args: list[str]
    mounts: list[Mount] = field(default_factory=list)
    network: dict[str, Any] = field(default_factory=dict)
    status: str = CREATED
    starting: bool = False
    pid: int = 0
    start_time: int = 0
    exit_code: int = 0
    oom_killed: bool = False
    error: str = ""
    started_at: float = 0.0
    finished_at: float = 0.0
    restart_count: int = 0
    stopped_by_user: bool = False
    timings: dict[str, float] = field(default_factory=dict)
    # what was wished of its networks by their names, NetworkMode's first; empty: NetworkMode's alone
    endpoint_settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    ids: list[int] = field(default_factory=list)  # [first host id, how many] of its own user namespace; none: the host's

    @property
    def owner(self) -> tuple[int, int]:
        """The host's ids of its root."""
        return (self.ids[0], self.ids[0]) if self.ids else (0, 0)

    @property
    def live(self) -> bool:
        """Is there an init process?"""
        return self.status in LIVE

    @property
    def short_id(self) -> str:
        return self.id[:12]

    def to_doc(self) -> dict[str, Any]:
        """The stored form, to be written at once: its lists and objects are the container's own."""
        doc: dict[str, Any] = {"version": DOC_VERSION}
        for name in self.__slots__:
            doc[name] = getattr(self, name)
        doc["mounts"] = [asdict(mount) for mount in self.mounts]
        return doc

    @classmethod
    def from_doc(cls, doc: dict[str, Any]) -> Container:
        """The container of a stored form of this version."""
        fields = {key: value for key, value in doc.items() if key != "version"}
        fields["mounts"] = [Mount(**mount) for mount in fields["mounts"]]
        return cls(**fields)
