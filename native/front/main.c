/* dolium-front, installed as dolium-runtime: sends what it was asked to the compiler, runs the plan that comes back in the
 * caller's own process tree, and exits. It decides nothing. */
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/sendfile.h>
#include <sys/wait.h>
#include <time.h>

#include "wire.h"

#define SELF_VARIABLE "_DOLIUM_FRONT="

extern char **environ;

static void write_log(const char *path, int json, const char *message) {
	cleanup_fd fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
	char stamp[32], line[4096];
	time_t now = time(NULL);
	struct tm tm;
	size_t n = 0;
	if (fd < 0)
		return; /* the message is on standard error too */
	gmtime_r(&now, &tm);
	strftime(stamp, sizeof stamp, "%Y-%m-%dT%H:%M:%SZ", &tm);
	if (!json) {
		dprintf(fd, "time=\"%s\" level=error msg=\"%s\"\n", stamp, message);
		return;
	}
	for (const char *p = message; *p && n + 8 < sizeof line; p++) {
		unsigned char c = (unsigned char)*p;
		if (c == '"' || c == '\\')
			line[n++] = '\\', line[n++] = (char)c;
		else if (c < 0x20)
			n += (size_t)snprintf(line + n, 7, "\\u%04x", c);
		else
			line[n++] = (char)c;
	}
	line[n] = '\0';
	dprintf(fd, "{\"level\":\"error\",\"msg\":\"%s\",\"time\":\"%s\"}\n", line, stamp);
}

static void __attribute__((format(printf, 3, 4))) report(const char *log_path, int json, const char *format, ...) {
	char message[2048];
	va_list args;
	va_start(args, format);
	vsnprintf(message, sizeof message, format, args);
	va_end(args);
	fprintf(stderr, "dolium-runtime: %s\n", message);
	if (log_path && *log_path)
		write_log(log_path, json, message);
}

/* Runs again from a sealed copy in memory, so that nothing in a container can reach the program on disk through
 * /proc/PID/exe of a process that is on its way in (CVE-2019-5736). Returns only when it runs from the copy already. */
