"""The OCI runtime command line, with runc's commands and flags. Cold module: argparse costs 10 ms to import."""

from __future__ import annotations

import json

from dolium.errors import DoliumError, InvalidArgument
from dolium.linux.capabilities import NUMBERS
from dolium.runtime import cgroups, lifecycle, state
from dolium.runtime import plan as P
from dolium.runtime.default_spec import default_spec, rootless_spec
from dolium.runtime.features import features
from dolium.runtime.lifecycle import Context
from dolium.runtime.plan import Plan
from dolium.runtime.spec import OCI_VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from dolium.runtime.facts import Facts

DEFAULT_ROOT = "/run/dolium-runtime"

_SIGNAL_NAMES = ("HUP INT QUIT ILL TRAP ABRT BUS FPE KILL USR1 SEGV USR2 PIPE ALRM TERM STKFLT CHLD CONT STOP TSTP TTIN "
                 "TTOU URG XCPU XFSZ VTALRM PROF WINCH IO PWR SYS")
SIGNALS = {name: number for number, name in enumerate(_SIGNAL_NAMES.split(" "), 1)}

# flag: does it take a value?
GLOBAL = {"root": True, "log": True, "log-format": True, "debug": False, "systemd-cgroup": False, "rootless": True,
          "criu": True, "help": False, "version": False}
SHORT_GLOBAL = {"h": "help", "v": "version"}
CREATE = {"bundle": True, "console-socket": True, "pid-file": True, "no-pivot": False, "no-new-keyring": False,
          "pidfd-socket": True, "preserve-fds": True}
CRIU = {"tcp-established": False, "ext-unix-sk": False, "shell-job": False, "lazy-pages": False, "status-fd": True,
        "file-locks": False, "manage-cgroups-mode": True, "empty-ns": True, "auto-dedup": False}
COMMANDS: dict[str, tuple[dict[str, bool], dict[str, str], str, str]] = {
    "spec": ({"bundle": True, "rootless": False}, {"b": "bundle"}, "", "write a configuration to start from"),
    "create": (CREATE, {"b": "bundle"}, "ID", "create a container"),
    "run": ({**CREATE, "detach": False, "keep": False, "no-subreaper": False}, {"b": "bundle", "d": "detach"}, "ID",
            "create a container, start it and wait for its end"),
    "start": ({}, {}, "ID", "run the program of a created container"),
    "state": ({}, {}, "ID", "print a container's state"),
    "kill": ({"all": False}, {"a": "all"}, "ID [SIGNAL]", "send a signal (default SIGTERM) to a container's init"),
    "delete": ({"force": False}, {"f": "force"}, "ID", "remove what a container left"),
    "list": ({"quiet": False, "format": True}, {"q": "quiet", "f": "format"}, "", "list the containers of this root"),
    "exec": ({"process": True, "detach": False, "tty": False, "console-socket": True, "pid-file": True, "cwd": True,
              "pidfd-socket": True, "user": True, "env": True, "cap": True, "no-new-privs": False, "preserve-fds": True,
              "ignore-paused": False, "additional-gids": True, "apparmor": True, "process-label": True, "cgroup": True},
             {"p": "process", "d": "detach", "t": "tty", "u": "user", "e": "env", "c": "cap", "g": "additional-gids"},
             "ID [PROGRAM [ARG ...]]", "run one more process in a container"),
    "pause": ({}, {}, "ID", "freeze all processes of a container"),
    "resume": ({}, {}, "ID", "thaw a paused container"),
    "ps": ({"format": True}, {"f": "format"}, "ID [PS OPTION ...]", "list the processes of a container"),
    "update": ({"resources": True, **dict.fromkeys((
        "blkio-weight", "cpu-period", "cpu-quota", "cpu-burst", "cpu-share", "cpu-rt-period", "cpu-rt-runtime",
        "cpuset-cpus", "cpuset-mems", "cpu-idle", "memory", "memory-reservation", "memory-swap", "pids-limit",
        "kernel-memory", "kernel-memory-tcp", "l3-cache-schema", "mem-bw-schema"), True)}, {"r": "resources"}, "ID",
        "change the limits of a running container"),
    "events": ({"interval": True, "stats": False}, {}, "ID", "print what a container uses and its OOM kills until it ends"),
    "checkpoint": ({"image-path": True, "work-path": True, "parent-path": True, "leave-running": False, "pre-dump": False,
                    "page-server": True, "tcp-skip-in-flight": False, "link-remap": False, **CRIU}, {}, "ID",
                   "write a running container's processes to a folder, by CRIU"),
    "restore": ({"image-path": True, "work-path": True, "bundle": True, "detach": False, "pid-file": True,
                 "pidfd-socket": True, "console-socket": True, "no-subreaper": False, "no-pivot": False, "keep": False,
                 "preserve-fds": True, "no-new-keyring": False, "lsm-profile": True, "lsm-mount-context": True, **CRIU},
                {"b": "bundle", "d": "detach"}, "ID", "make a container of what checkpoint has written"),
    "features": ({}, {}, "", "print what this runtime can do, as JSON"),
}
EXEC_FAILED = 255  # as runc: what the program itself ends with can be told from what kept it from running
REPEATED = {"env", "cap", "additional-gids", "cgroup"}


