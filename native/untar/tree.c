/*
 * The directory side. Every path in the archive is hostile: it is cleaned as text (a `..` component is refused), then
 * its parent is opened by openat2 with RESOLVE_BENEATH, so the kernel refuses whatever a symbolic link of this layer
 * would lead out, and the last component is only ever touched by calls that do not follow links.
 */
#define _GNU_SOURCE
#include "untar.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/openat2.h>
#include <search.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>

#define WHITEOUT ".wh."
#define OPAQUE ".wh..wh..opq"
#define AUFS_OWN ".wh..wh."

static int open_beneath(const struct tree *tree, const char *path, uint64_t flags)
{
    struct open_how how = {.flags = flags | O_CLOEXEC, .resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS};
    for (;;) {
        long fd = syscall(SYS_openat2, tree->root, *path ? path : ".", &how, sizeof how);
        if (fd >= 0 || errno != EAGAIN) /* EAGAIN: a rename somewhere raced with a `..` in a link */
            return (int)fd;
    }
}

int tree_open(struct tree *tree, int root, struct error *error)
{
    struct stat stat;
    if (fstat(root, &stat) < 0)
        return fail(error, "stat", errno);
    if (!S_ISDIR(stat.st_mode))
        return fail(error, "open", ENOTDIR);
    tree->root = root;
    tree->parent = -1;
    /* New files are root's without a chown, unless a set-group-id directory may stand above them. */
    tree->chown_always = tree->apply || geteuid() != 0 || (stat.st_mode & S_ISGID);
    umask(0);
    return 0;
}

static void forget_parent(struct tree *tree)
{
    if (tree->parent >= 0)
        close(tree->parent);
    free(tree->parent_path);
    tree->parent = -1;
    tree->parent_path = NULL;
}

static int compare(const void *left, const void *right)
{
    return strcmp(left, right);
}

void tree_close(struct tree *tree)
{
    forget_parent(tree);
    while (tree->made) {
        char *key = *(char **)tree->made;
        tdelete(key, &tree->made, compare);
        free(key);
    }
    for (size_t i = 0; i < tree->directory_count; i++)
        free(tree->directories[i].path);
    free(tree->directories);
    tree->directories = NULL;
    tree->directory_count = 0;
}

/* Cut leading, doubled and `.` parts away, in place. `..` is refused even where it would stay inside. */
static int clean(char *path, struct error *error)
{
    char *to = path;
    for (const char *from = path; *from;) {
        size_t length = strcspn(from, "/");
        if (length == 2 && from[0] == '.' && from[1] == '.')
            return refuse(error, "refused", "the path has a '..' component");
        if (length > 0 && !(length == 1 && from[0] == '.')) {
            if (to != path)
                *to++ = '/';
            memmove(to, from, length);
            to += length;
        }
        from += length;
        from += *from == '/';
    }
    *to = '\0';
    return 0;
}

/* --apply: what this layer wrote is not to be removed by its own whiteouts. */
static int mark(struct tree *tree, const char *path, struct error *error)
{
    if (!tree->apply)
        return 0;
    for (size_t end = strcspn(path, "/");; end += 1 + strcspn(path + end + 1, "/")) {
        char *key = strndup(path, end);
        char **node = key ? tsearch(key, &tree->made, compare) : NULL;
        if (!node || *node != key)
            free(key);
        if (!node)
            return fail(error, "malloc", ENOMEM);
        if (path[end] == '\0')
            return 0;
    }
}

static bool made(const struct tree *tree, const char *path)
{
    return tfind(path, (void **)(uintptr_t)&tree->made, compare) != NULL;
}

