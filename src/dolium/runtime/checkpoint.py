"""``checkpoint`` and ``restore`` by CRIU, with runc's flags. Imported by these two commands alone.

CRIU runs in a program of ours that the plan starts (``linux/criu_calls.py``); what came of it is read as a fact when the
front asks once more (``again``): then the hooks' turn comes, or what was made is taken away and the error told.
"""

from __future__ import annotations

import json

from dolium.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from dolium.linux import criu
from dolium.linux import mounts as km
from dolium.linux.cgroup import tree
from dolium.runtime import cgroups, deeds, state
from dolium.runtime import plan as P
from dolium.runtime.compile import FIRST_CGROUP_SLOT, add_hooks, state_json
from dolium.runtime.lifecycle import absolute, activated, callers_files, check_terminal, read_config, remove
from dolium.runtime.plan import Plan
from dolium.runtime.spec import load, namespaces

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dolium.linux.cgroup.systemd import Unit
    from dolium.runtime.facts import Facts
    from dolium.runtime.lifecycle import Context
    from dolium.runtime.systemd import Driver

NOTES, NOTES_VERSION = "dolium.json", 1  # beside CRIU's images: what restore has to give back
CALLS = "dolium.linux.criu_calls"
# Namespaces that CRIU leaves to its caller when they are others', by the keys that runc gives them.
SHARED = {"network": ("net", "extRootNetNS"), "pid": ("pid", "extRootPidNS")}
CONSOLE = "/dev/console"  # a further place of the terminal's inner end
BOTH = {"lazy-pages": "--lazy-pages",
        "tcp-established": "--tcp-established", "ext-unix-sk": "--ext-unix-sk", "shell-job": "--shell-job",
        "file-locks": "--file-locks"}
DUMP = {"tcp-skip-in-flight": "--skip-in-flight", "link-remap": "--link-remap"}


def _outcome(facts: Facts, path: str) -> dict[str, Any]:
    text = facts.read(path)
    try:
        found = json.loads(text or b"")
    except ValueError:
        return {"error": "the program that runs CRIU ended without saying why"}
    return found if isinstance(found, dict) else {}


def _common(context: Context, options: dict[str, Any], images: str, log: str) -> list[str]:
    """Flags of dump and restore alike."""
    mode = options.get("manage-cgroups-mode") or "soft"
    if mode not in criu.MODES:
        raise InvalidArgument(f"--manage-cgroups-mode: {mode!r} is not one of {', '.join(criu.MODES)}")
    if options.get("empty-ns") not in (None, "network"):
        raise InvalidArgument(f"--empty-ns: {options['empty-ns']!r} is not a namespace that can be empty", hint="network is")
    return [f"--images-dir={images}", f"--work-dir={_work(context, options, images)}", f"--log-file={log}", "-v4",
            f"--manage-cgroups={criu.MODES[mode]}", *(word for flag, word in BOTH.items() if options.get(flag)),
            *(["--auto-dedup"] if options.get("auto-dedup") else []),
            *(["--empty-ns=net"] if options.get("empty-ns") else [])]


def _work(context: Context, options: dict[str, Any], images: str) -> str:
    return absolute(context.cwd, options["work-path"]) if options.get("work-path") else images


def _images(context: Context, options: dict[str, Any]) -> str:
    return absolute(context.cwd, options.get("image-path") or "checkpoint")


def _request(context: Context, verb: str, arguments: list[str], outcome: str, **more: Any) -> dict[str, Any]:
    return {"verb": verb, "program": context.criu or "criu", "arguments": arguments, "outcome": outcome,
            "path": context.env.get("PATH") or "/usr/sbin:/usr/bin:/sbin:/bin", **more}


# -- checkpoint --


