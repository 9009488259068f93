"""The schema of a checkpoint's index.json."""

from __future__ import annotations

from typing import Annotated, Any, Generic, TypeVar

import pydantic
from pydantic import Field, PlainValidator

from dpdmd.config import TRAINED
from dpdmd.engine.shards import Layout


def problem_of_index(index: dict[str, Any]) -> str | None:
    """What is wrong with an index, or None."""
    try:
        _Index.model_validate(index)
    except pydantic.ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"]))
        return f"{where}: {problem['msg']}" if where else problem["msg"].removeprefix("Value error, ")
    return None


_Count = Annotated[int, Field(ge=0, lt=2**53)]
_Number = Annotated[int, Field(ge=1, lt=2**31)]
_Value = TypeVar("_Value")


class _Strict(pydantic.BaseModel, strict=True):
    pass


def _parameter(value: Any) -> Any:
    if not isinstance(value, list) or list(map(type, value)) != [str, int] or value[1] < 0:
        raise ValueError("a name and a number of elements are needed")
    return value


_Parameter = Annotated[Any, PlainValidator(_parameter)]


class _File(_Strict):
    path: str
    bytes: _Count
    sha256: str


class _Roles(_Strict, Generic[_Value]):
    student: _Value
    critic: _Value


class _State(_Strict):
    """The result of `Trainer.state`."""

    updates: _Roles[_Count]
    skipped: _Roles[list[_Count]]
    skipped_in_a_row: _Roles[_Count]
    attention_times: dict[str, Any] | None = None
    prompts: str | None = None
    text: str | None = None


class _Index(_Strict):
    iteration: _Count
    processes: _Number
    global_batch: _Number
    identity: dict[str, Any]
    parameters: _Roles[list[list[_Parameter]]]
    state: _State
    config: Annotated[dict[str, Any], Field(min_length=1)]
    files: list[_File]

    @pydantic.model_validator(mode="after")
    def _complete(self) -> _Index:
        """There is one file for each role, process and group of parameters, and no other."""
        named = {file.path for file in self.files}
        groups = {role: getattr(self.parameters, role) for role in TRAINED}
        if self.processes * sum(map(len, groups.values())) == len(named) == len(self.files):
            layouts = {role: Layout.from_json(self.processes, groups[role]) for role in TRAINED}
            if named == {
                f"{role}/{layout.name(rank, group)}"
                for role, layout in layouts.items()
                for rank in range(self.processes)
                for group in range(len(layout.groups))
            }:
                return self
        raise ValueError("its files do not match its processes and parameters")
