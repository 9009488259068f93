"""Checkpoints: what is saved comes back bit for bit, on another number of processes by value; damage is found and named,
an older one is taken, and nothing that was saved is lost."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import running

from dpdmd.config import ConfigError, parse_config
from dpdmd.engine.shards import Layout, SavedRole, pieces
from dpdmd.files import load_tensors, read_json, save_tensors, sha256
from dpdmd.kernels.optim.adamw import Float8State, exp_avg_of, exp_avg_sq_of
from dpdmd.run import checkpoint
from dpdmd.run.checkpoint import Checkpoints, checkpoint_bytes, global_batch
from dpdmd.run.resume import with_global_batch

SIZES = {"first": 1000, "second": 7, "empty": 0, "third": 513, "scalar": 1}
CONFIG = parse_config({"prompts": {"file": "p"}, "engine": {"batch_size": 2, "accumulation": 2}})


class Processes:
    """Several processes' worlds, a thread each."""

    def __init__(self, size: int):
        self.size = size
        self._values = [[None] * size for _ in range(2)]
        self._barriers = [threading.Barrier(size, timeout=600) for _ in range(2)]
        self.worlds = [self._world(rank) for rank in range(size)]

    def _world(self, rank: int):
        def gather(value, which=0):
            self._values[which][rank] = value
            self._barriers[which].wait()
            values = list(self._values[which])
            self._barriers[which].wait()
            return values

        def on_main(function, *args, **kwargs):
            outcome = problem = None
            if rank == 0:
                try:
                    outcome = function(*args, **kwargs)
                except ConfigError as error:
                    problem = error
            outcome, problem = gather((outcome, problem))[0]
            if problem is not None:
                raise problem
            return outcome

        return SimpleNamespace(
            rank=rank,
            size=self.size,
            main=rank == 0,
            device=torch.device("cpu"),
            gather=gather,
            gather_in_background=lambda value: gather(value, 1),
            on_main=on_main,
            barrier=lambda: gather(None),
        )

    def run(self, function):
        """function(world) of each; results by rank."""
        with ThreadPoolExecutor(self.size) as pool:
            return [future.result() for future in [pool.submit(function, world) for world in self.worlds]]


def cut(values: torch.Tensor, layout: Layout, rank: int, name: str) -> torch.Tensor:
    piece = layout.piece(SIZES[name])
    padded = torch.zeros(piece * layout.processes, dtype=values.dtype)
    padded[: len(values)] = values
    return padded[rank * piece : (rank + 1) * piece]


class Role:
    """What a checkpoint asks of a Network: whole tensors by parameter, of which each process has its pieces."""

    swaps = False

    def __init__(self, world, seed: int, groups: int = 1, state: str = "float32", ema: bool = True, updates: int = 5):
        generator = torch.Generator().manual_seed(seed)
        names = list(SIZES)
        self.world, self.updates = world, updates
        self._layout = Layout(
            world.size, tuple(tuple((name, SIZES[name]) for name in names[first::groups]) for first in range(groups))
        )
        kinds = ["master", "exp_avg", "exp_avg_sq", *(["average"] if ema else [])]
        self.whole = {kind: {n: torch.randn(s, generator=generator) for n, s in SIZES.items()} for kind in kinds}
        self.whole["exp_avg_sq"] = {name: x.square() for name, x in self.whole["exp_avg_sq"].items()}
        self.state = state
        self.loaded: dict[int, dict[str, torch.Tensor]] = {}

    def layout(self):
        return self._layout

    def tensors(self, group: int) -> dict[str, torch.Tensor]:
        parameters = [name for name, _ in self._layout.groups[group]]
        found = {
            kind: torch.cat([cut(whole[name], self._layout, self.world.rank, name) for name in parameters])
            for kind, whole in self.whole.items()
        }
        if self.state == "bfloat16":
            found |= {name: found[name].bfloat16() for name in ("exp_avg", "exp_avg_sq")}
        if self.state == "float8":
            found |= checkpoint_float8(found.pop("exp_avg"), found.pop("exp_avg_sq"))
        return found | {"step": torch.tensor(self.updates)}

    def state_groups(self):
        for group in range(len(self._layout.groups)):
            yield group, self.tensors(group)

    def load(self, updates, read):
        self.updates = updates
        self.loaded = {group: read(group) for group in range(len(self._layout.groups))}


