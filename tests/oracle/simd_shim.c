/* Runs single SIMD ops on given registers, for tests/oracle/test_portable.py. */
#include <stdlib.h>

#include "engine.h"

bool exc_fp_access(struct vcpu *c, const struct uop *u) { return (void)c, (void)u, abort(), false; }
const struct uop *next_block(struct vcpu *c) { return (void)c, abort(), NULL; }

#define OPS(WITH)                                                                                                      \
    WITH(aese) WITH(aesd) WITH(aesmc) WITH(aesimc) WITH(pmull64) WITH(v_fmla) WITH(v_fmls)
#define DECLARE(name) bool p_##name(struct vcpu *c, const struct uop *u);
OPS(DECLARE)
#define ROW(name) {#name, p_##name},
static const struct {
    const char *name;
    bool (*op)(struct vcpu *, const struct uop *);
} ops[] = {OPS(ROW)};

/* in: destination, first and second operand of each case; out: the destination. aux: uop.aux, on 128 bits. */
bool run(const char *name, uint32_t aux, size_t count, const vreg (*in)[3], vreg *out) {
    struct vcpu *c = calloc(1, sizeof *c);
    struct uop u = {.rd = 0, .rn = 1, .rm = 2, .ra = (uint8_t)(16 >> (aux & 3)), .aux = aux};
    for (size_t op = 0; c && op < sizeof ops / sizeof *ops; op++) {
        if (strcmp(ops[op].name, name))
            continue;
        for (size_t i = 0; i < count; i++) {
            memcpy(c->v, in[i], sizeof in[i]);
            c->fpsr = FPSR_IXC;
            ops[op].op(c, &u);
            out[i] = c->v[0];
        }
        free(c);
        return true;
    }
    free(c);
    return false;
}
