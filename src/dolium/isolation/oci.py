"""Any OCI runtime's command line as a level of isolation, under our shim: runc and crun (namespaces), runsc (gVisor).

The shim runs ``RUNTIME run --detach`` as the child of a launch, with the container's own standard streams, in a mount
namespace in which the container's root has a path for as long as the runtime looks for it. When the runtime ends, the
process it made is the shim's, which is the sub-reaper; when that has ended, ``RUNTIME delete``.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import glob
import json
import logging
import os
import re
import socket
import stat
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from signal import SIGKILL
from typing import Any

from dolium import policy
from dolium.errors import DoliumError, FailedPrecondition, InvalidArgument, ResourceExhausted, Unavailable
from dolium.isolation.base import (
    INIT,
    SLOT_CONSOLE,
    SLOT_ROOT_TREE,
    Attachment,
    Started,
    Stdio,
    Wish,
)
from dolium.isolation.launcher import Launcher
from dolium.isolation.shim import Launched, Shim
from dolium.isolation.templates import Compiled
from dolium.linux import mounts as km
from dolium.linux.cgroup import manage, tree
from dolium.runtime import plan as P
from dolium.runtime.cgroups import remove
from dolium.runtime.plan import Plan
from dolium.runtime.spec import NAMESPACES
from dolium.steps import Timings

_log = logging.getLogger(__name__)
PATIENCE_MS = 60_000
"""For one command of a runtime."""
SIGNAL_PATIENCE = 10.0
"""Seconds for a signal: SIGKILL comes after one that gets no answer, as a stop has promised."""
_SPEC_VERSION = "1.0.2"
"""What is written into config.json: there is nothing in it that is newer, and older runtimes look."""
_REPORTS = "user.log"
_CONFIG, _PID, _LOG, _CONSOLE, _ROOT = "config.json", "init.pid", "runtime.log", "console.sock", "rootfs"
_TELLTALES = "/proc/sys/net"
"""Where runsc (of 2022) looks for core/rmem_default to tell the host's network namespace, which alone had it in older
kernels. The folder above: what is in it is another one in each namespace."""
_ENVIRONMENT = [f"PATH={policy.DEFAULT_PATH}"]
_UNSUPPORTED = re.compile(r"Unsupported syscall (\w+)\([^)]*\)")
_LARGEST_REPORT = 1 << 18
_SHOWN = 200
"""Characters of an answer that is not understood."""
_LEVEL_FIELD = re.compile(r'level=error msg="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Runtime:
    """A runtime's name, program, and the flags that come before its commands. ``sandboxed``: system calls do not reach the
    host's kernel, and what is done with a container from outside is asked of the runtime."""

    name: str
    path: str
    arguments: tuple[str, ...] = ()
    sandboxed: bool = False


