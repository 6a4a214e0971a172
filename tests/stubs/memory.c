/* Device memory: host memory at addresses that stay, so that copies can be checked.
 *
 * A block is what was allocated as one; a physical block (cuMemCreate) has no address until it is mapped into a
 * reservation. While the process is checkpointed the bytes are elsewhere and the addresses cannot be read.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "memory.h"
#include "process.h"

enum kind { PLAIN, MANAGED, PHYSICAL };

struct block {
    struct block *next;
    enum kind kind;
    int device;
    size_t bytes;
    char *place;     /* where the device sees it; NULL: physical and not mapped */
    char *away;      /* where the bytes are when they are not at `place` */
    bool accessible; /* cuMemSetAccess; plain memory always is */
    bool released;   /* cuMemRelease while mapped: freed at unmap */
};

struct range {
    struct range *next;
    char *start;
    size_t bytes;
};

static struct block *blocks;
static struct range *reservations, *pinned;

enum { GRANULE_BYTES = 2 << 20 };

static size_t page_up(size_t bytes) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    return (bytes + page - 1) / page * page;
}

static char *fresh(size_t bytes, int protection) {
    void *place = mmap(NULL, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return place == MAP_FAILED ? NULL : place;
}

/* The bytes leave `from`, which stays reserved and unreadable. No other thread can get it in between. */
static bool move_out(char *from, size_t bytes, char *to) {
    return to != NULL &&
           mremap(from, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, to) == (void *)to &&
           mprotect(from, bytes, PROT_NONE) == 0;
}

static bool move_in(char *from, size_t bytes, char *to) {
    return mremap(from, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, to) == (void *)to;
}

/* -- blocks ---------------------------------------------------------------------------------------------- */

/* Take memory of the device for a new block. NULL: there is none. */
static struct block *add_block(enum kind kind, int device, size_t bytes) {
    struct block *block = calloc(1, sizeof *block);
    if (block == NULL || !machine_take(on_gpu[device], bytes)) {
        free(block);
        return NULL;
    }
    *block = (struct block){blocks, kind, device, bytes, NULL, NULL, kind != PHYSICAL, false};
    char *place = fresh(bytes, PROT_READ | PROT_WRITE);
    *(kind == PHYSICAL ? &block->away : &block->place) = place;
    if (place == NULL) {
        machine_give(on_gpu[device], bytes);
        free(block);
        return NULL;
    }
    return blocks = block;
}

static void remove_block(struct block *block) {
    struct block **link = &blocks;
    while (*link != block)
        link = &(*link)->next;
    *link = block->next;
    munmap(block->place != NULL ? block->place : block->away, block->bytes);
    machine_give(on_gpu[block->device], block->bytes);
    free(block);
}

static struct block *block_at(const char *address) {
    for (struct block *block = blocks; block != NULL; block = block->next)
        if (block->place != NULL && address >= block->place && address < block->place + block->bytes)
            return block;
    return NULL;
}

/* Is all of it memory that the device may use? It may lie in several mapped blocks side by side. */
static bool is_device_memory(CUdeviceptr address, size_t bytes) {
    const char *at = (const char *)(uintptr_t)address, *end = at + bytes;
    while (at < end) {
        struct block *block = block_at(at);
        if (block == NULL || !block->accessible)
            return false;
        at = block->place + block->bytes;
    }
    return true;
}

bool check_device_memory(CUdeviceptr address, size_t bytes) {
    pthread_mutex_lock(&mutex);
    bool is_right = is_device_memory(address, bytes);
    pthread_mutex_unlock(&mutex);
    return is_right;
}

static CUresult allocate(enum kind kind, CUdeviceptr *address, size_t bytes) {
    int device;
    CUresult result = current_device(&device);
    if (result != CUDA_SUCCESS || bytes == 0)
        return result != CUDA_SUCCESS ? result : CUDA_ERROR_INVALID_VALUE;
    pthread_mutex_lock(&mutex);
    struct block *block = add_block(kind, device, page_up(bytes));
    pthread_mutex_unlock(&mutex);
    if (block == NULL)
        return CUDA_ERROR_OUT_OF_MEMORY;
    *address = (CUdeviceptr)(uintptr_t)block->place;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t bytes) {
    ENTER;
    return leave(allocate(PLAIN, address, bytes));
}

EXPORT CUresult cuMemAllocManaged(CUdeviceptr *address, size_t bytes, unsigned int flags) {
    ENTER;
    (void)flags;
    return leave(allocate(MANAGED, address, bytes));
}

EXPORT CUresult cuMemFree_v2(CUdeviceptr address) {
    ENTER;
    pthread_mutex_lock(&mutex);
    while (!streams_are_idle()) /* as the real one does */
        pthread_cond_wait(&changed, &mutex);
    struct block *block = block_at((char *)(uintptr_t)address);
    bool is_right = block != NULL && block->kind != PHYSICAL && block->place == (char *)(uintptr_t)address;
    if (is_right)
        remove_block(block);
    pthread_mutex_unlock(&mutex);
    return leave(is_right || address == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE);
}

EXPORT CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *bytes, CUdeviceptr address) {
    ENTER;
    pthread_mutex_lock(&mutex);
    struct block *block = block_at((char *)(uintptr_t)address);
    if (block != NULL && base != NULL)
        *base = (CUdeviceptr)(uintptr_t)block->place;
    if (block != NULL && bytes != NULL)
        *bytes = block->bytes;
    pthread_mutex_unlock(&mutex);
    return leave(block != NULL ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND);
}

