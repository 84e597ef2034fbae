/* Operations in the runtime's own context: files, cgroups, hooks, signals. */
#include <linux/bpf.h>
#include <linux/nsfs.h>
#include <sys/file.h>
#include <sys/sendfile.h>
#include <sys/signalfd.h>
#include <sys/un.h>

#include "fields.h"

#define KILL_DEADLINE_MS 10000
#define FREEZE_DEADLINE_MS 10000
#define RMDIR_DEADLINE_MS 5000

static int64_t now_ms(void) { return clock_ns(CLOCK_MONOTONIC) / 1000000; }

/* 1 when the fd is ready, 0 when the time is over, or -errno. */
static int poll_until(int fd, int64_t deadline) {
	struct pollfd p = { .fd = fd, .events = POLLIN };
	int64_t left = deadline - now_ms();
	return or_errno(RETRY(poll(&p, 1, left > 0 ? (int)left : 0)));
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
	for (const char *at = data; len;) {
		int n = TRY(or_errno(RETRY(write(fd, at, len))));
		at += n;
		len -= (size_t)n;
	}
	return 0;
}

int copy_all(int from, int to) {
	while (TRY(or_errno(sendfile(to, from, NULL, 1 << 30))) > 0)
		continue;
	return 0;
}

/* One write to a kernel file: it must not be split. */
int write_path(int dirfd, const char *path, const char *data, size_t len) {
	cleanup_fd fd = TRY(or_errno(openat(dirfd, path, O_WRONLY | O_CLOEXEC)));
	TRY(or_errno(write(fd, data, len)));
	return 0;
}

int read_text(const char *path, char *out, size_t size) {
	cleanup_fd fd = TRY(or_errno(open(path, O_RDONLY | O_CLOEXEC)));
	int n = TRY(or_errno(read(fd, out, size - 1)));
	out[n] = '\0';
	return n;
}

/* 0 when it is gone or a zombie. */
uint64_t process_start_time(pid_t pid) {
	char path[64], text[1024];
	snprintf(path, sizeof path, "/proc/%d/stat", pid);
	if (read_text(path, text, sizeof text) <= 0)
		return 0;
	char *at = strrchr(text, ')'); /* the name may hold spaces and brackets */
	if (!at || at[1] != ' ' || at[2] == 'Z' || at[2] == 'X')
		return 0;
	for (int field = 2; at && field < 22; field++)
		at = strchr(at + 1, ' ');
	return at ? strtoull(at + 1, NULL, 10) : 0;
}

int render(const struct launch *launch, struct string template, struct buffer *out) {
	for (const char *at = template.data; at < template.data + template.len; at++) {
		if (at[0] != '\001' || (at[1] != 'p' && at[1] != 's')) {
			put_bytes(out, at, 1);
			at += at[0] == '\001';
			continue;
		}
		char number[32];
		uint64_t value = *++at == 'p' ? (uint64_t)launch->pid : launch->start_time;
		put_bytes(out, number, (size_t)snprintf(number, sizeof number, "%llu", (unsigned long long)value));
	}
	return out->failed ? -ENOMEM : 0;
}

OPERATION(print, write_all((int)op->a[0].i, op->a[1].s.data, op->a[1].s.len))

OPERATION(exit_code, (launch->held_exit = (int)op->a[0].i, 0))

OPERATION(log_file, (launch->log_path = op->a[0].s.data, launch->log_json = (int)op->a[1].i, 0))

/* Makes the folder, and those above it that are missing when these have a mode; `begin` is done to each. -EEXIST when it
 * was there. */
static int make_folder(char *path, mode_t mode, mode_t above, int (*begin)(const char *path)) {
	int result = or_errno(mkdir(path, mode));
	char *slash = strrchr(path, '/');
	if (result == -ENOENT && above && slash && slash != path) {
		*slash = '\0';
		int parent = make_folder(path, above, above, begin);
		*slash = '/';
		result = parent && parent != -EEXIST ? parent : or_errno(mkdir(path, mode));
	}
	if (begin && (!result || result == -EEXIST))
		TRY(begin(path));
	return result;
}

