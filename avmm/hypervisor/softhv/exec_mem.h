/* What the loads and stores of general registers, vectors and atomics have in common. */
#ifndef SOFTHV_EXEC_MEM_H
#define SOFTHV_EXEC_MEM_H

#include "engine.h"

#define INLINE static inline __attribute__((always_inline))

enum { DFSC_ALIGNMENT = 0x21 };

/* Fill rn and, when it is SP, the bits of SP that must be clear (aux; 0 for other registers). */
static inline void form_base(struct uop *u, uint32_t i) {
    u->rn = reg_sp(i, 5);
    u->aux = u->rn == R_SP ? 15 : 0;
}

/* SCTLR_EL1.SA, SA0: is the alignment of SP checked at this EL? */
static inline bool sp_checked(const struct vcpu *c) { return c->sys.sctlr >> (c->el ? 3 : 4) & 1; }

/*
 * The ops of loads and stores: OP() twice from one body, whose `fast` is a constant. The threaded entry runs it with
 * fast = true: it does all of the instruction without a call (and so without a stack frame), or nothing and returns
 * false; the copy with fast = false then does it from the start. Only `fast` ones may return false without an
 * exception or an exit.
 */
#define OP_MEM(name)                                                                                                   \
    INLINE bool mem_##name(struct vcpu *c, const struct uop *u, const bool fast);  \
    const struct uop *t_##name(struct vcpu *c, const struct uop *u);                                                   \
    bool p_##name(struct vcpu *c, const struct uop *u);                                                                \
    static __attribute__((noinline, cold)) const struct uop *slow_##name(struct vcpu *c, const struct uop *u) {        \
        if (likely(mem_##name(c, u, false)))                                                                           \
            return u[1].fn(c, u + 1);                                                                                  \
        return LEAVE_BLOCK(c);                                                                                         \
    }                                                                                                                  \
    const struct uop *t_##name(struct vcpu *c, const struct uop *u) {                                                  \
        if (likely(mem_##name(c, u, true)))                                                                            \
            return u[1].fn(c, u + 1);                                                                                  \
        return slow_##name(c, u);                                                                                      \
    }                                                                                                                  \
    bool p_##name(struct vcpu *c, const struct uop *u) { return mem_##name(c, u, false); }                             \
    INLINE bool mem_##name(struct vcpu *c, const struct uop *u, const bool fast)
/* In OP_MEM bodies of SIMD and floating point, first. */
#define CHECK_FP                                                                                                       \
    if (unlikely(c->fp_trap))                                                                                          \
    return fast ? false : exc_fp_access(c, u)

/* Declares `base`; for registers other than SP the alignment check is one test that never hits. */
#define LOAD_BASE                                                                                                      \
    uint64_t base = c->x[u->rn];                                                                                       \
    if (unlikely(base & u->aux) && (fast || sp_checked(c)))                                                            \
    return fast ? false : exc_sp_alignment(c, u)

/* mem_read() and mem_write() of engine.h for OP_MEM bodies. */
INLINE bool read_at(struct vcpu *c, const struct uop *u, uint64_t va, unsigned size,
                                                          unsigned idx, void *out, const bool fast) {
    MEM_FAST(read, va, size) {
        guest_copy(out, (const void *)(uintptr_t)(va + e->addend), size);
        return true;
    }
    return fast ? false : mem_read_slow(c, u, va, size, idx, out);
}
INLINE bool write_at(struct vcpu *c, const struct uop *u, uint64_t va, unsigned size,
                                                           unsigned idx, const void *in, const bool fast) {
    MEM_FAST(write, va, size) {
        guest_copy((void *)(uintptr_t)(va + e->addend), in, size);
        return true;
    }
    return fast ? false : mem_write_slow(c, u, va, size, idx, in);
}

/* Addressing modes: the access's address, from `base`. */
#define AT_BASE base
#define AT_IMM (base + u->imm)
#define AT_LSL (base + (c->x[u->rm] << u->imm))
#define AT_UXTW (base + ((uint64_t)(uint32_t)c->x[u->rm] << u->imm))
#define AT_SXTW (base + ((uint64_t)(int64_t)(int32_t)c->x[u->rm] << u->imm))

/* What becomes of the base register once nothing can fault any more. */
#define KEEP (void)0
#define WRITEBACK c->x[u->rn] = base + u->imm

/*
 * Accesses of several elements, at `va` with none left out: `total` bytes, `size` each. One check when all of them are
 * in one page of RAM, else element by element, so that each has the alignment and the syndrome of its own.
 */
bool span_read_slow(struct vcpu *c, const struct uop *u, uint64_t va, unsigned size, unsigned total, void *out);
bool span_write_slow(struct vcpu *c, const struct uop *u, uint64_t va, unsigned size, unsigned total, const void *in);

INLINE bool span_read(struct vcpu *c, const struct uop *u, uint64_t va, unsigned size,
                                                            unsigned total, void *out, const bool fast) {
    unsigned idx = c->mmu_idx;
    MEM_FAST(read, va, total) {
        guest_copy(out, (const void *)(uintptr_t)(va + e->addend), total);
        return true;
    }
    return fast ? false : span_read_slow(c, u, va, size, total, out);
}
INLINE bool span_write(struct vcpu *c, const struct uop *u, uint64_t va, unsigned size,
                                                             unsigned total, const void *in, const bool fast) {
    unsigned idx = c->mmu_idx;
    MEM_FAST(write, va, total) {
        guest_copy((void *)(uintptr_t)(va + e->addend), in, total);
        return true;
    }
    return fast ? false : span_write_slow(c, u, va, size, total, in);
}

#endif
