// librt_kernels.so against a driver that only remembers, and against launches that Python worked out:
//     test_rt_kernels FAKE_DRIVER
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "fake_cuda.h"
#include "formula.h"
#include "rt_ops.h"

typedef struct expectation {
  const char* kernel;
  int64_t sizes[8];
  rt_status status;
  unsigned grid[3];
  int32_t scalars[8];
  bool tuned;  // the sizes of a workload of this image
} expectation;

#include "expectations.h"  // capabilities[] and expectations[], by tests/kernels/expectations.py

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static int failures;
static fake_cuda* fake;
static const char* fake_path;

#define CHECK(condition) check(condition, __LINE__, #condition, "")
#define CHECK_OF(condition, what) check(condition, __LINE__, #condition, what)
static void check(bool good, int line, const char* condition, const char* what) {
  if (good) return;
  fprintf(stderr, "%s:%d: failed: %s  %s\n", __FILE__, line, condition, what);
  ++failures;
}

// Device addresses that nobody reads.
static const void* const pointers[] = {
    (void*)0x1000, (void*)0x2000, (void*)0x3000, (void*)0x4000, (void*)0x5000, (void*)0x6000,
    (void*)0x7000, (void*)0x8000, (void*)0x9000, (void*)0xa000, (void*)0xb000, (void*)0xc000,
    (void*)0xd000, (void*)0xe000, (void*)0xf000, (void*)0x10000,
};

static rt_kernels* opened(void) {
  rt_kernels* kernels = NULL;
  CHECK(rt_kernels_open(fake_path, &kernels) == RT_OK && kernels);
  return kernels;
}

static const rt_kernel* by_name(const char* name) {
  for (size_t i = 0; i < rt_kernel_count(); ++i)
    if (strcmp(rt_kernel_at(i)->name, name) == 0) return rt_kernel_at(i);
  return NULL;
}

static const expectation* good_launch(const rt_kernel* kernel) {
  for (size_t i = 0; i < COUNT(expectations); ++i)
    if (expectations[i].status == RT_OK && (!kernel || strcmp(expectations[i].kernel, kernel->name) == 0))
      return &expectations[i];
  return NULL;
}

// As the fake driver must be told what a launch of `kernel` passes.
static void announce(const rt_kernel* kernel) {
  memset(fake->argument_bytes, 0, sizeof fake->argument_bytes);
  for (size_t i = 0; i < kernel->argument_count; ++i)
    fake->argument_bytes[i] = kernel->arguments[i].role == RT_SCALAR ? 4 : 8;
}

// The number of SM that the assembler wrote into the file.
static unsigned sm_version(const Elf64_Ehdr* elf) {
  return elf->e_ident[EI_ABIVERSION] >= 8 ? elf->e_flags >> 8 & 0xff : elf->e_flags & 0xff;
}

static void formulas_are_pythons(void) {
  bool fits = true;
  CHECK(add(2, 3, &fits) == 5 && subtract(2, 3, &fits) == -1 && multiply(-2, 3, &fits) == -6);
  CHECK(floor_divide(7, 2, &fits) == 3 && floor_divide(-7, 2, &fits) == -4 && floor_divide(7, -2, &fits) == -4);
  CHECK(cdiv(7, 2, &fits) == 4 && cdiv(8, 2, &fits) == 4 && cdiv(-7, 2, &fits) == -3 && cdiv(0, 5, &fits) == 0);
  CHECK(least(2, 3) == 2 && most(2, 3) == 3 && fits);
  CHECK((add(INT64_MAX, 1, &fits), !fits));
  CHECK((fits = true, subtract(INT64_MIN, 1, &fits), !fits));
  CHECK((fits = true, multiply(INT64_MAX, 2, &fits), !fits));
  CHECK((fits = true, floor_divide(1, 0, &fits), !fits));
  CHECK((fits = true, cdiv(INT64_MIN, -1, &fits), !fits));
}

