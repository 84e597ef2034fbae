"""`dolium` as a pure function: what it asks for, once each and in order, and what it prints when it has that."""

from __future__ import annotations

import json

import pytest

from dolium.cli.facts import answer
from dolium.runtime import plan as P
from dolium.runtime.plan import decode

Fields = dict[str, list[bytes]]
REFUSED = [b"111"]


def request(*words: str, tty: str = "000", env: tuple[str, ...] = ()) -> Fields:
    return {"argv": [word.encode() for word in ("dolium", *words)], "env": [entry.encode() for entry in ("DOLIUM_HOST=/d.sock", *env)],
            "cwd": [b"/work"], "now": [b"1700000000"], "nanoseconds": [b"500000000"], "tty": [flag.encode() for flag in tty],
            "rows": [b"24"], "columns": [b"80"]}


def wish(body: bytes) -> str:
    assert body[:1] == b"N", body
    size = int.from_bytes(body[1:5], "little")
    assert len(body) == 6 + size  # one at a time: a deed must not be done before the one before it is known
    return body[5 : 5 + size].decode()


def http(status: int, value: object) -> list[bytes]:
    return [b"0", f"HTTP/1.1 {status} x\r\nConnection: close\r\n\r\n".encode() + json.dumps(value).encode()]


class Call:
    """A call, answered deed by deed."""

    def __init__(self, *words: str, **more: object) -> None:
        self.request = request(*words, **more)  # type: ignore[arg-type]
        self.known: Fields = {}

    def asks(self) -> str:
        return wish(answer(self.request, self.known))

    def gets(self, deed: str, result: list[bytes]) -> None:
        assert deed not in self.known
        self.known[deed] = result

    def says(self) -> tuple[str, str, int]:
        body = answer(self.request, self.known)
        assert body[:1] == b"P", body
        plan = decode(body[1:])
        text = {1: "", 2: ""}
        for op in plan.named("print"):
            assert op.stage == P.PARENT_BEFORE_CLONE and isinstance(op.args[1], bytes)
            text[int(str(op.args[0]))] += op.args[1].decode()
        return text[1], text[2], int(str(plan.named("exit_code")[0].args[0]))


def test_help_needs_nothing() -> None:
    out, err, code = Call("run", "--help").says()
    assert out.startswith("usage: dolium run") and err == "" and code == 0


def test_a_run_is_one_session() -> None:
    call = Call("run", "-i", "--rm", "-e", "HERE", "base:1", "cat", env=("HERE=there",))
    deed = call.asks()
    head, _, rest = deed.partition("\n")
    assert head == "session:1ipe /d.sock" and rest.startswith("POST /dolium/run HTTP/1.0\r\n")
    wished = json.loads(rest.partition("\r\n\r\n")[2])
    assert wished["container"]["Env"] == ["HERE=there"] and wished["stdin"] is True
    call.gets(deed, [b"0", b"exit", b"7", b"abc"])
    assert call.says() == ("", "", 7)


@pytest.mark.parametrize(("outcome", "err", "code"), [
    ([b"0", b"fail", b'{"message": "no way", "code": 126}', b"abc"], "dolium: no way\n", 126),
    ([b"0", b"fail", b'{"message": "no way", "code": 128}', b"abc"], "dolium: no way\n", 125),
    ([b"0", b"end"], "", 0),
    ([b"0", b"http", http(409, {"message": "name in use"})[1]], "dolium: name in use\n", 125),
])
def test_how_a_run_may_end(outcome: list[bytes], err: str, code: int) -> None:
    call = Call("run", "base:1")
    call.gets(call.asks(), outcome)
    assert call.says() == ("", err, code)


def test_a_missing_image_is_pulled_by_a_process_of_its_own() -> None:
    call = Call("run", "base:1")
    call.gets(call.asks(), [b"0", b"http", http(404, {"message": "No such image: base:1"})[1]])
    assert answer(call.request, call.known) == b"C"
    never = Call("run", "--pull", "never", "base:1")
    never.gets(never.asks(), [b"0", b"http", http(404, {"message": "No such image: base:1"})[1]])
    assert never.says() == ("", "dolium: No such image: base:1\n", 125)


