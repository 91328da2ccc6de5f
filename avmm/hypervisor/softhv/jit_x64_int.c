/* x86-64 code for data processing and branches. Flags: every setter leaves C inverted in the host's carry. */
#include "jit_x64.h"

#ifdef JIT_X64

/* The op each emitter stands for. */
#define A64(row_name, pattern, form, op) bool p_##op(struct vcpu *c, const struct uop *u);
#define A64_END(row_name, pattern, form, op) A64(row_name, pattern, form, op)
#include "a64_sys.def"
#include "a64_int.def"
#undef A64
#undef A64_END

/* What arg is made of. */
enum { WIDE = 1 /* 64 bits */, FLAGGED = 2, INVERTED = 4 /* the second operand */ };
enum { WHAT = 3 /* bits 5:3: ADD .. XOR */, KIND = 6 /* bits 8:6 */ };
enum { K_REG, K_LSL, K_LSR, K_ASR, K_ROR, K_EXT };

static bool fits(uint64_t value) { return value == (uint64_t)(int64_t)(int32_t)value; }

/* C as the guest has it after these becomes what the host's carry must be. */
static void fix_carry(struct emit *e, unsigned what) {
    if (!e->flags_live)
        return;
    if (what == ADD || what == ADC)
        cmc(e);
    else if (what == AND)
        stc(e); /* C is 0 */
}

static void finish_flags(struct emit *e, unsigned what, struct again_by again) {
    fix_carry(e, what);
    keep_flags(e, again);
}

/* What sets the flags of rd = rn what rm, or an immediate, once more: until one of the registers changes. */
static struct again_by again_reg(const struct uop *u, unsigned w, unsigned what) {
    bool kept = u->rd != u->rn && u->rd != u->rm;
    if (what == AND && (kept || u->rd == R_SINK))
        return (struct again_by){TEST_REG, w, u->rn, u->rm, 0};
    if (what == AND)
        return (struct again_by){TEST_REG, w, u->rd, u->rd, 0};
    if (what == SUB && kept)
        return (struct again_by){CMP_REG, w, u->rn, u->rm, 0};
    if (what == ADD && kept)
        return (struct again_by){ADD_REG, w, u->rn, u->rm, 0};
    if (u->rn != u->rm && u->rd == u->rn && (what == SUB || what == ADD))
        return (struct again_by){what == SUB ? UNDO_SUB_REG : UNDO_ADD_REG, w, u->rd, u->rm, 0};
    if (u->rn != u->rm && what == ADD)
        return (struct again_by){UNDO_ADD_REG, w, u->rd, u->rn, 0};
    return (struct again_by){.kind = AGAIN_NEVER};
}

static struct again_by again_imm(const struct uop *u, unsigned w, unsigned what) {
    if (what == AND && u->rd == R_SINK)
        return (struct again_by){TEST_IMM, w, u->rn, 0, (int32_t)u->imm};
    if (what == AND)
        return (struct again_by){TEST_REG, w, u->rd, u->rd, 0};
    unsigned kind = u->rd != u->rn ? (what == SUB ? CMP_IMM : ADD_IMM) : (what == SUB ? UNDO_SUB_IMM : UNDO_ADD_IMM);
    return (struct again_by){(uint8_t)kind, w, u->rd != u->rn ? u->rn : u->rd, 0, (int32_t)u->imm};
}

/* rd = rn what source, which is RAX or a guest register's. */
static void binary(struct emit *e, const struct uop *u, unsigned w, unsigned what, unsigned source, bool flagged,
                   struct again_by again) {
    unsigned n = use(e, u->rn);
    if (flagged && u->rd == R_SINK) {
        if (what == SUB)
            alu(e, w, CMP, n, source);
        else if (what == AND)
            test(e, w, n, source);
        else {
            mov(e, 1, RDX, n);
            alu(e, w, what, RDX, source);
        }
    } else {
        unsigned d = def(e, u->rd);
        if (d == source && d != n) {
            if (what == SUB) {
                mov(e, 1, RDX, n);
                alu(e, w, SUB, RDX, source);
                mov(e, 1, d, RDX);
            } else {
                alu(e, w, what, d, n);
            }
        } else {
            if (d != n)
                mov(e, 1, d, n);
            alu(e, w, what, d, source);
        }
    }
    if (flagged)
        finish_flags(e, what, again);
}

/* The low `bits` of n, 8, 16 or 32 of them; no flags change. */
static void zero_extend(struct emit *e, unsigned bits, unsigned d, unsigned n) {
    if (bits == 32)
        mov(e, 0, d, n);
    else
        op_rr(e, 0, bits == 8 ? 0x0fb6 | BYTE_REG : 0x0fb7, d, n);
}

static void sign_extend(struct emit *e, unsigned w, unsigned bits, unsigned d, unsigned n) {
    op_rr(e, w, bits == 8 ? 0x0fbe | BYTE_REG : bits == 16 ? 0x0fbf : 0x63, d, n);
}

/* How many low bits a mask keeps: 8, 16, 32, or 64 for any other. */
static unsigned width_of(uint64_t mask) {
    return mask == 0xff ? 8 : mask == 0xffff ? 16 : mask == UINT32_MAX ? 32 : 64;
}

