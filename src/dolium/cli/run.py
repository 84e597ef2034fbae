"""run, create and exec: the start path. One native request where Docker's command line makes five."""

from __future__ import annotations

import os

from dolium.cli.bodies import RUN_FLAGS, create_body, environment
from dolium.cli.context import Context
from dolium.cli.flags import Command, Flag, UsageError
from dolium.cli.transport import ApiError, Client, Outcome, query, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

RUN = Command(
    "run", "IMAGE [COMMAND [ARG ...]]", "Create a container from an image, start it and stay until it ends.",
    RUN_FLAGS, minimum=1, interspersed=False,
    examples=["dolium run --rm -it debian bash", "dolium run -d --name web -p 8080:80 nginx",
              "dolium run --rm --rootfs /:O sh -c 'echo I am pid $$'"])
CREATE = Command("create", "IMAGE [COMMAND [ARG ...]]", "Create a container; `dolium start` runs it.", RUN_FLAGS, minimum=1,
                 interspersed=False)
EXEC = Command(
    "exec", "CONTAINER COMMAND [ARG ...]", "Run one more process in a running container.",
    [Flag("-d --detach", "bool", "leave it running"), Flag("-i --interactive", "bool", "keep standard input open"),
     Flag("-t --tty", "bool", "give it a terminal"), Flag("-e --env", "list", "set a variable", "NAME=VALUE"),
     Flag("--env-file", "list", "read variables from a file", "FILE"),
     Flag("-w --workdir", "str", "folder it starts in", "DIR"), Flag("-u --user", "str", "user to run as", "NAME[:GROUP]"),
     Flag("--privileged", "bool", "all capabilities"),
     Flag("--detach-keys", "str", "keys that leave it running", "ctrl-p,ctrl-q")],
    minimum=2, interspersed=False, examples=["dolium exec -it web bash", "dolium exec -u nobody web id"])

EXIT_DOLIUM = 125


def _rootfs(context: Context, argument: str) -> str:
    """The folder of ``PATH:O``. Raises UsageError: without :O the host's own files would be written."""
    path, colon, mode = argument.rpartition(":")
    if not colon or mode != "O" or not path:
        raise UsageError(f"--rootfs {argument}: write PATH:O, a private writable layer above PATH")
    return context.path(path)


def _pull_when(client: Client, context: Context, options: dict[str, Any], image: str) -> None:
    if options["pull"] == "always":
        from dolium.cli.images import pull_image

        pull_image(client, context, image, options["platform"], quiet=False)
    elif options["pull"] not in (None, "missing", "never"):
        raise UsageError(f"invalid argument {options['pull']!r} for --pull: missing, always or never")


def _with_pull(client: Client, context: Context, options: dict[str, Any], image: str, request: Any) -> Any:
    """Do a request that needs the image; pull it and try again when it is missing."""
    try:
        return request()
    except ApiError as error:
        if error.status != 404 or not str(error).startswith("No such image") or options["pull"] == "never":
            raise
        from dolium.cli.images import pull_image

        context.stderr.write(f"Unable to find image '{image}' locally\n")
        pull_image(client, context, image, options["platform"], quiet=False, to_stderr=True)
        return request()


def run(client: Client, context: Context, words: list[str]) -> int:
    """``dolium run``. Docker's exit codes: the container's, or 125, 126, 127."""
    options, arguments = RUN.parse(words)
    if options.get("help"):
        context.stdout.write(RUN.usage())
        return 0
    image, command = arguments[0], arguments[1:]
    rootfs = _rootfs(context, image) if options["rootfs"] else ""
    if options["tty"] and options["interactive"] and not options["detach"] and not context.is_terminal(0):
        raise UsageError("the input device is not a TTY")
    body = create_body(context, options, "" if rootfs else image, command, context.window_size())
    _check_cid(context, options["cidfile"])
    if not rootfs:
        _pull_when(client, context, options, image)
    if options["detach"]:
        return _detached(client, context, options, image, rootfs, body)
    keeps = options["timings"] and options["rm"]
    if keeps:
        body["HostConfig"]["AutoRemove"] = False  # its timings are read before it is removed, below
    wish = {"name": options["name"] or "", "container": body, "rootfs": rootfs, "stdin": options["interactive"],
            "detach_keys": options["detach_keys"] or "", "platform": options["platform"] or ""}
    outcome = _with_pull(client, context, options, image,
                         lambda: client.session("POST", "/dolium/run", wish, stdin=options["interactive"],
                                                tty=options["tty"], sig_proxy=options["sig_proxy"],
                                                last=not options["timings"] and not keeps,
                                                on_note=lambda note: _write_cid(context, options["cidfile"], note)))
    if options["timings"] and outcome.identity:
        _show_timings(client, context, outcome.identity)
    if keeps and outcome.identity:
        if outcome.exit_code is None and outcome.failure is None:  # left running
            context.complain(f"{outcome.identity[:12]} goes on; with --timings it is not removed when it ends")
        else:
            client.call("DELETE", f"/containers/{outcome.identity}{query(force=True, v=True)}")
    return _exit_code(context, outcome)


