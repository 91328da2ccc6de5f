/*
 * The engine's insides: what a vCPU is, what a decoded instruction is, and who may call what.
 *
 *   vm.c         VMs, guest RAM, hv_vm_*                    mmu.c        page table walks
 *   vcpu.c       vCPU life, registers, kicks                tlb.c        what is kept of them, and how it is forgotten
 *   exception.c  taking exceptions to EL1
 *   run.c        hv_vcpu_run: dispatch, polling, the timer  sysreg.c     system registers
 *   mail.c       what vCPUs make each other forget          gic.c        an interrupt controller inside, on request
 *   decode.c     tables, instruction -> uop, blocks         code.c       the cache of blocks
 *   exec_int.c   data processing, branches                  exec_fp.c    scalar floating point
 *   exec_mem.c   loads, stores, atomics, exclusives         exec_simd*.c Advanced SIMD
 *   jit.h        the seam of back ends for hosts; jit_x64*.c is one
 *   exec_sys.c   MSR/MRS, hints, barriers, cache, TLBI      exec_crypto.c, fpu.c
 *
 * No mutable global state but the table of vCPU handles (the ABI's) and the decode index (built once).
 *
 * vCPUs run side by side, each on its own thread, and share guest memory, the RAM map and nothing else: TLB, decoded
 * blocks and compiled code are each vCPU's own, touched by its thread alone. What one must make another forget (TLBI and
 * IC of the Inner Shareable domain, host writes to code) goes by mail, read between blocks; DSB waits until it was.
 * The RAM map changes only while no vCPU is inside the guest.
 */
#ifndef SOFTHV_ENGINE_H
#define SOFTHV_ENGINE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "../hv.h"
#include "../hv_gic.h"
#include "fpu.h"
#include "softhv.h"

static inline void cpu_relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

/* Values that hv.h leaves to their own headers on macOS. */
#define HV_SUCCESS 0
#define HV_ERROR ((hv_return_t)0xfae94001)
#define HV_BUSY ((hv_return_t)0xfae94002)
#define HV_BAD_ARGUMENT ((hv_return_t)0xfae94003)
#define HV_ILLEGAL_GUEST_STATE ((hv_return_t)0xfae94004)
#define HV_NO_RESOURCES ((hv_return_t)0xfae94005)
#define HV_NO_DEVICE ((hv_return_t)0xfae94006)
#define HV_DENIED ((hv_return_t)0xfae94007)
#define HV_UNSUPPORTED ((hv_return_t)0xfae9400f)
enum { HV_MEMORY_READ = 1, HV_MEMORY_WRITE = 2, HV_MEMORY_EXEC = 4 };
enum { HV_EXIT_REASON_CANCELED, HV_EXIT_REASON_EXCEPTION, HV_EXIT_REASON_VTIMER_ACTIVATED, HV_EXIT_REASON_UNKNOWN };
enum { HV_INTERRUPT_TYPE_IRQ, HV_INTERRUPT_TYPE_FIQ };

/* ---- The register file ------------------------------------------------------------------------------------------ */

/*
 * Register number 31 is SP or XZR by instruction. The decoder resolves it, so that no op ever tests for 31:
 * x[R_SP] is the stack pointer in use, x[R_ZR] always reads zero, x[R_SINK] takes writes to XZR.
 */
enum { R_SP = 31, R_ZR = 32, R_SINK = 33, R_COUNT = 34 };

typedef union {
    uint8_t b[16];
    uint16_t h[8];
    uint32_t s[4];
    uint64_t d[2];
    int8_t sb[16];
    int16_t sh[8];
    int32_t ss[4];
    int64_t sd[2];
    float f[4];
    double g[2];
} vreg;

struct vm;
struct ram;
struct vcpu;
struct block;
struct gic;
struct gic_cpu;

/* ---- Decoded instructions --------------------------------------------------------------------------------------- */

/* One per instruction, in a row per block; the row ends with an `end of block` uop. */
struct uop {
    const struct uop *(*fn)(struct vcpu *, const struct uop *); /* threaded entry: runs this and all that follow */
    uint32_t insn;
    uint16_t row;  /* of the decode table */
    uint8_t off;   /* bytes from the block's first instruction */
    uint8_t left;  /* instructions after it in the block: counted already; none in a trace */
    uint8_t rd, rn, rm, ra; /* indexes into x[] (resolved as above) or v[] */
    uint32_t aux;  /* whatever the form wants */
    uint64_t imm;
};

/*
 * An op body returns true to fall through to the next instruction, false to leave the block: then pc is set (a
 * branch, an exception, an exit to the host). OP(name) defines two callables from the one body: t_name, threaded
 * (ends by jumping to the next uop, or to the next block's first: sibling calls), and p_name, plain, for
 * generated code to call.
 *
 * Sanitizers and -O0 make no sibling calls: there a block returns to the dispatcher, which bounds the depth.
 */
#if defined(__OPTIMIZE__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define LEAVE_BLOCK(c) next_block(c)
#else
#define LEAVE_BLOCK(c) NULL
#endif
const struct uop *next_block(struct vcpu *c); /* run.c: enters the block at c->pc, or returns NULL to the dispatcher */

