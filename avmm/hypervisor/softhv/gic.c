/*
 * hv_gic_*: a GICv3 inside the engine (Arm IHI 0069), for a VM that asks for one before it has vCPUs.
 *
 * What avmm/devices/gicv3 does outside, with the same registers: SGIs, PPIs, SPIs; level and edge; 32 priority levels;
 * affinity and 1-of-N routing; both EOI modes; group 1 on the IRQ input; no LPIs. Here the registers are served inside
 * hv_vcpu_run, PPI 27 follows the virtual timer, and a WFI waits inside.
 *
 * One lock. Under it no other is taken; handles_lock and vm->lock may be held when it is.
 */
#define _GNU_SOURCE
#include "../wait.h"
#include "engine.h"

#include <stdlib.h>

enum { INTIDS = 256, WORDS = INTIDS / 32, PRIVATE = 32, SPURIOUS = 1023, VTIMER = 27 };
enum { PRIORITY_MASK = 0xf8, IDLE_PRIORITY = 0xff };
enum { GROUP0 = 1, GROUP1 = 2 };
enum { MIN_BPR0 = 2, MIN_BPR1 = 3 }; /* for five priority bits (4.8.2) */
enum { FRAME = 0x10000, GICD_SIZE = FRAME, GICR_STRIDE = 2 * FRAME };
#define ROUTER_IRM (UINT64_C(1) << 31)
#define ROUTER_MASK UINT64_C(0xff80ffffff)

/* 32 INTIDs, a bit for each. A level-sensitive interrupt is pending by its line or its latch, an edge by the latch. */
struct bank {
    uint32_t line, latch, edge, enabled, active, group;
    uint8_t priority[32];
};

struct gic_cpu {
    struct gic *gic;
    struct vcpu *vcpu; /* NULL: no such redistributor */
    uint32_t affinity;
    bool asleep; /* GICR_WAKER.ProcessorSleep */
    struct bank own;
    uint8_t pmr, bpr0, bpr1, enables;
    bool cbpr, eoi_split;
    uint32_t ap0, ap1;
    /* Derived: the highest priority pending interrupt. */
    uint32_t highest;
    unsigned priority;
    _Atomic bool irq; /* the IRQ output */
    bool timer;       /* the level of PPI 27; its vCPU's thread alone writes it */
    bool waiting;     /* in a WFI: */
    pthread_cond_t wake;
};

struct gic {
    pthread_mutex_t lock;
    uint64_t distributor, redistributors; /* guest physical addresses */
    _Atomic uint32_t slots;               /* of cpus[], one past the last that is used */
    uint8_t enables;                      /* GICD_CTLR.EnableGrp0 and 1 */
    struct bank shared[WORDS];            /* the first is unused */
    uint64_t router[INTIDS];
    struct gic_cpu *target[INTIDS];
    struct gic_cpu cpus[VCPU_MAX];
};

struct hv_gic_config_s {
    uint64_t distributor, redistributors;
};

uint8_t gic_registers[1]; /* its address alone means something: see engine.h */

/* ---- Which interrupt is next ------------------------------------------------------------------------------------- */

static uint32_t pending(const struct bank *bank) { return bank->latch | (bank->line & ~bank->edge); }

static struct bank *bank_of(struct gic_cpu *cpu, uint32_t intid) {
    return intid < PRIVATE ? &cpu->own : &cpu->gic->shared[intid / 32];
}

static unsigned mask0(const struct gic_cpu *cpu) { return 0xff & -(2u << cpu->bpr0); }
/* Group 1 has a split one bit lower than the number says, or group 0's where CBPR is set (4.8.2). */
static unsigned mask1(const struct gic_cpu *cpu) { return cpu->cbpr ? mask0(cpu) : 0xff & -(1u << cpu->bpr1); }

static unsigned running(const struct gic_cpu *cpu) {
    uint32_t active = cpu->ap0 | cpu->ap1;
    return active ? (unsigned)__builtin_ctz(active) << 3 : IDLE_PRIORITY;
}

static uint32_t in_groups(const struct bank *bank, uint8_t groups) {
    return (groups & GROUP1 ? bank->group : 0) | (groups & GROUP0 ? ~bank->group : 0);
}

static unsigned highest_group(struct gic_cpu *cpu) {
    if (cpu->highest == SPURIOUS)
        return 0;
    return bank_of(cpu, cpu->highest)->group >> cpu->highest % 32 & 1 ? GROUP1 : GROUP0;
}

