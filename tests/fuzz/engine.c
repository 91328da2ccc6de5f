/*
 * Hostile guests for softhv: random instruction streams over random page tables, one case for each 64-bit seed.
 *
 *     engine [--count N] [--seconds S] [--from SEED] [SEED ...]
 *
 * Built with AddressSanitizer and UBSan (test_engine.py), which watch the engine's C. Compiled code is watched by its
 * surroundings: guest RAM lies in the middle of gigabytes that nobody may touch. A case of the first kind runs by the
 * interpreter and by compiled code and must leave the same state; one of the second kind may do anything to its code
 * and tables; one of the third has several vCPUs and a memory map that changes under them. A guest that does not come
 * back when it is kicked ends the program, as does any difference; the seed is printed first.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "hv.h"
#include "hv_simd.h"
#include "softhv/softhv.h"

/* ---- Dice ------------------------------------------------------------------------------------------------------- */

struct dice {
    uint64_t state;
};

static uint64_t roll(struct dice *d) { /* splitmix64 */
    uint64_t z = d->state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}
static uint64_t below(struct dice *d, uint64_t limit) { return roll(d) % limit; }
static bool chance(struct dice *d, unsigned percent) { return below(d, 100) < percent; }

/* ---- The machine ------------------------------------------------------------------------------------------------ */

enum {
    KIB = 1024,
    CODE_SIZE = 64 * KIB,    /* vectors first */
    TABLES_SIZE = 448 * KIB,
    DATA_SIZE = 512 * KIB,
    RAM_SIZE = CODE_SIZE + TABLES_SIZE + DATA_SIZE,
    PROGRAM = 0x1000,
    PROGRAM_WORDS = 512,
    ISLAND_SIZE = 16 * KIB,
    VCPUS = 3
};
#define RAM UINT64_C(0x40000000)
#define TABLES (RAM + CODE_SIZE)
#define DATA (TABLES + TABLES_SIZE)
#define ISLAND UINT64_C(0x80000000)
#define GUARD (UINT64_C(16) << 30)
enum { READ = 1, WRITE = 2, EXEC = 4 };
enum { CANCELED, EXCEPTION, VTIMER, UNKNOWN };
enum { PC = 31, FPCR, FPSR, CPSR };
#define SYSREG(op0, op1, crn, crm, op2) ((op0) << 14 | (op1) << 11 | (crn) << 7 | (crm) << 3 | (op2))
enum {
    SCTLR = SYSREG(3, 0, 1, 0, 0), CPACR = SYSREG(3, 0, 1, 0, 2), TTBR0 = SYSREG(3, 0, 2, 0, 0),
    TTBR1 = SYSREG(3, 0, 2, 0, 1), TCR = SYSREG(3, 0, 2, 0, 2), SPSR = SYSREG(3, 0, 4, 0, 0),
    ELR = SYSREG(3, 0, 4, 0, 1), SP_EL0 = SYSREG(3, 0, 4, 1, 0), ESR = SYSREG(3, 0, 5, 2, 0),
    FAR = SYSREG(3, 0, 6, 0, 0), PAR = SYSREG(3, 0, 7, 4, 0), MAIR = SYSREG(3, 0, 10, 2, 0),
    VBAR = SYSREG(3, 0, 12, 0, 0), CONTEXTIDR = SYSREG(3, 0, 13, 0, 1), TPIDR_EL1 = SYSREG(3, 0, 13, 0, 4),
    TPIDR_EL0 = SYSREG(3, 3, 13, 0, 2), SP_EL1 = SYSREG(3, 4, 4, 1, 0)
};

static const uint16_t compared[] = {SCTLR, CPACR, TTBR0, TTBR1, TCR,  SPSR,       ELR,       SP_EL0,   ESR,
                                    FAR,   PAR,   MAIR,  VBAR,  CONTEXTIDR, TPIDR_EL1, TPIDR_EL0, SP_EL1};
enum { COMPARED = sizeof compared / sizeof *compared };

static uint8_t *ram, *island; /* each alone between guards */

static uint8_t *alone(size_t size) {
    uint8_t *all = mmap(NULL, 2 * GUARD + size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED || mprotect(all + GUARD, size, PROT_READ | PROT_WRITE)) {
        perror("mmap");
        exit(2);
    }
    return all + GUARD;
}

