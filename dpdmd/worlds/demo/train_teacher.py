"""Train the demonstration's teacher and write it as a stock diffusers StableDiffusion3Pipeline folder.

    python -m dpdmd.worlds.demo.train_teacher --out runs/teacher    trains, saves, evaluates
    python -m dpdmd.worlds.demo.train_teacher --evaluate [FOLDER]   measures a folder, the shipped teacher by default

First an AutoencoderKL learns to encode the world's 32 x 32 pictures as 4 x 4 x 16 latents. Then an SD3Transformer2DModel
(one token a latent pixel) and two CLIP text encoders learn flow matching on them: x_t = (1 - t) x + t eps, target eps - x.
Each stage renders a pool of pictures once, keeps it on the device and draws its batches from it. An update then needs no
data from Python and is replayed as a CUDA graph: at these sizes the launches would cost more than the work.

There is no T5 encoder: the stock pipeline puts zero tokens in its place, 256 by default, which would make training slow.
Zero tokens have no position, so they stay equal in every block, and n of them act on the others exactly as one whose
attention logit is raised by log n. Training uses that one token, with n drawn between 1 and 256 for each sample, so the
teacher works with every `max_sequence_length`.
"""

from __future__ import annotations

from dpdmd import command  # isort: skip  first: the others take seconds, in which a user may interrupt

import argparse
import copy
import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from dpdmd.backbones.files import reading
from dpdmd.files import follow_umask
from dpdmd.worlds.demo import TEACHER, measure, world

# Models, pipelines and tokenizers are Any: the libraries' annotations do not describe `config`, `to` and outputs.

LATENT_CHANNELS = 16
TEXT_LENGTH = 15
"""Tokens of a caption; the longest caption has 10. With 16 image tokens and one T5 zero, a training sequence has 32."""
MAX_ZERO_TOKENS = 256
"""Most T5 zeros the teacher is trained for: the stock pipeline's default max_sequence_length."""

AUTOENCODER_POOL = 2**18  # distinct pictures
AUTOENCODER_RATE = 2e-3
KL_WEIGHT = 1e-3
POOL = 2**20  # distinct pictures that the teacher sees
DECAY = 0.999  # a step, of the running mean of the teacher's weights
EMPTY_SHARE = 0.1  # of the captions
UNIFORM_SHARE = 0.1
"""Share of the times drawn uniformly; the others are logit-normal, which has no mass at t = 1, where sampling starts."""


def build_tokenizer() -> transformers.CLIPTokenizer:
    """A CLIP tokenizer in which each word of the world is one token; any other word becomes one token a byte."""
    # byte-level BPE writes a printable byte as itself, and the others as characters from 256 on
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    alphabet = [*map(chr, printable), *(chr(256 + rank) for rank in range(len(hidden)))]
    vocabulary = alphabet + [letter + "</w>" for letter in alphabet]
    merges: list[Any] = []  # pairs of pieces
    for word in world.words():
        pieces = [*word[:-1], word[-1] + "</w>"]
        for pair in merges:  # applied lowest rank first, as BPE does
            at = 0
            while at < len(pieces) - 1:
                if (pieces[at], pieces[at + 1]) == pair:
                    pieces[at : at + 2] = ["".join(pair)]
                at += 1
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = ["".join(pieces[:2])]
            vocabulary.append(pieces[0])
    ids = {token: rank for rank, token in enumerate(dict.fromkeys([*vocabulary, "<|startoftext|>", "<|endoftext|>"]))}
    return transformers.CLIPTokenizer(vocab=ids, merges=merges, model_max_length=TEXT_LENGTH)


def build_text_encoder(tokenizer: Any, *, width: int, layers: int) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,  # pooling happens at its first appearance
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = transformers.CLIPTextModelWithProjection(config)
    for table in (module for module in encoder.modules() if isinstance(module, nn.Embedding)):
        nn.init.normal_(table.weight, std=0.2)  # CLIP's 0.02 is faint beside the other inputs of so shallow a stack
    return encoder