static void evaluate(struct gic_cpu *cpu) {
    struct gic *gic = cpu->gic;
    uint8_t groups = cpu->enables & gic->enables;
    cpu->highest = SPURIOUS;
    cpu->priority = IDLE_PRIORITY;
    for (uint32_t word = 0; groups && word < WORDS; word++) {
        const struct bank *bank = bank_of(cpu, word * 32);
        uint32_t ready = pending(bank) & bank->enabled & ~bank->active & in_groups(bank, groups);
        for (; ready; ready &= ready - 1) { /* equal priorities: the lowest INTID wins */
            uint32_t bit = (uint32_t)__builtin_ctz(ready), intid = word * 32 + bit;
            if ((intid < PRIVATE || gic->target[intid] == cpu) && bank->priority[bit] < cpu->priority) {
                cpu->highest = intid;
                cpu->priority = bank->priority[bit];
            }
        }
    }
    bool irq = highest_group(cpu) == GROUP1 && cpu->priority < cpu->pmr && (cpu->priority & mask1(cpu)) < running(cpu);
    if (irq == atomic_load(&cpu->irq))
        return;
    atomic_store(&cpu->irq, irq);
    if (cpu->vcpu)
        atomic_fetch_or(&cpu->vcpu->poll, POLL_GIC);
    if (cpu->waiting && irq)
        pthread_cond_signal(&cpu->wake);
}

static void evaluate_all(struct gic *gic) {
    for (uint32_t i = 0; i < gic->slots; i++)
        evaluate(&gic->cpus[i]);
}

static void set_line(struct bank *bank, uint32_t bit, bool level) {
    if (level == !!(bank->line & bit))
        return;
    bank->line ^= bit;
    if (level)
        bank->latch |= bank->edge & bit;
}

static uint32_t acknowledge(struct gic_cpu *cpu, uint32_t *active_priorities, unsigned mask) {
    uint32_t intid = cpu->highest, bit = 1u << intid % 32;
    struct bank *bank = bank_of(cpu, intid);
    *active_priorities |= 1u << (cpu->priority & mask) / 8;
    bank->active |= bit; /* a level-sensitive one stays pending underneath while its line is high */
    bank->latch &= ~bit;
    evaluate(cpu);
    return intid;
}

static void deactivate(struct gic_cpu *cpu, uint32_t intid) {
    bank_of(cpu, intid)->active &= ~(1u << intid % 32);
    if (intid >= PRIVATE && cpu->gic->target[intid] && cpu->gic->target[intid] != cpu)
        evaluate(cpu->gic->target[intid]);
    evaluate(cpu);
}

/* ---- Routing ----------------------------------------------------------------------------------------------------- */

static struct gic_cpu *by_affinity(struct gic *gic, uint32_t affinity) {
    for (uint32_t i = 0; i < gic->slots; i++)
        if (gic->cpus[i].vcpu && gic->cpus[i].affinity == affinity)
            return &gic->cpus[i];
    return NULL;
}

/* Any one that is awake and has the interrupt's group enabled (3.2.3); by number, so that it stays where it is. */
static struct gic_cpu *any_of(struct gic *gic, uint32_t intid) {
    uint8_t group = gic->shared[intid / 32].group >> intid % 32 & 1 ? GROUP1 : GROUP0;
    uint32_t pool[VCPU_MAX], count = 0;
    for (uint32_t i = 0; i < gic->slots; i++)
        if (gic->cpus[i].vcpu && !gic->cpus[i].asleep && gic->cpus[i].enables & group)
            pool[count++] = i;
    return count ? &gic->cpus[pool[intid % count]] : NULL;
}

static void route(struct gic *gic, uint32_t intid) {
    uint64_t to = gic->router[intid];
    gic->target[intid] = to & ROUTER_IRM ? any_of(gic, intid)
                                         : by_affinity(gic, (uint32_t)(to >> 8 & 0xff000000) | (to & 0xffffff));
}

/* The vCPUs, or who of them takes part in 1-of-N, have changed. */
static void route_all(struct gic *gic) {
    for (uint32_t intid = PRIVATE; intid < INTIDS; intid++)
        route(gic, intid);
    evaluate_all(gic);
}

/* ---- Memory-mapped registers (12.8 to 12.11) --------------------------------------------------------------------- */

