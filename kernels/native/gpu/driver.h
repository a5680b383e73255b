// The part of the CUDA driver's interface that is used here, in the names of cuda.h; the toolkit is not needed to build.
#pragma once

typedef int CUresult;
typedef int CUdevice;
typedef struct CUlib_st* CUlibrary;
typedef struct CUkern_st* CUkernel;
typedef struct CUfunc_st* CUfunction;
typedef struct CUstream_st* CUstream;

enum {
  CUDA_SUCCESS = 0,
  CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
};

// F(name, parameters) for each function.
#define RT_DRIVER_FUNCTIONS(F)                                                                                     \
  F(cuInit, (unsigned flags))                                                                                      \
  F(cuCtxGetDevice, (CUdevice * device))                                                                           \
  F(cuDeviceGetAttribute, (int* value, int attribute, CUdevice device))                                            \
  F(cuLibraryLoadData, (CUlibrary * library, const void* code, int* jit_options, void** jit_values, unsigned jit,  \
                        int* options, void** values, unsigned count))                                              \
  F(cuLibraryUnload, (CUlibrary library))                                                                          \
  F(cuLibraryGetKernel, (CUkernel * kernel, CUlibrary library, const char* name))                                  \
  F(cuKernelSetAttribute, (int attribute, int value, CUkernel kernel, CUdevice device))                            \
  F(cuKernelGetFunction, (CUfunction * function, CUkernel kernel))                                                 \
  F(cuLaunchKernel, (CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,     \
                     unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream stream, void** arguments, \
                     void** extra))
