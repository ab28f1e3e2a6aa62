"""Tasks of lm-eval: rows from local files leave prompts and scores as they are; what cannot be had is missing."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from oracles.memory_source import MemorySource, store
from quantkit.bench.accuracy import load_tasks, measure
from quantkit.bench.run import Run
from quantkit.bench.subject import Artifact, Baseline
from quantkit.bench.tasks import FOLDER, OWN, check_tasks, definition
from quantkit.engines import llama_api
from quantkit.errors import UsageError
from quantkit.formats.gguf import GGUF
from quantkit.methods.ggml import GGML
from quantkit.model.reader import open_source
from quantkit.sections import AccuracyBench

ARC = [
    {
        "id": f"q{number}",
        "question": f"What is {number} plus one?",
        "choices": {"text": [str(number), str(number + 1), "a cat"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    }
    for number in range(6)
]


def _rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _run(folder: Path, scratch: Path) -> Run:
    return Run(Baseline(open_source(str(folder))), True, torch.device("cpu"), scratch, folder)


def test_our_questions_are_sound() -> None:
    questions = [json.loads(line) for line in (FOLDER / "basics.jsonl").read_text().splitlines()]
    assert len(questions) == 120
    assert len({question["text"] for question in questions}) == 120
    assert all(len(set(question["choices"])) == 4 for question in questions)
    assert Counter(question["answer"] for question in questions) == {0: 30, 1: 30, 2: 30, 3: 30}


def test_a_redirected_stock_task_has_the_same_rows_prompts_and_scoring(tmp_path: Path) -> None:
    from lm_eval.tasks._yaml_loader import load_yaml

    file = _rows(tmp_path / "arc.jsonl", ARC)
    task = load_tasks("arc_easy", str(file), tmp_path / "tasks")["arc_easy"]
    assert [dict(row) for row in task.eval_docs] == ARC
    stock_file = definition("arc_easy")
    assert stock_file is not None
    stock, ours = load_yaml(stock_file), task.dump_config()
    for key in ("output_type", "doc_to_text", "doc_to_target", "doc_to_choice", "metric_list"):
        assert ours[key] == stock[key], key
    assert task.doc_to_text(ARC[3]) == "Question: What is 3 plus one?\nAnswer:"
    assert task.doc_to_choice(ARC[3]) == ["3", "4", "a cat"] and task.doc_to_target(ARC[3]) == 1


def test_functions_of_a_stock_definition_still_run(tmp_path: Path) -> None:
    row = {"activity_label": "Roof", "ctx_a": "A man sits.", "ctx_b": "he", "endings": list("abcd"), "label": "3"}
    file = _rows(tmp_path / "hellaswag.jsonl", [row])
    task = load_tasks("hellaswag", str(file), tmp_path / "tasks")["hellaswag"]
    document = next(iter(task.eval_docs))
    assert document["query"] == "Roof: A man sits. He" and document["gold"] == 3


def test_scores_and_samples_are_those_of_a_plain_loop(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = _rows(tmp_path / "arc.jsonl", ARC)
    run = _run(tiny_llama, tmp_path)
    (found,) = measure(AccuracyBench(tasks=("arc_easy",), data={"arc_easy": str(file)}, limit=5), run)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    expected = []
    for row in ARC[:5]:
        prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
        scores = []
        for choice in row["choices"]["text"]:  # type: ignore[index]
            whole = tokenizer(f"Question: {row['question']}\nAnswer: {choice}")["input_ids"]
            with torch.inference_mode():
                logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(logs[place - 1, whole[place]].item() for place in range(len(prompt), len(whole))))
        expected.append(float(scores.index(max(scores)) == 1))
    assert run.samples["arc_easy"] == expected
    assert found.metric == "accuracy/arc_easy" and found.samples == 5
    assert found.value == pytest.approx(sum(expected) / 5)
    assert found.settings["data"] == "arc.jsonl" and found.settings["metric"] == "acc"


def test_our_task_runs_without_a_network(tiny_llama: Path, tmp_path: Path) -> None:
    run = _run(tiny_llama, tmp_path)
    (found,) = measure(AccuracyBench(limit=12), run)
    assert found.value is not None and found.error is not None and found.samples == 12
    assert len(run.samples["basics"]) == 12 and set(run.samples["basics"]) <= {0.0, 1.0}
    assert found.value == pytest.approx(sum(run.samples["basics"]) / 12)


@pytest.mark.skipif(llama_api.installed() != llama_api.VERSION, reason="xllamacpp is not installed")
@pytest.mark.engine
def test_a_gguf_file_is_asked_in_llama_cpp(tiny_llama: Path, tmp_path: Path) -> None:
    store(MemorySource(tiny_llama), GGUF(), tmp_path / "f", GGML(type="f16", embedding_type="f16"), torch.float16)
    torch.set_num_threads(1)  # llama.cpp's threads wait for each other, which takes long on a busy machine
    found, scores = [], []
    for subject in (Artifact(tmp_path / "f"), Artifact(tmp_path / "f", "it crashed")):
        run = Run(subject, False, torch.device("cpu"), tmp_path, tiny_llama)
        found += measure(AccuracyBench(limit=12), run)
        scores.append(run.samples["basics"])
    own, decoded = found
    assert (own.engine, decoded.engine) == ("llama.cpp", "decoded weights")
    assert own.settings["threads"] == torch.get_num_threads() and "without_engine" not in own.settings
    assert decoded.settings["without_engine"] == "it crashed"
    assert scores[0] == scores[1], "half-precision weights: no answer hangs on the last digit"


def test_a_task_that_draws_its_answers_is_refused_by_name_and_the_others_go_on(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantkit.bench.accuracy.draws", lambda task: task.config.task == "arc_easy")
    run = _run(tiny_llama, tmp_path)
    session = run.quality()
    monkeypatch.setattr(session, "model", None)
    monkeypatch.setattr(session, "logits", lambda ids, last: torch.zeros(last, 384))
    file = _rows(tmp_path / "arc.jsonl", ARC)
    section = AccuracyBench(tasks=("arc_easy", "basics"), data={"arc_easy": str(file)}, limit=2)
    refused, scored = measure(section, run)
    assert refused.metric == "accuracy/arc_easy" and "decodes greedily here" in str(refused.missing)
    assert scored.metric == "accuracy/basics" and scored.value is not None


def test_rows_that_cannot_be_had_are_missing_with_the_way_out(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    (found,) = measure(AccuracyBench(tasks=("piqa",)), _run(tiny_llama, tmp_path))
    assert found.metric == "accuracy/piqa" and found.value is None
    assert "no route to the hub" in str(found.missing) and "data: {piqa: FILE}" in str(found.missing)


def test_rows_without_the_fields_of_the_task_are_missing_not_a_crash(tiny_llama: Path, tmp_path: Path) -> None:
    file = _rows(tmp_path / "odd.jsonl", [{"goal": "x", "label": 0}])
    section = AccuracyBench(tasks=("piqa",), data={"piqa": str(file)})
    (found,) = measure(section, _run(tiny_llama, tmp_path))
    assert found.value is None and f"the rows of {file} do not fit it" in str(found.missing)


def test_a_task_that_shows_examples_of_another_split_is_refused(tmp_path: Path) -> None:
    file = _rows(tmp_path / "rows.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}])
    with pytest.raises(UsageError, match="shows 5 examples of its split train"):
        load_tasks("gsm8k", str(file), tmp_path / "tasks")


def test_all_wrong_names_and_files_are_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Index:
        all_tasks = ("arc_easy", "mmlu")

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Index)
    check_tasks(("basics", "arc_easy", "mmlu"), {})
    with pytest.raises(UsageError) as raised:
        check_tasks(("arc_esy", "piqa"), {"piqa": str(tmp_path / "gone.jsonl"), "boolq": __file__})
    message = raised.value.message
    assert 'tasks: "arc_esy" is not a task of lm-eval or quantkit; did you mean arc_easy?' in message
    assert "data.piqa" in message and "no such file" in message
    assert "data.boolq: is not among the tasks" in message


def test_our_tasks_have_rows() -> None:
    assert all(path.with_suffix(".jsonl").is_file() for path in OWN.values())
