/*
 * x86-64 code for floating point, Advanced SIMD and the cryptographic extension. Vector registers live in the vCPU, and
 * XMM0 to XMM4 are scratch. What has no code here is a call of its op that keeps the general registers where they are.
 */
#include "jit_x64.h"

#ifdef JIT_X64

#include <cpuid.h>

#define A64(row_name, pattern, form, op) bool p_##op(struct vcpu *c, const struct uop *u);
#define A64_END(row_name, pattern, form, op) A64(row_name, pattern, form, op)
#include "a64_crypto.def"
#include "a64_fp.def"
#include "a64_simd.def"
#undef A64
#undef A64_END

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
    SHA256RNDS2 = MAP_38 | 0x0fcb, SHA256MSG1 = MAP_38 | 0x0fcc, SHA256MSG2 = MAP_38 | 0x0fcd
};

static bool has_sha(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && b >> 29 & 1;
}
/* What this host can do; asked at compile time of guest code, which is rare enough. */
static bool has_sse42(void) { return __builtin_cpu_supports("sse4.2"); }

static void xx(struct emit *e, uint32_t op, unsigned to, unsigned from) { op_rr(e, 0, op, to, from); }
static void xx_imm(struct emit *e, uint32_t op, unsigned to, unsigned from, unsigned imm) {
    op_rr(e, 0, op, to, from);
    byte(e, imm);
}
static void x_copy(struct emit *e, unsigned to, unsigned from) { xx(e, 0x0f28, to, from); } /* MOVAPS */
/* ---- Copies of vector registers ---------------------------------------------------------------------------------- */

/*
 * They spare the way through memory, which takes longer than most instructions do. v[] is written at once, so that a
 * copy can be forgotten at any time, and a block left without a thought.
 */
enum { FIRST_COPY = 5, COPIES_END = 16 };

static unsigned v_copy(struct emit *e, unsigned v) {
    for (unsigned x = FIRST_COPY; x < COPIES_END; x++) {
        if (e->regs.vector[x] == v) {
            e->vector_stamp[x] = e->now;
            return x;
        }
    }
    return NO_REG;
}

static unsigned v_new_copy(struct emit *e, unsigned v) {
    unsigned oldest = FIRST_COPY;
    for (unsigned x = FIRST_COPY; x < COPIES_END; x++) {
        if (e->regs.vector[x] == NO_GUEST) {
            oldest = x;
            break;
        }
        if (e->vector_stamp[x] < e->vector_stamp[oldest])
            oldest = x;
    }
    e->regs.vector[oldest] = (uint8_t)v;
    e->vector_stamp[oldest] = e->now;
    return oldest;
}

void v_load(struct emit *e, unsigned xmm, unsigned v) {
    unsigned copy = v_copy(e, v);
    if (copy == NO_REG && !e->in_cold) {
        copy = v_new_copy(e, v);
        op_rm(e, 0, MOVUPS, copy, CPU, V_AT(v));
    }
    if (copy == NO_REG)
        op_rm(e, 0, MOVUPS, xmm, CPU, V_AT(v));
    else
        x_copy(e, xmm, copy);
}

void v_store(struct emit *e, unsigned xmm, unsigned v) {
    op_rm(e, 0, MOVUPS_STORE, xmm, CPU, V_AT(v));
    if (e->in_cold)
        return;
    unsigned copy = v_copy(e, v);
    x_copy(e, copy == NO_REG ? v_new_copy(e, v) : copy, xmm);
}

void v_forget(struct emit *e, unsigned v) {
    for (unsigned x = FIRST_COPY; x < COPIES_END; x++)
        if (e->regs.vector[x] == v)
            e->regs.vector[x] = NO_GUEST;
}

void v_restore(struct emit *e, const struct outlined *o, bool all) {
    for (unsigned x = FIRST_COPY; x < COPIES_END; x++) {
        unsigned v = o->after.vector[x];
        if (v != NO_GUEST && (all || o->before.vector[x] != v || v == o->u->rd || v == o->u->ra))
            op_rm(e, 0, MOVUPS, x, CPU, V_AT(v));
    }
}

/* The result in XMM0: 128 bits, or 64 and zeros. */
static void v_result(struct emit *e, const struct uop *u, bool all) {
    if (!all)
        xx(e, MOVQ, 0, 0);
    v_store(e, 0, u->rd);
}
static bool v_q(const struct uop *u) { return u->aux >> 2 & 1; } /* exec_simd.h: V_Q, V_SIZE */
static unsigned v_size(const struct uop *u) { return u->aux & 3; }

/* ---- Calls ------------------------------------------------------------------------------------------------------- */

