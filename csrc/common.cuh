// What the kernels share: vectors of elements as float32, coefficients, sums in a fixed order, launching.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "ops.h"

namespace dpdmd {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("dpdmd: ") + what + ": " + cudaGetErrorString(error));
}

constexpr int kMostDevices = 64;

struct Device {
  int index, multiprocessors, capability;
  int shared_memory;  // bytes that a block may ask for
};

// The current device.
inline const Device& device() {
  static Device known[kMostDevices] = {};  // benign race: every thread writes the same
  int index = 0;
  check(cudaGetDevice(&index), "cudaGetDevice");
  if (index >= kMostDevices) throw std::runtime_error("dpdmd: device index above 63");
  Device& device = known[index];
  if (device.capability == 0) {
    int major = 0, minor = 0;
    check(cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index), "attribute");
    check(cudaDeviceGetAttribute(&device.shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, index), "attribute");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), "attribute");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index), "attribute");
    device.index = index;
    device.capability = 10 * major + minor;
  }
  return device;
}

__device__ inline float value_of(const Coefficient& coefficient, int64_t sample) {
  return coefficient.values ? coefficient.values[sample * coefficient.stride] : coefficient.value;
}

// Two elements of a 16-bit dtype in a word.
template <typename T> struct Pair;
template <> struct Pair<__half> {
  static __device__ float2 widen(uint32_t word) { return __half22float2(*reinterpret_cast<__half2*>(&word)); }
  static __device__ uint32_t narrow(float first, float second) {
    const __half2 pair = __floats2half2_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};
template <> struct Pair<__nv_bfloat16> {
  static __device__ float2 widen(uint32_t word) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  }
  static __device__ uint32_t narrow(float first, float second) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};

// V elements as in memory: words that are moved four at a time, or one element.
template <typename T, int V> struct Pack {
  static constexpr int kWords = V * sizeof(T) / 4;
  static_assert(kWords % 4 == 0);
  uint32_t words[kWords];

  __device__ void widen(float (&y)[V]) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      if constexpr (sizeof(T) == 4) {
        y[i] = __uint_as_float(words[i]);
      } else {
        const float2 pair = Pair<T>::widen(words[i]);
        y[2 * i] = pair.x, y[2 * i + 1] = pair.y;
      }
  }
  __device__ void narrow(const float (&y)[V]) {
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      if constexpr (sizeof(T) == 4)
        words[i] = __float_as_uint(y[i]);
      else
        words[i] = Pair<T>::narrow(y[2 * i], y[2 * i + 1]);
  }
};

template <typename T> struct Pack<T, 1> {
  T value;
  __device__ void widen(float (&y)[1]) const { y[0] = float(value); }
  __device__ void narrow(const float (&y)[1]) { value = T(y[0]); }
};

// From where something is read. passing: it leaves the L2 cache first, so that other data stays; a tenth slower on large
// tensors. written: another block of this kernel has written it.
enum class From { memory, passing, written, shared };

// Elements [V i, V i + V) of a sample.
template <typename T, int V, From Place = From::memory> __device__ Pack<T, V> load(const T* sample, int64_t i) {
  Pack<T, V> pack;
  if constexpr (V == 1) {
    pack.value = sample[i];
  } else {
    const uint4* source = reinterpret_cast<const uint4*>(sample + i * V);
#pragma unroll
    for (int k = 0; k < pack.kWords / 4; ++k) {
      uint4 four;
      if constexpr (Place == From::memory) four = __ldg(source + k);
      if constexpr (Place == From::passing) four = __ldcs(source + k);
      if constexpr (Place == From::written) four = __ldcg(source + k);
      if constexpr (Place == From::shared) four = source[k];
      pack.words[4 * k] = four.x, pack.words[4 * k + 1] = four.y;
      pack.words[4 * k + 2] = four.z, pack.words[4 * k + 3] = four.w;
    }
  }
  return pack;
}

template <typename T, int V> __device__ void store(T* sample, int64_t i, const Pack<T, V>& pack) {
  if constexpr (V == 1) {
    sample[i] = pack.value;
  } else {
    uint4* target = reinterpret_cast<uint4*>(sample + i * V);
#pragma unroll
    for (int k = 0; k < pack.kWords / 4; ++k)
      target[k] = {pack.words[4 * k], pack.words[4 * k + 1], pack.words[4 * k + 2], pack.words[4 * k + 3]};
  }
}

template <typename T, int V> __device__ void store(T* sample, int64_t i, const float (&y)[V]) {
  Pack<T, V> pack;
  pack.narrow(y);
  store<T, V>(sample, i, pack);
}

template <typename T> __device__ T* sample_of(const Rows& rows, int64_t sample) {
  return static_cast<T*>(rows.data) + sample * rows.stride;
}

// The same with a dtype known only at run time: for tensors whose dtype seldom differs from the others', and for stores.
template <int V> __device__ void load_any(float (&y)[V], const Rows& rows, int64_t sample, int64_t i) {
  switch (rows.dtype) {
    case Dtype::float32: load<float, V>(sample_of<float>(rows, sample), i).widen(y); break;
    case Dtype::float16: load<__half, V>(sample_of<__half>(rows, sample), i).widen(y); break;
    case Dtype::bfloat16: load<__nv_bfloat16, V>(sample_of<__nv_bfloat16>(rows, sample), i).widen(y); break;
  }
}

template <int V> __device__ void store_any(const Rows& rows, int64_t sample, int64_t i, const float (&y)[V]) {
  switch (rows.dtype) {
    case Dtype::float32: store<float, V>(sample_of<float>(rows, sample), i, y); break;
    case Dtype::float16: store<__half, V>(sample_of<__half>(rows, sample), i, y); break;
    case Dtype::bfloat16: store<__nv_bfloat16, V>(sample_of<__nv_bfloat16>(rows, sample), i, y); break;
  }
}

template <typename T> __device__ T across(T y, int lanes) {
  if constexpr (std::is_arithmetic_v<T>)
    return __shfl_xor_sync(0xffffffffu, y, lanes);
  else
    return y.across(lanes);
}

// The sum over a warp; the same bits each time.
template <typename T> __device__ T warp_sum(T y) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) y += across(y, lanes);
  return y;
}

// The sum over a block, for thread 0 only; the same bits each time. `scratch` holds a number a warp.
template <typename T, int Threads> __device__ T block_sum(T y, T* scratch) {
  y = warp_sum(y);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = y;
  __syncthreads();
  T total = {};
  if (threadIdx.x == 0)
#pragma unroll
    for (int warp = 0; warp < Threads / 32; ++warp) total += scratch[warp];
  return total;
}

// loss[i] = factor * sum of partials[i * count, (i + 1) * count), for i < losses.
void launch_finish(float* loss, const float* partials, int64_t losses, int64_t count, double factor, cudaStream_t);

constexpr int kWidth = 8;  // elements of a vector: 16 bytes of a 16-bit dtype

template <typename T, int V> struct Type {
  using type = T;
  static constexpr int width = V;
};

// Calls f(Type<T, V>{}) for a dtype, with V = 1 where `vectors` is false.
template <typename F> void for_dtype(Dtype dtype, bool vectors, F&& f) {
  switch (dtype) {
    case Dtype::float32: return vectors ? f(Type<float, kWidth>{}) : f(Type<float, 1>{});
    case Dtype::float16: return vectors ? f(Type<__half, kWidth>{}) : f(Type<__half, 1>{});
    case Dtype::bfloat16: return vectors ? f(Type<__nv_bfloat16, kWidth>{}) : f(Type<__nv_bfloat16, 1>{});
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace dpdmd
