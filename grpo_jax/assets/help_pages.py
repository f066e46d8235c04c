"""Pairs of a language and English, and headlines, out of LibreOffice's help pages.

In: two unpacked help folders (such as `om` and `en-US`), the same pages in two languages. Every
paragraph and heading carries an `id` that is the same in both, so (page, id) is the key and nothing
has to be aligned. Out: rows {"source": the language, "target": English, "group": page}, in the
order of the pages. Dropped: blocks that translators left in English, program code, and repeated
pairs. A row's group is its page in both tasks, so that a split by group puts a page on one side.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from grpo_jax.assets.pairs import is_pair, letters, words

_BLOCKS = {"p", "h1", "h2", "h3", "h4", "h5", "h6"}
_BREAKS = {"br", "img", "td", "li"}  # they separate words
_CODE = re.compile("code", re.IGNORECASE)  # class names: code, codeintable, smathcode, bascode
_ASIDE = re.compile("related|table", re.IGNORECASE)  # what is no running text
_UNRESOLVED = "not found]"  # a reference to a page that the package does not have
_COMMANDS = "/00/"  # pages of pieces that other pages quote
_LEAST = 5  # words of a headline's text
_SENTENCE_END = re.compile(r"[.!?:](?=\s)|[\u0f0d\u0f0e](?=\s)")


class Page(HTMLParser):
    """Collects the text of every block that has an id.

    A `switchinline` span holds one span per platform or program, the default last; each replaces
    the one before it, so that "Command" and "Ctrl" do not run together.

    Attributes:
      blocks: the texts of paragraphs and headings by id, without code.
      title: the id of the first h1; '' where there is none.
      body: the ids of paragraphs behind that h1, without links to other pages and tables.
    """

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: dict[str, str] = {}
        self.title = ""
        self.body: list[str] = []
        self._id = ""
        self._tag = ""
        self._related = False  # links to other pages come last
        self._aside = False
        self._text: list[str] = []
        self._spans: list[int] = []  # open spans: where a switch's text starts, or -1
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _BLOCKS:
            self._close()
            values = dict(attrs)
            kind = values.get("class") or ""
            if values.get("id") and not _CODE.search(kind):
                self._id, self._tag = values["id"] or "", tag
                self._aside = self._related or _ASIDE.search(kind) is not None
        elif tag == "span":
            if self._spans and self._spans[-1] >= 0:
                del self._text[self._spans[-1] :]
            switch = dict(attrs).get("class") == "switchinline"
            self._spans.append(len(self._text) if switch else -1)
        elif tag in _BREAKS:
            self._text.append(" ")
        elif tag == "div" and dict(attrs).get("class") == "relatedtopics":
            self._related = True

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
        if self._id and text and self._id not in self.blocks:
            self.blocks[self._id] = text
            if self._tag == "h1" and not self.title:
                self.title = self._id
            elif self._tag == "p" and self.title and not self._aside:
                self.body.append(self._id)
        self._id = self._tag = ""
        self._text.clear()
        self._spans.clear()


def pair_pages(folder: Path, english: Path, language: str) -> list[dict[str, str]]:
    """Pairs the two folders' pages block by block.

    Args:
      folder: the language's help pages, such as `om/text`.
      english: the same pages in English.
      language: its code, `om` or a key of `pairs.SCRIPTS`.

    Returns:
      Rows with the keys source, target and group, without repeated (source, target) pairs.
    """
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for name, page, theirs in _pages(folder, english):
        for key, source in page.blocks.items():
            target = theirs.blocks.get(key, "")
            if is_pair(source, target, language):
                row = {"source": source, "target": target, "group": name}
                rows.setdefault((source, target), row)
    return list(rows.values())


def headlines(folder: Path, english: Path, language: str, most: int) -> list[dict[str, str]]:
    """The beginning of each page in the language, with the page's English title.

    Left out are pages whose title is missing, is left untranslated, names nothing but code
    (`ROUND`) or is what the first paragraph says; pages with too little text in the language; and
    pages that only list menu commands.

    Args:
      folder, english, language: as `pair_pages` takes them.
      most: words (in Tibetan writing, syllables) of a source. Whole paragraphs are taken; the first
        is cut at the end of a sentence where it alone is longer.

    Returns:
      Rows with the keys source, target and group, without repeated (source, target) pairs.
    """
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for name, page, theirs in _pages(folder, english):
        title, target = page.blocks.get(page.title, ""), theirs.blocks.get(theirs.title, "")
        both = [(page.blocks[key], theirs.blocks.get(key, "")) for key in page.body]
        titles = {_plain(title), _plain(target)}
        code = not any(c.islower() for c in target)
        if code or _COMMANDS in name or not both or not is_pair(title, target, language):
            continue
        if {_plain(text) for text in both[0]} & titles:
            continue
        texts = [
            text
            for text, other in both
            if is_pair(text, other, language)
            and _UNRESOLVED not in text
            and not {_plain(text), _plain(other)} & titles
        ]
        source = _beginning(list(dict.fromkeys(texts)), most)
        if len(words(source)) >= _LEAST and is_pair(source, target, language):
            row = {"source": source, "target": target, "group": name}
            rows.setdefault((source, target), row)
    return list(rows.values())


def _pages(folder: Path, english: Path) -> Iterator[tuple[str, Page, Page]]:
    """(name, page, its English) of every page that both folders have, in the order of names."""
    for file in sorted(folder.rglob("*.html")):
        name = file.relative_to(folder).as_posix()
        if (english / name).is_file():
            both = [path.read_text(encoding="utf-8") for path in (file, english / name)]
            yield name, Page(both[0]), Page(both[1])


def _plain(text: str) -> str:
    return letters(text).casefold()


def _beginning(texts: list[str], most: int) -> str:
    """The first texts, as many as have `most` words together; of the first at least a part."""
    taken: list[str] = []
    for text in texts:
        room = most - sum(len(words(some)) for some in taken)
        if len(words(text)) <= room:
            taken.append(text)
            continue
        if not taken:
            ends = [end.end() for end in _SENTENCE_END.finditer(text)]
            fit = [end for end in ends if len(words(text[:end])) <= most]
            taken.append(text[: fit[-1]] if fit else _cut(text, most))
        break
    return " ".join(taken)


def _cut(text: str, most: int) -> str:
    """The text up to the end of its word number `most`."""
    end = 0
    for word in words(text)[:most]:
        end = text.index(word, end) + len(word)
    return text[:end]