def checkpoint_float8(exp_avg, exp_avg_sq):
    from dpdmd.engine.shards import _float8

    return _float8(exp_avg, exp_avg_sq)


def networks(world, first: int = 0, **options):
    return {"student": Role(world, first, **options), "critic": Role(world, first + 1, **options)}


def state_of(roles):
    skipped = {"skipped": {role: [] for role in roles}, "skipped_in_a_row": dict.fromkeys(roles, 0)}
    return {"updates": {role: each.updates for role, each in roles.items()}, **skipped, "note": "any"}


def save(folder: Path, size: int = 1, iterations=(3, 6), keep: int = 9, background: bool = True, **options):
    def run(world):
        checkpoints = Checkpoints(folder, keep, world, {"ema": True}, CONFIG, background=background)
        for iteration in iterations:
            roles = networks(world, iteration, **options)
            checkpoints.save(iteration, roles, state_of(roles))
        checkpoints.wait()
        return checkpoints

    return Processes(size).run(run)


def resume(folder: Path, size: int = 1, identity=None, **options):
    """(iteration, roles) of each process; None where there is nothing to resume."""

    def run(world):
        checkpoints = Checkpoints(folder, 2, world, identity or {"ema": True}, CONFIG)
        found = checkpoints.find()
        if found is None:
            return None
        roles = networks(world, 0, **options)
        checkpoints.load(found, roles)
        return found, roles

    return Processes(size).run(run)


@pytest.mark.parametrize("state", ["float32", "bfloat16", "float8"])
@pytest.mark.parametrize("size, groups", [(1, 1), (2, 1), (3, 2)])
@pytest.mark.parametrize("background", [True, False])
def test_what_is_saved_comes_back_bit_for_bit(tmp_path, size, groups, state, background):
    save(tmp_path, size, groups=groups, state=state, background=background)
    for found, roles in resume(tmp_path, size, groups=groups):
        assert found.iteration == 6 and found.state["note"] == "any" and found.index["global_batch"] == 4 * size
        for offset, (_, role) in enumerate(roles.items()):
            expected = Role(role.world, 6 + offset, groups=groups, state=state)
            for group, tensors in expected.state_groups():
                assert tensors.keys() == role.loaded[group].keys()
                assert all(torch.equal(value, role.loaded[group][name]) for name, value in tensors.items())
                assert all(value.dtype == role.loaded[group][name].dtype for name, value in tensors.items())


@pytest.mark.parametrize("state", ["float32", "bfloat16", "float8"])
@pytest.mark.parametrize("saved, now", [((1, 1), (2, 1)), ((2, 1), (4, 1)), ((4, 2), (1, 1)), ((3, 1), (2, 3))])
def test_another_number_of_processes(tmp_path, saved, now, state):
    save(tmp_path, saved[0], groups=saved[1], state=state)
    for _, roles in resume(tmp_path, now[0], groups=now[1]):
        for offset, role in enumerate(roles.values()):
            expected = Role(role.world, 6 + offset, groups=now[1], state=state)
            for group, tensors in expected.state_groups():
                loaded = role.loaded[group]
                assert {name: (x.dtype, x.shape) for name, x in tensors.items()} == {
                    name: (x.dtype, x.shape) for name, x in loaded.items()
                }
                if state != "float8":
                    assert all(torch.equal(value, loaded[name]) for name, value in tensors.items())
                    continue
                assert all(torch.equal(tensors[name], loaded[name]) for name in ("master", "average", "step"))
                exact = Role(role.world, 6 + offset, groups=now[1]).tensors(group)
                for name, of in (("exp_avg", exp_avg_of), ("exp_avg_sq", exp_avg_sq_of)):
                    values = of(Float8State(loaded[name], loaded[f"{name}_scale"]))
                    error = (values - exact[name]).norm()
                    # Two roundings to 3 bits of mantissa (of the root: 4).
                    assert error <= 0.08 * exact[name].norm(), (
                        name,
                        error,
                    )


