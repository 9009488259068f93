// Matrix products by cuBLASLt whose epilogue is GELU (in its tanh form) or the product with its derivative.
//
// The functions are those of the cuBLASLt that torch has loaded, found through torch's own library. Only its header is
// needed; nothing is linked.

#include "ops.h"

#include <cublasLt.h>
#include <dlfcn.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

namespace dpdmd {
namespace {

struct Library {
  decltype(&cublasLtCreate) create;
  decltype(&cublasLtMatmulDescCreate) create_descriptor;
  decltype(&cublasLtMatmulDescSetAttribute) set_descriptor;
  decltype(&cublasLtMatrixLayoutCreate) create_layout;
  decltype(&cublasLtMatmulPreferenceCreate) create_preference;
  decltype(&cublasLtMatmulPreferenceSetAttribute) set_preference;
  decltype(&cublasLtMatmulPreferenceDestroy) destroy_preference;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic;
  decltype(&cublasLtMatmul) matmul;
};

void check(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS)
    throw std::runtime_error(std::string("dpdmd: cuBLASLt's ") + what + " gave " + std::to_string(status));
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

// What each kind of product needs, made once. cuBLASLt stores matrices by columns: a row-major (M, N) is its (N, M).
struct Plan {
  cublasLtMatmulDesc_t descriptor;
  cublasLtMatrixLayout_t a, b, out;
  cublasLtMatmulAlgo_t algorithm;
};

Plan make_plan(cublasLtHandle_t handle, const Matmul& product) {
  const Library& lt = library();
  const cudaDataType_t type = product.dtype == Dtype::float16 ? CUDA_R_16F : CUDA_R_16BF;
  const bool transposed = product.weight_transposed;
  const bool forward = product.epilogue == Matmul::Epilogue::gelu_aux_bias;
  const uint64_t m = product.columns, n = product.rows, k = product.inner;
  Plan plan;
  check(lt.create_descriptor(&plan.descriptor, CUBLAS_COMPUTE_32F, CUDA_R_32F), "descriptor");
  const auto set = [&](cublasLtMatmulDescAttributes_t attribute, auto value) {
    check(lt.set_descriptor(plan.descriptor, attribute, &value, sizeof value), "descriptor");
  };
  set(CUBLASLT_MATMUL_DESC_TRANSA, transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
  set(CUBLASLT_MATMUL_DESC_EPILOGUE, forward ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_DGELU);
  set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, int64_t(m));
  set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, product.aux);
  if (product.bias) {
    set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, type);
    set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, product.bias);
  }
  check(transposed ? lt.create_layout(&plan.a, type, k, m, k) : lt.create_layout(&plan.a, type, m, k, m), "layout");
  check(lt.create_layout(&plan.b, type, k, n, k), "layout");
  check(lt.create_layout(&plan.out, type, m, n, m), "layout");
  cublasLtMatmulPreference_t preference;
  check(lt.create_preference(&preference), "preference");
  const uint64_t workspace = matmul_workspace;
  const uint32_t alignment = 16;
  check(lt.set_preference(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace),
        "preference");
  for (const auto matrix : {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
    check(lt.set_preference(preference, matrix, &alignment, sizeof alignment), "preference");
  cublasLtMatmulHeuristicResult_t best;
  int found = 0;
  check(lt.heuristic(handle, plan.descriptor, plan.a, plan.b, plan.out, plan.out, preference, 1, &best, &found),
        "heuristic");
  lt.destroy_preference(preference);
  if (!found) throw std::runtime_error("dpdmd: cuBLASLt has no kernel for this product");
  plan.algorithm = best.algo;
  return plan;
}

}  // namespace

void launch(const Matmul& product, int device, void* workspace, void* stream) {
  using Key = std::tuple<int, int, int, bool, bool, int64_t, int64_t, int64_t>;
  static std::mutex mutex;
  static std::map<int, cublasLtHandle_t> handles;
  static std::map<Key, Plan> plans;
  const Library& lt = library();
  const std::lock_guard<std::mutex> lock(mutex);  // a plan's descriptor holds the call's addresses
  cublasLtHandle_t& handle = handles[device];
  if (!handle) check(lt.create(&handle), "handle");
  const Key key{device, int(product.epilogue), int(product.dtype), product.weight_transposed, product.bias != nullptr,
                product.rows, product.columns, product.inner};
  auto place = plans.find(key);
  if (place == plans.end()) place = plans.emplace(key, make_plan(handle, product)).first;
  const Plan& plan = place->second;
  const auto set = [&](cublasLtMatmulDescAttributes_t attribute, const auto& address) {
    check(lt.set_descriptor(plan.descriptor, attribute, &address, sizeof address), "descriptor");
  };
  set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, product.aux);
  if (product.bias) set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, product.bias);
  const float one = 1, zero = 0;
  check(lt.matmul(handle, plan.descriptor, &one, product.weight, plan.a, product.x, plan.b, &zero, product.out,
                  plan.out, product.out, plan.out, &plan.algorithm, workspace, matmul_workspace, cudaStream_t(stream)),
        "matrix product");
}

}  // namespace dpdmd
