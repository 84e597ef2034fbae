"""Without rights over the host: root of a user namespace, and dolium-runtime inside of dolium-runtime, three deep."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bundles import CGROUPS, FRONT, Bundle, Runtime, bundle, needs, runtime, until

from dolium.linux.capabilities import NAMES

__all__ = ["bundle", "runtime"]
CHECKOUT = Path(__file__).resolve().parents[2]
pytestmark = needs
USER = 4321


def readable(path: Path) -> bool:
    """May anybody go there? The user of these tests is nobody in particular."""
    return all(folder.stat().st_mode & 1 for folder in (path, *path.parents))


AS_USER = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups")


def userns(tmp_path: Path, *words: str, code: int | None = 0, deadline: float = 60) -> subprocess.CompletedProcess[str]:
    """A command line of the runtime, by an ordinary user who is root in the namespace that the test's holder has made."""
    holder = (tmp_path / "holder").read_text()
    command = [*AS_USER, "nsenter", "--user", "--preserve-credentials", f"--target={holder}", FRONT, *words]
    env = {"PATH": os.environ["PATH"], "USER": "somebody", "XDG_RUNTIME_DIR": str(tmp_path / "run"), "DOLIUM_WARM": "off"}
    with open(tmp_path / "out", "w+") as out, open(tmp_path / "err", "w+") as err:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=env, cwd=tmp_path / "bundle", check=False,
                              timeout=deadline)
        out.seek(0)
        err.seek(0)
        result = subprocess.CompletedProcess(command, done.returncode, out.read(), err.read())
    assert code is None or result.returncode == code, result
    return result


@pytest.fixture
def own(bundle: Bundle, tmp_path: Path) -> Iterator[Bundle]:
    """A bundle of that user's own, from `spec --rootless`."""
    if not readable(CHECKOUT / "src/dolium/_native"):
        pytest.skip("needs a checkout that other users may read")
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(folder.stat().st_mode | 0o711)
    (tmp_path / "run").mkdir()
    for path in (tmp_path / "run", *bundle.path.rglob("*"), bundle.path):
        os.chown(path, USER, USER, follow_symlinks=False)
    holder = subprocess.Popen([*AS_USER, "unshare", "-Ur", "sleep", "1000"])
    until(lambda: Path(f"/proc/{holder.pid}/uid_map").read_text().split()[2:] == ["1"], "it has a namespace of its own")
    (tmp_path / "holder").write_text(str(holder.pid))
    userns(tmp_path, "spec", "--rootless")
    bundle.config = json.loads((bundle.path / "config.json").read_text())
    bundle.process["terminal"] = False
    bundle.config["root"]["readonly"] = False
    yield bundle
    holder.kill()
    holder.wait()


def test_the_life_of_a_container_of_a_user_namespace(own: Bundle, tmp_path: Path) -> None:
    own.process["args"] = ["sh", "-c", "id -u; cat /proc/self/uid_map; hostname; exit 7"]
    own.write()
    assert userns(tmp_path, "run", "c", code=7).stdout.split() == ["0", "0", "0", "1", "dolium"]
    own.sh("exec sleep 1000").write()
    userns(tmp_path, "run", "-d", "c")
    try:
        state = json.loads(userns(tmp_path, "state", "c").stdout)
        assert state["status"] == "running" and os.listdir(tmp_path / "run/dolium-runtime") == ["c"]
        # in the groups of its caller: it may make none
        assert Path(f"/proc/{state['pid']}/cgroup").read_text() == Path("/proc/self/cgroup").read_text()
        assert os.stat(f"/proc/{state['pid']}").st_uid == USER
        assert userns(tmp_path, "exec", "c", "id", "-u").stdout == "0\n"
        for words, why in ((["pause", "c"], "no cgroup of this container can be frozen"),
                           (["update", "--pids-limit", "5", "c"], "has no cgroup of its own")):
            result = userns(tmp_path, *words, code=1)
            assert why in result.stderr and result.stderr.count("\n") == 1
        userns(tmp_path, "kill", "c", "KILL")
        until(lambda: json.loads(userns(tmp_path, "state", "c").stdout)["status"] == "stopped", "it ends")
    finally:
        userns(tmp_path, "delete", "--force", "c")
    assert os.listdir(tmp_path / "run/dolium-runtime") == []


