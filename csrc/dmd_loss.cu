// The score-difference loss and its gradient in one pass over memory.
//
//   d = v - critic (a flow), or b (critic - v);   w = the normaliser, a mean over the sample;   g = d / w
//
// w is known only when the whole sample has been read, so the blocks that share a sample keep their d in shared memory,
// meet once, and write g. They meet in a thread block cluster on Hopper where a sample fits in one, else at a counter in
// global memory on which the resident blocks of a group wait (a cooperative launch).
//
// The part of a sample that shared memory does not hold is cut into pieces. A warp takes the next piece when it is free,
// since some multiprocessors are nearer to the memory than others. A piece's d is stored in the gradient and read back from
// the L2 cache, or computed again where the gradient's dtype cannot hold it. Each piece has its own sum, and the sums are
// added in one order: the same bits each time, whichever warp takes a piece.
//
// Two launches: this kernel, and the sum of the samples' losses.

#include <cooperative_groups.h>

#include <algorithm>
#include <type_traits>

#include "common.cuh"

namespace dpdmd {
namespace {

constexpr int kThreads = 512;
constexpr int kBatch = 4;  // vectors that a thread asks for before it uses the first
constexpr int kStaticShared = 1024;  // bytes of shared memory left for sums

// How blocks share the samples: `groups` of `blocks` each; group i takes the samples i, i + groups, ... A row is kThreads
// vectors, one a thread. Each block keeps `rows` rows of a sample; the rest is `pieces` of 32 kBatch vectors.
struct Plan {
  int groups = 1, blocks = 1, rows = 0;
  int64_t pieces = 0;
  bool cluster = false;
  bool narrow = false;  // d is kept as bfloat16
};

struct Sums {
  float of_normalizer = 0, of_loss = 0;
  __device__ void operator+=(const Sums& other) { of_normalizer += other.of_normalizer, of_loss += other.of_loss; }
  __device__ Sums across(int lanes) const {
    return {__shfl_xor_sync(0xffffffffu, of_normalizer, lanes), __shfl_xor_sync(0xffffffffu, of_loss, lanes)};
  }
};

// What blocks share without a cluster.
struct Meeting {
  float2* partials;   // (groups, 2, blocks + pieces), of the current sample; even and odd rounds alternate
  unsigned* arrived;  // (groups,), number of blocks that have arrived, over all rounds
  unsigned* taken;    // (batch,), number of pieces of a sample that warps have taken
};

// The formula, for one sample.
template <typename T, int V, bool Velocity> struct Formula {
  const DmdLoss& p;
  int64_t sample;
  float a, b;

  struct Inputs {
    Pack<T, V> teacher, critic, uncond, x_t;
  };

  __device__ Formula(const DmdLoss& p, int64_t sample)
      : p(p), sample(sample), a(value_of(p.a, sample)), b(value_of(p.b, sample)) {}

  __device__ bool x_t_at_hand() const { return p.x_t.data && p.x_t.dtype == p.teacher.dtype; }

  // Inputs leave the L2 cache first, so that d stays in it.
  __device__ void read(Inputs& in, int64_t i) const {
    in.teacher = load<T, V, From::passing>(sample_of<T>(p.teacher, sample), i);
    in.critic = load<T, V, From::passing>(sample_of<T>(p.critic, sample), i);
    if (p.uncond.data) in.uncond = load<T, V, From::passing>(sample_of<T>(p.uncond, sample), i);
    if (!Velocity && x_t_at_hand()) in.x_t = load<T, V, From::passing>(sample_of<T>(p.x_t, sample), i);
  }

  // d, from the inputs at vector i.
  __device__ void difference(const Inputs& in, int64_t i, float (&d)[V], Sums& sums) const {
    float v[V], critic[V];
    in.teacher.widen(v);
    in.critic.widen(critic);
    if (p.uncond.data) {
      float uncond[V];
      in.uncond.widen(uncond);
#pragma unroll
      for (int j = 0; j < V; ++j) v[j] = uncond[j] + p.guidance_scale * (v[j] - uncond[j]);
    }
    if constexpr (Velocity) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        d[j] = v[j] - critic[j];
        sums.of_normalizer += fabsf(v[j]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) d[j] = b * (critic[j] - v[j]);
      if (p.normalizer != Normalizer::none) {
        float x_t[V], x[V];
        if (x_t_at_hand())
          in.x_t.widen(x_t);
        else
          load_any<V>(x_t, p.x_t, sample, i);
        if (p.normalizer == Normalizer::sample) load_any<V>(x, p.x, sample, i);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const float x_real = a * x_t[j] + b * v[j];
          sums.of_normalizer += fabsf((p.normalizer == Normalizer::sample ? x[j] : x_t[j]) - x_real);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < V; ++j) sums.of_loss += isfinite(d[j]) ? d[j] * d[j] : 0.0f;
  }

  // The gradient at vector i, from 1 / w: a division of each element would take as long as the memory accesses. w has no
  // smallest value: where w is 0, entries that are not finite become 0.
  template <typename Kept> __device__ void write(int64_t i, const float (&d)[V], float inverse) const {
    float g[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      g[j] = d[j] * inverse;
      g[j] = isfinite(g[j]) ? g[j] * p.reduction.gradient_factor : 0.0f;
    }
    if constexpr (sizeof(Kept) == 2)
      store<Kept, V>(sample_of<Kept>(p.gradient, sample), i, g);
    else
      store_any<V>(p.gradient, sample, i, g);
  }
};

// Whoever reads the counter afterwards also sees what this thread's block has written.
__device__ inline void arrive(unsigned* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

__device__ inline void wait_for(const unsigned* counter, unsigned count) {
  unsigned arrived;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(counter) : "memory");
  while (arrived < count);
}

// The blocks of a group wait for one another. Returns the two sums over all blocks and pieces.
template <bool Cluster> __device__ Sums meet(const Sums& sums, int64_t round, const Plan& plan, const Meeting& meeting) {
  __shared__ Sums warps[2][kThreads / 32], total;
  const Sums of_block = block_sum<Sums, kThreads>(sums, warps[0]);
  Sums all;
  if constexpr (Cluster) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    __shared__ Sums mine;
    auto cluster = cooperative_groups::this_cluster();
    if (threadIdx.x == 0) mine = of_block;
    cluster.sync();
    if (threadIdx.x < plan.blocks) all = *cluster.map_shared_rank(&mine, threadIdx.x);
#endif
  } else {
    const int group = blockIdx.x / plan.blocks;
    const int64_t count = plan.blocks + plan.pieces;
    float2* partials = meeting.partials + (2 * group + (round & 1)) * count;
    if (threadIdx.x == 0) {
      __stcg(partials + blockIdx.x % plan.blocks, float2{of_block.of_normalizer, of_block.of_loss});
      arrive(meeting.arrived + group);
      wait_for(meeting.arrived + group, unsigned(round + 1) * plan.blocks);
    }
    __syncthreads();
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < count; i += kThreads) {
      const float2 partial = __ldcg(partials + i);
      all += {partial.x, partial.y};
    }
  }
  all = block_sum<Sums, kThreads>(all, warps[1]);
  if (threadIdx.x == 0) total = all;
  __syncthreads();
  return total;
}

