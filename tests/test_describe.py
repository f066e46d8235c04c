"""The description of a model: its numbers by hand, and the verdicts that they lead to."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import pytest

from grpo_jax.assets import synthetic, tiny
from grpo_jax.hub import __main__ as command
from grpo_jax.hub.describe import describe
from grpo_jax.hub.separation import separation, thin, unit

SYLLABLES = "\u0f56\u0f7c\u0f51\u0f0b\u0f61\u0f72\u0f42\u0f0b"
TIBETAN = [SYLLABLES + "\u0f40" * n for n in range(1, 25)]
PAIRS = [(row["source"], row["target"]) for row in synthetic.pairs()[:40]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo's tiny decoder over bytes and encoder over the synthetic target language's words."""
    root = tmp_path_factory.mktemp("models")
    for name, write in {"decoder": tiny.write_decoder, "encoder": tiny.write_encoder}.items():
        (root / name).mkdir()
        write(root / name)
    return {name: root / name for name in ("decoder", "encoder")}


def test_auc_and_p_at_1_are_what_counting_gives() -> None:
    rng = np.random.default_rng(0)
    left = unit(rng.normal(size=(12, 5)))
    right = unit(left + 0.8 * rng.normal(size=(12, 5)))
    right[3], left[3] = right[4], left[4]  # ties
    found = separation(left, right)
    cosines = np.round(left @ right.T, 7)
    own = [cosines[i, i] for i in range(12)]
    others = [cosines[i, j] for i in range(12) for j in range(12) if i != j]
    wins = [(a > b) + 0.5 * (a == b) for a in own for b in others]
    assert found.auc == pytest.approx(np.mean(wins), abs=1e-12)
    first = [all(cosines[i, i] > cosines[i, j] for j in range(12) if j != i) for i in range(12)]
    back = [all(cosines[i, i] > cosines[j, i] for j in range(12) if j != i) for i in range(12)]
    assert (found.forward, found.backward) == (np.mean(first), np.mean(back)) and not first[3]
    assert found.matched == pytest.approx(np.mean(own))
    assert found.mismatched == pytest.approx(np.mean(others))
    assert 0.5 < found.auc_interval[0] < found.auc < found.auc_interval[1] < 1
    assert found.forward_interval[0] <= found.forward <= found.forward_interval[1]


def test_intervals_hold_the_truth_about_noise_and_about_blindness() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(20):
        found = separation(unit(rng.normal(size=(40, 8))), unit(rng.normal(size=(40, 8))))
        covered += found.auc_interval[0] <= 0.5 <= found.auc_interval[1]
    assert covered >= 16  # of 20, at 95%
    same = separation(np.ones((6, 1)), np.ones((6, 1)))
    assert (same.auc, same.auc_interval, same.forward) == (0.5, (0.5, 0.5), 0.0)
    with pytest.raises(ValueError, match="wanted equal"):
        separation(np.ones((6, 1)), np.ones((5, 1)))
    with pytest.raises(ValueError, match="not finite"):
        separation(np.full((6, 1), np.nan), np.ones((6, 1)))


def test_thin() -> None:
    assert thin("a b c d e") == "a c d "
    assert thin("\u0f40\u0f0b\u0f41\u0f0b\u0f42\u0f0b") == "\u0f40\u0f0b\u0f42\u0f0b"
    assert thin("\u4e2d\u6587\u5b57") == "\u4e2d\u5b57"
    assert thin("") == ""


def test_an_encoder_that_sees_the_target_only(models: dict[str, Path]) -> None:
    """It has words of the target language, and falls back to letters for the source's."""
    found = describe(models["encoder"], PAIRS)
    assert found.kind == "encoder" and "2 layers" in found.summary
    source, target = found.tokens["source"], found.tokens["target"]
    assert source.tokens_per_unit > 2 > target.tokens_per_unit
    assert target.unk_tokens == target.unseen == target.cut == 0 and target.round_trip is None
    assert found.within is not None and found.within.auc > 0.9
    assert found.across is not None and found.across.auc < found.within.auc
    assert any("target language alone: tells its texts apart" in v for v in found.verdicts)
    page = str(found)
    assert "source against target (40 pairs, all mismatched pairs)" in page
    assert f"AUC           {found.across.auc:.3f} [" in page


