"""What a list of seccomp rules decides, per architecture and call, in libseccomp's order. Cold module.

seccomp(2) sees 32-bit words, so a comparison is one to three *tests* of a word, joined into a tree: ``[offset, jump,
mask, value, rank, full, yes, no]``. ``yes`` and ``no`` are None (the rule does not hold), an action (int), or a level: a
list of tests of which the first that leads to an action decides. Levels are kept in libseccomp's order, because where
two conditional rules overlap that order is the precedence, not the order in the profile:

- a later argument before an earlier one, its high word before its low one;
- then equality (EQ, NE, MASKED_EQ) before LE and LT before GE and GT;
- then the larger value first, for LE and LT the smaller one; what is equal keeps the order of the profile.

A call's rule without conditions beats all that have some; of several without conditions the first holds. A rule is
**dropped**, on every architecture, where libseccomp calls it a conflict (EEXIST): it takes another action on exactly the
words an earlier rule ends on, or it would swallow an earlier, longer rule with another action.
"""

from __future__ import annotations

from dolium.linux.syscall_numbers import NUMBERS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Test = list[Any]
    Level = list[Test]
    Comparison = tuple[int, str, int, int]
    Rule = tuple[int, list[Comparison]]
    Calls = dict[int, "int | Level"]

EQ, GT, GE, MASKED = "eq", "gt", "ge", "masked"
OFFSET, JUMP, MASK, VALUE, RANK, FULL, YES, NO = range(8)
WIDE = {"x86_64": True, "aarch64": True, "i386": False, "x32": False, "arm": False}
"""Whether arguments are compared with 64 bits. Of x32, libseccomp compares the low halves only, as of i386 and arm."""

# linux/net.h and linux/ipc.h: i386 has these behind one call too, which of them being its first argument.
_SOCKETCALL, _IPC = 102, 117
_MULTIPLEXED = {
    _SOCKETCALL: {"socket": 1, "bind": 2, "connect": 3, "listen": 4, "accept": 5, "getsockname": 6, "getpeername": 7,
                  "socketpair": 8, "send": 9, "recv": 10, "sendto": 11, "recvfrom": 12, "shutdown": 13, "setsockopt": 14,
                  "getsockopt": 15, "sendmsg": 16, "recvmsg": 17, "accept4": 18, "recvmmsg": 19, "sendmmsg": 20},
    _IPC: {"semop": 1, "semget": 2, "semctl": 3, "semtimedop": 4, "msgsnd": 11, "msgrcv": 12, "msgget": 13, "msgctl": 14,
           "shmat": 21, "shmdt": 22, "shmget": 23, "shmctl": 24},
}
_FULL = (1 << 64) - 1
_HALF = (1 << 32) - 1


class _Conflict(Exception):
    """The rule disagrees with an earlier one on the same words."""


def known_names() -> set[str]:
    """Every call that some architecture has."""
    return set().union(*_MULTIPLEXED.values(), *NUMBERS.values())


def multiplexed(architecture: str, name: str) -> bool:
    """Whether the call is behind socketcall or ipc there; runc's rule for newer calls does not see its own number then."""
    return architecture == "i386" and any(name in names for names in _MULTIPLEXED.values())


def decide(rules: list[tuple[int, str, list[Comparison]]], architectures: list[str]) -> dict[str, Calls]:
    """Architecture to (number to what is decided there: an action, or a level of tests).

    ``rules``: action, call, comparisons (argument 0 to 5, at most one each; operator without its prefix; value, value two).
    """
    calls: dict[str, Calls] = {architecture: {} for architecture in architectures}
    entered: dict[tuple[str, int], list[Rule]] = {}
    for action, name, comparisons in rules:
        ordered = sorted(comparisons, key=_argument)
        changed: list[tuple[str, int, int | Level, list[Rule]]] = []
        try:
            for architecture in architectures:
                wide = WIDE[architecture]
                for number, added in _places(architecture, name, ordered):
                    found = calls[architecture].get(number)
                    before = entered.get((architecture, number)) or []
                    if isinstance(found, int) or any(_says(added, action, old) for old in before):
                        continue
                    decision = _tree(added, action, wide)
                    kept = [old for old in before if not _says(old[1], old[0], (action, added))]
                    if not isinstance(decision, int):
                        level: Level = [] if len(kept) < len(before) else _copy(found or [])
                        for old_action, old in kept if len(kept) < len(before) else []:
                            _insert(level, _tree(old, old_action, wide))
                        _insert(level, decision)
                        decision = level
                    changed.append((architecture, number, decision, [*kept, (action, added)]))
        except _Conflict:
            continue
        for architecture, number, decision, kept in changed:
            calls[architecture][number] = decision
            entered[architecture, number] = kept
    return calls


