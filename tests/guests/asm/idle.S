/* Says "idle" and waits for an interrupt that does not come. */
#include "guest.inc"
main:   SAY     "idle"
1:      sti
        hlt
        jmp     1b
