/* The x86-64 back end: code memory, the stubs all blocks share, and how a block is left, linked and slowed down. */
#define _GNU_SOURCE
#include "jit_x64.h"

#ifdef JIT_X64

#include <cpuid.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__linux__) && !defined(MADV_COLLAPSE) /* C libraries learned of it in 2023 */
#define MADV_COLLAPSE 25
#endif

enum { CODE_SIZE = 64 << 20, TRACE_BYTES = 32 << 10, STUBS_BYTES = 4 << 10, ROWS_MAX = 2048, HUGE = 2 << 20 };

/* The same memory twice: no page is ever both writable and executable at one address. */
struct jit {
    uint8_t *room; /* where both are, each from a huge page's address on */
    uint8_t *write;
    const uint8_t *exec;
    size_t limit;            /* bytes */
    size_t stubs, used;      /* from the start: what survives flushes, and then what is run */
    size_t cold, cold_used;  /* further up: from where and to where slow paths are, out of the way of the rest */
    uint32_t huge;           /* which of its huge pages has been asked for, a bit each */
    int32_t threshold;
    /* As written, not as run: point() takes distances. */
    const uint8_t *enter, *lookup, *lookup_far, *link, *dropped;
    const uint8_t *call, *call_flags, *slow, *slow_flags, *pure;
};

static const struct emitter *emitter_of[ROWS_MAX];
static bool (*plain_of[ROWS_MAX])(struct vcpu *, const struct uop *);
static bool sha; /* compilers cannot name that in __builtin_cpu_supports() yet */

bool host_has_sha(void) { return sha; }

/* Where leave_far() has what is patched, from its first instruction on. */
enum { FAR_GEN = 2, FAR_PC = 25, FAR_OFFSET = 45, FAR_JUMP = 50 };
#define NOT_LINKED (~UINT64_C(0))
/* A link made in another address space is followed by looking its target up; one in so many is made anew instead. */
enum { STALE_LINKS = 64 };

/* ---- Guest registers in host registers --------------------------------------------------------------------------- */

static const uint8_t pool[] = {RBX, R12, R13, RSI, RDI, R8, R9, R10, R11};
enum { POOL = sizeof pool, CALLER_SAVED = 1 << RSI | 1 << RDI | 1 << R8 | 1 << R9 | 1 << R10 | 1 << R11 };

static void no_regs(struct regs *regs) {
    memset(regs->guest, NO_GUEST, sizeof regs->guest);
    memset(regs->host, NO_REG, sizeof regs->host);
    memset(regs->vector, NO_GUEST, sizeof regs->vector);
    regs->dirty = 0;
}

static void drop(struct regs *regs, unsigned h) {
    if (regs->guest[h] == NO_GUEST)
        return;
    regs->host[regs->guest[h]] = NO_REG;
    regs->guest[h] = NO_GUEST;
    regs->dirty &= (uint16_t) ~(1u << h);
}

/* Of these host registers the one whose guest register is named last from here on, or not at all. */
static unsigned named_last(const struct emit *e, uint32_t among) {
    const struct block *block = e->block;
    for (uint32_t i = e->index + 1, end = e->header ? block->count + e->index : block->count; i < end; i++) {
        uint32_t at = i < block->count ? i : i - block->count;
        const struct uop *u = &block->uops[at];
        unsigned group = e->group_of[at];
        const uint8_t names[] = {u->rd, u->rn, u->rm, u->ra, group == NO_GROUP ? R_SINK : e->groups[group].scratch};
        for (unsigned k = 0; k < sizeof names; k++) {
            uint32_t rest = names[k] < R_ALL && e->regs.host[names[k]] != NO_REG
                                ? among & ~(1u << e->regs.host[names[k]]) : among;
            if (!rest)
                return (unsigned)__builtin_ctz(among);
            among = rest;
        }
    }
    uint32_t clean = among & ~(uint32_t)e->regs.dirty;
    return (unsigned)__builtin_ctz(clean ? clean : among);
}

static unsigned allocate(struct emit *e, unsigned guest) {
    unsigned h = NO_REG;
    uint32_t others = 0;
    for (unsigned i = 0; i < POOL && h == NO_REG; i++) {
        if (e->regs.guest[pool[i]] == NO_GUEST)
            h = pool[i];
        else if (e->stamp[pool[i]] != e->now)
            others |= 1u << pool[i];
    }
    if (h == NO_REG) {
        uint32_t clean = others & ~(uint32_t)e->regs.dirty;
        h = named_last(e, e->header && clean ? clean : others);
    }
    if (e->regs.dirty >> h & 1)
        store(e, 1, h, CPU, X_AT(e->regs.guest[h]));
    if (e->regs.guest[h] != NO_GUEST)
        e->short_of_regs = true;
    drop(&e->regs, h);
    e->regs.guest[h] = (uint8_t)guest;
    e->regs.host[guest] = (uint8_t)h;
    e->stamp[h] = e->now;
    return h;
}

unsigned reserve(struct emit *e, unsigned guest) {
    if (guest == R_SINK)
        return RDX;
    unsigned h = e->regs.host[guest];
    if (h == NO_REG)
        return allocate(e, guest);
    e->stamp[h] = e->now;
    return h;
}

void dirty(struct emit *e, unsigned guest) {
    if (guest != R_SINK)
        e->regs.dirty |= (uint16_t)(1u << e->regs.host[guest]);
}

void forget(struct emit *e, unsigned guest) {
    if (e->regs.host[guest] != NO_REG)
        drop(&e->regs, e->regs.host[guest]);
}

unsigned use(struct emit *e, unsigned guest) {
    bool there = e->regs.host[guest] != NO_REG;
    unsigned h = reserve(e, guest);
    if (!there && !e->short_of_regs)
        e->early |= UINT64_C(1) << guest;
    if (!there)
        load(e, 1, h, CPU, X_AT(guest));
    return h;
}

unsigned def(struct emit *e, unsigned guest) {
    unsigned h = reserve(e, guest);
    dirty(e, guest);
    return h;
}

