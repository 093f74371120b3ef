/* Faults and traps: vector, error code, saved RIP and RFLAGS, and CR2. */
#include "guest.inc"

        .bss
        .balign 8
seen:   .skip   8                       /* vector of the last exception */
code:   .skip   8                       /* its error code, or -1 */
where:  .skip   8                       /* the RIP it saved */
flags:  .skip   8
resume: .skip   8                       /* where to go on */
        .text

        .macro  WITHOUT_CODE name, vector
\name:  push    -1
        push    \vector
        jmp     common
        .endm
        .macro  WITH_CODE name, vector
\name:  push    \vector
        jmp     common
        .endm
        WITHOUT_CODE on_de, 0
        WITHOUT_CODE on_db, 1
        WITHOUT_CODE on_bp, 3
        WITHOUT_CODE on_ud, 6
        WITHOUT_CODE on_nm, 7
        WITH_CODE on_df, 8
        WITH_CODE on_np, 11
        WITH_CODE on_ss, 12
        WITH_CODE on_gp, 13
        WITH_CODE on_pf, 14
        WITHOUT_CODE on_mf, 16
        WITHOUT_CODE on_xm, 19
        WITHOUT_CODE on_user, 0x80
common: pop     qword ptr [rip + seen]
        pop     qword ptr [rip + code]
        push    rax
        mov     rax, [rsp + 8]
        mov     [rip + where], rax
        mov     rax, [rsp + 24]
        mov     [rip + flags], rax
        cmp     qword ptr [rip + resume], 0
        je      1f
        mov     rax, [rip + resume]
        mov     [rsp + 8], rax
        mov     qword ptr [rip + resume], 0
        and     qword ptr [rsp + 24], ~0x100    /* TF */
1:      pop     rax
        iretq

        /* Runs one instruction that must fault; clobbers r11. */
        .macro  FAULTS name, vector, error, instruction:vararg
        lea     r11, [rip + 8811f]
        mov     [rip + resume], r11
        mov     qword ptr [rip + seen], -2
8810:   \instruction
8811:   cmp     qword ptr [rip + seen], \vector
        CHECK   e, "\name: vector"
        cmp     qword ptr [rip + code], \error
        CHECK   e, "\name: error code"
        lea     r11, [rip + 8810b]
        cmp     [rip + where], r11
        CHECK   e, "\name: saved RIP"
        .endm

main:   GATE    0, on_de
        GATE    1, on_db
        GATE    3, on_bp, 0, 3
        GATE    6, on_ud
        GATE    7, on_nm
        GATE    8, on_df, 1
        GATE    11, on_np
        GATE    12, on_ss
        GATE    13, on_gp
        GATE    14, on_pf
        GATE    16, on_mf
        GATE    19, on_xm
        GATE    0x80, on_user, 0, 3

        xor     ebx, ebx
        mov     edx, 1
        xor     eax, eax
        FAULTS  "divide by zero", 0, -1, div ebx
        mov     edx, 5
        mov     ecx, 5
        FAULTS  "quotient too large", 0, -1, div ecx
        mov     eax, 0x80000000
        cdq
        mov     ecx, -1
        FAULTS  "most negative by minus one", 0, -1, idiv ecx
        FAULTS  "ud2", 6, -1, ud2
        FAULTS  "lock on a register form", 6, -1, .byte 0xf0, 0x01, 0xd8
        FAULTS  "push es in 64-bit mode", 6, -1, .byte 0x06
        mov     rbx, 0x0000800000000000
        FAULTS  "non-canonical address", 13, 0, mov rcx, [rbx]
        mov     rbp, rbx
        FAULTS  "non-canonical stack address", 12, 0, mov rcx, [rbp]
        mov     ecx, 0x100
        FAULTS  "selector beyond the table", 13, 0x100, mov ds, ecx
        mov     ecx, 0x3fffffff
        FAULTS  "reserved MSR", 13, 0, rdmsr
        mov     rax, cr0
        mov     rdx, rax
        btr     rdx, 0
        FAULTS  "PG without PE", 13, 0, mov cr0, rdx
        mov     rdx, cr4
        btr     rdx, 5
        FAULTS  "clearing PAE in long mode", 13, 0, mov cr4, rdx
        mov     rbx, 0x00007ffffffff000
        FAULTS  "read of an unmapped page", 14, 0, mov rcx, [rbx]
        mov     rcx, cr2
        cmp     rcx, rbx
        CHECK   e, "CR2 of a read"
        FAULTS  "write to an unmapped page", 14, 2, mov [rbx + 8], rcx
        mov     rcx, cr2
        add     rbx, 8
        cmp     rcx, rbx
        CHECK   e, "CR2 of a write"

        mov     rax, cr0
        or      eax, 8
        mov     cr0, rax
        FAULTS  "x87 with TS", 7, -1, fnop
        FAULTS  "SSE with TS", 7, -1, addps xmm0, xmm0
        clts

        SAY     "faults ok"

        mov     qword ptr [rip + resume], 0
        mov     qword ptr [rip + seen], -2
        int3
1:      cmp     qword ptr [rip + seen], 3
        CHECK   e, "int3: vector"
        lea     rax, [rip + 1b]
        cmp     [rip + where], rax
        CHECK   e, "int3: saved RIP is behind the instruction"
        int     0x80
2:      cmp     qword ptr [rip + seen], 0x80
        CHECK   e, "int n: vector"
        lea     rax, [rip + 2b]
        cmp     [rip + where], rax
        CHECK   e, "int n: saved RIP is behind the instruction"

        lea     rax, [rip + 4f]                 /* single step */
        mov     [rip + resume], rax
        mov     qword ptr [rip + seen], -2
        pushfq
        or      qword ptr [rsp], 0x100
        popfq
        nop
3:      nop
4:      cmp     qword ptr [rip + seen], 1
        CHECK   e, "single step: vector"
        lea     rax, [rip + 3b]
        cmp     [rip + where], rax
        CHECK   e, "single step: one instruction behind POPF"
        mov     rax, dr6
        bt      eax, 14
        CHECK   c, "single step: DR6.BS"

        lea     rax, [rip + 5f]                 /* a fault while a fault is delivered */
        mov     [rip + resume], rax
        lea     rdi, [rip + idt]
        mov     word ptr [rdi + 13 * 16 + 4], 0 /* #GP gate not present */
        mov     qword ptr [rip + seen], -2
        mov     rbx, 0x0000800000000000
        mov     rcx, [rbx]
5:      cmp     qword ptr [rip + seen], 8
        CHECK   e, "contributory fault during #GP: vector 8"
        cmp     qword ptr [rip + code], 0
        CHECK   e, "double fault: error code 0"
        SAY     "traps ok"
        PASS
        ret
