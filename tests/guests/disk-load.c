/* Requests to a disk, past the page cache, as the benchmarks ask for them. Prints one line "NAME BYTES NANOSECONDS" per kind. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { MAX_DEPTH = 16, MAX_SIZE = 1 << 20 };

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

/* Keeps `depth` requests under way for a time; those that are random visit the disk's blocks in the same order in every run. */
static void measure(const char *name, int fd, uint64_t disk, int write, uint64_t size, unsigned depth, int random, uint64_t duration)
{
    static char *buffers;
    aio_context_t context = 0;
    struct iocb blocks[MAX_DEPTH];
    struct io_event events[MAX_DEPTH];
    uint64_t state = 88172645463325252u, next = 0, bytes = 0;

    if (!buffers) {
        buffers = aligned_alloc(4096, (size_t)MAX_DEPTH * MAX_SIZE);
        if (!buffers)
            fail("memory");
        memset(buffers, 0x5a, (size_t)MAX_DEPTH * MAX_SIZE);
    }
    if (syscall(SYS_io_setup, MAX_DEPTH, &context) != 0)
        fail("io_setup");
    uint64_t start = now(), end;
    unsigned ready[MAX_DEPTH], count = depth, flying = 0;
    for (unsigned i = 0; i < depth; i++)
        ready[i] = i;
    do {
        struct iocb *list[MAX_DEPTH];
        for (unsigned i = 0; i < count; i++) {
            struct iocb *block = &blocks[ready[i]];
            memset(block, 0, sizeof *block);
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            block->aio_data = ready[i];
            block->aio_lio_opcode = write ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
            block->aio_fildes = (uint32_t)fd;
            block->aio_buf = (uint64_t)(uintptr_t)(buffers + (size_t)ready[i] * MAX_SIZE);
            block->aio_nbytes = size;
            block->aio_offset = (int64_t)((random ? state % (disk / size) : next++ % (disk / size)) * size);
            list[i] = block;
        }
        if (count && syscall(SYS_io_submit, context, (long)count, list) != (long)count)
            fail("io_submit");
        flying += count;
        long done = syscall(SYS_io_getevents, context, 1L, (long)flying, events, NULL);
        if (done < 1)
            fail("io_getevents");
        for (long i = 0; i < done; i++) {
            if (events[i].res != (int64_t)size)
                fail("request");
            ready[i] = (unsigned)events[i].data;
            bytes += size;
        }
        count = (unsigned)done;
        flying -= count;
        end = now();
    } while (end - start < duration);
    while (flying) {
        long done = syscall(SYS_io_getevents, context, 1L, (long)flying, events, NULL);
        if (done < 1)
            fail("io_getevents");
        flying -= (unsigned)done;
        bytes += size * (uint64_t)done;
        end = now();
    }
    syscall(SYS_io_destroy, context);
    printf("%s %llu %llu\n", name, (unsigned long long)bytes, (unsigned long long)(end - start));
    fflush(stdout);
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    uint64_t duration = strtoull(argv[2], NULL, 10) * 1000000u;
    int fd = open(argv[1], O_RDWR | O_DIRECT);
    if (fd < 0)
        fail(argv[1]);
    int64_t size = lseek(fd, 0, SEEK_END);
    if (size < MAX_SIZE)
        fail("size");
    measure("sequential-read", fd, (uint64_t)size, 0, MAX_SIZE, 1, 0, duration);
    measure("sequential-write", fd, (uint64_t)size, 1, MAX_SIZE, 1, 0, duration);
    measure("random-read-1", fd, (uint64_t)size, 0, 4096, 1, 1, duration);
    measure("random-write-1", fd, (uint64_t)size, 1, 4096, 1, 1, duration);
    measure("random-read-16", fd, (uint64_t)size, 0, 4096, 16, 1, duration);
    measure("random-write-16", fd, (uint64_t)size, 1, 4096, 16, 1, duration);
    return 0;
}
