"""Compiles the Triton kernels that operations launch, for compute capability 9.0, and prints of each what its PTX has.

    python compile_for_hopper.py losses|blocks|qk_norm|attention|adamw

In a process of its own, as Triton must not be in its interpreter here. The compiler needs no GPU; nothing is launched.
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from dpdmd.kernels import (
    Float8State,
    Philox,
    TokenStream,
    adaln_modulate,
    adamw_step,
    dmd_loss,
    flow_matching_loss,
    gated_residual_adaln,
    gelu_tanh,
    guided_euler_step,
    qk_norm_rope,
    quantize_rows,
    renoise,
    swiglu,
    use_backend,
    v_prediction_loss,
    x_prediction_loss,
)
from dpdmd.kernels.attention import flash
from dpdmd.kernels.runtime import backend, launch
from dpdmd.kernels.runtime.rows import sum_rows

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.float8_e4m3fn: "fp8e4nv",
}
FEATURES = {
    "16-byte reads": "ld.global.v4.b32",
    "asynchronous copies": "cp.async.cg",
    "tensor copies": "cp.async.bulk.tensor",
    "warpgroup products": "wgmma.mma_async",
    "two-byte reads": "ld.global.b16",
}
seen: dict[str, set[str]] = {}


def compile_as_called(kernel, programs, *arguments):
    signature, constants, attributes = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(kernel._jit.params, arguments, strict=True)):
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape}>"
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:  # an integer whose value Triton does not specialise on
            assert type(value) is int and parameter.annotation_type == "i64" and parameter.do_not_specialize
            signature[parameter.name] = "i64"
    source = ASTSource(fn=kernel._jit, signature=signature, constexprs=constants, attrs=attributes)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=kernel._options).asm["ptx"]
    found = {feature for feature, instruction in FEATURES.items() if instruction in ptx}
    name = kernel._jit.fn.__name__
    seen[name] = seen[name] & found if name in seen else found  # what all its variants have


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.bfloat16, requires_grad=True)


def backward(*results):
    torch.autograd.backward(results, [torch.zeros(result.shape, dtype=result.dtype) for result in results])


def losses():
    x, y, z = zeros(2, 8192), zeros(2, 8192).detach(), zeros(2, 8192).detach()
    t = torch.tensor((0.3, 0.6))
    backward(dmd_loss(x, y, z, teacher_uncond=z, guidance_scale=3.5))
    backward(dmd_loss(x, y, z, x_t=y, to_x0=(1.0, -t), normalizer="sample"))
    backward(dmd_loss(x, y, z, x_t=y, to_x0=(t, -t), normalizer="none"))
    backward(v_prediction_loss(x, y, z, t))
    backward(flow_matching_loss(x, y, z))
    backward(x_prediction_loss(x, y, (1.0, t), z))
    backward(renoise(x, y, t))
    backward(renoise(x, Philox(3), t))
    backward(guided_euler_step(x, y, t, 0.0, v_uncond=z, guidance_scale=3.5))


def blocks():
    for C in (1536, 3072):
        x, v, b = zeros(2, 40, C), zeros(2, C), zeros(C)
        backward(*adaln_modulate(x, (v, v), (v, v), fork=True))
        backward(*gated_residual_adaln(x, (v, v), (x, x), v, v, bias=(b, None), norm="rms"))
        with torch.no_grad():
            adaln_modulate(x, v, v, quantize=True)
            gelu_tanh(zeros(80, 4 * C), zeros(4 * C), quantize=True)
            quantize_rows(x)
        backward(gelu_tanh(zeros(80, 4 * C), zeros(4 * C)))
        backward(swiglu(zeros(80, 4 * C), zeros(4 * C), gate_first=True))
        sum_rows(zeros(300, C))


def qk_norm():
    streams = [
        TokenStream(zeros(1, tokens, 3, 24, 128), zeros(128), zeros(128), [zeros(24 * 128) for _ in range(3)])
        for tokens in (40, 20)
    ]
    cos = torch.zeros(60, 128)
    backward(*qk_norm_rope(*streams, cos=cos, sin=cos))


def attention():
    for D in (64, 96, 128):
        q, k = zeros(1, 200, 2, D).detach(), zeros(1, 77, 2, D).detach()
        o, lse = flash.forward(q, k, k, 0.125)
        flash.backward(o, q, k, k, o, lse, 0.125)


def adamw():
    size, scale, apply = 8192, torch.ones(()), torch.tensor(True)
    for dtype in (torch.float32, torch.bfloat16, None):
        states = [Float8State.zeros(size) if dtype is None else torch.zeros(size, dtype=dtype) for _ in range(2)]
        options = {"weight": zeros(size).detach(), "scale": scale, "apply": apply, "step": 1, "key": Philox(3)}
        settings = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
        adamw_step(torch.zeros(size), *states, zeros(size).detach(), **options, **settings)


launch.Kernel.__call__ = compile_as_called
backend.MISSING = dict.fromkeys(backend.MISSING, lambda *device: "")
with use_backend("triton"):
    groups = {"losses": losses, "blocks": blocks, "qk_norm": qk_norm, "attention": attention, "adamw": adamw}
    groups[sys.argv[1]]()
for name in sorted(seen):
    print(name, *sorted(seen[name]), sep=", ")
