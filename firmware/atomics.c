// Atomic counters shared by every CPU: no update may be lost, whatever the instructions.
//
// Arguments: n, updates per CPU and kind (20000); cpus, at most so many (8).
#include "guest.h"

__asm__(".arch_extension lse");

static u64 updates;
static volatile u64 count;
static bool lse;
static struct {
    volatile u64 value __attribute__((aligned(64))); // a cache line each
} exclusive, acquire_release, byte_counter, locked, added, compared, halves, contended;
static volatile u32 lock __attribute__((aligned(64)));
static volatile u64 pair[2] __attribute__((aligned(64)));
static volatile u64 token __attribute__((aligned(64)));
static volatile u64 arrived, ready, finished, taken[MAX_CPUS][8], bad_pairs;

static void add_exclusive(volatile u64 *at)
{
    u64 old;
    u32 failed;
    do
        __asm__ volatile("ldxr %0, [%2]\n\tadd %0, %0, #1\n\tstxr %w1, %0, [%2]"
                         : "=&r"(old), "=&r"(failed) : "r"(at) : "memory");
    while (failed);
}

static void add_acquire_release(volatile u64 *at)
{
    u64 old;
    u32 failed;
    do
        __asm__ volatile("ldaxr %0, [%2]\n\tadd %0, %0, #1\n\tstlxr %w1, %0, [%2]"
                         : "=&r"(old), "=&r"(failed) : "r"(at) : "memory");
    while (failed);
}

static void add_byte(volatile u64 *at) // counts modulo 256, beside bytes nobody may touch
{
    u64 old;
    u32 failed;
    do
        __asm__ volatile("ldxrb %w0, [%2]\n\tadd %w0, %w0, #1\n\tstxrb %w1, %w0, [%2]"
                         : "=&r"(old), "=&r"(failed) : "r"((u64)at + 3) : "memory");
    while (failed);
}

static void add_pair(void) // both halves move together, in opposite directions
{
    u64 first, second;
    u32 failed;
    do {
        __asm__ volatile("ldaxp %0, %1, [%2]" : "=&r"(first), "=&r"(second) : "r"(pair) : "memory");
        __asm__ volatile("stlxp %w0, %1, %2, [%3]"
                         : "=&r"(failed) : "r"(first + 1), "r"(second - 1), "r"(pair) : "memory");
    } while (failed);
    if (first + second != 0)
        add_exclusive(&bad_pairs);
}

static void take_lock(void)
{
    u32 seen, failed;
    __asm__ volatile("sevl\n"
                     "1: wfe\n"
                     "2: ldaxr %w0, [%2]\n"
                     "cbnz %w0, 1b\n"
                     "stxr %w1, %w3, [%2]\n"
                     "cbnz %w1, 2b\n"
                     : "=&r"(seen), "=&r"(failed)
                     : "r"(&lock), "r"(1)
                     : "memory");
}

// STLR clears the other CPUs' monitors, which is an event for their WFE (B2.9.1, D1.6.1).
static void drop_lock(void) { __asm__ volatile("stlr wzr, [%0]" ::"r"(&lock) : "memory"); }

static void add_lse(u64 step)
{
    u64 old, expected, got;
    __asm__ volatile("ldaddal %1, %0, [%2]" : "=r"(old) : "r"(1UL), "r"(&added.value) : "memory");
    __asm__ volatile("stadd %w0, [%1]" ::"r"(1), "r"((u64)&halves.value + 4) : "memory");
    got = compared.value;
    do {
        expected = got;
        __asm__ volatile("casal %0, %1, [%2]" : "+r"(got) : "r"(expected + step), "r"(&compared.value) : "memory");
    } while (got != expected);

    register u64 low __asm__("x4"), high __asm__("x5");
    register u64 new_low __asm__("x6"), new_high __asm__("x7");
    u64 old_low = pair[0], old_high = pair[1];
    for (;;) {
        low = old_low;
        high = old_high;
        new_low = old_low + 1;
        new_high = old_high - 1;
        __asm__ volatile("caspal x4, x5, x6, x7, [%4]"
                         : "+r"(low), "+r"(high) : "r"(new_low), "r"(new_high), "r"(pair) : "memory");
        if (low == old_low && high == old_high)
            break;
        old_low = low;
        old_high = high;
    }
    if (low + high != 0)
        add_exclusive(&bad_pairs);
}

// One token goes from hand to hand by SWP: whoever takes it out puts it back, and counts.
static void swap_token(u64 self)
{
    u64 got;
    do
        __asm__ volatile("swpal %1, %0, [%2]" : "=r"(got) : "r"(0UL), "r"(&token) : "memory");
    while (!got);
    taken[self][0]++;
    __asm__ volatile("swpal %1, %0, [%2]" : "=r"(got) : "r"(1UL), "r"(&token) : "memory");
    if (got)
        add_exclusive(&bad_pairs);
}

static void meet(volatile u64 *here)
{
    add_exclusive(here);
    while (*here < count)
        ;
}

static void work(u64 self)
{
    meet(&arrived);
    for (u64 i = 0; i < updates; i++) {
        add_exclusive(&exclusive.value);
        add_acquire_release(&acquire_release.value);
        add_byte(&byte_counter.value);
        add_pair();
        take_lock();
        locked.value = locked.value + 1;
        drop_lock();
        if (lse) {
            add_lse(3);
            swap_token(self);
        }
    }
    meet(&ready);
    for (u64 i = 0; lse && i < 64 * updates; i++) // with nothing in between: most of them meet another CPU's
        __asm__ volatile("stadd %0, [%1]" ::"r"(1UL), "r"(&contended.value) : "memory");
    dsb(sy);
    meet(&finished);
}

