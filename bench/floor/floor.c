/* The floor of `dolium-runtime run` of a bundle: a bare program that makes the system calls of that plan, in its order, with
 * everything known beforehand: no configuration, no compiler, no checks, no messages but one byte each way.
 *
 *     floor [-t] ROOTFS STATE HIERARCHY... [UNIFIED]
 *
 * ROOTFS: what `runc spec`'s configuration has as its root; STATE: a folder to make and remove; HIERARCHY: the groups' parents
 * on cgroup v1 (a folder called "unified", or alone, is v2's). -t: one line an operation on standard error, microseconds and
 * the operation's name as in native/executor/ops.def. Exit code: the program's. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/keyctl.h>
#include <linux/mount.h>
#include <linux/sched.h>
#include <net/if.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MS_REC_SLAVE (0x4000 | 0x80000)
#define MS_PRIVATE_ 0x40000
#define MS_SLAVE_ 0x80000
#define MNT_DETACH 2 /* sys/mount.h and linux/mount.h exclude each other */
#define CLOSE_RANGE_CLOEXEC 4
#define GROUPS 24
#define TIMES 512

static struct { uint32_t used; struct { const char *name; uint32_t us; } at[TIMES]; } *times;
static int64_t begun;

static int64_t now(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void done(const char *name) {
	uint32_t n = __atomic_fetch_add(&times->used, 1, __ATOMIC_RELAXED);
	if (n < TIMES) {
		times->at[n].name = name;
		times->at[n].us = (uint32_t)((now() - begun) / 1000);
	}
	begun = now();
}

static int must(long result, const char *what) {
	if (result < 0) {
		fprintf(stderr, "floor: %s: %s\n", what, strerror(errno));
		_exit(125);
	}
	return (int)result;
}

#define CALL(name, ...) must(syscall(SYS_##name, __VA_ARGS__), #name)

static void put(const char *path, const char *text, int flags) {
	int fd = must(open(path, O_WRONLY | O_CLOEXEC | flags, 0600), path);
	must(write(fd, text, strlen(text)), path);
	close(fd);
}

static int tree(const char *path, int recursive, uint64_t set, uint64_t propagation) {
	struct mount_attr attr = { .attr_set = set, .propagation = propagation };
	int fd = CALL(open_tree, AT_FDCWD, path, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | (recursive ? AT_RECURSIVE : 0));
	done("open_tree");
	CALL(mount_setattr, fd, "", AT_EMPTY_PATH | (recursive ? AT_RECURSIVE : 0), &attr, sizeof attr);
	done("mount_attr");
	return fd;
}

static void attach(int fd, int root, const char *path) {
	int target = must(openat(root, path, O_PATH | O_CLOEXEC), path);
	CALL(move_mount, fd, "", target, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
	close(target);
	close(fd);
}

/* options: pairs of key and value, up to NULL */
static void file_system(int root, const char *type, const char *source, const char *const *options, unsigned attributes,
			const char *path) {
	int context = CALL(fsopen, type, FSOPEN_CLOEXEC);
	CALL(fsconfig, context, FSCONFIG_SET_STRING, "source", source, 0);
	for (; options && *options; options += 2)
		CALL(fsconfig, context, options[1] ? FSCONFIG_SET_STRING : FSCONFIG_SET_FLAG, options[0], options[1], 0);
	CALL(fsconfig, context, FSCONFIG_CMD_CREATE, NULL, NULL, 0);
	int fd = CALL(fsmount, context, FSMOUNT_CLOEXEC, attributes);
	mkdirat(root, path, 0755);
	attach(fd, root, path);
	close(context);
	done("mount_fs");
}

static void bind_again(const char *path, uint64_t set) {
	int fd = open(path, O_PATH | O_CLOEXEC);
	if (fd < 0)
		return; /* the kernel does not have it */
	struct mount_attr attr = { .attr_set = set };
	int copy = CALL(open_tree, fd, "", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH | AT_RECURSIVE);
	CALL(mount_setattr, copy, "", AT_EMPTY_PATH | AT_RECURSIVE, &attr, sizeof attr);
	CALL(move_mount, copy, "", fd, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
	close(fd);
	close(copy);
}

/* The first file and the first folder get what is there; the others, copies of it: only what is attached can be copied. */
static void mask(const char *path, int null) {
	static int empty = -1, shown;
	struct stat st;
	int fd = open(path, O_PATH | O_CLOEXEC);
	if (fd < 0)
		return;
	must(fstat(fd, &st), path);
	int from = S_ISDIR(st.st_mode) ? empty : null, first = S_ISDIR(st.st_mode) ? empty < 0 : !shown++;
	if (S_ISDIR(st.st_mode) && first) {
		int context = CALL(fsopen, "tmpfs", FSOPEN_CLOEXEC);
		CALL(fsconfig, context, FSCONFIG_CMD_CREATE, NULL, NULL, 0);
		from = empty = CALL(fsmount, context, FSMOUNT_CLOEXEC, MOUNT_ATTR_RDONLY);
		close(context);
	}
	int copy = first ? from : CALL(open_tree, from, "", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH);
	CALL(move_mount, copy, "", fd, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
	close(fd);
	if (!first)
		close(copy);
}

static void child(int go, int root_tree, int null, const int *join, const int *trees, char *const *names, int groups) {
	static const char *const dev[] = { "mode", "755", "size", "65536k", NULL };
	static const char *const pts[] = { "newinstance", NULL, "ptmxmode", "0666", "mode", "0620", "gid", "5", NULL };
	static const char *const shm[] = { "mode", "1777", "size", "65536k", NULL }, *const plain[] = { "mode", "755", NULL };
	static const struct { const char *path; int minor, major; } nodes[] = { { "dev/null", 3, 1 }, { "dev/zero", 5, 1 },
		{ "dev/full", 7, 1 }, { "dev/random", 8, 1 }, { "dev/urandom", 9, 1 }, { "dev/tty", 0, 5 } };
	static const char *const links[][2] = { { "/proc/self/fd", "dev/fd" }, { "/proc/self/fd/0", "dev/stdin" },
		{ "/proc/self/fd/1", "dev/stdout" }, { "/proc/self/fd/2", "dev/stderr" }, { "pts/ptmx", "dev/ptmx" } };
	static const char *const readonly[] = { "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger" };
	static const char *const masked[] = { "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
		"/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi" };
	const unsigned all = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC;
	char byte, path[256];
	prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
	must(read(go, &byte, 1), "wait");
	begun = now();
	for (int i = 0; i < groups; i++)
		if (join[i] >= 0) {
			must(write(join[i], "0", 1), "join");
			done("cg_join");
		}
	syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, "_ses.floor");
	done("keyring");
	must(syscall(SYS_mount, NULL, "/", NULL, MS_REC_SLAVE, NULL), "propagation");
	done("propagation");
	int root = root_tree, slash = must(open("/", O_PATH | O_CLOEXEC), "/");
	CALL(move_mount, root_tree, "", slash, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
	done("root_attach");
	file_system(root, "proc", "proc", NULL, 0, "proc");
	file_system(root, "tmpfs", "tmpfs", dev, MOUNT_ATTR_NOSUID | MOUNT_ATTR_STRICTATIME, "dev");
	file_system(root, "devpts", "devpts", pts, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC, "dev/pts");
	file_system(root, "tmpfs", "shm", shm, all, "dev/shm");
	file_system(root, "mqueue", "mqueue", NULL, all, "dev/mqueue");
	file_system(root, "sysfs", "sysfs", NULL, all | MOUNT_ATTR_RDONLY, "sys");
	file_system(root, "tmpfs", "tmpfs", plain, all, "sys/fs/cgroup");
	for (int i = 0; i < groups; i++) {
		snprintf(path, sizeof path, "sys/fs/cgroup/%s", strrchr(names[i], '/') + 1);
		must(mkdirat(root, path, 0755), path);
		attach(trees[i], root, path);
		done("mount_tree");
	}
	struct mount_attr attr = { .attr_set = MOUNT_ATTR_RDONLY };
	CALL(mount_setattr, root, "sys/fs/cgroup", 0, &attr, sizeof attr);
	done("remount");
	for (size_t i = 0; i < sizeof nodes / sizeof nodes[0]; i++) {
		must(mknodat(root, nodes[i].path, S_IFCHR | 0666, makedev((unsigned)nodes[i].major, (unsigned)nodes[i].minor)), "mknod");
		done("mknod");
	}
	for (size_t i = 0; i < sizeof links / sizeof links[0]; i++) {
		must(symlinkat(links[i][0], root, links[i][1]), "symlink");
		done("symlink");
	}
	setsid();
	done("setsid");
	must(fchdir(root), "fchdir");
	CALL(pivot_root, ".", ".");
	must(syscall(SYS_umount2, ".", MNT_DETACH), "umount");
	must(chdir("/"), "chdir");
	done("pivot");
	CALL(mount_setattr, AT_FDCWD, "/", 0, &attr, sizeof attr);
	done("remount");
	must(sethostname("floor", 5), "hostname");
	done("hostname");
	struct ifreq lo = { .ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING };
	int net = must(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), "socket");
	must(ioctl(net, SIOCSIFFLAGS, &lo), "lo");
	close(net);
	done("netlink");
	for (size_t i = 0; i < sizeof readonly / sizeof readonly[0]; i++)
		bind_again(readonly[i], MOUNT_ATTR_RDONLY);
	done("readonly");
	for (size_t i = 0; i < sizeof masked / sizeof masked[0]; i++)
		mask(masked[i], null);
	done("mask");
	struct rlimit files = { 1024, 1024 };
	must(setrlimit(RLIMIT_NOFILE, &files), "rlimit");
	done("rlimit");
	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	umask(022);
	done("no_new_privs");
	const uint64_t few = 536871968; /* AUDIT_WRITE, KILL, NET_BIND_SERVICE */
	for (int cap = 0; cap <= 63 && prctl(PR_CAPBSET_READ, cap, 0, 0, 0) >= 0; cap++)
		if (!(few >> cap & 1))
			prctl(PR_CAPBSET_DROP, cap, 0, 0, 0);
	done("drop_bounding");
	prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0);
	must(setgroups(0, NULL), "setgroups");
	must(setresgid(0, 0, 0), "setresgid");
	must(setresuid(0, 0, 0), "setresuid");
	done("user");
	struct __user_cap_header_struct head = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct data[2] = { { (uint32_t)few, (uint32_t)few, 0 }, { 0, 0, 0 } };
	CALL(capset, &head, data);
	done("capabilities");
	prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0);
	must(write(go, "c", 1), "created");
	must(read(go, &byte, 1), "start");
	syscall(SYS_close_range, 3, ~0u, CLOSE_RANGE_CLOEXEC);
	execle("/bin/true", "true", (char *)NULL, (char *const[]){ "PATH=/bin", "TERM=xterm", NULL });
	must(-1, "exec /bin/true");
}

int main(int argc, char **argv) {
	int show = argc > 1 && !strcmp(argv[1], "-t"), join[GROUPS], trees[GROUPS], born = -1, pair[2], status;
	argv += 1 + show;
	int groups = argc - 3 - show;
	if (groups < 1 || groups > GROUPS) {
		fprintf(stderr, "usage: floor [-t] ROOTFS STATE HIERARCHY...\n");
		return 125;
	}
	static const char *const rules[][2] = { { "deny", "a" }, { "allow", "c *:* m" }, { "allow", "b *:* m" }, { "allow", "c 1:3 rwm" },
		{ "allow", "c 1:8 rwm" }, { "allow", "c 1:7 rwm" }, { "allow", "c 5:0 rwm" }, { "allow", "c 1:5 rwm" },
		{ "allow", "c 1:9 rwm" }, { "allow", "c 136:* rwm" }, { "allow", "c 5:2 rwm" } };
	char **names = argv + 2, path[GROUPS][256], file[512], text[64];
	times = mmap(NULL, sizeof *times, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	begun = now();
	must(mkdir(argv[1], 0700), argv[1]);
	int lock = must(open(argv[1], O_RDONLY | O_DIRECTORY | O_CLOEXEC), argv[1]);
	must(flock(lock, LOCK_EX), "flock");
	snprintf(file, sizeof file, "%s/config.json", argv[1]);
	put(file, "{}", O_CREAT);
	done("write_file");
	for (int i = 0; i < groups; i++) {
		int v2 = groups == 1 || !strcmp(strrchr(names[i], '/') + 1, "unified");
		snprintf(path[i], sizeof path[i], "%s/dolium/floor%d", names[i], getpid());
		must(mkdir(path[i], 0755), path[i]);
		if (!strcmp(strrchr(names[i], '/') + 1, "cpuset"))
			for (int k = 0; k < 2; k++) { /* a new v1 cpuset has none, and takes no process */
				snprintf(file, sizeof file, "%s/dolium/cpuset.%s", names[i], k ? "mems" : "cpus");
				int from = must(open(file, O_RDONLY | O_CLOEXEC), file);
				ssize_t n = must(read(from, text, sizeof text - 1), file);
				text[n] = '\0';
				close(from);
				snprintf(file, sizeof file, "%s/cpuset.%s", path[i], k ? "mems" : "cpus");
				put(file, text, 0);
			}
		snprintf(file, sizeof file, "%s/%s", path[i], v2 ? "." : "tasks");
		int fd = must(open(file, (v2 ? O_RDONLY : O_WRONLY) | O_CLOEXEC), file);
		join[i] = v2 ? -1 : fd;
		if (v2)
			born = fd;
		done("cg_mkdir");
	}
	for (int i = 0; i < groups; i++)
		for (size_t k = 0; !strcmp(strrchr(names[i], '/') + 1, "devices") && k < sizeof rules / sizeof rules[0]; k++) {
			snprintf(file, sizeof file, "%s/devices.%s", path[i], rules[k][0]);
			put(file, rules[k][1], 0);
			done("cg_write");
		}
	int root = tree(argv[0], 1, 0, MS_SLAVE_), null = tree("/dev/null", 0, 0, MS_PRIVATE_);
	for (int i = 0; i < groups; i++)
		trees[i] = tree(path[i], 0, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC, MS_PRIVATE_);
	must(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair), "socketpair");
	struct clone_args args = { .flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS |
		(born >= 0 ? CLONE_INTO_CGROUP : 0), .cgroup = born >= 0 ? (uint64_t)born : 0, .exit_signal = SIGCHLD };
	pid_t pid = (pid_t)CALL(clone3, &args, sizeof args);
	if (pid == 0) {
		close(pair[0]);
		child(pair[1], root, null, join, trees, names, groups);
	}
	done("clone");
	close(pair[1]);
	char byte;
	must(write(pair[0], "g", 1), "go");
	if (read(pair[0], &byte, 1) != 1)
		return 125;
	begun = now();
	snprintf(file, sizeof file, "%s/state.json", argv[1]);
	put(file, "{}", O_CREAT);
	done("write_file");
	must(write(pair[0], "s", 1), "start");
	must(waitpid(pid, &status, 0), "waitpid");
	begun = now();
	for (int i = 0; i < groups; i++) {
		while (rmdir(path[i]) && errno == EBUSY)
			sched_yield();
		done("cg_rmdir");
	}
	unlink(file);
	snprintf(file, sizeof file, "%s/config.json", argv[1]);
	unlink(file);
	rmdir(argv[1]);
	done("remove_dir");
	for (uint32_t i = 0; show && i < times->used; i++)
		fprintf(stderr, "%u %s\n", times->at[i].us, times->at[i].name);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}
