/* From a running process to its exit record. */

#include "shim.h"

#define TEXT_SIZE 4096

static const char *const state_names[] = { "new", "running", "exiting", "exited" };

static int good_id(struct string id) {
	static const char allowed[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-";
	/* It becomes part of a file's name. */
	return id.len && id.len <= ID_LIMIT && id.data[0] != '.' && strspn(id.data, allowed) == id.len;
}

static struct process *make_process(const char *id) {
	struct process *p = calloc(1, sizeof *p);
	if (!p || asprintf(&p->record, "exit.%s", id) < 0) {
		free(p);
		return NULL;
	}
	p->id = strchr(p->record, '.') + 1;
	p->pidfd = p->slave = -1;
	p->input = (struct source){ .fd = -1, .ready = input_ready };
	for (int i = 0; i < 2; i++)
		p->out[i] = (struct stream){ { .fd = -1, .ready = stream_ready }, .process = p, .number = i + 1 };
	p->next = shim.processes;
	shim.processes = p;
	return p;
}

int find_process(struct request *r, int make, struct process **process) {
	struct string id = fields_get(&r->frame, "id");
	REFUSE_IF(!good_id(id), r, -EINVAL, "the process id is not a plain name");
	struct process *p = shim.processes;
	while (p && strcmp(p->id, id.data))
		p = p->next;
	REFUSE_IF(!p && !make, r, -ENOENT, "no process %s", id.data);
	*process = p ? p : make_process(id.data);
	return *process ? 0 : refuse(r, -ENOMEM, "no memory");
}

/* What only a running process needs. */
static void release(struct process *p) {
	source_close(&p->input);
	buffer_free(&p->pending);
	for (int i = 0; i < 2; i++)
		source_close(&p->out[i].source);
	close_fd(&p->slave);
	close_fd(&p->pidfd);
	if (p->log)
		log_close(p->log);
	p->log = NULL;
	free((char *)p->oom_files.encoded);
	p->oom_files = (struct list){ 0 };
}

void forget_process(struct process *p) {
	UNLINK(&shim.processes, p);
	if (p->state == PROCESS_NEW)
		clients_let_go(p);
	else
		clients_finish(p, 0);
	release(p);
	free((char *)p->after_exit.data);
	free(p->record);
	free(p);
}

/* memory.oom_control (v1) and memory.events (v2) both have a line "oom_kill N". */
uint64_t oom_kills(struct list files) {
	uint64_t sum = 0;
	for (struct string path; list_take(&files, &path);) {
		char text[1024] = "\n";
		read_text(path.data, text + 1, sizeof text - 1); /* one that is gone counts nothing */
		const char *found = strstr(text, "\noom_kill ");
		sum += found ? strtoull(found + 10, NULL, 10) : 0;
	}
	return sum;
}

/* ---- exit ---- */

static void put_exit(struct buffer *b, const struct process *p) {
	put_text(b, "id", p->id);
	put_number(b, "pid", p->pid);
	put_number(b, "start_time", (long long)p->start_time);
	put_number(b, "exit_code", p->exit_code);
	put_number(b, "signal", p->signal);
	put_number(b, "oom", p->oom);
	put_number(b, "started_at_ns", p->started_at);
	put_number(b, "exited_at_ns", p->exited_at);
}

/* One value of the field for each process: its fields. */
void put_processes(struct buffer *b) {
	uint32_t count = 0;
	for (struct process *p = shim.processes; p; p = p->next)
		count++;
	put_key(b, "process", count);
	for (struct process *p = shim.processes; p; p = p->next) {
		cleanup_buffer one = { 0 };
		put_text(&one, "state", state_names[p->state]);
		put_exit(&one, p);
		put_string(b, one.data, one.used);
	}
}

int remove_exit(struct request *r, const struct process *p, const char *which) {
	REFUSE_IF(unlink(p->record) && errno != ENOENT, r, -errno, "remove %s%s: %s", which, p->record, strerror(errno));
	return 0;
}

void write_exit_records(void) {
	shim.unrecorded = 0;
	shim.retry_at = clock_ns(CLOCK_MONOTONIC) + 1000000000;
	for (struct process *p = shim.processes; p; p = p->next) {
		cleanup_buffer b = { 0 };
		if (p->state < PROCESS_EXITING || p->recorded)
			continue;
		put_exit(&b, p);
		p->recorded = !write_record(p->record, &b);
		shim.unrecorded |= !p->recorded; /* the loop tries again every second: the disk may be full */
	}
}

void say_last_words(void) {
	for (struct process *p = shim.processes; p; p = p->next)
		if (p->state == PROCESS_EXITED)
			clients_finish(p, 1);
}

static void finish(struct process *p) {
	cleanup_buffer b = { 0 };
	p->state = PROCESS_EXITED;
	put_text(&b, "event", "exited");
	put_exit(&b, p);
	if (p->helper_text) {
		put_text(&b, "after_exit_error", p->helper_text);
		munmap(p->helper_text, TEXT_SIZE);
		p->helper_text = NULL;
	}
	send_event(&b);
	clients_finish(p, 1);
	free((char *)p->after_exit.data);
	p->after_exit.data = NULL;
}

static void __attribute__((noreturn)) helper_main(struct process *p) {
	struct launch launch;
	struct plan plan;
	const char *why;
	/* An fd kept here would keep a reader of another process waiting for its end of file. */
	sys_close_range(3, ~0u, 0);
	if (!plan_decode(p->after_exit.data, p->after_exit.len, &plan, &why)) {
		why = launch.failure.text;
		if (!launch_init(&launch, &plan)) {
			sigemptyset(&launch.original_mask);
			launch.pid = p->pid;
			launch.start_time = p->start_time;
			launch_after_exit(&launch);
		}
	}
	snprintf(p->helper_text, TEXT_SIZE, "%s", why);
	_exit(0);
}

/* Hooks and cgroups may take their time: a helper waits for them, not the shim. */
static void start_helper(struct process *p) {
	p->helper_text = mmap(NULL, TEXT_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (p->helper_text == MAP_FAILED)
		p->helper_text = NULL;
	if (p->helper_text)
		strcpy(p->helper_text, "the clean-up did not run"); /* until the helper says how it went */
	p->helper = p->helper_text ? fork() : -1;
	if (p->helper == 0)
		helper_main(p);
	if (p->helper < 0) {
		complain("clean up after %s: %s", p->id, strerror(errno));
		finish(p);
	}
}

static void died(struct process *p, int status) {
	p->exited_at = clock_ns(CLOCK_REALTIME);
	p->signal = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
	p->exit_code = p->signal ? 128 + p->signal : WEXITSTATUS(status);
	p->oom = oom_kills(p->oom_files) > p->oom_before;
	p->state = PROCESS_EXITING;
	drain_streams(p);
	release(p);
	write_exit_records(); /* before anything that may take time: this must survive us */
	if (p->after_exit.data)
		start_helper(p);
	else
		finish(p);
}

void process_reaped(pid_t pid, int status) {
	for (struct process *p = shim.processes; p; p = p->next) {
		if (p->state == PROCESS_RUNNING && p->pid == pid) {
			died(p, status);
			return;
		}
		if (p->state == PROCESS_EXITING && p->helper == pid) {
			if (WIFSIGNALED(status))
				snprintf(p->helper_text, TEXT_SIZE, "clean-up was killed by signal %d",
					 WTERMSIG(status));
			finish(p);
			return;
		}
	}
}

/* ---- small requests ---- */

static int find_running(struct request *r, struct process **p) {
	TRY(find_process(r, 0, p));
	REFUSE_IF((*p)->state != PROCESS_RUNNING, r, -ESRCH, "process %s is not running", (*p)->id);
	return 0;
}

static int idle(struct request *r, const struct process *p) {
	int busy = p->state == PROCESS_RUNNING || p->state == PROCESS_EXITING;
	return busy ? refuse(r, -EBUSY, "process %s is %s", p->id, state_names[p->state]) : 0;
}

int request_resize(struct request *r) {
	struct winsize size = { .ws_row = (unsigned short)fields_number(&r->frame, "rows", 0),
				.ws_col = (unsigned short)fields_number(&r->frame, "columns", 0) };
	struct process *p;
	TRY(find_running(r, &p));
	REFUSE_IF(!p->tty, r, -ENOTTY, "process %s has no terminal", p->id);
	return ioctl(p->slave, TIOCSWINSZ, &size) ? refuse(r, -errno, "resize: %s", strerror(errno)) : 0;
}

int request_signal(struct request *r) {
	int64_t number = fields_number(&r->frame, "signal", 0);
	struct process *p;
	TRY(find_running(r, &p));
	REFUSE_IF(number < 1 || number > 64, r, -EINVAL, "there is no signal %lld", (long long)number);
	int result = sys_pidfd_send_signal(p->pidfd, (int)number);
	return result ? refuse(r, result, "signal process %s: %s", p->id, strerror(errno)) : 0;
}

int request_forget(struct request *r) {
	struct process *p;
	TRY(find_process(r, 0, &p));
	TRY(idle(r, p));
	TRY(remove_exit(r, p, ""));
	forget_process(p);
	return 0;
}

void end_shim(void) {
	stop_listening();
	shim.ending = 1;
	say_last_words();
}

int request_end(struct request *r) {
	for (struct process *p = shim.processes; p; p = p->next)
		TRY(idle(r, p));
	end_shim();
	return 0;
}
