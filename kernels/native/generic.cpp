// Plain C++, compiled once for any processor and once with AVX2 (RT_SET names the table). Also what the others are
// tested against: sums in double, no tricks.
#include "kernels.h"
#include "parallel.h"

#include <algorithm>
#include <cmath>

namespace rt {
namespace {

void attention(const Attention& shape, const bf16* q, const bf16* k, const bf16* v, bf16* out) {
  const auto [batch, queries, keys, heads, width] = shape;
  const std::size_t row = heads * width;
  const float scale = 1.0f / std::sqrt(float(width));
  parallel(batch * heads, [&, queries = queries, keys = keys, heads = heads, width = width](std::size_t item) {
    const std::size_t b = item / heads, offset = item % heads * width;
    std::vector<float> key(keys * width), value(keys * width), query(width), logits(keys), sum(width);
    for (std::size_t j = 0; j < keys; ++j)
      for (std::size_t c = 0; c < width; ++c) {
        key[j * width + c] = to_float(k[(b * keys + j) * row + offset + c]);
        value[j * width + c] = to_float(v[(b * keys + j) * row + offset + c]);
      }
    for (std::size_t i = 0; i < queries; ++i) {
      for (std::size_t c = 0; c < width; ++c) query[c] = to_float(q[(b * queries + i) * row + offset + c]) * scale;
      float largest = -INFINITY;
      for (std::size_t j = 0; j < keys; ++j) {
        float dot = 0;
        for (std::size_t c = 0; c < width; ++c) dot += query[c] * key[j * width + c];
        logits[j] = dot;
        largest = std::max(largest, dot);
      }
      float total = 0;
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (std::size_t j = 0; j < keys; ++j) {
        const float weight = std::exp(logits[j] - largest);
        total += weight;
        for (std::size_t c = 0; c < width; ++c) sum[c] += weight * value[j * width + c];
      }
      for (std::size_t c = 0; c < width; ++c)
        out[(b * queries + i) * row + offset + c] = to_bf16(sum[c] / total);
    }
  });
}

void group_norm(const GroupNorm& shape, const bf16* x, const float* scale, const float* shift, bf16* out) {
  const std::size_t pixels = shape.pixels, channels = shape.channels, size = channels / shape.groups;
  parallel(shape.batch * shape.groups, [&](std::size_t item) {
    const std::size_t start = item / shape.groups * pixels * channels, first = item % shape.groups * size;
    double sum = 0, squares = 0;
    for (std::size_t p = 0; p < pixels; ++p)
      for (std::size_t c = first; c < first + size; ++c) sum += to_float(x[start + p * channels + c]);
    const double mean = sum / double(pixels * size);
    for (std::size_t p = 0; p < pixels; ++p)
      for (std::size_t c = first; c < first + size; ++c) {
        const double distance = to_float(x[start + p * channels + c]) - mean;
        squares += distance * distance;
      }
    const double factor = 1.0 / std::sqrt(squares / double(pixels * size) + double(shape.epsilon));
    for (std::size_t p = 0; p < pixels; ++p)
      for (std::size_t c = first; c < first + size; ++c) {
        const std::size_t at = start + p * channels + c;
        float y = float((to_float(x[at]) - mean) * factor) * scale[c] + shift[c];
        if (shape.silu) y /= 1.0f + std::exp(-y);
        out[at] = to_bf16(y);
      }
  });
}

void geglu(std::size_t rows, std::size_t width, const bf16* x, bf16* out) {
  parallel(rows, [=](std::size_t row) {
    for (std::size_t c = 0; c < width; ++c) {
      const float value = to_float(x[row * 2 * width + c]), gate = to_float(x[(row * 2 + 1) * width + c]);
      out[row * width + c] = to_bf16(value * 0.5f * gate * (1.0f + std::erf(gate * float(M_SQRT1_2))));
    }
  });
}

// (3, 3, in, out), so that the innermost loop runs along what is stored side by side.
PackedFilter pack(std::size_t in, std::size_t out, const bf16* weight) {
  PackedFilter filter;
  filter.wide.resize(9 * in * out);
  for (std::size_t o = 0; o < out; ++o)
    for (std::size_t i = 0; i < in; ++i)
      for (std::size_t tap = 0; tap < 9; ++tap)
        filter.wide[(tap * in + i) * out + o] = to_float(weight[(o * in + i) * 9 + tap]);
  return filter;
}

void convolve(const Convolution& shape, const bf16* x, const PackedFilter& filter, const float* bias, bf16* out) {
  const std::size_t height = shape.height, width = shape.width;
  parallel(shape.batch * height, [&](std::size_t item) {
    const std::size_t b = item / height, i = item % height;
    std::vector<float> sum(shape.out);
    for (std::size_t j = 0; j < width; ++j) {
      std::copy(bias, bias + shape.out, sum.begin());
      for (std::size_t tap = 0; tap < 9; ++tap) {
        const std::size_t y = i + tap / 3 - 1, z = j + tap % 3 - 1;  // below zero wraps around to far above
        if (y >= height || z >= width) continue;
        const bf16* pixel = x + ((b * height + y) * width + z) * shape.in;
        for (std::size_t c = 0; c < shape.in; ++c) {
          const float value = to_float(pixel[c]);
          const float* row = &filter.wide[(tap * shape.in + c) * shape.out];
          for (std::size_t o = 0; o < shape.out; ++o) sum[o] += value * row[o];
        }
      }
      bf16* result = out + ((b * height + i) * width + j) * shape.out;
      for (std::size_t o = 0; o < shape.out; ++o) result[o] = to_bf16(sum[o]);
    }
  });
}

}  // namespace

#define RT_TEXT(name) #name
#define RT_NAME(name) RT_TEXT(name)
const Kernels RT_SET{RT_NAME(RT_SET), attention, group_norm, geglu, pack, convolve};

}  // namespace rt
