/* Runs cases on the host CPU, in a child process. */
#include "exhaust.h"

#include <asm/ldt.h>
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

/*
 * The page behind the stubs, reached by absolute addresses so that no register is needed.
 * 0 host RSP, 8 scratch RDI, 16 state in, 24 state out, 32 entry RIP and CS (far pointer),
 * 48 host FS base, 56 address of the way back, 64 components of XSAVE, 72 FS base that a case leaves,
 * 80 ES, 82 DS, 84 SS of a case in the local descriptor table; 256 a frame for IRETQ.
 */
#define DATA (STUB + 0x1000)
struct stub_data {
    uint64_t rsp, rdi;
    struct cpu_state *in, *out;
    uint32_t far_rip; uint16_t far_cs, pad; uint64_t entry;
    uint64_t fs_base, back;
    uint32_t components, pad2;
    uint64_t fs_base_left;
    uint16_t es, ds, ss, skip;
    uint8_t unused[168];
    uint64_t frame[5];
};
_Static_assert(offsetof(struct stub_data, frame) == 256, "used by the assembler");

int oracle_enter64(void);
int oracle_enter32(void);
int oracle_enter_ldt(void);
int oracle_enter_step(void);
void oracle_back(void);
void oracle_abort(void);

_Static_assert(offsetof(struct cpu_state, rflags) == 136 && offsetof(struct cpu_state, fx) == 192, "used by the assembler");

__asm__(
    ".text\n"
    ".macro enter\n"
    "push %rbx\n push %rbp\n push %r12\n push %r13\n push %r14\n push %r15\n"
    "mov %rsp, 0x10001000\n"
    "mov 0x10001010, %rdi\n"
    "mov 0x10001040, %eax\n xor %edx, %edx\n xrstor64 192(%rdi)\n"
    "mov $0x07654320, %eax\n wrfsbase %rax\n"
    "mov $0x12345678, %eax\n wrgsbase %rax\n"
    "pushq 136(%rdi)\n popfq\n"
    "mov 0(%rdi), %rax\n mov 8(%rdi), %rcx\n mov 16(%rdi), %rdx\n mov 24(%rdi), %rbx\n"
    "mov 32(%rdi), %rsp\n mov 40(%rdi), %rbp\n mov 48(%rdi), %rsi\n"
    "mov 64(%rdi), %r8\n mov 72(%rdi), %r9\n mov 80(%rdi), %r10\n mov 88(%rdi), %r11\n"
    "mov 96(%rdi), %r12\n mov 104(%rdi), %r13\n mov 112(%rdi), %r14\n mov 120(%rdi), %r15\n"
    "mov 56(%rdi), %rdi\n"
    ".endm\n"
    "oracle_enter64:\n enter\n jmp *0x10001028\n"
    "oracle_enter32:\n enter\n ljmp *0x10001020\n"
    "oracle_enter_ldt:\n enter\n"
    "mov 0x10001050, %es\n mov 0x10001052, %ds\n mov 0x10001054, %ss\n ljmp *0x10001020\n"
    "oracle_enter_step:\n enter\n"
    "mov 0x10001050, %es\n mov 0x10001052, %ds\n mov $0x10001100, %esp\n iretq\n"
    "oracle_back:\n"
    "mov %rdi, 0x10001008\n mov 0x10001018, %rdi\n"
    "mov %rax, 0(%rdi)\n mov %rcx, 8(%rdi)\n mov %rdx, 16(%rdi)\n mov %rbx, 24(%rdi)\n"
    "mov %rsp, 32(%rdi)\n mov %rbp, 40(%rdi)\n mov %rsi, 48(%rdi)\n"
    "mov %r8, 64(%rdi)\n mov %r9, 72(%rdi)\n mov %r10, 80(%rdi)\n mov %r11, 88(%rdi)\n"
    "mov %r12, 96(%rdi)\n mov %r13, 104(%rdi)\n mov %r14, 112(%rdi)\n mov %r15, 120(%rdi)\n"
    "mov 0x10001008, %rax\n mov %rax, 56(%rdi)\n"
    "mov 0x10001000, %rsp\n"
    "pushfq\n popq 136(%rdi)\n"
    "mov 0x10001040, %eax\n xor %edx, %edx\n xsave64 192(%rdi)\n"
    "xor %eax, %eax\n"
    "1: push $2\n popfq\n"
    "rdfsbase %rdx\n mov %rdx, 0x10001048\n mov 0x10001030, %rdx\n wrfsbase %rdx\n"
    "fninit\n push $0x1f80\n ldmxcsr (%rsp)\n add $8, %rsp\n"
    "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbp\n pop %rbx\n ret\n"
    "oracle_abort:\n mov $1, %eax\n jmp 1b\n");

