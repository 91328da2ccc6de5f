/* The cache of decoded blocks, by guest physical address. */
#define _GNU_SOURCE
#include "jit.h"

#include <stdlib.h>
#include <sys/mman.h>

enum {
    ARENA_SIZE = 64 << 20,
    BLOCK_BYTES = sizeof(struct block) + (BLOCK_MAX + 1) * sizeof(struct uop),
    BUCKETS = 1 << 15,
    PAGE_BUCKETS = 1 << 12,
    COMPILED_MAX = 128
};

/* A page of guest code, in the arena. It outlives its blocks, until the next flush. */
struct code_page {
    uint64_t pa;
    struct code_page *next;
    struct block *blocks;
    uint64_t *compiled; /* of these, COMPILED_MAX at most, small and in a row: see code_compiled() */
    uint16_t compiled_count, compiled_room;
};

/*
 * Blocks are taken from the arena one after the other and are not freed singly: what invalidation drops stays there
 * unreachable until the arena is full and everything is flushed.
 */
struct code {
    uint8_t *arena;
    size_t used;
    struct block *bucket[BUCKETS];
    struct code_page *page[PAGE_BUCKETS];
};

static unsigned bucket_of(uint64_t pa) { return ((pa >> 2) ^ (pa >> 17)) & (BUCKETS - 1); }
static struct code_page **page_bucket(struct code *code, uint64_t pa) {
    return &code->page[((pa >> PAGE_BITS) ^ (pa >> (PAGE_BITS + 12))) & (PAGE_BUCKETS - 1)];
}

