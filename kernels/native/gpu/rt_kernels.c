// librt_kernels.so: finds images in the table, loads them into the driver and launches them.
//
// Images are loaded as CUlibrary, which belongs to no context: the driver brings the code into each context where it is
// used and drops it with the context, so there is nothing to go stale here.
#include "rt_kernels.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "driver.h"
#include "table.h"

typedef struct loaded {
  CUlibrary library;
  CUkernel kernel;
  uint64_t devices;  // a bit a device (the first 64) that has been told the kernel's shared memory
} loaded;

struct rt_kernels {
  void* driver;
#define DECLARE(name, parameters) CUresult(*name) parameters;
  RT_DRIVER_FUNCTIONS(DECLARE)
#undef DECLARE
  pthread_mutex_t lock;  // of `images`
  loaded images[];       // one an image of the table; all zero until it is loaded
};

static _Thread_local int driver_error;

int rt_driver_error(void) { return driver_error; }

// `otherwise` unless the driver agreed.
static rt_status check(CUresult result, rt_status otherwise) {
  if (result == CUDA_SUCCESS) return RT_OK;
  driver_error = result;
  return otherwise;
}

const char* rt_status_string(rt_status status) {
  switch (status) {
    case RT_OK: return "no error";
    case RT_NO_DRIVER: return "libcuda.so.1 is missing or older than CUDA 12; install NVIDIA's driver, 525 or later";
    case RT_NO_DEVICE: return "the CUDA driver found no GPU";
    case RT_NO_CONTEXT: return "no CUDA context is current on this thread; create one, or call cudaFree(0)";
    case RT_NO_OPERATOR: return "no operator of this name; rt_kernel_at() lists what there is";
    case RT_NO_DTYPE: return "the operator is not compiled for this data type";
    case RT_NO_CONSTANTS: return "the operator is not compiled for these constants, or an attribute is missing";
    case RT_NO_CAPABILITY: return "the operator is not compiled for this GPU's compute capability";
    case RT_BAD_SIZE: return "a size is below 1, too large, or not one that the kernel was compiled for";
    case RT_NULL_POINTER: return "an argument is NULL";
    case RT_MISALIGNED: return "a tensor does not start at a multiple of 16 bytes";
    case RT_LOAD_FAILED: return "the CUDA driver could not load the kernel; rt_driver_error() has its code";
    case RT_LAUNCH_FAILED: return "the CUDA driver could not launch the kernel; rt_driver_error() has its code";
    case RT_OUT_OF_MEMORY: return "out of host memory";
  }
  return "not a status of this library";
}

size_t rt_kernel_count(void) { return rt_image_count; }

const rt_kernel* rt_kernel_at(size_t index) { return index < rt_image_count ? &rt_images[index].kernel : NULL; }

static bool same(const rt_constant* a, const rt_constant* b) {
  if (a->text && b->text) return strcmp(a->text, b->text) == 0;
  return !a->text && !b->text && (float)a->number == (float)b->number;
}

static const rt_constant* named(const char* name, const rt_constant* constants, size_t count) {
  for (const rt_constant* constant = constants; constant != constants + count; ++constant)
    if (constant->name && strcmp(constant->name, name) == 0) return constant;
  return NULL;
}

// Every given constant is this kernel's, and every attribute is given.
static bool agrees(const rt_kernel* kernel, const rt_constant* given, size_t count) {
  size_t attributes = 0;
  for (const rt_constant* constant = given; constant != given + count; ++constant) {
    const rt_constant* own =
        constant->name ? named(constant->name, kernel->constants, kernel->constant_count) : NULL;
    if (!own || !same(own, constant)) return false;
  }
  for (; attributes < kernel->attribute_count; ++attributes)
    if (!named(kernel->constants[attributes].name, given, count)) return false;
  return true;
}

static bool takes(const rt_kernel* kernel, const int64_t* sizes) {
  for (size_t i = 0; i < kernel->size_count; ++i)
    if (sizes[i] < 1 || sizes[i] > INT32_MAX || (kernel->fixed[i] && sizes[i] != kernel->fixed[i])) return false;
  return true;
}

// A cubin holds for one major version, upwards.
static bool runs_on(const rt_kernel* kernel, int capability) {
  return capability / 10 == kernel->capability / 10 && capability >= kernel->capability;
}

// The product of the ratios of sizes, at least 1, for the nearest workload.
static double distance(const rt_image* image, const int64_t* sizes) {
  const size_t count = image->kernel.size_count;
  double nearest = 0;
  for (size_t workload = 0; workload < image->tuned_count; ++workload) {
    const int64_t* tuned = image->tuned + workload * count;
    double ratio = 1;
    for (size_t i = 0; i < count; ++i)
      ratio *= sizes[i] > tuned[i] ? (double)sizes[i] / (double)tuned[i] : (double)tuned[i] / (double)sizes[i];
    if (workload == 0 || ratio < nearest) nearest = ratio;
  }
  return nearest;
}

