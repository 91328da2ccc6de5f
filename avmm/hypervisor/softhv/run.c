/* hv_vcpu_run: in and out of the guest, polling, the virtual timer, and the way from block to block. */
#define _GNU_SOURCE
#include "../wait.h"
#include "jit.h"

enum {
    BUDGET = 20000,      /* instructions between looks at the clock: some 60 us */
    BUDGET_MIN = 200,
    INSN_NS = 3,         /* a fast instruction's time, to be early rather than late at a timer's deadline */
    TURN_NS = 1000 * 1000
};

/* ---- Time ------------------------------------------------------------------------------------------------------- */

uint64_t host_ns(void) { return monotonic_ns(); }

/* 24 MHz, as on Apple silicon: one tick is 125/3 ns. */
uint64_t softhv_absolute_time(void) { return host_ns() * 3 / 125; }

void softhv_timebase(uint32_t *numer, uint32_t *denom) {
    *numer = 125;
    *denom = 3;
}

bool vtimer_due(const struct vcpu *c) { /* ENABLE and not IMASK (D17.11.20), CVAL reached */
    return (c->sys.cntv_ctl & 3) == 1 && guest_counter(c) >= c->sys.cntv_cval;
}

static int32_t next_budget(const struct vcpu *c) {
    if ((c->sys.cntv_ctl & 3) != 1 || c->vtimer_masked)
        return BUDGET;
    uint64_t left = c->sys.cntv_cval - guest_counter(c); /* not due: vtimer_due() was looked at before */
    if (unlikely(c->fast_counter))
        left = left * 3 / 125;
    if (left >= BUDGET) /* a tick is many instructions long */
        return BUDGET;
    int32_t insns = (int32_t)(left * 125 / (3 * INSN_NS));
    return insns < BUDGET_MIN ? BUDGET_MIN : insns > BUDGET ? BUDGET : insns;
}

/* ---- In and out of the guest ------------------------------------------------------------------------------------- */

/*
 * vCPUs are in the guest side by side, but for two things: whoever changes the memory map waits until all are out and
 * keeps them out; and where a VM takes turns one is in there at a time, first come first served.
 */

static void unlink_waiter(struct vm *vm, struct vcpu *c) {
    struct vcpu *before = NULL;
    for (struct vcpu *w = vm->first_waiter; w != c; w = w->next_waiter)
        before = w;
    if (before)
        before->next_waiter = c->next_waiter;
    else
        vm->first_waiter = c->next_waiter;
    if (vm->last_waiter == c)
        vm->last_waiter = before;
    c->next_waiter = NULL;
}

static void pass_turn(struct vm *vm) {
    vm->turn = NULL;
    if (vm->first_waiter && !atomic_load(&vm->stoppers))
        pthread_cond_signal(&vm->first_waiter->my_turn);
}

/* vm->lock held. False: asked to exit before. */
static bool await_turn(struct vcpu *c) {
    struct vm *vm = c->vm;
    if (vm->turn || vm->first_waiter || atomic_load(&vm->stoppers)) {
        c->waiting = true;
        if (vm->last_waiter)
            vm->last_waiter->next_waiter = c;
        else
            vm->first_waiter = c;
        vm->last_waiter = c;
        while ((vm->turn || vm->first_waiter != c || atomic_load(&vm->stoppers)) &&
               !(atomic_load(&c->poll) & POLL_EXIT)) {
            if (vm->turn)
                atomic_fetch_or(&vm->turn->poll, POLL_TURN);
            pthread_cond_wait(&c->my_turn, &vm->lock);
        }
        unlink_waiter(vm, c);
        c->waiting = false;
        if (atomic_load(&c->poll) & POLL_EXIT) {
            if (!vm->turn)
                pass_turn(vm); /* it may have been passed to us */
            return false;
        }
    }
    vm->turn = c;
    if (vm->first_waiter)
        atomic_fetch_or(&c->poll, POLL_TURN);
    return true;
}

/* The same where all run side by side. */
static bool await_map(struct vcpu *c) {
    while (atomic_load(&c->vm->stoppers) && !(atomic_load(&c->poll) & POLL_EXIT)) {
        c->waiting = true;
        pthread_cond_wait(&c->my_turn, &c->vm->lock);
        c->waiting = false;
    }
    return !(atomic_load(&c->poll) & POLL_EXIT);
}

