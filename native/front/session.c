/* What the front does for `dolium` at the compiler's wish: a request to the daemon, or a whole session with a container.
 * Both are facts: the compiler is told how they went, and asks for each once. */
#include <arpa/inet.h>
#include <sys/signalfd.h>

#include "wire.h"

#define ROOM 65536
#define READER_GONE 141 /* as a shell reports SIGPIPE */

enum stream { STREAM_STDOUT = 1, STREAM_STDERR = 2, STREAM_EXIT = 4, STREAM_FAILURE = 5, STREAM_NOTE = 6 };

struct session {
	const char *path; /* the daemon's socket, up to a line end */
	int input, tty, proxy, exec, bare, last;
	int fd, signals;           /* signals: -1 until the other side is known */
	int answered, begun;       /* the 101 answer has come; a frame's header too */
	unsigned stream;           /* of that frame */
	size_t left, used;         /* of its data; bytes in `data` */
	size_t typed, typed_from;  /* bytes of `keys` that the socket had no room for */
	char id[128], data[ROOM], keys[16384];
};

/* Sends the REQUEST of "WORD PATH\nREQUEST"; the socket or -errno. */
static int send_request(const char *query) {
	const char *blank = strchr(query, ' '), *line = strchr(query, '\n');
	char path[PATH_MAX];
	if (!blank || !line || line < blank)
		return -EINVAL;
	TRY(format_path(path, "%.*s", (int)(line - blank) - 1, blank + 1));
	cleanup_fd fd = TRY(connect_unix(SOCK_STREAM, path));
	write_all(fd, line + 1, strlen(line + 1)); /* refused in the middle: the answer says why */
	return keep(&fd);
}

int http_fact(struct buffer *out, const char *query) {
	cleanup_fd fd = TRY(send_request(query));
	return read_whole(out, fd);
}

/* Tells the daemon; a container that has ended meanwhile does not matter. */
static void __attribute__((format(printf, 2, 3))) tell(const struct session *s, const char *format, ...) {
	char target[256], query[PATH_MAX + 512];
	cleanup_buffer ignored = { 0 };
	va_list args;
	va_start(args, format);
	vsnprintf(target, sizeof target, format, args);
	va_end(args);
	snprintf(query, sizeof query, "- %.*s\nPOST /%s/%s/%s HTTP/1.1\r\nHost: d\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
		 (int)strcspn(s->path, "\n"), s->path, s->exec ? "exec" : "containers", s->id, target);
	http_fact(&ignored, query);
}

static void tell_size(const struct session *s) {
	struct winsize size;
	if (s->tty && window_size(&size))
		tell(s, "resize?h=%d&w=%d", size.ws_row, size.ws_col);
}

/* From now on signals are the container's, and the terminal too. */
static void begin(struct session *s) {
	static const int forwarded[] = { SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGALRM };
	sigset_t set;
	sigemptyset(&set);
	for (size_t i = 0; s->proxy && i < sizeof forwarded / sizeof forwarded[0]; i++)
		sigaddset(&set, forwarded[i]);
	if (s->proxy || s->tty)
		sigaddset(&set, SIGCONT);
	if (s->tty) {
		sigaddset(&set, SIGWINCH);
		sigaddset(&set, SIGTSTP);
	}
	sigprocmask(SIG_BLOCK, &set, NULL);
	s->signals = signalfd(-1, &set, SFD_CLOEXEC);
	if (s->tty && s->input)
		make_raw();
}

static void take_signal(struct session *s) {
	struct signalfd_siginfo info;
	if (read(s->signals, &info, sizeof info) != sizeof info)
		return;
	if (info.ssi_signo == SIGTSTP) { /* stopped from outside: the terminal is the shell's until SIGCONT */
		restore_terminal();
		raise(SIGSTOP);
		return;
	}
	if (info.ssi_signo == SIGCONT && s->tty && s->input)
		make_raw();
	if (info.ssi_signo == SIGCONT || info.ssi_signo == SIGWINCH)
		tell_size(s);
	if (info.ssi_signo != SIGWINCH && s->proxy)
		tell(s, "kill?signal=%u", info.ssi_signo);
}

/* To the caller's own file, which may be non-blocking. When nobody reads any more, this process ends. */
static void put_out(int fd, const char *data, size_t len) {
	while (len) {
		ssize_t n = write(fd, data, len);
		if (n < 0 && errno == EAGAIN)
			poll(&(struct pollfd){ .fd = fd, .events = POLLOUT }, 1, -1);
		else if (n < 0 && errno != EINTR)
			exit(READER_GONE);
		if (n > 0) {
			data += n;
			len -= (size_t)n;
		}
	}
}

/* What was typed goes as far as there is room; the rest waits, and the terminal with it. */
static void put_keys(struct session *s) {
	ssize_t n = send(s->fd, s->keys + s->typed_from, s->typed, MSG_DONTWAIT | MSG_NOSIGNAL);
	if (n < 0 && errno != EAGAIN)
		s->typed = 0; /* the container's side has ended; its last output is still to be read */
	if (n > 0) {
		s->typed -= (size_t)n;
		s->typed_from += (size_t)n;
	}
}

static void take_keys(struct session *s) {
	ssize_t n = RETRY(read(0, s->keys, sizeof s->keys));
	if (n < 0 && errno == EAGAIN)
		return;
	s->typed_from = 0;
	s->typed = n > 0 ? (size_t)n : 0;
	if (s->typed) {
		put_keys(s);
	} else {
		shutdown(s->fd, SHUT_WR);
		s->input = 0;
	}
}

