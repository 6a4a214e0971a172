/* The simulated machine as NVML shows it. A checkpointed process holds nothing here, as in reality.
 *
 * NVIDIA's header comes with no Python package, so what is needed of nvml.h is said here. In MIG mode a GPU has
 * two instances of half its memory.
 */
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

#include "machine.h"

#define EXPORT __attribute__((visibility("default")))

typedef enum {
    NVML_SUCCESS = 0,
    NVML_ERROR_UNINITIALIZED = 1,
    NVML_ERROR_INVALID_ARGUMENT = 2,
    NVML_ERROR_NOT_SUPPORTED = 3,
    NVML_ERROR_NO_PERMISSION = 4,
    NVML_ERROR_NOT_FOUND = 6,
    NVML_ERROR_INSUFFICIENT_SIZE = 7,
    NVML_ERROR_DRIVER_NOT_LOADED = 9,
    NVML_ERROR_GPU_IS_LOST = 15,
    NVML_ERROR_LIB_RM_VERSION_MISMATCH = 18,
    NVML_ERROR_UNKNOWN = 999,
} nvmlReturn_t;

typedef struct {
    unsigned long long total, free, used;
} nvmlMemory_t;

typedef struct {
    unsigned int pid;
    unsigned long long used;
    unsigned int gpu_instance, compute_instance;
} nvmlProcessInfo_t;

enum { INSTANCES = 2 };

/* A handle is the number of the GPU, or of one of its instances, plus one. */
typedef const char *nvmlDevice_t;
static const char handles[MAX_GPUS * (1 + INSTANCES) + 1];
static int initialised;
static struct machine machine;

static nvmlDevice_t handle_of(int gpu, int instance) {
    return &handles[1 + gpu * (1 + INSTANCES) + instance];
}

static int gpu_of(nvmlDevice_t device) {
    return (int)(device - handles - 1) / (1 + INSTANCES);
}

/* 0: the whole GPU */
static int instance_of(nvmlDevice_t device) {
    return (int)(device - handles - 1) % (1 + INSTANCES);
}

static nvmlReturn_t begin(const char *call) {
    nvmlReturn_t fault = (nvmlReturn_t)machine_fault(call, false, getpid(), NULL);
    if (fault != NVML_SUCCESS)
        return fault;
    if (!initialised)
        return NVML_ERROR_UNINITIALIZED;
    return machine_load(&machine) ? NVML_SUCCESS : NVML_ERROR_DRIVER_NOT_LOADED;
}

static nvmlReturn_t begin_device(const char *call, nvmlDevice_t device) {
    nvmlReturn_t result = begin(call);
    if (result == NVML_SUCCESS && (device <= handles || gpu_of(device) >= machine.gpus))
        result = NVML_ERROR_INVALID_ARGUMENT;
    if (result == NVML_SUCCESS && machine_is_lost())
        result = NVML_ERROR_GPU_IS_LOST;
    return result;
}

static nvmlReturn_t put(char *to, unsigned int length, const char *text) {
    return snprintf(to, length, "%s", text) < (int)length ? NVML_SUCCESS : NVML_ERROR_INSUFFICIENT_SIZE;
}

EXPORT nvmlReturn_t nvmlInitWithFlags(unsigned int flags) {
    (void)flags;
    nvmlReturn_t fault = (nvmlReturn_t)machine_fault("nvmlInit", false, getpid(), NULL);
    if (fault == NVML_SUCCESS && !machine_load(&machine))
        fault = NVML_ERROR_DRIVER_NOT_LOADED;
    initialised += fault == NVML_SUCCESS;
    return fault;
}

EXPORT nvmlReturn_t nvmlShutdown(void) {
    nvmlReturn_t result = initialised > 0 ? NVML_SUCCESS : NVML_ERROR_UNINITIALIZED;
    initialised -= initialised > 0;
    return result;
}

EXPORT const char *nvmlErrorString(nvmlReturn_t code) {
    switch (code) {
    case NVML_SUCCESS:
        return "Success";
    case NVML_ERROR_UNINITIALIZED:
        return "Uninitialized";
    case NVML_ERROR_NOT_SUPPORTED:
        return "Not Supported";
    case NVML_ERROR_NO_PERMISSION:
        return "Insufficient Permissions";
    case NVML_ERROR_DRIVER_NOT_LOADED:
        return "Driver Not Loaded";
    case NVML_ERROR_GPU_IS_LOST:
        return "GPU is lost";
    case NVML_ERROR_LIB_RM_VERSION_MISMATCH:
        return "RM has detected an NVML/RM version mismatch.";
    default:
        return "Unknown Error";
    }
}

EXPORT nvmlReturn_t nvmlSystemGetDriverVersion(char *version, unsigned int length) {
    nvmlReturn_t result = begin(__func__);
    return result != NVML_SUCCESS ? result : put(version, length, machine.driver);
}

EXPORT nvmlReturn_t nvmlSystemGetCudaDriverVersion_v2(int *version) {
    nvmlReturn_t result = begin(__func__);
    if (result == NVML_SUCCESS)
        *version = machine.cuda;
    return result;
}

