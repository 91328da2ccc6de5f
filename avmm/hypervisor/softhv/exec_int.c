/*
 * Integer data processing and branches (Arm ARM C4.1.86, C4.1.89, C4.1.91).
 *
 * Operands arrive resolved: rd/rn/rm/ra index x[], immediates are expanded, shifted and sign extended, and branch
 * targets are relative to the block's first instruction. A condition is a 16-bit set, one bit per value of NZCV:
 * testing it is one shift, whichever condition it is.
 */
#include "engine.h"

__extension__ typedef unsigned __int128 uint128;
__extension__ typedef __int128 int128;

#define FLAG_C (UINT32_C(1) << 29)

/* ---- Forms ------------------------------------------------------------------------------------------------------- */

const uint16_t condition_sets[16] = {
    0xf0f0, 0x0f0f, 0xcccc, 0x3333, 0xff00, 0x00ff, 0xaaaa, 0x5555,
    0x0c0c, 0xf3f3, 0xaa55, 0x55aa, 0x0a05, 0xf5fa, 0xffff, 0xffff,
};

bool form_d_n_m(struct uop *u, uint32_t i) {
    u->rd = reg_dst(i, 0);
    u->rn = reg_zr(i, 5);
    u->rm = reg_zr(i, 16);
    return true;
}

bool form_d_n_m_a(struct uop *u, uint32_t i) {
    u->ra = reg_zr(i, 10);
    return form_d_n_m(u, i);
}

bool form_adr(struct uop *u, uint32_t i) {
    u->rd = reg_dst(i, 0);
    u->imm = u->off + (((uint64_t)sbits(i, 5, 19) << 2) | bits(i, 29, 2));
    return true;
}

bool form_adrp(struct uop *u, uint32_t i) {
    u->rd = reg_dst(i, 0);
    u->imm = (((uint64_t)sbits(i, 5, 19) << 2) | bits(i, 29, 2)) << 12;
    return true;
}

/* ADD and SUB are one op: the immediate is negated here. */
bool form_add_imm(struct uop *u, uint32_t i) {
    u->rd = reg_sp(i, 0);
    u->rn = reg_sp(i, 5);
    u->imm = (uint64_t)bits(i, 10, 12) << (bits(i, 22, 1) * 12);
    if (bits(i, 30, 1))
        u->imm = -u->imm;
    return true;
}

bool form_adds_imm(struct uop *u, uint32_t i) {
    u->rd = reg_dst(i, 0);
    u->rn = reg_sp(i, 5);
    u->imm = (uint64_t)bits(i, 10, 12) << (bits(i, 22, 1) * 12);
    return true;
}

/* DecodeBitMasks(), J1 shared/functions/common: a run of ones, rotated in an element, repeated. */
static bool bitmask_imm(uint32_t i, uint64_t *mask) {
    uint32_t immr = bits(i, 16, 6), imms = bits(i, 10, 6);
    uint32_t length = bits(i, 22, 1) << 6 | (~imms & 63);
    if (length < 2)
        return false;
    unsigned size = 1u << (31 - __builtin_clz(length));
    unsigned ones = (imms & (size - 1)) + 1, rotate = immr & (size - 1);
    if (ones == size)
        return false;
    uint64_t element = (UINT64_C(1) << ones) - 1;
    if (rotate) {
        element = element >> rotate | element << (size - rotate);
        if (size < 64)
            element &= (UINT64_C(1) << size) - 1;
    }
    for (; size < 64; size *= 2)
        element |= element << size;
    *mask = bits(i, 31, 1) ? element : (uint32_t)element;
    return true;
}

bool form_logical_imm(struct uop *u, uint32_t i) {
    u->rd = reg_sp(i, 0);
    u->rn = reg_zr(i, 5);
    return bitmask_imm(i, &u->imm);
}

bool form_ands_imm(struct uop *u, uint32_t i) {
    u->rd = reg_dst(i, 0);
    u->rn = reg_zr(i, 5);
    return bitmask_imm(i, &u->imm);
}

bool form_movz(struct uop *u, uint32_t i) {
    u->rd = reg_dst(i, 0);
    u->imm = (uint64_t)bits(i, 5, 16) << (bits(i, 21, 2) * 16);
    return true;
}

