// The registered operations: schemas, requirements on tensors, outputs. Python (kernels/) checks what users pass and
// arranges strides; the checks here keep a kernel from reading other memory.
//
// Only LibTorch's stable ABI is used, so one library serves torch 2.11 and newer, and every Python.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <optional>
#include <tuple>
#include <vector>

#include "ops.h"

namespace {

using dpdmd::Coefficient;
using dpdmd::Dtype;
using dpdmd::Rows;
using dpdmd::Shape;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// torch's current stream. A CPU build of torch lacks the function, and torch does not export it to libraries loaded later:
// it is looked up at the first call, so that this library loads everywhere.
void* current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch_cuda ? reinterpret_cast<Function>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(function, "dpdmd: this build of torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return stream;
}

// Makes the tensor's device current during its lifetime.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : device_(tensor.get_device_index()) {
    cudaGetDevice(&before_);
    if (device_ != before_) cudaSetDevice(device_);
  }
  ~OnDevice() {
    if (device_ != before_) cudaSetDevice(before_);
  }
  void* stream() const { return current_stream(device_); }

 private:
  int device_, before_ = 0;
};

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    default: STD_TORCH_CHECK(false, "dpdmd: tensors need to be float32, float16 or bfloat16");
  }
  return Dtype::float32;
}

int32_t code_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half: return aoti_torch_dtype_float16();
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    default: return aoti_torch_dtype_float32();
  }
}

// The tensors (B, ...) of a call. Their samples have one order in memory, without gaps inside a sample.
class Samples {
 public:
  explicit Samples(const Tensor& first) : first_(first) {
    STD_TORCH_CHECK(first.is_cuda() && first.dim() > 0, "dpdmd: tensors need to be (B, ...) on a CUDA device");
    const auto sizes = first.sizes();
    const auto strides = first.strides();
    int64_t size = 1, span = 1;
    for (int64_t i = 1; i < first.dim(); ++i) {
      size *= sizes[i];
      span += (sizes[i] - 1) * strides[i];
    }
    STD_TORCH_CHECK(size == 0 || size == span, "dpdmd: samples need to be dense in memory");
    shape = {sizes[0], size, size % 8 == 0};
  }

  bool empty() const { return shape.batch == 0 || shape.size == 0; }

  Rows rows(const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == first_.get_device_index() &&
                        tensor.dim() == first_.dim(),
                    "dpdmd: tensors need one device and one number of dimensions");
    const auto sizes = tensor.sizes(), like = first_.sizes();
    const auto strides = tensor.strides(), order = first_.strides();
    bool same = sizes[0] == like[0];
    for (int64_t i = 1; i < tensor.dim(); ++i)
      same = same && sizes[i] == like[i] && (sizes[i] == 1 || strides[i] == order[i]);
    STD_TORCH_CHECK(same, "dpdmd: tensors need one shape, and samples with one order in memory");
    const Rows rows{tensor.data_ptr(), shape.batch > 1 ? strides[0] : 0, dtype_of(tensor)};
    shape.vectors = shape.vectors && reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 &&
                    rows.stride * dpdmd::bytes(rows.dtype) % 16 == 0;
    return rows;
  }
  Rows rows(const MaybeTensor& tensor) { return tensor ? rows(*tensor) : Rows{}; }

  Coefficient coefficient(const MaybeTensor& values, double value) const {
    if (!values) return {nullptr, 0, float(value)};
    STD_TORCH_CHECK(values->is_cuda() && values->get_device_index() == first_.get_device_index() &&
                        values->scalar_type() == ScalarType::Float && values->dim() == 1 &&
                        values->size(0) == shape.batch,
                    "dpdmd: a coefficient needs to be (B,) float32 on the device");
    return {static_cast<const float*>(values->data_ptr()), values->stride(0), 0};
  }

  Shape shape;

 private:
  const Tensor& first_;
};

// Allocates without the dispatcher, which costs as much as the rest of the call.
Tensor allocate(int64_t dims, const int64_t* sizes, const int64_t* strides, ScalarType dtype, const Tensor& beside) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, code_of(dtype), aoti_torch_device_type_cuda(),
                                                  beside.get_device_index(), &handle));
  return Tensor(handle);
}

Tensor floats(int64_t count, const Tensor& beside) {
  const int64_t one = 1;
  return allocate(1, &count, &one, ScalarType::Float, beside);
}

Tensor number(const Tensor& beside) { return allocate(0, nullptr, nullptr, ScalarType::Float, beside); }

// A tensor of another's shape and memory order, without gaps between samples.
Tensor alike(const Tensor& tensor, int64_t size, ScalarType dtype) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  std::vector<int64_t> dense(strides.begin(), strides.end());
  dense[0] = size;
  return allocate(tensor.dim(), sizes.data(), dense.data(), dtype, tensor);
}

