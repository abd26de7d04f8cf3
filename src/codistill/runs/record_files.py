"""Reads the JSON files of runs and grids, and checks each once against the type of its record.

A file has the number of its schema under `schema`, now 1. One without it was written before there were numbers, or is a
line of metrics.jsonl. A newer schema is refused, because its figures may mean something else.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec

from codistill.runs.records import DataInfo, Details, EpochLine, Figures, GridInfo, Measured, RunResult, StudentMetadata
from codistill.utils import InputError, read_file, read_json, write_json

SCHEMA = 1
Record = TypeVar("Record")


def read_record(path: Path, kind: type[Record]) -> Record | None:
    """Return the record in a JSON file, None if there is no file; null is read as NaN where it stands for a figure.

    Args:
        path: The file.
        kind: Its type, one of `codistill.runs.records`.

    Raises:
        InputError: the file is no such record, is damaged, or was written by a newer codistill.
    """
    values = read_json(path)
    if values is None:
        return None
    try:
        return check_record(values, kind)
    except NewerSchemaError as error:
        raise InputError(f"{path} {error}") from None
    except ValueError as error:
        raise InputError(f"{path} is damaged or another program's ({error}); restore it, or leave it out") from None


def write_record(path: Path, values: Mapping[str, Any]) -> None:
    """Write a record atomically, with the number of its schema."""
    write_json(path, {"schema": SCHEMA, **values})


class NewerSchemaError(ValueError):
    """A record was written by a newer codistill."""


def check_record(values: Mapping[str, Any], kind: type[Record]) -> Record:
    """Return plain values as the record they should be; keys that it does not know are left out.

    Raises:
        ValueError: they are no such record; the message is a clause without a full stop.
    """
    schema = values.get("schema", SCHEMA)
    if type(schema) is not int or schema < 1:
        raise ValueError("its schema is no number")
    if schema > SCHEMA:
        raise NewerSchemaError(f"was written by a newer codistill (schema {schema}); upgrade codistill")
    record = convert({key: value for key, value in values.items() if key != "schema"}, kind)
    if kind in _CHECKS:
        _CHECKS[kind](record)
    return record


def convert(values: Any, kind: type[Record]) -> Record:
    """Return plain values as `kind`.

    Raises:
        ValueError: they do not fit it.
    """
    try:
        return msgspec.convert(values, kind, dec_hook=_convert_custom)
    # OverflowError: an integer that no float can hold; AttributeError: a tensor in the place of a dictionary.
    except (msgspec.ValidationError, OverflowError, AttributeError, TypeError) as error:
        raise ValueError(str(error).replace("Object missing required field", "missing key")) from None


def _convert_custom(kind: type, value: Any) -> Any:
    """Convert to the types that msgspec does not know: a measured figure, and a tensor."""
    if kind is Measured:
        if value is None:
            return math.nan
        if type(value) in (int, float):
            return float(value)
    elif isinstance(value, kind):
        return value
    raise ValueError(f"Expected a {'number' if kind is Measured else kind.__name__}, got `{type(value).__name__}`")


def read_epoch_lines(path: Path) -> list[EpochLine]:
    """Read metrics.jsonl (see `read_epoch_texts`)."""
    return [line for _, line in read_epoch_texts(path)]


def read_epoch_texts(path: Path) -> list[tuple[str, EpochLine]]:
    """Read metrics.jsonl, each line as its text and its record; blank and damaged lines are left out.

    A last line that a killed process left unfinished is left out silently, any other damaged line with a warning.

    Raises:
        InputError: the file cannot be read, or was written by a newer codistill.
    """
    lines: list[tuple[str, EpochLine]] = []
    texts = (read_file(path) or b"").split(b"\n")
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            decoded = text.decode("utf-8-sig")
            values = json.loads(decoded)
            if not isinstance(values, dict):
                raise ValueError("it is no JSON object")
            lines.append((decoded.strip(), check_record(values, EpochLine)))
        except NewerSchemaError as error:
            raise InputError(f"{path} {error}") from None
        except (ValueError, RecursionError) as error:
            if number < len(texts):
                warnings.warn(f"{path}: line {number} is damaged and left out ({error})", stacklevel=2)
    return lines


# -- what the types do not say -----------------------------------------------------------------------------------------


def _check_figures(figures: Figures | None) -> None:
    if (
        figures is not None
        and len({len(figures[name]) for name in ("top1", "nll", "ece", "top5") if name in figures}) > 1
    ):
        raise ValueError("its lists of figures have different lengths")


def _check_result(result: RunResult) -> None:
    _check_figures(result["test"])
    _check_figures(result.get("test_ema"))
    _check_figures(result.get("test_swa"))


def _check_line(line: EpochLine) -> None:
    for part in ("val", "test"):
        _check_figures(cast(Figures | None, line.get(part)))
        for average in ("ema", "swa"):
            _check_figures(cast(Figures | None, line.get(f"{part}_{average}")))
        if part in line and f"{part}_student" not in line:
            raise ValueError(f"missing key `{part}_student`")
    for name, values in [*line.get("method", {}).items()]:
        if not values:
            continue
        rows = [row if isinstance(row, list) else [row] for row in values]
        if len({(len(row), isinstance(value, list)) for row, value in zip(rows, values)}) > 1 or not all(
            value is None or type(value) in (int, float) for row in rows for value in row
        ):
            raise ValueError(f"`{name}` is no list or table of numbers")
        line.get("method", {})[name] = [
            [_number(value) for value in row] if isinstance(values[0], list) else _number(row[0]) for row in rows
        ]


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _check_details(details: Details) -> None:
    confusion, classes = details.get("confusion"), details.get("classes", [])
    if confusion is not None and {len(classes)} != {len(confusion), *map(len, confusion)}:
        raise ValueError("its confusion matrix does not have a row and a column per class")


def _check_data_info(info: DataInfo) -> None:
    if not len(info["mean"]) == len(info["std"]) == info["channels"]:
        raise ValueError("its mean and std do not have one entry per channel")
    if not all(map(math.isfinite, (*info["mean"], *info["std"]))) or min(info["std"]) <= 0:
        raise ValueError("its mean or std is no statistic of images")
    for name in ("temperature", "temperature_best"):
        value = float(cast(Any, info).get(name, 1.0))
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"its {name} is not above 0")


def _check_metadata(metadata: StudentMetadata) -> None:
    if len(metadata.get("mean", [])) != len(metadata.get("std", [])) or not all(metadata.get("std", [])):
        raise ValueError("its mean and std are no statistics of images")


def _check_grid(info: GridInfo) -> None:
    needed = ("title", "seeds", "cells") if info["kind"] == "compare" else ("table", "options")
    for key in needed:
        if key not in info:
            raise ValueError(f"missing key `{key}`")


_CHECKS: dict[Any, Callable[[Any], None]] = {
    RunResult: _check_result,
    EpochLine: _check_line,
    Details: _check_details,
    DataInfo: _check_data_info,
    GridInfo: _check_grid,
    StudentMetadata: _check_metadata,
}
