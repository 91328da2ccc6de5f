/*
 * Advanced SIMD on integers, without saturation (Arm ARM C4.1.96), on the compiler's vectors.
 */
#include "exec_simd.h"

/* ---- Bitwise ----------------------------------------------------------------------------------------------------- */

#define ANY_SIZE(WITH, expression) WITH(u64x2, s64x2, d, expression)
V_OP(v_and, ANY_SIZE, a & b)
V_OP(v_bic, ANY_SIZE, a & ~b)
V_OP(v_orr, ANY_SIZE, a | b)
V_OP(v_orn, ANY_SIZE, a | ~b)
V_OP(v_eor, ANY_SIZE, a ^ b)
V_OP(v_bsl, ANY_SIZE, b ^ ((b ^ a) & d))
V_OP(v_bit, ANY_SIZE, d ^ ((d ^ a) & b))
V_OP(v_bif, ANY_SIZE, d ^ ((d ^ a) & ~b))
V_OP(v_not, ANY_SIZE, ~a)

OP_FP(v_mov_imm) { return v_write(c, u, (vec){.d = {u->imm, u->imm}}); }

OP_FP(v_orr_imm) { return v_write(c, u, (vec){.d = v_load(c, u->rd).d | u->imm}); }

/* BIC: the form has inverted the immediate. */
OP_FP(v_and_imm) { return v_write(c, u, (vec){.d = v_load(c, u->rd).d & u->imm}); }

/* ---- Arithmetic and comparison, lane by lane --------------------------------------------------------------------- */

V_OP(v_add, SIZES_BHSD, a + b)
V_OP(v_sub, SIZES_BHSD, a - b)
V_OP(v_neg, SIZES_BHSD, -a)
V_OP(v_abs, SIZES_BHSD, PICK(sa < 0, -a, a))
V_ELEMENT_OP(v_mul, SIZES_BHS, a * b)
V_ELEMENT_OP(v_mla, SIZES_BHS, d + a * b)
V_ELEMENT_OP(v_mls, SIZES_BHS, d - a * b)

V_OP(v_cmeq, SIZES_BHSD, a == b)
V_OP(v_cmtst, SIZES_BHSD, (a & b) != 0)
V_OP(v_cmhi, SIZES_BHSD, a > b)
V_OP(v_cmhs, SIZES_BHSD, a >= b)
V_OP(v_cmgt, SIZES_BHSD, sa > sb)
V_OP(v_cmge, SIZES_BHSD, sa >= sb)
V_OP(v_cmeq_zero, SIZES_BHSD, a == 0)
V_OP(v_cmgt_zero, SIZES_BHSD, sa > 0)
V_OP(v_cmge_zero, SIZES_BHSD, sa >= 0)
V_OP(v_cmle_zero, SIZES_BHSD, sa <= 0)
V_OP(v_cmlt_zero, SIZES_BHSD, sa < 0)

V_OP(v_smax, SIZES_BHS, PICK(sa > sb, a, b))
V_OP(v_umax, SIZES_BHS, PICK(a > b, a, b))
V_OP(v_smin, SIZES_BHS, PICK(sa < sb, a, b))
V_OP(v_umin, SIZES_BHS, PICK(a < b, a, b))
V_OP(v_sabd, SIZES_BHS, PICK(sa > sb, a - b, b - a))
V_OP(v_uabd, SIZES_BHS, PICK(a > b, a - b, b - a))
V_OP(v_saba, SIZES_BHS, d + PICK(sa > sb, a - b, b - a))
V_OP(v_uaba, SIZES_BHS, d + PICK(a > b, a - b, b - a))

/* Without the bit that a sum would need: a + b is 2(a & b) + (a ^ b), and 2(a | b) - (a ^ b). */
#define UNSIGNED(value) ((__typeof__(a))(value))
V_OP(v_shadd, SIZES_BHS, (a & b) + UNSIGNED((sa ^ sb) >> 1))
V_OP(v_uhadd, SIZES_BHS, (a & b) + ((a ^ b) >> 1))
V_OP(v_srhadd, SIZES_BHS, (a | b) - UNSIGNED((sa ^ sb) >> 1))
V_OP(v_urhadd, SIZES_BHS, (a | b) - ((a ^ b) >> 1))
V_OP(v_shsub, SIZES_BHS, UNSIGNED((sa ^ sb) >> 1) - (~a & b))
V_OP(v_uhsub, SIZES_BHS, ((a ^ b) >> 1) - (~a & b))

/* ---- Bits -------------------------------------------------------------------------------------------------------- */

