"""Files: written in one step, with the umask's permissions, read only where they are whole; what a full disk says."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import stat
import sys
from collections import namedtuple

import pytest
import safetensors
import safetensors.torch
import torch
from processes import run_command

from dpdmd import files
from dpdmd.backbones.sd3 import SD3
from dpdmd.config import ModelConfig
from dpdmd.engine.lora import add_adapters, save_adapter
from dpdmd.files import (
    DamagedFile,
    disk_errors,
    follow_umask,
    load_tensors,
    open_tensors,
    publish,
    read_json,
    readable_bytes,
    remove,
    save_tensors,
    sha256,
    sync_folder,
    write_json,
    write_text,
    writing,
)


@contextlib.contextmanager
def umask(value):
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


TENSORS = {
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 3, dtype=torch.float16),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "half": torch.randn(3, 5).to(torch.bfloat16),
    "flags": torch.tensor([True, False, True]),
    "eight bits, é": torch.randn(5).to(torch.float8_e4m3fn),
}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), name


# Tensors


def test_tensors_come_back(tmp_path):
    path = tmp_path / "new" / "a.safetensors"
    save_tensors(path, TENSORS, {"key": "value"})
    tensors, metadata = load_tensors(path)
    assert_equal(tensors, TENSORS)
    assert metadata == {"key": "value"}
    assert [each.name for each in path.parent.iterdir()] == ["a.safetensors"]


def test_the_format_is_that_of_the_library(tmp_path):
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    save_tensors(ours, TENSORS, {"key": "value"})
    assert_equal(safetensors.torch.load_file(ours), TENSORS)
    with safetensors.safe_open(ours, framework="pt") as file:
        assert file.metadata() == {"key": "value"}
    same = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    safetensors.torch.save_file(same, theirs)
    assert_equal(load_tensors(theirs)[0], TENSORS)
    every = {name: torch.ones(3).to(dtype) for name, dtype in files._DTYPES.items()}
    safetensors.torch.save_file(every, theirs)
    assert_equal(load_tensors(theirs)[0], every)
    save_tensors(ours, every)
    assert_equal(safetensors.torch.load_file(ours), every)


def test_tensors_that_share_memory_are_written_one_by_one(tmp_path):
    whole = torch.arange(6.0)
    save_tensors(tmp_path / "a", {"whole": whole, "part": whole[2:4], "again": whole})
    assert_equal(load_tensors(tmp_path / "a")[0], {"whole": whole, "part": whole[2:4], "again": whole})


def test_no_tensors(tmp_path):
    save_tensors(tmp_path / "a", {})
    assert load_tensors(tmp_path / "a") == ({}, {})
    assert safetensors.torch.load_file(tmp_path / "a") == {}


def test_rows(tmp_path):
    save_tensors(tmp_path / "a", TENSORS)
    file = open_tensors(tmp_path / "a")
    assert file.layout["half"] == (torch.bfloat16, (3, 5)) and file.layout["scalar"] == (torch.float32, ())
    assert torch.equal(file.read("half", 1, 2), TENSORS["half"][1:2])
    assert torch.equal(file.read("half", 1), TENSORS["half"][1:])
    assert file.read("half", 3).shape == (0, 5) and file.read("empty").shape == (0, 3)
    assert file.read("scalar") == 3.5
    for start, stop in ((2, 4), (-1, 2), (2, 1)):
        with pytest.raises(IndexError, match="of half, which has 3"):
            file.read("half", start, stop)


def test_a_dtype_that_the_format_lacks(tmp_path):
    with pytest.raises(TypeError, match=r"'wide' of torch\.complex128"):
        save_tensors(tmp_path / "a", {"wide": torch.zeros(2, dtype=torch.complex128)})
    assert not list(tmp_path.iterdir())


def header(entries, data=b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "0 bytes do not hold the header"),
        (b"\x01\x00", "2 bytes do not hold the header"),
        (b"\xff" * 64, "64 bytes do not hold the header"),
        (header(b"[1]"), "no JSON object"),
        (header(b'{"a"'), "header is not JSON"),
        (header(b'{"\xff"'), "header is not JSON"),
        (header(b"[" * 100_000), "header is not JSON"),
        (header({"__metadata__": {"a": 1}}), "metadata is not text"),
        (header({"a": 1}), "does not describe 'a'"),
        (header({"a": {"dtype": "F32"}}), "does not describe 'a'"),
        (header({"a": entry(shape=(-2,))}, bytes(8)), "does not describe 'a'"),
        (header({"a": entry(shape=(True,))}, bytes(8)), "does not describe 'a'"),
        (header({"a": entry(offsets=(0, 8, 9))}, bytes(8)), "does not describe 'a'"),
        (header({"a": entry("F31")}, bytes(8)), "unknown dtype 'F31'"),
        (header({"a": entry([])}, bytes(8)), r"unknown dtype \[\]"),
        (header({"a": entry(shape=(3,))}, bytes(8)), r"'a' has 8 bytes, and its shape \(3,\) needs 12"),
        (header({"a": entry(offsets=(8, 0))}, bytes(8)), "'a' has -8 bytes"),
        (header({"a": entry(offsets=(4, 12))}, bytes(12)), "'a' begins at byte"),  # a gap
        (header({"a": entry(), "b": entry()}, bytes(8)), "'b' begins at byte"),  # one memory twice
        (header({"a": entry()}, bytes(7)), "its header needs"),
        (header({"a": entry()}, bytes(9)), "its header needs"),
        (header({"a": entry(offsets=(1 << 70, (1 << 70) + 8))}, bytes(8)), "'a' begins at byte"),
        (header(b'{"a": {}, "a": {}}'), "stands twice"),
    ],
)
def test_damaged_tensors(tmp_path, content, words):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match=words) as error:
        load_tensors(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_becomes_shorter_while_it_is_open(tmp_path):
    """With a mapped file the process would die of SIGBUS."""
    path = tmp_path / "a"
    save_tensors(path, {"a": torch.arange(100_000)})
    file = open_tensors(path)
    os.truncate(path, 4096)
    with pytest.raises(DamagedFile, match="ends within 'a'"):
        file.read("a")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=str(path)):
        file.read("a")


def test_what_cannot_be_read_is_named(tmp_path):
    for read in (load_tensors, open_tensors, read_json, sha256):
        with pytest.raises(FileNotFoundError, match=str(tmp_path / "none")):
            read(tmp_path / "none")
        with pytest.raises(IsADirectoryError, match=str(tmp_path)):
            read(tmp_path)
    # A failing disk gives an error without a name: /proc/self/mem is one at hand.
    for read in (load_tensors, read_json, sha256):
        with pytest.raises(OSError, match=r"Input/output error: '/proc/self/mem'"):
            read("/proc/self/mem")


# Text


def test_text_and_json(tmp_path):
    write_text(tmp_path / "a.txt", "one\r\ntwo é\n")
    assert (tmp_path / "a.txt").read_bytes() == "one\r\ntwo é\n".encode()
    write_json(tmp_path / "a.json", {"b": [1, None, "é"]})
    assert read_json(tmp_path / "a.json") == {"b": [1, None, "é"]}
    assert (tmp_path / "a.json").read_text().startswith('{\n  "b"')
    write_json(tmp_path / "a.json", 2)  # an older one is replaced
    assert read_json(tmp_path / "a.json") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.txt"]


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), {"a": [float("inf")]}])
def test_json_has_no_such_number(tmp_path, value):
    with pytest.raises(ValueError, match=r"a\.json: .*JSON"):
        write_json(tmp_path / "a.json", value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", r"not JSON \(Expecting value at line 1, column 1\)"),
        (b'{"a": 1,\n', "at line 2, column 1"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b"[-Infinity]", "-Infinity is no JSON number"),
        (b'"\xff"', "byte 1 is not UTF-8"),
        (b"[" * 100_000, "not JSON"),
        (b"1" * 10_000, "not JSON"),
    ],
)
def test_damaged_json(tmp_path, content, words):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match=words) as error:
        read_json(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


# In one step


@pytest.mark.parametrize("problem", [KeyboardInterrupt, ValueError, MemoryError])
def test_an_error_leaves_the_older_file(tmp_path, problem):
    path = tmp_path / "a"
    write_text(path, "older")
    with pytest.raises(problem), writing(path) as file:
        file.write(b"new")
        assert path.read_text() == "older"
        raise problem
    assert path.read_text() == "older" and [each.name for each in tmp_path.iterdir()] == ["a"]


def test_killed_before_the_rename(tmp_path, monkeypatch):
    """What SIGKILL leaves bears another name, and is written over by the next."""
    path = tmp_path / "a"
    code = (
        "import os, signal, sys; from dpdmd import files\n"
        "os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)\n"
        "files.write_text(sys.argv[1], 'half')"
    )
    killed = run_command([sys.executable, "-c", code, path])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [each.name for each in tmp_path.iterdir()] == [".unfinished-a"]
    write_text(path, "whole")
    assert path.read_text() == "whole" and [each.name for each in tmp_path.iterdir()] == ["a"]


def test_all_reaches_the_disk_before_the_rename(tmp_path, monkeypatch):
    events, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))), sync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("replace"), replace(*names)))
    write_text(tmp_path / "a", "text")
    assert events == [".unfinished-a", "replace", tmp_path.name]
    events.clear()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").touch()
    sync_folder(tmp_path)
    assert sorted(events) == sorted(["a", "b", "sub", tmp_path.name])


def test_only_files_are_written_over(tmp_path):
    with pytest.raises(OSError, match=f"{tmp_path} could not be written: it is a folder"):
        write_text(tmp_path, "text")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="it is a device"):
        save_tensors(pipe, {})
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/a could not be written: Not a directory|File exists"):
        write_text(tmp_path / "file" / "a", "text")


def test_publish(tmp_path):
    final = tmp_path / "student"
    for content in ("first", "second"):
        write_text(tmp_path / ".unfinished-student" / "a", content)
        publish(tmp_path / ".unfinished-student", final)
        assert (final / "a").read_text() == content
        assert [each.name for each in tmp_path.iterdir()] == ["student"]


def test_what_stands_in_the_way_of_publishing(tmp_path, monkeypatch):
    write_text(tmp_path / "mine" / "a", "mine")
    for name, number in itertools.product((".replaced-student", "student"), range(2)):
        if number:
            (tmp_path / name).symlink_to(tmp_path / "mine")
        else:
            (tmp_path / name).write_text("")
        write_text(tmp_path / ".unfinished-student" / "a", "new")
        publish(tmp_path / ".unfinished-student", tmp_path / "student")
        assert (tmp_path / "student" / "a").read_text() == "new"
        remove(tmp_path / "student")
    assert (tmp_path / "mine" / "a").read_text() == "mine"
    # Another user's, which cannot be deleted.
    for name in ("student", ".replaced-student", ".unfinished-student"):
        write_text(tmp_path / name / "a", name)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
    message = (
        f"student could not be written: {tmp_path}/.replaced-student, left by an earlier process, cannot be deleted"
    )
    with pytest.raises(OSError, match=message):
        publish(tmp_path / ".unfinished-student", tmp_path / "student")
    assert (tmp_path / "student" / "a").read_text() == "student"


def test_publish_killed_within_leaves_the_older_folder(tmp_path, monkeypatch):
    write_text(tmp_path / "student" / "a", "older")
    write_text(tmp_path / ".unfinished-student" / "a", "new")
    rename, count = os.rename, []

    def dies_at_the_second(*names):
        count.append(names)
        if len(count) == 2:
            raise KeyboardInterrupt
        rename(*names)

    monkeypatch.setattr(os, "rename", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path / ".unfinished-student", tmp_path / "student")
    assert (tmp_path / ".replaced-student" / "a").read_text() == "older"
    publish(tmp_path / ".unfinished-student", tmp_path / "student")
    assert [each.name for each in tmp_path.iterdir()] == ["student"]
    assert (tmp_path / "student" / "a").read_text() == "new"


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_permissions_are_the_umasks(tmp_path, mask):
    with umask(mask):
        save_tensors(tmp_path / "new" / "a", TENSORS)
        write_text(tmp_path / "new" / "b", "text")
        write_json(tmp_path / "new" / "c", 1)
        safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "new" / "d")
        follow_umask(tmp_path / "new")
    assert mode(tmp_path / "new") == 0o777 & ~mask
    assert {path.name: mode(path) for path in (tmp_path / "new").iterdir()} == dict.fromkeys("abcd", 0o666 & ~mask)


def test_sha256(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"a" * (2 * files._CHUNK + 1))
    found = run_command(["sha256sum", path]).stdout.split()[0]
    assert sha256(path) == found


# Students


def exported(tiny_pipeline, folder):
    """Both kinds of a student, in folders that do not exist yet."""
    backbone = SD3(ModelConfig(pipeline=str(tiny_pipeline), resolution=32, max_sequence_length=12))
    transformer = backbone.load_transformer("student", torch.float32)
    backbone.export(transformer.state_dict(), folder / "transformer")
    add_adapters(transformer, rank=2, alpha=2, seed=0)
    save_adapter(transformer, "student", folder / "adapter")


@pytest.mark.parametrize("mask", [0o022, 0o002])
def test_others_can_read_a_student(tiny_pipeline, tmp_path, mask):
    with umask(mask):
        exported(tiny_pipeline, tmp_path / "student")
    modes = {path.relative_to(tmp_path).as_posix(): mode(path) for path in tmp_path.rglob("*")}
    assert modes == {
        "student": 0o777 & ~mask,
        "student/transformer": 0o777 & ~mask,
        "student/transformer/config.json": 0o666 & ~mask,
        "student/transformer/diffusion_pytorch_model.safetensors": 0o666 & ~mask,
        "student/adapter": 0o777 & ~mask,
        "student/adapter/pytorch_lora_weights.safetensors": 0o666 & ~mask,
    }


def test_a_student_that_cannot_be_written(tiny_pipeline, tmp_path, small_disk):
    (small_disk / "ballast").write_bytes(bytes(1 << 20))
    with pytest.raises(
        OSError, match=r"transformer could not be written: .* were needed and .* are free on that disk$"
    ):
        exported(tiny_pipeline, small_disk)
    (tmp_path / "transformer").touch()  # save_pretrained would log it and return
    with pytest.raises(OSError, match=r"transformer could not be written: File exists$"):
        exported(tiny_pipeline, tmp_path)


# Disks


def test_readable_bytes():
    found = [readable_bytes(number) for number in (0, 874, 999, 1000, 2_104_000_000, 999_700, 27.3e9, 1e12, 5e16)]
    assert found == ["0 B", "874 B", "999 B", "1 kB", "2.1 GB", "1 MB", "27.3 GB", "1 TB", "5e+04 TB"]


def test_a_full_disk(small_disk):
    path = small_disk / "a.safetensors"
    save_tensors(path, {"a": torch.zeros(100_000)})
    before = path.read_bytes()
    for write in (lambda: save_tensors(path, {"a": torch.zeros(1 << 19)}), lambda: write_text(path, "x" * (1 << 21))):
        with pytest.raises(OSError) as error:
            write()
        assert str(error.value) == f"{path} could not be written: 2.1 MB were needed and 647 kB are free on that disk"
        assert path.read_bytes() == before and [each.name for each in small_disk.iterdir()] == [path.name]


def test_a_disk_without_room_for_names(tmp_path):
    """No inodes are left: what the bytes say is no help."""
    folder = tmp_path / "disk"
    folder.mkdir()
    arguments = ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=2", "tmpfs", folder]
    if run_command(arguments).returncode:
        pytest.skip("a small file system cannot be made here")
    try:
        write_text(folder / "a", "text")
        with pytest.raises(OSError, match=r"b could not be written: No space left on device; 1\.04 MB are free"):
            write_text(folder / "b", "text")
    finally:
        assert run_command(["umount", folder]).returncode == 0


def by_path(folder):
    torch.save(torch.zeros(1 << 19), folder / "a.pt")


def by_parts(folder):
    torch.save([torch.zeros(1 << 17) for _ in range(5)], folder / "a.pt")


def by_file(folder):
    with (folder / "a.pt").open("wb") as file:
        torch.save(torch.zeros(1 << 19), file)


def by_safetensors(folder):
    safetensors.torch.save_file({"a": torch.zeros(1 << 19)}, folder / "a.pt")


def by_hand(folder):
    (folder / "a.pt").write_bytes(bytes(1 << 21))


@pytest.mark.parametrize("write", [by_path, by_parts, by_file, by_safetensors, by_hand])
def test_what_others_say_of_a_full_disk(small_disk, write):
    """torch says "unexpected pos 2112 vs 2006" or "basic_ios::clear: iostream error"."""
    path = small_disk / "a.pt"
    with pytest.raises(OSError) as error, disk_errors(path, 2_100_000):
        try:
            write(small_disk)
        finally:
            path.unlink(missing_ok=True)
    assert str(error.value).startswith(f"{path} could not be written: 2.1 MB were needed and ")
    assert str(error.value).endswith(" are free on that disk") and "\n" not in str(error.value)
    with pytest.raises(OSError, match=r"a\.pt could not be written: .*; .* are free on that disk$"), disk_errors(path):
        write(small_disk)


def test_writes_to_a_device_that_is_full(tmp_path):
    with pytest.raises(OSError, match=r"^x could not be written: No space left on device; .* are free"):  # noqa: SIM117
        with disk_errors("x"), open("/dev/full", "wb", buffering=0) as file:
            file.write(b"text")
    with pytest.raises(OSError, match=r"^x could not be written: No space left on device"):  # noqa: SIM117
        with disk_errors("x"), open("/dev/full", "wb") as file:
            torch.save(torch.zeros(9), file)


def test_other_reasons_of_a_disk(tmp_path):
    with pytest.raises(OSError, match=r"^x could not be written: Read-only file system$"), disk_errors("x", 1 << 60):
        raise OSError(30, "Read-only file system")
    with (
        pytest.raises(OSError, match=r"^x could not be written: Disk quota exceeded; .* are free"),
        disk_errors("x", 1),
    ):
        raise OSError(122, "Disk quota exceeded")
    with pytest.raises(OSError, match=r"^x could not be written: Is a directory$"), disk_errors("x"):
        (tmp_path / "a").mkdir()
        (tmp_path / "a").write_text("")
    with pytest.raises(OSError, match=r"^x could not be written: .*No such file or directory"):  # noqa: SIM117
        with disk_errors("x"):
            safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "none" / "a")


def test_nested_blocks_say_the_innermost_file():
    with pytest.raises(OSError, match=r"^inner could not be written: Input/output error$"):  # noqa: SIM117
        with disk_errors("outer", 10), disk_errors("inner", 1):
            raise OSError(5, "Input/output error")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        torch.OutOfMemoryError("CUDA out of memory"),
        safetensors.SafetensorError("Error while deserializing header: InvalidHeader"),
        ValueError("a"),
        DamagedFile("a is damaged"),
        KeyboardInterrupt(),
    ],
)
def test_what_is_no_disks_passes_through(error):
    with pytest.raises(type(error)) as raised, disk_errors("x", 1):
        raise error
    assert raised.value is error


def test_space_is_that_of_the_nearest_folder(tmp_path, monkeypatch):
    asked = []
    usage = namedtuple("Usage", "total used free")(100, 40, 60)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: (asked.append(path), usage)[1])
    assert files.free_bytes(tmp_path / "not" / "there") == 60
    assert files.free_bytes(tmp_path) == 60 and asked == [tmp_path, tmp_path]
