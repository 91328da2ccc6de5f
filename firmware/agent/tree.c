/* Files and trees as a stream: what `vm.put` and `vm.get` send through a command's standard input and output.
 *
 * An entry is a header, its name (relative; empty for the top), and for a file or a link its content in chunks: a
 * 32-bit length and so many bytes, the last of length zero. An entry of type END is the last one.
 * avmm/guest/tree.py is the other end.
 */

#include "agent.h"

enum { NAME_MAX_ = 4096, CHUNK = 128 * 1024 };

struct __attribute__((packed)) entry { uint8_t type, pad[3]; uint32_t mode; int64_t mtime_ns; uint32_t name; };

enum { FILE_ = 'f', DIR_ = 'd', LINK_ = 'l', END = 'e' };

static char path[2 * NAME_MAX_];
static char buffer[CHUNK];

static int fail(const char *what, long error)
{
    char number[24];
    int at = sizeof(number);
    unsigned long left = (unsigned long)(error < 0 ? -error : error);
    number[--at] = '\n';
    do {
        number[--at] = (char)('0' + left % 10);
    } while ((left /= 10) && at > 0);
    sys(write, 2, path, length_of(path));
    sys(write, 2, ": ", 2);
    sys(write, 2, what, length_of(what));
    sys(write, 2, ": errno ", 8);
    sys(write, 2, number + at, sizeof(number) - (size_t)at);
    return 1;
}

static long read_all(void *to, size_t wanted)
{
    size_t have = 0;
    while (have < wanted) {
        long got = sys(read, 0, (char *)to + have, wanted - have);
        if (got == -EINTR)
            continue;
        if (got <= 0)
            return got ? got : -EIO;
        have += (size_t)got;
    }
    return 0;
}

static long write_all(int fd, const void *from, size_t left)
{
    const char *at = from;
    while (left) {
        long put = sys(write, fd, at, left);
        if (put == -EINTR)
            continue;
        if (put <= 0)
            return put ? put : -EIO;
        at += put;
        left -= (size_t)put;
    }
    return 0;
}

/* The next chunk of the entry's content into `to` (at most `room` bytes); its length, 0 at the end, or an error. */
static long next_chunk(char *to, size_t room)
{
    uint32_t length;
    long error = read_all(&length, sizeof(length));
    if (error)
        return error;
    if (length > room)
        return -EIO;
    error = read_all(to, length);
    return error ? error : (long)length;
}

static int unpack_file(const struct entry *entry)
{
    sys(unlinkat, AT_FDCWD, path, 0); /* a new file: neither through a link nor into a running program */
    long fd = sys(openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600);
    long error = fd < 0 ? fd : 0;
    for (;;) {
        long length = next_chunk(buffer, sizeof(buffer));
        if (length < 0)
            return fail("the stream ends early", length);
        if (length == 0)
            break;
        if (!error)
            error = write_all((int)fd, buffer, (size_t)length); /* read on to the end, then say so */
    }
    if (error)
        return fail("cannot write", error);
    sys(fchmod, fd, entry->mode & 07777);
    sys(close, fd);
    return 0;
}

static int unpack_link(void)
{
    size_t have = 0;
    for (;;) {
        long length = next_chunk(buffer + have, NAME_MAX_ - 1 - have);
        if (length < 0)
            return fail("not a link", length);
        if (length == 0)
            break;
        have += (size_t)length;
    }
    buffer[have] = 0;
    sys(unlinkat, AT_FDCWD, path, 0);
    long error = sys(symlinkat, buffer, AT_FDCWD, path);
    return error ? fail("cannot make a link", error) : 0;
}

static void make_parents(void)
{
    for (char *at = path + 1; *at; at++)
        if (*at == '/') {
            *at = 0;
            sys(mkdirat, AT_FDCWD, path, 0755);
            *at = '/';
        }
}

