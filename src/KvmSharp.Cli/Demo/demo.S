/*
 * The guest that `kvmsharp run` boots when no kernel is named. It is entered in long mode, builds
 * its own page tables, descriptor tables and interrupt handlers, talks to COM1, takes a page
 * fault, counts PIT and local APIC timer interrupts, and powers off through ACPI.
 */
        .intel_syntax noprefix

        .set COM1,        0x3f8
        .set PIC1,        0x20
        .set PIC2,        0xa0
        .set PIT_CH0,     0x40
        .set PIT_CMD,     0x43
        .set PIT_HZ,      1193182
        .set TICK_HZ,     100
        .set APIC,        0xfee00000
        .set VEC_PIT,     0x20
        .set VEC_APIC,    0x40
        .set CS64,        0x08
        .set DS64,        0x10
        .set HIGH,        0xffff800000000000
        .set HOLE,        0xffff800000005000

        .text
        .code64
        .globl _start
_start:
        cli
        cld
        lea     rsp, [rip + stack_top]
        lgdt    [rip + gdt_pointer]
        push    CS64
        lea     rax, [rip + 1f]
        push    rax
        lretq
1:      mov     eax, DS64
        mov     ds, eax
        mov     es, eax
        mov     ss, eax
        xor     eax, eax
        mov     fs, eax
        mov     gs, eax

        call    serial_init
        lea     rsi, [rip + text_banner]
        call    print
        call    show_processor
        call    build_page_tables
        call    build_idt
        call    show_paging
        call    start_timers
        call    show_timers
        call    power_off
        lea     rsi, [rip + text_no_acpi]
        call    print
2:      cli
        hlt
        jmp     2b

/* ---- COM1 -------------------------------------------------------------------------------- */
serial_init:
        mov     dx, COM1 + 3
        mov     al, 0x80                /* divisor latch */
        out     dx, al
        mov     dx, COM1
        mov     al, 1
        out     dx, al
        inc     dx
        xor     eax, eax
        out     dx, al
        mov     dx, COM1 + 3
        mov     al, 0x03                /* 8 bits, no parity, one stop bit */
        out     dx, al
        ret

put_char:                               /* al */
        push    rdx
        push    rax
        mov     dx, COM1 + 5
1:      in      al, dx
        test    al, 0x20
        jz      1b
        pop     rax
        mov     dx, COM1
        out     dx, al
        pop     rdx
        ret

print:                                  /* rsi: text, zero-terminated */
        lodsb
        test    al, al
        jz      1f
        call    put_char
        jmp     print
1:      ret

print_decimal:                          /* rax */
        push    rbx
        push    rcx
        push    rdx
        xor     ecx, ecx
        mov     ebx, 10
1:      xor     edx, edx
        div     rbx
        push    rdx
        inc     ecx
        test    rax, rax
        jnz     1b
2:      pop     rax
        add     al, '0'
        call    put_char
        loop    2b
        pop     rdx
        pop     rcx
        pop     rbx
        ret

print_hex:                              /* rax */
        push    rcx
        push    rdx
        mov     rdx, rax
        mov     al, '0'
        call    put_char
        mov     al, 'x'
        call    put_char
        mov     ecx, 16
1:      rol     rdx, 4
        dec     ecx
        jz      2f
        test    dl, 0x0f                /* leading zeros */
        jz      1b
2:      inc     ecx
3:      mov     eax, edx
        and     eax, 15
        lea     r8, [rip + hex_digits]
        mov     al, [r8 + rax]
        call    put_char
        rol     rdx, 4
        loop    3b
        pop     rdx
        pop     rcx
        ret

/* ---- who is the processor ------------------------------------------------------------------ */
show_processor:
        lea     rsi, [rip + text_processor]
        call    print
        xor     eax, eax
        cpuid
        lea     rdi, [rip + scratch]
        mov     [rdi], ebx
        mov     [rdi + 4], edx
        mov     [rdi + 8], ecx
        mov     byte ptr [rdi + 12], 0
        mov     rsi, rdi
        call    print
        mov     eax, 0x80000000
        cpuid
        cmp     eax, 0x80000004
        jb      2f
        mov     al, ','
        call    put_char
        mov     al, ' '
        call    put_char
        lea     rdi, [rip + scratch]
        mov     r9d, 0x80000002
