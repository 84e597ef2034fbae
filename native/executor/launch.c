#include <linux/seccomp.h>
#include <pthread.h>
#include <sys/time.h>

#include "fields.h"

#define STUCK_SECONDS 30

/* Messages between parent and child, typed and named by their sender. One SOCK_SEQPACKET record each. */
enum message_type {
	PARENT_GO = 1,      /* go on to the next stage; carries init's pid and start time */
	JOINER_PID = 2,     /* the pid of the child that the joiner cloned */
	CHILD_READY = 3,    /* unshared; the parent may write maps and offsets */
	CHILD_BARRIER = 4,  /* mounts are made; the parent may run its hooks */
	CHILD_CREATED = 5,  /* all but the wait for start and exec */
	CHILD_FAILED = 6,   /* the failure */
	CHILD_CONSOLE = 7,  /* the pty's master as SCM_RIGHTS */
};

struct message {
	uint32_t type;
	pid_t pid;
	uint64_t start_time;
	struct failure failure;
};

static op_function *const functions[256] = {
#define OP(code, name, signature) [code] = do_##name,
#include "ops.def"
#undef OP
};

static const char *errno_name(int number) {
#define NAME(name) if (number == name) return #name;
#include "words.def"
#undef NAME
	return "errno";
}

/* The probable cause of an errno, where one is likely enough to be worth saying. */
static const char *hint(uint16_t code, int number) {
#define HINT(op, error, text) if (code == OP_##op && number == error) return text;
#include "words.def"
	return NULL;
}

void set_failure(struct launch *launch, uint32_t op, int number, const char *format, ...) {
	va_list args;
	if (launch->failure.set)
		return;
	launch->failure = (struct failure){ .set = 1, .op = op, .number = number };
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
	if (op->code == OP_find_executable && launch->detail) /* it says all */
		set_failure(launch, index, number, "%s", more);
	else
		set_failure(launch, index, number, "%s: %s: %s%s%s%s", op->label, errno_name(number), strerror(number),
			    more ? " (" : "", more ? more : "", more ? ")" : "");
}

