"""What one pass of a network allocates and computes, measured on the meta device: no weights, no GPU, a second.

The family's own modules run on tensors that have shapes and no values, fused as on a GPU (`backend.shapes_only`), while a
`Meter` sees every operation. Memory is the sum of live storages, each counted once, from the operation that made it until
nothing holds it; parameters, buffers and inputs do not count. So what a block keeps for its backward pass is what autograd
and the checkpoints really hold, not a formula; the peak of its backward pass (gradients, recomputed activations) likewise.

Differences to a GPU: sizes are rounded up to 512 bytes; matmuls with an epilogue (gelu_mlp) need one temporary buffer less;
kernels' partial sums (megabytes) and cuDNN's workspace are not seen. Measured on an H100 the difference is below 2 %
(tests/test_plan.py).

At most two blocks of each kind are run; they represent all.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from dpdmd.config import Config, LoraConfig
from dpdmd.engine.lora import add_adapters
from dpdmd.engine.lora import use as use_role
from dpdmd.kernels import fuse_transformer, selective_checkpoint
from dpdmd.kernels.attention.attention import _triton_attention
from dpdmd.kernels.fusion.fuse_transformer import _modules
from dpdmd.kernels.runtime.backend import shapes_only

CHECKPOINTING = ("none", "selective", "full")
_ATTENTION = {"attention_forward_triton": 4, "attention_backward_triton": 10}  # FLOP: B H S T D times this


@dataclass(frozen=True)
class Work:
    """FLOP of matmuls and of attention; bytes that other operations read and write."""

    gemm: float = 0
    attention: float = 0
    bytes: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.gemm + other.gemm, self.attention + other.attention, self.bytes + other.bytes)

    def __sub__(self, other: Work) -> Work:
        return self + other * -1

    def __mul__(self, factor: float) -> Work:
        return Work(self.gemm * factor, self.attention * factor, self.bytes * factor)


@dataclass(frozen=True)
class Pass:
    """Bytes of a block's forward and backward pass, without weights and inputs.

    kept: between the two, outputs included. forward, backward: the peak, kept included; in the backward pass also the
    gradients of outputs, inputs and the block's own parameters.
    """

    kept: float
    forward: float
    backward: float

    def __mul__(self, factor: float) -> Pass:
        return Pass(self.kept * factor, self.forward * factor, self.backward * factor)


@dataclass(frozen=True)
class Block:
    """parameters: elements; trained: those with a gradient; passes by engine.checkpointing."""

    parameters: int
    trained: int
    passes: dict[str, Pass]
    forward: Work
    backward: Work

    def __mul__(self, factor: float) -> Block:
        passes = {how: each * factor for how, each in self.passes.items()}
        return replace(self, passes=passes, forward=self.forward * factor, backward=self.backward * factor)


@dataclass(frozen=True)
class Footprint:
    """One network at one batch size. outer: what is before and after the blocks; no_grad: peak bytes of a pass without
    gradient; buffers: bytes (tables of positions); largest: elements of the largest parameter; dtype_bytes: of a weight."""

    blocks: list[Block]
    outer_parameters: int
    outer_trained: int
    outer_kept: float
    outer: Work
    no_grad: float
    buffers: int
    largest: int
    dtype_bytes: int
    fp8_bytes: int

    @property
    def parameters(self) -> int:
        return self.outer_parameters + sum(block.parameters for block in self.blocks)

    @property
    def trained(self) -> int:
        return self.outer_trained + sum(block.trained for block in self.blocks)

    @property
    def largest_block(self) -> int:
        """Elements of the largest unit that is gathered and reduced at once."""
        return max(block.parameters for block in self.blocks)

    @cached_property
    def forward(self) -> Work:
        return sum((block.forward for block in self.blocks), self.outer)

    def scaled(self, factor: float) -> Footprint:
        """The footprint at `factor` times the batch. Sums over samples, which do not grow with it, are less than 1 %."""
        scaled = {id(block): block * factor for block in self.blocks}
        return replace(
            self,
            blocks=[scaled[id(block)] for block in self.blocks],
            outer_kept=self.outer_kept * factor,
            outer=self.outer * factor,
            no_grad=self.no_grad * factor,
        )


class Meter(TorchDispatchMode):
    """Live bytes on the meta device, their peak, and the work done, inside the block. uncounted: modules, and trees of
    tensors, that exist before it."""

    def __init__(self, *uncounted: Any):
        super().__init__()
        self.live = self.peak = 0
        self.work = Work()
        self._sizes: dict[int, int] = {}
        for each in uncounted:
            for tensor in _tensors([*each.parameters(), *each.buffers()] if isinstance(each, nn.Module) else each):
                self._note(tensor.untyped_storage(), 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [tensor for tensor in _tensors(result) if self._note(tensor.untyped_storage())]
        self.work += self._work(func, args, kwargs or {}, result, made)
        return result

    def _note(self, storage: torch.UntypedStorage, size: int | None = None) -> bool:
        """Counts a storage; returns whether it is new."""
        key = storage._cdata
        if key in self._sizes or storage.device.type != "meta":
            return False
        self._sizes[key] = size = storage.nbytes() if size is None else size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key)
        return True

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    @staticmethod
    def _work(func, args, kwargs, result, made: list[Tensor]) -> Work:
        packet = func._overloadpacket
        if packet is torch.ops.aten.addmm_:
            packet = torch.ops.aten.addmm
        if packet in flop_registry:
            return Work(gemm=flop_registry[packet](*args, **kwargs, out_val=result))
        factor = _ATTENTION.get(packet.__name__)
        if factor is not None:
            q, k = _tensors(args)[factor == 10 :][:2]
            batch, queries, heads, dim = q.shape
            return Work(attention=factor * batch * heads * queries * k.shape[1] * dim)
        writes_in_place = func._schema.is_mutable
        if (not made and not writes_in_place) or packet in (torch.ops.aten.empty, torch.ops.aten.empty_like):
            return Work()  # a view, or nothing yet
        return Work(bytes=sum(t.numel() * t.element_size() for t in _tensors((args, kwargs, made))))


def measure(
    backbone,
    role: str,
    batch: int,
    dtype: torch.dtype,
    *,
    fused: bool,
    fp8: bool = False,
    lora: LoraConfig | None = None,
) -> Footprint:
    """The role's network on batches of `batch` samples at the backbone's resolution.

    fused: with fused operations, as `engine.body.fuse` does on a GPU; lora: adapters on frozen weights.
    """
    model = _cast(backbone.empty_transformer(role), dtype).eval()
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    largest = max(parameter.numel() for parameter in model.parameters())
    fp8_bytes = _fp8_bytes(model) if fp8 else 0
    blocks = [module for module in model.modules() if isinstance(module, backbone.block_classes)]
    outer_parameters = _count(model)[0] - sum(_count(block)[0] for block in blocks)
    kinds = [(type(each), tuple((name, tuple(p.shape)) for name, p in each.named_parameters())) for each in blocks]
    representatives = _representatives(kinds)
    _shorten(model, [blocks[i] for i in representatives])
    if lora is not None:  # one role's, as the engine has one for student and one for critic
        add_adapters(
            model, rank=lora.rank, alpha=lora.alpha or lora.rank, targets=lora.targets, seed=0, roles=("student",)
        )
        use_role(model, "student")
    counts = {kinds[i]: _count(blocks[i]) for i in representatives}
    if fused:
        fuse_transformer(model, verbose=False)
    for parameter in model.parameters():
        if parameter.requires_grad:  # freed when complete: Chain.backward counts them
            parameter.register_post_accumulate_grad_hook(_drop_gradient)

    arguments = _arguments(backbone, batch, dtype)
    predict = partial(backbone.predict, model, *arguments, dtype)
    with _as_on_a_gpu():
        with torch.no_grad(), Meter(model, arguments) as meter:
            predict()
        no_grad, forward = meter.peak, meter.work
        with Meter(model, arguments) as meter:
            calls, hooks = _record([blocks[i] for i in representatives], meter)
            output = predict()
        kept = meter.live
        del output
        for hook in hooks:
            hook.remove()
        measured: dict[Any, Block] = {}
        kept_blocks = 0
        for i in representatives:
            call = calls[blocks[i]]
            kept_blocks += call.kept
            chain = [i - 1, i] if i - 1 in representatives and kinds[i - 1] == kinds[i] else [i]
            if kinds[i] not in measured or len(chain) == 2:
                measured[kinds[i]] = _measure_block([blocks[j] for j in chain], calls, counts[kinds[i]])
    inside = sum((measured[kinds[i]].forward for i in representatives), Work())
    return Footprint(
        blocks=[measured[kind] for kind in kinds],
        outer_parameters=outer_parameters,
        outer_trained=0 if lora is not None else outer_parameters,
        outer_kept=kept - kept_blocks,
        outer=forward - inside,
        no_grad=no_grad,
        buffers=buffers,
        largest=largest,
        dtype_bytes=dtype.itemsize,
        fp8_bytes=fp8_bytes,
    )


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    for module in model.modules():  # Module.to of diffusers' classes warns
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)
    return model


def _count(module: nn.Module) -> tuple[int, int]:
    """Elements of all parameters, and of trained ones."""
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def _representatives(kinds: list[tuple]) -> list[int]:
    """Indices of the blocks that are run: each kind's first two consecutive ones, else its first."""
    chosen = []
    for kind in dict.fromkeys(kinds):
        places = [i for i, each in enumerate(kinds) if each == kind]
        pairs = [[i, i + 1] for i in places if i + 1 in places]
        chosen += pairs[0] if pairs else places[:1]
    return sorted(chosen)


