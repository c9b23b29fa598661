// A stand-in for the vendor's management library, built by the tests that need GPUs. It answers the calls that a worker
// makes, from the file FIGURES, which it reads anew at each call:
//
//   gpu INDEX TOTAL_MIB USED_MIB BUSY_PERCENT FAULTS NAME     FAULTS: letters of the calls that fail, or -
//   process GPU_INDEX PID USED_MIB
//
// Without that file there is no driver.

#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9, GPU_IS_LOST = 15 };

struct figures {
    unsigned long long total_mib, used_mib;
    unsigned busy;
    char faults[8], name[64];
};

struct memory {
    unsigned version;
    unsigned long long total, reserved, free, used;
};

struct utilization {
    unsigned gpu, memory;
};

struct process {
    unsigned pid;
    unsigned long long used;
    unsigned gpu_instance, compute_instance;
};

// The figures of a GPU; returns the number of GPUs, or -1 without a driver.
static int look(unsigned wanted, struct figures *found) {
    FILE *file = fopen(FIGURES, "r");
    if (!file) return -1;
    char line[256];
    int count = 0;
    while (fgets(line, sizeof line, file)) {
        struct figures now;
        unsigned index;
        if (sscanf(line, "gpu %u %llu %llu %u %7s %63[^\n]", &index, &now.total_mib, &now.used_mib, &now.busy, now.faults,
                   now.name) != 6)
            continue;
        if (index == wanted && found) *found = now;
        count++;
    }
    fclose(file);
    return count;
}

// The figures of the GPU behind a handle, unless this call fails.
static int of_device(void *device, char call, struct figures *found) {
    unsigned index = (unsigned)(uintptr_t)device - 1;
    int count = look(index, found);
    if (count < 0) return UNINITIALIZED;
    if (index >= (unsigned)count) return INVALID_ARGUMENT;
    return strchr(found->faults, call) ? GPU_IS_LOST : SUCCESS;
}

int nvmlInit_v2(void) { return look(0, 0) < 0 ? DRIVER_NOT_LOADED : SUCCESS; }

int nvmlShutdown(void) { return SUCCESS; }

int nvmlDeviceGetCount_v2(unsigned *count) {
    int found = look(0, 0);
    if (found < 0) return UNINITIALIZED;
    *count = (unsigned)found;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    struct figures now;
    *device = (void *)(uintptr_t)(index + 1);
    return of_device(*device, 'h', &now);
}

int nvmlDeviceGetName(void *device, char *name, unsigned length) {
    struct figures now;
    int code = of_device(device, 'n', &now);
    if (code == SUCCESS) snprintf(name, length, "%s", now.name);
    return code;
}

#ifndef WITHOUT_MEMORY
int nvmlDeviceGetMemoryInfo_v2(void *device, struct memory *memory) {
    struct figures now;
    int code = of_device(device, 'm', &now);
    if (memory->version != (sizeof *memory | 2 << 24)) return INVALID_ARGUMENT;
    if (code != SUCCESS) return code;
    memory->total = now.total_mib << 20;
    memory->used = now.used_mib << 20;
    memory->reserved = 0;
    memory->free = memory->total - memory->used;
    return SUCCESS;
}
#endif

int nvmlDeviceGetUtilizationRates(void *device, struct utilization *rates) {
    struct figures now;
    int code = of_device(device, 'u', &now);
    if (code == SUCCESS) *rates = (struct utilization){now.busy, 0};
    return code;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, struct process *processes) {
    struct figures now;
    int code = of_device(device, 'p', &now);
    if (code != SUCCESS) return code;
    FILE *file = fopen(FIGURES, "r");
    if (!file) return UNINITIALIZED;
    char line[256];
    unsigned found = 0, room = processes ? *count : 0;
    while (fgets(line, sizeof line, file)) {
        unsigned index, pid;
        unsigned long long used_mib;
        if (sscanf(line, "process %u %u %llu", &index, &pid, &used_mib) != 3) continue;
        if (index + 1 != (unsigned)(uintptr_t)device) continue;
        if (found < room) processes[found] = (struct process){pid, used_mib << 20, ~0u, ~0u};
        found++;
    }
    fclose(file);
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : SUCCESS;
}
