/* One process that uses the simulated driver: what init, memory, streams and checkpoint share. */
#ifndef GPUFN_STUB_PROCESS_H
#define GPUFN_STUB_PROCESS_H

#include <cuda.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>

#include "machine.h"

#define EXPORT __attribute__((visibility("default")))

/* Every call of the API is  ENTER; ... return leave(result);
 * so that it waits while the process is locked, and a lock waits for it. */
#define ENTER                                  \
    do {                                       \
        CUresult refused = enter(__func__);    \
        if (refused != CUDA_SUCCESS)           \
            return refused;                    \
    } while (0)

CUresult enter(const char *call);
CUresult leave(CUresult result);

/* Guards all that is below, and streams' queues. `changed` is signalled whenever any of it does. */
extern pthread_mutex_t mutex;
extern pthread_cond_t changed;

extern struct machine machine;    /* as it was at cuInit */
extern int on_gpu[MAX_GPUS];      /* which GPU of the machine each device ordinal is on; a remap changes it */
extern int devices;               /* how many of them this process may use */
extern bool gate_is_closed;       /* a lock is wanted or held: calls wait in enter() */
extern bool is_broken;            /* the device met addresses without memory: each call fails from then on */
extern int inside;                /* calls that are past the gate */

bool is_initialised(void);
CUresult current_device(int *device);

/* Memory (memory.c). The caller has `mutex`. */
bool has_managed_memory(void);
void memory_used(uint64_t bytes[MAX_GPUS]); /* by ordinal */
bool memory_away(void);                     /* the bytes leave their addresses, which stay reserved */
bool memory_back(void);

/* Streams (stream.c). The caller has `mutex`. */
bool streams_are_idle(void);
void await_default_stream(void);

/* The mailbox that other processes write into (checkpoint.c). */
CUresult start_restore_thread(void);
CUprocessState process_state(void);

#endif
