"""Which artifacts no other beats, what a plot leaves out, and where things stand on it."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from quantkit.bench.measurement import Layer, Measurement, Row
from quantkit.report.comparison import compare
from quantkit.report.heat import bits_map, noise_map
from quantkit.report.labels import Box, place
from quantkit.report.layers import layer_table, place_of
from quantkit.report.model import Line
from quantkit.report.pareto import Plot, plots
from quantkit.report.svg import Scale, scatter
from report.results_samples import measured, missing, results, row

SVG = "{http://www.w3.org/2000/svg}"


def artifact(label: str, size: float, kl: float, **more: Measurement) -> Row:
    sized = {"artifact": measured("artifact", size, "bytes"), "kl": measured("kl", kl, "nats", error=0.001)}
    return row(label, replaced=sized | more)


def drawn(*rows: Row) -> dict[str, Plot]:
    (comparison,) = compare([results(*rows)])
    return {plot.key: plot for plot in plots(comparison)}


def test_the_front_is_what_no_other_artifact_beats_in_both() -> None:
    rows = (artifact("small", 50e6, 0.3), artifact("good", 90e6, 0.1), artifact("worse", 95e6, 0.2))
    plot = drawn(*rows)["kl-artifact"]
    assert {point.label for point in plot.points if point.front} == {"small", "good"}
    (baseline,) = [point for point in plot.points if point.baseline]
    assert (baseline.x[1], baseline.y[1], baseline.front) == (270.0, 0.0, False)


def test_for_speed_more_is_better() -> None:
    fast = artifact("fast", 50e6, 0.3, decode=measured("decode", 90.0, "tok/s", spread=1.0))
    slow = artifact("slow", 50e6, 0.4, decode=measured("decode", 30.0, "tok/s", spread=1.0))
    plot = drawn(fast, slow)["kl-decode"]
    assert [point.label for point in plot.points if point.front] == ["fast"]
    assert {p.label: p.x for p in plot.points}["fast"] == (89.0, 90.0, 91.0)
    assert {p.label: p.y for p in plot.points}["fast"] == pytest.approx((0.3 - 0.00196, 0.3, 0.3 + 0.00196))


def test_what_is_not_drawn_is_named_with_its_reason() -> None:
    silent = artifact("silent", 60e6, 0.2, decode=missing("decode", "tok/s", "no engine"))
    plot = drawn(artifact("A", 50e6, 0.3), artifact("B", 70e6, 0.1), silent)["kl-decode"]
    assert plot.absent == ("silent: decode: no engine",)
    assert "kl-decode" not in drawn(artifact("A", 50e6, 0.3), silent)


def test_the_picture_holds_every_point_where_it_belongs() -> None:
    plot = drawn(artifact("small", 50e6, 0.3), artifact("g<&>d", 90e6, 0.1))["kl-artifact"]
    root = ElementTree.fromstring(scatter(plot, alone=True))
    groups = {g.attrib["class"]: g.find(f"{SVG}circle") for g in root.iter(f"{SVG}g")}
    assert groups.keys() == {"front", "baseline"}
    circles = {g.findtext(f"{SVG}title", "").split("\n")[0]: g.find(f"{SVG}circle") for g in root.iter(f"{SVG}g")}
    spots = {name: (float(c.attrib["cx"]), float(c.attrib["cy"])) for name, c in circles.items() if c is not None}
    assert spots["small"][0] < spots["g<&>d"][0] < spots["FP16"][0]
    assert spots["small"][1] < spots["g<&>d"][1] < spots["FP16"][1]
    assert "g<&>d: 90 MB, 0.1 nats" in root.attrib["aria-label"]
    assert root.find(f"{SVG}style") is not None


def test_numbers_of_many_sizes_get_a_logarithmic_axis() -> None:
    plot = drawn(artifact("good", 90e6, 0.004), artifact("poor", 50e6, 2.0))["kl-artifact"]
    scale = Scale([0.004, 2.0], 0, 100)
    assert scale.log and 0 < scale(0.004) < scale(0.09) < scale(2.0) < 100
    assert "0.1" in [text for _, text in scale.ticks()]
    # a baseline at zero has no place on it
    assert 'class="baseline"' not in scatter(plot)


@pytest.mark.parametrize("values", [(0.0, 0.31), (104.9, 269.0), (0.5, 0.5), (7.27, 7.29), (-3.0, 12.0)])
def test_ticks_are_round_and_on_the_scale(values: tuple[float, float]) -> None:
    scale = Scale(values, 0, 300)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 8
    for value, text in ticks:
        assert float(text) == pytest.approx(value, abs=1e-12)
        assert -1e-6 <= scale(value) <= 300 + 1e-6
    assert len({text for _, text in ticks}) == len(ticks)


def test_names_of_crowded_points_do_not_cover_each_other() -> None:
    points = [(100.0, 100.0), (103.0, 101.0), (101.0, 104.0)]
    spots = place(["first", "second", "third"], points, [], Box(0, 0, 300, 200))
    boxes = [spot.box for spot in spots]
    assert all(a.overlap(b) == 0 for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    (spot,) = place(["a long name at the edge"], [(295.0, 100.0)], [], Box(0, 0, 300, 200))
    assert spot.anchor == "end" and spot.box.outside(Box(0, 0, 300, 200)) == 0


def layered(bits: float = 4.5) -> Line:
    layers = [
        Layer(name=f"model.layers.{block}.mlp.{role}", applied="gptq", bits_per_weight=b, sqnr_db=20.0 + block)
        for block in range(3)
        for role, b in (("up_proj", 4.5), ("down_proj", bits))
    ]
    layers.append(Layer(name="lm_head", applied="unquantized", bits_per_weight=16.0))
    changed = row("A").model_copy(update={"layers": layers})
    (comparison,) = compare([results(changed)])
    return comparison.lines[1]


def test_layers_of_a_line_at_a_glance() -> None:
    found = layer_table([layered(6.5)])
    assert found is not None
    headers, rows, _ = found
    shown = dict(zip(headers, map(str, rows[0]), strict=True))
    assert shown == {
        "": "A",
        "linears": "6",
        "left as they are": "1",
        "median SQNR dB": "21.0",
        "lowest SQNR dB": "20.0",
        "fewest bits bits/weight": "4.50",
        "most bits bits/weight": "6.50",
        "noisiest": "model.layers.0.mlp.up_proj",
    }
    (comparison,) = compare([results(row("A"))])
    assert layer_table(comparison.lines) is None


def test_the_noisiest_layer_is_the_strongest() -> None:
    text = noise_map(layered())
    assert text is not None
    cells = re.findall(r'fill-opacity="([\d.]+)" x="([\d.]+)" y="24"', text)
    assert [float(opacity) for opacity, _ in cells] == [1.0, 0.55, 0.1]
    assert bits_map(layered()) is None
    assert bits_map(layered(6.5)) is not None
    assert place_of(Layer(name="lm_head", applied="x", bits_per_weight=1)) is None