bool guest_enter(struct vcpu *c) {
    struct vm *vm = c->vm;
    pthread_mutex_lock(&vm->lock);
    bool entered = vm->turns ? await_turn(c) : await_map(c);
    bool remapped = entered && c->map_gen != vm->map_gen;
    if (entered) {
        c->map_gen = vm->map_gen;
        vm->inside++;
        atomic_store(&c->inside, true); /* before the mail is read: what comes later finds us here */
    }
    pthread_mutex_unlock(&vm->lock);
    c->turn_start = host_ns();
    if (remapped) {
        tlb_flush_all(c);
        code_invalidate(c, 0, UINT64_MAX);
    }
    if (entered && atomic_load(&c->poll) & POLL_MAIL)
        mail_read(c);
    return entered;
}

void guest_leave(struct vcpu *c) {
    struct vm *vm = c->vm;
    c->exec_ns += host_ns() - c->turn_start;
    pthread_mutex_lock(&vm->lock);
    atomic_fetch_and(&c->poll, ~(uint32_t)(POLL_TURN | POLL_STOP));
    atomic_store(&c->inside, false);
    vm->inside--;
    if (vm->turns)
        pass_turn(vm);
    if (!vm->inside && atomic_load(&vm->stoppers))
        pthread_cond_signal(&vm->all_out);
    mail_moved(vm);
    pthread_mutex_unlock(&vm->lock);
}

bool guest_yield(struct vcpu *c) {
    guest_leave(c);
    return guest_enter(c);
}

/* ---- The loop --------------------------------------------------------------------------------------------------- */

static void exit_to_host(struct vcpu *c, hv_exit_reason_t reason) {
    c->exit = (hv_vcpu_exit_t){.reason = reason};
    c->exiting = true;
}

static void poll(struct vcpu *c) {
    c->icount += (uint64_t)(int64_t)(c->slice - c->budget);
    c->slice = c->budget = 0;
    if (unlikely(c->vm->faults != NULL))
        fault_poll(c);
    uint32_t why = atomic_load_explicit(&c->poll, memory_order_acquire);
    if (why & POLL_MAIL) {
        mail_read(c);
        mail_wait(c);
        why = atomic_load(&c->poll);
    }
    if (why & POLL_STOP && !guest_yield(c))
        return exit_to_host(c, HV_EXIT_REASON_CANCELED);
    if (why & POLL_EXIT)
        return exit_to_host(c, HV_EXIT_REASON_CANCELED);
    if (why & POLL_TURN && host_ns() - c->turn_start >= TURN_NS && !guest_yield(c))
        return exit_to_host(c, HV_EXIT_REASON_CANCELED);
    if (c->gic) {
        gic_poll(c);
    } else if (!c->vtimer_masked && vtimer_due(c) &&
               !(unlikely(c->vm->faults != NULL) && fault_vtimer_waits(c))) {
        c->vtimer_masked = true;
        return exit_to_host(c, HV_EXIT_REASON_VTIMER_ACTIVATED);
    }
    if (c->fiq_line && !(c->daif & DAIF_F))
        exc_interrupt(c, true);
    else if (c->irq_line && !(c->daif & DAIF_I))
        exc_interrupt(c, false);
    else if (c->il)
        exc_illegal_state(c);
    c->slice = c->budget = next_budget(c);
}

const struct uop *next_block(struct vcpu *c) {
    uint32_t at = jump_offset(c->pc);
    const struct jump_entry *jump = jump_entry(c, at);
    if (unlikely(jump->pc != c->pc))
        jump = jump_entry(c, at ^ JUMP_OTHER);
    if (unlikely(jump->pc != c->pc || c->budget <= 0 ||
                 atomic_load_explicit(&c->poll, memory_order_relaxed) & POLL_NOW))
        return NULL;
    struct block *block = jump_block(c, jump);
    if (unlikely(block->cold <= 0))
        return NULL;
    block->cold--;
    c->block_pc = c->pc;
    c->budget -= (int32_t)block->count;
    return block->uops->fn(c, block->uops);
}