1:      mov     eax, r9d
        cpuid
        mov     [rdi], eax
        mov     [rdi + 4], ebx
        mov     [rdi + 8], ecx
        mov     [rdi + 12], edx
        add     rdi, 16
        inc     r9d
        cmp     r9d, 0x80000004
        jbe     1b
        mov     byte ptr [rdi], 0
        lea     rsi, [rip + scratch]
        call    print
2:      jmp     print_newline

print_newline:
        lea     rsi, [rip + text_newline]
        jmp     print

/* ---- paging -------------------------------------------------------------------------------- */
build_page_tables:
        lea     rax, [rip + page_map]           /* PML4[0]: the first 4 GiB, identity */
        lea     rbx, [rip + low_pointers]
        lea     rcx, [rbx + 3]
        mov     [rax], rcx
        lea     rcx, [rip + high_pointers]      /* PML4[256]: the first address of the upper half */
        add     rcx, 3
        mov     [rax + 256 * 8], rcx

        lea     rdi, [rip + low_directories]
        lea     rcx, [rdi + 3]
        mov     edx, 4
1:      mov     [rbx], rcx
        add     rbx, 8
        add     rcx, 4096
        dec     edx
        jnz     1b
        mov     rcx, 0x83                       /* present, writable, 2 MiB */
        mov     edx, 4 * 512
2:      mov     [rdi], rcx
        add     rdi, 8
        add     rcx, 0x200000
        dec     edx
        jnz     2b

        lea     rbx, [rip + high_pointers]
        lea     rcx, [rip + high_directory]
        add     rcx, 3
        mov     [rbx], rcx
        lea     rbx, [rip + high_directory]
        lea     rcx, [rip + high_table]
        add     rcx, 3
        mov     [rbx], rcx
        lea     rbx, [rip + high_table]
        lea     rcx, [rip + shared_page]
        add     rcx, 3
        mov     [rbx], rcx

        mov     cr3, rax
        ret

show_paging:
        lea     rsi, [rip + text_paging]
        call    print
        mov     rax, cr3
        call    print_hex
        mov     rbx, HIGH                       /* written at one address, read at another */
        mov     rcx, 0x4b766d5368617270
        mov     [rbx + 8], rcx
        lea     rdx, [rip + shared_page]
        cmp     [rdx + 8], rcx
        jne     1f
        lea     rsi, [rip + text_alias_ok]
        call    print
1:      mov     rbx, HOLE                       /* not mapped until the fault handler maps it */
        mov     qword ptr [rbx], 42
        cmp     qword ptr [rbx], 42
        jne     2f
        cmp     qword ptr [rip + faults], 1
        jne     2f
        lea     rsi, [rip + text_fault]
        call    print
        mov     rax, [rip + fault_address]
        call    print_hex
        lea     rsi, [rip + text_mapped]
        call    print
2:      jmp     print_newline

/* ---- interrupts ---------------------------------------------------------------------------- */
        .macro  gate vector, handler
        lea     rax, [rip + \handler]
        mov     ecx, \vector
        call    set_gate
        .endm

set_gate:                               /* rax: handler, ecx: vector */
        lea     rdi, [rip + idt]
        shl     ecx, 4
        add     rdi, rcx
        mov     [rdi], ax
        mov     word ptr [rdi + 2], CS64
        mov     word ptr [rdi + 4], 0x8e00      /* present, interrupt gate */
        shr     rax, 16
        mov     [rdi + 6], ax
        shr     rax, 16
        mov     [rdi + 8], eax
        mov     dword ptr [rdi + 12], 0
        ret

build_idt:
        gate    13, on_unexpected
        gate    14, on_page_fault
        gate    VEC_PIT, on_pit
        gate    VEC_APIC, on_apic_timer
        lidt    [rip + idt_pointer]
        ret

