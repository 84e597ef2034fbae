/*
 * The archive side: ustar, POSIX pax (local and global records), GNU long names, base-256 numbers and all four ways GNU
 * tar writes sparse files. Nothing here touches the file system. Every number is bounded before it is used as a size.
 */
#include "untar.h"

#include <errno.h>
#include <string.h>

/* Names and pax records are a few hundred bytes in honest archives; xattr values may take 64 KiB each. */
#define TEXT_MAX (1024 * 1024)
#define SEGMENTS_MAX (1024 * 1024)
#define XATTRS_MAX 1024

/* POSIX.1-2008 pax, "ustar Interchange Format". */
struct tar_header {
    char name[100], mode[8], uid[8], gid[8], size[12], mtime[12], checksum[8], type, link[100], magic[8], uname[32],
        gname[32], major[8], minor[8], prefix[155], rest[12];
};

/* GNU's use of the bytes from 386 on in an 'S' header. */
#define OLD_SPARSE_OFFSET 386
#define OLD_SPARSE_MORE 482
#define OLD_SPARSE_SIZE 483
#define OLD_SPARSE_HERE 4
#define OLD_SPARSE_BLOCK 21
#define OLD_SPARSE_BLOCK_MORE 504

/* What the headers before an entry said about it. */
struct pending {
    char *local, *name, *link;
    size_t local_size;
    int sparse_major, sparse_minor;
    int64_t stored, sparse_size;
    int64_t next_offset; /* pax 0.0: an offset whose numbytes has not come yet, or -1 */
    char *sparse_name;
};

static void pending_free(struct pending *pending)
{
    free(pending->local);
    free(pending->name);
    free(pending->link);
    free(pending->sparse_name);
}

static void entry_free(struct tar_entry *entry)
{
    for (size_t i = 0; i < entry->xattr_count; i++) {
        free(entry->xattrs[i].name);
        free(entry->xattrs[i].value);
    }
    free(entry->xattrs);
    free(entry->segments);
    free(entry->path);
    free(entry->link);
    *entry = (struct tar_entry){0};
}

/* Octal text or GNU base-256, two's complement. */
static int number(const char *field, size_t size, int64_t *value, struct error *error)
{
    const unsigned char *byte = (const unsigned char *)field;
    if (byte[0] & 0x80) {
        /* All bits of a negative number's head are set; bit 7 only marks the encoding in a positive one. */
        bool negative = byte[0] == 0xff;
        uint64_t sum = negative ? UINT64_MAX : (byte[0] & 0x7f);
        for (size_t i = 1; i < size; i++) {
            if ((sum >> 55) != (negative ? 0x1ff : 0))
                return refuse(error, "read header", "a number is too large");
            sum = (sum << 8) | byte[i];
        }
        *value = (int64_t)sum;
        return 0;
    }
    size_t i = 0;
    while (i < size && byte[i] == ' ')
        i++;
    int64_t sum = 0;
    for (; i < size && byte[i] != '\0' && byte[i] != ' '; i++) {
        if (byte[i] < '0' || byte[i] > '7')
            return refuse(error, "read header", "a number is not octal");
        if (sum > INT64_MAX >> 3)
            return refuse(error, "read header", "a number is too large");
        sum = (sum << 3) | (byte[i] - '0');
    }
    *value = sum;
    return 0;
}

/* Decimal digits up to `size`; `*used` says how many. */
static int decimal(const char *text, size_t size, int64_t *value, size_t *used, struct error *error)
{
    int64_t sum = 0;
    size_t i = 0;
    for (; i < size && text[i] >= '0' && text[i] <= '9'; i++) {
        if (__builtin_mul_overflow(sum, 10, &sum) || __builtin_add_overflow(sum, text[i] - '0', &sum))
            return refuse(error, "read pax record", "a number is too large");
    }
    if (i == 0)
        return refuse(error, "read pax record", "a number has no digits");
    *value = sum;
    *used = i;
    return 0;
}

static int whole_decimal(const char *text, size_t size, int64_t *value, struct error *error)
{
    size_t used;
    if (decimal(text, size, value, &used, error) < 0)
        return -1;
    return used == size ? 0 : refuse(error, "read pax record", "a number is not decimal");
}