static void the_table_is_sound(void) {
  CHECK(rt_kernel_count() > 0 && rt_kernel_at(rt_kernel_count()) == NULL);
  for (size_t i = 0; i < rt_kernel_count(); ++i) {
    const rt_kernel* kernel = rt_kernel_at(i);
    CHECK_OF(i == 0 || strcmp(rt_kernel_at(i - 1)->name, kernel->name) < 0, kernel->name);
    CHECK_OF(good_launch(kernel) != NULL, kernel->name);
    CHECK_OF(kernel->threads >= 32 && kernel->threads <= 1024 && kernel->threads % 32 == 0, kernel->name);
    CHECK_OF(kernel->attribute_count <= kernel->constant_count, kernel->name);

    Elf64_Ehdr elf;
    CHECK_OF(kernel->cubin_bytes > sizeof elf, kernel->name);
    memcpy(&elf, kernel->cubin, sizeof elf);
    CHECK_OF(memcmp(elf.e_ident, ELFMAG, SELFMAG) == 0 && elf.e_machine == EM_CUDA, kernel->name);
    CHECK_OF(sm_version(&elf) == (unsigned)kernel->capability, kernel->name);
    CHECK_OF(elf.e_shoff + (uint64_t)elf.e_shnum * elf.e_shentsize <= kernel->cubin_bytes, kernel->name);
    char section[256];
    snprintf(section, sizeof section, ".text.%s", kernel->symbol);
    CHECK_OF(memmem(kernel->cubin, kernel->cubin_bytes, section, strlen(section) + 1) != NULL, kernel->name);
  }
}

// An operator that is there for one GPU is there for all, by its attributes and sizes: tiles may be others.
static void every_image_exists_for_every_capability(void) {
  for (size_t i = 0; i < rt_kernel_count(); ++i)
    for (size_t c = 0; c < COUNT(capabilities); ++c) {
      const rt_kernel *kernel = rt_kernel_at(i), *found = NULL;
      const expectation* launch = good_launch(kernel);
      rt_status status = rt_kernel_find(kernel->op, kernel->dtype, capabilities[c], kernel->constants,
                                        kernel->attribute_count, launch->sizes, &found);
      CHECK_OF(status == RT_OK && found && found->capability == capabilities[c], kernel->name);
    }
}

static void launches_are_pythons(void) {
  rt_kernels* kernels = opened();
  for (size_t i = 0; i < COUNT(expectations); ++i) {
    const expectation* expected = &expectations[i];
    const rt_kernel* kernel = by_name(expected->kernel);
    CHECK_OF(kernel != NULL, expected->kernel);
    if (!kernel) continue;
    fake->capability = kernel->capability;
    announce(kernel);
    const int before = fake->launches;
    void* stream = (void*)(0x100 + i);
    const rt_status status = rt_kernel_launch(kernels, kernel, expected->sizes, pointers, stream);
    CHECK_OF(status == expected->status, kernel->name);
    CHECK_OF(fake->launches == before + (expected->status == RT_OK), kernel->name);
    if (expected->status != RT_OK) continue;
    CHECK_OF(fake->launched == kernel->cubin && fake->stream == stream, kernel->name);
    CHECK_OF(memcmp(fake->grid, expected->grid, sizeof fake->grid) == 0, kernel->name);
    CHECK_OF(fake->block[0] == kernel->threads && fake->block[1] == 1 && fake->block[2] == 1, kernel->name);
    CHECK_OF(fake->shared_bytes == kernel->shared_bytes, kernel->name);
    size_t pointer = 0, scalar = 0;
    for (size_t j = 0; j < kernel->argument_count; ++j)
      if (kernel->arguments[j].role == RT_SCALAR)
        CHECK_OF(fake->arguments[j] == (uint32_t)expected->scalars[scalar++], kernel->name);
      else
        CHECK_OF(fake->arguments[j] == (uint64_t)(uintptr_t)pointers[pointer++], kernel->name);
  }
  rt_kernels_close(kernels);
}

static void an_operator_picks_its_image(void) {
  rt_kernels* kernels = opened();
  fake->capability = capabilities[0];
  const int64_t sizes[] = {2, 4096, 320};
  const rt_constant constants[] = {{"silu", 1, NULL}, {"eps", 1e-5f, NULL}, {"groups", 32, NULL}};
  const rt_kernel* kernel;
  CHECK(rt_kernel_find("group_norm", RT_FLOAT16, capabilities[0], constants, 3, sizes, &kernel) == RT_OK);
  announce(kernel);
  CHECK(rt_group_norm(kernels, RT_FLOAT16, 2, 4096, 320, 32, 1e-5, true, pointers[0], pointers[1], pointers[2],
                      pointers[3], (void*)0x5000, NULL) == RT_OK);
  CHECK(fake->launched == kernel->cubin && fake->stream == NULL);
  const uint64_t arguments[] = {0x1000, 0x2000, 0x3000, 0x4000, 4096, 320, 0x5000};
  CHECK(memcmp(fake->arguments, arguments, sizeof arguments) == 0);
  CHECK(fake->grid[0] == 64 && fake->grid[1] == 1 && fake->grid[2] == 1);
  rt_kernels_close(kernels);
}

