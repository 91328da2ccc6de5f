// The guest's side of the vsock tests and bench, static, for arm64.
//
//   vsock_peer echo PORT BYTES    connect to the host's PORT, send BYTES, compare what comes back with what was sent
//   vsock_peer ping PORT COUNT    round trips of one byte: p50 and p99 in microseconds
//   vsock_peer sink PORT BYTES    send BYTES and nothing else: MB/s        source PORT BYTES    the other way round
//   vsock_peer serve PORT         send back whatever who connects to our PORT sends
//   vsock_peer refused PORT       connect, and say with which error it failed
//
// PORT tcp:N is TCP to the gateway's port N instead: the same work over the network.
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <linux/vm_sockets.h>

static char buffer[1 << 18], other[1 << 18];

static void die(const char *what) {
    printf("vsock_peer: %s: %s\n", what, strerror(errno));
    exit(1);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static int dial_tcp(unsigned port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    inet_pton(AF_INET, "10.0.2.2", &address.sin_addr);
    int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    if (fd < 0) die("socket");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(fd, (struct sockaddr *)&address, sizeof address)) die("connect");
    return fd;
}

static int dial(unsigned port) {
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = port};
    struct timeval patience = {.tv_sec = 60};  // Linux waits two seconds, which a starved host may take
    int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (fd < 0) die("socket");
    setsockopt(fd, AF_VSOCK, SO_VM_SOCKETS_CONNECT_TIMEOUT, &patience, sizeof patience);
    if (connect(fd, (struct sockaddr *)&address, sizeof address)) die("connect");
    return fd;
}

// A stream of bytes in which no two places look alike.
static void fill(char *to, size_t length, uint64_t *state) {
    for (size_t at = 0; at < length; at += 8) {
        *state ^= *state << 13, *state ^= *state >> 7, *state ^= *state << 17;
        memcpy(to + at, state, 8);
    }
}

static void put(int fd, const char *from, size_t length) {
    while (length) {
        ssize_t done = write(fd, from, length);
        if (done <= 0) die("write");
        from += done, length -= done;
    }
}

static void echo(int fd, uint64_t bytes) {
    double start = now();
    uint64_t sent = 88172645463325252u, expected = sent;
    pid_t child = fork();
    if (!child) {
        for (uint64_t left = bytes; left;) {
            size_t piece = left < sizeof buffer ? left : sizeof buffer;
            fill(buffer, piece, &sent);
            put(fd, buffer, piece);
            left -= piece;
        }
        shutdown(fd, SHUT_WR);
        _exit(0);
    }
    uint64_t got = 0;
    for (;;) {
        size_t have = 0;
        while (have < sizeof buffer) {
            ssize_t done = read(fd, buffer + have, sizeof buffer - have);
            if (done < 0) die("read");
            if (!done) break;
            have += done;
        }
        if (!have) break;
        fill(other, have, &expected);
        if (memcmp(buffer, other, have)) {
            printf("vsock_peer: wrong bytes after %llu\n", (unsigned long long)got);
            exit(1);
        }
        got += have;
    }
    waitpid(child, NULL, 0);
    double took = now() - start;
    printf("echo %s: %llu bytes, %.1f MB/s\n", got == bytes ? "right" : "short", (unsigned long long)got, got / took / 1e6);
}

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void ping(int fd, unsigned count) {
    double *took = malloc(count * sizeof *took);
    for (unsigned turn = 0; turn < count; turn++) {
        double start = now();
        put(fd, "x", 1);
        if (read(fd, buffer, 1) != 1) die("read");
        took[turn] = (now() - start) * 1e6;
    }
    qsort(took, count, sizeof *took, by_size);
    printf("ping: p50 %.0f us, p99 %.0f us\n", took[count / 2], took[count * 99 / 100]);
}

static void stream(int fd, uint64_t bytes, int out) {
    double start = now();
    uint64_t left = bytes;
    while (left) {
        size_t piece = left < sizeof buffer ? left : sizeof buffer;
        ssize_t done = out ? write(fd, buffer, piece) : read(fd, buffer, piece);
        if (done <= 0) die(out ? "write" : "read");
        left -= done;
    }
    if (out) {
        shutdown(fd, SHUT_WR);
        if (read(fd, buffer, 1) < 0) die("read");  // the host has had all of it
    }
    printf("%s: %.1f MB/s\n", out ? "sink" : "source", bytes / (now() - start) / 1e6);
}

static void serve(unsigned port) {
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = port};
    int listener = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 64)) die("listen");
    printf("serving\n");
    for (;;) {
        int fd = accept(listener, NULL, NULL);
        if (fd < 0) die("accept");
        if (!fork()) {
            ssize_t done;
            while ((done = read(fd, buffer, sizeof buffer)) > 0) put(fd, buffer, done);
            exit(0);
        }
        close(fd);
        while (waitpid(-1, NULL, WNOHANG) > 0) {}
    }
}

int main(int argc, char **argv) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc < 3) return 2;
    int tcp = !strncmp(argv[2], "tcp:", 4);
    unsigned port = strtoul(argv[2] + (tcp ? 4 : 0), NULL, 0);
    uint64_t amount = argc > 3 ? strtoull(argv[3], NULL, 0) : 0;
    if (!strcmp(argv[1], "serve")) serve(port);
    int fd = tcp ? dial_tcp(port) : dial(port);
    if (!strcmp(argv[1], "echo")) echo(fd, amount);
    else if (!strcmp(argv[1], "ping")) ping(fd, amount);
    else if (!strcmp(argv[1], "sink")) stream(fd, amount, 1);
    else if (!strcmp(argv[1], "source")) stream(fd, amount, 0);
    return 0;
}
