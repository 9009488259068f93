"""What can be set, and what may be set together.

A run is described by one YAML file (`configs/*.yaml`) and dotted overrides on the command line (`distill.anchor=10`). A
section `on_cpu` of the file holds settings that take the place of its others on a machine without a GPU.
Both are checked here before anything is loaded: an unknown key names its nearest neighbour, an impossible value names
the key, what it got and what is allowed. The fields' descriptions are the documentation of the settings.

Values are taken as they are written. A whole number is no text, no `true` and not 4.0; a number is finite; every number
has a range. A name of a file or folder may begin with `~` or `~user`, which is replaced by that home folder.
"""

from __future__ import annotations

import difflib
import itertools
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

from dpdmd.command import ConfigError, expand
from dpdmd.files import open_file

ROLES = ("teacher", "student", "critic")
TRAINED = ("student", "critic")

CONFIG_FOLDER = next(
    (
        folder
        for folder in (Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs")
        if folder.is_dir()
    ),
    Path("configs"),
)
DEFAULT_CONFIG = CONFIG_FOLDER / "demo.yaml"
WORLDS = Path(__file__).parent / "worlds"  # a folder each, with an evaluation and a teacher
SHIPPED_WORLDS = sorted(file.parent.name for file in WORLDS.glob("*/evaluation.py"))


class _Section(pydantic.BaseModel):
    # strict: "4", true and 4.0 are no whole numbers. validate_default: a default is held to the same rules as a value from
    # a file.
    model_config = pydantic.ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        protected_namespaces=(),
    )


# Types of settings. The upper ends are far beyond any machine: they catch slips as 10**20, never a large run.


def _number(value: Any) -> Any:
    # Other programs' YAML has 1e-5 as text, as YAML 1.1 does.
    return float(value) if isinstance(value, str) and _FLOAT_OR_INT.fullmatch(value) else value


def _name(value: str) -> str:
    if not value.strip() or any(character < " " or character == "\x7f" for character in value):
        raise ValueError("a name is needed, which is not empty and holds no control characters")
    return value


def _clip(value: float) -> float:
    if 0 < value < 1e-6:
        raise ValueError("input should be 0, or from 1e-6 on: less leaves nothing of a gradient")
    return value


def _world(value: str) -> str:
    module, _, attribute = value.partition(":")
    if value not in SHIPPED_WORLDS and not all(name.isidentifier() for name in (*module.split("."), attribute)):
        raise ValueError(
            f"no world of that name ships ({', '.join(SHIPPED_WORLDS)} does); one of your own is package.module:attribute"
        )
    return value


def _off(value: Any) -> Any:
    return "off" if value is False else value  # which is what YAML makes of the word


def _stage(value: Any) -> Any:
    if type(value) is not int:
        raise ValueError("input should be 0 or 3")
    return value


def _own_stage(value: Any, info: pydantic.ValidationInfo) -> Any:
    if type(value) is not int or value != 3:
        raise ValueError(
            f"the {info.field_name} is always sharded by the engine's own stage 3 (stages 0 to 2 were removed: on one "
            "process stage 3 copies nothing)"
        )
    return value