int take_slot(struct launch *launch, int64_t slot, int fd) {
	TRY(fd);
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

int64_t clock_ns(clockid_t clock) {
	struct timespec t;
	clock_gettime(clock, &t);
	return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int run_op(struct launch *launch, uint32_t index) {
	const struct op *op = &launch->plan->ops[index];
	int64_t before = clock_ns(CLOCK_MONOTONIC);
	launch->detail = NULL;
	int result = functions[op->code](launch, op);
	launch->microseconds[index] = (uint32_t)((clock_ns(CLOCK_MONOTONIC) - before) / 1000) + 1;
	if (result >= 0 || op->flags & OP_OPTIONAL)
		return 0;
	blame(launch, index, -result);
	return -1;
}

/* The cgroup namespace is joined by the child: where it is a border (nsdelegate), clone3 does not cross it (ENOENT). */
static int for_joiner(const struct op *op) { return op->code == OP_ns_join && op->a[1].i != CLONE_NEWCGROUP; }

/* keep_going: clean-up stages do all they can and report the first failure. */
static int run_stage(struct launch *launch, enum stage stage, int keep_going) {
	int result = 0;
	for (uint32_t i = 0; i < launch->plan->count && (!result || keep_going); i++)
		if (launch->plan->ops[i].stage == stage && !for_joiner(&launch->plan->ops[i]))
			result |= run_op(launch, i);
	return result;
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

static size_t times_size(const struct plan *plan) { return (plan->count + 1) * sizeof(uint32_t); }

int launch_init(struct launch *launch, const struct plan *plan) {
	*launch = (struct launch){ .plan = plan, .pidfd = -1, .sync = -1, .root = -1, .console = -1 };
	memset(launch->slot, -1, sizeof launch->slot);
	sigprocmask(SIG_SETMASK, NULL, &launch->original_mask);
	launch->proc = open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (launch->proc < 0)
		set_failure(launch, UINT32_MAX, errno, "open /proc: %s", strerror(errno));
	/* Shared with the child, which writes the times of its own operations; exec takes its mapping away. */
	launch->microseconds = mmap(NULL, times_size(plan), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (launch->microseconds == MAP_FAILED)
		set_failure(launch, UINT32_MAX, errno, "map memory: %s", strerror(errno));
	return launch->failure.set ? -1 : 0;
}

void launch_end(struct launch *launch) {
	for (int i = 0; i < PLAN_SLOTS; i++)
		close_fd(&launch->slot[i]);
	int *const fds[] = { &launch->pidfd, &launch->sync, &launch->root, &launch->proc, &launch->console };
	for (size_t i = 0; i < sizeof fds / sizeof fds[0]; i++)
		close_fd(fds[i]);
	if (launch->microseconds != MAP_FAILED)
		munmap(launch->microseconds, times_size(launch->plan));
	free(launch->program);
	free(launch->home);
}

/* One fd beside a record, aligned. */
union control {
	char space[CMSG_SPACE(sizeof(int))];
	struct cmsghdr align;
};

/* One record, with an fd when pass is one. */
static int send_record(int socket, const void *data, size_t size, int pass) {
	struct iovec iov = { (void *)data, size };
	union control control = { { 0 } };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };
	if (pass >= 0) {
		msg.msg_control = control.space;
		msg.msg_controllen = sizeof control.space;
		struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(c), &pass, sizeof(int));
	}
	return or_errno(RETRY(sendmsg(socket, &msg, MSG_NOSIGNAL)));
}

/* With a slot by the console-socket protocol of runc: one record with the name of the pty's master, the fd as SCM_RIGHTS.
 * Without one the pty goes to the parent of this launch. */
int send_console(struct launch *launch, int64_t slot, int fd) {
	struct message m = { .type = CHILD_CONSOLE };
	return slot >= 0 ? send_record(slot_fd(launch, slot), "/dev/pts/ptmx", sizeof "/dev/pts/ptmx", fd)
			 : send_record(launch->sync, &m, sizeof m, fd);
}

OPERATION(send_pidfd, send_record(slot_fd(launch, op->a[0].i), op->a[1].s.data, op->a[1].s.len, launch->pidfd))

static int simple_message(struct launch *launch, uint32_t type) {
	struct message m = { .type = type, .pid = launch->pid, .start_time = launch->start_time };
	return send_record(launch->sync, &m, sizeof m, -1);
}

/* One record; an fd that came with it is the console. Its size, 0 at end of file, -errno. */
static int receive_record(struct launch *launch, int socket, void *data, size_t size) {
	struct iovec iov = { data, size };
	union control control;
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.space,
			      .msg_controllen = sizeof control.space };
	int n = TRY(or_errno(RETRY(recvmsg(socket, &msg, MSG_CMSG_CLOEXEC))));
	struct cmsghdr *c = n ? CMSG_FIRSTHDR(&msg) : NULL;
	if (c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
		close_fd(&launch->console);
		memcpy(&launch->console, CMSG_DATA(c), sizeof(int));
	}
	return msg.msg_flags & MSG_TRUNC ? -EMSGSIZE : n;
}

/* Receives one message; the console is taken in on the way. 1, 0 at end of file, -errno. */
static int receive(struct launch *launch, int socket, struct message *m) {
	int n;
	do
		n = receive_record(launch, socket, m, sizeof *m);
	while (n == -EMSGSIZE || (n > 0 && (n != sizeof *m || m->type == CHILD_CONSOLE)));
	m->failure.text[sizeof m->failure.text - 1] = '\0';
	return n > 0 ? 1 : n == -ECONNRESET ? 0 : n;
}

/* ---- the child ---- */

static void __attribute__((noreturn)) child_fails(struct launch *launch) {
	struct message m = { .type = CHILD_FAILED, .failure = launch->failure };
	send_record(launch->sync, &m, sizeof m, -1);
	_exit(1);
}

static void wait_for_go(struct launch *launch) {
	struct message m;
	if (receive(launch, launch->sync, &m) != 1 || m.type != PARENT_GO)
		_exit(1); /* the parent is gone or gave up: nothing to tell, no one to tell it */
	launch->pid = m.pid;
	launch->start_time = m.start_time;
}

static int is_lent(const struct launch *launch) { return find_op(launch->plan, OP_take_back) != NULL; }

/* The child has to do something before the parent may write to its files in /proc. */
static int is_unready(const struct launch *launch) { return launch->unshare_flags || is_lent(launch); }

static void __attribute__((noreturn)) child_main(struct launch *launch) {
	int waits = find_op(launch->plan, OP_wait_start) != NULL;
	prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
	close_fd(&launch->pidfd);
	close_fd(&launch->slot[LOCK_SLOT]); /* flock goes with the open file: the runtime's alone must hold it */
	if (launch->joined_mount) {
		launch->proc = open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC);
		launch->root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
		launch->pivoted = 1;
	}
	if (launch->unshare_flags && unshare(launch->unshare_flags)) {
		set_failure(launch, UINT32_MAX, errno, "unshare the time namespace: %s", strerror(errno));
		child_fails(launch);
	}
	if (is_lent(launch))
		prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);
	if (is_unready(launch))
		simple_message(launch, CHILD_READY);
	wait_for_go(launch);
	if (run_stage(launch, CHILD_BEFORE_PIVOT, 0))
		child_fails(launch);
	if (has_stage(launch->plan, PARENT_BEFORE_PIVOT)) {
		simple_message(launch, CHILD_BARRIER);
		wait_for_go(launch);
	}
	if (run_stage(launch, CHILD_AFTER_PIVOT, 0))
		child_fails(launch);
	if (waits) /* From here init belongs to the caller's sub-reaper. It must not die with the runtime. */
		prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0);
	if (simple_message(launch, CHILD_CREATED) < 0)
		_exit(1); /* the filter lets nothing be said any more: the parent is not to wait */
	if (!waits) {
		wait_for_go(launch); /* another runtime ends with us: nobody else could undo what it has begun */
		prctl(PR_SET_PDEATHSIG, find_op(launch->plan, OP_adopt) ? SIGKILL : 0, 0, 0, 0);
	}
	run_stage(launch, AFTER_START, 0); /* returns only on failure, or when the plan has no exec */
	set_failure(launch, UINT32_MAX, 0, "the plan has no exec operation");
	child_fails(launch);
}

