// Self-modifying code: what is written, cleaned and invalidated (B2.4.4) is what runs, through any mapping, on any CPU.
//
// Argument: n, rewrites of each kind (2000).
#include "guest.h"

#define BASE 0xffffff8000000000UL // T1SZ 25: 39 bits, from level 1
#define CODE_PAGE (PAGE_ATTRIBUTES | READ_ONLY | UXN)
#define RET 0xd65f03c0U
#define NOP 0xd503201fU
#define MOVZ(value) (0xd2800000U | ((u32)(value) & 0xffff) << 5) // MOV X0, #value

typedef u64 function(void);

// Stores x1 at x0, where it is about to run. Copied in front of the place.
__asm__(".text\n.balign 4\n"
        "rewriter: str w1, [x0]\n dc cvau, x0\n dsb ish\n ic ivau, x0\n dsb ish\n isb\n");

static u32 code[1024] __attribute__((aligned(4096)));
static u32 other_code[1024] __attribute__((aligned(4096)));
static u64 level1[512] __attribute__((aligned(4096)));
static u64 level2[512] __attribute__((aligned(4096)));
static u64 level3[512] __attribute__((aligned(4096)));

static u64 call(u64 address) { return ((function *)address)(); }

// Make what was stored at `written` visible to fetches from `executed`, which may be another mapping of it.
static void synchronise(u64 written, u64 executed)
{
    __asm__ volatile("dc cvau, %0\n\tdsb ish\n\tic ivau, %1\n\tdsb ish\n\tisb"
                     ::"r"(written), "r"(executed) : "memory");
}

static void map(u64 index, const u32 *page, u64 attributes)
{
    level3[index] = (u64)page | attributes;
    __asm__ volatile("dsb ishst\n\ttlbi vaae1is, %0\n\tdsb ish\n\tisb"
                     ::"r"((BASE >> 12 & 0xfffffffffffUL) + index) : "memory");
}

static void make_tables(void)
{
    level1[0] = (u64)level2 | VALID_TABLE;
    level2[0] = (u64)level3 | VALID_TABLE;
    u64 tcr = read_sysreg(tcr_el1) & ~((u64)TCR_EPD1 | 0xff7f0000UL);
    write_sysreg(ttbr1_el1, (u64)level1);
    write_sysreg(tcr_el1, tcr | 25UL << 16 | 1UL << 24 | 1UL << 26 | 3UL << 28 | 2UL << 30);
    isb();
    map(0, code, CODE_PAGE);
    map(1, code, CODE_PAGE);
}

static volatile u64 generation, seen;
static volatile bool stop;
static u64 wrong;

static void secondary(struct cpu *self)
{
    (void)self;
    u64 last = 0;
    while (!stop) {
        u64 now = generation;
        if (now == last)
            continue;
        isb(); // the rest of the architecture's recipe is the writer's
        if (call((u64)&code[0]) != (now & 0xffff))
            wrong++;
        last = now;
        dsb(sy);
        seen = now;
    }
}

void main(const void *device_tree)
{
    u64 n = argument(device_tree, "n", 2000), failures = 0;
    make_tables();

    for (u64 i = 0; i < n; i++) {
        code[0] = MOVZ(i);
        code[1] = RET;
        synchronise((u64)code, (u64)code);
        failures += call((u64)code) != (i & 0xffff);
    }
    check_equal("same_address", failures, 0);

    failures = 0;
    for (u64 i = 0; i < n; i++) { // written here, run through two other addresses
        code[0] = MOVZ(i + 7);
        synchronise((u64)code, BASE);
        __asm__ volatile("ic ivau, %0\n\tdsb ish\n\tisb" ::"r"(BASE + 4096) : "memory");
        failures += call(BASE) != ((i + 7) & 0xffff);
        failures += call(BASE + 4096) != ((i + 7) & 0xffff);
    }
    check_equal("aliases", failures, 0);

    failures = 0;
    for (u64 i = 0; i < n; i++) { // everything invalidated at once
        code[0] = MOVZ(i + 9);
        __asm__ volatile("dc cvau, %0\n\tdsb ish\n\tic iallu\n\tdsb ish\n\tisb" ::"r"(code) : "memory");
        failures += call((u64)code) + call(BASE) != 2 * ((i + 9) & 0xffff);
    }
    check_equal("invalidate_all", failures, 0);

    // A branch patched to NOP and back, as kernels do, in the middle of a function.
    failures = 0;
    code[64] = MOVZ(1);
    code[66] = MOVZ(2);
    code[67] = RET;
    for (u64 i = 0; i < n; i++) {
        code[65] = i & 1 ? 0x14000002U : NOP; // B .+8
        synchronise((u64)&code[65], (u64)&code[65]);
        failures += call((u64)&code[64]) != (i & 1 ? 1 : 2);
    }
    check_equal("patched_branch", failures, 0);

    // A caller in one page whose direct branch leads to a callee rewritten in another.
    failures = 0;
    code[128] = 0x14000000U | ((u32)(&other_code[0] - &code[128]) & 0x3ffffff);
    other_code[1] = RET;
    synchronise((u64)&code[128], (u64)&code[128]);
    for (u64 i = 0; i < n; i++) {
        other_code[0] = MOVZ(i);
        synchronise((u64)other_code, (u64)other_code);
        failures += call((u64)&code[128]) != (i & 0xffff);
    }
    check_equal("through_a_branch", failures, 0);

    // Code that rewrites the instruction it is about to run.
    for (u64 i = 0; i < 6; i++)
        code[192 + i] = ((const u32 *)LABEL(rewriter))[i];
    code[199] = RET;
    synchronise((u64)&code[192], (u64)&code[192]);
    failures = 0;
    for (u64 i = 0; i < n; i++) {
        register u64 r0 __asm__("x0") = (u64)&code[198];
        register u64 r1 __asm__("x1") = MOVZ(i + 3);
        __asm__ volatile("blr %2" : "+r"(r0) : "r"(r1), "r"(&code[192]) : "x30", "memory");
        failures += r0 != ((i + 3) & 0xffff);
    }
    check_equal("just_ahead", failures, 0);

    // One address, two pages by turns: no code is rewritten, the mapping is.
    code[0] = MOVZ(11);
    other_code[0] = MOVZ(22);
    synchronise((u64)code, (u64)code);
    synchronise((u64)other_code, (u64)other_code);
    failures = 0;
    for (u64 i = 0; i < n; i++) {
        level3[2] = 0;
        map(2, i & 1 ? code : other_code, CODE_PAGE);
        failures += call(BASE + 2 * 4096) != (i & 1 ? 11 : 22);
    }
    check_equal("remapped", failures, 0);

    u64 cpus = start_cpus(2, secondary);
    value("cpus", cpus);
    if (cpus == 2) {
        for (u64 i = 1; i <= n; i++) {
            code[0] = MOVZ(i);
            synchronise((u64)code, (u64)code);
            generation = i;
            while (seen != i)
                ;
        }
        stop = true;
        check_equal("other_cpu", wrong, 0);
    }
    finish();
}
