/* dolium-shim: one per sandbox. Launches, is sub-reaper, owns stdio, writes logs, records exits, outlives the daemon.
 *
 *   main.c     the spawner, a shim's set-up, the event loop
 *   control.c  the daemon's connection: frames, requests, answers, events (docs/shim-protocol.md)
 *   launch.c   from a request to a running process
 *   process.c  from a running process to its exit record
 *   client.c   attached clients, what they type, what they have not read yet
 *   log.c      the log file: Docker's json-file format
 *   heap.c     malloc for a process that must be small
 *
 * One thread, one epoll set, all signals blocked for good. Nothing blocks but a launch.
 */
#pragma once

#include <sys/epoll.h>

#include "../executor/fields.h"

#define SHIM_VERSION 1
#define SLOT_STDIN 250 /* the container's ends; the same in runtime/plan.py */
#define SLOT_STDOUT 251
#define SLOT_STDERR 252
#define ID_LIMIT 128
#define SCRATCH_SIZE 65536
#define BATCH_SIZE 262144

#define REFUSE_IF(wrong, ...) TRY((wrong) ? refuse(__VA_ARGS__) : 0)
#define UNLINK(list, item) do { \
	__typeof__(item) *at = (list); \
	while (*at != (item)) \
		at = &(*at)->next; \
	*at = (item)->next; \
} while (0)
#define container_of(pointer, type, member) ((type *)((char *)(pointer)-offsetof(type, member)))

struct source {
	int fd, watched;      /* fd -1 = closed */
	uint32_t events, got; /* waited for; come */
	void (*ready)(struct source *source);
};

struct stream {
	struct source source;
	struct process *process;
	int number; /* 1 stdout, 2 stderr, as in Docker's multiplexed frames */
};

enum process_state { PROCESS_NEW, PROCESS_RUNNING, PROCESS_EXITING, PROCESS_EXITED };
enum stdin_end { STDIN_STAYS = 0, STDIN_FIRST_EOF = 1, STDIN_LAST_EOF = 2 };

struct process {
	struct process *next;
	char *record, *id; /* the name of its exit record, which ends with the id */
	enum process_state state;
	pid_t pid;
	int pidfd;
	uint64_t start_time;
	int tty, slave; /* slave: the shim's own, so that a pty whose users come and go is never hung up */
	enum stdin_end stdin_end;
	struct source input; /* the pipe's or pty's writing end */
	struct buffer pending; /* typed, but the container has no room for it: no client is read meanwhile */
	int input_ending;      /* close when it is written */
	struct stream out[2];
	struct log *log;
	struct string after_exit; /* plan of the AFTER_EXIT operations only */
	pid_t helper;             /* runs them */
	char *helper_text;        /* shared page: its failure */
	struct list oom_files;
	uint64_t oom_before;
	int exit_code, signal, oom, recorded;
	int64_t started_at, exited_at; /* CLOCK_REALTIME, ns */
};

struct request {
	struct buffer frame, answer; /* a handler that fails puts nothing into the answer */
	struct connection *from;
	int *fds; /* a handler that keeps one puts -1 */
	unsigned fd_count;
	uint32_t op; /* of the plan, when a launch failed */
	char why[600];
};

struct shim {
	int epoll, ending;
	int dirty;      /* memory was touched since the last quiet second */
	int unrecorded; /* there is an exit record that could not be written */
	int64_t retry_at; /* CLOCK_MONOTONIC, ns: also when a container always has something to say */
	pid_t pid;
	uint64_t start_time;
	char *nonce;
	struct process *processes;
	char *scratch, *batch; /* SCRATCH_SIZE for what is read, BATCH_SIZE for what is made of it */
};
extern struct shim shim;

/* main.c */
int watch(struct source *source, uint32_t events);
void unwatch(struct source *source);
void source_close(struct source *source);
/* A small file by rename in the shim's folder. 0 or -errno. */
int write_record(const char *name, const struct buffer *b);
/* The fields that say who this shim, or the spawner, is. */
void put_self(struct buffer *b);
void complain(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* control.c */
int listen_for_daemon(void);
void stop_listening(void);
/* Sends and frees it. Lost when no daemon is connected: `hello` tells again what matters. */
void send_event(struct buffer *b);
int daemon_is_here(void);
int unsent_answers(void);
/* A switch of the request. */
unsigned flag(const struct request *r, const char *key);
int refuse(struct request *r, int result, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* launch.c, process.c, client.c: requests give 0, or -errno with r->why set */
typedef int request_function(struct request *r);
request_function request_launch, request_attach, request_resize, request_signal, request_forget, request_end;

/* process.c */
int find_process(struct request *r, int make, struct process **process);
void say_last_words(void);
void forget_process(struct process *process);
/* Its exit record, or the one of a process that had its id before. */
int remove_exit(struct request *r, const struct process *process, const char *which);
uint64_t oom_kills(struct list files);
void put_processes(struct buffer *b);
void end_shim(void);
void process_reaped(pid_t pid, int status);
void write_exit_records(void);

/* client.c */
void stream_ready(struct source *source);
void input_ready(struct source *source);
void drain_streams(struct process *process);
/* The process runs, or has read what was pending: clients may type. */
void clients_go_on(struct process *process);
/* Sends the exit frame (exited) and lets go of the clients once they have read all. */
void clients_finish(struct process *process, int exited);
void clients_let_go(struct process *process);
int unread_clients(void);

/* log.c */
struct log *log_open(const char *path, uint64_t max_size, unsigned max_files);
void log_write(struct log *log, int stream, const char *data, size_t len);
void log_close(struct log *log);
