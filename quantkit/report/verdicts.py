"""The rule of thumb beside the measurement: where they part, and what in the numbers says why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from quantkit.report.certainty import interval
from quantkit.report.facts import Rule
from quantkit.report.model import Cell, Judgement, Line, Quantity, Verdict

MEMORY_TOLERANCE = 0.05
"""Rules of thumb are quoted in steps of 5 to 25 points; a measured saving within 5 points is what they mean."""

WIDEST_TELLING = 0.10
"""An interval wider than 10 points holds every rule (95 to 99%) and the baseline at once: it decides nothing."""

RULE_PARAMETERS = 7e9
"""Rules of thumb are usually quoted for models of this size and above."""


def judge(line: Line, baseline: Line, rule: Rule, environment: Mapping[str, Any]) -> Iterator[Verdict]:
    """Hold a line against its rule: accuracy kept, memory saved, speed. One verdict each, measured or not."""
    yield _accuracy(line, baseline, rule)
    yield _memory(line, baseline, rule)
    yield _speed(line, baseline, rule, environment)


def applies(rule: Rule, line: Line) -> bool:
    """Whether the rule is meant for an artifact of this many bits a weight."""
    bits = _value(line, "bits_per_weight")
    return bits is None or bits <= rule.max_bits


def _value(line: Line, key: str) -> float | None:
    cell = line.cells.get(key)
    return None if cell is None else cell.value


def _absent(line: Line, quantity: Quantity, low: float, high: float, cell: Cell | None) -> Verdict:
    reason = cell.missing if cell is not None and cell.missing else "not measured"
    return Verdict(
        label=line.label,
        quantity=quantity,
        rule_low=low,
        rule_high=high,
        measured=None,
        judgement="not measured",
        reason=reason,
    )


def _accuracy(line: Line, baseline: Line, rule: Rule) -> Verdict:
    cell = line.cells.get("recovered")
    if cell is None or cell.value is None:
        return _absent(line, "accuracy kept", rule.accuracy, rule.accuracy, cell)
    judgement: Judgement
    if cell.low is None or cell.high is None:
        judgement, reason = "cannot tell", "; ".join(cell.remarks) or "no interval"
    elif not cell.low <= rule.accuracy <= cell.high:
        judgement, reason = "parts", _why_accuracy(line, baseline, cell.value > rule.accuracy)
    elif cell.high - cell.low > WIDEST_TELLING:
        width = 100 * (cell.high - cell.low)
        judgement = "cannot tell"
        reason = f"the interval of {cell.samples} questions is {width:.0f} points wide; more questions would narrow it"
    else:
        judgement, reason = "agrees", f"the interval of {cell.samples} questions holds the rule"
    return Verdict(
        label=line.label,
        quantity="accuracy kept",
        rule_low=rule.accuracy,
        rule_high=rule.accuracy,
        measured=cell.value,
        low=cell.low,
        high=cell.high,
        judgement=judgement,
        reason=reason,
    )


def _why_accuracy(line: Line, baseline: Line, better: bool) -> str:
    """What the divergence says about accuracy that is better or worse than the rule."""
    parts = []
    kl, top1 = _value(line, "kl"), _value(line, "top1")
    before, after = _value(baseline, "perplexity"), _value(line, "perplexity")
    if kl is not None:
        parts.append(f"KL to the baseline is {kl:.3f} nats")
    if top1 is not None:
        parts.append(f"the likeliest token is the same in {100 * top1:.0f}% of places")
    if before and after:
        parts.append(f"perplexity goes from {before:.2f} to {after:.2f}")
    text = ", ".join(parts) if parts else "no divergence was measured that would say why"
    parameters = parameter_count(baseline)
    if not better and parameters is not None and parameters < RULE_PARAMETERS:
        text += f"; the rule is quoted for models of 7B parameters and more, this one has {parameters / 1e6:.0f}M"
    return text


def parameter_count(line: Line) -> float | None:
    """Parameters of the model, from the bytes of its weights and their mean bits."""
    size, bits = _value(line, "artifact"), _value(line, "bits_per_weight_all")
    return 8 * size / bits if size and bits else None


def _memory(line: Line, baseline: Line, rule: Rule) -> Verdict:
    cell = line.cells.get("memory_saved")
    if cell is None or cell.value is None:
        return _absent(line, "memory saved", rule.memory_saved, rule.memory_saved, cell)
    apart = cell.value - rule.memory_saved
    return Verdict(
        label=line.label,
        quantity="memory saved",
        rule_low=rule.memory_saved,
        rule_high=rule.memory_saved,
        measured=cell.value,
        judgement="parts" if abs(apart) > MEMORY_TOLERANCE else "agrees",
        reason=_why_memory(line),
    )


def _why_memory(line: Line) -> str:
    quantized, everything = _value(line, "bits_per_weight"), _value(line, "bits_per_weight_all")
    if quantized is None or everything is None:
        return "bits per weight were not measured, so the file's size has no breakdown"
    text = f"the quantized layers take {quantized:.2f} bits a weight"
    if everything - quantized < 0.1:
        return f"{text}, and so does the whole file ({everything:.2f})"
    text += f", the whole file {everything:.2f}"
    if quantized < everything <= 16:
        # everything = share * 16 + (1 - share) * quantized, solved for the share
        share = (everything - quantized) / (16 - quantized)
        text += (
            f": as if {100 * share:.0f}% of the parameters (embeddings, norms, skipped layers) had stayed at 16 bits"
        )
    return text


def _speed(line: Line, baseline: Line, rule: Rule, environment: Mapping[str, Any]) -> Verdict:
    low, high = rule.faster
    cell = line.cells.get("decode_speedup")
    if cell is None or cell.value is None:
        return _absent(line, "faster", low, high, cell)
    faster = cell.value - 1
    ends = interval("decode_speedup", cell)
    least, most = (ends[0] - 1, ends[1] - 1) if ends else (faster, faster)
    inside = least <= high and low <= most
    return Verdict(
        label=line.label,
        quantity="faster",
        rule_low=low,
        rule_high=high,
        measured=faster,
        low=least if ends else None,
        high=most if ends else None,
        judgement="agrees" if inside else "parts",
        reason="decode speed is within the rule" if inside else _why_speed(line, baseline, cell, environment),
    )


def _why_speed(line: Line, baseline: Line, cell: Cell, environment: Mapping[str, Any]) -> str:
    assert cell.value is not None
    device = environment.get("gpu") or environment.get("device") or "this machine"
    before, after = _value(baseline, "loaded"), _value(line, "loaded")
    parts = []
    if before and after:
        sizes = f"the loaded model takes {after / 1e6:.0f} MB instead of {before / 1e6:.0f}"
        if cell.value < 1 and after < before:
            parts.append(
                f"{sizes}, yet a token takes {1 / cell.value:.1f} times as long on {device}: computing with the codes "
                "costs more than reading fewer bytes saves"
            )
        elif cell.value > 1 and after < before:
            parts.append(f"{sizes}, and decoding one sequence mostly waits for weights to be read")
        else:
            parts.append(f"{sizes}, so it says nothing about the speed")
    else:
        parts.append(f"measured on {device}; the loaded sizes that would say why are missing")
    return "; ".join([*parts, *cell.remarks])
