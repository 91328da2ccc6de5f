// GICv3 as the CPU interface shows it (Arm IHI 0069): priorities, pending and active, EOI modes, groups, routing.
// Interrupts stay masked in PSTATE; they are acknowledged by hand, so each state can be looked at.
#include "guest.h"

#define NONE 1023
#define ENABLE 0x100
#define DISABLE 0x180
#define PEND 0x200
#define UNPEND 0x280
#define ACTIVATE 0x300
#define DEACTIVATE 0x380
#define PRIORITY 0x400
#define CONFIG 0xc00
#define GROUP 0x80
#define ISR_IRQ 0x80 // ISR_EL1.I

static u64 frame; // this CPU's SGI_base
static u32 spi;   // an SPI no device has: the last one

static u64 acknowledge(void)
{
    isb();
    u64 intid = read_sysreg(S3_0_C12_C12_0);
    dsb(sy);
    return intid;
}

static void complete(u64 intid) { write_icc(S3_0_C12_C12_1, intid); }
static void deactivate(u64 intid) { write_icc(S3_0_C12_C11_1, intid); }
static u64 running(void) { return read_sysreg(S3_0_C12_C11_3); }
static u64 highest_pending(void) { return read_sysreg(S3_0_C12_C12_2); }
static u64 irq_line(void) { return read_sysreg(isr_el1) & ISR_IRQ; }

static void set_bit(u64 bank, u32 intid)
{
    u64 base = intid < 32 ? frame : GICD;
    store32(base + bank + intid / 32 * 4, 1U << intid % 32);
    dsb(sy);
}

static u64 bit(u64 bank, u32 intid)
{
    return load32((intid < 32 ? frame : GICD) + bank + intid / 32 * 4) >> intid % 32 & 1;
}

static void set_priority(u32 intid, u8 priority)
{
    store8((intid < 32 ? frame : GICD) + PRIORITY + intid, priority);
    dsb(sy);
}

static void set_group(u32 intid, u32 group)
{
    u64 at = (intid < 32 ? frame : GICD) + GROUP + intid / 32 * 4;
    store32(at, (load32(at) & ~(1U << intid % 32)) | group << intid % 32);
    dsb(sy);
}

static void set_edge(u32 intid, u32 edge)
{
    u64 at = GICD + CONFIG + intid / 16 * 4;
    store32(at, (load32(at) & ~(2U << intid % 16 * 2)) | (edge << 1) << intid % 16 * 2);
    dsb(sy);
}

static void send_to_self(u32 intid) { gic_send_sgi(intid, read_sysreg(mpidr_el1)); }

static void identification(void)
{
    check_equal("distributor_version", load32(GICD + 0xffe8) >> 4 & 15, 3);
    check_equal("redistributor_version", load32(this_cpu()->redistributor + 0xffe8) >> 4 & 15, 3);
    value("distributor_typer", load32(GICD + 4));
    value("interface_ctlr", read_sysreg(S3_0_C12_C12_4));
    check_equal("sre", read_sysreg(S3_0_C12_C12_5) & 1, 1);
    check_equal("sgi_config", load32(frame + CONFIG), 0xaaaaaaaa); // SGIs are edges, for good
    check("priority_bits", (read_sysreg(S3_0_C12_C12_4) >> 8 & 7) >= 3); // at least 32 levels (4.8)
    store32(frame + PRIORITY, 0x183878ff);
    u32 mask = (u8)(0xff << (7 - (read_sysreg(S3_0_C12_C12_4) >> 8 & 7)));
    mask *= 0x01010101; // the distributor may keep more bits than the interface has, not fewer
    check_equal("priority_readback", load32(frame + PRIORITY) & mask, 0x183878ffU & mask);
    store32(frame + PRIORITY, 0xa0a0a0a0);
    write_icc(S3_0_C4_C6_0, 0xff);
    check_equal("pmr_readback", read_sysreg(S3_0_C4_C6_0), mask & 0xff);
}

