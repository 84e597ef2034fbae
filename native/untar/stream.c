/* Buffered standard input. */
#include "untar.h"

#include <errno.h>
#include <string.h>

#define STREAM_SIZE (256 * 1024)

int stream_open(struct stream *stream, int fd, struct error *error)
{
    *stream = (struct stream){.fd = fd, .buffer = malloc(STREAM_SIZE)};
    return stream->buffer ? 0 : fail(error, "malloc", ENOMEM);
}

void stream_close(struct stream *stream)
{
    free(stream->buffer);
    stream->buffer = NULL;
}

/* Read once into the room behind `end`: bytes read, 0 at the end, -1. */
static ssize_t fill(struct stream *stream, struct error *error)
{
    if (stream->start == stream->end)
        stream->start = stream->end = 0;
    for (;;) {
        ssize_t got = read(stream->fd, stream->buffer + stream->end, STREAM_SIZE - stream->end);
        if (got >= 0) {
            stream->end += (size_t)got;
            return got;
        }
        if (errno != EINTR)
            return fail(error, "read archive", errno);
    }
}

int stream_more(struct stream *stream, struct error *error)
{
    if (stream->start < stream->end)
        return 1;
    ssize_t got = fill(stream, error);
    return got > 0 ? 1 : (int)got;
}

/* Have at least one byte buffered. */
static int need(struct stream *stream, struct error *error)
{
    int more = stream_more(stream, error);
    if (more < 0)
        return -1;
    return more ? 0 : refuse(error, "read archive", "the archive is cut short");
}

int stream_block(struct stream *stream, const unsigned char **block, struct error *error)
{
    if (STREAM_SIZE - stream->start < TAR_BLOCK) {
        memmove(stream->buffer, stream->buffer + stream->start, stream->end - stream->start);
        stream->end -= stream->start;
        stream->start = 0;
    }
    while (stream->end - stream->start < TAR_BLOCK) {
        ssize_t got = fill(stream, error);
        if (got < 0)
            return -1;
        if (got == 0)
            return stream->start == stream->end ? 0 : refuse(error, "read archive", "the archive is cut short");
    }
    *block = stream->buffer + stream->start;
    stream->start += TAR_BLOCK;
    return 1;
}

int stream_bytes(struct stream *stream, void *to, size_t size, struct error *error)
{
    unsigned char *out = to;
    while (size > 0) {
        if (need(stream, error) < 0)
            return -1;
        size_t have = stream->end - stream->start;
        size_t take = have < size ? have : size;
        memcpy(out, stream->buffer + stream->start, take);
        stream->start += take;
        out += take;
        size -= take;
    }
    return 0;
}

int stream_skip(struct stream *stream, int64_t size, struct error *error)
{
    while (size > 0) {
        if (need(stream, error) < 0)
            return -1;
        size_t have = stream->end - stream->start;
        size_t take = (int64_t)have < size ? have : (size_t)size;
        stream->start += take;
        size -= (int64_t)take;
    }
    return 0;
}

int stream_copy(struct stream *stream, int fd, int64_t size, int64_t offset, struct error *error)
{
    while (size > 0) {
        if (need(stream, error) < 0)
            return -1;
        size_t have = stream->end - stream->start;
        size_t take = (int64_t)have < size ? have : (size_t)size;
        ssize_t put = pwrite(fd, stream->buffer + stream->start, take, offset);
        if (put < 0 && errno == EINTR)
            continue;
        if (put < 0)
            return fail(error, "write", errno);
        stream->start += (size_t)put;
        offset += put;
        size -= put;
    }
    return 0;
}

int stream_drain(struct stream *stream, struct error *error)
{
    ssize_t got;
    do {
        stream->start = stream->end;
        got = fill(stream, error);
    } while (got > 0);
    return got < 0 ? -1 : 0;
}
