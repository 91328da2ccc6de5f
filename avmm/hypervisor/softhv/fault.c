/* Misbehaviour on demand: what a hypervisor may do to its user, at any rate, the same for the same seed. */
#define _GNU_SOURCE
#include "../wait.h"
#include "engine.h"

#include <stdlib.h>
#include <time.h>

struct faults {
    softhv_faults_t wanted;
    softhv_fault_counts_t counts; /* each word written with atomic adds */
    _Atomic uint64_t drawn;
    uint64_t began; /* host_ns() */
};

#define COUNT(f, what) __atomic_fetch_add(&(f)->counts.what, 1, __ATOMIC_RELAXED)

/* SplitMix64 over a counter, so that any thread may draw. */
static bool chance(struct faults *f, double probability) {
    if (probability <= 0)
        return false;
    uint64_t z = f->wanted.seed + (atomic_fetch_add(&f->drawn, 1) + 1) * UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return (double)((z ^ z >> 31) >> 11) * 0x1p-53 < probability;
}

static bool probability(double p) { return p >= 0 && p <= 1; }

hv_return_t softhv_vm_faults(softhv_vm_t *opaque, const softhv_faults_t *wanted) {
    struct vm *vm = (struct vm *)opaque;
    if (!vm || !wanted || !probability(wanted->spurious_wfi) || !probability(wanted->early_wfi) ||
        !probability(wanted->lose_kick) || !probability(wanted->double_kick) || !probability(wanted->unknown) ||
        !probability(wanted->double_vtimer))
        return HV_BAD_ARGUMENT;
    struct faults *f = calloc(1, sizeof *f);
    if (!f)
        return HV_NO_RESOURCES;
    f->wanted = *wanted;
    f->began = host_ns();
    pthread_mutex_lock(&vm->lock);
    bool busy = vm->vcpu_count || vm->faults;
    if (!busy)
        vm->faults = f;
    pthread_mutex_unlock(&vm->lock);
    if (busy)
        free(f);
    return busy ? HV_BUSY : HV_SUCCESS;
}

hv_return_t softhv_vm_fault_counts(softhv_vm_t *opaque, softhv_fault_counts_t *counts) {
    struct vm *vm = (struct vm *)opaque;
    if (!vm || !counts || !vm->faults)
        return HV_BAD_ARGUMENT;
    for (size_t i = 0; i < sizeof *counts / 8; i++)
        ((uint64_t *)counts)[i] = __atomic_load_n((const uint64_t *)&vm->faults->counts + i, __ATOMIC_RELAXED);
    return HV_SUCCESS;
}

bool fault_fast_counter(const struct vm *vm) { return vm->faults && vm->faults->wanted.fast_counter; }

/* The host was asleep for a while: its clock went on, nothing else did. */
static void sleep_with_host(struct faults *f) {
    if (!f->wanted.sleep_for_ns)
        return;
    uint64_t start = f->began + f->wanted.sleep_at_ns, end = start + f->wanted.sleep_for_ns, now = host_ns();
    if (now < start || now >= end)
        return;
    COUNT(f, host_sleeps);
    for (; now < end; now = host_ns()) {
        struct timespec left = {.tv_sec = (time_t)((end - now) / 1000000000), .tv_nsec = (long)((end - now) % 1000000000)};
        nanosleep(&left, NULL);
    }
}

static void deliver_late_kick(struct vcpu *c) {
    uint64_t due = atomic_load(&c->late_kick);
    if (due && host_ns() >= due && atomic_compare_exchange_strong(&c->late_kick, &due, 0))
        atomic_fetch_or(&c->poll, POLL_EXIT);
}

/* ---- Hooks: only where vm->faults is set ---------------------------------------------------------------------- */

