#include "launch.h"

#include <limits.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>

/* Messages between parent and child, typed and named by their sender. One SOCK_SEQPACKET record each. */
enum message_type {
	PARENT_GO = 1,      /* go on to the next stage; carries init's pid and start time */
	JOINER_PID = 2,     /* the pid of the child that the joiner cloned */
	CHILD_READY = 3,    /* unshared; the parent may write maps and offsets */
	CHILD_BARRIER = 4,  /* mounts are made; the parent may run its hooks */
	CHILD_CREATED = 5,  /* all but the wait for start and exec */
	CHILD_FAILED = 6,   /* operation, errno, text */
	CHILD_CONSOLE = 7,  /* the pty's master as SCM_RIGHTS */
	CHILD_TIMES = 8,    /* followed by one u32 per operation, microseconds */
};

struct message {
	uint32_t type, op;
	int32_t number, pid;
	uint64_t start_time;
	char text[512];
};

static op_function *const functions[256] = {
#define OP(code, name, signature) [code] = do_##name,
#include "ops.def"
#undef OP
};

const char *errno_name(int number) {
#define NAME(name) case name: return #name;
	switch (number) {
	NAME(EPERM) NAME(ENOENT) NAME(ESRCH) NAME(EINTR) NAME(EIO) NAME(ENXIO) NAME(E2BIG) NAME(ENOEXEC) NAME(EBADF)
	NAME(EAGAIN) NAME(ENOMEM) NAME(EACCES) NAME(EFAULT) NAME(ENOTBLK) NAME(EBUSY) NAME(EEXIST) NAME(EXDEV)
	NAME(ENODEV) NAME(ENOTDIR) NAME(EISDIR) NAME(EINVAL) NAME(ENFILE) NAME(EMFILE) NAME(ENOTTY) NAME(ETXTBSY)
	NAME(EFBIG) NAME(ENOSPC) NAME(EROFS) NAME(EMLINK) NAME(EPIPE) NAME(ERANGE) NAME(ENAMETOOLONG) NAME(ENOSYS)
	NAME(ENOTEMPTY) NAME(ELOOP) NAME(EOPNOTSUPP) NAME(ECONNREFUSED) NAME(ETIMEDOUT) NAME(EOVERFLOW) NAME(EUSERS)
	NAME(EDQUOT) NAME(ESTALE) NAME(EADDRINUSE) NAME(ECANCELED) NAME(EPROTO) NAME(ENODATA)
	default: return "errno";
	}
#undef NAME
}

/* The probable cause of an errno, where one is likely enough to be worth saying. */
static const char *hint(uint16_t code, int number) {
	static const struct {
		uint16_t code;
		int number;
		const char *text;
	} hints[] = {
		{ OP_mount_fs, EPERM, "probable cause: the user namespace does not own the namespace this file system "
		  "shows, or a mount below is locked" },
		{ OP_mount_fs, ENODEV, "the kernel does not know this file system type" },
		{ OP_mount_fs, EBUSY, "probable cause: the file system is mounted elsewhere with other options" },
		{ OP_rlimit, EPERM, "probable cause: above the hard limit without CAP_SYS_RESOURCE" },
		{ OP_proc_write, EACCES, "probable cause: lowering it needs CAP_SYS_RESOURCE" },
		{ OP_cg_write, EINVAL, "the kernel refused this value" },
		{ OP_clone, EPERM, "probable cause: namespaces need CAP_SYS_ADMIN, or user namespaces are switched off" },
		{ OP_clone, ENOSPC, "probable cause: /proc/sys/user/max_*_namespaces" },
		{ OP_clone, EAGAIN, "probable cause: pids.max or RLIMIT_NPROC" },
		{ OP_mknod, EPERM, "probable cause: CAP_MKNOD is missing in the initial user namespace" },
	};
	for (size_t i = 0; i < sizeof hints / sizeof hints[0]; i++)
		if (hints[i].code == code && hints[i].number == number)
			return hints[i].text;
	return NULL;
}

