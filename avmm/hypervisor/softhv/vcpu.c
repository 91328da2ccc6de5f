/* hv_vcpu_*: the life of vCPUs, their registers, kicks. */
#define _GNU_SOURCE
#include "jit.h"

#include "../hv_simd.h"
#include "../wait.h"

#include <fenv.h>
#include <stdlib.h>

enum { HANDLES = 4096 };
enum { REG_PC = 31, REG_FPCR, REG_FPSR, REG_CPSR, REG_COUNT };

struct hv_vcpu_config_s {
    char none;
};

/* Every vCPU of the process by handle % HANDLES; a handle is never given twice. */
static pthread_mutex_t handles_lock = PTHREAD_MUTEX_INITIALIZER;
static struct vcpu *handles[HANDLES];
static hv_vcpu_t next_handle = 1;

/* A thread owns at most one vCPU. */
static _Thread_local struct vcpu *mine;

static struct vcpu *owned(hv_vcpu_t handle) { return likely(mine && mine->handle == handle) ? mine : NULL; }

/* handles_lock held. */
static struct vcpu *find(hv_vcpu_t handle) {
    struct vcpu *c = handles[handle % HANDLES];
    return c && c->handle == handle ? c : NULL;
}

static bool assign_handle(struct vcpu *c) {
    bool found = false;
    pthread_mutex_lock(&handles_lock);
    for (unsigned tries = 0; tries < HANDLES && !found; tries++, next_handle++) {
        if (handles[next_handle % HANDLES])
            continue;
        c->handle = next_handle;
        handles[next_handle % HANDLES] = c;
        found = true;
    }
    pthread_mutex_unlock(&handles_lock);
    return found;
}

static void release_handle(struct vcpu *c) {
    pthread_mutex_lock(&handles_lock);
    handles[c->handle % HANDLES] = NULL;
    pthread_mutex_unlock(&handles_lock);
}

static hv_return_t join_vm(struct vm *vm, struct vcpu *c) {
    pthread_mutex_lock(&vm->lock);
    bool room = vm->created && vm->vcpu_count < VCPU_MAX;
    if (room) {
        vm->vcpus[vm->vcpu_count++] = c;
        c->map_gen = vm->map_gen;
    }
    pthread_mutex_unlock(&vm->lock);
    atomic_thread_fence(memory_order_seq_cst); /* with those of mail_tlbi() and mail_code() */
    if (room && vm->gic)
        gic_join(c, vm->gic);
    return room ? HV_SUCCESS : HV_NO_RESOURCES;
}

static void dispose(struct vcpu *c) {
    jit_destroy(c);
    code_destroy(c);
    pthread_mutex_destroy(&c->mail.lock);
    pthread_cond_destroy(&c->my_turn);
    free(c->memory);
}

/* Zeroed, and untouched until it is used; calloc() knows nothing of cache lines. */
static struct vcpu *allocate(void) {
    enum { LINE = _Alignof(struct vcpu) };
    char *memory = calloc(1, sizeof(struct vcpu) + LINE);
    if (!memory)
        return NULL;
    struct vcpu *c = (struct vcpu *)(memory + (-(uintptr_t)memory & (LINE - 1)));
    c->memory = memory;
    return c;
}

hv_return_t hv_vcpu_create(hv_vcpu_t *vcpu, hv_vcpu_exit_t **exit, hv_vcpu_config_t config) {
    (void)config; /* nothing to configure */
    if (!vcpu || !exit)
        return HV_BAD_ARGUMENT;
    struct vm *vm = vm_current();
    if (!vm || !vm->created)
        return HV_NO_DEVICE;
    if (mine)
        return HV_BUSY;
    decode_init();
    struct vcpu *c = allocate();
    if (!c)
        return HV_NO_RESOURCES;
    c->vm = vm;
    if (!code_create(c)) {
        free(c->memory);
        return HV_NO_RESOURCES;
    }
    jit_create(c);
    c->fast_counter = fault_fast_counter(vm);
    c->monitor.pa = ~UINT64_C(0);
    c->daif = DAIF_ALL; /* EL0t, as Apple leaves it */
    sysreg_reset(c);
    tlb_create(c);
    pstate_changed(c);
    cond_init(&c->my_turn);
    pthread_mutex_init(&c->mail.lock, NULL);
    hv_return_t result = assign_handle(c) ? join_vm(vm, c) : HV_NO_RESOURCES;
    if (result != HV_SUCCESS) {
        if (c->handle)
            release_handle(c);
        dispose(c);
        return result;
    }
    fesetenv(FE_DFL_ENV); /* this thread now runs the vCPU, and fpu.h relies on it */
    mine = c;
    *vcpu = c->handle;
    *exit = &c->exit;
    return HV_SUCCESS;
}