def checkpoint(context: Context, facts: Facts, identity: str, options: dict[str, Any]) -> Plan:
    """``checkpoint``: the container's processes as images; it ends, but with --leave-running or --pre-dump."""
    if context.cursor == b"done" and facts.stat(f"{context.root}/{identity}") is None:
        # a `run` in the foreground saw the container's end and was faster; the notes are there when the dump went well
        _notes(facts, _images(context, options))
        return Plan()
    where = state.load(facts, context.root, identity)
    outcome = f"{where.folder}/criu.outcome"
    if context.cursor == b"done":
        return _checkpointed(context, facts, where, options, outcome)
    if context.cursor:
        raise FailedPrecondition(f"checkpoint of {identity}: {context.cursor.decode('utf-8', 'replace')}")
    status = state.status(facts, where)
    if status in ("created", "stopped"):
        raise FailedPrecondition(f"container {identity} cannot be checkpointed in {status} state")
    config = read_config(facts, where)
    if (config.get("process") or {}).get("terminal"):
        options = {**options, "shell-job": True}  # the other end of its terminal is outside
    images = _images(context, options)
    before = options.get("pre-dump")
    arguments = ["pre-dump" if before else "dump", f"--tree={where.pid}", f"--root={where.rootfs}",
                 *_common(context, options, images, "dump.log"), *_freezer(facts, where)]
    if options.get("leave-running") and not before:
        arguments.append("--leave-running")
    arguments += [word for flag, word in DUMP.items() if options.get(flag)]
    if options.get("parent-path"):
        arguments.append(f"--prev-images-dir={_parent(facts, images, options['parent-path'])}")
    if before or options.get("parent-path"):
        arguments.append("--track-mem")
    if options.get("page-server"):
        address, colon, port = options["page-server"].rpartition(":")
        if not colon or not port.isascii() or not port.isdigit():
            raise InvalidArgument(f"--page-server: {options['page-server']!r} is not ADDRESS:PORT")
        # with --lazy-pages the dump itself serves there
        arguments += [*([] if options.get("lazy-pages") else ["--page-server"]), f"--address={address}", f"--port={port}"]
    notes = _outside(facts, where, config)
    arguments += criu.externals((place, place) for place in [*notes["masks"], *notes["binds"], *notes["console"]])
    shared = {kind: SHARED[kind] for kind, path in namespaces(config).items() if kind in SHARED and path}
    plan = Plan()
    plan.add(P.PARENT_BEFORE_CLONE, "lock", f"lock {where.folder}", where.folder)
    for folder in dict.fromkeys((images, _work(context, options, images))):
        plan.add(P.PARENT_BEFORE_CLONE, "mkdir", f"make {folder}", folder, 0o700, 1)
    plan.add(P.PARENT_BEFORE_CLONE, "unlink", "forget the outcome before", outcome)
    status_fd = options.get("status-fd")
    if status_fd is not None and not (status_fd.isascii() and status_fd.isdigit() and len(status_fd) < 10):
        raise InvalidArgument(f"--status-fd: {status_fd!r} is not a number")
    request = _request(context, "dump", arguments, outcome, log=f"{_work(context, options, images)}/dump.log", notes=notes,
                       serves=bool(options.get("lazy-pages")), notes_path="" if before else f"{images}/{NOTES}",
                       pid=where.pid, shared=shared, preserved=where.preserved,
                       group=where.folders[0] if where.folders else "",
                       status_fd=None if status_fd is None else int(status_fd))
    deeds.add(plan, P.PARENT_BEFORE_CLONE, f"checkpoint {identity}", CALLS, request, 0, optional=True)
    plan.add(P.PARENT_BEFORE_CLONE, "again", "look", 0, "done")
    return plan


def _parent(facts: Facts, images: str, parent: str) -> str:
    """CRIU takes it as seen from the images' folder."""
    if parent.startswith("/"):
        raise InvalidArgument("--parent-path must be relative to --image-path")
    parts: list[str] = []
    for part in f"{images}/{parent}".split("/"):  # the images' folder itself need not be there yet
        parts = parts[:-1] if part == ".." else [*parts, part] if part not in ("", ".") else parts
    if facts.stat(f"/{'/'.join(parts)}") is None:
        raise InvalidArgument(f"--parent-path: /{'/'.join(parts)} does not exist")
    return parent


def _freezer(facts: Facts, where: state.State) -> list[str]:
    layout = cgroups.layout(facts)
    base = layout.v1.get("freezer") or layout.unified
    folder = next((folder for folder in where.folders if base and folder.startswith(f"{base}/")), None)
    return [f"--freeze-cgroup={folder}"] if folder else []


def _outside(facts: Facts, where: state.State, config: dict[str, Any]) -> dict[str, Any]:
    """The mounts that restore will have to give back; the program that runs CRIU looks at open files and namespaces."""
    inside = criu.mounts((facts.read(f"/proc/{where.pid}/mountinfo") or b"").decode("utf-8", "surrogateescape"))
    places = {mount.place for mount in inside}
    binds = []
    for index, entry in enumerate(config.get("mounts") or []):
        place = km.tidy(entry["destination"])
        own_group = entry.get("type") in ("cgroup", "cgroup2") and "cgroup" not in namespaces(config)
        if entry.get("type") != "bind" and not {"bind", "rbind"} & set(entry.get("options") or []) and not own_group:
            continue
        if place not in places:
            raise FailedPrecondition(f"checkpoint of {where.identity}: mounts[{index}].destination: nothing is mounted on "
                                     f"{place}: it leads through a link, or was unmounted", hint="name the place itself")
        binds.append(place)
    masks = [mount.place for mount in inside if mount.kind == "devtmpfs" and mount.place not in binds]
    console = [CONSOLE] if CONSOLE in places and CONSOLE not in binds else []
    return {"version": NOTES_VERSION, "masks": masks, "binds": binds, "console": console}


