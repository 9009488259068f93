"""What can be set, and what may be set together.

A run is described by one YAML file (`configs/*.yaml`) and dotted overrides on the command line (`distill.anchor=10`). A
section `on_cpu` of the file holds settings that take the place of its others on a machine without a GPU.
Both are checked here before anything is loaded: an unknown key names its nearest neighbour, an impossible value names
the key, what it got and what is allowed. The fields' descriptions are the documentation of the settings.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import Field

CONFIG_FOLDER = next(
    (
        folder
        for folder in (Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs")
        if folder.is_dir()
    ),
    Path("configs"),
)
DEFAULT_CONFIG = CONFIG_FOLDER / "demo.yaml"


class ConfigError(ValueError):
    """A configuration that cannot be run; the message says which key, what it got and what is allowed."""


class _Section(pydantic.BaseModel):
    # validate_default: a default is held to the same rules as a value from a file.
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())


PositiveInt = Annotated[int, Field(ge=1)]


class ModelConfig(_Section):
    pipeline: str = Field(
        "demo",
        description="Teacher: a diffusers pipeline folder, a hub id, or 'demo' for the small one that ships here.",
    )
    student: str | None = Field(
        None, description="Pipeline whose transformer the student starts from (default: teacher)."
    )
    critic: str | None = Field(
        None, description="Pipeline whose transformer the critic starts from (default: teacher)."
    )
    family: Literal["sd3", "flux"] = Field("sd3", description="Which backbones/ file knows this architecture.")
    random_init: bool = Field(
        False, description="Build the architecture from its configuration alone, with random weights (benchmarks)."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    resolution: PositiveInt = Field(1024, description="Height and width of the images, in pixels.")
    max_sequence_length: PositiveInt = Field(256, description="Length of the T5 text embedding, in tokens.")
    embedded_guidance: float = Field(
        3.5, ge=0.0, description="Guidance value that guidance-distilled models (FLUX.1-dev) take as an input."
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto",
        description="Arithmetic of the networks; bfloat16 keeps float32 masters. auto: bfloat16 on CUDA, else float32.",
    )
    teacher_storage: Literal["full", "float8"] = Field(
        "full",
        description="float8: the teacher's shard is kept and gathered in FP8, a byte a weight, and becomes whole in dtype for "
        "a phase (ZeRO stage 3; its weights are rounded by it).",
    )
    fuse: bool = Field(
        True, description="On a GPU: the fused operations in the transformers' blocks (dpdmd.kernels.fuse_transformer)."
    )
    fp8: Literal["off", "no_grad"] = Field(
        "off", description="no_grad: FP8 matrix products in passes without gradient (with fuse, on a GPU that has FP8)."
    )


class PromptsConfig(_Section):
    file: str | None = Field(None, description="Prompts: .txt (one a line), .jsonl or .csv. None: the demo's own list.")
    field: str = Field("prompt", description="Key (.jsonl) or column (.csv) that holds the prompt.")
    encoding: Literal["cache", "stream"] = Field(
        "cache",
        description="cache: encode every prompt once, then train without text encoders; stream: encode each batch.",
    )
    cache_dir: str | None = Field(None, description="Folder of the embedding cache (default: <output_dir>/embeddings).")
    encode_batch_size: PositiveInt = Field(32, description="Prompts encoded at a time.")
    negative_prompt: str | None = Field(
        "", description="Prompt of the unconditional branch of guidance; null for none (then guidance_scale must be 1)."
    )


class RenoiseConfig(_Section):
    per: Literal["batch", "sample"] = Field(
        "batch", description="One time for the whole batch (paper) or one a sample."
    )
    distribution: Literal["scheduler", "training", "uniform"] = Field(
        "scheduler",
        description="scheduler: one of the 1000 times of the scheduler's set_timesteps(1000) (the authors' code; for SD3.5 "
        "down to 0.00893); training: one of its 1000 training times (down to 0.00299); uniform: between low and high.",
    )
    low: float = Field(0.02, ge=0.0, le=1.0, description="uniform: smallest noise time, as a share of the whole range.")
    high: float = Field(0.98, ge=0.0, le=1.0, description="uniform: largest noise time, as a share of the whole range.")


class DistillConfig(_Section):
    method: Literal["dpdmd", "dmd"] = Field("dpdmd", description="dpdmd: first step learns diversity; dmd: plain DMD.")
    detach: bool = Field(True, description="Stop the DMD gradient before the first step (dpdmd).")
    student_steps: PositiveInt = Field(4, description="N, network evaluations of the student.")
    student_grid: Literal["scheduler", "uniform"] | list[float] = Field(
        "scheduler",
        description="Student times: the scheduler's own (paper), uniform before the shift, or N explicit falling ones.",
    )
    teacher_steps: PositiveInt = Field(30, description="T, steps of the teacher's grid.")
    anchor: PositiveInt = Field(5, description="K, how many teacher steps make the first-step target; K = T included.")
    diversity_weight: float = Field(0.05, ge=0.0, description="lambda, weight of the first-step loss.")
    guidance_scale: float = Field(3.5, ge=0.0, description="Classifier-free guidance of the teacher; 1 for none.")
    critic_updates: PositiveInt = Field(5, description="M, critic updates before each student update.")
    normalizer: Literal["teacher", "sample", "none"] = Field(
        "teacher", description="DMD weight a sample: mean|x_t - x_real| (paper), mean|x - x_real| (DMD2), or 1."
    )
    rollout_gradient: Literal["full", "random"] = Field(
        "full", description="DMD gradient through all remaining student steps, or through one drawn at random."
    )
    renoise: RenoiseConfig = RenoiseConfig()


class OptimizerConfig(_Section):
    name: Literal["auto", "fused", "apex", "deepspeed", "torch"] = Field(
        "auto",
        description="AdamW: fused (dpdmd.optimizer, one pass over a shard), apex, DeepSpeed FusedAdam or torch. auto: "
        "fused under ZeRO stage 3, else the first of the others that is installed.",
    )
    state: Literal["float32", "bfloat16", "float8"] = Field(
        "float32",
        description="The two moments in 8, 4 or 2 bytes a parameter, of fused alone; fewer than 8 are stochastically "
        "rounded. The float32 masters stay.",
    )
    lr: float = Field(1e-5, gt=0.0, description="Learning rate.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="Decay of the two moments.")
    eps: float = Field(1e-8, gt=0.0, description="Added to the denominator.")
    weight_decay: float = Field(0.0, ge=0.0, description="Decoupled weight decay.")
    warmup: int = Field(0, ge=0, description="Updates over which the rate rises linearly from 0.")
    decay: Literal["none", "cosine"] = Field(
        "none", description="none: the rate stays (paper); cosine: falls to 0 at the end of run.iterations."
    )

    @pydantic.model_validator(mode="after")
    def _possible(self) -> OptimizerConfig:
        if self.state != "float32" and self.name not in ("auto", "fused"):
            raise ValueError(f"state = {self.state} needs name = fused (or auto), but name = {self.name}")
        return self


class ZeroConfig(_Section):
    teacher: Literal[0, 3] = Field(
        3, description="ZeRO stage of the frozen teacher: 3 shards its weights, 0 copies them."
    )
    student: Literal[0, 1, 2, 3] = Field(3, description="ZeRO stage of the student.")
    critic: Literal[0, 1, 2, 3] = Field(3, description="ZeRO stage of the critic.")


class KeptPassesConfig(_Section):
    student: int | None = Field(None, ge=0, description="Block passes of each forward chain of the student.")
    critic: int | None = Field(None, ge=0, description="Block passes of the critic's forward pass.")


class EngineConfig(_Section):
    zero: ZeroConfig = ZeroConfig()
    batch_size: PositiveInt = Field(4, description="Samples a process and forward pass.")
    accumulation: PositiveInt = Field(1, description="Forward-backward passes an update.")
    clip: float = Field(1.0, ge=0.0, description="Largest gradient norm; 0 for no clipping.")
    residency: Literal["auto", "whole", "phase", "block"] = Field(
        "auto",
        description="ZeRO stage 3: how long gathered weights stay. whole: until an update changes them; phase: for a phase "
        "(a rollout, or a forward chain with its backward pass); block: each transformer block while it runs. auto: the "
        "first of them that fits.",
    )
    checkpointing: Literal["auto", "none", "selective", "full"] = Field(
        "auto",
        description="Activations of the transformer blocks that the backward pass computes again. selective: all but "
        "attention's outputs (where the blocks are fused; else as full); full: all; auto: the first of them that fits.",
    )
    # With checkpointing: that keep their activations all the same; null: as many as fit.
    kept_passes: KeptPassesConfig = KeptPassesConfig()
    cuda_graphs: bool = Field(
        True, description="Passes without gradient are replayed as CUDA graphs, where weights stay whole (residency)."
    )
    offload: Literal["none", "cpu", "nvme"] = Field(
        "none",
        description="ZeRO stage 3: where masters and moments live and are updated (torch's AdamW, on the CPU): cpu, or nvme "
        "under nvme_path.",
    )
    nvme_path: str | None = Field(None, description="Folder on a local NVMe disk, for offload = nvme: scratch.")
    deepspeed: str | dict[str, Any] | None = Field(
        None,
        description="Own DeepSpeed settings (JSON file or mapping), merged over the built ones for student and critic.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA where there is one.")


class LoraConfig(_Section):
    rank: PositiveInt = Field(64, description="Rank of the adapters.")
    alpha: float | None = Field(None, gt=0.0, description="Adapters are scaled by alpha / rank (default: rank).")
    targets: list[str] | None = Field(
        None, description="Modules that get an adapter (default: attention and feed-forward products of the blocks)."
    )


class EmaConfig(_Section):
    decay: float = Field(0.999, gt=0.0, lt=1.0, description="The average keeps this share at each student update.")
    device: Literal["same", "cpu"] = Field("same", description="Where the float32 shard of the average lives.")


class EvaluationConfig(_Section):
    enabled: bool = Field(False, description="Measure samples in the demo's picture world; only for its models.")
    every: int = Field(0, ge=0, description="Student updates between measurements of the student; 0: only at the end.")
    num_prompts: PositiveInt = Field(64, description="Evaluation prompts.")
    num_samples: PositiveInt = Field(16, description="Samples a prompt.")


class RunConfig(_Section):
    output_dir: str = Field("runs/default", description="Folder of everything that this run writes.")
    iterations: PositiveInt = Field(
        6000, description="Updates in all, student's and critic's together (as the paper counts)."
    )
    seed: int = Field(0, ge=0, description="Seed of every draw.")
    log_every: PositiveInt = Field(1, description="Updates between lines of metrics.")
    sample_every: int = Field(0, ge=0, description="Student updates between sample grids; 0 for none.")
    sample_prompts: list[str] = Field(
        [], description="Prompts of the sample grids (default: the first of the prompt file)."
    )
    checkpoint_every: int = Field(0, ge=0, description="Iterations between checkpoints; 0: only at the end.")
    keep_checkpoints: PositiveInt = Field(2, description="How many of the newest checkpoints stay.")
    max_bad_updates: PositiveInt = Field(
        10, description="Updates in a row that may be skipped as not finite before the run stops."
    )
    tensorboard: bool = Field(True, description="Write TensorBoard events where tensorboard is installed.")
    wandb: str | None = Field(None, description="Weights & Biases project to log to, where wandb is installed.")


class Config(_Section):
    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig = PromptsConfig()
    distill: DistillConfig = DistillConfig()
    student_optimizer: OptimizerConfig = OptimizerConfig()
    critic_optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    lora: LoraConfig | None = Field(
        None, description="Student and critic as adapters on the teacher's weights, instead of copies of them."
    )
    ema: EmaConfig | None = Field(
        None, description="Exponential moving average of the student, which is then what is exported."
    )
    evaluation: EvaluationConfig = EvaluationConfig()
    run: RunConfig = RunConfig()

    @pydantic.model_validator(mode="after")
    def _possible(self) -> Config:
        distill, model = self.distill, self.model
        if distill.anchor > distill.teacher_steps:
            raise ValueError(
                f"distill.anchor = {distill.anchor} is more than distill.teacher_steps = {distill.teacher_steps}: "
                f"the teacher takes anchor of its teacher_steps steps, so 1 to {distill.teacher_steps} is possible"
            )
        if distill.method == "dpdmd" and distill.student_steps < 2:
            raise ValueError(
                f"distill.student_steps = {distill.student_steps} with distill.method = dpdmd: the first step learns "
                "diversity and at least one more learns quality, so 2 or more are needed (or distill.method=dmd)"
            )
        if distill.guidance_scale != 1.0 and self.prompts.negative_prompt is None:
            raise ValueError(
                f"distill.guidance_scale = {distill.guidance_scale} needs unconditional embeddings, but "
                'prompts.negative_prompt is null: give one ("" is the usual), or set distill.guidance_scale=1'
            )
        if isinstance(distill.student_grid, list):
            check_explicit_grid(distill.student_grid, distill.student_steps)
        low, high = distill.renoise.low, distill.renoise.high
        if low >= high:
            raise ValueError(f"distill.renoise.low = {low} is not below distill.renoise.high = {high}")
        if self.evaluation.enabled and model.pipeline != "demo":
            raise ValueError(
                "evaluation.enabled = true measures the demo's picture world, but model.pipeline = "
                f"{model.pipeline!r}: set model.pipeline=demo or evaluation.enabled=false"
            )
        if model.random_init and self.run.sample_every:
            raise ValueError(
                f"run.sample_every = {self.run.sample_every} with model.random_init = true: without the pipeline's VAE "
                "there are no pictures to show; set run.sample_every=0"
            )
        if model.fp8 != "off" and not model.fuse:
            raise ValueError(
                f"model.fp8 = {model.fp8} is of the fused operations: set model.fuse=true or model.fp8=off"
            )
        self._possible_offload()
        if model.teacher_storage == "float8" and (self.engine.zero.teacher != 3 or self.lora is not None):
            found = "lora" if self.lora is not None else f"engine.zero.teacher = {self.engine.zero.teacher}"
            raise ValueError(
                f"model.teacher_storage = float8 is of a teacher of its own under ZeRO stage 3, but there is {found}: set "
                "model.teacher_storage=full"
            )
        if self.lora is not None:
            for role in ("student", "critic"):
                if getattr(model, role) is not None:
                    raise ValueError(
                        f"model.{role} = {getattr(model, role)!r} with lora: the {role} is an adapter on the teacher's "
                        f"weights; set model.{role}=null or lora=null"
                    )
                if (stage := getattr(self.engine.zero, role)) != 3:
                    raise ValueError(f"lora needs ZeRO stage 3 for the adapters, but engine.zero.{role} = {stage}")
        if self.ema is not None and self.engine.zero.student != 3:
            raise ValueError(
                f"ema averages the shards of ZeRO stage 3, but engine.zero.student = {self.engine.zero.student}: set "
                "engine.zero.student=3 or ema=null"
            )
        if self.prompts.file is None and model.pipeline != "demo":
            raise ValueError(
                "prompts.file is not set: name a .txt, .jsonl or .csv file of prompts "
                "(only model.pipeline=demo has a list of its own)"
            )
        return self

    def _possible_offload(self) -> None:
        engine = self.engine
        if engine.offload == "none":
            return
        for role in ("student", "critic"):
            if (stage := getattr(engine.zero, role)) != 3:
                raise ValueError(
                    f"engine.offload = {engine.offload} is of ZeRO stage 3, but engine.zero.{role} = {stage}"
                )
            optimizer = getattr(self, f"{role}_optimizer")
            if optimizer.name not in ("auto", "torch") or optimizer.state != "float32":
                raise ValueError(
                    f"engine.offload = {engine.offload} is updated on the CPU with float32 moments: {role}_optimizer.name "
                    f"= {optimizer.name} with state = {optimizer.state} cannot be; auto or torch with float32 can"
                )
        if engine.offload == "nvme" and engine.nvme_path is None:
            raise ValueError("engine.offload = nvme needs engine.nvme_path, a folder on a local disk")
        if engine.offload == "nvme" and self.ema is not None:
            raise ValueError(
                "ema averages masters, which engine.offload = nvme keeps on the disk: set ema=null or offload=cpu"
            )


def check_explicit_grid(grid: list[float], student_steps: int) -> None:
    if len(grid) != student_steps or any(a <= b for a, b in itertools.pairwise(grid)) or min(grid) <= 0:
        raise ValueError(
            f"distill.student_grid = {grid}: {student_steps} falling times above 0 are needed "
            "(distill.student_steps of them, the end at 0 not listed)"
        )


def load_config(path: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads a YAML file (None: the demo) and applies `section.key=value` overrides, whose values are YAML.

    Raises ConfigError for a missing or malformed file, an unknown key (naming the nearest known), an impossible value.
    """
    path = Path(path) if path is not None else DEFAULT_CONFIG
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not a YAML file: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: holds a {type(values).__name__}; sections with keys are needed")
    on_cpu = values.pop("on_cpu", None) or {}
    given = read_overrides(overrides)
    if on_cpu and _without_gpu(merged(values, given)):
        values = merged(values, on_cpu)
    return parse_config(merged(values, given))


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over` in the place of its own, sections merged key by key; neither is changed."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        result[key] = merged(base[key], value) if both else value
    return result


def _without_gpu(values: dict[str, Any]) -> bool:
    device = (values.get("engine") or {}).get("device", "auto")
    if device != "auto":
        return device == "cpu"
    import torch

    return not torch.cuda.is_available()


def parse_config(values: dict[str, Any]) -> Config:
    """Checks a nested mapping. Raises ConfigError with one line for each thing that is wrong."""
    try:
        return Config.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(_explain(problem) for problem in error.errors())) from error


def to_yaml(config: Config) -> str:
    """The resolved configuration as a file that `load_config` reads back to the same."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """`section.key=value`, values as YAML has them, as a nested mapping. Raises ConfigError for what has another form."""
    given: dict[str, Any] = {}
    for override in overrides:
        _apply(given, override)
    return given


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r}: the form is section.key=value, for example distill.anchor=10")
    *sections, name = key.split(".")
    for section in sections:
        below = values.setdefault(section, {})
        if not isinstance(below, dict):
            raise ConfigError(f"override {override!r}: {section} is a value, not a section")
        values = below
    try:
        values[name] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from error


def _explain(problem: dict[str, Any]) -> str:
    location = [str(part) for part in problem["loc"] if not str(part).startswith(("list[", "literal["))]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.0)
        return f"{key}: unknown key; the nearest known is {nearest[0]}"
    if problem["type"] == "value_error":
        return f"{key}: {problem['ctx']['error']}" if key else str(problem["ctx"]["error"])
    return f"{key} = {problem['input']!r}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"


def known_keys(section: type[pydantic.BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted name: sections and the keys in them."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
    return keys