void set_failure(struct launch *launch, uint32_t op, int number, const char *format, ...) {
	va_list args;
	if (launch->failure.set)
		return;
	launch->failure.set = 1;
	launch->failure.op = op;
	launch->failure.number = number;
	va_start(args, format);
	vsnprintf(launch->failure.text, sizeof launch->failure.text, format, args);
	va_end(args);
}

int fail_with(struct launch *launch, int number, const char *format, ...) {
	va_list args;
	va_start(args, format);
	vsnprintf(launch->detail_text, sizeof launch->detail_text, format, args);
	va_end(args);
	launch->detail = launch->detail_text;
	return -number;
}

/* An operation failed: "label: ENAME: text (detail or hint)". */
static void blame(struct launch *launch, uint32_t index, int number) {
	const struct op *op = &launch->plan->ops[index];
	const char *more = launch->detail ? launch->detail : hint(op->code, number);
	int whole = op->code == OP_find_executable && launch->detail != NULL;
	if (number == 0 || whole) /* the detail says all */
		set_failure(launch, index, number, "%s%s%s", whole ? "" : op->label, whole ? "" : ": ", more ? more : "failed");
	else
		set_failure(launch, index, number, "%s: %s: %s%s%s%s", op->label, errno_name(number), strerror(number),
			    more ? " (" : "", more ? more : "", more ? ")" : "");
}

int take_slot(struct launch *launch, int64_t slot, int fd) {
	if (slot < 0 || slot >= PLAN_SLOTS) {
		close(fd);
		return fail_with(launch, EBADF, "slot %lld is out of range", (long long)slot);
	}
	close_fd(&launch->slot[slot]);
	launch->slot[slot] = fd;
	return 0;
}

int slot_fd(const struct launch *launch, int64_t slot) {
	return slot < 0 || slot >= PLAN_SLOTS ? -1 : launch->slot[slot];
}

uint64_t now_us(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000u + (uint64_t)t.tv_nsec / 1000u;
}

static int run_op(struct launch *launch, uint32_t index) {
	const struct op *op = &launch->plan->ops[index];
	uint64_t before = now_us();
	int result;
	launch->detail = NULL;
	result = functions[op->code](launch, op);
	launch->microseconds[index] = (uint32_t)(now_us() - before) + 1;
	if (result < 0 && !(op->flags & OP_OPTIONAL)) {
		blame(launch, index, -result);
		return -1;
	}
	return 0;
}

/* keep_going: clean-up stages do all they can and report the first failure. */
int run_stage(struct launch *launch, enum stage stage, int keep_going) {
	int bad = 0;
	for (uint32_t i = 0; i < launch->plan->count; i++) {
		const struct op *op = &launch->plan->ops[i];
		if (op->stage != stage || op->code == OP_ns_join)
			continue;
		if (run_op(launch, i)) {
			bad = -1;
			if (!keep_going)
				return -1;
		}
	}
	return bad;
}

static int has_stage(const struct plan *plan, enum stage stage) {
	for (uint32_t i = 0; i < plan->count; i++)
		if (plan->ops[i].stage == stage)
			return 1;
	return 0;
}

const struct op *find_op(const struct plan *plan, uint16_t code) {
	for (uint32_t i = 0; i < plan->count; i++)
		if (plan->ops[i].code == code)
			return &plan->ops[i];
	return NULL;
}

int launch_init(struct launch *launch, const struct plan *plan) {
	memset(launch, 0, sizeof *launch);
	launch->plan = plan;
	for (int i = 0; i < PLAN_SLOTS; i++)
		launch->slot[i] = -1;
	launch->pidfd = launch->sync = launch->root = launch->console = -1;
	launch->microseconds = calloc(plan->count + 1, sizeof *launch->microseconds);
	launch->proc = open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC);
	sigprocmask(SIG_SETMASK, NULL, &launch->original_mask);
	if (!launch->microseconds || launch->proc < 0) {
		set_failure(launch, UINT32_MAX, errno, "open /proc: %s", strerror(errno));
		launch_end(launch);
		return -1;
	}
	return 0;
}

