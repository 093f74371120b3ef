/* System side of the processor: delivery of events, segments, control state, MSRs, CPUID. */
#ifndef KVS_SYS_H
#define KVS_SYS_H

#include "../mmu/mmu.h"

/* ---- event delivery (exception.c) ----
 * Return false on triple fault (the run loop makes KVS_EXIT_SHUTDOWN). A fault while delivering
 * becomes a double fault by the contributory rules. SDM 3A "Interrupt 8-Double Fault Exception".
 * c->rip is the RIP to push (for software interrupts: already the next one).
 */
bool deliver_exception(struct kvs_vcpu *c);                /* c->exc; what faults meanwhile is left there */
bool deliver_interrupt(struct kvs_vcpu *c, uint8_t vector); /* external, NMI included */
enum { INT_SOFT, INT_INT3, INT_INTO, INT_INT1, INT_EXTERNAL, INT_HARD_EXCEPTION, INT_NMI };
/* The common engine: real mode, protected mode gates, task gates, long mode with IST.
 * 0 or ST_FAULT (with the next exception pending in c->exc). */
int interrupt_enter(struct kvs_vcpu *c, uint8_t vector, int kind, bool has_error, uint32_t error);

/* #DB with the given DR6 bits (raise_vector(c, EXC_DB) takes and clears c->pending_dbg). ST_FAULT. */
int raise_debug(struct kvs_vcpu *c, uint64_t dr6_bits);

/* The processor goes into shutdown: KVS_EXIT_SHUTDOWN. ST_FAULT. */
int raise_shutdown(struct kvs_vcpu *c);

/* ---- system management mode (smm.c) ---- */
/* An SMI is taken at c->rip. halted: it was in HLT, and RSM may go back there. */
void smm_enter(struct kvs_vcpu *c, bool halted);
int smm_resume(struct kvs_vcpu *c);             /* RSM: ST_LOOKUP or ST_FAULT */
void smm_set(struct kvs_vcpu *c, bool in_smm);  /* the host loads a state */

/* ---- segments (segment.c, far.c) ---- */
struct descriptor { uint64_t base; uint32_t limit; uint32_t attr; uint64_t la; uint32_t lo, hi; };
/* Reads a descriptor by selector. 0, ST_FAULT, or -1: outside its table (the caller chooses the fault). */
int descriptor_read(struct kvs_vcpu *c, uint16_t sel, struct descriptor *d);
int load_segment(struct kvs_vcpu *c, uint32_t seg, uint16_t sel);  /* MOV Sreg, POP Sreg, LxS */
void load_segment_real(struct kvs_vcpu *c, uint32_t seg, uint16_t sel);
/* Segment register was changed by any means: refresh gpr[GPR_FSBASE/GSBASE] and the mode. */
void segments_changed(struct kvs_vcpu *c);

/* ---- control (control.c) ---- */
int write_cr0(struct kvs_vcpu *c, uint64_t v); /* 0 or ST_FAULT */
int write_cr3(struct kvs_vcpu *c, uint64_t v);
int write_cr4(struct kvs_vcpu *c, uint64_t v);
int write_efer(struct kvs_vcpu *c, uint64_t v);
void pkru_write(struct kvs_vcpu *c, uint32_t v);
uint64_t cr3_allowed(const struct kvs_vcpu *c); /* bits that the CPUID table makes legal, in long mode */
uint64_t cr4_allowed(const struct kvs_vcpu *c);
uint64_t efer_allowed(const struct kvs_vcpu *c);

/* ---- MSRs (msr.c): 0, or -1 for #GP(0). host: from the host API, which may set read-only state ---- */
int msr_read(struct kvs_vcpu *c, uint32_t index, uint64_t *value, bool host);
int msr_write(struct kvs_vcpu *c, uint32_t index, uint64_t value, bool host);
int32_t msr_index_list(uint32_t *indices, uint32_t *count);
uint64_t tsc_read(struct kvs_vcpu *c);

/* ---- hypercall.c ---- */
/* Calls with RAX, RBX, RCX, RDX, RSI; the result is in RAX. True: the guest gives up its turn. */
bool hypercall_run(struct kvs_vcpu *c);
/* Bits of CPUID leaf 0x40000001, EAX. KVM documentation "KVM CPUID bits" */
#define KVM_FEATURE_STEAL_TIME BIT(5)
#define KVM_FEATURE_PV_EOI BIT(6)
#define KVM_FEATURE_PV_UNHALT BIT(7)
#define KVM_FEATURE_PV_SEND_IPI BIT(11)
#define KVM_FEATURE_PV_SCHED_YIELD BIT(13)

/* SDM 4 "IA32_MISC_ENABLE": fast strings, no branch trace, no precise event sampling, MONITOR */
#define MISC_ENABLE_RESET (BIT(0) | BIT(11) | BIT(12) | BIT(18))
#define MISC_ENABLE_LIMIT_CPUID BIT(22)
#define MISC_ENABLE_MONITOR BIT(18)
#define MISC_ENABLE_XD_DISABLE BIT(34)

/* ---- MONITOR (interp/op_monitor.c) ---- */
bool monitor_triggered(struct kvs_vcpu *c); /* was the line written? By a thread in guest code. */