/* Seconds with a fraction, possibly before 1970. */
static int pax_time(const char *text, size_t size, struct timespec *time, struct error *error)
{
    bool negative = size > 0 && text[0] == '-';
    int64_t seconds;
    size_t used;
    if (decimal(text + negative, size - negative, &seconds, &used, error) < 0)
        return -1;
    text += negative + used;
    size -= negative + used;
    long nanoseconds = 0;
    if (size > 0) {
        if (text[0] != '.')
            return refuse(error, "read pax record", "a time is not a number");
        long unit = 100000000;
        for (size_t i = 1; i < size; i++, unit /= 10) {
            if (text[i] < '0' || text[i] > '9')
                return refuse(error, "read pax record", "a time is not a number");
            nanoseconds += unit * (text[i] - '0');
        }
    }
    if (negative) {
        seconds = -seconds - (nanoseconds > 0);
        nanoseconds = nanoseconds > 0 ? 1000000000 - nanoseconds : 0;
    }
    *time = (struct timespec){.tv_sec = seconds, .tv_nsec = nanoseconds};
    return 0;
}

static int add_segment(struct tar_entry *entry, int64_t offset, int64_t length, struct error *error)
{
    size_t count = entry->segment_count;
    if (count >= SEGMENTS_MAX)
        return refuse(error, "read sparse map", "too many segments");
    if ((count & (count - 1)) == 0) { /* room doubles at each power of two */
        struct segment *more = realloc(entry->segments, (count ? count * 2 : 1) * sizeof *more);
        if (!more)
            return fail(error, "malloc", ENOMEM);
        entry->segments = more;
    }
    entry->segments[entry->segment_count++] = (struct segment){.offset = offset, .length = length};
    return 0;
}

static int add_xattr(struct tar_entry *entry, const char *name, size_t name_size, const char *value, size_t size,
                     struct error *error)
{
    size_t count = entry->xattr_count;
    if (count >= XATTRS_MAX)
        return refuse(error, "read pax record", "too many extended attributes");
    struct xattr new = {.name = strndup(name, name_size), .value = malloc(size + 1), .length = size};
    struct xattr *more = realloc(entry->xattrs, (count + 1) * sizeof *more);
    if (more)
        entry->xattrs = more;
    if (!new.name || !new.value || !more) {
        free(new.name);
        free(new.value);
        return fail(error, "malloc", ENOMEM);
    }
    memcpy(new.value, value, size);
    for (size_t i = 0; i < count; i++) {
        if (strcmp(entry->xattrs[i].name, new.name) == 0) { /* a local record replaces a global one */
            free(entry->xattrs[i].name);
            free(entry->xattrs[i].value);
            entry->xattrs[i] = new;
            return 0;
        }
    }
    entry->xattrs[entry->xattr_count++] = new;
    return 0;
}

static int set_text(char **to, const char *text, size_t size, struct error *error)
{
    if (memchr(text, '\0', size))
        return refuse(error, "read pax record", "a name contains NUL");
    free(*to);
    *to = strndup(text, size);
    return *to ? 0 : fail(error, "malloc", ENOMEM);
}

/* pax 0.1: `offset,length,offset,length...` */
static int sparse_list(struct tar_entry *entry, const char *text, size_t size, struct error *error)
{
    int64_t pair[2];
    entry->segment_count = 0;
    while (size > 0) {
        for (int i = 0; i < 2; i++) {
            size_t used;
            if (decimal(text, size, &pair[i], &used, error) < 0)
                return -1;
            text += used;
            size -= used;
            if (size > 0 && *text++ != ',')
                return refuse(error, "read sparse map", "not a list of numbers");
            if (size > 0)
                size--;
        }
        if (add_segment(entry, pair[0], pair[1], error) < 0)
            return -1;
    }
    return 0;
}

static int small_number(const char *text, size_t size, int64_t most, int64_t *value, struct error *error)
{
    if (whole_decimal(text, size, value, error) < 0)
        return -1;
    return *value <= most ? 0 : refuse(error, "read pax record", "a number is too large");
}

static bool is(const char *key, size_t size, const char *name)
{
    return size == strlen(name) && memcmp(key, name, size) == 0;
}