EXPORT CUresult cuMemGetInfo_v2(size_t *available, size_t *total) {
    ENTER;
    int device;
    CUresult result = current_device(&device);
    if (result == CUDA_SUCCESS) {
        *total = machine.gpu[on_gpu[device]].bytes;
        *available = *total - machine_used(on_gpu[device], NULL, NULL);
    }
    return leave(result);
}

/* -- virtual memory -------------------------------------------------------------------------------------- */

static bool is_in(const struct range *ranges, const void *start, size_t bytes) {
    for (; ranges != NULL; ranges = ranges->next)
        if ((char *)start >= ranges->start && (char *)start + bytes <= ranges->start + ranges->bytes)
            return true;
    return false;
}

static bool add_range(struct range **ranges, void *start, size_t bytes) {
    struct range *range = malloc(sizeof *range);
    if (range == NULL)
        return false;
    *range = (struct range){*ranges, start, bytes};
    *ranges = range;
    return true;
}

/* Returns its size; 0: there is none that starts there. */
static size_t remove_range(struct range **ranges, const void *start) {
    for (struct range **link = ranges; *link != NULL; link = &(*link)->next)
        if ((*link)->start == start) {
            struct range *range = *link;
            size_t bytes = range->bytes;
            *link = range->next;
            free(range);
            return bytes;
        }
    return 0;
}

EXPORT CUresult cuMemGetAllocationGranularity(size_t *bytes, const CUmemAllocationProp *properties,
                                              CUmemAllocationGranularity_flags option) {
    ENTER;
    (void)properties, (void)option;
    *bytes = GRANULE_BYTES;
    return leave(CUDA_SUCCESS);
}

EXPORT CUresult cuMemAddressReserve(CUdeviceptr *address, size_t bytes, size_t alignment, CUdeviceptr wish,
                                    unsigned long long flags) {
    ENTER;
    (void)wish, (void)flags;
    if (bytes == 0 || bytes % GRANULE_BYTES != 0 || alignment > GRANULE_BYTES)
        return leave(CUDA_ERROR_INVALID_VALUE);
    char *wide = fresh(bytes + GRANULE_BYTES, PROT_NONE);
    if (wide == NULL)
        return leave(CUDA_ERROR_OUT_OF_MEMORY);
    size_t before = (GRANULE_BYTES - (uintptr_t)wide % GRANULE_BYTES) % GRANULE_BYTES;
    if (before > 0)
        munmap(wide, before);
    munmap(wide + before + bytes, GRANULE_BYTES - before);
    pthread_mutex_lock(&mutex);
    bool is_added = add_range(&reservations, wide + before, bytes);
    pthread_mutex_unlock(&mutex);
    *address = (CUdeviceptr)(uintptr_t)(wide + before);
    return leave(is_added ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY);
}