/* ---- the listener of a seccomp filter ---- */

struct handing_over {
	struct launch *launch;
	const struct op *op;
	struct buffer state;
	int listener, loaded, done; /* listener: the fd, or -errno */
};

/* A thread of its own hands the fd over: it has no filter, so that whatever the filter traps, this needs nobody's answer.
 * Its policy is the ordinary one: where the other waits as a real-time task, the kernel leaves room for that. */
static void *hand_over(void *given) {
	struct handing_over *h = given;
	const struct timespec pause = { 0, 20000 };
	int *socket = &h->launch->slot[h->op->a[2].i], result = 0;
	syscall(SYS_sched_setscheduler, 0, SCHED_OTHER, &(struct sched_param){ 0 });
	while (!__atomic_load_n(&h->loaded, __ATOMIC_ACQUIRE))
		nanosleep(&pause, NULL);
	if (h->listener >= 0)
		result = send_record(*socket, h->state.data, h->state.used, h->listener);
	close_fd(&h->listener); /* what is trapped with no listener left gives ENOSYS, it does not wait */
	close_fd(socket);
	if (result < 0) {
		blame(h->launch, (uint32_t)(h->op - h->launch->plan->ops), -result);
		child_fails(h->launch);
	}
	__atomic_store_n(&h->done, 1, __ATOMIC_RELEASE);
	return NULL;
}

