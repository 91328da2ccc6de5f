// Overwrites its own page tables with pseudo-random entries and runs on. Argument: seed (1).
//
// What follows is up to the entries: mostly an exception whose vector cannot be fetched, for ever. It ends only by a
// timeout or a stop, if the host does not end it as hopeless; the last line it prints is "scribble".
#include "guest.h"

void main(const void *device_tree)
{
    u64 state = argument(device_tree, "seed", 1) * 0x9e3779b97f4a7c15;
    volatile u64 *table = (volatile u64 *)(read_sysreg(ttbr0_el1) & 0xffffffffffc0);
    print("scribble\n");
    for (;;) {
        for (u64 entry = 0; entry < 4; entry++) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            table[entry] = state;
        }
        __asm__ volatile("dsb ish\n\ttlbi vmalle1\n\tdsb ish\n\tisb" ::: "memory");
    }
}
