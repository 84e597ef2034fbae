"""The operations of the OCI interface as plans: create, start, state, kill, delete, exec … (runtime.md). Cold module.

Each takes what the command line said and facts, and gives a plan; none touches the system. Wrong states are refused
here, with the specification's rules: start twice, kill a stopped container, an id in use.
"""

from __future__ import annotations

import json

from dolium.errors import AlreadyExists, DeadlineExceeded, FailedPrecondition, InvalidArgument, NotFound
from dolium.linux.cgroup import tree
from dolium.runtime import cgroups, seccomp_cache, state
from dolium.runtime import plan as P
from dolium.runtime.compile import Launch, add_hooks, compile_container, compile_exec, state_json
from dolium.runtime.plan import PID, Plan
from dolium.runtime.spec import load, validate_process

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dolium.runtime.facts import Facts
    from dolium.runtime.systemd import Driver

SIGKILL = 9
KILL_WAIT_MS = 10_000
PS_LIMIT_MS = 10_000
FREEZE_SECONDS = 10


class Context:
    """The caller's context, as the front sent it. ``now``: seconds since 1970; ``created``: the same and a fraction, as a
    state tells it; ``pid``: the front's."""

    __slots__ = ("created", "criu", "cursor", "cwd", "env", "gid", "machine", "now", "pid", "root", "systemd", "uid")

    def __init__(self, cwd: str, env: dict[str, str], root: str, uid: int, gid: int, now: int, machine: str) -> None:
        self.cwd = cwd
        self.env = env
        self.root = root
        self.uid = uid
        self.gid = gid
        self.now = now
        self.machine = machine
        self.created = rfc3339(now)
        self.pid = 0
        self.criu = ""  # the program that --criu names
        self.systemd = False  # the systemd cgroup driver is asked for; later commands look at the state
        self.cursor = b""  # what this command's plan before handed on, by `again`


def absolute(cwd: str, path: str) -> str:
    """A path seen from the caller's cwd, without `.` and `..` being resolved by name."""
    return path if path.startswith("/") else f"{cwd.rstrip('/')}/{path}"


