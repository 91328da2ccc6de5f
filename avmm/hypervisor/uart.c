/*
 * A console's output without exits: the UART's data and flag register, answered between two runs of a vCPU.
 *
 * The device (avmm/devices/pl011.py) opens this while nothing it does depends on the single byte, and closes it before
 * anything does. One lock; a vCPU never waits for it, but exits as if this were shut.
 */
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __APPLE__
#include <Hypervisor/Hypervisor.h>
#else
#include "hv.h"
#endif
#include "frame.h"

/* Arm DDI 0183, 3.2 */
enum { UARTDR = 0x00, UARTFR = 0x18 };

/* So many looks at the flags before each byte: who looks more often waits for something, which the device must see. */
enum { LOOKS = 4 };

struct avmm_uart {
    pthread_mutex_t lock;
    uint64_t base;
    uint64_t served;
    uint32_t flags;
    uint32_t looks; /* left */
    uint32_t held;
    bool open;      /* changed under the lock, looked at without */
    uint8_t bytes[AVMM_UART_BYTES];
};

avmm_uart_t *avmm_uart_new(uint64_t base) {
    avmm_uart_t *uart = calloc(1, sizeof *uart);
    if (!uart)
        return NULL;
    pthread_mutex_init(&uart->lock, NULL);
    uart->base = base;
    return uart;
}

void avmm_uart_free(avmm_uart_t *uart) {
    pthread_mutex_destroy(&uart->lock);
    free(uart);
}

void avmm_uart_open(avmm_uart_t *uart, uint32_t flags) {
    pthread_mutex_lock(&uart->lock);
    uart->flags = flags;
    uart->looks = LOOKS;
    __atomic_store_n(&uart->open, true, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&uart->lock);
}

uint32_t avmm_uart_close(avmm_uart_t *uart, uint8_t *bytes) {
    pthread_mutex_lock(&uart->lock);
    __atomic_store_n(&uart->open, false, __ATOMIC_RELEASE);
    uint32_t held = uart->held;
    memcpy(bytes, uart->bytes, held);
    uart->held = 0;
    pthread_mutex_unlock(&uart->lock);
    return held;
}

uint64_t avmm_uart_served(avmm_uart_t *uart) { return __atomic_load_n(&uart->served, __ATOMIC_RELAXED); }

bool avmm_uart_is_open(const avmm_uart_t *uart) { return uart && __atomic_load_n(&uart->open, __ATOMIC_ACQUIRE); }

static bool serve(avmm_uart_t *uart, avmm_frame_t *frame) {
    if (!uart->open)
        return false;
    if (frame->kind == AVMM_EXIT_MMIO_WRITE && frame->address == uart->base + UARTDR && uart->held < AVMM_UART_BYTES) {
        uart->bytes[uart->held++] = (uint8_t)frame->value;
        uart->looks = LOOKS;
        frame->finish = AVMM_FINISH_ADVANCE;
        return true;
    }
    if (frame->kind == AVMM_EXIT_MMIO_READ && frame->address == uart->base + UARTFR && uart->looks) {
        uart->looks--;
        frame->result = uart->flags;
        frame->finish = AVMM_FINISH_RESULT;
        return true;
    }
    return false;
}

bool avmm_uart_serve(avmm_uart_t *uart, avmm_frame_t *frame) {
    if (pthread_mutex_trylock(&uart->lock))
        return false; /* several vCPUs print at once, or it is being closed */
    bool served = serve(uart, frame);
    if (served)
        __atomic_store_n(&uart->served, uart->served + 1, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&uart->lock);
    return served;
}
