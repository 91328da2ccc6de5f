// What a debugger does, static, for arm64: single steps, and a breakpoint that is stepped over and put back.
//
//   debugger    prints how many steps a loop of known length took, and how often the breakpoint was hit
#include <elf.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

extern char loop_begins[], loop_ends[];
__asm__(".pushsection .text\n"
        ".global loop, loop_begins, loop_ends\n"
        "loop: mov w9, #1000\n"
        "loop_begins:\n"
        "0: subs w9, w9, #1\n"
        "b.ne 0b\n"
        "mov x8, #172\n" // getpid
        "svc #0\n"
        "loop_ends: ret\n"
        ".popsection\n");
void loop(void);

static volatile int calls;
__attribute__((noinline)) void called(void) { calls++; }

static void die(const char *what) {
    perror(what);
    exit(1);
}

static struct user_regs_struct registers(pid_t child) {
    struct user_regs_struct regs;
    struct iovec io = {&regs, sizeof regs};
    if (ptrace(PTRACE_GETREGSET, child, NT_PRSTATUS, &io))
        die("PTRACE_GETREGSET");
    return regs;
}

// Resume it until it stops by SIGTRAP; 0: it has ended.
static int go(pid_t child, int how) {
    int status;
    if (ptrace(how, child, 0, 0) || waitpid(child, &status, 0) < 0)
        die("ptrace");
    if (WIFSTOPPED(status) && WSTOPSIG(status) != SIGTRAP) {
        printf("stopped by signal %d\n", WSTOPSIG(status));
        exit(1);
    }
    return WIFSTOPPED(status);
}

static void poke(pid_t child, void *at, uint32_t instruction) {
    uintptr_t word = (uintptr_t)at & ~7ul;
    uint32_t words[2];
    *(long *)words = ptrace(PTRACE_PEEKTEXT, child, word, 0);
    words[((uintptr_t)at & 4) / 4] = instruction;
    if (ptrace(PTRACE_POKETEXT, child, word, *(long *)words))
        die("PTRACE_POKETEXT");
}

int main(void) {
    pid_t child = fork();
    if (!child) {
        ptrace(PTRACE_TRACEME, 0, 0, 0);
        raise(SIGTRAP);
        loop();
        for (int i = 0; i < 50; i++)
            called();
        _exit(calls == 50 ? 42 : 1);
    }
    int status;
    waitpid(child, &status, 0);
    poke(child, loop_begins - 4, 0xd4200000); // BRK #0
    go(child, PTRACE_CONT);
    poke(child, loop_begins - 4, 0x52807d09); // MOV w9, #1000
    unsigned steps = 0;
    while (registers(child).pc != (uintptr_t)loop_ends && go(child, PTRACE_SINGLESTEP))
        steps++;

    uint32_t first = *(uint32_t *)(void *)called;
    unsigned hits = 0;
    poke(child, (void *)called, 0xd4200000);
    while (go(child, PTRACE_CONT) && registers(child).pc == (uintptr_t)called) {
        hits++;
        poke(child, (void *)called, first);
        go(child, PTRACE_SINGLESTEP);
        if (registers(child).pc != (uintptr_t)called + 4)
            return puts("stepped somewhere else"), 1;
        poke(child, (void *)called, 0xd4200000);
    }
    printf("%u steps, %u hits\n", steps, hits);
    return 0;
}
