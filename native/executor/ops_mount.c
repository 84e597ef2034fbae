/* Operations on mounts: trees prepared by the parent as fds, and the child's own root. */
#include <linux/magic.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>

#include "fields.h"

#define MOUNT_COPY_UP 0x10000
#define OPTION_LIMIT 255
#define OPTIONS_LIMIT 4096

static unsigned long ms_flags(int64_t attrs) {
	/* The first four are the same bits in both. */
	unsigned long flags = (unsigned long)attrs & (MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC);
	flags |= attrs & MOUNT_ATTR_NODIRATIME ? MS_NODIRATIME : 0;
	flags |= attrs & MOUNT_ATTR_NOSYMFOLLOW ? MS_NOSYMFOLLOW : 0;
	if ((attrs & MOUNT_ATTR__ATIME) == MOUNT_ATTR_NOATIME)
		flags |= MS_NOATIME;
	if ((attrs & MOUNT_ATTR__ATIME) == MOUNT_ATTR_STRICTATIME)
		flags |= MS_STRICTATIME;
	return flags;
}

/* What the kernel wrote about a refused file system, as the detail of the message. */
static int explain(struct launch *launch, int fs, int number, const char *option) {
	char text[200];
	ssize_t n = read(fs, text, sizeof text - 1);
	if (n > 2) {
		text[n] = '\0';
		text[strcspn(text, "\n")] = '\0';
		return fail_with(launch, number, "the kernel says: %s", text + 2);
	}
	return option ? fail_with(launch, number, "option %s", option) : -number;
}

static int set_option(int fs, const char *option) {
	char key[PATH_MAX];
	const char *equals = strchr(option, '=');
	if (!equals)
		return sys_fsconfig(fs, FSCONFIG_SET_FLAG, option, NULL, 0);
	TRY(format_path(key, "%.*s", (int)(equals - option), option));
	return sys_fsconfig(fs, FSCONFIG_SET_STRING, key, equals + 1, 0);
}

/* Attributes, and a propagation when it is not 0: MS_REC in it takes the mounts below along. */
static int set_attr(int fd, int64_t set, int64_t propagation, int recursive) {
	struct mount_attr attr = { .attr_set = (uint64_t)set, .propagation = (uint64_t)(propagation & ~(int64_t)MS_REC) };
	if (propagation & MS_REC)
		recursive = AT_RECURSIVE;
	return sys_mount_setattr(fd, "", (unsigned)(AT_EMPTY_PATH | recursive), &attr);
}

/* fsconfig(2) takes no longer ones, as an overlay's folders may be; mount(2) takes a page in all. */
static int is_long(struct list options) {
	int found = 0;
	for (struct string option; list_take(&options, &option);)
		found |= option.len > OPTION_LIMIT;
	return found;
}

/* A detached mount of a new file system, or -errno; -ENOSYS asks for the fallback. */
static int new_fs(struct launch *launch, const char *type, const char *source, struct list options, int64_t attrs) {
	if (launch->plan->flags & PLAN_FLAG_OLD_MOUNT_API || is_long(options))
		return -ENOSYS;
	cleanup_fd fs = TRY(sys_fsopen(type, FSOPEN_CLOEXEC));
	if (*source && sys_fsconfig(fs, FSCONFIG_SET_STRING, "source", source, 0))
		return explain(launch, fs, errno, "source");
	for (struct string option; list_take(&options, &option);) {
		int result = set_option(fs, option.data);
		if (result)
			return explain(launch, fs, -result, option.data);
	}
	if (sys_fsconfig(fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0))
		return explain(launch, fs, errno, NULL);
	int mount = sys_fsmount(fs, FSMOUNT_CLOEXEC, (unsigned)attrs);
	return mount < 0 ? explain(launch, fs, -mount, NULL) : mount;
}

/* The same by mount(2), on a target that is an fd. */
static int old_mount(const char *type, const char *source, struct list options, int64_t attrs, int target) {
	char path[64];
	snprintf(path, sizeof path, "/proc/self/fd/%d", target);
	cleanup_buffer joined = { 0 };
	for (struct string option; list_take(&options, &option);) {
		put_bytes(&joined, ",", joined.used ? 1 : 0);
		put_bytes(&joined, option.data, option.len);
	}
	put_bytes(&joined, "", 1);
	if (joined.used > OPTIONS_LIMIT) /* of more it would read the begin, and say nothing */
		return -E2BIG;
	return joined.failed ? -ENOMEM : or_errno(mount(source, path, type, ms_flags(attrs), joined.data));
}

static int copy_link(int from, int to, const char *name, const struct stat *st) {
	char link[PATH_MAX];
	int n = TRY(or_errno(readlinkat(from, name, link, sizeof link - 1)));
	link[n] = '\0';
	TRY(or_errno(symlinkat(link, to, name)));
	return or_errno(fchownat(to, name, st->st_uid, st->st_gid, AT_SYMLINK_NOFOLLOW));
}

