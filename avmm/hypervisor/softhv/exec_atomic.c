/*
 * Exclusives and the atomics of FEAT_LSE, as host atomics on guest memory.
 *
 * The exclusive monitor remembers address, size and value; a store-exclusive is a compare-and-swap against that value. By
 * itself that would not see that the value had changed and changed back in between (ABA), which hands out an element of
 * a lock-free list twice. So store-exclusives count: each address has a slot, a word whose upper bits a successful
 * store-exclusive raises and whose bit 0 says that one is under way. One whose slot has moved since its load-exclusive
 * fails. Addresses that share a slot make each other fail for nothing, which the architecture allows (B2.9.5).
 * What stays unseen is a plain store, or an atomic, that puts the very old value back: code that mixes them with
 * exclusives on one location cannot mean anything by a value that it allows to recur.
 */
#include "exec_mem.h"

__extension__ typedef unsigned __int128 uint128;

/* ---- Forms ------------------------------------------------------------------------------------------------------- */

/* rd, ra: transferred; rm: the status register. */
bool form_load_exclusive(struct uop *u, uint32_t i) {
    form_base(u, i);
    u->rd = reg_dst(i, 0);
    u->ra = reg_dst(i, 10);
    return true;
}
bool form_store_exclusive(struct uop *u, uint32_t i) {
    form_base(u, i);
    u->rd = reg_zr(i, 0);
    u->ra = reg_zr(i, 10);
    u->rm = reg_dst(i, 16);
    return true;
}

/* rm: the operand; rd: what memory held. */
bool form_atomic(struct uop *u, uint32_t i) {
    form_base(u, i);
    u->rd = reg_dst(i, 0);
    u->rm = reg_zr(i, 16);
    return true;
}

/* rm: compared; rd: the new value; ra: rm as a destination. */
bool form_cas(struct uop *u, uint32_t i) {
    form_base(u, i);
    u->rd = reg_zr(i, 0);
    u->rm = reg_zr(i, 16);
    u->ra = reg_dst(i, 16);
    return true;
}

/* Pairs of an even register and the next one; R30's partner is XZR. */
bool form_casp(struct uop *u, uint32_t i) {
    if (bits(i, 0, 1) || bits(i, 16, 1))
        return false;
    form_cas(u, i);
    return true;
}

/* Nothing here is worth a path of its own: mem_ptr() is a call anyway. LOAD_BASE asks. */
enum { fast = false };

/* ---- Exclusives -------------------------------------------------------------------------------------------------- */

