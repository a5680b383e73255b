// What `rt.kernels.library` generates (table.c) and rt_kernels.c reads.
#pragma once

#include "rt_kernels.h"

// The launch of one operator: its 32-bit integer arguments and its grid. False where a value does not fit 64 bits.
typedef bool rt_plan(const int64_t* sizes, const rt_constant* constants, int64_t* scalars, int64_t grid[3]);

typedef struct rt_image {
  rt_kernel kernel;  // first: the public part has the same address
  rt_plan* plan;
  size_t tuned_count;
  const int64_t* tuned;  // the sizes of each workload that it was compiled for, one after the other
} rt_image;

extern const rt_image rt_images[];
extern const size_t rt_image_count;

// No kernel takes more arguments.
enum { RT_MOST_ARGUMENTS = 32 };
