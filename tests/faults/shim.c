/* Fails a chosen file operation below one folder: loaded with LD_PRELOAD, asleep until `fault_arm` is called.
 *
 * Counted are the calls of one side, writing or reading, on paths below the root; the `at`-th (from 1) fails in the
 * way that `mode` says, and with `sticky` every one after it. Each call is logged, once it returned, as
 * "number side operation result path other-path\n"; the fields are separated by tabs.
 */
#define _GNU_SOURCE
/* Some systems' compilers define it, and then `read` and `pread` cannot be defined again. */
#undef _FORTIFY_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NONE, KILL, KILL_AFTER, TORN, ERRNO, SHORT, ENDED, STOP };
enum { WRITING = 1, READING = 2 };

static char root[PATH_MAX];
static size_t root_length;
static int log_fd = -1, side_counted, mode, error_number, sticky;
static long at;
static char only[32];
static atomic_long count;

/* `operations`: only calls of this name are failed ("" is all); all of the side are counted. */
void fault_arm(const char *below, int log, int side, long nth, int how, int error, int for_good, const char *operation) {
    root_length = strlen(below);
    memcpy(root, below, root_length + 1);
    strncpy(only, operation, sizeof only - 1);
    side_counted = side, at = nth, mode = how, error_number = error, sticky = for_good;
    atomic_store(&count, 0);
    log_fd = log;
}

static int below(const char *path) {
    return log_fd >= 0 && strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || !path[root_length]);
}

static void die(void) {
    syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
    for (;;) syscall(SYS_pause);
}

static void path_of(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    long length = syscall(SYS_readlink, link, path, PATH_MAX - 1);
    path[length > 0 ? length : 0] = 0;
}

static void full_path(int folder, const char *name, char *path) {
    size_t length = 0;
    path[0] = 0;
    if (name[0] != '/') {
        if (folder == AT_FDCWD)
            syscall(SYS_getcwd, path, PATH_MAX);
        else
            path_of(folder, path);
        length = strlen(path);
        path[length++] = '/';
    }
    strncpy(path + length, name, PATH_MAX - length - 1);
    path[PATH_MAX - 1] = 0;
}

/* Returns what to do with this call, and its number. */
static int fault(int side, const char *operation, const char *path, const char *other, long *number) {
    *number = 0;
    if (log_fd < 0 || !(below(path) || (other && below(other)))) return NONE;
    *number = side == side_counted ? atomic_fetch_add(&count, 1) + 1 : -1;
    int due = *number > 0 && (*number == at || (sticky && *number > at)) && at > 0;
    if (!due || (only[0] && strcmp(only, operation))) return NONE;
    if (mode == STOP) {
        syscall(SYS_kill, syscall(SYS_getpid), SIGTERM);
        return NONE;
    }
    if (mode == KILL || (mode == TORN && strcmp(operation, "write"))) die();
    return mode;
}

static void note(long number, int side, const char *operation, long result, const char *path, const char *other) {
    if (!number) return;
    int before = errno;
    char line[2 * PATH_MAX + 96];
    int length = snprintf(line, sizeof line, "%ld\t%s\t%s\t%ld\t%s\t%s\n", number, side == WRITING ? "w" : "r",
                          operation, result, path, other ? other : "");
    syscall(SYS_write, log_fd, line, length);
    errno = before;
}

/* The whole life of a call that either happens or fails. */
#define CALL(side, operation, path, other, real_call)                                       \
    long number, result;                                                                    \
    int what = fault(side, operation, path, other, &number);                                \
    if (what == ERRNO) {                                                                    \
        errno = error_number;                                                               \
        result = -1;                                                                        \
    } else {                                                                                \
        result = real_call;                                                                 \
        if (what == KILL_AFTER) die();                                                      \
    }                                                                                       \
    note(number, side, operation, result, path, other);                                     \
    return result

static int opened(const char *name, int folder, const char *file, int flags, mode_t mode_) {
    char path[PATH_MAX];
    full_path(folder, file, path);
    int side = flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC) ? WRITING : READING;
    CALL(side, "open", path, NULL, syscall(SYS_openat, folder, file, flags, mode_));
}

#define MODE(flags)                                   \
    mode_t mode_ = 0;                                 \
    if ((flags) & (O_CREAT | O_TMPFILE)) {            \
        va_list rest;                                 \
        va_start(rest, flags);                        \
        mode_ = va_arg(rest, mode_t);                 \
        va_end(rest);                                 \
    }

int open(const char *file, int flags, ...) { MODE(flags) return opened("open", AT_FDCWD, file, flags, mode_); }
int open64(const char *file, int flags, ...) { MODE(flags) return opened("open", AT_FDCWD, file, flags, mode_); }
int openat(int folder, const char *file, int flags, ...) { MODE(flags) return opened("open", folder, file, flags, mode_); }
int openat64(int folder, const char *file, int flags, ...) { MODE(flags) return opened("open", folder, file, flags, mode_); }

