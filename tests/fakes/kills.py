"""Runs of tiny jobs that are killed at random instants and gone on with, compared with runs that nobody disturbed.

usage: python tests/fakes/kills.py MODEL FOLDER COUNT SEED      a JSON line for each kill
       python tests/fakes/kills.py MODEL FOLDER                 fingerprints of undisturbed runs, one JSON object

Each killed run is a fork of this process, which has imported everything and computed nothing: a fork inherits no
threads.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    threads = os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ |= {"MKL_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import torch  # noqa: E402
import transformers.models.llama.modeling_llama  # noqa: E402, F401

import quantkit.maths.ggml  # noqa: E402, F401
import quantkit.maths.kernels  # noqa: E402, F401
import quantkit.pipeline  # noqa: E402, F401
from quantkit import checkpoint  # noqa: E402
from quantkit.jobs import run_passes  # noqa: E402
from quantkit.journal import Journal  # noqa: E402
from quantkit.model.reader import open_source  # noqa: E402
from quantkit.place import partial_folder  # noqa: E402
from quantkit.progress import Progress  # noqa: E402
from quantkit.recipe import load_recipe  # noqa: E402

SMALL = ["calibration.sequences=4", "calibration.length=32"]
NOT_COMPARED = ("created", "quantize_s", "peak_rss_bytes", "manifest_sha256")

COMMANDS: dict[str, dict[str, list[str]]] = {
    "gptq": {"gptq-4bit-g64": []},
    "awq": {"awq-4bit-g64": []},
    "nf4": {"nf4-double": []},
    "gguf": {"gguf-q4_0": ["method.importance=true"]},
    "gguf gptq": {"gguf-q4_0-gptq": []},
    "three in one pass": {
        "gptq-4bit-g64": [],
        "awq-4bit-g64-nearest": ["method.propagate=unquantized"],
        "gguf-q8_0": [],
    },
    "two passes": {"gptq-4bit-g64": [], "awq-4bit-g64": ["calibration.seed=1"]},
}
"""{name: {recipe: settings}}: what one command makes."""

LINES = {name: 17 if name == "two passes" else 9 for name in COMMANDS}
"""Of a journal: what was given, and for each pass what it was given, six blocks, the end."""


def kills(model: Path, folder: Path, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Kill `count` runs, each command in turn, some of them again where they go on, and let each come to its end.

    Yields of each kill what was killed when, how many blocks had been written down, and whether the artifacts were the
    same in the end.
    """
    chosen = random.Random(seed)
    made, duration = {}, {}
    left = count
    while left:
        for name in COMMANDS:
            out = folder / name.replace(" ", "-")
            if name not in made:
                # the first run of all compiles what is not in numba's cache: that is not what is killed
                for _ in range(2):
                    shutil.rmtree(out, ignore_errors=True)
                    started = time.monotonic()
                    assert _ended(_start(name, model, out)) == 0, f"{name}: failed undisturbed"
                    duration[name] = time.monotonic() - started
                made[name] = fingerprints(out)
            shutil.rmtree(out, ignore_errors=True)
            happened = []
            for _ in range(min(left, chosen.choice((1, 1, 2)))):
                if _complete(name, out):
                    break
                # by the journal: much of such a short time goes into loading kernels
                line, delay_s = chosen.randrange(LINES[name]), chosen.random() * duration[name] / LINES[name]
                pid, started = _start(name, model, out), time.monotonic()
                while _lines(name, out) < line and time.monotonic() - started < 2 * duration[name]:
                    time.sleep(0.0005)
                time.sleep(delay_s)
                os.kill(pid, signal.SIGKILL)
                at_s = round(time.monotonic() - started, 4)
                if _ended(pid) == -signal.SIGKILL:
                    happened.append({"command": name, "at_s": at_s, "kept": _kept(out)})
            status = 0 if _complete(name, out) else _ended(_start(name, model, out))
            same = status == 0 and fingerprints(out) == made[name]
            stray = [path.name for path in out.glob(".*")]
            for kill in happened[:left]:
                yield {**kill, "same": same and not stray}
            left -= len(happened[:left])
            if not left:
                return


def fingerprints(folder: Path) -> dict[str, str]:
    """sha256 of every file of the artifacts in a folder, the manifest without what tells of time and memory."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        content = path.read_bytes()
        if path.name == "quantkit.json":
            facts = json.loads(content)
            content = json.dumps({key: facts[key] for key in facts if key not in NOT_COMPARED}).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    assert found, f"{folder}: nothing was made"
    return found


def run(name: str, model: Path, out: Path) -> None:
    """What one command does: its artifacts lie in `out`."""
    wanted = [
        (recipe, load_recipe(recipe, [*SMALL, *settings]), out / recipe) for recipe, settings in COMMANDS[name].items()
    ]
    run_passes(wanted, open_source(str(model)), torch.device("cpu"), False, Progress(quiet=True))


def _start(name: str, model: Path, out: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        run(name, model, out)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _complete(name: str, out: Path) -> bool:
    """Whether the command has nothing left to do: the kill came too late, or only to the process."""
    return all((out / recipe).is_dir() for recipe in COMMANDS[name]) and not any(out.glob(".*.partial"))


def _lines(name: str, out: Path) -> int:
    """Of the journal as far as it is written, 0 before it is there and once it has gone."""
    folder = partial_folder(out / next(iter(COMMANDS[name])))
    try:
        return (folder / "journal").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def _ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _kept(out: Path) -> int:
    """Blocks that the journal tells of, of all passes together."""
    dones = {}
    for path in out.glob(".*.partial/journal"):
        for entry in Journal(path).entries:
            if "done" in entry:
                dones[entry["pass"]] = entry["done"]
    return sum(dones.values())


def main() -> None:
    model, folder = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if len(sys.argv) == 3:
        for name in COMMANDS:
            run(name, model, folder / name)
        print(json.dumps(fingerprints(folder)))
        return
    checkpoint.FIRST_S, checkpoint.SHARE = 0.0, 1e9  # behind every block, however short
    for kill in kills(model, folder, int(sys.argv[3]), int(sys.argv[4])):
        print(json.dumps(kill), flush=True)


if __name__ == "__main__":
    main()