static struct {
    pid_t pid;
    int to_child[2], from_child[2];
    uint8_t *code;          /* shared with the child */
    uint8_t *arena;
    struct shared { volatile uint32_t current; } *shared;
    bool low;
} host;

void *shared_alloc(size_t size)
{
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}
bool host_has_low(void) { return host.low; }
uint64_t host_components(void)
{
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low & 7;
}

/* Runs with the tested code's FS base until it is put back: nothing before that may use TLS. */
__attribute__((no_sanitize("all"), optimize("no-stack-protector")))
static void on_fault(int sig, siginfo_t *info, void *context)
{
    struct stub_data *s = (struct stub_data *)DATA;
    uint64_t left;
    __asm__ volatile("rdfsbase %0\n wrfsbase %1" : "=&r"(left) : "r"(s->fs_base));
    __asm__ volatile("pushfq\n andl $~0x40000, (%%rsp)\n popfq" : : : "cc", "memory"); /* AC */
    ucontext_t *u = context;
    greg_t *g = u->uc_mcontext.gregs;
    if (s->skip && g[REG_TRAPNO] == EXC_DE) {
        g[REG_RAX] = DIVIDE_MARK;
        g[REG_RIP] += s->skip;
        __asm__ volatile("wrfsbase %0" : : "r"(left));
        return;
    }
    struct cpu_state *o = s->out;
    static const uint8_t order[16] = { REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                       REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15 };
    for (int i = 0; i < 16; i++) o->gpr[i] = (uint64_t)g[order[i]];
    o->rip = (uint64_t)g[REG_RIP];
    o->rflags = (uint64_t)g[REG_EFL];
    o->vector = (uint32_t)g[REG_TRAPNO];
    o->error = (uint32_t)g[REG_ERR];
    o->cr2 = o->vector == EXC_PF ? (uint64_t)g[REG_CR2] : 0;
    const uint8_t *fx = (const uint8_t *)u->uc_mcontext.fpregs;
    if (fx) {
        __builtin_memcpy(o->fx, fx, 512);
        if ((s->components & 4) && (fx[512] & 4)) __builtin_memcpy(o->fx + FX_YMM, fx + FX_YMM, 256);
        else __builtin_memset(o->fx + FX_YMM, 0, 256);
    }
    o->fs_base = left;
    o->selector[SEG_CS] = (uint16_t)g[REG_CSGSFS];
    o->selector[SEG_SS] = (uint16_t)(g[REG_CSGSFS] >> 48);
    g[REG_RIP] = (greg_t)(uintptr_t)oracle_abort;
    g[REG_RSP] = (greg_t)s->rsp;
    g[REG_EFL] = 0x202;
    g[REG_CSGSFS] = (g[REG_CSGSFS] & 0x0000ffffffff0000ll) | 0x002b000000000033ll;
    (void)sig;
    (void)info;
}

static bool map_at(uint64_t at, size_t size, int prot, int fd)
{
    int flags = MAP_FIXED_NOREPLACE | (fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED);
    return mmap((void *)(uintptr_t)at, size, prot, flags, fd, 0) == (void *)(uintptr_t)at;
}
static bool map_arena(uint64_t at, int fd)
{
    return map_at(at, ARENA_SIZE, PROT_READ | PROT_WRITE, fd) &&
           mprotect((void *)(uintptr_t)(at + ARENA_RW), ARENA_SIZE - ARENA_RW, PROT_READ) == 0;
}

/* Reads what a case has left in the segment registers, and puts ours back. */
static void take_segments(struct cpu_state *o, bool faulted)
{
    struct stub_data *s = (struct stub_data *)DATA;
    uint16_t v;
#define TAKE(reg, n)                                           \
    __asm__ volatile("mov %%" reg ", %0" : "=r"(v));          \
    o->selector[n] = v
    TAKE("es", SEG_ES);
    TAKE("ds", SEG_DS);
    TAKE("fs", SEG_FS);
    TAKE("gs", SEG_GS);
    if (!faulted) {
        TAKE("ss", SEG_SS);
        o->fs_base = s->fs_base_left;
        o->selector[SEG_CS] = 0;
    }
#undef TAKE
    __asm__ volatile("rdgsbase %0" : "=r"(o->gs_base));
    __asm__ volatile("mov %0, %%ss\n mov %0, %%ds\n mov %0, %%es\n mov %0, %%gs\n mov %0, %%fs\n wrfsbase %1\n"
                     : : "r"(0x2b), "r"(s->fs_base));
}

