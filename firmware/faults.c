// Exceptions: every stage 1 fault by load, store and fetch at EL1 and EL0, and the instructions that trap.
// Vector, ESR_EL1, FAR_EL1, ELR_EL1 and SPSR_EL1 are compared with what the architecture says (Arm ARM D1.3, D8.13,
// D17.2.37).
//
// TTBR0 keeps the runtime's identity map; the pages under test hang under TTBR1, with a granule of their own.
#include "guest.h"

#define L0_BASE 0xffff000000000000UL // T1SZ 16: 48 bits, from level 0
#define TABLE_READ_ONLY (2UL << 61) // APTable
#define TABLE_NO_EL0 (1UL << 61)
#define BEYOND (1UL << 47) // an output address bit no PARange below 48 bits has

// Pages of the level 3 table, 4 KiB apart.
enum page { CODE, USER_RW, USER_RO, KERNEL_RW, NO_AF, INVALID, TOO_FAR, KERNEL_CODE, RESERVED, ALIASED, DEVICE };
#define VA(page) (L0_BASE + 4096UL * (page))
#define L2_VA(entry) (L0_BASE + (2UL << 20) * (entry))
#define L1_VA(entry) (L0_BASE + (1UL << 30) * (entry))
#define L0_VA(entry) (L0_BASE + (1UL << 39) * (entry))

static u64 level0[512] __attribute__((aligned(4096)));
static u64 level1[512] __attribute__((aligned(4096)));
static u64 level2[512] __attribute__((aligned(4096)));
static u64 level3[512] __attribute__((aligned(4096)));
static u8 data[65536] __attribute__((aligned(65536)));
static u64 wide_level2[2048] __attribute__((aligned(16384))); // of the 16 and 64 KiB granules
static u64 wide_level3[8192] __attribute__((aligned(65536)));

// One page of code, reached at EL1 where it is and at EL0 through VA(CODE). SVC ends what does not trap.
__asm__(".pushsection .text.snippets, \"ax\"\n"
        ".balign 4096\n"
        "snippets:\n"
        "code_ret: svc #0x77\n"
        "code_load: ldr x0, [x0]\n svc #0x77\n"
        "code_load32: ldr w0, [x0]\n svc #0x77\n"
        "code_store: str x1, [x0]\n svc #0x77\n"
        "code_load_pair: ldp x0, x1, [x0]\n svc #0x77\n"
        "code_load_unprivileged: ldtr x0, [x0]\n svc #0x77\n"
        "code_store_unprivileged: sttr x1, [x0]\n svc #0x77\n"
        "code_exclusive: ldxr x0, [x0]\n svc #0x77\n"
        "code_load_store_exclusive: ldxr x3, [x0]\n"
        "code_store_exclusive: stxr w2, x1, [x0]\n svc #0x77\n"
        "code_acquire: ldar x0, [x0]\n svc #0x77\n"
        "code_release: stlr x1, [x0]\n svc #0x77\n"
        "code_zero: dc zva, x0\n svc #0x77\n"
        "code_writeback: ldr x1, [x0, #8]!\n svc #0x77\n"
        "code_svc: svc #0x1234\n"
        "code_brk: brk #0xbeef\n"
        "code_udf: .inst 0\n"
        "code_unallocated: .inst 0x00800000\n"
        "code_hvc: hvc #0\n svc #0x77\n"
        "code_smc: smc #0\n svc #0x77\n"
        "code_eret: eret\n"
        "code_sctlr: mrs x7, sctlr_el1\n svc #0x77\n"
        "code_msr_vbar: msr vbar_el1, x7\n svc #0x77\n"
        "code_el2: mrs x7, s3_4_c1_c1_0\n svc #0x77\n" // HCR_EL2
        "code_ctr: mrs x7, ctr_el0\n svc #0x77\n"
        "code_cntvct: mrs x7, cntvct_el0\n svc #0x77\n"
        "code_cntv_ctl: msr cntv_ctl_el0, x7\n svc #0x77\n"
        "code_daifset: msr daifset, #2\n svc #0x77\n"
        "code_daif: mrs x7, daif\n svc #0x77\n"
        "code_tlbi: tlbi vmalle1\n svc #0x77\n"
        "code_ic_ivau: ic ivau, x0\n svc #0x77\n"
        "code_dc_civac: dc civac, x0\n svc #0x77\n"
        "code_wfi: wfi\n svc #0x77\n"
        "code_tpidr: msr tpidr_el0, x0\n mrs x0, tpidr_el0\n svc #0x77\n"
        "code_fp: .inst 0x1e604020\n svc #0x77\n" // FMOV D0, D1
        "code_sp: ldr x0, [sp]\n svc #0x77\n"
        "code_sp_pair: stp x0, x1, [sp, #-16]!\n svc #0x77\n"
        "code_flags: subs xzr, x0, x1\n svc #0x77\n"
        "code_ret_target: ret x0\n"
        ".balign 4096\n"
        ".popsection\n");

#define CODE_AT(name) LABEL(code_##name)
#define USER_AT(name) (CODE_AT(name) - LABEL(snippets) + VA(CODE))