# Of DeepSpeed's own settings those that the engine leaves to it: of the optimizer's state on the host or on a disk.
_DEEPSPEED: dict[str, dict[str, int | type[bool]]] = {  # the largest whole number, or bool
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
        if isinstance(value, float) and value.is_integer():  # as 5e8 in files of DeepSpeed's users
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
    return f"{printable(name)} is not used; of DeepSpeed's settings these are: {known}"


def _deepspeed(value: Any) -> dict[str, dict[str, int | bool]]:
    """DeepSpeed's own settings, given or in a JSON file. Raises ValueError for what the engine does not leave to DeepSpeed,
    naming its own setting for it, and for values that cannot be."""
    if isinstance(value, dict):
        return {section: _deepspeed_section(section, given) for section, given in value.items()}
    if not isinstance(value, str):
        raise ValueError("a JSON file or a mapping is needed")
    try:
        settings = json.loads(_content(Path(expand(value)), _MOST_BYTES))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"not a JSON file ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{shown(settings)}: a mapping is needed")
    return _deepspeed(settings)


Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
CountFrom0 = Annotated[int, Field(ge=0, le=2**31 - 1)]
LARGEST_SIZE = 2**16
Size = Annotated[int, Field(ge=1, le=LARGEST_SIZE)]  # of what lies in memory at a time
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
        default=None, description="Pipeline whose transformer the student starts from (default: teacher)."
    )
    critic: Location | None = Field(
        default=None, description="Pipeline whose transformer the critic starts from (default: teacher)."
    )
    family: Location | None = Field(
        default=None,
        description="Which backbones/ file knows this architecture (default: that of the pipeline's class), or a Python file "
        "of your own.",
    )
    random_init: bool = Field(
        default=False,
        description="Build the architecture from its configuration alone, with random weights (benchmarks).",
    )
    revision: Name | None = Field(default=None, description="Branch, tag or commit of a hub id.")
    resolution: Size = Field(default=1024, description="Height and width of the images, in pixels.")
    max_sequence_length: Size = Field(default=256, description="Length of the T5 text embedding, in tokens.")
    embedded_guidance: Guidance = Field(
        default=3.5, description="Guidance value that guidance-distilled models (FLUX.1-dev) take as an input."
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto",
        description="Arithmetic of the networks; bfloat16 keeps float32 masters. auto: bfloat16 on CUDA, else float32.",
    )
    teacher_storage: Literal["full", "float8"] = Field(
        default="full",
        description="float8: the teacher's shard is kept and gathered in FP8, a byte a weight, and becomes whole in dtype for "
        "a phase (ZeRO stage 3; its weights are rounded by it).",
    )
    fuse: bool = Field(
        default=True,
        description="On a GPU: the fused operations in the transformers' blocks (dpdmd.kernels.fuse_transformer).",
    )
    fp8: Annotated[Literal["off", "no_grad"], BeforeValidator(_off)] = Field(
        default="off",
        description="no_grad: FP8 matrix products in passes without gradient (with fuse, on a GPU that has FP8).",
    )


class PromptsConfig(_Section):
    file: Location | None = Field(
        default=None,
        description="Prompts: .txt (one a line), .jsonl or .csv. None: the list of the evaluation's world.",
    )
    field: Name = Field(default="prompt", description="Key (.jsonl) or column (.csv) that holds the prompt.")
    encoding: Literal["cache", "stream"] = Field(
        default="cache",
        description="cache: encode every prompt once, then train without text encoders; stream: encode each batch.",
    )
    cache_dir: Location | None = Field(
        default=None, description="Folder of the embedding cache (default: <output_dir>/embeddings)."
    )
    encode_batch_size: Size = Field(default=32, description="Prompts encoded at a time.")
    negative_prompt: str | None = Field(
        default="",
        description="Prompt of the unconditional branch of guidance; null for none (then guidance_scale must be 1).",
    )


class RenoiseConfig(_Section):
    per: Literal["batch", "sample"] = Field(
        default="batch", description="One time for the whole batch (paper) or one a sample."
    )
    distribution: Literal["scheduler", "training", "uniform"] = Field(
        default="scheduler",
        description="scheduler: one of the 1000 times of the scheduler's set_timesteps(1000) (the authors' code; for SD3.5 "
        "down to 0.00893); training: one of its 1000 training times (down to 0.00299); uniform: between low and high.",
    )
    low: Share = Field(default=0.02, description="uniform: smallest noise time, as a share of the whole range.")
    high: Share = Field(
        default=0.98, ge=1e-3, description="uniform: largest noise time, as a share of the whole range."
    )


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
    anchor: Size = Field(default=5, description="K, how many teacher steps make the first-step target; K = T included.")
    diversity_weight: NonNegative = Field(default=0.05, description="lambda, weight of the first-step loss.")
    guidance_scale: Guidance = Field(
        default=3.5,
        description="Classifier-free guidance s of the teacher, u + s (c - u); 1 for none. (The scale of a pipeline that "
        "adds s (c - u) to c, plus 1.)",
    )
    critic_updates: Count = Field(default=5, description="M, critic updates before each student update.")
    normalizer: Literal["teacher", "sample", "none"] = Field(
        default="teacher", description="DMD weight a sample: mean|x_t - x_real| (paper), mean|x - x_real| (DMD2), or 1."
    )
    rollout_gradient: Literal["full", "random"] = Field(
        default="full", description="DMD gradient through all remaining student steps, or through one drawn at random."
    )
    renoise: RenoiseConfig = RenoiseConfig()


