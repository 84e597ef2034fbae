"""The systemd units: what `packaging/install_units.py` writes, and the daemon under it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from bundles import CGROUPS, needs
from daemon import Daemon, eventually

pytestmark = needs
SCRIPT = Path(__file__).parents[2] / "packaging" / "install_units.py"
BOOTED = os.path.isdir("/run/systemd/system") and os.path.exists(f"{CGROUPS}/cgroup.controllers")


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install_units", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def program_of(unit: Path) -> list[str]:
    found = re.search(r"^ExecStart=(.*)$", unit.read_text(), re.MULTILINE)
    assert found
    return [word.replace("%%", "%") for word in shlex.split(found[1])]


def verify(*units: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", "verify", *map(str, units)], capture_output=True, text=True, check=False, timeout=30)


def test_the_unit_names_the_daemon_of_this_environment(tmp_path: Path) -> None:
    """It starts, by the socket it is passed, where no PATH leads to it."""
    subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], check=True, capture_output=True, env={"PATH": "/usr/bin"})
    service, socket = tmp_path / "doliumd.service", tmp_path / "doliumd.socket"
    words = program_of(service)
    assert os.path.isabs(words[0]) and os.access(words[0], os.X_OK)
    done = verify(service, socket)
    assert (done.returncode, done.stderr) == (0, "")
    # verify looks: a program that is not there is named
    service.write_text(service.read_text().replace(words[0], "/nonexistent/doliumd"))
    assert "/nonexistent/doliumd is not executable" in verify(service).stderr

    daemon = Daemon(tmp_path)
    folders = ["--data-root", str(tmp_path / "data"), "--run-root", str(tmp_path / "run"), "--etc-root", str(tmp_path / "etc")]
    with open(daemon.log, "wb") as log:
        daemon.process = subprocess.Popen(["systemd-socket-activate", "-l", daemon.socket, *words, *folders], stdin=subprocess.DEVNULL,
                                          stdout=log, stderr=log, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
    try:
        eventually(lambda: os.path.exists(daemon.socket), "the socket is there")
        daemon.docker("version")
    finally:
        daemon.stop()


def test_programs_with_odd_names(tmp_path: Path) -> None:
    units = script()
    for name in ("a b", "100%h", "$x", "a;b", "ü"):
        program = tmp_path / name / "doliumd"
        program.parent.mkdir()
        program.symlink_to("/bin/true")
        service, _ = units.install(tmp_path, str(program))
        assert program_of(service)[0] == str(program)
        assert verify(service).returncode == 0, name
    before = service.read_text()
    for name in ('"', "'", "\\", "\n"):
        with pytest.raises(ValueError, match="systemd takes no program"):
            units.install(tmp_path, f"/x{name}/doliumd")
    assert service.read_text() == before
    assert sorted(path.name for path in tmp_path.glob("*doliumd*")) == ["doliumd.service", "doliumd.socket"]


@pytest.fixture
def unit(tmp_path: Path) -> Iterator[Daemon]:
    """The units in /run, with folders of the test's own, started by their socket."""
    folder, daemon = Path("/run/systemd/system"), Daemon(tmp_path)
    program = tmp_path / "doliumd"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -I -m dolium.daemon "$@" --data-root {tmp_path}/data --run-root {tmp_path}/run '
                       f"--etc-root {tmp_path}/etc\n")
    program.chmod(0o755)
    service, socket = script().install(folder, str(program))
    socket.write_text(socket.read_text().replace("/run/dolium/dolium.sock", daemon.socket))
    subprocess.run(["systemctl", "daemon-reload"], check=True, timeout=60)
    try:
        subprocess.run(["systemctl", "start", "doliumd.socket"], check=True, timeout=60)
        yield daemon
        daemon.dolium("rm", "-f", *daemon.dolium("ps", "-aq").stdout.split())
    finally:
        subprocess.run(["systemctl", "stop", "doliumd.socket", "doliumd.service"], check=False, timeout=60)
        for path in (service, socket):
            path.unlink()
        subprocess.run(["systemctl", "daemon-reload"], check=True, timeout=60)


@pytest.mark.skipif(not BOOTED, reason="needs systemd as init and cgroup v2 (the VM of make test-vm has them)")
@pytest.mark.skipif(any(os.path.exists(f"/{place}/systemd/system/doliumd.service") for place in ("etc", "usr/lib")),
                    reason="the machine has units of that name: they are not touched")
def test_a_container_outlives_the_service(unit: Daemon) -> None:
    def init() -> int:
        return int(json.loads(unit.dolium("inspect", "stays").stdout)[0]["State"]["Pid"])

    def of(name: str) -> str:
        return subprocess.run(["systemctl", "show", "--value", f"-p{name}", "doliumd.service"], capture_output=True, text=True,
                              check=True, timeout=60).stdout.strip()

    unit.dolium("run", "-d", "--name", "stays", "--network", "none", "--rootfs", "/:O", "sleep", "600")
    pid, first = init(), of("MainPID")
    assert (of("ActiveState"), of("Delegate"), of("KillMode")) == ("active", "yes", "process")
    subprocess.run(["systemctl", "restart", "doliumd.service"], check=True, timeout=60)
    assert of("MainPID") not in ("0", first) and os.path.exists(f"/proc/{pid}")
    unit.dolium("daemon", "stop")
    eventually(lambda: of("ActiveState") == "inactive", "a stop that is meant is kept")
    assert init() == pid  # the next request starts it, by the socket
