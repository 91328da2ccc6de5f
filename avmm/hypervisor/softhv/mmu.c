/* The EL1&0 translation regime (D8), instruction fetch, and the slow paths of loads and stores. */
#include "engine.h"

enum { /* fault status codes; the level goes into bits 1:0 (D17.2.37, DFSC) */
    FAULT_ADDRESS_SIZE = 0x00, FAULT_TRANSLATION = 0x04, FAULT_ACCESS_FLAG = 0x08, FAULT_PERMISSION = 0x0c,
    FAULT_EXTERNAL_WALK = 0x14, FAULT_ALIGNMENT = 0x21, FAULT_STAGE2_TRANSLATION = 0x07, FAULT_STAGE2_PERMISSION = 0x0f
};
enum { PA_BITS = 40 /* ID_AA64MMFR0_EL1.PARange */ };
#define BIT(n) (UINT64_C(1) << (n))
#define TCR_EPD(upper) BIT((upper) ? 23 : 7)
#define TCR_TBI(upper) BIT(37 + (upper))
#define TCR_E0PD(upper) BIT(55 + (upper))

uint64_t untag(const struct vcpu *c, uint64_t va) {
    if (!(c->sys.tcr & TCR_TBI(half_of(va))))
        return va;
    return (uint64_t)((int64_t)(va << 8) >> 8);
}

uint64_t mmu_asid_in(const struct vcpu *c, uint64_t value) {
    return c->sys.tcr & BIT(36) ? value >> 48 : value >> 48 & 0xff; /* TCR_EL1.AS */
}

uint64_t mmu_asid(const struct vcpu *c) {
    return mmu_asid_in(c, c->sys.tcr >> 22 & 1 ? c->sys.ttbr1 : c->sys.ttbr0); /* TCR_EL1.A1 */
}

/* ---- The walk --------------------------------------------------------------------------------------------------- */

static struct translation fault(unsigned code, unsigned level) { return (struct translation){.fault = code | level}; }

static bool read_descriptor(struct vcpu *c, uint64_t pa, uint64_t *descriptor) {
    struct ram *ram = vm_ram(c->vm, pa);
    if (!ram)
        return false;
    /* Other vCPUs may be writing it. */
    *descriptor = __atomic_load_n((const uint64_t *)(ram->host + (pa - ram->ipa)), __ATOMIC_ACQUIRE);
    return true;
}

static unsigned granule_bits(const struct vcpu *c, unsigned upper) {
    unsigned tg = c->sys.tcr >> (upper ? 30 : 14) & 3;
    static const uint8_t tg0[4] = {12, 16, 14, 12}, tg1[4] = {12, 14, 12, 16}; /* reserved values: 4 KiB */
    return upper ? tg1[tg] : tg0[tg];
}

static unsigned output_bits(const struct vcpu *c) {
    static const uint8_t ips[8] = {32, 36, 40, 42, 44, 48, 48, 48};
    unsigned size = ips[c->sys.tcr >> 32 & 7];
    return size < PA_BITS ? size : PA_BITS;
}

/* Attributes a table descriptor imposes on what is below it: bits 63:59 of all of them, ORed. */
static void permissions(struct vcpu *c, struct translation *t, uint64_t descriptor, uint64_t tables, unsigned idx) {
    bool user = (descriptor >> 6 & 1) && !(tables >> 61 & 1);
    bool read_only = (descriptor >> 7 & 1) || (tables >> 62 & 1);
    bool uxn = (descriptor >> 54 & 1) || (tables >> 60 & 1);
    bool pxn = (descriptor >> 53 & 1) || (tables >> 59 & 1);
    bool wxn = c->sys.sctlr & SCTLR_WXN;
    if (idx == MMU_EL0) {
        t->read = user;
        t->write = user && !read_only;
        t->exec = !uxn && !(wxn && t->write);
    } else {
        bool hidden = idx == MMU_EL1_PAN && user;
        t->read = !hidden;
        t->write = !read_only && !hidden;
        t->exec = !pxn && !(user && !read_only) && !(wxn && !read_only);
    }
}