int do_mkdir(OPERATION_ARGS) {
	char path[PATH_MAX];
	TRY(format_path(path, "%s", op->a[0].s.data));
	int result = make_folder(path, (mode_t)op->a[1].i, op->a[2].i & 1 ? 0711 : 0, NULL);
	return result == -EEXIST && !(op->a[2].i & 2) ? 0 : result;
}

int replace_file(const char *path, const char *fresh, mode_t mode, const void *data, size_t len) {
	cleanup_fd fd = TRY(or_errno(open(fresh, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, mode)));
	int result = write_all(fd, data, len);
	if (!result)
		result = or_errno(rename(fresh, path));
	if (result)
		unlink(fresh);
	return result;
}

int do_write_file(struct launch *launch, const struct op *op) {
	const char *path = op->a[0].s.data;
	char fresh[PATH_MAX];
	TRY(format_path(fresh, "%s.new", path));
	cleanup_buffer text = { 0 };
	TRY(render(launch, op->a[1].s, &text));
	if (op->a[3].i & 1)
		return replace_file(path, fresh, (mode_t)op->a[2].i, text.data, text.used);
	cleanup_fd fd = TRY(or_errno(open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, (mode_t)op->a[2].i)));
	return write_all(fd, text.data, text.used);
}

OPERATION(unlink, unlink(op->a[0].s.data) && errno != ENOENT ? -errno : 0)

int do_remove_dir(OPERATION_ARGS) {
	const char *path = op->a[0].s.data;
	cleanup_dir folder = opendir(path);
	if (!folder)
		return errno == ENOENT ? 0 : -errno;
	for (struct dirent *entry; (entry = next_entry(folder));)
		unlinkat(dirfd(folder), entry->d_name, 0);
	return rmdir(path) && errno != ENOENT ? -errno : 0;
}

int do_lock(struct launch *launch, const struct op *op) {
	cleanup_fd fd = TRY(or_errno(open(op->a[0].s.data, O_RDONLY | O_DIRECTORY | O_CLOEXEC)));
	TRY(or_errno(RETRY(flock(fd, LOCK_EX))));
	struct stat st;
	if (fstat(fd, &st) || st.st_nlink == 0)
		return fail_with(launch, ENOENT, "it was removed by another process meanwhile");
	return take_slot(launch, LOCK_SLOT, keep(&fd));
}

OPERATION(open_path, take_slot(launch, op->a[0].i, or_errno(open(op->a[1].s.data, (int)op->a[2].i | O_CLOEXEC))))

/* A socket after bind or connect. sun_path holds 108 bytes; a folder's fd makes any path short. */
static int unix_socket(int type, const char *path, int (*call)(int, const struct sockaddr *, socklen_t)) {
	cleanup_fd fd = TRY(or_errno(socket(AF_UNIX, type | SOCK_CLOEXEC, 0))), folder = -1;
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	if (strlen(path) < sizeof address.sun_path) {
		strcpy(address.sun_path, path);
	} else {
		char part[PATH_MAX];
		const char *slash = strrchr(path, '/');
		if (!slash || strlen(slash) > 61)
			return -ENAMETOOLONG;
		TRY(format_path(part, "%.*s", (int)(slash - path), path));
		folder = TRY(or_errno(open(part, O_PATH | O_DIRECTORY | O_CLOEXEC)));
		snprintf(address.sun_path, sizeof address.sun_path, "/proc/self/fd/%d%s", folder, slash);
	}
	TRY(or_errno(call(fd, (struct sockaddr *)&address, sizeof address)));
	return keep(&fd);
}

int connect_unix(int type, const char *path) { return unix_socket(type, path, connect); }

int listen_unix(int type, const char *path, int waiting) {
	cleanup_fd fd = TRY(unix_socket(type, path, bind));
	TRY(or_errno(listen(fd, waiting)));
	return keep(&fd);
}

OPERATION(connect, take_slot(launch, op->a[0].i, connect_unix(SOCK_STREAM, op->a[1].s.data)))

OPERATION(listen, take_slot(launch, op->a[0].i, listen_unix(SOCK_SEQPACKET, op->a[1].s.data, 1)))

