/* dolium-init, the pid 1 of --init: starts the program in a process group of its own (the terminal's foreground one),
 * forwards signals to it, reaps what is orphaned, and ends as the program ends: its code, or 128 and the signal. */
#include "../executor/sys.h"

/* These come from a fault of this process itself, or stop it: they stay as they are. */
static const int kept[] = { SIGFPE, SIGILL, SIGSEGV, SIGBUS, SIGABRT, SIGTRAP, SIGSYS, SIGTTIN, SIGTTOU };

static int fail(int code, const char *what, const char *name) {
	dprintf(2, "dolium-init: %s %s: %s\n", what, name, strerror(errno));
	return code;
}

static void __attribute__((noreturn)) child_main(char **argv, const sigset_t *mask) {
	if (setpgid(0, 0))
		_exit(fail(126, "make a process group for", argv[0]));
	/* From what is not yet the foreground group this raises SIGTTOU: ignored until here. No terminal is fine. */
	if (tcsetpgrp(0, getpgrp()) && errno != ENOTTY && errno != ENXIO && errno != EPERM && errno != EBADF)
		_exit(fail(126, "give the terminal to", argv[0]));
	signal(SIGTTIN, SIG_DFL);
	signal(SIGTTOU, SIG_DFL);
	sigprocmask(SIG_SETMASK, mask, NULL);
	execvp(argv[0], argv);
	_exit(fail(errno == ENOENT || errno == ENOTDIR ? 127 : 126, "exec", argv[0]));
}

/* Reaps all that ended; the program's exit code once it is among them, else -1. */
static int reap(pid_t program) {
	int status, code = -1;
	pid_t pid;
	while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
		if (pid == program)
			code = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
	return code;
}

int main(int argc, char **argv) {
	sigset_t waited, before;
	int code = -1, skip = argc > 1 && !strcmp(argv[1], "--") ? 2 : 1;
	pid_t program;
	if (argc <= skip) {
		dprintf(2, "usage: dolium-init [--] PROGRAM [ARGUMENT ...]\n");
		return 2;
	}
	if (getpid() != 1 && prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
		return fail(1, "become the sub-reaper of", argv[skip]);
	sigfillset(&waited);
	for (size_t i = 0; i < sizeof kept / sizeof kept[0]; i++)
		sigdelset(&waited, kept[i]);
	sigprocmask(SIG_SETMASK, &waited, &before);
	signal(SIGTTIN, SIG_IGN);
	signal(SIGTTOU, SIG_IGN);
	program = fork();
	if (program < 0)
		return fail(1, "fork for", argv[skip]);
	if (program == 0)
		child_main(argv + skip, &before);
	while (code < 0) {
		int number = sigwaitinfo(&waited, NULL);
		if (number == SIGCHLD)
			code = reap(program);
		else if (number > 0 && kill(program, number) && errno != ESRCH)
			return fail(1, "signal", argv[skip]);
	}
	return code;
}