unsigned use_def(struct emit *e, unsigned guest) {
    if (guest == R_SINK) /* its old value is nobody's */
        return RDX;
    unsigned h = use(e, guest);
    dirty(e, guest);
    return h;
}

/* All but scratch registers, which are good for this block only. */
static void spill(struct emit *e, const struct regs *regs) {
    for (unsigned i = 0; i < POOL; i++)
        if (regs->dirty >> pool[i] & 1 && regs->guest[pool[i]] < R_COUNT)
            store(e, 1, pool[i], CPU, X_AT(regs->guest[pool[i]]));
}

/* ---- NZCV -------------------------------------------------------------------------------------------------------- */

/* nzcv = FLAGS, through EAX. The products of the raw bits meet nowhere in bits 31:28 (nor do their carries). */
static void flags_to_memory(struct emit *e) {
    mov(e, 0, RAX, FLAGS);
    alu_imm(e, 0, AND, RAX, RAW_N | RAW_Z | RAW_NOT_C | RAW_V);
    op_rr(e, 0, 0x69, RAX, RAX);
    word32(e, 1u << 16 | 1u << 21 | 1u << 28);
    alu_imm(e, 0, AND, RAX, (int32_t)0xf0000000);
    alu_imm(e, 0, XOR, RAX, 1 << 29);
    store(e, 0, RAX, CPU, AT(nzcv));
}

/* FLAGS = nzcv; no other register changes. */
static void flags_from_memory(struct emit *e) {
    load(e, 0, FLAGS, CPU, AT(nzcv));
    shift(e, 0, SHR, FLAGS, 28);
    op_rr(e, 0, 0x69, FLAGS, FLAGS);
    word32(e, 1u << 12 | 1u << 7 | 1u);
    alu_imm(e, 0, AND, FLAGS, RAW_N | RAW_Z | RAW_NOT_C | RAW_V);
    alu_imm(e, 0, XOR, FLAGS, RAW_NOT_C);
}

static void flags_to_reg(struct emit *e) {
    byte(e, 0x9f); /* LAHF */
    op_rr(e, 0, 0x0f90 | O, 0, RAX);
    mov(e, 0, FLAGS, RAX);
}

/* reg op= guest register */
static void with_guest(struct emit *e, unsigned w, uint32_t op, unsigned reg, unsigned guest) {
    if (e->regs.host[guest] != NO_REG)
        op_rr(e, w, op, reg, e->regs.host[guest]);
    else
        op_rm(e, w, op, reg, CPU, X_AT(guest));
}

/* Puts NZCV into the host's flags, by the operation that had set them. */
static void flags_again(struct emit *e) {
    const struct again_by *a = &e->regs.again;
    unsigned n = e->regs.host[a->n], w = a->wide;
    bool sub = a->kind == UNDO_SUB_REG;
    if (n == NO_REG && a->kind < ADD_REG) {
        load(e, 1, RAX, CPU, X_AT(a->n));
        n = RAX;
    }
    switch (a->kind) {
    case CMP_REG: with_guest(e, w, 8 * CMP + 3, n, a->m); break;
    case TEST_REG: with_guest(e, w, 0x85, n, a->m); break;
    case CMP_IMM: alu_imm(e, w, CMP, n, a->imm); break;
    case TEST_IMM: test_imm_w(e, w, n, a->imm); break;
    case UNDO_SUB_IMM:
        lea(e, w, RAX, n, a->imm);
        alu_imm(e, w, CMP, RAX, a->imm);
        break;
    case UNDO_ADD_IMM:
        lea(e, w, RAX, n, -a->imm);
        alu_imm(e, w, ADD, RAX, a->imm);
        break;
    case ADD_IMM:
        mov(e, 1, RAX, n);
        alu_imm(e, w, ADD, RAX, a->imm);
        break;
    default: /* of two registers, neither to be changed */
        with_guest(e, 1, 0x8b, RAX, a->n);
        if (a->kind != ADD_REG)
            with_guest(e, w, 8 * (sub ? ADD : SUB) + 3, RAX, a->m);
        with_guest(e, w, 8 * (sub ? CMP : ADD) + 3, RAX, a->m);
    }
    if (a->kind == TEST_REG || a->kind == TEST_IMM)
        stc(e); /* C is 0 */
    else if (a->kind == ADD_IMM || a->kind == UNDO_ADD_IMM || a->kind == ADD_REG || a->kind == UNDO_ADD_REG)
        cmc(e);
    e->host_flags = true;
}

void need_flags(struct emit *e) {
    if (!(e->regs.flags & FLAGS_IN_REG)) {
        if (e->regs.flags & FLAGS_AGAIN) {
            if (!e->host_flags)
                flags_again(e);
            flags_to_reg(e);
        } else {
            flags_from_memory(e);
            e->host_flags = false;
        }
    }
    e->regs.flags |= FLAGS_IN_REG;
}

void keep_flags(struct emit *e, struct again_by again) {
    e->host_flags = e->flags_live;
    if (!e->flags_live)
        return;
    if (again.kind == AGAIN_NEVER) {
        flags_to_reg(e);
        e->regs.flags = FLAGS_IN_REG;
    } else {
        e->regs.again = again;
        e->regs.flags = FLAGS_AGAIN;
    }
}

unsigned condition(struct emit *e, unsigned arm) {
    static const uint8_t conditions[14] = {E, NE, AE, B, S, NS, O, NO, A, BE, GE, L, G, LE};
    if (!e->host_flags && e->regs.flags & FLAGS_AGAIN) {
        flags_again(e);
    } else if (!e->host_flags) {
        need_flags(e);
        mov(e, 0, RAX, FLAGS);
        byte(e, 0x04), byte(e, 0x7f); /* ADD AL, 127 overflows when V is set */
        byte(e, 0x9e);                /* SAHF */
        e->host_flags = true;
    }
    return conditions[arm];
}