int do_seccomp_listener(struct launch *launch, const struct op *op) {
	struct handing_over h = { .launch = launch, .op = op };
	pthread_t thread;
	TRY(slot_fd(launch, op->a[2].i) < 0 ? -EBADF : render(launch, op->a[3].s, &h.state));
	TRY(-pthread_create(&thread, NULL, hand_over, &h));
	int loaded = h.listener = load_filter(launch, op->a[0].i | SECCOMP_FILTER_FLAG_NEW_LISTENER, op->a[1].s);
	__atomic_store_n(&h.loaded, 1, __ATOMIC_RELEASE);
	while (!__atomic_load_n(&h.done, __ATOMIC_ACQUIRE))
		continue; /* by no system call: it might be trapped */
	return loaded < 0 ? loaded : 0;
}

int do_wait_start(struct launch *launch, const struct op *op) {
	close_fd(&launch->sync);
	int connection = TRY(or_errno(RETRY(accept4(slot_fd(launch, op->a[0].i), NULL, NULL, SOCK_CLOEXEC))));
	close_fd(&launch->slot[op->a[0].i]);
	launch->sync = connection; /* a failure from now on is told to `start` */
	return 0;
}

int exec_program(struct launch *launch, const char *path, const struct list *args, const struct list *variables, int fds) {
	char **argv = list_vector(args), **env = list_vector(variables);
	if (!argv || !env)
		return -ENOMEM;
	env[variables->count] = launch->home;
	TRY_SAYING(sys_close_range((unsigned)fds, ~0u, CLOSE_RANGE_CLOEXEC), "close_range");
	sigprocmask(SIG_SETMASK, &launch->original_mask, NULL);
	execve(path, argv, env);
	return fail_with(launch, errno, "exec %s", path);
}

int do_exec(struct launch *launch, const struct op *op) {
	const char *program = launch->program ? launch->program : op->a[0].s.data;
	return exec_program(launch, program, &op->a[1].l, &op->a[2].l, 3 + launch->preserve);
}

/* ---- the parent ---- */

int wait_for(pid_t pid, int *status) { return or_errno(RETRY(waitpid(pid, status, 0))); }

static pid_t clone_child(struct launch *launch, uint64_t flags, int from_joiner) {
	int born_there = launch->birth && (from_joiner || !find_op(launch->plan, OP_ns_join));
	int pidfd = -1; /* not the launch's own: a clone that fails late has written a number here that is no fd */
	struct clone_args args = {
		.flags = flags | CLONE_CLEAR_SIGHAND | (from_joiner ? CLONE_PARENT : CLONE_PIDFD) |
			 (born_there ? CLONE_INTO_CGROUP : 0),
		.cgroup = born_there ? (uint64_t)slot_fd(launch, launch->birth) : 0,
		.pidfd = (uint64_t)(uintptr_t)&pidfd,
		.exit_signal = from_joiner ? 0 : SIGCHLD, /* with CLONE_PARENT it is the joiner's */
	};
	pid_t pid = sys_clone3(&args);
	if (pid > 0 && !from_joiner)
		launch->pidfd = pidfd;
	if (pid == 0 && born_there)
		close_fd(&launch->slot[launch->birth]);
	return pid;
}

/* Joins the given namespaces in the plan's order (user first) and clones init as a child of our parent. */
static void __attribute__((noreturn)) joiner_main(struct launch *launch, uint64_t flags, uint32_t clone_index) {
	prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
	for (uint32_t i = 0; i < launch->plan->count; i++) {
		const struct op *op = &launch->plan->ops[i];
		if (!for_joiner(op))
			continue;
		if (run_op(launch, i))
			child_fails(launch);
		do_close(launch, op);
		launch->joined_mount |= op->a[1].i == CLONE_NEWNS;
	}
	if (launch->joined_mount) /* The host's /proc has no business in a container that is running. */
		close_fd(&launch->proc);
	struct message m = { .type = JOINER_PID, .pid = clone_child(launch, flags, 1) };
	if (m.pid < 0) {
		launch->detail = NULL;
		blame(launch, clone_index, -m.pid);
		child_fails(launch);
	}
	if (m.pid == 0)
		child_main(launch);
	send_record(launch->sync, &m, sizeof m, -1);
	_exit(0);
}

