/* The log file in Docker's json-file format, one object a line, rotated. It never blocks and never ends a shim: what a
 * full disk refused is counted and told in the log once there is room. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "shim.h"

#define LINE_LIMIT 16384u /* a longer line is split, as Docker does */
#define ESCAPE_MAX 6u     /* one byte can become \u00xx */
#define LINE_ROOM (LINE_LIMIT * ESCAPE_MAX + 128u)

struct partial {
	char *data;
	size_t used;
};

struct log {
	char *path;
	int fd;
	int told; /* a failure was written to shim.log */
	uint64_t size, max_size;
	unsigned max_files;
	unsigned lines; /* in the batch */
	size_t used;    /* of the batch */
	uint64_t lost;
	struct partial partial[2];
	char stamp[40];
};

static int open_file(struct log *log)
{
	struct stat st;

	log->fd = open(log->path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0640);
	if (log->fd < 0 || fstat(log->fd, &st))
		return -1;
	log->size = (uint64_t)st.st_size;
	return 0;
}

struct log *log_open(const char *path, uint64_t max_size, unsigned max_files)
{
	struct log *log = calloc(1, sizeof *log);

	if (!log)
		return NULL;
	log->fd = -1;
	log->max_size = max_size;
	log->max_files = max_files;
	log->path = strdup(path);
	if (!log->path || open_file(log)) {
		int saved = errno;
		close_fd(&log->fd);
		free(log->path);
		free(log);
		errno = saved;
		return NULL;
	}
	return log;
}

static void name_file(const struct log *log, unsigned number, char *name, size_t size)
{
	snprintf(name, size, number ? "%s.%u" : "%s", log->path, number);
}

static void rotate(struct log *log)
{
	char from[4096 + 16], to[4096 + 16];

	if (log->max_files <= 1) {
		if (ftruncate(log->fd, 0) == 0)
			log->size = 0;
		return;
	}
	for (unsigned i = log->max_files - 1; i; i--) {
		name_file(log, i - 1, from, sizeof from);
		name_file(log, i, to, sizeof to);
		if (rename(from, to) && i == 1)
			return; /* better a log that is too long than one with a hole */
	}
	close_fd(&log->fd);
	log->size = 0;
	open_file(log); /* on failure the next write tries again */
}

/* All or nothing, so that a full disk leaves no half line behind. */
static int append(struct log *log, const char *data, size_t len)
{
	ssize_t n;

	if (log->fd < 0 && open_file(log))
		return -errno;
	n = write(log->fd, data, len);
	if (n == (ssize_t)len) {
		log->size += len;
		return 0;
	}
	if (n < 0)
		return -errno;
	return ftruncate(log->fd, (off_t)log->size) ? -errno : -ENOSPC;
}

static int tell_lost(struct log *log)
{
	char line[256];
	int n;

	if (!log->lost)
		return 0;
	n = snprintf(line, sizeof line, "{\"log\":\"dolium: %llu lines were lost here: the log could not be written\\n\","
		     "\"stream\":\"stderr\",\"time\":\"%s\"}\n", (unsigned long long)log->lost, log->stamp);
	n = append(log, line, (size_t)n);
	if (!n)
		log->lost = 0;
	return n;
}

static void flush(struct log *log)
{
	int result;

	if (!log->used)
		return;
	result = tell_lost(log);
	if (!result)
		result = append(log, shim.batch, log->used);
	if (result) {
		log->lost += log->lines;
		if (!log->told++)
			complain("write %s: %s", log->path, strerror(-result));
	}
	log->used = log->lines = 0;
}

/* Length of the UTF-8 sequence at p as Go decodes it, 0 when it is not valid. */
static size_t sequence(const unsigned char *p, size_t n)
{
	size_t len = *p >= 0xf0 ? 4 : *p >= 0xe0 ? 3 : 2;
	unsigned char low = 0x80, high = 0xbf;

	if (*p < 0xc2 || *p > 0xf4 || n < len)
		return 0;
	if (*p == 0xe0)
		low = 0xa0; /* overlong */
	else if (*p == 0xed)
		high = 0x9f; /* surrogates */
	else if (*p == 0xf0)
		low = 0x90;
	else if (*p == 0xf4)
		high = 0x8f;
	if (p[1] < low || p[1] > high)
		return 0;
	for (size_t i = 2; i < len; i++)
		if ((p[i] & 0xc0) != 0x80)
			return 0;
	return len;
}

static char *escape_byte(char *out, unsigned char c)
{
	static const char hex[] = "0123456789abcdef";
	const char *letter = memchr("\n\r\t\"\\", c, 5);

	*out++ = '\\';
	if (letter) {
		*out++ = "nrt\"\\"[letter - (const char *)memchr("\n\r\t\"\\", '\n', 5)];
		return out;
	}
	memcpy(out, "u00", 3);
	out[3] = hex[c >> 4];
	out[4] = hex[c & 15];
	return out + 5;
}

