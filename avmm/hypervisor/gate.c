/*
 * The gate: where a vCPU that is parked sleeps, without the interpreter's lock. See avmm/vcpu/park.py for who opens it.
 *
 * Three waits are awake. Before it sleeps, where asked for, a bounded poll that grows while wakes come soon and ends when they do not
 * (as KVM's halt_poll_ns): a wake that comes then costs no thread wake. When it is stirred: whoever is about to open the gate
 * says so first, and the thread wakes up on another processor while it is still being decided whether to open. And at the end of
 * a sleep with an exact moment, the rest of it: the sleep ends early by what a wake has been taking.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#ifdef __APPLE__
#include <Hypervisor/Hypervisor.h>
#else
#include "hv.h"
#endif
#include "frame.h"
#include "wait.h"

enum {
    POLL_FIRST_NS = 10000,   /* the first poll of a series */
    EARLY_STEP_NS = 4000,    /* steps of one size find the median, whatever the stragglers are */
    EARLY_MOST_NS = 100000,
    STIRRED_NS = 50000,      /* so long it stays awake for the gate to be opened */
    NOWHERE = -1             /* no processor's number */
};

struct avmm_gate {
    pthread_mutex_t lock;
    pthread_cond_t opened;
    _Atomic uint32_t state; /* AVMM_GATE_* */
    bool waiting;           /* asleep in `opened` */
    bool stirred;
    _Atomic int waker;      /* the processor of who opened or stirred last */
    _Atomic bool together;  /* and who was woken by that found itself on the same one */
    uint64_t poll_ns, poll_most_ns; /* a wake within the latter is soon */
    uint64_t early_ns;
};

uint64_t avmm_monotonic_ns(void) { return monotonic_ns(); }

#ifdef __APPLE__
static int processor(void) { return NOWHERE; } /* no call for it; there are several */
#else
static int processor(void) { return sched_getcpu(); }
#endif

static void relax(void) {
#if defined __x86_64__ || defined __i386__
    __builtin_ia32_pause();
#elif defined __aarch64__
    __asm__ volatile("yield");
#endif
}

avmm_gate_t *avmm_gate_new(void) {
    avmm_gate_t *gate = calloc(1, sizeof *gate);
    if (!gate)
        return NULL;
    pthread_mutex_init(&gate->lock, NULL);
    cond_init(&gate->opened);
    return gate;
}

void avmm_gate_free(avmm_gate_t *gate) {
    pthread_cond_destroy(&gate->opened);
    pthread_mutex_destroy(&gate->lock);
    free(gate);
}

void avmm_gate_set_poll(avmm_gate_t *gate, uint64_t most_ns) {
    gate->poll_most_ns = most_ns;
    gate->poll_ns = 0;
}

void avmm_gate_open(avmm_gate_t *gate, uint32_t how) {
    pthread_mutex_lock(&gate->lock);
    gate->waker = processor();
    atomic_store(&gate->state, how);
    bool waiting = gate->waiting;
    pthread_mutex_unlock(&gate->lock); /* first, so that who wakes does not wait for it */
    if (waiting)
        pthread_cond_signal(&gate->opened);
}

void avmm_gate_stir(avmm_gate_t *gate) {
    pthread_mutex_lock(&gate->lock);
    /* If it is awake, it looks at the gate before it sleeps. And beside us it could only take our processor away. */
    bool waiting = gate->waiting && !gate->together;
    gate->stirred = waiting;
    gate->waker = processor();
    pthread_mutex_unlock(&gate->lock);
    if (waiting)
        pthread_cond_signal(&gate->opened);
}

void avmm_gate_shut(avmm_gate_t *gate) { atomic_store(&gate->state, AVMM_GATE_SHUT); }

static bool is_shut(avmm_gate_t *gate) {
    return atomic_load_explicit(&gate->state, memory_order_acquire) == AVMM_GATE_SHUT;
}

static void look_at_waker(avmm_gate_t *gate) {
    gate->together = gate->waker != NOWHERE && gate->waker == processor();
}

static void await_awake(avmm_gate_t *gate, uint64_t until) {
    while (is_shut(gate) && monotonic_ns() < until)
        relax();
}

static void await_asleep(avmm_gate_t *gate, uint64_t until) {
    uint64_t now = 0;
    while (is_shut(gate) && (now = monotonic_ns()) < until) {
        pthread_mutex_lock(&gate->lock);
        gate->stirred = false;
        gate->waiting = true;
        while (is_shut(gate) && !gate->stirred && monotonic_ns() < until)
            cond_wait_until(&gate->opened, &gate->lock, until);
        gate->waiting = false;
        bool stirred = gate->stirred;
        if (stirred || !is_shut(gate))
            look_at_waker(gate);
        pthread_mutex_unlock(&gate->lock);
        for (uint64_t end = monotonic_ns() + STIRRED_NS; stirred && is_shut(gate) && monotonic_ns() < end;)
            sched_yield(); /* whoever stirred us may have been on this very processor */
    }
}

static void adapt_poll(avmm_gate_t *gate, uint64_t slept_ns) {
    if (slept_ns > gate->poll_most_ns || gate->together) /* a poll beside the waker keeps it from waking us */
        gate->poll_ns = 0;
    else if (slept_ns > gate->poll_ns) { /* a longer poll would have caught it */
        uint64_t longer = gate->poll_ns ? 2 * gate->poll_ns : POLL_FIRST_NS;
        gate->poll_ns = longer < gate->poll_most_ns ? longer : gate->poll_most_ns;
    }
}

uint32_t avmm_gate_sleep(avmm_gate_t *gate, uint64_t until, bool exact) {
    uint64_t began = monotonic_ns(), poll_end = began + gate->poll_ns;
    if (gate->poll_ns) {
        await_awake(gate, poll_end < until ? poll_end : until);
        if (!is_shut(gate))
            look_at_waker(gate);
    }
    uint64_t asleep_until = exact ? until - gate->early_ns : until;
    if (is_shut(gate) && monotonic_ns() < asleep_until) {
        await_asleep(gate, asleep_until);
        if (exact && is_shut(gate)) {
            bool late = monotonic_ns() > until;
            if (late && gate->early_ns < EARLY_MOST_NS)
                gate->early_ns += EARLY_STEP_NS;
            else if (!late && gate->early_ns)
                gate->early_ns -= EARLY_STEP_NS;
        }
    }
    if (exact)
        await_awake(gate, until);
    adapt_poll(gate, monotonic_ns() - began);
    return atomic_exchange(&gate->state, AVMM_GATE_SHUT);
}
