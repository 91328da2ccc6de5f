/*
 * Advanced SIMD on floating point (Arm ARM C4.1.96). Only the instruction's own lanes are computed, since each can set
 * flags. As in scalar arithmetic FPCR rules: AArch64 has no "standard FPSCR value".
 */
#include "exec_simd.h"

#include <float.h>

/* ---- What fpu.h has no function for, in both precisions ---------------------------------------------------------- */

#define SIGN(x) ((__typeof__(x))1 << (8 * sizeof(x) - 1))
#define MASK(condition, T) ((condition) ? (T)-1 : 0)
#define DERIVE(N, T)                                                                                                   \
    static inline T fp##N##_abd(struct fpu *fp, T a, T b) { return fp##N##_sub(fp, a, b) & ~SIGN(a); }                 \
    static inline T fp##N##_mls(struct fpu *fp, T d, T a, T b) { return fp##N##_muladd(fp, d, a ^ SIGN(a), b); }       \
    static inline T fp##N##_cmeq(struct fpu *fp, T a, T b) {                                                           \
        return MASK(fp##N##_compare(fp, a, b, false) == FP_EQUAL, T);                                                  \
    }                                                                                                                  \
    static inline T fp##N##_cmgt(struct fpu *fp, T a, T b) {                                                           \
        return MASK(fp##N##_compare(fp, a, b, true) == FP_GREATER, T);                                                 \
    }                                                                                                                  \
    static inline T fp##N##_cmge(struct fpu *fp, T a, T b) {                                                           \
        unsigned order = fp##N##_compare(fp, a, b, true);                                                              \
        return MASK(order == FP_GREATER || order == FP_EQUAL, T);                                                      \
    }                                                                                                                  \
    static inline T fp##N##_acgt(struct fpu *fp, T a, T b) { return fp##N##_cmgt(fp, a & ~SIGN(a), b & ~SIGN(b)); }    \
    static inline T fp##N##_acge(struct fpu *fp, T a, T b) { return fp##N##_cmge(fp, a & ~SIGN(a), b & ~SIGN(b)); }
DERIVE(32, uint32_t)
DERIVE(64, uint64_t)

/*
 * One op from one expression, in which a, b and d are the lanes of the operands and of the old destination as they are
 * typed, and CALL picks the function of that type.
 */
#define CALL(function, ...) _Generic(a, uint32_t: fp32_##function, uint64_t: fp64_##function)(&c->fpu, __VA_ARGS__)
#define FP_LANES(T, f, expression)                                                                                     \
    for (unsigned i = 0; i < u->ra; i++) {                                                                             \
        T a = x.f[i], b = y.f[i], d = old.f[i];                                                                        \
        (void)b, (void)d;                                                                                              \
        r.f[i] = (T)(expression);                                                                                      \
    }
#define FP_LANES_FUNCTION(name, expression)                                                                            \
    static inline bool lanes_##name(struct vcpu *c, const struct uop *u, vreg x, vreg y, vreg old) {                   \
        vreg r = {0};                                                                                                  \
        if (v_size(u) == 3)                                                                                            \
            FP_LANES(uint64_t, d, expression)                                                                          \
        else                                                                                                           \
            FP_LANES(uint32_t, s, expression)                                                                          \
        return v_write_lanes(c, u, (vec){.r = r});                                                                     \
    }