/* A pidfd of the process that was recorded; its start time is checked through it: a reused pid is never signalled. */
static int open_process(const struct op *op) {
	pid_t pid = (pid_t)op->a[0].i;
	cleanup_fd fd = TRY(sys_pidfd_open(pid, 0));
	uint64_t now = process_start_time(pid), then = (uint64_t)op->a[1].i;
	return now && (!then || now == then) ? keep(&fd) : -ESRCH;
}

int do_signal(struct launch *launch, const struct op *op) {
	cleanup_fd fd = open_process(op);
	if (fd < 0)
		return fail_with(launch, ESRCH, "process %lld is gone", (long long)op->a[0].i);
	return sys_pidfd_send_signal(fd, (int)op->a[2].i);
}

int do_wait_gone(struct launch *launch, const struct op *op) {
	cleanup_fd fd = open_process(op);
	int ready = fd < 0 ? 1 : poll_until(fd, now_ms() + op->a[2].i);
	return ready ? ready : fail_with(launch, ETIMEDOUT, "process %lld did not end", (long long)op->a[0].i);
}

OPERATION(close, slot_fd(launch, op->a[0].i) < 0 ? -EBADF : (close_fd(&launch->slot[op->a[0].i]), 0))
OPERATION(hold, (launch->wants_hold = 1, 0))
OPERATION(again, 0) /* the front looks for it */

/* ---- hooks ---- */

int all_signals(void) {
	sigset_t set;
	sigfillset(&set);
	return signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
}

int pass_signal(int signals, int pidfd, int kept) {
	struct signalfd_siginfo info;
	if (read(signals, &info, sizeof info) != sizeof info || info.ssi_signo == SIGCHLD)
		return 0;
	return (int)info.ssi_signo == kept ? kept : (sys_pidfd_send_signal(pidfd, (int)info.ssi_signo), 0);
}

static void __attribute__((noreturn)) hook_child(struct launch *launch, const struct op *op, int in, int err) {
	int null = open("/dev/null", O_WRONLY | O_CLOEXEC);
	setpgid(0, 0);
	prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0);
	if (op->a[3].i < 0)
		sigfillset(&launch->original_mask); /* what comes before it looks waits */
	if (dup2(in, 0) < 0 || dup2(null < 0 ? err : null, 1) < 0 || dup2(err, 2) < 0)
		_exit(126);
	int result = exec_program(launch, op->a[0].s.data, &op->a[1].l, &op->a[2].l, 3);
	dprintf(2, "%s", strerror(-result));
	_exit(127);
}

static int hook_outcome(struct launch *launch, int status, int err) {
	char said[160] = "";
	if (pread(err, said, sizeof said - 1, 0) >= 0 && WIFEXITED(status) && WEXITSTATUS(status) == 0)
		return 0;
	said[strcspn(said, "\n")] = '\0';
	return fail_with(launch, ECANCELED, "%s %d%s%s", WIFSIGNALED(status) ? "killed by signal" : "exit status",
			 WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status), *said ? ": " : "", said);
}

int do_hook(struct launch *launch, const struct op *op) {
	int64_t limit = op->a[3].i, deadline = now_ms() + limit;
	cleanup_fd state = memfd_create("state", MFD_CLOEXEC), err = memfd_create("stderr", MFD_CLOEXEC);
	if (state < 0 || err < 0)
		return -errno;
	cleanup_buffer text = { 0 };
	TRY(render(launch, op->a[4].s, &text));
	TRY(write_all(state, text.data, text.used));
	lseek(state, 0, SEEK_SET);
	pid_t pid = TRY(or_errno(fork()));
	if (pid == 0)
		hook_child(launch, op, state, err);
	setpgid(pid, pid); /* in both, so that the group exists whoever is first */
	cleanup_fd pidfd = sys_pidfd_open(pid, 0);
	cleanup_fd signals = limit < 0 && pidfd >= 0 ? all_signals() : -1; /* below 0: it is in the foreground */
	struct pollfd p[2] = { { .fd = pidfd, .events = POLLIN }, { .fd = signals, .events = POLLIN } };
	while (signals >= 0 && RETRY(poll(p, 2, -1)) > 0 && !p[0].revents)
		pass_signal(signals, pidfd, 0);
	int late = limit > 0 && poll_until(pidfd, deadline) == 0, status;
	if (late)
		kill(-pid, SIGKILL);
	TRY(wait_for(pid, &status));
	kill(-pid, SIGKILL); /* whatever the hook left in its group */
	if (late)
		return fail_with(launch, ETIMEDOUT, "no end after %lld ms; its process group was killed", (long long)limit);
	return hook_outcome(launch, status, err);
}

