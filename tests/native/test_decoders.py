"""The C decoders with address and undefined-behaviour sanitizers: what Python encodes, and mutations of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from building import build, output
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dolium.runtime import plan as P
from dolium.runtime.wire import decode_fields, encode_fields

NUMBERS = [0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, 65537, 0]
FEW = settings(max_examples=60, deadline=None,
               suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def plan_check(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("plan"), "plan_check", ["executor/plan.c"])


@pytest.fixture(scope="module")
def fields_check(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("fields"), "fields_check", ["executor/fields.c", "executor/plan.c"])


ARGUMENTS = {
    "i": st.integers(-(1 << 63), (1 << 63) - 1),
    "s": st.binary(max_size=40),
    "l": st.lists(st.binary(max_size=12), max_size=4),
}
LABEL = st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=12)


@st.composite
def plans(draw: st.DrawFn) -> P.Plan:
    plan = P.Plan(draw(st.integers(0, 0xFFFF)))
    for name in draw(st.lists(st.sampled_from(sorted(P.OPS)), max_size=6)):
        arguments = [draw(ARGUMENTS[kind]) for kind in P.OPS[name][1]]
        plan.add(draw(st.integers(0, len(P.STAGES) - 1)), name, draw(LABEL), *arguments, optional=draw(st.booleans()))
    return plan


def shown(plan: P.Plan) -> bytes:
    """What plan_check prints for a plan."""
    def one(value: object) -> bytes:
        if isinstance(value, int):
            return b" %d" % value
        if isinstance(value, bytes):
            return b" %d:%s" % (len(value), value.hex().encode())
        assert isinstance(value, list)
        return b" [" + b"".join(one(item) for item in value) + b" ]"

    lines = [b"plan %d %d" % (plan.flags, len(plan.ops))]
    lines += [f"{op.name} {op.stage} {op.flags} {op.label}".encode() + b"".join(one(arg) for arg in op.args)
              for op in plan.ops]
    return b"\n".join(lines) + b"\n"


@FEW
@given(plan=plans())
def test_c_reads_what_python_writes(plan_check: Path, plan: P.Plan) -> None:
    assert output(plan_check, plan.encode()) == shown(plan)


@st.composite
def mutated(draw: st.DrawFn, good: bytes) -> bytes:
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["set", "cut", "insert", "u32"]))
        at = draw(st.integers(0, max(0, len(data) - 1)))
        if kind == "set" and data:
            data[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, 8))]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=8))
        else:
            number = draw(st.sampled_from(NUMBERS))
            data[at : at + 4] = number.to_bytes(4, "little")
    return bytes(data)


@FEW
@given(data=st.data())
def test_no_plan_crashes_the_decoder(plan_check: Path, data: st.DataObject) -> None:
    plan = data.draw(plans())
    bad = data.draw(mutated(plan.encode()))
    printed = output(plan_check, bad)
    assert printed.startswith((b"refused: ", b"plan "))


@pytest.mark.parametrize(("data", "why"), [
    (b"", "not a launch plan"), (b"DOLX", "not a launch plan"), (b"DOLM\x02\0", "another version"), (b"DOLM\x01\0", "cut short"),
    (b"DOLM\x01\0\0\0\xff\xff\xff\xff", "too many operations"), (b"DOLM\x01\0\0\0\x01\0\0\0", "cut short"),
    (b"DOLM\x01\0\0\0\0\0\0\0x", "bytes left over"),
    (b"DOLM\x01\0\0\0\x01\0\0\0" + b"\xff\xff\0\0\0\0\0\0", "unknown operation"),
    (b"DOLM\x01\0\0\0\x01\0\0\0" + b"\x11\0\x0a\0\0\0\0\0", "unknown stage"),
    (b"DOLM\x01\0\0\0\x01\0\0\0" + b"\x11\0\0\0\0\0\0\0", "malformed argument"),
])
def test_what_the_decoder_says(plan_check: Path, data: bytes, why: str) -> None:
    assert why in output(plan_check, data).decode()


FIELDS = st.dictionaries(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=8),
                         st.lists(st.binary(max_size=20), max_size=4), max_size=5)


@FEW
@given(fields=FIELDS)
def test_fields_both_ways(fields_check: Path, fields: dict[str, list[bytes]]) -> None:
    body = encode_fields(fields)
    lines = output(fields_check, body).decode().splitlines()
    assert lines[:-2] == [" ".join([key, *(str(len(value)) for value in values)]) for key, values in fields.items()]
    assert lines[-2] == "same" and decode_fields(body) == fields


@FEW
@given(data=st.data())
def test_no_fields_crash_the_decoder(fields_check: Path, data: st.DataObject) -> None:
    body = encode_fields({**data.draw(FIELDS), "argv": ["a", "b"], "uid": "7"})
    assert output(fields_check, data.draw(mutated(body)))
