/* The checkpoint API, both sides of it.
 *
 * The target's side is a thread and a mailbox in this library's data. The caller is another process: it finds
 * the library in /proc/PID/maps and writes into the mailbox through /proc/PID/mem, for which it needs the
 * rights of a debugger. So the target holds nothing that CRIU could not dump, and stopped it does not answer.
 * (NVIDIA's driver 580 writes into pipes of the target that it opens in /proc/PID/fd: the same rights, and both are
 * plain files to a system-call filter.)
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/random.h>
#include <unistd.h>

#include "process.h"

enum operation { LOCK = 1, CHECKPOINT, RESTORE, UNLOCK, FAIL };

struct request {
    uint32_t operation;
    uint32_t timeout_ms; /* of LOCK; 0: none */
    uint32_t pairs;
    CUcheckpointGpuPair pair[MAX_GPUS];
};

#define MAGIC UINT64_C(0x677075666e737475)

static struct mailbox {
    uint64_t magic;
    uint64_t id;             /* of this process, before and after a CRIU restore; 0: not initialised */
    int32_t restore_thread;
    uint32_t state;
    uint32_t asked, answered; /* numbers of requests */
    uint32_t result;
    struct request request;
} mailbox = {.magic = MAGIC};

CUprocessState process_state(void) {
    return (CUprocessState)mailbox.state;
}

static void sleep_ms(long milliseconds) {
    nanosleep(&(struct timespec){milliseconds / 1000, milliseconds % 1000 * 1000000}, NULL);
}

/* -- the target's side: the caller has `mutex` ------------------------------------------------------------- */

static void become(CUprocessState state) {
    mailbox.state = state;
    gate_is_closed = state != CU_PROCESS_STATE_RUNNING;
    pthread_cond_broadcast(&changed);
}

static CUresult fail(CUresult why) {
    become(CU_PROCESS_STATE_FAILED);
    return why;
}

/* No call gets past the gate, and those that have are waited for, work on streams included. */
static CUresult lock(uint32_t timeout_ms) {
    struct timespec end;
    clock_gettime(CLOCK_REALTIME, &end);
    end.tv_sec += timeout_ms / 1000;
    end.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
    end.tv_sec += end.tv_nsec / 1000000000;
    end.tv_nsec %= 1000000000;
    gate_is_closed = true;
    while (inside > 0 || !streams_are_idle()) {
        int waited = timeout_ms > 0 ? pthread_cond_timedwait(&changed, &mutex, &end) : pthread_cond_wait(&changed, &mutex);
        if (waited == ETIMEDOUT) {
            become(CU_PROCESS_STATE_RUNNING);
            return CUDA_ERROR_NOT_READY;
        }
    }
    become(CU_PROCESS_STATE_LOCKED);
    return CUDA_SUCCESS;
}

static CUresult checkpoint(void) {
    for (int device = 0; device < devices; device++)
        if (machine.gpu[on_gpu[device]].mig)
            return CUDA_ERROR_NOT_SUPPORTED;
    if (has_managed_memory())
        return CUDA_ERROR_NOT_SUPPORTED;
    if (!memory_away())
        return fail(CUDA_ERROR_OPERATING_SYSTEM);
    machine_give_all();
    become(CU_PROCESS_STATE_CHECKPOINTED);
    return CUDA_SUCCESS;
}

static int gpu_with(const CUuuid *uuid) {
    for (int gpu = 0; gpu < machine.gpus; gpu++) {
        char text[41];
        const unsigned char *b = (const unsigned char *)uuid->bytes;
        snprintf(text, sizeof text, "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", b[0], b[1],
                 b[2], b[3], b[4], b[5], b[6], b[7], b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15]);
        if (strcmp(text, machine.gpu[gpu].uuid) == 0)
            return gpu;
    }
    return -1;
}

/* Pairs name every GPU of the machine, each once on either side. */
static CUresult remap(const struct request *request) {
    int moved[MAX_GPUS];
    unsigned int from = 0, to = 0;
    if (request->pairs == 0)
        return CUDA_SUCCESS;
    for (uint32_t i = 0; i < request->pairs; i++) {
        int old = gpu_with(&request->pair[i].oldUuid), new = gpu_with(&request->pair[i].newUuid);
        if (old < 0 || new < 0)
            return CUDA_ERROR_INVALID_VALUE;
        from |= 1U << old;
        to |= 1U << new;
        moved[old] = new;
    }
    unsigned int all = (1U << machine.gpus) - 1;
    if (!machine.remap || (int)request->pairs != machine.gpus || from != all || to != all)
        return CUDA_ERROR_INVALID_VALUE;
    for (int device = 0; device < devices; device++)
        on_gpu[device] = moved[on_gpu[device]];
    return CUDA_SUCCESS;
}

static CUresult restore(const struct request *request) {
    CUresult mapped = remap(request);
    if (mapped != CUDA_SUCCESS)
        return mapped;
    uint64_t by_device[MAX_GPUS], by_gpu[MAX_GPUS] = {0};
    memory_used(by_device);
    for (int device = 0; device < devices; device++)
        by_gpu[on_gpu[device]] += by_device[device];
    if (!machine_take_all(by_gpu))
        return fail(CUDA_ERROR_OUT_OF_MEMORY);
    if (!memory_back())
        return fail(CUDA_ERROR_OPERATING_SYSTEM);
    become(CU_PROCESS_STATE_LOCKED);
    return CUDA_SUCCESS;
}

