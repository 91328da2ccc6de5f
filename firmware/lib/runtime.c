// Exceptions, printing, PSCI and the command line for bare-metal guests.
#include <stdarg.h>

#include "guest.h"

_Static_assert(sizeof(struct frame) == FRAME_SIZE, "start.S");
_Static_assert(sizeof(struct cpu) == CPU_SIZE, "start.S");
_Static_assert(offsetof(struct cpu, catch) == CPU_CATCH, "start.S");
_Static_assert(offsetof(struct cpu, mpidr) == CPU_MPIDR, "start.S");
_Static_assert(offsetof(struct cpu, main) == CPU_MAIN, "start.S");

struct cpu boot_cpu __attribute__((aligned(16)));
static struct cpu others[MAX_CPUS - 1] __attribute__((aligned(16)));
static u64 checks;

// The compiler may ask for these two even in freestanding code (GCC manual, "Standards").
void *memset(void *to, int byte, size_t size)
{
    for (size_t i = 0; i < size; i++)
        ((volatile u8 *)to)[i] = (u8)byte;
    return to;
}

void *memcpy(void *to, const void *from, size_t size)
{
    for (size_t i = 0; i < size; i++)
        ((volatile u8 *)to)[i] = ((const u8 *)from)[i];
    return to;
}

static void put(char c)
{
    while (load32(UART + 0x18) & 0x20) // FR.TXFF
        ;
    store8(UART, (u8)c);
}

static void put_number(u64 number, u64 base)
{
    char digits[20];
    u64 count = 0;
    do {
        digits[count++] = "0123456789abcdef"[number % base];
        number /= base;
    } while (number);
    while (count)
        put(digits[--count]);
}

void print(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    for (; *format; format++) {
        if (*format == '\n')
            put('\r');
        if (*format != '%') {
            put(*format);
            continue;
        }
        switch (*++format) {
        case 's':
            for (const char *text = va_arg(arguments, const char *); *text; text++)
                put(*text);
            break;
        case 'u':
            put_number(va_arg(arguments, u64), 10);
            break;
        case 'x':
            put('0');
            put('x');
            put_number(va_arg(arguments, u64), 16);
            break;
        default:
            put(*format);
        }
    }
    va_end(arguments);
}

void check(const char *name, bool passed)
{
    checks++;
    print("%s %s\n", passed ? "ok" : "not ok", name);
}

void check_equal(const char *name, u64 got, u64 expected)
{
    checks++;
    if (got == expected)
        print("ok %s\n", name);
    else
        print("not ok %s got %x expected %x\n", name, got, expected);
}

void value(const char *name, u64 number) { print("%s %u\n", name, number); }

void system_off(void)
{
    hypercall(PSCI_SYSTEM_OFF, 0, 0, 0);
    for (;;)
        wfi();
}

void finish(void)
{
    print("1..%u\n", checks);
    system_off();
}

s64 hypercall(u64 function, u64 x1, u64 x2, u64 x3)
{
    register u64 r0 __asm__("x0") = function;
    register u64 r1 __asm__("x1") = x1;
    register u64 r2 __asm__("x2") = x2;
    register u64 r3 __asm__("x3") = x3;
    __asm__ volatile("hvc #0"
                     : "+r"(r0), "+r"(r1), "+r"(r2), "+r"(r3)::"x4", "x5", "x6", "x7", "x8", "x9", "x10", "x11", "x12",
                       "x13", "x14", "x15", "x16", "x17", "memory");
    return (s64)r0;
}

void cpu_off(void)
{
    hypercall(PSCI_CPU_OFF, 0, 0, 0);
    for (;;)
        wfi();
}

struct cpu *cpu(u64 index) { return index ? &others[index - 1] : &boot_cpu; }

u64 affinity(u64 index) { return index % 16 | (index / 16) << 8; }

u64 start_cpus(u64 limit, void (*entry)(struct cpu *))
{
    u64 count = 1;
    for (; count < limit && count < MAX_CPUS; count++) {
        struct cpu *other = cpu(count);
        *other = (struct cpu){.mpidr = affinity(count), .main = entry, .index = count};
        dsb(sy);
        if (hypercall(PSCI_CPU_ON, affinity(count), (u64)secondary_start, (u64)other) != 0)
            break;
    }
    return count;
}

__attribute__((weak)) void on_irq(u32 intid) { print("not ok unexpected interrupt %u\n", (u64)intid); }

void exception(struct frame *frame, u64 vector)
{
    struct cpu *self = this_cpu();
    if (vector % 4 == 1) { // IRQ
        u32 intid = (u32)read_sysreg(S3_0_C12_C12_0);
        on_irq(intid);
        if (intid < 1020)
            write_icc(S3_0_C12_C12_1, intid);
        return;
    }
    if (vector % 4 == 0 && self->catch) {
        u64 sp = self->catch;
        self->catch = 0;
        self->trap = (struct trap){vector, frame->esr, frame->far, frame->elr, frame->spsr, frame->x[0]};
        unwind(sp);
    }
    print("not ok exception vector %u esr %x elr %x far %x spsr %x\n", vector, frame->esr, frame->elr, frame->far,
          frame->spsr);
    system_off();
}

static u32 big_endian(const u8 *at) { return (u32)at[0] << 24 | (u32)at[1] << 16 | (u32)at[2] << 8 | at[3]; }

static bool starts_with(const char *text, const char *prefix)
{
    while (*prefix)
        if (*text++ != *prefix++)
            return false;
    return true;
}

// The bootargs property of /chosen (Devicetree Specification 0.4, chapter 5), or "".
static const char *bootargs(const u8 *tree)
{
    if (!tree || big_endian(tree) != 0xd00dfeed)
        return "";
    const u8 *at = tree + big_endian(tree + 8), *end = at + big_endian(tree + 36);
    const char *names = (const char *)tree + big_endian(tree + 12);
    while (at < end) {
        u32 token = big_endian(at);
        at += 4;
        if (token == 1) { // FDT_BEGIN_NODE: a name, padded
            while (*at)
                at++;
            at = (const u8 *)(((u64)at + 4) & ~3UL);
        } else if (token == 3) { // FDT_PROP: length, name, value
            u32 length = big_endian(at);
            if (length && starts_with(names + big_endian(at + 4), "bootargs"))
                return (const char *)at + 8;
            at += (8 + length + 3) & ~3U;
        } else if (token == 9) { // FDT_END
            break;
        }
    }
    return "";
}

u64 argument(const void *device_tree, const char *name, u64 otherwise)
{
    for (const char *at = bootargs(device_tree); *at; at++) {
        if (!starts_with(at, name))
            continue;
        const char *digit = at;
        for (const char *skip = name; *skip; skip++)
            digit++;
        if (*digit++ != '=')
            continue;
        u64 number = 0;
        for (; *digit >= '0' && *digit <= '9'; digit++)
            number = number * 10 + (u64)(*digit - '0');
        return number;
    }
    return otherwise;
}
