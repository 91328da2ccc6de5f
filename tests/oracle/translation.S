// Ask AT about addresses behind random tables and keep PAR_EL1. Run by test_translation.py on softhv and on QEMU.
//
// A case is 128 bytes: address, TCR_EL1, TTBR1_EL1, which AT (0..3), then four times a descriptor's address and value.

        .text
        .global _start
_start:
        ldr     x0, =MAIR
        msr     mair_el1, x0
        ldr     x0, =TABLES
        msr     ttbr0_el1, x0
        ldr     x19, =TCR
        msr     tcr_el1, x19
        isb
        ldr     x0, =SCTLR
        msr     sctlr_el1, x0
        isb
        ldr     x20, =CASES
        ldr     x21, =COUNT
        ldr     x22, =RESULTS

next:   ldp     x0, x11, [x20]
        ldp     x13, x9, [x20, #16]
        add     x2, x20, #32
        mov     x3, #4
1:      ldp     x4, x5, [x2], #16
        str     x5, [x4]
        subs    x3, x3, #1
        b.ne    1b
        dsb     sy
        msr     tcr_el1, x11
        msr     ttbr1_el1, x13
        isb
        tlbi    vmalle1
        dsb     sy
        isb
        cbz     x9, 2f
        cmp     x9, #2
        b.lo    3f
        b.eq    4f
        at      s1e0w, x0
        b       5f
2:      at      s1e1r, x0
        b       5f
3:      at      s1e1w, x0
        b       5f
4:      at      s1e0r, x0
5:      isb
        mrs     x1, par_el1
        str     x1, [x22], #8
        add     x20, x20, #128
        subs    x21, x21, #1
        b.ne    next

        ldr     x0, =SEMIHOSTING
        cbz     x0, 6f
        mov     x0, #0x01               // SYS_OPEN
        adr     x1, open
        hlt     #0xf000
        adr     x1, write
        str     x0, [x1]
        mov     x0, #0x05               // SYS_WRITE
        hlt     #0xf000
        mov     x0, #0x18               // SYS_EXIT
        adr     x1, exit
        hlt     #0xf000
6:      hvc     #0

        .balign 8
open:   .quad   name, 5, end - name - 1 // "wb"
write:  .quad   0, RESULTS, COUNT * 8
exit:   .quad   0x20026, 0              // ADP_Stopped_ApplicationExit
name:   .asciz  "par"
end:
