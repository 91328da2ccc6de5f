/*
 * Advanced SIMD on integers, without saturation (Arm ARM C4.1.96): plain loops over lanes for the compiler to vectorise.
 */
#include "exec_simd.h"

/* ---- Bitwise ---------------------------------------------------------------------------------------------------- */

#define BITWISE_OP(name, expression)                                                                                   \
    OP_FP(name) {                                                                                                      \
        vreg x = c->v[u->rn], y = c->v[u->rm], r = c->v[u->rd];                                                        \
        for (unsigned i = 0; i < 2; i++) {                                                                             \
            uint64_t a = x.d[i], b = y.d[i], d = r.d[i];                                                               \
            (void)b, (void)d;                                                                                          \
            r.d[i] = expression;                                                                                       \
        }                                                                                                              \
        return v_write(c, u, r);                                                                                       \
    }

BITWISE_OP(v_and, a & b)
BITWISE_OP(v_bic, a & ~b)
BITWISE_OP(v_orr, a | b)
BITWISE_OP(v_orn, a | ~b)
BITWISE_OP(v_eor, a ^ b)
BITWISE_OP(v_bsl, b ^ ((b ^ a) & d))
BITWISE_OP(v_bit, d ^ ((d ^ a) & b))
BITWISE_OP(v_bif, d ^ ((d ^ a) & ~b))
BITWISE_OP(v_not, ~a)

OP_FP(v_mov_imm) { return v_write(c, u, (vreg){.d = {u->imm, u->imm}}); }

OP_FP(v_orr_imm) {
    vreg r = c->v[u->rd];
    r.d[0] |= u->imm;
    r.d[1] |= u->imm;
    return v_write(c, u, r);
}

/* BIC: the form has inverted the immediate. */
OP_FP(v_and_imm) {
    vreg r = c->v[u->rd];
    r.d[0] &= u->imm;
    r.d[1] &= u->imm;
    return v_write(c, u, r);
}

/* ---- Arithmetic and comparison, lane by lane --------------------------------------------------------------------- */

V_OP(v_add, SIZES_BHSD, LANES_UNSIGNED, a + b)
V_OP(v_sub, SIZES_BHSD, LANES_UNSIGNED, a - b)
V_OP(v_neg, SIZES_BHSD, LANES_UNSIGNED, -(uint64_t)a)
V_OP(v_abs, SIZES_BHSD, LANES_SIGNED, a < 0 ? -(uint64_t)a : (uint64_t)a)
V_ELEMENT_OP(v_mul, SIZES_BHS, LANES_UNSIGNED, (uint64_t)a * b)
V_ELEMENT_OP(v_mla, SIZES_BHS, LANES_UNSIGNED, d + (uint64_t)a * b)
V_ELEMENT_OP(v_mls, SIZES_BHS, LANES_UNSIGNED, d - (uint64_t)a * b)

V_OP(v_cmeq, SIZES_BHSD, LANES_UNSIGNED, -(a == b))
V_OP(v_cmtst, SIZES_BHSD, LANES_UNSIGNED, -((a & b) != 0))
V_OP(v_cmhi, SIZES_BHSD, LANES_UNSIGNED, -(a > b))
V_OP(v_cmhs, SIZES_BHSD, LANES_UNSIGNED, -(a >= b))
V_OP(v_cmgt, SIZES_BHSD, LANES_SIGNED, -(a > b))
V_OP(v_cmge, SIZES_BHSD, LANES_SIGNED, -(a >= b))
V_OP(v_cmeq_zero, SIZES_BHSD, LANES_UNSIGNED, -(a == 0))
V_OP(v_cmgt_zero, SIZES_BHSD, LANES_SIGNED, -(a > 0))
V_OP(v_cmge_zero, SIZES_BHSD, LANES_SIGNED, -(a >= 0))
V_OP(v_cmle_zero, SIZES_BHSD, LANES_SIGNED, -(a <= 0))
V_OP(v_cmlt_zero, SIZES_BHSD, LANES_SIGNED, -(a < 0))

