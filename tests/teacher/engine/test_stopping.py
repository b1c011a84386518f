"""What ends a text early, and how texts come in pieces: always as if the whole had been looked at."""

from __future__ import annotations

import queue
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, strategies as st
from tokenizers import Tokenizer

from distill.reasoning import END_OF_THINKING, THINK_LINE
from teacher.engine import sequence
from teacher.engine.detokenizer import Detokenizer, decode_by
from teacher.engine.engine import Engine
from teacher.engine.loop import EngineLoop
from teacher.engine.sampler import SamplingParams
from teacher.engine.stopping import Repetition, RepetitionLimit, StopStrings, cut
from teacher.http.reasoning import Reasoning
from teacher.models.latent.model import LatentModel
from tests.repository import REPOSITORY
from tests.teacher.http.whole_reasoning import split
from tests.teacher.v3_models import random_model, tiny_config

PICO = Tokenizer.from_file(str(REPOSITORY / "teacher/pico/tokenizer.json"))
TEXTS = st.text(st.sampled_from("ab\n<é漢🙂"), max_size=40)


def pieces(text: str, seed: int) -> list[str]:
    """The text, cut anywhere."""
    draw, parts = random.Random(seed), []
    while text:
        size = draw.randint(1, 4)
        parts.append(text[:size])
        text = text[size:]
    return parts


def naive_cut(text: str, stops: list[str]) -> str:
    """Character by character: the first end of a stop string, the longest of those that end there."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


@given(TEXTS, st.lists(st.text(st.sampled_from("ab\n<é漢🙂"), min_size=1, max_size=5), max_size=4), st.integers())
def test_pieces_are_cut_where_the_whole_is_and_nothing_of_a_stop_string_goes_out(
    text: str, stops: list[str], seed: int
) -> None:
    wanted = naive_cut(text, stops)
    finder, sent = StopStrings(stops), ""
    for piece in pieces(text, seed):
        sent += finder.feed(piece)
        assert wanted.startswith(sent)
    assert sent + finder.rest() == wanted == cut(text, stops)[0]
    assert (finder.found is not None) == any(stop in text for stop in stops)


def test_what_cannot_become_a_stop_string_is_not_held_back() -> None:
    finder = StopStrings(["END"])
    assert [finder.feed(piece) for piece in ("abc E", "N", "X", "EEN")] == ["abc ", "", "ENX", "E"]
    assert finder.rest() == "EN"


@given(st.lists(st.one_of(st.text(max_size=8).map(lambda text: PICO.encode(text).ids), st.lists(st.integers(0, 255)))))
def test_a_text_comes_as_it_is_decoded_at_once(parts: list[list[int]]) -> None:
    """Tokens of texts, and of bytes that are none."""
    tokens = [token for part in parts for token in part]
    decode = decode_by(PICO)
    text, told = Detokenizer(decode), ""
    for token in tokens:
        told += text.push([token])
    assert told + text.flush() == decode(tokens)
    at_once = Detokenizer(decode)
    assert at_once.push(tokens) + at_once.flush() == decode(tokens)


def test_a_piece_costs_the_same_however_long_the_text_is() -> None:
    sizes: list[int] = []
    decode = decode_by(PICO)

    def counting(token_ids: object) -> str:
        sizes.append(len(token_ids))  # type: ignore[arg-type]
        return decode(token_ids)  # type: ignore[arg-type]

    text = Detokenizer(counting)
    lone = PICO.encode("🙂").ids[-1]  # the end of a character alone: never text
    for token in PICO.encode("12 + 34 = 46\n" * 200).ids + [lone] * 200:
        text.push([token])
    assert max(sizes) <= 16


def test_a_token_that_ends_a_character_ends_the_stop_string() -> None:
    tokens = PICO.encode("a🙂b").ids
    assert len(tokens) > 3, "the character takes several tokens"
    finder, text = StopStrings(["🙂"]), Detokenizer(decode_by(PICO))
    found = [finder.feed(text.push([token])) is not None and finder.found is not None for token in tokens]
    assert found.index(True) == len(tokens) - 2


def naive_loop(tokens: list[int], limit: RepetitionLimit) -> bool:
    """Whether the tail is a pattern `min_count` times, over `min_tokens` at least."""
    for size in range(limit.min_pattern_size, limit.max_pattern_size + 1):
        length = max(size * limit.min_count, limit.min_tokens)
        tail = tokens[-length:]
        if len(tail) == length and all(tail[i] == tail[i - size] for i in range(size, length)):
            return True
    return False


@given(
    st.lists(st.integers(0, 2), max_size=60),
    st.builds(
        RepetitionLimit,
        max_pattern_size=st.integers(3, 6),
        min_pattern_size=st.integers(1, 3),
        min_count=st.integers(2, 4),
        min_tokens=st.integers(0, 14),
    ),
)
def test_a_loop_is_seen_with_the_token_that_makes_it_one(tokens: list[int], limit: RepetitionLimit) -> None:
    watch = Repetition(limit)
    for count, token in enumerate(tokens, start=1):
        assert watch.push(token) == naive_loop(tokens[:count], limit)


@given(st.sampled_from(["", THINK_LINE, "<think>", "<thin"]), TEXTS, st.sampled_from(["", END_OF_THINKING]), TEXTS)
def test_reasoning_and_answer_come_in_pieces_as_they_are_split_whole(
    opening: str, thought: str, tag: str, answer: str
) -> None:
    text = opening + thought + tag + answer
    parts, (reasoning, content) = Reasoning(), ("", "")
    for piece in pieces(text, seed=len(text)):
        new = parts.feed(piece)
        reasoning, content = reasoning + new[0], content + new[1]
    reasoning += parts.rest()[0]
    assert (reasoning, content) == (split(text)[0], split(text)[1] or "")
    assert text.removeprefix(THINK_LINE) == reasoning + tag + content


@pytest.mark.parametrize("run_ahead", [False, True])
def test_steps_are_told_as_they_come_and_a_stop_string_ends_them(run_ahead: bool) -> None:
    """Where a step is launched before the last one's tokens are known, nothing that is not known is told."""
    model = random_model(tiny_config(rope_scaling=None), std=0.1).eval()
    alphabet = "".join(chr(0x100 + token) for token in range(64))

    def decode(token_ids: Sequence[int]) -> str:
        return "".join(alphabet[token] for token in token_ids)

    def run(*stops: str) -> tuple[sequence.Sequence[int], list[list[int]]]:
        engine = Engine(LatentModel.of(model), batch_size=2, eos_token_ids=[], decode=decode, run_ahead=run_ahead)
        jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        asked = sequence.Sequence(
            1, [7, 8, 9], max_tokens=40, seed=1, sampling_params=SamplingParams(1.0), stops=stops, streamed=True
        )
        jobs.put([asked])
        told: list[list[int]] = []

        def done(ended: sequence.Sequence[int]) -> None:
            told.append(ended.generated_ids[sum(map(len, told)) :])
            jobs.put(None)

        EngineLoop(engine, jobs, done, lambda news: told.extend(grown.token_ids for grown in news)).run()
        assert engine.num_computed_tokens <= len(asked.generated_ids) + 3
        return asked, told

    whole, told = run()
    assert [token for piece in told for token in piece] == whole.generated_ids
    assert len(told) == len(whole.generated_ids) == 40
    stop = decode(whole.generated_ids[10:12])
    stopped, _ = run("none", stop)
    place = decode(whole.generated_ids).index(stop)
    assert (stopped.finish_reason, len(stopped.generated_ids)) == ("stop", place + 2)
    assert stopped.generated_ids == whole.generated_ids[: place + 2]
