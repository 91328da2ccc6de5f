/* avmm_run: deliver what the host decided, run, decode the exit. See frame.h. */
#ifdef __APPLE__
#include <Hypervisor/Hypervisor.h>
#else
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "hv.h"
#include "hv_simd.h"
enum { HV_EXIT_REASON_CANCELED, HV_EXIT_REASON_EXCEPTION, HV_EXIT_REASON_VTIMER_ACTIVATED };
enum { HV_INTERRUPT_TYPE_IRQ };
enum { HV_REG_PC = 31 };
enum { HV_SYS_REG_CNTV_CTL_EL0 = 0xdf19, HV_SYS_REG_CNTV_CVAL_EL0 = 0xdf1a };
#endif
#include <string.h>

#include "frame.h"

/* ESR_EL2 (D17.2.37) */
enum { EC_WFX = 0x01, EC_HVC = 0x16, EC_SMC = 0x17, EC_SYSREG = 0x18, EC_IABT = 0x20, EC_DABT = 0x24 };
enum { DABT_ISV = 1 << 24, DABT_SSE = 1 << 21, DABT_SF = 1 << 15 };
enum { DABT_CM = 1 << 8, DABT_S1PTW = 1 << 7, DABT_WNR = 1 << 6 };
enum { XZR = 31 };
enum { ICC_IAR1_EL1 = 0xc660 };

static uint64_t get_reg(hv_vcpu_t vcpu, uint32_t reg) {
    uint64_t value = 0;
    if (reg != XZR)
        hv_vcpu_get_reg(vcpu, (hv_reg_t)reg, &value);
    return value;
}

static void advance(hv_vcpu_t vcpu, avmm_frame_t *frame) {
    frame->pc += 4;
    hv_vcpu_set_reg(vcpu, HV_REG_PC, frame->pc);
}

/* What a load of `size` bytes leaves in its register. */
static uint64_t extend(const avmm_frame_t *frame) {
    unsigned unused = 64 - 8 * frame->size;
    uint64_t value = frame->result << unused;
    value = frame->sign_extend ? (uint64_t)((int64_t)value >> unused) : value >> unused;
    return frame->wide ? value : (uint32_t)value;
}

static void deliver(hv_vcpu_t vcpu, avmm_frame_t *frame) {
    if (frame->finish == AVMM_FINISH_RESULT && frame->reg != XZR)
        hv_vcpu_set_reg(vcpu, (hv_reg_t)frame->reg, extend(frame));
    if (frame->finish != AVMM_FINISH_NONE)
        advance(vcpu, frame);
    frame->finish = AVMM_FINISH_NONE;
    if (frame->mask_vtimer) {
        hv_vcpu_set_vtimer_mask(vcpu, true);
        frame->vtimer_masked = 1;
        frame->mask_vtimer = 0;
    }
    if (frame->unmask_vtimer) {
        hv_vcpu_set_vtimer_mask(vcpu, false);
        frame->vtimer_masked = 0;
        frame->unmask_vtimer = 0;
    }
    if (frame->irq) /* run clears the line each time it returns */
        hv_vcpu_set_pending_interrupt(vcpu, HV_INTERRUPT_TYPE_IRQ, true);
}

static void decode_data_abort(hv_vcpu_t vcpu, const hv_vcpu_exit_t *exit, avmm_frame_t *frame) {
    uint64_t esr = frame->syndrome;
    frame->address = exit->exception.physical_address;
    if (!(esr & DABT_ISV) || esr & DABT_S1PTW) {
        frame->kind = AVMM_EXIT_ABORT;
        return;
    }
    frame->size = (uint8_t)(1u << (esr >> 22 & 3));
    frame->reg = esr >> 16 & 31;
    frame->sign_extend = !!(esr & DABT_SSE);
    frame->wide = !!(esr & DABT_SF);
    frame->kind = esr & DABT_WNR ? AVMM_EXIT_MMIO_WRITE : AVMM_EXIT_MMIO_READ;
    if (esr & DABT_WNR)
        frame->value = get_reg(vcpu, frame->reg) & UINT64_MAX >> (64 - 8 * frame->size);
}