/* Of an op that knows vector registers and FPSR only, and never fails once FP is allowed. */
static void emit_pure(struct emit *e, const struct uop *u, uint32_t arg) {
    check_fp(e, u);
    call_pure(e, u);
}

/* Of any other: but general registers stay. */
static void emit_kept(struct emit *e, const struct uop *u, uint32_t arg) { call_kept(e, u); }

/* ---- Lanes of integers ------------------------------------------------------------------------------------------- */

/* arg of the following: an index into these; 0: no such instruction. By log2 of the lane's bytes. */
enum lanes {
    L_AND, L_OR, L_XOR, L_ADD, L_SUB, L_CMEQ, L_CMGT, L_UMAX, L_SMAX, L_UMIN, L_SMIN, L_MUL, L_ZIP1, L_ZIP2,
    L_COUNT
};
static const uint32_t lanes[L_COUNT][4] = {
    [L_AND] = {PAND, PAND, PAND, PAND},
    [L_OR] = {POR, POR, POR, POR},
    [L_XOR] = {PXOR, PXOR, PXOR, PXOR},
    [L_ADD] = {0x660ffc, 0x660ffd, 0x660ffe, 0x660fd4},
    [L_SUB] = {0x660ff8, 0x660ff9, 0x660ffa, 0x660ffb},
    [L_CMEQ] = {0x660f74, 0x660f75, 0x660f76, MAP_38 | 0x660f29},
    [L_CMGT] = {0x660f64, 0x660f65, 0x660f66, MAP_38 | 0x660f37},
    [L_UMAX] = {0x660fde, MAP_38 | 0x660f3e, MAP_38 | 0x660f3f, 0},
    [L_SMAX] = {MAP_38 | 0x660f3c, 0x660fee, MAP_38 | 0x660f3d, 0},
    [L_UMIN] = {0x660fda, MAP_38 | 0x660f3a, MAP_38 | 0x660f3b, 0},
    [L_SMIN] = {MAP_38 | 0x660f38, 0x660fea, MAP_38 | 0x660f39, 0},
    [L_MUL] = {0, 0x660fd5, MAP_38 | 0x660f40, 0},
    [L_ZIP1] = {0x660f60, 0x660f61, 0x660f62, PUNPCKLQDQ},
    [L_ZIP2] = {0x660f68, 0x660f69, 0x660f6a, PUNPCKHQDQ},
};

/* The instruction, or 0 when this host has none. */
static uint32_t lane_op(const struct uop *u, enum lanes which) {
    uint32_t op = lanes[which][v_size(u)];
    return op & MAP_38 && !has_sse42() ? 0 : op;
}

static void emit_lanes(struct emit *e, const struct uop *u, uint32_t arg) {
    uint32_t op = lane_op(u, arg);
    if (!op || u->aux & 8 /* by element */ || ((arg == L_ZIP1 || arg == L_ZIP2) && !v_q(u))) {
        emit_pure(e, u, arg);
        return;
    }
    check_fp(e, u);
    v_load(e, 0, u->rn);
    v_load(e, 1, u->rm);
    xx(e, op, 0, 1);
    v_result(e, u, v_q(u));
}

static void emit_andn(struct emit *e, const struct uop *u, uint32_t arg) {
    check_fp(e, u);
    v_load(e, 0, u->rm);
    v_load(e, 1, u->rn);
    xx(e, PANDN, 0, 1);
    v_result(e, u, v_q(u));
}

/* Unsigned comparison: a >= b when the greater one is a. */
static void emit_cmhs(struct emit *e, const struct uop *u, uint32_t arg) {
    uint32_t max = lane_op(u, L_UMAX), equal = lane_op(u, L_CMEQ);
    if (!max || !equal) {
        emit_pure(e, u, arg);
        return;
    }
    check_fp(e, u);
    v_load(e, 0, u->rn);
    x_copy(e, 2, 0);
    v_load(e, 1, u->rm);
    xx(e, max, 0, 1);
    xx(e, equal, 0, arg ? 1 : 2); /* CMHI: not (b >= a) */
    if (arg) {
        xx(e, PCMPEQB, 1, 1);
        xx(e, PXOR, 0, 1);
    }
    v_result(e, u, v_q(u));
}

/* With zero: arg is which. */
static void emit_with_zero(struct emit *e, const struct uop *u, uint32_t arg) {
    uint32_t op = lane_op(u, arg);
    if (!op) {
        emit_pure(e, u, arg);
        return;
    }
    check_fp(e, u);
    v_load(e, 0, u->rn);
    xx(e, PXOR, 1, 1);
    xx(e, op, 0, 1);
    v_result(e, u, v_q(u));
}

