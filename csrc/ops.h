// What ops.cpp passes to the kernels: plain structs, and a launch function per operation. No torch, no CUDA headers.
#pragma once

#include <cstdint>

namespace dpdmd {

enum class Dtype : int { float32, float16, bfloat16 };

inline int64_t bytes(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// A tensor as (B, N): the N elements of a sample are dense in memory, samples `stride` elements apart (0: one for all).
struct Rows {
  void* data = nullptr;
  int64_t stride = 0;
  Dtype dtype = Dtype::float32;
};

// A number per sample, (B,) float32 at `values`, or one for all.
struct Coefficient {
  const float* values = nullptr;
  int64_t stride = 0;
  float value = 0;
};

// vectors: sizes, strides and addresses allow reading and writing 16-byte vectors.
struct Shape {
  int64_t batch = 0;
  int64_t size = 0;  // elements of a sample
  bool vectors = false;
};

// The losses write the gradient times `gradient_factor` and the sum of the losses times `loss_factor`: one sum, or one per
// sample. `scratch` has as many floats as `..._scratch` returns.
struct Reduction {
  float gradient_factor = 1;
  double loss_factor = 1;
  bool per_sample = false;
  float* loss = nullptr;
  float* scratch = nullptr;
};

enum class Normalizer : int { velocity, teacher, sample, none };  // velocity: the flow's, without to_x0

struct DmdLoss {
  Shape shape;
  Rows teacher, critic, uncond, x_t, x, gradient;  // uncond.data null: no guidance; x, x_t null where not read
  float guidance_scale = 1;
  Coefficient a, b;
  Normalizer normalizer = Normalizer::velocity;
  Reduction reduction;
};

// velocity: p - (y - z) / (start - t);  otherwise  a y + b p - z
struct SquaredLoss {
  Shape shape;
  Rows p, y, z, gradient;
  bool velocity = true;
  float start = 1;
  Coefficient t, a, b;
  Reduction reduction;
};

struct Renoise {
  Shape shape;
  Rows x, noise, result;  // noise.data null: drawn by Philox from `key`
  uint64_t key = 0;
  bool flow = true;  // alpha = 1 - sigma
  Coefficient alpha, sigma;
};

struct GuidedEulerStep {
  Shape shape;
  Rows x, v, uncond, result;
  float guidance_scale = 1;
  Coefficient t, t_next;
};

// result = (to - from) factor y
struct Multiply {
  Shape shape;
  Rows y, result;
  Coefficient from, to;
  float factor = 1;
};

// gradient *= upstream rest, in place
struct Scale {
  Shape shape;
  Rows gradient;
  const float* upstream = nullptr;
  int64_t upstream_stride = 0;
  float rest = 1;
};

// out (rows, columns) = epilogue(x w), all row-major and dense, with x (rows, inner); w is weight^T of a weight
// (columns, inner), or the weight (inner, columns) itself. float16 or bfloat16.
struct Matmul {
  // gelu_aux_bias: gelu(x w + bias), and x w + bias to aux; dgelu: x w times gelu's slope at aux.
  enum class Epilogue : int { gelu_aux_bias, dgelu };
  Epilogue epilogue = Epilogue::dgelu;
  bool weight_transposed = false;
  int64_t rows = 0, columns = 0, inner = 0;
  const void *x = nullptr, *weight = nullptr, *bias = nullptr;
  void *aux = nullptr, *out = nullptr;  // aux (rows, columns)
  Dtype dtype = Dtype::bfloat16;
};
constexpr int64_t matmul_workspace = 32 << 20;  // bytes: what cuBLAS itself takes on Hopper

int64_t dmd_loss_scratch(const DmdLoss&);
int64_t squared_loss_scratch(const SquaredLoss&);

// All launch on `stream`, a cudaStream_t of the current device, and throw std::runtime_error for an error of CUDA.
void launch(const DmdLoss&, void* stream);
void launch(const SquaredLoss&, void* stream);
void launch(const Renoise&, void* stream);
void launch(const GuidedEulerStep&, void* stream);
void launch(const Multiply&, void* stream);
void launch(const Scale&, void* stream);
void launch(const Matmul&, int device, void* workspace, void* stream);

}  // namespace dpdmd
