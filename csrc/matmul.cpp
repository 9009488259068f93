// Matrix products by cuBLASLt whose epilogue is GELU (in its tanh form) or the product with its derivative.
//
// cuBLASLt is the one that torch has loaded, found through torch's own library. Its header is no part of CUDA's compiler,
// so what is needed of its C interface (CUDA 12 and 13) is declared here.

#include "ops.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

namespace dpdmd {
namespace {

using Handle = void*;
using Object = void*;  // a descriptor, a layout or a preference

enum DescriptorAttribute { trans_a = 3, epilogue = 7, bias_pointer = 8, aux_pointer = 11, aux_ld = 12, bias_type = 26 };
enum PreferenceAttribute { max_workspace = 1, min_alignment_a = 5 };  // then those of B, C and D
constexpr int compute_float32 = 68, type_float32 = 0, type_float16 = 2, type_bfloat16 = 14;

struct Algorithm {
  uint64_t data[8];
};

struct Candidate {
  Algorithm algorithm;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

struct Library {
  int (*create)(Handle*);
  int (*create_descriptor)(Object*, int compute, int scale);
  int (*set_descriptor)(Object, int attribute, const void*, size_t);
  int (*create_layout)(Object*, int type, uint64_t rows, uint64_t columns, int64_t ld);
  int (*create_preference)(Object*);
  int (*set_preference)(Object, int attribute, const void*, size_t);
  int (*destroy_preference)(Object);
  int (*heuristic)(Handle, Object, Object, Object, Object, Object, Object, int, Candidate*, int*);
  int (*matmul)(Handle, Object, const void* alpha, const void*, Object, const void*, Object, const void* beta,
                const void*, Object, void*, Object, const Algorithm*, void* workspace, size_t, void* stream);
};

void check(int status, const char* what) {
  if (status) throw std::runtime_error(std::string("dpdmd: cuBLASLt's ") + what + " gave " + std::to_string(status));
}

const Library& library() {
  static const Library functions = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    Library found{};
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(torch_cuda ? dlsym(torch_cuda, name) : nullptr);
      if (!function) throw std::runtime_error(std::string("dpdmd: torch has loaded no library with ") + name);
    };
    find(found.create, "cublasLtCreate");
    find(found.create_descriptor, "cublasLtMatmulDescCreate");
    find(found.set_descriptor, "cublasLtMatmulDescSetAttribute");
    find(found.create_layout, "cublasLtMatrixLayoutCreate");
    find(found.create_preference, "cublasLtMatmulPreferenceCreate");
    find(found.set_preference, "cublasLtMatmulPreferenceSetAttribute");
    find(found.destroy_preference, "cublasLtMatmulPreferenceDestroy");
    find(found.heuristic, "cublasLtMatmulAlgoGetHeuristic");
    find(found.matmul, "cublasLtMatmul");
    return found;
  }();
  return functions;
}

// What a kind of product needs, made once. cuBLASLt's matrices are stored by columns: a row-major (M, N) is its (N, M).
struct Plan {
  Object descriptor, a, b, out;
  Algorithm algorithm;
};

Plan make_plan(Handle handle, const Matmul& product) {
  const Library& lt = library();
  const int type = product.dtype == Dtype::float16 ? type_float16 : type_bfloat16;
  const int32_t transposed = product.weight_transposed;
  const uint32_t code = uint32_t(product.epilogue);
  const uint64_t m = product.columns, n = product.rows, k = product.inner;
  Plan plan;
  check(lt.create_descriptor(&plan.descriptor, compute_float32, type_float32), "descriptor");
  const auto set = [&](int attribute, auto value) {
    check(lt.set_descriptor(plan.descriptor, attribute, &value, sizeof value), "descriptor");
  };
  set(trans_a, transposed);
  set(epilogue, code);
  set(aux_ld, int64_t(m));
  set(aux_pointer, product.aux);
  if (product.bias) {
    set(bias_type, int32_t(type));
    set(bias_pointer, product.bias);
  }
  check(transposed ? lt.create_layout(&plan.a, type, k, m, k) : lt.create_layout(&plan.a, type, m, k, m), "layout");
  check(lt.create_layout(&plan.b, type, k, n, k), "layout");
  check(lt.create_layout(&plan.out, type, m, n, m), "layout");
  Object preference;
  check(lt.create_preference(&preference), "preference");
  const uint64_t workspace = matmul_workspace;
  const uint32_t alignment = 16;
  check(lt.set_preference(preference, max_workspace, &workspace, sizeof workspace), "preference");
  for (int matrix = 0; matrix < 4; ++matrix)
    check(lt.set_preference(preference, min_alignment_a + matrix, &alignment, sizeof alignment), "preference");
  Candidate best;
  int found = 0;
  check(lt.heuristic(handle, plan.descriptor, plan.a, plan.b, plan.out, plan.out, preference, 1, &best, &found),
        "heuristic");
  lt.destroy_preference(preference);
  if (!found) throw std::runtime_error("dpdmd: cuBLASLt has no kernel for this product");
  plan.algorithm = best.algorithm;
  return plan;
}

}  // namespace

void launch(const Matmul& product, int device, void* workspace, void* stream) {
  using Key = std::tuple<int, int, int, bool, bool, int64_t, int64_t, int64_t>;
  static std::mutex mutex;
  static std::map<int, Handle> handles;
  static std::map<Key, Plan> plans;
  const Library& lt = library();
  const std::lock_guard<std::mutex> lock(mutex);  // a plan's descriptor holds the call's addresses
  Handle& handle = handles[device];
  if (!handle) check(lt.create(&handle), "handle");
  const Key key{device, int(product.epilogue), int(product.dtype), product.weight_transposed, product.bias != nullptr,
                product.rows, product.columns, product.inner};
  auto place = plans.find(key);
  if (place == plans.end()) place = plans.emplace(key, make_plan(handle, product)).first;
  const Plan& plan = place->second;
  check(lt.set_descriptor(plan.descriptor, aux_pointer, &product.aux, sizeof product.aux), "descriptor");
  if (product.bias)
    check(lt.set_descriptor(plan.descriptor, bias_pointer, &product.bias, sizeof product.bias), "descriptor");
  const float one = 1, zero = 0;
  check(lt.matmul(handle, plan.descriptor, &one, product.weight, plan.a, product.x, plan.b, &zero, product.out,
                  plan.out, product.out, plan.out, &plan.algorithm, workspace, matmul_workspace, stream),
        "matrix product");
}

}  // namespace dpdmd
