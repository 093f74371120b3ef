/* A whole userland: process 1 that switches the machine off at once. */
        .intel_syntax noprefix
        .globl _start
_start:
        mov     eax, 169                /* reboot(2) */
        mov     edi, 0xfee1dead
        mov     esi, 0x28121969
        mov     edx, 0x4321fedc         /* LINUX_REBOOT_CMD_POWER_OFF */
        syscall
1:      jmp     1b
