/*
 * Entry of the compute guest: long mode with 4-level tables of 4 KiB pages for the first 512 MiB,
 * so that every page costs a walk, as under an operating system.
 */
        .intel_syntax noprefix
        .set PAGES, 512 * 256

        .section .text.start, "ax"
        .globl _start
_start:
        cli
        cld
        lea     rsp, [rip + stack_top]
        lea     rdi, [rip + page_tables]
        mov     rax, 3
        mov     ecx, PAGES
1:      mov     [rdi], rax
        add     rax, 4096
        add     rdi, 8
        dec     ecx
        jnz     1b
        lea     rdi, [rip + directory]
        lea     rax, [rip + page_tables]
        add     rax, 3
        mov     ecx, PAGES / 512
2:      mov     [rdi], rax
        add     rax, 4096
        add     rdi, 8
        dec     ecx
        jnz     2b
        lea     rax, [rip + directory]
        add     rax, 3
        mov     [rip + pointers], rax
        lea     rax, [rip + pointers]
        add     rax, 3
        mov     [rip + page_map], rax
        lea     rax, [rip + page_map]
        mov     cr3, rax
        mov     rax, cr0
        and     eax, ~0x0c              /* no emulation, no task-switched */
        or      eax, 2
        mov     cr0, rax
        mov     rax, cr4
        or      eax, 0x600              /* SSE */
        mov     cr4, rax
        call    guest_main
3:      hlt
        jmp     3b

        .bss
        .balign 4096
page_map:    .skip 4096
pointers:    .skip 4096
directory:   .skip 4096
page_tables: .skip PAGES * 8
stack:       .skip 65536
stack_top:
