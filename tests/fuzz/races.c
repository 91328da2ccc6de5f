/*
 * vCPUs side by side under ThreadSanitizer, which sees every access that the engine's C makes but those to guest memory
 * (guest_copy() in engine.h): the guest's own races are the guest's affair.
 *
 *     races [--seconds S] [--plant]
 *
 * The vCPUs of a round contend with exclusives and atomics, change page tables that all use, rewrite a function that all
 * call, and send events; host threads kick them, invalidate code, change the memory map and read counters meanwhile; the
 * vCPUs come and go. Both counters the guest keeps must be exact in the end. --plant makes a race, which must be found.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "hv.h"
#include "softhv/softhv.h"

enum { VCPUS = 4, PAGE = 0x1000, ROUND_MS = 400, HANG_S = 120 };
#define RAM UINT64_C(0x40000000)
enum { /* in RAM */
    VECTORS = 0, LOOP = 0x1000, FUNCTION = 0x2000, ROOT = 0x10000, LEVEL2 = 0x11000, LEVEL3 = 0x12000,
    EXCLUSIVE = 0x20000, ATOMIC = 0x20040, CODE_SIZE = 0x80000, DATA = 0x80000, DATA_SIZE = 0x10000,
    RAM_SIZE = CODE_SIZE + DATA_SIZE
};
#define DEVICE UINT64_C(0x80000000) /* mapped and unmapped all the time */
enum { DATA_PAGE = 0x703 /* AF, Inner Shareable, read and write at EL1 */, MAP_SIZE = 0x4000 };
enum { READ = 1, WRITE = 2, EXEC = 4, CANCELED = 0, EXCEPTION = 1, UNKNOWN = 3, PC = 31, CPSR = 34 };
#define SYSREG(op0, op1, crn, crm, op2) ((op0) << 14 | (op1) << 11 | (crn) << 7 | (crm) << 3 | (op2))
enum {
    SCTLR = SYSREG(3, 0, 1, 0, 0), TTBR0 = SYSREG(3, 0, 2, 0, 0), TCR = SYSREG(3, 0, 2, 0, 2),
    SPSR = SYSREG(3, 0, 4, 0, 0), ELR = SYSREG(3, 0, 4, 0, 1), MAIR = SYSREG(3, 0, 10, 2, 0),
    VBAR = SYSREG(3, 0, 12, 0, 0), CPACR = SYSREG(3, 0, 1, 0, 2)
};

/* An access that faults is skipped: pages are away at times. */
static const uint32_t skip[] = {
    0xd5384034, /* mrs x20, elr_el1 */
    0x91001294, /* add x20, x20, #4 */
    0xd5184034, /* msr elr_el1, x20 */
    0xd69f03e0, /* eret */
};

/* x9 own page, x10 and x11 counters, x12 own page's entry, x13 function, x14 another's page, x21 1, x23 rounds */
static const uint32_t loop[] = {
    0xc85ffd42, /* again: ldaxr x2, [x10] */
    0x91000442, /* add x2, x2, #1 */
    0xc803fd42, /* stlxr w3, x2, [x10] */
    0x35ffffa3, /* cbnz w3, again */
    0xf8f50164, /* ldaddal x21, x4, [x11] */
    0x910006f7, /* add x23, x23, #1 */
    0xf900019f, /* str xzr, [x12] */
    0xd5033a9f, /* dsb ishst */
    0xd5088331, /* tlbi vae1is, x17 */
    0xd5033b9f, /* dsb ish */
    0xd5033fdf, /* isb */
    0xf9000190, /* str x16, [x12] */
    0xd5033a9f, /* dsb ishst */
    0xf9400126, /* ldr x6, [x9] */
    0xf94001c6, /* ldr x6, [x14] */
    0xa9011dc6, /* stp x6, x7, [x14, #16] */
    0xd50b742e, /* dc zva, x14 */
    0xb90001b2, /* str w18, [x13] */
    0xd50b7b2d, /* dc cvau, x13 */
    0xd5033b9f, /* dsb ish */
    0xd50b752d, /* ic ivau, x13 */
    0xd5033b9f, /* dsb ish */
    0xd5033fdf, /* isb */
    0xd63f01a0, /* blr x13 */
    0xb90001b3, /* str w19, [x13] */
    0xd50b7b2d, /* dc cvau, x13 */
    0xd5033b9f, /* dsb ish */
    0xd50b752d, /* ic ivau, x13 */
    0xd5033b9f, /* dsb ish */
    0xd5033fdf, /* isb */
    0xd63f01a0, /* blr x13 */
    0xd503209f, /* sev */
    0xd503205f, /* wfe */
    0xd503203f, /* yield */
    0xd50342df, /* msr daifset, #2 */
    0xd50342ff, /* msr daifclr, #2 */
    0x3dc001c1, /* ldr q1, [x14] */
    0x4c0079c1, /* st1 {v1.4s}, [x14] */
    0x910006d6, /* add x22, x22, #1 */
    0xf24016df, /* tst x22, #63 */
    0x54fffb01, /* b.ne again */
    0xd508831f, /* tlbi vmalle1is */
    0xd5033b9f, /* dsb ish */
    0xd508711f, /* ic ialluis */
    0xd5033b9f, /* dsb ish */
    0xd508835f, /* tlbi aside1is, xzr */
    0xd5033b9f, /* dsb ish */
    0xd503205f, /* wfe */
    0xd4000002, /* hvc #0 */
    0x17ffffcf, /* b again */
};
static const uint32_t function[] = {0x91000718 /* add x24, x24, #1 */, 0xd65f03c0 /* ret */};
enum { OTHER_FUNCTION = 0x91000b18 /* add x24, x24, #2 */ };

