/*
 * What a vCPU keeps of its table walks: data TLBs, executable pages, blocks by virtual address; and how it forgets them.
 *
 * What EL0 sees is kept by address space, for a few of them (D8.13.3 tags entries with the ASID; here TTBR0's base is part
 * of the tag, which allows no less). EL1's own are for the current one, and what is not global goes with it. TLBI looks
 * at all of them, so that a space that is come back to has missed nothing.
 */
#include "engine.h"

#define BIT(n) (UINT64_C(1) << (n))

/* ---- Places ----------------------------------------------------------------------------------------------------- */

/* Whatever tag the VA has. */
static uint64_t canonical(uint64_t va) { return (uint64_t)((int64_t)(va << 8) >> 8); }

static bool places_have(const struct places *places, uint64_t va) {
    va = canonical(va);
    for (uint32_t i = 0; i < places->count; i++)
        if (va >= places->at[i].low && va <= places->at[i].high)
            return true;
    return false;
}

/* The mapping of that size around `va`: by itself, as part of a range it touches, or of the nearest if none is free. */
static void places_add(struct places *places, uint64_t va, unsigned page_bits) {
    uint64_t low = canonical(va) & ~(BIT(page_bits) - 1), high = low + (BIT(page_bits) - 1), nearest = UINT64_MAX;
    uint32_t best = places->count;
    for (uint32_t i = 0; i < places->count; i++) {
        uint64_t gap = low > places->at[i].high   ? low - places->at[i].high
                       : places->at[i].low > high ? places->at[i].low - high
                                                  : 0;
        if (gap < nearest && (gap <= BIT(16) || places->count == PLACES_MAX)) {
            nearest = gap;
            best = i;
        }
    }
    if (best == places->count) {
        places->at[places->count].low = low;
        places->at[places->count++].high = high;
    } else {
        if (places->at[best].low > low)
            places->at[best].low = low;
        if (places->at[best].high < high)
            places->at[best].high = high;
    }
    if (places->page_bits < page_bits)
        places->page_bits = (uint8_t)page_bits;
}

/* ---- Filling ---------------------------------------------------------------------------------------------------- */

static struct held *hold(struct vcpu *c, struct held *held, const struct translation *t) {
    held->any = true;
    held->global |= t->global;
    held->nonglobal |= !t->global;
    counter_add(&c->counters.tlb_misses, 1);
    return held;
}

void tlb_fill(struct vcpu *c, uint64_t va, unsigned idx, const struct translation *t, const struct ram *ram) {
    struct data_tlb *tlb = c->tlb[idx];
    struct tlb_entry *e = tlb_entry(tlb, va);
    uint64_t page = va & PAGE_MASK, pa = t->pa & PAGE_MASK;
    bool direct = !t->device && !(c->sys.sctlr & SCTLR_A);
    e->read = direct && t->read && ram->flags & HV_MEMORY_READ ? page : TLB_NONE;
    e->write = e->read == page && t->write && ram->flags & HV_MEMORY_WRITE ? page : TLB_NONE; /* see struct group */
    e->addend = (uintptr_t)(ram->host + (pa - ram->ipa)) - (uintptr_t)page;
    e->pa = pa | t->page_bits;
    struct held *held = hold(c, &tlb->held[half_of(va)], t);
    if (t->page_bits > PAGE_BITS)
        places_add(&held->places, va, t->page_bits);
}

void fetch_fill(struct vcpu *c, const struct translation *t, const struct ram *ram) {
    struct code_tlb *code = c->code[c->el];
    uint64_t va = c->pc & PAGE_MASK, pa = t->pa & PAGE_MASK;
    *fetch_entry(code, va) = (struct fetch_entry){va, pa, ram->host + (pa - ram->ipa)};
    places_add(&hold(c, &code->held[half_of(va)], t)->places, va, t->page_bits);
}

struct jump_entry *jump_fill(struct vcpu *c, uint64_t pc, const struct block *block) {
    uint32_t at = jump_offset(pc);
    struct jump_entry *jump = jump_entry(c, at);
    if (jump->pc != pc && !(jump->pc & 3)) /* not empty */
        *jump_entry(c, at ^ JUMP_OTHER) = *jump;
    const uint8_t *code = block->code;
    *jump = (struct jump_entry){pc, (uint32_t)((const uint8_t *)block - c->arena),
                                code ? (uint32_t)(code - c->code_base) : 0};
    return jump;
}

void jump_offer(struct vcpu *c, struct jump_entry entry) {
    uint32_t at = jump_offset(entry.pc);
    struct jump_entry *jump = jump_entry(c, at), *other = jump_entry(c, at ^ JUMP_OTHER);
    if (jump->pc & 3)
        *jump = entry;
    else if (other->pc & 3 && jump->pc != entry.pc)
        *other = entry;
}

