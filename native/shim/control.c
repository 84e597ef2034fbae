/* The daemon's connection. docs/shim-protocol.md lists the messages. A connection that sends half a frame, or reads
 * nothing, holds up nothing: all is non-blocking, and what waits to be sent is bounded. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "shim.h"

#define UNSENT_LIMIT (4u << 20)
#define CONNECTION_LIMIT 8

struct connection {
	struct connection *next;
	struct source source;
	char head[4]; /* the frame's length */
	size_t have;  /* bytes of the frame, with the head */
	struct request request;
	struct buffer unsent;
	size_t sent;
};

static struct connection *connections, *current; /* current: the one that said the right hello last */

static void connection_close(struct connection *c)
{
	struct connection **at = &connections;

	while (*at != c)
		at = &(*at)->next;
	*at = c->next;
	if (current == c)
		current = NULL;
	source_close(&c->source);
	for (unsigned i = 0; i < c->request.fd_count; i++)
		close_fd(&c->request.fds[i]);
	buffer_free(&c->request.frame);
	buffer_free(&c->unsent);
	free(c);
}

/* ---- sending ---- */

static void send_some(struct connection *c)
{
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

static void send_body(struct connection *c, struct buffer *body)
{
	if (body->failed || c->unsent.failed || c->unsent.used - c->sent > UNSENT_LIMIT) {
		/* `hello` on a new connection tells what was lost with this one. */
		shutdown(c->source.fd, SHUT_RDWR);
		buffer_free(&c->unsent);
		c->sent = 0;
	} else {
		put_u32(&c->unsent, (uint32_t)body->used);
		put_bytes(&c->unsent, body->data, body->used);
		send_some(c);
	}
	buffer_free(body);
}

void event_begin(struct buffer *b, const char *event)
{
	put_key(b, "event", 1);
	put_string(b, event, strlen(event));
}

void event_end(struct buffer *b)
{
	if (current)
		send_body(current, b);
	else
		buffer_free(b);
}

int unsent_answers(void)
{
	return current && current->unsent.used;
}

int refuse(struct request *r, int result, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vsnprintf(r->why, sizeof r->why, format, args);
	va_end(args);
	return result;
}

/* ---- requests ---- */

static int request_hello(struct request *r)
{
	struct string nonce = fields_get(&r->frame, "nonce");
	struct connection *c = container_of(r, struct connection, request);

	if (fields_number(&r->frame, "version", 0) != SHIM_VERSION)
		return refuse(r, -EPROTO, "this shim speaks version %d", SHIM_VERSION);
	if (strcmp(nonce.data, shim.nonce))
		return refuse(r, -EACCES, "the nonce is another shim's");
	if (current && current != c)
		connection_close(current);
	current = c;
	put_number(r->answer, "version", SHIM_VERSION);
	put_number(r->answer, "pid", shim.pid);
	put_number(r->answer, "start_time", (long long)shim.start_time);
	put_key(r->answer, "boot_id", 1);
	put_string(r->answer, shim.boot_id, strlen(shim.boot_id));
	put_processes(r->answer);
	return 0;
}

static int request_status(struct request *r)
{
	put_number(r->answer, "clients", client_count());
	put_processes(r->answer);
	return 0;
}

static const struct {
	const char *type;
	int (*handle)(struct request *r);
} handlers[] = {
	{ "hello", request_hello },   { "launch", request_launch },
	{ "attach", request_attach }, { "resize", request_resize },
	{ "signal", request_signal }, { "close_stdin", request_close_stdin },
	{ "status", request_status }, { "forget", request_forget },
	{ "end", request_end },
};

static int handle(struct connection *c, struct request *r)
{
	struct string type = fields_get(&r->frame, "type");

	if (current != c && strcmp(type.data, "hello"))
		return refuse(r, -EPERM, "say hello first");
	for (size_t i = 0; i < sizeof handlers / sizeof handlers[0]; i++)
		if (!strcmp(type.data, handlers[i].type))
			return handlers[i].handle(r);
	return refuse(r, -ENOSYS, "unknown request type %.64s", type.data);
}

static void answer(struct connection *c)
{
	struct request *r = &c->request;
	struct buffer good = { 0 }, bad = { 0 };
	int64_t number = fields_number(&r->frame, "request", 0);
	int result;

	r->op = UINT32_MAX;
	r->why[0] = '\0';
	r->answer = &good;
	put_number(&good, "answer", number);
	put_number(&good, "ok", 1);
	result = handle(c, r);
	if (result) {
		put_number(&bad, "answer", number);
		put_key(&bad, "error", 1);
		put_string(&bad, r->why, strlen(r->why));
		put_number(&bad, "errno", -result);
		if (r->op != UINT32_MAX)
			put_number(&bad, "op", r->op);
		buffer_free(&good);
	}
	for (unsigned i = 0; i < r->fd_count; i++)
		close_fd(&r->fds[i]);
	r->fd_count = 0;
	buffer_free(&r->frame);
	send_body(c, result ? &bad : &good);
}

/* ---- receiving ---- */

/* The kernel puts all fds of one message into one header. */
static int take_fds(struct request *r, struct msghdr *msg)
{
	struct cmsghdr *m = CMSG_FIRSTHDR(msg);
	size_t size = m && m->cmsg_level == SOL_SOCKET && m->cmsg_type == SCM_RIGHTS ? m->cmsg_len - CMSG_LEN(0) : 0;

	if (!size)
		return 0;
	if (r->fd_count || msg->msg_flags & MSG_CTRUNC) {
		for (size_t at = 0; at < size; at += sizeof(int))
			close(*(int *)(void *)(CMSG_DATA(m) + at));
		return -EPROTO;
	}
	memcpy(r->fds, CMSG_DATA(m), size);
	r->fd_count = (unsigned)(size / sizeof(int));
	return 0;
}

static int well_formed(const struct buffer *b)
{
	const char *at = b->data;
	struct field field;
	int more;

	do
		more = fields_next(&at, b->data + b->used, &field);
	while (more > 0);
	return more == 0;
}

static int begin_body(struct connection *c)
{
	struct buffer *frame = &c->request.frame;
	uint32_t size;

	memcpy(&size, c->head, sizeof size);
	if (size > FRAME_LIMIT)
		return -EPROTO;
	frame->data = malloc((size_t)size + 1);
	frame->room = frame->used = size;
	return frame->data ? 0 : -ENOMEM;
}

/* Reads no further than one frame, so that fds stay with their frame. 1 a whole frame, 0 not yet, -errno. */
static int receive(struct connection *c)
{
	struct buffer *frame = &c->request.frame;
	union {
		char space[CMSG_SPACE(sizeof(int) * MAX_FDS)];
		struct cmsghdr align;
	} control;

	for (;;) {
		size_t in_body = c->have < 4 ? 0 : c->have - 4;
		struct iovec iov = { c->head + c->have, 4 - c->have };
		struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.space,
				      .msg_controllen = sizeof control.space };
		ssize_t n;
		if (c->have >= 4) {
			if (in_body == frame->used)
				return well_formed(frame) ? 1 : -EPROTO;
			iov = (struct iovec){ frame->data + in_body, frame->used - in_body };
		}
		n = recvmsg(c->source.fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
		if (n < 0)
			return errno == EAGAIN ? 0 : -errno;
		if (take_fds(&c->request, &msg))
			return -EPROTO;
		if (n == 0)
			return -EPIPE;
		c->have += (size_t)n;
		if (c->have == 4) {
			int result = begin_body(c);
			if (result)
				return result;
		}
	}
}

static void connection_ready(struct source *source, uint32_t events)
{
	struct connection *c = container_of(source, struct connection, source);
	int result;

	if (events & EPOLLOUT && c->unsent.used) {
		send_some(c);
		return;
	}
	result = receive(c);
	if (result > 0) {
		c->have = 0;
		answer(c);
	} else if (result < 0) {
		connection_close(c);
	}
}

static void limit_connections(void)
{
	struct connection *oldest = NULL;
	unsigned n = 0;

	for (struct connection *c = connections; c; c = c->next) {
		n++;
		if (c != current)
			oldest = c;
	}
	if (n >= CONNECTION_LIMIT && oldest)
		connection_close(oldest);
}

static void listener_ready(struct source *source, uint32_t events)
{
	struct ucred peer = { 0 };
	socklen_t len = sizeof peer;
	int fd = accept4(source->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	struct connection *c;

	(void)events;
	if (fd < 0)
		return;
	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &len) || (peer.uid != geteuid() && peer.uid != 0)) {
		close(fd);
		return;
	}
	limit_connections();
	c = calloc(1, sizeof *c);
	if (!c) {
		close(fd);
		return;
	}
	c->source = (struct source){ .fd = fd, .ready = connection_ready };
	c->next = connections;
	connections = c;
	if (watch(&c->source, EPOLLIN))
		connection_close(c);
}

static struct source listener = { .fd = -1, .ready = listener_ready };

int listen_for_daemon(void)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX, .sun_path = "shim.sock" };
	mode_t before = umask(0177);
	int result = 0;

	listener.fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (listener.fd < 0 || (unlink("shim.sock") && errno != ENOENT) ||
	    bind(listener.fd, (struct sockaddr *)&address, sizeof address) || listen(listener.fd, 16))
		result = -errno;
	umask(before);
	return result ? result : watch(&listener, EPOLLIN);
}

void stop_listening(void)
{
	source_close(&listener);
}
