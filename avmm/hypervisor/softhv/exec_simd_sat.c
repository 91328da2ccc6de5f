/*
 * Advanced SIMD with saturation, which sets FPSR.QC, and shifts by a register (Arm ARM C4.1.96). Values are computed in
 * full on 128 bits and then cut to the lane. Only the instruction's own lanes are computed, since each can set QC.
 */
#include "exec_simd.h"

/* SignedSatQ, UnsignedSatQ: to 2^size bytes. */
static inline uint64_t saturate_signed(struct vcpu *c, int128 value, unsigned size) {
    int128 limit = (int128)1 << ((8u << size) - 1);
    if (value >= -limit && value < limit)
        return (uint64_t)value;
    c->fpsr |= FPSR_QC;
    return (uint64_t)(value < 0 ? -limit : limit - 1);
}

static inline uint64_t saturate_unsigned(struct vcpu *c, int128 value, unsigned size) {
    int128 limit = (int128)1 << (8u << size);
    if (value >= 0 && value < limit)
        return (uint64_t)value;
    c->fpsr |= FPSR_QC;
    return value < 0 ? 0 : (uint64_t)(limit - 1);
}

/* Not saturating at all, for the shifts that share the loops below. */
static inline uint64_t truncate(struct vcpu *c, int128 value, unsigned size) { return (uint64_t)value; }

/*
 * Left by `shift`, or right when negative, the lane being `width` bits. Past the width every left shift of a value that
 * is not zero is the same: out of every range, with the lane's own bits all zero.
 */
static inline int128 shifted(int128 value, int shift, int width, bool round) {
    if (shift >= width)
        return value == 0 ? 0 : value < 0 ? -((int128)1 << 100) : (int128)1 << 100;
    if (shift >= 0)
        return value * ((int128)1 << shift);
    int right = -shift > 100 ? 100 : -shift;
    return (round ? value + ((int128)1 << (right - 1)) : value) >> right;
}

/* 2ab, of signed lanes. */
static inline int128 doubled(int128 a, int128 b) { return 2 * a * b; }

#define WIDTH (8 << v_size(u))
#define ROUND ((int128)1 << (WIDTH - 1))
#define SHIFT ((int)u->imm)

/* a and b are the operands' lanes as `get_a` and `get_b` read them, d the destination's as get_d does. */
#define SATURATING_OP(name, get_a, get_b, get_d, saturate, expression)                                                 \
    OP_FP(name) {                                                                                                      \
        vreg x = c->v[u->rn], y = v_second(c, u).r, old = c->v[u->rd];                                                 \
        vec r = {0};                                                                                                   \
        for (unsigned i = 0; i < u->ra; i++) {                                                                         \
            int128 a = get_a(&x, v_size(u), i), b = get_b(&y, v_size(u), i), d = get_d(&old, v_size(u), i);            \
            (void)b, (void)d;                                                                                          \
            set_lane(&r.r, v_size(u), i, saturate(c, expression, v_size(u)));                                          \
        }                                                                                                              \
        return v_write_lanes(c, u, r);                                                                                 \
    }
#define SIGNED_OP(name, expression)                                                                                    \
    SATURATING_OP(name, signed_lane, signed_lane, signed_lane, saturate_signed, expression)
#define UNSIGNED_OP(name, expression) SATURATING_OP(name, lane, lane, lane, saturate_unsigned, expression)

SIGNED_OP(v_sqadd, a + b)
UNSIGNED_OP(v_uqadd, a + b)
SIGNED_OP(v_sqsub, a - b)
UNSIGNED_OP(v_uqsub, a - b)
SATURATING_OP(v_suqadd, lane, lane, signed_lane, saturate_signed, d + a)
SATURATING_OP(v_usqadd, signed_lane, lane, lane, saturate_unsigned, d + a)
SIGNED_OP(v_sqabs, a < 0 ? -a : a)
SIGNED_OP(v_sqneg, -a)
SIGNED_OP(v_sqdmulh, doubled(a, b) >> WIDTH)
SIGNED_OP(v_sqrdmulh, (doubled(a, b) + ROUND) >> WIDTH)
SIGNED_OP(v_sqrdmlah, (d * ((int128)1 << WIDTH) + doubled(a, b) + ROUND) >> WIDTH)
SIGNED_OP(v_sqrdmlsh, (d * ((int128)1 << WIDTH) - doubled(a, b) + ROUND) >> WIDTH)

/* ---- Shifts ------------------------------------------------------------------------------------------------------ */