/* What a vCPU starts with; and a case. */
struct start {
    uint64_t x[31], sp[2], pc, cpsr, fpcr, v[32][2];
};
struct testcase {
    struct start start[VCPUS];
    uint64_t sctlr, tcr, ttbr[2], mair, cpacr;
    uint8_t ram[RAM_SIZE];
};
static struct testcase the_case;

/* ---- Page tables ------------------------------------------------------------------------------------------------ */

struct space { /* a half of the address space */
    unsigned granule, input;
    uint64_t root;
    bool upper;
};
static uint64_t next_table;

static uint64_t *entry_at(uint64_t pa) { return (uint64_t *)(the_case.ram + (pa - RAM)); }

static uint64_t new_table(unsigned granule) {
    uint64_t size = UINT64_C(1) << granule, at = (next_table + size - 1) & ~(size - 1);
    if (at + size > DATA)
        return TABLES + TABLES_SIZE - size; /* full: tables on top of each other are welcome, too */
    next_table = at + size;
    return at;
}

static void map_page(struct space *s, uint64_t va, uint64_t pa, uint64_t attributes, unsigned last) {
    unsigned stride = s->granule - 3, level = 4 - (s->input - s->granule + stride - 1) / stride;
    unsigned shift = s->granule + (3 - level) * stride;
    uint64_t table = s->root, mask = (UINT64_C(1) << (s->input - shift)) - 1;
    for (;; level++) {
        uint64_t *entry = entry_at(table) + (va >> shift & mask & ((UINT64_C(1) << stride) - 1));
        if (level == 3 || level == last) {
            *entry = (pa & ~((UINT64_C(1) << shift) - 1)) | attributes | (level == 3 ? 3 : 1);
            return;
        }
        if ((*entry & 3) != 3)
            *entry = new_table(s->granule) | 3;
        table = *entry & UINT64_C(0xfffffffff000) & ~((UINT64_C(1) << s->granule) - 1);
        if (table < TABLES || table >= DATA)
            return; /* an entry of another level, seen as a table */
        shift -= stride;
        mask = (UINT64_C(1) << stride) - 1;
    }
}

static uint64_t attributes(struct dice *d) {
    /* AF, SH, AP, nG, UXN, PXN; index 0 is normal memory */
    return (chance(d, 95) ? 1 << 10 : 0) | below(d, 4) << 8 | below(d, 4) << 6 | below(d, 2) << 11 |
           (chance(d, 70) ? 0 : below(d, 8) << 2) | below(d, 4) << 53;
}

static uint64_t somewhere(struct dice *d) { /* a physical address */
    switch (below(d, 10)) {
    case 0: return ISLAND + below(d, ISLAND_SIZE);
    case 1: return UINT64_C(0x09000000) + below(d, 0x2000); /* nobody's: a device */
    case 2: return roll(d) & ((UINT64_C(1) << 44) - 1);
    case 3: return RAM + below(d, RAM_SIZE);
    default: return DATA + below(d, DATA_SIZE);
    }
}

enum { PAGES = 32 };
static uint64_t pages[PAGES]; /* virtual addresses that are mapped to something */

