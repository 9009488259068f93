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
        (
            "model.pipeline=/some/where",
            "evaluation.enabled = true needs a world, and model.pipeline = '/some/where' is none: set evaluation.world=demo, "
            "a world of your own, or evaluation.enabled=false",
        ),
        (
            "evaluation.world=dmeo",
            r"^evaluation.world = 'dmeo': no world of that name ships \(demo does\); name your own as package.module:attr",
        ),
        ("evaluation.world=a.1b:c", r"^evaluation.world = 'a.1b:c': no world of that name ships \(demo does\)"),
        ("model.fp8=yes", "model.fp8 = .*: input should be 'off' or 'no_grad'"),
        ("distill.anchor", "override 'distill.anchor': the form is section.key=value"),
        ("distill.anchor.deeper.still=3", "distill.anchor = .*: input should be a valid integer"),
        ("distill.anchor=[", "override 'distill.anchor=\\[': the value is not YAML"),
    ],
)
def test_bad_settings_are_named(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override])


STAGE = r"is always sharded by the engine's own stage 3 \(stages 0 to 2 were removed: on one process stage 3 copies nothing\)$"


@pytest.mark.parametrize(
    "override, message",
    [
        # Sections and their names
        ("engine=cpu", "engine = 'cpu': a section with keys is needed, for example engine.batch_size=4$"),
        ("run=3", "run = 3: a section with keys is needed, for example run.output_dir=runs/default$"),
        ("engine=[]", r"engine = \[\]: a section with keys is needed"),
        ("evaluation=null", "evaluation = None: a section with keys is needed, for example evaluation.enabled=false$"),
        ("engine.kept_passes=3", "for example engine.kept_passes.student=null$"),
        (
            "lora=true",
            "lora = True: a section with keys is needed, for example lora.rank=64; lora={} takes .* lora=null",
        ),
        ("ema=0.9", "ema = 0.9: a section with keys is needed, for example ema.decay=0.999; ema={} takes .* ema=null"),
        ("lora.rnak=3", "^lora.rnak: unknown key; the nearest known is lora.rank$"),
        ("ema={deacy: 0.9}", "^ema.deacy: unknown key; the nearest known is ema.decay$"),
        ("modle.pipeline=x", "^modle: unknown key; the nearest known is model$"),
        ("Engine.batch_size=3", "^Engine: unknown key; the nearest known is engine$"),
        ("batch_size=3", "^batch_size: unknown key; the nearest known is engine.batch_size$"),
        ("run.batch_size=3", "^run.batch_size: unknown key; the nearest known is engine.batch_size$"),
        ("engine.batch-size=3", "^engine.batch-size: unknown key; the nearest known is engine.batch_size$"),
        ("engine.lr=1e-5", "nearest known is student_optimizer.lr or critic_optimizer.lr$"),
        ("rank=3", "^rank: unknown key; the nearest known is lora.rank$"),
        ("student_optimizer.momentum=3", "unknown key; known in student_optimizer are name, state, lr, betas, eps"),
        ("xyz=3", "^xyz: unknown key; known sections are model, prompts, distill"),
        ("model.height=33", "^model.height: unknown key; known in model are pipeline, "),
        ("on_cpu.engine.batch_size=3", "^on_cpu: unknown key; it is a section of files; on the command line"),
        (
            "engine={zero.teacher: 0}",
            "engine.zero.teacher: unknown key; in a file keys stand .* `zero: {teacher: ...}`$",
        ),
        # Whole numbers
        ("run.seed=2020-13-45", "^run.seed = '2020-13-45': input should be a valid integer$"),
        ("run.seed=2020-12-25", "^run.seed = '2020-12-25': input should be a valid integer$"),
        ("run.seed=1:30", "^run.seed = '1:30': input should be a valid integer$"),  # 90 in YAML 1.1
        ("run.seed=010", "^run.seed = '010': input should be a valid integer$"),  # 8 in YAML 1.1
        ("engine.batch_size=true", "^engine.batch_size = True: input should be a valid integer$"),
        ('engine.batch_size="4"', "^engine.batch_size = '4': input should be a valid integer, as 4 is$"),
        ("engine.batch_size=4.0", "^engine.batch_size = 4.0: input should be a valid integer, as 4 is$"),
        (f"engine.batch_size={10**20}", "^engine.batch_size = 100000000000000000000: .* less than or equal to 65536$"),
        (f"run.iterations={10**20}", "^run.iterations = .* less than or equal to 2147483647$"),
        (f"run.seed={2**63}", "^run.seed = 9223372036854775808: input should be less than 9223372036854775808$"),
        ("engine.accumulation=0", "^engine.accumulation = 0: input should be greater than or equal to 1$"),
        ("model.resolution=100000", "^model.resolution = 100000: input should be less than or equal to 65536$"),
        ("evaluation.num_prompts=5000", "^evaluation.num_prompts = 5000: input should be less than or equal to 4096$"),
        (
            "engine.kept_passes.critic=-1",
            "^engine.kept_passes.critic = -1: input should be greater than or equal to 0$",
        ),
        # Numbers
        ("student_optimizer.lr=.inf", "^student_optimizer.lr = inf: input should be a finite number$"),
        ("student_optimizer.lr=1e999", "^student_optimizer.lr = inf: input should be a finite number$"),
        ("student_optimizer.lr=inf", "^student_optimizer.lr = 'inf': input should be a valid number$"),
        ("student_optimizer.lr=0", "^student_optimizer.lr = 0: input should be greater than or equal to 1e-12$"),
        ("student_optimizer.lr=1e31", r"^student_optimizer.lr = 1e\+31: input should be less than or equal to 1e\+30$"),
        ("student_optimizer.lr=true", "^student_optimizer.lr = True: input should be a valid number$"),
        (
            "critic_optimizer.eps=1e-40",
            "^critic_optimizer.eps = 1e-40: input should be greater than or equal to 1e-30$",
        ),
        (
            "critic_optimizer.weight_decay=.nan",
            "^critic_optimizer.weight_decay = nan: input should be a finite number$",
        ),
        ("distill.guidance_scale=.inf", "^distill.guidance_scale = inf: input should be a finite number$"),
        ("distill.diversity_weight=-1", "^distill.diversity_weight = -1: input should be greater than or equal to 0$"),
        ("engine.clip=.inf", "^engine.clip = inf: input should be a finite number$"),
        ("lora.alpha=.nan", "^lora.alpha = nan: input should be a finite number$"),
        ("ema.decay=1", "^ema.decay = 1: input should be less than or equal to 0.99999$"),
        (
            "student_optimizer.lr=1e-30",
            "^student_optimizer.lr = 1e-30: input should be greater than or equal to 1e-12$",
        ),
        ("engine.clip=1e-300", "^engine.clip = 1e-300: input should be 0, or from 1e-6 on"),
        ("lora.alpha=1e-300", "^lora.alpha = 1e-300: input should be greater than or equal to 0.001$"),
        ("distill.renoise.high=.nan", "^distill.renoise.high = nan: input should be a finite number$"),
        ("distill.student_grid=[1, .nan, 0.5, 0.2]", "^distill.student_grid.1 = nan: input should be a finite number$"),
        ("distill.student_grid=3", "'scheduler' or 'uniform', or a list of times$"),
        ("student_optimizer.betas=[2, 0.9]", "^student_optimizer.betas.0 = 2: input should be less than 1$"),
        ("student_optimizer.betas=[0.9, -1]", "^student_optimizer.betas.1 = -1: .* greater than or equal to 0$"),
        ("student_optimizer.betas=[0.9]", r"^student_optimizer.betas = \[0.9\]: 2 values are needed$"),
        ("student_optimizer.betas=[0.9, 0.9, 0.9]", "^student_optimizer.betas = .*: 2 values are needed$"),
        # Words
        ("model.fuse=1", "^model.fuse = 1: input should be a valid boolean$"),
        ("model.fuse='no'", "^model.fuse = 'no': input should be a valid boolean$"),
        ("prompts.negative_prompt=no", "^prompts.negative_prompt = False: input should be a valid string; quote text"),
        ("model.revision=1234567", "^model.revision = 1234567: input should be a valid string; quote text"),
        ("run.output_dir=''", "^run.output_dir = '': it is empty, and names no file or folder$"),
        ('run.output_dir="a\\nb"', r"^run.output_dir = 'a\\nb': it holds a control character"),
        ('prompts.file="a\\0"', r"^prompts.file = 'a\\x00': it holds a control character"),
        ("run.wandb=''", "^run.wandb = '': a name is needed"),
        ("prompts.field=' '", "^prompts.field = ' ': a name is needed"),
        ("lora.targets=['']", "^lora.targets.0 = '': a name is needed"),
        ("lora.targets=[]", r"^lora.targets = \[\]: list should have at least 1 item"),
        ('run.sample_prompts=["\\ud800"]', "holds half of a surrogate pair, which is no character$"),
        # DeepSpeed's own settings
        (
            "engine.deepspeed={foo: 1}",
            "^engine.deepspeed: foo is not used; the DeepSpeed settings that are used: aio.block",
        ),
        ("engine.deepspeed={zero_optimization: 3}", "^engine.deepspeed: zero_optimization = 3: a mapping is needed$"),
        ("engine.deepspeed={zero_optimization: {x: 1}}", "^engine.deepspeed: zero_optimization.x is not used; "),
        (
            "engine.deepspeed={zero_optimization: {stage: 1}}",
            "zero_optimization.stage is decided by the engine itself: take engine.zero instead$",
        ),
        (
            "engine.deepspeed={aio: {block_size: .nan}}",
            "^engine.deepspeed: aio.block_size = nan: a whole number from 1 ",
        ),
        (
            f"engine.deepspeed={{aio: {{queue_depth: {2**63}}}}}",
            "aio.queue_depth = 9223372036854775808: a whole number ",
        ),
        ("engine.deepspeed={aio: {queue_depth: true}}", "aio.queue_depth = True: a whole number "),
        ("engine.deepspeed={zero_optimization: {sub_group_size: 1e13}}", "from 1 to 1099511627776 is needed$"),
        ("engine.deepspeed={aio: {single_submit: 1}}", "aio.single_submit = 1: true or false is needed$"),
        (
            "engine.deepspeed={aio: {queue_depth: 4}}",
            "with engine.offload = none has no effect: set engine.deepspeed=null or engine.offload=nvme",
        ),
        (
            "engine={offload: cpu, deepspeed: {aio: {queue_depth: 4}}}",
            "aio, which has no effect with engine.offload = cpu: leave aio out",
        ),
        *(
            (f"engine.deepspeed={{{key}: 1}}", f"{key} is decided by the engine itself: take {instead}")
            for key, instead in (
                ("train_batch_size", "engine.batch_size and engine.accumulation"),
                ("gradient_accumulation_steps", "engine.accumulation"),
                ("gradient_clipping", "engine.clip"),
                ("optimizer", "student_optimizer and critic_optimizer"),
                ("scheduler", "warmup and decay of student_optimizer"),
                ("bf16", "model.dtype"),
            )
        ),
        ("engine.deepspeed=true", "^engine.deepspeed = True: a JSON file or a mapping is needed$"),
        ("engine.deepspeed={1: 2}", "1: a key has to be text"),
        # Stages
        ("engine.zero.student=2", "^engine.zero.student = 2: the student " + STAGE),
        ("engine.zero.critic=0", "^engine.zero.critic = 0: the critic " + STAGE),
        ("engine.zero.critic=true", "^engine.zero.critic = True: the critic " + STAGE),
        ("engine.zero.teacher=false", "^engine.zero.teacher = False: input should be 0 or 3$"),
        ("engine.zero.teacher=3.0", "^engine.zero.teacher = 3.0: input should be 0 or 3$"),
        # Together
        (
            "run.iterations=5",
            "^run.iterations = 5 with distill.critic_updates = 5: the student .* 6 iterations or more",
        ),
        # The command line itself
        ("prompts.cache_dir=~", "override 'prompts.cache_dir=~': your home folder is ~/; write null for none"),
        ("prompts.cache_dir=", "override 'prompts.cache_dir=': nothing follows the =; write null for none"),
        ("run..seed=3", "override 'run..seed=3': the form is section.key=value"),
        ("run={seed: 1, seed: 2}", "override 'run={seed: 1, seed: 2}': .* the key 'seed' stands twice"),
        ("run.output_dir=~nobody-here/x", "there is no home folder for ~nobody-here; .* write ./~nobody-here$"),
    ],
)
def test_values_are_taken_as_they_are_written(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(None, ["evaluation.enabled=false", override])
    assert "\n" not in str(caught.value)


def test_numbers_and_words_that_yaml_would_change():
    settings = [
        "student_optimizer.lr=1e-5",
        "model.fp8=off",
        "run.wandb=2020-12-25",
        "engine={offload: nvme, nvme_path: /scratch}",
        "engine.deepspeed={zero_optimization: {sub_group_size: 5e8}, aio: {single_submit: true}}",
    ]
    config = load_config(None, settings)
    assert config.student_optimizer.lr == 1e-5 and config.model.fp8 == "off" and config.run.wandb == "2020-12-25"
    assert config.engine.deepspeed == {
        "zero_optimization": {"sub_group_size": 500_000_000},
        "aio": {"single_submit": True},
    }
    assert parse_config({"student_optimizer": {"lr": "1e-5"}}).student_optimizer.lr == 1e-5  # from other YAML
    assert parse_config({"student_optimizer": {"betas": [0, 0.5]}}).student_optimizer.betas == (0.0, 0.5)


@pytest.mark.parametrize(
    "content, message",
    [
        ("[1]", r"\[1\]: a mapping is needed"),
        ("{", "not a JSON file"),
        (b"\xff\xfe{}", "not a JSON file"),
        ("[" * 100_000, "not a JSON file"),
        (None, "cannot be read"),
        ('{"aio": {"block_size": NaN}}', "aio.block_size = nan: a whole number from 1"),
        ('{"fp16": {"enabled": true}}', "fp16 is decided by the engine itself: take model.dtype instead"),
    ],
)
def test_bad_deepspeed_file(tmp_path, content, message):
    file = tmp_path / "ds.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=f"^engine.deepspeed = '{file}': {message}") as caught:
        load_config(None, [f"engine.deepspeed={file}", "engine.offload=cpu"])
    assert "\n" not in str(caught.value)


def test_deepspeed_file_is_read_as_the_mapping_is(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"sub_group_size": 5e8}}')
    config = load_config(None, [f"engine.deepspeed={file}", "engine.offload=cpu"])
    assert config.engine.deepspeed == {"zero_optimization": {"sub_group_size": 500_000_000}}


