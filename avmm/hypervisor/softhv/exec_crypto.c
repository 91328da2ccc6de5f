/*
 * The cryptographic extension: AES (FIPS 197), SHA-1 and SHA-256 (FIPS 180-4), and the 64-bit polynomial product, with
 * the operands as the Arm ARM has them (C7.2; J1, shared/functions/crypto). Byte i of an AES state is in row i % 4 and
 * column i / 4.
 */
#include "exec_simd.h"

/* ---- AES --------------------------------------------------------------------------------------------------------- */

static const uint8_t sub_bytes[256] = {
    0x63, 0x7c, 0x77, 0x7b, 0xf2, 0x6b, 0x6f, 0xc5, 0x30, 0x01, 0x67, 0x2b, 0xfe, 0xd7, 0xab, 0x76,
    0xca, 0x82, 0xc9, 0x7d, 0xfa, 0x59, 0x47, 0xf0, 0xad, 0xd4, 0xa2, 0xaf, 0x9c, 0xa4, 0x72, 0xc0,
    0xb7, 0xfd, 0x93, 0x26, 0x36, 0x3f, 0xf7, 0xcc, 0x34, 0xa5, 0xe5, 0xf1, 0x71, 0xd8, 0x31, 0x15,
    0x04, 0xc7, 0x23, 0xc3, 0x18, 0x96, 0x05, 0x9a, 0x07, 0x12, 0x80, 0xe2, 0xeb, 0x27, 0xb2, 0x75,
    0x09, 0x83, 0x2c, 0x1a, 0x1b, 0x6e, 0x5a, 0xa0, 0x52, 0x3b, 0xd6, 0xb3, 0x29, 0xe3, 0x2f, 0x84,
    0x53, 0xd1, 0x00, 0xed, 0x20, 0xfc, 0xb1, 0x5b, 0x6a, 0xcb, 0xbe, 0x39, 0x4a, 0x4c, 0x58, 0xcf,
    0xd0, 0xef, 0xaa, 0xfb, 0x43, 0x4d, 0x33, 0x85, 0x45, 0xf9, 0x02, 0x7f, 0x50, 0x3c, 0x9f, 0xa8,
    0x51, 0xa3, 0x40, 0x8f, 0x92, 0x9d, 0x38, 0xf5, 0xbc, 0xb6, 0xda, 0x21, 0x10, 0xff, 0xf3, 0xd2,
    0xcd, 0x0c, 0x13, 0xec, 0x5f, 0x97, 0x44, 0x17, 0xc4, 0xa7, 0x7e, 0x3d, 0x64, 0x5d, 0x19, 0x73,
    0x60, 0x81, 0x4f, 0xdc, 0x22, 0x2a, 0x90, 0x88, 0x46, 0xee, 0xb8, 0x14, 0xde, 0x5e, 0x0b, 0xdb,
    0xe0, 0x32, 0x3a, 0x0a, 0x49, 0x06, 0x24, 0x5c, 0xc2, 0xd3, 0xac, 0x62, 0x91, 0x95, 0xe4, 0x79,
    0xe7, 0xc8, 0x37, 0x6d, 0x8d, 0xd5, 0x4e, 0xa9, 0x6c, 0x56, 0xf4, 0xea, 0x65, 0x7a, 0xae, 0x08,
    0xba, 0x78, 0x25, 0x2e, 0x1c, 0xa6, 0xb4, 0xc6, 0xe8, 0xdd, 0x74, 0x1f, 0x4b, 0xbd, 0x8b, 0x8a,
    0x70, 0x3e, 0xb5, 0x66, 0x48, 0x03, 0xf6, 0x0e, 0x61, 0x35, 0x57, 0xb9, 0x86, 0xc1, 0x1d, 0x9e,
    0xe1, 0xf8, 0x98, 0x11, 0x69, 0xd9, 0x8e, 0x94, 0x9b, 0x1e, 0x87, 0xe9, 0xce, 0x55, 0x28, 0xdf,
    0x8c, 0xa1, 0x89, 0x0d, 0xbf, 0xe6, 0x42, 0x68, 0x41, 0x99, 0x2d, 0x0f, 0xb0, 0x54, 0xbb, 0x16,
};

