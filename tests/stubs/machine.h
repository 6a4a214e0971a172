/* The simulated machine: its GPUs, who holds how much of their memory, and the faults that a test wants.
 *
 * All of it is in files of the folder $GPUFN_STUB_DIR, or of the one that the library was found in, so that processes share it and a kill -9 leaves nothing
 * to be mended:
 *
 *   machine    the GPUs and the driver, see machine_load; without it: one GPU of 8 GiB
 *   leases/    a file for each process with device memory, locked while its owner lives
 *   faults     what is to go wrong, see machine_fault; read at each call
 *   lost       while it is there, the GPUs have fallen off the bus
 */
#ifndef GPUFN_STUB_MACHINE_H
#define GPUFN_STUB_MACHINE_H

#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

enum { MAX_GPUS = 16, MAX_HOLDERS = 64 };

struct gpu {
    char uuid[41]; /* GPU-8-4-4-4-12 hexadecimal digits */
    char name[64];
    uint64_t bytes;
    bool mig;
};

struct machine {
    char driver[32];
    int cuda;         /* as cuDriverGetVersion says it: 13020 is 13.2 */
    bool persistence; /* persistence mode of all GPUs */
    bool checkpoint;  /* false: a driver too old for cuCheckpointProcess... */
    bool remap;       /* false: a driver too old for GPU pairs */
    int gpus;
    struct gpu gpu[MAX_GPUS];
};

/* Read the machine anew. False: no folder, that is no GPU and no driver. */
bool path_of(char path[PATH_MAX], const char *name);
bool machine_load(struct machine *machine);

bool machine_is_lost(void);

/* This process's share of the device memory. Nothing of it outlives the process. */
bool machine_take(int gpu, uint64_t bytes);
void machine_give(int gpu, uint64_t bytes);
bool machine_take_all(const uint64_t bytes[MAX_GPUS]);
void machine_give_all(void);

struct holder {
    pid_t pid; /* as its owner sees it */
    uint64_t bytes;
};

/* Bytes of a GPU that living processes hold; and who they are where `holders` is given (MAX_HOLDERS long). */
uint64_t machine_used(int gpu, struct holder *holders, int *count);

/* What a line of `faults` wants of this call: 0 nothing, else the code to fail with.
 *
 *   CALL NTH ACTION [ARGUMENT] [when=after] [caller=PID] [target=PID]
 *
 * CALL is the name without _v2; `stream-work` is any work that a stream's thread does. NTH counts, over all
 * processes, the calls that fit the line; * is each of them. ACTION: fail CODE, failed CODE (the target is
 * FAILED from then on), delay MILLISECONDS, hang, kill-target, kill-caller, lost. when=after: once the call has
 * been done. `failed` is told apart by *broken.
 */
int machine_fault(const char *call, bool after, pid_t target, bool *broken);

#endif
