/* Waiting on a condition until a moment of the monotonic clock, which no two systems spell alike. */
#ifndef AVMM_WAIT_H
#define AVMM_WAIT_H

#include <pthread.h>
#include <stdint.h>
#include <time.h>

#ifdef __APPLE__
/* The clock of Python's time.monotonic_ns(), which stands still while the host sleeps. */
static inline uint64_t monotonic_ns(void) { return clock_gettime_nsec_np(CLOCK_UPTIME_RAW); }

static inline void cond_init(pthread_cond_t *cond) { pthread_cond_init(cond, NULL); }

static inline void cond_wait_until(pthread_cond_t *cond, pthread_mutex_t *lock, uint64_t until) {
    uint64_t now = monotonic_ns(), left = until > now ? until - now : 0;
    struct timespec relative = {(time_t)(left / 1000000000), (long)(left % 1000000000)};
    pthread_cond_timedwait_relative_np(cond, lock, &relative);
}
#else
static inline uint64_t monotonic_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* For cond_wait_until(); other waits may use it too. */
static inline void cond_init(pthread_cond_t *cond) {
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(cond, &attributes);
    pthread_condattr_destroy(&attributes);
}

static inline void cond_wait_until(pthread_cond_t *cond, pthread_mutex_t *lock, uint64_t until) {
    struct timespec absolute = {(time_t)(until / 1000000000), (long)(until % 1000000000)};
    pthread_cond_timedwait(cond, lock, &absolute);
}
#endif

#endif
