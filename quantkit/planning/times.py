"""How long a run will take: operations over the rates of the probe, and what does not scale with them.

Per block, on T tokens, for each input of n columns whose linears have m rows together:

    linears     2 T n m                  8-bit products where they are faster, by codes of 4 bits still more so where
                                         linears were rounded before (FOUR_BIT_SPEEDUP), else their dtype's
    attention   2 T L d                  at the rate of that dtype; d: all heads together, L: the length of a sequence
    Grams       G n (n + 1)              of G tokens; 8-bit products where they are faster
    passing     ACTIVATION_FLOP T (4 d + 3 m)   norms, activations, rotary positions, copies
    solve       MOVE_SLOWDOWN m n^2 (1 + 2 sweeps + PAIR_FLOP pairs) + FACTOR_FLOP n^3 + VALUE_FLOP m n     float32
    correction  2 T n^2 as Grams, then CORRECTION_FLOP m n^2 + FACTOR_FLOP n^3; the passes are two

Rows that find no room in memory wait in a scratch file (model/waiting.py), which is written and read at the disk's
rate, though the page cache may hold it; or they start again for every group, and pass those before it once more.

"Flop" of work that is no product says how many float32 operations of a product take as long, so that the forecast moves
with the machine. Source of the constants: whole runs, see docs/plan.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.formats.base import LinearPlan
from quantkit.maths.attention import has_own_loops
from quantkit.maths.int_products import way
from quantkit.planning.probe import Probe
from quantkit.planning.shapes import Work

REFERENCE_FLOP_S = 460e9
"""Float32 rate of the machine that the constants below were measured on: two cores of an AMD EPYC of family 26."""

START_S = {"plain": 1.5, "compiled": 1.8, "gguf": 2.3, "calibrated": 4.1}
"""Until the first block on that machine: imports alone, with compiled loops, with a GGUF file's tokenizer, or with a
model to run and its text."""

ATTENTION_SLOWDOWN = {"torch": 6.0, "own loops": 2.5}
"""Attention and rotary positions (`maths/attention.py`) against the same number of operations in large products; own
loops as they are in bfloat16, nearer to 2 in float32."""

LINEAR_SLOWDOWN = 1.6
"""Linears of a block, coding tokens and weights in 8 bits with them, against the square products of the probe."""

GRAM_SLOWDOWN = {"torch": 2.75, "pairs": 1.9, "quads": 1.9}
"""8-bit Gram matrices against such products: rounding, and, where torch multiplies, the strips' shape. Our own loops
leave out all of the lower triangle; what quads take was not fitted by itself, but taken from pairs."""

FOUR_BIT_SPEEDUP = 1.35
"""Products with weights of at most 4 bits (`maths/four_bit.py`) against those of 8, rounding of inputs included."""

ACTIVATION_FLOP = 140
MOVE_SLOWDOWN = 1.7  # products of what is passed on and of gradients, a block of columns at a time
FACTOR_FLOP = 1
VALUE_FLOP = 6000
CORRECTION_FLOP = 4
PAIR_FLOP = 10  # a sweep over pairs and the one of the descent behind it

ENCODE_NS = {
    "int8": 3.0,
    "nf4": 5.0,
    "rtn": 8.0,
    "F16": 2.0,
    "BF16": 2.0,
    "Q8_0": 4.0,
    "Q4_0": 4.0,
    "Q4_1": 4.0,
    "Q5_0": 4.5,
    "Q5_1": 4.5,
    "Q2_K": 9.0,
    "Q3_K": 8.0,
    "Q4_K": 9.0,
    "Q5_K": 9.0,
    "Q6_K": 8.5,
    "IQ4_NL": 12.0,
    "IQ4_XS": 12.0,
}
"""Nanoseconds a value on that machine, all threads together: rounding, packing, the noise that the manifest records."""

ERROR = 0.3
"""How far a time is off, in parts of it, in most of the runs that docs/plan.md speaks of."""


@dataclass(frozen=True)
class TimeForecast:
    """Seconds by step."""

    parts: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def time_of(
    work: Work,
    plans: Sequence[LinearPlan],
    probe: Probe,
    artifact_bytes: int,
    filed_bytes: int = 0,
    again: float = 0.0,
) -> TimeForecast:
    """The seconds of a whole `quantize`. artifact_bytes: that will be written. filed_bytes, again: as MemoryForecast
    has them.

    The embedding of a GGUF file counts as a linear of the type that most linears have.
    """
    slower = REFERENCE_FLOP_S / probe.float32_flop_s
    parts = {
        "starting": START_S[work.kind] * slower,
        "reading": work.source_bytes / probe.read_bytes_s,
        "writing": artifact_bytes / probe.write_bytes_s,
    }
    quantized = [plan for plan in plans if plan.method is not None]
    nearest = [plan for plan in quantized if not _solved(plan)]
    if nearest:
        each = [encode_ns(plan) for plan in nearest]
        if work.gguf:
            values = sum(plan.out_features * plan.in_features for plan in nearest)
            each.append(sum(each) / values * work.embedding_values)
        parts["rounding"] = slower * 1e-9 * sum(each)
    if work.calibrated:
        parts |= _passes(work, probe, again)
    if filed_bytes:
        parts["scratch file"] = work.blocks * filed_bytes * (1 / probe.write_bytes_s + 1 / probe.read_bytes_s)
    solved = [plan for plan in quantized if _solved(plan)]
    if solved:
        parts["solving"] = work.blocks * _solve_flop(work, solved) / probe.float32_flop_s
    return TimeForecast(parts)


def _solved(plan: LinearPlan) -> bool:
    """Whether codes come from the calibrated solver rather than from rounding alone; an importance only weighs."""
    return bool(plan.method and plan.method.calibrated) and getattr(plan.method, "importance", False) is not True


def encode_ns(plan: LinearPlan) -> float:
    """Nanoseconds that rounding one linear to nearest takes on the reference machine."""
    method: Any = plan.method
    kind = method.type_for(plan.in_features) if method.name == "ggml" else method.name
    return ENCODE_NS[kind] * plan.out_features * plan.in_features


def _passes(work: Work, probe: Probe, again: float) -> dict[str, float]:
    """Running the model on the calibration set, and its statistics. again: of the rows, those that start again for each
    group of linears."""
    rate = probe.device_flop_s or (probe.bfloat16_flop_s if work.how.linears.itemsize == 2 else probe.float32_flop_s)
    float32 = probe.float32_flop_s
    tokens, blocks = work.tokens, work.blocks
    passed = [1 + again * count for count in range(len(work.groups) - 1, -1, -1)]  # by those that come behind
    linears = sum(2 * tokens * group.values * times for group, times in zip(work.groups, passed, strict=True))
    attention = 2 * tokens * work.length * work.attention * passed[0]
    grams = sum(work.gram_tokens * group.columns * (group.columns + 1) for group in work.groups)
    # of norms and copies, those at the start of a block are passed five times then, those in its middle three times
    rows = sum(group.rows * times for group, times in zip(work.groups, passed, strict=True))
    passing = ACTIVATION_FLOP * tokens * (4 * work.hidden * (1 + 2 * again) + rows)
    crossed = sum(2 * tokens * group.columns**2 for group in work.groups) if work.corrects else 0
    gram_rate = probe.int8_op_s / GRAM_SLOWDOWN[way().name] if work.how.eight_bit_gram and probe.int8_op_s else float32
    linear_rate = probe.int8_op_s if work.eight_bit_linears and probe.int8_op_s else rate
    by_codes = work.eight_bit_linears and work.propagates and work.run_columns is not None
    ours = work.how.rounded and not probe.device_flop_s and has_own_loops(work.how.linears)
    ways = (1 / FOUR_BIT_SPEEDUP if by_codes else 1) + work.ways - 1  # what goes along is not rounded
    return {
        "linears": ways * blocks * linears * LINEAR_SLOWDOWN / linear_rate,
        "attention": work.ways * blocks * attention * ATTENTION_SLOWDOWN["own loops" if ours else "torch"] / rate,
        "Gram matrices": blocks * grams / (probe.device_flop_s or gram_rate),
        "norms, activations, copies": work.ways * blocks * passing / (probe.device_flop_s or float32),
        **({"correction": blocks * crossed / (probe.device_flop_s or gram_rate)} if work.corrects else {}),
    }


def _solve_flop(work: Work, solved: Sequence[LinearPlan]) -> float:
    """Of one block, all of whose linears are taken to have the settings of most."""
    methods: list[Any] = [plan.method for plan in solved]
    (method, _), *_ = Counter(methods).most_common(1)
    sweeps = method.refine if getattr(method, "rounding", "gptq") == "gptq" else 0
    moves = 2 * sweeps + PAIR_FLOP * getattr(method, "pairs", 0)
    factors = 2 if work.corrects else 1
    moves += CORRECTION_FLOP if work.corrects else 0
    return sum(
        MOVE_SLOWDOWN * group.rows * group.columns**2 * (1 + moves)
        + factors * FACTOR_FLOP * group.columns**3
        + VALUE_FLOP * group.values
        for group in work.groups
    )