/* ---- cgroups ---- */

/* A new v1 cpuset has no CPUs and no memory nodes and takes no process until it has. */
static int inherit_cpuset(const char *path) {
	static const char *const files[] = { "cpuset.cpus", "cpuset.mems" };
	for (int i = 0; i < 2; i++) {
		char own[PATH_MAX], above[PATH_MAX], text[4096];
		TRY(format_path(own, "%s/%s", path, files[i]));
		TRY(format_path(above, "%s/../%s", path, files[i]));
		int n = TRY(read_text(own, text, sizeof text));
		if (n > 1)
			continue;
		n = TRY(read_text(above, text, sizeof text));
		TRY(write_path(AT_FDCWD, own, text, (size_t)n));
	}
	return 0;
}

static int has_processes(const char *path) {
	char file[PATH_MAX], text[64];
	if (!format_path(file, "%s/cgroup.events", path) && read_text(file, text, sizeof text) > 0)
		return strstr(text, "populated 1") != NULL; /* v2: there or below */
	return !format_path(file, "%s/cgroup.procs", path) && read_text(file, text, sizeof text) > 0;
}

int do_cg_mkdir(struct launch *launch, const struct op *op) {
	char path[PATH_MAX];
	TRY(format_path(path, "%s", op->a[1].s.data));
	int result = make_folder(path, 0755, 0755, op->a[2].i & 1 ? inherit_cpuset : NULL);
	if (result == -EEXIST && op->a[2].i & 2 && has_processes(path))
		return fail_with(launch, EBUSY, "it holds processes already: another container's?");
	if (result != -EEXIST)
		TRY(result);
	if (op->a[0].i < 0)
		return 0;
	static const char *const files[] = { "cgroup.procs", "tasks", "." };
	int file = (int)op->a[3].i % 3;
	TRY(format_path(path, "%s/%s", op->a[1].s.data, files[file]));
	return take_slot(launch, op->a[0].i, or_errno(open(path, (file == 2 ? O_RDONLY : O_WRONLY) | O_CLOEXEC)));
}

OPERATION(cg_clone, (launch->birth = (int)op->a[0].i, 0))

OPERATION(cg_write, write_path(AT_FDCWD, op->a[0].s.data, op->a[1].s.data, op->a[1].s.len))

/* Sends SIGKILL to all in a folder; 1 when there was any, 0 when empty. cgroup.kill (v2, 5.14) reaches the groups below. */
static int kill_folder(const char *path) {
	char file[PATH_MAX], line[32];
	int any = 0;
	if (!format_path(file, "%s/cgroup.kill", path) && write_path(AT_FDCWD, file, "1", 1) == 0)
		return has_processes(path);
	FILE *procs = format_path(file, "%s/cgroup.procs", path) ? NULL : fopen(file, "re");
	while (procs && fgets(line, sizeof line, procs)) {
		pid_t pid = (pid_t)strtol(line, NULL, 10);
		if (pid > 0 && pid != getpid()) {
			any = 1;
			kill(pid, SIGKILL);
		}
	}
	if (procs)
		fclose(procs);
	if (any) { /* a frozen v1 task does not see the signal before it is thawed */
		snprintf(file, sizeof file, "%s/freezer.state", path);
		write_path(AT_FDCWD, file, "THAWED", 6);
	}
	return any;
}

int do_cg_kill(struct launch *launch, const struct op *op) {
	int64_t deadline = now_ms() + KILL_DEADLINE_MS;
	for (int pause_us = 200;;) {
		struct list folders = op->a[0].l;
		int any = 0;
		for (struct string folder; list_take(&folders, &folder);)
			any |= kill_folder(folder.data);
		if (!any)
			return 0;
		if (!pause_until(deadline, &pause_us))
			return fail_with(launch, ETIMEDOUT, "processes that do not die remain in the cgroup");
	}
}

