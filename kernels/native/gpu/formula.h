// Whole-number formulas (rt/expression.py) in C: the results of Python, or `fits` turns false for what 64 bits cannot hold.
#pragma once

#include <stdbool.h>
#include <stdint.h>

static inline int64_t add(int64_t a, int64_t b, bool* fits) {
  int64_t sum;
  if (__builtin_add_overflow(a, b, &sum)) *fits = false;
  return sum;
}

static inline int64_t subtract(int64_t a, int64_t b, bool* fits) {
  int64_t difference;
  if (__builtin_sub_overflow(a, b, &difference)) *fits = false;
  return difference;
}

static inline int64_t multiply(int64_t a, int64_t b, bool* fits) {
  int64_t product;
  if (__builtin_mul_overflow(a, b, &product)) *fits = false;
  return product;
}

// The quotient rounded down; C rounds to zero.
static inline int64_t floor_divide(int64_t a, int64_t b, bool* fits) {
  if (b == 0 || (a == INT64_MIN && b == -1)) return *fits = false;
  return a / b - (a % b != 0 && (a < 0) != (b < 0));
}

// The quotient rounded up.
static inline int64_t cdiv(int64_t a, int64_t b, bool* fits) {
  const int64_t quotient = floor_divide(a, b, fits);
  return *fits ? quotient + (a % b != 0) : 0;
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
