/*
 * The directory side. Every path in the archive is hostile: it is cleaned as text (a `..` component is refused), then
 * its parent is opened by openat2 with RESOLVE_BENEATH, so the kernel refuses whatever a symbolic link of this layer
 * would lead out, and the last component is only ever touched by calls that do not follow links.
 */
#include "untar.h"

#include <search.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>

#define WHITEOUT ".wh."
#define OPAQUE ".wh..wh..opq"
#define AUFS_OWN ".wh..wh."
#define SYS_FCHMODAT2 452 /* Linux 6.6, not in older headers */

struct tree tree;
static bool chown_always;
static char *parent_path; /* the directory last walked to, and its O_PATH descriptor */
static int parent = -1;
static void *made_paths; /* tsearch tree of what this layer wrote; kept for --apply only */
static struct directory {
	char *path;
	mode_t mode;
	struct timespec times[2];
} *directories; /* modes and times to be set at the end, in archive order */
static size_t directory_count;

static int open_beneath(const char *path, uint64_t flags) {
	int fd;
	do
		fd = sys_openat2(tree.root, *path ? path : ".", flags | O_CLOEXEC, 0,
				 RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS);
	while (fd < 0 && errno == EAGAIN); /* a rename somewhere raced with a `..` in a link */
	return fd;
}

