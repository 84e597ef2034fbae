/* Any bytes as a launch plan and as fields: decoded as the executor does, and every string and list walked. */
#include <stdlib.h>
#include <string.h>

#include "../../native/executor/fields.h"

static volatile unsigned sum;

/* What fields.c sends with is not called here. */
int write_all(int fd, const void *data, size_t len) { return fd < 0 || !data ? -1 : (int)len; }

static void walk(struct list list) {
	char **vector = list_vector(&list);
	for (struct string s; list_take(&list, &s);)
		for (uint32_t i = 0; i <= s.len; i++)
			sum += (unsigned char)s.data[i];
	free(vector);
}

static void walk_op(const struct op *op, const char *signature) {
	for (int i = 0; signature[i]; i++) {
		if (signature[i] == 's')
			sum += (unsigned)strlen(op->a[i].s.data) + (unsigned char)op->a[i].s.data[op->a[i].s.len];
		else if (signature[i] == 'l')
			walk(op->a[i].l);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
	static const char *const signatures[65536] = {
#define OP(code, name, signature) [code] = signature,
#include "../../native/executor/ops.def"
#undef OP
	};
	char *exact = malloc(size ? size : 1); /* so that one byte too many is seen */
	const char *why, *at = exact;
	struct plan plan;
	struct field field;
	memcpy(exact, data, size);
	if (!plan_decode(exact, size, &plan, &why))
		for (uint32_t i = 0; i < plan.count; i++)
			walk_op(&plan.ops[i], signatures[plan.ops[i].code]);
	plan_free(&plan);
	while (fields_next(&at, exact + size, &field) > 0)
		walk(field.values);
	struct buffer body = { .data = exact, .used = size };
	sum += fields_get(&body, "uid").len + (unsigned)fields_number(&body, "request", 0);
	free(exact);
	return 0;
}
