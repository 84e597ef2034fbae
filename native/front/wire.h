/* The conversation between the front and the compiler, and the front's own parts.
 *
 * Frames: u32 length, then the body. The front sends fields (string key, list of strings); the compiler answers with one
 * byte and a body: 'N' a list of facts it needs ("read:PATH", "link:PATH", "list:PATH", "stat:PATH"), which the front
 * sends as further fields; 'P' a launch plan; 'E' an error: exit code, message, log file, log format.
 */
#ifndef DOLIUM_WIRE_H
#define DOLIUM_WIRE_H

#include "../executor/fields.h"

#define FACT_LIMIT (16u << 20)

/* The caller's context: argv, environment, cwd, umask, ids, what the terminal is. */
void put_context(struct buffer *b, char **argv, char **env);
/* One fact: its key, then errno as a decimal string, then what was found. */
void put_fact(struct buffer *b, const char *query);

/* Starts a compiler; returns the socket to it or -errno. */
int start_cold_compiler(const char *self, pid_t *pid);

/* Stays until init exits: relays the terminal, forwards signals, reaps. The status as a shell would give it. */
int hold_until_exit(struct launch *launch);

#endif
