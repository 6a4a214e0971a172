/* Streams, events, and copies in their order.
 *
 * Each stream has a thread that does its work, so that a copy from pinned memory happens after the call has
 * returned: who reuses a buffer without waiting for the event behind the copy gets wrong bytes here too.
 * The default stream's work is done in the call, once the other streams (but non-blocking ones) are idle.
 */
#include <stdlib.h>
#include <string.h>

#include "memory.h"
#include "process.h"

struct CUevent_st {
    uint64_t recorded, reached; /* how often it was recorded, and the latest of those that was reached */
    int64_t reached_ns;
    bool has_time;
};

enum what { COPY, FILL, RECORD, WAIT, CALL };

struct work {
    struct work *next;
    enum what what;
    void *to;
    const void *from;
    size_t bytes;
    CUevent event;
    uint64_t ticket; /* the record of the event that is meant */
    CUhostFn call;
    void *argument;
};

struct CUstream_st {
    CUstream next;
    bool is_blocking; /* the default stream waits for it */
    bool is_busy, is_closed;
    struct work *first, **last;
    pthread_t thread;
};

static CUstream streams;

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

/* -- work ------------------------------------------------------------------------------------------------ */

static void reach(CUevent event, uint64_t ticket) {
    if (event->reached < ticket)
        event->reached = ticket;
    event->reached_ns = now_ns();
    pthread_cond_broadcast(&changed);
}

/* The caller has `mutex`, which is let go during what takes long. */
static void carry_out(const struct work *work) {
    if (work->what == RECORD) {
        reach(work->event, work->ticket);
        return;
    }
    if (work->what == WAIT) {
        while (work->event->reached < work->ticket)
            pthread_cond_wait(&changed, &mutex);
        return;
    }
    pthread_mutex_unlock(&mutex);
    if (work->what == COPY)
        memcpy(work->to, work->from, work->bytes);
    else if (work->what == FILL)
        memset(work->to, (int)work->ticket, work->bytes);
    else
        work->call(work->argument);
    pthread_mutex_lock(&mutex);
}

static void *work_off(void *argument) {
    CUstream stream = argument;
    pthread_mutex_lock(&mutex);
    while (stream->first != NULL || !stream->is_closed) {
        struct work *work = stream->first;
        if (work == NULL) {
            pthread_cond_wait(&changed, &mutex);
            continue;
        }
        stream->is_busy = true;
        stream->first = work->next;
        if (stream->first == NULL)
            stream->last = &stream->first;
        pthread_mutex_unlock(&mutex);
        machine_fault("stream-work", false, 0, NULL);
        pthread_mutex_lock(&mutex);
        carry_out(work);
        free(work);
        stream->is_busy = false;
        pthread_cond_broadcast(&changed);
    }
    pthread_mutex_unlock(&mutex);
    return NULL;
}

static bool is_idle(CUstream stream) {
    return stream->first == NULL && !stream->is_busy;
}

bool streams_are_idle(void) {
    CUstream stream = streams;
    while (stream != NULL && is_idle(stream))
        stream = stream->next;
    return stream == NULL;
}

void await_default_stream(void) {
    for (CUstream stream = streams; stream != NULL;)
        if (stream->is_blocking && !is_idle(stream)) {
            pthread_cond_wait(&changed, &mutex);
            stream = streams; /* the list may be another one now */
        } else
            stream = stream->next;
}

static bool is_default(CUstream stream) {
    return stream == NULL || stream == CU_STREAM_LEGACY || stream == CU_STREAM_PER_THREAD;
}

static bool is_stream(CUstream wanted) {
    CUstream stream = streams;
    while (stream != NULL && stream != wanted)
        stream = stream->next;
    return stream != NULL;
}

/* Behind what the stream has to do already; in the call on the default stream. The caller has `mutex`. */
static CUresult submit(CUstream stream, struct work work) {
    if (is_default(stream)) {
        await_default_stream();
        carry_out(&work);
        return CUDA_SUCCESS;
    }
    if (!is_stream(stream))
        return CUDA_ERROR_INVALID_HANDLE;
    struct work *queued = malloc(sizeof *queued);
    if (queued == NULL)
        return CUDA_ERROR_OUT_OF_MEMORY;
    *queued = work;
    queued->next = NULL;
    *stream->last = queued;
    stream->last = &queued->next;
    pthread_cond_broadcast(&changed);
    return CUDA_SUCCESS;
}