EXPORT CUresult cuMemAddressFree(CUdeviceptr address, size_t bytes) {
    ENTER;
    char *start = (char *)(uintptr_t)address;
    pthread_mutex_lock(&mutex);
    bool is_mapped = false;
    for (struct block *block = blocks; block != NULL; block = block->next)
        is_mapped |= block->place != NULL && block->place >= start && block->place < start + bytes;
    bool is_right = !is_mapped && remove_range(&reservations, start) == bytes;
    if (is_right)
        munmap(start, bytes);
    pthread_mutex_unlock(&mutex);
    return leave(is_right ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE);
}

/* A handle is the block's address. */
static struct block *block_of(CUmemGenericAllocationHandle handle) {
    struct block *block = blocks;
    while (block != NULL && ((uintptr_t)block != handle || block->kind != PHYSICAL))
        block = block->next;
    return block;
}

EXPORT CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t bytes, const CUmemAllocationProp *properties,
                            unsigned long long flags) {
    ENTER;
    int device = properties->location.id;
    if (flags != 0 || bytes == 0 || bytes % GRANULE_BYTES != 0 || device < 0 || device >= devices)
        return leave(CUDA_ERROR_INVALID_VALUE);
    if (properties->location.type != CU_MEM_LOCATION_TYPE_DEVICE ||
        properties->requestedHandleTypes != CU_MEM_HANDLE_TYPE_NONE)
        return leave(CUDA_ERROR_NOT_SUPPORTED);
    pthread_mutex_lock(&mutex);
    struct block *block = add_block(PHYSICAL, device, bytes);
    pthread_mutex_unlock(&mutex);
    *handle = (uintptr_t)block;
    return leave(block != NULL ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY);
}

EXPORT CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    ENTER;
    pthread_mutex_lock(&mutex);
    struct block *block = block_of(handle);
    bool is_right = block != NULL && !block->released;
    if (is_right && block->place != NULL)
        block->released = true;
    else if (is_right)
        remove_block(block);
    pthread_mutex_unlock(&mutex);
    return leave(is_right ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE);
}

/* Unlike the real one: a block can be mapped once, and whole. */
EXPORT CUresult cuMemMap(CUdeviceptr address, size_t bytes, size_t offset, CUmemGenericAllocationHandle handle,
                         unsigned long long flags) {
    ENTER;
    char *place = (char *)(uintptr_t)address;
    CUresult result = CUDA_SUCCESS;
    pthread_mutex_lock(&mutex);
    struct block *block = block_of(handle);
    if (block == NULL || block->released || flags != 0 || !is_in(reservations, place, bytes) || block_at(place) != NULL)
        result = CUDA_ERROR_INVALID_VALUE;
    else if (offset != 0 || bytes != block->bytes || block->place != NULL)
        result = CUDA_ERROR_NOT_SUPPORTED;
    else if (!move_in(block->away, bytes, place) || mprotect(place, bytes, PROT_NONE) != 0)
        result = CUDA_ERROR_UNKNOWN;
    else {
        block->place = place;
        block->away = NULL;
    }
    pthread_mutex_unlock(&mutex);
    return leave(result);
}

EXPORT CUresult cuMemSetAccess(CUdeviceptr address, size_t bytes, const CUmemAccessDesc *access, size_t count) {
    ENTER;
    char *at = (char *)(uintptr_t)address, *end = at + bytes;
    bool is_accessible = count > 0 && access->flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    bool is_right = true;
    pthread_mutex_lock(&mutex);
    while (at < end && is_right) {
        struct block *block = block_at(at);
        is_right = block != NULL && block->kind == PHYSICAL && block->place == at &&
                   mprotect(at, block->bytes, is_accessible ? PROT_READ | PROT_WRITE : PROT_NONE) == 0;
        if (is_right) {
            block->accessible = is_accessible;
            at += block->bytes;
        }
    }
    pthread_mutex_unlock(&mutex);
    return leave(is_right ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE);
}

