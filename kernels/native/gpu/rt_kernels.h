// The GPU kernels of rt for C and C++ hosts, without Python and without Triton: librt_kernels.so.
//
// The library holds each operator compiled ahead of time into images: machine code for one data type, one set of
// compile-time constants and one GPU architecture. `rt_ops.h` has a function an operator, such as rt_group_norm(), that
// picks the image for its arguments and for the GPU at hand. This header is what these functions are made of.
//
//     rt_kernels* kernels;
//     rt_status status = rt_kernels_open(NULL, &kernels);
//     if (status != RT_OK) return fail(rt_status_string(status));
//     status = rt_group_norm(kernels, RT_FLOAT16, 2, 4096, 320, 32, 1e-5, true, x, bias, scale, shift, y, stream);
//
// Memory. Tensors are the caller's, in device memory (CUdeviceptr, what cudaMalloc returns), dense, the last dimension
// the fastest, and start at a multiple of 16 bytes. The library allocates nothing on the device but the code.
//
// Context. Everything happens in the CUDA context that is current on the calling thread; the primary one, that of the
// CUDA runtime, after any call of it that touches the device. Launches are enqueued on `stream` and not waited for: what
// goes wrong while a kernel runs is reported by the caller's next synchronisation.
//
// Threads. Every function may be called from any thread at any time, but rt_kernels_close() only when no other call
// uses that handle.
//
// The driver, libcuda.so.1 of CUDA 12 or later, is opened by rt_kernels_open(). Before that, and on machines without
// one, the library loads and the table of kernels can be read.
#ifndef RT_KERNELS_H
#define RT_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define RT_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

// What every function that can fail returns. Nothing has been enqueued unless it is RT_OK.
typedef enum rt_status {
  RT_OK = 0,
  RT_NO_DRIVER,      // libcuda.so.1 is missing or older than CUDA 12
  RT_NO_DEVICE,      // the driver found no GPU, or could not start
  RT_NO_CONTEXT,     // no CUDA context is current on this thread
  RT_NO_OPERATOR,    // no operator of that name, or a kernel that is not from the table
  RT_NO_DTYPE,       // the operator is not compiled for that data type
  RT_NO_CONSTANTS,   // nor for these constants, or an attribute is missing
  RT_NO_CAPABILITY,  // nor for this GPU
  RT_BAD_SIZE,       // a size below 1, beyond 2^31 - 1, other than compiled for, or a grid beyond the GPU's limits
  RT_NULL_POINTER,   // an argument that may not be NULL
  RT_MISALIGNED,     // a tensor that does not start at a multiple of 16 bytes
  RT_LOAD_FAILED,    // the driver refused the image; see rt_driver_error()
  RT_LAUNCH_FAILED,  // the driver refused the launch; see rt_driver_error()
  RT_OUT_OF_MEMORY,  // of the host
} rt_status;

// A sentence without a full stop, static; for any value.
RT_API const char* rt_status_string(rt_status status);

// The CUresult of this thread's last call into the driver that failed, 0 if none has.
RT_API int rt_driver_error(void);

// Formats of values.
typedef enum rt_dtype {
  RT_FLOAT32,
  RT_FLOAT16,
  RT_BFLOAT16,
  RT_FLOAT8_E4M3FN,
  RT_INT32,
  RT_UINT32,
  RT_UINT8,
} rt_dtype;

// A compile-time constant by name: a number (0 or 1 for a truth value), or `text` where that is not NULL. Numbers are
// equal when they are equal as floats, so 1e-5f finds what was compiled with 1e-5.
typedef struct rt_constant {
  const char* name;
  double number;
  const char* text;
} rt_constant;

typedef enum rt_role { RT_INPUT, RT_SCALAR, RT_OUTPUT, RT_INOUT } rt_role;

// A parameter of a kernel. An input is a pointer that is read, an output one that is written, RT_INOUT both. A scalar is
// a 32-bit integer that the library computes from the sizes.
typedef struct rt_argument {
  const char* name;
  rt_role role;
  rt_dtype dtype;
  const char* shape;  // formulas over sizes and constants, one a dimension: "batch, pixels, channels"; a scalar's value
} rt_argument;

// An image: an operator compiled for a data type, constants and an architecture. All of it is static and constant.
typedef struct rt_kernel {
  const char* name;    // unique; says all of the below
  const char* op;      // the operator, such as "group_norm"
  const char* symbol;  // the entry point in the cubin
  rt_dtype dtype;      // of the tensors whose format is the caller's choice
  int capability;      // compute capability, 90 for 9.0; runs on that and later ones of the same major version

  size_t size_count;
  const char* const* sizes;  // names, in the order in which a launch takes them
  const int64_t* fixed;      // a size: the only value that this image takes, or 0 for any

  size_t attribute_count, constant_count;
  const rt_constant* constants;  // attributes, which change the result, then tile sizes and the like, which do not

  size_t argument_count;
  const rt_argument* arguments;  // inputs, scalars, outputs

  unsigned threads;       // of a block
  unsigned shared_bytes;  // dynamic shared memory of a block
  unsigned registers;     // of a thread
  size_t cubin_bytes;
  const void* cubin;
} rt_kernel;

// The table of all images, sorted by name.
RT_API size_t rt_kernel_count(void);
// NULL from rt_kernel_count() on.
RT_API const rt_kernel* rt_kernel_at(size_t index);

// The best image for a GPU of `capability`: of those with this operator, data type and constants, whose fixed sizes are
// `sizes`, the one for the newest architecture that this GPU runs, and among these the one that was tuned for the sizes
// nearest to the given ones.
//
// constants  every attribute of the operator, in any order; tile sizes may be named, too, to force a variant
// sizes      in the order of rt_kernel.sizes
// found      receives the image, NULL on failure
RT_API rt_status rt_kernel_find(const char* op, rt_dtype dtype, int capability, const rt_constant* constants,
                                size_t constant_count, const int64_t* sizes, const rt_kernel** found);

// The driver and what has been loaded into it; create one a process.
typedef struct rt_kernels rt_kernels;

// Open the driver and start it. `driver` is the path of a stand-in for it, for tests; NULL for libcuda.so.1.
// `opened` receives a handle that the caller gives to rt_kernels_close(), NULL on failure.
RT_API rt_status rt_kernels_open(const char* driver, rt_kernels** opened);

// Unload all code, in every context, and close the driver. All launches must have finished. NULL is fine.
RT_API void rt_kernels_close(rt_kernels* kernels);

// Compute capability of the current context's GPU, 90 for 9.0.
RT_API rt_status rt_kernels_capability(rt_kernels* kernels, int* capability);

// Load an image into the current context now. The first launch does it otherwise, which takes time and which a stream
// that is being captured into a CUDA graph may forbid.
RT_API rt_status rt_kernel_load(rt_kernels* kernels, const rt_kernel* kernel);

// Enqueue a kernel.
//
// sizes     in the order of kernel->sizes
// pointers  device addresses of the tensors: kernel->arguments without the scalars, in that order
// stream    a CUstream or cudaStream_t of the current context; NULL for its default stream
RT_API rt_status rt_kernel_launch(rt_kernels* kernels, const rt_kernel* kernel, const int64_t* sizes,
                                  const void* const* pointers, void* stream);

// rt_kernel_find() for the current GPU, then rt_kernel_launch().
RT_API rt_status rt_launch(rt_kernels* kernels, const char* op, rt_dtype dtype, const rt_constant* constants,
                           size_t constant_count, const int64_t* sizes, const void* const* pointers, void* stream);

#ifdef __cplusplus
}
#endif

#endif
