/* Walking paths under an untrusted root: always by openat2 with RESOLVE_IN_ROOT, never by name twice. */

#include "launch.h"

#define LINK_LIMIT 16

int format_path(char *path, const char *format, ...) {
	va_list args;
	va_start(args, format);
	int n = vsnprintf(path, PATH_MAX, format, args);
	va_end(args);
	return n < 0 || n >= PATH_MAX ? -ENAMETOOLONG : 0;
}

/* An fd, or -errno. EAGAIN means that a rename raced the look-up: try again. */
int open_in_root(const struct launch *launch, const char *path, uint64_t flags) {
	int fd = -EAGAIN;
	for (int tries = 0; tries < 64 && (fd == -EAGAIN || fd == -EINTR); tries++)
		fd = sys_openat2(launch->root, path, flags | O_CLOEXEC, 0, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS);
	return fd;
}

/* Makes the name in `dir` where it is missing. An O_PATH fd of what is there then, a link as itself; or -errno. */
static int make_one(int dir, const char *name, int directory, mode_t mode) {
	int made = directory ? mkdirat(dir, name, mode) : mknodat(dir, name, S_IFREG | mode, 0);
	if (made && errno != EEXIST)
		return -errno;
	return or_errno(openat(dir, name, O_PATH | O_NOFOLLOW | O_CLOEXEC));
}

static int make_at_depth(const struct launch *launch, char *path, int directory, mode_t mode, int depth);

/* A dangling link in `folder`: make what it points to, inside the root. Not inlined: the buffers would stand in every
 * frame of a recursion as deep as the path. */
static __attribute__((noinline)) int make_through_link(const struct launch *launch, const char *folder, int link,
						       int directory, mode_t mode, int depth) {
	char target[PATH_MAX], joined[PATH_MAX];
	int n = TRY(or_errno(readlinkat(link, "", target, sizeof target - 1)));
	target[n] = '\0';
	TRY(format_path(joined, "%s/%s", target[0] == '/' ? "" : folder, target));
	return make_at_depth(launch, joined, directory, mode, depth + 1);
}

/* `path` starts with a slash. It is cut on the way to its first parent that exists, and whole again on the way back. */
static int make_at_depth(const struct launch *launch, char *path, int directory, mode_t mode, int depth) {
	if (depth > LINK_LIMIT)
		return -ELOOP;
	for (char *end = path + strlen(path); end > path && end[-1] == '/';)
		*--end = '\0';
	int found = open_in_root(launch, *path ? path : "/", O_PATH);
	if (found != -ENOENT || !*path)
		return found;
	char *slash = strrchr(path, '/'), *name = slash + 1;
	if (!strcmp(name, ".."))
		return -EINVAL;
	while (slash > path && slash[-1] == '/')
		slash--;
	*slash = '\0';
	cleanup_fd folder = TRY(make_at_depth(launch, path, 1, 0755, depth));
	cleanup_fd fd = TRY(make_one(folder, name, directory, mode));
	struct stat st;
	TRY(or_errno(fstat(fd, &st)));
	int made = S_ISLNK(st.st_mode) ? make_through_link(launch, path, fd, directory, mode, depth) : keep(&fd);
	*slash = '/';
	return made;
}

/* An O_PATH fd of the path in the root, made (with its parents, 0755) when absent; or -errno. */
int make_in_root(const struct launch *launch, const char *path, int directory, mode_t mode) {
	char copy[PATH_MAX];
	TRY(format_path(copy, "/%s", path));
	return make_at_depth(launch, copy, directory, mode, 0);
}

/* An O_PATH fd of the folder that holds path, made when absent; *last is set to the last component. */
int parent_in_root(const struct launch *launch, const char *path, const char **last) {
	char folder[PATH_MAX];
	const char *slash = strrchr(path, '/');
	*last = slash ? slash + 1 : path;
	if (!**last || !strcmp(*last, ".") || !strcmp(*last, ".."))
		return -EINVAL;
	TRY(format_path(folder, "%.*s", (int)(*last - path), path));
	return make_in_root(launch, folder, 1, 0755);
}