static void emit_cmtst(struct emit *e, const struct uop *u, uint32_t arg) {
    uint32_t op = lane_op(u, L_CMEQ);
    if (!op) {
        emit_pure(e, u, arg);
        return;
    }
    check_fp(e, u);
    v_load(e, 0, u->rn);
    v_load(e, 1, u->rm);
    xx(e, PAND, 0, 1);
    xx(e, PXOR, 1, 1);
    xx(e, op, 0, 1);
    xx(e, PCMPEQB, 1, 1);
    xx(e, PXOR, 0, 1);
    v_result(e, u, v_q(u));
}

enum { BSL, BIT, BIF };
static void emit_select_bits(struct emit *e, const struct uop *u, uint32_t arg) {
    check_fp(e, u);
    v_load(e, 0, u->rn);
    v_load(e, 1, u->rm);
    v_load(e, 2, u->rd);
    switch (arg) {
    case BSL: /* m ^ ((m ^ n) & d) */
        xx(e, PXOR, 0, 1);
        xx(e, PAND, 0, 2);
        xx(e, PXOR, 0, 1);
        break;
    case BIT: /* d ^ ((d ^ n) & m) */
        xx(e, PXOR, 0, 2);
        xx(e, PAND, 0, 1);
        xx(e, PXOR, 0, 2);
        break;
    default: /* d ^ ((d ^ n) & ~m) */
        xx(e, PXOR, 0, 2);
        xx(e, PANDN, 1, 0);
        xx(e, PXOR, 1, 2);
        x_copy(e, 0, 1);
    }
    v_result(e, u, v_q(u));
}

static void emit_not(struct emit *e, const struct uop *u, uint32_t arg) {
    check_fp(e, u);
    v_load(e, 0, u->rn);
    xx(e, PCMPEQB, 1, 1);
    xx(e, PXOR, 0, 1);
    v_result(e, u, v_q(u));
}

static void emit_mov_imm_v(struct emit *e, const struct uop *u, uint32_t arg) {
    check_fp(e, u);
    if (!u->imm) {
        xx(e, PXOR, 0, 0);
    } else {
        mov_imm(e, RAX, u->imm);
        op_rr(e, 1, MOVD_TO, 0, RAX);
        if (arg && v_q(u))
            xx(e, PUNPCKLQDQ, 0, 0);
    }
    v_store(e, 0, u->rd);
}

/* arg: LEFT, RIGHT, ARITHMETIC. Amounts as large as the lane do what Arm's do. */
static void emit_shift_v(struct emit *e, const struct uop *u, uint32_t arg) {
    unsigned size = v_size(u);
    if (size == 0 || (arg == ARITHMETIC && size == 3)) {
        emit_pure(e, u, arg);
        return;
    }
    check_fp(e, u);
    v_load(e, 0, u->rn);
    xx_imm(e, size == 1 ? SHIFT_W : size == 2 ? SHIFT_D : SHIFT_Q, arg, 0, (unsigned)u->imm);
    v_result(e, u, v_q(u));
}

/* XMM4: 0x00ff in every 16 bits. */
static void low_bytes(struct emit *e) {
    xx(e, PCMPEQW, 4, 4);
    xx_imm(e, SHIFT_W, RIGHT, 4, 8);
}

static void emit_shrn(struct emit *e, const struct uop *u, uint32_t arg) {
    if (v_size(u) != 0 || v_q(u)) {
        emit_pure(e, u, arg);
        return;
    }
    check_fp(e, u);
    v_load(e, 0, u->rn);
    if (arg)
        xx_imm(e, SHIFT_W, RIGHT, 0, (unsigned)u->imm);
    low_bytes(e);
    xx(e, PAND, 0, 4);
    xx(e, PACKUSWB, 0, 0);
    v_result(e, u, false);
}

/* Neighbouring bytes: of the first operand in the lower half, of the second in the upper. */
static void emit_pairwise(struct emit *e, const struct uop *u, uint32_t arg) {
    if (v_size(u) != 0 || !v_q(u)) {
        emit_pure(e, u, arg);
        return;
    }
    check_fp(e, u);
    low_bytes(e);
    for (unsigned half = 0; half < 2; half++) {
        unsigned x = 2 * half;
        v_load(e, x, half ? u->rm : u->rn);
        x_copy(e, x + 1, x);
        xx_imm(e, SHIFT_W, RIGHT, x + 1, 8);
        xx(e, lanes[arg][0], x, x + 1);
        xx(e, PAND, x, 4);
    }
    xx(e, PACKUSWB, 0, 2);
    v_store(e, 0, u->rd);
}

static void emit_ext(struct emit *e, const struct uop *u, uint32_t arg) {
    if (!v_q(u) || !has_sse42()) {
        emit_pure(e, u, arg);
        return;
    }
    check_fp(e, u);
    v_load(e, 0, u->rm);
    v_load(e, 1, u->rn);
    xx_imm(e, PALIGNR, 0, 1, bits(u->insn, 11, 4));
    v_store(e, 0, u->rd);
}

