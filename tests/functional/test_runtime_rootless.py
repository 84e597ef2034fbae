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


# -- an ordinary user --

class Ordinary:
    """A user with no rights at all: on the host (``plain``); with ranges in /etc/subuid and a name, in a mount namespace of
    its own (``ranges``); or in a user namespace that holds many users (``inside``)."""

    def __init__(self, way: str, tmp_path: Path) -> None:
        self.base, self.way = tmp_path, way
        self.user = 100000 + USER if way == "inside" else USER  # on the host
        self.holder: subprocess.Popen[str] | None = None
        if way == "ranges":
            for name, line in (("passwd", f"somebody:x:{USER}:{USER}::/:/bin/sh"), ("subuid", "somebody:200000:65536"),
                               ("subgid", "somebody:300000:65536")):
                old = Path(f"/etc/{name}").read_text() if name == "passwd" else ""
                (tmp_path / name).write_text(f"{old}{line}\n")
        if way == "inside":
            self.holder = subprocess.Popen(["unshare", "--user", "sh", "-c", "echo; exec sleep 1000"], stdout=subprocess.PIPE, text=True)
            assert self.holder.stdout and self.holder.stdout.readline() == "\n"
            for kind in ("uid", "gid"):
                Path(f"/proc/{self.holder.pid}/{kind}_map").write_text("0 100000 65536\n")

    def command(self, *words: str) -> list[str]:
        """The words as that user's."""
        if self.way == "inside":
            assert self.holder
            words = ("nsenter", "--user", f"--target={self.holder.pid}", *AS_USER, *words)
        elif self.way == "ranges":
            binds = "".join(f"mount --bind {self.base}/{name} /etc/{name}; " for name in ("passwd", "subuid", "subgid"))
            words = ("unshare", "--mount", "sh", "-ec", f'touch /etc/subuid /etc/subgid; {binds}exec "$@"', "sh", *AS_USER, *words)
        else:
            words = (*AS_USER, *words)
        return list(words)

    def __call__(self, *words: str, code: int = 0, program: str = FRONT) -> subprocess.CompletedProcess[str]:
        env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "XDG_RUNTIME_DIR": str(self.base / "run"), "DOLIUM_WARM": "off"}
        with open(self.base / "out", "w+") as out, open(self.base / "err", "w+") as err:
            done = subprocess.run(self.command(program, *words), stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=env,
                                  cwd=self.base / "bundle", check=False, timeout=60)
            out.seek(0)
            err.seek(0)
            result = subprocess.CompletedProcess(words, done.returncode, out.read(), err.read())
        assert result.returncode == code, result
        return result

    def bundle(self, made: Bundle) -> Bundle:
        """The bundle as that user's own, from `spec --rootless`."""
        for folder in (self.base, *self.base.parents[:2]):
            folder.chmod(folder.stat().st_mode | 0o711)
        (self.base / "run").mkdir()
        for path in (self.base / "run", *made.path.rglob("*"), made.path):
            os.chown(path, self.user, self.user, follow_symlinks=False)
        self("spec", "--rootless")
        made.config = json.loads((made.path / "config.json").read_text())
        made.process["terminal"] = made.config["root"]["readonly"] = False
        if self.way == "ranges":
            made.linux["uidMappings"].append({"containerID": 1, "hostID": 200000, "size": 65536})
            made.linux["gidMappings"].append({"containerID": 1, "hostID": 300000, "size": 65536})
        return made


@pytest.fixture(params=["plain", "ranges", "inside"])
def ordinary(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ordinary]:
    if not readable(CHECKOUT / "src/dolium/_native"):
        pytest.skip("needs a checkout that other users may read")
    if request.param == "ranges" and not os.path.exists("/usr/bin/newuidmap"):
        pytest.skip("needs the package uidmap")
    made = Ordinary(request.param, tmp_path)
    yield made
    if made.holder and made.holder.stdout:
        made.holder.kill()
        made.holder.wait()
        made.holder.stdout.close()