static void pending_and_active(void)
{
    check_equal("spurious", acknowledge(), NONE);
    check_equal("idle_running", running(), 0xff);
    check_equal("idle_highest", highest_pending(), NONE);
    check_equal("idle_line", irq_line(), 0);

    send_to_self(1);
    check_equal("disabled_pends", bit(PEND, 1), 1);
    check_equal("disabled_spurious", acknowledge(), NONE);
    check_equal("disabled_line", irq_line(), 0);
    set_bit(ENABLE, 1);
    check_equal("enabled_line", irq_line(), ISR_IRQ);
    check_equal("enabled_highest", highest_pending(), 1);
    check_equal("taken", acknowledge(), 1);
    check_equal("taken_not_pending", bit(PEND, 1), 0);
    check_equal("taken_active", bit(ACTIVATE, 1), 1);
    check_equal("taken_running", running(), 0xa0);
    check("taken_active_priority", read_sysreg(S3_0_C12_C9_0) != 0);
    check_equal("taken_line", irq_line(), 0);
    send_to_self(1);
    check_equal("active_and_pending", bit(PEND, 1) + bit(ACTIVATE, 1), 2);
    check_equal("not_taken_twice", acknowledge(), NONE);
    complete(1);
    check_equal("completed_inactive", bit(ACTIVATE, 1), 0);
    check_equal("completed_running", running(), 0xff);
    check_equal("completed_active_priority", read_sysreg(S3_0_C12_C9_0), 0);
    check_equal("taken_again", acknowledge(), 1);
    complete(1);
    check_equal("then_nothing", acknowledge(), NONE);

    send_to_self(1);
    set_bit(DISABLE, 1);
    check_equal("disabled_while_pending", acknowledge(), NONE);
    set_bit(ENABLE, 1);
    set_bit(UNPEND, 1);
    check_equal("pending_cleared", acknowledge(), NONE);
    set_bit(PEND, 1);
    check_equal("pending_set", acknowledge(), 1);
    complete(1);

    set_bit(ACTIVATE, 1); // by hand: no priority becomes active, but it cannot be taken
    send_to_self(1);
    check_equal("active_by_hand", acknowledge(), NONE);
    set_bit(DEACTIVATE, 1);
    check_equal("deactivated_by_hand", acknowledge(), 1);
    complete(1);
}

static void priorities(void)
{
    set_bit(ENABLE, 2);
    set_bit(ENABLE, 3);
    set_priority(1, 0xa0);
    set_priority(2, 0x80);
    set_priority(3, 0xa0);
    send_to_self(3);
    send_to_self(1);
    send_to_self(2);
    check_equal("highest_first", acknowledge(), 2);
    check_equal("lower_waits", acknowledge(), NONE);
    complete(2);
    check_equal("lowest_intid_first", acknowledge(), 1);
    check_equal("equal_does_not_preempt", acknowledge(), NONE);
    send_to_self(2);
    check_equal("preempting_line", irq_line(), ISR_IRQ);
    check_equal("preempts", acknowledge(), 2);
    check_equal("preempting_priority", running(), 0x80);
    complete(2);
    check_equal("back_to", running(), 0xa0);
    complete(1);
    check_equal("last", acknowledge(), 3);
    complete(3);

    write_icc(S3_0_C12_C12_3, 7); // BPR1: only bit 7 makes the group priority (4.8.3)
    send_to_self(1);
    check_equal("bpr_first", acknowledge(), 1);
    check_equal("bpr_running", running(), 0x80);
    send_to_self(2);
    check_equal("bpr_no_preemption", acknowledge(), NONE);
    complete(1);
    check_equal("bpr_after", acknowledge(), 2);
    complete(2);
    write_icc(S3_0_C12_C12_3, 0); // becomes the least there is

    write_icc(S3_0_C4_C6_0, 0xa0);
    send_to_self(1);
    check_equal("pmr_equal_is_masked", acknowledge(), NONE);
    check_equal("pmr_line", irq_line(), 0);
    send_to_self(2);
    check_equal("pmr_lets_higher", acknowledge(), 2);
    complete(2);
    write_icc(S3_0_C4_C6_0, 0xff);
    check_equal("pmr_open", acknowledge(), 1);
    complete(1);

    send_to_self(1);
    write_icc(S3_0_C12_C12_7, 0);
    check_equal("group_off_line", irq_line(), 0);
    check_equal("group_off", acknowledge(), NONE);
    write_icc(S3_0_C12_C12_7, 1);
    check_equal("group_on", acknowledge(), 1);
    complete(1);
}

static void end_of_interrupt_modes(void)
{
    u64 control = read_sysreg(S3_0_C12_C12_4);
    write_icc(S3_0_C12_C12_4, control | 2); // EOImode: EOIR drops the priority, DIR deactivates
    send_to_self(1);
    send_to_self(3);
    check_equal("split_taken", acknowledge(), 1);
    complete(1);
    check_equal("split_priority_dropped", running(), 0xff);
    check_equal("split_still_active", bit(ACTIVATE, 1), 1);
    send_to_self(1);
    check_equal("split_other_taken", acknowledge(), 3);
    complete(3);
    check_equal("split_active_waits", acknowledge(), NONE);
    deactivate(1);
    check_equal("split_deactivated", acknowledge(), 1);
    complete(1);
    deactivate(1);
    deactivate(3);
    check_equal("split_all_done", bit(ACTIVATE, 1) + bit(ACTIVATE, 3), 0);
    write_icc(S3_0_C12_C12_4, control);
}

