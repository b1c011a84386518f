"""Prompts as tokens: the same as the tokenizer's own way, with others running meanwhile, and never too many at once."""

from __future__ import annotations

import threading
import time
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st
from tokenizers.normalizers import NFC
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distill.records import Problem, Sampling, TraceRequest
from teacher.backends.native.backend import NativeBackend
from teacher.backends.tokenizer import encode_text, most_characters
from teacher.live import Conversation, GenerationRequest, PromptTooLong
from tests.repository import REPOSITORY
from tests.teacher.backends.native.test_native_backend import open_it
from tests.teacher.v3_models import tiny_config, write_model_folder

PICO = REPOSITORY / "teacher/pico"
texts = st.text(st.characters(exclude_categories=["Cs"])) | st.text("12+ <|im_start|>\n=é\u0301\u1161")


def read(*, composing: bool) -> PreTrainedTokenizerBase:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(PICO)
    if composing:
        tokenizer.backend_tokenizer.normalizer = NFC()
    return tokenizer


PLAIN, COMPOSING = read(composing=False), read(composing=True)


@given(text=texts, special=st.booleans())
def test_they_are_the_tokenizer_s_own(text: str, special: bool) -> None:
    assert encode_text(PLAIN, text, add_special_tokens=special) == PLAIN.encode(text, add_special_tokens=special)


@given(text=texts)
def test_no_text_has_fewer_tokens_than_its_length_says(text: str) -> None:
    for tokenizer in (PLAIN, COMPOSING):
        for form in (text, unicodedata.normalize("NFD", text)):
            num_tokens = len(encode_text(tokenizer, form, add_special_tokens=False))
            assert num_tokens * most_characters(tokenizer) >= len(form)


def test_others_run_while_a_long_text_is_split() -> None:
    text, done, longest = "12 + 34 = 46, so " * 40_000, threading.Event(), 0.0

    def split() -> None:
        encode_text(PLAIN, text, add_special_tokens=False)
        done.set()

    begun = time.perf_counter()
    thread = threading.Thread(target=split)
    thread.start()
    ticks, last = 0, time.perf_counter()
    while not done.wait(0.005):
        now = time.perf_counter()
        ticks, longest, last = ticks + 1, max(longest, now - last), now
    took = time.perf_counter() - begun
    thread.join()
    assert ticks >= 10, "it took many turns"
    assert longest < took / 2, "and none of them took most of the time"


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> NativeBackend:
    folder: Path = tmp_path_factory.mktemp("teacher")
    write_model_folder(folder, tiny_config(), std=0.1)
    return open_it(folder)


def test_what_cannot_fit_is_refused_before_it_is_split(backend: NativeBackend) -> None:
    with pytest.raises(PromptTooLong, match=r"has at least \d+ tokens; the model takes 127"):
        backend.encode("1" * (backend.max_characters + 1))
    assert len(backend.encode("1" * backend.max_characters)) > 127


def test_the_samples_of_one_request_are_rendered_once(backend: NativeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[GenerationRequest] = []
    render = backend._rendered

    def counted(wanted: GenerationRequest) -> Any:
        rendered.append(wanted)
        return render(wanted)

    monkeypatch.setattr(backend, "_rendered", counted)
    one, other = (Problem(prompt=f"{n} + 1?", answer=None, grader="math", source="http") for n in range(2))
    asked = Conversation(({"role": "user", "content": "2 + 2?"},))
    prompts = []
    for problem, prompt in ((one, None), (other, None), (other, asked), (one, None)):
        for index in range(3):
            wanted = GenerationRequest(TraceRequest(problem=problem, sample_index=index), prompt)
            handle = backend.submit(wanted, Sampling(max_tokens=1), lambda outcome: None)
            prompts.append(tuple(handle.prompt_ids))
    assert len(rendered) == 4
    assert len(set(prompts)) == 3
    assert prompts[:3] == prompts[9:]
    backend.close()
