"""What CRIU is told of a container, over made-up facts; and what becomes of its answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hosts import DIRECTORY, config
from test_runtime_cli import PID, Host, ask

from dolium.errors import InvalidArgument
from dolium.linux import criu, criu_calls
from dolium.runtime import deeds
from dolium.runtime import plan as P

MOUNTINFO = ("95 97 254:0 /root\\040fs / rw - ext4 /dev/vda rw\n128 95 0:40 / /dev rw,nosuid master:1 - tmpfs tmpfs rw\n"
             "96 127 0:5 /null /proc/kcore rw - devtmpfs devtmpfs rw\n97 95 0:6 /v /data rw - ext4 /dev/vda rw\n")


def test_mountinfo() -> None:
    found = criu.mounts(MOUNTINFO)
    assert [(mount.identity, mount.root, mount.place, mount.kind) for mount in found][:2] == [
        (95, "/root fs", "/", "ext4"), (128, "/", "/dev", "tmpfs")]


@pytest.mark.parametrize(("target", "fdinfo", "key"), [
    ("pipe:[5]", "", "pipe:[5]"), ("/dev/null", "pos:\t0\nmnt_id:\t26\nino:\t4\n", "file[1a:4]"),
    ("/inside", "mnt_id:\t95\nino:\t4\n", None), ("socket:[7]", "", None), ("/memfd:x (deleted)", "mnt_id:\t1\nino:\t4\n", None), ("anon_inode:[eventfd]", "", None)])
def test_names_of_open_files(target: str, fdinfo: str, key: str | None) -> None:
    assert criu.external_fd(target, criu.fdinfo(fdinfo), {95}) == key


def test_a_kernel_that_does_not_tell_the_inode() -> None:
    with pytest.raises(ValueError, match="inodes"):
        criu.external_fd("/x", {"mnt_id": "26"}, set())


def test_the_last_errors_of_a_log() -> None:
    log = ("(00.1) Warn  (a.c:1): no\n(00.1) Error (a.c:1): first\n(00.2)      1: Error (b.c:22): second: why\n"
           "(00.3) Error (a.c:1): third\n(00.4) Error (c.c:9): first\n(00.5) Error (c.c:9): fourth\n")
    assert criu.errors(log) == ["third", "first", "fourth"] and criu.errors("") == []


def running(**changes: Any) -> Host:
    made = config(mounts=[{"destination": "/data/", "type": "bind", "source": "vol", "options": ["rbind"]}], **changes)
    host = Host("running", made)
    host.files[f"/proc/{PID}/mountinfo"] = MOUNTINFO
    return host


def request(plan: P.Plan) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(str(plan.named("hook")[0].args[4]))
    return value


def test_what_is_dumped() -> None:
    host = running()
    host.stats["/work"] = b"16877 0 0 0"
    plan = ask(host, "checkpoint", "--leave-running", "--file-locks", "--link-remap", "--tcp-skip-in-flight", "--parent-path", "..", "--page-server", "10.0.0.1:99",
               "box")
    asked = request(plan)
    assert asked["arguments"][:3] == ["dump", f"--tree={PID}", "--root=/real/bundle/rootfs"]
    assert {"--images-dir=/work/checkpoint", "--manage-cgroups=soft", "--leave-running", "--file-locks", "--track-mem", "--link-remap", "--skip-in-flight",
            "--prev-images-dir=..", "--address=10.0.0.1", "--port=99", "--freeze-cgroup=/sys/fs/cgroup/freezer/dolium/box",
            "--external=mnt[/data]:/data", "--external=mnt[/proc/kcore]:/proc/kcore"} <= set(asked["arguments"])
    assert asked["notes"] == {"version": 1, "masks": ["/proc/kcore"], "binds": ["/data"], "console": []} and asked["pid"] == PID
    assert plan.named("hook")[0].flags == P.OPTIONAL and plan.named("again")[0].args == (0, "done")


@pytest.mark.parametrize(("outcome", "flags", "wanted"), [
    ("{}", [], ["lock", "unlink", "cg_kill"]), ("{}", ["--leave-running"], ["lock", "unlink"]),
    ("{}", ["--pre-dump"], ["lock", "unlink"]), ('{"error": "CRIU said: no"}', [], ["lock", "unlink", "again"]),
    ("", [], ["lock", "unlink", "again"])])
def test_after_the_dump(outcome: str, flags: list[str], wanted: list[str]) -> None:
    host = running()
    host.files["/run/box/criu.outcome"] = outcome
    assert [op.name for op in ask(host, "checkpoint", *flags, "box", cursor=b"done").ops][:3] == wanted


def test_errors_are_told_last() -> None:
    with pytest.raises(InvalidArgument, match="checkpoint of box: CRIU said: no"):
        ask(running(), "checkpoint", "box", cursor=b"CRIU said: no")
    with pytest.raises(InvalidArgument, match="restore of new: CRIU said: no"):
        ask(Host(), "restore", "new", cursor=b"failed CRIU said: no")


def test_a_mount_through_a_link_is_refused() -> None:
    host = running()
    host.files[f"/proc/{PID}/mountinfo"] = MOUNTINFO.replace("/data", "/elsewhere")
    with pytest.raises(InvalidArgument, match="nothing is mounted on /data"):
        ask(host, "checkpoint", "box")


def test_a_terminal_is_left_to_whoever_restores() -> None:
    host = running(process={"terminal": True, "args": ["sh"], "cwd": "/", "user": {"uid": 0, "gid": 0}})
    host.files[f"/proc/{PID}/mountinfo"] = MOUNTINFO + "70 60 0:30 /0 /dev/console rw - devpts devpts rw\n"
    asked = request(ask(host, "checkpoint", "box"))
    assert {"--shell-job", "--external=mnt[/dev/console]:/dev/console"} <= set(asked["arguments"])
    assert asked["notes"]["console"] == ["/dev/console"]
    terminal = {"terminal": True, "consoleSize": {"height": 3, "width": 7}, "args": ["sh"], "cwd": "/",
                "user": {"uid": 0, "gid": 0}}
    again = fresh(process=terminal)
    with pytest.raises(InvalidArgument, match="console socket"):
        ask(again, "restore", "-b", "bundle", "--image-path", "images", "-d", "new")
    wished = request(ask(again, "restore", "-b", "bundle", "--image-path", "images", "-d", "--console-socket", "s", "new"))
    assert wished["terminal"] == {"socket": "/work/s", "rows": 3, "columns": 7, "console": []}
    assert wished["images"] == wished["work"] == "/work/images"


def test_messages_to_criu() -> None:
    for value in (0, 1, 127, 128, 300, 1 << 31):
        assert criu_calls._fields(criu_calls._field(1, value) + criu_calls._field(51, b"x" * 200)) == {1: value, 51: b"x" * 200}
    assert criu_calls._field(2, b"ab") == b"\x12\x02ab" and criu_calls._field(1, 300) == b"\x08\xac\x02"  # protobuf's own examples
    for damaged in (b"\x80", b"\x0b", b"\x08"):
        with pytest.raises(criu_calls.Failed):
            criu_calls._fields(damaged)


def test_flags_in_a_file() -> None:
    assert criu_calls._statement("--lazy-pages") == "lazy-pages \n"
    assert criu_calls._statement("--external=mnt[/a=b]:/c") == "external mnt[/a=b]:/c\n"
    assert criu_calls._statement('--external=mnt[/a b]:/c"') == 'external "mnt[/a b]:/c\\""\n'


NOTES = {"version": 1, "masks": ["/proc/kcore", "/dev/tty9"], "binds": ["/data"], "namespaces": {},
         "files": {"0": ["file[1a:4]", "/dev/null"], "1": ["pipe:[8]", "pipe:[8]"], "2": ["pipe:[8]", "pipe:[8]"]}}


def fresh(**changes: Any) -> Host:
    made = config(mounts=[{"destination": "/data", "type": "bind", "source": "vol", "options": ["rbind"]}], **changes)
    host = Host("", made)
    host.files["/work/images/dolium.json"] = json.dumps(NOTES)
    host.stats["/real/bundle/vol"] = DIRECTORY
    return host


def test_what_is_restored() -> None:
    plan = ask(fresh(), "restore", "-b", "bundle", "--image-path", "images", "-d", "new")
    asked = request(plan)
    assert {"--root=/real/bundle/rootfs", "--cgroup-root=/dolium/new", "--external=mnt[/data]:/real/bundle/vol",
            "--external=mnt[/proc/kcore]:/dev/null", "--external=mnt[/dev/tty9]:/dev/tty9"} <= set(asked["arguments"])
    assert sorted(asked["streams"]) == [[0, "file[1a:4]", "/dev/null"], [1, "pipe:[8]", "pipe:[8]"]]
    assert json.loads(asked["record"].replace(P.PID, "1").replace(P.START_TIME, "2"))["id"] == "new"
    names = [op.name for op in plan.stage(P.PARENT_BEFORE_CLONE)]
    assert names[:3] == ["mkdir", "lock", "write_file"] and names[-2:] == ["hook", "again"] and "cg_mkdir" in names
    assert plan.named("hook")[0].args[3] == 0 and asked["hooks"] == [] and asked["scope"] == ""
    attached = ask(fresh(), "restore", "-b", "bundle", "--image-path", "images", "new")
    assert not attached.named("lock") and attached.named("hook")[0].args[3] == deeds.FOREGROUND


def test_hooks_of_new_namespaces_have_their_turn_again() -> None:
    kinds = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart")
    host = fresh(hooks={kind: [{"path": f"/{kind}", "timeout": 3}] for kind in kinds})
    asked = request(ask(host, "restore", "-b", "bundle", "--image-path", "images", "-d", "new"))
    assert [(kind, hook) for kind, hook, _ in asked["hooks"]] == [
        (kind, {"path": f"/{kind}", "timeout": 3}) for kind in kinds[:2]]
    assert [kind for kind, _, _ in asked["started"]] == ["poststart"] and '"running"' in asked["started"][0][2]
    state = json.loads(asked["hooks"][0][2].replace(P.PID, "7"))
    assert (state["status"], state["pid"], state["id"]) == ("creating", 7, "new")


def test_a_hook_that_fails_or_takes_too_long_is_told(tmp_path: Path) -> None:
    def run(*args: str, **more: Any) -> None:
        criu_calls._run_hook("prestart", {"path": "/bin/sh", "args": ["sh", "-c", *args], **more}, '{"id": "x"}', None)

    run(f"cat > {tmp_path}/state; echo $A > {tmp_path}/env", env=["A=1=2", "B"])
    assert (tmp_path / "state").read_text() == '{"id": "x"}' and (tmp_path / "env").read_text() == "1=2\n"
    for script, why in (("echo oh >&2; exit 4", "exit status 4: oh"), ("kill -9 $$", "killed by signal 9")):
        with pytest.raises(criu_calls.Failed, match=f"^prestart hook /bin/sh: {why}$"):
            run(script)
    with pytest.raises(criu_calls.Failed, match="no end after 1 s"):
        run(f"sleep 99 & echo $! > {tmp_path}/pid; sleep 99", timeout=1)
    stat = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX":  # what the hook left is on its way out
        continue
    with pytest.raises(criu_calls.Failed, match="prestart hook /no/such: No such file"):
        criu_calls._run_hook("prestart", {"path": "/no/such"}, "", None)


def passing(host: Host, **flags: int) -> Host:
    """A caller that passed descriptors; those with the flag of O_CLOEXEC are the front's own."""
    host.lists["/proc/self/fd"] = ["0", "1", "2", *(name.removeprefix("fd") for name in flags)]
    host.files |= {f"/proc/self/fdinfo/{name.removeprefix('fd')}": f"pos:\t0\nflags:\t0{flag:o}\nmnt_id:\t15\nino:\t{number}\n"
                   for number, (name, flag) in enumerate(flags.items(), 70)}
    return host


