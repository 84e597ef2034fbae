/* A process's life: launch, exit, what is left of it on disk. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "shim.h"

#define ID_LIMIT 128
#define LOG_PATH_LIMIT 4000
#define TEXT_SIZE 4096
#define PROCESS_FIELDS 9 /* in hello and status, for each process */

static const char *const state_names[] = { "new", "running", "exiting", "exited" };

static int good_id(struct string id)
{
	static const char allowed[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-";

	/* It becomes part of a file's name. */
	return id.len && id.len <= ID_LIMIT && id.data[0] != '.' && strspn(id.data, allowed) == id.len;
}

static struct process *make_process(const char *id)
{
	struct process *p = calloc(1, sizeof *p);

	if (!p)
		return NULL;
	p->id = strdup(id);
	if (!p->id) {
		free(p);
		return NULL;
	}
	p->pidfd = p->slave = -1;
	p->input = (struct source){ .fd = -1, .ready = input_ready };
	for (int i = 0; i < 2; i++)
		p->out[i] = (struct stream){ .source = { .fd = -1, .ready = stream_ready }, .process = p, .number = i + 1 };
	p->next = shim.processes;
	shim.processes = p;
	return p;
}

int find_process(struct request *r, int make, struct process **process)
{
	struct string id = fields_get(&r->frame, "id");

	if (!good_id(id))
		return refuse(r, -EINVAL, "the process id is not a plain name");
	for (struct process *p = shim.processes; p; p = p->next)
		if (!strcmp(p->id, id.data)) {
			*process = p;
			return 0;
		}
	*process = make ? make_process(id.data) : NULL;
	if (*process)
		return 0;
	return make ? refuse(r, -ENOMEM, "no memory") : refuse(r, -ENOENT, "no process %s", id.data);
}

/* What only a running process needs. */
static void release(struct process *p)
{
	source_close(&p->input);
	for (int i = 0; i < 2; i++)
		source_close(&p->out[i].source);
	close_fd(&p->slave);
	close_fd(&p->pidfd);
	if (p->log)
		log_close(p->log);
	p->log = NULL;
	for (char **file = p->oom_files; file && *file; file++)
		free(*file);
	free(p->oom_files);
	p->oom_files = NULL;
}

static void forget(struct process *p)
{
	struct process **at = &shim.processes;

	while (*at != p)
		at = &(*at)->next;
	*at = p->next;
	clients_finish(p, 0);
	release(p);
	free(p->after_exit);
	free(p->id);
	free(p);
}

/* ---- out of memory ---- */

static uint64_t oom_kills(char **files)
{
	uint64_t sum = 0;

	for (; files && *files; files++) {
		cleanup_fd fd = open(*files, O_RDONLY | O_CLOEXEC);
		char text[1024], *at = text;
		ssize_t n = fd < 0 ? 0 : read(fd, text, sizeof text - 1);
		text[n > 0 ? n : 0] = '\0';
		while (at && strncmp(at, "oom_kill ", 9)) {
			at = strchr(at, '\n');
			at = at ? at + 1 : NULL;
		}
		sum += at ? strtoull(at + 9, NULL, 10) : 0;
	}
	return sum;
}

static char **copy_list(struct list list)
{
	char **copy = calloc((size_t)list.count + 1, sizeof *copy);
	const char *cursor = list.encoded;

	for (uint32_t i = 0; copy && i < list.count; i++) {
		copy[i] = strdup(list_next(&cursor).data);
		if (!copy[i])
			break;
	}
	return copy;
}

/* ---- launch ---- */

/* The AFTER_EXIT operations as a plan of their own: all that is kept of a plan while the process runs. */
static void keep_after_exit(struct process *p, struct string plan)
{
	struct buffer kept = { 0 };
	const char *at = plan.data + 12, *end = plan.data + plan.len;
	uint32_t count = 0;

	put_bytes(&kept, plan.data, 12);
	while (at < end) {
		uint32_t size;
		memcpy(&size, at + 4, sizeof size);
		if (at[2] == AFTER_EXIT) {
			put_bytes(&kept, at, 8 + (size_t)size);
			count++;
		}
		at += 8 + size;
	}
	if (count && !kept.failed) {
		memcpy(kept.data + 8, &count, sizeof count);
		p->after_exit = malloc(kept.used); /* to size: a buffer has room to grow */
		if (p->after_exit)
			memcpy(p->after_exit, kept.data, kept.used);
		p->after_exit_size = kept.used;
	}
	buffer_free(&kept);
}

static int check_plan(struct request *r, const struct plan *plan, int tty)
{
	int clones = 0, consoles = 0, waits = 0;

	for (uint32_t i = 0; i < plan->count; i++) {
		clones += plan->ops[i].code == OP_clone;
		consoles += plan->ops[i].code == OP_console;
		waits += plan->ops[i].code == OP_wait_start;
	}
	if (clones != 1 || waits)
		return refuse(r, -EINVAL, "the plan must clone one process and not wait for start");
	if (consoles != tty)
		return refuse(r, -EINVAL, tty ? "the plan has no console" : "the plan has a console, tty is 0");
	return 0;
}

static int take_passed(struct request *r, struct launch *launch)
{
	struct list slots = fields_list(&r->frame, "fd_slots");
	const char *cursor = slots.encoded;

	if (slots.count != r->fd_count)
		return refuse(r, -EINVAL, "%u fds for %u slots", r->fd_count, slots.count);
	for (uint32_t i = 0; i < slots.count; i++) {
		long slot = strtol(list_next(&cursor).data, NULL, 10);
		int fd = r->fds[i];
		r->fds[i] = -1;
		if (slot < 0 || slot >= SLOT_STDIN || launch->slot[slot] >= 0) {
			close(fd);
			return refuse(r, -EINVAL, "slot %ld is out of range or used twice", slot);
		}
		launch->slot[slot] = fd;
	}
	return 0;
}

/* One pipe: the container's end into its slot, ours non-blocking. */
static int make_pipe(struct launch *launch, int slot, struct source *ours, int write_end)
{
	int pair[2];

	if (pipe2(pair, O_CLOEXEC))
		return -errno;
	ours->fd = pair[write_end];
	launch->slot[slot] = pair[!write_end];
	return fcntl(ours->fd, F_SETFL, O_NONBLOCK) ? -errno : 0;
}

static int make_stdio(struct process *p, struct launch *launch, int wants_stdin)
{
	int result = 0;

	if (p->tty)
		return 0;
	if (wants_stdin)
		result = make_pipe(launch, SLOT_STDIN, &p->input, 1);
	else if ((launch->slot[SLOT_STDIN] = open("/dev/null", O_RDONLY | O_CLOEXEC)) < 0)
		result = -errno;
	if (!result)
		result = make_pipe(launch, SLOT_STDOUT, &p->out[0].source, 0);
	if (!result)
		result = make_pipe(launch, SLOT_STDERR, &p->out[1].source, 0);
	return result;
}

static int take_console(struct process *p, struct launch *launch, int wants_stdin)
{
	int master = launch->console;

	launch->console = -1;
	p->out[0].source.fd = master;
	if (fcntl(master, F_SETFL, O_NONBLOCK))
		return -errno;
	p->slave = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (p->slave < 0)
		return -errno;
	if (wants_stdin) {
		/* A second fd, so that reading and writing are watched apart. */
		p->input.fd = fcntl(master, F_DUPFD_CLOEXEC, 3);
		if (p->input.fd < 0)
			return -errno;
	}
	return 0;
}

static int open_log(struct request *r, struct process *p)
{
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

/* A process that was made but cannot go on. */
static void undo(struct launch *launch)
{
	int status;

	if (launch->pid <= 0)
		return;
	sys_pidfd_send_signal(launch->pidfd, SIGKILL);
	close_fd(&launch->sync);
	while (waitpid(launch->pid, &status, 0) < 0 && errno == EINTR)
		;
	run_stage(launch, ON_FAILURE, 1);
}

static int launch_refused(struct request *r, const struct launch *launch)
{
	r->op = launch->failure.op;
	return refuse(r, launch->failure.number > 0 ? -launch->failure.number : -ECANCELED, "%s", launch->failure.text);
}

static int run(struct request *r, struct process *p, struct launch *launch)
{
	int wants_stdin = fields_number(&r->frame, "stdin", 0) != 0, result;
	char name[ID_LIMIT + 8];

	sigemptyset(&launch->original_mask); /* the shim blocks all signals; a program starts with none blocked */
	result = take_passed(r, launch);
	if (!result)
		result = open_log(r, p);
	if (result)
		return result;
	result = make_stdio(p, launch, wants_stdin);
	if (result)
		return refuse(r, result, "make standard input and output: %s", strerror(-result));
	snprintf(name, sizeof name, "exit.%s", p->id);
	if (unlink(name) && errno != ENOENT)
		return refuse(r, -errno, "remove an old %s: %s", name, strerror(errno));
	if (launch_create(launch))
		return launch_refused(r, launch);
	if (p->tty && launch->console >= 0)
		result = take_console(p, launch, wants_stdin);
	for (int i = 0; i < 2 && !result; i++)
		if (p->out[i].source.fd >= 0)
			result = watch(&p->out[i].source, EPOLLIN);
	if (result) {
		undo(launch);
		return refuse(r, result, "take the terminal: %s", strerror(-result));
	}
	p->oom_before = oom_kills(p->oom_files);
	p->started_at = now_ns();
	if (launch_start(launch)) {
		undo(launch);
		return launch_refused(r, launch);
	}
	return 0;
}

static void adopt(struct request *r, struct process *p, struct launch *launch)
{
	p->state = PROCESS_RUNNING;
	p->pid = launch->pid;
	p->start_time = launch->start_time;
	p->pidfd = launch->pidfd;
	launch->pidfd = -1;
	put_number(r->answer, "pid", p->pid);
	put_number(r->answer, "start_time", (long long)p->start_time);
	put_number(r->answer, "started_at_ns", p->started_at);
	put_key(r->answer, "microseconds", launch->plan->count);
	for (uint32_t i = 0; i < launch->plan->count; i++) {
		char text[16];
		int n = snprintf(text, sizeof text, "%u", launch->microseconds[i]);
		put_string(r->answer, text, (size_t)n);
	}
	clients_begin(p);
}

int request_launch(struct request *r)
{
	struct string bytes = fields_get(&r->frame, "plan");
	int64_t ends = fields_number(&r->frame, "stdin_once", 0);
	struct launch launch;
	struct process *p;
	struct plan plan;
	const char *why;
	int result = find_process(r, 1, &p);

	if (result)
		return result;
	if (p->state != PROCESS_NEW)
		return refuse(r, -EEXIST, "process %s was launched already", p->id);
	p->tty = fields_number(&r->frame, "tty", 0) != 0;
	p->stdin_end = ends == 1 ? STDIN_FIRST_EOF : ends == 2 ? STDIN_LAST_EOF : STDIN_STAYS;
	p->oom_files = copy_list(fields_list(&r->frame, "oom_files"));
	if (plan_decode(bytes.data, bytes.len, &plan, &why)) {
		result = refuse(r, -EINVAL, "the plan: %s", why);
		goto failed;
	}
	result = check_plan(r, &plan, p->tty);
	if (!result && launch_init(&launch, &plan))
		result = launch_refused(r, &launch);
	if (!result) {
		result = run(r, p, &launch);
		if (!result) {
			keep_after_exit(p, bytes);
			adopt(r, p, &launch);
		}
		launch_end(&launch);
	}
	plan_free(&plan);
	if (!result)
		return 0;
failed:
	forget(p);
	return result;
}

/* ---- exit ---- */

static void put_exit(struct buffer *b, const struct process *p)
{
	put_key(b, "id", 1);
	put_string(b, p->id, strlen(p->id));
	put_number(b, "pid", p->pid);
	put_number(b, "start_time", (long long)p->start_time);
	put_number(b, "exit_code", p->exit_code);
	put_number(b, "signal", p->signal);
	put_number(b, "oom", p->oom);
	put_number(b, "started_at_ns", p->started_at);
	put_number(b, "exited_at_ns", p->exited_at);
}

static void write_exit(struct process *p)
{
	struct buffer b = { 0 };
	char name[ID_LIMIT + 8];
	int result;

	put_exit(&b, p);
	snprintf(name, sizeof name, "exit.%s", p->id);
	result = write_record(name, &b);
	buffer_free(&b);
	p->recorded = !result;
	if (result)
		shim.unrecorded = 1; /* the loop tries again every second: the disk may be full */
}

void write_exit_records(void)
{
	shim.unrecorded = 0;
	for (struct process *p = shim.processes; p; p = p->next)
		if (p->state >= PROCESS_EXITING && !p->recorded)
			write_exit(p);
}

static void finish(struct process *p)
{
	struct buffer b = { 0 };

	p->state = PROCESS_EXITED;
	event_begin(&b, "exited");
	put_exit(&b, p);
	if (p->helper_text && *p->helper_text) {
		put_key(&b, "after_exit_error", 1);
		put_string(&b, p->helper_text, strlen(p->helper_text));
	}
	event_end(&b);
	clients_finish(p, 1);
	if (p->helper_text)
		munmap(p->helper_text, TEXT_SIZE);
	p->helper_text = NULL;
	free(p->after_exit);
	p->after_exit = NULL;
}

static void __attribute__((noreturn)) helper_main(struct process *p)
{
	struct launch launch;
	struct plan plan;
	const char *why;

	/* An fd kept here would keep a reader of another process waiting for its end of file. */
	sys_close_range(3, ~0u, 0);
	if (plan_decode(p->after_exit, p->after_exit_size, &plan, &why)) {
		snprintf(p->helper_text, TEXT_SIZE, "%s", why);
		_exit(1);
	}
	if (launch_init(&launch, &plan) == 0) {
		sigemptyset(&launch.original_mask);
		launch.pid = p->pid;
		launch.start_time = p->start_time;
		launch_after_exit(&launch);
	}
	snprintf(p->helper_text, TEXT_SIZE, "%s", launch.failure.text);
	_exit(launch.failure.set);
}

/* Hooks and cgroups may take their time: a helper waits for them, not the shim. */
static void start_helper(struct process *p)
{
	p->helper_text = mmap(NULL, TEXT_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (p->helper_text == MAP_FAILED) {
		p->helper_text = NULL;
		complain("clean up after %s: %s", p->id, strerror(errno));
		finish(p);
		return;
	}
	p->helper = fork();
	if (p->helper == 0)
		helper_main(p);
	if (p->helper < 0) {
		snprintf(p->helper_text, TEXT_SIZE, "fork: %s", strerror(errno));
		finish(p);
	}
}

static void died(struct process *p, int status)
{
	p->exited_at = now_ns();
	p->signal = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
	p->exit_code = p->signal ? 128 + p->signal : WEXITSTATUS(status);
	p->oom = oom_kills(p->oom_files) > p->oom_before;
	p->state = PROCESS_EXITING;
	drain_streams(p);
	release(p);
	write_exit(p); /* before anything that may take time: this must survive us */
	if (p->after_exit)
		start_helper(p);
	else
		finish(p);
}

void process_reaped(pid_t pid, int status)
{
	for (struct process *p = shim.processes; p; p = p->next) {
		if (p->state == PROCESS_RUNNING && p->pid == pid) {
			died(p, status);
			return;
		}
		if (p->state == PROCESS_EXITING && p->helper == pid) {
			if (WIFSIGNALED(status) && !*p->helper_text)
				snprintf(p->helper_text, TEXT_SIZE, "clean-up was killed by signal %d", WTERMSIG(status));
			finish(p);
			return;
		}
	}
}

/* ---- small requests ---- */

void put_processes(struct buffer *b)
{
	uint32_t count = 0;

	for (struct process *p = shim.processes; p; p = p->next)
		count++;
	put_key(b, "process", count * PROCESS_FIELDS);
	for (struct process *p = shim.processes; p; p = p->next) {
		const long long numbers[] = { p->pid, (long long)p->start_time, p->exit_code, p->signal, p->oom,
					      p->started_at, p->exited_at };
		put_string(b, p->id, strlen(p->id));
		put_string(b, state_names[p->state], strlen(state_names[p->state]));
		for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++) {
			char text[24];
			int n = snprintf(text, sizeof text, "%lld", numbers[i]);
			put_string(b, text, (size_t)n);
		}
	}
}

static int running_process(struct request *r, struct process **p)
{
	int result = find_process(r, 0, p);

	if (result)
		return result;
	return (*p)->state == PROCESS_RUNNING ? 0 : refuse(r, -ESRCH, "process %s is not running", (*p)->id);
}

int request_resize(struct request *r)
{
	struct winsize size = { .ws_row = (unsigned short)fields_number(&r->frame, "rows", 0),
				.ws_col = (unsigned short)fields_number(&r->frame, "columns", 0) };
	struct process *p;
	int result = running_process(r, &p);

	if (result)
		return result;
	if (!p->tty)
		return refuse(r, -ENOTTY, "process %s has no terminal", p->id);
	return ioctl(p->slave, TIOCSWINSZ, &size) ? refuse(r, -errno, "resize: %s", strerror(errno)) : 0;
}

int request_signal(struct request *r)
{
	int number = (int)fields_number(&r->frame, "signal", 0);
	struct process *p;
	int result = running_process(r, &p);

	if (result)
		return result;
	if (number < 1 || number > 64)
		return refuse(r, -EINVAL, "there is no signal %d", number);
	if (sys_pidfd_send_signal(p->pidfd, number))
		return refuse(r, -errno, "signal process %s: %s", p->id, strerror(errno));
	return 0;
}

int request_close_stdin(struct request *r)
{
	struct process *p;
	int result = running_process(r, &p);

	if (!result && !p->tty)
		input_close(p);
	return result;
}

int request_forget(struct request *r)
{
	char name[ID_LIMIT + 8];
	struct process *p;
	int result = find_process(r, 0, &p);

	if (result)
		return result;
	if (p->state == PROCESS_RUNNING || p->state == PROCESS_EXITING)
		return refuse(r, -EBUSY, "process %s is %s", p->id, state_names[p->state]);
	snprintf(name, sizeof name, "exit.%s", p->id);
	if (unlink(name) && errno != ENOENT)
		return refuse(r, -errno, "remove %s: %s", name, strerror(errno));
	forget(p);
	return 0;
}

int request_end(struct request *r)
{
	for (struct process *p = shim.processes; p; p = p->next)
		if (p->state == PROCESS_RUNNING || p->state == PROCESS_EXITING)
			return refuse(r, -EBUSY, "process %s is %s", p->id, state_names[p->state]);
	unlink("shim.sock");
	unlink("shim.state");
	stop_listening();
	shim.ending = 1;
	return 0;
}