def build_silent_t5(width: int) -> tuple[transformers.T5EncoderModel, transformers.T5Tokenizer]:
    """A T5 encoder without layers whose output is zero, as the pipeline's is without a T5 encoder.

    diffusers loads a folder without `text_encoder_3` only when that argument is passed as None. This folder loads by its
    path alone; passing None still works and changes nothing.
    """
    encoder = transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=3, d_model=width, d_kv=1, d_ff=1, num_layers=0, num_heads=1)
    )
    for parameter in encoder.parameters():
        nn.init.zeros_(parameter)
    return encoder, transformers.T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)], extra_ids=0)


def build_autoencoder() -> Any:
    """32 x 32 x 3 -> 4 x 4 x 16."""
    widths = (16, 32, 64, 96)  # at 32, 16, 8 and 4 pixels
    kind: Any = diffusers.AutoencoderKL
    return kind(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=world.SIZE,
        mid_block_add_attention=False,
    )


def build_transformer(*, layers: int, width: int, text_width: int) -> Any:
    if width % 64:
        raise ValueError(f"width must be a multiple of 64 (the size of a head), got {width}")
    model = diffusers.SD3Transformer2DModel(
        sample_size=4,
        patch_size=1,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=layers,
        attention_head_dim=64,
        num_attention_heads=width // 64,
        joint_attention_dim=text_width,
        caption_projection_dim=width,
        pooled_projection_dim=text_width,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )
    # every block starts as the identity
    for name, module in model.named_modules():
        if name.endswith(("norm1.linear", "norm1_context.linear")) or name == "proj_out":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def optimise(
    loss: Callable[[], Tensor],
    parameters: Iterable[nn.Parameter],
    *,
    label: str,
    rate: float,
    steps: int,
    averages: Sequence[Tensor] = (),
) -> dict[str, float]:
    """AdamW with warm-up over 2 % of the run and a cosine to 0, gradient norm clipped at 1; on CUDA one captured graph.

    loss: takes nothing, draws its own batch, returns a scalar. averages: running means of the parameters, in the same
    order, which decay by DECAY a step. Raises RunStopped when the loss is not finite at the end.
    """
    parameters = list(parameters)
    device = parameters[0].device
    cuda = device.type == "cuda"
    rate_now = torch.zeros((), device=device)
    optimizer = torch.optim.AdamW(
        parameters, lr=rate_now if cuda else 0.0, betas=(0.9, 0.99), weight_decay=0.0, capturable=cuda, foreach=True
    )
    smooth = torch.zeros((), device=device)

    def update() -> None:
        optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        if averages:
            torch._foreach_lerp_(list(averages), [parameter.detach() for parameter in parameters], 1 - DECAY)
        smooth.lerp_(value.detach().float(), 0.02)

    run = update
    if cuda:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # at rate 0: allocates the optimizer's state and picks the kernels
                update()
        torch.cuda.current_stream().wait_stream(side)
        optimizer.zero_grad(set_to_none=True)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            update()
        run = recorded.replay

    start = time.perf_counter()
    for done in range(steps):
        progress = done / steps
        now = rate * min(1.0, max(progress, 1e-3) / 0.02) * (1 + math.cos(math.pi * progress)) / 2
        if cuda:
            rate_now.fill_(now)
        else:
            optimizer.param_groups[0]["lr"] = now
        run()
        if (done + 1) % 1000 == 0:
            print(f"{label} step {done + 1} loss {smooth.item():.4f} {time.perf_counter() - start:.1f} s", flush=True)
    if cuda:
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    final = smooth.item()
    if not math.isfinite(final):
        raise command.RunStopped(f"{label}: the loss is {final} after {steps} steps; a smaller --rate is needed")
    print(
        f"{label}: {steps} steps in {elapsed:.1f} s ({1e3 * elapsed / steps:.2f} ms each), loss {final:.4f}", flush=True
    )
    return {"steps": steps, "seconds": round(elapsed, 1), "loss": round(final, 5)}


