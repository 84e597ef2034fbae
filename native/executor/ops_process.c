/* Operations on the child itself: namespaces, identity, limits, filters, the program. */
#include <grp.h>
#include <limits.h>
#include <linux/capability.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include "launch.h"

#ifndef PR_CAP_AMBIENT
#define PR_CAP_AMBIENT 47
#define PR_CAP_AMBIENT_RAISE 2
#define PR_CAP_AMBIENT_CLEAR_ALL 4
#endif
#define LAST_CAP 63
#define SECCOMP_SET_MODE_FILTER 1

struct sock_program {
	unsigned short len;
	const void *filter;
};

OPERATION(ns_join, setns(slot_fd(launch, op->a[0].i), (int)op->a[1].i) ? -errno : 0)
OPERATION(unshare, unshare((int)op->a[0].i) ? -errno : 0)

int do_become_root(OPERATION_ARGS) {
	/* By the raw call: libc would try to tell other threads. */
	if (syscall(SYS_setresgid, 0, 0, 0))
		return -errno;
	return syscall(SYS_setresuid, 0, 0, 0) ? -errno : 0;
}

int do_cg_join(struct launch *launch, const struct op *op) {
	/* "0" is the writer: the only pid that means the same in every pid namespace. */
	return write(slot_fd(launch, op->a[0].i), "0", 1) < 0 ? -errno : 0;
}

int do_sysctl(struct launch *launch, const struct op *op) {
	char path[PATH_MAX];
	if ((size_t)snprintf(path, sizeof path, "sys/%s", op->a[0].s.data) >= sizeof path)
		return -ENAMETOOLONG;
	return write_path(launch->proc, path, op->a[1].s.data, op->a[1].s.len);
}

OPERATION(hostname, sethostname(op->a[0].s.data, op->a[0].s.len) ? -errno : 0)
OPERATION(domainname, setdomainname(op->a[0].s.data, op->a[0].s.len) ? -errno : 0)

int do_loopback_up(OPERATION_ARGS) {
	cleanup_fd fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	struct ifreq request;
	if (fd < 0)
		return -errno;
	memset(&request, 0, sizeof request);
	strcpy(request.ifr_name, "lo");
	request.ifr_flags = IFF_UP;
	return ioctl(fd, SIOCSIFFLAGS, &request) ? -errno : 0;
}

int do_rlimit(OPERATION_ARGS) {
	struct rlimit limit = { (rlim_t)op->a[1].i, (rlim_t)op->a[2].i };
	return setrlimit((int)op->a[0].i, &limit) ? -errno : 0;
}

OPERATION(umask, (umask((mode_t)op->a[0].i), 0))
OPERATION(keyring, syscall(SYS_keyctl, 1 /* KEYCTL_JOIN_SESSION_KEYRING */, op->a[0].s.data) < 0 ? -errno : 0)
OPERATION(setsid, setsid() < 0 && errno != EPERM ? -errno : 0)

int do_stdio(struct launch *launch, const struct op *op) {
	for (int i = 0; i < 3; i++) {
		int fd = op->a[i].i < 0 ? -1 : slot_fd(launch, op->a[i].i);
		if (op->a[i].i >= 0 && dup2(fd, i) < 0)
			return -errno;
	}
	return 0;
}

/* The new user must be able to open /dev/stdout and /dev/stderr again: pipes and the terminal become its own. */
static int give_stdio(uid_t uid) {
	for (int fd = 0; fd < 3; fd++) {
		struct stat st;
		if (fstat(fd, &st) || st.st_uid == uid)
			continue;
		if (!S_ISFIFO(st.st_mode) && !(S_ISCHR(st.st_mode) && isatty(fd)))
			continue;
		if (fchown(fd, uid, (gid_t)-1) && errno != EINVAL && errno != EPERM && errno != EROFS)
			return -errno;
	}
	return 0;
}

