/*
 * The x86-64 back end's insides: the assembler, and the state of one compilation.
 *
 *   jit_x64.c       code memory, shared stubs, blocks: exits, links, slow paths
 *   jit_x64_int.c   data processing and branches      jit_x64_mem.c   loads and stores
 *   jit_x64_simd.c  Advanced SIMD                     jit_x64_fp.c    scalar floating point
 *   jit_x64_crypto.c  AES, SHA1, SHA256, PMULL        jit_x64_simd.h  what the last three share
 *
 * Registers of generated code:
 *
 *   rbp             struct vcpu + 128, so that x[0] to x[31] have 8-bit displacements
 *   r14             VA of the guest page the code is in: blocks know no other address, one serves every mapping
 *   r15d            NZCV as LAHF and SETO leave it (RAW_*), C inverted, which is how x86 subtracts
 *   rax, rcx, rdx   scratch
 *   the other nine  guest registers, allocated within a block; all are back in x[] when it is left
 *   xmm5 to xmm15   copies of vector registers, within a block
 */
#ifndef SOFTHV_JIT_X64_H
#define SOFTHV_JIT_X64_H

#include "jit.h"

#if defined(__x86_64__) && defined(__linux__)
#define JIT_X64 1

enum { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15, NO_REG = 0xff };
enum { NO_GUEST = 0xff };
enum { O, NO, B, AE, E, NE, BE, A, S, NS, P, NP, L, GE, LE, G }; /* conditions of Jcc, SETcc, CMOVcc */
enum { ADD, OR, ADC, SBB, AND, SUB, XOR, CMP };                    /* opcodes are 8 * this + a form */
enum { ROR = 1, SHL = 4, SHR, SAR = 7 };

#define CPU RBP
#define PAGE R14
#define FLAGS R15
#define AT(field) ((int32_t)offsetof(struct vcpu, field) - 128)
#define X_AT(guest) ((int32_t)(8 * (guest)) - 128)
#define V_AT(index) (AT(v) + 16 * (int32_t)(index))

enum { RAW_N = 1 << 15, RAW_Z = 1 << 14, RAW_NOT_C = 1 << 8, RAW_V = 1 << 0 };

/* ---- What an instruction's emitter may rely on, and must say ----------------------------------------------------- */

enum {
    SETS = 1,  /* all of NZCV, and nothing else does */
    USES = 2,  /* NZCV */
    TRAPS = 4, /* may leave the block in its middle: NZCV must be right there */
    KEEPS = 8, /* host flags */
    ENDS = 16, /* the end of a block is emitted, or a side exit from it, when the instruction asks for one */
    NO_RD = 32,      /* which x registers it writes: rd, unless it has this; */
    AND_RA = 64,     /* ra as well; */
    AND_RN = 128,    /* rn as well; */
    AND_RM = 256,    /* rm as well; */
    LINKS = 512,     /* x30 as well */
};

struct emit;
struct emitter {
    bool (*plain)(struct vcpu *, const struct uop *); /* the op it stands for */
    void (*emit)(struct emit *e, const struct uop *u, uint32_t arg);
    uint32_t arg;
    uint32_t effects;
};
/* They end with an empty one. */
extern const struct emitter jit_x64_int[], jit_x64_mem[], jit_x64_simd[], jit_x64_crypto[], jit_x64_fp[];

/* ---- One compilation --------------------------------------------------------------------------------------------- */

/*
 * NZCV may be in several places. The cheapest is none: what set them last is done again when someone wants them, as
 * long as its operands are there.
 */
enum { FLAGS_IN_REG = 1, FLAGS_IN_MEM = 2, FLAGS_AGAIN = 4 };
enum again {
    AGAIN_NEVER, CMP_IMM, ADD_IMM /* CMN */, UNDO_SUB_IMM, UNDO_ADD_IMM, TEST_IMM,
    CMP_REG, TEST_REG, /* from here on m counts, */
    ADD_REG, UNDO_SUB_REG, UNDO_ADD_REG, /* and RAX takes the result */
};
struct again_by {
    uint8_t kind, wide, n, m; /* guest registers; UNDO_*: n holds the result */
    int32_t imm;
};

