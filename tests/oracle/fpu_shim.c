/* One entry that runs an operation of softhv's fpu over an array of cases, for tests/oracle/test_fpu.py. */
#include <stddef.h>

#include "fpu.h"

struct operands { uint64_t a, b, c, unused; };
struct outcome { uint64_t result, fpsr; };

typedef uint64_t operation(struct fpu *fp, uint64_t a, uint64_t b, uint64_t c);

#define EACH(N, T)                                                                                                     \
    static uint64_t add##N(struct fpu *fp, uint64_t a, uint64_t b, uint64_t c) { (void)c; return fp##N##_add(fp, (T)a, (T)b); } \
    static uint64_t sub##N(struct fpu *fp, uint64_t a, uint64_t b, uint64_t c) { (void)c; return fp##N##_sub(fp, (T)a, (T)b); } \
    static uint64_t mul##N(struct fpu *fp, uint64_t a, uint64_t b, uint64_t c) { (void)c; return fp##N##_mul(fp, (T)a, (T)b); } \
    static uint64_t div##N(struct fpu *fp, uint64_t a, uint64_t b, uint64_t c) { (void)c; return fp##N##_div(fp, (T)a, (T)b); } \
    static uint64_t mulx##N(struct fpu *fp, uint64_t a, uint64_t b, uint64_t c) { (void)c; return fp##N##_mulx(fp, (T)a, (T)b); } \
    static uint64_t max##N(struct fpu *fp, uint64_t a, uint64_t b, uint64_t c) { (void)c; return fp##N##_max(fp, (T)a, (T)b); } \
    static uint64_t min##N(struct fpu *fp, uint64_t a, uint64_t b, uint64_t c) { (void)c; return fp##N##_min(fp, (T)a, (T)b); } \
    static uint64_t maxnm##N(struct fpu *fp, uint64_t a, uint64_t b, uint64_t c) { (void)c; return fp##N##_maxnm(fp, (T)a, (T)b); } \
    static uint64_t minnm##N(struct fpu *fp, uint64_t a, uint64_t b, uint64_t c) { (void)c; return fp##N##_minnm(fp, (T)a, (T)b); } \
    static uint64_t recps##N(struct fpu *fp, uint64_t a, uint64_t b, uint64_t c) { (void)c; return fp##N##_recps(fp, (T)a, (T)b); } \
    static uint64_t rsqrts##N(struct fpu *fp, uint64_t a, uint64_t b, uint64_t c) { (void)c; return fp##N##_rsqrts(fp, (T)a, (T)b); } \
    static uint64_t muladd##N(struct fpu *fp, uint64_t a, uint64_t b, uint64_t c) { return fp##N##_muladd(fp, (T)c, (T)a, (T)b); } \
    static uint64_t cmp##N(struct fpu *fp, uint64_t a, uint64_t b, uint64_t c) { (void)c; return (uint64_t)fp##N##_compare(fp, (T)a, (T)b, false) << 28; } \
    static uint64_t cmpe##N(struct fpu *fp, uint64_t a, uint64_t b, uint64_t c) { (void)c; return (uint64_t)fp##N##_compare(fp, (T)a, (T)b, true) << 28; } \
    static uint64_t sqrt##N(struct fpu *fp, uint64_t a, uint64_t b, uint64_t c) { (void)b; (void)c; return fp##N##_sqrt(fp, (T)a); } \
    static uint64_t recpe##N(struct fpu *fp, uint64_t a, uint64_t b, uint64_t c) { (void)b; (void)c; return fp##N##_recpe(fp, (T)a); } \
    static uint64_t rsqrte##N(struct fpu *fp, uint64_t a, uint64_t b, uint64_t c) { (void)b; (void)c; return fp##N##_rsqrte(fp, (T)a); } \
    static uint64_t recpx##N(struct fpu *fp, uint64_t a, uint64_t b, uint64_t c) { (void)b; (void)c; return fp##N##_recpx(fp, (T)a); } \
    /* b: rounding mode | exact << 3 */                                                                                \
    static uint64_t rint##N(struct fpu *fp, uint64_t a, uint64_t b, uint64_t c) { (void)c; return fp##N##_round_int(fp, (T)a, (enum fp_rounding)(b & 7), b >> 3 & 1); } \
    /* b: fbits, c: rounding mode | signed << 3 | 64-bit << 4 */                                                       \
    static uint64_t toint##N(struct fpu *fp, uint64_t a, uint64_t b, uint64_t c) { return fp##N##_to_int(fp, (T)a, (int)b, c >> 3 & 1, c >> 4 & 1 ? 64 : 32, (enum fp_rounding)(c & 7)); } \
    static uint64_t fromint##N(struct fpu *fp, uint64_t a, uint64_t b, uint64_t c) { bool is_signed = c >> 3 & 1; if (!(c >> 4 & 1)) a = is_signed ? (uint64_t)(int32_t)a : (uint32_t)a; return fp##N##_from_int(fp, a, is_signed, (int)b); }