class OciIsolation:
    """See ``Backend``. ``states``: the folder of the runtime's own state."""

    def __init__(self, launcher: Launcher, layout: tree.Layout, runtime: Runtime, states: str) -> None:
        self._launcher, self._layout, self._runtime, self._states = launcher, layout, runtime, states
        self.runtime = runtime.name
        self.level = "gvisor" if runtime.sandboxed else "process"
        self.live = not runtime.sandboxed
        self.report_file = _REPORTS if runtime.sandboxed else ""

    # -- what it is --

    def check(self, wish: Wish) -> None:
        """See ``Backend``."""
        host, refused = wish.host, ""
        if wish.folder:
            refused = "--rootfs"
        elif wish.shared:
            refused = "a mount with propagation shared"
        elif wish.idmapped:
            refused = "an idmapped mount"
        elif self._runtime.sandboxed:
            refused = "a user namespace (--userns auto, --userns-remap)" if wish.user else _beyond_sandbox(host)
        if refused:
            raise InvalidArgument(f"{refused} does not go with runtime {self.runtime} (isolation {self.level})",
                                  hint="--isolation process, the default, can do it")

    def describe(self) -> dict[str, Any]:
        """See ``Backend``."""
        found: dict[str, Any] = {"Isolation": self.level, "Runtime": self.runtime, "RuntimePath": self._runtime.path}
        if self._runtime.sandboxed:
            found["Platform"] = platform_of(self._runtime.arguments)
        return found

    # -- the runtime's command line --

    def _words(self, log: str, *words: str, before: Sequence[str] = ()) -> list[str]:
        """``before``: flags of ours that daemon.json's may change."""
        return [self._runtime.path, "--root", self._states, "--log", log, "--log-format", "json", *before,
                *self._runtime.arguments, *words]

    def _call(self, *words: str, patience: float = PATIENCE_MS / 1000) -> str:
        """A command of the runtime, run at once; its output. Blocks, for ``patience`` seconds at most. Raises
        FailedPrecondition with what it said."""
        try:
            done = subprocess.run(self._words("/dev/null", *words), stdin=subprocess.DEVNULL, capture_output=True,
                                  encoding="utf-8", errors="replace", env={"PATH": policy.DEFAULT_PATH},
                                  timeout=patience, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise FailedPrecondition(f"{self._runtime.path} {words[0]}: {error}") from error
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise FailedPrecondition(f"{self.runtime} {words[0]}: {_message(said[-1])}")
        return done.stdout

    # -- create and start --

    def compile(self, identity: str, config: dict[str, Any], folder: str, *, network: bool, hidden: list[str],
                user: bool = False) -> Compiled:
        """See ``Backend``."""
        tty = bool(config["process"].get("terminal"))
        group = self._layout.paths(config["linux"]["cgroupsPath"])
        plan = Plan()
        plan.add(P.PARENT_BEFORE_CLONE, "mkdir", f"make {self._states}", self._states, 0o700, 1)
        plan.add(P.PARENT_BEFORE_CLONE, "clone", "clone3", NAMESPACES["mount"], 0)
        plan.add(P.CHILD_BEFORE_PIVOT, "propagation", "cut off from the host's mounts", km.MS_REC | km.MS_SLAVE)
        plan.add(P.CHILD_BEFORE_PIVOT, "root_attach", "the host's root", -1)
        plan.add(P.CHILD_BEFORE_PIVOT, "mount_tree", "mount the root", SLOT_ROOT_TREE, f"{folder}/{_ROOT}", 1, 0o755)
        if self._runtime.sandboxed:
            plan.add(P.CHILD_BEFORE_PIVOT, "mount_fs", f"hide {_TELLTALES}", "tmpfs", "tmpfs", [], 0, _TELLTALES, 0)
        console = ["--console-socket", _CONSOLE] if tty else []  # in the working folder: a socket's path is short
        log = f"{folder}/{_LOG}"
        pid_file = f"{folder}/{_PID}"
        # shared: who looks from outside, as `docker cp` does, and who is inside see the same files
        own = ["--file-access=shared", *self._raw(config["process"])] if self._runtime.sandboxed else []
        reports = ["--user-log", f"{folder}/{_REPORTS}"] if self._runtime.sandboxed else []
        words = ["run", "--detach", "--bundle", folder, "--pid-file", pid_file, *reports, *console, identity]
        self._become(plan, self._words(log, *words, before=own), tty, pid_file)
        for stage in (P.AFTER_EXIT, P.ON_FAILURE):
            line = self._words("/dev/null", "delete", "--force", identity)
            plan.add(stage, "hook", f"{self.runtime} delete", line[0], line, _ENVIRONMENT, PATIENCE_MS, "")
            remove(plan, stage, group)
        done = json.dumps(self._adapted(config, folder, network=network, user=user)).encode()
        return Compiled(plan, plan.encode(), plan.part(P.AFTER_EXIT).encode(), done)

    def _raw(self, process: dict[str, Any]) -> list[str]:
        """runsc takes CAP_NET_RAW away, of every process anew, unless it is told not to."""
        return ["--net-raw"] if self._runtime.sandboxed and "CAP_NET_RAW" in process["capabilities"]["bounding"] else []

    def _become(self, plan: Plan, words: list[str], tty: bool, pid_file: str) -> None:
        """The child becomes a runtime with the container's streams; what it makes is the launch's process."""
        if not tty:
            plan.add(P.CHILD_BEFORE_PIVOT, "stdio", "standard input and output", P.SLOT_STDIN, P.SLOT_STDOUT, P.SLOT_STDERR)
        plan.add(P.AFTER_START, "exec", f"exec {words[0]}", words[0], words, _ENVIRONMENT)
        plan.add(P.PARENT_STARTED, "adopt", self.runtime, pid_file, SLOT_CONSOLE if tty else -1, PATIENCE_MS)

    def _adapted(self, config: dict[str, Any], folder: str, *, network: bool, user: bool) -> dict[str, Any]:
        """The configuration in the runtime's own terms: the root and joined namespaces have paths."""
        linux = dict(config["linux"])
        namespaces = []
        for entry in linux["namespaces"]:
            if entry["type"] == "network" and network:
                entry = {**entry, "path": f"{folder}/network"}
            if entry["type"] == "user" and user:
                entry = {**entry, "path": f"{folder}/user"}
            namespaces.append(entry)
        linux["namespaces"] = namespaces
        if self._runtime.sandboxed:
            linux.pop("seccomp", None)  # the host's calls are the sandbox's own, which has its own filter
            linux.pop("sysctl", None)  # of the host's kernel; the sandbox's has no such limit on ports and pings
            # what it shows of a mount is one file system to those inside: read-only is so all the way down
            known = [{**mount, "options": ["ro" if one == "rro" else one for one in mount.get("options") or []]}
                     for mount in config["mounts"]]
            config = {**config, "mounts": known}
        return {**config, "ociVersion": _SPEC_VERSION, "root": {**config["root"], "path": _ROOT}, "linux": linux}

    async def run(self, preparing: asyncio.Future[Shim], folder: str, compiled: Compiled, stdio: Stdio, *, root: int,
                  network: int, user: int = -1, attachments: list[Attachment], oom_files: list[str],
                  timings: Timings) -> Started:
        """See ``Backend``."""
        with contextlib.ExitStack() as held:
            try:
                fds = {SLOT_ROOT_TREE: root}
                config = _with_own_tmp(compiled.config, root, folder) if self._runtime.sandboxed else compiled.config
                _write(f"{folder}/{_CONFIG}", config)
                for name, fd in (("network", network), ("user", user)):
                    if fd >= 0:  # ours stay open until the launch is over
                        os.symlink(f"/proc/{os.getpid()}/fd/{fd}", f"{folder}/{name}")
                if stdio.tty:
                    fds[SLOT_CONSOLE] = held.enter_context(_listening(f"{folder}/{_CONSOLE}"))
            except BaseException:
                for attachment in attachments:
                    attachment.close()
                raise
            return await self._launcher.run(preparing, folder, compiled, stdio, fds=fds, attachments=attachments,
                                            oom_files=oom_files, timings=timings,
                                            explain=partial(self._explained, f"{folder}/{_LOG}", compiled.config))

    def _explained(self, log: str, config: bytes, error: DoliumError) -> DoliumError:
        """What the runtime itself said, in place of its exit status; in the words that Docker's clients look for.
        ``config``: JSON, of the container or of the process."""
        try:
            with open(log, encoding="utf-8", errors="replace") as file:
                said = [_message(line) for line in file if '"error"' in line or '"fatal"' in line or "level=error" in line]
        except OSError:
            return error
        if not said:
            return error
        found = json.loads(config)
        program = found.get("process", found)["args"][0]
        text = said[0].replace("No such file", "no such file").replace("Permission denied", "permission denied")
        return type(error)(f"{self.runtime}: {text}" + ("" if program in text else f": exec: {program}"), errno=error.errno)

    # -- a container that runs --

    async def exec(self, shim: Shim, folder: str, identity: str, config: dict[str, Any], process: dict[str, Any],
                   exec_id: str, *, pid: int, start_time: int, stdio: Stdio, attachments: list[Attachment]) -> Launched:
        """See ``Backend``."""
        place, told = f"{folder}/exec.{exec_id}", json.dumps(process).encode()
        made = [f"{place}.{kind}" for kind in ("json", "pid", "log", "sock")]
        spec, pid_file, log, console = made
        plan = Plan()
        plan.add(P.PARENT_BEFORE_CLONE, "clone", "clone3", 0, 0)
        words = self._words(log, "exec", "--detach", "--pid-file", pid_file, "--process", spec,
                            *(["--console-socket", os.path.basename(console)] if stdio.tty else []), identity,
                            before=self._raw(process))
        self._become(plan, words, stdio.tty, pid_file)
        try:
            with contextlib.ExitStack() as held:
                try:
                    _write(spec, told)
                    fds = {SLOT_CONSOLE: held.enter_context(_listening(console))} if stdio.tty else {}
                except BaseException:
                    for attachment in attachments:
                        attachment.close()
                    raise
                try:
                    return await self._launcher.exec(shim, exec_id, plan.encode(), stdio, attachments, fds)
                except DoliumError as error:
                    raise self._explained(log, told, error) from error
        finally:
            for path in made:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)

    async def signal(self, shim: Shim, identity: str, number: int) -> None:
        """See ``Backend``."""
        if number == SIGKILL:  # by the kernel: a runtime may not do it to one that is paused, or hangs
            await shim.signal(INIT, number)
        else:
            await asyncio.to_thread(self._call, "kill", identity, str(number), patience=SIGNAL_PATIENCE)

    async def freeze(self, identity: str, folders: Sequence[str], frozen: bool) -> None:
        """See ``Backend``."""
        try:
            await asyncio.to_thread(self._call, "pause" if frozen else "resume", identity)
        except FailedPrecondition as error:
            with contextlib.suppress(FailedPrecondition):  # what went wrong first is told
                if await self.is_frozen(identity, ()) is frozen:
                    return
            if frozen:  # or it has done half of it
                with contextlib.suppress(OSError):
                    await asyncio.to_thread(manage.freeze, list(folders), False)
            raise error

    async def is_frozen(self, identity: str, folders: Sequence[str]) -> bool:
        """See ``Backend``."""
        text = await asyncio.to_thread(self._call, "state", identity)
        try:
            return bool(json.loads(text)["status"] == "paused")
        except (ValueError, KeyError, TypeError) as error:
            raise FailedPrecondition(f"{self.runtime} state: no answer that is understood: {text[:_SHOWN]!r}") from error

    async def forget(self, identity: str) -> None:
        """See ``Backend``."""
        try:
            await asyncio.to_thread(self._call, "delete", "--force", identity)
        except DoliumError as error:
            _log.warning("container %s: %s", identity, error)

    def unsupported(self, path: str) -> list[tuple[str, str]]:
        """See ``Backend``."""
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                lines = file.read(_LARGEST_REPORT).splitlines()
                if os.fstat(file.fileno()).st_size > _LARGEST_REPORT:  # those inside can go on for ever: it is begun anew
                    os.truncate(path, 0)
        except FileNotFoundError:
            return []
        return [(found.group(1), found.group(0)) for line in lines if (found := _UNSUPPORTED.search(line))]

    def root_of(self, identity: str, pid: int) -> int:
        """See ``Backend``. A sandbox has the files at hand in another process, runsc's gofer."""
        if not self._runtime.sandboxed:
            return pid
        for path in glob.glob(f"{glob.escape(self._states)}/*{identity}.state"):
            try:
                with open(path) as file:
                    return int(json.load(file)["goferPid"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise FailedPrecondition(f"{path}: no gofer is named: {error!r}") from error
        raise FailedPrecondition(f"{self.runtime} knows nothing of {identity}")

    async def listing(self, identity: str) -> tuple[list[str], list[list[str]]] | None:
        """See ``Backend``."""
        if not self._runtime.sandboxed:
            return None
        lines = (await asyncio.to_thread(self._call, "ps", "--format", "table", identity)).splitlines()
        titles = lines[0].split() if lines else []
        return titles, [line.split(None, len(titles) - 1) for line in lines[1:] if line.strip()]


def platform_of(arguments: Sequence[str]) -> str:
    """What makes the sandbox's system calls come to it: runsc's ``--platform``; ptrace is Debian's default."""
    for word in arguments:
        key, _, value = word.lstrip("-").partition("=")
        if key == "platform" and value:
            return value
    return "ptrace"


def _beyond_sandbox(host: dict[str, Any]) -> str:
    """What a user-space kernel cannot share with the host, or with others, or cannot be held to; "" for nothing."""
    lent = [(f"--{flag} {host.get(key)}", (host.get(key) or "").partition(":")[0] in ("host", "container"))
            for flag, key in (("network", "NetworkMode"), ("pid", "PidMode"), ("ipc", "IpcMode"), ("uts", "UTSMode"))]
    profile = any(re.match(r"seccomp[=:](?!unconfined\Z|builtin\Z)", option) for option in host.get("SecurityOpt") or [])
    wishes = [*lent, ("--ipc shareable", host.get("IpcMode") == "shareable"), ("--security-opt seccomp", profile),
              *((f"--{flag}", host.get(key)) for flag, key in (
                  ("device", "Devices"), ("sysctl", "Sysctls"), ("egress", "Egress"), ("ingress", "Ingress")))]
    return next((flag for flag, wished in wishes if wished), "")


def _with_own_tmp(config: bytes, root: int, folder: str) -> bytes:
    """runsc has a tmpfs of its own where the root's /tmp is empty, which `docker cp` does not see and which is lost between
    two runs; not where something is mounted: the root's own /tmp. Only where that is a folder: a link would lead to the
    host's."""
    spec = json.loads(config)
    try:
        is_folder = stat.S_ISDIR(os.stat("tmp", dir_fd=root, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return config
    if not is_folder or any(os.path.normpath(mount["destination"]) == "/tmp" for mount in spec["mounts"]):
        return config
    options = ["bind", "ro"] if spec["root"].get("readonly") else ["bind"]
    spec["mounts"].insert(0, {"destination": "/tmp", "type": "bind", "source": f"{folder}/{_ROOT}/tmp", "options": options})
    return json.dumps(spec).encode()


def _message(line: str) -> str:
    """The text of a line of a runtime's log, JSON or not, or of its standard error. runsc ends no line after a record."""
    texts, rest = [], line.strip()
    try:
        while rest:
            record, end = json.JSONDecoder().raw_decode(rest)
            texts.append(str(record["msg"]).strip())
            rest = rest[end:].lstrip()
        return "; ".join(texts)
    except (ValueError, KeyError, TypeError):
        found = _LEVEL_FIELD.search(line)
        return (found.group(1).replace('\\"', '"') if found else line).strip()


def _write(path: str, data: bytes) -> None:
    """A new file. Raises ResourceExhausted, Unavailable."""
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(data)
    except OSError as error:
        kind = ResourceExhausted if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE) else Unavailable
        raise kind(f"write {path}: {error.strerror}", errno=error.errno) from error


@contextlib.contextmanager
def _listening(path: str) -> Iterator[int]:
    """A listening socket's fd: the runtime has connected before anybody accepts, so that who accepts need not wait."""
    folder, name = os.path.split(path)
    place = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.bind(f"/proc/self/fd/{place}/{name}")  # sun_path holds 108 bytes
            sock.listen(1)
            sock.setblocking(False)
            yield sock.fileno()
    finally:
        os.close(place)