/* The second operand, shifted or extended: a register not to be written, or `into`. */
static unsigned operand(struct emit *e, const struct uop *u, unsigned w, uint32_t arg, unsigned into) {
    unsigned kind = arg >> KIND & 7, m = use(e, u->rm);
    if (kind == K_REG && !(arg & INVERTED))
        return m;
    if (kind == K_EXT) {
        unsigned bits = width_of(u->imm);
        if (bits == 64)
            mov(e, 1, into, m);
        else if (u->aux)
            sign_extend(e, 1, bits, into, m);
        else
            zero_extend(e, bits, into, m);
        shift(e, 1, SHL, into, u->ra);
        return into;
    }
    mov(e, 1, into, m);
    static const uint8_t shifts[] = {[K_LSL] = SHL, [K_LSR] = SHR, [K_ASR] = SAR, [K_ROR] = ROR};
    if (kind != K_REG)
        shift(e, w, shifts[kind], into, (unsigned)u->imm);
    if (arg & INVERTED)
        op_rr(e, 1, 0xf7, 2, into);
    return into;
}

/* rd = rn + source * 2**scale */
static void sum(struct emit *e, const struct uop *u, unsigned w, unsigned source, unsigned scale) {
    unsigned n = use(e, u->rn), d = def(e, u->rd);
    if (d == n && !scale)
        alu(e, w, ADD, d, source);
    else if (d == source && !scale)
        alu(e, w, ADD, d, n);
    else
        op_rx(e, w, 0x8d, d, n, source, scale);
    e->spared = source != RAX && (scale || (d != n && d != source));
}

static void emit_binary(struct emit *e, const struct uop *u, uint32_t arg) {
    unsigned w = arg & WIDE, what = arg >> WHAT & 7, kind = arg >> KIND & 7;
    bool plain = kind == K_REG && !(arg & INVERTED);
    if (!(arg & FLAGGED) && u->rn != R_ZR) {
        if (what == ADD) {
            bool scaled = kind == K_LSL && u->imm <= 3;
            sum(e, u, w, scaled ? use(e, u->rm) : operand(e, u, w, arg, RAX), scaled ? (unsigned)u->imm : 0);
            return;
        }
        if (!plain && what != SUB) {
            unsigned n = use(e, u->rn);
            use(e, u->rm);
            unsigned d = def(e, u->rd);
            if (d != n) { /* the operand where the result is to be */
                alu(e, w, what, operand(e, u, w, arg, d), n);
                return;
            }
        }
    }
    unsigned m = operand(e, u, w, arg, RAX);
    struct again_by result = {.kind = AGAIN_NEVER};
    if (plain)
        result = again_reg(u, w, what);
    else if (what == AND && u->rd != R_SINK)
        result = (struct again_by){TEST_REG, (uint8_t)w, u->rd, u->rd, 0};
    binary(e, u, w, what, m, arg & FLAGGED, result);
}

/* NEG and MVN come as these, too: from XZR. */
static void emit_mov(struct emit *e, const struct uop *u, uint32_t arg) {
    unsigned m = use(e, u->rm), d = def(e, u->rd);
    mov(e, arg & WIDE, d, m);
}

static void emit_add_imm(struct emit *e, const struct uop *u, uint32_t arg) {
    unsigned n = use(e, u->rn), d = def(e, u->rd);
    lea(e, arg & WIDE, d, n, (int32_t)u->imm);
}

static void emit_imm_flags(struct emit *e, const struct uop *u, uint32_t arg) {
    unsigned w = arg & WIDE, what = arg >> WHAT & 7, n = use(e, u->rn);
    if (u->rd == R_SINK && what == SUB) {
        if (u->imm == 0)
            test(e, w, n, n); /* no borrow: C is set, and the carry is clear */
        else
            alu_imm(e, w, CMP, n, (int32_t)u->imm);
    } else {
        unsigned d = def(e, u->rd);
        if (d != n)
            mov(e, 1, d, n);
        alu_imm(e, w, what, d, (int32_t)u->imm);
    }
    finish_flags(e, what, again_imm(u, w, what));
}

static void emit_logic_imm(struct emit *e, const struct uop *u, uint32_t arg) {
    unsigned w = arg & WIDE, what = arg >> WHAT & 7;
    if (what == OR && u->rn == R_ZR) {
        mov_imm(e, def(e, u->rd), u->imm);
        return;
    }
    bool small = w ? fits(u->imm) : true;
    if (!small && what == AND && !(arg & FLAGGED) && u->imm <= UINT32_MAX) {
        w = 0;
        small = true;
    }
    if (!small) {
        mov_imm(e, RAX, u->imm);
        struct again_by result = {.kind = AGAIN_NEVER};
        if (u->rd != R_SINK)
            result = (struct again_by){TEST_REG, (uint8_t)w, u->rd, u->rd, 0};
        binary(e, u, w, what, RAX, arg & FLAGGED, result);
        return;
    }
    unsigned n = use(e, u->rn);
    if (arg & FLAGGED && u->rd == R_SINK) {
        op_rr(e, w, 0xf7, 0, n);
        word32(e, (uint32_t)u->imm);
    } else if (what == AND && !(arg & FLAGGED) && width_of(u->imm) < 64) {
        zero_extend(e, width_of(u->imm), def(e, u->rd), n);
        e->spared = true;
    } else {
        unsigned d = def(e, u->rd);
        if (d != n)
            mov(e, 1, d, n);
        alu_imm(e, w, what, d, (int32_t)u->imm);
    }
    if (arg & FLAGGED)
        finish_flags(e, AND, again_imm(u, w, AND));
}

