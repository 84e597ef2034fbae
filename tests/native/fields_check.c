/* Walks the fields of a body from standard input, prints them, and puts them together again: "same" when byte-equal. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../native/executor/fields.h"

/* fields.c needs one function of the executor. */
int write_all(int fd, const void *data, size_t len)
{
	return write(fd, data, len) == (ssize_t)len ? 0 : -EIO;
}

int main(void)
{
	struct buffer in = { 0 }, again = { 0 };
	struct field field;
	const char *at;
	char chunk[4096], *exact;
	size_t n;
	int got;

	while ((n = fread(chunk, 1, sizeof chunk, stdin)) > 0)
		put_bytes(&in, chunk, n);
	exact = malloc(in.used ? in.used : 1);
	if (in.used)
		memcpy(exact, in.data, in.used);
	at = exact;
	while ((got = fields_next(&at, exact + in.used, &field)) == 1) {
		const char *cursor = field.values.encoded;
		printf("%s", field.key);
		put_key(&again, field.key, field.values.count);
		for (uint32_t i = 0; i < field.values.count; i++) {
			struct string s = { NULL, 0 };
			memcpy(&s.len, cursor, 4);
			s.data = cursor + 4;
			cursor = s.data + s.len + 1;
			if (s.data[s.len] != '\0')
				abort();
			printf(" %u", s.len);
			put_string(&again, s.data, s.len);
		}
		printf("\n");
	}
	if (got < 0)
		printf("malformed\n");
	else
		printf("%s\n", again.used == in.used && (!in.used || !memcmp(again.data, exact, in.used)) ? "same" : "differs");
	/* look-ups on whatever it is must not read past the end either */
	{
		struct buffer whole = { exact, in.used, in.used, 0 };
		struct string s = fields_get(&whole, "argv");
		struct list l = fields_list(&whole, "env");
		printf("%u %u %lld\n", s.len, l.count, (long long)fields_number(&whole, "uid", -1));
	}
	free(exact);
	buffer_free(&in);
	buffer_free(&again);
	return 0;
}