#define EC(class) ((u64)(class) << 26 | 1UL << 25) // with IL
#define EC_UNKNOWN 0x00
#define EC_WFX 0x01
#define EC_FP 0x07
#define EC_ILLEGAL 0x0e
#define EC_SVC 0x15
#define EC_SYSREG 0x18
#define EC_FETCH 0x20
#define EC_PC 0x22
#define EC_DATA 0x24
#define EC_SP 0x26
#define EC_STEP 0x32
#define EC_BRK 0x3c
#define SAME_EL 1
#define WNR 0x40
#define CM 0x100
#define TRANSLATION(level) (0x04 + (level))
#define ACCESS_FLAG(level) (0x08 + (level))
#define PERMISSION(level) (0x0c + (level))
#define ADDRESS_SIZE(level) (0x00 + (level))
#define ALIGNMENT 0x21
#define NO_FAR 0x5a5a5a5a5a5a5a5aUL
#define DONE (EC(EC_SVC) | 0x77)

// Runs `pc` and compares what is taken, PSTATE being `after` by then. FAR counts only when the exception sets it.
static void expect_state(const char *name, u64 pc, u64 spsr, u64 x0, u64 esr, u64 far, u64 elr, u64 after)
{
    struct trap *trap = &this_cpu()->trap;
    u64 vector = spsr == EL1T ? 0 : (spsr & 15) == 5 ? 4 : 8;
    write_sysreg(far_el1, NO_FAR);
    attempt(pc, spsr, x0, 0x1122334455667788, x0);
    bool far_set = (esr >> 26 & ~1UL) == EC_FETCH || (esr >> 26 & ~1UL) == EC_DATA || esr >> 26 == EC_PC;
    if (trap->vector == vector && trap->esr == esr && (!far_set || trap->far == far) &&
        trap->elr == elr && trap->spsr == after) {
        check(name, true);
        return;
    }
    check(name, false);
    print("# vector %u want %u, esr %x want %x\n", trap->vector, vector, trap->esr, esr);
    print("# far %x want %x\n", trap->far, far);
    print("# elr %x want %x, spsr %x want %x\n", trap->elr, elr, trap->spsr, after);
}

static void expect_at(const char *name, u64 pc, u64 spsr, u64 x0, u64 esr, u64 far, u64 elr)
{
    expect_state(name, pc, spsr, x0, esr, far, elr, spsr);
}

static void expect(const char *name, u64 pc, u64 spsr, u64 x0, u64 esr, u64 far)
{
    expect_at(name, pc, spsr, x0, esr, far, pc);
}

// A data abort by the snippet at `pc`, at EL1 and EL0.
#define DATA_BOTH(name, code, address, iss)                                                                            \
    do {                                                                                                               \
        expect(name "_el1", CODE_AT(code), EL1H, address, EC(EC_DATA + SAME_EL) | (iss), address);                     \
        expect(name "_el0", USER_AT(code), EL0T, address, EC(EC_DATA) | (iss), address);                               \
    } while (0)

// Reached its end without a trap.
static void passes(const char *name, u64 pc, u64 spsr, u64 x0)
{
    expect_at(name, pc, spsr, x0, DONE, 0, pc + 8);
}

static void tlb_invalidate(void)
{
    dsb(ishst);
    __asm__ volatile("tlbi vmalle1\n\tdsb ish\n\tisb" ::: "memory");
}

static u64 tcr(void) { return read_sysreg(tcr_el1) & ~0xffff0000UL & 0xffffffffUL; }

static void use_ttbr1(u64 table, u64 t1sz, u64 tg1)
{
    u64 ips = read_sysreg(tcr_el1) & (7UL << 32);
    write_sysreg(ttbr1_el1, table);
    write_sysreg(tcr_el1, tcr() | ips | t1sz << 16 | 1UL << 24 | 1UL << 26 | 3UL << 28 | tg1 << 30);
    isb();
    tlb_invalidate();
}

static void make_tables(void)
{
    u64 page = (u64)data;
    level3[CODE] = LABEL(snippets) | PAGE_ATTRIBUTES | EL0_ACCESS | READ_ONLY | PXN;
    level3[USER_RW] = page | PAGE_ATTRIBUTES | EL0_ACCESS | PXN | UXN;
    level3[USER_RO] = page | PAGE_ATTRIBUTES | EL0_ACCESS | READ_ONLY | PXN | UXN;
    level3[KERNEL_RW] = page | PAGE_ATTRIBUTES | PXN | UXN;
    level3[NO_AF] = (page | PAGE_ATTRIBUTES | EL0_ACCESS | PXN | UXN) & ~AF;
    level3[TOO_FAR] = BEYOND | PAGE_ATTRIBUTES | EL0_ACCESS;
    level3[KERNEL_CODE] = LABEL(snippets) | PAGE_ATTRIBUTES | READ_ONLY | UXN;
    level3[RESERVED] = (page | PAGE_ATTRIBUTES | EL0_ACCESS) & ~2UL; // type 0b01 is reserved at level 3 (D8.3)
    // Writable at EL0 is never executable at EL1 (D8.4.1).
    level3[ALIASED] = LABEL(snippets) | PAGE_ATTRIBUTES | EL0_ACCESS; 
    level3[DEVICE] = (page | PAGE_ATTRIBUTES | EL0_ACCESS | PXN | UXN) & ~NORMAL;
    level2[0] = (u64)level3 | VALID_TABLE;
    level2[2] = (0x40000000 | AF | SH_INNER | NORMAL | EL0_ACCESS | PXN | UXN | 1) & ~AF;
    level2[3] = 0x40000000 | AF | SH_INNER | NORMAL | EL0_ACCESS | READ_ONLY | PXN | UXN | 1;
    level2[4] = (u64)level3 | VALID_TABLE | TABLE_READ_ONLY;
    level2[5] = BEYOND | VALID_TABLE;
    level2[6] = (u64)level3 | VALID_TABLE | TABLE_NO_EL0;
    level1[0] = (u64)level2 | VALID_TABLE;
    level1[2] = (0x40000000 | SH_INNER | NORMAL | EL0_ACCESS | PXN | UXN | 1);
    level1[3] = 0x40000000 | AF | SH_INNER | NORMAL | EL0_ACCESS | READ_ONLY | PXN | UXN | 1;
    level0[0] = (u64)level1 | VALID_TABLE;
    level0[2] = 0x40000000 | AF | SH_INNER | NORMAL | EL0_ACCESS | 1; // a block is reserved at level 0
}

