/*
 * Floating point as the Arm ARM has it (J1, shared/functions/float): values are bit patterns in integers, the state
 * is FPCR and FPSR, results and cumulative flags are exact in every rounding, flush and NaN mode.
 *
 * Each operation is an inline fast path on the host's arithmetic where that provably gives the same bits and the same
 * flags, and otherwise the integer core of fpu.c (names ending in _exact). The fast path needs the host in its default
 * environment: round to nearest, denormals kept.
 */
#ifndef SOFTHV_FPU_H
#define SOFTHV_FPU_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

struct fpu {
    uint32_t fpcr;
    uint32_t fpsr;
};

enum {
    FPCR_RMODE_SHIFT = 22,
    FPCR_RMODE = 3u << 22,
    FPCR_FZ = 1u << 24,
    FPCR_DN = 1u << 25,
    FPCR_AHP = 1u << 26,
    FPCR_MASK = FPCR_RMODE | FPCR_FZ | FPCR_DN | FPCR_AHP, /* FZ16 is RES0 without FEAT_FP16; no trapped exceptions */
    FPSR_IOC = 1u << 0,
    FPSR_DZC = 1u << 1,
    FPSR_OFC = 1u << 2,
    FPSR_UFC = 1u << 3,
    FPSR_IXC = 1u << 4,
    FPSR_IDC = 1u << 7,
    FPSR_QC = 1u << 27,
    FPSR_MASK = FPSR_IOC | FPSR_DZC | FPSR_OFC | FPSR_UFC | FPSR_IXC | FPSR_IDC | FPSR_QC,
};

/* The first four are FPCR.RMode's encoding. */
enum fp_rounding { ROUND_TIEEVEN, ROUND_POSINF, ROUND_NEGINF, ROUND_ZERO, ROUND_TIEAWAY, ROUND_ODD };

/* What a comparison yields: PSTATE.NZCV as a 4-bit field, N in bit 3. */
enum { FP_LESS = 8, FP_EQUAL = 6, FP_GREATER = 2, FP_UNORDERED = 3 };

static inline enum fp_rounding fp_rounding_mode(const struct fpu *fp) {
    return (enum fp_rounding)((fp->fpcr & FPCR_RMODE) >> FPCR_RMODE_SHIFT);
}

/* The operations that exist alike in single and double precision; the core in fpu.c is instantiated the same way. */
#define FPU_DECLARE(N)                                                                                                 \
    uint##N##_t fp##N##_add_exact(struct fpu *fp, uint##N##_t a, uint##N##_t b);                                       \
    uint##N##_t fp##N##_sub_exact(struct fpu *fp, uint##N##_t a, uint##N##_t b);                                       \
    uint##N##_t fp##N##_mul_exact(struct fpu *fp, uint##N##_t a, uint##N##_t b);                                       \
    uint##N##_t fp##N##_div_exact(struct fpu *fp, uint##N##_t a, uint##N##_t b);                                       \
    uint##N##_t fp##N##_sqrt_exact(struct fpu *fp, uint##N##_t a);                                                     \
    uint##N##_t fp##N##_muladd_exact(struct fpu *fp, uint##N##_t addend, uint##N##_t a, uint##N##_t b);                \
    unsigned fp##N##_compare_exact(struct fpu *fp, uint##N##_t a, uint##N##_t b, bool signal_nans);                    \
    uint##N##_t fp##N##_mulx(struct fpu *fp, uint##N##_t a, uint##N##_t b);                                            \
    uint##N##_t fp##N##_max(struct fpu *fp, uint##N##_t a, uint##N##_t b);                                             \
    uint##N##_t fp##N##_min(struct fpu *fp, uint##N##_t a, uint##N##_t b);                                             \
    uint##N##_t fp##N##_maxnm(struct fpu *fp, uint##N##_t a, uint##N##_t b);                                           \
    uint##N##_t fp##N##_minnm(struct fpu *fp, uint##N##_t a, uint##N##_t b);                                           \
    uint##N##_t fp##N##_recpe(struct fpu *fp, uint##N##_t a);                                                          \
    uint##N##_t fp##N##_rsqrte(struct fpu *fp, uint##N##_t a);                                                         \
    uint##N##_t fp##N##_recps(struct fpu *fp, uint##N##_t a, uint##N##_t b);                                           \
    uint##N##_t fp##N##_rsqrts(struct fpu *fp, uint##N##_t a, uint##N##_t b);                                          \
    uint##N##_t fp##N##_recpx(struct fpu *fp, uint##N##_t a);                                                          \
    uint##N##_t fp##N##_round_int(struct fpu *fp, uint##N##_t a, enum fp_rounding mode, bool exact);                   \
    /* The value times 2^fbits as an integer of `width` bits (32 or 64), saturating, zero-extended. */                 \
    uint64_t fp##N##_to_int_exact(struct fpu *fp, uint##N##_t a, int fbits, bool is_signed, int width,                 \
                                  enum fp_rounding mode);                                                              \
    /* value / 2^fbits, rounded by FPCR; a narrower source is extended by the caller. */                               \
    uint##N##_t fp##N##_from_int_exact(struct fpu *fp, uint64_t value, bool is_signed, int fbits);

