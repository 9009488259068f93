"""benchmarks/run.py on a transformer's operations, attention and whole transformers: nothing wrong is timed, and every
figure is what it says."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODULES = [
    *(f"cases.{each}" for each in ("attention", "blocks", "networks", "transformer")),
    *(f"harness.{each}" for each in ("operation", "profile", "report", "timing")),
    *("cases", "run"),
]
CPU = torch.device("cpu")
DIFFERENTIABLE = (
    "adaln_modulate",
    "adaln_modulate_pair",
    "gated_residual",
    "gated_residual_adaln",
    "gated_residual_adaln_pair",
    "qk_norm",
    "qk_norm_rope",
    "gelu_tanh",
    "swiglu",
)
QUANTIZING = ("adaln_modulate_quantize", "gated_residual_adaln_quantize", "gelu_tanh_quantize", "quantize_rows")


@pytest.fixture(scope="module")
def modules():
    """The benchmark's modules, importable as they are when it runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield {name: importlib.import_module(name) for name in MODULES}
        for name in [name for name in sys.modules if name.partition(".")[0] in ("cases", "harness", "run")]:
            del sys.modules[name]


def pretend_to_be_fast(modules, patch):
    """No GPU, and figures taken in no time."""
    patch.setattr(torch.cuda, "is_available", lambda: False)
    patch.delenv("DPDMD_KERNELS", raising=False)
    patch.setattr(modules["harness.timing"], "copy_bandwidth", lambda device: 0.02)
    patch.setattr(modules["harness.timing"], "BATCH_SECONDS", 0.001)
    patch.setattr(modules["harness.timing"], "FEWEST_BATCHES", 2)
    patch.setattr(modules["harness.timing"].in_turns, "__defaults__", (0.0,))
    for name, value in {"SECONDS": 0.0, "WARMUP": 1, "DRAWS": 2, "STEPS": 3}.items():
        patch.setattr(modules["cases.transformer"], name, value)


@pytest.fixture
def cpu(modules, monkeypatch):
    pretend_to_be_fast(modules, monkeypatch)


def measure(modules, path, *arguments, status=0):
    assert modules["run"].main([*arguments, "--json", str(path)]) == status
    return json.loads(path.read_text())


# The operations of a block


def draw(modules, name, seed=0):
    """An operation and a set of its smallest inputs."""
    operation = modules["cases"].OPERATIONS[name]
    return operation, operation.draw("awkward", CPU, seed)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_what_ours_are_checked_against_is_what_they_define(name, modules):
    """Two formulas, written independently, agree in float64: outputs and the gradient of every input."""
    operation, inputs = draw(modules, name)
    got = operation.results(operation.ours, {key: each.double() for key, each in inputs.items()})
    exact = operation.truth(inputs)
    assert set(got) == set(exact) and len(got) > len(operation.outputs)
    for key, value in exact.items():
        assert value.any(), key
        assert (got[key] - value).norm() <= 1e-12 * value.norm(), key


def test_every_operation_is_tested_here(modules):
    operations = {each.name: each for each in modules["cases.blocks"].OPERATIONS}
    assert {name for name, each in operations.items() if each.backward} == set(DIFFERENTIABLE)
    assert set(operations) == {*DIFFERENTIABLE, *QUANTIZING}


def test_peers_are_what_diffusers_writes(modules):
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.normalization import RMSNorm

    blocks, (_, inputs) = modules["cases.blocks"], draw(modules, "qk_norm_rope")
    x = inputs["text_qkv"][:, :, 0]
    norm = RMSNorm(x.shape[-1], eps=blocks.EPS).bfloat16()
    norm.weight.data = inputs["text_q_weight"]
    assert torch.equal(blocks._rms_norm(x, norm.weight), norm(x))
    angles = [inputs[each][: x.shape[1]] for each in ("cos", "sin")]
    assert torch.equal(blocks._rotated(x, *angles), apply_rotary_emb(x, angles, sequence_dim=1))


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [  # in tensors of image tokens, or of the feed-forward layer's width, in bfloat16
        ("adaln_modulate", 2, 3),
        ("adaln_modulate_pair", 3, 4),
        ("adaln_modulate_quantize", 1.5, None),
        ("gated_residual", 3, 3),
        ("gated_residual_adaln", 4, 6),
        ("gated_residual_adaln_pair", 5, 8),
        ("gated_residual_adaln_quantize", 3.5, None),
        ("qk_norm", 6, 8),  # of the joint tokens
        ("qk_norm_rope", 6, 8),  # and the angles
        ("gelu_tanh", 2, 3),
        ("gelu_tanh_quantize", 1.5, None),
        ("swiglu", 3, 5),
        ("quantize_rows", 1.5, None),
    ],
)
def test_bytes_counted_by_hand(name, forward, backward, modules):
    operation, inputs = draw(modules, name)
    batch, image, text, channels, mlp, head_dim = 3, 13, 5, 72, 200, 24
    width = mlp if name.startswith(("gelu", "swiglu")) else channels
    tokens = image + text if name.startswith("qk") else image
    angles = 2 * 4 * tokens * head_dim if name == "qk_norm_rope" else 0
    ours = modules["harness.operation"].Implementation("reference", False, operation.ours)
    moved = operation.work(ours, inputs, operation.results(operation.ours, inputs))
    assert set(moved) == ({"forward"} if backward is None else {"forward", "backward"})
    for which, count in (("forward", forward), ("backward", backward)):
        if count is None:
            assert getattr(operation, which) is None
        else:
            assert moved[which] == 2 * count * batch * tokens * width + angles


