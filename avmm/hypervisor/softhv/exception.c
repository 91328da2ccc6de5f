/* Taking exceptions to EL1, returning from them, PSTATE; and exits to the host, which stands in for EL2. */
#include "engine.h"

enum { VECTOR_SYNC = 0x000, VECTOR_IRQ = 0x080, VECTOR_FIQ = 0x100 };
enum { VECTOR_SP0 = 0x000, VECTOR_SPX = 0x200, VECTOR_LOWER = 0x400 };
enum { SPSR_SSBS = 1 << 12, SPSR_IL = 1 << 20, SPSR_SS = 1 << 21, SPSR_PAN = 1 << 22 };
enum { SPSR_UAO = 1 << 23, SPSR_DIT = 1 << 24 };

/* ---- PSTATE ----------------------------------------------------------------------------------------------------- */

uint64_t pstate_get(const struct vcpu *c) {
    return c->nzcv | (c->dit ? SPSR_DIT : 0) | (c->uao ? SPSR_UAO : 0) | (c->pan ? SPSR_PAN : 0) |
           (c->ss ? SPSR_SS : 0) | (c->il ? SPSR_IL : 0) | (c->ssbs ? SPSR_SSBS : 0) | c->daif |
           (uint64_t)c->el << 2 | c->spsel;
}

bool pstate_legal(uint64_t spsr) {
    unsigned mode = spsr & 0x1f;
    return mode == 0 || mode == 4 || mode == 5; /* EL0t, EL1t, EL1h */
}

void update_fp_trap(struct vcpu *c) {
    unsigned fpen = c->sys.cpacr >> 20 & 3;
    c->fp_trap = !(fpen & 1) || (fpen == 1 && c->el == 0);
}

/* Are debug exceptions enabled at this EL, for software step (D2.4)? Those of a kernel's own only where it says so. */
static bool step_enabled(const struct vcpu *c) {
    return c->step_armed && (c->el == 0 || (c->sys.mdscr & MDSCR_KDE && !(c->daif & DAIF_D)));
}

void step_changed(struct vcpu *c) {
    c->step_armed = c->sys.mdscr & MDSCR_SS && !c->sys.oslock && !(c->sys.osdlr & 1);
    pstate_changed(c);
}

void pstate_changed(struct vcpu *c) {
    c->mmu_idx = c->el == 0 ? MMU_EL0 : c->pan ? MMU_EL1_PAN : MMU_EL1;
    c->bank = c->tlb[c->mmu_idx];
    update_fp_trap(c);
    c->stepping = unlikely(c->step_armed) && step_enabled(c);
    if (c->il || c->stepping || (c->irq_line && !(c->daif & DAIF_I)) || (c->fiq_line && !(c->daif & DAIF_F)))
        force_poll(c);
}

/* spsel is 0 whenever el is. */
static uint64_t *sp_bank(struct vcpu *c) { return c->spsel ? &c->sys.sp_el1 : &c->sys.sp_el0; }

static void set_mode(struct vcpu *c, unsigned el, unsigned spsel) {
    *sp_bank(c) = c->x[R_SP];
    c->el = (uint8_t)el;
    jump_see(c);
    c->spsel = (uint8_t)spsel;
    c->x[R_SP] = *sp_bank(c);
}

void pstate_select_sp(struct vcpu *c, unsigned spsel) { set_mode(c, c->el, spsel); }

static void set_flags(struct vcpu *c, uint64_t spsr) {
    c->nzcv = (uint32_t)spsr & 0xf0000000;
    c->daif = (uint32_t)spsr & DAIF_ALL;
    c->pan = !!(spsr & SPSR_PAN);
    c->uao = !!(spsr & SPSR_UAO);
    c->ssbs = !!(spsr & SPSR_SSBS);
    c->dit = !!(spsr & SPSR_DIT);
}

void pstate_set(struct vcpu *c, uint64_t spsr) {
    set_mode(c, spsr >> 2 & 3, spsr & 1);
    set_flags(c, spsr);
    c->ss = !!(spsr & SPSR_SS);
    c->il = !!(spsr & SPSR_IL);
    pstate_changed(c);
}

/* ---- To EL1 ----------------------------------------------------------------------------------------------------- */

static void take(struct vcpu *c, uint64_t return_address, unsigned vector) {
    unsigned from = c->el == 0 ? VECTOR_LOWER : c->spsel ? VECTOR_SPX : VECTOR_SP0;
    c->sys.spsr = pstate_get(c);
    c->sys.elr = return_address;
    set_mode(c, 1, 1);
    c->daif = DAIF_ALL;
    c->il = c->uao = c->ss = 0;
    c->step_iss = 0;
    c->ssbs = !!(c->sys.sctlr & SCTLR_DSSBS);
    if (!(c->sys.sctlr & SCTLR_SPAN))
        c->pan = 1;
    pstate_changed(c);
    c->pc = c->sys.vbar + from + vector;
    counter_add(&c->counters.exceptions, 1);
    c->budget--; /* or a vector that faults at once would never look at the time */
}

