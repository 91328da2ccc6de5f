/*
 * The exact core: unpack to sign, exponent and significand, compute on integers wide enough to lose nothing (or to
 * keep what is lost as a sticky bit), round once. Follows the functions of the same purpose in the Arm ARM's
 * pseudocode (J1, shared/functions/float), whose names are given where they help.
 */
#include "fpu.h"

__extension__ typedef unsigned __int128 u128;

struct format {
    int size;     /* bits of the whole number */
    int fraction; /* bits of the fraction field */
    int bias;
};

static const struct format format16 = {16, 10, 15}, format32 = {32, 23, 127}, format64 = {64, 52, 1023};

enum kind { ZERO, FINITE, INFINITE, QUIET, SIGNALLING };

/* A finite number is significand * 2^(exponent - 63) with the significand's top bit set. */
struct number {
    enum kind kind;
    bool sign;
    int exponent;
    uint64_t significand;
};

/* value = significand * 2^(exponent - 127), not normalised; bit 0 may be sticky. */
struct wide {
    bool sign;
    int exponent;
    u128 significand;
};

/* Below every exponent that a sum or product of non-zero numbers reaches. */
#define EXPONENT_OF_ZERO (-0x10000)

/* What rounding dropped, as a multiple of half a unit in the last place. */
enum dropped { NOTHING, BELOW_HALF, HALF, ABOVE_HALF };

#define CORE static inline __attribute__((always_inline))

static void raise_flag(struct fpu *fp, uint32_t flag) { fp->fpsr |= flag; }

/* ---- fields and constants of a format ---------------------------------------------------------------------------- */

CORE uint64_t fraction_mask(const struct format *f) { return (1ull << f->fraction) - 1; }
CORE uint64_t exponent_ones(const struct format *f) { return (1ull << (f->size - 1 - f->fraction)) - 1; }
CORE uint64_t exponent_field(const struct format *f, uint64_t a) { return a >> f->fraction & exponent_ones(f); }
CORE bool sign_of(const struct format *f, uint64_t a) { return a >> (f->size - 1) & 1; }
CORE uint64_t quiet_bit(const struct format *f) { return 1ull << (f->fraction - 1); }

CORE uint64_t build(const struct format *f, bool sign, uint64_t exponent, uint64_t fraction) {
    return (uint64_t)sign << (f->size - 1) | exponent << f->fraction | fraction;
}

CORE uint64_t zero(const struct format *f, bool sign) { return build(f, sign, 0, 0); }
CORE uint64_t infinity(const struct format *f, bool sign) { return build(f, sign, exponent_ones(f), 0); }
CORE uint64_t max_normal(const struct format *f, bool sign) {
    return build(f, sign, exponent_ones(f) - 1, fraction_mask(f));
}
CORE uint64_t default_nan(const struct format *f) { return build(f, false, exponent_ones(f), quiet_bit(f)); }
CORE uint64_t two(const struct format *f, bool sign) { return build(f, sign, (uint64_t)f->bias + 1, 0); }

CORE uint64_t invalid(struct fpu *fp, const struct format *f) {
    raise_flag(fp, FPSR_IOC);
    return default_nan(f);
}

/* FPUnpackBase. Half precision exists only as a source of conversions, which do not flush it (FPUnpackCV). */
CORE struct number unpack(struct fpu *fp, const struct format *f, uint64_t a) {
    uint64_t fraction = a & fraction_mask(f), exponent = exponent_field(f, a);
    struct number n = {ZERO, sign_of(f, a), EXPONENT_OF_ZERO, 0};

    if (exponent == 0) {
        if (!fraction)
            return n;
        if ((fp->fpcr & FPCR_FZ) && f->size != 16) {
            raise_flag(fp, FPSR_IDC);
            return n;
        }
        int shift = __builtin_clzll(fraction);
        n.kind = FINITE;
        n.significand = fraction << shift;
        n.exponent = 1 - f->bias + 63 - f->fraction - shift;
    } else if (exponent == exponent_ones(f) && !(f->size == 16 && (fp->fpcr & FPCR_AHP))) {
        n.kind = !fraction ? INFINITE : fraction & quiet_bit(f) ? QUIET : SIGNALLING;
    } else {
        n.kind = FINITE;
        n.significand = 1ull << 63 | fraction << (63 - f->fraction);
        n.exponent = (int)exponent - f->bias;
    }
    return n;
}