/* Guest registers and, from R_COUNT on, scratch[]. */
enum { R_SCRATCH = R_COUNT, R_ALL = R_COUNT + SCRATCH_COUNT };
/* Of vector registers, no number of a general one. */
enum { V_SCRATCH = 64 };
_Static_assert((int)V_SCRATCH >= (int)R_ALL, "v_restore() compares them");

struct regs {
    uint8_t guest[16];   /* by host register, NO_GUEST when free */
    uint8_t host[R_ALL]; /* by guest register, NO_REG when it is only in x[] */
    uint16_t dirty;      /* host registers whose guest register in x[] is out of date */
    uint8_t flags;       /* where NZCV is: FLAGS_* */
    struct again_by again;
    uint8_t vector[16];  /* by XMM register: a copy of this vector register, never newer than v[]; or V_SCRATCH and on,
                            which are in v_scratch[] during calls only; or NO_GUEST */
};

/* A load or store, with its registers: the host's, NO_REG when there is none. */
struct transfer {
    uint32_t arg;
    uint8_t n, m, t, t2;
    uint8_t scratch; /* where the addend is to be, or NO_REG */
    bool finds;      /* it fills scratch */
};

/* The SHA-256 state in XMM registers: vector numbers of what it was made from (abcd, efgh, words) and of what it holds. */
struct rounds {
    uint32_t from[3], state[2];
};

enum outlined_kind { SLOW_CALL, SIDE_EXIT, CHECKED_ACCESS, LAST_CALL };
struct outlined {
    enum outlined_kind kind;
    uint8_t *from[6]; /* rel32 fields that lead here; FCVTZU has four */
    const struct uop *u;
    struct regs before, after; /* but for SIDE_EXIT: state where it is left and where it comes back to */
    bool host_flags;           /* SIDE_EXIT: the host's flags are the guest's */
    bool sets_flags;           /* SLOW_CALL: the op does, and NZCV is to be in FLAGS */
    const uint8_t *back;
    int32_t target; /* SIDE_EXIT: offset from PAGE */
    struct transfer transfer; /* CHECKED_ACCESS */
};

/*
 * Loads and stores near one another: the TLB is looked up by the first, for all of them, and the addend it finds kept
 * in a scratch register; 0 there means that each must look for itself.
 */
struct group {
    uint8_t first, last;  /* instructions */
    uint8_t scratch;      /* its number as a register; 0: none, it is no group */
    bool write;           /* one of them does: then the page must be writable, too, which here means readable */
    int32_t low, span;    /* bytes, from the first one's base */
};
enum { NO_GROUP = 0xff };

enum { TRACE_MAX = BLOCK_MAX };

struct emit {
    uint8_t *p, *end;   /* where to write; past `end` there is always room for one instruction */
    ptrdiff_t to_exec;  /* from there to where it will run */
    struct jit *jit;
    struct vcpu *vcpu;
    const struct block *block;
    struct uop *kept;    /* in the arena: those of its uops that compiled code refers to */
    uint8_t kept_count, kept_as[TRACE_MAX]; /* which of these each is, from 1; 0: none yet */
    uint32_t index;      /* of the instruction at hand */
    uint16_t at[TRACE_MAX + 1]; /* see decode_trace() */
    uint32_t went_back;  /* the first instruction that the trace goes backwards from */
    int32_t page_offset; /* of the block's first instruction */
    struct regs regs;
    uint32_t vector_stamp[16];
    uint32_t v_number[32], v_numbers; /* see v_number() */
    struct rounds rounds;             /* jit_x64_crypto.c */
    bool in_cold;            /* on a slow path: what the registers hold is settled */
    uint32_t stamp[16], now; /* last use of host registers: the oldest is evicted, never one of this instruction */
    bool host_flags;         /* the host's flags are the guest's */
    bool spared;             /* and this instruction's code, as it came out, has left them alone */
    bool live_after[TRACE_MAX];
    uint64_t writes[TRACE_MAX]; /* x registers, a bit for each */
    uint8_t group_of[TRACE_MAX];
    bool sp_aligned[TRACE_MAX]; /* the group's first access has seen to it */
    struct group groups[TRACE_MAX];
    bool flags_live;         /* does anyone want NZCV of the current instruction? */
    bool fp_checked;
    bool ended;
    bool loops;             /* a way out leads to the block's own start, with these registers: */
    struct regs back;
    uint64_t early;         /* guest registers that were read before host registers ran out */
    bool short_of_regs;
    const uint8_t *header;  /* where they are expected, once known */
    uint32_t skip; /* following instructions this one did as well */
    const struct emitter *by[TRACE_MAX];
    uint8_t *cold; /* where to write what is hardly ever run */
    struct outlined outlined[2 * TRACE_MAX + 2];
    unsigned outlined_count;
};

