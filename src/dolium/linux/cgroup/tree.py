"""Where the cgroup hierarchies of a machine are. Pure: from facts to a layout. Cold module.

A mountinfo scan would make every start cost more with each container that lives, so the layout comes from
``/proc/self/cgroup`` (one line a hierarchy) and the names in ``/sys/fs/cgroup``.
"""

from __future__ import annotations

ROOT = "/sys/fs/cgroup"
PARENT = "/dolium"  # containers without a path of their own go here, never under the caller's group


class Layout:
    """``v1``: controller (or ``name=systemd``) to the folder its hierarchy is mounted on; ``unified``: the folder of
    the v2 hierarchy or None; ``pure_v2``: no v1 hierarchy at all; ``weights``: of what block I/O's weights are, "" or "bfq."
    where the kernel has them of that scheduler alone (a caller who asks for one finds out)."""

    __slots__ = ("folders", "pure_v2", "unified", "v1", "weights")

    def __init__(self, v1: dict[str, str], unified: str | None) -> None:
        self.v1 = v1
        self.unified = unified
        self.pure_v2 = not v1 and unified is not None
        self.weights = ""
        # each hierarchy once, whatever number of controllers share it
        self.folders = list(dict.fromkeys(v1.values()))

    def paths(self, group: str) -> list[str]:
        """The folder of a group in every hierarchy, v1 first."""
        every = [*self.folders, self.unified] if self.unified else self.folders
        return [f"{folder}{group}" for folder in every]

    def v1_path(self, controller: str, group: str) -> str | None:
        """The folder of a group in the hierarchy of one v1 controller, None where that is not mounted."""
        folder = self.v1.get(controller)
        return None if folder is None else f"{folder}{group}"


def parse(proc_self_cgroup: str, names: list[str], has_v2_root: bool) -> Layout:
    """The layout, from the text of /proc/self/cgroup, the names in /sys/fs/cgroup and whether that folder itself is a
    v2 root (it holds ``cgroup.controllers``)."""
    if has_v2_root:
        return Layout({}, ROOT)
    present = set(names)
    v1: dict[str, str] = {}
    for line in proc_self_cgroup.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, _ = rest.partition(":")
        if number == "0" or not controllers:
            continue
        folder = controllers.removeprefix("name=")
        if folder not in present:
            continue
        for controller in controllers.split(","):
            v1[controller] = f"{ROOT}/{folder}"
    return Layout(v1, f"{ROOT}/unified" if "unified" in present else None)


def parse_membership(text: str, layout: Layout) -> list[str]:
    """Folders a process is in, one a hierarchy, from its /proc/PID/cgroup (the path must be seen from the root)."""
    folders = []
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        path = "" if path == "/" else path
        if controllers == "":
            if layout.unified:
                folders.append(layout.unified + path)
        else:
            base = layout.v1.get(controllers.split(",")[0])
            if base:
                folders.append(base + path)
    return folders


def group_of(cgroups_path: str, identity: str) -> str:
    """The group named by ``linux.cgroupsPath``: absolute as it is, relative or absent below ``/dolium``."""
    parts = [part for part in cgroups_path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise ValueError("cgroupsPath must not contain '..'")
    if not parts:
        return f"{PARENT}/{identity}"
    joined = "/".join(parts)
    return f"/{joined}" if cgroups_path.startswith("/") else f"{PARENT}/{joined}"