OP_FP(v_cnt) {
    vec r = v_load(c, u->rn);
    r.d -= r.d >> 1 & 0x5555555555555555;
    r.d = (r.d & 0x3333333333333333) + (r.d >> 2 & 0x3333333333333333);
    r.d = (r.d + (r.d >> 4)) & 0x0f0f0f0f0f0f0f0f;
    return v_write(c, u, r);
}

OP_FP(v_rbit) {
    vec r = v_load(c, u->rn);
    r.d = (r.d >> 1 & 0x5555555555555555) | (r.d & 0x5555555555555555) << 1;
    r.d = (r.d >> 2 & 0x3333333333333333) | (r.d & 0x3333333333333333) << 2;
    r.d = (r.d >> 4 & 0x0f0f0f0f0f0f0f0f) | (r.d & 0x0f0f0f0f0f0f0f0f) << 4;
    return v_write(c, u, r);
}

OP_FP(v_clz) {
    vreg x = c->v[u->rn];
    vec r = {0};
    unsigned width = 8u << v_size(u);
    for (unsigned i = 0; i < u->ra; i++) {
        uint64_t a = lane(&x, v_size(u), i);
        set_lane(&r.r, v_size(u), i, a ? (unsigned)__builtin_clzll(a) - (64 - width) : width);
    }
    return v_write_lanes(c, u, r);
}

OP_FP(v_cls) {
    vreg x = c->v[u->rn];
    vec r = {0};
    for (unsigned i = 0; i < u->ra; i++)
        set_lane(&r.r, v_size(u), i,
                 (unsigned)__builtin_clrsbll(signed_lane(&x, v_size(u), i)) - (64 - (8u << v_size(u))));
    return v_write_lanes(c, u, r);
}

/* Reverses the lanes in each group of 2^group bytes: swaps neighbours, then neighbouring pairs, and so on. */
static inline bool reverse(struct vcpu *c, const struct uop *u, unsigned group) {
    vec r = v_load(c, u->rn);
    if (v_size(u) == 0)
        r.h = r.h >> 8 | r.h << 8;
    if (v_size(u) <= 1 && group >= 2)
        r.s = r.s >> 16 | r.s << 16;
    if (group >= 3)
        r.d = r.d >> 32 | r.d << 32;
    return v_write(c, u, r);
}

OP_FP(v_rev16) { return reverse(c, u, 1); }
OP_FP(v_rev32) { return reverse(c, u, 2); }
OP_FP(v_rev64) { return reverse(c, u, 3); }

/* Of bytes, in lanes that hold the product: bit by bit of b. */
#define POLYNOMIAL_PRODUCT(U, a, b)                                                                                    \
    U product = {0};                                                                                                   \
    for (unsigned bit = 0; bit < 8; bit++)                                                                             \
        product ^= (a << bit) & -(b >> bit & 1);

OP_FP(v_pmul) {
    vec x = v_load(c, u->rn), y = v_load(c, u->rm);
    POLYNOMIAL_PRODUCT(u8x16, x.b, y.b)
    return v_write(c, u, (vec){.b = product});
}

OP_FP(v_pmull) {
    vec x = v_load(c, u->rn), y = v_load(c, u->rm);
    u16x8 a = __builtin_convertvector(x.half_b[v_q(u)], u16x8), b = __builtin_convertvector(y.half_b[v_q(u)], u16x8);
    POLYNOMIAL_PRODUCT(u16x8, a, b)
    return v_write_lanes(c, u, (vec){.h = product});
}

/* ---- Shifts by an immediate: right by 1 to the lane's width, left by less than that ------------------------------ */

#define SHIFT ((unsigned)u->imm)
/* In two steps, for a shift by the whole width. */
#define SHIFTED(value) ((value) >> (SHIFT - 1) >> 1)
#define ROUNDED(value) (SHIFTED(value) + ((value) >> (SHIFT - 1) & 1))
V_OP(v_sshr, SIZES_BHSD, SHIFTED(sa))
V_OP(v_ushr, SIZES_BHSD, SHIFTED(a))
V_OP(v_ssra, SIZES_BHSD, d + UNSIGNED(SHIFTED(sa)))
V_OP(v_usra, SIZES_BHSD, d + SHIFTED(a))
V_OP(v_srshr, SIZES_BHSD, ROUNDED(sa))
V_OP(v_urshr, SIZES_BHSD, ROUNDED(a))
V_OP(v_srsra, SIZES_BHSD, d + UNSIGNED(ROUNDED(sa)))
V_OP(v_ursra, SIZES_BHSD, d + ROUNDED(a))
V_OP(v_sri, SIZES_BHSD, (d & ~SHIFTED(~(a ^ a))) | SHIFTED(a))
V_OP(v_shl, SIZES_BHSD, a << SHIFT)
V_OP(v_sli, SIZES_BHSD, (d & ~(~(a ^ a) << SHIFT)) | a << SHIFT)