/* ---- The assembler ----------------------------------------------------------------------------------------------- */

static inline void byte(struct emit *e, unsigned b) { *e->p++ = (uint8_t)b; }
static inline void word32(struct emit *e, uint32_t v) { memcpy(e->p, &v, 4); e->p += 4; }
static inline void word64(struct emit *e, uint64_t v) { memcpy(e->p, &v, 8); e->p += 8; }

/* Opcodes: 0xPP0Fxx with a mandatory prefix PP, 0x0Fxx, or xx; BYTE_REG when a register in it is a byte one. */
enum { BYTE_REG = 1 << 24, MAP_38 = 1 << 25, MAP_3A = 1 << 26 /* 0F 38, 0F 3A */ };
static inline void opcode(struct emit *e, unsigned w, uint32_t op, unsigned reg, unsigned index, unsigned rm) {
    if (op >> 16 & 0xff)
        byte(e, op >> 16 & 0xff);
    unsigned rex = w << 3 | (reg >> 3) << 2 | (index >> 3) << 1 | rm >> 3;
    if (rex || (op & BYTE_REG && (reg >= 4 || rm >= 4)))
        byte(e, 0x40 | rex);
    if ((op >> 8 & 0xff) == 0x0f)
        byte(e, 0x0f);
    if (op & (MAP_38 | MAP_3A))
        byte(e, op & MAP_38 ? 0x38 : 0x3a);
    byte(e, op & 0xff);
}
/* reg, rm both registers; w: 64 bits wide. */
static inline void op_rr(struct emit *e, unsigned w, uint32_t op, unsigned reg, unsigned rm) {
    opcode(e, w, op, reg, 0, rm);
    byte(e, 0xc0 | (reg & 7) << 3 | (rm & 7));
}
/* reg, [base + disp] */
static inline void op_rm(struct emit *e, unsigned w, uint32_t op, unsigned reg, unsigned base, int32_t disp) {
    opcode(e, w, op, reg, 0, base);
    bool small = disp == (int8_t)disp;
    unsigned mod = disp == 0 && (base & 7) != RBP ? 0 : small ? 1 : 2;
    byte(e, mod << 6 | (reg & 7) << 3 | (base & 7));
    if ((base & 7) == RSP)
        byte(e, 0x24);
    if (mod == 1)
        byte(e, (uint8_t)disp);
    else if (mod == 2)
        word32(e, (uint32_t)disp);
}
/* reg, [base + index << scale + disp] */
static inline void op_rxd(struct emit *e, unsigned w, uint32_t op, unsigned reg, unsigned base, unsigned index,
                          unsigned scale, int32_t disp) {
    opcode(e, w, op, reg, index, base);
    bool small = disp == (int8_t)disp;
    unsigned mod = disp == 0 && (base & 7) != RBP ? 0 : small ? 1 : 2;
    byte(e, mod << 6 | (reg & 7) << 3 | 4);
    byte(e, scale << 6 | (index & 7) << 3 | (base & 7));
    if (mod == 1)
        byte(e, (uint8_t)disp);
    else if (mod == 2)
        word32(e, (uint32_t)disp);
}
static inline void op_rx(struct emit *e, unsigned w, uint32_t op, unsigned reg, unsigned base, unsigned index,
                         unsigned scale) {
    op_rxd(e, w, op, reg, base, index, scale, 0);
}