template <typename T, int V, bool Velocity, bool Cluster, typename Kept>
__global__ void __launch_bounds__(kThreads, 1)
    dmd_loss_kernel(const __grid_constant__ DmdLoss p, const __grid_constant__ Plan plan, float* losses,
                    const Meeting meeting) {
  extern __shared__ uint4 shared[];
  Kept* kept = reinterpret_cast<Kept*>(shared);
  // As Kept. Not in float16: before the division by w, d may exceed its range.
  const bool gradient_holds_d = sizeof(Kept) == 2 || p.gradient.dtype == Dtype::float32;
  const int lane = threadIdx.x % 32;
  const int64_t step = int64_t(plan.blocks) * kThreads;
  const int64_t first = blockIdx.x % plan.blocks * kThreads + threadIdx.x;
  const int64_t vectors = p.shape.size / V;
  const int64_t first_piece = plan.rows * step;

  using ThisFormula = Formula<T, V, Velocity>;
  int64_t round = 0;
  for (int64_t sample = blockIdx.x / plan.blocks; sample < p.shape.batch; sample += plan.groups, ++round) {
    const ThisFormula formula(p, sample);
    typename ThisFormula::Inputs in[kBatch];
    Sums sums;
    float d[V];

    for (int row = 0; row < plan.rows; row += kBatch) {
#pragma unroll
      for (int k = 0; k < kBatch; ++k)
        if (const int64_t i = first + (row + k) * step; row + k < plan.rows && i < vectors)
          formula.read(in[k], i);
#pragma unroll
      for (int k = 0; k < kBatch; ++k)
        if (const int64_t i = first + (row + k) * step; row + k < plan.rows && i < vectors) {
          formula.difference(in[k], i, d, sums);
          store<Kept, V>(kept, (row + k) * kThreads + threadIdx.x, d);
        }
    }

    if constexpr (!Cluster) {
      float2* partials = meeting.partials + (2 * (blockIdx.x / plan.blocks) + (round & 1)) * (plan.blocks + plan.pieces);
      auto take = [&] {
        unsigned piece = 0;
        if (lane == 0) piece = atomicAdd(meeting.taken + sample, 1u);
        return int64_t(__shfl_sync(0xffffffffu, piece, 0));
      };
      for (int64_t piece = take(); piece < plan.pieces;) {
        const int64_t next = take();
        Sums of_piece;
        const int64_t begin = first_piece + piece * 32 * kBatch + lane;
#pragma unroll
        for (int k = 0; k < kBatch; ++k)
          if (begin + 32 * k < vectors) formula.read(in[k], begin + 32 * k);
#pragma unroll
        for (int k = 0; k < kBatch; ++k)
          if (const int64_t i = begin + 32 * k; i < vectors) {
            formula.difference(in[k], i, d, of_piece);
            if (gradient_holds_d) store<Kept, V>(sample_of<Kept>(p.gradient, sample), i, d);
          }
        of_piece = warp_sum(of_piece);
        if (lane == 0) __stcg(partials + plan.blocks + piece, float2{of_piece.of_normalizer, of_piece.of_loss});
        piece = next;
      }
    }

    const Sums total = meet<Cluster>(sums, round, plan, meeting);
    const float w = p.normalizer == Normalizer::none ? 1.0f : total.of_normalizer / float(p.shape.size);
    const float inverse = 1 / w;
    if (blockIdx.x % plan.blocks == 0 && threadIdx.x == 0)
      losses[sample] = inverse > 0 && isfinite(inverse) ? 0.5f * (total.of_loss * inverse * inverse) : 0.0f;

    for (int64_t begin = first_piece + first; begin < vectors; begin += kBatch * step) {
      Pack<Kept, V> pack[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k)
        if (const int64_t i = begin + k * step; gradient_holds_d && i < vectors)
          pack[k] = load<Kept, V, From::written>(sample_of<Kept>(p.gradient, sample), i);
#pragma unroll
      for (int k = 0; k < kBatch; ++k)
        if (const int64_t i = begin + k * step; i < vectors) {
          if (gradient_holds_d) {
            pack[k].widen(d);
          } else {
            typename ThisFormula::Inputs again;
            Sums counted;
            formula.read(again, i);
            formula.difference(again, i, d, counted);
          }
          formula.template write<Kept>(i, d, inverse);
        }
    }
    for (int row = 0; row < plan.rows; ++row)
      if (const int64_t i = first + row * step; i < vectors) {
        load<Kept, V, From::shared>(kept, row * kThreads + threadIdx.x).widen(d);
        formula.template write<Kept>(i, d, inverse);
      }
  }
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if constexpr (Cluster) cooperative_groups::this_cluster().sync();  // other blocks may still read this block's sums
#endif
}