static CUresult carry_out(const struct request *request) {
    static const CUprocessState needed[] = {
        [LOCK] = CU_PROCESS_STATE_RUNNING,
        [CHECKPOINT] = CU_PROCESS_STATE_LOCKED,
        [RESTORE] = CU_PROCESS_STATE_CHECKPOINTED,
        [UNLOCK] = CU_PROCESS_STATE_LOCKED,
    };
    if (request->operation == FAIL)
        return fail(CUDA_SUCCESS);
    if (process_state() != needed[request->operation])
        return CUDA_ERROR_ILLEGAL_STATE;
    switch (request->operation) {
    case LOCK:
        return lock(request->timeout_ms);
    case CHECKPOINT:
        return checkpoint();
    case RESTORE:
        return restore(request);
    default:
        become(CU_PROCESS_STATE_RUNNING);
        return CUDA_SUCCESS;
    }
}

static void *serve(void *unused) {
    (void)unused;
    __atomic_store_n(&mailbox.restore_thread, gettid(), __ATOMIC_RELEASE);
    for (;;) {
        uint32_t asked = __atomic_load_n(&mailbox.asked, __ATOMIC_ACQUIRE);
        if (asked == mailbox.answered) {
            sleep_ms(1);
            continue;
        }
        pthread_mutex_lock(&mutex);
        mailbox.result = carry_out(&mailbox.request);
        pthread_mutex_unlock(&mutex);
        __atomic_store_n(&mailbox.answered, asked, __ATOMIC_RELEASE);
    }
    return NULL;
}

CUresult start_restore_thread(void) {
    pthread_t thread;
    if (getrandom(&mailbox.id, sizeof mailbox.id, 0) != sizeof mailbox.id || pthread_create(&thread, NULL, serve, NULL) != 0)
        return CUDA_ERROR_OPERATING_SYSTEM;
    pthread_detach(thread);
    while (__atomic_load_n(&mailbox.restore_thread, __ATOMIC_ACQUIRE) == 0)
        sleep_ms(1);
    return CUDA_SUCCESS;
}

/* -- the caller's side ------------------------------------------------------------------------------------- */

/* An errno of looking into another process. Driver 580 tells one that has ended and one of another user by the same result
 * as what is really broken (which, is not known); one that never used CUDA it tells apart. */
static CUresult result_of(int error) {
    return error != 0 ? CUDA_ERROR_OPERATING_SYSTEM : CUDA_ERROR_INVALID_VALUE;
}

/* The address of the target's mailbox. */
static CUresult find_mailbox(pid_t pid, uintptr_t *address) {
    char name[64], line[PATH_MAX + 128];
    snprintf(name, sizeof name, "/proc/%d/maps", (int)pid);
    FILE *file = fopen(name, "re");
    if (file == NULL)
        return result_of(errno);
    Dl_info own;
    dladdr(&mailbox, &own);
    uintptr_t base = 0;
    errno = 0;
    while (base == 0 && fgets(line, sizeof line, file) != NULL) {
        uintptr_t start;
        long offset;
        line[strcspn(line, "\n")] = 0;
        const char *slash = strrchr(line, '/');
        if (sscanf(line, "%" SCNxPTR "-%*x %*s %lx", &start, (unsigned long *)&offset) == 2 && offset == 0 &&
            slash != NULL && strcmp(slash, "/libcuda.so.1") == 0)
            base = start;
    }
    int error = errno; /* reading another's maps is refused at the first read */
    fclose(file);
    *address = base + ((uintptr_t)&mailbox - (uintptr_t)own.dli_fbase);
    return base != 0 ? CUDA_SUCCESS : result_of(error);
}

static int open_memory(pid_t pid) {
    char name[64];
    snprintf(name, sizeof name, "/proc/%d/mem", (int)pid);
    return open(name, O_RDWR | O_CLOEXEC);
}

static CUresult peek(pid_t pid, uintptr_t address, struct mailbox *found) {
    int fd = open_memory(pid);
    if (fd < 0)
        return result_of(errno);
    errno = 0; /* of one that has ended nothing is read, and no reason said */
    bool is_whole = pread(fd, found, sizeof *found, (off_t)address) == sizeof *found;
    int error = errno;
    close(fd);
    return is_whole ? CUDA_SUCCESS : result_of(error);
}

static CUresult poke(pid_t pid, uintptr_t address, size_t offset, void *value, size_t bytes) {
    int fd = open_memory(pid);
    if (fd < 0)
        return result_of(errno);
    errno = 0; /* of one that has ended nothing is read, and no reason said */
    bool is_whole = pwrite(fd, value, bytes, (off_t)(address + offset)) == (ssize_t)bytes;
    int error = errno;
    close(fd);
    return is_whole ? CUDA_SUCCESS : result_of(error);
}

