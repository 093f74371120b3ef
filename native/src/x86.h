/* Architectural constants: names are the manuals'. */
#ifndef KVS_X86_H
#define KVS_X86_H

#include "util.h"

enum { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15 };
enum { SEG_ES, SEG_CS, SEG_SS, SEG_DS, SEG_FS, SEG_GS, SEG_COUNT };

/* Vectors. SDM 3A "Exception and Interrupt Reference" */
enum { EXC_DE, EXC_DB, EXC_NMI, EXC_BP, EXC_OF, EXC_BR, EXC_UD, EXC_NM, EXC_DF, EXC_CSO, EXC_TS,
       EXC_NP, EXC_SS, EXC_GP, EXC_PF, EXC_MF = 16, EXC_AC, EXC_MC, EXC_XM };

#define FLAG_CF 0x1u
#define FLAG_PF 0x4u
#define FLAG_AF 0x10u
#define FLAG_ZF 0x40u
#define FLAG_SF 0x80u
#define FLAG_TF 0x100u
#define FLAG_IF 0x200u
#define FLAG_DF 0x400u
#define FLAG_OF 0x800u
#define FLAG_IOPL 0x3000u
#define FLAG_NT 0x4000u
#define FLAG_RF 0x10000u
#define FLAG_VM 0x20000u
#define FLAG_AC 0x40000u
#define FLAG_VIF 0x80000u
#define FLAG_VIP 0x100000u
#define FLAG_ID 0x200000u
/* Every flag that there is, and bit 1. */
#define FLAGS_ALL 0x3f7fd7u
#define FLAGS_STATUS (FLAG_CF | FLAG_PF | FLAG_AF | FLAG_ZF | FLAG_SF | FLAG_OF)

#define CR0_PE 0x1u
#define CR0_MP 0x2u
#define CR0_EM 0x4u
#define CR0_TS 0x8u
#define CR0_ET 0x10u
#define CR0_NE 0x20u
#define CR0_WP 0x10000u
#define CR0_AM 0x40000u
#define CR0_NW 0x20000000u
#define CR0_CD 0x40000000u
#define CR0_PG 0x80000000u

#define CR4_VME 0x1u
#define CR4_PVI 0x2u
#define CR4_TSD 0x4u
#define CR4_DE 0x8u
#define CR4_PSE 0x10u
#define CR4_PAE 0x20u
#define CR4_MCE 0x40u
#define CR4_PGE 0x80u
#define CR4_PCE 0x100u
#define CR4_OSFXSR 0x200u
#define CR4_OSXMMEXCPT 0x400u
#define CR4_UMIP 0x800u
#define CR4_LA57 0x1000u
#define CR4_FSGSBASE 0x10000u
#define CR4_PCIDE 0x20000u
#define CR4_OSXSAVE 0x40000u
#define CR4_SMEP 0x100000u
#define CR4_SMAP 0x200000u
#define CR4_PKE 0x400000u
#define CR4_PKS 0x1000000u
#define CR4_LAM_SUP 0x10000000u

#define CR3_LAM_U57 BIT(61)
#define CR3_LAM_U48 BIT(62)

#define EFER_SCE 0x1u
#define EFER_LME 0x100u
#define EFER_LMA 0x400u
#define EFER_NX 0x800u
#define EFER_AUTOIBRS 0x200000u

/* Page-fault error code. SDM 3A "Page-Fault Exceptions" */
#define PF_P 0x1u
#define PF_W 0x2u
#define PF_U 0x4u
#define PF_RSVD 0x8u
#define PF_I 0x10u
#define PF_PK 0x20u

/* Segment attributes: descriptor bits 40-55 shifted to 0, plus our "unusable" (null) bit. */
#define ATTR_TYPE 0xfu
#define ATTR_A 0x1u        /* accessed */
#define ATTR_W 0x2u        /* data: writable; code: readable */
#define ATTR_EC 0x4u       /* data: expand-down; code: conforming */
#define ATTR_CODE 0x8u
#define ATTR_S 0x10u       /* code or data (not system) */
#define ATTR_DPL_SHIFT 5
#define ATTR_DPL 0x60u
#define ATTR_P 0x80u
#define ATTR_AVL 0x1000u
#define ATTR_L 0x2000u
#define ATTR_DB 0x4000u
#define ATTR_G 0x8000u
#define ATTR_NULL 0x10000u

/* The widest guest physical address; CPUID 0x80000008 and reserved PTE bits follow it. */
#define MAXPHYADDR 46
#define PHYS_MASK (BIT(MAXPHYADDR) - 1)

/* bits: linear address bits that count. SDM 1 "Canonical Addressing" */
static inline uint64_t sign_extend(uint64_t la, uint32_t bits) { return (uint64_t)((int64_t)(la << (64 - bits)) >> (64 - bits)); }

#endif