static ssize_t written(int fd, const void *data, size_t size, off_t offset) {
    char path[PATH_MAX];
    long number;
    path[0] = 0;
    if (log_fd >= 0) path_of(fd, path);
    int what = fault(WRITING, "write", path, NULL, &number);
    if (what == ERRNO) {
        note(number, WRITING, "write", -1, path, NULL);
        errno = error_number;
        return -1;
    }
    if (what == TORN) size /= 2;
    ssize_t result = offset < 0 ? syscall(SYS_write, fd, data, size) : syscall(SYS_pwrite64, fd, data, size, offset);
    if (what == TORN || what == KILL_AFTER) die();
    note(number, WRITING, "write", result, path, NULL);
    return result;
}

ssize_t write(int fd, const void *data, size_t size) { return written(fd, data, size, -1); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) { return written(fd, data, size, offset); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) { return written(fd, data, size, offset); }

ssize_t writev(int fd, const struct iovec *parts, int many) {
    char path[PATH_MAX];
    path[0] = 0;
    if (log_fd >= 0) path_of(fd, path);
    CALL(WRITING, "write", path, NULL, syscall(SYS_writev, fd, parts, many));
}

static ssize_t gotten(int fd, void *data, size_t size, off_t offset) {
    char path[PATH_MAX];
    long number;
    path[0] = 0;
    if (log_fd >= 0) path_of(fd, path);
    int what = fault(READING, "read", path, NULL, &number);
    ssize_t result = -1;
    if (what == ENDED)
        result = 0;
    else if (what != ERRNO) {
        if (what == SHORT && size > 1) size /= 2;
        result = offset < 0 ? syscall(SYS_read, fd, data, size) : syscall(SYS_pread64, fd, data, size, offset);
    }
    if (what == KILL_AFTER) die();
    note(number, READING, "read", result, path, NULL);
    if (what == ERRNO) errno = error_number;
    return result;
}

ssize_t read(int fd, void *data, size_t size) { return gotten(fd, data, size, -1); }
ssize_t pread(int fd, void *data, size_t size, off_t offset) { return gotten(fd, data, size, offset); }
ssize_t pread64(int fd, void *data, size_t size, off64_t offset) { return gotten(fd, data, size, offset); }

static int synced(int fd, int data_only) {
    char path[PATH_MAX];
    path[0] = 0;
    if (log_fd >= 0) path_of(fd, path);
    CALL(WRITING, "fsync", path, NULL, syscall(data_only ? SYS_fdatasync : SYS_fsync, fd));
}

int fsync(int fd) { return synced(fd, 0); }
int fdatasync(int fd) { return synced(fd, 1); }

/* A failed close still closes: the descriptor is gone either way. */
int close(int fd) {
    char path[PATH_MAX];
    path[0] = 0;
    if (log_fd >= 0 && fd != log_fd && (syscall(SYS_fcntl, fd, F_GETFL) & O_ACCMODE) != O_RDONLY) path_of(fd, path);
    long number;
    int what = fault(WRITING, "close", path, NULL, &number);
    int result = syscall(SYS_close, fd);
    if (what == KILL_AFTER) die();
    if (what == ERRNO) {
        errno = error_number;
        result = -1;
    }
    note(number, WRITING, "close", result, path, NULL);
    return result;
}

static int renamed(int from, const char *old, int to, const char *new) {
    char path[PATH_MAX], other[PATH_MAX];
    full_path(from, old, path);
    full_path(to, new, other);
    CALL(WRITING, "rename", path, other, syscall(SYS_renameat2, from, old, to, new, 0));
}

int rename(const char *old, const char *new) { return renamed(AT_FDCWD, old, AT_FDCWD, new); }
int renameat(int from, const char *old, int to, const char *new) { return renamed(from, old, to, new); }

#define AT_PATH(operation, folder, file, real_call)                     \
    char path[PATH_MAX];                                                \
    full_path(folder, file, path);                                      \
    CALL(WRITING, operation, path, NULL, real_call)

int mkdirat(int folder, const char *file, mode_t m) { AT_PATH("mkdir", folder, file, syscall(SYS_mkdirat, folder, file, m)); }
int mkdir(const char *file, mode_t m) { return mkdirat(AT_FDCWD, file, m); }
int unlinkat(int folder, const char *file, int flags) { AT_PATH("unlink", folder, file, syscall(SYS_unlinkat, folder, file, flags)); }
int unlink(const char *file) { return unlinkat(AT_FDCWD, file, 0); }
int rmdir(const char *file) { return unlinkat(AT_FDCWD, file, AT_REMOVEDIR); }
int linkat(int from, const char *old, int to, const char *new, int flags) { AT_PATH("link", to, new, syscall(SYS_linkat, from, old, to, new, flags)); }
int link(const char *old, const char *new) { return linkat(AT_FDCWD, old, AT_FDCWD, new, 0); }
int symlink(const char *old, const char *new) { AT_PATH("link", AT_FDCWD, new, syscall(SYS_symlinkat, old, AT_FDCWD, new)); }

static int cut(int fd, off_t size) {
    char path[PATH_MAX];
    path[0] = 0;
    if (log_fd >= 0) path_of(fd, path);
    CALL(WRITING, "truncate", path, NULL, syscall(SYS_ftruncate, fd, size));
}

int ftruncate(int fd, off_t size) { return cut(fd, size); }
int ftruncate64(int fd, off64_t size) { return cut(fd, size); }
