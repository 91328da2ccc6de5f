// Entry, exception vectors and the few things C cannot say.
//
// The MMU goes on before the first store: with it off every access is Device memory, where exclusives and
// unaligned accesses need not work, and what is written uncached need not be seen cached later.

#include "layout.h"

        .text
        .globl  _start
_start: mov     x19, x0                         // device tree
        adrp    x20, boot_cpu
        add     x20, x20, :lo12:boot_cpu
        bl      setup_el1

        adrp    x0, _bss_start
        add     x0, x0, :lo12:_bss_start
        adrp    x1, _bss_end
        add     x1, x1, :lo12:_bss_end
1:      cmp     x0, x1
        b.hs    2f
        stp     xzr, xzr, [x0], #16
        b       1b
2:      adr     x0, _head                       // linked at 0: the load bias
        adrp    x1, _rela_start
        add     x1, x1, :lo12:_rela_start
        adrp    x2, _rela_end
        add     x2, x2, :lo12:_rela_end
3:      cmp     x1, x2
        b.hs    4f
        ldp     x3, x4, [x1], #16
        ldr     x5, [x1], #8
        cmp     x4, #1027                       // R_AARCH64_RELATIVE; the rest is padding (R_AARCH64_NONE)
        b.ne    3b
        add     x5, x5, x0
        str     x5, [x3, x0]
        b       3b
4:      mrs     x0, mpidr_el1
        str     x0, [x20, #CPU_MPIDR]
        mov     x0, x19
        bl      main
        bl      finish

        // PSCI CPU_ON comes here; x0 is the context: this CPU's struct cpu.
        .globl  secondary_start
secondary_start:
        mov     x20, x0
        bl      setup_el1
        ldr     x1, [x20, #CPU_MAIN]
        mov     x0, x20
        blr     x1
        b       cpu_off

// x20 = struct cpu; leaves the MMU on, the vectors set, SP at the top of the CPU's stack.
setup_el1:
        adr     x0, vectors
        msr     vbar_el1, x0
        msr     tpidr_el1, x20
        add     x0, x20, #CPU_SIZE
        mov     sp, x0
        ldr     x0, =MAIR
        msr     mair_el1, x0
        ldr     x0, =TCR_TTBR0 | TCR_EPD1
        mrs     x1, id_aa64mmfr0_el1
        and     x1, x1, #7                      // PARange (D17.2.64); 6 and up need a larger descriptor format
        mov     x2, #5
        cmp     x1, x2
        csel    x1, x1, x2, lo
        orr     x0, x0, x1, lsl #32             // TCR_EL1.IPS
        msr     tcr_el1, x0
        adrp    x0, identity
        add     x0, x0, :lo12:identity
        msr     ttbr0_el1, x0
        isb
        tlbi    vmalle1
        ic      iallu
        dsb     nsh
        isb
        ldr     x0, =SCTLR
        msr     sctlr_el1, x0
        isb
        ret

// void attempt(u64 pc, u64 spsr, u64 x0, u64 x1, u64 sp_el0): runs code until it traps; this_cpu()->trap says how.
        .globl  attempt
attempt:
        stp     x29, x30, [sp, #-96]!
        stp     x19, x20, [sp, #16]
        stp     x21, x22, [sp, #32]
        stp     x23, x24, [sp, #48]
        stp     x25, x26, [sp, #64]
        stp     x27, x28, [sp, #80]
        mrs     x9, tpidr_el1
        mov     x10, sp
        str     x10, [x9, #CPU_CATCH]
        msr     elr_el1, x0
        msr     spsr_el1, x1
        msr     sp_el0, x4
        mov     x0, x2
        mov     x1, x3
        eret

// void unwind(u64 sp): returns from the attempt() that saved its registers at sp.
        .globl  unwind
unwind: mov     sp, x0
        ldp     x19, x20, [sp, #16]
        ldp     x21, x22, [sp, #32]
        ldp     x23, x24, [sp, #48]
        ldp     x25, x26, [sp, #64]
        ldp     x27, x28, [sp, #80]
        ldp     x29, x30, [sp], #96
        ret

        .macro  vector number
        .balign 0x80
        sub     sp, sp, #FRAME_SIZE
        stp     x0, x1, [sp]
        mov     x1, #\number
        b       save
        .endm

        .balign 0x800
vectors:
        .irp    number, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        vector  \number
        .endr

save:   stp     x2, x3, [sp, #16]
        stp     x4, x5, [sp, #32]
        stp     x6, x7, [sp, #48]
        stp     x8, x9, [sp, #64]
        stp     x10, x11, [sp, #80]
        stp     x12, x13, [sp, #96]
        stp     x14, x15, [sp, #112]
        stp     x16, x17, [sp, #128]
        stp     x18, x19, [sp, #144]
        stp     x20, x21, [sp, #160]
        stp     x22, x23, [sp, #176]
        stp     x24, x25, [sp, #192]
        stp     x26, x27, [sp, #208]
        stp     x28, x29, [sp, #224]
        mrs     x2, elr_el1
        stp     x30, x2, [sp, #240]
        mrs     x3, spsr_el1
        mrs     x4, esr_el1
        stp     x3, x4, [sp, #256]
        mrs     x5, far_el1
        str     x5, [sp, #272]
        mov     x0, sp
        bl      exception
        ldp     x30, x2, [sp, #240]
        ldr     x3, [sp, #256]
        msr     elr_el1, x2
        msr     spsr_el1, x3
        ldp     x2, x3, [sp, #16]
        ldp     x4, x5, [sp, #32]
        ldp     x6, x7, [sp, #48]
        ldp     x8, x9, [sp, #64]
        ldp     x10, x11, [sp, #80]
        ldp     x12, x13, [sp, #96]
        ldp     x14, x15, [sp, #112]
        ldp     x16, x17, [sp, #128]
        ldp     x18, x19, [sp, #144]
        ldp     x20, x21, [sp, #160]
        ldp     x22, x23, [sp, #176]
        ldp     x24, x25, [sp, #192]
        ldp     x26, x27, [sp, #208]
        ldp     x28, x29, [sp, #224]
        ldp     x0, x1, [sp], #FRAME_SIZE
        eret

        .ltorg

// Level 1 of a 4 GiB address space (T0SZ = 32): VA = PA. The first GiB is devices, the rest RAM.
        .data
        .balign 64
identity:
        .quad   0x00000000 | BLOCK_DEVICE
        .quad   0x40000000 | BLOCK_NORMAL
        .quad   0x80000000 | BLOCK_NORMAL
        .quad   0xc0000000 | BLOCK_NORMAL
