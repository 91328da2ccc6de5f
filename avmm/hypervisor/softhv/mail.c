/*
 * What vCPUs make each other forget: translations (TLBI) and code (IC, host writes). A vCPU's caches are its thread's
 * alone; everybody else writes what is to go into its mail, which it reads between blocks. One that is outside the guest
 * reads it on its way in, and nobody waits for it.
 *
 * Lock order: vm->lock, then one mail.lock. tests/unit/test_mail_model.py tries every interleaving.
 */
#define _GNU_SOURCE
#include "engine.h"

enum { SPIN_NS = 20000 };

static void post_tlbi(struct vcpu *to, unsigned op, uint64_t argument) {
    struct mail *mail = &to->mail;
    pthread_mutex_lock(&mail->lock);
    if (mail->tlb_count < MAIL_MAX) {
        mail->tlb[mail->tlb_count].op = op;
        mail->tlb[mail->tlb_count].argument = argument;
    }
    if (mail->tlb_count <= MAIL_MAX)
        mail->tlb_count++;
    atomic_fetch_or(&to->poll, POLL_MAIL);
    pthread_mutex_unlock(&mail->lock);
}

static void post_code(struct vcpu *to, uint64_t pa, uint64_t size) {
    struct mail *mail = &to->mail;
    pthread_mutex_lock(&mail->lock);
    uint32_t count = mail->code_count;
    /* IC IVAU comes for every line of a page, and what is dropped is the page. */
    bool again = count && count <= MAIL_MAX && mail->code[count - 1].pa == pa && mail->code[count - 1].size == size;
    if (count < MAIL_MAX && !again) {
        mail->code[count].pa = pa;
        mail->code[count].size = size;
    }
    if (count <= MAIL_MAX && !again)
        mail->code_count++;
    atomic_fetch_or(&to->poll, POLL_MAIL);
    pthread_mutex_unlock(&mail->lock);
}

void mail_moved(struct vm *vm) {
    if (atomic_load(&vm->mail_waiters))
        pthread_cond_broadcast(&vm->mail_moved);
}

static void mail_moved_locking(struct vm *vm) {
    if (!atomic_load(&vm->mail_waiters))
        return;
    pthread_mutex_lock(&vm->lock);
    mail_moved(vm);
    pthread_mutex_unlock(&vm->lock);
}

void mail_tlbi(struct vcpu *c, unsigned op, uint64_t argument) {
    struct vm *vm = c->vm;
    /* One that is being created has nothing to forget. With the fence in join_vm(): either it walks the tables as the
       guest has left them, or we see it. */
    atomic_thread_fence(memory_order_seq_cst);
    if (vm->vcpu_count == 1)
        return;
    pthread_mutex_lock(&vm->lock);
    for (uint32_t i = 0; i < vm->vcpu_count; i++)
        if (vm->vcpus[i] != c)
            post_tlbi(vm->vcpus[i], op, argument);
    mail_moved(vm);
    pthread_mutex_unlock(&vm->lock);
    c->posted = true;
}

static bool may_have_code(struct vm *vm, uint64_t pa, uint64_t end) {
    if (end - pa >= (uint64_t)CODE_MARKS << PAGE_BITS)
        return true;
    for (uint64_t page = pa; page < end; page += PAGE_SIZE)
        if (code_maybe(vm, page))
            return true;
    return false;
}

void mail_code(struct vm *vm, const struct vcpu *from, uint64_t pa, uint64_t size) {
    /* With the fences in mark() and join_vm(): either they read the new bytes, or we see the page marked, and who joins. */
    atomic_thread_fence(memory_order_seq_cst);
    if (from && vm->vcpu_count == 1)
        return;
    uint64_t end = size > UINT64_MAX - pa ? UINT64_MAX : pa + size;
    pa &= ~(uint64_t)(PAGE_SIZE - 1);
    if (!may_have_code(vm, pa, end))
        return;
    pthread_mutex_lock(&vm->lock);
    for (uint32_t i = 0; i < vm->vcpu_count; i++)
        if (vm->vcpus[i] != from)
            post_code(vm->vcpus[i], pa, end - pa);
    mail_moved(vm);
    pthread_mutex_unlock(&vm->lock);
}

void mail_read(struct vcpu *c) {
    struct mail *mail = &c->mail;
    pthread_mutex_lock(&mail->lock);
    if (mail->tlb_count > MAIL_MAX)
        tlb_flush_all(c);
    else
        for (uint32_t i = 0; i < mail->tlb_count; i++)
            tlbi(c, mail->tlb[i].op, mail->tlb[i].argument);
    if (mail->code_count > MAIL_MAX)
        code_invalidate(c, 0, UINT64_MAX);
    else
        for (uint32_t i = 0; i < mail->code_count; i++)
            code_invalidate(c, mail->code[i].pa, mail->code[i].size);
    mail->tlb_count = mail->code_count = 0;
    atomic_fetch_and(&c->poll, ~(uint32_t)POLL_MAIL); /* last: mail_sync() of others waits for it */
    pthread_mutex_unlock(&mail->lock);
    mail_moved_locking(c->vm);
}

/* vm->lock held. Is there another in the guest with mail to read? */
static bool behind(const struct vcpu *c) {
    const struct vm *vm = c->vm;
    for (uint32_t i = 0; i < vm->vcpu_count; i++) {
        const struct vcpu *other = vm->vcpus[i];
        if (other != c && atomic_load(&other->inside) && atomic_load(&other->poll) & POLL_MAIL)
            return true;
    }
    return false;
}

/*
 * A vCPU that the host lets run reads its mail within a microsecond. One that it does not has to get a processor first:
 * whoever waits for it then sleeps, so that there is one. Until all have read, or c->poll has one of `unless`.
 */
static void wait_for_readers(struct vcpu *c, uint32_t unless) {
    struct vm *vm = c->vm;
    uint64_t patience = host_ns() + SPIN_NS;
    pthread_mutex_lock(&vm->lock);
    while (atomic_load(&vm->syncing) && behind(c) && !(atomic_load(&c->poll) & unless)) {
        if (atomic_load(&c->poll) & POLL_MAIL) { /* two may wait for each other */
            pthread_mutex_unlock(&vm->lock);
            mail_read(c);
            pthread_mutex_lock(&vm->lock);
        } else if (host_ns() < patience) {
            pthread_mutex_unlock(&vm->lock);
            cpu_relax();
            pthread_mutex_lock(&vm->lock);
        } else {
            atomic_fetch_add(&vm->mail_waiters, 1); /* before the last look: who moves now finds us here */
            if (atomic_load(&vm->syncing) && behind(c) && !(atomic_load(&c->poll) & (unless | POLL_MAIL)))
                pthread_cond_wait(&vm->mail_moved, &vm->lock);
            atomic_fetch_sub(&vm->mail_waiters, 1);
        }
    }
    pthread_mutex_unlock(&vm->lock);
}

void mail_sync(struct vcpu *c) {
    c->posted = false;
    atomic_fetch_add(&c->vm->syncing, 1);
    wait_for_readers(c, 0); /* whoever is asked out does not finish its DSB by that */
    atomic_fetch_sub(&c->vm->syncing, 1);
    mail_moved_locking(c->vm);
}

void mail_wait(struct vcpu *c) {
    if (atomic_load(&c->vm->syncing))
        wait_for_readers(c, POLL_EXIT | POLL_STOP);
}
