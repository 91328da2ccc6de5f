/*
 * What the back end's files about vector registers share: opcodes, and copies of vector registers in XMM registers.
 * They spare the way through memory, which takes longer than most instructions do. v[] is written at once, so that a
 * copy can be forgotten at any time, and a block left without a thought. XMM0 to XMM4 are scratch.
 */
#ifndef SOFTHV_JIT_X64_SIMD_H
#define SOFTHV_JIT_X64_SIMD_H

#include "jit_x64.h"

#ifdef JIT_X64

/* Opcodes of SSE; MAP_38 and MAP_3A: further ones, of SSE4.2 at most unless said otherwise. */
enum {
    MOVUPS = 0x0f10, MOVUPS_STORE = 0x0f11, MOVQ = 0xf30f7e, MOVSS = 0xf30f10, MOVSD = 0xf20f10,
    MOVD_TO = 0x660f6e, MOVD_FROM = 0x660f7e,
    PAND = 0x660fdb, PANDN = 0x660fdf, POR = 0x660feb, PXOR = 0x660fef, PSHUFD = 0x660f70, PACKUSWB = 0x660f67,
    PCMPEQB = 0x660f74, PCMPEQW = 0x660f75, PUNPCKLQDQ = 0x660f6c, PUNPCKHQDQ = 0x660f6d, PADDD = 0x660ffe,
    SHIFT_W = 0x660f71, SHIFT_D = 0x660f72, SHIFT_Q = 0x660f73, /* by an immediate: */
    RIGHT = 2, ARITHMETIC = 4, LEFT = 6,
    PALIGNR = MAP_3A | 0x660f0f, PCLMULQDQ = MAP_3A | 0x660f44,
    AESIMC = MAP_38 | 0x660fdb, AESENC = MAP_38 | 0x660fdc,
    AESENCLAST = MAP_38 | 0x660fdd, AESDECLAST = MAP_38 | 0x660fdf,
    SHUFPS = 0x0fc6, SHA256RNDS2 = MAP_38 | 0x0fcb, SHA256MSG1 = MAP_38 | 0x0fcc, SHA256MSG2 = MAP_38 | 0x0fcd
};

/* What this host can do; asked at compile time of guest code, which is rare enough. */
static inline bool has_sse42(void) { return __builtin_cpu_supports("sse4.2"); }

static inline void xx(struct emit *e, uint32_t op, unsigned to, unsigned from) { op_rr(e, 0, op, to, from); }
static inline void xx_imm(struct emit *e, uint32_t op, unsigned to, unsigned from, unsigned imm) {
    op_rr(e, 0, op, to, from);
    byte(e, imm);
}
static inline void x_copy(struct emit *e, unsigned to, unsigned from) { xx(e, 0x0f28, to, from); } /* MOVAPS */

static inline bool v_q(const struct uop *u) { return u->aux >> 2 & 1; } /* exec_simd.h: V_Q, V_SIZE */
static inline unsigned v_size(const struct uop *u) { return u->aux & 3; }

/* ---- jit_x64_simd.c ---------------------------------------------------------------------------------------------- */

/* The XMM register that holds a copy of it, or NO_REG; one for a new copy, which the caller fills. */
unsigned v_copy(struct emit *e, unsigned v);
unsigned v_new_copy(struct emit *e, unsigned v);
/*
 * Outside of slow paths: a copy of it to read; where to put its next value, which may be the copy of the old one, and
 * which is to be there, by v_set(), before any slow path is announced.
 */
unsigned v_use(struct emit *e, unsigned v);
unsigned v_target(struct emit *e, unsigned v);
void v_set(struct emit *e, unsigned xmm, unsigned v);
/* Names the value of a vector register: while two have the same number they are equal. Never 0. */
uint32_t v_number(struct emit *e, unsigned v);

/* A call of an op that knows vector registers and FPSR only, and never fails once FP is allowed. */
void emit_pure(struct emit *e, const struct uop *u, uint32_t arg);
/* Of any other: but general registers stay. */
void emit_kept(struct emit *e, const struct uop *u, uint32_t arg);
/* The constant imm, twice when `arg` and Q are set. */
void emit_mov_imm_v(struct emit *e, const struct uop *u, uint32_t arg);

#endif
#endif
