/* Uses the device of the README: registers at port 0x700 and at address 0xd0000000. */
#include "guest.inc"
main:   mov     edx, 0x700
        mov     eax, 40
        out     dx, eax
        mov     eax, 2
        out     dx, eax
        mov     edx, 0x704
        in      eax, dx
        cmp     eax, 42
        CHECK   e, "sum read from a port"
        mov     ebx, 0xd0000000
        mov     dword ptr [rbx], 1000
        mov     dword ptr [rbx], 337
        mov     eax, 1
        add     eax, [rbx + 4]
        cmp     eax, 1338
        CHECK   e, "sum read from memory-mapped registers"
        PASS
        ret
