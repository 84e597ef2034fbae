/* dolium-untar: one layer's tar stream in, one directory out. See untar.c for the contract. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#define TAR_BLOCK 512

/* What failed and why. `reason` is set when the archive, not the kernel, is at fault; `number` is then 0. */
struct error {
    const char *operation;
    const char *reason;
    int number;
};

static inline int fail(struct error *error, const char *operation, int number)
{
    *error = (struct error){.operation = operation, .number = number};
    return -1;
}

static inline int refuse(struct error *error, const char *operation, const char *reason)
{
    *error = (struct error){.operation = operation, .reason = reason};
    return -1;
}

static inline void cleanup_free(void *pointer)
{
    free(*(void **)pointer);
}

static inline void cleanup_close(int *fd)
{
    if (*fd >= 0)
        close(*fd);
}

#define auto_free __attribute__((cleanup(cleanup_free)))
#define auto_close __attribute__((cleanup(cleanup_close)))

/* stream.c: buffered standard input. Every call returns 0, or -1 with `error` set; a stream that ends early is an error. */
struct stream {
    int fd;
    size_t start, end;
    unsigned char *buffer;
};

int stream_open(struct stream *stream, int fd, struct error *error);
void stream_close(struct stream *stream);
/* Point `block` at the next 512 bytes: 1, or 0 when the stream ended on a block boundary. Valid until the next call. */
int stream_block(struct stream *stream, const unsigned char **block, struct error *error);
/* 1 when there is another byte, 0 at the end. */
int stream_more(struct stream *stream, struct error *error);
int stream_bytes(struct stream *stream, void *to, size_t size, struct error *error);
int stream_skip(struct stream *stream, int64_t size, struct error *error);
/* Move `size` bytes to `fd` at `offset`. */
int stream_copy(struct stream *stream, int fd, int64_t size, int64_t offset, struct error *error);
/* Read to the end, so that the writer never sees EPIPE for an archive that was good. */
int stream_drain(struct stream *stream, struct error *error);

/* archive.c: entries of ustar, pax and GNU archives. */
struct segment {
    int64_t offset, length;
};

struct xattr {
    char *name;
    char *value;
    size_t length;
};

enum { TYPE_FILE = '0', TYPE_LINK, TYPE_SYMLINK, TYPE_CHAR, TYPE_BLOCK, TYPE_DIRECTORY, TYPE_FIFO };

struct tar_entry {
    char type;
    char *path, *link; /* as the archive has them: not trusted, not cleaned */
    mode_t mode;
    uid_t uid;
    gid_t gid;
    int64_t size; /* of the file, holes included */
    struct timespec mtime, atime;
    bool has_atime;
    unsigned major, minor;
    struct xattr *xattrs;
    size_t xattr_count;
    bool sparse;
    struct segment *segments; /* ascending, inside `size`, adding up to the data that is stored */
    size_t segment_count;
};

struct archive {
    struct stream stream;
    int64_t left;    /* data bytes of the current entry that were not read */
    int64_t padding; /* zeros behind them */
    char *global;    /* pax records in force for all entries that follow */
    size_t global_size;
    struct tar_entry entry;
};

/* Read up to the next entry's data: 1 with archive->entry filled, 0 at the end of the archive, -1 on error. */
int archive_next(struct archive *archive, struct error *error);
/* Write the current entry's data to `fd`, holes left as holes. */
int archive_data(struct archive *archive, int fd, struct error *error);
void archive_close(struct archive *archive);

/* tree.c: the only code that touches the target directory. */
struct directory {
    char *path;
    mode_t mode;
    struct timespec times[2];
};

struct tree {
    int root;
    bool apply;    /* carry whiteouts out here, instead of writing them down for overlay */
    bool no_chown; /* no owners, devices or privileged xattrs: the caller is not root */
    bool chown_always;
    char *parent_path; /* the directory last walked to, and its O_PATH descriptor */
    int parent;
    struct directory *directories; /* modes and times to be set at the end, in archive order */
    size_t directory_count, directory_room;
    void *made; /* tsearch tree of what this layer wrote; kept for `apply` only */
    uint64_t entries, bytes;
};

int tree_open(struct tree *tree, int root, struct error *error);
int tree_extract(struct tree *tree, struct archive *archive, struct error *error);
int tree_finish(struct tree *tree, struct error *error);
void tree_close(struct tree *tree);