static int copy_tree(int from, int to);

static int copy_entry(int from, int to, const char *name) {
	struct stat st;
	TRY(or_errno(fstatat(from, name, &st, AT_SYMLINK_NOFOLLOW)));
	if (S_ISLNK(st.st_mode))
		return copy_link(from, to, name, &st);
	if (!S_ISDIR(st.st_mode) && !S_ISREG(st.st_mode))
		return 0;
	int how = S_ISDIR(st.st_mode) ? O_RDONLY | O_DIRECTORY : O_WRONLY | O_CREAT | O_EXCL;
	if (S_ISDIR(st.st_mode))
		TRY(or_errno(mkdirat(to, name, 0700)));
	cleanup_fd in = TRY(or_errno(openat(from, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC)));
	cleanup_fd out = TRY(or_errno(openat(to, name, how | O_NOFOLLOW | O_CLOEXEC, 0600)));
	TRY(S_ISDIR(st.st_mode) ? copy_tree(in, out) : copy_all(in, out));
	TRY(or_errno(fchown(out, st.st_uid, st.st_gid)));
	return or_errno(fchmod(out, st.st_mode & 07777));
}

/* tmpcopyup: what the folder below held, with owners and modes, no extended attributes. No link is followed. */
static int copy_tree(int from, int to) {
	int again = TRY(or_errno(openat(from, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC)));
	cleanup_dir folder = fdopendir(again);
	if (!folder)
		return -errno;
	for (struct dirent *entry; (entry = next_entry(folder));)
		TRY(copy_entry(from, to, entry->d_name));
	return 0;
}

static int attach(int tree, int target) {
	return sys_move_mount(tree, "", target, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
}

/* A new file system on the target. *mount is its fd, unless the old calls made it. */
static int mount_on(struct launch *launch, const char *type, const char *source, struct list options, int64_t attrs,
		    int target, int *mount) {
	*mount = new_fs(launch, type, source, options, attrs);
	if (*mount == -ENOSYS)
		return old_mount(type, *source ? source : type, options, attrs, target);
	return attach(TRY(*mount), target);
}

static int mount_new(struct launch *launch, const struct op *op) {
	const char *type = op->a[0].s.data, *target = op->a[4].s.data;
	/* Through a link they could lie in a volume, where another container moves them before the masks are laid on. */
	cleanup_fd plain = strcmp(type, "proc") && strcmp(type, "sysfs") ? -1 :
		sys_openat2(launch->root, target, O_PATH | O_CLOEXEC, 0, RESOLVE_IN_ROOT | RESOLVE_NO_SYMLINKS);
	if (plain == -ELOOP)
		return fail_with(launch, ELOOP, "%s must be an ordinary folder, with no link on the way", target);
	cleanup_fd at = TRY_SAYING(make_in_root(launch, target, 1, op->a[5].i & 07777 ?: 0755), "target %s", target), mount = -1;
	return mount_on(launch, type, op->a[1].s.data, op->a[2].l, op->a[3].i, at, &mount);
}

int do_mount_fs(struct launch *launch, const struct op *op) {
	if (!(op->a[5].i & MOUNT_COPY_UP))
		return mount_new(launch, op);
	cleanup_fd below = open_in_root(launch, op->a[4].s.data, O_RDONLY | O_DIRECTORY);
	TRY(below == -ENOENT ? 0 : below);
	TRY(mount_new(launch, op));
	if (below < 0)
		return 0;
	cleanup_fd above = TRY(open_in_root(launch, op->a[4].s.data, O_RDONLY | O_DIRECTORY));
	TRY_SAYING(copy_tree(below, above), "copy what the folder holds");
	return 0;
}

int do_open_tree(struct launch *launch, const struct op *op) {
	const char *path = op->a[1].s.data;
	unsigned recursive = op->a[2].i ? AT_RECURSIVE : 0;
	cleanup_fd fd = TRY(sys_open_tree(AT_FDCWD, path, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | recursive));
	struct stat st;
	TRY(or_errno(fstat(fd, &st)));
	if ((op->a[3].i == 1 && !S_ISDIR(st.st_mode)) || (op->a[3].i == 2 && S_ISDIR(st.st_mode)))
		return fail_with(launch, op->a[3].i == 1 ? ENOTDIR : EISDIR, "%s", path);
	return take_slot(launch, op->a[0].i, keep(&fd));
}

int do_mount_attr(struct launch *launch, const struct op *op) {
	struct mount_attr attr = {
		.attr_set = (uint64_t)op->a[1].i,
		.attr_clr = (uint64_t)op->a[2].i,
		.propagation = (uint64_t)op->a[3].i,
	};
	if (op->a[5].i >= 0) {
		attr.attr_set |= MOUNT_ATTR_IDMAP;
		attr.userns_fd = (uint64_t)slot_fd(launch, op->a[5].i); /* of an empty slot: EINVAL */
	}
	/* Changing the atime mode takes clearing its whole field. */
	if (attr.attr_set & MOUNT_ATTR__ATIME)
		attr.attr_clr |= MOUNT_ATTR__ATIME;
	return sys_mount_setattr(slot_fd(launch, op->a[0].i), "", AT_EMPTY_PATH | (op->a[4].i ? AT_RECURSIVE : 0), &attr);
}

static int write_maps(const struct op *op, pid_t pid) {
	static const char *const files[] = { "", "uid_map", "gid_map" };
	for (int i = 1; i < 3; i++) {
		char path[64];
		snprintf(path, sizeof path, "/proc/%d/%s", pid, files[i]);
		TRY(write_path(AT_FDCWD, path, op->a[i].s.data, op->a[i].s.len));
	}
	return 0;
}

/* The namespace outlives its only member by the fd. */
int do_user_namespace(struct launch *launch, const struct op *op) {
	char path[64];
	int status;
	pid_t pid = TRY(sys_clone3(&(struct clone_args){ .flags = CLONE_NEWUSER, .exit_signal = SIGCHLD }));
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		for (;;)
			pause();
	}
	snprintf(path, sizeof path, "/proc/%d/ns/user", pid);
	int result = write_maps(op, pid);
	if (!result)
		result = take_slot(launch, op->a[0].i, or_errno(open(path, O_RDONLY | O_CLOEXEC)));
	kill(pid, SIGKILL);
	wait_for(pid, &status);
	return result;
}

