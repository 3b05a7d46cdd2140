/* A CUDA runtime that finds one device and does nothing: enough for torch's autograd engine, streams and events. */
#include <string.h>
#include "driver_types.h"

static long handles = 0x1000;
#define GIVE(name, ...) cudaError_t name(void **handle, ##__VA_ARGS__) { *handle = (void *)(handles += 16); return 0; }
#define DONE(name, ...) cudaError_t name(__VA_ARGS__) { return 0; }

GIVE(cudaStreamCreate)
GIVE(cudaStreamCreateWithFlags, unsigned flags)
GIVE(cudaStreamCreateWithPriority, unsigned flags, int priority)
GIVE(cudaEventCreate)
GIVE(cudaEventCreateWithFlags, unsigned flags)
DONE(cudaSetDevice, int device)
DONE(cudaGetLastError, void)
DONE(cudaPeekAtLastError, void)
DONE(cudaDeviceSynchronize, void)
DONE(cudaStreamDestroy, void *stream)
DONE(cudaStreamQuery, void *stream)
DONE(cudaStreamSynchronize, void *stream)
DONE(cudaStreamWaitEvent, void *stream, void *event, unsigned flags)
DONE(cudaEventRecord, void *event, void *stream)
DONE(cudaEventRecordWithFlags, void *event, void *stream, unsigned flags)
DONE(cudaEventQuery, void *event)
DONE(cudaEventSynchronize, void *event)
DONE(cudaEventDestroy, void *event)
DONE(cudaThreadExchangeStreamCaptureMode, int *mode)
cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return 0; }
cudaError_t cudaGetDevice(int *device) { *device = 0; return 0; }
cudaError_t cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
cudaError_t cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
cudaError_t cudaEventElapsedTime(float *ms, void *start, void *end) { *ms = 1; return 0; }
cudaError_t cudaMemGetInfo(size_t *available, size_t *total) { *available = 70ul << 30; *total = 80ul << 30; return 0; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device)
{
    memset(p, 0, sizeof *p);
    strcpy(p->name, "A100 that computes nothing");
    p->major = 8, p->minor = 0, p->multiProcessorCount = 108, p->warpSize = 32, p->totalGlobalMem = 80ul << 30;
    p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048, p->l2CacheSize = 40 << 20;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536, p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = 166912, p->sharedMemPerMultiprocessor = 167936;
    return 0;
}

/* What torch asks the driver itself for (this file is libcuda.so.1, too). */
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "a device that computes nothing"; return 0; }