// Allocates loss, gradient and scratch memory, launches, and returns loss and gradient.
template <typename Loss>
std::tuple<Tensor, Tensor> run(Loss& loss, Samples& samples, const Tensor& x, double loss_factor,
                               double gradient_factor, bool per_sample, int64_t (*scratch_of)(const Loss&)) {
  const OnDevice device(x);
  Tensor gradient = alike(x, samples.shape.size, x.scalar_type());
  Tensor value = per_sample ? floats(samples.shape.batch, x) : number(x);
  if (samples.empty()) return {torch::stable::zero_(value), std::move(gradient)};
  loss.gradient = samples.rows(gradient);
  loss.shape = samples.shape;
  Tensor scratch = floats(scratch_of(loss), x);
  loss.reduction = {float(gradient_factor), loss_factor, per_sample, static_cast<float*>(value.data_ptr()),
                    static_cast<float*>(scratch.data_ptr())};
  dpdmd::launch(loss, device.stream());
  return {value, gradient};
}

std::tuple<Tensor, Tensor> dmd_loss(Tensor x, Tensor teacher, Tensor critic, MaybeTensor uncond, double guidance_scale,
                                    MaybeTensor x_t, MaybeTensor a, double a_value, MaybeTensor b, double b_value,
                                    int64_t normalizer, double loss_factor, double gradient_factor, bool per_sample) {
  Samples samples(x);
  dpdmd::DmdLoss loss;
  loss.teacher = samples.rows(teacher);
  loss.critic = samples.rows(critic);
  loss.uncond = samples.rows(uncond);
  loss.x_t = samples.rows(x_t);
  loss.x = samples.rows(x);
  STD_TORCH_CHECK(loss.critic.dtype == loss.teacher.dtype && (!uncond || loss.uncond.dtype == loss.teacher.dtype),
                  "dpdmd: teacher, critic and teacher_uncond need one dtype");
  STD_TORCH_CHECK(normalizer >= 0 && normalizer <= 3, "dpdmd: unknown normalizer ", normalizer);
  loss.normalizer = dpdmd::Normalizer(normalizer);
  STD_TORCH_CHECK(x_t || loss.normalizer == dpdmd::Normalizer::velocity ||
                      loss.normalizer == dpdmd::Normalizer::none,
                  "dpdmd: this normalizer needs x_t");
  loss.guidance_scale = float(guidance_scale);
  loss.a = samples.coefficient(a, a_value);
  loss.b = samples.coefficient(b, b_value);
  return run(loss, samples, x, loss_factor, gradient_factor, per_sample, &dpdmd::dmd_loss_scratch);
}

std::tuple<Tensor, Tensor> squared_loss(dpdmd::SquaredLoss loss, Samples samples, const Tensor& p, const Tensor& y,
                                        const Tensor& z, double loss_factor, double gradient_factor, bool per_sample) {
  loss.p = samples.rows(p);
  loss.y = samples.rows(y);
  loss.z = samples.rows(z);
  STD_TORCH_CHECK(loss.y.dtype == loss.z.dtype, "dpdmd: the second and third tensor need one dtype");
  return run(loss, samples, p, loss_factor, gradient_factor, per_sample, &dpdmd::squared_loss_scratch);
}

std::tuple<Tensor, Tensor> velocity_loss(Tensor v, Tensor noise, Tensor z, MaybeTensor t, double t_value,
                                         double loss_factor, double gradient_factor, bool per_sample) {
  Samples samples(v);
  dpdmd::SquaredLoss loss;
  loss.t = samples.coefficient(t, 0);
  loss.start = t ? 1 : float(1 - t_value);  // in double, as Python would
  return squared_loss(loss, samples, v, noise, z, loss_factor, gradient_factor, per_sample);
}

std::tuple<Tensor, Tensor> x_prediction_loss(Tensor prediction, Tensor x_t, Tensor x0_target, MaybeTensor a,
                                             double a_value, MaybeTensor b, double b_value, double loss_factor,
                                             double gradient_factor, bool per_sample) {
  Samples samples(prediction);
  dpdmd::SquaredLoss loss;
  loss.velocity = false;
  loss.a = samples.coefficient(a, a_value);
  loss.b = samples.coefficient(b, b_value);
  return squared_loss(loss, samples, prediction, x_t, x0_target, loss_factor, gradient_factor, per_sample);
}

// Launches an elementwise operation whose result has x's memory order.
template <typename Operation> Tensor run(Operation& operation, Samples& samples, const Tensor& x, ScalarType dtype) {
  Tensor result = alike(x, samples.shape.size, dtype);
  if (samples.empty()) return result;
  operation.result = samples.rows(result);
  operation.shape = samples.shape;
  const OnDevice device(x);
  dpdmd::launch(operation, device.stream());
  return result;
}