static inline void mov(struct emit *e, unsigned w, unsigned to, unsigned from) {
    if (to != from || !w) /* 32 bits wide it clears the upper half */
        op_rr(e, w, 0x8b, to, from);
}
static inline void load(struct emit *e, unsigned w, unsigned to, unsigned base, int32_t disp) {
    op_rm(e, w, 0x8b, to, base, disp);
}
static inline void store(struct emit *e, unsigned w, unsigned from, unsigned base, int32_t disp) {
    op_rm(e, w, 0x89, from, base, disp);
}
static inline void lea(struct emit *e, unsigned w, unsigned to, unsigned base, int32_t disp) {
    op_rm(e, w, 0x8d, to, base, disp);
}
/* Any constant; leaves the flags alone. */
static inline void mov_imm(struct emit *e, unsigned to, uint64_t value) {
    if (value <= UINT32_MAX) {
        opcode(e, 0, 0xb8 | (to & 7), 0, 0, to);
        word32(e, (uint32_t)value);
    } else if (value == (uint64_t)(int64_t)(int32_t)value) {
        opcode(e, 1, 0xc7, 0, 0, to);
        byte(e, 0xc0 | (to & 7));
        word32(e, (uint32_t)value);
    } else {
        opcode(e, 1, 0xb8 | (to & 7), 0, 0, to);
        word64(e, value);
    }
}
static inline void alu(struct emit *e, unsigned w, unsigned what, unsigned to, unsigned from) {
    op_rr(e, w, 8 * what + 3, to, from);
}
static inline void alu_imm(struct emit *e, unsigned w, unsigned what, unsigned to, int32_t value) {
    bool small = value == (int8_t)value;
    op_rr(e, w, small ? 0x83 : 0x81, what, to);
    if (small)
        byte(e, (uint8_t)value);
    else
        word32(e, (uint32_t)value);
}
/* On 32 bits of memory. */
static inline void alu_mem_imm(struct emit *e, unsigned what, unsigned base, int32_t disp, int32_t value) {
    bool small = value == (int8_t)value;
    op_rm(e, 0, small ? 0x83 : 0x81, what, base, disp);
    if (small)
        byte(e, (uint8_t)value);
    else
        word32(e, (uint32_t)value);
}
static inline void shift(struct emit *e, unsigned w, unsigned what, unsigned to, unsigned count) {
    if (!count)
        return;
    op_rr(e, w, 0xc1, what, to);
    byte(e, count);
}
static inline void test(struct emit *e, unsigned w, unsigned a, unsigned b) { op_rr(e, w, 0x85, a, b); }
static inline void test_imm(struct emit *e, unsigned reg, uint32_t value) {
    op_rr(e, 0, 0xf7, 0, reg);
    word32(e, value);
}
static inline void cmp_byte(struct emit *e, int32_t at, unsigned value) {
    op_rm(e, 0, 0x80, CMP, CPU, at);
    byte(e, value);
}
static inline void test_imm_w(struct emit *e, unsigned w, unsigned reg, int32_t value) {
    op_rr(e, w, 0xf7, 0, reg);
    word32(e, (uint32_t)value);
}
static inline void cmc(struct emit *e) { byte(e, 0xf5); }
static inline void stc(struct emit *e) { byte(e, 0xf9); }

/* Jumps: the field to patch, patched by here(). */
static inline uint8_t *jcc(struct emit *e, unsigned condition) {
    byte(e, 0x0f);
    byte(e, 0x80 | condition);
    word32(e, 0);
    return e->p - 4;
}
static inline uint8_t *jmp(struct emit *e) {
    byte(e, 0xe9);
    word32(e, 0);
    return e->p - 4;
}
static inline void point(uint8_t *field, const uint8_t *target) {
    int32_t distance = (int32_t)(target - (field + 4));
    memcpy(field, &distance, 4);
}
static inline void here(struct emit *e, uint8_t *field) { point(field, e->p); }

