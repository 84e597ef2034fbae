/* Operations in the runtime's own context: files, cgroups, hooks, signals. */
#include <dirent.h>
#include <limits.h>
#include <linux/bpf.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>

#include "launch.h"

#define NS_GET_NSTYPE _IO(0xb7, 0x3)
#define KILL_DEADLINE_MS 10000
#define FREEZE_DEADLINE_MS 10000
#define RMDIR_DEADLINE_MS 5000

static int64_t now_ms(void) {
	return (int64_t)(now_us() / 1000);
}

/* 1 when the fd is ready, 0 when the time is over, or -errno. */
static int poll_until(int fd, int64_t deadline) {
	struct pollfd p = { .fd = fd, .events = POLLIN };
	for (;;) {
		int64_t left = deadline - now_ms();
		int n = poll(&p, 1, left > 0 ? (int)left : 0);
		if (n >= 0 || errno != EINTR)
			return n < 0 ? -errno : n;
	}
}

/* The kernel gives no event for these ends (v1 freezer, an emptied cgroup): look again after a growing pause. */
static int pause_until(int64_t deadline, int *pause_us) {
	struct timespec wait = { 0, *pause_us * 1000L };
	if (now_ms() >= deadline)
		return 0;
	nanosleep(&wait, NULL);
	if (*pause_us < 20000)
		*pause_us *= 2;
	return 1;
}

int write_all(int fd, const void *data, size_t len) {
	const char *at = data;
	while (len) {
		ssize_t n = write(fd, at, len);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		at += n;
		len -= (size_t)n;
	}
	return 0;
}

/* One write to a kernel file: it must not be split. */
int write_path(int dirfd, const char *path, const char *data, size_t len) {
	cleanup_fd fd = openat(dirfd, path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	return write(fd, data, len) < 0 ? -errno : 0;
}

static int read_text(const char *path, char *out, size_t size) {
	cleanup_fd fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n;
	if (fd < 0)
		return -errno;
	n = read(fd, out, size - 1);
	if (n < 0)
		return -errno;
	out[n] = '\0';
	return (int)n;
}

/* The start time, 0 when it is gone; *state is its letter. */
static uint64_t read_stat(pid_t pid, char *state) {
	char path[64], text[1024], *at;
	*state = 'X';
	snprintf(path, sizeof path, "/proc/%d/stat", pid);
	if (read_text(path, text, sizeof text) <= 0)
		return 0;
	at = strrchr(text, ')'); /* the name may hold spaces and brackets */
	if (at && at[1] == ' ')
		*state = at[2];
	for (int field = 2; at && field < 22; field++)
		at = strchr(at + 1, ' ');
	return at ? strtoull(at + 1, NULL, 10) : 0;
}

uint64_t process_start_time(pid_t pid) {
	char state;
	return read_stat(pid, &state);
}

/* Is the process still the one that was recorded, and not a zombie? */
static int process_is(pid_t pid, uint64_t start_time) {
	char state;
	uint64_t now = read_stat(pid, &state);
	return state != 'Z' && state != 'X' && (start_time == 0 || now == start_time);
}

char *render(const struct launch *launch, struct string template, size_t *len) {
	size_t room = template.len + 1, used = 0;
	char *out, number[32];
	for (uint32_t i = 0; i < template.len; i++)
		if (template.data[i] == '\001')
			room += sizeof number;
	out = malloc(room);
	if (!out)
		return NULL;
	for (uint32_t i = 0; i < template.len; i++) {
		if (template.data[i] == '\001' && i + 1 < template.len && template.data[i + 1] == '\001') {
			out[used++] = '\001'; /* doubled: the byte itself */
			i++;
			continue;
		}
		if (template.data[i] == '\001' && i + 1 < template.len) {
			int n = template.data[i + 1] == 'p' ? snprintf(number, sizeof number, "%d", launch->pid)
					: snprintf(number, sizeof number, "%llu", (unsigned long long)launch->start_time);
			memcpy(out + used, number, (size_t)n);
			used += (size_t)n;
			i++;
			continue;
		}
		out[used++] = template.data[i];
	}
	out[used] = '\0';
	*len = used;
	return out;
}

OPERATION(print, write_all((int)op->a[0].i, op->a[1].s.data, op->a[1].s.len))

OPERATION(exit_code, (launch->held_exit = (int)op->a[0].i, 0))

int do_log_file(struct launch *launch, const struct op *op) {
	snprintf(launch->log_path, sizeof launch->log_path, "%s", op->a[0].s.data);
	launch->log_json = (int)op->a[1].i;
	return 0;
}

static int make_parents(const char *path, mode_t mode) {
	char part[PATH_MAX];
	if (strlen(path) >= sizeof part)
		return -ENAMETOOLONG;
	strcpy(part, path);
	for (char *p = part + 1; *p; p++) {
		if (*p != '/')
			continue;
		*p = '\0';
		if (mkdir(part, mode) && errno != EEXIST)
			return -errno;
		*p = '/';
	}
	return 0;
}

int do_mkdir(OPERATION_ARGS) {
	if (mkdir(op->a[0].s.data, (mode_t)op->a[1].i) == 0)
		return 0;
	if (errno == ENOENT && op->a[2].i & 1) {
		int result = make_parents(op->a[0].s.data, 0711);
		if (result)
			return result;
		if (mkdir(op->a[0].s.data, (mode_t)op->a[1].i) == 0)
			return 0;
	}
	return errno == EEXIST && !(op->a[2].i & 2) ? 0 : -errno;
}

int do_write_file(struct launch *launch, const struct op *op) {
	const char *path = op->a[0].s.data;
	char beside[PATH_MAX];
	cleanup_fd fd = -1;
	size_t len;
	char *text;
	int by_rename = op->a[3].i & 1, result;
	if ((size_t)snprintf(beside, sizeof beside, by_rename ? "%s.new" : "%s", path) >= sizeof beside)
		return -ENAMETOOLONG;
	text = render(launch, op->a[1].s, &len);
	if (!text)
		return -ENOMEM;
	fd = open(beside, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | (by_rename ? O_NOFOLLOW : 0), (mode_t)op->a[2].i);
	result = fd < 0 ? -errno : write_all(fd, text, len);
	free(text);
	if (!result && by_rename && rename(beside, path))
		result = -errno;
	if (result && by_rename)
		unlink(beside);
	return result;
}

OPERATION(unlink, unlink(op->a[0].s.data) && errno != ENOENT ? -errno : 0)

int do_remove_dir(OPERATION_ARGS) {
	const char *path = op->a[0].s.data;
	DIR *folder = opendir(path);
	struct dirent *entry;
	if (!folder)
		return errno == ENOENT ? 0 : -errno;
	while ((entry = readdir(folder)))
		if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, ".."))
			unlinkat(dirfd(folder), entry->d_name, 0);
	closedir(folder);
	return rmdir(path) && errno != ENOENT ? -errno : 0;
}