def test_the_callers_descriptors_are_recorded() -> None:
    plan = ask(passing(fresh(), fd3=0, fd4=1, fd5=0, fd7=0o2000000), "create", "--preserve-fds", "4", "-b", "bundle", "new")
    record = next(op.args[1] for op in plan.named("write_file") if str(op.args[0]).endswith("state.json"))
    assert json.loads(str(record).replace(P.PID, "1").replace(P.START_TIME, "2"))["preserved"] == {"3": "f:46", "4": "f:47", "5": "f:48"}
    host = passing(fresh(), fd3=0)
    plan = ask(host, "create", "-b", "bundle", "new")
    assert not any("preserved" in str(op.args) for op in plan.named("write_file")) and "list:/proc/self/fd" not in host.asked


HAD = {"3": ["pipe:[5]", "pipe:[5]"], "4": ["file[f:9]", "/log"], "5": [], "6": ["", "anon_inode:[eventfd]"], "7": ["pipe:[8]", "pipe:[8]"]}


def restoring(had: dict[str, list[str]], *words: str) -> list[list[object]]:
    host = passing(fresh(), fd3=0, fd4=0, fd5=0, fd6=0o2000000, fd7=0)
    host.files["/work/images/dolium.json"] = json.dumps({**NOTES, "preserved": had})
    asked = request(ask(host, "restore", "-b", "bundle", "--image-path", "images", "-d", *words, "new"))
    found: list[list[object]] = asked["preserved"]
    return found