int tree_unpack(const char *target)
{
    size_t base = length_of(target);
    int failed = 0;
    if (base >= NAME_MAX_)
        return 1;
    memcpy(path, target, base + 1);
    make_parents();
    for (;;) {
        struct entry entry;
        long error = read_all(&entry, sizeof(entry));
        if (error || entry.name >= NAME_MAX_ - 1)
            return fail("the stream ends early", error);
        if (entry.type == END)
            return failed;
        size_t at = base;
        if (entry.name)
            path[at++] = '/';
        if ((error = read_all(path + at, entry.name)))
            return fail("the stream ends early", error);
        path[at + entry.name] = 0;
        if (entry.type == FILE_) {
            failed |= unpack_file(&entry);
        } else if (entry.type == LINK_) {
            failed |= unpack_link();
        } else {
            error = sys(mkdirat, AT_FDCWD, path, 0755);
            if (error && error != -EEXIST)
                failed |= fail("cannot make a directory", error);
            sys(fchmodat, AT_FDCWD, path, entry.mode & 07777);
        }
        struct timespec times[2] = {{0, UTIME_OMIT}, {entry.mtime_ns / 1000000000, entry.mtime_ns % 1000000000}};
        sys(utimensat, AT_FDCWD, path, times, AT_SYMLINK_NOFOLLOW);
        path[base] = 0;
    }
}

static int pack_chunks(int fd)
{
    for (;;) {
        /* The length goes before its bytes in one buffer: one write for both. */
        long got = sys(read, fd, buffer + 4, sizeof(buffer) - 4);
        if (got < 0)
            return fail("cannot read", got) + 1;
        uint32_t length = (uint32_t)got;
        memcpy(buffer, &length, 4);
        if (write_all(1, buffer, 4 + (size_t)got))
            return 2;
        if (got == 0)
            return 0;
    }
}

/* 0: fine, 1: something is missing from the copy, 2: the stream cannot go on. */
static int pack(size_t base, size_t end, int depth)
{
    struct stat info;
    long error = sys(newfstatat, AT_FDCWD, path, &info, depth ? AT_SYMLINK_NOFOLLOW : 0);
    if (error)
        return fail("cannot be read", error);
    uint32_t kind = info.mode & S_IFMT;
    size_t start = end > base ? base + 1 : base;
    struct entry entry = {.mode = info.mode & 07777, .name = (uint32_t)(end - start),
                          .mtime_ns = info.mtime.sec * 1000000000 + info.mtime.nsec};
    long fd = -1;
    if (kind == S_IFDIR) {
        entry.type = DIR_;
        fd = sys(openat, AT_FDCWD, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    } else if (kind == S_IFLNK) {
        entry.type = LINK_;
        fd = 0;
    } else if (kind == S_IFREG || depth == 0) {
        entry.type = FILE_;
        fd = sys(openat, AT_FDCWD, path, O_RDONLY | O_NOCTTY | O_CLOEXEC);
    } else {
        return 0; /* devices, sockets and pipes are no content */
    }
    if (fd < 0)
        return fail("cannot open", fd);
    if (write_all(1, &entry, sizeof(entry)) || write_all(1, path + start, entry.name))
        return 2;
    int failed = 0;
    if (kind == S_IFLNK) {
        long got = sys(readlinkat, AT_FDCWD, path, buffer + 4, NAME_MAX_ - 1);
        uint32_t length = got < 0 ? 0 : (uint32_t)got;
        memcpy(buffer, &length, 4);
        memset(buffer + 4 + length, 0, 4);
        return write_all(1, buffer, length ? length + 8 : 4) ? 2 : 0;
    }
    if (kind == S_IFDIR) {
        char names[2048] __attribute__((aligned(8)));
        long got;
        while ((got = sys(getdents64, fd, names, sizeof(names))) > 0)
            for (long at = 0; at < got && failed < 2;) {
                struct dirent *each = (void *)(names + at);
                size_t length = length_of(each->name);
                at += each->length;
                if (same(each->name, ".") || same(each->name, ".."))
                    continue;
                if (end + 1 + length >= sizeof(path) || end + 1 + length - base >= NAME_MAX_ || depth > 256) {
                    failed |= fail("is too deep", -EIO);
                    continue;
                }
                path[end] = '/';
                memcpy(path + end + 1, each->name, length + 1);
                failed |= pack(base, end + 1 + length, depth + 1);
                path[end] = 0;
            }
        if (got < 0)
            failed |= fail("cannot list", got);
    } else {
        failed = pack_chunks((int)fd);
    }
    sys(close, fd);
    return failed;
}

int tree_pack(const char *source)
{
    size_t base = length_of(source);
    if (base >= NAME_MAX_)
        return 1;
    memcpy(path, source, base + 1);
    int failed = pack(base, base, 0);
    struct entry end = {.type = END};
    if (failed < 2 && write_all(1, &end, sizeof(end)))
        failed = 2;
    return failed;
}
