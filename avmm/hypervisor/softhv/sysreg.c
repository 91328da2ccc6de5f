/* System registers: what the guest may reach at its exception level, what they hold, and what writing them does. */
#include "engine.h"

enum {
    MDCCINT = SYSREG(2, 0, 0, 2, 0), MDSCR = SYSREG(2, 0, 0, 2, 2), OSDTRRX = SYSREG(2, 0, 0, 0, 2),
    OSDTRTX = SYSREG(2, 0, 0, 3, 2), OSECCR = SYSREG(2, 0, 0, 6, 2), MDRAR = SYSREG(2, 0, 1, 0, 0),
    OSLAR = SYSREG(2, 0, 1, 0, 4), OSLSR = SYSREG(2, 0, 1, 1, 4), OSDLR = SYSREG(2, 0, 1, 3, 4),
    DBGPRCR = SYSREG(2, 0, 1, 4, 4), DBGCLAIMSET = SYSREG(2, 0, 7, 8, 6), DBGCLAIMCLR = SYSREG(2, 0, 7, 9, 6),
    DBGAUTHSTATUS = SYSREG(2, 0, 7, 14, 6), MDCCSR_EL0 = SYSREG(2, 3, 0, 1, 0), DBGDTR_EL0 = SYSREG(2, 3, 0, 4, 0),
    DBGDTRX_EL0 = SYSREG(2, 3, 0, 5, 0),

    MIDR = SYSREG(3, 0, 0, 0, 0), MPIDR = SYSREG(3, 0, 0, 0, 5), REVIDR = SYSREG(3, 0, 0, 0, 6),
    SCTLR = SYSREG(3, 0, 1, 0, 0), ACTLR = SYSREG(3, 0, 1, 0, 1), CPACR = SYSREG(3, 0, 1, 0, 2),
    TTBR0 = SYSREG(3, 0, 2, 0, 0), TTBR1 = SYSREG(3, 0, 2, 0, 1), TCR = SYSREG(3, 0, 2, 0, 2),
    SPSR = SYSREG(3, 0, 4, 0, 0), ELR = SYSREG(3, 0, 4, 0, 1), SP_EL0 = SYSREG(3, 0, 4, 1, 0),
    SPSEL = SYSREG(3, 0, 4, 2, 0), CURRENTEL = SYSREG(3, 0, 4, 2, 2), PAN = SYSREG(3, 0, 4, 2, 3),
    UAO = SYSREG(3, 0, 4, 2, 4), ICC_PMR = SYSREG(3, 0, 4, 6, 0), AFSR0 = SYSREG(3, 0, 5, 1, 0),
    AFSR1 = SYSREG(3, 0, 5, 1, 1),
    ESR = SYSREG(3, 0, 5, 2, 0), FAR = SYSREG(3, 0, 6, 0, 0), PAR = SYSREG(3, 0, 7, 4, 0),
    MAIR = SYSREG(3, 0, 10, 2, 0), AMAIR = SYSREG(3, 0, 10, 3, 0), VBAR = SYSREG(3, 0, 12, 0, 0),
    RVBAR = SYSREG(3, 0, 12, 0, 1), ISR = SYSREG(3, 0, 12, 1, 0), CONTEXTIDR = SYSREG(3, 0, 13, 0, 1),
    TPIDR_EL1 = SYSREG(3, 0, 13, 0, 4), SCXTNUM_EL1 = SYSREG(3, 0, 13, 0, 7), CNTKCTL = SYSREG(3, 0, 14, 1, 0),
    CCSIDR = SYSREG(3, 1, 0, 0, 0), CLIDR = SYSREG(3, 1, 0, 0, 1), AIDR = SYSREG(3, 1, 0, 0, 7),
    CSSELR = SYSREG(3, 2, 0, 0, 0), CTR_EL0 = SYSREG(3, 3, 0, 0, 1), DCZID_EL0 = SYSREG(3, 3, 0, 0, 7),
    DIT = SYSREG(3, 3, 4, 2, 5), SSBS = SYSREG(3, 3, 4, 2, 6),
    NZCV = SYSREG(3, 3, 4, 2, 0), DAIF = SYSREG(3, 3, 4, 2, 1), FPCR = SYSREG(3, 3, 4, 4, 0),
    FPSR = SYSREG(3, 3, 4, 4, 1), TPIDR_EL0 = SYSREG(3, 3, 13, 0, 2), TPIDRRO_EL0 = SYSREG(3, 3, 13, 0, 3),
    SCXTNUM_EL0 = SYSREG(3, 3, 13, 0, 7), CNTFRQ = SYSREG(3, 3, 14, 0, 0), CNTPCT = SYSREG(3, 3, 14, 0, 1),
    CNTVCT = SYSREG(3, 3, 14, 0, 2), CNTP_TVAL = SYSREG(3, 3, 14, 2, 0), CNTP_CTL = SYSREG(3, 3, 14, 2, 1),
    CNTP_CVAL = SYSREG(3, 3, 14, 2, 2), CNTV_TVAL = SYSREG(3, 3, 14, 3, 0), CNTV_CTL = SYSREG(3, 3, 14, 3, 1),
    CNTV_CVAL = SYSREG(3, 3, 14, 3, 2), SP_EL1 = SYSREG(3, 4, 4, 1, 0)
};
enum { ID_FIRST = SYSREG(3, 0, 0, 1, 0), ID_LAST = SYSREG(3, 0, 0, 7, 7) };
enum { CNTKCTL_PCT = 1 << 0, CNTKCTL_VCT = 1 << 1, CNTKCTL_VT = 1 << 8, CNTKCTL_PT = 1 << 9 };
enum { CNT_FREQUENCY = 24000000 };