static void secondary(struct cpu *self) { work(self->index); }

static void single_cpu_rules(void)
{
    u64 old, cell = 5;
    u32 failed;
    __asm__ volatile("clrex\n\tstxr %w0, %1, [%2]" : "=&r"(failed) : "r"(9UL), "r"(&cell) : "memory");
    check("clear_monitor_fails", failed == 1 && cell == 5);
    __asm__ volatile("ldxr %0, [%2]\n\tclrex\n\tstxr %w1, %3, [%2]"
                     : "=&r"(old), "=&r"(failed) : "r"(&cell), "r"(9UL) : "memory");
    check("clrex_fails", failed == 1 && cell == 5 && old == 5);
    __asm__ volatile("ldxr %0, [%2]\n\tstxr %w1, %3, [%2]"
                     : "=&r"(old), "=&r"(failed) : "r"(&cell), "r"(9UL) : "memory");
    check("pair_succeeds", failed == 0 && cell == 9);
    __asm__ volatile("stxr %w0, %1, [%2]" : "=&r"(failed) : "r"(7UL), "r"(&cell) : "memory");
    check("second_store_fails", failed == 1 && cell == 9);
    // An exception return clears the monitor (B2.9.5).
    __asm__ volatile("ldxr %0, [%1]" : "=&r"(old) : "r"(&cell) : "memory");
    __asm__ volatile("adr %0, 1f\n\tmsr elr_el1, %0\n\tmsr spsr_el1, %1\n\teret\n1:"
                     : "=&r"(old) : "r"(EL1H) : "memory");
    __asm__ volatile("stxr %w0, %1, [%2]" : "=&r"(failed) : "r"(7UL), "r"(&cell) : "memory");
    check("eret_clears_monitor", failed == 1 && cell == 9);
    if (!lse)
        return;
#define LSE(name, width, instruction, from, operand, after)                                                            \
    do {                                                                                                               \
        cell = from;                                                                                                   \
        __asm__ volatile(instruction " %" width "1, %" width "0, [%2]"                                                 \
                         : "=r"(old)                                                                                   \
                         : "r"((u64)(operand)), "r"(&cell)                                                             \
                         : "memory");                                                                                  \
        check(name, old == (u64)(from) && cell == (u64)(after));                                                       \
    } while (0)
    LSE("ldadd", "x", "ldadd", 5, 7, 12);
    LSE("ldclr", "x", "ldclr", 0xff, 0x0f, 0xf0);
    LSE("ldset", "x", "ldset", 0xf0, 0x0f, 0xff);
    LSE("ldeor", "x", "ldeor", 0xff, 0x0f, 0xf0);
    LSE("ldsmax", "x", "ldsmax", 5, -7, 5);
    LSE("ldsmin", "x", "ldsmin", 5, -7, -7);
    LSE("ldumax", "x", "ldumax", 5, -7, -7);
    LSE("ldumin", "x", "ldumin", 5, -7, 5);
    LSE("swp", "x", "swp", 5, 7, 7);
    cell = 0xffffffffffffffff;
    __asm__ volatile("ldaddb %w1, %w0, [%2]" : "=r"(old) : "r"(1), "r"(&cell) : "memory");
    check("ldaddb_wraps", old == 0xff && cell == 0xffffffffffffff00);
    cell = 0x80;
    __asm__ volatile("ldsmaxb %w1, %w0, [%2]" : "=r"(old) : "r"(1), "r"(&cell) : "memory");
    check("ldsmaxb_signed", old == 0x80 && cell == 1);
    old = 0x1ff; // CASB compares and stores eight bits
    cell = 0xaaff;
    __asm__ volatile("casb %w0, %w1, [%2]" : "+r"(old) : "r"(0x133), "r"(&cell) : "memory");
    check("casb", old == 0xff && cell == 0xaa33);
}

void main(const void *device_tree)
{
    updates = argument(device_tree, "n", 20000);
    u64 cpus = argument(device_tree, "cpus", MAX_CPUS);
    lse = has_lse();
    value("lse", lse);
    single_cpu_rules();
    token = 1;
    count = MAX_CPUS + 1; // nobody starts before the number is known
    u64 started = start_cpus(cpus, secondary);
    value("cpus", started);
    count = started;
    u64 start = counter();
    work(0);
    value("cntfrq", read_sysreg(cntfrq_el0));
    value("ticks", counter() - start);
    u64 total = updates * count, swapped = 0;
    check_equal("exclusive", exclusive.value, total);
    check_equal("acquire_release", acquire_release.value, total);
    check_equal("byte", byte_counter.value, (total & 0xff) << 24);
    check_equal("spinlock", locked.value, total);
    check_equal("pair_low", pair[0], total * (lse ? 2 : 1));
    check_equal("pair_high", pair[1], 0 - pair[0]);
    check_equal("torn", bad_pairs, 0);
    if (lse) {
        check_equal("ldadd_total", added.value, total);
        check_equal("stadd_total", halves.value, total << 32);
        check_equal("contended_total", contended.value, 64 * total);
        check_equal("cas_total", compared.value, 3 * total);
        for (u64 index = 0; index < count; index++)
            swapped += taken[index][0];
        check_equal("swp_total", swapped, total);
    }
    finish();
}
