"""Commands on containers, but for the start path (run.py)."""

from __future__ import annotations

import json

from dolium.cli import output
from dolium.cli.context import Context
from dolium.cli.flags import Command, Flag, UsageError
from dolium.cli.transport import ApiError, Client, query, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

_NAMES = "CONTAINER [CONTAINER ...]"
FORMAT = Flag("--format", "str", "table, json or a template", "FORMAT")

PS = Command("ps", "", "List containers.", [
    Flag("-a --all", "bool", "also those that do not run"), Flag("-q --quiet", "bool", "ids only"),
    Flag("-n --last", "int", "the last N"), Flag("--no-trunc", "bool", "whole ids and commands"),
    Flag("-f --filter", "list", "name=…, status=…, label=…, ancestor=…", "KEY=VALUE"),
    Flag("-s --size", "bool", "sizes too"), FORMAT], maximum=0)
START = Command("start", _NAMES, "Start containers that were created or have ended.", [
    Flag("-a --attach", "bool", "stay until it ends"), Flag("-i --interactive", "bool", "with standard input")], minimum=1)
STOP = Command("stop", _NAMES, "Ask containers to end; kill them when they do not.", [
    Flag("-t --timeout", "int", "seconds before it is killed (default 10)"), Flag("--time", "int", "the same"),
    Flag("-s --signal", "str", "signal to ask with", "SIGNAL")], minimum=1)
RESTART = Command("restart", _NAMES, "Stop and start containers.", STOP.flags, minimum=1)
KILL = Command("kill", _NAMES, "Send a signal (default SIGKILL).", [Flag("-s --signal", "str", "the signal", "SIGNAL")],
               minimum=1)
RM = Command("rm", _NAMES, "Remove containers.", [
    Flag("-f --force", "bool", "kill one that runs"), Flag("-v --volumes", "bool", "its anonymous volumes too")], minimum=1)
RENAME = Command("rename", "CONTAINER NAME", "Give a container another name.", [], minimum=2, maximum=2)
PAUSE = Command("pause", _NAMES, "Freeze all processes of containers.", [], minimum=1)
UNPAUSE = Command("unpause", _NAMES, "Thaw paused containers.", [], minimum=1)
WAIT = Command("wait", _NAMES, "Wait for the end of containers; print their exit codes.", [], minimum=1)
LOGS = Command("logs", "CONTAINER", "Print what a container wrote.", [
    Flag("-f --follow", "bool", "go on while it runs"), Flag("-n --tail", "str", "the last N lines", "N"),
    Flag("-t --timestamps", "bool", "with times"),
    Flag("--since", "str", "from a time on: 10m, RFC 3339 or Unix seconds", "TIME"),
    Flag("--until", "str", "up to a time", "TIME")], minimum=1, maximum=1)
ATTACH = Command("attach", "CONTAINER", "Connect to a running container's standard input and output.", [
    Flag("--no-stdin", "bool", "output only"), Flag("--detach-keys", "str", "keys that leave it running", "ctrl-p,ctrl-q"),
    Flag("--sig-proxy", "bool", "signals go to the container; =false leaves them here", default=True)], minimum=1, maximum=1)
INSPECT = Command("inspect", "NAME [NAME ...]", "Print all that is known of containers or images, as JSON.", [
    Flag("-f --format", "str", "a template", "FORMAT"), Flag("-s --size", "bool", "sizes too"),
    Flag("--type", "str", "container or image", "TYPE")], minimum=1)
TOP = Command("top", "CONTAINER [PS OPTIONS]", "List the processes of a container.", [], minimum=1, interspersed=False)
STATS = Command("stats", "[CONTAINER ...]", "Show what containers use, until Ctrl-C.", [
    Flag("--no-stream", "bool", "once"), Flag("-a --all", "bool", "also those that do not run"), FORMAT])
CP = Command("cp", "CONTAINER:PATH PATH | PATH CONTAINER:PATH", "Copy files out of or into a container; - is a tar stream.",
             [], minimum=2, maximum=2)


def _each(client: Client, context: Context, names: list[str], method: str, target: str, done: str = "{name}") -> int:
    """The same request for every name; all are tried, failures are told. 1 when one failed."""
    failed = 0
    for name in names:
        try:
            client.call(method, target.format(name=quote(name)))
            context.say(done.format(name=name))
        except ApiError as error:
            context.complain(str(error))
            failed = 1
    return failed