/* Bursts of TLBI, each vCPU waiting for the others, and then nothing that leaves the guest until the host writes [x11]. */
static const uint32_t burst[] = {
    0xd28003c8, /* again: mov x8, #30 */
    0xd508831f, /* next: tlbi vmalle1is */
    0xd5033b9f, /* dsb ish */
    0xf1000508, /* subs x8, x8, #1 */
    0x54ffffa1, /* b.ne next */
    0xf9400166, /* wait: ldr x6, [x11] */
    0xeb0700df, /* cmp x6, x7 */
    0x54ffffc0, /* b.eq wait */
    0xaa0603e7, /* mov x7, x6 */
    0xb10004df, /* cmn x6, #1 */
    0x54fffec1, /* b.ne again */
    0xd4000002, /* hvc #0 */
    0x17fffff4, /* b again */
};
enum { BURST = 0x3000, BURSTS = 300 };

static uint8_t *ram, *device;
static softhv_vm_t *vm;
static bool with_faults, plant, bursting;
static _Atomic bool stop, done;
static _Atomic uint64_t handles[VCPUS];
static const hv_vcpu_exit_t *_Atomic planted;
static _Atomic uint64_t lives, exits, skipped, rounds_run;

static void must(bool good, const char *what) {
    if (!good) {
        fprintf(stderr, "%s\n", what);
        _exit(1);
    }
}

static void put(uint64_t at, uint64_t value) { memcpy(ram + at, &value, 8); }

static void load(void) {
    memset(ram, 0, RAM_SIZE);
    memcpy(ram + VECTORS + 0x200, skip, sizeof skip);
    memcpy(ram + LOOP, loop, sizeof loop);
    memcpy(ram + FUNCTION, function, sizeof function);
    memcpy(ram + BURST, burst, sizeof burst);
    put(ROOT + 8, (RAM + LEVEL2) | 3);
    put(LEVEL2, (RAM + LEVEL3) | 3);
    for (uint64_t at = 0; at < RAM_SIZE; at += PAGE)
        put(LEVEL3 + at / PAGE * 8, (RAM + at) | DATA_PAGE);
}

/* ---- A vCPU, from one life to the next --------------------------------------------------------------------------- */

struct state {
    uint64_t reg[35]; /* X0 to X30, PC, FPCR, FPSR, CPSR */
    uint64_t elr, spsr;
};

static void start(struct state *s, unsigned index) {
    uint64_t page = DATA + index * PAGE, other = DATA + (index + 1) % VCPUS * PAGE;
    *s = (struct state){0};
    s->reg[9] = RAM + page;
    s->reg[10] = RAM + EXCLUSIVE;
    s->reg[11] = RAM + ATOMIC;
    s->reg[12] = RAM + LEVEL3 + page / PAGE * 8;
    s->reg[13] = RAM + FUNCTION;
    s->reg[14] = RAM + other;
    s->reg[16] = (RAM + page) | DATA_PAGE;
    s->reg[17] = (RAM + page) >> 12;
    s->reg[18] = OTHER_FUNCTION;
    s->reg[19] = function[0];
    s->reg[21] = 1;
    s->reg[PC] = RAM + (bursting ? BURST : LOOP);
    s->reg[CPSR] = 0x3c5;
}

static void into(hv_vcpu_t vcpu, const struct state *s) {
    const struct { uint16_t reg; uint64_t value; } sys[] = {
        {VBAR, RAM + VECTORS}, {MAIR, 0xff}, {TTBR0, RAM + ROOT}, {TCR, UINT64_C(2) << 32 | 1 << 23 | 25},
        {CPACR, 3 << 20}, {ELR, s->elr}, {SPSR, s->spsr}, {SCTLR, 0x30d00801},
    };
    for (unsigned i = 0; i < sizeof sys / sizeof *sys; i++)
        must(!hv_vcpu_set_sys_reg(vcpu, sys[i].reg, sys[i].value), "hv_vcpu_set_sys_reg failed");
    for (unsigned i = 0; i < 35; i++)
        must(!hv_vcpu_set_reg(vcpu, i, s->reg[i]), "hv_vcpu_set_reg failed");
}

