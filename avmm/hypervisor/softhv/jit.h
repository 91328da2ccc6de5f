/*
 * The seam between the dispatcher and a back end that makes host code of guest code. The interpreter's ops stay the
 * definition of every instruction: what a back end has no code for, it calls. Without a back end for the host, or
 * when memory for one cannot be had, c->jit is NULL and everything is interpreted.
 */
#ifndef SOFTHV_JIT_H
#define SOFTHV_JIT_H

#include "engine.h"

struct jit;

void jit_create(struct vcpu *c); /* fills c->jit, or leaves it NULL */
void jit_destroy(struct vcpu *c);

/* How often a block is interpreted before it is compiled; INT32_MAX: never. */
int32_t jit_threshold(const struct vcpu *c);

/* Host code for the guest code at `block`, or NULL: no room (jit_full() then says so), or nothing to be gained. */
const void *jit_compile(struct vcpu *c, const struct block *block);
bool jit_full(const struct vcpu *c);

/* Run from c->pc, whose code this is, until the dispatcher is wanted. c->pc is exact then. */
void jit_enter(struct vcpu *c, const void *code);

/*
 * Code that came back for want of the block at c->pc, and could have gone on there, leaves its way out in c->jit_link
 * or, to another page or by a register, in c->jit_far: it is pointed at `code`. Not once anything of the vCPU or the VM
 * has changed since: then both are cleared by jit_unlink().
 */
void jit_link(struct vcpu *c, const void *code);
static inline void jit_unlink(struct vcpu *c) { c->jit_link = c->jit_far = NULL; }

/* `block`, of guest code at `pa`, is out of date: who gets to its code comes back. */
void jit_drop(struct vcpu *c, struct block *block, uint64_t pa);

void jit_flush(struct vcpu *c); /* all code is dropped; the vCPU is not in it */

#endif