/* Remove `name`. With `path` (its path in the layer), what this layer made stays. */
static int remove_all(const struct tree *tree, int parent, const char *name, const char *path, struct error *error)
{
    bool keep = path && made(tree, path);
    if (!keep && unlinkat(parent, name, 0) == 0)
        return 0;
    if (!keep && errno != EISDIR && errno != EPERM)
        return errno == ENOENT ? 0 : fail(error, "remove", errno);
    int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return keep && errno == ENOTDIR ? 0 : fail(error, "remove", errno);
    DIR *list = fdopendir(fd);
    if (!list) {
        close(fd);
        return fail(error, "remove", errno);
    }
    int result = 0;
    for (struct dirent *child; result == 0 && (child = readdir(list));) {
        if (strcmp(child->d_name, ".") == 0 || strcmp(child->d_name, "..") == 0)
            continue;
        auto_free char *below = NULL;
        if (path && asprintf(&below, "%s%s%s", path, *path ? "/" : "", child->d_name) < 0)
            result = fail(error, "malloc", ENOMEM);
        else
            result = remove_all(tree, dirfd(list), child->d_name, below, error);
    }
    closedir(list);
    if (result == 0 && !keep && unlinkat(parent, name, AT_REMOVEDIR) < 0)
        return fail(error, "remove", errno);
    return result;
}

static int set_opaque(const struct tree *tree, int parent, const char *name, struct error *error)
{
    /* Without CAP_SYS_ADMIN overlay is mounted with `userxattr` and reads this one. */
    const char *xattr = tree->no_chown ? "user.overlay.opaque" : "trusted.overlay.opaque";
    auto_close int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0 || fsetxattr(fd, xattr, "y", 1, 0) < 0)
        return fail(error, "set opaque", errno);
    return 0;
}

static bool is_whiteout(const struct stat *stat)
{
    return S_ISCHR(stat->st_mode) && stat->st_rdev == 0;
}

/* Make a directory, or keep the one that is there. What else has its name gives way; a whiteout makes it opaque. */
static int make_directory(struct tree *tree, int parent, const char *name, struct error *error)
{
    struct stat stat = {0};
    if (mkdirat(parent, name, 0755) == 0)
        return 0;
    if (errno != EEXIST)
        return fail(error, "mkdir", errno);
    if (fstatat(parent, name, &stat, AT_SYMLINK_NOFOLLOW) < 0)
        return fail(error, "stat", errno);
    if (S_ISDIR(stat.st_mode))
        return 0;
    if (unlinkat(parent, name, 0) < 0 || mkdirat(parent, name, 0755) < 0)
        return fail(error, "mkdir", errno);
    return is_whiteout(&stat) && !tree->apply ? set_opaque(tree, parent, name, error) : 0;
}

static int walk_error(struct error *error, int number)
{
    if (number == EXDEV)
        return refuse(error, "refused", "a symbolic link in the path leads out of the layer");
    if (number == ENOENT)
        return refuse(error, "refused", "a symbolic link in the path leads to nothing in the layer");
    return fail(error, "open parent", number);
}