CORE bool is_nan(struct number n) { return n.kind >= QUIET; }

/* ---- NaNs -------------------------------------------------------------------------------------------------------- */

/* FPProcessNaN */
CORE uint64_t propagate(struct fpu *fp, const struct format *f, struct number n, uint64_t a) {
    if (n.kind == SIGNALLING)
        raise_flag(fp, FPSR_IOC);
    return fp->fpcr & FPCR_DN ? default_nan(f) : a | quiet_bit(f);
}

/* FPProcessNaNs: signalling before quiet, then in operand order. */
CORE bool propagate2(struct fpu *fp, const struct format *f, struct number na, uint64_t a, struct number nb, uint64_t b,
                     uint64_t *result) {
    if (na.kind == SIGNALLING || (na.kind == QUIET && nb.kind != SIGNALLING))
        *result = propagate(fp, f, na, a);
    else if (is_nan(nb))
        *result = propagate(fp, f, nb, b);
    else
        return false;
    return true;
}

/* ---- rounding ---------------------------------------------------------------------------------------------------- */

CORE int leading_zeros(u128 v) {
    uint64_t high = (uint64_t)(v >> 64);
    return high ? __builtin_clzll(high) : 64 + __builtin_clzll((uint64_t)v);
}

/* The integer part of v / 2^shift (shift > 0, v's top bit set) and what was dropped. */
CORE u128 shift_out(u128 v, int shift, enum dropped *dropped) {
    if (shift > 128) {
        *dropped = BELOW_HALF;
        return 0;
    }
    u128 half = (u128)1 << (shift - 1), rest = v & (half | (half - 1));
    *dropped = !rest ? NOTHING : rest < half ? BELOW_HALF : rest == half ? HALF : ABOVE_HALF;
    return shift == 128 ? 0 : v >> shift;
}

CORE bool rounds_up(enum fp_rounding mode, bool sign, bool odd, enum dropped dropped) {
    switch (mode) {
    case ROUND_TIEEVEN: return dropped == ABOVE_HALF || (dropped == HALF && odd);
    case ROUND_TIEAWAY: return dropped >= HALF;
    case ROUND_POSINF: return dropped && !sign;
    case ROUND_NEGINF: return dropped && sign;
    case ROUND_ZERO:
    case ROUND_ODD: break;
    }
    return false;
}

CORE bool overflows_to_infinity(enum fp_rounding mode, bool sign) {
    return mode == ROUND_TIEEVEN || (mode == ROUND_POSINF && !sign) || (mode == ROUND_NEGINF && sign);
}

/* FPRoundBase; FPRoundCV where the format is half precision. The value must not be zero. */
CORE uint64_t round_to(struct fpu *fp, const struct format *f, struct wide w, enum fp_rounding mode) {
    int zeros = leading_zeros(w.significand), exponent = w.exponent - zeros, min_exponent = 1 - f->bias;
    int shift = 127 - f->fraction, biased = exponent - min_exponent + 1;
    bool alternative = f->size == 16 && (fp->fpcr & FPCR_AHP);

    if (biased <= 0) {
        if ((fp->fpcr & FPCR_FZ) && f->size != 16) {
            raise_flag(fp, FPSR_UFC);
            return zero(f, w.sign);
        }
        shift += 1 - biased;
        biased = 0;
    }
    enum dropped dropped;
    uint64_t mantissa = (uint64_t)shift_out(w.significand << zeros, shift, &dropped);
    if (biased == 0 && dropped)
        raise_flag(fp, FPSR_UFC);
    if (rounds_up(mode, w.sign, mantissa & 1, dropped)) {
        mantissa++;
        if (mantissa == 1ull << f->fraction)
            biased = 1;
        if (mantissa == 2ull << f->fraction) {
            biased++;
            mantissa >>= 1;
        }
    }
    if (dropped && mode == ROUND_ODD)
        mantissa |= 1;
    if (alternative) {
        if (biased > (int)exponent_ones(f)) {
            raise_flag(fp, FPSR_IOC);
            return build(f, w.sign, exponent_ones(f), fraction_mask(f));
        }
    } else if (biased >= (int)exponent_ones(f)) {
        raise_flag(fp, FPSR_OFC | FPSR_IXC);
        return overflows_to_infinity(mode, w.sign) ? infinity(f, w.sign) : max_normal(f, w.sign);
    }
    if (dropped)
        raise_flag(fp, FPSR_IXC);
    return build(f, w.sign, (uint64_t)biased, mantissa & fraction_mask(f));
}

