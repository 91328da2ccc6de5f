/* x86-64 code for the cryptographic extension, where the host has instructions like it. */
#include "jit_x64_simd.h"

#ifdef JIT_X64

#define A64(row_name, pattern, form, op) bool p_##op(struct vcpu *c, const struct uop *u);
#define A64_END(row_name, pattern, form, op) A64(row_name, pattern, form, op)
#include "a64_crypto.def"
#undef A64
#undef A64_END

enum { AESE, AESD, AESMC, AESIMC_, SHA256H, SHA256H2, SHA256SU0, SHA256SU1 };

/* AESE is the x86 last round with the key added before, not after; MixColumns a round after a last inverse one. */
static void emit_aes(struct emit *e, const struct uop *u, uint32_t arg) {
    if (!__builtin_cpu_supports("aes")) {
        emit_pure(e, u, arg);
        return;
    }
    check_fp(e, u);
    unsigned n = v_use(e, u->rn), d = arg == AESE || arg == AESD ? v_use(e, u->rd) : v_target(e, u->rd);
    xx(e, PXOR, 0, 0);
    switch (arg) {
    case AESE:
    case AESD:
        xx(e, PXOR, d, n);
        xx(e, arg == AESE ? AESENCLAST : AESDECLAST, d, 0);
        break;
    case AESMC:
        if (d != n)
            x_copy(e, d, n);
        xx(e, AESDECLAST, d, 0);
        xx(e, AESENC, d, 0);
        break;
    default: xx(e, AESIMC, d, n);
    }
    v_set(e, d, u->rd);
}

/*
 * x86 keeps the state as (f, e, b, a) and (h, g, d, c), lowest word first, and does two rounds at a time. SHA256H and
 * SHA256H2 are halves of the same four: who comes first does them all, the other finds its half in ABEF and CDGH, and so do
 * the next four rounds. What they find there is told by the numbers of vector registers, wherever the instructions are.
 */
enum { ABEF = V_SCRATCH, CDGH };
enum { OUTER = 0x11, INNER = 0xbb }; /* SHUFPS: words 1, 0, 1, 0 and 3, 2, 3, 2; there and back */
static void emit_sha256_rounds(struct emit *e, const struct uop *u, uint32_t arg) {
    if (!host_has_sha()) {
        emit_pure(e, u, arg);
        return;
    }
    check_fp(e, u);
    bool second = arg == SHA256H2;
    unsigned abcd = second ? u->rn : u->rd, efgh = second ? u->rd : u->rn;
    uint32_t from[3] = {v_number(e, abcd), v_number(e, efgh), v_number(e, u->rm)};
    struct rounds *rounds = &e->rounds;
    unsigned abef = v_copy(e, ABEF), cdgh = v_copy(e, CDGH);
    bool there = abef != NO_REG && cdgh != NO_REG;
    if (!there || memcmp(from, rounds->from, sizeof from) != 0) {
        if (!there || memcmp(from, rounds->state, sizeof rounds->state) != 0) {
            unsigned x = v_use(e, abcd), y = v_use(e, efgh);
            abef = abef == NO_REG ? v_new_copy(e, ABEF) : abef;
            cdgh = cdgh == NO_REG ? v_new_copy(e, CDGH) : cdgh;
            x_copy(e, abef, y);
            xx_imm(e, SHUFPS, abef, x, OUTER);
            x_copy(e, cdgh, y);
            xx_imm(e, SHUFPS, cdgh, x, INNER);
        }
        v_load(e, 0, u->rm);
        xx(e, SHA256RNDS2, cdgh, abef);
        xx_imm(e, PSHUFD, 0, 0, 0x0e);
        xx(e, SHA256RNDS2, abef, cdgh);
        memcpy(rounds->from, from, sizeof from);
        memset(rounds->state, 0, sizeof rounds->state);
    }
    unsigned d = v_target(e, u->rd);
    x_copy(e, d, abef);
    xx_imm(e, SHUFPS, d, cdgh, second ? OUTER : INNER);
    v_set(e, d, u->rd);
    rounds->state[second] = v_number(e, u->rd);
}

static void emit_sha256_schedule(struct emit *e, const struct uop *u, uint32_t arg) {
    if (!host_has_sha()) {
        emit_pure(e, u, arg);
        return;
    }
    check_fp(e, u);
    unsigned d = v_use(e, u->rd), n = v_use(e, u->rn);
    if (arg == SHA256SU0) {
        xx(e, SHA256MSG1, d, n);
    } else {
        v_load(e, 0, u->rm);
        x_copy(e, 1, 0);
        xx_imm(e, PALIGNR, 1, n, 4);
        xx(e, PADDD, d, 1);
        xx(e, SHA256MSG2, d, 0);
    }
    v_set(e, d, u->rd);
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
