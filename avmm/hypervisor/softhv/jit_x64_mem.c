/*
 * x86-64 code for loads and stores: the TLB is looked up in line, and what misses it, crosses a page or must be checked
 * otherwise is left to the op. Until the access is done nothing of the guest's state changes.
 */
#include "jit_x64_simd.h"

#ifdef JIT_X64

#define A64(row_name, pattern, form, op) bool p_##op(struct vcpu *c, const struct uop *u);
#define A64_END(row_name, pattern, form, op) A64(row_name, pattern, form, op)
#include "a64_mem.def"
#undef A64
#undef A64_END
bool p_dc_zva(struct vcpu *c, const struct uop *u);

/* What arg is made of: log2 of the size in bits 2:0. */
enum {
    STORES = 8, SIGNED = 16, WIDE = 32 /* extended to 64 bits */, ALIGNED = 64, FENCED = 128, MODE = 8 /* bits 10:8 */,
    PAIR = 1 << 11, VECTOR = 1 << 12
};
enum {
    M_IMM = 0, M_PRE, M_POST, M_LSL, M_UXTW, M_SXTW, M_BASE, M_UNPRIVILEGED
};

struct place { /* in host memory */
    unsigned base, index; /* NO_REG: none */
    int32_t disp;
};

/* Register `addend` = what is added to the guest's `va`, a register, for `size` bytes there; RCX and RDX are lost. */
static void look_up(struct emit *e, struct outlined *o, unsigned addend, unsigned va, unsigned size, bool write,
                    int32_t bank) {
    mov(e, 0, RCX, va);
    shift(e, 0, SHR, RCX, PAGE_BITS - 5);
    alu_imm(e, 0, AND, RCX, (TLB_SIZE - 1) << 5);
    op_rm(e, 1, 0x03, RCX, CPU, bank);
    if (size > 1)
        lea(e, 1, RDX, va, (int32_t)size - 1);
    else
        mov(e, 1, RDX, va);
    alu_imm(e, 1, AND, RDX, -PAGE_SIZE);
    op_rm(e, 1, 0x3b, RDX, RCX, write ? offsetof(struct tlb_entry, write) : offsetof(struct tlb_entry, read));
    also_from(o, jcc(e, NE));
    load(e, 1, addend, RCX, offsetof(struct tlb_entry, addend));
}

/* Where `size` bytes at the guest's `va`, a register, are; RCX is lost, and RDX is part of the answer. */
static struct place translate(struct emit *e, struct outlined *o, unsigned va, unsigned size, bool write,
                              bool unprivileged) {
    if (unprivileged) {
        cmp_byte(e, AT(uao), 0); /* the op's affair: it counts at EL1 only */
        also_from(o, jcc(e, NE));
    }
    look_up(e, o, RDX, va, size, write, unprivileged ? AT(tlb[MMU_EL0]) : AT(bank));
    return (struct place){va, RDX, 0};
}

/* Before slow_call(): operands in registers. After it: their address in RAX, checks of alignment done. */
struct operands {
    unsigned n, m;
};
static struct operands operands(struct emit *e, const struct uop *u, uint32_t arg) {
    unsigned mode = arg >> MODE & 7;
    return (struct operands){use(e, u->rn), mode == M_LSL || mode == M_UXTW || mode == M_SXTW ? use(e, u->rm) : NO_REG};
}

/* The register with the guest's address: the base, or RAX. */
static unsigned address(struct emit *e, const struct uop *u, uint32_t arg, struct operands at, struct outlined *o) {
    unsigned to = RAX;
    if (u->aux) { /* SP: whether its alignment matters is the op's business */
        test_imm(e, at.n, 15);
        also_from(o, jcc(e, NE));
    }
    switch (arg >> MODE & 7) {
    case M_IMM:
    case M_PRE:
    case M_UNPRIVILEGED:
        if (u->imm)
            lea(e, 1, RAX, at.n, (int32_t)u->imm);
        else
            to = at.n;
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
        if ((arg >> MODE & 7) == M_UXTW)
            mov(e, 0, RAX, at.m);
        else
            op_rr(e, 1, 0x63, RAX, at.m);
        shift(e, 1, SHL, RAX, (unsigned)u->imm);
        alu(e, 1, ADD, RAX, at.n);
        break;
    default: to = at.n;
    }
    if (arg & ALIGNED && arg & 3) {
        test_imm(e, to, (1u << (arg & 3)) - 1);
        also_from(o, jcc(e, NE));
    }
    return to;
}