static void emit_carry(struct emit *e, const struct uop *u, uint32_t arg) {
    unsigned w = arg & WIDE, what = arg >> WHAT & 7;
    unsigned n = use(e, u->rn), m = use(e, u->rm);
    mov(e, 1, RDX, n);
    if (e->host_flags || e->regs.flags & FLAGS_AGAIN) {
        condition(e, 2); /* HS: whichever, NZCV is there */
    } else {
        need_flags(e);
        op_rr(e, 0, 0x0fba, 4, FLAGS); /* BT: the inverted C, as SBB wants it */
        byte(e, 8);
    }
    if (what == ADC)
        cmc(e);
    alu(e, w, what, RDX, m);
    if (arg & FLAGGED)
        finish_flags(e, what, (struct again_by){.kind = AGAIN_NEVER});
    unsigned d = def(e, u->rd);
    mov(e, 1, d, RDX);
}

bool adds_constant(const struct emitter *by, const struct uop *u, uint8_t *from, int32_t *constant) {
    if (!(by->arg & WIDE) || (by->emit != emit_add_imm && by->emit != emit_mov))
        return false;
    *from = by->emit == emit_mov ? u->rm : u->rn;
    *constant = by->emit == emit_mov ? 0 : (int32_t)u->imm;
    return true;
}

/* ---- Constants, addresses, bit fields ---------------------------------------------------------------------------- */

/* With the MOVKs that follow: they build one constant. */
static void emit_mov_imm(struct emit *e, const struct uop *u, uint32_t arg) {
    uint64_t value = u->imm;
    unsigned d = def(e, u->rd);
    for (const struct uop *k = u + 1; k->fn != NULL && k < e->block->uops + e->block->count; k++) {
        bool wide = a64_rows[k->row].plain == p_movk64;
        if (!(wide || a64_rows[k->row].plain == p_movk32) || k->rd != u->rd || u->rd == R_SINK)
            break;
        value = (value & ~(UINT64_C(0xffff) << k->ra)) | k->imm;
        if (!wide)
            value = (uint32_t)value;
        e->skip++;
    }
    mov_imm(e, d, value);
}

static void emit_movk(struct emit *e, const struct uop *u, uint32_t arg) {
    unsigned w = arg & WIDE, d = use_def(e, u->rd);
    mov_imm(e, RAX, ~(UINT64_C(0xffff) << u->ra));
    alu(e, w, AND, d, RAX);
    if (u->imm) {
        mov_imm(e, RAX, u->imm);
        alu(e, w, OR, d, RAX);
    }
}

static void emit_adr(struct emit *e, const struct uop *u, uint32_t arg) {
    lea(e, 1, def(e, u->rd), PAGE, pc_base(e, u) + (int32_t)u->imm);
}

static void emit_adrp(struct emit *e, const struct uop *u, uint32_t arg) {
    if (fits(u->imm)) {
        lea(e, 1, def(e, u->rd), PAGE, (int32_t)u->imm);
        return;
    }
    mov_imm(e, RAX, u->imm);
    op_rx(e, 1, 0x8d, def(e, u->rd), PAGE, RAX, 0);
}

bool makes_address(const struct emitter *by) { return by->emit == emit_adrp; }

/* Shift left, then right, which cuts a field out of both ends. */
static void shifts(struct emit *e, const struct uop *u, unsigned w, unsigned left, unsigned what, unsigned right) {
    unsigned n = use(e, u->rn), d = def(e, u->rd);
    if (d != n || (!w && !left && !right))
        mov(e, w, d, n);
    shift(e, w, SHL, d, left);
    shift(e, w, what, d, right);
}

static void emit_ubfm(struct emit *e, const struct uop *u, uint32_t arg) {
    unsigned w = arg & WIDE, size = w ? 64 : 32, immr = bits(u->insn, 16, 6), imms = bits(u->insn, 10, 6);
    bool up = imms < immr;
    unsigned width = up ? imms + 1 : imms - immr + 1, at = up ? size - immr : immr;
    if (!up && at == 0 && (width == 8 || width == 16 || width == 32)) {
        unsigned n = use(e, u->rn);
        zero_extend(e, width, def(e, u->rd), n);
        e->spared = true;
    } else if (width < 31 && (up ? width + at < size : imms < size - 1)) {
        unsigned n = use(e, u->rn), d = def(e, u->rd);
        if (d != n)
            mov(e, 1, d, n);
        if (!up)
            shift(e, w, SHR, d, at);
        alu_imm(e, 0, AND, d, (int32_t)((1u << width) - 1));
        if (up)
            shift(e, w, SHL, d, at);
    } else if (up) {
        shifts(e, u, w, size - width, SHR, size - width - at);
    } else {
        shifts(e, u, w, size - 1 - imms, SHR, size - width);
    }
}

