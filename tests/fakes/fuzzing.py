"""Runs damaged inputs through what reads them, in a process with bounded time and memory: one line of JSON for each.

    python tests/fakes/fuzzing.py FOLDER KIND SEED FIRST COUNT

A case is accepted, refused (a QuantkitError), or a failure: traceback, hang, memory, crash. `run` starts the process.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
CPU_LIMIT_S = 5
WALL_LIMIT_S = 120  # of a case that does not even notice the limit of processor time
MEMORY_LIMIT_BYTES = 200 << 20
"""What a case may take beside what the process had: the files are below 1 MB."""

KINDS = ("recipe", "safetensors", "gguf", "json")
FAILURES = ("traceback", "hang", "memory", "crash")


@dataclass(frozen=True)
class Result:
    """What became of one case. detail: the message, or where it failed. peak_bytes: the most memory it took."""

    kind: str
    index: int
    outcome: str
    detail: str
    peak_bytes: int = 0


def run(folder: Path, kind: str, seed: int, count: int) -> Iterator[Result]:
    """Every case of a kind. folder: for the models that are damaged; made when they are not there."""
    index = 0
    while index < count:
        words = [str(TESTS / "fakes" / "fuzzing.py"), str(folder), kind, str(seed), str(index), str(count)]
        path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with subprocess.Popen(
            [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        ) as process:
            assert process.stdout is not None
            lines = _lines(process.stdout.fileno())
            assert next(lines, None) == b"ready", "the process that runs the cases did not start"
            for line in lines:
                found = Result(kind, **json.loads(line))
                index = found.index + 1
                yield found
            if index < count:
                hung = process.poll() is None
                process.kill()
                yield Result(kind, index, "hang" if hung else "crash", f"exit code {process.wait()}")
                index += 1


def _lines(handle: int) -> Iterator[bytes]:
    """Lines as they come, until the end or until none has come for too long."""
    held = b""
    while select.select([handle], [], [], WALL_LIMIT_S)[0]:
        piece = os.read(handle, 1 << 16)
        if not piece:
            return
        *lines, held = (held + piece).split(b"\n")
        yield from lines


class TooSlowError(BaseException):
    """The processor time of a case is used up."""


def make_bases(folder: Path) -> None:
    """Models and artifacts of each format that are whole: what the cases are made from."""
    if (folder / "done").exists():
        return
    import torch

    from conftest import write_tiny_llama
    from fakes.families import write_family
    from fakes.vocabularies import write_sentencepiece
    from quantkit.formats.imatrix import Imatrix, write_imatrix
    from quantkit.jobs import quantize
    from quantkit.maths.gram import Importance
    from quantkit.progress import Progress

    write_tiny_llama(folder / "model", num_hidden_layers=1)
    tokens = write_sentencepiece(folder / "sentencepiece", "gemma", size=600)
    write_family(folder / "gemma", "gemma2", tokens, num_hidden_layers=2, vocab_size=700)
    made: dict[str, tuple[str, tuple[str, ...]]] = {
        "gptq": ("rtn-4bit-g128", ("method.group_size=32",)),
        "awq": ("rtn-4bit-g128", ("method.group_size=32", "format.name=autoawq")),
        "packed": ("rtn-w8a16", ("method.group_size=32", "method.bits=4", "method.symmetric=false")),
        "nf4": ("nf4-double", ()),
        "int8": ("int8", ()),
        "q8_0": ("gguf-q8_0", ()),
        "q4_0": ("gguf-q4_0", ()),
    }
    for name, (recipe, settings) in made.items():
        _quantize(quantize, Progress, recipe, folder / "model", folder / name, settings)
    _quantize(quantize, Progress, "gguf-q8_0", folder / "gemma", folder / "gemma-q8_0", ("skip=[]",))
    entries = {f"blk.0.{name}.weight": Importance(torch.ones(64), 512) for name in ("attn_q", "ffn_up")}
    (folder / "imatrix").mkdir()
    write_imatrix(folder / "imatrix" / "x.gguf", Imatrix(entries, ("text",), 8, 64))
    (folder / "done").touch()


def _quantize(call: Callable[..., Any], progress: Any, recipe: str, model: Path, out: Path, settings: Any) -> None:
    call(
        recipe,
        model=str(model),
        out=out,
        settings=list(settings),
        device="cpu",
        force=False,
        progress=progress(quiet=True),
    )


class Cases:
    """Cases of one kind by number, each with what it is put through."""

    def __init__(self, folder: Path, kind: str, seed: int):
        self.folder, self.kind, self.seed = folder, kind, seed
        self.scratch = folder / f"scratch-{os.getpid()}"
        from quantkit.recipe import load_recipe
        from quantkit.shipped import shipped_folder

        self.texts = [path.read_text() for path in sorted(shipped_folder("recipes").glob("*.yaml"))]
        names = ("gptq-4bit-g64", "nf4", "gguf-q8_0")
        self.recipes = [load_recipe(name) for name in names]

    def steps(self, index: int) -> list[Callable[[], Any]]:
        """Write the input of a case and return what to do with it, step by step."""
        from fakes import mutations

        random = Random(f"{self.kind} {self.seed} {index}")
        shutil.rmtree(self.scratch, ignore_errors=True)
        if self.kind == "recipe":
            self.scratch.mkdir()
            path = self.scratch / "recipe.yaml"
            path.write_bytes(mutations.mutate_yaml(random, random.choice(self.texts)))
            return [lambda: self.recipe(path)]
        if self.kind == "gguf":
            base = random.choice(("q8_0", "q4_0", "gemma-q8_0", "imatrix"))
            self._copy(base)
            path = next(self.scratch.glob("*.gguf"))
            path.write_bytes(mutations.mutate_gguf(random, path.read_bytes()))
            if base == "imatrix":
                if random.random() < 0.3:
                    path.write_bytes(mutations.mutate_bytes(random, _legacy_imatrix()))
                return [lambda: self.imatrix(path)]
            return [*self.model(path), *self.artifact(path)]
        base = random.choice(("model", "gptq", "awq", "packed", "nf4", "int8"))
        self._copy(base)
        if self.kind == "safetensors":
            path = self.scratch / "model.safetensors"
            path.write_bytes(mutations.mutate_safetensors(random, path.read_bytes()))
        else:
            self._damage_json(random, base)
        return self.model(self.scratch) if base == "model" else self.artifact(self.scratch)

    def _damage_json(self, random: Random, base: str) -> None:
        from fakes import mutations

        names = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
        names += ["model.safetensors.index.json"] if base == "model" else ["quantkit.json", "config.json"]
        name = random.choice(names)
        if name == "model.safetensors.index.json":
            weights = self.scratch / "model.safetensors"
            header = weights.read_bytes()
            length = int.from_bytes(header[:8], "little")
            tensors = [key for key in json.loads(header[8 : 8 + length]) if key != "__metadata__"]
            weights.rename(self.scratch / "model-1.safetensors")
            value: Any = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-1.safetensors")}
        else:
            value = json.loads((self.scratch / name).read_bytes())
        if random.random() < 0.1:
            text = mutations.mutate_bytes(random, json.dumps(value).encode())
        elif name == "config.json" and base != "model" and random.random() < 0.6:
            value["quantization_config"] = mutations.mutate_value(random, value["quantization_config"])
            text = mutations.dump_json(random, value)
        else:
            text = mutations.dump_json(random, mutations.mutate_value(random, value))
        (self.scratch / name).write_bytes(text)

    def _copy(self, base: str) -> None:
        shutil.copytree(self.folder / base, self.scratch)

    def recipe(self, path: Path) -> None:
        from quantkit.model.reader import open_source
        from quantkit.plan import check_plans, plan_linears
        from quantkit.recipe import Recipe, load_any, suite_recipes

        loaded = load_any(path)
        source = open_source(str(self.folder / "model"))
        for recipe in [loaded] if isinstance(loaded, Recipe) else [recipe for _, recipe in suite_recipes(loaded)]:
            check_plans("x", recipe, source, plan_linears(recipe, source))

    def imatrix(self, path: Path) -> None:
        from quantkit.formats.imatrix import read_imatrix

        read_imatrix(path)

    def model(self, path: Path) -> list[Callable[[], Any]]:
        """What a run does with a model before and while it reads it."""
        import torch

        from quantkit.device import arithmetic
        from quantkit.formats.gguf_metadata import file_metadata
        from quantkit.model.forward import BlockRunner
        from quantkit.model.reader import open_source
        from quantkit.model.sequences import load_tokenizer
        from quantkit.plan import check_plans, plan_linears

        source = open_source(str(path))
        cpu = torch.device("cpu")

        def plan() -> None:
            for recipe in self.recipes:
                plans = plan_linears(recipe, source)
                check_plans("x", recipe, source, plans)
                recipe.resolved_format.layout(source, plans, torch.float16)

        def read() -> None:
            for name in source.names():
                source.read(name)

        return [
            plan,
            read,
            source.side_files,
            source.lineage,
            lambda: load_tokenizer(source.tokenizer_folder()),
            lambda: file_metadata(source, source.shape("model.embed_tokens.weight")[0], "Q8_0"),
            lambda: BlockRunner(source, cpu, arithmetic(cpu, torch.float32)),
        ]

    def artifact(self, path: Path) -> list[Callable[[], Any]]:
        """What is done with an artifact."""
        from quantkit import words
        from quantkit.formats import open_artifact
        from quantkit.inspection import inspect
        from quantkit.model.sequences import load_tokenizer
        from quantkit.verification import verify

        source = open_artifact(path)

        def read() -> None:
            for name in source.names():
                source.read(name)
                source.quantized(name)

        return [
            lambda: words.inspection(inspect(path)),
            read,
            lambda: verify(path),
            lambda: load_tokenizer(source.tokenizer_folder()),
        ]


def _legacy_imatrix() -> bytes:
    import struct

    entry = struct.pack("<i", 9) + b"blk.0.x.w" + struct.pack("<ii", 8, 4) + struct.pack("<4f", 1, 2, 3, 4)
    return struct.pack("<i", 2) + 2 * entry + struct.pack("<ii", 8, 4) + b"text"


def _one(cases: Cases, index: int) -> tuple[str, str]:
    """The outcome of a case and its message."""
    from quantkit.errors import QuantkitError

    refused = ""
    pending: list[Callable[[], Any]] = []
    try:
        pending = cases.steps(index)
    except QuantkitError as error:
        refused = error.message
    for step in pending:
        try:
            step()
        except QuantkitError as error:
            refused = error.message
    return ("refused", refused[:300]) if refused else ("accepted", "")


def _judged(cases: Cases, index: int) -> tuple[str, str]:
    try:
        return _one(cases, index)
    except MemoryError:
        return "memory", _where()
    except TooSlowError:
        return "hang", _where()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the tokenizers library raises BaseExceptions of its own
        if not _where():
            raise  # the damage itself went wrong
        message = f"{type(error).__name__}: {str(error)[:120]}"
        memory = "not enough memory" in message or "DefaultCPUAllocator" in message
        return "memory" if memory else "traceback", f"{message} | {_where()}"


def _where() -> str:
    """The last lines of quantkit's own on the way to the failure."""
    frames = [frame for frame in traceback.extract_tb(sys.exc_info()[2]) if "/quantkit/" in frame.filename]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames[:-4:-1])