static void make_tables(struct dice *d) {
    struct testcase *t = &the_case;
    static const uint8_t granules[] = {12, 14, 16}, tg0[] = {0, 2, 1}, tg1[] = {2, 1, 3};
    unsigned which[2] = {(unsigned)below(d, 3), (unsigned)below(d, 3)};
    next_table = TABLES;
    t->tcr = roll(d) & UINT64_C(0x0061a0cf00000000) & ~(UINT64_C(7) << 32); /* E0PD, TBI, AS ... */
    t->tcr |= UINT64_C(2) << 32; /* 40-bit addresses */
    struct space spaces[2];
    for (unsigned upper = 0; upper < 2; upper++) {
        struct space *s = &spaces[upper];
        s->upper = upper;
        s->granule = granules[which[upper]];
        s->input = 32 + (unsigned)below(d, 17);
        s->root = new_table(s->granule);
        t->ttbr[upper] = s->root | below(d, 4) << 48;
        t->tcr |= (uint64_t)(64 - s->input) << (upper ? 16 : 0) | below(d, 64) << (upper ? 24 : 8);
    }
    t->tcr |= (uint64_t)tg0[which[0]] << 14 | (uint64_t)tg1[which[1]] << 30;
    if (chance(d, 10))
        t->tcr ^= UINT64_C(1) << below(d, 60);
    /* Code where it lies, readable by EL0, executable by both. */
    uint64_t step = UINT64_C(1) << spaces[0].granule;
    for (uint64_t pa = RAM; pa < RAM + CODE_SIZE; pa += step)
        map_page(&spaces[0], pa, pa, 1 << 10 | 3 << 8 | 3 << 6, 3);
    for (unsigned i = 0; i < PAGES; i++) {
        struct space *s = &spaces[below(d, 2)];
        uint64_t va = roll(d) & ((UINT64_C(1) << s->input) - 1);
        if (i & 1 && chance(d, 70)) /* the neighbour of the one before, for accesses across both */
            va = pages[i - 1] & ((UINT64_C(1) << s->input) - 1), va += UINT64_C(1) << s->granule, va &= (UINT64_C(1) << s->input) - 1;
        if (va - RAM < CODE_SIZE && !s->upper)
            va += CODE_SIZE;
        pages[i] = s->upper ? va | ~((UINT64_C(1) << s->input) - 1) : va;
        map_page(s, va, chance(d, 50) ? DATA + below(d, DATA_SIZE) : somewhere(d), attributes(d),
                 chance(d, 80) ? 3 : 1 + (unsigned)below(d, 2));
    }
    if (chance(d, 30))
        for (unsigned i = below(d, 4); i--;)
            *entry_at(TABLES + below(d, next_table - TABLES) / 8 * 8) = chance(d, 50) ? roll(d) : somewhere(d) | below(d, 4);
}

/* ---- Programs --------------------------------------------------------------------------------------------------- */

static softhv_insn_t rows[4096];
static uint32_t row_count;

static uint32_t small_branch(struct dice *d, uint32_t word) {
    int32_t offset = (int32_t)below(d, 24) + 1;
    if (chance(d, 8))
        offset = -offset;
    if ((word >> 26 & 0x1f) == 5) /* B, BL */
        return (word & 0xfc000000) | ((uint32_t)offset & 0x3ffffff);
    if (word >> 24 == 0x54 || (word >> 25 & 0x3f) == 0x1a) /* B.cond, CBZ */
        return (word & 0xff00001f) | ((uint32_t)offset & 0x7ffff) << 5;
    if ((word >> 25 & 0x3f) == 0x1b) /* TBZ */
        return (word & 0xfff8001f) | ((uint32_t)offset & 0x3fff) << 5;
    return word;
}

static bool reads_time(uint32_t word) { /* MRS and MSR of CRn 14, timers and counters, and of what the host changes */
    return (word & 0xffd00000) == 0xd5100000 && (word >> 12 & 15) == 14;
}

static uint32_t instruction(struct dice *d, bool replayable) {
    for (;;) {
        uint32_t word;
        if (chance(d, 5)) {
            word = (uint32_t)roll(d);
        } else {
            const softhv_insn_t *row = &rows[below(d, row_count)];
            word = row->value | ((uint32_t)roll(d) & ~row->mask);
        }
        word = small_branch(d, word);
        if (replayable && reads_time(word))
            continue;
        if ((word & 0xffe0001f) == 0xd4000002 && chance(d, 90)) /* HVC ends a case: few of them */
            continue;
        return word;
    }
}

static uint64_t pointer(struct dice *d) {
    uint64_t at = chance(d, 85) ? pages[below(d, PAGES)] : somewhere(d);
    switch (below(d, 5)) {
    case 0: return (at | 0xfff) + 1 - below(d, 80); /* about the end of a page */
    case 1: return at & ~UINT64_C(0x3f);
    case 2: return at & ~UINT64_C(0xf);
    case 3: return at ^ (chance(d, 10) ? UINT64_C(1) << below(d, 64) : 0);
    default: return at;
    }
}

static uint64_t number(struct dice *d) {
    switch (below(d, 6)) {
    case 0: return below(d, 256);
    case 1: return UINT64_C(0) - below(d, 256);
    case 2: return UINT64_C(1) << below(d, 64);
    case 3: return RAM + PROGRAM + 4 * below(d, PROGRAM_WORDS); /* to jump to */
    default: return roll(d);
    }
}

