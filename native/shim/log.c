/* The log file in Docker's json-file format, one object a line, rotated. It never ends a shim: what a full disk refused
 * is counted, and told in the log once there is room. */
#include <wchar.h>

#include "shim.h"

#define LINE_LIMIT 16384u                 /* a longer line is split, as Docker does */
#define LINE_ROOM (LINE_LIMIT * 6u + 128) /* one byte can become \u00xx */

struct log {
	char *path;
	int fd;
	uint64_t size, max_size, lost;
	unsigned max_files, lines; /* lines: in the batch */
	size_t used;               /* of the batch */
	struct buffer partial[2];  /* of stdout and stderr: a line whose end has not come */
	char stamp[40];
};

static int open_file(struct log *log) {
	struct stat st;
	log->fd = open(log->path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0640);
	log->size = log->fd >= 0 && fstat(log->fd, &st) == 0 ? (uint64_t)st.st_size : 0;
	return log->fd < 0 ? -errno : 0;
}

struct log *log_open(const char *path, uint64_t max_size, unsigned max_files) {
	struct log *log = malloc(sizeof *log);
	char *copy = strdup(path);
	if (log)
		*log = (struct log){ .path = copy, .max_size = max_size, .max_files = max_files };
	if (log && copy && !open_file(log))
		return log;
	free(copy);
	free(log);
	return NULL;
}

static void rotate(struct log *log) {
	char from[PATH_MAX + 16], to[PATH_MAX + 16];
	if (log->max_files == 1 && ftruncate(log->fd, 0))
		return;
	for (unsigned i = log->max_files - 1; i; i--) {
		snprintf(from, sizeof from, i == 1 ? "%s" : "%s.%u", log->path, i - 1);
		snprintf(to, sizeof to, "%s.%u", log->path, i);
		if (rename(from, to) && i == 1)
			return; /* better a log that is too long than one with a hole */
	}
	close_fd(&log->fd);
	open_file(log); /* on failure the next write tries again */
}

/* All or nothing, so that a full disk leaves no half line behind. */
static int append(struct log *log, const char *data, size_t len) {
	if (log->fd < 0)
		TRY(open_file(log));
	ssize_t n = write(log->fd, data, len);
	if (n == (ssize_t)len) {
		log->size += len;
		return 0;
	}
	return n < 0 || ftruncate(log->fd, (off_t)log->size) ? -errno : -ENOSPC;
}

static int tell_lost(struct log *log) {
	char line[256];
	if (!log->lost)
		return 0;
	int n = snprintf(line, sizeof line, "{\"log\":\"dolium: %llu lines were lost here: the log could not be "
			 "written\\n\",\"stream\":\"stderr\",\"time\":\"%s\"}\n", (unsigned long long)log->lost, log->stamp);
	TRY(append(log, line, (size_t)n));
	log->lost = 0;
	return 0;
}

static void flush(struct log *log) {
	if (!log->used)
		return;
	int result = tell_lost(log);
	if (!result)
		result = append(log, shim.batch, log->used);
	if (result) {
		if (!log->lost)
			complain("write %s: %s", log->path, strerror(-result));
		log->lost += log->lines;
	}
	log->used = log->lines = 0;
}

/* One character of a JSON string as Go writes it; gives the bytes it took. */
static size_t escape(char **out, const unsigned char *p, size_t n) {
	static const char letters[] = "\n\r\t\"\\", written[] = "nrt\"\\";
	const char *letter = *p ? strchr(letters, *p) : NULL;
	wchar_t code = *p;
	size_t len = *p < 0x80 ? 1 : mbrtowc(&code, (const char *)p, n, &(mbstate_t){ 0 });
	int valid = len <= n; /* not (size_t)-1 or -2: libc takes for UTF-8 what Go does */
	if (letter) {
		*(*out)++ = '\\';
		*(*out)++ = written[letter - letters];
	} else if (!valid || code < 0x20 || code == '<' || code == '>' || code == '&' || code >> 1 == 0x2028 >> 1) {
		/* U+2028 and U+2029 end lines in JavaScript, <>& mean something in HTML: Go escapes them for both. */
		*out += sprintf(*out, "\\u%04x", valid ? (unsigned)code : 0xfffdu);
	} else {
		memcpy(*out, p, len);
		*out += len;
	}
	return valid ? len : 1;
}

static int plain(unsigned char c) {
	return c >= 0x20 && c < 0x80 && c != '"' && c != '\\' && c != '<' && c != '>' && c != '&';
}

static void put_line(struct log *log, int stream, const char *line, size_t len) {
	char *start = shim.batch + log->used, *at = start;
	at += sprintf(at, "{\"log\":\"");
	for (size_t i = 0; i < len;) {
		if (plain((unsigned char)line[i]))
			*at++ = line[i++];
		else
			i += escape(&at, (const unsigned char *)line + i, len - i);
	}
	at += sprintf(at, "\",\"stream\":\"%s\",\"time\":\"%s\"}\n", stream == 2 ? "stderr" : "stdout", log->stamp);
	size_t size = (size_t)(at - start);
	if (log->max_size && log->size + log->used && log->size + log->used + size > log->max_size) {
		flush(log);
		if (log->size)
			rotate(log);
		memmove(shim.batch, start, size);
	}
	log->lines++;
	log->used += size;
	if (BATCH_SIZE - log->used < LINE_ROOM)
		flush(log);
}

/* Bytes at the end that begin a character and do not end it: they go into the next piece. */
static size_t unfinished(const char *data, size_t n) {
	for (size_t back = 1; back <= 3 && back < n; back++)
		if (mbrtowc(NULL, data + n - back, back, &(mbstate_t){ 0 }) == (size_t)-2)
			return back;
	return 0;
}

static void put_partial(struct log *log, int stream, size_t len) {
	struct buffer *kept = &log->partial[stream - 1];
	put_line(log, stream, kept->data, len);
	buffer_cut(kept, len);
}

static void stamp(struct log *log) {
	int64_t now = clock_ns(CLOCK_REALTIME);
	time_t seconds = now / 1000000000;
	struct tm tm;
	size_t n = strftime(log->stamp, sizeof log->stamp, "%Y-%m-%dT%H:%M:%S", gmtime_r(&seconds, &tm));
	snprintf(log->stamp + n, sizeof log->stamp - n, ".%09lldZ", (long long)(now % 1000000000));
}

void log_write(struct log *log, int stream, const char *data, size_t len) {
	struct buffer *kept = &log->partial[stream - 1];
	stamp(log);
	for (size_t take; len; data += take, len -= take) {
		size_t room = LINE_LIMIT - kept->used, window = len < room ? len : room;
		const char *newline = memchr(data, '\n', window);
		int whole = newline || window == room;
		take = newline ? (size_t)(newline - data) + 1 : window;
		if (whole && !kept->used) {
			take -= newline ? 0 : unfinished(data, take);
			put_line(log, stream, data, take);
			continue;
		}
		put_bytes(kept, data, take);
		if (kept->failed) {
			buffer_free(kept);
			log->lost++;
			break;
		}
		if (whole)
			put_partial(log, stream, kept->used - (newline ? 0 : unfinished(kept->data, kept->used)));
	}
	flush(log);
}

void log_close(struct log *log) {
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