static const uint8_t inverse_sub_bytes[256] = {
    0x52, 0x09, 0x6a, 0xd5, 0x30, 0x36, 0xa5, 0x38, 0xbf, 0x40, 0xa3, 0x9e, 0x81, 0xf3, 0xd7, 0xfb,
    0x7c, 0xe3, 0x39, 0x82, 0x9b, 0x2f, 0xff, 0x87, 0x34, 0x8e, 0x43, 0x44, 0xc4, 0xde, 0xe9, 0xcb,
    0x54, 0x7b, 0x94, 0x32, 0xa6, 0xc2, 0x23, 0x3d, 0xee, 0x4c, 0x95, 0x0b, 0x42, 0xfa, 0xc3, 0x4e,
    0x08, 0x2e, 0xa1, 0x66, 0x28, 0xd9, 0x24, 0xb2, 0x76, 0x5b, 0xa2, 0x49, 0x6d, 0x8b, 0xd1, 0x25,
    0x72, 0xf8, 0xf6, 0x64, 0x86, 0x68, 0x98, 0x16, 0xd4, 0xa4, 0x5c, 0xcc, 0x5d, 0x65, 0xb6, 0x92,
    0x6c, 0x70, 0x48, 0x50, 0xfd, 0xed, 0xb9, 0xda, 0x5e, 0x15, 0x46, 0x57, 0xa7, 0x8d, 0x9d, 0x84,
    0x90, 0xd8, 0xab, 0x00, 0x8c, 0xbc, 0xd3, 0x0a, 0xf7, 0xe4, 0x58, 0x05, 0xb8, 0xb3, 0x45, 0x06,
    0xd0, 0x2c, 0x1e, 0x8f, 0xca, 0x3f, 0x0f, 0x02, 0xc1, 0xaf, 0xbd, 0x03, 0x01, 0x13, 0x8a, 0x6b,
    0x3a, 0x91, 0x11, 0x41, 0x4f, 0x67, 0xdc, 0xea, 0x97, 0xf2, 0xcf, 0xce, 0xf0, 0xb4, 0xe6, 0x73,
    0x96, 0xac, 0x74, 0x22, 0xe7, 0xad, 0x35, 0x85, 0xe2, 0xf9, 0x37, 0xe8, 0x1c, 0x75, 0xdf, 0x6e,
    0x47, 0xf1, 0x1a, 0x71, 0x1d, 0x29, 0xc5, 0x89, 0x6f, 0xb7, 0x62, 0x0e, 0xaa, 0x18, 0xbe, 0x1b,
    0xfc, 0x56, 0x3e, 0x4b, 0xc6, 0xd2, 0x79, 0x20, 0x9a, 0xdb, 0xc0, 0xfe, 0x78, 0xcd, 0x5a, 0xf4,
    0x1f, 0xdd, 0xa8, 0x33, 0x88, 0x07, 0xc7, 0x31, 0xb1, 0x12, 0x10, 0x59, 0x27, 0x80, 0xec, 0x5f,
    0x60, 0x51, 0x7f, 0xa9, 0x19, 0xb5, 0x4a, 0x0d, 0x2d, 0xe5, 0x7a, 0x9f, 0x93, 0xc9, 0x9c, 0xef,
    0xa0, 0xe0, 0x3b, 0x4d, 0xae, 0x2a, 0xf5, 0xb0, 0xc8, 0xeb, 0xbb, 0x3c, 0x83, 0x53, 0x99, 0x61,
    0x17, 0x2b, 0x04, 0x7e, 0xba, 0x77, 0xd6, 0x26, 0xe1, 0x69, 0x14, 0x63, 0x55, 0x21, 0x0c, 0x7d,
};

/*
 * Hosts do the same in a few instructions. AESE is the x86 last round with the key added before instead of after;
 * MixColumns alone is a round after a last inverse round, which undoes its other steps.
 */
#if defined(__x86_64__) && !defined(SOFTHV_PORTABLE)
#include <immintrin.h>
#define HAVE_AES __builtin_cpu_supports("aes")
#define HAVE_PCLMUL __builtin_cpu_supports("pclmul")
#define HOST_FUNCTION(name, isa, expression)                                                                           \
    __attribute__((target(isa))) static u64x2 name(u64x2 first, u64x2 second) {                                        \
        __m128i a = (__m128i)first, b = (__m128i)second, none = _mm_setzero_si128();                                   \
        (void)b, (void)none;                                                                                           \
        return (u64x2)(expression);                                                                                    \
    }
