"""Cgroup operations of a launch: make, limit, join, kill, remove. Cold module."""

from __future__ import annotations

from dolium.errors import FailedPrecondition, InvalidArgument
from dolium.linux.cgroup import bpf_devices, tree, v1, v2
from dolium.runtime import plan as P

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dolium.runtime.facts import Facts
    from dolium.runtime.plan import Plan
    from dolium.runtime.systemd import Driver

O_WRONLY, O_DIRECTORY = 1, 0o200000

LAYOUT_QUERIES = ("read:/proc/self/cgroup", "read:/proc/self/uid_map", f"list:{tree.ROOT}",
                  f"stat:{tree.ROOT}/cgroup.controllers")


WHOLE_MAP = b"0 0 4294967295"


def rootless(facts: Facts, uid: int) -> bool:
    """Is the caller without rights over the host: no root, or root of a user namespace?"""
    return uid != 0 or b" ".join((facts.read("/proc/self/uid_map") or WHOLE_MAP).split()) != WHOLE_MAP


def layout(facts: Facts) -> tree.Layout:
    """Where the hierarchies are, from facts."""
    facts.want(*LAYOUT_QUERIES)
    text = (facts.read("/proc/self/cgroup") or b"").decode()
    return tree.parse(text, facts.list(tree.ROOT), facts.stat(f"{tree.ROOT}/cgroup.controllers") is not None)


# controller: what below linux.resources asks for it
_ASKED_BY = {"cpuset": "cpu.cpus", "blkio": "blockIO", "io": "blockIO", "hugetlb": "hugepageLimits",
             "net_cls": "network.classID", "net_prio": "network.priorities"}


def check(facts: Facts, where: tree.Layout, resources: dict[str, Any]) -> None:
    """Refuse, before anything is made, what this host's cgroups cannot hold. Raises InvalidArgument naming the field.
    Finds out whose weights of block I/O there are (``where.weights``)."""
    shares = (resources.get("cpu") or {}).get("shares") or 2
    if not 2 <= shares <= 262144:  # v1 would take the nearest without a word
        raise InvalidArgument(f"config.json: linux.resources.cpu.shares: {shares} is not from 2 to 262144")
    if where.v1:
        if resources.get("unified"):
            raise InvalidArgument("config.json: linux.resources.unified: this host's controllers are on cgroup v1",
                                  hint="write memory, cpu, pids and blockIO, which both versions have")
        asked = {controller: _ASKED_BY.get(controller, controller) for controller, _, _ in v1.writes_for(resources)}
        if where.unified:
            asked.pop("devices", None)  # by BPF
        present, version = list(where.v1), "mounted"
    elif where.unified:
        refused = v2.refused(resources)
        if refused:
            raise InvalidArgument(f"config.json: linux.resources.{refused[0]}: cgroup v2 cannot do this: {refused[1]}")
        files = [file for file, _ in v2.writes_for({**resources, "unified": None})]
        asked = {name: f"unified.{file}" for file in resources.get("unified") or {} for name in [file.split(".")[0]]
                 if name != "cgroup"}
        asked |= {name: _ASKED_BY.get(name, name) for name in v2.controllers_needed([(file, "") for file in files])}
        text = facts.read(f"{where.unified}/cgroup.controllers") if asked else None
        if text is None:
            return
        present, version = text.decode().split(), "available"
    else:
        return
    for controller, field in asked.items():
        if controller not in present:
            raise InvalidArgument(f"config.json: linux.resources.{field}: the cgroup controller {controller} is not "
                                  f"{version} here", hint=f"there are {', '.join(present)}")
    _check_files(facts, where, resources)
    if resources.get("rdma"):
        names = facts.list("/sys/class/infiniband")
        for name in resources["rdma"]:
            if name not in names:
                raise InvalidArgument(f"config.json: linux.resources.rdma.{name}: this kernel has no RDMA device of that "
                                      "name", hint=f"it has {', '.join(names) or 'none'}")
    sizes = [entry["pageSize"] for entry in resources.get("hugepageLimits") or []]
    if sizes:
        known = page_sizes(facts)
        for index, size in enumerate(sizes):
            if size not in known:
                field = f"linux.resources.hugepageLimits[{index}].pageSize"
                raise InvalidArgument(f"config.json: {field}: this kernel has no huge pages of {size!r}",
                                      hint=f"it has {', '.join(known) or 'none'}")


