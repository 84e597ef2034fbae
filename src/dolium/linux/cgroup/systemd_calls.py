"""What is said to systemd for one container: a program of its own, run by a plan's operation as ``python -I -S -E``.

The request is JSON on standard input: ``verb`` (start, hold, set, stop), ``bus`` (D-Bus address), ``uid``, ``unit``, and for
start ``pid``, ``group`` and ``properties``, for hold those without ``pid``, for set ``properties``. On failure: exit code 1
and one line on standard error, which the runtime shows. Every wait has a deadline; what a failed start has left of the unit
is stopped again.
"""

from __future__ import annotations

import json
import posix

from dolium.errors import DeadlineExceeded, DoliumError, FailedPrecondition
from dolium.linux.dbus import NO_REPLY, Bus, Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

CALL_SECONDS, JOB_SECONDS = 10.0, 25.0
SIGKILL = 9
HOLD_SECONDS = 600  # who holds a scope open ends by itself: whoever was to put a container in may have been killed
SYSTEMD, PATH = "org.freedesktop.systemd1", "/org/freedesktop/systemd1"
MANAGER = f"{SYSTEMD}.Manager"
EXISTS, NO_SUCH_UNIT = f"{SYSTEMD}.UnitExists", f"{SYSTEMD}.NoSuchUnit"


class Manager:
    """The calls of systemd's manager that a container needs."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._subscribed = False

    def _call(self, member: str, signature: str = "", *values: Any) -> list[Any]:
        return self._bus.call(SYSTEMD, PATH, MANAGER, member, signature, *values)

    def _job(self, unit: str, member: str, signature: str, *values: Any) -> None:
        """Call what makes a job, and wait until that is done (JobRemoved: number, job, unit, result)."""
        if not self._subscribed:
            self._bus.subscribe(MANAGER, "JobRemoved")
            self._call("Subscribe")
            self._subscribed = True
        job = self._call(member, signature, *values)[0]
        result = self._bus.wait("JobRemoved", lambda body: len(body) == 4 and body[1] == job, JOB_SECONDS)[3]
        if result != "done":
            raise FailedPrecondition(f"systemd's job for {unit} ended as {result!r}")

    def start(self, unit: str, properties: list[tuple[str, tuple[str, object]]]) -> None:
        """A new transient unit. One of that name that failed and was kept is forgotten first."""
        arguments: tuple[Any, ...] = (unit, "replace", properties, [])
        try:
            self._job(unit, "StartTransientUnit", "ssa(sv)a(sa(sv))", *arguments)
        except Refused as error:
            if error.name != EXISTS:
                raise
            self.reset(unit)
            try:
                self._job(unit, "StartTransientUnit", "ssa(sv)a(sa(sv))", *arguments)
            except Refused as again:
                if again.name == EXISTS:
                    raise FailedPrecondition(f"unit {unit} exists already: another container's?") from None
                raise

    def change(self, unit: str, properties: list[tuple[str, tuple[str, object]]]) -> None:
        """Properties of a running unit, until it ends."""
        self._call("SetUnitProperties", "sba(sv)", unit, True, properties)

    def stop(self, unit: str) -> None:
        """Stop it, and forget that it failed; one that is gone is fine."""
        try:
            self._job(unit, "StopUnit", "ss", unit, "replace")
        except Refused as error:
            if error.name != NO_SUCH_UNIT:
                raise
        self.reset(unit)

    def reset(self, unit: str) -> None:
        """Forget that a unit failed, whatever there is to forget."""
        try:
            self._call("ResetFailedUnit", "s", unit)
        except Refused as error:
            if error.name != NO_SUCH_UNIT:
                raise

    def abandon(self, unit: str) -> None:
        """Stop it without waiting for an answer: there may be none."""
        self._bus.send(SYSTEMD, PATH, MANAGER, "StopUnit", "ss", unit, "replace", flags=NO_REPLY)


def _read(fd: int) -> bytes:
    parts = []
    while part := posix.read(fd, 65536):
        parts.append(part)
    return b"".join(parts)


def _group_of(pid: int) -> str:
    """The v2 group a process is in."""
    fd = posix.open(f"/proc/{pid}/cgroup", posix.O_RDONLY)
    try:
        lines = _read(fd).decode().splitlines()
    finally:
        posix.close(fd)
    return next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "")


def _holder() -> int:
    """A process that does nothing, for HOLD_SECONDS at most; in a session of its own, because a hook's process group is
    killed when the hook has ended."""
    import signal

    pid = posix.fork()
    if pid == 0:
        try:
            posix.setsid()
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            signal.alarm(HOLD_SECONDS)
            posix.closerange(0, 64)
            while True:
                signal.pause()
        finally:
            posix._exit(1)
    return pid


def _start(manager: Manager, request: dict[str, Any], pid: int) -> None:
    unit = request["unit"]
    properties = [(name, (signature, value)) for name, signature, value in request["properties"]]
    try:
        manager.start(unit, [*properties, ("PIDs", ("au", [pid]))])
    except DeadlineExceeded:
        manager.abandon(unit)
        raise
    found = _group_of(pid)
    if found != request["group"]:
        manager.abandon(unit)
        raise FailedPrecondition(f"systemd put it into cgroup {found}, not {request['group']}")


def perform(request: dict[str, Any]) -> None:
    """Do what a request says. Raises DoliumError."""
    bus = Bus(request["bus"], request["uid"], CALL_SECONDS)
    manager, unit = Manager(bus), request["unit"]
    try:
        if request["verb"] == "set":
            manager.change(unit, [(name, (signature, value)) for name, signature, value in request["properties"]])
        elif request["verb"] == "stop":
            manager.stop(unit)
        elif request["verb"] == "start":
            _start(manager, request, request["pid"])
        else:
            pid = _holder()
            try:
                _start(manager, request, pid)
            except BaseException:
                posix.kill(pid, SIGKILL)
                raise
    finally:
        bus.close()


def main() -> int:
    """The program; returns its exit code."""
    try:
        perform(json.loads(_read(0)))
    except (DoliumError, OSError) as error:
        posix.write(2, f"{error}\n".encode())
        return 1
    return 0