/* ---- arithmetic -------------------------------------------------------------------------------------------------- */

/* One bit of headroom is left at the top for a sum's carry. */
CORE struct wide widen(struct number n) { return (struct wide){n.sign, n.exponent + 1, (u128)n.significand << 63}; }

/* The bit shifted out is zero: no format has more than 53 significant bits. */
CORE struct wide product_of(struct number a, struct number b) {
    return (struct wide){a.sign != b.sign, a.exponent + b.exponent + 2, (u128)a.significand * b.significand >> 1};
}

/* Bits lost in alignment stay as a sticky bit: they are lost only when the larger operand, at most 106 bits wide, has
 * zeros in those places, so that neither the sum nor the difference can be mistaken for an exact one. */
CORE struct wide sum_of(struct wide a, struct wide b) {
    if (a.exponent < b.exponent) {
        struct wide swap = a;
        a = b;
        b = swap;
    }
    int shift = a.exponent - b.exponent;
    if (shift > 127)
        b.significand = b.significand != 0;
    else if (shift)
        b.significand = b.significand >> shift | ((b.significand << (128 - shift)) != 0);
    if (a.sign == b.sign)
        a.significand += b.significand;
    else if (a.significand >= b.significand)
        a.significand -= b.significand;
    else
        a = (struct wide){b.sign, a.exponent, b.significand - a.significand};
    return a;
}

CORE uint64_t round_sum(struct fpu *fp, const struct format *f, struct wide w) {
    enum fp_rounding mode = fp_rounding_mode(fp);
    return w.significand ? round_to(fp, f, w, mode) : zero(f, mode == ROUND_NEGINF);
}

/* FPAdd, FPSub */
CORE uint64_t add(struct fpu *fp, const struct format *f, uint64_t a, uint64_t b, bool negate) {
    struct number x = unpack(fp, f, a), y = unpack(fp, f, b);
    uint64_t nan;
    if (propagate2(fp, f, x, a, y, b, &nan))
        return nan;
    y.sign ^= negate;
    if (x.kind == INFINITE && y.kind == INFINITE && x.sign != y.sign)
        return invalid(fp, f);
    if (x.kind == INFINITE || y.kind == INFINITE)
        return infinity(f, x.kind == INFINITE ? x.sign : y.sign);
    if (x.kind == ZERO && y.kind == ZERO && x.sign == y.sign)
        return zero(f, x.sign);
    return round_sum(fp, f, sum_of(widen(x), widen(y)));
}

CORE bool zero_times_infinity(struct number x, struct number y) {
    return (x.kind == ZERO && y.kind == INFINITE) || (x.kind == INFINITE && y.kind == ZERO);
}