def test_a_limit_without_a_group_is_refused(own: Bundle, tmp_path: Path) -> None:
    own.linux["resources"] = {"pids": {"limit": 5}}
    own.write()
    result = userns(tmp_path, "run", "c", code=1)
    assert "linux.resources: pids.max cannot be set" in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "run/dolium-runtime").exists() or os.listdir(tmp_path / "run/dolium-runtime") == []


def test_a_delegated_group_is_used(own: Bundle, tmp_path: Path) -> None:
    given = Path(f"{CGROUPS}/pids/dolium-delegated-{os.getpid()}")
    if not os.path.isdir(f"{CGROUPS}/pids"):
        pytest.skip("needs the v1 pids controller")
    given.mkdir()
    try:
        os.chown(given, USER, USER)
        own.linux["cgroupsPath"], own.linux["resources"] = f"/{given.name}/c", {"pids": {"limit": 7}}
        own.sh("exec sleep 1000").write()
        userns(tmp_path, "run", "-d", "c")
        pid = json.loads(userns(tmp_path, "state", "c").stdout)["pid"]
        assert (given / "c/pids.max").read_text() == "7\n" and (given / "c/cgroup.procs").read_text() == f"{pid}\n"
        userns(tmp_path, "delete", "--force", "c")
        assert not (given / "c").exists()
    finally:
        given.rmdir()


# -- dolium in dolium --

def privileged(path: Path, place: str, *args: str) -> Bundle:
    """A bundle that sees this machine's programs, has all rights, and is at ``place`` for who runs it."""
    made = Bundle(path, *args)
    for name in ("bin", "sbin", "lib", "lib64"):
        target = made.rootfs / name
        if name == "bin":
            for file in target.iterdir():
                file.unlink()
            target.rmdir()
        target.symlink_to(f"usr/{name}")
    rights = int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapPrm")).split()[1], 16)
    made.capabilities(*(name for number, name in enumerate(NAMES) if rights >> number & 1))
    made.process["noNewPrivileges"] = False
    made.process["env"] = ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "DOLIUM_WARM=off"]
    made.process["rlimits"] = []
    made.linux["maskedPaths"], made.linux["readonlyPaths"] = [], []
    made.linux["resources"] = {"pids": {"limit": 50}}
    for mount in made.config["mounts"]:
        if mount["destination"] in ("/sys", "/sys/fs/cgroup"):
            mount["options"].remove("ro")
    for source in dict.fromkeys(("/usr", sys.base_prefix, str(CHECKOUT))):
        made.mount(source, "bind", source, "rbind", "ro")
    made.mount("/nest", "bind", place, "rbind", "rw")
    made.mount("/run", "tmpfs", "tmpfs", "mode=755")
    return made


@pytest.mark.skipif(not os.path.isdir(f"{CGROUPS}/pids"), reason="needs cgroup v1 controllers: v2 hands none down from a group "
                    "that holds processes, as that of a container's init does")
def test_three_deep(runtime: Runtime, tmp_path: Path) -> None:
    """Each level has limits of its own in groups below those of the level above, and nothing of one is left in another."""
    nest = tmp_path / "nest"
    script = "cat /proc/self/cgroup | grep -c :/$; echo $$; cat /sys/fs/cgroup/pids/pids.max /sys/fs/cgroup/pids.max 2> /dev/null; true"
    for level in (3, 2, 1):
        runs = ["/bin/sh", "-c", f"{FRONT} run --bundle /nest/{level + 1} c{level + 1} && find /sys/fs/cgroup -name c{level + 1}; "
                "ls -A /run/dolium-runtime"]
        made = privileged(nest / str(level), str(nest) if level == 1 else "/nest", *(["/bin/sh", "-c", script] if level == 3 else runs))
        made.linux["cgroupsPath"] = f"/dolium/c{level}"
        made.linux["resources"]["pids"]["limit"] = 50 - level
        made.write()
    result = runtime("run", "--bundle", str(nest / "1"), "c1")
    hierarchies = len(Path("/proc/self/cgroup").read_text().splitlines())
    assert result.out.split() == [str(hierarchies), "1", "47"], result
    assert runtime.left() == [] and not any(Path(CGROUPS).rglob("c1"))
