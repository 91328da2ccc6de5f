/*
 * x86-64 code for loads and stores: the TLB is looked up in line, and what misses it, crosses a page or must be checked
 * otherwise is left to the op. Until the access is done nothing of the guest's state changes.
 */
#include "jit_x64.h"

#ifdef JIT_X64

#define A64(row_name, pattern, form, op) bool p_##op(struct vcpu *c, const struct uop *u);
#define A64_END(row_name, pattern, form, op) A64(row_name, pattern, form, op)
#include "a64_mem.def"
#undef A64
#undef A64_END

/* What arg is made of: log2 of the size in bits 2:0. */
enum {
    STORES = 8, SIGNED = 16, WIDE = 32 /* extended to 64 bits */, ALIGNED = 64, FENCED = 128, /* the rest: */ MODE = 8
};
enum {
    M_IMM = 0, M_PRE, M_POST, M_LSL, M_UXTW, M_SXTW, M_BASE, M_UNPRIVILEGED
};

/* RAX = the host address of `size` bytes at the guest's RAX; RCX and RDX are lost. */
static void translate(struct emit *e, struct outlined *o, unsigned size, bool write, bool unprivileged) {
    mov(e, 0, RCX, RAX);
    shift(e, 0, SHR, RCX, PAGE_BITS - 5);
    alu_imm(e, 0, AND, RCX, (TLB_SIZE - 1) << 5);
    if (unprivileged) {
        cmp_byte(e, AT(uao), 0); /* the op's affair: it counts at EL1 only */
        also_from(o, jcc(e, NE));
        lea(e, 1, RDX, CPU, AT(tlb[MMU_EL0]));
        alu(e, 1, ADD, RCX, RDX);
    } else {
        op_rm(e, 1, 0x03, RCX, CPU, AT(bank));
    }
    lea(e, 1, RDX, RAX, (int32_t)size - 1);
    alu_imm(e, 1, AND, RDX, -PAGE_SIZE);
    op_rm(e, 1, 0x3b, RDX, RCX, write ? offsetof(struct tlb_entry, write) : offsetof(struct tlb_entry, read));
    also_from(o, jcc(e, NE));
    op_rm(e, 1, 0x03, RAX, RCX, offsetof(struct tlb_entry, addend));
}

/* Before slow_call(): operands in registers. After it: their address in RAX, checks of alignment done. */
struct operands {
    unsigned n, m;
};
static struct operands operands(struct emit *e, const struct uop *u, uint32_t arg) {
    unsigned mode = arg >> MODE;
    return (struct operands){use(e, u->rn), mode == M_LSL || mode == M_UXTW || mode == M_SXTW ? use(e, u->rm) : NO_REG};
}

static void address(struct emit *e, const struct uop *u, uint32_t arg, struct operands at, struct outlined *o) {
    if (u->aux) { /* SP: whether its alignment matters is the op's business */
        test_imm(e, at.n, 15);
        also_from(o, jcc(e, NE));
    }
    switch (arg >> MODE) {
    case M_IMM:
    case M_PRE:
    case M_UNPRIVILEGED:
        if (u->imm)
            lea(e, 1, RAX, at.n, (int32_t)u->imm);
        else
            mov(e, 1, RAX, at.n);
        break;
    case M_LSL:
        if (u->imm <= 3) {
            op_rx(e, 1, 0x8d, RAX, at.n, at.m, (unsigned)u->imm);
        } else {
            mov(e, 1, RAX, at.m);
            shift(e, 1, SHL, RAX, (unsigned)u->imm);
            alu(e, 1, ADD, RAX, at.n);
        }
        break;
    case M_UXTW:
    case M_SXTW:
        if (arg >> MODE == M_UXTW)
            mov(e, 0, RAX, at.m);
        else
            op_rr(e, 1, 0x63, RAX, at.m);
        shift(e, 1, SHL, RAX, (unsigned)u->imm);
        alu(e, 1, ADD, RAX, at.n);
        break;
    default:
        mov(e, 1, RAX, at.n);
    }
    if (arg & ALIGNED && arg & 3) {
        test_imm(e, RAX, (1u << (arg & 3)) - 1);
        also_from(o, jcc(e, NE));
    }
}

