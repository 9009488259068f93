"""Every impossible setting is refused with a message that names it, what it was and what would do."""

from __future__ import annotations

import pytest
import torch

from dpdmd.config import CONFIG_FOLDER, Config, ConfigError, known_keys, load_config, parse_config, to_yaml


def test_defaults_are_the_papers():
    distill = parse_config({}).distill
    assert (distill.method, distill.detach, distill.student_steps, distill.teacher_steps) == ("dpdmd", True, 4, 30)
    assert (distill.anchor, distill.diversity_weight, distill.guidance_scale) == (5, 0.05, 3.5)
    assert (distill.critic_updates, distill.normalizer, distill.rollout_gradient) == (5, "teacher", "full")
    assert (distill.renoise.per, distill.renoise.distribution) == ("batch", "scheduler")
    optimizer = parse_config({}).student_optimizer
    assert (optimizer.lr, optimizer.weight_decay) == (1e-5, 0.0)
    assert parse_config({}).engine.clip == 1.0


@pytest.mark.parametrize("file", sorted(CONFIG_FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_files_are_valid_and_read_back(file, tmp_path):
    config = load_config(file)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    "override, message",
    [
        ("distill.ancor=3", "distill.ancor: unknown key; the nearest known is distill.anchor"),
        ("distil.anchor=3", "distil: unknown key; the nearest known is distill"),
        ("engine.zero.studnet=3", "engine.zero.studnet: unknown key; the nearest known is engine.zero.student"),
        ("distill.anchor=40", "distill.anchor = 40 is more than distill.teacher_steps = 30.*1 to 30 is possible"),
        ("distill.anchor=0", "distill.anchor = 0: input should be greater than or equal to 1"),
        ("distill.student_steps=1", "distill.student_steps = 1 with distill.method = dpdmd.*2 or more are needed"),
        ("prompts.negative_prompt=null", "distill.guidance_scale = 4.0 needs unconditional embeddings"),
        ("distill.student_grid=[1, 0.5]", r"distill.student_grid = \[1.0, 0.5\]: 4 falling times above 0"),
        ("distill.student_grid=[1, 0.5, 0.6, 0.1]", "4 falling times above 0"),
        ("distill.student_grid=cosine", "distill.student_grid = 'cosine': input should be 'scheduler' or 'uniform'"),
        ("distill.method=gan", "distill.method = 'gan': input should be 'dpdmd' or 'dmd'"),
        ("distill.renoise.low=0.99", "distill.renoise.low = 0.99 is not below distill.renoise.high = 0.98"),
        ("engine.zero.teacher=2", "engine.zero.teacher = 2: input should be 0 or 3"),
        ("student_optimizer.lr=fast", "student_optimizer.lr = 'fast': input should be a valid number"),
        ("model.pipeline=/some/where", "measures the demo's picture world, but model.pipeline = '/some/where'"),
        ("model.fp8=yes", "model.fp8 = .*: input should be 'off' or 'no_grad'"),
        ("distill.anchor", "override 'distill.anchor': the form is section.key=value"),
        ("distill.anchor.deeper.still=3", "distill.anchor = .*: input should be a valid integer"),
        ("distill.anchor=[", "override 'distill.anchor=\\[': the value is not YAML"),
    ],
)
def test_bad_settings_are_named(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override])


def test_prompts_are_needed_for_any_other_pipeline():
    with pytest.raises(ConfigError, match=r"prompts\.file is not set"):
        parse_config({"model": {"pipeline": "some/model"}})


def test_fp8_is_of_the_fused_operations():
    with pytest.raises(ConfigError, match=r"model\.fp8 = no_grad is of the fused operations: set model\.fuse=true or"):
        load_config(None, ["model.fuse=false", "model.fp8=no_grad"])


def test_every_problem_is_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["distill.ancor=3", "run.seed=-1"])
    assert "distill.anchor" in str(caught.value) and "run.seed = -1" in str(caught.value)


@pytest.mark.parametrize(
    "content, message", [("[1, 2]", "holds a list"), ("a: [", "not a YAML file"), (None, "cannot be read")]
)
def test_bad_files_are_named(tmp_path, content, message):
    file = tmp_path / "settings.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=f"settings.yaml: .*{message}"):
        load_config(file)


def test_overrides_win_over_the_file_and_its_cpu_section(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("engine: {batch_size: 8, device: cpu}\non_cpu: {engine: {batch_size: 2}, run: {seed: 5}}\n")
    config = load_config(file, ["run.seed=7"])
    assert (config.engine.batch_size, config.run.seed, config.engine.device) == (2, 7, "cpu")


def test_cpu_section_does_nothing_where_there_is_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    file = tmp_path / "settings.yaml"
    file.write_text("engine: {batch_size: 8}\non_cpu: {engine: {batch_size: 2}}\n")
    assert load_config(file).engine.batch_size == 8
    assert load_config(file, ["engine.device=cpu"]).engine.batch_size == 2


def test_every_key_has_a_description():
    def check(section):
        for name, field in section.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                check(field.annotation)
            else:
                assert field.description, f"{section.__name__}.{name}"

    check(Config)
    assert "distill.renoise.low" in known_keys()
