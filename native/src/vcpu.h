/* The vCPU: everything one virtual processor is. Owned by the thread that is inside kvs_vcpu_run. */
#ifndef KVS_VCPU_H
#define KVS_VCPU_H

#include <pthread.h>
#include <stdatomic.h>

#include "../include/kvmsharp.h"
#include "x86.h"

struct lapic;
struct block;
struct block_cache;
struct memslot;
struct kvs_insn;

/*
 * gpr[] is an extended register file, so that an effective address is always
 * gpr[base] + (gpr[index] << scale) + disp without a branch: behind the 16 architectural
 * registers (hardware number order) stand a zero, the RIP base, a bias, the FS and GS bases and 4 GiB.
 */
enum { GPR_ZERO = 16, GPR_RIPBASE = 17, GPR_BIAS = 18, GPR_FSBASE = 19, GPR_GSBASE = 20, GPR_4G = 21, GPR_COUNT = 22 };
#define GPR_BIAS_VALUE 8192u
#define GPR_4G_VALUE (1ull << 32)

struct segment {
    uint64_t base;
    uint32_t limit; /* in bytes, granularity applied */
    uint32_t attr;  /* ATTR_... */
    uint16_t sel;
};

struct dtable { uint64_t base; uint16_t limit; };

/*
 * Soft TLB entry. A hit for an access of n bytes at la is (la ^ tag) <= 4096 - n: one compare
 * checks page, presence, permission and page crossing. An empty entry k has a tag whose page
 * number does not select k. host = la + addend.
 */
struct tlb_entry { uint64_t tag; uint64_t addend; };
#define TLB_BITS 12
#define TLB_SIZE (1u << TLB_BITS)
enum { TLB_R, TLB_W, TLB_X, TLB_KINDS };
/* _AC: supervisor that may touch user pages under SMAP. _USER32: user in compatibility mode, so nothing above 4 GiB. */
enum { TLB_USER, TLB_SUPER, TLB_SUPER_AC, TLB_USER32, TLB_CLASSES };
#define TLB_LOG_SIZE 512
struct tlb_log { uint32_t count; uint16_t index[TLB_LOG_SIZE]; }; /* count > size: overflowed */
struct tlb_class {
    struct tlb_entry e[TLB_KINDS][TLB_SIZE];
    struct tlb_log log[TLB_KINDS][2]; /* [1]: global pages, kept by MOV to CR3 */
    /* Filters: which 4 MiB and 1 GiB regions may hold pieces of large pages, which INVLPG must drop whole. */
    uint64_t large[64], huge;
};

/*
 * Translated code (jit/) looks here first: each of its memory operands has a slot of its own, picked when it
 * was translated, by rights and access kind. A hit is (la ^ tag) < bound; an empty slot has bound 0. Every
 * change of the soft TLB that takes something away empties them; slots_log names the filled ones.
 */
struct tlb_slot { uint64_t tag, addend, bound, pad; };
#define SLOT_BOUND (PAGE_SIZE - 31) /* for sizes up to 32; what starts behind goes to the soft TLB */
#define SLOT_COUNT 256u
#define SLOT_LOG_SIZE 256u

/* Key of decoded code: everything that decoding and the choice of handlers depend on. */
enum {
    MODE_16 = 0, MODE_32 = 1, MODE_64 = 2, MODE_SIZE = 3,
    MODE_FLAT = 1 << 2,      /* 64- and 32-bit code: data accesses need no segment or alignment check: fast handlers */
    MODE_CSFLAT = 1 << 3,    /* CS base 0 and no limit to check: blocks may be chained */
    MODE_STACK32 = 1 << 4,   /* SS.B (in 64-bit mode: unused) */
    MODE_X87_NM = 1 << 5,    /* CR0.EM or CR0.TS: x87 raises #NM */
    MODE_WAIT_NM = 1 << 6,   /* CR0.MP and CR0.TS: FWAIT raises #NM */
    MODE_MMX_UD = 1 << 7,    /* CR0.EM */
    MODE_SSE_UD = 1 << 8,    /* CR0.EM or !CR4.OSFXSR */
    MODE_SIMD_NM = 1 << 9,   /* CR0.TS: MMX and SSE raise #NM */
    MODE_SSE_TRAPS = 1 << 10, /* an SSE exception is unmasked in MXCSR: checked FP handlers */
    MODE_PROTECTED = 1 << 11, /* CR0.PE and not virtual-8086 */
    MODE_USER = 1 << 12,     /* CPL 3 */
    MODE_AVX_UD = 1 << 13,   /* !CR4.OSXSAVE, or XCR0 has not both SSE and AVX */
};