static void make_start(struct dice *d, struct start *s) {
    static const uint16_t modes[] = {0x3c5, 0x3c5, 0x3c5, 0x3c4, 0x3c0, 0x3c0, 0x005};
    for (unsigned i = 0; i < 31; i++)
        s->x[i] = chance(d, 60) ? pointer(d) : number(d);
    s->sp[0] = pointer(d) & ~UINT64_C(15);
    s->sp[1] = pointer(d) & ~UINT64_C(15);
    s->pc = RAM + PROGRAM + 4 * below(d, PROGRAM_WORDS / 4);
    s->cpsr = modes[below(d, 7)] | (uint64_t)below(d, 16) << 28 | (chance(d, 20) ? 1 << 22 : 0);
    s->fpcr = chance(d, 60) ? 0 : roll(d) & 0x07c80000;
    for (unsigned i = 0; i < 64; i++)
        s->v[i / 2][i % 2] = chance(d, 30) ? UINT64_C(0x3ff0000000000000) * below(d, 3) : roll(d);
}

static void make_case(struct dice *d, bool replayable) {
    struct testcase *t = &the_case;
    memset(t->ram, 0, sizeof t->ram);
    for (uint32_t at = 0; at < PROGRAM; at += 4)
        memcpy(t->ram + at, &(uint32_t){0xd4000022}, 4); /* vectors: HVC #1 */
    make_tables(d);
    for (unsigned i = 0; i < PROGRAM_WORDS; i++)
        memcpy(t->ram + PROGRAM + 4 * i, &(uint32_t){instruction(d, replayable)}, 4);
    memcpy(t->ram + PROGRAM + 4 * PROGRAM_WORDS, &(uint32_t){0xd4000002}, 4);
    for (uint64_t at = DATA - RAM; at < RAM_SIZE; at += 8)
        memcpy(t->ram + at, &(uint64_t){chance(d, 50) ? pointer(d) : roll(d)}, 8);
    static const uint64_t mairs[] = {0xff, 0xff44, 0x00bbff44ff0400ff, 0xffffffffffffffff};
    t->mair = chance(d, 90) ? mairs[below(d, 4)] : roll(d);
    t->sctlr = 0x30d00800 | 1 << 2 | 1 << 12 | (chance(d, 85) ? 1 : 0) | (roll(d) & 0x0495c21a);
    t->cpacr = chance(d, 85) ? 3 << 20 : below(d, 4) << 20;
    for (unsigned i = 0; i < VCPUS; i++)
        make_start(d, &t->start[i]);
}

/* ---- The watchdog ----------------------------------------------------------------------------------------------- */

static _Atomic uint64_t running[VCPUS], run_began[VCPUS]; /* handles, or 0; in milliseconds */
static _Atomic uint64_t *shared_seed;
#define the_seed (*shared_seed)
enum { KICK_MS = 4, HANG_MS = 60000 };

static uint64_t now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

static void *watch(void *unused) {
    (void)unused;
    for (;;) {
        usleep(1000);
        for (unsigned i = 0; i < VCPUS; i++) {
            hv_vcpu_t vcpu = running[i];
            uint64_t took = now_ms() - run_began[i];
            if (vcpu && took >= KICK_MS)
                hv_vcpus_exit(&vcpu, 1);
            if (vcpu && running[i] == vcpu && took >= HANG_MS && now_ms() - run_began[i] >= HANG_MS) {
                fprintf(stderr, "a kick did not end the guest: seed %#llx\n", (unsigned long long)the_seed);
                abort();
            }
        }
    }
}

static hv_return_t watched_run(hv_vcpu_t vcpu, unsigned slot) {
    run_began[slot] = now_ms();
    running[slot] = vcpu;
    hv_return_t result = hv_vcpu_run(vcpu);
    running[slot] = 0;
    return result;
}

/* ---- Running ---------------------------------------------------------------------------------------------------- */

struct result {
    bool kicked;
    unsigned exits;
    uint64_t trail; /* of the exits */
    uint64_t regs[35], v[32][2], sys[COMPARED], memory;
};

static uint64_t mix(uint64_t hash, uint64_t value) {
    hash = (hash ^ value) * UINT64_C(0xff51afd7ed558ccd);
    return hash ^ hash >> 32;
}

static void fail(const char *what, uint64_t detail) {
    fprintf(stderr, "%s (%#llx): seed %#llx\n", what, (unsigned long long)detail, (unsigned long long)the_seed);
    exit(1);
}

static void must(hv_return_t result, const char *what) {
    if (result)
        fail(what, (uint32_t)result);
}