/* ---- What this CPU is (D17.2): exactly what the engine implements ----------------------------------------------- */

static const uint64_t software_midr = 0x000f0510; /* implementer 0: reserved for software */
static const uint64_t ctr = 0x9444c004;  /* 64-byte lines, PIPT, IDC: code needs IC IVAU but no DC CVAU */
static const uint64_t dczid = 4;         /* 64 bytes */
static const uint64_t clidr = 0x02000023; /* L1 I+D, L2 unified; LoC 2; LoUU and LoUIS 0, as IDC says */

static const uint64_t aa64pfr0 = UINT64_C(1) << 60 /* CSV3 */ | UINT64_C(3) << 56 /* CSV2_3 */ |
                                 UINT64_C(1) << 48 /* DIT */ | 1 << 24 /* GIC */ | 1 << 4 | 1; /* EL1, EL0: AArch64 only; FP and AdvSIMD: 0, implemented */
static const uint64_t aa64pfr1 = 2 << 4; /* SSBS, with MRS and MSR */
static const uint64_t aa64dfr0 = UINT64_C(1) << 28 /* CTX_CMPs */ | 1 << 20 /* WRPs */ | 1 << 12 /* BRPs */ | 6;
static const uint64_t aa64isar0 = UINT64_C(1) << 52 /* FlagM */ | UINT64_C(1) << 44 /* DotProd */ | 1 << 28 /* RDM */ |
                                  2 << 20 /* LSE */ | 1 << 16 /* CRC32 */ | 1 << 12 /* SHA256 */ | 1 << 8 /* SHA1 */ |
                                  2 << 4 /* AES, PMULL */;
static const uint64_t aa64isar1 = UINT64_C(1) << 36 /* SB */ | 1 << 20 /* LRCPC */ | 2 /* DPB2 */;
static const uint64_t aa64mmfr0 = 1 << 20 /* 16 KiB granule; 4 and 64 KiB: 0 */ | 2 << 4 /* 16-bit ASIDs */ |
                                  2 /* 40-bit addresses */;
static const uint64_t aa64mmfr1 = 2 << 20 /* PAN2 */;
static const uint64_t aa64mmfr2 = UINT64_C(1) << 60 /* E0PD */ | 1 << 4 /* UAO */ | 1 /* CnP */;

enum { /* in sysregs.id[] */
    ID_PFR0 = 4 << 3, ID_PFR1, ID_DFR0 = 5 << 3, ID_ISAR0 = 6 << 3, ID_ISAR1, ID_MMFR0 = 7 << 3, ID_MMFR1, ID_MMFR2
};

