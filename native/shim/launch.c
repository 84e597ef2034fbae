/* From a request to a running process. */

#include "shim.h"

#define LOG_PATH_LIMIT 4000

static char *copy_of(const char *data, size_t size) {
	char *copy = malloc(size);
	return copy ? memcpy(copy, data, size) : NULL;
}

/* What is kept of a request while the process runs: its plan for afterwards, and where its OOM kills are counted. */
static int keep_for_later(struct request *r, struct process *p) {
	struct string plan = fields_get(&r->frame, "after_exit");
	struct list files = fields_list(&r->frame, "oom_files"), rest = files;
	for (struct string s; list_take(&rest, &s);)
		continue;
	if (plan.len && !(p->after_exit.data = copy_of(plan.data, p->after_exit.len = plan.len)))
		return -ENOMEM;
	p->oom_files.encoded = files.count ? copy_of(files.encoded, (size_t)(rest.encoded - files.encoded)) : NULL;
	p->oom_files.count = p->oom_files.encoded ? files.count : 0;
	return p->oom_files.count == files.count ? 0 : -ENOMEM;
}

static int check_plan(struct request *r, const struct plan *plan, int tty) {
	REFUSE_IF(!find_op(plan, OP_clone) || find_op(plan, OP_wait_start), r, -EINVAL,
		  "the plan must clone a process and not wait for start");
	const struct op *adopt = find_op(plan, OP_adopt);
	REFUSE_IF((find_op(plan, OP_console) || (adopt && adopt->a[1].i >= 0)) != tty, r, -EINVAL,
		  tty ? "the plan has no console" : "the plan has a console, tty is 0");
	return 0;
}

static int take_passed(struct request *r, struct launch *launch) {
	struct list slots = fields_list(&r->frame, "fd_slots");
	int *fd = r->fds;
	REFUSE_IF(slots.count != r->fd_count, r, -EINVAL, "%u fds for %u slots", r->fd_count, slots.count);
	for (struct string text; list_take(&slots, &text);) {
		long slot = strtol(text.data, NULL, 10);
		REFUSE_IF(slot < 0 || slot >= SLOT_STDIN || launch->slot[slot] >= 0, r, -EINVAL, "slot %ld is out of range or used twice", slot);
		launch->slot[slot] = keep(fd++);
	}
	return 0;
}

/* One pipe: the container's end into its slot, ours non-blocking. */
static int make_pipe(struct launch *launch, int slot, struct source *ours, int write_end) {
	int pair[2];
	TRY(or_errno(pipe2(pair, O_CLOEXEC)));
	ours->fd = pair[write_end];
	launch->slot[slot] = pair[!write_end];
	return fcntl(ours->fd, F_SETFL, O_NONBLOCK) ? -errno : 0;
}

static int make_stdio(struct process *p, struct launch *launch, int wants_stdin) {
	if (p->tty)
		return 0;
	if (wants_stdin)
		TRY(make_pipe(launch, SLOT_STDIN, &p->input, 1));
	else if ((launch->slot[SLOT_STDIN] = open("/dev/null", O_RDONLY | O_CLOEXEC)) < 0)
		return -errno;
	TRY(make_pipe(launch, SLOT_STDOUT, &p->out[0].source, 0));
	return make_pipe(launch, SLOT_STDERR, &p->out[1].source, 0);
}

static int take_console(struct process *p, struct launch *launch, int wants_stdin) {
	if (!p->tty || launch->console < 0)
		return 0;
	int master = p->out[0].source.fd = keep(&launch->console);
	TRY(or_errno(fcntl(master, F_SETFL, O_NONBLOCK)));
	if ((p->slave = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC)) < 0) /* it was in a namespace that has gone */
		p->slave = fcntl(master, F_DUPFD_CLOEXEC, 3);
	/* A second fd, so that reading and writing are watched apart. */
	p->input.fd = wants_stdin ? fcntl(master, F_DUPFD_CLOEXEC, 3) : -1;
	return p->slave < 0 || (wants_stdin && p->input.fd < 0) ? -errno : 0;
}

