"""quantkit's own run of a comparison's job: `python -m quantkit.reference.own JOB.json ANSWER.json`, as in worker.py.

JOB.json: recipe (with the comparison's token ids as its calibration set), model, device, threads and out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(job_file: str, answer_file: str) -> None:
    """Do a job, write its answer."""
    import torch

    from quantkit.bench.run import peak_rss
    from quantkit.device import resolve_device
    from quantkit.jobs import run_passes
    from quantkit.model.reader import open_source
    from quantkit.progress import Progress
    from quantkit.quiet import quiet_libraries
    from quantkit.recipe import Recipe

    quiet_libraries()
    job = json.loads(Path(job_file).read_text())
    torch.set_num_threads(job["threads"])
    device = resolve_device(job["device"])
    wanted = [("quantkit", Recipe.model_validate(job["recipe"]), Path(job["out"]))]
    (manifest,) = run_passes(wanted, open_source(job["model"]), device, False, Progress())
    vram = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    answer = {
        "quantize_s": manifest.quantize_s,
        "peak_rss_bytes": peak_rss(),
        "peak_vram_bytes": vram,
        "versions": {"quantkit": manifest.quantkit_version, "torch": torch.__version__},
    }
    Path(answer_file).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