/* ---- Ways out of a block's straight line ------------------------------------------------------------------------- */

static void jump_to(struct emit *e, const uint8_t *stub) { point(jmp(e), stub); }
static void call_stub(struct emit *e, const uint8_t *stub) {
    byte(e, 0xe8);
    word32(e, 0);
    point(e->p - 4, stub);
}

static void count(struct emit *e, const struct uop *u) { alu_mem_imm(e, SUB, CPU, AT(budget), u->off / 4 + 1); }

/* After count(), or a compare of the budget: the fields of jumps that are taken when the vCPU is to look up first. */
static void look_up_first(struct emit *e, uint8_t *stop[2]) {
    stop[0] = jcc(e, LE);
    op_rm(e, 0, 0xf6, 0, CPU, AT(poll));
    byte(e, POLL_NOW);
    stop[1] = jcc(e, NE);
}

/*
 * To the VA in RAX, of another page or by a register, the way out is a jump as well, good as long as it goes to the VA
 * it was linked to, at that EL, and nothing was dropped from what is known of code there: then the jump cache would
 * still give the same answer. The constants are patched together with the jump.
 */
static void leave_far(struct emit *e, uint8_t *stop[2]) {
    uint8_t *site = e->p;
    opcode(e, 1, 0xb8 | RCX, 0, 0, RCX);
    word64(e, NOT_LINKED);
    op_rm(e, 1, 0x3b, RCX, CPU, AT(link_now));
    uint8_t *other = jcc(e, NE);
    opcode(e, 1, 0xb8 | RCX, 0, 0, RCX);
    word64(e, 0);
    alu(e, 1, CMP, RCX, RAX);
    point(jcc(e, NE), e->jit->lookup); /* it goes to several: once linked, to the first */
    opcode(e, 1, 0x8d, PAGE, 0, RCX);  /* LEA PAGE, [RCX - ...] */
    byte(e, 0x80 | (PAGE & 7) << 3 | RCX);
    word32(e, 0);
    if (jmp(e) - site != FAR_JUMP)
        __builtin_trap();
    here(e, other);
    if (stop[0])
        here(e, stop[0]), here(e, stop[1]);
    opcode(e, 1, 0x8d, RSI, 0, 0); /* LEA RSI, [RIP + ...] */
    byte(e, RSI << 3 | 5);
    word32(e, (uint32_t)(site - (e->p + 4)));
    jump_to(e, e->jit->lookup_far);
}

/* NZCV is in FLAGS. */
void leave_by_register(struct emit *e, const struct uop *u) {
    uint8_t *stop[2];
    spill(e, &e->regs);
    count(e, u);
    look_up_first(e, stop);
    leave_far(e, stop);
}

/* Round a loop guest registers stay where they are, as far as the header agrees; what it takes for clean is stored. */
static void leave_to_header(struct emit *e, const struct uop *u) {
    uint8_t *stop[2];
    need_flags(e);
    count(e, u);
    look_up_first(e, stop);
    for (unsigned i = 0; i < POOL; i++) {
        unsigned h = pool[i];
        bool kept = e->back.guest[h] == e->regs.guest[h] && e->back.dirty >> h & 1;
        if (e->regs.dirty >> h & 1 && !kept && e->regs.guest[h] < R_COUNT)
            store(e, 1, h, CPU, X_AT(e->regs.guest[h]));
    }
    for (unsigned i = 0; i < POOL; i++) {
        unsigned h = pool[i];
        if (e->back.guest[h] != NO_GUEST && e->back.guest[h] != e->regs.guest[h])
            load(e, 1, h, CPU, X_AT(e->back.guest[h]));
    }
    jump_to(e, e->header);
    here(e, stop[0]), here(e, stop[1]);
    spill(e, &e->regs);
    lea(e, 1, RAX, PAGE, e->page_offset);
    jump_to(e, e->jit->lookup);
}

/*
 * Within the page the way out is a jump, pointed at its target when that is compiled: both are code of the same
 * physical page, are dropped together, and PAGE stays right. Backwards, it looks at the budget and requests.
 */
void leave_to(struct emit *e, const struct uop *u, int32_t target) {
    if (target == e->page_offset) {
        if (e->header) {
            leave_to_header(e, u);
            return;
        }
        e->loops = true;
        e->back = e->regs;
    }
    bool far = target < 0 || target >= PAGE_SIZE;
    need_flags(e);
    spill(e, &e->regs);
    if (far)
        lea(e, 1, RAX, PAGE, target);
    count(e, u);
    uint8_t *stop[2] = {NULL, NULL};
    if (target <= page_offset(e, u) || e->index > e->went_back)
        look_up_first(e, stop);
    if (far) {
        leave_far(e, stop);
        return;
    }
    here(e, jmp(e));
    if (stop[0])
        here(e, stop[0]), here(e, stop[1]);
    mov_imm(e, RAX, (uint32_t)target);
    call_stub(e, e->jit->link);
}
enum { LINK_BACK = 14 }; /* from the address that call pushes back to the jump's field */

/* NZCV is in FLAGS, or is not computed anew. */
void leave_to_rax(struct emit *e, const struct uop *u) {
    spill(e, &e->regs);
    if (!(e->regs.flags & FLAGS_IN_REG))
        flags_from_memory(e);
    count(e, u);
    jump_to(e, e->jit->lookup);
}

/* Where in the arena compiled code finds it. */
static uint32_t keep(struct emit *e, const struct uop *u) {
    uint8_t *as = &e->kept_as[u - e->block->uops];
    if (!*as) {
        e->kept[e->kept_count] = *u;
        *as = ++e->kept_count;
    }
    return (uint32_t)((const uint8_t *)&e->kept[*as - 1] - code_arena(e->vcpu));
}

static void emit_call(struct emit *e, const struct uop *u) {
    if (!(e->regs.flags & FLAGS_IN_MEM))
        need_flags(e);
    mov_imm(e, RSI, keep(e, u));
    mov_imm(e, RCX, (uint64_t)(int64_t)pc_base(e, u));
    call_stub(e, e->regs.flags & FLAGS_IN_MEM ? e->jit->call : e->jit->call_flags);
    e->regs.flags |= FLAGS_IN_MEM;
}

