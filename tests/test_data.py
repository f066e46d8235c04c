"""Reading, splitting and tokenizing rows."""

from __future__ import annotations

import csv
import json
import random

import pytest

from grpo_jax import config
from grpo_jax.data import corpus, sources, splits
from grpo_jax.structs import Row

# Text that formats like to trip over: quotes, separators, a line separator, scripts, an emoji.
PAIRS = [
    ('Fayyadamaan "Haa ta\'u" tuqa', 'The user, who clicks "OK", goes on'),
    ("བོད་སྐད།", "Tibetan\u2028language"),
    ("Saaphana", '"'),
    ("中文", "Chinese 😀"),
]


class ByteTokenizer:
    """One token a byte; a chat prompt is wrapped in two markers."""

    vocab_size, eos_id, eos_ids = 259, 256, (256,)

    def encode(self, text):
        return list(text.encode())

    def encode_prompt(self, text, system="", chat=True):
        ids = self.encode(system + text)
        return [257, *ids, 258] if chat else ids

    def decode(self, ids):
        return [bytes(i for i in row if i < 256).decode(errors="replace").strip() for row in ids]


def records(n_pages=4):
    return [
        {"source": source, "target": target, "page": f"page{i % n_pages}"}
        for i, (source, target) in enumerate(PAIRS)
    ]


def numbered(n, per_page=4):
    return [
        {"source": f"jecha {i}", "target": f"sentence {i}", "page": f"page {i // per_page}"}
        for i in range(n)
    ]


def rows_of(items):
    return [Row(r["source"], r["target"], r["page"]) for r in items]


def write(path, items):
    """Writes records in the format that the suffix names."""
    if path.suffix == ".jsonl":
        lines = [json.dumps(r, ensure_ascii=False) for r in items]
        path.write_text("\n".join(lines) + "\n", "utf-8", newline="")
    elif path.suffix == ".tsv":
        lines = ["\t".join(items[0]), *("\t".join(r.values()) for r in items)]
        path.write_text("\r\n".join(lines), "utf-8-sig", newline="")
    elif path.suffix == ".csv":
        with open(path, "w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, items[0])
            writer.writeheader()
            writer.writerows(items)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(items), path)
    return str(path)


def data(**fields):
    return config.Data(**{"group_field": "page", "chat": False, **fields})


# ---- sources


@pytest.mark.parametrize("suffix", [".jsonl", ".tsv", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    rows, skipped = sources.read_rows(write(tmp_path / f"x{suffix}", records()), data())
    assert rows == rows_of(records()) and skipped == []


def test_csv_field_may_hold_line_ends(tmp_path):
    items = [{"source": "a\nb", "target": "c\r\nd", "page": "p"}, *records()[:1]]
    path = write(tmp_path / "x.csv", items)
    assert sources.read_rows(path, data())[0] == rows_of(items)
    with open(path, "a", encoding="utf-8") as stream:
        stream.write("only a source\n")
    with pytest.raises(ValueError, match=r"x\.csv:6: 1 fields, the header has 3"):
        sources.read_rows(path, data())


def test_hugging_face_folders(tmp_path):
    import datasets

    one = datasets.Dataset.from_list(records())
    one.save_to_disk(tmp_path / "one")
    both = datasets.DatasetDict(train=one, validation=one.select([1]))
    both.save_to_disk(tmp_path / "both")
    assert sources.read_rows(str(tmp_path / "one"), data())[0] == rows_of(records())
    assert sources.read_rows(str(tmp_path / "both"), data())[0] == rows_of(records())
    validation, _ = sources.read_rows(f"{tmp_path / 'both'}:validation", data())
    assert validation == rows_of(records())[1:2]
    with pytest.raises(ValueError, match="no split 'tset'; it has train, validation"):
        sources.read_rows(f"{tmp_path / 'both'}:tset", data())


def test_hugging_face_folder_of_files(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "train.jsonl", records())
    assert sources.read_rows(str(tmp_path / "files"), data())[0] == rows_of(records())


def test_nested_fields_and_numeric_groups(tmp_path):
    items = [{"translation": {"om": s, "en": t}, "page": i} for i, (s, t) in enumerate(PAIRS)]
    cfg = data(source_field="translation.om", target_field="translation.en")
    wanted = [Row(s, t, str(i)) for i, (s, t) in enumerate(PAIRS)]
    for suffix in (".jsonl", ".parquet"):
        assert sources.read_rows(write(tmp_path / f"x{suffix}", items), cfg)[0] == wanted


def test_without_a_group_field_equal_sources_stay_together(tmp_path):
    rows, _ = sources.read_rows(write(tmp_path / "x.jsonl", records()), data(group_field=""))
    assert [row.group for row in rows] == [row.source for row in rows]


BAD = {
    "{not json": "not JSON: Expecting property name",
    "[1, 2]": "a JSON list, wanted an object",
    '{"target": "t", "page": "p"}': "field 'source' is missing; the row has 'target', 'page'",
    '{"source": " ", "target": "t", "page": "p"}': "field 'source' is empty",
    '{"source": "s", "target": null, "page": "p"}': "field 'target' is null",
    '{"source": "s", "target": 3, "page": "p"}': "field 'target' is int 3, wanted text",
    '{"source": "s", "target": "t"}': "field 'page' is missing",
    '{"source": "s", "target": "\\ud800", "page": "p"}': "field 'target' is not valid UTF-8",
}


@pytest.mark.parametrize("line", BAD)
def test_a_malformed_row_names_file_line_and_field(tmp_path, line):
    path = tmp_path / "x.jsonl"
    good = json.dumps(records()[0])
    path.write_text(f"{good}\n\n{line}\n{good}\n", "utf-8")
    with pytest.raises(ValueError) as error:
        sources.read_rows(str(path), data())
    assert f"{path}:3: {BAD[line]}" in str(error.value)
    assert "data.on_bad_row='skip'" in str(error.value)
    rows, skipped = sources.read_rows(str(path), data(on_bad_row="skip"))
    assert len(rows) == 2 and len(skipped) == 1
    assert skipped[0].startswith(f"{path}:3: {BAD[line]}")


def test_bytes_that_are_not_utf8_spoil_one_row_only(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_bytes(b"source\ttarget\tpage\nna\xefve\tt\tp\ns\tt\tp\n")
    with pytest.raises(ValueError, match=r"x\.tsv:2: field 'source' is not valid UTF-8"):
        sources.read_rows(str(path), data())
    assert sources.read_rows(str(path), data(on_bad_row="skip"))[0] == [Row("s", "t", "p")]


def test_an_unclosed_quote_is_reported_where_it_opens(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('source,target,page\ns,t,p\n"open,t,p\ns,t,p\n', "utf-8")
    with pytest.raises(ValueError, match=r"x\.csv:3: not CSV"):
        sources.read_rows(str(path), data())


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".parquet"])
def test_a_wrong_field_mapping_is_an_error_even_when_skipping(tmp_path, suffix):
    path = write(tmp_path / f"x{suffix}", records())
    with pytest.raises(ValueError, match="no field 'om'; it has source, target, page"):
        sources.read_rows(path, data(source_field="om", on_bad_row="skip"))


def test_optional_targets(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"source": "s", "page": "p"}, *records()])
    rows, _ = sources.read_rows(path, data(target_optional=True))
    assert rows[0] == Row("s", "", "p") and len(rows) == 5


