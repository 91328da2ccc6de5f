/* System instructions: exceptions, hints, barriers, MSR and MRS, caches, TLBs, address translation. */
#define _GNU_SOURCE
#include "engine.h"

#include <sched.h>

static uint32_t encoding(uint32_t insn) { /* op0 is 2 or 3 for MSR and MRS, 1 for SYS */
    return SYSREG(bits(insn, 19, 2), bits(insn, 16, 3), bits(insn, 12, 4), bits(insn, 8, 4), bits(insn, 5, 3));
}

/* ---- Forms ------------------------------------------------------------------------------------------------------ */

bool form_imm16(struct uop *u, uint32_t insn) {
    u->imm = bits(insn, 5, 16);
    return true;
}

bool form_mrs(struct uop *u, uint32_t insn) {
    u->rd = reg_dst(insn, 0);
    u->aux = encoding(insn);
    return true;
}

bool form_msr(struct uop *u, uint32_t insn) {
    u->rn = reg_zr(insn, 0);
    u->aux = encoding(insn);
    return true;
}

bool form_msr_imm(struct uop *u, uint32_t insn) {
    u->imm = bits(insn, 8, 4);
    return true;
}

bool form_daif_imm(struct uop *u, uint32_t insn) {
    u->imm = (uint64_t)bits(insn, 8, 4) << 6;
    return true;
}

/* ---- Exception generating --------------------------------------------------------------------------------------- */

OP(svc) { return exc_svc(c, u, (uint16_t)u->imm); }
OP(brk) { return exc_brk(c, u, (uint16_t)u->imm); }

OP(hvc) {
    if (c->el == 0)
        return exc_undef(c, u);
    return exit_exception(c, pc_of(c, u) + 4, syndrome(EC_HVC, (uint32_t)u->imm), 0, 0);
}

OP(smc) {
    if (c->el == 0)
        return exc_undef(c, u);
    return exit_exception(c, pc_of(c, u), syndrome(EC_SMC, (uint32_t)u->imm), 0, 0);
}

OP(eret) { return c->el ? exc_eret(c) : exc_undef(c, u); }

/* ---- Hints and barriers ----------------------------------------------------------------------------------------- */

OP(nop) {
    return true;
}

/* CRm 1:0 says which accesses: 1 loads against all, 2 stores against stores, else all (C6.2.92). */
bool form_barrier(struct uop *u, uint32_t insn) {
    u->imm = bits(insn, 8, 2);
    return true;
}

static inline void barrier(unsigned accesses) {
    if (accesses == 1)
        atomic_thread_fence(memory_order_acquire);
    else if (accesses == 2)
        atomic_thread_fence(memory_order_release);
    else
        atomic_thread_fence(memory_order_seq_cst);
}

OP(dmb) {
    (void)c;
    barrier((unsigned)u->imm);
    return true;
}

/* Also waits for what TLBI and IC have asked of other vCPUs (D7.5.9, D8.13.5). */
OP(dsb) {
    barrier((unsigned)u->imm);
    if (unlikely(c->posted))
        mail_sync(c);
    return true;
}

/* A spinning loop: whoever waits for a processor, or for a turn, may be what it waits for. */
OP(yield) {
    if (atomic_load_explicit(&c->poll, memory_order_relaxed) & POLL_TURN) {
        c->turn_start = 0;
        force_poll(c);
    } else if (atomic_load_explicit(&c->vm->vcpu_count, memory_order_relaxed) > 1 && !(c->yields++ % 64)) {
        sched_yield(); /* which may take long where the host is busy: not each time */
    } else {
        cpu_relax();
    }
    return true;
}

enum { TI_WFI = 0, TI_WFE = 1 };

static bool wait_for(struct vcpu *c, const struct uop *u, uint32_t ti, uint64_t el0_allowed) {
    if (c->el == 0 && !(c->sys.sctlr & el0_allowed))
        return exc_wfx(c, u, ti == TI_WFE);
    return exit_exception(c, pc_of(c, u), syndrome(EC_WFX, 1u << 24 | 0xe << 20 | ti), 0, 0);
}