bool form_movn(struct uop *u, uint32_t i) {
    form_movz(u, i);
    u->imm = bits(i, 31, 1) ? ~u->imm : (uint32_t)~u->imm;
    return true;
}

bool form_movk(struct uop *u, uint32_t i) {
    u->ra = bits(i, 21, 2) * 16;
    return form_movz(u, i);
}

static uint64_t ones(unsigned count) { return count >= 64 ? ~UINT64_C(0) : (UINT64_C(1) << count) - 1; }

/*
 * UBFM and BFM: rotate right by ra, keep the bits of imm. Bits 0..imms of the source are moved: down by immr when
 * immr <= imms, else up by size - immr.
 */
bool form_bfm(struct uop *u, uint32_t i) {
    unsigned size = bits(i, 31, 1) ? 64 : 32, immr = bits(i, 16, 6), imms = bits(i, 10, 6);
    u->rd = reg_dst(i, 0);
    u->rn = reg_zr(i, 5);
    u->ra = immr;
    u->imm = imms >= immr ? ones(imms - immr + 1) : ones(imms + 1) << (size - immr);
    return true;
}

/* SBFM: up by imm until the field's sign is the top bit, then down arithmetically by ra. */
bool form_sbfm(struct uop *u, uint32_t i) {
    unsigned top = bits(i, 31, 1) ? 63 : 31, immr = bits(i, 16, 6), imms = bits(i, 10, 6);
    u->rd = reg_dst(i, 0);
    u->rn = reg_zr(i, 5);
    u->imm = top - imms;
    u->ra = (immr - imms - 1) & top;
    return true;
}

/* Shifted register, EXTR: the amount in imm. */
bool form_shifted(struct uop *u, uint32_t i) {
    u->imm = bits(i, 10, 6);
    return form_d_n_m(u, i);
}

/*
 * Extended register: ((rm & imm) ^ aux) - aux, then left by ra. That extends from any width: aux is the sign bit for
 * the signed ones, and 0 for the others and for all 64 bits.
 */
static bool extended(struct uop *u, uint32_t i) {
    unsigned option = bits(i, 13, 3), width = 8u << (option & 3);
    u->rn = reg_sp(i, 5);
    u->rm = reg_zr(i, 16);
    u->ra = bits(i, 10, 3);
    u->imm = ones(width);
    if (option & 4 && width < 64)
        u->aux = UINT32_C(1) << (width - 1);
    return u->ra <= 4;
}

bool form_extended(struct uop *u, uint32_t i) {
    u->rd = reg_sp(i, 0);
    return extended(u, i);
}

bool form_extended_flags(struct uop *u, uint32_t i) {
    u->rd = reg_dst(i, 0);
    return extended(u, i);
}

bool form_select(struct uop *u, uint32_t i) {
    u->aux = condition_sets[bits(i, 12, 4)];
    return form_d_n_m(u, i);
}

bool form_compare_reg(struct uop *u, uint32_t i) {
    u->ra = bits(i, 0, 4);
    u->aux = condition_sets[bits(i, 12, 4)];
    u->rn = reg_zr(i, 5);
    u->rm = reg_zr(i, 16);
    return true;
}

bool form_compare_imm(struct uop *u, uint32_t i) {
    form_compare_reg(u, i);
    u->imm = bits(i, 16, 5);
    return true;
}

bool form_rmif(struct uop *u, uint32_t i) {
    u->rn = reg_zr(i, 5);
    u->ra = bits(i, 15, 6);
    u->aux = bits(i, 0, 4) << 28;
    return true;
}

bool form_n(struct uop *u, uint32_t i) {
    u->rn = reg_zr(i, 5);
    return true;
}

bool form_none(struct uop *u, uint32_t i) {
    (void)u, (void)i;
    return true;
}

bool form_branch(struct uop *u, uint32_t i) {
    u->imm = u->off + ((uint64_t)sbits(i, 0, 26) << 2);
    return true;
}

bool form_branch_cond(struct uop *u, uint32_t i) {
    u->aux = condition_sets[bits(i, 0, 4)];
    u->imm = u->off + ((uint64_t)sbits(i, 5, 19) << 2);
    return true;
}