static int open_directory(int at, const char *name) {
	return openat(at, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
}

void tree_open(int root) {
	struct stat stat;
	must(fstat(root, &stat), "stat");
	errno = ENOTDIR;
	if (!S_ISDIR(stat.st_mode))
		fail("open");
	tree.root = root;
	/* New files are root's without a chown, unless a set-group-id directory may stand above them. */
	chown_always = tree.apply || geteuid() != 0 || (stat.st_mode & S_ISGID);
	umask(0);
}

/* Cut leading, doubled and `.` parts away, in place. `..` is refused even where it would stay inside. */
static void clean(char *path, const char *reason) {
	char *to = path;
	for (const char *from = path; *from; from += *from == '/') {
		size_t length = strcspn(from, "/");
		refuse_if(length == 2 && from[0] == '.' && from[1] == '.', "refused", reason);
		if (length > 0 && !(length == 1 && from[0] == '.')) {
			if (to != path)
				*to++ = '/';
			memmove(to, from, length);
			to += length;
		}
		from += length;
	}
	*to = '\0';
}

static int compare(const void *one, const void *other) { return strcmp(one, other); }

/* --apply: what this layer wrote, and the directories above it, are not to be removed by its own whiteouts. */
static void mark(const char *path) {
	for (size_t end = strcspn(path, "/"); tree.apply; end += 1 + strcspn(path + end + 1, "/")) {
		char *key = checked(strndup(path, end));
		if (*(char **)checked(tsearch(key, &made_paths, compare)) != key)
			free(key);
		if (path[end] == '\0')
			return;
	}
}

/* Remove `name`. With `path` (its path in the layer), what this layer made stays. */
static void remove_all(int at, const char *name, const char *path) {
	bool keep = path && tfind(path, &made_paths, compare);
	if (!keep && (unlinkat(at, name, 0) == 0 || errno == ENOENT))
		return;
	if (!keep && errno != EISDIR && errno != EPERM)
		fail("remove");
	int fd = open_directory(at, name);
	if (fd < 0 && keep && errno == ENOTDIR)
		return;
	cleanup_dir list = fd < 0 ? NULL : fdopendir(fd);
	if (!list)
		fail("remove");
	for (struct dirent *child; (child = next_entry(list));) {
		char *below = NULL;
		if (path && asprintf(&below, "%s%s%s", path, *path ? "/" : "", child->d_name) < 0)
			fail("malloc");
		remove_all(fd, child->d_name, below);
		free(below);
	}
	if (!keep && unlinkat(at, name, AT_REMOVEDIR) < 0)
		fail("remove");
}

static void set_opaque(int at, const char *name) {
	/* Without CAP_SYS_ADMIN overlay is mounted with `userxattr` and reads this one. */
	const char *xattr = tree.no_chown ? "user.overlay.opaque" : "trusted.overlay.opaque";
	cleanup_fd fd = open_directory(at, name);
	if (fd < 0 || fsetxattr(fd, xattr, "y", 1, 0) < 0)
		fail("set opaque");
}

static bool is_whiteout(const struct stat *stat) { return S_ISCHR(stat->st_mode) && stat->st_rdev == 0; }

/* Make a directory, or keep the one that is there. What else has its name gives way; a whiteout makes it opaque. */
static void make_directory(int at, const char *name) {
	struct stat stat = { 0 };
	if (mkdirat(at, name, 0755) == 0)
		return;
	if (errno != EEXIST)
		fail("mkdir");
	must(fstatat(at, name, &stat, AT_SYMLINK_NOFOLLOW), "stat");
	if (S_ISDIR(stat.st_mode))
		return;
	if (unlinkat(at, name, 0) < 0 || mkdirat(at, name, 0755) < 0)
		fail("mkdir");
	if (is_whiteout(&stat) && !tree.apply)
		set_opaque(at, name);
}

static void __attribute__((noreturn)) walk_failed(bool link, int number) {
	if (number == EXDEV)
		refuse(link ? "hard link refused" : "refused", "a symbolic link in the path leads out of the layer");
	if (number == ENOENT)
		refuse(link ? "hard link refused" : "refused", "a symbolic link in the path leads to nothing in the layer");
	errno = number;
	fail(link ? "hard link" : "open parent");
}

/* Nothing of this layer but perhaps a whiteout. */
static bool is_free(int at, const char *name) {
	struct stat stat;
	return fstatat(at, name, &stat, AT_SYMLINK_NOFOLLOW) < 0 ? errno == ENOENT : is_whiteout(&stat);
}

/* Open a directory of the layer, making what is missing on the way: an O_PATH descriptor. */
static int open_parent(char *path) {
	int fd = open_beneath(path, O_PATH | O_DIRECTORY), number = errno;
	if (fd >= 0)
		return fd;
	if (*path == '\0' || (number != ENOENT && number != ENOTDIR))
		walk_failed(false, number);
	char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
	if (slash)
		*slash = '\0';
	cleanup_fd above = open_parent(slash ? path : (char[]){ "" });
	if (slash)
		*slash = '/';
	if (!is_free(above, name))
		walk_failed(false, number);
	make_directory(above, name);
	fd = openat(above, name, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	must(fd, "open parent");
	return fd;
}

/* Goes to the parent of a clean path, which is often the last one; gives the last component. */
static const char *enter(const char *path) {
	const char *slash = strrchr(path, '/');
	size_t length = slash ? (size_t)(slash - path) : 0;
	if (parent < 0 || strlen(parent_path) != length || memcmp(parent_path, path, length) != 0) {
		close_fd(&parent);
		free(parent_path);
		parent_path = checked(strndup(path, length));
		parent = open_parent(parent_path);
	}
	return slash ? slash + 1 : path;
}

/* Attributes of the file behind `fd`, or without one of `name`, which is no regular file or directory. */
static void set_xattrs(int fd, const char *name) {
	if (fd < 0) /* there is no call that takes a folder's descriptor */
		must(fchdir(parent), "open parent");
	for (size_t i = 0; i < entry.xattr_count; i++) {
		const struct xattr *x = &entry.xattrs[i];
		/* These steer the overlay file system itself (redirect, metacopy, opaque): a layer may not write them. */
		if (strncmp(x->name, "trusted.overlay.", 16) == 0 || strncmp(x->name, "user.overlay.", 13) == 0 ||
		    (tree.no_chown && strncmp(x->name, "user.", 5) != 0))
			continue;
		int result = fd >= 0 ? fsetxattr(fd, x->name, x->value, x->length, 0)
				     : lsetxattr(name, x->name, x->value, x->length, 0);
		/* A file system without an attribute's kind loses it, as elsewhere; a lost capability breaks the program. */
		if (result < 0 && (errno != ENOTSUP || strcmp(x->name, "security.capability") == 0))
			fail("setxattr");
	}
}

static bool needs_chown(void) { return !tree.no_chown && (chown_always || entry.uid != 0 || entry.gid != 0); }

static void set_owner(int fd, const char *name) {
	if (needs_chown() && (fd >= 0 ? fchown(fd, entry.uid, entry.gid)
				      : fchownat(parent, name, entry.uid, entry.gid, AT_SYMLINK_NOFOLLOW)) < 0)
		fail("chown");
}

/* Owner before mode and capabilities: chown clears set-user-id bits and security.capability. */
static void set_attributes(int fd, const char *name) {
	struct timespec times[2] = { entry.atime, entry.mtime };
	set_owner(fd, name);
	if (fd >= 0 && (needs_chown() || entry.mode & 07000) && fchmod(fd, entry.mode) < 0)
		fail("chmod");
	/* A node loses its set-id bits by a chown; no older call gives them back that would not follow a link. */
	if (fd < 0 && entry.mode & 06000 && entry.type != TYPE_SYMLINK && needs_chown() &&
	    syscall(SYS_FCHMODAT2, parent, name, entry.mode, AT_SYMLINK_NOFOLLOW) < 0 && errno != ENOSYS)
		fail("chmod");
	set_xattrs(fd, name);
	must(fd >= 0 ? futimens(fd, times) : utimensat(parent, name, times, AT_SYMLINK_NOFOLLOW), "utimens");
}

/* One try: a file's descriptor, 0 for what has none, or -1 and errno. */
static int make(const char *name, int directory, const char *target) {
	mode_t kind = entry.type == TYPE_CHAR ? S_IFCHR : entry.type == TYPE_BLOCK ? S_IFBLK : S_IFIFO;
	if (entry.type == TYPE_FILE)
		return openat(parent, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, entry.mode & 0777);
	if (entry.type == TYPE_LINK)
		return linkat(directory, target, parent, name, 0);
	if (entry.type == TYPE_SYMLINK)
		return symlinkat(entry.link, parent, name);
	/* With its mode at once (the umask is 0): chmod by name would follow a link that a container swapped in. */
	return mknodat(parent, name, kind | entry.mode, makedev(entry.major, entry.minor));
}

static void extract_other(const char *path, const char *name) {
	cleanup_fd directory = -1;
	const char *target = NULL;
	if (entry.type == TYPE_LINK) {
		clean(entry.link, "the hard link's target has a '..' component");
		if (strcmp(entry.link, path) == 0) /* GNU tar writes such a link when a file was added twice */
			return;
		char *slash = strrchr(entry.link, '/');
		target = slash ? slash + 1 : entry.link;
		if (slash)
			*slash = '\0';
		directory = open_beneath(slash ? entry.link : "", O_PATH | O_DIRECTORY);
		if (directory < 0)
			walk_failed(true, errno);
	}
	int fd = make(name, directory, target);
	if (fd < 0 && errno == EEXIST) { /* the later entry wins, as with every tar */
		remove_all(parent, name, NULL);
		fd = make(name, directory, target);
	}
	if (fd < 0)
		fail(entry.type == TYPE_FILE ? "create" : entry.type == TYPE_LINK ? "hard link"
		     : entry.type == TYPE_SYMLINK ? "symlink" : "mknod");
	if (entry.type == TYPE_FILE) {
		tree.bytes += (uint64_t)entry.size;
		archive_data(fd);
		set_attributes(fd, name);
		close(fd);
	} else if (entry.type != TYPE_LINK) {
		set_attributes(-1, name);
	}
}

/* Modes and times wait until no entry can be written into the directory any more. */
static void extract_directory(const char *path, const char *name) {
	if (*path)
		make_directory(parent, name);
	if (needs_chown() || entry.xattr_count > 0) {
		cleanup_fd fd = open_directory(parent, *path ? name : ".");
		must(fd, "open");
		set_owner(fd, name);
		set_xattrs(fd, name);
	}
	directories = grow(directories, directory_count, sizeof *directories);
	directories[directory_count++] = (struct directory){
		.path = checked(strdup(path)), .mode = entry.mode, .times = { entry.atime, entry.mtime } };
}

/* OCI image-spec layer.md, "Whiteouts": they speak about lower layers, never about entries of their own layer. */
static void whiteout(char *path, char *name) {
	char *hidden = name + strlen(WHITEOUT);
	bool opaque = strcmp(name, OPAQUE) == 0;
	struct stat stat = { 0 };
	if (opaque && !tree.apply) {
		set_opaque(parent, ".");
	} else if (opaque) {
		mark(parent_path);
		remove_all(parent, ".", parent_path);
	} else if (strncmp(name, AUFS_OWN, strlen(AUFS_OWN)) == 0) {
		return; /* aufs's own bookkeeping, in layers of old */
	} else if (*hidden == '\0' || strcmp(hidden, ".") == 0 || strcmp(hidden, "..") == 0) {
		refuse("refused", "the whiteout names no file");
	} else if (tree.apply) {
		memmove(name, hidden, strlen(hidden) + 1); /* the path without its prefix is that of what goes */
		remove_all(parent, name, path);
	} else if (mknodat(parent, hidden, S_IFCHR, makedev(0, 0)) < 0) {
		if (errno != EEXIST)
			fail("whiteout");
		must(fstatat(parent, hidden, &stat, AT_SYMLINK_NOFOLLOW), "stat");
		if (S_ISDIR(stat.st_mode))
			set_opaque(parent, hidden);
	}
}

void tree_extract(void) {
	char *path = checked(strdup(entry.path));
	clean(path, "the path has a '..' component");
	refuse_if(*path == '\0' && entry.type != TYPE_DIRECTORY, "refused", "the entry would replace the layer's root");
	char *name = path + (enter(path) - path);
	bool device = entry.type == TYPE_CHAR || entry.type == TYPE_BLOCK;
	bool removes = strncmp(name, WHITEOUT, strlen(WHITEOUT)) == 0;
	tree.entries++;
	if (!removes)
		mark(path);
	if (removes)
		whiteout(path, name);
	else if (entry.type < TYPE_FILE || entry.type > TYPE_FIFO)
		refuse("read header", "unknown entry type");
	else if (entry.type == TYPE_DIRECTORY)
		extract_directory(path, name);
	else if (!(tree.no_chown && device))
		extract_other(path, name);
	free(path);
}

void tree_finish(void) {
	for (size_t i = 0; i < directory_count; i++) {
		const struct directory *directory = &directories[i];
		cleanup_fd fd = open_beneath(directory->path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW);
		if (fd < 0 && (errno == ENOENT || errno == ENOTDIR || errno == ELOOP || errno == EXDEV))
			continue; /* a later entry took its place */
		must(fd, "open");
		must(fchmod(fd, directory->mode), "chmod");
		must(futimens(fd, directory->times), "utimens");
	}
}