/* Of the distributor (`cpu` NULL) or of a redistributor's SGI frame, which has the layout of its first 32 INTIDs. */
static struct bank *registers_of(struct gic *gic, struct gic_cpu *cpu, uint32_t word) {
    if (cpu)
        return word == 0 ? &cpu->own : NULL;
    return word && word < WORDS ? &gic->shared[word] : NULL;
}

static uint32_t spread(uint32_t bits) { /* 16 bits to the odd ones of 32: ICFGR's */
    uint32_t word = 0;
    for (unsigned n = 0; n < 16; n++)
        word |= (bits >> n & 1) << (2 * n + 1);
    return word;
}

static uint32_t gather(uint32_t word) {
    uint32_t bits = 0;
    for (unsigned n = 0; n < 16; n++)
        bits |= (word >> (2 * n + 1) & 1) << n;
    return bits;
}

static uint64_t bank_read(struct gic *gic, struct gic_cpu *cpu, uint32_t offset, unsigned size) {
    if (offset >= 0x400 && offset < 0x800) {
        uint64_t value = 0;
        for (unsigned i = 0; i < size; i++) {
            const struct bank *bank = registers_of(gic, cpu, (offset - 0x400 + i) / 32);
            value |= bank ? (uint64_t)bank->priority[(offset + i) % 32] << 8 * i : 0;
        }
        return value;
    }
    if (size != 4)
        return 0;
    if (offset >= 0x080 && offset < 0x400) {
        const struct bank *bank = registers_of(gic, cpu, (offset & 0x7f) / 4);
        if (!bank)
            return 0;
        switch (offset >> 7) {
        case 1: return bank->group;
        case 2:
        case 3: return bank->enabled;
        case 4:
        case 5: return pending(bank);
        default: return bank->active;
        }
    }
    if (offset >= 0xc00 && offset < 0xd00) {
        const struct bank *bank = registers_of(gic, cpu, (offset & 0xff) / 8);
        return bank ? spread(bank->edge >> (offset & 4) * 4 & 0xffff) : 0;
    }
    return 0;
}

static void bank_write(struct gic *gic, struct gic_cpu *cpu, uint32_t offset, unsigned size, uint64_t value) {
    if (offset >= 0x400 && offset < 0x800) {
        for (unsigned i = 0; i < size; i++) {
            struct bank *bank = registers_of(gic, cpu, (offset - 0x400 + i) / 32);
            if (bank)
                bank->priority[(offset + i) % 32] = value >> 8 * i & PRIORITY_MASK;
        }
        return;
    }
    if (size != 4)
        return;
    uint32_t bits = (uint32_t)value;
    if (offset >= 0x080 && offset < 0x400) {
        struct bank *bank = registers_of(gic, cpu, (offset & 0x7f) / 4);
        if (!bank)
            return;
        switch (offset >> 7) {
        case 1: bank->group = bits; break;
        case 2: bank->enabled |= bits; break;
        case 3: bank->enabled &= ~bits; break;
        case 4: bank->latch |= bits; break;
        case 5: bank->latch &= ~bits; break;
        case 6: bank->active |= bits; break;
        default: bank->active &= ~bits;
        }
    } else if (offset >= 0xc00 && offset < 0xd00) {
        uint32_t word = (offset & 0xff) / 8, shift = (offset & 4) * 4;
        struct bank *bank = registers_of(gic, cpu, word);
        if (bank && (word || shift)) /* SGIs are edges, for good (2.2) */
            bank->edge = (bank->edge & ~(UINT32_C(0xffff) << shift)) | gather(bits) << shift;
    }
}

/* 12.1.4, as a GIC of Arm's; PIDR2.ArchRev is 3. `pidr0` tells the two apart. */
static uint32_t identification(uint32_t offset, uint32_t pidr0) {
    switch (offset) {
    case 0xffd0: return 0x44;
    case 0xffe0: return pidr0;
    case 0xffe4: return 0xb4;
    case 0xffe8: return 0x3b;
    case 0xfff0: return 0x0d;
    case 0xfff4: return 0xf0;
    case 0xfff8: return 0x05;
    case 0xfffc: return 0xb1;
    default: return 0;
    }
}
enum { IIDR = 0x0000043b, GICD_PIDR0 = 0x92, GICR_PIDR0 = 0x93, IROUTER = 0x6000 };

