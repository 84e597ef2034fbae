/* Any bytes as a tar archive: every entry's header read, its data taken. What would be written goes nowhere, and where the
 * program would end, the next input begins. */
#include <setjmp.h>

#define read fuzz_read
#define pwrite fuzz_pwrite
#define ftruncate fuzz_ftruncate
#include "../../native/untar/archive.c"

static const uint8_t *input;
static size_t remaining;
static jmp_buf next_input;
static volatile unsigned sum;

ssize_t fuzz_read(int fd, void *to, size_t size) {
	(void)fd;
	size_t n = size < remaining ? size : remaining;
	memcpy(to, input, n);
	input += n;
	remaining -= n;
	return (ssize_t)n;
}

ssize_t fuzz_pwrite(int fd, const void *from, size_t size, off_t offset) {
	(void)fd;
	for (size_t i = 0; i < size; i += 64)
		sum += ((const unsigned char *)from)[i];
	return offset < 0 ? -1 : (ssize_t)size;
}

int fuzz_ftruncate(int fd, off_t size) {
	(void)fd;
	return size < 0 ? -1 : 0;
}

void give_up(const char *operation, const char *reason, int number) {
	sum += (unsigned)strlen(operation) + (unsigned)strlen(reason) + (unsigned)number;
	longjmp(next_input, 1);
}

void *checked(void *memory) { return memory ? memory : (abort(), NULL); }

void *grow(void *array, size_t count, size_t size) {
	return count & (count - 1) ? array : checked(realloc(array, (count ? count * 2 : 1) * size));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
	input = data;
	remaining = size;
	start = end = global_size = 0;
	left = padding = 0;
	if (!setjmp(next_input)) {
		while (archive_next()) {
			sum += (unsigned)strlen(entry.path) + (unsigned)strlen(entry.link);
			for (size_t i = 0; i < entry.xattr_count; i++)
				sum += (unsigned char)entry.xattrs[i].value[entry.xattrs[i].length];
			archive_data(-1);
		}
		archive_drain();
	}
	forget();
	return 0;
}