static void emit_sbfm(struct emit *e, const struct uop *u, uint32_t arg) {
    unsigned w = arg & WIDE, size = w ? 64 : 32, width = size - (unsigned)u->imm;
    if (u->ra == u->imm && (width == 8 || width == 16 || (width == 32 && w))) {
        unsigned n = use(e, u->rn), d = def(e, u->rd);
        sign_extend(e, w, width, d, n);
        e->spared = true;
    } else {
        shifts(e, u, w, (unsigned)u->imm, SAR, u->ra);
    }
}

static void emit_bfm(struct emit *e, const struct uop *u, uint32_t arg) {
    unsigned w = arg & WIDE, n = use(e, u->rn), d = use_def(e, u->rd);
    mov(e, w, RAX, n);
    shift(e, w, ROR, RAX, u->ra);
    if (!w || fits(u->imm)) {
        alu_imm(e, w, AND, RAX, (int32_t)u->imm);
    } else {
        mov_imm(e, RCX, u->imm);
        alu(e, w, AND, RAX, RCX);
    }
    if (!w || fits(~u->imm)) {
        alu_imm(e, w, AND, d, (int32_t)~u->imm);
    } else {
        mov_imm(e, RCX, ~u->imm);
        alu(e, w, AND, d, RCX);
    }
    alu(e, w, OR, d, RAX);
}

static void emit_extr(struct emit *e, const struct uop *u, uint32_t arg) {
    unsigned w = arg & WIDE, n = use(e, u->rn), m = use(e, u->rm);
    if (n == m) { /* ROR */
        unsigned d = def(e, u->rd);
        if (d != n || !w)
            mov(e, w, d, n);
        shift(e, w, ROR, d, (unsigned)u->imm);
        return;
    }
    mov(e, w, RAX, m);
    if (u->imm) {
        op_rr(e, w, 0x0fac, n, RAX); /* SHRD */
        byte(e, (unsigned)u->imm);
    }
    mov(e, 1, def(e, u->rd), RAX);
}

static void emit_shift_by(struct emit *e, const struct uop *u, uint32_t arg) {
    unsigned w = arg & WIDE, n = use(e, u->rn), m = use(e, u->rm);
    mov(e, 0, RCX, m);
    mov(e, w, RAX, n);
    op_rr(e, w, 0xd3, arg >> WHAT & 7, RAX);
    mov(e, 1, def(e, u->rd), RAX);
}

static void emit_rev(struct emit *e, const struct uop *u, uint32_t arg) {
    unsigned w = arg & WIDE, n = use(e, u->rn), d = def(e, u->rd);
    mov(e, w, d, n);
    opcode(e, w, 0x0fc8 | (d & 7), 0, 0, d);
}

static void emit_clz(struct emit *e, const struct uop *u, uint32_t arg) {
    unsigned w = arg & WIDE, n = use(e, u->rn);
    mov_imm(e, RCX, w ? 127 : 63); /* BSR leaves no result for 0 */
    op_rr(e, w, 0x0fbd, RAX, n);
    op_rr(e, w, 0x0f40 | E, RAX, RCX);
    alu_imm(e, 0, XOR, RAX, w ? 63 : 31);
    mov(e, 1, def(e, u->rd), RAX);
}

/* ---- Multiplication, division ------------------------------------------------------------------------------------ */

enum { LONG_UNSIGNED = 1 << 3, LONG_SIGNED = 2 << 3, SUBTRACTED = 1 << 5 };

static void emit_madd(struct emit *e, const struct uop *u, uint32_t arg) {
    unsigned w = arg & WIDE, n = use(e, u->rn), m = use(e, u->rm);
    unsigned a = u->ra == R_ZR ? NO_REG : use(e, u->ra);
    if (arg & LONG_SIGNED) {
        op_rr(e, 1, 0x63, RAX, n);
        op_rr(e, 1, 0x63, RCX, m);
        m = RCX;
    } else if (arg & LONG_UNSIGNED) {
        mov(e, 0, RAX, n);
        mov(e, 0, RCX, m);
        m = RCX;
    } else if (a == NO_REG && !(arg & SUBTRACTED)) {
        unsigned d = def(e, u->rd);
        if (d != n && d != m)
            mov(e, 1, d, n);
        op_rr(e, w, 0x0faf, d, d == m ? n : m);
        return;
    } else {
        mov(e, 1, RAX, n);
    }
    op_rr(e, w, 0x0faf, RAX, m);
    unsigned d = def(e, u->rd);
    if (arg & SUBTRACTED) {
        if (a == NO_REG) {
            op_rr(e, w, 0xf7, 3, RAX);
        } else {
            mov(e, 1, RCX, a);
            alu(e, w, SUB, RCX, RAX);
            mov(e, 1, d, RCX);
            return;
        }
    } else if (a != NO_REG) {
        op_rx(e, w, 0x8d, d, RAX, a, 0);
        return;
    }
    mov(e, 1, d, RAX);
}

