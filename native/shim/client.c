/* Attached clients. A client never holds up the container or another client: what it does not read goes to a file
 * without a name, what the container does not read stops the reading of that client. Sockets belong to callers, so
 * O_NONBLOCK is not touched: MSG_DONTWAIT does. */
#include <arpa/inet.h>
#include <sys/uio.h>

#include "shim.h"

#define KEYS_LIMIT 16
#define INPUT_CHUNK 32768
#define SPILL_LIMIT (1ll << 30)
#define PUNCH_STEP (8ll << 20)
#define FRAME_EXIT 4

struct client {
	struct client *next;
	struct source source;
	struct process *process; /* NULL once it has exited */
	unsigned number;
	unsigned in : 1, out : 2, mux : 1, exit_frame : 1, late : 1; /* out: bit 0 stdout, bit 1 stderr */
	unsigned eof : 1;      /* will send no more */
	unsigned deaf : 1;     /* will read no more */
	unsigned finished : 1; /* gets no more; goes when it has read what is spilled */
	unsigned key_count, matched;
	char keys[KEYS_LIMIT];
	int spill;
	off_t head, tail, punched;
};

static struct client *clients;
static unsigned last_number;

static struct client *first_of(const struct process *process, struct client *c) {
	while (c && c->process != process)
		c = c->next;
	return c;
}

/* The body may free the client, or take it from the process. */
#define EACH_CLIENT(c, process) \
	for (struct client *c = first_of(process, clients), *next; \
	     c && (next = first_of(process, c->next), 1); c = next)

static int backlog(const struct client *c) { return c->tail > c->head; }

static int may_type(const struct client *c) {
	return !c->eof && !(c->in && c->process && (c->process->state == PROCESS_NEW || c->process->pending.used));
}

static void let_go(struct client *c) {
	UNLINK(&clients, c);
	source_close(&c->source);
	close_fd(&c->spill);
	free(c);
}

static void drop(struct client *c) {
	/* The daemon may still hold a copy: the other side is to see the end now. */
	shutdown(c->source.fd, SHUT_RDWR);
	let_go(c);
}

/* Watches what is wanted now; drops a client from which and to which nothing more can come. */
static void settle(struct client *c) {
	uint32_t events = (may_type(c) ? EPOLLIN : 0u) | (backlog(c) ? EPOLLOUT : 0u);
	if (c->eof && (c->deaf || (c->finished && !backlog(c)))) {
		drop(c);
		return;
	}
	/* Hang-ups are always reported: with input that must wait they would make the loop spin. */
	if (!events && !c->eof)
		unwatch(&c->source);
	else if (watch(&c->source, events))
		drop(c);
}

/* ---- to the client ---- */

static void turn_deaf(struct client *c) {
	c->deaf = 1;
	c->head = c->tail = 0;
	close_fd(&c->spill);
}

static void cut_off(struct client *c, const char *why) {
	complain("client %u is cut off: %s", c->number, why);
	turn_deaf(c);
	shutdown(c->source.fd, SHUT_RDWR);
}