/* The fd goes into the slot, or away when there was an error. */
static int keep_fd(struct launch *launch, int64_t slot, int fd, int result) {
	if (!result)
		return take_slot(launch, slot, fd);
	close(fd);
	return result;
}

int do_lock(struct launch *launch, const struct op *op) {
	int fd = open(op->a[0].s.data, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	struct stat st;
	if (fd < 0)
		return -errno;
	while (flock(fd, LOCK_EX))
		if (errno != EINTR)
			return keep_fd(launch, LOCK_SLOT, fd, -errno);
	if (fstat(fd, &st) || st.st_nlink == 0) {
		close(fd);
		return fail_with(launch, ENOENT, "it was removed by another process meanwhile");
	}
	return take_slot(launch, LOCK_SLOT, fd);
}

int do_open_path(struct launch *launch, const struct op *op) {
	int fd = open(op->a[1].s.data, (int)op->a[2].i | O_CLOEXEC);
	return fd < 0 ? -errno : take_slot(launch, op->a[0].i, fd);
}

/* sun_path holds 108 bytes; a folder's fd makes any path short. */
static int unix_address(const char *path, struct sockaddr_un *address, int *folder) {
	char part[PATH_MAX];
	const char *slash = strrchr(path, '/');
	size_t n = slash ? (size_t)(slash - path) : 0;
	*folder = -1;
	memset(address, 0, sizeof *address);
	address->sun_family = AF_UNIX;
	if (strlen(path) < sizeof address->sun_path) {
		strcpy(address->sun_path, path);
		return 0;
	}
	if (n >= sizeof part || strlen(slash + 1) > 60)
		return -ENAMETOOLONG;
	memcpy(part, path, n);
	part[n] = '\0';
	*folder = open(part, O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (*folder < 0)
		return -errno;
	snprintf(address->sun_path, sizeof address->sun_path, "/proc/self/fd/%d/%s", *folder, slash + 1);
	return 0;
}

static int with_address(int fd, const char *path, int (*call)(int, const struct sockaddr *, socklen_t)) {
	struct sockaddr_un address;
	int folder, result = unix_address(path, &address, &folder);
	if (!result && call(fd, (struct sockaddr *)&address, sizeof address))
		result = -errno;
	close_fd(&folder);
	return result;
}

int connect_unix(int fd, const char *path) {
	return with_address(fd, path, connect);
}

int do_listen(struct launch *launch, const struct op *op) {
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0), result;
	if (fd < 0)
		return -errno;
	result = with_address(fd, op->a[1].s.data, bind);
	if (!result && listen(fd, 1))
		result = -errno;
	return keep_fd(launch, op->a[0].i, fd, result);
}

int do_connect(struct launch *launch, const struct op *op) {
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), result;
	if (fd < 0)
		return -errno;
	result = connect_unix(fd, op->a[1].s.data);
	return keep_fd(launch, op->a[0].i, fd, result);
}