def rfc3339(seconds: int, nanoseconds: int = 0) -> str:
    """UTC, by arithmetic: datetime costs 2 ms to import (days_from_civil of the proleptic Gregorian calendar)."""
    days, rest = divmod(seconds, 86400)
    days += 719468
    era, day_of_era = divmod(days, 146097)
    year_of_era = (day_of_era - day_of_era // 1460 + day_of_era // 36524 - day_of_era // 146096) // 365
    day_of_year = day_of_era - (365 * year_of_era + year_of_era // 4 - year_of_era // 100)
    month = (5 * day_of_year + 2) // 153
    day = day_of_year - (153 * month + 2) // 5 + 1
    month = month + 3 if month < 10 else month - 9
    year = year_of_era + era * 400 + (1 if month <= 2 else 0)
    fraction = f".{nanoseconds:09d}" if nanoseconds else ""
    return f"{year:04d}-{month:02d}-{day:02d}T{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}{fraction}Z"


def _seccomp(plan_folder: str, config: dict[str, Any], facts: Facts, context: Context) -> tuple[bytes | None, str | None]:
    profile = (config.get("linux") or {}).get("seccomp")
    if not profile:
        return None, None
    return seccomp_cache.program(profile, context.machine, facts, plan_folder, context.uid)


def create(context: Context, facts: Facts, identity: str, bundle: str, options: dict[str, Any], *, run: bool) -> Plan:
    """``create``, and ``run`` when ``run``. Options: console-socket, pid-file, preserve-fds, no-pivot,
    no-new-keyring, detach, keep."""
    state.check_identity(identity)
    folder = f"{context.root}/{identity}"
    if context.cursor:  # of a detached run, when all is done
        return _notified(facts, folder)
    facts.want(f"stat:{folder}", f"real:{absolute(context.cwd, bundle)}", *cgroups.LAYOUT_QUERIES,
               seccomp_cache.RELEASE)
    if facts.stat(folder) is not None:
        raise AlreadyExists(f"container with given ID already exists: {identity}",
                            hint="choose another id, or delete the container")
    try:
        bundle = facts.real(absolute(context.cwd, bundle))
    except NotFound as error:
        raise InvalidArgument(f"bundle {bundle}: no such folder") from error
    text = facts.read(f"{bundle}/config.json")
    if text is None:
        raise InvalidArgument(f"bundle {bundle}: config.json: no such file",
                              hint="`dolium-runtime spec` writes one to start from")
    config = load(text, f"{bundle}/config.json")
    process = config.get("process") or {}
    if not process:
        raise InvalidArgument("config.json: process: is required")
    check_terminal(process, options, run)
    cache = f"{context.root}/.cache"
    launch = Launch(identity, bundle, cgroups.layout(facts), context.uid)
    launch.seccomp, keep = _seccomp(cache, config, facts, context)
    launch.no_pivot = bool(options.get("no-pivot"))
    launch.new_keyring = not options.get("no-new-keyring")
    launch.preserve_fds = int(options.get("preserve-fds") or 0) + activated(context, process)
    _sockets(context, options, launch)
    if not run:
        launch.start_socket = f"{folder}/start.sock"
    cgroups_path = (config.get("linux") or {}).get("cgroupsPath") or ""
    if context.systemd:
        from dolium.linux.cgroup.systemd import unit_of
        from dolium.runtime.systemd import require

        require(facts, launch.layout)
        launch.unit, launch.driver = unit_of(cgroups_path, identity, context.uid), _driver(context)
    if cgroups.rootless(facts, context.uid):
        from dolium.runtime import rootless

        rootless.prepare(context, facts, launch, config)
    manager = context.env.get("NOTIFY_SOCKET")
    prepared = Plan()
    if manager:
        from dolium.runtime import deeds, notify

        launch.notify = f"{folder}/{notify.FOLDER}"
        notify.prepare(prepared, folder, process)
    compiled = compile_container(config, facts, launch)
    root_path = config["root"]["path"]
    unit = launch.unit.name if launch.unit else ""
    groups = launch.layout if launch.groups is None else launch.groups
    folders = groups.paths(launch.unit.group if launch.unit else tree.group_of(cgroups_path, identity))
    record = state.template(identity, bundle, root_path if root_path.startswith("/") else f"{bundle}/{root_path}",
                            context.created, context.uid, folders, config["ociVersion"], unit,
                            callers_files(facts, launch.preserve_fds) if context.uid == 0 else None)

    plan = Plan(compiled.flags)
    add = plan.add
    # The state folder decides between two of one id. A group that turns out to be another's is left alone, and only
    # the folder is taken away again.
    add(P.PARENT_BEFORE_CLONE, "mkdir", f"make state folder {folder}", folder, 0o700, 3, nothing_ours=True)
    add(P.ON_FAILURE, "remove_dir", f"remove state folder {folder}", folder, nothing_ours=True)
    add(P.PARENT_BEFORE_CLONE, "lock", f"lock {folder}", folder)
    add(P.PARENT_BEFORE_CLONE, "write_file", f"write {folder}/config.json", f"{folder}/config.json", text, 0o600, 0)
    if unit:
        add(P.PARENT_BEFORE_CLONE, "write_file", f"write {folder}/unit", f"{folder}/unit", f"{unit}\n{folders[0]}\n", 0o600,
            0)
    if launch.seccomp is not None:
        seccomp_cache.keep(plan, cache, keep, launch.seccomp)
    plan.ops.extend(prepared.ops)
    plan.ops.extend(compiled.ops)
    add(P.PARENT_CREATED, "write_file", f"write {folder}/state.json", f"{folder}/state.json", record, 0o600, 1)
    if options.get("pid-file"):
        path = absolute(context.cwd, options["pid-file"])
        add(P.PARENT_CREATED, "write_file", f"write pid file {path}", path, PID, 0o644, 1)
    if run and manager:
        notify.listen(plan, P.PARENT_CREATED, folder, manager, deeds.PID_LATER, main=bool(options.get("detach")))
        if options.get("detach"):
            notify.wait(plan)
    if run:
        add_hooks(plan, P.PARENT_STARTED, config, "poststart", state_json(config, identity, bundle, "running"))
        if not options.get("detach"):
            add(P.PARENT_BEFORE_CLONE, "hold", "stay until it ends")
            if not options.get("keep"):
                _remove(plan, P.AFTER_EXIT, folders, folder, config, identity, bundle, unit, launch.driver,
                        notify=bool(manager))
    # runtime.md, Lifecycle: after a hook that fails comes step 12, and poststop
    add_hooks(plan, P.ON_FAILURE, config, "poststop", state_json(config, identity, bundle, "stopped", 0), optional=True)
    _remove_folder(plan, P.ON_FAILURE, folder, notify=bool(manager))
    return _clone_last(plan)


def _notified(facts: Facts, folder: str) -> Plan:
    from dolium.runtime import notify

    return notify.look(Plan(), facts, folder)


def _sockets(context: Context, options: dict[str, Any], launch: Launch) -> None:
    if options.get("console-socket"):
        launch.console_socket = absolute(context.cwd, options["console-socket"])
    if options.get("pidfd-socket"):
        launch.pidfd_socket = absolute(context.cwd, options["pidfd-socket"])


def callers_files(facts: Facts, count: int) -> dict[str, str]:
    """What the caller's ``count`` descriptors from 3 on are, by number; without those that it did not pass. (The front's own
    are closed on exec.)"""
    if not count:
        return {}
    from dolium.linux.criu import CLOSED_ON_EXEC, fdinfo, identity

    numbers = [number for number in map(int, facts.list("/proc/self/fd")) if 3 <= number < 3 + count]
    facts.want(*(f"read:/proc/self/fdinfo/{number}" for number in numbers))
    found = {}
    for number in sorted(numbers):
        fields = fdinfo((facts.read(f"/proc/self/fdinfo/{number}") or b"").decode())
        if "ino" in fields and not int(fields["flags"], 8) & CLOSED_ON_EXEC:
            found[str(number)] = identity(fields)
    return found


def activated(context: Context, process: dict[str, Any]) -> int:
    """Descriptors that were passed to this very process by sd_listen_fds(3): they and what is said of them go on to the
    container's first process. They lie before those of --preserve-fds, as in runc."""
    count = context.env.get("LISTEN_FDS", "")
    if not (count.isascii() and count.isdigit() and int(count)) or context.env.get("LISTEN_PID") != str(context.pid):
        return 0
    said = [f"LISTEN_FDS={int(count)}", "LISTEN_PID=1"]
    if context.env.get("LISTEN_FDNAMES"):
        said.append(f"LISTEN_FDNAMES={context.env['LISTEN_FDNAMES']}")
    names = ("LISTEN_FDS=", "LISTEN_PID=", "LISTEN_FDNAMES=")
    process["env"] = [entry for entry in process.get("env") or [] if not entry.startswith(names)] + said
    return int(count)


def _clone_last(plan: Plan) -> Plan:
    """clone3 comes after all else that the parent prepares."""
    clones = [op for op in plan.ops if op.name == "clone"]
    plan.ops = [op for op in plan.ops if op.name != "clone"] + clones
    return plan


def check_terminal(process: dict[str, Any], options: dict[str, Any], run: bool) -> None:
    """``--console-socket`` and ``process.terminal`` go with each other. Raises InvalidArgument."""
    terminal, socket = process.get("terminal"), options.get("console-socket")
    detached = not run or options.get("detach")
    if detached and terminal and not socket:
        raise InvalidArgument("cannot allocate tty if runc will detach without setting console socket",
                              hint="give --console-socket, or set process.terminal to false")
    if socket and not (detached and terminal):
        raise InvalidArgument("cannot use console socket if runc will not detach or allocate tty")


def _remove_folder(plan: Plan, stage: int, folder: str, *, notify: bool = True) -> None:
    if notify:
        plan.add(stage, "remove_dir", f"remove {folder}/notify", f"{folder}/notify")
    plan.add(stage, "remove_dir", f"remove state folder {folder}", folder)


def _driver(context: Context) -> Driver:
    from dolium.runtime.systemd import Driver

    return Driver(context.env, context.uid)


def _remove(plan: Plan, stage: int, folders: list[str], folder: str, config: dict[str, Any], identity: str,
            bundle: str, unit: str, driver: Driver | None, *, notify: bool = True) -> None:
    cgroups.remove(plan, stage, folders, unit, driver)
    if (config.get("linux") or {}).get("intelRdt") is not None:
        from dolium.runtime import rdt

        rdt.remove(plan, stage, config["linux"]["intelRdt"], identity)
    add_hooks(plan, stage, config, "poststop", state_json(config, identity, bundle, "stopped", 0), optional=True)
    _remove_folder(plan, stage, folder, notify=notify)


def remove(context: Context, plan: Plan, stage: int, where: state.State, config: dict[str, Any]) -> None:
    """All that a container leaves: its groups, its poststop hooks' turn, its state folder."""
    _remove(plan, stage, where.folders, where.folder, config, where.identity, where.bundle, where.unit,
            _driver(context) if where.unit else None)


def read_config(facts: Facts, where: state.State) -> dict[str, Any]:
    """The configuration a container was created with."""
    text = facts.read(f"{where.folder}/config.json")
    if text is None:
        raise FailedPrecondition(f"{where.folder}/config.json is missing", hint="`delete --force` removes the container")
    return load(text, f"{where.folder}/config.json")


def start(context: Context, facts: Facts, identity: str) -> Plan:
    """``start``: let a created container's init run its program."""
    if context.cursor:
        return _notified(facts, f"{context.root}/{identity}")
    facts.want(f"read:{context.root}/{identity}/state.json", f"stat:{context.root}/{identity}",
               f"read:{context.root}/{identity}/config.json")
    where = state.load(facts, context.root, identity)
    status = state.status(facts, where)
    if status == "stopped":
        raise FailedPrecondition(f"cannot start a container that has stopped: {identity}")
    if status == "paused":
        raise FailedPrecondition(f"cannot start a container in the paused state: {identity}", hint="resume it first")
    if status != "created":
        raise FailedPrecondition(f"cannot start an already running container: {identity}")
    config = read_config(facts, where)
    plan = Plan()
    # runtime.md, Lifecycle: a hook that fails here ends the container, and undoes it. Nothing else that fails does.
    hooks = config.get("hooks") or {}
    plan.add(P.PARENT_BEFORE_CLONE, "lock", f"lock {where.folder}", where.folder, nothing_ours=True)
    plan.add(P.PARENT_BEFORE_CLONE, "signal", f"start {identity}", where.pid, where.start_time, 0, nothing_ours=True)
    manager = context.env.get("NOTIFY_SOCKET")
    waits = manager and facts.stat(f"{where.folder}/notify") is not None  # it was there at `create` too
    if manager and waits:
        from dolium.runtime import notify

        notify.listen(plan, P.PARENT_BEFORE_CLONE, where.folder, manager, where.pid, main=True,
                      nothing_ours=True)
    plan.add(P.PARENT_BEFORE_CLONE, "start", f"start {identity}", f"{where.folder}/start.sock",
             nothing_ours=not hooks.get("startContainer"))
    plan.add(P.PARENT_BEFORE_CLONE, "unlink", "mark as running", f"{where.folder}/start.sock", nothing_ours=True)
    add_hooks(plan, P.PARENT_BEFORE_CLONE, config, "poststart",
              state_json(config, identity, where.bundle, "running", where.pid))
    if hooks.get("startContainer") or hooks.get("poststart"):
        _end(context, plan, P.ON_FAILURE, where, config)
    if waits:
        notify.wait(plan)
    return plan


def _show(text: str) -> Plan:
    plan = Plan()
    plan.add(P.PARENT_BEFORE_CLONE, "print", "print", 1, text)
    return plan


def query(context: Context, facts: Facts, identity: str) -> Plan:
    """``state``: the state as JSON on standard output."""
    facts.want(f"read:{context.root}/{identity}/state.json", f"stat:{context.root}/{identity}",
               f"read:{context.root}/{identity}/config.json")
    where = state.load(facts, context.root, identity)
    status = state.status(facts, where)
    config = read_config(facts, where)
    shown = {"ociVersion": where.oci_version, "id": identity, "pid": 0 if status == "stopped" else where.pid,
             "status": status, "bundle": where.bundle, "rootfs": where.rootfs, "created": where.created,
             "owner": "root" if where.owner == 0 else str(where.owner)}
    if config.get("annotations"):
        shown["annotations"] = config["annotations"]
    return _show(json.dumps(shown, indent=2) + "\n")


def kill(context: Context, facts: Facts, identity: str, signal: int, *, everyone: bool) -> Plan:
    """``kill``: a signal to init; with ``everyone`` (--all) to all in its cgroup, even when init is dead: SIGKILL until it
    is empty, others while it is frozen, so that nobody who is made meanwhile is missed."""
    where = state.load(facts, context.root, identity)
    if everyone and context.cursor:
        return _signal_frozen(context, facts, where, signal)
    status = state.status(facts, where)
    plan = Plan()
    if everyone and signal == SIGKILL:
        plan.add(P.PARENT_BEFORE_CLONE, "cg_kill", f"kill all of {identity}", where.folders)
        return plan
    if everyone and where.folders:
        if status == "paused":
            _signal_all(plan, facts, where, signal)
        elif cgroups.processes(facts, where.folders[0]):
            cgroups.freeze(plan, P.PARENT_BEFORE_CLONE, cgroups.layout(facts), where.folders, True)
            for op in plan.ops:  # who is in an uninterruptible sleep forks nobody, and gets the signal as well
                op.flags |= P.OPTIONAL
            plan.add(P.PARENT_BEFORE_CLONE, "again", "look", 0, str(_uptime(facts) + FREEZE_SECONDS))
        return plan
    if status == "stopped":
        raise FailedPrecondition(f"container not running: {identity}")
    plan.add(P.PARENT_BEFORE_CLONE, "signal", f"kill {identity}", where.pid, where.start_time, signal)
    layout = cgroups.layout(facts)
    if status == "paused" and signal == SIGKILL and layout.v1:  # there who is frozen does not even die
        cgroups.freeze(plan, P.PARENT_BEFORE_CLONE, layout, where.folders, False)
    return plan


def _signal_all(plan: Plan, facts: Facts, where: state.State, signal: int) -> None:
    """To all that are in the group now."""
    pids = cgroups.processes(facts, where.folders[0])
    facts.want(*(f"read:/proc/{pid}/stat" for pid in pids))
    for pid in pids:
        started = state.start_time(facts, pid)
        if started is not None:
            plan.add(P.PARENT_BEFORE_CLONE, "signal", f"kill process {pid} of {where.identity}", pid, started, signal,
                     optional=True)


def _signal_frozen(context: Context, facts: Facts, where: state.State, signal: int) -> Plan:
    """What ``kill --all`` froze: signal it and let it go on. Of v2 a file says when all are frozen: looked for again until
    then (``cursor``: the uptime at which to go on as it is)."""
    thaw, plan = Plan(), Plan()
    told = cgroups.freeze(thaw, P.PARENT_BEFORE_CLONE, cgroups.layout(facts), where.folders, False)
    events = (facts.read(told) or b"").split(b"\n") if told else []
    if b"frozen 0" in events and b"populated 1" in events and _uptime(facts) < int(context.cursor):
        plan.add(P.PARENT_BEFORE_CLONE, "again", "look", 1, context.cursor)
        return plan
    _signal_all(plan, facts, where, signal)
    plan.ops += thaw.ops
    return plan


def delete(context: Context, facts: Facts, identity: str, *, force: bool) -> Plan:
    """``delete``: remove what a stopped (or, by force, any) container left. Deletes are idempotent when forced."""
    folder = f"{context.root}/{identity}"
    facts.want(f"read:{folder}/state.json", f"stat:{folder}", f"read:{folder}/config.json")
    plan = Plan()
    try:
        where = state.load(facts, context.root, identity)
    except NotFound:
        if force:
            return plan
        raise
    except FailedPrecondition:
        if not force:
            raise
        return _delete_half_made(context, facts, plan, identity, folder)
    status = state.status(facts, where)
    if status in ("running", "paused") and not force:
        raise FailedPrecondition(f"cannot delete container {identity} that is not stopped: {status}",
                                 hint="kill it first, or use --force")
    plan.add(P.PARENT_BEFORE_CLONE, "lock", f"lock {folder}", folder)
    if status == "stopped":
        remove(context, plan, P.PARENT_BEFORE_CLONE, where, read_config(facts, where))
    else:
        _end(context, plan, P.PARENT_BEFORE_CLONE, where, read_config(facts, where))
    return plan


def _end(context: Context, plan: Plan, stage: int, where: state.State, config: dict[str, Any]) -> None:
    """Kill a container, and remove what it leaves."""
    plan.add(stage, "signal", f"kill {where.identity}", where.pid, where.start_time, SIGKILL, optional=True)
    plan.add(stage, "cg_kill", f"kill all of {where.identity}", where.folders)
    plan.add(stage, "wait_gone", f"wait for the init of {where.identity}", where.pid, where.start_time, KILL_WAIT_MS)
    remove(context, plan, stage, where, config)


def _delete_half_made(context: Context, facts: Facts, plan: Plan, identity: str, folder: str) -> Plan:
    """The runtime was killed between the state folder and the record: the group is named by the configuration."""
    text = facts.read(f"{folder}/config.json")
    path = ""
    if text is not None:
        try:
            path = (json.loads(text).get("linux") or {}).get("cgroupsPath") or ""
        except (ValueError, AttributeError):
            path = ""  # cut off in the middle of writing: nothing was made after it
    unit, _, group = (facts.read(f"{folder}/unit") or b"").decode().strip().partition("\n")
    folders = [group] if group else cgroups.layout(facts).paths(tree.group_of(path, identity))
    # a runtime that is still at work holds the lock: then this waits for it, and removes what it made
    plan.add(P.PARENT_BEFORE_CLONE, "lock", f"lock {folder}", folder)
    cgroups.remove(plan, P.PARENT_BEFORE_CLONE, folders, unit, _driver(context) if unit else None)
    _remove_folder(plan, P.PARENT_BEFORE_CLONE, folder)
    return plan


def pause(context: Context, facts: Facts, identity: str, *, resume: bool) -> Plan:
    """``pause`` and ``resume``: the freezer. v2 says later that all are frozen: looked for again until then (``cursor``: the
    uptime at which to give up, or "late")."""
    where = state.load(facts, context.root, identity)
    if context.cursor:
        return _wait_frozen(context, facts, where)
    status = state.status(facts, where)
    if resume and status != "paused":
        raise FailedPrecondition(f"container not paused: {identity}")
    if not resume and status not in ("running", "created"):
        raise FailedPrecondition(f"container not running or created: {status}")
    plan = Plan()
    told = cgroups.freeze(plan, P.PARENT_BEFORE_CLONE, cgroups.layout(facts), where.folders, not resume)
    if told and not resume:
        plan.add(P.PARENT_BEFORE_CLONE, "again", "look", 0, str(_uptime(facts) + FREEZE_SECONDS))
    return plan


def _uptime(facts: Facts) -> int:
    """Seconds since boot, at this call and not at the command's begin."""
    return int((facts.read("/proc/uptime") or b"0").split(b".")[0])


def _wait_frozen(context: Context, facts: Facts, where: state.State) -> Plan:
    if context.cursor == b"late":
        raise DeadlineExceeded(f"container {where.identity} did not freeze within {FREEZE_SECONDS} s and was resumed",
                               hint="probable cause: one of its processes is in an uninterruptible sleep (state D in `ps`)")
    plan = Plan()
    folder = where.folders[-1]
    told = (facts.read(f"{folder}/cgroup.events") or b"").split(b"\n")
    if b"frozen 1" in told:
        return plan
    if b"populated 1" not in told:
        raise FailedPrecondition(f"container {where.identity} ended before it was frozen")
    if _uptime(facts) >= int(context.cursor):
        plan.add(P.PARENT_BEFORE_CLONE, "cg_write", f"resume cgroup {folder}", f"{folder}/cgroup.freeze", "0", 0)
        plan.add(P.PARENT_BEFORE_CLONE, "again", "tell", 0, "late")
        return plan
    plan.add(P.PARENT_BEFORE_CLONE, "again", "look", 10, context.cursor)
    return plan


def listing(context: Context, facts: Facts, *, quiet: bool, as_json: bool) -> Plan:
    """``list``: every container below the root, in runc's columns, or as JSON."""
    rows: list[dict[str, Any]] = []
    names = [name for name in facts.list(context.root) if not name.startswith(".")]
    facts.want(*(f"read:{context.root}/{name}/state.json" for name in names))
    for name in names:
        if facts.read(f"{context.root}/{name}/state.json") is None:
            continue
        try:
            where = state.load(facts, context.root, name)
        except FailedPrecondition:
            continue  # a damaged record must not hide the others; `state` tells what is wrong with it
        status = state.status(facts, where)
        row = {"ociVersion": where.oci_version, "id": name, "pid": 0 if status == "stopped" else where.pid,
               "status": status, "bundle": where.bundle, "rootfs": where.rootfs, "created": where.created}
        annotations = _annotations(facts, where) if as_json else None
        rows.append({**row, **({"annotations": annotations} if annotations else {}),
                     "owner": "root" if where.owner == 0 else str(where.owner)})
    if quiet:
        return _show("".join(f"{row['id']}\n" for row in rows))
    if as_json:
        return _show(json.dumps(rows or None) + "\n")
    titles = ("ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER")
    table = [titles, *((row["id"], str(row["pid"]), row["status"], row["bundle"], row["created"], row["owner"])
                       for row in rows)]
    widths = [max(12, *(len(line[column]) + 3 for line in table)) for column in range(len(titles))]
    return _show("".join("".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n"
                         for line in table))


def _annotations(facts: Facts, where: state.State) -> object:
    """Those of the configuration; None also when that is gone or damaged: `state` tells what is wrong with it."""
    try:
        return json.loads(facts.read(f"{where.folder}/config.json") or b"{}").get("annotations")
    except (ValueError, AttributeError):
        return None


def processes(context: Context, facts: Facts, identity: str, words: list[str], *, as_json: bool) -> Plan:
    """``ps``: the processes in the container's cgroup and the groups below it, as numbers of the caller's pid namespace;
    as a table, what ps(1) says of them when asked with ``words`` (default -ef); without that program, number and command."""
    where = state.load(facts, context.root, identity)
    pids = sorted(cgroups.processes(facts, where.folders[0])) if where.folders else []
    if as_json:
        return _show(json.dumps(pids or None) + "\n")
    said = f"{where.folder}/ps.{context.pid}"
    if context.cursor == b"said":
        table = _only(facts.read(said) or b"", pids)
        plan = _show(table)
        plan.add(P.PARENT_BEFORE_CLONE, "unlink", "forget what ps said", said)
        if not table:
            plan.add(P.PARENT_BEFORE_CLONE, "again", "tell", 0, "no PID")
        return plan
    if context.cursor:
        raise InvalidArgument("couldn't find PID field in ps output", hint="ask for it: -o pid,...")
    program = facts.program("ps", context.env)
    if program is None and words:
        raise NotFound("ps: this program is not installed", hint="Debian's package procps has it")
    if program is not None:
        plan = Plan()
        script = 'umask 077; out=$1; shift; exec "$@" > "$out"'
        env = [f"{name}={context.env[name]}" for name in ("COLUMNS", "LANG", "TZ") if name in context.env]
        plan.add(P.PARENT_BEFORE_CLONE, "hook", "ps", "/bin/sh",
                 ["sh", "-c", script, "sh", said, program, *(words or ["-ef"])], env, PS_LIMIT_MS, "")
        plan.add(P.PARENT_BEFORE_CLONE, "again", "show", 0, "said")
        plan.add(P.ON_FAILURE, "unlink", "forget what ps said", said)
        return plan
    facts.want(*(f"read:/proc/{pid}/cmdline" for pid in pids))
    lines = ["       PID CMD"]
    for pid in pids:
        words = (facts.read(f"/proc/{pid}/cmdline") or b"").rstrip(b"\0").decode("utf-8", "replace").split("\0")
        lines.append(f"{pid:>10} {' '.join(words)}")
    return _show("\n".join(lines) + "\n")


def _only(text: bytes, pids: list[int]) -> str:
    """The title and the lines of a table that speak of these processes; "" where no column is called PID."""
    title, *lines = text.decode("utf-8", "surrogateescape").splitlines(keepends=True) or [""]
    if "PID" not in title.split():
        return ""
    at, wanted = title.split().index("PID"), {str(pid) for pid in pids}
    return title + "".join(line for line in lines if line.split()[at : at + 1] and line.split()[at] in wanted)


def execute(context: Context, facts: Facts, identity: str, process: dict[str, Any], options: dict[str, Any]) -> Plan:
    """``exec``: one more process. ``process``: the specification's object, or only what differs from the container's.
    Options: detach, pid-file, console-socket, preserve-fds, ignore-paused, cgroup."""
    folder = f"{context.root}/{identity}"
    facts.want(f"read:{folder}/state.json", f"stat:{folder}", f"read:{folder}/config.json")
    where = state.load(facts, context.root, identity)
    facts.want(f"read:/proc/{where.pid}/cgroup", f"read:/proc/{where.pid}/stat", f"stat:{folder}/start.sock",
               *cgroups.LAYOUT_QUERIES, seccomp_cache.RELEASE)
    status = state.status(facts, where)
    if status == "stopped":
        raise FailedPrecondition("cannot exec in a stopped container")
    if status == "paused" and not options.get("ignore-paused"):
        raise FailedPrecondition("cannot exec in a paused container", hint="use --ignore-paused to override")
    config = read_config(facts, where)
    validate_process(process)
    _check_terminal_exec(process, options)
    cache = f"{context.root}/.cache"
    layout = cgroups.layout(facts)
    launch = Launch(identity, where.bundle, layout, context.uid)
    launch.seccomp, keep = _seccomp(cache, config, facts, context)
    launch.preserve_fds = int(options.get("preserve-fds") or 0)
    _sockets(context, options, launch)
    membership = (facts.read(f"/proc/{where.pid}/cgroup") or b"").decode()
    plan = Plan()
    if launch.seccomp is not None:
        seccomp_cache.keep(plan, cache, keep, launch.seccomp)
    # a hierarchy in which the container has no group of its own is not for this caller to join
    bases = [base for base in (*layout.folders, layout.unified) if base
             and any(folder.startswith(f"{base}/") for folder in where.folders)]
    present = [folder for folder in tree.parse_membership(membership, layout)
               if any(folder == base or folder.startswith(f"{base}/") for base in bases)]
    folders = _sub_cgroups(facts, layout, present, options.get("cgroup") or [])
    compiled = compile_exec(config, process, facts, where.pid, where.start_time, launch, folders)
    plan.ops += compiled.ops
    if options.get("pid-file"):
        path = absolute(context.cwd, options["pid-file"])
        plan.add(P.PARENT_CREATED, "write_file", f"write pid file {path}", path, PID, 0o644, 1)
    if not options.get("detach"):
        plan.add(P.PARENT_BEFORE_CLONE, "hold", "stay until it ends")
    return _clone_last(plan)


def _sub_cgroups(facts: Facts, layout: tree.Layout, folders: list[str], wishes: list[str]) -> list[str]:
    """The folders to join with ``--cgroup [CONTROLLER[,CONTROLLER]:]PATH``: existing groups below init's.

    Without a controller the path holds for every hierarchy. Raises InvalidArgument, before anything was done.
    """
    for wish in wishes:
        controllers, colon, path = wish.rpartition(":")
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if ".." in parts:
            raise InvalidArgument(f"--cgroup {wish}: {path!r} is not a sub cgroup path")
        bases = [layout.v1.get(name) or (layout.unified if name in ("", "unified") else None) or name
                 for name in controllers.split(",")] if colon else None
        known = [*layout.folders, *([layout.unified] if layout.unified else [])]
        for base in bases or ():
            if base not in known:
                raise InvalidArgument(f"--cgroup {wish}: there is no cgroup controller {base!r} here")
        for number, folder in enumerate(folders):
            if bases is not None and not any(folder == base or folder.startswith(f"{base}/") for base in bases):
                continue
            folders[number] = "/".join([folder, *parts])
            if facts.stat(f"{folders[number]}/cgroup.procs") is None:
                raise InvalidArgument(f"--cgroup {wish}: {folders[number]} does not exist")
    return folders


def _check_terminal_exec(process: dict[str, Any], options: dict[str, Any]) -> None:
    if options.get("detach") and process.get("terminal") and not options.get("console-socket"):
        raise InvalidArgument("cannot allocate tty if runc will detach without setting console socket",
                              hint="give --console-socket")
    if options.get("console-socket") and not (options.get("detach") and process.get("terminal")):
        raise InvalidArgument("cannot use console socket if runc will not detach or allocate tty")