static int gnu_sparse_record(struct tar_entry *entry, struct pending *pending, const char *key, size_t key_size,
                             const char *value, size_t size, struct error *error)
{
    int64_t parsed = 0;
    if (is(key, key_size, "name"))
        return set_text(&pending->sparse_name, value, size, error);
    if (is(key, key_size, "map")) {
        entry->sparse = true;
        return sparse_list(entry, value, size, error);
    }
    if (whole_decimal(value, size, &parsed, error) < 0)
        return -1;
    if (is(key, key_size, "major"))
        pending->sparse_major = parsed > 1 ? 2 : (int)parsed;
    else if (is(key, key_size, "minor"))
        pending->sparse_minor = parsed > 1 ? 2 : (int)parsed;
    else if (is(key, key_size, "size") || is(key, key_size, "realsize"))
        pending->sparse_size = parsed;
    else if (is(key, key_size, "offset"))
        pending->next_offset = parsed;
    else if (is(key, key_size, "numbytes")) {
        int64_t offset = pending->next_offset;
        if (offset < 0)
            return refuse(error, "read sparse map", "a length has no offset");
        pending->next_offset = -1;
        entry->sparse = true;
        return add_segment(entry, offset, parsed, error);
    } else if (is(key, key_size, "numblocks"))
        entry->sparse = true;
    return 0;
}

static int pax_record(struct tar_entry *entry, struct pending *pending, const char *key, size_t key_size,
                      const char *value, size_t size, struct error *error)
{
    static const char xattr[] = "SCHILY.xattr.", sparse[] = "GNU.sparse.";
    size_t xattr_size = sizeof xattr - 1, sparse_size = sizeof sparse - 1;
    int64_t parsed = 0;

    if (key_size > xattr_size && memcmp(key, xattr, xattr_size) == 0)
        return add_xattr(entry, key + xattr_size, key_size - xattr_size, value, size, error);
    if (size == 0) /* "delete any header block field": the field's own value is as good as none */
        return 0;
    if (key_size > sparse_size && memcmp(key, sparse, sparse_size) == 0)
        return gnu_sparse_record(entry, pending, key + sparse_size, key_size - sparse_size, value, size, error);
    if (is(key, key_size, "path"))
        return set_text(&entry->path, value, size, error);
    if (is(key, key_size, "linkpath"))
        return set_text(&entry->link, value, size, error);
    if (is(key, key_size, "size"))
        return whole_decimal(value, size, &pending->stored, error);
    if (is(key, key_size, "mtime"))
        return pax_time(value, size, &entry->mtime, error);
    if (is(key, key_size, "atime")) {
        entry->has_atime = true;
        return pax_time(value, size, &entry->atime, error);
    }
    if (is(key, key_size, "uid")) {
        if (small_number(value, size, UINT32_MAX - 1, &parsed, error) < 0)
            return -1;
        entry->uid = (uid_t)parsed;
    } else if (is(key, key_size, "gid")) {
        if (small_number(value, size, UINT32_MAX - 1, &parsed, error) < 0)
            return -1;
        entry->gid = (gid_t)parsed;
    }
    return 0;
}

/* `LENGTH KEY=VALUE\n` over and over; LENGTH counts the whole record. */
static int pax_apply(struct tar_entry *entry, struct pending *pending, const char *data, size_t size, struct error *error)
{
    while (size > 0) {
        int64_t length;
        size_t used;
        if (decimal(data, size, &length, &used, error) < 0)
            return -1;
        if (length <= (int64_t)used + 1 || (uint64_t)length > size || data[used] != ' ' || data[length - 1] != '\n')
            return refuse(error, "read pax record", "its length is wrong");
        const char *key = data + used + 1;
        size_t left = (size_t)length - used - 2;
        const char *equals = memchr(key, '=', left);
        if (!equals || equals == key)
            return refuse(error, "read pax record", "it has no key");
        size_t key_size = (size_t)(equals - key);
        if (pax_record(entry, pending, key, key_size, equals + 1, left - key_size - 1, error) < 0)
            return -1;
        data += length;
        size -= (size_t)length;
    }
    return 0;
}

