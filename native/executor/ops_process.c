/* Operations on the child itself: namespaces, identity, limits, filters, the program. */
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/keyctl.h>
#include <linux/magic.h>
#include <linux/seccomp.h>
#include <net/if.h>
#include <pwd.h>
#include <sys/resource.h>
#include <sys/vfs.h>

#include "launch.h"

#define LAST_CAP 63

OPERATION(ns_join, or_errno(setns(slot_fd(launch, op->a[0].i), (int)op->a[1].i)))
OPERATION(take_back, or_errno(prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)))
OPERATION(unshare, or_errno(unshare((int)op->a[0].i)))

/* By the raw calls: libc would try to tell other threads. */
int do_become_root(OPERATION_ARGS) {
	TRY(or_errno(syscall(SYS_setresgid, 0, 0, 0)));
	return or_errno(syscall(SYS_setresuid, 0, 0, 0));
}

/* "0" is the writer: the only pid that means the same in every pid namespace. Nothing of the host stays open behind it. */
int do_cg_join(struct launch *launch, const struct op *op) {
	TRY(or_errno(write(slot_fd(launch, op->a[0].i), "0", 1)));
	close_fd(&launch->slot[op->a[0].i]);
	return 0;
}

int do_sysctl(struct launch *launch, const struct op *op) {
	char path[PATH_MAX];
	TRY(format_path(path, "sys/%s", op->a[0].s.data));
	return write_path(launch->proc, path, op->a[1].s.data, op->a[1].s.len);
}

/* At once, not by exec: a thread wants to be in the time namespace that its children would be in. */
int do_enter_time(OPERATION_ARGS) {
	cleanup_fd fd = TRY(or_errno(openat(launch->proc, "self/ns/time_for_children", O_RDONLY | O_CLOEXEC)));
	return or_errno(setns(fd, CLONE_NEWTIME));
}

OPERATION(hostname, or_errno(sethostname(op->a[0].s.data, op->a[0].s.len)))
OPERATION(domainname, or_errno(setdomainname(op->a[0].s.data, op->a[0].s.len)))

/* Any socket takes this ioctl: no address family need be there. */
int do_loopback(OPERATION_ARGS) {
	struct ifreq lo = { .ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING };
	cleanup_fd fd = TRY(or_errno(socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0)));
	return or_errno(ioctl(fd, SIOCSIFFLAGS, &lo));
}

OPERATION(rlimit, or_errno(setrlimit((int)op->a[0].i, &(struct rlimit){ (rlim_t)op->a[1].i, (rlim_t)op->a[2].i })))
/* What the kernel is given byte for byte was laid out by the compiler. */
OPERATION(scheduler, or_errno(syscall(SYS_sched_setattr, 0, op->a[0].s.data, 0)))
OPERATION(io_priority, or_errno(syscall(SYS_ioprio_set, 1, 0, (int)op->a[0].i)))
OPERATION(affinity, or_errno(syscall(SYS_sched_setaffinity, 0, (size_t)op->a[0].s.len, op->a[0].s.data)))
OPERATION(personality, or_errno(syscall(SYS_personality, (unsigned long)op->a[0].i)))
OPERATION(memory_policy, or_errno(syscall(SYS_set_mempolicy, (int)op->a[0].i, op->a[1].s.len ? op->a[1].s.data : NULL,
					  (unsigned long)op->a[1].s.len * 8)))
OPERATION(umask, (umask((mode_t)op->a[0].i), 0))
OPERATION(keyring, or_errno(syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, op->a[0].s.data)))
OPERATION(setsid, setsid() < 0 && errno != EPERM ? -errno : 0)

int do_stdio(struct launch *launch, const struct op *op) {
	for (int fd = 0; fd < 3; fd++)
		if (op->a[fd].i >= 0)
			TRY(or_errno(dup2(slot_fd(launch, op->a[fd].i), fd)));
	return 0;
}

/* The new user must be able to open /dev/stdout and /dev/stderr again: pipes and the terminal become its own. */
static int give_stdio(uid_t uid) {
	for (int fd = 0; fd < 3; fd++) {
		struct stat st;
		if (fstat(fd, &st) || st.st_uid == uid || !(S_ISFIFO(st.st_mode) || isatty(fd)))
			continue;
		if (fchown(fd, uid, (gid_t)-1) && errno != EINVAL && errno != EPERM && errno != EROFS)
			return -errno;
	}
	return 0;
}