/* Keeps what the client has no room for; the first bytes were sent. */
static void spill(struct client *c, const struct iovec iov[2], size_t len, size_t sent) {
	if (c->spill < 0)
		c->spill = open(".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
	if (c->spill < 0)
		c->spill = memfd_create("spill", MFD_CLOEXEC);
	if (c->tail - c->head + (off_t)len > SPILL_LIMIT) {
		cut_off(c, "it reads too slowly");
	} else if (pwritev(c->spill, iov, 2, c->tail) != (ssize_t)len) {
		cut_off(c, "no room for what it does not read");
	} else {
		c->tail += (off_t)len;
		c->head += (off_t)sent;
	}
}

static void put(struct client *c, int stream, const char *data, size_t len) {
	uint32_t head[2] = { htonl((uint32_t)stream << 24), htonl((uint32_t)len) };
	struct iovec iov[2] = { { head, c->mux ? sizeof head : 0 }, { (void *)data, len } };
	struct msghdr msg = { .msg_iov = iov, .msg_iovlen = 2 };
	size_t whole = iov[0].iov_len + len;
	ssize_t sent = 0;
	if (c->deaf)
		return;
	if (!backlog(c))
		sent = sendmsg(c->source.fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);
	if (sent < 0 && errno != EAGAIN && errno != ENOBUFS)
		turn_deaf(c);
	else if (sent < (ssize_t)whole)
		spill(c, iov, whole, sent > 0 ? (size_t)sent : 0);
}

static void send_spilled(struct client *c) {
	ssize_t got = pread(c->spill, shim.scratch, SCRATCH_SIZE, c->head);
	if (got <= 0) {
		cut_off(c, "what it did not read is unreadable");
		return;
	}
	ssize_t n = send(c->source.fd, shim.scratch, (size_t)got, MSG_DONTWAIT | MSG_NOSIGNAL);
	if (n < 0 && errno != EAGAIN && errno != ENOBUFS)
		turn_deaf(c);
	if (n < 0)
		return;
	c->head += n;
	if (!backlog(c)) {
		close_fd(&c->spill);
		c->head = c->tail = c->punched = 0;
		if (c->finished)
			shutdown(c->source.fd, SHUT_WR);
	} else if (c->head - c->punched > PUNCH_STEP) {
		/* A client that is slow but alive must not make the file grow for ever; not every file system can. */
		if (!fallocate(c->spill, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, c->punched, c->head - c->punched))
			c->punched = c->head;
	}
}

static void deliver(struct stream *stream, const char *data, size_t len) {
	struct process *p = stream->process;
	EACH_CLIENT(c, p) {
		if (!(c->out & (unsigned)stream->number))
			continue;
		put(c, stream->number, data, len);
		settle(c);
	}
	if (p->log)
		log_write(p->log, stream->number, data, len);
}

void stream_ready(struct source *source) {
	struct stream *stream = container_of(source, struct stream, source);
	ssize_t n = read(source->fd, shim.scratch, SCRATCH_SIZE);
	if (n > 0)
		deliver(stream, shim.scratch, (size_t)n);
	else if (n == 0 || errno != EAGAIN)
		source_close(source);
}

/* What was in the pipe when the process died, not what a grandchild goes on writing. */
void drain_streams(struct process *process) {
	for (int i = 0; i < 2; i++) {
		struct source *source = &process->out[i].source;
		int room = SCRATCH_SIZE; /* of a pty, which does not count what is on its way; it holds less */
		if (!process->tty && ioctl(source->fd, FIONREAD, &room))
			room = 0; /* closed already */
		for (ssize_t n; room > 0 && (n = read(source->fd, shim.scratch, SCRATCH_SIZE)) > 0; room -= (int)n)
			deliver(&process->out[i], shim.scratch, (size_t)n);
		source_close(source);
	}
}

/* ---- from the client ---- */

/* What the container has no room for: so many bytes at the end. */
static size_t write_input(struct process *p, const char *data, size_t len) {
	ssize_t n = len ? write(p->input.fd, data, len) : 0;
	if (n >= 0 || errno == EAGAIN)
		return n < 0 ? len : len - (size_t)n;
	source_close(&p->input); /* the container closed its end: what is typed has no reader */
	return 0;
}

/* Only when nothing is pending: see may_type. */
static void feed(struct process *p, const char *data, size_t len) {
	size_t rest = write_input(p, data, len);
	if (!rest)
		return;
	put_bytes(&p->pending, data + len - rest, rest);
	if (p->pending.failed) {
		complain("no memory for the input of %s", p->id);
		buffer_free(&p->pending);
		return;
	}
	watch(&p->input, EPOLLOUT);
}

void input_ready(struct source *source) {
	struct process *p = container_of(source, struct process, input);
	buffer_cut(&p->pending, p->pending.used - write_input(p, p->pending.data, p->pending.used));
	if (p->pending.used)
		return;
	unwatch(source);
	if (p->input_ending)
		source_close(source);
	clients_go_on(p);
}

/* Copies what was typed without a completed detach sequence; 1 when there was one. A broken one is passed on. */
static int filter_keys(struct client *c, const char *in, size_t n, char *out, size_t *len) {
	*len = 0;
	for (size_t i = 0; i < n; i++) {
		while (c->matched && in[i] != c->keys[c->matched]) {
			size_t shift = 1; /* to the next place where the sequence may have begun */
			while (shift < c->matched && memcmp(c->keys + shift, c->keys, c->matched - shift))
				shift++;
			memcpy(out + *len, c->keys, shift);
			*len += shift;
			c->matched -= (unsigned)shift;
		}
		if (in[i] != c->keys[c->matched])
			out[(*len)++] = in[i];
		else if (++c->matched == c->key_count)
			return 1;
	}
	return 0;
}

static void detach(struct client *c) {
	cleanup_buffer b = { 0 };
	put_text(&b, "event", "detached");
	put_text(&b, "id", c->process->id);
	put_number(&b, "client", c->number);
	send_event(&b);
	c->eof = c->deaf = 1;
}

static void input_ended(struct client *c) {
	struct process *p = c->process;
	c->eof = 1;
	if (!c->in || !p || p->input.fd < 0)
		return;
	if (p->tty) {
		feed(p, c->keys, c->matched);
		return;
	}
	if (p->stdin_end == STDIN_STAYS)
		return;
	EACH_CLIENT(other, p)
		if (p->stdin_end == STDIN_LAST_EOF && other->in && !other->eof)
			return;
	p->input_ending = p->pending.used > 0;
	if (!p->input_ending)
		source_close(&p->input);
}

static void take_input(struct client *c) {
	ssize_t n = recv(c->source.fd, shim.scratch, INPUT_CHUNK, MSG_DONTWAIT);
	if (n < 0 && errno == EAGAIN)
		return;
	if (n <= 0) {
		input_ended(c);
		return;
	}
	if (!c->in || !c->process || c->process->input.fd < 0 || c->process->input_ending)
		return; /* read all the same: unread input would turn our end into a reset, which loses output */
	if (!c->key_count || !c->process->tty) {
		feed(c->process, shim.scratch, (size_t)n);
		return;
	}
	size_t len;
	int detaches = filter_keys(c, shim.scratch, (size_t)n, shim.batch, &len);
	feed(c->process, shim.batch, len);
	if (detaches)
		detach(c);
}

static void client_ready(struct source *source) {
	struct client *c = container_of(source, struct client, source);
	if (source->got & EPOLLOUT && backlog(c))
		send_spilled(c);
	if (source->got & (EPOLLIN | EPOLLHUP | EPOLLERR) && may_type(c))
		take_input(c);
	else if (source->got & (EPOLLHUP | EPOLLERR) && c->eof)
		turn_deaf(c);
	settle(c);
}

void clients_go_on(struct process *process) {
	EACH_CLIENT(c, process)
		settle(c);
}

void clients_finish(struct process *process, int exited) {
	char code[16];
	int n = snprintf(code, sizeof code, "%d", process->exit_code);
	EACH_CLIENT(c, process) {
		if (exited && c->late && !shim.ending && daemon_is_here())
			continue; /* its last word comes with the shim's end, when the daemon has cleaned up */
		if (exited && c->exit_frame && c->mux)
			put(c, FRAME_EXIT, code, (size_t)n);
		c->process = NULL;
		c->finished = 1;
		if (!backlog(c))
			shutdown(c->source.fd, SHUT_WR);
		settle(c);
	}
}

/* Nothing ran: the connections stay open for the daemon, which says why. */
void clients_let_go(struct process *process) {
	EACH_CLIENT(c, process)
		let_go(c);
}

int unread_clients(void) {
	for (const struct client *c = clients; c; c = c->next)
		if (backlog(c))
			return 1;
	return 0;
}

static int is_stream_socket(int fd) {
	int type = 0;
	socklen_t len = sizeof type;
	return getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &len) == 0 && type == SOCK_STREAM;
}