/* The part of a 64-bit register that `size` bytes at `offset` are. */
static uint64_t part(uint64_t value, uint32_t offset, unsigned size) {
    return size == 8 ? value : size == 4 ? (uint32_t)(value >> (offset & 4) * 8) : 0;
}

static uint64_t distributor_read(struct gic *gic, uint32_t offset, unsigned size) {
    if (offset >= 0x080 && offset < 0xd00)
        return bank_read(gic, NULL, offset, size);
    if (offset >= IROUTER && offset < IROUTER + 8 * INTIDS)
        return part(gic->router[(offset - IROUTER) / 8], offset, size);
    if (size != 4)
        return 0;
    switch (offset) {
    case 0x0000: return 1 << 6 | 1 << 4 | gic->enables; /* DS, ARE: one security state, affinity routing only */
    case 0x0004: return 1 << 24 | 9 << 19 | (WORDS - 1); /* A3V; ten bits of INTID */
    case 0x0008: return IIDR;
    default: return identification(offset, GICD_PIDR0);
    }
}

static void distributor_write(struct gic *gic, uint32_t offset, unsigned size, uint64_t value) {
    if (offset >= 0x080 && offset < 0xd00) {
        bank_write(gic, NULL, offset, size, value);
        if (offset < 0x100) /* 1-of-N participation is by group */
            route_all(gic);
    } else if (offset >= IROUTER + 8 * PRIVATE && offset < IROUTER + 8 * INTIDS && size >= 4) {
        uint32_t intid = (offset - IROUTER) / 8, shift = (offset & 4) * 8;
        uint64_t mask = size == 8 ? UINT64_MAX : UINT64_C(0xffffffff) << shift;
        gic->router[intid] = ((gic->router[intid] & ~mask) | (value << shift & mask)) & ROUTER_MASK;
        route(gic, intid);
    } else if (offset == 0x0000 && size == 4) {
        gic->enables = value & 3;
    }
    evaluate_all(gic);
}

static uint64_t redistributor_typer(struct gic_cpu *cpu) {
    uint64_t index = (uint64_t)(cpu - cpu->gic->cpus);
    return (uint64_t)cpu->affinity << 32 | index << 8 | (uint64_t)(index + 1 == cpu->gic->slots) << 4;
}

static uint64_t redistributor_read(struct gic_cpu *cpu, uint32_t offset, unsigned size) {
    if (offset >= FRAME) {
        offset -= FRAME;
        return offset >= 0x080 && offset < 0xd00 ? bank_read(cpu->gic, cpu, offset, size) : 0;
    }
    if (offset >= 0x0008 && offset < 0x0010)
        return part(redistributor_typer(cpu), offset, size);
    if (size != 4)
        return 0;
    switch (offset) {
    case 0x0004: return IIDR;
    case 0x0014: return cpu->asleep ? 6 : 0; /* ChildrenAsleep follows ProcessorSleep at once */
    default: return identification(offset, GICR_PIDR0);
    }
}

static void redistributor_write(struct gic_cpu *cpu, uint32_t offset, unsigned size, uint64_t value) {
    if (offset >= FRAME + 0x080 && offset < FRAME + 0xd00) {
        bank_write(cpu->gic, cpu, offset - FRAME, size, value);
        evaluate(cpu);
    } else if (offset == 0x0014 && size == 4) {
        cpu->asleep = value >> 1 & 1;
        route_all(cpu->gic);
    }
}

bool gic_has(const struct vcpu *c, uint64_t pa) {
    const struct gic *gic = c->gic->gic;
    return pa - gic->distributor < GICD_SIZE ||
           pa - gic->redistributors < (uint64_t)atomic_load(&gic->slots) * GICR_STRIDE;
}

/* ---- The vCPU's side --------------------------------------------------------------------------------------------- */

/* The lock is held. PPI 27 is the virtual timer's output. */
static void follow_timer(struct vcpu *c) {
    struct gic_cpu *cpu = c->gic;
    bool level = vtimer_due(c);
    if (level == cpu->timer)
        return;
    cpu->timer = level;
    set_line(&cpu->own, 1u << VTIMER, level);
    evaluate(cpu);
}

static struct gic *enter(struct vcpu *c) {
    struct gic *gic = c->gic->gic;
    pthread_mutex_lock(&gic->lock);
    follow_timer(c);
    return gic;
}

