/* Counts the system calls that touch a folder, and lets one of them fail or end the process.

   Preloaded (LD_PRELOAD), it stands before libc's functions. `faults_arm` names the folder, the call and what happens:
   0 nothing, 1 the process is killed before the call, 2 it is killed within a write, half of which is done, or else
   before the call, 3 the call fails with ENOSPC, 4 with EIO. `faults_count` says how many calls there were. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long at = 0;
static int what = 0;
static atomic_long calls = 0;

void faults_arm(const char *path, long number, int mode) {
    at = number, what = mode, calls = 0;
    strncpy(folder, path, sizeof folder - 1);
}

long faults_count(void) { return calls; }

static int of_descriptor(int descriptor) {
    char link[64], target[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, target, sizeof target - 1);
    if (length < 0) return 0;
    target[length] = 0;
    return strncmp(target, folder, strlen(folder)) == 0;
}

static int of_path(int directory, const char *path) {
    if (path == NULL) return 0;
    if (path[0] == '/' || directory == AT_FDCWD) return strncmp(path, folder, strlen(folder)) == 0;
    return of_descriptor(directory);
}

/* Whether a call must fail. */
static int strikes(int touches) {
    if (!folder[0] || !touches || atomic_fetch_add(&calls, 1) + 1 != at || what == 0) return 0;
    if (what <= 2) kill(getpid(), SIGKILL);
    errno = what == 3 ? ENOSPC : EIO;
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define CALL(result, name, declared, touches, ...)                                                                     \
    result name declared { return strikes(touches) ? -1 : REAL(name)(__VA_ARGS__); }
#define OPEN(name, declared, directory, ...)                                                                           \
    int name declared {                                                                                                \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                                        \
        va_end(rest);                                                                                                  \
        return strikes(of_path(directory, path)) ? -1 : REAL(name)(__VA_ARGS__, flags, mode);                          \
    }

OPEN(open, (const char *path, int flags, ...), AT_FDCWD, path)
OPEN(open64, (const char *path, int flags, ...), AT_FDCWD, path)
OPEN(openat, (int directory, const char *path, int flags, ...), directory, directory, path)
OPEN(openat64, (int directory, const char *path, int flags, ...), directory, directory, path)
CALL(ssize_t, read, (int fd, void *data, size_t size), of_descriptor(fd), fd, data, size)
CALL(int, fsync, (int fd), of_descriptor(fd), fd)
CALL(int, ftruncate, (int fd, off_t size), of_descriptor(fd), fd, size)
CALL(int, ftruncate64, (int fd, off64_t size), of_descriptor(fd), fd, size)
CALL(int, rename, (const char *from, const char *to), of_path(AT_FDCWD, to), from, to)
CALL(int, renameat, (int a, const char *from, int b, const char *to), of_path(b, to), a, from, b, to)
CALL(int, unlink, (const char *path), of_path(AT_FDCWD, path), path)
CALL(int, unlinkat, (int fd, const char *path, int flags), of_path(fd, path), fd, path, flags)
CALL(int, rmdir, (const char *path), of_path(AT_FDCWD, path), path)
CALL(int, mkdir, (const char *path, mode_t mode), of_path(AT_FDCWD, path), path, mode)
CALL(int, mkdirat, (int fd, const char *path, mode_t mode), of_path(fd, path), fd, path, mode)
CALL(int, chmod, (const char *path, mode_t mode), of_path(AT_FDCWD, path), path, mode)
CALL(int, flock, (int fd, int operation), of_descriptor(fd), fd, operation)

ssize_t write(int fd, const void *data, size_t size) {
    int touches = folder[0] && of_descriptor(fd);
    if (touches && what == 2 && calls + 1 == at) REAL(write)(fd, data, size / 2);
    return strikes(touches) ? -1 : REAL(write)(fd, data, size);
}