rt_status rt_kernel_find(const char* op, rt_dtype dtype, int capability, const rt_constant* constants,
                         size_t constant_count, const int64_t* sizes, const rt_kernel** found) {
  if (!found) return RT_NULL_POINTER;
  *found = NULL;
  if (!op || !sizes || (!constants && constant_count)) return RT_NULL_POINTER;
  // The closest call says what is wrong: of the statuses in the order of the tests, the last one reached.
  rt_status status = RT_NO_OPERATOR;
  double nearest = 0;
  for (const rt_image* image = rt_images; image != rt_images + rt_image_count; ++image) {
    const rt_kernel* kernel = &image->kernel;
    if (strcmp(kernel->op, op) != 0) continue;
    rt_status miss = RT_OK;
    if (kernel->dtype != dtype) miss = RT_NO_DTYPE;
    else if (!agrees(kernel, constants, constant_count)) miss = RT_NO_CONSTANTS;
    else if (!takes(kernel, sizes)) miss = RT_BAD_SIZE;
    else if (!runs_on(kernel, capability)) miss = RT_NO_CAPABILITY;
    if (miss != RT_OK) {
      static const int reached[] = {
          [RT_NO_OPERATOR] = 0, [RT_NO_DTYPE] = 1, [RT_NO_CONSTANTS] = 2, [RT_BAD_SIZE] = 3, [RT_NO_CAPABILITY] = 4};
      if (!*found && reached[miss] > reached[status]) status = miss;
      continue;
    }
    const double own = distance(image, sizes);
    if (!*found || kernel->capability > (*found)->capability ||
        (kernel->capability == (*found)->capability && own < nearest)) {
      *found = kernel;
      nearest = own;
    }
  }
  return *found ? RT_OK : status;
}

rt_status rt_kernels_open(const char* driver, rt_kernels** opened) {
  if (!opened) return RT_NULL_POINTER;
  *opened = NULL;
  rt_kernels* kernels = calloc(1, sizeof *kernels + rt_image_count * sizeof kernels->images[0]);
  if (!kernels) return RT_OUT_OF_MEMORY;
  rt_status status = RT_OK;
  kernels->driver = dlopen(driver ? driver : "libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!kernels->driver) status = RT_NO_DRIVER;
#define RESOLVE(name, parameters)                                          \
  if (status == RT_OK) {                                                   \
    *(void**)(&kernels->name) = dlsym(kernels->driver, #name);             \
    if (!kernels->name) status = RT_NO_DRIVER;                             \
  }
  RT_DRIVER_FUNCTIONS(RESOLVE)
#undef RESOLVE
  if (status == RT_OK) status = check(kernels->cuInit(0), RT_NO_DEVICE);
  if (status != RT_OK) {
    if (kernels->driver) dlclose(kernels->driver);
    free(kernels);
    return status;
  }
  pthread_mutex_init(&kernels->lock, NULL);
  *opened = kernels;
  return RT_OK;
}

void rt_kernels_close(rt_kernels* kernels) {
  if (!kernels) return;
  for (size_t i = 0; i < rt_image_count; ++i)
    if (kernels->images[i].library) kernels->cuLibraryUnload(kernels->images[i].library);
  pthread_mutex_destroy(&kernels->lock);
  dlclose(kernels->driver);
  free(kernels);
}

static rt_status current(rt_kernels* kernels, CUdevice* device, int* capability) {
  int major = 0, minor = 0;
  rt_status status = check(kernels->cuCtxGetDevice(device), RT_NO_CONTEXT);
  if (status == RT_OK)
    status = check(kernels->cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, *device),
                   RT_NO_DEVICE);
  if (status == RT_OK)
    status = check(kernels->cuDeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, *device),
                   RT_NO_DEVICE);
  *capability = 10 * major + minor;
  return status;
}

rt_status rt_kernels_capability(rt_kernels* kernels, int* capability) {
  if (!kernels || !capability) return RT_NULL_POINTER;
  CUdevice device;
  return current(kernels, &device, capability);
}

// NULL for what does not point into the table.
static const rt_image* image_of(const rt_kernel* kernel) {
  const uintptr_t offset = (uintptr_t)kernel - (uintptr_t)rt_images;
  const bool inside = offset < rt_image_count * sizeof(rt_image) && offset % sizeof(rt_image) == 0;
  return inside ? &rt_images[offset / sizeof(rt_image)] : NULL;
}