/* ---- Between general and vector registers ------------------------------------------------------------------------ */

static void emit_dup_general(struct emit *e, const struct uop *u, uint32_t arg) {
    check_fp(e, u);
    unsigned n = use(e, u->rn);
    switch (v_size(u)) {
    case 0:
        op_rr(e, 0, 0x0fb6 | BYTE_REG, RAX, n);
        mov_imm(e, RCX, 0x0101010101010101);
        op_rr(e, 1, 0x0faf, RAX, RCX);
        break;
    case 1:
        op_rr(e, 0, 0x0fb7, RAX, n);
        mov_imm(e, RCX, 0x0001000100010001);
        op_rr(e, 1, 0x0faf, RAX, RCX);
        break;
    case 2:
        mov(e, 0, RAX, n);
        mov(e, 1, RCX, RAX);
        shift(e, 1, SHL, RCX, 32);
        alu(e, 1, OR, RAX, RCX);
        break;
    default: mov(e, 1, RAX, n);
    }
    op_rr(e, 1, MOVD_TO, 0, RAX);
    if (v_q(u))
        xx(e, PUNPCKLQDQ, 0, 0);
    v_store(e, 0, u->rd);
}

/* arg: SIGNED_LANE when the result is extended by its sign. */
static void emit_umov(struct emit *e, const struct uop *u, uint32_t arg) {
    check_fp(e, u);
    unsigned d = def(e, u->rd), size = v_size(u), wide = arg && v_q(u);
    int32_t at = V_AT(u->rn) + (int32_t)(u->imm << size);
    static const uint32_t plain[] = {0x0fb6, 0x0fb7, 0x8b, 0x8b}, extended[] = {0x0fbe, 0x0fbf, 0x63, 0x8b};
    op_rm(e, size == 3 || wide, arg ? extended[size] : plain[size], d, CPU, at);
}

static void emit_insert_general(struct emit *e, const struct uop *u, uint32_t arg) {
    check_fp(e, u);
    unsigned n = use(e, u->rn), size = v_size(u);
    static const uint32_t stores[] = {0x88 | BYTE_REG, 0x660089, 0x89, 0x89};
    op_rm(e, size == 3, stores[size], n, CPU, V_AT(u->rd) + (int32_t)(u->imm << size));
    v_forget(e, u->rd);
}

static void emit_fmov_to_x(struct emit *e, const struct uop *u, uint32_t arg) { /* arg: log2 of bytes, 8: upper half */
    check_fp(e, u);
    load(e, (arg & 7) == 3, def(e, u->rd), CPU, V_AT(u->rn) + (arg & 8 ? 8 : 0));
}

static void emit_fmov_from_x(struct emit *e, const struct uop *u, uint32_t arg) {
    check_fp(e, u);
    unsigned n = use(e, u->rn);
    if (arg & 8) {
        store(e, 1, n, CPU, V_AT(u->rd) + 8);
        v_forget(e, u->rd);
        return;
    }
    op_rr(e, (arg & 7) == 3, MOVD_TO, 0, n);
    v_store(e, 0, u->rd);
}

/* ---- Cryptography ------------------------------------------------------------------------------------------------ */

enum { AESE, AESD, AESMC, AESIMC_, SHA256H, SHA256H2, SHA256SU0, SHA256SU1 };

/* AESE is the x86 last round with the key added before, not after; MixColumns a round after a last inverse one. */
static void emit_aes(struct emit *e, const struct uop *u, uint32_t arg) {
    if (!__builtin_cpu_supports("aes")) {
        emit_pure(e, u, arg);
        return;
    }
    check_fp(e, u);
    v_load(e, 0, u->rn);
    xx(e, PXOR, 2, 2);
    switch (arg) {
    case AESE:
    case AESD:
        v_load(e, 1, u->rd);
        xx(e, PXOR, 0, 1);
        xx(e, arg == AESE ? AESENCLAST : AESDECLAST, 0, 2);
        break;
    case AESMC:
        xx(e, AESDECLAST, 0, 2);
        xx(e, AESENC, 0, 2);
        break;
    default: xx(e, AESIMC, 0, 0);
    }
    v_store(e, 0, u->rd);
}