def test_pieces_cover_every_element_once():
    for old_size in (1, 2, 3, 5):
        for new_size in (1, 2, 4):
            old = Layout(old_size, (tuple(SIZES.items()),))
            new = Layout(new_size, (tuple(list(SIZES.items())[:2]), tuple(list(SIZES.items())[2:])))
            for group in range(2):
                taken = [
                    (old_rank, place)
                    for rank in range(new_size)
                    for _, old_rank, _, begin, end in pieces(old, new, rank, group)
                    for place in range(begin, end)
                ]
                assert len(taken) == len(set(taken)) == sum(size for _, size in new.groups[group])


def flip(path: Path, offset: int, bit: int = 1):
    data = bytearray(path.read_bytes())
    data[offset] ^= bit
    path.write_bytes(bytes(data))


def shard(folder: Path, role: str = "student", rank: int = 0, step: int = 6) -> Path:
    return folder / f"step_{step:06d}" / role / f"rank_{rank:05d}.safetensors"


def swap_ranks(folder):
    first, second = shard(folder, rank=0), shard(folder, rank=1)
    other = first.with_name("other")
    first.rename(other), second.rename(first), other.rename(second)


def rewrite(path: Path, change):
    tensors, metadata = load_tensors(path)
    change(tensors)
    save_tensors(path, tensors, metadata)


def edit_index(folder, change, step: int = 6):
    path = folder / f"step_{step:06d}" / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def forge_index(folder, **entries):
    """With the digest of what it holds then."""

    def forge(index):
        index.update(entries)
        del index["sha256"]
        index["sha256"] = checkpoint._digest(index)

    edit_index(folder, forge)


def forge_state(folder, **entries):
    index = json.loads((folder / "step_000006" / "index.json").read_text())
    forge_index(folder, state={**index["state"], **entries})


class Pickled:
    def __reduce__(self):
        return os.system, ("touch /tmp/dpdmd-unpickled",)