/* No block holds more instructions than this; with less budget left the run loop goes block by block. */
#define BLOCK_LIMIT 64

/* Why a handler left the chain of handlers; see leave() in interp.h. */
enum {
    ST_OK = 0,   /* go on with the next instruction */
    ST_LOOKUP,   /* the instruction is done and c->rip holds the next RIP */
    ST_END,      /* the instruction is done; RIP is the next one; state that blocks depend on changed */
    ST_FAULT,    /* not done; an exception is pending in c->exc; RIP is this instruction */
    ST_EXIT,     /* not done; the run block holds an exit; it restarts on re-entry */
    ST_EXIT_DONE, /* done; the run block (or the write queue) holds an exit; RIP is the next one */
    ST_EXIT_RIP, /* done; like ST_EXIT_DONE but c->rip has been set */
    ST_AGAIN,    /* not done; restart this instruction after handling requests (long REP) */
};

/* Requests from any thread; see vcpu_request. */
enum {
    REQ_KICK = 1 << 0,       /* return KVS_EXIT_INTR */
    REQ_EVENT = 1 << 1,      /* an interrupt, NMI, INIT or SIPI may be pending */
    REQ_SYNC = 1 << 2,       /* leave guest code for kvs_vm_quiesce / vm_sync */
    REQ_TLB_FLUSH = 1 << 3,  /* drop all translations */
    REQ_CODE_FLUSH = 1 << 4, /* drop all decoded code */
    REQ_HOST_TIMER = 1 << 5, /* exit with KVS_EXIT_HOST_TIMER */
    REQ_W_FLUSH = 1 << 6,    /* drop all write translations (dirty log, code marks) */
    REQ_CODE_DROP = 1 << 7,  /* drop decoded code of the pages in vm->drop_page */
};

struct fpu {
    uint8_t r[8][16]; /* physical registers R0-R7, 80 bits each; ST(i) = r[(TOP + i) & 7] */
    uint16_t fcw, fsw; /* fsw holds TOP */
    uint8_t tags;      /* abridged: bit i set = R_i not empty */
    uint16_t fop, fcs, fds;
    uint64_t fip, fdp;
    uint32_t mxcsr; /* while running the host register holds it; see mxcsr_read */
    _Alignas(64) uint8_t vec[32][64]; /* XMM in the low 16 bytes */
};

/* Bytes of one instruction's device reads, so that it can be restarted. */
struct replay_entry { uint64_t addr; uint64_t data; uint8_t size; uint8_t is_port; };
#define REPLAY_MAX 112
struct mmio_write { uint64_t gpa; uint64_t data; uint8_t size; };
#define MMIO_WRITES_MAX 112

/* The piece of a memory operand inside one page, translated. */
struct mem_part {
    uint8_t *host;        /* of the first byte, or NULL: no memory there */
    struct memslot *slot; /* NULL also when a TLB tag said that host is plain RAM */
    uint64_t gpa;         /* unknown (0) when a tag gave host */
    uint64_t la;
    uint32_t size;
};

/* What other threads ask of a vCPU beside interrupts and NMI. The vector of a SIPI is in bits 8-15. */
enum { SIG_SMI = 1 << 0, SIG_INIT = 1 << 1, SIG_SIPI = 1 << 2, SIG_SIPI_VECTOR = 0xff00 };

/* The last I/O instruction (or iteration), for an SMI right behind it. info: AMD APM 2 "SMM I/O Trap Offset", 0: none. */
struct io_trap { uint32_t info; uint64_t retired, rip, rcx, rsi, rdi; };

/* A read-modify-write operand between vrmw_begin and vrmw_end. */
struct rmw {
    uint8_t *host;      /* LOCKed: operate here with a host atomic; NULL: the value is in data */
    uint64_t la;
    uint32_t size, part_count;
    bool stopped;       /* the other vCPUs are stopped until vrmw_end_locked */
    struct mem_part part[2];
    _Alignas(16) uint8_t data[16];
};