/* x86 keeps the state as (f, e, b, a) and (h, g, d, c), lowest word first, and does two rounds at a time. */
static void emit_sha256_rounds(struct emit *e, const struct uop *u, uint32_t arg) {
    if (!has_sha()) {
        emit_pure(e, u, arg);
        return;
    }
    check_fp(e, u);
    bool second = arg == SHA256H2;
    v_load(e, 1, second ? u->rn : u->rd); /* a, b, c, d */
    v_load(e, 2, second ? u->rd : u->rn); /* e, f, g, h */
    v_load(e, 0, u->rm);
    xx_imm(e, PSHUFD, 1, 1, 0xb1);
    xx_imm(e, PSHUFD, 2, 2, 0xb1);
    x_copy(e, 3, 2);
    xx(e, PUNPCKHQDQ, 3, 1); /* h, g, d, c */
    xx(e, PUNPCKLQDQ, 2, 1); /* f, e, b, a */
    xx(e, SHA256RNDS2, 3, 2);
    xx_imm(e, PSHUFD, 0, 0, 0x0e);
    xx(e, SHA256RNDS2, 2, 3);
    xx(e, second ? PUNPCKLQDQ : PUNPCKHQDQ, 2, 3);
    xx_imm(e, PSHUFD, 0, 2, 0xb1);
    v_store(e, 0, u->rd);
}

static void emit_sha256_schedule(struct emit *e, const struct uop *u, uint32_t arg) {
    if (!has_sha()) {
        emit_pure(e, u, arg);
        return;
    }
    check_fp(e, u);
    v_load(e, 0, u->rd);
    v_load(e, 1, u->rn);
    if (arg == SHA256SU0) {
        xx(e, SHA256MSG1, 0, 1);
    } else {
        v_load(e, 2, u->rm);
        x_copy(e, 3, 2);
        xx_imm(e, PALIGNR, 3, 1, 4);
        xx(e, PADDD, 0, 3);
        xx(e, SHA256MSG2, 0, 2);
    }
    v_store(e, 0, u->rd);
}

static void emit_pmull(struct emit *e, const struct uop *u, uint32_t arg) {
    if (!__builtin_cpu_supports("pclmul")) {
        emit_pure(e, u, arg);
        return;
    }
    check_fp(e, u);
    v_load(e, 0, u->rn);
    v_load(e, 1, u->rm);
    xx_imm(e, PCLMULQDQ, 0, 1, v_q(u) ? 0x11 : 0x00);
    v_store(e, 0, u->rd);
}

/* ---- Scalar floating point --------------------------------------------------------------------------------------- */

/*
 * In line is what fpu.h calls its fast path, a little narrower: round to nearest, nothing flushed, inexactness already
 * noted, and a result that is far from the ends of the range. All else is the op's.
 */
enum { DOUBLE = 1, NEAR_ENDS = 2 /* a tiny result does no harm */, WHAT = 3 /* and the rest: the opcode ... */ };
static void usual_mode(struct emit *e, struct outlined *o) {
    op_rm(e, 0, 0xf7, 0, CPU, AT(fpcr)); /* TEST */
    word32(e, FPCR_RMODE | FPCR_FZ);
    also_from(o, jcc(e, NE));
    op_rm(e, 0, 0xf6, 0, CPU, AT(fpsr));
    byte(e, FPSR_IXC);
    also_from(o, jcc(e, E));
}

/* XMM0's exponent: not of infinities and NaNs; nor, when `tiny` matters, of zeros, denormals and the first binade. */
static void usual_result(struct emit *e, struct outlined *o, bool is_double, bool tiny) {
    unsigned top = is_double ? 0x7ff : 0xff;
    op_rr(e, is_double, MOVD_FROM, 0, RAX);
    shift(e, is_double, SHR, RAX, is_double ? 52 : 23);
    alu_imm(e, 0, AND, RAX, (int32_t)top);
    if (tiny)
        alu_imm(e, 0, SUB, RAX, 2);
    alu_imm(e, 0, CMP, RAX, (int32_t)top - (tiny ? 2 : 0));
    also_from(o, jcc(e, AE));
}

static void s_load(struct emit *e, unsigned xmm, unsigned v, bool is_double) {
    unsigned copy = v_copy(e, v);
    if (copy == NO_REG) {
        op_rm(e, 0, is_double ? MOVSD : MOVSS, xmm, CPU, V_AT(v));
    } else if (is_double) {
        xx(e, MOVQ, xmm, copy);
    } else {
        xx(e, PXOR, xmm, xmm);
        xx(e, MOVSS, xmm, copy);
    }
}

static void emit_arithmetic(struct emit *e, const struct uop *u, uint32_t arg) {
    check_fp(e, u);
    bool is_double = arg & DOUBLE;
    struct outlined *o = slow_call(e, u);
    usual_mode(e, o);
    uint32_t op = (is_double ? 0xf20f00u : 0xf30f00u) | arg >> WHAT;
    if (arg >> WHAT == 0x51) { /* SQRT */
        s_load(e, 0, u->rn, is_double);
        xx(e, op, 0, 0);
    } else {
        s_load(e, 0, u->rn, is_double);
        unsigned m = v_copy(e, u->rm);
        if (m == NO_REG)
            op_rm(e, 0, op, 0, CPU, V_AT(u->rm));
        else
            xx(e, op, 0, m);
    }
    usual_result(e, o, is_double, !(arg & NEAR_ENDS));
    v_store(e, 0, u->rd);
    comes_back(e, o);
}