FPU_DECLARE(32)
FPU_DECLARE(64)
#undef FPU_DECLARE

uint16_t fp32_to_fp16(struct fpu *fp, uint32_t a);
uint16_t fp64_to_fp16(struct fpu *fp, uint64_t a);
uint32_t fp16_to_fp32(struct fpu *fp, uint16_t a);
uint64_t fp16_to_fp64(struct fpu *fp, uint16_t a);
uint64_t fp32_to_fp64_exact(struct fpu *fp, uint32_t a);
uint32_t fp64_to_fp32_exact(struct fpu *fp, uint64_t a);
uint32_t fp64_to_fp32_odd(struct fpu *fp, uint64_t a); /* FCVTXN */

uint32_t fpu_urecpe(uint32_t a);
uint32_t fpu_ursqrte(uint32_t a);

/* ---- fast paths -------------------------------------------------------------------------------------------------- */

static inline double fp64_host(uint64_t a) { double d; memcpy(&d, &a, 8); return d; }
static inline uint64_t fp64_bits(double d) { uint64_t a; memcpy(&a, &d, 8); return a; }
static inline float fp32_host(uint32_t a) { float f; memcpy(&f, &a, 4); return f; }
static inline uint32_t fp32_bits(float f) { uint32_t a; memcpy(&a, &f, 4); return a; }

/* Nearest-even, no flushing: then the host differs from Arm only in NaNs, flags, and when it sees underflow. */
static inline bool fpu_host_mode(const struct fpu *fp) { return !(fp->fpcr & (FPCR_RMODE | FPCR_FZ)); }
static inline bool fpu_inexact_seen(const struct fpu *fp) { return fp->fpsr & FPSR_IXC; }

static inline bool fp64_finite(uint64_t a) { return (a << 1) < 0xffe0000000000000u; }
static inline bool fp32_finite(uint32_t a) { return (a << 1) < 0xff000000u; }

/* Above the smallest normal number, so that tininess before rounding is excluded as well, and finite. */
static inline bool fp64_clear(uint64_t r) { return (r << 1) - 0x0020000000000001u < 0xffbfffffffffffffu; }
static inline bool fp32_clear(uint32_t r) { return (uint32_t)(r << 1) - 0x01000001u < 0xfdffffffu; }

/* Large enough for the residual of a product or quotient to be representable, which makes it a proof of exactness. */
static inline bool fp64_provable(double r) { return fabs(r) > 0x1p-900; }

/* Knuth's two-sum: the rounding error of r = a + b is itself a floating-point number. An overflow inside fails safe. */
static inline bool fp64_sum_exact(double a, double b, double r) {
    double part = r - a;
    return (a - (r - part)) + (b - part) == 0.0;
}

static inline bool fp32_sum_exact(float a, float b, float r) {
    float part = r - a;
    return (a - (r - part)) + (b - part) == 0.0f;
}

/* An exact zero, as opposed to an underflow; a zero that muladd adds to it keeps it exact. */
static inline bool fp64_zero(double a, double b, double r) { return r == 0.0 && (a == 0.0 || b == 0.0); }
static inline bool fp32_zero(float a, float b, float r) { return r == 0.0f && (a == 0.0f || b == 0.0f); }

static inline bool fp64_product_exact(double a, double b, double r) { return fp64_provable(r) && fma(a, b, -r) == 0.0; }

/* A sum below the normal range is always exact, so only NaN and infinity leave the fast path. */
static inline uint64_t fp64_add(struct fpu *fp, uint64_t a, uint64_t b) {
    double x = fp64_host(a), y = fp64_host(b), r = x + y;
    if (fpu_host_mode(fp) && fp64_finite(fp64_bits(r)) && (fpu_inexact_seen(fp) || fp64_sum_exact(x, y, r)))
        return fp64_bits(r);
    return fp64_add_exact(fp, a, b);
}

