"""Guided decoding: what ends has the form that was asked for, however it is computed; hostile grammars are refused."""

from __future__ import annotations

import json
import re
import resource
import time
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings, strategies as st

from distill.reasoning import END_OF_THINKING
from teacher.engine.detokenizer import decode_by
from teacher.engine.engine import Engine
from teacher.engine.guide import MAX_GRAMMAR_CHARACTERS, Grammar, Guides
from teacher.engine.sampler import SamplingParams
from teacher.engine.sequence import Sequence, ThinkingLimit
from teacher.http.structured import ResponseFormat, StructuredOutputs
from teacher.model.checkpoint import load_checkpoint
from teacher.models.latent.model import LatentModel
from teacher.models.latent.weights import fuse_weights
from teacher.models.load import load_model
from tests.repository import REPOSITORY
from tests.teacher.engine.test_speculation import Planned

TEACHER = REPOSITORY / "teacher" / "pico"
STUDENT = REPOSITORY / "students" / "pico" / "qwen2-0.2m"
TEACHER_END, STUDENT_ENDS = 2, (0, 2)
HOT = SamplingParams(1.5)


def tokenizer_of(folder: Any) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def json_grammar(schema: dict[str, Any]) -> Grammar:
    asked = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    return Grammar(f"answer: {ResponseFormat.model_validate(asked).rule}")


@pytest.fixture(scope="module")
def student() -> tuple[Engine, Guides, Any]:
    tokenizer = tokenizer_of(STUDENT)
    engine = Engine(load_model(STUDENT, torch.device("cpu")), batch_size=8, eos_token_ids=STUDENT_ENDS)
    return engine, Guides(tokenizer, STUDENT_ENDS), decode_by(tokenizer)


def text_of(sequence: Sequence[Any], decode: Any, ends: tuple[int, ...]) -> str:
    assert sequence.fault is None
    ids = sequence.generated_ids
    return decode(ids[:-1] if ids[-1] in ends else ids)


LEAVES = st.sampled_from(
    [
        {"type": "integer", "minimum": -9, "maximum": 12},
        {"type": "boolean"},
        {"type": "null"},
        {"type": "string", "maxLength": 4},
        {"enum": ["red", "blue", 7]},
        {"const": 'x\n"é'},
    ]
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(lambda items: {"type": "array", "items": items, "maxItems": 2}, inner),
        st.builds(lambda two: {"anyOf": list(two)}, st.tuples(inner, inner)),
        st.builds(
            lambda fields: {
                "type": "object", "properties": fields, "required": sorted(fields)[:1], "additionalProperties": False
            },
            st.dictionaries(st.sampled_from(["a", "b", "long name"]), inner, min_size=1, max_size=2),
        ),
    ),
    max_leaves=4,
)  # fmt: skip


def has_form(value: Any, schema: dict[str, Any]) -> bool:
    """The part of JSON Schema that `SCHEMAS` uses."""
    if "anyOf" in schema:
        return any(has_form(value, one) for one in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    if "const" in schema:
        return value == schema["const"]
    kinds = {"integer": int, "boolean": bool, "null": type(None), "string": str, "array": list, "object": dict}
    if type(value) is not kinds[schema["type"]]:
        return False
    if isinstance(value, dict):
        fields = schema["properties"]
        fits = all(name in fields and has_form(one, fields[name]) for name, one in value.items())
        return fits and set(schema["required"]) <= set(value)
    if isinstance(value, list):
        return len(value) <= schema["maxItems"] and all(has_form(one, schema["items"]) for one in value)
    if isinstance(value, str):
        return len(value) <= schema["maxLength"]
    return schema["type"] != "integer" or schema["minimum"] <= value <= schema["maximum"]


@settings(deadline=None, max_examples=12, derandomize=True)
@given(SCHEMAS, st.integers(0, 2**31))
def test_what_ends_has_the_form(student: tuple[Engine, Guides, Any], schema: dict[str, Any], seed: int) -> None:
    engine, guides, decode = student
    grammar = json_grammar(schema)
    sequences = [
        Sequence(n, [1, 20, 30], max_tokens=400, seed=seed + n, sampling_params=HOT, guide=guides.guide(grammar))
        for n in range(3)
    ]
    done = list(engine.run(sequences))
    # Such schemas admit short texts alone, so all come to their end.
    assert [sequence.finish_reason for sequence in done] == ["stop"] * 3
    for sequence in done:
        assert has_form(json.loads(text_of(sequence, decode, STUDENT_ENDS)), schema)


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"regex": r"[a-c]{2}/\d+\.x\n?"}, r"[a-c]{2}/\d+\.x\n?"),
        ({"choice": ["yes", "no", 'per"haps\né']}, 'yes|no|per"haps\né'),
    ],
)
def test_regexes_and_choices(student: tuple[Engine, Guides, Any], asked: dict[str, Any], pattern: str) -> None:
    engine, guides, decode = student
    grammar = Grammar(f"answer: {StructuredOutputs.model_validate(asked).rule}")
    sequences = [
        Sequence(n, [1, 20, 30], max_tokens=60, seed=n, sampling_params=HOT, guide=guides.guide(grammar))
        for n in range(12)
    ]
    texts = {text_of(sequence, decode, STUDENT_ENDS) for sequence in engine.run(sequences)}
    assert all(re.fullmatch(pattern, text) for text in texts), texts
    assert len(texts) > 1


