"""The config groups of a compressed-tensors file: which grid each linear is on, and what is not read.

Source: compressed-tensors 0.20.0, quantization/quant_args.py, quantization/quant_scheme.py and utils/match.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.errors import ModelError
from quantkit.patterns import regex_problem
from quantkit.tensors import Grid

PACKED = "pack-quantized"
LINEAR = "Linear"
REGEX = "re:"
ONLY_WEIGHTS = "is set, expected none: only quantized weights are read"


@dataclass(frozen=True)
class Scheme:
    """One of a file's config groups. targets: module names, regexes after "re:", or names of module classes."""

    targets: tuple[str, ...]
    grid: Grid

    def rank(self, module: str) -> tuple[int, str] | None:
        """How closely it targets a linear, the least the closest, None when it does not: a name before a regex before
        the class, and of several regexes the first in the alphabet."""
        if module in self.targets:
            return (0, module)
        regexes = (target for target in self.targets if target.startswith(REGEX))
        found = sorted(target for target in regexes if re.match(target.removeprefix(REGEX), module))
        if found:
            return (1, found[0])
        return (2, LINEAR) if LINEAR in self.targets else None


def read_schemes(where: str, quantization: Mapping[str, Any]) -> list[Scheme]:
    """The config groups of a quantization_config.

    Raises ModelError listing all that is damaged or that makes an artifact more than weights in packed integers.
    """
    problems = [f"{key} {ONLY_WEIGHTS}" for key in ("kv_cache_scheme", "transform_config") if quantization.get(key)]
    schemes = []
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        problems.append(f"config_groups: found {groups}, expected at least one")
        groups = {}
    for name, group in groups.items():
        found = _problems(group, quantization.get("format"))
        problems += [f"config_groups.{name}: {problem}" for problem in found]
        if not found:
            weights = group["weights"]
            size = weights["group_size"] if _strategy(weights) == "group" else None
            schemes.append(Scheme(tuple(group["targets"]), Grid(weights["num_bits"], size, weights["symmetric"])))
    if problems:
        raise ModelError("\n".join(f"{where}: quantization_config: {problem}" for problem in problems))
    return schemes


def _problems(group: Any, default_format: Any) -> list[str]:
    """What keeps one config group from being read, one line each."""
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        return [f"found {group}, expected targets and weights"]
    problems = []
    stored = group.get("format") or default_format
    if stored != PACKED:
        problems.append(f"format {stored}, expected {PACKED}")
    problems += [f"{key} {ONLY_WEIGHTS}" for key in ("input_activations", "output_activations") if group.get(key)]
    targets, weights = group.get("targets"), group["weights"]
    if not isinstance(targets, list) or not all(isinstance(target, str) and _compiles(target) for target in targets):
        problems.append(f"targets: found {targets}, expected a list of names and valid regexes")
    kind, bits = weights.get("type"), weights.get("num_bits")
    if kind != "int" or not isinstance(bits, int) or not 1 <= bits <= 8:
        problems.append(f"weights of type {kind} with {bits} bits, expected int with 1 to 8")
    if not isinstance(weights.get("symmetric"), bool):
        problems.append(f"symmetric {weights.get('symmetric')}, expected true or false")
    strategy, size = _strategy(weights), weights.get("group_size")
    if strategy not in ("group", "channel"):
        problems.append(f"strategy {strategy}, expected group or channel")
    elif strategy == "group" and (not isinstance(size, int) or size < 1):
        problems.append(f"group_size {size}, expected a positive number")
    return problems


def _compiles(target: str) -> bool:
    """Whether a target is no regex or a valid one."""
    return not target.startswith(REGEX) or regex_problem(target.removeprefix(REGEX)) is None


def _strategy(weights: Mapping[str, Any]) -> str:
    """How weights share scales; what the package infers from the group size where a file does not say."""
    size = weights.get("group_size")
    return str(weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group"))
