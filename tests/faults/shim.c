/* Below every library: the FAULT_AT-th write, fsync or rename inside FAULT_FOLDER goes wrong.
 * FAULT_KIND: crash, torn (half is written, then a crash), full (ENOSPC from there on), broken (EIO
 * once). At a process's end the number of operations is written to FAULT_COUNT. The time of day is
 * CLOCK_SHIFT seconds from the true one. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static atomic_long count;
static long at;
static const char *folder, *kind;

__attribute__((constructor)) static void begin(void) {
    folder = getenv("FAULT_FOLDER");
    kind = getenv("FAULT_KIND");
    at = getenv("FAULT_AT") ? atol(getenv("FAULT_AT")) : 0;
}

__attribute__((destructor)) static void end(void) {
    FILE *out = getenv("FAULT_COUNT") ? fopen(getenv("FAULT_COUNT"), "w") : NULL;
    if (out) {
        fprintf(out, "%ld\n", atomic_load(&count));
        fclose(out);
    }
}

static int inside(const char *path) {
    return folder && path && strncmp(path, folder, strlen(folder)) == 0;
}

static int ours(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return inside(path);
}

/* 0: go on; 1: fail with errno set; 2: write half, then die */
static int fate(int frees) {
    long now = atomic_fetch_add(&count, 1) + 1;
    if (!at || now < at) return 0;
    if (!strcmp(kind, "full")) {
        errno = ENOSPC;
        return !frees;
    }
    if (now != at) return 0;
    if (!strcmp(kind, "broken")) {
        errno = EIO;
        return 1;
    }
    if (!strcmp(kind, "torn")) return 2;
    raise(SIGKILL);
    return 1;
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define WRITES(name, arguments, call, half)        \
    ssize_t name arguments {                       \
        REAL(name);                                \
        switch (ours(fd) ? fate(0) : 0) {          \
        case 1: return -1;                         \
        case 2: half; raise(SIGKILL);              \
        }                                          \
        return call;                               \
    }

WRITES(write, (int fd, const void *data, size_t n), real(fd, data, n), real(fd, data, n / 2))
WRITES(pwrite, (int fd, const void *data, size_t n, off_t to), real(fd, data, n, to),
       real(fd, data, n / 2, to))
WRITES(pwrite64, (int fd, const void *data, size_t n, off64_t to), real(fd, data, n, to),
       real(fd, data, n / 2, to))
WRITES(writev, (int fd, const struct iovec *parts, int n), real(fd, parts, n),
       real(fd, parts, n / 2))

#define SYNCS(name)                                    \
    int name(int fd) {                                 \
        REAL(name);                                    \
        switch (ours(fd) ? fate(0) : 0) {              \
        case 1: return -1;                             \
        case 2: raise(SIGKILL);                        \
        }                                              \
        return real(fd);                               \
    }

SYNCS(fsync)
SYNCS(fdatasync)

int rename(const char *from, const char *to) {
    REAL(rename);
    switch (inside(to) ? fate(1) : 0) {
    case 1: return -1;
    case 2: raise(SIGKILL);
    }
    return real(from, to);
}

int renameat(int a, const char *from, int b, const char *to) {
    REAL(renameat);
    switch (inside(to) ? fate(1) : 0) {
    case 1: return -1;
    case 2: raise(SIGKILL);
    }
    return real(a, from, b, to);
}

static long shift(void) {
    return getenv("CLOCK_SHIFT") ? atol(getenv("CLOCK_SHIFT")) : 0;
}

int clock_gettime(clockid_t which, struct timespec *now) {
    REAL(clock_gettime);
    int failed = real(which, now);
    if (!failed && which == CLOCK_REALTIME) now->tv_sec += shift();
    return failed;
}

time_t time(time_t *now) {
    REAL(time);
    time_t then = real(NULL) + shift();
    if (now) *now = then;
    return then;
}