/* ---- machine checks (mce.c) ---- */
#define MCG_STATUS_MCIP 4ull
void mce_reset(struct kvs_vcpu *c);
uint64_t mce_capability(void); /* IA32_MCG_CAP */
/* May software write v to register n (CTL, STATUS, ADDR, MISC: n & 3) of the banks? */
bool mce_value_valid(const struct kvs_vcpu *c, uint32_t n, uint64_t v, bool host);
/* A machine check is pending: before anything else. False: shutdown. */
bool mce_deliver(struct kvs_vcpu *c);

/* ---- CPUID (cpuid.c) ---- */
int32_t cpuid_supported(struct kvs_cpuid_entry2 *entries, uint32_t *count);
void cpuid_lookup(struct kvs_vcpu *c, uint32_t leaf, uint32_t subleaf, uint32_t out[4]);
/* Recomputes c->cpuid_features from c->cpuid; drops decoded code. */
void cpuid_changed(struct kvs_vcpu *c);
/* Features that decide about instructions, as this host has them. */
uint64_t host_features(void);
/* Those whose instructions would run as the host's own, which this host has not. */
uint64_t host_lacks(void);
/* "AuthenticAMD" in leaf 0: where AMD and Intel differ, this decides. */
bool cpuid_is_amd(const struct kvs_vcpu *c);
/* What CPUID can offer. Those up to FEAT_DECODED decide about instructions and are bits of
 * cpuid_features; the rest are bits of cpuid_system. */
enum {
    FEAT_BASE = 0, FEAT_CX8, FEAT_CMOV, FEAT_SEP, FEAT_FPU, FEAT_MMX, FEAT_FXSR, FEAT_SSE, FEAT_SSE2,
    FEAT_SSE3, FEAT_SSSE3, FEAT_SSE41, FEAT_SSE42, FEAT_CX16, FEAT_POPCNT, FEAT_SYSCALL, FEAT_LM,
    FEAT_LAHF64, FEAT_NX, FEAT_PGE, FEAT_PAE, FEAT_PSE, FEAT_SMEP, FEAT_SMAP, FEAT_TSC, FEAT_MSR,
    FEAT_CLFLUSH, FEAT_RDTSCP, FEAT_1G, FEAT_FSGSBASE, FEAT_INVPCID, FEAT_XSAVE, FEAT_MOVBE, FEAT_UMIP,
    FEAT_MONITOR, FEAT_PREFETCHW, FEAT_BMI1, FEAT_BMI2, FEAT_LZCNT, FEAT_RDRAND, FEAT_RDSEED, FEAT_CLFLUSHOPT,
    FEAT_CLWB, FEAT_ADX, FEAT_RDPID, FEAT_XSAVEOPT, FEAT_XSAVEC, FEAT_XSAVES, FEAT_PCLMUL, FEAT_AES, FEAT_SHA,
    FEAT_GFNI, FEAT_AVX, FEAT_AVX2, FEAT_FMA, FEAT_F16C, FEAT_VAES, FEAT_VPCLMUL, FEAT_PKU, FEAT_DECODED,
    FEAT_PCID = 64, FEAT_X2APIC, FEAT_TSCDEADLINE, FEAT_MTRR, FEAT_PAT, FEAT_DE, FEAT_VME, FEAT_MCE, FEAT_AUTOIBRS, FEAT_XGETBV1,
    FEAT_LA57, FEAT_LAM, FEAT_TSCADJUST, FEAT_SPECCTRL, FEAT_STIBP, FEAT_SSBD, FEAT_FLUSHL1D, FEAT_ARCHCAP, FEAT_IBPB,
    FEAT_AMDIBRS, FEAT_AMDSTIBP, FEAT_AMDSSBD, FEAT_PKS,
    FEAT_COUNT
};
_Static_assert(FEAT_DECODED <= 64 && FEAT_COUNT <= 128, "two words of features");
static inline bool has_feature(const struct kvs_vcpu *c, int feature)
{
    return feature == FEAT_BASE || (((feature < 64 ? c->cpuid_features : c->cpuid_system) >> (feature & 63)) & 1);
}

/*
 * Registers that hold linear addresses take what is canonical in the widest paging mode there is, whatever
 * the present one is. SDM 1 "Canonical Addressing"
 */
static inline bool is_canonical_widest(const struct kvs_vcpu *c, uint64_t la)
{
    return sign_extend(la, has_feature(c, FEAT_LA57) ? 57 : 48) == la;
}

/* ---- debug (debug.c) ---- */
/* TF, an enabled breakpoint, host single-step or tracing: one instruction at a time. */
bool debug_stepping(struct kvs_vcpu *c);
/* Before an instruction in stepping mode: instruction breakpoints. True: an exception or exit is ready. */
bool debug_before(struct kvs_vcpu *c);
/* MOV from and to debug registers; 0 or ST_FAULT. CPL is checked by the caller. */
int debug_read_register(struct kvs_vcpu *c, uint32_t n, uint64_t *v);
int debug_write_register(struct kvs_vcpu *c, uint32_t n, uint64_t v);
/* A data or port access in the presence of breakpoints: records matches in c->pending_dbg. */
void debug_check_access(struct kvs_vcpu *c, uint64_t la, uint32_t size, bool write);
void debug_check_port(struct kvs_vcpu *c, uint16_t port, uint32_t size);
/* Is a data breakpoint enabled in this page? Such a page gets no R or W tag. */
bool debug_page_watched(const struct kvs_vcpu *c, uint64_t la);

#endif