bool fault_kick(struct vcpu *c) {
    struct faults *f = c->vm->faults;
    if (f->wanted.forget_kicks && !atomic_load(&c->running)) {
        COUNT(f, forgotten_kicks);
        return false;
    }
    if (chance(f, f->wanted.lose_kick)) {
        COUNT(f, lost_kicks);
        return false;
    }
    if (chance(f, f->wanted.double_kick))
        atomic_store(&c->kick_again, true);
    if (f->wanted.late_kick_ns) {
        uint64_t none = 0;
        if (atomic_compare_exchange_strong(&c->late_kick, &none, host_ns() + f->wanted.late_kick_ns))
            COUNT(f, late_kicks);
        return false;
    }
    return true;
}

bool fault_kicked_twice(struct vcpu *c) {
    if (!atomic_exchange(&c->kick_again, false))
        return false;
    COUNT(c->vm->faults, double_kicks);
    return true;
}

bool fault_entry(struct vcpu *c, hv_exit_reason_t *reason) {
    struct faults *f = c->vm->faults;
    sleep_with_host(f);
    deliver_late_kick(c);
    if (c->vtimer_again) {
        c->vtimer_again = false;
        c->vtimer_masked = true;
        COUNT(f, double_vtimers);
        *reason = HV_EXIT_REASON_VTIMER_ACTIVATED;
        return true;
    }
    if (chance(f, f->wanted.unknown)) {
        COUNT(f, unknowns);
        *reason = HV_EXIT_REASON_UNKNOWN;
        return true;
    }
    return false;
}

void fault_poll(struct vcpu *c) {
    sleep_with_host(c->vm->faults);
    deliver_late_kick(c);
}

static uint64_t ticks_to_ns(const struct vcpu *c, uint64_t ticks) { return c->fast_counter ? ticks : ticks * 125 / 3; }

bool fault_vtimer_waits(struct vcpu *c) {
    struct faults *f = c->vm->faults;
    if (ticks_to_ns(c, guest_counter(c) - c->sys.cntv_cval) < f->wanted.late_vtimer_ns) {
        if (!c->vtimer_held)
            COUNT(f, late_vtimers);
        c->vtimer_held = true;
        return true;
    }
    c->vtimer_held = false;
    c->vtimer_again = chance(f, f->wanted.double_vtimer);
    return false;
}

/* Stay inside hv_vcpu_run, out of the others' way, until there is something: a kick, the timer, an interrupt. */
static bool sleep_inside(struct vcpu *c) {
    struct vm *vm = c->vm;
    guest_leave(c);
    pthread_mutex_lock(&vm->lock);
    c->waiting = true;
    while (!(atomic_load(&c->poll) & POLL_EXIT) && !c->irq_line && !c->fiq_line) {
        deliver_late_kick(c);
        uint64_t until = atomic_load(&c->late_kick), now = host_ns();
        if ((c->sys.cntv_ctl & 3) == 1 && !c->vtimer_masked) {
            uint64_t counter = guest_counter(c); /* read once: it may pass CVAL any moment */
            if (counter >= c->sys.cntv_cval)
                break;
            uint64_t timer = now + ticks_to_ns(c, c->sys.cntv_cval - counter) + 1;
            until = until && until < timer ? until : timer;
        }
        if (until)
            cond_wait_until(&c->my_turn, &vm->lock, until);
        else
            pthread_cond_wait(&c->my_turn, &vm->lock);
    }
    c->waiting = false;
    pthread_mutex_unlock(&vm->lock);
    return guest_enter(c);
}

enum fault_wfi fault_wfi(struct vcpu *c, uint64_t after) {
    struct faults *f = c->vm->faults;
    if (chance(f, f->wanted.early_wfi)) {
        COUNT(f, early_wfis);
        return WFI_COMPLETES;
    }
    if (f->wanted.spurious_wfi >= 1 || chance(f, f->wanted.spurious_wfi)) {
        COUNT(f, spurious_wfis);
        return WFI_EXITS;
    }
    c->pc = after;
    if (sleep_inside(c))
        return WFI_COMPLETES;
    c->exit = (hv_vcpu_exit_t){.reason = HV_EXIT_REASON_CANCELED};
    c->exiting = true;
    return WFI_CANCELED;
}
