// What a bare-metal guest may count on: registers, printing, PSCI, the GIC, other CPUs, traps it asks for.
#ifndef GUEST_H
#define GUEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "layout.h"

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int64_t s64;

#define GICD 0x08000000UL
#define GICR 0x080a0000UL
#define GICR_STRIDE 0x20000UL
#define GICR_SGI 0x10000UL
#define UART 0x09000000UL
#define RTC 0x09010000UL
#define VIRTIO_MMIO 0x0a000000UL
#define MAX_CPUS 8

#define EL0T 0x3c0UL // SPSR_EL1 values: DAIF masked, NZCV clear
#define EL1T 0x3c4UL
#define EL1H 0x3c5UL

// Descriptors of the stage 1 tables (D8.3), with a block's or a page's attributes. NORMAL is MAIR's attribute 1.
#define VALID_TABLE 3UL
#define PAGE 3UL
#define AF (1UL << 10)
#define SH_INNER (3UL << 8)
#define NORMAL (1UL << 2)
#define EL0_ACCESS (1UL << 6)
#define READ_ONLY (1UL << 7)
#define PXN (1UL << 53)
#define UXN (1UL << 54)
#define PAGE_ATTRIBUTES (PAGE | AF | SH_INNER | NORMAL)

#define read_sysreg(name) ({ u64 value_; __asm__ volatile("mrs %0, " #name : "=r"(value_)::"memory"); value_; })
#define write_sysreg(name, value) __asm__ volatile("msr " #name ", %x0" ::"rZ"((u64)(value)) : "memory")
#define isb() __asm__ volatile("isb" ::: "memory")
#define dsb(domain) __asm__ volatile("dsb " #domain ::: "memory")
#define wfi() __asm__ volatile("dsb sy\n\twfi" ::: "memory")
#define irq_enable() __asm__ volatile("msr daifclr, #2\n\tisb" ::: "memory")
#define irq_disable() __asm__ volatile("msr daifset, #2\n\tisb" ::: "memory")

static inline bool has_lse(void) { return (read_sysreg(id_aa64isar0_el1) >> 20 & 15) >= 2; } // its field Atomic

static inline u64 counter(void) // CNTVCT_EL0, not read ahead of what comes before it
{
    isb();
    return read_sysreg(cntvct_el0);
}

// The address of a label in assembly text. Hidden, or the linker's GOT entry would be the section's, not the label's.
#define LABEL(name) ({ extern const u8 name[] __attribute__((visibility("hidden"))); (u64)name; })

/*
 * One plain load or store each, whatever the compiler would like better: a device access with write-back has no
 * syndrome (Arm ARM D17.2.37, ISV), and no hypervisor can serve it.
 */
#define ACCESSORS(bits, from, to, width)                                                                          \
    static inline u##bits load##bits(u64 address)                                                                 \
    {                                                                                                             \
        u##bits value;                                                                                            \
        __asm__ volatile(from " %" width "0, [%1]" : "=r"(value) : "r"(address) : "memory");                      \
        return value;                                                                                             \
    }                                                                                                             \
    static inline void store##bits(u64 address, u##bits value)                                                    \
    {                                                                                                             \
        __asm__ volatile(to " %" width "0, [%1]" ::"rZ"(value), "r"(address) : "memory");                      \
    }
ACCESSORS(8, "ldrb", "strb", "w")
ACCESSORS(32, "ldr", "str", "w")
ACCESSORS(64, "ldr", "str", "x")

struct frame { // what the vectors save
    u64 x[31], elr, spsr, esr, far, pad;
};

struct trap { // a synchronous exception caught by attempt(); vector is VBAR offset / 0x80
    u64 vector, esr, far, elr, spsr, x0;
};

struct cpu {
    u64 catch;
    u64 mpidr;
    void (*main)(struct cpu *);
    u64 index;
    struct trap trap;
    u64 redistributor;
    u8 stack[CPU_SIZE - 88] __attribute__((aligned(8)));
};

extern struct cpu boot_cpu;
static inline struct cpu *this_cpu(void) { return (struct cpu *)read_sysreg(tpidr_el1); }

// What the guest provides.
void main(const void *device_tree);
void on_irq(u32 intid); // called with the interrupt acknowledged; on return it is completed

// Printing. Formats: %s, %u and %x (u64), %%.
void print(const char *format, ...);
void check(const char *name, bool passed);                // "ok NAME" or "not ok NAME"
void check_equal(const char *name, u64 got, u64 expected); // the same, saying what was seen
void value(const char *name, u64 number);                 // "NAME number"
_Noreturn void finish(void);                              // the TAP plan, then PSCI SYSTEM_OFF
_Noreturn void system_off(void);

// `name=number` on the kernel command line, else `otherwise`.
u64 argument(const void *device_tree, const char *name, u64 otherwise);

// PSCI by HVC (DEN0022).
#define PSCI_VERSION 0x84000000
#define PSCI_CPU_SUSPEND 0xc4000001
#define PSCI_CPU_OFF 0x84000002
#define PSCI_CPU_ON 0xc4000003
#define PSCI_AFFINITY_INFO 0xc4000004
#define PSCI_MIGRATE_INFO_TYPE 0x84000006
#define PSCI_SYSTEM_OFF 0x84000008
#define PSCI_SYSTEM_RESET 0x84000009
#define PSCI_FEATURES 0x8400000a
s64 hypercall(u64 function, u64 x1, u64 x2, u64 x3);
_Noreturn void cpu_off(void);

// Other CPUs. start_cpus() turns on as many as there are, at most `limit` with this one, and returns their number.
extern void secondary_start(void);
u64 affinity(u64 index); // MPIDR_EL1 affinity of CPU `index`, as QEMU's virt numbers them
u64 start_cpus(u64 limit, void (*entry)(struct cpu *));
struct cpu *cpu(u64 index);

// GICv3, one security state, affinity routing, group 1.
void gic_init_distributor(void);
void gic_init_cpu(void); // this CPU's redistributor and interface; every SGI and PPI is disabled
void gic_enable_private(u32 intid);
void gic_send_sgi(u32 intid, u64 target_mpidr);
#define write_icc(name, value) do { write_sysreg(name, value); isb(); } while (0)
#define ICC_PMR S3_0_C4_C6_0
#define ICC_IAR1 S3_0_C12_C12_0
#define ICC_EOIR1 S3_0_C12_C12_1
#define ICC_HPPIR1 S3_0_C12_C12_2
#define ICC_BPR1 S3_0_C12_C12_3
#define ICC_CTLR S3_0_C12_C12_4
#define ICC_SRE S3_0_C12_C12_5
#define ICC_IGRPEN1 S3_0_C12_C12_7
#define ICC_DIR S3_0_C12_C11_1
#define ICC_RPR S3_0_C12_C11_3
#define ICC_SGI1R S3_0_C12_C11_5
#define ICC_AP1R0 S3_0_C12_C9_0
#define ICC_IAR0 S3_0_C12_C8_0

// Run the code at pc until it takes a synchronous exception; this_cpu()->trap then says which.
void attempt(u64 pc, u64 spsr, u64 x0, u64 x1, u64 sp_el0);
_Noreturn void unwind(u64 sp);

#endif
