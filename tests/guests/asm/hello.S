/* The smallest guest: a word on the debug console, and an exit status of its own. */
#include "guest.inc"
main:   SAY     "hello"
        FINISH  21                      /* status (21 << 1) | 1 = 43 */
        ret
