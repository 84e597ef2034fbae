"""A doliumd of one's own for a test: folders in a temporary place, driven by the real docker command line."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

DOCKER = "/usr/local/bin/docker" if os.path.exists("/usr/local/bin/docker") else shutil.which("docker") or "docker"
DOLIUM = os.path.join(os.path.dirname(sys.executable), "dolium")
WARM = f"/tmp/dolium-test-warm-{os.getpid()}"  # the warm compiler's folder, for `dolium`; dolium-runtime is tested cold
DEADLINE = 30.0
APPLETS = ("sh true false echo cat ls id ps sleep env head tail dd seq tr md5sum sha256sum stat touch rm mkdir chown chmod "
           "pwd hostname mount df grep sed wc date kill nc wget ip ping stty tty sort find ln cp mv test printf yes trap "
           "sync umask nslookup httpd").split()

AFTER_BOOT = ("unshare", "--mount", "--propagation", "slave", "sh", "-c",
              'mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"')


def eventually(check: Callable[[], Any], what: str, deadline: float = DEADLINE) -> Any:
    """The first true value of a check; fails at the deadline."""
    end, pause = time.monotonic() + deadline, 0.002
    while True:
        value = check()
        if value:
            return value
        assert time.monotonic() < end, f"not within {deadline:g} s: {what}"
        time.sleep(pause)
        pause = min(pause * 2, 0.1)


def base_tar() -> bytes:
    """A root file system: busybox, a few users, a folder with content for volumes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:

        def add(name: str, content: bytes = b"", mode: int = 0o644, kind: bytes = tarfile.REGTYPE, link: str = "",
                uid: int = 0) -> None:
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.type, info.linkname, info.uid, info.gid = len(content), mode, kind, link, uid, uid
            archive.addfile(info, io.BytesIO(content))

        for folder in ("bin", "etc", "root", "home/app", "data", "usr/bin"):
            add(folder, mode=0o755, kind=tarfile.DIRTYPE)
        add("tmp", mode=0o1777, kind=tarfile.DIRTYPE)
        add("bin/busybox", Path("/bin/busybox").read_bytes(), 0o755)
        for applet in APPLETS:
            add(f"bin/{applet}", kind=tarfile.SYMTYPE, link="busybox")
        add("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:app:/home/app:/bin/sh\n")
        add("etc/group", b"root:x:0:\napp:x:1000:\nextra:x:2000:app\n")
        add("data/seed", b"seed\n", mode=0o640, uid=1000)
    return out.getvalue()


class Daemon:
    """One instance. ``run`` and ``data`` are under ``folder``; stopped by ``stop``, killed by ``kill``."""

    def __init__(self, folder: Path, *options: str, inside: tuple[str, ...] = ()) -> None:
        """``inside``: the command that runs it elsewhere, such as nsenter with its flags."""
        self.folder, self.options, self.inside = folder, options, inside
        self.socket = str(folder / "d.sock")
        self.process: subprocess.Popen[bytes] | None = None
        self.log = folder / "doliumd.log"

    @property
    def env(self) -> dict[str, str]:
        """For clients."""
        return {**os.environ, "DOCKER_HOST": f"unix://{self.socket}", "DOLIUM_HOST": f"unix://{self.socket}", "DOLIUM_WARM": WARM,
                "DOCKER_CONFIG": str(self.folder / "docker-config")}

    def start(self, fault: str = "", wait: bool = True, boot_id: Path | None = None) -> None:
        """Start and wait until it listens; with a fault point it may die first. ``boot_id``: a file that it sees instead
        of the kernel's."""
        env = {key: value for key, value in os.environ.items() if key != "DOLIUM_FAULT"}
        if fault:
            env["DOLIUM_FAULT"] = fault
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [*self.inside, *((*AFTER_BOOT, str(boot_id)) if boot_id else ()), sys.executable, "-I", "-m", "dolium.daemon", "-H", f"unix://{self.socket}", "--data-root",
                 str(self.folder / "data"), "--run-root", str(self.folder / "run"), "--etc-root", str(self.folder / "etc"), *self.options],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True)
        if wait:
            eventually(lambda: self.listening() or self.process is None or self.process.poll() is not None,
                       "the daemon listens")
            if not fault:
                assert self.process.poll() is None, self.tail()

    def listening(self) -> bool:
        """Can a client connect?"""
        with socket.socket(socket.AF_UNIX) as sock:
            try:
                sock.connect(self.socket)
            except OSError:
                return False
        return True

    def tail(self) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])

    def wait(self) -> int:
        """Its exit code."""
        assert self.process is not None
        return self.process.wait(DEADLINE)

    def kill(self) -> None:
        """SIGKILL, reaped."""
        assert self.process is not None
        self.process.kill()
        self.wait()

    def stop(self) -> None:
        """SIGTERM; it must end well."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.wait()
        self.process = None
        assert code == 0, self.tail()

    def close(self) -> None:
        """Remove every container, stop, and see that nothing is left in the folders of the run."""
        if self.process is None or self.process.poll() is not None:
            self.start()
        names = self.docker("ps", "-aq").stdout.split()
        if names:
            self.docker("rm", "-fv", *names)
        self.stop()
        shims = self.folder / "run" / "shims"
        assert not list(shims.iterdir()), "shims are left"
        assert not list((self.folder / "data").glob("snapshots*/active/*")), "snapshots are left"
        assert not list((self.folder / "data" / "containers").iterdir()), "containers' folders are left"

    def shims(self) -> set[str]:
        """The containers that have a shim: the names of its folders, but for spares."""
        return {path.name for path in (self.folder / "run" / "shims").iterdir() if not path.name.startswith("spare-")}

    def _call(self, program: str, words: tuple[str, ...], **options: Any) -> subprocess.CompletedProcess[str]:
        check = options.pop("check", True)
        options.setdefault("timeout", DEADLINE * 2)
        if "input" not in options:
            options.setdefault("stdin", subprocess.DEVNULL)
        env = {**self.env, **options.pop("env", {})}
        done = subprocess.run([program, *words], capture_output=True, text=True, env=env, check=False, **options)
        if check:
            assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.tail()}"
        return done

    def docker(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """The docker command line. Fails the test on a non-zero exit unless ``check=False``."""
        return self._call(DOCKER, words, **options)

    def dolium(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """dolium's own command line."""
        return self._call(DOLIUM, words, **options)

    def inspect(self, name: str) -> dict[str, Any]:
        """``docker inspect``, one object."""
        found: list[dict[str, Any]] = json.loads(self.docker("inspect", name).stdout)
        return found[0]

    def api(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """A bare HTTP request: (status, body)."""
        data = b"" if body is None else json.dumps(body).encode()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(DEADLINE)
            sock.connect(self.socket)
            sock.sendall(f"{method} {path} HTTP/1.1\r\nHost: d\r\nConnection: close\r\nContent-Type: application/json\r\n"
                         f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
            answer = b""
            while chunk := sock.recv(65536):
                answer += chunk
        head, _, rest = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), rest

    def output(self, *words: str) -> bytes:
        """What the docker command line writes, as it is."""
        return subprocess.run([DOCKER, *words], env=self.env, stdin=subprocess.DEVNULL, capture_output=True, check=True).stdout

    def import_base(self, name: str = "base:1", *changes: str) -> None:
        """Make the base image."""
        path = self.folder / "base.tar"
        if not path.exists():
            path.write_bytes(base_tar())
        words = [word for change in changes for word in ("-c", change)]
        self.docker("import", *words, str(path), name)
