#include "fields.h"

void put_bytes(struct buffer *b, const void *data, size_t len) {
	if (b->failed)
		return;
	if (b->used + len > b->room) {
		size_t room = b->room ? b->room : 16384;
		while (room < b->used + len)
			room *= 2;
		char *grown = realloc(b->data, room);
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

void put_u32(struct buffer *b, uint32_t value) { put_bytes(b, &value, sizeof value); }

void put_string(struct buffer *b, const char *data, size_t len) {
	put_u32(b, (uint32_t)len);
	put_bytes(b, data, len);
	put_bytes(b, "", 1);
}

void buffer_free(struct buffer *b) {
	free(b->data);
	memset(b, 0, sizeof *b);
}

void buffer_cut(struct buffer *b, size_t n) {
	b->used -= n;
	memmove(b->data, b->data + n, b->used);
	if (!b->used)
		buffer_free(b);
}

int send_frame(int fd, const struct buffer *b) {
	uint32_t len = (uint32_t)b->used;
	if (b->failed || b->used > FRAME_LIMIT)
		return -ENOMEM;
	TRY(write_all(fd, &len, sizeof len));
	return write_all(fd, b->data, b->used);
}

static int read_all(int fd, void *data, size_t len) {
	for (char *at = data; len;) {
		int n = or_errno(RETRY(read(fd, at, len)));
		if (n <= 0)
			return n ? n : -EPIPE;
		at += n;
		len -= (size_t)n;
	}
	return 0;
}

int begin_body(struct buffer *b, uint32_t len) {
	if (len > FRAME_LIMIT)
		return -EPROTO;
	buffer_free(b);
	b->data = malloc((size_t)len + 1);
	b->room = b->used = b->data ? len : 0;
	return b->data ? 0 : -ENOMEM;
}

int receive_frame(int fd, struct buffer *b) {
	uint32_t len;
	TRY(read_all(fd, &len, sizeof len));
	TRY(begin_body(b, len));
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
	struct reader r = { *at, end };
	struct string key;
	if (r.at == end)
		return 0;
	if (take_string(&r, &key) || take_list(&r, &field->values))
		return -EPROTO;
	field->key = key.data;
	*at = r.at;
	return 1;
}

struct list fields_list(const struct buffer *b, const char *key) {
	const char *at = b->data;
	struct field field;
	while (fields_next(&at, b->data + b->used, &field) > 0)
		if (!strcmp(field.key, key))
			return field.values;
	return (struct list){ NULL, 0 };
}

struct string fields_get(const struct buffer *b, const char *key) {
	struct list values = fields_list(b, key);
	struct string s = { "", 0 };
	list_take(&values, &s);
	return s;
}

int64_t fields_number(const struct buffer *b, const char *key, int64_t otherwise) {
	struct string s = fields_get(b, key);
	return s.len ? strtoll(s.data, NULL, 10) : otherwise;
}