def _shorten(model: nn.Module, blocks: list[nn.Module]) -> None:
    """Removes the model's other blocks."""
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList) and any(block in set(child) for block in blocks):
            setattr(model, name, nn.ModuleList([block for block in child if block in set(blocks)]))


def _arguments(backbone, batch: int, dtype: torch.dtype) -> tuple:
    """x, t, cond of backbone.predict."""
    with torch.device("meta"):
        cond = {name: torch.empty(batch, *shape, dtype=dtype) for name, shape in backbone.text_shapes.items()}
        return torch.empty(batch, *backbone.latent_shape), torch.empty(batch), cond


class _RmsNorm(torch.autograd.Function):
    """The shapes that torch's kernel returns and saves."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, *upstream):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Inside the block fused operations take the path of their kernels, and torch's attention and RMS norm save what its GPU
    kernels save, instead of running as smaller operations: attention saves its inputs, its output and a number per query and
    head, not the attention matrix; the norm saves its input and a number per row."""

    def sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **options):
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return _triton_attention(query, key, value, scale, "triton").transpose(1, 2)

    def rms_norm(input, normalized_shape, weight=None, eps=None):
        return _RmsNorm.apply(input, weight)

    stock = F.scaled_dot_product_attention, F.rms_norm
    F.scaled_dot_product_attention, F.rms_norm = sdpa, rms_norm
    try:
        with shapes_only():
            yield
    finally:
        F.scaled_dot_product_attention, F.rms_norm = stock


