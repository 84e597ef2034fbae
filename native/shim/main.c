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
	if (source->watched && source->events == events)
		return 0;
	struct epoll_event event = { .events = events, .data.ptr = source };
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
	if (fd < 0)
		return; /* no one is left to tell */
	dprintf(fd, "%lld ", (long long)now_ns());
	va_list args;
	va_start(args, format);
	vdprintf(fd, format, args);
	va_end(args);
	dprintf(fd, "\n");
}

int write_record(const char *name, const struct buffer *b) {
	char fresh[ID_LIMIT + 16];
	snprintf(fresh, sizeof fresh, ".%s.new", name);
	cleanup_fd fd = open(fresh, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (fd < 0)
		return -errno;
	int result = b->failed ? -ENOMEM : write_all(fd, b->data, b->used);
	if (!result && rename(fresh, name))
		result = -errno;
	if (result)
		unlink(fresh);
	return result;
}

static void children_ready(struct source *source, uint32_t events) {
	struct signalfd_siginfo info;
	(void)events;
	if (read(source->fd, &info, sizeof info) < 0 && errno != EAGAIN)
		complain("read signals: %s", strerror(errno));
	for (int pid, status; (pid = waitpid(-1, &status, WNOHANG)) > 0;)
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
	shim.dirty = 1;
	while (!shim.ending || unsent_answers() || unread_clients()) {
		struct epoll_event event;
		int n = epoll_wait(shim.epoll, &event, 1, shim.dirty || shim.unrecorded ? QUIET_MS : -1);
		if (n == 0)
			quiet();
		if (n != 1)
			continue;
		struct source *source = event.data.ptr;
		shim.dirty = 1;
		source->ready(source, event.events);
	}
}

/* ---- how a shim begins ---- */

struct verdict {
	int number; /* errno */
	pid_t pid;
	uint64_t start_time;
	char step[64];
};

/* Gives the step's result back, 0 or -errno; a failure is written down. */
static int step(struct verdict *v, const char *name, int result) {
	v->number = -result;
	if (result)
		snprintf(v->step, sizeof v->step, "%s", name);
	return result;
}

static void name_self(struct verdict *v) {
	shim.pid = v->pid = getpid();
	shim.start_time = v->start_time = process_start_time(v->pid);
}

/* What the daemon said of the shim, and who the shim is. */
static int write_state(const struct buffer *request) {
	cleanup_buffer b = { 0 };
	put_bytes(&b, request->data, request->used);
	put_number(&b, "version", SHIM_VERSION);
	put_number(&b, "pid", shim.pid);
	put_number(&b, "start_time", (long long)shim.start_time);
	return write_record("shim.state", &b);
}

static int set_up(struct verdict *v, const struct buffer *request) {
	sigset_t all, child;
	signal(SIGCHLD, SIG_DFL);
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	sigemptyset(&child);
	sigaddset(&child, SIGCHLD);
	if (setsid() < 0 || prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) || prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
		return step(v, "setsid, prctl", -errno);
	if (chdir(fields_get(request, "dir").data))
		return step(v, "chdir to the shim's folder", -errno);
	name_self(v);
	shim.nonce = strdup(fields_get(request, "nonce").data);
	shim.scratch = mmap(NULL, SCRATCH_SIZE + BATCH_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			    -1, 0);
	shim.batch = shim.scratch + SCRATCH_SIZE;
	if (!shim.nonce || shim.scratch == MAP_FAILED)
		return step(v, "get memory", -ENOMEM);
	shim.epoll = epoll_create1(EPOLL_CLOEXEC);
	children.fd = signalfd(-1, &child, SFD_CLOEXEC | SFD_NONBLOCK);
	if (shim.epoll < 0 || children.fd < 0 || watch(&children, EPOLLIN))
		return step(v, "epoll", -errno);
	TRY(step(v, "listen on shim.sock", listen_for_daemon()));
	return step(v, "write shim.state", write_state(request));
}

static void __attribute__((noreturn)) shim_main(struct verdict *v, struct buffer *request, int report) {
	report = dup3(report, DAEMON_FD, O_CLOEXEC);
	sys_close_range(DAEMON_FD + 1, ~0u, 0);
	int result = set_up(v, request);
	buffer_free(request);
	if (write_all(report, v, sizeof *v) || result)
		_exit(1);
	close(report);
	loop();
	_exit(0);
}

static int spawn(struct verdict *v, struct buffer *request) {
	int pair[2];
	memset(v, 0, sizeof *v);
	if (fields_get(request, "dir").data[0] != '/' || !fields_get(request, "nonce").len)
		return step(v, "spawn needs an absolute dir and a nonce", -EINVAL);
	if (pipe2(pair, O_CLOEXEC))
		return step(v, "pipe", -errno);
	pid_t pid = fork();
	if (pid == 0)
		shim_main(v, request, pair[1]);
	close(pair[1]);
	cleanup_fd report = pair[0];
	if (pid < 0)
		return step(v, "fork", -errno);
	return read(report, v, sizeof *v) == sizeof *v ? 0 : step(v, "the shim died while it was set up", -ECANCELED);
}

/* ---- the spawner ---- */

static int answer(const struct verdict *v) {
	cleanup_buffer b = { 0 };
	if (v->number) {
		put_text(&b, "error", v->step);
		put_number(&b, "errno", v->number);
	}
	put_number(&b, "version", SHIM_VERSION);
	put_number(&b, "pid", v->pid);
	put_number(&b, "start_time", (long long)v->start_time);
	return send_frame(DAEMON_FD, &b);
}

/* Out of the daemon's session and cgroups: what is done to those must not reach a container. */
static int leave_daemon(struct verdict *v, char **procs) {
	name_self(v);
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);
	if (null < 0 || dup2(null, 0) < 0 || dup2(null, 1) < 0 || dup2(null, 2) < 0)
		return step(v, "open /dev/null", -errno);
	sys_close_range(DAEMON_FD + 1, ~0u, 0);
	if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) || prctl(PR_SET_NAME, "dolium-shim", 0, 0, 0))
		return step(v, "prctl", -errno);
	if (setsid() < 0 && getsid(0) != getpid())
		return step(v, "setsid", -errno);
	for (; *procs; procs++)
		TRY(step(v, *procs, write_path(AT_FDCWD, *procs, "0", 1)));
	return 0;
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
	int result = leave_daemon(&v, procs);
	signal(SIGCHLD, SIG_IGN); /* the kernel reaps shims that end */
	if (answer(&v) || result)
		return 1;
	while (!receive_frame(DAEMON_FD, &request)) {
		spawn(&v, &request);
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