static uint64_t sysreg_encoding(uint64_t iss) {
    return (iss >> 20 & 3) << 14 | (iss >> 14 & 7) << 11 | (iss >> 10 & 15) << 7 | (iss >> 1 & 15) << 3 |
           (iss >> 17 & 7);
}

static void decode_sysreg(hv_vcpu_t vcpu, avmm_frame_t *frame) {
    uint64_t iss = frame->syndrome;
    frame->address = sysreg_encoding(iss);
    frame->size = 8;
    frame->reg = iss >> 5 & 31;
    frame->sign_extend = 0;
    frame->wide = 1;
    frame->kind = iss & 1 ? AVMM_EXIT_SYSREG_READ : AVMM_EXIT_SYSREG_WRITE;
    if (!(iss & 1))
        frame->value = get_reg(vcpu, frame->reg);
}

static void decode_call(hv_vcpu_t vcpu, avmm_frame_t *frame, uint32_t kind) {
    frame->kind = kind;
    for (uint32_t i = 0; i < 8; i++)
        hv_vcpu_get_reg(vcpu, (hv_reg_t)i, &frame->args[i]);
}

static void decode_wait(hv_vcpu_t vcpu, avmm_frame_t *frame) {
    unsigned instruction = frame->syndrome & 3; /* ISS.TI: WFI, WFE, WFIT, WFET */
    frame->kind = instruction & 1 ? AVMM_EXIT_WFE : AVMM_EXIT_WFI;
    frame->value = instruction & 2 ? get_reg(vcpu, frame->syndrome >> 5 & 31) : 0;
    hv_vcpu_get_sys_reg(vcpu, HV_SYS_REG_CNTV_CTL_EL0, &frame->vtimer_ctl);
    hv_vcpu_get_sys_reg(vcpu, HV_SYS_REG_CNTV_CVAL_EL0, &frame->vtimer_cval);
}

static void decode_exception(hv_vcpu_t vcpu, const hv_vcpu_exit_t *exit, avmm_frame_t *frame) {
    frame->syndrome = exit->exception.syndrome;
    frame->virtual_address = exit->exception.virtual_address;
    switch (frame->syndrome >> 26 & 0x3f) {
    case EC_DABT:
        decode_data_abort(vcpu, exit, frame);
        break;
    case EC_SYSREG:
        decode_sysreg(vcpu, frame);
        break;
    case EC_WFX:
        decode_wait(vcpu, frame);
        break;
    case EC_HVC:
        decode_call(vcpu, frame, AVMM_EXIT_HVC);
        break;
    case EC_SMC:
        decode_call(vcpu, frame, AVMM_EXIT_SMC);
        break;
    case EC_IABT:
        frame->kind = AVMM_EXIT_ABORT;
        frame->address = exit->exception.physical_address;
        break;
    default:
        frame->kind = AVMM_EXIT_OTHER;
    }
}

/* Cache maintenance of memory that is not there: nothing to maintain. */
static bool is_cache_maintenance(const hv_vcpu_exit_t *exit) {
    uint64_t esr = exit->exception.syndrome;
    return exit->reason == HV_EXIT_REASON_EXCEPTION && (esr >> 26 & 0x3f) == EC_DABT && esr & DABT_CM;
}

uint32_t avmm_withdraw(avmm_frame_t *frame) { return __atomic_exchange_n(&frame->offer, 0, __ATOMIC_ACQ_REL); }

/* The guest reads ICC_IAR1_EL1, and there is an offer: it is taken. */
static bool take_offer(const hv_vcpu_exit_t *exit, avmm_frame_t *frame) {
    uint32_t offer = __atomic_load_n(&frame->offer, __ATOMIC_ACQUIRE);
    if (!(offer & AVMM_OFFERED) || exit->reason != HV_EXIT_REASON_EXCEPTION)
        return false;
    frame->syndrome = exit->exception.syndrome;
    if ((frame->syndrome >> 26 & 0x3f) != EC_SYSREG || !(frame->syndrome & 1) ||
        sysreg_encoding(frame->syndrome) != ICC_IAR1_EL1)
        return false;
    uint32_t intid = offer & ~(uint32_t)AVMM_OFFERED;
    if (!__atomic_compare_exchange_n(&frame->offer, &offer, AVMM_TAKEN | intid, false, __ATOMIC_ACQ_REL,
                                     __ATOMIC_ACQUIRE))
        return false; /* withdrawn just now */
    frame->acknowledged = 1;
    frame->irq = 0; /* nothing that is pending has a higher priority */
    frame->reg = frame->syndrome >> 5 & 31;
    frame->size = 8;
    frame->sign_extend = 0;
    frame->wide = 1;
    frame->result = intid;
    frame->finish = AVMM_FINISH_RESULT;
    return true;
}