bool sysreg_feature(hv_feature_reg_t reg, uint64_t *value) {
    const uint64_t values[] = {aa64dfr0, 0, aa64isar0, aa64isar1, aa64mmfr0, aa64mmfr1, aa64mmfr2, aa64pfr0, aa64pfr1,
                               ctr,      clidr, dczid, 0, 0}; /* in hv_feature_reg_t's order */
    if (reg >= sizeof values / sizeof *values)
        return false;
    *value = values[reg];
    return true;
}

static uint64_t ccsidr(uint64_t csselr) { /* D17.2.26: sets - 1, ways - 1, log2(line / 16) */
    switch (csselr & 0xf) {
    case 0: /* L1 data */
    case 1: /* L1 instruction */
        return 127 << 13 | 3 << 3 | 2; /* 32 KiB, 4 ways */
    case 2: /* L2 */
        return 1023 << 13 | 15 << 3 | 2; /* 1 MiB, 16 ways */
    default:
        return 0;
    }
}

void sysreg_reset(struct vcpu *c) {
    struct sysregs *s = &c->sys;
    memset(s, 0, sizeof *s);
    s->sctlr = 0x30d00800; /* RES1 */
    s->midr = software_midr;
    s->mpidr = UINT64_C(1) << 31;
    s->id[ID_PFR0] = aa64pfr0;
    s->id[ID_PFR1] = aa64pfr1;
    s->id[ID_DFR0] = aa64dfr0;
    s->id[ID_ISAR0] = aa64isar0;
    s->id[ID_ISAR1] = aa64isar1;
    s->id[ID_MMFR0] = aa64mmfr0;
    s->id[ID_MMFR1] = aa64mmfr1;
    s->id[ID_MMFR2] = aa64mmfr2;
}

/* ---- State ------------------------------------------------------------------------------------------------------ */

/* Registers that are read and written as they are. */
static uint64_t *plain(struct vcpu *c, uint32_t reg) {
    struct sysregs *s = &c->sys;
    if ((reg & ~SYSREG(0, 0, 0, 15, 7)) == SYSREG(2, 0, 0, 0, 0)) {
        unsigned n = reg >> 3 & 15;
        switch (reg & 7) {
        case 4: return &s->dbgbvr[n];
        case 5: return &s->dbgbcr[n];
        case 6: return &s->dbgwvr[n];
        case 7: return &s->dbgwcr[n];
        }
    }
    switch (reg) {
    case MDCCINT: return &s->mdccint;
    case MDSCR: return &s->mdscr;
    case OSDTRRX: return &s->osdtrrx;
    case OSDTRTX: return &s->osdtrtx;
    case OSECCR: return &s->oseccr;
    case OSDLR: return &s->osdlr;
    case DBGPRCR: return &s->dbgprcr;
    case ACTLR: return &s->actlr;
    case SPSR: return &s->spsr;
    case ELR: return &s->elr;
    case AFSR0: return &s->afsr0;
    case AFSR1: return &s->afsr1;
    case ESR: return &s->esr;
    case FAR: return &s->far;
    case PAR: return &s->par;
    case AMAIR: return &s->amair;
    case CONTEXTIDR: return &s->contextidr;
    case TPIDR_EL1: return &s->tpidr_el1;
    case TPIDR_EL0: return &s->tpidr_el0;
    case TPIDRRO_EL0: return &s->tpidrro_el0;
    case SCXTNUM_EL0: return &s->scxtnum_el0;
    case SCXTNUM_EL1: return &s->scxtnum_el1;
    case CNTKCTL: return &s->cntkctl;
    case CSSELR: return &s->csselr;
    case CNTP_CVAL: return &s->cntp_cval;
    }
    return NULL;
}

static uint64_t timer_ctl(uint64_t ctl, bool reached) { return ctl | (ctl & 1 && reached ? 4 : 0); /* ISTATUS */ }