struct translation mmu_translate(struct vcpu *c, uint64_t va, enum access access, unsigned idx) {
    unsigned upper = half_of(va);
    va = untag(c, va);
    if (!(c->sys.sctlr & SCTLR_M)) {
        if (va >> PA_BITS)
            return fault(FAULT_ADDRESS_SIZE, 0);
        return (struct translation){.pa = va, .fault = NO_FAULT, .device = access != ACCESS_EXEC, .read = true,
                                    .write = true, .exec = true, .sh = 2, .page_bits = PAGE_BITS, .global = true};
    }
    uint64_t tcr = c->sys.tcr;
    unsigned size_field = tcr >> (upper ? 16 : 0) & 0x3f;
    unsigned input = 64 - (size_field < 16 ? 16 : size_field > 39 ? 39 : size_field);
    uint64_t beyond = upper ? ~va : va;
    if (beyond >> input || tcr & TCR_EPD(upper) || (idx == MMU_EL0 && tcr & TCR_E0PD(upper)))
        return fault(FAULT_TRANSLATION, 0);

    unsigned granule = granule_bits(c, upper), stride = granule - 3, output = output_bits(c);
    unsigned level = 4 - (input - granule + stride - 1) / stride;
    unsigned shift = granule + (3 - level) * stride;
    uint64_t index = va >> shift & (BIT(input - shift) - 1); /* the first table may be a part of one, or several */
    uint64_t base = (upper ? c->sys.ttbr1 : c->sys.ttbr0) & (BIT(48) - 2);
    unsigned table_bits = input - shift + 3;
    base &= ~(BIT(table_bits < 6 ? 6 : table_bits) - 1);
    if (base >> output)
        return fault(FAULT_ADDRESS_SIZE, 0);

    uint64_t tables = 0, descriptor;
    for (;; level++) {
        if (!read_descriptor(c, base + index * 8, &descriptor))
            return fault(FAULT_EXTERNAL_WALK, level);
        if (!(descriptor & 1))
            return fault(FAULT_TRANSLATION, level);
        bool table = descriptor & 2;
        if (level == 3 ? !table : !table && (level == 0 || (level == 1 && granule != 12)))
            return fault(FAULT_TRANSLATION, level);
        bool last = level == 3 || !table;
        uint64_t address = descriptor & (BIT(48) - 1) & ~(BIT(last ? shift : granule) - 1);
        if (address >> output)
            return fault(FAULT_ADDRESS_SIZE, level);
        base = address;
        if (last)
            break;
        tables |= descriptor;
        shift -= stride;
        index = va >> shift & (BIT(stride) - 1);
    }

    if (!(descriptor >> 10 & 1))
        return fault(FAULT_ACCESS_FLAG, level);
    struct translation t = {.fault = NO_FAULT, .page_bits = (uint8_t)shift, .sh = descriptor >> 8 & 3,
                            .global = !(descriptor >> 11 & 1)};
    t.pa = base | (va & (BIT(shift) - 1));
    t.attr = (uint8_t)(c->sys.mair >> (8 * (descriptor >> 2 & 7)));
    t.device = !(t.attr & 0xf0);
    permissions(c, &t, descriptor, tables, idx);
    if (access == ACCESS_READ ? !t.read : access == ACCESS_WRITE ? !t.write : !t.exec)
        t.fault = FAULT_PERMISSION | level;
    return t;
}

/* ---- Instruction fetch ------------------------------------------------------------------------------------------ */

bool mmu_fetch(struct vcpu *c, uint64_t *pa, const uint8_t **host) {
    c->pc = untag(c, c->pc);
    uint64_t pc = c->pc, offset = pc & (PAGE_SIZE - 1);
    if (pc & 3)
        return exc_pc_alignment(c, pc);
    const struct fetch_entry *e = fetch_entry(c->code[c->el], pc);
    if (e->va != pc - offset) {
        struct translation t = mmu_translate(c, pc, ACCESS_EXEC, c->el ? MMU_EL1 : MMU_EL0);
        if (t.fault != NO_FAULT)
            return exc_prefetch_abort(c, pc, t.fault);
        struct ram *ram = vm_ram(c->vm, t.pa);
        uint32_t ifsc = ram ? FAULT_STAGE2_PERMISSION : FAULT_STAGE2_TRANSLATION;
        if (!ram || !(ram->flags & HV_MEMORY_EXEC))
            return exit_exception(c, pc, syndrome(EC_IABT_LOWER, ifsc), pc, t.pa);
        fetch_fill(c, &t, ram);
        code_offer(c, pc - offset, e->pa);
    }
    *pa = e->pa + offset;
    *host = e->host + offset;
    return true;
}

