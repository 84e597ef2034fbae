/* dolium-untar: one layer's tar stream in, one directory out. See untar.c for the contract. One archive, one directory,
 * and the first failure ends the program: state is static, and what can fail has no value to say so. */
#pragma once

#include <stdbool.h>

#include "../executor/sys.h"

/* untar.c. Tells what failed with the entry's name, and ends the program: at fault is the kernel, or (0) the archive. */
void give_up(const char *operation, const char *reason, int number) __attribute__((noreturn));
#define fail(operation) give_up(operation, strerror(errno), errno)
#define refuse(operation, reason) give_up(operation, reason, 0)
static inline void refuse_if(bool wrong, const char *operation, const char *reason) {
	if (wrong)
		refuse(operation, reason);
}
/* A result that is not negative, or the end. */
static inline void must(ssize_t result, const char *operation) {
	if (result < 0)
		fail(operation);
}
/* Memory that is there, or the end. */
void *checked(void *memory);
/* Room for one element more: it doubles at each power of two. */
void *grow(void *array, size_t count, size_t size);

/* archive.c: entries of ustar, pax and GNU archives. */
struct segment {
	int64_t offset, length;
};

struct xattr {
	const char *name, *value;
	size_t length;
};

enum { TYPE_FILE = '0', TYPE_LINK, TYPE_SYMLINK, TYPE_CHAR, TYPE_BLOCK, TYPE_DIRECTORY, TYPE_FIFO };

extern struct tar_entry {
	char type;
	char *path, *link; /* as the archive has them: not trusted, not cleaned */
	mode_t mode;
	uid_t uid;
	gid_t gid;
	int64_t size; /* of the file, holes included */
	struct timespec mtime, atime;
	bool sparse;
	unsigned major, minor;
	struct xattr *xattrs;
	size_t xattr_count;
	struct segment *segments; /* ascending, inside `size`, adding up to the data that is stored */
	size_t segment_count;
} entry;

/* Reads up to the next entry's data; false at the end of the archive. */
bool archive_next(void);
/* Writes the entry's data to `fd`, holes left as holes. */
void archive_data(int fd);
/* Reads to the end, so that the writer never sees EPIPE for an archive that was good. */
void archive_drain(void);

/* tree.c: the only code that touches the target directory. */
extern struct tree {
	int root;
	bool apply;    /* carry whiteouts out here, instead of writing them down for overlay */
	bool no_chown; /* no owners, devices or privileged xattrs: the caller is not root */
	uint64_t entries, bytes;
} tree;

void tree_open(int root);
void tree_extract(void);
void tree_finish(void);
