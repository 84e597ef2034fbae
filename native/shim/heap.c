/* malloc for a process whose memory is counted in pages. libc's gives each size its own page and keeps what was freed; a
 * shim's few living objects fit in one. Small blocks come from one run of pages and are used again by size; larger ones,
 * the frames and plans of a moment, are mappings that go when freed. One thread. Not in sanitizer builds. */

#include "shim.h"

#define UNIT 32u
#define SMALL 1024u /* with the head */
#define RUN 16384u

struct block {
	size_t size; /* with this head */
	struct block *next;
};

static struct block *spare[SMALL / UNIT + 1];
static char *run;
static size_t left;

static void *map(size_t size) {
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	return p == MAP_FAILED ? NULL : p;
}

void *malloc(size_t wanted) {
	size_t size = (wanted + sizeof(struct block) + UNIT - 1) & ~(size_t)(UNIT - 1);
	struct block *block;
	if (size < wanted) {
		errno = ENOMEM;
		return NULL;
	}
	if (size > SMALL) {
		block = map(size);
	} else if (spare[size / UNIT]) {
		block = spare[size / UNIT];
		spare[size / UNIT] = block->next;
	} else {
		if (left < size) {
			run = map(RUN);
			left = run ? RUN : 0;
		}
		block = (struct block *)(void *)run;
		run += left ? size : 0;
		left -= left ? size : 0;
	}
	if (!block)
		return NULL;
	block->size = size;
	return block + 1;
}

void free(void *p) {
	struct block *block = (struct block *)p - 1;
	if (!p)
		return;
	if (block->size > SMALL) {
		int saved = errno;
		munmap(block, block->size);
		errno = saved;
		return;
	}
	block->next = spare[block->size / UNIT];
	spare[block->size / UNIT] = block;
}

void *calloc(size_t count, size_t size) {
	void *p = size && count > SIZE_MAX / size ? NULL : malloc(count * size);
	return p ? memset(p, 0, count * size) : NULL;
}

void *realloc(void *p, size_t wanted) {
	size_t had = p ? ((struct block *)p - 1)->size - sizeof(struct block) : 0;
	void *fresh = malloc(wanted);
	if (!fresh || !p)
		return fresh;
	memcpy(fresh, p, had < wanted ? had : wanted);
	free(p);
	return fresh;
}
