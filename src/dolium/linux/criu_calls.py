"""Running CRIU for one container: a program of its own, run by a plan's operation as ``python -I -S -E``.

The request is JSON on standard input; what came of it is JSON too, in the file it names, for the compiler's next look:
``{"pid": N}`` of a restored init, ``{"exit": N}`` when that has ended, ``{"error": text}``, or ``{}`` for a dump.

On a restore CRIU has a mount namespace of its own, where the root is bound on itself (CRIU wants a mount point), which goes
away with it; this program and the hooks stay in the caller's. The restored init is this program's child (rst_sibling): this
waits for it, or leaves it to the caller's sub-reaper. The caller's standard streams are the front's, which is this program's
parent: they are fetched from it. In the foreground the front starts this with all signals blocked: what it passes on waits
until there is a container.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import termios
import tty

from dolium.linux.criu import errors, external_fd, fdinfo, identity, mounts, sockets
from dolium.linux.syscalls import make_dirs_in_root, move_mount, open_in_root, open_tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, NoReturn

_LIBC = ctypes.CDLL(None, use_errno=True)
_PIDFD_GETFD = 438
_KEYCTL, _JOIN_SESSION_KEYRING = {"x86_64": 250, "aarch64": 219}, 1
_CLONE_NEWNS, _MS_BIND, _MS_REC, _MS_SLAVE = 0x20000, 0x1000, 0x4000, 0x80000
FIRST_FD = 100  # far from what CRIU opens before it looks


class Failed(Exception):
    """The text is what a person reads."""


def _check(result: int, what: str) -> int:
    if result < 0:
        raise Failed(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def _from_front(number: int) -> int:
    """A copy of one of the front's descriptors: the same open file, not one opened again."""
    front = os.pidfd_open(os.getppid())
    try:
        return _check(_LIBC.syscall(_PIDFD_GETFD, front, number, 0), f"get the caller's file descriptor {number}")
    finally:
        os.close(front)


def _stream(own: int, key: str, path: str) -> int:
    """What takes the place of a stream: the caller's; but that file again, where a file was and the caller has none that can
    be positioned, as CRIU does."""
    fd = _from_front(own)
    if key.startswith("pipe"):
        return fd
    try:
        os.lseek(fd, 0, os.SEEK_CUR)
        return fd
    except OSError:
        os.close(fd)
    try:
        return os.open(path, os.O_RDWR)
    except OSError as error:
        raise Failed(f"file descriptor {own} was {path} ({error.strerror}), and the caller's is no file") from None


def _callers(own: int, key: str, path: str) -> int:
    """A descriptor that is passed on as it is: of a file CRIU asks to be positioned. Raises Failed."""
    fd = _from_front(own)
    try:
        if key.startswith("file["):
            os.lseek(fd, 0, os.SEEK_CUR)
    except OSError:
        os.close(fd)
        raise Failed(f"file descriptor {own} was {path}, and the caller's is no file") from None
    return fd


def _own_root(rootfs: str, movable: bool) -> None:
    """``rootfs`` as a mount at its own place, in a mount namespace of this process; ``movable``: CRIU will pivot from this
    root, which the kernel refuses where it is no mount point, or a ramdisk: so another mount of it is put on top. Raises
    Failed."""
    _check(_LIBC.unshare(_CLONE_NEWNS), "unshare the mount namespace")
    root = os.open("/", os.O_PATH | os.O_DIRECTORY)
    with open("/proc/self/ns/mnt") as own:  # entered again: then "/" is a mount, also for who is in a chroot
        _check(_LIBC.setns(own.fileno(), _CLONE_NEWNS), "see the whole mount namespace")
    _check(_LIBC.mount(None, b"/", None, _MS_REC | _MS_SLAVE, None), "cut off from the host's mounts")
    os.fchdir(root)
    os.close(root)
    os.chroot(".")
    if movable:
        tree = open_tree("/", recursive=True)
        move_mount(tree, "/")
        os.fchdir(tree)
        os.close(tree)
        os.chroot(".")
    path = os.fsencode(rootfs)
    _check(_LIBC.mount(path, path, None, _MS_BIND | _MS_REC, None), f"bind {rootfs}")