HOST_FUNCTION(host_aese, "aes", _mm_aesenclast_si128(_mm_xor_si128(a, b), none))
HOST_FUNCTION(host_aesd, "aes", _mm_aesdeclast_si128(_mm_xor_si128(a, b), none))
HOST_FUNCTION(host_aesmc, "aes", _mm_aesenc_si128(_mm_aesdeclast_si128(a, none), none))
HOST_FUNCTION(host_aesimc, "aes", _mm_aesimc_si128(a))
HOST_FUNCTION(host_pmull, "pclmul", _mm_clmulepi64_si128(a, b, 0))
#else
#define HAVE_AES false
#define HAVE_PCLMUL false
#define host_aese(a, b) (a)
#define host_aesd(a, b) (a)
#define host_aesmc(a, b) (a)
#define host_aesimc(a, b) (a)
#define host_pmull(a, b) (a)
#endif

/* AddRoundKey, ShiftRows by `step` columns a row, SubBytes. */
static inline vec aes_round(vec state, vec key, const uint8_t *box, unsigned step) {
    vec x = {.d = state.d ^ key.d};
    uint64_t halves[2] = {0, 0};
    for (unsigned i = 0; i < 16; i++)
        halves[i / 8] |= (uint64_t)box[x.r.b[(i + 4 * step * (i % 4)) % 16]] << (8 * (i % 8));
    return (vec){.d = {halves[0], halves[1]}};
}

/* Bytes of GF(2^8), times x. */
static inline u32x4 times_x(u32x4 v) { return (v << 1 & 0xfefefefe) ^ (v >> 7 & 0x01010101) * 0x1b; }
static inline u32x4 next_row(u32x4 v, int rows) { return v >> 8 * rows | v << (32 - 8 * rows); }

/* A column times 3x^3 + x^2 + x + 2: each row gets 2 of itself, 3 of the next, 1 of the others. */
static inline vec mix_columns(vec x) {
    u32x4 v = x.s, next = next_row(v, 1);
    return (vec){.s = times_x(v ^ next) ^ next ^ next_row(v, 2) ^ next_row(v, 3)};
}

/* The inverse polynomial is the forward one times 4x^2 + 5. */
static inline vec inverse_mix_columns(vec x) {
    return mix_columns((vec){.s = x.s ^ times_x(times_x(x.s ^ next_row(x.s, 2)))});
}