void call_op(struct emit *e, const struct uop *u, bool ends) {
    spill(e, &e->regs);
    emit_call(e, u);
    no_regs(&e->regs);
    v_renumber(e);
    e->regs.flags = FLAGS_IN_MEM;
    e->host_flags = false;
    if (ends) {
        lea(e, 1, RAX, PAGE, page_offset(e, u) + 4);
        leave_to_rax(e, u);
        e->ended = true;
    }
}

/*
 * The slow path of an instruction in line: its op is called, by slow_call_op(), which this tells all. It lies in the
 * code, behind the call, at any address.
 */
struct __attribute__((packed)) slow {
    uint32_t uop;    /* where in the arena */
    int32_t back;    /* from here to where it goes on */
    int32_t pc_base; /* from PAGE */
    uint8_t before[POOL], after[POOL]; /* guest registers to be written to x[] first, to be read from there after */
    uint8_t ran;                       /* instructions of the block when it does not go on */
};
_Static_assert(offsetof(struct slow, back) == 4, "the stub `slow` jumps by it");

static bool slow_call_op(struct vcpu *c, const struct slow *slow, uint64_t *saved, uint64_t page) {
    const struct uop *u = (const struct uop *)(code_arena(c) + slow->uop);
    uint64_t *x = c->x; /* and scratch[] */
    for (unsigned i = 0; i < POOL; i++)
        if (slow->before[i] != NO_GUEST)
            x[slow->before[i]] = saved[i];
    c->block_pc = page + (uint64_t)(int64_t)slow->pc_base;
    if (!plain_of[u->row](c, u)) {
        c->budget -= slow->ran;
        return false;
    }
    for (unsigned i = 0; i < POOL; i++)
        if (slow->after[i] != NO_GUEST)
            saved[i] = x[slow->after[i]];
    return true;
}

static void emit_slow(struct emit *e, const struct outlined *o) {
    if (!(e->regs.flags & FLAGS_IN_MEM))
        need_flags(e);
    v_save(e, &e->regs);
    call_stub(e, e->regs.flags & FLAGS_IN_MEM ? e->jit->slow : e->jit->slow_flags);
    bool more = o->sets_flags;
    for (unsigned i = 0; i < sizeof o->after.vector; i++)
        more |= o->after.vector[i] != NO_GUEST;
    struct slow slow = {
        .uop = keep(e, o->u),
        .back = (int32_t)(more ? (ptrdiff_t)sizeof slow : o->back - e->p),
        .pc_base = pc_base(e, o->u),
        .ran = (uint8_t)(o->u - e->block->uops + 1),
    };
    for (unsigned i = 0; i < POOL; i++) {
        slow.before[i] = o->before.dirty >> pool[i] & 1 ? o->before.guest[pool[i]] : NO_GUEST;
        slow.after[i] = o->after.guest[pool[i]];
    }
    memcpy(e->p, &slow, sizeof slow);
    e->p += sizeof slow;
    if (o->sets_flags)
        flags_from_memory(e);
    v_restore(e, o, true);
    if (more)
        point(jmp(e), o->back);
}

struct outlined *outline(struct emit *e, const struct uop *u, enum outlined_kind kind) {
    struct outlined *o = &e->outlined[e->outlined_count++];
    o->kind = kind;
    o->u = u;
    o->before = e->regs;
    o->host_flags = e->host_flags;
    o->sets_flags = false;
    memset(o->from, 0, sizeof o->from);
    return o;
}

struct outlined *slow_call(struct emit *e, const struct uop *u) { return outline(e, u, SLOW_CALL); }

struct outlined *last_call(struct emit *e, const struct uop *u) { return outline(e, u, LAST_CALL); }

void also_from(struct outlined *o, uint8_t *field) {
    unsigned i = 0;
    while (o->from[i])
        i++;
    o->from[i] = field;
}

void comes_back(struct emit *e, struct outlined *o) {
    o->after = e->regs;
    o->back = e->p;
}

void side_exit(struct emit *e, const struct uop *u, uint8_t *field, int32_t target) {
    struct outlined *o = outline(e, u, SIDE_EXIT);
    o->from[0] = field;
    o->target = target;
}

void check_fp(struct emit *e, const struct uop *u) {
    if (e->fp_checked)
        return;
    e->fp_checked = true;
    cmp_byte(e, AT(fp_trap), 0);
    struct outlined *o = slow_call(e, u); /* it traps, and never comes back */
    also_from(o, jcc(e, NE));
    comes_back(e, o);
}

void call_pure(struct emit *e, const struct uop *u) {
    mov_imm(e, RAX, keep(e, u));
    call_stub(e, e->jit->pure);
    v_forget_all(e);
    e->host_flags = false;
}

void call_kept(struct emit *e, const struct uop *u) {
    struct outlined *o = slow_call(e, u);
    also_from(o, jmp(e));
    v_renumber(e);
    comes_back(e, o);
}

static void emit_outlined(struct emit *e, struct outlined *o, bool cold) {
    if (cold == (o->kind == SIDE_EXIT))
        return;
    for (unsigned i = 0; i < sizeof o->from / sizeof *o->from && o->from[i]; i++)
        here(e, o->from[i]);
    e->regs = o->before;
    e->index = (uint32_t)(o->u - e->block->uops);
    e->host_flags = o->kind == SIDE_EXIT && o->host_flags;
    if (o->kind == SIDE_EXIT)
        leave_to(e, o->u, o->target);
    else if (o->kind == SLOW_CALL)
        emit_slow(e, o);
    else if (o->kind == LAST_CALL)
        call_op(e, o->u, true);
    else
        emit_checked_access(e, o);
}

/* ---- Blocks ------------------------------------------------------------------------------------------------------ */

