/* Code that changes itself: the same page, the next instruction, another mapping, by string stores. */
#include "guest.inc"

main:   mov     r15d, 1000
1:      lea     rdi, [rip + patched + 1]        /* the immediate of a mov */
        mov     [rdi], r15d
        call    patched
        cmp     eax, r15d
        CHECK   e, "immediate patched before a call"
        dec     r15d
        jnz     1b

        lea     rdi, [rip + next]               /* the very next instruction */
        mov     byte ptr [rdi], 0x40            /* 40 90 90: nop; was inc */
        mov     ecx, 5
        mov     byte ptr [rdi], 0xff
next:   .byte   0xff, 0xc1                      /* inc ecx */
        cmp     ecx, 6
        CHECK   e, "next instruction rewritten with itself"

        lea     rdi, [rip + buffer]             /* code built at run time, again and again */
        mov     r14d, 200
2:      lea     rdi, [rip + buffer]
        mov     al, 0xb8
        stosb
        mov     eax, r14d
        stosd
        mov     al, 0xc3
        stosb
        lea     rax, [rip + buffer]
        call    rax
        cmp     eax, r14d
        CHECK   e, "code written by string stores"
        dec     r14d
        jnz     2b

        lea     rsi, [rip + template_a]         /* copied over by rep movsb */
        lea     rdi, [rip + buffer]
        mov     ecx, 6
        rep movsb
        lea     rax, [rip + buffer]
        call    rax
        cmp     eax, 0x1111
        CHECK   e, "first copy"
        lea     rsi, [rip + template_b]
        lea     rdi, [rip + buffer]
        mov     ecx, 6
        rep movsb
        lea     rax, [rip + buffer]
        call    rax
        cmp     eax, 0x2222
        CHECK   e, "second copy"

        lea     rdi, [rip + loop_body]          /* a loop that rewrites itself while it runs */
        xor     eax, eax
        mov     ecx, 10
loop_body:
        add     eax, 1                          /* 83 c0 ib */
        cmp     ecx, 5
        jne     3f
        mov     byte ptr [rdi + 2], 3
3:      dec     ecx
        jnz     loop_body
        cmp     eax, 6 + 4 * 3
        CHECK   e, "loop rewritten half way"
        SAY     "self-modification ok"
        PASS
        ret

template_a:
        mov     eax, 0x1111
        ret
template_b:
        mov     eax, 0x2222
        ret

        .section .wtext, "awx"
        .balign 4096
patched:
        mov     eax, 0
        ret
buffer: .skip   64