Tensor renoise(Tensor x, MaybeTensor noise, int64_t key, bool flow, MaybeTensor alpha, double alpha_value,
               MaybeTensor sigma, double sigma_value) {
  Samples samples(x);
  dpdmd::Renoise operation;
  operation.x = samples.rows(x);
  operation.noise = samples.rows(noise);
  STD_TORCH_CHECK(noise || x.is_contiguous(), "dpdmd: drawn noise needs a contiguous x");
  operation.key = uint64_t(key);
  operation.flow = flow && sigma;
  if (flow && !sigma) alpha_value = 1 - sigma_value;  // in double, as Python would
  operation.alpha = samples.coefficient(alpha, alpha_value);
  operation.sigma = samples.coefficient(sigma, sigma_value);
  return run(operation, samples, x, x.scalar_type());
}

Tensor guided_euler_step(Tensor x, Tensor v, MaybeTensor v_uncond, double guidance_scale, MaybeTensor t, double t_value,
                         MaybeTensor t_next, double t_next_value) {
  Samples samples(x);
  dpdmd::GuidedEulerStep operation;
  operation.x = samples.rows(x);
  operation.v = samples.rows(v);
  operation.uncond = samples.rows(v_uncond);
  STD_TORCH_CHECK(!v_uncond || operation.uncond.dtype == operation.v.dtype, "dpdmd: v and v_uncond need one dtype");
  operation.guidance_scale = float(guidance_scale);
  if (!t && !t_next) t_next_value -= t_value, t_value = 0;  // in double, as Python would
  operation.t = samples.coefficient(t, t_value);
  operation.t_next = samples.coefficient(t_next, t_next_value);
  return run(operation, samples, x, x.scalar_type());
}

// (to - from) factor y, for each sample.
Tensor multiply(Tensor y, MaybeTensor from, double from_value, MaybeTensor to, double to_value, double factor,
                ScalarType dtype) {
  Samples samples(y);
  dpdmd::Multiply operation;
  operation.y = samples.rows(y);
  operation.from = samples.coefficient(from, from_value);
  operation.to = samples.coefficient(to, to_value);
  operation.factor = float(factor);
  return run(operation, samples, y, dtype);
}

void scale_(Tensor gradient, Tensor upstream, double rest) {
  Samples samples(gradient);
  dpdmd::Scale operation;
  operation.gradient = samples.rows(gradient);
  STD_TORCH_CHECK(upstream.is_cuda() && upstream.get_device_index() == gradient.get_device_index() &&
                      upstream.scalar_type() == ScalarType::Float && upstream.dim() <= 1 &&
                      (upstream.dim() == 0 || upstream.size(0) == samples.shape.batch),
                  "dpdmd: upstream needs to be () or (B,) float32 on the device");
  if (samples.empty()) return;
  operation.shape = samples.shape;
  operation.upstream = static_cast<const float*>(upstream.data_ptr());
  operation.upstream_stride = upstream.dim() ? upstream.stride(0) : 0;
  operation.rest = float(rest);
  const OnDevice device(gradient);
  dpdmd::launch(operation, device.stream());
}

// Checks a row-major matrix of a product with an epilogue.
void check_matrix(const Tensor& matrix, int64_t rows, int64_t columns, const Tensor& like) {
  STD_TORCH_CHECK(matrix.is_cuda() && matrix.get_device_index() == like.get_device_index() &&
                      matrix.scalar_type() == like.scalar_type(),
                  "dpdmd: matrices need one CUDA device and one dtype");
  STD_TORCH_CHECK(matrix.dim() == 2 && matrix.is_contiguous() && matrix.size(0) == rows && matrix.size(1) == columns &&
                      reinterpret_cast<uintptr_t>(matrix.data_ptr()) % 16 == 0,
                  "dpdmd: a matrix needs to be (", rows, ", ", columns, "), contiguous and 16-byte aligned");
}

Tensor matrix(int64_t rows, int64_t columns, const Tensor& like) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  return allocate(2, sizes, strides, like.scalar_type(), like);
}

void run(dpdmd::Matmul& product, const Tensor& x, const Tensor& weight, const Tensor& aux, const Tensor& out) {
  STD_TORCH_CHECK(dtype_of(x) != Dtype::float32, "dpdmd: these products are of float16 or bfloat16");
  STD_TORCH_CHECK(product.rows && product.columns % 8 == 0 && product.inner % 8 == 0 && product.inner,
                  "dpdmd: a product needs rows, and multiples of 8 columns");
  product.x = x.data_ptr();
  product.weight = weight.data_ptr();
  product.aux = aux.data_ptr();
  product.out = out.data_ptr();
  product.dtype = dtype_of(x);
  const OnDevice device(x);
  const Tensor workspace = floats(dpdmd::matmul_workspace / 4, x);
  dpdmd::launch(product, x.get_device_index(), workspace.data_ptr(), device.stream());
}

