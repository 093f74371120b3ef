/*
 * stress SECONDS [WORKERS]: threads, signals, memory mappings, processes, pipes and futexes of a Linux guest, each
 * worker checking its own results. Ends with status 0 and the line "stress ok" if every result was right.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096u

static _Atomic int failed;
static time_t deadline;
static const char *self;

static void wrong(const char *where, long got, long expected)
{
    fprintf(stderr, "%s: %ld, expected %ld (errno %d)\n", where, got, expected, errno);
    atomic_store(&failed, 1);
}
static void expect(const char *where, long got, long expected)
{
    if (got != expected) wrong(where, got, expected);
}

static int going_on(void) { return time(NULL) < deadline && !atomic_load(&failed); }

static uint64_t next_random(uint64_t *s)
{
    *s ^= *s << 13;
    *s ^= *s >> 7;
    *s ^= *s << 17;
    return *s;
}

static uint32_t checksum(const uint8_t *p, size_t n)
{
    uint32_t a = 1, b = 0;
    for (size_t i = 0; i < n; i++) {
        a = (a + p[i]) % 65521;
        b = (b + a) % 65521;
    }
    return b << 16 | a;
}

/* ---- threads that share counters under a mutex, a spin lock and without one ---- */
struct shared { pthread_mutex_t lock; long guarded; _Atomic long atomic; _Atomic int spin; long spun; pthread_barrier_t all; };

static void *count_up(void *arg)
{
    struct shared *s = arg;
    pthread_barrier_wait(&s->all);
    for (int n = 0; n < 2000; n++) {
        pthread_mutex_lock(&s->lock);
        s->guarded++;
        pthread_mutex_unlock(&s->lock);
        atomic_fetch_add(&s->atomic, 3);
        while (atomic_exchange(&s->spin, 1)) sched_yield();
        s->spun++;
        atomic_store(&s->spin, 0);
    }
    return (void *)(uintptr_t)pthread_self();
}

static long threads(uint64_t seed)
{
    enum { THREADS = 6 };
    long rounds = 0;
    (void)seed;
    while (going_on()) {
        struct shared s = { .lock = PTHREAD_MUTEX_INITIALIZER };
        pthread_t t[THREADS];
        pthread_barrier_init(&s.all, NULL, THREADS);
        for (int n = 0; n < THREADS; n++) expect("pthread_create", pthread_create(&t[n], NULL, count_up, &s), 0);
        for (int n = 0; n < THREADS; n++) {
            void *result;
            expect("pthread_join", pthread_join(t[n], &result), 0);
            expect("thread's own id", result == (void *)(uintptr_t)t[n], 1);
        }
        expect("mutex", s.guarded, THREADS * 2000);
        expect("atomic", s.atomic, 3 * THREADS * 2000);
        expect("spin lock", s.spun, THREADS * 2000);
        pthread_barrier_destroy(&s.all);
        rounds++;
    }
    return rounds;
}

/* ---- signals: counted, nested, with registers and vector state that must survive, and timers ---- */
static _Thread_local volatile sig_atomic_t usr1, usr2, alarms;

static void on_signal(int number, siginfo_t *info, void *context)
{
    /* Whatever the handler does to vector and x87 registers is undone when it returns. */
    double x[8] = { 1, 2, 3, 4, 5, 6, 7, 8 };
    for (int n = 0; n < 8; n++) __asm__ volatile("" : "+x"(x[n]));
    long double y = 1.5L;
    __asm__ volatile("fldt %0\n fstpt %0" : "+m"(y));
    (void)info;
    (void)context;
    if (number == SIGUSR1) {
        usr1++;
        raise(SIGUSR2);
    } else if (number == SIGUSR2) usr2++;
    else alarms++;
}

static uint64_t mix(uint64_t v, double *f)
{
    for (int n = 0; n < 20000; n++) {
        v = v * 6364136223846793005ull + 1442695040888963407ull;
        *f = *f * 0.9999 + (double)(v >> 40) * 1e-9;
    }
    return v;
}

static long signals(uint64_t seed)
{
    long rounds = 0;
    struct sigaction act = { .sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART };
    for (int n = 0; n < 3; n++) sigaction((int[]){ SIGUSR1, SIGUSR2, SIGALRM }[n], &act, NULL);
    double f0 = 0.5;
    uint64_t v0 = mix(seed, &f0);
    timer_t timer;
    struct sigevent ev = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGALRM };
    expect("timer_create", timer_create(CLOCK_MONOTONIC, &ev, &timer), 0);
    struct itimerspec every = { { 0, 1000000 }, { 0, 1000000 } };
    timer_settime(timer, 0, &every, NULL);
    while (going_on()) {
        usr1 = usr2 = 0;
        for (int n = 0; n < 50; n++) raise(SIGUSR1);
        expect("SIGUSR1", usr1, 50);
        expect("SIGUSR2", usr2, 50);
        double f = 0.5;
        expect("arithmetic under a timer", mix(seed, &f) == v0 && f == f0, 1);
        rounds++;
    }
    timer_delete(timer);
    expect("timer signals", alarms > 0, 1);
    return rounds;
}