// A cubin runs on later GPUs of the same major version; the newest is taken.
static void later_gpus_run_older_images(void) {
  const expectation* launch = good_launch(NULL);
  const rt_kernel *kernel = by_name(launch->kernel), *found;
  for (int gpu = 10; gpu < 300; ++gpu) {
    int newest = 0;
    for (size_t c = 0; c < COUNT(capabilities); ++c)
      if (capabilities[c] / 10 == gpu / 10 && capabilities[c] <= gpu && capabilities[c] > newest)
        newest = capabilities[c];
    const rt_status status = rt_kernel_find(kernel->op, kernel->dtype, gpu, kernel->constants,
                                            kernel->attribute_count, launch->sizes, &found);
    CHECK(status == (newest ? RT_OK : RT_NO_CAPABILITY));
    CHECK(newest ? found && found->capability == newest : !found);
  }
}

// The same operator, attributes and architecture, but tuned for other sizes.
static void the_nearest_sizes_win(void) {
  for (size_t i = 0; i < COUNT(expectations); ++i) {
    const expectation* own = &expectations[i];
    if (own->status != RT_OK || !own->tuned) continue;
    const rt_kernel *kernel = by_name(own->kernel), *found = NULL;
    CHECK_OF(rt_kernel_find(kernel->op, kernel->dtype, kernel->capability, kernel->constants,
                            kernel->attribute_count, own->sizes, &found) == RT_OK && found == kernel, kernel->name);
  }
}

static void code_is_loaded_once(void) {
  const rt_kernel* kernel = by_name(good_launch(NULL)->kernel);
  const int64_t* sizes = good_launch(NULL)->sizes;
  memset(fake, 0, sizeof *fake);
  fake->capability = kernel->capability;
  rt_kernels* kernels = opened();
  CHECK(fake->loads == 0);
  CHECK(rt_kernel_load(kernels, kernel) == RT_OK && fake->loads == 1 && fake->gets == 1 && fake->launches == 0);
  CHECK(fake->code == kernel->cubin && strcmp(fake->symbol, kernel->symbol) == 0);
  for (int i = 0; i < 3; ++i) CHECK(rt_kernel_launch(kernels, kernel, sizes, pointers, NULL) == RT_OK);
  CHECK(fake->loads == 1 && fake->launches == 3 && fake->unloads == 0);
  rt_kernels_close(kernels);
  CHECK(fake->unloads == 1);
}

typedef struct shared_work {
  rt_kernels* kernels;
  const expectation* launch;
} shared_work;

static void* launch_often(void* argument) {
  const shared_work* work = argument;
  const rt_kernel* kernel = by_name(work->launch->kernel);
  for (int i = 0; i < 100; ++i)
    if (rt_kernel_launch(work->kernels, kernel, work->launch->sizes, pointers, NULL) != RT_OK) return argument;
  return NULL;
}

static void threads_share_a_handle(void) {
  memset(fake, 0, sizeof *fake);
  shared_work work = {opened(), good_launch(NULL)};
  fake->capability = by_name(work.launch->kernel)->capability;
  pthread_t threads[8];
  for (size_t i = 0; i < COUNT(threads); ++i) CHECK(pthread_create(&threads[i], NULL, launch_often, &work) == 0);
  for (size_t i = 0; i < COUNT(threads); ++i) {
    void* failed;
    CHECK(pthread_join(threads[i], &failed) == 0 && !failed);
  }
  CHECK(fake->loads == 1 && fake->launches == 100 * (int)COUNT(threads));
  rt_kernels_close(work.kernels);
}

