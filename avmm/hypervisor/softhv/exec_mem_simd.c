/*
 * Loads and stores of SIMD and floating-point registers (Arm ARM C4.1.88): scalar sizes B, H, S, D and Q, pairs, and
 * the structures of Advanced SIMD. Loads clear the rest of the register.
 */
#include "exec_mem.h"

/* ---- Forms: rd, and ra for the second of a pair, index v[] ------------------------------------------------------- */

static bool form_simd_access(struct uop *u, uint32_t i, uint64_t offset) {
    form_base(u, i);
    u->rd = (uint8_t)bits(i, 0, 5);
    u->imm = offset;
    return true;
}

/* log2 of the size: opc<1>:size, where only Q has opc<1> set. */
static unsigned simd_scale(uint32_t i) { return bits(i, 23, 1) << 2 | bits(i, 30, 2); }

bool form_simd_uimm(struct uop *u, uint32_t i) {
    return form_simd_access(u, i, (uint64_t)bits(i, 10, 12) << simd_scale(i));
}
bool form_simd_simm(struct uop *u, uint32_t i) { return form_simd_access(u, i, (uint64_t)sbits(i, 12, 9)); }
bool form_simd_reg(struct uop *u, uint32_t i) {
    u->rm = reg_zr(i, 16);
    return form_simd_access(u, i, bits(i, 12, 1) * simd_scale(i));
}
bool form_simd_literal(struct uop *u, uint32_t i) {
    u->rd = (uint8_t)bits(i, 0, 5);
    u->imm = u->off + ((uint64_t)sbits(i, 5, 19) << 2);
    return true;
}
bool form_simd_pair(struct uop *u, uint32_t i) {
    u->ra = (uint8_t)bits(i, 10, 5);
    return form_simd_access(u, i, (uint64_t)sbits(i, 15, 7) << (2 + bits(i, 30, 2)));
}

/* ---- One register, and two --------------------------------------------------------------------------------------- */

#define LOAD_V(op, size, address, after)                                                                               \
    OP_MEM(op) {                                                                                                       \
        CHECK_FP;                                                                                                      \
        LOAD_BASE;                                                                                                     \
        unsigned idx = c->mmu_idx;                                                                                     \
        vreg v = {{0}};                                                                                                \
        if (unlikely(!read_at(c, u, address, size, idx, v.b, fast)))                                                   \
            return false;                                                                                              \
        c->v[u->rd] = v;                                                                                               \
        after;                                                                                                         \
        return true;                                                                                                   \
    }
#define STORE_V(op, size, address, after)                                                                              \
    OP_MEM(op) {                                                                                                       \
        CHECK_FP;                                                                                                      \
        LOAD_BASE;                                                                                                     \
        unsigned idx = c->mmu_idx;                                                                                     \
        if (unlikely(!write_at(c, u, address, size, idx, c->v[u->rd].b, fast)))                                        \
            return false;                                                                                              \
        after;                                                                                                         \
        return true;                                                                                                   \
    }