/* The guest prints, and its UART is open. Not while the timer's mask is ours: every exit looks whether it may go. */
static bool print(hv_vcpu_t vcpu, const hv_vcpu_exit_t *exit, avmm_frame_t *frame) {
    if (!avmm_uart_is_open(frame->uart) || frame->vtimer_masked || exit->reason != HV_EXIT_REASON_EXCEPTION ||
        (exit->exception.syndrome >> 26 & 0x3f) != EC_DABT)
        return false;
    frame->syndrome = exit->exception.syndrome;
    decode_data_abort(vcpu, exit, frame);
    return avmm_uart_serve(frame->uart, frame);
}

/* False: awake, but not to enter the guest. */
static bool sleep_first(avmm_frame_t *frame) {
    frame->sleep = 0;
    uint32_t how = avmm_gate_sleep(frame->gate, frame->sleep_until, frame->sleep_exact);
    frame->expired = how == AVMM_GATE_SHUT;
    frame->entered = how == AVMM_GATE_ENTER ? avmm_monotonic_ns() : 0;
    frame->irq |= how == AVMM_GATE_ENTER;
    return how == AVMM_GATE_ENTER;
}

void avmm_run(hv_vcpu_t vcpu, hv_vcpu_exit_t *exit, avmm_frame_t *frame) {
    hv_return_t result;
    if (frame->sleep && !sleep_first(frame)) {
        frame->kind = AVMM_EXIT_CANCELED;
        return;
    }
    for (;;) {
        deliver(vcpu, frame);
        result = hv_vcpu_run(vcpu);
        hv_vcpu_get_reg(vcpu, HV_REG_PC, &frame->pc);
        if (result)
            break;
        if (is_cache_maintenance(exit))
            frame->finish = AVMM_FINISH_ADVANCE;
        else if (!take_offer(exit, frame) && !print(vcpu, exit, frame))
            break;
    }
    if (result) {
        frame->kind = AVMM_EXIT_ERROR;
        frame->value = (uint32_t)result;
        return;
    }
    switch (exit->reason) {
    case HV_EXIT_REASON_EXCEPTION:
        decode_exception(vcpu, exit, frame);
        break;
    case HV_EXIT_REASON_CANCELED:
        frame->kind = AVMM_EXIT_CANCELED;
        break;
    case HV_EXIT_REASON_VTIMER_ACTIVATED:
        frame->kind = AVMM_EXIT_VTIMER;
        frame->vtimer_masked = 1;
        break;
    default:
        frame->kind = AVMM_EXIT_UNKNOWN;
    }
    if (frame->vtimer_masked)
        hv_vcpu_get_sys_reg(vcpu, HV_SYS_REG_CNTV_CTL_EL0, &frame->vtimer_ctl);
}

hv_return_t avmm_get_simd_fp_reg(hv_vcpu_t vcpu, hv_simd_fp_reg_t reg, uint8_t *value) {
    hv_simd_fp_uchar16_t vector;
    hv_return_t result = hv_vcpu_get_simd_fp_reg(vcpu, reg, &vector);
    if (!result)
        memcpy(value, &vector, sizeof vector);
    return result;
}

hv_return_t avmm_set_simd_fp_reg(hv_vcpu_t vcpu, hv_simd_fp_reg_t reg, const uint8_t *value) {
    hv_simd_fp_uchar16_t vector;
    memcpy(&vector, value, sizeof vector);
    return hv_vcpu_set_simd_fp_reg(vcpu, reg, vector);
}