@dataclass
class _Call:
    """One call of a block, and how many bytes it left alive, outputs included."""

    args: tuple
    kwargs: dict[str, Any]
    outputs: tuple[Tensor, ...] = ()
    kept: int = 0


def _record(blocks: list[nn.Module], meter: Meter) -> tuple[dict[nn.Module, _Call], list[Any]]:
    """Each block's call, recorded when it runs, and the hooks that do so."""
    calls: dict[nn.Module, _Call] = {}

    def before(block, args, kwargs):
        calls[block] = _Call(args, kwargs, kept=meter.live)

    def after(block, args, kwargs, output):
        call = calls[block]
        call.kept, call.outputs = meter.live - call.kept, _tensors(output)

    hooks = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    hooks += [block.register_forward_hook(after, with_kwargs=True) for block in blocks]
    return calls, hooks


def _tensors(values: Any) -> tuple[Tensor, ...]:
    return tuple(value for value in tree_iter(values) if isinstance(value, Tensor))


def _measure_block(chain: list[nn.Module], calls: dict[nn.Module, _Call], count: tuple[int, int]) -> Block:
    """The last of one or two blocks of a kind. The second gets the first's outputs, and with them what blocks pass on beside
    the tensors (kernels/flux.py), as in the network."""
    measured = {how: _measure_chain(chain, calls, how) for how in CHECKPOINTING}
    return Block(*count, {how: each[0] for how, each in measured.items()}, *measured["none"][1:])