hv_return_t hv_vcpu_destroy(hv_vcpu_t vcpu) {
    struct vcpu *c = owned(vcpu);
    if (!c)
        return HV_BAD_ARGUMENT;
    release_handle(c);
    struct vm *vm = c->vm;
    pthread_mutex_lock(&vm->lock);
    for (uint32_t i = 0; i < vm->vcpu_count; i++)
        if (vm->vcpus[i] == c)
            vm->vcpus[i] = vm->vcpus[--vm->vcpu_count];
    pthread_mutex_unlock(&vm->lock);
    if (c->gic)
        gic_part(c);
    dispose(c);
    mine = NULL;
    return HV_SUCCESS;
}

hv_return_t hv_vcpu_run(hv_vcpu_t vcpu) {
    struct vcpu *c = owned(vcpu);
    if (!c)
        return HV_BAD_ARGUMENT;
    vcpu_run(c);
    return HV_SUCCESS;
}

hv_return_t hv_vcpus_exit(hv_vcpu_t *vcpus, uint32_t vcpu_count) {
    if (!vcpus)
        return HV_BAD_ARGUMENT;
    hv_return_t result = HV_SUCCESS;
    pthread_mutex_lock(&handles_lock); /* no vCPU goes away meanwhile */
    for (uint32_t i = 0; i < vcpu_count; i++) {
        struct vcpu *c = find(vcpus[i]);
        if (!c) {
            result = HV_BAD_ARGUMENT;
            continue;
        }
        if (likely(!c->vm->faults) || fault_kick(c))
            atomic_fetch_or(&c->poll, POLL_EXIT);
        pthread_mutex_lock(&c->vm->lock);
        if (c->waiting)
            pthread_cond_signal(&c->my_turn);
        mail_moved(c->vm);
        pthread_mutex_unlock(&c->vm->lock);
        if (c->gic)
            gic_wake(c);
    }
    pthread_mutex_unlock(&handles_lock);
    return result;
}

/* ---- Registers -------------------------------------------------------------------------------------------------- */

hv_return_t hv_vcpu_get_reg(hv_vcpu_t vcpu, hv_reg_t reg, uint64_t *value) {
    struct vcpu *c = owned(vcpu);
    if (!c || !value || reg >= REG_COUNT)
        return HV_BAD_ARGUMENT;
    switch (reg) {
    case REG_PC: *value = c->pc; break;
    case REG_FPCR: *value = c->fpcr; break;
    case REG_FPSR: *value = c->fpsr; break;
    case REG_CPSR: *value = pstate_get(c); break;
    default: *value = c->x[reg];
    }
    return HV_SUCCESS;
}

hv_return_t hv_vcpu_set_reg(hv_vcpu_t vcpu, hv_reg_t reg, uint64_t value) {
    struct vcpu *c = owned(vcpu);
    if (!c || reg >= REG_COUNT)
        return HV_BAD_ARGUMENT;
    switch (reg) {
    case REG_PC: c->pc = value; break;
    case REG_FPCR: return sysreg_host_set(c, SYSREG(3, 3, 4, 4, 0), value);
    case REG_FPSR: return sysreg_host_set(c, SYSREG(3, 3, 4, 4, 1), value);
    case REG_CPSR:
        if (!pstate_legal(value))
            return HV_BAD_ARGUMENT;
        pstate_set(c, value);
        break;
    default: c->x[reg] = value;
    }
    return HV_SUCCESS;
}

hv_return_t hv_vcpu_get_simd_fp_reg(hv_vcpu_t vcpu, hv_simd_fp_reg_t reg, hv_simd_fp_uchar16_t *value) {
    struct vcpu *c = owned(vcpu);
    if (!c || !value || reg >= 32)
        return HV_BAD_ARGUMENT;
    memcpy(value, &c->v[reg], 16);
    return HV_SUCCESS;
}

hv_return_t hv_vcpu_set_simd_fp_reg(hv_vcpu_t vcpu, hv_simd_fp_reg_t reg, hv_simd_fp_uchar16_t value) {
    struct vcpu *c = owned(vcpu);
    if (!c || reg >= 32)
        return HV_BAD_ARGUMENT;
    memcpy(&c->v[reg], &value, 16);
    return HV_SUCCESS;
}

hv_return_t hv_vcpu_get_sys_reg(hv_vcpu_t vcpu, hv_sys_reg_t reg, uint64_t *value) {
    struct vcpu *c = owned(vcpu);
    return c && value ? sysreg_host_get(c, reg, value) : HV_BAD_ARGUMENT;
}

hv_return_t hv_vcpu_set_sys_reg(hv_vcpu_t vcpu, hv_sys_reg_t reg, uint64_t value) {
    struct vcpu *c = owned(vcpu);
    return c ? sysreg_host_set(c, reg, value) : HV_BAD_ARGUMENT;
}