static void shared(void)
{
    u64 router = GICD + 0x6000 + 8UL * spi, self = read_sysreg(mpidr_el1) & 0xff00ffffffUL;
    value("spi", spi);
    store64(router, self);
    check_equal("router_readback", load64(router), self);
    set_priority(spi, 0x90);
    set_group(spi, 1);
    for (u32 edge = 0; edge < 2; edge++) {
        set_edge(spi, edge);
        set_bit(PEND, spi);
        check_equal("spi_disabled", acknowledge(), NONE);
        set_bit(ENABLE, spi);
        check_equal("spi_line", irq_line(), ISR_IRQ);
        check_equal("spi_taken", acknowledge(), spi);
        check_equal("spi_running", running(), 0x90);
        check_equal("spi_not_pending", bit(PEND, spi), 0); // a level made pending by hand is not asserted
        set_bit(PEND, spi);
        check_equal("spi_active_and_pending", bit(PEND, spi) + bit(ACTIVATE, spi), 2);
        complete(spi);
        check_equal("spi_again", acknowledge(), spi);
        complete(spi);
        check_equal("spi_once", acknowledge(), NONE);
        set_bit(PEND, spi);
        set_bit(UNPEND, spi);
        check_equal("spi_cleared", acknowledge(), NONE);
        set_bit(DISABLE, spi);
    }
    set_bit(ENABLE, spi);
    set_group(spi, 0); // group 0 is for FIQ and IAR0
    set_bit(PEND, spi);
    check_equal("group0_not_irq", irq_line(), 0);
    check_equal("group0_not_iar1", acknowledge(), NONE);
    set_group(spi, 1);
    check_equal("group1_again", acknowledge(), spi);
    complete(spi);

    u32 control = load32(GICD);
    store32(GICD, control & ~2U); // EnableGrp1
    set_bit(PEND, spi);
    check_equal("distributor_off", acknowledge(), NONE);
    store32(GICD, control);
    dsb(sy);
    check_equal("distributor_on", acknowledge(), spi);
    complete(spi);

    store64(router, 0xff0000fefeUL); // nobody: Aff3 is in bits 39:32, and bit 31 is IRM
    set_bit(PEND, spi);
    check_equal("routed_to_nobody", acknowledge(), NONE);
    store64(router, 1UL << 31); // IRM: any participating CPU; here this one or none at all
    dsb(sy);
    u64 any = acknowledge();
    check("routed_to_any", any == spi || any == NONE);
    if (any == spi)
        complete(spi);
    store64(router, self);
    set_bit(UNPEND, spi);
}

static void timer_level(void)
{
    set_bit(ENABLE, 27);
    write_sysreg(cntv_cval_el0, 0);
    write_sysreg(cntv_ctl_el0, 1);
    isb();
    while (!irq_line())
        ;
    check_equal("timer_pending", bit(PEND, 27), 1);
    check_equal("timer_taken", acknowledge(), 27);
    check_equal("timer_level_still_pending", bit(PEND, 27), 1);
    complete(27);
    while (!irq_line())
        ;
    check_equal("timer_taken_again", acknowledge(), 27);
    write_sysreg(cntv_ctl_el0, 0);
    isb();
    complete(27);
    while (bit(PEND, 27)) // the level falls in finite time
        ;
    check_equal("timer_gone", acknowledge(), NONE);
    set_bit(DISABLE, 27);
}

static volatile u64 elsewhere;
static volatile bool ready;

void on_irq(u32 intid)
{
    if (this_cpu()->index == 1 && intid < 1020)
        elsewhere = intid;
}

static void secondary(struct cpu *self)
{
    (void)self;
    gic_init_cpu();
    ready = true;
    while (elsewhere != spi) {
        wfi();
        irq_enable();
        irq_disable();
    }
}

static void another_cpu(void)
{
    while (!ready)
        ;
    store64(GICD + 0x6000 + 8UL * spi, affinity(1));
    set_bit(PEND, spi);
    check_equal("routed_away", acknowledge(), NONE);
    while (elsewhere != spi)
        ;
    check("routed_there", true);
}

void main(const void *device_tree)
{
    (void)device_tree;
    gic_init_distributor();
    gic_init_cpu();
    frame = this_cpu()->redistributor + GICR_SGI;
    spi = ((load32(GICD + 4) & 31) + 1) * 32 - 1;
    if (spi > 1019)
        spi = 1019;
    identification();
    set_priority(1, 0xa0);
    pending_and_active();
    priorities();
    end_of_interrupt_modes();
    shared();
    timer_level();
    set_bit(ENABLE, spi);
    bool second = start_cpus(2, secondary) == 2;
    value("second_cpu", second);
    if (second)
        another_cpu();
    finish();
}
