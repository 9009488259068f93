"""The settings of a run: their types, ranges and defaults, and which of them exclude each other.

A run is one YAML file (`configs/*.yaml`) and overrides on the command line (`distill.anchor=10`). On a machine without a
GPU the settings in the file's section `on_cpu` replace its others. All of it is checked before anything loads: an error
names the key, its value and what is allowed; for an unknown key, the nearest known one. The descriptions of the fields
document the settings.

A whole number is not text, `true` or 4.0; a number is finite; every number has a range. Names of files and folders may
begin with `~` or `~user`.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import reprlib
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, PlainValidator, Tag
from yaml.composer import ComposerError

from dpdmd.command import ConfigError, expand, one_line
from dpdmd.files import open_file

ROLES = ("teacher", "student", "critic")
TRAINED = ("student", "critic")

CONFIG_FOLDER = Path(__file__).parent / "configs"
DEFAULT_CONFIG = CONFIG_FOLDER / "demo.yaml"
WORLDS = Path(__file__).parent / "worlds"  # a folder each, with an evaluation and a teacher
SHIPPED_WORLDS = sorted(file.parent.name for file in WORLDS.glob("*/evaluation.py"))


class _Section(pydantic.BaseModel):
    # strict: "4", true and 4.0 are not whole numbers.
    model_config = pydantic.ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        protected_namespaces=(),
    )


# Types of settings. Upper limits catch slips such as 10**20; no machine comes near them.


def _number(value: Any) -> Any:
    # YAML 1.1, which other programs write, reads 1e-5 as text.
    return float(value) if isinstance(value, str) and _FLOAT_OR_INT.fullmatch(value) else value


def _name(value: str) -> str:
    if not value.strip() or any(character < " " or character == "\x7f" for character in value):
        raise ValueError("a name is needed, not empty and without control characters")
    return value


def _clip(value: float) -> float:
    if 0 < value < 1e-6:
        raise ValueError("input should be 0, or from 1e-6 on: with less the gradient vanishes")
    return value


def _world(value: str) -> str:
    module, _, attribute = value.partition(":")
    if value not in SHIPPED_WORLDS and not all(name.isidentifier() for name in (*module.split("."), attribute)):
        raise ValueError(
            f"no world of that name ships ({', '.join(SHIPPED_WORLDS)} does); name your own as package.module:attribute"
        )
    return value


def _off(value: Any) -> Any:
    return "off" if value is False else value  # YAML reads the word as false


def _stage(value: Any) -> Any:
    if type(value) is not int:  # Literal takes false and 0.0 for 0
        raise ValueError("input should be 0 or 3")
    return value


def _own_stage(value: Any, info: pydantic.ValidationInfo) -> Any:
    if type(value) is not int or value != 3:
        raise ValueError(
            f"the {info.field_name} is always sharded by the engine's own stage 3 (stages 0 to 2 were removed: on one "
            "process stage 3 copies nothing)"
        )
    return value


# DeepSpeed's own settings that apply: those of optimizer state on the host or a disk. Value: the largest number, or bool.
_DEEPSPEED: dict[str, dict[str, int | type[bool]]] = {
    "aio": {
        "block_size": 2**30,
        "queue_depth": 2**16,
        "intra_op_parallelism": 2**10,
        "single_submit": bool,
        "overlap_events": bool,
    },
    "zero_optimization": {"sub_group_size": 2**40},
}
_INSTEAD = {
    "train_batch_size": "engine.batch_size and engine.accumulation",
    "train_micro_batch_size_per_gpu": "engine.batch_size",
    "gradient_accumulation_steps": "engine.accumulation",
    "gradient_clipping": "engine.clip",
    "optimizer": "student_optimizer and critic_optimizer",
    "scheduler": "warmup and decay of student_optimizer and critic_optimizer",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "torch_autocast": "model.dtype",
    "activation_checkpointing": "engine.checkpointing",
    "tensorboard": "run.tensorboard",
    "wandb": "run.wandb",
    "zero_optimization.stage": "engine.zero",
    "zero_optimization.offload_optimizer": "engine.offload and engine.nvme_path",
    "zero_optimization.offload_param": "engine.zero, residency or lora",
}


def _deepspeed_section(section: str, given: Any) -> dict[str, int | bool]:
    if section not in _DEEPSPEED:
        raise ValueError(_not_for_deepspeed(section))
    if not isinstance(given, dict):
        raise ValueError(f"{section} = {shown(given)}: a mapping is needed")
    settings = {}
    for key, value in given.items():
        most = _DEEPSPEED[section].get(key)
        if most is None:
            raise ValueError(_not_for_deepspeed(f"{section}.{key}"))
        if isinstance(value, float) and value.is_integer():  # DeepSpeed files often have 5e8
            value = int(value)
        if most is bool and not isinstance(value, bool):
            raise ValueError(f"{section}.{key} = {shown(value)}: true or false is needed")
        if most is not bool and (type(value) is not int or not 1 <= value <= most):
            raise ValueError(f"{section}.{key} = {shown(value)}: a whole number from 1 to {most} is needed")
        settings[key] = value
    return settings


def _not_for_deepspeed(name: str) -> str:
    if name in _INSTEAD:
        return f"{name} is decided by the engine itself: take {_INSTEAD[name]} instead"
    known = ", ".join(f"{section}.{key}" for section, keys in _DEEPSPEED.items() for key in keys)
    return f"{printable(name)} is not used; the DeepSpeed settings that are used: {known}"


def _deepspeed(value: Any) -> dict[str, dict[str, int | bool]]:
    """DeepSpeed's own settings, from a mapping or a JSON file. Raises ValueError for a setting that the engine decides or
    does not use, and for an impossible value."""
    if isinstance(value, str):
        try:
            value = json.loads(read_file(Path(expand(value)), most=_MOST_BYTES))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"not a JSON file ({error})") from error
        if not isinstance(value, dict):
            raise ValueError(f"{shown(value)}: a mapping is needed")
    elif not isinstance(value, dict):
        raise ValueError("a JSON file or a mapping is needed")
    return {section: _deepspeed_section(section, given) for section, given in value.items()}


Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
CountFrom0 = Annotated[int, Field(ge=0, le=2**31 - 1)]
LARGEST_SIZE = 2**16
Size = Annotated[int, Field(ge=1, le=LARGEST_SIZE)]  # of something that memory holds as a whole
Number = Annotated[float, BeforeValidator(_number)]
NonNegative = Annotated[Number, Field(ge=0.0, le=1e6)]
Clip = Annotated[NonNegative, AfterValidator(_clip)]
Guidance = Annotated[Number, Field(ge=0.0, le=1000.0)]
Share = Annotated[Number, Field(ge=0.0, le=1.0)]
Decay = Annotated[Number, Field(ge=0.0, lt=1.0)]
Name = Annotated[str, AfterValidator(_name)]
Location = Annotated[str, AfterValidator(expand)]  # of a file, a folder or a pipeline


class ModelConfig(_Section):
    pipeline: Location = Field(
        default="demo",
        description="Teacher: a diffusers pipeline folder, a hub id, or 'demo' for the small one that ships here.",
    )
    student: Location | None = Field(
        default=None, description="Pipeline of the initial student (default: the teacher)."
    )
    critic: Location | None = Field(default=None, description="Pipeline of the initial critic (default: the teacher).")
    family: Location | None = Field(
        default=None,
        description="Model family: a file of backbones/ or a Python file of your own (default: by the pipeline's class).",
    )
    random_init: bool = Field(default=False, description="Random weights instead of the pipeline's (benchmarks).")
    revision: Name | None = Field(default=None, description="Branch, tag or commit of a hub id.")
    resolution: Size = Field(default=1024, description="Height and width of the images, in pixels.")
    max_sequence_length: Size = Field(
        default=256,
        description="Length of the T5 text embedding, in tokens. 256 is the default for every family; FLUX.1's own pipeline "
        "takes 512 (configs/flux_lora.yaml). SD3's CLIP tokens (77) come on top.",
    )
    embedded_guidance: Guidance = Field(
        default=3.5, description="Guidance input of guidance-distilled models (FLUX.1-dev)."
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto",
        description="Dtype the networks compute in; masters stay float32. auto: bfloat16 on CUDA, else float32.",
    )
    teacher_storage: Literal["full", "float8"] = Field(
        default="full",
        description="float8: the teacher's shard is kept and gathered in FP8, one byte a weight, and converted to dtype for a "
        "phase; this rounds its weights (needs ZeRO stage 3 and no LoRA).",
    )
    fuse: bool = Field(default=True, description="Fused blocks on a GPU (dpdmd.kernels.fuse_transformer).")
    fp8: Annotated[Literal["off", "no_grad"], BeforeValidator(_off)] = Field(
        default="off",
        description="no_grad: FP8 matmuls in passes without gradient (needs fuse, and a GPU with FP8).",
    )


class PromptsConfig(_Section):
    file: Location | None = Field(
        default=None, description=".txt (one prompt a line), .jsonl or .csv (default: the world's)."
    )
    field: Name = Field(default="prompt", description="Key (.jsonl) or column (.csv) that holds the prompt.")
    encoding: Literal["cache", "stream"] = Field(
        default="cache",
        description="cache: encode every prompt once, then train without text encoders; stream: encode each batch.",
    )
    cache_dir: Location | None = Field(
        default=None, description="Folder of embeddings (default: <output_dir>/embeddings)."
    )
    encode_batch_size: Size = Field(default=32, description="Prompts encoded at a time.")
    negative_prompt: str | None = Field(
        default="",
        description="Prompt of the unconditional pass; null for none (then distill.guidance_scale must be 1).",
    )


class RenoiseConfig(_Section):
    per: Literal["batch", "sample"] = Field(
        default="batch", description="One noise time for the whole batch (paper) or one a sample."
    )
    distribution: Literal["scheduler", "training", "uniform"] = Field(
        default="scheduler",
        description="Noise times. scheduler: the scheduler's set_timesteps(1000) (the authors' code; for SD3.5 down to "
        "0.00893); training: its 1000 training times (down to 0.00299); uniform: between low and high.",
    )
    low: Share = Field(default=0.02, description="uniform: smallest noise time, as a share of the range.")
    high: Share = Field(default=0.98, ge=1e-3, description="uniform: largest noise time, as a share of the range.")


class DistillConfig(_Section):
    method: Literal["dpdmd", "dmd"] = Field(
        default="dpdmd", description="dpdmd: first step learns diversity; dmd: plain DMD."
    )
    detach: bool = Field(default=True, description="Stop the DMD gradient before the first step (dpdmd).")
    student_steps: Size = Field(default=4, description="N, network evaluations of the student.")
    student_grid: Annotated[
        Annotated[Literal["scheduler", "uniform"], Tag("literal[]")] | Annotated[list[Number], Tag("list[]")],
        Discriminator(lambda value: "list[]" if isinstance(value, list) else "literal[]"),
    ] = Field(
        default="scheduler",
        description="Student times: the scheduler's own (paper), uniform before the shift, or N explicit falling ones.",
    )
    teacher_steps: Size = Field(default=30, description="T, steps of the teacher's grid.")
    anchor: Size = Field(default=5, description="K, teacher steps that make the first-step target; at most T.")
    diversity_weight: NonNegative = Field(default=0.05, description="lambda, weight of the first-step loss.")
    guidance_scale: Guidance = Field(
        default=3.5,
        description="Classifier-free guidance s of the teacher, u + s (c - u); 1 for none. (Where a pipeline computes "
        "c + s (c - u), add 1 to its scale.)",
    )
    critic_updates: Count = Field(default=5, description="M, critic updates before each student update.")
    normalizer: Literal["teacher", "sample", "none"] = Field(
        default="teacher",
        description="Divisor of a sample's DMD gradient: mean|x_t - x_real| (paper), mean|x - x_real| (DMD2), or 1.",
    )
    rollout_gradient: Literal["full", "random"] = Field(
        default="full", description="DMD gradient through all remaining student steps, or through a random one."
    )
    renoise: RenoiseConfig = RenoiseConfig()


class OptimizerConfig(_Section):
    name: Literal["auto", "fused", "apex", "deepspeed", "torch"] = Field(
        default="auto",
        description="AdamW: fused (dpdmd.engine.optimizer, one pass over a shard), apex, DeepSpeed FusedAdam or torch. "
        "auto: fused, or torch with engine.offload.",
    )
    state: Literal["float32", "bfloat16", "float8"] = Field(
        default="float32",
        description="Dtype of the two moments: 8, 4 or 2 bytes a parameter together. bfloat16 and float8 need fused, and "
        "are stochastically rounded. Masters stay float32.",
    )
    lr: Number = Field(default=1e-5, ge=1e-12, le=1e30, description="Learning rate.")  # less changes no float32 weight
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.999), strict=False, description="Decay of the two moments.")
    eps: Number = Field(default=1e-8, ge=1e-30, le=1.0, description="Added to the denominator.")
    weight_decay: Number = Field(default=0.0, ge=0.0, le=10.0, description="Decoupled weight decay.")
    warmup: CountFrom0 = Field(default=0, description="Updates over which the rate rises linearly from 0.")
    decay: Literal["none", "cosine"] = Field(
        default="none", description="none: constant rate (paper); cosine: falls to 0 at the end of run.iterations."
    )

    @pydantic.model_validator(mode="after")
    def _possible(self) -> OptimizerConfig:
        if self.state != "float32" and self.name not in ("auto", "fused"):
            raise ValueError(f"state = {self.state} needs name = fused (or auto), but name = {self.name}")
        return self


class ZeroConfig(_Section):
    teacher: Annotated[Literal[0, 3], BeforeValidator(_stage)] = Field(
        default=3, description="ZeRO stage of the frozen teacher. 3: its weights are sharded; 0: each process has all."
    )
    student: Annotated[Literal[3], BeforeValidator(_own_stage)] = Field(default=3, description="ZeRO stage; always 3.")
    critic: Annotated[Literal[3], BeforeValidator(_own_stage)] = Field(default=3, description="ZeRO stage; always 3.")


class KeptPassesConfig(_Section):
    student: CountFrom0 | None = Field(
        default=None,
        description="With checkpointing: block passes of each forward chain that keep their activations; "
        "null: as many as fit.",
    )
    critic: CountFrom0 | None = Field(default=None, description="The same for the critic's forward pass.")


class EngineConfig(_Section):
    zero: ZeroConfig = ZeroConfig()
    batch_size: Size = Field(default=4, description="Samples of one forward pass on one process.")
    accumulation: Size = Field(default=1, description="Forward-backward passes of one update.")
    clip: Clip = Field(default=1.0, description="Largest gradient norm; 0 for no clipping.")
    residency: Literal["auto", "whole", "phase", "block"] = Field(
        default="auto",
        description="ZeRO stage 3: how long gathered weights stay. whole: until an update changes them; phase: for a phase "
        "(a rollout, or a forward chain with its backward pass); block: each transformer block while it runs. auto: the "
        "fastest that fits.",
    )
    checkpointing: Literal["auto", "none", "selective", "full"] = Field(
        default="auto",
        description="Activations of the transformer blocks that the backward pass recomputes. selective: all except "
        "attention's outputs (needs fused blocks, else as full); full: all; auto: the fastest that fits.",
    )
    kept_passes: KeptPassesConfig = KeptPassesConfig()
    cuda_graphs: bool = Field(
        default=True, description="Replay passes without gradient as CUDA graphs where residency is whole."
    )
    offload: Literal["none", "cpu", "nvme"] = Field(
        default="none",
        description="Keep masters and moments in host memory (cpu) or under nvme_path (nvme), and update them on the CPU with "
        "torch's AdamW.",
    )
    nvme_path: Location | None = Field(default=None, description="Folder on a local NVMe disk, for offload = nvme.")
    deepspeed: Annotated[dict[str, Any], PlainValidator(_deepspeed)] | None = Field(
        default=None,
        description="DeepSpeed's own settings for offload, a JSON file or a mapping: aio.* (nvme) and "
        "zero_optimization.sub_group_size.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: CUDA where it is available.")


class LoraConfig(_Section):
    rank: Size = Field(default=64, description="Rank of the adapters.")
    alpha: Number | None = Field(
        default=None, ge=1e-3, le=1e6, description="Scales adapters by alpha / rank (default: rank)."
    )
    targets: list[Name] | None = Field(
        default=None,
        min_length=1,
        description="Modules that get an adapter (default: the blocks' attention and feed-forward layers).",
    )


class EmaConfig(_Section):
    decay: Number = Field(  # nearer to 1 a float32 average no longer changes
        default=0.999, gt=0.0, le=0.99999, description="The average keeps this share at each student update."
    )
    device: Literal["same", "cpu"] = Field(default="same", description="Device of the average's float32 shard.")


class EvaluationConfig(_Section):
    enabled: bool = Field(default=False, description="Measure samples in a world (evaluation/protocol.py).")
    world: Annotated[Name, AfterValidator(_world)] | None = Field(
        default=None,
        description="Name of a world that ships, or package.module:attribute of your own (default: model.pipeline, if it is "
        "such a name).",
    )
    every: CountFrom0 = Field(default=0, description="Student updates between measurements; 0: only at the end.")
    num_prompts: int = Field(default=64, ge=1, le=4096, description="Evaluation prompts.")
    num_samples: Size = Field(default=16, description="Samples a prompt.")


class RunConfig(_Section):
    output_dir: Location = Field(default="runs/default", description="Folder that the run writes to.")
    iterations: Count = Field(default=6000, description="Updates of student and critic together (as the paper counts).")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of all random numbers.")
    log_every: Count = Field(default=1, description="Updates of a role between its lines of metrics.")
    sample_every: CountFrom0 = Field(default=0, description="Student updates between sample grids; 0 for none.")
    sample_prompts: list[str] = Field(default=[], description="Prompts of sample grids (default: the first prompts).")
    checkpoint_every: CountFrom0 = Field(default=0, description="Iterations between checkpoints; 0: only at the end.")
    keep_checkpoints: Count = Field(default=2, description="Number of newest checkpoints to keep.")
    max_bad_updates: Count = Field(default=10, description="Non-finite updates in a row that stop the run.")
    tensorboard: bool = Field(default=True, description="Write TensorBoard events if tensorboard is installed.")
    wandb: Name | None = Field(default=None, description="Weights & Biases project to log to (needs wandb).")


class Config(_Section):
    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig = PromptsConfig()
    distill: DistillConfig = DistillConfig()
    student_optimizer: OptimizerConfig = OptimizerConfig()
    critic_optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    lora: LoraConfig | None = Field(
        default=None,
        description="Train student and critic as adapters on the teacher's weights, not as copies of them.",
    )
    ema: EmaConfig | None = Field(default=None, description="Export an exponential moving average of the student.")
    evaluation: EvaluationConfig = EvaluationConfig()
    run: RunConfig = RunConfig()

    @pydantic.model_validator(mode="after")
    def _possible(self) -> Config:
        distill, model = self.distill, self.model
        if distill.anchor > distill.teacher_steps:
            raise ValueError(
                f"distill.anchor = {distill.anchor} is more than distill.teacher_steps = {distill.teacher_steps}: "
                f"1 to {distill.teacher_steps} is possible"
            )
        if distill.method == "dpdmd" and distill.student_steps < 2:
            raise ValueError(
                f"distill.student_steps = {distill.student_steps} with distill.method = dpdmd: the first step learns "
                "diversity and the others quality, so 2 or more are needed (or distill.method=dmd)"
            )
        if distill.guidance_scale != 1.0 and self.prompts.negative_prompt is None:
            raise ValueError(
                f"distill.guidance_scale = {distill.guidance_scale} needs unconditional embeddings, but "
                'prompts.negative_prompt is null: give one ("" is usual), or set distill.guidance_scale=1'
            )
        if self.run.iterations <= distill.critic_updates:
            raise ValueError(
                f"run.iterations = {self.run.iterations} with distill.critic_updates = {distill.critic_updates}: the student "
                f"would never be updated; {distill.critic_updates + 1} iterations or more are needed"
            )
        grid, steps = distill.student_grid, distill.student_steps
        if isinstance(grid, list) and (len(grid) != steps or grid != sorted({*grid}, reverse=True) or grid[-1] <= 0):
            raise ValueError(
                f"distill.student_grid = {shown(grid)}: {steps} falling times above 0 are needed "
                "(distill.student_steps of them; the end at 0 is not listed)"
            )
        low, high = distill.renoise.low, distill.renoise.high
        if low >= high:
            raise ValueError(f"distill.renoise.low = {low} is not below distill.renoise.high = {high}")
        shipped = " or ".join(SHIPPED_WORLDS)
        if self.evaluation.enabled and self.world is None:
            raise ValueError(
                f"evaluation.enabled = true needs a world, and model.pipeline = {model.pipeline!r} is none: set "
                f"evaluation.world={shipped}, a world of your own, or evaluation.enabled=false"
            )
        if model.random_init and self.run.sample_every:
            raise ValueError(
                f"run.sample_every = {self.run.sample_every} with model.random_init = true: there is no VAE to decode "
                "samples with; set run.sample_every=0"
            )
        if model.fp8 != "off" and not model.fuse:
            raise ValueError(f"model.fp8 = {model.fp8} needs the fused blocks: set model.fuse=true or model.fp8=off")
        self._possible_offload()
        if model.teacher_storage == "float8" and (self.engine.zero.teacher != 3 or self.lora is not None):
            found = "lora is set" if self.lora is not None else f"engine.zero.teacher = {self.engine.zero.teacher}"
            raise ValueError(
                f"model.teacher_storage = float8 needs ZeRO stage 3 and no LoRA, but {found}: set model.teacher_storage=full"
            )
        if self.lora is not None:
            for role in TRAINED:
                if getattr(model, role) is not None:
                    raise ValueError(
                        f"model.{role} = {getattr(model, role)!r} with lora: the {role} is an adapter on the teacher's "
                        f"weights; set model.{role}=null or lora=null"
                    )
        if self.prompts.file is None and self.world is None:
            raise ValueError(
                "prompts.file is not set: name a .txt, .jsonl or .csv file of prompts "
                f"(only model.pipeline={shipped} has its own list)"
            )
        return self

    def optimizer(self, role: str) -> OptimizerConfig:
        """Settings of the student's or the critic's optimizer."""
        return self.student_optimizer if role == "student" else self.critic_optimizer

    @property
    def world(self) -> str | None:
        """The world that measures the run and provides prompts where prompts.file is not set; None for none."""
        return self.evaluation.world or (self.model.pipeline if self.model.pipeline in SHIPPED_WORLDS else None)

    def num_updates(self, role: str) -> int:
        """Number of updates of a role in the whole run."""
        of_student = self.run.iterations // (self.distill.critic_updates + 1)
        return of_student if role == "student" else self.run.iterations - of_student

    def _possible_offload(self) -> None:
        engine = self.engine
        if engine.offload == "none":
            if engine.deepspeed is not None:
                offload = "nvme (with engine.nvme_path)" if "aio" in engine.deepspeed else "cpu"
                raise ValueError(
                    f"engine.deepspeed = {shown(engine.deepspeed)} with engine.offload = none has no effect: set "
                    f"engine.deepspeed=null or engine.offload={offload}"
                )
            return
        for role in TRAINED:
            optimizer = self.optimizer(role)
            if optimizer.name not in ("auto", "torch") or optimizer.state != "float32":
                raise ValueError(
                    f"engine.offload = {engine.offload} with {role}_optimizer.name = {optimizer.name} and state = "
                    f"{optimizer.state}: offload needs name auto or torch, and state=float32"
                )
        if engine.offload == "cpu" and "aio" in (engine.deepspeed or {}):
            raise ValueError(
                "engine.deepspeed has aio, which has no effect with engine.offload = cpu: leave aio out or set "
                "engine.offload=nvme (with engine.nvme_path)"
            )
        if engine.offload == "nvme" and engine.nvme_path is None:
            raise ValueError("engine.offload = nvme needs engine.nvme_path, a folder on a local disk")
        if engine.offload == "nvme" and self.ema is not None:
            raise ValueError(
                "ema with engine.offload = nvme: the masters must be in memory; set ema=null or engine.offload=cpu"
            )


def load_config(path: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads a YAML file (None: the demo) and applies `section.key=value` overrides, whose values are YAML.

    Raises ConfigError for a missing or malformed file, an unknown key (naming the nearest known), an impossible value.
    """
    try:
        path = Path(expand(str(path))) if path is not None else DEFAULT_CONFIG
    except ValueError as error:
        raise ConfigError(f"--config {shown(str(path))}: {error}") from error
    where = f"--config {printable(str(path))}: "
    data = read_file(path, where, most=_MOST_BYTES)
    try:
        values = _read_yaml(data.decode("utf-8-sig"))
    except ValueError as error:
        raise ConfigError(f"{where}not a YAML file: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{where}holds a {type(values).__name__}; sections with keys are needed")
    on_cpu = values.pop("on_cpu", None)
    on_cpu = {} if on_cpu is None else on_cpu
    if not isinstance(on_cpu, dict):
        raise ConfigError(
            f"{where}on_cpu = {shown(on_cpu)}: sections with keys are needed, as in `on_cpu: {{engine: {{batch_size: 2}}}}`"
        )
    try:  # on machines with a GPU too
        Config.model_validate(on_cpu)
    except pydantic.ValidationError as error:  # problems without a key concern settings that on_cpu does not hold
        found = [_explain(problem, "on_cpu.") for problem in error.errors(include_url=False) if problem["loc"]]
        if found:
            raise ConfigError("\n".join(dict.fromkeys(found))) from error
    given = read_overrides(overrides)
    if on_cpu and _without_gpu(merged(values, given)):
        values = merged(values, on_cpu)
    return parse_config(merged(values, given))


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """A copy of `base` in which values of `over` replace its own; sections are merged key by key."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        result[key] = merged(base[key], value) if both else value
    return result


def _without_gpu(values: dict[str, Any]) -> bool:
    engine = values.get("engine")
    device = engine.get("device", "auto") if isinstance(engine, dict) else "auto"  # any other value is refused later
    if device != "auto":
        return device == "cpu"
    import torch

    return not torch.cuda.is_available()


def parse_config(values: dict[str, Any]) -> Config:
    """Checks a nested mapping. Raises ConfigError with one line for each problem."""
    try:
        _check_shape(values)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        return Config.model_validate(values)
    except pydantic.ValidationError as error:
        found = [_explain(problem) for problem in error.errors(include_url=False)]
        raise ConfigError("\n".join(dict.fromkeys(found))) from error


def to_yaml(config: Config) -> str:
    """The configuration as YAML text that `load_config` reads back to an equal one."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """Reads `section.key=value` texts, whose values are YAML, into a nested mapping; a later one wins. Raises ConfigError
    for a text of another form."""
    given: dict[str, Any] = {}
    for override in overrides:
        try:
            given = merged(given, _read_override(override))
        except ValueError as error:
            raise ConfigError(f"override {shown(override)}: {error}") from error
    return given


def _read_override(override: str) -> dict[str, Any]:
    """One override as a nested mapping. Raises ValueError, also for a value of which YAML would read less than it shows."""
    key, separator, text = override.partition("=")
    names, value = key.split("."), text.lstrip()
    if not separator or not all(names) or len(names) > 9:
        raise ValueError("the form is section.key=value, for example distill.anchor=10")
    if value.rstrip() in ("", "~"):  # both are null in YAML, which is seldom meant
        given = "your home folder is ~/" if value else "nothing follows the ="
        raise ValueError(f'{given}; write null for none, or "" for an empty text')
    if value[0] not in "[{":
        if re.search("[\n\r\x85\u2028\u2029]", value):  # YAML reads a space, in quotes too
            raise ValueError("a value with line ends needs quotes of its own, and \\n for each: 'key=\"one\\ntwo\"'")
        if re.search(r"\s#", value) and value[0] not in "'\"":  # YAML reads a comment
            raise ValueError(
                "a value with a # after a space needs quotes of its own inside the shell's: 'key=\"value\"'"
            )
    try:
        nested: Any = _read_yaml(text)
    except ValueError as error:
        raise ValueError(f"the value is not YAML: {error}") from error
    for name in reversed(names):
        nested = {name: nested}
    return nested


# Files


_MOST_BYTES = 2**20  # of a file of settings: PyYAML needs some seconds for these


def read_file(path: Path, where: str = "", most: int | None = None) -> bytes:
    """The content of a regular file. Raises ConfigError, its message beginning with `where`, for a file that cannot be
    read, is a pipe, folder or device, or has more than `most` bytes."""
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read() if most is None else file.read(most + 1)
    except OSError as error:
        raise ConfigError(f"{where}cannot be read ({error.strerror})") from error
    except ValueError as error:  # a NUL in the name, or half of a surrogate pair
        raise ConfigError(f"{where}cannot be read ({error})") from error
    if most is not None and len(data) > most:
        raise ConfigError(f"{where}cannot be read ({size} bytes; at most {most} are allowed)")
    refuse_pointer(data[:POINTER_BYTES], f"{where}it")
    return data


_POINTERS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
POINTER_BYTES = max(map(len, _POINTERS))  # enough to recognise one


def refuse_pointer(beginning: bytes, where: str) -> None:
    """Raises ConfigError, its message beginning with `where`, if a file with this beginning is a git-lfs pointer."""
    if beginning.startswith(_POINTERS):
        raise ConfigError(f"{where} is a git-lfs pointer, not the file itself: run `git lfs pull` in its repository")


# YAML


_FLOAT = (
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_INT = r"[-+]?(?:0|[1-9][0-9_]{0,99})|[-+]?0x[0-9a-fA-F]{1,32}"
_FLOAT_OR_INT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


class _Loader(yaml.SafeLoader):
    """Plain YAML: text, numbers, true and false, null, lists and mappings. Duplicate keys and tags are errors.

    As in YAML 1.2, 1e-5 is a number, and 2020-12-25, 1:30 (90 in YAML 1.1) and 010 (8) are text.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's name
        first: [(tag, pattern) for tag, pattern in known if tag.rpartition(":")[2] in ("bool", "null", "merge")]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent, index):
        event = self.peek_event()
        if getattr(event, "tag", None) not in (None, "!"):
            raise ComposerError(None, None, f"the tag {event.tag} is not read", event.start_mark)
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        seen = {}
        for key, _ in node.value:
            name = key.tag, key.value if isinstance(key, yaml.ScalarNode) else id(key)
            if name in seen:
                problem = f"the key {shown(key.value)} stands twice, in line {seen[name].start_mark.line + 1} too"
                raise ComposerError(None, None, problem, key.start_mark)
            seen[name] = key
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as something else."""

    def represent_str(self, data):
        # Outside double quotes PyYAML writes these unescaped, and reads a line break.
        style = '"' if any(character in data for character in "\r\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)
for _each in (_Loader, _Dumper):
    _each.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(f"(?:{_INT})$"), list("-+0123456789"))
    _each.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"(?:{_FLOAT})$"), list("-+0123456789."))


def _read_yaml(text: str) -> Any:
    """The value of a YAML text, checked by `_check_shape`. Raises ValueError with one line."""
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{one_line(error.problem)}") from error
    except yaml.YAMLError as error:
        raise ValueError(one_line(error)) from error
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    _check_shape(value)
    return value


_TOO_DEEP = "it is nested more than 30 deep, or holds itself"


def _check_shape(value: Any) -> None:
    """Raises ValueError for too many or too deeply nested values (aliases can stand for billions), keys that are not text,
    and text that UTF-8 cannot encode."""
    for number, (key, each) in enumerate(_everything(value)):
        if number > 100_000:
            raise ValueError("it holds more than 100000 values (aliases counted where they stand)")
        if isinstance(each, str) and not _encodable(each):
            raise ValueError(f"{key} = {shown(each)}: holds half of a surrogate pair, which is no character")


def _everything(value: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a value and of everything in it."""
    if depth > 30:
        raise ValueError(_TOO_DEEP)
    yield key, value
    if isinstance(value, dict):
        for name, below in value.items():
            if not isinstance(name, str) or not _encodable(name):
                raise ValueError(f"{key}{'.' * bool(key)}{shown(name)}: a key has to be text (quote it)")
            yield from _everything(below, f"{key}{'.' * bool(key)}{printable(name)}", depth + 1)
    elif isinstance(value, list):
        for index, below in enumerate(value):
            yield from _everything(below, f"{key}{'.' * bool(key)}{index}", depth + 1)


