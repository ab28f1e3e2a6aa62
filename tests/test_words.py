"""What the verbs print: aligned columns, sizes, and every layer that did not get what was asked."""

from __future__ import annotations

from quantkit import words
from quantkit.manifest import FileRecord, Manifest, TensorRecord


def made(tensors: list[TensorRecord]) -> Manifest:
    return Manifest(
        name="own", created="2026-01-01T00:00:00Z", quantkit_version="0", recipe={}, recipe_sha256="0" * 64,
        method="gptq 4-bit g64 sym", method_name="gptq", format="autogptq", source={}, calibration=None,
        quantize_s=1.25, peak_rss_bytes=1, tensors=tensors, bits_per_weight=4.314, bits_per_weight_all=6.5,
        files=[FileRecord(name="a", bytes=1_500_000, sha256="0"), FileRecord(name="b", bytes=500_000, sha256="0")],
        environment={},
    )  # fmt: skip


def record(name: str, applied: str, sqnr: float | None, reason: str | None = None) -> TensorRecord:
    return TensorRecord(name=name, requested="gptq", applied=applied, bits_per_weight=4.3, sqnr_db=sqnr, reason=reason)


def test_columns_are_aligned_and_lines_end_where_the_text_ends() -> None:
    assert words.columns([["a", "1", "x"], ["bbb", "22", ""]], right=(1,)) == "a     1  x\nbbb  22"
    assert words.columns([]) == ""


def test_sizes_are_decimal() -> None:
    assert words.megabytes(98_362_432) == "98.4 MB"
    assert words.megabytes(12_500_000_000) == "12.5 GB"


def test_a_manifest_in_words() -> None:
    tensors = [record("l.0", "gptq", 20.0), record("l.1", "gptq", 10.0), record("l.2", "gptq", 30.0)]
    text = words.manifest(made([*tensors, record("head", "unquantized", None)]))
    lines = {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in text.splitlines()}
    assert lines["size"] == "2.0 MB"
    assert lines["linears"] == "3 quantized, 1 left as they are"
    assert lines["SQNR"] == "median 20.0 dB, lowest 10.0 dB"
    assert lines["bits per weight"] == "4.31 quantized linears, 6.50 all"
    assert lines["time"] == "1.2 s" or lines["time"] == "1.3 s"


def test_what_a_source_had_lost_before_is_printed() -> None:
    manifest = made([record("l.0", "gptq", 20.0)])
    manifest = manifest.model_copy(update={"source": {"notes": ["dequantized Q4_1 baseline", "it had been rounded"]}})
    lines = words.manifest(manifest).splitlines()
    assert lines[-2:] == ["source: dequantized Q4_1 baseline", "source: it had been rounded"]


def test_fallbacks_are_printed_and_the_rest_is_counted() -> None:
    tensors = [record(f"l.{index}", "nearest", 9.0, "damping raised") for index in range(11)]
    notes = [line for line in words.manifest(made(tensors)).splitlines() if line.startswith("note: ")]
    assert notes[0] == "note: l.0: nearest: damping raised"
    assert len(notes) == words.FALLBACKS_SHOWN + 1
    assert notes[-1] == "note: and 3 more, see --json"


def test_the_first_sentence_keeps_numbers_whole() -> None:
    assert words.first_sentence("Blocks of 64, 4.13 bits a weight. More.") == "Blocks of 64, 4.13 bits a weight"
    assert words.first_sentence("One only.") == "One only"