/* The block at c->pc, in the jump cache. NULL: it is elsewhere now (an exception, a tag), or the host is asked. */
static struct jump_entry *find_block(struct vcpu *c) {
    uint32_t at = jump_offset(c->pc);
    struct jump_entry *jump = jump_entry(c, at), *other = jump_entry(c, at ^ JUMP_OTHER);
    if (jump->pc == c->pc && jump_block(c, jump)->pa != BLOCK_DROPPED)
        return jump;
    if (other->pc == c->pc && jump_block(c, other)->pa != BLOCK_DROPPED)
        return other;
    uint64_t pc = c->pc, pa;
    const uint8_t *host;
    if (!mmu_fetch(c, &pa, &host) || c->pc != pc)
        return NULL;
    return jump_fill(c, pc, code_block(c, pa, host));
}

/* The block at c->pc ran often enough: by its compiled code, from now on. False: it has none, interpret it. */
static bool run_compiled(struct vcpu *c, struct jump_entry *jump) {
    struct block *block = jump_block(c, jump);
    if (!c->jit) { /* two thousand million runs, all interpreted */
        block->cold = INT32_MAX;
        return false;
    }
    if (!block->code) {
        if (jit_full(c) || code_full(c)) {
            code_flush(c);
            return true;
        }
        block->code = jit_compile(c, block);
        if (!block->code) {
            block->cold = INT32_MAX;
            return false;
        }
        code_compiled(c, block);
    }
    jit_link(c, block->code);
    jump->code = (uint32_t)((const uint8_t *)block->code - c->code_base);
    jit_enter(c, block->code);
    return true;
}

/* Software step (D2.12): an instruction by itself, then the exception. */
static void step(struct vcpu *c) {
    uint64_t pc = c->pc, pa, exceptions = c->counters.exceptions;
    const uint8_t *host;
    if (!c->ss) {
        exc_step(c);
        return;
    }
    if (!mmu_fetch(c, &pa, &host))
        return;
    _Alignas(struct block) uint8_t room[sizeof(struct block) + 2 * sizeof(struct uop)];
    struct block *block = (struct block *)room;
    decode_block(block, pa, host, 1);
    force_poll(c); /* it is the only one */
    c->block_pc = c->pc;
    c->budget--;
    block->uops->fn(c, block->uops);
    if (c->counters.exceptions != exceptions || (c->exiting && c->pc == pc))
        return; /* not done: once more when it is returned to */
    c->ss = 0;
    bool load_exclusive = (block->uops->insn & 0x3fc00000) == 0x08400000;
    c->step_iss = STEP_ISV | (load_exclusive ? STEP_EX : 0);
}

static void run(struct vcpu *c) {
    jit_unlink(c);
    while (!c->exiting) {
        if (c->budget <= 0 || atomic_load_explicit(&c->poll, memory_order_relaxed) & POLL_NOW) {
            jit_unlink(c);
            poll(c);
            if (c->exiting)
                break;
        }
        if (unlikely(c->stepping)) {
            step(c);
            continue;
        }
        struct jump_entry *jump = find_block(c);
        counter_add(&c->counters.block_runs, 1);
        if (jump && jump_block(c, jump)->cold <= 0 && run_compiled(c, jump))
            continue;
        jit_unlink(c);
        if (jump)
            next_block(c);
    }
    c->icount += (uint64_t)(int64_t)(c->slice - c->budget);
    c->slice = c->budget = 0;
}

void vcpu_run(struct vcpu *c) {
    bool faulty = c->vm->faults != NULL;
    hv_exit_reason_t reason;
    c->exiting = false;
    if (unlikely(faulty))
        atomic_store(&c->running, true);
    if (unlikely(faulty) && fault_entry(c, &reason)) {
        exit_to_host(c, reason);
    } else if (atomic_load(&c->poll) & POLL_EXIT || !guest_enter(c)) {
        exit_to_host(c, HV_EXIT_REASON_CANCELED);
    } else {
        if (c->gic)
            gic_poll(c);
        run(c);
        if (atomic_load(&c->inside)) /* else asked to exit while yielding */
            guest_leave(c);
    }
    if (unlikely(faulty))
        atomic_store(&c->running, false);
    if (c->exit.reason == HV_EXIT_REASON_CANCELED && !(unlikely(faulty) && fault_kicked_twice(c)))
        atomic_fetch_and(&c->poll, ~(uint32_t)POLL_EXIT);
    c->irq_line = c->fiq_line = false;
    counter_set(&c->counters.instructions, c->icount);
}