/* What an access with writeback loads is not its base (CONSTRAINED UNPREDICTABLE): else it is the op's. */
static bool loads_base(const struct uop *u, uint32_t arg, bool pair) {
    bool writes_back = arg >> MODE == M_PRE || arg >> MODE == M_POST;
    return writes_back && !(arg & STORES) && (u->rd == u->rn || (pair && u->ra == u->rn));
}

static void write_back(struct emit *e, const struct uop *u, uint32_t arg, struct operands at) {
    if (arg >> MODE != M_PRE && arg >> MODE != M_POST)
        return;
    lea(e, 1, at.n, at.n, (int32_t)u->imm);
    dirty(e, u->rn);
}

/* A general register from [RAX + disp]. */
static void load_x(struct emit *e, uint32_t arg, unsigned to, int32_t disp) {
    bool wide = arg & WIDE;
    switch (arg & 7) {
    case 0: op_rm(e, wide && arg & SIGNED, arg & SIGNED ? 0x0fbe : 0x0fb6, to, RAX, disp); break;
    case 1: op_rm(e, wide && arg & SIGNED, arg & SIGNED ? 0x0fbf : 0x0fb7, to, RAX, disp); break;
    case 2: op_rm(e, wide && arg & SIGNED, arg & SIGNED && wide ? 0x63 : 0x8b, to, RAX, disp); break;
    default: load(e, 1, to, RAX, disp);
    }
}

static void store_x(struct emit *e, uint32_t arg, unsigned from, int32_t disp) {
    switch (arg & 7) {
    case 0: op_rm(e, 0, 0x88 | BYTE_REG, from, RAX, disp); break;
    case 1: op_rm(e, 0, 0x660089, from, RAX, disp); break;
    default: store(e, (arg & 7) == 3, from, RAX, disp);
    }
}

static void emit_access(struct emit *e, const struct uop *u, uint32_t arg) {
    if (loads_base(u, arg, false)) {
        call_op(e, u, false);
        return;
    }
    struct operands at = operands(e, u, arg);
    unsigned t = arg & STORES ? use(e, u->rd) : reserve(e, u->rd);
    struct outlined *o = slow_call(e, u);
    address(e, u, arg, at, o);
    translate(e, o, 1u << (arg & 7), arg & STORES, arg >> MODE == M_UNPRIVILEGED);
    if (arg & STORES) {
        store_x(e, arg, t, 0);
        if (arg & FENCED) { /* a later LDAR does not overtake an STLR */
            byte(e, 0xf0);
            alu_mem_imm(e, OR, RSP, 0, 0);
        }
    } else {
        load_x(e, arg, t, 0);
        dirty(e, u->rd);
    }
    write_back(e, u, arg, at);
    comes_back(e, o);
}

static void emit_literal(struct emit *e, const struct uop *u, uint32_t arg) {
    unsigned t = reserve(e, u->rd);
    struct outlined *o = slow_call(e, u);
    lea(e, 1, RAX, PAGE, e->page_offset + (int32_t)u->imm);
    translate(e, o, 1u << (arg & 7), false, false);
    load_x(e, arg, t, 0);
    dirty(e, u->rd);
    comes_back(e, o);
}