static bool take_sync(struct vcpu *c, uint64_t return_address, unsigned ec, uint32_t iss) {
    c->sys.esr = syndrome(ec, iss);
    take(c, return_address, VECTOR_SYNC);
    return false;
}

void exc_interrupt(struct vcpu *c, bool fiq) {
    counter_add(&c->counters.interrupts, 1);
    take(c, c->pc, fiq ? VECTOR_FIQ : VECTOR_IRQ);
}

/* Of an instruction: it and the rest of its block are not retired. */
static bool take_from(struct vcpu *c, const struct uop *u, unsigned ec, uint32_t iss) {
    c->budget += u->left + 1;
    return take_sync(c, pc_of(c, u), ec, iss);
}

bool exc_undef(struct vcpu *c, const struct uop *u) { return take_from(c, u, EC_UNKNOWN, 0); }

bool exc_unimplemented(struct vcpu *c, const struct uop *u) {
    counter_add(&c->counters.undefined, 1);
    __atomic_store_n(&c->counters.undefined_insn, u->insn, __ATOMIC_RELAXED);
    return exc_undef(c, u);
}

bool exc_sysreg_trap(struct vcpu *c, const struct uop *u, uint32_t iss) {
    return take_from(c, u, EC_SYSREG, iss);
}

bool exc_fp_access(struct vcpu *c, const struct uop *u) {
    return take_from(c, u, EC_FP, 1u << 24 | 0xe << 20); /* CV, COND as for A64 */
}

bool exc_wfx(struct vcpu *c, const struct uop *u, bool wfe) {
    return take_from(c, u, EC_WFX, 1u << 24 | 0xe << 20 | wfe);
}

bool exc_svc(struct vcpu *c, const struct uop *u, uint16_t imm) {
    c->ss = 0; /* it was one step */
    return take_sync(c, pc_of(c, u) + 4, EC_SVC, imm);
}

bool exc_brk(struct vcpu *c, const struct uop *u, uint16_t imm) { return take_from(c, u, EC_BRK, imm); }

bool exc_illegal_state(struct vcpu *c) { return take_sync(c, c->pc, EC_ILLEGAL, 0); }

bool exc_step(struct vcpu *c) {
    return take_sync(c, c->pc, c->el ? EC_STEP : EC_STEP_LOWER, c->step_iss | STEP_IFSC);
}

bool exc_pc_alignment(struct vcpu *c, uint64_t pc) {
    c->sys.far = pc;
    return take_sync(c, pc, EC_PC, 0);
}

bool exc_sp_alignment(struct vcpu *c, const struct uop *u) { return take_from(c, u, EC_SP, 0); }

bool exc_data_abort(struct vcpu *c, const struct uop *u, uint64_t va, uint32_t dfsc, bool write, bool cm) {
    c->sys.far = va;
    return take_from(c, u, c->el ? EC_DABT : EC_DABT_LOWER, dfsc | (uint32_t)write << 6 | (uint32_t)cm << 8);
}

bool exc_prefetch_abort(struct vcpu *c, uint64_t va, uint32_t ifsc) {
    c->sys.far = va;
    return take_sync(c, va, c->el ? EC_IABT : EC_IABT_LOWER, ifsc);
}

bool exc_eret(struct vcpu *c) {
    uint64_t spsr = c->sys.spsr;
    bool steps = c->step_armed && !step_enabled(c) && spsr & SPSR_SS; /* D2.12.4: never while this EL is stepped itself */
    c->step_iss = 0;
    c->pc = c->sys.elr;
    c->monitor.pa = ~UINT64_C(0);
    c->event = true;
    if (pstate_legal(spsr)) {
        pstate_set(c, spsr);
    } else { /* D1.4.4: EL and SP stay, PSTATE.IL makes the next instruction trap */
        set_flags(c, spsr);
        c->il = 1;
        pstate_changed(c);
    }
    c->ss = steps && c->stepping;
    return false;
}

/* ---- To the host ------------------------------------------------------------------------------------------------ */

bool exit_exception(struct vcpu *c, uint64_t pc, uint64_t esr, uint64_t va, uint64_t ipa) {
    c->pc = pc;
    c->exit = (hv_vcpu_exit_t){.reason = HV_EXIT_REASON_EXCEPTION,
                               .exception = {.syndrome = esr, .virtual_address = va, .physical_address = ipa}};
    c->exiting = true;
    force_poll(c);
    return false;
}