/* FPMul, FPMulX */
CORE uint64_t mul(struct fpu *fp, const struct format *f, uint64_t a, uint64_t b, bool extended) {
    struct number x = unpack(fp, f, a), y = unpack(fp, f, b);
    bool sign = x.sign != y.sign;
    uint64_t nan;
    if (propagate2(fp, f, x, a, y, b, &nan))
        return nan;
    if (zero_times_infinity(x, y))
        return extended ? two(f, sign) : invalid(fp, f);
    if (x.kind == INFINITE || y.kind == INFINITE)
        return infinity(f, sign);
    if (x.kind == ZERO || y.kind == ZERO)
        return zero(f, sign);
    return round_to(fp, f, product_of(x, y), fp_rounding_mode(fp));
}

/* FPDiv */
CORE uint64_t divide(struct fpu *fp, const struct format *f, uint64_t a, uint64_t b) {
    struct number x = unpack(fp, f, a), y = unpack(fp, f, b);
    bool sign = x.sign != y.sign;
    uint64_t nan;
    if (propagate2(fp, f, x, a, y, b, &nan))
        return nan;
    if (x.kind == y.kind && x.kind != FINITE)
        return invalid(fp, f);
    if (x.kind == INFINITE || y.kind == ZERO) {
        if (x.kind != INFINITE)
            raise_flag(fp, FPSR_DZC);
        return infinity(f, sign);
    }
    if (x.kind == ZERO || y.kind == INFINITE)
        return zero(f, sign);
    u128 dividend = (u128)x.significand << 63, quotient = dividend / y.significand;
    u128 sticky = dividend % y.significand != 0;
    return round_to(fp, f, (struct wide){sign, x.exponent - y.exponent, quotient << 64 | sticky}, fp_rounding_mode(fp));
}

/* The root of a value whose top bit is 126 or 127, digit by digit. */
CORE uint64_t integer_root(u128 value, bool *inexact) {
    u128 root = 0;
    for (u128 bit = (u128)1 << 126; bit; bit >>= 2) {
        if (value >= root + bit) {
            value -= root + bit;
            root = (root >> 1) + bit;
        } else {
            root >>= 1;
        }
    }
    *inexact = value != 0;
    return (uint64_t)root;
}

/* FPSqrt */
CORE uint64_t square_root(struct fpu *fp, const struct format *f, uint64_t a) {
    struct number x = unpack(fp, f, a);
    if (is_nan(x))
        return propagate(fp, f, x, a);
    if (x.kind == ZERO)
        return zero(f, x.sign);
    if (x.sign)
        return invalid(fp, f);
    if (x.kind == INFINITE)
        return infinity(f, false);
    bool sticky;
    bool odd = x.exponent & 1;
    uint64_t root = integer_root((u128)x.significand << (odd ? 64 : 63), &sticky);
    return round_to(fp, f, (struct wide){false, (x.exponent - odd) / 2, (u128)root << 64 | sticky},
                    fp_rounding_mode(fp));
}

/* FPMulAdd */
CORE uint64_t muladd(struct fpu *fp, const struct format *f, uint64_t addend, uint64_t a, uint64_t b) {
    struct number z = unpack(fp, f, addend), x = unpack(fp, f, a), y = unpack(fp, f, b);
    bool sign = x.sign != y.sign;

    if (zero_times_infinity(x, y) && z.kind != SIGNALLING)
        return invalid(fp, f);
    if (is_nan(z) || is_nan(x) || is_nan(y)) {
        if (z.kind == SIGNALLING)
            return propagate(fp, f, z, addend);
        if (x.kind == SIGNALLING)
            return propagate(fp, f, x, a);
        if (y.kind == SIGNALLING)
            return propagate(fp, f, y, b);
        return is_nan(z) ? propagate(fp, f, z, addend) : is_nan(x) ? propagate(fp, f, x, a) : propagate(fp, f, y, b);
    }
    bool infinite_product = x.kind == INFINITE || y.kind == INFINITE;
    if (z.kind == INFINITE && infinite_product && z.sign != sign)
        return invalid(fp, f);
    if (z.kind == INFINITE || infinite_product)
        return infinity(f, z.kind == INFINITE ? z.sign : sign);
    if (z.kind == ZERO && (x.kind == ZERO || y.kind == ZERO) && z.sign == sign)
        return zero(f, sign);
    return round_sum(fp, f, sum_of(widen(z), product_of(x, y)));
}

