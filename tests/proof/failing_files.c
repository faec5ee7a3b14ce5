/* Files that cannot be read, for the process that this library is preloaded into (LD_PRELOAD) and its forks.
 *
 * cc -shared -fPIC -O1 failing_files.c -o failing_files.so -ldl
 *
 * Nothing fails until failing_files_arm("OPERATION ACTION SKIP TIMES REGEX\n...") is called. OPERATION: open, read, list
 * or stat. ACTION: an errno, or eof (a read finds the end of the file) or flip (the first byte read has one bit flipped).
 * SKIP: as many calls are left alone before; TIMES: as many are hit, 0: all. REGEX (extended) is found in the path. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <regex.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { FINE = 0, END = -1, FLIP = -2, RULES = 16 };

static struct {
    char operation;
    int action, skip, times;
    regex_t path;
    atomic_int seen;
} rules[RULES];
static atomic_int count;
static atomic_int hits;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int failing_files_hits(void) { return atomic_load(&hits); }

int failing_files_arm(const char *text) {
    int made = 0, length = 0;
    char operation[16], action[16], path[512];
    atomic_store(&count, 0);
    atomic_store(&hits, 0);
    for (; made < RULES; made++, text += length) {
        int skip, times;
        if (sscanf(text, "%15s %15s %d %d %511s%n", operation, action, &skip, &times, path, &length) != 5) break;
        rules[made].operation = operation[0];
        rules[made].action = !strcmp(action, "eof") ? END : !strcmp(action, "flip") ? FLIP : atoi(action);
        rules[made].skip = skip;
        rules[made].times = times;
        atomic_store(&rules[made].seen, 0);
        if (regcomp(&rules[made].path, path, REG_EXTENDED | REG_NOSUB)) return -1;
    }
    atomic_store(&count, made);
    return made;
}

static int action_for(char operation, const char *path) {
    int armed = atomic_load(&count);
    for (int index = 0; index < armed; index++) {
        if (rules[index].operation != operation || regexec(&rules[index].path, path, 0, NULL, 0)) continue;
        int seen = atomic_fetch_add(&rules[index].seen, 1) - rules[index].skip;
        if (seen >= 0 && (!rules[index].times || seen < rules[index].times)) {
            atomic_fetch_add(&hits, 1);
            return rules[index].action;
        }
    }
    return FINE;
}

static void path_of(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t size = readlink(link, path, PATH_MAX - 1);
    path[size < 0 ? 0 : size] = 0;
}

/* True with errno set if this operation on `name`, below `directory` where it is relative, shall fail. */
static int fails(char operation, int directory, const char *name) {
    if (!atomic_load(&count)) return 0;
    char path[2 * PATH_MAX];
    if (name == NULL || name[0] == 0) path_of(directory, path);
    else if (name[0] == '/' || directory == AT_FDCWD) snprintf(path, sizeof path, "%s", name);
    else {
        path_of(directory, path);
        size_t used = strlen(path);
        snprintf(path + used, sizeof path - used, "/%s", name);
    }
    char *end = path;
    for (char *from = path; *from; from++) /* a//b is a/b */
        if (from[0] != '/' || from[1] != '/') *end++ = *from;
    *end = 0;
    int action = action_for(operation, path);
    if (action > 0) errno = action;
    return action > 0;
}

static int action_on(int descriptor) {
    char path[PATH_MAX];
    if (!atomic_load(&count)) return FINE;
    path_of(descriptor, path);
    int action = path[0] == '/' ? action_for('r', path) : FINE;
    if (action > 0) errno = action;
    return action;
}

static ssize_t flipped(ssize_t got, int action, void *bytes) {
    if (action == FLIP && got > 0) *(unsigned char *)bytes ^= 1;
    return got;
}

#define MODE(flags)                                                     \
    mode_t mode = 0;                                                    \
    if ((flags) & (O_CREAT | O_TMPFILE)) {                              \
        va_list more;                                                   \
        va_start(more, flags);                                          \
        mode = va_arg(more, mode_t);                                    \
        va_end(more);                                                   \
    }

#define OPEN(name)                                                      \
    int name(const char *path, int flags, ...) {                        \
        MODE(flags)                                                     \
        return fails('o', AT_FDCWD, path) ? -1 : REAL(name)(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                    \
    int name(int directory, const char *path, int flags, ...) {         \
        MODE(flags)                                                     \
        return fails('o', directory, path) ? -1 : REAL(name)(directory, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

DIR *opendir(const char *path) { return fails('l', AT_FDCWD, path) ? NULL : REAL(opendir)(path); }
DIR *fdopendir(int directory) { return fails('l', directory, NULL) ? NULL : REAL(fdopendir)(directory); }

int stat(const char *path, struct stat *found) { return fails('s', AT_FDCWD, path) ? -1 : REAL(stat)(path, found); }
int stat64(const char *path, struct stat64 *found) { return fails('s', AT_FDCWD, path) ? -1 : REAL(stat64)(path, found); }
int lstat(const char *path, struct stat *found) { return fails('s', AT_FDCWD, path) ? -1 : REAL(lstat)(path, found); }
int lstat64(const char *path, struct stat64 *found) { return fails('s', AT_FDCWD, path) ? -1 : REAL(lstat64)(path, found); }
int fstatat(int directory, const char *path, struct stat *found, int flags) {
    return fails('s', directory, path) ? -1 : REAL(fstatat)(directory, path, found, flags);
}
int fstatat64(int directory, const char *path, struct stat64 *found, int flags) {
    return fails('s', directory, path) ? -1 : REAL(fstatat64)(directory, path, found, flags);
}

ssize_t read(int descriptor, void *bytes, size_t size) {
    int action = action_on(descriptor);
    return action > 0 ? -1 : action == END ? 0 : flipped(REAL(read)(descriptor, bytes, size), action, bytes);
}

#define PREAD(name, offset_t)                                           \
    ssize_t name(int descriptor, void *bytes, size_t size, offset_t offset) { \
        int action = action_on(descriptor);                             \
        return action > 0 ? -1 : action == END ? 0 : flipped(REAL(name)(descriptor, bytes, size, offset), action, bytes); \
    }
PREAD(pread, off_t)
PREAD(pread64, off64_t)

#define PREADV(name, offset_t)                                          \
    ssize_t name(int descriptor, const struct iovec *parts, int number, offset_t offset) { \
        int action = action_on(descriptor);                             \
        if (action > 0) return -1;                                      \
        if (action == END) return 0;                                    \
        return flipped(REAL(name)(descriptor, parts, number, offset), action, parts[0].iov_base); \
    }
PREADV(preadv, off_t)
PREADV(preadv64, off64_t)

#define PREADV2(name, offset_t)                                         \
    ssize_t name(int descriptor, const struct iovec *parts, int number, offset_t offset, int flags) { \
        int action = action_on(descriptor);                             \
        if (action > 0) return -1;                                      \
        if (action == END) return 0;                                    \
        return flipped(REAL(name)(descriptor, parts, number, offset, flags), action, parts[0].iov_base); \
    }
PREADV2(preadv2, off_t)
PREADV2(preadv64v2, off64_t)