/* By pidfd, after the start time was checked through it: a reused pid is never signalled. */
int do_signal(struct launch *launch, const struct op *op) {
	pid_t pid = (pid_t)op->a[0].i;
	cleanup_fd fd = sys_pidfd_open(pid, 0);
	if (fd < 0 || !process_is(pid, (uint64_t)op->a[1].i))
		return fail_with(launch, ESRCH, "process %d is gone", pid);
	return sys_pidfd_send_signal(fd, (int)op->a[2].i) ? -errno : 0;
}

int do_wait_gone(struct launch *launch, const struct op *op) {
	pid_t pid = (pid_t)op->a[0].i;
	int64_t deadline = now_ms() + op->a[2].i;
	cleanup_fd fd = sys_pidfd_open(pid, 0);
	int n;
	if (fd < 0 || !process_is(pid, (uint64_t)op->a[1].i))
		return 0;
	n = poll_until(fd, deadline);
	return n == 0 ? fail_with(launch, ETIMEDOUT, "process %d did not end", pid) : n < 0 ? n : 0;
}

int do_pidns_init_alive(struct launch *launch, const struct op *op) {
	if (!process_is((pid_t)op->a[0].i, (uint64_t)op->a[1].i))
		return fail_with(launch, ESRCH, "the container's init is gone");
	return 0;
}

OPERATION(hold, (launch->wants_hold = 1, 0))

/* ---- hooks ---- */

static void __attribute__((noreturn)) hook_child(struct launch *launch, const struct op *op, int in, int err) {
	char **argv = list_vector(&op->a[1].l), **env = list_vector(&op->a[2].l);
	int null = open("/dev/null", O_WRONLY | O_CLOEXEC);
	setpgid(0, 0);
	prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0);
	if (dup2(in, 0) < 0 || dup2(null < 0 ? err : null, 1) < 0 || dup2(err, 2) < 0 || !argv || !env)
		_exit(126);
	sys_close_range(3, ~0u, CLOSE_RANGE_CLOEXEC);
	sigprocmask(SIG_SETMASK, &launch->original_mask, NULL);
	execve(op->a[0].s.data, argv, env);
	dprintf(2, "%s", strerror(errno));
	_exit(127);
}

static int hook_outcome(struct launch *launch, int status, int err) {
	char said[160];
	ssize_t n = pread(err, said, sizeof said - 1, 0);
	if (WIFEXITED(status) && WEXITSTATUS(status) == 0)
		return 0;
	said[n > 0 ? n : 0] = '\0';
	said[strcspn(said, "\n")] = '\0';
	if (WIFSIGNALED(status))
		return fail_with(launch, ECANCELED, "killed by signal %d%s%s", WTERMSIG(status), *said ? ": " : "", said);
	return fail_with(launch, ECANCELED, "exit status %d%s%s", WEXITSTATUS(status), *said ? ": " : "", said);
}

int do_hook(struct launch *launch, const struct op *op) {
	cleanup_fd state = memfd_create("state", MFD_CLOEXEC);
	cleanup_fd err = memfd_create("stderr", MFD_CLOEXEC);
	cleanup_fd pidfd = -1;
	int64_t limit = op->a[3].i, deadline = now_ms() + limit;
	size_t len;
	char *text;
	int status = 0, late = 0, result;
	pid_t pid;
	if (state < 0 || err < 0)
		return -errno;
	text = render(launch, op->a[4].s, &len);
	if (!text)
		return -ENOMEM;
	status = write_all(state, text, len);
	free(text);
	if (status)
		return status;
	lseek(state, 0, SEEK_SET);
	pid = fork();
	if (pid < 0)
		return -errno;
	if (pid == 0)
		hook_child(launch, op, state, err);
	setpgid(pid, pid); /* in both, so that the group exists whoever is first */
	pidfd = sys_pidfd_open(pid, 0);
	late = limit && poll_until(pidfd, deadline) == 0;
	if (late)
		kill(-pid, SIGKILL);
	result = wait_for(pid, &status);
	if (result)
		return result;
	kill(-pid, SIGKILL); /* whatever the hook left in its group */
	if (late)
		return fail_with(launch, ETIMEDOUT, "no end after %lld ms; its process group was killed", (long long)limit);
	return hook_outcome(launch, status, err);
}

