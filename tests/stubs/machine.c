#define _GNU_SOURCE
#include "machine.h"

#include <errno.h>
#include <dirent.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* -- files ----------------------------------------------------------------------------------------------- */

static bool path_of(char path[PATH_MAX], const char *name) {
    const char *folder = getenv("GPUFN_STUB_DIR");
    return folder != NULL && folder[0] != 0 && snprintf(path, PATH_MAX, "%s/%s", folder, name) < PATH_MAX;
}

static FILE *open_text(const char *name) {
    char path[PATH_MAX];
    return path_of(path, name) ? fopen(path, "re") : NULL;
}

bool machine_is_lost(void) {
    char path[PATH_MAX];
    return path_of(path, "lost") && access(path, F_OK) == 0;
}

/* Hold the machine: one process, and one thread of it, at a time. Closing the descriptor lets go. */
static int hold(const char *name) {
    char path[PATH_MAX];
    if (!path_of(path, name))
        return -1;
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    while (fd >= 0 && flock(fd, LOCK_EX) != 0 && errno == EINTR) {
    }
    return fd;
}

static void let_go(int fd) {
    if (fd >= 0)
        close(fd);
}

/* -- the GPUs -------------------------------------------------------------------------------------------- */

static bool is_on(const char *word) {
    return strcmp(word, "on") == 0;
}

/* Lines of `machine`:  driver 580.95.05 | cuda 13020 | persistence on | checkpoint off | remap off |
 *                      gpu UUID BYTES on|off NAME      (on: MIG mode) */
bool machine_load(struct machine *machine) {
    char path[PATH_MAX];
    if (!path_of(path, ""))
        return false;
    *machine = (struct machine){"580.95.05", 13000, true, true, true, 0, {{"", "", 0, false}}};
    FILE *file = open_text("machine");
    char line[512], value[64], mig[8];
    while (file != NULL && fgets(line, sizeof line, file) != NULL) {
        if (sscanf(line, "driver %31s", machine->driver) == 1 || sscanf(line, "cuda %d", &machine->cuda) == 1)
            continue;
        if (sscanf(line, "persistence %63s", value) == 1)
            machine->persistence = is_on(value);
        else if (sscanf(line, "checkpoint %63s", value) == 1)
            machine->checkpoint = is_on(value);
        else if (sscanf(line, "remap %63s", value) == 1)
            machine->remap = is_on(value);
        else if (machine->gpus < MAX_GPUS) {
            struct gpu *gpu = &machine->gpu[machine->gpus];
            if (sscanf(line, "gpu %40s %" SCNu64 " %7s %63[^\n]", gpu->uuid, &gpu->bytes, mig, gpu->name) == 4) {
                gpu->mig = is_on(mig);
                machine->gpus++;
            }
        }
    }
    if (file != NULL) {
        fclose(file);
        return true;
    }
    machine->gpus = 1;
    machine->gpu[0] =
        (struct gpu){"GPU-00000000-0000-4000-8000-000000000000", "Simulated GPU", UINT64_C(8) << 30, false};
    return true;
}

/* -- leases ---------------------------------------------------------------------------------------------- */

/* A lease is a file with one line, "PID BYTES BYTES ...", written and read by who holds the machine. Its owner
 * has a lock on it that belongs to the open file (no CLOEXEC child, no other close ends it), so whoever can
 * take that lock knows that the owner is gone. */
static struct {
    int fd;
    char name[64];
    uint64_t bytes[MAX_GPUS];
} own = {-1, "", {0}};

static bool lock_or_test(int fd, int how, struct flock *lock) {
    *lock = (struct flock){.l_type = F_WRLCK, .l_whence = SEEK_SET};
    return fcntl(fd, how, lock) == 0;
}

static bool read_lease(const char *name, pid_t *pid, uint64_t bytes[MAX_GPUS]) {
    char relative[PATH_MAX], path[PATH_MAX], text[512] = "";
    snprintf(relative, sizeof relative, "leases/%s", name);
    if (!path_of(path, relative))
        return false;
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return false;
    struct flock lock;
    bool is_dead = lock_or_test(fd, F_OFD_GETLK, &lock) && lock.l_type == F_UNLCK;
    if (is_dead)
        unlink(path);
    ssize_t length = is_dead ? 0 : pread(fd, text, sizeof text - 1, 0);
    close(fd);
    if (length <= 0)
        return false;
    char *rest = text;
    *pid = (pid_t)strtol(rest, &rest, 10);
    for (int gpu = 0; gpu < MAX_GPUS; gpu++)
        bytes[gpu] = strtoull(rest, &rest, 10);
    return true;
}

/* The caller holds the machine. */
static uint64_t used(int gpu, struct holder *holders, int *count) {
    char path[PATH_MAX];
    uint64_t sum = 0;
    DIR *folder = path_of(path, "leases") ? opendir(path) : NULL;
    struct dirent *entry;
    while (folder != NULL && (entry = readdir(folder)) != NULL) {
        pid_t pid;
        uint64_t bytes[MAX_GPUS];
        if (entry->d_name[0] == '.' || !read_lease(entry->d_name, &pid, bytes))
            continue;
        sum += bytes[gpu];
        if (holders != NULL && bytes[gpu] > 0 && *count < MAX_HOLDERS)
            holders[(*count)++] = (struct holder){pid, bytes[gpu]};
    }
    if (folder != NULL)
        closedir(folder);
    return sum;
}