def test_sets_outgrow_the_cache_and_differ(modules):
    for each in modules["cases.blocks"].OPERATIONS:
        (operation, one), (_, other) = (draw(modules, each.name, seed) for seed in (0, 1))
        count = operation.num_sets(one, cache_bytes=2**20)
        assert count * sum(one[name].nbytes for name in operation.forward.reads) > 2 * 2**20
        assert not any(torch.equal(one[name], other[name]) for name in one if name not in operation.constants)


def test_saved_bytes(modules):
    def function(x, weight):
        y = x.exp()  # keeps its result, which sin keeps, too: one storage
        return y.sin() * weight  # keeps sin's result, and the weight, which is given

    saved_for_backward = modules["harness.operation"].saved_for_backward
    x, weight = (torch.randn(5, 7, requires_grad=True) for _ in range(2))
    assert saved_for_backward(function, {"x": x, "weight": weight}) == 2 * 5 * 7 * 4
    assert saved_for_backward(lambda x: x.T.contiguous().T * x, {"x": x}) == 5 * 7 * 4
    assert saved_for_backward(lambda x: x.view(7, 5) * x.view(7, 5), {"x": x}) == 0


def test_compiled_peers_run_backward_twice(modules):
    """As a retained graph has it: what autograd keeps must not be written over."""
    operation, inputs = draw(modules, "gated_residual_adaln")
    compiled = torch.compile(operation.peer, dynamic=False, backend="aot_eager")
    implementation = modules["harness.operation"].Implementation("compile", True, compiled, operation.compile_context)
    subject = operation.subject(implementation, "backward")
    with subject.around():
        assert not torch._functorch.config.donated_buffer
        prepared = subject.prepare(inputs)
        first, second = subject.call(prepared), subject.call(prepared)
    assert all(torch.equal(*each) for each in zip(first, second, strict=True))
    assert torch._functorch.config.donated_buffer  # as it was, outside


class Negated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, upstream):
        return -upstream


def _scaled(right):
    return lambda **inputs: 1.02 * right(**inputs)


def _coarse(right):
    def coarse(**inputs):
        output = right(**inputs)  # all below the format's normal numbers
        return output._replace(
            values=(output.values.float() / 2**15).to(output.values.dtype), scale=output.scale * 2**15
        )

    return coarse


def _raise(**inputs):
    raise RuntimeError("out of luck\nand more")