def mixed(guides: Guides) -> list[Sequence[int]]:
    """Every other one guided; penalties, biases and logprobs beside it."""
    draws = [SamplingParams(1.2, top_logprobs=2), SamplingParams(1.0, repetition_penalty=1.2), SamplingParams(0.9, 0.9)]
    grammar = json_grammar({"type": "object", "properties": {"n": {"type": "array", "items": {"type": "integer"}}}})
    return [
        Sequence(
            n,
            [1, 3, *range(20, 24 + 13 * n), 4],
            max_tokens=50,
            seed=n,
            sampling_params=draws[n % 3],
            guide=guides.guide(grammar) if n % 2 else None,
        )
        for n in range(8)
    ]


def written(guides: Guides, *, in_graphs: bool = False, **features: Any) -> dict[int, Sequence[int]]:
    weights = fuse_weights(load_checkpoint(TEACHER), with_mtp=True)
    served = LatentModel(weights, Planned(weights) if in_graphs else None)
    engine = Engine(served, eos_token_ids=[TEACHER_END], **features)
    return {sequence.key: sequence for sequence in engine.run(mixed(guides))}


@pytest.fixture(scope="module")
def teacher_guides() -> Guides:
    return Guides(tokenizer_of(TEACHER), [TEACHER_END])


@pytest.fixture(scope="module")
def alone(teacher_guides: Guides) -> dict[int, list[int]]:
    done = written(teacher_guides, batch_size=1, prefix_caching=False)
    return {key: sequence.generated_ids for key, sequence in done.items()}


@pytest.mark.parametrize(
    "features",
    [
        {"batch_size": 8},
        {"batch_size": 8, "num_pages": 9, "run_ahead": True},
        {"batch_size": 8, "speculate": True},
        {"batch_size": 8, "speculate": True, "run_ahead": True, "in_graphs": True},
    ],
    ids=str,
)
def test_every_way_of_computing_writes_the_same(
    teacher_guides: Guides, alone: dict[int, list[int]], features: dict[str, Any]
) -> None:
    decode = decode_by(tokenizer_of(TEACHER))
    done = written(teacher_guides, **features)
    assert {key: sequence.generated_ids for key, sequence in done.items()} == alone
    ended = [sequence for key, sequence in done.items() if key % 2 and sequence.finish_reason == "stop"]
    assert ended
    for sequence in ended:
        json.loads(text_of(sequence, decode, (TEACHER_END,)))
    if "speculate" in features:
        assert all(sequence.num_drafts for sequence in done.values()), "the guided are drafted for too"


def test_logprobs_are_those_of_what_may_come(student: tuple[Engine, Guides, Any]) -> None:
    engine, guides, _ = student
    grammar = Grammar('answer: "1" | "2"')
    params = SamplingParams(1.0, top_logprobs=3)
    (done,) = engine.run([Sequence(0, [1, 20, 30], 5, 0, params, guide=guides.guide(grammar))])
    own, top = done.logprobs[0]
    assert sum(torch.tensor([value for _, value in top]).exp()).item() == pytest.approx(1, abs=1e-5)
    assert top[2][1] == -torch.inf
    assert own in (top[0][1], top[1][1])


def test_the_answer_begins_behind_the_reasoning() -> None:
    """Thinking is free, may be forced to its end, and two line breaks may follow."""
    tokenizer = tokenizer_of(TEACHER)
    guides, decode = Guides(tokenizer, [TEACHER_END]), decode_by(tokenizer)
    engine = Engine(LatentModel.of(load_checkpoint(TEACHER)), batch_size=4, eos_token_ids=[TEACHER_END])
    (end,) = tokenizer.encode(END_OF_THINKING, add_special_tokens=False).ids
    forced = tuple(tokenizer.encode(f"\n{END_OF_THINKING}\n\n", add_special_tokens=False).ids)
    prompt = tokenizer.encode("<|bos|><|user|>What is 3 + 4?<|assistant|><think>\n", add_special_tokens=False).ids
    grammar = Grammar(json_grammar({"type": "object"}).lark, thinks=True)
    sequences = [
        Sequence(
            n, prompt, max_tokens=300, seed=n, sampling_params=SamplingParams(0.7), guide=guides.guide(grammar),
            thinking=ThinkingLimit(6, end, forced) if n % 2 else None,
        )
        for n in range(4)
    ]  # fmt: skip
    for sequence in engine.run(sequences):
        thought, _, answer = text_of(sequence, decode, (TEACHER_END,)).partition(END_OF_THINKING)
        assert (sequence.key % 2 == 1) == (len(tokenizer.encode(thought).ids) <= 8)
        assert isinstance(json.loads(answer), dict)


