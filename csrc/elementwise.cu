// The elementwise operations: renoise (with noise read or drawn in the kernel), the guided Euler step, and the products of
// their and the losses' backward passes.

#include <algorithm>

#include "common.cuh"

namespace dpdmd {
namespace {

constexpr int kThreads = 256;
constexpr int kBatch = 2;  // vectors a thread

// Philox4x32-10 (Salmon et al., 2011): four random words for a counter and a key.
__device__ uint4 philox(uint64_t counter, uint64_t key) {
  uint4 c = {uint32_t(counter), uint32_t(counter >> 32), 0, 0};
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53u, c.x), low0 = 0xD2511F53u * c.x;
    const uint32_t high1 = __umulhi(0xCD9E8D57u, c.z), low1 = 0xCD9E8D57u * c.z;
    c = {high1 ^ c.y ^ k0, low1, high0 ^ c.w ^ k1, low0};
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return c;
}

// Two standard normal numbers from two words (Box and Muller, 1958).
__device__ float2 normal(uint32_t first, uint32_t second) {
  // The hardware's sine and cosine are right to 4e-7 on [-pi, pi], so the angle is shifted by pi. With the exact ones,
  // drawing the noise would be slower than reading it.
  const float radius = sqrtf(-2 * logf((float(first) + 0.5f) * 0x1p-32f));
  float sine, cosine;
  __sincosf(float(M_PI) * (float(second) * 0x1p-31f - 1), &sine, &cosine);
  return {-radius * cosine, -radius * sine};
}

// Elements [first, first + V) of the noise of `key`.
template <int V> __device__ void draw(float (&y)[V], uint64_t first, uint64_t key) {
  if constexpr (V % 4 == 0) {
#pragma unroll
    for (int j = 0; j < V; j += 4) {
      const uint4 words = philox(first / 4 + j / 4, key);
      const float2 one = normal(words.x, words.y), other = normal(words.z, words.w);
      y[j] = one.x, y[j + 1] = one.y, y[j + 2] = other.x, y[j + 3] = other.y;
    }
  } else {
    static_assert(V == 1);
    const uint4 words = philox(first / 4, key);
    const float2 pair = first % 4 < 2 ? normal(words.x, words.y) : normal(words.z, words.w);
    y[0] = first % 2 ? pair.y : pair.x;
  }
}

// Each operation says what it reads and what it writes at vector i of a sample. T: the dtype of its first tensor and of
// the result; U: that of the others.
template <typename T, typename U, int V> struct RenoiseOp {
  using Arguments = Renoise;
  struct Inputs {
    Pack<T, V> x;
    Pack<U, V> noise;
  };
  const Renoise& p;
  int64_t sample;
  float sigma, alpha;

  __device__ RenoiseOp(const Renoise& p, int64_t sample)
      : p(p), sample(sample), sigma(value_of(p.sigma, sample)), alpha(p.flow ? 1 - sigma : value_of(p.alpha, sample)) {}
  __device__ void read(Inputs& in, int64_t i) const {
    in.x = load<T, V>(sample_of<T>(p.x, sample), i);
    if (p.noise.data) in.noise = load<U, V>(sample_of<U>(p.noise, sample), i);
  }
  __device__ void write(const Inputs& in, int64_t i) const {
    float x[V], noise[V];
    in.x.widen(x);
    if (p.noise.data)
      in.noise.widen(noise);
    else
      draw<V>(noise, uint64_t(sample * p.shape.size + i * V), p.key);
#pragma unroll
    for (int j = 0; j < V; ++j) x[j] = alpha * x[j] + sigma * noise[j];
    store<T, V>(sample_of<T>(p.result, sample), i, x);
  }
};

template <typename T, typename U, int V> struct GuidedEulerStepOp {
  using Arguments = GuidedEulerStep;
  struct Inputs {
    Pack<T, V> x;
    Pack<U, V> v, uncond;
  };
  const GuidedEulerStep& p;
  int64_t sample;
  float step;

  __device__ GuidedEulerStepOp(const GuidedEulerStep& p, int64_t sample)
      : p(p), sample(sample), step(value_of(p.t_next, sample) - value_of(p.t, sample)) {}
  __device__ void read(Inputs& in, int64_t i) const {
    in.x = load<T, V>(sample_of<T>(p.x, sample), i);
    in.v = load<U, V>(sample_of<U>(p.v, sample), i);
    if (p.uncond.data) in.uncond = load<U, V>(sample_of<U>(p.uncond, sample), i);
  }
  __device__ void write(const Inputs& in, int64_t i) const {
    float x[V], v[V];
    in.x.widen(x);
    in.v.widen(v);
    if (p.uncond.data) {
      float uncond[V];
      in.uncond.widen(uncond);
#pragma unroll
      for (int j = 0; j < V; ++j) v[j] = uncond[j] + p.guidance_scale * (v[j] - uncond[j]);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) x[j] += step * v[j];
    store<T, V>(sample_of<T>(p.result, sample), i, x);
  }
};

// T: the result's dtype; U: the input's.
template <typename T, typename U, int V> struct MultiplyOp {
  using Arguments = Multiply;
  using Inputs = Pack<U, V>;
  const Multiply& p;
  int64_t sample;
  float factor;

  __device__ MultiplyOp(const Multiply& p, int64_t sample)
      : p(p), sample(sample), factor((value_of(p.to, sample) - value_of(p.from, sample)) * p.factor) {}
  __device__ void read(Inputs& in, int64_t i) const { in = load<U, V>(sample_of<U>(p.y, sample), i); }
  __device__ void write(const Inputs& in, int64_t i) const {
    float y[V];
    in.widen(y);
#pragma unroll
    for (int j = 0; j < V; ++j) y[j] *= factor;
    store<T, V>(sample_of<T>(p.result, sample), i, y);
  }
};

template <typename Op>
__device__ void run_tile(const Op& op, int64_t tile, int64_t vectors) {
  const int64_t first = tile * kThreads * kBatch + threadIdx.x;
  typename Op::Inputs in[kBatch];
#pragma unroll
  for (int k = 0; k < kBatch; ++k)
    if (first + k * kThreads < vectors) op.read(in[k], first + k * kThreads);
#pragma unroll
  for (int k = 0; k < kBatch; ++k)
    if (first + k * kThreads < vectors) op.write(in[k], first + k * kThreads);
}

template <template <typename, typename, int> class Op, typename T, typename U, int V>
__global__ void __launch_bounds__(kThreads)
    elementwise_kernel(const __grid_constant__ typename Op<T, U, V>::Arguments p, int64_t tiles) {
  run_tile(Op<T, U, V>(p, blockIdx.x / tiles), blockIdx.x % tiles, p.shape.size / V);
}

int64_t tiles_of(const Shape& shape) {
  return ceil_div(shape.size, (shape.vectors ? kWidth : 1) * kThreads * kBatch);
}

template <template <typename, typename, int> class Op, typename Arguments>
void launch_elementwise(const Arguments& p, Dtype first, Dtype others, void* stream) {
  const int64_t tiles = tiles_of(p.shape);
  for_dtype(first, p.shape.vectors, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int V = decltype(type)::width;
    auto run = [&](auto* kernel) {
      kernel<<<unsigned(p.shape.batch * tiles), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, tiles);
    };
    switch (others) {
      case Dtype::float32: run(&elementwise_kernel<Op, T, float, V>); break;
      case Dtype::float16: run(&elementwise_kernel<Op, T, __half, V>); break;
      case Dtype::bfloat16: run(&elementwise_kernel<Op, T, __nv_bfloat16, V>); break;
    }
  });
  check(cudaGetLastError(), "launch of an elementwise operation");
}