def test_descriptors_of_the_caller_take_their_places() -> None:
    three = dict(list(HAD.items())[:3])
    assert restoring(three, "--preserve-fds", "3") == [[3, "pipe:[5]", "pipe:[5]"], [4, "file[f:9]", "/log"]]
    assert restoring({"3": ["pipe:[9]", ""], "4": ["pipe:[9]", ""]}, "--preserve-fds", "2") == [[3, "pipe:[9]", ""]], "one file once"
    host = passing(fresh(), fd3=0)
    host.files["/work/images/dolium.json"] = json.dumps({**NOTES, "preserved": {"3": ["pipe:[8]", ""]}})
    asked = request(ask(host, "restore", "-b", "bundle", "--image-path", "images", "-d", "--preserve-fds", "1", "new"))
    assert json.loads(asked["record"].replace(P.PID, "1").replace(P.START_TIME, "2"))["preserved"] == {"3": "f:46"}
    assert [one[0] for one in asked["streams"]] == [0] and [one[0] for one in asked["preserved"]] == [3]
    assert restoring({"3": [], "4": ["", "anon_inode:[eventfd]"]}) == [] == restoring({})


@pytest.mark.parametrize(("had", "count", "why"), [
    (HAD, 4, "^--preserve-fds: the caller passed no file descriptor 6"), (dict(list(HAD.items())[:3]), 10**17, "had 3 descriptors of its"),
    ({}, 1, "had 0 descriptors"), (HAD, 1, r"^file descriptor 4 of the checkpointed container was its caller's \(/log\).*--preserve-fds 5"),
    (HAD, 0, "^file descriptor 3 .*"), ({"3": HAD["6"]}, 1, r"file descriptor 3 was anon_inode:\[eventfd\]: CRIU puts nothing else there")])
