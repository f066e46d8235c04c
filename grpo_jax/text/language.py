"""The language gate: is this text in the language that it should be in, and in no other?

In: texts. Out: one bool each. Two signals, both calibrated on the training targets:

1. Scripts. Nearly all units must be in the language's own scripts (a table, or what the targets
   are written in), some Latin names are tolerated, and any other script is not.
2. Spelling, when the sources pass for the target language by script (Oromo and English).
   Witten-Bell smoothed character trigrams of both sides give each character a log-likelihood
   ratio, and a text fails where any stretch of it speaks too strongly for the other side.
   That is Page's cumulative sum test (Biometrika 41, 1954): unlike a mean over the text it also
   fires on a text that is good for one half, and lets a text too short to tell pass.

The paper (arXiv 2605.14366) has the first signal only, which cannot tell Latin from Latin. The
second one tells the two sides apart; a third language in the same script passes as far as it
looks no more like the sources than like the targets.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from grpo_jax.text.scripts import COMMON, script_of, script_shares, shares_of, units

_WRITTEN_IN = {
    "Latin": "en eng fr fra de deu es spa pt por it ita nl nld ca cat gl glg eu eus ro ron pl pol "
    "cs ces sk slk sl slv hr hrv bs bos sr srp hu hun fi fin et est lv lav lt lit sv swe da dan "
    "no nb nob nn nno is isl ga gle cy cym mt mlt sq sqi tr tur az aze uz uzb tk tuk vi vie id "
    "ind ms msa jv jav su sun tl tgl ceb ilo mi mri sm smo haw om orm gaz so som sw swa swh ha hau "
    "yo yor ig ibo zu zul xh xho af afr st sot tn tsn sn sna ny nya lg lug rw kin ln lin wo wol ff "
    "ful bm bam ee ewe tw twi ak aka mg mlg qu que ay aym gn grn nah ku kur la lat eo epo za zha",
    "Tibetan": "bo bod dz dzo lbj adx khg",
    "Arabic": "ar ara arb fa fas pes prs ur urd ug uig ps pus sd snd ckb ks kas pa pan az aze "
    "ku kur",
    "Cyrillic": "ru rus uk ukr be bel bg bul mk mkd sr srp kk kaz ky kir tg tgk tt tat ba bak "
    "cv chv mn mon khk os oss ce che sah tyv kv kom uz uzb",
    "Mongolian": "mn mon mvf mnc sjo",
    "Han": "zh zho cmn yue wuu nan hak lzh ja jpn",
    "Hiragana": "ja jpn",
    "Katakana": "ja jpn",
    "Hangul": "ko kor",
    "Devanagari": "hi hin mr mar ne nep sa san mai bho ks kas",
    "Bengali": "bn ben as asm mni",
    "Gurmukhi": "pa pan",
    "Gujarati": "gu guj",
    "Oriya": "or ori ory",
    "Tamil": "ta tam",
    "Telugu": "te tel",
    "Kannada": "kn kan",
    "Malayalam": "ml mal",
    "Sinhala": "si sin",
    "Thai": "th tha",
    "Lao": "lo lao",
    "Myanmar": "my mya shn ksw",
    "Khmer": "km khm",
    "Ethiopic": "am amh ti tir gez",
    "Hebrew": "he heb yi yid",
    "Greek": "el ell grc",
    "Armenian": "hy hye",
    "Georgian": "ka kat",
    "Cherokee": "chr",
    "Tifinagh": "zgh ber",
    "Yi": "ii iii",
    "Thaana": "dv div",
    "Nko": "nqo",
    "Ol": "sat",
    "Canadian": "iu iku cr cre",
}

_OWN = 0.8  # share of a text's units that must be in the language's own scripts ...
_BORROWED = ("Latin", "Greek")  # ... and the rest in these, as names and symbols are everywhere
_SHARED_SCRIPT = 0.05  # share of sources that pass by script, from which spelling must decide
_SAME_LANGUAGE = 0.2  # nats a character; two genres of one language: 0.15, Spanish-Galician 0.5
_ENOUGH_TEXTS = 50  # fewer cannot tell two genres from two languages
_MAX_TEXTS = 20_000  # enough for trigrams
_LEAST_EVIDENCE = 10.0  # nats; less never rejects a text


@dataclass(frozen=True)
class LanguageGate:
    """A fitted gate: `gate(texts)` is bool [N], True for texts in the language and no other.

    Texts without letters ("", "123", "...") are False: nothing in them is in any language.
    Texts too short to tell ("OK") pass if their script is right.
    """

    language: str
    scripts: tuple[str, ...]  # the language's own
    threshold: float = np.inf  # nats of evidence for the other side that reject a text
    target: Mapping[str, int] = field(default_factory=dict)  # trigram counts; {}: scripts only
    other: Mapping[str, int] = field(default_factory=dict)
    accepted: float = 1.0  # share of held-out target texts that pass
    rejected: float = 1.0  # share of held-out other texts that do not

    @classmethod
    def fit(
        cls, language: str, target_texts: Sequence[str], other_texts: Sequence[str]
    ) -> LanguageGate:
        """Fits a gate to the training text.

        Args:
          language: ISO 639-1/3 code of the target language; a region or script behind a dash or
            underscore is ignored. A code that the table lacks is learned from `target_texts`.
          target_texts: texts in the language; those of the training split.
          other_texts: texts in the language that outputs may slip into; the training sources.
        Raises:
          ValueError: the targets are not written in the language's script; an unknown language
            has no targets; sources share the script and there are no targets to learn from.
        """
        targets, others = _distinct(target_texts), _distinct(other_texts)
        gate = cls(language, _scripts_of_language(language, targets))
        rejected = 1.0 - _mean(gate(others)) if others else 1.0
        gate = dataclasses.replace(gate, accepted=_mean(gate(targets)), rejected=rejected)
        if rejected >= 1.0 - _SHARED_SCRIPT:
            return gate
        if not targets:
            raise ValueError(
                f"language gate for {language!r}: the sources are in {_or(gate.scripts)} script "
                "too, so target texts are needed to tell the languages apart; got none. Add some "
                "pairs with targets to data.train."
            )
        return _add_spelling(gate, targets, others)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Args: N texts. Returns: bool [N]."""
        return np.array([self._passes(text) for text in texts], dtype=np.bool_)

    def describe(self) -> str:
        """One line for people: what decides, and how well it did on held-out training text."""
        signal = f"spelling, {self.threshold:.1f} nats" if self.target else "script only"
        return (
            f"language gate {self.language!r}: {_or(self.scripts)} ({signal}); passes "
            f"{self.accepted:.1%} of held-out targets, rejects {self.rejected:.1%} of sources"
        )

    def _passes(self, text: str) -> bool:
        pieces = units(text)
        shares = shares_of(pieces)
        own = sum(shares.get(script, 0.0) for script in self.scripts)
        if own < _OWN or any(s not in self.scripts and s not in _BORROWED for s in shares):
            return False
        return not self.target or _evidence(self._ratios, _spelled(pieces)) <= self.threshold

    @cached_property
    def _ratios(self) -> _Ratios:
        return _Ratios(self.target, self.other)


