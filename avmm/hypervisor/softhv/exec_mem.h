/* What the loads and stores of general registers, vectors and atomics have in common. */
#ifndef SOFTHV_EXEC_MEM_H
#define SOFTHV_EXEC_MEM_H

#include "engine.h"

enum { DFSC_ALIGNMENT = 0x21 };

/* Fill rn and, when it is SP, the bits of SP that must be clear (aux; 0 for other registers). */
static inline void form_base(struct uop *u, uint32_t i) {
    u->rn = reg_sp(i, 5);
    u->aux = u->rn == R_SP ? 15 : 0;
}

/* SCTLR_EL1.SA, SA0: is the alignment of SP checked at this EL? */
static inline bool sp_checked(const struct vcpu *c) { return c->sys.sctlr >> (c->el ? 3 : 4) & 1; }

/* Declares `base`; for registers other than SP the alignment check is one test that never hits. */
#define LOAD_BASE                                                                                                      \
    uint64_t base = c->x[u->rn];                                                                                       \
    if (unlikely(base & u->aux) && sp_checked(c))                                                                      \
    return exc_sp_alignment(c, u)

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
 * Accesses of several elements, at `va` with none left out, `total` bytes of `size` each. One check when all of them are
 * in one page of RAM, else element by element, so that each has the alignment and the syndrome of its own.
 */
bool span_read_slow(struct vcpu *c, const struct uop *u, uint64_t va, unsigned size, unsigned total, void *out);
bool span_write_slow(struct vcpu *c, const struct uop *u, uint64_t va, unsigned size, unsigned total, const void *in);

static inline bool span_read(struct vcpu *c, const struct uop *u, uint64_t va, unsigned size, unsigned total, void *out) {
    unsigned idx = c->mmu_idx;
    MEM_FAST(read, va, total) {
        memcpy(out, (const void *)(uintptr_t)(va + e->addend), total);
        return true;
    }
    return span_read_slow(c, u, va, size, total, out);
}
static inline bool span_write(struct vcpu *c, const struct uop *u, uint64_t va, unsigned size, unsigned total,
                              const void *in) {
    unsigned idx = c->mmu_idx;
    MEM_FAST(write, va, total) {
        memcpy((void *)(uintptr_t)(va + e->addend), in, total);
        return true;
    }
    return span_write_slow(c, u, va, size, total, in);
}

#endif