static void out_of(hv_vcpu_t vcpu, struct state *s) {
    for (unsigned i = 0; i < 35; i++)
        hv_vcpu_get_reg(vcpu, i, &s->reg[i]);
    hv_vcpu_get_sys_reg(vcpu, ELR, &s->elr);
    hv_vcpu_get_sys_reg(vcpu, SPSR, &s->spsr);
}

/* Until a kick, now and then; false: until the guest was asked to stop, and came to the end of its loop. */
static bool live(unsigned index, struct state *s) {
    hv_vcpu_t vcpu;
    hv_vcpu_exit_t *exit;
    must(!hv_vcpu_create(&vcpu, &exit, NULL), "hv_vcpu_create failed");
    into(vcpu, s);
    handles[index] = vcpu;
    lives++;
    if (plant && !index)
        planted = exit;
    bool more = true;
    for (unsigned kicks = 0; more && (plant || kicks < 8);) { /* a planted exit lives as long as the round */
        must(!hv_vcpu_run(vcpu), "hv_vcpu_run failed");
        exits++;
        if (exit->reason == CANCELED || exit->reason == UNKNOWN) {
            kicks++;
            continue;
        }
        must(exit->reason == EXCEPTION, "an exit for no reason");
        unsigned ec = exit->exception.syndrome >> 26;
        if (ec == 0x16) {
            more = !stop;
            continue;
        }
        if (ec != 0x01 && ec != 0x24) {
            fprintf(stderr, "syndrome %#llx\n", (unsigned long long)exit->exception.syndrome);
            _exit(1);
        }
        skipped += ec == 0x24;
        uint64_t pc;
        hv_vcpu_get_reg(vcpu, PC, &pc);
        hv_vcpu_set_reg(vcpu, PC, pc + 4);
    }
    if (!index)
        planted = NULL;
    out_of(vcpu, s);
    must(!hv_vcpu_destroy(vcpu), "hv_vcpu_destroy failed");
    return more;
}

struct seat {
    unsigned index;
    struct state state;
};

static void *vcpu_thread(void *argument) {
    struct seat *seat = argument;
    softhv_vm_bind(vm);
    start(&seat->state, seat->index);
    while (live(seat->index, &seat->state))
        ;
    softhv_vm_bind(NULL);
    return NULL;
}

/* ---- The host's threads ------------------------------------------------------------------------------------------ */

static void kick(void) {
    hv_vcpu_t all[VCPUS];
    for (unsigned i = 0; i < VCPUS; i++)
        all[i] = handles[i];
    hv_vcpus_exit(all, VCPUS); /* some may be gone */
    usleep(2000);
}

static void count(void) {
    softhv_counters_t counters;
    softhv_fault_counts_t faults;
    for (unsigned i = 0; i < VCPUS; i++)
        softhv_vcpu_counters(handles[i], &counters);
    must(softhv_vm_fault_counts(vm, &faults) == 0 || !with_faults, "softhv_vm_fault_counts failed");
    usleep(100);
}

static void invalidate(void) {
    softhv_invalidate(vm, RAM + FUNCTION, 4);
    softhv_invalidate(vm, RAM, RAM_SIZE);
    usleep(500);
}

static void remap(void) {
    must(!hv_vm_map(device, DEVICE, MAP_SIZE, READ | WRITE), "hv_vm_map failed");
    must(!hv_vm_protect(RAM + DATA, MAP_SIZE, READ), "hv_vm_protect failed");
    must(!hv_vm_unmap(RAM + DATA, MAP_SIZE), "hv_vm_unmap failed");
    must(!hv_vm_map(ram + DATA, RAM + DATA, MAP_SIZE, READ | WRITE), "hv_vm_map failed");
    must(!hv_vm_unmap(DEVICE, MAP_SIZE), "hv_vm_unmap failed");
    usleep(1000);
}

static void (*const acts[])(void) = {kick, count, invalidate, remap};
enum { ACTS = sizeof acts / sizeof *acts };

static void *host_thread(void *argument) {
    void (*const *act)(void) = argument;
    softhv_vm_bind(vm);
    while (!done) {
        (*act)();
        const hv_vcpu_exit_t *exit = planted;
        if (exit && exit->reason > UNKNOWN) /* the owner writes it */
            must(false, "an exit for no reason");
    }
    softhv_vm_bind(NULL);
    return NULL;
}

/* ---- Rounds ------------------------------------------------------------------------------------------------------ */