/* ---- mappings: filled, moved, split, protected and given back ---- */
static void on_fault(int number, siginfo_t *info, void *context)
{
    (void)number;
    (void)context;
    /* The store that faulted is tried again. */
    mprotect((void *)((uintptr_t)info->si_addr & ~(uintptr_t)(PAGE - 1)), PAGE, PROT_READ | PROT_WRITE);
}

static long mappings(uint64_t seed)
{
    long rounds = 0;
    struct sigaction act = { .sa_sigaction = on_fault, .sa_flags = SA_SIGINFO };
    sigaction(SIGSEGV, &act, NULL);
    while (going_on()) {
        size_t pages = 1 + next_random(&seed) % 64, size = pages * PAGE;
        uint8_t *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED) { wrong("mmap", errno, 0); break; }
        for (size_t n = 0; n < size; n += PAGE) expect("new page", p[n], 0);
        uint64_t r = seed;
        for (size_t n = 0; n < size; n += 8) {
            uint64_t v = next_random(&r);
            memcpy(p + n, &v, 8);
        }
        uint32_t sum = checksum(p, size);
        uint8_t *q = mremap(p, size, 2 * size, MREMAP_MAYMOVE);
        if (q == MAP_FAILED) { wrong("mremap", errno, 0); break; }
        expect("moved", checksum(q, size), sum);
        expect("mprotect", mprotect(q, size, PROT_READ), 0);
        expect("read-only", checksum(q, size), sum);
        for (size_t n = 0; n < size; n += PAGE) q[n] ^= 0xff; /* each faults once */
        for (size_t n = 0; n < size; n += PAGE) q[n] ^= 0xff;
        expect("after faults", checksum(q, size), sum);
        if (pages > 2) {
            expect("munmap", munmap(q + PAGE, PAGE), 0);
            uint8_t *hole = mmap(q + PAGE, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
            expect("same place", hole == q + PAGE, 1);
            expect("hole is zero", checksum(hole, PAGE), checksum(q + size, PAGE));
        }
        expect("madvise", madvise(q, size, MADV_DONTNEED), 0);
        expect("given back", checksum(q, size), checksum(q + size, size));
        munmap(q, 2 * size);
        rounds++;
    }
    return rounds;
}

/* ---- code that is made, changed and thrown away ---- */
static long code(uint64_t seed)
{
    long rounds = 0;
    uint8_t *p = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    while (going_on()) {
        uint32_t v = (uint32_t)next_random(&seed);
        uint8_t text[] = { 0xb8, 0, 0, 0, 0, 0xc3 };
        memcpy(text + 1, &v, 4);
        size_t at = next_random(&seed) % (PAGE - sizeof text);
        mprotect(p, PAGE, PROT_READ | PROT_WRITE);
        memcpy(p + at, text, sizeof text);
        mprotect(p, PAGE, PROT_READ | PROT_EXEC);
        uint32_t (*f)(void) = (uint32_t (*)(void))(uintptr_t)(p + at);
        expect("generated code", f(), v);
        rounds++;
    }
    munmap(p, PAGE);
    return rounds;
}