static void translation_faults(void)
{
    DATA_BOTH("load_translation_l3", load, VA(INVALID) + 8, TRANSLATION(3));
    DATA_BOTH("store_translation_l3", store, VA(INVALID) + 16, TRANSLATION(3) | WNR);
    DATA_BOTH("load_reserved_l3", load, VA(RESERVED), TRANSLATION(3));
    DATA_BOTH("load_translation_l2", load, L2_VA(1) + 0x123458, TRANSLATION(2));
    DATA_BOTH("load_translation_l1", load, L1_VA(1) + 0x123458, TRANSLATION(1));
    DATA_BOTH("load_translation_l0", load, L0_VA(1) + 0x123458, TRANSLATION(0));
    DATA_BOTH("load_reserved_l0", load, L0_VA(2), TRANSLATION(0));
    // Outside both address ranges, and beyond TTBR0's 4 GiB: level 0 (D8.13, "Translation fault").
    DATA_BOTH("load_hole", load, 0x0000ffff00000000UL, TRANSLATION(0));
    DATA_BOTH("store_hole", store, 0x8000000000000000UL, TRANSLATION(0) | WNR);
    expect("fetch_translation_l3_el1", VA(INVALID), EL1H, 0, EC(EC_FETCH + SAME_EL) | TRANSLATION(3), VA(INVALID));
    expect("fetch_translation_l3_el0", VA(INVALID), EL0T, 0, EC(EC_FETCH) | TRANSLATION(3), VA(INVALID));
    expect("fetch_translation_l1_el0", L1_VA(1), EL0T, 0, EC(EC_FETCH) | TRANSLATION(1), L1_VA(1));
    expect_at("branch_translation_el0", USER_AT(ret_target), EL0T, VA(INVALID) + 64, EC(EC_FETCH) | TRANSLATION(3),
                  VA(INVALID) + 64, VA(INVALID) + 64);

    u64 saved = read_sysreg(tcr_el1);
    write_sysreg(tcr_el1, saved | TCR_EPD1);
    tlb_invalidate();
    expect("walk_disabled", CODE_AT(load), EL1H, VA(USER_RW), EC(EC_DATA + SAME_EL) | TRANSLATION(0), VA(USER_RW));
    write_sysreg(tcr_el1, saved);
    tlb_invalidate();
    passes("walk_enabled", CODE_AT(load), EL1H, VA(USER_RW));

    // A new valid entry needs no TLBI; a removed one is gone after it.
    u64 entry = level3[USER_RW];
    level3[INVALID] = entry;
    __asm__ volatile("dsb ishst\n\tisb" ::: "memory");
    passes("mapped_later", CODE_AT(load), EL1H, VA(INVALID));
    level3[INVALID] = 0;
    dsb(ishst);
    __asm__ volatile("tlbi vaae1is, %0\n\tdsb ish\n\tisb" ::"r"(VA(INVALID) >> 12 & 0xfffffffffffUL) : "memory");
    expect("unmapped_later", CODE_AT(load), EL1H, VA(INVALID), EC(EC_DATA + SAME_EL) | TRANSLATION(3), VA(INVALID));
}

