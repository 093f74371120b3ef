/*
 * pc-testdev and fw_cfg from inside: the latch, the buffer as an operand of many instructions, the page flush, interrupt
 * lines through the PICs, items by port and by DMA. 2 processors, 64 MiB, one file opt/test.
 */
#include "guest.inc"
        .set LATCH, 0xe0
        .set FLUSH, 0xe4
        .set LINES, 0x2000
        .set BUFFER, 0xff000000
        .set FW_CFG, 0x510
        .set FW_CFG_DMA, 0x514

main:
        mov     eax, 0x44332211
        out     LATCH, eax
        mov     al, 0xaa
        out     LATCH + 1, al
        mov     ax, 0xccbb
        out     LATCH + 2, ax
        in      eax, LATCH
        cmp     eax, 0xccbbaa11
        CHECK   e, "the latch keeps bytes"
        in      ax, LATCH + 1
        cmp     ax, 0xbbaa
        CHECK   e, "the latch at an odd port"
        SAY     "latch ok"

        mov     ebx, BUFFER
        mov     rax, 0x1122334455667788
        mov     [rbx + 0xfff8], rax
        inc     byte ptr [rbx + 0xfff8]
        lock add dword ptr [rbx + 0xfffc], 1
        mov     edx, 0x99
        xchg    [rbx + 0xfff9], dl
        mov     rcx, [rbx + 0xfff8]
        mov     rax, 0x1122334555669989
        cmp     rcx, rax
        CHECK   e, "read-modify-write in the buffer"
        cmp     dl, 0x77
        CHECK   e, "XCHG gives the old value"
        lea     rdi, [rbx + 0x100]
        lea     rsi, [rbx + 0xfff8]
        mov     ecx, 8
        rep movsb
        mov     rcx, [rbx + 0x100]
        cmp     rcx, rax
        CHECK   e, "strings within the buffer"
        movups  xmm0, [rbx + 0xf8]
        movhlps xmm1, xmm0
        movq    rcx, xmm1
        cmp     rcx, rax
        CHECK   e, "16 bytes at once"

        /* The flush of the page that holds this code and of one that holds data changes nothing. */
        lea     rax, [rip + main]
        out     FLUSH, eax
        lea     rax, [rip + data]
        out     FLUSH, eax
        mov     dword ptr [rip + data], 0x1234
        out     FLUSH, eax
        cmp     dword ptr [rip + data], 0x1234
        CHECK   e, "a flushed page keeps its content"
        mov     eax, 0xfffff000                 /* no memory there */
        out     FLUSH, eax
        SAY     "buffer ok"

        /* PICs to vectors 0x20 and 0x28; lines 5 and 11 open. */
        GATE    0x25, on_line5
        GATE    0x2b, on_line11
        mov     al, 0x11
        out     0x20, al
        out     0xa0, al
        mov     al, 0x20
        out     0x21, al
        mov     al, 0x28
        out     0xa1, al
        mov     al, 4
        out     0x21, al
        mov     al, 2
        out     0xa1, al
        mov     al, 1
        out     0x21, al
        out     0xa1, al
        mov     al, 0xdb
        out     0x21, al
        mov     al, 0xf7
        out     0xa1, al
        sti
        nop
        mov     al, 1
        mov     dx, LINES + 5
        out     dx, al
        nop
        cmp     dword ptr [rip + line5], 1
        CHECK   e, "line 5 raised"
        out     dx, al                          /* high already: no edge */
        nop
        xor     eax, eax
        out     dx, al
        nop
        cmp     dword ptr [rip + line5], 1
        CHECK   e, "no second edge"
        inc     eax
        out     dx, al
        nop
        cmp     dword ptr [rip + line5], 2
        CHECK   e, "line 5 raised again"
        mov     dx, LINES + 11
        mov     al, 0x80
        out     dx, al
        nop
        cmp     dword ptr [rip + line11], 1
        CHECK   e, "line 11 raised"
        cli
        SAY     "interrupts ok"

        xor     eax, eax
        call    select
        call    read4
        cmp     eax, 0x554d4551                 /* "QEMU" */
        CHECK   e, "the signature"
        mov     eax, 1
        call    select
        call    read4
        cmp     eax, 3
        CHECK   e, "ports and DMA"
        mov     eax, 3
        call    select
        call    read4
        cmp     eax, 64 << 20
        CHECK   e, "RAM size"
        mov     eax, 5
        call    select
        call    read4
        cmp     eax, 2                          /* 16 bits, then zeros */
        CHECK   e, "processors"
        mov     dx, FW_CFG_DMA
        in      eax, dx
        cmp     eax, 0x554d4551
        CHECK   e, "the DMA register's signature"
        add     edx, 4
        in      eax, dx
        cmp     eax, 0x47464320                 /* " CFG" */
        CHECK   e, "its second half"

        /* The directory by DMA: one file; then the file. */
        mov     ecx, 0x0019000a                 /* select item 0x19, read */
        mov     eax, 68
        call    transfer
        mov     eax, [rip + data]
        bswap   eax
        cmp     eax, 1
        CHECK   e, "one file"
        mov     eax, [rip + data + 4]
        bswap   eax
        cmp     eax, 12
        CHECK   e, "its size"
        lea     rsi, [rip + data + 12]
        lea     rdi, [rip + file_name]
        mov     ecx, 9
        repe cmpsb
        CHECK   e, "its name"
        movzx   ecx, word ptr [rip + data + 8]
        rol     cx, 8
        shl     ecx, 16
        or      ecx, 0xa
        mov     eax, 14
        call    transfer
        lea     rsi, [rip + data]
        lea     rdi, [rip + file_content]
        mov     ecx, 14
        repe cmpsb
        CHECK   e, "its content"
        SAY     "fw_cfg ok"
        PASS

select: mov     dx, FW_CFG
        out     dx, ax
        ret
read4:  xor     eax, eax
        mov     dx, FW_CFG + 1
        mov     ecx, 4
1:      in      al, dx
        ror     eax, 8
        loop    1b
        ret

transfer:                               /* ecx: control, eax: length; to `data` */
        bswap   ecx
        bswap   eax
        mov     [rip + access], ecx
        mov     [rip + access + 4], eax
        lea     rax, [rip + data]
        bswap   rax
        mov     [rip + access + 8], rax
        xor     eax, eax
        mov     dx, FW_CFG_DMA
        out     dx, eax
        lea     rax, [rip + access]
        bswap   eax
        add     edx, 4
        out     dx, eax
        cmp     dword ptr [rip + access], 0
        CHECK   e, "a DMA request"
        ret

on_line5:
        push    rax
        inc     dword ptr [rip + line5]
        jmp     1f
on_line11:
        push    rax
        inc     dword ptr [rip + line11]
        mov     al, 0x20
        out     0xa0, al
1:      mov     al, 0x20
        out     0x20, al
        pop     rax
        iretq

        .section .rodata
file_name:
        .asciz  "opt/test"
file_content:
        .ascii  "file content"
        .byte   0, 0

        .bss
        .balign 16
access: .skip   16
data:   .skip   4096
line5:  .skip   4
line11: .skip   4
