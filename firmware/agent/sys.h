/* Linux system calls of arm64, and the few constants and structures the agent needs: no libc, no kernel headers. */
#pragma once

#include <stddef.h>
#include <stdint.h>

enum {
    SYS_fcntl = 25,
    SYS_ioctl = 29,
    SYS_mkdirat = 34,
    SYS_unlinkat = 35,
    SYS_symlinkat = 36,
    SYS_mount = 40,
    SYS_chdir = 49,
    SYS_fchdir = 50,
    SYS_chroot = 51,
    SYS_fchmod = 52,
    SYS_fchmodat = 53,
    SYS_openat = 56,
    SYS_close = 57,
    SYS_pipe2 = 59,
    SYS_getdents64 = 61,
    SYS_read = 63,
    SYS_write = 64,
    SYS_ppoll = 73,
    SYS_signalfd4 = 74,
    SYS_readlinkat = 78,
    SYS_newfstatat = 79,
    SYS_utimensat = 88,
    SYS_exit_group = 94,
    SYS_nanosleep = 101,
    SYS_clock_settime = 112,
    SYS_kill = 129,
    SYS_rt_sigaction = 134,
    SYS_rt_sigprocmask = 135,
    SYS_setsid = 157,
    SYS_socket = 198,
    SYS_bind = 200,
    SYS_munmap = 215,
    SYS_clone = 220,
    SYS_execve = 221,
    SYS_mmap = 222,
    SYS_wait4 = 260,
    SYS_dup3 = 24,
    SYS_fsopen = 430,
    SYS_fsconfig = 431,
    SYS_fsmount = 432,
    SYS_close_range = 436,
};

enum { ENOENT = 2, EINTR = 4, EIO = 5, ENOEXEC = 8, EAGAIN = 11, EACCES = 13, EEXIST = 17, ENOTDIR = 20, EISDIR = 21 };

enum {
    O_RDONLY = 0,
    O_WRONLY = 1,
    O_RDWR = 2,
    O_CREAT = 0100,
    O_NOCTTY = 0400,
    O_TRUNC = 01000,
    O_NONBLOCK = 04000,
    O_DIRECTORY = 040000,
    O_NOFOLLOW = 0100000,
    O_CLOEXEC = 02000000,
    O_PATH = 010000000,
};

enum { AT_FDCWD = -100, AT_SYMLINK_NOFOLLOW = 0x100, AT_REMOVEDIR = 0x200, UTIME_OMIT = 0x3ffffffe };
enum { S_IFMT = 0170000, S_IFDIR = 0040000, S_IFREG = 0100000, S_IFLNK = 0120000 };
enum { POLLIN = 1, POLLOUT = 4, POLLERR = 8, POLLHUP = 16 };
enum { SIGKILL = 9, SIGCHLD = 17, SIG_SETMASK = 2, WNOHANG = 1 };
enum { F_SETFL = 4, F_DUPFD_CLOEXEC = 1030, F_SETPIPE_SZ = 1031 };
enum { TIOCSCTTY = 0x540e, TIOCSWINSZ = 0x5414, TIOCSPTLCK = 0x40045431, TIOCGPTPEER = 0x5441 };
enum { RNDADDENTROPY = 0x40085203, RNDRESEEDCRNG = 0x5207 };
enum { FSCONFIG_CMD_CREATE = 6, FSMOUNT_CLOEXEC = 1, FSOPEN_CLOEXEC = 1 };
enum { AF_NETLINK = 16, SOCK_DGRAM = 2, SOCK_CLOEXEC = O_CLOEXEC, SOCK_NONBLOCK = O_NONBLOCK, KOBJECT_UEVENT = 15 };

struct timespec { int64_t sec, nsec; };
struct pollfd { int fd; short events, revents; };
struct sockaddr_nl { uint16_t family, pad; uint32_t pid, groups; };
struct winsize { uint16_t rows, columns, x, y; };
struct stat {
    uint64_t dev, ino;
    uint32_t mode, nlink, uid, gid;
    uint64_t rdev, pad1;
    int64_t size;
    int32_t blksize, pad2;
    int64_t blocks;
    struct timespec atime, mtime, ctime;
    uint32_t unused[2];
};
struct dirent { uint64_t ino; int64_t next; uint16_t length; uint8_t type; char name[]; };

static inline long call6(long number, long a, long b, long c, long d, long e, long f)
{
    register long x8 __asm__("x8") = number;
    register long x0 __asm__("x0") = a;
    register long x1 __asm__("x1") = b;
    register long x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = d;
    register long x4 __asm__("x4") = e;
    register long x5 __asm__("x5") = f;
    __asm__ volatile("svc #0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory", "cc");
    return x0;
}

/* Each answers a negative errno or the result. Arguments left out are zero. */
#define SYS_(number, a, b, c, d, e, f, ...) call6(SYS_##number, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))
#define sys(...) SYS_(__VA_ARGS__, 0, 0, 0, 0, 0, 0, 0)

static inline size_t length_of(const char *text)
{
    size_t n = 0;
    while (text[n])
        n++;
    return n;
}

static inline int same(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

void *memcpy(void *to, const void *from, size_t n);
void *memmove(void *to, const void *from, size_t n);
void *memset(void *to, int value, size_t n);
