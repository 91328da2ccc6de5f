/* VMs and their memory: hv_vm_*, softhv_vm_*. */
#define _GNU_SOURCE
#include "jit.h"

#include <stdlib.h>

enum { GRANULE = 0x4000, IPA_BITS_MAX = 40, IPA_BITS_DEFAULT = 36 };

struct hv_vm_config_s {
    uint32_t ipa_bits;
};

static pthread_mutex_t default_lock = PTHREAD_MUTEX_INITIALIZER;
static struct vm *default_vm;
static _Thread_local struct vm *bound;

/* ---- Which VM --------------------------------------------------------------------------------------------------- */

struct vm *vm_current(void) {
    if (bound)
        return bound;
    pthread_mutex_lock(&default_lock);
    struct vm *vm = default_vm;
    pthread_mutex_unlock(&default_lock);
    return vm;
}

static struct vm *created_vm(void) {
    struct vm *vm = vm_current();
    return vm && vm->created ? vm : NULL;
}

softhv_vm_t *softhv_vm_new(void) {
    struct vm *vm = calloc(1, sizeof *vm);
    if (!vm)
        return NULL;
    vm->jit_threshold = INT32_MAX;
    pthread_mutex_init(&vm->lock, NULL);
    pthread_cond_init(&vm->all_out, NULL);
    pthread_cond_init(&vm->mail_moved, NULL);
    vm->ipa_bits = IPA_BITS_DEFAULT;
    return (softhv_vm_t *)vm;
}

void softhv_vm_bind(softhv_vm_t *vm) { bound = (struct vm *)vm; }

hv_return_t softhv_vm_free(softhv_vm_t *opaque) {
    struct vm *vm = (struct vm *)opaque;
    if (!vm)
        return HV_BAD_ARGUMENT;
    pthread_mutex_lock(&vm->lock);
    bool busy = vm->vcpu_count;
    pthread_mutex_unlock(&vm->lock);
    if (busy)
        return HV_BUSY;
    if (bound == vm)
        bound = NULL;
    gic_destroy(vm->gic);
    free(vm->faults);
    pthread_cond_destroy(&vm->all_out);
    pthread_cond_destroy(&vm->mail_moved);
    pthread_mutex_destroy(&vm->lock);
    free(vm);
    return HV_SUCCESS;
}

hv_return_t hv_vm_create(hv_vm_config_t config) {
    hv_return_t result = HV_BUSY;
    pthread_mutex_lock(&default_lock);
    struct vm *vm = bound ? bound : default_vm;
    if (!vm)
        vm = default_vm = (struct vm *)softhv_vm_new();
    if (!vm) {
        result = HV_NO_RESOURCES;
    } else if (!vm->created) {
        vm->ipa_bits = config ? config->ipa_bits : IPA_BITS_DEFAULT;
        vm->created = true;
        result = HV_SUCCESS;
    }
    pthread_mutex_unlock(&default_lock);
    return result;
}

hv_return_t hv_vm_destroy(void) {
    struct vm *vm = created_vm();
    if (!vm)
        return HV_NO_DEVICE;
    pthread_mutex_lock(&vm->lock);
    bool busy = vm->vcpu_count;
    if (!busy) {
        vm->ram_count = 0;
        gic_destroy(vm->gic);
        vm->gic = NULL;
        vm->created = false;
        vm->map_gen++;
    }
    pthread_mutex_unlock(&vm->lock);
    if (busy)
        return HV_BUSY;
    pthread_mutex_lock(&default_lock);
    bool dispose = vm == default_vm;
    if (dispose)
        default_vm = NULL;
    pthread_mutex_unlock(&default_lock);
    return dispose ? softhv_vm_free((softhv_vm_t *)vm) : HV_SUCCESS;
}

hv_return_t hv_vm_get_max_vcpu_count(uint32_t *max_vcpu_count) {
    if (!max_vcpu_count)
        return HV_BAD_ARGUMENT;
    *max_vcpu_count = VCPU_MAX;
    return HV_SUCCESS;
}