V_OP(v_smax, SIZES_BHS, LANES_SIGNED, a > b ? a : b)
V_OP(v_umax, SIZES_BHS, LANES_UNSIGNED, a > b ? a : b)
V_OP(v_smin, SIZES_BHS, LANES_SIGNED, a < b ? a : b)
V_OP(v_umin, SIZES_BHS, LANES_UNSIGNED, a < b ? a : b)

#define DIFFERENCE (a > b ? (uint64_t)a - (uint64_t)b : (uint64_t)b - (uint64_t)a)
V_OP(v_sabd, SIZES_BHS, LANES_SIGNED, DIFFERENCE)
V_OP(v_uabd, SIZES_BHS, LANES_UNSIGNED, DIFFERENCE)
V_OP(v_saba, SIZES_BHS, LANES_SIGNED, (uint64_t)d + DIFFERENCE)
V_OP(v_uaba, SIZES_BHS, LANES_UNSIGNED, d + DIFFERENCE)

V_OP(v_shadd, SIZES_BHS, LANES_SIGNED, ((int64_t)a + b) >> 1)
V_OP(v_uhadd, SIZES_BHS, LANES_UNSIGNED, ((int64_t)a + b) >> 1)
V_OP(v_srhadd, SIZES_BHS, LANES_SIGNED, ((int64_t)a + b + 1) >> 1)
V_OP(v_urhadd, SIZES_BHS, LANES_UNSIGNED, ((int64_t)a + b + 1) >> 1)
V_OP(v_shsub, SIZES_BHS, LANES_SIGNED, ((int64_t)a - b) >> 1)
V_OP(v_uhsub, SIZES_BHS, LANES_UNSIGNED, ((int64_t)a - b) >> 1)

/* ---- Bits ------------------------------------------------------------------------------------------------------- */

V_OP(v_cnt, SIZES_BHS, LANES_UNSIGNED, __builtin_popcount(a))
V_OP(v_clz, SIZES_BHS, LANES_UNSIGNED, a ? (unsigned)__builtin_clz(a) - 8 * (4 - (unsigned)sizeof(a)) : 8 * sizeof(a))
/* The sign bit aside: with the sign xor-ed away, leading zeros but one. */
V_OP(v_cls, SIZES_BHS, LANES_SIGNED, __builtin_clrsb(a) - 8 * (4 - (int)sizeof(a)))

OP_FP(v_rbit) {
    vreg r = c->v[u->rn];
    for (unsigned i = 0; i < 2; i++) {
        uint64_t v = r.d[i];
        v = (v >> 1 & 0x5555555555555555) | (v & 0x5555555555555555) << 1;
        v = (v >> 2 & 0x3333333333333333) | (v & 0x3333333333333333) << 2;
        r.d[i] = (v >> 4 & 0x0f0f0f0f0f0f0f0f) | (v & 0x0f0f0f0f0f0f0f0f) << 4;
    }
    return v_write(c, u, r);
}

/* Reverses the lanes in each group of 2^group bytes. */
static inline bool reverse(struct vcpu *c, const struct uop *u, unsigned group) {
    vreg x = c->v[u->rn], r;
    unsigned size = v_size(u), last = (1u << (group - size)) - 1;
    for (unsigned i = 0; i < 16u >> size; i++)
        set_lane(&r, size, i, lane(&x, size, i ^ last));
    return v_write(c, u, r);
}

OP_FP(v_rev16) { return reverse(c, u, 1); }
OP_FP(v_rev32) { return reverse(c, u, 2); }
OP_FP(v_rev64) { return reverse(c, u, 3); }

/* Of bytes, and cut to 8 or 16 bits. */
static inline uint16_t polynomial_product(uint8_t a, uint8_t b) {
    unsigned r = 0;
    for (unsigned i = 0; i < 8; i++)
        r ^= b >> i & 1 ? (unsigned)a << i : 0;
    return (uint16_t)r;
}

OP_FP(v_pmul) {
    vreg x = c->v[u->rn], y = c->v[u->rm], r;
    for (unsigned i = 0; i < 16; i++)
        r.b[i] = (uint8_t)polynomial_product(x.b[i], y.b[i]);
    return v_write(c, u, r);
}