#define AES_OP(name, portable)                                                                                         \
    OP_FP(name) {                                                                                                      \
        vec d = v_load(c, u->rd), n = v_load(c, u->rn);                                                                \
        (void)d;                                                                                                       \
        return v_write_lanes(c, u, HAVE_AES ? (vec){.d = HOST_##name} : portable);                                     \
    }
#define HOST_aese host_aese(d.d, n.d)
#define HOST_aesd host_aesd(d.d, n.d)
#define HOST_aesmc host_aesmc(n.d, n.d)
#define HOST_aesimc host_aesimc(n.d, n.d)
AES_OP(aese, aes_round(d, n, sub_bytes, 1))
AES_OP(aesd, aes_round(d, n, inverse_sub_bytes, 3))
AES_OP(aesmc, mix_columns(n))
AES_OP(aesimc, inverse_mix_columns(n))

/* ---- SHA-1: Qd holds a, b, c, d, Sn holds e ---------------------------------------------------------------------- */

#define UNROLLED _Pragma("GCC unroll 4")
static inline uint32_t rotate_left(uint32_t v, unsigned by) { return v << by | v >> (32 - by); }
static inline uint32_t rotate_right(uint32_t v, unsigned by) { return v >> by | v << (32 - by); }
static inline uint32_t choose(uint32_t x, uint32_t y, uint32_t z) { return z ^ ((y ^ z) & x); }
static inline uint32_t parity(uint32_t x, uint32_t y, uint32_t z) { return x ^ y ^ z; }
static inline uint32_t majority(uint32_t x, uint32_t y, uint32_t z) { return (x & y) | ((x | y) & z); }

/* Four rounds on words in registers of the host's. */
#define SHA1_OP(name, function)                                                                                        \
    OP_FP(name) {                                                                                                      \
        vreg x = c->v[u->rd], w = c->v[u->rm];                                                                         \
        uint32_t a = x.s[0], b = x.s[1], cc = x.s[2], d = x.s[3], e = c->v[u->rn].s[0];                                \
        UNROLLED for (unsigned i = 0; i < 4; i++) {                                                                    \
            uint32_t t = e + rotate_left(a, 5) + function(b, cc, d) + w.s[i];                                          \
            e = d;                                                                                                     \
            d = cc;                                                                                                    \
            cc = rotate_left(b, 30);                                                                                   \
            b = a;                                                                                                     \
            a = t;                                                                                                     \
        }                                                                                                              \
        return v_write_lanes(c, u, (vec){.s = {a, b, cc, d}});                                                         \
    }
SHA1_OP(sha1c, choose)
SHA1_OP(sha1p, parity)
SHA1_OP(sha1m, majority)

OP_FP(sha1h) { return v_write_lanes(c, u, (vec){.s = {rotate_left(c->v[u->rn].s[0], 30)}}); }

OP_FP(sha1su0) {
    vec x = v_load(c, u->rd), y = v_load(c, u->rn), z = v_load(c, u->rm);
    return v_write_lanes(c, u, (vec){.d = x.d ^ z.d ^ (u64x2){x.d[1], y.d[0]}});
}

/* The last word also needs the first of this very step. */
OP_FP(sha1su1) {
    vreg x = c->v[u->rd], y = c->v[u->rn];
    uint32_t r0 = rotate_left(x.s[0] ^ y.s[1], 1), r1 = rotate_left(x.s[1] ^ y.s[2], 1);
    uint32_t r2 = rotate_left(x.s[2] ^ y.s[3], 1), r3 = rotate_left(x.s[3] ^ r0, 1);
    return v_write_lanes(c, u, (vec){.s = {r0, r1, r2, r3}});
}

/* ---- SHA-256 ----------------------------------------------------------------------------------------------------- */

/* x holds a, b, c, d, y holds e, f, g, h; after four rounds, which of the two is wanted? */
static inline vec sha256_rounds(vreg x, vreg y, vreg w, bool want_x) {
    uint32_t a = x.s[0], b = x.s[1], c = x.s[2], d = x.s[3], e = y.s[0], f = y.s[1], g = y.s[2], h = y.s[3];
    UNROLLED for (unsigned i = 0; i < 4; i++) {
        uint32_t sum1 = rotate_right(e, 6) ^ rotate_right(e, 11) ^ rotate_right(e, 25);
        uint32_t sum0 = rotate_right(a, 2) ^ rotate_right(a, 13) ^ rotate_right(a, 22);
        uint32_t t1 = h + sum1 + choose(e, f, g) + w.s[i], t2 = sum0 + majority(a, b, c);
        h = g;
        g = f;
        f = e;
        e = d + t1;
        d = c;
        c = b;
        b = a;
        a = t1 + t2;
    }
    return want_x ? (vec){.s = {a, b, c, d}} : (vec){.s = {e, f, g, h}};
}

OP_FP(sha256h) { return v_write_lanes(c, u, sha256_rounds(c->v[u->rd], c->v[u->rn], c->v[u->rm], true)); }
OP_FP(sha256h2) { return v_write_lanes(c, u, sha256_rounds(c->v[u->rn], c->v[u->rd], c->v[u->rm], false)); }

static inline uint32_t sigma0(uint32_t v) { return rotate_right(v, 7) ^ rotate_right(v, 18) ^ v >> 3; }
static inline uint32_t sigma1(uint32_t v) { return rotate_right(v, 17) ^ rotate_right(v, 19) ^ v >> 10; }

OP_FP(sha256su0) {
    vreg x = c->v[u->rd];
    uint32_t next = c->v[u->rn].s[0];
    vec sigma = {.s = {sigma0(x.s[1]), sigma0(x.s[2]), sigma0(x.s[3]), sigma0(next)}};
    return v_write_lanes(c, u, (vec){.s = v_load(c, u->rd).s + sigma.s});
}

/* The upper two words need the lower two of this very step. */
OP_FP(sha256su1) {
    vreg x = c->v[u->rd], y = c->v[u->rn], z = c->v[u->rm];
    uint32_t r0 = x.s[0] + y.s[1] + sigma1(z.s[2]), r1 = x.s[1] + y.s[2] + sigma1(z.s[3]);
    uint32_t r2 = x.s[2] + y.s[3] + sigma1(r0), r3 = x.s[3] + z.s[0] + sigma1(r1);
    return v_write_lanes(c, u, (vec){.s = {r0, r1, r2, r3}});
}

/* ---- PMULL on 64 bits -------------------------------------------------------------------------------------------- */

static inline vec polynomial_product(uint64_t a, uint64_t b) {
    uint64_t low = b & 1 ? a : 0, high = 0;
    for (unsigned i = 1; i < 64; i++) {
        uint64_t term = b >> i & 1 ? a : 0;
        low ^= term << i;
        high ^= term >> (64 - i);
    }
    return (vec){.d = {low, high}};
}

OP_FP(pmull64) {
    vec a = v_half(u, v_load(c, u->rn)), b = v_half(u, v_load(c, u->rm));
    return v_write_lanes(c, u, HAVE_PCLMUL ? (vec){.d = host_pmull(a.d, b.d)} : polynomial_product(a.d[0], b.d[0]));
}
