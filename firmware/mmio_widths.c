// Device registers read and written in every way there is.
//
// Plain loads and stores of one register must give the right value: their data abort has a valid syndrome (ISS.ISV).
// Pairs, writeback, exclusives, vectors and cache maintenance do not (D17.2.37): those may work or take an abort, as a
// hypervisor likes, but must do one of the two, leave the base register alone when they abort, and never hang.
#include "guest.h"

#define DONE 0x56000077 // ESR_EL1 of the SVC that ends each snippet
#define EC_DATA_ABORT 0x25
#define HOLE 0x0f000000UL // no device here

#define SNIPPET(name, text) "code_" name ": " text "\n svc #0x77\n"
__asm__(".text\n.balign 4\n.arch_extension lse\n.arch_extension simd\n"
        SNIPPET("ldrb", "ldrb w0, [x0]")
        SNIPPET("ldrh", "ldrh w0, [x0]")
        SNIPPET("ldr32", "ldr w0, [x0]")
        SNIPPET("ldr64", "ldr x0, [x0]")
        SNIPPET("ldrsb32", "ldrsb w0, [x0]")
        SNIPPET("ldrsb64", "ldrsb x0, [x0]")
        SNIPPET("ldrsh32", "ldrsh w0, [x0]")
        SNIPPET("ldrsh64", "ldrsh x0, [x0]")
        SNIPPET("ldrsw", "ldrsw x0, [x0]")
        SNIPPET("ldr_register", "mov x2, #1\n sub x0, x0, #4\n ldr w0, [x0, x2, lsl #2]")
        SNIPPET("ldur", "add x0, x0, #3\n ldur w0, [x0, #-3]")
        SNIPPET("ldar", "ldar w0, [x0]")
        SNIPPET("ldr_wzr", "ldr wzr, [x0]")
        SNIPPET("ldrb_wzr", "ldrb wzr, [x0]")
        SNIPPET("ldr_sp_base", "ldr w0, [sp]")
        SNIPPET("strb", "strb w1, [x0]")
        SNIPPET("str32", "str w1, [x0]")
        SNIPPET("str_wzr", "str wzr, [x0]")
        SNIPPET("stlr", "stlr w1, [x0]")
        SNIPPET("ldp32", "ldp w2, w3, [x0]")
        SNIPPET("ldp64", "ldp x2, x3, [x0]")
        SNIPPET("ldpsw", "ldpsw x2, x3, [x0]")
        SNIPPET("stp32", "stp w1, w1, [x0]")
        SNIPPET("stp_writeback", "stp w1, w1, [x0], #8")
        SNIPPET("ldr_post", "ldr w2, [x0], #8")
        SNIPPET("ldr_pre", "ldr w2, [x0, #8]!")
        SNIPPET("ldrb_post", "ldrb w2, [x0], #1")
        SNIPPET("str_post", "str w1, [x0], #8")
        SNIPPET("ldxr", "ldxr w2, [x0]\n clrex")
        SNIPPET("stxr", "ldxr w2, [x0]\n stxr w3, w1, [x0]")
        SNIPPET("ldadd", "ldadd w1, w2, [x0]")
        SNIPPET("cas", "cas w1, w1, [x0]")
        SNIPPET("ldr_q", "ldr q0, [x0]")
        SNIPPET("str_q", "str q0, [x0]")
        SNIPPET("ldr_s", "ldr s0, [x0]")
        SNIPPET("ld1", "ld1 {v0.16b, v1.16b}, [x0]")
        SNIPPET("prfm", "prfm pldl1keep, [x0]")
        SNIPPET("dc_cvac", "dc cvac, x0")
        SNIPPET("dc_civac", "dc civac, x0")
        SNIPPET("dc_ivac", "dc ivac, x0")
        SNIPPET("dc_zva", "dc zva, x0"));

static struct trap *run(u64 code, u64 address, u64 value)
{
    attempt(code, EL1H, address, value, 0);
    return &this_cpu()->trap;
}

// The snippet must end and leave `expected` in x0.
static void exactly(const char *name, u64 code, u64 address, u64 expected)
{
    struct trap *trap = run(code, address, 0);
    if (trap->esr == DONE)
        check_equal(name, trap->x0, expected);
    else
        check_equal(name, trap->esr, DONE);
}

// The snippet must end with x0 moved on by `step`, or abort with x0 as it was.
static void works_or_aborts(const char *name, u64 code, u64 address, u64 value, u64 step)
{
    struct trap *trap = run(code, address, value);
    bool worked = trap->esr == DONE;
    print("# %s %s\n", name, worked ? "works" : "aborts");
    if (worked)
        check_equal(name, trap->x0, address + step);
    else
        check(name, trap->esr >> 26 == EC_DATA_ABORT && trap->x0 == address && trap->far - address < 32);
}

static void identification(void)
{
    static const u8 pl011[] = {0x11, 0x10, 0x04, 0x00, 0x0d, 0xf0, 0x05, 0xb1};
    static const u8 pl031[] = {0x31, 0x10, 0x04, 0x00, 0x0d, 0xf0, 0x05, 0xb1};
    for (u64 i = 0; i < 8; i++) {
        u32 mask = i == 2 ? 0x0f : 0xff; // the upper half of PeriphID2 is the revision
        check_equal("pl011_id", load32(UART + 0xfe0 + 4 * i) & mask, pl011[i]);
        check_equal("pl031_id", load32(RTC + 0xfe0 + 4 * i) & mask, pl031[i]);
    }
    check_equal("gicd_pidr2", load32(GICD + 0xffe8) >> 4 & 15, 3);
    check_equal("gicr_pidr2", load32(GICR + 0xffe8) >> 4 & 15, 3);
}

