// What CPUs may see of each other's memory, translations and code when they run side by side (Arm ARM B2.3, K11).
//
// Arguments: ms, for how long each test runs (200); cpus, at most so many (8). One CPU has nothing to be tested.
// What a test without barriers sees is printed as a figure: it may see anything, but what never sees anything proves
// little of the tests beside it.
#include "guest.h"

__asm__(".arch_extension lse");

#define LINE __attribute__((aligned(128)))
#define BASE 0xffffff8000000000UL                 // T1SZ 25: 39 bits, from level 1
#define DATA_PAGE (PAGE_ATTRIBUTES | READ_ONLY | PXN | UXN)
#define VA_ARGUMENT(va) ((va) >> 12 & 0xfffffffffffUL)
#define SAMPLES 256
#define NODES 6
#define dmb(domain) __asm__ volatile("dmb " #domain ::: "memory")

static u64 test_ticks;
static volatile u64 count; // 0 until it is known
static volatile u64 x LINE, y LINE, stop LINE, over LINE;
static struct barrier {
    volatile u64 arrived LINE, generation LINE;
} everyone, pair;
static u64 bad[MAX_CPUS] LINE;

static u64 add(volatile u64 *at, u64 step)
{
    u64 old;
    u32 failed;
    do
        __asm__ volatile("ldaxr %0, [%2]\n\tadd x9, %0, %3\n\tstlxr %w1, x9, [%2]"
                         : "=&r"(old), "=&r"(failed) : "r"(at), "r"(step) : "x9", "memory");
    while (failed);
    return old;
}

static u64 load_acquire(volatile u64 *at)
{
    u64 value;
    __asm__ volatile("ldar %0, [%1]" : "=r"(value) : "r"(at) : "memory");
    return value;
}

static void store_release(volatile u64 *at, u64 value)
{
    __asm__ volatile("stlr %0, [%1]" ::"r"(value), "r"(at) : "memory");
}

// `width` CPUs wait for each other.
static void meet_at(struct barrier *barrier, u64 width)
{
    u64 now = load_acquire(&barrier->generation);
    if (add(&barrier->arrived, 1) == width - 1) {
        barrier->arrived = 0;
        store_release(&barrier->generation, now + 1);
    } else {
        for (u64 tries = 0; load_acquire(&barrier->generation) == now; tries++)
            if (tries > 1000) // until then ready to go on at the very moment that the other does
                __asm__ volatile("yield");
    }
}

static void meet(void) { meet_at(&everyone, count); }

// A writer that is done before its readers have begun has tested nothing: now and then it waits for each to be at work.
static volatile u64 alive[MAX_CPUS] LINE;

static void await_readers(void)
{
    for (u64 i = 1; i < count; i++)
        for (u64 now = alive[i]; alive[i] == now;)
            __asm__ volatile("yield");
}

static void with_readers(u64 round)
{
    if (round % 256 == 0)
        await_readers();
}

static u64 start(void) // when the test shall end
{
    meet();
    x = y = stop = over = 0;
    meet();
    return counter() + test_ticks;
}

// Message passing: whoever sees the flag sees the message. The writer never waits: a message is a number that grows.
static void message_passing(u64 self, bool barriers)
{
    u64 end = start();
    if (self == 0) {
        for (u64 i = 1; i % 64 || counter() < end; i++) {
            x = i;
            if (barriers) {
                dmb(ishst);
                y = i;
            } else {
                store_release(&y, i);
            }
            with_readers(i / 16);
        }
        stop = 1;
    } else {
        u64 last = 0;
        while (!stop) {
            u64 flag = barriers ? y : load_acquire(&y);
            if (barriers)
                dmb(ishld);
            u64 message = x;
            bad[self] += message < flag || message < last; // and one location never goes back
            last = message;
            alive[self]++;
        }
    }
    meet();
}

// Store buffering: of two that each store and then look at the other's, at least one sees. Two CPUs.
enum { NOTHING, DMB, ORDERED, SWAP };
static volatile u64 seen[2] LINE;

