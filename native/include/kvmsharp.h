/*
 * kvmsharp.h - the whole ABI of the execution core.
 *
 * The data model is KVM's: where KVM has a structure, the one here has the same layout and
 * meaning (asserted against <linux/kvm.h> by native/tests/abi_test.c). Functions are typed
 * instead of ioctls and handles are opaque pointers instead of file descriptors.
 *
 * Every function that can fail returns a negative KVS_E... code; >= 0 is success. What a guest
 * does is never an error: it becomes a guest exception, KVS_EXIT_SHUTDOWN or
 * KVS_EXIT_INTERNAL_ERROR. No function calls back into its caller.
 *
 * Thread rules: "any" = callable from any thread at any time; "owner" = one thread at a time
 * and not while kvs_vcpu_run is active on the same vCPU; "setup" = before the first vCPU runs.
 */
#ifndef KVMSHARP_H
#define KVMSHARP_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define KVS_API __attribute__((visibility("default")))
#else
#define KVS_API
#endif

#define KVS_ABI_VERSION 1

/* ---- results ------------------------------------------------------------------------- */
enum {
    KVS_OK = 0,
    KVS_EINVAL = 1,   /* an argument is out of range or inconsistent */
    KVS_ENOMEM = 2,   /* the host has no memory or no threads left */
    KVS_EEXIST = 3,   /* that id, slot or device exists already */
    KVS_ENOENT = 4,   /* no such id, slot or device */
    KVS_EBUSY = 5,    /* the object is in use by another thread */
    KVS_ENOTSUP = 6,  /* not supported by this core or this host */
    KVS_EFAULT = 7,   /* the guest address range is not backed by memory */
    KVS_EOVERLAP = 8, /* the slot overlaps another one */
    KVS_EROFS = 9,    /* write to a read-only slot */
    KVS_ERANGE = 10,  /* the caller's buffer is too small */
    KVS_ESTATE = 11,  /* a state image is not one that a machine can be in */
};

/* ---- exit reasons: KVM's numbers ------------------------------------------------------ */
enum {
    KVS_EXIT_UNKNOWN = 0,
    KVS_EXIT_IO = 2,
    KVS_EXIT_HYPERCALL = 3,
    KVS_EXIT_DEBUG = 4,
    KVS_EXIT_HLT = 5,             /* only without an in-core irqchip */
    KVS_EXIT_MMIO = 6,
    KVS_EXIT_IRQ_WINDOW_OPEN = 7,
    KVS_EXIT_SHUTDOWN = 8,        /* triple fault */
    KVS_EXIT_FAIL_ENTRY = 9,
    KVS_EXIT_INTR = 10,           /* kicked, or immediate_exit */
    KVS_EXIT_INTERNAL_ERROR = 17,
    KVS_EXIT_SYSTEM_EVENT = 24,
    KVS_EXIT_IOAPIC_EOI = 26,
    /* Numbers that KVM does not have. */
    KVS_EXIT_HOST_TIMER = 0x1000, /* the deadline set by kvs_host_timer_arm has passed */
    KVS_EXIT_INSN_LIMIT = 0x1001, /* the count set by kvs_vcpu_set_insn_limit is reached */
};

enum { KVS_EXIT_IO_IN = 0, KVS_EXIT_IO_OUT = 1 };
enum { KVS_INTERNAL_ERROR_EMULATION = 1, KVS_INTERNAL_ERROR_DELIVERY_EV = 3 };

/* ---- objects -------------------------------------------------------------------------- */
struct kvs_vm;
struct kvs_vcpu;
struct kvs_ram;
struct kvs_doorbell;

/* ---- the run block (struct kvm_run) ----------------------------------------------------- */
struct kvs_debug_exit_arch {
    uint32_t exception;
    uint32_t pad;
    uint64_t pc;
    uint64_t dr6;
    uint64_t dr7;
};

