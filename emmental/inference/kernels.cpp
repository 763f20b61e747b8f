// Products, attention and LayerNorm of a pruned BERT on a CPU.
//
// Activations are feature-major, in tiles of T = 16 or 32 tokens: [tiles][features][T] float32,
// aligned to 64 bytes. A row of a sparse matrix is then a sum of a few contiguous rows of T tokens,
// held in registers, and a tile of 768 features (96 KB) stays in the L2 cache while all rows of the
// matrix pass. Nothing is ever transposed. Vector types of GCC and Clang, no intrinsics, no
// assembly: any architecture.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <algorithm>
#include <vector>

namespace {

constexpr int LANES = 16;  // floats of a vector: one register of AVX-512, two of AVX2, four of NEON
typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));

struct alignas(64) Line { float values[16]; };

constexpr int BLOCK = 8;   // rows that a dense product computes at once: 8 x 2 accumulators
constexpr int CHUNK = 64;  // rows that a thread takes at once, a multiple of BLOCK

inline Vec splat(float value) { return value - Vec{}; }

inline Vec exp(Vec x) {  // Cephes: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2], 2 ulp
  x = x < -87.0f ? splat(-87.0f) : x;
  x = x > 88.0f ? splat(88.0f) : x;
  const Vec scaled = x * 1.44269504088896341f;
  const IntVec n = __builtin_convertvector(scaled + (scaled < 0.0f ? splat(-0.5f) : splat(0.5f)), IntVec);
  const Vec whole = __builtin_convertvector(n, Vec);
  x = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * x + 1.3981999507e-3f;
  p = p * x + 8.3334519073e-3f;
  p = p * x + 4.1665795894e-2f;
  p = p * x + 1.6666665459e-1f;
  p = p * x + 5.0000001201e-1f;
  p = p * x * x + x + 1.0f;
  return p * (Vec)((n + 127) << 23);
}

inline Vec gelu(Vec x) {  // x Phi(x); erf by Abramowitz and Stegun 7.1.26, absolute error 1.5e-7
  const Vec z = (x < 0.0f ? -x : x) * 0.70710678118654752f;
  const Vec t = 1.0f / (z * 0.3275911f + 1.0f);
  Vec p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Vec tail = p * t * exp(-z * z) * 0.5f;  // 1 - Phi(|x|)
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

// sums[r][i] += sum_k weights[r * row_step + k * step] * x[k][i], for R rows and V vectors.
template <int R, int V>
inline void accumulate(Vec (&sums)[R][V], const float* weights, int64_t row_step, int64_t step, const Vec* x, int64_t n) {
  for (int64_t k = 0; k < n; ++k, x += V, weights += step)
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < V; ++i) sums[r][i] += weights[r * row_step] * x[i];
}

template <int V>
struct Kernels {
  static constexpr int T = LANES * V;

  static void finish(Vec (&sums)[V], const Vec* residual, Vec* y, bool activate) {
    for (int i = 0; i < V; ++i) {
      if (residual) sums[i] += residual[i];
      y[i] = activate ? gelu(sums[i]) : sums[i];
    }
  }

  static void sparse_rows(const int32_t* starts, const uint16_t* columns, const float* values, const float* bias,
                          const Vec* x, const Vec* residual, Vec* y, int64_t first, int64_t last, bool activate) {
    for (int64_t row = first; row < last; ++row) {
      Vec even[V], odd[V];  // two chains, because each addition waits for the previous one
      for (int i = 0; i < V; ++i) even[i] = splat(bias[row]), odd[i] = Vec{};
      int32_t k = starts[row];
      const int32_t end = starts[row + 1];
      for (; k + 1 < end; k += 2) {
        const Vec *a = x + columns[k] * V, *b = x + columns[k + 1] * V;
        for (int i = 0; i < V; ++i) even[i] += values[k] * a[i], odd[i] += values[k + 1] * b[i];
      }
      if (k < end)
        for (int i = 0; i < V; ++i) even[i] += values[k] * x[columns[k] * V + i];
      for (int i = 0; i < V; ++i) even[i] += odd[i];
      finish(even, residual ? residual + row * V : nullptr, y + row * V, activate);
    }
  }