static CUresult open_mailbox(pid_t pid, uintptr_t *address, struct mailbox *found) {
    struct machine now;
    if (!machine_load(&now) || !now.checkpoint)
        return CUDA_ERROR_NOT_SUPPORTED;
    if (machine_is_lost())
        return CUDA_ERROR_UNKNOWN;
    CUresult result = find_mailbox(pid, address);
    if (result == CUDA_SUCCESS)
        result = peek(pid, *address, found);
    if (result == CUDA_SUCCESS && (found->magic != MAGIC || found->id == 0))
        result = CUDA_ERROR_NOT_INITIALIZED;
    return result;
}

/* Wait until the target has done what it was asked; its end ends that too. */
static CUresult await_answer(pid_t pid, uintptr_t address, struct mailbox *found) {
    CUresult result = peek(pid, address, found);
    while (result == CUDA_SUCCESS && found->answered != found->asked) {
        sleep_ms(1);
        result = peek(pid, address, found);
    }
    return result == CUDA_SUCCESS ? CUDA_SUCCESS : CUDA_ERROR_OPERATING_SYSTEM;
}

static CUresult ask(pid_t pid, const struct request *request) {
    uintptr_t address;
    struct mailbox found;
    CUresult result = open_mailbox(pid, &address, &found);
    if (result != CUDA_SUCCESS)
        return result;
    /* One caller at a time; the lock of one that was killed ends with it. */
    char name[32], path[PATH_MAX];
    snprintf(name, sizeof name, "call.%016" PRIx64, found.id);
    int fd = path_of(path, name) ? open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666) : -1;
    if (fd < 0 || flock(fd, LOCK_EX) != 0)
        result = CUDA_ERROR_OPERATING_SYSTEM;
    if (result == CUDA_SUCCESS)
        result = await_answer(pid, address, &found); /* what a killed caller may have asked */
    uint32_t number = found.asked + 1;
    if (result == CUDA_SUCCESS)
        result = poke(pid, address, offsetof(struct mailbox, request), (void *)request, sizeof *request);
    if (result == CUDA_SUCCESS)
        result = poke(pid, address, offsetof(struct mailbox, asked), &number, sizeof number);
    if (result == CUDA_SUCCESS)
        result = await_answer(pid, address, &found);
    if (fd >= 0)
        close(fd);
    return result == CUDA_SUCCESS ? (CUresult)found.result : result;
}

/* The operation between the faults that a test wants before and after it. */
static CUresult perform(const char *call, pid_t pid, const struct request *request) {
    bool broken = false;
    CUresult result = (CUresult)machine_fault(call, false, pid, &broken);
    if (broken)
        ask(pid, &(struct request){.operation = FAIL});
    if (result != CUDA_SUCCESS)
        return result;
    result = ask(pid, request);
    CUresult after = (CUresult)machine_fault(call, true, pid, &broken);
    if (broken)
        ask(pid, &(struct request){.operation = FAIL});
    return after != CUDA_SUCCESS ? after : result;
}

EXPORT CUresult cuCheckpointProcessGetState(int pid, CUprocessState *state) {
    uintptr_t address;
    struct mailbox found;
    CUresult result = (CUresult)machine_fault(__func__, false, pid, NULL);
    if (result == CUDA_SUCCESS)
        result = open_mailbox(pid, &address, &found);
    if (result == CUDA_SUCCESS)
        *state = (CUprocessState)found.state;
    return result;
}

EXPORT CUresult cuCheckpointProcessGetRestoreThreadId(int pid, int *thread) {
    uintptr_t address;
    struct mailbox found;
    CUresult result = open_mailbox(pid, &address, &found);
    if (result == CUDA_SUCCESS)
        *thread = found.restore_thread;
    return result;
}

EXPORT CUresult cuCheckpointProcessLock(int pid, CUcheckpointLockArgs *arguments) {
    return perform(__func__, pid, &(struct request){.operation = LOCK, .timeout_ms = arguments ? arguments->timeoutMs : 0});
}

EXPORT CUresult cuCheckpointProcessCheckpoint(int pid, CUcheckpointCheckpointArgs *arguments) {
    (void)arguments;
    return perform(__func__, pid, &(struct request){.operation = CHECKPOINT});
}

EXPORT CUresult cuCheckpointProcessRestore(int pid, CUcheckpointRestoreArgs *arguments) {
    struct request request = {.operation = RESTORE};
    struct machine now;
    if (!is_initialised() && machine_load(&now) && !now.persistence)
        return CUDA_ERROR_NOT_PERMITTED;
    if (arguments != NULL && arguments->gpuPairsCount > MAX_GPUS)
        return CUDA_ERROR_INVALID_VALUE;
    for (; arguments != NULL && request.pairs < arguments->gpuPairsCount; request.pairs++)
        request.pair[request.pairs] = arguments->gpuPairs[request.pairs];
    return perform(__func__, pid, &request);
}

EXPORT CUresult cuCheckpointProcessUnlock(int pid, CUcheckpointUnlockArgs *arguments) {
    (void)arguments;
    return perform(__func__, pid, &(struct request){.operation = UNLOCK});
}