#define ACCESSES_V(kind, name, size)                                                                                   \
    kind(name##_imm, size, AT_IMM, KEEP) kind(name##_pre, size, AT_IMM, WRITEBACK)                                     \
    kind(name##_post, size, AT_BASE, WRITEBACK) kind(name##_lsl, size, AT_LSL, KEEP)                                   \
    kind(name##_uxtw, size, AT_UXTW, KEEP) kind(name##_sxtw, size, AT_SXTW, KEEP)
ACCESSES_V(LOAD_V, ldr_b, 1)
ACCESSES_V(LOAD_V, ldr_h, 2)
ACCESSES_V(LOAD_V, ldr_s, 4)
ACCESSES_V(LOAD_V, ldr_d, 8)
ACCESSES_V(LOAD_V, ldr_q, 16)
ACCESSES_V(STORE_V, str_b, 1)
ACCESSES_V(STORE_V, str_h, 2)
ACCESSES_V(STORE_V, str_s, 4)
ACCESSES_V(STORE_V, str_d, 8)
ACCESSES_V(STORE_V, str_q, 16)

#define LITERAL_V(op, size)                                                                                            \
    OP_MEM(op) {                                                                                                       \
        CHECK_FP;                                                                                                      \
        unsigned idx = c->mmu_idx;                                                                                     \
        vreg v = {{0}};                                                                                                \
        if (unlikely(!read_at(c, u, c->block_pc + u->imm, size, idx, v.b, fast)))                                      \
            return false;                                                                                              \
        c->v[u->rd] = v;                                                                                               \
        return true;                                                                                                   \
    }
LITERAL_V(ldr_s_literal, 4)
LITERAL_V(ldr_d_literal, 8)
LITERAL_V(ldr_q_literal, 16)

#define LOAD_PAIR_V(op, size, address, after)                                                                          \
    OP_MEM(op) {                                                                                                       \
        CHECK_FP;                                                                                                      \
        LOAD_BASE;                                                                                                     \
        uint8_t bytes[2 * (size)];                                                                                     \
        if (unlikely(!span_read(c, u, address, size, sizeof bytes, bytes, fast)))                                      \
            return false;                                                                                              \
        vreg first = {{0}}, second = {{0}};                                                                            \
        memcpy(first.b, bytes, size);                                                                                  \
        memcpy(second.b, bytes + (size), size);                                                                        \
        c->v[u->rd] = first;                                                                                           \
        c->v[u->ra] = second;                                                                                          \
        after;                                                                                                         \
        return true;                                                                                                   \
    }
#define STORE_PAIR_V(op, size, address, after)                                                                         \
    OP_MEM(op) {                                                                                                       \
        CHECK_FP;                                                                                                      \
        LOAD_BASE;                                                                                                     \
        uint8_t bytes[2 * (size)];                                                                                     \
        memcpy(bytes, c->v[u->rd].b, size);                                                                            \
        memcpy(bytes + (size), c->v[u->ra].b, size);                                                                   \
        if (unlikely(!span_write(c, u, address, size, sizeof bytes, bytes, fast)))                                     \
            return false;                                                                                              \
        after;                                                                                                         \
        return true;                                                                                                   \
    }
#define PAIRS_V(kind, name, size)                                                                                      \
    kind(name##_imm, size, AT_IMM, KEEP) kind(name##_pre, size, AT_IMM, WRITEBACK)                                     \
    kind(name##_post, size, AT_BASE, WRITEBACK)
PAIRS_V(LOAD_PAIR_V, ldp_s, 4)
PAIRS_V(LOAD_PAIR_V, ldp_d, 8)
PAIRS_V(LOAD_PAIR_V, ldp_q, 16)
PAIRS_V(STORE_PAIR_V, stp_s, 4)
PAIRS_V(STORE_PAIR_V, stp_d, 8)
PAIRS_V(STORE_PAIR_V, stp_q, 16)

/* ---- Structures: LD1-LD4, ST1-ST4, LD1R-LD4R --------------------------------------------------------------------- */

/*
 * ra holds how many registers (1..4), log2 of the element size, Q. The base register always gets base + step + x[rm]:
 * without writeback both are zero, with an immediate step it is the bytes moved, else rm is a register.
 */
#define COUNT (u->ra & 7u)
#define SCALE (u->ra >> 3 & 3u)
#define WIDE (u->ra >> 5 & 1u)
#define STEP (u->imm & 0xff)
#define LANE (u->imm >> 8)
#define STRUCTURE_WRITEBACK c->x[u->rn] = base + STEP + c->x[u->rm]

static bool form_structure(struct uop *u, uint32_t i, unsigned count, unsigned scale, unsigned total, unsigned lane) {
    bool post = bits(i, 23, 1), by_register = post && bits(i, 16, 5) != 31;
    form_base(u, i);
    u->rd = (uint8_t)bits(i, 0, 5);
    u->ra = (uint8_t)(count | scale << 3 | bits(i, 30, 1) << 5);
    u->rm = by_register ? (uint8_t)bits(i, 16, 5) : R_ZR;
    u->imm = (post && !by_register ? total : 0) | (uint64_t)lane << 8;
    return true;
}

/* Multiple structures: `interleaved` ones take elements in turn, the others whole registers. */
static bool form_multiple(struct uop *u, uint32_t i, unsigned count, bool interleaved) {
    unsigned scale = bits(i, 10, 2), q = bits(i, 30, 1);
    if (interleaved && scale == 3 && !q)
        return false;
    return form_structure(u, i, count, scale, count * (q ? 16 : 8), 0);
}
bool form_multiple_1(struct uop *u, uint32_t i) { return form_multiple(u, i, 1, false); }
bool form_multiple_2(struct uop *u, uint32_t i) { return form_multiple(u, i, 2, false); }
bool form_multiple_3(struct uop *u, uint32_t i) { return form_multiple(u, i, 3, false); }
bool form_multiple_4(struct uop *u, uint32_t i) { return form_multiple(u, i, 4, false); }
bool form_interleaved_2(struct uop *u, uint32_t i) { return form_multiple(u, i, 2, true); }
bool form_interleaved_3(struct uop *u, uint32_t i) { return form_multiple(u, i, 3, true); }
bool form_interleaved_4(struct uop *u, uint32_t i) { return form_multiple(u, i, 4, true); }

/* How many registers a single structure has: opcode<0>:R, plus one. */
static unsigned single_count(uint32_t i) { return (bits(i, 13, 1) << 1 | bits(i, 21, 1)) + 1; }

/* The lane is Q:S:size, its low bits being the size for elements wider than a byte. */
bool form_lane(struct uop *u, uint32_t i) {
    unsigned scale = bits(i, 14, 2), lane = bits(i, 30, 1) << 3 | bits(i, 12, 1) << 2 | bits(i, 10, 2);
    if (scale == 2 && bits(i, 10, 2) == 1) {
        if (bits(i, 12, 1))
            return false;
        scale = 3;
        lane &= ~1u;
    }
    if (lane & ((1u << scale) - 1))
        return false;
    return form_structure(u, i, single_count(i), scale, single_count(i) << scale, lane >> scale);
}

bool form_replicate(struct uop *u, uint32_t i) {
    unsigned scale = bits(i, 10, 2);
    return form_structure(u, i, single_count(i), scale, single_count(i) << scale, 0);
}

#define REGISTER(k) c->v[(u->rd + (k)) & 31]

OP_MEM(ld1_multiple) {
    CHECK_FP;
    LOAD_BASE;
    vreg v[4] = {{{0}}};
    if (WIDE) {
        if (unlikely(!span_read(c, u, base, 1u << SCALE, COUNT * 16, v, fast)))
            return false;
    } else {
        uint64_t halves[4];
        if (unlikely(!span_read(c, u, base, 1u << SCALE, COUNT * 8, halves, fast)))
            return false;
        for (unsigned k = 0; k < COUNT; k++)
            v[k].d[0] = halves[k];
    }
    for (unsigned k = 0; k < COUNT; k++)
        REGISTER(k) = v[k];
    STRUCTURE_WRITEBACK;
    return true;
}

OP_MEM(st1_multiple) {
    CHECK_FP;
    LOAD_BASE;
    unsigned bytes = WIDE ? 16 : 8;
    uint8_t data[64];
    for (unsigned k = 0; k < COUNT; k++)
        memcpy(data + k * bytes, REGISTER(k).b, bytes);
    if (unlikely(!span_write(c, u, base, 1u << SCALE, COUNT * bytes, data, fast)))
        return false;
    STRUCTURE_WRITEBACK;
    return true;
}

OP_MEM(ld_interleaved) {
    CHECK_FP;
    LOAD_BASE;
    unsigned size = 1u << SCALE, bytes = WIDE ? 16 : 8;
    uint8_t data[64];
    vreg v[4] = {{{0}}};
    if (unlikely(!span_read(c, u, base, size, COUNT * bytes, data, fast)))
        return false;
    const uint8_t *from = data;
    for (unsigned at = 0; at < bytes; at += size)
        for (unsigned k = 0; k < COUNT; k++, from += size)
            memcpy(v[k].b + at, from, size);
    for (unsigned k = 0; k < COUNT; k++)
        REGISTER(k) = v[k];
    STRUCTURE_WRITEBACK;
    return true;
}

OP_MEM(st_interleaved) {
    CHECK_FP;
    LOAD_BASE;
    unsigned size = 1u << SCALE, bytes = WIDE ? 16 : 8;
    uint8_t data[64], *to = data;
    for (unsigned at = 0; at < bytes; at += size)
        for (unsigned k = 0; k < COUNT; k++, to += size)
            memcpy(to, REGISTER(k).b + at, size);
    if (unlikely(!span_write(c, u, base, size, COUNT * bytes, data, fast)))
        return false;
    STRUCTURE_WRITEBACK;
    return true;
}

OP_MEM(ld_lane) {
    CHECK_FP;
    LOAD_BASE;
    unsigned size = 1u << SCALE;
    uint8_t data[32];
    if (unlikely(!span_read(c, u, base, size, COUNT << SCALE, data, fast)))
        return false;
    for (unsigned k = 0; k < COUNT; k++)
        memcpy(REGISTER(k).b + (LANE << SCALE), data + (k << SCALE), size);
    STRUCTURE_WRITEBACK;
    return true;
}

OP_MEM(st_lane) {
    CHECK_FP;
    LOAD_BASE;
    unsigned size = 1u << SCALE;
    uint8_t data[32];
    for (unsigned k = 0; k < COUNT; k++)
        memcpy(data + (k << SCALE), REGISTER(k).b + (LANE << SCALE), size);
    if (unlikely(!span_write(c, u, base, size, COUNT << SCALE, data, fast)))
        return false;
    STRUCTURE_WRITEBACK;
    return true;
}

OP_MEM(ld_replicate) {
    CHECK_FP;
    LOAD_BASE;
    unsigned size = 1u << SCALE, bytes = WIDE ? 16 : 8;
    uint8_t data[32];
    if (unlikely(!span_read(c, u, base, size, COUNT << SCALE, data, fast)))
        return false;
    for (unsigned k = 0; k < COUNT; k++) {
        vreg v = {{0}};
        for (unsigned at = 0; at < bytes; at += size)
            memcpy(v.b + at, data + (k << SCALE), size);
        REGISTER(k) = v;
    }
    STRUCTURE_WRITEBACK;
    return true;
}
