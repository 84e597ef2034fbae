/* The executor with nothing around it: runs the plan in a file given as argument, returns init's exit code. */
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>

#include "../../native/executor/launch.h"

int main(int argc, char **argv)
{
	struct launch launch;
	struct plan plan;
	const char *why;
	static char buffer[1 << 20];
	FILE *file = argc == 2 ? fopen(argv[1], "re") : NULL;
	size_t size = file ? fread(buffer, 1, sizeof buffer, file) : 0;
	int status;

	if (plan_decode(buffer, size, &plan, &why)) {
		fprintf(stderr, "%s\n", why);
		return 99;
	}
	fclose(file);
	if (launch_init(&launch, &plan) || launch_create(&launch) || launch_start(&launch)) {
		fprintf(stderr, "%s\n", launch.failure.text);
		return 98;
	}
	while (waitpid(launch.pid, &status, 0) < 0)
		;
	if (launch_after_exit(&launch))
		fprintf(stderr, "%s\n", launch.failure.text);
	launch_end(&launch);
	plan_free(&plan);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}