static void store_buffering(u64 self, unsigned how)
{
    volatile u64 *mine = self ? &y : &x, *other = self ? &x : &y;
    u64 end = start();
    for (u64 i = 1; self < 2; i++) {
        u64 value;
        meet_at(&pair, 2);
        if (stop)
            break;
        for (volatile u64 pause = i * (self ? 7 : 3) % 11; pause; pause--) // now one is first, now the other
            ;
        if (how == ORDERED) { // RCsc: LDAR does not overtake STLR (B2.3.11)
            store_release(mine, i);
            value = load_acquire(other);
        } else {
            if (how == SWAP) {
                u64 old;
                __asm__ volatile("swpal %1, %0, [%2]" : "=r"(old) : "r"(i), "r"(mine) : "memory");
            } else {
                *mine = i;
            }
            if (how == DMB)
                dmb(ish);
            value = *other;
        }
        seen[self] = value;
        meet_at(&pair, 2);
        if (self == 0) {
            bad[0] += seen[0] != i && seen[1] != i;
            stop = counter() >= end;
        }
    }
    meet();
}

// A store is one store: what another CPU puts there afterwards stays (B2.2.1). SCTLR_EL1.A, which changes nothing for
// aligned accesses, keeps an engine from doing these by its fast path.
static void stored_once(u64 self)
{
    u64 sctlr = read_sysreg(sctlr_el1);
    u64 end = start();
    write_sysreg(sctlr_el1, sctlr | 1UL << 1);
    isb();
    if (self == 0) {
        for (u64 i = 1; i % 64 || counter() < end; i++) {
            x = i;
            with_readers(i / 256);
        }
        stop = 1;
    } else {
        for (u64 last = 0; !stop; alive[self]++) {
            u64 taken;
            __asm__ volatile("swpal xzr, %0, [%1]" : "=r"(taken) : "r"(&x) : "memory");
            bad[self] += taken && taken <= last;
            last = taken ? taken : last;
        }
    }
    write_sysreg(sctlr_el1, sctlr);
    isb();
    meet();
}

// Independent reads of independent writes: two readers never disagree about the order of two writes. Four CPUs.
static volatile u64 first[2][SAMPLES] LINE, second[2][SAMPLES] LINE, readers_done LINE;

static void independent_reads(u64 self, bool barriers)
{
    u64 written = 0;
    u64 end = start();
    while (!over) {
        readers_done = 0;
        meet();
        stop = 0;
        meet();
        if (self < 2) {
            volatile u64 *mine = self ? &y : &x;
            while (!stop)
                *mine = ++written;
        } else if (self < 4) {
            volatile u64 *one = self == 2 ? &x : &y, *other = self == 2 ? &y : &x;
            for (u64 i = 0; i < SAMPLES; i++) {
                first[self - 2][i] = barriers ? *one : load_acquire(one);
                if (barriers)
                    dmb(ish);
                second[self - 2][i] = barriers ? *other : load_acquire(other);
            }
            if (add(&readers_done, 1) == 1)
                stop = 1;
        }
        meet();
        if (self == 0)
            for (u64 i = 0; i < SAMPLES; i++)
                for (u64 j = 0; j < SAMPLES; j++)
                    bad[0] += first[0][i] > second[1][j] && first[1][j] > second[0][i];
        if (self == 0)
            over = counter() >= end;
        meet();
    }
}

// A stack of nodes whose head is taken with LDAXR and STLXR. A store-exclusive that succeeds although the head was
// changed and changed back (ABA) hands a node out twice.
static struct node {
    struct node *volatile next;
    volatile u64 taken;
} nodes[NODES] LINE;
static struct node *volatile head LINE;

static struct node *pop(void)
{
    struct node *top, *next;
    u32 failed = 1;
    do {
        __asm__ volatile("ldaxr %0, [%1]" : "=r"(top) : "r"(&head) : "memory");
        if (!top) {
            __asm__ volatile("clrex");
            return NULL;
        }
        next = top->next;
        for (volatile int pause = 0; pause < 8; pause++) // room for the others to come in between
            ;
        __asm__ volatile("stlxr %w0, %1, [%2]" : "=&r"(failed) : "r"(next), "r"(&head) : "memory");
    } while (failed);
    return top;
}