static inline uint32_t fp32_add(struct fpu *fp, uint32_t a, uint32_t b) {
    float x = fp32_host(a), y = fp32_host(b), r = x + y;
    if (fpu_host_mode(fp) && fp32_finite(fp32_bits(r)) && (fpu_inexact_seen(fp) || fp32_sum_exact(x, y, r)))
        return fp32_bits(r);
    return fp32_add_exact(fp, a, b);
}

static inline uint64_t fp64_sub(struct fpu *fp, uint64_t a, uint64_t b) {
    double x = fp64_host(a), y = fp64_host(b), r = x - y;
    if (fpu_host_mode(fp) && fp64_finite(fp64_bits(r)) && (fpu_inexact_seen(fp) || fp64_sum_exact(x, -y, r)))
        return fp64_bits(r);
    return fp64_sub_exact(fp, a, b);
}

static inline uint32_t fp32_sub(struct fpu *fp, uint32_t a, uint32_t b) {
    float x = fp32_host(a), y = fp32_host(b), r = x - y;
    if (fpu_host_mode(fp) && fp32_finite(fp32_bits(r)) && (fpu_inexact_seen(fp) || fp32_sum_exact(x, -y, r)))
        return fp32_bits(r);
    return fp32_sub_exact(fp, a, b);
}

static inline uint64_t fp64_mul(struct fpu *fp, uint64_t a, uint64_t b) {
    double x = fp64_host(a), y = fp64_host(b), r = x * y;
    if (fpu_host_mode(fp) && (fp64_zero(x, y, r) ||
                              (fp64_clear(fp64_bits(r)) && (fpu_inexact_seen(fp) || fp64_product_exact(x, y, r)))))
        return fp64_bits(r);
    return fp64_mul_exact(fp, a, b);
}

static inline uint32_t fp32_mul(struct fpu *fp, uint32_t a, uint32_t b) {
    float x = fp32_host(a), y = fp32_host(b), r = x * y;
    if (fpu_host_mode(fp) && (fp32_zero(x, y, r) ||
                              (fp32_clear(fp32_bits(r)) && (fpu_inexact_seen(fp) || (double)x * y == r))))
        return fp32_bits(r);
    return fp32_mul_exact(fp, a, b);
}

static inline uint64_t fp64_div(struct fpu *fp, uint64_t a, uint64_t b) {
    double x = fp64_host(a), y = fp64_host(b), r = x / y;
    if (fpu_host_mode(fp) && fp64_clear(fp64_bits(r)) &&
        (fpu_inexact_seen(fp) || (fp64_provable(x) && fma(r, y, -x) == 0.0)))
        return fp64_bits(r);
    return fp64_div_exact(fp, a, b);
}

static inline uint32_t fp32_div(struct fpu *fp, uint32_t a, uint32_t b) {
    float x = fp32_host(a), y = fp32_host(b), r = x / y;
    if (fpu_host_mode(fp) && fp32_clear(fp32_bits(r)) && (fpu_inexact_seen(fp) || (double)r * y == x))
        return fp32_bits(r);
    return fp32_div_exact(fp, a, b);
}

static inline uint64_t fp64_sqrt(struct fpu *fp, uint64_t a) {
    double x = fp64_host(a);
    if (fpu_host_mode(fp) && x > 0x1p-900 && fp64_finite(a)) {
        double r = sqrt(x);
        if (fpu_inexact_seen(fp) || fma(r, r, -x) == 0.0)
            return fp64_bits(r);
    }
    return fp64_sqrt_exact(fp, a);
}

static inline uint32_t fp32_sqrt(struct fpu *fp, uint32_t a) {
    float x = fp32_host(a);
    if (fpu_host_mode(fp) && x > 0.0f && fp32_finite(a)) {
        float r = sqrtf(x);
        if (fpu_inexact_seen(fp) || (double)r * r == x)
            return fp32_bits(r);
    }
    return fp32_sqrt_exact(fp, a);
}

/* addend + a * b with one rounding. */
static inline uint64_t fp64_muladd(struct fpu *fp, uint64_t addend, uint64_t a, uint64_t b) {
    if (fpu_host_mode(fp)) {
        double x = fp64_host(a), y = fp64_host(b), z = fp64_host(addend), r = fma(x, y, z), product = x * y;
        if (fp64_zero(x, y, r) || (fp64_clear(fp64_bits(r)) &&
                                   (fpu_inexact_seen(fp) ||
                                    (fp64_product_exact(x, y, product) && fp64_sum_exact(z, product, r)))))
            return fp64_bits(r);
    }
    return fp64_muladd_exact(fp, addend, a, b);
}