static bool read_reg(struct vcpu *c, uint32_t reg, uint64_t *value) {
    const struct sysregs *s = &c->sys;
    const uint64_t *state = plain(c, reg);
    if (state) {
        *value = *state;
        return true;
    }
    if (reg >= ID_FIRST && reg <= ID_LAST) {
        *value = s->id[reg & 0x3f];
        return true;
    }
    switch (reg) {
    case SCTLR: *value = s->sctlr; break;
    case CPACR: *value = s->cpacr; break;
    case TTBR0: *value = s->ttbr0; break;
    case TTBR1: *value = s->ttbr1; break;
    case TCR: *value = s->tcr; break;
    case MAIR: *value = s->mair; break;
    case VBAR: *value = s->vbar; break;
    case MIDR: *value = s->midr; break;
    case MPIDR: *value = s->mpidr; break;
    case SP_EL0: *value = c->spsel ? s->sp_el0 : c->x[R_SP]; break;
    case SPSEL: *value = c->spsel; break;
    case CURRENTEL: *value = (uint64_t)c->el << 2; break;
    case PAN: *value = (uint64_t)c->pan << 22; break;
    case UAO: *value = (uint64_t)c->uao << 23; break;
    case DIT: *value = (uint64_t)c->dit << 24; break;
    case SSBS: *value = (uint64_t)c->ssbs << 12; break;
    case NZCV: *value = c->nzcv; break;
    case DAIF: *value = c->daif; break;
    case FPCR: *value = c->fpcr; break;
    case FPSR: *value = c->fpsr; break;
    case ISR: *value = (c->irq_line ? 1 << 7 : 0) | (c->fiq_line ? 1 << 6 : 0); break;
    case CCSIDR: *value = ccsidr(s->csselr); break;
    case CLIDR: *value = clidr; break;
    case CTR_EL0: *value = ctr; break;
    case DCZID_EL0: *value = dczid | (c->el == 0 && !(s->sctlr & SCTLR_DZE) ? 1 << 4 : 0); break; /* DZP */
    case CNTFRQ: *value = c->fast_counter ? 1000000000 : CNT_FREQUENCY; break;
    case CNTPCT: *value = softhv_absolute_time(); break;
    case CNTVCT: *value = guest_counter(c); break;
    case CNTP_TVAL: *value = (uint32_t)(s->cntp_cval - softhv_absolute_time()); break;
    case CNTP_CTL: *value = timer_ctl(s->cntp_ctl, softhv_absolute_time() >= s->cntp_cval); break;
    case CNTV_TVAL: *value = (uint32_t)(s->cntv_cval - guest_counter(c)); break;
    case CNTV_CTL: *value = timer_ctl(s->cntv_ctl, guest_counter(c) >= s->cntv_cval); break;
    case CNTV_CVAL: *value = s->cntv_cval; break;
    case OSLSR: *value = 1 << 3 | s->oslock << 1; break; /* OSLM: implemented */
    case DBGCLAIMSET: *value = 0xff; break;
    case DBGCLAIMCLR: *value = s->dbgclaim; break;
    case REVIDR:
    case AIDR:
    case RVBAR:
    case MDRAR:
    case DBGAUTHSTATUS:
    case MDCCSR_EL0:
    case DBGDTR_EL0:
    case DBGDTRX_EL0: *value = 0; break;
    default: return false;
    }
    return true;
}

/* A new translation table base: what of the TLB survives it. Bit 0 is CnP. */
static void write_ttbr(struct vcpu *c, uint64_t *ttbr, uint64_t value, unsigned half) {
    uint64_t asid = mmu_asid(c), changed = (*ttbr ^ value) & TTBR_BASE;
    *ttbr = value;
    if (changed)
        tlb_new_base(c, half);
    if (asid != mmu_asid(c))
        tlb_new_asid(c);
}

