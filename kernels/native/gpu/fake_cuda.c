#define _GNU_SOURCE
#include "fake_cuda.h"

#include <pthread.h>
#include <string.h>
#include <time.h>

__attribute__((visibility("default"))) fake_cuda fake;

// A library is its code, and so is a kernel: each cubin has one.
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define ENTRY __attribute__((visibility("default"))) CUresult
#define FAIL_IF_TOLD \
  if (fake.failing && strcmp(fake.failing, __func__) == 0) return fake.result

ENTRY cuInit(unsigned flags) {
  FAIL_IF_TOLD;
  return flags ? 1 : CUDA_SUCCESS;
}

ENTRY cuCtxGetDevice(CUdevice* device) {
  FAIL_IF_TOLD;
  *device = fake.device;
  return CUDA_SUCCESS;
}

ENTRY cuDeviceGetAttribute(int* value, int attribute, CUdevice device) {
  FAIL_IF_TOLD;
  if (device != fake.device) return 101;
  *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? fake.capability / 10 : fake.capability % 10;
  return CUDA_SUCCESS;
}

ENTRY cuLibraryLoadData(CUlibrary* library, const void* code, int* jit_options, void** jit_values, unsigned jit,
                        int* options, void** values, unsigned count) {
  FAIL_IF_TOLD;
  if (jit_options || jit_values || jit || options || values || count) return 1;
  nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);  // so that threads would meet here
  pthread_mutex_lock(&lock);
  ++fake.loads;
  fake.code = code;
  pthread_mutex_unlock(&lock);
  *library = (CUlibrary)code;
  return CUDA_SUCCESS;
}

ENTRY cuLibraryUnload(CUlibrary library) {
  FAIL_IF_TOLD;
  fake.unloads += library != NULL;
  return CUDA_SUCCESS;
}

ENTRY cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
  FAIL_IF_TOLD;
  fake.symbol = name;
  *kernel = (CUkernel)library;
  return CUDA_SUCCESS;
}

ENTRY cuKernelSetAttribute(int attribute, int value, CUkernel kernel, CUdevice device) {
  FAIL_IF_TOLD;
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || !kernel) return 1;
  ++fake.attributes;
  fake.attribute_value = value;
  fake.attribute_device = device;
  return CUDA_SUCCESS;
}

ENTRY cuKernelGetFunction(CUfunction* function, CUkernel kernel) {
  FAIL_IF_TOLD;
  ++fake.gets;
  *function = (CUfunction)kernel;
  return CUDA_SUCCESS;
}

ENTRY cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                     unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream stream, void** arguments,
                     void** extra) {
  FAIL_IF_TOLD;
  if (extra) return 1;
  pthread_mutex_lock(&lock);
  ++fake.launches;
  fake.launched = function;
  fake.grid[0] = grid_x, fake.grid[1] = grid_y, fake.grid[2] = grid_z;
  fake.block[0] = block_x, fake.block[1] = block_y, fake.block[2] = block_z;
  fake.shared_bytes = shared_bytes;
  fake.stream = stream;
  for (size_t i = 0; i < 32 && fake.argument_bytes[i]; ++i) {
    fake.arguments[i] = 0;
    memcpy(&fake.arguments[i], arguments[i], fake.argument_bytes[i]);
  }
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}
