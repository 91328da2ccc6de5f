/*
 * Scalar floating point (Arm ARM C4.1.96). A result fills its register's low bits and clears the rest.
 */
#include "engine.h"

/* ---- Forms ------------------------------------------------------------------------------------------------------- */

bool form_fp(struct uop *u, uint32_t i) {
    u->rd = bits(i, 0, 5);
    u->rn = bits(i, 5, 5);
    u->rm = bits(i, 16, 5);
    u->ra = bits(i, 10, 5);
    return true;
}

/* aux: the condition as a set of NZCV values; imm: what NZCV becomes when it fails. */
bool form_fp_ccmp(struct uop *u, uint32_t i) {
    u->aux = condition_sets[bits(i, 12, 4)];
    u->imm = bits(i, 0, 4) << 28;
    return form_fp(u, i);
}

bool form_fp_csel(struct uop *u, uint32_t i) {
    u->aux = condition_sets[bits(i, 12, 4)];
    return form_fp(u, i);
}

/* VFPExpandImm: sign, three bits of exponent around the bias, four of fraction. */
uint64_t fp_expand_imm(unsigned imm8, bool is_double) {
    uint64_t sign = imm8 >> 7 & 1, high = imm8 >> 6 & 1, low = imm8 & 0x3f;
    if (is_double)
        return sign << 63 | (high ? 0x3fcull : 0x400ull) << 52 | low << 48;
    return sign << 31 | (high ? 0x7cull : 0x80ull) << 23 | low << 19;
}

bool form_fp_imm(struct uop *u, uint32_t i) {
    u->rd = bits(i, 0, 5);
    u->imm = fp_expand_imm(bits(i, 13, 8), bits(i, 22, 1));
    return true;
}

bool form_fp_to_general(struct uop *u, uint32_t i) {
    u->rd = reg_dst(i, 0);
    u->rn = bits(i, 5, 5);
    return true;
}

bool form_fp_from_general(struct uop *u, uint32_t i) {
    u->rd = bits(i, 0, 5);
    u->rn = reg_zr(i, 5);
    return true;
}

/* Conversions: the rounding mode in aux, and these; the number of fraction bits in imm. */
enum { CVT_MODE = 7, CVT_SIGNED = 8, CVT_WIDE = 16 };

static uint32_t cvt_integer(uint32_t i) {
    return (bits(i, 16, 1) ? 0 : CVT_SIGNED) | (bits(i, 31, 1) ? CVT_WIDE : 0);
}

/* A 32-bit register has no more than 32 fraction bits. */
static bool cvt_fraction(struct uop *u, uint32_t i) {
    u->imm = 64 - bits(i, 10, 6);
    return bits(i, 31, 1) || bits(i, 15, 1);
}

bool form_fp_to_int(struct uop *u, uint32_t i) {
    u->aux = cvt_integer(i) | (bits(i, 18, 1) ? ROUND_TIEAWAY : bits(i, 19, 2));
    return form_fp_to_general(u, i);
}

bool form_fp_to_fixed(struct uop *u, uint32_t i) {
    u->aux = cvt_integer(i) | ROUND_ZERO;
    return form_fp_to_general(u, i) && cvt_fraction(u, i);
}

bool form_fp_from_int(struct uop *u, uint32_t i) {
    u->aux = cvt_integer(i);
    return form_fp_from_general(u, i);
}

bool form_fp_from_fixed(struct uop *u, uint32_t i) {
    return form_fp_from_int(u, i) && cvt_fraction(u, i);
}

/* ---- Operands ---------------------------------------------------------------------------------------------------- */

static inline bool put(struct vcpu *c, const struct uop *u, uint64_t value) {
    c->v[u->rd].d[0] = value;
    c->v[u->rd].d[1] = 0;
    return true;
}

/* u->aux is a set of NZCV values. */
static inline bool holds(const struct vcpu *c, const struct uop *u) { return u->aux >> (c->nzcv >> 28) & 1; }

/*
 * One op per precision from one expression, in which n, m and a are the operands as they are typed and CALL picks
 * the function of that type from fpu.h.
 */
#define CALL(function, ...) _Generic(n, uint32_t: fp32_##function, uint64_t: fp64_##function)(&c->fpu, __VA_ARGS__)
#define SIGN(n) ((uint64_t)1 << (8 * sizeof(n) - 1))
#define OPERANDS(T, field)                                                                                             \
    T n = c->v[u->rn].field[0], m = c->v[u->rm].field[0], a = c->v[u->ra].field[0];                                    \
    (void)n, (void)m, (void)a
#define FP_OP(name, value)                                                                                             \
    OP_FP(name##_s) {                                                                                                  \
        OPERANDS(uint32_t, s);                                                                                         \
        return put(c, u, (uint32_t)(value));                                                                           \
    }                                                                                                                  \
    OP_FP(name##_d) {                                                                                                  \
        OPERANDS(uint64_t, d);                                                                                         \
        return put(c, u, value);                                                                                       \
    }

/* ---- Arithmetic -------------------------------------------------------------------------------------------------- */