def test_tags_are_tokens_where_the_vocabulary_has_them(student: tuple[Engine, Guides, Any]) -> None:
    engine, guides, decode = student
    grammar = Grammar('answer: tag_0 "7" tag_1', tags=("<|im_start|>", "<call>"))
    (done,) = engine.run([Sequence(0, [1, 20, 30], 40, 0, HOT, guide=guides.guide(grammar))])
    assert done.generated_ids[0] == tokenizer_of(STUDENT).token_to_id("<|im_start|>")
    assert text_of(done, decode, STUDENT_ENDS) == "<|im_start|>7<call>"


def nested(depth: int, opening: str, closing: str) -> dict[str, Any]:
    return json.loads(opening * depth + "{}" + closing * depth)


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "deep": (nested(150, '{"type":"array","items":', "}"), "recursion limit"),
    "huge": ({"enum": [f"value {n}" for n in range(100_000)]}, f"at most {MAX_GRAMMAR_CHARACTERS}"),
    "endless reference": ({"$ref": "#"}, "admits no text"),
    "false": ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "Unsatisfiable"),
    "an unknown type": ({"type": "nope"}, "Invalid type"),
    "a keyword that is not kept": ({"not": {"type": "string"}}, "Unimplemented"),
    "a file": ({"$ref": "file:///etc/passwd"}, "not present"),
    "an address": ({"$ref": "http://127.0.0.1:1/schema"}, "not present"),
    "a product of choices": (
        {"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in range(3)]} for i in range(12)]},
        "too large",
    ),
    "a regex that is none": ({"type": "string", "pattern": "(("}, "regex"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_grammars_that_cannot_be_kept_say_why(student: tuple[Engine, Guides, Any], kind: str) -> None:
    _, guides, _ = student
    schema, reason = HOSTILE[kind]
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        guides.guide(json_grammar(schema))
    assert "\n" not in str(caught.value)
    assert not str(caught.value).startswith("at ")


COSTLY = {
    "many properties": {"type": "object", "properties": {f"property {n}": {"type": "string"} for n in range(1_200)}},
    "many choices": {"anyOf": [{"type": "object", "required": [f"p{n}"]} for n in range(1_000)]},
    "a long enum": {"enum": [f"value {n}" for n in range(4_000)]},
    "states": {"type": "string", "pattern": "^(?:.*a.{20}|.*b.{25}|[\\u0000-\\uffff]{1,1000})*$"},
    "powers": {"type": "string", "pattern": "^((a{1,100}){1,100}){1,100}$"},
    "doubling": {
        "$defs": {"d0": {"type": "string"}}
        | {
            f"d{n}": {"type": "object", "properties": {side: {"$ref": f"#/$defs/d{n - 1}"} for side in "xy"}}
            for n in range(1, 40)
        },
        "$ref": "#/$defs/d39",
    },
    "a long array": {"type": "array", "items": {"type": "integer"}, "minItems": 100_000},
}


@pytest.mark.parametrize("kind", COSTLY)
def test_costly_grammars_are_bounded_in_time_and_memory(student: tuple[Engine, Guides, Any], kind: str) -> None:
    """Refused, ended with a fault, or followed: in a second or two of this processor's time, and 200 MB."""
    engine, guides, _ = student
    before, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        guide = guides.guide(json_grammar(COSTLY[kind]))
    except ValueError:
        pass
    else:
        (done,) = engine.run([Sequence(0, [1, 20, 30], 60, 0, HOT, guide=guide)])
        assert done.fault is None or done.fault.startswith("the answer's grammar could not be kept: ")
    assert time.process_time() - before < 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200 * 1024


def test_a_grammar_that_grows_too_complex_ends_its_sequence_alone(student: tuple[Engine, Guides, Any]) -> None:
    engine, guides, decode = student
    sequences = [
        Sequence(0, [1, 20, 30], 60, 0, HOT, guide=guides.guide(json_grammar(COSTLY["states"]))),
        Sequence(1, [1, 20, 30], 60, 1, HOT, guide=guides.guide(Grammar('answer: "aye"'))),
    ]
    done = {sequence.key: sequence for sequence in engine.run(sequences)}
    assert text_of(done[1], decode, STUDENT_ENDS) == "aye"
    assert done[0].fault is not None
    assert "too many" in done[0].fault
    assert engine.blocks.num_available == engine.blocks.num_pages


def test_a_tokenizer_of_unknown_kind_is_refused() -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.decoder = tokenizers.decoders.Fuse()
    with pytest.raises(ValueError, match="decoder"):
        Guides(words, [1]).guide(Grammar('answer: "a"'))