static int remove_cgroup(const char *path, int64_t deadline) {
	if (rmdir(path) == 0 || errno == ENOENT)
		return 0;
	cleanup_dir folder = opendir(path);
	for (struct dirent *entry; folder && (entry = next_entry(folder));) {
		char below[PATH_MAX];
		if (entry->d_type == DT_DIR && !format_path(below, "%s/%s", path, entry->d_name))
			remove_cgroup(below, deadline);
	}
	for (int pause_us = 200; rmdir(path) && errno != ENOENT;)
		if (errno != EBUSY || !pause_until(deadline, &pause_us))
			return -errno;
	return 0;
}

OPERATION(cg_rmdir, remove_cgroup(op->a[0].s.data, now_ms() + RMDIR_DEADLINE_MS))

int do_cg_frozen(struct launch *launch, const struct op *op) {
	const char *path = op->a[0].s.data, *want = op->a[1].i ? "FROZEN" : "THAWED";
	int64_t deadline = now_ms() + FREEZE_DEADLINE_MS;
	for (int pause_us = 100;;) {
		char text[64];
		TRY(write_path(AT_FDCWD, path, want, strlen(want)));
		TRY(read_text(path, text, sizeof text));
		if (!strncmp(text, want, 6))
			return 0;
		if (!pause_until(deadline, &pause_us))
			return fail_with(launch, ETIMEDOUT, "still %.8s", text);
	}
}

int do_cg_bpf_devices(struct launch *launch, const struct op *op) {
	cleanup_fd folder = TRY(or_errno(open(op->a[0].s.data, O_RDONLY | O_DIRECTORY | O_CLOEXEC)));
	/* The heads of union bpf_attr, as each command reads it: what is not sent counts as zeros. */
	struct { uint32_t type, count; uint64_t code, license; } load = { BPF_PROG_TYPE_CGROUP_DEVICE, op->a[1].s.len / 8,
		(uintptr_t)op->a[1].s.data, (uintptr_t)"Apache-2.0" }; /* the kernel copies the code: no alignment is needed */
	cleanup_fd program = TRY_SAYING(or_errno(syscall(SYS_bpf, BPF_PROG_LOAD, &load, sizeof load)), "BPF_PROG_LOAD");
	/* A program that the group has is replaced (5.6): beside it, an update could only deny more. */
	uint32_t id = 0, at = (uint32_t)folder;
	struct { uint32_t at, type, none[2]; uint64_t ids; uint32_t count, later[13]; } query = { at, BPF_CGROUP_DEVICE,
		.ids = (uintptr_t)&id, .count = 1 };
	int one = syscall(SYS_bpf, BPF_PROG_QUERY, &query, sizeof query) == 0 && query.count == 1;
	cleanup_fd old = one ? TRY_SAYING(or_errno(syscall(SYS_bpf, BPF_PROG_GET_FD_BY_ID, &id, sizeof id)), "program %u", id) : -1;
	uint32_t how = BPF_F_ALLOW_MULTI | (one ? BPF_F_REPLACE : 0), attach[] = { at, (uint32_t)program, query.type, how, (uint32_t)old };
	return TRY_SAYING(or_errno(syscall(SYS_bpf, BPF_PROG_ATTACH, attach, sizeof attach)), "BPF_PROG_ATTACH");
}

/* ---- what the parent does to the child ---- */

int do_ns_open(struct launch *launch, const struct op *op) {
	cleanup_fd fd = TRY(or_errno(open(op->a[1].s.data, O_RDONLY | O_CLOEXEC)));
	int type = ioctl(fd, NS_GET_NSTYPE);
	if (type < 0 || (op->a[2].i && type != (int)op->a[2].i))
		return fail_with(launch, EINVAL, type < 0 ? "not a namespace" : "a namespace of another type");
	return take_slot(launch, op->a[0].i, keep(&fd));
}

int do_proc_write(struct launch *launch, const struct op *op) {
	char path[PATH_MAX];
	TRY(format_path(path, "%d/%s", launch->pid, op->a[0].s.data));
	return write_path(launch->proc, path, op->a[1].s.data, op->a[1].s.len);
}