#define CODE(name) LABEL(code_##name)

static void plain(void)
{
    u64 id = UART + 0xff4; // 0xf0
    exactly("ldrb", CODE(ldrb), id, 0xf0);
    exactly("ldrh", CODE(ldrh), id, 0xf0);
    exactly("ldr32", CODE(ldr32), id, 0xf0);
    exactly("ldrsb32", CODE(ldrsb32), id, 0xfffffff0);
    exactly("ldrsb64", CODE(ldrsb64), id, ~0xfUL);
    exactly("ldrsh32", CODE(ldrsh32), id, 0xf0);
    exactly("ldrsh64", CODE(ldrsh64), id, 0xf0);
    exactly("ldrsw", CODE(ldrsw), id, 0xf0);
    exactly("ldr_register", CODE(ldr_register), id, 0xf0);
    exactly("ldur", CODE(ldur), id, 0xf0);
    exactly("ldar", CODE(ldar), id, 0xf0);
    attempt(CODE(ldr_sp_base), EL1T, 0, 0, UART + 0xff0);
    check_equal("ldr_sp_base", this_cpu()->trap.x0, 0x0d);
    exactly("ldr_wzr", CODE(ldr_wzr), id, id);
    exactly("ldrb_wzr", CODE(ldrb_wzr), id, id);

    u64 match = RTC + 4; // PL031 MR: 32 bits to write and read back
    run(CODE(str32), match, 0xffffffff87654321);
    exactly("str32", CODE(ldr32), match, 0x87654321);
    exactly("ldrsw_negative", CODE(ldrsw), match, 0xffffffff87654321);
    run(CODE(stlr), match, 0x12345678);
    exactly("stlr", CODE(ldr32), match, 0x12345678);
    run(CODE(str_wzr), match, 0xffffffff);
    exactly("str_wzr", CODE(ldr32), match, 0);

    u64 priority = GICD + 0x400 + 40; // GICD_IPRIORITYR takes bytes and words (12.9.20)
    run(CODE(str32), priority, 0x10203040);
    run(CODE(strb), priority + 2, 0xffffffffffffff80);
    exactly("strb", CODE(ldr32), priority, 0x10803040);
    exactly("ldrb_middle", CODE(ldrb), priority + 2, 0x80);
    exactly("ldrsb_middle", CODE(ldrsb64), priority + 2, ~0x7fUL);

    u64 router = GICD + 0x6000 + 8 * 40; // GICD_IROUTER is 64 bits wide
    *(volatile u64 *)router = 0x000000ff00000000;
    exactly("ldr64", CODE(ldr64), router, 0x000000ff00000000);
    exactly("ldr32_upper", CODE(ldr32), router + 4, 0xff);
    *(volatile u64 *)router = 0;
}

static void odd(void)
{
    u64 id = UART + 0xff0, match = RTC + 4, priority = GICD + 0x400 + 48;
#define ODD(name, address, value, step) works_or_aborts(#name, CODE(name), address, value, step)
    ODD(ldp32, id, 0, 0);
    ODD(ldp64, UART + 0xfe0, 0, 0);
    ODD(ldpsw, id, 0, 0);
    ODD(stp32, priority, 0x20202020, 0);
    ODD(stp_writeback, priority, 0x20202020, 8);
    ODD(ldr_post, id, 0, 8);
    ODD(ldr_pre, UART + 0xfe8, 0, 8);
    ODD(ldrb_post, id, 0, 1);
    ODD(str_post, match, 0, 8);
    ODD(ldxr, id, 0, 0);
    ODD(stxr, match, 7, 0);
    if (has_lse()) {
        ODD(ldadd, match, 1, 0);
        ODD(cas, match, 1, 0);
    }
    write_sysreg(cpacr_el1, 3UL << 20);
    isb();
    ODD(ldr_q, UART + 0xfe0, 0, 0);
    ODD(str_q, priority, 0, 0);
    ODD(ldr_s, id, 0, 0);
    ODD(ld1, UART + 0xfe0, 0, 0);
    ODD(prfm, id, 0, 0);
    ODD(dc_cvac, UART, 0, 0);
    ODD(dc_civac, UART, 0, 0);
    ODD(dc_ivac, UART, 0, 0);
    ODD(dc_zva, priority & ~63UL, 0, 0);
    // More than one register, or not where one starts.
    works_or_aborts("misaligned", CODE(str32), match + 2, 0, 0);
    works_or_aborts("past_the_end", CODE(str32), RTC + 0xffe, 0, 0);
    works_or_aborts("hole_store", CODE(str32), HOLE, 0, 0);
    works_or_aborts("hole_store_byte", CODE(strb), HOLE + 0x123, 0, 0);
    works_or_aborts("hole_load", CODE(ldr_wzr), HOLE, 0, 0);
    works_or_aborts("hole_pair", CODE(ldp64), HOLE, 0, 0);
    works_or_aborts("virtio_pair", CODE(stp32), VIRTIO_MMIO + 0x10, 0, 0);
}

void main(const void *device_tree)
{
    (void)device_tree;
    identification();
    plain();
    odd();
    finish();
}
