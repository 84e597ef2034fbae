/* Operations on mounts: trees prepared by the parent as fds, and the child's own root. */
#include <dirent.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>

#include "launch.h"

#define DEVPTS_MAGIC 0x1cd1
#define MOUNT_COPY_UP 0x10000
#ifndef TIOCGPTPEER
#define TIOCGPTPEER _IO('T', 0x41)
#endif

static int old_api(const struct launch *launch) {
	return (launch->plan->flags & PLAN_FLAG_OLD_MOUNT_API) != 0;
}

static unsigned long ms_flags(int64_t attrs) {
	unsigned long flags = 0;
	flags |= attrs & MOUNT_ATTR_RDONLY ? MS_RDONLY : 0;
	flags |= attrs & MOUNT_ATTR_NOSUID ? MS_NOSUID : 0;
	flags |= attrs & MOUNT_ATTR_NODEV ? MS_NODEV : 0;
	flags |= attrs & MOUNT_ATTR_NOEXEC ? MS_NOEXEC : 0;
	flags |= attrs & MOUNT_ATTR_NODIRATIME ? MS_NODIRATIME : 0;
	if ((attrs & MOUNT_ATTR__ATIME) == MOUNT_ATTR_NOATIME)
		flags |= MS_NOATIME;
	if ((attrs & MOUNT_ATTR__ATIME) == MOUNT_ATTR_STRICTATIME)
		flags |= MS_STRICTATIME;
	return flags;
}

static const char *fd_path(char *buffer, size_t size, int fd) {
	snprintf(buffer, size, "/proc/self/fd/%d", fd);
	return buffer;
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
	if (option)
		return fail_with(launch, number, "option %s", option);
	return -number;
}

static int set_option(int fs, const char *option) {
	char key[PATH_MAX];
	const char *equals = strchr(option, '=');
	if (!equals)
		return sys_fsconfig(fs, FSCONFIG_SET_FLAG, option, NULL, 0);
	if ((size_t)(equals - option) >= sizeof key) {
		errno = ENAMETOOLONG;
		return -1;
	}
	memcpy(key, option, (size_t)(equals - option));
	key[equals - option] = '\0';
	return sys_fsconfig(fs, FSCONFIG_SET_STRING, key, equals + 1, 0);
}

static int set_attr(int fd, int recursive, int64_t set, int64_t propagation) {
	struct mount_attr attr = { .attr_set = (uint64_t)set, .propagation = (uint64_t)propagation & ~(uint64_t)MS_REC };
	return sys_mount_setattr(fd, "", AT_EMPTY_PATH | (recursive ? AT_RECURSIVE : 0), &attr) ? -errno : 0;
}

/* A detached mount of a new file system, or -errno; -ENOSYS asks for the fallback. */
static int new_fs(struct launch *launch, const char *type, const char *source, const struct list *options,
		  int64_t attrs) {
	cleanup_fd fs = -1;
	const char *cursor = options->encoded;
	int mount;
	if (old_api(launch))
		return -ENOSYS;
	fs = sys_fsopen(type, FSOPEN_CLOEXEC);
	if (fs < 0)
		return -errno;
	if (*source && sys_fsconfig(fs, FSCONFIG_SET_STRING, "source", source, 0))
		return explain(launch, fs, errno, "source");
	for (uint32_t i = 0; i < options->count; i++) {
		const char *option = list_next(&cursor).data;
		if (set_option(fs, option))
			return explain(launch, fs, errno, option);
	}
	if (sys_fsconfig(fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0))
		return explain(launch, fs, errno, NULL);
	mount = sys_fsmount(fs, FSMOUNT_CLOEXEC, (unsigned)attrs);
	return mount < 0 ? explain(launch, fs, errno, NULL) : mount;
}

static char *join_options(const struct list *options) {
	const char *cursor = options->encoded;
	size_t size = 1;
	char *joined;
	for (uint32_t i = 0; i < options->count; i++)
		size += list_next(&cursor).len + 1;
	joined = calloc(1, size);
	cursor = options->encoded;
	for (uint32_t i = 0; joined && i < options->count; i++) {
		if (i)
			strcat(joined, ",");
		strcat(joined, list_next(&cursor).data);
	}
	return joined;
}

