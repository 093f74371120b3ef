/*
 * The way down and up again: long mode, compatibility mode, 32-bit protected mode without paging,
 * with 2-level paging and with PAE, 16-bit protected mode, real mode, and back to long mode.
 * A failure prints the letter of the check.
 */
#include "guest.inc"
        .set    LOW, 0x8000                     /* where the part below 64 KiB runs */
        .set    TABLES, 0x20000
        .set    ALIAS, 0x00c00000
        .set    SHARED, 0x30000

        .macro  EXPECT condition, letter
        j\condition 8803f
        .byte   0xb0                            /* mov al, letter */
        .ascii  "\letter"
        out     DEBUGCON, al
        mov     al, 1
        out     DEBUG_EXIT, al
8803:
        .endm

main:   lea     rsi, [rip + low_start]
        mov     edi, LOW
        mov     ecx, offset low_end - low_start
        rep movsb
        mov     rax, cr3
        mov     [LOW + saved_cr3 - low_start], eax
        push    CS32
        push    LOW + (enter32 - low_start)
        lretq

back:   mov     eax, DS64
        mov     ds, eax
        mov     es, eax
        mov     ss, eax
        lea     rsp, [rip + stack_top]
        lidt    [rip + idt_pointer]
        SAY     "modes ok"
        PASS

low_start:
        .code32
enter32:
        mov     eax, DS64
        mov     ds, eax
        mov     es, eax
        mov     ss, eax
        mov     esp, 0x7000
        mov     eax, cr0                        /* paging off: out of long mode */
        and     eax, 0x7fffffff
        mov     cr0, eax
        mov     ecx, 0xc0000080
        rdmsr
        test    eax, 0x400
        EXPECT  z, A                            /* LMA is clear */
        and     eax, ~0x100
        wrmsr

        mov     eax, 0x11111111                 /* things that only 32-bit code has */
        mov     ebx, 0x22222222
        mov     esi, 0x66666666
        pushad
        xor     eax, eax
        xor     ebx, ebx
        xor     esi, esi
        popad
        cmp     ebx, 0x22222222
        EXPECT  e, B
        cmp     esp, 0x7000
        EXPECT  e, C
        mov     ax, 0x0107
        add     al, 5
        aaa
        cmp     ax, 0x0202
        EXPECT  e, D
        mov     al, 0x38
        add     al, 0x45
        daa
        cmp     al, 0x83
        EXPECT  e, E
        mov     ax, 0x0509
        aad
        cmp     al, 59
        EXPECT  e, F
        push    es
        push    0x12345678
        les     eax, [esp]                      /* ES := the pushed ES, EAX := the number */
        cmp     eax, 0x12345678
        EXPECT  e, G
        add     esp, 8
        stc
        .byte   0xd6                            /* SALC */
        cmp     al, 0xff
        EXPECT  e, H

        mov     edi, TABLES                     /* 2-level: one 4 MiB page, one 4 KiB alias */
        xor     eax, eax
        mov     ecx, 2048
        rep stosd
        mov     dword ptr [TABLES], 0x83
        mov     dword ptr [TABLES + (ALIAS >> 22) * 4], TABLES + 0x1000 + 3
        mov     dword ptr [TABLES + 0x1000], SHARED + 3
        mov     dword ptr [SHARED + 16], 0xfeedface
        mov     eax, cr4
        and     eax, ~0x20
        or      eax, 0x10
        mov     cr4, eax
        mov     eax, TABLES
        mov     cr3, eax
        mov     eax, cr0
        or      eax, 0x80000000
        mov     cr0, eax
        cmp     dword ptr [ALIAS + 16], 0xfeedface
        EXPECT  e, I
        mov     dword ptr [ALIAS + 20], 0x600df00d
        cmp     dword ptr [SHARED + 20], 0x600df00d
        EXPECT  e, J
        test    dword ptr [TABLES + 0x1000], 0x60
        EXPECT  nz, K                           /* accessed and dirty */
        mov     eax, cr0
        and     eax, 0x7fffffff
        mov     cr0, eax

        mov     edi, TABLES                     /* PAE: one 2 MiB page, one 4 KiB alias */
        xor     eax, eax
        mov     ecx, 4096
        rep stosd
        mov     dword ptr [TABLES], TABLES + 0x1000 + 1
        mov     dword ptr [TABLES + 0x1000], 0x83
        mov     dword ptr [TABLES + 0x1000 + (ALIAS >> 21) * 8], TABLES + 0x2000 + 3
        mov     dword ptr [TABLES + 0x2000], SHARED + 3
        mov     eax, cr4
        or      eax, 0x20
        mov     cr4, eax
        mov     eax, TABLES
        mov     cr3, eax
        mov     eax, cr0
        or      eax, 0x80000000
        mov     cr0, eax
        cmp     dword ptr [ALIAS + 16], 0xfeedface
        EXPECT  e, L
        mov     eax, cr0
        and     eax, 0x7fffffff
        mov     cr0, eax
        push    CS16
        push    LOW + (enter16 - low_start)
        retf

        .code16
