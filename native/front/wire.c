#include "wire.h"

#include <dirent.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/utsname.h>
#include <time.h>

static void put_vector(struct buffer *b, const char *key, char **vector) {
	uint32_t count = 0;
	while (vector[count])
		count++;
	put_key(b, key, count);
	for (uint32_t i = 0; i < count; i++)
		put_string(b, vector[i], strlen(vector[i]));
}

void put_context(struct buffer *b, int argc, char **argv, char **env) {
	char cwd[PATH_MAX];
	mode_t mask = umask(0);
	struct winsize size;
	struct utsname host;
	(void)argc;
	umask(mask);
	put_vector(b, "argv", argv);
	put_vector(b, "env", env);
	if (getcwd(cwd, sizeof cwd))
		put_text(b, "cwd", cwd);
	put_number(b, "umask", mask);
	put_number(b, "uid", (long)geteuid());
	put_number(b, "gid", (long)getegid());
	put_number(b, "pid", (long)getpid());
	put_number(b, "now", (long long)time(NULL));
	if (uname(&host) == 0)
		put_text(b, "machine", host.machine);
	put_number(b, "tty", isatty(0));
	if (ioctl(0, TIOCGWINSZ, &size) == 0) {
		put_number(b, "rows", size.ws_row);
		put_number(b, "columns", size.ws_col);
	}
}

static int read_fact(struct buffer *out, const char *path) {
	cleanup_fd fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	char chunk[16384];
	struct stat st;
	if (fd < 0)
		return -errno;
	if (fstat(fd, &st))
		return -errno;
	if (!S_ISREG(st.st_mode))
		return S_ISDIR(st.st_mode) ? -EISDIR : -EINVAL;
	for (;;) {
		ssize_t n = read(fd, chunk, sizeof chunk);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (n == 0)
			return 0;
		if (out->used + (size_t)n > FACT_LIMIT)
			return -EFBIG;
		put_bytes(out, chunk, (size_t)n);
	}
}

static int list_fact(struct buffer *out, const char *path, uint32_t *count) {
	DIR *folder = opendir(path);
	struct dirent *entry;
	if (!folder)
		return -errno;
	while ((entry = readdir(folder))) {
		if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
			continue;
		put_string(out, entry->d_name, strlen(entry->d_name));
		*count += 1;
	}
	closedir(folder);
	return 0;
}

static int stat_fact(struct buffer *out, const char *path) {
	struct stat st;
	char text[128];
	int n;
	if (stat(path, &st))
		return -errno;
	n = snprintf(text, sizeof text, "%u %u %u %llu", st.st_mode, st.st_uid, st.st_gid, (unsigned long long)st.st_rdev);
	put_bytes(out, text, (size_t)n);
	return 0;
}

void put_fact(struct buffer *b, const char *query) {
	struct buffer found = { 0 };
	char number[16], link[PATH_MAX];
	const char *path = strchr(query, ':');
	uint32_t count = 1;
	int result = -EINVAL, is_list = 0;
	path = path ? path + 1 : query;
	if (!strncmp(query, "read:", 5)) {
		result = read_fact(&found, path);
	} else if (!strncmp(query, "link:", 5)) {
		ssize_t n = readlink(path, link, sizeof link);
		result = n < 0 ? -errno : 0;
		if (n > 0)
			put_bytes(&found, link, (size_t)n);
	} else if (!strncmp(query, "real:", 5)) {
		result = realpath(path, link) ? 0 : -errno;
		if (!result)
			put_bytes(&found, link, strlen(link));
	} else if (!strncmp(query, "stat:", 5)) {
		result = stat_fact(&found, path);
	} else if (!strncmp(query, "list:", 5)) {
		is_list = 1;
		count = 0;
		result = list_fact(&found, path, &count);
	}
	put_key(b, query, 1 + (result ? 0 : count));
	snprintf(number, sizeof number, "%d", -result);
	put_string(b, number, strlen(number));
	if (!result && is_list)
		put_bytes(b, found.data, found.used);
	else if (!result)
		put_string(b, found.data ? found.data : "", found.used);
	b->failed |= found.failed;
	buffer_free(&found);
}
