/* One entry that runs an operation of softhv's fpu over an array of cases, for tests/oracle/test_fpu.py. */
#include <stddef.h>

#include "fpu.h"

struct operands { uint64_t a, b, c, unused; };
struct outcome { uint64_t result, fpsr; };

typedef uint64_t operation(struct fpu *fp, uint64_t a, uint64_t b, uint64_t c);

#define OPERATION(name, value)                                                                                         \
    static uint64_t name(struct fpu *fp, uint64_t a, uint64_t b, uint64_t c) {                                         \
        (void)fp, (void)b, (void)c;                                                                                    \
        return value;                                                                                                  \
    }
#define UNARY(op, N, T) OPERATION(op##N, fp##N##_##op(fp, (T)a))
#define BINARY(op, N, T) OPERATION(op##N, fp##N##_##op(fp, (T)a, (T)b))

/* Operations with parameters in b and c: rint has rounding mode | exact << 3 in b; conversions to and from integers
 * have the fraction bits in b, and in c rounding mode | signed << 3 | 64-bit << 4. */
#define EACH(N, T)                                                                                                     \
    BINARY(add, N, T)                                                                                                  \
    BINARY(sub, N, T)                                                                                                  \
    BINARY(mul, N, T)                                                                                                  \
    BINARY(div, N, T)                                                                                                  \
    BINARY(mulx, N, T)                                                                                                 \
    BINARY(max, N, T)                                                                                                  \
    BINARY(min, N, T)                                                                                                  \
    BINARY(maxnm, N, T)                                                                                                \
    BINARY(minnm, N, T)                                                                                                \
    BINARY(recps, N, T)                                                                                                \
    BINARY(rsqrts, N, T)                                                                                               \
    UNARY(sqrt, N, T)                                                                                                  \
    UNARY(recpe, N, T)                                                                                                 \
    UNARY(rsqrte, N, T)                                                                                                \
    UNARY(recpx, N, T)                                                                                                 \
    OPERATION(muladd##N, fp##N##_muladd(fp, (T)c, (T)a, (T)b))                                                         \
    OPERATION(cmp##N, (uint64_t)fp##N##_compare(fp, (T)a, (T)b, false) << 28)                                          \
    OPERATION(cmpe##N, (uint64_t)fp##N##_compare(fp, (T)a, (T)b, true) << 28)                                          \
    OPERATION(rint##N, fp##N##_round_int(fp, (T)a, b & 7, b >> 3 & 1))                                                 \
    OPERATION(toint##N, fp##N##_to_int(fp, (T)a, (int)b, c >> 3 & 1, c >> 4 & 1 ? 64 : 32, c & 7))                     \
    OPERATION(fromint##N, fp##N##_from_int(fp, integer(a, c), c >> 3 & 1, (int)b))

static uint64_t integer(uint64_t a, uint64_t c) {
    return c >> 4 & 1 ? a : c >> 3 & 1 ? (uint64_t)(int32_t)a : (uint32_t)a;
}

EACH(32, uint32_t)
EACH(64, uint64_t)
OPERATION(half_to_32, fp16_to_fp32(fp, (uint16_t)a))
OPERATION(half_to_64, fp16_to_fp64(fp, (uint16_t)a))
OPERATION(half_from_32, fp32_to_fp16(fp, (uint32_t)a))
OPERATION(half_from_64, fp64_to_fp16(fp, a))
OPERATION(widen, fp32_to_fp64(fp, (uint32_t)a))
OPERATION(narrow, fp64_to_fp32(fp, a))
OPERATION(narrow_odd, fp64_to_fp32_odd(fp, a))
OPERATION(urecpe, fpu_urecpe((uint32_t)a))
OPERATION(ursqrte, fpu_ursqrte((uint32_t)a))

#define ONE(name) {#name, name}
#define BOTH(name) {#name "32", name##32}, {#name "64", name##64}
static const struct {
    const char *name;
    operation *run;
} operations[] = {
    BOTH(add), BOTH(sub), BOTH(mul), BOTH(div), BOTH(mulx), BOTH(max), BOTH(min), BOTH(maxnm), BOTH(minnm), BOTH(recps),
    BOTH(rsqrts), BOTH(muladd), BOTH(cmp), BOTH(cmpe), BOTH(sqrt), BOTH(recpe), BOTH(rsqrte), BOTH(recpx), BOTH(rint),
    BOTH(toint), BOTH(fromint), ONE(half_to_32), ONE(half_to_64), ONE(half_from_32), ONE(half_from_64), ONE(widen),
    ONE(narrow), ONE(narrow_odd), ONE(urecpe), ONE(ursqrte),
};

/* fixed_b, fixed_c: parameters of the operation that its encoding holds; they replace b and c where not negative. */
bool fpu_run(const char *name, uint32_t fpcr, uint32_t fpsr, size_t count, const struct operands *in, int fixed_b,
             int fixed_c, struct outcome *out) {
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
