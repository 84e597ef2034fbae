"""Callers without rights over the host: an ordinary user, or root of a user namespace. Pure. Imported for them alone.

Their containers go into the cgroups that are theirs (delegated) and stay in the caller's own elsewhere; a limit that would
need another group is refused. Device rules are not enforced, as in runc: an ordinary user's container makes no device node.
Maps of more than the caller's own ids are written by newuidmap and newgidmap, from /etc/subuid and /etc/subgid.
"""

from __future__ import annotations

from dolium.errors import FailedPrecondition, Unimplemented
from dolium.linux.cgroup import tree, v1, v2
from dolium.runtime import plan as P

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dolium.runtime.compile import Launch
    from dolium.runtime.facts import Facts
    from dolium.runtime.lifecycle import Context
    from dolium.runtime.plan import Plan

TOOL_LIMIT_MS = 30_000


def prepare(context: Context, facts: Facts, launch: Launch, config: dict[str, Any]) -> None:
    """Set what of the launch is different: its groups, who writes the maps. Raises before anything is made."""
    linux = config.get("linux") or {}
    path = linux.get("cgroupsPath") or ""
    launch.trees_in_child = True
    if launch.unit is None:
        launch.groups = mine(facts, launch.layout, tree.group_of(path, launch.identity), context.uid)
    resources = linux.get("resources") or {}
    if resources.get("devices"):
        resources["devices"] = []
    if launch.groups is not None:
        _limits(launch.layout, launch.groups, resources)
    if context.uid and _needs_tools(linux, context.uid, context.gid):
        launch.map_tools = _tools(context, facts)


def mine(facts: Facts, where: tree.Layout, group: str, uid: int) -> tree.Layout:
    """The hierarchies in which the caller may make the group and move into it: the folder above is its own, and so is, on
    v2, the group above both that one and the caller's (cgroup-v2.rst, Delegation Containment)."""
    own = {controllers: path for _, controllers, path in (line.split(":", 2) for line in (
        facts.read("/proc/self/cgroup") or b"").decode().splitlines())}
    found = {name: folder for name, folder in where.v1.items() if _owner(facts, f"{folder}{group}") == uid}
    unified = where.unified
    if unified:
        above = f"{unified}{_common(own.get('', '/'), group)}"
        if _owner(facts, f"{unified}{group}") != uid or _owner(facts, above) != uid:
            unified = None
    return tree.Layout(found, unified)


def _owner(facts: Facts, path: str) -> int:
    """Of the nearest folder above a path that exists."""
    while True:
        path = path.rpartition("/")[0] or "/"
        found = facts.stat(path)
        if found is not None or path == "/":
            return found[1] if found is not None else -1


def _common(one: str, other: str) -> str:
    """The nearest group above both, with something below that :func:`_owner` takes away."""
    both = []
    for left, right in zip(one.strip("/").split("/"), other.strip("/").split("/"), strict=False):
        if left != right or not left:
            break
        both.append(left)
    return "".join(f"/{part}" for part in both) + "/."


def _limits(where: tree.Layout, groups: tree.Layout, resources: dict[str, Any]) -> None:
    """Refuse a limit that none of the caller's groups can hold. Raises FailedPrecondition naming the field."""
    if where.v1:
        asked = [(file, controller in groups.v1) for controller, file, _ in v1.writes_for(resources)]
    else:
        asked = [(file, groups.unified is not None) for file, _ in v2.writes_for(resources)]
    for file, possible in asked:
        if not possible:
            raise FailedPrecondition(f"config.json: linux.resources: {file} cannot be set: the cgroup would be below "
                                     "another user's", hint="leave the limit out, or name a cgroup below a delegated one")


def _needs_tools(linux: dict[str, Any], uid: int, gid: int) -> bool:
    """More than the caller's own ids: user_namespaces(7) lets nobody without rights map others."""
    return any(len(maps) != 1 or maps[0]["size"] != 1 or maps[0]["hostID"] != own
               for maps, own in ((linux.get("uidMappings") or [], uid), (linux.get("gidMappings") or [], gid)) if maps)


def _tools(context: Context, facts: Facts) -> tuple[str, str]:
    found = []
    for name in ("newuidmap", "newgidmap"):
        path = facts.program(name, context.env)
        if path is None:
            raise Unimplemented(f"config.json: linux.uidMappings: more than the own id needs {name}, which is not installed",
                                hint="Debian's package uidmap has it; or map the own uid and gid alone")
        found.append(path)
    return found[0], found[1]


def map_by_tools(plan: Plan, tools: tuple[str, str], linux: dict[str, Any]) -> None:
    """newuidmap and newgidmap for the child, whose pid comes on standard input."""
    for kind, tool in zip(("uid", "gid"), tools, strict=True):
        words = [str(entry[key]) for entry in linux[f"{kind}Mappings"] for key in ("containerID", "hostID", "size")]
        script = 'read -r pid; tool=$1; shift; exec "$tool" "$pid" "$@"'
        plan.add(P.PARENT_AFTER_CLONE, "hook", f"write {kind}_map (linux.{kind}Mappings) by {tool}", "/bin/sh",
                 ["sh", "-c", script, "sh", tool, *words], [], TOOL_LIMIT_MS, f"{P.PID}\n")
