"""Text encoders: the parts of which a family's list is made, how they are checked and read, and what encodes prompts.

An encoding is a dict of named tensors (B, ...), all of the encoders' dtype; `Backbone.text_shapes` has names and shapes.
Text of variable length is padded to the longest, and a tensor whose name ends in "mask" is 1 for a token, 0 for padding.
"""

from __future__ import annotations

import hashlib
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import pydantic
import torch
from torch import Tensor, nn

from dpdmd.backbones.files import (
    MOST_LAYERS,
    check_finite,
    check_setting,
    read_shapes,
    reading,
    refuse_misfits,
)
from dpdmd.backbones.pipeline import PipelineFolder
from dpdmd.config import ConfigError

Encoding = dict[str, Tensor]
EncodePrompt = Callable[[list[str]], Encoding]

CLIP_LENGTH = 77  # of every published model that a family knows by name
_NumLayers = typing.Annotated[int, pydantic.Field(ge=0, le=MOST_LAYERS)]


@dataclass(frozen=True)
class Encoder:
    """One text encoder of a pipeline.

    component: its name there; that of text_encoder_2 is tokenizer_2's encoder. class_name: in transformers. optional:
    pipelines may lack it.
    """

    component: str
    class_name: str
    optional: bool = False

    config_class: ClassVar[str]  # of its settings, in transformers
    sizes: ClassVar[tuple[str, ...]]  # settings that are whole numbers from 1 on
    layers: ClassVar[str]  # the setting that is the number of layers

    @property
    def tokenizer(self) -> str:
        return self.component.replace("text_encoder", "tokenizer")

    def read_config(self, pipeline: PipelineFolder):
        """The settings, as the encoder's class has them: transformers leaves out of config.json what equals its defaults.
        Raises ConfigError."""
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
        model = _read_model(pipeline, self.component, getattr(transformers, self.class_name), device, dtype)
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
    """A decoder-only language model, of which a layer's hidden states are the embeddings."""

    sizes = ("hidden_size", "vocab_size")
    layers = "num_hidden_layers"

    def _make_config(self, settings: dict[str, Any]):
        from transformers import AutoConfig

        return AutoConfig.for_model(**settings)

    def encode(self, parts: dict[str, Any], prompts: list[str], length: int, layer: int = -1) -> tuple[Tensor, Tensor]:
        """(hidden states of a layer (B, length, D), 0 at the padding; mask (B, length)), of parts that `read_parts` read."""
        model = parts[self.component]
        tokens = parts[self.tokenizer](
            prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(model.device)
        states = model(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True
        ).hidden_states[layer]
        mask = tokens.attention_mask.to(states.dtype)
        return states * mask[..., None], mask


def read_configs(pipeline: PipelineFolder, encoders: Iterable[Encoder]) -> dict[str, Any]:
    """{component: settings} of encoders that are there, with their tokenizers. Raises ConfigError."""
    for encoder in encoders:
        pipeline.require(encoder.component, encoder.class_name)
        pipeline.require(encoder.tokenizer)
    return {encoder.component: encoder.read_config(pipeline) for encoder in encoders}


def sequence_and_pooled(length: int, architecture: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """`Backbone.text_shapes` of a transformer that takes a sequence of embeddings and a pooled one."""
    return {
        "prompt_embeds": (length, architecture["joint_attention_dim"]),
        "pooled_prompt_embeds": (architecture["pooled_projection_dim"],),
    }


def clip_length(pipeline: PipelineFolder, clips: list) -> int:
    """How many tokens CLIP's tokenizer makes, of encoders with these settings. Raises ConfigError."""
    length: Any = pipeline.read("tokenizer", "tokenizer_config.json").get("model_max_length", CLIP_LENGTH)
    # A float is transformers' own way to write that there is no limit.
    length = int(length) if isinstance(length, float) and length.is_integer() else length
    check_setting("model_max_length", length, int, f"{pipeline}: tokenizer/tokenizer_config.json")
    positions = min(clip.max_position_embeddings for clip in clips)
    if length > positions:
        raise ConfigError(
            f"{pipeline}: tokenizer/tokenizer_config.json has model_max_length = {length}, but the text encoders "
            f"have positions for {positions} tokens"
        )
    return length


def read_parts(
    pipeline: PipelineFolder, encoders: Iterable[Encoder], device: torch.device | str, dtype: torch.dtype
) -> dict[str, Any]:
    """{component: tokenizer or text encoder}. Raises as `Encoder.read`."""
    parts: dict[str, Any] = {}
    for encoder in encoders:
        parts[encoder.tokenizer], parts[encoder.component] = encoder.read(pipeline, device, dtype)
    return parts


def text_pipeline(pipeline_class: Any, parts: dict[str, Any]) -> Any:
    """A stock pipeline that can encode prompts and do nothing else."""
    return pipeline_class(transformer=None, vae=None, scheduler=None, **parts)


def _read_model(
    pipeline: PipelineFolder, component: str, model_class, device: torch.device | str, dtype: torch.dtype
) -> Any:
    from transformers.utils import logging

    folder, what = pipeline.path / component, f"{pipeline}: {component}"
    weights = pipeline.weights(component)
    read_shapes(weights, what)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of what does not fit is told here in one line
    try:
        with reading(f"{what} in {folder}"):
            model, info = model_class.from_pretrained(
                folder,
                dtype=dtype,
                variant=weights.variant,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    finally:
        logging.set_verbosity(verbosity)
    # Tensors of other modules are those of a larger model, of which this is the encoder.
    modules = dict(model.named_children())
    besides = [name for name in info["unexpected_keys"] if name.split(".")[0] in modules]
    other = [name for name, *_ in info["mismatched_keys"]]
    refuse_misfits(f"{what} in {folder}", info["missing_keys"], besides, other)
    model = model.eval().requires_grad_(False).to(device)
    check_finite(model, f"{what}'s weights in {folder}")
    return model


class TextEncoders:
    """The pipeline's text encoders, through its family's `encode_prompt`; `what` names the pipeline in errors."""

    def __init__(self, encode_prompt: EncodePrompt, what: str):
        self._encode_prompt = encode_prompt
        self._what = what

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Encoding:
        """{name: (B, ...)} on the encoders' device and in their dtype."""
        # Some settings of tokenizers and encoders are looked at here first.
        with reading(f"{self._what}: a prompt", " by its tokenizers and text encoders"):
            return self._encode_prompt(prompts)


class RandomText:
    """Standard normal embeddings that depend on the prompt's text alone, on every device and in every process alike. Masks
    are 1."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: torch.device | str, dtype: torch.dtype):
        self._shapes = shapes
        self._device = torch.device(device)
        self._dtype = dtype

    def encode(self, prompts: list[str]) -> Encoding:
        """As `TextEncoders.encode`."""
        generators = [torch.Generator().manual_seed(_prompt_seed(prompt)) for prompt in prompts]
        encoding = {}
        for name, shape in self._shapes.items():
            if name.endswith("mask"):
                encoding[name] = torch.ones(len(prompts), *shape, device=self._device, dtype=self._dtype)
            else:
                drawn = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
                encoding[name] = drawn.to(self._device, self._dtype)
        return encoding


def _prompt_seed(prompt: str) -> int:
    return int.from_bytes(hashlib.sha256(prompt.encode("utf-8")).digest()[:8], "little") >> 1