class OptimizerConfig(_Section):
    name: Literal["auto", "fused", "apex", "deepspeed", "torch"] = Field(
        default="auto",
        description="AdamW: fused (dpdmd.optimizer, one pass over a shard), apex, DeepSpeed FusedAdam or torch. auto: "
        "fused, and torch with engine.offload.",
    )
    state: Literal["float32", "bfloat16", "float8"] = Field(
        default="float32",
        description="The two moments in 8, 4 or 2 bytes a parameter, of fused alone; fewer than 8 are stochastically "
        "rounded. The float32 masters stay.",
    )
    lr: Number = Field(default=1e-5, ge=1e-12, le=1e30, description="Learning rate.")  # float32 weights notice it
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.999), strict=False, description="Decay of the two moments.")
    eps: Number = Field(default=1e-8, ge=1e-30, le=1.0, description="Added to the denominator.")
    weight_decay: Number = Field(default=0.0, ge=0.0, le=10.0, description="Decoupled weight decay.")
    warmup: CountFrom0 = Field(default=0, description="Updates over which the rate rises linearly from 0.")
    decay: Literal["none", "cosine"] = Field(
        default="none", description="none: the rate stays (paper); cosine: falls to 0 at the end of run.iterations."
    )

    @pydantic.model_validator(mode="after")
    def _possible(self) -> OptimizerConfig:
        if self.state != "float32" and self.name not in ("auto", "fused"):
            raise ValueError(f"state = {self.state} needs name = fused (or auto), but name = {self.name}")
        return self


class ZeroConfig(_Section):
    teacher: Annotated[Literal[0, 3], BeforeValidator(_stage)] = Field(
        default=3, description="ZeRO stage of the frozen teacher: 3 shards its weights, 0 copies them."
    )
    student: Annotated[Literal[3], BeforeValidator(_own_stage)] = Field(
        default=3, description="ZeRO stage of the student: 3."
    )
    critic: Annotated[Literal[3], BeforeValidator(_own_stage)] = Field(
        default=3, description="ZeRO stage of the critic: 3."
    )


class KeptPassesConfig(_Section):
    student: CountFrom0 | None = Field(default=None, description="Block passes of each forward chain of the student.")
    critic: CountFrom0 | None = Field(default=None, description="Block passes of the critic's forward pass.")


class EngineConfig(_Section):
    zero: ZeroConfig = ZeroConfig()
    batch_size: Size = Field(default=4, description="Samples a process and forward pass.")
    accumulation: Size = Field(default=1, description="Forward-backward passes an update.")
    clip: Clip = Field(default=1.0, description="Largest gradient norm; 0 for no clipping.")
    residency: Literal["auto", "whole", "phase", "block"] = Field(
        default="auto",
        description="ZeRO stage 3: how long gathered weights stay. whole: until an update changes them; phase: for a phase "
        "(a rollout, or a forward chain with its backward pass); block: each transformer block while it runs. auto: the "
        "first of them that fits.",
    )
    checkpointing: Literal["auto", "none", "selective", "full"] = Field(
        default="auto",
        description="Activations of the transformer blocks that the backward pass computes again. selective: all but "
        "attention's outputs (where the blocks are fused; else as full); full: all; auto: the first of them that fits.",
    )
    # With checkpointing: that keep their activations all the same; null: as many as fit.
    kept_passes: KeptPassesConfig = KeptPassesConfig()
    cuda_graphs: bool = Field(
        default=True,
        description="Passes without gradient are replayed as CUDA graphs, where weights stay whole (residency).",
    )
    offload: Literal["none", "cpu", "nvme"] = Field(
        default="none",
        description="ZeRO stage 3: where masters and moments live and are updated (torch's AdamW, on the CPU): cpu, or nvme "
        "under nvme_path.",
    )
    nvme_path: Location | None = Field(
        default=None, description="Folder on a local NVMe disk, for offload = nvme: scratch."
    )
    deepspeed: Annotated[dict[str, Any], PlainValidator(_deepspeed)] | None = Field(
        default=None,
        description="DeepSpeed's own settings for student and critic with offload, in a JSON file or given: aio.* for nvme, "
        "and zero_optimization.sub_group_size.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: CUDA where there is one.")