static void emit_mulh(struct emit *e, const struct uop *u, uint32_t arg) {
    unsigned n = use(e, u->rn), m = use(e, u->rm);
    mov(e, 1, RAX, n);
    op_rr(e, 1, 0xf7, arg, m); /* MUL, IMUL: into RDX:RAX */
    unsigned d = def(e, u->rd);
    mov(e, 1, d, RDX);
}

/* By 0 it is 0; by -1 a negation, where IDIV would trap for the lowest number. */
static void emit_div(struct emit *e, const struct uop *u, uint32_t arg) {
    unsigned w = arg & WIDE, n = use(e, u->rn), m = use(e, u->rm);
    bool is_signed = arg & INVERTED;
    mov_imm(e, RAX, 0);
    test(e, w, m, m);
    uint8_t *zero = jcc(e, E), *minus_one = NULL, *done = NULL;
    mov(e, w, RAX, n);
    if (is_signed) {
        alu_imm(e, w, CMP, m, -1);
        minus_one = jcc(e, E);
        opcode(e, w, 0x99, 0, 0, 0); /* CDQ, CQO */
        op_rr(e, w, 0xf7, 7, m);
        done = jmp(e);
        here(e, minus_one);
        op_rr(e, w, 0xf7, 3, RAX);
        here(e, done);
    } else {
        mov_imm(e, RDX, 0);
        op_rr(e, w, 0xf7, 6, m);
    }
    here(e, zero);
    mov(e, 1, def(e, u->rd), RAX);
}

/* ---- Conditions -------------------------------------------------------------------------------------------------- */

enum { SELECT, INCREMENT, INVERT, NEGATE };

/* Nothing before the CMOV touches the host's flags. */
static void emit_select(struct emit *e, const struct uop *u, uint32_t arg) {
    unsigned w = arg & WIDE, what = arg >> WHAT & 7, arm = bits(u->insn, 12, 4);
    if (arm >= 14) {
        unsigned n = use(e, u->rn);
        mov(e, w, def(e, u->rd), n);
        return;
    }
    if (u->rn == R_ZR && u->rm == R_ZR && (what == INCREMENT || what == INVERT)) { /* CSET, CSETM */
        unsigned holds = condition(e, arm), d = def(e, u->rd);
        op_rr(e, 0, (0x0f90 | (holds ^ 1)) | BYTE_REG, 0, RAX);
        op_rr(e, 0, 0x0fb6, d, RAX);
        if (what == INVERT) {
            op_rr(e, w, 0xf7, 3, d);
            e->host_flags = false;
        }
        return;
    }
    unsigned n = use(e, u->rn), m = use(e, u->rm), holds = condition(e, arm), d = def(e, u->rd);
    unsigned other = d == n ? RAX : d;
    if (what == INCREMENT) {
        lea(e, w, other, m, 1);
    } else if (what == SELECT && d == n) {
        other = m;
    } else {
        mov(e, 1, other, m);
        if (what != SELECT)
            op_rr(e, w, 0xf7, 2, other); /* NOT */
        if (what == NEGATE)
            lea(e, w, other, other, 1);
    }
    if (d == n)
        op_rr(e, w, 0x0f40 | (holds ^ 1), d, other);
    else
        op_rr(e, w, 0x0f40 | holds, d, n);
}

static uint32_t raw_flags(unsigned nzcv) {
    return (nzcv & 8 ? RAW_N : 0) | (nzcv & 4 ? RAW_Z : 0) | (nzcv & 2 ? 0 : RAW_NOT_C) | (nzcv & 1 ? RAW_V : 0);
}

static void emit_compare_if(struct emit *e, const struct uop *u, uint32_t arg) {
    unsigned w = arg & WIDE, what = arg >> WHAT & 7, arm = bits(u->insn, 12, 4);
    bool immediate = arg >> KIND & 7;
    unsigned n = use(e, u->rn), m = immediate ? NO_REG : use(e, u->rm);
    uint8_t *otherwise = NULL, *done = NULL;
    if (arm < 14)
        otherwise = jcc(e, condition(e, arm) ^ 1);
    if (what == SUB && immediate) {
        alu_imm(e, w, CMP, n, (int32_t)u->imm);
    } else if (what == SUB) {
        alu(e, w, CMP, n, m);
    } else {
        mov(e, 1, RDX, n);
        if (immediate)
            alu_imm(e, w, ADD, RDX, (int32_t)u->imm);
        else
            alu(e, w, ADD, RDX, m);
        cmc(e);
    }
    byte(e, 0x9f); /* LAHF */
    op_rr(e, 0, 0x0f90 | O, 0, RAX);
    if (otherwise) {
        done = jmp(e);
        here(e, otherwise);
        mov_imm(e, RAX, raw_flags(u->ra));
        here(e, done);
    }
    mov(e, 0, FLAGS, RAX);
    e->regs.flags = FLAGS_IN_REG;
    e->host_flags = false;
}

/* ---- Branches ---------------------------------------------------------------------------------------------------- */