/* FPRecipStepFused: 2 - a*b; FPRSqrtStepFused: (3 - a*b) / 2. */
CORE uint64_t step(struct fpu *fp, const struct format *f, uint64_t a, uint64_t b, bool root) {
    a ^= 1ull << (f->size - 1);
    struct number x = unpack(fp, f, a), y = unpack(fp, f, b);
    uint64_t nan;
    if (propagate2(fp, f, x, a, y, b, &nan))
        return nan;
    if (zero_times_infinity(x, y))
        return root ? build(f, false, (uint64_t)f->bias, quiet_bit(f)) : two(f, false);
    if (x.kind == INFINITE || y.kind == INFINITE)
        return infinity(f, x.sign != y.sign);
    struct number constant = {FINITE, false, 1, root ? 3ull << 62 : 1ull << 63};
    struct wide w = sum_of(widen(constant), product_of(x, y));
    w.exponent -= root;
    return round_sum(fp, f, w);
}

/* ---- comparison -------------------------------------------------------------------------------------------------- */

/* The sign of x - y, neither being a NaN. */
CORE int order(struct number x, struct number y) {
    if (x.kind == ZERO && y.kind == ZERO)
        return 0;
    if (x.kind == ZERO)
        return y.sign ? 1 : -1;
    if (y.kind == ZERO || x.sign != y.sign)
        return x.sign ? -1 : 1;
    int magnitude;
    if (x.kind == INFINITE || y.kind == INFINITE)
        magnitude = (x.kind == INFINITE) - (y.kind == INFINITE);
    else if (x.exponent != y.exponent)
        magnitude = x.exponent < y.exponent ? -1 : 1;
    else
        magnitude = (x.significand > y.significand) - (x.significand < y.significand);
    return x.sign ? -magnitude : magnitude;
}

/* FPCompare */
CORE unsigned compare(struct fpu *fp, const struct format *f, uint64_t a, uint64_t b, bool signal_nans) {
    struct number x = unpack(fp, f, a), y = unpack(fp, f, b);
    if (is_nan(x) || is_nan(y)) {
        if (signal_nans || x.kind == SIGNALLING || y.kind == SIGNALLING)
            raise_flag(fp, FPSR_IOC);
        return FP_UNORDERED;
    }
    int sign = order(x, y);
    return sign < 0 ? FP_LESS : sign > 0 ? FP_GREATER : FP_EQUAL;
}

/* FPMax, FPMin, and with `number` FPMaxNum, FPMinNum: there a quiet NaN loses against a number. */
CORE uint64_t extremum(struct fpu *fp, const struct format *f, uint64_t a, uint64_t b, bool max, bool number) {
    struct number x = unpack(fp, f, a), y = unpack(fp, f, b);
    if (number && x.kind == QUIET && y.kind != QUIET) {
        a = infinity(f, max);
        x = unpack(fp, f, a);
    } else if (number && y.kind == QUIET && x.kind != QUIET) {
        b = infinity(f, max);
        y = unpack(fp, f, b);
    }
    uint64_t nan;
    if (propagate2(fp, f, x, a, y, b, &nan))
        return nan;
    int sign = order(x, y);
    bool first = max ? sign > 0 : sign < 0;
    if ((first ? x : y).kind == ZERO)
        return zero(f, max ? x.sign && y.sign : x.sign || y.sign);
    return first ? a : b;
}

/* ---- estimates --------------------------------------------------------------------------------------------------- */

/* RecipEstimate: 256 <= a < 512, nine bits in, nine bits out. */
static unsigned reciprocal_estimate(unsigned a) {
    unsigned quotient = (1u << 19) / (2 * a + 1);
    return (quotient + 1) / 2;
}

/* RecipSqrtEstimate: 128 <= a < 512. */
static unsigned root_estimate(unsigned a) {
    a = a < 256 ? 2 * a + 1 : ((a & ~1u) + 1) * 2;
    unsigned b = 512;
    while (a * (b + 1) * (b + 1) < 1u << 28)
        b++;
    return (b + 1) / 2;
}

