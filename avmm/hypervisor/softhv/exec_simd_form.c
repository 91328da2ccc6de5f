/*
 * Forms of the Advanced SIMD instructions: which sizes each class of encodings has, and what the ops are told.
 */
#include "exec_simd.h"

static bool registers(struct uop *u, uint32_t i, unsigned size, bool q, unsigned lanes) {
    u->rd = (uint8_t)bits(i, 0, 5);
    u->rn = (uint8_t)bits(i, 5, 5);
    u->rm = (uint8_t)bits(i, 16, 5);
    u->ra = (uint8_t)lanes;
    u->aux = size | (q ? V_Q : 0);
    return true;
}

static bool vector(struct uop *u, uint32_t i, unsigned size) {
    bool q = bits(i, 30, 1);
    return registers(u, i, size, q, (q ? 16u : 8u) >> size);
}

static bool scalar(struct uop *u, uint32_t i, unsigned size) { return registers(u, i, size, false, 1); }

/* ---- Same width: the size field at 23:22 ------------------------------------------------------------------------- */

bool form_v(struct uop *u, uint32_t i) {
    return !(bits(i, 22, 2) == 3 && !bits(i, 30, 1)) && vector(u, i, bits(i, 22, 2));
}
bool form_v_bhs(struct uop *u, uint32_t i) { return bits(i, 22, 2) != 3 && form_v(u, i); }
bool form_v_bh(struct uop *u, uint32_t i) { return bits(i, 22, 2) < 2 && form_v(u, i); }
bool form_v_hs(struct uop *u, uint32_t i) { return bits(i, 22, 2) != 0 && form_v_bhs(u, i); }
/* Bytes, whatever is at 23:22. */
bool form_v_b(struct uop *u, uint32_t i) { return vector(u, i, 0); }
bool form_v_across(struct uop *u, uint32_t i) {
    return !(bits(i, 22, 2) == 2 && !bits(i, 30, 1)) && form_v_bhs(u, i);
}
bool form_s(struct uop *u, uint32_t i) { return scalar(u, i, bits(i, 22, 2)); }
bool form_s_hs(struct uop *u, uint32_t i) {
    return bits(i, 22, 2) != 0 && bits(i, 22, 2) != 3 && scalar(u, i, bits(i, 22, 2));
}

/* ---- Single or double precision: bit 22 -------------------------------------------------------------------------- */

bool form_v_fp(struct uop *u, uint32_t i) {
    unsigned size = 2 + bits(i, 22, 1);
    return !(size == 3 && !bits(i, 30, 1)) && vector(u, i, size);
}
bool form_s_fp(struct uop *u, uint32_t i) { return scalar(u, i, 2 + bits(i, 22, 1)); }
/* From or to half or single precision (bit 22): the narrower size, and which half. */
bool form_v_fp_long(struct uop *u, uint32_t i) {
    unsigned size = 1 + bits(i, 22, 1);
    return registers(u, i, size, bits(i, 30, 1), 8u >> size);
}

/* ---- Between a width and twice that: Q chooses the half ---------------------------------------------------------- */

bool form_v_long(struct uop *u, uint32_t i) {
    unsigned size = bits(i, 22, 2);
    return size != 3 && registers(u, i, size, bits(i, 30, 1), 8u >> size);
}
bool form_v_long_hs(struct uop *u, uint32_t i) { return bits(i, 22, 2) != 0 && form_v_long(u, i); }
bool form_s_bhs(struct uop *u, uint32_t i) { return bits(i, 22, 2) != 3 && form_s(u, i); }
/* One 64-bit product. */
bool form_v_pmull64(struct uop *u, uint32_t i) { return registers(u, i, 3, bits(i, 30, 1), 1); }

/* ---- Shifts by an immediate: immh:immb is the size and the amount ------------------------------------------------ */

/* The size is the place of immh's top bit; immh is zero only for encodings of other classes. */
static bool shift_size(uint32_t i, unsigned *size) {
    unsigned immh = bits(i, 19, 4);
    *size = immh ? 31 - (unsigned)__builtin_clz(immh) : 0;
    return immh;
}

static uint64_t right_amount(uint32_t i, unsigned size) { return (16u << size) - bits(i, 16, 7); }
static uint64_t left_amount(uint32_t i, unsigned size) { return bits(i, 16, 7) - (8u << size); }

bool form_v_shr(struct uop *u, uint32_t i) {
    unsigned size;
    if (!shift_size(i, &size) || (size == 3 && !bits(i, 30, 1)))
        return false;
    u->imm = right_amount(i, size);
    return vector(u, i, size);
}

bool form_v_shl(struct uop *u, uint32_t i) {
    unsigned size;
    if (!shift_size(i, &size) || (size == 3 && !bits(i, 30, 1)))
        return false;
    u->imm = left_amount(i, size);
    return vector(u, i, size);
}

bool form_v_shr_narrow(struct uop *u, uint32_t i) {
    unsigned size;
    if (!shift_size(i, &size) || size == 3)
        return false;
    u->imm = right_amount(i, size);
    return registers(u, i, size, bits(i, 30, 1), 8u >> size);
}

bool form_v_shl_long(struct uop *u, uint32_t i) {
    unsigned size;
    if (!shift_size(i, &size) || size == 3)
        return false;
    u->imm = left_amount(i, size);
    return registers(u, i, size, bits(i, 30, 1), 8u >> size);
}

bool form_s_shr(struct uop *u, uint32_t i) {
    unsigned size;
    if (!shift_size(i, &size))
        return false;
    u->imm = right_amount(i, size);
    return scalar(u, i, size);
}

bool form_s_shl(struct uop *u, uint32_t i) {
    unsigned size;
    if (!shift_size(i, &size))
        return false;
    u->imm = left_amount(i, size);
    return scalar(u, i, size);
}

