#include "plan.h"

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

/* NULL, or why not. */
static const char *take_op(struct reader *r, struct op *op) {
	uint32_t size;
	if (take(r, &op->code, 2) || take(r, &op->stage, 1) || take(r, &op->flags, 1) || take(r, &size, 4) ||
	    (size_t)(r->end - r->at) < size)
		return "cut short";
	struct reader body = { r->at, r->at + size };
	r->at += size;
	if (!known(op->code))
		return "unknown operation";
	if (op->stage >= STAGES)
		return "unknown stage";
	struct string label = { 0 };
	int bad = take_string(&body, &label);
	op->label = label.data;
	const char *signature = table[op->code].signature;
	for (int i = 0; signature[i] && !bad; i++)
		bad = signature[i] == 'i'   ? take(&body, &op->a[i].i, 8)
		      : signature[i] == 's' ? take_string(&body, &op->a[i].s) : take_list(&body, &op->a[i].l);
	return bad ? "malformed argument" : body.at < body.end ? "bytes left over" : NULL;
}

static const char *take_plan(struct reader *r, struct plan *plan) {
	char magic[4];
	uint16_t version;
	if (take(r, magic, 4) || memcmp(magic, PLAN_MAGIC, 4) != 0)
		return "not a launch plan";
	if (take(r, &version, 2) || version != PLAN_VERSION)
		return "a launch plan of another version";
	if (take(r, &plan->flags, 2) || take(r, &plan->count, 4))
		return "cut short";
	if (plan->count > PLAN_MAX_OPS)
		return "too many operations";
	plan->ops = calloc(plan->count ? plan->count : 1, sizeof *plan->ops);
	if (!plan->ops)
		return "out of memory";
	const char *why = NULL;
	for (uint32_t i = 0; i < plan->count && !why; i++)
		why = take_op(r, &plan->ops[i]);
	return !why && r->at < r->end ? "bytes left over" : why;
}

int plan_decode(const char *buffer, size_t size, struct plan *plan, const char **why) {
	struct reader r = { buffer, buffer + size };
	*plan = (struct plan){ 0 };
	*why = take_plan(&r, plan);
	if (*why)
		plan_free(plan);
	return *why ? -1 : 0;
}

void plan_free(struct plan *plan) {
	free(plan->ops);
	plan->ops = NULL;
	plan->count = 0;
}

int list_take(struct list *rest, struct string *s) {
	if (!rest->count)
		return 0;
	memcpy(&s->len, rest->encoded, sizeof s->len);
	s->data = rest->encoded + sizeof s->len;
	*rest = (struct list){ s->data + s->len + 1, rest->count - 1 };
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