static void much_shared_memory_is_asked_for_on_each_device(void) {
  size_t large = 0;
  for (size_t i = 0; i < rt_kernel_count(); ++i) {
    const rt_kernel* kernel = rt_kernel_at(i);
    const int asks = kernel->shared_bytes > 48 * 1024;
    large += (size_t)asks;
    memset(fake, 0, sizeof *fake);
    fake->capability = kernel->capability;
    rt_kernels* kernels = opened();
    for (int repeat = 0; repeat < 2; ++repeat)
      for (fake->device = 0; fake->device < 2; ++fake->device) {
        CHECK_OF(rt_kernel_load(kernels, kernel) == RT_OK, kernel->name);
        CHECK_OF(!asks || fake->attribute_value == (int)kernel->shared_bytes, kernel->name);
      }
    CHECK_OF(fake->attributes == 2 * asks && fake->loads == 1, kernel->name);
    fake->device = 64;  // more than the library keeps account of: it asks each time
    for (int repeat = 0; repeat < 2; ++repeat) CHECK_OF(rt_kernel_load(kernels, kernel) == RT_OK, kernel->name);
    CHECK_OF(fake->attributes == 4 * asks && fake->attribute_device == 64 * asks, kernel->name);
    rt_kernels_close(kernels);
  }
  CHECK(large > 0);
}

static void every_status_has_a_sentence(void) {
  for (int status = RT_OK; status <= RT_OUT_OF_MEMORY; ++status)
    for (int other = RT_OK; other < status; ++other)
      CHECK(strcmp(rt_status_string((rt_status)status), rt_status_string((rt_status)other)) != 0);
  CHECK(strcmp(rt_status_string((rt_status)-1), rt_status_string((rt_status)1000)) == 0);
}

static void opening_fails_with_a_reason(void) {
  rt_kernels* kernels = (rt_kernels*)fake;
  CHECK(rt_kernels_open("/nowhere/libcuda.so.1", &kernels) == RT_NO_DRIVER && kernels == NULL);
  CHECK(rt_kernels_open("libm.so.6", &kernels) == RT_NO_DRIVER && kernels == NULL);  // without the functions
  CHECK(rt_kernels_open(fake_path, NULL) == RT_NULL_POINTER);
  fake->failing = "cuInit", fake->result = 100;
  CHECK(rt_kernels_open(fake_path, &kernels) == RT_NO_DEVICE && kernels == NULL && rt_driver_error() == 100);
  fake->failing = NULL;
  rt_kernels_close(NULL);
}

static void finding_fails_with_a_reason(void) {
  const int64_t sizes[] = {2, 4096, 320};
  const rt_constant constants[] = {{"groups", 32, NULL}, {"eps", 1e-5, NULL}, {"silu", 1, NULL}};
  const int own = capabilities[0];
  const rt_kernel* found;
#define FIND(op, dtype, capability, constants, count, sizes) \
  (found = rt_kernel_at(0), rt_kernel_find(op, dtype, capability, constants, count, sizes, &found))
  CHECK(FIND("group_norm", RT_FLOAT16, own, constants, 3, sizes) == RT_OK && found);
  CHECK(FIND("group_norn", RT_FLOAT16, own, constants, 3, sizes) == RT_NO_OPERATOR && !found);
  CHECK(FIND("group_norm", RT_UINT8, own, constants, 3, sizes) == RT_NO_DTYPE && !found);
  CHECK(FIND("group_norm", (rt_dtype)99, own, constants, 3, sizes) == RT_NO_DTYPE && !found);
  CHECK(FIND("group_norm", RT_FLOAT16, own, constants, 2, sizes) == RT_NO_CONSTANTS && !found);  // one is missing
  CHECK(FIND("group_norm", RT_FLOAT16, own, NULL, 0, sizes) == RT_NO_CONSTANTS && !found);
  for (size_t i = 0; i < 3; ++i) {
    rt_constant changed[] = {constants[0], constants[1], constants[2], {"colour", 1, NULL}};
    CHECK(FIND("group_norm", RT_FLOAT16, own, changed, 4, sizes) == RT_NO_CONSTANTS && !found);
    changed[i].number = 12345;
    CHECK(FIND("group_norm", RT_FLOAT16, own, changed, 3, sizes) == RT_NO_CONSTANTS && !found);
    changed[i] = (rt_constant){constants[i].name, constants[i].number, "text"};
    CHECK(FIND("group_norm", RT_FLOAT16, own, changed, 3, sizes) == RT_NO_CONSTANTS && !found);
    changed[i].name = NULL;
    CHECK(FIND("group_norm", RT_FLOAT16, own, changed, 3, sizes) == RT_NO_CONSTANTS && !found);
    for (int j = 0; j < 3; ++j) {
      static const int64_t wrong[] = {0, -1, INT64_C(1) << 31};
      int64_t bad[] = {sizes[0], sizes[1], sizes[2]};
      bad[i] = wrong[j];
      CHECK(FIND("group_norm", RT_FLOAT16, own, constants, 3, bad) == RT_BAD_SIZE && !found);
    }
  }
  const int64_t other_channels[] = {2, 4096, 321};
  CHECK(FIND("group_norm", RT_FLOAT16, own, constants, 3, other_channels) == RT_BAD_SIZE && !found);
  CHECK(FIND("group_norm", RT_FLOAT16, 70, constants, 3, sizes) == RT_NO_CAPABILITY && !found);
  CHECK(FIND("group_norm", RT_FLOAT16, 990, constants, 3, sizes) == RT_NO_CAPABILITY && !found);
  CHECK(FIND(NULL, RT_FLOAT16, own, constants, 3, sizes) == RT_NULL_POINTER && !found);
  CHECK(FIND("group_norm", RT_FLOAT16, own, NULL, 3, sizes) == RT_NULL_POINTER && !found);
  CHECK(FIND("group_norm", RT_FLOAT16, own, constants, 3, NULL) == RT_NULL_POINTER && !found);
  CHECK(rt_kernel_find("group_norm", RT_FLOAT16, own, constants, 3, sizes, NULL) == RT_NULL_POINTER);
#undef FIND
}

