// PSCI 1.0 and up by HVC (Arm DEN0022): what each call says, and CPUs that go on, off and on again.
#include "guest.h"

#define NOT_SUPPORTED -1
#define INVALID_PARAMETERS -2
#define ALREADY_ON -4
#define ON_PENDING -5
#define INVALID_ADDRESS -9
#define ON 0
#define OFF 1
#define PSCI_SYSTEM_SUSPEND 0xc400000e
#define SMCCC_VERSION 0x80000000

static volatile u64 entries, context_seen;
static volatile bool leave;

static void secondary(struct cpu *self)
{
    context_seen = self->index;
    entries++;
    dsb(sy);
    while (!leave)
        ;
}

static void result(const char *name, s64 got, s64 expected) { check_equal(name, (u64)got, (u64)expected); }

static void wait_until_off(u64 target)
{
    while (hypercall(PSCI_AFFINITY_INFO, target, 0, 0) != OFF)
        ;
}

static void prepare(struct cpu *other, u64 context)
{
    leave = false;
    *other = (struct cpu){.mpidr = affinity(1), .main = secondary, .index = context};
    dsb(sy);
}

static void power_cycle(void)
{
    struct cpu *other = cpu(1);
    for (u64 cycle = 1; cycle <= 3; cycle++) {
        prepare(other, cycle);
        result("cpu_on", hypercall(PSCI_CPU_ON, affinity(1), (u64)secondary_start, (u64)other), 0);
        while (entries < cycle)
            ;
        result("affinity_on", hypercall(PSCI_AFFINITY_INFO, affinity(1), 0, 0), ON);
        result("already_on", hypercall(PSCI_CPU_ON, affinity(1), (u64)secondary_start, (u64)other), ALREADY_ON);
        check_equal("context_id", context_seen, cycle);
        leave = true;
        dsb(sy);
        wait_until_off(affinity(1));
    }
    check_equal("entries", entries, 3);

    // Twice in a row: the second finds it on its way, or there (5.6.3). QEMU 7.2 may let both succeed.
    prepare(other, 4);
    result("cpu_on_first", hypercall(PSCI_CPU_ON, affinity(1), (u64)secondary_start, (u64)other), 0);
    s64 again = hypercall(PSCI_CPU_ON, affinity(1), (u64)secondary_start, (u64)other);
    check("cpu_on_again", again == ALREADY_ON || again == ON_PENDING);
    while (entries < 4)
        ;
    leave = true;
    dsb(sy);
    wait_until_off(affinity(1));
}

void main(const void *device_tree)
{
    (void)device_tree;
    u64 version = (u64)hypercall(PSCI_VERSION, 0, 0, 0);
    value("version_major", version >> 16);
    value("version_minor", version & 0xffff);
    check("version", version >> 16 == 1);

    static const struct { const char *name; u64 function; bool required; } features[] = {
        {"features_version", PSCI_VERSION, true},
        {"features_cpu_suspend", PSCI_CPU_SUSPEND, true},
        {"features_cpu_suspend_32", 0x84000001, true},
        {"features_cpu_off", PSCI_CPU_OFF, true},
        {"features_cpu_on", PSCI_CPU_ON, true},
        {"features_cpu_on_32", 0x84000003, true},
        {"features_affinity_info", PSCI_AFFINITY_INFO, true},
        {"features_affinity_info_32", 0x84000004, true},
        {"features_system_off", PSCI_SYSTEM_OFF, true},
        {"features_system_reset", PSCI_SYSTEM_RESET, true},
        {"features_features", PSCI_FEATURES, true},
        {"features_migrate_info_type", PSCI_MIGRATE_INFO_TYPE, false},
        {"features_system_suspend", PSCI_SYSTEM_SUSPEND, false},
        {"features_smccc", SMCCC_VERSION, false},
    };
    for (u64 i = 0; i < sizeof features / sizeof *features; i++) {
        s64 got = hypercall(PSCI_FEATURES, features[i].function, 0, 0);
        if (features[i].required)
            result(features[i].name, got, 0);
        else
            print("%s %s\n", features[i].name, got < 0 ? "no" : "yes");
        if (features[i].function == SMCCC_VERSION && got >= 0)
            check("smccc_version", hypercall(SMCCC_VERSION, 0, 0, 0) >= 0x10000);
    }
    result("features_unknown", hypercall(PSCI_FEATURES, 0x8400ffff, 0, 0), NOT_SUPPORTED);
    result("unknown_32", hypercall(0x8400ffff, 0, 0, 0), NOT_SUPPORTED);
    result("unknown_64", hypercall(0xc400ffff, 0, 0, 0), NOT_SUPPORTED);
    result("unknown_service", hypercall(0xc6000001, 0, 0, 0), NOT_SUPPORTED);
    s64 migrate = hypercall(PSCI_MIGRATE_INFO_TYPE, 0, 0, 0);
    check("migrate_info_type", migrate == 2 || migrate == NOT_SUPPORTED);

    result("affinity_self", hypercall(PSCI_AFFINITY_INFO, affinity(0), 0, 0), ON);
    result("affinity_self_32", hypercall(0x84000004, affinity(0), 0, 0), ON);
    result("affinity_nobody", hypercall(PSCI_AFFINITY_INFO, 0xff000000ffUL, 0, 0), INVALID_PARAMETERS);
    result("on_self", hypercall(PSCI_CPU_ON, affinity(0), (u64)secondary_start, 0), ALREADY_ON);
    result("on_nobody", hypercall(PSCI_CPU_ON, 0xff000000ffUL, (u64)secondary_start, 0), INVALID_PARAMETERS);
    bool second = hypercall(PSCI_AFFINITY_INFO, affinity(1), 0, 0) == OFF;
    value("second_cpu", second);
    if (second)
        power_cycle();

    // Standby is a WFI that answers SUCCESS (5.4); a timer already past ends it.
    gic_init_distributor();
    gic_init_cpu();
    gic_enable_private(27);
    write_sysreg(cntv_cval_el0, counter() + read_sysreg(cntfrq_el0) / 1000);
    write_sysreg(cntv_ctl_el0, 1);
    result("standby", hypercall(PSCI_CPU_SUSPEND, 0, 0, 0), 0);
    finish();
}