WRONG = {
    "scaled": ("gelu_tanh", "ours", _scaled, "relative error of out"),
    "nan": ("gelu_tanh", "ours", lambda right: lambda x, bias: right(x, bias) * math.nan, "of out nan"),
    "unwritten": (
        "gelu_tanh",
        "ours",
        lambda right: lambda x, bias: torch.empty_like(x) + 0 * (x + bias),
        "of out nan",
    ),
    "one gradient": (
        "gated_residual",
        "ours",
        lambda right: lambda residual, gate, y, bias: right(residual, Negated.apply(gate), y, bias),
        "relative error of d gate 2.0e+00",
    ),
    "quantised too coarsely": ("quantize_rows", "ours", _coarse, "relative error of out"),
    "raises": ("gelu_tanh", "ours", lambda right: _raise, "RuntimeError: out of luck"),
    "peer": (
        "gelu_tanh",
        "peer",
        lambda right: lambda x, bias: right(x, bias).roll(x.element_size() % 8),
        "eager",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_not_timed(wrong, modules, cpu, monkeypatch, tmp_path, capsys):
    name, field, breaks, problem = WRONG[wrong]
    operations = modules["cases"].OPERATIONS
    changed = dataclasses.replace(operations[name], **{field: breaks(getattr(operations[name], field))})
    monkeypatch.setitem(operations, name, changed)
    result = measure(modules, tmp_path / "run.json", "--op", name, "adaln_modulate", status=1)
    assert {row["operation"] for row in result["blocks"]} == {"adaln_modulate"}
    assert problem in result["failures"][0] and "and more" not in result["failures"][0]
    assert all(each.startswith(f"{name} awkward, ") for each in result["failures"])
    printed = capsys.readouterr().out
    assert f"FAILED, and not timed: {name} awkward" in printed and f"│ {name} " not in printed


def test_rows_of_a_gpu(modules, cpu, monkeypatch):
    """The GPU's time, where there is one, is what bandwidth and peers are told by; a graph that cannot be captured costs
    that figure alone."""
    harness, timing = modules["harness.operation"], modules["harness.timing"]

    def in_graphs(subjects, sets, seconds):
        for subject in subjects.values():
            with subject.around():
                subject.call(subject.prepare(sets[0]))
        return {"reference": timing.Time(10.0, 1.0, 3, 1, [10.0, 10.0])}, {"eager": RuntimeError("no capture today")}

    monkeypatch.setattr(timing, "on_gpu_in_turns", in_graphs)
    run = harness.Run(CPU, ("reference",), ("eager",), copy_tb_s=0.5)
    operation, inputs = draw(modules, "gelu_tanh")
    found = operation.implementations(run, "awkward")
    run.device = torch.device("cuda")
    title, sets = operation.title("awkward"), [inputs, operation.draw("awkward", CPU, 1)]
    times = operation.take(run, title, found, ("backward",), sets)
    errors = {"out": 1e-3, "d x": 2e-3, "d bias": 3e-3}
    checked = {
        name: harness.Checked(errors, {"forward": 1, "backward": 10**7}, {"saved_bytes": saved})
        for name, saved in (("reference", 10), ("eager", 20))
    }
    ours, eager = rows = list(harness.make_rows(run, operation, "awkward", found, ("backward",), checked, times))
    assert set(ours["times"]) == {"backward", "gpu_backward"} and set(eager["times"]) == {"backward"}
    assert ours["tb_s"]["gpu_backward"] == 1.0 and ours["share_of_copy"]["gpu_backward"] == 2.0
    assert ours["errors"] == {"d x": 2e-3, "d bias": 3e-3} and (ours["saved_bytes"], eager["saved_bytes"]) == (10, 20)
    assert set(ours["ratios"]["eager"]) == {"backward"} and not eager["ratios"]
    assert run.left_out == ["gelu_tanh awkward, eager, GPU time alone, backward: no capture today"]
    (grid,) = modules["harness.report"].grids({"blocks": rows})
    ((*_, us, gpu_us, achieved, eager_takes, compile_takes, _, _),) = grid.rows
    assert gpu_us == "10.0 ± 1.0" and us and achieved == "1.000 (200%)" and not eager_takes and not compile_takes


def test_preparation_is_not_timed(modules, clock, monkeypatch):
    timing, prepared, seen = modules["harness.timing"], [], []
    monkeypatch.setattr(timing, "time", clock)

    def prepare(inputs):
        clock.advance(20)
        prepared.append(inputs)
        return inputs + 1

    def call(inputs):
        clock.advance(1e-3)
        seen.append(inputs)

    times, _ = timing.in_turns({"one": timing.Subject(call, prepare=prepare)}, [0, 10], seconds=0.0)
    assert prepared == [0, 10] and set(seen) == {1, 11} and times["one"].median_us == pytest.approx(1000)


# Attention


def test_attention(modules, cpu, tmp_path):
    result = measure(modules, tmp_path / "run.json", "--op", "attention")
    assert [row["implementation"] for row in result["attention"]] == ["auto", "sdpa", "flash"] and not result[
        "failures"
    ]
    B, S, H, D = 2, 113, 3, 24
    for row in result["attention"]:
        counted = {"forward": 4 * B * H * S * S * D, "backward": 10 * B * H * S * S * D}
        assert row["operations"] == pytest.approx(counted, rel=1e-4)
        for way, taken in row["times"].items():
            assert row["tflop_s"][way] == pytest.approx(row["operations"][way] / taken["median_us"] / 1e6, rel=1e-3)
        for name, error in row["errors"].items():
            assert 0 < error <= 2 * row["errors_plain"][name]
        assert set(row["ratios"]) == {"auto", "sdpa", "flash"} - {row["implementation"]}
    assert modules["cases.attention"].SIZES["4x4429x24x64"] == (4, 4429, 24, 64)


@pytest.mark.parametrize("wrong", ["o", "dk"])
def test_attention_that_is_wrong_is_not_timed(wrong, modules, cpu, monkeypatch, tmp_path):
    cases, operations = modules["cases.attention"], modules["cases"].OPERATIONS
    right = cases.attention

    def attention(q, k, v, backend):
        if backend != "flash":
            return right(q, k, v, backend=backend)
        if wrong == "dk":
            k = k + 0.1 * (k - k.detach())
        return right(q, k, v, backend=backend) * (1.03 if wrong == "o" else 1.0)

    monkeypatch.setitem(operations, "attention", dataclasses.replace(operations["attention"], ours=attention))
    monkeypatch.setattr(cases, "CPU_BACKENDS", (*cases.CPU_BACKENDS, "cudnn"))
    result = measure(modules, tmp_path / "run.json", "--op", "attention", status=1)
    assert [row["implementation"] for row in result["attention"]] == ["auto", "sdpa"]
    assert result["failures"][0].startswith(f"attention awkward, flash: relative error of {wrong} ")
    assert any(
        "attention awkward, cudnn: RuntimeError: backend='cudnn' needs CUDA tensors" in each
        for each in result["left_out"]
    )


# Whole transformers


@pytest.fixture(scope="module")
def whole(modules, tmp_path_factory):
    """Every part on the small networks."""
    file = tmp_path_factory.mktemp("transformer") / "run.json"
    with pytest.MonkeyPatch.context() as patch:
        pretend_to_be_fast(modules, patch)
        return file, measure(modules, file, "--op", "transformer", "--part", "all", "--batch", "2")


def rows_of(result, part):
    return [row for row in result["transformer"] if row["part"] == part]


def test_times_of_whole_transformers(whole):
    _, result = whole
    assert not result["failures"] and result["left_out"] == ["transformer, breakdown: needs a GPU"]
    sizes = {
        "forward": {"sd35 forward b2": {"eager", "fused", "fused_fp8"}},
        "training": {
            "sd35 training b2": {"eager", "fused"},
            "sd35 training b2 checkpointing": {"eager", "fused", "fused_selective"},
        },
        "flux": {"flux forward b2": {"eager", "fused", "fused_fp8"}, "flux training b2": {"eager", "fused"}},
    }
    for part, expected in sizes.items():
        rows = rows_of(result, part)
        assert {s: {row["implementation"] for row in rows if row["size"] == s} for s in expected} == expected
        for row in rows:
            eager = next(o for o in rows if o["size"] == row["size"] and o["implementation"] == "eager")
            for way, ratio in row["ratios"].get("eager", {}).items():
                assert ratio == pytest.approx(
                    eager["times"][way]["median_us"] / row["times"][way]["median_us"], rel=1e-3
                )
            if row["implementation"] == "eager":
                assert row["difference"] == 0 and not row["ratios"]
            else:  # another module than the stock one ran, and came to nearly the same
                assert 1e-4 < row["difference"] < 0.03 and set(row["ratios"]) == {"eager"}
    for row in rows_of(result, "training"):
        assert list(row["times"]) == ["training", "training_forward", "training_backward"]
        assert all(taken["median_us"] > 0 for taken in row["times"].values())
    by_variant = {row["implementation"]: row["difference"] for row in rows_of(result, "forward")}
    assert by_variant["fused_fp8"] != by_variant["fused"]


def test_a_training_pass(modules, clock, monkeypatch):
    """Gradients are made anew: a pass that adds to them moves more bytes. Forward and backward are timed apart."""
    monkeypatch.setattr(modules["cases.transformer"], "time", clock)
    weight = torch.nn.Linear(3, 3)
    model = torch.nn.Module()

    def forward(x):
        clock.advance(1)
        output = weight(x)
        output.register_hook(lambda gradient: clock.advance(3))
        return (output,)

    model.weight, model.forward = weight, forward
    x = torch.randn(5, 3)
    call = modules["cases.transformer"]._training_pass(model, {"x": x}, torch.ones(5, 3))
    for _ in range(2):
        seconds = call()
        torch.testing.assert_close(weight.weight.grad, x.sum(0).expand(3, 3))
    assert seconds == {"training": 4, "training_forward": 1, "training_backward": 3}


def test_accuracy_of_whole_transformers(whole, modules):
    _, result = whole
    output, gradients, *groups = rows_of(result, "accuracy")
    (single,) = rows_of(result, "accuracy of single parameters")
    network = modules["cases.networks"].build(modules["cases.networks"].NETWORKS["small"]["sd35"], CPU, torch.bfloat16)
    names = [name for name, _ in network.named_parameters()]
    assert (output["group"], gradients["group"]) == ("output", "all gradients")
    assert {row["group"] for row in groups} == set(map(modules["cases.transformer"].group_of, names))
    assert sum(row["parameters"] for row in groups) == gradients["parameters"] == single["parameters"] == len(names)
    for row in (output, gradients):
        assert all(1e-3 < error < 0.03 for error in row["errors"].values()) and row["ratio"] != 1
        assert row["ratio"] == pytest.approx(row["errors"]["fused"] / row["errors"]["eager"], rel=1e-3)
    assert single["median_ratio"] < 1.25 and single["worst_ratio"] >= single["median_ratio"]
    (steps,) = rows_of(result, "steps")
    assert set(steps["losses"]) == {"float32", "eager", "fused"}
    for losses in steps["losses"].values():
        assert len(losses) == 3
    exact = steps["losses"]["float32"]
    assert exact[0] > exact[1] > exact[2]
    assert all(0 < each < 0.01 for each in steps["deviation"].values())


def test_errors_are_those_of_the_definition(modules):
    """Relative errors over all draws and tensors of a group, by hand; what is 0 and should be is not wrong."""
    squares = {
        "eager": {"a": [(1.0, 100.0), (3.0, 300.0)], "b": [(0.0, 0.0)]},
        "fused": {"a": [(0.5, 100.0), (0.5, 300.0)], "b": [(0.0, 0.0)]},
    }
    compared = modules["cases.transformer"]._compared
    assert compared(squares, ["a"]) == {"errors": {"eager": 0.1, "fused": 0.05}, "ratio": 0.5}
    assert compared(squares, ["b"]) == {"errors": {"eager": 0.0, "fused": 0.0}, "ratio": 1.0}
    squares["fused"]["b"] = [(1.0, 0.0)]
    assert compared(squares, ["b"])["ratio"] == math.inf


def test_fp8_of_whole_transformers(whole):
    _, result = whole
    rows = rows_of(result, "fp8")
    assert [row["difference"] for row in rows] == pytest.approx([0.01, 0.05, 0.2], rel=0.06)
    for row in rows:
        assert len({*row["velocity_errors"].values()}) == len({*row["difference_errors"].values()}) == 3
        for variant, error in row["velocity_errors"].items():
            assert 1e-3 < error < 0.05
            # Errors of teacher and critic that have nothing to do with each other: sqrt(2) of one against the difference.
            assert row["difference_errors"][variant] < 2 * error / row["difference"]
    one, _, last = (row["difference_errors"] for row in rows)
    assert all(one[variant] > 5 * last[variant] for variant in one)


def test_a_fused_transformer_that_is_wrong_is_not_timed(modules, cpu, monkeypatch, tmp_path):
    networks = modules["cases.networks"]
    right = networks.as_variant

    @contextlib.contextmanager
    def as_variant(model, variant):
        with right(model, variant):
            factor = 1.3 if variant == "fused" else 1.0
            model.proj_out.weight.data *= factor
            yield
            model.proj_out.weight.data /= factor

    monkeypatch.setattr(networks, "as_variant", as_variant)
    arguments = ("--op", "transformer", "--part", "forward", "--batch", "1", "--variant", "fused", "fused_fp8")
    result = measure(modules, tmp_path / "run.json", *arguments, status=1)
    assert {row["implementation"] for row in result["transformer"]} == {"fused_fp8"}
    (failure,) = result["failures"]
    assert failure.startswith("sd35 forward b1, fused: its results are 3.0e-01 from the stock module's")


def test_variants_leave_the_model_as_it_was(modules, monkeypatch):
    """Blocks share what is compiled: one graph for each kind of block, in whichever round."""
    networks = modules["cases.networks"]
    monkeypatch.setattr(networks, "COMPILE", {"dynamic": False, "backend": "eager"})
    network = networks.NETWORKS["small"]["sd35"]
    model = networks.build(network, CPU, torch.float32)
    inputs, _ = networks.make_inputs(network, 1, CPU, torch.float32)
    before, outputs = copy.deepcopy(list(model.state_dict().items())), {}
    for variant in (*networks.VARIANTS, "compiled", "eager"):
        graphs = networks.graphs_and_breaks()
        with networks.as_variant(model, variant), torch.no_grad():
            outputs.setdefault(variant, []).append(model(**inputs)[0])
        made = networks.graphs_and_breaks()[0] - graphs[0]
        # Of four blocks two have dual attention, and the last one no text to go on with.
        assert made == (3 if variant == "compiled" and len(outputs["compiled"]) == 1 else 0), variant
        assert networks.graphs_and_breaks()[1] == graphs[1]
    assert torch.equal(*outputs["eager"]) and torch.equal(*outputs["compiled"])
    torch.testing.assert_close(outputs["fused"][0], outputs["eager"][0], rtol=1e-4, atol=1e-5)
    assert not torch.equal(outputs["fused_fp8"][0], outputs["fused"][0])
    assert torch.equal(outputs["fused_selective"][0], outputs["fused"][0]) and not model.is_gradient_checkpointing
    assert all(
        name == other and torch.equal(a, b)
        for (name, a), (other, b) in zip(before, model.state_dict().items(), strict=True)
    )
    for module in model.modules():
        assert "forward" not in vars(module) and module._compiled_call_impl is None


def test_configurations_are_the_published_ones(modules):
    from dpdmd.backbones.sd3 import KNOWN

    full = modules["cases.networks"].NETWORKS["full"]
    assert full["sd35"].config == KNOWN["stabilityai/stable-diffusion-3.5-medium"]
    assert (full["sd35"].side, full["sd35"].text, full["flux"].side, full["flux"].text) == (128, 333, 128, 512)
    # hidden 3072, 24 heads of 128, 4 double and 8 single blocks
    flux = full["flux"].config
    assert (flux["num_attention_heads"], flux["attention_head_dim"]) == (24, 128)
    assert (flux["num_layers"], flux["num_single_layers"]) == (4, 8)


# GPU time by kind, and the tables

NAMES = {
    "attention": [
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x64_4x1x1_cga1x1x1_kernel0_0",
        "void cudnn::fusion::compute_dot_do_o_specialized<false, 64, 128>(...)",
        "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128, 64, 4>>(...)",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<...>)",
        "_forward_kernel",
        "_dkv_kernel",
    ],
    "GEMM": [
        "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off",
        "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<cutlass::gemm::kernel::...>>(...)",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>(...)",
    ],
    "memory-bound": [
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>(...)",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<...>(...)",
        "triton_poi_fused__scaled_dot_product_cudnn_attention_add_addmm_cat_3",
        "triton_red_fused_mm_native_layer_norm_7",
        "_forward",
        "_activation_backward_kernel",
        "Memcpy DtoD (Device -> Device)",
    ],
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NAMES.items() for name in names])
def test_kinds_of_kernels(kind, name, modules):
    assert modules["harness.profile"].kind(name) == kind


