/* Running a plan: the one executor that front and shim share.
 *
 *   parent                                   child (its own image from clone3 on; never CLONE_VM)
 *   PARENT_BEFORE_CLONE ops
 *   clone3  -------------------------------> waits
 *   PARENT_AFTER_CLONE ops (maps)  -- go --> CHILD_BEFORE_PIVOT ops
 *   PARENT_BEFORE_PIVOT ops (hooks) <------- at the barrier, only when there are such ops
 *                                  -- go --> CHILD_AFTER_PIVOT ops
 *   PARENT_CREATED ops            <--------- created
 *                                            wait_start, or the parent's go
 *                                            AFTER_START ops, exec
 *   PARENT_STARTED ops            <--------- the socket closes on exec
 *
 * The messages carry a type, the operation and an errno; the child's error reaches the user as the only message.
 */
#pragma once

#include "plan.h"

#define LOCK_SLOT (PLAN_SLOTS - 1)

struct buffer {
	char *data;
	size_t used, room;
	int failed; /* memory ran out; checked once, when sent */
};

struct failure {
	int set;
	uint32_t op;      /* index in the plan, or UINT32_MAX when no operation is to blame */
	int number;       /* errno, or 0 */
	char text[512];   /* the one message a person reads */
};

struct launch {
	const struct plan *plan;
	int slot[PLAN_SLOTS];    /* fds; -1 = empty */
	pid_t pid;               /* of init, in the runtime's pid namespace; 0 before clone */
	int pidfd;
	uint64_t start_time;     /* of init, clock ticks after boot (field 22 of /proc/PID/stat) */
	int sync;                /* socket to the child */
	int root;                /* child: fd of the new root */
	int proc;                /* child: trusted /proc of its own pid namespace */
	int pivoted;
	int joined_mount;        /* the child is in a mount namespace that was there before */
	int cwd_set;
	int held_exit;           /* what OP_exit_code asked for */
	int wants_hold;
	int console;             /* parent: the pty's master when no console socket took it; -1 = none */
	int preserve;
	int inherited;           /* fds from 3 up to here are the caller's: all others are our own */
	int birth;               /* slot of the v2 cgroup the child is born in; 0 = the parent's */
	int only_slots;          /* the child closes what is in no slot, first thing */
	int unshare_flags;
	char *program;           /* what find_executable found in PATH; NULL = argv[0] itself */
	uint32_t *microseconds;  /* one per operation, shared with the child */
	struct failure failure;
	const char *detail;      /* what an operation adds to its message; constant or in detail_text */
	char detail_text[256];
	const char *log_path;    /* in the plan */
	int log_json;
	sigset_t original_mask;
	char *home;              /* "HOME=..." to add, when the environment has none */
};

/* All return 0, or -1 with launch->failure set; launch_end is due in any case, once. */
int launch_init(struct launch *launch, const struct plan *plan);
/* Stages up to PARENT_CREATED. On failure the child is dead and reaped and the ON_FAILURE operations have run. */
int launch_create(struct launch *launch);
/* For a plan without wait_start: lets the child exec, runs PARENT_STARTED. Failure is as launch_create's. */
int launch_start(struct launch *launch);
/* Kills and reaps the child, runs the ON_FAILURE operations. */
void launch_abandon(struct launch *launch);
/* Runs the AFTER_EXIT operations; goes on after a failure and reports the first. */
int launch_after_exit(struct launch *launch);
void launch_end(struct launch *launch);

/* Shared between the files of the executor. */
typedef int op_function(struct launch *launch, const struct op *op);
#define OPERATION_ARGS __attribute__((unused)) struct launch *launch, __attribute__((unused)) const struct op *op
/* An operation that is one expression. */
#define OPERATION(name, result) int do_##name(OPERATION_ARGS) { return result; }
#define OP(code, name, signature) op_function do_##name;
#include "ops.def"
#undef OP

/* 0 or -errno; detail may say more. */
int fail_with(struct launch *launch, int number, const char *format, ...) __attribute__((format(printf, 3, 4)));
/* TRY within an operation, with a detail. */
#define TRY_SAYING(call, ...)                                          \
	({                                                             \
		int tried = (call);                                    \
		if (tried < 0)                                         \
			return fail_with(launch, -tried, __VA_ARGS__); \
		tried;                                                 \
	})
void set_failure(struct launch *launch, uint32_t op, int number, const char *format, ...)
	__attribute__((format(printf, 4, 5)));
/* Puts an fd into a slot, or passes -errno on. */
int take_slot(struct launch *launch, int64_t slot, int fd);
int slot_fd(const struct launch *launch, int64_t slot);
int64_t clock_ns(clockid_t clock);
const struct op *find_op(const struct plan *plan, uint16_t code);
int wait_for(pid_t pid, int *status); /* the pid or -errno */
int all_signals(void);                /* a signalfd that does not block, or -1 */
/* The next signal goes on to another process; one that is `kept` does not, and is returned. */
int pass_signal(int signals, int pidfd, int kept);
uint64_t process_start_time(pid_t pid);
int write_all(int fd, const void *data, size_t len);
int copy_all(int from, int to);
/* A whole file by rename of `fresh`, which is in the same folder. */
int replace_file(const char *path, const char *fresh, mode_t mode, const void *data, size_t len);
/* The first bytes of a file, as a text; their number or -errno. */
int read_text(const char *path, char *out, size_t size);
int write_path(int dirfd, const char *path, const char *data, size_t len);
int send_console(struct launch *launch, int64_t slot, int fd);
/* seccomp(2): 0, or the listener's fd where the flags ask for one. */
int load_filter(struct launch *launch, int64_t flags, struct string code);
/* The text with \001p replaced by init's pid, \001s by its start time; \001 doubled is the byte itself. */
int render(const struct launch *launch, struct string template, struct buffer *out);
/* A socket connected or listening by a path of any length, or -errno. */
int connect_unix(int type, const char *path);
int listen_unix(int type, const char *path, int waiting);
/* Becomes the program, with the caller's signal mask and the descriptors below `fds`. -errno. */
int exec_program(struct launch *launch, const char *path, const struct list *args, const struct list *variables, int fds);

/* paths.c. A path of at most PATH_MAX: 0 or -ENAMETOOLONG. */
int format_path(char *path, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* An untrusted root is walked only through these */
int open_in_root(const struct launch *launch, const char *path, uint64_t flags);
int make_in_root(const struct launch *launch, const char *path, int directory, mode_t mode);
int parent_in_root(const struct launch *launch, const char *path, const char **last);
