/* From instructions to uops: the tables, an index over them, and blocks. */
#include "engine.h"

/* Declarations of every form and op, then the table itself. */
#define A64(row_name, pattern, form, op)                                                                           \
    bool form(struct uop *u, uint32_t insn);                                                                      \
    const struct uop *t_##op(struct vcpu *c, const struct uop *u);                                                \
    bool p_##op(struct vcpu *c, const struct uop *u);
#define A64_END(row_name, pattern, form, op) A64(row_name, pattern, form, op)
#include "a64.def"
#undef A64
#undef A64_END

#define A64(row_name, pattern, form, op) {#row_name, pattern, form, t_##op, p_##op, 0, 0, false},
#define A64_END(row_name, pattern, form, op) {#row_name, pattern, form, t_##op, p_##op, 0, 0, true},
struct row a64_rows[] = {
#include "a64.def"
};
#undef A64
#undef A64_END
const uint32_t a64_row_count = sizeof a64_rows / sizeof *a64_rows;

/* Rows by the instruction's top twelve bits: index[t] up to index[t + 1] are places in candidates[]. */
enum { TOP_BITS = 12, TOPS = 1 << TOP_BITS, CANDIDATES_MAX = 1 << 17 };
static uint32_t index_of[TOPS + 1];
static uint16_t candidates[CANDIDATES_MAX];
static char patterns[sizeof a64_rows / sizeof *a64_rows][33];

static void parse_pattern(struct row *row, char text[33]) {
    unsigned length = 0;
    for (const char *p = row->pattern; *p; p++) {
        if (*p == ' ')
            continue;
        if (length == 32)
            __builtin_trap();
        uint32_t bit = UINT32_C(1) << (31 - length);
        text[length++] = *p;
        if (*p == '0' || *p == '1')
            row->mask |= bit;
        if (*p == '1')
            row->value |= bit;
    }
    if (length != 32) /* a table that is wrong is a build that is wrong: no guest can get here */
        __builtin_trap();
    row->pattern = text;
}

static void build_index(void) {
    for (uint32_t r = 0; r < a64_row_count; r++)
        parse_pattern(&a64_rows[r], patterns[r]);
    uint32_t filled = 0;
    for (uint32_t top = 0; top < TOPS; top++) {
        index_of[top] = filled;
        for (uint32_t r = 0; r < a64_row_count; r++) {
            if (((top << (32 - TOP_BITS)) ^ a64_rows[r].value) & a64_rows[r].mask & (UINT32_MAX << (32 - TOP_BITS)))
                continue;
            if (filled == CANDIDATES_MAX)
                __builtin_trap();
            candidates[filled++] = (uint16_t)r;
        }
    }
    index_of[TOPS] = filled;
}

void decode_init(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, build_index);
}

bool softhv_insn(uint32_t index, softhv_insn_t *insn) {
    decode_init();
    if (index >= a64_row_count || !insn)
        return false;
    const struct row *row = &a64_rows[index];
    *insn = (softhv_insn_t){.name = row->name, .pattern = row->pattern, .mask = row->mask, .value = row->value};
    return true;
}

OP(undefined) { return exc_unimplemented(c, u); }

/* What a block ends with when its last instruction can fall through. */
OP(end_of_block) {
    c->pc = pc_of(c, u);
    return false;
}

/* Whether decoding goes on after it. */
static bool decode(struct uop *u, uint32_t insn, uint8_t off) {
    uint32_t top = insn >> (32 - TOP_BITS);
    for (uint32_t i = index_of[top]; i < index_of[top + 1]; i++) {
        const struct row *row = &a64_rows[candidates[i]];
        if ((insn & row->mask) != row->value)
            continue;
        *u = (struct uop){.fn = row->threaded, .insn = insn, .row = candidates[i], .off = off};
        if (!row->form(u, insn))
            break;
        return !row->ends_block;
    }
    *u = (struct uop){.fn = t_undefined, .insn = insn, .row = UINT16_MAX, .off = off};
    return false;
}

static bool conditional(const struct uop *u) {
    return u->fn == t_b_cond || u->fn == t_cbz32 || u->fn == t_cbz64 || u->fn == t_cbnz32 || u->fn == t_cbnz64 ||
           u->fn == t_tbz || u->fn == t_tbnz;
}

void decode_block(struct block *block, uint64_t pa, const uint8_t *host, uint32_t most) {
    uint32_t room = (PAGE_SIZE - (uint32_t)(pa & (PAGE_SIZE - 1))) / 4, count = 0;
    if (room > most)
        room = most;
    bool more;
    do {
        uint32_t insn;
        guest_copy(&insn, host + 4 * count, 4);
        more = decode(&block->uops[count], insn, (uint8_t)(4 * count));
        count++;
    } while (more && count < room);
    block->uops[count] = (struct uop){.fn = t_end_of_block, .row = UINT16_MAX, .off = (uint8_t)(4 * count)};
    for (uint32_t i = 0; i < count; i++)
        block->uops[i].left = (uint8_t)(count - 1 - i);
    block->pa = pa;
    block->count = count;
}

void decode_trace(struct block *trace, uint64_t pa, const uint8_t *page, uint16_t *at, taken_fn taken, struct vcpu *c) {
    uint64_t been[PAGE_SIZE / 4 / 64] = {0}, page_pa = pa & ~(uint64_t)(PAGE_SIZE - 1);
    uint32_t here = (uint32_t)(pa & (PAGE_SIZE - 1)), count = 0;
    bool more = true;
    while (more && count < BLOCK_MAX && here < PAGE_SIZE && !(been[here / 256] >> (here / 4 % 64) & 1)) {
        struct uop *u = &trace->uops[count];
        uint32_t insn;
        guest_copy(&insn, page + here, 4);
        more = decode(u, insn, (uint8_t)(4 * count));
        if (u->row == UINT16_MAX)
            break;
        been[here / 256] |= UINT64_C(1) << (here / 4 % 64);
        at[count++] = (uint16_t)here;
        here += 4;
        if (u->fn == t_msr_daif || u->fn == t_msr_daifclr) {
            more = true; /* the compiler leaves for the interrupts by itself */
            continue;
        }
        bool always = u->fn == t_b || u->fn == t_bl;
        if (!always && !conditional(u))
            continue;
        int64_t target = at[count - 1] + (int64_t)u->imm - u->off;
        bool inside = target >= 0 && target < PAGE_SIZE && !(been[target / 256] >> (target / 4 % 64) & 1);
        more = inside || !always;
        if (inside && (always || taken(c, page_pa + (uint64_t)target, page_pa + here)))
            here = (uint32_t)target;
    }
    at[count] = (uint16_t)here;
    trace->uops[count] = (struct uop){.fn = t_end_of_block, .row = UINT16_MAX, .off = (uint8_t)(4 * count)};
    for (uint32_t i = 0; i < count; i++)
        trace->uops[i].left = 0;
    trace->pa = pa;
    trace->count = count;
}