def test_missing_and_unknown_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothere\.jsonl does not exist"):
        sources.read_rows(str(tmp_path / "nothere.jsonl"), data())
    with pytest.raises(FileNotFoundError, match="does not exist"):
        sources.read_rows(str(tmp_path / "no" / "folder"), data())
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(ValueError, match=r"unknown data format '\.txt', wanted \.jsonl"):
        sources.read_rows(str(tmp_path / "x.txt"), data())
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="not a readable parquet file"):
        sources.read_rows(str(tmp_path / "x.parquet"), data())


# ---- splits


def test_groups_never_straddle_and_nothing_is_lost():
    rows = rows_of(numbered(400))
    split = splits.split_rows(rows, data(dev_fraction=0.2, test_fraction=0.3))
    pages = [{row.group for row in part} for part in (split.train, split.dev, split.test)]
    assert sum(map(len, pages)) == len(set.union(*pages)) == 100
    assert sorted(split.train + split.dev + split.test) == sorted(rows)
    assert 10 <= len(pages[1]) <= 30 and 18 <= len(pages[2]) <= 42


def test_the_split_is_stable():
    cfg = data(dev_fraction=0.2, test_fraction=0.2)
    rows = rows_of(numbered(200))
    before = splits.split_rows(rows, cfg)
    more = rows_of(numbered(300))
    random.Random(1).shuffle(more)
    after = splits.split_rows(more, cfg)
    assert set(before.test) <= set(after.test) and set(before.dev) <= set(after.dev)
    other = splits.split_rows(rows, data(dev_fraction=0.2, test_fraction=0.2, seed=1))
    assert set(other.test) != set(before.test)
    # Golden: machines and releases must agree for ever, or a resumed run would train on its test.
    assert splits.uniform("page 7", 0) == pytest.approx(0.5896905374, abs=1e-9)


def test_duplicates_and_leaks_are_dropped_from_the_training_side_and_counted():
    train = [
        Row("saaphana", "Tool", "a"),
        Row("SAAPHANA ", "tool", "b"),  # a duplicate
        Row("barruu", "Text", "a"),  # its target is in test
        Row("Fuula", "Sheet", "a"),  # its source is in dev
        Row("gabatee", "Table", "t"),  # its page is in test
    ]
    dev = [Row("fuula", "page", "d"), Row("maqaa", "NAME", "d")]
    test = [Row("fuula barruu", "text", "t"), Row("Maqaa", "name of it", "t")]
    split = splits.split_rows(train, data(), dev, test)
    assert split.train == train[:1] and split.dev == dev[:1] and split.test == test
    assert split.report == {
        "duplicates": 1,
        "train_leaks": 3,
        "dev_leaks": 1,
        "train_rows": 1,
        "dev_rows": 1,
        "test_rows": 2,
    }