static void run_from_sealed_copy(char **argv, char *self, size_t size) {
	cleanup_fd disk = -1;
	int copy;
	struct stat st;
	ssize_t n;
	char variable[PATH_MAX + 32];
	for (char **e = environ; *e; e++)
		if (!strncmp(*e, SELF_VARIABLE, sizeof SELF_VARIABLE - 1)) {
			snprintf(self, size, "%s", *e + sizeof SELF_VARIABLE - 1);
			for (; *e; e++)
				e[0] = e[1];
			/* Believed only when it is true: seals cannot be forged by an environment. */
			copy = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
			n = copy < 0 ? -1 : fcntl(copy, F_GET_SEALS);
			if (copy >= 0)
				close(copy);
			if (n > 0 && n & F_SEAL_WRITE)
				return;
			break;
		}
	n = readlink("/proc/self/exe", self, size - 1);
	if (n < 0) {
		report(NULL, 0, "read /proc/self/exe: %s", strerror(errno));
		exit(1);
	}
	self[n] = '\0';
	disk = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
	copy = memfd_create("dolium-front", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (disk < 0 || copy < 0 || fstat(disk, &st))
		goto failed;
	while ((n = sendfile(copy, disk, NULL, (size_t)st.st_size)) > 0)
		;
	if (n < 0 || fcntl(copy, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL))
		goto failed;
	snprintf(variable, sizeof variable, "%s%s", SELF_VARIABLE, self);
	{
		size_t count = 0;
		char **env;
		while (environ[count])
			count++;
		env = calloc(count + 2, sizeof *env);
		if (!env)
			goto failed;
		env[0] = variable;
		memcpy(env + 1, environ, count * sizeof *env);
		syscall(SYS_execveat, copy, "", argv, env, AT_EMPTY_PATH);
	}
failed:
	report(NULL, 0, "make a sealed copy of %s: %s", self, strerror(errno));
	exit(1);
}

struct answer {
	struct buffer frame;
	char kind;
};

/* The next string of a body; "" and no step when it is malformed. */
static const char *next_text(const char **at, const char *end) {
	uint32_t len;
	const char *text;
	if (end - *at < 5)
		return "";
	memcpy(&len, *at, 4);
	text = *at + 4;
	if ((size_t)(end - text) < (size_t)len + 1 || text[len] != '\0')
		return "";
	*at = text + len + 1;
	return text;
}

/* Asks, feeding facts, until there is a plan or an error. 0 or -errno. */
static int ask(int socket, struct buffer *request, struct answer *answer) {
	for (;;) {
		int result = send_frame(socket, request);
		if (!result)
			result = receive_frame(socket, &answer->frame);
		if (result)
			return result;
		if (answer->frame.used < 1)
			return -EPROTO;
		answer->kind = answer->frame.data[0];
		if (answer->kind != 'N')
			return 0;
		/* Body: u32 count, strings. The list was encoded by the compiler; walk it with care all the same. */
		request->used = 0;
		const char *at = answer->frame.data + 1, *end = answer->frame.data + answer->frame.used;
		while (end - at > 4) {
			const char *before = at, *query = next_text(&at, end);
			if (at == before)
				return -EPROTO;
			put_fact(request, query);
		}
	}
}

static int show_error(const struct answer *answer) {
	const char *at = answer->frame.data + 1, *end = answer->frame.data + answer->frame.used;
	const char *code = next_text(&at, end), *message = next_text(&at, end);
	const char *log = next_text(&at, end), *format = next_text(&at, end);
	report(log, !strcmp(format, "json"), "%s", message);
	return atoi(code) ? atoi(code) : 1;
}

/* While the container runs, `exec`, `kill` and `delete` must not wait for this process: the lock is given back. Taken
 * again for the clean-up; -1 when somebody else removed the container meanwhile, and there is nothing to clean up. */
static int lock_again(struct launch *launch) {
	const struct op *lock = find_op(launch->plan, OP_lock);
	return lock ? do_lock(launch, lock) : 0;
}

static int run_plan(const struct answer *answer) {
	struct launch launch;
	struct plan plan;
	const char *why;
	sigset_t all;
	int status;
	if (plan_decode(answer->frame.data + 1, answer->frame.used - 1, &plan, &why)) {
		report(NULL, 0, "the compiler's answer is no plan: %s", why);
		return 1;
	}
	if (launch_init(&launch, &plan))
		goto failed;
	/* A Ctrl-C in the middle waits until nothing is half made. */
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	if (launch_create(&launch))
		goto failed;
	status = launch.held_exit;
	if (find_op(&plan, OP_clone) && !find_op(&plan, OP_wait_start)) {
		if (launch_start(&launch))
			goto failed;
		if (launch.wants_hold) {
			close_fd(&launch.slot[LOCK_SLOT]);
			status = hold_until_exit(&launch);
			if (!lock_again(&launch) && launch_after_exit(&launch))
				report(launch.log_path, launch.log_json, "%s", launch.failure.text);
		}
	}
	launch_end(&launch);
	plan_free(&plan);
	return status;
failed:
	report(launch.log_path, launch.log_json, "%s", launch.failure.text);
	launch_end(&launch);
	plan_free(&plan);
	return launch.held_exit > 0 ? launch.held_exit : 1;
}

int main(int argc, char **argv) {
	char self[PATH_MAX];
	struct buffer request = { 0 };
	struct answer answer = { .frame = { 0 } };
	pid_t compiler = -1;
	int socket, result, status;
	run_from_sealed_copy(argv, self, sizeof self);
	if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)) {
		report(NULL, 0, "PR_SET_DUMPABLE: %s", strerror(errno));
		return 1;
	}
	signal(SIGPIPE, SIG_IGN);
	put_context(&request, argc, argv, environ);
	socket = start_cold_compiler(self, &compiler);
	if (socket < 0) {
		report(NULL, 0, "start the compiler: %s (is the package dolium beside %s?)", strerror(-socket), self);
		return 1;
	}
	result = ask(socket, &request, &answer);
	close(socket);
	wait_for(compiler, &status);
	if (result) {
		report(NULL, 0, "the compiler broke off: %s (its own message is above)", strerror(-result));
		return 1;
	}
	signal(SIGPIPE, SIG_DFL);
	buffer_free(&request);
	result = answer.kind == 'P' ? run_plan(&answer) : show_error(&answer);
	buffer_free(&answer.frame);
	return result;
}
