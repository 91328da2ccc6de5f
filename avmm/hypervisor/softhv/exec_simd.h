/*
 * What the Advanced SIMD ops share. Vector and scalar forms of an instruction run the same op: a scalar one is a vector
 * of one lane. Lanes beyond the vector are written as zero.
 */
#ifndef SOFTHV_EXEC_SIMD_H
#define SOFTHV_EXEC_SIMD_H

#include "engine.h"

__extension__ typedef __int128 int128;

/* uop.aux. uop.ra holds the number of lanes, uop.imm what else the instruction says (a shift, a position). */
enum {
    V_SIZE = 3,         /* log2 of the bytes in a lane; of the narrower ones where operands differ in width */
    V_Q = 4,            /* all 128 bits; for those that widen or narrow: the upper half of the narrower operand */
    V_ELEMENT = 8,      /* the second operand is one element, in every lane */
    V_INDEX_SHIFT = 4,  /* which */
};

static inline unsigned v_size(const struct uop *u) { return u->aux & V_SIZE; }
static inline unsigned v_q(const struct uop *u) { return u->aux >> 2 & 1; }

/* Writes 128 or 64 bits. */
static inline bool v_write(struct vcpu *c, const struct uop *u, vreg r) {
    r.d[1] &= -(uint64_t)v_q(u);
    c->v[u->rd] = r;
    return true;
}

/* Writes all of it: where the op filled no more than its lanes. */
static inline bool v_write_lanes(struct vcpu *c, const struct uop *u, vreg r) {
    c->v[u->rd] = r;
    return true;
}

/* Writes the result of narrowing: the upper half, keeping the lower, or the lower half, clearing the upper. */
static inline bool v_write_half(struct vcpu *c, const struct uop *u, uint64_t half) {
    c->v[u->rd].d[v_q(u)] = half;
    if (!v_q(u))
        c->v[u->rd].d[1] = 0;
    return true;
}

static inline uint64_t lane(const vreg *v, unsigned size, unsigned i) {
    switch (size) {
    case 0: return v->b[i];
    case 1: return v->h[i];
    case 2: return v->s[i];
    default: return v->d[i];
    }
}

static inline int64_t signed_lane(const vreg *v, unsigned size, unsigned i) {
    switch (size) {
    case 0: return v->sb[i];
    case 1: return v->sh[i];
    case 2: return v->ss[i];
    default: return v->sd[i];
    }
}

static inline void set_lane(vreg *v, unsigned size, unsigned i, uint64_t value) {
    switch (size) {
    case 0: v->b[i] = (uint8_t)value; break;
    case 1: v->h[i] = (uint16_t)value; break;
    case 2: v->s[i] = (uint32_t)value; break;
    default: v->d[i] = value; break;
    }
}

static inline vreg broadcast(uint64_t value, unsigned size) {
    static const uint64_t ones[4] = {0x0101010101010101, 0x0001000100010001, 0x0000000100000001, 1};
    uint64_t low = size == 3 ? value : (value & ((UINT64_C(1) << (8 << size)) - 1)) * ones[size];
    return (vreg){.d = {low, low}};
}

/* The second operand: a register, or one element of it in every lane. */
static inline vreg v_second(const struct vcpu *c, const struct uop *u) {
    vreg y = c->v[u->rm];
    if (u->aux & V_ELEMENT)
        y = broadcast(lane(&y, v_size(u), u->aux >> V_INDEX_SHIFT), v_size(u));
    return y;
}

/* The half that an instruction which widens reads, moved to the bottom. */
static inline vreg v_half(const struct uop *u, vreg v) {
    v.d[0] = v.d[v_q(u)];
    return v;
}

/*
 * Ops over lanes. LOOP(unsigned type, signed type, union field, signed union field, expression) is instantiated for each
 * size the instruction has; the expression sees a and b (the operands' lanes) and d (the destination's old one), and
 * the loops below say whether they are signed. The result is always cut to the lane.
 */
