"""Commands about the whole: version, info, events, and the daemon itself."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time

from dolium import __version__
from dolium.cli import output
from dolium.cli.containers import filter_query, moment
from dolium.cli.context import Context
from dolium.cli.flags import Command, Flag, UsageError
from dolium.cli.transport import ApiError, Client, NoDaemon, connect, query

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

VERSION = Command("version", "", "Print the versions of this program and of the daemon.",
                  [Flag("-f --format", "str", "json or a template", "FORMAT")], maximum=0)
INFO = Command("info", "", "Print facts about the daemon and this machine.",
               [Flag("-f --format", "str", "json or a template", "FORMAT")], maximum=0)
EVENTS = Command("events", "", "Print what happens, as it happens, until Ctrl-C.", [
    Flag("--since", "str", "from a time on: 10m, RFC 3339 or Unix seconds", "TIME"),
    Flag("--until", "str", "up to a time", "TIME"),
    Flag("-f --filter", "list", "type=…, event=…, container=…", "KEY=VALUE"),
    Flag("--format", "str", "json or a template", "FORMAT")], maximum=0)
DAEMON = Command("daemon", "start|stop|status", "Start or stop the daemon, or say whether it runs. Containers live on.", [
    Flag("--data-root", "str", "folder of images, containers, volumes", "DIR"),
    Flag("--run-root", "str", "folder of sockets and shims", "DIR")], minimum=1, maximum=1)

LOG = "/var/log/dolium/doliumd.log"
START_SECONDS = 20.0


def version(client: Client, context: Context, words: list[str]) -> int:
    """``dolium version``."""
    options, _ = VERSION.parse(words)
    if options.get("help"):
        context.stdout.write(VERSION.usage())
        return 0
    found: dict[str, Any] = {"Client": {"Version": __version__, "Python": sys.version.split()[0]}, "Server": None}
    try:
        found["Server"] = client.call("GET", "/version")
    except NoDaemon:
        found["Server"] = None
    if options["format"]:
        context.say(json.dumps(found) if options["format"] == "json" else output.template(options["format"], found))
        return 0
    context.say(f"client  dolium {__version__}, Python {found['Client']['Python']}")
    server = found["Server"]
    if server is None:
        context.say("server  no daemon runs; the first command that needs one starts it")
        return 0
    context.say(f"server  dolium {server['Version']}, API {server['ApiVersion']}, Linux {server['KernelVersion']}")
    return 0


def info(client: Client, context: Context, words: list[str]) -> int:
    """``dolium info``."""
    options, _ = INFO.parse(words)
    if options.get("help"):
        context.stdout.write(INFO.usage())
        return 0
    found = client.call("GET", "/info")
    if options["format"]:
        context.say(json.dumps(found) if options["format"] == "json" else output.template(options["format"], found))
        return 0
    for title, value in (
            ("version", found["ServerVersion"]), ("instance", found["ID"]), ("data folder", found["DockerRootDir"]),
            ("containers", f"{found['Containers']} ({found['ContainersRunning']} running, {found['ContainersPaused']} "
                           f"paused, {found['ContainersStopped']} stopped)"),
            ("images", found["Images"]), ("storage", found["Driver"]),
            ("cgroups", f"version {found['CgroupVersion']}, driver {found['CgroupDriver']}"),
            ("kernel", found["KernelVersion"]), ("system", f"{found['OperatingSystem']}, {found['Architecture']}"),
            ("machine", f"{found['NCPU']} CPUs, {output.memory(found['MemTotal'])}")):
        context.say(f"{title:<12}{value}")
    return 0


def events(client: Client, context: Context, words: list[str]) -> int:
    """``dolium events``."""
    options, _ = EVENTS.parse(words)
    if options.get("help"):
        context.stdout.write(EVENTS.usage())
        return 0
    context.own_process()
    response = client.open("GET", "/events" + query(since=moment(context, options["since"], "--since"),
                                                    until=moment(context, options["until"], "--until"),
                                                    filters=filter_query(options["filter"])))
    for row in response.lines():
        if options["format"] == "json":
            context.say(json.dumps(row))
        elif options["format"]:
            context.say(output.template(options["format"], row))
        else:
            attributes = ", ".join(f"{key}={value}" for key, value in sorted(row["Actor"]["Attributes"].items()))
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(row["time"]))
            context.say(f"{stamp}.{row['timeNano'] % 10**9:09d}Z {row['Type']} {row['Action']} {row['Actor']['ID']} "
                        f"({attributes})")
        context.stdout.flush()
    return 0


def start_daemon(context: Context, extra: list[str]) -> None:
    """Start doliumd in the background and wait until it listens. Says so, and where its log is. Raises ApiError."""
    context.own_process()
    if os.geteuid() != 0:
        raise ApiError(0, f"no daemon runs at {context.socket}, and only root can start one")
    os.makedirs(os.path.dirname(LOG), mode=0o755, exist_ok=True)
    context.stdout.flush()
    context.stderr.write(f"dolium: no daemon is running: starting one (its log: {LOG}; stop it: dolium daemon stop)\n")
    context.stderr.flush()
    with open(LOG, "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-I", "-m", "dolium.daemon", "-H", f"unix://{context.socket}", *extra],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/",
            env={key: value for key, value in context.env.items() if key in ("PATH", "LANG", "TZ", "DOLIUM_FAULT")})
    deadline = time.monotonic() + START_SECONDS
    pause = 0.005
    while time.monotonic() < deadline:
        try:
            connect(context.socket).close()
            return
        except NoDaemon:
            if process.poll() is not None:
                break
            time.sleep(pause)  # a daemon has no way to tell a caller that is not its parent; the wait is bounded
            pause = min(pause * 1.5, 0.1)
    raise ApiError(0, f"the daemon did not start; the end of its log ({LOG}): {_last_line(LOG)}")


def _last_line(path: str) -> str:
    try:
        with open(path, errors="replace") as file:
            lines = file.read().splitlines()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return lines[-1] if lines else "is empty"


def daemon(client: Client, context: Context, words: list[str]) -> int:
    """``dolium daemon start|stop|status``."""
    options, arguments = DAEMON.parse(words)
    if options.get("help"):
        context.stdout.write(DAEMON.usage())
        return 0
    context.own_process()
    verb = arguments[0]
    if verb == "start":
        try:
            connect(context.socket).close()
        except NoDaemon:
            extra = [word for flag in ("data_root", "run_root") if options[flag]
                     for word in (f"--{flag.replace('_', '-')}", context.path(options[flag]))]
            start_daemon(context, extra)
            return 0
        context.say(f"a daemon runs at {context.socket} already")
        return 0
    if verb == "status":
        try:
            found = client.call("GET", "/info")
        except NoDaemon:
            context.say(f"no daemon runs at {context.socket}")
            return 3
        context.say(f"a daemon runs at {context.socket}: {found['ContainersRunning']} containers running")
        return 0
    if verb == "stop":
        return _stop(client, context)
    raise UsageError(f"dolium daemon {verb}: start, stop or status")


def _stop(client: Client, context: Context) -> int:
    try:
        running = client.call("GET", "/info")["ContainersRunning"]
        pid = client.call("POST", "/dolium/stop")["pid"]
    except NoDaemon:
        context.say(f"no daemon runs at {context.socket}")
        return 0
    try:
        daemon = os.pidfd_open(pid)
    except ProcessLookupError:
        ended = True
    else:
        ended = bool(select.select([daemon], [], [], START_SECONDS)[0])
        os.close(daemon)
    if not ended:
        raise ApiError(0, f"the daemon (process {pid}) does not end; its log says why")
    context.say("the daemon has ended" + (f"; {running} containers go on without it" if running else ""))
    return 0
