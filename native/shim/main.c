/* The spawner, which the daemon starts once, and the life of a shim, which the spawner forks: no exec, so that all shims
 * share the pages of one sealed image. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <time.h>

#include "shim.h"

#define DAEMON_FD 3
#define QUIET_MS 1000
#define STACK_KEPT 1024
#define STACK_DROPPED (512u << 10)

struct shim shim;

int watch(struct source *source, uint32_t events) {
	struct epoll_event event = { .events = events, .data.ptr = source };
	if (source->watched && source->events == events)
		return 0;
	if (epoll_ctl(shim.epoll, source->watched ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, source->fd, &event))
		return -errno;
	source->watched = 1;
	source->events = events;
	return 0;
}

void unwatch(struct source *source) {
	if (source->watched)
		epoll_ctl(shim.epoll, EPOLL_CTL_DEL, source->fd, NULL);
	source->watched = 0;
}

/* By hand out of the epoll set: a description that someone else holds too would stay in it. */
void source_close(struct source *source) {
	unwatch(source);
	close_fd(&source->fd);
}

int64_t now_ns(void) {
	struct timespec t;
	clock_gettime(CLOCK_REALTIME, &t);
	return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

void complain(const char *format, ...) {
	cleanup_fd fd = open("shim.log", O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0600);
	va_list args;
	if (fd < 0)
		return; /* no one is left to tell */
	dprintf(fd, "%lld ", (long long)now_ns());
	va_start(args, format);
	vdprintf(fd, format, args);
	va_end(args);
	dprintf(fd, "\n");
}

int write_record(const char *name, const struct buffer *b) {
	char fresh[ID_LIMIT + 16];
	cleanup_fd fd = -1;
	int result;
	snprintf(fresh, sizeof fresh, ".%s.new", name);
	fd = open(fresh, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (fd < 0)
		return -errno;
	result = b->failed ? -ENOMEM : write_all(fd, b->data, b->used);
	if (!result && rename(fresh, name))
		result = -errno;
	if (result)
		unlink(fresh);
	return result;
}

static void children_ready(struct source *source, uint32_t events) {
	struct signalfd_siginfo info;
	int status;
	pid_t pid;
	(void)events;
	if (read(source->fd, &info, sizeof info) < 0 && errno != EAGAIN)
		complain("read signals: %s", strerror(errno));
	while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
		process_reaped(pid, status);
}

static struct source children = { .fd = -1, .ready = children_ready };

/* Gives back what the last burst of work touched: buffers, and the stack below this frame. */
static void quiet(void) {
	uintptr_t top = ((uintptr_t)__builtin_frame_address(0) - STACK_KEPT) & ~(uintptr_t)4095;
	madvise((void *)(top - STACK_DROPPED), STACK_DROPPED, MADV_DONTNEED);
	madvise(shim.scratch, SCRATCH_SIZE + BATCH_SIZE, MADV_DONTNEED);
	shim.dirty = 0;
	if (shim.unrecorded)
		write_exit_records();
}

/* One event at a time: a handler may free whatever it likes. */
static void loop(void) {
	struct epoll_event event;
	shim.dirty = 1;
	while (!shim.ending || unsent_answers() || unread_clients()) {
		int n = epoll_wait(shim.epoll, &event, 1, shim.dirty || shim.unrecorded ? QUIET_MS : -1);
		struct source *source = event.data.ptr;
		if (n == 1) {
			shim.dirty = 1;
			source->ready(source, event.events);
		} else if (n == 0) {
			quiet();
		}
	}
}

/* ---- how a shim begins ---- */

struct verdict {
	int number; /* errno */
	pid_t pid;
	uint64_t start_time;
	char step[64];
};

static int failed(struct verdict *v, const char *step, int number) {
	v->number = number;
	snprintf(v->step, sizeof v->step, "%s", step);
	return -1;
}

static void name_self(struct verdict *v) {
	v->pid = getpid();
	v->start_time = process_start_time(v->pid);
}

/* What the daemon said of the shim, and who the shim is. */
static int write_state(const struct buffer *request) {
	struct buffer b = { 0 };
	int result;
	put_bytes(&b, request->data, request->used);
	put_number(&b, "version", SHIM_VERSION);
	put_number(&b, "pid", shim.pid);
	put_number(&b, "start_time", (long long)shim.start_time);
	result = write_record("shim.state", &b);
	buffer_free(&b);
	return result;
}

static int set_up(struct verdict *v, const struct buffer *request) {
	sigset_t all, child;
	int result;
	signal(SIGCHLD, SIG_DFL);
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	sigemptyset(&child);
	sigaddset(&child, SIGCHLD);
	if (setsid() < 0 || prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) || prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
		return failed(v, "setsid, prctl", errno);
	if (chdir(fields_get(request, "dir").data))
		return failed(v, "chdir to the shim's folder", errno);
	name_self(v);
	shim.pid = v->pid;
	shim.start_time = v->start_time;
	shim.nonce = strdup(fields_get(request, "nonce").data);
	shim.scratch = mmap(NULL, SCRATCH_SIZE + BATCH_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	shim.batch = shim.scratch + SCRATCH_SIZE;
	if (!shim.nonce || shim.scratch == MAP_FAILED)
		return failed(v, "get memory", ENOMEM);
	shim.epoll = epoll_create1(EPOLL_CLOEXEC);
	children.fd = signalfd(-1, &child, SFD_CLOEXEC | SFD_NONBLOCK);
	if (shim.epoll < 0 || children.fd < 0 || watch(&children, EPOLLIN))
		return failed(v, "epoll", errno);
	result = listen_for_daemon();
	if (result)
		return failed(v, "listen on shim.sock", -result);
	result = write_state(request);
	return result ? failed(v, "write shim.state", -result) : 0;
}

static void __attribute__((noreturn)) shim_main(struct verdict *v, struct buffer *request, int report) {
	int result;
	report = dup3(report, DAEMON_FD, O_CLOEXEC);
	sys_close_range(DAEMON_FD + 1, ~0u, 0);
	result = set_up(v, request);
	buffer_free(request);
	if (write_all(report, v, sizeof *v) || result)
		_exit(1);
	close(report);
	loop();
	_exit(0);
}

static void spawn(struct buffer *request, struct verdict *v) {
	int pair[2];
	pid_t pid;
	memset(v, 0, sizeof *v);
	if (fields_get(request, "dir").data[0] != '/' || !fields_get(request, "nonce").len) {
		failed(v, "spawn needs an absolute dir and a nonce", EINVAL);
		return;
	}
	if (pipe2(pair, O_CLOEXEC)) {
		failed(v, "pipe", errno);
		return;
	}
	pid = fork();
	if (pid == 0)
		shim_main(v, request, pair[1]);
	close(pair[1]);
	if (pid < 0)
		failed(v, "fork", errno);
	else if (read(pair[0], v, sizeof *v) != sizeof *v)
		failed(v, "the shim died while it was set up", ECANCELED);
	close(pair[0]);
}

/* ---- the spawner ---- */

static int answer(const struct verdict *v) {
	struct buffer b = { 0 };
	int result;
	if (v->number) {
		put_text(&b, "error", v->step);
		put_number(&b, "errno", v->number);
	}
	put_number(&b, "version", SHIM_VERSION);
	put_number(&b, "pid", v->pid);
	put_number(&b, "start_time", (long long)v->start_time);
	result = send_frame(DAEMON_FD, &b);
	buffer_free(&b);
	return result;
}

/* Out of the daemon's session and cgroups: what is done to those must not reach a container. */
static void leave_daemon(struct verdict *v, char **procs) {
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);
	if (null < 0 || dup2(null, 0) < 0 || dup2(null, 1) < 0 || dup2(null, 2) < 0)
		failed(v, "open /dev/null", errno);
	sys_close_range(DAEMON_FD + 1, ~0u, 0);
	if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) || prctl(PR_SET_NAME, "dolium-shim", 0, 0, 0))
		failed(v, "prctl", errno);
	if (setsid() < 0 && getsid(0) != getpid())
		failed(v, "setsid", errno);
	for (; *procs && !v->number; procs++) {
		int result = write_path(AT_FDCWD, *procs, "0", 1);
		if (result)
			failed(v, *procs, -result);
	}
	name_self(v);
}

static int spawner(char **procs) {
	uint64_t none[4] = { 0 }; /* an empty mask, and the kernel's struct sigaction for SIG_DFL */
	struct buffer request = { 0 };
	struct verdict v = { 0 };
	/* By the raw calls: libc keeps some numbers to itself, but the caller may have left them ignored too. */
	syscall(SYS_rt_sigprocmask, SIG_SETMASK, none, NULL, sizeof none[0]);
	for (int number = 1; number <= 64; number++)
		syscall(SYS_rt_sigaction, number, none, NULL, sizeof none[0]);
	umask(022);
	leave_daemon(&v, procs);
	signal(SIGCHLD, SIG_IGN); /* the kernel reaps shims that end */
	if (answer(&v) || v.number)
		return 1;
	while (!receive_frame(DAEMON_FD, &request)) {
		spawn(&request, &v);
		if (answer(&v))
			break;
	}
	return 0;
}

int main(int argc, char **argv) {
	if (argc >= 2 && !strcmp(argv[1], "--spawner"))
		return spawner(argv + 2);
	dprintf(2, "usage: dolium-shim --spawner [CGROUP.PROCS ...]  (doliumd starts it, with a socket as fd 3)\n");
	return 2;
}