def _exit_code(context: Context, outcome: Outcome) -> int:
    if outcome.failure is not None:
        context.complain(outcome.failure["message"])
        code = int(outcome.failure["code"])
        return code if code in (126, 127) else EXIT_DOLIUM
    return outcome.exit_code or 0


def _show_timings(client: Client, context: Context, identity: str) -> None:
    timings: dict[str, float] = client.call("GET", f"/containers/{identity}/json")["Dolium"]["Timings"]
    context.stdout.flush()
    if not timings:
        return
    total = timings.get("total", 0.0)
    context.stderr.write("\nwhere the time of the start went:\n")
    for phase, milliseconds in timings.items():
        share = "" if phase == "total" or not total else f"  {100 * milliseconds / total:4.0f} %"
        context.stderr.write(f"  {phase:<18}{milliseconds:9.3f} ms{share}\n")


def _check_cid(context: Context, path: str | None) -> None:
    """Before anything is made. Raises UsageError in Docker's words."""
    if not path:
        return
    context.own_process()
    if os.path.exists(context.path(path)):
        raise UsageError(f"container ID file found, make sure the other container isn't running or delete {path}")
    if not os.path.isdir(os.path.dirname(context.path(path))):
        raise UsageError(f"--cidfile {path}: no such folder")


def _write_cid(context: Context, path: str | None, identity: str) -> None:
    if not path:
        return
    with open(context.path(path), "x", encoding="ascii") as file:
        file.write(identity)


def _create(client: Client, context: Context, options: dict[str, Any], image: str, rootfs: str,
            body: dict[str, Any]) -> str:
    target = f"/containers/create{query(name=options['name'], rootfs=rootfs, platform=options['platform'])}"
    made = _with_pull(client, context, options, image, lambda: client.call("POST", target, body))
    _write_cid(context, options["cidfile"], made["Id"])
    return str(made["Id"])


def _detached(client: Client, context: Context, options: dict[str, Any], image: str, rootfs: str,
              body: dict[str, Any]) -> int:
    identity = _create(client, context, options, image, rootfs, body)
    try:
        client.call("POST", f"/containers/{identity}/start")
    except ApiError as error:
        context.complain(str(error))
        text = str(error)
        if "not found in $PATH" in text or "no such file or directory" in text:
            return 127
        return 126 if "permission denied" in text else EXIT_DOLIUM
    context.say(identity)
    return 0


def create(client: Client, context: Context, words: list[str]) -> int:
    """``dolium create``."""
    options, arguments = CREATE.parse(words)
    if options.get("help"):
        context.stdout.write(CREATE.usage())
        return 0
    rootfs = _rootfs(context, arguments[0]) if options["rootfs"] else ""
    _check_cid(context, options["cidfile"])
    body = create_body(context, options, "" if rootfs else arguments[0], arguments[1:], context.window_size())
    context.say(_create(client, context, options, arguments[0], rootfs, body))
    return 0


def execute(client: Client, context: Context, words: list[str]) -> int:
    """``dolium exec``."""
    options, arguments = EXEC.parse(words)
    if options.get("help"):
        context.stdout.write(EXEC.usage())
        return 0
    if options["tty"] and options["interactive"] and not context.is_terminal(0):
        raise UsageError("the input device is not a TTY")
    config = {"Cmd": arguments[1:], "Env": environment(context, options), "Tty": options["tty"],
              "AttachStdin": options["interactive"] and not options["detach"], "AttachStdout": not options["detach"],
              "AttachStderr": not options["detach"], "User": options["user"] or "", "WorkingDir": options["workdir"] or "",
              "Privileged": options["privileged"]}
    if options["detach"]:
        made = client.call("POST", f"/containers/{quote(arguments[0])}/exec", config)
        client.call("POST", f"/exec/{made['Id']}/start", {"Detach": True, "Tty": options["tty"]})
        return 0
    wish = {"container": arguments[0], "exec": config, "size": list(context.window_size()),
            "detach_keys": options["detach_keys"] or ""}
    outcome = client.session("POST", "/dolium/exec", wish, stdin=options["interactive"], tty=options["tty"], kind="exec",
                             last=True)
    if outcome.failure is not None:
        context.complain(outcome.failure["message"])
        return int(outcome.failure["code"])
    if outcome.exit_code is None:
        context.complain("the process goes on without this terminal, or the connection was lost")
        return 1
    return outcome.exit_code