struct kvs_run_io {
    uint8_t direction; /* KVS_EXIT_IO_IN or _OUT */
    uint8_t size;      /* 1, 2 or 4 */
    uint16_t port;
    uint32_t count;
    uint64_t data_offset; /* from the start of the run block */
};

struct kvs_run_mmio {
    uint64_t phys_addr;
    uint8_t data[8];
    uint32_t len;
    uint8_t is_write;
    uint8_t pad[3];
};

struct kvs_run_internal {
    uint32_t suberror;
    uint32_t ndata;
    uint64_t data[16]; /* EMULATION: data[0] = RIP, data[1] = byte count, data[2..3] = bytes */
};

struct kvs_run_system_event {
    uint32_t type;
    uint32_t ndata;
    uint64_t data[16];
};

struct kvs_run {
    /* in */
    uint8_t request_interrupt_window;
    uint8_t immediate_exit;
    uint8_t padding1[6];
    /* out */
    uint32_t exit_reason;
    uint8_t ready_for_interrupt_injection;
    uint8_t if_flag;
    uint16_t flags;
    /* in (without an in-core irqchip), out */
    uint64_t cr8;
    uint64_t apic_base;
    union {
        struct kvs_run_io io;
        struct kvs_run_mmio mmio;
        struct { struct kvs_debug_exit_arch arch; } debug;
        struct kvs_run_internal internal;
        struct kvs_run_system_event system_event;
        uint8_t padding[256];
    };
    uint64_t kvm_valid_regs;
    uint64_t kvm_dirty_regs;
    uint8_t sync_regs[2048];
    uint8_t io_data[64]; /* data of a KVS_EXIT_IO; reached through io.data_offset */
};

/* ---- vCPU state: KVM's structures ------------------------------------------------------- */
struct kvs_regs {
    uint64_t rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp;
    uint64_t r8, r9, r10, r11, r12, r13, r14, r15;
    uint64_t rip, rflags;
};

struct kvs_segment {
    uint64_t base;
    uint32_t limit; /* in bytes, granularity applied */
    uint16_t selector;
    uint8_t type, present, dpl, db, s, l, g, avl, unusable, padding;
};

struct kvs_dtable {
    uint64_t base;
    uint16_t limit;
    uint16_t padding[3];
};

struct kvs_sregs {
    struct kvs_segment cs, ds, es, fs, gs, ss, tr, ldt;
    struct kvs_dtable gdt, idt;
    uint64_t cr0, cr2, cr3, cr4, cr8, efer, apic_base;
    uint64_t interrupt_bitmap[4]; /* at most one bit: an external interrupt already taken */
};

struct kvs_fpu {
    uint8_t fpr[8][16];
    uint16_t fcw, fsw;
    uint8_t ftwx; /* abridged tag word, as in FXSAVE */
    uint8_t pad1;
    uint16_t last_opcode;
    uint64_t last_ip, last_dp;
    uint8_t xmm[16][16];
    uint32_t mxcsr, pad2;
};

struct kvs_xsave { uint32_t region[1024]; }; /* standard XSAVE format */

struct kvs_xcr { uint32_t xcr, reserved; uint64_t value; };
struct kvs_xcrs { uint32_t nr_xcrs, flags; struct kvs_xcr xcrs[16]; uint64_t padding[16]; };

struct kvs_msr_entry { uint32_t index, reserved; uint64_t data; };

struct kvs_cpuid_entry2 {
    uint32_t function, index, flags; /* flags bit 0: index is significant */
    uint32_t eax, ebx, ecx, edx;
    uint32_t padding[3];
};
#define KVS_CPUID_FLAG_SIGNIFICANT_INDEX 1u

struct kvs_debugregs { uint64_t db[4]; uint64_t dr6, dr7, flags, reserved[9]; };

