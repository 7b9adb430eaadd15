/* Interposes the libc calls that change or read files, to kill the process or to fail them at the k-th.

   Only what lies below one folder counts (fault_arm's root); a descriptor's path is read from
   /proc/self/fd. Loaded with LD_PRELOAD; nothing happens before fault_arm. Linux with glibc.

   Not seen: memory maps (SQLite's -shm file, mapped arrays), stat and readdir. fwrite is flushed at
   once, so that what C's stdio buffers (numpy's tofile) can be hit too. */

#define _GNU_SOURCE
#include <dirent.h>
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

enum mode { COUNT, KILL_BEFORE, KILL_AFTER, KILL_TORN, FAIL };
/* SPACE: a change that can need space on the disk; BRIEF: it fails at the k-th operation alone, also if sticky */
enum kind { CHANGE = 1, SPACE = 2, READ = 4, BRIEF = 8 };
enum verdict { IGNORED, GO, TEAR, DENIED };

struct op {
    const char *call;
    long n; /* its number among the counted ones, from 1; 0: not counted */
    char path[PATH_MAX], target[PATH_MAX];
};

static char root[PATH_MAX], gate[PATH_MAX];
static size_t root_length;
static int mode, error, sticky, kinds, trace = -1;
static long at;
static atomic_long count;

/* Count the operations of `of` kinds below `below`; at the k-th do what `how` says.
   `persistent`: from the k-th on all that can need space (ENOSPC), or all (other errors), fail, for as
   long as the file `while_there` exists if one is named. Every operation is written to `trace_to`. */
int fault_arm(const char *below, long k, int how, int err, int persistent, int of, const char *while_there,
              const char *trace_to)
{
    root_length = strlen(below);
    if (root_length == 0 || root_length >= sizeof root || strlen(while_there) >= sizeof gate)
        return -1;
    strcpy(gate, while_there);
    at = k, mode = how, error = err, sticky = persistent, kinds = of;
    trace = syscall(SYS_openat, AT_FDCWD, trace_to, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    atomic_store(&count, 0);
    memcpy(root, below, root_length + 1);
    return trace < 0 ? -1 : 0;
}

long fault_count(void) { return atomic_load(&count); }

static void note(const struct op *op, const char *what)
{
    static __thread char line[2 * PATH_MAX + 100];
    int n = snprintf(line, sizeof line, "%ld\t%s\t%s\t%s\t%s\n", op->n, what, op->call, op->path, op->target);
    if (trace >= 0 && n > 0)
        syscall(SYS_write, trace, line, (size_t)n < sizeof line ? (size_t)n : sizeof line - 1);
}

static void die(const struct op *op, const char *when)
{
    note(op, when);
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;)
        pause();
}

static int is_below(const char *path)
{
    return strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || path[root_length] == '\0');
}

static void path_of_fd(int fd, char *out)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = fd < 0 || root_length == 0 ? -1 : readlink(link, out, PATH_MAX - 1);
    out[n < 0 ? 0 : n] = '\0';
}

static void path_at(int folder, const char *path, char *out)
{
    if (path[0] == '/') {
        snprintf(out, PATH_MAX, "%s", path);
        return;
    }
    char base[PATH_MAX];
    if (folder == AT_FDCWD) {
        ssize_t n = readlink("/proc/self/cwd", base, sizeof base - 1);
        base[n < 0 ? 0 : n] = '\0';
    } else
        path_of_fd(folder, base);
    int n = snprintf(out, PATH_MAX, "%s/%s", base, path);
    if (n >= PATH_MAX)
        out[0] = '\0';
}

static int fails(long n, int kind)
{
    if (n == at)
        return 1;
    if (!sticky || n < at || (kind & BRIEF))
        return 0;
    return gate[0] == '\0' || syscall(SYS_faccessat, AT_FDCWD, gate, F_OK) == 0;
}

/* To be called with the paths filled in. */
static enum verdict begin(struct op *op, const char *call, int kind)
{
    op->call = call, op->n = 0;
    if (root_length == 0 || (!is_below(op->path) && !is_below(op->target)))
        return IGNORED;
    if (!(kind & kinds))
        return kind & CHANGE ? GO : IGNORED;
    op->n = atomic_fetch_add(&count, 1) + 1;
    if (mode == KILL_BEFORE && op->n == at)
        die(op, "killed before");
    if (mode == KILL_TORN && op->n == at)
        return TEAR;
    if (mode == FAIL && fails(op->n, kind)) {
        note(op, "failed");
        errno = error;
        return DENIED;
    }
    return GO;
}