#define OP(name)                                                                                                  \
    static inline bool body_##name(struct vcpu *c, const struct uop *u);                                          \
    const struct uop *t_##name(struct vcpu *c, const struct uop *u);                                              \
    bool p_##name(struct vcpu *c, const struct uop *u);                                                           \
    const struct uop *t_##name(struct vcpu *c, const struct uop *u) {                                             \
        if (likely(body_##name(c, u)))                                                                            \
            return u[1].fn(c, u + 1);                                                                             \
        return LEAVE_BLOCK(c);                                                                                    \
    }                                                                                                             \
    bool p_##name(struct vcpu *c, const struct uop *u) { return body_##name(c, u); }                              \
    static inline bool body_##name(struct vcpu *c, const struct uop *u)

/* The same for FP and SIMD: traps first when CPACR_EL1.FPEN says so. Write OP_FP(name) { ... }. */
#define OP_FP(name)                                                                                               \
    static inline bool fp_##name(struct vcpu *c, const struct uop *u);                                            \
    OP(name) {                                                                                                    \
        if (unlikely(c->fp_trap))                                                                                 \
            return exc_fp_access(c, u);                                                                           \
        return fp_##name(c, u);                                                                                   \
    }                                                                                                             \
    static inline bool fp_##name(struct vcpu *c, const struct uop *u)

/*
 * Decode tables: a64_*.def, one row per encoding class, most specific first (the first match wins):
 *
 *     A64(row name, "pattern of 32 characters (spaces ignored)", form, op)
 *
 * 0 and 1 in the pattern must match; letters name fields. `form` fills the uop from the instruction and returns
 * false for encodings that are reserved (UNDEF); forms are plain functions `bool form_X(struct uop *u, uint32_t i)`
 * whose `u` comes with insn, row and off set and the rest zero. `op` is the OP() to run. Row names are unique and
 * shown by the tests; many rows may share a form or an op.
 */
typedef bool (*form_fn)(struct uop *u, uint32_t insn);

struct row {
    const char *name, *pattern;
    form_fn form;
    const struct uop *(*threaded)(struct vcpu *, const struct uop *);
    bool (*plain)(struct vcpu *, const struct uop *);
    uint32_t mask, value; /* filled from the pattern when the index is built */
    bool ends_block;      /* control flow or context change: filled from a64_sys/a64_int's A64_END rows */
};
/* A64_END(...) is A64(...) for instructions after which decoding must stop (branches, ERET, MSR, ISB, WFI ...). */

static inline uint32_t bits(uint32_t insn, unsigned low, unsigned count) { return (insn >> low) & ((1u << count) - 1); }
static inline int64_t sbits(uint32_t insn, unsigned low, unsigned count) {
    return (int64_t)((uint64_t)insn << (64 - low - count)) >> (64 - count);
}
/* A 5-bit register field as an index into x[]. */
static inline uint8_t reg_zr(uint32_t insn, unsigned low) {
    return bits(insn, low, 5) == 31 ? R_ZR : bits(insn, low, 5);
}
static inline uint8_t reg_dst(uint32_t insn, unsigned low) {
    return bits(insn, low, 5) == 31 ? R_SINK : bits(insn, low, 5);
}
static inline uint8_t reg_sp(uint32_t insn, unsigned low) { return bits(insn, low, 5); }

/* exec_int.c: the values of NZCV for which a condition holds, a bit for each; testing one is a shift by NZCV. */
extern const uint16_t condition_sets[16];

/* ---- Blocks ----------------------------------------------------------------------------------------------------- */

enum {
    PAGE_BITS = 12, /* of RAM as the engine sees it; a block stays in its page */
    PAGE_SIZE = 1 << PAGE_BITS,
    BLOCK_MAX = 63 /* instructions: uop.off is a byte */
};

#define BLOCK_DROPPED (~UINT64_C(0)) /* in a block's pa */

/* Immutable once published, but for `cold` and `code`. Keyed by physical address: one serves every mapping. */
struct block {
    uint64_t pa;
    uint32_t count;       /* instructions; it may be left before the end: uop.left */
    int32_t cold;         /* runs left until it is compiled */
    const void *code;     /* then, the host's */
    struct block *bucket; /* next in the hash bucket */
    struct block *page;   /* next in the code page's list */
    struct uop uops[];    /* count, then the end-of-block uop */
};

/* ---- The TLBs ---------------------------------------------------------------------------------------------------- */

enum { TLB_BITS = 11, TLB_SIZE = 1 << TLB_BITS };
enum { MMU_EL0, MMU_EL1, MMU_EL1_PAN, MMU_COUNT }; /* whose permissions: the index of a bank */
#define PAGE_MASK (~(uint64_t)(PAGE_SIZE - 1))
#define TLB_NONE (~UINT64_C(0)) /* matches no page address */

static inline unsigned half_of(uint64_t va) { return va >> 55 & 1; } /* of the address space */

/*
 * One 4 KiB page of RAM. `read` and `write` hold the page's VA, tag and all, when such accesses may go straight to
 * host memory at va + addend; TLB_NONE when not (no permission, a device, not mapped, needs alignment checks).
 */
struct tlb_entry {
    uint64_t read, write;
    uintptr_t addend;
    uint64_t pa; /* of the page; below it, in bits 5:0, log2 of the size of the mapping it is a piece of */
};
_Static_assert(sizeof(struct tlb_entry) == 1 << 5, "MEM_FAST() scales by 32");

/* One 4 KiB page that may be executed. */
enum { FETCH_BITS = 9, FETCH_SIZE = 1 << FETCH_BITS };
struct fetch_entry {
    uint64_t va; /* TLB_NONE when empty */
    uint64_t pa;
    const uint8_t *host;
};

/* Blocks by virtual address, to leave the fast path of branches in one compare. */
struct jump_entry {
    uint64_t pc;    /* ~0 when empty */
    uint32_t block; /* from vcpu.arena */
    uint32_t code;  /* the block's, from vcpu.code_base, when the dispatcher has seen it compiled here, or 0 */
};
_Static_assert(sizeof(struct jump_entry) == 1 << 4, "jump_offset() scales by 16");
enum { JUMP_BITS_EL0 = 13, JUMP_BITS_EL1 = 14 };
/* The blocks of one page lie in one aligned row of JUMP_ROW entries: what TLBI by VA clears. */
enum { JUMP_ROW = 1 << (PAGE_BITS - 2) };
/* Where a PC belongs, in bytes under a mask. When another had come first it is in the neighbour: ^ JUMP_OTHER. */
static inline uint32_t jump_offset(uint64_t pc) { return (uint32_t)(pc << 2 ^ pc >> 9); }
enum { JUMP_OTHER = sizeof(struct jump_entry) };

/* A few ranges of addresses that hold all of a set, and as little else as they can. */
enum { PLACES_MAX = 8 };
struct places {
    uint32_t count;
    uint8_t page_bits; /* log2 of the largest mapping in it */
    struct { uint64_t low, high; } at[PLACES_MAX]; /* inclusive */
};

/* What a cache holds of one half of the address space, so that flushes can be narrow. */
struct held {
    bool any, global, nonglobal;
    /* Of data: mappings larger than 4 KiB that have pieces here, for which TLBI by VA looks at all. Of code: all. */
    struct places places;
};

struct data_tlb {
    struct tlb_entry at[TLB_SIZE]; /* first: compiled code takes its address for the whole's */
    struct held held[2];
};
struct code_tlb {
    struct fetch_entry fetch[FETCH_SIZE];
    struct jump_entry *jump;
    uint32_t jump_mask; /* in bytes */
    /* Changes, to what no other has or had, whenever anything leaves jump[] or compiled code is dropped: leave_far(). */
    uint64_t gen;
    struct held held[2];
};

/* What EL0 sees by one TTBR0 and ASID. A vCPU keeps some, so that going back to one finds it warm. */
enum { SPACES = 6 };
struct space {
    _Alignas(64) struct jump_entry jump[1 << JUMP_BITS_EL0];
    struct data_tlb data;
    struct code_tlb code;
    uint64_t base, asid;
    uint64_t used; /* when, by vcpu.space_uses; 0: never, and not even empty */
};

static inline struct tlb_entry *tlb_entry(struct data_tlb *tlb, uint64_t va) {
    return &tlb->at[(va >> PAGE_BITS) & (TLB_SIZE - 1)];
}
static inline struct fetch_entry *fetch_entry(struct code_tlb *code, uint64_t va) {
    return &code->fetch[(va >> PAGE_BITS) & (FETCH_SIZE - 1)];
}

/* ---- System registers that hold plain state (the rest is computed in sysreg.c) ---------------------------------- */

struct sysregs {
    uint64_t sctlr, actlr, cpacr, ttbr0, ttbr1, tcr, mair, amair, vbar, contextidr;
    uint64_t esr, far, afsr0, afsr1, par, elr, spsr;
    uint64_t sp_el0, sp_el1; /* the one in use lives in x[R_SP] */
    uint64_t tpidr_el0, tpidrro_el0, tpidr_el1;
    uint64_t cntkctl, cntv_ctl, cntv_cval, cntp_ctl, cntp_cval;
    uint64_t mpidr, midr, csselr, scxtnum_el0, scxtnum_el1;
    uint64_t mdscr, mdccint, osdlr, oslock, dbgprcr, dbgclaim, osdtrrx, osdtrtx, oseccr;
    uint64_t dbgbvr[16], dbgbcr[16], dbgwvr[16], dbgwcr[16];
    uint64_t id[64]; /* op0=3 op1=0 CRn=0: by CRm * 8 + op2 */
};

/* ---- The vCPU --------------------------------------------------------------------------------------------------- */

/* Reasons to look up from guest code; bits of vcpu.poll, set by any thread. */
enum {
    POLL_EXIT = 1,       /* hv_vcpus_exit */
    POLL_TURN = 2,       /* another vCPU waits for its turn; looked at when the budget is used up */
    POLL_MAIL = 4,       /* there is mail */
    POLL_STOP = 8,       /* the memory map is about to change: leave the guest; only while in there */
    POLL_GIC = 16,       /* the GIC's IRQ output has changed */
    POLL_NOW = POLL_EXIT | POLL_MAIL | POLL_STOP | POLL_GIC, /* looked at before every block */
};

/* What a vCPU has to forget before it runs on; written by any thread, read by its own. */
enum { MAIL_MAX = 32 };
struct mail {
    pthread_mutex_t lock;
    uint32_t tlb_count, code_count; /* more than MAIL_MAX: all there is */
    struct { uint32_t op; uint64_t argument; } tlb[MAIL_MAX]; /* TLBI */
    struct { uint64_t pa, size; } code[MAIL_MAX];
};

enum { SCRATCH_COUNT = 8 };
struct vcpu {
    uint64_t x[R_COUNT];
    uint64_t scratch[SCRATCH_COUNT]; /* registers of compiled code's own, numbered from R_COUNT on */
    uint64_t pc;        /* exact between blocks; inside one use pc_of() */
    uint64_t block_pc;  /* VA of the running block's first instruction */
    uint32_t nzcv;      /* PSTATE.NZCV in bits 31:28, the rest zero */
    int32_t budget;     /* instructions until run.c looks at time and turns; 0 or less: at the next block */
    int32_t slice;      /* what budget started from: slice - budget have run */
    _Atomic uint32_t poll;
    uint32_t daif;      /* PSTATE.DAIF in bits 9:6 */
    uint8_t el, spsel, pan, uao, ssbs, dit, ss, il;
    uint8_t mmu_idx;    /* of plain loads and stores: MMU_* by el and pan */
    struct data_tlb *bank; /* tlb[mmu_idx], for compiled code */
    struct data_tlb *tlb[MMU_COUNT]; /* the current space's, kernel_data[] */
    struct code_tlb *code[2];        /* by EL: the current space's, kernel_code */
    struct jump_entry *jump;         /* the current EL's; see jump_offset() */
    uint32_t jump_mask;
    int32_t stale_links; /* how many more are passed by before one is linked anew */
    uint64_t link_now;    /* code[el]->gen */
    const uint8_t *code_base; /* the back end's code memory, as it is run */
    uint8_t *arena;           /* where all blocks lie */
    bool fp_trap;       /* FP/SIMD instructions trap at this EL: kept by update_fp_trap() */
    bool irq_line, fiq_line; /* hv_vcpu_set_pending_interrupt */
    bool step_armed;    /* MDSCR_EL1.SS, and the OS lock is open */
    bool exiting;       /* exit is filled in: leave hv_vcpu_run */
    bool stepping;      /* software step is active at this EL: one instruction at a time, by step() */
    uint32_t step_iss;  /* of the exception that follows */
    bool vtimer_masked;
    bool fast_counter; /* a fault: see softhv.h */
    union {
        struct { uint32_t fpcr, fpsr; };
        struct fpu fpu; /* the same two, as fpu.h wants them */
    };
    vreg v[32];
    vreg v_scratch[2]; /* compiled code's own, as scratch[] is */
    struct {
        uint64_t pa;  /* ~0: open */
        uint64_t value[2];
        uint32_t size;
        _Atomic uint64_t *slot; /* of vm->exclusive, and what it held */
        uint64_t version;
    } monitor;        /* the exclusive monitor: exec_atomic.c */
    struct sysregs sys;
    uint64_t vtimer_offset;
    struct space *space; /* the current one of: */
    struct space spaces[SPACES];
    uint64_t space_uses;
    struct data_tlb kernel_data[2]; /* MMU_EL1, MMU_EL1_PAN */
    struct code_tlb kernel_code;
    _Alignas(64) struct jump_entry kernel_jump[1 << JUMP_BITS_EL1];
    uint64_t gens; /* the latest code_tlb.gen */
    struct code *cache; /* of decoded blocks: code.c */
    struct jit *jit;   /* and compiled ones, the back end's; NULL: none */
    struct mail mail;
    bool posted;       /* mail that the next DSB waits for */
    uint8_t yields;    /* instructions of that name, modulo 256 */
    uint64_t map_gen;  /* of the VM, when the caches above were last brought up to date */
    _Atomic bool event; /* the event register of WFE */
    _Atomic bool inside; /* the guest: it reads mail soon */
    uint64_t icount;  /* instructions retired */
    const void *jit_link, *jit_far; /* see jit.h */
    struct vm *vm;
    struct gic_cpu *gic; /* gic.c's; NULL: interrupts are the host's */
    hv_vcpu_t handle;
    /* Turns, under vm->lock. */
    pthread_cond_t my_turn;
    struct vcpu *next_waiter;
    bool waiting;
    _Atomic uint64_t late_kick; /* fault.c: host_ns() when a kick takes effect, 0: none on its way */
    _Atomic bool kick_again;
    _Atomic bool running; /* hv_vcpu_run, for fault.c */
    bool vtimer_again, vtimer_held;
    uint64_t turn_start; /* nanoseconds */
    hv_vcpu_exit_t exit;
    softhv_counters_t counters;
    uint64_t exec_ns; /* host time its turns took */
    void *memory;     /* the allocator's, not aligned */
};

static inline uint64_t pc_of(const struct vcpu *c, const struct uop *u) { return c->block_pc + u->off; }
/* Leave the block for `target`. */
static inline bool branch_to(struct vcpu *c, uint64_t target) { c->pc = target; return false; }
/* The same from inside the block: the rest of it was not run. */
static inline bool leave_for(struct vcpu *c, const struct uop *u, uint64_t target) {
    c->budget += u->left;
    return branch_to(c, target);
}
/* Look at interrupts, time and requests before the next block. */
static inline void force_poll(struct vcpu *c) { c->slice -= c->budget; c->budget = 0; }

static inline struct jump_entry *jump_entry(const struct vcpu *c, uint32_t offset) {
    return (struct jump_entry *)((char *)c->jump + (offset & c->jump_mask));
}

/* Counters are written by the vCPU's own thread and read by any: each is one word, whole. */
static inline void counter_set(uint64_t *counter, uint64_t value) {
    __atomic_store_n(counter, value, __ATOMIC_RELAXED);
}
static inline void counter_add(uint64_t *counter, uint64_t value) { counter_set(counter, *counter + value); }

/* ---- Memory accesses of guest instructions ---------------------------------------------------------------------- */

/*
 * From or to guest memory, which vCPUs and devices write and read as the guest pleases. Each byte is accessed once, and
 * 1, 2, 4 or 8 in a row at once (B2.2.1): a memcpy() whose size the compiler does not know may store a byte twice, the
 * second time over what another vCPU has stored in between. These races are the guest's own, so ThreadSanitizer is not
 * to see them. All else in the engine it does see.
 */
#ifdef __SANITIZE_THREAD__
#define GUEST_COPY static __attribute__((noinline, unused, no_sanitize("thread")))
#else
#define GUEST_COPY static inline __attribute__((always_inline))
#endif
typedef uint64_t any_v16 __attribute__((vector_size(16), may_alias, aligned(1)));
typedef uint64_t any_u64 __attribute__((may_alias, aligned(1)));
typedef uint32_t any_u32 __attribute__((may_alias, aligned(1)));
typedef uint16_t any_u16 __attribute__((may_alias, aligned(1)));

GUEST_COPY void guest_copy(void *to, const void *from, size_t size) {
    uint8_t *out = to;
    const uint8_t *in = from;
#define COPY(type)                                                                                                     \
    *(type *)out = *(const type *)in;                                                                                  \
    out += sizeof(type), in += sizeof(type)
    for (; size >= 16; size -= 16) {
        COPY(any_v16);
        atomic_signal_fence(memory_order_seq_cst); /* or compilers make this loop a memcpy() */
    }
    if (size & 8) {
        COPY(any_u64);
    }
    if (size & 4) {
        COPY(any_u32);
    }
    if (size & 2) {
        COPY(any_u16);
    }
    if (size & 1) {
        COPY(uint8_t);
    }
#undef COPY
}

/*
 * mem_read/mem_write: `size` bytes (1, 2, 4, 8, 16) at `va` with the permissions of bank `idx`, little endian,
 * unaligned allowed as SCTLR_EL1.A and the memory type allow. False when an exception was taken or an exit to the host
 * prepared: the op returns false at once, having changed no register (accesses are restartable).
 * For MMIO the slow path builds the syndrome (ISV, SAS, SRT ...) from u->insn.
 */
bool mem_read_slow(struct vcpu *c, const struct uop *u, uint64_t va, unsigned size, unsigned idx, void *out);
bool mem_write_slow(struct vcpu *c, const struct uop *u, uint64_t va, unsigned size, unsigned idx, const void *in);
/*
 * Host address of [va, va+size), which must not cross `size` alignment, checked for reading and (when `write`) writing;
 * for exclusives, LSE atomics and DC ZVA. NULL: exception taken or exit prepared. `align`: misalignment faults always.
 */
void *mem_ptr(struct vcpu *c, const struct uop *u, uint64_t va, unsigned size, unsigned idx, bool write, uint64_t *pa);

enum { ZVA_SIZE = 64 }; /* bytes that DC ZVA clears */
/* `va` without its tag, when TCR_EL1.TBI0/1 says that bits 63:56 are one. The TLBs are by tagged VA. */
uint64_t untag(const struct vcpu *c, uint64_t va);

/* The entry's offset is computed in one go: compilers make three of the array's two indexes. */
#define MEM_FAST(kind, va, size)                                                                                  \
    struct tlb_entry *e = (struct tlb_entry *)((char *)c->tlb[idx]->at +                                               \
                                               (((va) >> (PAGE_BITS - 5)) & ((TLB_SIZE - 1) << 5)));               \
    if (likely((((va) + (size)-1) & ~(uint64_t)(PAGE_SIZE - 1)) == e->kind))

static inline bool mem_read(struct vcpu *c, const struct uop *u, uint64_t va, unsigned size, unsigned idx, void *out) {
    MEM_FAST(read, va, size) {
        guest_copy(out, (void *)(uintptr_t)(va + e->addend), size);
        return true;
    }
    return mem_read_slow(c, u, va, size, idx, out);
}
static inline bool mem_write(struct vcpu *c, const struct uop *u, uint64_t va, unsigned size, unsigned idx,
                             const void *in) {
    MEM_FAST(write, va, size) {
        guest_copy((void *)(uintptr_t)(va + e->addend), in, size);
        return true;
    }
    return mem_write_slow(c, u, va, size, idx, in);
}

/* ---- mmu.c ------------------------------------------------------------------------------------------------------ */

enum access { ACCESS_READ, ACCESS_WRITE, ACCESS_EXEC };
enum { NO_FAULT = 0x3f }; /* not a fault status code of the EL1&0 regime */
struct translation {
    uint64_t pa;
    uint32_t fault; /* DFSC/IFSC, or NO_FAULT */
    bool device;    /* Device memory: unaligned accesses fault */
    bool read, write, exec; /* what bank idx may do */
    uint8_t attr;   /* MAIR byte, for AT/PAR_EL1 */
    uint8_t sh;
    uint8_t page_bits; /* log2 of the mapping's size */
    bool global;
};
/* Walk the tables for `va` as bank `idx`; no side effect. */
struct translation mmu_translate(struct vcpu *c, uint64_t va, enum access access, unsigned idx);
/* May `va` be touched by a cache maintenance instruction? Its PA; false: data abort taken (D7.5.8). */
bool mmu_cache_op(struct vcpu *c, const struct uop *u, uint64_t va, bool write, uint64_t *pa);
/* Host pointer to the instruction at c->pc (its tag removed) and its PA; false: exception taken or exit prepared. */
bool mmu_fetch(struct vcpu *c, uint64_t *pa, const uint8_t **host);
#define TTBR_BASE ((UINT64_C(1) << 48) - 2) /* bit 0 is CnP, 63:48 the ASID */
uint64_t mmu_asid(const struct vcpu *c);
uint64_t mmu_asid_in(const struct vcpu *c, uint64_t value); /* bits 63:48, as TCR_EL1.AS has it */

/* ---- tlb.c ------------------------------------------------------------------------------------------------------ */

void tlb_create(struct vcpu *c);
void tlb_fill(struct vcpu *c, uint64_t va, unsigned idx, const struct translation *t, const struct ram *ram);
void fetch_fill(struct vcpu *c, const struct translation *t, const struct ram *ram); /* of the page at c->pc */
struct jump_entry *jump_fill(struct vcpu *c, uint64_t pc, const struct block *block);
void jump_offer(struct vcpu *c, struct jump_entry entry); /* the same where nothing has to go for it */
void jump_see(struct vcpu *c); /* after el or code[el] has changed */
void jump_stale(struct vcpu *c); /* when compiled code is dropped: links to it may be anywhere */
void tlb_flush_all(struct vcpu *c);
#define ANY_ASID (~UINT64_C(0))
void tlb_flush_va(struct vcpu *c, uint64_t va, uint64_t asid); /* `va`: any address in the page */
void tlb_flush_asid(struct vcpu *c, uint64_t asid);
void tlb_drop_code(struct vcpu *c); /* pointers to blocks */
void tlb_new_base(struct vcpu *c, unsigned half); /* TTBR0 or TTBR1 has changed */
void tlb_new_asid(struct vcpu *c);

/* ---- exception.c: all return false, so that an op can `return exc_...` ------------------------------------------ */

bool exc_undef(struct vcpu *c, const struct uop *u);             /* EC 0 */
bool exc_unimplemented(struct vcpu *c, const struct uop *u);     /* the same, counted: nobody knows this one */
bool exc_sysreg_trap(struct vcpu *c, const struct uop *u, uint32_t iss); /* EC 0x18 to EL1 */
bool exc_fp_access(struct vcpu *c, const struct uop *u);         /* EC 0x07 */
bool exc_svc(struct vcpu *c, const struct uop *u, uint16_t imm); /* EC 0x15, return address after it */
bool exc_brk(struct vcpu *c, const struct uop *u, uint16_t imm); /* EC 0x3c */
bool exc_pc_alignment(struct vcpu *c, uint64_t pc);              /* EC 0x22 */
bool exc_sp_alignment(struct vcpu *c, const struct uop *u);      /* EC 0x26 */
bool exc_data_abort(struct vcpu *c, const struct uop *u, uint64_t va, uint32_t dfsc, bool write, bool cm);
bool exc_prefetch_abort(struct vcpu *c, uint64_t va, uint32_t ifsc);
void exc_interrupt(struct vcpu *c, bool fiq);                    /* at c->pc */
bool exc_wfx(struct vcpu *c, const struct uop *u, bool wfe);      /* EC 0x01 */
bool exc_illegal_state(struct vcpu *c);                          /* EC 0x0e at c->pc */
bool exc_step(struct vcpu *c);                                   /* EC 0x32 or 0x33 at c->pc */
bool exc_eret(struct vcpu *c);                                   /* return from EL1 */
uint64_t pstate_get(const struct vcpu *c);                       /* SPSR form */
bool pstate_legal(uint64_t spsr);                                /* EL0t, EL1t, EL1h of AArch64 */
void pstate_set(struct vcpu *c, uint64_t spsr);                  /* a legal one; also SP, mmu_idx, fp_trap */
void pstate_changed(struct vcpu *c);                             /* after el, pan, daif were written one by one */
void step_changed(struct vcpu *c);                               /* after mdscr, osdlr, oslock were */
void pstate_select_sp(struct vcpu *c, unsigned spsel);           /* at the current EL */
void update_fp_trap(struct vcpu *c);
/* Exits to the host ("EL2"): fill exit, set exiting, force a poll; pc = the instruction unless HVC (after it). */
bool exit_exception(struct vcpu *c, uint64_t pc, uint64_t syndrome, uint64_t va, uint64_t ipa);
enum {
    EC_UNKNOWN = 0x00, EC_WFX = 0x01, EC_FP = 0x07, EC_ILLEGAL = 0x0e, EC_SVC = 0x15, EC_HVC = 0x16, EC_SMC = 0x17,
    EC_SYSREG = 0x18, EC_IABT_LOWER = 0x20, EC_IABT = 0x21, EC_PC = 0x22, EC_DABT_LOWER = 0x24, EC_DABT = 0x25,
    EC_SP = 0x26, EC_STEP_LOWER = 0x32, EC_STEP = 0x33, EC_BRK = 0x3c
};
enum { STEP_ISV = 1 << 24, STEP_EX = 1 << 6, STEP_IFSC = 0x22 }; /* ISS of EC_STEP */
#define ESR_IL (UINT64_C(1) << 25)
static inline uint64_t syndrome(unsigned ec, uint32_t iss) { return (uint64_t)ec << 26 | ESR_IL | iss; }

/* ---- sysreg.c --------------------------------------------------------------------------------------------------- */

/* Encodings are op0<<14 | op1<<11 | CRn<<7 | CRm<<3 | op2, as in hv_sys_reg_t. */
#define SYSREG(op0, op1, crn, crm, op2) ((op0) << 14 | (op1) << 11 | (crn) << 7 | (crm) << 3 | (op2))
/* MRS/MSR at the current EL: true when done, false when an exception was taken or an exit prepared. */
bool sysreg_mrs(struct vcpu *c, const struct uop *u, uint32_t encoding, uint64_t *value);
bool sysreg_msr(struct vcpu *c, const struct uop *u, uint32_t encoding, uint64_t value);
void sysreg_reset(struct vcpu *c);
hv_return_t sysreg_host_get(struct vcpu *c, hv_sys_reg_t reg, uint64_t *value);
hv_return_t sysreg_host_set(struct vcpu *c, hv_sys_reg_t reg, uint64_t value);
bool sysreg_feature(hv_feature_reg_t reg, uint64_t *value);
uint32_t sysreg_iss(uint32_t insn); /* of EC 0x18, for MSR, MRS and SYS alike */
enum { /* SCTLR_EL1 */
    SCTLR_M = 1 << 0, SCTLR_A = 1 << 1, SCTLR_SA = 1 << 3, SCTLR_SA0 = 1 << 4, SCTLR_UMA = 1 << 9, SCTLR_DZE = 1 << 14,
    SCTLR_UCT = 1 << 15, SCTLR_NTWI = 1 << 16, SCTLR_NTWE = 1 << 18, SCTLR_WXN = 1 << 19, SCTLR_TSCXT = 1 << 20,
    SCTLR_SPAN = 1 << 23, SCTLR_E0E = 1 << 24, SCTLR_EE = 1 << 25, SCTLR_UCI = 1 << 26
};
enum { MDSCR_SS = 1 << 0, MDSCR_KDE = 1 << 13 };
#define SCTLR_DSSBS (UINT64_C(1) << 44)
enum { DAIF_D = 1 << 9, DAIF_A = 1 << 8, DAIF_I = 1 << 7, DAIF_F = 1 << 6, DAIF_ALL = 0x3c0 };

/* ---- time, run.c ------------------------------------------------------------------------------------------------ */

uint64_t host_ns(void); /* CLOCK_MONOTONIC */
static inline uint64_t guest_counter(const struct vcpu *c) {
    uint64_t ticks = softhv_absolute_time() - c->vtimer_offset;
    return unlikely(c->fast_counter) ? ticks * 125 / 3 : ticks;
}
bool vtimer_due(const struct vcpu *c); /* ENABLE, !IMASK and CVAL reached */
void vcpu_run(struct vcpu *c);         /* hv_vcpu_run on the owning thread */
bool guest_yield(struct vcpu *c);      /* let the others run; false: asked to exit meanwhile */
bool guest_enter(struct vcpu *c);      /* the two halves of that */
void guest_leave(struct vcpu *c);

/* ---- mail.c ----------------------------------------------------------------------------------------------------- */

void mail_tlbi(struct vcpu *c, unsigned op, uint64_t argument); /* from c to all others */
void mail_code(struct vm *vm, const struct vcpu *from, uint64_t pa, uint64_t size); /* to all, or all others; any thread */
void mail_read(struct vcpu *c);  /* by its own thread, between blocks or as the last thing of one */
void mail_sync(struct vcpu *c);  /* the same; returns when all others have read what c has sent them */
void mail_moved(struct vm *vm);  /* vm->lock held: wake those who wait for others to read */
void mail_wait(struct vcpu *c);  /* the same; while mail_sync() waits for others, make room: until c is asked out */
void tlbi(struct vcpu *c, unsigned op, uint64_t argument); /* exec_sys.c: on this vCPU */

/* ---- gic.c: only where c->gic is set ---------------------------------------------------------------------------- */

extern uint8_t gic_registers[]; /* in the place of a host address: an access goes to gic_read() or gic_write() */
bool gic_has(const struct vcpu *c, uint64_t pa);
void gic_read(struct vcpu *c, uint64_t pa, unsigned size, void *out);
void gic_write(struct vcpu *c, uint64_t pa, unsigned size, const void *in);
bool gic_mrs(struct vcpu *c, uint32_t reg, uint64_t *value); /* false: UNDEFINED */
bool gic_msr(struct vcpu *c, uint32_t reg, uint64_t value);
void gic_poll(struct vcpu *c); /* the timer's interrupt and irq_line, as they are now */
bool gic_wait(struct vcpu *c); /* WFI: until an interrupt or a kick; as guest_enter() */
void gic_wake(struct vcpu *c); /* look at poll again; any thread */
void gic_join(struct vcpu *c, struct gic *gic);
void gic_part(struct vcpu *c);
void gic_set_affinity(struct vcpu *c); /* it follows MPIDR_EL1 */
void gic_destroy(struct gic *gic);

/* ---- fault.c: hooks for a VM with vm->faults ------------------------------------------------------------------------------ */

bool fault_fast_counter(const struct vm *vm);
bool fault_kick(struct vcpu *c);          /* does this hv_vcpus_exit take effect now? Any thread */
bool fault_kicked_twice(struct vcpu *c);  /* is one kick to cancel the next run too? */
bool fault_entry(struct vcpu *c, hv_exit_reason_t *reason); /* return from hv_vcpu_run at once? */
void fault_poll(struct vcpu *c);
bool fault_vtimer_waits(struct vcpu *c);  /* it is due: not yet? */
enum fault_wfi { WFI_EXITS, WFI_COMPLETES, WFI_CANCELED };
enum fault_wfi fault_wfi(struct vcpu *c, uint64_t after);

/* ---- decode.c, code.c ------------------------------------------------------------------------------------------- */

void decode_init(void); /* idempotent, thread-safe */
/* Decode from `host` (guest code at `pa`) up to the end of its page or of the block; `most` instructions. */
void decode_block(struct block *block, uint64_t pa, const uint8_t *host, uint32_t most);
/*
 * For the compiler: the instructions run most often from `pa` on, within the page at host address `page`. Branches to
 * known places in it are followed, conditional ones where `taken` says so, calls too; none comes twice. Ends before what
 * is UNDEFINED. at[i]: where in the page instruction i is; the last, behind them all: where it goes on.
 */
typedef bool (*taken_fn)(struct vcpu *c, uint64_t target, uint64_t next); /* their PAs */
void decode_trace(struct block *trace, uint64_t pa, const uint8_t *page, uint16_t *at, taken_fn taken, struct vcpu *c);
extern struct row a64_rows[];
extern const uint32_t a64_row_count;

/* By the vCPU's own thread, between blocks, or for code_invalidate() as the last thing of one. */
struct block *code_block(struct vcpu *c, uint64_t pa, const uint8_t *host); /* found or decoded */
/* For the compiler, as decode_trace() has it; false: nothing to gain. */
bool code_trace(struct vcpu *c, const struct block *block, struct block *trace, uint16_t at[BLOCK_MAX + 1]);
/* Room in the arena for BLOCK_MAX uops, or NULL; the first `count` written there stay. */
struct uop *code_room(struct vcpu *c);
void code_keep(struct vcpu *c, uint32_t count);
bool code_full(const struct vcpu *c);
static inline const uint8_t *code_arena(const struct vcpu *c) { return c->arena; }
static inline struct block *jump_block(const struct vcpu *c, const struct jump_entry *jump) {
    return (struct block *)(c->arena + jump->block);
}
void code_compiled(struct vcpu *c, const struct block *block);
void code_offer(struct vcpu *c, uint64_t va, uint64_t pa); /* a page: its compiled blocks to the jump cache */
void code_invalidate(struct vcpu *c, uint64_t pa, uint64_t size);
void code_flush(struct vcpu *c);
bool code_create(struct vcpu *c);
void code_destroy(struct vcpu *c);
/* False: no vCPU ever decoded a block in this page. Any thread, after a full fence. */
bool code_maybe(struct vm *vm, uint64_t pa);

/* ---- the VM ----------------------------------------------------------------------------------------------------- */

enum { RAM_MAX = 32 /* regions */, VCPU_MAX = 64 };
struct ram {
    uint64_t ipa, size;
    uint8_t *host;
    uint32_t flags;
};
struct code; /* code.c's */
struct jit;  /* the back end's */

enum { EXCLUSIVE_SLOTS = 1 << 10 };
enum { CODE_MARKS = 1 << 20 /* pages, so 4 GiB before two share a mark */ };

struct vm {
    pthread_mutex_t lock; /* vCPU list, RAM map, turns */
    bool turns;           /* one vCPU inside the guest at a time: */
    struct vcpu *turn;    /* whose turn it is; NULL: nobody's */
    struct vcpu *first_waiter, *last_waiter;
    uint32_t inside;          /* vCPUs in the guest */
    _Atomic uint32_t stoppers; /* those who wait to change the memory map */
    pthread_cond_t all_out;   /* for them */
    _Atomic uint32_t syncing; /* vCPUs in mail_sync() */
    _Atomic uint32_t mail_waiters; /* asleep until a vCPU has read its mail, is outside, has got some, is asked out; or
                                      none syncs: */
    pthread_cond_t mail_moved;
    struct ram ram[RAM_MAX];
    uint32_t ram_count;
    struct vcpu *vcpus[VCPU_MAX];
    _Atomic uint32_t vcpu_count; /* changes under the lock */
    int32_t jit_threshold; /* softhv_vm_set_jit(); for the vCPUs to come */
    size_t jit_limit;
    uint64_t map_gen;      /* counts what makes vCPUs drop cached pointers to RAM */
    _Atomic uint64_t marked[CODE_MARKS / 64]; /* pages that may have blocks */
    _Atomic uint64_t exclusive[EXCLUSIVE_SLOTS]; /* by address: exec_atomic.c */
    uint32_t ipa_bits;
    _Atomic bool created;
    struct gic *gic;       /* NULL: none inside */
    struct faults *faults; /* NULL: it behaves */
};
/* The RAM region that holds ipa, or NULL. Only by a vCPU inside the guest, or under the lock. */
struct ram *vm_ram(struct vm *vm, uint64_t ipa);
/* The VM the calling thread is bound to, created or not; NULL when there is none. */
struct vm *vm_current(void);

#endif