static void emit_b(struct emit *e, const struct uop *u, uint32_t arg) {
    int32_t target = pc_base(e, u) + (int32_t)u->imm;
    if (arg) /* BL */
        lea(e, 1, def(e, 30), PAGE, page_offset(e, u) + 4);
    if (u < &e->block->uops[e->block->count - 1] && next_offset(e, u) == target)
        return;
    leave_to(e, u, target);
    e->ended = true;
}

static void branch_if(struct emit *e, const struct uop *u, unsigned holds) {
    int32_t target = pc_base(e, u) + (int32_t)u->imm, next = page_offset(e, u) + 4;
    if (next_offset(e, u) == target && target != next)
        side_exit(e, u, jcc(e, holds ^ 1), next);
    else
        side_exit(e, u, jcc(e, holds), target);
}

static void emit_b_cond(struct emit *e, const struct uop *u, uint32_t arg) {
    unsigned arm = bits(u->insn, 0, 4);
    if (arm >= 14) {
        leave_to(e, u, pc_base(e, u) + (int32_t)u->imm);
        e->ended = true;
        return;
    }
    branch_if(e, u, condition(e, arm));
}

static void emit_cbz(struct emit *e, const struct uop *u, uint32_t arg) {
    unsigned n = use(e, u->rn);
    test(e, arg & WIDE, n, n);
    e->host_flags = false;
    branch_if(e, u, arg & INVERTED ? NE : E);
}

static void emit_tbz(struct emit *e, const struct uop *u, uint32_t arg) {
    unsigned n = use(e, u->rn);
    e->host_flags = false;
    if (u->ra < 32) {
        test_imm(e, n, UINT32_C(1) << u->ra);
        branch_if(e, u, arg & INVERTED ? NE : E);
    } else {
        op_rr(e, 1, 0x0fba, 4, n);
        byte(e, u->ra);
        branch_if(e, u, arg & INVERTED ? B : AE);
    }
}

static void emit_br(struct emit *e, const struct uop *u, uint32_t arg) {
    need_flags(e); /* before RAX is taken */
    mov(e, 1, RAX, use(e, u->rn));
    if (arg) /* BLR */
        lea(e, 1, def(e, 30), PAGE, page_offset(e, u) + 4);
    leave_by_register(e, u);
    e->ended = true;
}

/* ---- System: what is only a read of vCPU state ------------------------------------------------------------------- */

static void emit_nothing(struct emit *e, const struct uop *u, uint32_t arg) {}

/* The host reorders nothing but stores and later loads: loads against all and stores against stores cost nothing. */
static void emit_barrier(struct emit *e, const struct uop *u, uint32_t arg) {
    if (u->imm == 1 || u->imm == 2)
        return;
    byte(e, 0xf0);
    alu_mem_imm(e, OR, RSP, 0, 0);
}

static void emit_mrs_plain(struct emit *e, const struct uop *u, uint32_t arg) {
    load(e, 1, def(e, u->rd), CPU, (int32_t)arg);
}

/* The byte before says whether it is allowed; it is part of the vCPU's mode, which blocks may meet in any. */
static void read_if(struct emit *e, const struct uop *u, int32_t mode, int32_t value) {
    unsigned d = reserve(e, u->rd);
    cmp_byte(e, mode, 0);
    struct outlined *o = slow_call(e, u);
    also_from(o, jcc(e, E));
    load(e, 1, d, CPU, value);
    dirty(e, u->rd);
    comes_back(e, o);
}
static void emit_mrs_sp_el0(struct emit *e, const struct uop *u, uint32_t arg) {
    read_if(e, u, AT(spsel), AT(sys.sp_el0));
}

static void emit_mrs_tpidr_el1(struct emit *e, const struct uop *u, uint32_t arg) {
    read_if(e, u, AT(el), AT(sys.tpidr_el1));
}

static void emit_msr_bit(struct emit *e, const struct uop *u, uint32_t arg) {
    op_rm(e, 0, 0xc6, 0, CPU, arg); /* MOV byte [], imm8 */
    byte(e, u->imm & 1);
}

static void emit_mrs_daif(struct emit *e, const struct uop *u, uint32_t arg) {
    unsigned d = reserve(e, u->rd);
    cmp_byte(e, AT(el), 0);
    struct outlined *o = slow_call(e, u);
    also_from(o, jcc(e, E));
    load(e, 0, d, CPU, AT(daif));
    dirty(e, u->rd);
    comes_back(e, o);
}

/* Interrupts that are masked, or not pending, change nothing else; but the mask of debug exceptions may. */
enum { DAIF_WRITE, DAIF_SET, DAIF_CLEAR };
_Static_assert(offsetof(struct vcpu, fiq_line) == offsetof(struct vcpu, irq_line) + 1 &&
                   offsetof(struct vcpu, step_armed) == offsetof(struct vcpu, irq_line) + 2 &&
                   offsetof(struct vcpu, exiting) == offsetof(struct vcpu, irq_line) + 3,
               "all are tested at once");
