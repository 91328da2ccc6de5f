/*
 * What the Advanced SIMD ops share. Vector and scalar forms of an instruction run the same op: a scalar one is a vector
 * of one lane. Lanes beyond the vector are written as zero.
 */
/* With SOFTHV_PORTABLE no instruction sets of the host's are used beyond what the compiler was told (for tests). */
#ifndef SOFTHV_EXEC_SIMD_H
#define SOFTHV_EXEC_SIMD_H

#include "engine.h"

__extension__ typedef __int128 int128;

/* uop.aux. uop.ra holds the number of lanes, uop.imm what else the instruction says (a shift, a position). */
enum {
    V_SIZE = 3,         /* log2 of the bytes in a lane; of the narrower ones where operands differ in width */
    V_Q = 4,            /* all 128 bits; for those that widen or narrow: the upper half of the narrower one */
    V_ELEMENT = 8,      /* the second operand is one element, in every lane */
    V_INDEX_SHIFT = 4,  /* which */
};

static inline unsigned v_size(const struct uop *u) { return u->aux & V_SIZE; }
static inline unsigned v_q(const struct uop *u) { return u->aux >> 2 & 1; }

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

/* 64 bits of one value in every lane. */
static inline uint64_t repeat(uint64_t value, unsigned size) {
    static const uint64_t ones[4] = {0x0101010101010101, 0x0001000100010001, 0x0000000100000001, 1};
    return size == 3 ? value : (value & ((UINT64_C(1) << (8 << size)) - 1)) * ones[size];
}

/* ---- Registers as vectors of the compiler's ---------------------------------------------------------------------- */

#define VECTOR_TYPE(T, name, bytes) typedef T name __attribute__((vector_size(bytes)))
VECTOR_TYPE(uint8_t, u8x16, 16);
VECTOR_TYPE(uint16_t, u16x8, 16);
VECTOR_TYPE(uint32_t, u32x4, 16);
VECTOR_TYPE(uint64_t, u64x2, 16);
VECTOR_TYPE(int8_t, s8x16, 16);
VECTOR_TYPE(int16_t, s16x8, 16);
VECTOR_TYPE(int32_t, s32x4, 16);
VECTOR_TYPE(int64_t, s64x2, 16);
VECTOR_TYPE(uint8_t, u8x8, 8);
VECTOR_TYPE(uint16_t, u16x4, 8);
VECTOR_TYPE(uint32_t, u32x2, 8);
VECTOR_TYPE(int8_t, s8x8, 8);
VECTOR_TYPE(int16_t, s16x4, 8);
VECTOR_TYPE(int32_t, s32x2, 8);
VECTOR_TYPE(float, f32x4, 16);
VECTOR_TYPE(double, f64x2, 16);

typedef union {
    vreg r;
    u8x16 b;
    u16x8 h;
    u32x4 s;
    u64x2 d;
    u8x8 half_b[2];
    u16x4 half_h[2];
    u32x2 half_s[2];
    f32x4 float32;
    f64x2 float64;
} vec;

/*
 * Registers are read and written as vectors, never word by word: a load of 16 bytes that two stores have to feed costs
 * the host as much as five of these ops.
 */
static inline vec v_load(const struct vcpu *c, unsigned reg) { return (vec){.r = c->v[reg]}; }

/* Writes all of it: where the op filled no more than its lanes. */
static inline bool v_write_lanes(struct vcpu *c, const struct uop *u, vec r) {
    c->v[u->rd] = r.r;
    return true;
}

/* Writes 128 or 64 bits. */
static inline bool v_write(struct vcpu *c, const struct uop *u, vec r) {
    static const u64x2 masks[2] = {{UINT64_MAX, 0}, {UINT64_MAX, UINT64_MAX}};
    r.d &= masks[v_q(u)];
    return v_write_lanes(c, u, r);
}

/* Writes the result of narrowing: the upper half, keeping the lower, or the lower half, clearing the upper. */
static inline bool v_write_half(struct vcpu *c, const struct uop *u, uint64_t half) {
    vec r = {.d = v_q(u) ? (u64x2){c->v[u->rd].d[0], half} : (u64x2){half, 0}};
    return v_write_lanes(c, u, r);
}

/* The half that an instruction which widens reads, moved to the bottom. */
static inline vec v_half(const struct uop *u, vec v) { return (vec){.d = {v.d[v_q(u)], 0}}; }

/* The second operand: a register, or one element of it in every lane. */
static inline vec v_second(const struct vcpu *c, const struct uop *u) {
    if (!(u->aux & V_ELEMENT))
        return v_load(c, u->rm);
    uint64_t low = repeat(lane(&c->v[u->rm], v_size(u), u->aux >> V_INDEX_SHIFT), v_size(u));
    return (vec){.d = {low, low}};
}