on_page_fault:
        push    rax
        push    rbx
        mov     rax, cr2
        mov     [rip + fault_address], rax
        inc     qword ptr [rip + faults]
        mov     rbx, HOLE
        cmp     rax, rbx
        jne     on_unexpected
        lea     rbx, [rip + high_table]
        lea     rax, [rip + spare_page]
        add     rax, 3
        mov     [rbx + 5 * 8], rax
        pop     rbx
        pop     rax
        add     rsp, 8                          /* the error code */
        iretq

on_unexpected:
        lea     rsi, [rip + text_unexpected]
        call    print
1:      cli
        hlt
        jmp     1b

on_pit:
        push    rax
        inc     qword ptr [rip + pit_ticks]
        mov     al, 0x20
        out     PIC1, al
        pop     rax
        iretq

on_apic_timer:
        push    rax
        inc     qword ptr [rip + apic_ticks]
        mov     eax, APIC
        mov     dword ptr [rax + 0xb0], 0       /* end of interrupt */
        pop     rax
        iretq

start_timers:
        mov     al, 0x11                        /* both PICs: edge, cascade, ICW4 follows */
        out     PIC1, al
        out     PIC2, al
        mov     al, VEC_PIT
        out     PIC1 + 1, al
        mov     al, VEC_PIT + 8
        out     PIC2 + 1, al
        mov     al, 4
        out     PIC1 + 1, al
        mov     al, 2
        out     PIC2 + 1, al
        mov     al, 1
        out     PIC1 + 1, al
        out     PIC2 + 1, al
        mov     al, 0xfe                        /* only the PIT */
        out     PIC1 + 1, al
        mov     al, 0xff
        out     PIC2 + 1, al

        mov     eax, APIC
        mov     dword ptr [rax + 0xf0], 0x1ff   /* software enable, spurious vector */
        mov     dword ptr [rax + 0x350], 0x700  /* LINT0: what the PIC says */
        mov     dword ptr [rax + 0x3e0], 0x03   /* timer divider 16 */
        mov     dword ptr [rax + 0x320], 0x10000 + VEC_APIC

        mov     al, 0x34                        /* channel 0, both bytes, rate generator */
        out     PIT_CMD, al
        mov     al, (PIT_HZ / TICK_HZ) & 0xff
        out     PIT_CH0, al
        mov     al, (PIT_HZ / TICK_HZ) >> 8
        out     PIT_CH0, al
        sti
        ret

wait_ticks:                             /* rcx: how many PIT ticks from now */
        add     rcx, [rip + pit_ticks]
1:      cmp     [rip + pit_ticks], rcx
        jae     2f
        hlt
        jmp     1b
2:      ret

show_timers:
        lea     rsi, [rip + text_timer]
        call    print
        mov     ecx, 1                          /* to the edge of a tick */
        call    wait_ticks
        mov     ebx, APIC
        mov     dword ptr [rbx + 0x380], 0xffffffff
        rdtsc
        shl     rdx, 32
        lea     r12, [rdx + rax]
        mov     ecx, TICK_HZ / 10
        call    wait_ticks
        mov     r13d, [rbx + 0x390]
        not     r13d                            /* APIC timer counts in a tenth of a second */
        rdtsc
        shl     rdx, 32
        add     rax, rdx
        sub     rax, r12
        xor     edx, edx
        mov     ecx, 100000
        div     rcx
        call    print_decimal
        lea     rsi, [rip + text_megahertz]
        call    print

        mov     eax, r13d                       /* 200 interrupts in a second */
        xor     edx, edx
        mov     ecx, 20
        div     ecx
        mov     dword ptr [rbx + 0x320], 0x20000 + VEC_APIC
        mov     [rbx + 0x380], eax
        mov     r14d, 5
1:      mov     ecx, TICK_HZ / 10
        call    wait_ticks
        mov     al, '.'
        call    put_char
        dec     r14d
        jnz     1b
        mov     dword ptr [rbx + 0x320], 0x10000 + VEC_APIC
        cli
        mov     al, ' '
        call    put_char
        mov     rax, [rip + pit_ticks]
        call    print_decimal
        lea     rsi, [rip + text_pit_ticks]
        call    print
        mov     rax, [rip + apic_ticks]
        call    print_decimal
        lea     rsi, [rip + text_apic_ticks]
        jmp     print