OP_FP(v_pmull) {
    vreg x = v_half(u, c->v[u->rn]), y = v_half(u, c->v[u->rm]), r;
    for (unsigned i = 0; i < 8; i++)
        r.h[i] = polynomial_product(x.b[i], y.b[i]);
    return v_write_lanes(c, u, r);
}

/* ---- Shifts by an immediate: right by 1 to the lane's width, left by less than that --------------------------------- */

#define SHIFT ((unsigned)u->imm)
/* In two steps, for a shift by the whole width. */
#define SHIFTED (a >> (SHIFT - 1) >> 1)
#define ROUNDED (SHIFTED + (a >> (SHIFT - 1) & 1))
#define ONES ((uint64_t)-1 >> (64 - 8 * sizeof(a)))
V_OP(v_sshr, SIZES_BHSD, LANES_SIGNED, SHIFTED)
V_OP(v_ushr, SIZES_BHSD, LANES_UNSIGNED, SHIFTED)
V_OP(v_ssra, SIZES_BHSD, LANES_SIGNED, (uint64_t)d + (uint64_t)SHIFTED)
V_OP(v_usra, SIZES_BHSD, LANES_UNSIGNED, d + SHIFTED)
V_OP(v_srshr, SIZES_BHSD, LANES_SIGNED, ROUNDED)
V_OP(v_urshr, SIZES_BHSD, LANES_UNSIGNED, ROUNDED)
V_OP(v_srsra, SIZES_BHSD, LANES_SIGNED, (uint64_t)d + (uint64_t)ROUNDED)
V_OP(v_ursra, SIZES_BHSD, LANES_UNSIGNED, d + ROUNDED)
V_OP(v_sri, SIZES_BHSD, LANES_UNSIGNED, (d & ~(ONES >> (SHIFT - 1) >> 1)) | SHIFTED)
V_OP(v_shl, SIZES_BHSD, LANES_UNSIGNED, (uint64_t)a << SHIFT)
V_OP(v_sli, SIZES_BHSD, LANES_UNSIGNED, (d & ~(ONES << SHIFT)) | (uint64_t)a << SHIFT)

V_LONG_OP(v_sshll, LONG_SIGNED, (uint64_t)a << SHIFT)
V_LONG_OP(v_ushll, LONG_UNSIGNED, (uint64_t)a << SHIFT)
V_LONG_OP(v_shll, LONG_UNSIGNED, (uint64_t)a << (4 * sizeof(a)))

/* ---- Twice the width ---------------------------------------------------------------------------------------------- */

V_LONG_OP(v_saddl, LONG_SIGNED, (uint64_t)a + (uint64_t)b)
V_LONG_OP(v_uaddl, LONG_UNSIGNED, a + b)
V_LONG_OP(v_ssubl, LONG_SIGNED, (uint64_t)a - (uint64_t)b)
V_LONG_OP(v_usubl, LONG_UNSIGNED, a - b)
V_LONG_OP(v_sabdl, LONG_SIGNED, DIFFERENCE)
V_LONG_OP(v_uabdl, LONG_UNSIGNED, DIFFERENCE)
V_LONG_OP(v_sabal, LONG_SIGNED, d + DIFFERENCE)
V_LONG_OP(v_uabal, LONG_UNSIGNED, d + DIFFERENCE)
V_LONG_OP(v_smull, LONG_SIGNED, a * b)
V_LONG_OP(v_umull, LONG_UNSIGNED, (uint64_t)a * b)
V_LONG_OP(v_smlal, LONG_SIGNED, d + (uint64_t)(a * b))
V_LONG_OP(v_umlal, LONG_UNSIGNED, d + (uint64_t)a * b)
V_LONG_OP(v_smlsl, LONG_SIGNED, d - (uint64_t)(a * b))
V_LONG_OP(v_umlsl, LONG_UNSIGNED, d - (uint64_t)a * b)

/* The first operand is wide already. */
#define WIDE_UNSIGNED(U, S, wide, f, g, expression)                                                                    \
    for (unsigned i = 0; i < 16 / sizeof(U); i++) {                                                                    \
        U a = x.wide[i], b = y.f[i];                                                                                   \
        r.wide[i] = (U)(expression);                                                                                   \
    }