/* Flags of an ordered comparison; the rest, and whatever sets flags, is the op's. */
static void emit_fcmp(struct emit *e, const struct uop *u, uint32_t arg) {
    check_fp(e, u);
    bool is_double = arg & DOUBLE, zero = arg >> WHAT;
    struct outlined *o = slow_call(e, u);
    o->sets_flags = true;
    op_rm(e, 0, 0xf7, 0, CPU, AT(fpcr));
    word32(e, FPCR_FZ);
    also_from(o, jcc(e, NE));
    s_load(e, 0, u->rn, is_double);
    if (zero)
        xx(e, PXOR, 1, 1);
    else
        s_load(e, 1, u->rm, is_double);
    xx(e, is_double ? 0x660f2e : 0x0f2e, 0, 1); /* UCOMI */
    also_from(o, jcc(e, P));
    byte(e, 0x9f); /* LAHF: Z and the inverted C are there, N is the latter, V is clear */
    alu_imm(e, 0, AND, RAX, RAW_Z | RAW_NOT_C);
    mov(e, 0, FLAGS, RAX);
    shift(e, 0, SHL, RAX, 7);
    alu(e, 0, OR, FLAGS, RAX);
    e->regs.flags = FLAGS_IN_REG;
    e->host_flags = false;
    comes_back(e, o);
}

static void emit_fcsel(struct emit *e, const struct uop *u, uint32_t arg) {
    unsigned arm = bits(u->insn, 12, 4);
    check_fp(e, u);
    e->host_flags = false;
    if (arm >= 14) {
        load(e, arg, RCX, CPU, V_AT(u->rn));
    } else {
        unsigned holds = condition(e, arm);
        load(e, arg, RCX, CPU, V_AT(u->rm));
        op_rm(e, arg, 0x0f40 | holds, RCX, CPU, V_AT(u->rn));
    }
    op_rr(e, arg, MOVD_TO, 0, RCX);
    v_store(e, 0, u->rd);
}

enum { FMOV, FABS, FNEG }; /* ... or which */
static void emit_sign(struct emit *e, const struct uop *u, uint32_t arg) {
    check_fp(e, u);
    bool is_double = arg & DOUBLE;
    if (arg >> WHAT == FMOV) {
        s_load(e, 0, u->rn, is_double);
    } else {
        load(e, is_double, RAX, CPU, V_AT(u->rn));
        op_rr(e, is_double, 0x0fba, arg >> WHAT == FABS ? 6 : 7, RAX); /* BTR, BTC */
        byte(e, is_double ? 63 : 31);
        op_rr(e, is_double, MOVD_TO, 0, RAX);
    }
    v_store(e, 0, u->rd);
}

/* FCVT between single and double. */
static void emit_fcvt(struct emit *e, const struct uop *u, uint32_t arg) {
    check_fp(e, u);
    bool to_double = arg & DOUBLE;
    struct outlined *o = slow_call(e, u);
    usual_mode(e, o);
    s_load(e, 1, u->rn, !to_double);
    xx(e, PXOR, 0, 0);
    xx(e, to_double ? 0xf30f5a : 0xf20f5a, 0, 1);
    usual_result(e, o, to_double, true);
    v_store(e, 0, u->rd);
    comes_back(e, o);
}

/* SCVTF, UCVTF to double of what it holds exactly: 32 bits, or a 64-bit integer of no more than 53. */
static void emit_from_int(struct emit *e, const struct uop *u, uint32_t arg) {
    check_fp(e, u);
    bool wide = bits(u->insn, 31, 1), is_unsigned = bits(u->insn, 16, 1);
    if (!bits(u->insn, 21, 1)) { /* fixed point */
        call_kept(e, u);
        return;
    }
    unsigned n = use(e, u->rn);
    struct outlined *o = slow_call(e, u);
    if (wide) {
        mov(e, 1, RAX, n);
        mov_imm(e, RCX, UINT64_C(1) << 52);
        alu(e, 1, ADD, RAX, RCX);
        shift(e, 1, SHR, RAX, 53);
        also_from(o, jcc(e, NE));
        mov(e, 1, RAX, n);
        if (is_unsigned) {
            test(e, 1, RAX, RAX);
            also_from(o, jcc(e, S));
        }
    } else if (is_unsigned) {
        mov(e, 0, RAX, n);
    } else {
        op_rr(e, 1, 0x63, RAX, n);
    }
    xx(e, PXOR, 0, 0);
    op_rr(e, 1, 0xf20f2a, 0, RAX);
    v_store(e, 0, u->rd);
    comes_back(e, o);
}