def _argument(comparison: Comparison) -> int:
    return comparison[0]


def _says(comparisons: list[Comparison], action: int, other: Rule) -> bool:
    """Whether the other rule says the same with fewer comparisons, and is asked before: this one is no rule of its own then,
    and nothing conflicts with it."""
    return other[0] == action and any(comparisons[at : at + len(other[1])] == other[1] for at in range(1, len(comparisons)))


def _places(architecture: str, name: str, comparisons: list[Comparison]) -> list[tuple[int, list[Comparison]]]:
    """Where a rule for a call goes: (number, comparisons), none when the architecture has no such call.

    Behind socketcall and ipc only the first argument, which call it is, is replaced: a comparison of any other argument
    is kept as it is, though there it no longer compares the call's own argument. libseccomp does the same.
    """
    places = []
    if architecture == "i386":
        for number, names in _MULTIPLEXED.items():
            if name in names:
                places.append((number, [(0, "EQ", names[name], 0), *(one for one in comparisons if one[0] != 0)]))
    direct = NUMBERS[architecture].get(name)
    if direct is not None:
        places.append((direct, comparisons))
    return places


def _tree(comparisons: list[Comparison], action: int, wide: bool) -> int | Test:
    """The tests of a rule: all comparisons must hold for its action."""
    if not comparisons:
        return action
    index, operator, value, other = comparisons[0]
    rest = comparisons[1:]
    if operator == "MASKED_EQ" and not value & (_FULL if wide else _HALF):
        return _tree(rest, action, wide)  # nothing is compared

    def goal() -> int | Level:
        tree = _tree(rest, action, wide)
        return tree if isinstance(tree, int) else [tree]

    mask = _FULL
    if operator == "MASKED_EQ":
        mask, value = value, other
    value &= mask
    low, high = 16 + 8 * index, 20 + 8 * index
    group = 2 if operator in ("LE", "LT") else 1 if operator in ("GE", "GT") else 3

    def test(offset: int, jump: str, yes: int | Level | None, no: int | Level | None) -> Test:
        shift = 32 if offset == high else 0
        word = value >> shift & _HALF
        # among LE and LT the smaller value comes first
        rank = (offset, group, -word if group == 2 else word)
        return [offset, jump, mask >> shift & _HALF, word, rank, value, yes, no]

    equal = operator in ("EQ", "NE", "MASKED_EQ")
    inverted = operator in ("NE", "LT", "LE")
    same = MASKED if operator == "MASKED_EQ" else EQ
    last = same if equal else GT if operator in ("GT", "LE") else GE
    lowest = test(low, last, None, goal()) if inverted else test(low, last, goal(), None)
    if not wide:
        return lowest
    above = test(high, same, [lowest], goal() if inverted else None)
    return above if equal else test(high, GT, None if inverted else goal(), [above])


def _copy(level: Level) -> Level:
    return [[*one[:YES], *(_copy(way) if isinstance(way, list) else way for way in one[YES:])] for one in level]


def _insert(level: Level, new: int | Test) -> None:
    """Put a rule's test, and what hangs on it, among those of a level."""
    assert not isinstance(new, int)
    for at, old in enumerate(level):
        if old[:RANK] == new[:RANK]:
            _merge(old, new)
            return
        if old[RANK] < new[RANK]:
            level.insert(at, new)
            return
    level.append(new)


def _merge(old: Test, new: Test) -> None:
    """The same word is tested the same way: join what follows."""
    for way in (YES, NO):
        there, action = old[way], new[way]
        if not isinstance(action, int) or there == action:
            continue
        if there is None or isinstance(there, list):
            if not _only(there or [], action):
                raise _Conflict
            old[way] = action
        else:
            _settle(old, new, way)
    for way in (YES, NO):
        there, added = old[way], new[way]
        if not isinstance(added, list):
            continue
        if isinstance(there, int):
            return  # decided already by the shorter rule
        if there is None:
            old[way] = added
        else:
            _insert(there, added[0])


def _settle(old: Test, new: Test, way: int) -> None:
    """Two actions at one place. On a high word the full values may still differ: the larger one's rule is the narrower."""
    if old[OFFSET] % 8 == 4 and way == YES and new[FULL] > old[FULL]:
        old[way] = new[way]
    if not any(isinstance(one, list) for one in old[YES:]) or not any(isinstance(one, list) for one in new[YES:]):
        raise _Conflict


def _only(level: Level, action: int) -> bool:
    """Whether a level leads to no other action."""
    return all(way is None or way == action if not isinstance(way, list) else _only(way, action)
               for one in level for way in one[YES:])