static bool writes_back(uint32_t arg) { return (arg >> MODE & 7) == M_PRE || (arg >> MODE & 7) == M_POST; }

/* What an access with writeback loads is not its base (CONSTRAINED UNPREDICTABLE): else it is the op's. */
static bool loads_base(const struct uop *u, uint32_t arg, bool pair) {
    return writes_back(arg) && !(arg & (STORES | VECTOR)) && (u->rd == u->rn || (pair && u->ra == u->rn));
}

static void write_back(struct emit *e, const struct uop *u, uint32_t arg, struct operands at) {
    if (!writes_back(arg))
        return;
    lea(e, 1, at.n, at.n, (int32_t)u->imm);
    dirty(e, u->rn);
}

/* ---- Accesses: of general registers and pairs, of vectors through XMM0 and XMM1 ---------------------------------- */

static void op_at(struct emit *e, unsigned w, uint32_t op, unsigned reg, struct place at, unsigned more) {
    if (at.index == NO_REG)
        op_rm(e, w, op, reg, at.base, at.disp + (int32_t)more);
    else
        op_rxd(e, w, op, reg, at.base, at.index, 0, at.disp + (int32_t)more);
}

static void load_x(struct emit *e, uint32_t arg, unsigned to, struct place at, unsigned more) {
    bool wide = arg & WIDE;
    switch (arg & 7) {
    case 0: op_at(e, wide && arg & SIGNED, arg & SIGNED ? 0x0fbe : 0x0fb6, to, at, more); break;
    case 1: op_at(e, wide && arg & SIGNED, arg & SIGNED ? 0x0fbf : 0x0fb7, to, at, more); break;
    case 2: op_at(e, wide && arg & SIGNED, arg & SIGNED && wide ? 0x63 : 0x8b, to, at, more); break;
    default: op_at(e, 1, 0x8b, to, at, more);
    }
}

static void store_x(struct emit *e, uint32_t arg, unsigned from, struct place at, unsigned more) {
    switch (arg & 7) {
    case 0: op_at(e, 0, 0x88 | BYTE_REG, from, at, more); break;
    case 1: op_at(e, 0, 0x660089, from, at, more); break;
    default: op_at(e, (arg & 7) == 3, 0x89, from, at, more);
    }
}

/* XMMn, zero extended. */
static void load_v(struct emit *e, uint32_t arg, unsigned to, struct place at, unsigned more) {
    switch (arg & 7) {
    case 0:
    case 1:
        op_at(e, 0, arg & 7 ? 0x0fb7 : 0x0fb6, RCX, at, more);
        op_rr(e, 0, MOVD_TO, to, RCX);
        break;
    case 2: op_at(e, 0, MOVD_TO, to, at, more); break;
    case 3: op_at(e, 0, MOVQ, to, at, more); break;
    default: op_at(e, 0, MOVUPS, to, at, more);
    }
}

static void store_v(struct emit *e, uint32_t arg, unsigned v, struct place at, unsigned more) {
    unsigned size = arg & 7, copy = size < 2 ? NO_REG : size == 4 && !e->in_cold ? v_use(e, v) : v_copy(e, v);
    if (copy != NO_REG) {
        op_at(e, 0, size == 4 ? MOVUPS_STORE : size == 3 ? 0x660fd6 : MOVD_FROM, copy, at, more);
    } else if (size == 4) {
        v_load(e, 0, v);
        op_at(e, 0, MOVUPS_STORE, 0, at, more);
    } else {
        load(e, 1, RCX, CPU, V_AT(v));
        store_x(e, arg, RCX, at, more);
    }
}

static void load_register(struct emit *e, uint32_t arg, unsigned v, struct place at, unsigned more) {
    unsigned to = e->in_cold ? 0 : v_target(e, v);
    load_v(e, arg, to, at, more);
    v_set(e, to, v);
}

