"""Pipelines small enough to be made on the spot, complete and saved by their own stock `save_pretrained`."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from processes import run_command

# Without a GPU the Triton kernels are made for Triton's interpreter, which it wants to know when it is imported: so here,
# before any test module imports dpdmd. Processes that tests start should not inherit it.
with pytest.MonkeyPatch.context() as patch:
    if not torch.cuda.is_available():
        patch.setitem(os.environ, "TRITON_INTERPRET", "1")
    import dpdmd.kernels  # noqa: F401

pytest_plugins = ["machine", "record", "runs"]
# Tests send these. nohup has SIGHUP ignored, and a script's shell SIGINT for what it starts in the background.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
# torch lists the functions that a default device is for when it is first asked. transformers puts another function in the
# place of torch.linspace while it makes a model, and a list from such a moment lacks torch's own for good.
with torch.device("cpu"):
    torch.empty(0)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Files that take longest come first, as a worker takes a file at a time: those with a test that alone takes minutes,
    then those with many that start processes."""
    slow = Counter(item.path for item in items if item.get_closest_marker("distributed"))
    slow.update({item.path: len(items) for item in items if item.get_closest_marker("minutes")})
    items.sort(key=lambda item: -slow[item.path])


class Clock:
    """In place of the module `time`: no time passes but what a test lets pass."""

    def __init__(self):
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


WORDS = "a an the red green blue yellow ring circle square cross on at left right black white big small"
CLIP_LENGTH = 16  # tokens; the published encoders have 77


def _clip_tokenizer():
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.!-"
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=CLIP_LENGTH
    )


def _t5_tokenizer():
    from transformers import T5TokenizerFast

    letters = "▁abcdefghijklmnopqrstuvwxyz0123456789,.!-"
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(f"▁{word}", -2.0) for word in WORDS.split() if len(word) > 1]
    vocabulary += [(letter, -6.0) for letter in letters]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0)


def _clip(tokenizer, width: int, projection: int | None):
    """With a projection of the pooled embedding, as SD3 has it, or (None) without, as FLUX."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        projection_dim=projection or width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def _t5(tokenizer, width: int):
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=48, num_layers=2, num_heads=2)
    return T5EncoderModel(config).eval()


def _vae(**factors: float):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=16,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **factors,
    )


def save_tiny_pipeline(folder: Path, with_t5: bool) -> Path:
    """A StableDiffusion3Pipeline of 4 pixels a latent, 16 channels and images of at most 64 x 64."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    tokenizer = _clip_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=40,
        caption_projection_dim=32,
        pooled_projection_dim=28,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    vae = _vae(scaling_factor=1.5305, shift_factor=0.0609)
    t5_tokenizer = _t5_tokenizer() if with_t5 else None
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=_clip(tokenizer, width=16, projection=12),
        tokenizer=tokenizer,
        text_encoder_2=_clip(tokenizer, width=20, projection=16),
        tokenizer_2=_clip_tokenizer(),
        text_encoder_3=_t5(t5_tokenizer, width=40) if with_t5 else None,
        tokenizer_3=t5_tokenizer,
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory) -> Path:
    """Folder of a tiny pipeline with all three text encoders. Not to be written to."""
    return save_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "pipeline", with_t5=True)


@pytest.fixture(scope="session")
def tiny_pipeline_no_t5(tmp_path_factory) -> Path:
    """The same without T5 (stock from_pretrained wants text_encoder_3=None, tokenizer_3=None). Not to be written to."""
    return save_tiny_pipeline(tmp_path_factory.mktemp("tiny_no_t5") / "pipeline", with_t5=False)


def save_tiny_flux(folder: Path, distilled: bool) -> Path:
    """A FluxPipeline of 4 pixels a latent and 16 channels: guidance-distilled with a shift by resolution, as FLUX.1-dev
    is, or neither, as FLUX.1-schnell."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    tokenizer, t5_tokenizer = _clip_tokenizer(), _t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=40,
        pooled_projection_dim=20,
        guidance_embeds=distilled,
        axes_dims_rope=(4, 6, 6),
    )
    # Pictures of 32 pixels a side are 16 tokens, of 64 pixels 64: with these numbers their shifts are far apart.
    shift = {"use_dynamic_shifting": True, "shift": 3.0, "base_image_seq_len": 9, "max_image_seq_len": 100}
    pipeline = FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**(shift if distilled else {"shift": 1.0})),
        vae=_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=_clip(tokenizer, width=20, projection=None),
        tokenizer=tokenizer,
        text_encoder_2=_t5(t5_tokenizer, width=40),
        tokenizer_2=t5_tokenizer,
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory) -> Path:
    """Folder of a tiny FluxPipeline of FLUX.1-dev's kind. Not to be written to."""
    return save_tiny_flux(tmp_path_factory.mktemp("tiny_flux") / "pipeline", distilled=True)


@pytest.fixture(scope="session")
def tiny_schnell(tmp_path_factory) -> Path:
    """Folder of a tiny FluxPipeline of FLUX.1-schnell's kind. Not to be written to."""
    return save_tiny_flux(tmp_path_factory.mktemp("tiny_schnell") / "pipeline", distilled=False)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = run_command(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder])
    if made.returncode:
        pytest.skip(f"a small file system cannot be made here ({made.stderr.strip()})")
    yield folder
    # Lazily: torch's writer may hold on to its file as long as its error is known.
    assert run_command(["umount", "-l", folder]).returncode == 0