DAMAGES = {
    "a flipped bit of a master": lambda f: flip(shard(f), -5000),
    "a flipped bit of the header": lambda f: flip(shard(f), 20),
    "a flipped bit of the critic's moments on another process": lambda f: flip(shard(f, "critic", 1), -100),
    "a value changed by hand": lambda f: rewrite(shard(f), lambda tensors: tensors["master"].add_(1e-3)),
    "truncated": lambda f: os.truncate(shard(f), shard(f).stat().st_size - 1),
    "longer": lambda f: shard(f).write_bytes(shard(f).read_bytes() + b"\0"),
    "empty": lambda f: shard(f).write_bytes(b""),
    "a file that is gone": lambda f: shard(f, "critic").unlink(),
    "a folder in its place": lambda f: (shard(f).unlink(), shard(f).mkdir()),
    "a role that is gone": lambda f: shutil.rmtree(f / "step_000006" / "critic"),
    "processes swapped": swap_ranks,
    "roles swapped": lambda f: (
        (f / "step_000006/student").rename(f / "step_000006/other"),
        (f / "step_000006/critic").rename(f / "step_000006/student"),
        (f / "step_000006/other").rename(f / "step_000006/critic"),
    ),
    "the student of an older one": lambda f: (
        shutil.rmtree(f / "step_000006" / "student"),
        shutil.copytree(f / "step_000003" / "student", f / "step_000006" / "student"),
    ),
    "a pickle in a file's place": lambda f: torch.save({"master": Pickled()}, shard(f)),
    "no index": lambda f: (f / "step_000006" / "index.json").unlink(),
    "an empty index": lambda f: (f / "step_000006" / "index.json").write_text(""),
    "half an index": lambda f: os.truncate(f / "step_000006" / "index.json", 300),
    "an index that is a list": lambda f: (f / "step_000006" / "index.json").write_text("[]"),
    "an index that is not text": lambda f: (f / "step_000006" / "index.json").write_bytes(b"\xff\xfe\0"),
    "another iteration in the index": lambda f: edit_index(f, lambda index: index.update(iteration=5)),
    "other updates in the index": lambda f: edit_index(f, lambda index: index["state"]["updates"].update(student=1)),
    "another size in the index": lambda f: edit_index(f, lambda index: index["files"][0].update(bytes=1)),
    "a file less in the index": lambda f: edit_index(f, lambda index: index["files"].pop()),
    "the index of an older one": lambda f: shutil.copy(f / "step_000003/index.json", f / "step_000006/index.json"),
    "an older one under its name": lambda f: (
        shutil.rmtree(f / "step_000006"),
        shutil.copytree(f / "step_000003", f / "step_000006"),
    ),
    "a file where the folder was": lambda f: (shutil.rmtree(f / "step_000006"), (f / "step_000006").write_text("")),
    "a folder of another program": lambda f: (
        shutil.rmtree(f / "step_000006"),
        (f / "step_000006").mkdir(),
        (f / "step_000006" / "pytorch_model.bin").write_bytes(b"x"),
    ),
    "a folder of another program with an index": lambda f: edit_index(f, lambda index: index.update(format="other")),
    "a version that is not known": lambda f: edit_index(f, lambda index: index.update(version=2)),
    "an index that cannot be read": lambda f: (
        (f / "step_000006/index.json").unlink(),
        (f / "step_000006/index.json").mkdir(),
    ),
    "a pipe for an index": lambda f: (
        (f / "step_000006/index.json").unlink(),
        os.mkfifo(f / "step_000006/index.json"),
    ),
    "a pipe for a file": lambda f: (shard(f).unlink(), os.mkfifo(shard(f))),
    "a link to nowhere": lambda f: (
        shutil.rmtree(f / "step_000006"),
        (f / "step_000006").symlink_to(f / "nowhere"),
    ),
    "other files in the index": lambda f: forge_index(f, files={}),
    "another file in the index": lambda f: forge_index(f, files=[{"path": 3}]),
    "no state in the index": lambda f: forge_index(f, state=None),
    "an empty state in the index": lambda f: forge_index(f, state={}),
    **{
        f"{key} = {value!r} in the index": lambda f, key=key, value=value: forge_state(f, **{key: value})
        for key, value in (
            ("updates", {"student": -5, "critic": "x"}),
            ("skipped", None),
            ("skipped_in_a_row", {"student": "a", "critic": 0}),
            ("attention_times", "abc"),
        )
    },
    **{
        f"{key} = {str(value)[:30]} in the index": lambda f, key=key, value=value: forge_index(f, **{key: value})
        for key, value in (
            ("parameters", {}),
            ("parameters", {"student": [[["a", "b"]]], "critic": []}),
            ("processes", 0),
            ("processes", 3),
            ("processes", 10**9),
            ("global_batch", 0),
            ("global_batch", -4),
            ("global_batch", 10**12),
            ("config", {}),
            ("files", []),
            ("files", [{"path": "a\0b", "bytes": 1, "sha256": "a"}]),
        )
    },
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_one_before_is_taken(tmp_path, capfd, damage):
    save(tmp_path, 2)
    DAMAGES[damage](tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for found, roles in resume(tmp_path, 2):
        assert found.iteration == 3
        expected = Role(roles["student"].world, 3).tensors(0)
        assert all(torch.equal(value, roles["student"].loaded[0][name]) for name, value in expected.items())
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("--resume: ")]
    assert len(lines) == 1 and "step_000006" in lines[0] and lines[0].endswith("step_000006 is left out")
    assert sorted(tmp_path.rglob("*")) == before  # nothing is deleted
    assert not Path("/tmp/dpdmd-unpickled").exists()


def test_all_of_them_damaged(tmp_path, capfd):
    save(tmp_path)
    flip(shard(tmp_path), -1)
    flip(shard(tmp_path, step=3), -1)
    assert resume(tmp_path) == [None]
    assert capfd.readouterr().err.count("is left out") == 2


def test_a_damaged_one_is_written_anew_and_does_not_count(tmp_path, capfd):
    save(tmp_path, iterations=(2, 4, 6))
    flip(shard(tmp_path), -1)

    def run(world):
        checkpoints = Checkpoints(tmp_path, 2, world, {"ema": True}, CONFIG)
        assert checkpoints.find().iteration == 4
        roles = networks(world, 50)
        checkpoints.save(5, roles, state_of(roles))
        checkpoints.wait()
        assert [path.name for path in checkpoints.complete()] == ["step_000004", "step_000005"]
        checkpoints.save(6, roles, state_of(roles))
        checkpoints.wait()
        assert [path.name for path in checkpoints.complete()] == ["step_000005", "step_000006"]

    Processes(1).run(run)
    assert resume(tmp_path)[0][0].iteration == 6
    # Whatever was wrong with it, it may have been a newer program's, or hold what somebody put there.
    assert (tmp_path / "step_000006.left_out" / "index.json").exists()
    assert "was left out, and stays as step_000006.left_out" in capfd.readouterr().err


def test_what_is_no_checkpoint_is_not_in_the_way(tmp_path):
    save(tmp_path, iterations=(3,))
    (tmp_path / "step_000006").mkdir()
    (tmp_path / "step_000006" / "mine.txt").write_text("x")
    (tmp_path / "step_000009").symlink_to(tmp_path / "nowhere")
    (tmp_path / "step_000009.left_out").symlink_to(tmp_path / "nowhere")
    save(tmp_path, iterations=(6, 9))
    assert resume(tmp_path)[0][0].iteration == 9
    assert (tmp_path / "step_000006.left_out" / "mine.txt").exists()
    assert (tmp_path / "step_000009.left_out_2").is_symlink()


def test_what_cannot_be_resumed_is_refused(tmp_path):
    save(tmp_path)
    with pytest.raises(
        ConfigError, match=r"step_000006 was saved with ema = True, and this run has False\. Resume with"
    ):
        resume(tmp_path, identity={"ema": False})


def test_leftovers_of_a_kill_are_removed_and_a_replaced_one_comes_back(tmp_path):
    save(tmp_path, iterations=(3, 6))
    for leftover in (".unfinished-step_000009", ".deleted-step_000001"):
        shutil.copytree(tmp_path / "step_000003", tmp_path / leftover)
    (tmp_path / "step_000006").rename(tmp_path / ".replaced-step_000006")  # killed between two renames
    (tmp_path / ".unfinished-step_000012").write_text("")
    (tmp_path / ".deleted-step_000002").symlink_to(tmp_path / "step_000003")
    assert resume(tmp_path)[0][0].iteration == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000003", "step_000006"]


def test_what_cannot_be_read_is_not_in_the_way(tmp_path, monkeypatch, capfd):
    """Another user's."""
    save(tmp_path)
    stat, closed = os.stat, str(tmp_path / "step_000006" / "")

    def refused(path, *args, **kwargs):
        if str(path).startswith(closed):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", refused)
    monkeypatch.setattr("dpdmd.run.checkpoint.read_json", lambda path: refused(path) and read_json(path))
    assert resume(tmp_path)[0][0].iteration == 3
    assert (
        "step_000006 is no checkpoint (index.json: Permission denied); step_000006 is left out"
        in capfd.readouterr().err
    )
    save(tmp_path, iterations=(6, 9))
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("step_000003", "step_000006", "step_000006.left_out", "step_000009")
    ]


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("where", ["critic/rank_00001.safetensors", "index.json"])
def test_a_disk_that_fills_up(tmp_path, monkeypatch, background, where):
    """On one of two processes: both learn it, what was there is whole, nothing half is left."""

    def run(world):
        checkpoints = Checkpoints(tmp_path, 2, world, {"ema": True}, CONFIG, background=background)
        roles = networks(world)
        checkpoints.save(3, roles, state_of(roles))
        checkpoints.wait()
        world.barrier()
        if world.main:
            writer = "write_json" if where == "index.json" else "save_tensors"
            write = getattr(checkpoint, writer)

            def full(path, *rest):
                if str(path).endswith(where):
                    raise OSError(28, "No space left on device", str(path))
                write(path, *rest)

            monkeypatch.setattr(checkpoint, writer, full)
        world.barrier()
        with pytest.raises(OSError, match=r"step_000006 could not be written: .*No space.*; the newest .*step_000003"):
            checkpoints.save(6, roles, state_of(roles))
            checkpoints.wait()
        assert not checkpoints.failed

    Processes(2).run(run)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000003"]
    assert resume(tmp_path, 2)[0][0].iteration == 3