def _checkpointed(context: Context, facts: Facts, where: state.State, options: dict[str, Any], outcome: str) -> Plan:
    found = _outcome(facts, outcome)
    plan = Plan()
    plan.add(P.PARENT_BEFORE_CLONE, "lock", f"lock {where.folder}", where.folder)
    plan.add(P.PARENT_BEFORE_CLONE, "unlink", "forget the outcome", outcome)
    if "error" in found:
        plan.add(P.PARENT_BEFORE_CLONE, "again", "tell", 0, str(found["error"]))
    elif not options.get("leave-running") and not options.get("pre-dump"):
        remove(context, plan, P.PARENT_BEFORE_CLONE, where, read_config(facts, where))
    return plan


# -- restore --


def restore(context: Context, facts: Facts, identity: str, options: dict[str, Any]) -> Plan:
    """``restore``: a new container from images and a bundle, as ``run`` would leave it."""
    state.check_identity(identity)
    folder = f"{context.root}/{identity}"
    stage, _, rest = context.cursor.partition(b" ")
    if stage == b"failed":
        raise FailedPrecondition(f"restore of {identity}: {rest.decode('utf-8', 'replace')}")
    bundle = facts.real(absolute(context.cwd, options.get("bundle") or "."))
    if stage:
        return _restored(context, facts, identity, bundle, options)
    if facts.stat(folder) is not None:
        raise AlreadyExists(f"container with given ID already exists: {identity}",
                            hint="choose another id, or delete the container")
    text = facts.read(f"{bundle}/config.json")
    if text is None:
        raise InvalidArgument(f"bundle {bundle}: config.json: no such file")
    config = load(text, f"{bundle}/config.json")
    process = config.get("process") or {}
    check_terminal(process, options, not options.get("detach"))
    terminal: dict[str, Any] = {}
    if process.get("terminal"):
        options = {**options, "shell-job": True}
        size = process.get("consoleSize") or {}
        terminal = {"socket": absolute(context.cwd, options["console-socket"]) if options.get("console-socket") else "",
                    "rows": size.get("height") or 0, "columns": size.get("width") or 0}
    images = _images(context, options)
    notes = _notes(facts, images)
    if terminal:
        terminal["console"] = notes["console"]
    layout = cgroups.layout(facts)
    linux = config.get("linux") or {}
    resources = linux.get("resources") or {}
    cgroups.check(facts, layout, resources)
    unit, driver, group = _group(context, facts, layout, config, identity)
    folders = layout.paths(group)
    outcome = f"{folder}/criu.outcome"
    rootfs = config["root"]["path"]
    rootfs = rootfs if rootfs.startswith("/") else f"{bundle}/{rootfs}"
    count = int(options.get("preserve-fds") or 0) + activated(context, {})
    given = callers_files(facts, count)
    record = state.template(identity, bundle, rootfs, context.created, context.uid, folders, config["ociVersion"],
                            unit.name if unit else "", given)
    arguments = [f"--root={rootfs}", *_restore_arguments(context, options, config, notes, images, bundle, group)]
    request = _request(
        context, "restore", arguments, outcome, log=f"{_work(context, options, images)}/restore.log", rootfs=rootfs,
        images=images, work=_work(context, options, images), detach=bool(options.get("detach")),
        opened=_namespace_files(config, notes), hooks=_hooks(config, identity, bundle, "prestart", "createRuntime"),
        started=_hooks(config, identity, bundle, "poststart"), scope=folders[0] if unit else "",
        targets=_targets(config), record=record, state=f"{folder}/state.json",
        told=absolute(context.cwd, options["pid-file"]) if options.get("pid-file") else "",
        pidfd_socket=absolute(context.cwd, options["pidfd-socket"]) if options.get("pidfd-socket") else "",
        streams=_streams(notes), preserved=_preserved(count, given, notes),
        keyring="" if options.get("no-new-keyring") else f"_ses.{identity}", movable=bool(options.get("no-pivot")),
        terminal=terminal, join=folders if options.get("manage-cgroups-mode") == "ignore" else [])
    plan = Plan()
    plan.add(P.PARENT_BEFORE_CLONE, "mkdir", f"make state folder {folder}", folder, 0o700, 3, nothing_ours=True)
    plan.add(P.ON_FAILURE, "remove_dir", f"remove state folder {folder}", folder, nothing_ours=True)
    if options.get("detach"):  # in the foreground this lasts as long as the container: `delete` must not wait for it
        plan.add(P.PARENT_BEFORE_CLONE, "lock", f"lock {folder}", folder)
    plan.add(P.PARENT_BEFORE_CLONE, "write_file", f"write {folder}/config.json", f"{folder}/config.json",
             text.replace(b"\x01", b"\x01\x01"), 0o600, 0)
    if unit and driver:
        plan.add(P.PARENT_BEFORE_CLONE, "write_file", f"write {folder}/unit", f"{folder}/unit",
                 f"{unit.name}\n{folders[0]}\n", 0o600, 0)
        driver.hold(plan, P.PARENT_BEFORE_CLONE, unit, identity, config.get("annotations") or {}, resources)
        cgroups.enable_controllers(plan, P.PARENT_BEFORE_CLONE, group, resources)
        cgroups.add_limits(plan, P.PARENT_BEFORE_CLONE, layout, group, resources)
    else:
        cgroups.make(plan, layout, group, resources, FIRST_CGROUP_SLOT, born=True)
    cgroups.remove(plan, P.ON_FAILURE, folders, unit.name if unit else "", driver)
    plan.add(P.ON_FAILURE, "remove_dir", f"remove state folder {folder}", folder)
    deeds.add(plan, P.PARENT_BEFORE_CLONE, f"restore {identity}", CALLS, request,
              0 if options.get("detach") else deeds.FOREGROUND, optional=True)
    plan.add(P.PARENT_BEFORE_CLONE, "again", "look", 0, f"done {context.now}")
    return plan