static void leave(struct vcpu *c) {
    pthread_mutex_unlock(&c->gic->gic->lock);
    c->irq_line = atomic_load(&c->gic->irq); /* where it is up, POLL_GIC is set */
}

/* At most 8 bytes within a page. */
void gic_read(struct vcpu *c, uint64_t pa, unsigned size, void *out) {
    struct gic *gic = enter(c);
    uint64_t value, at = pa - gic->redistributors;
    if (pa - gic->distributor < GICD_SIZE)
        value = distributor_read(gic, (uint32_t)(pa - gic->distributor), size);
    else
        value = redistributor_read(&gic->cpus[at / GICR_STRIDE], at % GICR_STRIDE, size);
    leave(c);
    memcpy(out, &value, size);
}

void gic_write(struct vcpu *c, uint64_t pa, unsigned size, const void *in) {
    uint64_t value = 0;
    memcpy(&value, in, size);
    struct gic *gic = enter(c);
    uint64_t at = pa - gic->redistributors;
    if (pa - gic->distributor < GICD_SIZE)
        distributor_write(gic, (uint32_t)(pa - gic->distributor), size, value);
    else
        redistributor_write(&gic->cpus[at / GICR_STRIDE], at % GICR_STRIDE, size, value);
    leave(c);
}

void gic_poll(struct vcpu *c) {
    struct gic_cpu *cpu = c->gic;
    if (vtimer_due(c) != cpu->timer) {
        enter(c);
        leave(c);
    }
    if (atomic_load(&c->poll) & POLL_GIC)
        atomic_fetch_and(&c->poll, ~(uint32_t)POLL_GIC); /* before the look: what comes later sets it again */
    c->irq_line = atomic_load(&cpu->irq);
}

bool gic_wait(struct vcpu *c) {
    enum { LONG = 1 << 30 }; /* ticks: nobody minds a look once in a while */
    struct gic_cpu *cpu = c->gic;
    guest_leave(c);
    struct gic *gic = enter(c);
    cpu->waiting = true;
    while (!atomic_load(&cpu->irq) && !(atomic_load(&c->poll) & POLL_EXIT)) {
        if ((c->sys.cntv_ctl & 3) == 1 && !cpu->timer) {
            uint64_t counter = guest_counter(c), left = c->sys.cntv_cval - counter;
            if (counter < c->sys.cntv_cval) {
                cond_wait_until(&cpu->wake, &gic->lock, host_ns() + (left < LONG ? left : LONG) * 125 / 3 + 1);
            }
            follow_timer(c);
        } else {
            pthread_cond_wait(&cpu->wake, &gic->lock);
        }
    }
    cpu->waiting = false;
    leave(c);
    return guest_enter(c);
}

void gic_wake(struct vcpu *c) {
    struct gic *gic = c->gic->gic;
    pthread_mutex_lock(&gic->lock);
    if (c->gic->waiting)
        pthread_cond_signal(&c->gic->wake);
    pthread_mutex_unlock(&gic->lock);
}

/* ---- The CPU interface: ICC_*_EL1 (12.2) ------------------------------------------------------------------------- */

enum {
    ICC_PMR = SYSREG(3, 0, 4, 6, 0), ICC_IAR0 = SYSREG(3, 0, 12, 8, 0), ICC_EOIR0 = SYSREG(3, 0, 12, 8, 1),
    ICC_HPPIR0 = SYSREG(3, 0, 12, 8, 2), ICC_BPR0 = SYSREG(3, 0, 12, 8, 3), ICC_AP0R0 = SYSREG(3, 0, 12, 8, 4),
    ICC_AP1R0 = SYSREG(3, 0, 12, 9, 0), ICC_DIR = SYSREG(3, 0, 12, 11, 1), ICC_RPR = SYSREG(3, 0, 12, 11, 3),
    ICC_SGI1R = SYSREG(3, 0, 12, 11, 5), ICC_ASGI1R = SYSREG(3, 0, 12, 11, 6), ICC_SGI0R = SYSREG(3, 0, 12, 11, 7),
    ICC_IAR1 = SYSREG(3, 0, 12, 12, 0), ICC_EOIR1 = SYSREG(3, 0, 12, 12, 1), ICC_HPPIR1 = SYSREG(3, 0, 12, 12, 2),
    ICC_BPR1 = SYSREG(3, 0, 12, 12, 3), ICC_CTLR = SYSREG(3, 0, 12, 12, 4), ICC_SRE = SYSREG(3, 0, 12, 12, 5),
    ICC_IGRPEN0 = SYSREG(3, 0, 12, 12, 6), ICC_IGRPEN1 = SYSREG(3, 0, 12, 12, 7)
};