// (gelu(pre), pre) of pre = x weight^T + bias
std::tuple<Tensor, Tensor> linear_gelu_aux(Tensor x, Tensor weight, Tensor bias) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "dpdmd: x and weight need to be matrices");
  const int64_t rows = x.size(0), inner = x.size(1), columns = weight.size(0);
  check_matrix(x, rows, inner, x);
  check_matrix(weight, columns, inner, x);
  STD_TORCH_CHECK(bias.is_cuda() && bias.scalar_type() == x.scalar_type() && bias.dim() == 1 &&
                      bias.size(0) == columns && bias.is_contiguous() &&
                      reinterpret_cast<uintptr_t>(bias.data_ptr()) % 16 == 0,
                  "dpdmd: bias needs to be (", columns, "), dense and aligned, in x's dtype");
  Tensor out = matrix(rows, columns, x), pre = matrix(rows, columns, x);
  dpdmd::Matmul product;
  product.epilogue = dpdmd::Matmul::Epilogue::gelu_aux_bias;
  product.weight_transposed = true;
  product.rows = rows, product.columns = columns, product.inner = inner;
  product.bias = bias.data_ptr();
  run(product, x, weight, pre, out);
  return {out, pre};
}

// (dy weight) gelu'(pre)
Tensor matmul_dgelu(Tensor dy, Tensor weight, Tensor pre) {
  STD_TORCH_CHECK(dy.dim() == 2 && weight.dim() == 2, "dpdmd: dy and weight need to be matrices");
  const int64_t rows = dy.size(0), inner = dy.size(1), columns = weight.size(1);
  check_matrix(dy, rows, inner, dy);
  check_matrix(weight, inner, columns, dy);
  check_matrix(pre, rows, columns, dy);
  Tensor out = matrix(rows, columns, dy);
  dpdmd::Matmul product;
  product.epilogue = dpdmd::Matmul::Epilogue::dgelu;
  product.rows = rows, product.columns = columns, product.inner = inner;
  run(product, dy, weight, pre, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dpdmd, library) {
  library.def(
      "dmd_loss(Tensor x, Tensor teacher, Tensor critic, Tensor? teacher_uncond, float guidance_scale, Tensor? x_t, "
      "Tensor? a, float a_value, Tensor? b, float b_value, int normalizer, float loss_factor, float gradient_factor, "
      "bool per_sample) -> (Tensor loss, Tensor gradient)");
  library.def(
      "velocity_loss(Tensor v, Tensor noise, Tensor z, Tensor? t, float t_value, float loss_factor, "
      "float gradient_factor, bool per_sample) -> (Tensor loss, Tensor gradient)");
  library.def(
      "x_prediction_loss(Tensor prediction, Tensor x_t, Tensor x0_target, Tensor? a, float a_value, Tensor? b, "
      "float b_value, float loss_factor, float gradient_factor, bool per_sample) -> (Tensor loss, Tensor gradient)");
  library.def(
      "renoise(Tensor x, Tensor? noise, int key, bool flow, Tensor? alpha, float alpha_value, Tensor? sigma, "
      "float sigma_value) -> Tensor");
  library.def(
      "guided_euler_step(Tensor x, Tensor v, Tensor? v_uncond, float guidance_scale, Tensor? t, float t_value, "
      "Tensor? t_next, float t_next_value) -> Tensor");
  library.def(
      "multiply(Tensor y, Tensor? start, float start_value, Tensor? end, float end_value, float factor, "
      "ScalarType dtype) -> Tensor");
  library.def("linear_gelu_aux(Tensor x, Tensor weight, Tensor bias) -> (Tensor out, Tensor pre)");
  library.def("matmul_dgelu(Tensor dy, Tensor weight, Tensor pre) -> Tensor");
  library.def("scale_(Tensor(a!) gradient, Tensor upstream, float rest) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dpdmd, CUDA, library) {
  library.impl("dmd_loss", TORCH_BOX(&dmd_loss));
  library.impl("velocity_loss", TORCH_BOX(&velocity_loss));
  library.impl("x_prediction_loss", TORCH_BOX(&x_prediction_loss));
  library.impl("renoise", TORCH_BOX(&renoise));
  library.impl("guided_euler_step", TORCH_BOX(&guided_euler_step));
  library.impl("multiply", TORCH_BOX(&multiply));
  library.impl("linear_gelu_aux", TORCH_BOX(&linear_gelu_aux));
  library.impl("matmul_dgelu", TORCH_BOX(&matmul_dgelu));
  library.impl("scale_", TORCH_BOX(&scale_));
}