static uint64_t get(hv_vcpu_t vcpu, unsigned reg) {
    uint64_t value = 0;
    hv_vcpu_get_reg(vcpu, reg, &value);
    return value;
}
static uint64_t get_sys(hv_vcpu_t vcpu, uint16_t reg) {
    uint64_t value = 0;
    hv_vcpu_get_sys_reg(vcpu, reg, &value);
    return value;
}

/* What the host does with an exit. False: the case ends. */
static bool serve(hv_vcpu_t vcpu, const hv_vcpu_exit_t *exit) {
    uint64_t esr = exit->exception.syndrome, pc = get(vcpu, PC);
    switch (esr >> 26) {
    case 0x16: { /* HVC: #1 is the vectors' */
        if ((esr & 0xffff) != 1)
            return false;
        uint64_t spsr = get_sys(vcpu, SPSR);
        if (hv_vcpu_set_reg(vcpu, CPSR, spsr)) /* an illegal one, by the guest's own hand */
            return false;
        hv_vcpu_set_reg(vcpu, PC, get_sys(vcpu, ELR) + 4);
        return true;
    }
    case 0x24: /* a device: any value will do */
        if (esr >> 24 & 1 && !(esr >> 6 & 1) && (esr >> 16 & 31) != 31)
            hv_vcpu_set_reg(vcpu, esr >> 16 & 31, exit->exception.physical_address * 0x9e3779b97f4a7c15);
        break;
    case 0x01: /* WFI, WFE */
    case 0x17: /* SMC */
    case 0x18: /* the GIC's registers */
        break;
    default:
        return false;
    }
    hv_vcpu_set_reg(vcpu, PC, pc + 4);
    return true;
}

static void prepare(hv_vcpu_t vcpu, const struct start *s) {
    const struct testcase *t = &the_case;
    const struct { uint16_t reg; uint64_t value; } sys[] = {
        {VBAR, RAM}, {CPACR, t->cpacr}, {MAIR, t->mair}, {TCR, t->tcr}, {TTBR0, t->ttbr[0]}, {TTBR1, t->ttbr[1]},
        {SCTLR, t->sctlr}, {SP_EL0, s->sp[0]}, {SP_EL1, s->sp[1]},
    };
    for (unsigned i = 0; i < sizeof sys / sizeof *sys; i++)
        must(hv_vcpu_set_sys_reg(vcpu, sys[i].reg, sys[i].value), "hv_vcpu_set_sys_reg failed");
    for (unsigned i = 0; i < 31; i++)
        hv_vcpu_set_reg(vcpu, i, s->x[i]);
    must(hv_vcpu_set_reg(vcpu, CPSR, s->cpsr), "hv_vcpu_set_reg failed");
    hv_vcpu_set_reg(vcpu, FPCR, s->fpcr);
    hv_vcpu_set_reg(vcpu, PC, s->pc);
    for (unsigned i = 0; i < 32; i++) {
        hv_simd_fp_uchar16_t value;
        memcpy(&value, s->v[i], 16);
        hv_vcpu_set_simd_fp_reg(vcpu, i, value);
    }
}

static void map_all(bool locked) {
    must(hv_vm_map(ram, RAM, CODE_SIZE, READ | EXEC | (locked ? 0 : WRITE)), "hv_vm_map failed");
    must(hv_vm_map(ram + CODE_SIZE, TABLES, TABLES_SIZE, READ | EXEC | (locked ? 0 : WRITE)), "hv_vm_map failed");
    must(hv_vm_map(ram + CODE_SIZE + TABLES_SIZE, DATA, DATA_SIZE, READ | WRITE | (locked ? 0 : EXEC)), "hv_vm_map failed");
    must(hv_vm_map(island, ISLAND, ISLAND_SIZE, READ | WRITE | EXEC), "hv_vm_map failed");
}

static softhv_vm_t *new_vm(uint32_t threshold, size_t limit) {
    softhv_vm_t *vm = softhv_vm_new();
    if (!vm)
        fail("softhv_vm_new failed", 0);
    softhv_vm_bind(vm);
    must(hv_vm_create(NULL), "hv_vm_create failed");
    softhv_vm_set_jit(vm, threshold, limit); /* there may be no JIT on this host */
    return vm;
}

static void free_vm(softhv_vm_t *vm) {
    must(hv_vm_destroy(), "hv_vm_destroy failed");
    softhv_vm_bind(NULL);
    must(softhv_vm_free(vm), "softhv_vm_free failed");
}