def moment(context: Context, text: str | None, flag: str) -> str | None:
    """--since and --until: Unix seconds, RFC 3339, or how long ago (10m, 1h30m). Raises UsageError."""
    if not text:
        return text
    try:
        return str(float(text))
    except ValueError:
        pass
    seconds, digits = 0.0, ""
    units = {"h": 3600, "m": 60, "s": 1}
    for letter in text:
        if letter.isdigit() or letter == ".":
            digits += letter
        elif letter in units and digits.count(".") < 2 and digits.strip("."):
            seconds, digits = seconds + float(digits) * units[letter], ""
        else:
            break
    else:
        if not digits:
            return f"{context.now() - seconds:.9f}"
    if len(text) < 10 or text[4] != "-" or text[7] != "-" or not text[:4].isdigit():
        raise UsageError(f"invalid argument {text!r} for {flag}: write 10m, 2026-01-02T03:04:05Z or Unix seconds")
    return text


def filter_query(values: list[str]) -> str | None:
    """The ``filters`` parameter of --filter flags. Raises UsageError."""
    found: dict[str, list[str]] = {}
    for value in values:
        key, equals, rest = value.partition("=")
        if not equals:
            raise UsageError(f"invalid argument {value!r} for --filter: write KEY=VALUE")
        found.setdefault(key, []).append(rest)
    return json.dumps(found) if found else None


def _ports(row: dict[str, Any]) -> str:
    texts = []
    for port in row["Ports"]:
        inside = f"{port['PrivatePort']}/{port['Type']}"
        texts.append(f"{output.host_text(port['IP'])}:{port['PublicPort']}->{inside}" if "PublicPort" in port else inside)
    return ", ".join(texts)


def ps(client: Client, context: Context, words: list[str]) -> int:
    """``dolium ps``."""
    options, _ = PS.parse(words)
    if options.get("help"):
        context.stdout.write(PS.usage())
        return 0
    rows = client.call("GET", "/containers/json" + query(all=options["all"], limit=options["last"], size=options["size"],
                                                         filters=filter_query(options["filter"])))
    if options["quiet"]:
        for row in rows:
            context.say(row["Id"] if options["no_trunc"] else row["Id"][:12])
        return 0
    now = context.now()
    titles = ["CONTAINER ID", "IMAGE", "COMMAND", "CREATED", "STATUS", "PORTS", "NAMES"]
    cells = []
    for row in rows:
        command = row["Command"] if options["no_trunc"] or len(row["Command"]) <= 20 else row["Command"][:19] + "…"
        cells.append([row["Id"] if options["no_trunc"] else row["Id"][:12], row["Image"], f'"{command}"',
                      f"{output.ago(now - row['Created'])} ago", row["Status"], _ports(row),
                      ",".join(name.lstrip("/") for name in row["Names"])])
        if options["size"]:
            cells[-1].append(f"{output.size(row['SizeRw'])} (virtual {output.size(row['SizeRootFs'])})")
    output.listing(context, options["format"], titles + (["SIZE"] if options["size"] else []), rows, cells)
    return 0


def _attach(client: Client, context: Context, name: str, *, stdin: bool, keys: str | None, start: bool,
            sig_proxy: bool = True) -> int:
    from dolium.cli.stream import Session

    context.own_process()
    found = client.call("GET", f"/containers/{quote(name)}/json")
    tty, wants_input = found["Config"]["Tty"], stdin and found["Config"]["OpenStdin"]
    if not start and not found["State"]["Running"]:
        raise ApiError(409, "You cannot attach to a stopped container, start it first")
    if tty and wants_input and not context.is_terminal(0):
        raise UsageError("the input device is not a TTY")
    identity = found["Id"]
    parameters = query(stream=True, stdin=wants_input, stdout=True, stderr=True, detachKeys=keys)
    response = client.open("POST", f"/containers/{identity}/attach{parameters}", upgrade=True)
    waiting = client.open("POST", f"/containers/{identity}/wait{query(condition='next-exit' if start else None)}")
    if start:
        client.call("POST", f"/containers/{identity}/start")
    # With a terminal keys are the container's as bytes, and SIGHUP is this side's: its window was closed.
    here = Session(client, response, stdin_fd=0 if wants_input else None, tty=tty, kind="containers",
                   sig_proxy=sig_proxy and not tty, bare=tty, identity=identity)
    if tty:
        rows, columns = context.window_size()
        if rows and columns:
            try:
                client.call("POST", f"/containers/{identity}/resize{query(h=rows, w=columns)}")
            except ApiError:
                rows = 0  # it ended already
    here.run()
    stays = not found["HostConfig"].get("AutoRemove")
    if stays and client.call("GET", f"/containers/{identity}/json")["State"]["Running"]:
        context.stdout.flush()
        return 0  # detached
    return int(json.loads(waiting.read())["StatusCode"])