static void permission_faults(void)
{
    DATA_BOTH("store_read_only_l3", store, VA(USER_RO) + 24, PERMISSION(3) | WNR);
    DATA_BOTH("store_read_only_l2", store, L2_VA(3) + 0x1000, PERMISSION(2) | WNR);
    DATA_BOTH("store_read_only_l1", store, L1_VA(3) + 0x200000, PERMISSION(1) | WNR);
    DATA_BOTH("store_table_read_only", store, L2_VA(4) + 4096 * USER_RW, PERMISSION(3) | WNR);
    // Whether STXR faults when the monitor is not set is IMPLEMENTATION DEFINED (B2.9.5): set it.
    expect_at("exclusive_store_read_only", CODE_AT(load_store_exclusive), EL1H, VA(USER_RO),
                  EC(EC_DATA + SAME_EL) | PERMISSION(3) | WNR, VA(USER_RO), CODE_AT(store_exclusive));
    expect("load_kernel_el0", USER_AT(load), EL0T, VA(KERNEL_RW), EC(EC_DATA) | PERMISSION(3), VA(KERNEL_RW));
    expect("store_kernel_el0", USER_AT(store), EL0T, VA(KERNEL_RW), EC(EC_DATA) | PERMISSION(3) | WNR, VA(KERNEL_RW));
    expect("load_table_no_el0", USER_AT(load), EL0T, L2_VA(6) + 4096 * USER_RW, EC(EC_DATA) | PERMISSION(3),
           L2_VA(6) + 4096 * USER_RW);
    passes("load_table_no_el0_el1", CODE_AT(load), EL1H, L2_VA(6) + 4096 * USER_RW);
    expect("load_identity_el0", USER_AT(load), EL0T, 0x40000000, EC(EC_DATA) | PERMISSION(1), 0x40000000);
    expect("ldtr_kernel", CODE_AT(load_unprivileged), EL1H, VA(KERNEL_RW), EC(EC_DATA + SAME_EL) | PERMISSION(3),
           VA(KERNEL_RW));
    expect("sttr_kernel", CODE_AT(store_unprivileged), EL1H, VA(KERNEL_RW),
           EC(EC_DATA + SAME_EL) | PERMISSION(3) | WNR, VA(KERNEL_RW));
    passes("ldtr_user", CODE_AT(load_unprivileged), EL1H, VA(USER_RW));
    passes("load_kernel_el1", CODE_AT(load), EL1H, VA(KERNEL_RW));
    passes("store_user_el0", USER_AT(store), EL0T, VA(USER_RW));
    passes("load_read_only_el0", USER_AT(load), EL0T, VA(USER_RO));

    u64 offset = CODE_AT(ret) - LABEL(snippets);
    expect("fetch_uxn_data", VA(USER_RW), EL0T, 0, EC(EC_FETCH) | PERMISSION(3), VA(USER_RW));
    expect("fetch_uxn_kernel_code", VA(KERNEL_CODE), EL0T, 0, EC(EC_FETCH) | PERMISSION(3), VA(KERNEL_CODE));
    expect("fetch_pxn", VA(CODE), EL1H, 0, EC(EC_FETCH + SAME_EL) | PERMISSION(3), VA(CODE));
    expect("fetch_el0_writable", VA(ALIASED), EL1H, 0, EC(EC_FETCH + SAME_EL) | PERMISSION(3), VA(ALIASED));
    expect_at("fetch_kernel_code", VA(KERNEL_CODE) + offset, EL1H, 0, DONE, 0, VA(KERNEL_CODE) + offset + 4);
    expect_at("fetch_alias", VA(ALIASED) + offset, EL0T, 0, DONE, 0, VA(ALIASED) + offset + 4);
}

static void other_data_faults(void)
{
    DATA_BOTH("load_access_flag_l3", load, VA(NO_AF), ACCESS_FLAG(3));
    DATA_BOTH("store_access_flag_l3", store, VA(NO_AF), ACCESS_FLAG(3) | WNR);
    DATA_BOTH("load_access_flag_l2", load, L2_VA(2), ACCESS_FLAG(2));
    DATA_BOTH("load_access_flag_l1", load, L1_VA(2), ACCESS_FLAG(1));
    expect("fetch_access_flag", VA(NO_AF), EL1H, 0, EC(EC_FETCH + SAME_EL) | ACCESS_FLAG(3), VA(NO_AF));
    if ((read_sysreg(id_aa64mmfr0_el1) & 15) < 5) { // PARange below 48 bits
        DATA_BOTH("load_address_size_l3", load, VA(TOO_FAR), ADDRESS_SIZE(3));
        DATA_BOTH("load_address_size_l2", load, L2_VA(5), ADDRESS_SIZE(2));
        expect("fetch_address_size", VA(TOO_FAR), EL0T, 0, EC(EC_FETCH) | ADDRESS_SIZE(3), VA(TOO_FAR));
    }

    // An access that runs into the next page faults on that page's first byte (D1.3.6 and J1's byte-wise accesses).
    u64 edge = VA(INVALID);
    level3[NO_AF] |= AF;
    tlb_invalidate();
    expect("load_across", CODE_AT(load), EL1H, edge - 4, EC(EC_DATA + SAME_EL) | TRANSLATION(3), edge);
    expect("store_across", CODE_AT(store), EL1H, edge - 3, EC(EC_DATA + SAME_EL) | TRANSLATION(3) | WNR, edge);
    expect("pair_across", CODE_AT(load_pair), EL1H, edge - 8, EC(EC_DATA + SAME_EL) | TRANSLATION(3), edge);
    passes("load_up_to_edge", CODE_AT(load), EL1H, edge - 8);
    level3[NO_AF] &= ~AF;
    tlb_invalidate();

    // A faulting access with writeback leaves its base register alone.
    expect("writeback", CODE_AT(writeback), EL1H, VA(INVALID), EC(EC_DATA + SAME_EL) | TRANSLATION(3), VA(INVALID) + 8);
    check_equal("writeback_base", this_cpu()->trap.x0, VA(INVALID));

    // Alignment: exclusives and ordered accesses always, the rest under SCTLR_EL1.A, before any translation fault.
    DATA_BOTH("exclusive_unaligned", exclusive, VA(USER_RW) + 4, ALIGNMENT);
    if ((read_sysreg(id_aa64mmfr2_el1) >> 32 & 15) == 0) { // without FEAT_LSE2
        DATA_BOTH("acquire_unaligned", acquire, VA(USER_RW) + 4, ALIGNMENT);
        DATA_BOTH("release_unaligned", release, VA(USER_RW) + 4, ALIGNMENT | WNR);
    }
    DATA_BOTH("device_unaligned", load, VA(DEVICE) + 4, ALIGNMENT);
    passes("load_unaligned", CODE_AT(load), EL1H, VA(USER_RW) + 1);
    u64 sctlr = read_sysreg(sctlr_el1);
    write_sysreg(sctlr_el1, sctlr | 2);
    isb();
    DATA_BOTH("strict_load_unaligned", load, VA(USER_RW) + 1, ALIGNMENT);
    DATA_BOTH("strict_load32_unaligned", load32, VA(USER_RW) + 2, ALIGNMENT);
    DATA_BOTH("strict_store_unaligned", store, VA(USER_RW) + 4, ALIGNMENT | WNR);
    DATA_BOTH("strict_pair_unaligned", load_pair, VA(USER_RW) + 4, ALIGNMENT);
    DATA_BOTH("strict_before_translation", load, VA(INVALID) + 1, ALIGNMENT);
    passes("strict_pair_aligned", CODE_AT(load_pair), EL1H, VA(USER_RW) + 8);
    write_sysreg(sctlr_el1, sctlr);
    isb();
}