/* FCVTZS, FCVTZU of what a 32-bit integer holds, truncated. */
static void emit_to_int(struct emit *e, const struct uop *u, uint32_t arg) {
    bool wide = bits(u->insn, 31, 1), is_unsigned = bits(u->insn, 16, 1), is_double = arg & DOUBLE;
    if (bits(u->insn, 19, 2) != ROUND_ZERO || bits(u->insn, 18, 1) || !bits(u->insn, 21, 1)) { /* or fixed point */
        call_kept(e, u);
        return;
    }
    check_fp(e, u);
    unsigned d = reserve(e, u->rd);
    struct outlined *o = slow_call(e, u);
    usual_mode(e, o);
    op_rm(e, 1, is_double ? 0xf20f2c : 0xf30f2c, RAX, CPU, V_AT(u->rn));
    op_rr(e, 1, 0x63, RCX, RAX);
    alu(e, 1, CMP, RCX, RAX);
    also_from(o, jcc(e, NE));
    if (is_unsigned) {
        test(e, 1, RAX, RAX);
        also_from(o, jcc(e, S));
    }
    mov(e, wide, d, RAX);
    dirty(e, u->rd);
    comes_back(e, o);
}

/* ---- The table: the last entry for an op counts ------------------------------------------------------------------ */

#define BOTH(name, emitter, arg)                                                                                       \
    {p_##name##_s, emitter, arg, TRAPS | NO_RD}, {p_##name##_d, emitter, (arg) | DOUBLE, TRAPS | NO_RD}
#define COMPARE(name, arg)                                                                                             \
    {p_##name##_s, emit_fcmp, arg, SETS | TRAPS | NO_RD},                                                              \
        {p_##name##_d, emit_fcmp, (arg) | DOUBLE, SETS | TRAPS | NO_RD}
#define OPCODE(last_byte) ((last_byte) << WHAT)
#define LANES(name, which) {p_v_##name, emit_lanes, which, TRAPS | NO_RD}

const struct emitter jit_x64_simd[] = {
#define A64(row_name, pattern, form, op) {p_##op, emit_pure, 0, TRAPS | NO_RD},
#include "a64_crypto.def"
#include "a64_simd.def"
#undef A64
    {p_v_umov, emit_umov, 0, TRAPS},
    {p_v_smov, emit_umov, 1, TRAPS},
    {p_v_dup_general, emit_dup_general, 0, TRAPS | NO_RD},
    {p_v_insert_general, emit_insert_general, 0, TRAPS | NO_RD},
    LANES(and, L_AND),
    LANES(orr, L_OR),
    LANES(eor, L_XOR),
    LANES(add, L_ADD),
    LANES(sub, L_SUB),
    LANES(cmeq, L_CMEQ),
    LANES(cmgt, L_CMGT),
    LANES(umax, L_UMAX),
    LANES(smax, L_SMAX),
    LANES(umin, L_UMIN),
    LANES(smin, L_SMIN),
    LANES(mul, L_MUL),
    LANES(zip1, L_ZIP1),
    LANES(zip2, L_ZIP2),
    {p_v_bic, emit_andn, 0, TRAPS | NO_RD},
    {p_v_cmhs, emit_cmhs, 0, TRAPS | NO_RD},
    {p_v_cmhi, emit_cmhs, 1, TRAPS | NO_RD},
    {p_v_cmeq_zero, emit_with_zero, L_CMEQ, TRAPS | NO_RD},
    {p_v_cmgt_zero, emit_with_zero, L_CMGT, TRAPS | NO_RD},
    {p_v_cmtst, emit_cmtst, 0, TRAPS | NO_RD},
    {p_v_bsl, emit_select_bits, BSL, TRAPS | NO_RD},
    {p_v_bit, emit_select_bits, BIT, TRAPS | NO_RD},
    {p_v_bif, emit_select_bits, BIF, TRAPS | NO_RD},
    {p_v_not, emit_not, 0, TRAPS | NO_RD},
    {p_v_mov_imm, emit_mov_imm_v, 1, TRAPS | NO_RD},
    {p_v_shl, emit_shift_v, LEFT, TRAPS | NO_RD},
    {p_v_ushr, emit_shift_v, RIGHT, TRAPS | NO_RD},
    {p_v_sshr, emit_shift_v, ARITHMETIC, TRAPS | NO_RD},
    {p_v_shrn, emit_shrn, 1, TRAPS | NO_RD},
    {p_v_xtn, emit_shrn, 0, TRAPS | NO_RD},
    {p_v_addp, emit_pairwise, L_ADD, TRAPS | NO_RD},
    {p_v_umaxp, emit_pairwise, L_UMAX, TRAPS | NO_RD},
    {p_v_uminp, emit_pairwise, L_UMIN, TRAPS | NO_RD},
    {p_v_ext, emit_ext, 0, TRAPS | NO_RD},
    {p_aese, emit_aes, AESE, TRAPS | NO_RD},
    {p_aesd, emit_aes, AESD, TRAPS | NO_RD},
    {p_aesmc, emit_aes, AESMC, TRAPS | NO_RD},
    {p_aesimc, emit_aes, AESIMC_, TRAPS | NO_RD},
    {p_sha256h, emit_sha256_rounds, SHA256H, TRAPS | NO_RD},
    {p_sha256h2, emit_sha256_rounds, SHA256H2, TRAPS | NO_RD},
    {p_sha256su0, emit_sha256_schedule, SHA256SU0, TRAPS | NO_RD},
    {p_sha256su1, emit_sha256_schedule, SHA256SU1, TRAPS | NO_RD},
    {p_pmull64, emit_pmull, 0, TRAPS | NO_RD},
    BOTH(frintn, emit_pure, 0),
    BOTH(frintp, emit_pure, 0),
    BOTH(frintm, emit_pure, 0),
    BOTH(frintz, emit_pure, 0),
    BOTH(frinta, emit_pure, 0),
    BOTH(frintx, emit_pure, 0),
    BOTH(frinti, emit_pure, 0),
    BOTH(fmax, emit_pure, 0),
    BOTH(fmin, emit_pure, 0),
    BOTH(fmaxnm, emit_pure, 0),
    BOTH(fminnm, emit_pure, 0),
    BOTH(fnmul, emit_pure, 0),
    BOTH(fmadd, emit_pure, 0),
    BOTH(fmsub, emit_pure, 0),
    BOTH(fnmadd, emit_pure, 0),
    BOTH(fnmsub, emit_pure, 0),
    {p_fcvt_hs, emit_pure, 0, TRAPS | NO_RD},
    {p_fcvt_hd, emit_pure, 0, TRAPS | NO_RD},
    {p_fcvt_sh, emit_pure, 0, TRAPS | NO_RD},
    {p_fcvt_dh, emit_pure, 0, TRAPS | NO_RD},
    BOTH(fadd, emit_arithmetic, OPCODE(0x58) | NEAR_ENDS),
    BOTH(fsub, emit_arithmetic, OPCODE(0x5c) | NEAR_ENDS),
    BOTH(fmul, emit_arithmetic, OPCODE(0x59)),
    BOTH(fdiv, emit_arithmetic, OPCODE(0x5e)),
    BOTH(fsqrt, emit_arithmetic, OPCODE(0x51)),
    BOTH(fmov, emit_sign, FMOV << WHAT),
    BOTH(fabs, emit_sign, FABS << WHAT),
    BOTH(fneg, emit_sign, FNEG << WHAT),
    {p_fcvt_ds, emit_fcvt, DOUBLE, TRAPS | NO_RD},
    {p_fcvt_sd, emit_fcvt, 0, TRAPS | NO_RD},
    {p_fmov_imm, emit_mov_imm_v, 0, TRAPS | NO_RD},
    COMPARE(fcmp, 0),
    COMPARE(fcmpe, 0),
    COMPARE(fcmp_zero, 1 << WHAT),
    COMPARE(fcmpe_zero, 1 << WHAT),
    {p_fcsel_s, emit_fcsel, 0, USES | TRAPS | NO_RD},
    {p_fcsel_d, emit_fcsel, 1, USES | TRAPS | NO_RD},
    {p_fcvt_int_s, emit_to_int, 0, TRAPS},
    {p_fcvt_int_d, emit_to_int, DOUBLE, TRAPS},
    {p_cvtf_s, emit_kept, 0, TRAPS | NO_RD},
    {p_cvtf_d, emit_from_int, 0, TRAPS | NO_RD},
    {p_fmov_ws, emit_fmov_to_x, 2, TRAPS},
    {p_fmov_xd, emit_fmov_to_x, 3, TRAPS},
    {p_fmov_x_high, emit_fmov_to_x, 3 | 8, TRAPS},
    {p_fmov_sw, emit_fmov_from_x, 2, TRAPS | NO_RD},
    {p_fmov_dx, emit_fmov_from_x, 3, TRAPS | NO_RD},
    {p_fmov_high_x, emit_fmov_from_x, 3 | 8, TRAPS | NO_RD},
    {NULL, NULL, 0, 0},
};

#endif
