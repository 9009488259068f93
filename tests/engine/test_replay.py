"""Passes as CUDA graphs: what is recorded when, and on a GPU the same bits."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from processes import run_command

from dpdmd.engine import replay
from dpdmd.engine.replay import GRAPHS, Replay


@pytest.fixture
def recorded(monkeypatch):
    """Shapes for which a graph was recorded, in place of graphs."""
    shapes = []

    class Fake:
        def __init__(self, function, inputs, structure, pool):
            shapes.append(tuple(inputs[0].shape))

        def __call__(self, inputs):
            return inputs[0] + 100

    monkeypatch.setattr(replay, "_Recorded", Fake)
    return shapes


def test_the_second_call_of_a_shape_is_recorded(recorded):
    called = []
    run = Replay(lambda x, cond: called.append(tuple(x.shape)) or x + cond["a"], None)

    def of(size):
        return run(torch.zeros(size), {"a": torch.ones(1)}).tolist()

    assert of(2) == [1, 1] and called == [(2,)] and recorded == []
    assert of(2) == [100, 100] and of(2) == [100, 100] and called == [(2,)] and recorded == [(2,)]
    assert of(3) == [1] * 3 and of(3) == [100] * 3 and recorded == [(2,), (3,)] and len(run) == GRAPHS == 2
    called.clear()
    assert of(4) == of(4) == of(4) == [1] * 4 and len(called) == 3  # two are enough
    run.run_next()
    assert of(2) == [1, 1] and of(2) == [100, 100] and len(run) == 2
    run.forget()
    assert of(2) == [1, 1] and of(2) == [100, 100] and recorded == [(2,), (3,), (2,)]


def test_other_conditions_are_another_graph(recorded):
    run = Replay(lambda x, cond: sum(cond.values(), x), None)
    for cond in ({"a": torch.ones(1)}, {"b": torch.ones(1)}, {"a": torch.ones(1, dtype=torch.float64)}):
        assert run(torch.zeros(1), cond).tolist() == [1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnGpu:
    def test_same_bits_for_other_inputs_and_weights(self):
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)).cuda()
        run = Replay(lambda x, cond: layers(x) * cond["a"], torch.cuda.graph_pool_handle())
        other = Replay(lambda x, cond: layers(x).cos() + cond["a"], run._pool)
        results = []
        with torch.no_grad():
            for _ in range(5):
                x, cond = torch.randn(7, 64, device="cuda"), {"a": torch.randn(7, 1, device="cuda")}
                results.append(run(x, cond))
                assert torch.equal(results[-1], layers(x) * cond["a"])
                assert torch.equal(other(x, cond), layers(x).cos() + cond["a"])
                layers[0].weight.mul_(0.9)
        assert len(run) == len(other) == 1
        assert len({result.data_ptr() for result in results}) == 5 and not torch.equal(results[3], results[4])

    @pytest.mark.distributed
    @pytest.mark.parametrize("lever", [[], ["engine.offload=cpu"]], ids=["as configured", "offload"])
    def test_a_run_is_the_same_to_the_bit(self, tmp_path, lever):
        pytest.importorskip("deepspeed")
        losses = []
        for graphs in ("true", "false"):
            settings = [f"run.output_dir={tmp_path / graphs}", "run.iterations=18", f"engine.cuda_graphs={graphs}"]
            settings += ["engine.batch_size=16", "evaluation.enabled=false", "run.sample_every=1", *lever]
            command = [sys.executable, "-m", "dpdmd.train", *settings]
            done = run_command(command)
            assert done.returncode == 0, done.stderr[-3000:]
            lines = (tmp_path / graphs / "metrics.jsonl").read_text().splitlines()
            losses.append([json.loads(line)["loss"] for line in lines])
        assert len(losses[0]) == 18 and losses[0] == losses[1]
