// Sleeps in WFI and answers: what idling, waking and ticking cost is measured from outside.
//
// Arguments: hz, timer ticks a second on each CPU (0: no timer); cpus, at most so many (8).
// Each byte received is sent back from the interrupt handler. "r" also reports the ticks' lateness since the last
// report, in ticks of the counter. INTID 42, where something is connected, is answered with the counter's value, written
// to MAILBOX. Ends with "q".
#include "guest.h"

#define TIMER 27
#define SERIAL 33
#define DEVICE 42
#define MAILBOX 0x0b000000UL
#define SAMPLES 4096

static u64 period;
static u64 deadline[MAX_CPUS];
static u64 lateness[SAMPLES], count, early;
static volatile bool reporting, quit;

static void arm(u64 self, u64 at)
{
    deadline[self] = at;
    write_sysreg(cntv_cval_el0, at);
    write_sysreg(cntv_ctl_el0, 1);
    isb();
}

static void tick(u64 now)
{
    u64 self = this_cpu()->index;
    if (self == 0) { // the others tick too, but one CPU's figures are enough
        early += now < deadline[0];
        lateness[count++ % SAMPLES] = now < deadline[0] ? 0 : now - deadline[0];
    }
    arm(self, now + period);
}

static void receive(void)
{
    while (!(load32(UART + 0x18) & 0x10)) { // FR.RXFE
        u8 byte = (u8)load32(UART);
        store8(UART, byte);
        reporting |= byte == 'r';
        quit |= byte == 'q';
    }
}

void on_irq(u32 intid)
{
    u64 now = counter();
    if (intid == DEVICE)
        store64(MAILBOX, now);
    else if (intid == TIMER)
        tick(now);
    else if (intid == SERIAL)
        receive();
}

static void sort(u64 *values, u64 number)
{
    for (u64 gap = number / 2; gap; gap /= 2)
        for (u64 i = gap; i < number; i++)
            for (u64 j = i; j >= gap && values[j - gap] > values[j]; j -= gap) {
                u64 swap = values[j];
                values[j] = values[j - gap];
                values[j - gap] = swap;
            }
}

static void report(void)
{
    u64 number = count < SAMPLES ? count : SAMPLES;
    sort(lateness, number);
    value("ticks", number);
    value("early", early);
    if (number) {
        value("lateness_p50", lateness[number / 2]);
        value("lateness_p99", lateness[number * 99 / 100]);
        value("lateness_max", lateness[number - 1]);
    }
    print("report done\n");
    count = early = 0;
    reporting = false;
}

static void enable(u32 intid) // a shared interrupt, level, to this CPU
{
    store8(GICD + 0x400 + intid, 0x80);
    store64(GICD + 0x6000 + 8UL * intid, affinity(0));
    store32(GICD + 0x100 + intid / 32 * 4, 1U << intid % 32);
}

static _Noreturn void secondary(struct cpu *self)
{
    gic_init_cpu();
    gic_enable_private(TIMER);
    if (period)
        arm(self->index, counter() + period);
    for (;;) {
        wfi();
        irq_enable();
        irq_disable();
    }
}

static void start(struct cpu *self) { secondary(self); }

void main(const void *device_tree)
{
    u64 hz = argument(device_tree, "hz", 0);
    period = hz ? read_sysreg(cntfrq_el0) / hz : 0;
    gic_init_distributor();
    gic_init_cpu();
    gic_enable_private(TIMER);
    enable(SERIAL);
    enable(DEVICE);
    store32(UART + 0x30, 0x301); // CR: on, both ways
    store32(UART + 0x38, 0x50);  // IMSC: receive, and its timeout
    value("cpus", start_cpus(argument(device_tree, "cpus", MAX_CPUS), start));
    value("cntfrq", read_sysreg(cntfrq_el0));
    print("idle\n");
    if (period)
        arm(0, counter() + period);
    while (!quit) {
        wfi();
        irq_enable();
        irq_disable();
        if (reporting)
            report();
    }
    finish();
}