#define FP_OP(name, expression)                                                                                        \
    FP_LANES_FUNCTION(name, expression)                                                                                \
    OP_FP(name) { return lanes_##name(c, u, c->v[u->rn], v_second(c, u).r, c->v[u->rd]); }

/*
 * The same with a fast path for whole registers, under the conditions of fpu.h's: `host` computes all lanes at once
 * from the vectors x, y and z (the old destination), and counts if every lane is finite and above a magnitude: none for
 * sums, whose small results are exact, else the smallest normal number.
 */
#define FP_FAST_OP(name, above, host, expression)                                                                      \
    FP_LANES_FUNCTION(name, expression)                                                                                \
    OP_FP(name) {                                                                                                      \
        vec vx = v_load(c, u->rn), vy = v_second(c, u), vz = v_load(c, u->rd), r;                                      \
        if (v_q(u) && fpu_host_mode(&c->fpu) && fpu_inexact_seen(&c->fpu)) {                                           \
            if (v_size(u) == 3) {                                                                                      \
                f64x2 x = vx.float64, y = vy.float64, z = vz.float64;                                                  \
                (void)z;                                                                                               \
                r.float64 = host;                                                                                      \
                if (in_range64(r, above##64))                                                                          \
                    return v_write_lanes(c, u, r);                                                                     \
            } else {                                                                                                   \
                f32x4 x = vx.float32, y = vy.float32, z = vz.float32;                                                  \
                (void)z;                                                                                               \
                r.float32 = host;                                                                                      \
                if (in_range32(r, above##32))                                                                          \
                    return v_write_lanes(c, u, r);                                                                     \
            }                                                                                                          \
        }                                                                                                              \
        return lanes_##name(c, u, vx.r, vy.r, vz.r);                                                                   \
    }
#define ZERO32 (-1.0f)
#define ZERO64 (-1.0)
#define NORMAL32 FLT_MIN
#define NORMAL64 DBL_MIN

static inline bool all_ones(u64x2 v) { return (v[0] & v[1]) == UINT64_MAX; }

static inline bool in_range32(vec v, float above) {
    f32x4 size = (f32x4)(v.s & 0x7fffffff);
    return all_ones((u64x2)((size > above) & (size <= FLT_MAX)));
}

static inline bool in_range64(vec v, double above) {
    f64x2 size = (f64x2)(v.d & 0x7fffffffffffffff);
    return all_ones((u64x2)((size > above) & (size <= DBL_MAX)));
}

/* x * y + z with one rounding. The library's function would be a call for every lane. */
#define FUSE_LANES(T, count, function)                                                                                 \
    T r;                                                                                                               \
    for (unsigned i = 0; i < count; i++)                                                                               \
        r[i] = function(x[i], y[i], z[i]);                                                                             \
    return r;
#if defined(__x86_64__) && !defined(SOFTHV_PORTABLE)
#define HAVE_FMA __builtin_cpu_supports("fma")
#define WITH_FMA __attribute__((target("fma")))
#else
#define HAVE_FMA false
#define WITH_FMA
#endif
WITH_FMA static f32x4 host_fuse32(f32x4 x, f32x4 y, f32x4 z) { FUSE_LANES(f32x4, 4, fmaf) }
WITH_FMA static f64x2 host_fuse64(f64x2 x, f64x2 y, f64x2 z) { FUSE_LANES(f64x2, 2, fma) }
static f32x4 library_fuse32(f32x4 x, f32x4 y, f32x4 z) { FUSE_LANES(f32x4, 4, fmaf) }
static f64x2 library_fuse64(f64x2 x, f64x2 y, f64x2 z) { FUSE_LANES(f64x2, 2, fma) }
static inline f32x4 fuse32(f32x4 x, f32x4 y, f32x4 z) {
    return HAVE_FMA ? host_fuse32(x, y, z) : library_fuse32(x, y, z);
}
static inline f64x2 fuse64(f64x2 x, f64x2 y, f64x2 z) {
    return HAVE_FMA ? host_fuse64(x, y, z) : library_fuse64(x, y, z);
}
#define FUSE(x, y, z) _Generic(x, f32x4: fuse32, f64x2: fuse64)(x, y, z)

/* ---- Arithmetic -------------------------------------------------------------------------------------------------- */

FP_FAST_OP(v_fadd, ZERO, x + y, CALL(add, a, b))
FP_FAST_OP(v_fsub, ZERO, x - y, CALL(sub, a, b))
FP_FAST_OP(v_fmul, NORMAL, x * y, CALL(mul, a, b))
FP_FAST_OP(v_fdiv, NORMAL, x / y, CALL(div, a, b))
FP_FAST_OP(v_fmla, NORMAL, FUSE(x, y, z), CALL(muladd, d, a, b))
FP_FAST_OP(v_fmls, NORMAL, FUSE(-x, y, z), CALL(mls, d, a, b))
FP_OP(v_fabd, CALL(abd, a, b))
FP_OP(v_fmulx, CALL(mulx, a, b))
FP_OP(v_fmax, CALL(max, a, b))
FP_OP(v_fmin, CALL(min, a, b))
FP_OP(v_fmaxnm, CALL(maxnm, a, b))
FP_OP(v_fminnm, CALL(minnm, a, b))
FP_OP(v_frecps, CALL(recps, a, b))
FP_OP(v_frsqrts, CALL(rsqrts, a, b))
FP_OP(v_fabs, a & ~SIGN(a))
FP_OP(v_fneg, a ^ SIGN(a))
FP_OP(v_fsqrt, CALL(sqrt, a))
FP_OP(v_frecpe, CALL(recpe, a))
FP_OP(v_frsqrte, CALL(rsqrte, a))
FP_OP(v_frecpx, CALL(recpx, a))
FP_OP(v_urecpe, fpu_urecpe((uint32_t)a))
FP_OP(v_ursqrte, fpu_ursqrte((uint32_t)a))

FP_OP(v_fcmeq, CALL(cmeq, a, b))
FP_OP(v_fcmge, CALL(cmge, a, b))
FP_OP(v_fcmgt, CALL(cmgt, a, b))
FP_OP(v_facge, CALL(acge, a, b))
FP_OP(v_facgt, CALL(acgt, a, b))
FP_OP(v_fcmeq_zero, CALL(cmeq, a, 0))
FP_OP(v_fcmge_zero, CALL(cmge, a, 0))
FP_OP(v_fcmgt_zero, CALL(cmgt, a, 0))
FP_OP(v_fcmle_zero, CALL(cmge, 0, a))
FP_OP(v_fcmlt_zero, CALL(cmgt, 0, a))

/* ---- Integers: u->imm fraction bits ------------------------------------------------------------------------------ */

#define ROUND_INT(mode, exact) CALL(round_int, a, mode, exact)
FP_OP(v_frintn, ROUND_INT(ROUND_TIEEVEN, false))
FP_OP(v_frintp, ROUND_INT(ROUND_POSINF, false))
FP_OP(v_frintm, ROUND_INT(ROUND_NEGINF, false))
FP_OP(v_frintz, ROUND_INT(ROUND_ZERO, false))
FP_OP(v_frinta, ROUND_INT(ROUND_TIEAWAY, false))
FP_OP(v_frintx, ROUND_INT(fp_rounding_mode(&c->fpu), true))
FP_OP(v_frinti, ROUND_INT(fp_rounding_mode(&c->fpu), false))

#define TO_INT(is_signed, mode) CALL(to_int, a, (int)u->imm, is_signed, 8 * (int)sizeof(a), mode)
FP_OP(v_fcvtns, TO_INT(true, ROUND_TIEEVEN))
FP_OP(v_fcvtnu, TO_INT(false, ROUND_TIEEVEN))
FP_OP(v_fcvtps, TO_INT(true, ROUND_POSINF))
FP_OP(v_fcvtpu, TO_INT(false, ROUND_POSINF))
FP_OP(v_fcvtms, TO_INT(true, ROUND_NEGINF))
FP_OP(v_fcvtmu, TO_INT(false, ROUND_NEGINF))
FP_OP(v_fcvtzs, TO_INT(true, ROUND_ZERO))
FP_OP(v_fcvtzu, TO_INT(false, ROUND_ZERO))
FP_OP(v_fcvtas, TO_INT(true, ROUND_TIEAWAY))
FP_OP(v_fcvtau, TO_INT(false, ROUND_TIEAWAY))

#define SIGN_EXTENDED(x) ((uint64_t)(int64_t)_Generic(x, uint32_t: (int32_t)(x), uint64_t: (int64_t)(x)))
FP_OP(v_scvtf, CALL(from_int, SIGN_EXTENDED(a), true, (int)u->imm))
FP_OP(v_ucvtf, CALL(from_int, a, false, (int)u->imm))

/* ---- Pairs and reductions ---------------------------------------------------------------------------------------- */

/* a and b are neighbours in the first operand followed by the second. */
#define FP_PAIRS(T, f, function)                                                                                       \
    for (unsigned i = 0; i < u->ra; i++) {                                                                             \
        const vreg *v = 2 * i < u->ra ? &x : &y;                                                                       \
        T a = v->f[2 * i & (u->ra - 1u)], b = v->f[(2 * i & (u->ra - 1u)) + 1];                                        \
        r.r.f[i] = CALL(function, a, b);                                                                               \
    }
#define FP_SCALAR_PAIR(T, f, function)                                                                                 \
    {                                                                                                                  \
        T a = x.f[0];                                                                                                  \
        r.r.f[0] = CALL(function, a, x.f[1]);                                                                          \
    }
#define PAIRWISE_OP(name, function)                                                                                    \
    OP_FP(v_##name) {                                                                                                  \
        vreg x = c->v[u->rn], y = c->v[u->rm];                                                                         \
        vec r = {0};                                                                                                   \
        if (v_size(u) == 3)                                                                                            \
            FP_PAIRS(uint64_t, d, function)                                                                            \
        else                                                                                                           \
            FP_PAIRS(uint32_t, s, function)                                                                            \
        return v_write_lanes(c, u, r);                                                                                 \
    }                                                                                                                  \
    OP_FP(s_##name) {                                                                                                  \
        vreg x = c->v[u->rn];                                                                                          \
        vec r = {0};                                                                                                   \
        if (v_size(u) == 3)                                                                                            \
            FP_SCALAR_PAIR(uint64_t, d, function)                                                                      \
        else                                                                                                           \
            FP_SCALAR_PAIR(uint32_t, s, function)                                                                      \
        return v_write_lanes(c, u, r);                                                                                 \
    }
PAIRWISE_OP(faddp, add)
PAIRWISE_OP(fmaxp, max)
PAIRWISE_OP(fminp, min)
PAIRWISE_OP(fmaxnmp, maxnm)
PAIRWISE_OP(fminnmp, minnm)

/* Four single-precision lanes, as a tree (J1, Reduce). */
#define ACROSS_OP(name, function)                                                                                      \
    OP_FP(name) {                                                                                                      \
        vreg x = c->v[u->rn];                                                                                          \
        vec r = {0};                                                                                                   \
        uint32_t low = fp32_##function(&c->fpu, x.s[0], x.s[1]), high = fp32_##function(&c->fpu, x.s[2], x.s[3]);      \
        r.r.s[0] = fp32_##function(&c->fpu, low, high);                                                                \
        return v_write_lanes(c, u, r);                                                                                 \
    }
ACROSS_OP(v_fmaxv, max)
ACROSS_OP(v_fminv, min)
ACROSS_OP(v_fmaxnmv, maxnm)
ACROSS_OP(v_fminnmv, minnm)

/* ---- Between precisions: the size is the narrower one's ---------------------------------------------------------- */

OP_FP(v_fcvtl) {
    vreg x = v_half(u, v_load(c, u->rn)).r;
    vec r;
    if (v_size(u) == 1) {
        for (unsigned i = 0; i < 4; i++)
            r.r.s[i] = fp16_to_fp32(&c->fpu, x.h[i]);
    } else {
        for (unsigned i = 0; i < 2; i++)
            r.r.d[i] = fp32_to_fp64(&c->fpu, x.s[i]);
    }
    return v_write_lanes(c, u, r);
}

OP_FP(v_fcvtn) {
    vreg x = c->v[u->rn], r;
    if (v_size(u) == 1) {
        for (unsigned i = 0; i < 4; i++)
            r.h[i] = fp32_to_fp16(&c->fpu, x.s[i]);
    } else {
        for (unsigned i = 0; i < 2; i++)
            r.s[i] = fp64_to_fp32(&c->fpu, x.d[i]);
    }
    return v_write_half(c, u, r.d[0]);
}

OP_FP(v_fcvtxn) {
    vreg x = c->v[u->rn], r = {0};
    for (unsigned i = 0; i < u->ra; i++)
        r.s[i] = fp64_to_fp32_odd(&c->fpu, x.d[i]);
    return v_write_half(c, u, r.d[0]);
}
