"""Listening for a container's READY=1: a program of its own, run by a plan's operation as ``python -I -S -E``.

The request is JSON on standard input: ``socket`` to make, ``helper``: the file that names who listens (pid and start
time), ``host``: the manager's socket, ``pid`` of the container's first process, ``main``: tell that too. It returns when the
socket is there; a process of its own session stays until it has passed the word on, or the container has ended.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys

ROOM = 4096
PAUSE = 0.01  # seconds after a message that says something else: this process is not in the container's groups


def _address(path: str) -> str:
    return f"\0{path[1:]}" if path.startswith("@") else path


def _bound(path: str) -> socket.socket:
    """By a folder's fd: an address holds 108 bytes."""
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        if os.path.lexists(path):
            os.unlink(path)
        listener.bind(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
        os.chmod(path, 0o777)  # the container's user may be any
    finally:
        os.close(folder)
    return listener


def _start_time(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[19]


def _pass_on(listener: socket.socket, init: int, host: str, main: str) -> None:
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    poll.register(init, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poll.poll()}
        if listener.fileno() in ready:
            # descriptors that came along are closed: that is what a barrier waits for
            lines = listener.recv(ROOM).split(b"\n")
            if b"READY=1" in lines:
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
                    out.sendto(f"READY=1\n{main}".encode(), _address(host))
                return
            select.select([], [], [], PAUSE)
        elif init in ready:
            return


def main() -> int:
    """The program; returns its exit code."""
    with open(0, closefd=False) as file:  # its number is not to be taken by another
        request = json.load(file)
    try:
        init = os.pidfd_open(request["pid"])
        listener = _bound(request["socket"])
    except OSError as error:
        sys.stderr.write(f"{request['socket']}: {error.strerror}\n")
        return 1
    parted, parts = os.pipe()
    pid = os.fork()
    if pid:
        os.close(parts)
        os.read(parted, 1)
        fresh = f"{request['helper']}.new"
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w") as told:
            told.write(f"{pid} {_start_time(pid)}\n")
        os.rename(fresh, request["helper"])
        os._exit(0)  # nothing is to be flushed twice
    os.setsid()  # what a hook leaves in its process group is killed: not before this
    os.close(parts)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    try:
        _pass_on(listener, init, request["host"], f"MAINPID={request['pid']}\n" if request["main"] else "")
    except OSError:
        os._exit(1)  # the manager is gone: nobody waits
    os._exit(0)