def _group(context: Context, facts: Facts, layout: tree.Layout, config: dict[str, Any],
           identity: str) -> tuple[Unit | None, Driver | None, str]:
    """With --systemd-cgroup the scope to make and by whom; and the group's path below a hierarchy's root."""
    path = (config.get("linux") or {}).get("cgroupsPath") or ""
    if not context.systemd:
        return None, None, tree.group_of(path, identity)
    from dolium.linux.cgroup.systemd import unit_of
    from dolium.runtime.systemd import Driver, require

    require(facts, layout)
    unit = unit_of(path, identity, context.uid)
    return unit, Driver(context.env, context.uid), unit.group


def _hooks(config: dict[str, Any], identity: str, bundle: str, *kinds: str) -> list[tuple[str, dict[str, Any], str]]:
    """Those that have their turn again: the namespaces are new. createContainer and startContainer belong to a root and a
    program that are made, which CRIU brings back instead; runc runs neither."""
    state = state_json(config, identity, bundle, "running" if kinds == ("poststart",) else "creating")
    return [(kind, hook, state) for kind in kinds for hook in (config.get("hooks") or {}).get(kind) or []]


def _notes(facts: Facts, images: str) -> dict[str, Any]:
    text = facts.read(f"{images}/{NOTES}")
    if text is None:
        raise NotFound(f"--image-path {images}: there is no {NOTES}",
                       hint="`dolium-runtime checkpoint` writes it beside CRIU's images")
    try:
        notes = json.loads(text)
        if notes["version"] != NOTES_VERSION:
            raise InvalidArgument(f"{images}/{NOTES} is of version {notes['version']}, not {NOTES_VERSION}")
        return {**{key: notes[key] for key in ("masks", "binds", "files", "namespaces")},
                "console": notes.get("console") or [], "preserved": notes.get("preserved") or {}}
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidArgument(f"{images}/{NOTES} is damaged: {error!r}") from error


def _streams(notes: dict[str, Any]) -> list[tuple[int, str, str]]:
    """(the caller's descriptor, what it stands for, its path then), each file once: two that were the same stay the same."""
    once = {key: (int(fd), key, target) for fd, (key, target) in reversed(notes["files"].items())}
    preserved = [entry[0] for entry in notes["preserved"].values() if entry]  # a shell at `read <&4` has that one twice
    return [one for key, one in once.items() if key not in preserved]