/* The second register is loaded first: of one that is loaded twice the first value stays. */
static void emit_pair(struct emit *e, const struct uop *u, uint32_t arg) {
    if (loads_base(u, arg, true)) {
        call_op(e, u, false);
        return;
    }
    struct operands at = operands(e, u, arg);
    unsigned t = arg & STORES ? use(e, u->rd) : reserve(e, u->rd);
    unsigned t2 = arg & STORES ? use(e, u->ra) : reserve(e, u->ra);
    struct outlined *o = slow_call(e, u);
    unsigned size = 1u << (arg & 7);
    address(e, u, arg, at, o);
    translate(e, o, 2 * size, arg & STORES, false);
    if (arg & STORES) {
        store_x(e, arg, t, 0);
        store_x(e, arg, t2, (int32_t)size);
    } else {
        load_x(e, arg, t2, (int32_t)size);
        load_x(e, arg, t, 0);
        dirty(e, u->rd);
        dirty(e, u->ra);
    }
    write_back(e, u, arg, at);
    comes_back(e, o);
}

/* ---- Vectors: in memory, through XMM0 and XMM1 ------------------------------------------------------------------- */

enum { MOVD = 0x660f6e, MOVQ = 0xf30f7e, MOVUPS = 0x0f10, MOVUPS_STORE = 0x0f11 };

/* XMMn, zero extended, from [RAX + disp]. */
static void load_v(struct emit *e, uint32_t arg, unsigned to, int32_t disp) {
    switch (arg & 7) {
    case 0:
    case 1:
        op_rm(e, 0, arg & 7 ? 0x0fb7 : 0x0fb6, RCX, RAX, disp);
        op_rr(e, 0, MOVD, to, RCX);
        break;
    case 2: op_rm(e, 0, MOVD, to, RAX, disp); break;
    case 3: op_rm(e, 0, MOVQ, to, RAX, disp); break;
    default: op_rm(e, 0, MOVUPS, to, RAX, disp);
    }
}

static void store_v(struct emit *e, uint32_t arg, unsigned v, int32_t disp) {
    if ((arg & 7) == 4) {
        op_rm(e, 0, MOVUPS, 0, CPU, V_AT(v));
        op_rm(e, 0, MOVUPS_STORE, 0, RAX, disp);
    } else {
        load(e, 1, RCX, CPU, V_AT(v));
        store_x(e, arg, RCX, disp);
    }
}

static void emit_access_v(struct emit *e, const struct uop *u, uint32_t arg) {
    check_fp(e, u);
    struct operands at = operands(e, u, arg);
    struct outlined *o = slow_call(e, u);
    address(e, u, arg, at, o);
    translate(e, o, 1u << (arg & 7), arg & STORES, false);
    if (arg & STORES) {
        store_v(e, arg, u->rd, 0);
    } else {
        load_v(e, arg, 0, 0);
        op_rm(e, 0, MOVUPS_STORE, 0, CPU, V_AT(u->rd));
    }
    write_back(e, u, arg, at);
    comes_back(e, o);
}

static void emit_literal_v(struct emit *e, const struct uop *u, uint32_t arg) {
    check_fp(e, u);
    struct outlined *o = slow_call(e, u);
    lea(e, 1, RAX, PAGE, e->page_offset + (int32_t)u->imm);
    translate(e, o, 1u << (arg & 7), false, false);
    load_v(e, arg, 0, 0);
    op_rm(e, 0, MOVUPS_STORE, 0, CPU, V_AT(u->rd));
    comes_back(e, o);
}

static void emit_pair_v(struct emit *e, const struct uop *u, uint32_t arg) {
    check_fp(e, u);
    struct operands at = operands(e, u, arg);
    struct outlined *o = slow_call(e, u);
    unsigned size = 1u << (arg & 7);
    address(e, u, arg, at, o);
    translate(e, o, 2 * size, arg & STORES, false);
    if (arg & STORES) {
        store_v(e, arg, u->rd, 0);
        store_v(e, arg, u->ra, (int32_t)size);
    } else {
        load_v(e, arg, 0, 0);
        load_v(e, arg, 1, (int32_t)size);
        op_rm(e, 0, MOVUPS_STORE, 0, CPU, V_AT(u->rd));
        op_rm(e, 0, MOVUPS_STORE, 1, CPU, V_AT(u->ra));
    }
    write_back(e, u, arg, at);
    comes_back(e, o);
}