/* Of a pair the second register is loaded first: of one that is loaded twice the first value stays. */
static void move(struct emit *e, const struct uop *u, const struct transfer *a, struct place at) {
    unsigned size = 1u << (a->arg & 7);
    switch (a->arg & (STORES | PAIR | VECTOR)) {
    case 0: load_x(e, a->arg, a->t, at, 0); break;
    case STORES:
        store_x(e, a->arg, a->t, at, 0);
        if (a->arg & FENCED) { /* a later LDAR does not overtake an STLR */
            byte(e, 0xf0);
            alu_mem_imm(e, OR, RSP, 0, 0);
        }
        break;
    case PAIR:
        if (a->t2 == at.base || a->t2 == at.index) { /* the second address would be lost */
            load_x(e, a->arg, RCX, at, size);
            load_x(e, a->arg, a->t, at, 0);
            if (a->t2 != a->t)
                mov(e, 1, a->t2, RCX);
        } else {
            load_x(e, a->arg, a->t2, at, size);
            load_x(e, a->arg, a->t, at, 0);
        }
        break;
    case PAIR | STORES:
        store_x(e, a->arg, a->t, at, 0);
        store_x(e, a->arg, a->t2, at, size);
        break;
    case VECTOR: load_register(e, a->arg, u->rd, at, 0); break;
    case VECTOR | STORES: store_v(e, a->arg, u->rd, at, 0); break;
    case VECTOR | PAIR:
        if (e->in_cold || u->rd == u->ra) {
            load_v(e, a->arg, 0, at, 0);
            load_v(e, a->arg, 1, at, size);
            v_store(e, 0, u->rd);
            v_store(e, 1, u->ra);
        } else {
            unsigned first = v_target(e, u->rd), second = v_target(e, u->ra);
            load_v(e, a->arg, first, at, 0);
            load_v(e, a->arg, second, at, size);
            v_set(e, first, u->rd);
            v_set(e, second, u->ra);
        }
        break;
    default:
        store_v(e, a->arg, u->rd, at, 0);
        store_v(e, a->arg, u->ra, at, size);
    }
}

static unsigned total_size(uint32_t arg) { return (arg & PAIR ? 2u : 1u) << (arg & 7); }

/* With a lookup of its own. */
static void checked_access(struct emit *e, const struct uop *u, const struct transfer *a, struct outlined *o) {
    unsigned va = address(e, u, a->arg, (struct operands){a->n, a->m}, o);
    bool unprivileged = (a->arg >> MODE & 7) == M_UNPRIVILEGED;
    move(e, u, a, translate(e, o, va, total_size(a->arg), a->arg & STORES, unprivileged));
}

void emit_checked_access(struct emit *e, struct outlined *o) {
    if (o->transfer.finds) /* what it found is not for the others */
        mov_imm(e, o->transfer.scratch, 0);
    const struct uop *u = o->u;
    struct outlined *slow = slow_call(e, u);
    slow->after = o->after;
    slow->back = o->back;
    checked_access(e, u, &o->transfer, slow);
    if (writes_back(o->transfer.arg))
        lea(e, 1, o->transfer.n, o->transfer.n, (int32_t)u->imm);
    v_restore(e, o, false);
    point(jmp(e), o->back);
}

/* ---- Groups ------------------------------------------------------------------------------------------------------ */

enum { SPAN_MAX = 256 };

static bool by_base(const struct emitter *by);
static bool by_index(const struct emitter *by);
static bool same_address(const struct emit *e, uint32_t one, uint32_t other);
static void emit_access(struct emit *e, const struct uop *u, uint32_t arg);

/*
 * What registers hold is followed as far as it is another register's value at the start (or at its latest change) plus
 * a constant: `root` names that value. Accesses from one root are near one another. Of ADRPs to one page the value is one.
 */