static long end(const struct op *op, enum verdict verdict, long result)
{
    if (verdict == IGNORED)
        return result;
    int kept = errno;
    if (mode == KILL_AFTER && op->n == at && op->n > 0)
        die(op, "killed after");
    note(op, result < 0 ? "refused" : "done");
    errno = kept;
    return result;
}

/* A call that is not a write can't be half done: KILL_TORN is KILL_BEFORE then. */
#define GUARD(op, call, kind, denied)                                          \
    int kept_errno = errno;                                                    \
    enum verdict verdict = begin(op, call, kind);                              \
    if (verdict == DENIED)                                                     \
        return denied;                                                         \
    if (verdict == TEAR)                                                       \
        die(op, "killed before");                                              \
    errno = kept_errno

/* ---- writes ---- */

static int grows(int fd, off_t offset, size_t bytes)
{
    struct stat found;
    if (fstat(fd, &found) != 0 || !S_ISREG(found.st_mode))
        return 1;
    if (offset < 0)
        offset = fcntl(fd, F_GETFL) & O_APPEND ? found.st_size : lseek(fd, 0, SEEK_CUR);
    return offset + (off_t)bytes > found.st_size;
}

/* Overwriting in place needs no space; `offset` -1: where the descriptor stands. */
static long write_at(const char *call, int fd, const void *data, size_t bytes, off_t offset)
{
    struct op op;
    int kept_errno = errno;
    op.target[0] = '\0';
    path_of_fd(fd, op.path);
    int needs_space = is_below(op.path) && root_length && grows(fd, offset, bytes);
    enum verdict verdict = begin(&op, call, CHANGE | (needs_space ? SPACE : 0));
    if (verdict == DENIED)
        return -1;
    size_t now = verdict == TEAR ? bytes / 2 : bytes;
    errno = kept_errno;
    long result = offset < 0 ? syscall(SYS_write, fd, data, now) : syscall(SYS_pwrite64, fd, data, now, offset);
    if (verdict == TEAR)
        die(&op, "killed torn");
    return end(&op, verdict, result);
}

ssize_t write(int fd, const void *data, size_t bytes) { return write_at("write", fd, data, bytes, -1); }
ssize_t pwrite(int fd, const void *data, size_t bytes, off_t offset)
{
    return write_at("pwrite", fd, data, bytes, offset);
}
ssize_t pwrite64(int fd, const void *data, size_t bytes, off64_t offset)
{
    return write_at("pwrite", fd, data, bytes, offset);
}

/* A vector is written piece by piece: a short write is what writev may give. */
static ssize_t write_pieces(int fd, const struct iovec *pieces, int n, off_t offset)
{
    ssize_t total = 0;
    for (int i = 0; i < n; i++) {
        long one = write_at("writev", fd, pieces[i].iov_base, pieces[i].iov_len, offset < 0 ? -1 : offset + total);
        if (one < 0)
            return total > 0 ? total : -1;
        total += one;
        if ((size_t)one < pieces[i].iov_len)
            break;
    }
    return total;
}

ssize_t writev(int fd, const struct iovec *pieces, int n) { return write_pieces(fd, pieces, n, -1); }
ssize_t pwritev(int fd, const struct iovec *pieces, int n, off_t offset) { return write_pieces(fd, pieces, n, offset); }
ssize_t pwritev64(int fd, const struct iovec *pieces, int n, off64_t offset)
{
    return write_pieces(fd, pieces, n, offset);
}
ssize_t pwritev2(int fd, const struct iovec *pieces, int n, off_t offset, int flags)
{
    (void)flags;
    return write_pieces(fd, pieces, n, offset);
}
ssize_t pwritev64v2(int fd, const struct iovec *pieces, int n, off64_t offset, int flags)
{
    (void)flags;
    return write_pieces(fd, pieces, n, offset);
}

size_t fwrite(const void *data, size_t size, size_t n, FILE *file)
{
    static size_t (*real)(const void *, size_t, size_t, FILE *);
    if (!real)
        real = (size_t(*)(const void *, size_t, size_t, FILE *))dlsym(RTLD_NEXT, "fwrite");
    struct op op;
    int kept_errno = errno, fd = root_length ? fileno(file) : -1;
    op.path[0] = op.target[0] = '\0';
    if (fd >= 0)
        path_of_fd(fd, op.path);
    enum verdict verdict = begin(&op, "fwrite", CHANGE | SPACE);
    if (verdict == DENIED)
        return 0;
    errno = kept_errno;
    if (verdict == TEAR) {
        real(data, 1, size * n / 2, file);
        fflush(file);
        die(&op, "killed torn");
    }
    size_t result = real(data, size, n, file);
    if (verdict == GO) {
        fflush(file);
        end(&op, verdict, (long)result);
    }
    return result;
}