/* Open a directory of the layer, making what is missing on the way: an O_PATH descriptor or -1. */
static int open_parent(struct tree *tree, char *path, bool make, struct error *error)
{
    int fd = open_beneath(tree, path, O_PATH | O_DIRECTORY);
    if (fd >= 0)
        return fd;
    if (!make || (errno != ENOENT && errno != ENOTDIR))
        return walk_error(error, errno);
    auto_close int above = open_beneath(tree, "", O_PATH | O_DIRECTORY);
    if (above < 0)
        return walk_error(error, errno);
    for (char *name = path, *end; name; name = end ? end + 1 : NULL) {
        end = strchr(name, '/');
        if (end)
            *end = '\0';
        fd = open_beneath(tree, path, O_PATH | O_DIRECTORY);
        int number = errno;
        struct stat stat = {0};
        bool missing = fd < 0 && number == ENOENT && fstatat(above, name, &stat, AT_SYMLINK_NOFOLLOW) < 0;
        bool whiteout = fd < 0 && number == ENOTDIR && fstatat(above, name, &stat, AT_SYMLINK_NOFOLLOW) == 0 &&
                        is_whiteout(&stat);
        if (missing || whiteout) {
            if (make_directory(tree, above, name, error) < 0)
                return -1;
            fd = openat(above, name, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
            number = errno;
        }
        if (end)
            *end = '/';
        if (fd < 0)
            return walk_error(error, number);
        close(above);
        above = fd;
    }
    fd = above;
    above = -1;
    return fd;
}

/* The parent of a clean path, from the cache if it was the last one too; `*name` is the last component. */
static int enter(struct tree *tree, char *path, const char **name, struct error *error)
{
    char *slash = strrchr(path, '/');
    size_t length = slash ? (size_t)(slash - path) : 0;
    *name = slash ? slash + 1 : path;
    if (tree->parent_path && strlen(tree->parent_path) == length && memcmp(tree->parent_path, path, length) == 0)
        return 0;
    forget_parent(tree);
    char *parent_path = strndup(path, length);
    if (!parent_path)
        return fail(error, "malloc", ENOMEM);
    tree->parent = open_parent(tree, parent_path, true, error);
    if (tree->parent < 0) {
        free(parent_path);
        return -1;
    }
    tree->parent_path = parent_path;
    return 0;
}

/* EEXIST: the later entry wins, as with every tar. */
static int replace(const struct tree *tree, const char *name, struct error *error)
{
    return remove_all(tree, tree->parent, name, NULL, error);
}

static bool skip_xattr(const struct tree *tree, const char *name)
{
    /* These steer the overlay file system itself (redirect, metacopy, opaque): a layer may not write them. */
    if (strncmp(name, "trusted.overlay.", 16) == 0 || strncmp(name, "user.overlay.", 13) == 0)
        return true;
    return tree->no_chown && strncmp(name, "user.", 5) != 0;
}

static int set_xattrs(const struct tree *tree, const struct tar_entry *entry, int fd, const char *name,
                      struct error *error)
{
    char link[64 + NAME_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d/%s", tree->parent, name);
    for (size_t i = 0; i < entry->xattr_count; i++) {
        const struct xattr *xattr = &entry->xattrs[i];
        if (skip_xattr(tree, xattr->name))
            continue;
        int result = fd >= 0 ? fsetxattr(fd, xattr->name, xattr->value, xattr->length, 0)
                             : lsetxattr(link, xattr->name, xattr->value, xattr->length, 0);
        /* A file system without an attribute's kind loses it, as elsewhere; a lost capability breaks the program. */
        bool vital = strcmp(xattr->name, "security.capability") == 0;
        if (result < 0 && (vital || errno != ENOTSUP))
            return fail(error, "setxattr", errno);
    }
    return 0;
}

static bool needs_chown(const struct tree *tree, const struct tar_entry *entry)
{
    return !tree->no_chown && (tree->chown_always || entry->uid != 0 || entry->gid != 0);
}

/* Owner before mode and capabilities: chown clears set-user-id bits and security.capability. */
static int set_file(const struct tree *tree, const struct tar_entry *entry, int fd, const char *name, struct error *error)
{
    struct timespec times[2] = {entry->atime, entry->mtime};
    if (needs_chown(tree, entry) && fchown(fd, entry->uid, entry->gid) < 0)
        return fail(error, "chown", errno);
    if ((needs_chown(tree, entry) || (entry->mode & 07000)) && fchmod(fd, entry->mode) < 0)
        return fail(error, "chmod", errno);
    if (set_xattrs(tree, entry, fd, name, error) < 0)
        return -1;
    return futimens(fd, times) < 0 ? fail(error, "utimens", errno) : 0;
}

static int set_special(const struct tree *tree, const struct tar_entry *entry, const char *name, struct error *error)
{
    struct timespec times[2] = {entry->atime, entry->mtime};
    if (needs_chown(tree, entry) && fchownat(tree->parent, name, entry->uid, entry->gid, AT_SYMLINK_NOFOLLOW) < 0)
        return fail(error, "chown", errno);
    if (entry->type != TYPE_SYMLINK && fchmodat(tree->parent, name, entry->mode, 0) < 0)
        return fail(error, "chmod", errno);
    if (set_xattrs(tree, entry, -1, name, error) < 0)
        return -1;
    return utimensat(tree->parent, name, times, AT_SYMLINK_NOFOLLOW) < 0 ? fail(error, "utimens", errno) : 0;
}

static int make_file(struct tree *tree, struct archive *archive, const char *name, struct error *error)
{
    const struct tar_entry *entry = &archive->entry;
    int flags = O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC;
    auto_close int fd = openat(tree->parent, name, flags, entry->mode & 0777);
    if (fd < 0 && errno == EEXIST) {
        if (replace(tree, name, error) < 0)
            return -1;
        fd = openat(tree->parent, name, flags, entry->mode & 0777);
    }
    if (fd < 0)
        return fail(error, "create", errno);
    tree->bytes += (uint64_t)entry->size;
    return archive_data(archive, fd, error) < 0 ? -1 : set_file(tree, entry, fd, name, error);
}

static int make_special(struct tree *tree, const struct tar_entry *entry, const char *name)
{
    if (entry->type == TYPE_SYMLINK)
        return symlinkat(entry->link, tree->parent, name);
    mode_t kind = entry->type == TYPE_CHAR ? S_IFCHR : entry->type == TYPE_BLOCK ? S_IFBLK : S_IFIFO;
    return mknodat(tree->parent, name, kind | 0600, makedev(entry->major, entry->minor));
}

static int extract_special(struct tree *tree, const struct tar_entry *entry, const char *name, struct error *error)
{
    if (tree->no_chown && (entry->type == TYPE_CHAR || entry->type == TYPE_BLOCK))
        return 0;
    int result = make_special(tree, entry, name);
    if (result < 0 && errno == EEXIST) {
        if (replace(tree, name, error) < 0)
            return -1;
        result = make_special(tree, entry, name);
    }
    if (result < 0)
        return fail(error, entry->type == TYPE_SYMLINK ? "symlink" : "mknod", errno);
    return set_special(tree, entry, name, error);
}

static int make_link(struct tree *tree, const struct tar_entry *entry, const char *path, const char *name,
                     struct error *error)
{
    if (clean(entry->link, error) < 0)
        return refuse(error, "refused", "the hard link's target has a '..' component");
    if (strcmp(entry->link, path) == 0) /* GNU tar writes such a link when a file was added twice */
        return 0;
    auto_free char *above = strdup(entry->link);
    if (!above)
        return fail(error, "malloc", ENOMEM);
    char *slash = strrchr(above, '/');
    const char *target = slash ? slash + 1 : above;
    if (slash)
        *slash = '\0';
    auto_close int fd = open_parent(tree, slash ? above : (char[]){""}, false, error);
    if (fd < 0) {
        error->operation = error->reason ? "hard link refused" : "hard link";
        return -1;
    }
    int result = linkat(fd, target, tree->parent, name, 0);
    if (result < 0 && errno == EEXIST) {
        if (replace(tree, name, error) < 0)
            return -1;
        result = linkat(fd, target, tree->parent, name, 0);
    }
    return result < 0 ? fail(error, "hard link", errno) : 0;
}

/* Modes and times wait until no entry can be written into the directory any more. */
static int defer_directory(struct tree *tree, const struct tar_entry *entry, const char *path, struct error *error)
{
    if (tree->directory_count == tree->directory_room) {
        size_t room = tree->directory_room ? tree->directory_room * 2 : 256;
        struct directory *more = realloc(tree->directories, room * sizeof *more);
        if (!more)
            return fail(error, "malloc", ENOMEM);
        tree->directories = more;
        tree->directory_room = room;
    }
    char *copy = strdup(path);
    if (!copy)
        return fail(error, "malloc", ENOMEM);
    tree->directories[tree->directory_count++] =
        (struct directory){.path = copy, .mode = entry->mode, .times = {entry->atime, entry->mtime}};
    return 0;
}

static int extract_directory(struct tree *tree, const struct tar_entry *entry, const char *path, const char *name,
                             struct error *error)
{
    if (*path && make_directory(tree, tree->parent, name, error) < 0)
        return -1;
    if (needs_chown(tree, entry) || entry->xattr_count > 0) {
        auto_close int fd =
            openat(tree->parent, *path ? name : ".", O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        if (fd < 0)
            return fail(error, "open", errno);
        if (needs_chown(tree, entry) && fchown(fd, entry->uid, entry->gid) < 0)
            return fail(error, "chown", errno);
        if (set_xattrs(tree, entry, fd, name, error) < 0)
            return -1;
    }
    return defer_directory(tree, entry, path, error);
}

/* OCI image-spec layer.md, "Whiteouts": they speak about lower layers, never about entries of their own layer. */
static int whiteout(struct tree *tree, char *path, const char *name, struct error *error)
{
    if (strcmp(name, OPAQUE) == 0) {
        if (!tree->apply)
            return set_opaque(tree, tree->parent, ".", error);
        if (mark(tree, tree->parent_path, error) < 0)
            return -1;
        return remove_all(tree, tree->parent, ".", tree->parent_path, error);
    }
    if (strncmp(name, AUFS_OWN, strlen(AUFS_OWN)) == 0) /* aufs's own bookkeeping, in layers of old */
        return 0;
    const char *hidden = name + strlen(WHITEOUT);
    if (*hidden == '\0' || strcmp(hidden, ".") == 0 || strcmp(hidden, "..") == 0)
        return refuse(error, "refused", "the whiteout names no file");
    if (tree->apply) {
        char *at = path + (name - path); /* the path without its prefix is that of what goes */
        memmove(at, hidden, strlen(hidden) + 1);
        return remove_all(tree, tree->parent, at, path, error);
    }
    struct stat stat = {0};
    if (mknodat(tree->parent, hidden, S_IFCHR, makedev(0, 0)) == 0)
        return 0;
    if (errno != EEXIST)
        return fail(error, "whiteout", errno);
    if (fstatat(tree->parent, hidden, &stat, AT_SYMLINK_NOFOLLOW) < 0)
        return fail(error, "stat", errno);
    return S_ISDIR(stat.st_mode) ? set_opaque(tree, tree->parent, hidden, error) : 0;
}

int tree_extract(struct tree *tree, struct archive *archive, struct error *error)
{
    const struct tar_entry *entry = &archive->entry;
    auto_free char *path = strdup(entry->path);
    const char *name;
    if (!path)
        return fail(error, "malloc", ENOMEM);
    if (clean(path, error) < 0)
        return -1;
    if (*path == '\0' && entry->type != TYPE_DIRECTORY)
        return refuse(error, "refused", "the entry would replace the layer's root");
    if (enter(tree, path, &name, error) < 0)
        return -1;
    tree->entries++;
    if (strncmp(name, WHITEOUT, strlen(WHITEOUT)) == 0)
        return whiteout(tree, path, name, error);

    int result;
    switch (entry->type) {
    case TYPE_FILE:
        result = make_file(tree, archive, name, error);
        break;
    case TYPE_DIRECTORY:
        result = extract_directory(tree, entry, path, name, error);
        break;
    case TYPE_LINK:
        result = make_link(tree, entry, path, name, error);
        break;
    case TYPE_SYMLINK:
    case TYPE_CHAR:
    case TYPE_BLOCK:
    case TYPE_FIFO:
        result = extract_special(tree, entry, name, error);
        break;
    default:
        return refuse(error, "read header", "unknown entry type");
    }
    return result < 0 ? -1 : mark(tree, path, error);
}

int tree_finish(struct tree *tree, struct error *error)
{
    for (size_t i = 0; i < tree->directory_count; i++) {
        const struct directory *directory = &tree->directories[i];
        auto_close int fd = open_beneath(tree, directory->path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW);
        if (fd < 0 && (errno == ENOENT || errno == ENOTDIR || errno == ELOOP || errno == EXDEV))
            continue; /* a later entry took its place */
        if (fd < 0)
            return fail(error, "open", errno);
        if (fchmod(fd, directory->mode) < 0)
            return fail(error, "chmod", errno);
        if (futimens(fd, directory->times) < 0)
            return fail(error, "utimens", errno);
    }
    return 0;
}
