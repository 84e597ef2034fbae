/* Messages between dolium's own programs: a frame is a u32 length and a body; the body is fields, each a string key and
 * a list of strings (u32 length, bytes, NUL). The same in Python is src/dolium/runtime/wire.py.
 */
#pragma once

#include "launch.h"

#define FRAME_LIMIT (64u << 20)

struct field {
	const char *key;
	struct list values;
};

void put_bytes(struct buffer *b, const void *data, size_t len);
void put_u32(struct buffer *b, uint32_t value);
void put_string(struct buffer *b, const char *data, size_t len);
/* A field's key and the number of strings that the caller puts next. */
void put_key(struct buffer *b, const char *key, uint32_t count);
void put_text(struct buffer *b, const char *key, const char *value);
void put_number(struct buffer *b, const char *key, long long value);
void buffer_free(struct buffer *b);
/* Takes bytes off the front; memory goes with the last one. */
void buffer_cut(struct buffer *b, size_t n);
#define cleanup_buffer __attribute__((cleanup(buffer_free))) struct buffer

/* Both block. 0 or -errno; -EPIPE at end of file. */
int send_frame(int fd, const struct buffer *b);
int receive_frame(int fd, struct buffer *b);
/* Room for a body that is to be read. 0 or -errno. */
int begin_body(struct buffer *b, uint32_t len);

/* Walks the fields of a body: 1 and *field, 0 at the end, -EPROTO when malformed. */
int fields_next(const char **at, const char *end, struct field *field);
/* First value of a key ("" when absent), all its values, or the value as a number. */
struct string fields_get(const struct buffer *b, const char *key);
struct list fields_list(const struct buffer *b, const char *key);
int64_t fields_number(const struct buffer *b, const char *key, int64_t otherwise);