def _encodable(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


# Errors


_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother, _short.maxlong = 3, 120, 120, 120
_short.maxdict = _short.maxlist = _short.maxtuple = 8


def shown(value: Any) -> str:
    """`value` for a message: its repr, shortened to one line."""
    try:
        return _short.repr(value)
    except ValueError:  # Python prints no number of thousands of digits
        return "a number of thousands of digits"


def printable(text: str) -> str:
    """A name for a message: unchanged where it fits into one line, else its shortened repr."""
    return text if text.isprintable() and len(text) <= 300 else shown(text)


def _explain(problem: Mapping[str, Any], before: str = "") -> str:
    parts = [part for part in problem["loc"] if part not in ("list[]", "literal[]")]
    key, value, kind = ".".join(printable(str(part)) for part in parts), problem["input"], problem["type"]
    if kind == "extra_forbidden":
        return f"{before}{key}: unknown key; {_nearest(parts)}"
    if kind == "model_type":
        return f"{before}{key or 'the configuration'} = {shown(value)}: {_section_needed(parts)}"
    if kind == "value_error":
        if not key:
            return str(problem["ctx"]["error"])
        given = "" if isinstance(value, dict) else f" = {shown(value)}"
        return f"{before}{key}{given}: {problem['ctx']['error']}"
    message = one_line(problem["msg"][:1].lower() + problem["msg"][1:])
    if kind == "missing":  # a value of a pair; the input is the pair
        key, message = key.rpartition(".")[0], "2 values are needed"
    elif kind == "too_long":
        message = f"{problem['ctx']['max_length']} values are needed"
    elif kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        (bound,) = problem["ctx"].values()  # pydantic writes 1e-30 with all its zeros
        message = f"{message.rpartition(' ')[0]} {bound:g}" if isinstance(bound, float) else message
    elif "literal[]" in problem["loc"]:
        message += ", or a list of times"
    elif kind == "string_type" and isinstance(value, bool | int | float | None):
        message += "; quote text that YAML reads as a number, true, false or null: 'key=\"text\"'"
    elif kind == "int_type" and re.fullmatch(r"[1-9][0-9]{0,14}(?:\.0)?", str(value)):
        message += f", as {int(float(value))} is"
    return f"{before}{key} = {shown(value)}: {message}"


def _section_needed(parts: list[str]) -> str:
    """The form of a section, for a message about another value under its name."""
    section: Any = Config
    optional = False
    for part in parts:
        annotation = section.model_fields[part].annotation
        section, optional = _section_of(annotation), type(None) in typing.get_args(annotation)
    if section is Config:
        return "sections with keys are needed"
    fields = {name: field.default for name, field in section.model_fields.items()}
    plain = [name for name, default in fields.items() if isinstance(default, str | int | float)]
    name, prefix = [*plain, *fields][0], ".".join(parts)
    default = json.dumps(fields[name]).strip('"')
    text = f"a section with keys is needed, for example {prefix}.{name}={default}"
    return f"{text}; {prefix}={{}} takes its defaults, {prefix}=null leaves it out" if optional else text


def _nearest(parts: list[str]) -> str:
    """What an unknown key may mean: a key of that name in another section, else a similar name, first in this section."""
    *sections, name = parts
    if parts == ["on_cpu"]:
        return "it is a section of files; on the command line write its settings directly"
    if "." in name:
        nested = f"{name.replace('.', ': {')}: ...{'}' * name.count('.')}"
        return f"in a file keys stand under their sections, as in `{nested}`"
    here = ".".join(sections)
    keys = known_keys()
    elsewhere = [key for key in keys if key.rpartition(".")[2] == name.lower()]
    if elsewhere:
        return f"the nearest known is {' or '.join(elsewhere)}"
    siblings = [key for key in keys if key.rpartition(".")[0] == here]
    for candidates, likeness in ((siblings, 0.6), (keys, 0.85)):
        names = [key.rpartition(".")[2] for key in candidates]
        for close in difflib.get_close_matches(name.lower(), names, n=1, cutoff=likeness):
            return f"the nearest known is {candidates[names.index(close)]}"
    return f"known {'in ' + here if here else 'sections'} are {', '.join(key.rpartition('.')[2] for key in siblings)}"


def known_keys(section: type[pydantic.BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted name of sections (optional ones too) and their keys."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if (below := _section_of(field.annotation)) is not None:
            keys += known_keys(below, f"{prefix}{name}.")
    return keys


def flattened(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every value in nested sections."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _section_of(annotation: Any) -> type[pydantic.BaseModel] | None:
    """The section class in the type of a field, or None."""
    for each in (annotation, *typing.get_args(annotation)):
        if isinstance(each, type) and issubclass(each, pydantic.BaseModel):
            return each
    return None