int do_user(struct launch *launch, const struct op *op) {
	uid_t uid = (uid_t)op->a[0].i;
	gid_t gid = (gid_t)op->a[1].i;
	struct list names = op->a[2].l;
	gid_t *groups = calloc((size_t)names.count + 1, sizeof *groups);
	if (!groups)
		return -ENOMEM;
	size_t count = 0;
	for (struct string name; list_take(&names, &name);)
		groups[count++] = (gid_t)strtoul(name.data, NULL, 10);
	int result = or_errno(syscall(SYS_setgroups, count, groups));
	free(groups);
	/* An unprivileged user namespace denies setgroups; with no groups asked for, none is lost. */
	if (result != -EPERM || count)
		TRY_SAYING(result, "setgroups");
	TRY_SAYING(give_stdio(uid), "give standard input and output to the user");
	TRY_SAYING(or_errno(syscall(SYS_setresgid, gid, gid, gid)), "setresgid %u", gid);
	TRY_SAYING(or_errno(syscall(SYS_setresuid, uid, uid, uid)), "setresuid %u", uid);
	return 0;
}

OPERATION(keep_caps, or_errno(prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)))

int do_drop_bounding(struct launch *launch, const struct op *op) {
	uint64_t stays = (uint64_t)op->a[0].i;
	for (int cap = 0; cap <= LAST_CAP; cap++) {
		if (stays & (1ull << cap))
			continue;
		int has = prctl(PR_CAPBSET_READ, cap, 0, 0, 0);
		if (has < 0)
			return 0; /* past the kernel's last capability */
		if (has)
			TRY_SAYING(or_errno(prctl(PR_CAPBSET_DROP, cap, 0, 0, 0)), "capability %d", cap);
	}
	return 0;
}

int do_capabilities(struct launch *launch, const struct op *op) {
	uint64_t effective = (uint64_t)op->a[0].i, permitted = (uint64_t)op->a[1].i;
	uint64_t inheritable = (uint64_t)op->a[2].i, ambient = (uint64_t)op->a[3].i;
	struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct data[2];
	for (int i = 0; i < 2; i++) {
		data[i].effective = (uint32_t)(effective >> (32 * i));
		data[i].permitted = (uint32_t)(permitted >> (32 * i));
		data[i].inheritable = (uint32_t)(inheritable >> (32 * i));
	}
	TRY_SAYING(or_errno(syscall(SYS_capset, &header, data)), "capset: more than the runtime itself has");
	TRY(or_errno(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)));
	for (int cap = 0; cap <= LAST_CAP; cap++)
		if (ambient & (1ull << cap))
			TRY_SAYING(or_errno(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap, 0, 0)),
				   "ambient capability %d", cap);
	return 0;
}

OPERATION(no_new_privs, or_errno(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)))

int load_filter(struct launch *launch, int64_t flags, struct string code) {
	if (code.len % sizeof(struct sock_filter) || code.len / sizeof(struct sock_filter) > 65535)
		return fail_with(launch, EINVAL, "the program has %u bytes", code.len);
	/* The kernel copies it: no alignment is needed. */
	struct sock_fprog program = { (unsigned short)(code.len / sizeof(struct sock_filter)), (void *)code.data };
	return or_errno(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, (unsigned)flags, &program));
}

OPERATION(seccomp, load_filter(launch, op->a[0].i, op->a[1].s))

int do_cwd(struct launch *launch, const struct op *op) {
	/* Asked for twice: as root first, for a folder the user may not search, then as the user. One of them is enough. */
	if (launch->cwd_set)
		return 0;
	TRY(or_errno(chdir(op->a[0].s.data)));
	/* A cwd that was a link to a leaked host folder would show as "(unreachable)" (CVE-2024-21626). */
	char now[PATH_MAX];
	if (launch->pivoted && (syscall(SYS_getcwd, now, sizeof now) < 0 || now[0] != '/'))
		return fail_with(launch, EINVAL, "the folder is not inside the container's root");
	launch->cwd_set = 1;
	return 0;
}