/* A shim has clients and other processes' pipes open: none may be in a process that a container can look into. */
static void close_all_but_slots(const struct launch *launch) {
	for (unsigned at = 3, next = 0; next < INT_MAX; at = next + 1) {
		next = INT_MAX;
		for (int i = 0; i < PLAN_SLOTS + 2; i++) {
			int fd = i < PLAN_SLOTS ? launch->slot[i] : i == PLAN_SLOTS ? launch->sync : launch->proc;
			if (fd >= (int)at && fd < (int)next)
				next = (unsigned)fd;
		}
		if (next > at)
			sys_close_range(at, next - 1, 0);
	}
}

/* What the child said of its failure becomes this launch's. */
static int child_failed(struct launch *launch, uint32_t op, const struct message *m) {
	set_failure(launch, op, m->failure.number, "%s", m->failure.text);
	return m->failure.number ? -m->failure.number : -ECANCELED;
}

/* The child's next message: 1, 0 when it ended instead, or -errno with the failure set. */
static int hear(struct launch *launch, struct message *m) {
	int got = receive(launch, launch->sync, m);
	if (got == 1 && m->type == CHILD_FAILED)
		return child_failed(launch, m->failure.op, m);
	if (got < 0)
		set_failure(launch, UINT32_MAX, ETIMEDOUT,
			    "the new process was stopped, or is stuck, before it could run its program");
	return got;
}

int do_clone(struct launch *launch, const struct op *op) {
	uint64_t flags = (uint64_t)op->a[0].i;
	int pair[2], joins = find_op(launch->plan, OP_ns_join) != NULL;
	launch->unshare_flags = (int)op->a[1].i;
	TRY_SAYING(or_errno(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair)), "socketpair");
	cleanup_fd ours = pair[0], childs = pair[1];
	/* What runs in a container can stop the process that comes in: a shim has others to serve. Hooks take their time. */
	struct timeval limit = { launch->only_slots && !find_op(launch->plan, OP_hook) ? STUCK_SECONDS : 0, 0 };
	setsockopt(ours, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
	pid_t pid = TRY(clone_child(launch, joins ? 0 : flags, 0));
	if (pid == 0) {
		close_fd(&ours);
		launch->sync = childs;
		if (launch->only_slots)
			close_all_but_slots(launch);
		if (joins)
			joiner_main(launch, flags, (uint32_t)(op - launch->plan->ops));
		child_main(launch);
	}
	close_fd(&childs); /* its end of file tells of the child's end */
	launch->sync = keep(&ours);
	launch->pid = pid;
	if (joins) {
		struct message m;
		int got = hear(launch, &m);
		if (got < 0)
			sys_pidfd_send_signal(launch->pidfd, SIGKILL);
		wait_for(pid, NULL);
		close_fd(&launch->pidfd);
		launch->pid = 0;
		if (TRY(got) != 1 || m.type != JOINER_PID)
			return fail_with(launch, ECANCELED, "the joining process died");
		launch->pid = m.pid;
		launch->pidfd = sys_pidfd_open(m.pid, 0);
		TRY_SAYING(launch->pidfd, "pidfd_open");
	}
	launch->start_time = process_start_time(launch->pid);
	return 0;
}

/* Waits for a message of the type. */
static int expect(struct launch *launch, uint32_t type) {
	struct message m;
	if (TRY(hear(launch, &m)) == 1 && m.type == type)
		return 0;
	set_failure(launch, UINT32_MAX, 0, "the container's first process was killed while it was set up (probable cause: "
		    "a memory or pids limit too small to start in)");
	return -1;
}