def _check_files(facts: Facts, where: tree.Layout, resources: dict[str, Any]) -> None:
    """Are there the files that a kernel may lack? Of v1 the hierarchy's root tells; of v2 a group that has the controller,
    and when there is none, nobody does before one was made."""
    fields = v1.MAY_LACK if where.v1 else v2.MAY_LACK
    if where.v1:
        wanted = [file for _, file, _ in v1.writes_for(resources) if file in v1.MAY_LACK]
    else:
        wanted = [file for file, value in v2.writes_for({**resources, "unified": None}) if file in v2.MAY_LACK
                  and not (file == "memory.swap.max" and value in v2.NO_SWAP)]
    for file in dict.fromkeys(wanted):
        names = _files_of(facts, where, file.split(".")[0])
        if file.startswith(("blkio.weight", "io.weight")) and file not in names and any(".bfq." in name for name in names):
            where.weights = "bfq."
        elif names and file not in names:
            raise InvalidArgument(f"config.json: linux.resources.{fields[file]}: this kernel's cgroups have no {file}")


_TELLS = {"cpu": "cpu.weight", "memory": "memory.max", "io": "io.stat"}  # a file that a v2 group with the controller has


def _files_of(facts: Facts, where: tree.Layout, controller: str) -> list[str]:
    """Names in a group that has a controller; none when no group is known to."""
    if where.v1:
        return facts.list(where.v1[controller])
    for name in facts.list(where.unified or ""):
        if not name.startswith(_FILES):
            found = facts.list(f"{where.unified}/{name}")
            if _TELLS[controller] in found:
                return found
    return []


def page_sizes(facts: Facts) -> list[str]:
    """Of the kernel's huge pages, as the hugetlb controller's files name them."""
    return [_page_size(name) for name in facts.list("/sys/kernel/mm/hugepages")]


def _page_size(folder: str) -> str:
    """2MB, 1GB, 64KB, as the controller's files are called, for hugepages-2048kB."""
    kib = int(folder.removeprefix("hugepages-").removesuffix("kB"))
    return f"{kib >> 20}GB" if kib >= 1 << 20 else f"{kib >> 10}MB" if kib >= 1 << 10 else f"{kib}KB"


PROCS, TASKS, FOLDER = 0, 1, 2  # what a slot holds


def _kind(where: tree.Layout, folder: str, born: bool) -> int:
    """How the child comes into a group without waiting for a grace period. A move by ``cgroup.procs`` takes
    cgroup_threadgroup_rwsem, and the first in a while waits 6 to 20 ms for RCU; a thread that moves itself by v1's ``tasks``
    takes none, and clone3 puts a child into a v2 group at its birth."""
    if where.unified and (folder == where.unified or folder.startswith(f"{where.unified}/")):
        return FOLDER if born else PROCS
    return TASKS


def make(plan: Plan, where: tree.Layout, group: str, resources: dict[str, Any], first_slot: int, *, born: bool) -> int:
    """Make the group in every hierarchy, write the limits; returns how many slots hold a way into it.

    A group that has processes already is another container's: refused before anything else is made. ``born``: clone3 may
    put the child into the v2 group, which takes rights there: not from inside a user namespace that was joined.
    """
    folders = where.paths(group)
    if where.pure_v2:
        enable_controllers(plan, P.PARENT_BEFORE_CLONE, group, resources)
    for number, folder in enumerate(folders):
        cpuset = folder == where.v1_path("cpuset", group)
        plan.add(P.PARENT_BEFORE_CLONE, "cg_mkdir", f"make cgroup {folder}", first_slot + number, folder,
                 (1 if cpuset else 0) | (2 if number == 0 else 0), _kind(where, folder, born), nothing_ours=number == 0)
    add_limits(plan, P.PARENT_BEFORE_CLONE, where, group, resources)
    return len(folders)


def add_limits(plan: Plan, stage: int, where: tree.Layout, group: str, resources: dict[str, Any]) -> None:
    """Write ``linux.resources``, which ``check`` has passed, into an existing group. Kernels before 5.7 (v1) and 5.17 (v2)
    have no files for reserved huge pages."""
    if where.v1:
        for controller, file, value in v1.writes_for(resources, where.weights):
            folder = where.v1_path(controller, group)
            if folder is None and controller == "devices" and where.unified:
                continue  # by BPF below
            path = f"{folder or f'{tree.ROOT}/{controller}{group}'}/{file}"
            plan.add(stage, "cg_write", f"set {file} of cgroup {group} to {value}", path, value, 0,
                     optional=".rsvd." in file)
    elif where.unified:
        for file, value in v2.writes_for(resources, where.weights):
            unasked = ".rsvd." in file or (file == "memory.swap.max" and value in v2.NO_SWAP)
            plan.add(stage, "cg_write", f"set {file} of cgroup {group} to {value}", f"{where.unified}{group}/{file}",
                     value, 0, optional=unasked and file not in (resources.get("unified") or {}))
    if "devices" not in where.v1 and where.unified and resources.get("devices"):
        plan.add(stage, "cg_bpf_devices", f"restrict devices of cgroup {group}", f"{where.unified}{group}",
                 bpf_devices.program(resources["devices"]))