static void alignment_of_pc_and_sp(void)
{
    expect("pc_alignment_el1", CODE_AT(ret) + 2, EL1H, 0, EC(EC_PC), CODE_AT(ret) + 2);
    expect("pc_alignment_el0", USER_AT(ret) + 1, EL0T, 0, EC(EC_PC), USER_AT(ret) + 1);
    expect("pc_alignment_before_translation", VA(INVALID) + 2, EL0T, 0, EC(EC_PC), VA(INVALID) + 2);
    expect("sp_alignment_el1t", CODE_AT(sp), EL1T, VA(USER_RW) + 8, EC(EC_SP), 0);
    expect("sp_alignment_el0", USER_AT(sp), EL0T, VA(USER_RW) + 8, EC(EC_SP), 0);
    expect("sp_alignment_pair_el0", USER_AT(sp_pair), EL0T, VA(USER_RW) + 40, EC(EC_SP), 0);
    passes("sp_aligned_el0", USER_AT(sp), EL0T, VA(USER_RW) + 16);
    u64 sctlr = read_sysreg(sctlr_el1);
    write_sysreg(sctlr_el1, sctlr & ~0x18UL); // SA, SA0
    isb();
    passes("sp_unchecked_el0", USER_AT(sp), EL0T, VA(USER_RW) + 8);
    passes("sp_unchecked_el1t", CODE_AT(sp), EL1T, VA(USER_RW) + 8);
    write_sysreg(sctlr_el1, sctlr);
    isb();
}

static u64 system_register_iss(u64 op0, u64 op1, u64 crn, u64 crm, u64 op2, u64 rt, u64 read)
{
    return op0 << 20 | op2 << 17 | op1 << 14 | crn << 10 | rt << 5 | crm << 1 | read;
}

static void instructions(void)
{
    expect_at("svc_el1", CODE_AT(svc), EL1H, 0, EC(EC_SVC) | 0x1234, 0, CODE_AT(svc) + 4);
    expect_at("svc_el0", USER_AT(svc), EL0T, 0, EC(EC_SVC) | 0x1234, 0, USER_AT(svc) + 4);
    expect("brk_el1", CODE_AT(brk), EL1H, 0, EC(EC_BRK) | 0xbeef, 0);
    expect("brk_el0", USER_AT(brk), EL0T, 0, EC(EC_BRK) | 0xbeef, 0);
    expect("udf_el1", CODE_AT(udf), EL1H, 0, EC(EC_UNKNOWN), 0);
    expect("udf_el0", USER_AT(udf), EL0T, 0, EC(EC_UNKNOWN), 0);
    expect("unallocated_el1", CODE_AT(unallocated), EL1H, 0, EC(EC_UNKNOWN), 0);
    expect("hvc_el0", USER_AT(hvc), EL0T, 0, EC(EC_UNKNOWN), 0);
    expect("eret_el0", USER_AT(eret), EL0T, 0, EC(EC_UNKNOWN), 0);
    expect("smc_el0", USER_AT(smc), EL0T, 0, EC(EC_UNKNOWN), 0);
    passes("hvc_unknown", CODE_AT(hvc), EL1H, 0x8400ffff);
    check_equal("hvc_unknown_result", this_cpu()->trap.x0, ~0UL);
    expect("sctlr_el0", USER_AT(sctlr), EL0T, 0, EC(EC_UNKNOWN), 0);
    expect("vbar_el0", USER_AT(msr_vbar), EL0T, 0, EC(EC_UNKNOWN), 0);
    expect("tlbi_el0", USER_AT(tlbi), EL0T, 0, EC(EC_UNKNOWN), 0);
    expect("hcr_el2_el1", CODE_AT(el2), EL1H, 0, EC(EC_UNKNOWN), 0);
    expect_at("tpidr_el0", USER_AT(tpidr), EL0T, 0x123456789abcdef0, DONE, 0, USER_AT(tpidr) + 12);
}

