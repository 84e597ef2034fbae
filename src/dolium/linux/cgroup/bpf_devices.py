"""Device rules as a BPF_PROG_TYPE_CGROUP_DEVICE program (cgroup v2 has no devices controller). Pure. Cold module.

The context (struct bpf_cgroup_dev_ctx): access_type (type in the low 16 bits: 1 block, 2 character; access in the high:
1 mknod, 2 read, 4 write), major, minor. The program tests the rules from the last to the first, as a later rule wins,
and denies what none allows.
"""

from __future__ import annotations

from dolium.linux.cgroup.v1 import DEFAULT_DEVICES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_ACCESS = {"m": 1, "r": 2, "w": 4}
_KIND = {"b": 1, "c": 2}


def _instruction(code: int, dst: int = 0, src: int = 0, offset: int = 0, immediate: int = 0) -> bytes:
    return (bytes((code, src << 4 | dst)) + offset.to_bytes(2, "little", signed=True)
            + (immediate & 0xFFFFFFFF).to_bytes(4, "little"))


def program(rules: list[dict[str, Any]]) -> bytes:
    """The program for ``linux.resources.devices`` and the devices every container may use; 8 bytes an instruction."""
    ordered = [*rules, *({"allow": True, "type": kind, "major": major, "minor": minor, "access": access}
                         for kind, major, minor, access in DEFAULT_DEVICES)]
    code = [
        _instruction(0x61, dst=2, src=1, offset=0),  # r2 = access_type
        _instruction(0xBC, dst=3, src=2),  # w3 = w2
        _instruction(0x54, dst=2, immediate=0xFFFF),  # w2 &= 0xffff: the type
        _instruction(0x74, dst=3, immediate=16),  # w3 >>= 16: the access
        _instruction(0x61, dst=4, src=1, offset=4),  # r4 = major
        _instruction(0x61, dst=5, src=1, offset=8),  # r5 = minor
    ]
    for rule in reversed(ordered):
        tests = _tests(rule)
        code += _decision(tests, bool(rule.get("allow")))
        if not tests:  # nothing comes behind a rule for all devices: the verifier refuses what cannot be reached (EINVAL)
            break
    else:
        code += _decision([], False)
    return b"".join(code)


def _tests(rule: dict[str, Any]) -> list[tuple[bytes, ...]]:
    """Each ends with a jump that leaves the rule; ``_decision`` fills its offset in. None: the rule is for every device."""
    tests: list[tuple[bytes, ...]] = []
    kind = rule.get("type") or "a"
    if kind in _KIND:
        tests.append((_instruction(0x55, dst=2, immediate=_KIND[kind]),))  # if r2 != kind
    access = sum(_ACCESS[letter] for letter in set(rule.get("access") or "rwm"))
    if access != 7:
        # for an allow, all that is asked must be granted; for a deny, any part is enough
        if rule.get("allow"):
            tests.append((_instruction(0xBC, dst=1, src=3), _instruction(0x54, dst=1, immediate=access),
                          _instruction(0x5D, dst=1, src=3)))  # if (r3 & access) != r3
        else:
            tests.append((_instruction(0xBC, dst=1, src=3), _instruction(0x54, dst=1, immediate=access),
                          _instruction(0x15, dst=1, immediate=0)))  # if (r3 & access) == 0
    for register, value in ((4, rule.get("major")), (5, rule.get("minor"))):
        if value is not None and value >= 0:
            tests.append((_instruction(0x55, dst=register, immediate=value),))
    return tests


def _decision(tests: list[tuple[bytes, ...]], allow: bool) -> list[bytes]:
    body = [instruction for test in tests for instruction in test]
    end = len(body) + 2
    done = []
    for index, instruction in enumerate(body):
        if instruction[0] in (0x55, 0x5D, 0x15):
            instruction = instruction[:2] + (end - index - 1).to_bytes(2, "little", signed=True) + instruction[4:]
        done.append(instruction)
    return [*done, _instruction(0xB7, dst=0, immediate=int(allow)), _instruction(0x95)]