def test_overrides_of_a_section_and_of_its_keys_add_up():
    config = load_config(None, ["engine.batch_size=3", "engine={accumulation: 2}", "engine.batch_size=4"])
    assert (config.engine.batch_size, config.engine.accumulation) == (4, 2)
    assert load_config(None, ["lora=null", "lora.rank=3"]).lora.rank == 3


def test_home_folders_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ["model.pipeline", "model.student", "model.critic", "prompts.file", "prompts.cache_dir", "engine.nvme_path"]
    names += ["run.output_dir"]
    more = ["evaluation.enabled=false", "engine.offload=cpu"]
    config = load_config(None, [*more, *(f"{name}=~/x/$HOME" for name in names)])
    for name in names:
        section, key = name.split(".")
        assert getattr(getattr(config, section), key) == f"{tmp_path}/x/$HOME", name
    (tmp_path / "ds.json").write_text("{}")
    assert load_config(None, [*more, "engine.deepspeed=~/ds.json"]).engine.deepspeed == {}


def test_sections_that_may_be_null_are_known():
    assert {"lora.rank", "ema.decay", "engine.zero.teacher", "engine.kept_passes.student"} <= set(known_keys())


def test_prompts_are_needed_for_any_other_pipeline():
    with pytest.raises(ConfigError, match=r"prompts\.file is not set"):
        parse_config({"model": {"pipeline": "some/model"}})


def test_fp8_needs_the_fused_blocks():
    with pytest.raises(ConfigError, match=r"model\.fp8 = no_grad needs the fused blocks: set model\.fuse=true or"):
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