def test_state_may_change_while_it_is_written(tmp_path, monkeypatch):
    """What is saved is what was there at the call; the next save waits, and copies anew."""
    going_on = threading.Event()
    write = checkpoint.save_tensors

    def slowly(*arguments):
        assert going_on.wait(600)
        write(*arguments)

    monkeypatch.setattr(checkpoint, "save_tensors", slowly)

    def run(world):
        checkpoints = Checkpoints(tmp_path, 2, world, {"ema": True}, CONFIG)
        roles = networks(world, 3)
        expected = roles["student"].tensors(0)
        tensors = roles["student"].tensors(0)
        roles["student"].tensors = lambda group: tensors
        checkpoints.save(3, roles, state_of(roles))
        assert not checkpoints.failed and checkpoints.complete() == []  # under way
        tensors["master"].add_(1)
        going_on.set()
        checkpoints.wait()
        assert torch.equal(load_tensors(shard(tmp_path, step=3))[0]["master"], expected["master"])
        checkpoints.save(4, roles, state_of(roles))
        checkpoints.wait()
        assert torch.equal(load_tensors(shard(tmp_path, step=4))[0]["master"], expected["master"] + 1)
        assert len(checkpoints.pauses) == len(checkpoints.write_seconds) == 2

    Processes(1).run(run)


