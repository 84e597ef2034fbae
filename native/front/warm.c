/* The warm compiler: it answers what the cold one answers, without Python's start. Nothing here can fail a call: without a
 * warm compiler there is the cold one, and a compiler's answers have no side effects. */
#include <sys/time.h>

#include "wire.h"

#define PATIENCE_SECONDS 2

static uint64_t mix(uint64_t hash, uint64_t value) { /* FNV-1a */
	for (int i = 0; i < 8; i++, value >>= 8)
		hash = (hash ^ (value & 255)) * 0x100000001b3;
	return hash;
}

/* The folder of the sockets. Nobody but this user may come near it. */
static int warm_folder(char folder[PATH_MAX]) {
	const char *wish = getenv("DOLIUM_WARM"), *runtime = getenv("XDG_RUNTIME_DIR");
	struct stat st;
	if (wish && *wish)
		TRY(format_path(folder, "%s", wish));
	else if (geteuid() == 0)
		TRY(format_path(folder, "/run/dolium-warm"));
	else
		TRY(format_path(folder, "%s/dolium-warm", runtime ? runtime : ""));
	if (folder[0] != '/' || (wish && !strcmp(wish, "off")))
		return -ENOENT;
	if (mkdir(folder, 0700) && errno != EEXIST)
		return -errno;
	TRY(or_errno(lstat(folder, &st)));
	return S_ISDIR(st.st_mode) && st.st_uid == geteuid() && !(st.st_mode & 077) ? 0 : -EPERM;
}

/* A socket's name is made of what both sides must have in common: the program, to the moment it was installed, all
 * namespaces, the root. Where one differs there is no compiler to be found. */
int warm_place(const char *self, char place[PATH_MAX]) {
	static const char *const common[] = { "/", "/proc/self/ns/mnt", "/proc/self/ns/user", "/proc/self/ns/pid",
		"/proc/self/ns/net", "/proc/self/ns/ipc", "/proc/self/ns/uts", "/proc/self/ns/cgroup", "/proc/self/ns/time" };
	uint64_t hash = 0xcbf29ce484222325;
	struct stat st;
	char folder[PATH_MAX];
	TRY(warm_folder(folder));
	for (size_t i = 0; i < sizeof common / sizeof common[0]; i++)
		if (stat(common[i], &st) == 0)
			hash = mix(mix(hash, st.st_dev), st.st_ino);
	TRY(or_errno(stat(self, &st)));
	hash = mix(mix(mix(mix(hash, st.st_dev), st.st_ino), (uint64_t)st.st_mtim.tv_sec), (uint64_t)st.st_mtim.tv_nsec);
	return format_path(place, "%s/%016llx", folder, (unsigned long long)hash);
}

int connect_warm(const char *place) {
	struct timeval patience = { .tv_sec = PATIENCE_SECONDS };
	struct ucred peer;
	socklen_t size = sizeof peer;
	cleanup_fd fd = TRY(connect_unix(SOCK_STREAM | SOCK_NONBLOCK, place));
	TRY(or_errno(getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size)));
	if (peer.uid != geteuid())
		return -EPERM;
	TRY(or_errno(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience)));
	TRY(or_errno(setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience)));
	TRY(or_errno(fcntl(fd, F_SETFL, 0)));
	return keep(&fd);
}

/* An orphan's parent that minds none: the system's init, or a user's. A container engine's sub-reaper (conmon, a shim) waits
 * for its last child, and would live as long as a compiler. */
static int is_init(pid_t pid) {
	char path[64], name[32] = "";
	snprintf(path, sizeof path, "/proc/%d/comm", pid);
	return pid == 1 || (read_text(path, name, sizeof name) > 0 && !strcmp(name, "systemd\n"));
}

void start_warm(const char *self, const char *place) {
	pid_t pid = fork(), middle;
	if (pid > 0)
		wait_for(pid, NULL);
	if (pid != 0)
		return;
	/* not this process's child, nor of its session: it has nothing to do with the caller */
	middle = getpid();
	if (setsid() < 0 || fork() != 0 || chdir("/"))
		_exit(0);
	while (getppid() == middle)
		sched_yield();
	if (!is_init(getppid()))
		_exit(0);
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);
	for (int fd = 0; fd < 3; fd++)
		dup2(null, fd);
	sys_close_range(3, ~0u, 0);
	clearenv();
	run_python(self, "from dolium.warm import main;main(sys.argv[1])", (char *const[]){ (char *)place, NULL });
	_exit(127);
}
