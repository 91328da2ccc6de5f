/*
 * SHA-256 of zeros by the SHA instructions: `sha256 MIB` prints the digest. Bare of any library, so that it runs in any
 * arm64 Linux: aarch64-linux-gnu-gcc -O2 -march=armv8-a+crypto -static -nostdlib -ffreestanding
 */
#include <arm_neon.h>
#include <stdint.h>

static const uint32_t constants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static void block(uint32x4_t state[2], const uint8_t *data) {
    uint32x4_t abcd = state[0], efgh = state[1], w[4];
    for (unsigned i = 0; i < 4; i++)
        w[i] = vreinterpretq_u32_u8(vrev32q_u8(vld1q_u8(data + 16 * i)));
#pragma GCC unroll 16
    for (unsigned i = 0; i < 16; i++) {
        uint32x4_t k = vaddq_u32(w[i & 3], vld1q_u32(constants + 4 * i)), before = abcd;
        if (i < 12)
            w[i & 3] = vsha256su1q_u32(vsha256su0q_u32(w[i & 3], w[(i + 1) & 3]), w[(i + 2) & 3], w[(i + 3) & 3]);
        abcd = vsha256hq_u32(abcd, efgh, k);
        efgh = vsha256h2q_u32(efgh, before, k);
    }
    state[0] = vaddq_u32(state[0], abcd);
    state[1] = vaddq_u32(state[1], efgh);
}

static long call(long number, long a, long b, long c) {
    register long x8 __asm__("x8") = number, x0 __asm__("x0") = a, x1 __asm__("x1") = b, x2 __asm__("x2") = c;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2) : "memory");
    return x0;
}

__attribute__((used)) static void start(long *stack) {
    uint64_t mib = 0;
    for (const char *p = stack[0] > 1 ? (const char *)stack[2] : "0"; *p; p++)
        mib = 10 * mib + (uint64_t)(*p - '0');
    uint32x4_t state[2] = {{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a},
                           {0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19}};
    static uint8_t zeros[65536], last[64];
    for (uint64_t i = 0; i < mib * 16; i++)
        for (unsigned at = 0; at < sizeof zeros; at += 64)
            block(state, zeros + at);
    last[0] = 0x80;
    for (unsigned i = 0; i < 8; i++)
        last[63 - i] = (uint8_t)(mib << 23 >> (8 * i));
    block(state, last);
    char text[65];
    for (unsigned i = 0; i < 64; i++)
        text[i] = "0123456789abcdef"[((const uint32_t *)state)[i / 8] >> (28 - 4 * (i % 8)) & 15];
    text[64] = '\n';
    call(64, 1, (long)text, sizeof text);
    call(93, 0, 0, 0);
}

__asm__(".globl _start\n_start: mov x0, sp\n b start\n");
