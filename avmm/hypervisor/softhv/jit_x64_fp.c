/* x86-64 code for scalar floating point. */
#include "jit_x64_simd.h"

#ifdef JIT_X64

#define A64(row_name, pattern, form, op) bool p_##op(struct vcpu *c, const struct uop *u);
#define A64_END(row_name, pattern, form, op) A64(row_name, pattern, form, op)
#include "a64_fp.def"
#undef A64
#undef A64_END

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

/* ---- To and from general registers ------------------------------------------------------------------------------- */

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

/* ---- The table: the last entry for an op counts ------------------------------------------------------------------ */

#define BOTH(name, emitter, arg)                                                                                       \
    {p_##name##_s, emitter, arg, TRAPS | NO_RD}, {p_##name##_d, emitter, (arg) | DOUBLE, TRAPS | NO_RD}
#define COMPARE(name, arg)                                                                                             \
    {p_##name##_s, emit_fcmp, arg, SETS | TRAPS | NO_RD},                                                              \
        {p_##name##_d, emit_fcmp, (arg) | DOUBLE, SETS | TRAPS | NO_RD}
#define OPCODE(last_byte) ((last_byte) << WHAT)

const struct emitter jit_x64_fp[] = {
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
