/*
 * dolium-untar [--apply] [--no-chown] DIRECTORY|FD < archive.tar
 *
 * Writes a layer into an empty directory. Whiteouts become what overlayfs reads: a character device 0:0 for `.wh.NAME`,
 * the xattr trusted.overlay.opaque for `.wh..wh..opq`; with --apply they are carried out on the directory instead. With
 * --no-chown owners, device nodes and privileged xattrs are left out, for callers that are not root.
 *
 * An entry whose name or hard link target has a `..` component is refused, and so is one whose parent is reached through
 * a symbolic link that is absolute, rises above the directory, or leads to nothing this layer made before. A relative
 * link that stays inside (`lib -> usr/lib`, then `lib/x`) is followed. A parent the archive does not mention is made as
 * a directory, 0755, whatever lower layers have in its place.
 *
 * The standard output gets one line, `ENTRIES BYTES`; exit 0. On the first failure: `untar: ENTRY: OPERATION: REASON`
 * on standard error, errno (0 when the archive is at fault) on standard output, exit 1, and the directory is left half
 * written. Wrong usage: exit 2.
 */
#include "untar.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

static int open_root(const char *where)
{
    char *end;
    errno = 0;
    long fd = strtol(where, &end, 10);
    if (*where >= '0' && *where <= '9' && *end == '\0' && errno == 0 && fd >= 3 && fd <= INT32_MAX)
        return (int)fd;
    return open(where, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
}

static int extract(struct tree *tree, struct archive *archive, int root, struct error *error)
{
    if (stream_open(&archive->stream, STDIN_FILENO, error) < 0 || tree_open(tree, root, error) < 0)
        return -1;
    int more;
    while ((more = archive_next(archive, error)) > 0) {
        if (tree_extract(tree, archive, error) < 0)
            return -1;
    }
    if (more < 0 || tree_finish(tree, error) < 0)
        return -1;
    return stream_drain(&archive->stream, error);
}

/* A hostile name must not write escape sequences to the terminal that shows the message. */
static void print_name(const char *name)
{
    for (const unsigned char *byte = (const unsigned char *)name; *byte; byte++)
        fprintf(stderr, *byte < 0x20 || *byte == 0x7f ? "\\%03o" : "%c", *byte);
}

int main(int count, char **words)
{
    struct tree tree = {.root = -1, .parent = -1};
    struct archive archive = {0};
    struct error error = {0};
    const char *where = NULL;
    for (int i = 1; i < count; i++) {
        if (strcmp(words[i], "--apply") == 0)
            tree.apply = true;
        else if (strcmp(words[i], "--no-chown") == 0)
            tree.no_chown = true;
        else if (!where && words[i][0] != '-')
            where = words[i];
        else
            where = "";
    }
    if (!where || !*where) {
        fputs("usage: dolium-untar [--apply] [--no-chown] DIRECTORY|FD < ARCHIVE\n", stderr);
        return 2;
    }
    auto_close int root = open_root(where);
    if (root < 0) {
        fprintf(stderr, "untar: %s: open: %s\n", where, strerror(errno));
        return 1;
    }
    int result = extract(&tree, &archive, root, &error);
    if (result < 0) {
        printf("%d\n", error.number);
        fputs("untar: ", stderr);
        print_name(archive.entry.path ? archive.entry.path : "archive");
        fprintf(stderr, ": %s: %s\n", error.operation, error.reason ? error.reason : strerror(error.number));
    } else {
        printf("%" PRIu64 " %" PRIu64 "\n", tree.entries, tree.bytes);
    }
    archive_close(&archive);
    tree_close(&tree);
    return result < 0 ? 1 : 0;
}