def test_an_encoder_that_cannot_see_tibetan(models: dict[str, Path]) -> None:
    found = describe(models["encoder"], [*TIBETAN[:3], *TIBETAN, ""])
    tokens = found.tokens["target"]
    # WhitespaceSplit makes one word, hence one unknown token, of each text.
    assert (tokens.texts, tokens.unk_tokens, tokens.unk_texts) == (24, 1.0, 1.0)
    assert (tokens.unseen, tokens.alike) == (1.0, 1.0)
    assert found.across is None and found.within is not None
    assert found.within.auc == 0.5
    assert found.verdicts[0] == (
        "target: cannot see this text: 100% of its characters are in no known token, 100% of its "
        "tokens are <unk>"
    )
    assert "vowel signs that are taken off" in found.verdicts[1]
    assert found.verdicts[2] == "the target language alone: chance: AUC 0.50 [0.50, 0.50]"
    mixed = describe(models["encoder"], ["and \u0f40\u0f41", "and and and"]).tokens["target"]
    assert mixed.unk_tokens == pytest.approx(1 / 5) and mixed.unk_texts == 0.5
    assert mixed.unseen == pytest.approx(2 / 14)  # the word's two letters, one token


def test_marks_that_are_taken_off(models: dict[str, Path], tmp_path: Path) -> None:
    """BERT's uncased normaliser strips combining marks."""
    for file in models["encoder"].rglob("*"):
        if file.is_file():
            copy = tmp_path / file.relative_to(models["encoder"])
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(file.read_bytes())
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["normalizer"]["strip_accents"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    found = describe(tmp_path, ["a\u0302nd \u00e2n"])  # and, an: the same accent in two forms
    tokens = found.tokens["target"]
    assert (tokens.unk_tokens, tokens.unseen, tokens.dropped) == (0.0, 0.0, 2 / 7)
    assert found.verdicts[0].startswith("target: 29% of its characters are accents")


def test_a_decoder_over_bytes(models: dict[str, Path]) -> None:
    found = describe(models["decoder"], TIBETAN)
    tokens = found.tokens["target"]
    assert found.kind == "decoder" and found.within is None
    assert (tokens.tokens_per_char, tokens.fragments, tokens.unseen) == (3.0, 1.0, 0.0)
    assert (tokens.round_trip, tokens.cut) == (1.0, None)
    assert found.verdicts == (
        "target: costly: 3.00 tokens a character, 100% of them below a character",
    )
    parameters = sum(
        int(np.prod(x.shape)) for x in _tensors(models["decoder"] / "model.safetensors")
    )
    assert f"{parameters / 1e6:.1f} M parameters" in found.summary
    assert describe(models["decoder"]).tokens == {}  # only what it is


def _tensors(file: Path) -> list[np.ndarray]:
    from safetensors.numpy import load_file

    return list(load_file(file).values())


def test_an_encoder_that_hides_its_tokens(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Letters:
        """Counts letters, and says nothing about tokens."""

        def describe(self) -> str:
            return "letters"

        def embed(self, texts: list[str]) -> np.ndarray:
            return np.array([[text.count(c) for c in ascii_lowercase] for text in texts])

    module = importlib.import_module("grpo_jax.hub.describe")
    monkeypatch.setattr(module, "load_encoder", lambda root: Letters())
    found = describe(models["encoder"], PAIRS)
    assert found.tokens == {} and found.within is not None and found.within.auc > 0.9
    assert str(found).splitlines()[1].startswith("  letters; ")


def test_samples_it_refuses_and_too_few(models: dict[str, Path]) -> None:
    mixed: Any = ["a", ("b", "c")]
    with pytest.raises(ValueError, match="texts and pairs mixed"):
        describe(models["encoder"], mixed)
    twice = [("a", "and"), ("a", "or"), ("b", "and"), ("c", "cat")]  # two are no pairs of their own
    found = describe(models["encoder"], twice)
    assert found.tokens["source"].texts == 2 and found.within is None
    assert found.verdicts[-1] == "2 different texts: too few to compare, give 20"


def test_the_command(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"en": s, "bo": t}) + "\n" for s, t in PAIRS))
    fields = [f"--data={file}", "--source_field=en", "--target_field=bo", "--rows=30"]
    assert command.main([str(models["encoder"]), *fields]) == 0
    assert "source against target (30 pairs" in capsys.readouterr().out
    assert command.main([str(models["decoder"]), f"--data={file}", "--source_field=",
                         "--target_field=bo"]) == 0  # fmt: skip
    page = capsys.readouterr().out
    assert "decoder (decoder)" in page and "source" not in page
    assert command.main([str(models["encoder"]), *fields[:3], "--rows=0"]) == 1
    assert "--rows: got 0" in capsys.readouterr().err
    assert command.main([str(models["encoder"]), f"--data={tmp_path / 'no.jsonl'}"]) == 1
    assert capsys.readouterr().err.startswith("error: data file")
