"""A `TokenModel` as an lm-eval language model: its prompts are made as lm-eval's own `hf` model makes them.

Where contexts end and continuations begin among the tokens, what stands before an empty context, how windows roll over
long texts is lm-eval's code (`TemplateLM`, `lm_eval.utils`); how long texts are cut and when a BOS is added follows
`lm_eval/models/huggingface.py` of lm-eval 0.4.13.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text

from distill.errors import RecipeError
from distill.progress import Progress
from distill.protocols import PlainPrompt, ScoredText
from distill.records import Sampling, content_id
from eval.lm_eval.kept import KeptTokens

# Fields of a task's generation_kwargs that have a place of their own, or change nothing.
_KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "seed"}
_SHAPING = {"top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"}


class TokenLM(TemplateLM):
    """`seed` is that of sampled answers; the k-th repeat of a request has a seed of its own."""

    def __init__(self, kept: KeptTokens, progress: Progress, *, seed: int, title: str) -> None:
        super().__init__()
        self._kept, self._progress, self._seed, self._title = kept, progress, seed, title
        self._vocabulary = kept.model.vocabulary

    @property
    def eot_token_id(self) -> int:
        return self._vocabulary.prefix_id

    @property
    def max_length(self) -> int:
        return self._kept.model.num_positions

    @property
    def max_gen_toks(self) -> int:
        """lm-eval's own, for a task that does not say."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        return self._kept.model.identity.name

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self._vocabulary.render(chat_history, add_generation_prompt=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:  # a chat template may have put the BOS there already
            add_special_tokens = not has_bos_prefix(string, self._vocabulary.spell(self.prefix_token_id))
        return self._vocabulary.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        with self._progress.task(f"{self._title}: encode", len(requests), unit="texts") as self._encoding:
            return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        windows = [self._windows(request.args[0]) for request in requests]
        found = iter(self._likelihoods([window for of_text in windows for window in of_text]))
        return [sum(next(found)[0] for _ in of_text) for of_text in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        prompts, stops, num_seen = [], [], Counter[str]()
        for request in requests:
            context, given = request.args
            settings: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
            until = [*filter(None, settings["until"])]
            name = content_id([context, settings])
            prompts.append(self._prompt(context, settings, until, index=num_seen[name]))
            stops.append([*until, self._vocabulary.end_text])
            num_seen[name] += 1
        texts = self._kept.continuations(prompts, self._title)
        return [postprocess_generated_text(text, stop, None) for text, stop in zip(texts, stops, strict=True)]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        self._encoding.advance()
        return super()._encode_pair(context, continuation)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return self._likelihoods([(context, continuation) for _, context, continuation in requests])

    def _likelihoods(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Of continuations behind contexts, of which the beginning is cut where the model cannot read all of both."""
        texts = []
        for context, continuation in pairs:
            if len(continuation) > self.max_length:
                message = f"asks for {len(continuation)} tokens at once; the model reads {self.max_length}"
                raise RecipeError(message, where=self._title)
            room = self.max_length + 1 - len(continuation)  # the last token is scored, not read
            texts.append(ScoredText(tuple(context[-room:]), tuple(continuation)))
        return [tuple(found) for found in self._kept.likelihoods(texts, self._title)]

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        rolling = utils.get_rolling_token_windows(
            self.tok_encode(text), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
        )
        return [utils.make_disjoint_window(window) for window in rolling]

    def _prompt(self, context: str, settings: dict[str, Any], until: list[str], *, index: int) -> PlainPrompt:
        max_tokens = settings["max_gen_toks"]
        if max_tokens >= self.max_length:
            message = f"asks for answers of {max_tokens} tokens; the model has room for {self.max_length}"
            raise RecipeError(message, where=self._title)
        if unknown := settings.keys() - _KNOWN - _SHAPING:
            raise RecipeError("no engine of potstill's has this", where=self._title, field=min(unknown))
        prompt_ids = self.tok_encode(context)[-(self.max_length - max_tokens) :]
        temperature = float(settings.get("temperature") or 0.0) if settings["do_sample"] else 0.0
        shaping = {name: settings[name] for name in sorted(_SHAPING & settings.keys())}
        return PlainPrompt(
            prompt_ids=tuple(prompt_ids),
            sampling=Sampling(
                temperature=temperature, top_p=float(settings.get("top_p", 1.0)), max_tokens=max_tokens, seed=self._seed
            ),
            seed=int(content_id([self._seed, context, index], digits=15), 16),
            stop=tuple(until),
            shaping=tuple(shaping.items()),
        )
