/* Ring 3 in 64-bit and compatibility mode: SYSCALL, SYSRET, interrupts, protection. */
#include "guest.inc"
        .set    MSR_STAR, 0xc0000081
        .set    MSR_LSTAR, 0xc0000082
        .set    MSR_FMASK, 0xc0000084

        .bss
        .balign 8
kernel_stack: .skip 8
calls:  .skip   8
        .text

on_syscall:                             /* rcx: return address, r11: flags */
        mov     r10, rsp
        mov     rsp, [rip + kernel_stack]
        inc     qword ptr [rip + calls]
        pushfq
        pop     r9
        bt      r9, 9
        CHECK   nc, "FMASK clears IF"
        cmp     eax, 99999
        je      leave_user
        mov     rsp, r10
        add     eax, 1
        sysretq

on_gp:  cmp     dword ptr [rsp + 16], USER_CS64         /* behind error code and RIP */
        CHECK   e, "#GP came from ring 3"
        add     rsp, 8
        add     qword ptr [rsp], 1                      /* skip the one-byte instruction */
        mov     r13d, 0x6770
        iretq

on_pf:  cmp     qword ptr [rsp], 5                      /* user, protection, read */
        CHECK   e, "#PF error code from ring 3"
        cmp     dword ptr [rsp + 16], USER_CS64
        CHECK   e, "#PF came from ring 3"
        add     rsp, 8
        mov     [rsp], r12                              /* go on where r12 says */
        mov     r13d, 0x7066
        iretq

on_int: cmp     qword ptr [rsp + 8], USER_CS32          /* from compatibility mode */
        CHECK   e, "int from compatibility mode"
        mov     r8, rsp
        lea     rax, [rip + stack_top]
        sub     rax, 40
        cmp     r8, rax
        CHECK   e, "the stack came from the TSS"
        cmp     ebx, 0x55
        CHECK   e, "32-bit code ran"
        SAY     "compatibility mode ok"
        PASS

main:   GATE    13, on_gp
        GATE    14, on_pf
        GATE    0x80, on_int, 0, 3
        mov     [rip + kernel_stack], rsp
        call    make_user_pages

        mov     ecx, 0xc0000080
        rdmsr
        or      eax, 1                                  /* SCE */
        wrmsr
        mov     ecx, MSR_STAR
        xor     eax, eax
        mov     edx, 0x001b0008                         /* SYSRET 64: CS 0x1b + 16, SS 0x1b + 8 */
        wrmsr
        mov     ecx, MSR_LSTAR
        lea     rax, [rip + on_syscall]
        mov     rdx, rax
        shr     rdx, 32
        wrmsr
        mov     ecx, MSR_FMASK
        mov     eax, 0x200
        xor     edx, edx
        wrmsr

        push    USER_DS
        lea     rax, [rip + user_stack_top]
        push    rax
        push    0x202
        push    USER_CS64
        lea     rax, [rip + user_code]
        push    rax
        iretq

leave_user:
        cmp     qword ptr [rip + calls], 1001
        CHECK   e, "number of system calls"
        cmp     r13d, 0x7066
        CHECK   e, "supervisor page is protected"
        SAY     "ring 3 ok"
        push    USER_DS
        lea     rax, [rip + user_stack_top]
        push    rax
        push    2
        push    USER_CS32
        lea     rax, [rip + user_code32]
        push    rax
        iretq

/*
 * .user is linked at 24 MiB, away from everything else, and gets the user bit: new tables over the identity map of 2 MiB pages, with the
 * 2 MiB of .user open to ring 3.
 */
make_user_pages:
        lea     rdi, [rip + directory]
        mov     rax, 0x83
        mov     ecx, 512
1:      mov     [rdi], rax
        add     rax, 0x200000
        add     rdi, 8
        loop    1b
        lea     rax, [rip + user_code]
        shr     rax, 21
        lea     rdi, [rip + directory]
        or      qword ptr [rdi + rax * 8], 4
        lea     rax, [rip + directory]
        or      eax, 7
        mov     [rip + pointers], rax
        lea     rax, [rip + pointers]
        or      eax, 7
        mov     [rip + page_map], rax
        lea     rax, [rip + page_map]
        mov     cr3, rax
        ret

        .bss
        .balign 4096
page_map: .skip 4096
pointers: .skip 4096
directory: .skip 4096

        .section .user, "awx"
user_code:
        mov     ebx, 1000
        xor     r13d, r13d
1:      mov     eax, ebx
        syscall
        lea     edx, [rbx + 1]
        cmp     eax, edx
        jne     3f
        dec     ebx
        jnz     1b
        hlt                                             /* privileged: #GP */
        cmp     r13d, 0x6770
        jne     3f
        lea     r12, [rip + 2f]
        mov     rax, offset idt                         /* a supervisor page: #PF */
        mov     rax, [rax]
2:      mov     eax, 99999
        syscall
3:      mov     eax, 99998
        syscall
        jmp     3b
        .code32
user_code32:
        mov     ebx, 0x54
        .byte   0x40 + 3                                /* inc ebx: a REX prefix in 64-bit mode */
        int     0x80
        .code64
        .skip   0x1000
user_stack_top:
