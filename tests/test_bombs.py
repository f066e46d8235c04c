"""Small parquet files that unpack to gigabytes: one clear error, in little time and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grpo_jax import config
from grpo_jax.data.sources import read_rows
from grpo_jax.text.strict import MAX_LINE
from tests.faults.fuzz import limits


def repeated(text: str, rows: int) -> pa.Array:
    """The same text in every row: stored once, and a run of its number."""
    return pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), pa.array([text]))


def nested(depth: int) -> bytes:
    """A file of no rows, whose schema has `depth` groups in one another; Thrift, compact."""

    def number(value: int) -> bytes:
        low, high = value & 127, value >> 7
        return bytes([low | 128]) + number(high) if high else bytes([low])

    # A schema element: repetition "optional" (3: i32), a name (4: text), one child (5: i32). Twice
    # the value is Thrift's "zigzag".
    group = b"\x35\x02\x18\x01g\x15\x02\x00"
    leaf = b"\x15\x0c\x25\x02\x18\x01x\x00"  # type "byte array" (1: i32)
    schema = b"\x19\xfc" + number(depth + 2) + group * (depth + 1) + leaf
    footer = b"\x15\x02" + schema + b"\x16\x00\x19\x0c\x00"  # version, schema, 0 rows, no row group
    return b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def bomb(kind: str, file: Path) -> str:
    """Writes a file of less than 2 MiB; what is wrong with it."""
    tables: dict[str, tuple[dict[str, Any], str]] = {
        "text": ({"source": ["a" * (MAX_LINE + 1)]}, "it claims 1 rows, 16777"),
        "texts": ({"source": repeated("a" * 10**6, 10**6)}, "more than 1677721[67] characters in"),
        "rows": ({"source": repeated("a", 2**21)}, "it claims 2097152 rows"),
        "list": (
            {"source": [{"x": "a"}], "target": [{"y": np.zeros(9_000_000, np.int8)}]},
            "column 'target' holds lists, wanted text",
        ),
    }
    if kind == "schema":
        file.write_bytes(nested(200_000))
        return "too deeply nested"
    columns, wrong = tables[kind]
    columns.setdefault("target", pa.nulls(len(columns["source"]), pa.string()))
    pq.write_table(pa.table(columns), file, compression="zstd", store_schema=False)
    return wrong


@pytest.mark.parametrize("kind", ["text", "texts", "rows", "list", "schema"])
def test_a_parquet_bomb_is_refused(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    wrong = bomb(kind, file)
    assert file.stat().st_size < 2 << 20
    with (
        limits(1 << 28),
        pytest.raises(ValueError, match=rf"rows\.parquet: not a readable parquet file .*{wrong}"),
    ):
        read_rows(str(file), config.Data(target_optional=True))


def test_what_packs_well_is_no_bomb(tmp_path: Path) -> None:
    rows, long = 5000, "བོད་ཡིག་" * 100
    table = pa.table({"source": [f"{long} {i}" for i in range(rows)], "target": [long] * rows})
    pq.write_table(table, tmp_path / "rows.parquet", compression="zstd")
    found, skipped = read_rows(str(tmp_path / "rows.parquet"), config.Data())
    assert len(found) == rows and not skipped
    assert found[-1].source.endswith(" 4999")
