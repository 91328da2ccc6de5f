/* avmm's agent: runs commands in a Linux guest for a host at the other end of a virtio-console port.
 *
 * avmm appends it to the guest's initrd and starts it as the first process. It forks: the parent becomes the guest's own
 * /init at once, the child waits until a driver has brought up its port. It mounts nothing that anybody sees, opens no
 * file in the guest's tree and loads no module. Commands run where process 1 is then: also after switch_root.
 *
 * One loop, nothing blocks: bytes of a command move only as far as there is room for them (credit) at the other end.
 */

#include "agent.h"

#define PORT_NAME "avmm.agent"
enum { COMMANDS = 256, OUT_SIZE = 256 * 1024, IN_SIZE = 128 * 1024, OUT_RESERVE = 64 };

int proc_fs = -1, sys_fs = -1, dev_fs = -1;

struct command {
    uint32_t id;
    int pid;              /* 0: the slot is free */
    int orphan;           /* of a host that is gone: its output goes nowhere */
    int ended, status;    /* wait4's, once it has been waited for */
    int pty;
    int fd[3];            /* our ends of its streams; -1: closed. For a pty 0 and 1 are the same */
    uint32_t credit[3];   /* what we may send of 1 and 2; of 0: bytes taken and not yet reported */
    int tell_eof[3];      /* the end of a stream is still to be sent */
    char *input;          /* WINDOW bytes, a ring; NULL: no input */
    uint32_t in_head, in_used;
    int input_ends;
};

static struct command commands[COMMANDS];
static int port = -1, signals = -1;
static unsigned char out[OUT_SIZE], in[IN_SIZE];
static size_t out_head, out_tail, in_used;

void *memcpy(void *to, const void *from, size_t n)
{
    unsigned char *t = to;
    const unsigned char *f = from;
    for (; n >= 16; n -= 16, t += 16, f += 16) {
        uint64_t a, b;
        __asm__ volatile("ldp %0, %1, [%3]\n\tstp %0, %1, [%2]" : "=&r"(a), "=&r"(b) : "r"(t), "r"(f) : "memory");
    }
    while (n--)
        *t++ = *f++;
    return to;
}

void *memmove(void *to, const void *from, size_t n)
{
    unsigned char *t = to;
    const unsigned char *f = from;
    if (t <= f)
        return memcpy(to, from, n);
    while (n--)
        t[n] = f[n];
    return to;
}

void *memset(void *to, int value, size_t n)
{
    for (unsigned char *t = to; n--;)
        *t++ = (unsigned char)value;
    return to;
}

static void rest(long milliseconds)
{
    struct timespec time = {milliseconds / 1000, milliseconds % 1000 * 1000000};
    sys(nanosleep, &time, 0);
}

/* Sending. Whoever sends looks first whether there is room. */

static size_t out_room(void)
{
    return OUT_SIZE - (out_tail - out_head);
}

static unsigned char *out_space(size_t wanted)
{
    if (OUT_SIZE - out_tail < wanted) {
        memmove(out, out + out_head, out_tail - out_head);
        out_tail -= out_head;
        out_head = 0;
    }
    return out + out_tail;
}

static void send_frame(int type, int stream, uint32_t id, const void *payload, uint32_t length)
{
    struct frame frame = {MAGIC, (uint8_t)type, (uint16_t)stream, id, length};
    unsigned char *at = out_space(sizeof(frame) + length);
    memcpy(at, &frame, sizeof(frame));
    memcpy(at + sizeof(frame), payload, length);
    out_tail += sizeof(frame) + length;
}

static void flush(void)
{
    while (out_head < out_tail) {
        size_t left = out_tail - out_head;
        long put = sys(write, port, out + out_head, left > 32768 ? 32768 : left);
        if (put <= 0)
            return;
        out_head += (size_t)put;
    }
    out_head = out_tail = 0;
}

/* Where commands run, and how they start. */