static void plan(struct emit *e) {
    bool live = true;
    e->went_back = UINT32_MAX;
    for (uint32_t i = e->block->count; i-- > 0;) {
        const struct uop *u = &e->block->uops[i];
        const struct emitter *by = e->by[i] = emitter_of[u->row];
        uint32_t effects = by ? by->effects : USES | TRAPS;
        e->live_after[i] = live;
        if (effects & SETS)
            live = false;
        if (effects & (USES | TRAPS))
            live = true;
        e->writes[i] = !by ? ~UINT64_C(0) : effects & NO_RD ? 0 : UINT64_C(1) << u->rd;
        if (effects & AND_RA)
            e->writes[i] |= UINT64_C(1) << u->ra;
        if (effects & AND_RN)
            e->writes[i] |= UINT64_C(1) << u->rn;
        if (effects & AND_RM)
            e->writes[i] |= UINT64_C(1) << u->rm;
        if (effects & LINKS)
            e->writes[i] |= UINT64_C(1) << 30;
        if (e->at[i + 1] <= e->at[i])
            e->went_back = i;
    }
    plan_accesses(e);
}

/* Does this instruction change an operand of what would set the flags again? They are saved before, if need be. */
static bool spoils_flags(struct emit *e, uint32_t i) {
    const struct again_by *a = &e->regs.again;
    if (!(e->regs.flags & FLAGS_AGAIN) || (e->by[i] && e->by[i]->effects & SETS))
        return false;
    if (!((e->writes[i] >> a->n & 1) || (a->kind >= CMP_REG && e->writes[i] >> a->m & 1)))
        return false;
    if (!(e->regs.flags & (FLAGS_IN_REG | FLAGS_IN_MEM)) && e->live_after[i])
        need_flags(e);
    return true;
}

static void emit_trace(struct emit *e, uint8_t *code, uint8_t *cold) {
    e->p = code;
    e->cold = cold;
    e->regs = e->back;
    v_forget_all(e);
    e->v_numbers = 0;
    e->in_cold = false;
    e->regs.flags = FLAGS_IN_REG;
    e->host_flags = e->fp_checked = e->ended = e->short_of_regs = false;
    e->early = 0;
    e->outlined_count = e->skip = 0;
    for (unsigned i = 0; i < POOL; i++)
        if (e->regs.guest[pool[i]] != NO_GUEST)
            load(e, 1, pool[i], CPU, X_AT(e->regs.guest[pool[i]]));
    e->header = e->loops ? e->p : NULL;
    for (uint32_t i = 0; i < e->block->count; i++) {
        const struct uop *u = &e->block->uops[i];
        e->now++;
        e->index = i;
        e->flags_live = e->live_after[i];
        if (e->skip) {
            e->skip--;
            continue;
        }
        bool spoilt = spoils_flags(e, i);
        if (e->by[i]) {
            if (e->by[i]->effects & SETS)
                e->host_flags = e->by[i]->effects & USES ? e->host_flags : false;
            e->spared = e->by[i]->effects & (SETS | KEEPS);
            e->by[i]->emit(e, u, e->by[i]->arg);
            if (!e->spared)
                e->host_flags = false;
        } else {
            call_op(e, u, a64_rows[u->row].ends_block);
        }
        if (spoilt)
            e->regs.flags &= (uint8_t)~FLAGS_AGAIN;
    }
    const struct uop *last = &e->block->uops[e->block->count - 1];
    if (!e->ended)
        leave_to(e, last, next_offset(e, last));
    for (unsigned i = 0; i < e->outlined_count; i++)
        emit_outlined(e, &e->outlined[i], false);
    uint8_t *end = e->p;
    e->p = e->cold;
    e->in_cold = true;
    for (unsigned i = 0; i < e->outlined_count; i++) /* it may grow */
        emit_outlined(e, &e->outlined[i], true);
    e->cold = e->p;
    e->p = end;
}

/*
 * Code is written to `used` next. All but the first of it is in the host's huge pages where it has some (MADV_COLLAPSE,
 * Linux 6.1), as code is all over the place: a boot takes 3 % less, fork and exec 5 %.
 */
static void use_huge_page(struct jit *jit, size_t used) {
    size_t page = (used + TRACE_BYTES - 1) / HUGE, at = page * HUGE;
    if (jit->huge >> page & 1)
        return;
    jit->huge |= UINT32_C(1) << page;
#ifdef MADV_COLLAPSE
    (void)*(volatile uint8_t *)&jit->write[at]; /* only what is there collapses */
    madvise(jit->write + at, HUGE, MADV_COLLAPSE);
    madvise((void *)(uintptr_t)(jit->exec + at), HUGE, MADV_COLLAPSE);
#endif
}

const void *jit_compile(struct vcpu *c, const struct block *block) {
    struct jit *jit = c->jit;
    if (jit_full(c))
        return NULL;
    uint64_t start = host_ns();
    use_huge_page(jit, jit->used);
    use_huge_page(jit, jit->cold_used);
    jit->used = (jit->used + 15) & ~(size_t)15;
    uint8_t *code = jit->write + jit->used, *cold = jit->write + jit->cold_used;
    struct emit storage, *e = &storage; /* large, and most of it is not used: filled in as it is */
    _Alignas(struct block) uint8_t room[sizeof(struct block) + (TRACE_MAX + 1) * sizeof(struct uop)];
    struct block *trace = (struct block *)room;
    e->kept = code_room(c);
    if (!e->kept || !code_trace(c, block, trace, e->at))
        return NULL;
    e->jit = jit;
    e->vcpu = c;
    e->block = trace;
    e->kept_count = 0;
    memset(e->kept_as, 0, trace->count);
    e->now = 0;
    memset(e->stamp, 0, sizeof e->stamp);
    memset(e->vector_stamp, 0, sizeof e->vector_stamp);
    e->loops = false;
    e->page_offset = (int32_t)(trace->pa & (PAGE_SIZE - 1));
    no_regs(&e->back);
    plan(e);
    emit_trace(e, code, cold);
    if (e->loops) { /* once more, now that it is known what goes round, and is changed there or read early enough */
        for (unsigned i = 0; i < POOL; i++) {
            bool dirty = e->back.dirty >> pool[i] & 1;
            if (e->back.guest[pool[i]] != NO_GUEST && !dirty && !(e->early >> e->back.guest[pool[i]] & 1))
                drop(&e->back, pool[i]);
        }
        emit_trace(e, code, cold);
    }

    code_keep(c, e->kept_count);
    jit->used = (size_t)(e->p - jit->write);
    jit->cold_used = (size_t)(e->cold - jit->write);
    counter_add(&c->counters.compiled, 1);
    counter_add(&c->counters.compiled_bytes, (uint64_t)(e->p - code) + (uint64_t)(e->cold - cold));
    counter_add(&c->counters.compile_ns, host_ns() - start);
    return jit->exec + (code - jit->write);
}

