"""Rows from files: jsonl, tsv, csv, parquet, and Hugging Face data sets (a folder or a hub id).

In: a path and the field mapping of `config.Data`. Out: `Row`s of stripped text, and a description
of every row that was skipped. Text files may be gigabytes; they are read a line at a time.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from grpo_jax import config
from grpo_jax.structs import Row
from grpo_jax.text.strict import MAX_LINE, parse_json, plain, shown

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".tsv", ".csv")
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_SURROGATE = re.compile("[\ud800-\udfff]")

_TOO_LONG = f"a row of more than {MAX_LINE} characters"

# What a parquet file may unpack to. Text packs to a tenth of its size, hardly ever to a hundredth.
_PACKED = 100
_ROWS = 1 << 20  # and otherwise not more rows than the file has bytes: they would be alike
_BATCH = 32  # rows unpacked at a time, each of which may hold a text of the greatest size


class _Record(NamedTuple):
    """One row as found: its place ("FILE:LINE") and its fields, or what is wrong with it."""

    place: str
    fields: Mapping[str, Any]
    fault: str = ""


def read_rows(path: str, cfg: config.Data) -> tuple[list[Row], list[str]]:
    """Reads every row of a file, data set folder or hub data set.

    A data set's split is named behind a colon ("org/name:validation", "folder:test"; "train" if
    none is). A field name reaches into nested records with dots ("translation.om").

    Returns:
      The rows, and one "FILE:LINE: what is wrong" for each row skipped (`on_bad_row = "skip"`).
    Raises:
      FileNotFoundError: nothing there, by that name.
      ValueError: a malformed row (`on_bad_row = "error"`), an unknown format or a missing field.
    """
    rows: list[Row] = []
    skipped: list[str] = []
    for record in _records(path, cfg):
        row = record.fault or _row(record.fields, cfg)
        if isinstance(row, Row):
            rows.append(row)
        elif cfg.on_bad_row == "skip":
            skipped.append(f"{record.place}: {row}")
        else:
            raise ValueError(
                f"{record.place}: {row}. Mend the row, or set data.on_bad_row='skip' to leave such "
                "rows out; they are counted and listed."
            )
    return rows, skipped


def _row(fields: Mapping[str, Any], cfg: config.Data) -> Row | str:
    """The row, or what is wrong with it."""
    source = _text(fields, cfg.source_field)
    target = _text(fields, cfg.target_field, optional=cfg.target_optional)
    group = _text(fields, cfg.group_field, number=True) if cfg.group_field else source
    for text in (source, target, group):
        if isinstance(text, _Fault):
            return str(text)
    return Row(source, target, group)


class _Fault(str):
    """What is wrong with a field."""


def _text(
    fields: Mapping[str, Any], name: str, optional: bool = False, number: bool = False
) -> str | _Fault:
    """The stripped text of a field; '' for an optional one that is missing or empty."""
    value = _lookup(fields, name)
    if number and isinstance(value, int):
        value = str(value)
    if value is None and not optional:
        known = _names(map(shown, fields)) or "none"
        reason = "is null" if name in fields else f"is missing; the row has {known}"
        return _Fault(f"field {name!r} {reason}")
    if value is not None and not isinstance(value, str):
        return _Fault(f"field {name!r} is {type(value).__name__} {shown(value, 40)}, wanted text")
    text = (value or "").strip()
    if not text and not optional:
        return _Fault(f"field {name!r} is empty")
    if _SURROGATE.search(text):
        return _Fault(f"field {name!r} is not valid UTF-8: {shown(text, 40)}")
    return text


def _lookup(fields: Mapping[str, Any], name: str) -> Any:
    """`fields[name]`, else the nested field that a dotted name spells; None if there is neither."""
    if name in fields:
        return fields[name]
    head, dot, rest = name.partition(".")
    inner = fields.get(head)
    return _lookup(inner, rest) if dot and isinstance(inner, Mapping) else None


def _records(path: str, cfg: config.Data) -> Iterator[_Record]:
    file = Path(path).expanduser()
    if file.is_file():
        if file.suffix in (".jsonl", ".ndjson"):
            return _jsonl(file)
        if file.suffix == ".tsv":
            return _tsv(file, cfg)
        if file.suffix == ".csv":
            return _csv(file, cfg)
        if file.suffix == ".parquet":
            return _parquet(file, cfg)
        wanted = ", ".join((*TEXT_SUFFIXES, ".parquet"))
        raise ValueError(
            f"{path}: unknown data format {file.suffix!r}, wanted {wanted} or a folder of a "
            "Hugging Face data set"
        )
    if file.suffix in (*TEXT_SUFFIXES, ".parquet"):
        raise FileNotFoundError(f"data file {path} does not exist (looked in {Path.cwd()})")
    return _hugging_face(path, cfg)


def read_lines(file: Path) -> Iterator[tuple[str, str]]:
    """("FILE:LINE", line without its end) for each line of a text file that is not blank.

    Bytes that are not UTF-8 become lone surrogates, which `_text` reports with their field. Of a
    line of more than MAX_LINE characters the rest is dropped, and what is left is MAX_LINE + 1.

    Raises:
      FileNotFoundError, OSError: no such file, or it cannot be read.
    """
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as stream:
        number = 0
        while line := stream.readline(MAX_LINE + 1):
            number += 1
            rest = line
            while len(rest) > MAX_LINE and not rest.endswith("\n"):
                rest = stream.readline(MAX_LINE + 1)
            if line.strip():
                yield f"{file}:{number}", line.rstrip("\r\n")


def _jsonl(file: Path) -> Iterator[_Record]:
    for place, line in read_lines(file):
        if len(line) > MAX_LINE:
            yield _Record(place, {}, _TOO_LONG)
            continue
        try:
            fields = parse_json(line, lenient=True)
        except ValueError as error:
            yield _Record(place, {}, f"not JSON: {error}")
            continue
        if isinstance(fields, dict):
            yield _Record(place, fields)
        else:
            yield _Record(place, {}, f"a JSON {type(fields).__name__}, wanted an object")


def _tsv(file: Path, cfg: config.Data) -> Iterator[_Record]:
    """Tabs separate, lines end, and a quotation mark is a character like any other."""
    header: list[str] = []
    for place, line in read_lines(file):
        cells = line.split("\t") if len(line) <= MAX_LINE else []
        if not cells:
            yield _Record(place, {}, _TOO_LONG)
        elif header:
            yield _cells(place, header, cells)
        else:
            header = cells
            _columns(str(file), header, cfg)


def _csv(file: Path, cfg: config.Data) -> Iterator[_Record]:
    """RFC 4180: quoted fields may hold commas, doubled quotes and line ends."""
    csv.field_size_limit(MAX_LINE)  # else 131072 characters
    header: list[str] = []
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        while True:
            place = f"{file}:{reader.line_num + 1}"  # where the row starts
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield _Record(place, {}, f"not CSV: {error}")
                continue
            if header and cells:
                yield _cells(place, header, cells)
            elif cells:
                header = cells
                _columns(str(file), header, cfg)


def _cells(place: str, header: list[str], cells: list[str]) -> _Record:
    if len(cells) == len(header):
        return _Record(place, dict(zip(header, cells, strict=True)))
    last = header[min(len(cells), len(header)) - 1]
    return _Record(
        place, {}, f"{len(cells)} fields, the header has {len(header)}; look at field {shown(last)}"
    )


def _parquet(file: Path, cfg: config.Data) -> Iterator[_Record]:
    """Unpacked a few rows at a time, and not further than an honest file of this size would go."""
    import pyarrow.parquet

    size = file.stat().st_size
    most = max(MAX_LINE, _PACKED * size)
    with _readable(file):
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
    columns = _columns(str(file), names, cfg)
    number = unpacked = 0
    with _readable(file):
        _check_claims(table, columns, size, most)
        for batch in table.iter_batches(_BATCH, columns=columns):
            cells = list(zip(batch.schema.names, batch.columns, strict=True))
            for i in range(batch.num_rows):
                number += 1
                fields = {name: column[i].as_py() for name, column in cells}
                length = _characters(fields)
                unpacked += length
                if unpacked > most:
                    raise ValueError(f"more than {most} characters in {size} bytes")
                fault = _TOO_LONG if length > MAX_LINE else ""
                yield _Record(f"{file}:{number}", fields, fault)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(
            f"{file}: not a readable parquet file ({shown(str(error))}); fetch it again"
        ) from error


def _check_claims(table: Any, columns: list[str], size: int, most: int) -> None:
    """Raises ValueError where the footer promises more than a file of `size` bytes may hold.

    What it says of single columns stays unread: pyarrow ends the process over damage there.
    """
    groups = map(table.metadata.row_group, range(table.metadata.num_row_groups))
    largest = max((group.total_byte_size for group in groups), default=0)
    rows = table.metadata.num_rows
    if rows > max(_ROWS, size) or largest > most:
        raise ValueError(f"it claims {rows} rows, {largest} bytes; the file has {size} bytes")
    for field in table.schema_arrow:
        if field.name in columns and _has_lists(field.type):  # one row may hold millions of values
            raise ValueError(f"column {shown(field.name)} holds lists, wanted text")


def _has_lists(kind: Any) -> bool:
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return any(_has_lists(kind.field(i).type) for i in range(kind.num_fields))
    return bool(pyarrow.types.is_nested(kind))


def _characters(value: Any) -> int:
    """Of all texts in a value."""
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    if isinstance(value, list):
        return sum(map(_characters, value))
    return len(value) if isinstance(value, str | bytes) else 0


def _hugging_face(path: str, cfg: config.Data) -> Iterator[_Record]:
    """A `save_to_disk` folder, a folder of data files, or a hub id."""
    import datasets

    name, split = path, "train"
    if not Path(path).expanduser().exists() and ":" in path:
        name, split = path.rsplit(":", 1)
    folder = Path(name).expanduser()
    if not folder.is_dir() and not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"data folder {name} does not exist (looked in {Path.cwd()})")
    try:
        if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(str(folder))
        else:
            loaded = datasets.load_dataset(
                str(folder) if folder.is_dir() else name, cfg.hub_config or None
            )
    except Exception as error:  # the library raises its own, requests', and the hub's errors
        where = "the folder" if folder.is_dir() else "no such file or folder here; as a hub id it"
        raise FileNotFoundError(
            f"data set {path!r}: {where} could not be loaded: {type(error).__name__}: {error}. "
            f"Wanted {', '.join((*TEXT_SUFFIXES, '.parquet'))}, a folder or a hub id."
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise ValueError(
                f"data set {name!r} has no split {split!r}; it has {_names(loaded)}. Name one "
                f"behind a colon: {name}:{next(iter(loaded))}"
            )
        loaded = loaded[split]
    data = loaded.select_columns(_columns(name, loaded.column_names, cfg))
    for number, fields in enumerate(data, 1):
        yield _Record(f"{name}:{split}:{number}", fields)


def _columns(place: str, names: list[str], cfg: config.Data) -> list[str]:
    """The columns that the field mapping needs; an error if the data has no such column."""
    columns: dict[str, None] = {}
    for field in (cfg.source_field, cfg.target_field, cfg.group_field):
        column = field if field in names else field.partition(".")[0]
        if column in names:
            columns[column] = None
        elif field and not (field == cfg.target_field and cfg.target_optional):
            raise ValueError(
                f"{place}: no field {field!r}; it has {_names(names)}. Set data.source_field, "
                "data.target_field and data.group_field to what the data calls them."
            )
    return list(columns)


def _names(names: Iterable[str]) -> str:
    """The first of the names, for a message."""
    listed = [plain(name) for name in names]
    return ", ".join(listed[:20]) + (f" and {len(listed) - 20} more" if len(listed) > 20 else "")