#define KVS_GUESTDBG_ENABLE 0x1u
#define KVS_GUESTDBG_SINGLESTEP 0x2u
struct kvs_guest_debug { uint32_t control, pad; uint64_t debugreg[8]; };

struct kvs_x86_mce {
    uint64_t status, addr, misc, mcg_status;
    uint8_t bank;
    uint8_t pad1[7];
    uint64_t pad2[3];
};

struct kvs_mp_state { uint32_t mp_state; };
enum { KVS_MP_STATE_RUNNABLE = 0, KVS_MP_STATE_UNINITIALIZED = 1, KVS_MP_STATE_INIT_RECEIVED = 2,
       KVS_MP_STATE_HALTED = 3, KVS_MP_STATE_SIPI_RECEIVED = 4 };

/* In flags of kvs_vcpu_events: smi is meant too. A getter sets it with KVS_VM_SMM. */
#define KVS_VCPUEVENT_VALID_SMM 8u
/* In flags of the run block: the vCPU is in system management mode. */
#define KVS_RUN_X86_SMM 1u
struct kvs_vcpu_events {
    struct { uint8_t injected, nr, has_error_code, pending; uint32_t error_code; } exception;
    struct { uint8_t injected, nr, soft, shadow; } interrupt; /* shadow: bit 0 MOV SS, bit 1 STI */
    struct { uint8_t injected, pending, masked, pad; } nmi;
    uint32_t sipi_vector;
    uint32_t flags;
    struct { uint8_t smm, pending, smm_inside_nmi, latched_init; } smi;
    struct { uint8_t pending; } triple_fault;
    uint8_t reserved[26];
    uint8_t exception_has_payload;
    uint64_t exception_payload;
};

struct kvs_lapic_state { char regs[1024]; };

struct kvs_translation {
    uint64_t linear_address; /* in */
    uint64_t physical_address;
    uint8_t valid, writeable, usermode, pad[5];
};

/* State that KVM has no structure for; saved and loaded with the rest. */
#define KVS_CORE_PV_UNHALTED (1ull << 40) /* KVM_HC_KICK_CPU came: the next HLT does not wait */
struct kvs_core_state {
    uint64_t retired; /* instructions retired since reset; REP counts once */
    uint64_t flags;   /* bits 0-15: those of DR6 of a debug trap to come; 16-17: machine check to come (1: #MC, 2: shutdown);
                         40: KVS_CORE_PV_UNHALTED */
    /* MONITOR's line (guest physical address; bit 0 armed, 1 MWAIT waits, 2 for masked interrupts too), the digest of its
     * contents; until when MWAIT waits (VM clock), and the RIP behind it. */
    uint64_t monitor_line, monitor_digest, mwait_deadline, mwait_rip;
    /* The I/O instruction just done, which an SMI could restart; info 0: there is none. */
    uint64_t io_trap_info, io_trap_rip, io_trap_rcx, io_trap_rsi, io_trap_rdi;
    uint64_t turn;    /* virtual clock, several vCPUs: bit 0 has the turn, bit 1 has begun it, bits 8-15 PAUSEs
                       * since the last one that gave it up, bits 32-63 instructions left of it; else 0 */
    uint64_t reserved[4];
};

/* ---- devices in the core: KVM's structures --------------------------------------------- */
struct kvs_pic_state {
    uint8_t last_irr, irr, imr, isr, priority_add, irq_base, read_reg_select, poll, special_mask,
        init_state, auto_eoi, rotate_on_auto_eoi, special_fully_nested_mode, init4, elcr, elcr_mask;
};

#define KVS_IOAPIC_PINS 24
struct kvs_ioapic_state {
    uint64_t base_address;
    uint32_t ioregsel, id, irr, pad;
    uint64_t redirtbl[KVS_IOAPIC_PINS];
};