FP_OP(fmov, n)
FP_OP(fabs, n & ~SIGN(n))
FP_OP(fneg, n ^ SIGN(n))
FP_OP(fsqrt, CALL(sqrt, n))
FP_OP(frintn, CALL(round_int, n, ROUND_TIEEVEN, false))
FP_OP(frintp, CALL(round_int, n, ROUND_POSINF, false))
FP_OP(frintm, CALL(round_int, n, ROUND_NEGINF, false))
FP_OP(frintz, CALL(round_int, n, ROUND_ZERO, false))
FP_OP(frinta, CALL(round_int, n, ROUND_TIEAWAY, false))
FP_OP(frintx, CALL(round_int, n, fp_rounding_mode(&c->fpu), true))
FP_OP(frinti, CALL(round_int, n, fp_rounding_mode(&c->fpu), false))
FP_OP(fmul, CALL(mul, n, m))
FP_OP(fdiv, CALL(div, n, m))
FP_OP(fadd, CALL(add, n, m))
FP_OP(fsub, CALL(sub, n, m))
FP_OP(fmax, CALL(max, n, m))
FP_OP(fmin, CALL(min, n, m))
FP_OP(fmaxnm, CALL(maxnm, n, m))
FP_OP(fminnm, CALL(minnm, n, m))
FP_OP(fnmul, CALL(mul, n, m) ^ SIGN(n))
FP_OP(fmadd, CALL(muladd, a, n, m))
FP_OP(fmsub, CALL(muladd, a, n ^ SIGN(n), m))
FP_OP(fnmadd, CALL(muladd, a ^ SIGN(n), n ^ SIGN(n), m))
FP_OP(fnmsub, CALL(muladd, a ^ SIGN(n), n, m))
FP_OP(fcsel, holds(c, u) ? n : m)

OP_FP(fmov_imm) { return put(c, u, u->imm); }

OP_FP(fcvt_ds) { return put(c, u, fp32_to_fp64(&c->fpu, c->v[u->rn].s[0])); }
OP_FP(fcvt_hs) { return put(c, u, fp32_to_fp16(&c->fpu, c->v[u->rn].s[0])); }
OP_FP(fcvt_sd) { return put(c, u, fp64_to_fp32(&c->fpu, c->v[u->rn].d[0])); }
OP_FP(fcvt_hd) { return put(c, u, fp64_to_fp16(&c->fpu, c->v[u->rn].d[0])); }
OP_FP(fcvt_sh) { return put(c, u, fp16_to_fp32(&c->fpu, c->v[u->rn].h[0])); }
OP_FP(fcvt_dh) { return put(c, u, fp16_to_fp64(&c->fpu, c->v[u->rn].h[0])); }

/* ---- Comparison -------------------------------------------------------------------------------------------------- */

#define COMPARE_OP(name, value)                                                                                        \
    OP_FP(name##_s) {                                                                                                  \
        OPERANDS(uint32_t, s);                                                                                         \
        c->nzcv = value;                                                                                               \
        return true;                                                                                                   \
    }                                                                                                                  \
    OP_FP(name##_d) {                                                                                                  \
        OPERANDS(uint64_t, d);                                                                                         \
        c->nzcv = value;                                                                                               \
        return true;                                                                                                   \
    }

COMPARE_OP(fcmp, CALL(compare, n, m, false) << 28)
COMPARE_OP(fcmpe, CALL(compare, n, m, true) << 28)
COMPARE_OP(fcmp_zero, CALL(compare, n, 0, false) << 28)
COMPARE_OP(fcmpe_zero, CALL(compare, n, 0, true) << 28)
COMPARE_OP(fccmp, holds(c, u) ? CALL(compare, n, m, false) << 28 : (uint32_t)u->imm)
COMPARE_OP(fccmpe, holds(c, u) ? CALL(compare, n, m, true) << 28 : (uint32_t)u->imm)

/* ---- General registers ------------------------------------------------------------------------------------------- */

#define TO_INT(function, value)                                                                                        \
    function(&c->fpu, value, (int)u->imm, u->aux & CVT_SIGNED, u->aux & CVT_WIDE ? 64 : 32, u->aux & CVT_MODE)

OP_FP(fcvt_int_s) {
    c->x[u->rd] = TO_INT(fp32_to_int, c->v[u->rn].s[0]);
    return true;
}

OP_FP(fcvt_int_d) {
    c->x[u->rd] = TO_INT(fp64_to_int, c->v[u->rn].d[0]);
    return true;
}

static inline uint64_t integer_source(const struct vcpu *c, const struct uop *u) {
    uint64_t value = c->x[u->rn];
    if (u->aux & CVT_WIDE)
        return value;
    return u->aux & CVT_SIGNED ? (uint64_t)(int32_t)value : (uint32_t)value;
}

OP_FP(cvtf_s) { return put(c, u, fp32_from_int(&c->fpu, integer_source(c, u), u->aux & CVT_SIGNED, (int)u->imm)); }
OP_FP(cvtf_d) { return put(c, u, fp64_from_int(&c->fpu, integer_source(c, u), u->aux & CVT_SIGNED, (int)u->imm)); }

OP_FP(fmov_ws) {
    c->x[u->rd] = c->v[u->rn].s[0];
    return true;
}

OP_FP(fmov_xd) {
    c->x[u->rd] = c->v[u->rn].d[0];
    return true;
}

OP_FP(fmov_x_high) {
    c->x[u->rd] = c->v[u->rn].d[1];
    return true;
}

OP_FP(fmov_sw) { return put(c, u, (uint32_t)c->x[u->rn]); }
OP_FP(fmov_dx) { return put(c, u, c->x[u->rn]); }

OP_FP(fmov_high_x) {
    c->v[u->rd].d[1] = c->x[u->rn];
    return true;
}
