/* The daemon's connection. docs/shim-protocol.md lists the messages. A connection that sends half a frame, or reads
 * nothing, holds up nothing: all is non-blocking, and what waits to be sent is bounded. */

#include "shim.h"

#define UNSENT_LIMIT (4u << 20)
#define MAX_FDS 253 /* SCM_MAX_FD */

struct connection {
	struct connection *next;
	struct source source;
	uint32_t size; /* of the body that comes */
	size_t have;   /* bytes of size and body */
	struct buffer frame, unsent;
	size_t sent;
	int *fds;
	unsigned fd_count;
};

static struct connection *connections, *current; /* current: the one that said the right hello last */

static void drop_frame(struct connection *c) {
	for (unsigned i = 0; i < c->fd_count; i++)
		close_fd(&c->fds[i]);
	free(c->fds);
	c->fds = NULL;
	c->fd_count = 0;
	c->have = 0;
	buffer_free(&c->frame);
}

static void connection_close(struct connection *c) {
	UNLINK(&connections, c);
	if (current == c) {
		current = NULL;
		say_last_words();
	}
	source_close(&c->source);
	drop_frame(c);
	buffer_free(&c->unsent);
	free(c);
}

/* ---- sending ---- */

static void send_unsent(struct connection *c) {
	while (c->sent < c->unsent.used) {
		ssize_t n = send(c->source.fd, c->unsent.data + c->sent, c->unsent.used - c->sent,
				 MSG_DONTWAIT | MSG_NOSIGNAL);
		if (n < 0 && errno == EAGAIN) {
			watch(&c->source, EPOLLIN | EPOLLOUT);
			return;
		}
		if (n < 0) {
			shutdown(c->source.fd, SHUT_RDWR); /* the loop sees the end and closes */
			break;
		}
		c->sent += (size_t)n;
	}
	buffer_free(&c->unsent);
	c->sent = 0;
	watch(&c->source, EPOLLIN);
}

static void send_body(struct connection *c, struct buffer *body) {
	put_u32(&c->unsent, (uint32_t)body->used);
	put_bytes(&c->unsent, body->data, body->used);
	if (body->failed || c->unsent.failed || c->unsent.used - c->sent > UNSENT_LIMIT) {
		/* `hello` on a new connection tells what is lost with this one. */
		shutdown(c->source.fd, SHUT_RDWR);
		c->sent = c->unsent.used;
	}
	send_unsent(c);
	buffer_free(body);
}

void send_event(struct buffer *b) { current ? send_body(current, b) : buffer_free(b); }

int daemon_is_here(void) { return current != NULL; }

int unsent_answers(void) { return current && current->unsent.used; }

unsigned flag(const struct request *r, const char *key) { return fields_number(&r->frame, key, 0) != 0; }

int refuse(struct request *r, int result, const char *format, ...) {
	va_list args;
	va_start(args, format);
	vsnprintf(r->why, sizeof r->why, format, args);
	va_end(args);
	return result;
}

/* ---- requests ---- */

static int request_hello(struct request *r) {
	REFUSE_IF(fields_number(&r->frame, "version", 0) != SHIM_VERSION, r, -EPROTO, "this shim speaks version %d", SHIM_VERSION);
	REFUSE_IF(strcmp(fields_get(&r->frame, "nonce").data, shim.nonce), r, -EACCES, "the nonce is another shim's");
	put_self(&r->answer);
	put_processes(&r->answer);
	if (current && current != r->from)
		connection_close(current);
	current = r->from;
	return 0;
}

static const struct {
	const char *type;
	request_function *handle;
} handlers[] = {
	{ "hello", request_hello },   { "launch", request_launch },
	{ "attach", request_attach }, { "resize", request_resize },
	{ "signal", request_signal }, { "forget", request_forget },
	{ "end", request_end },
};

static int handle(struct request *r) {
	const char *type = fields_get(&r->frame, "type").data;
	REFUSE_IF(current != r->from && strcmp(type, "hello"), r, -EPERM, "say hello first");
	for (size_t i = 0; i < sizeof handlers / sizeof handlers[0]; i++)
		if (!strcmp(type, handlers[i].type))
			return handlers[i].handle(r);
	return refuse(r, -ENOSYS, "unknown request type %.64s", type);
}

