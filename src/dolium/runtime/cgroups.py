"""Cgroup operations of a launch: make, limit, join, kill, remove. Cold module."""

from __future__ import annotations

from dolium.errors import InvalidArgument
from dolium.linux.cgroup import bpf_devices, tree, v1, v2
from dolium.runtime import plan as P

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dolium.runtime.facts import Facts
    from dolium.runtime.plan import Plan

O_WRONLY, O_DIRECTORY = 1, 0o200000

LAYOUT_QUERIES = ("read:/proc/self/cgroup", f"list:{tree.ROOT}", f"stat:{tree.ROOT}/cgroup.controllers")


def layout(facts: Facts) -> tree.Layout:
    """Where the hierarchies are, from facts."""
    facts.want(*LAYOUT_QUERIES)
    text = (facts.read("/proc/self/cgroup") or b"").decode()
    return tree.parse(text, facts.list(tree.ROOT), facts.stat(f"{tree.ROOT}/cgroup.controllers") is not None)


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
        _enable_controllers(plan, group, resources)
    for number, folder in enumerate(folders):
        cpuset = folder == where.v1_path("cpuset", group)
        plan.add(P.PARENT_BEFORE_CLONE, "cg_mkdir", f"make cgroup {folder}", first_slot + number, folder,
                 (1 if cpuset else 0) | (2 if number == 0 else 0), _kind(where, folder, born), nothing_ours=number == 0)
    add_limits(plan, P.PARENT_BEFORE_CLONE, where, group, resources)
    return len(folders)


def add_limits(plan: Plan, stage: int, where: tree.Layout, group: str, resources: dict[str, Any]) -> None:
    """Write ``linux.resources`` into an existing group. A controller that is not mounted is an error when it is named."""
    if where.v1:
        if resources.get("unified"):
            raise InvalidArgument("config.json: linux.resources.unified: this host's controllers are on cgroup v1",
                                  hint="write memory, cpu, pids and blockIO, which both versions have")
        for controller, file, value in v1.writes_for(resources):
            folder = where.v1_path(controller, group)
            if folder is None and controller == "devices" and where.unified:
                continue  # by BPF below
            path = f"{folder or f'{tree.ROOT}/{controller}{group}'}/{file}"
            plan.add(stage, "cg_write", f"set {file} of cgroup {group} to {value}", path, value, 0)
    elif where.unified:
        for field in v2.inconvertible(resources):
            raise InvalidArgument(f"config.json: linux.resources.{field}: cgroup v2 has nothing like it",
                                  hint="leave it out on this host, or name v2's own files under linux.resources.unified")
        for file, value in v2.writes_for(resources):
            plan.add(stage, "cg_write", f"set {file} of cgroup {group} to {value}", f"{where.unified}{group}/{file}",
                     value, 0)
    if "devices" not in where.v1 and where.unified and resources.get("devices"):
        plan.add(stage, "cg_bpf_devices", f"restrict devices of cgroup {group}", f"{where.unified}{group}",
                 bpf_devices.program(resources["devices"]))


def _enable_controllers(plan: Plan, group: str, resources: dict[str, Any]) -> None:
    """v2: a controller's files exist in a group only when every group above hands the controller down."""
    wanted = dict.fromkeys([*v2.controllers_needed(v2.writes_for(resources)), "memory", "pids", "cpu"])
    above = tree.ROOT
    for part in ["", *group.strip("/").split("/")[:-1]]:
        if part:
            above += f"/{part}"
            plan.add(P.PARENT_BEFORE_CLONE, "cg_mkdir", f"make cgroup {above}", -1, above, 0, 0, nothing_ours=True)
        for controller in wanted:
            plan.add(P.PARENT_BEFORE_CLONE, "cg_write", f"hand {controller} down from {above}",
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


def remove(plan: Plan, stage: int, folders: list[str]) -> None:
    """Kill what is left in the group and remove it from every hierarchy."""
    plan.add(stage, "cg_kill", "end what is left in the cgroup", folders)
    for folder in folders:
        plan.add(stage, "cg_rmdir", f"remove cgroup {folder}", folder)


def freeze(plan: Plan, stage: int, where: tree.Layout, group_folders: list[str], frozen: bool) -> None:
    """Pause or resume: the v1 freezer where it is mounted, else cgroup.freeze."""
    word = "pause" if frozen else "resume"
    freezer = where.v1.get("freezer")
    for folder in group_folders:
        if freezer and folder.startswith(f"{freezer}/"):
            plan.add(stage, "cg_frozen", f"{word} cgroup {folder}", f"{folder}/freezer.state", int(frozen))
            return
    for folder in group_folders:
        if where.unified and folder.startswith(f"{where.unified}/"):
            plan.add(stage, "cg_write", f"{word} cgroup {folder}", f"{folder}/cgroup.freeze", str(int(frozen)), 0)
            return
    raise ValueError("no hierarchy here can freeze")
