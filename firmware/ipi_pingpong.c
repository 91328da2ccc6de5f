// Software-generated interrupts between CPUs that sleep in WFI with PSTATE.I set.
//
// Arguments: n, trips round the ring of CPUs (500); cpus, at most so many (8). One CPU sends to itself.
// One token is in flight, so no SGI can merge with another: a lost one hangs the guest, a doubled one is seen.
#include "guest.h"

#define TOKEN 1
#define ALL 2
#define SEEN 3

static u64 trips, count;
static volatile u64 received[MAX_CPUS][16];

void on_irq(u32 intid)
{
    if (intid < 16)
        received[this_cpu()->index][intid]++;
    else
        print("not ok unexpected interrupt %u\n", (u64)intid);
}

static void wait_for(u32 sgi, u64 number)
{
    u64 self = this_cpu()->index;
    while (received[self][sgi] < number) {
        wfi();
        irq_enable();
        irq_disable();
    }
}

static void prepare(void)
{
    gic_init_cpu();
    gic_enable_private(TOKEN);
    gic_enable_private(ALL);
    gic_enable_private(SEEN);
}

static volatile bool ready[MAX_CPUS];

static void secondary(struct cpu *self)
{
    prepare();
    ready[self->index] = true;
    for (u64 trip = 1; trip <= trips; trip++) {
        wait_for(TOKEN, trip);
        gic_send_sgi(TOKEN, affinity((self->index + 1) % count));
    }
    for (u64 trip = 1; trip <= trips; trip++) {
        wait_for(ALL, trip);
        gic_send_sgi(SEEN, affinity(0));
    }
}

void main(const void *device_tree)
{
    trips = argument(device_tree, "n", 500);
    gic_init_distributor();
    prepare();
    count = start_cpus(argument(device_tree, "cpus", MAX_CPUS), secondary);
    for (u64 index = 1; index < count; index++)
        while (!ready[index])
            ;
    value("cpus", count);
    value("cntfrq", read_sysreg(cntfrq_el0));

    u64 start = counter();
    for (u64 trip = 1; trip <= trips; trip++) {
        gic_send_sgi(TOKEN, affinity(1 % count));
        wait_for(TOKEN, trip);
    }
    value("ring_trips", trips);
    value("ring_ticks", counter() - start);
    for (u64 index = 0; index < count; index++)
        check_equal("tokens", received[index][TOKEN], trips);

    // ICC_SGI1R_EL1.IRM: to every CPU but the sender; answers may merge, the counts in memory may not.
    start = counter();
    for (u64 trip = 1; trip <= trips; trip++) {
        dsb(sy);
        write_icc(S3_0_C12_C11_5, 1UL << 40 | ALL << 24);
        for (u64 index = 1; index < count; index++)
            while (received[index][ALL] < trip) {
                wfi();
                irq_enable();
                irq_disable();
            }
    }
    value("broadcast_trips", trips);
    value("broadcast_ticks", counter() - start);
    check_equal("not_to_self", received[0][ALL], 0);
    for (u64 index = 1; index < count; index++) {
        check_equal("broadcasts", received[index][ALL], trips);
        while (hypercall(PSCI_AFFINITY_INFO, affinity(index), 0, 0) != 1) // OFF
            ;
    }
    check("cpus_off", true);
    finish();
}