uint64_t machine_used(int gpu, struct holder *holders, int *count) {
    int held = hold("lock");
    uint64_t sum = used(gpu, holders, count);
    let_go(held);
    return sum;
}

static bool write_lease(void) {
    char path[PATH_MAX], relative[PATH_MAX], text[512];
    if (own.fd < 0) {
        uint64_t id;
        if (getrandom(&id, sizeof id, 0) != sizeof id || !path_of(path, "leases"))
            return false;
        mkdir(path, 0777);
        snprintf(own.name, sizeof own.name, "%016" PRIx64, id);
        snprintf(relative, sizeof relative, "leases/%s", own.name);
        struct flock lock;
        if (!path_of(path, relative) || (own.fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666)) < 0 ||
            !lock_or_test(own.fd, F_OFD_SETLK, &lock))
            return false;
    }
    int length = snprintf(text, sizeof text, "%d", (int)getpid());
    for (int gpu = 0; gpu < MAX_GPUS; gpu++)
        length += snprintf(text + length, sizeof text - (size_t)length, " %" PRIu64, own.bytes[gpu]);
    return ftruncate(own.fd, 0) == 0 && pwrite(own.fd, text, (size_t)length, 0) == length;
}

bool machine_take_all(const uint64_t bytes[MAX_GPUS]) {
    struct machine machine;
    if (!machine_load(&machine))
        return false;
    int held = hold("lock");
    bool fits = true;
    for (int gpu = 0; gpu < MAX_GPUS && fits; gpu++)
        fits = bytes[gpu] == 0 || (gpu < machine.gpus && used(gpu, NULL, NULL) + bytes[gpu] <= machine.gpu[gpu].bytes);
    if (fits) {
        for (int gpu = 0; gpu < MAX_GPUS; gpu++)
            own.bytes[gpu] += bytes[gpu];
        fits = write_lease();
    }
    let_go(held);
    return fits;
}

bool machine_take(int gpu, uint64_t bytes) {
    uint64_t wanted[MAX_GPUS] = {0};
    wanted[gpu] = bytes;
    return machine_take_all(wanted);
}

void machine_give(int gpu, uint64_t bytes) {
    int held = hold("lock");
    own.bytes[gpu] -= bytes;
    write_lease();
    let_go(held);
}

void machine_give_all(void) {
    char path[PATH_MAX], relative[PATH_MAX];
    int held = hold("lock");
    snprintf(relative, sizeof relative, "leases/%s", own.name);
    if (own.fd >= 0 && path_of(path, relative)) {
        unlink(path);
        close(own.fd);
    }
    own.fd = -1;
    memset(own.bytes, 0, sizeof own.bytes);
    let_go(held);
}

/* -- faults ---------------------------------------------------------------------------------------------- */

/* How many calls have fitted the line so far, this one included; counted in a file beside `faults`. */
static long count_call(int line) {
    char name[32], path[PATH_MAX];
    snprintf(name, sizeof name, "faults.%d", line);
    int fd = path_of(path, name) ? open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0666) : -1;
    if (fd < 0)
        return 0;
    struct stat stat;
    flock(fd, LOCK_EX);
    bool counted = fstat(fd, &stat) == 0 && pwrite(fd, "+", 1, stat.st_size) == 1;
    close(fd);
    return counted ? (long)stat.st_size + 1 : 0;
}

static long option(const char *line, const char *name, long otherwise) {
    const char *found = strstr(line, name);
    return found != NULL ? strtol(found + strlen(name), NULL, 10) : otherwise;
}

static int act(const char *action, long argument, pid_t target, bool *broken) {
    if (strcmp(action, "fail") == 0 || strcmp(action, "failed") == 0) {
        if (broken != NULL)
            *broken = strcmp(action, "failed") == 0;
        return (int)argument;
    }
    if (strcmp(action, "delay") == 0)
        nanosleep(&(struct timespec){argument / 1000, argument % 1000 * 1000000}, NULL);
    else if (strcmp(action, "kill-target") == 0)
        kill(target, SIGKILL);
    else if (strcmp(action, "kill-caller") == 0)
        kill(getpid(), SIGKILL);
    else if (strcmp(action, "lost") == 0)
        let_go(hold("lost"));
    while (strcmp(action, "hang") == 0)
        pause();
    return 0;
}

int machine_fault(const char *call, bool after, pid_t target, bool *broken) {
    FILE *file = open_text("faults");
    if (file == NULL)
        return 0;
    size_t length = strcspn(call, "_");
    char line[256], name[64], nth[16], action[16];
    int code = 0;
    for (int number = 1; fgets(line, sizeof line, file) != NULL; number++) {
        long argument = 0;
        if (sscanf(line, "%63s %15s %15s %ld", name, nth, action, &argument) < 3 || strlen(name) != length ||
            strncmp(name, call, length) != 0 || (strstr(line, "when=after") != NULL) != after ||
            option(line, "caller=", getpid()) != getpid() || option(line, "target=", target) != target)
            continue;
        long calls = count_call(number);
        if (code == 0 && (strcmp(nth, "*") == 0 || strtol(nth, NULL, 10) == calls))
            code = act(action, argument, target, broken);
    }
    fclose(file);
    return code;
}
