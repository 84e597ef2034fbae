/* Finding and starting the cold compiler: Python without site, reading only the modules of runtime/. */
#include <glob.h>
#include <limits.h>
#include <stdio.h>
#include <sys/socket.h>

#include "wire.h"

/* The folder that holds the package `dolium`, from where this program was installed: inside the package
 * (dolium/_native/), or beside a Python (bin/) as a wheel's script. 0 or -errno. */
static int package_root(const char *self, char root[PATH_MAX]) {
	static const char inside[] = "/dolium/_native/", below[] = "/dolium/runtime/cold.py";
	const char *slash = strrchr(self, '/'), *package = strstr(self, inside);
	if (!slash)
		return -ENOENT;
	if (package && package + strlen(inside) == slash + 1)
		return format_path(root, "%.*s", (int)(package - self), self);
	char pattern[PATH_MAX];
	glob_t found;
	TRY(format_path(pattern, "%.*s/../lib/python3*/site-packages%s", (int)(slash - self), self, below));
	int result = -ENOENT;
	if (glob(pattern, 0, NULL, &found))
		return result;
	if (found.gl_pathc > 0)
		result = format_path(root, "%.*s", (int)(strlen(found.gl_pathv[0]) - strlen(below)), found.gl_pathv[0]);
	globfree(&found);
	return result;
}

/* A Python at PREFIX + middle. */
static int python_at(char python[PATH_MAX], const char *prefix, int length, const char *middle) {
	return !format_path(python, "%.*s%s/python3", length, prefix, middle) && access(python, R_OK) == 0;
}

/* A Python beside a program. */
static int python_beside(char python[PATH_MAX], const char *program) {
	const char *slash = program ? strrchr(program, '/') : NULL;
	return slash && python_at(python, program, (int)(slash - program), "");
}

/* The Python of the environment dolium is installed in, else the system's: the cold path needs only its library. */
static void find_python(const char *self, const char *root, char python[PATH_MAX]) {
	int length = (int)strlen(root);
	if (!python_beside(python, getenv("_")) && !python_beside(python, self) &&
	    !python_at(python, root, length, "/../../../bin") &&
	    !python_at(python, root, length, "/../.venv/bin")) /* an editable install in the checkout */
		strcpy(python, "/usr/bin/python3");
}

int start_cold_compiler(const char *self, pid_t *pid) {
	char root[PATH_MAX], python[PATH_MAX], code[PATH_MAX + 128];
	int pair[2];
	if (package_root(self, root))
		return -ENOENT;
	find_python(self, root, python);
	if (strchr(root, '\''))
		return -EINVAL;
	snprintf(code, sizeof code, "import sys;sys.path.insert(0,'%s');from dolium.runtime.cold import main;main(3)", root);
	TRY(or_errno(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair)));
	cleanup_fd ours = pair[0], theirs = pair[1];
	*pid = or_errno(fork());
	TRY(*pid);
	if (*pid == 0) {
		if (theirs == 3)
			fcntl(3, F_SETFD, 0);
		else if (dup2(theirs, 3) < 0)
			_exit(127);
		sys_close_range(4, ~0u, 0);
		execl(python, python, "-I", "-S", "-E", "-c", code, (char *)NULL);
		_exit(127);
	}
	return keep(&ours);
}