static char *escape(char *out, const unsigned char *p, size_t n)
{
	const unsigned char *end = p + n;

	while (p < end) {
		size_t len;
		if (*p < 0x80) {
			if (*p < 0x20 || *p == '"' || *p == '\\' || *p == '<' || *p == '>' || *p == '&')
				out = escape_byte(out, *p);
			else
				*out++ = (char)*p;
			p++;
			continue;
		}
		len = sequence(p, (size_t)(end - p));
		if (!len) {
			memcpy(out, "\\ufffd", 6);
			out += 6;
			p++;
			continue;
		}
		if (len == 3 && p[0] == 0xe2 && p[1] == 0x80 && (p[2] | 1) == 0xa9) { /* U+2028, U+2029 end lines in JavaScript */
			memcpy(out, p[2] & 1 ? "\\u2029" : "\\u2028", 6);
			out += 6;
		} else {
			memcpy(out, p, len);
			out += len;
		}
		p += len;
	}
	return out;
}

static void put_line(struct log *log, int stream, const char *line, size_t len)
{
	char *start = shim.batch + log->used, *at = start;

	memcpy(at, "{\"log\":\"", 8);
	at = escape(at + 8, (const unsigned char *)line, len);
	at += sprintf(at, "\",\"stream\":\"%s\",\"time\":\"%s\"}\n", stream == 2 ? "stderr" : "stdout", log->stamp);
	if (log->max_size && log->size + log->used + (size_t)(at - start) > log->max_size && log->size + log->used) {
		size_t size = (size_t)(at - start);
		flush(log);
		if (log->size)
			rotate(log);
		memmove(shim.batch, start, size);
		at = shim.batch + size;
	}
	log->lines++;
	log->used = (size_t)(at - shim.batch);
	if (BATCH_SIZE - log->used < LINE_ROOM)
		flush(log);
}

/* Bytes at the end that begin a character and do not end it: they go into the next piece. */
static size_t unfinished(const char *data, size_t n)
{
	for (size_t back = 1; back <= 3 && back < n; back++) {
		unsigned char c = (unsigned char)data[n - back];
		if ((c & 0xc0) == 0x80)
			continue;
		return c >= 0xc2 && c <= 0xf4 && back < (c >= 0xf0 ? 4u : c >= 0xe0 ? 3u : 2u) ? back : 0;
	}
	return 0;
}

static void put_partial(struct log *log, int stream, size_t len)
{
	struct partial *partial = &log->partial[stream - 1];

	put_line(log, stream, partial->data, len);
	partial->used -= len;
	memmove(partial->data, partial->data + len, partial->used);
	if (!partial->used) {
		free(partial->data);
		partial->data = NULL;
	}
}

static void stamp(struct log *log)
{
	struct timespec now;
	struct tm tm;
	size_t n;

	clock_gettime(CLOCK_REALTIME, &now);
	gmtime_r(&now.tv_sec, &tm);
	n = strftime(log->stamp, sizeof log->stamp, "%Y-%m-%dT%H:%M:%S", &tm);
	snprintf(log->stamp + n, sizeof log->stamp - n, ".%09ldZ", now.tv_nsec);
}

void log_write(struct log *log, int stream, const char *data, size_t len)
{
	struct partial *partial = &log->partial[stream - 1];

	stamp(log);
	while (len) {
		size_t room = LINE_LIMIT - partial->used, window = len < room ? len : room, take;
		const char *newline = memchr(data, '\n', window);
		int whole = newline || window == room;

		take = newline ? (size_t)(newline - data) + 1 : window;
		if (whole && !partial->used) {
			take -= newline ? 0 : unfinished(data, take);
			put_line(log, stream, data, take);
		} else {
			if (!partial->data)
				partial->data = malloc(LINE_LIMIT);
			if (!partial->data) {
				log->lost++;
				break;
			}
			memcpy(partial->data + partial->used, data, take);
			partial->used += take;
			if (whole)
				put_partial(log, stream,
					    partial->used - (newline ? 0 : unfinished(partial->data, partial->used)));
		}
		data += take;
		len -= take;
	}
	flush(log);
}

void log_close(struct log *log)
{
	stamp(log);
	for (int stream = 1; stream <= 2; stream++)
		if (log->partial[stream - 1].used)
			put_partial(log, stream, log->partial[stream - 1].used);
	flush(log);
	if (tell_lost(log))
		complain("%s: %llu lines were lost", log->path, (unsigned long long)log->lost);
	close_fd(&log->fd);
	free(log->path);
	free(log);
}