static void begin(unsigned number) {
    alarm(HANG_S); /* ends a round that hangs */
    load();
    stop = done = false;
    vm = softhv_vm_new();
    softhv_vm_bind(vm);
    must(!hv_vm_create(NULL), "hv_vm_create failed");
    softhv_vm_set_jit(vm, number & 1 ? 0 : SOFTHV_NO_JIT, 0); /* there may be no JIT on this host */
    softhv_vm_set_turns(vm, number % 4 == 2);
    with_faults = number % 4 == 3;
    if (with_faults)
        softhv_vm_faults(vm, &(softhv_faults_t){.seed = number, .spurious_wfi = 1, .double_kick = 0.1, .unknown = 0.01,
                                                .lose_kick = 0.1, .late_kick_ns = 100000});
    must(!hv_vm_map(ram, RAM, CODE_SIZE, READ | WRITE | EXEC), "hv_vm_map failed");
    must(!hv_vm_map(ram + DATA, RAM + DATA, DATA_SIZE, READ | WRITE), "hv_vm_map failed");
}

static void end(void) {
    must(!hv_vm_destroy(), "hv_vm_destroy failed");
    softhv_vm_bind(NULL);
    must(!softhv_vm_free(vm), "softhv_vm_free failed");
}

/* The memory map changes while all wait for each other; nobody kicks, so a vCPU that overlooks it hangs the round. */
static void stops(unsigned number) {
    struct seat seats[VCPUS];
    pthread_t vcpus[VCPUS];
    bursting = true;
    begin(number & 1);
    stop = true; /* one HVC, and that is it */
    for (unsigned i = 0; i < VCPUS; i++) {
        seats[i].index = i;
        pthread_create(&vcpus[i], NULL, vcpu_thread, &seats[i]);
    }
    for (uint64_t i = 1; i <= BURSTS; i++) {
        __atomic_store_n((uint64_t *)(ram + ATOMIC), i < BURSTS ? i : UINT64_MAX, __ATOMIC_RELAXED);
        for (unsigned wait = i * 37 % 1000; wait--;)
            atomic_thread_fence(memory_order_seq_cst);
        must(!hv_vm_map(device, DEVICE, MAP_SIZE, READ | WRITE), "hv_vm_map failed");
        must(!hv_vm_unmap(DEVICE, MAP_SIZE), "hv_vm_unmap failed");
    }
    for (unsigned i = 0; i < VCPUS; i++)
        pthread_join(vcpus[i], NULL);
    end();
    bursting = false;
}

static void a_round(unsigned number) {
    struct seat seats[VCPUS];
    pthread_t vcpus[VCPUS], host[ACTS];
    begin(number);
    for (unsigned i = 0; i < VCPUS; i++) {
        seats[i].index = i;
        pthread_create(&vcpus[i], NULL, vcpu_thread, &seats[i]);
    }
    for (unsigned i = 0; i < ACTS; i++)
        pthread_create(&host[i], NULL, host_thread, (void *)&acts[i]);
    usleep(ROUND_MS * 1000);
    stop = true;
    uint64_t rounds = 0, exclusive, atomic;
    for (unsigned i = 0; i < VCPUS; i++) {
        pthread_join(vcpus[i], NULL);
        rounds += seats[i].state.reg[23];
    }
    done = true;
    for (unsigned i = 0; i < ACTS; i++)
        pthread_join(host[i], NULL);
    planted = NULL;
    memcpy(&exclusive, ram + EXCLUSIVE, 8);
    memcpy(&atomic, ram + ATOMIC, 8);
    rounds_run += rounds;
    if (!rounds || exclusive != rounds || atomic != rounds) {
        fprintf(stderr, "round %u: %llu times, exclusives counted %llu, atomics %llu\n", number,
                (unsigned long long)rounds, (unsigned long long)exclusive, (unsigned long long)atomic);
        exit(1);
    }
    end();
}

int main(int argc, char **argv) {
    long seconds = 10;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--seconds") && i + 1 < argc)
            seconds = strtol(argv[++i], NULL, 0);
        else if (!strcmp(argv[i], "--plant"))
            plant = true;
    }
    ram = mmap(NULL, RAM_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    device = mmap(NULL, MAP_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(ram != MAP_FAILED && device != MAP_FAILED, "mmap failed");
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    time_t end = now.tv_sec + seconds;
    unsigned number = 0;
    do {
        stops(number);
        a_round(number++);
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while (number < 4 || now.tv_sec < end);
    printf("%u rounds, %llu loops, %llu exits, %llu of them aborts, %llu lives\n", number, (unsigned long long)rounds_run,
           (unsigned long long)exits, (unsigned long long)skipped, (unsigned long long)lives);
    return 0;
}