/* Half the bits of a vector's lanes. */
#define HALF_OF(v) ((int)(4 * sizeof((v)[0])))
V_LONG_OP(v_sshll, SIGNED_LONG, a << SHIFT)
V_LONG_OP(v_ushll, UNSIGNED_LONG, a << SHIFT)
V_LONG_OP(v_shll, UNSIGNED_LONG, a << HALF_OF(a))

/* ---- Twice the width --------------------------------------------------------------------------------------------- */

V_LONG_OP(v_saddl, SIGNED_LONG, a + b)
V_LONG_OP(v_uaddl, UNSIGNED_LONG, a + b)
V_LONG_OP(v_ssubl, SIGNED_LONG, a - b)
V_LONG_OP(v_usubl, UNSIGNED_LONG, a - b)
V_LONG_OP(v_sabdl, SIGNED_LONG, PICK(sa > sb, a - b, b - a))
V_LONG_OP(v_uabdl, UNSIGNED_LONG, PICK(a > b, a - b, b - a))
V_LONG_OP(v_sabal, SIGNED_LONG, d + PICK(sa > sb, a - b, b - a))
V_LONG_OP(v_uabal, UNSIGNED_LONG, d + PICK(a > b, a - b, b - a))
V_LONG_OP(v_smull, SIGNED_LONG, a * b)
V_LONG_OP(v_umull, UNSIGNED_LONG, a * b)
V_LONG_OP(v_smlal, SIGNED_LONG, d + a * b)
V_LONG_OP(v_umlal, UNSIGNED_LONG, d + a * b)
V_LONG_OP(v_smlsl, SIGNED_LONG, d - a * b)
V_LONG_OP(v_umlsl, UNSIGNED_LONG, d - a * b)

/* The first operand is wide already: it is d. */
#define V_WIDE_OP(name, WITH, expression)                                                                              \
    OP_FP(name) {                                                                                                      \
        vec x = v_load(c, u->rn), y = v_load(c, u->rm), r = x;                                                         \
        SIZES_LONG(WITH, expression)                                                                                   \
        return v_write_lanes(c, u, r);                                                                                 \
    }
V_WIDE_OP(v_saddw, SIGNED_LONG, d + b)
V_WIDE_OP(v_uaddw, UNSIGNED_LONG, d + b)
V_WIDE_OP(v_ssubw, SIGNED_LONG, d - b)
V_WIDE_OP(v_usubw, UNSIGNED_LONG, d - b)

/* Neighbours added into a lane of twice the width, which a holds both of. */
#define WIDE_LANES(U, S, NU, NS, wide, half, expression)                                                               \
    {                                                                                                                  \
        U a = x.wide, d = r.wide;                                                                                      \
        S sa = (S)a;                                                                                                   \
        (void)d, (void)sa;                                                                                             \
        r.wide = (U)(expression);                                                                                      \
    }
#define V_NEIGHBOURS_OP(name, expression)                                                                              \
    OP_FP(name) {                                                                                                      \
        vec x = v_load(c, u->rn), r = v_load(c, u->rd);                                                                \
        SIZES_LONG(WIDE_LANES, expression)                                                                             \
        return v_write(c, u, r);                                                                                       \
    }
#define LOW_LANES(v) ((v) << HALF_OF(v) >> HALF_OF(v))
#define UNSIGNED_SUM (LOW_LANES(a) + (a >> HALF_OF(a)))
#define SIGNED_SUM UNSIGNED(((__typeof__(sa))(a << HALF_OF(a)) >> HALF_OF(a)) + (sa >> HALF_OF(a)))
V_NEIGHBOURS_OP(v_saddlp, SIGNED_SUM)
V_NEIGHBOURS_OP(v_uaddlp, UNSIGNED_SUM)
V_NEIGHBOURS_OP(v_sadalp, d + SIGNED_SUM)
V_NEIGHBOURS_OP(v_uadalp, d + UNSIGNED_SUM)

/* ---- Half the width ---------------------------------------------------------------------------------------------- */

/* a and b are wide, the result is cut to the narrow lane. */
#define NARROW_LANES(U, S, NU, NS, wide, half, expression)                                                             \
    {                                                                                                                  \
        U a = x.wide, b = y.wide, value = (expression);                                                                \
        (void)b;                                                                                                       \
        r.half[0] = __builtin_convertvector(value, NU);                                                                \
    }
