/* Decodes a launch plan from standard input, as the executor does, touches every byte an operation could, prints it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../native/executor/plan.h"

static const struct {
	uint16_t code;
	const char *signature;
} table[] = {
#define OP(code, name, signature) { code, signature },
#include "../../native/executor/ops.def"
#undef OP
};

static const char *signature_of(uint16_t code)
{
	for (size_t i = 0; i < sizeof table / sizeof table[0]; i++)
		if (table[i].code == code)
			return table[i].signature;
	return "";
}

static void show_string(struct string s)
{
	if (s.data[s.len] != '\0')
		abort();
	printf(" %u:", s.len);
	for (uint32_t i = 0; i < s.len; i++)
		printf("%02x", (unsigned char)s.data[i]);
}

int main(void)
{
	size_t room = 1 << 16, used = 0, n;
	char *buffer = malloc(room), *exact;
	const char *why;
	struct plan plan;

	while ((n = fread(buffer + used, 1, room - used, stdin)) > 0) {
		used += n;
		if (used == room)
			buffer = realloc(buffer, room *= 2);
	}
	exact = malloc(used ? used : 1); /* so that one byte too many is seen */
	memcpy(exact, buffer, used);
	free(buffer);
	if (plan_decode(exact, used, &plan, &why)) {
		printf("refused: %s\n", why);
		free(exact);
		return 0;
	}
	printf("plan %u %u\n", plan.flags, plan.count);
	for (uint32_t i = 0; i < plan.count; i++) {
		const struct op *op = &plan.ops[i];
		const char *signature = signature_of(op->code);
		printf("%s %u %u %s", op_name(op->code), op->stage, op->flags, op->label);
		for (int a = 0; signature[a]; a++) {
			if (signature[a] == 'i') {
				printf(" %lld", (long long)op->a[a].i);
			} else if (signature[a] == 's') {
				show_string(op->a[a].s);
			} else {
				struct list rest = op->a[a].l;
				char **vector = list_vector(&op->a[a].l);
				printf(" [");
				struct string s;
				for (uint32_t k = 0; list_take(&rest, &s); k++) {
					if (vector[k] != s.data)
						abort();
					show_string(s);
				}
				if (vector[op->a[a].l.count])
					abort();
				free(vector);
				printf(" ]");
			}
		}
		printf("\n");
	}
	plan_free(&plan);
	free(exact);
	return 0;
}
