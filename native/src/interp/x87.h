/* x87 state as the rest of the core sees it: tag words, reset, pending exceptions, environment images. */
#ifndef KVS_X87_H
#define KVS_X87_H

#include "../vcpu.h"

#define FSW_FLAGS 0x3fu /* IE DE ZE OE UE PE: the same bits as the masks of FCW */
#define FSW_IE 0x1u
#define FSW_OE 0x8u
#define FSW_UE 0x10u
#define FSW_SF 0x40u
#define FSW_ES 0x80u
#define FSW_C0 0x100u
#define FSW_C1 0x200u
#define FSW_C2 0x400u
#define FSW_C3 0x4000u
#define FSW_TOP 0x3800u
#define FSW_B 0x8000u
#define FCW_INIT 0x37fu

/* An unmasked exception waits for the next waiting instruction. SDM 1 "x87 FPU Exception Handling" */
static ALWAYS_INLINE bool x87_pending(const struct fpu *f)
{
    return f->fsw & ~(uint32_t)f->fcw & FSW_FLAGS;
}
/*
 * ES and B are a function of flags and masks; silicon computes them anew whenever either is loaded.
 * To be called after fcw and fsw came from elsewhere (FXRSTOR, XRSTOR, the host).
 */
static inline void x87_update_es(struct fpu *f)
{
    f->fcw = (uint16_t)((f->fcw & 0x1f3fu) | 0x40u);
    f->fsw = (uint16_t)((f->fsw & ~(FSW_ES | FSW_B)) | (x87_pending(f) ? FSW_ES | FSW_B : 0));
}

/* The 16-bit tag word of FSTENV: 0 valid, 1 zero, 2 special, 3 empty for R0 in bits 0-1 and so on. */
uint16_t x87_full_tags(const struct fpu *f);
/* Only "empty or not" is taken from a loaded tag word. */
void x87_set_full_tags(struct fpu *f, uint16_t tags);
/* FNINIT: the data registers keep their bytes. SDM 2A "FINIT/FNINIT-Initialize Floating-Point Unit" */
void x87_init(struct fpu *f);
/*
 * Handlers may leave exception flags, all masked and with an empty stack, in the host's x87 status
 * word. Called before the thread goes back to managed code.
 */
void x87_host_clean(void);

/* Environment of FSTENV and FLDENV. osize 2: 14 bytes, else 28; real: the layout of real and virtual-8086 mode. */
uint32_t x87_env_store(const struct fpu *f, uint32_t osize, bool real, uint8_t *p);
void x87_env_load(struct fpu *f, uint32_t osize, bool real, const uint8_t *p);

#endif
