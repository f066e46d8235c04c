"""Pairs and headlines out of help pages and the strings of a program; what counts as a pair."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from grpo_jax import assets, config
from grpo_jax.assets import help_pages, ui_strings
from grpo_jax.assets.pairs import is_pair, mostly_english, words
from grpo_jax.data.splits import split_rows
from grpo_jax.structs import Row

PAGE = """<html><body><p id="menu" class="related">Fayyadami</p>
<h1 id="hd_1" dir="auto"><a name="x"></a>Gabatee <span class="emph">Saagi</span></h1>
<p id="par_1" class="paragraph">Tuqi&nbsp;<span class="switchinline">
<span class="MAC">Command</span> <span hidden="true">Ctrl</span></span>+C<br>cuqaasi &amp;
hojjedhu.</p>
<p id="par_2" class="code">Dim x As Integer</p><p class="paragraph">no id</p>
<p id="par_1" class="paragraph">a second block of that id</p>
<p id="par_3" class="tableheadintable">Dirree</p><h2 id="hd_2">Lammaffaa</h2>
<p id="par_4" class="">Xumura.</p>
<div class="relatedtopics"><p id="par_5" class="paragraph">Gara biraa</p></div>
</body></html>"""


def test_page():
    page = help_pages.Page(PAGE)
    assert page.blocks == {
        "menu": "Fayyadami",
        "hd_1": "Gabatee Saagi",
        "par_1": "Tuqi Ctrl+C cuqaasi & hojjedhu.",
        "par_3": "Dirree",
        "hd_2": "Lammaffaa",
        "par_4": "Xumura.",
        "par_5": "Gara biraa",
    }
    assert page.title == "hd_1" and page.body == ["par_1", "par_4"]


def test_page_cut_short_keeps_its_blocks():
    page = help_pages.Page('<p id="a">one<p id="b">two <b>three')
    assert page.blocks == {"a": "one", "b": "two three"}
    assert page.title == "" and page.body == []


@pytest.mark.parametrize(
    ("text", "english"),
    [
        ("Click the button to open a menu.", True),
        ("Gabatee haaraa galmee keessatti saagi.", False),
        ("Filannoo Tools - Options - LibreOffice", False),
        ("", False),
    ],
)
def test_mostly_english(text, english):
    assert mostly_english(text) == english


@pytest.mark.parametrize(
    ("source", "target", "language", "pair"),
    [
        ("Galmee banaa", "Open document", "om", True),
        ("LibreOffice Writer", "LibreOffice  writer", "om", False),  # left in English
        ("=A1+B2*3", "=A1+B2*4", "om", False),
        ("Galmee banaa", "", "om", False),
        ("ཡིག་ཆ་ཁ་ཕྱེ།", "Open document", "dz", True),  # more marks and tshegs than letters
        ("ཆུ་ཚོད།(variable)", "Time (variable)", "dz", False),  # less than half in the script
        ("CHIDIST", "CHISQ.TEST", "dz", False),
        ("ھۆججەت ئاچ", "Open file", "ug", True),
        ("Alpha", "Beta", "ug", False),
    ],
)
def test_is_pair(source, target, language, pair):
    assert is_pair(source, target, language) == pair


def test_words_are_syllables_in_tibetan_writing():
    assert words("Galmee haaraa  banaa") == ["Galmee", "haaraa", "banaa"]
    assert words("ཡིག་ཆ་ ཁ་ཕྱེ།") == ["ཡིག", "ཆ", "ཁ", "ཕྱེ།"]


def write_page(folder: Path, page: str, title: str, **blocks: str) -> None:
    file = folder / page
    file.parent.mkdir(parents=True, exist_ok=True)
    head = f'<h1 id="h">{title}</h1>' if title else ""
    file.write_text(head + "".join(f'<p id="{k}">{v}</p>' for k, v in blocks.items()))


def test_pair_pages(tmp_path):
    om, en = tmp_path / "om", tmp_path / "en"
    write_page(om, "b/two.html", "", x="Galmee banaa", y="Save the file on the disk now", z="=A1*3")
    write_page(en, "b/two.html", "", x="Open document", y="Save the file to the disk now", z="=A2")
    write_page(om, "a.html", "", x="Galmee banaa", y="LibreOffice Writer", q="Hin jiru")
    write_page(en, "a.html", "", x="Open document", y="LibreOffice  writer")
    write_page(om, "only_oromo.html", "", x="Asii gadi")
    rows = help_pages.pair_pages(om, en, "om")
    assert rows == [{"source": "Galmee banaa", "target": "Open document", "group": "a.html"}]


def test_headlines(tmp_path):
    om, en = tmp_path / "om", tmp_path / "en"
    text = {"x": "Qabduu kana cuqaasi galmee haaraa banuuf.", "y": "Maqaa isaa barreessi. Toleei."}
    told = {"x": "Click this button to open a new document.", "y": "Write its name. Click OK."}

    def write(page: str, title: str, english: str, ours=text, theirs=told) -> None:
        write_page(om, page, title, **ours)
        write_page(en, page, english, **theirs)

    write("kept.html", "Galmee Banuu", "Opening a Document")
    again = {"t": "Galmee banuu.", **text}  # the title itself, said again below
    write(
        "title_again.html", "Galmee Banuu", "Opening the Document",
        {"x": text["x"], "t": "Galmee banuu."}, {"x": told["x"], "t": "Opening the document."},
    )  # fmt: skip
    write("title_first.html", "Galmee Banuu", "Opening Documents", again, {"t": "So", **told})
    write("no_title.html", "", "")
    write("same_title.html", "Writer", "Writer")
    write("code.html", "ISLEEYII", "ISEVEN")
    write("short.html", "Galmee Gabaabaa", "A Short Page", {"x": "Cuqaasi asii."}, {"x": "Click."})
    write("english.html", "Galmee Biraa", "Another Page", told, told)
    write("x/00/menu.html", "Baafata", "Menu")
    write("swap.html", "Lama", "Two", {"u": "[text/a.xhp#b not found] asitti dubbisi kana", **text})
    rows = help_pages.headlines(om, en, "om", 12)
    assert {row["group"]: (row["source"], row["target"]) for row in rows} == {
        "kept.html": (" ".join(text.values()), "Opening a Document"),
        "swap.html": (" ".join(text.values()), "Two"),
        "title_again.html": (text["x"], "Opening the Document"),
    }
    # Whole paragraphs while they fit; the first is cut at a sentence, or at a word.
    for most, source in ((9, text["x"]), (6, text["x"]), (5, "Qabduu kana cuqaasi galmee haaraa")):
        found = {row["group"]: row["source"] for row in help_pages.headlines(om, en, "om", most)}
        assert found["kept.html"] == source
    long = {"x": "Tokko lama sadii afur shan. Jaha torba saddeet sagal kudhan."}
    write("sentence.html", "Lakkoofsa", "Numbers", long, {"x": "One two"})
    found = {row["group"]: row["source"] for row in help_pages.headlines(om, en, "om", 8)}
    assert found["sentence.html"] == "Tokko lama sadii afur shan."


def catalogue(strings: dict[str, str]) -> bytes:
    """A .mo file: header, two tables of (length, offset), then the texts."""
    texts = [[key.encode(), value.encode()] for key, value in sorted(strings.items())]
    count = len(texts)
    tables, blob, start = ([], []), b"", 28 + 16 * count
    for column in (0, 1):
        for pair in texts:
            tables[column].append((len(pair[column]), start + len(blob)))
            blob += pair[column] + b"\0"
    numbers = [number for table in tables for entry in table for number in entry]
    header = struct.pack("<7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0)
    return header + struct.pack(f"<{len(numbers)}I", *numbers) + blob


def test_ui_strings(tmp_path):
    (tmp_path / "deep").mkdir()
    strings = {
        "": "Content-Type: text/plain; charset=UTF-8\n",
        "dialog|open\x04_Open File:": "ھۆججەت ئاچ(_O):",
        "menu|open\x04~Open file": "ھۆججەت ئاچ(~O):",
        "STR_ONE\x04Open the file.\nClose it.": "ھۆججەتنى ئاچ.\nئۇنى ياپ.",
        "no context here": "بۇ يەردە مۇھىت يوق",
        "STR_TWO\x04Start %PRODUCTNAME": "%PRODUCTNAME نى قوزغات",
        "STR_THREE\x04The file $(ARG1)": "ھۆججەت $(ARG1)",
        "STR_FOUR\x04<none>": "<يوق>",
        "STR_FIVE\x04HTML": "HTML",
        "STR_SIX\x04%d row\0%d rows": "بىر قۇر\0%d قۇر",
    }
    (tmp_path / "deep/a.mo").write_bytes(catalogue(strings))
    (tmp_path / "b.mo").write_bytes(catalogue({"": strings[""], "X\x04no context here": "مۇھىت"}))
    rows = ui_strings.pair_strings(tmp_path, "ug")
    assert [tuple(row.values()) for row in rows] == [
        ("مۇھىت", "no context here", "no context here"),
        ("ھۆججەتنى ئاچ. ئۇنى ياپ.", "Open the file. Close it.", "open the file close it"),
        ("ھۆججەت ئاچ:", "Open File:", "open file"),
        ("ھۆججەت ئاچ:", "Open file", "open file"),
        ("بۇ يەردە مۇھىت يوق", "no context here", "no context here"),
    ]
    (tmp_path / "c.mo").write_bytes(b"no catalogue")
    with pytest.raises(OSError, match="Bad magic number"):
        ui_strings.pair_strings(tmp_path, "ug")


# The real packages


def rows_of(name: str) -> list[dict[str, str]]:
    with open(assets.resolve(f"asset:{name}"), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.mark.assets
@pytest.mark.parametrize(
    ("name", "least", "most", "groups"),
    [
        ("oromo-english", 17_000, 18_500, 1_700),
        ("dzongkha-english", 15_500, 17_500, 1_700),
        ("oromo-headlines", 1_300, 1_500, 1_300),
        ("dzongkha-headlines", 1_300, 1_500, 1_300),
        ("uyghur-english", 7_000, 8_000, 6_000),
    ],
)
def test_pairs_of_packages(name, least, most, groups):
    rows = rows_of(name)
    language = {"oromo": "om", "dzongkha": "dz", "uyghur": "ug"}[name.split("-")[0]]
    assert least < len(rows) < most and len({row["group"] for row in rows}) > groups
    assert len({(row["source"], row["target"]) for row in rows}) == len(rows)
    assert all(list(row) == ["source", "target", "group"] for row in rows)
    assert all(is_pair(row["source"], row["target"], language) for row in rows)
    assert all(text == " ".join(text.split()) for row in rows for text in row.values())


@pytest.mark.assets
def test_what_pages_say():
    pairs = {(row["source"], row["target"]) for row in rows_of("oromo-english")}
    assert ("Wanta Qubachiisaa", "Positioning Objects") in pairs
    page = "simpress/02/04010000.html"
    names = ("oromo-headlines", "dzongkha-headlines")
    oromo, dzongkha = ({row["group"]: row for row in rows_of(name)} for name in names)
    assert oromo[page]["target"] == "Show/Hide Slide"
    assert oromo[page]["source"].startswith("Islaayidii filatamee yeroo mul'atu")
    assert dzongkha["simpress/01/04990100.html"]["target"] == "Date (fixed)"
    strings = {row["target"]: row["source"] for row in rows_of("uyghur-english")}
    assert strings["Delete Row"] == "قۇر ئۆچۈر"


@pytest.mark.assets
@pytest.mark.parametrize(("language", "most"), [("oromo", 50), ("dzongkha", 40)])
def test_headlines_and_pairs_split_alike(language, most):
    """No page that one task tests (or selects) on is a page that the other trains on."""
    split = {}
    for task in ("english", "headlines"):
        rows = [Row(**row) for row in rows_of(f"{language}-{task}")]
        split[task] = split_rows(rows, config.Data(group_field="group", seed=7))
    for held, other in (("english", "headlines"), ("headlines", "english")):
        trained = {row.group for row in split[other].train}
        for part in (split[held].dev, split[held].test):
            pages = {row.group for row in part}
            assert len(pages) > 20 and not pages & trained
    titles = {(row.group, row.target): row.source for part in split["english"][:3] for row in part}
    for row in (row for part in split["headlines"][:3] for row in part):
        assert 5 <= len(words(row.source)) <= most
        assert row.source not in (row.target, titles.get((row.group, row.target)))