void launch_end(struct launch *launch) {
	for (int i = 0; i < PLAN_SLOTS; i++)
		close_fd(&launch->slot[i]);
	int *const fds[] = { &launch->pidfd, &launch->sync, &launch->root, &launch->proc, &launch->console };
	for (size_t i = 0; i < sizeof fds / sizeof fds[0]; i++)
		close_fd(fds[i]);
	free(launch->microseconds);
	free(launch->program);
	free(launch->home);
	launch->microseconds = NULL;
	launch->program = launch->home = NULL;
}

/* One record, with an fd when pass is one. 0 or -errno. */
static int send_record(int socket, const void *data, size_t size, int pass) {
	struct iovec iov = { (void *)data, size };
	union {
		char space[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control = { { 0 } };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };
	ssize_t n;
	if (pass >= 0) {
		msg.msg_control = control.space;
		msg.msg_controllen = sizeof control.space;
		struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(c), &pass, sizeof(int));
	}
	do
		n = sendmsg(socket, &msg, MSG_NOSIGNAL);
	while (n < 0 && errno == EINTR);
	return n < 0 ? -errno : 0;
}

static int send_times(struct launch *launch) {
	uint32_t type = CHILD_TIMES;
	struct iovec iov[2] = { { &type, sizeof type },
				{ launch->microseconds, launch->plan->count * sizeof(uint32_t) } };
	struct msghdr msg = { .msg_iov = iov, .msg_iovlen = 2 };
	return sendmsg(launch->sync, &msg, MSG_NOSIGNAL) < 0 ? -1 : 0;
}

/* The console-socket protocol of runc: one record with the name of the pty's master, the fd as SCM_RIGHTS. */
int send_console(int socket, int fd) {
	return send_record(socket, "/dev/pts/ptmx", sizeof "/dev/pts/ptmx", fd);
}

/* The child's pty goes to the parent of this launch. */
int send_console_message(struct launch *launch, int fd) {
	struct message m = { .type = CHILD_CONSOLE };
	return send_record(launch->sync, &m, sizeof m, fd);
}

static void simple_message(struct launch *launch, uint32_t type) {
	struct message m = { .type = type, .pid = launch->pid, .start_time = launch->start_time };
	send_record(launch->sync, &m, sizeof m, -1);
}

/* Receives one message; times and the console are taken in on the way. 0 at end of file, -1 on error. */
static int receive(struct launch *launch, struct message *m) {
	size_t room = sizeof *m + launch->plan->count * sizeof(uint32_t) + 8;
	__attribute__((cleanup(close_fd))) int passed = -1;
	char *buffer = malloc(room);
	int result = -1;
	if (!buffer)
		return -1;
	for (;;) {
		struct iovec iov = { buffer, room };
		union {
			char space[CMSG_SPACE(sizeof(int))];
			struct cmsghdr align;
		} control;
		struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.space,
				      .msg_controllen = sizeof control.space };
		ssize_t n = recvmsg(launch->sync, &msg, MSG_CMSG_CLOEXEC);
		struct cmsghdr *c;
		uint32_t type;

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0) {
			result = n < 0 && errno != ECONNRESET ? -1 : 0;
			break;
		}
		c = CMSG_FIRSTHDR(&msg);
		if (c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
			close_fd(&passed);
			memcpy(&passed, CMSG_DATA(c), sizeof(int));
		}
		if (n < 4)
			continue;
		memcpy(&type, buffer, sizeof type);
		if (type == CHILD_TIMES) {
			for (uint32_t i = 0; i < launch->plan->count && 4 + (i + 1) * 4 <= (size_t)n; i++) {
				uint32_t us;
				memcpy(&us, buffer + 4 + (size_t)i * 4, 4);
				if (us && !launch->microseconds[i])
					launch->microseconds[i] = us;
			}
			continue;
		}
		if ((size_t)n != sizeof *m)
			continue;
		memcpy(m, buffer, sizeof *m);
		m->text[sizeof m->text - 1] = '\0';
		if (type == CHILD_CONSOLE) {
			close_fd(&launch->console);
			launch->console = passed;
			passed = -1;
			continue;
		}
		result = 1;
		break;
	}
	free(buffer);
	return result;
}