/* ---- Configuration ---------------------------------------------------------------------------------------------- */

hv_vm_config_t hv_vm_config_create(void) {
    struct hv_vm_config_s *config = calloc(1, sizeof *config);
    if (config)
        config->ipa_bits = IPA_BITS_DEFAULT;
    return config;
}

void softhv_release(void *config) { free(config); }

hv_return_t hv_vm_config_get_max_ipa_size(uint32_t *ipa_bit_length) {
    if (!ipa_bit_length)
        return HV_BAD_ARGUMENT;
    *ipa_bit_length = IPA_BITS_MAX;
    return HV_SUCCESS;
}

hv_return_t hv_vm_config_get_default_ipa_size(uint32_t *ipa_bit_length) {
    if (!ipa_bit_length)
        return HV_BAD_ARGUMENT;
    *ipa_bit_length = IPA_BITS_DEFAULT;
    return HV_SUCCESS;
}

hv_return_t hv_vm_config_set_ipa_size(hv_vm_config_t config, uint32_t ipa_bit_length) {
    if (!config || ipa_bit_length < 32 || ipa_bit_length > IPA_BITS_MAX)
        return HV_BAD_ARGUMENT;
    config->ipa_bits = ipa_bit_length;
    return HV_SUCCESS;
}

hv_return_t hv_vm_config_get_ipa_size(hv_vm_config_t config, uint32_t *ipa_bit_length) {
    if (!config || !ipa_bit_length)
        return HV_BAD_ARGUMENT;
    *ipa_bit_length = config->ipa_bits;
    return HV_SUCCESS;
}

/* ---- Memory ----------------------------------------------------------------------------------------------------- */

struct ram *vm_ram(struct vm *vm, uint64_t ipa) {
    for (uint32_t i = 0; i < vm->ram_count; i++)
        if (ipa - vm->ram[i].ipa < vm->ram[i].size)
            return &vm->ram[i];
    return NULL;
}

/* The memory map changes with no vCPU in the guest: they keep host addresses in their TLBs. Leaves vm->lock held. */
static void stop_guest(struct vm *vm) {
    pthread_mutex_lock(&vm->lock);
    atomic_fetch_add(&vm->stoppers, 1);
    while (vm->inside) {
        for (uint32_t i = 0; i < vm->vcpu_count; i++)
            if (atomic_load(&vm->vcpus[i]->inside))
                atomic_fetch_or(&vm->vcpus[i]->poll, POLL_STOP);
        mail_moved(vm);
        pthread_cond_wait(&vm->all_out, &vm->lock);
    }
    atomic_fetch_sub(&vm->stoppers, 1);
    vm->map_gen++;
}

static void resume_guest(struct vm *vm) {
    if (atomic_load(&vm->stoppers))
        pthread_cond_signal(&vm->all_out);
    else
        for (uint32_t i = 0; i < vm->vcpu_count; i++)
            if (vm->vcpus[i]->waiting)
                pthread_cond_signal(&vm->vcpus[i]->my_turn);
    pthread_mutex_unlock(&vm->lock);
}

static bool valid_range(const struct vm *vm, uint64_t ipa, uint64_t size) {
    uint64_t limit = UINT64_C(1) << vm->ipa_bits;
    return size && !((ipa | size) & (GRANULE - 1)) && size <= limit && ipa <= limit - size;
}

/* Cut the region that holds `ipa` in two there. */
static bool split(struct vm *vm, uint64_t ipa) {
    struct ram *ram = vm_ram(vm, ipa);
    if (!ram || ram->ipa == ipa)
        return true;
    if (vm->ram_count == RAM_MAX)
        return false;
    struct ram *upper = &vm->ram[vm->ram_count++];
    *upper = *ram;
    ram->size = ipa - ram->ipa;
    upper->ipa += ram->size;
    upper->host += ram->size;
    upper->size -= ram->size;
    return true;
}

