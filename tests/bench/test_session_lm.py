"""lm-eval over a session's logits: the same answers as lm-eval's own class gives for the same model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from quantkit.bench.accuracy import draws
from quantkit.bench.session_lm import SessionLM
from quantkit.engines import Session
from quantkit.engines.transformers import TransformersSession
from quantkit.model.load import load_transformers
from quantkit.model.reader import open_source
from quantkit.model.sequences import load_tokenizer

CPU = torch.device("cpu")


class Bare(Session):
    """A session that shows no model; counts what it is asked."""

    engine, dtype = "bare", "float32"

    def __init__(self, inner: TransformersSession):
        self.inner, self.details, self.asked = inner, {}, 0

    def logits(self, ids: Tensor, last: int | None = None) -> Tensor:
        self.asked += 1
        return self.inner.logits(ids, last)

    def prefill(self, ids: Tensor, room: int = 256) -> Tensor:
        return self.inner.prefill(ids, room)

    def decode(self, tokens: Tensor) -> Tensor:
        return self.inner.decode(tokens)

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def pair(tiny_llama: Path) -> tuple[SessionLM, HFLM, Bare]:
    source = open_source(str(tiny_llama))
    inner = TransformersSession(load_transformers(source, torch.float32, CPU), "transformers")
    tokenizer = load_tokenizer(tiny_llama)
    bare = Bare(inner)
    theirs = HFLM(pretrained=inner.model, tokenizer=tokenizer, backend="causal", batch_size=3, device="cpu")
    return SessionLM(bare, tokenizer, source.config), theirs, bare


def _asked(kind: str, *arguments: Any) -> list[Instance]:
    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]  # type: ignore[arg-type]


def test_continuations_score_as_in_lm_eval(pair: tuple[SessionLM, HFLM, Bare]) -> None:
    ours, theirs, _ = pair
    asked = _asked(
        "loglikelihood",
        ("The statement", " is an expression"),
        ("A trailing space ", "moves"),
        ("", "nothing before"),
        ("<|endoftext|>begins with a special token", " and goes on"),
        ("a context that is too long " * 40, " loses its beginning"),
        ("one", " a"),
    )
    found, expected = ours.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=1e-5)
    assert len({round(score, 3) for score, _ in found}) == len(asked), "the scores have to differ to tell them apart"


def test_the_likeliest_continuation_is_seen(pair: tuple[SessionLM, HFLM, Bare]) -> None:
    ours, _, bare = pair
    ids = ours.tok_encode("The statement")
    best = int(bare.logits(torch.tensor(ids))[-1].argmax())
    (_, right), (_, wrong) = ours._loglikelihood_tokens([(None, ids, [best]), (None, ids, [best ^ 1])])
    assert right and not wrong


def test_choices_of_one_token_share_a_pass(pair: tuple[SessionLM, HFLM, Bare]) -> None:
    ours, _, bare = pair
    before = bare.asked
    ours._loglikelihood_tokens([(None, [5, 6, 7], [choice]) for choice in (8, 9, 10)])
    assert bare.asked == before + 1
    ours._loglikelihood_tokens([(None, [5, 6, 7], [8, 9])])
    assert bare.asked == before + 2


def test_whole_texts_score_as_in_lm_eval(pair: tuple[SessionLM, HFLM, Bare]) -> None:
    ours, theirs, _ = pair
    asked = _asked("loglikelihood_rolling", ("if a then b",), ("a longer text than the context holds, " * 30,))
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert ours.loglikelihood_rolling(asked) == pytest.approx(expected, rel=1e-5)


def test_generated_answers_are_those_of_lm_eval(pair: tuple[SessionLM, HFLM, Bare]) -> None:
    ours, theirs, _ = pair
    free = {"until": ["\n\n\n"], "max_gen_toks": 24, "do_sample": False}
    whole = theirs.generate_until(_asked("generate_until", ("The statement", free)), disable_tqdm=True)[0]
    assert len(whole) > 8
    stopped = {**free, "until": [whole[4:7]]}
    asked = _asked("generate_until", ("The statement", free), ("The statement", stopped), ("x = [", free))
    expected = theirs.generate_until(asked, disable_tqdm=True)
    assert ours.generate_until(asked) == expected
    assert expected[1] == whole[: whole.index(whole[4:7])]
    with pytest.raises(ValueError, match="300 tokens are to be generated, and the model's context is 256"):
        ours.generate_until(_asked("generate_until", ("x", {**free, "max_gen_toks": 300})))


@pytest.mark.parametrize(
    ("settings", "drawn"),
    [({"do_sample": True}, True), ({"temperature": 0.7}, True), ({"do_sample": False, "temperature": 0.0}, False)],
)
def test_tasks_that_draw_their_answers_are_told_apart(settings: dict[str, Any], drawn: bool) -> None:
    task: Any = SimpleNamespace(dump_config=lambda: {"generation_kwargs": settings})
    assert draws(task) is drawn
    assert not draws(SimpleNamespace(dump_config=lambda: {}))  # type: ignore[arg-type]
