/*
 * The archive side: ustar, POSIX pax (local and global records), GNU long names, base-256 numbers and all four ways GNU
 * tar writes sparse files. Nothing here touches the file system. Every number is bounded before it is used as a size.
 */
#include "untar.h"

#define TAR_BLOCK 512
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

struct tar_entry entry;
static int64_t left;     /* data bytes of the entry that were not read */
static int64_t padding;  /* zeros behind them */
static char *global;     /* pax records in force for all entries that follow */
static size_t global_size;

/* What the headers before an entry said about it. */
static struct {
	char *global, *local, *name, *link, *sparse_name; /* global: a copy that may be cut up */
	size_t local_size;
	int64_t stored, sparse_size, sparse_major, sparse_minor, sparse_blocks;
	int64_t next_offset; /* pax 0.0: an offset whose numbytes has not come yet, or -1 */
} said;

/* ---- buffered standard input; one that ends early is an error ---- */

static unsigned char buffer[256 * 1024];
static size_t start, end;

/* When all was used. There is no EINTR without signal handlers. */
static bool fill(void) {
	ssize_t got = read(STDIN_FILENO, buffer, sizeof buffer);
	must(got, "read archive");
	start = 0;
	end = (size_t)got;
	return got > 0;
}

/* How many of the next `size` bytes are in the buffer now: at least one. */
static size_t piece(int64_t size) {
	refuse_if(start == end && !fill(), "read archive", "the archive is cut short");
	return (int64_t)(end - start) < size ? end - start : (size_t)size;
}

static void read_bytes(char *to, size_t size) {
	for (size_t n; size > 0; to += n, size -= n) {
		n = piece((int64_t)size);
		memcpy(to, buffer + start, n);
		start += n;
	}
}

/* The next 512 bytes, valid until the next call; NULL when the stream ended on a block boundary. */
static const void *next_block(void) {
	static char block[TAR_BLOCK];
	if (start == end && !fill())
		return NULL;
	read_bytes(block, sizeof block);
	return block;
}

static void skip(int64_t size) {
	for (size_t n; size > 0; size -= (int64_t)n) {
		n = piece(size);
		start += n;
	}
}

static void copy(int fd, int64_t size, int64_t offset) {
	for (ssize_t put; size > 0; offset += put, size -= put) {
		size_t most = piece(size);
		put = pwrite(fd, buffer + start, most, offset);
		must(put, "write");
		start += (size_t)put;
	}
}

void archive_drain(void) {
	while (fill())
		continue;
}

/* ---- numbers ---- */

/* Octal text or GNU base-256, two's complement; at most twelve bytes. */
static int64_t number(const char *field, size_t size) {
	const unsigned char *byte = (const unsigned char *)field, *stop = byte + size;
	int64_t value = 0;
	if (*byte & 0x80) {
		/* All bits of a negative number's head are set; bit 7 only marks the encoding in a positive one. */
		for (value = *byte == 0xff ? -1 : *byte & 0x7f; ++byte < stop; value |= *byte)
			refuse_if(__builtin_mul_overflow(value, 256, &value), "read header", "a number is too large");
		return value;
	}
	while (byte < stop && *byte == ' ')
		byte++;
	for (; byte < stop && *byte != '\0' && *byte != ' '; byte++) {
		refuse_if(*byte < '0' || *byte > '7', "read header", "a number is not octal");
		value = value << 3 | (*byte - '0');
	}
	return value;
}
#define NUMBER(field) number(field, sizeof(field))

/* Decimal digits; the text goes on behind them. */
static int64_t decimal(const char **text) {
	int64_t sum = 0;
	refuse_if(**text < '0' || **text > '9', "read pax record", "a number has no digits");
	for (; **text >= '0' && **text <= '9'; ++*text)
		if (__builtin_mul_overflow(sum, 10, &sum) || __builtin_add_overflow(sum, **text - '0', &sum))
			refuse("read pax record", "a number is too large");
	return sum;
}

static int64_t whole_decimal(const char *text, size_t size, int64_t most) {
	const char *at = text;
	int64_t value = decimal(&at);
	refuse_if(at != text + size, "read pax record", "a number is not decimal");
	refuse_if(value > most, "read pax record", "a number is too large");
	return value;
}

/* ---- pax records ---- */

static void add_segment(int64_t offset, int64_t length) {
	refuse_if(entry.segment_count >= SEGMENTS_MAX, "read sparse map", "too many segments");
	entry.segments = grow(entry.segments, entry.segment_count, sizeof *entry.segments);
	entry.segments[entry.segment_count++] = (struct segment){ .offset = offset, .length = length };
}