static uint32_t acknowledge0(struct gic_cpu *cpu) {
    if (highest_group(cpu) != GROUP0 || cpu->priority >= cpu->pmr || (cpu->priority & mask0(cpu)) >= running(cpu))
        return SPURIOUS;
    return acknowledge(cpu, &cpu->ap0, mask0(cpu));
}

static bool icc_read(struct gic_cpu *cpu, uint32_t reg, uint64_t *value) {
    switch (reg) {
    case ICC_IAR1: *value = atomic_load(&cpu->irq) ? acknowledge(cpu, &cpu->ap1, mask1(cpu)) : SPURIOUS; break;
    case ICC_IAR0: *value = acknowledge0(cpu); break;
    case ICC_HPPIR0: *value = highest_group(cpu) == GROUP0 ? cpu->highest : SPURIOUS; break;
    case ICC_HPPIR1: *value = highest_group(cpu) == GROUP1 ? cpu->highest : SPURIOUS; break;
    case ICC_RPR: *value = running(cpu); break;
    case ICC_PMR: *value = cpu->pmr; break;
    case ICC_BPR0: *value = cpu->bpr0; break;
    case ICC_BPR1: *value = !cpu->cbpr ? cpu->bpr1 : cpu->bpr0 < 7 ? cpu->bpr0 + 1u : 7; break;
    case ICC_AP0R0: *value = cpu->ap0; break;
    case ICC_AP1R0: *value = cpu->ap1; break;
    case ICC_CTLR: *value = 1 << 15 | 4 << 8 | (uint64_t)cpu->eoi_split << 1 | cpu->cbpr; break; /* A3V, PRIbits */
    case ICC_SRE: *value = 7; break; /* system registers only */
    case ICC_IGRPEN0: *value = cpu->enables & 1; break;
    case ICC_IGRPEN1: *value = cpu->enables >> 1; break;
    default: return false;
    }
    return true;
}

/* The running priority drops. An EOI that does not match its group is UNPREDICTABLE (4.6.1): ignored whole. */
static void end(struct gic_cpu *cpu, unsigned group, uint32_t intid) {
    uint32_t active = cpu->ap0 | cpu->ap1, lowest = active & -active;
    if (intid >= INTIDS || !lowest || group != (cpu->ap0 & lowest ? GROUP0 : GROUP1))
        return;
    *(group == GROUP0 ? &cpu->ap0 : &cpu->ap1) ^= lowest;
    if (cpu->eoi_split)
        evaluate(cpu);
    else
        deactivate(cpu, intid);
}

static void receive_sgi(struct gic_cpu *cpu, uint32_t bit, unsigned group) {
    /* 4.8.7: the register's group must be the one that the target has this SGI in. */
    if (!cpu || !cpu->vcpu || (cpu->own.group & bit ? GROUP1 : GROUP0) != group)
        return;
    cpu->own.latch |= bit;
    evaluate(cpu);
}

static void send_sgi(struct gic_cpu *from, uint64_t value, unsigned group) {
    struct gic *gic = from->gic;
    uint32_t bit = 1u << (value >> 24 & 15);
    if (value >> 40 & 1) { /* IRM: all others */
        for (uint32_t i = 0; i < gic->slots; i++)
            if (&gic->cpus[i] != from)
                receive_sgi(&gic->cpus[i], bit, group);
        return;
    }
    uint32_t first = (uint32_t)(value >> 48 & 0xff) << 24 | (uint32_t)(value >> 32 & 0xff) << 16 |
                     (uint32_t)(value >> 16 & 0xff) << 8 | (uint32_t)(value >> 44 & 15) << 4;
    for (uint32_t list = value & 0xffff; list; list &= list - 1)
        receive_sgi(by_affinity(gic, first | (uint32_t)__builtin_ctz(list)), bit, group);
}

static void enable_group(struct gic_cpu *cpu, unsigned group, bool enable) {
    cpu->enables = (uint8_t)(enable ? cpu->enables | group : cpu->enables & ~group);
    route_all(cpu->gic);
}

