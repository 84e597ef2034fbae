/* The spawner, which the daemon starts once, and the life of a shim, which the spawner forks: no exec, so that all shims
 * share the pages of one sealed image. */
#include <locale.h>
#include <sys/signalfd.h>

#include "shim.h"

#define DAEMON_FD 3
#define QUIET_MS 1000
#define COMPLAINTS_LIMIT (256 << 10)
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

void complain(const char *format, ...) {
	cleanup_fd fd = open("shim.log", O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (fd < 0 || lseek(fd, 0, SEEK_END) > COMPLAINTS_LIMIT)
		return; /* no one is left to tell; and a container must not fill the host's memory by what it provokes */
	dprintf(fd, "%lld ", (long long)clock_ns(CLOCK_REALTIME));
	va_list args;
	va_start(args, format);
	vdprintf(fd, format, args);
	va_end(args);
	dprintf(fd, "\n");
}

int write_record(const char *name, const struct buffer *b) {
	char fresh[ID_LIMIT + 16];
	snprintf(fresh, sizeof fresh, ".%s.new", name);
	return b->failed ? -ENOMEM : replace_file(name, fresh, 0600, b->data, b->used);
}

static void children_ready(struct source *source) {
	struct signalfd_siginfo info;
	if (read(source->fd, &info, sizeof info) < 0 && errno != EAGAIN)
		complain("read signals: %s", strerror(errno));
	/* One at a time, for others to be heard: with the host's pids a container can make orphans without end. */
	int status, pid = waitpid(-1, &status, WNOHANG);
	if (pid > 0 && !kill(shim.pid, SIGCHLD))
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
		if (n == 0 || (shim.unrecorded && clock_ns(CLOCK_MONOTONIC) > shim.retry_at))
			quiet();
		if (n != 1)
			continue;
		struct source *source = event.data.ptr;
		shim.dirty = 1;
		source->got = event.events;
		source->ready(source);
	}
}

/* ---- how a shim begins ---- */

static const char *step; /* what is done now: named when it fails */

static void know_self(void) {
	shim.pid = getpid();
	shim.start_time = process_start_time(shim.pid);
}

void put_self(struct buffer *b) {
	put_number(b, "version", SHIM_VERSION);
	put_number(b, "pid", shim.pid);
	put_number(b, "start_time", (long long)shim.start_time);
}

static int answer(int fd, int result) {
	cleanup_buffer b = { 0 };
	if (result) {
		put_text(&b, "error", step);
		put_number(&b, "errno", -result);
	}
	put_self(&b);
	return send_frame(fd, &b);
}

static int set_up(const struct buffer *request) {
	sigset_t all;
	signal(SIGCHLD, SIG_DFL);
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	step = "setsid, prctl";
	if (setsid() < 0 || prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) || prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
		return -errno;
	step = "chdir to the shim's folder";
	TRY(or_errno(chdir(fields_get(request, "dir").data)));
	know_self();
	step = "get memory";
	shim.nonce = strdup(fields_get(request, "nonce").data);
	shim.scratch = mmap(NULL, SCRATCH_SIZE + BATCH_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			    -1, 0);
	shim.batch = shim.scratch + SCRATCH_SIZE;
	if (!shim.nonce || shim.scratch == MAP_FAILED)
		return -ENOMEM;
	step = "epoll";
	shim.epoll = epoll_create1(EPOLL_CLOEXEC);
	children.fd = signalfd(-1, &all, SFD_CLOEXEC | SFD_NONBLOCK);
	if (shim.epoll < 0 || children.fd < 0 || watch(&children, EPOLLIN))
		return -errno;
	step = "listen on shim.sock";
	TRY(listen_for_daemon());
	step = "write shim.state";
	cleanup_buffer state = { 0 }; /* what the daemon said of the shim, and who the shim is */
	put_bytes(&state, request->data, request->used);
	put_self(&state);
	return write_record("shim.state", &state);
}

static void __attribute__((noreturn)) shim_main(struct buffer *request, int report) {
	report = dup3(report, DAEMON_FD, O_CLOEXEC);
	sys_close_range(DAEMON_FD + 1, ~0u, 0);
	int result = set_up(request);
	buffer_free(request);
	if (answer(report, result) || result)
		_exit(1);
	close(report);
	loop();
	_exit(0);
}

/* ---- the spawner ---- */

/* The answer is the new shim's own, unless there is none. */
static int spawn(struct buffer *request, struct buffer *its_answer) {
	int pair[2];
	step = "spawn needs an absolute dir and a nonce";
	if (fields_get(request, "dir").data[0] != '/' || !fields_get(request, "nonce").len)
		return -EINVAL;
	step = "pipe";
	TRY(or_errno(pipe2(pair, O_CLOEXEC)));
	cleanup_fd report = pair[0], childs = pair[1];
	step = "fork";
	if (TRY(or_errno(fork())) == 0)
		shim_main(request, childs);
	close_fd(&childs);
	step = "the shim died while it was set up";
	return receive_frame(report, its_answer) ? -ECANCELED : 0;
}

/* Out of the daemon's session and cgroups: what is done to those must not reach a container. */
static int leave_daemon(char **procs) {
	know_self();
	step = "open /dev/null";
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);
	if (null < 0 || dup2(null, 0) < 0 || dup2(null, 1) < 0 || dup2(null, 2) < 0)
		return -errno;
	sys_close_range(DAEMON_FD + 1, ~0u, 0);
	step = "prctl";
	if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) || prctl(PR_SET_NAME, "dolium-shim", 0, 0, 0))
		return -errno;
	step = "setsid";
	if (setsid() < 0 && getsid(0) != getpid())
		return -errno;
	for (; *procs; procs++) {
		step = *procs;
		TRY(write_path(AT_FDCWD, step, "0", 1));
	}
	return 0;
}

static int spawner(char **procs) {
	uint64_t none[4] = { 0 }; /* an empty mask, and the kernel's struct sigaction for SIG_DFL */
	struct buffer request = { 0 };
	/* By the raw calls: libc keeps some numbers to itself, but the caller may have left them ignored too. */
	syscall(SYS_rt_sigprocmask, SIG_SETMASK, none, NULL, sizeof none[0]);
	for (int number = 1; number <= 64; number++)
		syscall(SYS_rt_sigaction, number, none, NULL, sizeof none[0]);
	umask(022);
	uselocale(newlocale(LC_ALL_MASK, "C.UTF-8", NULL)); /* for the log; setlocale would cost each shim a page */
	int result = leave_daemon(procs);
	signal(SIGCHLD, SIG_IGN); /* the kernel reaps shims that end */
	if (answer(DAEMON_FD, result) || result)
		return 1;
	while (!receive_frame(DAEMON_FD, &request)) {
		cleanup_buffer its_answer = { 0 };
		result = spawn(&request, &its_answer);
		if (result ? answer(DAEMON_FD, result) : send_frame(DAEMON_FD, &its_answer))
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
