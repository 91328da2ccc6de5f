// Numbers that start.S and the C files share.
#ifndef LAYOUT_H
#define LAYOUT_H

#define FRAME_SIZE 288 // struct frame, a multiple of 16

#define CPU_CATCH 0 // offsets in struct cpu
#define CPU_MPIDR 8
#define CPU_MAIN 16
#define CPU_SIZE 8192 // its stack included

#define MAIR 0x44ff04 // attribute 0 Device-nGnRE, 1 Normal write-back, 2 Normal non-cacheable
// T0SZ 32 (4 GiB from level 1), write-back walks, inner shareable, 4 KiB granule.
#define TCR_TTBR0 (32 | 1 << 8 | 1 << 10 | 3 << 12)
#define TCR_EPD1 (1 << 23)
// The RES1 bits of ARMv8.0 with SPAN (exceptions leave PSTATE.PAN alone), M, C, I, SA, SA0, nTWI, nTWE.
#define SCTLR 0x30d5181d

// Block descriptors (D8.3): AF; device: execute-never everywhere; normal: inner shareable, never from EL0.
#define BLOCK_DEVICE 0x0060000000000401
#define BLOCK_NORMAL 0x0040000000000705

#endif