static uint8_t at_least(uint64_t value, uint8_t least) { return (value & 7) < least ? least : value & 7; }

static bool icc_write(struct gic_cpu *cpu, uint32_t reg, uint64_t value) {
    uint32_t intid = value & 0xffffff;
    switch (reg) {
    case ICC_EOIR1: end(cpu, GROUP1, intid); return true;
    case ICC_EOIR0: end(cpu, GROUP0, intid); return true;
    case ICC_SGI1R: send_sgi(cpu, value, GROUP1); return true;
    case ICC_SGI0R: send_sgi(cpu, value, GROUP0); return true;
    case ICC_DIR: /* UNPREDICTABLE with EOImode clear: ignored */
        if (cpu->eoi_split && intid < INTIDS)
            deactivate(cpu, intid);
        return true;
    case ICC_ASGI1R: /* the other security state's group 1 does not exist */
    case ICC_SRE: return true;
    case ICC_IGRPEN0: enable_group(cpu, GROUP0, value & 1); return true;
    case ICC_IGRPEN1: enable_group(cpu, GROUP1, value & 1); return true;
    case ICC_PMR: cpu->pmr = value & PRIORITY_MASK; break;
    case ICC_BPR0: cpu->bpr0 = at_least(value, MIN_BPR0); break;
    case ICC_BPR1: cpu->bpr1 = cpu->cbpr ? cpu->bpr1 : at_least(value, MIN_BPR1); break;
    case ICC_AP0R0: cpu->ap0 = (uint32_t)value; break;
    case ICC_AP1R0: cpu->ap1 = (uint32_t)value; break;
    case ICC_CTLR:
        cpu->cbpr = value & 1;
        cpu->eoi_split = value >> 1 & 1;
        break;
    default: return false;
    }
    evaluate(cpu);
    return true;
}

bool gic_mrs(struct vcpu *c, uint32_t reg, uint64_t *value) {
    enter(c);
    bool known = icc_read(c->gic, reg, value);
    leave(c);
    return known;
}

bool gic_msr(struct vcpu *c, uint32_t reg, uint64_t value) {
    enter(c);
    bool known = icc_write(c->gic, reg, value);
    leave(c);
    return known;
}

/* ---- Life -------------------------------------------------------------------------------------------------------- */

static void reset_bank(struct bank *bank, uint32_t edge) { /* lines are inputs, and keep their levels */
    *bank = (struct bank){.line = bank->line, .edge = edge};
}

static void reset_cpu(struct gic_cpu *cpu) {
    reset_bank(&cpu->own, 0xffff); /* SGIs are edges */
    cpu->pmr = cpu->enables = 0;
    cpu->cbpr = cpu->eoi_split = false;
    cpu->ap0 = cpu->ap1 = 0;
    cpu->bpr0 = MIN_BPR0;
    cpu->bpr1 = MIN_BPR1;
    cpu->asleep = true;
}

static void reset(struct gic *gic) {
    gic->enables = 0;
    for (uint32_t word = 1; word < WORDS; word++)
        reset_bank(&gic->shared[word], 0);
    memset(gic->router, 0, sizeof gic->router);
    for (uint32_t i = 0; i < VCPU_MAX; i++)
        reset_cpu(&gic->cpus[i]);
    route_all(gic);
}

void gic_join(struct vcpu *c, struct gic *gic) {
    pthread_mutex_lock(&gic->lock);
    struct gic_cpu *cpu = gic->cpus; /* there are as many as vCPUs may be */
    while (cpu->vcpu)
        cpu++;
    cpu->vcpu = c;
    cpu->affinity = c->sys.mpidr & 0xffffff;
    cpu->timer = false;
    cpu->own.line = 0;
    reset_cpu(cpu);
    c->gic = cpu;
    uint32_t index = (uint32_t)(cpu - gic->cpus);
    if (index >= gic->slots)
        gic->slots = index + 1;
    route_all(gic);
    pthread_mutex_unlock(&gic->lock);
}

void gic_part(struct vcpu *c) {
    struct gic_cpu *cpu = c->gic;
    struct gic *gic = cpu->gic;
    pthread_mutex_lock(&gic->lock);
    cpu->vcpu = NULL;
    while (gic->slots && !gic->cpus[gic->slots - 1].vcpu)
        gic->slots--;
    route_all(gic);
    pthread_mutex_unlock(&gic->lock);
}

