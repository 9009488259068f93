"""Prompt files, and their order over shards and epochs."""

from __future__ import annotations

import pytest

from dpdmd.config import ConfigError
from dpdmd.run.prompts import FORMATS, PromptOrder, read_prompts

# Reading


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def refusal(path, field="prompt") -> str:
    with pytest.raises(ConfigError) as error:
        read_prompts(path, field)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "a ring\rtwo rings\r", ["a ring", "two rings"]),
        ("a.txt", "a ring\n\n  two rings \r\na ring", ["a ring", "two rings", "a ring"]),
        ("bom.txt", b"\xef\xbb\xbfa ring\n", ["a ring"]),
        ("CASE.TXT", "a ring", ["a ring"]),
        ("numbered.txt", "0 --- a ring\n12---two --- rings\n\n 3 --- \n", ["a ring", "two --- rings"]),
        ("partly.txt", "0 --- a ring\na cross", ["0 --- a ring", "a cross"]),  # one line without: it is text
        ("odd.txt", "line\u2028separator\x0cfeed\n日本", ["line\u2028separator\x0cfeed", "日本"]),
        ("a.jsonl", '{"prompt": "a ring", "n": 1}\n\n"a cross"\n{"prompt": " "}\n', ["a ring", "a cross"]),
        ("a.csv", 'id,prompt\r\n1,"a ring, red\nand ""big"""\r\n2,\r\n3,b\r\n', ['a ring, red\nand "big"', "b"]),
        ("rest.csv", "prompt,id\na,1,,\n\nb,2\n", ["a", "b"]),  # spreadsheets leave empty columns at the end
        ("bom.csv", b"\xef\xbb\xbfprompt\na ring\n", ["a ring"]),  # the mark must not become part of the column's name
    ],
)
def test_read_prompts(tmp_path, name, content, expected):
    assert read_prompts(write(tmp_path, name, content)) == expected


def test_read_prompts_from_another_field(tmp_path):
    assert read_prompts(write(tmp_path, "a.csv", "text,prompt\na,b\n"), "text") == ["a"]
    assert read_prompts(write(tmp_path, "a.jsonl", '{"text": "a", "prompt": "b"}'), "text") == ["a"]


def test_wrong_encoding_says_where(tmp_path):
    message = refusal(write(tmp_path, "a.txt", b"a ring\nf\xfcr\n"))  # latin-1
    assert "line 2, byte offset 8: byte 0xfc is not UTF-8" in message
    assert "line 1, byte offset 0" in refusal(write(tmp_path, "b.csv", "prompt\na".encode("utf-16")))
    assert "line 2, byte offset 10" in refusal(write(tmp_path, "c.jsonl", b'"a ring"\n"\xe3\x81"'))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "", "holds no prompt"),
        ("a.txt", " \n\n", "holds no prompt"),
        ("a.jsonl", "\n", "holds no prompt"),
        ("a.csv", "", "holds no prompt"),
        ("a.csv", "prompt\n", "holds no prompt"),
        ("a.parquet", "x", "'.parquet'; .txt, .jsonl, .csv can be read"),
        ("prompts", "x", "''; .txt"),
        ("a.jsonl", '"a"\n{"text": 1, "id": 2}', "line 2: no field 'prompt'; there are 'text', 'id'"),
        ("a.jsonl", '"a"\n{"prompt": 1}', "line 2: found int where a string is needed"),
        ("a.jsonl", '"a"\n\n[1]', "line 3: found list where a string is needed"),
        ("a.jsonl", '"a"\n{"prompt": "b"', "line 2: not JSON"),
        ("a.jsonl", '"\\ud83d"', "line 1: holds an unpaired surrogate"),
        ("a.jsonl", '"a"\n{"prompt": "a\\u0000b"}', "line 2: holds a NUL"),
        ("a.csv", "text,id\na,1\n", "no column 'prompt' (prompts.field); there are 'text', 'id'"),
        ("a.csv", "id,prompt\n1,a\n2\n", "line 3: too short"),
        ("a.csv", 'prompt\na\n"never closed\nb\n', "not CSV"),
        ("a.csv", "\nprompt\na\n", "line 1 is blank, where the names of the columns are needed"),
        ("a.csv", "\r\nprompt\r\na\r\n", "line 1 is blank"),
        (
            "a.csv",
            "prompt,id,prompt\na,1,b\n",
            "2 columns 'prompt' (prompts.field); there are 'prompt', 'id', 'prompt'",
        ),
        ("a.csv", "prompt\na ring, red\n", "line 2: 2 fields under 1 columns; text with a comma needs quotes"),
        ("a.csv", "prompt\n" + "x" * 200_000, "line 2: not CSV (field larger than field limit"),
        ("a.csv", ",".join(f"c{i}" for i in range(99)), "'c11' and 87 more"),
        ("a.jsonl", '{"prompt": "a", "prompt": "b"}', "line 1: not JSON (the key 'prompt' stands twice)"),
        ("a.jsonl", "[" * 100_000, "line 1: not JSON of prompts (it is nested too deep)"),
        ("a.jsonl", "9" * 5000, "line 1: not JSON (Exceeds the limit"),
        ("a.jsonl", "null", "line 1: found null where a string is needed"),
        ("a.jsonl", "true", "line 1: found bool where a string is needed"),
        ("a.jsonl", '{"prompt": NaN}', "line 1: found float where a string is needed"),
        ("a.txt", "a ring\nb".encode("utf-16-le"), "line 1 holds a NUL, as text in UTF-16 does; convert"),
        ("a.txt", "a\nb\0", "line 2 holds a NUL"),
        ("a.txt", "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n", "is a git-lfs pointer"),
    ],
)
def test_what_cannot_be_read(tmp_path, name, content, words):
    assert words in refusal(write(tmp_path, name, content))