#define WIDE_SIGNED(U, S, wide, f, g, expression)                                                                      \
    for (unsigned i = 0; i < 16 / sizeof(U); i++) {                                                                    \
        U a = x.wide[i], b = (U)y.g[i];                                                                                \
        r.wide[i] = (U)(expression);                                                                                   \
    }
#define V_WIDE_OP(name, LOOP, expression)                                                                              \
    OP_FP(name) {                                                                                                      \
        vreg x = c->v[u->rn], y = v_half(u, c->v[u->rm]), r;                                                           \
        SIZES_LONG(LOOP, expression)                                                                                   \
        return v_write_lanes(c, u, r);                                                                                 \
    }
V_WIDE_OP(v_saddw, WIDE_SIGNED, a + b)
V_WIDE_OP(v_uaddw, WIDE_UNSIGNED, a + b)
V_WIDE_OP(v_ssubw, WIDE_SIGNED, a - b)
V_WIDE_OP(v_usubw, WIDE_UNSIGNED, a - b)

/* Neighbours added into a lane of twice the width. */
#define PAIRS_UNSIGNED(U, S, wide, f, g, expression)                                                                   \
    for (unsigned i = 0; i < 16 / sizeof(U); i++) {                                                                    \
        U d = r.wide[i], sum = (U)((U)x.f[2 * i] + (U)x.f[2 * i + 1]);                                                 \
        (void)d;                                                                                                       \
        r.wide[i] = (U)(expression);                                                                                   \
    }
#define PAIRS_SIGNED(U, S, wide, f, g, expression)                                                                     \
    for (unsigned i = 0; i < 16 / sizeof(U); i++) {                                                                    \
        U d = r.wide[i], sum = (U)((S)x.g[2 * i] + (S)x.g[2 * i + 1]);                                                 \
        (void)d;                                                                                                       \
        r.wide[i] = (U)(expression);                                                                                   \
    }
#define V_PAIRS_OP(name, LOOP, expression)                                                                             \
    OP_FP(name) {                                                                                                      \
        vreg x = c->v[u->rn], r = c->v[u->rd];                                                                         \
        SIZES_LONG(LOOP, expression)                                                                                   \
        return v_write(c, u, r);                                                                                       \
    }
V_PAIRS_OP(v_saddlp, PAIRS_SIGNED, sum)
V_PAIRS_OP(v_uaddlp, PAIRS_UNSIGNED, sum)
V_PAIRS_OP(v_sadalp, PAIRS_SIGNED, d + sum)
V_PAIRS_OP(v_uadalp, PAIRS_UNSIGNED, d + sum)

/* ---- Half the width ----------------------------------------------------------------------------------------------- */

/* a and b are wide, the result is cut to the narrow lane. */
#define NARROW_LANES(U, S, wide, f, g, expression)                                                                     \
    for (unsigned i = 0; i < 16 / sizeof(U); i++) {                                                                    \
        U a = x.wide[i], b = y.wide[i];                                                                                \
        (void)b;                                                                                                       \
        r.f[i] = (__typeof__(r.f[0]))(expression);                                                                     \
    }
#define V_NARROW_OP(name, expression)                                                                                  \
    OP_FP(name) {                                                                                                      \
        vreg x = c->v[u->rn], y = c->v[u->rm], r;                                                                      \
        SIZES_LONG(NARROW_LANES, expression)                                                                           \
        return v_write_half(c, u, r.d[0]);                                                                             \
    }
#define HALF_BITS (4 * sizeof(a))
#define HALF_ROUND ((uint64_t)1 << (HALF_BITS - 1))
V_NARROW_OP(v_xtn, a)
V_NARROW_OP(v_shrn, a >> SHIFT)
V_NARROW_OP(v_rshrn, (a + ((uint64_t)1 << (SHIFT - 1))) >> SHIFT)
V_NARROW_OP(v_addhn, ((uint64_t)a + b) >> HALF_BITS)
V_NARROW_OP(v_raddhn, ((uint64_t)a + b + HALF_ROUND) >> HALF_BITS)
V_NARROW_OP(v_subhn, ((uint64_t)a - b) >> HALF_BITS)
V_NARROW_OP(v_rsubhn, ((uint64_t)a - b + HALF_ROUND) >> HALF_BITS)