static void emit_msr_daif(struct emit *e, const struct uop *u, uint32_t arg) {
    unsigned n = arg == DAIF_WRITE ? use(e, u->rn) : NO_REG;
    struct outlined *o = arg == DAIF_SET ? slow_call(e, u) : last_call(e, u);
    cmp_byte(e, AT(el), 0);
    also_from(o, jcc(e, E));
    if (arg != DAIF_SET) {
        op_rm(e, 0, 0x83, CMP, CPU, AT(irq_line));
        byte(e, 0);
        also_from(o, jcc(e, NE));
    }
    if (arg == DAIF_WRITE) {
        mov(e, 0, RAX, n);
        alu_imm(e, 0, AND, RAX, DAIF_ALL);
        store(e, 0, RAX, CPU, AT(daif));
    } else if (arg == DAIF_SET) {
        alu_mem_imm(e, OR, CPU, AT(daif), (int32_t)u->imm);
    } else {
        alu_mem_imm(e, AND, CPU, AT(daif), ~(int32_t)u->imm);
    }
    comes_back(e, o);
}

/* Bytes, then nibbles, pairs and bits in them. */
static void emit_rbit(struct emit *e, const struct uop *u, uint32_t arg) {
    unsigned w = arg & WIDE, n = use(e, u->rn);
    static const uint64_t masks[] = {0x0f0f0f0f0f0f0f0f, 0x3333333333333333, 0x5555555555555555};
    mov(e, w, RAX, n);
    opcode(e, w, 0x0fc8 | RAX, 0, 0, RAX);
    for (unsigned i = 0; i < 3; i++) {
        mov_imm(e, RCX, w ? masks[i] : (uint32_t)masks[i]);
        mov(e, w, RDX, RAX);
        shift(e, w, SHR, RDX, 4 >> i);
        alu(e, w, AND, RDX, RCX);
        alu(e, w, AND, RAX, RCX);
        shift(e, w, SHL, RAX, 4 >> i);
        alu(e, w, OR, RAX, RDX);
    }
    mov(e, 1, def(e, u->rd), RAX);
}

/* ---- The table --------------------------------------------------------------------------------------------------- */