EXPORT CUresult cuMemUnmap(CUdeviceptr address, size_t bytes) {
    ENTER;
    char *at = (char *)(uintptr_t)address, *end = at + bytes;
    pthread_mutex_lock(&mutex);
    if (!streams_are_idle()) { /* the real one does not wait: what runs may meet addresses without memory */
        is_broken = true;
        pthread_mutex_unlock(&mutex);
        return leave(CUDA_ERROR_ILLEGAL_ADDRESS);
    }
    bool is_right = true;
    while (at < end && is_right) {
        struct block *block = block_at(at);
        char *away = block != NULL ? fresh(block->bytes, PROT_NONE) : NULL;
        is_right = block != NULL && block->kind == PHYSICAL && block->place == at && move_out(at, block->bytes, away) &&
                   mprotect(away, block->bytes, PROT_READ | PROT_WRITE) == 0;
        if (is_right) {
            at += block->bytes;
            block->away = away;
            block->place = NULL;
            block->accessible = false;
            if (block->released)
                remove_block(block);
        }
    }
    pthread_mutex_unlock(&mutex);
    return leave(is_right ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE);
}

/* -- host memory that copies may use while the call has returned ------------------------------------------ */

bool is_pinned(const void *start, size_t bytes) {
    pthread_mutex_lock(&mutex);
    bool is_right = is_in(pinned, start, bytes);
    pthread_mutex_unlock(&mutex);
    return is_right;
}

static CUresult pin(void *start, size_t bytes) {
    pthread_mutex_lock(&mutex);
    bool is_added = add_range(&pinned, start, bytes);
    pthread_mutex_unlock(&mutex);
    return is_added ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

static size_t unpin(void *start) {
    pthread_mutex_lock(&mutex);
    while (!streams_are_idle())
        pthread_cond_wait(&changed, &mutex);
    size_t bytes = remove_range(&pinned, start);
    pthread_mutex_unlock(&mutex);
    return bytes;
}

EXPORT CUresult cuMemHostAlloc(void **address, size_t bytes, unsigned int flags) {
    ENTER;
    (void)flags;
    int device;
    if (current_device(&device) != CUDA_SUCCESS || bytes == 0)
        return leave(bytes == 0 ? CUDA_ERROR_INVALID_VALUE : CUDA_ERROR_INVALID_CONTEXT);
    *address = fresh(page_up(bytes), PROT_READ | PROT_WRITE);
    return leave(*address != NULL ? pin(*address, page_up(bytes)) : CUDA_ERROR_OUT_OF_MEMORY);
}

EXPORT CUresult cuMemAllocHost_v2(void **address, size_t bytes) {
    return cuMemHostAlloc(address, bytes, 0);
}

EXPORT CUresult cuMemFreeHost(void *address) {
    ENTER;
    size_t bytes = unpin(address);
    if (bytes > 0)
        munmap(address, bytes);
    return leave(bytes > 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE);
}

EXPORT CUresult cuMemHostRegister_v2(void *address, size_t bytes, unsigned int flags) {
    ENTER;
    (void)flags;
    if (bytes == 0 || is_pinned(address, 1))
        return leave(bytes == 0 ? CUDA_ERROR_INVALID_VALUE : CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
    return leave(pin(address, bytes));
}

EXPORT CUresult cuMemHostUnregister(void *address) {
    ENTER;
    return leave(unpin(address) > 0 ? CUDA_SUCCESS : CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
}

/* -- checkpoint ------------------------------------------------------------------------------------------ */

bool has_managed_memory(void) {
    struct block *block = blocks;
    while (block != NULL && block->kind != MANAGED)
        block = block->next;
    return block != NULL;
}

void memory_used(uint64_t bytes[MAX_GPUS]) {
    memset(bytes, 0, MAX_GPUS * sizeof *bytes);
    for (struct block *block = blocks; block != NULL; block = block->next)
        bytes[block->device] += block->bytes;
}

bool memory_away(void) {
    for (struct block *block = blocks; block != NULL; block = block->next) {
        if (block->place == NULL)
            continue;
        char *away = fresh(block->bytes, PROT_NONE);
        if (!move_out(block->place, block->bytes, away))
            return false;
        block->away = away;
    }
    return true;
}

bool memory_back(void) {
    for (struct block *block = blocks; block != NULL; block = block->next) {
        if (block->place == NULL)
            continue;
        if (!move_in(block->away, block->bytes, block->place))
            return false;
        block->away = NULL;
    }
    return true;
}