/* By the signed low byte of the second operand's lane. */
#define BY_REGISTER(round) shifted(a, (int8_t)b, WIDTH, round)
SATURATING_OP(v_sshl, signed_lane, lane, lane, truncate, BY_REGISTER(false))
SATURATING_OP(v_ushl, lane, lane, lane, truncate, BY_REGISTER(false))
SATURATING_OP(v_srshl, signed_lane, lane, lane, truncate, BY_REGISTER(true))
SATURATING_OP(v_urshl, lane, lane, lane, truncate, BY_REGISTER(true))
SATURATING_OP(v_sqshl, signed_lane, lane, lane, saturate_signed, BY_REGISTER(false))
SATURATING_OP(v_uqshl, lane, lane, lane, saturate_unsigned, BY_REGISTER(false))
SATURATING_OP(v_sqrshl, signed_lane, lane, lane, saturate_signed, BY_REGISTER(true))
SATURATING_OP(v_uqrshl, lane, lane, lane, saturate_unsigned, BY_REGISTER(true))

SATURATING_OP(v_sqshl_imm, signed_lane, lane, lane, saturate_signed, shifted(a, SHIFT, WIDTH, false))
SATURATING_OP(v_uqshl_imm, lane, lane, lane, saturate_unsigned, shifted(a, SHIFT, WIDTH, false))
SATURATING_OP(v_sqshlu_imm, signed_lane, lane, lane, saturate_unsigned, shifted(a, SHIFT, WIDTH, false))

/* ---- Half the width ---------------------------------------------------------------------------------------------- */

/* Of a scalar the lanes above the first are zero: r is, and Q is clear. */
#define NARROW_OP(name, get, saturate, expression)                                                                     \
    OP_FP(name) {                                                                                                      \
        vreg x = c->v[u->rn];                                                                                          \
        vec r = {0};                                                                                                   \
        for (unsigned i = 0; i < u->ra; i++) {                                                                         \
            int128 a = get(&x, v_size(u) + 1, i);                                                                      \
            set_lane(&r.r, v_size(u), i, saturate(c, expression, v_size(u)));                                          \
        }                                                                                                              \
        return v_write_half(c, u, r.d[0]);                                                                             \
    }
NARROW_OP(v_sqxtn, signed_lane, saturate_signed, a)
NARROW_OP(v_sqxtun, signed_lane, saturate_unsigned, a)
NARROW_OP(v_uqxtn, lane, saturate_unsigned, a)
NARROW_OP(v_sqshrn, signed_lane, saturate_signed, shifted(a, -SHIFT, 2 * WIDTH, false))
NARROW_OP(v_sqshrun, signed_lane, saturate_unsigned, shifted(a, -SHIFT, 2 * WIDTH, false))
NARROW_OP(v_uqshrn, lane, saturate_unsigned, shifted(a, -SHIFT, 2 * WIDTH, false))
NARROW_OP(v_sqrshrn, signed_lane, saturate_signed, shifted(a, -SHIFT, 2 * WIDTH, true))
NARROW_OP(v_sqrshrun, signed_lane, saturate_unsigned, shifted(a, -SHIFT, 2 * WIDTH, true))
NARROW_OP(v_uqrshrn, lane, saturate_unsigned, shifted(a, -SHIFT, 2 * WIDTH, true))

/* ---- Twice the width: the product saturates before it is accumulated, and so does the sum ------------------------ */

#define LONG_OP(name, expression)                                                                                      \
    OP_FP(name) {                                                                                                      \
        vreg x = v_half(u, v_load(c, u->rn)).r, y = v_half(u, v_second(c, u)).r, old = c->v[u->rd];                    \
        vec r = {0};                                                                                                   \
        unsigned wide = v_size(u) + 1;                                                                                 \
        for (unsigned i = 0; i < u->ra; i++) {                                                                         \
            int128 a = signed_lane(&x, v_size(u), i), b = signed_lane(&y, v_size(u), i);                               \
            int128 d = signed_lane(&old, wide, i), product = wide == 3                                                 \
                ? (int64_t)saturate_signed(c, doubled(a, b), wide) : (int32_t)saturate_signed(c, doubled(a, b), wide); \
            (void)d;                                                                                                   \
            set_lane(&r.r, wide, i, saturate_signed(c, expression, wide));                                             \
        }                                                                                                              \
        return v_write_lanes(c, u, r);                                                                                 \
    }
LONG_OP(v_sqdmull, product)
LONG_OP(v_sqdmlal, d + product)
LONG_OP(v_sqdmlsl, d - product)