static void run_guest(unsigned slot, unsigned rounds, struct result *result) {
    hv_vcpu_t vcpu;
    hv_vcpu_exit_t *exit;
    must(hv_vcpu_create(&vcpu, &exit, NULL), "hv_vcpu_create failed");
    prepare(vcpu, &the_case.start[slot]);
    while (result->exits++ < rounds) {
        must(watched_run(vcpu, slot), "hv_vcpu_run failed");
        if (exit->reason > UNKNOWN)
            fail("an exit for no reason", exit->reason);
        if (exit->reason == CANCELED) {
            result->kicked = true;
            break;
        }
        if (exit->reason == VTIMER) {
            hv_vcpu_set_vtimer_mask(vcpu, false);
            continue;
        }
        result->trail = mix(result->trail, exit->exception.syndrome);
        result->trail = mix(result->trail, exit->exception.virtual_address);
        result->trail = mix(result->trail, exit->exception.physical_address);
        result->trail = mix(result->trail, get(vcpu, PC));
        if (!serve(vcpu, exit))
            break;
    }
    for (unsigned i = 0; i < 35; i++)
        result->regs[i] = get(vcpu, i);
    for (unsigned i = 0; i < 32; i++) {
        hv_simd_fp_uchar16_t value;
        hv_vcpu_get_simd_fp_reg(vcpu, i, &value);
        memcpy(result->v[i], &value, 16);
    }
    for (unsigned i = 0; i < COMPARED; i++)
        result->sys[i] = get_sys(vcpu, compared[i]);
    must(hv_vcpu_destroy(vcpu), "hv_vcpu_destroy failed");
}

static void load(void) {
    memcpy(ram, the_case.ram, RAM_SIZE);
    memset(island, 0x5a, ISLAND_SIZE);
}

static void run_one(uint32_t threshold, size_t limit, bool locked, unsigned rounds, struct result *result) {
    load();
    softhv_vm_t *vm = new_vm(threshold, limit);
    map_all(locked);
    *result = (struct result){0};
    run_guest(0, rounds, result);
    free_vm(vm);
    for (uint64_t at = 0; at < RAM_SIZE; at += 8)
        result->memory = mix(result->memory, *(uint64_t *)(ram + at));
    for (uint64_t at = 0; at < ISLAND_SIZE; at += 8)
        result->memory = mix(result->memory, *(uint64_t *)(island + at));
}

static void compare(const struct result *a, const struct result *b) {
    for (unsigned i = 0; i < 35; i++)
        if (a->regs[i] != b->regs[i])
            fprintf(stderr, "register %u: interpreted %#llx, compiled %#llx\n", i, (unsigned long long)a->regs[i],
                    (unsigned long long)b->regs[i]);
    for (unsigned i = 0; i < 64; i++)
        if (a->v[i / 2][i % 2] != b->v[i / 2][i % 2])
            fprintf(stderr, "v%u[%u]: interpreted %#llx, compiled %#llx\n", i / 2, i % 2,
                    (unsigned long long)a->v[i / 2][i % 2], (unsigned long long)b->v[i / 2][i % 2]);
    for (unsigned i = 0; i < COMPARED; i++)
        if (a->sys[i] != b->sys[i])
            fprintf(stderr, "system register %#x: interpreted %#llx, compiled %#llx\n", compared[i],
                    (unsigned long long)a->sys[i], (unsigned long long)b->sys[i]);
    if (a->exits != b->exits || a->trail != b->trail)
        fprintf(stderr, "exits: interpreted %u, compiled %u\n", a->exits, b->exits);
    if (memcmp(a, b, sizeof *a))
        fail("interpreter and compiled code differ", a->memory ^ b->memory);
}

/* ---- Several vCPUs, and a map that changes ---------------------------------------------------------------------- */

struct crowd {
    softhv_vm_t *vm;
    unsigned slot;
};

static void *one_of_many(void *argument) {
    struct crowd *crowd = argument;
    struct result result = {0};
    softhv_vm_bind(crowd->vm);
    run_guest(crowd->slot, 20, &result);
    softhv_vm_bind(NULL);
    return NULL;
}