static int copy_file(int from, int to, const char *name, const struct stat *st) {
	cleanup_fd in = openat(from, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
	cleanup_fd out = -1;
	char chunk[16384];
	ssize_t n;
	if (in < 0)
		return -errno;
	out = openat(to, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (out < 0)
		return -errno;
	while ((n = read(in, chunk, sizeof chunk)) > 0) {
		int result = write_all(out, chunk, (size_t)n);
		if (result)
			return result;
	}
	return n < 0 || fchown(out, st->st_uid, st->st_gid) || fchmod(out, st->st_mode & 07777) ? -errno : 0;
}

/* tmpcopyup: what the folder below held, with owners and modes, no extended attributes. No link is followed. */
static int copy_tree(int from, int to) {
	int again = openat(from, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC), result = 0;
	DIR *folder = again < 0 ? NULL : fdopendir(again);
	struct dirent *entry;
	if (!folder)
		return -errno;
	while (!result && (entry = readdir(folder))) {
		const char *name = entry->d_name;
		char link[PATH_MAX];
		struct stat st;
		if (!strcmp(name, ".") || !strcmp(name, ".."))
			continue;
		if (fstatat(from, name, &st, AT_SYMLINK_NOFOLLOW)) {
			result = -errno;
		} else if (S_ISREG(st.st_mode)) {
			result = copy_file(from, to, name, &st);
		} else if (S_ISLNK(st.st_mode)) {
			ssize_t n = readlinkat(from, name, link, sizeof link - 1);
			link[n > 0 ? n : 0] = '\0';
			if (n < 0 || symlinkat(link, to, name) || fchownat(to, name, st.st_uid, st.st_gid, AT_SYMLINK_NOFOLLOW))
				result = -errno;
		} else if (S_ISDIR(st.st_mode)) {
			cleanup_fd below = openat(from, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
			cleanup_fd made = -1;
			if (below < 0 || mkdirat(to, name, 0700))
				result = -errno;
			else if ((made = openat(to, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)) < 0)
				result = -errno;
			else if (!(result = copy_tree(below, made)) &&
				 (fchown(made, st.st_uid, st.st_gid) || fchmod(made, st.st_mode & 07777)))
				result = -errno;
		}
	}
	closedir(folder);
	return result;
}

static int attach(int tree, int target) {
	unsigned flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH;
	return sys_move_mount(tree, "", target, "", flags) ? -errno : 0;
}

static int mount_new(struct launch *launch, const struct op *op) {
	const char *type = op->a[0].s.data, *source = op->a[1].s.data, *target = op->a[4].s.data;
	cleanup_fd mount_fd = -1, at = -1;
	at = make_in_root(launch, target, 1, op->a[5].i & 07777 ? (mode_t)(op->a[5].i & 07777) : 0755);
	if (at < 0)
		return fail_with(launch, -at, "target %s", target);
	mount_fd = new_fs(launch, type, source, &op->a[2].l, op->a[3].i);
	if (mount_fd == -ENOSYS) {
		char path[64], *options = join_options(&op->a[2].l);
		int result;
		if (!options)
			return -ENOMEM;
		result = mount(*source ? source : type, fd_path(path, sizeof path, at), type, ms_flags(op->a[3].i), options);
		result = result ? -errno : 0;
		free(options);
		return result;
	}
	if (mount_fd < 0)
		return mount_fd;
	return attach(mount_fd, at);
}

int do_mount_fs(struct launch *launch, const struct op *op) {
	cleanup_fd below = -1, above = -1;
	int result;
	if (!(op->a[5].i & MOUNT_COPY_UP))
		return mount_new(launch, op);
	below = open_in_root(launch, op->a[4].s.data, O_RDONLY | O_DIRECTORY);
	if (below < 0 && below != -ENOENT)
		return below;
	result = mount_new(launch, op);
	if (result || below < 0)
		return result;
	above = open_in_root(launch, op->a[4].s.data, O_RDONLY | O_DIRECTORY);
	if (above < 0)
		return above;
	result = copy_tree(below, above);
	return result ? fail_with(launch, -result, "copy what the folder holds") : 0;
}

int do_open_tree(struct launch *launch, const struct op *op) {
	const char *path = op->a[1].s.data;
	struct stat st;
	int fd = sys_open_tree(AT_FDCWD, path, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC |
				       (op->a[2].i ? AT_RECURSIVE : 0));
	if (fd < 0)
		return -errno;
	if (fstat(fd, &st)) {
		close_fd(&fd);
		return -errno;
	}
	if ((op->a[3].i == 1 && !S_ISDIR(st.st_mode)) || (op->a[3].i == 2 && S_ISDIR(st.st_mode))) {
		close(fd);
		return fail_with(launch, op->a[3].i == 1 ? ENOTDIR : EISDIR, "%s", path);
	}
	return take_slot(launch, op->a[0].i, fd);
}

int do_mount_attr(struct launch *launch, const struct op *op) {
	int userns = op->a[5].i < 0 ? -1 : slot_fd(launch, op->a[5].i);
	struct mount_attr attr = {
		.attr_set = (uint64_t)op->a[1].i,
		.attr_clr = (uint64_t)op->a[2].i,
		.propagation = (uint64_t)op->a[3].i,
	};
	if (userns >= 0) {
		attr.attr_set |= MOUNT_ATTR_IDMAP;
		attr.userns_fd = (uint64_t)userns;
	}
	/* Changing the atime mode takes clearing its whole field. */
	if (attr.attr_set & MOUNT_ATTR__ATIME)
		attr.attr_clr |= MOUNT_ATTR__ATIME;
	if (sys_mount_setattr(slot_fd(launch, op->a[0].i), "",
			      AT_EMPTY_PATH | (op->a[4].i ? AT_RECURSIVE : 0), &attr))
		return -errno;
	return 0;
}

OPERATION(propagation, mount(NULL, "/", NULL, (unsigned long)op->a[0].i, NULL) ? -errno : 0)

int do_root_attach(struct launch *launch, const struct op *op) {
	int tree = slot_fd(launch, op->a[0].i);
	/* On top of the old root: a look-up that starts at "/" does not cross to what lies on it, so the host's paths stay
	 * reachable until pivot_root, and no folder of the host serves as a mount point. */
	if (sys_move_mount(tree, "", AT_FDCWD, "/", MOVE_MOUNT_F_EMPTY_PATH))
		return -errno;
	launch->root = fcntl(tree, F_DUPFD_CLOEXEC, 3);
	return launch->root < 0 ? -errno : 0;
}

OPERATION(root_propagation, set_attr(launch->root, (op->a[0].i & MS_REC) != 0, 0, op->a[0].i))

/* A copy of a tree that is in place already: a detached tree can be attached once. */
static int copy_of(int tree) {
	return sys_open_tree(tree, "", AT_EMPTY_PATH | OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE);
}

static int attach_copy(int tree, int target) {
	cleanup_fd copy = copy_of(tree);
	return copy < 0 ? -errno : attach(copy, target);
}

int do_mount_tree(struct launch *launch, const struct op *op) {
	int tree = slot_fd(launch, op->a[0].i), result;
	cleanup_fd at = make_in_root(launch, op->a[1].s.data, op->a[2].i == 1, 0755);
	if (at < 0)
		return fail_with(launch, -at, "target %s", op->a[1].s.data);
	result = attach(tree, at);
	return result || !op->a[3].i ? result : set_attr(tree, (op->a[3].i & MS_REC) != 0, 0, op->a[3].i);
}

int do_bind_device(struct launch *launch, const struct op *op) {
	cleanup_fd at = make_in_root(launch, op->a[1].s.data, 0, 0666);
	if (at < 0)
		return -at == EEXIST ? at : fail_with(launch, -at, "target %s", op->a[1].s.data);
	return attach(slot_fd(launch, op->a[0].i), at);
}

int do_mknod(struct launch *launch, const struct op *op) {
	const char *name;
	cleanup_fd folder = parent_in_root(launch, op->a[0].s.data, &name);
	mode_t mode = (mode_t)op->a[1].i;
	dev_t device = makedev((unsigned)op->a[2].i, (unsigned)op->a[3].i);
	if (folder < 0)
		return folder;
	if (mknodat(folder, name, mode, device)) {
		struct stat st;
		if (errno != EEXIST)
			return -errno;
		if (fstatat(folder, name, &st, AT_SYMLINK_NOFOLLOW))
			return -errno;
		if ((st.st_mode & S_IFMT) == (mode & S_IFMT) && st.st_rdev == device)
			return 0;
		return fail_with(launch, EEXIST, "something else is there");
	}
	if (fchmodat(folder, name, mode & 07777, 0)) /* mknod's mode went through the umask */
		return -errno;
	return fchownat(folder, name, (uid_t)op->a[4].i, (gid_t)op->a[5].i, AT_SYMLINK_NOFOLLOW) ? -errno : 0;
}

int do_symlink(struct launch *launch, const struct op *op) {
	const char *name;
	cleanup_fd folder = parent_in_root(launch, op->a[1].s.data, &name);
	if (folder < 0)
		return folder;
	return symlinkat(op->a[0].s.data, folder, name) && errno != EEXIST ? -errno : 0;
}

int do_mkdir_in_root(struct launch *launch, const struct op *op) {
	cleanup_fd fd = make_in_root(launch, op->a[0].s.data, 1, (mode_t)op->a[1].i);
	struct stat st;
	if (fd < 0)
		return fd;
	if (fstat(fd, &st))
		return -errno;
	return S_ISDIR(st.st_mode) ? 0 : -ENOTDIR;
}

/* Hidden files show the host's /dev/null, hidden folders an empty read-only tmpfs. Target and source are both fds that
 * were opened once; no name inside the container is trusted to be what it was. */
int do_mask(struct launch *launch, const struct op *op) {
	const char *cursor = op->a[0].l.encoded;
	int null_tree = slot_fd(launch, op->a[1].i), null_used = 0;
	cleanup_fd empty = -1;
	struct list none = { NULL, 0 };
	for (uint32_t i = 0; i < op->a[0].l.count; i++) {
		const char *path = list_next(&cursor).data;
		cleanup_fd at = open_in_root(launch, path, O_PATH);
		struct stat st;
		int result;

		if (at == -ENOENT || at == -ENOTDIR || at == -EACCES)
			continue;
		if (at < 0 || fstat(at, &st))
			return fail_with(launch, at < 0 ? -at : errno, "%s", path);
		if (!S_ISDIR(st.st_mode)) {
			result = null_used ? attach_copy(null_tree, at) : attach(null_tree, at);
			null_used = 1;
		} else if (empty < 0) {
			empty = new_fs(launch, "tmpfs", "tmpfs", &none, MOUNT_ATTR_RDONLY);
			if (empty == -ENOSYS) {
				char target[64];
				result = mount("tmpfs", fd_path(target, sizeof target, at), "tmpfs", MS_RDONLY, "") ? -errno : 0;
			} else {
				result = empty < 0 ? empty : attach(empty, at);
			}
		} else {
			result = attach_copy(empty, at);
		}
		if (result)
			return fail_with(launch, -result, "%s", path);
	}
	return 0;
}

int do_readonly(struct launch *launch, const struct op *op) {
	const char *cursor = op->a[0].l.encoded;
	for (uint32_t i = 0; i < op->a[0].l.count; i++) {
		const char *path = list_next(&cursor).data;
		cleanup_fd at = open_in_root(launch, path, O_PATH);
		cleanup_fd copy = -1;
		int result;

		if (at == -ENOENT || at == -ENOTDIR || at == -EACCES)
			continue;
		if (at < 0)
			return fail_with(launch, -at, "%s", path);
		copy = copy_of(at);
		result = copy < 0 ? -errno : set_attr(copy, 1, MOUNT_ATTR_RDONLY, 0);
		if (!result)
			result = attach(copy, at);
		if (result)
			return fail_with(launch, -result, "%s", path);
	}
	return 0;
}

OPERATION(root_attr, set_attr(launch->root, 0, op->a[0].i, 0))

int do_remount(struct launch *launch, const struct op *op) {
	cleanup_fd at = open_in_root(launch, op->a[0].s.data, O_PATH);
	return at < 0 ? at : set_attr(at, (op->a[2].i & MS_REC) != 0, op->a[1].i, op->a[2].i);
}

int do_pivot(struct launch *launch, const struct op *op) {
	if (fchdir(launch->root))
		return -errno;
	if (op->a[0].i) {
		if (chroot("."))
			return -errno;
	} else {
		/* Old root on top of the new one, then let go of it: no folder inside is needed. */
		if (syscall(SYS_pivot_root, ".", "."))
			return -errno;
		if (umount2(".", MNT_DETACH))
			return fail_with(launch, errno, "detach the old root");
	}
	launch->pivoted = 1;
	return chdir("/") ? -errno : 0;
}

/* A pty in the container's own devpts. The slave is reached through the master (TIOCGPTPEER), not by a path. */
int do_console(struct launch *launch, const struct op *op) {
	struct winsize size = { .ws_row = (unsigned short)op->a[1].i, .ws_col = (unsigned short)op->a[2].i };
	cleanup_fd master = open_in_root(launch, "dev/pts/ptmx", O_RDWR | O_NOCTTY);
	cleanup_fd slave = -1, tree = -1, at = -1;
	struct statfs fs;
	int unlock = 0, result;
	if (master < 0)
		return fail_with(launch, -master, "a terminal needs a devpts mount at /dev/pts");
	if (fstatfs(master, &fs) || fs.f_type != DEVPTS_MAGIC)
		return fail_with(launch, EINVAL, "/dev/pts/ptmx is not on a devpts");
	if (ioctl(master, TIOCSPTLCK, &unlock))
		return -errno;
	slave = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (slave < 0)
		return -errno;
	if (size.ws_row && size.ws_col && ioctl(slave, TIOCSWINSZ, &size))
		return -errno;
	if (op->stage == CHILD_BEFORE_PIVOT) { /* an exec's terminal is not the container's console */
		at = make_in_root(launch, "dev/console", 0, 0600);
		if (at < 0)
			return fail_with(launch, -at, "/dev/console");
		tree = sys_open_tree(slave, "", AT_EMPTY_PATH | OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
		if (tree < 0)
			return fail_with(launch, errno, "copy the terminal's mount");
		result = attach(tree, at);
		if (result)
			return fail_with(launch, -result, "/dev/console");
	}
	result = op->a[0].i >= 0 ? send_console(slot_fd(launch, op->a[0].i), master) : send_console_message(launch, master);
	if (result < 0)
		return fail_with(launch, -result, "send the terminal");
	for (int fd = 0; fd < 3; fd++)
		if (dup2(slave, fd) < 0)
			return -errno;
	return ioctl(0, TIOCSCTTY, 0) ? -errno : 0;
}