static CUresult await(CUstream stream) {
    if (is_default(stream)) {
        await_default_stream();
        return CUDA_SUCCESS;
    }
    while (is_stream(stream) && !is_idle(stream))
        pthread_cond_wait(&changed, &mutex);
    return is_stream(stream) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

/* Submit; and where the host side of it is not pinned, or `waits`, return when it has been done. */
static CUresult run(CUstream stream, struct work work, bool waits) {
    int device;
    CUresult result = current_device(&device);
    if (result != CUDA_SUCCESS || work.bytes == 0)
        return result;
    pthread_mutex_lock(&mutex);
    result = submit(stream, work);
    if (result == CUDA_SUCCESS && waits)
        result = await(stream);
    pthread_mutex_unlock(&mutex);
    return result;
}

/* -- copies ---------------------------------------------------------------------------------------------- */

static void *pointer(CUdeviceptr address) {
    return (void *)(uintptr_t)address;
}

static CUresult to_device(CUdeviceptr to, const void *from, size_t bytes, CUstream stream, bool waits) {
    if (!check_device_memory(to, bytes))
        return CUDA_ERROR_INVALID_VALUE;
    return run(stream, (struct work){.what = COPY, .to = pointer(to), .from = from, .bytes = bytes},
               waits || !is_pinned(from, bytes));
}

static CUresult to_host(void *to, CUdeviceptr from, size_t bytes, CUstream stream, bool waits) {
    if (!check_device_memory(from, bytes))
        return CUDA_ERROR_INVALID_VALUE;
    return run(stream, (struct work){.what = COPY, .to = to, .from = pointer(from), .bytes = bytes},
               waits || !is_pinned(to, bytes));
}

static CUresult on_device(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    if (!check_device_memory(to, bytes) || !check_device_memory(from, bytes))
        return CUDA_ERROR_INVALID_VALUE;
    return run(stream, (struct work){.what = COPY, .to = pointer(to), .from = pointer(from), .bytes = bytes}, false);
}

static CUresult fill(CUdeviceptr to, unsigned char value, size_t bytes, CUstream stream) {
    if (!check_device_memory(to, bytes))
        return CUDA_ERROR_INVALID_VALUE;
    return run(stream, (struct work){.what = FILL, .to = pointer(to), .bytes = bytes, .ticket = value}, false);
}

EXPORT CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t bytes) {
    ENTER;
    return leave(to_device(to, from, bytes, NULL, true));
}

EXPORT CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes, CUstream stream) {
    ENTER;
    return leave(to_device(to, from, bytes, stream, false));
}

EXPORT CUresult cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t bytes) {
    ENTER;
    return leave(to_host(to, from, bytes, NULL, true));
}

EXPORT CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, CUstream stream) {
    ENTER;
    return leave(to_host(to, from, bytes, stream, false));
}

EXPORT CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    ENTER;
    return leave(on_device(to, from, bytes, NULL));
}

EXPORT CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    ENTER;
    return leave(on_device(to, from, bytes, stream));
}

EXPORT CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t bytes) {
    ENTER;
    return leave(fill(to, value, bytes, NULL));
}

EXPORT CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, CUstream stream) {
    ENTER;
    return leave(fill(to, value, bytes, stream));
}

/* -- streams --------------------------------------------------------------------------------------------- */

EXPORT CUresult cuStreamCreate(CUstream *created, unsigned int flags) {
    ENTER;
    int device;
    CUresult result = current_device(&device);
    CUstream stream = result == CUDA_SUCCESS ? calloc(1, sizeof *stream) : NULL;
    if (stream == NULL)
        return leave(result != CUDA_SUCCESS ? result : CUDA_ERROR_OUT_OF_MEMORY);
    stream->is_blocking = (flags & CU_STREAM_NON_BLOCKING) == 0;
    stream->last = &stream->first;
    pthread_mutex_lock(&mutex);
    if (pthread_create(&stream->thread, NULL, work_off, stream) == 0) {
        stream->next = streams;
        *created = streams = stream;
    } else {
        free(stream);
        result = CUDA_ERROR_OPERATING_SYSTEM;
    }
    pthread_mutex_unlock(&mutex);
    return leave(result);
}

EXPORT CUresult cuStreamCreateWithPriority(CUstream *created, unsigned int flags, int priority) {
    (void)priority;
    return cuStreamCreate(created, flags);
}