def _autocast(device: torch.device) -> torch.autocast:
    # no cache of cast weights: a cached weight would outlive the graph that made it
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)


def train_autoencoder(vae: Any, *, batch: int, steps: int, seed: int) -> dict[str, float]:
    """Squared error of the picture in [-1, 1] plus KL_WEIGHT x the mean divergence of the latents from N(0, 1).

    Sets vae.config.scaling_factor and shift_factor so that (latent - shift) * scale has mean 0 and variance 1.
    """
    device = next(vae.parameters()).device
    pictures = []
    for at in range(0, AUTOENCODER_POOL, 8192):
        scenes = world.draw_scenes(min(8192, AUTOENCODER_POOL - at), seed=seed, index=at // 8192).to(device)
        pictures.append((255 * world.render(scenes)).round().byte())
    pictures = torch.cat(pictures)

    def loss() -> Tensor:
        x = pictures[torch.randint(len(pictures), (batch,), device=device)].float() / 127.5 - 1
        with _autocast(device):
            latents = vae.encode(x).latent_dist
            mean, logvar = latents.mean.float(), latents.logvar.float()
            z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
            y = vae.decode(z).sample
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return F.mse_loss(y.float(), x) + KL_WEIGHT * divergence

    report = optimise(loss, vae.parameters(), label="autoencoder", rate=AUTOENCODER_RATE, steps=steps)
    latents = _encode(vae, world.draw_scenes(min(AUTOENCODER_POOL, 4096), seed=seed))
    shift, scale = latents.mean().item(), 1 / latents.std().item()
    vae.register_to_config(shift_factor=round(shift, 4), scaling_factor=round(scale, 4))
    return report


@torch.no_grad()
def _encode(vae: Any, scenes: world.Scenes) -> Tensor:
    """Latent means of scenes, (N, 16, 4, 4) float32, on the VAE's own scale."""
    parameter = next(vae.parameters())
    found = []
    for at in range(0, len(scenes), 4096):
        x = world.render(scenes[at : at + 4096].to(parameter.device)) * 2 - 1
        with _autocast(parameter.device):
            found.append(vae.encode(x).latent_dist.mean.float())
    return torch.cat(found)


@torch.no_grad()
def check_autoencoder(vae: Any, count: int) -> dict[str, float]:
    """Reconstruct fresh pictures: PSNR (dB), share with all five attributes kept, share valid. Float32 throughout."""
    scenes = world.draw_scenes(count, seed=77)
    pictures = world.render(scenes.to(next(vae.parameters()).device))
    parts = [vae.decode(vae.encode(part * 2 - 1).latent_dist.mean).sample for part in pictures.split(512)]
    rebuilt = (torch.cat(parts) / 2 + 0.5).clamp(0, 1)
    found = measure.examine(rebuilt)
    kept = torch.stack([getattr(found, name).cpu() == getattr(scenes, name) for name in world.ATTRIBUTES])
    numbers = {
        "psnr": -10 * math.log10(F.mse_loss(rebuilt, pictures).item()),
        "kept": kept.all(0).float().mean().item(),
        **{f"kept_{name}": row.float().mean().item() for name, row in zip(world.ATTRIBUTES, kept, strict=True)},
        "validity": found.valid.float().mean().item(),
    }
    return {key: round(value, 4) for key, value in numbers.items()}


class Captions:
    """Token ids of captions, computed on the device from attribute indices; equal to the tokenizer's of world.caption(...)."""

    def __init__(self, tokenizer: Any, device: torch.device | str) -> None:
        def token(word: str) -> int:
            ids = tokenizer(word, add_special_tokens=False).input_ids
            assert len(ids) == 1, f"{word!r} is {len(ids)} tokens"
            return ids[0]

        self.names = {
            name: torch.tensor([token(word) for word in words], device=device)
            for name, words in world.ATTRIBUTES.items()
        }
        self.vowel = torch.tensor([name[0] in "aeiou" for name in world.COLORS], device=device)
        # tensors on the device: torch.where would copy a number there, which a graph cannot record
        self.fixed = torch.tensor([token(word) for word in ("a", "an", "at", "on", world.ANY_SHAPE)], device=device)
        self.start, self.end, self.pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        self.rates = torch.tensor(list(world.DROP_RATES.values()), device=device)

    def __call__(self, attributes: Tensor, named: Tensor, empty: Tensor) -> Tensor:
        """attributes int64 (B, 5); named bool (B, 5); empty bool (B,), where the caption is "" -> ids int64 (B, TEXT_LENGTH)."""
        color, shape, size, position, background = attributes.unbind(1)
        has_color, has_shape, has_size, has_position, has_background = named.unbind(1)
        here = torch.ones_like(empty)
        vowel = has_color & ~has_size & self.vowel[color]
        a, an, at, on, any_shape = self.fixed.unbind()
        slots = [
            (torch.where(vowel, an, a), here),
            (self.names["size"][size], has_size),
            (self.names["color"][color], has_color),
            (torch.where(has_shape, self.names["shape"][shape], any_shape), here),
            (at.expand_as(color), has_position),
            (self.names["position"][position], has_position),
            (on.expand_as(color), has_background),
            (self.names["background"][background], has_background),
        ]
        ids, kept = torch.stack([slot for slot, _ in slots], 1), torch.stack([keep for _, keep in slots], 1)
        kept = kept & ~empty[:, None]
        # the k-th word kept goes to column k, the others to an extra column, which is cut off
        column = torch.where(kept, kept.cumsum(1), torch.full_like(ids, TEXT_LENGTH))
        out = torch.full((len(ids), TEXT_LENGTH + 1), self.pad, dtype=torch.long, device=ids.device)
        out = out.scatter(1, column, ids).scatter(1, kept.sum(1, keepdim=True) + 1, self.end)
        out[:, 0] = self.start
        return out[:, :TEXT_LENGTH]


def encode_text(
    encoders: Sequence[nn.Module], ids: Tensor, *, text_width: int, num_zeros: int = 1
) -> tuple[Tensor, Tensor]:
    """StableDiffusion3Pipeline.encode_prompt without a T5 encoder, from token ids (B, L).

    Returns states (B, L + num_zeros, text_width) and pooled embeddings (B, sum of the encoders' projections).
    """
    outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    states = torch.cat([output.hidden_states[-2] for output in outputs], -1)
    states = F.pad(states, (0, text_width - states.shape[-1], 0, num_zeros))
    return states, torch.cat([output.text_embeds for output in outputs], -1)


class BiasedJointAttention:
    """Joint attention of an SD3 block with `key_bias` (B, 1, 1, keys) added to the logits; image tokens come first."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, key_bias=None):
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        image, text = hidden_states, encoder_hidden_states
        q = torch.cat([attn.norm_q(heads(attn.to_q(image))), attn.norm_added_q(heads(attn.add_q_proj(text)))], 2)
        k = torch.cat([attn.norm_k(heads(attn.to_k(image))), attn.norm_added_k(heads(attn.add_k_proj(text)))], 2)
        v = torch.cat([heads(attn.to_v(image)), heads(attn.add_v_proj(text))], 2)
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast the norms return float32
        mask = None
        if key_bias is not None:
            mask = key_bias.to(v.dtype).expand(-1, attn.heads, q.shape[2], -1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        image, text = mixed.split([image.shape[1], text.shape[1]], 1)
        image = attn.to_out[1](attn.to_out[0](image))
        return image, (text if attn.context_pre_only else attn.to_add_out(text))


def train_transformer(
    transformer: Any,
    encoders: Sequence[Any],
    tokenizer: Any,
    vae: Any,
    *,
    batch: int,
    rate: float,
    steps: int,
    seed: int,
) -> dict[str, float]:
    """Flow matching on a pool of latents; leaves the running mean of the weights in the modules."""
    device = next(transformer.parameters()).device
    latents, attributes = [], []
    for at in range(0, POOL, 2**16):
        scenes = world.draw_scenes(min(2**16, POOL - at), seed=seed + 1, index=at // 2**16)
        latents.append((_encode(vae, scenes) - vae.config.shift_factor) * vae.config.scaling_factor)
        attributes.append(torch.stack([getattr(scenes, name) for name in world.ATTRIBUTES], 1).to(device))
    latents, attributes = torch.cat(latents), torch.cat(attributes)
    captions = Captions(tokenizer, device)
    text_width = transformer.config.joint_attention_dim

    def loss() -> Tensor:
        index = torch.randint(len(latents), (batch,), device=device)
        named = torch.rand(batch, len(world.ATTRIBUTES), device=device) >= captions.rates
        ids = captions(attributes[index], named, torch.rand(batch, device=device) < EMPTY_SHARE)
        x = latents[index]
        noise = torch.randn_like(x)
        t = torch.where(
            torch.rand(batch, device=device) < UNIFORM_SHARE,
            torch.rand(batch, device=device),
            torch.randn(batch, device=device).sigmoid(),
        )
        x_t = torch.lerp(x, noise, t[:, None, None, None])
        key_bias = torch.zeros(batch, 1, 1, x[0, 0].numel() + TEXT_LENGTH + 1, device=device)
        key_bias[..., -1] = (torch.rand(batch, device=device) * math.log(MAX_ZERO_TOKENS))[:, None, None]
        with _autocast(device):
            states, pooled = encode_text(encoders, ids, text_width=text_width)
            v = transformer(
                hidden_states=x_t,
                encoder_hidden_states=states,
                pooled_projections=pooled,
                timestep=1000 * t,
                joint_attention_kwargs={"key_bias": key_bias},
                return_dict=False,
            )[0]
        return F.mse_loss(v.float(), noise - x)

    stock = transformer.attn_processors
    transformer.set_attn_processor(BiasedJointAttention())
    parameters = [parameter for module in (transformer, *encoders) for parameter in module.parameters()]
    averages = [parameter.detach().clone() for parameter in parameters]
    report = optimise(loss, parameters, label="teacher", rate=rate, steps=steps, averages=averages)
    transformer.set_attn_processor(stock)
    with torch.no_grad():
        for parameter, average in zip(parameters, averages, strict=True):
            parameter.copy_(average)
    return report


def save_pipeline(
    folder: Path, transformer: Any, encoders: Sequence[Any], tokenizer: Any, vae: Any, *, shift: float
) -> None:
    """Write a complete StableDiffusion3Pipeline folder, weights as safetensors.

    Transformer and autoencoder are stored in bfloat16 and the text encoders in float32: when no dtype is asked for,
    diffusers loads its models in float32, transformers in the dtype of the file.
    """

    def stored(module: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
        # nn.Module's own `to`: diffusers' and transformers' warn about modules to keep in float32; these have none
        return nn.Module.to(copy.deepcopy(module), "cpu", dtype, memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]

    silent, silent_tokenizer = build_silent_t5(transformer.config.joint_attention_dim)
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=stored(transformer, torch.bfloat16),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=stored(vae, torch.bfloat16),
        text_encoder=stored(encoders[0]),
        tokenizer=tokenizer,
        text_encoder_2=stored(encoders[1]),
        tokenizer_2=tokenizer,
        text_encoder_3=stored(silent),
        tokenizer_3=silent_tokenizer,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    follow_umask(folder)


@torch.no_grad()
def sample(
    pipeline: Any,
    prompts: Sequence[world.Prompt],
    samples: int,
    *,
    steps: int,
    guidance_scale: float,
    max_sequence_length: int = 12,
) -> Tensor:
    """Pictures (P * R, 3, 32, 32) in [0, 1], grouped by prompt; sample r of prompt p has its own noise, drawn on the CPU."""
    batch = 1024 if pipeline.device.type == "cuda" else 64  # on a CPU 512 takes twice as long as 32 to 128
    texts = [prompt.text for prompt in prompts for _ in range(samples)]
    shape = (len(texts), pipeline.transformer.config.in_channels, 4, 4)
    noise = torch.randn(shape, generator=world.generator(0, 0)).to(pipeline.device, pipeline.transformer.dtype)
    pipeline.set_progress_bar_config(disable=True)
    parts = [
        pipeline(
            texts[at : at + batch],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            latents=noise[at : at + batch],
            max_sequence_length=max_sequence_length,
            output_type="pt",
        ).images
        for at in range(0, len(texts), batch)
    ]
    return torch.cat(parts)


SETTINGS = (
    {"steps": 30, "guidance_scale": 1.0},
    {"steps": 30, "guidance_scale": 2.0},
    {"steps": 30, "guidance_scale": 3.0},
    {"steps": 30, "guidance_scale": 4.0},
    {"steps": 4, "guidance_scale": 4.0},
    {"steps": 4, "guidance_scale": 1.0},
    # six times the tokens, so fewer samples; entropy and kinds of this row do not compare with the others'
    {"steps": 30, "guidance_scale": 4.0, "max_sequence_length": 256, "samples": 4},
)
"""What `evaluate` measures: the teacher at four guidance scales, in four steps, and with the stock number of T5 zeros."""
COLUMNS = (
    *("steps", "guidance_scale", "max_sequence_length", "num_samples", "accuracy"),
    *(f"accuracy_{name}" for name in world.ATTRIBUTES),
    *("validity", "background_entropy", "background_kinds", "position_spread", "size_spread"),
)
"""Numbers of a row that the printed table and the card's show."""
HEAD = f"| {' | '.join(COLUMNS).replace('_', ' ')} |\n|{' --- |' * len(COLUMNS)}"


def _line(row: dict[str, float]) -> str:
    return f"| {' | '.join(f'{row[name]:g}' for name in COLUMNS)} |"


def evaluate(
    folder: Path, device: torch.device, num_prompts: int, samples: int, shift: float | None = None
) -> list[dict[str, float]]:
    """Load a pipeline folder with stock diffusers, sample it at each setting, measure. Prints a table, returns its rows."""
    with reading(f"{folder} (the folder of a StableDiffusion3Pipeline is needed)"):
        pipeline: Any = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, local_files_only=True).to(device)
    if shift is not None:
        pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    prompts = world.evaluation_prompts(num_prompts)
    rows = []
    print(f"{folder}: {num_prompts} prompts x {samples} samples, scheduler shift {pipeline.scheduler.config['shift']}")
    print(HEAD)
    for setting in SETTINGS:
        setting = {"max_sequence_length": 12, **setting}
        number = min(samples, setting.pop("samples", samples))
        start = time.perf_counter()
        images = sample(pipeline, prompts, number, **setting)
        row = {**setting, "seconds": round(time.perf_counter() - start, 2)}
        row |= {key: round(value, 4) for key, value in measure.measure(images, prompts).items()}
        rows.append(row)
        print(_line(row), flush=True)
    return rows