/* False: no such register to write. */
static bool write_reg(struct vcpu *c, uint32_t reg, uint64_t value) {
    struct sysregs *s = &c->sys;
    uint64_t *state = plain(c, reg);
    if (state) {
        *state = value;
        if (reg == MDSCR || reg == OSDLR)
            step_changed(c);
        return true;
    }
    switch (reg) {
    case SCTLR: {
        value = (value | 0x30400800) & ~(uint64_t)(SCTLR_EE | SCTLR_E0E); /* no big endian */
        uint64_t changed = s->sctlr ^ value;
        s->sctlr = value;
        if (changed & (SCTLR_M | SCTLR_A | SCTLR_WXN))
            tlb_flush_all(c);
        break;
    }
    case CPACR:
        s->cpacr = value & 0x10300000; /* TTA, FPEN */
        update_fp_trap(c);
        break;
    case TTBR0: write_ttbr(c, &s->ttbr0, value, 0); break;
    case TTBR1: write_ttbr(c, &s->ttbr1, value, 1); break;
    case TCR:
        if (s->tcr == value)
            break;
        tlb_flush_all(c);
        s->tcr = value;
        tlb_new_asid(c); /* by A1 and AS */
        break;
    case MAIR:
        if (s->mair != value)
            tlb_flush_all(c);
        s->mair = value;
        break;
    case VBAR: s->vbar = value & ~UINT64_C(0x7ff); break;
    case SP_EL0: *(c->spsel ? &s->sp_el0 : &c->x[R_SP]) = value; break;
    case SPSEL: pstate_select_sp(c, value & 1); break;
    case PAN:
        c->pan = value >> 22 & 1;
        pstate_changed(c);
        break;
    case UAO: c->uao = value >> 23 & 1; break;
    case DIT: c->dit = value >> 24 & 1; break;
    case SSBS: c->ssbs = value >> 12 & 1; break;
    case NZCV: c->nzcv = (uint32_t)value & 0xf0000000; break;
    case DAIF:
        c->daif = (uint32_t)value & DAIF_ALL;
        pstate_changed(c);
        break;
    case FPCR: c->fpcr = (uint32_t)value & FPCR_MASK; break;
    case FPSR: c->fpsr = (uint32_t)value & FPSR_MASK; break;
    case CNTP_TVAL: s->cntp_cval = softhv_absolute_time() + (uint64_t)(int32_t)value; break;
    case CNTP_CTL: s->cntp_ctl = value & 3; break;
    case CNTV_TVAL:
        s->cntv_cval = guest_counter(c) + (uint64_t)(int32_t)value;
        force_poll(c);
        break;
    case CNTV_CTL:
        s->cntv_ctl = value & 3;
        force_poll(c);
        break;
    case CNTV_CVAL:
        s->cntv_cval = value;
        force_poll(c);
        break;
    case OSLAR:
        s->oslock = value & 1;
        step_changed(c);
        break;
    case DBGCLAIMSET: s->dbgclaim |= value & 0xff; break;
    case DBGCLAIMCLR: s->dbgclaim &= ~value; break;
    case DBGDTR_EL0:
    case DBGDTRX_EL0: break;
    default: return false;
    }
    return true;
}

/* ---- The guest's side ------------------------------------------------------------------------------------------- */

uint32_t sysreg_iss(uint32_t insn) { /* D17.2.37, EC 0x18 */
    return bits(insn, 19, 2) << 20 | bits(insn, 5, 3) << 17 | bits(insn, 16, 3) << 14 | bits(insn, 12, 4) << 10 |
           bits(insn, 0, 5) << 5 | bits(insn, 8, 4) << 1 | bits(insn, 21, 1);
}

/* The GIC's CPU interface is the host's, or gic.c's: ICC_PMR_EL1 and the ICC registers of CRn 12. */
static bool is_icc(uint32_t reg) {
    uint32_t crm = reg >> 3 & 15;
    return reg == ICC_PMR || ((reg & ~SYSREG(0, 0, 0, 15, 7)) == SYSREG(3, 0, 12, 0, 0) && crm >= 8 && crm <= 12);
}

enum el0_access { EL0_OK, EL0_TRAP, EL0_UNDEF };

static enum el0_access trap_unless(uint64_t allowed) { return allowed ? EL0_OK : EL0_TRAP; }

