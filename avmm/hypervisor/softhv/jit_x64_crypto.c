/* x86-64 code for the cryptographic extension, where the host has instructions like it. */
#include "jit_x64_simd.h"

#ifdef JIT_X64

#include <cpuid.h>

#define A64(row_name, pattern, form, op) bool p_##op(struct vcpu *c, const struct uop *u);
#define A64_END(row_name, pattern, form, op) A64(row_name, pattern, form, op)
#include "a64_crypto.def"
#undef A64
#undef A64_END

static bool has_sha(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && b >> 29 & 1;
}

enum { AESE, AESD, AESMC, AESIMC_, SHA256H, SHA256H2, SHA256SU0, SHA256SU1 };

/* AESE is the x86 last round with the key added before, not after; MixColumns a round after a last inverse one. */
static void emit_aes(struct emit *e, const struct uop *u, uint32_t arg) {
    if (!__builtin_cpu_supports("aes")) {
        emit_pure(e, u, arg);
        return;
    }
    check_fp(e, u);
    v_load(e, 0, u->rn);
    xx(e, PXOR, 2, 2);
    switch (arg) {
    case AESE:
    case AESD:
        v_load(e, 1, u->rd);
        xx(e, PXOR, 0, 1);
        xx(e, arg == AESE ? AESENCLAST : AESDECLAST, 0, 2);
        break;
    case AESMC:
        xx(e, AESDECLAST, 0, 2);
        xx(e, AESENC, 0, 2);
        break;
    default: xx(e, AESIMC, 0, 0);
    }
    v_store(e, 0, u->rd);
}

/* x86 keeps the state as (f, e, b, a) and (h, g, d, c), lowest word first, and does two rounds at a time. */
static void emit_sha256_rounds(struct emit *e, const struct uop *u, uint32_t arg) {
    if (!has_sha()) {
        emit_pure(e, u, arg);
        return;
    }
    check_fp(e, u);
    bool second = arg == SHA256H2;
    v_load(e, 1, second ? u->rn : u->rd); /* a, b, c, d */
    v_load(e, 2, second ? u->rd : u->rn); /* e, f, g, h */
    v_load(e, 0, u->rm);
    xx_imm(e, PSHUFD, 1, 1, 0xb1);
    xx_imm(e, PSHUFD, 2, 2, 0xb1);
    x_copy(e, 3, 2);
    xx(e, PUNPCKHQDQ, 3, 1); /* h, g, d, c */
    xx(e, PUNPCKLQDQ, 2, 1); /* f, e, b, a */
    xx(e, SHA256RNDS2, 3, 2);
    xx_imm(e, PSHUFD, 0, 0, 0x0e);
    xx(e, SHA256RNDS2, 2, 3);
    xx(e, second ? PUNPCKLQDQ : PUNPCKHQDQ, 2, 3);
    xx_imm(e, PSHUFD, 0, 2, 0xb1);
    v_store(e, 0, u->rd);
}

static void emit_sha256_schedule(struct emit *e, const struct uop *u, uint32_t arg) {
    if (!has_sha()) {
        emit_pure(e, u, arg);
        return;
    }
    check_fp(e, u);
    v_load(e, 0, u->rd);
    v_load(e, 1, u->rn);
    if (arg == SHA256SU0) {
        xx(e, SHA256MSG1, 0, 1);
    } else {
        v_load(e, 2, u->rm);
        x_copy(e, 3, 2);
        xx_imm(e, PALIGNR, 3, 1, 4);
        xx(e, PADDD, 0, 3);
        xx(e, SHA256MSG2, 0, 2);
    }
    v_store(e, 0, u->rd);
}

static void emit_pmull(struct emit *e, const struct uop *u, uint32_t arg) {
    if (!__builtin_cpu_supports("pclmul")) {
        emit_pure(e, u, arg);
        return;
    }
    check_fp(e, u);
    v_load(e, 0, u->rn);
    v_load(e, 1, u->rm);
    xx_imm(e, PCLMULQDQ, 0, 1, v_q(u) ? 0x11 : 0x00);
    v_store(e, 0, u->rd);
}

/* ---- The table: the last entry for an op counts ------------------------------------------------------------------ */

const struct emitter jit_x64_crypto[] = {
#define A64(row_name, pattern, form, op) {p_##op, emit_pure, 0, TRAPS | NO_RD},
#include "a64_crypto.def"
#undef A64
    {p_aese, emit_aes, AESE, TRAPS | NO_RD},
    {p_aesd, emit_aes, AESD, TRAPS | NO_RD},
    {p_aesmc, emit_aes, AESMC, TRAPS | NO_RD},
    {p_aesimc, emit_aes, AESIMC_, TRAPS | NO_RD},
    {p_sha256h, emit_sha256_rounds, SHA256H, TRAPS | NO_RD},
    {p_sha256h2, emit_sha256_rounds, SHA256H2, TRAPS | NO_RD},
    {p_sha256su0, emit_sha256_schedule, SHA256SU0, TRAPS | NO_RD},
    {p_sha256su1, emit_sha256_schedule, SHA256SU1, TRAPS | NO_RD},
    {p_pmull64, emit_pmull, 0, TRAPS | NO_RD},
    {NULL, NULL, 0, 0},
};

#endif