def _scripts_of_language(language: str, targets: Sequence[str]) -> tuple[str, ...]:
    """The scripts that targets may use: the table's, as far as the targets use them."""
    total: Counter[str] = Counter()
    for text in targets:
        total.update(script_shares(text))
    seen = {script: share / total.total() for script, share in total.most_common()}
    code = re.split("[-_]", language.lower())[0]
    known = tuple(script for script, codes in _WRITTEN_IN.items() if code in codes.split())
    if not known and not seen:
        raise ValueError(
            f"reward.language {language!r} is not in the table of scripts and there are no target "
            "texts to learn its script from: use an ISO 639 code, or data with targets"
        )
    if not seen:
        return known
    if not known:
        much = min(0.2, max(seen.values()))
        return tuple(script for script, share in seen.items() if share >= much)
    if sum(seen.get(script, 0.0) for script in known) < 0.5:
        most = ", ".join(f"{share:.0%} {script}" for script, share in list(seen.items())[:3])
        raise ValueError(
            f"reward.language {language!r} is written in {_or(known)} script, but the training "
            f"targets are {most}: set reward.language to the language of data.target_field"
        )
    return tuple(script for script in known if seen.get(script, 0.0) >= 0.01)


def _add_spelling(gate: LanguageGate, targets: list[str], others: list[str]) -> LanguageGate:
    """Adds the trigrams, with the threshold found on text that they have not seen.

    One half is fitted, the other half measured. The threshold is 2.5 times what 95% of unseen
    targets stay below: more than 99% of them pass, the few texts left untranslated in real data
    do not move it, and the vocabulary of other domains has room. If both sides are one language
    (headlines for articles), spelling decides nothing and the gate stays with the scripts.
    """
    spelled = [[_spelled(units(text)) for text in texts] for texts in (targets, others)]
    fitted = tuple(_trigrams(texts[::2]) for texts in spelled)
    unseen = tuple(texts[1::2] or texts for texts in spelled)
    unseen_counts = tuple(_trigrams(texts) for texts in unseen)
    ratios = _Ratios(*fitted)
    distance = (_mean_ratio(ratios, unseen_counts[0]) - _mean_ratio(ratios, unseen_counts[1])) / 2
    if min(len(targets), len(others)) >= _ENOUGH_TEXTS and distance < _SAME_LANGUAGE:
        return gate
    evidence = tuple(np.array([_evidence(ratios, t) for t in texts]) for texts in unseen)
    threshold = max(2.5 * float(np.quantile(evidence[0], 0.95)), _LEAST_EVIDENCE)
    return dataclasses.replace(
        gate,
        threshold=threshold,
        target=dict(fitted[0] + unseen_counts[0]),
        other=dict(fitted[1] + unseen_counts[1]),
        accepted=gate.accepted * _mean(evidence[0] <= threshold),
        rejected=gate.rejected + (1.0 - gate.rejected) * _mean(evidence[1] > threshold),
    )


