/* Says "spinning" and runs for ever, with and without memory traffic. */
#include "guest.inc"
main:   SAY     "spinning"
        lea     rdi, [rip + counter]
1:      inc     rax
        add     [rdi], rax
        jmp     1b
        .bss
        .balign 8
counter: .skip  8