enum { KVS_IRQCHIP_PIC_MASTER = 0, KVS_IRQCHIP_PIC_SLAVE = 1, KVS_IRQCHIP_IOAPIC = 2 };
struct kvs_irqchip {
    uint32_t chip_id, pad;
    union { char dummy[512]; struct kvs_pic_state pic; struct kvs_ioapic_state ioapic; } chip;
};

struct kvs_pit_channel_state {
    uint32_t count; /* can be 65536 */
    uint16_t latched_count;
    uint8_t count_latched, status_latched, status, read_state, write_state, write_latch, rw_mode,
        mode, bcd, gate;
    int64_t count_load_time; /* VM clock, ns */
};
struct kvs_pit_state2 { struct kvs_pit_channel_state channels[3]; uint32_t flags, reserved[9]; };
#define KVS_PIT_FLAGS_HPET_LEGACY 1u

enum { KVS_IRQ_ROUTING_IRQCHIP = 1, KVS_IRQ_ROUTING_MSI = 2 };
struct kvs_irq_routing_entry {
    uint32_t gsi, type, flags, pad;
    union {
        struct { uint32_t irqchip, pin; } irqchip;
        struct { uint32_t address_lo, address_hi, data, devid; } msi;
        uint32_t pad[8];
    } u;
};

struct kvs_msi { uint32_t address_lo, address_hi, data, flags, devid; uint8_t pad[12]; };

struct kvs_clock_data { uint64_t clock; uint32_t flags, pad0; uint64_t realtime, host_tsc; uint32_t pad[4]; };

/* ---- memory ------------------------------------------------------------------------------ */
#define KVS_MEM_LOG_DIRTY_PAGES 1u
#define KVS_MEM_READONLY 2u
struct kvs_userspace_memory_region {
    uint32_t slot; /* bits 0-15 slot id, bits 16-31 address-space id (0 normal, 1 SMM) */
    uint32_t flags;
    uint64_t guest_phys_addr; /* page aligned */
    uint64_t memory_size;     /* page aligned; 0 deletes the slot */
    uint64_t userspace_addr;  /* caller-owned memory; ignored when a kvs_ram is given */
};

/* ---- functions: library ------------------------------------------------------------------ */
KVS_API int32_t kvs_abi_version(void);                /* any */
KVS_API int32_t kvs_abi_size(uint32_t struct_id);     /* any; ids are the order of abi.def */
KVS_API int32_t kvs_abi_offset(uint32_t field_id);    /* any; ids are the order of abi.def */
KVS_API const char *kvs_strerror(int32_t result);     /* any; static text */

/* What CPUID this core can offer. *count: in capacity, out used (or needed with -KVS_ERANGE). any */
KVS_API int32_t kvs_get_supported_cpuid(struct kvs_cpuid_entry2 *entries, uint32_t *count);
/* MSRs that make up a vCPU's state. any */
KVS_API int32_t kvs_get_msr_index_list(uint32_t *indices, uint32_t *count);
/*
 * Disassembles one instruction in Intel syntax. bits: 16, 32 or 64. Returns its length,
 * or 0 for bytes that are no instruction (text is then "(bad)"). any
 */
KVS_API int32_t kvs_disassemble(const uint8_t *bytes, uint32_t count, uint32_t bits, uint64_t rip,
                                char *text, uint32_t text_size);

/* ---- functions: VM -------------------------------------------------------------------------- */
enum { KVS_CLOCK_REAL = 0, KVS_CLOCK_VIRTUAL = 1 };
struct kvs_vm_config {
    uint32_t size;       /* of this structure, for growth */
    uint32_t clock_mode; /* KVS_CLOCK_... */
    uint32_t tsc_khz;    /* guest TSC rate; 0: the host's in real mode, 1,000,000 in virtual mode */
    uint32_t flags;      /* KVS_VM_... */
    uint32_t engine;     /* KVS_ENGINE_... */
    uint32_t jit_threshold; /* executions of a block before it is translated; 0: the default */
};
enum {
    KVS_ENGINE_AUTO = 0,        /* KVS_ENGINE_JIT where the host lets it, else the interpreter */
    KVS_ENGINE_INTERPRETER = 1,
    KVS_ENGINE_JIT = 2,         /* hot code as host code; -KVS_ENOTSUP from kvs_vcpu_create without executable memory */
};
/* System management mode: without it SMIs of the guest go nowhere, and there is one address space. */
#define KVS_VM_SMM 1u
KVS_API int32_t kvs_vm_create(const struct kvs_vm_config *config, struct kvs_vm **vm); /* any */
KVS_API void kvs_vm_destroy(struct kvs_vm *vm); /* any; freed when its last vCPU is destroyed too */