void plan_accesses(struct emit *e) {
    uint8_t root[R_COUNT] = {0}, roots = 0, newest[TRACE_MAX + 1];
    int32_t distance[R_COUNT], start[TRACE_MAX];
    unsigned members[TRACE_MAX], pages = 0;
    struct { uint64_t imm; uint8_t root; } page[TRACE_MAX];
    unsigned indexed = NO_GROUP; /* the last access of a base and an index, while neither has changed */
    for (uint32_t i = 0; i < e->block->count; i++) {
        const struct uop *u = &e->block->uops[i];
        const struct emitter *by = e->by[i];
        uint8_t from = NO_GUEST, new_root = 0;
        int32_t constant = 0;
        e->group_of[i] = NO_GROUP;
        if (!by || (by->emit == emit_access && loads_base(u, by->arg, by->arg & PAIR))) { /* a call: no scratch survives */
            memset(root, 0, sizeof root);
            pages = 0;
            indexed = NO_GROUP;
            continue;
        }
        if (by_base(by)) {
            if (!root[u->rn]) {
                root[u->rn] = ++roots;
                distance[u->rn] = 0;
                newest[roots] = NO_GROUP;
            }
            unsigned mode = by->arg >> MODE & 7, g = newest[root[u->rn]];
            int32_t low = distance[u->rn] + (mode == M_POST ? 0 : (int32_t)u->imm);
            int32_t high = low + (int32_t)total_size(by->arg);
            if (g != NO_GROUP) {
                struct group *group = &e->groups[g];
                int32_t lowest = low < group->low ? low : group->low;
                int32_t highest = high > group->low + group->span ? high : group->low + group->span;
                if (highest - lowest <= SPAN_MAX) {
                    group->write |= by->arg & STORES;
                    group->low = lowest;
                    group->span = highest - lowest;
                    group->last = (uint8_t)i;
                    members[g]++;
                } else {
                    g = NO_GROUP;
                }
            }
            if (g == NO_GROUP) {
                g = i;
                e->groups[g] = (struct group){.first = (uint8_t)i, .last = (uint8_t)i, .write = by->arg & STORES,
                                              .low = low, .span = high - low};
                start[g] = distance[u->rn];
                members[g] = 1;
                newest[root[u->rn]] = (uint8_t)g;
            }
            e->group_of[i] = (uint8_t)g;
            e->sp_aligned[i] = g != i && e->block->uops[g].aux && !((distance[u->rn] - start[g]) & 15);
            if (mode != M_IMM) {
                from = u->rn;
                new_root = root[from];
                constant = distance[from] + (int32_t)u->imm;
            }
        } else if (adds_constant(by, u, &from, &constant) && root[from]) {
            new_root = root[from];
            constant += distance[from];
            from = u->rd;
        } else if (makes_address(by)) {
            unsigned p = 0;
            while (p < pages && page[p].imm != u->imm)
                p++;
            if (p == pages) {
                page[pages].imm = u->imm;
                page[pages++].root = ++roots;
                newest[roots] = NO_GROUP;
            }
            new_root = page[p].root;
            constant = 0;
            from = u->rd;
        } else {
            from = NO_GUEST;
        }
        if (by_index(by)) {
            int32_t size = (int32_t)total_size(by->arg);
            if (indexed != NO_GROUP && same_address(e, indexed, i)) {
                struct group *group = &e->groups[indexed];
                group->write |= by->arg & STORES;
                group->span = size > group->span ? size : group->span;
                group->last = (uint8_t)i;
                members[indexed]++;
            } else {
                indexed = i;
                e->groups[i] = (struct group){.first = (uint8_t)i, .last = (uint8_t)i, .write = by->arg & STORES,
                                              .span = size};
                start[i] = 0;
                members[i] = 1;
            }
            e->group_of[i] = (uint8_t)indexed;
        }
        if (indexed != NO_GROUP) {
            const struct uop *first = &e->block->uops[indexed];
            if (e->writes[i] >> first->rn & 1 || e->writes[i] >> first->rm & 1)
                indexed = NO_GROUP;
        }
        for (uint64_t written = e->writes[i]; written; written &= written - 1)
            root[__builtin_ctzll(written)] = 0;
        if (from != NO_GUEST && from < R_ZR && constant > -(1 << 20) && constant < 1 << 20) {
            root[from] = new_root;
            distance[from] = constant;
        }
    }
    bool taken[SCRATCH_COUNT] = {false};
    for (uint32_t i = 0; i < e->block->count; i++) {
        unsigned g = e->group_of[i];
        if (g == NO_GROUP)
            continue;
        struct group *group = &e->groups[g];
        if (i == group->first) {
            group->low -= start[g];
            for (unsigned s = 0; s < SCRATCH_COUNT && members[g] > 1 && !group->scratch; s++) {
                if (!taken[s]) {
                    taken[s] = true;
                    group->scratch = (uint8_t)(R_SCRATCH + s);
                }
            }
        }
        if (i == group->last && group->scratch)
            taken[group->scratch - R_SCRATCH] = false;
    }
}

