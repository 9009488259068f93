"""The embedded demonstration: a world of captioned pictures, exact measurements in it, and a small real teacher."""

from pathlib import Path

TEACHER = Path(__file__).parent / "teacher"
"""Folder of the teacher: a complete diffusers StableDiffusion3Pipeline."""

PROMPTS = Path(__file__).parent / "prompts.txt"
"""Training prompts, one a line; none of them is an evaluation prompt."""