static void traps_to_el1(void)
{
    // SCTLR_EL1 as the runtime left it: UCT, UCI, UMA, DZE 0; nTWI, nTWE 1.
    u64 sctlr = read_sysreg(sctlr_el1);
    expect("ctr_el0", USER_AT(ctr), EL0T, 0, EC(EC_SYSREG) | system_register_iss(3, 3, 0, 0, 1, 7, 1), 0);
    expect("daifset_el0", USER_AT(daifset), EL0T, 0, EC(EC_SYSREG) | system_register_iss(0, 3, 4, 2, 6, 31, 0), 0);
    expect("daif_el0", USER_AT(daif), EL0T, 0, EC(EC_SYSREG) | system_register_iss(3, 3, 4, 2, 1, 7, 1), 0);
    expect("dc_zva_el0", USER_AT(zero), EL0T, VA(USER_RW), EC(EC_SYSREG) | system_register_iss(1, 3, 7, 4, 1, 0, 0), 0);
    expect("ic_ivau_el0", USER_AT(ic_ivau), EL0T, VA(USER_RW),
           EC(EC_SYSREG) | system_register_iss(1, 3, 7, 5, 1, 0, 0), 0);
    expect("dc_civac_el0", USER_AT(dc_civac), EL0T, VA(USER_RW),
           EC(EC_SYSREG) | system_register_iss(1, 3, 7, 14, 1, 0, 0), 0);
    write_sysreg(cntkctl_el1, 0);
    isb();
    expect("cntvct_el0", USER_AT(cntvct), EL0T, 0, EC(EC_SYSREG) | system_register_iss(3, 3, 14, 0, 2, 7, 1), 0);
    expect("cntv_ctl_el0", USER_AT(cntv_ctl), EL0T, 0, EC(EC_SYSREG) | system_register_iss(3, 3, 14, 3, 1, 7, 0), 0);
    write_sysreg(cntkctl_el1, 2); // EL0VCTEN
    write_sysreg(sctlr_el1, sctlr | 1UL << 15 | 1UL << 26 | 1UL << 14 | 1UL << 9);
    isb();
    passes("cntvct_el0_allowed", USER_AT(cntvct), EL0T, 0);
    passes("ctr_el0_allowed", USER_AT(ctr), EL0T, 0);
    passes("daif_el0_allowed", USER_AT(daif), EL0T, 0);
    passes("ic_ivau_el0_allowed", USER_AT(ic_ivau), EL0T, VA(USER_RW));
    passes("dc_zva_el0_allowed", USER_AT(zero), EL0T, VA(USER_RW));
    DATA_BOTH("dc_zva_translation", zero, VA(INVALID), TRANSLATION(3) | WNR);
    DATA_BOTH("dc_zva_read_only", zero, VA(USER_RO), PERMISSION(3) | WNR);

    write_sysreg(sctlr_el1, sctlr & ~(1UL << 16)); // nTWI
    isb();
    expect("wfi_el0", USER_AT(wfi), EL0T, 0, EC(EC_WFX) | 0x1e00000, 0);
    write_sysreg(sctlr_el1, sctlr);

    write_sysreg(cpacr_el1, 0);
    isb();
    expect("fp_trap_el1", CODE_AT(fp), EL1H, 0, EC(EC_FP) | 0x1e00000, 0);
    expect("fp_trap_el0", USER_AT(fp), EL0T, 0, EC(EC_FP) | 0x1e00000, 0);
    write_sysreg(cpacr_el1, 1UL << 20);
    isb();
    passes("fp_allowed_el1", CODE_AT(fp), EL1H, 0);
    expect("fp_el1_only_el0", USER_AT(fp), EL0T, 0, EC(EC_FP) | 0x1e00000, 0);
    write_sysreg(cpacr_el1, 3UL << 20);
    isb();
    passes("fp_allowed_el0", USER_AT(fp), EL0T, 0);
}