/*
 * Guest RAM, reference counted; slots and host views hold references. Two VMs may share it as data: of code that one of
 * them runs from there, the other's stores drop nothing. any
 */
KVS_API int32_t kvs_ram_create(uint64_t size, struct kvs_ram **ram);
KVS_API void kvs_ram_acquire(struct kvs_ram *ram);
KVS_API void kvs_ram_release(struct kvs_ram *ram);
KVS_API void *kvs_ram_address(struct kvs_ram *ram);

/* Creates, moves, re-flags or (size 0) deletes a slot. ram may be NULL (caller-owned memory). any */
KVS_API int32_t kvs_memslot_set(struct kvs_vm *vm, const struct kvs_userspace_memory_region *region,
                                struct kvs_ram *ram, uint64_t ram_offset);
/*
 * With KVS_VM_SMM there are two address spaces; a vCPU uses the second in system management mode. While that has
 * no slot, it uses the first. The kvs_mem_ functions below are those of the first, which devices use.
 */
enum { KVS_SPACE_NORMAL = 0, KVS_SPACE_SMM = 1, KVS_SPACE_COUNT = 2 };
KVS_API int32_t kvs_space_read(struct kvs_vm *vm, uint32_t space, uint64_t gpa, void *data, uint64_t length); /* any */
KVS_API int32_t kvs_space_write(struct kvs_vm *vm, uint32_t space, uint64_t gpa, const void *data, uint64_t length); /* any */
KVS_API int32_t kvs_space_written(struct kvs_vm *vm, uint32_t space, uint64_t gpa, uint64_t length); /* any */
/* Host address of [gpa, gpa + length) if one slot backs it all, for reading. any */
KVS_API int32_t kvs_mem_host_address(struct kvs_vm *vm, uint64_t gpa, uint64_t length, void **address);
/* Host access that keeps dirty log and decoded code right. -KVS_EFAULT writes nothing. any */
KVS_API int32_t kvs_mem_read(struct kvs_vm *vm, uint64_t gpa, void *data, uint64_t length);
KVS_API int32_t kvs_mem_write(struct kvs_vm *vm, uint64_t gpa, const void *data, uint64_t length);
/* The host has written [gpa, gpa + length) through an address: mark dirty, drop decoded code. any */
KVS_API int32_t kvs_mem_written(struct kvs_vm *vm, uint64_t gpa, uint64_t length);
/* One bit per page, bit set = written since the last call; reading clears. any */
KVS_API int32_t kvs_get_dirty_log(struct kvs_vm *vm, uint32_t slot, uint64_t *bitmap, uint64_t words);

/*
 * Address line 20 of the processors: enabled 0 makes bit 20 of every physical address that a vCPU puts out zero
 * (not in system management mode). It is enabled in a new VM; INIT and kvs_vcpu_reset leave it alone. any
 */
KVS_API int32_t kvs_vm_set_a20(struct kvs_vm *vm, uint32_t enabled);
KVS_API int32_t kvs_vm_get_a20(struct kvs_vm *vm, uint32_t *enabled); /* any */