/* ---- the child ---- */

static void __attribute__((noreturn)) child_fails(struct launch *launch) {
	struct message m = { .type = CHILD_FAILED, .op = launch->failure.op, .number = launch->failure.number };
	memcpy(m.text, launch->failure.text, sizeof m.text);
	send_record(launch->sync, &m, sizeof m, -1);
	_exit(1);
}

static void wait_for_go(struct launch *launch) {
	struct message m;
	if (receive(launch, &m) != 1 || m.type != PARENT_GO)
		_exit(1); /* the parent is gone or gave up: nothing to tell, no one to tell it */
	launch->pid = m.pid;
	launch->start_time = m.start_time;
}

static void __attribute__((noreturn)) child_main(struct launch *launch) {
	int waits = find_op(launch->plan, OP_wait_start) != NULL;
	launch->in_child = 1;
	prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
	close_fd(&launch->pidfd);
	close_fd(&launch->slot[LOCK_SLOT]); /* flock goes with the open file: the runtime's alone must hold it */
	if (launch->joined_mount) {
		/* The host's /proc has no business in a container that is running; its own root is where we are. */
		close_fd(&launch->proc);
		launch->proc = open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC);
		launch->root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
		launch->pivoted = 1;
	}
	if (launch->unshare_flags) {
		if (unshare(launch->unshare_flags)) {
			set_failure(launch, UINT32_MAX, errno, "unshare the time namespace: %s", strerror(errno));
			child_fails(launch);
		}
		simple_message(launch, CHILD_READY);
	}
	wait_for_go(launch);
	if (run_stage(launch, CHILD_BEFORE_PIVOT, 0))
		child_fails(launch);
	if (has_stage(launch->plan, PARENT_BEFORE_PIVOT)) {
		simple_message(launch, CHILD_BARRIER);
		wait_for_go(launch);
	}
	if (run_stage(launch, CHILD_AFTER_PIVOT, 0))
		child_fails(launch);
	send_times(launch);
	if (waits) /* From here init belongs to the caller's sub-reaper. It must not die with the runtime. */
		prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0);
	simple_message(launch, CHILD_CREATED);
	if (!waits) {
		wait_for_go(launch);
		prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0);
	}
	run_stage(launch, AFTER_START, 0); /* returns only on failure, or when the plan has no exec */
	if (!launch->failure.set)
		set_failure(launch, UINT32_MAX, 0, "the plan has no exec operation");
	child_fails(launch);
}

int do_wait_start(struct launch *launch, const struct op *op) {
	int listener = slot_fd(launch, op->a[0].i);
	int connection;
	close_fd(&launch->sync);
	do
		connection = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	while (connection < 0 && errno == EINTR);
	if (connection < 0)
		return -errno;
	close_fd(&launch->slot[op->a[0].i]);
	launch->sync = connection; /* a failure from now on is told to `start` */
	return 0;
}

int do_exec(struct launch *launch, const struct op *op) {
	char **argv = list_vector(&op->a[1].l), **env = list_vector(&op->a[2].l);
	const char *program = launch->program ? launch->program : op->a[0].s.data;
	size_t count = op->a[2].l.count;
	int number;
	if (!argv || !env)
		return -ENOMEM;
	if (launch->home) {
		char **longer = realloc(env, (count + 2) * sizeof *env);
		if (!longer)
			return -ENOMEM;
		env = longer;
		env[count] = launch->home;
		env[count + 1] = NULL;
	}
	if (sys_close_range((unsigned)(3 + launch->preserve), ~0u, CLOSE_RANGE_CLOEXEC))
		return fail_with(launch, errno, "close_range");
	send_times(launch);
	sigprocmask(SIG_SETMASK, &launch->original_mask, NULL);
	execve(program, argv, env);
	number = errno;
	return fail_with(launch, number, "exec %s", program);
}

