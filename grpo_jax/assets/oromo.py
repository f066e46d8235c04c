"""Oromo-English pairs out of LibreOffice's help pages.

In: two unpacked help folders (`om` and `en-US`), the same pages in two languages. Every paragraph
and heading carries an `id` that is the same in both, so (page, id) is the key and nothing has to be
aligned. Out: rows {"source": Oromo, "target": English, "group": page}, in the order of the pages.
Dropped: blocks that translators left in English, program code, and repeated pairs.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

_BLOCKS = {"p", "h1", "h2", "h3", "h4", "h5", "h6"}
_BREAKS = {"br", "img", "td", "li"}  # they separate words
_CODE = re.compile("code", re.IGNORECASE)  # class names: code, codeintable, smathcode, bascode
_ENGLISH = frozenset(
    "the of to and is in a you for that are or this with can be on by as not if from it your an "
    "will which when then at use has have was does also all".split()
)


class _Page(HTMLParser):
    """Collects the text of every block that has an id.

    A `switchinline` span holds one span per platform or program, the default last; each replaces
    the one before it, so that "Command" and "Ctrl" do not run together.
    """

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: dict[str, str] = {}
        self._id = ""
        self._tag = ""
        self._text: list[str] = []
        self._spans: list[int] = []  # open spans: where a switch's text starts, or -1

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _BLOCKS:
            self._close()
            values = dict(attrs)
            if values.get("id") and not _CODE.search(values.get("class") or ""):
                self._id, self._tag = values["id"] or "", tag
        elif tag == "span":
            if self._spans and self._spans[-1] >= 0:
                del self._text[self._spans[-1] :]
            switch = dict(attrs).get("class") == "switchinline"
            self._spans.append(len(self._text) if switch else -1)
        elif tag in _BREAKS:
            self._text.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._tag:
            self._close()
        elif tag == "span" and self._spans:
            self._spans.pop()

    def handle_data(self, data: str) -> None:
        if self._id:
            self._text.append(data)

    def close(self) -> None:
        super().close()
        self._close()

    def _close(self) -> None:
        text = " ".join("".join(self._text).split())
        if self._id and text:
            self.blocks.setdefault(self._id, text)
        self._id = self._tag = ""
        self._text.clear()
        self._spans.clear()


def page_blocks(html: str) -> dict[str, str]:
    """The text of every paragraph and heading of a help page, by id; code is left out."""
    page = _Page()
    page.feed(html)
    page.close()
    return page.blocks


def mostly_english(text: str) -> bool:
    """Whether a quarter of the words, and at least two of them, are English function words."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    hits = sum(word in _ENGLISH for word in words)
    return hits >= 2 and hits >= len(words) / 4


def pair_pages(oromo: Path, english: Path) -> list[dict[str, str]]:
    """Pairs the two folders' pages block by block.

    Args:
      oromo: the help folder `om`.
      english: the help folder `en-US`.

    Returns:
      Rows with the keys source, target and group, without repeated (source, target) pairs.
    """
    rows: list[dict[str, str]] = []
    seen: set[tuple[str, str]] = set()
    for file in sorted(oromo.rglob("*.html")):
        page = file.relative_to(oromo).as_posix()
        if not (english / page).is_file():
            continue
        sources = page_blocks(file.read_text(encoding="utf-8"))
        targets = page_blocks((english / page).read_text(encoding="utf-8"))
        for key, source in sources.items():
            target = targets.get(key, "")
            if _is_pair(source, target) and (source, target) not in seen:
                seen.add((source, target))
                rows.append({"source": source, "target": target, "group": page})
    return rows


def _is_pair(source: str, target: str) -> bool:
    letters = ["".join(re.findall(r"[^\W\d_]", text)).casefold() for text in (source, target)]
    # Formulas, numbers and signs are no sentences; equal letters are a block left in English.
    wordy = all(
        2 * len(kept) >= len(text) > 0 for kept, text in zip(letters, (source, target), strict=True)
    )
    return wordy and letters[0] != letters[1] and not mostly_english(source)
