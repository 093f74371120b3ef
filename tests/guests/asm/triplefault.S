/* No interrupt table at all: the first exception shuts the processor down. */
#include "guest.inc"
main:   SAY     "going down"
        lidt    [rip + empty]
        ud2
        .data
empty:  .word   0
        .quad   0