static void launching_fails_with_a_reason(void) {
  const expectation* good = good_launch(NULL);
  const rt_kernel* kernel = by_name(good->kernel);
  memset(fake, 0, sizeof *fake);
  fake->capability = kernel->capability;
  rt_kernels* kernels = opened();
#define LAUNCH(kernel, sizes, pointers) rt_kernel_launch(kernels, kernel, sizes, pointers, NULL)
  CHECK(rt_kernel_launch(NULL, kernel, good->sizes, pointers, NULL) == RT_NULL_POINTER);
  CHECK(LAUNCH(NULL, good->sizes, pointers) == RT_NULL_POINTER);
  CHECK(LAUNCH(kernel, NULL, pointers) == RT_NULL_POINTER);
  CHECK(LAUNCH(kernel, good->sizes, NULL) == RT_NULL_POINTER);
  CHECK(rt_kernel_load(NULL, kernel) == RT_NULL_POINTER && rt_kernel_load(kernels, NULL) == RT_NULL_POINTER);
  const rt_kernel copy = *kernel;  // not from the table
  CHECK(LAUNCH(&copy, good->sizes, pointers) == RT_NO_OPERATOR);
  CHECK(rt_kernel_load(kernels, &copy) == RT_NO_OPERATOR);
  CHECK(rt_kernel_load(kernels, (const rt_kernel*)((const char*)kernel + 8)) == RT_NO_OPERATOR);

  size_t tensors = 0;
  for (size_t i = 0; i < kernel->argument_count; ++i) tensors += kernel->arguments[i].role != RT_SCALAR;
  for (size_t i = 0; i < tensors; ++i) {
    const void* changed[COUNT(pointers)];
    memcpy(changed, pointers, sizeof pointers);
    changed[i] = NULL;
    CHECK(LAUNCH(kernel, good->sizes, changed) == RT_NULL_POINTER);
    changed[i] = (const char*)pointers[i] + 8;
    CHECK(LAUNCH(kernel, good->sizes, changed) == RT_MISALIGNED);
  }

  int capability;
  CHECK(rt_kernels_capability(kernels, &capability) == RT_OK && capability == kernel->capability);
  CHECK(rt_kernels_capability(NULL, &capability) == RT_NULL_POINTER);
  CHECK(rt_kernels_capability(kernels, NULL) == RT_NULL_POINTER);
  fake->capability = 75;
  CHECK(LAUNCH(kernel, good->sizes, pointers) == RT_NO_CAPABILITY);
  CHECK(rt_kernel_load(kernels, kernel) == RT_NO_CAPABILITY);
  fake->capability = kernel->capability;
  CHECK(fake->loads == 0 && fake->launches == 0);

  // In the order in which they are called: each leaves what came before in place.
  const struct { const char* function; rt_status status; } broken[] = {
      {"cuCtxGetDevice", RT_NO_CONTEXT},      {"cuDeviceGetAttribute", RT_NO_DEVICE},
      {"cuLibraryLoadData", RT_LOAD_FAILED},  {"cuLibraryGetKernel", RT_LOAD_FAILED},
      {"cuLaunchKernel", RT_LAUNCH_FAILED},   {"cuKernelGetFunction", RT_LOAD_FAILED},
  };
  for (size_t i = 0; i < COUNT(broken); ++i) {
    fake->failing = broken[i].function, fake->result = 200 + (int)i;
    const bool loading = broken[i].function == broken[5].function;
    const rt_status status = loading ? rt_kernel_load(kernels, kernel) : LAUNCH(kernel, good->sizes, pointers);
    CHECK_OF(status == broken[i].status && rt_driver_error() == fake->result, broken[i].function);
  }
  fake->failing = NULL;
  CHECK(LAUNCH(kernel, good->sizes, pointers) == RT_OK && fake->loads == 1 && fake->launches == 1);
  rt_kernels_close(kernels);

  for (size_t i = 0; i < rt_kernel_count(); ++i) {
    const rt_kernel* large = rt_kernel_at(i);
    if (large->shared_bytes <= 48 * 1024) continue;
    fake->capability = large->capability;
    kernels = opened();
    fake->failing = "cuKernelSetAttribute", fake->result = 1;
    CHECK_OF(rt_kernel_load(kernels, large) == RT_LOAD_FAILED && rt_driver_error() == 1, large->name);
    fake->failing = NULL;
    CHECK_OF(rt_kernel_load(kernels, large) == RT_OK, large->name);
    rt_kernels_close(kernels);
  }
#undef LAUNCH
}