bool jit_full(const struct vcpu *c) {
    return c->jit->used + TRACE_BYTES > c->jit->cold || c->jit->cold_used + TRACE_BYTES > c->jit->limit;
}

int32_t jit_threshold(const struct vcpu *c) { return c->jit ? c->jit->threshold : INT32_MAX; }

void jit_enter(struct vcpu *c, const void *code) {
    struct jit *jit = c->jit;
    const uint8_t *enter = jit->exec + (jit->enter - jit->write);
    void (*function)(struct vcpu *, const void *);
    memcpy(&function, &enter, sizeof function);
    function(c, code);
}

void jit_link(struct vcpu *c, const void *code) {
    struct jit *jit = c->jit;
    const uint8_t *target = jit->write + ((const uint8_t *)code - jit->exec);
    if (c->jit_link) {
        point(jit->write + ((const uint8_t *)c->jit_link - jit->exec), target);
    } else if (c->jit_far) {
        c->stale_links = STALE_LINKS;
        uint8_t *far = jit->write + ((const uint8_t *)c->jit_far - jit->exec);
        int32_t offset = -(int32_t)(c->pc & (PAGE_SIZE - 1));
        memcpy(far + FAR_GEN, &c->link_now, 8);
        memcpy(far + FAR_PC, &c->pc, 8);
        memcpy(far + FAR_OFFSET, &offset, 4);
        point(far + FAR_JUMP, target);
    } else {
        return;
    }
    counter_add(&c->counters.links, 1);
    jit_unlink(c);
}

/* All code is longer than that: a count and a jump it has at least. */
void jit_drop(struct vcpu *c, struct block *block, uint64_t pa) {
    if (!block->code)
        return;
    struct jit *jit = c->jit;
    struct emit *e = &(struct emit){.p = jit->write + ((const uint8_t *)block->code - jit->exec)};
    mov_imm(e, RAX, pa & (PAGE_SIZE - 1));
    jump_to(e, jit->dropped);
    block->code = NULL;
}

void jit_flush(struct vcpu *c) {
    if (c->jit) {
        c->jit->used = c->jit->stubs;
        c->jit->cold_used = c->jit->cold;
    }
    jit_unlink(c);
}

/* ---- Stubs ------------------------------------------------------------------------------------------------------- */

static const uint8_t saved[] = {RBP, RBX, R12, R13, R14, R15};

static void push(struct emit *e, unsigned reg) { opcode(e, 0, 0x50 | (reg & 7), 0, 0, reg); }
static void pop(struct emit *e, unsigned reg) { opcode(e, 0, 0x58 | (reg & 7), 0, 0, reg); }
static void align(struct emit *e) {
    while ((uintptr_t)e->p & 15)
        byte(e, 0xcc);
}

/* To the code at RAX, if it is known. A PC with a tag, or not aligned, never is. */
static void emit_lookup(struct emit *e, const uint8_t *leave) {
    uint8_t *stop[2];
    alu_mem_imm(e, CMP, CPU, AT(budget), 0);
    look_up_first(e, stop);
    point(stop[0], leave), point(stop[1], leave);
    mov(e, 0, RCX, RAX); /* jump_offset() */
    shift(e, 0, SHL, RCX, 2);
    mov(e, 1, RDX, RAX);
    shift(e, 1, SHR, RDX, 9);
    alu(e, 0, XOR, RCX, RDX);
    op_rm(e, 0, 0x23, RCX, CPU, AT(jump_mask));
    op_rm(e, 1, 0x03, RCX, CPU, AT(jump));
    op_rm(e, 1, 0x3b, RAX, RCX, offsetof(struct jump_entry, pc));
    uint8_t *found = jcc(e, E);
    alu_imm(e, 1, XOR, RCX, JUMP_OTHER); /* jump[] is aligned to pairs */
    op_rm(e, 1, 0x3b, RAX, RCX, offsetof(struct jump_entry, pc));
    point(jcc(e, NE), leave);
    here(e, found);
    load(e, 0, RCX, RCX, offsetof(struct jump_entry, code));
    test(e, 0, RCX, RCX);
    point(jcc(e, E), leave);
    op_rm(e, 1, 0x03, RCX, CPU, AT(code_base));
    mov(e, 1, PAGE, RAX);
    alu_imm(e, 1, AND, PAGE, -PAGE_SIZE);
    op_rr(e, 0, 0xff, 4, RCX);
}