static int open_log(struct request *r, struct process *p) {
	struct string path = fields_get(&r->frame, "log");
	int64_t size = fields_number(&r->frame, "log_max_size", 20 << 20);
	int64_t files = fields_number(&r->frame, "log_max_files", 5);
	if (!path.len)
		return 0;
	if (path.data[0] != '/' || path.len > LOG_PATH_LIMIT || files < 1 || files > 1000)
		return refuse(r, -EINVAL, "the log needs an absolute path and 1 to 1000 files");
	p->log = log_open(path.data, size > 0 ? (uint64_t)size : 0, (unsigned)files);
	return p->log ? 0 : refuse(r, -errno, "open the log %s: %s", path.data, strerror(errno));
}

static int prepare(struct request *r, struct process *p, struct launch *launch, int wants_stdin) {
	TRY(take_passed(r, launch));
	TRY(open_log(r, p));
	TRY(remove_exit(r, p, "an old "));
	int result = make_stdio(p, launch, wants_stdin);
	if (!result)
		result = keep_for_later(r, p);
	return result ? refuse(r, result, "prepare standard input and output: %s", strerror(-result)) : 0;
}

static int plan_failed(struct request *r, const struct launch *launch) {
	r->op = launch->failure.op;
	return refuse(r, launch->failure.number > 0 ? -launch->failure.number : -ECANCELED, "%s", launch->failure.text);
}

static void adopt(struct request *r, struct process *p, struct launch *launch) {
	p->state = PROCESS_RUNNING;
	p->pid = launch->pid;
	p->start_time = launch->start_time;
	p->pidfd = keep(&launch->pidfd);
	put_number(&r->answer, "pid", p->pid);
	put_number(&r->answer, "start_time", (long long)p->start_time);
	put_number(&r->answer, "started_at_ns", p->started_at);
	put_key(&r->answer, "microseconds", launch->plan->count);
	for (uint32_t i = 0; i < launch->plan->count; i++) {
		char text[16];
		put_string(&r->answer, text, (size_t)sprintf(text, "%u", launch->microseconds[i]));
	}
	clients_go_on(p);
}

static int run(struct request *r, struct process *p) {
	struct string bytes = fields_get(&r->frame, "plan");
	int wants_stdin = (int)flag(r, "stdin");
	__attribute__((cleanup(plan_free))) struct plan plan;
	const char *why;
	p->tty = (int)flag(r, "tty");
	p->stdin_end = (enum stdin_end)fields_number(&r->frame, "stdin_once", STDIN_STAYS);
	REFUSE_IF(plan_decode(bytes.data, bytes.len, &plan, &why), r, -EINVAL, "the plan: %s", why);
	REFUSE_IF(p->stdin_end > STDIN_LAST_EOF, r, -EINVAL, "stdin_once is 0, 1 or 2");
	TRY(check_plan(r, &plan, p->tty));
	__attribute__((cleanup(launch_end))) struct launch launch;
	if (launch_init(&launch, &plan))
		return plan_failed(r, &launch);
	TRY(prepare(r, p, &launch, wants_stdin));
	sigemptyset(&launch.original_mask); /* the shim blocks all signals; a program starts with none blocked */
	launch.only_slots = 1;
	if (launch_create(&launch))
		return plan_failed(r, &launch);
	p->oom_before = oom_kills(p->oom_files);
	p->started_at = clock_ns(CLOCK_REALTIME);
	int result = take_console(p, &launch, wants_stdin);
	if (!result && launch_start(&launch))
		return plan_failed(r, &launch);
	if (!result) /* of a runtime that was started it comes now */
		result = take_console(p, &launch, wants_stdin);
	for (int i = 0; i < 2 && !result; i++)
		if (p->out[i].source.fd >= 0)
			result = watch(&p->out[i].source, EPOLLIN);
	if (result) {
		launch_abandon(&launch);
		return refuse(r, result, "take the terminal: %s", strerror(-result));
	}
	adopt(r, p, &launch);
	return 0;
}

int request_launch(struct request *r) {
	struct process *p;
	TRY(find_process(r, 1, &p));
	REFUSE_IF(p->state != PROCESS_NEW, r, -EEXIST, "process %s was launched already", p->id);
	int result = run(r, p);
	if (result)
		forget_process(p);
	return result;
}