static void processor_state(void)
{
    // NZCV goes in and out through SPSR untouched, and is what the last compare made of it.
    struct trap *trap = &this_cpu()->trap;
    for (u64 flags = 0; flags < 16; flags++) {
        attempt(CODE_AT(ret), EL1H | flags << 28, 0, 0, 0);
        if (trap->spsr != (EL1H | flags << 28))
            check_equal("nzcv_kept", trap->spsr, EL1H | flags << 28);
    }
    check("nzcv_kept", true);
    attempt(CODE_AT(flags), EL1H, 5, 5, 0);
    check_equal("nzcv_equal", trap->spsr >> 28, 6);
    attempt(CODE_AT(flags), EL1H, 4, 5, 0);
    check_equal("nzcv_less", trap->spsr >> 28, 8);
    attempt(CODE_AT(flags), EL1H, 1UL << 63, 1, 0);
    check_equal("nzcv_overflow", trap->spsr >> 28, 3);

    // DAIF is kept in SPSR and masked in the handler.
    attempt(CODE_AT(ret), EL1H & ~0x3c0UL, 0, 0, 0);
    check_equal("daif_in_spsr", trap->spsr, EL1H & ~0x3c0UL);
    check_equal("daif_in_handler", read_sysreg(daif), 0x3c0);

    // An exception return to a level that is not there: PSTATE.IL, then Illegal Execution state (D1.4.4).
    u64 bad[] = {0x3c9, 0x3cd, 0x3c1, 0x3c2, 0x3c7};
    for (u64 i = 0; i < sizeof bad / sizeof *bad; i++) {
        attempt(CODE_AT(load), bad[i] | 5UL << 28, VA(USER_RW), 0, 0);
        check_equal("illegal_return_esr", trap->esr, EC(EC_ILLEGAL));
        check_equal("illegal_return_elr", trap->elr, CODE_AT(load));
        check_equal("illegal_return_spsr", trap->spsr, EL1H | 1UL << 20 | 5UL << 28);
    }
    if (read_sysreg(id_aa64mmfr1_el1) >> 20 & 15) { // FEAT_PAN
        u64 pan = EL1H | 1UL << 22;
        expect("pan_load", CODE_AT(load), pan, VA(USER_RW), EC(EC_DATA + SAME_EL) | PERMISSION(3), VA(USER_RW));
        expect("pan_store", CODE_AT(store), pan, VA(USER_RW), EC(EC_DATA + SAME_EL) | PERMISSION(3) | WNR, VA(USER_RW));
        passes("pan_ldtr", CODE_AT(load_unprivileged), pan, VA(USER_RW));
        passes("pan_kernel", CODE_AT(load), pan, VA(KERNEL_RW));
        check_equal("span_set", trap->spsr, pan);
    }
}

#define MDSCR_SS 1UL
#define MDSCR_KDE (1UL << 13)
#define SPSR_SS (1UL << 21)
#define STEP (EC(EC_STEP) | 0x22)
#define STEPPED (STEP | 1UL << 24) // ISV
#define STEP_EXCLUSIVE 0x40
#define D_CLEAR(spsr) ((spsr) & ~0x200UL)

// Software step (D2.12): one instruction, then an exception.
static void software_step(void)
{
    u64 next = USER_AT(tpidr), ss = EL0T | SPSR_SS;
    write_sysreg(oslar_el1, 0);
    write_sysreg(mdscr_el1, MDSCR_SS);
    __asm__ volatile("isb");
    expect_state("step_el0", next, ss, 0, STEPPED, 0, next + 4, EL0T);
    expect_state("step_el0_pending", next, EL0T, 0, STEP, 0, next, EL0T);
    expect_state("step_flags", USER_AT(flags), ss, 0, STEPPED, 0, USER_AT(flags) + 4, EL0T | 8UL << 28);
    expect_state("step_branch", USER_AT(ret_target), ss, next, STEPPED, 0, next, EL0T);
    expect_state("step_load_exclusive", USER_AT(exclusive), ss, VA(USER_RW), STEPPED | STEP_EXCLUSIVE, 0,
                 USER_AT(exclusive) + 4, EL0T);
    // An SVC is done when its exception is taken; what faults is not.
    expect_state("step_svc", USER_AT(ret), ss, 0, DONE, 0, USER_AT(ret) + 4, EL0T);
    expect_state("step_brk", USER_AT(brk), ss, 0, EC(EC_BRK) | 0xbeef, 0, USER_AT(brk), ss);
    expect_state("step_undefined", USER_AT(udf), ss, 0, EC(EC_UNKNOWN), 0, USER_AT(udf), ss);
    expect_state("step_fault", USER_AT(load), ss, VA(INVALID), EC(EC_DATA) | TRANSLATION(3), VA(INVALID),
                 USER_AT(load), ss);
    expect_state("step_fetch_fault", VA(INVALID), ss, 0, EC(EC_FETCH) | TRANSLATION(3), VA(INVALID), VA(INVALID), ss);
    // At EL1 only with KDE, and D clear.
    expect_state("step_el1_no_kde", CODE_AT(ret), D_CLEAR(EL1H) | SPSR_SS, 0, DONE, 0, CODE_AT(ret) + 4, D_CLEAR(EL1H));
    write_sysreg(mdscr_el1, MDSCR_SS | MDSCR_KDE);
    __asm__ volatile("isb");
    expect_state("step_el1", CODE_AT(flags), D_CLEAR(EL1H) | SPSR_SS, 0, STEPPED | EC(SAME_EL), 0, CODE_AT(flags) + 4,
                 D_CLEAR(EL1H) | 8UL << 28);
    expect_state("step_el1_masked", CODE_AT(ret), EL1H | SPSR_SS, 0, DONE, 0, CODE_AT(ret) + 4, EL1H);
    expect_state("step_el0_kde", next, ss, 0, STEPPED, 0, next + 4, EL0T);
    // Not while the OS lock is closed, nor once it is off.
    write_sysreg(oslar_el1, 1);
    __asm__ volatile("isb");
    expect_state("step_locked", next, ss, 0, DONE, 0, next + 12, EL0T);
    write_sysreg(oslar_el1, 0);
    write_sysreg(mdscr_el1, 0);
    __asm__ volatile("isb");
    expect_state("step_off", next, ss, 0, DONE, 0, next + 12, EL0T);
}