static void an_operator_fails_with_a_reason(void) {
  memset(fake, 0, sizeof *fake);
  fake->capability = capabilities[0];
  rt_kernels* kernels = opened();
#define NORM(kernels, dtype, pixels, channels, eps, y)                                                        \
  rt_group_norm(kernels, dtype, 2, pixels, channels, 32, eps, true, pointers[0], pointers[1], pointers[2],    \
                pointers[3], y, NULL)
  void* y = (void*)0x5000;
  CHECK(NORM(kernels, RT_FLOAT16, 4096, 320, 1e-5, y) == RT_OK);
  CHECK(NORM(NULL, RT_FLOAT16, 4096, 320, 1e-5, y) == RT_NULL_POINTER);
  CHECK(NORM(kernels, RT_INT32, 4096, 320, 1e-5, y) == RT_NO_DTYPE);
  CHECK(NORM(kernels, RT_FLOAT16, 0, 320, 1e-5, y) == RT_BAD_SIZE);
  CHECK(NORM(kernels, RT_FLOAT16, 4096, 324, 1e-5, y) == RT_BAD_SIZE);
  CHECK(NORM(kernels, RT_FLOAT16, 4096, 320, 1e-4, y) == RT_NO_CONSTANTS);
  CHECK(NORM(kernels, RT_FLOAT16, 4096, 320, 1e-5, NULL) == RT_NULL_POINTER);
  fake->capability = 60;
  CHECK(NORM(kernels, RT_FLOAT16, 4096, 320, 1e-5, y) == RT_NO_CAPABILITY);
  fake->failing = "cuCtxGetDevice", fake->result = 201;
  CHECK(NORM(kernels, RT_FLOAT16, 4096, 320, 1e-5, y) == RT_NO_CONTEXT && rt_driver_error() == 201);
  CHECK(fake->launches == 1);
  rt_kernels_close(kernels);
#undef NORM
}

int main(int count, char** arguments) {
  if (count != 2) return fprintf(stderr, "usage: %s FAKE_DRIVER\n", arguments[0]), 2;
  fake_path = arguments[1];
  void* library = dlopen(fake_path, RTLD_NOW | RTLD_LOCAL);
  fake = library ? dlsym(library, "fake") : NULL;
  if (!fake) return fprintf(stderr, "%s\n", dlerror()), 2;

  formulas_are_pythons();
  the_table_is_sound();
  if (!failures) {  // the others rely on the table
    every_image_exists_for_every_capability();
    launches_are_pythons();
    an_operator_picks_its_image();
    later_gpus_run_older_images();
    the_nearest_sizes_win();
    code_is_loaded_once();
    threads_share_a_handle();
    much_shared_memory_is_asked_for_on_each_device();
    every_status_has_a_sentence();
    opening_fails_with_a_reason();
    finding_fails_with_a_reason();
    launching_fails_with_a_reason();
    an_operator_fails_with_a_reason();
  }
  printf("%zu kernels, %zu launches, %d failures\n", rt_kernel_count(), COUNT(expectations), failures);
  dlclose(library);
  return failures != 0;
}
