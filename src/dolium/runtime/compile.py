"""From a configuration and facts to a launch plan: ``compile_container`` and ``compile_exec``. Pure. Cold module.

What each stage holds, and why there, is in ``docs/architecture.md``.
"""

from __future__ import annotations

import json

from dolium.errors import InvalidArgument
from dolium.linux import capabilities
from dolium.linux import mounts as km
from dolium.linux.cgroup import tree
from dolium.runtime import cgroups, seccomp_cache
from dolium.runtime import plan as P
from dolium.runtime.plan import PID, Plan
from dolium.runtime.spec import ATTRIBUTES, NAMESPACES, OCI_VERSION, RLIMITS, namespaces

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dolium.linux.cgroup.systemd import Unit
    from dolium.runtime.facts import Facts
    from dolium.runtime.systemd import Driver

S_IFMT, S_IFDIR, S_IFCHR, S_IFBLK, S_IFIFO = 0o170000, 0o040000, 0o020000, 0o060000, 0o010000
O_RDONLY = 0
CLONE_NEWTIME = NAMESPACES["time"]
CLONE_NEWCGROUP = NAMESPACES["cgroup"]

DEFAULT_DEVICES = (
    ("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0),
)
DEFAULT_LINKS = (
    ("/proc/self/fd", "/dev/fd"), ("/proc/self/fd/0", "/dev/stdin"), ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"), ("pts/ptmx", "/dev/ptmx"),
)
# In the order in which setns(2) must join them: the user namespace gives the rights for the others, the mount
# namespace takes the host's paths away.
JOIN_ORDER = ("user", "ipc", "uts", "network", "pid", "cgroup", "time", "mount")

SLOT_START, SLOT_CONSOLE, SLOT_NULL, SLOT_ROOT, SLOT_LISTENER, SLOT_PIDFD = 240, 241, 242, 243, 244, 245
FIRST_NAMESPACE_SLOT = 200
FIRST_CGROUP_SLOT = 208
LAST_TREE_SLOT = 199


class Launch:
    """How a container is launched, beyond its configuration.

    ``identity``: the container's id; ``bundle``: absolute folder that relative paths start from; ``uid``: the runtime's
    effective uid; ``root_in_slot``: the launcher puts the root's tree in SLOT_ROOT, ``root.path`` is not looked at;
    ``start_socket``: path where init listens for start, "" when the launcher starts it itself; ``console_socket``: path of
    a unix socket that gets the pty's master; ``pidfd_socket``: of one that gets the new process's pidfd;
    ``notify``: a folder of the host that is shown at /run/notify, "" for none;
    ``stdio``: the launcher (a shim) puts the container's ends in slots;
    ``joined``: namespace type to a slot filled by the launcher; ``seccomp``: the program for ``linux.seccomp``, None to
    have none; ``listener``: what goes to ``linux.seccomp.listenerPath`` with the filter's listener, "" when none is asked
    for; ``hidden``: host folders never visible inside; ``unit``: the systemd scope to make, by ``driver``; None for the
    cgroupfs driver; ``groups``: the hierarchies in which the container gets a group, None for all of ``layout``;
    ``map_tools``: paths of newuidmap and newgidmap, None to write the maps; ``trees_in_child``:
    the caller has no right to clone mounts, so the child does, in its own namespaces.
    """

    __slots__ = ("bundle", "console_socket", "driver", "groups", "hidden", "identity", "joined", "layout", "listener",
                 "map_tools", "new_keyring", "no_pivot", "notify", "pidfd_socket", "preserve_fds", "root_in_slot", "seccomp",
                 "seccomp_flags", "start_socket", "stdio", "trees_in_child", "uid", "unit")

    def __init__(self, identity: str, bundle: str, layout: tree.Layout, uid: int = 0) -> None:
        self.identity = identity
        self.bundle = bundle
        self.layout = layout
        self.uid = uid
        self.root_in_slot = False
        self.start_socket = ""
        self.console_socket = ""
        self.pidfd_socket = ""
        self.notify = ""
        self.stdio = False
        self.preserve_fds = 0
        self.no_pivot = False
        self.new_keyring = True
        self.joined: dict[str, int] = {}
        self.seccomp: bytes | None = None
        self.seccomp_flags = 0
        self.listener = ""
        self.hidden: list[str] = []
        self.groups: tree.Layout | None = None
        self.map_tools: tuple[str, str] | None = None
        self.trees_in_child = False
        self.unit: Unit | None = None
        self.driver: Driver | None = None


def state_json(config: dict[str, Any], identity: str, bundle: str, status: str, pid: object = PID) -> str:
    """The state a hook reads on its standard input (runtime.md, State); the pid may be a template's token."""
    state: dict[str, object] = {"ociVersion": config.get("ociVersion", ""), "id": identity, "status": status,
                                "pid": "@PID@", "bundle": bundle}
    if config.get("annotations"):
        state["annotations"] = config["annotations"]
    return json.dumps(state).replace('"@PID@"', str(pid))


def add_hooks(plan: Plan, stage: int, config: dict[str, Any], kind: str, state: str, optional: bool = False) -> None:
    """One operation a hook, in order. ``optional``: a poststop hook's failure is recorded, not fatal."""
    for hook in (config.get("hooks") or {}).get(kind) or []:
        path = hook["path"]
        plan.add(stage, "hook", f"{kind} hook {path}", path, hook.get("args") or [path], hook.get("env") or [],
                 int(hook.get("timeout") or 0) * 1000, state, optional=optional)


class _Compiler:
    def __init__(self, config: dict[str, Any], facts: Facts, launch: Launch) -> None:
        self.config = config
        self.linux = config.get("linux") or {}
        self.process = config.get("process") or {}
        self.facts = facts
        self.launch = launch
        self.plan = Plan()
        self.trees = 0
        self.namespaces = namespaces(config)
        path = self.linux.get("cgroupsPath") or ""
        self.group = launch.unit.group if launch.unit else tree.group_of(path, launch.identity)
        self.groups = launch.layout if launch.groups is None else launch.groups
        self.folders = self.groups.paths(self.group)
        self.new_user = "user" in self.namespaces and not self.namespaces["user"]
        self.in_user = "user" in self.namespaces
        self.born = not self.namespaces.get("user")
        self.opens = P.CHILD_BEFORE_PIVOT if launch.trees_in_child else P.PARENT_BEFORE_CLONE  # stage of bind sources

    # -- the parent, before clone --

    def tree_slot(self) -> int:
        if self.trees > LAST_TREE_SLOT:
            raise InvalidArgument(f"mounts: more than {LAST_TREE_SLOT} bind mounts")
        self.trees += 1
        return self.trees - 1

    def root(self) -> None:
        add, launch = self.plan.add, self.launch
        if not launch.root_in_slot:
            path = self.config["root"]["path"]
            path = path if path.startswith("/") else f"{launch.bundle}/{path}"
            add(self.opens, "open_tree", f"root.path {path}", SLOT_ROOT, path, 1, 1)
            add(self.opens, "mount_attr", "cut the root off the host's mounts", SLOT_ROOT, 0, 0, km.MS_SLAVE, 1,
                -1)
        if self.linux.get("maskedPaths"):
            add(self.opens, "open_tree", "open /dev/null", SLOT_NULL, "/dev/null", 0, 2)
            # a copy of a shared mount is its peer: what is mounted over a mask would be mounted over the host's /dev/null
            add(self.opens, "mount_attr", "cut /dev/null off the host's mounts", SLOT_NULL, 0, 0, km.MS_PRIVATE,
                0, -1)

    def namespace_fds(self) -> int:
        """Open and join what is given by path; returns the flags of what is new."""
        flags, slot = 0, FIRST_NAMESPACE_SLOT
        joins = []
        for kind in JOIN_ORDER:
            if kind in self.launch.joined:
                joins.append((kind, self.launch.joined[kind], "the sandbox's"))
                continue
            path = self.namespaces.get(kind)
            if path is None:
                continue
            if not path:
                flags |= NAMESPACES[kind]
                continue
            self.plan.add(P.PARENT_BEFORE_CLONE, "ns_open", f"linux.namespaces: {kind} namespace {path}", slot, path,
                          NAMESPACES[kind])
            joins.append((kind, slot, path))
            slot += 1
        for kind, number, path in joins:
            self.plan.add(P.CHILD_BEFORE_PIVOT, "ns_join", f"join the {kind} namespace {path}", number, NAMESPACES[kind])
        return flags

    def clone(self, flags: int) -> None:
        later = flags & CLONE_NEWTIME
        self.plan.add(P.PARENT_BEFORE_CLONE, "clone", "clone3", flags & ~CLONE_NEWCGROUP & ~CLONE_NEWTIME, later)

    # -- the parent, after clone --

    def maps(self) -> None:
        add = self.plan.add
        if self.new_user and self.launch.uid != 0:  # a process that is not dumpable has its maps written by root alone
            add(P.CHILD_BEFORE_PIVOT, "take_back", "leave /proc's files of this process to root again")
        if self.new_user and self.launch.map_tools:
            from dolium.runtime.rootless import map_by_tools

            map_by_tools(self.plan, self.launch.map_tools, self.linux)
        elif self.new_user:
            for kind in ("gid", "uid"):
                text = _map_text(self.linux[f"{kind}Mappings"])
                if kind == "gid" and self.launch.uid != 0:  # without rights setgroups must be denied first
                    add(P.PARENT_AFTER_CLONE, "proc_write", "deny setgroups", "setgroups", "deny")
                add(P.PARENT_AFTER_CLONE, "proc_write", f"write {kind}_map (linux.{kind}Mappings)", f"{kind}_map", text)
        if self.process.get("oomScoreAdj") is not None:
            score = self.process["oomScoreAdj"]
            add(P.PARENT_AFTER_CLONE, "proc_write", f"set process.oomScoreAdj to {score}", "oom_score_adj", str(score))
        if self.launch.listener and self.namespaces.get("time") == "":
            add(P.CHILD_BEFORE_PIVOT, "enter_time", "enter the time namespace")
        offsets = self.linux.get("timeOffsets") or {}
        for clock, offset in offsets.items():
            text = f"{clock} {offset.get('secs', 0)} {offset.get('nanosecs', 0)}"
            add(P.PARENT_AFTER_CLONE, "proc_write", f"set linux.timeOffsets.{clock}", "timens_offsets", text)

    # -- the child, before pivot --

    def enter(self, flags: int) -> None:
        add = self.plan.add
        if not self.launch.unit:
            cgroups.join(self.plan, self.groups, self.folders, FIRST_CGROUP_SLOT, born=self.born)
        if flags & CLONE_NEWCGROUP:
            add(P.CHILD_BEFORE_PIVOT, "unshare", "new cgroup namespace", CLONE_NEWCGROUP)
        if self.in_user:
            add(P.CHILD_BEFORE_PIVOT, "become_root", "become root of the user namespace")
        if self.launch.new_keyring:
            add(P.CHILD_BEFORE_PIVOT, "keyring", "new session keyring", f"_ses.{self.launch.identity}", optional=True)
        # Whatever rootfsPropagation says of the root later: attached to a shared mount it would lie on the host's "/" too.
        # Never private at this point: mounts that the host unmounts later must go away here too.
        add(P.CHILD_BEFORE_PIVOT, "propagation", "cut off from the host's mounts", km.MS_REC | km.MS_SLAVE)
        if self.launch.trees_in_child:
            self.root()
        add(P.CHILD_BEFORE_PIVOT, "root_attach", "attach the root", SLOT_ROOT)

    def mounts(self) -> None:
        for index, entry in enumerate(self.config.get("mounts") or []):
            options = km.Options(entry.get("options") or [])
            kind = entry.get("type") or ""
            target = km.tidy(entry["destination"])
            if options.bind or kind == "bind":
                self.bind(entry, options, target, index)
            elif kind == "cgroup" and not self.launch.layout.pure_v2:
                self.cgroup_v1(options, target)
            elif kind in ("cgroup", "cgroup2"):
                self.cgroup_v2(options, target)
            else:
                self.file_system(entry, kind, options, target)
        if self.launch.notify:
            from dolium.runtime import notify

            notify.bind(self.plan, self.opens, self.launch.notify, self.tree_slot())
        for path in self.launch.hidden:
            self.plan.add(P.CHILD_BEFORE_PIVOT, "mount_fs", f"hide {path}", "tmpfs", "tmpfs", ["size=0", "mode=0"],
                          km.ATTR_RDONLY | km.ATTR_NOSUID | km.ATTR_NODEV | km.ATTR_NOEXEC, path, 0)

    def bind(self, entry: dict[str, Any], options: km.Options, target: str, index: int) -> None:
        add = self.plan.add
        source = entry.get("source") or ""
        if not source:
            raise InvalidArgument(f"config.json: mounts[{index}].source: is required for a bind mount")
        source = source if source.startswith("/") else f"{self.launch.bundle}/{source}"
        found = self.facts.stat(source)
        if found is None:
            raise InvalidArgument(f"config.json: mounts[{index}].source: {source} does not exist")
        folder = found[0] & S_IFMT == S_IFDIR
        slot = self.tree_slot()
        recursive = options.bind == "rbind"
        add(self.opens, "open_tree", f"mounts[{index}].source {source}", slot, source, int(recursive),
            1 if folder else 2)
        self.idmap(entry, options, slot, index)
        # A copy of a shared mount is its peer: unless asked for, nothing mounted inside may reach the host.
        propagation = options.propagation or km.MS_SLAVE | km.MS_REC
        add(self.opens, "mount_attr", f"attributes of {target}", slot, options.set, options.clear,
            propagation & ~km.MS_REC, int(bool(propagation & km.MS_REC) and not (options.set or options.clear)),
            -1)
        if propagation & km.MS_REC and (options.set or options.clear):
            add(self.opens, "mount_attr", f"propagation of {target}", slot, 0, 0,
                propagation & ~km.MS_REC, 1, -1)
        if options.recursive_set or options.recursive_clear:
            add(self.opens, "mount_attr", f"recursive attributes of {target}", slot, options.recursive_set,
                options.recursive_clear, 0, 1, -1)
        add(P.CHILD_BEFORE_PIVOT, "mount_tree", f"bind {source} on {target}", slot, target, 1 if folder else 0, 0)

    def idmap(self, entry: dict[str, Any], options: km.Options, slot: int, index: int) -> None:
        """Map the owners seen through a tree, before it is attached; without mappings of its own by the container's."""
        if not options.idmap and not entry.get("uidMappings"):
            return
        where = entry if entry.get("uidMappings") else self.linux
        texts = [_map_text(where.get(f"{kind}Mappings") or []) for kind in ("uid", "gid")]
        mapper = self.tree_slot()
        self.plan.add(P.PARENT_BEFORE_CLONE, "user_namespace", f"mounts[{index}]: mappings", mapper, *texts)
        self.plan.add(P.PARENT_BEFORE_CLONE, "mount_attr", f"mounts[{index}]: idmap", slot, 0, 0, 0,
                      int(options.idmap == "ridmap"), mapper)

    def file_system(self, entry: dict[str, Any], kind: str, options: km.Options, target: str) -> None:
        source = entry.get("source") or kind
        copy_up = options.copy_up and kind == "tmpfs"
        late = km.ATTR_RDONLY if copy_up else 0  # it is filled first
        data = options.data
        if self.linux.get("mountLabel"):
            from dolium.runtime import lsm

            data = data + lsm.mount_options(self.linux["mountLabel"], kind, self.facts)
        self.plan.add(P.CHILD_BEFORE_PIVOT, "mount_fs", f"mount {kind} on {target}", kind, source, data,
                      options.set & ~late, target, P.MOUNT_COPY_UP if copy_up else 0)
        if options.set & late:
            self.plan.add(P.CHILD_BEFORE_PIVOT, "remount", f"make {target} read-only", target, late, 0)
        if options.propagation:
            self.plan.add(P.CHILD_BEFORE_PIVOT, "remount", f"propagation of {target}", target, 0, options.propagation)

    def cgroup_v1(self, options: km.Options, target: str) -> None:
        """A tmpfs with one mount a hierarchy, as the host has them: namespaced where there is a cgroup namespace, else
        the container's own folders as bind mounts."""
        add, layout = self.plan.add, self.launch.layout
        inside = km.ATTR_NOSUID | km.ATTR_NODEV | km.ATTR_NOEXEC
        own_view = "cgroup" in self.namespaces
        add(P.CHILD_BEFORE_PIVOT, "mount_fs", f"mount tmpfs on {target}", "tmpfs", "tmpfs", ["mode=755"], inside, target, 0)
        shown: dict[str, list[str]] = {}
        for controller, folder in layout.v1.items():
            shown.setdefault(folder, []).append(controller)
        for folder, controllers in shown.items():
            name = folder.rsplit("/", 1)[1]
            if own_view:
                wanted = [f"none,{c}" if c.startswith("name=") else c for c in controllers]
                parts = [part for option in wanted for part in option.split(",")]
                add(P.CHILD_BEFORE_PIVOT, "mount_fs", f"mount cgroup {name} on {target}/{name}", "cgroup", "cgroup", parts,
                    inside | options.set & km.ATTR_RDONLY, f"{target}/{name}", 0)
            else:
                self.cgroup_bind(f"{folder}{self.group}", f"{target}/{name}", options)
            if "," in name:
                for controller in controllers:
                    add(P.CHILD_BEFORE_PIVOT, "symlink", f"link {target}/{controller}", name, f"{target}/{controller}")
        if layout.unified:
            if own_view:
                add(P.CHILD_BEFORE_PIVOT, "mount_fs", f"mount cgroup2 on {target}/unified", "cgroup2", "cgroup2", [],
                    inside | options.set & km.ATTR_RDONLY, f"{target}/unified", 0)
            else:
                self.cgroup_bind(f"{layout.unified}{self.group}", f"{target}/unified", options)
        if options.set & km.ATTR_RDONLY:
            add(P.CHILD_BEFORE_PIVOT, "remount", f"make {target} read-only", target, km.ATTR_RDONLY, 0)

    def cgroup_v2(self, options: km.Options, target: str) -> None:
        if not self.launch.layout.unified:
            raise InvalidArgument(f"config.json: mounts: {target}: cgroup2 is not mounted on this host")
        attributes = km.ATTR_NOSUID | km.ATTR_NODEV | km.ATTR_NOEXEC | options.set
        if "cgroup" in self.namespaces:
            self.plan.add(P.CHILD_BEFORE_PIVOT, "mount_fs", f"mount cgroup2 on {target}", "cgroup2", "cgroup2", [],
                          attributes, target, 0)
        else:
            self.cgroup_bind(f"{self.launch.layout.unified}{self.group}", target, options)

    def cgroup_bind(self, source: str, target: str, options: km.Options) -> None:
        slot = self.tree_slot()
        attributes = km.ATTR_NOSUID | km.ATTR_NODEV | km.ATTR_NOEXEC | options.set & km.ATTR_RDONLY
        add = self.plan.add
        stage = P.CHILD_BEFORE_PIVOT if self.launch.unit else self.opens  # systemd makes the group after clone
        add(stage, "open_tree", f"open {source}", slot, source, 0, 1)
        add(stage, "mount_attr", f"attributes of {target}", slot, attributes, 0, km.MS_PRIVATE, 0, -1)
        add(P.CHILD_BEFORE_PIVOT, "mount_tree", f"bind {source} on {target}", slot, target, 1, 0)

    def devices(self) -> None:
        add = self.plan.add
        binds_dev = any(entry["destination"].rstrip("/") == "/dev"
                        and (entry.get("type") == "bind" or {"bind", "rbind"} & set(entry.get("options") or []))
                        for entry in self.config.get("mounts") or [])
        if not binds_dev:
            wanted = [(f"/dev/{name}", "c", major, minor, 0o666, 0, 0) for name, major, minor in DEFAULT_DEVICES]
        else:
            wanted = []
        for device in self.linux.get("devices") or []:
            mode = device.get("fileMode")
            wanted.append((device["path"], device["type"], device.get("major") or 0, device.get("minor") or 0,
                           0o666 if mode is None else mode & 0o7777, device.get("uid") or 0, device.get("gid") or 0))
        for path, kind, major, minor, mode, uid, gid in {entry[0]: entry for entry in wanted}.values():
            if self.in_user:
                # mknod(2) is the initial user namespace's alone: show the host's node
                slot = self.tree_slot()
                add(self.opens, "open_tree", f"open device {path}", slot, path, 0, 2)
                add(self.opens, "mount_attr", f"cut device {path} off the host's mounts", slot, 0, 0,
                    km.MS_PRIVATE, 0, -1)
                add(P.CHILD_BEFORE_PIVOT, "mount_tree", f"bind device {path}", slot, path, 0, 0o666)
                continue
            node = {"c": S_IFCHR, "u": S_IFCHR, "b": S_IFBLK, "p": S_IFIFO}[kind]
            add(P.CHILD_BEFORE_PIVOT, "mknod", f"make device {path}", path, node | mode, major, minor, uid, gid)
        if not binds_dev:
            for content, path in DEFAULT_LINKS:
                add(P.CHILD_BEFORE_PIVOT, "symlink", f"link {path}", content, path)

    def terminal(self) -> None:
        size = self.process.get("consoleSize") or {}
        add = self.plan.add
        add(P.CHILD_BEFORE_PIVOT, "setsid", "new session")
        if self.process.get("terminal"):
            slot = -1
            if self.launch.console_socket:
                slot = SLOT_CONSOLE
                add(P.PARENT_BEFORE_CLONE, "connect", f"connect to console socket {self.launch.console_socket}", slot,
                    self.launch.console_socket)
            add(P.CHILD_BEFORE_PIVOT, "console", "open the terminal", slot, size.get("height") or 0,
                size.get("width") or 0)
        elif self.launch.stdio:
            add(P.CHILD_BEFORE_PIVOT, "stdio", "standard input and output", P.SLOT_STDIN, P.SLOT_STDOUT, P.SLOT_STDERR)

    # -- the child, around and after pivot --

    def pivot(self) -> None:
        add, linux, config = self.plan.add, self.linux, self.config
        state = state_json(config, self.launch.identity, self.launch.bundle, "creating")
        add_hooks(self.plan, P.PARENT_BEFORE_PIVOT, config, "prestart", state)
        add_hooks(self.plan, P.PARENT_BEFORE_PIVOT, config, "createRuntime", state)
        add_hooks(self.plan, P.CHILD_AFTER_PIVOT, config, "createContainer", state)
        cwd = self.process.get("cwd") or "/"
        if cwd != "/":
            add(P.CHILD_BEFORE_PIVOT, "mkdir_in_root", f"make process.cwd {cwd}", cwd, 0o755, optional=True)
        add(P.CHILD_AFTER_PIVOT, "pivot", "pivot_root", int(self.launch.no_pivot))
        if config["root"].get("readonly"):
            add(P.CHILD_AFTER_PIVOT, "remount", "make the root read-only", "/", km.ATTR_RDONLY, 0)
        propagation = linux.get("rootfsPropagation")
        if propagation:
            add(P.CHILD_AFTER_PIVOT, "remount", f"linux.rootfsPropagation {propagation}", "/", 0,
                km.PROPAGATIONS[propagation])
        for name, value in (linux.get("sysctl") or {}).items():
            path = name.replace(".", "/") if "/" not in name else name
            add(P.CHILD_AFTER_PIVOT, "sysctl", f"set linux.sysctl {name} to {value}", path, value)
        if config.get("hostname"):
            add(P.CHILD_AFTER_PIVOT, "hostname", f"set hostname {config['hostname']}", config["hostname"])
        if config.get("domainname"):
            add(P.CHILD_AFTER_PIVOT, "domainname", f"set domainname {config['domainname']}", config["domainname"])
        if self.namespaces.get("network") == "" and "network" not in self.launch.joined:
            add(P.CHILD_AFTER_PIVOT, "loopback", "bring the loopback interface up")
        if linux.get("netDevices"):
            from dolium.runtime import net_devices

            net_devices.add(self.plan, linux, self.facts)
        if linux.get("readonlyPaths"):
            add(P.CHILD_AFTER_PIVOT, "readonly", "make linux.readonlyPaths read-only", linux["readonlyPaths"])
        if linux.get("maskedPaths"):
            add(P.CHILD_AFTER_PIVOT, "mask", "hide linux.maskedPaths", linux["maskedPaths"], SLOT_NULL)

    def cgroups(self) -> None:
        """The container's groups, and their end when the launch fails."""
        launch, resources = self.launch, self.linux.get("resources") or {}
        if launch.unit and launch.driver:
            launch.driver.start(self.plan, P.PARENT_AFTER_CLONE, launch.unit, launch.identity,
                                self.config.get("annotations") or {}, resources)
            cgroups.remove(self.plan, P.ON_FAILURE, self.folders, launch.unit.name, launch.driver)
            cgroups.enable_controllers(self.plan, P.PARENT_AFTER_CLONE, self.group, resources)
            cgroups.add_limits(self.plan, P.PARENT_AFTER_CLONE, launch.layout, self.group, resources)
            return
        slots = cgroups.make(self.plan, self.groups, self.group, resources, FIRST_CGROUP_SLOT, born=self.born)
        if slots > SLOT_START - FIRST_CGROUP_SLOT:
            raise InvalidArgument("this host has more cgroup hierarchies than a plan holds")
        cgroups.remove(self.plan, P.ON_FAILURE, self.folders)

    def run(self) -> Plan:
        launch = self.launch
        _seccomp(self.plan, self.config, launch, "creating")
        if self.linux.get("intelRdt") is not None:
            from dolium.runtime import rdt

            rdt.add(self.plan, self.linux["intelRdt"], launch.identity, self.facts)
        self.cgroups()
        if not launch.trees_in_child:
            self.root()
        flags = self.namespace_fds()
        self.maps()
        self.enter(flags)
        self.mounts()
        self.devices()
        self.terminal()
        self.pivot()
        if self.process:
            _add_linux_attributes(self.plan, self.linux)
            add_process(self.plan, self.process, launch, self.facts)
            if launch.start_socket:
                self.plan.add(P.AFTER_START, "wait_start", "wait for start", SLOT_START)
            add_hooks(self.plan, P.AFTER_START, self.config, "startContainer",
                      state_json(self.config, launch.identity, launch.bundle, "created"))
            add_exec(self.plan, self.process, launch)
        if launch.start_socket:
            self.plan.add(P.PARENT_BEFORE_CLONE, "listen", f"listen on {launch.start_socket}", SLOT_START,
                          launch.start_socket)
        _pidfd(self.plan, launch, "standard")
        self.clone(flags)
        return self.plan


def _add_linux_attributes(plan: Plan, linux: dict[str, Any]) -> None:
    """What every process of the container gets from ``linux``, init and exec alike."""
    if linux.get("personality") is None and linux.get("memoryPolicy") is None:
        return
    from dolium.runtime import attributes

    if linux.get("personality") is not None:
        plan.add(P.CHILD_AFTER_PIVOT, "personality", f"set linux.personality {linux['personality']['domain']}",
                 attributes.personality(linux["personality"], "linux.personality"))
    if linux.get("memoryPolicy") is not None:
        plan.add(P.CHILD_AFTER_PIVOT, "memory_policy", f"set linux.memoryPolicy {linux['memoryPolicy']['mode']}",
                 *attributes.memory_policy(linux["memoryPolicy"], "linux.memoryPolicy"))


def _map_text(entries: list[dict[str, int]]) -> str:
    return "".join(f"{entry['containerID']} {entry['hostID']} {entry['size']}\n" for entry in entries)


def add_process(plan: Plan, process: dict[str, Any], launch: Launch, facts: Facts) -> None:
    """Identity and limits of a process, the same for init and exec."""
    add, stage = plan.add, P.CHILD_AFTER_PIVOT
    user = process.get("user") or {}
    caps = process.get("capabilities") or {}
    for limit in process.get("rlimits") or []:
        values = [-1 if value == (1 << 64) - 1 else value for value in (limit["soft"], limit["hard"])]
        add(stage, "rlimit", f"set process.rlimits {limit['type']} to {limit['soft']}:{limit['hard']}",
            RLIMITS[limit["type"]], *values)
    if process.keys() & ATTRIBUTES:
        from dolium.runtime import attributes

        attributes.add(plan, stage, process)
    if process.get("apparmorProfile") or process.get("selinuxLabel"):
        from dolium.runtime import lsm

        lsm.add(plan, stage, process, facts)
    if process.get("noNewPrivileges"):
        add(stage, "no_new_privs", "set no_new_privs")
    elif launch.seccomp is not None:
        # without no_new_privs a filter needs CAP_SYS_ADMIN, which goes away below
        _add_filter(plan, stage, launch, launch.seccomp)
    add(stage, "umask", "set process.user.umask", user["umask"] if user.get("umask") is not None else 0o022)
    add(stage, "cwd", f"process.cwd {process['cwd']}", process["cwd"], optional=True)
    add(stage, "drop_bounding", "drop capabilities from the bounding set", capabilities.mask(caps.get("bounding") or []))
    add(stage, "keep_caps", "keep capabilities over setuid")
    uid, gid = user.get("uid") or 0, user.get("gid") or 0
    add(stage, "user", f"become process.user {uid}:{gid}", uid, gid,
        [str(group) for group in user.get("additionalGids") or []])
    effective, permitted, inheritable, ambient = (
        capabilities.mask(caps.get(kind) or []) for kind in ("effective", "permitted", "inheritable", "ambient"))
    # The kernel raises an ambient capability only when it is permitted and inheritable. `runc spec` itself lists others;
    # runc and crun pass over them, and so it is here.
    add(stage, "capabilities", "set process.capabilities", effective, permitted, inheritable,
        ambient & permitted & inheritable)
    add(stage, "cwd", f"process.cwd {process['cwd']}", process["cwd"])
    add(stage, "find_executable", f"find process.args[0] {process['args'][0]}", process["args"][0],
        process.get("env") or [])
    if launch.preserve_fds:
        add(stage, "preserve_fds", f"preserve {launch.preserve_fds} file descriptors", launch.preserve_fds)
    if launch.listener and launch.seccomp is not None and process.get("noNewPrivileges"):
        _add_filter(plan, stage, launch, launch.seccomp)  # the agent gets the listener while the container is created


def _add_filter(plan: Plan, stage: int, launch: Launch, program: bytes) -> None:
    if launch.listener:
        plan.add(stage, "seccomp_listener", "load linux.seccomp, hand its listener to listenerPath", launch.seccomp_flags,
                 program, SLOT_LISTENER, launch.listener)
    else:
        plan.add(stage, "seccomp", "load linux.seccomp", launch.seccomp_flags, program)


def add_exec(plan: Plan, process: dict[str, Any], launch: Launch) -> None:
    """The filter, as late as can be, and the program."""
    if launch.seccomp is not None and process.get("noNewPrivileges") and not launch.listener:
        _add_filter(plan, P.AFTER_START, launch, launch.seccomp)
    plan.add(P.AFTER_START, "exec", f"exec {process['args'][0]}", process["args"][0], process["args"],
             process.get("env") or [])


def _pidfd(plan: Plan, launch: Launch, kind: str) -> None:
    """``--pidfd-socket``: the record beside the fd says, as runc's, whether it is a container's init or an exec's."""
    if launch.pidfd_socket:
        # after clone: the new process is not to have the connection
        plan.add(P.PARENT_AFTER_CLONE, "connect", f"connect to pidfd socket {launch.pidfd_socket}", SLOT_PIDFD,
                 launch.pidfd_socket)
        plan.add(P.PARENT_AFTER_CLONE, "send_pidfd", "send the pidfd", SLOT_PIDFD, kind)
        plan.add(P.PARENT_AFTER_CLONE, "close", "leave the pidfd socket", SLOT_PIDFD)


def _seccomp(plan: Plan, config: dict[str, Any], launch: Launch, status: str, pid: object = PID) -> None:
    """The filter's flags; and where it asks for a listener, the connection to the agent and the container process state
    (config-linux.md). ``pid``: of the container's init."""
    profile = (config.get("linux") or {}).get("seccomp")
    if launch.seccomp is None or not profile:
        return
    launch.seccomp_flags = seccomp_cache.flags(profile)
    if not seccomp_cache.needs_listener(profile):
        return
    path = profile["listenerPath"]
    path = path if path.startswith("/") else f"{launch.bundle}/{path}"
    plan.add(P.PARENT_BEFORE_CLONE, "connect", f"linux.seccomp.listenerPath {path}", SLOT_LISTENER, path)
    plan.add(P.PARENT_AFTER_CLONE, "close", "leave the connection to the new process", SLOT_LISTENER)
    metadata = profile.get("listenerMetadata")
    head = json.dumps({"ociVersion": OCI_VERSION, "fds": ["seccompFd"], **({"metadata": metadata} if metadata else {})})
    state = state_json(config, launch.identity, launch.bundle, status, pid)
    launch.listener = f'{head[:-1]}, "pid": {PID}, "state": {state}}}'


def compile_container(config: dict[str, Any], facts: Facts, launch: Launch) -> Plan:
    """The plan of a container's init, up to exec. ON_FAILURE operations undo what the parent made.

    Raises InvalidArgument naming the field; Need when a fact is missing.
    """
    sources = []
    for entry in config.get("mounts") or []:
        if entry.get("type") == "bind" or {"bind", "rbind"} & set(entry.get("options") or []):
            source = entry.get("source") or ""
            sources.append(f"stat:{source if source.startswith('/') else f'{launch.bundle}/{source}'}")
    facts.want(*sources)
    cgroups.check(facts, launch.layout, (config.get("linux") or {}).get("resources") or {})
    return _Compiler(config, facts, launch).run()


def compile_exec(config: dict[str, Any], process: dict[str, Any], facts: Facts, pid: int, start_time: int, launch: Launch,
                 folders: list[str]) -> Plan:
    """The plan of one more process in a running container: join what init has, take its limits, exec.

    ``folders``: the cgroup folders init is in now. The pid is checked after its namespaces are open, so that one that
    was used again is never joined.
    """
    plan = Plan()
    _seccomp(plan, config, launch, "running", pid)
    _pidfd(plan, launch, "setns")
    declared = namespaces(config)
    slot = FIRST_NAMESPACE_SLOT
    files = {"user": "user", "mount": "mnt", "network": "net", "ipc": "ipc", "uts": "uts", "pid": "pid",
             "cgroup": "cgroup", "time": "time"}
    for kind in JOIN_ORDER:
        if kind not in declared and kind not in launch.joined:
            continue
        path = f"/proc/{pid}/ns/{files[kind]}"
        plan.add(P.PARENT_BEFORE_CLONE, "ns_open", f"open the container's {kind} namespace", slot, path, NAMESPACES[kind])
        plan.add(P.CHILD_BEFORE_PIVOT, "ns_join", f"join the container's {kind} namespace", slot, NAMESPACES[kind])
        slot += 1
    born = "user" not in declared
    cgroups.open_existing(plan, launch.layout, folders, FIRST_CGROUP_SLOT, born=born)
    plan.add(P.PARENT_BEFORE_CLONE, "signal", "check the container's init", pid, start_time, 0)
    if (config.get("linux") or {}).get("intelRdt") is not None:
        from dolium.runtime import rdt

        rdt.join(plan, config["linux"]["intelRdt"], launch.identity)
    if process.get("terminal") and launch.console_socket:
        plan.add(P.PARENT_BEFORE_CLONE, "connect", f"connect to console socket {launch.console_socket}", SLOT_CONSOLE,
                 launch.console_socket)
    if process.get("oomScoreAdj") is not None:
        plan.add(P.PARENT_AFTER_CLONE, "proc_write", f"set process.oomScoreAdj to {process['oomScoreAdj']}",
                 "oom_score_adj", str(process["oomScoreAdj"]))
    affinity: dict[str, bytes] = {}
    if process.get("execCPUAffinity"):
        from dolium.runtime import attributes

        affinity = attributes.affinity(process["execCPUAffinity"], "process.execCPUAffinity")
    if "initial" in affinity:
        plan.add(P.CHILD_BEFORE_PIVOT, "affinity", "set process.execCPUAffinity.initial", affinity["initial"])
    cgroups.join(plan, launch.layout, folders, FIRST_CGROUP_SLOT, born=born)
    plan.add(P.PARENT_BEFORE_CLONE, "clone", "clone3", 0, 0)
    if "final" in affinity:
        plan.add(P.CHILD_BEFORE_PIVOT, "affinity", "set process.execCPUAffinity.final", affinity["final"])
    if "user" in declared:
        plan.add(P.CHILD_BEFORE_PIVOT, "become_root", "become root of the user namespace")
    if launch.new_keyring:
        plan.add(P.CHILD_BEFORE_PIVOT, "keyring", "new session keyring", f"_ses.{launch.identity}", optional=True)
    size = process.get("consoleSize") or {}
    plan.add(P.CHILD_AFTER_PIVOT, "setsid", "new session")
    if process.get("terminal"):
        plan.add(P.CHILD_AFTER_PIVOT, "console", "open a terminal", SLOT_CONSOLE if launch.console_socket else -1,
                 size.get("height") or 0, size.get("width") or 0)
    elif launch.stdio:
        plan.add(P.CHILD_AFTER_PIVOT, "stdio", "standard input and output", P.SLOT_STDIN, P.SLOT_STDOUT, P.SLOT_STDERR)
    _add_linux_attributes(plan, config.get("linux") or {})
    add_process(plan, process, launch, facts)
    add_exec(plan, process, launch)
    return plan
