"""One quantization job by one reference engine: run as a script by the python of that engine's own environment.

    python worker.py JOB.json ANSWER.json

Nothing of quantkit is imported: this file runs in foreign environments. JOB.json: engine, model (folder), ids (JSON
file with `ids`, rows of equally many token ids; null for methods without calibration), method, bits, group_size (null:
whole row), symmetric, act_order, double_quant, dtype (that the engine computes in), storage_dtype (of what stays
unquantized), threads, out (folder to write), versions (packages whose versions to tell). ANSWER.json: load_s,
quantize_s, save_s, peak_rss_bytes (null where the system does not tell), peak_vram_bytes (null without a GPU) and
versions, or error.
"""

# mypy: disable-error-code="import-not-found"
# What is imported here is in the environments of other engines.

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Job = dict[str, Any]
Rows = list[list[int]]


class Clock:
    """Seconds of each stage of a job."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[f"{stage}_s"] = time.perf_counter() - started


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype_of(job: Job, key: str = "dtype") -> Any:
    import torch

    return getattr(torch, job[key])


def whole_row(job: Job) -> int:
    """The group size in the words of engines that call a whole row -1."""
    return job["group_size"] or -1


def masked(rows: Rows) -> list[dict[str, Any]]:
    """Rows as [1, length] tensors, nothing of them padding."""
    import torch

    return [{"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row)).long()} for row in rows]


def gptqmodel(job: Job, rows: Rows, clock: Clock) -> None:
    # its pool has a thread for each two cores unless told; read when it is imported
    os.environ["GPTQMODEL_CPU_WORKERS"] = str(job["threads"])
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    settings: dict[str, Any] = {
        "bits": job["bits"],
        "group_size": whole_row(job),
        "sym": job["symmetric"],
        "quant_method": job["method"],
        "device": device(),
    }
    backend = BACKEND.AUTO
    if job["method"] == "gptq":
        settings["desc_act"] = job["act_order"]
    else:
        settings["format"] = "gemm"
        # without this backend its AWQ refuses a CPU
        backend = BACKEND.AWQ_TORCH if device() == "cpu" else BACKEND.AUTO
    with clock("load"):
        model = GPTQModel.load(job["model"], QuantizeConfig(**settings), dtype=dtype_of(job))
    data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    with clock("quantize"):
        model.quantize(data, batch_size=1, backend=backend)
    with clock("save"):
        model.save(job["out"])


def llmcompressor(job: Job, rows: Rows, clock: Clock) -> None:
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from transformers import AutoModelForCausalLM

    with clock("load"):
        model: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype_of(job))
        model.to(device())
    weights = QuantizationArgs(
        num_bits=job["bits"],
        symmetric=job["symmetric"],
        strategy="group" if job["group_size"] else "channel",
        group_size=job["group_size"],
    )
    scheme = {
        "config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        "ignore": ["lm_head"],
    }
    steps: list[Any] = [QuantizationModifier(**scheme)]
    if job["method"] == "gptq":
        steps = [GPTQModifier(**scheme, dampening_frac=0.01, actorder="static" if job["act_order"] else None)]
    elif job["method"] == "awq":
        steps = [AWQModifier(), *steps]
        if device() == "cpu":
            # pinned memory is for copies to a GPU; asking for it without one is an error
            torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign, assignment]
    settings: dict[str, Any] = {}
    if job["method"] != "rtn":
        settings = {
            "dataset": Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}),
            "num_calibration_samples": len(rows),
            "max_seq_length": len(rows[0]),
            "shuffle_calibration_samples": False,
        }
    with clock("quantize"):
        oneshot(model=model, recipe=steps, **settings)
    with clock("save"):
        model.to(dtype_of(job, "storage_dtype"))
        model.save_pretrained(job["out"], save_compressed=True)


def auto_round(job: Job, rows: Rows, clock: Clock) -> None:
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with clock("load"):
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype_of(job))
        tokenizer = AutoTokenizer.from_pretrained(job["model"])
    # it has AWQ's scales, but no GPTQ: a job for GPTQ gets its own way of rounding, in GPTQ's format
    algorithm = {"gptq": "signround", "awq": "awq", "rtn": "rtn"}[job["method"]]
    settings: dict[str, Any] = {"iters": job["iterations"]} if algorithm == "signround" else {}
    if rows:
        settings |= {"dataset": masked(rows), "nsamples": len(rows), "seqlen": len(rows[0])}
    with clock("quantize"):
        rounder = AutoRound(
            model,
            alg_configs=algorithm,
            tokenizer=tokenizer,
            bits=job["bits"],
            group_size=whole_row(job),
            sym=job["symmetric"],
            device_map=device(),
            **settings,
        )
        rounder.quantize()
    with clock("save"):
        rounder.save_quantized(job["out"], format="auto_awq" if job["method"] == "awq" else "auto_gptq")


def autoawq(job: Job, rows: Rows, clock: Clock) -> None:
    from awq import AutoAWQForCausalLM

    with clock("load"):
        model = AutoAWQForCausalLM.from_pretrained(job["model"], torch_dtype=dtype_of(job), device_map=device())
    settings = {
        "w_bit": job["bits"],
        "q_group_size": whole_row(job),
        "zero_point": not job["symmetric"],
        "version": "GEMM",
    }
    with clock("quantize"):
        # without a tokenizer: the data are token ids already
        model.quantize(
            None, quant_config=settings, calib_data=rows, max_calib_samples=len(rows), max_calib_seq_len=len(rows[0])
        )
    with clock("save"):
        model.model.to(dtype_of(job, "storage_dtype"))
        model.save_quantized(job["out"])


def auto_gptq(job: Job, rows: Rows, clock: Clock) -> None:
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig

    settings = BaseQuantizeConfig(
        bits=job["bits"], group_size=whole_row(job), sym=job["symmetric"], desc_act=job["act_order"]
    )
    with clock("load"):
        model = AutoGPTQForCausalLM.from_pretrained(job["model"], settings, torch_dtype=dtype_of(job))
    with clock("quantize"):
        model.quantize(masked(rows), batch_size=1)
    with clock("save"):
        model.save_quantized(job["out"], use_safetensors=True)


def bitsandbytes(job: Job, rows: Rows, clock: Clock) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_8bit=True)
    if job["method"] == "nf4":
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=job["double_quant"],
            bnb_4bit_compute_dtype=dtype_of(job),
        )
    # it quantizes while it loads: there is no stage before
    with clock("quantize"):
        model = AutoModelForCausalLM.from_pretrained(
            job["model"], quantization_config=settings, dtype=dtype_of(job), device_map=device()
        )
    with clock("save"):
        model.save_pretrained(job["out"])


ENGINES: dict[str, Callable[[Job, Rows, Clock], None]] = {
    "gptqmodel": gptqmodel,
    "llmcompressor": llmcompressor,
    "auto-round": auto_round,
    "autoawq": autoawq,
    "auto-gptq": auto_gptq,
    "bitsandbytes": bitsandbytes,
}


def peak_rss_bytes() -> int | None:
    """The most memory this process has had, from its own memory map; None where the system has no such thing."""
    try:
        with open("/proc/self/status") as stream:
            for line in stream:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def work(job: Job) -> dict[str, Any]:
    """Do a job. Returns the answer."""
    from importlib.metadata import version

    import torch

    torch.set_num_threads(job["threads"])
    rows: Rows = []
    if job["ids"]:
        with open(job["ids"]) as stream:
            rows = json.load(stream)["ids"]
    clock = Clock()
    ENGINES[job["engine"]](job, rows, clock)
    vram = torch.cuda.max_memory_allocated() if device() == "cuda" else None
    return {**clock.seconds, "peak_vram_bytes": vram, "versions": {name: version(name) for name in job["versions"]}}


def main(job_file: str, answer_file: str) -> None:
    """Read a job, do it, write the answer; exits with 1 when that is an error."""
    with open(job_file) as stream:
        job = json.load(stream)
    try:
        answer = work(job)
    except Exception as error:
        traceback.print_exc()
        # a bare assertion says nothing: the line it stands in does
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = str(error).strip() or f"{place.line} ({os.path.basename(place.filename)}:{place.lineno})"
        answer = {"error": f"{type(error).__name__}: {text.splitlines()[0]}"}
    answer["peak_rss_bytes"] = peak_rss_bytes()
    with open(answer_file, "w") as stream:
        json.dump(answer, stream)
    sys.exit("error" in answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
