// The losses that are a mean of squared residuals: one pass for residual, loss and gradient; a second, small launch adds
// the blocks' sums in a fixed order.
//
//   velocity     r = p - (y - z) / (1 - t),   dL/dp = 2 r        v-prediction; flow matching where t = 0
//   conversion   r = a y + b p - z,           dL/dp = 2 b r      x-prediction

#include "common.cuh"

namespace dpdmd {
namespace {

constexpr int kThreads = 256;
constexpr int kBatch = 2;  // vectors a thread

int64_t tiles_of(const Shape& shape) {
  return ceil_div(shape.size, (shape.vectors ? kWidth : 1) * kThreads * kBatch);
}

// T: the dtype of p and of the gradient; U: that of y and z.
template <typename T, typename U, int V>
__global__ void __launch_bounds__(kThreads)
    squared_loss_kernel(const __grid_constant__ SquaredLoss p, int64_t tiles, float* partials) {
  __shared__ float warps[kThreads / 32];
  const int64_t sample = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int64_t vectors = p.shape.size / V;
  const int64_t first = tile * kThreads * kBatch + threadIdx.x;
  const float inverse = p.velocity ? 1 / (p.start - value_of(p.t, sample)) : 0;
  const float a = value_of(p.a, sample), b = value_of(p.b, sample);

  Pack<T, V> in_p[kBatch];
  Pack<U, V> in_y[kBatch], in_z[kBatch];
#pragma unroll
  for (int k = 0; k < kBatch; ++k)
    if (const int64_t i = first + k * kThreads; i < vectors) {
      in_p[k] = load<T, V>(sample_of<T>(p.p, sample), i);
      in_y[k] = load<U, V>(sample_of<U>(p.y, sample), i);
      in_z[k] = load<U, V>(sample_of<U>(p.z, sample), i);
    }
  float sum = 0;
#pragma unroll
  for (int k = 0; k < kBatch; ++k)
    if (const int64_t i = first + k * kThreads; i < vectors) {
      float prediction[V], y[V], z[V], direction[V];
      in_p[k].widen(prediction);
      in_y[k].widen(y);
      in_z[k].widen(z);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float r = p.velocity ? prediction[j] - (y[j] - z[j]) * inverse : a * y[j] + b * prediction[j] - z[j];
        sum += r * r;
        direction[j] = 2 * (p.velocity ? r : b * r) * p.reduction.gradient_factor;
      }
      store<T, V>(sample_of<T>(p.gradient, sample), i, direction);
    }
  const float total = block_sum<float, kThreads>(sum, warps);
  if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

constexpr int kFinishThreads = 512;

__global__ void finish_kernel(float* loss, const float* partials, int64_t count, double factor) {
  __shared__ double warps[kFinishThreads / 32];
  const float* mine = partials + blockIdx.x * count;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kFinishThreads) sum += mine[i];
  const double total = block_sum<double, kFinishThreads>(sum, warps);
  if (threadIdx.x == 0) loss[blockIdx.x] = float(total * factor);
}

}  // namespace

void launch_finish(float* loss, const float* partials, int64_t losses, int64_t count, double factor,
                   cudaStream_t stream) {
  finish_kernel<<<unsigned(losses), kFinishThreads, 0, stream>>>(loss, partials, count, factor);
  check(cudaGetLastError(), "launch of the sum");
}

int64_t squared_loss_scratch(const SquaredLoss& p) { return p.shape.batch * tiles_of(p.shape); }

void launch(const SquaredLoss& p, void* raw_stream) {
  auto stream = static_cast<cudaStream_t>(raw_stream);
  const int64_t tiles = tiles_of(p.shape);
  const int64_t blocks = p.shape.batch * tiles;
  for_dtype(p.p.dtype, p.shape.vectors, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int V = decltype(type)::width;
    auto run = [&](auto* kernel) {
      kernel<<<unsigned(blocks), kThreads, 0, stream>>>(p, tiles, p.reduction.scratch);
    };
    switch (p.y.dtype) {
      case Dtype::float32: run(&squared_loss_kernel<T, float, V>); break;
      case Dtype::float16: run(&squared_loss_kernel<T, __half, V>); break;
      case Dtype::bfloat16: run(&squared_loss_kernel<T, __nv_bfloat16, V>); break;
    }
  });
  check(cudaGetLastError(), "launch of a squared loss");
  const int64_t losses = p.reduction.per_sample ? p.shape.batch : 1;
  launch_finish(p.reduction.loss, p.reduction.scratch, losses, blocks / losses, p.reduction.loss_factor, stream);
}

}  // namespace dpdmd