int do_user(struct launch *launch, const struct op *op) {
	uid_t uid = (uid_t)op->a[0].i;
	gid_t gid = (gid_t)op->a[1].i;
	const char *cursor = op->a[2].l.encoded;
	gid_t *groups = calloc((size_t)op->a[2].l.count + 1, sizeof *groups);
	int result;
	if (!groups)
		return -ENOMEM;
	for (uint32_t i = 0; i < op->a[2].l.count; i++)
		groups[i] = (gid_t)strtoul(list_next(&cursor).data, NULL, 10);
	result = syscall(SYS_setgroups, op->a[2].l.count, groups) ? -errno : 0;
	free(groups);
	/* An unprivileged user namespace denies setgroups; with no groups asked for, none is lost. */
	if (result && !(result == -EPERM && op->a[2].l.count == 0))
		return fail_with(launch, -result, "setgroups");
	result = give_stdio(uid);
	if (result)
		return fail_with(launch, -result, "give standard input and output to the user");
	if (syscall(SYS_setresgid, gid, gid, gid))
		return fail_with(launch, errno, "setresgid %u", gid);
	if (syscall(SYS_setresuid, uid, uid, uid))
		return fail_with(launch, errno, "setresuid %u", uid);
	return 0;
}

OPERATION(keep_caps, prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0) ? -errno : 0)

int do_drop_bounding(struct launch *launch, const struct op *op) {
	uint64_t keep = (uint64_t)op->a[0].i;
	for (int cap = 0; cap <= LAST_CAP; cap++) {
		int has;
		if (keep & (1ull << cap))
			continue;
		has = prctl(PR_CAPBSET_READ, cap, 0, 0, 0);
		if (has < 0)
			return 0; /* past the kernel's last capability */
		if (has && prctl(PR_CAPBSET_DROP, cap, 0, 0, 0))
			return fail_with(launch, errno, "capability %d", cap);
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
	if (syscall(SYS_capset, &header, data))
		return fail_with(launch, errno, "capset: more than the runtime itself has");
	if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0))
		return -errno;
	for (int cap = 0; cap <= LAST_CAP; cap++)
		if (ambient & (1ull << cap) && prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap, 0, 0))
			return fail_with(launch, errno, "ambient capability %d", cap);
	return 0;
}

OPERATION(no_new_privs, prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ? -errno : 0)

int do_seccomp(struct launch *launch, const struct op *op) {
	struct sock_program program = { (unsigned short)(op->a[1].s.len / 8), NULL };
	void *aligned;
	int result;
	if (op->a[1].s.len % 8 || op->a[1].s.len / 8 > 65535)
		return fail_with(launch, EINVAL, "the program has %u bytes", op->a[1].s.len);
	aligned = malloc(op->a[1].s.len ? op->a[1].s.len : 1);
	if (!aligned)
		return -ENOMEM;
	memcpy(aligned, op->a[1].s.data, op->a[1].s.len);
	program.filter = aligned;
	result = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, (unsigned)op->a[0].i, &program) ? -errno : 0;
	free(aligned);
	return result;
}

int do_cwd(struct launch *launch, const struct op *op) {
	char now[PATH_MAX];
	/* Asked for twice: as root first, for a folder the user may not search, then as the user. One of them is enough. */
	if (launch->cwd_set)
		return 0;
	if (chdir(op->a[0].s.data))
		return -errno;
	/* A cwd that was a link to a leaked host folder would show as "(unreachable)" (CVE-2024-21626). */
	if (launch->pivoted && (syscall(SYS_getcwd, now, sizeof now) < 0 || now[0] != '/'))
		return fail_with(launch, EINVAL, "the folder is not inside the container's root");
	launch->cwd_set = 1;
	return 0;
}

static int executable(const char *path) {
	struct stat st;
	if (stat(path, &st))
		return -errno;
	if (S_ISDIR(st.st_mode))
		return -EISDIR;
	if (!S_ISREG(st.st_mode) || faccessat(AT_FDCWD, path, X_OK, AT_EACCESS))
		return -EACCES;
	return 0;
}