static void add_xattr(const char *name, const char *value, size_t size) {
	size_t at = 0;
	while (at < entry.xattr_count && strcmp(entry.xattrs[at].name, name) != 0)
		at++; /* a local record replaces a global one */
	refuse_if(at >= XATTRS_MAX, "read pax record", "too many extended attributes");
	if (at == entry.xattr_count)
		entry.xattrs = grow(entry.xattrs, entry.xattr_count++, sizeof *entry.xattrs);
	entry.xattrs[at] = (struct xattr){ .name = name, .value = value, .length = size };
}

static void set_text(void *to, const char *text, size_t size) {
	refuse_if(strlen(text) != size, "read pax record", "a name contains NUL");
	free(*(char **)to);
	*(char **)to = checked(strdup(text));
}

static void set_number(void *to, const char *text, size_t size) {
	*(int64_t *)to = whole_decimal(text, size, INT64_MAX);
}

static void set_owner(void *to, const char *text, size_t size) {
	*(uid_t *)to = (uid_t)whole_decimal(text, size, UINT32_MAX - 1);
}

/* Seconds with a fraction, possibly before 1970. */
static void set_time(void *to, const char *text, size_t size) {
	const char *stop = text + size;
	bool negative = *text == '-';
	text += negative;
	int64_t seconds = decimal(&text);
	long nanoseconds = 0, unit = 100000000;
	refuse_if(text != stop && *text++ != '.', "read pax record", "a time is not a number");
	for (; text != stop; text++, unit /= 10) {
		refuse_if(*text < '0' || *text > '9', "read pax record", "a time is not a number");
		nanoseconds += unit * (*text - '0');
	}
	if (negative) {
		seconds = -seconds - (nanoseconds > 0);
		nanoseconds = nanoseconds > 0 ? 1000000000 - nanoseconds : 0;
	}
	*(struct timespec *)to = (struct timespec){ .tv_sec = seconds, .tv_nsec = nanoseconds };
}

/* pax 0.0: an offset and a length by turns. */
static void set_length(void *to, const char *text, size_t size) {
	int64_t *offset = to, length = whole_decimal(text, size, INT64_MAX);
	refuse_if(*offset < 0, "read sparse map", "a length has no offset");
	add_segment(*offset, length);
	*offset = -1;
}

/* pax 0.1: `offset,length,offset,length...` */
static void set_map(void *count, const char *text, size_t size) {
	const char *stop = text + size;
	int64_t pair[2];
	for (*(size_t *)count = 0; text < stop; add_segment(pair[0], pair[1]))
		for (int i = 0; i < 2; i++) {
			pair[i] = decimal(&text);
			refuse_if(text < stop && *text++ != ',', "read sparse map", "not a list of numbers");
		}
}

static const struct {
	const char *key;
	void (*set)(void *to, const char *text, size_t size);
	void *to;
} pax_keys[] = {
	{ "path", set_text, &entry.path },
	{ "linkpath", set_text, &entry.link },
	{ "size", set_number, &said.stored },
	{ "mtime", set_time, &entry.mtime },
	{ "atime", set_time, &entry.atime },
	{ "uid", set_owner, &entry.uid },
	{ "gid", set_owner, &entry.gid },
	{ "GNU.sparse.name", set_text, &said.sparse_name },
	{ "GNU.sparse.major", set_number, &said.sparse_major },
	{ "GNU.sparse.minor", set_number, &said.sparse_minor },
	{ "GNU.sparse.size", set_number, &said.sparse_size },
	{ "GNU.sparse.realsize", set_number, &said.sparse_size },
	{ "GNU.sparse.numblocks", set_number, &said.sparse_blocks },
	{ "GNU.sparse.offset", set_number, &said.next_offset },
	{ "GNU.sparse.numbytes", set_length, &said.next_offset },
	{ "GNU.sparse.map", set_map, &entry.segment_count },
};

static void pax_record(const char *key, const char *value, size_t size) {
	static const char xattr[] = "SCHILY.xattr.";
	if (strncmp(key, xattr, sizeof xattr - 1) == 0 && key[sizeof xattr - 1])
		add_xattr(key + sizeof xattr - 1, value, size);
	/* An empty value is to "delete any header block field": the field's own value is as good as none. */
	for (size_t i = 0; size > 0 && i < sizeof pax_keys / sizeof pax_keys[0]; i++)
		if (strcmp(key, pax_keys[i].key) == 0)
			pax_keys[i].set(pax_keys[i].to, value, size);
}

/* `LENGTH KEY=VALUE\n` over and over; LENGTH counts the whole record. Keys and values become strings, in place. */
static void pax_apply(char *data, size_t size) {
	while (size > 0) {
		const char *digits = data;
		int64_t length = decimal(&digits);
		int64_t used = digits - data;
		if (length <= used + 1 || (uint64_t)length > size || *digits != ' ' || data[length - 1] != '\n')
			refuse("read pax record", "its length is wrong");
		char *key = data + used + 1, *stop = data + length - 1;
		char *equals = memchr(key, '=', (size_t)(stop - key));
		if (!equals || equals == key || memchr(key, '\0', (size_t)(equals - key)))
			refuse("read pax record", "it has no key");
		*equals = *stop = '\0';
		pax_record(key, equals + 1, (size_t)(stop - equals - 1));
		data += length;
		size -= (size_t)length;
	}
}

/* The data of a header that describes the next one, behind the first `keep` bytes of `*text`; gives the length. */
static size_t read_text(char **text, size_t keep) {
	refuse_if(left > TEXT_MAX || (int64_t)keep + left > TEXT_MAX, "read header", "an extended header is too long");
	size_t size = keep + (size_t)left;
	*text = checked(realloc(*text, size + 1));
	read_bytes(*text + keep, (size_t)left);
	(*text)[size] = '\0';
	skip(padding);
	return size;
}

/* ---- sparse maps ---- */

static void old_sparse(const char *block) {
	const char *map = block + OLD_SPARSE_OFFSET;
	bool more = block[OLD_SPARSE_MORE] != 0;
	entry.size = number(block + OLD_SPARSE_SIZE, 12);
	for (int slots = OLD_SPARSE_HERE;; slots = OLD_SPARSE_BLOCK) {
		for (int i = 0; i < slots && map[i * 24] != '\0'; i++) {
			int64_t offset = number(map + i * 24, 12);
			add_segment(offset, number(map + i * 24 + 12, 12));
		}
		if (!more)
			return;
		map = next_block();
		refuse_if(!map, "read sparse map", "the archive is cut short");
		more = map[OLD_SPARSE_BLOCK_MORE] != 0;
	}
}

/* pax 1.0: the map is lines of decimal numbers in front of the data, padded to a block. */
static int64_t map_number(void) {
	char text[24];
	for (size_t used = 0; used < sizeof text; used++) {
		refuse_if(left < 1, "read sparse map", "it is longer than the entry");
		read_bytes(&text[used], 1);
		left--;
		if (text[used] == '\n') {
			text[used] = '\0';
			return whole_decimal(text, used, INT64_MAX);
		}
	}
	refuse("read sparse map", "a number is too long");
}

static void map_in_data(void) {
	int64_t before = left;
	entry.segment_count = 0;
	for (int64_t count = map_number(); count > 0; count--) {
		int64_t offset = map_number();
		add_segment(offset, map_number());
	}
	int64_t rest = (TAR_BLOCK - (before - left) % TAR_BLOCK) % TAR_BLOCK;
	refuse_if(rest > left, "read sparse map", "it is longer than the entry");
	left -= rest;
	skip(rest);
}

static void check_segments(void) {
	int64_t stop = 0, sum = 0;
	for (size_t i = 0; i < entry.segment_count; i++) {
		struct segment s = entry.segments[i];
		if (s.offset < stop || s.length < 0 || s.offset > entry.size || s.length > entry.size - s.offset)
			refuse("read sparse map", "a segment lies outside the file or over another");
		stop = s.offset + s.length;
		sum += s.length; /* no overflow: disjoint and inside entry.size */
	}
	refuse_if(sum != left, "read sparse map", "it does not fit the data");
}

/* All that an entry's header and the records before it say of holes. */
static void read_sparse(const struct tar_header *header) {
	bool old = header->type == 'S', in_data = !old && said.sparse_major == 1;
	if (old)
		old_sparse((const char *)header);
	else if (said.sparse_major > 1 || (in_data && said.sparse_minor != 0))
		refuse("read sparse map", "unknown GNU sparse format");
	else if (in_data)
		map_in_data();
	entry.sparse = old || in_data || said.sparse_blocks >= 0 || entry.segment_count > 0;
	if (!entry.sparse)
		return;
	if (said.sparse_size >= 0)
		entry.size = said.sparse_size;
	check_segments();
}

/* ---- headers ---- */

static void check_sum(const struct tar_header *header) {
	const unsigned char *block = (const void *)header;
	size_t first = offsetof(struct tar_header, checksum), last = first + sizeof header->checksum;
	int64_t plain = 0, with_sign = 0; /* some old archivers summed signed characters */
	for (size_t i = 0; i < TAR_BLOCK; i++) {
		unsigned char byte = i >= first && i < last ? ' ' : block[i];
		plain += byte;
		with_sign += (signed char)byte;
	}
	int64_t claimed = NUMBER(header->checksum);
	refuse_if(claimed != plain && claimed != with_sign, "read header", "the checksum is wrong");
}

