/* dolium-front, installed as dolium-runtime and as dolium: sends what it was asked to the compiler, runs the plan that
 * comes back in the caller's own process tree, and exits. It decides nothing. */
#include "wire.h"

#define SELF_VARIABLE "_DOLIUM_FRONT"
#define AGAIN -1

extern char **environ;

static const char *program = "dolium-runtime";

static void write_log(const char *path, int json, const char *level, const char *message) {
	cleanup_fd fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
	if (fd < 0)
		return; /* the message is on standard error too */
	time_t now = time(NULL);
	struct tm tm;
	char stamp[32], line[4096];
	strftime(stamp, sizeof stamp, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &tm));
	size_t n = 0;
	for (const char *p = message; *p && n + 8 < sizeof line; p++) {
		const char *format = *p == '"' || *p == '\\' ? "\\%c" : (unsigned char)*p < 0x20 ? "\\u%04x" : "%c";
		n += (size_t)sprintf(line + n, format, *p);
	}
	char whole[sizeof line + 96]; /* in one write: others may write to the same log, and musl's dprintf takes several */
	int length = json ? snprintf(whole, sizeof whole, "{\"level\":\"%s\",\"msg\":\"%.*s\",\"time\":\"%s\"}\n", level, (int)n, line, stamp)
			  : snprintf(whole, sizeof whole, "time=\"%s\" level=%s msg=\"%.*s\"\n", stamp, level, (int)n, line);
	if (write(fd, whole, (size_t)length) < 0)
		return;
}

static void __attribute__((format(printf, 3, 4))) report(const char *log_path, int json, const char *format, ...) {
	char message[2048];
	va_list args;
	va_start(args, format);
	vsnprintf(message, sizeof message, format, args);
	va_end(args);
	fprintf(stderr, "%s: %s\n", program, message);
	if (log_path && *log_path)
		write_log(log_path, json, "error", message);
}

static const char exe[] = "/proc/self/exe";

static void know_self(char self[PATH_MAX]) {
	ssize_t n = readlink(exe, self, PATH_MAX - 1);
	if (n < 0) {
		report(NULL, 0, "read %s: %s", exe, strerror(errno));
		exit(1);
	}
	self[n] = '\0';
}

static int is_sealed(const char *path) {
	cleanup_fd fd = open(path, O_RDONLY | O_CLOEXEC);
	int seals = fd < 0 ? -1 : fcntl(fd, F_GET_SEALS);
	return seals > 0 && seals & F_SEAL_WRITE;
}

/* A sealed copy in memory. An fd or -errno. */
static int sealed_copy(const char *path) {
	cleanup_fd disk = TRY(or_errno(open(path, O_RDONLY | O_CLOEXEC)));
	cleanup_fd copy = TRY(or_errno(memfd_create("dolium-front", MFD_CLOEXEC | MFD_ALLOW_SEALING)));
	TRY(copy_all(disk, copy));
	TRY(or_errno(fcntl(copy, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL)));
	return keep(&copy);
}

/* Runs again from a sealed copy in memory, so that nothing in a container can reach the program on disk through
 * /proc/PID/exe of a process that is on its way in (CVE-2019-5736). Returns only when it runs from the copy already;
 * `self` is the program on disk. */
static void run_from_sealed_copy(char **argv, char self[PATH_MAX]) {
	const char *told = getenv(SELF_VARIABLE);
	/* Believed only when it is true: seals cannot be forged by an environment. */
	if (told && is_sealed(exe)) {
		snprintf(self, PATH_MAX, "%s", told);
		unsetenv(SELF_VARIABLE);
		return;
	}
	know_self(self);
	int copy = sealed_copy(exe);
	if (copy >= 0 && !setenv(SELF_VARIABLE, self, 1))
		syscall(SYS_execveat, copy, "", argv, environ, AT_EMPTY_PATH);
	report(NULL, 0, "make a sealed copy of %s: %s", self, strerror(errno));
	exit(1);
}

/* An answer's first byte is its kind. */
static struct reader body_of(const struct buffer *answer) {
	return (struct reader){ answer->data + 1, answer->data + answer->used };
}

/* The next string of a body; "" when there is none. */
static const char *next_text(struct reader *body) {
	struct string s;
	return take_string(body, &s) ? "" : s.data;
}

struct question {
	struct buffer request, known, answer; /* known: the facts found so far, none of them twice */
};

/* Asks, feeding facts, until there is a plan or an error. 0 or -errno; then another compiler may be asked. */
static int ask(int socket, struct question *q) {
	size_t sent = 0;
	TRY(send_frame(socket, &q->request));
	for (;;) {
		TRY(receive_frame(socket, &q->answer));
		if (q->answer.used < 1)
			return -EPROTO;
		if (q->answer.data[0] != 'N')
			return 0;
		for (struct reader body = body_of(&q->answer); body.at < body.end;) {
			struct string query;
			if (take_string(&body, &query))
				return -EPROTO;
			if (!fields_list(&q->known, query.data).count)
				put_fact(&q->known, query.data);
		}
		struct buffer news = q->known;
		news.data += sent;
		news.used -= sent;
		TRY(send_frame(socket, &news));
		sent = q->known.used;
	}
}

static int ask_warm(const char *self, struct question *q) {
	char place[PATH_MAX];
	TRY(warm_place(self, place));
	cleanup_fd socket = connect_warm(place);
	if (socket == -ENOENT || socket == -ECONNREFUSED)
		start_warm(self, place);
	return socket < 0 ? socket : ask(socket, q);
}