static void child_run(struct batch *b)
{
    struct stub_data *s = (struct stub_data *)DATA;
    for (uint32_t i = host.shared->current; i < b->count; i++) {
        struct test_case *t = &b->c[i];
        host.shared->current = i;
        window_load(host.arena, t->in.mem);
        t->host.vector = NO_VECTOR;
        t->host.error = 0;
        t->host.cr2 = 0;
        s->in = &t->in;
        s->out = &t->host;
        s->entry = t->in.rip;
        s->far_rip = (uint32_t)t->in.rip;
        s->far_cs = t->in.selector[SEG_CS];
        s->es = t->in.selector[SEG_ES];
        s->ds = t->in.selector[SEG_DS];
        s->ss = t->in.selector[SEG_SS];
        s->skip = t->skip;
        memcpy(s->frame, (uint64_t[5]){ t->in.rip, s->far_cs, t->in.rflags | FLAG_TF, t->in.gpr[RSP], s->ss }, sizeof s->frame);
        int faulted = t->step ? oracle_enter_step() : t->ldt ? oracle_enter_ldt() : t->bits == 32 ? oracle_enter32() : oracle_enter64();
        uint64_t next = t->in.rip + t->length;
        if (t->segments) take_segments(&t->host, faulted);
        else if (t->ldt || t->step) __asm__ volatile("mov %0, %%ss\n mov %0, %%ds\n mov %0, %%es\n" : : "r"(0x2b));
        if (t->step && t->host.vector == EXC_DB) t->host.vector = NO_VECTOR;
        else if (t->step) { /* its own exception, whichever */ }
        else if (!faulted) t->host.rip = next;
        else if (landed(t, &t->host)) {
            t->host.vector = NO_VECTOR; /* a branch into the filling of the slot */
            t->host.rip--;
        } else if (t->host.vector == EXC_PF && t->host.rip + selector_base(t->host.selector[SEG_CS]) == t->host.cr2 && (t->host.error & PF_I) && t->host.cr2 != t->in.rip + t->cs_base) {
            t->host.vector = NO_VECTOR; /* a branch to where no code is */
            t->host.error = 0;
            t->host.cr2 = 0;
        }
        if (t->host.vector == NO_VECTOR) t->host.rflags &= ~(uint64_t)FLAG_RF;
        window_save(host.arena, t->host.mem);
        if (case_soils_memory(t, &t->host)) arena_fill(host.arena);
        t->host_done = 1;
    }
}

static bool install_ldt(void)
{
    for (uint32_t n = 0; n < LDT_COUNT; n++) {
        const struct ldt_row *l = &ldt_rows[n];
        struct user_desc d = { .entry_number = n, .base_addr = l->base, .limit = l->limit, .seg_32bit = l->big, .contents = l->kind,
                               .read_exec_only = l->sealed, .limit_in_pages = l->pages };
        if (syscall(SYS_modify_ldt, 0x11, &d, sizeof d)) return false;
    }
    return true;
}

static void child_main(struct batch **where)
{
    struct stub_data *s = (struct stub_data *)DATA;
    static uint8_t stack[1 << 16];
    stack_t alt = { .ss_sp = stack, .ss_size = sizeof stack };
    if (!map_at(STUB, 0x2000, PROT_READ | PROT_WRITE | PROT_EXEC, -1)) _exit(2);
    /* jmp *[STUB + 0x1038] in either mode: 64-bit code here, behind a far jump for 32-bit code. */
    static const uint8_t back64[] = { 0xff, 0x24, 0x25, 0x38, 0x10, 0x00, 0x10 };
    memcpy((void *)STUB, back64, sizeof back64);
    s->back = (uint64_t)(uintptr_t)oracle_back;
    s->components = (uint32_t)host_components();
    __asm__ volatile("rdfsbase %0" : "=r"(s->fs_base));
    /* Flat segments for 32-bit code; loading FS resets its base. */
    __asm__ volatile("mov %0, %%ds\n mov %0, %%es\n mov %0, %%gs\n mov %0, %%fs\n wrfsbase %1\n"
                     : : "r"(0x2b), "r"(s->fs_base));
    struct sigaction a = { .sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER };
    static const int signals[] = { SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP };
    /* Every page is there: a fault tells protection from presence. */
    const uint64_t arenas[] = { MID, HIGH, host.low ? LOW : MID };
    for (size_t i = 0; i < ARRAY_SIZE(arenas); i++)
        for (uint32_t off = 0; off < ARENA_SIZE; off += 0x1000) (void)*(volatile uint8_t *)(uintptr_t)(arenas[i] + off);
    mprotect((void *)CODE, CODE_SIZE, PROT_READ | PROT_EXEC);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (!install_ldt()) _exit(3);
    sigaltstack(&alt, NULL);
    for (size_t i = 0; i < ARRAY_SIZE(signals); i++) sigaction(signals[i], &a, NULL);
    for (;;) {
        struct batch *b;
        if (read(host.to_child[0], &b, sizeof b) != sizeof b) _exit(0);
        child_run(b);
        if (write(host.from_child[1], &b, sizeof b) != sizeof b) _exit(0);
    }
    (void)where;
}