/* ---- functions: interrupts, clock, doorbells ------------------------------------------------ */
KVS_API int32_t kvs_irqchip_create(struct kvs_vm *vm);  /* setup: PIC pair, IOAPIC, LAPICs */
KVS_API int32_t kvs_pit_create(struct kvs_vm *vm);      /* setup: PIT and port 0x61 */
KVS_API int32_t kvs_get_irqchip(struct kvs_vm *vm, struct kvs_irqchip *chip); /* any */
KVS_API int32_t kvs_set_irqchip(struct kvs_vm *vm, const struct kvs_irqchip *chip); /* any */
KVS_API int32_t kvs_get_pit2(struct kvs_vm *vm, struct kvs_pit_state2 *pit); /* any */
KVS_API int32_t kvs_set_pit2(struct kvs_vm *vm, const struct kvs_pit_state2 *pit); /* any */
KVS_API int32_t kvs_irq_line(struct kvs_vm *vm, uint32_t gsi, uint32_t level); /* any */
KVS_API int32_t kvs_signal_msi(struct kvs_vm *vm, const struct kvs_msi *msi); /* any */
KVS_API int32_t kvs_set_gsi_routing(struct kvs_vm *vm, const struct kvs_irq_routing_entry *entries,
                                    uint32_t count); /* any */
KVS_API int32_t kvs_get_clock(struct kvs_vm *vm, struct kvs_clock_data *clock); /* any */
KVS_API int32_t kvs_set_clock(struct kvs_vm *vm, const struct kvs_clock_data *clock); /* any */
/* VM clock in ns: the one clock that every timer takes its time from. any */
KVS_API uint64_t kvs_clock_now(struct kvs_vm *vm);
/* Stops (1) or starts (0) the VM clock; stopped, no guest timer fires. any */
KVS_API int32_t kvs_clock_pause(struct kvs_vm *vm, uint32_t paused);
/* One vCPU exits with KVS_EXIT_HOST_TIMER when the VM clock reaches deadline; ~0 disarms. any */
KVS_API int32_t kvs_host_timer_arm(struct kvs_vm *vm, uint64_t deadline);

/* KVM's ioeventfd: a guest write that matches signals and does not exit (virtual clock: it exits). */
#define KVS_DOORBELL_DATAMATCH 1u
#define KVS_DOORBELL_PIO 2u
#define KVS_DOORBELL_DETACHED 4u /* no guest write rings it until kvs_doorbell_move attaches it */
KVS_API int32_t kvs_doorbell_create(struct kvs_vm *vm, uint64_t address, uint32_t length,
                                    uint64_t datamatch, uint32_t flags, struct kvs_doorbell **doorbell); /* any */
/* Waits for a signal. 1 = signalled, 0 = time-out (-1: none), -KVS_ESTATE = closed. any */
KVS_API int32_t kvs_doorbell_wait(struct kvs_doorbell *doorbell, int32_t timeout_ms);
/* Rings it from the host. any */
KVS_API int32_t kvs_doorbell_ring(struct kvs_doorbell *doorbell);
/* Takes the doorbell to another address; attached 0: no guest write rings it. -KVS_EEXIST, -KVS_EINVAL:
 * it stays where it was. any */
KVS_API int32_t kvs_doorbell_move(struct kvs_doorbell *doorbell, uint64_t address, uint32_t attached);
KVS_API void kvs_doorbell_close(struct kvs_doorbell *doorbell);   /* any; wakes waiters */
KVS_API void kvs_doorbell_destroy(struct kvs_doorbell *doorbell); /* any; after the last wait returned */

/*
 * Quiesces: returns when no vCPU is inside guest code. They stay outside until kvs_vm_resume;
 * kvs_vcpu_run calls block there meanwhile (and still obey kick and immediate_exit, but for one in the middle of
 * an instruction that stops the other vCPUs itself: it obeys after kvs_vm_resume). any
 */
KVS_API int32_t kvs_vm_quiesce(struct kvs_vm *vm);
KVS_API int32_t kvs_vm_resume(struct kvs_vm *vm);