/* ---- ACPI power-off -------------------------------------------------------------------------- */
power_off:                              /* returns only if there is no ACPI */
        mov     esi, 0xe0000
        mov     rax, 0x2052545020445352         /* "RSD PTR " */
1:      cmp     [rsi], rax
        je      2f
        add     esi, 16
        cmp     esi, 0x100000
        jb      1b
        ret

2:      mov     ebx, [rsi + 16]                 /* RSDT: 32-bit pointers after a 36-byte header */
        mov     ecx, [rbx + 4]
        add     rcx, rbx
        add     rbx, 36
3:      cmp     rbx, rcx
        jae     9f
        mov     edx, [rbx]
        cmp     dword ptr [rdx], 0x50434146     /* "FACP" */
        je      4f
        add     rbx, 4
        jmp     3b

4:      mov     r12d, [rdx + 64]                /* PM1a control block */
        mov     ebx, [rdx + 40]                 /* DSDT */
        mov     ecx, [rbx + 4]
        add     rcx, rbx
        add     rbx, 36
5:      cmp     dword ptr [rbx], 0x5f35535f     /* "_S5_" */
        je      6f
        inc     rbx
        cmp     rbx, rcx
        jb      5b
        ret

6:      add     rbx, 4                          /* PackageOp, PkgLength, NumElements, SLP_TYPa */
        cmp     byte ptr [rbx], 0x12
        jne     9f
        mov     al, [rbx + 1]
        shr     al, 6
        movzx   eax, al
        lea     rbx, [rbx + rax + 3]
        mov     al, [rbx]
        cmp     al, 0x0a                        /* BytePrefix */
        jne     7f
        mov     al, [rbx + 1]
7:      and     eax, 7                          /* ZeroOp and OneOp are their own values */
        shl     eax, 10
        or      eax, 0x2000                     /* SLP_EN */
        push    rax
        lea     rsi, [rip + text_power]
        call    print
        mov     eax, r12d
        call    print_hex
        call    print_newline
        mov     edx, r12d
        pop     rax
        out     dx, ax
9:      ret

/* ---- data ------------------------------------------------------------------------------------ */
        .section .rodata
text_banner:     .asciz "KvmSharp demo guest: a machine inside this process\r\n"
text_processor:  .asciz "  processor  "
text_newline:    .asciz "\r\n"
text_paging:     .asciz "  paging     own tables at "
text_alias_ok:   .asciz ", one page at two addresses"
text_fault:      .asciz ", fault at "
text_mapped:     .asciz " handled"
text_timer:      .asciz "  timers     TSC "
text_megahertz:  .asciz " MHz by the PIT "
text_pit_ticks:  .asciz " PIT ticks, "
text_apic_ticks: .asciz " local APIC ticks\r\n"
text_power:      .asciz "  power-off  ACPI, PM1a control at port "
text_no_acpi:    .asciz "  no ACPI tables: halted\r\n"
text_unexpected: .asciz "\r\nunexpected exception: halted\r\n"
hex_digits:      .ascii "0123456789abcdef"

        .data
        .balign 8
gdt:    .quad   0
        .quad   0x00af9b000000ffff              /* 64-bit code */
        .quad   0x00cf93000000ffff              /* data */
gdt_pointer:
        .word   . - gdt - 1
        .quad   gdt
idt_pointer:
        .word   256 * 16 - 1
        .quad   idt

        .bss
        .balign 4096
page_map:        .skip 4096
low_pointers:    .skip 4096
low_directories: .skip 4 * 4096
high_pointers:   .skip 4096
high_directory:  .skip 4096
high_table:      .skip 4096
shared_page:     .skip 4096
spare_page:      .skip 4096
idt:             .skip 4096
pit_ticks:       .skip 8
apic_ticks:      .skip 8
faults:          .skip 8
fault_address:   .skip 8
scratch:         .skip 64
        .balign 16
stack:           .skip 8192
stack_top:
