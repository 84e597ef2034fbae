"""What the kernel's calls are given for scheduling, priorities, affinity, personality and memory policy."""

from __future__ import annotations

import struct

import pytest
from hosts import V1, FakeFacts, config
from hypothesis import given
from hypothesis import strategies as st

from dolium.errors import InvalidArgument
from dolium.runtime import attributes
from dolium.runtime.compile import Launch, compile_container, compile_exec


def test_sched_attr_is_laid_out_as_the_kernel_has_it() -> None:
    data = attributes.scheduler({"policy": "SCHED_BATCH", "nice": -5, "flags": ["SCHED_FLAG_RESET_ON_FORK"]}, "f")
    assert struct.unpack("=IIQiIQQQ", data) == (48, 3, 1, -5, 0, 0, 0, 0)
    data = attributes.scheduler({"policy": "SCHED_DEADLINE", "runtime": 1, "deadline": 2, "period": 3}, "f")
    assert struct.unpack("=IIQiIQQQ", data) == (48, 6, 0, 0, 0, 1, 2, 3)


def test_io_priority_is_packed() -> None:
    assert attributes.io_priority({"class": "IOPRIO_CLASS_BE", "priority": 4}, "f") == 0x4004
    assert attributes.io_priority({"class": "IOPRIO_CLASS_IDLE"}, "f") == 0x6000


@given(st.sets(st.integers(0, 300), min_size=1))
def test_masks(members: set[int]) -> None:
    text = ",".join(map(str, sorted(members)))
    data = attributes.mask(attributes.numbers(text, "f"))
    assert len(data) % 8 == 0
    assert {number for number in range(len(data) * 8) if data[number // 8] >> number % 8 & 1} == members


@pytest.mark.parametrize("text", ["", "-", "1-", "-1", "3-1", "a", "1,,2", "9999999", "\u0661"])
def test_lists_that_are_none(text: str) -> None:
    with pytest.raises(InvalidArgument):
        attributes.numbers(text, "f")


def test_memory_policies() -> None:
    assert attributes.memory_policy({"mode": "MPOL_LOCAL"}, "f") == (4, b"")
    mode, nodes = attributes.memory_policy({"mode": "MPOL_BIND", "nodes": "0-1", "flags": ["MPOL_F_STATIC_NODES"]}, "f")
    assert mode == 2 | 1 << 15 and nodes == b"\x03" + bytes(15)


def test_where_they_stand_in_a_plan() -> None:
    made = config(linux={"personality": {"domain": "LINUX32"}, "memoryPolicy": {"mode": "MPOL_DEFAULT"}})
    made["process"] |= {"scheduler": {"policy": "SCHED_OTHER", "nice": 3}, "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 2},
                        "execCPUAffinity": {"initial": "0", "final": "1"}}
    names = [op.name for op in compile_container(made, FakeFacts(), Launch("c", "/b", V1)).ops]
    assert names.index("scheduler") < names.index("io_priority") < names.index("user")
    assert "personality" in names and "memory_policy" in names and "affinity" not in names  # init is not placed
    plan = compile_exec(made, made["process"], FakeFacts(), 5, 6, Launch("c", "/b", V1), V1.paths("/x"))
    names = [op.name for op in plan.ops]
    first, second = (number for number, name in enumerate(names) if name == "affinity")
    joins = [number for number, name in enumerate(names) if name == "cg_join"]
    assert first < min(joins) and max(joins) < second and "personality" in names
    assert [op.args[0] for op in plan.named("affinity")] == [b"\x01" + bytes(7), b"\x02" + bytes(7)]


def test_an_idmapped_mount_has_its_own_user_namespace_or_the_containers() -> None:
    maps = [{"containerID": 0, "hostID": 1000, "size": 10}]
    facts = FakeFacts(stats={"/src": b"16877 0 0 0"})
    entry = {"destination": "/x", "type": "bind", "source": "/src", "options": ["rbind"], "uidMappings": maps, "gidMappings": maps}
    plan = compile_container(config(mounts=[entry]), facts, Launch("c", "/b", V1))
    (made,) = plan.named("user_namespace")
    assert made.args[1:] == ("0 1000 10\n", "0 1000 10\n")
    mapped = next(op for op in plan.named("mount_attr") if op.args[5] == made.args[0])
    assert mapped.args[4] == 0 and plan.ops.index(made) < plan.ops.index(mapped)
    entry = {"destination": "/x", "type": "bind", "source": "/src", "options": ["rbind", "ridmap"]}
    own = config(mounts=[entry], linux={"uidMappings": maps, "gidMappings": maps})
    own["linux"]["namespaces"].append({"type": "user"})
    plan = compile_container(own, facts, Launch("c", "/b", V1))
    (made,) = plan.named("user_namespace")
    assert next(op for op in plan.named("mount_attr") if op.args[5] == made.args[0]).args[4] == 1