def _make_targets(rootfs: str, targets: list[str]) -> None:
    """Folders to mount on, in a root that is not the one the container was dumped from. Files are there, or CRIU says so."""
    root = os.open(rootfs, os.O_PATH | os.O_DIRECTORY)
    try:
        for path in targets:
            try:
                os.close(open_in_root(root, path, os.O_PATH))
            except FileNotFoundError:
                make_dirs_in_root(root, path)
    finally:
        os.close(root)


def _keep(fd: int, number: int) -> None:
    os.dup2(fd, number, inheritable=True)
    os.close(fd)


def _program(request: dict[str, Any]) -> str:
    name = request["program"]
    folders = [""] if "/" in name else [f"{folder}/" for folder in request["path"].split(":")]
    for folder in folders:
        if os.access(f"{folder}{name}", os.X_OK):
            return f"{folder}{name}"
    raise Failed(f"{name} is not installed (Debian's package criu)")


def _run(program: str, request: dict[str, Any]) -> int:
    """CRIU's exit code. Its own words go to its log, or, before it has one, to standard error: kept for the error."""
    pid = os.fork()
    if pid == 0:
        try:
            os.chdir("/")
            os.execve(program, [program, *request["arguments"]], _environment(request))
        finally:
            os._exit(127)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _environment(request: dict[str, Any]) -> dict[str, str]:
    return {"PATH": request["path"], "LANG": "C.UTF-8"}


def _explain(code: int, request: dict[str, Any]) -> Failed:
    """What CRIU said last, and where all of it is."""
    log = request["log"]
    try:
        with open(log, encoding="utf-8", errors="replace") as file:
            said = errors(file.read())
    except OSError:
        return Failed(f"CRIU ended with {code} before it wrote its log {log}")
    return Failed(f"CRIU said: {'; '.join(said) or f'nothing, and ended with {code}'} (its log: {log})")


