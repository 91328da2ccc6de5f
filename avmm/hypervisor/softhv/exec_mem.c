/*
 * Loads and stores of general registers (Arm ARM C4.1.88): one access, pairs, acquire and release.
 *
 * No register changes before the last access of an instruction has succeeded, so every one of them can be run again.
 * Where the base register is also transferred with writeback (CONSTRAINED UNPREDICTABLE), a store stores what it held
 * and the address wins over what a load read.
 */
#include "exec_mem.h"

/* ---- Forms: rd, and ra for a second register, are transferred ---------------------------------------------------- */

static bool form_access(struct uop *u, uint32_t i, uint8_t rd, int64_t offset) {
    form_base(u, i);
    u->rd = rd;
    u->imm = (uint64_t)offset;
    return true;
}

static int64_t scaled_imm12(uint32_t i) { return (int64_t)bits(i, 10, 12) << bits(i, 30, 2); }
bool form_load_uimm(struct uop *u, uint32_t i) { return form_access(u, i, reg_dst(i, 0), scaled_imm12(i)); }
bool form_store_uimm(struct uop *u, uint32_t i) { return form_access(u, i, reg_zr(i, 0), scaled_imm12(i)); }
bool form_load_simm(struct uop *u, uint32_t i) { return form_access(u, i, reg_dst(i, 0), sbits(i, 12, 9)); }
bool form_store_simm(struct uop *u, uint32_t i) { return form_access(u, i, reg_zr(i, 0), sbits(i, 12, 9)); }
bool form_load_base(struct uop *u, uint32_t i) { return form_access(u, i, reg_dst(i, 0), 0); }
bool form_store_base(struct uop *u, uint32_t i) { return form_access(u, i, reg_zr(i, 0), 0); }

bool form_load_reg(struct uop *u, uint32_t i) {
    u->rm = reg_zr(i, 16);
    return form_access(u, i, reg_dst(i, 0), bits(i, 12, 1) * bits(i, 30, 2));
}
bool form_store_reg(struct uop *u, uint32_t i) {
    form_load_reg(u, i);
    u->rd = reg_zr(i, 0);
    return true;
}

bool form_load_literal(struct uop *u, uint32_t i) {
    u->rd = reg_dst(i, 0);
    u->imm = u->off + ((uint64_t)sbits(i, 5, 19) << 2);
    return true;
}

static int64_t scaled_imm7(uint32_t i) { return sbits(i, 15, 7) * (bits(i, 31, 1) ? 8 : 4); }
bool form_load_pair(struct uop *u, uint32_t i) {
    u->ra = reg_dst(i, 10);
    return form_access(u, i, reg_dst(i, 0), scaled_imm7(i));
}
bool form_store_pair(struct uop *u, uint32_t i) {
    u->ra = reg_zr(i, 10);
    return form_access(u, i, reg_zr(i, 0), scaled_imm7(i));
}

/* ---- One register ------------------------------------------------------------------------------------------------ */

/* `type` is what memory holds; `extend` what it is extended to before the register's 64 bits. */
#define LOAD(op, type, extend, bank, address, after)                                                                   \
    OP_MEM(op) {                                                                                                       \
        LOAD_BASE;                                                                                                     \
        unsigned idx = bank;                                                                                           \
        type v;                                                                                                        \
        if (unlikely(!read_at(c, u, address, sizeof v, idx, &v, fast)))                                                \
            return false;                                                                                              \
        c->x[u->rd] = (extend)v;                                                                                       \
        after;                                                                                                         \
        return true;                                                                                                   \
    }
#define STORE(op, type, bank, address, after)                                                                          \
    OP_MEM(op) {                                                                                                       \
        LOAD_BASE;                                                                                                     \
        unsigned idx = bank;                                                                                           \
        type v = (type)c->x[u->rd];                                                                                    \
        if (unlikely(!write_at(c, u, address, sizeof v, idx, &v, fast)))                                               \
            return false;                                                                                              \
        after;                                                                                                         \
        return true;                                                                                                   \
    }

/* LDTR and STTR at EL1 have EL0's permissions, but for PSTATE.UAO. */
static inline unsigned unprivileged(const struct vcpu *c) { return c->el && c->uao ? c->mmu_idx : MMU_EL0; }