static void emit_nothing(struct emit *e, const struct uop *u, uint32_t arg) {}

/* ---- The table --------------------------------------------------------------------------------------------------- */

#define MODES(name, emitter, arg)                                                                                      \
    {p_##name##_imm, emitter, (arg) | M_IMM << MODE, TRAPS}, {p_##name##_pre, emitter, (arg) | M_PRE << MODE, TRAPS},  \
    {p_##name##_post, emitter, (arg) | M_POST << MODE, TRAPS}
#define INDEXED(name, emitter, arg)                                                                                    \
    MODES(name, emitter, arg), {p_##name##_lsl, emitter, (arg) | M_LSL << MODE, TRAPS},                                \
    {p_##name##_uxtw, emitter, (arg) | M_UXTW << MODE, TRAPS}, {p_##name##_sxtw, emitter, (arg) | M_SXTW << MODE, TRAPS}
#define GENERAL(name, arg)                                                                                             \
    INDEXED(name, emit_access, arg), {p_##name##_unpriv, emit_access, (arg) | M_UNPRIVILEGED << MODE, TRAPS}
#define VECTORS(letter, size)                                                                                          \
    INDEXED(ldr_##letter, emit_access_v, size), INDEXED(str_##letter, emit_access_v, (size) | STORES)
#define VECTOR_PAIRS(letter, size)                                                                                     \
    MODES(ldp_##letter, emit_pair_v, size), MODES(stp_##letter, emit_pair_v, (size) | STORES)
#define ORDERED(width, size)                                                                                           \
    {p_ldar##width, emit_access, (size) | ALIGNED | M_BASE << MODE, TRAPS},                                            \
    {p_stlr##width, emit_access, (size) | STORES | ALIGNED | FENCED | M_BASE << MODE, TRAPS}

const struct emitter jit_x64_mem[] = {
    GENERAL(ldrb, 0),
    GENERAL(ldrh, 1),
    GENERAL(ldr32, 2),
    GENERAL(ldr64, 3),
    GENERAL(ldrsb32, 0 | SIGNED),
    GENERAL(ldrsb64, 0 | SIGNED | WIDE),
    GENERAL(ldrsh32, 1 | SIGNED),
    GENERAL(ldrsh64, 1 | SIGNED | WIDE),
    GENERAL(ldrsw, 2 | SIGNED | WIDE),
    GENERAL(strb, 0 | STORES),
    GENERAL(strh, 1 | STORES),
    GENERAL(str32, 2 | STORES),
    GENERAL(str64, 3 | STORES),
    {p_ldr32_literal, emit_literal, 2, TRAPS},
    {p_ldr64_literal, emit_literal, 3, TRAPS},
    {p_ldrsw_literal, emit_literal, 2 | SIGNED | WIDE, TRAPS},
    ORDERED(8, 0),
    ORDERED(16, 1),
    ORDERED(32, 2),
    ORDERED(64, 3),
    MODES(ldp32, emit_pair, 2),
    MODES(ldp64, emit_pair, 3),
    MODES(ldpsw, emit_pair, 2 | SIGNED | WIDE),
    MODES(stp32, emit_pair, 2 | STORES),
    MODES(stp64, emit_pair, 3 | STORES),
    VECTORS(b, 0),
    VECTORS(h, 1),
    VECTORS(s, 2),
    VECTORS(d, 3),
    VECTORS(q, 4),
    VECTOR_PAIRS(s, 2),
    VECTOR_PAIRS(d, 3),
    VECTOR_PAIRS(q, 4),
    {p_ldr_s_literal, emit_literal_v, 2, TRAPS},
    {p_ldr_d_literal, emit_literal_v, 3, TRAPS},
    {p_ldr_q_literal, emit_literal_v, 4, TRAPS},
    {p_prfm, emit_nothing, 0, KEEPS},
    {NULL, NULL, 0, 0},
};

#endif