def _outside(pid: int, shared: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """What restore will have to give back, by CRIU's names: init's streams, and namespaces of others (type to its name in
    /proc and the key)."""
    with open(f"/proc/{pid}/mountinfo", errors="surrogateescape") as file:
        known = {mount.identity for mount in mounts(file.read())}
    files = {}
    for fd in range(3):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
        except FileNotFoundError:  # init has closed it
            continue
        with open(f"/proc/{pid}/fdinfo/{fd}") as file:
            try:
                key = external_fd(target, fdinfo(file.read()), known)
            except ValueError as error:
                raise Failed(f"file descriptor {fd} ({target}): {error}") from None
        if key:
            files[str(fd)] = [key, target]
    own = {kind: os.readlink(f"/proc/{pid}/ns/{name}").replace(":[", "[") for kind, (name, _) in shared.items()}
    return {"files": files, "namespaces": {kind: f"{own[kind]}:{key}" for kind, (_, key) in shared.items()}}


def _preserved(pid: int, group: str, wanted: dict[str, str]) -> dict[str, list[str]]:
    """What the container still has of the descriptors that its caller gave it, by their numbers then: CRIU's name, "" where
    nobody can give CRIU another, and what it is. Who closed one may have it by another number, or a child of his."""
    found: dict[str, list[str]] = {number: [] for number in wanted}
    if not wanted:
        return found
    numbers = {mark: number for number, mark in reversed(wanted.items())}
    with open(f"/proc/{pid}/mountinfo", errors="surrogateescape") as file:
        known = {mount.identity for mount in mounts(file.read())}
    with open(f"/proc/{pid}/net/unix", errors="surrogateescape") as file:
        local = sockets(file.read())
    members = {pid}.union(*(_processes(folder) for folder, _, _ in os.walk(group)))
    for path in (f"/proc/{member}/fd/{fd}" for member in members for fd in _names(f"/proc/{member}/fd")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it is not frozen yet
            target = os.readlink(path)
            with open(path.replace("/fd/", "/fdinfo/")) as file:
                fields = fdinfo(file.read())
            number = numbers.get(identity(fields))
            if number is not None and target.startswith("socket:"):
                found[number] = [target if fields["ino"] in local else "", target]
            elif number is not None:
                found[number] = [external_fd(target, fields, known) or "", target]
    return found


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, ProcessLookupError):
        return []


def _dump(request: dict[str, Any]) -> dict[str, int]:
    program = _program(request)
    if request["status_fd"] is not None:
        _keep(_from_front(request["status_fd"]), FIRST_FD)
        request["arguments"].append(f"--status-fd={FIRST_FD}")
    notes = {**request["notes"], **_outside(request["pid"], request["shared"]),
             "preserved": _preserved(request["pid"], request["group"], request["preserved"])}
    outside = dict.fromkeys(entry[0] for entry in [*notes["files"].values(), *notes["preserved"].values()] if entry)
    request["arguments"] += [f"--external={key.replace('socket:', 'unix')}" for key in outside
                             if key.startswith(("file[", "socket:["))]
    request["arguments"] += [f"--external={key}" for key in notes["namespaces"].values()]
    if request["serves"] and request["notes_path"]:  # it ends when the restored container has all of its memory
        _replace(request["notes_path"], json.dumps(notes), 0o600)
    code = _run(program, request)
    if code != 0:
        raise _explain(code, request)
    if request["notes_path"]:
        _replace(request["notes_path"], json.dumps(notes), 0o600)
    return {}


def _restore(request: dict[str, Any]) -> dict[str, int]:
    program = _program(request)
    inherited = [(key, _stream(own, key, path)) for own, key, path in request["streams"]]
    inherited += [(key, _callers(own, key, path)) for own, key, path in request["preserved"]]
    inherited += [(key, os.open(path, os.O_RDONLY)) for path, key in request["opened"]]
    for number, (_, fd) in enumerate(inherited, FIRST_FD):
        _keep(fd, number)
    _make_targets(request["rootfs"], request["targets"])
    restoring = Restoring(request, [key for key, _ in inherited])
    pid = restoring.run(program)
    os.closerange(FIRST_FD, FIRST_FD + len(inherited))
    record = request["record"].replace("\x01p", str(pid)).replace("\x01s", str(_start_time(pid)))
    _replace(request["state"], record, 0o600)
    if request["told"]:
        _replace(request["told"], str(pid), 0o644)
    if request["pidfd_socket"]:
        _send_fd("--pidfd-socket", request["pidfd_socket"], b"standard", os.pidfd_open(pid), pid)
    if request["terminal"] and request["terminal"]["socket"]:
        _send_fd("--console-socket", request["terminal"]["socket"], b"/dev/pts/0", restoring.master, pid)
    try:
        for kind, hook, state in request["started"]:
            _run_hook(kind, hook, state.replace("\x01p", str(pid)), None if request["detach"] else _unblock)
    except Failed:  # it takes the container with it (runtime.md, Lifecycle)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    if request["detach"]:
        return {"pid": pid}
    _stay(restoring.master, pid)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {"exit": 128 - code if code < 0 else code}


class Restoring:
    """A restore, asked for by CRIU's RPC (``criu swrk``, images/rpc.proto): by that alone it says when the namespaces are
    there, which is the hooks' turn, and hands over the outer end of a terminal that was outside: of a new pair in the
    container's own devpts. Most else is told by a file of flags.

    ``inherited``: CRIU's names for the descriptors from FIRST_FD on. ``master``: the terminal's outer end, -1 while there is
    none.
    """

    def __init__(self, request: dict[str, Any], inherited: list[str]) -> None:
        self._request, self._wished, self._inherited = request, request["terminal"], inherited
        self._holders = _processes(request["scope"])
        self.master = -1

    def run(self, program: str) -> int:
        """The pid of the restored init. Raises Failed."""
        request, init, failure = self._request, None, None
        flags = f"{os.path.dirname(request['outcome'])}/criu.flags"
        with open(os.open(flags, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write("".join(map(_statement, self._flags())))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        heard, says = os.pipe()
        pid = os.fork()
        if pid == 0:
            self._become(program, theirs, says)
        theirs.close()
        os.close(says)
        with open(heard) as pipe:
            said = pipe.read()  # its end: CRIU runs
        with ours:
            try:
                init = None if said else self._talk(ours, flags, pid)
            except Failed as error:
                failure = error
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.unlink(flags)
        self._let_go()
        if failure or said:
            raise failure or Failed(said)
        if init is None or (self._wished and self.master < 0):
            raise _explain(code, request)
        return init

    def _flags(self) -> list[str]:
        words = [word for word in self._request["arguments"] if word.startswith("--") and not word.startswith(_BY_RPC)]
        if not self._wished:
            return words
        # with it CRIU would take the caller's terminal for the container's
        return [word for word in words if word != "--shell-job"] + [
            f"--external=mnt[{place}]:/dev/null" for place in self._wished["console"]]

    def _become(self, program: str, sock: socket.socket, says: int) -> NoReturn:
        """CRIU, in this process; what keeps it from that is said."""
        try:
            for folder in self._request["join"]:
                with open(f"{folder}/cgroup.procs", "w") as file:
                    file.write("0")
            _own_root(self._request["rootfs"], self._request["movable"])
            if self._request["keyring"]:  # where the kernel has none, nobody's is shared
                _LIBC.syscall(_KEYCTL[os.uname().machine], _JOIN_SESSION_KEYRING, self._request["keyring"].encode())
            if not self._request["detach"]:
                _unblock()
            sock.set_inheritable(True)
            os.execve(program, [program, "swrk", str(sock.fileno())], _environment(self._request))
        except (Failed, OSError) as error:
            os.write(says, str(error).encode())
        finally:
            os._exit(127)

    def _talk(self, sock: socket.socket, flags: str, criu: int) -> int | None:
        """Ask for the restore, answer CRIU's questions. The pid of init; None when its log says why not. Raises Failed."""
        # seen from CRIU's mount namespace: in folders of another one it cannot mount
        images, work = (os.open(f"/proc/{criu}/root{os.path.realpath(self._request[key])}", os.O_RDONLY | os.O_DIRECTORY)
                        for key in ("images", "work"))
        passed = (_field(27, _field(1, key.encode()) + _field(2, number))
                  for number, key in enumerate(self._inherited, FIRST_FD))
        options = b"".join((_field(1, images), _field(9, 4), _field(10, b"restore.log"), _field(12, 1), _field(17, work),
                            _field(26, 1), *passed, *([_field(50, 1)] if self._wished else []), _field(51, flags.encode())))
        sock.send(_field(1, _RESTORE) + _field(2, options))
        try:
            while True:
                data, fds, _, _ = socket.recv_fds(sock, 1 << 16, 1)
                if not data:
                    return None
                answer = _fields(data)
                if answer.get(1) == _RESTORE:
                    return int(_fields(answer[4])[1]) if answer.get(2) else None
                notice = _fields(answer.get(5) or b"")
                try:
                    self._heed(notice.get(1), notice.get(2) or 0, fds)
                except (Failed, OSError):
                    sock.send(_field(1, _NOTIFY) + _field(3, 0))
                    raise
                sock.send(_field(1, _NOTIFY) + _field(3, 1))
        finally:
            os.close(images)
            os.close(work)

    def _heed(self, notice: bytes | None, pid: int, fds: list[int]) -> None:
        """What is due at one of CRIU's stages. Raises Failed."""
        if notice == b"orphan-pts-master" and fds:
            self.master = fds[0]
        elif notice == b"setup-namespaces":  # they are there, and nothing is in them yet
            for kind, hook, state in self._request["hooks"]:
                _run_hook(kind, hook, state.replace("\x01p", str(pid)), None if self._request["detach"] else _unblock)
        elif notice == b"post-restore" and self._wished:  # all is made, and nothing runs yet
            self._furnish(pid)
        if self._holders and set(_processes(self._request["scope"])) - set(self._holders):
            self._let_go()

    def _let_go(self) -> None:
        """Who only held the scope open ends: as soon as somebody else is in it, or when nobody will be."""
        for pid in self._holders:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._holders = []

    def _furnish(self, pid: int) -> None:
        """The terminal's size, and its inner end on /dev/console, where a placeholder is. Raises Failed."""
        wished = self._wished
        if wished["rows"] and wished["columns"]:
            fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", wished["rows"], wished["columns"], 0, 0))
        if not wished["console"]:
            return
        (number,) = struct.unpack("I", fcntl.ioctl(self.master, _TIOCGPTN, bytes(4)))
        child = os.fork()
        if child == 0:
            try:
                with open(f"/proc/{pid}/ns/mnt") as namespace:
                    _check(_LIBC.setns(namespace.fileno(), _CLONE_NEWNS), "enter the container")
                for place in wished["console"]:
                    _check(_LIBC.mount(f"/dev/pts/{number}".encode(), os.fsencode(place), None, _MS_BIND, None), "mount")
                os._exit(0)
            finally:
                os._exit(1)
        if os.waitpid(child, 0)[1]:
            raise Failed("cannot mount the terminal on /dev/console")


def _statement(flag: str) -> str:
    """``--name`` or ``--name=value`` as a line of CRIU's configuration file."""
    name, _, value = flag.removeprefix("--").partition("=")
    if any(sign in value for sign in ' \t"'):
        value = '"' + value.replace('"', '\\"') + '"'
    return f"{name} {value}\n"


def _processes(folder: str) -> list[int]:
    """Pids in a cgroup; none when it is not named."""
    if not folder:
        return []
    with open(f"{folder}/cgroup.procs") as file:
        return [int(line) for line in file]


def _run_hook(kind: str, hook: dict[str, Any], state: str, first: Callable[[], None] | None) -> None:
    """As the executor runs one: with its own environment alone, in a process group that is ended with it. Raises Failed."""
    label, limit = f"{kind} hook {hook['path']}", int(hook.get("timeout") or 0)
    env = dict(entry.split("=", 1) for entry in hook.get("env") or [] if "=" in entry)
    with open(os.memfd_create("state"), "w+") as told, open(os.memfd_create("stderr"), "w+", errors="replace") as err:
        told.write(state)
        told.seek(0)
        try:
            child = subprocess.Popen(hook.get("args") or [hook["path"]], executable=hook["path"], stdin=told, stderr=err,
                                     stdout=subprocess.DEVNULL, process_group=0, env=env, preexec_fn=first)
        except OSError as error:
            raise Failed(f"{label}: {error.strerror}") from None
        try:
            code = child.wait(limit or None)
        except subprocess.TimeoutExpired:
            raise Failed(f"{label}: no end after {limit} s; its process group was killed") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        err.seek(0)
        said = err.readline().strip()
    if code:
        how = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        raise Failed(f"{label}: {how}{f': {said}' if said else ''}")


def _unblock() -> None:
    """For what is run in the foreground."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _stay(master: int, pid: int) -> None:
    """Until the container ends: signals are its own, and the caller's terminal and its own (``master``) are one."""
    init, signals = os.pidfd_open(pid), _check(_LIBC.signalfd(-1, b"\xff" * 128, os.O_CLOEXEC), "signalfd")
    watch = select.poll()
    watch.register(init, select.POLLIN)
    watch.register(signals, select.POLLIN)
    with _relayed(master) as (keyboard, screen):
        if master >= 0:
            watch.register(keyboard, select.POLLIN)
            watch.register(master, select.POLLIN)
        ended = False
        while not (ended and master < 0):
            ready = dict(watch.poll(0 if ended else None))
            if signals in ready:
                number = int.from_bytes(os.read(signals, 128)[:4], "little")
                if number == signal.SIGWINCH and master >= 0:
                    _resize(keyboard, master)
                elif number != signal.SIGCHLD:
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(init, number)
            if master in ready and not _copy(master, screen):
                return
            if keyboard in ready and not _copy(keyboard, master):
                watch.unregister(keyboard)
            if ended and master not in ready:
                return
            ended = ended or init in ready


def _resize(keyboard: int, master: int) -> None:
    if os.isatty(keyboard):
        fcntl.ioctl(master, termios.TIOCSWINSZ, fcntl.ioctl(keyboard, termios.TIOCGWINSZ, bytes(8)))


@contextlib.contextmanager
def _relayed(master: int) -> Iterator[tuple[int, int]]:
    """The caller's standard input, raw while this lasts where it is a terminal, and output; -1 each without a ``master``."""
    if master < 0:
        yield -1, -1
        return
    keyboard, screen = _from_front(0), _from_front(1)
    before = termios.tcgetattr(keyboard) if os.isatty(keyboard) else None
    _resize(keyboard, master)
    group = -1
    with contextlib.suppress(OSError):  # not a terminal, or another session's
        # programs that a plan runs are in a group of their own, and only the foremost one may read
        group = os.tcgetpgrp(keyboard)
        os.tcsetpgrp(keyboard, os.getpgrp())
    try:
        if before is not None:
            tty.setraw(keyboard, termios.TCSANOW)  # what was typed before is not lost
        yield keyboard, screen
    finally:
        if before is not None:
            termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
        if group >= 0:
            os.tcsetpgrp(keyboard, group)


def _copy(source: int, target: int) -> bool:
    """What has come; False at the end."""
    try:
        data = os.read(source, 1 << 16)
        while data:
            written = os.write(target, data)
            if written == len(data):
                return True
            data = data[written:]
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EPIPE):
            raise
    return False


_RESTORE, _NOTIFY = 2, 6
_TIOCGPTN = 0x80045430
_BY_RPC = ("--images-dir=", "--work-dir=", "--log-file=")


def _varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def _field(number: int, value: int | bytes) -> bytes:
    """A field of a protobuf message."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _fields(data: bytes) -> dict[int, Any]:
    """The fields of a message that are numbers or bytes; of one that is repeated, the last. Raises Failed."""
    found: dict[int, Any] = {}
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while at < len(data):
            byte, at = data[at], at + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
        raise Failed("CRIU's answer is cut short")

    while at < len(data):
        key = number()
        if key & 7 == 0:
            found[key >> 3] = number()
        elif key & 7 == 2:
            size = number()
            found[key >> 3], at = data[at : at + size], at + size
        else:
            raise Failed("CRIU's answer has a field of an unknown kind")
    return found


def _send_fd(flag: str, path: str, word: bytes, fd: int, pid: int) -> None:
    """To whom a flag names. When that fails, so does the restore."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as out:
            out.connect(path)
            socket.send_fds(out, [word], [fd])
    except OSError as error:
        os.kill(pid, signal.SIGKILL)
        raise Failed(f"{flag} {path}: {error.strerror}") from None
    finally:
        os.close(fd)


def _start_time(pid: int) -> int:
    """In clock ticks after boot, as the executor records it."""
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[19])


def _replace(path: str, text: str, mode: int) -> None:
    with open(os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode), "w") as file:
        file.write(text)
    os.rename(f"{path}.new", path)


def main() -> int:
    """The program; returns its exit code."""
    with open(0) as file:
        request = json.load(file)
    outcome: dict[str, Any]
    try:
        outcome = _dump(request) if request["verb"] == "dump" else _restore(request)
    except (Failed, OSError) as error:
        outcome = {"error": str(error)}
    if "exit" not in outcome or os.path.isdir(os.path.dirname(request["outcome"])):  # `delete --force` may have been here
        _replace(request["outcome"], json.dumps(outcome), 0o600)
    return 1 if "error" in outcome else 0