#define LOADS(name, type, extend)                                                                                      \
    LOAD(name##_imm, type, extend, c->mmu_idx, AT_IMM, KEEP)                                                           \
    LOAD(name##_pre, type, extend, c->mmu_idx, AT_IMM, WRITEBACK)                                                      \
    LOAD(name##_post, type, extend, c->mmu_idx, AT_BASE, WRITEBACK)                                                    \
    LOAD(name##_lsl, type, extend, c->mmu_idx, AT_LSL, KEEP)                                                           \
    LOAD(name##_uxtw, type, extend, c->mmu_idx, AT_UXTW, KEEP)                                                         \
    LOAD(name##_sxtw, type, extend, c->mmu_idx, AT_SXTW, KEEP)                                                         \
    LOAD(name##_unpriv, type, extend, unprivileged(c), AT_IMM, KEEP)
#define STORES(name, type)                                                                                             \
    STORE(name##_imm, type, c->mmu_idx, AT_IMM, KEEP)                                                                  \
    STORE(name##_pre, type, c->mmu_idx, AT_IMM, WRITEBACK)                                                             \
    STORE(name##_post, type, c->mmu_idx, AT_BASE, WRITEBACK)                                                           \
    STORE(name##_lsl, type, c->mmu_idx, AT_LSL, KEEP)                                                                  \
    STORE(name##_uxtw, type, c->mmu_idx, AT_UXTW, KEEP)                                                                \
    STORE(name##_sxtw, type, c->mmu_idx, AT_SXTW, KEEP)                                                                \
    STORE(name##_unpriv, type, unprivileged(c), AT_IMM, KEEP)

LOADS(ldrb, uint8_t, uint64_t)
LOADS(ldrh, uint16_t, uint64_t)
LOADS(ldr32, uint32_t, uint64_t)
LOADS(ldr64, uint64_t, uint64_t)
LOADS(ldrsb32, int8_t, uint32_t)
LOADS(ldrsb64, int8_t, uint64_t)
LOADS(ldrsh32, int16_t, uint32_t)
LOADS(ldrsh64, int16_t, uint64_t)
LOADS(ldrsw, int32_t, uint64_t)
STORES(strb, uint8_t)
STORES(strh, uint16_t)
STORES(str32, uint32_t)
STORES(str64, uint64_t)

#define LITERAL(op, type)                                                                                              \
    OP_MEM(op) {                                                                                                       \
        unsigned idx = c->mmu_idx;                                                                                     \
        type v;                                                                                                        \
        if (unlikely(!read_at(c, u, c->block_pc + u->imm, sizeof v, idx, &v, fast)))                                   \
            return false;                                                                                              \
        c->x[u->rd] = (uint64_t)v;                                                                                     \
        return true;                                                                                                   \
    }
LITERAL(ldr32_literal, uint32_t)
LITERAL(ldr64_literal, uint64_t)
LITERAL(ldrsw_literal, int32_t)

OP(prfm) {
    (void)c, (void)u;
    return true;
}

/* ---- Acquire and release: single registers, always aligned ------------------------------------------------------- */

#define LOAD_ACQUIRE(op, type)                                                                                         \
    OP_MEM(op) {                                                                                                       \
        LOAD_BASE;                                                                                                     \
        unsigned idx = c->mmu_idx;                                                                                     \
        type v;                                                                                                        \
        if (unlikely(base & (sizeof v - 1)))                                                                           \
            return fast ? false : exc_data_abort(c, u, base, DFSC_ALIGNMENT, false, false);                            \
        if (unlikely(!read_at(c, u, base, sizeof v, idx, &v, fast)))                                                   \
            return false;                                                                                              \
        atomic_thread_fence(memory_order_acquire);                                                                     \
        c->x[u->rd] = v;                                                                                               \
        return true;                                                                                                   \
    }
/* A later LDAR must not overtake an STLR (they are RCsc): hence the full fence after it. */
#define STORE_RELEASE(op, type)                                                                                        \
    OP_MEM(op) {                                                                                                       \
        LOAD_BASE;                                                                                                     \
        unsigned idx = c->mmu_idx;                                                                                     \
        type v = (type)c->x[u->rd];                                                                                    \
        if (unlikely(base & (sizeof v - 1)))                                                                           \
            return fast ? false : exc_data_abort(c, u, base, DFSC_ALIGNMENT, true, false);                             \
        atomic_thread_fence(memory_order_release);                                                                     \
        if (unlikely(!write_at(c, u, base, sizeof v, idx, &v, fast)))                                                  \
            return false;                                                                                              \
        atomic_thread_fence(memory_order_seq_cst);                                                                     \
        return true;                                                                                                   \
    }
LOAD_ACQUIRE(ldar8, uint8_t)
LOAD_ACQUIRE(ldar16, uint16_t)
LOAD_ACQUIRE(ldar32, uint32_t)
LOAD_ACQUIRE(ldar64, uint64_t)
STORE_RELEASE(stlr8, uint8_t)
STORE_RELEASE(stlr16, uint16_t)
STORE_RELEASE(stlr32, uint32_t)
STORE_RELEASE(stlr64, uint64_t)

/* ---- Pairs ------------------------------------------------------------------------------------------------------- */

bool span_read_slow(struct vcpu *c, const struct uop *u, uint64_t va, unsigned size, unsigned total, void *out) {
    for (unsigned at = 0; at < total; at += size)
        if (!mem_read(c, u, va + at, size, c->mmu_idx, (uint8_t *)out + at))
            return false;
    return true;
}

/* A fault in the second page is found before the first one is written. */
bool span_write_slow(struct vcpu *c, const struct uop *u, uint64_t va, unsigned size, unsigned total, const void *in) {
    uint64_t second = (va + total - 1) & ~(uint64_t)(PAGE_SIZE - 1);
    if (second != (va & ~(uint64_t)(PAGE_SIZE - 1))) {
        struct translation first = mmu_translate(c, untag(c, va), ACCESS_WRITE, c->mmu_idx);
        struct translation last = mmu_translate(c, untag(c, second), ACCESS_WRITE, c->mmu_idx);
        if (first.fault == NO_FAULT && last.fault != NO_FAULT)
            return exc_data_abort(c, u, second, last.fault, true, false);
    }
    for (unsigned at = 0; at < total; at += size)
        if (!mem_write(c, u, va + at, size, c->mmu_idx, (const uint8_t *)in + at))
            return false;
    return true;
}

/* Loading a register twice (CONSTRAINED UNPREDICTABLE) leaves the first one's value. */
#define LOAD_PAIR(op, type, address, after)                                                                            \
    OP_MEM(op) {                                                                                                       \
        LOAD_BASE;                                                                                                     \
        type v[2];                                                                                                     \
        if (unlikely(!span_read(c, u, address, sizeof v[0], sizeof v, v, fast)))                                       \
            return false;                                                                                              \
        c->x[u->ra] = (uint64_t)v[1];                                                                                  \
        c->x[u->rd] = (uint64_t)v[0];                                                                                  \
        after;                                                                                                         \
        return true;                                                                                                   \
    }
#define STORE_PAIR(op, type, address, after)                                                                           \
    OP_MEM(op) {                                                                                                       \
        LOAD_BASE;                                                                                                     \
        type v[2] = {(type)c->x[u->rd], (type)c->x[u->ra]};                                                            \
        if (unlikely(!span_write(c, u, address, sizeof v[0], sizeof v, v, fast)))                                      \
            return false;                                                                                              \
        after;                                                                                                         \
        return true;                                                                                                   \
    }
#define PAIRS(kind, name, type)                                                                                        \
    kind(name##_imm, type, AT_IMM, KEEP) kind(name##_pre, type, AT_IMM, WRITEBACK)                                     \
    kind(name##_post, type, AT_BASE, WRITEBACK)
PAIRS(LOAD_PAIR, ldp32, uint32_t)
PAIRS(LOAD_PAIR, ldp64, uint64_t)
PAIRS(LOAD_PAIR, ldpsw, int32_t)
PAIRS(STORE_PAIR, stp32, uint32_t)
PAIRS(STORE_PAIR, stp64, uint64_t)
