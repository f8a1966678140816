/* Fails or ends the process at the Nth file operation below one directory.
 *
 * Preloaded into a test process. arm(prefix, n, mode) starts counting; the operations that change
 * files whose path begins with the prefix are numbered from 1.
 *
 *   FAIL    operation n fails with ENOSPC (EIO for syncing), once
 *   FULL    operation n and all writes after it fail with ENOSPC
 *   TORN    operation n writes half of its bytes and fails
 *   KILL    the process is killed before operation n
 *   TEAR    operation n writes half of its bytes, then the process is killed
 *   QUOTA   n bytes can be written in all: the write that exceeds them is short, as the kernel
 *           makes it, and those after it fail with EDQUOT; bytes are counted, not operations
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

enum { OFF, FAIL, FULL, TORN, KILL, TEAR, QUOTA };

static char prefix[4096];
static long target;
static int mode;
static atomic_long count;

void arm(const char *path, long n, int how) {
    strncpy(prefix, path, sizeof prefix - 1);
    target = n;
    count = 0;
    mode = how;
}

long operations(void) { return count; }

static int is_ours(int fd) {
    if (mode == OFF) return 0;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return strncmp(path, prefix, strlen(prefix)) == 0;
}

/* Counts an operation: 0 go on, 1 fail, 2 do half and fail, 3 do half and die. */
static int verdict(int writes) {
    if (mode == QUOTA) return 0;
    long n = ++count;
    if (mode == FULL && n >= target) return writes || n == target;
    if (n != target) return 0;
    switch (mode) {
    case FAIL: return 1;
    case TORN: return writes ? 2 : 1;
    case KILL: raise(SIGKILL);
    case TEAR:
        if (writes) return 3;
        raise(SIGKILL);
    }
    return 0;
}

#define REAL(name, ...) \
    static __typeof__(__VA_ARGS__) real; \
    if (!real) real = (__typeof__(real))dlsym(RTLD_NEXT, name);

/* How much of a write of so many bytes the quota allows; -1: nothing, and it fails. */
static ssize_t allowance(size_t size) {
    long left = target - atomic_fetch_add(&count, (long)size);
    if (left <= 0 && size > 0) return -1;
    return left < (long)size ? (ssize_t)left : (ssize_t)size;
}

#define WRITE_BODY(call_whole, call_half) \
    int ours = is_ours(fd); \
    if (ours && mode == QUOTA) { \
        ssize_t allowed = allowance(size); \
        if (allowed < 0) { errno = EDQUOT; return -1; } \
        size = (size_t)allowed; \
    } \
    int what = ours ? verdict(1) : 0; \
    if (what == 0) return call_whole; \
    if (what >= 2 && size > 1) { ssize_t ignored = call_half; (void)ignored; } \
    if (what == 3) raise(SIGKILL); \
    errno = ENOSPC; \
    return -1;

ssize_t write(int fd, const void *data, size_t size) {
    REAL("write", ssize_t (*)(int, const void *, size_t))
    WRITE_BODY(real(fd, data, size), real(fd, data, size / 2))
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    REAL("pwrite", ssize_t (*)(int, const void *, size_t, off_t))
    WRITE_BODY(real(fd, data, size, at), real(fd, data, size / 2, at))
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    REAL("pwrite64", ssize_t (*)(int, const void *, size_t, off64_t))
    WRITE_BODY(real(fd, data, size, at), real(fd, data, size / 2, at))
}

#define SYNC_BODY(call) \
    if (is_ours(fd) && verdict(0)) { errno = EIO; return -1; } \
    return call;

int fsync(int fd) {
    REAL("fsync", int (*)(int))
    SYNC_BODY(real(fd))
}

int fdatasync(int fd) {
    REAL("fdatasync", int (*)(int))
    SYNC_BODY(real(fd))
}

int ftruncate(int fd, off_t size) {
    REAL("ftruncate", int (*)(int, off_t))
    SYNC_BODY(real(fd, size))
}

int ftruncate64(int fd, off64_t size) {
    REAL("ftruncate64", int (*)(int, off64_t))
    SYNC_BODY(real(fd, size))
}

int rename(const char *from, const char *to) {
    REAL("rename", int (*)(const char *, const char *))
    if (mode != OFF && strncmp(to, prefix, strlen(prefix)) == 0 && verdict(0)) {
        errno = EIO;
        return -1;
    }
    return real(from, to);
}