def write_card(folder: Path, card: dict) -> None:
    """Write card.json (everything) and README.md (most of it, to read) beside the weights."""
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    numbers = {
        name: ", ".join(f"{key} {value}" for key, value in card[name].items())
        for name in ("autoencoder", "teacher", "reconstruction")
    }
    text = f"""\
# Teacher of the demonstration

A StableDiffusion3Pipeline for the 32 x 32 picture world of `dpdmd.worlds.demo.world`. Its T5 encoder is a stand-in
that answers zeros. This command wrote the folder, with this page:

    {card["command"]}

on {card["machine"]} with torch {card["torch"]}, diffusers {card["diffusers"]}, transformers {card["transformers"]}.

- parameters: {", ".join(f"{name} {count:,}" for name, count in card["parameters"].items())}
- autoencoder: {numbers["autoencoder"]}
- teacher: {numbers["teacher"]}
- reconstruction: {numbers["reconstruction"]}

Measured on the folder loaded back, {card["evaluation"][0]["num_prompts"]:.0f} prompts, on {card["evaluated_on"]}
(`python -m dpdmd.worlds.demo.train_teacher --evaluate FOLDER` measures again):

{HEAD}
"""
    text += "".join(f"{_line(row)}\n" for row in card["evaluation"])
    (folder / "README.md").write_text(text, encoding="utf-8")


