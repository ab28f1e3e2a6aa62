"""quantkit's own run of a comparison's job: `python -m quantkit.reference.own JOB.json ANSWER.json`, as in worker.py.

JOB.json: recipe (with the comparison's token ids as its calibration set), model, device, threads, out and
max_memory_bytes, null for no limit.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Do a job. Returns the answer."""
    from quantkit.quiet import collecting_later

    # as the other engines' imports are made before their clocks start
    with collecting_later():
        import torch
        import transformers.generation
        import transformers.modeling_utils  # noqa: F401

        import quantkit.pipeline  # noqa: F401
        from quantkit.device import resolve_device
        from quantkit.environment import peak_rss_bytes
        from quantkit.jobs import run_passes
        from quantkit.maths.compiled import ready_loops
        from quantkit.memory import MemoryLimit
        from quantkit.model.reader import open_source
        from quantkit.progress import Progress
        from quantkit.recipe import Recipe

        ready_loops()
    torch.set_num_threads(job["threads"])
    device = resolve_device(job["device"])
    wanted = [("quantkit", Recipe.model_validate(job["recipe"]), Path(job["out"]))]
    memory = MemoryLimit(job["max_memory_bytes"])
    (manifest,) = run_passes(wanted, open_source(job["model"]), device, False, Progress(), memory)
    return {
        "quantize_s": manifest.quantize_s,
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_vram_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "versions": {"quantkit": manifest.quantkit_version, "torch": torch.__version__},
    }


def main(job_file: str, answer_file: str) -> None:
    """Read a job, do it, write the answer; ends as commands do, with 1 when that is an error for the user."""
    from quantkit.errors import QuantkitError
    from quantkit.interrupts import end
    from quantkit.quiet import quiet_libraries

    quiet_libraries()
    try:
        answer = work(json.loads(Path(job_file).read_text()))
    except QuantkitError as error:
        print(error.render(), file=sys.stderr)
        answer = {"error": error.message.splitlines()[0]}
    Path(answer_file).write_text(json.dumps(answer))
    end("error" in answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
