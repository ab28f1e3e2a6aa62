"""Every GGUF recipe on one model: bytes, loss by llama.cpp's own logits, and encode time beside llama.cpp's encoder.

    python benchmarks/gguf_types.py measure FOLDER --model MODEL [--set TEXT]
    python benchmarks/gguf_types.py encode FOLDER --model MODEL [--repetitions 2]

`measure` makes the artifacts in FOLDER and measures perplexity, KL and top-1 agreement; `encode` times what they are
encoded with on all cores, so the machine should have nothing else to do. Both write into benchmarks/results/
gguf_types.json. The library that quantkit runs llama.cpp from has no llama_model_quantize; its encoder
ggml_quantize_chunk is given the same weights, rows shared among the same number of threads, as llama_model_quantize
does it. Reading and writing files is in neither time. Needs the extra llama-cpp.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numba
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from quantkit.quiet import quiet_libraries  # noqa: E402

quiet_libraries()

from oracles import llama_cpp  # noqa: E402
from quantkit import jobs  # noqa: E402
from quantkit.bench import divergence, memory  # noqa: E402
from quantkit.bench.run import Run  # noqa: E402
from quantkit.bench.subject import Artifact, Baseline, Subject  # noqa: E402
from quantkit.environment import environment  # noqa: E402
from quantkit.formats import open_artifact  # noqa: E402
from quantkit.formats.imatrix import read_imatrix  # noqa: E402
from quantkit.manifest import read_manifest  # noqa: E402
from quantkit.maths.ggml import encode, type_size  # noqa: E402
from quantkit.model.calibration import load_calibration  # noqa: E402
from quantkit.model.gguf_config import family_of_config  # noqa: E402
from quantkit.model.gguf_names import to_gguf  # noqa: E402
from quantkit.model.reader import open_source  # noqa: E402
from quantkit.progress import Progress  # noqa: E402
from quantkit.recipe import load_recipe  # noqa: E402
from quantkit.sections import CalibrationSection, DivergenceBench  # noqa: E402

CPU = torch.device("cpu")
RESULTS = ROOT / "benchmarks" / "results" / "gguf_types.json"
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("gguf-*.yaml"))


def measure(folder: Path, model: str, text: str, sequences: int, length: int) -> dict[str, Any]:
    """Make every artifact that is not there yet and measure it: all but the encode times of one model."""
    import numpy as np

    source = open_source(model)
    section = DivergenceBench(set=text, sequences=sequences, length=length)
    wanted = CalibrationSection(set=text, sequences=sequences, length=length)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(divergence.ids_path(folder, section), load_calibration(wanted, source.tokenizer_folder(), "evaluation").ids)
    threads = torch.get_num_threads()

    def losses(subject: Subject, baseline: bool) -> dict[str, Any]:
        torch.set_num_threads(threads)  # numba's threads change it
        run = Run(subject, baseline, CPU, folder, source.tokenizer_folder())
        found = divergence.measure(section, run)
        run.close()
        return {
            one.metric: {"value": one.value, "error": one.error, "engine": one.engine, "settings": one.settings}
            for one in found
        }

    rows: dict[str, Any] = {}
    baseline = losses(Baseline(source), True)
    calibration = [f"calibration.{key}" for key in (f"set={text}", "sequences=32", "length=256")]
    for recipe in RECIPES:
        out = folder / recipe
        if not out.exists():
            kept: dict[str, Any] = {"device": "cpu", "force": False, "progress": Progress(quiet=True)}
            jobs.quantize(recipe, model=model, out=out, settings=calibration, **kept)
        made = read_manifest(out)
        assert made is not None
        subject = Artifact(out)
        size = memory.weight_bytes(out)
        rows[recipe] = {
            "method": made.method,
            "bytes": size,
            "bits_per_weight": made.bits_per_weight,
            "bits_per_weight_all": made.bits_per_weight_all,
            "types": open_artifact(out).quantization["types"],
            "linears": len(made.tensors),
            "fell_back": sum("which do not divide its" in line for line in made.fallbacks()),
            "quantize_s": made.quantize_s,
            "losses": losses(subject, False),
        }
        print(recipe, size, json.dumps(rows[recipe]["losses"]), flush=True)
    return {
        "text": {"set": Path(text).name, "sequences": sequences, "length": length},
        "baseline": baseline,
        "threads": threads,
        "recipes": rows,
    }


def in_threads(
    weight: Tensor, type_name: str, importance: Tensor | None, pool: ThreadPoolExecutor, count: int
) -> Tensor:
    """A matrix of any float dtype through ggml_quantize_chunk, rows shared among threads: uint8 [rows, row_bytes]."""
    values = weight.float().contiguous()  # llama.cpp widens first too
    rows, columns = values.shape
    out = torch.empty(rows, type_size(type_name, columns), dtype=torch.uint8)
    number = int(gguf.GGMLQuantizationType[type_name])
    weights = None if importance is None else ctypes.c_void_p(importance.data_ptr())
    library, step = llama_cpp.library(), -(-rows // count)

    def chunk(start: int) -> None:
        wanted = min(step, rows - start)
        library.ggml_quantize_chunk(
            number, values.data_ptr(), out.data_ptr(), start * columns, wanted, columns, weights
        )

    list(pool.map(chunk, range(0, rows, step)))
    return out


def least(work: Callable[[], Tensor], repetitions: int) -> tuple[float, Tensor]:
    """The shortest of several runs, in seconds, and what the last one made."""
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        made = work()
        times.append(time.perf_counter() - started)
    return min(times), made


def encode_times(folder: Path, model: str, recipe: str, repetitions: int) -> dict[str, Any] | None:
    """Seconds of both encoders over all tensors of an artifact, and how many agree; None with GPTQ's rounding."""
    out = folder / recipe
    if getattr(load_recipe(recipe, []).method, "rounding", "nearest") != "nearest":
        return None
    source, artifact = open_source(model), open_artifact(out)
    family = family_of_config(source.config)
    matrix = next(iter(out.glob("*.imatrix")), None)
    weighing = read_imatrix(matrix).entries if matrix else {}
    threads = numba.config.NUMBA_NUM_THREADS
    torch.set_num_threads(threads)
    ours = theirs = 0.0
    equal = count = 0
    with ThreadPoolExecutor(threads) as pool:
        for name in artifact.names():
            stored = artifact.quantized(name)
            if stored is None:
                continue
            kind, entry = stored.type_name, weighing.get(to_gguf(name, family) or "")  # type: ignore[union-attr]
            weight, importance = source.read(name), None if entry is None else entry.mean.contiguous()
            if not count:
                encode(weight[:8], kind, importance)  # loads the compiled loop
            ours += least(lambda w=weight, k=kind, i=importance: encode(w, k, i), repetitions)[0]
            run = lambda w=weight, k=kind, i=importance: in_threads(w, k, i, pool, threads)  # noqa: E731
            seconds, made = least(run, repetitions)
            theirs += seconds
            equal += torch.equal(made, stored.data)  # type: ignore[union-attr]
            count += 1
    return {
        "threads": threads,
        "quantkit_s": ours,
        "llama_cpp_s": theirs,
        "tensors": count,
        "equal_bytes": equal,
    }


def stored() -> dict[str, Any]:
    """What is in the results file by now: the models are measured one by one."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"models": {}}  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "encode"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", help="of the model in the table; its folder's name when left out")
    parser.add_argument("--set", default="pydoc", help="text for calibration, and its evaluation part for the losses")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=1)
    given = parser.parse_args()
    name = given.name or Path(given.model).name
    if given.what == "measure":
        measured = measure(given.folder, given.model, given.set, given.sequences, given.length)
        results = stored()
        results["models"][name] = measured
    else:
        times = {}
        for recipe in RECIPES:
            times[recipe] = encode_times(given.folder, given.model, recipe, given.repetitions)
            print(recipe, json.dumps(times[recipe]), flush=True)
        results = stored()
        for recipe, found in times.items():
            results["models"][name]["recipes"][recipe]["encode"] = found
    results["environment"] = environment()
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