/* ---- Pairs and reductions ------------------------------------------------------------------------------------------- */

/* a and b are neighbours in the first operand followed by the second. */
#define PAIRWISE(T, f, expression)                                                                                     \
    for (unsigned i = 0; i < u->ra; i++) {                                                                             \
        const vreg *v = 2 * i < u->ra ? &x : &y;                                                                       \
        T a = v->f[2 * i & (u->ra - 1u)], b = v->f[(2 * i & (u->ra - 1u)) + 1];                                        \
        r.f[i] = (T)(expression);                                                                                      \
    }
#define PAIRWISE_UNSIGNED(U, S, f, g, expression) PAIRWISE(U, f, expression)
#define PAIRWISE_SIGNED(U, S, f, g, expression) PAIRWISE(S, g, expression)
#define V_PAIRWISE_OP(name, SIZES, LOOP, expression)                                                                   \
    OP_FP(name) {                                                                                                      \
        vreg x = c->v[u->rn], y = c->v[u->rm], r = {0};                                                                \
        SIZES(LOOP, expression)                                                                                        \
        return v_write_lanes(c, u, r);                                                                                 \
    }
V_PAIRWISE_OP(v_addp, SIZES_BHSD, PAIRWISE_UNSIGNED, a + b)
V_PAIRWISE_OP(v_smaxp, SIZES_BHS, PAIRWISE_SIGNED, a > b ? a : b)
V_PAIRWISE_OP(v_umaxp, SIZES_BHS, PAIRWISE_UNSIGNED, a > b ? a : b)
V_PAIRWISE_OP(v_sminp, SIZES_BHS, PAIRWISE_SIGNED, a < b ? a : b)
V_PAIRWISE_OP(v_uminp, SIZES_BHS, PAIRWISE_UNSIGNED, a < b ? a : b)

OP_FP(s_addp) { return v_write_lanes(c, u, (vreg){.d = {c->v[u->rn].d[0] + c->v[u->rn].d[1]}}); }

/* `size` is the result's. */
#define ACROSS_OP(name, T, get, size, expression)                                                                      \
    OP_FP(name) {                                                                                                      \
        vreg x = c->v[u->rn], r = {0};                                                                                 \
        T a = get(&x, v_size(u), 0);                                                                                   \
        for (unsigned i = 1; i < u->ra; i++) {                                                                         \
            T b = get(&x, v_size(u), i);                                                                               \
            a = expression;                                                                                            \
        }                                                                                                              \
        set_lane(&r, size, 0, (uint64_t)a);                                                                            \
        return v_write_lanes(c, u, r);                                                                                 \
    }
ACROSS_OP(v_addv, uint64_t, lane, v_size(u), a + b)
ACROSS_OP(v_saddlv, int64_t, signed_lane, v_size(u) + 1, a + b)
ACROSS_OP(v_uaddlv, uint64_t, lane, v_size(u) + 1, a + b)
ACROSS_OP(v_smaxv, int64_t, signed_lane, v_size(u), a > b ? a : b)
ACROSS_OP(v_umaxv, uint64_t, lane, v_size(u), a > b ? a : b)
ACROSS_OP(v_sminv, int64_t, signed_lane, v_size(u), a < b ? a : b)
ACROSS_OP(v_uminv, uint64_t, lane, v_size(u), a < b ? a : b)

#define DOT_OP(name, field)                                                                                            \
    OP_FP(name) {                                                                                                      \
        vreg x = c->v[u->rn], y = v_second(c, u), r = c->v[u->rd];                                                     \
        for (unsigned i = 0; i < 16; i++)                                                                              \
            r.s[i / 4] += (uint32_t)(x.field[i] * y.field[i]);                                                         \
        return v_write(c, u, r);                                                                                       \
    }
DOT_OP(v_sdot, sb)
DOT_OP(v_udot, b)

/* ---- Copies and permutations ---------------------------------------------------------------------------------------- */