#define V_NARROW_OP(name, expression)                                                                                  \
    OP_FP(name) {                                                                                                      \
        vec x = v_load(c, u->rn), y = v_load(c, u->rm), r;                                                             \
        SIZES_LONG(NARROW_LANES, expression)                                                                           \
        return v_write_half(c, u, r.d[0]);                                                                             \
    }
/* One, in every lane, at bit `place`. */
#define BIT(place) (((a ^ a) + 1) << (place))
V_NARROW_OP(v_xtn, a)
V_NARROW_OP(v_shrn, a >> SHIFT)
V_NARROW_OP(v_rshrn, (a + BIT(SHIFT - 1)) >> SHIFT)
V_NARROW_OP(v_addhn, (a + b) >> HALF_OF(a))
V_NARROW_OP(v_raddhn, (a + b + BIT(HALF_OF(a) - 1)) >> HALF_OF(a))
V_NARROW_OP(v_subhn, (a - b) >> HALF_OF(a))
V_NARROW_OP(v_rsubhn, (a - b + BIT(HALF_OF(a) - 1)) >> HALF_OF(a))

/* ---- Pairs and reductions ---------------------------------------------------------------------------------------- */

/* The even and the odd lanes of one register, as 64 bits. */
#define EVEN(v, wide, NU) __builtin_convertvector((v).wide, NU)
#define ODD(v, wide, NU) __builtin_convertvector((v).wide >> HALF_OF((v).wide), NU)

/* a and b are neighbours in the first operand followed by the second; without Q those are 64 bits each. */
#define PAIRWISE(U, S, NU, NS, wide, half, expression)                                                                 \
    {                                                                                                                  \
        uint64_t halves[2];                                                                                            \
        for (unsigned i = 0; i < 2; i++) {                                                                             \
            NU a = EVEN(i ? y : x, wide, NU), b = ODD(i ? y : x, wide, NU);                                            \
            NS sa = (NS)a, sb = (NS)b;                                                                                 \
            (void)sa, (void)sb;                                                                                        \
            halves[i] = (uint64_t)(expression);                                                                        \
        }                                                                                                              \
        r.d = (u64x2){halves[0], halves[1]};                                                                           \
    }
#define V_PAIRWISE_OP(name, expression)                                                                                \
    OP_FP(name) {                                                                                                      \
        vec x = v_load(c, u->rn), y = v_load(c, u->rm), r;                                                             \
        if (!v_q(u))                                                                                                   \
            x.d = (u64x2){x.d[0], y.d[0]};                                                                             \
        SIZES_LONG(PAIRWISE, expression)                                                                               \
        return v_write(c, u, r);                                                                                       \
    }
V_PAIRWISE_OP(v_addp, a + b)
V_PAIRWISE_OP(v_smaxp, PICK(sa > sb, a, b))
V_PAIRWISE_OP(v_umaxp, PICK(a > b, a, b))
V_PAIRWISE_OP(v_sminp, PICK(sa < sb, a, b))
V_PAIRWISE_OP(v_uminp, PICK(a < b, a, b))

OP_FP(v_addp_d) {
    vreg x = c->v[u->rn], y = c->v[u->rm];
    return v_write_lanes(c, u, (vec){.d = {x.d[0] + x.d[1], y.d[0] + y.d[1]}});
}

OP_FP(s_addp) { return v_write_lanes(c, u, (vec){.d = {c->v[u->rn].d[0] + c->v[u->rn].d[1]}}); }

/* `size` is the result's. */
#define ACROSS_OP(name, T, get, size, expression)                                                                      \
    OP_FP(name) {                                                                                                      \
        vreg x = c->v[u->rn];                                                                                          \
        vec r = {0};                                                                                                   \
        T a = get(&x, v_size(u), 0);                                                                                   \
        for (unsigned i = 1; i < u->ra; i++) {                                                                         \
            T b = get(&x, v_size(u), i);                                                                               \
            a = expression;                                                                                            \
        }                                                                                                              \
        set_lane(&r.r, size, 0, (uint64_t)a);                                                                          \
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
        vreg x = c->v[u->rn], y = v_second(c, u).r;                                                                    \
        vec r = v_load(c, u->rd);                                                                                      \
        for (unsigned i = 0; i < 16; i++)                                                                              \
            r.r.s[i / 4] += (uint32_t)(x.field[i] * y.field[i]);                                                       \
        return v_write(c, u, r);                                                                                       \
    }
DOT_OP(v_sdot, sb)
DOT_OP(v_udot, b)

/* ---- Copies and permutations ------------------------------------------------------------------------------------- */