EACH(32, uint32_t)
EACH(64, uint64_t)

#define CONVERSION(name, T) static uint64_t name##_(struct fpu *fp, uint64_t a, uint64_t b, uint64_t c) { (void)b; (void)c; return name(fp, (T)a); }
CONVERSION(fp16_to_fp32, uint16_t)
CONVERSION(fp16_to_fp64, uint16_t)
CONVERSION(fp32_to_fp16, uint32_t)
CONVERSION(fp32_to_fp64, uint32_t)
CONVERSION(fp64_to_fp16, uint64_t)
CONVERSION(fp64_to_fp32, uint64_t)
CONVERSION(fp64_to_fp32_odd, uint64_t)
static uint64_t urecpe(struct fpu *fp, uint64_t a, uint64_t b, uint64_t c) { (void)fp; (void)b; (void)c; return fpu_urecpe((uint32_t)a); }
static uint64_t ursqrte(struct fpu *fp, uint64_t a, uint64_t b, uint64_t c) { (void)fp; (void)b; (void)c; return fpu_ursqrte((uint32_t)a); }

#define BOTH(name) {#name "32", name##32}, {#name "64", name##64}
static const struct { const char *name; operation *run; } operations[] = {
    BOTH(add), BOTH(sub), BOTH(mul), BOTH(div), BOTH(mulx), BOTH(max), BOTH(min), BOTH(maxnm), BOTH(minnm), BOTH(recps),
    BOTH(rsqrts), BOTH(muladd), BOTH(cmp), BOTH(cmpe), BOTH(sqrt), BOTH(recpe), BOTH(rsqrte), BOTH(recpx), BOTH(rint),
    BOTH(toint), BOTH(fromint), {"half_to_32", fp16_to_fp32_}, {"half_to_64", fp16_to_fp64_},
    {"half_from_32", fp32_to_fp16_}, {"half_from_64", fp64_to_fp16_}, {"widen", fp32_to_fp64_}, {"narrow", fp64_to_fp32_},
    {"narrow_odd", fp64_to_fp32_odd_}, {"urecpe", urecpe}, {"ursqrte", ursqrte},
};

/* fixed_b, fixed_c: parameters of the operation that its encoding holds; they replace b and c where not negative. */
bool fpu_run(const char *name, uint32_t fpcr, uint32_t fpsr, size_t count, const struct operands *in, int fixed_b,
             int fixed_c, struct outcome *out)
{
    for (size_t i = 0; i < sizeof operations / sizeof *operations; i++) {
        if (strcmp(operations[i].name, name))
            continue;
        for (size_t j = 0; j < count; j++) {
            struct fpu fp = {fpcr, fpsr};
            uint64_t b = fixed_b < 0 ? in[j].b : (uint64_t)fixed_b, c = fixed_c < 0 ? in[j].c : (uint64_t)fixed_c;
            out[j].result = operations[i].run(&fp, in[j].a, b, c);
            out[j].fpsr = fp.fpsr;
        }
        return true;
    }
    return false;
}
