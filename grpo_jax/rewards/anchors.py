"""The text that a row's completions are compared with: a config word and rows in, a function out.

The anchor is the row's target, its source (reference-free, SG-SRL, arXiv 2605.29502), or the target
of another row. The last is a negative control: its rewards have the same scale and the same
texts behind them, but say nothing about the prompt, so a gain under them is no gain of meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter

from grpo_jax.data.splits import normalise, uniform
from grpo_jax.structs import Row
from grpo_jax.text.measures import is_empty

ANCHORS = ("target", "source", "shuffled")


def build_anchor(
    kind: str, splits: Iterable[Sequence[Row]] = (), seed: int = 0
) -> Callable[[Row], str]:
    """The function that gives a row's anchor text.

    Args:
      kind: "target", "source" or "shuffled"; the first two need no more.
      splits: every row that will be asked for, a sequence for each part of the data (training,
        dev); shuffling stays inside a part, so that training never sees a dev target.
      seed: of the shuffling.

    Raises:
      ValueError: an unknown kind, or too few distinct targets to shuffle. The function returned
        raises it for a row that is in no split.
    """
    if kind not in ANCHORS:
        raise ValueError(f"reward.anchor: got {kind!r}, wanted one of {', '.join(ANCHORS)}.")
    if kind != "shuffled":
        return attrgetter(kind)
    anchors: dict[Row, str] = {}
    for rows in splits:
        others = shuffled_targets([row.target for row in rows], seed)
        anchors.update(zip(rows, others, strict=True))

    def shuffled(row: Row) -> str:
        if row not in anchors:
            raise ValueError(f"reward.anchor = 'shuffled' was not prepared for {row}.")
        return anchors[row]

    return shuffled


def shuffled_targets(targets: Sequence[str], seed: int) -> list[str]:
    """Another target for each: N texts in, N texts out, none equal to the one it replaces.

    The distinct targets are put in an order drawn by the seed, and each gives way to the next, the
    last one to the first: a derangement, in which every text is used as often as any other. Texts
    that differ only in case, width or spacing count as one. The result depends on the set of
    targets and the seed, on nothing else. Without a target there is nothing to replace: '' stays.

    Raises:
      ValueError: fewer than two distinct targets.
    """
    distinct: dict[str, str] = {}
    for target in sorted(target for target in targets if not is_empty(target)):
        distinct.setdefault(normalise(target), target)
    if len(distinct) < 2:
        raise ValueError(
            f"reward.anchor = 'shuffled' takes the target of another row, but {len(targets)} rows "
            f"hold {len(distinct)} distinct targets; wanted at least 2 in training and in dev."
        )
    order = sorted(distinct, key=lambda text: (uniform(text, seed), text))
    after = dict(zip(order, [*order[1:], order[0]], strict=True))
    return ["" if is_empty(target) else distinct[after[normalise(target)]] for target in targets]
