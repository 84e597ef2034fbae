#include "fields.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void put_bytes(struct buffer *b, const void *data, size_t len) {
	if (b->failed)
		return;
	if (b->used + len > b->room) {
		size_t room = b->room ? b->room : 16384;
		char *grown;
		while (room < b->used + len)
			room *= 2;
		grown = realloc(b->data, room);
		if (!grown) {
			b->failed = 1;
			return;
		}
		b->data = grown;
		b->room = room;
	}
	memcpy(b->data + b->used, data, len);
	b->used += len;
}

void put_u32(struct buffer *b, uint32_t value) {
	put_bytes(b, &value, sizeof value);
}

void put_string(struct buffer *b, const char *data, size_t len) {
	put_u32(b, (uint32_t)len);
	put_bytes(b, data, len);
	put_bytes(b, "", 1);
}

void buffer_free(struct buffer *b) {
	free(b->data);
	memset(b, 0, sizeof *b);
}

int send_frame(int fd, const struct buffer *b) {
	uint32_t len = (uint32_t)b->used;
	int result;
	if (b->failed || b->used > FRAME_LIMIT)
		return -ENOMEM;
	result = write_all(fd, &len, sizeof len);
	return result ? result : write_all(fd, b->data, b->used);
}

static int read_all(int fd, void *data, size_t len) {
	char *at = data;
	while (len) {
		ssize_t n = read(fd, at, len);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (n == 0)
			return -EPIPE;
		at += n;
		len -= (size_t)n;
	}
	return 0;
}

int receive_frame(int fd, struct buffer *b) {
	uint32_t len;
	int result = read_all(fd, &len, sizeof len);
	if (result)
		return result;
	if (len > FRAME_LIMIT)
		return -EPROTO;
	buffer_free(b);
	b->data = malloc((size_t)len + 1);
	if (!b->data)
		return -ENOMEM;
	b->room = b->used = len;
	return read_all(fd, b->data, len);
}

void put_key(struct buffer *b, const char *key, uint32_t count) {
	put_string(b, key, strlen(key));
	put_u32(b, count);
}

void put_text(struct buffer *b, const char *key, const char *value) {
	put_key(b, key, 1);
	put_string(b, value, strlen(value));
}

void put_number(struct buffer *b, const char *key, long long value) {
	char text[32];
	snprintf(text, sizeof text, "%lld", value);
	put_text(b, key, text);
}

int fields_next(const char **at, const char *end, struct field *field) {
	uint32_t len;
	if (end - *at < 4)
		return *at == end ? 0 : -EPROTO;
	memcpy(&len, *at, 4);
	if ((size_t)(end - *at) < (size_t)len + 9 || (*at)[4 + len] != '\0')
		return -EPROTO;
	field->key = *at + 4;
	memcpy(&field->values.count, field->key + len + 1, 4);
	field->values.encoded = field->key + len + 5;
	*at = field->values.encoded;
	for (uint32_t i = 0; i < field->values.count; i++) {
		if (end - *at < 4)
			return -EPROTO;
		memcpy(&len, *at, 4);
		if ((size_t)(end - *at) < (size_t)len + 5 || (*at)[4 + len] != '\0')
			return -EPROTO;
		*at += (size_t)len + 5;
	}
	return 1;
}

struct string fields_get(const struct buffer *b, const char *key) {
	const char *at = b->data, *end = b->data + b->used;
	struct string none = { "", 0 };
	struct field field;
	while (fields_next(&at, end, &field) > 0)
		if (!strcmp(field.key, key) && field.values.count) {
			const char *cursor = field.values.encoded;
			return list_next(&cursor);
		}
	return none;
}

struct list fields_list(const struct buffer *b, const char *key) {
	const char *at = b->data, *end = b->data + b->used;
	struct list none = { NULL, 0 };
	struct field field;
	while (fields_next(&at, end, &field) > 0)
		if (!strcmp(field.key, key))
			return field.values;
	return none;
}

int64_t fields_number(const struct buffer *b, const char *key, int64_t otherwise) {
	struct string s = fields_get(b, key);
	return s.len ? strtoll(s.data, NULL, 10) : otherwise;
}
