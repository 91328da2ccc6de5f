// GICv3 set-up: one security state, affinity routing, everything in group 1 (Arm IHI 0069).
#include "guest.h"

#define GICD_CTLR GICD
#define GICD_TYPER (GICD + 4)
#define GICD_IGROUPR (GICD + 0x80)
#define WAKER 0x14
#define IGROUPR0 (GICR_SGI + 0x80)
#define ISENABLER0 (GICR_SGI + 0x100)
#define ICENABLER0 (GICR_SGI + 0x180)
#define IPRIORITYR (GICR_SGI + 0x400)

void gic_init_distributor(void)
{
    u32 words = (load32(GICD_TYPER) & 31) + 1; // ITLinesNumber
    for (u32 word = 1; word < words; word++)
        store32(GICD_IGROUPR + 4 * word, ~0U);
    store32(GICD_CTLR, 0x10 | 2); // ARE, EnableGrp1 (one security state: 12.9.4)
    while (load32(GICD_CTLR) & 1U << 31) // RWP
        ;
}

void gic_init_cpu(void)
{
    struct cpu *self = this_cpu();
    u64 mpidr = read_sysreg(mpidr_el1);
    u32 wanted = (u32)(mpidr & 0xffffff) | (u32)(mpidr >> 8 & 0xff000000);
    u64 base = GICR;
    while ((load64(base + 8) >> 32) != wanted) { // TYPER.Affinity_Value
        if (load32(base + 8) & 0x10) {           // TYPER.Last
            print("not ok no redistributor for affinity %x\n", (u64)wanted);
            system_off();
        }
        base += GICR_STRIDE;
    }
    self->redistributor = base;
    store32(base + WAKER, load32(base + WAKER) & ~2U); // ProcessorSleep
    while (load32(base + WAKER) & 4)                   // ChildrenAsleep
        ;
    store32(base + IGROUPR0, ~0U);
    store32(base + ICENABLER0, ~0U);
    for (u32 word = 0; word < 8; word++)
        store32(base + IPRIORITYR + 4 * word, 0xa0a0a0a0);
    write_icc(S3_0_C12_C12_5, 7); // ICC_SRE_EL1
    write_icc(S3_0_C4_C6_0, 0xff);
    write_icc(S3_0_C12_C12_7, 1);
}

void gic_enable_private(u32 intid) { store32(this_cpu()->redistributor + ISENABLER0, 1U << intid); }

void gic_send_sgi(u32 intid, u64 mpidr)
{
    dsb(sy); // what was written before must be seen by whoever takes it
    write_icc(S3_0_C12_C11_5, (mpidr >> 32 & 0xff) << 48 | (mpidr >> 16 & 0xff) << 32 | (u64)intid << 24 |
                                  (mpidr >> 8 & 0xff) << 16 | 1UL << (mpidr & 15));
}