static bool spawn(void)
{
    if (pipe(host.to_child) || pipe(host.from_child)) return false;
    host.pid = fork();
    if (host.pid < 0) return false;
    if (host.pid == 0) {
        close(host.to_child[1]);
        close(host.from_child[0]);
        child_main(NULL);
    }
    close(host.to_child[0]);
    close(host.from_child[1]);
    return true;
}

static void reap(void)
{
    close(host.to_child[1]);
    close(host.from_child[0]);
    kill(host.pid, SIGKILL);
    waitpid(host.pid, NULL, 0);
}

bool host_is_recorded(void)
{
    static int known;
    if (!known) {
        uint32_t a = 0, b, c = 0, d, family;
        __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
        bool amd = b == 0x68747541 && d == 0x69746e65 && c == 0x444d4163;
        a = 1;
        c = 0;
        __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
        family = (a >> 8 & 15) + (a >> 20 & 0xff);
        known = amd && family == 0x1a ? 1 : -1;
    }
    return known == 1;
}

static uint32_t host_cpuid1_ecx(void)
{
    uint32_t a = 1, b, c = 0, d;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    return c;
}

bool host_start(const char **error)
{
    *error = "the host CPU or kernel has no XSAVE";
    if (!(host_cpuid1_ecx() & 1u << 27)) return false;
    *error = "the host CPU or kernel has no FSGSBASE";
    if (!(getauxval(AT_HWCAP2) & 2)) return false;
    *error = "cannot map the low addresses that the cases use";
    int fd = memfd_create("arena", 0), code = memfd_create("code", 0);
    if (fd < 0 || code < 0 || ftruncate(fd, ARENA_SIZE) || ftruncate(code, CODE_SIZE)) return false;
    host.arena = mmap(NULL, ARENA_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    host.shared = shared_alloc(sizeof *host.shared);
    if (host.arena == MAP_FAILED || !host.shared) return false;
    if (!map_arena(MID, fd) || !map_arena(HIGH, fd) || !map_at(CODE, CODE_SIZE, PROT_READ | PROT_WRITE | PROT_EXEC, code))
        return false;
    void *block = mmap((void *)BLOCK, BLOCK_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (block != (void *)BLOCK) return false;
    host.low = map_arena(LOW, fd);
    host.code = (uint8_t *)CODE;
    memset(host.code, 0xcc, CODE_SIZE);
    arena_fill(host.arena);
    *error = "cannot start a child process";
    return spawn();
}

static void put_code(struct batch *b)
{
    for (uint32_t i = 0; i < b->count; i++) {
        const struct test_case *t = &b->c[i];
        uint8_t *p = host.code + i * SLOT_SIZE + SLOT_IP;
        memcpy(p, t->bytes, t->length);
        uint8_t *q = p + t->length;
        if (t->bits == 64) {
            q[0] = 0xe9;
            st32(q + 1, (uint32_t)(STUB - (t->in.rip + t->length + 5)));
            q += 5;
        } else {
            if (t->bits == 16) *q++ = 0x66;
            q[0] = 0xea;
            st32(q + 1, (uint32_t)STUB);
            st16(q + 5, 0x33);
            q += 7;
        }
        memset(q, 0xcc, (size_t)(p + CODE_MAX + 16 - q));
    }
}

void host_begin(struct batch *b)
{
    put_code(b);
    for (uint32_t i = 0; i < b->count; i++) b->c[i].host_done = 0;
    host.shared->current = 0;
    if (write(host.to_child[1], &b, sizeof b) != sizeof b) host.shared->current = 0;
}

void host_end(struct batch *b)
{
    for (;;) {
        struct pollfd p = { .fd = host.from_child[0], .events = POLLIN };
        struct batch *done;
        int n = poll(&p, 1, 20000);
        if (n < 0 && errno == EINTR) continue;
        if (n == 1 && read(p.fd, &done, sizeof done) == sizeof done) return;
        /* The child died or hangs in this case: go on behind it with a new one. */
        reap();
        host.shared->current++;
        if (!spawn()) exit(2);
        if (host.shared->current >= b->count) return;
        if (write(host.to_child[1], &b, sizeof b) != sizeof b) exit(2);
    }
}

void host_stop(void) { reap(); }