static void answer(struct connection *c) {
	struct request r = { .from = c, .frame = c->frame, .fds = c->fds, .fd_count = c->fd_count, .op = UINT32_MAX };
	int result = handle(&r);
	put_number(&r.answer, "answer", fields_number(&r.frame, "request", 0));
	if (!result) {
		put_number(&r.answer, "ok", 1);
	} else {
		put_text(&r.answer, "error", r.why);
		put_number(&r.answer, "errno", -result);
		if (r.op != UINT32_MAX)
			put_number(&r.answer, "op", r.op);
	}
	drop_frame(c);
	send_body(c, &r.answer);
}

/* ---- receiving ---- */

/* The kernel puts all fds of one message into one header. */
static int take_fds(struct connection *c, struct msghdr *msg) {
	struct cmsghdr *m = CMSG_FIRSTHDR(msg);
	size_t size = m && m->cmsg_level == SOL_SOCKET && m->cmsg_type == SCM_RIGHTS ? m->cmsg_len - CMSG_LEN(0) : 0;
	if (!size)
		return 0;
	if (!c->fds && !(msg->msg_flags & MSG_CTRUNC))
		c->fds = malloc(size);
	if (!c->fds || c->fd_count) {
		for (size_t at = 0; at < size; at += sizeof(int))
			close(*(int *)(void *)(CMSG_DATA(m) + at));
		return -EPROTO;
	}
	memcpy(c->fds, CMSG_DATA(m), size);
	c->fd_count = (unsigned)(size / sizeof(int));
	return 0;
}

static int well_formed(const struct buffer *b) {
	struct field field;
	int more = 1;
	for (const char *at = b->data; more > 0;)
		more = fields_next(&at, b->data + b->used, &field);
	return more == 0;
}

/* Reads no further than one frame, so that fds stay with their frame. 1 a whole frame, 0 not yet, -errno. */
static int receive(struct connection *c) {
	union {
		char space[CMSG_SPACE(sizeof(int) * MAX_FDS)];
		struct cmsghdr align;
	} control;
	for (;;) {
		struct iovec iov = { (char *)&c->size + c->have, 4 - c->have };
		struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.space,
				      .msg_controllen = sizeof control.space };
		if (c->have == 4 && !c->frame.data)
			TRY(begin_body(&c->frame, c->size));
		if (c->have >= 4 && c->have - 4 == c->frame.used)
			return well_formed(&c->frame) ? 1 : -EPROTO;
		if (c->have >= 4)
			iov = (struct iovec){ c->frame.data + (c->have - 4), c->frame.used - (c->have - 4) };
		ssize_t n = recvmsg(c->source.fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
		if (n < 0)
			return errno == EAGAIN ? 0 : -errno;
		TRY(take_fds(c, &msg));
		if (n == 0)
			return -EPIPE;
		c->have += (size_t)n;
	}
}

static void connection_ready(struct source *source) {
	struct connection *c = container_of(source, struct connection, source);
	if (source->got & EPOLLOUT && c->unsent.used) {
		send_unsent(c);
		return;
	}
	int result = receive(c);
	if (result > 0)
		answer(c);
	else if (result < 0) {
		connection_close(c);
		if (!current && !shim.processes)
			end_shim(); /* a spare whose daemon is gone */
	}
}

static void listener_ready(struct source *source) {
	cleanup_fd fd = accept4(source->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	struct ucred peer;
	socklen_t len = sizeof peer;
	if (fd < 0 || getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &len) || (peer.uid != geteuid() && peer.uid != 0))
		return;
	struct connection *c = malloc(sizeof *c);
	if (!c)
		return;
	*c = (struct connection){ .source = { .fd = keep(&fd), .ready = connection_ready }, .next = connections };
	connections = c;
	if (watch(&c->source, EPOLLIN))
		connection_close(c);
}

static struct source listener = { .fd = -1, .ready = listener_ready };

int listen_for_daemon(void) {
	mode_t before = umask(0177);
	unlink("shim.sock"); /* one that stays is told by bind */
	listener.fd = listen_unix(SOCK_STREAM | SOCK_NONBLOCK, "shim.sock", 16);
	umask(before);
	TRY(listener.fd);
	return watch(&listener, EPOLLIN);
}

void stop_listening(void) {
	unlink("shim.sock");
	unlink("shim.state");
	source_close(&listener);
}