OP(wfi) {
    if (unlikely(c->gic != NULL) && (c->el || c->sys.sctlr & SCTLR_NTWI)) {
        c->pc = pc_of(c, u) + 4;
        bool completes = gic_wait(c);
        if (!completes) {
            c->exit = (hv_vcpu_exit_t){.reason = HV_EXIT_REASON_CANCELED};
            c->exiting = true;
        }
        force_poll(c);
        return completes;
    }
    if (unlikely(c->vm->faults != NULL) && c->el) {
        enum fault_wfi how = fault_wfi(c, pc_of(c, u) + 4);
        if (how != WFI_EXITS) {
            force_poll(c);
            return how == WFI_COMPLETES;
        }
    }
    return wait_for(c, u, TI_WFI, SCTLR_NTWI);
}

OP(wfe) {
    if (c->event) {
        c->event = false;
        return true;
    }
    return wait_for(c, u, TI_WFE, SCTLR_NTWE);
}

OP(sevl) {
    c->event = true;
    return true;
}

OP(sev) {
    pthread_mutex_lock(&c->vm->lock);
    for (uint32_t i = 0; i < c->vm->vcpu_count; i++)
        atomic_store(&c->vm->vcpus[i]->event, true);
    pthread_mutex_unlock(&c->vm->lock);
    return true;
}

/* ---- MRS, MSR --------------------------------------------------------------------------------------------------- */

OP(mrs) {
    uint64_t value;
    if (!sysreg_mrs(c, u, u->aux, &value))
        return false;
    c->x[u->rd] = value;
    return true;
}

OP(msr) { return sysreg_msr(c, u, u->aux, c->x[u->rn]); }

OP(mrs_nzcv) {
    c->x[u->rd] = c->nzcv;
    return true;
}

OP(msr_nzcv) {
    c->nzcv = (uint32_t)c->x[u->rn] & 0xf0000000;
    return true;
}

OP(mrs_tpidr_el0) {
    c->x[u->rd] = c->sys.tpidr_el0;
    return true;
}

OP(mrs_sp_el0) { /* Linux's `current` */
    if (unlikely(!c->spsel))
        return exc_undef(c, u);
    c->x[u->rd] = c->sys.sp_el0;
    return true;
}

OP(mrs_tpidr_el1) {
    if (unlikely(c->el == 0))
        return exc_undef(c, u);
    c->x[u->rd] = c->sys.tpidr_el1;
    return true;
}

OP(mrs_daif) {
    if (unlikely(c->el == 0 && !(c->sys.sctlr & SCTLR_UMA)))
        return exc_sysreg_trap(c, u, sysreg_iss(u->insn));
    c->x[u->rd] = c->daif;
    return true;
}

static bool write_daif(struct vcpu *c, const struct uop *u, uint32_t daif) {
    if (unlikely(c->el == 0 && !(c->sys.sctlr & SCTLR_UMA)))
        return exc_sysreg_trap(c, u, sysreg_iss(u->insn));
    c->daif = daif;
    pstate_changed(c);
    return true;
}

OP(msr_daif) { return write_daif(c, u, (uint32_t)c->x[u->rn] & DAIF_ALL); }
OP(msr_daifset) { return write_daif(c, u, c->daif | (uint32_t)u->imm); }
OP(msr_daifclr) { return write_daif(c, u, c->daif & ~(uint32_t)u->imm); }

OP(msr_spsel) {
    if (c->el == 0)
        return exc_undef(c, u);
    pstate_select_sp(c, u->imm & 1);
    return true;
}

OP(msr_uao) {
    if (c->el == 0)
        return exc_undef(c, u);
    c->uao = u->imm & 1;
    return true;
}

OP(msr_ssbs) {
    c->ssbs = u->imm & 1;
    return true;
}

/* Timing that does not depend on data is not promised by any host this runs on; nor can a guest's clock see ours. */
OP(msr_dit) {
    c->dit = u->imm & 1;
    return true;
}

OP(msr_pan) {
    if (c->el == 0)
        return exc_undef(c, u);
    c->pan = u->imm & 1;
    pstate_changed(c);
    return true;
}

/* ---- Caches (C5.3, D7.5.8) -------------------------------------------------------------------------------------- */

