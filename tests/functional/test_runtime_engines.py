"""Podman and containerd with dolium-runtime in the place of runc: their own set-up, in folders of the test's own."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from bundles import FRONT, fill_rootfs, needs, until

pytestmark = [*needs, pytest.mark.slow]


def need(*programs: str) -> None:
    for name in programs:
        if shutil.which(name) is None:
            pytest.skip(f"needs the program {name}")


@pytest.fixture(scope="module")
def rootfs_tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    root = fill_rootfs(folder / "rootfs")
    with tarfile.open(folder / "rootfs.tar", "w") as archive:
        archive.add(root, ".")
    return folder / "rootfs.tar"


class Podman:
    """podman with storage, run folder and network configuration of its own."""

    LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024", "--network", "none")

    def __init__(self, base: Path) -> None:
        self.words = ["podman", "--root", str(base / "root"), "--runroot", str(base / "run"), "--tmpdir", str(base / "tmp"),
                      "--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--events-backend", "file",
                      "--runtime", FRONT]

    def __call__(self, *words: str, code: int = 0, stdin: str | None = None) -> str:
        done = subprocess.run([*self.words, *words], capture_output=True, text=True, timeout=100, check=False,
                              **({"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}))
        assert done.returncode == code, (words, done.stdout, done.stderr)
        return done.stdout

    def run(self, *words: str, code: int = 0, stdin: str | None = None) -> str:
        return self("run", *self.LIMITS, *words, code=code, stdin=stdin)


@pytest.fixture(scope="module")
def podman(rootfs_tar: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    need("podman", "conmon")
    base = tmp_path_factory.mktemp("podman")
    one = Podman(base)
    one("import", str(rootfs_tar), "busybox")
    yield one
    one("rm", "--all", "--force", "--time", "0")
    subprocess.run(["umount", "-l", str(base / "root/vfs")], check=False, stderr=subprocess.DEVNULL)
    subprocess.run(["umount", "-l", str(base / "root")], check=False, stderr=subprocess.DEVNULL)


PODMAN_LEAVES = pytest.mark.leaves("cgroups")  # podman keeps /libpod_parent


@PODMAN_LEAVES
def test_podman_run(podman: Podman) -> None:
    assert podman.run("--rm", "busybox", "sh", "-c", "echo out; hostname").splitlines()[0] == "out"
    podman.run("--rm", "busybox", "sh", "-c", "exit 42", code=42)
    assert podman.run("--rm", "-i", "busybox", "cat", stdin="hello") == "hello"
    podman.run("--rm", "busybox", "nosuch", code=127)
    podman.run("--rm", "busybox", "/etc", code=126)
    assert podman.run("--rm", "--user", "1000:1000", "busybox", "id", "-u") == "1000\n"


@PODMAN_LEAVES
def test_podman_limits_and_mounts(podman: Podman, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("host\n")
    out = podman.run("--rm", "--memory", "64m", "--pids-limit", "50", "--read-only", "-v", f"{tmp_path}:/data:ro",
                     "--tmpfs", "/scratch", "--cap-drop", "all", "--hostname", "jar", "busybox", "sh", "-c",
                     "cat /data/file; hostname; touch /x 2>/dev/null || echo ro; touch /scratch/x && echo tmpfs;"
                     "grep CapEff /proc/self/status | cut -f2; cat /sys/fs/cgroup/memory/memory.limit_in_bytes")
    assert out.split() == ["host", "jar", "ro", "tmpfs", "0" * 16, str(64 << 20)]


@PODMAN_LEAVES
def test_podman_detached_life(podman: Podman) -> None:
    identity = podman.run("-d", "--name", "life", "busybox", "sh", "-c",
                          "trap 'exit 3' TERM; echo up; while :; do sleep 0.05; done").strip()
    until(lambda: podman("logs", "life") == "up\n", "it is up")
    assert podman("exec", "life", "sh", "-c", "echo in; hostname") == f"in\n{identity[:12]}\n"
    podman("exec", "life", "sh", "-c", "exit 5", code=5)
    assert "sleep" in podman("top", "life", "-eo", "args") or "sh" in podman("top", "life", "-eo", "args")
    podman("pause", "life")
    assert json.loads(podman("inspect", "life"))[0]["State"]["Status"] == "paused"
    podman("unpause", "life")
    podman("stop", "--time", "10", "life")
    state = json.loads(podman("inspect", "life"))[0]["State"]
    assert (state["Status"], state["ExitCode"]) == ("exited", 3)
    podman("start", "life")
    podman("kill", "life")
    until(lambda: json.loads(podman("inspect", "life"))[0]["State"]["Status"] == "exited", "it is killed")
    podman("rm", "life")


@PODMAN_LEAVES
def test_podman_terminal(podman: Podman) -> None:
    assert podman.run("--rm", "-t", "busybox", "sh", "-c", "tty; test -t 2 && echo err") == "/dev/pts/0\nerr\n"


@PODMAN_LEAVES
def test_podman_user_namespace(podman: Podman) -> None:
    out = podman.run("--rm", "--uidmap", "0:200000:1000", "--gidmap", "0:200000:1000", "busybox", "sh", "-c",
                     "id -u; cat /proc/self/uid_map")
    assert out.split() == ["0", "0", "200000", "1000"]


class Containerd:
    """A containerd with folders and an address of its own; only its runc shim is used."""

    def __init__(self, base: Path) -> None:
        self.base = base
        (base / "config.toml").write_text(
            f'version = 2\nroot = "{base}/root"\nstate = "{base}/state"\n'
            'disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.devmapper",\n'
            '  "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.btrfs",\n'
            '  "io.containerd.snapshotter.v1.aufs",\n'
            '  "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]\n'
            f'[grpc]\n  address = "{base}/sock"\n[plugins."io.containerd.internal.v1.opt"]\n  path = "{base}/opt"\n')
        with open(base / "log", "w") as log:
            self.process = subprocess.Popen(["containerd", "--config", str(base / "config.toml"), "--log-level", "error"],
                                            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log)
        until(lambda: self.raw("version").returncode == 0, "containerd answers")

    def raw(self, *words: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["ctr", "--address", str(self.base / "sock"), *words], capture_output=True, text=True,
                              timeout=100, check=False,
                              **({"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}))

    def __call__(self, *words: str, code: int = 0, stdin: str | None = None) -> str:
        done = self.raw(*words, stdin=stdin)
        assert done.returncode == code, (words, done.stdout, done.stderr, (self.base / "log").read_text()[-2000:])
        return done.stdout

    def run(self, *words: str, code: int = 0) -> str:
        return self("run", "--runc-binary", FRONT, *words, code=code)

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
            if f" {self.base}/" in line:
                subprocess.run(["umount", "-l", line.split()[4]], check=False)


@pytest.fixture(scope="module")
def containerd(rootfs_tar: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containerd]:
    need("containerd", "ctr", "umoci", "skopeo")
    base = tmp_path_factory.mktemp("containerd")
    layout = base / "layout"
    for words in (["umoci", "init", "--layout", str(layout)], ["umoci", "new", "--image", f"{layout}:busybox"],
                  ["umoci", "raw", "add-layer", "--image", f"{layout}:busybox", str(rootfs_tar)],
                  ["skopeo", "copy", "--insecure-policy", "-q", f"oci:{layout}:busybox",
                   f"docker-archive:{base}/busybox.tar:docker.io/library/busybox:test"]):
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, timeout=100)
    one = Containerd(base)
    try:
        one("image", "import", str(base / "busybox.tar"))
        yield one
    finally:
        for name in one.raw("container", "ls", "-q").stdout.split():  # of a test that failed
            one.raw("task", "delete", "--force", name)
            one.raw("container", "delete", name)
        one.close()


IMAGE = "docker.io/library/busybox:test"


@pytest.mark.leaves("run")
def test_containerd_run(containerd: Containerd) -> None:
    assert containerd.run("--rm", IMAGE, "one", "/bin/sh", "-c", "echo out; id -u") == "out\n0\n"
    containerd.run("--rm", IMAGE, "two", "/bin/sh", "-c", "exit 42", code=42)
    done = containerd.raw("run", "--runc-binary", FRONT, "--rm", IMAGE, "three", "/bin/nosuch")
    assert done.returncode != 0 and "no such file or directory" in done.stderr


@pytest.mark.leaves("run")
def test_containerd_detached_life(containerd: Containerd) -> None:
    containerd.run("--detach", IMAGE, "life", "/bin/sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.05; done")
    assert "RUNNING" in containerd("task", "ls")
    assert containerd("task", "exec", "--exec-id", "e1", "life", "/bin/sh", "-c", "echo in") == "in\n"
    containerd("task", "exec", "--exec-id", "e2", "life", "/bin/sh", "-c", "exit 7", code=7)
    containerd("task", "pause", "life")
    assert "PAUSED" in containerd("task", "ls")
    containerd("task", "resume", "life")
    assert "PID" in containerd("task", "ps", "life")
    containerd("task", "kill", "--signal", "SIGTERM", "life")
    until(lambda: "STOPPED" in containerd("task", "ls"), "it has stopped")
    with contextlib.suppress(AssertionError):
        containerd("task", "delete", "life", code=3)
    containerd("container", "delete", "life")
    assert "life" not in containerd("container", "ls", "-q")


@pytest.mark.leaves("run")
def test_containerd_limits(containerd: Containerd) -> None:
    containerd.run("--detach", "--memory-limit", str(64 << 20), IMAGE, "limits", "/bin/sh", "-c", "sleep 1000")
    pid = next(line.split()[1] for line in containerd("task", "ls").splitlines() if line.startswith("limits"))
    groups = dict(line.split(":")[1:] for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines())
    if "memory" in groups:
        limit = Path(f"/sys/fs/cgroup/memory{groups['memory']}/memory.limit_in_bytes")
    else:
        limit = Path(f"/sys/fs/cgroup{groups['']}/memory.max")
    assert limit.read_text().strip() == str(64 << 20)
    containerd("task", "delete", "--force", "limits")
    containerd("container", "delete", "limits")
