/* Finding and starting Python: without site, for the compilers. */
#include <glob.h>

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

/* A Python beside a program of ours. (What a shell has typed may be `timeout dolium`.) */
static int python_beside(char python[PATH_MAX], const char *program) {
	const char *slash = program && *program == '/' ? strrchr(program, '/') : NULL;
	return slash && !strncmp(slash + 1, "dolium", 6) && python_at(python, program, (int)(slash - program), "");
}

/* The Python of the environment dolium is installed in, else the system's: the cold path needs only its library. */
static void find_python(const char *self, const char *root, char python[PATH_MAX]) {
	static const char checkout[] = "/src"; /* an editable install */
	int length = (int)strlen(root), inside = (int)strlen(checkout);
	int editable = length > inside && !strcmp(root + length - inside, checkout);
	if (!python_beside(python, getenv("_")) && !python_beside(python, self) &&
	    !python_at(python, root, length, editable ? "/../.venv/bin" : "/../../../bin"))
		strcpy(python, "/usr/bin/python3");
}

int run_python(const char *self, const char *code, char *const *arguments) {
	char root[PATH_MAX], python[PATH_MAX], text[PATH_MAX + 256];
	size_t count = 0;
	TRY(package_root(self, root));
	find_python(self, root, python);
	if (strpbrk(root, "'\\\n"))
		return -EINVAL;
	snprintf(text, sizeof text, "import sys;sys.path.insert(0,'%s');%s", root, code);
	while (arguments[count])
		count++;
	const char *argv[count + 7];
	memcpy(argv, (const char *[]){ python, "-I", "-S", "-E", "-c", text }, 6 * sizeof argv[0]);
	memcpy(argv + 6, arguments, (count + 1) * sizeof argv[0]);
	return or_errno(execv(python, (char **)argv));
}

int start_cold_compiler(const char *self, const char *module, pid_t *pid) {
	char root[PATH_MAX], code[128];
	int pair[2];
	TRY(package_root(self, root));
	snprintf(code, sizeof code, "from dolium.%s import main;main(3)", module);
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
		run_python(self, code, (char *const[]){ NULL });
		_exit(127);
	}
	return keep(&ours);
}
