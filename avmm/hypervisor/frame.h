/*
 * One call per exit: what avmm adds on top of hv_* so that Python crosses into C, and drops the GIL, once.
 *
 * frame.c is written against hv.h alone and is compiled into both builds (Apple's framework and softhv), so the
 * decoding of exits is the same code everywhere. Like hv.h this file is read by cffi as well as by C.
 */

/* What to do with the instruction that exited, before running on. */
#define AVMM_FINISH_NONE 0     /* run from PC as it is */
#define AVMM_FINISH_ADVANCE 1  /* step over it */
#define AVMM_FINISH_RESULT 2   /* write `result` to its register (extended as it asks) and step over it */

/* Why the vCPU came back. */
#define AVMM_EXIT_CANCELED 0     /* a kick */
#define AVMM_EXIT_VTIMER 1       /* the virtual timer fired; its mask is now set */
#define AVMM_EXIT_UNKNOWN 2      /* a spurious return: run again */
#define AVMM_EXIT_MMIO_READ 3    /* address, size, reg; finish with RESULT */
#define AVMM_EXIT_MMIO_WRITE 4   /* address, size, value; finish with ADVANCE */
#define AVMM_EXIT_SYSREG_READ 5  /* address = encoding (op0<<14|op1<<11|CRn<<7|CRm<<3|op2); finish with RESULT */
#define AVMM_EXIT_SYSREG_WRITE 6 /* address = encoding, value; finish with ADVANCE */
#define AVMM_EXIT_HVC 7          /* args = x0..x7; PC is already past it; finish with NONE after setting x0 */
#define AVMM_EXIT_SMC 8          /* args = x0..x7; PC still at it */
#define AVMM_EXIT_WFI 9          /* PC still at it; value = deadline register for WFIT, 0 otherwise */
#define AVMM_EXIT_WFE 10         /* PC still at it */
#define AVMM_EXIT_ABORT 11       /* data abort without a decoded access (ISV = 0), or an instruction abort */
#define AVMM_EXIT_OTHER 12       /* any other exception: see syndrome */
#define AVMM_EXIT_ERROR 13       /* hv_vcpu_run itself failed: value = hv_return_t */

/* Where a parked vCPU sleeps: see gate.c. */
typedef struct avmm_gate avmm_gate_t;

/* A UART whose output needs no exits: see uart.c. */
typedef struct avmm_uart avmm_uart_t;

typedef struct {
    /* To the vCPU; consumed by the next avmm_run(). */
    uint8_t irq;           /* level of the IRQ input; kept until changed, or until an offer is taken */
    uint8_t finish;        /* AVMM_FINISH_*; back to NONE once done */
    uint8_t unmask_vtimer; /* clear the virtual timer's mask first; back to 0 once done */
    uint8_t mask_vtimer;   /* set it first: its interrupt is up without an exit; back to 0 once done */
    uint8_t vtimer_masked; /* from the vCPU: the mask as of this exit, kept up to date here */
    uint8_t size;          /* bytes moved by an MMIO access: 1, 2, 4, 8 */
    uint8_t sign_extend;   /* an MMIO read is to be sign extended ... */
    uint8_t wide;          /* ... to 64 bits (else 32) */
    uint8_t reg;           /* transfer register 0..30, 31 = XZR */
    uint32_t kind;         /* AVMM_EXIT_* */
    uint64_t result;
    uint64_t address;      /* GPA of the access, or the encoding of the system register */
    uint64_t value;
    uint64_t args[8];
    uint64_t pc;
    uint64_t syndrome;     /* ESR_EL2 */
    uint64_t virtual_address;  /* FAR_EL2 */
    uint64_t vtimer_ctl;   /* CNTV_CTL_EL0; valid on WFI and whenever vtimer_masked */
    uint64_t vtimer_cval;  /* CNTV_CVAL_EL0; valid on WFI */
    /* A sleep before the guest is entered. */
    uint8_t sleep;         /* to the vCPU: sleep at the gate first; back to 0 once done */
    uint8_t sleep_exact;   /* to the vCPU: the guest waits for just that moment */
    uint8_t expired;       /* from the vCPU: sleep_until has come, and nobody had opened the gate */
    uint8_t acknowledged;  /* from the vCPU: the offer was taken; cleared by whoever heeds it */
    uint32_t offer;        /* see avmm_withdraw() */
    uint64_t sleep_until;  /* to the vCPU: nanoseconds of the monotonic clock */
    uint64_t entered;      /* from the vCPU: after a sleep, when it entered the guest; 0: it did not */
    avmm_gate_t *gate;
    avmm_uart_t *uart;     /* or NULL */
} avmm_frame_t;