  static void dense_rows(int64_t width, const float* values, const float* bias, const Vec* x, const Vec* residual,
                         Vec* y, int64_t first, int64_t last, bool activate) {
    int64_t row = first;
    for (; row + BLOCK <= last; row += BLOCK) {
      Vec sums[BLOCK][V];
      for (int r = 0; r < BLOCK; ++r)
        for (int i = 0; i < V; ++i) sums[r][i] = splat(bias[row + r]);
      accumulate(sums, values + row * width, width, 1, x, width);
      for (int r = 0; r < BLOCK; ++r)
        finish(sums[r], residual ? residual + (row + r) * V : nullptr, y + (row + r) * V, activate);
    }
    for (; row < last; ++row) {
      Vec sums[1][V];
      for (int i = 0; i < V; ++i) sums[0][i] = splat(bias[row]);
      accumulate(sums, values + row * width, width, 1, x, width);
      finish(sums[0], residual ? residual + row * V : nullptr, y + row * V, activate);
    }
  }

  static void layer_norm(Vec* x, const float* weight, const float* bias, float epsilon, int64_t features, int i) {
    Vec mean{}, variance{};
    for (int64_t f = 0; f < features; ++f) mean += x[f * V + i];
    mean /= (float)features;
    for (int64_t f = 0; f < features; ++f) {
      const Vec off = x[f * V + i] - mean;
      variance += off * off;
    }
    Vec scale{};
    for (int lane = 0; lane < LANES; ++lane) scale[lane] = 1.0f / std::sqrt(variance[lane] / features + epsilon);
    for (int64_t f = 0; f < features; ++f) x[f * V + i] = (x[f * V + i] - mean) * scale * weight[f] + bias[f];
  }
};

// `count` tokens of one sequence that are neighbours in one tile. token: the first. place: its
// position among the visible tokens of the sequence.
struct Run { int64_t token, count, place; };

// Runs of the tokens first..first + count of a sequence that starts at token `origin`, without those
// that `mask` hides. Returns the number of tokens.
int64_t find_runs(std::vector<Run>& runs, int64_t origin, int64_t first, int64_t count, int64_t T, const uint8_t* mask) {
  runs.clear();
  int64_t place = 0;
  for (int64_t i = first; i < first + count; ++i) {
    if (mask && !mask[i]) continue;
    const int64_t token = origin + i;
    if (!runs.empty() && token % T && runs.back().token + runs.back().count == token) ++runs.back().count;
    else runs.push_back({token, 1, place});
    ++place;
  }
  return place;
}

template <int T>
void gather(float* to, int64_t width, const float* from, int64_t row, int64_t rows, int64_t features, const std::vector<Run>& runs) {
  for (const Run& run : runs) {
    const float* source = from + (run.token / T * features + row) * T + run.token % T;
    for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * width + run.place, source + r * T, run.count * sizeof(float));
  }
}

template <int V>
void attend(const float* qkv, float* out, int64_t features, int64_t out_features, int64_t row_q, int64_t row_k, int64_t row_v,
            int64_t row_out, int64_t size, int64_t size_v, int64_t origin, int64_t length, const uint8_t* mask, float scale) {
  constexpr int T = LANES * V;
  static thread_local std::vector<Line> memory;
  static thread_local std::vector<Run> runs;
  const int64_t keys = find_runs(runs, origin, 0, length, T, mask);
  const int64_t padded = (keys + LANES - 1) / LANES * LANES;
  const int64_t wide_v = (size_v + BLOCK - 1) / BLOCK * BLOCK;
  if (!keys) {  // like torch: without keys the context is zero
    find_runs(runs, origin, 0, length, T, nullptr);
    for (const Run& run : runs)
      for (int64_t r = 0; r < size_v; ++r)
        std::memset(out + (run.token / T * out_features + row_out + r) * T + run.token % T, 0, run.count * sizeof(float));
    return;
  }
  memory.resize((size_t)((size + wide_v) * padded + (size + padded + wide_v) * T) / LANES + 1);
  float *k = memory[0].values, *v = k + size * padded, *q = v + wide_v * padded, *p = q + size * T, *o = p + padded * T;
  std::memset(k, 0, (size + wide_v) * padded * sizeof(float));
  gather<T>(k, padded, qkv, row_k, size, features, runs);
  gather<T>(v, padded, qkv, row_v, size_v, features, runs);
  for (int64_t first = 0; first < length; first += T) {
    const int64_t count = std::min<int64_t>(T, length - first);
    find_runs(runs, origin, first, count, T, nullptr);
    if (count < T) std::memset(q, 0, size * T * sizeof(float));
    gather<T>(q, T, qkv, row_q, size, features, runs);
    Vec highest[V], total[V];  // a lane is a query, so that softmax needs no sum across lanes
    for (int i = 0; i < V; ++i) highest[i] = splat(-INFINITY), total[i] = Vec{};
    Vec* scores = (Vec*)p;
    for (int64_t key = 0; key < padded; key += BLOCK) {
      Vec sums[BLOCK][V] = {};
      accumulate(sums, k + key, 1, padded, (const Vec*)q, size);
      for (int r = 0; r < BLOCK; ++r)
        for (int i = 0; i < V; ++i) {
          const Vec score = sums[r][i] * scale;
          scores[(key + r) * V + i] = score;
          if (key + r < keys) highest[i] = score > highest[i] ? score : highest[i];
        }
    }
    for (int64_t key = 0; key < keys; ++key)
      for (int i = 0; i < V; ++i) {
        scores[key * V + i] = exp(scores[key * V + i] - highest[i]);
        total[i] += scores[key * V + i];
      }
    for (int64_t row = 0; row < wide_v; row += BLOCK) {
      Vec sums[BLOCK][V] = {};
      accumulate(sums, v + row * padded, padded, 1, scores, keys);
      for (int r = 0; r < BLOCK; ++r)
        for (int i = 0; i < V; ++i) ((Vec*)o)[(row + r) * V + i] = sums[r][i] / total[i];
    }
    for (const Run& run : runs) {
      float* target = out + (run.token / T * out_features + row_out) * T + run.token % T;
      for (int64_t r = 0; r < size_v; ++r) std::memcpy(target + r * T, o + r * T + run.place, run.count * sizeof(float));
    }
  }
}

}  // namespace

