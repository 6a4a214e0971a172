/* Initialisation, the gate, devices, contexts, and how the bindings find functions. */
#define _GNU_SOURCE
#include "process.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
struct machine machine;
int on_gpu[MAX_GPUS], devices;
bool gate_is_closed;
bool is_broken;
int inside;

static pid_t initialised_by; /* a fork's child is not initialised: CUDA does not survive a fork */
static int retained[MAX_GPUS];
static char context_of[MAX_GPUS]; /* the address of an entry is the device's primary context */
enum { MAX_CONTEXTS = 16 };
static _Thread_local struct {
    int depth;
    CUcontext stack[MAX_CONTEXTS];
} contexts;

/* -- the gate -------------------------------------------------------------------------------------------- */

bool is_initialised(void) {
    return initialised_by != 0 && initialised_by == getpid();
}

CUresult enter(const char *call) {
    if (!is_initialised())
        return CUDA_ERROR_NOT_INITIALIZED;
    if (machine_is_lost())
        return CUDA_ERROR_UNKNOWN;
    CUresult fault = (CUresult)machine_fault(call, false, getpid(), NULL);
    if (fault != CUDA_SUCCESS)
        return fault;
    pthread_mutex_lock(&mutex);
    while (gate_is_closed && process_state() != CU_PROCESS_STATE_FAILED)
        pthread_cond_wait(&changed, &mutex);
    CUresult result = process_state() == CU_PROCESS_STATE_FAILED ? CUDA_ERROR_UNKNOWN
                      : is_broken                                ? CUDA_ERROR_ILLEGAL_ADDRESS
                                                                 : CUDA_SUCCESS;
    inside += result == CUDA_SUCCESS;
    pthread_mutex_unlock(&mutex);
    return result;
}

CUresult leave(CUresult result) {
    pthread_mutex_lock(&mutex);
    inside--;
    if (gate_is_closed)
        pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&mutex);
    return result;
}

/* -- initialisation -------------------------------------------------------------------------------------- */

/* CUDA_VISIBLE_DEVICES: indices and UUID prefixes, in its order, up to the first that is none. */
static void choose_devices(void) {
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    devices = 0;
    for (int gpu = 0; visible == NULL && gpu < machine.gpus; gpu++)
        on_gpu[devices++] = gpu;
    char words[512] = "", *rest = words;
    if (visible != NULL)
        snprintf(words, sizeof words, "%s", visible);
    for (char *word; (word = strtok_r(rest, ",", &rest)) != NULL && devices < MAX_GPUS; devices++) {
        char *end;
        int found = (int)strtol(word, &end, 10);
        if (*end != 0 || end == word)
            for (found = 0; found < machine.gpus; found++)
                if (strncasecmp(machine.gpu[found].uuid, word, strlen(word)) == 0)
                    break;
        if (found < 0 || found >= machine.gpus)
            return;
        on_gpu[devices] = found;
    }
}

EXPORT CUresult cuInit(unsigned int flags) {
    CUresult fault = (CUresult)machine_fault("cuInit", false, getpid(), NULL);
    if (fault != CUDA_SUCCESS || is_initialised() || flags != 0)
        return fault != CUDA_SUCCESS ? fault : flags != 0 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
    if (machine_is_lost() || !machine_load(&machine))
        return CUDA_ERROR_NO_DEVICE;
    choose_devices();
    if (devices == 0)
        return CUDA_ERROR_NO_DEVICE;
    CUresult started = start_restore_thread();
    if (started == CUDA_SUCCESS)
        initialised_by = getpid();
    return started;
}

EXPORT CUresult cuDriverGetVersion(int *version) {
    struct machine now;
    *version = machine_load(&now) ? now.cuda : 0;
    return CUDA_SUCCESS;
}

/* -- devices --------------------------------------------------------------------------------------------- */

static struct gpu *gpu_of(CUdevice device) {
    return device >= 0 && device < devices ? &machine.gpu[on_gpu[device]] : NULL;
}

EXPORT CUresult cuDeviceGetCount(int *count) {
    ENTER;
    *count = devices;
    return leave(CUDA_SUCCESS);
}

EXPORT CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    ENTER;
    *device = ordinal;
    return leave(gpu_of(ordinal) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE);
}

EXPORT CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    ENTER;
    struct gpu *gpu = gpu_of(device);
    if (gpu != NULL)
        snprintf(name, (size_t)length, "%s", gpu->name);
    return leave(gpu ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE);
}

static void uuid_bytes(const struct gpu *gpu, CUuuid *uuid) {
    const char *digit = gpu->uuid + strlen("GPU-");
    for (size_t i = 0; i < sizeof uuid->bytes; i++) {
        unsigned int byte = 0;
        digit += *digit == '-';
        sscanf(digit, "%2x", &byte);
        uuid->bytes[i] = (char)byte;
        digit += 2;
    }
}

EXPORT CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device) {
    ENTER;
    struct gpu *gpu = gpu_of(device);
    if (gpu != NULL)
        uuid_bytes(gpu, uuid);
    return leave(gpu ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE);
}

EXPORT CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    ENTER;
    struct gpu *gpu = gpu_of(device);
    if (gpu != NULL)
        *bytes = gpu->bytes;
    return leave(gpu ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE);
}

static int attribute_value(CUdevice_attribute attribute) {
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
        return 9;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
        return 0;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
    case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT:
        return 2;
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY:
    case CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS:
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY:
    case CU_DEVICE_ATTRIBUTE_GPU_OVERLAP:
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED:
        return 1;
    default:
        return 0;
    }
}

EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    ENTER;
    *value = attribute_value(attribute);
    return leave(gpu_of(device) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE);
}

/* -- contexts: the primary one of each device, and a stack of current ones for each thread --------------- */

static CUcontext top(void) {
    return contexts.depth > 0 ? contexts.stack[contexts.depth - 1] : NULL;
}

CUresult current_device(int *device) {
    if (top() == NULL)
        return CUDA_ERROR_INVALID_CONTEXT;
    *device = (int)((char *)top() - context_of);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    ENTER;
    if (gpu_of(device) == NULL)
        return leave(CUDA_ERROR_INVALID_DEVICE);
    pthread_mutex_lock(&mutex);
    retained[device]++;
    pthread_mutex_unlock(&mutex);
    *context = (CUcontext)(void *)&context_of[device];
    return leave(CUDA_SUCCESS);
}

EXPORT CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    ENTER;
    if (gpu_of(device) == NULL)
        return leave(CUDA_ERROR_INVALID_DEVICE);
    pthread_mutex_lock(&mutex);
    bool is_retained = retained[device] > 0;
    retained[device] -= is_retained;
    pthread_mutex_unlock(&mutex);
    return leave(is_retained ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT);
}

EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned int *flags, int *active) {
    ENTER;
    if (gpu_of(device) == NULL)
        return leave(CUDA_ERROR_INVALID_DEVICE);
    *flags = 0;
    *active = retained[device] > 0;
    return leave(CUDA_SUCCESS);
}

EXPORT CUresult cuCtxSetCurrent(CUcontext context) {
    ENTER;
    if (context == NULL)
        contexts.depth -= contexts.depth > 0;
    else {
        contexts.depth += contexts.depth == 0;
        contexts.stack[contexts.depth - 1] = context;
    }
    return leave(CUDA_SUCCESS);
}

EXPORT CUresult cuCtxGetCurrent(CUcontext *context) {
    ENTER;
    *context = top();
    return leave(CUDA_SUCCESS);
}

EXPORT CUresult cuCtxPushCurrent_v2(CUcontext context) {
    ENTER;
    if (context == NULL || contexts.depth == MAX_CONTEXTS)
        return leave(CUDA_ERROR_INVALID_VALUE);
    contexts.stack[contexts.depth++] = context;
    return leave(CUDA_SUCCESS);
}

EXPORT CUresult cuCtxPopCurrent_v2(CUcontext *context) {
    ENTER;
    if (top() == NULL)
        return leave(CUDA_ERROR_INVALID_CONTEXT);
    CUcontext popped = contexts.stack[--contexts.depth];
    if (context != NULL)
        *context = popped;
    return leave(CUDA_SUCCESS);
}

EXPORT CUresult cuCtxGetDevice(CUdevice *device) {
    ENTER;
    return leave(current_device(device));
}

EXPORT CUresult cuCtxSynchronize(void) {
    ENTER;
    int device;
    CUresult result = current_device(&device);
    pthread_mutex_lock(&mutex);
    while (result == CUDA_SUCCESS && !streams_are_idle())
        pthread_cond_wait(&changed, &mutex);
    pthread_mutex_unlock(&mutex);
    return leave(result);
}

EXPORT CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    ENTER;
    *least = *greatest = 0;
    return leave(CUDA_SUCCESS);
}

/* -- errors and functions -------------------------------------------------------------------------------- */

static const struct {
    CUresult code;
    const char *name, *text;
} errors[] = {
    {CUDA_SUCCESS, "CUDA_SUCCESS", "no error"},
    {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {CUDA_ERROR_NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {CUDA_ERROR_NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {CUDA_ERROR_INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {CUDA_ERROR_INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {CUDA_ERROR_OPERATING_SYSTEM, "CUDA_ERROR_OPERATING_SYSTEM", "OS call failed"},
    {CUDA_ERROR_INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {CUDA_ERROR_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {CUDA_ERROR_ILLEGAL_STATE, "CUDA_ERROR_ILLEGAL_STATE", "the operation cannot be performed in the present state"},
    {CUDA_ERROR_NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {CUDA_ERROR_NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {CUDA_ERROR_NOT_PERMITTED, "CUDA_ERROR_NOT_PERMITTED", "operation not permitted"},
    {CUDA_ERROR_NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {CUDA_ERROR_UNKNOWN, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

static size_t find_error(CUresult code) {
    size_t last = sizeof errors / sizeof *errors - 1, i = 0;
    while (i < last && errors[i].code != code)
        i++;
    return i;
}

EXPORT CUresult cuGetErrorName(CUresult code, const char **name) {
    *name = errors[find_error(code)].name;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuGetErrorString(CUresult code, const char **text) {
    *text = errors[find_error(code)].text;
    return CUDA_SUCCESS;
}

/* Functions are asked for by the name without version; the newest that this library has is given. */
EXPORT CUresult cuGetProcAddress_v2(const char *symbol, void **function, int version, cuuint64_t flags,
                                    CUdriverProcAddressQueryResult *status) {
    static const char *const suffixes[] = {"_v4", "_v3", "_v2", ""};
    struct machine now;
    (void)version, (void)flags;
    *function = NULL;
    bool is_hidden = strncmp(symbol, "cuCheckpoint", strlen("cuCheckpoint")) == 0 && machine_load(&now) && !now.checkpoint;
    void *library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    for (int i = 0; library != NULL && !is_hidden && *function == NULL && i < 4; i++) {
        char name[128];
        snprintf(name, sizeof name, "%s%s", symbol, suffixes[i]);
        *function = dlsym(library, name);
    }
    if (library != NULL)
        dlclose(library);
    if (status != NULL)
        *status = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
