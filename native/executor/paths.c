/* Walking paths under an untrusted root: always by openat2 with RESOLVE_IN_ROOT, never by name twice. */
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "launch.h"

#define ROOT_RESOLVE (RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
#define LINK_LIMIT 16

/* An fd, or -errno. EAGAIN means that a rename raced the look-up: try again. */
int open_in_root(const struct launch *launch, const char *path, uint64_t flags) {
	for (int tries = 0; tries < 64; tries++) {
		int fd = sys_openat2(launch->root, path, flags | O_CLOEXEC, 0, ROOT_RESOLVE);
		if (fd >= 0)
			return fd;
		if (errno != EAGAIN && errno != EINTR)
			return -errno;
	}
	return -EAGAIN;
}

static int has_dotdot(const char *path) {
	for (const char *p = path; *p; p += strcspn(p, "/")) {
		p += strspn(p, "/");
		if (p[0] == '.' && p[1] == '.' && (p[2] == '/' || p[2] == '\0'))
			return 1;
	}
	return 0;
}

/* The last component is missing below `dir`: make it. A dangling link is followed inside the root by the caller. */
static int make_one(int dir, const char *name, int directory, mode_t mode) {
	if (directory) {
		if (mkdirat(dir, name, mode) && errno != EEXIST)
			return -errno;
	} else {
		int fd = openat(dir, name, O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC | O_WRONLY, mode);
		if (fd < 0 && errno != EEXIST)
			return -errno;
		if (fd >= 0)
			close(fd);
	}
	int fd = openat(dir, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
	return fd < 0 ? -errno : fd;
}

static int make_at_depth(const struct launch *launch, const char *path, int directory, mode_t mode, int depth);

/* `prefix` + `name` is a dangling link: make what it points to, inside the root. */
static int make_through_link(const struct launch *launch, int dir, const char *prefix, const char *name,
			     const char *rest, int directory, mode_t mode, int depth) {
	char target[PATH_MAX], joined[PATH_MAX];
	ssize_t n = readlinkat(dir, name, target, sizeof target - 1);
	int written;
	if (n < 0)
		return -errno;
	target[n] = '\0';
	written = snprintf(joined, sizeof joined, "%s%s%s/%s", target[0] == '/' ? "" : prefix,
			   target[0] == '/' ? "" : "/", target, rest);
	if (written < 0 || (size_t)written >= sizeof joined)
		return -ENAMETOOLONG;
	return make_at_depth(launch, joined, directory, mode, depth + 1);
}

static int make_at_depth(const struct launch *launch, const char *path, int directory, mode_t mode, int depth) {
	cleanup_fd dir = -1;
	char prefix[PATH_MAX], *rest;
	size_t cut;
	if (depth > LINK_LIMIT)
		return -ELOOP;
	if (strlen(path) >= sizeof prefix)
		return -ENAMETOOLONG;
	/* The longest prefix that exists. */
	strcpy(prefix, path);
	cut = strlen(prefix);
	for (;;) {
		int fd;
		while (cut > 0 && prefix[cut - 1] == '/')
			prefix[--cut] = '\0';
		fd = open_in_root(launch, cut ? prefix : ".", O_PATH);
		if (fd >= 0) {
			dir = fd;
			break;
		}
		if (fd != -ENOENT || cut == 0)
			return fd;
		while (cut > 0 && prefix[cut - 1] != '/')
			prefix[--cut] = '\0';
	}
	rest = (char *)path + cut;
	rest += strspn(rest, "/");
	if (!*rest) {
		int found = dir;
		dir = -1;
		return found;
	}
	if (has_dotdot(rest))
		return -EINVAL;
	while (*rest) {
		char name[NAME_MAX + 1];
		size_t n = strcspn(rest, "/");
		const char *after = rest + n + strspn(rest + n, "/");
		struct stat st;
		int fd;

		if (n > NAME_MAX)
			return -ENAMETOOLONG;
		memcpy(name, rest, n);
		name[n] = '\0';
		fd = make_one(dir, name, *after ? 1 : directory, *after ? 0755 : mode);
		if (fd < 0)
			return fd;
		if (fstat(fd, &st)) {
			close_fd(&fd);
			return -errno;
		}
		if (S_ISLNK(st.st_mode)) {
			close(fd);
			return make_through_link(launch, dir, prefix, name, after, directory, mode, depth);
		}
		close(dir);
		dir = fd;
		if (strlen(prefix) + n + 2 > sizeof prefix)
			return -ENAMETOOLONG;
		strcat(prefix, "/");
		strcat(prefix, name);
		rest = (char *)after;
	}
	int made = dir;
	dir = -1;
	return made;
}

/* An O_PATH fd of the path in the root, made (with its parents, 0755) when absent; or -errno. */
int make_in_root(const struct launch *launch, const char *path, int directory, mode_t mode) {
	return make_at_depth(launch, path, directory, mode, 0);
}

/* An O_PATH fd of the folder that holds path, made when absent; *last is set to the last component. */
int parent_in_root(const struct launch *launch, const char *path, mode_t mode, const char **last) {
	char folder[PATH_MAX];
	const char *slash = strrchr(path, '/');
	size_t n = slash ? (size_t)(slash - path) : 0;
	*last = slash ? slash + 1 : path;
	if (n >= sizeof folder)
		return -ENAMETOOLONG;
	if (!**last || !strcmp(*last, ".") || !strcmp(*last, ".."))
		return -EINVAL;
	memcpy(folder, path, n);
	folder[n] = '\0';
	return make_in_root(launch, n ? folder : ".", 1, mode);
}