bool form_branch_zero(struct uop *u, uint32_t i) {
    u->rn = reg_zr(i, 0);
    u->imm = u->off + ((uint64_t)sbits(i, 5, 19) << 2);
    return true;
}

bool form_branch_bit(struct uop *u, uint32_t i) {
    u->rn = reg_zr(i, 0);
    u->ra = bits(i, 31, 1) << 5 | bits(i, 19, 5);
    u->imm = u->off + ((uint64_t)sbits(i, 5, 14) << 2);
    return true;
}

/* ---- Arithmetic with flags --------------------------------------------------------------------------------------- */

/* N, Z and V of each width sit in its top bit; C is worked out from the carry out of it. */
#define DEFINE_FLAGS(width)                                                                                            \
    static inline uint32_t flags_nz##width(uint##width##_t r) {                                                        \
        return (uint32_t)(r >> (width - 1)) << 31 | (uint32_t)(r == 0) << 30;                                          \
    }                                                                                                                  \
    static inline uint##width##_t add_flags##width(struct vcpu *c, uint##width##_t a, uint##width##_t b) {             \
        uint##width##_t r = a + b;                                                                                     \
        c->nzcv = flags_nz##width(r) | (uint32_t)(r < a) << 29 |                                                       \
                  (uint32_t)(((a ^ r) & (b ^ r)) >> (width - 1)) << 28;                                                \
        return r;                                                                                                      \
    }                                                                                                                  \
    static inline uint##width##_t sub_flags##width(struct vcpu *c, uint##width##_t a, uint##width##_t b) {             \
        uint##width##_t r = a - b;                                                                                     \
        c->nzcv = flags_nz##width(r) | (uint32_t)(a >= b) << 29 |                                                      \
                  (uint32_t)(((a ^ b) & (a ^ r)) >> (width - 1)) << 28;                                                \
        return r;                                                                                                      \
    }                                                                                                                  \
    static inline uint##width##_t adc##width(const struct vcpu *c, uint##width##_t a, uint##width##_t b) {             \
        return a + b + (c->nzcv >> 29 & 1);                                                                            \
    }                                                                                                                  \
    static inline uint##width##_t adc_flags##width(struct vcpu *c, uint##width##_t a, uint##width##_t b) {             \
        uint##width##_t r = adc##width(c, a, b);                                                                       \
        c->nzcv = flags_nz##width(r) | (uint32_t)(((a & b) | ((a | b) & ~r)) >> (width - 1)) << 29 |                   \
                  (uint32_t)(((a ^ r) & (b ^ r)) >> (width - 1)) << 28;                                                \
        return r;                                                                                                      \
    }                                                                                                                  \
    static inline uint##width##_t ror##width(uint##width##_t v, unsigned n) {                                          \
        return v >> (n & (width - 1)) | v << (-n & (width - 1));                                                       \
    }
DEFINE_FLAGS(32)
DEFINE_FLAGS(64)

