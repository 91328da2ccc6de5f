// Branches to an address where no memory is, with the MMU off and VBAR_EL1 as it was at reset.
// Ends only by a timeout or a stop, if the host does not end it as hopeless. It prints "jump" first.

        .text
        .globl  _start
_start: mov     w2, #0x09000000                 // PL011
        adr     x1, message
1:      ldrb    w3, [x1], #1
        cbz     w3, 2f
        strb    w3, [x2]
        b       1b
2:      mov     x0, #0xdead0000
        movk    x0, #0xff, lsl #32
        br      x0

message:
        .asciz  "jump\r\n"
        .balign 4