static enum el0_access el0_access(struct vcpu *c, uint32_t reg, bool write) {
    uint64_t kctl = c->sys.cntkctl, sctlr = c->sys.sctlr;
    switch (reg) {
    case NZCV:
    case DIT:
    case SSBS:
    case FPCR:
    case FPSR:
    case TPIDR_EL0: return EL0_OK;
    case DCZID_EL0:
    case TPIDRRO_EL0: return write ? EL0_UNDEF : EL0_OK;
    case DAIF: return trap_unless(sctlr & SCTLR_UMA);
    case CTR_EL0: return write ? EL0_UNDEF : trap_unless(sctlr & SCTLR_UCT);
    case SCXTNUM_EL0: return trap_unless(!(sctlr & SCTLR_TSCXT));
    case CNTFRQ: return write ? EL0_UNDEF : trap_unless(kctl & (CNTKCTL_PCT | CNTKCTL_VCT));
    case CNTPCT: return write ? EL0_UNDEF : trap_unless(kctl & CNTKCTL_PCT);
    case CNTVCT: return write ? EL0_UNDEF : trap_unless(kctl & CNTKCTL_VCT);
    case CNTP_TVAL:
    case CNTP_CTL:
    case CNTP_CVAL: return trap_unless(kctl & CNTKCTL_PT);
    case CNTV_TVAL:
    case CNTV_CTL:
    case CNTV_CVAL: return trap_unless(kctl & CNTKCTL_VT);
    case MDCCSR_EL0:
    case DBGDTR_EL0:
    case DBGDTRX_EL0: return trap_unless(!(c->sys.mdscr >> 12 & 1)); /* TDCC */
    default: return EL0_UNDEF;
    }
}

/* True when the access may go on; else the exception has been taken or the exit prepared. */
static bool accessible(struct vcpu *c, const struct uop *u, uint32_t reg, bool write) {
    if (c->el == 0) {
        enum el0_access access = el0_access(c, reg, write);
        if (access == EL0_UNDEF)
            return exc_undef(c, u);
        if (access == EL0_TRAP)
            return exc_sysreg_trap(c, u, sysreg_iss(u->insn));
    } else if (is_icc(reg) && !c->gic) {
        return exit_exception(c, pc_of(c, u), syndrome(EC_SYSREG, sysreg_iss(u->insn)), 0, 0);
    } else if ((reg >> 11 & 7) >= 4 || (reg == SP_EL0 && !c->spsel)) {
        return exc_undef(c, u); /* EL2 and EL3 are not there; SP_EL0 is the stack pointer in use */
    }
    if ((reg == FPCR || reg == FPSR) && c->fp_trap)
        return exc_fp_access(c, u);
    return true;
}

bool sysreg_mrs(struct vcpu *c, const struct uop *u, uint32_t reg, uint64_t *value) {
    if (!accessible(c, u, reg, false))
        return false;
    if (unlikely(c->gic != NULL) && is_icc(reg))
        return gic_mrs(c, reg, value) || exc_undef(c, u);
    return read_reg(c, reg, value) || exc_unimplemented(c, u);
}

bool sysreg_msr(struct vcpu *c, const struct uop *u, uint32_t reg, uint64_t value) {
    if (!accessible(c, u, reg, true))
        return false;
    if (unlikely(c->gic != NULL) && is_icc(reg))
        return gic_msr(c, reg, value) || exc_undef(c, u);
    return write_reg(c, reg, value) || exc_unimplemented(c, u);
}

/* ---- The host's side -------------------------------------------------------------------------------------------- */

hv_return_t sysreg_host_get(struct vcpu *c, hv_sys_reg_t reg, uint64_t *value) {
    if (reg == SP_EL1) {
        *value = c->spsel ? c->x[R_SP] : c->sys.sp_el1;
        return HV_SUCCESS;
    }
    return read_reg(c, reg, value) ? HV_SUCCESS : HV_BAD_ARGUMENT;
}

hv_return_t sysreg_host_set(struct vcpu *c, hv_sys_reg_t reg, uint64_t value) {
    if (reg >= ID_FIRST && reg <= ID_LAST) {
        c->sys.id[reg & 0x3f] = value;
    } else if (reg == MIDR) {
        c->sys.midr = value;
    } else if (reg == MPIDR) {
        c->sys.mpidr = value;
        if (c->gic)
            gic_set_affinity(c);
    } else if (reg == SP_EL1) {
        *(c->spsel ? &c->x[R_SP] : &c->sys.sp_el1) = value;
    } else {
        return write_reg(c, reg, value) ? HV_SUCCESS : HV_BAD_ARGUMENT;
    }
    return HV_SUCCESS;
}