OP_FP(v_dup) {
    vreg x = c->v[u->rn];
    return v_write(c, u, broadcast(lane(&x, v_size(u), (unsigned)u->imm), v_size(u)));
}

OP_FP(v_dup_general) { return v_write(c, u, broadcast(c->x[u->rn], v_size(u))); }

OP_FP(s_dup) {
    vreg x = c->v[u->rn];
    return v_write_lanes(c, u, (vreg){.d = {lane(&x, v_size(u), (unsigned)u->imm)}});
}

OP_FP(v_insert) {
    vreg x = c->v[u->rn];
    set_lane(&c->v[u->rd], v_size(u), (unsigned)u->imm, lane(&x, v_size(u), u->rm));
    return true;
}

OP_FP(v_insert_general) {
    set_lane(&c->v[u->rd], v_size(u), (unsigned)u->imm, c->x[u->rn]);
    return true;
}

OP_FP(v_umov) {
    c->x[u->rd] = lane(&c->v[u->rn], v_size(u), (unsigned)u->imm);
    return true;
}

OP_FP(v_smov) {
    int64_t value = signed_lane(&c->v[u->rn], v_size(u), (unsigned)u->imm);
    c->x[u->rd] = v_q(u) ? (uint64_t)value : (uint32_t)value;
    return true;
}

OP_FP(v_ext) {
    vreg x = c->v[u->rn], y = c->v[u->rm], r = {0};
    for (unsigned i = 0; i < u->ra; i++) {
        unsigned at = i + (unsigned)u->imm;
        r.b[i] = at < u->ra ? x.b[at] : y.b[at - u->ra];
    }
    return v_write_lanes(c, u, r);
}

/* u->imm registers from rn on, wrapping, as one table of bytes; indexes outside give what `r` held. */
static inline bool look_up(struct vcpu *c, const struct uop *u, vreg r) {
    vreg indexes = c->v[u->rm], table[4];
    for (unsigned i = 0; i < u->imm; i++)
        table[i] = c->v[(u->rn + i) % 32];
    for (unsigned i = 0; i < u->ra; i++) {
        unsigned index = indexes.b[i];
        if (index < 16 * u->imm)
            r.b[i] = table[index / 16].b[index % 16];
    }
    return v_write(c, u, r);
}

OP_FP(v_tbl) { return look_up(c, u, (vreg){0}); }
OP_FP(v_tbx) { return look_up(c, u, c->v[u->rd]); }

/* `half` lanes of each operand; u->ra is a power of two. */
#define ZIP(U, S, f, g, part)                                                                                          \
    for (unsigned i = 0; i < u->ra / 2u; i++) {                                                                        \
        r.f[2 * i] = x.f[i + (part) * u->ra / 2u];                                                                     \
        r.f[2 * i + 1] = y.f[i + (part) * u->ra / 2u];                                                                 \
    }
#define TRN(U, S, f, g, part)                                                                                          \
    for (unsigned i = 0; i < u->ra; i += 2) {                                                                          \
        r.f[i] = x.f[i + (part)];                                                                                      \
        r.f[i + 1] = y.f[i + (part)];                                                                                  \
    }
#define UZP(U, S, f, g, part)                                                                                          \
    for (unsigned i = 0; i < u->ra / 2u; i++) {                                                                        \
        r.f[i] = x.f[2 * i + (part)];                                                                                  \
        r.f[i + u->ra / 2u] = y.f[2 * i + (part)];                                                                     \
    }
#define PERMUTE_OP(name, LOOP, part)                                                                                   \
    OP_FP(name) {                                                                                                      \
        vreg x = c->v[u->rn], y = c->v[u->rm], r = {0};                                                                \
        SIZES_BHSD(LOOP, part)                                                                                         \
        return v_write_lanes(c, u, r);                                                                                 \
    }
PERMUTE_OP(v_zip1, ZIP, 0)
PERMUTE_OP(v_zip2, ZIP, 1)
PERMUTE_OP(v_trn1, TRN, 0)
PERMUTE_OP(v_trn2, TRN, 1)
PERMUTE_OP(v_uzp1, UZP, 0)
PERMUTE_OP(v_uzp2, UZP, 1)