ssize_t sendfile(int out, int in, off_t *offset, size_t bytes)
{
    struct op op;
    path_of_fd(out, op.path);
    path_of_fd(in, op.target);
    GUARD(&op, "sendfile", CHANGE | SPACE, -1);
    return end(&op, verdict, syscall(SYS_sendfile, out, in, offset, bytes));
}
ssize_t sendfile64(int out, int in, off64_t *offset, size_t bytes) { return sendfile(out, in, offset, bytes); }

ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t bytes, unsigned int flags)
{
    struct op op;
    path_of_fd(out, op.path);
    path_of_fd(in, op.target);
    GUARD(&op, "copy_file_range", CHANGE | SPACE, -1);
    return end(&op, verdict, syscall(SYS_copy_file_range, in, from, out, to, bytes, flags));
}

static int truncate_fd(int fd, off_t length)
{
    struct op op;
    op.target[0] = '\0';
    path_of_fd(fd, op.path);
    struct stat found;
    int needs_space = root_length && fstat(fd, &found) == 0 && length > found.st_size;
    GUARD(&op, "ftruncate", CHANGE | (needs_space ? SPACE : 0), -1);
    return end(&op, verdict, syscall(SYS_ftruncate, fd, length));
}
int ftruncate(int fd, off_t length) { return truncate_fd(fd, length); }
int ftruncate64(int fd, off64_t length) { return truncate_fd(fd, length); }

static int allocate(int fd, int how, off_t offset, off_t length)
{
    struct op op;
    op.target[0] = '\0';
    path_of_fd(fd, op.path);
    GUARD(&op, "fallocate", CHANGE | SPACE, -1);
    return end(&op, verdict, syscall(SYS_fallocate, fd, how, offset, length));
}
int fallocate(int fd, int how, off_t offset, off_t length) { return allocate(fd, how, offset, length); }
int fallocate64(int fd, int how, off64_t offset, off64_t length) { return allocate(fd, how, offset, length); }
int posix_fallocate64(int fd, off64_t offset, off64_t length) { return allocate(fd, 0, offset, length) ? errno : 0; }

static int sync_fd(const char *call, long number, int fd)
{
    struct op op;
    op.target[0] = '\0';
    path_of_fd(fd, op.path);
    /* On a full disk it allocates nothing once all writes that grow a file are refused. */
    GUARD(&op, call, CHANGE | SPACE | (error == ENOSPC ? BRIEF : 0), -1);
    return end(&op, verdict, syscall(number, fd));
}
int fsync(int fd) { return sync_fd("fsync", SYS_fsync, fd); }
int fdatasync(int fd) { return sync_fd("fdatasync", SYS_fdatasync, fd); }

/* ---- names ---- */

static int is_there(const char *path)
{
    return syscall(SYS_faccessat, AT_FDCWD, path, F_OK) == 0;
}

static int rename_at(int from, const char *old, int to, const char *new, unsigned flags)
{
    struct op op;
    path_at(from, old, op.path);
    path_at(to, new, op.target);
    int needs_space = root_length && !is_there(op.target);
    GUARD(&op, "rename", CHANGE | (needs_space ? SPACE : 0), -1);
    return end(&op, verdict, syscall(SYS_renameat2, from, old, to, new, flags));
}
int rename(const char *old, const char *new) { return rename_at(AT_FDCWD, old, AT_FDCWD, new, 0); }
int renameat(int from, const char *old, int to, const char *new) { return rename_at(from, old, to, new, 0); }
int renameat2(int from, const char *old, int to, const char *new, unsigned flags)
{
    return rename_at(from, old, to, new, flags);
}

static int link_at(int from, const char *old, int to, const char *new, int flags)
{
    struct op op;
    path_at(from, old, op.path);
    path_at(to, new, op.target);
    GUARD(&op, "link", CHANGE | SPACE, -1);
    return end(&op, verdict, syscall(SYS_linkat, from, old, to, new, flags));
}
int link(const char *old, const char *new) { return link_at(AT_FDCWD, old, AT_FDCWD, new, 0); }
int linkat(int from, const char *old, int to, const char *new, int flags) { return link_at(from, old, to, new, flags); }