/* The data of a header that describes the next one, with a NUL behind it; replaces what `*text` held. */
static int read_text(struct archive *archive, char **text, size_t *length, size_t keep, struct error *error)
{
    int64_t size = archive->left;
    if (size > TEXT_MAX || (int64_t)keep + size > TEXT_MAX)
        return refuse(error, "read header", "an extended header is too long");
    char *more = realloc(*text, keep + (size_t)size + 1);
    if (!more)
        return fail(error, "malloc", ENOMEM);
    *text = more;
    if (stream_bytes(&archive->stream, more + keep, (size_t)size, error) < 0)
        return -1;
    more[keep + (size_t)size] = '\0';
    archive->left = 0;
    if (length)
        *length = keep + (size_t)size;
    return stream_skip(&archive->stream, archive->padding, error);
}

static int check_sum(const unsigned char *block, struct error *error)
{
    const struct tar_header *header = (const void *)block;
    size_t first = offsetof(struct tar_header, checksum), last = first + sizeof header->checksum;
    int64_t said, plain = 0, with_sign = 0; /* some old archivers summed signed characters */
    for (size_t i = 0; i < TAR_BLOCK; i++) {
        unsigned char byte = i >= first && i < last ? ' ' : block[i];
        plain += byte;
        with_sign += (signed char)byte;
    }
    if (number(header->checksum, sizeof header->checksum, &said, error) < 0)
        return -1;
    return said == plain || said == with_sign ? 0 : refuse(error, "read header", "the checksum is wrong");
}

static int old_sparse(struct archive *archive, const unsigned char *block, struct error *error)
{
    struct tar_entry *entry = &archive->entry;
    const char *map = (const char *)block + OLD_SPARSE_OFFSET;
    bool more = block[OLD_SPARSE_MORE] != 0;
    int slots = OLD_SPARSE_HERE;
    if (number((const char *)block + OLD_SPARSE_SIZE, 12, &entry->size, error) < 0)
        return -1;
    entry->sparse = true;
    for (;;) {
        for (int i = 0; i < slots && map[i * 24] != '\0'; i++) {
            int64_t offset, length;
            if (number(map + i * 24, 12, &offset, error) < 0 || number(map + i * 24 + 12, 12, &length, error) < 0 ||
                add_segment(entry, offset, length, error) < 0)
                return -1;
        }
        if (!more)
            return 0;
        int got = stream_block(&archive->stream, &block, error);
        if (got <= 0)
            return got < 0 ? -1 : refuse(error, "read sparse map", "the archive is cut short");
        map = (const char *)block;
        more = block[OLD_SPARSE_BLOCK_MORE] != 0;
        slots = OLD_SPARSE_BLOCK;
    }
}

/* pax 1.0: the map is lines of decimal numbers in front of the data, padded to a block. */
static int map_number(struct archive *archive, size_t *position, int64_t *value, struct error *error)
{
    char text[24];
    for (size_t used = 0; used < sizeof text; used++) {
        if (archive->left < 1)
            return refuse(error, "read sparse map", "it is longer than the entry");
        if (stream_bytes(&archive->stream, &text[used], 1, error) < 0)
            return -1;
        archive->left--;
        ++*position;
        if (text[used] == '\n')
            return whole_decimal(text, used, value, error);
    }
    return refuse(error, "read sparse map", "a number is too long");
}

static int map_in_data(struct archive *archive, struct error *error)
{
    struct tar_entry *entry = &archive->entry;
    size_t position = 0;
    int64_t count, offset, length;
    entry->sparse = true;
    entry->segment_count = 0;
    if (map_number(archive, &position, &count, error) < 0)
        return -1;
    for (int64_t i = 0; i < count; i++) {
        if (map_number(archive, &position, &offset, error) < 0 || map_number(archive, &position, &length, error) < 0 ||
            add_segment(entry, offset, length, error) < 0)
            return -1;
    }
    int64_t rest = (int64_t)((TAR_BLOCK - position % TAR_BLOCK) % TAR_BLOCK);
    if (rest > archive->left)
        return refuse(error, "read sparse map", "it is longer than the entry");
    archive->left -= rest;
    return stream_skip(&archive->stream, rest, error);
}