class LoraConfig(_Section):
    rank: Size = Field(default=64, description="Rank of the adapters.")
    alpha: Number | None = Field(
        default=None, ge=1e-3, le=1e6, description="Adapters are scaled by alpha / rank (default: rank)."
    )
    targets: list[Name] | None = Field(
        default=None,
        min_length=1,
        description="Modules that get an adapter (default: attention and feed-forward products of the blocks).",
    )


class EmaConfig(_Section):
    decay: Number = Field(  # nearer to 1 a float32 average does not notice what is added
        default=0.999, gt=0.0, le=0.99999, description="The average keeps this share at each student update."
    )
    device: Literal["same", "cpu"] = Field(default="same", description="Where the float32 shard of the average lives.")


class EvaluationConfig(_Section):
    enabled: bool = Field(default=False, description="Measure samples in a world (evaluation/protocol.py).")
    world: Annotated[Name, AfterValidator(_world)] | None = Field(
        default=None,
        description="The world: the name of one that ships, or package.module:attribute for one of your own (default: the "
        "one that model.pipeline names).",
    )
    every: CountFrom0 = Field(
        default=0, description="Student updates between measurements of the student; 0: only at the end."
    )
    num_prompts: int = Field(default=64, ge=1, le=4096, description="Evaluation prompts.")
    num_samples: Size = Field(default=16, description="Samples a prompt.")


