// What a served exit costs: MMIO reads and writes, PSCI calls, GIC system registers, beside an empty loop.
//
// Argument: n, exits of each kind (20000). Prints for each kind, in CNTVCT ticks: the total of n, and the median and
// the least of the chunks of `chunk` exits; cntfrq turns them into seconds.
#include "guest.h"

#define CHUNKS 100

static u64 sample[CHUNKS];

static void report(const char *name)
{
    u64 total = 0;
    for (u64 i = 0; i < CHUNKS; i++) {
        u64 key = sample[i], j = i;
        total += key;
        for (; j && sample[j - 1] > key; j--)
            sample[j] = sample[j - 1];
        sample[j] = key;
    }
    print("%s_ticks %u\n%s_median %u\n%s_least %u\n", name, total, name, sample[CHUNKS / 2], name, sample[0]);
}

#define MEASURE(name, statement)                                                                                       \
    do {                                                                                                               \
        for (u64 i_ = 0; i_ < CHUNKS; i_++) {                                                                          \
            u64 start_ = counter();                                                                                    \
            for (u64 j_ = 0; j_ < chunk; j_++)                                                                         \
                statement;                                                                                             \
            sample[i_] = counter() - start_;                                                                           \
        }                                                                                                              \
        report(name);                                                                                                  \
    } while (0)

void main(const void *device_tree)
{
    u64 chunk = argument(device_tree, "n", 20000) / CHUNKS;
    gic_init_distributor();
    gic_init_cpu();
    value("cntfrq", read_sysreg(cntfrq_el0));
    value("chunk", chunk);
    MEASURE("empty", __asm__ volatile("" ::: "memory"));
    MEASURE("mmio_read", load32(UART + 0x18));        // FR
    MEASURE("mmio_write", store32(UART + 0x38, 0));   // IMSC
    MEASURE("hypercall", hypercall(PSCI_VERSION, 0, 0, 0));
    MEASURE("sysreg", write_icc(S3_0_C4_C6_0, 0xff)); // ICC_PMR_EL1
    check_equal("psci_conduit", (u64)hypercall(PSCI_VERSION, 0, 0, 0) >> 16, 1);
    finish();
}