// Launches no more blocks than are resident, so that a scale of 1 costs only the launch.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) scale_kernel(const __grid_constant__ Scale p, int64_t tiles) {
  for (int64_t block = blockIdx.x; block < p.shape.batch * tiles; block += gridDim.x) {
    const int64_t sample = block / tiles;
    const float factor = p.upstream[sample * p.upstream_stride] * p.rest;
    if (factor == 1) {
      if (p.upstream_stride == 0) return;
      continue;
    }
    Multiply one{p.shape, p.gradient, p.gradient, {}, {nullptr, 0, 1}, factor};
    run_tile(MultiplyOp<T, T, V>(one, sample), block % tiles, p.shape.size / V);
  }
}

}  // namespace

void launch(const Renoise& p, void* stream) {
  launch_elementwise<RenoiseOp>(p, p.x.dtype, p.noise.data ? p.noise.dtype : p.x.dtype, stream);
}

void launch(const GuidedEulerStep& p, void* stream) {
  launch_elementwise<GuidedEulerStepOp>(p, p.x.dtype, p.v.dtype, stream);
}

void launch(const Multiply& p, void* stream) {
  launch_elementwise<MultiplyOp>(p, p.result.dtype, p.y.dtype, stream);
}

void launch(const Scale& p, void* stream) {
  const int64_t tiles = tiles_of(p.shape);
  const int64_t blocks = std::min<int64_t>(p.shape.batch * tiles, 4 * device().multiprocessors);
  for_dtype(p.gradient.dtype, p.shape.vectors, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int V = decltype(type)::width;
    scale_kernel<T, V><<<unsigned(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, tiles);
  });
  check(cudaGetLastError(), "launch of scale");
}

}  // namespace dpdmd