def _preserved(count: int, given: dict[str, str], notes: dict[str, Any]) -> list[tuple[int, str, str]]:
    """The caller's ``count`` descriptors from 3 on that take the places of those the container had: as :func:`_streams`.
    Each that it still had needs one. Raises InvalidArgument."""
    had = notes["preserved"]
    once: dict[str, tuple[int, str, str]] = {}
    for number in range(3, 3 + min(count, len(had) + 1)):
        if str(number) not in had:
            raise InvalidArgument(f"--preserve-fds: the checkpointed container had {len(had)} descriptors of its caller's, "
                                  f"not {count}")
        if str(number) not in given:
            raise InvalidArgument(f"--preserve-fds: the caller passed no file descriptor {number}")
    for number, (key, what) in ((int(number), entry) for number, entry in had.items() if entry):
        if key and number >= 3 + count:
            raise InvalidArgument(f"file descriptor {number} of the checkpointed container was its caller's ({what})",
                                  hint=f"pass one, by --preserve-fds {len(had)}")
        if not key and number < 3 + count:
            raise InvalidArgument(f"--preserve-fds: file descriptor {number} was {what}: CRIU puts nothing else there")
        if key:
            once.setdefault(key, (number, key, what))
    return list(once.values())


def _targets(config: dict[str, Any]) -> list[str]:
    """Folders of the root on which something was mounted; what is mounted in a mount of the container CRIU finds there."""
    places = [km.tidy(entry["destination"]) for entry in config.get("mounts") or []]
    return [place for place in places if not any(place.startswith(f"{other}/") for other in places)]


def _namespace_files(config: dict[str, Any], notes: dict[str, Any]) -> list[tuple[str, str]]:
    found = []
    for kind, key in notes["namespaces"].items():
        path = namespaces(config).get(kind)
        if not path:
            raise InvalidArgument(f"config.json: linux.namespaces: the checkpoint was made in a {kind} namespace of others: "
                                  "a path is required")
        found.append((path, key.rpartition(":")[2]))
    return found


def _restore_arguments(context: Context, options: dict[str, Any], config: dict[str, Any], notes: dict[str, Any], images: str,
                       bundle: str, group: str) -> list[str]:
    sources = {km.tidy(entry["destination"]): entry.get("source") or "" for entry in config.get("mounts") or []}
    pairs = [(place, place if place.startswith("/dev/") else "/dev/null") for place in notes["masks"]]
    for place in notes["binds"]:
        source = sources.get(place)
        if source is None:
            raise InvalidArgument(f"config.json: mounts: the checkpoint has a mount at {place}, this bundle has none")
        if source in ("cgroup", "cgroup2"):
            source = f"{tree.ROOT}{group}"
        pairs.append((place, source if source.startswith("/") else f"{bundle}/{source}"))
    labels = [f"--{flag}={options[flag]}" for flag in ("lsm-profile", "lsm-mount-context") if options.get(flag)]
    return [*labels, *_common(context, options, images, "restore.log"),
            f"--cgroup-root={group}", *criu.externals(pairs)]


def _restored(context: Context, facts: Facts, identity: str, bundle: str, options: dict[str, Any]) -> Plan:
    """CRIU is done: what comes after the start of a container, or after its end."""
    folder = f"{context.root}/{identity}"
    plan = Plan()
    if facts.stat(folder) is None:  # `delete --force` was faster: it ends a container by SIGKILL
        plan.add(P.PARENT_BEFORE_CLONE, "exit_code", "the exit code", 128 + 9)
        return plan
    config = load(facts.read(f"{folder}/config.json") or b"", f"{folder}/config.json")
    layout = cgroups.layout(facts)
    unit, driver, group = _group(context, facts, layout, config, identity)
    folders = layout.paths(group)
    found = _outcome(facts, f"{folder}/criu.outcome")
    plan.add(P.PARENT_BEFORE_CLONE, "lock", f"lock {folder}", folder)
    if "pid" in found:
        plan.add(P.PARENT_BEFORE_CLONE, "unlink", "forget the outcome", f"{folder}/criu.outcome")
        return plan
    if "error" in found or not options.get("keep"):
        cgroups.remove(plan, P.PARENT_BEFORE_CLONE, folders, unit.name if unit else "", driver)
        add_hooks(plan, P.PARENT_BEFORE_CLONE, config, "poststop", state_json(config, identity, bundle, "stopped", 0),
                  optional=True)
        plan.add(P.PARENT_BEFORE_CLONE, "remove_dir", f"remove state folder {folder}", folder)
    if "error" in found:
        plan.add(P.PARENT_BEFORE_CLONE, "again", "tell", 0, f"failed {found['error']}")
    else:
        plan.add(P.PARENT_BEFORE_CLONE, "exit_code", "the exit code", int(found.get("exit", 1)))
    return plan