#define ARG(w, what, kind, more) ((w) | (what) << WHAT | (kind) << KIND | (more))
#define WIDTHS(name, suffix, emitter, argument, effects)                                                               \
    {p_##name##32##suffix, emitter, argument, effects}, {p_##name##64##suffix, emitter, (argument) | WIDE, effects}
#define SHIFTED(name, what, more, effects)                                                                             \
    WIDTHS(name, _reg, emit_binary, ARG(0, what, K_REG, more), effects),                                               \
    WIDTHS(name, _lsl, emit_binary, ARG(0, what, K_LSL, more), effects),                                               \
    WIDTHS(name, _lsr, emit_binary, ARG(0, what, K_LSR, more), effects),                                               \
    WIDTHS(name, _asr, emit_binary, ARG(0, what, K_ASR, more), effects)
#define ARITHMETIC(name, what, more, effects)                                                                          \
    SHIFTED(name, what, more, effects), WIDTHS(name, _ext, emit_binary, ARG(0, what, K_EXT, more), effects)
#define LOGIC(name, what, more, effects)                                                                               \
    SHIFTED(name, what, more, effects), WIDTHS(name, _ror, emit_binary, ARG(0, what, K_ROR, more), effects)

const struct emitter jit_x64_int[] = {
    ARITHMETIC(add, ADD, 0, 0),
    ARITHMETIC(sub, SUB, 0, 0),
    ARITHMETIC(adds, ADD, FLAGGED, SETS),
    ARITHMETIC(subs, SUB, FLAGGED, SETS),
    LOGIC(and, AND, 0, 0),
    LOGIC(bic, AND, INVERTED, 0),
    LOGIC(orr, OR, 0, 0),
    LOGIC(orn, OR, INVERTED, 0),
    LOGIC(eor, XOR, 0, 0),
    LOGIC(eon, XOR, INVERTED, 0),
    LOGIC(ands, AND, FLAGGED, SETS),
    LOGIC(bics, AND, FLAGGED | INVERTED, SETS),
    WIDTHS(mov, _reg, emit_mov, 0, KEEPS),
    WIDTHS(add, _imm, emit_add_imm, 0, KEEPS),
    WIDTHS(adds, _imm, emit_imm_flags, ARG(0, ADD, 0, 0), SETS),
    WIDTHS(subs, _imm, emit_imm_flags, ARG(0, SUB, 0, 0), SETS),
    WIDTHS(and, _imm, emit_logic_imm, ARG(0, AND, 0, 0), 0),
    WIDTHS(orr, _imm, emit_logic_imm, ARG(0, OR, 0, 0), 0),
    WIDTHS(eor, _imm, emit_logic_imm, ARG(0, XOR, 0, 0), 0),
    WIDTHS(ands, _imm, emit_logic_imm, ARG(0, AND, 0, FLAGGED), SETS),
    WIDTHS(adc, , emit_carry, ARG(0, ADC, 0, 0), USES),
    WIDTHS(sbc, , emit_carry, ARG(0, SBB, 0, 0), USES),
    WIDTHS(adcs, , emit_carry, ARG(0, ADC, 0, FLAGGED), USES | SETS),
    WIDTHS(sbcs, , emit_carry, ARG(0, SBB, 0, FLAGGED), USES | SETS),
    {p_mov_imm, emit_mov_imm, 0, KEEPS},
    WIDTHS(movk, , emit_movk, 0, 0),
    {p_adr, emit_adr, 0, KEEPS},
    {p_adrp, emit_adrp, 0, KEEPS},
    WIDTHS(ubfm, , emit_ubfm, 0, 0),
    WIDTHS(sbfm, , emit_sbfm, 0, 0),
    WIDTHS(bfm, , emit_bfm, 0, 0),
    WIDTHS(extr, , emit_extr, 0, 0),
    WIDTHS(lslv, , emit_shift_by, ARG(0, SHL, 0, 0), 0),
    WIDTHS(lsrv, , emit_shift_by, ARG(0, SHR, 0, 0), 0),
    WIDTHS(asrv, , emit_shift_by, ARG(0, SAR, 0, 0), 0),
    WIDTHS(rorv, , emit_shift_by, ARG(0, ROR, 0, 0), 0),
    {p_rev32, emit_rev, 0, KEEPS},
    {p_rev64, emit_rev, WIDE, KEEPS},
    WIDTHS(clz, , emit_clz, 0, 0),
    WIDTHS(madd, , emit_madd, 0, 0),
    WIDTHS(msub, , emit_madd, SUBTRACTED, 0),
    {p_smaddl, emit_madd, WIDE | LONG_SIGNED, 0},
    {p_smsubl, emit_madd, WIDE | LONG_SIGNED | SUBTRACTED, 0},
    {p_umaddl, emit_madd, WIDE | LONG_UNSIGNED, 0},
    {p_umsubl, emit_madd, WIDE | LONG_UNSIGNED | SUBTRACTED, 0},
    {p_umulh, emit_mulh, 4, 0},
    {p_smulh, emit_mulh, 5, 0},
    WIDTHS(udiv, , emit_div, 0, 0),
    WIDTHS(sdiv, , emit_div, INVERTED, 0),
    WIDTHS(csel, , emit_select, ARG(0, SELECT, 0, 0), USES | KEEPS),
    WIDTHS(csinc, , emit_select, ARG(0, INCREMENT, 0, 0), USES | KEEPS),
    WIDTHS(csinv, , emit_select, ARG(0, INVERT, 0, 0), USES | KEEPS),
    WIDTHS(csneg, , emit_select, ARG(0, NEGATE, 0, 0), USES | KEEPS),
    WIDTHS(ccmp, _reg, emit_compare_if, ARG(0, SUB, 0, 0), USES | SETS | NO_RD),
    WIDTHS(ccmn, _reg, emit_compare_if, ARG(0, ADD, 0, 0), USES | SETS | NO_RD),
    WIDTHS(ccmp, _imm, emit_compare_if, ARG(0, SUB, 1, 0), USES | SETS | NO_RD),
    WIDTHS(ccmn, _imm, emit_compare_if, ARG(0, ADD, 1, 0), USES | SETS | NO_RD),
    {p_b, emit_b, 0, TRAPS | ENDS | KEEPS | NO_RD},
    {p_bl, emit_b, 1, TRAPS | ENDS | KEEPS | NO_RD | LINKS},
    {p_b_cond, emit_b_cond, 0, USES | TRAPS | ENDS | KEEPS | NO_RD},
    {p_cbz32, emit_cbz, 0, TRAPS | ENDS | NO_RD},
    {p_cbz64, emit_cbz, WIDE, TRAPS | ENDS | NO_RD},
    {p_cbnz32, emit_cbz, INVERTED, TRAPS | ENDS | NO_RD},
    {p_cbnz64, emit_cbz, WIDE | INVERTED, TRAPS | ENDS | NO_RD},
    {p_tbz, emit_tbz, 0, TRAPS | ENDS | NO_RD},
    {p_tbnz, emit_tbz, INVERTED, TRAPS | ENDS | NO_RD},
    {p_br, emit_br, 0, TRAPS | ENDS | KEEPS | NO_RD},
    {p_blr, emit_br, 1, TRAPS | ENDS | KEEPS | NO_RD | LINKS},
    {p_nop, emit_nothing, 0, KEEPS | NO_RD},
    {p_dmb, emit_barrier, 0, NO_RD},
    WIDTHS(rbit, , emit_rbit, 0, 0),
    {p_msr_dit, emit_msr_bit, AT(dit), KEEPS | NO_RD},
    {p_msr_ssbs, emit_msr_bit, AT(ssbs), KEEPS | NO_RD},
    {p_mrs_daif, emit_mrs_daif, 0, TRAPS},
    {p_msr_daif, emit_msr_daif, DAIF_WRITE, TRAPS | ENDS | NO_RD},
    {p_msr_daifset, emit_msr_daif, DAIF_SET, TRAPS | NO_RD},
    {p_msr_daifclr, emit_msr_daif, DAIF_CLEAR, TRAPS | ENDS | NO_RD},
    {p_mrs_tpidr_el0, emit_mrs_plain, AT(sys.tpidr_el0), KEEPS},
    {p_mrs_sp_el0, emit_mrs_sp_el0, 0, TRAPS},
    {p_mrs_tpidr_el1, emit_mrs_tpidr_el1, 0, TRAPS},
    {NULL, NULL, 0, 0},
};

#endif
