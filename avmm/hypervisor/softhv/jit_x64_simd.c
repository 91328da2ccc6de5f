/*
 * x86-64 code for Advanced SIMD, and the copies of vector registers. What has no code here is a call of its op that keeps
 * the general registers where they are.
 */
#include "jit_x64_simd.h"

#ifdef JIT_X64

#define A64(row_name, pattern, form, op) bool p_##op(struct vcpu *c, const struct uop *u);
#define A64_END(row_name, pattern, form, op) A64(row_name, pattern, form, op)
#include "a64_simd.def"
#undef A64
#undef A64_END

/* ---- Copies of vector registers ---------------------------------------------------------------------------------- */

enum { FIRST_COPY = 5, COPIES_END = 16 };

unsigned v_copy(struct emit *e, unsigned v) {
    for (unsigned x = FIRST_COPY; x < COPIES_END; x++) {
        if (e->regs.vector[x] == v) {
            e->vector_stamp[x] = e->now;
            return x;
        }
    }
    return NO_REG;
}

unsigned v_new_copy(struct emit *e, unsigned v) {
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

unsigned v_use(struct emit *e, unsigned v) {
    unsigned copy = v_copy(e, v);
    if (copy == NO_REG) {
        copy = v_new_copy(e, v);
        op_rm(e, 0, MOVUPS, copy, CPU, V_AT(v));
    }
    return copy;
}

unsigned v_target(struct emit *e, unsigned v) {
    unsigned copy = v_copy(e, v);
    return copy == NO_REG ? v_new_copy(e, v) : copy;
}

void v_set(struct emit *e, unsigned xmm, unsigned v) {
    op_rm(e, 0, MOVUPS_STORE, xmm, CPU, V_AT(v));
    e->v_number[v] = 0;
}

void v_load(struct emit *e, unsigned xmm, unsigned v) {
    if (e->in_cold)
        op_rm(e, 0, MOVUPS, xmm, CPU, V_AT(v));
    else
        x_copy(e, xmm, v_use(e, v));
}

void v_store(struct emit *e, unsigned xmm, unsigned v) {
    v_set(e, xmm, v);
    if (!e->in_cold)
        x_copy(e, v_target(e, v), xmm);
}

void v_forget(struct emit *e, unsigned v) {
    e->v_number[v] = 0;
    for (unsigned x = FIRST_COPY; x < COPIES_END; x++)
        if (e->regs.vector[x] == v)
            e->regs.vector[x] = NO_GUEST;
}

void v_renumber(struct emit *e) { memset(e->v_number, 0, sizeof e->v_number); }

void v_forget_all(struct emit *e) {
    memset(e->regs.vector, NO_GUEST, sizeof e->regs.vector);
    v_renumber(e);
}

uint32_t v_number(struct emit *e, unsigned v) {
    if (!e->v_number[v])
        e->v_number[v] = ++e->v_numbers;
    return e->v_number[v];
}

static int32_t v_at(unsigned v) {
    return v < V_SCRATCH ? V_AT(v) : AT(v_scratch) + 16 * (int32_t)(v - V_SCRATCH);
}

void v_save(struct emit *e, const struct regs *regs) {
    for (unsigned x = FIRST_COPY; x < COPIES_END; x++)
        if (regs->vector[x] != NO_GUEST && regs->vector[x] >= V_SCRATCH)
            op_rm(e, 0, MOVUPS_STORE, x, CPU, v_at(regs->vector[x]));
}

void v_restore(struct emit *e, const struct outlined *o, bool all) {
    for (unsigned x = FIRST_COPY; x < COPIES_END; x++) {
        unsigned v = o->after.vector[x];
        if (v != NO_GUEST && (all || o->before.vector[x] != v || v == o->u->rd || v == o->u->ra))
            op_rm(e, 0, MOVUPS, x, CPU, v_at(v));
    }
}

/* The result in XMM0: 128 bits, or 64 and zeros. */
static void v_result(struct emit *e, const struct uop *u, bool all) {
    if (!all)
        xx(e, MOVQ, 0, 0);
    v_store(e, 0, u->rd);
}

/* ---- Calls ------------------------------------------------------------------------------------------------------- */

void emit_pure(struct emit *e, const struct uop *u, uint32_t arg) {
    check_fp(e, u);
    call_pure(e, u);
}

void emit_kept(struct emit *e, const struct uop *u, uint32_t arg) { call_kept(e, u); }

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
    unsigned n = v_use(e, u->rn), m = v_use(e, u->rm);
    if (!v_q(u) || (u->rd == u->rm && u->rd != u->rn)) {
        x_copy(e, 0, n);
        xx(e, op, 0, m);
        v_result(e, u, v_q(u));
        return;
    }
    bool moves = u->rn == u->rm && (arg == L_OR || arg == L_AND);
    uint32_t number = moves ? v_number(e, u->rn) : 0;
    unsigned d = v_target(e, u->rd);
    if (d != n)
        x_copy(e, d, n);
    if (!moves)
        xx(e, op, d, m);
    v_set(e, d, u->rd);
    e->v_number[u->rd] = number;
}

/* arg: log2 of the bytes that are reversed. Bytes change places within 16 bits by shifts, 16 bits and 32 by shuffles. */
static void emit_rev_v(struct emit *e, const struct uop *u, uint32_t arg) {
    check_fp(e, u);
    v_load(e, 0, u->rn);
    unsigned size = v_size(u);
    if (size == 0) {
        x_copy(e, 1, 0);
        xx_imm(e, SHIFT_W, LEFT, 0, 8);
        xx_imm(e, SHIFT_W, RIGHT, 1, 8);
        xx(e, POR, 0, 1);
    }
    if (size < 2 && arg > 1) {
        xx_imm(e, 0xf20f70, 0, 0, arg == 2 ? 0xb1 : 0x1b); /* PSHUFLW, PSHUFHW */
        xx_imm(e, 0xf30f70, 0, 0, arg == 2 ? 0xb1 : 0x1b);
    } else if (size == 2) {
        xx_imm(e, PSHUFD, 0, 0, 0xb1);
    }
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

void emit_mov_imm_v(struct emit *e, const struct uop *u, uint32_t arg) {
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

/* ---- The table: the last entry for an op counts ------------------------------------------------------------------ */

#define LANES(name, which) {p_v_##name, emit_lanes, which, TRAPS | NO_RD}

const struct emitter jit_x64_simd[] = {
#define A64(row_name, pattern, form, op) {p_##op, emit_pure, 0, TRAPS | NO_RD},
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
    {p_v_rev16, emit_rev_v, 1, TRAPS | NO_RD},
    {p_v_rev32, emit_rev_v, 2, TRAPS | NO_RD},
    {p_v_rev64, emit_rev_v, 3, TRAPS | NO_RD},
    {NULL, NULL, 0, 0},
};

#endif