def test_missing_file_and_folder(tmp_path):
    assert "No such file" in refusal(tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    assert "cannot be read (Is a directory)" in refusal(tmp_path / "folder.txt")
    assert "it is a folder; .txt, .jsonl, .csv can be read" in refusal(tmp_path)


def test_another_format_is_a_function_and_its_line_in_the_table(tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, ".tsv", lambda where, text, field: text.split("\t"))
    assert read_prompts(write(tmp_path, "prompts.tsv", "a red ring\t\t a blue square")) == [
        "a red ring",
        "a blue square",
    ]
    assert ".txt, .jsonl, .csv, .tsv can be read" in refusal(tmp_path)


# Order


@pytest.mark.parametrize(("num_prompts", "num_shards", "batch_size"), [(12, 2, 3), (7, 3, 2), (1, 2, 2), (5, 1, 8)])
def test_every_epoch_shows_every_prompt_once(num_prompts, num_shards, batch_size):
    order = PromptOrder(num_prompts, seed=3)
    stream = [
        index
        for iteration in range(5 * num_prompts)
        for shard in range(num_shards)
        for index in order.indices(iteration, shard, num_shards, batch_size)
    ]
    epochs = [stream[start : start + num_prompts] for start in range(0, len(stream), num_prompts)]
    assert all(sorted(epoch) == list(range(num_prompts)) for epoch in epochs if len(epoch) == num_prompts)
    if num_prompts >= 7:
        assert len({tuple(epoch) for epoch in epochs[:5]}) == 5
        assert list(range(num_prompts)) not in epochs[:5]


def test_a_batch_depends_on_its_place_alone():
    """Asked in any order, by any object: what makes a resumed run exact."""
    places = [(iteration, shard) for iteration in range(40) for shard in range(2)]
    once = {place: PromptOrder(9, seed=1).indices(*place, 2, 4) for place in places}
    order = PromptOrder(9, seed=1)
    assert all(order.indices(*place, 2, 4) == once[place] for place in reversed(places))
    assert any(PromptOrder(9, seed=2).indices(*place, 2, 4) != once[place] for place in places)


def test_the_order_is_that_of_every_version():
    """A literal, so that a change of library or code that would break resuming shows."""
    assert PromptOrder(8, seed=0).indices(0, 0, 1, 16) == [3, 2, 1, 6, 0, 7, 4, 5, 7, 4, 5, 1, 6, 2, 0, 3]


def test_the_split_into_shards_does_not_matter():
    order = PromptOrder(11, seed=0)
    for iteration in range(12):
        whole = order.indices(iteration, 0, 1, 4)
        assert order.indices(iteration, 0, 2, 2) + order.indices(iteration, 1, 2, 2) == whole
        assert [order.indices(iteration, shard, 4, 1)[0] for shard in range(4)] == whole


def test_shards_are_disjoint_within_an_epoch():
    order = PromptOrder(64, seed=0)
    shown = [{index for iteration in range(4) for index in order.indices(iteration, shard, 4, 4)} for shard in range(4)]
    assert sum(map(len, shown)) == 64 == len(set.union(*shown))


@pytest.mark.parametrize("arguments", [(-1, 0, 1, 1), (0, 1, 1, 1), (0, -1, 1, 1), (0, 0, 1, -1)])
def test_order_refuses_the_impossible(arguments):
    with pytest.raises(ValueError, match="shard"):
        PromptOrder(3, 0).indices(*arguments)
    with pytest.raises(ValueError, match="num_prompts = 0"):
        PromptOrder(0, 0)