static void emit_stubs(struct emit *e, struct vcpu *c) {
    struct jit *jit = e->jit;

    jit->enter = e->p; /* RDI: vCPU, RSI: code */
    for (unsigned i = 0; i < sizeof saved; i++)
        push(e, saved[i]);
    alu_imm(e, 1, SUB, RSP, 8);
    lea(e, 1, CPU, RDI, 128);
    flags_from_memory(e);
    load(e, 1, PAGE, CPU, AT(pc));
    alu_imm(e, 1, AND, PAGE, -PAGE_SIZE);
    op_rr(e, 0, 0xff, 4, RSI);

    align(e); /* To the dispatcher, from RAX. */
    const uint8_t *leave = e->p;
    store(e, 1, RAX, CPU, AT(pc));
    flags_to_memory(e);
    alu_imm(e, 1, ADD, RSP, 8);
    for (unsigned i = sizeof saved; i-- > 0;)
        pop(e, saved[i]);
    byte(e, 0xc3);

    align(e); /* An op has returned false: on from pc. RSI: its uop; under the return address nothing. */
    const uint8_t *elsewhere = e->p;
    alu_imm(e, 1, ADD, RSP, 8);
    op_rm(e, 0, 0x0fb6, RAX, RSI, offsetof(struct uop, off));
    shift(e, 0, SHR, RAX, 2);
    alu_imm(e, 0, ADD, RAX, 1);
    op_rm(e, 0, 0x29, RAX, CPU, AT(budget));
    flags_from_memory(e);
    load(e, 1, RAX, CPU, AT(pc));

    jit->lookup = e->p;
    emit_lookup(e, leave);

    align(e); /* The same for leave_far(), which RSI points at, and which is linked when it is not, or no use. */
    const uint8_t *leave_far = e->p;
    store(e, 1, RSI, CPU, AT(jit_far));
    jump_to(e, leave);
    align(e);
    jit->lookup_far = e->p;
    alu_mem_imm(e, SUB, CPU, AT(stale_links), 1);
    point(jcc(e, LE), leave_far);
    emit_lookup(e, leave_far);

    align(e); /* EAX: offset in the page of code that was dropped. */
    jit->dropped = e->p;
    alu(e, 1, ADD, RAX, PAGE);
    jump_to(e, leave);

    align(e); /* The same of code that is not linked yet; see leave_to(). */
    jit->link = e->p;
    pop(e, RCX);
    alu_imm(e, 1, SUB, RCX, LINK_BACK);
    store(e, 1, RCX, CPU, AT(jit_link));
    alu(e, 1, ADD, RAX, PAGE);
    jump_to(e, leave);

    align(e); /* RSI: offset of the uop in the arena, RCX: of the block in the page. */
    jit->call_flags = e->p;
    flags_to_memory(e);
    jit->call = e->p;
    mov_imm(e, RAX, (uintptr_t)code_arena(c));
    alu(e, 1, ADD, RSI, RAX);
    alu(e, 1, ADD, RCX, PAGE);
    store(e, 1, RCX, CPU, AT(block_pc));
    op_rm(e, 0, 0x0fb7, RAX, RSI, offsetof(struct uop, row));
    mov_imm(e, RDX, (uintptr_t)plain_of);
    push(e, RSI);
    lea(e, 1, RDI, CPU, -128);
    op_rx(e, 0, 0xff, 2, RDX, RAX, 3);
    pop(e, RSI);
    op_rr(e, 0, 0x84, RAX, RAX);
    point(jcc(e, E), elsewhere);
    byte(e, 0xc3);

    align(e); /* RAX: offset of the uop in the arena. */
    jit->pure = e->p;
    unsigned room = 0;
    for (unsigned i = 0; i < POOL; i++)
        room += CALLER_SAVED >> pool[i] & 1 ? 8 : 0;
    room += ~room & 8; /* to a multiple of 16, with the return address */
    alu_imm(e, 1, SUB, RSP, (int32_t)room);
    for (unsigned i = 0, at = 0; i < POOL; i++)
        if (CALLER_SAVED >> pool[i] & 1)
            store(e, 1, pool[i], RSP, 8 * (int32_t)at++);
    mov_imm(e, RSI, (uintptr_t)code_arena(c));
    alu(e, 1, ADD, RSI, RAX);
    op_rm(e, 0, 0x0fb7, RAX, RSI, offsetof(struct uop, row));
    mov_imm(e, RDX, (uintptr_t)plain_of);
    lea(e, 1, RDI, CPU, -128);
    op_rx(e, 0, 0xff, 2, RDX, RAX, 3);
    for (unsigned i = 0, at = 0; i < POOL; i++)
        if (CALLER_SAVED >> pool[i] & 1)
            load(e, 1, pool[i], RSP, 8 * (int32_t)at++);
    alu_imm(e, 1, ADD, RSP, (int32_t)room);
    byte(e, 0xc3);

    align(e); /* See struct slow, which the return address points at. */
    jit->slow_flags = e->p;
    flags_to_memory(e);
    jit->slow = e->p;
    alu_imm(e, 1, SUB, RSP, 8 * POOL);
    for (unsigned i = 0; i < POOL; i++)
        store(e, 1, pool[i], RSP, 8 * (int32_t)i);
    lea(e, 1, RDI, CPU, -128);
    load(e, 1, RSI, RSP, 8 * POOL);
    mov(e, 1, RDX, RSP);
    mov(e, 1, RCX, PAGE);
    bool (*call)(struct vcpu *, const struct slow *, uint64_t *, uint64_t) = slow_call_op;
    uint64_t address;
    memcpy(&address, &call, sizeof address);
    mov_imm(e, RAX, address);
    op_rr(e, 0, 0xff, 2, RAX);
    op_rr(e, 0, 0x84, RAX, RAX);
    uint8_t *left = jcc(e, E);
    for (unsigned i = 0; i < POOL; i++)
        load(e, 1, pool[i], RSP, 8 * (int32_t)i);
    load(e, 1, RAX, RSP, 8 * POOL);
    op_rm(e, 1, 0x63, RCX, RAX, offsetof(struct slow, back));
    alu(e, 1, ADD, RAX, RCX);
    alu_imm(e, 1, ADD, RSP, 8 * POOL + 8);
    op_rr(e, 0, 0xff, 4, RAX);
    here(e, left);
    alu_imm(e, 1, ADD, RSP, 8 * POOL + 8);
    flags_from_memory(e);
    load(e, 1, RAX, CPU, AT(pc));
    jump_to(e, jit->lookup);
    align(e);
}

