"""Whatever a run has opened is closed when it ends badly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import ends, run_script

DRIVER = Path(__file__).parents[1] / "drivers" / "ended_badly.py"


@pytest.mark.distributed
def test_what_a_run_opened_is_closed_wherever_it_fails(options, tmp_path):
    """No thread, file, lock, bar or copy in memory is left: after each thing that is opened a failure is arranged."""
    mine = [
        option for option in options if not option.startswith(("prompts.cache_dir", "run.tensorboard", "evaluation"))
    ]
    mine += ["run.iterations=3", "run.checkpoint_every=1", "run.tensorboard=true", "prompts.encode_batch_size=2"]
    mine += ["evaluation.num_prompts=1", "evaluation.num_samples=1", "distill.teacher_steps=3"]
    done = run_script(0, DRIVER, tmp_path, *mine)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, ends(done.stdout, done.stderr)
    results = json.loads(lines[0].removeprefix("RESULT "))
    assert len(results) == 12
    assert results == {each: {"status": 2 if each == "the folder's lock" else 1} for each in results}