class Words:
    """A command line taken apart."""

    def __init__(self, argv: list[str]) -> None:
        self.globals: dict[str, Any] = {}
        self.options: dict[str, Any] = {}
        self.command = ""
        rest = _take_flags(argv[1:], GLOBAL, SHORT_GLOBAL, self.globals)
        if not rest:
            self.arguments: list[str] = []
            return
        self.command = rest[0]
        if self.command not in COMMANDS:
            if self.command != "help":
                raise InvalidArgument(f"no command {self.command!r}", hint="`dolium-runtime --help` lists them")
            self.arguments = rest[1:]
            return
        flags, short, _, _ = COMMANDS[self.command]
        self.arguments = _take_flags(rest[1:], {**flags, "help": False}, {**short, "h": "help"}, self.options)


def _take_flags(words: list[str], flags: dict[str, bool], short: dict[str, str], found: dict[str, Any]) -> list[str]:
    """Flags up to the first word that is none (`--` ends them); returns the rest."""
    index = 0
    while index < len(words):
        word = words[index]
        if word == "--":
            return words[index + 1 :]
        if not word.startswith("-") or word == "-":
            break
        index += 1
        name, equals, value = word.lstrip("-").partition("=")
        name = short.get(name, name) if name not in flags else name
        if name not in flags:
            raise InvalidArgument(f"unknown flag {word}")
        if not flags[name]:
            found[name] = value.lower() not in ("false", "0") if equals else True
            continue
        if not equals:
            if index >= len(words):
                raise InvalidArgument(f"flag --{name} needs a value")
            value = words[index]
            index += 1
        if name in REPEATED:
            found.setdefault(name, []).append(value)
        else:
            found[name] = value
    return words[index:]


def is_number(text: str) -> bool:
    """Decimal ASCII digits: str.isdigit() alone takes what int() refuses. Not more of them than a plan's numbers hold."""
    return text.isascii() and text.isdigit() and len(text) <= 18


def signal_number(text: str) -> int:
    """15, TERM, SIGTERM, SIGRTMIN+1. Raises InvalidArgument."""
    if is_number(text) and 0 <= int(text) <= 64:
        return int(text)
    name = text.upper().removeprefix("SIG")
    if name in SIGNALS:
        return SIGNALS[name]
    for base, start, sign in (("RTMIN", 34, 1), ("RTMAX", 64, -1)):
        offset = name.removeprefix(base).lstrip("+-")
        if name.startswith(base) and (is_number(offset) or not offset):
            number = start + sign * int(offset or 0)
            if 34 <= number <= 64:
                return number
    raise InvalidArgument(f"unknown signal {text!r}")


def _usage(command: str = "") -> str:
    if command in COMMANDS:
        flags, short, arguments, about = COMMANDS[command]
        letters = {name: letter for letter, name in short.items()}
        lines = [f"usage: dolium-runtime {command} [flags] {arguments}".rstrip(), "", about, "", "flags:"]
        lines += [f"  {'-' + letters[name] + ', ' if name in letters else '    '}--{name}{' VALUE' if takes else ''}"
                  for name, takes in flags.items()]
        return "\n".join(lines) + "\n"
    lines = ["usage: dolium-runtime [global flags] COMMAND [flags] [arguments]", "",
             "An OCI runtime: runs a bundle (config.json and a root file system) as a container.", "", "commands:"]
    lines += [f"  {name:<10}{about}" for name, (_, _, _, about) in COMMANDS.items()]
    lines += ["", "global flags:", f"  --root DIR         where state is kept (default {DEFAULT_ROOT})",
              "  --systemd-cgroup   the container's group is a scope of systemd (create and run)",
              "  --log FILE         errors are written here too",
              "  --debug            each operation and its time, on standard error or to the log",
              "  --log-format FMT   text or json", "", "`dolium-runtime COMMAND --help` shows a command's flags."]
    return "\n".join(lines) + "\n"


def _print(text: str) -> Plan:
    plan = Plan()
    plan.add(P.PARENT_BEFORE_CLONE, "print", "print", 1, text)
    return plan