@pytest.mark.parametrize("words", [("create", "app"), ("run", "-d", "app")])
def test_so_it_is_for_who_does_not_stay(words: tuple[str, ...]) -> None:
    call = Call(*words)
    call.gets(call.asks(), http(404, {"message": "No such image: app:latest"}))
    assert answer(call.request, call.known) == b"C"


@pytest.mark.parametrize("words", [("attach", "x"), ("pull", "x"), ("load",), ("import", "x"), ("events",), ("stats",), ("cp", "a:/b", "c"),
                                   ("start", "-a", "x"), ("daemon", "stop"), ("run", "--cidfile", "f", "x"), ("run", "--pull", "always", "x")])
def test_what_needs_its_own_process(words: tuple[str, ...]) -> None:
    assert answer(request(*words), {}) == b"C"


def test_several_deeds_are_asked_for_one_after_the_other() -> None:
    call = Call("stop", "a", "b")
    first = call.asks()
    assert first.startswith("http:1 /d.sock\nPOST /containers/a/stop")
    call.gets(first, http(204, None))
    second = call.asks()
    assert second.startswith("http:2 /d.sock\nPOST /containers/b/stop")
    call.gets(second, http(404, {"message": "No such container: b"}))
    assert call.says() == ("a\n", "dolium: No such container: b\n", 1)


def test_no_daemon() -> None:
    call = Call("ps")
    call.gets(call.asks(), REFUSED)
    assert call.says() == ("", "dolium: no daemon answers at /d.sock: is it running? (`dolium daemon start`)\n", 1)
    own = request("ps")
    own["env"] = []
    known = {wish(answer(own, {})): REFUSED}
    assert answer(own, known) == b"C"  # the default daemon is started


def test_a_daemon_that_goes_in_the_middle_is_not_started_for_a_second_try() -> None:
    own = request("stop", "a", "b")
    own["env"] = []
    known = {wish(answer(own, {})): http(204, None)}
    known[wish(answer(own, known))] = REFUSED
    body = answer(own, known)
    assert body[:1] == b"P"  # not cold: that would stop `a` again
    text = b"".join(op.args[1] for op in decode(body[1:]).named("print") if isinstance(op.args[1], bytes))
    assert b"the daemon has gone in the middle of this command" in text


def test_files_of_the_caller_are_read_by_the_front() -> None:
    call = Call("run", "--env-file", "vars", "base:1")
    deed = call.asks()
    assert deed == "read:/work/vars"
    call.gets(deed, [b"0", b"A=1\n# no\nB=2\n"])
    assert json.loads(call.asks().partition("\r\n\r\n")[2])["container"]["Env"] == ["A=1", "B=2"]
    absent = Call("run", "--env-file", "vars", "base:1")
    absent.gets(absent.asks(), [b"2"])
    assert "--env-file vars: No such file or directory" in absent.says()[1]
    pipe = request("run", "--env-file", "/dev/fd/63", "base:1")
    assert answer(pipe, {"read:/dev/fd/63": [b"22"]}) == b"C"  # a process of its own can read it


def test_terminal_facts_are_the_callers() -> None:
    assert "not a TTY" in Call("run", "-it", "base:1").says()[1]
    deed = Call("exec", "-it", "box", "sh", tty="111").asks()
    assert deed.startswith("session:1itxe ") and '"size": [24, 80]' in deed


def test_logs_are_a_stream_framed_or_bare() -> None:
    for tty, letters in ((False, ""), (True, "b")):
        call = Call("logs", "--since", "10s", "box")
        call.gets(call.asks(), http(200, {"Config": {"Tty": tty}}))
        deed = call.asks()
        assert deed.startswith(f"session:2{letters} /d.sock\nGET /containers/box/logs?") and "HTTP/1.0" in deed
        assert "since=1699999990.5" in deed  # of the call's own clock: the same in every run of the function
        call.gets(deed, [b"0", b"end"])
        assert call.says() == ("", "", 0)


def test_a_number_the_front_could_not_use() -> None:
    call = Call("ps")
    call.gets(call.asks(), [b"5"])  # EIO
    assert answer(call.request, call.known) == b"C"