Plan plan_of(const DmdLoss& p) {
  const Device& gpu = device();
  const int width = p.shape.vectors ? kWidth : 1;
  const int64_t vectors = p.shape.size / width, rows = ceil_div(vectors, kThreads);
  auto fit = [&](int kept) { return (gpu.shared_memory - kStaticShared) / (kThreads * width * kept); };

  // Number of blocks for a sample in a cluster: beyond what holds the sample, no more than run beside the other samples'.
  const int most = gpu.capability / 10 == 9 || gpu.capability / 10 == 10 ? 16 : 8;
  int blocks = 1;
  while (blocks < most && blocks < rows &&
         (blocks * fit(4) < rows || 2 * blocks * p.shape.batch <= gpu.multiprocessors))
    blocks *= 2;
  // A cluster needs neighbouring multiprocessors: beyond three quarters of the chip, clusters wait for one another.
  const bool side_by_side = blocks == 1 || 4 * blocks * p.shape.batch <= 3 * gpu.multiprocessors;

  Plan plan;
  if (gpu.capability >= 90 && blocks * fit(4) >= rows && side_by_side) {
    plan.cluster = true;
    plan.groups = int(p.shape.batch);
    plan.blocks = blocks;
    plan.rows = int(ceil_div(rows, blocks));
  } else {
    plan.narrow = p.gradient.dtype == Dtype::bfloat16 && p.shape.vectors;
    const int64_t kept_rows = fit(plan.narrow ? 2 : 4);
    // A quarter of a sample may be left for pieces: more samples at a time gain more.
    const int64_t needed = std::min<int64_t>(ceil_div(rows * 3 / 4, kept_rows), gpu.multiprocessors);
    plan.groups = int(std::min<int64_t>(p.shape.batch, gpu.multiprocessors / std::max<int64_t>(1, needed)));
    plan.blocks = gpu.multiprocessors / plan.groups;
    plan.rows = int(std::min<int64_t>(kept_rows, ceil_div(rows, plan.blocks)));
    const int64_t left = vectors - int64_t(plan.rows) * plan.blocks * kThreads;
    plan.pieces = std::max<int64_t>(0, ceil_div(left, 32 * kBatch));
  }
  return plan;
}