static void enter_init(void)
{
    long root = sys(openat, proc_fs, "1/root", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (root < 0)
        root = sys(openat, AT_FDCWD, "/proc/1/root", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (root < 0)
        return;
    sys(fchdir, root);
    sys(chroot, ".");
    sys(close, root);
}

static void complain(const char *name, const char *what)
{
    sys(write, 2, "avmm: ", 6);
    sys(write, 2, name, length_of(name));
    sys(write, 2, what, length_of(what));
}

static const char *variable(char **env, const char *name)
{
    size_t length = length_of(name);
    for (; *env; env++) {
        size_t at = 0;
        while (at < length && (*env)[at] == name[at])
            at++;
        if (at == length && (*env)[at] == '=')
            return *env + at + 1;
    }
    return "";
}

/* As a shell would: 127 when there is no such program, 126 when it cannot be run. */
static int execute(char **argv, char **env)
{
    static char path[4096];
    const char *name = argv[0], *dirs = variable(env, "PATH");
    size_t length = length_of(name);
    long error = -ENOENT;
    for (const char *c = name; *c; c++)
        if (*c == '/')
            dirs = 0;
    if (!dirs)
        error = sys(execve, name, argv, env);
    while (dirs && *dirs) {
        size_t at = 0;
        while (*dirs && *dirs != ':' && at < sizeof(path) - 2)
            path[at++] = *dirs++;
        while (*dirs && *dirs++ != ':')
            ;
        if (at + length + 2 > sizeof(path))
            continue;
        path[at++] = '/';
        memcpy(path + at, name, length + 1);
        long tried = sys(execve, path, argv, env);
        if (tried != -ENOENT && tried != -ENOTDIR)
            error = tried;
        if (tried != -ENOENT && tried != -ENOTDIR && tried != -EACCES)
            break;
    }
    if (error == -ENOENT || error == -ENOTDIR) {
        complain(name, ": no such program\n");
        return 127;
    }
    complain(name, error == -EACCES   ? ": permission denied\n"
                   : error == -EISDIR ? ": is a directory\n"
                   : error == -ENOEXEC ? ": not a program for this machine\n"
                                       : ": cannot be run\n");
    return 126;
}

static void write_file(int directory, const char *name, const char *text, size_t length)
{
    long fd = sys(openat, directory, name, O_WRONLY | O_CLOEXEC);
    if (fd >= 0) {
        sys(write, fd, text, length);
        sys(close, fd);
    }
}

static long fork_(void)
{
    return sys(clone, SIGCHLD, 0);
}

/* In the child: its streams become 0, 1, 2, and it becomes the command. */
static void become(const struct spawn *spawn, int *ends, char **strings)
{
    uint64_t none = 0;
    char *cwd = strings[0], **argv = strings + 1, **env = strings + 1 + spawn->argc + 1;
    int code;
    sys(setsid);
    for (int stream = 0; stream < 3; stream++) /* ends are 3 and up, and close by themselves */
        sys(dup3, ends[stream], stream, 0);
    if (spawn->flags & SPAWN_PTY)
        sys(ioctl, 0, TIOCSCTTY, 0);
    sys(rt_sigprocmask, SIG_SETMASK, &none, 0, sizeof(none));
    write_file(proc_fs, "self/oom_score_adj", "0", 1);
    enter_init();
    sys(close_range, 3, ~0u, 0); /* one that is built in executes nothing that would close them */
    if (sys(chdir, cwd)) {
        complain(cwd, ": no such directory\n");
        sys(exit_group, 127);
    }
    if (spawn->flags & SPAWN_BUILTIN)
        code = same(argv[0], "put") ? tree_unpack(argv[1]) : tree_pack(argv[1]);
    else
        code = execute(argv, env);
    sys(exit_group, code);
}

static void close_end(int *fd)
{
    if (*fd >= 0)
        sys(close, *fd);
    *fd = -1;
}

static long open_pty(const struct spawn *spawn, int *ours, int *ends)
{
    struct winsize size = {spawn->rows, spawn->columns, 0, 0};
    int unlocked = 0;
    long root = sys(openat, proc_fs, "1/root", O_PATH | O_DIRECTORY | O_CLOEXEC);
    long master = sys(openat, root < 0 ? AT_FDCWD : root, "dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (master < 0)
        master = sys(openat, root < 0 ? AT_FDCWD : root, "dev/pts/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (root >= 0)
        sys(close, root);
    if (master < 0)
        return master;
    sys(ioctl, master, TIOCSPTLCK, &unlocked);
    long slave = sys(ioctl, master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (slave < 0) {
        sys(close, master);
        return slave;
    }
    sys(ioctl, master, TIOCSWINSZ, &size);
    ours[0] = ours[1] = (int)master;
    ours[2] = -1;
    for (int stream = 0; stream < 3; stream++)
        ends[stream] = (int)slave;
    return 0;
}

static long open_pipes(const struct spawn *spawn, int *ours, int *ends)
{
    for (int stream = 0; stream < 3; stream++) {
        int pair[2];
        if (stream == 2 && spawn->flags & SPAWN_MERGE) {
            ends[2] = ends[1];
            return 0;
        }
        if (stream == 0 && spawn->flags & SPAWN_NO_INPUT) {
            long null = sys(openat, dev_fs, "null", O_RDONLY | O_CLOEXEC);
            if (null < 0)
                return null;
            ends[0] = (int)null;
            continue;
        }
        long error = sys(pipe2, pair, O_CLOEXEC);
        if (error)
            return error;
        ours[stream] = pair[stream == 0];
        ends[stream] = pair[stream != 0];
        if (spawn->flags & SPAWN_BUILTIN)
            sys(fcntl, ours[stream], F_SETPIPE_SZ, WINDOW);
    }
    return 0;
}

static long start(struct command *command, const struct spawn *spawn, char **strings)
{
    int ends[3] = {-1, -1, -1}, *ours = command->fd;
    long error = spawn->flags & SPAWN_PTY ? open_pty(spawn, ours, ends) : open_pipes(spawn, ours, ends);
    command->input = 0;
    if (!error && !(spawn->flags & SPAWN_NO_INPUT)) {
        long room = sys(mmap, 0, WINDOW, 3 /* read, write */, 0x22 /* private, anonymous */, -1, 0);
        if (room < 0 && room > -4096)
            error = room;
        else
            command->input = (char *)room;
    }
    if (!error) {
        for (int stream = 0; stream < 3; stream++)
            if (ours[stream] >= 0)
                sys(fcntl, ours[stream], F_SETFL, O_NONBLOCK);
        error = fork_();
        if (error == 0)
            become(spawn, ends, strings);
    }
    close_end(&ends[0]);
    if (!(spawn->flags & SPAWN_PTY)) {
        close_end(&ends[1]);
        if (!(spawn->flags & SPAWN_MERGE))
            close_end(&ends[2]);
    }
    return error;
}

/* The life of a command here. */

static struct command *find(uint32_t id)
{
    for (struct command *each = commands; each < commands + COMMANDS; each++)
        if (each->pid && !each->orphan && each->id == id)
            return each;
    return 0;
}

static void drop_input(struct command *command)
{
    if (command->pty) {
        if (command->fd[1] < 0)
            close_end(&command->fd[0]);
    } else {
        close_end(&command->fd[0]);
    }
    if (command->input)
        sys(munmap, command->input, WINDOW);
    command->input = 0;
    command->in_used = 0;
}

static void close_output(struct command *command, int stream)
{
    if (command->pty && command->input)
        command->fd[1] = -1; /* the descriptor is the input's too, and closed with it */
    else
        close_end(&command->fd[stream]);
    command->tell_eof[stream] = 1;
}

static void spawn(uint32_t id, const struct spawn *spawn, uint32_t length)
{
    static char *strings[8192];
    uint32_t end[2] = {ENDED_NOT_STARTED, 0}, count = 0, wanted;
    struct command *command = commands;
    while (command < commands + COMMANDS && command->pid)
        command++;
    /* cwd, argv, NULL, env, NULL. */
    wanted = spawn->argc + spawn->envc;
    if (command == commands + COMMANDS || find(id) || spawn->argc < 1 || wanted > 8000 || wanted < spawn->argc ||
        length < sizeof(*spawn)) {
        end[1] = EAGAIN;
        send_frame(T_EXIT, 0, id, end, sizeof(end));
        return;
    }
    const char *at = spawn->strings, *stop = (const char *)spawn + length;
    for (uint32_t n = 0; n < 1 + wanted; n++) {
        strings[count++] = (char *)at;
        while (at < stop && *at)
            at++;
        if (at++ >= stop) {
            end[1] = EAGAIN;
            send_frame(T_EXIT, 0, id, end, sizeof(end));
            return;
        }
        if (n == spawn->argc)
            strings[count++] = 0;
    }
    strings[count] = 0;
    memset(command, 0, sizeof(*command));
    command->id = id;
    command->pty = !!(spawn->flags & SPAWN_PTY);
    command->fd[0] = command->fd[1] = command->fd[2] = -1;
    command->credit[1] = command->credit[2] = WINDOW;
    long pid = start(command, spawn, strings);
    if (pid > 0) {
        command->pid = (int)pid;
        return;
    }
    if (command->pty)
        command->fd[1] = -1;
    for (int stream = 0; stream < 3; stream++)
        close_end(&command->fd[stream]);
    drop_input(command);
    end[1] = (uint32_t)-pid;
    send_frame(T_EXIT, 0, id, end, sizeof(end));
}

static void reap(void)
{
    int status;
    long pid;
    while ((pid = sys(wait4, -1, &status, WNOHANG, 0)) > 0)
        for (struct command *each = commands; each < commands + COMMANDS; each++)
            if (each->pid == pid && !each->ended) {
                each->ended = 1;
                each->status = status;
                drop_input(each); /* what it left running may still write, but nobody types to it */
            }
}

/* Send what command printed on a stream, as far as there is room. */
static void pump_output(struct command *command, int stream)
{
    while (command->fd[stream] >= 0 && (command->credit[stream] || command->orphan)) {
        size_t room = out_room(), piece = command->orphan ? WINDOW : command->credit[stream];
        if (room < sizeof(struct frame) + 4096 + OUT_RESERVE * COMMANDS)
            return;
        if (piece > PAYLOAD_MAX)
            piece = PAYLOAD_MAX;
        unsigned char *at = out_space(sizeof(struct frame) + PAYLOAD_MAX);
        if (OUT_SIZE - out_tail < sizeof(struct frame) + piece)
            return;
        long got = sys(read, command->fd[stream], at + sizeof(struct frame), piece);
        if (got == -EINTR)
            continue;
        if (got == -EAGAIN && !command->ended)
            return;
        if (got <= 0) { /* also EIO, of a terminal nobody has open; what a dead command's children print is lost */
            close_output(command, stream);
            return;
        }
        if (command->orphan)
            continue;
        struct frame frame = {MAGIC, T_DATA, (uint16_t)stream, command->id, (uint32_t)got};
        memcpy(at, &frame, sizeof(frame));
        out_tail += sizeof(frame) + (size_t)got;
        command->credit[stream] -= (uint32_t)got;
    }
}

static void pump_input(struct command *command)
{
    while (command->input && command->in_used) {
        uint32_t at = command->in_head, piece = WINDOW - at;
        if (piece > command->in_used)
            piece = command->in_used;
        long put = sys(write, command->fd[0], command->input + at, piece);
        if (put == -EINTR)
            continue;
        if (put == -EAGAIN)
            break;
        if (put <= 0) {
            drop_input(command);
            command->tell_eof[0] = 1;
            break;
        }
        command->in_head = (at + (uint32_t)put) % WINDOW;
        command->in_used -= (uint32_t)put;
        command->credit[0] += (uint32_t)put;
    }
    if (command->input && !command->in_used && command->input_ends) {
        if (command->pty) { /* a terminal has no end of file but this key */
            if (sys(write, command->fd[0], "\4", 1) == 1)
                command->input_ends = 0;
        } else {
            drop_input(command);
        }
    }
}

static void pump(struct command *command)
{
    pump_input(command);
    for (int stream = 1; stream < 3; stream++)
        pump_output(command, stream);
    if (out_room() < OUT_RESERVE * 2)
        return;
    if (command->orphan) {
        if (command->ended && command->fd[1] < 0 && command->fd[2] < 0)
            command->pid = 0;
        return;
    }
    if (command->credit[0] >= WINDOW / 4 || (command->credit[0] && !command->in_used)) {
        send_frame(T_CREDIT, 0, command->id, &command->credit[0], 4);
        command->credit[0] = 0;
    }
    for (int stream = 0; stream < 3 && out_room() >= OUT_RESERVE * 2; stream++)
        if (command->tell_eof[stream]) {
            command->tell_eof[stream] = 0;
            send_frame(T_DATA, stream, command->id, 0, 0);
        }
    if (command->ended && command->fd[1] < 0 && command->fd[2] < 0 && out_room() >= OUT_RESERVE) {
        int killed = (command->status & 0x7f) != 0;
        uint32_t end[2] = {killed ? ENDED_KILLED : ENDED_EXITED,
                           (uint32_t)(killed ? command->status & 0x7f : command->status >> 8 & 0xff)};
        send_frame(T_EXIT, 0, command->id, end, sizeof(end));
        command->pid = 0;
    }
}

/* What the host says. */

static void synchronise(const struct sync *sync)
{
    struct { uint8_t nonce[16]; uint32_t version, commands; } hello = {.version = VERSION, .commands = COMMANDS};
    /* A new host: it knows nothing of the commands that run, and of what was still to be sent. */
    for (struct command *each = commands; each < commands + COMMANDS; each++)
        each->orphan = 1;
    out_head = out_tail = 0;
    if (sync->flags & SYNC_CLOCK) {
        struct timespec now = {sync->realtime_ns / 1000000000, sync->realtime_ns % 1000000000};
        sys(clock_settime, 0, &now);
    }
    if (sync->flags & SYNC_RESEED) {
        struct { int bits, size; uint8_t seed[32]; } pool = {256, 32, {0}};
        memcpy(pool.seed, sync->seed, sizeof(pool.seed));
        long fd = sys(openat, dev_fs, "urandom", O_WRONLY | O_CLOEXEC);
        if (fd >= 0) {
            sys(ioctl, fd, RNDADDENTROPY, &pool);
            sys(ioctl, fd, RNDRESEEDCRNG, 0);
            sys(close, fd);
        }
    }
    memcpy(hello.nonce, sync->nonce, sizeof(hello.nonce));
    send_frame(T_HELLO, 0, 0, &hello, sizeof(hello));
}

static void type_in(struct command *command, const unsigned char *data, uint32_t length)
{
    if (!command->input)
        return; /* the command has closed it, and the host is told */
    if (!length) {
        command->input_ends = 1;
        return;
    }
    if (length > WINDOW - command->in_used)
        length = WINDOW - command->in_used;
    for (uint32_t done = 0; done < length;) {
        uint32_t at = (command->in_head + command->in_used) % WINDOW, piece = WINDOW - at;
        if (piece > length - done)
            piece = length - done;
        memcpy(command->input + at, data + done, piece);
        command->in_used += piece;
        done += piece;
    }
}

static void obey(const struct frame *frame, const unsigned char *payload)
{
    static union { struct spawn spawn; struct sync sync; uint32_t number; struct { uint16_t rows, columns; } size;
                   unsigned char bytes[PAYLOAD_MAX + 1]; } body; /* aligned, and ends with a zero */
    struct command *command = find(frame->id);
    if (frame->type == T_DATA) {
        if (command)
            type_in(command, payload, frame->length);
        return;
    }
    memcpy(body.bytes, payload, frame->length);
    if (frame->type == T_SYNC && frame->length >= sizeof(body.sync))
        synchronise(&body.sync);
    else if (frame->type == T_SPAWN && frame->length >= sizeof(body.spawn))
        spawn(frame->id, &body.spawn, frame->length);
    else if (!command || frame->length < 4)
        return;
    else if (frame->type == T_CREDIT && (frame->stream == 1 || frame->stream == 2))
        command->credit[frame->stream] += body.number;
    else if (frame->type == T_SIGNAL && !command->ended) {
        if (sys(kill, -command->pid, body.number)) /* it has no session of its own yet */
            sys(kill, command->pid, body.number);
    } else if (frame->type == T_RESIZE && command->pty && command->fd[1] >= 0) {
        struct winsize size = {body.size.rows, body.size.columns, 0, 0};
        sys(ioctl, command->fd[1], TIOCSWINSZ, &size);
    }
}

/* Whether the port is still there. A read gives one page at most. */
static int receive(void)
{
    while (IN_SIZE - in_used >= 4096) {
        long got = sys(read, port, in + in_used, IN_SIZE - in_used);
        if (got == -EINTR)
            continue;
        if (got == -EAGAIN)
            return 1;
        if (got <= 0) {
            rest(100); /* zero: the host's end is closed for now */
            return got == 0;
        }
        in_used += (size_t)got;
    }
    return 1;
}

static void parse(void)
{
    size_t at = 0;
    for (;;) {
        struct frame frame;
        while (at < in_used && in[at] != MAGIC)
            at++; /* nothing, or what is left of a frame to another host */
        if (in_used - at < sizeof(frame))
            break;
        memcpy(&frame, in + at, sizeof(frame));
        if (frame.length > PAYLOAD_MAX) {
            at++;
            continue;
        }
        if (in_used - at < sizeof(frame) + frame.length || out_room() < OUT_RESERVE * 2)
            break;
        obey(&frame, in + at + sizeof(frame));
        at += sizeof(frame) + frame.length;
    }
    in_used -= at;
    memmove(in, in + at, in_used);
}

static void serve(void)
{
    static struct pollfd polled[2 + 3 * COMMANDS];
    for (;;) {
        int count = 0, room;
        flush();
        room = out_room() >= OUT_SIZE / 2;
        polled[count++] = (struct pollfd){signals, POLLIN, 0};
        polled[count++] = (struct pollfd){port, (short)((room ? POLLIN : 0) | (out_head < out_tail ? POLLOUT : 0)), 0};
        for (struct command *each = commands; each < commands + COMMANDS; each++) {
            if (!each->pid)
                continue;
            if (each->input && each->in_used)
                polled[count++] = (struct pollfd){each->fd[0], POLLOUT, 0};
            for (int stream = 1; stream < 3 && room; stream++)
                if (each->fd[stream] >= 0 && (each->credit[stream] || each->orphan))
                    polled[count++] = (struct pollfd){each->fd[stream], POLLIN, 0};
        }
        sys(ppoll, polled, count, 0, 0, 0);
        if (polled[0].revents) {
            unsigned char ignored[128];
            sys(read, signals, ignored, sizeof(ignored));
            reap();
        }
        if (polled[1].revents & ~POLLOUT && !receive())
            return;
        parse();
        for (struct command *each = commands; each < commands + COMMANDS; each++)
            if (each->pid)
                pump(each);
    }
}

/* Finding the port. */

static int mount_nowhere(const char *kind)
{
    long context = sys(fsopen, kind, FSOPEN_CLOEXEC);
    if (context < 0)
        return -1;
    long mounted = sys(fsconfig, context, FSCONFIG_CMD_CREATE, 0, 0, 0);
    if (!mounted)
        mounted = sys(fsmount, context, FSMOUNT_CLOEXEC, 0);
    sys(close, context);
    if (mounted < 0)
        return -1;
    long kept = sys(fcntl, mounted, F_DUPFD_CLOEXEC, 3); /* 0, 1 and 2 are what become() makes of a command's streams */
    sys(close, mounted);
    return (int)kept;
}

static int is_ours(long ports, const char *name)
{
    char path[64] = "", found[sizeof(PORT_NAME) + 1] = "";
    size_t length = length_of(name);
    if (length > 32)
        return 0;
    memcpy(path, name, length);
    memcpy(path + length, "/name", 6);
    long fd = sys(openat, ports, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    long got = sys(read, fd, found, sizeof(found));
    sys(close, fd);
    if (got != sizeof(PORT_NAME)) /* the name and a newline */
        return 0;
    found[got - 1] = 0;
    return same(found, PORT_NAME);
}

static int open_port(void)
{
    char names[1024] __attribute__((aligned(8)));
    long ports = sys(openat, sys_fs, "class/virtio-ports", O_RDONLY | O_DIRECTORY | O_CLOEXEC), got;
    int found = -1;
    if (ports < 0)
        return -1;
    while (found < 0 && (got = sys(getdents64, ports, names, sizeof(names))) > 0)
        for (long at = 0; at < got && found < 0;) {
            struct dirent *each = (void *)(names + at);
            at += each->length;
            if (is_ours(ports, each->name))
                found = (int)sys(openat, dev_fs, each->name, O_RDWR | O_NONBLOCK | O_CLOEXEC);
        }
    sys(close, ports);
    return found < 0 ? -1 : found;
}

/* Until process 1 has a /proc, which an init mounts early, and avmm's own when all else is in place: a kernel with its drivers
 * built in has our port before there is a program to run. An init may do without: after ten seconds we go on. */
static void wait_for_init(void)
{
    for (int looks = 0; looks < 1000; looks++) {
        long seen = sys(openat, proc_fs, "1/root/proc/1", O_PATH | O_CLOEXEC);
        if (seen < 0)
            seen = sys(openat, AT_FDCWD, "/proc/1", O_PATH | O_CLOEXEC);
        if (seen >= 0) {
            sys(close, seen);
            return;
        }
        rest(10);
    }
}

/* Until the driver has brought up our port. Without netlink we have to look again and again. */
static void wait_for_port(void)
{
    static char event[4096];
    struct sockaddr_nl all = {AF_NETLINK, 0, 0, 1};
    long events = sys(socket, AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC, KOBJECT_UEVENT);
    if (events >= 0)
        sys(bind, events, &all, sizeof(all));
    while ((port = open_port()) < 0)
        if (events < 0 || sys(read, events, event, sizeof(event)) == -EINTR)
            rest(50);
    if (events >= 0)
        sys(close, events);
}

static void agent(void)
{
    uint64_t all = ~0ull;
    sys(setsid);
    sys(rt_sigprocmask, SIG_SETMASK, &all, 0, sizeof(all));
    for (int fd = 0; fd < 3; fd++)
        sys(close, fd);
    proc_fs = mount_nowhere("proc");
    sys_fs = mount_nowhere("sysfs");
    dev_fs = mount_nowhere("devtmpfs");
    for (long fd = 0; fd >= 0 && fd < 3;)
        fd = sys(openat, dev_fs, "null", O_RDWR | O_CLOEXEC);
    write_file(proc_fs, "self/oom_score_adj", "-900", 4);
    uint64_t child = 1ull << (SIGCHLD - 1);
    signals = (int)sys(signalfd4, -1, &child, sizeof(child), O_NONBLOCK | O_CLOEXEC);
    wait_for_init();
    for (;;) {
        wait_for_port();
        serve();
        sys(close, port);
        in_used = out_head = out_tail = 0;
    }
}

/* The first process: the stack holds argc, argv, NULL, the environment, NULL. */
__attribute__((used, noreturn)) void first_process(long *stack)
{
    static char init[256] = "/init";
    static const char *const others[] = {"/init", "/sbin/init", "/etc/init", "/bin/init", "/bin/sh"};
    char **argv = (char **)(stack + 1), **env = argv + stack[0] + 1;
    if (fork_() == 0) {
        argv[0][0] = '@'; /* systemd kills what is not so named when it leaves the initrd */
        agent();
    }
    /* avmm says in a link what the guest would have started without us. */
    sys(readlinkat, AT_FDCWD, "/.avmm/init", init, sizeof(init) - 1);
    argv[0] = init;
    sys(execve, init, argv, env);
    for (size_t n = 0; n < sizeof(others) / sizeof(*others); n++) {
        argv[0] = (char *)others[n];
        sys(execve, others[n], argv, env);
    }
    for (;;)
        sys(exit_group, 1); /* as any kernel without an init: it panics */
}

__asm__(".globl _start\n_start:\n\tmov x29, #0\n\tmov x30, #0\n\tmov x0, sp\n\tb first_process\n");