def test_descriptors_that_do_not_fit(had: dict[str, list[str]], count: int, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        restoring(had, "--preserve-fds", str(count))


def test_a_keyring_of_its_own_and_a_root_to_pivot_from() -> None:
    words = ("restore", "-b", "bundle", "--image-path", "images", "-d")
    asked = request(ask(fresh(), *words, "new"))
    assert (asked["keyring"], asked["movable"]) == ("_ses.new", False)
    asked = request(ask(fresh(), *words, "--no-new-keyring", "--no-pivot", "new"))
    assert (asked["keyring"], asked["movable"]) == ("", True)


def test_labels_and_a_pidfd_of_what_is_restored() -> None:
    asked = request(ask(fresh(), "restore", "-b", "bundle", "--image-path", "images", "--lsm-profile", "apparmor:box",
                        "--lsm-mount-context", "c1", "--pidfd-socket", "s", "--pid-file", "p", "new"))
    assert {"--lsm-profile=apparmor:box", "--lsm-mount-context=c1"} <= set(asked["arguments"])
    assert (asked["pidfd_socket"], asked["told"]) == ("/work/s", "/work/p")


@pytest.mark.parametrize(("notes", "why"), [
    (None, "there is no dolium.json"), ("{", "is damaged"), ('{"version": 2}', "of version 2"), ('{"version": 1}', "is damaged"),
    (json.dumps({**NOTES, "binds": ["/other"]}), "a mount at /other"),
    (json.dumps({**NOTES, "namespaces": {"network": "net[4]:extRootNetNS"}}), "network namespace of others")])
def test_notes_that_do_not_fit(notes: str | None, why: str) -> None:
    host = fresh()
    if notes is None:
        del host.files["/work/images/dolium.json"]
    else:
        host.files["/work/images/dolium.json"] = notes
    with pytest.raises(InvalidArgument, match=why):
        ask(host, "restore", "-b", "bundle", "--image-path", "images", "new")


def test_after_the_restore() -> None:
    host = fresh()
    host.stats["/run/new"] = b"16832 0 0 0"
    host.files["/run/new/config.json"] = json.dumps(config(hooks={"poststart": [{"path": "/a"}], "poststop": [{"path": "/b"}]}))
    words = ("restore", "-b", "bundle", "new")
    host.files["/run/new/criu.outcome"] = '{"pid": 77}'
    assert [op.name for op in ask(host, *words, cursor=b"done 1").ops] == ["lock", "unlink"]
    host.files["/run/new/criu.outcome"] = '{"exit": 7}'
    ended = ask(host, *words, cursor=b"done 1")
    assert [op.name for op in ended.ops if op.name != "cg_rmdir"] == ["lock", "cg_kill", "hook", "remove_dir", "exit_code"]
    assert ended.named("exit_code")[0].args == (7,)
    host.files["/run/new/criu.outcome"] = '{"error": "why"}'
    failed = ask(host, *words, cursor=b"done 1")
    assert failed.named("again")[0].args == (0, "failed why")
    assert [op.name for op in failed.ops if op.name != "cg_rmdir"] == ["lock", "cg_kill", "hook", "remove_dir", "again"]
    del host.stats["/run/new"]
    assert ask(host, *words, cursor=b"done 1").named("exit_code")[0].args == (137,)