/* ---- functions: vCPU ------------------------------------------------------------------------ */
/* ids are APIC ids and start at 0 without a gap; vCPU 0 is the BSP. any */
KVS_API int32_t kvs_vcpu_create(struct kvs_vm *vm, uint32_t id, struct kvs_vcpu **vcpu);
KVS_API int32_t kvs_vcpu_destroy(struct kvs_vcpu *vcpu); /* any; -KVS_EBUSY while it runs */
KVS_API struct kvs_run *kvs_vcpu_run_block(struct kvs_vcpu *vcpu); /* any; lives as long as the vCPU */
/*
 * Runs until an exit; the reason is in the run block. 0, or -KVS_EBUSY when another thread is in.
 * A kick or immediate_exit gives KVS_EXIT_INTR, after finishing a started I/O instruction. owner
 */
KVS_API int32_t kvs_vcpu_run(struct kvs_vcpu *vcpu);
/* Makes the current or the next kvs_vcpu_run return KVS_EXIT_INTR soon. Never lost. any */
KVS_API void kvs_vcpu_kick(struct kvs_vcpu *vcpu);
/* Power-on reset. owner */
KVS_API int32_t kvs_vcpu_reset(struct kvs_vcpu *vcpu);
/* Exit with KVS_EXIT_INSN_LIMIT when `retired` instructions have retired (~0: never). owner */
KVS_API int32_t kvs_vcpu_set_insn_limit(struct kvs_vcpu *vcpu, uint64_t retired);

/* All owner. Setters check: -KVS_EINVAL (or -KVS_ESTATE) leaves the vCPU as it was. */
KVS_API int32_t kvs_vcpu_get_regs(struct kvs_vcpu *vcpu, struct kvs_regs *regs);
KVS_API int32_t kvs_vcpu_set_regs(struct kvs_vcpu *vcpu, const struct kvs_regs *regs);
KVS_API int32_t kvs_vcpu_get_sregs(struct kvs_vcpu *vcpu, struct kvs_sregs *sregs);
KVS_API int32_t kvs_vcpu_set_sregs(struct kvs_vcpu *vcpu, const struct kvs_sregs *sregs);
KVS_API int32_t kvs_vcpu_get_fpu(struct kvs_vcpu *vcpu, struct kvs_fpu *fpu);
KVS_API int32_t kvs_vcpu_set_fpu(struct kvs_vcpu *vcpu, const struct kvs_fpu *fpu);
KVS_API int32_t kvs_vcpu_get_xsave(struct kvs_vcpu *vcpu, struct kvs_xsave *xsave);
KVS_API int32_t kvs_vcpu_set_xsave(struct kvs_vcpu *vcpu, const struct kvs_xsave *xsave);
KVS_API int32_t kvs_vcpu_get_xcrs(struct kvs_vcpu *vcpu, struct kvs_xcrs *xcrs);
KVS_API int32_t kvs_vcpu_set_xcrs(struct kvs_vcpu *vcpu, const struct kvs_xcrs *xcrs);
/* Return the number of entries done; stop at the first MSR that is not there. */
KVS_API int32_t kvs_vcpu_get_msrs(struct kvs_vcpu *vcpu, struct kvs_msr_entry *entries, uint32_t count);
KVS_API int32_t kvs_vcpu_set_msrs(struct kvs_vcpu *vcpu, const struct kvs_msr_entry *entries, uint32_t count);
KVS_API int32_t kvs_vcpu_get_cpuid2(struct kvs_vcpu *vcpu, struct kvs_cpuid_entry2 *entries, uint32_t *count);
KVS_API int32_t kvs_vcpu_set_cpuid2(struct kvs_vcpu *vcpu, const struct kvs_cpuid_entry2 *entries, uint32_t count);
KVS_API int32_t kvs_vcpu_get_events(struct kvs_vcpu *vcpu, struct kvs_vcpu_events *events);
KVS_API int32_t kvs_vcpu_set_events(struct kvs_vcpu *vcpu, const struct kvs_vcpu_events *events);
KVS_API int32_t kvs_vcpu_get_lapic(struct kvs_vcpu *vcpu, struct kvs_lapic_state *lapic);
KVS_API int32_t kvs_vcpu_set_lapic(struct kvs_vcpu *vcpu, const struct kvs_lapic_state *lapic);
KVS_API int32_t kvs_vcpu_get_mp_state(struct kvs_vcpu *vcpu, struct kvs_mp_state *state);
KVS_API int32_t kvs_vcpu_set_mp_state(struct kvs_vcpu *vcpu, const struct kvs_mp_state *state);
KVS_API int32_t kvs_vcpu_get_debugregs(struct kvs_vcpu *vcpu, struct kvs_debugregs *regs);
KVS_API int32_t kvs_vcpu_set_debugregs(struct kvs_vcpu *vcpu, const struct kvs_debugregs *regs);
KVS_API int32_t kvs_vcpu_get_core_state(struct kvs_vcpu *vcpu, struct kvs_core_state *state);
KVS_API int32_t kvs_vcpu_set_core_state(struct kvs_vcpu *vcpu, const struct kvs_core_state *state);
KVS_API int32_t kvs_vcpu_set_guest_debug(struct kvs_vcpu *vcpu, const struct kvs_guest_debug *debug);
KVS_API int32_t kvs_vcpu_translate(struct kvs_vcpu *vcpu, struct kvs_translation *translation);