/* ---- Interrupts, timer, counters -------------------------------------------------------------------------------- */

static bool *line(struct vcpu *c, hv_interrupt_type_t type) {
    return type == HV_INTERRUPT_TYPE_IRQ ? &c->irq_line : type == HV_INTERRUPT_TYPE_FIQ ? &c->fiq_line : NULL;
}

hv_return_t hv_vcpu_get_pending_interrupt(hv_vcpu_t vcpu, hv_interrupt_type_t type, bool *pending) {
    struct vcpu *c = owned(vcpu);
    if (!c || !pending || !line(c, type))
        return HV_BAD_ARGUMENT;
    *pending = *line(c, type);
    return HV_SUCCESS;
}

hv_return_t hv_vcpu_set_pending_interrupt(hv_vcpu_t vcpu, hv_interrupt_type_t type, bool pending) {
    struct vcpu *c = owned(vcpu);
    if (!c || !line(c, type))
        return HV_BAD_ARGUMENT;
    *line(c, type) = pending;
    return HV_SUCCESS;
}

hv_return_t hv_vcpu_get_exec_time(hv_vcpu_t vcpu, uint64_t *time) {
    struct vcpu *c = owned(vcpu);
    if (!c || !time)
        return HV_BAD_ARGUMENT;
    *time = c->exec_ns * 3 / 125; /* units of softhv_absolute_time(), as Apple's header says */
    return HV_SUCCESS;
}

hv_return_t hv_vcpu_get_vtimer_mask(hv_vcpu_t vcpu, bool *vtimer_is_masked) {
    struct vcpu *c = owned(vcpu);
    if (!c || !vtimer_is_masked)
        return HV_BAD_ARGUMENT;
    *vtimer_is_masked = c->vtimer_masked;
    return HV_SUCCESS;
}

hv_return_t hv_vcpu_set_vtimer_mask(hv_vcpu_t vcpu, bool vtimer_is_masked) {
    struct vcpu *c = owned(vcpu);
    if (!c)
        return HV_BAD_ARGUMENT;
    c->vtimer_masked = vtimer_is_masked;
    return HV_SUCCESS;
}

hv_return_t hv_vcpu_get_vtimer_offset(hv_vcpu_t vcpu, uint64_t *vtimer_offset) {
    struct vcpu *c = owned(vcpu);
    if (!c || !vtimer_offset)
        return HV_BAD_ARGUMENT;
    *vtimer_offset = c->vtimer_offset;
    return HV_SUCCESS;
}

hv_return_t hv_vcpu_set_vtimer_offset(hv_vcpu_t vcpu, uint64_t vtimer_offset) {
    struct vcpu *c = owned(vcpu);
    if (!c)
        return HV_BAD_ARGUMENT;
    c->vtimer_offset = vtimer_offset;
    return HV_SUCCESS;
}

/* There is no debug hardware whose exceptions or accesses could trap. */
hv_return_t hv_vcpu_set_trap_debug_exceptions(hv_vcpu_t vcpu, bool value) {
    return !owned(vcpu) ? HV_BAD_ARGUMENT : value ? HV_UNSUPPORTED : HV_SUCCESS;
}

hv_return_t hv_vcpu_set_trap_debug_reg_accesses(hv_vcpu_t vcpu, bool value) {
    return !owned(vcpu) ? HV_BAD_ARGUMENT : value ? HV_UNSUPPORTED : HV_SUCCESS;
}

hv_return_t softhv_vcpu_counters(hv_vcpu_t vcpu, softhv_counters_t *counters) {
    if (!counters)
        return HV_BAD_ARGUMENT;
    pthread_mutex_lock(&handles_lock);
    struct vcpu *c = find(vcpu);
    if (c) {
        *counters = (softhv_counters_t){0};
        for (size_t i = 0; i < offsetof(softhv_counters_t, undefined_insn) / 8; i++)
            ((uint64_t *)counters)[i] = __atomic_load_n((const uint64_t *)&c->counters + i, __ATOMIC_RELAXED);
        counters->undefined_insn = __atomic_load_n(&c->counters.undefined_insn, __ATOMIC_RELAXED);
    }
    pthread_mutex_unlock(&handles_lock);
    return c ? HV_SUCCESS : HV_BAD_ARGUMENT;
}

/* ---- Configuration ---------------------------------------------------------------------------------------------- */

hv_vcpu_config_t hv_vcpu_config_create(void) { return calloc(1, sizeof(struct hv_vcpu_config_s)); }

hv_return_t hv_vcpu_config_get_feature_reg(hv_vcpu_config_t config, hv_feature_reg_t feature_reg, uint64_t *value) {
    (void)config;
    return value && sysreg_feature(feature_reg, value) ? HV_SUCCESS : HV_BAD_ARGUMENT;
}
