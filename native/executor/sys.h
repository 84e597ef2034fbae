/* The headers that most files need. Thin system calls that libc does not wrap, named as the calls, and the one idiom for
 * errors: an fd, a count or 0, or -errno. (errno itself is left set too.) */
#pragma once

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/close_range.h>
#include <linux/openat2.h>
#include <linux/sched.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#ifndef MOUNT_ATTR_RDONLY /* glibc's sys/mount.h has it and may not meet the kernel's; musl's has not */
#include <linux/mount.h>
#endif

/* What a libc call says by -1 and errno. */
static inline int or_errno(long result) { return result < 0 ? -errno : (int)result; }

/* The value of the call; or the function ends with the -errno it gave. (In an initializer too: a variable's cleanup
 * begins after it.) */
#define TRY(call)                     \
	({                            \
		int tried = (call);   \
		if (tried < 0)        \
			return tried; \
		tried;                \
	})

/* The call again while a signal interrupts it. */
#define RETRY(call)                                    \
	({                                             \
		long retried;                          \
		do                                     \
			retried = (call);              \
		while (retried < 0 && errno == EINTR); \
		retried;                               \
	})

static inline int sys_openat2(int dirfd, const char *path, uint64_t flags, uint64_t mode, uint64_t resolve) {
	struct open_how how = { .flags = flags, .mode = mode, .resolve = resolve };
	return or_errno(syscall(SYS_openat2, dirfd, path, &how, sizeof how));
}

#define SYSTEM_CALL(name, parameters, ...) \
	static inline int sys_##name parameters { return or_errno(syscall(SYS_##name, __VA_ARGS__)); }
SYSTEM_CALL(mount_setattr, (int dirfd, const char *path, unsigned flags, struct mount_attr *attr),
	    dirfd, path, flags, attr, sizeof *attr)
SYSTEM_CALL(open_tree, (int dirfd, const char *path, unsigned flags), dirfd, path, flags)
SYSTEM_CALL(move_mount, (int from, const char *from_path, int to, const char *to_path, unsigned flags),
	    from, from_path, to, to_path, flags)
SYSTEM_CALL(fsopen, (const char *type, unsigned flags), type, flags)
SYSTEM_CALL(fsconfig, (int fd, unsigned cmd, const char *key, const void *value, int aux), fd, cmd, key, value, aux)
SYSTEM_CALL(fsmount, (int fd, unsigned flags, unsigned attrs), fd, flags, attrs)
SYSTEM_CALL(pidfd_open, (pid_t pid, unsigned flags), pid, flags)
SYSTEM_CALL(pidfd_send_signal, (int fd, int sig), fd, sig, NULL, 0)
SYSTEM_CALL(close_range, (unsigned first, unsigned last, unsigned flags), first, last, flags)
SYSTEM_CALL(clone3, (struct clone_args *args), args, sizeof *args)

static inline void close_fd(int *fd) {
	if (*fd >= 0) {
		int saved = errno;
		close(*fd);
		errno = saved;
	}
	*fd = -1;
}

static inline void close_dir(DIR **folder) {
	if (*folder)
		closedir(*folder);
}

/* Closed at the end of the block. */
#define cleanup_fd __attribute__((cleanup(close_fd))) int
#define cleanup_dir __attribute__((cleanup(close_dir))) DIR *

/* Out of the hands of cleanup_fd. */
static inline int keep(int *fd) {
	int kept = *fd;
	*fd = -1;
	return kept;
}

/* readdir without "." and "..". */
static inline struct dirent *next_entry(DIR *folder) {
	struct dirent *entry;
	do
		entry = readdir(folder);
	while (entry && (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")));
	return entry;
}