// With the lock held. What is half done stays, and is taken up by the next call.
static rt_status load_locked(rt_kernels* kernels, const rt_kernel* kernel, loaded* entry, CUdevice device) {
  rt_status status = RT_OK;
  if (!entry->library)
    status = check(kernels->cuLibraryLoadData(&entry->library, kernel->cubin, NULL, NULL, 0, NULL, NULL, 0),
                   RT_LOAD_FAILED);
  if (status == RT_OK && !entry->kernel)
    status = check(kernels->cuLibraryGetKernel(&entry->kernel, entry->library, kernel->symbol), RT_LOAD_FAILED);
  const uint64_t bit = device >= 0 && device < 64 ? UINT64_C(1) << device : 0;
  if (status == RT_OK && !(entry->devices & bit)) {
    // Beyond 48 KiB a kernel must ask; the attribute is kept a device.
    if (kernel->shared_bytes > 48 * 1024)
      status = check(kernels->cuKernelSetAttribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                                   (int)kernel->shared_bytes, entry->kernel, device),
                     RT_LOAD_FAILED);
    if (status == RT_OK) entry->devices |= bit;
  }
  return status;
}

// The kernel, ready for the current GPU.
static rt_status load(rt_kernels* kernels, const rt_image* image, CUkernel* kernel) {
  CUdevice device;
  int capability;
  rt_status status = current(kernels, &device, &capability);
  if (status != RT_OK) return status;
  if (!runs_on(&image->kernel, capability)) return RT_NO_CAPABILITY;
  loaded* entry = &kernels->images[image - rt_images];
  pthread_mutex_lock(&kernels->lock);
  status = load_locked(kernels, &image->kernel, entry, device);
  *kernel = entry->kernel;
  pthread_mutex_unlock(&kernels->lock);
  return status;
}

rt_status rt_kernel_load(rt_kernels* kernels, const rt_kernel* kernel) {
  if (!kernels || !kernel) return RT_NULL_POINTER;
  const rt_image* image = image_of(kernel);
  if (!image) return RT_NO_OPERATOR;
  CUkernel entry;
  CUfunction function;  // asking for it brings the code into the context
  const rt_status status = load(kernels, image, &entry);
  return status == RT_OK ? check(kernels->cuKernelGetFunction(&function, entry), RT_LOAD_FAILED) : status;
}

rt_status rt_kernel_launch(rt_kernels* kernels, const rt_kernel* kernel, const int64_t* sizes,
                           const void* const* pointers, void* stream) {
  if (!kernels || !kernel || !sizes || !pointers) return RT_NULL_POINTER;
  const rt_image* image = image_of(kernel);
  if (!image) return RT_NO_OPERATOR;
  if (!takes(kernel, sizes)) return RT_BAD_SIZE;

  int64_t scalars[RT_MOST_ARGUMENTS], grid[3];
  if (!image->plan(sizes, kernel->constants, scalars, grid)) return RT_BAD_SIZE;
  for (int axis = 0; axis < 3; ++axis)
    if (grid[axis] < 1 || grid[axis] > (axis == 0 ? INT32_MAX : UINT16_MAX)) return RT_BAD_SIZE;

  int32_t integers[RT_MOST_ARGUMENTS];
  const void* addresses[RT_MOST_ARGUMENTS];
  void* arguments[RT_MOST_ARGUMENTS];
  size_t scalar = 0, pointer = 0;
  for (size_t i = 0; i < kernel->argument_count; ++i) {
    if (kernel->arguments[i].role == RT_SCALAR) {
      if (scalars[scalar] < INT32_MIN || scalars[scalar] > INT32_MAX) return RT_BAD_SIZE;
      integers[scalar] = (int32_t)scalars[scalar];
      arguments[i] = &integers[scalar++];
    } else {
      if (!pointers[pointer]) return RT_NULL_POINTER;
      if ((uintptr_t)pointers[pointer] % 16) return RT_MISALIGNED;
      addresses[pointer] = pointers[pointer];
      arguments[i] = &addresses[pointer++];
    }
  }

  CUkernel entry;
  const rt_status status = load(kernels, image, &entry);
  if (status != RT_OK) return status;
  // cuLaunchKernel takes a CUkernel in place of a CUfunction and runs it in the current context.
  return check(kernels->cuLaunchKernel((CUfunction)entry, (unsigned)grid[0], (unsigned)grid[1], (unsigned)grid[2],
                                       kernel->threads, 1, 1, kernel->shared_bytes, stream, arguments, NULL),
               RT_LAUNCH_FAILED);
}

rt_status rt_launch(rt_kernels* kernels, const char* op, rt_dtype dtype, const rt_constant* constants,
                    size_t constant_count, const int64_t* sizes, const void* const* pointers, void* stream) {
  int capability;
  const rt_kernel* kernel;
  rt_status status = rt_kernels_capability(kernels, &capability);
  if (status == RT_OK)
    status = rt_kernel_find(op, dtype, capability, constants, constant_count, sizes, &kernel);
  return status == RT_OK ? rt_kernel_launch(kernels, kernel, sizes, pointers, stream) : status;
}