static const char *path_of(const struct list *env) {
	const char *cursor = env->encoded, *found = NULL;
	for (uint32_t i = 0; i < env->count; i++) {
		struct string s = list_next(&cursor);
		if (!strncmp(s.data, "PATH=", 5))
			found = s.data + 5;
	}
	return found ? found : "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
}

/* HOME when the environment has none: the user's folder in the container's own passwd, else "/". */
static int find_home(struct launch *launch, const struct list *env) {
	const char *cursor = env->encoded;
	char line[1024], *home = NULL;
	FILE *passwd;
	for (uint32_t i = 0; i < env->count; i++)
		if (!strncmp(list_next(&cursor).data, "HOME=", 5))
			return 0;
	passwd = fopen("/etc/passwd", "re");
	while (passwd && !home && fgets(line, sizeof line, passwd)) {
		char *field[6], *at = line;
		int n = 0;
		for (; n < 6 && at; n++) {
			field[n] = at;
			at = strchr(at, ':');
			if (at)
				*at++ = '\0';
		}
		if (n == 6 && (uid_t)strtoul(field[2], NULL, 10) == getuid() && *field[5])
			home = field[5];
	}
	if (passwd)
		fclose(passwd);
	launch->home = malloc(strlen(home ? home : "/") + 6);
	if (!launch->home)
		return -ENOMEM;
	sprintf(launch->home, "HOME=%s", home ? home : "/");
	return 0;
}

/* The search of execvp in the container's own PATH, so that a missing program is an error of `create`. The texts are
 * the ones Docker's clients look for. */
int do_find_executable(struct launch *launch, const struct op *op) {
	const char *name = op->a[0].s.data, *path = path_of(&op->a[1].l);
	int denied = 0;
	if (find_home(launch, &op->a[1].l))
		return -ENOMEM;
	if (strchr(name, '/')) {
		int result = executable(name);
		if (result == -ENOENT || result == -ENOTDIR)
			return fail_with(launch, ENOENT, "exec: \"%s\": stat %s: no such file or directory", name, name);
		if (result == -EISDIR)
			return fail_with(launch, EISDIR, "exec: \"%s\": is a directory: permission denied", name);
		if (result)
			return fail_with(launch, -result, "exec: \"%s\": permission denied", name);
		launch->program = strdup(name);
		return launch->program ? 0 : -ENOMEM;
	}
	while (*name) {
		char candidate[PATH_MAX];
		size_t n = strcspn(path, ":");
		int result;
		snprintf(candidate, sizeof candidate, "%.*s%s%s", (int)n, path, n ? "/" : "./", name);
		result = executable(candidate);
		if (!result) {
			launch->program = strdup(candidate);
			return launch->program ? 0 : -ENOMEM;
		}
		denied |= result == -EACCES;
		if (!path[n])
			break;
		path += n + 1;
	}
	if (denied)
		return fail_with(launch, EACCES, "exec: \"%s\": permission denied", name);
	return fail_with(launch, ENOENT, "exec: \"%s\": executable file not found in $PATH", name);
}

int do_preserve_fds(struct launch *launch, const struct op *op) {
	launch->preserve = (int)op->a[0].i;
	for (int fd = 3; fd < 3 + launch->preserve; fd++)
		if (fcntl(fd, F_SETFD, 0))
			return fail_with(launch, errno, "fd %d", fd);
	return 0;
}

int do_apparmor(struct launch *launch, const struct op *op) {
	char text[512];
	int n = snprintf(text, sizeof text, "exec %s", op->a[0].s.data);
	if (n < 0 || (size_t)n >= sizeof text)
		return -ENAMETOOLONG;
	return write_path(launch->proc, "self/attr/exec", text, (size_t)n);
}
