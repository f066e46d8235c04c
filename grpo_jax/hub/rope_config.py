"""rope_theta, rope_scaling and rope_parameters of a config.json -> Rope, and back to both forms.

Older configs have rope_theta and, where the context is stretched, rope_scaling; newer ones have
everything in rope_parameters, with Gemma 3 once a layer type. Where both stand side by side they
must say the same. Numbers that follow from others (attention factors) are resolved here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from grpo_jax.hub.fields import Fields
from grpo_jax.models.rope import Rope
from grpo_jax.text.strict import plain, shown

_ORIGINAL = "original_max_position_embeddings"
# What each kind reads, besides rope_type (or type), rope_theta and partial_rotary_factor.
_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
             "truncate", _ORIGINAL),
    "longrope": ("short_factor", "long_factor", "factor", "attention_factor", _ORIGINAL),
}  # fmt: skip


class RopeSpec(NamedTuple):
    """What a family assumes about its rotary positions."""

    theta: float = 10000.0  # where the config does not say
    kinds: tuple[str, ...] = tuple(_KEYS)
    partial: bool = False  # whether partial_rotary_factor is read
    original: int | None = None  # original_max_position_embeddings, where the config does not say


def read_rope(f: Fields, spec: RopeSpec, head_dim: int, context: int) -> Rope:
    """The rope of a family whose layers all have the same one.

    Args:
      f: the config's fields; problems are added to it.
      spec: the family's assumptions.
      head_dim: width of a head.
      context: max_position_embeddings.
    """
    reader = _Reader(f, spec, head_dim, context)
    forms = [(name, f.get(name)) for name in ("rope_scaling", "rope_parameters")]
    forms = [(name, given) for name, given in forms if given] or [("rope_parameters", {})]
    return _agreed(f, [reader.rope(name, given, "rope_theta") for name, given in forms])


def read_layer_ropes(
    f: Fields, full: RopeSpec, sliding: RopeSpec, head_dim: int, context: int
) -> tuple[Rope, Rope]:
    """The ropes of full-attention layers and of sliding-window layers (Gemma 3)."""
    on_full = _Reader(f, full, head_dim, context)
    on_sliding = _Reader(f, sliding, head_dim, context)
    scaling, nested = f.get("rope_scaling"), f.get("rope_parameters")
    fulls, slidings = [], []
    if scaling or not nested:
        fulls.append(on_full.rope("rope_scaling", scaling or {}, "rope_theta"))
        slidings.append(on_sliding.rope("rope_local_base_freq", {}, "rope_local_base_freq"))
    if nested:
        if not isinstance(nested, dict) or set(nested) - {"full_attention", "sliding_attention"}:
            f.problems.append(
                f"rope_parameters: got {shown(nested)}, wanted an object with full_attention and "
                "sliding_attention"
            )
            nested = {}
        name = "rope_parameters.full_attention"
        fulls.append(on_full.rope(name, nested.get("full_attention") or {}, "rope_theta"))
        name = "rope_parameters.sliding_attention"
        given = nested.get("sliding_attention") or {}
        slidings.append(on_sliding.rope(name, given, "rope_local_base_freq"))
    return _agreed(f, fulls), _agreed(f, slidings)


def _agreed(f: Fields, ropes: list[Rope]) -> Rope:
    if len(set(ropes)) > 1:
        f.problems.append("rope_scaling and rope_parameters contradict each other")
    return ropes[0]


class _Reader:
    """One object of rope settings -> Rope."""

    def __init__(self, f: Fields, spec: RopeSpec, head_dim: int, context: int) -> None:
        self.f, self.spec, self.head_dim, self.context = f, spec, head_dim, context

    def rope(self, name: str, given: Any, theta_field: str) -> Rope:
        problems = self.f.problems
        self.f.get(_ORIGINAL)  # means nothing to the kinds that do not read it
        if not isinstance(given, dict):
            problems.append(f"{name}: got {shown(given)}, wanted an object")
            given = {}
        given = {key: value for key, value in given.items() if value is not None}
        theta = self._single("rope_theta", [self.f.get(theta_field), given.pop("rope_theta", None)])
        partial = self._partial(given)
        kind = self._kind(name, given)
        if unknown := sorted(set(given) - set(_KEYS[kind])):
            problems.append(f"{name}: {shown(unknown)} mean nothing known to rope type {kind}")
        values: dict[str, Any] = {"theta": theta or self.spec.theta, "kind": kind}
        values["partial"] = partial
        if kind in ("linear", "dynamic", "llama3", "yarn"):
            values["factor"] = self._number(name, given, "factor", None)
        if kind == "dynamic":
            values["original_length"] = self.context
        if _ORIGINAL in _KEYS[kind]:
            values["original_length"] = self._original(given)
        if kind == "llama3":
            for key in ("low_freq_factor", "high_freq_factor"):
                values[key] = self._number(name, given, key, None)
            if values["high_freq_factor"] <= values["low_freq_factor"]:
                problems.append(f"{name}: high_freq_factor must be above low_freq_factor")
        elif kind == "yarn":
            values |= self._yarn(name, given, values["factor"])
        elif kind == "longrope":
            values |= self._longrope(name, given, values["original_length"], partial)
        return Rope(**values)

    def _single(self, name: str, found: list[Any]) -> float | None:
        """The one positive number among values of which some may be None."""
        stated = [value for value in found if value is not None]
        if any(not _is_number(value) or value <= 0 for value in stated):
            self.f.problems.append(f"{name}: got {shown(stated)}, wanted a positive number")
            return None
        numbers = sorted({float(value) for value in stated})
        if len(numbers) > 1:
            self.f.problems.append(f"{name}: {numbers} contradict each other")
        return numbers[0] if numbers else None

    def _partial(self, given: dict) -> float:
        outer = self.f.get("partial_rotary_factor")
        found = [outer, given.pop("partial_rotary_factor", None)]
        partial = self._single("partial_rotary_factor", found) or 1.0
        if partial != 1.0 and not self.spec.partial:
            self.f.problems.append(
                f"partial_rotary_factor: got {partial}, only 1.0 is implemented for this family"
            )
        if partial > 1.0 or int(self.head_dim * partial) % 2 or int(self.head_dim * partial) < 2:
            self.f.problems.append(
                f"partial_rotary_factor: {partial} of {self.head_dim} dimensions; wanted an even "
                "number of them"
            )
            return 1.0
        return partial

    def _kind(self, name: str, given: dict) -> str:
        named = [str(given.pop(key)) for key in ("rope_type", "type") if key in given]
        kinds = {"longrope" if kind == "su" else kind for kind in named} or {"default"}
        kind = min(kinds)
        if len(kinds) > 1 or kind not in self.spec.kinds:
            self.f.problems.append(
                f"{name}: rope type {' and '.join(sorted(map(plain, kinds)))} is not implemented "
                f"for this family; wanted one of {', '.join(self.spec.kinds)}"
            )
            given.clear()
            return "default"
        return kind

    def _number(self, name: str, given: dict, key: str, default: float | None) -> float:
        value: Any = given.get(key, default)
        if not _is_number(value) or value <= 0:
            self.f.problems.append(f"{name}: {key} is {shown(value)}, wanted a positive number")
            return 1.0
        return float(value)

    def _original(self, given: dict) -> int:
        """The length before stretching: at the top, in the object, or the whole context."""
        found = [self.f.get(_ORIGINAL, self.spec.original), given.get(_ORIGINAL)]
        original = int(self._single(_ORIGINAL, found) or self.context)
        if original < 2:  # longrope divides by its logarithm
            self.f.problems.append(f"{_ORIGINAL}: got {original}, wanted at least 2")
        return max(2, original)

    def _yarn(self, name: str, given: dict, factor: float) -> dict[str, Any]:
        def mscale(weight: float) -> float:
            return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

        attention = mscale(1.0)
        if given.get("mscale") and given.get("mscale_all_dim"):
            above = mscale(self._number(name, given, "mscale", None))
            attention = above / mscale(self._number(name, given, "mscale_all_dim", None))
        if not isinstance(truncate := given.get("truncate", True), bool):
            self.f.problems.append(f"{name}: truncate is {shown(truncate)}, wanted true or false")
        return {
            "attention_factor": self._number(name, given, "attention_factor", attention),
            "beta_fast": self._number(name, given, "beta_fast", 32.0),
            "beta_slow": self._number(name, given, "beta_slow", 1.0),
            "truncate": bool(truncate),
        }

    def _longrope(self, name: str, given: dict, original: int, partial: float) -> dict[str, Any]:
        width = int(self.head_dim * partial) // 2
        values: dict[str, Any] = {}
        for key in ("short_factor", "long_factor"):
            factors: Any = given.get(key)
            numbers = isinstance(factors, list) and all(_is_number(x) and x > 0 for x in factors)
            if not numbers or len(factors) != width:
                self.f.problems.append(f"{name}: {key} must be {width} positive numbers")
                factors = [1.0] * width
            values[key] = tuple(map(float, factors))
        factor = self._number(name, given, "factor", self.context / original)
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        values["attention_factor"] = self._number(name, given, "attention_factor", attention)
        return values


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def both_forms(values: Mapping[str, Any], rope: Rope) -> dict[str, Any]:
    """The rope fields of a config.json in the older and in the newer form.

    What the config has is kept; what it lacks is added, so that every reader finds its form.

    Args:
      values: the config.json.
      rope: as read from it.
    """
    given = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    given.pop("type", None)
    given |= {"rope_type": rope.kind, "rope_theta": rope.theta}
    outer: dict[str, Any] = {"rope_theta": rope.theta}
    if _ORIGINAL in _KEYS[rope.kind]:
        given[_ORIGINAL] = rope.original_length
    if values["model_type"] == "phi3":
        given["partial_rotary_factor"] = outer["partial_rotary_factor"] = rope.partial
        if rope.kind == "longrope":
            outer[_ORIGINAL] = rope.original_length
    out = _completed(values, outer)
    out["rope_parameters"] = given
    scaling = values.get("rope_scaling")
    if rope.kind != "default" and not scaling:
        out["rope_scaling"] = _older(given, values["model_type"])
    elif scaling and scaling.get("type") == "su":  # its first name, which newer readers refuse
        out["rope_scaling"] = scaling | {"type": "longrope"}
    return out


def _completed(values: Mapping[str, Any], missing: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the fields that it lacks; what it says stays, nulls too."""
    added = {key: value for key, value in missing.items() if values.get(key) is None}
    return dict(values) | added


