/* The conversation between the front and the compiler, and the front's own parts.
 *
 * Frames: u32 length, then the body. The front sends fields (string key, list of strings); the compiler answers with one
 * byte and a body: 'N' a list of facts it needs ("read:PATH", "list:PATH", "stat:PATH"; for
 * `dolium` also "http:" and "session:", see session.c), which the front sends as further fields; 'P' a launch plan; 'E' an error: exit
 * code, message, log file, log format; 'C' for `dolium`: this call needs a Python of its own.
 */
#pragma once

#include "../executor/fields.h"

#define FACT_LIMIT (16u << 20)

/* The caller's context: argv, environment, cwd, umask, ids, what the terminal is. */
void put_context(struct buffer *b, char **argv, char **env);
/* One fact: its key, then errno as a decimal string, then what was found. */
void put_fact(struct buffer *b, const char *query);

/* Reads to the end: into the buffer, 0 or -errno; or as one string of a fact, 1 or -errno. */
int read_more(struct buffer *b, int fd);
int read_whole(struct buffer *out, int fd);

/* Starts a compiler, the package's MODULE; returns the socket to it or -errno. */
int start_cold_compiler(const char *self, const char *module, pid_t *pid);
/* Becomes Python, running the code with dolium's package on its path. Returns -errno. */
int run_python(const char *self, const char *code, char *const *arguments);

/* Where the warm compiler's socket is or would be; a connection to it; starting one. 0, the socket, or -errno. */
int warm_place(const char *self, char *place);
int connect_warm(const char *place);
void start_warm(const char *self, const char *place);

/* Facts that are deeds: a request to the daemon, a session with a container. */
int http_fact(struct buffer *out, const char *query);
int session_fact(struct buffer *out, const char *query);

/* The caller's terminal, standard input: raw and back (at exit too); 1 when there is a size. */
void make_raw(void);
void restore_terminal(void);
int window_size(struct winsize *size);

/* Stays until init exits: relays the terminal, forwards signals, reaps. The status as a shell would give it. */
int hold_until_exit(struct launch *launch);