#define SIZES_BHS(LOOP, expression)                                                                                    \
    switch (v_size(u)) {                                                                                               \
    case 0: LOOP(uint8_t, int8_t, b, sb, expression) break;                                                            \
    case 1: LOOP(uint16_t, int16_t, h, sh, expression) break;                                                          \
    default: LOOP(uint32_t, int32_t, s, ss, expression) break;                                                         \
    }
#define SIZES_BHSD(LOOP, expression)                                                                                   \
    switch (v_size(u)) {                                                                                               \
    case 0: LOOP(uint8_t, int8_t, b, sb, expression) break;                                                            \
    case 1: LOOP(uint16_t, int16_t, h, sh, expression) break;                                                          \
    case 2: LOOP(uint32_t, int32_t, s, ss, expression) break;                                                          \
    default: LOOP(uint64_t, int64_t, d, sd, expression) break;                                                         \
    }
#define LANES_UNSIGNED(U, S, f, g, expression)                                                                         \
    for (unsigned i = 0; i < 16 / sizeof(U); i++) {                                                                    \
        U a = x.f[i], b = y.f[i], d = r.f[i];                                                                          \
        (void)a, (void)b, (void)d;                                                                                     \
        r.f[i] = (U)(expression);                                                                                      \
    }
#define LANES_SIGNED(U, S, f, g, expression)                                                                           \
    for (unsigned i = 0; i < 16 / sizeof(U); i++) {                                                                    \
        S a = x.g[i], b = y.g[i], d = r.g[i];                                                                          \
        (void)a, (void)b, (void)d;                                                                                     \
        r.f[i] = (U)(expression);                                                                                      \
    }

/* From narrow lanes a, b of the chosen half to wide ones; d is wide, and so are a and b, being extended. */
#define SIZES_LONG(LOOP, expression)                                                                                   \
    switch (v_size(u)) {                                                                                               \
    case 0: LOOP(uint16_t, int16_t, h, b, sb, expression) break;                                                       \
    case 1: LOOP(uint32_t, int32_t, s, h, sh, expression) break;                                                       \
    default: LOOP(uint64_t, int64_t, d, s, ss, expression) break;                                                      \
    }
#define LONG_UNSIGNED(U, S, wide, f, g, expression)                                                                    \
    for (unsigned i = 0; i < 16 / sizeof(U); i++) {                                                                    \
        U a = x.f[i], b = y.f[i], d = r.wide[i];                                                                       \
        (void)a, (void)b, (void)d;                                                                                     \
        r.wide[i] = (U)(expression);                                                                                   \
    }
#define LONG_SIGNED(U, S, wide, f, g, expression)                                                                      \
    for (unsigned i = 0; i < 16 / sizeof(U); i++) {                                                                    \
        S a = x.g[i], b = y.g[i];                                                                                      \
        U d = r.wide[i];                                                                                               \
        (void)a, (void)b, (void)d;                                                                                     \
        r.wide[i] = (U)(expression);                                                                                   \
    }

#define V_OP(name, SIZES, LOOP, expression)                                                                            \
    OP_FP(name) {                                                                                                      \
        vreg x = c->v[u->rn], y = c->v[u->rm], r = c->v[u->rd];                                                        \
        SIZES(LOOP, expression)                                                                                        \
        return v_write(c, u, r);                                                                                       \
    }
#define V_ELEMENT_OP(name, SIZES, LOOP, expression)                                                                    \
    OP_FP(name) {                                                                                                      \
        vreg x = c->v[u->rn], y = v_second(c, u), r = c->v[u->rd];                                                     \
        SIZES(LOOP, expression)                                                                                        \
        return v_write(c, u, r);                                                                                       \
    }
#define V_LONG_OP(name, LOOP, expression)                                                                              \
    OP_FP(name) {                                                                                                      \
        vreg x = v_half(u, c->v[u->rn]), y = v_half(u, v_second(c, u)), r = c->v[u->rd];                               \
        SIZES_LONG(LOOP, expression)                                                                                   \
        return v_write_lanes(c, u, r);                                                                                 \
    }

/* VFPExpandImm (exec_fp.c): the bits of FMOV's immediate. */
uint64_t fp_expand_imm(unsigned imm8, bool is_double);

#endif