static int executable(const char *path) {
	struct stat st;
	TRY(or_errno(stat(path, &st)));
	if (S_ISDIR(st.st_mode))
		return -EISDIR;
	return S_ISREG(st.st_mode) && !faccessat(AT_FDCWD, path, X_OK, AT_EACCESS) ? 0 : -EACCES;
}

/* The value of the last "NAME=..." in an environment, or NULL. */
static const char *variable(struct list env, const char *name) {
	const char *found = NULL;
	for (struct string s; list_take(&env, &s);)
		if (!strncmp(s.data, name, strlen(name)))
			found = s.data + strlen(name);
	return found;
}

/* HOME when the environment has none: the user's folder in the container's own passwd, else "/". */
static int find_home(struct launch *launch) {
	int fd = open("/etc/passwd", O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	struct stat st; /* of the container's making: a pipe there would never say its end */
	FILE *passwd = fd >= 0 && !fstat(fd, &st) && S_ISREG(st.st_mode) ? fdopen(fd, "r") : NULL;
	if (!passwd)
		close_fd(&fd);
	struct passwd *user = passwd ? fgetpwent(passwd) : NULL;
	while (user && (user->pw_uid != getuid() || !*user->pw_dir))
		user = fgetpwent(passwd);
	int made = asprintf(&launch->home, "HOME=%s", user ? user->pw_dir : "/");
	if (passwd)
		fclose(passwd);
	return made < 0 ? -ENOMEM : 0;
}

/* The search of execvp in the container's own PATH, so that a missing program is an error of `create`. The texts are
 * the ones Docker's clients look for. */
int do_find_executable(struct launch *launch, const struct op *op) {
	const char *name = op->a[0].s.data, *path = variable(op->a[1].l, "PATH=");
	if (!variable(op->a[1].l, "HOME="))
		TRY(find_home(launch));
	if (strchr(name, '/')) {
		int result = executable(name);
		if (result == -ENOENT || result == -ENOTDIR)
			return fail_with(launch, ENOENT, "exec: \"%s\": stat %s: no such file or directory", name, name);
		const char *more = result == -EISDIR ? "is a directory: " : "";
		TRY_SAYING(result, "exec: \"%s\": %spermission denied", name, more);
		return 0;
	}
	int denied = 0;
	if (!path)
		path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
	for (size_t n; *name; path += n + 1) {
		char candidate[PATH_MAX];
		n = strcspn(path, ":");
		int result = format_path(candidate, "%.*s%s%s", (int)n, path, n ? "/" : "./", name);
		if (!result)
			result = executable(candidate);
		if (!result)
			return (launch->program = strdup(candidate)) ? 0 : -ENOMEM;
		denied |= result == -EACCES;
		if (!path[n])
			break;
	}
	if (denied)
		return fail_with(launch, EACCES, "exec: \"%s\": permission denied", name);
	return fail_with(launch, ENOENT, "exec: \"%s\": executable file not found in $PATH", name);
}

int do_preserve_fds(struct launch *launch, const struct op *op) {
	if (op->a[0].i > launch->inherited - 3)
		return fail_with(launch, EBADF, "the caller passed fds 3 to %d only", launch->inherited - 1);
	launch->preserve = (int)op->a[0].i;
	for (int fd = 3; fd < 3 + launch->preserve; fd++)
		TRY_SAYING(or_errno(fcntl(fd, F_SETFD, 0)), "fd %d", fd);
	return 0;
}

int do_lsm(struct launch *launch, const struct op *op) {
	/* In an exec it is the container's /proc: believed only when it is one, with nothing mounted on the way. */
	struct statfs fs;
	if (fstatfs(launch->proc, &fs) || fs.f_type != PROC_SUPER_MAGIC)
		return fail_with(launch, EINVAL, "/proc is no proc file system");
	cleanup_fd fd = TRY(sys_openat2(launch->proc, op->a[0].s.data, O_WRONLY | O_CLOEXEC, 0, RESOLVE_NO_XDEV));
	return or_errno(write(fd, op->a[1].s.data, op->a[1].s.len));
}