def test_missing_targets_are_no_leak():
    split = splits.split_rows([Row("a", "", "1")], data(), [Row("b", "", "2")], [Row("c", "", "3")])
    assert len(split.train) == 1 and split.report["train_leaks"] == 0


# ---- corpus


def load(tmp_path, items, **fields):
    path = write(tmp_path / "rows.jsonl", items)
    defaults = {"dev_fraction": 0.2, "test_fraction": 0.2, "train": path}
    return corpus.load_corpus(data(**{**defaults, **fields}), ByteTokenizer())


def test_corpus_tokenizes_prompt_and_target(tmp_path):
    loaded = load(tmp_path, numbered(80), prompt="{source} = {curly} ", chat=True, system="S:")
    for example in loaded.train + loaded.dev + loaded.test:
        text = f"S:{example.row.source} = {{curly}} "
        assert example.prompt_ids == [257, *text.encode(), 258]
        assert example.completion_ids == [*example.row.target.encode(), 256]
    assert loaded.cold_start == loaded.train
    assert loaded.report["rows"] == 80 and loaded.report["train_examples"] == len(loaded.train)
    assert json.loads(json.dumps(loaded.report)) == loaded.report


def test_cold_start_and_max_rows(tmp_path):
    all_rows = load(tmp_path, numbered(80)).train
    loaded = load(tmp_path, numbered(80), max_rows=30, cold_start_rows=10)
    assert loaded.cold_start == all_rows[:10] and loaded.train == all_rows[10:30]
    with pytest.raises(ValueError, match="cold_start_rows=30 leaves no training rows for GRPO"):
        load(tmp_path, numbered(80), max_rows=30, cold_start_rows=30)


def test_cold_start_takes_only_rows_with_targets(tmp_path):
    items = [{**r, "target": r["target"] if i % 2 else ""} for i, r in enumerate(numbered(80))]
    loaded = load(tmp_path, items, target_optional=True)
    assert all(example.completion_ids for example in loaded.cold_start)
    assert any(not example.completion_ids for example in loaded.train)
    split = load(tmp_path, items, target_optional=True, cold_start_rows=8)
    assert split.cold_start == loaded.cold_start[:8]
    assert len(split.train) == len(loaded.train) - 8


def test_length_limits_drop_and_count(tmp_path):
    items = numbered(80)
    items[0]["source"] += " long" * 40
    for item in items[1::2]:
        item["target"] += "!" * 40
    free = load(tmp_path, items, max_prompt_length=999, max_completion_length=999)
    loaded = load(tmp_path, items, max_prompt_length=100, max_completion_length=20)
    examples = loaded.train + loaded.dev + loaded.test
    assert loaded.report["long_prompts"] == 1
    assert loaded.report["long_completions"] == sum(len(e.completion_ids) > 20 for e in free.train)
    assert loaded.report["long_completions"] > 0
    assert max(len(e.prompt_ids) for e in examples) <= 100
    assert max(len(e.completion_ids) for e in loaded.train) <= 20
    assert len(examples) == 79 - loaded.report["long_completions"]


def test_files_of_their_own(tmp_path):
    dev = write(tmp_path / "dev.tsv", [{"source": "d", "target": "dev", "page": "x"}])
    loaded = load(tmp_path, numbered(80), dev=dev, dev_fraction=0.0)
    assert [e.row.target for e in loaded.dev] == ["dev"]
    assert len(loaded.train) + len(loaded.test) == 80


def test_paths_are_resolved(tmp_path):
    path = write(tmp_path / "rows.jsonl", numbered(80))
    cfg = data(train="asset:rows", dev_fraction=0.2, test_fraction=0.2)
    asked = []
    corpus.load_corpus(cfg, ByteTokenizer(), lambda name: asked.append(name) or path)
    assert asked == ["asset:rows"]


def test_empty_data_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"rows\.jsonl' has no usable rows \(0 were malformed"):
        load(tmp_path, [])
    with pytest.raises(ValueError, match="the dev split is empty: 80 rows.*data.dev_fraction"):
        load(tmp_path, numbered(80), dev_fraction=0.0)
    with pytest.raises(ValueError, match="longer than data.max_prompt_length=3"):
        load(tmp_path, numbered(80), max_prompt_length=3)
    with pytest.raises(ValueError, match="data.train is empty: name a file"):
        load(tmp_path, numbered(80), train="")
    with pytest.raises(ValueError, match="has no {source}"):
        load(tmp_path, numbered(80), prompt="Translate")
