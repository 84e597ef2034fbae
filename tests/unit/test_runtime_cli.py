"""The command line and the life of a container, over made-up facts: what is refused, and what a plan then holds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hosts import HYBRID_TEXT, NAMES, V1, V2, FakeFacts, config, order
from hypothesis import given
from hypothesis import strategies as st

from dolium.errors import DoliumError, FailedPrecondition, InvalidArgument, NotFound
from dolium.runtime import cli, lifecycle, state
from dolium.runtime import plan as P
from dolium.runtime.cli import Words, compile_request, signal_number
from dolium.runtime.spec import load

PID, START = 4242, 777
FOLDERS = V1.paths("/dolium/box")
RUNNING = f"{PID} (a) b) S " + " ".join(["1"] * 18) + f" {START} 0"


class Host(FakeFacts):
    """A host on which the container ``box`` is in some status."""

    def __init__(self, status: str = "", made: dict[str, Any] | None = None, *, layout_v2: bool = False,
                 **options: Any) -> None:
        super().__init__(**options)
        made = made or config()
        folders = V2.paths("/dolium/box") if layout_v2 else FOLDERS
        self.files["/proc/self/cgroup"] = "0::/user.slice\n" if layout_v2 else HYBRID_TEXT
        if layout_v2:
            self.stats["/sys/fs/cgroup/cgroup.controllers"] = b"33060 0 0 0"
            self.files["/sys/fs/cgroup/cgroup.controllers"] = "cpuset cpu io memory pids\n"
        else:
            self.lists["/sys/fs/cgroup"] = NAMES
        self.reals["/work/bundle"] = "/real/bundle"
        self.files["/real/bundle/config.json"] = json.dumps(made)
        if status:
            self.stats["/run/box"] = b"16832 0 0 0"
        if status and status != "half":
            text = state.template("box", "/real/bundle", "/real/bundle/rootfs", "2020-01-01T00:00:00Z", 0, folders, "1.0.2")
            self.files["/run/box/state.json"] = text.replace(P.PID, str(PID)).replace(P.START_TIME, str(START))
            self.files["/run/box/config.json"] = json.dumps(made)
            if status != "stopped":
                self.files[f"/proc/{PID}/stat"] = RUNNING
                self.files[f"/proc/{PID}/cgroup"] = "0::/dolium/box\n" if layout_v2 else HYBRID_TEXT
            if status == "created":
                self.stats["/run/box/start.sock"] = b"49152 0 0 0"
            frozen = "FROZEN" if status == "paused" else "THAWED"
            self.files["/sys/fs/cgroup/freezer/dolium/box/freezer.state"] = f"{frozen}\n"


def ask(facts: FakeFacts, *words: str, cursor: bytes = b"") -> P.Plan:
    """The plan of a command line; a refusal is raised as InvalidArgument with its message."""
    request = {"argv": [word.encode() for word in ("dolium-runtime", "--root", "/run", *words)], "env": [b"A=1"],
               "cwd": [b"/work"], "uid": [b"0"], "gid": [b"0"], "now": [b"1700000000"], "machine": [b"x86_64"],
               **({"again": [cursor]} if cursor else {})}
    plan, error = compile_request(request, facts)
    if plan is None:
        assert error is not None
        raise InvalidArgument(error[0])
    assert P.decode(plan.encode())
    return plan


# -- the life cycle --

ALLOWED = {
    "start": {"created"},
    "kill": {"created", "running", "paused"},
    "pause": {"created", "running"},
    "resume": {"paused"},
    "delete": {"created", "stopped"},
    "exec": {"created", "running"},
    "state": {"created", "running", "paused", "stopped"},
    "ps": {"created", "running", "paused", "stopped"},
}


@pytest.mark.parametrize("status", ["created", "running", "paused", "stopped"])
@pytest.mark.parametrize("command", sorted(ALLOWED))
def test_what_is_allowed_in_which_status(command: str, status: str) -> None:
    words = [command, "box", *(["true"] if command == "exec" else [])]
    if status in ALLOWED[command]:
        assert ask(Host(status), *words).ops
    else:
        with pytest.raises(InvalidArgument):
            ask(Host(status), *words)


@pytest.mark.parametrize("command", sorted(ALLOWED))
def test_absent_and_half_made(command: str) -> None:
    words = [command, "box", *(["true"] if command == "exec" else [])]
    with pytest.raises(InvalidArgument, match="container box does not exist"):
        ask(Host(), *words)
    with pytest.raises(InvalidArgument, match="was not created completely"):
        ask(Host("half"), *words)


@pytest.mark.parametrize("command", ["create", "run"])
@pytest.mark.parametrize("status", ["half", "created", "running", "stopped"])
def test_an_id_in_use(command: str, status: str) -> None:
    with pytest.raises(InvalidArgument, match="container with given ID already exists: box"):
        ask(Host(status), command, "-b", "bundle", "box")


def test_delete_by_force_is_allowed_in_every_status() -> None:
    assert ask(Host(), "delete", "--force", "box").ops == []
    for status in ("created", "running", "paused", "stopped", "half"):
        plan = ask(Host(status), "delete", "--force", "box")
        names = order(plan)
        assert names[0] == "lock" and names[-1] == "remove_dir" and "cg_kill" in names
        assert [op.args[0] for op in plan.named("cg_rmdir")] == FOLDERS
        assert ("signal" in names) is (status in ("created", "running", "paused"))
        if "signal" in names:
            assert names.index("signal") < names.index("cg_kill") < names.index("wait_gone") < names.index("cg_rmdir")


def test_delete_runs_poststop_hooks_once_after_the_end_and_drops_the_record_last() -> None:
    made = config(hooks={"poststop": [{"path": "/x"}]})
    plan = ask(Host("stopped", made), "delete", "box")
    names = order(plan)
    assert names.index("cg_rmdir") < names.index("hook") < names.index("remove_dir") and plan.ops[-1].args == ("/run/box",)
    assert '"status": "stopped"' in str(plan.named("hook")[0].args[4]) and plan.named("hook")[0].flags & P.OPTIONAL


def test_create_makes_the_folder_first_and_the_record_last() -> None:
    plan = ask(Host(), "create", "--bundle", "bundle", "--pid-file", "p", "box")
    ops = plan.ops
    assert ops[0].name == "mkdir" and ops[0].args[0] == "/run/box" and ops[0].flags & P.NOTHING_OURS
    assert ops[0].args[2] == 3  # must be new
    early = next(op for op in ops if op.stage == P.ON_FAILURE)
    assert early.name == "remove_dir" and early.flags & P.NOTHING_OURS
    first_group = next(i for i, op in enumerate(ops) if op.name == "cg_mkdir")
    assert ops.index(early) < first_group < next(i for i, op in enumerate(ops) if op.name == "cg_kill")
    assert ops[-1].name == "clone"
    assert [(op.stage, op.args[0]) for op in plan.named("write_file")] == [
        (P.PARENT_BEFORE_CLONE, "/run/box/config.json"), (P.PARENT_CREATED, "/run/box/state.json"),
        (P.PARENT_CREATED, "/work/p")]
    assert plan.named("write_file")[1].args[3] == 1  # by rename
    record = json.loads(str(plan.named("write_file")[1].args[1]).replace(P.PID, "1").replace(P.START_TIME, "2"))
    assert (record["created"], record["rootfs"], record["cgroups"]) == ("2023-11-14T22:13:20Z", "/real/bundle/rootfs", FOLDERS)
    assert [op.name for op in ops if op.stage == P.ON_FAILURE][-1] == "remove_dir"


def test_run_keeps_detaches_or_cleans_up() -> None:
    def after(*flags: str) -> tuple[bool, bool]:
        plan = ask(Host(), "run", "-b", "bundle", *flags, "box")
        assert plan.named("wait_start") == []
        return bool(plan.named("hold")), any(op.stage == P.AFTER_EXIT for op in plan.ops)

    assert after() == (True, True)
    assert after("--keep") == (True, False)
    assert after("-d") == after("--detach") == (False, False)


def test_start_tells_init_and_marks_it_then_runs_poststart() -> None:
    plan = ask(Host("created", config(hooks={"poststart": [{"path": "/x"}]})), "start", "box")
    assert [op.name for op in plan.stage(P.PARENT_BEFORE_CLONE)] == ["lock", "signal", "start", "unlink", "hook"]
    assert not plan.named("hook")[0].flags & P.OPTIONAL, "it ends the container (runtime.md, Lifecycle)"
    assert {op.name for op in plan.stage(P.ON_FAILURE)} >= {"signal", "cg_kill", "wait_gone", "remove_dir"}
    assert not any(op.flags & P.NOTHING_OURS for op in plan.stage(P.ON_FAILURE))
    assert all(op.flags & P.NOTHING_OURS for op in list(plan.stage(P.PARENT_BEFORE_CLONE))[:-1]), "nothing else does"
    assert plan.named("signal")[0].args == (PID, START, 0)
    assert f'"pid": {PID}' in str(plan.named("hook")[0].args[4])


def test_kill_goes_to_the_recorded_process_or_to_all() -> None:
    assert ask(Host("running"), "kill", "box").ops[0].args == (PID, START, 15)
    assert ask(Host("running"), "kill", "box", "SIGKILL").ops[0].args == (PID, START, 9)
    assert order(ask(Host("paused"), "kill", "box", "KILL")) == ["signal", "cg_frozen"], "who is frozen does not die on v1"
    assert order(ask(Host("paused"), "kill", "box", "TERM")) == ["signal"]
    assert order(ask(Host("running"), "kill", "--all", "box", "KILL")) == ["cg_kill"]
    assert order(ask(Host("stopped"), "kill", "-a", "box", "9")) == ["cg_kill"]
    host = Host("running")
    host.files[f"{FOLDERS[0]}/cgroup.procs"] = f"{PID}\n4300\n4301\n"
    host.files["/proc/4300/stat"] = RUNNING.replace(f" {START} ", " 800 ")
    first = ask(host, "kill", "-a", "box", "TERM")
    assert [op.name for op in first.ops if op.stage != P.ON_FAILURE] == ["cg_frozen", "again"]
    plan = ask(host, "kill", "-a", "box", "TERM", cursor=bytes(first.named("again")[0].args[1].encode()))
    assert order(plan) == ["signal", "signal", "cg_frozen"], "who is gone meanwhile is passed over"
    assert [op.args for op in plan.named("signal")] == [(PID, START, 15), (4300, 800, 15)]
    assert plan.named("cg_frozen")[0].args[1] == 0
    host.files["/sys/fs/cgroup/freezer/dolium/box/freezer.state"] = "FROZEN\n"
    assert order(ask(host, "kill", "-a", "box", "TERM")) == ["signal", "signal"], "what was paused stays paused"
    host.files[f"{FOLDERS[0]}/cgroup.procs"] = ""
    assert ask(Host("stopped"), "kill", "-a", "box", "TERM").ops == []


def test_kill_all_waits_until_v2_says_frozen() -> None:
    host, group = Host("running", layout_v2=True), "/sys/fs/cgroup/dolium/box"
    host.files |= {f"{group}/cgroup.procs": f"{PID}\n", "/proc/uptime": "100.5 3\n", f"{group}/cgroup.events": "populated 1\nfrozen 0\n"}
    assert order(ask(host, "kill", "-a", "box", "TERM")) == ["cg_write", "again"]
    assert order(ask(host, "kill", "-a", "box", "TERM", cursor=b"110")) == ["again"]
    assert order(ask(host, "kill", "-a", "box", "TERM", cursor=b"99")) == ["signal", "cg_write"], "not for ever"
    host.files[f"{group}/cgroup.events"] = "populated 1\nfrozen 1\n"
    plan = ask(host, "kill", "-a", "box", "TERM", cursor=b"110")
    assert order(plan) == ["signal", "cg_write"] and plan.named("cg_write")[0].args[:2] == (f"{group}/cgroup.freeze", "0")


def test_a_reused_pid_is_not_the_container() -> None:
    host = Host("running")
    host.files[f"/proc/{PID}/stat"] = RUNNING.replace(f" {START} ", " 99999 ")
    with pytest.raises(InvalidArgument, match="not running"):
        ask(host, "kill", "box")
    host.files[f"/proc/{PID}/stat"] = RUNNING.replace(" S ", " Z ")
    with pytest.raises(InvalidArgument, match="stopped"):
        ask(host, "exec", "box", "true")


def test_pause_uses_the_freezer() -> None:
    path = "/sys/fs/cgroup/freezer/dolium/box/freezer.state"
    assert [op.args for op in ask(Host("running"), "pause", "box").ops] == [(path, 1), (path, "THAWED", 0)]
    assert [op.args for op in ask(Host("paused"), "resume", "box").ops] == [(path, 0)]


def test_pause_on_v2_waits_until_all_are_frozen() -> None:
    host = Host("running", layout_v2=True)
    folder = "/sys/fs/cgroup/dolium/box"
    host.files["/proc/uptime"] = "100.25 7.00\n"
    first = ask(host, "pause", "box")
    assert [op.args for op in first.named("cg_write")] == [(f"{folder}/cgroup.freeze", "1", 0)]
    assert first.named("again")[0].args == (0, "110")
    host.files[f"{folder}/cgroup.events"] = "populated 1\nfrozen 0\n"
    assert ask(host, "pause", "box", cursor=b"110").named("again")[0].args == (10, b"110")
    host.files["/proc/uptime"] = "110.00 7.00\n"
    late = ask(host, "pause", "box", cursor=b"110")
    assert [op.args for op in late.ops] == [(f"{folder}/cgroup.freeze", "0", 0), (0, "late")]
    with pytest.raises(InvalidArgument, match="did not freeze within 10 s and was resumed"):
        ask(host, "pause", "box", cursor=b"late")
    host.files[f"{folder}/cgroup.events"] = "populated 1\nfrozen 1\n"
    assert ask(host, "pause", "box", cursor=b"110").ops == []
    host.files[f"{folder}/cgroup.events"] = "populated 0\nfrozen 0\n"
    with pytest.raises(InvalidArgument, match="ended before it was frozen"):
        ask(host, "pause", "box", cursor=b"110")


def test_exec_in_a_paused_container_needs_a_flag() -> None:
    with pytest.raises(InvalidArgument, match="--ignore-paused"):
        ask(Host("paused"), "exec", "box", "true")
    assert ask(Host("paused"), "exec", "--ignore-paused", "box", "true").named("clone")


def test_exec_flags_change_the_process() -> None:
    plan = ask(Host("running"), "exec", "-u", "5:6", "-g", "7", "-g", "8", "--cwd", "/c", "-e", "X=1", "-c", "CAP_CHOWN",
               "--no-new-privs", "box", "prog", "-a", "--", "b")
    assert plan.named("user")[0].args == (5, 6, ["7", "8"]) and plan.named("cwd")[0].args == ("/c",)
    run = plan.named("exec")[0].args
    assert run[1] == ["prog", "-a", "--", "b"] and "X=1" in run[2]  # type: ignore[operator]
    assert plan.named("drop_bounding")[0].args[0] & 1 == 1  # type: ignore[operator]


def test_state_and_list() -> None:
    shown = json.loads(str(ask(Host("running"), "state", "box").ops[0].args[1]))
    assert (shown["id"], shown["pid"], shown["status"], shown["bundle"]) == ("box", PID, "running", "/real/bundle")
    host = Host("paused", lists={"/run": ["box", ".cache", "half"]})
    (row,) = json.loads(str(ask(host, "list", "-f", "json").ops[0].args[1]))
    assert (row["id"], row["status"]) == ("box", "paused")
    assert ask(host, "list", "-q").ops[0].args[1] == "box\n"


def test_one_damaged_record_does_not_hide_the_others() -> None:
    host = Host("running", lists={"/run": ["bad", "box"]})
    host.files["/run/bad/state.json"] = "{"
    assert ask(host, "list", "-q").ops[0].args[1] == "box\n"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 2}', '{"version": 1}', "null", '{"version": 1, "id": 3}'])
def test_damaged_records_are_told(text: str) -> None:
    host = Host("running")
    host.files["/run/box/state.json"] = text
    with pytest.raises(FailedPrecondition):
        state.load(host, "/run", "box")
    assert order(ask(host, "delete", "--force", "box"))[-1] == "remove_dir"


def test_terminals_and_console_sockets_must_fit() -> None:
    terminal = config(process={"terminal": True})
    for words, made in ((["create"], terminal), (["run", "-d"], terminal), (["create", "--console-socket", "s"], config()),
                        (["run", "--console-socket", "s"], terminal)):
        with pytest.raises(InvalidArgument, match="console socket"):
            ask(Host("", made), *words, "-b", "bundle", "box")
    assert ask(Host("", terminal), "create", "--console-socket", "s", "-b", "bundle", "box").named("connect")[0].args[1] == \
        "/work/s"


def test_a_configuration_without_a_process_and_a_missing_bundle() -> None:
    made = config()
    del made["process"]
    with pytest.raises(InvalidArgument, match="process: is required"):
        ask(Host("", made), "create", "-b", "bundle", "box")
    with pytest.raises(InvalidArgument, match="bundle nosuch: no such folder"):
        ask(Host(), "create", "-b", "nosuch", "box")


# -- the command line --

def test_flags_in_every_form() -> None:
    words = Words(["x", "--root=/r", "--debug", "--log", "l", "run", "-b", "B", "--detach=false", "--pid-file=p", "--", "-id"])
    assert words.globals == {"root": "/r", "debug": True, "log": "l"}
    assert words.options == {"bundle": "B", "detach": False, "pid-file": "p"} and words.arguments == ["-id"]


def test_flags_end_at_the_first_word() -> None:
    words = Words(["x", "exec", "-t", "box", "ls", "-l", "--root"])
    assert words.options == {"tty": True} and words.arguments == ["box", "ls", "-l", "--root"]


@pytest.mark.parametrize("argv", [
    ["--nosuch"], ["--root"], ["nosuch"], ["run", "--nosuch", "c"], ["run", "--bundle"], ["exec", "-z", "c"], ["-b"],
])
def test_unknown_flags_and_commands(argv: list[str]) -> None:
    with pytest.raises(InvalidArgument):
        Words(["x", *argv])


@pytest.mark.parametrize("words", [
    ["create"], ["create", "a", "b"], ["start"], ["kill"], ["kill", "a", "9", "c"], ["delete"], ["state", "a", "b"],
    ["exec", "box"], ["list", "-f", "x"], ["ps", "-f", "x", "box"], ["run", "--preserve-fds", "-1", "box"], ["run", "--preserve-fds", "²", "box"],
    ["exec", "-u", "²", "box", "true"], ["kill", "box", "X"],
    ["exec", "-u", "name", "box", "true"], ["exec", "--cap", "CAP_X", "box", "true"], ["--systemd-cgroup", "run", "c"],
    ["--log-format", "x", "list"],
])
def test_wrong_command_lines(words: list[str]) -> None:
    with pytest.raises(InvalidArgument):
        ask(Host("running"), *words)


@pytest.mark.parametrize("identity", ["", ".", "..", "a/b", "a b", "ü", "a\n", "a" * 1025])
def test_bad_ids(identity: str) -> None:
    with pytest.raises(InvalidArgument, match="invalid container id"):
        state.check_identity(identity)


def test_good_ids() -> None:
    for identity in ("a", "A0_+-.", "..a", "a" * 1024):
        state.check_identity(identity)


def test_help_and_version_for_every_command() -> None:
    for command in cli.COMMANDS:
        assert f"usage: dolium-runtime {command}" in str(ask(Host(), command, "--help").ops[0].args[1])
    assert "dolium-runtime version" in str(ask(Host(), "--version").ops[0].args[1])
    assert all(f"  {command}" in str(ask(Host()).ops[0].args[1]) for command in cli.COMMANDS)


def test_errors_name_the_log() -> None:
    request = {"argv": [b"x", b"--log", b"l", b"--log-format", b"json", b"start", b"box"], "env": [], "cwd": [b"/w"],
               "uid": [b"0"], "gid": [b"0"], "now": [b"0"], "machine": [b"x86_64"]}
    plan, error = compile_request(request, Host())
    assert plan is None and error == ("container box does not exist", "/w/l", "json", 1)


def test_the_state_folder_without_root() -> None:
    request = {"argv": [b"x", b"state", b"box"], "env": [b"XDG_RUNTIME_DIR=/run/user/5"], "cwd": [b"/"], "uid": [b"5"], "gid": [b"5"],
               "now": [b"0"], "machine": [b"x86_64"]}
    host = Host()
    compile_request(request, host)
    assert "read:/run/user/5/dolium-runtime/box/state.json" in host.asked


def test_a_rootless_spec_maps_the_caller_alone() -> None:
    request = {"argv": [b"x", b"spec", b"--rootless"], "env": [], "cwd": [b"/work"], "uid": [b"5"], "gid": [b"6"],
               "now": [b"0"], "machine": [b"x86_64"]}
    plan, error = compile_request(request, Host())
    assert plan is not None and error is None
    spec = json.loads(str(plan.named("write_file")[0].args[1]))
    linux = spec["linux"]
    assert linux["uidMappings"] == [{"containerID": 0, "hostID": 5, "size": 1}] and linux["gidMappings"][0]["hostID"] == 6
    kinds = {entry["type"] for entry in linux["namespaces"]}
    assert "user" in kinds and "network" not in kinds and "resources" not in linux
    load(json.dumps(spec).encode(), "config.json")
    options = {mount["destination"]: mount["options"] for mount in spec["mounts"]}
    assert "rbind" in options["/sys"] and "gid=5" not in options["/dev/pts"]
    assert "/sys/fs/cgroup" in options


def test_exec_in_a_sub_cgroup() -> None:
    host = Host("running")
    host.stats["/sys/fs/cgroup/memory/some/where/sub/cgroup.procs"] = b"33188 0 0 0"
    joined = [str(op.args[1]) for op in ask(host, "exec", "--cgroup", "memory:/sub", "box", "true").named("open_path")]
    assert "/sys/fs/cgroup/memory/some/where/sub/tasks" in joined
    assert "/sys/fs/cgroup/pids/tasks" in joined
    for wrong, why in (("memory:../up", "is not a sub cgroup path"), ("nosuch:/sub", "no cgroup controller 'nosuch'"),
                       ("sub", "does not exist"), ("memory:absent", "does not exist")):
        with pytest.raises(InvalidArgument, match=why):
            ask(host, "exec", "--cgroup", wrong, "box", "true")


@pytest.mark.parametrize(("text", "number"), [
    ("9", 9), ("KILL", 9), ("SIGKILL", 9), ("sigterm", 15), ("0", 0), ("RTMIN", 34), ("SIGRTMIN+3", 37), ("RTMAX-1", 63),
    ("SIGRTMAX", 64), ("SYS", 31), ("WINCH", 28),
])
def test_signals(text: str, number: int) -> None:
    assert signal_number(text) == number


@pytest.mark.parametrize("text", ["", "SIG", "65", "-1", "NOSUCH", "RTMIN+40", "RTMAX-40", "1.5", "९", "²"])
def test_no_signals(text: str) -> None:
    with pytest.raises(InvalidArgument):
        signal_number(text)


def test_signal_numbers_are_this_machines() -> None:
    import signal

    for name, number in cli.SIGNALS.items():
        if hasattr(signal, f"SIG{name}"):
            assert int(getattr(signal, f"SIG{name}")) == number


@given(st.integers(0, 4_000_000_000))
def test_time_stamps(seconds: int) -> None:
    from datetime import UTC, datetime

    assert lifecycle.rfc3339(seconds) == datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@given(st.lists(st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"])), max_size=5))
def test_no_command_line_breaks_the_compiler(words: list[str]) -> None:
    try:
        ask(Host("running"), *words)
    except DoliumError as error:
        assert str(error)


def test_facts_tell_what_is_missing_and_why() -> None:
    from dolium.errors import PermissionDenied
    from dolium.runtime.facts import Facts, Need

    facts = Facts({"read:/a": [b"0", b"text"], "read:/b": [b"2"], "read:/c": [b"13"], "read:/d": [b"5"], "real:/b": [b"2"],
                   "list:/b": [b"2"], "stat:/a": [b"0", b"1 2 3 4"]})
    assert facts.read("/a") == b"text" and facts.read("/b") is None and facts.stat("/a") == (1, 2, 3, 4)
    assert facts.list("/b") == []
    for path, error, why in (("/c", PermissionDenied, "permission denied"), ("/d", FailedPrecondition, "Input/output error")):
        with pytest.raises(error, match=why):
            facts.read(path)
    with pytest.raises(NotFound):
        facts.real("/b")
    with pytest.raises(Need) as need:
        facts.want("read:/a", "read:/x", "stat:/y")
    assert need.value.queries == ["read:/x", "stat:/y"]