/* ---- cgroups ---- */

/* A new v1 cpuset has no CPUs and no memory nodes and takes no process until it has. */
static int inherit_cpuset(const char *path) {
	static const char *const files[] = { "cpuset.cpus", "cpuset.mems" };
	const char *slash = strrchr(path, '/');
	for (int i = 0; i < 2; i++) {
		char own[PATH_MAX], above[PATH_MAX], text[4096];
		int n, result;
		snprintf(own, sizeof own, "%s/%s", path, files[i]);
		snprintf(above, sizeof above, "%.*s/%s", (int)(slash - path), path, files[i]);
		n = read_text(own, text, sizeof text);
		if (n < 0)
			return n;
		if (n > 1)
			continue;
		n = read_text(above, text, sizeof text);
		if (n < 0)
			return n;
		result = write_path(AT_FDCWD, own, text, (size_t)n);
		if (result)
			return result;
	}
	return 0;
}

static int has_processes(const char *path) {
	char file[PATH_MAX], text[16];
	snprintf(file, sizeof file, "%s/cgroup.procs", path);
	return read_text(file, text, sizeof text) > 0;
}

static int make_cgroup(char *path, int cpuset, int must_be_new) {
	char *slash = strrchr(path, '/');
	int result = mkdir(path, 0755) ? -errno : 0;
	if (result == -ENOENT && slash && slash != path) {
		*slash = '\0';
		result = make_cgroup(path, cpuset, 0);
		*slash = '/';
		if (result)
			return result;
		result = mkdir(path, 0755) && errno != EEXIST ? -errno : 0;
	} else if (result == -EEXIST) {
		result = must_be_new && has_processes(path) ? -EBUSY : 0;
	}
	return result || !cpuset ? result : inherit_cpuset(path);
}

int do_cg_mkdir(struct launch *launch, const struct op *op) {
	char path[PATH_MAX];
	int fd, result;
	if (op->a[1].s.len + 16 >= sizeof path)
		return -ENAMETOOLONG;
	strcpy(path, op->a[1].s.data);
	result = make_cgroup(path, op->a[2].i & 1, op->a[2].i & 2);
	if (result == -EBUSY)
		return fail_with(launch, EBUSY, "it holds processes already: another container's?");
	if (result)
		return result;
	if (op->a[0].i < 0)
		return 0;
	strcat(path, "/cgroup.procs");
	fd = open(path, O_WRONLY | O_CLOEXEC);
	return fd < 0 ? -errno : take_slot(launch, op->a[0].i, fd);
}

int do_cg_write(OPERATION_ARGS) {
	int result = write_path(AT_FDCWD, op->a[0].s.data, op->a[1].s.data, op->a[1].s.len);
	return result == -ENOENT && op->a[2].i ? 0 : result;
}

/* Sends SIGKILL to all in a folder; 1 when there was any, 0 when empty. cgroup.kill (v2, 5.14) takes one write. */
static int kill_folder(const char *path) {
	char file[PATH_MAX], line[32];
	FILE *procs;
	int any = 0;
	snprintf(file, sizeof file, "%s/cgroup.procs", path);
	procs = fopen(file, "re");
	if (!procs)
		return 0;
	while (fgets(line, sizeof line, procs)) {
		pid_t pid = (pid_t)strtol(line, NULL, 10);
		if (pid > 0 && pid != getpid()) {
			any = 1;
			kill(pid, SIGKILL);
		}
	}
	fclose(procs);
	if (any) {
		snprintf(file, sizeof file, "%s/cgroup.kill", path);
		write_path(AT_FDCWD, file, "1", 1);
		/* A frozen v1 task does not see the signal before it is thawed. */
		snprintf(file, sizeof file, "%s/freezer.state", path);
		write_path(AT_FDCWD, file, "THAWED", 6);
	}
	return any;
}

int do_cg_kill(struct launch *launch, const struct op *op) {
	int64_t deadline = now_ms() + KILL_DEADLINE_MS;
	int pause_us = 200;
	for (;;) {
		const char *cursor = op->a[0].l.encoded;
		int any = 0;
		for (uint32_t i = 0; i < op->a[0].l.count; i++)
			any |= kill_folder(list_next(&cursor).data);
		if (!any)
			return 0;
		if (!pause_until(deadline, &pause_us))
			return fail_with(launch, ETIMEDOUT, "processes that do not die remain in the cgroup");
	}
}