int request_attach(struct request *r) {
	struct string keys = fields_get(&r->frame, "detach_keys");
	struct process *p;
	REFUSE_IF(r->fd_count != 1 || !is_stream_socket(r->fds[0]), r, -EINVAL, "attach takes one stream socket");
	REFUSE_IF(keys.len > KEYS_LIMIT, r, -EINVAL, "detach keys: at most %d bytes", KEYS_LIMIT);
	TRY(find_process(r, 1, &p));
	REFUSE_IF(p->state > PROCESS_RUNNING, r, -ESRCH, "process %s has exited", p->id);
	struct client *c = malloc(sizeof *c);
	REFUSE_IF(!c, r, -ENOMEM, "no memory");
	*c = (struct client){
		.next = clients, .source = { .fd = keep(&r->fds[0]), .ready = client_ready }, .process = p,
		.number = ++last_number, .in = flag(r, "stdin"), .out = flag(r, "stdout") | flag(r, "stderr") << 1,
		.mux = flag(r, "mux"), .exit_frame = flag(r, "exit_frame"),
		.late = flag(r, "late"), .key_count = keys.len, .spill = -1,
	};
	memcpy(c->keys, keys.data, keys.len);
	clients = c;
	put_number(&r->answer, "client", c->number);
	settle(c);
	return 0;
}
