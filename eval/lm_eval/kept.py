"""Log-likelihoods and continuations of one model, each asked for once: from the ledger where it has them.

A log-likelihood is kept as a sample whose text is `[log-probability, greedy]` in JSON. Its key is the hash of the
tokens and of the model: few-shot examples, chat template and whatever else makes a prompt are among the tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from distill.errors import EnvironmentFault
from distill.ledger import Ledger
from distill.ledger_writer import LedgerWriter
from distill.progress import Progress
from distill.protocols import Likelihood, PlainAnswer, PlainPrompt, ScoredText, TokenModel
from distill.records import Trace, content_id
from distill.teacher_facts import with_teacher_facts

Wanted = TypeVar("Wanted")
Given = TypeVar("Given")


class KeptTokens:
    """One model's. Of `num_answers` given so far the ledger did not have `num_asked`."""

    def __init__(self, model: TokenModel, ledger: Ledger, progress: Progress) -> None:
        self.num_answers = self.num_asked = 0
        self.model = model
        self._ledger = ledger
        self._progress = progress
        self._identity = model.identity.model_dump()

    def likelihoods(self, wanted: Sequence[ScoredText], title: str) -> list[Likelihood]:
        """In the order of `wanted`. Whatever ends the call, what had arrived is in the ledger."""
        keys = [self._key("log-likelihood", *text) for text in wanted]

        def trace(key: str, text: ScoredText, found: Likelihood) -> Trace:
            num_read = len(text.context_ids) + len(text.continuation_ids)
            return self._trace(key, 0, json.dumps(list(found)), "stop", num_read, 0)

        traces = self._traces(dict(zip(keys, wanted, strict=True)), self.model.likelihoods, trace, title)
        return [Likelihood(*json.loads(traces[key].text)) for key in keys]

    def continuations(self, wanted: Sequence[PlainPrompt], title: str) -> list[str]:
        """Their texts, in the order of `wanted`."""
        keys = [
            self._key("continuation", p.prompt_ids, p.sampling.content(), p.seed, p.stop, p.shaping) for p in wanted
        ]

        def trace(key: str, prompt: PlainPrompt, found: PlainAnswer) -> Trace:
            text = found.text.encode("utf-8", "replace").decode()  # a lone surrogate is no text
            return self._trace(key, 0, text, found.finish_reason, found.num_prompt_tokens, found.num_tokens)

        traces = self._traces(dict(zip(keys, wanted, strict=True)), self.model.continuations, trace, title)
        return [traces[key].text for key in keys]

    def _key(self, kind: str, *content: Any) -> str:
        return content_id([kind, *content, self._identity])

    def _trace(self, key: str, index: int, text: str, reason: Any, num_read: int, num_written: int) -> Trace:
        return Trace(
            key=key,
            problem_id=key,
            sample_index=index,
            text=text,
            finish_reason=reason,
            num_prompt_tokens=num_read,
            num_tokens=num_written,
            teacher=self.model.identity.name,
        )

    def _traces(
        self,
        wanted: Mapping[str, Wanted],
        ask: Callable[[Sequence[Wanted]], Iterator[tuple[int, Given]]],
        trace: Callable[[str, Wanted, Given], Trace],
        title: str,
    ) -> dict[str, Trace]:
        if missing := self._ledger.missing(wanted):
            asked = [wanted[key] for key in missing]
            with (
                self._progress.task(title, len(wanted), done=len(wanted) - len(missing), unit="answers") as plain,
                with_teacher_facts(plain, self.model) as task,
                LedgerWriter(self._ledger) as writer,
                _ended(ask(asked)) as answers,
            ):
                for number, given in answers:
                    writer.put(trace(missing[number], asked[number], given))
                    task.advance()
            left = self._ledger.missing(missing)
            self.num_asked += len(missing) - len(left)
            if left:
                raise EnvironmentFault(f"the model left {len(left)} answers out", where=self.model.identity.name)
        self.num_answers += len(wanted)
        return dict(zip(wanted, self._ledger.traces(wanted), strict=True))


@contextmanager
def _ended(answers: Iterator[Given]) -> Iterator[Iterator[Given]]:
    """Whoever leaves the block ends what is in flight."""
    try:
        yield answers
    finally:
        if isinstance(answers, Generator):
            answers.close()