class _Spelling:
    """p(third character | two before it), Witten-Bell interpolated down to uniform.

    p_n(c | h) = (count(hc) + types(h) p_{n-1}(c | h')) / (count(h) + types(h)), p_0 = 1 / alphabet.
    """

    def __init__(self, trigrams: Mapping[str, int], alphabet: int):
        self.uniform = 1.0 / alphabet
        self.counts: Counter[str] = Counter()
        for gram, count in trigrams.items():
            for start in range(3):
                self.counts[gram[start:]] += count
        self.totals: Counter[str] = Counter()
        self.types: Counter[str] = Counter()
        for gram, count in self.counts.items():
            self.totals[gram[:-1]] += count
            self.types[gram[:-1]] += 1

    def __call__(self, trigram: str) -> float:
        probability = self.uniform
        for start in (2, 1, 0):
            gram = trigram[start:]
            total, types = self.totals[gram[:-1]], self.types[gram[:-1]]
            if total:
                probability = (self.counts[gram] + types * probability) / (total + types)
        return probability


class _Ratios(dict[str, float]):
    """Trigram -> log p_target - log p_other in nats, worked out when first asked for."""

    def __init__(self, target: Mapping[str, int], other: Mapping[str, int]):
        super().__init__()
        alphabet = len({gram[-1] for side in (target, other) for gram in side}) + 1
        self.target, self.other = _Spelling(target, alphabet), _Spelling(other, alphabet)

    def __missing__(self, trigram: str) -> float:
        ratio = math.log(self.target(trigram) / self.other(trigram))
        self[trigram] = ratio
        return ratio


def _spelled(pieces: Sequence[str]) -> str:
    """A text's words alone, as trigrams see them: digits out, two spaces in front."""
    return f"  {' '.join(piece for piece in pieces if script_of(piece[0]) != COMMON)} "


def _trigrams(texts: Iterable[str]) -> Counter[str]:
    """Trigram counts of spelled texts."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(map("".join, zip(text, text[1:], text[2:], strict=False)))
    return counts


def _evidence(ratios: _Ratios, spelled: str) -> float:
    """The largest sum of evidence for the other side over any stretch of the text, in nats."""
    against = most = 0.0
    for i in range(len(spelled) - 2):
        against -= ratios[spelled[i : i + 3]]
        if against < 0.0:
            against = 0.0
        elif against > most:
            most = against
    return most


def _mean_ratio(ratios: _Ratios, trigrams: Counter[str]) -> float:
    return sum(count * ratios[gram] for gram, count in trigrams.items()) / trigrams.total()


def _distinct(texts: Sequence[str]) -> list[str]:
    """Texts with letters, each once, thinned evenly to at most _MAX_TEXTS."""
    distinct = [text for text in dict.fromkeys(texts) if script_shares(text)]
    return distinct[:: max(1, -(-len(distinct) // _MAX_TEXTS))]


def _mean(flags: np.ndarray) -> float:
    return float(flags.mean()) if len(flags) else 1.0


def _or(names: Sequence[str]) -> str:
    return " or ".join(names)
