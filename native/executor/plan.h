/* Decoding a launch plan. The buffer is trusted to come from the compiler but is checked as if it did not. */
#pragma once

#include "sys.h"

#define PLAN_MAGIC "DOLM"
#define PLAN_VERSION 1
#define PLAN_FLAG_OLD_MOUNT_API 1 /* use the fallbacks even where the newer calls exist (tests) */
#define PLAN_FLAG_DEBUG 2         /* the front tells each operation and its time */
#define PLAN_MAX_ARGS 6
#define PLAN_MAX_OPS 65536
#define PLAN_SLOTS 256

enum stage {
	PARENT_BEFORE_CLONE, PARENT_AFTER_CLONE, CHILD_BEFORE_PIVOT, PARENT_BEFORE_PIVOT, CHILD_AFTER_PIVOT,
	PARENT_CREATED, AFTER_START, PARENT_STARTED, AFTER_EXIT, ON_FAILURE, STAGES,
};

enum op_code {
#define OP(code, name, signature) OP_##name = code,
#include "ops.def"
#undef OP
};

#define OP_OPTIONAL 1     /* a failure is recorded, not fatal */
#define OP_NOTHING_OURS 2 /* a failure here runs only the clean-ups before it in the plan: what the others would remove is
			   * not ours. On a clean-up: it is for that case alone. */

struct string {
	const char *data; /* NUL-terminated, may hold further NULs */
	uint32_t len;
};

struct list {
	const char *encoded; /* count strings, each: u32 length, bytes, NUL */
	uint32_t count;
};

/* What is left to decode. */
struct reader {
	const char *at, *end;
};

union arg {
	int64_t i;
	struct string s;
	struct list l;
};

struct op {
	uint16_t code;
	uint8_t stage;
	uint8_t flags;
	const char *label; /* what a person reads: "mount proc on /proc" */
	union arg a[PLAN_MAX_ARGS];
};

struct plan {
	uint16_t flags;
	uint32_t count;
	struct op *ops;
};

/* 0, or -1 with *why set to a constant text. Keeps pointers into buffer. Free with plan_free. */
int plan_decode(const char *buffer, size_t size, struct plan *plan, const char **why);
void plan_free(struct plan *plan);
const char *op_name(uint16_t code);

/* The next string or list of strings: 0, or -1 when it is malformed. */
int take_string(struct reader *r, struct string *s);
int take_list(struct reader *r, struct list *l);
/* Takes the first string off the copy of a list: 1, or 0 when none is left. */
int list_take(struct list *rest, struct string *s);
/* A NULL-terminated vector of the strings, with room for one more; the caller frees the vector only. NULL when memory ran out. */
char **list_vector(const struct list *list);
