"""Scripts, units and the language gate."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.text import language, scripts
from grpo_jax.text.language import LanguageGate
from grpo_jax.text.scripts import script_of, script_shares, units

# ---- scripts


@pytest.mark.parametrize(
    "script, chars",
    {
        "Latin": "aÉßŋＡ𝐀ª",
        "Han": "中々㐀",
        "Tibetan": "ཀིྱ",
        "Arabic": "ئۇﻻ",
        "Cyrillic": "жҮ",
        "Katakana": "アｱー",
        "Hangul": "한",
        "Devanagari": "का",
        "Mongolian": "ᠮ",
        "Ethiopic": "ለ",
        "Tai Tham": "ᨠ",
        "Common": "1, ༡་'\u02bc\u0301😀$",
    }.items(),
)
def test_script_of(script, chars):
    assert {char: script_of(char) for char in chars} == dict.fromkeys(chars, script)


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("The user's Menu-bar, 3 times!", ["the", "user's", "menu", "bar", "3", "times"]),
        ("ka\u2019aa ka\u02bcaa 'ka'aa'", ["ka'aa"] * 3),
        ("བོད་སྐད་ Writer།", ["བོད", "སྐད", "writer"]),
        ("བོད་Writerསྐད", ["བོད", "writer", "སྐད"]),
        ("我用PDF。", ["我", "用", "pdf"]),
        ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
        ("한국어 ｔｅｘｔ", ["한국어", "text"]),
        ("क्षमा करें", ["क्षमा", "करें"]),
        ("می\u200cشود", ["می\u200cشود"]),
        ("", []),
        ("... \u200b 😀", []),
    ],
)
def test_units(text, wanted):
    assert units(text) == wanted


@given(st.text(alphabet=st.characters(), max_size=80))
def test_any_string_has_units_and_shares(text):
    assert all(units(text))
    assert sum(script_shares(text).values()) == pytest.approx(1.0) or not script_shares(text)


def test_script_shares_count_units_not_letters():
    assert script_shares("བོད་ཡིག་དང་ LibreOffice 4.1") == {"Tibetan": 0.75, "Latin": 0.25}
    assert script_shares("123 ...") == {}


# ---- the gate, by script


def test_every_script_of_the_table_is_one_that_script_of_can_return():
    known = {script_of(chr(code)) for code in range(0x20000)}
    assert set(language._WRITTEN_IN) <= known


CHINESE = ["我们用这个按钮打开文件。", "请选择一个对话框", "表格的每一行"]
TIBETAN = ["མཐེབ་གནོན་འདི་ཡིས་ཡིག་ཆ་ཁ་ཕྱེ་བ།", "གླེང་སྒྲོམ་ཞིག་འདེམས་རོགས།", "རེའུ་མིག་གི་ཕྲེང་བ་རེ་རེ།"]


def test_tibetan_against_chinese():
    gate = LanguageGate.fit("bo", TIBETAN, CHINESE)
    assert gate.scripts == ("Tibetan",) and not gate.target
    assert gate(TIBETAN).all() and not gate(CHINESE).any()
    assert gate.accepted == gate.rejected == 1.0
    cases = {
        "བོད་ཡིག་འདི་ LibreOffice ནང་དུ་འབྲི་དགོས།": True,  # a name
        "བོད་ཡིག་འདི་中ནང་དུ་འབྲི་དགོས།": False,  # one character of the source's
        "བོད་ཡིག་དང་ then it goes on in English": False,
        "The whole of it is English.": False,
        "༡༢༣": False,
        "": False,
    }
    assert dict(zip(cases, gate(list(cases)).tolist(), strict=True)) == cases


def test_scripts_come_from_the_table_as_far_as_the_targets_use_them():
    cyrillic = ["Монгол хэл", "сайн байна уу"]
    assert LanguageGate.fit("mn", cyrillic, CHINESE).scripts == ("Cyrillic",)
    assert LanguageGate.fit("mn", [], CHINESE).scripts == ("Cyrillic", "Mongolian")
    assert LanguageGate.fit("xyz", cyrillic, CHINESE).scripts == ("Cyrillic",)
    assert LanguageGate.fit("bod_Tibt", TIBETAN, CHINESE).scripts == ("Tibetan",)
    japanese = LanguageGate.fit("ja", ["これはテストです。漢字も"], ["plain English"])
    assert japanese(["テストの漢字です", "plain English"]).tolist() == [True, False]


def test_mistaken_languages_are_errors():
    with pytest.raises(ValueError, match="'bo' is written in Tibetan script.*targets are 100% Han"):
        LanguageGate.fit("bo", CHINESE, TIBETAN)
    with pytest.raises(ValueError, match="'xyz' is not in the table of scripts"):
        LanguageGate.fit("xyz", [], CHINESE)
    with pytest.raises(ValueError, match="Latin script too, so target texts are needed"):
        LanguageGate.fit("en", [], ["Fayyadamaan tuqa"])


# ---- the gate, by spelling: two invented languages in one script, each with its own syllables


def invented(consonants, vowels, seed, n):
    rng = random.Random(seed)
    syllables = ["".join(s) for s in itertools.product(consonants, vowels)]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(300)]
    return [" ".join(rng.choices(words, k=rng.randint(2, 14))).capitalize() for _ in range(n)]


@pytest.fixture(scope="module")
def sides():
    target = invented("bdklmnrst", ["a", "en", "o", "i", "er"], 0, 1200)
    other = invented("bdfjkmqq", ["aa", "uu", "oo", "ee", "i", "a"], 1, 1200)
    return target, other


@pytest.fixture(scope="module")
def spelling_gate(sides):
    target, other = sides
    return LanguageGate.fit("xy", target[:600], other[:600])


def half_and_half(first, second):
    a, b = first.split(), second.split()
    return " ".join(a[: len(a) // 2] + b[len(b) // 2 :])


def test_spelling_separates_one_script(sides, spelling_gate):
    target, other = (side[600:] for side in sides)
    assert spelling_gate(target).mean() > 0.98
    assert spelling_gate([t for t in other if len(t) > 20]).mean() < 0.01
    mixed = [half_and_half(*p) for p in zip(target, other, strict=True)]
    mixed += [half_and_half(*p) for p in zip(other, target, strict=True)]
    long = [text for text in mixed if len(text) > 50]
    assert len(long) > 300 and spelling_gate(long).mean() < 0.05
    assert spelling_gate.accepted > 0.98 and spelling_gate.rejected > 0.9
    assert "spelling" in spelling_gate.describe()


def test_a_foreign_stretch_in_a_long_text_fires(sides, spelling_gate):
    target, other = sides
    text = " ".join(target[600:620])
    stretch = next(t for t in other[600:] if len(t) > 40)
    assert spelling_gate([text, f"{text} {stretch} {text}"]).tolist() == [True, False]


def test_short_and_odd_outputs_are_defined(sides, spelling_gate):
    cases = {
        "OK": True,
        "Ab": True,
        "123": False,
        "": False,
        " \n": False,
        "?!": False,
        "中": False,
    }
    assert dict(zip(cases, spelling_gate(list(cases)).tolist(), strict=True)) == cases
    assert spelling_gate([]).shape == (0,) and spelling_gate(["OK"]).dtype == np.bool_


def test_one_language_on_both_sides_leaves_the_scripts(sides):
    target, _ = sides
    short = [text for text in target if len(text) < 40]
    long = [text for text in target if len(text) >= 40]
    gate = LanguageGate.fit("xy", short, long)  # headlines for articles
    assert not gate.target and gate(long).all() and "script only" in gate.describe()


def test_untranslated_targets_do_not_disarm_the_gate(sides):
    target, other = sides
    gate = LanguageGate.fit("xy", target[:580] + other[600:620], other[:600])
    assert gate([t for t in other[620:] if len(t) > 30]).mean() < 0.05


def test_a_handful_of_sentences_is_enough_to_fire():
    english = ["Click the button.", "Opens the dialog to choose a file.", "The name of the table."]
    oromo = ["Qabduu cuqaasi.", "Faayilii filuuf qaaqa bana.", "Maqaa gabatee."]
    gate = LanguageGate.fit("en", english, oromo)
    assert gate(["Choose the table.", "Qaaqa maqaa gabatee filuuf cuqaasi."]).tolist() == [
        True,
        False,
    ]


def test_the_ratio_is_a_ratio_of_distributions(sides):
    """For any history, both sides' probabilities sum to 1 over the alphabet and one unknown."""
    counts = language._trigrams([language._spelled(t) for t in sides[0][:100]])
    alphabet = sorted({gram[-1] for gram in counts})
    spelling = language._Spelling(counts, len(alphabet) + 1)
    for history in ("ba", " b", "zz", "  ", "q "):
        total = sum(spelling(history + char) for char in [*alphabet, "\u2603"])
        assert total == pytest.approx(1.0, abs=1e-9)


def test_scripts_module_has_no_state_that_changes_results():
    texts = ["བོད་ a 中", "zzz", "བོད་ a 中"]
    first, _, again = (units(text) for text in texts)
    assert first == again == ["བོད", "a", "中"] and scripts.COMMON == "Common"
