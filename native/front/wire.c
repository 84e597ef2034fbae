#include "wire.h"

#include <sys/utsname.h>

static void put_vector(struct buffer *b, const char *key, char **vector) {
	uint32_t count = 0;
	while (vector[count])
		count++;
	put_key(b, key, count);
	for (uint32_t i = 0; i < count; i++)
		put_string(b, vector[i], strlen(vector[i]));
}

void put_context(struct buffer *b, char **argv, char **env) {
	char cwd[PATH_MAX];
	struct winsize size = { 0 };
	struct timespec now;
	struct utsname host;
	mode_t mask = umask(0);
	umask(mask);
	put_vector(b, "argv", argv);
	put_vector(b, "env", env);
	if (getcwd(cwd, sizeof cwd))
		put_text(b, "cwd", cwd);
	put_number(b, "umask", mask);
	put_number(b, "uid", (long)geteuid());
	put_number(b, "gid", (long)getegid());
	put_number(b, "pid", (long)getpid());
	clock_gettime(CLOCK_REALTIME, &now);
	put_number(b, "now", (long long)now.tv_sec);
	put_number(b, "nanoseconds", (long long)now.tv_nsec);
	if (uname(&host) == 0)
		put_text(b, "machine", host.machine);
	put_key(b, "tty", 3);
	for (int fd = 0; fd < 3; fd++)
		put_string(b, isatty(fd) ? "1" : "0", 1);
	window_size(&size);
	put_number(b, "rows", size.ws_row);
	put_number(b, "columns", size.ws_col);
}

int read_more(struct buffer *b, int fd) {
	char chunk[16384];
	for (int n; (n = or_errno(RETRY(read(fd, chunk, sizeof chunk))));) {
		TRY(n);
		if (b->used + (size_t)n > FACT_LIMIT)
			return -EFBIG;
		put_bytes(b, chunk, (size_t)n);
	}
	return 0;
}

int read_whole(struct buffer *out, int fd) {
	cleanup_buffer found = { 0 };
	TRY(read_more(&found, fd));
	out->failed |= found.failed;
	put_string(out, found.data ? found.data : "", found.used);
	return 1;
}

/* Each puts what it found as the strings of a fact: their number, or -errno. */

static int read_fact(struct buffer *out, const char *path) {
	cleanup_fd fd = TRY(or_errno(open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)));
	struct stat st;
	TRY(or_errno(fstat(fd, &st)));
	if (!S_ISREG(st.st_mode))
		return S_ISDIR(st.st_mode) ? -EISDIR : -EINVAL;
	return read_whole(out, fd);
}

static int real_fact(struct buffer *out, const char *path) {
	char link[PATH_MAX];
	if (!realpath(path, link))
		return -errno;
	put_string(out, link, strlen(link));
	return 1;
}

static int stat_fact(struct buffer *out, const char *path) {
	struct stat st;
	TRY(or_errno(stat(path, &st)));
	char text[128];
	unsigned long long device = st.st_rdev;
	int n = snprintf(text, sizeof text, "%u %u %u %llu", st.st_mode, st.st_uid, st.st_gid, device);
	put_string(out, text, (size_t)n);
	return 1;
}

static int list_fact(struct buffer *out, const char *path) {
	cleanup_dir folder = opendir(path);
	if (!folder)
		return -errno;
	int count = 0;
	for (struct dirent *entry; (entry = next_entry(folder)); count++)
		put_string(out, entry->d_name, strlen(entry->d_name));
	return count;
}

static int stdin_fact(struct buffer *out, __attribute__((unused)) const char *rest) { return read_whole(out, 0); }

static int find_fact(struct buffer *out, const char *query) {
	static const struct {
		const char *kind;
		int (*find)(struct buffer *out, const char *rest);
	} kinds[] = {
		{ "read:", read_fact }, { "real:", real_fact }, { "stat:", stat_fact },
		{ "list:", list_fact }, { "stdin:", stdin_fact }, { "http:", http_fact },
		{ "session:", session_fact },
	};
	for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++)
		if (!strncmp(query, kinds[i].kind, strlen(kinds[i].kind)))
			return kinds[i].find(out, query + strlen(kinds[i].kind));
	return -EINVAL;
}

void put_fact(struct buffer *b, const char *query) {
	cleanup_buffer found = { 0 };
	char number[16];
	int count = find_fact(&found, query);
	put_key(b, query, count < 0 ? 1 : 1 + (uint32_t)count);
	snprintf(number, sizeof number, "%d", count < 0 ? -count : 0);
	put_string(b, number, strlen(number));
	if (count > 0)
		put_bytes(b, found.data, found.used);
	b->failed |= found.failed;
}
