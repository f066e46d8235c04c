"""Pairs of a language and English out of the strings of LibreOffice's menus and dialogs.

In: an unpacked folder of compiled gettext catalogues (.mo), whose keys are the English, after
"\x04" where a context stands before it. Out: rows {"source", "target": English, "group": the
English}. The same English, whatever its case and signs, is one group: strings come again in many
dialogs. Dropped: strings left in English, with placeholders or markup, and repeated pairs.
"""

from __future__ import annotations

import re
from gettext import GNUTranslations
from pathlib import Path

from grpo_jax.assets.pairs import is_pair, letters

_KEY = re.compile(r"\s*\([_~&]\w\)|[_~](?=\w)")  # the key that chooses an entry: (_F), _File, ~File
# %PRODUCTNAME, %1, $(ARG1), #1, <b>, {0}, NAME_OF_SOMETHING
_PLACEHOLDER = re.compile(r"[%$#<>{}\\_]")


class _Catalogue(GNUTranslations):
    """A catalogue that lists what it holds."""

    _catalog: dict[str | tuple[str, int], str]  # what gettext's own parser fills

    def strings(self) -> list[tuple[str, str]]:
        """(English, translation), without plural forms and the header."""
        found = [(key, text) for key, text in self._catalog.items() if isinstance(key, str)]
        return [(key.rpartition("\x04")[2], text) for key, text in found if key]


def pair_strings(folder: Path, language: str) -> list[dict[str, str]]:
    """Pairs every string of the catalogues below `folder` with its English.

    Args:
      folder: holds .mo files, at any depth.
      language: its code, as `pairs.is_pair` takes it.

    Returns:
      Rows with the keys source, target and group, in the order of the files' names.

    Raises:
      OSError: a file is no catalogue.
    """
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for file in sorted(folder.rglob("*.mo")):
        with file.open("rb") as stream:
            strings = _Catalogue(stream).strings()
        for english, translation in strings:
            source, target = _clean(translation), _clean(english)
            whole = not _PLACEHOLDER.search(source) and not _PLACEHOLDER.search(target)
            if whole and is_pair(source, target, language):
                row = {"source": source, "target": target, "group": _group(target)}
                rows.setdefault((source, target), row)
    return list(rows.values())


def _clean(text: str) -> str:
    return " ".join(_KEY.sub("", text).split())


def _group(english: str) -> str:
    return " ".join(filter(None, (letters(word) for word in english.casefold().split())))
