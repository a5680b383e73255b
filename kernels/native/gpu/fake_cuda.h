// A CUDA driver for tests: it does nothing, fails where it is told to, and remembers what it was asked for.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "driver.h"

typedef struct fake_cuda {
  // What it pretends.
  const char* failing;      // this function returns `result`
  CUresult result;
  CUdevice device;          // of the current context
  int capability;           // of every device
  size_t argument_bytes[32];  // what the next launch passes: 4 or 8 bytes an argument, then 0

  // What it saw; tests clear it.
  int loads, unloads, gets, launches;
  const void* code;         // loaded last
  const char* symbol;       // asked for last
  int attributes;           // calls of cuKernelSetAttribute
  int attribute_value;
  CUdevice attribute_device;
  const void* launched;     // code of the kernel that was launched last
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  uint64_t arguments[32];
} fake_cuda;
