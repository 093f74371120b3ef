/* Entry of the boot processor in long mode, the way of the others from real mode, and the interrupt of shootdowns. */
        .intel_syntax noprefix
        .set CS64, 0x08
        .set DS64, 0x10
        .set TRAMPOLINE, 0x10000

        .text
        .code64
        .globl  _start, trampoline_start, trampoline_end, shootdown_entry, fault_entry
_start:
        cli
        cld
        mov     al, 0xff                        /* no line of the PICs */
        out     0x21, al
        out     0xa1, al
        mov     edi, esi                        /* the zero page */
        lea     rsp, [rip + stacks + 16384]
        lgdt    [rip + gdt_pointer]
        push    CS64
        lea     rax, [rip + 1f]
        push    rax
        lretq
1:      mov     eax, DS64
        mov     ds, eax
        mov     es, eax
        mov     ss, eax
        lidt    [rip + idt_pointer]
        call    boot_main
2:      hlt
        jmp     2b

/* Copied to TRAMPOLINE; CS is TRAMPOLINE >> 4. SDM 3A "MP Initialization" */
        .code16
trampoline_start:
        cli
        mov     ax, cs
        mov     ds, ax
        data32 lgdt [trampoline_gdt_pointer - trampoline_start]
        mov     eax, 0x20                       /* PAE */
        mov     cr4, eax
        mov     eax, [trampoline_cr3 - trampoline_start]
        mov     cr3, eax
        mov     ecx, 0xc0000080
        rdmsr
        or      eax, 0x100
        wrmsr
        mov     eax, 0x80000011
        mov     cr0, eax
        ljmpd   CS64, offset ap_entry
        .balign 8
        .globl  trampoline_cr3
trampoline_cr3:
        .long   0
trampoline_gdt_pointer:
        .word   23
        .long   gdt
trampoline_end:

        .code64
ap_entry:
        mov     eax, DS64
        mov     ds, eax
        mov     es, eax
        mov     ss, eax
        mov     edi, 1
        lock xadd [rip + next_cpu], edi
        mov     eax, edi
        shl     eax, 14
        lea     rsp, [rip + stacks + 16384]
        add     rsp, rax
        lgdt    [rip + gdt_pointer]
        lidt    [rip + idt_pointer]
        call    ap_main
3:      hlt
        jmp     3b

shootdown_entry:
        push    rax
        push    rcx
        push    rdx
        push    rsi
        push    rdi
        push    r8
        push    r9
        push    r10
        push    r11
        call    shootdown_interrupt
        pop     r11
        pop     r10
        pop     r9
        pop     r8
        pop     rdi
        pop     rsi
        pop     rdx
        pop     rcx
        pop     rax
        iretq

fault_entry:
        mov     rdi, [rsp]
        mov     rsi, [rsp + 8]
        mov     rdx, cr2
        call    fault

        .data
        .balign 16
gdt:    .quad   0
        .quad   0x00af9b000000ffff
        .quad   0x00cf93000000ffff
gdt_pointer:
        .word   23
        .quad   gdt
idt_pointer:
        .word   4095
        .quad   idt
        .globl  next_cpu
next_cpu:
        .long   1

        .bss
        .balign 4096
        .globl  idt
idt:    .skip   4096
stacks: .skip   16 * 16384
