"""Hooks: which run when, in whose namespaces, with what on standard input; a failing one undoes everything."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from bundles import Bundle, Runtime, alive, bundle, needs, runtime, until

__all__ = ["bundle", "runtime"]
pytestmark = needs

KINDS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
FAILING = ("prestart", "createRuntime", "createContainer", "startContainer")


def recording(bundle: Bundle) -> Path:
    """Every hook appends its kind, state, namespaces and root; the folder is the same file inside and outside."""
    folder = bundle.rootfs / "tmp"
    for kind in KINDS:
        # createContainer: the container's namespaces but the host's root; startContainer: after pivot_root
        where = "/tmp" if kind == "startContainer" else str(folder)
        script = (f"read -r state; printf '%s\\n' \"$state\" > {where}/{kind}.state; "
                  f"for n in mnt net pid; do readlink /proc/self/ns/$n; done > {where}/{kind}.ns; "
                  f"echo {kind} $1 $ONE >> {where}/order")
        bundle.hook(kind, "/bin/sh", "-c", script, "name", "argument", env=["ONE=1", "PATH=/bin:/usr/bin"])
    bundle.mount("/hooks", "bind", str(folder), "bind")
    return folder


def namespaces(pid: int | str) -> list[str]:
    return [os.readlink(f"/proc/{pid}/ns/{name}") for name in ("mnt", "net", "pid")]


def test_all_six_in_order_with_state_and_namespaces(runtime: Runtime, bundle: Bundle) -> None:
    folder = recording(bundle)
    bundle.config["annotations"] = {"a": "b"}
    bundle.sh("echo program >> /tmp/order; exec sleep 1000")

    def order() -> list[str]:
        return [line.split()[0] for line in (folder / "order").read_text().splitlines()]

    runtime.create(bundle)
    pid = runtime.state()["pid"]
    assert order() == list(KINDS[:3])
    assert {line.split(" ", 1)[1] for line in (folder / "order").read_text().splitlines()} == {"argument 1"}
    runtime("start", "c")
    until(lambda: "program" in order(), "the program runs")
    assert sorted(order()) == sorted([*KINDS[:5], "program"]) and order().index("startContainer") < order().index("program")
    inside, outside = namespaces(pid), namespaces("self")
    for kind in ("prestart", "createRuntime", "poststart"):
        assert (folder / f"{kind}.ns").read_text().split() == outside, kind
    for kind in ("createContainer", "startContainer"):
        assert (folder / f"{kind}.ns").read_text().split() == inside, kind
    runtime("kill", "c", "KILL")
    runtime.wait_status("stopped")
    runtime("delete", "c")
    assert order()[-1] == "poststop" and (folder / "poststop.ns").read_text().split() == outside

    def state(kind: str) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((folder / f"{kind}.state").read_text())
        assert (value["id"], value["bundle"], value["annotations"]) == ("c", str(bundle.path), {"a": "b"})
        return value

    statuses = {kind: state(kind)["status"] for kind in KINDS}
    assert statuses["startContainer"] == "created" and statuses["poststart"] == "running"
    assert statuses["poststop"] == "stopped" and statuses["createRuntime"] == "creating"
    assert state("createRuntime")["pid"] == state("poststart")["pid"] == pid


def test_run_in_the_foreground_runs_all_six(runtime: Runtime, bundle: Bundle) -> None:
    folder = recording(bundle)
    runtime.run(bundle.sh("exit 4"), code=4)
    assert [line.split()[0] for line in (folder / "order").read_text().splitlines()] != []
    assert {line.split()[0] for line in (folder / "order").read_text().splitlines()} == set(KINDS)


def test_several_of_one_kind_run_in_their_order(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    for number in range(5):
        bundle.hook("createRuntime", "/bin/sh", "-c", f"echo {number} >> {tmp_path}/order")
    runtime.run(bundle.sh("true"))
    assert (tmp_path / "order").read_text().split() == list("01234")


@pytest.mark.parametrize("kind", FAILING)
def test_a_failing_hook_undoes_everything(runtime: Runtime, bundle: Bundle, tmp_path: Path, kind: str) -> None:
    bundle.hook(kind, "/bin/sh", "-c", "echo it broke >&2; exit 3").sh(f"touch {tmp_path}/ran /tmp/ran")
    bundle.hook("poststop", "/bin/sh", "-c", f"cat > {tmp_path}/poststop; exit 4")  # runtime.md, Lifecycle: it comes after that
    result = runtime.run(bundle, code=1)
    assert json.loads((tmp_path / "poststop").read_text())["status"] == "stopped"
    assert f"{kind} hook /bin/sh" in result.err and "exit status 3: it broke" in result.err
    assert runtime.left() == [] and bundle.groups() == [] and not (bundle.rootfs / "tmp/ran").exists()


@pytest.mark.parametrize("kind", ["startContainer", "poststart"])
def test_a_failing_hook_of_start_ends_the_container(runtime: Runtime, bundle: Bundle, tmp_path: Path, kind: str) -> None:
    """runtime.md, Lifecycle, of both: an error, the container is stopped, then as `delete`."""
    bundle.hook(kind, "/bin/sh", "-c", "echo it broke >&2; exit 3").hook("poststart", "/bin/sh", "-c", f"touch {tmp_path}/later")
    bundle.hook("poststop", "/bin/sh", "-c", f"cat > {tmp_path}/poststop").sh("sleep 1000 & exec sleep 1000")
    runtime.create(bundle)
    pid = runtime.state()["pid"]
    failed = runtime("start", "c", code=1)
    assert f"{kind} hook /bin/sh" in failed.err and "exit status 3" in failed.err and failed.err.count("\n") == 1
    assert not alive(pid) and runtime.left() == [] and bundle.groups() == []
    assert json.loads((tmp_path / "poststop").read_text())["status"] == "stopped" and not (tmp_path / "later").exists()


def test_another_failure_of_start_undoes_nothing(runtime: Runtime, bundle: Bundle) -> None:
    bundle.hook("poststart", "/bin/sh", "-c", "exit 3")
    runtime.create(bundle)
    (bundle.rootfs / "bin/sh").unlink()  # it was there at `create`
    assert "No such file" in runtime("start", "c", code=1).err
    assert runtime.state()["status"] == "stopped"
    runtime("delete", "c")


def test_a_failing_poststart_hook_ends_what_was_run(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    bundle.hook("poststart", "/bin/sh", "-c", "echo it broke >&2; exit 3").hook("poststop", "/bin/sh", "-c", f"touch {tmp_path}/stop")
    failed = runtime.run(bundle.sh("exec sleep 1000"), code=1)
    assert failed.err.endswith("poststart hook /bin/sh: ECANCELED: Operation canceled (exit status 3: it broke)\n")
    assert (tmp_path / "stop").exists() and runtime.left() == [] and bundle.groups() == []


def test_failing_poststop_hooks_do_not_lose_the_exit_code(runtime: Runtime, bundle: Bundle) -> None:
    bundle.hook("poststop", "/bin/sh", "-c", "exit 3")
    runtime.run(bundle.sh("exit 6"), code=6)
    assert runtime.left() == [] and bundle.groups() == []


@pytest.mark.parametrize("kind", ["createRuntime", "createContainer"])
def test_a_hook_past_its_time_is_killed_with_its_group(runtime: Runtime, bundle: Bundle, tmp_path: Path, kind: str) -> None:
    bundle.hook(kind, "/bin/sh", "-c", f"sleep 1000 & echo $$ $! > {tmp_path}/pids; wait", timeout=1)
    result = runtime.run(bundle, code=1)
    assert "its process group was killed" in result.err
    assert runtime.left() == [] and bundle.groups() == []
    if kind == "createRuntime":  # the other's numbers are of the container's pid namespace
        pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
        until(lambda: not any(alive(pid) for pid in pids), "the hook and its child are dead")


def test_what_a_hook_leaves_in_its_group_ends_with_it(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    bundle.hook("createRuntime", "/bin/sh", "-c", f"sleep 1000 & echo $! > {tmp_path}/pid")
    runtime.run(bundle.sh("true"))
    until(lambda: not alive(int((tmp_path / "pid").read_text())), "the hook's child ends")


def test_a_hook_has_no_fd_but_its_three(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    for kind in ("createRuntime", "createContainer"):
        bundle.hook(kind, "/bin/sh", "-c", f"ls /proc/self/fd > {tmp_path}/{kind}")
    runtime.run(bundle.sh("true"))
    for kind in ("createRuntime", "createContainer"):
        assert (tmp_path / kind).read_text().split() == ["0", "1", "2", "3"], kind


def test_a_network_hook_finds_the_containers_network(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    script = ("pid=$(sed 's/.*\"pid\": *\\([0-9]*\\).*/\\1/'); readlink /proc/$pid/ns/net > " + f"{tmp_path}/net")
    bundle.hook("createRuntime", "/bin/sh", "-c", script, env=["PATH=/bin:/usr/bin"])
    assert runtime.run(bundle.sh("readlink /proc/self/ns/net")).out == (tmp_path / "net").read_text()
