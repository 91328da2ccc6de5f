// The smallest guest: no stack, no memory, MMU off. Says hello on the PL011 and powers off by PSCI.

        .text
        .globl  _start
_start: adr     x1, message
        mov     w2, #0x09000000                 // PL011
next:   ldrb    w3, [x1], #1
        cbz     w3, off
full:   ldr     w4, [x2, #0x18]                 // FR.TXFF
        tbnz    w4, #5, full
        strb    w3, [x2]
        b       next
off:    mov     w0, #0x84000000                 // PSCI SYSTEM_OFF (DEN0022, 5.9)
        orr     w0, w0, #8
        hvc     #0
stay:   wfi
        b       stay

message:
        .asciz  "hello\r\n"
        .balign 4