def _older(given: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """rope_parameters -> rope_scaling."""
    outside = ("rope_theta", "partial_rotary_factor")
    scaling = {key: value for key, value in given.items() if key not in outside}
    if model_type != "phi3":
        return scaling
    # Phi-3's older reader wants exactly these three and refuses more, rather than ignore them.
    scaling["type"] = scaling.pop("rope_type")
    scaling.pop(_ORIGINAL, None)
    return scaling


def both_layer_forms(values: Mapping[str, Any], full: Rope, sliding: Rope) -> dict[str, Any]:
    """As `both_forms`, of a family with one rope a layer type (Gemma 3)."""
    nested = values.get("rope_parameters") or {}
    on_full = dict(nested.get("full_attention") or values.get("rope_scaling") or {})
    on_full.pop("type", None)
    on_full |= {"rope_type": full.kind, "rope_theta": full.theta}
    on_sliding = dict(nested.get("sliding_attention") or {})
    on_sliding.pop("type", None)
    on_sliding |= {"rope_type": sliding.kind, "rope_theta": sliding.theta}
    outer = {"rope_theta": full.theta, "rope_local_base_freq": sliding.theta}
    out = _completed(values, outer)
    out["rope_parameters"] = {"full_attention": on_full, "sliding_attention": on_sliding}
    if full.kind != "default" and not values.get("rope_scaling"):
        out["rope_scaling"] = {k: v for k, v in on_full.items() if k != "rope_theta"}
    return out