def trace():
    """1 ms of GEMM, twice; 2 ms of attention; 0.5 ms of copies, half of which beside the attention."""
    spans = [("nvjet", 0, 1000), ("nvjet", 1200, 1000), ("sdpa", 2200, 2000), ("Memcpy", 3950, 500)]
    events = [
        {"cat": "gpu_memcpy" if name == "Memcpy" else "kernel", "name": name, "ts": ts, "dur": dur}
        for name, ts, dur in spans
    ]
    return {
        "traceEvents": [*events, {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0, "dur": 9}, {"ph": "M"}]
    }


def test_time_by_kind(modules):
    gpu_time = modules["harness.profile"]
    found = gpu_time.by_kind(gpu_time.kernels_of(trace()), wall_us=5000)
    assert found["milliseconds"] == pytest.approx({"GEMM": 2, "attention": 2, "memory-bound": 0.5, "idle": 0.75})
    assert found["num_kernels"] == 4 and found["kernels"][0] == ["GEMM", 2.0, 2, "nvjet"]
    assert gpu_time.by_kind(gpu_time.kernels_of(trace()), wall_us=1000)["milliseconds"]["idle"] == 0


def test_breakdown(modules, cpu, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    gpu_time, networks = modules["harness.profile"], modules["cases.networks"]
    monkeypatch.setattr(gpu_time, "record", lambda call: [call(), gpu_time.kernels_of(trace())][1])
    build, make_inputs = networks.build, networks.make_inputs
    monkeypatch.setattr(networks, "build", lambda network, device, dtype: build(network, CPU, dtype))
    monkeypatch.setattr(
        networks, "make_inputs", lambda network, batch, _, dtype: make_inputs(network, batch, CPU, dtype)
    )
    run = modules["harness.operation"].Run(torch.device("cuda"), ())
    variants = ("eager", "fused", "fused_fp8")
    state = modules["cases.transformer"].State(run, "small", (1,), variants)
    modules["cases.transformer"].run_part(state, "breakdown")
    assert not run.failures and not run.left_out
    bars = [(row["size"], row["implementation"]) for row in run.tables["transformer"]]
    assert bars == [
        (f"{name} {which} b1", variant)
        for name in ("sd35", "flux")
        for which, served in (("forward", variants), ("training", variants[:2]))
        for variant in served
    ]
    file, picture = tmp_path / "transformer.json", tmp_path / "transformer.png"
    stored = {"machine": {"gpu": "NVIDIA H100"}, "rows": [], "transformer": run.tables["transformer"]}
    file.write_text(json.dumps(stored))
    other = tmp_path / "blocks.json"
    other.write_text(json.dumps(on_paper()))
    assert modules["run"].main(["--op", "transformer", "--plot", str(other), "--output", str(picture)]) == 2
    arguments = ["--op", "transformer", "--plot", str(other), str(file), "--output", str(picture)]
    assert modules["run"].main(arguments) == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    (grid,) = modules["harness.report"].grids(stored)
    assert grid.rows[0][:6] == [
        "sd35 forward b1",
        "eager",
        "2.0",
        "2.0",
        "0.5",
        f"{run.tables['transformer'][0]['milliseconds']['idle']:.1f}",
    ]


def on_paper(gpu="NVIDIA H100 80GB HBM3"):
    """A GPU's run as --json stores it: 100 us for everything."""
    time_ = {"median_us": 12345.0, "spread_us": 123.0, "batches": 9, "calls_a_batch": 5, "rounds_us": [99.0, 101.0]}
    result = {
        "machine": {"gpu": gpu},
        "packages": {"torch": "2.11.0"},
        "command": "python benchmarks/run.py",
        "rows": [],
    }
    blocks = []
    for which in ("forward", "backward"):
        for name in ("triton", "eager", "compile"):
            ways = (which, f"gpu_{which}")
            ratios = {} if name != "triton" else {peer: dict.fromkeys(ways, 12.3) for peer in ("eager", "compile")}
            blocks.append(
                {
                    "operation": "gated_residual_adaln_quantize",
                    "size": "sd35-b4",
                    "pass": which,
                    "implementation": name,
                    "peer": name != "triton",
                    "bytes": 10**9,
                    "errors": {"out": 1.7e-3},
                    "saved_bytes": 10**9,
                    "times": {way: dict(time_) for way in ways},
                    "tb_s": dict.fromkeys(ways, 2.9),
                    "share_of_copy": dict.fromkeys(ways, 0.97),
                    "ratios": ratios,
                }
            )
    backends = ("auto", "triton", "triton+cudnn", "cudnn", "flash", "efficient", "sdpa", "xformers")
    attention = [
        {
            "operation": "attention",
            "size": "2x4608x24x128",
            "implementation": backend,
            "peer": False,
            "errors": dict.fromkeys(("o", "dq", "dk", "dv"), 2e-3),
            "errors_plain": dict.fromkeys(("o", "dq", "dk", "dv"), 5e-3),
            "times": {way: dict(time_) for way in ("gpu_forward", "gpu_backward")},
            "tflop_s": {"gpu_forward": 100.0 * (index + 1), "gpu_backward": 50.0},
            "ratios": {},
        }
        for index, backend in enumerate(backends)
    ]
    return {**result, "blocks": blocks, "attention": attention, "cancellation": [], "copy_tb_s": 3.0}


def test_tables_do_not_wrap(modules, capsys):
    report = modules["harness.report"]
    report.print_tables(report.make_console(), on_paper())
    printed = capsys.readouterr().out
    assert "…" not in printed and max(map(len, printed.splitlines())) <= 200
    assert "2.900 (97%)" in printed and printed.count("12.30x") == 4
    (row,) = (line for line in printed.splitlines() if "2x4608x24x128" in line and "forward" in line)
    # auto 100, triton 200, cudnn 400, sdpa 700, the best of them 800
    assert [cell.strip() for cell in row.split("│")][-4:-1] == ["0.50x", "0.14x", "0.12x"]


def test_markdown(modules, whole, tmp_path, capsys):
    file, _ = whole
    stored = tmp_path / "h100.json"
    stored.write_text(json.dumps(on_paper()))
    assert modules["run"].main(["--markdown", str(file), str(stored)]) == 0
    printed = capsys.readouterr().out
    for title in ("Whole transformers", "Losses of AdamW", "Attention, TFLOP/s", "Memory-bound operations of a block"):
        assert f"\n**{title}" in printed
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    tables = printed.split("\n**")[1:]
    assert len(tables) == 7 and len(lines) > 30
    for table in tables:
        widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
        assert len(widths) == 1, table
    assert "NVIDIA H100 80GB HBM3, torch 2.11.0, `python benchmarks/run.py`" in printed


def test_stored_runs_are_compared_in_all_their_parts(modules, whole):
    _, result = whole
    report, stored = modules["harness.report"], on_paper()
    assert report.compared(stored, stored) == 2 * 3 * 2 + 8 * 2 and report.slower(stored, stored) == []
    now = copy.deepcopy(stored)
    now["attention"][0]["times"]["gpu_backward"]["median_us"] = 20000.0
    (sentence,) = report.slower(now, stored)
    assert sentence.startswith("attention 2x4608x24x128 auto, gpu backward: 12345.0 to 20000.0 us")
    timed = [row for row in result["transformer"] if "times" in row]
    assert report.compared(result, result) == sum(len(row["times"]) for row in timed) > 0


# The command


def test_a_run_that_is_cut_off_has_what_it_found(modules, cpu, monkeypatch, tmp_path, capsys):
    operations = modules["cases"].OPERATIONS

    def make(size, draw):
        raise KeyboardInterrupt

    monkeypatch.setitem(operations, "swiglu", dataclasses.replace(operations["swiglu"], make=make))
    assert modules["run"].main(["--op", "gelu_tanh", "swiglu", "--json", str(tmp_path / "run.json")]) == 130
    assert {row["operation"] for row in json.loads((tmp_path / "run.json").read_text())["blocks"]} == {"gelu_tanh"}
    assert "gelu_tanh, awkward, reference, backward " in capsys.readouterr().err


def test_what_cannot_be_asked_for(modules, cpu, capsys):
    run = modules["run"]
    refused = {
        ("--part", "forward"): "--part needs --op transformer",
        ("--op", "attention", "--batch", "4"): "--batch needs --op transformer",
        ("--op", "transformer", "--batch", "0"): "a whole number from 1 to",
        ("--op", "transformer", "--part", "backward"): "breakdown",
        ("--op", "transformer", "--variant", "fast"): "fused_fp8",
    }
    for arguments, message in refused.items():
        with pytest.raises(SystemExit) as stop:
            run.main(list(arguments))
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert run.main(["--op", "adaln_modulate", "--size", "video"]) == 2
    assert "--size video: adaln_modulate has sd35-b4, flux-b4, awkward" in capsys.readouterr().err


def test_without_a_name_everything_but_whole_transformers(modules, cpu):
    run = modules["run"]
    state = run.Run(torch.device("cuda"), ("triton",))
    named = [name for name, _ in run.plan(state, run.parse([]))]
    blocks = modules["cases.blocks"].OPERATIONS
    assert {f"{each.name} {size}" for each in blocks for size in each.sizes if size != "awkward"} <= set(named)
    assert {"attention 4x4429x24x64", "attention 4x4429x24x96", "dmd_loss video"} <= set(named)
    assert not any("transformer" in name or name == "attention awkward" for name in named)
    parts = [name for name, _ in run.plan(state, run.parse(["--op", "transformer"]))]
    assert parts == [f"transformer {part}" for part in ("forward", "training", "breakdown", "accuracy", "fp8", "flux")]


@pytest.mark.gpu
@pytest.mark.gpu_memory(6)
@pytest.mark.minutes
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(modules, monkeypatch, tmp_path):
    monkeypatch.setattr(modules["cases.blocks"].BlockOperation, "compile_seconds", math.inf)  # on a slow machine, too
    named = ("gated_residual_adaln", "gelu_tanh_quantize", "qk_norm", "attention")
    result = measure(modules, tmp_path / "run.json", "--op", *named, "--size", "awkward")
    assert not result["failures"]
    for row in result["blocks"]:
        assert {row["pass"], f"gpu_{row['pass']}"} == set(row["times"]), result["left_out"]
    assert {row["implementation"] for row in result["blocks"]} == {"triton", "eager", "compile"}
    by_backend = {row["implementation"]: row for row in result["attention"]}
    assert {"auto", "triton", "sdpa"} <= set(by_backend)
    assert set(by_backend["triton"]["times"]) == {"gpu_forward", "gpu_backward"}
    arguments = ("--op", "transformer", "--size", "small", "--variant", "eager", "fused", "fused_fp8")
    result = measure(modules, tmp_path / "transformer.json", *arguments)
    assert not result["failures"] and not result["left_out"]
    assert {row["part"] for row in result["transformer"]} >= {
        "forward",
        "training",
        "breakdown",
        "accuracy",
        "fp8",
        "flux",
    }
    assert all(row["peak_bytes"] > 0 for row in rows_of(result, "training"))
    assert all(row["milliseconds"]["GEMM"] > 0 for row in rows_of(result, "breakdown"))