def _peak(reset: bool = False) -> int:
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark of resident memory begins anew
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:" if reset else "VmHWM:")[1].split()[0]) * 1024


def main() -> None:
    import resource
    import signal

    folder, kind, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    first, count = int(sys.argv[4]), int(sys.argv[5])
    os.environ["QUANTKIT_CACHE"] = str(folder / "cache")
    import torch

    from quantkit.quiet import quiet_libraries

    torch.set_num_threads(1)
    quiet_libraries()
    folder.mkdir(parents=True, exist_ok=True)
    make_bases(folder)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def too_slow(*_: Any) -> None:
        raise TooSlowError

    signal.signal(signal.SIGPROF, too_slow)
    cases = Cases(folder, kind, seed)
    for warm in ("gptq", "q8_0"):  # what is imported and compiled once is no case's
        for step in [*cases.model(folder / "model"), *cases.artifact(folder / warm)]:
            step()
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    bound = size + MEMORY_LIMIT_BYTES + (256 << 20)  # address space: arenas of threads count, too
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    print("ready", file=out, flush=True)
    for index in range(first, count):
        before = _peak(reset=True)
        signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)
        started = time.process_time()
        outcome, detail = _judged(cases, index)
        signal.setitimer(signal.ITIMER_PROF, 0)
        grown = max(0, _peak() - before)
        if grown > MEMORY_LIMIT_BYTES and outcome not in FAILURES:
            outcome, detail = "memory", f"{grown >> 20} MB: {detail}"
        if time.process_time() - started > CPU_LIMIT_S and outcome not in FAILURES:
            outcome = "hang"
        print(
            json.dumps({"index": index, "outcome": outcome, "detail": detail, "peak_bytes": grown}),
            file=out,
            flush=True,
        )
    shutil.rmtree(cases.scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