void gic_set_affinity(struct vcpu *c) {
    struct gic *gic = c->gic->gic;
    pthread_mutex_lock(&gic->lock);
    c->gic->affinity = (uint32_t)(c->sys.mpidr >> 8 & 0xff000000) | (c->sys.mpidr & 0xffffff);
    route_all(gic);
    pthread_mutex_unlock(&gic->lock);
}

void gic_destroy(struct gic *gic) {
    if (!gic)
        return;
    for (uint32_t i = 0; i < VCPU_MAX; i++)
        pthread_cond_destroy(&gic->cpus[i].wake);
    pthread_mutex_destroy(&gic->lock);
    free(gic);
}

static struct gic *gic_new(const struct hv_gic_config_s *config) {
    struct gic *gic = calloc(1, sizeof *gic);
    if (!gic)
        return NULL;
    gic->distributor = config->distributor;
    gic->redistributors = config->redistributors;
    pthread_mutex_init(&gic->lock, NULL);
    for (uint32_t i = 0; i < VCPU_MAX; i++) {
        gic->cpus[i].gic = gic;
        cond_init(&gic->cpus[i].wake);
    }
    reset(gic);
    return gic;
}

/* ---- hv_gic_* ---------------------------------------------------------------------------------------------------- */

static struct gic *current(void) {
    struct vm *vm = vm_current();
    return vm && vm->created ? vm->gic : NULL;
}

hv_gic_config_t hv_gic_config_create(void) { return calloc(1, sizeof(struct hv_gic_config_s)); }

static hv_return_t set_base(uint64_t *base, uint64_t address) {
    if (!address || address % FRAME)
        return HV_BAD_ARGUMENT;
    *base = address;
    return HV_SUCCESS;
}

hv_return_t hv_gic_config_set_distributor_base(hv_gic_config_t config, hv_ipa_t distributor_base_address) {
    return config ? set_base(&config->distributor, distributor_base_address) : HV_BAD_ARGUMENT;
}

hv_return_t hv_gic_config_set_redistributor_base(hv_gic_config_t config, hv_ipa_t redistributor_base_address) {
    return config ? set_base(&config->redistributors, redistributor_base_address) : HV_BAD_ARGUMENT;
}

hv_return_t hv_gic_create(hv_gic_config_t config) {
    struct vm *vm = vm_current();
    if (!vm || !vm->created)
        return HV_NO_DEVICE;
    if (!config || !config->distributor || !config->redistributors)
        return HV_BAD_ARGUMENT;
    uint64_t gap = config->redistributors - config->distributor;
    if (gap < GICD_SIZE || -gap < (uint64_t)VCPU_MAX * GICR_STRIDE) /* they would overlap */
        return HV_BAD_ARGUMENT;
    struct gic *gic = gic_new(config);
    if (!gic)
        return HV_NO_RESOURCES;
    pthread_mutex_lock(&vm->lock);
    bool busy = vm->vcpu_count || vm->gic;
    if (!busy)
        vm->gic = gic;
    pthread_mutex_unlock(&vm->lock);
    if (busy)
        gic_destroy(gic);
    return busy ? HV_BUSY : HV_SUCCESS;
}

hv_return_t hv_gic_reset(void) {
    struct gic *gic = current();
    if (!gic)
        return HV_NO_DEVICE;
    pthread_mutex_lock(&gic->lock);
    reset(gic);
    pthread_mutex_unlock(&gic->lock);
    return HV_SUCCESS;
}

hv_return_t hv_gic_get_spi_interrupt_range(uint32_t *spi_intid_base, uint32_t *spi_intid_count) {
    if (!spi_intid_base || !spi_intid_count)
        return HV_BAD_ARGUMENT;
    *spi_intid_base = PRIVATE;
    *spi_intid_count = INTIDS - PRIVATE;
    return HV_SUCCESS;
}

hv_return_t hv_gic_set_spi(uint32_t intid, bool level) {
    struct gic *gic = current();
    if (!gic)
        return HV_NO_DEVICE;
    if (intid < PRIVATE || intid >= INTIDS)
        return HV_BAD_ARGUMENT;
    pthread_mutex_lock(&gic->lock);
    set_line(&gic->shared[intid / 32], 1u << intid % 32, level);
    if (gic->target[intid])
        evaluate(gic->target[intid]);
    pthread_mutex_unlock(&gic->lock);
    return HV_SUCCESS;
}