void jump_see(struct vcpu *c) {
    const struct code_tlb *code = c->code[c->el];
    c->jump = code->jump;
    c->jump_mask = code->jump_mask;
    c->link_now = code->gen;
}

/* ---- Clearing one of them ----------------------------------------------------------------------------------------- */

/* `count` is a whole number of rows. Empty is a PC that no guest gets here with: ~0, but where ~0 itself belongs. */
static void clear_jumps(struct vcpu *c, struct code_tlb *code, unsigned first, unsigned count) {
    memset(&code->jump[first], 0xff, count * sizeof *code->jump);
    unsigned own = ((jump_offset(UINT64_MAX) & code->jump_mask) / sizeof *code->jump) & ~1u;
    if (own - first < count)
        code->jump[own].pc = code->jump[own + 1].pc = UINT64_MAX - 8; /* of another index */
    code->gen = ++c->gens;
    jump_see(c);
}

static void clear_all_jumps(struct vcpu *c, struct code_tlb *code) {
    clear_jumps(c, code, 0, code->jump_mask / sizeof *code->jump + 1);
}

static bool in_half(uint64_t va, unsigned half) { return va != TLB_NONE && half_of(va) == half; }

static void clear_data_half(struct vcpu *c, struct data_tlb *tlb, unsigned half) {
    if (!tlb->held[half].any)
        return;
    if (!tlb->held[!half].any) {
        memset(tlb->at, 0xff, sizeof tlb->at); /* TLB_NONE */
    } else {
        for (struct tlb_entry *e = tlb->at; e < tlb->at + TLB_SIZE; e++)
            if (in_half(e->read, half) || in_half(e->write, half))
                e->read = e->write = TLB_NONE;
    }
    tlb->held[half] = (struct held){0};
    counter_add(&c->counters.tlb_flushes, 1);
}

/* The jump cache goes as a whole. */
static void clear_code_half(struct vcpu *c, struct code_tlb *code, unsigned half) {
    if (!code->held[half].any)
        return;
    if (!code->held[!half].any) {
        memset(code->fetch, 0xff, sizeof code->fetch);
    } else {
        for (struct fetch_entry *e = code->fetch; e < code->fetch + FETCH_SIZE; e++)
            if (in_half(e->va, half))
                e->va = TLB_NONE;
    }
    clear_all_jumps(c, code);
    code->held[half] = (struct held){0};
    counter_add(&c->counters.tlb_flushes, 1);
}

static void clear_space_half(struct vcpu *c, struct space *space, unsigned half) {
    clear_data_half(c, &space->data, half);
    clear_code_half(c, &space->code, half);
}

static void clear_kernel_half(struct vcpu *c, unsigned half) {
    clear_data_half(c, &c->kernel_data[0], half);
    clear_data_half(c, &c->kernel_data[1], half);
    clear_code_half(c, &c->kernel_code, half);
}

static bool same_mapping(const struct tlb_entry *e, uint64_t entry_va, uint64_t va) {
    return entry_va != TLB_NONE && !((entry_va ^ va) << 8 >> 8 >> (e->pa & 0x3f));
}

static void clear_data_va(struct data_tlb *tlb, uint64_t va) {
    struct tlb_entry *own = tlb_entry(tlb, va);
    own->read = own->write = TLB_NONE;
    if (!places_have(&tlb->held[half_of(va)].places, va))
        return;
    for (struct tlb_entry *e = tlb->at; e < tlb->at + TLB_SIZE; e++)
        if (same_mapping(e, e->read, va) || same_mapping(e, e->write, va))
            e->read = e->write = TLB_NONE;
}

static void clear_code_va(struct vcpu *c, struct code_tlb *code, uint64_t va) {
    const struct places *places = &code->held[half_of(va)].places;
    if (!places_have(places, va))
        return;
    if (places->page_bits > PAGE_BITS) {
        for (struct fetch_entry *e = code->fetch; e < code->fetch + FETCH_SIZE; e++)
            e->va = TLB_NONE;
        clear_all_jumps(c, code);
    } else {
        fetch_entry(code, va)->va = TLB_NONE;
        unsigned at = (jump_offset(va) & code->jump_mask) / sizeof *code->jump;
        clear_jumps(c, code, at & ~(unsigned)(JUMP_ROW - 1), JUMP_ROW);
    }
}

/* ---- Forgetting --------------------------------------------------------------------------------------------------- */

static bool ever_used(const struct space *space) { return space->used; }

void tlb_flush_all(struct vcpu *c) {
    for (unsigned half = 0; half < 2; half++) {
        clear_kernel_half(c, half);
        for (struct space *s = c->spaces; s < c->spaces + SPACES; s++)
            clear_space_half(c, s, half);
    }
}