/* ---- Exits of data accesses ------------------------------------------------------------------------------------- */

/*
 * The instruction's part of a data abort's syndrome (D17.2.37): valid for loads and stores of one general register
 * without writeback, acquire and release included.
 */
static uint32_t access_syndrome(uint32_t insn) {
    enum { ISV = 1 << 24, SSE = 1 << 21, SF = 1 << 15, AR = 1 << 14 };
    unsigned size = insn >> 30, opc = bits(insn, 22, 2), rt = bits(insn, 0, 5);
    uint32_t valid = ISV | rt << 16;
    if ((insn & 0x3f000000) == 0x08000000) { /* LDAR, STLR, LDLAR, STLLR */
        bool ordered = bits(insn, 23, 1) && !bits(insn, 21, 1);
        return ordered ? valid | size << 22 | (size == 3 ? SF : 0) | AR : 0;
    }
    if ((insn & 0x3ffffc00) == 0x38bfc000) /* LDAPR */
        return valid | size << 22 | (size == 3 ? SF : 0) | AR;
    if ((insn & 0x3f000000) == 0x18000000) /* LDR (literal), LDRSW (literal) */
        return size == 0   ? valid | 2 << 22
               : size == 1 ? valid | 3 << 22 | SF
               : size == 2 ? valid | 2 << 22 | SSE | SF
                           : 0;
    bool plain = (insn & 0x3f000000) == 0x39000000 ||                             /* unsigned offset */
                 (insn & 0x3f200400) == 0x38000000 ||                             /* LDUR, LDTR and their like */
                 (insn & 0x3f200c00) == 0x38200800;                               /* register offset */
    if (!plain || (size == 3 && opc >= 2))
        return 0;
    bool wide = opc == 2 || (opc < 2 && size == 3);
    return valid | size << 22 | (opc >= 2 ? SSE : 0) | (wide ? SF : 0);
}

/* Neither RAM nor allowed: the host's affair. */
static bool exit_access(struct vcpu *c, const struct uop *u, uint64_t va, uint64_t pa, bool write, bool whole,
                        const struct ram *ram) {
    uint32_t iss = (whole ? access_syndrome(u->insn) : 0) | (uint32_t)write << 6 |
                   (ram ? FAULT_STAGE2_PERMISSION : FAULT_STAGE2_TRANSLATION);
    return exit_exception(c, pc_of(c, u), syndrome(EC_DABT_LOWER, iss), va, pa);
}

/* ---- Slow paths ------------------------------------------------------------------------------------------------- */

/* What `size` bytes count as for alignment: SIMD structures and pairs are checked by element (B2.5.2). */
static unsigned alignment_unit(uint32_t insn, unsigned size) {
    unsigned unit = size;
    if ((insn & 0x3a000000) == 0x28000000) { /* LDP, STP */
        unsigned opc = insn >> 30;
        unit = bits(insn, 26, 1) ? 4u << opc : opc & 2 ? 8 : 4;
    } else if ((insn & 0xbe000000) == 0x0c000000) { /* LD1-4, ST1-4 */
        unit = bits(insn, 24, 1) ? size : 1u << bits(insn, 10, 2);
    }
    return unit < size ? unit : size;
}

/* One page's part of an access: its host address, or gic_registers for a whole one. NULL: exception taken or exit prepared. */
static uint8_t *resolve(struct vcpu *c, const struct uop *u, uint64_t va, unsigned idx, bool write, bool aligned,
                        bool whole, uint64_t *pa) {
    const struct tlb_entry *e = tlb_entry(c->tlb[idx], va);
    if ((write ? e->write : e->read) == (va & PAGE_MASK)) { /* of an access to two pages */
        if (pa)
            *pa = (e->pa & PAGE_MASK) | (va & (PAGE_SIZE - 1));
        return (uint8_t *)(uintptr_t)(va + e->addend);
    }
    struct translation t = mmu_translate(c, va, write ? ACCESS_WRITE : ACCESS_READ, idx);
    if (t.fault == NO_FAULT && t.device && !aligned)
        t.fault = FAULT_ALIGNMENT;
    if (t.fault != NO_FAULT) {
        exc_data_abort(c, u, va, t.fault, write, false);
        return NULL;
    }
    struct ram *ram = vm_ram(c->vm, t.pa);
    if (unlikely(!ram || !(ram->flags & (write ? HV_MEMORY_WRITE : HV_MEMORY_READ)))) {
        if (!ram && c->gic && whole && access_syndrome(u->insn) && gic_has(c, t.pa)) {
            *pa = t.pa;
            return gic_registers;
        }
        exit_access(c, u, va, t.pa, write, whole, ram);
        return NULL;
    }
    tlb_fill(c, va, idx, &t, ram);
    if (pa)
        *pa = t.pa;
    return ram->host + (t.pa - ram->ipa);
}

