// The virtual timer, its interrupt (PPI 27) and WFI, as an idle loop uses them.
//
// Arguments: n, ticks in each part (20); hz, ticks a second (500).
// Checks that no interrupt comes before CNTV_CVAL_EL0, and that each tick brings exactly one.
#include "guest.h"

#define TIMER 27

static volatile u64 ticks, early, dead, lateness, worst;
static u64 deadline, period;
static bool periodic;

static void arm(u64 at)
{
    deadline = at;
    write_sysreg(cntv_cval_el0, at);
    write_sysreg(cntv_ctl_el0, 1);
    isb();
}

void on_irq(u32 intid)
{
    u64 now = counter();
    if (intid != TIMER) {
        dead++;
        return;
    }
    ticks++;
    if (now < deadline) {
        early++;
    } else {
        lateness += now - deadline;
        if (now - deadline > worst)
            worst = now - deadline;
    }
    if (read_sysreg(cntv_ctl_el0) != 5) // ENABLE and ISTATUS
        dead++;
    if (periodic)
        arm(now + period);
    else
        write_sysreg(cntv_ctl_el0, 3); // masked: the level drops before the interrupt is completed
    isb();
}

static void report(const char *name, bool passed)
{
    check(name, passed);
    value("ticks", ticks);
    check_equal("never_early", early, 0);
    check_equal("no_dead_interrupt", dead, 0);
    value("lateness_mean", lateness / (ticks ? ticks : 1));
    value("lateness_worst", worst);
    ticks = early = dead = lateness = worst = 0;
}

void main(const void *device_tree)
{
    u64 n = argument(device_tree, "n", 20), hz = argument(device_tree, "hz", 500);
    gic_init_distributor();
    gic_init_cpu();
    gic_enable_private(TIMER);
    period = read_sysreg(cntfrq_el0) / (hz ? hz : 1);
    value("cntfrq", read_sysreg(cntfrq_el0));
    value("period", period);

    // Linux's idle: WFI with PSTATE.I set; the pending interrupt ends it and is taken when the mask opens.
    // WFI may end for no reason (D1.6.2), so each wait is a loop.
    for (u64 tick = 1; tick <= n; tick++) {
        arm(counter() + period);
        while (ticks < tick) {
            wfi();
            irq_enable();
            irq_disable();
        }
    }
    report("masked", ticks == n);

    // The interrupt is taken inside WFI. The handler arms the next tick, so none can be missed before a WFI.
    periodic = true;
    arm(counter() + period);
    irq_enable();
    while (ticks < n)
        wfi();
    irq_disable();
    write_sysreg(cntv_ctl_el0, 0);
    isb();
    report("unmasked", ticks >= n);
    periodic = false;

    // Deadlines too near to sleep for, and already past.
    for (u64 tick = 1; tick <= n; tick++) {
        arm(counter() + tick - n / 2);
        while (ticks < tick) {
            wfi();
            irq_enable();
            irq_disable();
        }
    }
    report("near", ticks == n);

    // With the timer's own mask set there is nothing to take, and ISTATUS still tells (D17.11.17).
    write_sysreg(cntv_cval_el0, 0);
    write_sysreg(cntv_ctl_el0, 3);
    isb();
    irq_enable();
    irq_disable();
    check_equal("imask_ctl", read_sysreg(cntv_ctl_el0), 7);
    check_equal("imask_ticks", ticks, 0);
    finish();
}