#define MWAIT_MAX 10000000u /* ns: no wait is longer */
/* The line that MONITOR has armed, and MWAIT's wait for a store to it. */
struct monitor {
    bool armed, waiting;
    bool any_interrupt; /* an interrupt ends the wait even while IF is clear */
    uint64_t line, digest;   /* its guest physical address, its contents */
    uint64_t deadline;       /* VM clock, ns */
    uint64_t rip;            /* behind MWAIT: whoever moves the vCPU from there has ended the wait */
};

#define MC_BANKS 10u
enum { MCE_NONE, MCE_EXCEPTION, MCE_SHUTDOWN };

/* Virtual clock, several vCPUs: instructions of a turn, and PAUSEs that end one early. */
#define TURN_LENGTH 50000u
#define PAUSES_PER_TURN 64u

struct kvs_vcpu {
    /* ---- hot: touched by every handler ---- */
    uint64_t gpr[GPR_COUNT];
    uint16_t fl;             /* status flags as LAHF; SETO AL leave them: AH in bits 8-15, OF in bit 0 */
    uint16_t pad0;
    uint32_t mode;           /* MODE_... */
    _Atomic int64_t limit;   /* BLOCK_LIMIT, or INT64_MAX when requests != 0: one compare of the budget at
                                block entry stops for requests and before the budget could be overrun */
    struct tlb_class *tlb;   /* the current class */
    uint64_t jc_key;         /* generation << 16 | mode */
    struct jc_entry *jc;     /* jump cache: linear address to block */
    bool fetch_evicted;      /* a fetch translation has made way for another since the jump cache was emptied */
    uint32_t eflags;         /* everything but the status flags; bit 1 set */
    uint8_t cpl;
    uint8_t int_shadow;      /* 1: MOV SS, 2: STI; holds for one instruction */
    uint8_t la_bits;         /* of canonical addresses: 48, or 57 with 5-level paging */
    uint8_t lam_user, lam_super; /* linear-address masking: bits that count of pointers with bit 63 clear and set; 0: off */
    /* ---- where we are ---- */
    uint64_t rip;            /* valid outside handlers */
    const struct kvs_insn *cur; /* the instruction that left (set by leave) */
    int64_t budget;          /* instructions that may still retire; valid outside handlers */
    uint64_t retired_end;    /* retired count when budget reaches 0: retired = retired_end - budget */
    uint64_t insn_limit;     /* KVS_EXIT_INSN_LIMIT at this count */
    uint64_t clock_base;     /* virtual clock = retired + clock_base while this vCPU runs */
    uint64_t slice_end;      /* virtual clock, several vCPUs: pass the turn at this count */
    bool in_slice;           /* it has taken the turn up */
    uint32_t pauses;         /* PAUSE instructions since the last yield */
    uint64_t drop_seen;      /* of vm->drop_count */
    /* ---- architectural state ---- */
    struct segment seg[SEG_COUNT], ldtr, tr;
    struct dtable gdtr, idtr;
    uint64_t cr0, cr2, cr3, cr4, efer;
    uint64_t dr[4], dr6, dr7;
    uint64_t pdptr[4];       /* PAE: loaded by MOV to CR3 */
    uint64_t msr_star, msr_lstar, msr_cstar, msr_sfmask, msr_kernel_gs_base;
    uint64_t msr_sysenter_cs, msr_sysenter_esp, msr_sysenter_eip;
    uint64_t msr_pat, msr_tsc_aux, msr_misc_enable, msr_spec_ctrl, msr_mtrr_def;
    uint64_t msr_mtrr_fix[11], msr_mtrr_var[16], msr_mcg_status, msr_mcg_ctl, msr_debugctl, msr_microcode, msr_hwcr;
    uint64_t msr_kvm_wall_clock, msr_kvm_system_time, msr_kvm_poll_control, msr_tsc_adjust;
    uint64_t msr_kvm_steal_time, msr_kvm_pv_eoi;
    struct steal { int thread, fd; bool counts; uint64_t seen, updated; } steal; /* irqchip/paravirt.c */
    uint64_t msr_mc[4 * MC_BANKS]; /* CTL, STATUS, ADDR, MISC */
    struct monitor monitor;
    uint8_t mce_pending;     /* MCE_...: before the next instruction */
    uint32_t smbase;
    uint64_t msr_smi_count;
    int64_t tsc_offset;      /* guest TSC = clock_tsc(vm) + tsc_offset */
    uint64_t xcr0;
    uint64_t msr_pkrs;
    uint32_t pkru;
    struct fpu fpu;
    /* ---- events ---- */
    struct { bool pending; bool has_error; uint8_t vector; uint32_t error; uint64_t payload; } exc;
    uint64_t pending_dbg;    /* DR6 bits of a debug trap to deliver after the instruction */
    bool nmi_masked, in_smm, smm_inside_nmi;
    bool triple_fault;       /* with exc.pending: shutdown instead of a delivery */
    _Atomic uint8_t nmi_pending; /* 0-2: the one to take and, as it masks the next, one held by the latch */
    _Atomic uint32_t signals; /* SIG_... */
    struct io_trap io_trap;
    int16_t injected_irq;    /* external interrupt taken from the controller, not yet delivered; -1 none */
    _Atomic uint32_t requests;
    _Atomic uint32_t mp_state; /* KVS_MP_STATE_... */
    _Atomic bool pv_unhalted; /* KVM_HC_KICK_CPU: the next or the present HLT ends */
    uint32_t sipi_vector;
    /* ---- I/O in flight ---- */
    struct replay_entry replay[REPLAY_MAX];
    uint32_t replay_count, replay_pos; /* recorded; consumed by the current try */
    struct { bool active, is_port; uint64_t addr; uint8_t size; } io_read; /* the read that exited */
    struct mmio_write writes[MMIO_WRITES_MAX];
    uint32_t write_count, write_pos;
    bool write_exited;       /* the exit in the run block is writes[write_pos] */
    struct rmw rmw;
    /* ---- decoded code ---- */
    struct block_cache *blocks;
    struct jit *jit;         /* NULL: interpreter only */
    uint8_t simd_live;       /* in host code: the guest's vector registers are in the host's */
    uint64_t host_sp, host_sp_low; /* in host code: the stack at its start, and how far pairs of returns may go */
    uint32_t code_modified;  /* a store hit decoded code: leave after this instruction */
    bool in_chain;           /* a chain of handlers runs: the count of retired instructions is in its budget only */
    bool step_next;          /* the next instruction runs by itself */
    uint32_t near_stores;    /* stores beside code since the last drop; see block.c */
    void *step_block;        /* uncached block of stepping and exact stops */
    /* ---- object ---- */
    struct kvs_vm *vm;
    struct kvs_vcpu *next;   /* in vm->vcpus order */
    uint32_t id;
    struct lapic *lapic;     /* NULL without an in-core irqchip */
    struct kvs_run *run;
    _Atomic uint32_t running; /* 1 while a thread is inside kvs_vcpu_run */
    _Atomic uint32_t in_guest; /* 1 while guest code or its state may be touched by that thread */
    bool shut_down;
    pthread_mutex_t wait_lock;
    pthread_cond_t wait_cond; /* CLOCK_MONOTONIC; signalled by vcpu_request */
    struct kvs_guest_debug guest_debug;
    struct kvs_cpuid_entry2 *cpuid;
    uint32_t cpuid_count;
    uint64_t cpuid_features, cpuid_system; /* FEAT_... bits of the table in use; see sys/sys.h */
    struct kvs_vcpu_stats stats;
    struct kvs_trace_entry *trace;
    uint32_t trace_size, trace_head, trace_count;
    uint32_t saved_host_mxcsr;
    struct tlb_class *tlb_classes; /* [TLB_CLASSES] */
    uint32_t slots_logged;   /* > SLOT_LOG_SIZE: overflowed */
    uint32_t slots_before_ac; /* slots_logged when the class became TLB_SUPER_AC */
    uint32_t slots_log[SLOT_LOG_SIZE]; /* offsets in this structure */
    _Alignas(64) struct tlb_slot slots[2][2][SLOT_COUNT]; /* [CPL 3][TLB_R, TLB_W] */
};