bool form_s_shr_d(struct uop *u, uint32_t i) { return bits(i, 22, 1) && form_s_shr(u, i); }
bool form_s_shl_d(struct uop *u, uint32_t i) { return bits(i, 22, 1) && form_s_shl(u, i); }
bool form_s_shr_narrow(struct uop *u, uint32_t i) { return !bits(i, 22, 1) && form_s_shr(u, i); }

/* ---- By element: the index is in H, L and M, as many of them as the size leaves ---------------------------------- */

static bool element(struct uop *u, uint32_t i) {
    unsigned high = bits(i, 11, 1), low = bits(i, 21, 1), index;
    switch (v_size(u)) {
    case 1:
        index = high << 2 | low << 1 | bits(i, 20, 1);
        u->rm = (uint8_t)bits(i, 16, 4);
        break;
    case 2:
        index = high << 1 | low;
        break;
    default:
        index = high;
        if (low)
            return false;
    }
    u->aux |= V_ELEMENT | index << V_INDEX_SHIFT;
    return true;
}

bool form_v_element(struct uop *u, uint32_t i) { return form_v_hs(u, i) && element(u, i); }
bool form_v_element_long(struct uop *u, uint32_t i) { return form_v_long_hs(u, i) && element(u, i); }
bool form_v_element_fp(struct uop *u, uint32_t i) { return form_v_fp(u, i) && element(u, i); }
bool form_s_element(struct uop *u, uint32_t i) { return form_s_hs(u, i) && element(u, i); }
bool form_s_element_fp(struct uop *u, uint32_t i) { return form_s_fp(u, i) && element(u, i); }

/* ---- Copies, permutations, immediates ---------------------------------------------------------------------------- */

/* imm5: the lowest set bit is the size, what is above it the index, which goes to imm. */
static bool copy_size(struct uop *u, uint32_t i, unsigned *size) {
    unsigned imm5 = bits(i, 16, 5);
    if (!(imm5 & 15))
        return false;
    *size = (unsigned)__builtin_ctz(imm5);
    u->imm = imm5 >> (*size + 1);
    return true;
}

bool form_v_dup(struct uop *u, uint32_t i) {
    unsigned size;
    return copy_size(u, i, &size) && !(size == 3 && !bits(i, 30, 1)) && vector(u, i, size);
}

bool form_v_dup_general(struct uop *u, uint32_t i) {
    if (!form_v_dup(u, i))
        return false;
    u->rn = reg_zr(i, 5);
    return true;
}

bool form_s_dup(struct uop *u, uint32_t i) {
    unsigned size;
    return copy_size(u, i, &size) && scalar(u, i, size);
}

bool form_v_insert_general(struct uop *u, uint32_t i) {
    unsigned size;
    if (!copy_size(u, i, &size) || !vector(u, i, size))
        return false;
    u->rn = reg_zr(i, 5);
    return true;
}

/* The source's index goes to rm. */
bool form_v_insert(struct uop *u, uint32_t i) {
    unsigned size;
    if (!copy_size(u, i, &size) || !vector(u, i, size))
        return false;
    u->rm = (uint8_t)(bits(i, 11, 4) >> size);
    return true;
}

/* UMOV has an X form for 64-bit elements only, SMOV for all that are narrower. */
bool form_v_umov(struct uop *u, uint32_t i) {
    unsigned size;
    if (!copy_size(u, i, &size) || (size == 3) != bits(i, 30, 1) || !vector(u, i, size))
        return false;
    u->rd = reg_dst(i, 0);
    return true;
}

bool form_v_smov(struct uop *u, uint32_t i) {
    unsigned size;
    if (!copy_size(u, i, &size) || size == 3 || (size == 2 && !bits(i, 30, 1)) || !vector(u, i, size))
        return false;
    u->rd = reg_dst(i, 0);
    return true;
}

bool form_v_ext(struct uop *u, uint32_t i) {
    u->imm = bits(i, 11, 4);
    return !(u->imm > 7 && !bits(i, 30, 1)) && vector(u, i, 0);
}

/* The number of table registers. */
bool form_v_table(struct uop *u, uint32_t i) {
    u->imm = bits(i, 13, 2) + 1;
    return vector(u, i, 0);
}

/* AdvSIMDExpandImm */
bool form_v_imm(struct uop *u, uint32_t i) {
    unsigned cmode = bits(i, 12, 4), op = bits(i, 29, 1);
    uint64_t imm8 = bits(i, 16, 3) << 5 | bits(i, 5, 5), value = 0;
    vector(u, i, 0);
    switch (cmode >> 1) {
    case 0: case 1: case 2: case 3:
        value = repeat(imm8 << (8 * (cmode >> 1)), 2);
        break;
    case 4: case 5:
        value = repeat(imm8 << (8 * (cmode >> 1 & 1)), 1);
        break;
    case 6: /* ones are shifted in */
        value = repeat(cmode & 1 ? imm8 << 16 | 0xffff : imm8 << 8 | 0xff, 2);
        break;
    case 7:
        if (cmode == 14 && !op) {
            value = repeat(imm8, 0);
        } else if (cmode == 14) { /* each bit becomes a byte */
            for (unsigned bit = 0; bit < 8; bit++)
                value |= (imm8 >> bit & 1 ? UINT64_C(0xff) : 0) << (8 * bit);
        } else if (!op) {
            value = repeat(fp_expand_imm((unsigned)imm8, false), 2);
        } else if (bits(i, 30, 1)) {
            value = fp_expand_imm((unsigned)imm8, true);
        } else {
            return false;
        }
        break;
    }
    u->imm = op && cmode < 14 ? ~value : value;
    return true;
}
