"""doliumd: the composition root. Puts the rooms together, listens, ends cleanly; containers and shims outlive it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import gc
import grp
import logging
import os
import signal
import socket
import sys
from pathlib import Path

from aiohttp import web

from dolium import memory
from dolium.api import live as live_api
from dolium.api import native, store
from dolium.api.docker.app import Handler, make_app
from dolium.engine.containers import Containers
from dolium.engine.engine import Engine, Paths
from dolium.engine.execs import Execs
from dolium.engine.live_ports import LivePorts
from dolium.engine.live_volumes import LiveVolumes
from dolium.engine.reconcile import reconcile
from dolium.errors import DoliumError, FailedPrecondition, InvalidArgument
from dolium.images.snapshots.drivers import DRIVERS
from dolium.linux.limits import OPEN_FILES
from dolium.network.manager import Networks
from dolium.network.records import default_subnet6
from dolium.settings import daemon_json

DATA, RUN, SOCKET = "/var/lib/dolium", "/run/dolium", "/run/dolium/dolium.sock"
GROUP = "docker"
SHUTDOWN_GRACE = 1.0
"""Seconds for requests under way to end by themselves, then as long for them to end when told to: `wait`, `logs -f` and
clients that read nothing would go on for ever."""
QUIET = 3.0
"""Seconds without a request after which memory that is free goes back to the kernel."""
_log = logging.getLogger("doliumd")


def arguments() -> argparse.ArgumentParser:
    """The command line of doliumd."""
    parser = argparse.ArgumentParser(prog="doliumd", description="The dolium daemon: serves the Docker Engine API.")
    parser.add_argument("-H", "--host", default=f"unix://{SOCKET}", help="socket to listen on (default %(default)s); "
                        "fd:// takes the one systemd passes")
    parser.add_argument("--data-root", default=DATA, help="folder of images, containers, volumes (default %(default)s)")
    parser.add_argument("--run-root", default=RUN, help="folder of sockets and shims (default %(default)s)")
    parser.add_argument("--etc-root", default="/etc", help="folder with docker/daemon.json, docker/certs.d, "
                        "containers/registries.conf, containers/policy.json (default %(default)s)")
    parser.add_argument("--log-file", default="", help="write the log there instead of standard error")
    parser.add_argument("--snapshotter", "--storage-driver", choices=DRIVERS, default=DRIVERS[0], help="how container roots "
                        "are made of layers (default %(default)s): native copies, erofs keeps layers as sealed files")
    parser.add_argument("--userns-remap", default="", metavar="USER", help="every container gets a user namespace with this "
                        "user's subordinate ids (/etc/subuid), unless it says --userns host or auto")
    parser.add_argument("-D", "--debug", action="store_true", help="log more")
    return parser


def _lock(path: str) -> int:
    """One daemon a data folder. Raises FailedPrecondition naming the other's pid."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.read(fd, 32).decode().strip()
        os.close(fd)
        raise FailedPrecondition(f"another doliumd (pid {pid}) uses this data folder: {path}",
                                 hint="stop it with `dolium daemon stop`, or give another --data-root") from None
    os.ftruncate(fd, 0)
    os.write(fd, f"{os.getpid()}\n".encode())
    return fd


def _bind(host: str) -> socket.socket:
    """The bound socket, not listening yet: clients are refused until all is ready.

    Raises InvalidArgument, FailedPrecondition when somebody listens there already.
    """
    if host == "fd://":
        if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
            raise InvalidArgument("-H fd://: systemd passed no socket")
        return socket.socket(fileno=3)
    if not host.startswith("unix://"):
        raise InvalidArgument(f"-H {host}: only unix:// and fd:// are supported")
    path = host.removeprefix("unix://")
    os.makedirs(os.path.dirname(path), mode=0o711, exist_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, contextlib.suppress(FileNotFoundError,
                                                                                         ConnectionRefusedError):
        probe.connect(path)
        raise FailedPrecondition(f"-H {host}: another program listens there", hint="give another -H, or end it first")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        sock.bind(path)
    finally:
        os.umask(mask)
    with contextlib.suppress(KeyError):  # as Docker: members of the group may use the daemon, and so are root
        os.chown(path, 0, grp.getgrnam(GROUP).gr_gid)
        os.chmod(path, 0o660)
    return sock


def _notify(state: str) -> None:
    """sd_notify(3)."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
            sock.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)


def _give_memory_back(server: web.Server, served: int, worked: bool) -> None:
    """When no request came for a while after some work, and again then. On the loop: nobody is waiting."""
    idle = server.requests_count == served
    if idle and worked:
        memory.give_back()
    asyncio.get_running_loop().call_later(QUIET, _give_memory_back, server, server.requests_count, not idle)


async def serve(paths: Paths, host: str, snapshotter: str, userns_remap: str) -> None:
    """Run until SIGTERM, SIGINT or a stop request. Raises DoliumError when it cannot start."""
    path, said = daemon_json(Path(paths.etc))
    default6 = default_subnet6(said, str(path))
    lock = _lock(f"{paths.data}/doliumd.lock")
    sock = _bind(host)  # before anything is made: a daemon that cannot listen leaves nothing
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    engine = Engine(paths, lambda instance, store: Networks(instance, store, run_dir=paths.run, default6=default6),
                    snapshotter, userns_remap)
    life = Containers(engine)
    await engine.open()
    volumes = LiveVolumes(engine, life)
    await reconcile(engine, life, volumes)
    app = make_app(engine, life, Execs(engine, life), [native.routes, store.routes, live_api.routes])
    app[native.STOP], app[live_api.VOLUMES], app[live_api.PORTS] = stop, volumes, LivePorts(engine)
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=SHUTDOWN_GRACE)
    await runner.setup()
    inner = runner.server
    assert inner is not None
    server = await loop.create_unix_server(lambda: Handler(inner, loop=loop, **inner._kwargs), sock=sock, backlog=1024)
    memory.give_back()
    _give_memory_back(inner, 0, False)
    gc.freeze()  # what is there now stays: later collections need not look at it, in the middle of a start
    _log.info("listening on %s, instance %s, pid %d", host, engine.instance, os.getpid())
    _notify("READY=1")
    try:
        await stop.wait()
    finally:
        _notify("STOPPING=1")
        server.close()
        engine.events.close()
        await runner.cleanup()
        live = any(container.live for container in engine.containers.values())
        await life.close()
        await engine.close()
        if not live:
            engine.remove_groups()
        if host.startswith("unix://"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(host.removeprefix("unix://"))
        os.close(lock)
        _log.info("ended")


def entry() -> int:
    """The program."""
    options = arguments().parse_args()
    if options.log_file:
        fd = os.open(options.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
        for target in (1, 2):
            os.dup2(fd, target)
        os.close(fd)
    logging.basicConfig(level=logging.DEBUG if options.debug else logging.INFO,
                        format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    if os.geteuid() != 0:
        print("doliumd: needs root", file=sys.stderr)
        return 1
    memory.one_heap()
    OPEN_FILES.raise_own()
    paths = Paths(os.path.abspath(options.data_root), os.path.abspath(options.run_root),
                  os.path.abspath(options.etc_root))
    try:
        os.makedirs(paths.data, mode=0o711, exist_ok=True)
        asyncio.run(serve(paths, options.host, options.snapshotter, options.userns_remap))
    except (DoliumError, OSError) as error:
        print(f"doliumd: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(entry())