static u64 translate(u64 address, bool write)
{
    if (write)
        __asm__ volatile("at s1e1w, %0\n\tisb" ::"r"(address) : "memory");
    else
        __asm__ volatile("at s1e1r, %0\n\tisb" ::"r"(address) : "memory");
    return read_sysreg(par_el1);
}

static void address_translation(void)
{
#define PAR_PA 0xfffffffff000UL
    check_equal("at_read", translate(VA(USER_RW) + 0x123, false) & (PAR_PA | 1), (u64)data);
    check_equal("at_write", translate(VA(KERNEL_RW) + 0x123, true) & (PAR_PA | 1), (u64)data);
    check_equal("at_read_only", translate(VA(USER_RO), true) & 0x87f, 0x801 | PERMISSION(3) << 1);
    check_equal("at_invalid", translate(VA(INVALID), false) & 0x87f, 0x801 | TRANSLATION(3) << 1);
    check_equal("at_block", translate(L1_VA(3) + 0x12345678, false) & (PAR_PA | 1), 0x40000000 + 0x12345000);
    __asm__ volatile("at s1e0r, %0\n\tisb" ::"r"(VA(KERNEL_RW)) : "memory");
    check_equal("at_el0", read_sysreg(par_el1) & 0x87f, 0x801 | PERMISSION(3) << 1);
}

// 16 and 64 KiB granules: T1SZ 28 gives 36 bits, from level 2 in both.
static void wide_granule(const char *name, u64 tg1, u64 shift)
{
    u64 base = 0xfffffff000000000UL, size = 1UL << shift, block = 1UL << (shift + shift - 3);
    for (u64 i = 0; i < 2048; i++)
        wide_level2[i] = 0;
    for (u64 i = 0; i < 8192; i++)
        wide_level3[i] = 0;
    wide_level2[0] = (u64)wide_level3 | VALID_TABLE;
    wide_level2[2] = 0x40000000 | SH_INNER | NORMAL | PXN | UXN | 1;
    wide_level2[3] = 0x40000000 | AF | SH_INNER | NORMAL | READ_ONLY | PXN | UXN | 1;
    wide_level3[0] = (u64)data | PAGE_ATTRIBUTES | PXN | UXN;
    wide_level3[2] = (u64)data | PAGE_ATTRIBUTES | READ_ONLY | PXN | UXN;
    wide_level3[3] = ((u64)data | PAGE_ATTRIBUTES | PXN | UXN) & ~AF;
    use_ttbr1((u64)wide_level2, 28, tg1);
    print("# granule %s\n", name);

    *(volatile u64 *)(base + size - 8) = 0x600dda7a600dda7a ^ shift;
    check_equal("granule_store", load64((u64)data + size - 8), 0x600dda7a600dda7a ^ shift);
    check_equal("granule_load", load64(base + 2 * size + size - 8), 0x600dda7a600dda7a ^ shift);
    check_equal("granule_block", load64(base + 3 * block + ((u64)data & (block - 1)) + size - 8),
                (0x40000000 & (block - 1)) == 0 && ((u64)data - 0x40000000) < block ? 0x600dda7a600dda7a ^ shift : 0);
    expect("granule_translation_l3", CODE_AT(load), EL1H, base + size,
           EC(EC_DATA + SAME_EL) | TRANSLATION(3), base + size);
    expect("granule_across", CODE_AT(load), EL1H, base + size - 4, EC(EC_DATA + SAME_EL) | TRANSLATION(3), base + size);
    expect("granule_translation_l2", CODE_AT(load), EL1H, base + block + 8, EC(EC_DATA + SAME_EL) | TRANSLATION(2),
           base + block + 8);
    expect("granule_access_flag_l2", CODE_AT(load), EL1H, base + 2 * block, EC(EC_DATA + SAME_EL) | ACCESS_FLAG(2),
           base + 2 * block);
    expect("granule_permission_l2", CODE_AT(store), EL1H, base + 3 * block,
           EC(EC_DATA + SAME_EL) | PERMISSION(2) | WNR, base + 3 * block);
    expect("granule_permission_l3", CODE_AT(store), EL1H, base + 2 * size,
           EC(EC_DATA + SAME_EL) | PERMISSION(3) | WNR, base + 2 * size);
    expect("granule_access_flag_l3", CODE_AT(load), EL1H, base + 3 * size + 8,
           EC(EC_DATA + SAME_EL) | ACCESS_FLAG(3), base + 3 * size + 8);
    expect("granule_hole", CODE_AT(load), EL1H, base - 8, EC(EC_DATA + SAME_EL) | TRANSLATION(0), base - 8);
}

void main(const void *device_tree)
{
    (void)device_tree;
    make_tables();
    use_ttbr1((u64)level0, 16, 2);
    translation_faults();
    permission_faults();
    other_data_faults();
    alignment_of_pc_and_sp();
    instructions();
    traps_to_el1();
    processor_state();
    software_step();
    address_translation();
    u64 features = read_sysreg(id_aa64mmfr0_el1);
    bool granule16 = (features >> 20 & 15) != 0, granule64 = (features >> 24 & 15) == 0;
    value("granule_16k", granule16);
    value("granule_64k", granule64);
    if (granule16)
        wide_granule("16k", 1, 14);
    if (granule64)
        wide_granule("64k", 3, 16);
    finish();
}