def start(client: Client, context: Context, words: list[str]) -> int:
    """``dolium start``."""
    options, names = START.parse(words)
    if options.get("help"):
        context.stdout.write(START.usage())
        return 0
    if options["attach"] or options["interactive"]:
        if len(names) != 1:
            raise UsageError("you cannot start and attach multiple containers at once")
        return _attach(client, context, names[0], stdin=options["interactive"], keys=None, start=True)
    return _each(client, context, names, "POST", "/containers/{name}/start")


def attach(client: Client, context: Context, words: list[str]) -> int:
    """``dolium attach``."""
    options, names = ATTACH.parse(words)
    if options.get("help"):
        context.stdout.write(ATTACH.usage())
        return 0
    return _attach(client, context, names[0], stdin=not options["no_stdin"], keys=options["detach_keys"], start=False,
                   sig_proxy=options["sig_proxy"])


def stop(client: Client, context: Context, words: list[str], verb: str = "stop") -> int:
    """``dolium stop`` and ``restart``."""
    command = STOP if verb == "stop" else RESTART
    options, names = command.parse(words)
    if options.get("help"):
        context.stdout.write(command.usage())
        return 0
    timeout = options["timeout"] if options["timeout"] is not None else options["time"]
    return _each(client, context, names, "POST",
                 f"/containers/{{name}}/{verb}" + query(t=timeout, signal=options["signal"]).replace("{", "{{"))


def restart(client: Client, context: Context, words: list[str]) -> int:
    """``dolium restart``."""
    return stop(client, context, words, "restart")


def kill(client: Client, context: Context, words: list[str]) -> int:
    """``dolium kill``."""
    options, names = KILL.parse(words)
    if options.get("help"):
        context.stdout.write(KILL.usage())
        return 0
    return _each(client, context, names, "POST", "/containers/{name}/kill" + query(signal=options["signal"]))


def remove(client: Client, context: Context, words: list[str]) -> int:
    """``dolium rm``."""
    options, names = RM.parse(words)
    if options.get("help"):
        context.stdout.write(RM.usage())
        return 0
    return _each(client, context, names, "DELETE",
                 "/containers/{name}" + query(force=options["force"], v=options["volumes"]))


def rename(client: Client, context: Context, words: list[str]) -> int:
    """``dolium rename``."""
    options, names = RENAME.parse(words)
    if options.get("help"):
        context.stdout.write(RENAME.usage())
        return 0
    client.call("POST", f"/containers/{quote(names[0])}/rename{query(name=names[1])}")
    return 0


def _simple(command: Command, verb: str, client: Client, context: Context, words: list[str]) -> int:
    options, names = command.parse(words)
    if options.get("help"):
        context.stdout.write(command.usage())
        return 0
    return _each(client, context, names, "POST", f"/containers/{{name}}/{verb}")


def pause(client: Client, context: Context, words: list[str]) -> int:
    """``dolium pause``."""
    return _simple(PAUSE, "pause", client, context, words)


def unpause(client: Client, context: Context, words: list[str]) -> int:
    """``dolium unpause``."""
    return _simple(UNPAUSE, "unpause", client, context, words)


def wait(client: Client, context: Context, words: list[str]) -> int:
    """``dolium wait``."""
    options, names = WAIT.parse(words)
    if options.get("help"):
        context.stdout.write(WAIT.usage())
        return 0
    failed = 0
    for name in names:
        try:
            context.say(str(client.call("POST", f"/containers/{quote(name)}/wait")["StatusCode"]))
        except ApiError as error:
            context.complain(str(error))
            failed = 1
    return failed


def logs(client: Client, context: Context, words: list[str]) -> int:
    """``dolium logs``."""
    options, names = LOGS.parse(words)
    if options.get("help"):
        context.stdout.write(LOGS.usage())
        return 0
    name = quote(names[0])
    tty = client.call("GET", f"/containers/{name}/json")["Config"]["Tty"]
    client.session("GET", f"/containers/{name}/logs" + query(
        stdout=True, stderr=True, follow=options["follow"], tail=options["tail"], timestamps=options["timestamps"],
        since=moment(context, options["since"], "--since"), until=moment(context, options["until"], "--until")), bare=tty)
    return 0


