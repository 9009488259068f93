"""Text encoders: their kinds, checking and reading them, and encoding prompts.

An encoding is a dict of named tensors (B, ...), all in the encoders' dtype; `Backbone.text_shapes` has names and shapes.
Text of variable length is padded to the longest, and a tensor whose name ends in "mask" is 1 for a token, 0 for padding.
"""

from __future__ import annotations

import hashlib
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pydantic
import torch
from torch import Tensor, nn

from dpdmd.backbones.files import MOST_LAYERS, check_setting, reading
from dpdmd.backbones.pipeline import PipelineFolder
from dpdmd.config import ConfigError

Encoding = dict[str, Tensor]
EncodePrompt = Callable[[list[str]], Encoding]

CLIP_LENGTH = 77  # tokens, in every published model of `Family.known`
_NumLayers = typing.Annotated[int, pydantic.Field(ge=0, le=MOST_LAYERS)]


@dataclass(frozen=True)
class Encoder:
    """One text encoder of a pipeline.

    component: its name, as text_encoder_2; its tokenizer is then tokenizer_2. class_name: in transformers. optional:
    pipelines may lack it.
    """

    component: str
    class_name: str
    optional: bool = False

    config_class: ClassVar[str]  # in transformers
    sizes: ClassVar[tuple[str, ...]]  # settings that must be integers of 1 or more
    layers: ClassVar[str]  # the setting with the number of layers

    @property
    def tokenizer(self) -> str:
        return self.component.replace("text_encoder", "tokenizer")

    def read_config(self, pipeline: PipelineFolder):
        """The settings with transformers' defaults, which config.json leaves out. Raises ConfigError, also if the encoder or
        its tokenizer is missing."""
        pipeline.require(self.component, self.class_name)
        pipeline.require(self.tokenizer)
        settings = pipeline.read(self.component)
        with pipeline.reading(self.component):
            made = self._make_config(settings)
        where = f"{pipeline}: {self.component}/config.json"
        for name in self.sizes:
            check_setting(name, getattr(made, name), int, where)
        check_setting(self.layers, getattr(made, self.layers), _NumLayers, where)
        return made

    def _make_config(self, settings: dict[str, Any]):
        import transformers

        return getattr(transformers, self.config_class).from_dict(settings)

    def read(self, pipeline: PipelineFolder, device: torch.device | str, dtype: torch.dtype) -> tuple[Any, nn.Module]:
        """Tokenizer and encoder. Raises ConfigError for files that are damaged or do not fit."""
        import transformers

        with reading(f"{pipeline}: {pipeline.path / self.tokenizer}"):
            tokenizer_class = getattr(transformers, str(pipeline.component_class(self.tokenizer)))
            tokenizer = tokenizer_class.from_pretrained(pipeline.path / self.tokenizer, local_files_only=True)
            num_tokens = len(tokenizer)
        model_class = getattr(transformers, self.class_name)
        options = {"dtype": dtype, "ignore_mismatched_sizes": True}  # `load` reports these in one line
        model = pipeline.load(self.component, model_class, device, part=True, **options)
        rows = model.get_input_embeddings().num_embeddings
        if num_tokens > rows:
            raise ConfigError(
                f"{pipeline}: its {self.tokenizer} makes {num_tokens} different tokens, but {self.component} knows {rows}"
            )
        return tokenizer, model


class Clip(Encoder):
    config_class = "CLIPTextConfig"
    sizes = ("hidden_size", "projection_dim", "max_position_embeddings", "vocab_size")
    layers = "num_hidden_layers"


class T5(Encoder):
    config_class = "T5Config"
    sizes = ("d_model", "vocab_size")
    layers = "num_layers"


class Llm(Encoder):
    """A decoder-only language model; the embeddings are the hidden states of one layer."""

    sizes = ("hidden_size", "vocab_size")
    layers = "num_hidden_layers"

    def _make_config(self, settings: dict[str, Any]):
        from transformers import AutoConfig

        return AutoConfig.for_model(**settings)

    def encode(self, parts: dict[str, Any], prompts: list[str], length: int, layer: int = -1) -> tuple[Tensor, Tensor]:
        """(hidden states of a layer (B, length, D), 0 at the padding; mask (B, length)). parts: as in `_encode_prompt`."""
        model = parts[self.component]
        tokens = parts[self.tokenizer](
            prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(model.device)
        states = model(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True
        ).hidden_states[layer]
        mask = tokens.attention_mask.to(states.dtype)
        return states * mask[..., None], mask


def sequence_and_pooled(length: int, architecture: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """`Backbone.text_shapes` for a transformer that takes a sequence of embeddings and a pooled one."""
    return {
        "prompt_embeds": (length, architecture["joint_attention_dim"]),
        "pooled_prompt_embeds": (architecture["pooled_projection_dim"],),
    }


def clip_length(pipeline: PipelineFolder, clips: list) -> int:
    """Number of tokens that CLIP's tokenizer makes. clips: the encoders' settings. Raises ConfigError."""
    length: Any = pipeline.read("tokenizer", "tokenizer_config.json").get("model_max_length", CLIP_LENGTH)
    # transformers writes a float if there is no limit.
    length = int(length) if isinstance(length, float) and length.is_integer() else length
    check_setting("model_max_length", length, int, f"{pipeline}: tokenizer/tokenizer_config.json")
    positions = min(clip.max_position_embeddings for clip in clips)
    if length > positions:
        raise ConfigError(
            f"{pipeline}: tokenizer/tokenizer_config.json has model_max_length = {length}, but the text encoders "
            f"have positions for {positions} tokens"
        )
    return length


def text_pipeline(pipeline_class: Any, parts: dict[str, Any]) -> Any:
    """A stock pipeline that can only encode prompts."""
    return pipeline_class(transformer=None, vae=None, scheduler=None, **parts)


class TextEncoders:
    """The pipeline's text encoders, through its family's `encode_prompt`; `what` names the pipeline in errors."""

    def __init__(self, encode_prompt: EncodePrompt, what: str):
        self._encode_prompt = encode_prompt
        self._what = what

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Encoding:
        """{name: (B, ...)} on the encoders' device and in their dtype."""
        # Some settings of tokenizers and encoders are first used here.
        with reading(f"{self._what}: a prompt", " by its tokenizers and text encoders"):
            return self._encode_prompt(prompts)


class RandomText:
    """Standard normal embeddings that depend on the prompt's text alone, equal on every device and in every process. Masks
    are 1."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: torch.device | str, dtype: torch.dtype):
        self._shapes = shapes
        self._device = torch.device(device)
        self._dtype = dtype

    def encode(self, prompts: list[str]) -> Encoding:
        """As `TextEncoders.encode`."""
        seeds = [
            int.from_bytes(hashlib.sha256(prompt.encode("utf-8")).digest()[:8], "little") >> 1 for prompt in prompts
        ]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        encoding = {}
        for name, shape in self._shapes.items():
            if name.endswith("mask"):
                encoding[name] = torch.ones(len(prompts), *shape, device=self._device, dtype=self._dtype)
            else:
                drawn = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
                encoding[name] = drawn.to(self._device, self._dtype)
        return encoding