/* Unlike the real one it waits for the stream's work. */
EXPORT CUresult cuStreamDestroy_v2(CUstream stream) {
    ENTER;
    pthread_mutex_lock(&mutex);
    CUresult result = is_stream(stream) ? await(stream) : CUDA_ERROR_INVALID_HANDLE;
    if (result == CUDA_SUCCESS) {
        CUstream *link = &streams;
        while (*link != stream)
            link = &(*link)->next;
        *link = stream->next;
        stream->is_closed = true;
        pthread_cond_broadcast(&changed);
    }
    pthread_mutex_unlock(&mutex);
    if (result == CUDA_SUCCESS) {
        pthread_join(stream->thread, NULL);
        free(stream);
    }
    return leave(result);
}

EXPORT CUresult cuStreamQuery(CUstream stream) {
    ENTER;
    pthread_mutex_lock(&mutex);
    CUresult result = CUDA_SUCCESS;
    if (!is_default(stream))
        result = !is_stream(stream) ? CUDA_ERROR_INVALID_HANDLE : is_idle(stream) ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
    pthread_mutex_unlock(&mutex);
    return leave(result);
}

EXPORT CUresult cuStreamSynchronize(CUstream stream) {
    ENTER;
    pthread_mutex_lock(&mutex);
    CUresult result = await(stream);
    pthread_mutex_unlock(&mutex);
    return leave(result);
}

EXPORT CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned int flags) {
    ENTER;
    (void)flags;
    pthread_mutex_lock(&mutex);
    CUresult result = submit(stream, (struct work){.what = WAIT, .event = event, .ticket = event->recorded});
    pthread_mutex_unlock(&mutex);
    return leave(result);
}

EXPORT CUresult cuLaunchHostFunc(CUstream stream, CUhostFn call, void *argument) {
    ENTER;
    pthread_mutex_lock(&mutex);
    CUresult result = submit(stream, (struct work){.what = CALL, .call = call, .argument = argument});
    pthread_mutex_unlock(&mutex);
    return leave(result);
}

/* -- events ---------------------------------------------------------------------------------------------- */

EXPORT CUresult cuEventCreate(CUevent *event, unsigned int flags) {
    ENTER;
    *event = calloc(1, sizeof **event);
    if (*event == NULL)
        return leave(CUDA_ERROR_OUT_OF_MEMORY);
    (*event)->has_time = (flags & CU_EVENT_DISABLE_TIMING) == 0;
    return leave(CUDA_SUCCESS);
}

static void await_event(CUevent event) {
    while (event->reached < event->recorded)
        pthread_cond_wait(&changed, &mutex);
}

/* Unlike the real one it waits for the event. */
EXPORT CUresult cuEventDestroy_v2(CUevent event) {
    ENTER;
    pthread_mutex_lock(&mutex);
    await_event(event);
    pthread_mutex_unlock(&mutex);
    free(event);
    return leave(CUDA_SUCCESS);
}

EXPORT CUresult cuEventRecord(CUevent event, CUstream stream) {
    ENTER;
    pthread_mutex_lock(&mutex);
    CUresult result = submit(stream, (struct work){.what = RECORD, .event = event, .ticket = ++event->recorded});
    if (result != CUDA_SUCCESS)
        event->recorded--;
    pthread_mutex_unlock(&mutex);
    return leave(result);
}

EXPORT CUresult cuEventQuery(CUevent event) {
    ENTER;
    pthread_mutex_lock(&mutex);
    bool is_reached = event->reached == event->recorded;
    pthread_mutex_unlock(&mutex);
    return leave(is_reached ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY);
}

EXPORT CUresult cuEventSynchronize(CUevent event) {
    ENTER;
    pthread_mutex_lock(&mutex);
    await_event(event);
    pthread_mutex_unlock(&mutex);
    return leave(CUDA_SUCCESS);
}

EXPORT CUresult cuEventElapsedTime_v2(float *milliseconds, CUevent start, CUevent end) {
    ENTER;
    pthread_mutex_lock(&mutex);
    CUresult result = CUDA_SUCCESS;
    if (!start->has_time || !end->has_time || start->recorded == 0 || end->recorded == 0)
        result = CUDA_ERROR_INVALID_HANDLE;
    else if (start->reached < start->recorded || end->reached < end->recorded)
        result = CUDA_ERROR_NOT_READY;
    else
        *milliseconds = (float)(end->reached_ns - start->reached_ns) / 1e6F;
    pthread_mutex_unlock(&mutex);
    return leave(result);
}