/* EL0 may only when SCTLR_EL1 says so. */
static bool el0_denied(struct vcpu *c, const struct uop *u, uint64_t allowed) {
    if (likely(c->el || c->sys.sctlr & allowed))
        return false;
    exc_sysreg_trap(c, u, sysreg_iss(u->insn));
    return true;
}

OP(dc_zva) {
    static const uint8_t zeros[ZVA_SIZE];
    if (el0_denied(c, u, SCTLR_DZE))
        return false;
    void *line = mem_ptr(c, u, c->x[u->rn] & ~(uint64_t)(ZVA_SIZE - 1), ZVA_SIZE, c->mmu_idx, true, NULL);
    if (!line)
        return false;
    guest_copy(line, zeros, ZVA_SIZE);
    return true;
}

/* Clean, or clean and invalidate, by address: memory is coherent, only faults are left to do. */
OP(dc_va) {
    uint64_t pa;
    return !el0_denied(c, u, SCTLR_UCI) && mmu_cache_op(c, u, c->x[u->rn], false, &pa);
}

OP(dc_ivac) {
    uint64_t pa;
    return c->el ? mmu_cache_op(c, u, c->x[u->rn], true, &pa) : exc_undef(c, u);
}

OP(dc_sw) { return c->el || exc_undef(c, u); } /* by set and way */

OP(ic_all) {
    if (c->el == 0)
        return exc_undef(c, u);
    code_invalidate(c, 0, UINT64_MAX);
    mail_code(c->vm, c, 0, UINT64_MAX); /* the local form is rare, and treated alike */
    c->posted = true;
    return true;
}

OP(ic_ivau) {
    uint64_t pa;
    if (el0_denied(c, u, SCTLR_UCI) || !mmu_cache_op(c, u, c->x[u->rn], false, &pa))
        return false;
    code_invalidate(c, pa, 1);
    mail_code(c->vm, c, pa, 1);
    c->posted = true;
    return true;
}

/* ---- TLBs (D8.13) ----------------------------------------------------------------------------------------------- */

enum { VMALLE1 = 0, VAE1 = 1, ASIDE1 = 2, VAAE1 = 3, VALE1 = 5, VAALE1 = 7 };

void tlbi(struct vcpu *c, unsigned op, uint64_t argument) {
    uint64_t asid = mmu_asid_in(c, argument), va = (uint64_t)((int64_t)(argument << 20) >> 8);
    if (op == VMALLE1)
        tlb_flush_all(c);
    else if (op == ASIDE1)
        tlb_flush_asid(c, asid);
    else
        tlb_flush_va(c, va, op == VAAE1 || op == VAALE1 ? ANY_ASID : asid);
}

/* The others hear of the broadcast before this vCPU's next DSB has completed (D8.13.5). */
OP(tlbi) {
    if (c->el == 0)
        return exc_undef(c, u);
    unsigned op = u->aux & 7;
    bool broadcast = (u->aux >> 3 & 15) == 3; /* CRm: Inner Shareable */
    uint64_t argument = c->x[u->rn];
    if (broadcast)
        mail_tlbi(c, op, argument);
    tlbi(c, op, argument);
    return true;
}

/* ---- Address translation (D8.2.11): the answer goes into PAR_EL1 ------------------------------------------------ */

OP(at_s1) {
    if (c->el == 0)
        return exc_undef(c, u);
    unsigned op = u->aux & 7; /* 0: E1R, 1: E1W, 2: E0R, 3: E0W */
    bool with_pan = (u->aux >> 3 & 15) == 9 && c->pan;
    enum access access = op & 1 ? ACCESS_WRITE : ACCESS_READ;
    struct translation t = mmu_translate(c, c->x[u->rn], access, op & 2 ? MMU_EL0 : with_pan ? MMU_EL1_PAN : MMU_EL1);
    if (t.fault != NO_FAULT)
        c->sys.par = 1 << 11 | t.fault << 1 | 1;
    else
        c->sys.par = (uint64_t)t.attr << 56 | (t.pa & UINT64_C(0xfffffffff000)) | 1 << 11 | (uint64_t)t.sh << 7;
    return true;
}
