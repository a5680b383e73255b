// rt_kernels.c on a table made for it: constants that are texts, and launches beyond 32 and 64 bits.
//     test_limits FAKE_DRIVER
#include <stdio.h>

#include "driver.h"
#include "formula.h"
#include "table.h"

// Both scalar and grid are a product of three sizes.
static bool plan(const int64_t* sizes, const rt_constant* constants, int64_t* scalars, int64_t grid[3]) {
  (void)constants;
  bool fits = true;
  scalars[0] = multiply(multiply(sizes[0], sizes[1], &fits), sizes[2], &fits);
  grid[0] = 1, grid[1] = 1, grid[2] = 1;
  return fits;
}

static const char* const names[] = {"a", "b", "c"};
static const int64_t any[] = {0, 0, 0};
static const int64_t tuned[] = {1, 1, 1};
static const rt_constant relu[] = {{"activation", 0, "relu"}}, silu[] = {{"activation", 0, "silu"}};
static const rt_argument arguments[] = {{"count", RT_SCALAR, RT_INT32, "a * b * c"}, {"y", RT_OUTPUT, RT_FLOAT16, "a"}};

#define IMAGE(called, with)                                                                                  \
  {.kernel = {.name = called, .op = "op", .symbol = "op", .dtype = RT_FLOAT16, .capability = 90,             \
              .size_count = 3, .sizes = names, .fixed = any, .attribute_count = 1, .constant_count = 1,      \
              .constants = with, .argument_count = 2, .arguments = arguments, .threads = 32, .cubin = with}, \
   .plan = plan, .tuned_count = 1, .tuned = tuned}
const rt_image rt_images[] = {IMAGE("relu", relu), IMAGE("silu", silu)};
const size_t rt_image_count = 2;

static int failures;

#define CHECK(condition)                                                             \
  if (!(condition)) {                                                                \
    fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);          \
    ++failures;                                                                      \
  }

int main(int count, char** paths) {
  const int64_t ones[] = {1, 1, 1};
  const rt_kernel* found;
  const rt_constant number = {"activation", 0, NULL}, other = {"activation", 0, "gelu"};
  CHECK(rt_kernel_find("op", RT_FLOAT16, 90, relu, 1, ones, &found) == RT_OK && found == rt_kernel_at(0));
  CHECK(rt_kernel_find("op", RT_FLOAT16, 90, silu, 1, ones, &found) == RT_OK && found == rt_kernel_at(1));
  CHECK(rt_kernel_find("op", RT_FLOAT16, 90, &number, 1, ones, &found) == RT_NO_CONSTANTS);
  CHECK(rt_kernel_find("op", RT_FLOAT16, 90, &other, 1, ones, &found) == RT_NO_CONSTANTS);

  rt_kernels* kernels = NULL;
  CHECK(count == 2 && rt_kernels_open(paths[1], &kernels) == RT_OK);
  if (!kernels) return 1;
  const void* const pointers[] = {(void*)0x1000};
  // The size checks come before the driver is asked, and this one knows no GPU of 9.0.
  static const struct { int64_t sizes[3]; rt_status status; } launches[] = {
      {{1, 1, 1}, RT_NO_CAPABILITY},
      {{INT32_MAX, 1, 1}, RT_NO_CAPABILITY},
      {{INT32_MAX, 2, 1}, RT_BAD_SIZE},                  // beyond 32 bits
      {{INT32_MAX, INT32_MAX, 1}, RT_BAD_SIZE},          // in 64 bits
      {{INT32_MAX, INT32_MAX, INT32_MAX}, RT_BAD_SIZE},  // beyond them
      {{INT32_MAX, 1 << 30, 8}, RT_BAD_SIZE},            // and what is left of the product would be negative
      {{1 << 30, 1 << 30, 1 << 30}, RT_BAD_SIZE},        // or 0
  };
  for (size_t i = 0; i < sizeof launches / sizeof launches[0]; ++i)
    CHECK(rt_kernel_launch(kernels, rt_kernel_at(0), launches[i].sizes, pointers, NULL) == launches[i].status);
  rt_kernels_close(kernels);
  return failures != 0;
}