def _measure_chain(chain: list[nn.Module], calls: dict[nn.Module, _Call], how: str) -> tuple[Pass, Work, Work]:
    """The pass, and the work of its forward and backward pass."""
    leaves: dict[int, Any] = {}

    def given(value):
        if not isinstance(value, Tensor):
            return value
        if id(value) not in leaves:
            leaves[id(value)] = value.detach().requires_grad_(value.requires_grad)
        return leaves[id(value)]

    inputs = [tree_map(given, (calls[block].args, calls[block].kwargs)) for block in chain[:1]]
    with Meter(*chain, inputs) as meter:
        outputs, before, work = (), 0, Work()
        for block in chain:
            before, work = meter.live, meter.work
            meter.peak = meter.live
            args, kwargs = tree_map(given, (calls[block].args, calls[block].kwargs))
            outputs = _tensors(_run(block, how, args, kwargs))
            del args, kwargs
            leaves |= {id(then): now for then, now in zip(calls[block].outputs, outputs, strict=True)}
        of_block = {id(output) for output in calls[chain[-1]].outputs}
        for key in [id(then) for block in chain[:-1] for then in calls[block].outputs if id(then) not in of_block]:
            del leaves[key]
        kept, forward = meter.live - before, meter.peak - before
        forward_work, work = meter.work - work, meter.work
        reached = [output for output in outputs if output.requires_grad]
        del outputs
        leaves.clear()
        meter.peak = meter.live
        torch.autograd.backward(reached, [torch.empty_like(output) for output in reached])
        return Pass(kept, forward, meter.peak - before), forward_work, (meter.work - work) * (1 / len(chain))


def _run(block: nn.Module, how: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    if how == "none":
        return block(*args, **kwargs)
    if how == "full":
        return checkpoint(block, *args, use_reentrant=False, **kwargs)
    return selective_checkpoint(block.forward, *args, parameters=list(block.parameters()), **kwargs)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _fp8_bytes(model: nn.Module) -> int:
    """Bytes of the copies that `fuse_transformer(model, fp8="no_grad")` makes: one per weight, four per row."""
    blocks = [(block, kind.fp8_layers) for _, block, kind in _modules(model) if kind.fp8_layers]
    layers = [layer for block, names in blocks[1:-1] for name, layer in block.named_modules() if name in names]
    return sum(layer.weight.numel() + 4 * layer.out_features for layer in layers if isinstance(layer, nn.Linear))


class Footprints:
    """The footprints of a backbone's networks, each measured once. Raises what the networks' classes raise for an
    architecture that cannot be built."""

    def __init__(self, backbone):
        self.backbone = backbone
        self._measured: dict[tuple, tuple[int, dict[int, Footprint]]] = {}

    def of(self, config: Config, role: str, batch: int) -> Footprint:
        """The role's footprint at `batch`; measured at the first batch asked for, scaled for others."""
        model, lora = config.model, config.lora
        dtype = torch.float32 if model.dtype == "float32" else torch.bfloat16
        architecture = repr(self.backbone.transformer_config(role))
        key = architecture, dtype, model.fuse, model.fp8, None if lora is None else lora.model_dump_json()
        if key not in self._measured:
            footprint = measure(
                *(self.backbone, role, batch, dtype), fused=model.fuse, fp8=model.fp8 != "off", lora=lora
            )
            self._measured[key] = batch, {batch: footprint}
        first, by_batch = self._measured[key]
        if batch not in by_batch:
            by_batch[batch] = by_batch[first].scaled(batch / first)
        return by_batch[batch]

    def at_work(self, config: Config) -> dict[str, Footprint]:
        """Each role's footprint at the batch of its passes: twice the configured one for a guided teacher."""
        batch, guided = config.engine.batch_size, config.distill.guidance_scale != 1.0
        batches = {"student": batch, "critic": batch, "teacher": 2 * batch if guided else batch}
        return {role: self.of(config, role, each) for role, each in batches.items()}