OP_FP(v_dup) {
    uint64_t low = repeat(lane(&c->v[u->rn], v_size(u), (unsigned)u->imm), v_size(u));
    return v_write(c, u, (vec){.d = {low, low}});
}

OP_FP(v_dup_general) {
    uint64_t low = repeat(c->x[u->rn], v_size(u));
    return v_write(c, u, (vec){.d = {low, low}});
}

OP_FP(s_dup) {
    vreg x = c->v[u->rn];
    return v_write_lanes(c, u, (vec){.d = {lane(&x, v_size(u), (unsigned)u->imm)}});
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
    vreg x = c->v[u->rn], y = c->v[u->rm];
    uint64_t words[4] = {x.d[0], v_q(u) ? x.d[1] : y.d[0], y.d[0], y.d[1]};
    unsigned from = (unsigned)u->imm / 8, shift = 8 * ((unsigned)u->imm % 8);
    uint64_t low = words[from] >> shift | words[from + 1] << 1 << (63 - shift); /* twice, for 64 in all */
    uint64_t high = words[from + 1] >> shift | words[from + 2] << 1 << (63 - shift);
    return v_write(c, u, (vec){.d = {low, high}});
}

/* u->imm registers from rn on, wrapping, as one table of bytes; indexes outside give what `r` held. */
static inline bool look_up(struct vcpu *c, const struct uop *u, vreg r) {
    vreg indexes = c->v[u->rm], table[4];
    for (unsigned i = 0; i < u->imm; i++)
        table[i] = c->v[(u->rn + i) % 32];
    uint64_t halves[2] = {0, 0};
    for (unsigned i = 0; i < 16; i++) {
        unsigned index = indexes.b[i];
        uint64_t byte = index < 16 * u->imm ? table[index / 16].b[index % 16] : r.b[i];
        halves[i / 8] |= byte << (8 * (i % 8));
    }
    return v_write(c, u, (vec){.d = {halves[0], halves[1]}});
}

OP_FP(v_tbl) { return look_up(c, u, (vreg){0}); }
OP_FP(v_tbx) { return look_up(c, u, c->v[u->rd]); }

/*
 * Pairs of lanes are seen as wide ones: TRN and ZIP put x's lane below y's, UZP takes the even or the odd lanes.
 * Without Q the operands of UZP are 64 bits each, and ZIP2 is what ZIP1 gives in its upper half. Lanes of 64 bits are
 * the same for all: the first of both operands, or the second.
 */
#define TRN1(U, S, NU, NS, wide, half, part) r.wide = LOW_LANES(x.wide) | y.wide << HALF_OF(y.wide);
#define TRN2(U, S, NU, NS, wide, half, part) r.wide = x.wide >> HALF_OF(x.wide) | (y.wide ^ LOW_LANES(y.wide));
#define ZIP(U, S, NU, NS, wide, half, part)                                                                            \
    {                                                                                                                  \
        unsigned from = v_q(u) ? part : 0;                                                                             \
        U low = __builtin_convertvector(x.half[from], U), high = __builtin_convertvector(y.half[from], U);             \
        r.wide = low | high << HALF_OF(high);                                                                          \
        if (part && !v_q(u))                                                                                           \
            r.d = (u64x2){r.d[1]};                                                                                     \
    }
#define UZP(U, S, NU, NS, wide, half, part)                                                                            \
    {                                                                                                                  \
        if (!v_q(u))                                                                                                   \
            x.d = (u64x2){x.d[0], y.d[0]};                                                                             \
        r.d = (u64x2){(uint64_t)(part ? ODD(x, wide, NU) : EVEN(x, wide, NU)),                                         \
                      (uint64_t)(part ? ODD(y, wide, NU) : EVEN(y, wide, NU))};                                        \
    }
#define PERMUTE_OP(name, WITH, part)                                                                                   \
    OP_FP(name) {                                                                                                      \
        vec x = v_load(c, u->rn), y = v_load(c, u->rm), r;                                                             \
        if (v_size(u) == 3)                                                                                            \
            r.d = (u64x2){x.d[part], y.d[part]};                                                                       \
        else                                                                                                           \
            SIZES_LONG(WITH, part)                                                                                     \
        return v_write(c, u, r);                                                                                       \
    }
PERMUTE_OP(v_zip1, ZIP, 0)
PERMUTE_OP(v_zip2, ZIP, 1)
PERMUTE_OP(v_trn1, TRN1, 0)
PERMUTE_OP(v_trn2, TRN2, 1)
PERMUTE_OP(v_uzp1, UZP, 0)
PERMUTE_OP(v_uzp2, UZP, 1)