static int remove_cgroup(const char *path, int64_t deadline) {
	char below[PATH_MAX];
	struct dirent *entry;
	int pause_us = 200;
	DIR *folder;
	if (rmdir(path) == 0 || errno == ENOENT)
		return 0;
	folder = opendir(path);
	while (folder && (entry = readdir(folder))) {
		if (entry->d_type != DT_DIR || entry->d_name[0] == '.')
			continue;
		if ((size_t)snprintf(below, sizeof below, "%s/%s", path, entry->d_name) < sizeof below)
			remove_cgroup(below, deadline);
	}
	if (folder)
		closedir(folder);
	for (;;) {
		if (rmdir(path) == 0 || errno == ENOENT)
			return 0;
		if (errno != EBUSY || !pause_until(deadline, &pause_us))
			return -errno;
	}
}

OPERATION(cg_rmdir, remove_cgroup(op->a[0].s.data, now_ms() + RMDIR_DEADLINE_MS))

int do_cg_frozen(struct launch *launch, const struct op *op) {
	const char *path = op->a[0].s.data, *want = op->a[1].i ? "FROZEN" : "THAWED";
	int64_t deadline = now_ms() + FREEZE_DEADLINE_MS;
	int pause_us = 100;
	for (;;) {
		char text[64];
		int result = write_path(AT_FDCWD, path, want, strlen(want));
		if (result)
			return result;
		result = read_text(path, text, sizeof text);
		if (result < 0)
			return result;
		if (!strncmp(text, want, 6))
			return 0;
		if (!pause_until(deadline, &pause_us))
			return fail_with(launch, ETIMEDOUT, "still %.8s", text);
	}
}

int do_cg_bpf_devices(struct launch *launch, const struct op *op) {
	cleanup_fd folder = open(op->a[0].s.data, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	cleanup_fd program = -1;
	union bpf_attr attr;
	void *aligned;
	if (folder < 0)
		return -errno;
	aligned = malloc(op->a[1].s.len + 1);
	if (!aligned)
		return -ENOMEM;
	memcpy(aligned, op->a[1].s.data, op->a[1].s.len);
	memset(&attr, 0, sizeof attr);
	attr.prog_type = BPF_PROG_TYPE_CGROUP_DEVICE;
	attr.insn_cnt = op->a[1].s.len / 8;
	attr.insns = (uint64_t)(uintptr_t)aligned;
	attr.license = (uint64_t)(uintptr_t)"Apache-2.0";
	program = (int)syscall(SYS_bpf, BPF_PROG_LOAD, &attr, sizeof attr);
	free(aligned);
	if (program < 0)
		return fail_with(launch, errno, "BPF_PROG_LOAD");
	memset(&attr, 0, sizeof attr);
	attr.target_fd = (uint32_t)folder;
	attr.attach_bpf_fd = (uint32_t)program;
	attr.attach_type = BPF_CGROUP_DEVICE;
	attr.attach_flags = BPF_F_ALLOW_MULTI;
	return syscall(SYS_bpf, BPF_PROG_ATTACH, &attr, sizeof attr) ? fail_with(launch, errno, "BPF_PROG_ATTACH") : 0;
}

/* ---- what the parent does to the child ---- */

int do_ns_open(struct launch *launch, const struct op *op) {
	int fd = open(op->a[1].s.data, O_RDONLY | O_CLOEXEC), type;
	if (fd < 0)
		return -errno;
	type = ioctl(fd, NS_GET_NSTYPE);
	if (type < 0 || (op->a[2].i && type != (int)op->a[2].i)) {
		close(fd);
		return fail_with(launch, EINVAL, type < 0 ? "not a namespace" : "a namespace of another type");
	}
	return take_slot(launch, op->a[0].i, fd);
}

static int child_file(struct launch *launch, const char *name, const char *data, size_t len) {
	char path[PATH_MAX];
	snprintf(path, sizeof path, "%d/%s", launch->pid, name);
	return write_path(launch->proc, path, data, len);
}

OPERATION(uid_map, child_file(launch, "uid_map", op->a[0].s.data, op->a[0].s.len))

int do_gid_map(struct launch *launch, const struct op *op) {
	if (op->a[1].i) {
		int result = child_file(launch, "setgroups", "deny", 4);
		if (result)
			return result;
	}
	return child_file(launch, "gid_map", op->a[0].s.data, op->a[0].s.len);
}

OPERATION(proc_write, child_file(launch, op->a[0].s.data, op->a[1].s.data, op->a[1].s.len))
