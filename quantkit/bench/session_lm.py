"""lm-eval's requests answered from the logits of any session, one sequence after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from quantkit.engines import Session

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

Pair = tuple[Any, list[int], list[int]]
"""What lm-eval looks answers up by, the tokens of a context, and those of its continuation."""


class SessionLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """A session as lm-eval wants a model.

    tokenizer: the source's, used as lm-eval's class for transformers models uses it, so that both score the same token
    ids. config: the model's, as a dict. Answers that are generated are decoded greedily.
    """

    def __init__(self, session: Session, tokenizer: PreTrainedTokenizerBase, config: Mapping[str, Any]):
        super().__init__()
        self.session = session
        self.tokenizer: Any = tokenizer
        self.max_length = int(resolve_max_length(SimpleNamespace(**config), tokenizer))
        self._kept: tuple[list[int], int, Tensor] | None = None

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            special = {"add_special_tokens": False}
        return list(self.tokenizer.encode(string, **special))

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **_: Any) -> list[tuple[float, bool]]:
        return [self._score(context, continuation) for _, context, continuation in requests]

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Log-probability of a continuation, and whether it is the likeliest; a long context loses its beginning."""
        assert context and continuation, "lm-eval puts a token before an empty context"
        ids = (context + continuation)[-(self.max_length + 1) :][:-1]
        wanted = torch.tensor(continuation)  # [n]
        log_probs = self._log_probs(ids, len(continuation))  # [n, vocabulary]
        total = float(log_probs.gather(1, wanted[:, None]).double().sum())
        return total, bool((log_probs.argmax(-1) == wanted).all())

    def _log_probs(self, ids: list[int], last: int) -> Tensor:
        """Log-probabilities after the last tokens: float32 [last, vocabulary].

        Choices of one token stand behind the same ids and follow each other, so the last answer is kept.
        """
        if self._kept is None or self._kept[:2] != (ids, last):
            self._kept = ids, last, self.session.logits(torch.tensor(ids), last).log_softmax(-1)
        return self._kept[2]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            totals.append(sum(self._score(*make_disjoint_window(window))[0] for window in windows))
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        """Decode greedily until a stop sequence, the end token or the limit."""
        given = normalize_gen_kwargs(settings, default_max_gen_toks=256)
        end = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        until, limit = handle_stop_sequences(given.get("until"), eos=end), int(given["max_gen_toks"])
        room = self.max_length - limit
        if room <= 0:
            raise ValueError(f"{limit} tokens are to be generated, and the model's context is {self.max_length}")
        tokens = self.session.prefill(torch.tensor([self.tok_encode(context)[-room:]]), room=limit)
        made = [int(tokens)]
        while len(made) < limit and made[-1] != self.eot_token_id and not self._stopped(made, until):
            tokens = self.session.decode(tokens)
            made.append(int(tokens))
        text = self.tokenizer.decode(made, skip_special_tokens=True)
        return str(postprocess_generated_text(text, until, None))

    def _stopped(self, made: list[int], until: Sequence[str]) -> bool:
        text = self.tokenizer.decode(made, skip_special_tokens=False)
        return any(stop and stop in text for stop in until)
