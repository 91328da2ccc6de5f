/*
 * What softhv adds beyond Apple's ABI. Read by cffi as well as by C: no directive but #define NAME VALUE.
 */
typedef struct softhv_vm softhv_vm_t;

/*
 * Several VMs in one process. hv_vm_* and hv_vcpu_create act on the VM the calling thread is bound to; a thread
 * that never bound one acts on the process's default VM (the one hv_vm_create makes there). Everything that takes
 * a vCPU handle needs no binding: handles are unique in the process.
 */
softhv_vm_t *softhv_vm_new(void);            /* NULL when memory is short */
void softhv_vm_bind(softhv_vm_t *vm);        /* NULL: back to the default VM */
hv_return_t softhv_vm_free(softhv_vm_t *vm); /* HV_BUSY while it has vCPUs */

/*
 * How code is run: a block is interpreted `threshold` times before it is compiled for the host; SOFTHV_NO_JIT: always.
 * `limit`: bytes of compiled code kept at once, 0 for the default. Before the first vCPU. HV_UNSUPPORTED where
 * nothing but the interpreter is to be had.
 */
#define SOFTHV_NO_JIT 0xffffffff
hv_return_t softhv_vm_set_jit(softhv_vm_t *vm, uint32_t threshold, size_t limit);

/* One vCPU of the VM in the guest at a time, in turns of a millisecond, instead of all at once. Before the first vCPU. */
hv_return_t softhv_vm_set_turns(softhv_vm_t *vm, bool turns);

/* What os_release() is on macOS: gives back an hv_vm_config_t or hv_vcpu_config_t. */
void softhv_release(void *config);

/* The host wrote [ipa, ipa + size): translations of code in there are dropped before any vCPU runs on. Any thread. */
void softhv_invalidate(softhv_vm_t *vm, hv_ipa_t ipa, uint64_t size);

/*
 * Misbehaviour on demand, for the VM's whole life: before it has vCPUs, else HV_BUSY. Probabilities are 0..1.
 * A zeroed structure with spurious_wfi = 1 is an engine that behaves.
 */
typedef struct {
    uint64_t seed;
    double spurious_wfi;  /* a WFI with nothing to wait for makes hv_vcpu_run return; else it waits inside */
    double early_wfi;     /* a WFI completes in the guest for no reason (Arm ARM D1.6.2), before the above */
    double lose_kick;     /* hv_vcpus_exit does nothing */
    double double_kick;   /* hv_vcpu_run returns CANCELED twice for one kick */
    double unknown;       /* hv_vcpu_run returns UNKNOWN at once */
    double double_vtimer; /* VTIMER_ACTIVATED comes twice, though masked */
    uint64_t late_kick_ns;   /* a kick takes effect only so much later */
    uint64_t late_vtimer_ns; /* VTIMER_ACTIVATED comes so long after the deadline */
    uint64_t sleep_at_ns;    /* the host sleeps, so long after this call ... */
    uint64_t sleep_for_ns;   /* ... and for so long: clocks go on, vCPUs do not */
    bool forget_kicks;  /* hv_vcpus_exit means nothing to a vCPU outside hv_vcpu_run */
    bool fast_counter;  /* the guest's counter runs at 1 GHz, the timebase does not */
} softhv_faults_t;
hv_return_t softhv_vm_faults(softhv_vm_t *vm, const softhv_faults_t *faults);

typedef struct { /* what came of it */
    uint64_t spurious_wfis;
    uint64_t early_wfis;
    uint64_t lost_kicks;
    uint64_t forgotten_kicks;
    uint64_t late_kicks;
    uint64_t double_kicks;
    uint64_t unknowns;
    uint64_t late_vtimers;
    uint64_t double_vtimers;
    uint64_t host_sleeps;
} softhv_fault_counts_t;
hv_return_t softhv_vm_fault_counts(softhv_vm_t *vm, softhv_fault_counts_t *counts); /* any thread; a racy snapshot */

/* The host counter vtimer_offset refers to, and its length in nanoseconds as a fraction (mach_timebase_info). */
uint64_t softhv_absolute_time(void);
void softhv_timebase(uint32_t *numer, uint32_t *denom);

typedef struct {
    uint64_t instructions; /* retired */
    uint64_t blocks;       /* translated */
    uint64_t block_runs;   /* entered through the dispatcher */
    uint64_t flushes;      /* whole code cache dropped */
    uint64_t invalidations;/* pages of code dropped */
    uint64_t compiled;     /* blocks, for the host */
    uint64_t compiled_bytes;
    uint64_t compile_ns;   /* host time that took */
    uint64_t links;        /* between them */
    uint64_t tlb_misses;
    uint64_t tlb_flushes;
    uint64_t exceptions;   /* taken to EL1 */
    uint64_t interrupts;   /* of which IRQ or FIQ */
    uint64_t undefined;    /* of which UNDEF because softhv has no such instruction or register */
    uint32_t undefined_insn; /* the latest such instruction */
    uint32_t reserved;
} softhv_counters_t;
hv_return_t softhv_vcpu_counters(hv_vcpu_t vcpu, softhv_counters_t *counters); /* any thread; a racy snapshot */

/* The decode table, row by row: the differential tests generate their cases from it. False past the last row. */
typedef struct {
    const char *name;
    const char *pattern; /* 32 characters, bit 31 first: 0, 1, or a letter naming the field */
    uint32_t mask;
    uint32_t value;
} softhv_insn_t;
bool softhv_insn(uint32_t index, softhv_insn_t *insn);