static inline uint32_t fp32_muladd(struct fpu *fp, uint32_t addend, uint32_t a, uint32_t b) {
    if (fpu_host_mode(fp)) {
        float x = fp32_host(a), y = fp32_host(b), z = fp32_host(addend), r = fmaf(x, y, z);
        if (fp32_zero(x, y, r) ||
            (fp32_clear(fp32_bits(r)) && (fpu_inexact_seen(fp) || fp64_sum_exact((double)x * y, z, r))))
            return fp32_bits(r);
    }
    return fp32_muladd_exact(fp, addend, a, b);
}

static inline unsigned fp64_compare(struct fpu *fp, uint64_t a, uint64_t b, bool signal_nans) {
    double x = fp64_host(a), y = fp64_host(b);
    if (!(fp->fpcr & FPCR_FZ) && !isunordered(x, y))
        return x < y ? FP_LESS : x > y ? FP_GREATER : FP_EQUAL;
    return fp64_compare_exact(fp, a, b, signal_nans);
}

static inline unsigned fp32_compare(struct fpu *fp, uint32_t a, uint32_t b, bool signal_nans) {
    float x = fp32_host(a), y = fp32_host(b);
    if (!(fp->fpcr & FPCR_FZ) && !isunordered(x, y))
        return x < y ? FP_LESS : x > y ? FP_GREATER : FP_EQUAL;
    return fp32_compare_exact(fp, a, b, signal_nans);
}

static inline uint64_t fp32_to_fp64(struct fpu *fp, uint32_t a) {
    return fpu_host_mode(fp) && fp32_finite(a) ? fp64_bits(fp32_host(a)) : fp32_to_fp64_exact(fp, a);
}

static inline uint32_t fp64_to_fp32(struct fpu *fp, uint64_t a) {
    float r = (float)fp64_host(a);
    if (fpu_host_mode(fp) && fp32_clear(fp32_bits(r)) && (fpu_inexact_seen(fp) || r == fp64_host(a)))
        return fp32_bits(r);
    return fp64_to_fp32_exact(fp, a);
}

/* An integer that the format holds is exact in every mode. */
static inline uint64_t fp64_from_int(struct fpu *fp, uint64_t value, bool is_signed, int fbits) {
    if (!fbits && (is_signed || !(value >> 63)) && value + (1ull << 53) <= 1ull << 54)
        return fp64_bits((double)(int64_t)value);
    return fp64_from_int_exact(fp, value, is_signed, fbits);
}

static inline uint32_t fp32_from_int(struct fpu *fp, uint64_t value, bool is_signed, int fbits) {
    if (!fbits && (is_signed || !(value >> 63)) && value + (1ull << 24) <= 1ull << 25)
        return fp32_bits((float)(int64_t)value);
    return fp32_from_int_exact(fp, value, is_signed, fbits);
}

/* In range, and either integral or truncated with the flag that this sets already set. */
static inline uint64_t fp64_to_int(struct fpu *fp, uint64_t a, int fbits, bool is_signed, int width,
                                   enum fp_rounding mode) {
    double x = fp64_host(a);
    if (!fbits && fpu_host_mode(fp) && fabs(x) < 0x1p31 && (is_signed || x >= 0.0)) {
        int64_t integer = (int64_t)x;
        if ((double)integer == x || (mode == ROUND_ZERO && fpu_inexact_seen(fp)))
            return width == 64 ? (uint64_t)integer : (uint32_t)integer;
    }
    return fp64_to_int_exact(fp, a, fbits, is_signed, width, mode);
}

static inline uint64_t fp32_to_int(struct fpu *fp, uint32_t a, int fbits, bool is_signed, int width,
                                   enum fp_rounding mode) {
    float x = fp32_host(a);
    if (!fbits && fpu_host_mode(fp) && fabsf(x) < 0x1p31f && (is_signed || x >= 0.0f)) {
        int64_t integer = (int64_t)x;
        if ((float)integer == x || (mode == ROUND_ZERO && fpu_inexact_seen(fp)))
            return width == 64 ? (uint64_t)integer : (uint32_t)integer;
    }
    return fp32_to_int_exact(fp, a, fbits, is_signed, width, mode);
}

#endif