static void push(struct node *node)
{
    struct node *top;
    u32 failed;
    do {
        __asm__ volatile("ldaxr %0, [%1]" : "=r"(top) : "r"(&head) : "memory");
        node->next = top;
        __asm__ volatile("stlxr %w0, %1, [%2]" : "=&r"(failed) : "r"(node), "r"(&head) : "memory");
    } while (failed);
}

static void lock_free_stack(u64 self)
{
    if (self == 0) {
        head = NULL;
        for (u64 i = 0; i < NODES; i++)
            push(&nodes[i]);
    }
    u64 end = start();
    for (u64 i = 1; i % 16 || counter() < end; i++) {
        struct node *one = pop(), *two = pop();
        if (one)
            bad[self] += add(&one->taken, 1) != 0;
        if (two)
            bad[self] += add(&two->taken, 1) != 0;
        if (one) { // in the order that makes the old head come back on top of another
            add(&one->taken, -1UL);
            push(one);
        }
        if (two) {
            add(&two->taken, -1UL);
            push(two);
        }
    }
    meet();
}

// Between one CPU's load-exclusive and its store-exclusive another changes the value: and back again, which is the stack's
// trouble made to happen; or by a store or an atomic, which know nothing of exclusives. Two CPUs.
enum { AND_BACK, STORE, ATOMIC };

static void changed_meanwhile(u64 self, unsigned how)
{
    u64 end = start();
    for (u64 i = 1; self < 2 && !over; i++) {
        if (self == 0) {
            u64 value;
            u32 failed;
            bool last = i >= 16 && counter() >= end;
            __asm__ volatile("ldaxr %0, [%1]" : "=r"(value) : "r"(&x) : "memory");
            store_release(&y, i);
            while (load_acquire(&stop) != i)
                __asm__ volatile("yield");
            __asm__ volatile("stlxr %w0, %1, [%2]" : "=&r"(failed) : "r"(value), "r"(&x) : "memory");
            bad[0] += !failed;
            over = last;
        } else {
            while (load_acquire(&y) != i && !over)
                __asm__ volatile("yield");
            if (over)
                break;
            if (how == AND_BACK) {
                add(&x, 1);
                add(&x, -1UL);
            } else if (how == STORE) {
                x = i;
            } else {
                __asm__ volatile("stadd %0, [%1]" ::"r"(1UL), "r"(&x) : "memory");
            }
            store_release(&stop, i);
        }
    }
    meet();
}

// TLB shoot-down: once TLBI and DSB are done nobody reads the old page any more, so that it may be used for other things.
static u64 level1[512] __attribute__((aligned(4096)));
static u64 level2[512] __attribute__((aligned(4096)));
static volatile u64 level3[512] __attribute__((aligned(4096)));
static volatile u64 pages[2][512] __attribute__((aligned(4096)));

static void map(u64 page)
{
    // Both mappings are valid, and old and new page hold good values until this is done: no break before make.
    level3[0] = page | DATA_PAGE;
    __asm__ volatile("dsb ishst\n\ttlbi vaae1is, %0\n\tdsb ish\n\tisb" ::"r"(VA_ARGUMENT(BASE)) : "memory");
}

static void use_tables(void)
{
    u64 tcr = read_sysreg(tcr_el1) & ~((u64)TCR_EPD1 | 0xff7f0000UL);
    write_sysreg(ttbr1_el1, (u64)level1);
    write_sysreg(tcr_el1, tcr | 25UL << 16 | 1UL << 24 | 1UL << 26 | 3UL << 28 | 2UL << 30);
    isb();
    __asm__ volatile("tlbi vmalle1\n\tdsb nsh\n\tisb" ::: "memory");
}

