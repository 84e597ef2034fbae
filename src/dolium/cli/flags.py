"""Command lines: flags as a table, one parser, help that teaches. argparse costs 10 ms of every start."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class UsageError(Exception):
    """A command line that makes no sense; the message says why."""


class Flag:
    """``names``: ``-e --env``; ``kind``: bool, str, int, list; ``help``: a few words; ``metavar``: what the value is."""

    __slots__ = ("default", "help", "key", "kind", "metavar", "names")

    def __init__(self, names: str, kind: str, text: str, metavar: str = "", *, default: bool = False) -> None:
        self.names = names.split()
        self.kind = kind
        self.help = text
        self.default = default  # of a bool
        self.metavar = metavar or {"str": "TEXT", "int": "N", "list": "TEXT"}.get(kind, "")
        self.key = self.names[-1].lstrip("-").replace("-", "_")


class Command:
    """One command: its flags, what it takes, what it does, examples for its help."""

    __slots__ = ("about", "arguments", "examples", "flags", "interspersed", "maximum", "minimum", "name")

    def __init__(self, name: str, arguments: str, about: str, flags: list[Flag], *, minimum: int = 0,
                 maximum: int | None = None, interspersed: bool = True, examples: list[str] | None = None) -> None:
        self.name = name
        self.arguments = arguments
        self.about = about
        self.flags = flags
        self.minimum = minimum
        self.maximum = maximum
        self.interspersed = interspersed  # False: flags end at the first argument (run, exec, create)
        self.examples = examples or []

    def usage(self) -> str:
        """The help text."""
        lines = [f"usage: dolium {self.name} [flags] {self.arguments}".rstrip(), "", self.about]
        if self.examples:
            lines += ["", "examples:", *(f"  {example}" for example in self.examples)]
        if self.flags:
            lines += ["", "flags:"]
            left = [", ".join(flag.names) + (f" {flag.metavar}" if flag.kind != "bool" else "") for flag in self.flags]
            width = min(max(map(len, left)), 34)
            lines += [f"  {names:<{width}}  {flag.help}" for names, flag in zip(left, self.flags, strict=True)]
        return "\n".join(lines) + "\n"

    def parse(self, words: list[str]) -> tuple[dict[str, Any], list[str]]:
        """(flags by key, arguments). Raises UsageError."""
        table = {name: flag for flag in self.flags for name in flag.names}
        found: dict[str, Any] = {flag.key: [] if flag.kind == "list" else flag.default if flag.kind == "bool" else None
                                 for flag in self.flags}
        arguments: list[str] = []
        index = 0
        while index < len(words):
            word = words[index]
            index += 1
            if word == "--":
                arguments += words[index:]
                break
            if not word.startswith("-") or word == "-":
                arguments.append(word)
                if not self.interspersed:
                    arguments += words[index:]
                    break
                continue
            index = self._flag(word, words, index, table, found)
        if found.get("help"):
            return found, arguments
        if len(arguments) < self.minimum or (self.maximum is not None and len(arguments) > self.maximum):
            raise UsageError(f"dolium {self.name} takes {self.arguments or 'no arguments'}")
        return found, arguments

    def _flag(self, word: str, words: list[str], index: int, table: dict[str, Flag], found: dict[str, Any]) -> int:
        name, equals, value = word.partition("=")
        if name in ("-h", "--help") and name not in table:
            found["help"] = True
            return index
        if not word.startswith("--") and len(name) > 2 and name not in table:
            return self._short(word, words, index, table, found)
        flag = table.get(name)
        if flag is None:
            raise UsageError(f"unknown flag: {name}")
        if flag.kind == "bool":
            found[flag.key] = value.lower() not in ("false", "0") if equals else True
            return index
        if not equals:
            if index >= len(words):
                raise UsageError(f"flag needs an argument: {name}")
            value = words[index]
            index += 1
        self._store(flag, value, found)
        return index

    def _short(self, word: str, words: list[str], index: int, table: dict[str, Flag], found: dict[str, Any]) -> int:
        """-it, -p80:80, -eA=B."""
        for at, letter in enumerate(word[1:], 1):
            flag = table.get(f"-{letter}")
            if flag is None:
                raise UsageError(f"unknown shorthand flag: '{letter}' in {word}")
            if flag.kind == "bool":
                found[flag.key] = True
                continue
            rest = word[at + 1 :].removeprefix("=")
            if not rest:
                if index >= len(words):
                    raise UsageError(f"flag needs an argument: '{letter}' in {word}")
                rest = words[index]
                index += 1
            self._store(flag, rest, found)
            break
        return index

    @staticmethod
    def _store(flag: Flag, value: str, found: dict[str, Any]) -> None:
        if flag.kind == "list":
            found[flag.key].append(value)
        elif flag.kind == "int":
            try:
                found[flag.key] = int(value)
            except ValueError:
                raise UsageError(f"invalid argument {value!r} for {flag.names[-1]}: not a number") from None
        else:
            found[flag.key] = value


def pairs(values: list[str], flag: str) -> dict[str, str]:
    """What KEY=VALUE flags say; KEY alone is KEY=, as Docker has it. Raises UsageError."""
    found = {}
    for value in values:
        key, _, text = value.partition("=")
        if not key:
            raise UsageError(f"invalid argument {value!r} for {flag}: write KEY=VALUE, or KEY")
        found[key] = text
    return found