/*
 * Sleep if asked to, finish the last exit, set the IRQ input, run, decode the next exit into `frame`. Owning thread only.
 * A sleep that AVMM_GATE_ENTER ends goes straight into the guest, its IRQ input up; any other returns CANCELED with
 * `entered` 0, and nothing finished.
 */
void avmm_run(hv_vcpu_t vcpu, hv_vcpu_exit_t *exit, avmm_frame_t *frame);

/*
 * The interrupt that ICC_IAR1_EL1 would return may be offered in advance: `offer` = AVMM_OFFERED | INTID. A guest that
 * reads the register then gets it without an exit, its IRQ input falls, and `offer` becomes AVMM_TAKEN | INTID.
 * avmm_withdraw() takes the offer back, from any thread: it returns what `offer` was, and leaves 0 there.
 */
#define AVMM_OFFERED 0x40000000
#define AVMM_TAKEN 0x80000000
uint32_t avmm_withdraw(avmm_frame_t *frame);

/*
 * A UART's registers at `base`, closed; NULL when memory is short. While it is open, avmm_run() itself takes what the guest
 * writes to the data register and answers its flag register with `flags`, for as long as there is room. Any thread may open
 * or close it; closing gives what was written, in order, and its length.
 */
#define AVMM_UART_BYTES 1024
avmm_uart_t *avmm_uart_new(uint64_t base);
void avmm_uart_free(avmm_uart_t *uart);
void avmm_uart_open(avmm_uart_t *uart, uint32_t flags);
uint32_t avmm_uart_close(avmm_uart_t *uart, uint8_t *bytes);
uint64_t avmm_uart_served(avmm_uart_t *uart); /* accesses, ever */

/* Of avmm_run(): whether to try at all; serve the MMIO access that `frame` has decoded, or return false. */
bool avmm_uart_is_open(const avmm_uart_t *uart);
bool avmm_uart_serve(avmm_uart_t *uart, avmm_frame_t *frame);

/* A gate, shut; NULL when memory is short. */
avmm_gate_t *avmm_gate_new(void);
void avmm_gate_free(avmm_gate_t *gate);

/* Open it for whoever sleeps there, or will: any thread. Once, until it is shut again, which passing it does too. */
#define AVMM_GATE_SHUT 0
#define AVMM_GATE_ENTER 1 /* enter the guest at once */
#define AVMM_GATE_OUT 2   /* come out to whoever called avmm_run() */
void avmm_gate_open(avmm_gate_t *gate, uint32_t how);
void avmm_gate_shut(avmm_gate_t *gate);

/* It may be opened very soon: who sleeps there wakes up in the meantime. Any thread; changes nothing else. */
void avmm_gate_stir(avmm_gate_t *gate);

/* The longest busy wait before a sleep, in nanoseconds; 0, as at first: none. Not while anybody sleeps. */
void avmm_gate_set_poll(avmm_gate_t *gate, uint64_t most_ns);

/* Sleep until the gate is open or `until` has come: how it was opened, else AVMM_GATE_SHUT. Owning thread only. */
uint32_t avmm_gate_sleep(avmm_gate_t *gate, uint64_t until, bool exact);
uint64_t avmm_monotonic_ns(void);

/* hv_vcpu_get/set_simd_fp_reg with the vector in memory: a vector cannot be passed by value through an FFI. */
hv_return_t avmm_get_simd_fp_reg(hv_vcpu_t vcpu, hv_simd_fp_reg_t reg, uint8_t *value);
hv_return_t avmm_set_simd_fp_reg(hv_vcpu_t vcpu, hv_simd_fp_reg_t reg, const uint8_t *value);