/* condition ? a : b, lane by lane; the condition is a comparison of vectors, all ones where it holds. */
#define PICK(condition, a, b) ((b) ^ (((a) ^ (b)) & (__typeof__(a))(condition)))

/*
 * An op from an expression on vectors, once for each size of lane the instruction has: a and b are the operands, d the
 * destination's old value, all unsigned; sa and sb are a and b signed.
 */
#define SIZES_BHS(WITH, expression)                                                                                    \
    switch (v_size(u)) {                                                                                               \
    case 0: WITH(u8x16, s8x16, b, expression) break;                                                                   \
    case 1: WITH(u16x8, s16x8, h, expression) break;                                                                   \
    default: WITH(u32x4, s32x4, s, expression) break;                                                                  \
    }
#define SIZES_BHSD(WITH, expression)                                                                                   \
    switch (v_size(u)) {                                                                                               \
    case 0: WITH(u8x16, s8x16, b, expression) break;                                                                   \
    case 1: WITH(u16x8, s16x8, h, expression) break;                                                                   \
    case 2: WITH(u32x4, s32x4, s, expression) break;                                                                   \
    default: WITH(u64x2, s64x2, d, expression) break;                                                                  \
    }
#define SAME_WIDTH(U, S, f, expression)                                                                                \
    {                                                                                                                  \
        U a = x.f, b = y.f, d = r.f;                                                                                   \
        S sa = (S)a, sb = (S)b;                                                                                        \
        (void)a, (void)b, (void)d, (void)sa, (void)sb;                                                                 \
        r.f = (U)(expression);                                                                                         \
    }
#define V_OP(name, SIZES, expression)                                                                                  \
    OP_FP(name) {                                                                                                      \
        vec x = v_load(c, u->rn), y = v_load(c, u->rm), r = v_load(c, u->rd);                                          \
        SIZES(SAME_WIDTH, expression)                                                                                  \
        return v_write(c, u, r);                                                                                       \
    }
/* The second operand may be an element. */
#define V_ELEMENT_OP(name, SIZES, expression)                                                                          \
    OP_FP(name) {                                                                                                      \
        vec x = v_load(c, u->rn), y = v_second(c, u), r = v_load(c, u->rd);                                            \
        SIZES(SAME_WIDTH, expression)                                                                                  \
        return v_write(c, u, r);                                                                                       \
    }

/* Those between a width and twice that: WITH(wide types, narrow types of 64 bits, wide field, narrow field, ...). */
#define SIZES_LONG(WITH, expression)                                                                                   \
    switch (v_size(u)) {                                                                                               \
    case 0: WITH(u16x8, s16x8, u8x8, s8x8, h, half_b, expression) break;                                               \
    case 1: WITH(u32x4, s32x4, u16x4, s16x4, s, half_h, expression) break;                                             \
    default: WITH(u64x2, s64x2, u32x2, s32x2, d, half_s, expression) break;                                            \
    }
/* From narrow lanes, the half that Q says: a, b and d are wide, a and b being extended with zeros or with the sign. */
#define UNSIGNED_LONG(U, S, NU, NS, wide, half, expression)                                                            \
    {                                                                                                                  \
        U a = __builtin_convertvector(x.half[v_q(u)], U), b = __builtin_convertvector(y.half[v_q(u)], U), d = r.wide;  \
        (void)a, (void)b, (void)d;                                                                                     \
        r.wide = (U)(expression);                                                                                      \
    }
#define SIGNED_LONG(U, S, NU, NS, wide, half, expression)                                                              \
    {                                                                                                                  \
        S sa = __builtin_convertvector((NS)x.half[v_q(u)], S), sb = __builtin_convertvector((NS)y.half[v_q(u)], S);    \
        U a = (U)sa, b = (U)sb, d = r.wide;                                                                            \
        (void)a, (void)b, (void)d, (void)sa, (void)sb;                                                                 \
        r.wide = (U)(expression);                                                                                      \
    }
#define V_LONG_OP(name, WITH, expression)                                                                              \
    OP_FP(name) {                                                                                                      \
        vec x = v_load(c, u->rn), y = v_second(c, u), r = v_load(c, u->rd);                                            \
        SIZES_LONG(WITH, expression)                                                                                   \
        return v_write_lanes(c, u, r);                                                                                 \
    }

/* VFPExpandImm (exec_fp.c): the bits of FMOV's immediate. */
uint64_t fp_expand_imm(unsigned imm8, bool is_double);

#endif