extern "C" {

// rows x columns. CSR if `starts` is not null; otherwise `values` has all entries, row by row.
struct Matrix {
  int64_t rows, columns;
  const int32_t* starts;
  const uint16_t* indices;
  const float* values;
  const float* bias;
};

// y = activation(W x + bias + residual). x [tiles][columns][T]; y and residual (or null)
// [tiles][rows][T].
void product(const Matrix* w, const float* x, const float* residual, float* y, int64_t tiles, int64_t T, int activate, int threads) {
  const int64_t chunks = (w->rows + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t item = 0; item < tiles * chunks; ++item) {
    const int64_t tile = item / chunks, first = item % chunks * CHUNK, last = std::min(w->rows, first + CHUNK);
    const Vec* from = (const Vec*)(x + tile * w->columns * T);
    const Vec* add = residual ? (const Vec*)(residual + tile * w->rows * T) : nullptr;
    Vec* to = (Vec*)(y + tile * w->rows * T);
    if (w->starts) {
      auto rows = T == 2 * LANES ? Kernels<2>::sparse_rows : Kernels<1>::sparse_rows;
      rows(w->starts, w->indices, w->values, w->bias, from, add, to, first, last, activate);
    } else {
      auto rows = T == 2 * LANES ? Kernels<2>::dense_rows : Kernels<1>::dense_rows;
      rows(w->columns, w->values, w->bias, from, add, to, first, last, activate);
    }
  }
}

// LayerNorm over the features of x [tiles][features][T], in place.
void layer_norm(float* x, const float* weight, const float* bias, double epsilon, int64_t features, int64_t tiles, int64_t T, int threads) {
  const int64_t vectors = T / LANES;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t item = 0; item < tiles * vectors; ++item) {
    Vec* from = (Vec*)(x + item / vectors * features * T);
    if (vectors == 2) Kernels<2>::layer_norm(from, weight, bias, epsilon, features, item % 2);
    else Kernels<1>::layer_norm(from, weight, bias, epsilon, features, 0);
  }
}

// Softmax attention. qkv [tiles][2 * sum of sizes + sum of sizes_v][T] holds queries, keys and
// values, each head by head; out [tiles][sum of sizes_v][T]. sizes, sizes_v: rows of keys and of
// values per head. mask: null, or batch x length with 0 for hidden keys.
void attention(const float* qkv, float* out, int64_t heads, const int32_t* sizes, const int32_t* sizes_v, int64_t batch, int64_t length,
               const uint8_t* mask, double scale, int64_t T, int threads) {
  std::vector<int64_t> start(heads + 1, 0), start_v(heads + 1, 0);
  for (int64_t h = 0; h < heads; ++h) start[h + 1] = start[h] + sizes[h], start_v[h + 1] = start_v[h] + sizes_v[h];
  const int64_t rows = start[heads], rows_v = start_v[heads];
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t item = 0; item < batch * heads; ++item) {
    const int64_t b = item / heads, h = item % heads;
    auto one = T == 2 * LANES ? attend<2> : attend<1>;
    one(qkv, out, 2 * rows + rows_v, rows_v, start[h], rows + start[h], 2 * rows + start_v[h], start_v[h], sizes[h], sizes_v[h],
        b * length, length, mask ? mask + b * length : nullptr, scale);
  }
}

}  // extern "C"