/* A whole frame that is not output: its outcome's strings, or 0. */
static int take_control(struct session *s, struct buffer *out, const char *data) {
	if (s->stream == STREAM_NOTE) {
		snprintf(s->id, sizeof s->id, "%.*s", (int)s->left, data);
		begin(s);
	}
	if (s->stream != STREAM_EXIT && s->stream != STREAM_FAILURE)
		return 0;
	if (s->last && s->stream == STREAM_EXIT) { /* nothing is left to be said */
		char code[16];
		snprintf(code, sizeof code, "%.*s", (int)s->left, data);
		restore_terminal();
		exit(atoi(code));
	}
	put_string(out, s->stream == STREAM_EXIT ? "exit" : "fail", 4);
	put_string(out, data, s->left);
	put_string(out, s->id, strlen(s->id));
	return 3;
}

/* Takes what has come, frame by frame: the outcome's strings, or 0. */
static int take_frames(struct session *s, struct buffer *out) {
	size_t at = s->bare ? s->used : 0;
	put_out(STREAM_STDOUT, s->data, at);
	int outcome = 0;
	while (!outcome) {
		if (!s->begun) {
			uint32_t size;
			if (s->used - at < 8)
				break;
			memcpy(&size, s->data + at + 4, sizeof size);
			s->stream = (unsigned char)s->data[at];
			s->left = ntohl(size);
			s->begun = 1;
			at += 8;
		}
		size_t n = s->used - at < s->left ? s->used - at : s->left;
		if (s->stream == STREAM_STDOUT || s->stream == STREAM_STDERR)
			put_out((int)s->stream, s->data + at, n);
		else if (n < s->left && s->left < ROOM)
			break;
		else if (n < s->left)
			return -EPROTO;
		else
			outcome = take_control(s, out, s->data + at);
		at += n;
		s->left -= n;
		s->begun = s->left > 0;
		if (s->begun)
			break;
	}
	s->used -= at;
	memmove(s->data, s->data + at, s->used);
	return outcome;
}

/* The head of the answer. One that opens no stream is the outcome, whole. */
static int take_answer(struct session *s, struct buffer *out) {
	char *end = memmem(s->data, s->used, "\r\n\r\n", 4);
	if (!end)
		return s->used < ROOM ? 0 : -EPROTO;
	if (memcmp(s->data + 9, "101", 3) && memcmp(s->data + 9, "200", 3)) {
		cleanup_buffer whole = { 0 };
		put_bytes(&whole, s->data, s->used);
		TRY(read_more(&whole, s->fd));
		put_string(out, "http", 4);
		put_string(out, whole.data, whole.used);
		return 2;
	}
	s->answered = 1;
	s->used -= (size_t)(end + 4 - s->data);
	memmove(s->data, end + 4, s->used);
	return 0;
}

static int relay(struct session *s, struct buffer *out) {
	for (;;) {
		int outcome = s->answered ? 0 : TRY(take_answer(s, out));
		if (!outcome && s->answered)
			outcome = TRY(take_frames(s, out));
		if (outcome)
			return outcome;
		struct pollfd p[3] = {
			{ .fd = s->fd, .events = (short)(POLLIN | (s->typed ? POLLOUT : 0)) },
			{ .fd = s->signals, .events = POLLIN },
			{ .fd = s->input && s->id[0] && !s->typed ? 0 : -1, .events = POLLIN },
		};
		TRY(or_errno(RETRY(poll(p, 3, -1))));
		if (p[1].revents)
			take_signal(s);
		if (p[0].revents & POLLOUT)
			put_keys(s);
		if (p[2].revents)
			take_keys(s);
		if (!(p[0].revents & ~POLLOUT))
			continue;
		int n = TRY(or_errno(RETRY(recv(s->fd, s->data + s->used, ROOM - s->used, 0))));
		if (n == 0) { /* detached, or the other side died */
			put_string(out, "end", 3);
			return 1;
		}
		s->used += (size_t)n;
	}
}

/* "LETTERS PATH\nREQUEST": i = standard input goes along, t = a terminal, p = signals go along, x = an exec,
 * b = what comes is bare output, without frames, e = its exit code is this program's. */
int session_fact(struct buffer *out, const char *query) {
	size_t letters = strcspn(query, " ");
	struct session *s = calloc(1, sizeof *s);
	sigset_t before;
	if (!s)
		return -ENOMEM;
	*s = (struct session){
		.path = query + letters + 1, .input = memchr(query, 'i', letters) != NULL, .signals = -1,
		.tty = memchr(query, 't', letters) != NULL, .proxy = memchr(query, 'p', letters) != NULL,
		.exec = memchr(query, 'x', letters) != NULL, .bare = memchr(query, 'b', letters) != NULL,
		.last = memchr(query, 'e', letters) != NULL,
		.fd = send_request(query),
	};
	sigprocmask(SIG_BLOCK, NULL, &before);
	int outcome = s->fd < 0 ? s->fd : relay(s, out);
	restore_terminal();
	sigprocmask(SIG_SETMASK, &before, NULL);
	close_fd(&s->fd);
	close_fd(&s->signals);
	free(s);
	return outcome;
}
