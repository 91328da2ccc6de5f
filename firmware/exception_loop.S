// An undefined instruction at EL1 whose vector is itself an undefined instruction: an exception at every step, for ever.
// Interrupts are masked and nothing is printed after "loop": it ends only by a timeout or a stop, and must not hang
// its host.

        .text
        .globl  _start
_start: mov     w2, #0x09000000                 // PL011
        adr     x1, message
1:      ldrb    w3, [x1], #1
        cbz     w3, 2f
        strb    w3, [x2]
        b       1b
2:      adr     x0, vectors
        msr     vbar_el1, x0
        isb
        udf     #0

message:
        .asciz  "loop\r\n"

        .balign 0x800
vectors:
        .fill   512, 4, 0x00000000              // UDF #0