_Static_assert(offsetof(struct vcpu, scratch) == 8 * R_COUNT, "they follow x[]");

static int by_op(const void *a, const void *b) {
    uintptr_t one = (uintptr_t)plain_of[*(const uint16_t *)a], other = (uintptr_t)plain_of[*(const uint16_t *)b];
    return one < other ? -1 : one > other;
}

/* Of several emitters for an op the last one counts. */
static void fill_tables(void) {
    unsigned a, b = 0, c, d;
    sha = __get_cpuid_count(7, 0, &a, &b, &c, &d) && b >> 29 & 1;
    static const struct emitter *const tables[] = {jit_x64_int, jit_x64_mem, jit_x64_simd, jit_x64_crypto, jit_x64_fp};
    uint16_t sorted[ROWS_MAX];
    for (uint32_t row = 0; row < a64_row_count; row++) {
        plain_of[row] = a64_rows[row].plain;
        sorted[row] = (uint16_t)row;
    }
    qsort(sorted, a64_row_count, sizeof *sorted, by_op);
    for (unsigned t = 0; t < sizeof tables / sizeof *tables; t++) {
        for (const struct emitter *by = tables[t]; by->plain; by++) {
            uint32_t low = 0, high = a64_row_count;
            while (low < high) {
                uint32_t middle = (low + high) / 2;
                if ((uintptr_t)plain_of[sorted[middle]] < (uintptr_t)by->plain)
                    low = middle + 1;
                else
                    high = middle;
            }
            for (; low < a64_row_count && plain_of[sorted[low]] == by->plain; low++)
                if (by->effects & ENDS || !a64_rows[sorted[low]].ends_block)
                    emitter_of[sorted[low]] = by;
        }
    }
}

enum { ROOM_SIZE = 2 * CODE_SIZE + HUGE };

static void free_jit(struct jit *jit) {
    if (jit->room)
        munmap(jit->room, ROOM_SIZE);
    free(jit);
}

static bool map_code(int fd, void *at, int protection) {
    return mmap(at, CODE_SIZE, protection, MAP_SHARED | MAP_FIXED, fd, 0) != MAP_FAILED;
}

static bool map_twice(struct jit *jit, int fd) {
    void *room = mmap(NULL, ROOM_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED)
        return false;
    jit->room = room;
    jit->write = jit->room + (-(uintptr_t)room & (HUGE - 1));
    jit->exec = jit->write + CODE_SIZE;
    return map_code(fd, jit->write, PROT_READ | PROT_WRITE) && map_code(fd, jit->write + CODE_SIZE, PROT_READ | PROT_EXEC);
}

/* NULL on a host that allows no such thing. */
static struct jit *new_jit(void) {
    struct jit *jit = calloc(1, sizeof *jit);
    int fd = jit ? memfd_create("softhv-code", MFD_CLOEXEC) : -1;
    bool mapped = fd >= 0 && !ftruncate(fd, CODE_SIZE) && map_twice(jit, fd);
    if (fd >= 0)
        close(fd);
    if (mapped)
        return jit;
    if (jit)
        free_jit(jit);
    return NULL;
}

void jit_create(struct vcpu *c) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    if (a64_row_count > ROWS_MAX || c->vm->jit_threshold == INT32_MAX)
        return;
    pthread_once(&once, fill_tables);
    struct jit *jit = c->jit = new_jit();
    if (!jit)
        return;
    struct emit *e = &(struct emit){.jit = jit, .p = jit->write};
    emit_stubs(e, c);
    c->code_base = jit->exec;
    c->stale_links = STALE_LINKS;
    jit->used = jit->stubs = (size_t)(e->p - jit->write);
    jit->threshold = c->vm->jit_threshold;
    jit->limit = c->vm->jit_limit ? c->vm->jit_limit : CODE_SIZE;
    jit->cold = jit->cold_used = jit->stubs + (jit->limit - jit->stubs) / 2;
    jit->huge = 1 | UINT32_C(1) << (jit->cold + TRACE_BYTES - 1) / HUGE; /* not for who has little */
}

void jit_destroy(struct vcpu *c) {
    if (c->jit)
        free_jit(c->jit);
    c->jit = NULL;
}

hv_return_t softhv_vm_set_jit(softhv_vm_t *opaque, uint32_t threshold, size_t limit) {
    struct vm *vm = (struct vm *)opaque;
    if (!vm || limit > CODE_SIZE || (limit && limit < STUBS_BYTES + 4 * TRACE_BYTES))
        return HV_BAD_ARGUMENT;
    pthread_mutex_lock(&vm->lock);
    hv_return_t result = vm->vcpu_count ? HV_BUSY : HV_SUCCESS;
    if (result == HV_SUCCESS) {
        vm->jit_threshold = threshold > INT32_MAX ? INT32_MAX : (int32_t)threshold;
        vm->jit_limit = limit;
    }
    pthread_mutex_unlock(&vm->lock);
    return result;
}

#else /* no back end for this host */

void jit_create(struct vcpu *c) { (void)c; }
void jit_destroy(struct vcpu *c) { (void)c; }
int32_t jit_threshold(const struct vcpu *c) { return (void)c, INT32_MAX; }
const void *jit_compile(struct vcpu *c, const struct block *block) { return (void)c, (void)block, NULL; }
bool jit_full(const struct vcpu *c) { return (void)c, false; }
void jit_enter(struct vcpu *c, const void *code) { (void)c, (void)code; }
void jit_link(struct vcpu *c, const void *code) { (void)c, (void)code; }
void jit_drop(struct vcpu *c, struct block *block, uint64_t pa) { (void)c, (void)block, (void)pa; }
void jit_flush(struct vcpu *c) { (void)c; }
hv_return_t softhv_vm_set_jit(softhv_vm_t *vm, uint32_t threshold, size_t limit) {
    return !vm ? HV_BAD_ARGUMENT : threshold == SOFTHV_NO_JIT ? HV_SUCCESS : HV_UNSUPPORTED;
}

#endif