static int check_segments(const struct archive *archive, struct error *error)
{
    const struct tar_entry *entry = &archive->entry;
    int64_t end = 0, sum = 0;
    for (size_t i = 0; i < entry->segment_count; i++) {
        struct segment segment = entry->segments[i];
        if (segment.offset < end || segment.length < 0 || segment.offset > entry->size ||
            segment.length > entry->size - segment.offset)
            return refuse(error, "read sparse map", "a segment lies outside the file or over another");
        end = segment.offset + segment.length;
        sum += segment.length; /* no overflow: disjoint and inside entry->size */
    }
    return sum == archive->left ? 0 : refuse(error, "read sparse map", "it does not fit the data");
}

static int raw_names(const struct tar_header *header, struct tar_entry *entry, struct error *error)
{
    /* GNU archives ("ustar  ") keep other things where POSIX has the prefix. */
    bool prefix = memcmp(header->magic, "ustar\0", 6) == 0 && header->prefix[0] != '\0';
    size_t prefix_size = prefix ? strnlen(header->prefix, sizeof header->prefix) : 0;
    size_t name_size = strnlen(header->name, sizeof header->name);
    entry->path = calloc(1, prefix_size + 1 + name_size + 1);
    entry->link = strndup(header->link, sizeof header->link);
    if (!entry->path || !entry->link)
        return fail(error, "malloc", ENOMEM);
    char *to = entry->path;
    if (prefix) {
        memcpy(to, header->prefix, prefix_size);
        to[prefix_size] = '/';
        to += prefix_size + 1;
    }
    memcpy(to, header->name, name_size);
    return 0;
}

static int raw_fields(const struct tar_header *header, struct tar_entry *entry, struct pending *pending, struct error *error)
{
    int64_t mode, uid, gid, mtime, major = 0, minor = 0;
    if (number(header->mode, sizeof header->mode, &mode, error) < 0 ||
        number(header->uid, sizeof header->uid, &uid, error) < 0 ||
        number(header->gid, sizeof header->gid, &gid, error) < 0 ||
        number(header->size, sizeof header->size, &pending->stored, error) < 0 ||
        number(header->mtime, sizeof header->mtime, &mtime, error) < 0)
        return -1;
    if ((header->type == TYPE_CHAR || header->type == TYPE_BLOCK) &&
        (number(header->major, sizeof header->major, &major, error) < 0 ||
         number(header->minor, sizeof header->minor, &minor, error) < 0))
        return -1;
    if (uid < 0 || uid >= UINT32_MAX || gid < 0 || gid >= UINT32_MAX || major < 0 || major > 4095 || minor < 0 ||
        minor > 1048575)
        return refuse(error, "read header", "an owner or device number is out of range");
    if (pending->stored < 0)
        return refuse(error, "read header", "the size is negative");
    entry->mode = (mode_t)mode & 07777;
    entry->uid = (uid_t)uid;
    entry->gid = (gid_t)gid;
    entry->mtime.tv_sec = mtime;
    entry->major = (unsigned)major;
    entry->minor = (unsigned)minor;
    entry->type = header->type;
    return raw_names(header, entry, error);
}

static void take_text(char **to, char **from)
{
    if (!*from)
        return;
    free(*to);
    *to = *from;
    *from = NULL;
}

static int set_left(struct archive *archive, int64_t size, struct error *error)
{
    if (size < 0 || size > INT64_MAX - TAR_BLOCK)
        return refuse(error, "read header", "the size is out of range");
    archive->left = size;
    archive->padding = (TAR_BLOCK - size % TAR_BLOCK) % TAR_BLOCK;
    return 0;
}

/* The header block of a real entry, everything said before it applied on top. */
static int build_entry(struct archive *archive, const unsigned char *block, struct pending *pending,
                       struct error *error)
{
    struct tar_entry *entry = &archive->entry;
    if (raw_fields((const void *)block, entry, pending, error) < 0)
        return -1;
    take_text(&entry->path, &pending->name);
    take_text(&entry->link, &pending->link);
    pending->sparse_size = -1;
    pending->next_offset = -1;
    if (pax_apply(entry, pending, archive->global, archive->global_size, error) < 0 ||
        pax_apply(entry, pending, pending->local, pending->local_size, error) < 0)
        return -1;
    take_text(&entry->path, &pending->sparse_name);
    if (!entry->has_atime)
        entry->atime = entry->mtime;