template <typename T, int V, bool Velocity, bool Cluster, typename Kept>
void launch_planned(const DmdLoss& p, const Plan& plan, float* losses, const Meeting& meeting, cudaStream_t stream) {
  auto* kernel = &dmd_loss_kernel<T, V, Velocity, Cluster, Kept>;
  const size_t shared = size_t(plan.rows) * kThreads * V * sizeof(Kept);
  static bool allowed[kMostDevices] = {};  // once per device: each of the two calls takes a microsecond
  if (!allowed[device().index]) {
    const int most = device().shared_memory - kStaticShared;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "shared memory");
    if (Cluster) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "clusters");
    allowed[device().index] = true;
  }
  cudaLaunchAttribute attribute;
  if (Cluster) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(plan.blocks), 1, 1};
  } else {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(plan.groups) * plan.blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, p, plan, losses, meeting), "launch of dmd_loss");
}

}  // namespace

// In this order: partials (a pair of floats each), losses (B,), arrived (groups,), taken (B,).
int64_t dmd_loss_scratch(const DmdLoss& p) {
  const Plan plan = plan_of(p);
  if (plan.cluster) return p.shape.batch;
  return 4 * plan.groups * (plan.blocks + plan.pieces) + 2 * p.shape.batch + plan.groups;
}

void launch(const DmdLoss& p, void* raw_stream) {
  auto stream = static_cast<cudaStream_t>(raw_stream);
  const Plan plan = plan_of(p);
  Meeting meeting = {};
  float* losses = p.reduction.scratch;
  if (!plan.cluster) {
    losses += 4 * plan.groups * (plan.blocks + plan.pieces);
    meeting.partials = reinterpret_cast<float2*>(p.reduction.scratch);
    meeting.arrived = reinterpret_cast<unsigned*>(losses + p.shape.batch);
    meeting.taken = meeting.arrived + plan.groups;
    check(cudaMemsetAsync(meeting.arrived, 0, (plan.groups + p.shape.batch) * sizeof(unsigned), stream), "memset");
  }

  for_dtype(p.teacher.dtype, p.shape.vectors, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int V = decltype(type)::width;
    auto run = [&](auto velocity) {
      constexpr bool Velocity = decltype(velocity)::value;
      if (plan.cluster) return launch_planned<T, V, Velocity, true, float>(p, plan, losses, meeting, stream);
      if constexpr (V == kWidth)
        if (plan.narrow) return launch_planned<T, V, Velocity, false, __nv_bfloat16>(p, plan, losses, meeting, stream);
      launch_planned<T, V, Velocity, false, float>(p, plan, losses, meeting, stream);
    };
    p.normalizer == Normalizer::velocity ? run(std::true_type{}) : run(std::false_type{});
  });
  const int64_t count = p.reduction.per_sample ? p.shape.batch : 1;
  launch_finish(p.reduction.loss, losses, count, p.shape.batch / count, p.reduction.loss_factor, stream);
}

}  // namespace dpdmd