void launch_abandon(struct launch *launch) {
	if (launch->pid > 0) {
		if (launch->pidfd >= 0)
			sys_pidfd_send_signal(launch->pidfd, SIGKILL);
		close_fd(&launch->sync);
		wait_for(launch->pid, NULL);
		launch->pid = 0;
	}
	uint32_t failed = launch->failure.op;
	int early = failed < launch->plan->count && launch->plan->ops[failed].flags & OP_NOTHING_OURS;
	for (uint32_t i = 0; i < launch->plan->count; i++) {
		const struct op *op = &launch->plan->ops[i];
		if (op->stage == ON_FAILURE && (early ? i < failed : !(op->flags & OP_NOTHING_OURS)))
			run_op(launch, i);
	}
}

static int create(struct launch *launch) {
	TRY(run_stage(launch, PARENT_BEFORE_CLONE, 0));
	if (!launch->pid)
		return 0; /* a plan without a process: state, kill, delete */
	if (is_unready(launch))
		TRY(expect(launch, CHILD_READY));
	TRY(run_stage(launch, PARENT_AFTER_CLONE, 0));
	simple_message(launch, PARENT_GO);
	if (has_stage(launch->plan, PARENT_BEFORE_PIVOT)) {
		TRY(expect(launch, CHILD_BARRIER));
		TRY(run_stage(launch, PARENT_BEFORE_PIVOT, 0));
		simple_message(launch, PARENT_GO);
	}
	TRY(expect(launch, CHILD_CREATED));
	return run_stage(launch, PARENT_CREATED, 0);
}

int launch_create(struct launch *launch) {
	if (create(launch) == 0)
		return 0;
	launch_abandon(launch);
	return -1;
}

int launch_start(struct launch *launch) {
	struct message m;
	simple_message(launch, PARENT_GO);
	int got = hear(launch, &m);
	close_fd(&launch->sync);
	if (got >= 0 && !run_stage(launch, PARENT_STARTED, 0))
		return 0;
	launch_abandon(launch); /* a poststart hook that fails takes the container with it, as in runc */
	return -1;
}

/* The child was another runtime. Its end leaves us, the sub-reaper, the process that it made. */
int do_adopt(struct launch *launch, const struct op *op) {
	char text[32];
	int status, tries = 1000, late = RETRY(poll(&(struct pollfd){ launch->pidfd, POLLIN, 0 }, 1, (int)op->a[2].i)) == 0;
	if (late)
		sys_pidfd_send_signal(launch->pidfd, SIGKILL);
	TRY(wait_for(launch->pid, &status));
	launch->pid = 0;
	close_fd(&launch->pidfd);
	if (late || status || read_text(op->a[0].s.data, text, sizeof text) <= 0)
		return fail_with(launch, late ? ETIMEDOUT : ECANCELED, late ? "no end after %lld ms; it was killed" :
				 "it failed", (long long)op->a[2].i);
	cleanup_fd fd = TRY_SAYING(sys_pidfd_open(atoi(text), 0), "process %s is gone", text), connection = -1;
	/* crun says that it is done a moment before it lets go of its child. */
	while (waitid(P_PIDFD, (id_t)fd, NULL, WEXITED | WNOHANG | WNOWAIT) && errno == ECHILD && tries-- > 0)
		usleep(1000);
	TRY_SAYING(tries < 0 ? -ECHILD : 0, "process %s is another's child", text);
	launch->pid = atoi(text);
	launch->pidfd = keep(&fd);
	launch->start_time = process_start_time(launch->pid);
	if (op->a[1].i >= 0)
		connection = TRY_SAYING(or_errno(accept4(slot_fd(launch, op->a[1].i), NULL, NULL, SOCK_CLOEXEC)), "no terminal");
	return connection < 0 ? 0 : receive_record(launch, connection, text, sizeof text);
}

int launch_after_exit(struct launch *launch) { return run_stage(launch, AFTER_EXIT, 1); }

int do_start(struct launch *launch, const struct op *op) {
	cleanup_fd fd = TRY(connect_unix(SOCK_SEQPACKET, op->a[0].s.data));
	struct message m;
	int got = receive(launch, fd, &m);
	return got == 1 && m.type == CHILD_FAILED ? child_failed(launch, (uint32_t)(op - launch->plan->ops), &m) : 0;
}