static int symlink_at(const char *content, int folder, const char *path)
{
    struct op op;
    op.target[0] = '\0';
    path_at(folder, path, op.path);
    GUARD(&op, "symlink", CHANGE | SPACE, -1);
    return end(&op, verdict, syscall(SYS_symlinkat, content, folder, path));
}
int symlink(const char *content, const char *path) { return symlink_at(content, AT_FDCWD, path); }
int symlinkat(const char *content, int folder, const char *path) { return symlink_at(content, folder, path); }

static int remove_at(const char *call, int folder, const char *path, int flags)
{
    struct op op;
    op.target[0] = '\0';
    path_at(folder, path, op.path);
    GUARD(&op, call, CHANGE, -1);
    return end(&op, verdict, syscall(SYS_unlinkat, folder, path, flags));
}
int unlink(const char *path) { return remove_at("unlink", AT_FDCWD, path, 0); }
int unlinkat(int folder, const char *path, int flags) { return remove_at("unlink", folder, path, flags); }
int rmdir(const char *path) { return remove_at("rmdir", AT_FDCWD, path, AT_REMOVEDIR); }

static int make_folder(int folder, const char *path, mode_t bits)
{
    struct op op;
    op.target[0] = '\0';
    path_at(folder, path, op.path);
    int needs_space = root_length && !is_there(op.path);
    GUARD(&op, "mkdir", CHANGE | (needs_space ? SPACE : 0), -1);
    return end(&op, verdict, syscall(SYS_mkdirat, folder, path, bits));
}
int mkdir(const char *path, mode_t bits) { return make_folder(AT_FDCWD, path, bits); }
int mkdirat(int folder, const char *path, mode_t bits) { return make_folder(folder, path, bits); }

/* ---- opening and reading ---- */

static int open_at(int folder, const char *path, int flags, mode_t bits)
{
    struct op op;
    op.target[0] = '\0';
    path_at(folder, path, op.path);
    int there = !root_length || !is_below(op.path) || is_there(op.path);
    int makes = ((flags & O_CREAT) && !there) || (flags & __O_TMPFILE), empties = (flags & O_TRUNC) && there;
    int kind = makes ? CHANGE | SPACE : empties ? CHANGE : READ;
    GUARD(&op, makes ? "create" : empties ? "truncate" : "open", kind, -1);
    return end(&op, verdict, syscall(SYS_openat, folder, path, flags, bits));
}

#define BITS(flags, last)                                                      \
    mode_t bits = 0;                                                           \
    if ((flags) & (O_CREAT | __O_TMPFILE)) {                                   \
        va_list more;                                                          \
        va_start(more, last);                                                  \
        bits = va_arg(more, unsigned);                                         \
        va_end(more);                                                          \
    }

int open(const char *path, int flags, ...) { BITS(flags, flags) return open_at(AT_FDCWD, path, flags, bits); }
int open64(const char *path, int flags, ...) { BITS(flags, flags) return open_at(AT_FDCWD, path, flags, bits); }
int openat(int folder, const char *path, int flags, ...)
{
    BITS(flags, flags) return open_at(folder, path, flags, bits);
}
int openat64(int folder, const char *path, int flags, ...)
{
    BITS(flags, flags) return open_at(folder, path, flags, bits);
}

static long read_at(const char *call, int fd, void *data, size_t bytes, off_t offset)
{
    struct op op;
    op.path[0] = op.target[0] = '\0';
    if (kinds & READ)
        path_of_fd(fd, op.path);
    GUARD(&op, call, READ, -1);
    return end(&op, verdict,
               offset < 0 ? syscall(SYS_read, fd, data, bytes) : syscall(SYS_pread64, fd, data, bytes, offset));
}
ssize_t read(int fd, void *data, size_t bytes) { return read_at("read", fd, data, bytes, -1); }
ssize_t pread(int fd, void *data, size_t bytes, off_t offset) { return read_at("pread", fd, data, bytes, offset); }
ssize_t pread64(int fd, void *data, size_t bytes, off64_t offset) { return read_at("pread", fd, data, bytes, offset); }

DIR *opendir(const char *path)
{
    static DIR *(*real)(const char *);
    if (!real)
        real = (DIR * (*)(const char *)) dlsym(RTLD_NEXT, "opendir");
    struct op op;
    op.target[0] = '\0';
    path_at(AT_FDCWD, path, op.path);
    GUARD(&op, "opendir", READ, NULL);
    DIR *result = real(path);
    end(&op, verdict, result ? 0 : -1);
    return result;
}
