/* Thin system calls that musl does not wrap, named as the calls, and the constants its headers lack. */
#ifndef DOLIUM_SYS_H
#define DOLIUM_SYS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

#ifndef SYS_openat2
#define SYS_openat2 437
#endif
#ifndef SYS_mount_setattr
#define SYS_mount_setattr 442
#endif
#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#ifndef SYS_open_tree
#define SYS_open_tree 428
#define SYS_move_mount 429
#define SYS_fsopen 430
#define SYS_fsconfig 431
#define SYS_fsmount 432
#endif
#ifndef SYS_pidfd_send_signal
#define SYS_pidfd_send_signal 424
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_clone3
#define SYS_clone3 435
#endif

#ifndef CLONE_NEWTIME
#define CLONE_NEWTIME 0x80
#endif
#ifndef CLONE_NEWCGROUP
#define CLONE_NEWCGROUP 0x02000000
#endif
#ifndef CLONE_PIDFD
#define CLONE_PIDFD 0x1000
#endif
#define DOLIUM_CLONE_CLEAR_SIGHAND 0x100000000ULL

#define DOLIUM_OPEN_TREE_CLONE 1
#define DOLIUM_OPEN_TREE_CLOEXEC O_CLOEXEC
#define DOLIUM_AT_RECURSIVE 0x8000
#define DOLIUM_MOVE_MOUNT_F_EMPTY_PATH 0x04
#define DOLIUM_MOVE_MOUNT_T_EMPTY_PATH 0x40
#define DOLIUM_FSCONFIG_SET_FLAG 0
#define DOLIUM_FSCONFIG_SET_STRING 1
#define DOLIUM_FSCONFIG_SET_FD 5
#define DOLIUM_FSCONFIG_CMD_CREATE 6
#define DOLIUM_FSOPEN_CLOEXEC 1
#define DOLIUM_FSMOUNT_CLOEXEC 1
#define DOLIUM_CLOSE_RANGE_CLOEXEC 4

#define DOLIUM_ATTR_RDONLY 0x01
#define DOLIUM_ATTR_NOSUID 0x02
#define DOLIUM_ATTR_NODEV 0x04
#define DOLIUM_ATTR_NOEXEC 0x08
#define DOLIUM_ATTR__ATIME 0x70
#define DOLIUM_ATTR_NOATIME 0x10
#define DOLIUM_ATTR_STRICTATIME 0x20
#define DOLIUM_ATTR_NODIRATIME 0x80
#define DOLIUM_ATTR_IDMAP 0x100000
#define DOLIUM_ATTR_NOSYMFOLLOW 0x200000

struct dolium_mount_attr {
	uint64_t attr_set, attr_clr, propagation, userns_fd;
};

struct dolium_open_how {
	uint64_t flags, mode, resolve;
};
#define DOLIUM_RESOLVE_NO_XDEV 0x01
#define DOLIUM_RESOLVE_NO_MAGICLINKS 0x02
#define DOLIUM_RESOLVE_NO_SYMLINKS 0x04
#define DOLIUM_RESOLVE_BENEATH 0x08
#define DOLIUM_RESOLVE_IN_ROOT 0x10

struct dolium_clone_args {
	uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size, cgroup;
};

static inline int sys_openat2(int dirfd, const char *path, uint64_t flags, uint64_t mode, uint64_t resolve) {
	struct dolium_open_how how = { .flags = flags, .mode = mode, .resolve = resolve };
	return (int)syscall(SYS_openat2, dirfd, path, &how, sizeof how);
}

static inline int sys_mount_setattr(int dirfd, const char *path, unsigned flags, struct dolium_mount_attr *attr) {
	return (int)syscall(SYS_mount_setattr, dirfd, path, flags, attr, sizeof *attr);
}

static inline int sys_open_tree(int dirfd, const char *path, unsigned flags) {
	return (int)syscall(SYS_open_tree, dirfd, path, flags);
}

static inline int sys_move_mount(int from, const char *from_path, int to, const char *to_path, unsigned flags) {
	return (int)syscall(SYS_move_mount, from, from_path, to, to_path, flags);
}

static inline int sys_fsopen(const char *type, unsigned flags) { return (int)syscall(SYS_fsopen, type, flags); }
static inline int sys_fsconfig(int fd, unsigned cmd, const char *key, const void *value, int aux) {
	return (int)syscall(SYS_fsconfig, fd, cmd, key, value, aux);
}

static inline int sys_fsmount(int fd, unsigned flags, unsigned attrs) {
	return (int)syscall(SYS_fsmount, fd, flags, attrs);
}

static inline int sys_pidfd_open(pid_t pid, unsigned flags) { return (int)syscall(SYS_pidfd_open, pid, flags); }
static inline int sys_pidfd_send_signal(int fd, int sig) {
	return (int)syscall(SYS_pidfd_send_signal, fd, sig, NULL, 0);
}

static inline int sys_close_range(unsigned first, unsigned last, unsigned flags) {
	return (int)syscall(SYS_close_range, first, last, flags);
}

static inline pid_t sys_clone3(struct dolium_clone_args *args) {
	return (pid_t)syscall(SYS_clone3, args, sizeof *args);
}

static inline void close_fd(int *fd) {
	if (*fd >= 0) {
		int saved = errno;
		close(*fd);
		errno = saved;
	}
	*fd = -1;
}
#define cleanup_fd __attribute__((cleanup(close_fd))) int

#endif