/* If `p` holds `expected` store `desired`; `expected` becomes what it held. */
#if defined(__x86_64__)
__attribute__((target("cx16")))
#endif
static bool compare_swap_128(void *p, uint64_t expected[2], const uint64_t desired[2]) {
    uint128 want = (uint128)expected[1] << 64 | expected[0], new = (uint128)desired[1] << 64 | desired[0];
    uint128 old = __sync_val_compare_and_swap((uint128 *)p, want, new);
    expected[0] = (uint64_t)old;
    expected[1] = (uint64_t)(old >> 64);
    return old == want;
}
static inline bool compare_swap_8(void *p, uint8_t *expected, uint8_t desired) {
    return __atomic_compare_exchange_n((uint8_t *)p, expected, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}
static inline bool compare_swap_16(void *p, uint16_t *expected, uint16_t desired) {
    return __atomic_compare_exchange_n((uint16_t *)p, expected, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}
static inline bool compare_swap_32(void *p, uint32_t *expected, uint32_t desired) {
    return __atomic_compare_exchange_n((uint32_t *)p, expected, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}
static inline bool compare_swap_64(void *p, uint64_t *expected, uint64_t desired) {
    return __atomic_compare_exchange_n((uint64_t *)p, expected, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

enum { SLOT_BUSY = 1, SLOT_STEP = 2 };

/* Before the load. */
static inline void monitor_slot(struct vcpu *c, uint64_t pa) {
    c->monitor.slot = &c->vm->exclusive[(pa >> 4 ^ pa >> 14) % EXCLUSIVE_SLOTS];
    c->monitor.version = atomic_load(c->monitor.slot);
}

static inline void monitor_set(struct vcpu *c, uint64_t pa, uint32_t size, uint64_t low, uint64_t high) {
    c->monitor.pa = pa;
    c->monitor.size = size;
    c->monitor.value[0] = low;
    c->monitor.value[1] = high;
}

static inline bool store_begins(struct vcpu *c) {
    uint64_t version = c->monitor.version;
    return !(version & SLOT_BUSY) &&
           atomic_compare_exchange_strong(c->monitor.slot, &version, version | SLOT_BUSY);
}
static inline bool store_ends(struct vcpu *c, bool stored) {
    atomic_store(c->monitor.slot, c->monitor.version + (stored ? SLOT_STEP : 0));
    return stored;
}

/*
 * Declares `p`, the host's address of `size` bytes at the base, for a store-exclusive the monitor allows; NULL when it
 * does not. Misalignment faults come first, whatever the monitor says (AArch64.ExclusiveMonitorsPass()).
 */
#define STORE_EXCLUSIVE_BEGIN(bytes)                                                                                   \
    LOAD_BASE;                                                                                                         \
    void *p = NULL;                                                                                                    \
    if (c->monitor.pa != ~UINT64_C(0) || base & ((bytes)-1)) {                                                         \
        uint64_t pa;                                                                                                   \
        p = mem_ptr(c, u, base, bytes, c->mmu_idx, true, &pa);                                                         \
        if (unlikely(!p))                                                                                              \
            return false;                                                                                              \
        if (c->monitor.pa != pa || c->monitor.size != (bytes))                                                         \
            p = NULL;                                                                                                  \
        c->monitor.pa = ~UINT64_C(0);                                                                                  \
    }

#define EXCLUSIVES(width, type)                                                                                        \
    OP(ldxr##width) {                                                                                                  \
        LOAD_BASE;                                                                                                     \
        uint64_t pa;                                                                                                   \
        const type *p = mem_ptr(c, u, base, sizeof *p, c->mmu_idx, false, &pa);                                        \
        if (unlikely(!p))                                                                                              \
            return false;                                                                                              \
        monitor_slot(c, pa);                                                                                           \
        type v = __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                                 \
        monitor_set(c, pa, sizeof v, v, 0);                                                                            \
        c->x[u->rd] = v;                                                                                               \
        return true;                                                                                                   \
    }                                                                                                                  \
    OP(stxr##width) {                                                                                                  \
        STORE_EXCLUSIVE_BEGIN(sizeof(type))                                                                            \
        type expected = (type)c->monitor.value[0];                                                                     \
        c->x[u->rm] = !(p && store_begins(c) &&                                                                        \
                        store_ends(c, compare_swap_##width(p, &expected, (type)c->x[u->rd])));                         \
        return true;                                                                                                   \
    }
EXCLUSIVES(8, uint8_t)
EXCLUSIVES(16, uint16_t)
EXCLUSIVES(32, uint32_t)
EXCLUSIVES(64, uint64_t)

OP(ldxp32) {
    LOAD_BASE;
    uint64_t pa;
    const uint64_t *p = mem_ptr(c, u, base, 8, c->mmu_idx, false, &pa);
    if (unlikely(!p))
        return false;
    monitor_slot(c, pa);
    uint64_t v = __atomic_load_n(p, __ATOMIC_SEQ_CST);
    monitor_set(c, pa, 8, v, 0);
    c->x[u->rd] = (uint32_t)v;
    c->x[u->ra] = v >> 32;
    return true;
}
OP(stxp32) {
    STORE_EXCLUSIVE_BEGIN(8)
    uint64_t expected = c->monitor.value[0], desired = c->x[u->ra] << 32 | (uint32_t)c->x[u->rd];
    c->x[u->rm] = !(p && store_begins(c) && store_ends(c, compare_swap_64(p, &expected, desired)));
    return true;
}

/* The two halves may come from different writes: only the STXP that succeeds makes the pair atomic (Arm ARM B2.2.1). */
OP(ldxp64) {
    LOAD_BASE;
    uint64_t pa;
    const uint64_t *p = mem_ptr(c, u, base, 16, c->mmu_idx, false, &pa);
    if (unlikely(!p))
        return false;
    monitor_slot(c, pa);
    uint64_t low = __atomic_load_n(&p[0], __ATOMIC_SEQ_CST), high = __atomic_load_n(&p[1], __ATOMIC_SEQ_CST);
    monitor_set(c, pa, 16, low, high);
    c->x[u->rd] = low;
    c->x[u->ra] = high;
    return true;
}
OP(stxp64) {
    STORE_EXCLUSIVE_BEGIN(16)
    uint64_t expected[2] = {c->monitor.value[0], c->monitor.value[1]};
    const uint64_t desired[2] = {c->x[u->rd], c->x[u->ra]};
    c->x[u->rm] = !(p && store_begins(c) && store_ends(c, compare_swap_128(p, expected, desired)));
    return true;
}

OP(clrex) {
    (void)u;
    c->monitor.pa = ~UINT64_C(0);
    return true;
}

/* ---- FEAT_LSE ---------------------------------------------------------------------------------------------------- */

/* Declares `p`. */
#define ATOMIC_BEGIN(type)                                                                                             \
    LOAD_BASE;                                                                                                         \
    uint64_t pa;                                                                                                       \
    type *p = mem_ptr(c, u, base, sizeof(type), c->mmu_idx, true, &pa);                                                \
    if (unlikely(!p))                                                                                                  \
    return false

#define FETCH(op, type, fetch, operand)                                                                                \
    OP(op) {                                                                                                           \
        ATOMIC_BEGIN(type);                                                                                            \
        c->x[u->rd] = fetch(p, (type)(operand), __ATOMIC_SEQ_CST);                                                     \
        return true;                                                                                                   \
    }
#define FETCH_EXTREME(op, type, compared, width, relation)                                                             \
    OP(op) {                                                                                                           \
        ATOMIC_BEGIN(type);                                                                                            \
        type operand = (type)c->x[u->rm], old = __atomic_load_n(p, __ATOMIC_SEQ_CST);                                  \
        while (!compare_swap_##width(p, &old, (compared)old relation (compared)operand ? old : operand))               \
            ;                                                                                                          \
        c->x[u->rd] = old;                                                                                             \
        return true;                                                                                                   \
    }
#define ATOMICS(width)                                                                                                 \
    FETCH(ldadd##width, uint##width##_t, __atomic_fetch_add, c->x[u->rm])                                              \
    FETCH(ldclr##width, uint##width##_t, __atomic_fetch_and, ~c->x[u->rm])                                             \
    FETCH(ldeor##width, uint##width##_t, __atomic_fetch_xor, c->x[u->rm])                                              \
    FETCH(ldset##width, uint##width##_t, __atomic_fetch_or, c->x[u->rm])                                               \
    FETCH(swp##width, uint##width##_t, __atomic_exchange_n, c->x[u->rm])                                               \
    FETCH_EXTREME(ldsmax##width, uint##width##_t, int##width##_t, width, >)                                            \
    FETCH_EXTREME(ldsmin##width, uint##width##_t, int##width##_t, width, <)                                            \
    FETCH_EXTREME(ldumax##width, uint##width##_t, uint##width##_t, width, >)                                           \
    FETCH_EXTREME(ldumin##width, uint##width##_t, uint##width##_t, width, <)                                           \
    OP(cas##width) {                                                                                                   \
        ATOMIC_BEGIN(uint##width##_t);                                                                                 \
        uint##width##_t expected = (uint##width##_t)c->x[u->rm];                                                       \
        compare_swap_##width(p, &expected, (uint##width##_t)c->x[u->rd]);                                              \
        c->x[u->ra] = expected;                                                                                        \
        return true;                                                                                                   \
    }
ATOMICS(8)
ATOMICS(16)
ATOMICS(32)
ATOMICS(64)

static inline uint64_t second(const struct vcpu *c, unsigned even) { return even == 30 ? 0 : c->x[even + 1]; }
static inline void set_pair(struct vcpu *c, unsigned even, uint64_t low, uint64_t high) {
    c->x[even] = low;
    c->x[even == 30 ? R_SINK : even + 1] = high;
}

OP(casp32) {
    ATOMIC_BEGIN(uint64_t);
    uint64_t expected = second(c, u->rm) << 32 | (uint32_t)c->x[u->rm];
    compare_swap_64(p, &expected, second(c, u->rd) << 32 | (uint32_t)c->x[u->rd]);
    set_pair(c, u->rm, (uint32_t)expected, expected >> 32);
    return true;
}
OP(casp64) {
    ATOMIC_BEGIN(uint128);
    uint64_t expected[2] = {c->x[u->rm], second(c, u->rm)};
    const uint64_t desired[2] = {c->x[u->rd], second(c, u->rd)};
    compare_swap_128(p, expected, desired);
    set_pair(c, u->rm, expected[0], expected[1]);
    return true;
}