static int ask_cold(const char *self, const char *module, struct question *q) {
	pid_t compiler = -1;
	cleanup_fd socket = start_cold_compiler(self, module, &compiler);
	int result = socket < 0 ? socket : ask(socket, q);
	close_fd(&socket);
	if (compiler > 0)
		wait_for(compiler, NULL);
	if (result)
		report(NULL, 0, "the compiler: %s (above is what it said; is the package dolium beside %s?)", strerror(-result), self);
	return result;
}

static int show_error(const struct buffer *answer) {
	struct reader body = body_of(answer);
	const char *code = next_text(&body), *message = next_text(&body);
	const char *log = next_text(&body), *format = next_text(&body);
	report(log, !strcmp(format, "json"), "%s", message);
	return atoi(code) ? atoi(code) : 1;
}

/* Stays until init exits, then cleans up; the status as a shell would give it. */
static int hold(struct launch *launch) {
	/* While the container runs, `exec`, `kill` and `delete` must not wait for this process: the lock is given back. */
	close_fd(&launch->slot[LOCK_SLOT]);
	int status = hold_until_exit(launch);
	/* When somebody else removed the container meanwhile, there is nothing to lock and nothing to clean up. */
	const struct op *lock = find_op(launch->plan, OP_lock);
	if ((!lock || !do_lock(launch, lock)) && launch_after_exit(launch))
		report(launch->log_path, launch->log_json, "%s", launch->failure.text);
	return status;
}

static int run_launch(struct launch *launch) {
	sigset_t all;
	/* A Ctrl-C in the middle waits until nothing is half made. */
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	TRY(launch_create(launch));
	if (!find_op(launch->plan, OP_clone) || find_op(launch->plan, OP_wait_start))
		return launch->held_exit;
	TRY(launch_start(launch));
	return launch->wants_hold ? hold(launch) : launch->held_exit;
}

/* --debug: what was done, and how long each operation took. (Of exec nobody is left to say.) */
static void show_times(const struct launch *launch) {
	int wanted = launch->plan->flags & PLAN_FLAG_DEBUG && launch->microseconds != MAP_FAILED;
	for (uint32_t i = 0; wanted && i < launch->plan->count; i++) {
		const struct op *op = &launch->plan->ops[i];
		char line[1024];
		snprintf(line, sizeof line, "%u us %s: %s", launch->microseconds[i], op_name(op->code), op->label);
		if (launch->log_path && launch->microseconds[i])
			write_log(launch->log_path, launch->log_json, "debug", line);
		else if (launch->microseconds[i])
			fprintf(stderr, "%s: %s\n", program, line);
	}
}

/* The exit status; or AGAIN, with the request made ready. */
static int run_plan(struct question *q, int inherited) {
	const struct buffer *answer = &q->answer;
	struct launch launch;
	struct plan plan;
	const char *why;
	if (plan_decode(answer->data + 1, answer->used - 1, &plan, &why)) {
		report(NULL, 0, "the compiler's answer is no plan: %s", why);
		return 1;
	}
	int status = launch_init(&launch, &plan);
	launch.inherited = inherited;
	if (!status)
		status = run_launch(&launch);
	if (status < 0) {
		report(launch.log_path, launch.log_json, "%s", launch.failure.text);
		status = launch.held_exit > 0 ? launch.held_exit : 1;
	}
	show_times(&launch);
	const struct op *again = find_op(&plan, OP_again);
	if (again && !status) {
		sigprocmask(SIG_SETMASK, &launch.original_mask, NULL);
		poll(NULL, 0, (int)again->a[0].i);
		put_text(&q->request, "again", again->a[1].s.data);
		buffer_free(&q->known);
		status = AGAIN;
	}
	launch_end(&launch);
	plan_free(&plan);
	return status;
}

/* `dolium`: joins nothing and launches nothing, so it runs as it lies on the disk. What the warm compiler cannot answer, a
 * Python in this process's place does; unless something was done already: then the answer must come of what is known. */
static int ask_for_people(const char *self, char **argv, struct question *q) {
	int result = ask_warm(self, q);
	if (result && q->known.used)
		result = TRY(ask_cold(self, "cli.facts", q));
	if (!result && q->answer.data[0] != 'C')
		return 0;
	signal(SIGPIPE, SIG_DFL);
	result = run_python(self, "from dolium.cli.main import entry;sys.exit(entry())", argv + 1);
	report(NULL, 0, "start Python: %s (is the package dolium beside %s?)", strerror(-result), self);
	return result;
}

int main(int argc, char **argv) {
	char self[PATH_MAX];
	int inherited = 3;
	while (fcntl(inherited, F_GETFD) >= 0) /* before there is any of our own */
		inherited++;
	const char *slash = argc > 0 ? strrchr(argv[0], '/') : NULL;
	int for_people = argc > 0 && !strcmp(slash ? slash + 1 : argv[0], "dolium");
	if (for_people) {
		program = "dolium";
		know_self(self);
	} else {
		run_from_sealed_copy(argv, self);
	}
	if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)) {
		report(NULL, 0, "PR_SET_DUMPABLE: %s", strerror(errno));
		return 1;
	}
	struct question q = { 0 };
	put_text(&q.request, "program", program);
	put_context(&q.request, argv, environ);
	for (;;) {
		signal(SIGPIPE, SIG_IGN);
		if (for_people ? ask_for_people(self, argv, &q) : ask_warm(self, &q) && ask_cold(self, "runtime.cold", &q))
			return for_people ? 125 : 1;
		signal(SIGPIPE, SIG_DFL);
		if (q.answer.data[0] != 'P')
			return show_error(&q.answer);
		int status = run_plan(&q, inherited);
		if (status != AGAIN)
			return status;
	}
}