void tlb_flush_va(struct vcpu *c, uint64_t va, uint64_t asid) {
    unsigned half = half_of(va);
    for (struct space *s = c->spaces; s < c->spaces + SPACES; s++) {
        bool own = asid == ANY_ASID || asid == s->asid;
        if (s->data.held[half].any && (own || s->data.held[half].global))
            clear_data_va(&s->data, va);
        if (s->code.held[half].any && (own || s->code.held[half].global))
            clear_code_va(c, &s->code, va);
    }
    for (unsigned pan = 0; pan < 2; pan++)
        if (c->kernel_data[pan].held[half].any)
            clear_data_va(&c->kernel_data[pan], va);
    if (c->kernel_code.held[half].any)
        clear_code_va(c, &c->kernel_code, va);
}

static void flush_kernel_nonglobal(struct vcpu *c) {
    for (unsigned half = 0; half < 2; half++)
        if (c->kernel_data[0].held[half].nonglobal || c->kernel_data[1].held[half].nonglobal ||
            c->kernel_code.held[half].nonglobal)
            clear_kernel_half(c, half);
}

void tlb_flush_asid(struct vcpu *c, uint64_t asid) {
    for (struct space *s = c->spaces; s < c->spaces + SPACES; s++)
        for (unsigned half = 0; half < 2; half++)
            if (s->asid == asid && (s->data.held[half].nonglobal || s->code.held[half].nonglobal))
                clear_space_half(c, s, half);
    if (asid == mmu_asid(c))
        flush_kernel_nonglobal(c);
}

void tlb_drop_code(struct vcpu *c) {
    for (struct space *s = c->spaces; s < c->spaces + SPACES; s++)
        if (ever_used(s))
            clear_all_jumps(c, &s->code);
    clear_all_jumps(c, &c->kernel_code);
}

void jump_stale(struct vcpu *c) {
    for (struct space *s = c->spaces; s < c->spaces + SPACES; s++)
        s->code.gen = ++c->gens;
    c->kernel_code.gen = ++c->gens;
    jump_see(c);
}

/* ---- Address spaces ----------------------------------------------------------------------------------------------- */

static bool empty(const struct space *s) {
    return !(s->data.held[0].any || s->data.held[1].any || s->code.held[0].any || s->code.held[1].any);
}

/* One that holds nothing, the current one if it does; else the one that was not used for longest. */
static struct space *free_space(struct vcpu *c) {
    struct space *oldest = c->space;
    if (ever_used(oldest) && empty(oldest))
        return oldest;
    for (struct space *s = c->spaces; s < c->spaces + SPACES; s++) {
        if (ever_used(s) && empty(s))
            return s;
        if (s->used < oldest->used)
            oldest = s;
    }
    return oldest;
}

/* Between two address spaces Linux has TTBR0 name a table of its own: nothing is kept of it, and nothing lost by it. */
static void select_space(struct vcpu *c) {
    uint64_t base = c->sys.ttbr0 & TTBR_BASE, asid = mmu_asid(c);
    struct space *to = NULL;
    for (struct space *s = c->spaces; s < c->spaces + SPACES && !to; s++)
        if (ever_used(s) && s->base == base && s->asid == asid)
            to = s;
    if (!to) {
        to = free_space(c);
        if (ever_used(to)) {
            clear_space_half(c, to, 0);
            clear_space_half(c, to, 1);
        } else {
            memset(to->data.at, 0xff, sizeof to->data.at);
            memset(to->code.fetch, 0xff, sizeof to->code.fetch);
            to->code.jump = to->jump;
            to->code.jump_mask = sizeof to->jump - sizeof *to->jump;
            clear_all_jumps(c, &to->code);
        }
        to->base = base;
        to->asid = asid;
    }
    to->used = ++c->space_uses;
    c->space = to;
    c->tlb[MMU_EL0] = &to->data;
    c->code[0] = &to->code;
    c->bank = c->tlb[c->mmu_idx];
    jump_see(c);
}

void tlb_create(struct vcpu *c) {
    c->kernel_code.jump = c->kernel_jump;
    c->kernel_code.jump_mask = sizeof c->kernel_jump - sizeof *c->kernel_jump;
    c->code[0] = c->code[1] = &c->kernel_code;
    memset(c->kernel_code.fetch, 0xff, sizeof c->kernel_code.fetch);
    for (unsigned pan = 0; pan < 2; pan++) {
        memset(c->kernel_data[pan].at, 0xff, sizeof c->kernel_data[pan].at);
        c->tlb[MMU_EL1 + pan] = &c->kernel_data[pan];
    }
    clear_all_jumps(c, &c->kernel_code);
    c->space = c->spaces;
    select_space(c);
}

void tlb_new_base(struct vcpu *c, unsigned half) {
    clear_kernel_half(c, half);
    if (half) /* which no space is told apart by */
        for (struct space *s = c->spaces; s < c->spaces + SPACES; s++)
            clear_space_half(c, s, 1);
    else
        select_space(c);
}

void tlb_new_asid(struct vcpu *c) {
    flush_kernel_nonglobal(c);
    select_space(c);
}