/* ---- flags ---- */
static inline uint32_t flags_status(const struct kvs_vcpu *c)
{
    return ((c->fl >> 8) & 0xd5u) | (uint32_t)(c->fl & 1) << 11;
}
static inline void flags_set_status(struct kvs_vcpu *c, uint32_t f)
{
    c->fl = (uint16_t)((f & 0xd5u) << 8 | 0x200u | ((f >> 11) & 1));
}
static inline uint32_t flags_read(const struct kvs_vcpu *c) { return c->eflags | flags_status(c); }
/* Does not recompute the mode: callers that can change TF, VM or AC do (vcpu_update_mode). */
static inline void flags_write(struct kvs_vcpu *c, uint32_t f)
{
    flags_set_status(c, f);
    c->eflags = (f & ~FLAGS_STATUS) | 2u;
}

/* In this paging mode; see also is_canonical_widest. */
static inline bool is_canonical(const struct kvs_vcpu *c, uint64_t la) { return sign_extend(la, c->la_bits) == la; }

static inline bool is_long_mode(const struct kvs_vcpu *c) { return c->efer & EFER_LMA; }
static inline bool is_code64(const struct kvs_vcpu *c) { return (c->mode & MODE_SIZE) == MODE_64; }
static inline bool is_protected(const struct kvs_vcpu *c) { return c->cr0 & CR0_PE; }
static inline bool is_v86(const struct kvs_vcpu *c) { return c->eflags & FLAG_VM; }
static inline bool is_real_or_v86(const struct kvs_vcpu *c) { return !is_protected(c) || is_v86(c); }
static inline uint32_t iopl(const struct kvs_vcpu *c) { return (c->eflags & FLAG_IOPL) >> 12; }