/* By the group's addend: found here, or by another before. */
static void grouped_access(struct emit *e, const struct uop *u, struct transfer *a, const struct group *group) {
    a->finds = e->index == group->first;
    a->scratch = (uint8_t)(a->finds ? def(e, group->scratch) : use(e, group->scratch));
    struct outlined *o = outline(e, u, CHECKED_ACCESS);
    o->transfer = *a;
    bool indexed = a->m != NO_REG;
    unsigned va = indexed ? address(e, u, a->arg, (struct operands){a->n, a->m}, o) : a->n;
    if (u->aux && !indexed && !e->sp_aligned[e->index]) {
        test_imm(e, a->n, 15);
        also_from(o, jcc(e, NE));
    }
    if (a->finds) {
        if (group->low)
            lea(e, 1, va = RAX, a->n, group->low);
        look_up(e, o, a->scratch, va, (unsigned)group->span, group->write, AT(bank));
    } else {
        test(e, 1, a->scratch, a->scratch);
        also_from(o, jcc(e, E));
    }
    int32_t disp = indexed || (a->arg >> MODE & 7) == M_POST ? 0 : (int32_t)u->imm;
    move(e, u, a, (struct place){indexed ? va : a->n, a->scratch, disp});
}

static void emit_access(struct emit *e, const struct uop *u, uint32_t arg) {
    if (loads_base(u, arg, arg & PAIR)) {
        call_op(e, u, false);
        return;
    }
    if (arg & VECTOR)
        check_fp(e, u);
    struct operands at = operands(e, u, arg);
    struct transfer a = {arg, (uint8_t)at.n, (uint8_t)at.m, NO_REG, NO_REG, NO_REG, false};
    if (!(arg & VECTOR)) {
        a.t = (uint8_t)(arg & STORES ? use(e, u->rd) : reserve(e, u->rd));
        if (arg & PAIR)
            a.t2 = (uint8_t)(arg & STORES ? use(e, u->ra) : reserve(e, u->ra));
    }
    const struct group *group = e->group_of[e->index] == NO_GROUP ? NULL : &e->groups[e->group_of[e->index]];
    if (group && !group->scratch)
        group = NULL;
    struct outlined *o;
    if (group) {
        grouped_access(e, u, &a, group);
        o = &e->outlined[e->outlined_count - 1];
    } else {
        o = slow_call(e, u);
        checked_access(e, u, &a, o);
    }
    if (!(arg & (VECTOR | STORES))) {
        dirty(e, u->rd);
        if (arg & PAIR)
            dirty(e, u->ra);
    }
    write_back(e, u, arg, at);
    if (group && e->index == group->last)
        forget(e, group->scratch);
    comes_back(e, o);
}

/* LD1, ST1 of whole registers: memory in a row, see form_structure() for what the uop holds. */
static void emit_multiple(struct emit *e, const struct uop *u, uint32_t arg) {
    unsigned count = u->ra & 7, size = u->ra >> 5 & 1 ? 4 : 3;
    check_fp(e, u);
    unsigned n = use(e, u->rn), m = u->rm == R_ZR ? NO_REG : use(e, u->rm);
    struct outlined *o = slow_call(e, u);
    unsigned va = address(e, u, M_BASE << MODE, (struct operands){n, NO_REG}, o);
    struct place at = translate(e, o, va, count << size, arg & STORES, false);
    for (unsigned k = 0; k < count; k++) {
        unsigned v = (u->rd + k) & 31;
        if (arg & STORES)
            store_v(e, size, v, at, k << size);
        else
            load_register(e, size, v, at, k << size);
    }
    if (m != NO_REG)
        alu(e, 1, ADD, n, m);
    else if (u->imm)
        lea(e, 1, n, n, (int32_t)u->imm);
    if (m != NO_REG || u->imm)
        dirty(e, u->rn);
    comes_back(e, o);
}

static bool by_base(const struct emitter *by) {
    unsigned mode = by->arg >> MODE & 7;
    return by->emit == emit_access && (mode == M_IMM || mode == M_PRE || mode == M_POST);
}