/*
 * A machine check (KVM_X86_SET_MCE): stored in its bank; an uncorrected one raises #MC, or shuts the vCPU
 * down when CR4.MCE is clear or one is being handled. status must have VAL (bit 63). owner
 */
KVS_API int32_t kvs_vcpu_set_mce(struct kvs_vcpu *vcpu, const struct kvs_x86_mce *mce);
/* Injects an external interrupt without an in-core irqchip (KVM_INTERRUPT). owner */
KVS_API int32_t kvs_vcpu_interrupt(struct kvs_vcpu *vcpu, uint32_t vector);
KVS_API int32_t kvs_vcpu_nmi(struct kvs_vcpu *vcpu); /* any */
/* A system management interrupt (KVM_SMI). -KVS_ENOTSUP without KVS_VM_SMM. any */
KVS_API int32_t kvs_vcpu_smi(struct kvs_vcpu *vcpu);

/* Counters since creation, for metrics. any (values may be a moment old while it runs) */
struct kvs_vcpu_stats {
    uint64_t retired, exits, exits_io, exits_mmio, halts, interrupts, exceptions;
    uint64_t blocks_decoded, blocks_invalidated, cache_flushes, tlb_fills, tlb_flushes;
    uint64_t reserved[4];
};
KVS_API int32_t kvs_vcpu_get_stats(struct kvs_vcpu *vcpu, struct kvs_vcpu_stats *stats);

/*
 * Instruction trace, for debugging guests and the core itself: every executed instruction goes
 * to a ring of the vCPU (slow: one instruction at a time). entries = 0 turns it off. owner
 */
struct kvs_trace_entry {
    uint64_t retired, rip, linear;
    uint64_t gpr[16];
    uint64_t rflags;
    uint8_t bytes[15];
    uint8_t length; /* bytes that could be fetched */
    uint32_t mode;  /* 16, 32 or 64 */
    uint32_t cpl;
};
KVS_API int32_t kvs_vcpu_set_trace(struct kvs_vcpu *vcpu, uint32_t entries);
/* Takes up to count oldest entries out of the ring; returns how many. owner */
KVS_API int32_t kvs_vcpu_read_trace(struct kvs_vcpu *vcpu, struct kvs_trace_entry *entries, uint32_t count);

#ifdef __cplusplus
}
#endif
#endif
