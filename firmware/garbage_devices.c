// Pseudo-random reads and writes, of every width and alignment, all over every device's registers; then powers off.
//
// Arguments: n, accesses (5000); seed (1).
// UARTDR alone is left out, so that the console stays readable.
#include "guest.h"

__asm__(".text\n.balign 4\n"
        "do_load8: ldrb w0, [x0]\n svc #0\n"
        "do_load16: ldrh w0, [x0]\n svc #0\n"
        "do_load32: ldr w0, [x0]\n svc #0\n"
        "do_load64: ldr x0, [x0]\n svc #0\n"
        "do_store8: strb w1, [x0]\n svc #0\n"
        "do_store16: strh w1, [x0]\n svc #0\n"
        "do_store32: str w1, [x0]\n svc #0\n"
        "do_store64: str x1, [x0]\n svc #0\n");

static u64 state;

static u64 random(void) // xorshift64: any non-zero state gives a period of 2^64 - 1
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

void main(const void *device_tree)
{
    static const struct { u64 base, size; } windows[] = {
        {UART, 0x1000}, {RTC, 0x1000}, {GICD, 0x10000}, {GICR, 0x20000}, {VIRTIO_MMIO, 0x4000}, {VIRTIO_MMIO, 0x100},
    };
    u64 n = argument(device_tree, "n", 5000), seed = argument(device_tree, "seed", 1), aborts = 0;
    state = seed ? seed : 1;
    value("seed", seed);
    const u64 loads[] = {LABEL(do_load8), LABEL(do_load16), LABEL(do_load32), LABEL(do_load64)};
    const u64 stores[] = {LABEL(do_store8), LABEL(do_store16), LABEL(do_store32), LABEL(do_store64)};
    for (u64 i = 0; i < n; i++) {
        u64 choice = random() % (sizeof windows / sizeof *windows);
        u64 offset = random() % windows[choice].size, width = random() % 4;
        if (random() % 4)
            offset &= ~((1UL << width) - 1);
        if (random() % 2) // registers crowd at the start of a window
            offset &= 0xfff;
        bool store = random() % 2;
        if (store && windows[choice].base == UART && offset < 4)
            continue;
        u64 value = random() % 4 ? random() : random() % 16;
        attempt((store ? stores : loads)[width], EL1H, windows[choice].base + offset, value, 0);
        aborts += this_cpu()->trap.esr >> 26 != 0x15;
    }
    store32(UART + 0x48, 0);     // DMACR
    store32(UART + 0x38, 0);     // IMSC
    store32(UART + 0x2c, 0x70);  // LCR_H: 8 bits, FIFOs
    store32(UART + 0x30, 0x301); // CR: transmit, receive, enable
    value("aborts", aborts);
    check("survived", true);
    finish();
}