/* DC ZVA: a kernel clears each page by it. Where EL0 may not, which nobody asks for, it is the op's. */
static void emit_zero(struct emit *e, const struct uop *u, uint32_t arg) {
    unsigned n = use(e, u->rn);
    struct outlined *o = slow_call(e, u);
    op_rm(e, 0, 0xf7, 0, CPU, AT(sys.sctlr)); /* TEST */
    word32(e, SCTLR_DZE);
    also_from(o, jcc(e, E));
    mov(e, 1, RAX, n);
    alu_imm(e, 1, AND, RAX, -ZVA_SIZE);
    struct place at = translate(e, o, RAX, 1, true, false); /* all of it is in one page */
    xx(e, 0x0f57, 0, 0); /* XORPS */
    for (unsigned k = 0; k < ZVA_SIZE; k += 16)
        op_at(e, 0, MOVUPS_STORE, 0, at, k);
    comes_back(e, o);
}

static bool by_index(const struct emitter *by) {
    unsigned mode = by->arg >> MODE & 7;
    return by->emit == emit_access && (mode == M_LSL || mode == M_UXTW || mode == M_SXTW);
}

/* Of two accesses of a base and an index. */
static bool same_address(const struct emit *e, uint32_t one, uint32_t other) {
    const struct uop *u = &e->block->uops[one], *v = &e->block->uops[other];
    return u->rn == v->rn && u->rm == v->rm && u->imm == v->imm && !((e->by[one]->arg ^ e->by[other]->arg) >> MODE & 7);
}

static void emit_literal(struct emit *e, const struct uop *u, uint32_t arg) {
    struct transfer a = {.arg = arg, .t = NO_REG};
    if (arg & VECTOR)
        check_fp(e, u);
    else
        a.t = (uint8_t)reserve(e, u->rd);
    struct outlined *o = slow_call(e, u);
    lea(e, 1, RAX, PAGE, pc_base(e, u) + (int32_t)u->imm);
    move(e, u, &a, translate(e, o, RAX, 1u << (arg & 7), false, false));
    if (!(arg & VECTOR))
        dirty(e, u->rd);
    comes_back(e, o);
}

/* ---- Atomics: the host's are stronger than any of Arm's orders --------------------------------------------------- */

static struct place atomic_address(struct emit *e, const struct uop *u, unsigned n, unsigned size, struct outlined *o) {
    uint32_t arg = size | STORES | ALIGNED | M_BASE << MODE;
    unsigned va = address(e, u, arg, (struct operands){n, NO_REG}, o);
    return translate(e, o, va, 1u << size, true, false);
}

/* arg: log2 of the size, 2 or 3. */
static void emit_cas(struct emit *e, const struct uop *u, uint32_t arg) {
    unsigned w = arg == 3, n = use(e, u->rn), t = use(e, u->rd), m = use(e, u->rm), d = reserve(e, u->ra);
    struct outlined *o = slow_call(e, u);
    struct place at = atomic_address(e, u, n, arg, o);
    mov(e, w, RAX, m);
    byte(e, 0xf0);
    op_at(e, w, 0x0fb1, t, at, 0);
    if (u->ra != R_SINK) {
        mov(e, w, d, RAX);
        dirty(e, u->ra);
    }
    comes_back(e, o);
}

enum { A_SWP, A_ADD, A_CLR, A_EOR, A_SET };
enum { OPERATION = 3 }; /* above the size in arg */
static void emit_fetch(struct emit *e, const struct uop *u, uint32_t arg) {
    unsigned size = arg & 7, w = size == 3, what = arg >> OPERATION;
    if (what > A_ADD && u->rd != R_SINK) { /* the host does not tell what was there */
        call_kept(e, u);
        return;
    }
    unsigned n = use(e, u->rn), m = use(e, u->rm), d = reserve(e, u->rd);
    struct outlined *o = slow_call(e, u);
    struct place at = atomic_address(e, u, n, size, o);
    mov(e, 1, RCX, m);
    if (what == A_CLR)
        op_rr(e, 1, 0xf7, 2, RCX);
    if (what != A_SWP)
        byte(e, 0xf0);
    switch (what) {
    case A_SWP: op_at(e, w, 0x87, RCX, at, 0); break;
    case A_ADD: op_at(e, w, 0x0fc1, RCX, at, 0); break;
    case A_EOR: op_at(e, w, 8 * XOR + 1, RCX, at, 0); break;
    case A_SET: op_at(e, w, 8 * OR + 1, RCX, at, 0); break;
    default: op_at(e, w, 8 * AND + 1, RCX, at, 0);
    }
    if (u->rd != R_SINK) {
        mov(e, w, d, RCX);
        dirty(e, u->rd);
    }
    comes_back(e, o);
}

