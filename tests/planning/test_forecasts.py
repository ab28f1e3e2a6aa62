"""The arithmetic of memory and time, against counts by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantkit.device import Arithmetic
from quantkit.maths.attention import CHUNK
from quantkit.maths.int_products import way
from quantkit.memory import HOLES, NEAR, room_within
from quantkit.model.blocks import ARCHITECTURES
from quantkit.model.reader import open_source
from quantkit.plan import plan_linears
from quantkit.planning import memory, shapes, times
from quantkit.planning.memory import memory_of
from quantkit.planning.probe import Probe
from quantkit.planning.shapes import Group, Work, work_of
from quantkit.planning.times import encode_ns, time_of
from quantkit.recipe import Recipe

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROOM = 10**12
EXACT = Arithmetic(torch.float32, torch.float32, False, False)
EIGHT_BITS = Arithmetic(torch.float32, torch.float32, True, True)
UNIT = Probe(
    identity={},
    measured="",
    float32_flop_s=times.REFERENCE_FLOP_S,
    bfloat16_flop_s=2 * times.REFERENCE_FLOP_S,
    int8_op_s=0,
    device_flop_s=None,
    read_bytes_s=1e9,
    write_bytes_s=1e9,
)


def planned(folder: Path, method: dict[str, object], **sections: object) -> tuple[Work, list]:
    recipe = Recipe.model_validate({"method": method, **sections})
    source = open_source(str(folder))
    plans = plan_linears(recipe, source)
    return work_of(recipe, source, plans, CPU), plans


GPTQ = {"name": "gptq", "group_size": 32}


def test_what_is_counted_of_a_model(tiny_llama: Path) -> None:
    work, _ = planned(tiny_llama, GPTQ, calibration={"sequences": 4, "length": 32})
    # q 64, k and v 32 rows on 64 columns; o 64 on 64; gate and up 128 on 64; down 64 on 128
    assert [(group.columns, group.rows) for group in work.groups] == [(64, 128), (64, 64), (64, 256), (128, 64)]
    values = 64 * 128 + 64 * 64 + 64 * 256 + 128 * 64
    assert work.block_values == values and work.blocks == 2 and work.quantized_values == 2 * values
    assert work.block_bytes == 4 * (values + 2 * 64)
    assert (work.hidden, work.attention, work.widest, work.tokens) == (64, 64, 128, 128)
    assert work.largest_linear_values == 128 * 64 and work.kind == "calibrated" and work.propagates


def test_the_peak_of_a_calibrated_run(tiny_llama: Path) -> None:
    work, _ = planned(tiny_llama, GPTQ, calibration={"sequences": 4, "length": 32})
    found = memory_of(work, CPU, ROOM).host
    assert found["libraries"] == memory.LIBRARIES_BYTES["calibrated"]
    assert found["hidden states"] == 128 * 64 * 4
    assert found[memory.ROWS] == 128 * memory._sizes(work, CPU).waiting_bytes // work.length
    # gate and up on 64 columns: their Gram matrix, their weights and two like them, those of down still to come
    solved = int(memory.GRAM_BYTES * 64**2) + 12 * 64 * 256
    assert found["Gram matrix and weights at hand"] == solved
    stored = work.block_bytes / work.block_values
    assert found["weights to round"] == int(stored * 128 * 64)
    # the block as it is stored and in the model, every Gram matrix
    looked = work.block_bytes + 4 * (3 * 64**2 + 128**2) + work.how.linears.itemsize * work.block_values
    looked += found["activations of a batch"]
    kept = found.pop("freed, not given back")
    rounding = sum(found.values()) - found["libraries"] - found["hidden states"]
    assert kept == pytest.approx(memory.RETAINED * (rounding + looked), abs=2)
    wide = memory_of(replace(work, groups=(*work.groups, Group(16384, 4096))), CPU, ROOM).host
    assert wide["freed, not given back"] == memory.RETAINED_BYTES, "more goes back"


def test_scores_of_long_sequences_count(tiny_llama: Path) -> None:
    work, _ = planned(tiny_llama, GPTQ, calibration={"sequences": 4, "length": 1024})
    short, long = (memory_of(replace(work, length=length), CPU, ROOM) for length in (1024, 4096))
    more = CHUNK * 3072 * work.heads * (4 + work.how.linears.itemsize) + 4 * 3072 * (4 * 64 + 2 * 256)
    apart = long.host["activations of a batch"] - short.host["activations of a batch"]
    assert apart == pytest.approx(more, abs=2)


def test_wide_linears_are_rounded_in_bands_of_rows(tiny_llama: Path) -> None:
    work, _ = planned(tiny_llama, GPTQ, calibration={"sequences": 4, "length": 32})
    wide = replace(work, groups=(*work.groups, Group(4096, 2048)), block_bytes=2 * 4096 * 2048)
    found = memory_of(wide, CPU, ROOM, limited=True).host["Gram matrix and weights at hand"]
    # the stacked weights and the rounded ones; what is owed to a band and its product are less
    assert found == int(memory.GRAM_BYTES * 4096**2) + 8 * 4096 * 2048


def test_where_freed_memory_goes_back_a_batch_and_the_solver_take_turns(tiny_llama: Path) -> None:
    work, _ = planned(tiny_llama, GPTQ, calibration={"sequences": 4, "length": 32})
    free, held = (memory._block_parts(work, CPU, returned) for returned in (False, True))
    solving = held["Gram matrix and weights at hand"] - 4 * 64**2
    assert 0 < held["activations of a batch"] == free["activations of a batch"] - solving
    much = replace(work, groups=(*work.groups, Group(4096, 2048)))
    assert memory._block_parts(much, CPU, True)["activations of a batch"] == 0


def limit_for(room: int, held: int) -> int:
    """The least limit that leaves so much room beside what is held."""
    near = int((room / (1 - HOLES) + held) / (1 - NEAR))
    return next(limit for limit in range(near - 8, near + 8) if room_within(limit, held) >= room)


def test_rows_do_not_wait_and_states_spill_where_there_is_no_room(tiny_llama: Path) -> None:
    work, _ = planned(tiny_llama, GPTQ, calibration={"sequences": 4, "length": 32})
    tight = memory_of(work, CPU, 1000)
    assert memory.ROWS not in tight.host and "hidden states" not in tight.host
    sizes = memory._sizes(work, CPU)
    assert tight.scratch_bytes == 128 * 64 * 4 + sizes.file_bytes(4) and tight.again == 0
    assert tight.filed_bytes == 4 * sizes.filed_bytes > 0


def test_rows_whose_states_lie_in_a_file_hold_them_in_memory_while_they_wait(tiny_llama: Path) -> None:
    work, _ = planned(tiny_llama, GPTQ, calibration={"sequences": 512, "length": 32})
    states = work.tokens * 64 * 4
    limit = limit_for(3 * states, memory.LIBRARIES_BYTES["calibrated"])
    found = memory_of(work, CPU, limit, limited=True)
    assert "hidden states" not in found.host
    in_file, here = (memory._sizes(work, CPU, in_memory=at) for at in (False, True))
    assert in_file.waiting_bytes == here.waiting_bytes + 32 * 64 * 4
    held = 512 - found.filed_bytes // in_file.filed_bytes
    assert found.host[memory.ROWS] == held * in_file.waiting_bytes > 0


def test_a_gpu_has_room_of_its_own_for_rows_that_wait(tiny_llama: Path) -> None:
    work, _ = planned(tiny_llama, GPTQ, calibration={"sequences": 512, "length": 32})
    sizes = memory._sizes(work, CUDA)
    room = sizes.taken_bytes + 256 * sizes.waiting_bytes + work.block_bytes // 2  # half of what it takes is missing
    found = memory_of(work, CUDA, 1000, limited=True, device_room_bytes=room)
    assert found.again == 0.5 and found.device[memory.ROWS] == 256 * sizes.waiting_bytes
    assert found.scratch_bytes > 0, "the host's are another matter"


def test_a_limit_leaves_room_for_some_of_the_rows(tiny_llama: Path) -> None:
    work, plans = planned(tiny_llama, GPTQ, calibration={"sequences": 128, "length": 32})
    sizes = memory._sizes(work, CPU)
    assert sizes.shapes == ((128, 64), (64, 64), (256, 64), (64, 128)) and sizes.batch == 32
    held = memory.LIBRARIES_BYTES["calibrated"] + work.block_bytes + work.tokens * 64 * 4
    limit = limit_for(sizes.taken_bytes + 33 * sizes.waiting_bytes, held)
    found = memory_of(work, CPU, limit, limited=True)
    assert found.host[memory.ROWS] == 32 * sizes.waiting_bytes
    assert found.filed_bytes == 96 * sizes.filed_bytes and found.scratch_bytes == sizes.file_bytes(96)
    assert sizes.file_bytes(1) == sizes.waiting_bytes + 32 * 64 * 4, "states of those that wait in a file stay"
    half = held - held // 2 + sizes.taken_bytes  # without a limit, of what is held half is missing then
    assert memory_of(work, CPU, half + 65 * sizes.waiting_bytes).filed_bytes == 64 * sizes.filed_bytes
    work = replace(work, how=EXACT)
    kept, filed = (time_of(work, plans, UNIT, 0, size).parts for size in (0, 10**6))
    assert filed.pop("scratch file") == 10**6 * work.blocks * (1 / UNIT.write_bytes_s + 1 / UNIT.read_bytes_s)
    assert filed == kept
    all_wait, few = (time_of(work, plans, UNIT, 0, 0, again).parts for again in (0.0, 0.75))
    # q, k and v are passed by those that start again for the other three groups, o by two, gate and up by one
    again = 0.75 * (3 * 64 * 128 + 2 * 64 * 64 + 64 * 256) / work.block_values
    assert few["linears"] == pytest.approx(all_wait["linears"] * (1 + again))
    assert few["attention"] == pytest.approx(all_wait["attention"] * (1 + 3 * 0.75))
    assert few["Gram matrices"] == all_wait["Gram matrices"] and few["solving"] == all_wait["solving"]


def test_unquantized_inputs_hold_grams_of_narrower_groups_and_no_rows(tiny_llama: Path) -> None:
    work, _ = planned(tiny_llama, GPTQ | {"propagate": "unquantized"}, calibration={"sequences": 4, "length": 32})
    found = memory_of(work, CPU, ROOM).host
    assert memory.ROWS not in found
    looking = memory._looking_parts(work)
    assert found == found | looking, "a batch of so small a block is more than rounding it"
    assert looking["Gram matrices"] == 4 * (3 * 64**2 + 128**2)
    rounding = memory._block_parts(work, CPU, False)
    # the widest group's Gram matrix is gone, two others are there
    solved = int(memory.GRAM_BYTES * 64**2) + 12 * 64 * 256 + 2 * 4 * 64**2
    assert rounding.pop("Gram matrix and weights at hand") == solved
    assert rounding == {"codes": work.block_values, "block as stored": work.block_bytes}, "the module is empty"
    thin = Group(1024, 1)  # little to round by a large matrix: its quotient by the scale lies beside it for a while
    assert memory._solve_bytes(thin, replace(work, groups=(Group(64, 64), thin)), CPU) == 4 * 64**2 + 8 * 1024**2


def test_under_a_limit_so_much_is_left_of_what_was_freed_as_it_has_room_for(tiny_llama: Path) -> None:
    work, _ = planned(tiny_llama, GPTQ, calibration={"sequences": 32, "length": 32})
    work = replace(work, groups=4 * (Group(64, 64),))  # a block whose statistics are larger than its solving
    free, held = memory_of(work, CPU, ROOM).host, memory_of(work, CPU, ROOM, limited=True).host
    assert min(found["freed, not given back"] for found in (free, held)) > 1000
    assert 0 < held["weights to round"] == free["weights to round"]
    tight = memory_of(work, CPU, 1000, limited=True).host
    least = sum(tight.values())
    assert tight["freed, not given back"] == 0
    assert memory_of(work, CPU, least + 1000, limited=True).host["freed, not given back"] == 1000
    wide = replace(work, block_bytes=10**9)
    assert memory_of(wide, CPU, ROOM, limited=True).host["block as stored"] == 10**9


def test_on_a_gpu_the_block_is_the_gpus(tiny_llama: Path) -> None:
    work, _ = planned(tiny_llama, GPTQ, calibration={"sequences": 4, "length": 32})
    found = memory_of(work, CUDA, ROOM)
    assert found.peak_vram_bytes == sum(found.device.values()) > 0
    assert "Gram matrix and weights at hand" in found.device and "Gram matrix and weights at hand" not in found.host
    assert found.host["CUDA"] == memory.CUDA_BYTES


@pytest.mark.parametrize(
    ("method", "kind"),
    [({"name": "nf4"}, "plain"), ({"name": "int8"}, "compiled"), ({"name": "ggml", "type": "q8_0"}, "gguf")],
)
def test_an_uncalibrated_run_holds_its_largest_linear(method: dict[str, object], kind: str, tiny_llama: Path) -> None:
    work, _ = planned(tiny_llama, method)
    found = memory_of(work, CPU, ROOM)
    assert found.host == {
        "libraries": memory.LIBRARIES_BYTES[kind],
        "largest linear and its codes": int(memory.LARGEST_LINEAR_BYTES[kind] * 128 * 64),
    }
    assert found.device == {} and found.scratch_bytes == 0


def test_the_head_of_a_gguf_file_goes_through_in_parts(tiny_llama: Path) -> None:
    work, plans = planned(tiny_llama, {"name": "ggml", "type": "q8_0"}, skip=[])
    assert any(plan.name == "lm_head" and plan.method is not None for plan in plans)
    assert work.largest_linear_values == 128 * 64 < 384 * 64


def test_the_seconds_of_a_calibrated_run(tiny_llama: Path) -> None:
    work, plans = planned(tiny_llama, GPTQ | {"refine": 1}, calibration={"sequences": 4, "length": 32})
    work = replace(work, how=EXACT)
    parts = time_of(work, plans, UNIT, 10**9).parts
    rate, blocks, tokens = times.REFERENCE_FLOP_S, 2, 128
    assert parts["writing"] == 1.0 and parts["reading"] == pytest.approx(work.source_bytes / 1e9)
    assert parts["linears"] == pytest.approx(blocks * 2 * tokens * work.block_values * times.LINEAR_SLOWDOWN / rate)
    attention = blocks * 2 * tokens * 32 * 64
    assert parts["attention"] == pytest.approx(attention * times.ATTENTION_SLOWDOWN["torch"] / rate)
    assert parts["Gram matrices"] == pytest.approx(blocks * tokens * (3 * 64 * 65 + 128 * 129) / rate)
    rounding = times.MOVE_SLOWDOWN * 3 * (64**2 * (128 + 64 + 256) + 128**2 * 64)  # one sweep
    factors = times.FACTOR_FLOP * (3 * 64**3 + 128**3)
    solve = rounding + factors + times.VALUE_FLOP * work.block_values
    assert parts["solving"] == pytest.approx(blocks * solve / rate)
    assert "rounding" not in parts
    paired, plans = planned(tiny_llama, GPTQ | {"refine": 1, "pairs": 2}, calibration={"sequences": 4, "length": 32})
    more = times.MOVE_SLOWDOWN * 2 * times.PAIR_FLOP * (64**2 * (128 + 64 + 256) + 128**2 * 64)
    assert time_of(paired, plans, UNIT, 10**9).parts["solving"] == pytest.approx(blocks * (solve + more) / rate)


@pytest.mark.parametrize("ours", [True, False])
def test_attention_in_one_loop_counts_where_it_is_used(
    ours: bool, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(times, "has_own_loops", lambda dtype: ours)
    work, plans = planned(tiny_llama, GPTQ, calibration={"sequences": 4, "length": 32})
    exact, rounded = (time_of(replace(work, how=how), plans, UNIT, 0).parts for how in (EXACT, EIGHT_BITS))
    slowdown = times.ATTENTION_SLOWDOWN
    share = slowdown["own loops"] / slowdown["torch"] if ours else 1.0
    assert rounded["attention"] == pytest.approx(exact["attention"] * share)
    on_gpu = UNIT.model_copy(update={"device_flop_s": times.REFERENCE_FLOP_S})
    found = time_of(replace(work, how=EIGHT_BITS), plans, on_gpu, 0).parts
    assert found["attention"] == pytest.approx(exact["attention"])


def test_faster_products_count_where_they_are_used(tiny_llama: Path) -> None:
    work, plans = planned(tiny_llama, GPTQ, calibration={"sequences": 4, "length": 32})
    fast = UNIT.model_copy(update={"int8_op_s": 4 * times.REFERENCE_FLOP_S})
    plain = replace(work, how=EXACT)
    mixed = replace(work, how=Arithmetic(torch.float32, torch.bfloat16, True, False))
    before, after = time_of(plain, plans, fast, 0).parts, time_of(mixed, plans, fast, 0).parts
    assert after["linears"] == pytest.approx(before["linears"] / 2)
    assert after["Gram matrices"] == pytest.approx(before["Gram matrices"] * times.GRAM_SLOWDOWN[way().name] / 4)
    eighth = replace(work, how=EIGHT_BITS, run_columns=None)
    in_eight = before["linears"] / 4

    def linears(work: Work) -> float:
        return time_of(work, plans, fast, 0).parts["linears"]

    assert linears(eighth) == pytest.approx(in_eight)
    assert linears(replace(eighth, architecture=ARCHITECTURES["GPT2LMHeadModel"])) == pytest.approx(
        before["linears"]
    ), "Conv1D stays as it is"
    few = replace(eighth, run_columns=64)
    assert linears(few) == pytest.approx(in_eight / times.FOUR_BIT_SPEEDUP)
    assert linears(replace(few, propagates=False)) == pytest.approx(in_eight), "what runs is then not rounded"
    twice = in_eight / times.FOUR_BIT_SPEEDUP + in_eight
    assert linears(replace(few, corrects=True)) == pytest.approx(twice), "nor is what goes along"


def test_rounded_weights_that_are_multiplied_by_their_codes(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "arithmetic", lambda *_, **__: EIGHT_BITS)
    small = {"sequences": 4, "length": 32}
    narrow = planned(tiny_llama, GPTQ | {"group_size": 32}, calibration=small)[0]
    assert narrow.run_columns is None, "not without the arithmetic"
    monkeypatch.setattr(shapes, "arithmetic", lambda *_, **__: replace(EIGHT_BITS, four_bit_linears=True))
    narrow, wide, fine = (
        planned(tiny_llama, GPTQ | {"group_size": size}, calibration=small)[0] for size in (32, 64, 16)
    )
    assert (narrow.run_columns, wide.run_columns, fine.run_columns) == (32, 64, None)
    assert (narrow.rounded_bytes, wide.rounded_bytes) == (1.25, 1.125) and fine.rounded_bytes == fine.model_bytes
    skipped = planned(tiny_llama, GPTQ | {"group_size": 32}, calibration=small, skip=["lm_head", "k_proj"])[0]
    assert skipped.run_columns is None, "what stays is multiplied in 8 bits"
    for work in (narrow, wide, fine):
        running = memory_of(work, CPU, ROOM).host["block in the model"]
        assert running == int(work.block_values * work.rounded_bytes)
    corrected = replace(wide, corrects=True)
    both = memory_of(corrected, CPU, ROOM).host["block in the model"]
    assert both == int(wide.block_values * (1.125 + wide.model_bytes))


@pytest.mark.parametrize("kind", ["q8_0", "q4_k_m", "iq4_xs", "q2_k"])
def test_every_type_has_a_rate(kind: str, tiny_llama: Path) -> None:
    work, plans = planned(tiny_llama, {"name": "ggml", "type": kind})
    assert all(encode_ns(plan) > 0 for plan in plans if plan.method is not None)
    parts = time_of(work, plans, UNIT, 0).parts
    assert parts["rounding"] > 0 and "solving" not in parts


def test_an_importance_is_calibrated_but_nothing_is_solved(tiny_llama: Path) -> None:
    method = {"name": "ggml", "type": "q4_k_m", "importance": True}
    work, plans = planned(tiny_llama, method, calibration={"sequences": 4, "length": 32})
    parts = time_of(work, plans, UNIT, 0).parts
    assert {"rounding", "linears"} <= parts.keys() and "solving" not in parts
