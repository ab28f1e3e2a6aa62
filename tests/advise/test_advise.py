"""Every branch of the advice: what fits, what an engine reads, what was measured, what is said when nothing helps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantkit.advise.answers import Advice, advise, answer
from quantkit.advise.candidates import UNQUANTIZED, Candidate
from quantkit.advise.needs import cache_bytes, needed, parameters_that_fit
from quantkit.advise.rules import load_rules
from quantkit.advise.text import text
from quantkit.bench.measurement import Results
from quantkit.cli import execute
from quantkit.errors import DataError, UsageError
from quantkit.recipe import load_recipe
from report.results_samples import measured, results, row

RULES = load_rules()
PROBLEMS = ["memory", "per-token", "first-token", "throughput"]


def first(advice: Advice, problem: str) -> str | None:
    (answer,) = [answer for answer in advice.answers if answer.problem == problem]
    return answer.recipes[0] if answer.recipes else None


def of(advice: Advice, recipe: str) -> Candidate:
    return next(candidate for candidate in advice.candidates if candidate.recipe == recipe)


def test_memory_is_weights_cache_and_overhead() -> None:
    assert needed(1e9, 2e8, RULES) == pytest.approx(1.05e9 + 2e8 + 3e8)
    # Llama 2 7B: 32 layers, 32 heads of 128, 2 bytes each for key and value: 512 KiB a token
    llama = {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096}
    assert cache_bytes(llama, 1, RULES) == 512 * 1024
    assert cache_bytes(llama | {"num_key_value_heads": 8}, 4096, RULES) == 4096 * 128 * 1024
    assert cache_bytes({"n_layer": 12, "n_head": 12, "n_embd": 768}, 1, RULES) == 2 * 12 * 768 * 2
    assert cache_bytes({"hidden_size": 64}, 1, RULES) is None
    # 5.7e9 bytes at 8 bits, 5% of them for the engine
    assert parameters_that_fit(6e9, 8.0, RULES) == pytest.approx(5.7e9 / 1.05)
    assert parameters_that_fit(1e8, 8.0, RULES) == 0


def test_without_a_model_every_complaint_has_an_answer_and_no_bytes_are_made_up() -> None:
    advice = advise("6GB")
    assert [answer.problem for answer in advice.answers] == PROBLEMS
    assert all(answer.recipes for answer in advice.answers)
    assert all(candidate.needed_bytes is None and candidate.fits is None for candidate in advice.candidates)
    assert of(advice, "gguf-q4_0").parameters_that_fit == pytest.approx(5.7e9 / 1.05 / (4.5 / 8))
    assert "no model was named" in text(advice)


def test_bytes_are_counted_from_the_models_headers(tiny_llama: Path) -> None:
    advice = advise("1GB", model=str(tiny_llama))
    plain = of(advice, UNQUANTIZED)
    assert plain.weight_bytes is not None and plain.cache_bytes is not None
    # 2 layers, 2 KV heads of 16, and the 256 tokens that the model takes at most
    assert plain.cache_bytes == 2 * 2 * 2 * 16 * 256 * 2
    assert plain.needed_bytes == int(1.05 * plain.weight_bytes + plain.cache_bytes + 300e6)
    assert plain.sequences == int((1e9 - 1.05 * plain.weight_bytes - 300e6) // plain.cache_bytes)
    int8 = of(advice, "int8")
    assert int8.weight_bytes is not None and int8.weight_bytes < plain.weight_bytes
    assert of(advise("1GB", model=str(tiny_llama), context=64), "int8").cache_bytes == plain.cache_bytes / 4


def test_what_fits_as_it_is_needs_no_quantization(tiny_llama: Path) -> None:
    advice = advise("1GB", model=str(tiny_llama))
    assert first(advice, "memory") == UNQUANTIZED
    assert first(advice, "first-token") == UNQUANTIZED


def test_of_what_fits_the_most_bits_are_kept(tiny_llama: Path) -> None:
    everything = advise("1GB", model=str(tiny_llama))
    sizes = sorted({c.needed_bytes for c in everything.candidates if c.needed_bytes is not None})
    # room for all but the largest: the model as it is
    advice = advise(str(sizes[-1] - 1), model=str(tiny_llama))
    chosen = first(advice, "memory")
    assert chosen is not None and chosen != UNQUANTIZED
    fitting = [c for c in advice.candidates if c.fits]
    assert of(advice, chosen).bits_per_weight == pytest.approx(max(c.bits_per_weight for c in fitting), abs=0.5)
    # decoding reads the weights: the fewest bits of those that are usable
    quick = first(advice, "per-token")
    assert quick is not None
    usable = [c.bits_per_weight for c in fitting if c.bits_per_weight >= RULES.usable_bits]
    assert of(advice, quick).bits_per_weight == min(usable) < 5


def test_fewer_than_four_bits_only_where_no_more_fit() -> None:
    advice = advise("6GB", engine="llama.cpp")
    assert first(advice, "per-token") == "gguf-iq4_xs"
    assert of(advice, "gguf-q2_k").bits_per_weight < RULES.usable_bits
    low = of(advice, "gguf-q2_k")
    high = of(advice, "gguf-q4_0")
    rule = RULES.problems["per-token"]
    assert answer("per-token", rule, [low, high], RULES, None).recipes == ("gguf-q4_0", "gguf-q2_k")
    too_large = high.model_copy(update={"fits": False})
    assert answer("per-token", rule, [low, too_large], RULES, None).recipes == ("gguf-q2_k",)


def test_when_nothing_fits_the_distance_is_said(tiny_llama: Path) -> None:
    advice = advise("10MB", model=str(tiny_llama))
    assert all(answer.recipes == () for answer in advice.answers)
    assert all("nothing fits: the smallest" in answer.reasons[0] for answer in advice.answers)


def test_shapes_that_do_not_fit_are_named_with_what_would(tiny_llama: Path) -> None:
    reason = advise("1GB", model=str(tiny_llama)).left_out["gptq-4bit-g128"]
    assert "group_size 128 does not divide in_features 64" in reason
    assert "method.group_size=64" in reason


def test_an_engine_gets_what_it_reads() -> None:
    advice = advise("6GB", engine="llama.cpp")
    assert {candidate.format for candidate in advice.candidates} == {"gguf"}
    assert advice.left_out["int8"] == "llama.cpp does not read bitsandbytes"
    assert advise("6GB", engine="vLLM").left_out["gguf-q4_0"] == "vLLM does not read gguf"
    with pytest.raises(UsageError, match='--engine: "llama.ccp" is not known') as caught:
        advise("6GB", engine="llama.ccp")
    assert "llama.cpp" in caught.value.message


def test_what_an_engine_asks_of_a_method_is_checked() -> None:
    vllm = RULES.engine("vllm")
    asymmetric = load_recipe("gptq-4bit-g128", ["method.symmetric=false"])
    assert vllm.refuses(load_recipe("gptq-4bit-g128")) is None
    assert vllm.refuses(asymmetric) == "reads autogptq with symmetric True only, not False"
    three = vllm.refuses(load_recipe("gptq-4bit-g128", ["method.bits=3"]))
    assert three == "reads autogptq with bits 4 or 8 only, not 3"


def test_throughput_is_for_engines_that_serve_many(tiny_llama: Path) -> None:
    advice = advise("6GB", problem="throughput")
    chosen = first(advice, "throughput")
    assert chosen is not None
    assert of(advice, chosen).format in {"autoawq", "autogptq", "compressed-tensors"}
    reasons = advise("1GB", model=str(tiny_llama), problem="throughput").answers[0].reasons
    assert any("sequences fit beside the weights" in reason for reason in reasons)


def saved(folder: Path, given: Results) -> Path:
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(given.model_dump_json())
    return folder


def result_row(recipe: str, **changes: float) -> object:
    loaded = load_recipe(recipe)
    units = {"decode": "tok/s", "prefill": "tok/s", "kl": "nats"}
    replaced = {key: measured(key, value, units[key]) for key, value in changes.items()}
    made = row(recipe, name=loaded.method.name, replaced=replaced)
    return made.model_copy(update={"method": loaded.method.label(), "format": loaded.resolved_format.name})


def test_measured_speed_goes_before_arithmetic(tmp_path: Path) -> None:
    by_arithmetic = first(advise("6GB", problem="per-token"), "per-token")
    assert by_arithmetic == "nf4-double"
    given = results(result_row("int8", decode=240.0), result_row("gguf-q4_0", decode=6.0))  # type: ignore[arg-type]
    advice = advise("6GB", problem="per-token", results=saved(tmp_path / "a", given).parent)
    assert first(advice, "per-token") == "int8"
    assert any("decode at 10.00 times the baseline's speed" in reason for reason in advice.answers[0].reasons)
    assert of(advice, "gguf-q4_0").measured[0].decode_speedup == pytest.approx(0.25)


def test_a_measured_prompt_speed_decides_the_first_token(tmp_path: Path) -> None:
    given = results(result_row("nf4", prefill=480.0), result_row("int8", prefill=120.0))  # type: ignore[arg-type]
    advice = advise("6GB", problem="first-token", results=saved(tmp_path / "a", given).parent)
    assert first(advice, "first-token") == "nf4"
    # 0.5 times the baseline's speed is worse than what nobody measured
    assert advice.answers[0].recipes[-1] != "int8"


def test_quality_of_the_same_model_goes_before_bits(tmp_path: Path, tiny_llama: Path) -> None:
    everything = advise("1GB", model=str(tiny_llama))
    largest = of(everything, UNQUANTIZED).needed_bytes
    assert largest is not None
    given = results(result_row("gguf-q4_0", kl=0.001), result_row("gguf-q5_0", kl=0.5))  # type: ignore[arg-type]
    same = given.model_copy(update={"model": tiny_llama.name})
    own = saved(tmp_path / "own" / "x", same).parent
    assert first(advise(str(largest - 1), model=str(tiny_llama), results=own), "memory") == "gguf-q4_0"
    # another model's KL is told and decides nothing
    other = advise(str(largest - 1), model=str(tiny_llama), results=saved(tmp_path / "other" / "x", given).parent)
    assert first(other, "memory") != "gguf-q4_0"


def test_a_folder_without_results_and_a_size_that_is_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no results\.json in it"):
        advise("6GB", results=tmp_path)
    with pytest.raises(UsageError, match="--memory: found"):
        advise("lots")
    with pytest.raises(UsageError, match="expected more than nothing"):
        advise("0GB")


def test_the_command_prints_text_or_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["advise", "--memory", "6GB", "--engine", "llama.cpp", "--problem", "memory"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("for 6000.0 MB, run by llama.cpp\n\nit does not fit: gguf-q8_0\n")
    assert "it is too slow" not in said
    assert max(map(len, said.splitlines())) <= 100
    assert execute(["advise", "--memory", "6GB", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert Advice.model_validate(document).memory_bytes == 6_000_000_000


def test_yardsticks_are_not_advised() -> None:
    advice = advise("6GB")
    for name in ("rtn-4bit-g128", "awq-4bit-g128-nearest", "gptq-4bit-g64-plain"):
        assert advice.left_out[name] == "a yardstick for the others"
    assert of(advice, "rtn-w8a16").bits_per_weight > 8
