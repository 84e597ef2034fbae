"""update and events, over made-up facts."""

from __future__ import annotations

import json

import pytest
from hosts import V2, config
from test_runtime_cli import Host, ask

from dolium.errors import InvalidArgument
from dolium.runtime import plan as P
from dolium.runtime.cli import compile_request
from dolium.runtime.resources import milliseconds

MEMORY = "/sys/fs/cgroup/memory/dolium/box"


def writes(plan: P.Plan, stage: int = P.PARENT_BEFORE_CLONE) -> list[tuple[str, str]]:
    return [(str(op.args[0]).rpartition("/")[2], op.args[1].decode() if isinstance(op.args[1], bytes) else str(op.args[1]))
            for op in plan.stage(stage) if op.name == "cg_write"]


def test_every_flag_is_a_file() -> None:
    plan = ask(Host("running"), "update", "--blkio-weight", "300", "--cpu-period", "100000", "--cpu-quota", "50000", "--cpu-share",
               "512", "--cpuset-cpus", "0", "--cpuset-mems", "0", "--memory", "64m", "--memory-reservation", "32m", "--pids-limit",
               "77", "--cpu-idle", "1", "--cpu-burst", "1000", "--cpu-rt-period", "1000000", "--cpu-rt-runtime", "9000", "box")
    assert dict(writes(plan)) == {
        "blkio.weight": "300", "cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "50000", "cpu.shares": "512", "cpuset.cpus": "0",
        "cpuset.mems": "0", "memory.limit_in_bytes": str(64 << 20), "memory.soft_limit_in_bytes": str(32 << 20), "pids.max": "77",
        "cpu.idle": "1", "cpu.cfs_burst_us": "1000", "cpu.rt_period_us": "1000000", "cpu.rt_runtime_us": "9000"}