/* An operand, and a result, cut to the width: writing the low 32 bits clears the high ones. */
#define REG(width, field) ((uint##width##_t)c->x[u->field])
#define RESULT(width, value)                                                                                           \
    do {                                                                                                               \
        c->x[u->rd] = (uint##width##_t)(value);                                                                        \
        return true;                                                                                                   \
    } while (0)

static inline bool holds(const struct vcpu *c, const struct uop *u) { return u->aux >> (c->nzcv >> 28) & 1; }

#define DEFINE_ADDSUB(width, suffix, operand)                                                                          \
    OP(add##width##suffix) { RESULT(width, REG(width, rn) + (operand)); }                                              \
    OP(sub##width##suffix) { RESULT(width, REG(width, rn) - (operand)); }                                              \
    DEFINE_ADDSUB_FLAGS(width, suffix, operand)
#define DEFINE_ADDSUB_FLAGS(width, suffix, operand)                                                                    \
    OP(adds##width##suffix) { RESULT(width, add_flags##width(c, REG(width, rn), (operand))); }                         \
    OP(subs##width##suffix) { RESULT(width, sub_flags##width(c, REG(width, rn), (operand))); }

#define LSL(width) (REG(width, rm) << u->imm)
#define LSR(width) (REG(width, rm) >> u->imm)
#define ASR(width) ((uint##width##_t)((int##width##_t)c->x[u->rm] >> u->imm))
#define EXTENDED(width) ((uint##width##_t)((((c->x[u->rm] & u->imm) ^ u->aux) - u->aux) << u->ra))

#define DEFINE_ARITHMETIC(width)                                                                                       \
    OP(add##width##_imm) { RESULT(width, REG(width, rn) + u->imm); }                                                   \
    DEFINE_ADDSUB_FLAGS(width, _imm, (uint##width##_t)u->imm)                                                          \
    DEFINE_ADDSUB(width, _reg, REG(width, rm))                                                                         \
    DEFINE_ADDSUB(width, _lsl, LSL(width))                                                                             \
    DEFINE_ADDSUB(width, _lsr, LSR(width))                                                                             \
    DEFINE_ADDSUB(width, _asr, ASR(width))                                                                             \
    DEFINE_ADDSUB(width, _ext, EXTENDED(width))                                                                        \
    OP(adc##width) { RESULT(width, adc##width(c, REG(width, rn), REG(width, rm))); }                                   \
    OP(sbc##width) { RESULT(width, adc##width(c, REG(width, rn), ~REG(width, rm))); }                                  \
    OP(adcs##width) { RESULT(width, adc_flags##width(c, REG(width, rn), REG(width, rm))); }                            \
    OP(sbcs##width) { RESULT(width, adc_flags##width(c, REG(width, rn), ~REG(width, rm))); }
DEFINE_ARITHMETIC(32)
DEFINE_ARITHMETIC(64)

/* ---- Logic ------------------------------------------------------------------------------------------------------- */

#define DEFINE_LOGIC_FLAGS(name, width, value)                                                                         \
    OP(name) {                                                                                                         \
        uint##width##_t r = (value);                                                                                   \
        c->nzcv = flags_nz##width(r);                                                                                  \
        RESULT(width, r);                                                                                              \
    }
#define DEFINE_LOGIC(width, suffix, operand)                                                                           \
    OP(and##width##suffix) { RESULT(width, REG(width, rn) & (operand)); }                                              \
    OP(bic##width##suffix) { RESULT(width, REG(width, rn) & ~(operand)); }                                             \
    OP(orr##width##suffix) { RESULT(width, REG(width, rn) | (operand)); }                                              \
    OP(orn##width##suffix) { RESULT(width, REG(width, rn) | ~(operand)); }                                             \
    OP(eor##width##suffix) { RESULT(width, REG(width, rn) ^ (operand)); }                                              \
    OP(eon##width##suffix) { RESULT(width, REG(width, rn) ^ ~(operand)); }                                             \
    DEFINE_LOGIC_FLAGS(ands##width##suffix, width, REG(width, rn) & (operand))                                         \
    DEFINE_LOGIC_FLAGS(bics##width##suffix, width, REG(width, rn) & ~(operand))

#define DEFINE_LOGICAL(width)                                                                                          \
    OP(and##width##_imm) { RESULT(width, REG(width, rn) & u->imm); }                                                   \
    OP(orr##width##_imm) { RESULT(width, REG(width, rn) | u->imm); }                                                   \
    OP(eor##width##_imm) { RESULT(width, REG(width, rn) ^ u->imm); }                                                   \
    DEFINE_LOGIC_FLAGS(ands##width##_imm, width, (uint##width##_t)(REG(width, rn) & u->imm))                           \
    OP(mov##width##_reg) { RESULT(width, c->x[u->rm]); }                                                               \
    DEFINE_LOGIC(width, _reg, REG(width, rm))                                                                          \
    DEFINE_LOGIC(width, _lsl, LSL(width))                                                                              \
    DEFINE_LOGIC(width, _lsr, LSR(width))                                                                              \
    DEFINE_LOGIC(width, _asr, ASR(width))                                                                              \
    DEFINE_LOGIC(width, _ror, ror##width(REG(width, rm), (unsigned)u->imm))
DEFINE_LOGICAL(32)
DEFINE_LOGICAL(64)

/* ---- Moves, bit fields, shifts ----------------------------------------------------------------------------------- */

OP(mov_imm) { RESULT(64, u->imm); }
OP(adr) { RESULT(64, c->block_pc + u->imm); }
OP(adrp) { RESULT(64, (c->block_pc & ~(uint64_t)(PAGE_SIZE - 1)) + u->imm); /* a block stays in its page */ }

#define DEFINE_MOVES(width)                                                                                            \
    OP(movk##width) { RESULT(width, (REG(width, rd) & ~(UINT64_C(0xffff) << u->ra)) | u->imm); }                       \
    OP(ubfm##width) { RESULT(width, ror##width(REG(width, rn), u->ra) & u->imm); }                                     \
    OP(bfm##width) { RESULT(width, (REG(width, rd) & ~u->imm) | (ror##width(REG(width, rn), u->ra) & u->imm)); }       \
    OP(sbfm##width) { RESULT(width, (int##width##_t)(REG(width, rn) << u->imm) >> u->ra); }                            \
    OP(extr##width) {                                                                                                  \
        RESULT(width, REG(width, rm) >> u->imm | REG(width, rn) << 1 << (width - 1 - u->imm));                         \
    }                                                                                                                  \
    OP(lslv##width) { RESULT(width, REG(width, rn) << (c->x[u->rm] & (width - 1))); }                                  \
    OP(lsrv##width) { RESULT(width, REG(width, rn) >> (c->x[u->rm] & (width - 1))); }                                  \
    OP(asrv##width) { RESULT(width, (int##width##_t)c->x[u->rn] >> (c->x[u->rm] & (width - 1))); }                     \
    OP(rorv##width) { RESULT(width, ror##width(REG(width, rn), (unsigned)c->x[u->rm])); }
DEFINE_MOVES(32)
DEFINE_MOVES(64)

static inline uint64_t swap_in_pairs(uint64_t v, uint64_t low_halves, unsigned by) {
    return (v >> by & low_halves) | (v & low_halves) << by;
}
static inline uint64_t reverse_bits(uint64_t v) {
    v = swap_in_pairs(v, UINT64_C(0x5555555555555555), 1);
    v = swap_in_pairs(v, UINT64_C(0x3333333333333333), 2);
    return __builtin_bswap64(swap_in_pairs(v, UINT64_C(0x0f0f0f0f0f0f0f0f), 4));
}
#define SWAP_BYTES(v) swap_in_pairs(v, UINT64_C(0x00ff00ff00ff00ff), 8)

OP(rbit32) { RESULT(64, reverse_bits(c->x[u->rn]) >> 32); }
OP(rbit64) { RESULT(64, reverse_bits(c->x[u->rn])); }
OP(rev16_32) { RESULT(32, SWAP_BYTES(c->x[u->rn])); }
OP(rev16_64) { RESULT(64, SWAP_BYTES(c->x[u->rn])); }
OP(rev32) { RESULT(32, __builtin_bswap32((uint32_t)c->x[u->rn])); }
OP(rev32_64) { RESULT(64, ror64(__builtin_bswap64(c->x[u->rn]), 32)); }
OP(rev64) { RESULT(64, __builtin_bswap64(c->x[u->rn])); }
OP(clz32) { RESULT(32, REG(32, rn) ? __builtin_clz(REG(32, rn)) : 32); }
OP(clz64) { RESULT(64, c->x[u->rn] ? __builtin_clzll(c->x[u->rn]) : 64); }
/* Where neighbours differ, bit 0 standing in for "nowhere". */
OP(cls32) { RESULT(32, __builtin_clz((REG(32, rn) ^ (uint32_t)((int32_t)REG(32, rn) >> 1)) << 1 | 1)); }
OP(cls64) { RESULT(64, __builtin_clzll((c->x[u->rn] ^ (uint64_t)((int64_t)c->x[u->rn] >> 1)) << 1 | 1)); }

/* ---- Multiplication, division ------------------------------------------------------------------------------------ */

#define DEFINE_MULDIV(width)                                                                                           \
    OP(madd##width) { RESULT(width, REG(width, ra) + REG(width, rn) * REG(width, rm)); }                               \
    OP(msub##width) { RESULT(width, REG(width, ra) - REG(width, rn) * REG(width, rm)); }                               \
    OP(udiv##width) {                                                                                                  \
        uint##width##_t n = REG(width, rn), m = REG(width, rm);                                                        \
        RESULT(width, m ? n / m : 0);                                                                                  \
    }                                                                                                                  \
    OP(sdiv##width) { /* by 0: 0; the lowest number by -1: itself */                                                   \
        uint##width##_t n = REG(width, rn), m = REG(width, rm);                                                        \
        RESULT(width, m == 0 ? 0 : m == (uint##width##_t)-1 ? -n                                                       \
                                 : (uint##width##_t)((int##width##_t)n / (int##width##_t)m));                          \
    }
DEFINE_MULDIV(32)
DEFINE_MULDIV(64)

#define SIGNED(field) ((int64_t)(int32_t)c->x[u->field])
OP(smaddl) { RESULT(64, c->x[u->ra] + (uint64_t)(SIGNED(rn) * SIGNED(rm))); }
OP(smsubl) { RESULT(64, c->x[u->ra] - (uint64_t)(SIGNED(rn) * SIGNED(rm))); }
OP(umaddl) { RESULT(64, c->x[u->ra] + (uint64_t)REG(32, rn) * REG(32, rm)); }
OP(umsubl) { RESULT(64, c->x[u->ra] - (uint64_t)REG(32, rn) * REG(32, rm)); }
OP(smulh) { RESULT(64, (uint64_t)(((int128)(int64_t)c->x[u->rn] * (int64_t)c->x[u->rm]) >> 64)); }
OP(umulh) { RESULT(64, (uint64_t)(((uint128)c->x[u->rn] * c->x[u->rm]) >> 64)); }

/* ---- CRC-32, four bits at a time, least significant first -------------------------------------------------------- */

#define CRC_BIT(poly, v) ((v) >> 1 ^ ((poly) & -((v) & 1)))
#define CRC_NIBBLE(poly, v) CRC_BIT(poly, CRC_BIT(poly, CRC_BIT(poly, CRC_BIT(poly, UINT32_C(v)))))
#define CRC_TABLE(poly)                                                                                                \
    { CRC_NIBBLE(poly, 0), CRC_NIBBLE(poly, 1), CRC_NIBBLE(poly, 2), CRC_NIBBLE(poly, 3),                              \
      CRC_NIBBLE(poly, 4), CRC_NIBBLE(poly, 5), CRC_NIBBLE(poly, 6), CRC_NIBBLE(poly, 7),                              \
      CRC_NIBBLE(poly, 8), CRC_NIBBLE(poly, 9), CRC_NIBBLE(poly, 10), CRC_NIBBLE(poly, 11),                            \
      CRC_NIBBLE(poly, 12), CRC_NIBBLE(poly, 13), CRC_NIBBLE(poly, 14), CRC_NIBBLE(poly, 15) }
/* 0x04c11db7 and 0x1edc6f41, bit-reversed. */
static const uint32_t crc32_table[16] = CRC_TABLE(UINT32_C(0xedb88320));
static const uint32_t crc32c_table[16] = CRC_TABLE(UINT32_C(0x82f63b78));

static inline uint32_t crc(const uint32_t *table, uint32_t sum, uint64_t data, unsigned bytes) {
    for (unsigned nibble = 0; nibble < bytes * 2; nibble++, data >>= 4)
        sum = table[(sum ^ data) & 15] ^ sum >> 4;
    return sum;
}

#define DEFINE_CRC(suffix, bytes)                                                                                      \
    OP(crc32##suffix) { RESULT(32, crc(crc32_table, REG(32, rn), c->x[u->rm], bytes)); }                               \
    OP(crc32c##suffix) { RESULT(32, crc(crc32c_table, REG(32, rn), c->x[u->rm], bytes)); }
DEFINE_CRC(b, 1)
DEFINE_CRC(h, 2)
DEFINE_CRC(w, 4)
DEFINE_CRC(x, 8)

/* ---- Conditions and flags ---------------------------------------------------------------------------------------- */

#define DEFINE_CONDITIONAL(width)                                                                                      \
    OP(csel##width) { RESULT(width, holds(c, u) ? c->x[u->rn] : c->x[u->rm]); }                                        \
    OP(csinc##width) { RESULT(width, holds(c, u) ? c->x[u->rn] : c->x[u->rm] + 1); }                                   \
    OP(csinv##width) { RESULT(width, holds(c, u) ? c->x[u->rn] : ~c->x[u->rm]); }                                      \
    OP(csneg##width) { RESULT(width, holds(c, u) ? c->x[u->rn] : -c->x[u->rm]); }                                      \
    DEFINE_COMPARE(ccmn##width##_reg, add_flags##width(c, REG(width, rn), REG(width, rm)))                             \
    DEFINE_COMPARE(ccmp##width##_reg, sub_flags##width(c, REG(width, rn), REG(width, rm)))                             \
    DEFINE_COMPARE(ccmn##width##_imm, add_flags##width(c, REG(width, rn), (uint##width##_t)u->imm))                    \
    DEFINE_COMPARE(ccmp##width##_imm, sub_flags##width(c, REG(width, rn), (uint##width##_t)u->imm))
#define DEFINE_COMPARE(name, compare)                                                                                  \
    OP(name) {                                                                                                         \
        if (holds(c, u))                                                                                               \
            compare;                                                                                                   \
        else                                                                                                           \
            c->nzcv = (uint32_t)u->ra << 28;                                                                           \
        return true;                                                                                                   \
    }
DEFINE_CONDITIONAL(32)
DEFINE_CONDITIONAL(64)

OP(cfinv) {
    (void)u;
    c->nzcv ^= FLAG_C;
    return true;
}
OP(rmif) {
    c->nzcv = (c->nzcv & ~u->aux) | ((uint32_t)ror64(c->x[u->rn], u->ra) << 28 & u->aux);
    return true;
}
/* N and Z of the low bits; V when the bit above them differs from their sign. */
#define DEFINE_SETF(width)                                                                                             \
    OP(setf##width) {                                                                                                  \
        uint32_t v = REG(32, rn);                                                                                      \
        c->nzcv = (c->nzcv & FLAG_C) | (v >> (width - 1)) << 31 | (uint32_t)((uint##width##_t)v == 0) << 30 |          \
                  ((v >> width ^ v >> (width - 1)) & 1) << 28;                                                         \
        return true;                                                                                                   \
    }
DEFINE_SETF(8)
DEFINE_SETF(16)

/* ---- Branches: a conditional one that is not taken goes on with the block ------------------------------------------ */

#define BRANCH_IF(condition) return (condition) ? leave_for(c, u, c->block_pc + u->imm) : true

OP(b) { return branch_to(c, c->block_pc + u->imm); }
OP(b_cond) { BRANCH_IF(holds(c, u)); }
OP(cbz32) { BRANCH_IF(REG(32, rn) == 0); }
OP(cbz64) { BRANCH_IF(c->x[u->rn] == 0); }
OP(cbnz32) { BRANCH_IF(REG(32, rn) != 0); }
OP(cbnz64) { BRANCH_IF(c->x[u->rn] != 0); }
OP(tbz) { BRANCH_IF(!(c->x[u->rn] >> u->ra & 1)); }
OP(tbnz) { BRANCH_IF(c->x[u->rn] >> u->ra & 1); }

OP(bl) {
    c->x[30] = pc_of(c, u) + 4;
    return branch_to(c, c->block_pc + u->imm);
}

/* AArch64.BranchAddr(): the tag is replaced by copies of bit 55 where TBI is on. */
static inline bool branch_to_reg(struct vcpu *c, uint64_t target) {
    if (unlikely((uint64_t)((int64_t)(target << 8) >> 8) != target))
        target = untag(c, target);
    return branch_to(c, target);
}
OP(br) { return branch_to_reg(c, c->x[u->rn]); }
OP(blr) {
    uint64_t target = c->x[u->rn];
    c->x[30] = pc_of(c, u) + 4;
    return branch_to_reg(c, target);
}
