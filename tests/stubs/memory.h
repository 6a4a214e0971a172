/* What streams ask of memory. They lock `mutex` themselves. */
#ifndef GPUFN_STUB_MEMORY_H
#define GPUFN_STUB_MEMORY_H

#include <cuda.h>
#include <stdbool.h>
#include <stddef.h>

bool check_device_memory(CUdeviceptr address, size_t bytes);
bool is_pinned(const void *start, size_t bytes);

#endif