def enable_controllers(plan: Plan, stage: int, group: str, resources: dict[str, Any]) -> None:
    """v2: a controller's files exist in a group only when every group above hands the controller down."""
    wanted = dict.fromkeys([*v2.controllers_needed(v2.writes_for(resources)), "memory", "pids", "cpu"])
    above = tree.ROOT
    for part in ["", *group.strip("/").split("/")[:-1]]:
        if part:
            above += f"/{part}"
            plan.add(stage, "cg_mkdir", f"make cgroup {above}", -1, above, 0, 0, nothing_ours=True)
        for controller in wanted:
            plan.add(stage, "cg_write", f"hand {controller} down from {above}",
                     f"{above}/cgroup.subtree_control", f"+{controller}", 1, optional=True)


def open_existing(plan: Plan, where: tree.Layout, folders: list[str], first_slot: int, *, born: bool) -> None:
    """The ways into groups that are there already, for ``join``."""
    for number, folder in enumerate(folders):
        kind = _kind(where, folder, born)
        path = folder if kind == FOLDER else f"{folder}/{'tasks' if kind == TASKS else 'cgroup.procs'}"
        plan.add(P.PARENT_BEFORE_CLONE, "open_path", f"open cgroup {folder}", first_slot + number, path,
                 O_DIRECTORY if kind == FOLDER else O_WRONLY)


def join(plan: Plan, where: tree.Layout, folders: list[str], first_slot: int, *, born: bool) -> None:
    """The child joins; nobody else is ever moved."""
    for number, folder in enumerate(folders):
        if _kind(where, folder, born) == FOLDER:
            plan.add(P.PARENT_BEFORE_CLONE, "cg_clone", f"start in cgroup {folder}", first_slot + number)
        else:
            plan.add(P.CHILD_BEFORE_PIVOT, "cg_join", f"join cgroup {folder}", first_slot + number)


# What the kernel's files in a group begin with; other names are groups below it.
_FILES = ("cgroup.", "cpu.", "cpuset.", "cpuacct.", "memory.", "io.", "pids.", "hugetlb.", "rdma.", "misc.", "irq.", "dmem.",
          "freezer.", "devices.", "blkio.", "net_cls.", "net_prio.", "perf_event.", "tasks", "notify_on_release",
          "release_agent")


def processes(facts: Facts, folder: str) -> list[int]:
    """Pids in a group and in all below it: a container with systemd inside has none in its own."""
    pids, groups = [], [folder]
    while groups:
        facts.want(*(f"read:{group}/cgroup.procs" for group in groups))
        texts = {group: facts.read(f"{group}/cgroup.procs") for group in groups}
        pids += [int(line) for text in texts.values() for line in (text or b"").split()]
        groups = [group for group, text in texts.items() if text is not None]
        facts.want(*(f"list:{group}" for group in groups))
        groups = [f"{group}/{name}" for group in groups for name in facts.list(group) if not name.startswith(_FILES)]
    return pids


def remove(plan: Plan, stage: int, folders: list[str], unit: str = "", driver: Driver | None = None) -> None:
    """Kill what is left in the group and remove it from every hierarchy; a systemd unit is stopped first."""
    plan.add(stage, "cg_kill", "end what is left in the cgroup", folders)
    if unit and driver is not None:
        driver.stop(plan, stage, unit)
    for folder in folders:
        plan.add(stage, "cg_rmdir", f"remove cgroup {folder}", folder)


def freeze(plan: Plan, stage: int, where: tree.Layout, group_folders: list[str], frozen: bool) -> str:
    """Pause or resume: the v1 freezer where it is mounted, else cgroup.freeze. The v1 operation waits, and thaws again
    what does not freeze; of v2 the file is returned that will say when all are frozen, else ""."""
    word = "pause" if frozen else "resume"
    freezer = where.v1.get("freezer")
    for folder in group_folders:
        if freezer and folder.startswith(f"{freezer}/"):
            plan.add(stage, "cg_frozen", f"{word} cgroup {folder}", f"{folder}/freezer.state", int(frozen))
            if frozen:
                plan.add(P.ON_FAILURE, "cg_write", f"resume cgroup {folder}", f"{folder}/freezer.state", "THAWED", 0)
            return ""
    for folder in group_folders:
        if where.unified and folder.startswith(f"{where.unified}/"):
            plan.add(stage, "cg_write", f"{word} cgroup {folder}", f"{folder}/cgroup.freeze", str(int(frozen)), 0)
            return f"{folder}/cgroup.events"
    raise FailedPrecondition("no cgroup of this container can be frozen", hint="it was started without one of its own")