static void run_crowd(struct dice *d, uint32_t threshold, size_t limit) {
    load();
    softhv_vm_t *vm = new_vm(threshold, limit);
    if (chance(d, 30))
        softhv_vm_set_turns(vm, true);
    map_all(false);
    pthread_t threads[VCPUS];
    struct crowd crowd[VCPUS];
    for (unsigned i = 0; i < VCPUS; i++) {
        crowd[i] = (struct crowd){vm, i};
        pthread_create(&threads[i], NULL, one_of_many, &crowd[i]);
    }
    for (unsigned i = below(d, 20); i--;) {
        uint64_t page = DATA + below(d, DATA_SIZE / (16 * KIB)) * 16 * KIB;
        switch (below(d, 4)) {
        case 0: softhv_invalidate(vm, RAM + below(d, RAM_SIZE), below(d, 0x4000)); break;
        case 1: hv_vm_protect(page, 16 * KIB, below(d, 8)); break;
        case 2:
            if (!hv_vm_unmap(page, 16 * KIB))
                hv_vm_map(ram + (page - RAM), page, 16 * KIB, READ | WRITE | EXEC);
            break;
        default: usleep(100);
        }
    }
    for (unsigned i = 0; i < VCPUS; i++)
        pthread_join(threads[i], NULL);
    free_vm(vm);
}

/* ---- Cases ------------------------------------------------------------------------------------------------------ */

static unsigned long compared_count, kicked_count, free_count, crowd_count, exit_count;

static void run_case(uint64_t seed) {
    struct dice d = {seed};
    the_seed = seed;
    unsigned kind = (unsigned)below(&d, 10);
    size_t limit = chance(&d, 30) ? 1 << 16 : 0;
    uint32_t threshold = (uint32_t)below(&d, 3);
    make_case(&d, kind < 6);
    if (kind < 6) {
        struct result interpreted, compiled;
        run_one(SOFTHV_NO_JIT, 0, true, 40, &interpreted);
        if (!interpreted.kicked)
            run_one(threshold, limit, true, 40, &compiled);
        exit_count += interpreted.exits;
        if (interpreted.kicked || compiled.kicked) {
            kicked_count++; /* a loop: where a kick meets it is chance */
            return;
        }
        compare(&interpreted, &compiled);
        compared_count++;
    } else if (kind < 9) {
        struct result result;
        run_one(chance(&d, 30) ? SOFTHV_NO_JIT : threshold, limit, false, 40, &result);
        free_count++;
    } else {
        run_crowd(&d, chance(&d, 30) ? SOFTHV_NO_JIT : threshold, limit);
        crowd_count++;
    }
}

/* The cases run in a child: however that dies, its parent tells the seed. */
static void in_a_child(void) {
    shared_seed = mmap(NULL, sizeof *shared_seed, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pid_t child = fork();
    if (shared_seed == MAP_FAILED || child < 0) {
        perror("fork");
        exit(2);
    }
    if (!child) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        return;
    }
    int status;
    waitpid(child, &status, 0);
    if (status)
        fprintf(stderr, "ended with status %#x in seed %#llx\n", (unsigned)status, (unsigned long long)the_seed);
    exit(status ? 1 : 0);
}

int main(int argc, char **argv) {
    unsigned long count = 0, seconds = 0;
    uint64_t from = 1;
    in_a_child();
    ram = alone(RAM_SIZE);
    island = alone(ISLAND_SIZE);
    while (softhv_insn(row_count, &rows[row_count]))
        row_count++;
    pthread_t watchdog;
    pthread_create(&watchdog, NULL, watch, NULL);
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--count") && i + 1 < argc)
            count = strtoul(argv[++i], NULL, 0);
        else if (!strcmp(argv[i], "--seconds") && i + 1 < argc)
            seconds = strtoul(argv[++i], NULL, 0);
        else if (!strcmp(argv[i], "--from") && i + 1 < argc)
            from = strtoull(argv[++i], NULL, 0);
        else if (!strcmp(argv[i], "--escape")) /* that the guards guard */
            ((volatile uint8_t *)ram)[RAM_SIZE + strtoull(argv[++i], NULL, 0)] = 1;
        else
            run_case(strtoull(argv[i], NULL, 0));
    }
    uint64_t end = now_ms() + seconds * 1000;
    for (unsigned long i = 0; i < count || (seconds && now_ms() < end); i++)
        run_case(from + i);
    printf("%lu compared, %lu kicked, %lu free, %lu crowds, %lu exits\n", compared_count, kicked_count, free_count,
           crowd_count, exit_count);
    return 0;
}