OPERATION(propagation, or_errno(mount(NULL, "/", NULL, (unsigned long)op->a[0].i, NULL)))

int do_root_attach(struct launch *launch, const struct op *op) {
	if (op->a[0].i < 0) /* a runtime that wants paths comes next: the root stays what it is */
		return launch->root = or_errno(open("/", O_PATH | O_DIRECTORY | O_CLOEXEC));
	int tree = slot_fd(launch, op->a[0].i);
	/* On top of the old root: a look-up that starts at "/" does not cross to what lies on it, so the host's paths stay
	 * reachable until pivot_root, and no folder of the host serves as a mount point. */
	TRY(sys_move_mount(tree, "", AT_FDCWD, "/", MOVE_MOUNT_F_EMPTY_PATH));
	launch->root = or_errno(fcntl(tree, F_DUPFD_CLOEXEC, 3));
	return launch->root;
}

/* A copy of a tree that is in place already: a detached tree can be attached once. */
static int copy_of(int tree) {
	return sys_open_tree(tree, "", AT_EMPTY_PATH | OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE);
}

static int attach_copy(int tree, int target) {
	cleanup_fd copy = TRY(copy_of(tree));
	return attach(copy, target);
}

int do_mount_tree(struct launch *launch, const struct op *op) {
	const char *target = op->a[1].s.data;
	cleanup_fd at = TRY_SAYING(make_in_root(launch, target, op->a[2].i == 1, op->a[3].i ?: 0755), "target %s", target);
	return attach(slot_fd(launch, op->a[0].i), at);
}

int do_mknod(struct launch *launch, const struct op *op) {
	const char *name;
	cleanup_fd folder = TRY(parent_in_root(launch, op->a[0].s.data, &name));
	mode_t mode = (mode_t)op->a[1].i;
	dev_t device = makedev((unsigned)op->a[2].i, (unsigned)op->a[3].i);
	/* With its mode at once: chmod by name would follow a link that another container swapped in, to the host. */
	mode_t mask = umask(0);
	int made = or_errno(mknodat(folder, name, mode, device));
	umask(mask);
	if (made) {
		struct stat st;
		if (made != -EEXIST || fstatat(folder, name, &st, AT_SYMLINK_NOFOLLOW))
			return made;
		if ((st.st_mode & S_IFMT) == (mode & S_IFMT) && st.st_rdev == device)
			return 0;
		return fail_with(launch, EEXIST, "something else is there");
	}
	return or_errno(fchownat(folder, name, (uid_t)op->a[4].i, (gid_t)op->a[5].i, AT_SYMLINK_NOFOLLOW));
}

int do_symlink(struct launch *launch, const struct op *op) {
	const char *name;
	cleanup_fd folder = TRY(parent_in_root(launch, op->a[1].s.data, &name));
	return symlinkat(op->a[0].s.data, folder, name) && errno != EEXIST ? -errno : 0;
}

int do_mkdir_in_root(struct launch *launch, const struct op *op) {
	cleanup_fd fd = TRY(make_in_root(launch, op->a[0].s.data, 1, (mode_t)op->a[1].i));
	struct stat st;
	TRY(or_errno(fstat(fd, &st)));
	return S_ISDIR(st.st_mode) ? 0 : -ENOTDIR;
}