/* ---- vcpu.c ---- */
int vcpu_create(struct kvs_vm *vm, uint32_t id, struct kvs_vcpu **out);
void vcpu_free(struct kvs_vcpu *c);
void vcpu_reset(struct kvs_vcpu *c);       /* power-on: SDM 3A "Processor State After Reset" */
void vcpu_init_reset(struct kvs_vcpu *c);  /* INIT: keeps FPU, caches, most MSRs */
/* Recomputes c->mode, c->tlb and c->jc_key from segments, CRs, EFER, EFLAGS and MXCSR. Cheap. */
void vcpu_update_mode(struct kvs_vcpu *c);
/* The part of it that CR3, CR4 and EFER decide: the width of linear addresses. */
void vcpu_update_linear(struct kvs_vcpu *c);
/* Posts requests and wakes the vCPU. Any thread. Never lost. */
void vcpu_request(struct kvs_vcpu *c, uint32_t req);
/* An NMI for this vCPU. Any thread. SDM 3A "Handling Multiple NMIs" */
static inline void vcpu_post_nmi(struct kvs_vcpu *c)
{
    uint8_t n = atomic_load(&c->nmi_pending);
    while (n < 2 && !atomic_compare_exchange_weak(&c->nmi_pending, &n, (uint8_t)(n + 1))) { }
    vcpu_request(c, REQ_EVENT);
}
/* Any thread: an SMI, an INIT; a start-up IPI, which counts only while the vCPU waits for one: true then. */
void vcpu_post_smi(struct kvs_vcpu *c);
void vcpu_post_init(struct kvs_vcpu *c);
bool vcpu_post_sipi(struct kvs_vcpu *c, uint8_t vector);
/* Retired instructions as of the instruction `i` that is executing (exclusive). */
uint64_t vcpu_retired_at(const struct kvs_vcpu *c, const struct kvs_insn *i, int64_t budget);

/* Before anything that reads the clock: makes the virtual clock exact as of instruction i. */
void vcpu_sync_clock(struct kvs_vcpu *c, const struct kvs_insn *i, int64_t budget);
uint64_t vcpu_retired(const struct kvs_vcpu *c); /* outside handlers */

/* ---- exceptions: each returns ST_FAULT, so that helpers can `return raise_gp(c, 0);` ---- */
int raise_vector(struct kvs_vcpu *c, uint8_t vector);                 /* no error code */
int raise_error(struct kvs_vcpu *c, uint8_t vector, uint32_t error);  /* with error code */
int raise_page_fault(struct kvs_vcpu *c, uint64_t la, uint32_t error);
static inline int raise_ud(struct kvs_vcpu *c) { return raise_vector(c, EXC_UD); }
static inline int raise_gp(struct kvs_vcpu *c, uint32_t error) { return raise_error(c, EXC_GP, error); }

/* MXCSR lives in the host register inside kvs_vcpu_run, with all exceptions masked there. */
#define MXCSR_MASKS 0x1f80u
#define MXCSR_FLAGS 0x3fu
uint32_t mxcsr_read(struct kvs_vcpu *c);
void mxcsr_write(struct kvs_vcpu *c, uint32_t value); /* value checked by the caller; updates the mode */

#endif