def _spec(words: Words, context: Context, facts: Facts) -> Plan:
    bundle = lifecycle.absolute(context.cwd, words.options.get("bundle") or ".")
    path = f"{bundle}/config.json"
    if facts.stat(path) is not None:
        raise InvalidArgument(f"file {path} exists", hint="remove it first")
    made = rootless_spec(context.uid, context.gid) if words.options.get("rootless") else default_spec()
    plan = Plan()
    plan.add(P.PARENT_BEFORE_CLONE, "write_file", f"write {path}", path, json.dumps(made, indent="\t") + "\n",
             0o666, 0)
    return plan


def _process_for_exec(words: Words, context: Context, facts: Facts, identity: str) -> dict[str, Any]:
    """The process an exec asks for: a file's, or the container's own with the flags' changes."""
    options = words.options
    if options.get("process"):
        path = lifecycle.absolute(context.cwd, options["process"])
        text = facts.read(path)
        if text is None:
            raise InvalidArgument(f"process file {path}: no such file")
        try:
            process = json.loads(text)
        except ValueError as error:
            raise InvalidArgument(f"process file {path} is not valid JSON: {error}") from error
        if not isinstance(process, dict):
            raise InvalidArgument(f"process file {path}: the top level must be an object")
    else:
        if len(words.arguments) < 2:
            raise InvalidArgument("exec needs a program, or --process FILE")
        text = facts.read(f"{context.root}/{identity}/config.json")
        process = dict((json.loads(text) if text else {}).get("process") or {"cwd": "/", "user": {}})
        process["args"] = words.arguments[1:]
        process["terminal"] = False
    if options.get("tty"):
        process["terminal"] = True
    if options.get("cwd"):
        process["cwd"] = options["cwd"]
    if options.get("env"):
        process["env"] = [*(process.get("env") or []), *options["env"]]
    if options.get("user"):
        process["user"] = {**(process.get("user") or {}), **_user(options["user"])}
    if options.get("additional-gids"):
        process.setdefault("user", {})["additionalGids"] = [_number(text, "group") for text in options["additional-gids"]]
    if options.get("no-new-privs"):
        process["noNewPrivileges"] = True
    for flag, field in (("apparmor", "apparmorProfile"), ("process-label", "selinuxLabel")):
        if options.get(flag):
            process[field] = options[flag]
    for name in options.get("cap") or []:
        if name not in NUMBERS:
            raise InvalidArgument(f"--cap: {name!r} is not a capability")
        sets = process["capabilities"] = {**(process.get("capabilities") or {})}
        for kind in ("bounding", "effective", "permitted"):
            sets[kind] = [*(sets.get(kind) or []), name]
    return process


def _number(text: str, what: str) -> int:
    if not is_number(text):
        raise InvalidArgument(f"{what} {text!r} is not a number")
    return int(text)


def _user(text: str) -> dict[str, int]:
    uid, colon, gid = text.partition(":")
    return {"uid": _number(uid, "user"), **({"gid": _number(gid, "group")} if colon else {})}


def _update(words: Words, context: Context, facts: Facts, identity: str) -> Plan:
    from dolium.runtime import resources

    options = words.options
    path = options.get("resources") or ""
    if path and path != "-":
        path = lifecycle.absolute(context.cwd, path)
    wished = resources.wished(options, facts, path)
    return resources.update(context, facts, identity, wished, resources.schemata(options, path))