uint32_t fpu_urecpe(uint32_t a) { return a >> 31 ? reciprocal_estimate(a >> 23) << 23 : UINT32_MAX; }
uint32_t fpu_ursqrte(uint32_t a) { return a >> 30 ? root_estimate(a >> 23) << 23 : UINT32_MAX; }

/* FPRecipEstimate. The result's biased exponent reaches -1, where it is denormal. */
CORE uint64_t recip_estimate(struct fpu *fp, const struct format *f, uint64_t a) {
    struct number x = unpack(fp, f, a);
    if (is_nan(x))
        return propagate(fp, f, x, a);
    if (x.kind == INFINITE)
        return zero(f, x.sign);
    if (x.kind == ZERO) {
        raise_flag(fp, FPSR_DZC);
        return infinity(f, x.sign);
    }
    if (x.exponent < -f->bias - 1) {
        raise_flag(fp, FPSR_OFC | FPSR_IXC);
        return overflows_to_infinity(fp_rounding_mode(fp), x.sign) ? infinity(f, x.sign) : max_normal(f, x.sign);
    }
    if ((fp->fpcr & FPCR_FZ) && x.exponent >= f->bias - 1) {
        raise_flag(fp, FPSR_UFC);
        return zero(f, x.sign);
    }
    int exponent = f->bias - 1 - x.exponent;
    uint64_t estimate = reciprocal_estimate((unsigned)(x.significand >> 55));
    uint64_t fraction = (estimate & 0xff) << (f->fraction - 8);
    if (exponent <= 0) { /* the result is denormal: the leading one becomes a bit of the fraction */
        fraction = (fraction | 1ull << f->fraction) >> (1 - exponent);
        exponent = 0;
    }
    return build(f, x.sign, (uint64_t)exponent, fraction);
}

/* FPRSqrtEstimate */
CORE uint64_t rsqrt_estimate(struct fpu *fp, const struct format *f, uint64_t a) {
    struct number x = unpack(fp, f, a);
    if (is_nan(x))
        return propagate(fp, f, x, a);
    if (x.kind == ZERO) {
        raise_flag(fp, FPSR_DZC);
        return infinity(f, x.sign);
    }
    if (x.sign)
        return invalid(fp, f);
    if (x.kind == INFINITE)
        return zero(f, false);
    /* The pseudocode's test on the biased exponent's low bit, the bias being odd. */
    bool odd = x.exponent & 1;
    uint64_t estimate = root_estimate((unsigned)(x.significand >> (odd ? 55 : 56)));
    int exponent = -1 - (x.exponent - odd) / 2;
    return build(f, false, (uint64_t)(exponent + f->bias), (estimate & 0xff) << (f->fraction - 8));
}

/* FPRecpX */
CORE uint64_t recip_exponent(struct fpu *fp, const struct format *f, uint64_t a) {
    struct number x = unpack(fp, f, a);
    if (is_nan(x))
        return propagate(fp, f, x, a);
    uint64_t exponent = exponent_field(f, a);
    return build(f, x.sign, exponent ? exponent ^ exponent_ones(f) : exponent_ones(f) - 1, 0);
}

/* ---- integers ---------------------------------------------------------------------------------------------------- */

/* |x| * 2^scale rounded to an integer; the caller has excluded results of 2^64 and above. */
CORE uint64_t to_integer(struct number x, int scale, enum fp_rounding mode, enum dropped *dropped) {
    uint64_t integer = (uint64_t)shift_out((u128)x.significand << 64, 127 - x.exponent - scale, dropped);
    return integer + rounds_up(mode, x.sign, integer & 1, *dropped);
}

