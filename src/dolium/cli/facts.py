"""One call of ``dolium`` as a pure function of what the front knows: the way a warm compiler serves it.

Every deed is a fact: a request to the daemon, a session with a container, a file that is read. The function asks for the
one it needs next, the front does it once, and the function runs again, from the start, to the next. What is printed is
a plan. A call that needs a process of the caller's own (a progress bar, an archive on standard input, a daemon to start)
is answered by Cold.
"""

from __future__ import annotations

import json

from dolium.cli.context import Context
from dolium.cli.main import run
from dolium.cli.transport import ApiError, Client, NoDaemon, Outcome, Response, checked, request_text, stream_request
from dolium.errors import DoliumError
from dolium.runtime import plan as P
from dolium.runtime.cold import serve
from dolium.runtime.facts import ENOENT, Facts, Need
from dolium.runtime.plan import Plan, encode_string

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from dolium.cli.context import Writer

ECONNREFUSED = 111


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


class Cold(Exception):
    """This call needs a process of its own."""


class _Tape:
    """A standard stream: what is written becomes operations."""

    def __init__(self, plan: Plan, fd: int) -> None:
        self._plan = plan
        self._fd = fd

    def write(self, text: str) -> int:
        """Print it when the plan runs."""
        last = self._plan.ops[-1] if self._plan.ops else None
        if last is not None and last.args[0] == self._fd:
            last.args = (self._fd, f"{last.args[1]}{text}")
        elif text:
            self._plan.add(P.PARENT_BEFORE_CLONE, "print", "print", self._fd, text)
        return len(text)

    def flush(self) -> None:
        """Operations run in their order."""


class CallerContext(Context):
    """A caller that is known by its request."""

    __slots__ = ("_facts", "_now", "_size", "_terminals", "deeds")

    def __init__(self, request: dict[str, list[bytes]], facts: Facts, stdout: Writer, stderr: Writer) -> None:
        words = [_text(word) for word in request["argv"]]
        env = dict(_text(entry).partition("=")[::2] for entry in request["env"])
        super().__init__(words, env, _text(request.get("cwd", [b"/"])[0]), stdout, stderr)
        self._facts = facts
        self._now = int(request["now"][0]) + int(request["nanoseconds"][0]) / 1e9
        self._terminals = [value == b"1" for value in request["tty"]]
        self._size = int(request["rows"][0]), int(request["columns"][0])
        self.deeds = 0  # requests so far that may have changed something

    def own_process(self) -> None:
        """Raises Cold; an ApiError when something was done already, which a second process would do again."""
        if self.deeds:
            raise ApiError(0, "the daemon has gone in the middle of this command: look what it did, with `dolium ps -a`")
        raise Cold

    def read_text(self, path: str) -> str:
        """A file of the caller's, read by the front. Raises OSError."""
        path = self.path(path)
        try:
            data = self._facts.read(path)
        except DoliumError:  # a pipe, a folder, no permission: what it is is told better by who opens it
            self.own_process()
            raise
        if data is None:
            raise FileNotFoundError(ENOENT, "No such file or directory", path)
        return data.decode("utf-8")

    def is_terminal(self, fd: int) -> bool:
        """As the front found it."""
        return self._terminals[fd]

    def window_size(self) -> tuple[int, int]:
        """As the front found it, when the call began."""
        return self._size

    def now(self) -> float:
        """When the call began."""
        return self._now


class FactClient(Client):
    """The daemon, as far as it has answered. Requests are numbered: the same one may be made twice."""

    def __init__(self, path: str, facts: Facts, context: CallerContext) -> None:
        super().__init__(path)
        self._facts = facts
        self._context = context
        self._number = 0

    def _fact(self, kind: str, request: bytes) -> list[bytes]:
        if "\n" in self.path or b"\0" in request:
            self._context.own_process()
        found = self._facts.known.get(query := f"{kind} {self.path}\n{_text(request)}")
        if found is None:
            raise Need([query])
        number, *values = found
        if int(number) in (ENOENT, ECONNREFUSED):
            raise NoDaemon(self.path)
        if int(number):
            self._context.own_process()
        self._context.deeds += not request.startswith(b"GET ")
        return values

    def open(self, method: str, target: str, body: Any = None, *, upgrade: bool = False,
             stream: Iterator[bytes] | None = None, headers: dict[str, str] | None = None) -> Response:
        """The answer, when the front has it."""
        if upgrade or stream is not None:
            self._context.own_process()
        self._number += 1
        answer = self._fact(f"http:{self._number}", request_text(method, target, body, headers=headers))[0]
        response = Response(None, answer)
        if response.status == 404 and method != "GET":
            self._context.deeds -= 1  # it was refused, as for an image that is to be pulled: nothing was done
        return checked(response)

    def session(self, method: str, target: str, body: Any = None, *, stdin: bool = False, tty: bool = False,
                sig_proxy: bool = False, kind: str = "containers", bare: bool = False, last: bool = False,
                on_note: Callable[[str], None] | None = None) -> Outcome:
        """How it ended, when the front has been through it."""
        self._number += 1
        flags = ((stdin, "i"), (tty, "t"), (sig_proxy, "p"), (kind == "exec", "x"), (bare, "b"), (last, "e"))
        letters = "".join(letter for wanted, letter in flags if wanted)
        how, *values = self._fact(f"session:{self._number}{letters}", stream_request(method, target, body))
        if how == b"http":
            self._context.deeds -= method == "POST"  # it was refused: nothing was done
            checked(Response(None, values[0]))
            raise ApiError(0, "the daemon's answer opens no stream")
        outcome = Outcome(_text(values[1]) if len(values) > 1 else "")
        if how == b"exit":
            outcome.exit_code = int(values[0])
        elif how == b"fail":
            outcome.failure = json.loads(values[0])
        return outcome


def answer(request: dict[str, list[bytes]], known: dict[str, list[bytes]]) -> bytes:
    """The body of the answer: N and a wish, P and a plan, C for a call that needs its own process. Pure."""
    plan, facts = Plan(), Facts(known)
    context = CallerContext(request, facts, _Tape(plan, 1), _Tape(plan, 2))
    try:
        code = run(context, FactClient(context.socket, facts, context))
    except Need as need:
        return b"N" + b"".join(encode_string(query) for query in need.queries)
    except Cold:
        return b"C"
    plan.add(P.PARENT_BEFORE_CLONE, "exit_code", "exit code", code)
    return b"P" + plan.encode()


def main(fd: int) -> None:
    """Serve one front that had to change compilers in the middle of a call."""
    serve(fd, answer)
