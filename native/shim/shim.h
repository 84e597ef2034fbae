/* dolium-shim: one per sandbox. Launches, is sub-reaper, owns stdio, writes logs, records exits, outlives the daemon.
 *
 *   main.c     the spawner, a shim's set-up, the event loop
 *   control.c  the daemon's connection: frames, requests, answers, events (docs/shim-protocol.md)
 *   process.c  launch, exit, exit records
 *   client.c   attached clients, what they type, what they have not read yet
 *   log.c      the log file: Docker's json-file format
 *
 * All is one thread and one epoll set. Nothing blocks but the launch itself. All signals are blocked for good.
 */
#ifndef DOLIUM_SHIM_H
#define DOLIUM_SHIM_H

#include <stddef.h>
#include <stdint.h>
#include <sys/epoll.h>

#include "../executor/fields.h"

#define SHIM_VERSION 1
#define SLOT_STDIN 250 /* the container's ends; the same in runtime/plan.py */
#define SLOT_STDOUT 251
#define SLOT_STDERR 252
#define MAX_FDS 253 /* SCM_MAX_FD */
#define SCRATCH_SIZE 65536
#define BATCH_SIZE 262144
#define KEYS_LIMIT 16

#define container_of(pointer, type, member) ((type *)((char *)(pointer)-offsetof(type, member)))

struct source {
	int fd; /* -1 = closed */
	int watched;
	uint32_t events;
	void (*ready)(struct source *source, uint32_t events);
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
	char *id;
	enum process_state state;
	pid_t pid;
	int pidfd;
	int tty;
	int slave; /* the shim's own, so that a pty whose users come and go is never hung up */
	uint64_t start_time;
	struct source input; /* the pipe's or pty's writing end */
	int input_ending;    /* close when what clients typed is written */
	enum stdin_end stdin_end;
	struct stream out[2];
	struct log *log;
	char *after_exit; /* encoded plan of the AFTER_EXIT operations only; NULL = none */
	size_t after_exit_size;
	pid_t helper;      /* runs them */
	char *helper_text; /* shared page: its failure */
	char **oom_files;
	uint64_t oom_before;
	int exit_code, signal, oom;
	int recorded;
	int64_t started_at, exited_at; /* CLOCK_REALTIME, ns */
};

struct request {
	struct buffer frame;
	int fds[MAX_FDS];
	unsigned fd_count;
	struct buffer *answer;
	uint32_t op; /* of the plan, when a launch failed */
	char why[600];
};

struct shim {
	int epoll;
	int ending;
	int dirty;      /* memory was touched since the last quiet second */
	int unrecorded; /* an exit record that the disk had no room for */
	pid_t pid;
	uint64_t start_time;
	char *id, *nonce, boot_id[40];
	struct process *processes;
	char *scratch; /* SCRATCH_SIZE for what is read, then BATCH_SIZE for what is made of it */
	char *batch;
};
extern struct shim shim;

/* main.c */
int watch(struct source *source, uint32_t events);
void unwatch(struct source *source);
void source_close(struct source *source);
/* A small file by rename in the shim's folder. 0 or -errno. */
int write_record(const char *name, const struct buffer *b);
void complain(const char *format, ...) __attribute__((format(printf, 1, 2)));
int64_t now_ns(void);

/* control.c */
int listen_for_daemon(void);
/* For an event: begin, put fields, end. Lost when no daemon is connected: `hello` tells what matters again. */
void event_begin(struct buffer *b, const char *event);
void event_end(struct buffer *b);
int unsent_answers(void);
int refuse(struct request *r, int result, const char *format, ...) __attribute__((format(printf, 3, 4)));
void stop_listening(void);

/* process.c: requests give 0 or -errno with r->why set */
int request_launch(struct request *r);
int request_resize(struct request *r);
int request_signal(struct request *r);
int request_close_stdin(struct request *r);
int request_forget(struct request *r);
int request_end(struct request *r);
int find_process(struct request *r, int make, struct process **process);
void put_processes(struct buffer *b);
void process_reaped(pid_t pid, int status);
void write_exit_records(void);

/* client.c */
int request_attach(struct request *r);
void stream_ready(struct source *source, uint32_t events);
void input_ready(struct source *source, uint32_t events);
void drain_streams(struct process *process);
void input_close(struct process *process);
/* The process runs from now on: clients that were attached before may type. */
void clients_begin(struct process *process);
/* Sends the exit frame to who asked for it (exited) and lets go of the clients once they have read all. */
void clients_finish(struct process *process, int exited);
int unread_clients(void);
unsigned client_count(void);

/* log.c */
struct log *log_open(const char *path, uint64_t max_size, unsigned max_files);
void log_write(struct log *log, int stream, const char *data, size_t len);
void log_close(struct log *log);

#endif