struct span {
    uint8_t *low, *high; /* high: on the second page, or NULL */
    unsigned split;      /* bytes on the first */
    uint64_t pa;         /* of the GIC's register where low is gic_registers */
};

static bool resolve_span(struct vcpu *c, const struct uop *u, uint64_t va, unsigned size, unsigned idx, bool write,
                         struct span *span) {
    bool aligned = !(va & (alignment_unit(u->insn, size) - 1));
    if (!aligned && c->sys.sctlr & SCTLR_A)
        return exc_data_abort(c, u, va, FAULT_ALIGNMENT, write, false);
    unsigned room = PAGE_SIZE - (unsigned)(va & (PAGE_SIZE - 1));
    bool crossing = size > room;
    span->split = crossing ? room : size;
    span->high = NULL;
    span->low = resolve(c, u, va, idx, write, aligned, !crossing, &span->pa);
    if (span->low && crossing) {
        span->high = resolve(c, u, va + room, idx, write, aligned, false, NULL);
        return span->high;
    }
    return span->low;
}

bool mem_read_slow(struct vcpu *c, const struct uop *u, uint64_t va, unsigned size, unsigned idx, void *out) {
    struct span span;
    if (!resolve_span(c, u, va, size, idx, false, &span))
        return false;
    if (unlikely(span.low == gic_registers)) {
        gic_read(c, span.pa, size, out);
        return true;
    }
    guest_copy(out, span.low, span.split);
    if (span.high)
        guest_copy((uint8_t *)out + span.split, span.high, size - span.split);
    return true;
}

bool mem_write_slow(struct vcpu *c, const struct uop *u, uint64_t va, unsigned size, unsigned idx, const void *in) {
    struct span span;
    if (!resolve_span(c, u, va, size, idx, true, &span))
        return false;
    if (unlikely(span.low == gic_registers)) {
        gic_write(c, span.pa, size, in);
        return true;
    }
    guest_copy(span.low, in, span.split);
    if (span.high)
        guest_copy(span.high, (const uint8_t *)in + span.split, size - span.split);
    return true;
}

void *mem_ptr(struct vcpu *c, const struct uop *u, uint64_t va, unsigned size, unsigned idx, bool write, uint64_t *pa) {
    if (va & (size - 1)) {
        exc_data_abort(c, u, va, FAULT_ALIGNMENT, write, false);
        return NULL;
    }
    const struct tlb_entry *e = tlb_entry(c->tlb[idx], va);
    if (likely((write ? e->write : e->read) == (va & PAGE_MASK))) {
        if (pa)
            *pa = (e->pa & PAGE_MASK) | (va & (PAGE_SIZE - 1));
        return (void *)(uintptr_t)(va + e->addend);
    }
    bool aligned = size != ZVA_SIZE; /* DC ZVA to Device memory is an alignment fault */
    return resolve(c, u, va, idx, write, aligned, false, pa);
}

bool mmu_cache_op(struct vcpu *c, const struct uop *u, uint64_t va, bool write, uint64_t *pa) {
    const struct tlb_entry *e = tlb_entry(c->bank, va);
    if ((write ? e->write : e->read) == (va & PAGE_MASK)) {
        *pa = (e->pa & PAGE_MASK) | (va & (PAGE_SIZE - 1));
        return true;
    }
    /* At EL1 no permission is needed but for DC IVAC; PAN has no say. */
    unsigned idx = c->el ? MMU_EL1 : MMU_EL0;
    struct translation t = mmu_translate(c, va, write ? ACCESS_WRITE : ACCESS_READ, idx);
    if (t.fault != NO_FAULT)
        return exc_data_abort(c, u, va, t.fault, true, true);
    *pa = t.pa;
    return true;
}