/* ---- the parent ---- */

int wait_for(pid_t pid, int *status) {
	while (waitpid(pid, status, 0) < 0)
		if (errno != EINTR)
			return -errno;
	return 0;
}

static pid_t clone_child(struct launch *launch, uint64_t flags, int from_joiner) {
	struct clone_args args = { .flags = flags | CLONE_CLEAR_SIGHAND };
	int pidfd = -1;
	pid_t pid;
	if (from_joiner) {
		args.flags |= CLONE_PARENT; /* exit_signal comes from the joiner */
	} else {
		args.flags |= CLONE_PIDFD;
		args.pidfd = (uint64_t)(uintptr_t)&pidfd;
		args.exit_signal = SIGCHLD;
	}
	pid = sys_clone3(&args);
	if (pid > 0 && !from_joiner)
		launch->pidfd = pidfd;
	return pid;
}

/* Joins the given namespaces in the plan's order (user first) and clones init as a child of our parent. */
static void __attribute__((noreturn)) joiner_main(struct launch *launch, uint64_t flags, uint32_t clone_index) {
	struct message m = { .type = JOINER_PID };
	launch->in_child = 1;
	prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
	for (uint32_t i = 0; i < launch->plan->count; i++)
		if (launch->plan->ops[i].code == OP_ns_join) {
			if (run_op(launch, i))
				child_fails(launch);
			close_fd(&launch->slot[launch->plan->ops[i].a[0].i]);
			launch->joined_mount |= launch->plan->ops[i].a[1].i == CLONE_NEWNS;
		}
	m.pid = clone_child(launch, flags, 1);
	if (m.pid < 0) {
		launch->detail = NULL;
		blame(launch, clone_index, errno);
		child_fails(launch);
	}
	if (m.pid == 0)
		child_main(launch);
	send_record(launch->sync, &m, sizeof m, -1);
	_exit(0);
}

/* A shim has clients and other processes' pipes open: none may be in a process that a container can look into. */
static void close_all_but_slots(const struct launch *launch) {
	for (int at = 3, next; at >= 0; at = next + 1) {
		next = INT_MAX;
		for (int i = 0; i < PLAN_SLOTS; i++)
			if (launch->slot[i] >= at && launch->slot[i] < next)
				next = launch->slot[i];
		if (launch->sync >= at && launch->sync < next)
			next = launch->sync;
		if (launch->proc >= at && launch->proc < next)
			next = launch->proc;
		if (next > at)
			sys_close_range((unsigned)at, (unsigned)next - 1, 0);
		if (next == INT_MAX)
			return;
	}
}

int do_clone(struct launch *launch, const struct op *op) {
	uint64_t flags = (uint64_t)op->a[0].i;
	int pair[2], joins = find_op(launch->plan, OP_ns_join) != NULL;
	pid_t pid;
	launch->unshare_flags = (int)op->a[1].i;
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
		return fail_with(launch, errno, "socketpair");
	pid = clone_child(launch, joins ? 0 : flags, 0);
	if (pid < 0) {
		int number = errno;
		close(pair[0]);
		close(pair[1]);
		return -number;
	}
	if (pid == 0) {
		close(pair[0]);
		launch->sync = pair[1];
		launch->pidfd = -1;
		if (launch->only_slots)
			close_all_but_slots(launch);
		if (joins)
			joiner_main(launch, flags, (uint32_t)(op - launch->plan->ops));
		child_main(launch);
	}
	close(pair[1]);
	launch->sync = pair[0];
	launch->pid = pid;
	if (joins) {
		struct message m;
		int got = receive(launch, &m), status;

		wait_for(pid, &status);
		close_fd(&launch->pidfd);
		launch->pid = 0;
		if (got == 1 && m.type == CHILD_FAILED) {
			set_failure(launch, m.op, m.number, "%s", m.text);
			return -m.number;
		}
		if (got != 1 || m.type != JOINER_PID)
			return fail_with(launch, ECANCELED, "the joining process died");
		launch->pid = m.pid;
		launch->pidfd = sys_pidfd_open(m.pid, 0);
		if (launch->pidfd < 0)
			return fail_with(launch, errno, "pidfd_open");
	}
	launch->start_time = process_start_time(launch->pid);
	return 0;
}