    size_t length = strlen(entry->path);
    if (entry->type == '\0' || entry->type == '7' || entry->type == 'S')
        entry->type = TYPE_FILE;
    if (entry->type == TYPE_FILE && length > 0 && entry->path[length - 1] == '/')
        entry->type = TYPE_DIRECTORY; /* how archives older than ustar wrote directories */
    /* Go's and GNU's readers agree: these types have no data, whatever the size field says. */
    bool header_only = entry->type >= TYPE_LINK && entry->type <= TYPE_FIFO;
    if (set_left(archive, header_only ? 0 : pending->stored, error) < 0)
        return -1;
    entry->size = archive->left;
    if (entry->type != TYPE_FILE)
        return 0;

    if (((const struct tar_header *)(const void *)block)->type == 'S') {
        if (old_sparse(archive, block, error) < 0)
            return -1;
    } else if (pending->sparse_major > 1 || (pending->sparse_major == 1 && pending->sparse_minor != 0)) {
        return refuse(error, "read sparse map", "unknown GNU sparse format");
    } else if (pending->sparse_major == 1 && map_in_data(archive, error) < 0) {
        return -1;
    }
    if (!entry->sparse)
        return 0;
    if (pending->sparse_size >= 0)
        entry->size = pending->sparse_size;
    return check_segments(archive, error);
}

static bool all_zero(const unsigned char *block)
{
    return block[0] == 0 && memcmp(block, block + 1, TAR_BLOCK - 1) == 0;
}

int archive_next(struct archive *archive, struct error *error)
{
    __attribute__((cleanup(pending_free))) struct pending pending = {0};
    entry_free(&archive->entry);
    if (stream_skip(&archive->stream, archive->left, error) < 0)
        return -1;
    /* umoci ends some layers with the last file's last byte: no padding, no zero blocks. */
    int more = archive->padding > 0 ? stream_more(&archive->stream, error) : 1;
    if (more <= 0)
        return more;
    if (stream_skip(&archive->stream, archive->padding, error) < 0)
        return -1;
    archive->left = archive->padding = 0;
    for (bool described = false;; described = true) {
        const unsigned char *block;
        int got = stream_block(&archive->stream, &block, error);
        if (got < 0)
            return -1;
        if (got == 0 || all_zero(block))
            return described ? refuse(error, "read header", "an extended header describes nothing") : 0;
        if (check_sum(block, error) < 0)
            return -1;
        const struct tar_header *header = (const void *)block;
        char type = header->type;
        if (type != 'x' && type != 'g' && type != 'L' && type != 'K')
            return build_entry(archive, block, &pending, error) < 0 ? -1 : 1;

        int64_t size;
        if (number(header->size, sizeof header->size, &size, error) < 0 || set_left(archive, size, error) < 0)
            return -1;
        int result = type == 'x'   ? read_text(archive, &pending.local, &pending.local_size, 0, error)
                     : type == 'L' ? read_text(archive, &pending.name, NULL, 0, error)
                     : type == 'K' ? read_text(archive, &pending.link, NULL, 0, error)
                                   : read_text(archive, &archive->global, &archive->global_size, archive->global_size,
                                               error);
        archive->left = archive->padding = 0;
        if (result < 0)
            return -1;
    }
}

int archive_data(struct archive *archive, int fd, struct error *error)
{
    const struct tar_entry *entry = &archive->entry;
    if (!entry->sparse) {
        int64_t size = archive->left;
        archive->left = 0;
        return stream_copy(&archive->stream, fd, size, 0, error);
    }
    for (size_t i = 0; i < entry->segment_count; i++) {
        struct segment segment = entry->segments[i];
        archive->left -= segment.length;
        if (stream_copy(&archive->stream, fd, segment.length, segment.offset, error) < 0)
            return -1;
    }
    return ftruncate(fd, entry->size) < 0 ? fail(error, "truncate", errno) : 0;
}

void archive_close(struct archive *archive)
{
    entry_free(&archive->entry);
    free(archive->global);
    archive->global = NULL;
    stream_close(&archive->stream);
}
