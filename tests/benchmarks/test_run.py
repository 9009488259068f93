"""benchmarks/run.py: nothing wrong is timed, every figure is what it says, and a stored run is compared fairly."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.metadata
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from processes import run_command

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
MODULES = {path.name.removesuffix(".py") for path in BENCHMARKS.iterdir() if path.suffix == ".py" or path.is_dir()}
LOSSES = ["dmd_loss", "dmd_loss_x0", "v_prediction_loss", "flow_matching_loss", "x_prediction_loss"]
OPERATIONS = [*LOSSES, "renoise", "renoise_philox", "guided_euler_step"]


@pytest.fixture(scope="module")
def modules():
    """The benchmark's modules, importable as they are when it runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        names = ("cases", "cases.adamw", "cases.losses", "harness.operation", "harness.report", "harness.timing", "run")
        yield {name: importlib.import_module(name) for name in names}
        for name in [name for name in sys.modules if name.partition(".")[0] in MODULES]:
            del sys.modules[name]


@pytest.fixture
def cpu(modules, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("DPDMD_KERNELS", raising=False)
    monkeypatch.setattr(modules["harness.timing"], "copy_bandwidth", lambda device: 0.02)  # half a second to measure


def start_on_cpu(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "DPDMD_KERNELS"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    return run_command([sys.executable, BENCHMARKS / "run.py", *arguments], env=environment)


def made_up(implementations=("cuda", "eager"), operations=("dmd_loss", "renoise"), gpu="NVIDIA H100 80GB HBM3"):
    """A run as --json stores it: 100 us for everything, 2 us of spread."""
    ways = ("forward", "forward_backward", "forward_backward_one_thread", "gpu_forward", "gpu_forward_backward")
    rows = []
    for operation in operations:
        kept = [way for way in ways if operation in LOSSES or "backward" not in way]
        for size, moved in (("sd35-b1", 2**21), ("video", 2**30)):
            for name in implementations:
                time = {
                    "median_us": 100.0,
                    "spread_us": 2.0,
                    "batches": 9,
                    "calls_a_batch": 5,
                    "rounds_us": [99.0, 101.0],
                }
                peer = name in ("eager", "compile")
                ratios = {} if peer else {each: dict.fromkeys(kept, 1.0) for each in implementations[1:]}
                rows.append(
                    {
                        "operation": operation,
                        "size": size,
                        "implementation": name,
                        "peer": peer,
                        "bytes": moved,
                        "bytes_counted": "reads x; writes the result: 4 bytes an element",
                        "error": {"result": 1.6e-3, "loss": 1e-8, "moments": None},
                        "times": {way: dict(time) for way in kept},
                        "tb_s": dict.fromkeys(kept, moved / 1e8),
                        "share_of_copy": dict.fromkeys(kept, 0.5),
                        "ratios": ratios,
                    }
                )
    machine = {"gpu": gpu}
    return {"machine": machine, "packages": {}, "copy_tb_s": 3.0, "rows": rows, "cancellation": [], "commit": "abc"}


def test_without_a_gpu(tmp_path):
    done = start_on_cpu("--json", tmp_path / "run.json")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "these are CPU figures" in done.stdout and "say nothing about a GPU" in done.stdout
    result = json.loads((tmp_path / "run.json").read_text())
    assert result["device"] == "cpu" and result["machine"]["gpu"] is None and result["machine"]["cores"]
    assert result["packages"]["torch"] and result["dtype"] == "bfloat16" and "commit" in result
    assert result["command"].startswith("python benchmarks/run.py --json")
    assert result["failures"] == [] and result["left_out"] == []
    assert result["seconds"] > 0
    found = {(row["operation"], row["size"], row["implementation"]) for row in result["rows"]}
    assert found == {(o, s, i) for o in OPERATIONS for s in ("sd35-b1", "awkward") for i in ("reference", "eager")}
    for row in result["rows"]:
        assert set(row["times"]) == {"forward", *(["forward_backward"] if row["operation"] in LOSSES else [])}
        for way, time in row["times"].items():
            assert time["median_us"] > 0 and time["spread_us"] >= 0
            assert row["tb_s"][way] == pytest.approx(row["bytes"] / time["median_us"] / 1e6, rel=1e-3)
            assert row["share_of_copy"][way] == pytest.approx(row["tb_s"][way] / result["copy_tb_s"], rel=1e-3)
        errors = row["error"]
        assert errors["moments"] is not None or 0 < errors["result"] <= 2**-8
        assert (errors["loss"] is not None) == (row["operation"] in LOSSES)
    check_ratios(result["rows"])
    check_blocks(result)
    check_optimizer(result)
    assert {(row["size"], row["implementation"]) for row in result["attention"]} >= {("awkward", "auto")}
    assert result["transformer"] == []  # by name only
    check_cancellation(result["cancellation"])


def check_ratios(rows):
    medians = {
        (row["operation"], row["size"], row["implementation"], way): time["median_us"]
        for row in rows
        for way, time in row["times"].items()
    }
    for row in rows:
        assert set(row["ratios"]) == (set() if row["peer"] else {"eager"})
        for way, ratio in row["ratios"].get("eager", {}).items():
            eager, ours = (
                medians[row["operation"], row["size"], name, way] for name in ("eager", row["implementation"])
            )
            assert ratio == pytest.approx(eager / ours, rel=1e-3)


def check_blocks(result):
    passes = {row["operation"]: set() for row in result["blocks"]}
    assert len(passes) == 13
    for row in result["blocks"]:
        passes[row["operation"]].add(row["pass"])
        way = row["pass"]
        assert set(row["times"]) == {way} and row["implementation"] in ("reference", "eager")
        assert row["tb_s"][way] == pytest.approx(row["bytes"] / row["times"][way]["median_us"] / 1e6, rel=1e-3)
        assert all(name.startswith("d ") == (way == "backward") for name in row["errors"])
        assert set(row["ratios"]) == (set() if row["peer"] else {"eager"})
    assert all(
        found == {"forward"} if "quantize" in name else found == {"forward", "backward"}
        for name, found in passes.items()
    )


def check_optimizer(result):
    rows = {row["implementation"]: row for row in result["optimizer"]}
    assert set(rows) == {"reference float32", "reference bfloat16", "reference float8", "eager"}
    counted = {"float32": 28.0, "bfloat16": 20.0, "float8": 16 + 2 * 2 * 4 * -(-100_003 // 256) / 100_003}
    for row in rows.values():
        assert row["size"] == "awkward" and set(row["times"]) == {"step"}
        assert row["bytes_a_parameter"] == pytest.approx(counted[row["form"]], rel=1e-3)
        assert row["tb_s"]["step"] == pytest.approx(row["bytes"] / row["times"]["step"]["median_us"] / 1e6, rel=1e-3)
        assert 0 < row["errors"]["change"] < 1e-3 and 0 < row["errors"]["weight"] < 2**-8
        assert set(row["ratios"]) == (set() if row["peer"] else {"eager"})


@pytest.mark.parametrize("wrong", ["unwritten", "the weight", "one end", "a moment", "raises", "peer"])
def test_a_wrong_optimizer_step_is_not_timed(wrong, modules, cpu, monkeypatch, tmp_path, capsys):
    adamw, operations = modules["cases.adamw"], modules["cases"].OPERATIONS
    right = adamw.adamw_step

    def step(master, exp_avg, exp_avg_sq, gradient, *, weight, **settings):
        if wrong == "unwritten" and settings["step"] > 1:
            return
        right(master, exp_avg, exp_avg_sq, gradient, weight=None if wrong == "the weight" else weight, **settings)
        if settings["step"] > 1 and wrong == "one end":
            master[-1000:] += 1e-4
        if settings["step"] > 1 and wrong == "a moment":
            (exp_avg_sq.scales if isinstance(exp_avg_sq, adamw.Float8State) else exp_avg_sq).mul_(1.5)
        if settings["step"] > 1 and wrong == "raises":
            raise RuntimeError("out of luck")

    if wrong == "peer":
        idle = dataclasses.replace(operations["adamw_step"], peer=lambda shard: lambda: None)
        monkeypatch.setitem(operations, "adamw_step", idle)
    else:
        monkeypatch.setattr(adamw, "adamw_step", step)
    assert modules["run"].main(["--op", "adamw_step", "--json", str(tmp_path / "run.json")]) == 1
    assert "FAILED, and not timed: adamw_step awkward, " in capsys.readouterr().out
    result = json.loads((tmp_path / "run.json").read_text())
    assert result["optimizer"] == [] and len(result["failures"]) >= (1 if wrong == "peer" else 3)


def test_an_optimizer_peer_that_cannot_run_is_left_out(modules, cpu, monkeypatch, capsys):
    operations = modules["cases"].OPERATIONS
    monkeypatch.setitem(operations, "adamw_step", dataclasses.replace(operations["adamw_step"], peer=_raise))
    assert modules["run"].main(["--op", "adamw_step", "--size", "awkward"]) == 0
    printed = capsys.readouterr().out
    assert "left out: adamw_step awkward, eager: RuntimeError: out of luck" in printed and "reference float8" in printed


def test_optimizer_rows_of_a_gpu(modules, cpu, monkeypatch):
    """GPU time alone has its column, a graph that cannot be captured costs that figure, and memory that is not there the
    size."""
    operation, timing, step = (
        modules["harness.operation"],
        modules["harness.timing"],
        modules["cases"].OPERATIONS["adamw_step"],
    )
    state = operation.Run(torch.device("cpu"), ("reference",), ("eager",), copy_tb_s=2.0)
    taken = timing.Time(10.0, 1.0, 3, 1, [10.0, 10.0])

    def graphs(subjects, sets, seconds):
        assert set(subjects) == {"reference float32", "reference bfloat16", "reference float8", "eager"}
        return {name: taken for name in subjects if name != "eager"}, {"eager": RuntimeError("no capture today")}

    class Device:
        """Of tensors the CPU, of the run a GPU."""

        type = "cuda"

    monkeypatch.setattr(operation, "Draw", lambda device, seed, draw=operation.Draw: draw(torch.device("cpu"), seed))
    monkeypatch.setattr(timing, "on_gpu_in_turns", graphs)
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 2**20)
    state.device = Device()
    operation.measure(state, step, "awkward")
    assert not state.failures and len(state.tables["optimizer"]) == 4
    for row in state.tables["optimizer"]:
        assert set(row["times"]) == ({"step"} if row["peer"] else {"step", "gpu_step"})
    assert state.left_out == ["adamw_step awkward, eager, GPU time alone, step: no capture today"]

    def full(*arguments):
        raise torch.OutOfMemoryError("tried to allocate\nmuch")

    operation.measure(state, dataclasses.replace(step, make=full), "256m")
    assert state.left_out[1:] == ["adamw_step 256m: tried to allocate"] and len(state.tables["optimizer"]) == 4


def check_cancellation(rows):
    by_case = {(row["difference"], row["t"]): row for row in rows}
    assert len(rows) == len(by_case) == 12
    for row in rows:
        assert row["ours_x_float32"] < 1e-6
        assert row["ours_x_bfloat16"] < 2**-8  # the gradient's own rounding
        assert row["x0_bfloat16_pseudo_target"] > 10 * row["ours_x_bfloat16"]
    # What the arithmetic of other trainers was found to cost where teacher and critic differ by 5 %.
    assert by_case[0.05, 0.1]["x0_bfloat16"] == pytest.approx(0.3, abs=0.05)
    assert by_case[0.05, 0.03]["x0_bfloat16"] == pytest.approx(0.95, abs=0.1)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        return 2 * upstream


def _raise(*shard, **inputs):
    raise RuntimeError("out of luck")


WRONG = {
    "scaled": ("renoise", "ours", lambda right: lambda **inputs: 1.01 * right(**inputs), "relative error"),
    "nan": ("renoise", "ours", lambda right: lambda **inputs: right(**inputs) * math.nan, "relative error nan"),
    "unwritten": ("renoise", "ours", lambda right: lambda x, **rest: torch.empty_like(x), "relative error nan"),
    "one sample": (
        "renoise",
        "ours",
        lambda right: lambda **inputs: right(**inputs).index_fill_(0, torch.tensor(2), 1),
        "",
    ),
    "gradient": (
        "v_prediction_loss",
        "ours",
        lambda right: lambda **inputs: Doubled.apply(right(**inputs)),
        "relative error",
    ),
    "loss": (
        "v_prediction_loss",
        "ours",
        lambda right: lambda **inputs: right(**inputs) + 0.01,
        "relative error of the loss",
    ),
    "raises": ("renoise", "ours", lambda right: _raise, "RuntimeError: out of luck"),
    "peer": (
        "renoise",
        "peer",
        lambda right: lambda x, **rest: right(x, **rest).roll(int(x.itemsize == 2)),
        "",
    ),
    "noise": ("renoise_philox", "peer", lambda right: lambda x, t: 1.1 * right(x, t), "moments"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_not_timed(wrong, modules, cpu, monkeypatch, tmp_path, capsys):
    name, field, breaks, problem = WRONG[wrong]
    operations = modules["cases"].OPERATIONS
    right = operations[name]
    changed = dataclasses.replace(right, **{field: breaks(getattr(right, field))})
    monkeypatch.setitem(operations, name, changed)
    arguments = ["--op", name, "guided_euler_step", "--size", "awkward", "--json", str(tmp_path / "run.json")]
    assert modules["run"].main(arguments) == 1
    printed = capsys.readouterr().out
    assert f"FAILED, and not timed: {name} awkward" in printed and problem in printed
    assert f"\n{name}: reads" not in printed and "guided_euler_step: reads" in printed
    result = json.loads((tmp_path / "run.json").read_text())
    assert {row["operation"] for row in result["rows"]} == {"guided_euler_step"}
    assert len(result["failures"]) == 1


def test_a_peer_that_cannot_run_is_left_out(modules, cpu, monkeypatch, capsys):
    operations = modules["cases"].OPERATIONS
    changed = dataclasses.replace(operations["renoise"], peer=_raise, exact=operations["renoise"].peer)
    monkeypatch.setitem(operations, "renoise", changed)
    assert modules["run"].main(["--op", "renoise", "--size", "awkward"]) == 0
    printed = capsys.readouterr().out
    assert "left out: renoise awkward, eager: RuntimeError: out of luck" in printed and "reference" in printed


@pytest.mark.parametrize("name", OPERATIONS)
def test_truth_by_samples_is_the_truth(name, modules):
    operation = modules["cases"].OPERATIONS[name]
    inputs = operation.make((3, 5, 31), modules["harness.operation"].Draw(torch.device("cpu"), 1))
    exact = operation.truth(inputs)
    whole = {key: each.double() for key, each in operation.truth_inputs(inputs).items()}
    outcome = operation.results(operation.exact or operation.peer, whole)
    ours = modules["harness.operation"].Implementation("float64", False, operation.ours)
    errors = operation.errors(ours, inputs, outcome, exact)
    assert set(errors) == ({"loss", "result"} if name in LOSSES else {"result"})
    assert all(error.value < 1e-14 and error.allowed for error in errors.values())


@pytest.mark.parametrize(
    ("name", "moved"),
    [  # bfloat16 tensors of 100 elements: those read and the one written, 200 bytes each
        ("dmd_loss", 200 * (3 + 1)),  # teacher, teacher_uncond, critic; x is not read
        ("dmd_loss_x0", 200 * (4 + 1)),  # x_t besides, for the normaliser
        ("v_prediction_loss", 200 * (3 + 1)),
        ("flow_matching_loss", 200 * (3 + 1)),
        ("x_prediction_loss", 200 * (3 + 1)),
        ("renoise", 200 * (2 + 1)),
        ("renoise_philox", 200 * (1 + 1)),  # the noise is in no memory
        ("guided_euler_step", 200 * (3 + 1)),
    ],
)
def test_bytes_counted_by_hand(name, moved, modules):
    assert [each.name for each in modules["cases.losses"].OPERATIONS] == OPERATIONS
    operation = modules["cases"].OPERATIONS[name]
    inputs = operation.make((4, 25), modules["harness.operation"].Draw(torch.device("cpu"), 0))
    outcome = operation.results(operation.ours, inputs)
    ours = modules["harness.operation"].Implementation("reference", False, operation.ours)
    assert set(operation.work(ours, inputs, outcome).values()) == {moved}
    assert operation.bytes_counted().endswith(f": {moved // 100} bytes an element")


@pytest.mark.parametrize("name", OPERATIONS)
def test_inputs_rotate(name, modules):
    operation, cache, cpu = modules["cases"].OPERATIONS[name], 50 * 2**20, torch.device("cpu")
    draw = modules["harness.operation"].Draw
    for shape in operation.sizes.values():
        with torch.device("meta"):
            inputs = {each: torch.empty(shape, dtype=torch.bfloat16) for each in operation.forward.reads}
        count = operation.num_sets(inputs, cache)
        assert count >= 2 and count * len(operation.forward.reads) * math.prod(shape) * 2 > 2 * cache
    first, second = (operation.make((2, 3, 7), draw(cpu, seed)) for seed in (0, 1))
    leaves = operation.leaves(first)
    assert [each.requires_grad for each in leaves.values()] == [operation.loss, *[False] * (len(leaves) - 1)]
    for one, other in zip(first.values(), second.values(), strict=True):
        assert one.dtype == (torch.float32 if one.shape == (2,) else torch.bfloat16)
        # The first step of a noise-predicting model stands at one fixed time: its (a, b) are the same in every set.
        assert one.any() and (one.shape == (2,) or not torch.equal(one, other))


def test_times_are_per_call(modules, clock, monkeypatch):
    """By the clock's own count: every set of inputs gets its turn, and batches are long enough."""
    timing, seen = modules["harness.timing"], []
    monkeypatch.setattr(timing, "time", clock)

    def call(milliseconds):
        seen.append(milliseconds)
        clock.advance(milliseconds / 1e3)

    subjects = {"one": timing.Subject(call), "other": timing.Subject(lambda _: clock.advance(10e-6))}
    times, failed = timing.in_turns(subjects, [3, 6])
    # One call of 3 ms does not make a batch, two do: 9 ms, of which 5 fill a round's 40 ms.
    assert times["one"].calls_a_batch == 2 and times["one"].batches == 2 * 5 and not failed
    assert times["one"].median_us == pytest.approx(4500) and times["one"].rounds_us == pytest.approx([4500, 4500])
    assert times["one"].spread_us == pytest.approx(0, abs=1e-3)
    assert times["other"].median_us == pytest.approx(10) and times["other"].calls_a_batch == 1000
    assert seen.count(3) == pytest.approx(seen.count(6), abs=1)


def test_the_spread_is_that_of_the_batches(modules, clock, monkeypatch):
    """And the median that of both rounds: a machine that slows down in the second shows in both."""
    timing = modules["harness.timing"]
    monkeypatch.setattr(timing, "time", clock)
    begin = clock.now
    times, _ = timing.in_turns(
        {"one": timing.Subject(lambda _: clock.advance(0.02 if clock.now < begin + 0.11 else 0.04))}, [0]
    )
    # 20 ms, some of them to warm up, then 40 ms in the second round.
    assert times["one"].rounds_us == pytest.approx([20e3, 40e3]) and times["one"].calls_a_batch == 1
    assert times["one"].median_us == pytest.approx(30e3) and times["one"].spread_us == pytest.approx(20e3)


def test_rows_of_a_gpu(modules, cpu, monkeypatch):
    """Every way of calling gets its column, and a graph that cannot be captured costs that figure alone."""
    harness, timing = modules["harness.operation"], modules["harness.timing"]
    graphs = [[10.0, 40.0], []]

    def in_graphs(subjects, sets, seconds):
        for subject in subjects.values():
            with subject.around():
                subject.call(subject.prepare(sets[0]))
        taken = {name: timing.Time(us, 1.0, 3, 1, [us, us]) for name, us in zip(subjects, graphs.pop(0), strict=False)}
        return taken, {name: RuntimeError("no capture today\nat all") for name in subjects if name not in taken}

    monkeypatch.setattr(timing, "on_gpu_in_turns", in_graphs)
    state = harness.Run(torch.device("cpu"), ("reference",), copy_tb_s=2.0)
    operation, size = modules["cases"].OPERATIONS["v_prediction_loss"], "awkward"
    sets = [operation.draw(size, state.device, seed) for seed in range(2)]
    found = operation.implementations(state, size)
    checked = harness.gate(state, operation, size, "awkward", found, sets[0])
    assert not state.failures and [*checked] == [each.name for each in found] == ["reference", "eager"]
    state.device = torch.device("cuda")
    (ways,) = operation.ways(state.device)
    times = operation.take(state, operation.title(size), found, ways, sets)
    ours, eager = harness.make_rows(state, operation, size, found, ways, checked, times)
    assert set(ours["times"]) == {"forward", "forward_backward", "forward_backward_one_thread", "gpu_forward"}
    assert ours["ratios"]["eager"]["gpu_forward"] == 4.0 and not eager["ratios"]
    assert ours["tb_s"]["gpu_forward"] == pytest.approx(3 * 5 * 1023 * 8 / 10e-6 / 1e12)
    assert ours["share_of_copy"]["gpu_forward"] == ours["tb_s"]["gpu_forward"] / 2
    assert state.left_out == [
        f"v_prediction_loss awkward, {name}, GPU time alone, forward_backward: no capture today"
        for name in ("reference", "eager")
    ]
    assert torch.is_grad_enabled() and all(tensor.grad is None for inputs in sets for tensor in inputs.values())


def test_one_that_raises_costs_its_own_time(modules):
    """Of a peer it is left out, of ours a failure, and the others go on."""
    harness, timing = modules["harness.operation"], modules["harness.timing"]

    def call(_):
        raise RuntimeError("out of luck")

    subjects = {"one": timing.Subject(call), "other": timing.Subject(lambda _: None)}
    times, failed = timing.in_turns(subjects, [0], seconds=0.0)
    assert set(times) == {"other"} and str(failed["one"]) == "out of luck"
    state = harness.Run(torch.device("cpu"), ("reference",))
    for peer, error in ((True, failed["one"]), (False, failed["one"]), (False, torch.OutOfMemoryError("full"))):
        state.went_wrong("title", harness.Implementation("one", peer, call), error)
    assert state.failures == ["title: RuntimeError: out of luck"]
    assert state.left_out == ["title: RuntimeError: out of luck", "title: OutOfMemoryError: full"]


def test_slower_than_a_stored_run(modules):
    report, before = modules["harness.report"], made_up()
    assert report.slower(before, before) == [] and report.compared(before, before) == 2 * 2 * (5 + 2)
    now = copy.deepcopy(before)
    times = now["rows"][0]["times"]
    times["forward"]["median_us"] = 101.9  # within the spread
    times["gpu_forward"]["median_us"] = 50.0  # faster
    times["gpu_forward_backward"].update(median_us=108.0, spread_us=9.0)  # within this run's own spread
    times["forward_backward"]["median_us"] = 130.0
    assert report.slower(now, before) == [
        "dmd_loss sd35-b1 cuda, fwd + bwd: 100.0 to 130.0 us (+30%; the spread is 2.0 us)"
    ]
    del before["rows"][0]  # what the stored run lacks is not compared
    assert report.slower(now, before) == []


def test_baseline_through_the_command(modules, cpu, monkeypatch, tmp_path, capsys):
    made = modules["harness.timing"].Time(100.0, 2.0, 6, 1, [99.0, 101.0])
    monkeypatch.setattr(
        modules["harness.timing"], "in_turns", lambda subjects, sets: (dict.fromkeys(subjects, made), {})
    )
    stored, selected = tmp_path / "stored.json", ["--op", "renoise", "--size", "awkward", "--peers", "none"]
    assert modules["run"].main([*selected, "--json", str(stored)]) == 0
    result = json.loads(stored.read_text())
    assert [row["implementation"] for row in result["rows"]] == ["reference"]
    for value, count in ((97.0, 1), (99.0, 0), (1e9, 0)):  # the spread is 2
        result["rows"][0]["times"]["forward"].update(median_us=value, spread_us=0.0)
        stored.write_text(json.dumps(result))
        capsys.readouterr()
        assert modules["run"].main([*selected, "--baseline", str(stored)]) == 0
        printed = capsys.readouterr().out
        assert f"{count} of 1 times are slower" in printed
        assert printed.count("slower: renoise awkward reference, forward:") == count


def test_baselines_that_are_refused(modules, cpu, tmp_path, capsys):
    files = {
        "other.json": (json.dumps(made_up()), "measured on NVIDIA H100 80GB HBM3 and this machine has no GPU"),
        "broken.json": ("{", "broken.json: "),
        "cycle.json": ("{}", "is not a file that benchmarks/run.py --json wrote"),
        "missing.json": (None, "missing.json: there is no such file"),
    }
    for name, (text, message) in files.items():
        if text is not None:
            (tmp_path / name).write_text(text)
        assert modules["run"].main(["--baseline", str(tmp_path / name)]) == 2
        printed = capsys.readouterr()
        assert message in printed.err and not printed.out  # nothing was measured


def test_unknown_names_are_refused(modules, cpu, capsys):
    refused = {
        ("--op", "softmax"): ("dmd_loss", "guided_euler_step"),
        ("--size", "huge"): ("sd35-b4", "wan-720p", "awkward"),
        ("--peers", "liger"): ("eager", "compile", "none"),
        ("--peers", "none", "eager"): ("none cannot be combined",),
    }
    for arguments, allowed in refused.items():
        with pytest.raises(SystemExit) as stop:
            modules["run"].main(list(arguments))
        assert stop.value.code == 2
        error = capsys.readouterr().err.rpartition("error:")[2]
        assert all(each in error for each in (*arguments[:2], *allowed))


def test_implementations_that_are_asked_for(modules, cpu, monkeypatch, capsys):
    for value, message in (
        ("cuda", "DPDMD_KERNELS=cuda does not run here: "),
        ("fast", "it takes one of auto, reference"),
    ):
        monkeypatch.setenv("DPDMD_KERNELS", value)
        assert modules["run"].main(["--op", "renoise"]) == 2
        assert message in capsys.readouterr().err
    run = modules["run"]
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(run.backend, "why_not", lambda name, *device: "no nvcc" if name == "cuda" else "")
    monkeypatch.setenv("DPDMD_KERNELS", "auto")
    assert run.our_implementations(gpu) == (("triton",), ["cuda: no nvcc"])
    monkeypatch.setenv("DPDMD_KERNELS", "triton")
    assert run.our_implementations(gpu) == (("triton",), [])


def test_compilation_is_rationed(modules):
    run, renoise = modules["harness.operation"].Run, modules["cases"].OPERATIONS["renoise"]
    state = run(torch.device("cuda"), ("triton",))
    wanted = [size for size in renoise.sizes if renoise.compile_wanted(state, size)]
    assert wanted == ["sd35-b4", "video"] and not state.left_out
    state.compile_seconds["rows"] = renoise.compile_seconds + 1
    assert not renoise.compile_wanted(state, "video") and "renoise video, compile" in state.left_out[0]
    assert modules["cases"].OPERATIONS["gelu_tanh"].compile_wanted(state, "sd35-b4")  # whose ration is another
    state.peers = ("compile",)  # asked for: as long as it takes
    assert renoise.compile_wanted(state, "flux")
    assert not renoise.compile_wanted(run(torch.device("cpu"), ("reference",)), "video")


def test_tables_of_a_gpu_do_not_wrap(modules, capsys):
    result = made_up(implementations=("cuda", "triton", "eager", "compile"))
    result["cancellation"] = [
        {"difference": 0.05, "t": 0.1, **dict.fromkeys(modules["harness.report"].CANCELLATION, 0.3)}
    ]
    modules["harness.report"].print_tables(modules["harness.report"].make_console(), result)
    printed = capsys.readouterr().out
    assert "…" not in printed and max(map(len, printed.splitlines())) <= 200
    headings = " ".join(line for line in printed.splitlines() if "┃" in line)
    assert all(each in headings for each in ("fwd + bwd", "one thread", "gpu us", "of copy", "compile"))
    rows = [line for line in printed.splitlines() if "100.0 ± 2.0" in line]
    assert len(rows) == 2 * 2 * 4 and rows[0].count("100.0 ± 2.0") == 5


def test_plot(modules, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for name, gpu in (("one.json", "NVIDIA H100 80GB HBM3"), ("two.json", "NVIDIA H200"), ("cpu.json", None)):
        (tmp_path / name).write_text(json.dumps(made_up(gpu=gpu)))
    picture = tmp_path / "roofline.png"
    files = [str(tmp_path / "one.json"), str(tmp_path / "two.json")]
    assert modules["run"].main(["--plot", *files, "--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    for name, message in (("cpu.json", "measured on a CPU"), ("missing.json", "there is no such file")):
        assert modules["run"].main(["--plot", str(tmp_path / name), "--output", str(tmp_path / "no.png")]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "no.png").exists()


def test_plot_takes_the_stored_run(modules, monkeypatch, tmp_path):
    """`--plot` alone: benchmarks/results/kernels.json to docs/roofline.png."""
    pytest.importorskip("matplotlib")
    run = modules["run"]
    assert (run.STORED, run.PICTURE) == (BENCHMARKS / "results" / "kernels.json", ROOT / "docs" / "roofline.png")
    monkeypatch.setattr(run, "STORED", tmp_path / "kernels.json")
    monkeypatch.setattr(run, "PICTURE", tmp_path / "roofline.png")
    run.STORED.write_text(json.dumps(made_up()))
    assert run.main(["--plot"]) == 0 and run.PICTURE.stat().st_size > 10_000


def test_no_module_shadows_an_installed_name():
    """`python benchmarks/run.py` puts benchmarks/ first on sys.path: a module there would hide another of its name."""
    assert {"run", "cases", "harness"} <= MODULES
    installed = set(importlib.metadata.packages_distributions())
    assert not MODULES & (installed | set(sys.stdlib_module_names) | {"evaluate", "metrics", "utils"})


TOYS = {
    "rows": ("Elementwise", {"outputs": ("result",)}, ("x", "y"), ("result",)),
    "blocks": ("Operation", {"backward": (("x", "y", "d out"), ("d x", "d y"))}, ("x", "y"), ("out",)),
}


@pytest.mark.parametrize("table", TOYS)
@pytest.mark.parametrize("right", [True, False])
def test_an_operation_is_one_entry(table, right, modules, cpu, monkeypatch, tmp_path, capsys):
    """Checked, timed and reported by what the entry says of it; or not timed, where it is wrong."""
    harness, losses = modules["harness.operation"], modules["cases.losses"]
    kind, options, reads, writes = TOYS[table]
    if "backward" in options:
        options = {"backward": harness.Traffic(*options["backward"])}
    toy = getattr(losses if kind == "Elementwise" else harness, kind)(
        name="toy",
        sizes={"awkward": (3, 5, 7)},
        make=lambda shape, draw: {"x": draw(*shape), "y": draw(*shape)},
        ours=lambda x, y: (x.float() * y.float() + (0 if right else 1)).to(x.dtype),
        peer=lambda x, y: x * y,
        forward=harness.Traffic(reads, writes),
        **options,
    )
    monkeypatch.setitem(modules["cases"].OPERATIONS, "toy", toy)
    assert modules["run"].main(["--op", "toy", "--json", str(tmp_path / "run.json")]) == int(not right)
    printed, result = capsys.readouterr().out, json.loads((tmp_path / "run.json").read_text())
    rows = result[table]
    if not right:
        assert not rows and "FAILED, and not timed: toy awkward, reference: relative error" in printed
        return
    assert not result["failures"] and not result["left_out"]
    passes = ("forward", "backward") if table == "blocks" else ("forward",)
    assert [(next(iter(row["times"])), row["implementation"]) for row in rows] == [
        (which, name) for which in passes for name in ("reference", "eager")
    ]
    moved = {"forward": 3 * 3 * 5 * 7 * 2, "backward": 5 * 3 * 5 * 7 * 2}
    for row in rows:
        ((way, taken),) = row["times"].items()
        assert row["bytes"] == moved[way] and row["tb_s"][way] == pytest.approx(
            moved[way] / taken["median_us"] / 1e6, rel=1e-3
        )
    assert ("toy: reads x, y; writes the result: 6 bytes an element" if table == "rows" else "│ toy ") in printed


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@on_gpu
def test_a_graph_is_replayed_without_the_host(modules):
    """The GPU's own time is that of replays: the calls in them are not Python's, and each set of inputs has its own."""
    timing, called = modules["harness.timing"], []
    sets = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in range(2)]
    times, failed = timing.on_gpu_in_turns({"one": timing.Subject(lambda x: called.append(1) or x.add_(1))}, sets)
    taken = times["one"]
    assert not failed
    assert len(called) == 2 + 2 and taken.batches >= 6  # to warm up, and to capture
    replays = taken.calls_a_batch // 2
    # Once to warm up, twice to see how many replays make a batch; a capture runs nothing.
    assert [x.item() for x in sets] == [1 + 2 + replays * taken.batches] * 2


@pytest.mark.gpu
@pytest.mark.gpu_memory(6)
@on_gpu
def test_on_a_gpu(modules, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("DPDMD_KERNELS", raising=False)
    monkeypatch.setattr(modules["cases.losses"].Elementwise, "compile_seconds", math.inf)  # on a slow machine, too
    arguments = ["--op", "dmd_loss", "renoise_philox", "--size", "awkward", "sd35-b4"]
    assert modules["run"].main([*arguments, "--json", str(tmp_path / "run.json")]) == 0
    assert "CPU figures" not in capsys.readouterr().out
    result = json.loads((tmp_path / "run.json").read_text())
    assert result["machine"]["gpu"] and result["copy_tb_s"] > 0.1 and result["failures"] == []
    assert {row["size"] for row in result["rows"] if row["implementation"] == "compile"} == {"sd35-b4"}
    for row in result["rows"]:
        assert "gpu_forward" in row["times"], result["left_out"]
        if row["operation"] == "dmd_loss":
            assert {"forward_backward_one_thread", "gpu_forward_backward"} <= set(row["times"])