def inspect(client: Client, context: Context, words: list[str]) -> int:
    """``dolium inspect``."""
    options, names = INSPECT.parse(words)
    if options.get("help"):
        context.stdout.write(INSPECT.usage())
        return 0
    kinds = {"container": ["containers"], "image": ["images"], None: ["containers", "images"]}.get(options["type"])
    if kinds is None:
        raise UsageError(f"invalid argument {options['type']!r} for --type: container or image")
    found, failed = [], 0
    for name in names:
        value = None
        for kind in kinds:
            try:
                value = client.call("GET", f"/{kind}/{quote(name)}/json{query(size=options['size'])}")
                break
            except ApiError as error:
                if error.status != 404:
                    raise
        if value is None:
            context.complain(f"no such object: {name}")
            failed = 1
        else:
            found.append(value)
    if options["format"] and options["format"] != "json":
        for value in found:
            context.say(output.template(options["format"], value))
    else:
        context.say(json.dumps(found, indent=4))
    return failed


def top(client: Client, context: Context, words: list[str]) -> int:
    """``dolium top``."""
    options, arguments = TOP.parse(words)
    if options.get("help"):
        context.stdout.write(TOP.usage())
        return 0
    found = client.call("GET", f"/containers/{quote(arguments[0])}/top{query(ps_args=' '.join(arguments[1:]))}")
    output.table(context, found["Titles"], found["Processes"])
    return 0


def _cpu_percent(row: dict[str, Any]) -> float:
    now, before = row["cpu_stats"], row["precpu_stats"]
    used = now["cpu_usage"]["total_usage"] - before.get("cpu_usage", {}).get("total_usage", 0)
    system = now.get("system_cpu_usage", 0) - before.get("system_cpu_usage", 0)
    return 100.0 * used / system * now.get("online_cpus", 1) if system > 0 and used > 0 else 0.0


def _stats_cells(row: dict[str, Any]) -> list[str]:
    memory = row["memory_stats"]
    usage, limit = memory.get("usage", 0), memory.get("limit", 0)
    usage = max(usage - memory.get("stats", {}).get("total_inactive_file", 0), 0)
    networks = row.get("networks", {}).values()
    received, sent = sum(net["rx_bytes"] for net in networks), sum(net["tx_bytes"] for net in networks)
    blocks = {"read": 0, "write": 0}
    for entry in row.get("blkio_stats", {}).get("io_service_bytes_recursive") or []:
        blocks[entry["op"]] += entry["value"]
    return [row["id"][:12], row["name"].lstrip("/"), f"{_cpu_percent(row):.2f}%",
            f"{output.memory(usage)} / {output.memory(limit)}", f"{100 * usage / limit if limit else 0:.2f}%",
            f"{output.size(received)} / {output.size(sent)}",
            f"{output.size(blocks['read'])} / {output.size(blocks['write'])}", str(row["pids_stats"].get("current", 0))]


def stats(client: Client, context: Context, words: list[str]) -> int:
    """``dolium stats``."""
    options, names = STATS.parse(words)
    if options.get("help"):
        context.stdout.write(STATS.usage())
        return 0
    titles = ["CONTAINER ID", "NAME", "CPU %", "MEM USAGE / LIMIT", "MEM %", "NET I/O", "BLOCK I/O", "PIDS"]
    if not options["no_stream"]:
        context.own_process()
    while True:
        chosen = names or [row["Id"] for row in client.call("GET", "/containers/json" + query(all=options["all"]))]
        streams = [client.open("GET", f"/containers/{quote(name)}/stats{query(stream='0')}") for name in chosen]
        rows = [json.loads(stream.read()) for stream in streams]
        if not options["no_stream"] and context.is_terminal(1):
            context.stdout.write("\x1b[H\x1b[2J")
        output.listing(context, options["format"], titles, rows, [_stats_cells(row) for row in rows])
        context.stdout.flush()
        if options["no_stream"]:
            return 0


def _place(text: str) -> tuple[str, str]:
    """(container, path); container "" for this side."""
    name, colon, path = text.partition(":")
    if not colon or text.startswith((".", "/")):
        return "", text
    return name, path


def copy(client: Client, context: Context, words: list[str]) -> int:
    """``dolium cp``, with the rules of cp: into an existing folder, or under the name given."""
    options, (source, target) = CP.parse(words)
    if options.get("help"):
        context.stdout.write(CP.usage())
        return 0
    (from_name, from_path), (to_name, to_path) = _place(source), _place(target)
    if bool(from_name) == bool(to_name):
        raise UsageError("one of source and target must be CONTAINER:PATH")
    context.own_process()
    from dolium.cli import copying

    if from_name:
        return copying.out(client, context, from_name, from_path, to_path)
    return copying.into(client, context, from_path, to_name, to_path)


def read_chunks(file: Any) -> Iterator[bytes]:
    """A file, 256 KiB at a time."""
    while chunk := file.read(1 << 18):
        yield chunk
