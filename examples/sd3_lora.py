"""Train a LoRA of Stable Diffusion 3 / 3.5 for diffusers with the fused operations of dpdmd.kernels.

    python examples/sd3_lora.py                                              # a small model, generated pictures
    python examples/sd3_lora.py --model stabilityai/stable-diffusion-3.5-medium --pictures my_pictures --resolution 1024

`my_pictures` holds pictures and captions: cat.png and cat.txt. A stock pipeline loads the output with load_lora_weights. dpdmd's
part is `fuse_transformer` (call it after adding the adapters), `renoise` and the loss.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageDraw
from torch import Tensor

import dpdmd
from dpdmd.kernels import flow_matching_loss, fuse_transformer, renoise

SMALL = Path(dpdmd.__file__).parent / "worlds" / "demo" / "teacher"  # for 32 x 32 pictures; ships with dpdmd


def made_up(size: int) -> list[tuple[Image.Image, str]]:
    """Framed squares and captions: a style that the small model does not know."""
    found = []
    for colour in ("red", "green", "blue", "yellow"):
        picture = Image.new("RGB", (size, size), "white")
        draw = ImageDraw.Draw(picture)
        draw.rectangle((0, 0, size - 1, size - 1), outline="purple", width=max(size // 10, 1))
        draw.rectangle((size // 3, size // 3, 2 * size // 3, 2 * size // 3), fill=colour)
        found.append((picture, f"a {colour} square"))
    return found


def read(folder: Path, size: int) -> list[tuple[Image.Image, str]]:
    captions = sorted(folder.glob("*.txt"))
    pictures = [next(file for file in folder.glob(f"{each.stem}.*") if file.suffix != ".txt") for each in captions]
    return [
        (Image.open(picture).convert("RGB").resize((size, size)), caption.read_text().strip())
        for picture, caption in zip(pictures, captions, strict=True)
    ]


@torch.no_grad()
def encode(pipeline: StableDiffusion3Pipeline, data: list[tuple[Image.Image, str]]) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (N, C, H, W), caption embeddings (N, S, D) and pooled embeddings (N, P)."""
    pixels = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture, _ in data])
    pixels = pixels.to(pipeline.device, pipeline.vae.dtype) / 127.5 - 1
    config = pipeline.vae.config
    latents = (pipeline.vae.encode(pixels).latent_dist.mode() - config.shift_factor) * config.scaling_factor
    captions = [caption for _, caption in data]
    text, _, pooled, _ = pipeline.encode_prompt(captions, None, None, do_classifier_free_guidance=False)
    return latents, text, pooled


def loss_of(transformer: torch.nn.Module, batch: tuple[Tensor, ...], noise: Tensor, t: Tensor) -> Tensor:
    latents, text, pooled = batch
    x_t = renoise(latents, noise, t)  # t stays float32: in bfloat16 it would bias the target
    velocity = transformer(x_t, text, pooled, t * 1000, return_dict=False)[0]
    return flow_matching_loss(velocity, noise, latents)


@torch.no_grad()
def validation(transformer: torch.nn.Module, data: tuple[Tensor, ...]) -> float:
    """The loss at fixed times, from fixed noise."""
    generator = torch.Generator().manual_seed(1)
    count, losses = len(data[0]), []
    for t in torch.linspace(0.1, 0.9, 9):
        noise = torch.randn(data[0].shape, generator=generator).to(data[0])
        losses.append(loss_of(transformer, data, noise, t.expand(count).to(noise.device)).item())
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(SMALL), help="pipeline folder or hub id (default: dpdmd's demo teacher)")
    parser.add_argument("--pictures", type=Path, help="folder of pictures and captions (default: drawn squares)")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, default=Path("runs/sd3_lora"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    on_gpu = torch.cuda.is_available()
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        args.model, torch_dtype=torch.bfloat16 if on_gpu else torch.float32
    ).to("cuda" if on_gpu else "cpu")
    pictures = read(args.pictures, args.resolution) if args.pictures else made_up(args.resolution)
    data = encode(pipeline, pictures)

    transformer = pipeline.transformer.requires_grad_(False)
    transformer.add_adapter(
        LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    )
    fuse_transformer(transformer)  # prints what it fuses, and why it leaves a module
    adapters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    for parameter in adapters:
        parameter.data = parameter.data.float()  # float32 masters: bfloat16 would lose steps of 1e-4
    optimizer = torch.optim.AdamW(adapters, args.lr)

    before = validation(transformer, data)
    transformer.train()
    for _ in range(args.steps):
        chosen = torch.randint(len(pictures), (args.batch,), device=pipeline.device)
        batch = tuple(each[chosen] for each in data)
        noise, t = torch.randn_like(batch[0]), torch.randn(args.batch, device=pipeline.device).sigmoid()
        with torch.autocast(pipeline.device.type, torch.bfloat16, enabled=on_gpu):
            loss = loss_of(transformer, batch, noise, t)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    transformer.eval()
    print(f"loss {before:.3f} before, {validation(transformer, data):.3f} after {args.steps} steps")

    layers = get_peft_model_state_dict(transformer)
    StableDiffusion3Pipeline.save_lora_weights(args.output, transformer_lora_layers=layers)
    stock = StableDiffusion3Pipeline.from_pretrained(args.model, torch_dtype=pipeline.dtype).to(pipeline.device)
    stock.load_lora_weights(args.output)
    stock.set_progress_bar_config(disable=True)
    caption = pictures[0][1]
    made = stock(caption, height=args.resolution, width=args.resolution, num_inference_steps=20).images[0]
    made.save(args.output / "picture.png")
    print(f"{args.output}: the LoRA, and picture.png: a stock pipeline's picture of {caption!r} with it")


if __name__ == "__main__":
    main()