def test_the_life_of_an_ordinary_users_container(ordinary: Ordinary, bundle: Bundle) -> None:
    ordinary.bundle(bundle).process["args"] = ["sh", "-c", "id -u; cat /proc/self/uid_map /proc/self/setgroups; exit 7"]
    bundle.write()
    maps = {"plain": [f"0 {USER} 1", "deny"], "ranges": [f"0 {USER} 1", "1 200000 65536", "allow"], "inside": [f"0 {USER} 1", "deny"]}
    said = [" ".join(line.split()) for line in ordinary("run", "c", code=7).stdout.splitlines()]
    assert said == ["0", *maps[ordinary.way]]
    if ordinary.way == "ranges":
        bundle.process["user"] = {"uid": 1000, "gid": 1000, "additionalGids": [5]}
        bundle.process["args"] = ["sh", "-c", "id -u; id -G; touch /tmp/mine"]
        bundle.write()
        assert ordinary("run", "c").stdout.split() == ["1000", "1000", "5"]
        assert os.stat(bundle.rootfs / "tmp/mine").st_uid == 200999
        bundle.process["user"] = {"uid": 0, "gid": 0}
    bundle.sh("exec sleep 1000").write()
    ordinary("create", "c")
    try:
        pid = json.loads(ordinary("state", "c").stdout)["pid"]
        # the maps are written: what was the user's for that is root's again, in the waiting init as everywhere
        assert os.stat(f"/proc/{pid}/status").st_uid in (0, 100000)
        assert "Permission denied" in ordinary(f"/proc/{pid}/environ", program="/bin/cat", code=1).stderr
        ordinary("start", "c")
        assert ordinary("exec", "c", "id", "-u").stdout == "0\n"
        assert f"{pid}" in ordinary("list").stdout
        ordinary("kill", "c", "KILL")
        until(lambda: json.loads(ordinary("state", "c").stdout)["status"] == "stopped", "it ends")
    finally:
        ordinary("delete", "--force", "c")
    assert os.listdir(ordinary.base / "run/dolium-runtime") == []


def test_maps_that_are_not_the_users_are_refused(ordinary: Ordinary, bundle: Bundle) -> None:
    """By the kernel, or by newuidmap: the message is one line that names the field, and nothing is left."""
    made = ordinary.bundle(bundle)
    made.linux["uidMappings"] = [{"containerID": 0, "hostID": 0, "size": 10}]
    made.write()
    result = ordinary("run", "c", code=1)
    assert "linux.uidMappings" in result.stderr and result.stderr.count("\n") == 1
    assert os.listdir(ordinary.base / "run/dolium-runtime") == []


def test_an_ordinary_users_three_deep(tmp_path: Path, bundle: Bundle) -> None:
    """Each level is root of a namespace that the level above made; on the host it stays one user."""
    if not readable(CHECKOUT / "src/dolium/_native"):
        pytest.skip("needs a checkout that other users may read")
    user = Ordinary("plain", tmp_path)
    user.bundle(bundle)
    nest = bundle.path / "nest"
    for level in (3, 2, 1):
        made = privileged(nest / str(level), str(nest) if level == 1 else "/nest")
        made.config["linux"] = {**json.loads(json.dumps(bundle.linux)), "maskedPaths": [], "readonlyPaths": []}
        if level > 1:  # root of its namespace, with the rights that it has there
            made.linux["uidMappings"][0]["hostID"] = made.linux["gidMappings"][0]["hostID"] = 0
        for mount in made.config["mounts"]:
            if mount["destination"] == "/dev/pts":
                mount["options"].remove("gid=5")
            elif mount["destination"] == "/sys":
                mount |= {"type": "bind", "source": "/sys", "options": ["rbind", "ro"]}
        gone = {"/sys/fs/cgroup", *(() if readable(Path(sys.base_prefix)) else (sys.base_prefix,))}  # then Debian's Python runs
        made.config["mounts"] = [mount for mount in made.config["mounts"] if mount["destination"] not in gone]
        made.process["args"] = (["/bin/sh", "-c", "id -u; cat /proc/self/uid_map; echo $$"] if level == 3 else
                                [FRONT, "run", "--bundle", f"/nest/{level + 1}", f"c{level + 1}"])
        made.write()
    for path in (nest, *nest.rglob("*")):
        os.chown(path, USER, USER, follow_symlinks=False)
    result = user("run", "--bundle", str(nest / "1"), "c1")
    assert result.stdout.split() == ["0", "0", "0", "1", "1"], result
    assert os.listdir(tmp_path / "run/dolium-runtime") == []


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