def _run_command(words: Words, context: Context, facts: Facts) -> Plan:
    command, options = words.command, words.options
    if options.get("help"):
        return _print(_usage(command))
    if command == "spec":
        return _spec(words, context, facts)
    if command == "features":
        return _print(json.dumps(features(), indent=2) + "\n")
    if command == "list":
        if options.get("format", "table") not in ("table", "json"):
            raise InvalidArgument(f"--format: {options['format']!r} is neither table nor json")
        return lifecycle.listing(context, facts, quiet=bool(options.get("quiet")),
                                 as_json=options.get("format") == "json")
    limit = {"kill": 2, "exec": None, "ps": None}.get(command, 1)
    if not words.arguments or (limit is not None and len(words.arguments) > limit):
        raise InvalidArgument(f"usage: dolium-runtime {command} [flags] {COMMANDS[command][2]}")
    identity = words.arguments[0]
    state.check_identity(identity)
    if not is_number(options.get("preserve-fds") or "0"):
        raise InvalidArgument(f"--preserve-fds: {options['preserve-fds']!r} is not a number")
    if command in ("create", "run"):
        return lifecycle.create(context, facts, identity, options.get("bundle") or ".", options, run=command == "run")
    if command == "exec":
        facts.want(f"read:{context.root}/{identity}/state.json", f"read:{context.root}/{identity}/config.json",
                   f"stat:{context.root}/{identity}")
        state.load(facts, context.root, identity)
        return lifecycle.execute(context, facts, identity, _process_for_exec(words, context, facts, identity), options)
    if command == "kill":
        signal = signal_number(words.arguments[1]) if len(words.arguments) > 1 else SIGNALS["TERM"]
        return lifecycle.kill(context, facts, identity, signal, everyone=bool(options.get("all")))
    if command == "delete":
        return lifecycle.delete(context, facts, identity, force=bool(options.get("force")))
    if command == "ps":
        if options.get("format", "table") not in ("table", "json"):
            raise InvalidArgument(f"--format: {options['format']!r} is neither table nor json")
        return lifecycle.processes(context, facts, identity, words.arguments[1:], as_json=options.get("format") == "json")
    if command in ("pause", "resume"):
        return lifecycle.pause(context, facts, identity, resume=command == "resume")
    if command == "update":
        return _update(words, context, facts, identity)
    if command == "events":
        from dolium.runtime import resources

        return resources.events(context, facts, identity, interval=resources.milliseconds(options.get("interval") or "5s"),
                                once=bool(options.get("stats")), cursor=context.cursor)
    if command in ("checkpoint", "restore"):
        from dolium.runtime import checkpoint

        return (checkpoint.checkpoint if command == "checkpoint" else checkpoint.restore)(context, facts, identity, options)
    simple: dict[str, Callable[[Context, Facts, str], Plan]] = {"start": lifecycle.start, "state": lifecycle.query}
    return simple[command](context, facts, identity)


def _default_root(facts: Facts, env: dict[str, str], uid: int) -> str:
    """As runc has it: below XDG_RUNTIME_DIR for an ordinary user, and for a user namespace's root of another name."""
    folder = env.get("XDG_RUNTIME_DIR")
    if uid == 0 and not (folder and env.get("USER") != "root" and cgroups.rootless(facts, uid)):
        return DEFAULT_ROOT
    return f"{folder or f'/run/user/{uid}'}/dolium-runtime"


def compile_request(request: dict[str, list[bytes]],
                    facts: Facts) -> tuple[Plan, None] | tuple[None, tuple[str, str, str, int]]:
    """A plan, or (message, log file, log format, exit code). Raises Need when facts are missing.

    ``request``: the caller's context as the front sends it: argv, env, cwd, uid, now, machine.
    """
    argv = [word.decode("utf-8", "surrogateescape") for word in request["argv"]]
    env = dict(entry.decode("utf-8", "surrogateescape").partition("=")[::2] for entry in request["env"])
    cwd = request["cwd"][0].decode("utf-8", "surrogateescape") if "cwd" in request else "/"
    log, log_format, code = "", "text", 1
    try:
        words = Words(argv)
        code = EXEC_FAILED if words.command == "exec" else 1
        log_format = words.globals.get("log-format", "text")
        log = lifecycle.absolute(cwd, words.globals["log"]) if words.globals.get("log") else ""
        if log_format not in ("text", "json"):
            raise InvalidArgument(f"--log-format: {log_format!r} is neither text nor json")
        if words.globals.get("version"):
            from dolium import __version__

            return _print(f"dolium-runtime version {__version__}\nspec: {OCI_VERSION}\n"), None
        if words.globals.get("help") or words.command in ("", "help"):
            return _print(_usage(words.arguments[0] if words.arguments else "")), None
        uid = int(request["uid"][0])
        root = words.globals.get("root") or _default_root(facts, env, uid)
        context = Context(cwd, env, lifecycle.absolute(cwd, root).rstrip("/"), uid, int(request["gid"][0]),
                          int(request["now"][0]), request["machine"][0].decode())
        if "nanoseconds" in request:
            context.created = lifecycle.rfc3339(context.now, int(request["nanoseconds"][0]))
        context.pid = int(request["pid"][0]) if "pid" in request else 0
        criu = words.globals.get("criu") or ""
        context.criu = lifecycle.absolute(cwd, criu) if "/" in criu else criu
        context.systemd = bool(words.globals.get("systemd-cgroup"))
        context.cursor = request["again"][0] if "again" in request else b""
        plan = _run_command(words, context, facts)
        if words.globals.get("debug"):
            plan.flags |= P.FLAG_DEBUG
        if code != 1:
            plan.add(P.ON_FAILURE, "exit_code", "the exit code of a failure", code)
        if log:
            plan.ops.insert(0, P.Op(P.PARENT_BEFORE_CLONE, "log_file", "log file", (log, int(log_format == "json"))))
        return plan, None
    except DoliumError as error:
        return None, (str(error), log, log_format, code)
