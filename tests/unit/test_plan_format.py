"""The plan's table, binary form and text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dolium.runtime import plan as P
from dolium.runtime.wire import decode_fields, encode_fields, frame

NATIVE = Path(__file__).resolve().parents[2] / "native/executor"
ARGUMENTS = {"i": st.integers(-(1 << 63), (1 << 63) - 1), "s": st.binary(), "l": st.lists(st.binary())}


def test_c_and_python_have_one_table() -> None:
    found = re.findall(r'^OP\((\d+), (\w+), "([isl]*)"\)', (NATIVE / "ops.def").read_text(), re.MULTILINE)
    assert {name: (int(code), signature) for code, name, signature in found} == P.OPS
    assert len(found) == len(P.OPS) == len(P.NAMES)


def test_c_and_python_have_the_same_stages_and_constants() -> None:
    header = (NATIVE / "plan.h").read_text()
    listed = header[header.index("enum stage {") + 12 :]
    stages = re.findall(r"[A-Z_]+", listed[: listed.index("}")])
    assert [name.lower().replace("_", "-") for name in stages] == [*P.STAGES, "stages"]
    assert [getattr(P, name) for name in stages[:-1]] == list(range(len(P.STAGES)))
    defined = dict(re.findall(r"^#define (\w+) (\d+)", header, re.MULTILINE))
    assert {name: int(defined[name]) for name in ("PLAN_VERSION", "PLAN_SLOTS", "OP_OPTIONAL", "OP_NOTHING_OURS",
                                                  "PLAN_FLAG_OLD_MOUNT_API")} == {
        "PLAN_VERSION": P.PLAN_VERSION, "PLAN_SLOTS": P.SLOTS, "OP_OPTIONAL": P.OPTIONAL,
        "OP_NOTHING_OURS": P.NOTHING_OURS, "PLAN_FLAG_OLD_MOUNT_API": P.FLAG_OLD_MOUNT_API}
    assert f"MOUNT_COPY_UP {P.MOUNT_COPY_UP:#x}" in (NATIVE / "ops_mount.c").read_text()
    most = max(len(signature) for _, signature in P.OPS.values())
    assert most <= int(defined["PLAN_MAX_ARGS"])


@st.composite
def plans(draw: st.DrawFn) -> P.Plan:
    plan = P.Plan(draw(st.integers(0, 0xFFFF)))
    for name in draw(st.lists(st.sampled_from(sorted(P.OPS)), max_size=8)):
        plan.add(draw(st.integers(0, len(P.STAGES) - 1)), name, draw(st.text(st.characters(blacklist_categories=["Cs"]))),
                 *(draw(ARGUMENTS[kind]) for kind in P.OPS[name][1]), optional=draw(st.booleans()),
                 nothing_ours=draw(st.booleans()))
    return plan


@given(plans())
def test_round_trip(plan: P.Plan) -> None:
    again = P.decode(plan.encode())
    assert again.flags == plan.flags
    assert [(op.stage, op.name, op.label, op.args, op.flags) for op in again.ops] == \
        [(op.stage, op.name, op.label, op.args, op.flags) for op in plan.ops]


@given(plans(), st.data())
def test_a_cut_plan_is_refused(plan: P.Plan, data: st.DataObject) -> None:
    whole = plan.encode()
    with pytest.raises(ValueError, match=r"."):
        P.decode(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ValueError, match="left over"):
        P.decode(whole + b"x")


@pytest.mark.parametrize(("name", "arguments"), [
    ("hostname", ()), ("hostname", ("a", "b")), ("hostname", (1,)), ("umask", ("x",)), ("mask", ("x", 1)), ("mask", (["x"],)),
])
def test_wrong_arguments_are_refused(name: str, arguments: tuple[object, ...]) -> None:
    plan = P.Plan()
    plan.add(P.CHILD_AFTER_PIVOT, name, "label", *arguments)
    with pytest.raises(ValueError, match=name):
        plan.encode()


def test_masks_of_64_bits_and_file_names_that_are_not_utf8() -> None:
    plan = P.Plan()
    plan.add(P.CHILD_AFTER_PIVOT, "drop_bounding", "x", (1 << 64) - 1)
    plan.add(P.CHILD_AFTER_PIVOT, "cwd", "x", "/\udcff")
    mask, cwd = P.decode(plan.encode()).ops
    assert mask.args == (-1,) and cwd.args == (b"/\xff",)


def test_describe_names_stages_in_order_and_marks_what_is_optional() -> None:
    plan = P.Plan()
    plan.add(P.CHILD_AFTER_PIVOT, "pivot", "pivot_root", 0)
    plan.add(P.PARENT_BEFORE_CLONE, "clone", "clone3", 0, 0, optional=True)
    assert plan.describe() == "parent-before-clone\n  clone3 (optional)\nchild-after-pivot\n  pivot_root\n"


@given(st.dictionaries(st.text(st.characters(blacklist_categories=["Cs"])), st.lists(st.binary())))
def test_fields_round_trip(fields: dict[str, list[bytes]]) -> None:
    body = encode_fields(fields)
    assert decode_fields(body) == fields
    assert frame(body)[:4] == len(body).to_bytes(4, "little") and frame(body)[4:] == body


def test_fields_take_single_values_and_refuse_what_is_cut() -> None:
    body = encode_fields({"a": "x", "n": 5, "t": True, "l": ["p", b"q"]})
    assert decode_fields(body) == {"a": [b"x"], "n": [b"5"], "t": [b"1"], "l": [b"p", b"q"]}
    with pytest.raises(ValueError, match="malformed"):
        decode_fields(body[:-1])