/* Waits for a message of the type; a child that failed or died sets the failure. */
static int expect(struct launch *launch, uint32_t type) {
	struct message m;
	int got = receive(launch, &m);
	if (got == 1 && m.type == type)
		return 0;
	if (got == 1 && m.type == CHILD_FAILED)
		set_failure(launch, m.op, m.number, "%s", m.text);
	else
		set_failure(launch, UINT32_MAX, 0,
			    "the container's first process was killed while it was set up (probable cause: a memory or pids "
			    "limit too small to start in)");
	return -1;
}

void launch_abandon(struct launch *launch) {
	int early;
	if (launch->pid > 0) {
		int status;
		if (launch->pidfd >= 0)
			sys_pidfd_send_signal(launch->pidfd, SIGKILL);
		close_fd(&launch->sync);
		wait_for(launch->pid, &status);
		launch->pid = 0;
	}
	early = launch->failure.op < launch->plan->count && launch->plan->ops[launch->failure.op].flags & OP_NOTHING_OURS;
	for (uint32_t i = 0; i < launch->plan->count; i++) {
		const struct op *op = &launch->plan->ops[i];
		if (op->stage == ON_FAILURE && (early ? i < launch->failure.op : !(op->flags & OP_NOTHING_OURS)))
			run_op(launch, i);
	}
}

int launch_create(struct launch *launch) {
	if (run_stage(launch, PARENT_BEFORE_CLONE, 0))
		goto failed;
	if (!launch->pid)
		return 0; /* a plan without a process: state, kill, delete */
	if (launch->unshare_flags && expect(launch, CHILD_READY))
		goto failed;
	if (run_stage(launch, PARENT_AFTER_CLONE, 0))
		goto failed;
	simple_message(launch, PARENT_GO);
	if (has_stage(launch->plan, PARENT_BEFORE_PIVOT)) {
		if (expect(launch, CHILD_BARRIER) || run_stage(launch, PARENT_BEFORE_PIVOT, 0))
			goto failed;
		simple_message(launch, PARENT_GO);
	}
	if (expect(launch, CHILD_CREATED) || run_stage(launch, PARENT_CREATED, 0))
		goto failed;
	return 0;
failed:
	launch_abandon(launch);
	return -1;
}

int launch_start(struct launch *launch) {
	struct message m;
	int got;
	simple_message(launch, PARENT_GO);
	got = receive(launch, &m);
	close_fd(&launch->sync);
	if (got == 1 && m.type == CHILD_FAILED)
		set_failure(launch, m.op, m.number, "%s", m.text);
	else if (!run_stage(launch, PARENT_STARTED, 0))
		return 0;
	launch_abandon(launch); /* a poststart hook that fails takes the container with it, as in runc */
	return -1;
}

int launch_after_exit(struct launch *launch) {
	return run_stage(launch, AFTER_EXIT, 1);
}

int do_start(struct launch *launch, const struct op *op) {
	cleanup_fd fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	struct message m;
	int got, saved;
	if (fd < 0)
		return -errno;
	got = connect_unix(fd, op->a[0].s.data);
	if (got < 0)
		return got;
	saved = launch->sync;
	launch->sync = fd;
	got = receive(launch, &m);
	launch->sync = saved;
	if (got == 1 && m.type == CHILD_FAILED) {
		set_failure(launch, (uint32_t)(op - launch->plan->ops), m.number, "%s", m.text);
		return m.number ? -m.number : -ECANCELED;
	}
	return 0;
}