static void emit_nothing(struct emit *e, const struct uop *u, uint32_t arg) {}

/* ---- The table --------------------------------------------------------------------------------------------------- */

#define EFFECTS(arg) (TRAPS | ((arg) & (STORES | VECTOR) ? NO_RD : (arg) & PAIR ? AND_RA : 0))
#define ACCESS(name, mode, arg) {p_##name, emit_access, (arg) | (mode) << MODE, EFFECTS(arg)}
#define WRITING_BACK(name, mode, arg) {p_##name, emit_access, (arg) | (mode) << MODE, EFFECTS(arg) | AND_RN}
#define MODES(name, arg)                                                                                               \
    ACCESS(name##_imm, M_IMM, arg), WRITING_BACK(name##_pre, M_PRE, arg), WRITING_BACK(name##_post, M_POST, arg)
#define INDEXED(name, arg)                                                                                             \
    MODES(name, arg), ACCESS(name##_lsl, M_LSL, arg), ACCESS(name##_uxtw, M_UXTW, arg), ACCESS(name##_sxtw, M_SXTW, arg)
#define GENERAL(name, arg) INDEXED(name, arg), ACCESS(name##_unpriv, M_UNPRIVILEGED, arg)
#define VECTORS(letter, size) INDEXED(ldr_##letter, (size) | VECTOR), INDEXED(str_##letter, (size) | VECTOR | STORES)
#define VECTOR_PAIRS(letter, size)                                                                                     \
    MODES(ldp_##letter, (size) | VECTOR | PAIR), MODES(stp_##letter, (size) | VECTOR | PAIR | STORES)
#define FETCH(name, what)                                                                                              \
    {p_##name##32, emit_fetch, 2 | (what) << OPERATION, TRAPS},                                                        \
        {p_##name##64, emit_fetch, 3 | (what) << OPERATION, TRAPS}
#define KEPT(name, effects) {p_##name, emit_kept, 0, TRAPS | (effects)}
#define ORDERED(width, size)                                                                                           \
    ACCESS(ldar##width, M_BASE, (size) | ALIGNED), ACCESS(stlr##width, M_BASE, (size) | STORES | ALIGNED | FENCED)

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
    MODES(ldp32, 2 | PAIR),
    MODES(ldp64, 3 | PAIR),
    MODES(ldpsw, 2 | SIGNED | WIDE | PAIR),
    MODES(stp32, 2 | STORES | PAIR),
    MODES(stp64, 3 | STORES | PAIR),
    VECTORS(b, 0),
    VECTORS(h, 1),
    VECTORS(s, 2),
    VECTORS(d, 3),
    VECTORS(q, 4),
    VECTOR_PAIRS(s, 2),
    VECTOR_PAIRS(d, 3),
    VECTOR_PAIRS(q, 4),
    {p_ld1_multiple, emit_multiple, 0, TRAPS | NO_RD | AND_RN},
    {p_st1_multiple, emit_multiple, STORES, TRAPS | NO_RD | AND_RN},
    {p_ldr_s_literal, emit_literal, 2 | VECTOR, TRAPS | NO_RD},
    {p_ldr_d_literal, emit_literal, 3 | VECTOR, TRAPS | NO_RD},
    {p_ldr_q_literal, emit_literal, 4 | VECTOR, TRAPS | NO_RD},
    {p_prfm, emit_nothing, 0, KEEPS | NO_RD},
    {p_dc_zva, emit_zero, 0, TRAPS | NO_RD},
    {p_cas32, emit_cas, 2, TRAPS | NO_RD | AND_RA},
    {p_cas64, emit_cas, 3, TRAPS | NO_RD | AND_RA},
    FETCH(swp, A_SWP),
    FETCH(ldadd, A_ADD),
    FETCH(ldclr, A_CLR),
    FETCH(ldeor, A_EOR),
    FETCH(ldset, A_SET),
    KEPT(ldxr8, 0),
    KEPT(ldxr16, 0),
    KEPT(ldxr32, 0),
    KEPT(ldxr64, 0),
    KEPT(stxr8, NO_RD | AND_RM),
    KEPT(stxr16, NO_RD | AND_RM),
    KEPT(stxr32, NO_RD | AND_RM),
    KEPT(stxr64, NO_RD | AND_RM),
    {NULL, NULL, 0, 0},
};

#endif
