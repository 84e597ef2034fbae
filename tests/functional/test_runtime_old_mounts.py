"""The fallbacks for kernels without the new mount API: the same plan with the flag gives the same mounts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from bundles import Bundle, Runtime, bundle, needs, runtime

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "native"))
from building import build

from dolium.isolation.process import HostFacts
from dolium.linux import syscalls
from dolium.linux.cgroup import tree
from dolium.runtime import plan as P
from dolium.runtime.cgroups import layout, remove
from dolium.runtime.compile import Launch, compile_container

__all__ = ["bundle", "runtime"]
pytestmark = needs

EXECUTOR = [f"executor/{name}.c" for name in ("plan", "fields", "launch", "paths", "ops_parent", "ops_mount", "ops_process")]


class ListingFacts(HostFacts):
    """With the listing that the layout needs."""

    def _get(self, query: str) -> tuple[int, list[bytes]]:
        kind, _, path = query.partition(":")
        if kind == "list":
            return 0, [entry.name.encode() for entry in Path(path).iterdir()]
        return super()._get(query)


@pytest.fixture(scope="module")
def run_plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("run_plan"), "run_plan", EXECUTOR, sanitize=False)


def execute(run_plan: Path, bundle: Bundle, flags: int) -> str:
    facts = ListingFacts()
    where: tree.Layout = layout(facts)
    plan = compile_container(bundle.config, facts, Launch("old", str(bundle.path), where))
    remove(plan, P.AFTER_EXIT, where.paths(bundle.linux["cgroupsPath"]))
    plan.ops.sort(key=lambda op: op.name == "clone")
    plan.flags = flags
    path = bundle.path / "plan"
    path.write_bytes(plan.encode())
    done = subprocess.run([str(run_plan), str(path)], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
                          check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def mounts(text: str) -> list[str]:
    """Target, options, type and the file system's options. Not whether the file system itself is ro: mount(2) sets that
    with the mount's own flag, which is what a container sees."""
    found = []
    for line in text.splitlines():
        fields = line.split()
        dash = fields.index("-")
        inner = re.sub(r"^r[ow],?", "", fields[dash + 3])
        found.append(" ".join([fields[4], fields[5], fields[dash + 1], inner]))
    return sorted(found)


def test_both_ways_give_the_same_mounts(run_plan: Path, bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "volume").mkdir()
    bundle.mount("/data", "bind", str(tmp_path / "volume"), "bind", "ro")
    bundle.mount("/scratch", "tmpfs", "tmpfs", "nosuid", "noexec", "size=64k", "mode=700")
    bundle.mount("/noatime", "tmpfs", "tmpfs", "noatime", "ro", "nosymfollow")
    bundle.mount("/etc", "tmpfs", "tmpfs", "tmpcopyup")
    (bundle.rootfs / "secret").mkdir()
    (bundle.rootfs / "secret/file").touch()
    bundle.linux["maskedPaths"] += ["/secret"]
    bundle.sh("cat /proc/self/mountinfo")
    new, old = (mounts(execute(run_plan, bundle, flags)) for flags in (0, P.FLAG_OLD_MOUNT_API))
    assert len(new) > 15 and any(line.startswith("/scratch") for line in new)
    assert any(line.startswith("/noatime") and "nosymfollow" in line for line in new)
    assert old == new


def test_a_link_out_of_the_root_stays_inside(run_plan: Path, bundle: Bundle) -> None:
    (bundle.rootfs / "link").symlink_to("../../../../etc")
    bundle.mount("/link/old-api", "tmpfs", "marker", "size=64k").sh("grep marker /proc/mounts | cut -d' ' -f2")
    assert execute(run_plan, bundle, P.FLAG_OLD_MOUNT_API) == "/etc/old-api\n"
    assert not Path("/etc/old-api").exists()


def test_a_refused_mount_is_told(run_plan: Path, bundle: Bundle) -> None:
    bundle.mount("/x", "nosuchfs", "x")
    with pytest.raises(AssertionError, match=r"mount nosuchfs on /x: ENODEV.*does not know this file system type"):
        execute(run_plan, bundle, P.FLAG_OLD_MOUNT_API)
    assert bundle.groups() == []


def test_options_longer_than_the_new_calls_take(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    """podman's volumes with :O are such: an overlay's folders, each a path. More than mount(2) reads is refused."""
    folders = [tmp_path / (letter * 250) / letter for letter in "luw"]
    for folder in folders:
        folder.mkdir(parents=True)
    (folders[0] / "below").touch()
    options = [f"{key}={folder}" for key, folder in zip(("lowerdir", "upperdir", "workdir"), folders, strict=True)]
    assert all(len(option) > 255 for option in options)
    bundle.mount("/data", "overlay", "overlay", *options)
    assert runtime.run(bundle.sh("ls /data; touch /data/new")).out == "below\n" and (folders[1] / "new").exists()
    bundle.config["mounts"][-1]["options"][0] = ":".join([options[0], *[str(folders[0])] * 20])
    assert "mount overlay on /data: E2BIG" in runtime.run(bundle, code=1).err and runtime.left() == []


@pytest.mark.parametrize("way", [syscalls.mount_overlay, syscalls._mount_overlay_by_path])
def test_the_engines_overlay(way: Callable[[list[str], str, str], int], tmp_path: Path) -> None:
    lowers = [tmp_path / f"{number}:a,b\\" for number in range(150)]
    for number, folder in enumerate(lowers):
        folder.mkdir()
        (folder / f"f{number}").touch()
        (folder / "top").write_text(str(number))
    for name in ("upper", "work"):
        (tmp_path / name).mkdir()
    before = Path("/proc/self/mountinfo").read_text()
    fd = way([str(folder) for folder in lowers], str(tmp_path / "upper"), str(tmp_path / "work"))
    try:
        at = f"/proc/self/fd/{fd}"
        assert len(os.listdir(at)) == 151 and Path(at, "top").read_text() == "0"
        Path(at, "new").write_text("x")
        assert (tmp_path / "upper/new").read_text() == "x" and Path("/proc/self/mountinfo").read_text() == before
    finally:
        os.close(fd)


def test_more_layers_than_an_old_kernel_takes_are_told(tmp_path: Path) -> None:
    """mount(2) reads one page and would leave out the rest."""
    lowers = [tmp_path / str(number) for number in range(300)]
    for folder in lowers:
        folder.mkdir()
    with pytest.raises(OSError, match="300 layers"):
        syscalls._mount_overlay_by_path([str(folder) for folder in lowers], "", "")


def test_an_idmap_without_its_user_namespace_is_refused(run_plan: Path, tmp_path: Path) -> None:
    plan = P.Plan()
    plan.add(P.PARENT_BEFORE_CLONE, "open_tree", "open", 0, str(tmp_path), 0, 0)
    plan.add(P.PARENT_BEFORE_CLONE, "mount_attr", "map ids", 0, 0, 0, 0, 0, 7)
    (tmp_path / "plan").write_bytes(plan.encode())
    done = subprocess.run([str(run_plan), str(tmp_path / "plan")], capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stderr) == (98, "map ids: EINVAL: Invalid argument\n")
