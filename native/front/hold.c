/* The caller's terminal; and `run` and `exec` of the runtime in the foreground: the front stays, relays the terminal,
 * forwards signals, returns the status. */
#include <termios.h>

#include "wire.h"

static struct termios saved;
static int raw;

void restore_terminal(void) {
	if (raw)
		tcsetattr(0, TCSADRAIN, &saved);
	raw = 0;
}

void make_raw(void) {
	if (raw || tcgetattr(0, &saved))
		return;
	struct termios now = saved;
	cfmakeraw(&now); /* output too: the container's own pty has turned line ends into CR LF already */
	if (tcsetattr(0, TCSADRAIN, &now) == 0) {
		raw = 1;
		atexit(restore_terminal);
	}
}

int window_size(struct winsize *size) {
	for (int fd = 0; fd < 3; fd++)
		if (ioctl(fd, TIOCGWINSZ, size) == 0)
			return 1;
	return 0;
}

static void copy_size(int console) {
	struct winsize size;
	if (window_size(&size))
		ioctl(console, TIOCSWINSZ, &size);
}

/* Bytes moved, 0 at the end, -1 when there is nothing now. */
static ssize_t relay(int from, int to) {
	char chunk[16384];
	ssize_t n = read(from, chunk, sizeof chunk);
	if (n < 0)
		return errno == EAGAIN || errno == EINTR ? -1 : 0;
	if (n > 0 && write_all(to, chunk, (size_t)n))
		return 0;
	return n;
}

/* Reaps what ended; 1 when init was among it. */
static int reap(struct launch *launch, int *status) {
	pid_t pid;
	while ((pid = waitpid(-1, status, WNOHANG)) > 0)
		if (pid == launch->pid)
			return 1;
	return 0;
}

int hold_until_exit(struct launch *launch) {
	cleanup_fd signals = all_signals();
	if (signals < 0)
		return 1;
	if (launch->console >= 0) {
		make_raw();
		copy_size(launch->console);
	}
	struct pollfd p[4] = {
		{ .fd = signals, .events = POLLIN },
		{ .fd = launch->pidfd, .events = POLLIN },
		{ .fd = launch->console, .events = POLLIN },
		{ .fd = launch->console >= 0 ? 0 : -1, .events = POLLIN },
	};
	int status = 0;
	while (!reap(launch, &status)) {
		if (poll(p, 4, -1) < 0 && errno != EINTR)
			break;
		if (p[0].revents && pass_signal(signals, launch->pidfd, launch->console < 0 ? 0 : SIGWINCH))
			copy_size(launch->console);
		if (p[2].revents && relay(launch->console, 1) == 0)
			p[2].fd = -1;
		if (p[3].revents && relay(0, launch->console) == 0)
			p[3].fd = -1;
	}
	if (launch->console >= 0) {
		fcntl(launch->console, F_SETFL, O_NONBLOCK);
		while (relay(launch->console, 1) > 0)
			;
	}
	restore_terminal();
	return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}