enter16:
        mov     ax, DS16
        mov     ds, ax
        mov     es, ax
        mov     ss, ax
        mov     ax, 0xffff
        add     ax, 1
        EXPECT  c, M
        mov     eax, cr0
        and     al, 0xfe
        mov     cr0, eax
        .byte   0xea                            /* far jump: CS becomes a real-mode segment */
        .word   real - low_start, LOW >> 4

real:   mov     ax, LOW >> 4
        mov     ds, ax
        xor     ax, ax
        mov     ss, ax
        mov     es, ax
        mov     sp, 0x7000
        mov     si, offset real_idt - low_start
        lidt    [si]
        mov     word ptr es:[0x21 * 4], offset on_int21 - low_start
        mov     word ptr es:[0x21 * 4 + 2], LOW >> 4
        mov     word ptr es:[0], offset on_divide - low_start
        mov     word ptr es:[2], LOW >> 4
        mov     bx, 0x1234
        int     0x21
        cmp     bx, 0x1235
        EXPECT  e, N
        cmp     sp, 0x7000
        EXPECT  e, O
        xor     cx, cx
        mov     ax, 1
        xor     dx, dx
divide: div     cx                              /* the handler skips it */
        cmp     bx, 0x7777
        EXPECT  e, P
        mov     bp, offset word_table - low_start
        mov     si, 2
        mov     ax, ds:[bp + si]                /* 16-bit addressing, segment override */
        cmp     ax, 0xbbbb
        EXPECT  e, Q
        mov     ax, 0xffff                      /* FFFF:0010 is 1 MiB with A20 open */
        mov     es, ax
        mov     word ptr es:[0x0010], 0x4321
        mov     ax, 0x1000
        mov     ds, ax
        mov     esi, 0xffff
        xor     ax, ax
        mov     es, ax
        mov     cx, 3
        mov     di, 0x7800
        mov     byte ptr [0xffff], 0x5a         /* SI wraps at 64 KiB */
        mov     byte ptr [0], 0xa5
        rep movsb
        cmp     word ptr es:[0x7800], 0xa55a
        EXPECT  e, R
        mov     ax, LOW >> 4
        mov     ds, ax

        mov     eax, cr0
        or      al, 1
        mov     cr0, eax
        .byte   0x66, 0xea                      /* 32-bit far jump */
        .long   LOW + (up32 - low_start)
        .word   CS32

on_int21:
        inc     bx
        iret
on_divide:
        mov     bp, sp
        cmp     word ptr [bp], offset divide - low_start
        EXPECT  e, S
        add     word ptr [bp], 2
        mov     bx, 0x7777
        iret

        .code32
up32:   mov     eax, DS64
        mov     ds, eax
        mov     es, eax
        mov     ss, eax
        mov     esp, 0x7000
        cmp     word ptr [0x100000], 0x4321
        EXPECT  e, T
        mov     eax, [LOW + saved_cr3 - low_start]
        mov     cr3, eax
        mov     ecx, 0xc0000080
        rdmsr
        or      eax, 0x100
        wrmsr
        mov     eax, cr0
        or      eax, 0x80000000
        mov     cr0, eax
        rdmsr
        test    eax, 0x400
        EXPECT  nz, U
        push    CS64
        push    offset back
        retf

        .balign 8
saved_cr3:  .long 0
real_idt:   .word 0x3ff
            .long 0
word_table: .word 0xaaaa, 0xbbbb
low_end:
        .code64