static unsigned bounded(int64_t value, int64_t most) {
	refuse_if(value < 0 || value > most, "read header", "an owner or device number is out of range");
	return (unsigned)value;
}

static void raw_fields(const struct tar_header *header) {
	bool device = header->type == TYPE_CHAR || header->type == TYPE_BLOCK;
	entry.mode = (mode_t)NUMBER(header->mode) & 07777;
	entry.uid = bounded(NUMBER(header->uid), UINT32_MAX - 1);
	entry.gid = bounded(NUMBER(header->gid), UINT32_MAX - 1);
	entry.major = device ? bounded(NUMBER(header->major), 4095) : 0;
	entry.minor = device ? bounded(NUMBER(header->minor), 1048575) : 0;
	entry.mtime.tv_sec = NUMBER(header->mtime);
	entry.type = header->type;
	said.stored = NUMBER(header->size);
	refuse_if(said.stored < 0, "read header", "the size is negative");
	/* GNU archives ("ustar  ") keep other things where POSIX has the prefix. */
	if (memcmp(header->magic, "ustar\0", 6) != 0 || header->prefix[0] == '\0')
		entry.path = checked(strndup(header->name, sizeof header->name));
	else if (asprintf(&entry.path, "%.155s/%.100s", header->prefix, header->name) < 0)
		fail("malloc");
	entry.link = checked(strndup(header->link, sizeof header->link));
}

static void override(char **text, char **by) {
	if (!*by)
		return;
	free(*text);
	*text = *by;
	*by = NULL;
}

static void set_left(int64_t size) {
	refuse_if(size < 0 || size > INT64_MAX - TAR_BLOCK, "read header", "the size is out of range");
	left = size;
	padding = (TAR_BLOCK - size % TAR_BLOCK) % TAR_BLOCK;
}

/* The header block of a real entry, everything said before it applied on top. */
static void build_entry(const struct tar_header *header) {
	raw_fields(header);
	override(&entry.path, &said.name);
	override(&entry.link, &said.link);
	said.sparse_size = said.sparse_blocks = said.next_offset = -1;
	entry.atime.tv_nsec = -1; /* until a record says it */
	if (global_size > 0)
		pax_apply(said.global = memcpy(checked(malloc(global_size + 1)), global, global_size + 1), global_size);
	pax_apply(said.local, said.local_size);
	override(&entry.path, &said.sparse_name);
	if (entry.atime.tv_nsec < 0)
		entry.atime = entry.mtime;
	size_t length = strlen(entry.path);
	if (entry.type == '\0' || entry.type == '7' || entry.type == 'S')
		entry.type = TYPE_FILE;
	if (entry.type == TYPE_FILE && length > 0 && entry.path[length - 1] == '/')
		entry.type = TYPE_DIRECTORY; /* how archives older than ustar wrote directories */
	/* Go's and GNU's readers agree: these types have no data, whatever the size field says. */
	bool header_only = entry.type >= TYPE_LINK && entry.type <= TYPE_FIFO;
	set_left(header_only ? 0 : said.stored);
	entry.size = left;
	if (entry.type == TYPE_FILE)
		read_sparse(header);
}

static void forget(void) {
	char *const texts[] = { entry.path, entry.link, said.global, said.local, said.name, said.link, said.sparse_name };
	for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++)
		free(texts[i]);
	free(entry.xattrs);
	free(entry.segments);
	memset(&entry, 0, sizeof entry);
	memset(&said, 0, sizeof said);
}

bool archive_next(void) {
	static const char zeros[TAR_BLOCK];
	forget();
	skip(left);
	/* umoci ends some layers with the last file's last byte: no padding, no zero blocks. */
	if (padding > 0 && start == end && !fill())
		return false;
	skip(padding);
	for (bool described = false;; described = true) {
		const struct tar_header *header = next_block();
		if (!header || memcmp(header, zeros, sizeof zeros) == 0) {
			refuse_if(described, "read header", "an extended header describes nothing");
			left = padding = 0;
			return false;
		}
		check_sum(header);
		char type = header->type;
		if (!memchr("xgLK", type, 4)) {
			build_entry(header);
			return true;
		}
		set_left(NUMBER(header->size));
		if (type == 'x')
			said.local_size = read_text(&said.local, 0);
		else if (type == 'g')
			global_size = read_text(&global, global_size);
		else
			read_text(type == 'L' ? &said.name : &said.link, 0);
	}
}

void archive_data(int fd) {
	if (!entry.sparse)
		copy(fd, left, 0);
	for (size_t i = 0; i < entry.segment_count; i++)
		copy(fd, entry.segments[i].length, entry.segments[i].offset);
	left = 0;
	if (entry.sparse)
		must(ftruncate(fd, entry.size), "truncate");
}