class RunConfig(_Section):
    output_dir: Location = Field(default="runs/default", description="Folder of everything that this run writes.")
    iterations: Count = Field(
        default=6000, description="Updates in all, student's and critic's together (as the paper counts)."
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of every draw.")
    log_every: Count = Field(default=1, description="Updates of a role between its lines of metrics.")
    sample_every: CountFrom0 = Field(default=0, description="Student updates between sample grids; 0 for none.")
    sample_prompts: list[str] = Field(
        default=[], description="Prompts of the sample grids (default: the first of the prompt file)."
    )
    checkpoint_every: CountFrom0 = Field(default=0, description="Iterations between checkpoints; 0: only at the end.")
    keep_checkpoints: Count = Field(default=2, description="How many of the newest checkpoints stay.")
    max_bad_updates: Count = Field(
        default=10, description="Updates in a row that may be skipped as not finite before the run stops."
    )
    tensorboard: bool = Field(default=True, description="Write TensorBoard events where tensorboard is installed.")
    wandb: Name | None = Field(
        default=None, description="Weights & Biases project to log to, where wandb is installed."
    )


class Config(_Section):
    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig = PromptsConfig()
    distill: DistillConfig = DistillConfig()
    student_optimizer: OptimizerConfig = OptimizerConfig()
    critic_optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    lora: LoraConfig | None = Field(
        default=None, description="Student and critic as adapters on the teacher's weights, instead of copies of them."
    )
    ema: EmaConfig | None = Field(
        default=None, description="Exponential moving average of the student, which is then what is exported."
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
        if self.run.iterations <= distill.critic_updates:
            raise ValueError(
                f"run.iterations = {self.run.iterations} with distill.critic_updates = {distill.critic_updates}: the student "
                f"has an update after every {distill.critic_updates} of the critic, so none at all would take place; "
                f"{distill.critic_updates + 1} iterations or more are needed"
            )
        if isinstance(distill.student_grid, list):
            check_explicit_grid(distill.student_grid, distill.student_steps)
        low, high = distill.renoise.low, distill.renoise.high
        if low >= high:
            raise ValueError(f"distill.renoise.low = {low} is not below distill.renoise.high = {high}")
        shipped = " or ".join(SHIPPED_WORLDS)
        if self.evaluation.enabled and self.world is None:
            raise ValueError(
                f"evaluation.enabled = true needs a world to measure in, and model.pipeline = {model.pipeline!r} names none "
                f"that ships: set evaluation.world={shipped}, a world of your own, or evaluation.enabled=false"
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
            for role in TRAINED:
                if getattr(model, role) is not None:
                    raise ValueError(
                        f"model.{role} = {getattr(model, role)!r} with lora: the {role} is an adapter on the teacher's "
                        f"weights; set model.{role}=null or lora=null"
                    )
        if self.prompts.file is None and self.world is None:
            raise ValueError(
                "prompts.file is not set: name a .txt, .jsonl or .csv file of prompts "
                f"(only model.pipeline={shipped} has a list of its own)"
            )
        return self

    def optimizer(self, role: str) -> OptimizerConfig:
        """The student's or the critic's."""
        return self.student_optimizer if role == "student" else self.critic_optimizer

    @property
    def world(self) -> str | None:
        """The world that the run is measured in, and whose prompts it takes where no others are given; None for none."""
        return self.evaluation.world or (self.model.pipeline if self.model.pipeline in SHIPPED_WORLDS else None)

    def num_updates(self, role: str) -> int:
        """Of a role in the whole run: `distill.critic_updates` of the critic come before each of the student."""
        of_student = self.run.iterations // (self.distill.critic_updates + 1)
        return of_student if role == "student" else self.run.iterations - of_student

    def _possible_offload(self) -> None:
        engine = self.engine
        if engine.offload == "none":
            if engine.deepspeed is not None:
                offload = "nvme (with engine.nvme_path)" if "aio" in engine.deepspeed else "cpu"
                raise ValueError(
                    f"engine.deepspeed = {shown(engine.deepspeed)} with engine.offload = none: without offload nothing is left "
                    f"to DeepSpeed, so this would change nothing; set engine.deepspeed=null or engine.offload={offload}"
                )
            return
        for role in TRAINED:
            optimizer = self.optimizer(role)
            if optimizer.name not in ("auto", "torch") or optimizer.state != "float32":
                raise ValueError(
                    f"engine.offload = {engine.offload} is updated on the CPU with float32 moments: {role}_optimizer.name "
                    f"= {optimizer.name} with state = {optimizer.state} cannot be; auto or torch with float32 can"
                )
        if engine.offload == "cpu" and "aio" in (engine.deepspeed or {}):
            raise ValueError(
                "engine.deepspeed has aio with engine.offload = cpu: it is of the files of offload = nvme, so it would change "
                "nothing; leave aio out or set engine.offload=nvme (with engine.nvme_path)"
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
            f"distill.student_grid = {shown(grid)}: {student_steps} falling times above 0 are needed "
            "(distill.student_steps of them, the end at 0 not listed)"
        )


def load_config(path: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads a YAML file (None: the demo) and applies `section.key=value` overrides, whose values are YAML.

    Raises ConfigError for a missing or malformed file, an unknown key (naming the nearest known), an impossible value.
    """
    try:
        path = Path(expand(str(path))) if path is not None else DEFAULT_CONFIG
    except ValueError as error:
        raise ConfigError(f"--config {shown(str(path))}: {error}") from error
    where = f"--config {printable(str(path))}"
    try:
        values = _read_yaml(read_file(path, where, most=_MOST_BYTES).decode("utf-8-sig"))
    except ValueError as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"{where}: not a YAML file: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: holds a {type(values).__name__}; sections with keys are needed")
    on_cpu = values.pop("on_cpu", None)
    on_cpu = {} if on_cpu is None else on_cpu
    if not isinstance(on_cpu, dict):
        raise ConfigError(
            f"{where}: on_cpu = {shown(on_cpu)}: sections with keys are needed, as in `on_cpu: {{engine: {{batch_size: 2}}}}`"
        )
    try:  # its keys one by one, on machines with a GPU too; alone it need not be a configuration
        Config.model_validate(on_cpu)
    except pydantic.ValidationError as error:
        found = [_explain(problem, "on_cpu.") for problem in error.errors(include_url=False) if problem["loc"]]
        if found:
            raise ConfigError("\n".join(dict.fromkeys(found))) from error
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
    engine = values.get("engine")
    device = engine.get("device", "auto") if isinstance(engine, dict) else "auto"  # another value is refused later
    if device != "auto":
        return device == "cpu"
    import torch

    return not torch.cuda.is_available()


def parse_config(values: dict[str, Any]) -> Config:
    """Checks a nested mapping. Raises ConfigError with one line for each thing that is wrong."""
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
    """The resolved configuration as a file that `load_config` reads back to the same."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """`section.key=value`, values as YAML has them, as a nested mapping; a later one wins. Raises ConfigError for what has
    another form."""
    given: dict[str, Any] = {}
    for override in overrides:
        given = merged(given, _read_override(override))
    return given


def _read_override(override: str) -> dict[str, Any]:
    key, separator, text = override.partition("=")
    names = key.split(".")
    if not separator or not all(names) or len(names) > 9:
        raise ConfigError(f"override {shown(override)}: the form is section.key=value, for example distill.anchor=10")
    if text.strip() in ("", "~"):  # both are null in YAML, which is seldom what is meant here
        given = "your home folder is ~/" if text.strip() else "nothing follows the ="
        raise ConfigError(f'override {shown(override)}: {given}; write null for none, or "" for an empty text')
    if problem := _cut_by_yaml(text.lstrip()):
        raise ConfigError(f"override {shown(override)}: {problem}")
    try:
        value = _read_yaml(text)
    except ValueError as error:
        raise ConfigError(f"override {shown(override)}: the value is not YAML: {error}") from error
    for name in reversed(names):
        value = {name: value}
    return value


def _cut_by_yaml(text: str) -> str:
    """Why YAML would read another value than its writer sees; "" where it would not."""
    if text[:1] in ("[", "{"):
        return ""
    if re.search("[\n\r\x85\u2028\u2029]", text):  # a space, in quotes too
        return "a value with line ends needs quotes of its own, and \\n for each: 'key=\"one\\ntwo\"'"
    if re.search(r"\s#", text) and text[:1] not in ("'", '"'):  # a comment
        return "a value with a # after a space needs quotes of its own inside the shell's: 'key=\"value\"'"
    return ""


# Files


_MOST_BYTES = 2**20  # of a file of settings; PyYAML takes some seconds for as much


def read_file(path: Path, where: str, most: int | None = None) -> bytes:
    """What a regular file holds. Raises ConfigError, which begins with `where`, for one that cannot be read, is no file (a
    pipe, a folder, a device) or has more than `most` bytes."""
    try:
        return _content(path, most)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def _content(path: Path, most: int | None) -> bytes:
    """`read_file`, whose ValueError names no file."""
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read() if most is None else file.read(most + 1)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
    except ValueError as error:  # a NUL in the name, or half of a surrogate pair
        raise ValueError(f"cannot be read ({error})") from error
    if most is not None and len(data) > most:
        raise ValueError(f"cannot be read ({size} bytes, where at most {most} make sense)")
    refuse_pointer(data[:POINTER_BYTES], "it")
    return data


_POINTERS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
POINTER_BYTES = max(map(len, _POINTERS))  # that tell


def refuse_pointer(beginning: bytes, where: str) -> None:
    """Raises ConfigError, which begins with `where`, for the beginning of a git-lfs pointer."""
    if beginning.startswith(_POINTERS):
        raise ConfigError(
            f"{where} is a git-lfs pointer, which stands for the file itself: run `git lfs pull` in its repository"
        )


# YAML


_FLOAT = (
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_INT = r"[-+]?(?:0|[1-9][0-9_]{0,99})|[-+]?0x[0-9a-fA-F]{1,32}"
_FLOAT_OR_INT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


class _Loader(yaml.SafeLoader):
    """Plain YAML: text, numbers, true and false, null, lists and mappings.

    As in YAML 1.2, 1e-5 is a number, and 2020-12-25, 1:30 (90 in YAML 1.1) and 010 (8) are text, which no number accepts.
    A key that stands twice is an error, and so is a tag.
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
                first = seen[name].start_mark.line + 1
                raise ComposerError(
                    None, None, f"the key {shown(key.value)} stands twice, in line {first} too", key.start_mark
                )
            seen[name] = key
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML would take for something else than text."""

    def represent_str(self, data):
        # Outside double quotes PyYAML writes these as they are, and reads a line break.
        style = '"' if any(character in data for character in "\r\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)
for _each in (_Loader, _Dumper):
    _each.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(f"(?:{_INT})$"), list("-+0123456789"))
    _each.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"(?:{_FLOAT})$"), list("-+0123456789."))


def _read_yaml(text: str) -> Any:
    """What YAML's text says, of a size and form that the rest can handle. Raises ValueError with one line."""
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{_line(error.problem)}") from error
    except yaml.YAMLError as error:
        raise ValueError(_line(error)) from error
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    _check_shape(value)
    return value


def _line(text: object) -> str:
    return " ".join(str(text).split())


_TOO_DEEP = "it is nested more than 30 deep, or holds itself"


def _check_shape(value: Any) -> None:
    """Raises ValueError for nesting, sizes (aliases can stand for billions of values), keys and text that nothing below can
    handle."""
    for number, (key, each) in enumerate(_everything(value)):
        if number > 100_000:
            raise ValueError("it holds more than 100000 values (aliases counted where they stand)")
        if isinstance(each, str) and not _encodable(each):
            raise ValueError(f"{key} = {shown(each)}: holds half of a surrogate pair, which is no character")


def _everything(value: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a value and of everything that it holds."""
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
    """`value` for a message: as Python writes it, in one line that is not long."""
    try:
        return _short.repr(value)
    except ValueError:  # Python writes no number of thousands of digits
        return "a number of thousands of digits"


def printable(text: str) -> str:
    """A name for a message: as it is, where it can stand in one line."""
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
    message = _line(problem["msg"][:1].lower() + problem["msg"][1:])
    if kind == "missing":  # from a pair, which is the input
        key, message = key.rpartition(".")[0], "2 values are needed"
    elif kind == "too_long":
        message = f"{problem['ctx']['max_length']} values are needed"
    elif kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        (bound,) = problem["ctx"].values()  # pydantic writes 1e-30 with all its zeros
        message = f"{message.rpartition(' ')[0]} {bound:g}" if isinstance(bound, float) else message
    elif "literal[]" in problem["loc"]:
        message += ", or a list of times"
    elif kind == "string_type" and isinstance(value, bool | int | float | None):
        message += "; quote text that YAML takes for a number, true, false or null: 'key=\"text\"'"
    elif kind == "int_type" and re.fullmatch(r"[1-9][0-9]{0,14}(?:\.0)?", str(value)):
        message += f", as {int(float(value))} is"
    return f"{before}{key} = {shown(value)}: {message}"


def _section_needed(parts: list[str]) -> str:
    """How a section is written, whose name was given another value."""
    section: Any = Config
    optional = False
    for part in parts:
        annotation = section.model_fields[part].annotation
        section, optional = _section_of(annotation), type(None) in typing.get_args(annotation)
    if section is Config:
        return "sections with keys are needed"
    fields = {name: field.default for name, field in section.model_fields.items()}
    name = next(
        (name for name, default in fields.items() if isinstance(default, str | int | float)), next(iter(fields))
    )
    prefix = ".".join(parts)
    default = json.dumps(fields[name]).strip('"')
    text = f"a section with keys is needed, for example {prefix}.{name}={default}"
    return f"{text}; {prefix}={{}} takes its defaults, {prefix}=null leaves it out" if optional else text


def _nearest(parts: list[str]) -> str:
    """What may have been meant by an unknown key: one of that name elsewhere, or one of a like name, here before there."""
    *sections, name = parts
    if parts == ["on_cpu"]:
        return "it is a section of files; on the command line settings stand for themselves"
    if "." in name:
        return (
            f"in a file keys stand under their sections, as in `{name.replace('.', ': {')}: ...{'}' * name.count('.')}`"
        )
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
    """Every dotted name: sections, those that may be null too, and the keys in them."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if (below := _section_of(field.annotation)) is not None:
            keys += known_keys(below, f"{prefix}{name}.")
    return keys


def flattened(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested sections by its dotted name."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _section_of(annotation: Any) -> type[pydantic.BaseModel] | None:
    """The section that a field of this type holds."""
    for each in (annotation, *typing.get_args(annotation)):
        if isinstance(each, type) and issubclass(each, pydantic.BaseModel):
            return each
    return None