@pytest.mark.parametrize(("now", "order"), [
    ("104857600", ["memory.memsw.limit_in_bytes", "memory.limit_in_bytes"]),  # both rise
    ("524288000", ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"]),  # both fall
])
def test_the_order_in_which_v1_takes_memory_and_swap(now: str, order: list[str]) -> None:
    host = Host("running")
    host.files[f"{MEMORY}/memory.memsw.limit_in_bytes"] = now
    host.files[f"{MEMORY}/memory.limit_in_bytes"] = now
    plan = ask(host, "update", "--memory", "200m", "--memory-swap", "300m", "box")
    assert [name for name, _ in writes(plan)] == order
    assert writes(plan, P.ON_FAILURE) == [(name, now) for name in reversed(order)]


def test_resources_from_a_file_and_from_standard_input() -> None:
    host = Host("running")
    text = json.dumps({"memory": {"limit": 0, "reservation": 1 << 20}, "pids": {"limit": 5}})
    host.files["/work/r.json"] = text
    assert writes(ask(host, "update", "-r", "r.json", "box")) == [("memory.soft_limit_in_bytes", "1048576"), ("pids.max", "5")]
    host.known["stdin:"] = [b"0", text.encode()]
    stdin = Host("running")
    stdin.stdin = lambda: text.encode()  # type: ignore[method-assign]
    assert writes(ask(stdin, "update", "--resources", "-", "box")) == writes(ask(host, "update", "-r", "r.json", "box"))


def test_the_configuration_remembers() -> None:
    plan = ask(Host("running"), "update", "--pids-limit", "5", "box")
    written = plan.named("write_file")[0].args[1]
    assert isinstance(written, bytes) and json.loads(written)["linux"]["resources"]["pids"] == {"limit": 5}


def test_a_limit_below_the_usage_is_refused_when_asked() -> None:
    host = Host("running")
    host.files[f"{MEMORY}/memory.usage_in_bytes"] = "5000000"
    host.files["/work/r.json"] = json.dumps({"memory": {"limit": 1 << 20, "checkBeforeUpdate": True}})
    with pytest.raises(InvalidArgument, match="unable to set memory limit to 1048576 \\(current usage: 5000000\\)"):
        ask(host, "update", "-r", "r.json", "box")


@pytest.mark.parametrize(("words", "why"), [
    (("--memory", "lots"), "invalid value 'lots' for --memory"),
    (("--l3-cache-schema", "L3:0=f"), "linux.intelRdt: there is no resctrl"),
    (("--mem-bw-schema", "L3:0=f"), "memBwSchema: must be one line that begins with MB:"),
    (("--blkio-weight", "5"), "^resources.blockIO.weight: must be from 10 to 1000"),
    (("-r", "absent"), "no such file"),
    (("--memory", "64m", "--memory-swap", "32m"), "memory.swap"),
])
def test_what_makes_no_sense(words: tuple[str, ...], why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        ask(Host("running"), "update", *words, "box")


def test_a_stopped_container_has_no_limits_to_change() -> None:
    for command in (("update", "--pids-limit", "5"), ("events",)):
        with pytest.raises(InvalidArgument, match="not running"):
            ask(Host("stopped"), *command, "box")


@pytest.mark.parametrize(("text", "number"), [("5s", 5000), ("500ms", 500), ("1m30s", 90_000), ("1.5s", 1500), ("1h", 3_600_000)])
def test_durations(text: str, number: int) -> None:
    assert milliseconds(text) == number


@pytest.mark.parametrize("text", ["", "5", "s", "0s", "5x", "1..5s", "-1s"])
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(InvalidArgument):
        milliseconds(text)


def events(host: Host, cursor: bytes = b"") -> P.Plan:
    request = {"argv": [b"x", b"--root", b"/run", b"events", b"--interval", b"2s", b"box"], "env": [], "cwd": [b"/"], "uid": [b"0"],
               "gid": [b"0"], "now": [b"0"], "machine": [b"x86_64"], **({"again": [cursor]} if cursor else {})}
    plan, _ = compile_request(request, host)
    assert plan is not None
    return plan


def test_events_count_down_and_tell_oom_kills() -> None:
    host = Host("running")
    host.files[f"{MEMORY}/memory.oom_control"] = "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"
    host.files[f"{MEMORY}/memory.usage_in_bytes"] = "4096"
    first = events(host)
    assert not first.named("print") and first.named("again")[0].args == (1000, "3 1000")
    host.files[f"{MEMORY}/memory.oom_control"] = "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n"
    second = events(host, b"3 1000")
    assert json.loads(str(second.named("print")[0].args[1])) == {"type": "oom", "id": "box"}
    assert second.named("again")[0].args == (1000, "4 0")
    third = events(host, b"4 0")
    line = json.loads(str(third.named("print")[0].args[1]))
    assert line["type"] == "stats" and line["data"]["memory"]["usage"]["usage"] == 4096
    assert third.named("again")[0].args == (1000, "4 1000")
    host = Host("stopped")
    assert events(host, b"4 0").ops == []


def test_statistics_of_v2() -> None:
    from dolium.runtime.statistics import UNLIMITED_V2, Folders, statistics

    host = Host("running", config())
    base = "/sys/fs/cgroup/dolium/box"
    host.files |= {f"{base}/cpu.stat": "usage_usec 7\nuser_usec 4\nsystem_usec 3\nnr_periods 2\nnr_throttled 1\nthrottled_usec 9\n",
                   f"{base}/cpu.pressure": "some avg10=0.50 avg60=1.00 avg300=0.00 total=12\n",
                   f"{base}/cpuset.cpus.effective": "0-2,5\n", f"{base}/memory.swap.max": "max\n", f"{base}/memory.swap.current": "1\n",
                   f"{base}/io.stat": "8:0 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=9 dios=9\n254:1\n",
                   f"{base}/hugetlb.2MB.current": "0\n", f"{base}/hugetlb.2MB.events": "max 3\n",
                   f"{base}/memory.current": "10\n", f"{base}/memory.max": "max\n", f"{base}/memory.stat": "file 3\n",
                   f"{base}/pids.current": "2\n", f"{base}/pids.max": "max\n"}
    shown = statistics(Folders(host, V2, [base]), ["1GB", "2MB"])
    assert shown["cpu"] == {"usage": {"total": 7000, "kernel": 3000, "user": 4000},
                            "throttling": {"periods": 2, "throttledPeriods": 1, "throttledTime": 9000},
                            "psi": {"some": {"avg10": 0.5, "avg60": 1.0, "avg300": 0.0, "total": 12}}}
    assert shown["memory"]["usage"] == {"usage": 10, "limit": UNLIMITED_V2, "failcnt": 0} and shown["memory"]["cache"] == 3
    assert shown["memory"]["swap"] == {"usage": 11, "limit": UNLIMITED_V2, "failcnt": 0}
    assert shown["pids"] == {"current": 2} and shown["cpuset"]["cpus"] == [0, 1, 2, 5] and "mems" not in shown["cpuset"]
    assert shown["blkio"] == {"ioServiceBytesRecursive": [{"major": 8, "op": "Read", "value": 4096}, {"major": 8, "op": "Write"}],
                              "ioServicedRecursive": [{"major": 8, "op": "Read", "value": 1}, {"major": 8, "op": "Write"}]}
    assert shown["hugetlb"] == {"2MB": {"failcnt": 3}}


def test_schemata_of_a_class_are_changed_and_one_of_its_own_is_made() -> None:
    root = "/sys/fs/resctrl"
    for given, folder in ((config(linux={"intelRdt": {"closID": "gold"}}), f"{root}/gold"), (config(), f"{root}/box")):
        host = Host("running", given)
        host.stats[f"{root}/schemata"] = b"33188 0 0 0"
        if folder.endswith("gold"):
            host.files[f"{folder}/schemata"] = "    L3:0=ff;1=ff\n    MB:0=100\n"
        plan = ask(host, "update", "--l3-cache-schema", "L3:0=f", "--mem-bw-schema", "MB:0=20", "box")
        put = [op.args[:2] for op in plan.stage(P.PARENT_BEFORE_CLONE) if op.name == "cg_write"]
        assert put == [(f"{folder}/schemata", "L3:0=f\n"), (f"{folder}/schemata", "MB:0=20\n")]
        back = [op.args[1] for op in plan.stage(P.ON_FAILURE) if op.name == "cg_write"]
        assert back == ([b"L3:0=ff;1=ff\n", b"MB:0=100\n"] if folder.endswith("gold") else [])
        assert [op.name for op in plan.stage(P.ON_FAILURE) if op.name == "cg_rmdir"] == ([] if back else ["cg_rmdir"])
        kept = json.loads(plan.named("write_file")[-1].args[1])  # type: ignore[arg-type]
        assert kept["linux"]["intelRdt"] | {"l3CacheSchema": "L3:0=f", "memBwSchema": "MB:0=20"} == kept["linux"]["intelRdt"]
