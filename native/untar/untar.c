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

#include <inttypes.h>
#include <linux/capability.h>

#define RIGHTS (1u << CAP_CHOWN | 1u << CAP_DAC_OVERRIDE | 1u << CAP_FOWNER | 1u << CAP_FSETID | 1u << CAP_MKNOD | \
		1u << CAP_SETFCAP | 1u << CAP_SYS_ADMIN) /* the last for trusted.overlay.opaque */

void give_up(const char *operation, const char *reason, int number) {
	printf("%d\n", number);
	fputs("untar: ", stderr);
	/* A hostile name must not write escape sequences to the terminal that shows the message. */
	for (const unsigned char *byte = (void *)(entry.path ? entry.path : "archive"); *byte; byte++)
		fprintf(stderr, *byte < 0x20 || *byte == 0x7f ? "\\%03o" : "%c", *byte);
	fprintf(stderr, ": %s: %s\n", operation, reason);
	exit(1);
}

void *checked(void *memory) {
	if (!memory)
		fail("malloc");
	return memory;
}

void *grow(void *array, size_t count, size_t size) {
	return count & (count - 1) ? array : checked(realloc(array, (count ? count * 2 : 1) * size));
}

static int open_root(char *where) {
	char *rest;
	errno = 0;
	long fd = strtol(where, &rest, 10);
	if (*where >= '0' && *where <= '9' && *rest == '\0' && errno == 0 && fd >= 3 && fd <= INT32_MAX)
		return (int)fd;
	entry.path = where; /* what a failure names */
	must(fd = open(where, O_RDONLY | O_DIRECTORY | O_CLOEXEC), "open");
	entry.path = NULL;
	return (int)fd;
}

/* What hostile input may make of us reaches this directory, with the rights that unpacking takes. */
static void shut_in(void) {
	struct __user_cap_header_struct head = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct rights[2] = { { .effective = RIGHTS, .permitted = RIGHTS } };
	if (fchdir(tree.root) < 0 || chroot(".") < 0 || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 ||
	    syscall(SYS_capset, &head, rights) < 0)
		fail("give up rights");
}

int main(int count, char **words) {
	char *where = NULL;
	for (int i = 1; i < count; i++) {
		if (strcmp(words[i], "--apply") == 0)
			tree.apply = true;
		else if (strcmp(words[i], "--no-chown") == 0)
			tree.no_chown = true;
		else
			where = !where && words[i][0] != '-' ? words[i] : "";
	}
	if (!where || !*where) {
		fputs("usage: dolium-untar [--apply] [--no-chown] DIRECTORY|FD < ARCHIVE\n", stderr);
		return 2;
	}
	tree_open(open_root(where));
	if (geteuid() == 0)
		shut_in();
	while (archive_next())
		tree_extract();
	tree_finish();
	archive_drain();
	printf("%" PRIu64 " %" PRIu64 "\n", tree.entries, tree.bytes);
	return 0;
}