/* What the image has not, or its root may not reach, needs no hiding. */
static int is_absent(int at) { return at == -ENOENT || at == -ENOTDIR || at == -EACCES; }

/* Hidden files show the host's /dev/null, hidden folders an empty read-only tmpfs. Target and source are both fds that
 * were opened once; no name inside the container is trusted to be what it was. */
int do_mask(struct launch *launch, const struct op *op) {
	struct list paths = op->a[0].l;
	int null_tree = slot_fd(launch, op->a[1].i), null_used = 0;
	cleanup_fd empty = -1;
	for (struct string path; list_take(&paths, &path);) {
		cleanup_fd at = open_in_root(launch, path.data, O_PATH);
		if (is_absent(at))
			continue;
		TRY_SAYING(at, "%s", path.data);
		struct stat st;
		TRY_SAYING(or_errno(fstat(at, &st)), "%s", path.data);
		int result;
		if (!S_ISDIR(st.st_mode))
			result = null_used++ ? attach_copy(null_tree, at) : attach(null_tree, at);
		else if (empty >= 0)
			result = attach_copy(empty, at);
		else
			result = mount_on(launch, "tmpfs", "tmpfs", (struct list){ 0 }, MOUNT_ATTR_RDONLY, at, &empty);
		TRY_SAYING(result, "%s", path.data);
	}
	return 0;
}

int do_readonly(struct launch *launch, const struct op *op) {
	struct list paths = op->a[0].l;
	for (struct string path; list_take(&paths, &path);) {
		cleanup_fd at = open_in_root(launch, path.data, O_PATH);
		if (is_absent(at))
			continue;
		TRY_SAYING(at, "%s", path.data);
		cleanup_fd copy = TRY_SAYING(copy_of(at), "%s", path.data);
		TRY_SAYING(set_attr(copy, MOUNT_ATTR_RDONLY, 0, AT_RECURSIVE), "%s", path.data);
		TRY_SAYING(attach(copy, at), "%s", path.data);
	}
	return 0;
}

int do_remount(struct launch *launch, const struct op *op) {
	cleanup_fd at = TRY(open_in_root(launch, op->a[0].s.data, O_PATH));
	return set_attr(at, op->a[1].i, op->a[2].i, 0);
}

int do_pivot(struct launch *launch, const struct op *op) {
	TRY(or_errno(fchdir(launch->root)));
	if (op->a[0].i) {
		TRY(or_errno(chroot(".")));
	} else {
		/* Old root on top of the new one, then let go of it: no folder inside is needed. */
		TRY(or_errno(syscall(SYS_pivot_root, ".", ".")));
		TRY_SAYING(or_errno(umount2(".", MNT_DETACH)), "detach the old root");
	}
	launch->pivoted = 1;
	return or_errno(chdir("/"));
}

/* The terminal's slave, bound on /dev/console. */
static int bind_console(struct launch *launch, int slave) {
	cleanup_fd at = TRY_SAYING(make_in_root(launch, "dev/console", 0, 0600), "/dev/console");
	cleanup_fd tree = TRY_SAYING(sys_open_tree(slave, "", AT_EMPTY_PATH | OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC),
				     "copy the terminal's mount");
	TRY_SAYING(attach(tree, at), "/dev/console");
	return 0;
}

/* A pty in the container's own devpts. The slave is reached through the master (TIOCGPTPEER), not by a path. */
int do_console(struct launch *launch, const struct op *op) {
	cleanup_fd master = TRY_SAYING(open_in_root(launch, "dev/pts/ptmx", O_RDWR | O_NOCTTY),
				       "a terminal needs a devpts mount at /dev/pts");
	struct statfs fs;
	if (fstatfs(master, &fs) || fs.f_type != DEVPTS_SUPER_MAGIC)
		return fail_with(launch, EINVAL, "/dev/pts/ptmx is not on a devpts");
	int unlock = 0;
	TRY(or_errno(ioctl(master, TIOCSPTLCK, &unlock)));
	cleanup_fd slave = TRY(or_errno(ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC)));
	struct winsize size = { .ws_row = (unsigned short)op->a[1].i, .ws_col = (unsigned short)op->a[2].i };
	if (size.ws_row && size.ws_col)
		TRY(or_errno(ioctl(slave, TIOCSWINSZ, &size)));
	if (op->stage == CHILD_BEFORE_PIVOT) /* an exec's terminal is not the container's console */
		TRY(bind_console(launch, slave));
	TRY_SAYING(send_console(launch, op->a[0].i, master), "send the terminal");
	for (int fd = 0; fd < 3; fd++)
		TRY(or_errno(dup2(slave, fd)));
	return or_errno(ioctl(0, TIOCSCTTY, 0));
}