def test_a_failure_in_the_background_is_known_without_waiting(tmp_path, monkeypatch):
    def full(path, *rest):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "save_tensors", full)

    def run(world):
        checkpoints = Checkpoints(tmp_path, 2, world, {"ema": True}, CONFIG)
        roles = networks(world)
        checkpoints.save(3, roles, state_of(roles))
        checkpoints._writing.exception()
        assert checkpoints.failed
        with pytest.raises(OSError, match="the newest complete checkpoint is none"):
            checkpoints.save(4, roles, state_of(roles))

    Processes(1).run(run)


def test_no_room_for_a_copy(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(checkpoint.psutil, "virtual_memory", lambda: SimpleNamespace(available=100))

    def run(world):
        checkpoints = Checkpoints(tmp_path, 2, world, {"ema": True}, CONFIG)
        roles = networks(world)
        for iteration in (3, 6):
            checkpoints.save(iteration, roles, state_of(roles))
            assert [path.name for path in checkpoints.complete()][-1] == f"step_{iteration:06d}"

    Processes(2).run(run)
    assert capfd.readouterr().out.count("the training waits while they are written, as host memory has no room") == 1


def test_memory_that_a_job_may_use(tmp_path, monkeypatch):
    """Not the machine's, where the job has a limit: beyond it the kernel ends the run."""
    monkeypatch.setattr(checkpoint.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    step = tmp_path / "job_1" / "step_0"
    step.mkdir(parents=True)
    assert checkpoint.available_memory(tmp_path, "/job_1/step_0") == 1000
    (step / "memory.max").write_text("max\n")
    (step / "memory.current").write_text("70\n")
    assert checkpoint.available_memory(tmp_path, "/job_1/step_0") == 1000
    (step.parent / "memory.max").write_text("300\n")
    (step.parent / "memory.current").write_text("90\n")
    assert checkpoint.available_memory(tmp_path, "/job_1/step_0") == 210
    assert checkpoint.available_memory(tmp_path, "/") == 1000
    assert checkpoint.available_memory() <= 1000


@pytest.mark.parametrize("name", ["master", "exp_avg"])
def test_numbers_that_are_not_finite(tmp_path, name):
    """Whoever wrote them: with the digests that they have."""
    save(tmp_path, 2)
    rewrite(shard(tmp_path, "critic", 1), lambda tensors: tensors[name].view(-1)[-1:].fill_(math.nan))
    index = json.loads((tmp_path / "step_000006" / "index.json").read_text())
    for file in index["files"]:
        path = tmp_path / "step_000006" / file["path"]
        file.update(bytes=path.stat().st_size, sha256=sha256(path))
    forge_index(tmp_path, files=index["files"])
    with pytest.raises(
        ConfigError, match=f"step_000006 holds NaN or infinity in {name} of the critic: move that folder"
    ):
        resume(tmp_path, 2)


def test_what_others_put_into_a_checkpoint_stays(tmp_path, capfd):
    """Where the checkpoint goes in its turn, and where a new one needs its name."""

    def run(world):
        checkpoints = Checkpoints(tmp_path, 1, world, {"ema": True}, CONFIG)
        for iteration in (3, 6, 6):
            roles = networks(world, iteration)
            checkpoints.save(iteration, roles, state_of(roles), last=True)
            (tmp_path / f"step_{iteration:06d}" / "student" / "notes.txt").write_text("mine")

    Processes(1).run(run)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path for path in left if path.endswith(".txt")} == {
        *(f"step_00000{name}/student/notes.txt" for name in ("3.left_out", "6.left_out", "6")),
    }
    assert not any(path.startswith("step_000003.left_out") and not path.endswith("notes.txt") for path in left)
    said = capfd.readouterr().err
    assert "step_000003 is deleted but for student/notes.txt: see " in said
    assert "step_000006 holds student/notes.txt, which no run wrote, and stays as step_000006.left_out" in said


def test_good_ones(tmp_path):
    """Good: the next update of each role was finite. The newest good one outlives `keep`."""

    def run(world):
        checkpoints = Checkpoints(tmp_path, 2, world, {"ema": True}, CONFIG)

        def step(iteration, role, applied=True):
            checkpoints.judge(role, iteration, applied)
            roles = networks(world)
            checkpoints.save(iteration + 1, roles, state_of(roles))
            checkpoints.wait()
            return [path.name[-1] for path in checkpoints.complete()], (checkpoints.last_good() or Path("-")).name[-1]

        assert step(0, "critic") == (["1"], "-")
        assert step(1, "critic") == (["1", "2"], "-")
        assert step(2, "student") == (["1", "2", "3"], "1")
        assert step(3, "critic") == (["2", "3", "4"], "2")
        assert step(4, "critic", applied=False) == (["2", "4", "5"], "2")
        assert step(5, "student") == (["2", "5", "6"], "2")
        assert step(6, "critic") == (["5", "6", "7"], "5")

    Processes(1).run(run)


def test_the_last_good_one_is_kept_and_named(tmp_path, capfd):
    def run(world):
        checkpoints = Checkpoints(tmp_path, 2, world, {"ema": True}, CONFIG)
        roles = networks(world)

        def save_after(iteration):
            checkpoints.save(iteration, roles, state_of(roles))
            checkpoints.wait()

        save_after(1)
        checkpoints.judge("critic", 1, True)
        assert checkpoints.last_good() is None
        checkpoints.judge("student", 2, True)
        assert checkpoints.last_good().name == "step_000001" and (tmp_path / "step_000001/confirmed").exists()
        save_after(3)  # holds a student that has exploded
        checkpoints.judge("critic", 3, False)
        for iteration in (4, 5, 6):
            save_after(iteration)
        assert [path.name[-1] for path in checkpoints.complete()] == ["1", "5", "6"]
        checkpoints.judge("student", 6, True)
        checkpoints.judge("critic", 7, False)
        assert checkpoints.give_up().name == "step_000001"
        assert (tmp_path / "step_000006/suspect").exists() and not (tmp_path / "step_000006/confirmed").exists()

    Processes(1).run(run)
    assert resume(tmp_path)[0][0].iteration == 1
    said = capfd.readouterr().err
    assert said.count("is not a good one: the updates after it were not finite") == 2


@pytest.mark.parametrize("mark, spared", [("confirmed", False), (None, True), (None, False)])
def test_what_a_resumed_run_says_of_the_one_it_goes_on_from(tmp_path, mark, spared):
    """One that was good before stays so, and other settings say nothing against it; those before it are not judged."""
    save(tmp_path)
    if mark:
        (tmp_path / "step_000006" / mark).touch()

    def run(world):
        checkpoints = Checkpoints(tmp_path, 2, world, {"ema": True}, CONFIG)
        path = checkpoints.find().path
        if spared:
            checkpoints.spare(path)
        checkpoints.judge("critic", 6, False)
        good = checkpoints.give_up()
        assert (good == path) == (mark == "confirmed")

    Processes(1).run(run)
    suspect = mark is None and not spared
    assert [path.parent.name for path in tmp_path.glob("*/suspect")] == ["step_000006"] * suspect
    assert resume(tmp_path)[0][0].iteration == (3 if suspect else 6)


def test_a_spared_one_can_turn_out_to_be_good(tmp_path):
    save(tmp_path)

    def run(world):
        checkpoints = Checkpoints(tmp_path, 2, world, {"ema": True}, CONFIG)
        path = checkpoints.find().path
        checkpoints.spare(path)
        for iteration, role in ((6, "critic"), (7, "student")):
            assert checkpoints.last_good() is None
            checkpoints.judge(role, iteration, True)
        assert checkpoints.last_good() == path and (path / "confirmed").exists()

    Processes(1).run(run)


def test_the_batch_of_an_update_stays(tmp_path):
    assert global_batch(CONFIG, 2) == 8
    assert with_global_batch(CONFIG, 8, 1).engine.accumulation == 4
    assert with_global_batch(CONFIG, 8, 4).engine.accumulation == 1
    with pytest.raises(
        ConfigError,
        match=r"updates are of 8 samples, and 3 processes with engine.batch_size = 2 take 6 at a time, .*: 8 or fewer pro",
    ):
        with_global_batch(CONFIG, 8, 3)
    with pytest.raises(
        ConfigError, match=r"1 process with engine.batch_size = 2 take 2 at a time.*: engine.batch_size=1 "
    ):
        with_global_batch(CONFIG, 1, 1)
    with pytest.raises(ConfigError, match=r"engine\.batch_size=1 would do"):
        with_global_batch(CONFIG, 8, 8)


def test_size_is_what_is_written(tmp_path):
    """Of a run's parameters, as the check of the disk counts it."""
    save(tmp_path, iterations=(3,))
    config = CONFIG.model_copy(update={"ema": parse_config({"prompts": {"file": "p"}, "ema": {}}).ema})
    written = sum(
        load_tensors(shard(tmp_path, role, step=3))[0][name].nbytes
        for role in ("student", "critic")
        for name in ("master", "exp_avg", "exp_avg_sq")
    )
    assert checkpoint_bytes(config, sum(SIZES.values())) == written + 4 * sum(SIZES.values())


KILLED = """
import sys
sys.path[:0] = {tests!r}
from pathlib import Path
from test_checkpoint import save
for _ in range(10**6):
    save(Path(sys.argv[1]), iterations=(3, 6, 9), keep=2)
    print("saved", flush=True)
"""


def test_a_kill_at_any_moment_of_saving_leaves_one_that_is_whole(tmp_path):
    """The same names are written over and over: a rename, a deletion or a write is cut off each time."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(tests=[str(folder) for folder in Path(__file__).parents[:2]]))
    folder = tmp_path / "checkpoints"
    for attempt in range(3):
        with running(sys.executable, script, folder) as process:
            for _ in range(attempt + 1):
                assert process.stdout.readline() == "saved\n"
            process.kill()
        found, roles = resume(folder)[0]
        assert found.iteration in (6, 9) or (found.iteration == 3 and len(list(folder.glob("step_*"))) >= 1)
        expected = Role(roles["student"].world, found.iteration).tensors(0)
        assert all(torch.equal(value, roles["student"].loaded[0][name]) for name, value in expected.items())


def test_no_file_is_pickled(tmp_path):
    save(tmp_path, 2)
    for file in tmp_path.rglob("*"):
        if file.is_file():
            assert re.fullmatch(r"index\.json|rank_\d{5}\.safetensors", file.name)
    source = SavedRole(tmp_path / "step_000006" / "student", Layout(2, (tuple(SIZES.items()),)))
    assert source.group(Layout(2, (tuple(SIZES.items()),)), 1, 0).keys() >= {"master", "exp_avg", "step"}
