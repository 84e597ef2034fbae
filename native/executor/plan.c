#include "plan.h"

#include <stdlib.h>
#include <string.h>

static const struct {
	const char *name, *signature;
} table[] = {
#define OP(code, name, signature) [code] = { #name, signature },
#include "ops.def"
#undef OP
};

static int known(uint16_t code) { return code < sizeof table / sizeof table[0] && table[code].name; }

const char *op_name(uint16_t code) { return known(code) ? table[code].name : "unknown"; }

static int take(struct reader *r, void *out, size_t n) {
	if ((size_t)(r->end - r->at) < n)
		return -1;
	memcpy(out, r->at, n);
	r->at += n;
	return 0;
}

int take_string(struct reader *r, struct string *s) {
	if (take(r, &s->len, sizeof s->len) || (size_t)(r->end - r->at) < (size_t)s->len + 1 || r->at[s->len] != '\0')
		return -1;
	s->data = r->at;
	r->at += (size_t)s->len + 1;
	return 0;
}

int take_list(struct reader *r, struct list *l) {
	struct string ignored;
	if (take(r, &l->count, sizeof l->count))
		return -1;
	l->encoded = r->at;
	for (uint32_t i = 0; i < l->count; i++)
		if (take_string(r, &ignored))
			return -1;
	return 0;
}

static int take_op(struct reader *r, struct op *op, const char **why) {
	uint32_t size;
	*why = "cut short";
	if (take(r, &op->code, 2) || take(r, &op->stage, 1) || take(r, &op->flags, 1) || take(r, &size, 4) ||
	    (size_t)(r->end - r->at) < size)
		return -1;
	struct reader body = { r->at, r->at + size };
	r->at += size;
	*why = "unknown operation";
	if (!known(op->code))
		return -1;
	*why = "unknown stage";
	if (op->stage >= STAGES)
		return -1;
	*why = "malformed argument";
	struct string label;
	if (take_string(&body, &label))
		return -1;
	op->label = label.data;
	const char *signature = table[op->code].signature;
	for (int i = 0; signature[i]; i++) {
		int bad = signature[i] == 'i'   ? take(&body, &op->a[i].i, 8)
			  : signature[i] == 's' ? take_string(&body, &op->a[i].s) : take_list(&body, &op->a[i].l);
		if (bad)
			return -1;
	}
	*why = "bytes left over";
	return body.at == body.end ? 0 : -1;
}

int plan_decode(const char *buffer, size_t size, struct plan *plan, const char **why) {
	struct reader r = { buffer, buffer + size };
	memset(plan, 0, sizeof *plan);
	char magic[4];
	*why = "not a launch plan";
	if (take(&r, magic, 4) || memcmp(magic, PLAN_MAGIC, 4) != 0)
		return -1;
	uint16_t version;
	*why = "a launch plan of another version";
	if (take(&r, &version, 2) || version != PLAN_VERSION)
		return -1;
	*why = "cut short";
	if (take(&r, &plan->flags, 2) || take(&r, &plan->count, 4))
		return -1;
	*why = "too many operations";
	if (plan->count > PLAN_MAX_OPS)
		return -1;
	plan->ops = calloc(plan->count ? plan->count : 1, sizeof *plan->ops);
	*why = "out of memory";
	if (!plan->ops)
		return -1;
	for (uint32_t i = 0; i < plan->count; i++)
		if (take_op(&r, &plan->ops[i], why))
			goto malformed;
	*why = "bytes left over";
	if (r.at == r.end)
		return 0;
malformed:
	plan_free(plan);
	return -1;
}

void plan_free(struct plan *plan) {
	free(plan->ops);
	plan->ops = NULL;
	plan->count = 0;
}

struct string list_next(const char **cursor) {
	struct string s;
	memcpy(&s.len, *cursor, 4);
	s.data = *cursor + 4;
	*cursor = s.data + s.len + 1;
	return s;
}

int list_take(struct list *rest, struct string *s) {
	if (!rest->count)
		return 0;
	rest->count--;
	*s = list_next(&rest->encoded);
	return 1;
}

char **list_vector(const struct list *list) {
	char **vector = calloc((size_t)list->count + 2, sizeof *vector);
	struct list rest = *list;
	struct string s;
	for (uint32_t i = 0; vector && list_take(&rest, &s); i++)
		vector[i] = (char *)s.data;
	return vector;
}
