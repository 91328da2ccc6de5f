// The 64-byte arm64 Image header (Linux, Documentation/arch/arm64/booting.rst) every guest starts with.
// text_offset is 0 and every guest is position independent, so any 2 MiB-aligned load address will do.

        .section .head, "ax"
        .globl  _head
_head:  b       _start
        .long   0
        .quad   0                               // text_offset
        .quad   _image_size                     // from _head to the end of .bss
        .quad   0xa                             // little-endian, 4 KiB pages, anywhere in memory
        .quad   0, 0, 0
        .ascii  "ARM\x64"
        .long   0