/* FPToFixed */
CORE uint64_t to_fixed(struct fpu *fp, const struct format *f, uint64_t a, int fbits, bool is_signed, int width,
                       enum fp_rounding mode) {
    struct number x = unpack(fp, f, a);
    uint64_t ones = width == 64 ? UINT64_MAX : UINT32_MAX, sign_bit = 1ull << (width - 1);
    if (x.kind == ZERO)
        return 0;
    if (is_nan(x)) {
        raise_flag(fp, FPSR_IOC);
        return 0;
    }
    enum dropped dropped = NOTHING;
    bool huge = x.kind == INFINITE || x.exponent + fbits > 63;
    uint64_t limit = is_signed ? sign_bit - !x.sign : x.sign ? 0 : ones;
    uint64_t integer = huge ? 0 : to_integer(x, fbits, mode, &dropped);
    if (huge || integer > limit) {
        raise_flag(fp, FPSR_IOC);
        integer = limit;
    } else if (dropped) {
        raise_flag(fp, FPSR_IXC);
    }
    return (x.sign ? -integer : integer) & ones;
}

/* FixedToFP */
CORE uint64_t from_fixed(struct fpu *fp, const struct format *f, uint64_t value, bool is_signed, int fbits) {
    bool sign = is_signed && value >> 63;
    if (!value)
        return zero(f, false);
    uint64_t magnitude = sign ? -value : value;
    return round_to(fp, f, (struct wide){sign, 127 - fbits, magnitude}, fp_rounding_mode(fp));
}

/* FPRoundInt */
CORE uint64_t round_integral(struct fpu *fp, const struct format *f, uint64_t a, enum fp_rounding mode, bool exact) {
    struct number x = unpack(fp, f, a);
    if (is_nan(x))
        return propagate(fp, f, x, a);
    if (x.kind == ZERO)
        return zero(f, x.sign);
    if (x.kind == INFINITE || x.exponent >= f->fraction)
        return a;
    enum dropped dropped;
    uint64_t integer = to_integer(x, 0, mode, &dropped);
    if (dropped && exact)
        raise_flag(fp, FPSR_IXC);
    return integer ? round_to(fp, f, (struct wide){x.sign, 127, integer}, mode) : zero(f, x.sign);
}

/* ---- between formats --------------------------------------------------------------------------------------------- */

/* FPConvert */
CORE uint64_t convert(struct fpu *fp, const struct format *from, const struct format *to, uint64_t a,
                      enum fp_rounding mode) {
    struct number x = unpack(fp, from, a);
    bool alternative = to->size == 16 && (fp->fpcr & FPCR_AHP);

    if (is_nan(x)) {
        if (x.kind == SIGNALLING || alternative)
            raise_flag(fp, FPSR_IOC);
        if (alternative)
            return zero(to, x.sign);
        if (fp->fpcr & FPCR_DN)
            return default_nan(to);
        uint64_t payload = (a & fraction_mask(from)) << (63 - from->fraction) >> (63 - to->fraction);
        return build(to, x.sign, exponent_ones(to), payload | quiet_bit(to));
    }
    if (x.kind == INFINITE) {
        if (!alternative)
            return infinity(to, x.sign);
        raise_flag(fp, FPSR_IOC);
        return build(to, x.sign, exponent_ones(to), fraction_mask(to));
    }
    return x.kind == ZERO ? zero(to, x.sign) : round_to(fp, to, widen(x), mode);
}

uint16_t fp32_to_fp16(struct fpu *fp, uint32_t a) {
    return (uint16_t)convert(fp, &format32, &format16, a, fp_rounding_mode(fp));
}

uint16_t fp64_to_fp16(struct fpu *fp, uint64_t a) {
    return (uint16_t)convert(fp, &format64, &format16, a, fp_rounding_mode(fp));
}

uint32_t fp16_to_fp32(struct fpu *fp, uint16_t a) {
    return (uint32_t)convert(fp, &format16, &format32, a, fp_rounding_mode(fp));
}

uint64_t fp16_to_fp64(struct fpu *fp, uint16_t a) {
    return convert(fp, &format16, &format64, a, fp_rounding_mode(fp));
}

