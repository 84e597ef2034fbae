/* Finding and starting the cold compiler: Python without site, reading only the modules of runtime/. */
#include <glob.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "wire.h"

static int exists(const char *path) {
	return access(path, R_OK) == 0;
}

/* The folder that holds the package `dolium`, from where this program was installed: inside the package
 * (dolium/_native/), or beside a Python (bin/) as a wheel's script. 0 or -1. */
static int package_root(const char *self, char *root, size_t size) {
	char pattern[PATH_MAX], *cut;
	glob_t found;
	int n, result = -1;
	n = snprintf(root, size, "%s", self);
	if (n < 0 || (size_t)n >= size || !(cut = strrchr(root, '/')))
		return -1;
	*cut = '\0';
	if ((cut = strstr(root, "/dolium/_native")) && cut[15] == '\0') {
		*cut = '\0';
		return 0;
	}
	snprintf(pattern, sizeof pattern, "%s/../lib/python3*/site-packages/dolium/runtime/cold.py", root);
	if (glob(pattern, 0, NULL, &found))
		return -1;
	if (found.gl_pathc > 0 && strlen(found.gl_pathv[0]) < size) {
		strcpy(root, found.gl_pathv[0]);
		root[strlen(root) - strlen("/dolium/runtime/cold.py")] = '\0';
		result = 0;
	}
	globfree(&found);
	return result;
}

/* The Python of the environment dolium is installed in, else the system's: the cold path needs only its library. */
static void find_python(const char *self, const char *root, const char *called, char *python, size_t size) {
	char folder[PATH_MAX], *cut;
	const char *from[] = { called, self };
	for (int i = 0; i < 2; i++) {
		snprintf(folder, sizeof folder, "%s", from[i] ? from[i] : "");
		if (!(cut = strrchr(folder, '/')))
			continue;
		*cut = '\0';
		if ((size_t)snprintf(python, size, "%s/python3", folder) < size && exists(python))
			return;
	}
	if ((size_t)snprintf(python, size, "%s/../../../bin/python3", root) < size && exists(python))
		return;
	/* an editable install in the checkout */
	if ((size_t)snprintf(python, size, "%s/../.venv/bin/python3", root) < size && exists(python))
		return;
	snprintf(python, size, "/usr/bin/python3");
}

int start_cold_compiler(const char *self, pid_t *pid) {
	char root[PATH_MAX], python[PATH_MAX], code[PATH_MAX + 128];
	int pair[2];
	if (package_root(self, root, sizeof root))
		return -ENOENT;
	find_python(self, root, getenv("_"), python, sizeof python);
	snprintf(code, sizeof code, "import sys;sys.path.insert(0,%c%s%c);from dolium.runtime.cold import main;main(3)", '\'',
		 root, '\'');
	if (strchr(root, '\''))
		return -EINVAL;
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
		return -errno;
	*pid = fork();
	if (*pid < 0) {
		int number = errno;
		close(pair[0]);
		close(pair[1]);
		return -number;
	}
	if (*pid == 0) {
		if (pair[1] == 3)
			fcntl(3, F_SETFD, 0);
		else if (dup2(pair[1], 3) < 0)
			_exit(127);
		sys_close_range(4, ~0u, 0);
		execl(python, python, "-I", "-S", "-E", "-c", code, (char *)NULL);
		_exit(127);
	}
	close(pair[1]);
	return pair[0];
}
