// Flash attention (Dao et al., https://arxiv.org/abs/2205.14135) for AVX-512 with bf16 products.
//
// Six queries at a time meet the keys in blocks; the running maximum and sum of the softmax, and the output so far, stay
// in the first-level cache. Keys and values of a head are packed once into the order of the products.
#include "avx512.h"
#include "parallel.h"

#include <algorithm>
#include <cmath>

namespace rt::avx512_kernels {
namespace {

constexpr std::size_t kBlock = 256;      // keys a block: 6 · 256 logits are 6 KiB
constexpr std::size_t kQueries = 1024;   // of one item of work; packing is repeated for each

std::size_t rounded(std::size_t value, std::size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// (pairs of channels, keys, 2), keys padded with zeros.
void pack_keys(const bf16* k, std::size_t stride, std::size_t keys, std::size_t width, std::size_t padded, bf16* packed) {
  for (std::size_t j = 0; j < padded; ++j)
    for (std::size_t pair = 0; pair < (width + 1) / 2; ++pair)
      for (std::size_t half = 0; half < 2; ++half) {
        const std::size_t c = 2 * pair + half;
        packed[(pair * padded + j) * 2 + half] = j < keys && c < width ? k[j * stride + c] : bf16(0);
      }
}

// (pairs of keys, channels, 2), channels padded to whole vectors.
void pack_values(const bf16* v, std::size_t stride, std::size_t keys, std::size_t width, std::size_t padded,
                 std::size_t columns, bf16* packed) {
  for (std::size_t j = 0; j < padded; ++j)
    for (std::size_t c = 0; c < columns; ++c)
      packed[(j / 2 * columns + c) * 2 + j % 2] = j < keys && c < width ? v[j * stride + c] : bf16(0);
}

}  // namespace

void attention(const Attention& shape, const bf16* q, const bf16* k, const bf16* v, bf16* out) {
  const std::size_t batch = shape.batch, queries = shape.queries, keys = shape.keys, heads = shape.heads,
                    width = shape.width;
  const std::size_t stride = heads * width, pairs = (width + 1) / 2, padded = rounded(keys, 64),
                    columns = rounded(width, 16), vectors = columns / 16;
  const std::size_t chunks = (queries + kQueries - 1) / kQueries;
  // Columns of the output in equal parts of at most four vectors.
  const std::size_t parts = (vectors + 3) / 4;
  const float scale = 1.4426950408889634f / std::sqrt(float(width));  // log2(e): weights are powers of two

  parallel(batch * heads * chunks, [&](std::size_t item) {
    thread_local std::vector<bf16> key_buffer, value_buffer, weight_buffer, query_buffer;
    thread_local std::vector<float> logit_buffer, sum_buffer;
    const std::size_t b = item / (heads * chunks), offset = item / chunks % heads * width;
    bf16* packed_keys = scratch(key_buffer, 2 * pairs * padded);
    bf16* packed_values = scratch(value_buffer, padded * columns);
    bf16* weights = scratch(weight_buffer, kRows * kBlock);
    bf16* query = scratch(query_buffer, kRows * 2 * pairs);
    float* logits = scratch(logit_buffer, kRows * kBlock);
    float* sums = scratch(sum_buffer, kRows * columns);
    pack_keys(k + b * keys * stride + offset, stride, keys, width, padded, packed_keys);
    pack_values(v + b * keys * stride + offset, stride, keys, width, padded, columns, packed_values);

    const std::size_t begin = item % chunks * kQueries, end = std::min(queries, begin + kQueries);
    for (std::size_t i = begin; i < end; i += kRows) {
      const int rows = int(std::min<std::size_t>(kRows, end - i));
      const bf16* from = q + (b * queries + i) * stride + offset;
      std::size_t query_stride = stride;
      if (width % 2) {  // a last channel without a partner needs a zero beside it
        for (int r = 0; r < rows; ++r) {
          std::copy(from + r * stride, from + r * stride + width, query + r * 2 * pairs);
          query[r * 2 * pairs + width] = 0;
        }
        from = query, query_stride = 2 * pairs;
      }
      float largest[kRows], total[kRows];
      std::fill(largest, largest + kRows, -INFINITY);
      std::fill(total, total + kRows, 0.0f);
      for (std::size_t j = 0; j < padded; j += kBlock) {
        const std::size_t block = std::min(kBlock, padded - j);
        for (std::size_t n = 0; n < block; n += 64)
          product_rows<4, false>(rows, pairs, from, query_stride, packed_keys + (j + n) * 2, padded, logits + n, kBlock);
        for (int r = 0; r < rows; ++r) {
          float* row = logits + r * kBlock;
          for (std::size_t n = keys - j; j + block > keys && n < block; ++n) row[n] = -INFINITY;
          __m512 most = _mm512_loadu_ps(row);
          for (std::size_t n = 16; n < block; n += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(row + n));
          const float before = largest[r];
          const float now = std::max(before, _mm512_reduce_max_ps(most) * scale);
          const __m512 factor = _mm512_set1_ps(scale), minus = _mm512_set1_ps(-now);
          __m512 sum0 = _mm512_setzero_ps(), sum1 = _mm512_setzero_ps();
          for (std::size_t n = 0; n < block; n += 32) {
            const __m512 low = exp2_coarse(_mm512_fmadd_ps(_mm512_loadu_ps(row + n), factor, minus));
            const __m512 high = exp2_coarse(_mm512_fmadd_ps(_mm512_loadu_ps(row + n + 16), factor, minus));
            sum0 = _mm512_add_ps(sum0, low), sum1 = _mm512_add_ps(sum1, high);
            _mm512_storeu_si512(weights + r * kBlock + n, (__m512i)_mm512_cvtne2ps_pbh(high, low));
          }
          const float decay = std::exp2(before - now);  // 0 at the first block
          total[r] = total[r] * decay + _mm512_reduce_add_ps(_mm512_add_ps(sum0, sum1));
          largest[r] = now;
          if (j > 0 && decay != 1.0f)
            for (std::size_t c = 0; c < columns; c += 16)
              _mm512_storeu_ps(sums + r * columns + c,
                               _mm512_mul_ps(_mm512_loadu_ps(sums + r * columns + c), _mm512_set1_ps(decay)));
        }
        for (std::size_t part = 0; part < parts; ++part) {
          const std::size_t start = part * vectors / parts, stop = (part + 1) * vectors / parts;
          const bf16* values = packed_values + (j / 2 * columns + 16 * start) * 2;
          const auto run = j == 0 ? product_any<false> : product_any<true>;
          run(rows, int(stop - start), block / 2, weights, kBlock, values, columns, sums + 16 * start, columns);
        }
      }
      for (int r = 0; r < rows; ++r) {
        const __m512 inverse = _mm512_set1_ps(1.0f / total[r]);
        for (std::size_t c = 0; c < width; c += 16)
          store(out + (b * queries + i + r) * stride + offset + c,
                _mm512_mul_ps(_mm512_loadu_ps(sums + r * columns + c), inverse), first(width - c));
      }
    }
  });
}

}  // namespace rt::avx512_kernels