uint64_t fp32_to_fp64_exact(struct fpu *fp, uint32_t a) {
    return convert(fp, &format32, &format64, a, fp_rounding_mode(fp));
}

uint32_t fp64_to_fp32_exact(struct fpu *fp, uint64_t a) {
    return (uint32_t)convert(fp, &format64, &format32, a, fp_rounding_mode(fp));
}

uint32_t fp64_to_fp32_odd(struct fpu *fp, uint64_t a) {
    return (uint32_t)convert(fp, &format64, &format32, a, ROUND_ODD);
}

/* ---- single and double precision --------------------------------------------------------------------------------- */

#define INSTANTIATE(N, T)                                                                                              \
    T fp##N##_add_exact(struct fpu *fp, T a, T b) { return (T)add(fp, &format##N, a, b, false); }                      \
    T fp##N##_sub_exact(struct fpu *fp, T a, T b) { return (T)add(fp, &format##N, a, b, true); }                       \
    T fp##N##_mul_exact(struct fpu *fp, T a, T b) { return (T)mul(fp, &format##N, a, b, false); }                      \
    T fp##N##_mulx(struct fpu *fp, T a, T b) { return (T)mul(fp, &format##N, a, b, true); }                            \
    T fp##N##_div_exact(struct fpu *fp, T a, T b) { return (T)divide(fp, &format##N, a, b); }                          \
    T fp##N##_sqrt_exact(struct fpu *fp, T a) { return (T)square_root(fp, &format##N, a); }                            \
    T fp##N##_muladd_exact(struct fpu *fp, T c, T a, T b) { return (T)muladd(fp, &format##N, c, a, b); }               \
    unsigned fp##N##_compare_exact(struct fpu *fp, T a, T b, bool signal_nans)                                         \
    {                                                                                                                  \
        return compare(fp, &format##N, a, b, signal_nans);                                                             \
    }                                                                                                                  \
    T fp##N##_max(struct fpu *fp, T a, T b) { return (T)extremum(fp, &format##N, a, b, true, false); }                 \
    T fp##N##_min(struct fpu *fp, T a, T b) { return (T)extremum(fp, &format##N, a, b, false, false); }                \
    T fp##N##_maxnm(struct fpu *fp, T a, T b) { return (T)extremum(fp, &format##N, a, b, true, true); }                \
    T fp##N##_minnm(struct fpu *fp, T a, T b) { return (T)extremum(fp, &format##N, a, b, false, true); }               \
    T fp##N##_recpe(struct fpu *fp, T a) { return (T)recip_estimate(fp, &format##N, a); }                              \
    T fp##N##_rsqrte(struct fpu *fp, T a) { return (T)rsqrt_estimate(fp, &format##N, a); }                             \
    T fp##N##_recps(struct fpu *fp, T a, T b) { return (T)step(fp, &format##N, a, b, false); }                         \
    T fp##N##_rsqrts(struct fpu *fp, T a, T b) { return (T)step(fp, &format##N, a, b, true); }                         \
    T fp##N##_recpx(struct fpu *fp, T a) { return (T)recip_exponent(fp, &format##N, a); }                              \
    T fp##N##_round_int(struct fpu *fp, T a, enum fp_rounding mode, bool exact)                                        \
    {                                                                                                                  \
        return (T)round_integral(fp, &format##N, a, mode, exact);                                                      \
    }                                                                                                                  \
    uint64_t fp##N##_to_int_exact(struct fpu *fp, T a, int fbits, bool is_signed, int width, enum fp_rounding mode)    \
    {                                                                                                                  \
        return to_fixed(fp, &format##N, a, fbits, is_signed, width, mode);                                             \
    }                                                                                                                  \
    T fp##N##_from_int_exact(struct fpu *fp, uint64_t value, bool is_signed, int fbits)                                \
    {                                                                                                                  \
        return (T)from_fixed(fp, &format##N, value, is_signed, fbits);                                                 \
    }

INSTANTIATE(32, uint32_t)
INSTANTIATE(64, uint64_t)
