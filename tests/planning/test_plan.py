"""The verb `plan`: its document, its text, and what it says of recipes that do not fit."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from conftest import write_tiny_llama
from quantkit.cli import execute
from quantkit.model.scratch import SPARE_BYTES
from quantkit.planning.document import PlanDocument
from quantkit.planning.run import plan
from quantkit.planning.text import text

GIGABYTE = 10**9


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """192 columns, a tied head: neither 128 nor 256 divides them."""
    folder = tmp_path_factory.mktemp("model") / "odd"
    return write_tiny_llama(folder, tied=True, hidden_size=192, intermediate_size=256, max_position_embeddings=512)


def make(recipe: str, model: Path, *settings: str, **options: str) -> PlanDocument:
    return plan(recipe, model=str(model), settings=settings, device="cpu", **options)


def test_a_recipe_that_fits_has_every_forecast(odd: Path) -> None:
    found = make("gptq-4bit-g64", odd)
    assert found.fits and not found.problems
    assert found.artifact and found.memory and found.disk and found.time
    assert found.artifact.weight_file_exact
    assert found.artifact.weight_file_bytes is not None
    assert found.artifact.weight_file_bytes > found.artifact.tensor_bytes
    assert found.memory.peak_rss_bytes == sum(found.memory.parts_bytes.values())
    assert found.time.seconds == pytest.approx(sum(found.time.parts_s.values()))
    assert {"linears", "Gram matrices", "solving"} <= found.time.parts_s.keys()
    assert len(found.engines) == 7
    assert "tied head" in text(found) and "takes it" in text(found)


def test_every_layer_that_does_not_fit_is_listed_with_what_would(odd: Path) -> None:
    found = make("gptq-4bit-g128", odd)
    assert not found.fits
    assert len(found.problems) == 12  # all but the two down projections of 256 columns
    assert found.hint is not None and "method.group_size=64" in found.hint
    assert found.artifact is None and found.memory is None and found.time is None and found.engines == []
    shown = text(found)
    assert "quantize would refuse this, 12 problems:" in shown
    line = "model.layers.*.self_attn.q_proj: group_size 128 does not divide in_features 192 (2 layers)"
    assert line in shown and "layers.1." not in shown
    assert any("model.layers.1.self_attn.q_proj" in problem for problem in found.problems)


def test_a_target_that_refuses_is_a_problem_with_the_forecasts_beside_it(odd: Path) -> None:
    found = make("nf4", odd, "target.engine=vllm", "target.tensor_parallel=2")
    assert not found.fits and found.artifact is not None
    assert "vLLM on 2 GPUs refuses this" in found.problems[0]


def test_fallbacks_of_a_mix_are_counted(odd: Path, tiny_llama: Path) -> None:
    cautions = "\n".join(make("gguf-q4_k_m", odd).cautions)
    assert "linears get Q5_0 instead of Q4_K, whose blocks do not divide 192 columns" in cautions
    assert any(
        line.startswith("model.embed_tokens: gguf Q5_0: Q4_K") for line in make("gguf-q4_k_m", tiny_llama).cautions
    )


def test_too_little_text_is_told(odd: Path) -> None:
    cautions = make("gptq-4bit-g64", odd, "calibration.sequences=2", "calibration.length=64").cautions
    assert any("128 tokens for inputs of 256 columns" in caution for caution in cautions)


def test_text_longer_than_the_model_has_positions_for_is_refused(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "short", hidden_size=192, intermediate_size=256, max_position_embeddings=128)
    found = make("gptq-4bit-g64", model, "calibration.length=256")
    assert found.problems == [
        "gptq-4bit-g64: calibration.length: found 256, expected at most the model's 128 positions"
    ]
    assert found.hint == "--set calibration.length=128"
    assert make("gptq-4bit-g64", model, "calibration.length=128").fits
    assert make("gguf-q8_0", model, "calibration.length=256").fits, "which is not calibrated"


def test_hidden_states_go_to_scratch_when_memory_is_short(odd: Path) -> None:
    settings = ["calibration.sequences=512", "calibration.length=256"]
    free = make("gptq-4bit-g64", odd, *settings)
    held = make("gptq-4bit-g64", odd, *settings, max_memory="100MB")
    assert free.disk and held.disk and free.memory and held.memory
    assert free.disk.scratch_bytes == 0
    assert held.disk.scratch_bytes > 512 * 256 * 192 * 4, "and the rows that wait there"
    assert held.memory.peak_rss_bytes < free.memory.peak_rss_bytes
    assert any("the limit of 100 MB is less than what cannot be spilled" in line for line in held.cautions)
    assert not any("limit" in line for line in free.cautions)
    assert held.time and free.time
    assert held.time.parts_s.pop("scratch file") > 0 and held.time.parts_s == free.time.parts_s
    roomy = make("gptq-4bit-g64", odd, *settings, max_memory="1TB")
    assert roomy.time and roomy.time.parts_s == free.time.parts_s


def test_a_disk_without_room_for_waiting_rows_is_told(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cautions(free: int, *settings: str) -> list[str]:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(free, 0, free))
        held = make("gptq-4bit-g64", odd, "calibration.sequences=512", *settings, max_memory="100MB")
        assert held.disk and held.disk.scratch_bytes > 0
        needed.append(held.disk.artifact_bytes + held.disk.scratch_bytes + SPARE_BYTES)
        return [line for line in held.cautions if line.startswith("disk: ")]

    needed: list[int] = []
    assert not cautions(10**15) and not cautions(needed[0])
    (line,) = cautions(needed[0] - 1)
    assert (
        f"{Path.cwd()}/artifacts has {needed[0] / 1e6:.0f} MB free" in line
        and "rows that are to wait in a file" in line
    )
    assert not cautions(0, "method.propagate=unquantized"), "no rows wait there"


def test_more_text_takes_longer_and_more_memory(odd: Path) -> None:
    small = make("gptq-4bit-g64", odd, "calibration.sequences=8")
    large = make("gptq-4bit-g64", odd, "calibration.sequences=64")
    assert small.time and large.time and small.memory and large.memory
    assert large.time.seconds > small.time.seconds
    assert large.memory.peak_rss_bytes > small.memory.peak_rss_bytes
    # eight times the tokens in what passes through the model
    assert large.time.parts_s["linears"] == pytest.approx(8 * small.time.parts_s["linears"])


def test_the_command_line(odd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["plan", "int8", "--model", str(odd), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert PlanDocument.model_validate(document).recipe == "int8"
    assert execute(["plan", "gptq-4bit-g128", "--model", str(odd)]) == 2
    assert "group_size 128 does not divide in_features 192" in capsys.readouterr().out
    assert execute(["plan", "int8"]) == 2
    assert "no model" in capsys.readouterr().err


def test_a_gguf_source_is_said_to_be_lossy(shared_data: Path) -> None:
    files = sorted(shared_data.rglob("*.gguf"))
    if not files:
        pytest.skip("no GGUF file among the data for checks")
    found = make("int8", files[0])
    assert found.cautions and "stays lost" in found.cautions[0]
