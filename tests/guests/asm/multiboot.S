/*
 * A Multiboot kernel that checks what it was given at its start. It is built as ELF64, ELF32 and, with FLAT defined, as
 * a flat image whose header says where it goes. Arguments: "check=1 two"; module: "module text"; 64 MiB; 3 processors.
 */
        .intel_syntax noprefix
        .set DEBUGCON, 0xe9
        .set DEBUG_EXIT, 0xf4
        .set MAGIC, 0x1badb002
#ifdef FLAT
        .set FLAGS, 0x10003
#else
        .set FLAGS, 3
#endif
        .set LOWER, 639
        .set UPPER, 63 << 10

        .macro  SAY text
        mov     esi, offset 8801f
        call    say
        jmp     8803f
8801:   .asciz  "\text\n"
8803:
        .endm

        .macro  CHECK condition, name
        j\condition 8802f
        SAY     "failed: \name"
        mov     al, 1
        out     DEBUG_EXIT, al
8802:
        .endm

        .text
        .code32
image:
        .ascii  "not the header. "
        .balign 4
header: .long   MAGIC, FLAGS, -(MAGIC + FLAGS)
#ifdef FLAT
        .long   header, image, image_end, bss_end, _start
#endif
        .globl  _start
_start:
        cli
        cmp     eax, 0x2badb002
        CHECK   e, "EAX has the loader's value"
        mov     ebp, ebx
        mov     eax, cr0
        and     eax, 0x80000001
        cmp     eax, 1
        CHECK   e, "protected mode without paging"
        mov     ax, ds
        mov     cx, ss
        cmp     ax, cx
        CHECK   e, "one data segment"
        mov     eax, [uninitialized]
        or      eax, [bss_end - 4]
        CHECK   z, "bss is zero"
        mov     esp, offset stack_top
        pushfd
        pop     eax
        test    eax, 0x20200
        CHECK   z, "no interrupts, no virtual-8086 mode"

        mov     eax, [ebp]
        and     eax, 0x24d
        cmp     eax, 0x24d
        CHECK   e, "memory, command line, module, map and name are there"
        cmp     dword ptr [ebp + 4], LOWER
        CHECK   e, "lower memory"
        cmp     dword ptr [ebp + 8], UPPER
        CHECK   e, "upper memory"

        mov     esi, [ebp + 16]                 /* "multiboot...", then the arguments */
        mov     edi, offset name
        mov     ecx, 9
        repe cmpsb
        CHECK   e, "the first word is the image's name"
1:      lodsb
        cmp     al, ' '
        je      2f
        test    al, al
        jnz     1b
2:      mov     edi, offset arguments
        mov     ecx, offset arguments_end - arguments
        repe cmpsb
        CHECK   e, "arguments"

        cmp     dword ptr [ebp + 20], 1
        CHECK   e, "one module"
        mov     ebx, [ebp + 24]
        mov     esi, [ebx]
        mov     eax, [ebx + 4]
        sub     eax, esi
        cmp     eax, offset module_end - module
        CHECK   e, "the module's length"
        test    esi, 0xfff
        CHECK   z, "the module begins with a page"
        cmp     esi, offset bss_end
        CHECK   ae, "the module is clear of the kernel"
        mov     edi, offset module
        mov     ecx, eax
        repe cmpsb
        CHECK   e, "the module's content"

        xor     edx, edx                        /* usable memory from 1 MiB on */
        mov     esi, [ebp + 48]
        mov     edi, [ebp + 44]
        add     edi, esi
3:      cmp     dword ptr [esi + 20], 1
        jne     4f
        cmp     dword ptr [esi + 4], 0x100000
        jb      4f
        add     edx, [esi + 12]
4:      add     esi, [esi]
        add     esi, 4
        cmp     esi, edi
        jb      3b
        CHECK   e, "the map ends with an entry"
        cmp     edx, UPPER << 10
        CHECK   e, "the map has all of upper memory"

        mov     dx, 0x510                       /* fw_cfg comes unasked: the number of processors */
        mov     ax, 5
        out     dx, ax
        inc     dx
        in      al, dx
        cmp     al, 3
        CHECK   e, "processors"

        mov     ax, ds                          /* the descriptors are in memory, too */
        mov     ds, ax
        mov     ax, cs
        push    eax
        push    offset 5f
        retfd
5:
        mov     eax, offset on_tick             /* the timer runs as a BIOS leaves it, at vector 8 */
        mov     edi, offset idt + 8 * 8
        mov     [edi], ax
        mov     [edi + 2], cs
        mov     word ptr [edi + 4], 0x8e00
        shr     eax, 16
        mov     [edi + 6], ax
        lidt    [idt_pointer]
        sti
        hlt
        cli
        cmp     dword ptr [ticks], 1
        CHECK   e, "a tick of the timer"
        cmp     word ptr [8 * 4 + 2], 0xf000
        CHECK   e, "real mode has its vectors"
        SAY     "multiboot ok"
        xor     eax, eax
        out     DEBUG_EXIT, al
6:      hlt
        jmp     6b

say:    lodsb                                   /* esi: text */
        test    al, al
        jz      1f
        out     DEBUGCON, al
        jmp     say
1:      ret

on_tick:
        push    eax
        inc     dword ptr [ticks]
        mov     al, 0x20
        out     0x20, al
        pop     eax
        iretd

idt_pointer:
        .word   9 * 8 - 1
        .long   idt
name:   .ascii  "multiboot"
arguments:
        .asciz  "check=1 two"
arguments_end:
module: .ascii  "module text"
module_end:
        .balign 16
image_end:

        .bss
        .balign 4096
uninitialized:
ticks:  .skip   4
        .balign 8
idt:    .skip   9 * 8
        .skip   8192
stack_top:
        .skip   4096
bss_end:
