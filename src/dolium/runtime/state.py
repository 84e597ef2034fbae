"""The state folder of a container that dolium-runtime owns: ``<root>/<id>/``. Cold module.

``state.json``  written by rename when the container is created; version 1
``config.json`` the configuration it was created with: exec and delete do not trust a bundle that changed since
``unit``        with the systemd driver, from before anything is made: the unit and its cgroup, a line each
``start.sock``  init listens here until ``start``; its absence tells created from running
"""

from __future__ import annotations

import json

from dolium.errors import FailedPrecondition, InvalidArgument, NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dolium.runtime.facts import Facts

STATE_VERSION = 1
_PID, _START = -314159265, -271828182

_ALLOWED = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_+-.")


def check_identity(identity: str) -> None:
    """A container id is letters, digits and ``_+-.``, as runc has it. Raises InvalidArgument."""
    if not identity or identity in (".", "..") or set(identity) - _ALLOWED or len(identity) > 1024:
        raise InvalidArgument(f"invalid container id {identity!r}", hint="use letters, digits, '_', '+', '-' and '.'")


class State:
    """What is recorded of a container. ``folders``: its cgroup folders; ``created``: RFC 3339; ``owner``: uid;
    ``unit``: its systemd scope, "" with the cgroupfs driver; ``preserved``: the caller's descriptors that it got, by number
    (as :func:`dolium.linux.criu.identity` has them)."""

    __slots__ = ("bundle", "created", "folder", "folders", "identity", "oci_version", "owner", "pid", "preserved", "rootfs",
                 "start_time", "unit")

    def __init__(self, fields: dict[str, Any], folder: str) -> None:
        self.folder = folder
        self.identity: str = fields["id"]
        self.pid: int = fields["pid"]
        self.start_time: int = fields["startTime"]
        self.bundle: str = fields["bundle"]
        self.rootfs: str = fields["rootfs"]
        self.created: str = fields["created"]
        self.owner: int = fields["owner"]
        self.folders: list[str] = fields["cgroups"]
        self.oci_version: str = fields["ociVersion"]
        self.unit: str = fields.get("unit", "")
        self.preserved: dict[str, str] = fields.get("preserved", {})


def template(identity: str, bundle: str, rootfs: str, created: str, owner: int, folders: list[str],
             oci_version: str, unit: str = "", preserved: dict[str, str] | None = None) -> str:
    """``state.json`` with the executor's tokens where pid and start time will be."""
    text = json.dumps({"version": STATE_VERSION, "ociVersion": oci_version, "id": identity, "pid": _PID,
                       "startTime": _START, "bundle": bundle, "rootfs": rootfs, "created": created, "owner": owner,
                       "cgroups": folders, **({"unit": unit} if unit else {}),
                       **({"preserved": preserved} if preserved else {})})
    return text.replace(str(_PID), "\x01p").replace(str(_START), "\x01s") + "\n"


def load(facts: Facts, root: str, identity: str) -> State:
    """The recorded state. Raises NotFound with runc's words, FailedPrecondition for a container half made."""
    check_identity(identity)
    folder = f"{root}/{identity}"
    text = facts.read(f"{folder}/state.json")
    if text is None:
        if facts.stat(folder) is not None:
            raise FailedPrecondition(f"container {identity} was not created completely",
                                     hint="its runtime was killed or is still at work; `delete --force` removes it")
        raise NotFound(f"container {identity} does not exist")
    try:
        fields = json.loads(text)
        if fields["version"] != STATE_VERSION:
            raise FailedPrecondition(f"container {identity} has state of version {fields['version']}, not {STATE_VERSION}")
        return State(fields, folder)
    except (ValueError, KeyError, TypeError) as error:
        raise FailedPrecondition(f"{folder}/state.json is damaged: {error!r}") from error


def alive(facts: Facts, pid: int, started: int) -> bool:
    """Is the process with that pid the recorded one, and not a zombie?"""
    return start_time(facts, pid) == started


def start_time(facts: Facts, pid: int) -> int | None:
    """When a process began, in clock ticks after boot; None when it is gone, or a zombie."""
    text = facts.read(f"/proc/{pid}/stat")
    if text is None:
        return None
    fields = text[text.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def status(facts: Facts, state: State) -> str:
    """created, running, paused or stopped (runtime.md, State)."""
    facts.want(f"read:/proc/{state.pid}/stat", f"stat:{state.folder}/start.sock",
               *(f"read:{path}" for path in _freeze_files(state)))
    if not alive(facts, state.pid, state.start_time):
        return "stopped"
    for path in _freeze_files(state):  # first: a created container that is frozen can be resumed, and not started
        text = facts.read(path)
        if text is not None and text.strip() in (b"FROZEN", b"1"):
            return "paused"
    return "created" if facts.stat(f"{state.folder}/start.sock") is not None else "running"


def _freeze_files(state: State) -> list[str]:
    files = [f"{folder}/freezer.state" for folder in state.folders if folder.startswith("/sys/fs/cgroup/freezer/")]
    return files or [f"{folder}/cgroup.freeze" for folder in state.folders[-1:]]