EXPORT nvmlReturn_t nvmlDeviceGetCount_v2(unsigned int *count) {
    nvmlReturn_t result = begin(__func__);
    if (result == NVML_SUCCESS)
        *count = (unsigned int)machine.gpus;
    return result;
}

EXPORT nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned int index, nvmlDevice_t *device) {
    nvmlReturn_t result = begin(__func__);
    if (result == NVML_SUCCESS && index >= (unsigned int)machine.gpus)
        result = NVML_ERROR_INVALID_ARGUMENT;
    if (result == NVML_SUCCESS && machine_is_lost())
        result = NVML_ERROR_GPU_IS_LOST;
    if (result == NVML_SUCCESS)
        *device = handle_of((int)index, 0);
    return result;
}

EXPORT nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *device) {
    nvmlReturn_t result = begin(__func__);
    int gpu = 0;
    while (result == NVML_SUCCESS && gpu < machine.gpus && strcmp(machine.gpu[gpu].uuid, uuid) != 0)
        gpu++;
    if (result == NVML_SUCCESS && gpu == machine.gpus)
        result = NVML_ERROR_NOT_FOUND;
    if (result == NVML_SUCCESS)
        *device = handle_of(gpu, 0);
    return result;
}

EXPORT nvmlReturn_t nvmlDeviceGetIndex(nvmlDevice_t device, unsigned int *index) {
    nvmlReturn_t result = begin_device(__func__, device);
    if (result == NVML_SUCCESS)
        *index = (unsigned int)gpu_of(device);
    return result;
}

EXPORT nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t device, char *name, unsigned int length) {
    nvmlReturn_t result = begin_device(__func__, device);
    return result != NVML_SUCCESS ? result : put(name, length, machine.gpu[gpu_of(device)].name);
}

/* An instance's is its GPU's with MIG in front and its number at the end. */
EXPORT nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t device, char *uuid, unsigned int length) {
    nvmlReturn_t result = begin_device(__func__, device);
    if (result != NVML_SUCCESS)
        return result;
    char text[sizeof machine.gpu->uuid];
    memcpy(text, machine.gpu[gpu_of(device)].uuid, sizeof text);
    if (instance_of(device) > 0) {
        memcpy(text, "MIG", strlen("MIG"));
        text[strlen(text) - 1] = (char)('0' + instance_of(device));
    }
    return put(uuid, length, text);
}

EXPORT nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t *memory) {
    nvmlReturn_t result = begin_device(__func__, device);
    if (result != NVML_SUCCESS)
        return result;
    memory->total = machine.gpu[gpu_of(device)].bytes / (instance_of(device) > 0 ? INSTANCES : 1);
    memory->used = instance_of(device) > 0 ? 0 : machine_used(gpu_of(device), NULL, NULL);
    memory->free = memory->total - memory->used;
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetPersistenceMode(nvmlDevice_t device, int *mode) {
    nvmlReturn_t result = begin_device(__func__, device);
    if (result == NVML_SUCCESS)
        *mode = machine.persistence;
    return result;
}

EXPORT nvmlReturn_t nvmlDeviceGetMigMode(nvmlDevice_t device, unsigned int *current, unsigned int *pending) {
    nvmlReturn_t result = begin_device(__func__, device);
    if (result == NVML_SUCCESS)
        *current = *pending = machine.gpu[gpu_of(device)].mig;
    return result;
}

EXPORT nvmlReturn_t nvmlDeviceGetMaxMigDeviceCount(nvmlDevice_t device, unsigned int *count) {
    nvmlReturn_t result = begin_device(__func__, device);
    if (result == NVML_SUCCESS)
        *count = machine.gpu[gpu_of(device)].mig ? 7 : 0;
    return result;
}

EXPORT nvmlReturn_t nvmlDeviceGetMigDeviceHandleByIndex(nvmlDevice_t device, unsigned int index, nvmlDevice_t *instance) {
    nvmlReturn_t result = begin_device(__func__, device);
    if (result == NVML_SUCCESS && (!machine.gpu[gpu_of(device)].mig || index >= INSTANCES))
        result = NVML_ERROR_NOT_FOUND;
    if (result == NVML_SUCCESS)
        *instance = handle_of(gpu_of(device), 1 + (int)index);
    return result;
}

EXPORT nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t device, unsigned int *count,
                                                            nvmlProcessInfo_t *processes) {
    nvmlReturn_t result = begin_device(__func__, device);
    if (result != NVML_SUCCESS)
        return result;
    struct holder holders[MAX_HOLDERS];
    int found = 0;
    machine_used(gpu_of(device), holders, &found);
    bool fits = (unsigned int)found <= *count;
    *count = (unsigned int)found;
    for (int i = 0; fits && i < found; i++)
        processes[i] = (nvmlProcessInfo_t){(unsigned int)holders[i].pid, holders[i].bytes, UINT32_MAX, UINT32_MAX};
    return fits ? NVML_SUCCESS : NVML_ERROR_INSUFFICIENT_SIZE;
}