def _width(text: str) -> int:
    if (width := command.count(text)) % 64:
        raise argparse.ArgumentTypeError(f"{text!r}: a multiple of 64 is needed")
    return width


def _machine(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"one {platform.machine()} CPU"


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(_main, argv)


def _main(argv: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dpdmd.worlds.demo.train_teacher", description=str(__doc__).split("\n")[0]
    )
    add = parser.add_argument
    add("--out", type=command.new_folder, default="runs/teacher", help="folder to write")
    add(
        "--evaluate",
        type=command.path,
        nargs="?",
        const=TEACHER,
        metavar="FOLDER",
        help="measure this folder (the shipped teacher's by default) instead of training",
    )
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add("--device", choices=devices, default=devices[0])
    add("--seed", type=command.seed, default=0)
    add("--layers", type=command.whole(1, 1025), default=3, help="transformer blocks")
    add("--width", type=_width, default=128, help="width of the transformer, a multiple of 64")
    add("--steps", type=command.count, default=13000, help="teacher updates")
    add("--batch", type=command.count, default=512)
    add("--rate", type=command.within(1e-12, 10), default=1.5e-3, help="the teacher's highest learning rate")
    add("--autoencoder-steps", type=command.count, default=3600)
    add("--autoencoder-batch", type=command.count, default=512)
    add(
        "--shift",
        type=command.within(0.01, 100),
        help="the scheduler's shift (1 by default; with --evaluate the folder's own)",
    )
    add("--num-prompts", type=command.whole(1, 4097), default=64, help="evaluation prompts")
    add("--num-samples", type=command.count, default=16, help="samples a prompt")
    args = parser.parse_args(argv)

    device = torch.device(args.device)
    if args.evaluate:
        if not args.evaluate.is_dir():
            raise command.ConfigError(f"--evaluate {args.evaluate}: there is no such folder")
        evaluate(args.evaluate, device, args.num_prompts, args.num_samples, args.shift)
        return

    torch.manual_seed(args.seed)
    vae = build_autoencoder().to(device)
    if device.type == "cuda":
        vae = vae.to(memory_format=torch.channels_last)
    batch = args.autoencoder_batch
    autoencoder = {"batch": batch} | train_autoencoder(vae, batch=batch, steps=args.autoencoder_steps, seed=args.seed)
    reconstruction = check_autoencoder(vae, min(2048, AUTOENCODER_POOL))
    print("reconstruction:", reconstruction, flush=True)

    tokenizer = build_tokenizer()
    encoders = [build_text_encoder(tokenizer, width=width, layers=layers) for width, layers in ((128, 2), (32, 1))]
    text_width = sum(encoder.config.projection_dim for encoder in encoders)
    transformer = build_transformer(layers=args.layers, width=args.width, text_width=text_width)
    for module in (transformer, *encoders):
        module.to(device)
    training = {"batch": args.batch, "rate": args.rate, "steps": args.steps, "seed": args.seed}
    report = train_transformer(transformer, encoders, tokenizer, vae, **training)
    save_pipeline(args.out, transformer, encoders, tokenizer, vae, shift=args.shift or 1.0)
    parts = {"transformer": transformer, "text_encoder": encoders[0], "text_encoder_2": encoders[1], "vae": vae}
    card = {
        "command": "python -m dpdmd.worlds.demo.train_teacher " + shlex.join(sys.argv[1:] if argv is None else argv),
        "machine": _machine(device),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "parameters": {name: sum(p.numel() for p in module.parameters()) for name, module in parts.items()},
        "autoencoder": autoencoder,
        "teacher": {"batch": args.batch} | report,
        "reconstruction": reconstruction,
        "evaluation": evaluate(args.out, device, args.num_prompts, args.num_samples),
        "evaluated_on": _machine(device),
    }
    write_card(args.out, card)


if __name__ == "__main__":
    sys.exit(main())