bool code_create(struct vcpu *c) {
    struct code *code = calloc(1, sizeof *code);
    if (!code)
        return false;
    code->arena = mmap(NULL, ARENA_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (code->arena == MAP_FAILED) {
        free(code);
        return false;
    }
#ifdef MADV_HUGEPAGE
    madvise(code->arena, ARENA_SIZE, MADV_HUGEPAGE);
#endif
    c->cache = code;
    c->arena = code->arena;
    return true;
}

void code_destroy(struct vcpu *c) {
    munmap(c->cache->arena, ARENA_SIZE);
    free(c->cache);
    c->cache = NULL;
}

bool code_maybe(struct vm *vm, uint64_t pa) {
    uint64_t index = (pa >> PAGE_BITS) & (CODE_MARKS - 1);
    return atomic_load_explicit(&vm->marked[index / 64], memory_order_relaxed) >> (index % 64) & 1;
}

/* Never taken back: a page that had code once is asked after for ever. Fenced: an arm64 host lets the loads that
   follow, of the page's bytes, pass the store of an atomic. */
static void mark(struct vm *vm, uint64_t pa) {
    uint64_t index = (pa >> PAGE_BITS) & (CODE_MARKS - 1);
    atomic_fetch_or(&vm->marked[index / 64], UINT64_C(1) << (index % 64));
    atomic_thread_fence(memory_order_seq_cst);
}

static struct code_page *find_page(struct code *code, uint64_t pa) {
    struct code_page *page = *page_bucket(code, pa);
    while (page && page->pa != pa)
        page = page->next;
    return page;
}

/* Arena allocations keep 64-byte alignment, for the blocks' sake. */
static void *take(struct code *code, size_t size) {
    void *start = code->arena + code->used;
    code->used += (size + 63) & ~(size_t)63;
    return start;
}

void code_flush(struct vcpu *c) {
    struct code *code = c->cache;
    memset(code->bucket, 0, sizeof code->bucket);
    memset(code->page, 0, sizeof code->page);
    madvise(code->arena, code->used, MADV_DONTNEED);
    code->used = 0;
    jit_flush(c);
    tlb_drop_code(c);
    counter_add(&c->counters.flushes, 1);
}

bool code_full(const struct vcpu *c) { return c->cache->used > ARENA_SIZE - 2 * (BLOCK_BYTES + 2 * 64); }

struct block *code_block(struct vcpu *c, uint64_t pa, const uint8_t *host) {
    struct code *code = c->cache;
    struct block *block = code->bucket[bucket_of(pa)];
    while (block && block->pa != pa)
        block = block->bucket;
    if (block)
        return block;
    if (code_full(c))
        code_flush(c);
    uint64_t page_pa = pa & ~(uint64_t)(PAGE_SIZE - 1);
    mark(c->vm, page_pa); /* before the guest's bytes are read: see mail_code() */
    struct code_page *page = find_page(code, page_pa);
    if (!page) {
        struct code_page **head = page_bucket(code, page_pa);
        page = take(code, sizeof *page);
        *page = (struct code_page){.pa = page_pa, .next = *head};
        *head = page;
    }
    block = (struct block *)(code->arena + code->used);
    decode_block(block, pa, host, BLOCK_MAX);
    block->cold = jit_threshold(c);
    block->code = NULL;
    take(code, sizeof *block + (block->count + 1) * sizeof(struct uop));
    block->page = page->blocks;
    page->blocks = block;
    struct block **bucket = &code->bucket[bucket_of(pa)];
    block->bucket = *bucket;
    *bucket = block;
    counter_add(&c->counters.blocks, 1);
    return block;
}

void code_compiled(struct vcpu *c, const struct block *block) {
    struct code_page *page = find_page(c->cache, block->pa & ~(uint64_t)(PAGE_SIZE - 1));
    if (page->compiled_count == page->compiled_room) {
        unsigned room = page->compiled_room ? 2 * page->compiled_room : 8;
        if (room > COMPILED_MAX || code_full(c))
            return;
        uint64_t *larger = take(c->cache, room * sizeof *larger);
        for (unsigned i = 0; i < page->compiled_count; i++)
            larger[i] = page->compiled[i];
        page->compiled = larger;
        page->compiled_room = (uint16_t)room;
    }
    uint64_t at = (uint64_t)((const uint8_t *)block - c->arena) >> 6, word = block->pa >> 2 & 0x3ff;
    uint64_t code = (uint64_t)((const uint8_t *)block->code - c->code_base);
    page->compiled[page->compiled_count++] = code << 32 | at << 10 | word;
}
_Static_assert(ARENA_SIZE >> 6 <= 1 << 22, "a block's place in 22 bits");

/* A page that is new to an address space is rarely new to the vCPU. */
void code_offer(struct vcpu *c, uint64_t va, uint64_t pa) {
    const struct code_page *page = find_page(c->cache, pa);
    for (unsigned i = 0; page && i < page->compiled_count; i++) {
        uint64_t known = page->compiled[i];
        struct jump_entry entry = {va | (known & 0x3ff) << 2, (uint32_t)(known >> 10 & 0x3fffff) << 6,
                                   (uint32_t)(known >> 32)};
        jump_offer(c, entry);
    }
}

/* How often was the block at `pa` run? Known exactly up to when it is compiled. */
static int32_t runs(struct vcpu *c, uint64_t pa) {
    const struct block *block = c->cache->bucket[bucket_of(pa)];
    while (block && block->pa != pa)
        block = block->bucket;
    int32_t threshold = jit_threshold(c);
    return !block ? 0 : block->cold <= 0 || block->cold > threshold ? threshold : threshold - block->cold;
}

static bool taken(struct vcpu *c, uint64_t target, uint64_t next) {
    int32_t there = runs(c, target);
    return there > 2 && there > 2 * runs(c, next);
}

bool code_trace(struct vcpu *c, const struct block *block, struct block *trace, uint16_t at[BLOCK_MAX + 1]) {
    uint64_t page = block->pa & ~(uint64_t)(PAGE_SIZE - 1);
    struct ram *ram = vm_ram(c->vm, page);
    if (!ram)
        return false;
    decode_trace(trace, block->pa, ram->host + (page - ram->ipa), at, taken, c);
    return trace->count > 0;
}

struct uop *code_room(struct vcpu *c) {
    return code_full(c) ? NULL : (struct uop *)(c->cache->arena + c->cache->used);
}

void code_keep(struct vcpu *c, uint32_t count) { take(c->cache, count * sizeof(struct uop)); }

static void drop_page(struct vcpu *c, struct code_page *page) {
    if (page->compiled_count) /* else they would come back to the dispatcher, each time */
        jump_stale(c);
    for (struct block *block = page->blocks; block; block = block->page) {
        struct block **link = &c->cache->bucket[bucket_of(block->pa)];
        while (*link != block)
            link = &(*link)->bucket;
        *link = block->bucket;
        jit_drop(c, block, block->pa);
        block->pa = BLOCK_DROPPED; /* the jump cache may still know it */
        block->cold = 0;
    }
    page->blocks = NULL;
    page->compiled_count = 0;
    counter_add(&c->counters.invalidations, 1);
}

void code_invalidate(struct vcpu *c, uint64_t pa, uint64_t size) {
    uint64_t end = size > UINT64_MAX - pa ? UINT64_MAX : pa + size;
    uint64_t first = pa & ~(uint64_t)(PAGE_SIZE - 1);
    if ((end - first) >> PAGE_BITS >= PAGE_BUCKETS) { /* fewer pages are known than asked for */
        for (size_t i = 0; i < PAGE_BUCKETS; i++)
            for (struct code_page *page = c->cache->page[i]; page; page = page->next)
                if (page->blocks && page->pa >= first && page->pa < end)
                    drop_page(c, page);
        return;
    }
    for (uint64_t at = first; at < end; at += PAGE_SIZE) {
        struct code_page *page = code_maybe(c->vm, at) ? find_page(c->cache, at) : NULL;
        if (page && page->blocks)
            drop_page(c, page);
    }
}