/* ---- processes: copies on write, exit statuses, another program ---- */
static long processes(uint64_t seed)
{
    long rounds = 0;
    uint64_t *memory = mmap(NULL, 32 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    while (going_on()) {
        int status = 0, number = (int)(next_random(&seed) % 200);
        for (int n = 0; n < 32 * 512; n += 64) memory[n] = seed + (uint64_t)n;
        pid_t child = fork();
        if (child < 0) { wrong("fork", errno, 0); break; }
        if (child == 0) {
            for (int n = 0; n < 32 * 512; n += 64) {
                if (memory[n] != seed + (uint64_t)n) _exit(255);
                memory[n] = 0;
            }
            if (number & 1) {
                char text[16];
                snprintf(text, sizeof text, "%d", number);
                execl(self, self, "--child", text, NULL);
                _exit(254);
            }
            _exit(number);
        }
        expect("waitpid", waitpid(child, &status, 0), child);
        expect("exit status", WIFEXITED(status) ? WEXITSTATUS(status) : -1, number);
        for (int n = 0; n < 32 * 512; n += 64)
            if (memory[n] != seed + (uint64_t)n) wrong("copy on write", (long)memory[n], (long)seed + n);
        child = fork();
        if (child == 0) for (;;) pause();
        kill(child, SIGKILL);
        expect("waitpid of a killed one", waitpid(child, &status, 0), child);
        expect("killed", WIFSIGNALED(status) ? WTERMSIG(status) : -1, SIGKILL);
        rounds++;
    }
    munmap(memory, 32 * PAGE);
    return rounds;
}

/* ---- pipes and sockets between processes ---- */
static long pipes(uint64_t seed)
{
    enum { BYTES = 1 << 18 };
    long rounds = 0;
    while (going_on()) {
        int fd[2], pair[2], status;
        if (pipe(fd) || socketpair(AF_UNIX, SOCK_STREAM, 0, pair)) { wrong("pipe", errno, 0); break; }
        uint64_t r = next_random(&seed);
        pid_t child = fork();
        if (child == 0) {
            static uint8_t block[BYTES];
            uint64_t s = r;
            for (size_t n = 0; n < BYTES; n += 8) {
                uint64_t v = next_random(&s);
                memcpy(block + n, &v, 8);
            }
            close(fd[0]);
            for (size_t n = 0; n < BYTES;) {
                size_t most = 1 + next_random(&s) % 9000;
                ssize_t w = write(fd[1], block + n, most < BYTES - n ? most : BYTES - n);
                if (w < 0) _exit(1);
                n += (size_t)w;
            }
            uint32_t sum = checksum(block, BYTES), reply = 0;
            if (write(pair[1], &sum, 4) != 4 || read(pair[1], &reply, 4) != 4) _exit(2);
            _exit(reply == ~sum ? 0 : 3);
        }
        close(fd[1]);
        static _Thread_local uint8_t received[BYTES];
        size_t have = 0;
        for (ssize_t got; (got = read(fd[0], received + have, BYTES - have)) > 0;) have += (size_t)got;
        expect("bytes through the pipe", (long)have, BYTES);
        uint32_t sum = 0, mine = checksum(received, have), reply = ~mine;
        expect("socket", read(pair[0], &sum, 4), 4);
        expect("what came through", sum, mine);
        expect("answer", write(pair[0], &reply, 4), 4);
        expect("writer", waitpid(child, &status, 0) == child ? status : -1, 0);
        close(fd[0]);
        close(pair[0]);
        close(pair[1]);
        rounds++;
    }
    return rounds;
}

/* ---- futexes: a ball between two processes in shared memory ---- */
static long futexes(uint64_t seed)
{
    long rounds = 0;
    (void)seed;
    while (going_on()) {
        enum { TURNS = 500 };
        _Atomic uint32_t *ball = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        int status;
        pid_t child = fork();
        uint32_t mine = child == 0;
        for (uint32_t n = 0; n < TURNS; n++) {
            uint32_t now;
            struct timespec limit = { 30, 0 };
            while ((now = atomic_load(ball)) % 2 != mine)
                if (syscall(SYS_futex, ball, FUTEX_WAIT, now, &limit, NULL, 0) < 0 && errno == ETIMEDOUT) {
                    if (child == 0) _exit(1);
                    wrong("futex", (long)now, (long)mine);
                    break;
                }
            atomic_store(ball, now + 1);
            syscall(SYS_futex, ball, FUTEX_WAKE, 1, NULL, NULL, 0);
        }
        if (child == 0) _exit(0);
        expect("other player", waitpid(child, &status, 0) == child ? status : -1, 0);
        expect("turns", atomic_load(ball), 2 * TURNS);
        munmap((void *)ball, PAGE);
        rounds++;
    }
    return rounds;
}

static const struct { const char *name; long (*run)(uint64_t seed); } kinds[] = {
    { "threads", threads }, { "signals", signals }, { "mappings", mappings }, { "code", code },
    { "processes", processes }, { "pipes", pipes }, { "futexes", futexes },
};
#define KINDS (sizeof kinds / sizeof kinds[0])

int main(int argc, char **argv)
{
    if (argc == 3 && !strcmp(argv[1], "--child")) return atoi(argv[2]);
    self = "/proc/self/exe";
    unsigned workers = argc > 2 ? (unsigned)atoi(argv[2]) : KINDS;
    deadline = time(NULL) + (argc > 1 ? atoi(argv[1]) : 10);
    pid_t child[64];
    int bad = 0;
    if (workers < KINDS || workers > 64) workers = KINDS;
    for (unsigned n = 0; n < workers; n++) {
        child[n] = fork();
        if (child[n] == 0) {
            long rounds = kinds[n % KINDS].run(88172645463325252ull + n);
            printf("%s: %ld rounds%s\n", kinds[n % KINDS].name, rounds, failed || rounds == 0 ? " FAILED" : "");
            fflush(stdout);
            _exit(failed || rounds == 0);
        }
    }
    for (unsigned n = 0; n < workers; n++) {
        int status = -1;
        if (child[n] < 0 || waitpid(child[n], &status, 0) != child[n] || status != 0) {
            printf("worker %s ended with status %x\n", kinds[n % KINDS].name, (unsigned)status);
            bad = 1;
        }
    }
    if (!bad) puts("stress ok");
    return bad;
}