/* ---- jit_x64.c --------------------------------------------------------------------------------------------------- */

/* A guest register to read; to write, all of it; to do both. Writing XZR goes into RDX. */
unsigned use(struct emit *e, unsigned guest);
unsigned def(struct emit *e, unsigned guest);
unsigned use_def(struct emit *e, unsigned guest);
/* A register for what an instruction will write unless it traps; then dirty(). */
unsigned reserve(struct emit *e, unsigned guest);
void dirty(struct emit *e, unsigned guest);
void forget(struct emit *e, unsigned guest); /* its value is nobody's any more */

void need_flags(struct emit *e);   /* NZCV in FLAGS; RAX is lost */
/* The host's flags are NZCV now (C inverted), and this is how to get them again: remember them if anyone cares. */
void keep_flags(struct emit *e, struct again_by again);
unsigned condition(struct emit *e, unsigned arm_condition); /* puts NZCV into the host's flags; the host's condition */

/* Takes the jump (a field) when something out of the ordinary comes up: the op is called instead. Before any change. */
struct outlined *slow_call(struct emit *e, const struct uop *u);
struct outlined *last_call(struct emit *e, const struct uop *u); /* which does not come back, but leaves the block */
struct outlined *outline(struct emit *e, const struct uop *u, enum outlined_kind kind);
void also_from(struct outlined *o, uint8_t *field);
void comes_back(struct emit *e, struct outlined *o); /* when the fast path is done */

void side_exit(struct emit *e, const struct uop *u, uint8_t *field, int32_t target);
void leave_to(struct emit *e, const struct uop *u, int32_t target); /* offset from PAGE */
void leave_by_register(struct emit *e, const struct uop *u);        /* the same, of a branch by register */
void leave_to_rax(struct emit *e, const struct uop *u);             /* the address is in RAX */
void call_op(struct emit *e, const struct uop *u, bool ends);
void check_fp(struct emit *e, const struct uop *u);
bool host_has_sha(void); /* SHA-NI */
/* Calls that leave general registers where they are. Pure ones are of ops that know none, nor NZCV, and never fail. */
void call_pure(struct emit *e, const struct uop *u);
void call_kept(struct emit *e, const struct uop *u);

static inline int32_t page_offset(const struct emit *e, const struct uop *u) { return e->at[u - e->block->uops]; }
/* Where the trace goes on after it. */
static inline int32_t next_offset(const struct emit *e, const struct uop *u) { return e->at[u - e->block->uops + 1]; }
/* What PC-relative immediates count from. */
static inline int32_t pc_base(const struct emit *e, const struct uop *u) { return page_offset(e, u) - u->off; }

/* ---- jit_x64_simd.c: vector registers, with scratch XMM0 to XMM4 ------------------------------------------------- */

void v_load(struct emit *e, unsigned xmm, unsigned v);
void v_store(struct emit *e, unsigned xmm, unsigned v);
void v_forget(struct emit *e, unsigned v); /* v[] was written */
void v_forget_all(struct emit *e);
void v_renumber(struct emit *e); /* anything in v[] may have changed, and copies with it */
void v_save(struct emit *e, const struct regs *regs); /* before a call that v_restore() comes after */
/* On the way back from a slow path: the copies that it has lost, or all. */
void v_restore(struct emit *e, const struct outlined *o, bool all);

/* ---- jit_x64_int.c, jit_x64_mem.c -------------------------------------------------------------------------------- */

/* Does it do no more than rd = rn + a constant, on 64 bits? */
bool adds_constant(const struct emitter *by, const struct uop *u, uint8_t *from, int32_t *constant);
bool makes_address(const struct emitter *by); /* ADRP: of the same imm always the same */
void plan_accesses(struct emit *e); /* fills groups[] */
void emit_checked_access(struct emit *e, struct outlined *o); /* with a lookup of its own, to where it comes back */

#endif
#endif
