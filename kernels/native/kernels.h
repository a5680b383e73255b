// The CPU kernels: bf16 in and out, sums in fp32. Tensors are dense, channels last.
//
// Every function exists once an instruction set; `kernels()` gives the best that this processor has.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace rt {

using bf16 = std::uint16_t;  // the upper half of a float

// softmax(q kᵀ / √d) v for each of `heads` heads of width d, side by side in the last axis.
// q, out (batch, queries, heads · d); k, v (batch, keys, heads · d).
struct Attention {
  std::size_t batch, queries, keys, heads, width;
};

// GroupNorm over (pixels, channels / groups), scaled and shifted a channel, then SiLU if asked for.
// x, out (batch, pixels, channels); scale, shift (channels).
struct GroupNorm {
  std::size_t batch, pixels, channels, groups;
  float epsilon;
  bool silu;
};

// 3 × 3, stride 1, zeros around. x (batch, height, width, in); out (batch, height, width, out).
struct Convolution {
  std::size_t batch, height, width, in, out;
};

// Weights in the order in which one instruction set reads them.
struct PackedFilter {
  std::vector<float> wide;
  std::vector<bf16> half;
};

struct Kernels {
  const char* name;
  void (*attention)(const Attention&, const bf16* q, const bf16* k, const bf16* v, bf16* out);
  void (*group_norm)(const GroupNorm&, const bf16* x, const float* scale, const float* shift, bf16* out);
  // x (rows, 2 · width) → out (rows, width) = x[:, :width] · gelu(x[:, width:]), gelu by the error function.
  void (*geglu)(std::size_t rows, std::size_t width, const bf16* x, bf16* out);
  // weight (out, in, 3, 3) as ONNX has it; `in` a multiple of 32, `out` of 16.
  PackedFilter (*pack)(std::size_t in, std::size_t out, const bf16* weight);
  void (*convolve)(const Convolution&, const bf16* x, const PackedFilter&, const float* bias, bf16* out);
};

extern const Kernels portable, avx2, avx512;

// Every set that this processor can run, the best last.
std::vector<const Kernels*> available();
// The best, or the one that the environment variable RT_ISA names; throws std::runtime_error for one that is missing.
const Kernels& kernels();

inline float to_float(bf16 value) {
  std::uint32_t bits = std::uint32_t(value) << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof result);
  return result;
}

// Round to nearest, ties to even; NaN stays NaN.
inline bf16 to_bf16(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16((bits >> 16) | 0x40);
  return bf16((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

}  // namespace rt
