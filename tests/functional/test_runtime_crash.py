"""kill -9 of the runtime at any moment, two of them at once: nothing is left that `delete --force` does not remove."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from pathlib import Path

import pytest
from bundles import FRONT, Bundle, Runtime, alive, bundle, needs, runtime, until

__all__ = ["bundle", "runtime"]
pytestmark = [pytest.mark.crash, *needs]


def create(runtime: Runtime, bundle: Bundle, identity: str = "c", log: Path = Path("/dev/null"),
           **more: int) -> subprocess.Popen[bytes]:
    words = [FRONT, "--root", str(runtime.root), "--log", str(log), "create", "--bundle", str(bundle.path), identity]
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **more)


def clean(runtime: Runtime, bundle: Bundle) -> None:
    runtime("delete", "--force", "c")
    assert runtime.left() == [] and bundle.groups() == []


@pytest.mark.parametrize("kind", ["createRuntime", "createContainer"])
def test_killed_while_a_hook_blocks(runtime: Runtime, bundle: Bundle, tmp_path: Path, kind: str) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    bundle.hook(kind, "/bin/sh", "-c", f"echo $$ > {fifo}; exec sleep 1000").write()
    front = create(runtime, bundle)
    fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    assert select.select([fd], [], [], 30)[0]
    hook = int(until(lambda: os.read(fd, 100)))
    os.close(fd)
    os.kill(front.pid, signal.SIGKILL)
    front.wait()
    assert "was not created completely" in runtime("state", "c", code=1).err
    assert "already exists" in runtime("create", "--bundle", str(bundle.path), "c", code=1).err
    clean(runtime, bundle)
    if kind == "createRuntime":  # it is in the runtime's namespaces and in none of the container's groups
        os.kill(hook, signal.SIGKILL)
        until(lambda: not alive(hook), "the hook is dead")


def test_killed_after_any_number_of_system_calls(runtime: Runtime, bundle: Bundle) -> None:
    """The delay grows from nothing to past the end, in steps of a fraction of what a create takes."""
    bundle.write()
    script = 'import os,sys,time\npid=os.fork()\nif pid==0: os.execv(sys.argv[2],sys.argv[2:])\n' \
             'end=time.monotonic()+float(sys.argv[1])\nwhile time.monotonic()<end: pass\nos.kill(pid,9)\n' \
             'sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid,0)[1])&255)'
    ends = set()
    for step in range(24):
        words = ["python3", "-S", "-c", script, str(0.004 * step), FRONT, "--root", str(runtime.root), "create", "--bundle",
                 str(bundle.path), "c"]
        ends.add(subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                timeout=60, check=False).returncode)
        runtime("delete", "--force", "c")
        assert runtime.left() == [] and bundle.groups() == [], step
    assert 247 in ends  # at least one was killed


def test_a_container_survives_the_kill_of_a_foreground_run(runtime: Runtime, bundle: Bundle) -> None:
    bundle.sh("echo up; exec sleep 1000")
    front = runtime.popen("run", "--bundle", str(bundle.write()), "c")
    assert front.stdout is not None and front.stdout.readline() == "up\n"
    front.kill()
    front.wait(30)
    assert runtime.state()["status"] == "running"
    clean(runtime, bundle)


def test_two_creates_of_one_id_at_once(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    bundle.write()
    other = Bundle(tmp_path / "other")
    other.write()
    for turn in range(6):
        log = tmp_path / f"log{turn}"
        fronts = [create(runtime, one, log=log) for one in (bundle, other, bundle, other)]
        codes = sorted(front.wait(60) for front in fronts)
        assert codes == [0, 1, 1, 1]
        assert all("already" in line for line in log.read_text().splitlines())
        assert runtime.state()["status"] == "created"
        winner = bundle if runtime.state()["bundle"] == str(bundle.path) else other
        loser = other if winner is bundle else bundle
        assert winner.groups() and not loser.groups()
        clean(runtime, winner)


def test_two_deletes_at_once(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    bundle.hook("poststop", "/bin/sh", "-c", f"echo once >> {tmp_path}/stopped").sh("exec sleep 1000")
    runtime.started(bundle)
    fronts = [runtime.popen("delete", "--force", "c") for _ in range(3)]
    assert 0 in [front.wait(60) for front in fronts]
    assert (tmp_path / "stopped").read_text() == "once\n"
    clean(runtime, bundle)


def test_a_delete_that_was_killed_goes_on(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    bundle.hook("poststop", "/bin/sh", "-c", f"test -e {tmp_path}/twice || echo $$ > {fifo}; test -e {tmp_path}/twice ||"
                                            "exec sleep 1000").sh("exec sleep 1000")
    runtime.started(bundle)
    front = runtime.popen("delete", "--force", "c")
    fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    assert select.select([fd], [], [], 30)[0]
    hook = int(until(lambda: os.read(fd, 100)))
    os.close(fd)
    front.kill()
    front.wait(30)
    os.kill(hook, signal.SIGKILL)
    (tmp_path / "twice").touch()
    assert runtime.state()["status"] == "stopped"
    runtime("delete", "c")
    assert runtime.left() == [] and bundle.groups() == []


def test_damaged_state_is_told_and_removable(runtime: Runtime, bundle: Bundle) -> None:
    runtime.started(bundle.sh("exec sleep 1000"))
    record = runtime.root / "c/state.json"
    good = record.read_text()
    for bad in ("", "{", "[]", good.replace('"version": 1', '"version": 99'), good[: len(good) // 2]):
        record.write_text(bad)
        result = runtime("state", "c", code=1)
        assert result.err.startswith("dolium-runtime: ") and result.err.count("\n") == 1, (bad, result)
    record.write_text("{")
    clean(runtime, bundle)
