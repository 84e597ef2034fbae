"""Running CRIU for one container: a program of its own, run by a plan's operation as ``python -I -S -E``.

The request is JSON on standard input; what came of it is JSON too, in the file it names, for the compiler's next look:
``{"pid": N}`` of a restored init, ``{"exit": N}`` when that has ended, ``{"error": text}``, or ``{}`` for a dump.

A restore takes place in a mount namespace of its own, where the root is bound on itself (CRIU wants a mount point) and goes
away with it. The restored init is this program's child, by CRIU's --restore-sibling: this waits for it, or leaves it to the
caller's sub-reaper. The caller's standard streams are the front's, which is this program's parent: they are fetched from it.
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
import termios
import tty

from dolium.linux.criu import errors, external_fd, mounts
from dolium.linux.syscalls import make_dirs_in_root, open_in_root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)
_PIDFD_GETFD = 438
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


def _own_root(rootfs: str) -> None:
    """``rootfs`` as a mount at its own place, in a mount namespace of this process."""
    _check(_LIBC.unshare(_CLONE_NEWNS), "unshare the mount namespace")
    _check(_LIBC.mount(None, b"/", None, _MS_REC | _MS_SLAVE, None), "cut off from the host's mounts")
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
            for folder in request.get("join") or []:
                with open(f"{folder}/cgroup.procs", "w") as file:
                    file.write("0")
            os.chdir("/")
            os.execve(program, [program, *request["arguments"]], {"PATH": request["path"], "LANG": "C.UTF-8"})
        finally:
            os._exit(127)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


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
                key = external_fd(target, file.read(), known)
            except ValueError as error:
                raise Failed(f"file descriptor {fd} ({target}): {error}") from None
        if key:
            files[str(fd)] = [key, target]
    own = {kind: os.readlink(f"/proc/{pid}/ns/{name}").replace(":[", "[") for kind, (name, _) in shared.items()}
    return {"files": files, "namespaces": {kind: f"{own[kind]}:{key}" for kind, (_, key) in shared.items()}}


def _dump(request: dict[str, Any]) -> dict[str, int]:
    program = _program(request)
    if request["status_fd"] is not None:
        _keep(_from_front(request["status_fd"]), FIRST_FD)
        request["arguments"].append(f"--status-fd={FIRST_FD}")
    notes = {**request["notes"], **_outside(request["pid"], request["shared"])}
    request["arguments"] += [f"--external={key}" for key, _ in notes["files"].values() if key.startswith("file[")]
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
    number = FIRST_FD
    for own, key, path in request["streams"]:
        _keep(_stream(own, key, path), number)
        request["arguments"].append(f"--inherit-fd=fd[{number}]:{key}")
        number += 1
    for path, key in request["opened"]:
        _keep(os.open(path, os.O_RDONLY), number)
        request["arguments"].append(f"--inherit-fd=fd[{number}]:{key}")
        number += 1
    _make_targets(request["rootfs"], request["targets"])
    _own_root(request["rootfs"])
    terminal = Terminal(request) if request["terminal"] else None
    code = terminal.run(program) if terminal is not None else _run(program, request)
    for fd in range(FIRST_FD, number):
        os.close(fd)
    if code != 0:
        raise _explain(code, request)
    with open(request["pid_file"]) as file:
        pid = int(file.read())
    record = request["record"].replace("\x01p", str(pid)).replace("\x01s", str(_start_time(pid)))
    _replace(request["state"], record, 0o600)
    if request["told"]:
        _replace(request["told"], str(pid), 0o644)
    if request["pidfd_socket"]:
        _send_fd("--pidfd-socket", request["pidfd_socket"], b"standard", os.pidfd_open(pid), pid)
    if terminal is not None and request["terminal"]["socket"]:
        _send_fd("--console-socket", request["terminal"]["socket"], b"/dev/pts/0", terminal.master, pid)
    if request["detach"]:
        return {"pid": pid}
    if terminal is not None:
        _relay(terminal.master, pid)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {"exit": 128 - code if code < 0 else code}


class Terminal:
    """A restore with a terminal whose outer end was outside: CRIU makes a new pair in the container's own devpts and hands
    the outer end over, which only its RPC can (``criu swrk``, images/rpc.proto). All else is told by a file of flags.

    ``master``: the outer end, -1 before it has come.
    """

    def __init__(self, request: dict[str, Any]) -> None:
        self._request, self._wished = request, request["terminal"]
        self.master = -1

    def run(self, program: str) -> int:
        """As ``_run``; the pid is in the pid file, as CRIU's command line writes it."""
        folder = os.path.dirname(self._request["outcome"])
        flags = f"{folder}/criu.flags"
        words = [word.removeprefix("--").replace("=", " ", 1) for word in self._request["arguments"]
                 if word.startswith("--") and not word.startswith(_BY_RPC)]
        words += [f"external mnt[{place}]:/dev/null" for place in self._wished["console"]]
        with open(os.open(flags, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write("".join(f"{word}\n" for word in words))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            try:
                os.set_inheritable(theirs.fileno(), True)
                os.execve(program, [program, "swrk", str(theirs.fileno())],
                          {"PATH": self._request["path"], "LANG": "C.UTF-8"})
            finally:
                os._exit(127)
        theirs.close()
        with ours:
            done = self._talk(ours, flags)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.unlink(flags)
        return 0 if done else code or 1

    def _talk(self, sock: socket.socket, flags: str) -> bool:
        """Ask for the restore and answer CRIU's questions; whether it succeeded."""
        images = os.open(self._wished["images"], os.O_RDONLY | os.O_DIRECTORY)
        work = os.open(self._wished["work"], os.O_RDONLY | os.O_DIRECTORY)
        options = b"".join((_field(1, images), _field(9, 4), _field(10, b"restore.log"), _field(12, 1), _field(17, work),
                            _field(26, 1), _field(50, 1), _field(51, flags.encode())))
        sock.send(_field(1, _RESTORE) + _field(2, options))
        try:
            while True:
                data, fds, _, _ = socket.recv_fds(sock, 1 << 16, 1)
                if not data:
                    return False  # its log says why
                answer = _fields(data)
                if answer.get(1) == _RESTORE:
                    if not answer.get(2) or self.master < 0:
                        return False
                    pid = int(_fields(answer[4])[1])
                    _replace(self._request["pid_file"], str(pid), 0o600)
                    return True
                notice = _fields(answer.get(5) or b"")
                if notice.get(1) == b"orphan-pts-master" and fds:
                    self.master = fds[0]
                elif notice.get(1) == b"post-restore":  # all is made, and nothing runs yet
                    self._furnish(int(notice[2]))
                sock.send(_field(1, _NOTIFY) + _field(3, 1))
        finally:
            os.close(images)
            os.close(work)

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


def _relay(master: int, pid: int) -> None:
    """The caller's terminal and the container's, as one, until the container ends."""
    keyboard, screen, init = _from_front(0), _from_front(1), os.pidfd_open(pid)
    before = termios.tcgetattr(keyboard) if os.isatty(keyboard) else None

    def resize(*_: object) -> None:
        if os.isatty(keyboard):
            fcntl.ioctl(master, termios.TIOCSWINSZ, fcntl.ioctl(keyboard, termios.TIOCGWINSZ, bytes(8)))

    signal.signal(signal.SIGWINCH, resize)
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP, signal.SIGTTOU):  # the keys go to the container
        signal.signal(number, signal.SIG_IGN)
    resize()
    group = -1
    with contextlib.suppress(OSError):  # not a terminal, or another session's
        # programs that a plan runs are in a group of their own, and only the foremost one may read
        group = os.tcgetpgrp(keyboard)
        os.tcsetpgrp(keyboard, os.getpgrp())
    watch = select.poll()
    for fd in (keyboard, master, init):
        watch.register(fd, select.POLLIN)
    try:
        if before is not None:
            tty.setraw(keyboard, termios.TCSANOW)  # what was typed before is not lost
        ended = False
        while True:
            ready = dict(watch.poll(0 if ended else None))
            if master in ready and not _copy(master, screen):
                return
            if keyboard in ready and not _copy(keyboard, master):
                watch.unregister(keyboard)
            if ended and master not in ready:
                return
            ended = ended or init in ready
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
_BY_RPC = ("--images-dir", "--work-dir", "--log-file", "--pidfile", "--restore-detached", "--restore-sibling", "--shell-job")


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
