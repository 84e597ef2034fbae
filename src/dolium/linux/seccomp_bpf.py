"""Decisions to a classic BPF program: a balanced tree of ranges of call numbers with tests of arguments at its leaves. Cold.

The program is written from its end, so that every jump's target is known; a condition jumps at most 255 instructions
forwards, beyond that by a copy of the return or an unconditional jump. Equal leaves are written once.
"""

from __future__ import annotations

from dolium.linux.seccomp_rules import EQ, GE, GT, JUMP, MASK, MASKED, NO, OFFSET, VALUE, YES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dolium.linux.seccomp_rules import Level, Test

    Ranges = list[tuple[int, int | Level]]

LOAD, RETURN, ALWAYS, AND = 0x20, 0x06, 0x05, 0x54  # LD|W|ABS, RET|K, JMP|JA, ALU|AND|K
_JUMPS = {EQ: 0x15, MASKED: 0x15, GT: 0x25, GE: 0x35}
_WORD = (1 << 32) - 1
_REACH = 255
LIMIT = 4096
"""BPF_MAXINSNS: the longest program seccomp(2) takes, in instructions."""


class _Program:
    """Instructions from the last to the first. A label is the number of instructions that follow what it names."""

    def __init__(self) -> None:
        self.code: list[bytes] = []
        self.returns: dict[int, int] = {}  # action -> the nearest label that returns it
        self.actions: dict[int, int] = {}  # label -> the action it returns
        self.loads: dict[int, int] = {}  # label -> what is loaded there
        self.nearer: dict[int, int] = {}  # label -> the nearest jump to it
        self.blocks: dict[Any, int] = {}

    def put(self, code: int, k: int, yes: int = 0, no: int = 0) -> int:
        self.code.append(code.to_bytes(2, "little") + bytes((yes, no)) + k.to_bytes(4, "little"))
        return len(self.code) - 1

    def finish(self, action: int) -> int:
        """A label that returns the action."""
        label = self.returns.get(action)
        if label is None or len(self.code) - label > _REACH - 2:
            label = self.returns[action] = self.put(RETURN, action)
            self.actions[label] = action
        return label

    def near(self, label: int) -> int:
        """The label, or one that leads to it and that the next instructions can jump to."""
        label = self.nearer.get(label, label)
        if len(self.code) - label <= _REACH - 2:
            return label
        if label in self.actions:
            return self.finish(self.actions[label])
        first = label
        while self.code[first][0] == ALWAYS:  # no jump to a jump
            first -= 1 + int.from_bytes(self.code[first][4:], "little")
        jump = self.put(ALWAYS, len(self.code) - first - 1)
        self.nearer[label] = self.nearer[first] = jump
        return jump

    def branch(self, jump: str, value: int, yes: int, no: int) -> int:
        if yes == no:
            return yes
        yes, no = self.near(yes), self.near(no)  # each may put one instruction: near() leaves room for it
        here = len(self.code)
        return self.put(_JUMPS[jump], value, here - yes - 1, here - no - 1)

    def load(self, offset: int, label: int) -> int:
        """Load a word, then go on at the label, which was put last."""
        if label != len(self.code) - 1:
            self.put(ALWAYS, len(self.code) - label - 1)
        made = self.put(LOAD, offset)
        self.loads[made] = offset
        return made

    def level(self, tests: Level, otherwise: int) -> int:
        """The first test that leads to an action decides; ``otherwise``: where to go when none does."""
        for one in reversed(tests):
            otherwise = self.test(one, otherwise)
        return otherwise

    def test(self, one: Test, otherwise: int) -> int:
        key = (repr(one[:4]), repr(one[YES:]), otherwise)
        if key in self.blocks:
            return self.blocks[key]
        offset, mask = one[OFFSET], one[MASK]
        ways = []
        for way in (one[YES], one[NO]):
            label = otherwise
            if isinstance(way, int):
                label = self.finish(way)
            elif way is not None:
                label = self.level(way, otherwise)
            if mask == _WORD and self.loads.get(label) == offset:
                label -= 1  # the word is in the accumulator
            ways.append(label)
        if ways[0] == ways[1] or not mask:  # no bit of this half is compared
            label = ways[0]
        else:
            label = self.branch(one[JUMP], one[VALUE], *ways)
            if mask != _WORD:
                label = self.put(AND, mask)
            label = self.load(offset, label)
        self.blocks[key] = label
        return label

    def ranges(self, ranges: Ranges, default: int) -> int:
        """A balanced tree over ``(first number, decision)``; the accumulator holds the number."""
        if len(ranges) == 1:
            decision = ranges[0][1]
            return self.finish(decision) if isinstance(decision, int) else self.level(decision, self.finish(default))
        middle = len(ranges) // 2
        high = self.ranges(ranges[middle:], default)
        low = self.ranges(ranges[:middle], default)
        return self.branch(GE, ranges[middle][0], high, low)


def merged(ranges: Ranges) -> Ranges:
    """Neighbours that decide alike joined."""
    kept: Ranges = []
    for start, decision in ranges:
        if not kept or kept[-1][1] != decision:
            kept.append((start, decision))
    return kept


def _needed(code: list[bytes]) -> bytes:
    """The program without what is never reached: loads that every test jumps over, and returns that came out of reach."""
    reached = [False] * len(code)
    reached[0] = True
    for at, one in enumerate(code):
        if reached[at]:
            for target in _targets(at, one):
                reached[target] = True
    places = [0]
    for kept in reached:
        places.append(places[-1] + kept)
    made = []
    for at, one in enumerate(code):
        if not reached[at]:
            continue
        if one[0] == ALWAYS:
            one = one[:4] + (places[_targets(at, one)[0]] - places[at] - 1).to_bytes(4, "little")
        elif one[0] in _JUMPS.values():
            yes, no = (places[target] - places[at] - 1 for target in _targets(at, one))
            one = one[:2] + bytes((yes, no)) + one[4:]
        made.append(one)
    return b"".join(made)


def _targets(at: int, one: bytes) -> tuple[int, ...]:
    if one[0] == RETURN:
        return ()
    if one[0] == ALWAYS:
        return (at + 1 + int.from_bytes(one[4:], "little"),)
    if one[0] in (LOAD, AND):
        return (at + 1,)
    return at + 1 + one[2], at + 1 + one[3]


def assemble(architectures: list[tuple[int, Ranges, int]], other: int) -> bytes:
    """The program. ``architectures``: AUDIT_ARCH value, ranges from number 0 on, default action, the likeliest first;
    ``other``: the action on any other architecture. Of any length: the caller compares with LIMIT."""
    program = _Program()
    entries = []
    for audit, ranges, default in reversed(architectures):
        label = program.ranges(merged(ranges), default)
        if label not in program.actions:
            label = program.load(0, label)
        entries.append((audit, label))
    label = program.finish(other)
    for audit, entry in entries:
        label = program.branch(EQ, audit, entry, label)
    program.load(4, label)
    return _needed(program.code[::-1])