/* Prepare [ipa, ipa+size) to be changed: all of it is mapped, and no region crosses its ends. */
static hv_return_t isolate(struct vm *vm, uint64_t ipa, uint64_t size) {
    uint64_t mapped = 0;
    for (uint32_t i = 0; i < vm->ram_count; i++) {
        uint64_t start = vm->ram[i].ipa, end = start + vm->ram[i].size;
        uint64_t low = start > ipa ? start : ipa, high = end < ipa + size ? end : ipa + size;
        if (low < high)
            mapped += high - low;
    }
    if (mapped != size)
        return HV_BAD_ARGUMENT;
    return split(vm, ipa) && split(vm, ipa + size) ? HV_SUCCESS : HV_NO_RESOURCES;
}

hv_return_t hv_vm_map(void *addr, hv_ipa_t ipa, size_t size, hv_memory_flags_t flags) {
    struct vm *vm = created_vm();
    if (!vm)
        return HV_NO_DEVICE;
    /* The host's own page size is all that softhv needs of addr; Apple asks for its 16 KiB. */
    if (!addr || (uintptr_t)addr % PAGE_SIZE || !valid_range(vm, ipa, size) || flags & ~UINT64_C(7))
        return HV_BAD_ARGUMENT;
    stop_guest(vm);
    hv_return_t result = vm->ram_count < RAM_MAX ? HV_SUCCESS : HV_NO_RESOURCES;
    for (uint32_t i = 0; i < vm->ram_count; i++)
        if (ipa < vm->ram[i].ipa + vm->ram[i].size && vm->ram[i].ipa < ipa + size)
            result = HV_BAD_ARGUMENT;
    if (result == HV_SUCCESS) {
        vm->ram[vm->ram_count++] = (struct ram){.ipa = ipa, .size = size, .host = addr, .flags = (uint32_t)flags};
    }
    resume_guest(vm);
    return result;
}

hv_return_t hv_vm_unmap(hv_ipa_t ipa, size_t size) {
    struct vm *vm = created_vm();
    if (!vm)
        return HV_NO_DEVICE;
    if (!valid_range(vm, ipa, size))
        return HV_BAD_ARGUMENT;
    stop_guest(vm);
    hv_return_t result = isolate(vm, ipa, size);
    if (result == HV_SUCCESS) {
        for (uint32_t i = 0; i < vm->ram_count;) {
            if (vm->ram[i].ipa >= ipa && vm->ram[i].ipa < ipa + size)
                vm->ram[i] = vm->ram[--vm->ram_count];
            else
                i++;
        }
    }
    resume_guest(vm);
    return result;
}

hv_return_t hv_vm_protect(hv_ipa_t ipa, size_t size, hv_memory_flags_t flags) {
    struct vm *vm = created_vm();
    if (!vm)
        return HV_NO_DEVICE;
    if (!valid_range(vm, ipa, size) || flags & ~UINT64_C(7))
        return HV_BAD_ARGUMENT;
    stop_guest(vm);
    hv_return_t result = isolate(vm, ipa, size);
    for (uint32_t i = 0; result == HV_SUCCESS && i < vm->ram_count; i++)
        if (vm->ram[i].ipa >= ipa && vm->ram[i].ipa < ipa + size)
            vm->ram[i].flags = (uint32_t)flags;
    resume_guest(vm);
    return result;
}

void softhv_invalidate(softhv_vm_t *vm, hv_ipa_t ipa, uint64_t size) { mail_code((struct vm *)vm, NULL, ipa, size); }

hv_return_t softhv_vm_set_turns(softhv_vm_t *opaque, bool turns) {
    struct vm *vm = (struct vm *)opaque;
    if (!vm)
        return HV_BAD_ARGUMENT;
    pthread_mutex_lock(&vm->lock);
    bool busy = vm->vcpu_count;
    if (!busy)
        vm->turns = turns;
    pthread_mutex_unlock(&vm->lock);
    return busy ? HV_BUSY : HV_SUCCESS;
}