static void shoot_down(u64 self)
{
    if (self == 0) {
        level1[0] = (u64)level2 | VALID_TABLE;
        level2[0] = (u64)level3 | VALID_TABLE;
        level3[0] = (u64)pages[0] | DATA_PAGE;
        pages[0][0] = pages[1][0] = 1;
        dsb(ish);
    }
    u64 end = start();
    use_tables();
    meet();
    if (self == 0) {
        u64 ticks = 0, i;
        for (i = 0; i % 16 || counter() < end; i++) {
            u64 from = i & 1;
            u64 began = counter();
            map((u64)pages[!from]);
            ticks += counter() - began;
            pages[from][0] = 0; // other things, for as long as it takes each reader to look, whenever it runs
            await_readers();
            pages[from][0] = 1;
            dsb(ish);
        }
        value("shoot_down_ticks", ticks / i);
        stop = 1;
    } else {
        while (!stop) {
            u64 all = 1; // read in a long straight line, in which nobody looks up unless he is made to
            __asm__ volatile(".rept 400\n\tldr x9, [%1]\n\tand %0, %0, x9\n\t.endr" : "+r"(all) : "r"(BASE) : "x9");
            bad[self] += !all;
            alive[self]++;
        }
    }
    meet();
}

// Code that one CPU patches is what another runs once the writer's DSB is done and the reader has had its ISB (B2.4.4).
static u32 code[1024] __attribute__((aligned(4096)));

static void patched_code(u64 self)
{
    if (self == 0) {
        code[0] = 0xd2800000U; // MOV X0, #0
        code[1] = 0xd65f03c0U; // RET
        __asm__ volatile("dc cvau, %0\n\tdsb ish\n\tic ivau, %0\n\tdsb ish\n\tisb" ::"r"(code) : "memory");
    }
    u64 end = start();
    if (self == 0) {
        for (u64 i = 1; i % 16 || counter() < end; i++) {
            code[0] = 0xd2800000U | ((u32)i & 0xffff) << 5;
            __asm__ volatile("dc cvau, %0\n\tdsb ish\n\tic ivau, %0\n\tdsb ish\n\tisb" ::"r"(code) : "memory");
            x = i;
            with_readers(i);
        }
        stop = 1;
    } else {
        while (!stop) {
            alive[self]++;
            u64 least = load_acquire(&x);
            isb();
            u64 got = ((u64(*)(void))code)();
            u64 most = load_acquire(&x) + 1;
            bad[self] += (u16)(got - least) > (u16)(most - least);
        }
    }
    meet();
}

static void tell(u64 self, const char *name)
{
    meet();
    if (self == 0) {
        u64 sum = 0;
        for (u64 i = 0; i < count; i++)
            sum += bad[i];
        check_equal(name, sum, 0);
        for (u64 i = 0; i < count; i++)
            bad[i] = 0;
    }
    meet();
}

static void work(u64 self)
{
    message_passing(self, true);
    tell(self, "message_passing_barriers");
    message_passing(self, false);
    tell(self, "message_passing_release_acquire");
    store_buffering(self, NOTHING);
    if (self == 0) {
        value("store_buffering_without_barriers", bad[0]);
        bad[0] = 0;
    }
    store_buffering(self, DMB);
    tell(self, "store_buffering_barriers");
    store_buffering(self, ORDERED);
    tell(self, "store_buffering_release_acquire");
    bool lse = has_lse();
    if (lse) {
        store_buffering(self, SWAP);
        tell(self, "store_buffering_swap");
        stored_once(self);
        tell(self, "stored_once");
    }
    if (count >= 4) {
        independent_reads(self, true);
        tell(self, "independent_reads_barriers");
        independent_reads(self, false);
        tell(self, "independent_reads_acquire");
    }
    lock_free_stack(self);
    tell(self, "lock_free_stack");
    changed_meanwhile(self, AND_BACK);
    tell(self, "store_exclusive_changed_back");
    changed_meanwhile(self, STORE);
    tell(self, "store_exclusive_stored_over");
    if (lse) {
        changed_meanwhile(self, ATOMIC);
        tell(self, "store_exclusive_added_to");
    }
    shoot_down(self);
    tell(self, "shoot_down");
    patched_code(self);
    tell(self, "patched_code");
}

static void secondary(struct cpu *self)
{
    while (!count)
        ;
    work(self->index);
}

void main(const void *device_tree)
{
    test_ticks = argument(device_tree, "ms", 200) * read_sysreg(cntfrq_el0) / 1000;
    count = start_cpus(argument(device_tree, "cpus", MAX_CPUS), secondary);
    value("cpus", count);
    if (count < 2) {
        check("alone", true);
        finish();
    }
    work(0);
    value("cntfrq", read_sysreg(cntfrq_el0));
    finish();
}
