"""Folders of models: code that they name, sizes beyond belief, files that are none, chat templates without end."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.hostile.case import (
    DEEP,
    DOCTOR,
    GENERATE,
    RUN,
    TRAP,
    cases,
    content,
    deep_json,
    in_a_circle,
    instead,
    sparse,
    without_end,
)

SERVE_BASE = ("serve", "base", "--port", "0")
SERVE_TEACHER = ("serve", "teacher", "--port", "0")
OF_BASE = (DOCTOR, RUN, SERVE_BASE)
OF_TEACHER = (DOCTOR, GENERATE, SERVE_TEACHER)


def _code(world: Path) -> str:
    trap = f"from pathlib import Path\nPath({str(world / TRAP)!r}).write_text('ran')\n"
    return f"{trap}class Config: pass\nclass Tok: pass\n"


class _Pickled:
    """Runs code where it is unpickled."""

    def __init__(self, world: Path) -> None:
        self.world = world

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, (_code(self.world),))


def _settings(folder: str, name: str, **changes: Any) -> Callable[[Path], None]:
    """Change fields of a JSON file of the folder; values that are callables are given the world."""

    def make(world: Path) -> None:
        path = world / folder / name
        tree = json.loads(path.read_text()) if path.exists() else {}
        (world / folder / "trap.py").write_text(_code(world))
        path.write_text(json.dumps({**tree, **changes}))

    return make


def _raw_field(folder: str, field: str, raw: str) -> Callable[[Path], None]:
    """A field of config.json as text that Python's JSON would not write."""

    def make(world: Path) -> None:
        path = world / folder / "config.json"
        tree = json.loads(path.read_text())
        tree[field] = "@@"
        path.write_text(json.dumps(tree).replace('"@@"', raw))

    return make


def _pickled_weights(world: Path) -> None:
    (world / "base/model.safetensors").unlink()
    (world / "base/pytorch_model.bin").write_bytes(pickle.dumps(_Pickled(world)))


def _custom_generate(world: Path) -> None:
    (world / "base/custom_generate").mkdir()
    (world / "base/custom_generate/generate.py").write_text(_code(world))
    _settings("base", "generation_config.json", custom_generate="base")(world)


def _header(text: bytes, length: int | None = None) -> Callable[[Path], None]:
    def make(world: Path) -> None:
        size = len(text) if length is None else length
        (world / "base/model.safetensors").write_bytes(size.to_bytes(8, "little") + text)

    return make


def _index(weight_map: str) -> Callable[[Path], None]:
    def make(world: Path) -> None:
        (world / "base/model.safetensors.index.json").write_text(weight_map)

    return make


def _growing(field: str) -> Callable[[Path], None]:
    """A tokenizer that makes ten characters of one, eight times over."""
    steps = [{"type": "Replace", "pattern": {"String": letter}, "content": 10 * letter} for letter in "aaaaaaaa"]
    kind = {"normalizer": "normalizers", "decoder": "decoders"}[field]
    return _settings("base", "tokenizer.json", **{field: {"type": "Sequence", kind: steps}})


def _template(source: str) -> Callable[[Path], None]:
    def make(world: Path) -> None:
        (world / "base/chat_template.jinja").write_text(source.replace("TRAP", str(world / TRAP)))
        student = yaml.safe_load((world / "student.yaml").read_text()) | {"chat_template": None}
        (world / "student.yaml").write_text(yaml.safe_dump(student))

    return make


CASES = [
    *cases(
        OF_BASE,
        {
            "auto-map": (_settings("base", "config.json", auto_map={"AutoConfig": "trap.Config"}), "auto_map"),
            "auto-map-of-an-unknown-type": (
                _settings("base", "config.json", model_type="mine", auto_map={"AutoConfig": "trap.Config"}),
                "base/config.json: auto_map",
            ),
            "auto-map-of-the-hub": (
                _settings("base", "config.json", auto_map={"AutoModelForCausalLM": "someone/else--trap.Config"}),
                "base/config.json: auto_map",
            ),
            "auto-map-within": (
                _settings("base", "config.json", text_config={"auto_map": {"AutoConfig": "trap.Config"}}),
                "base/config.json: text_config.auto_map",
            ),
            "auto-map-of-a-tokenizer": (
                _settings("base", "tokenizer_config.json", auto_map={"AutoTokenizer": ["trap.Tok", None]}),
                "base/tokenizer_config.json: auto_map",
            ),
            "auto-map-of-a-tokenizer-as-a-list": (
                _settings("base", "tokenizer_config.json", auto_map=["trap.Tok", "trap.Tok"], tokenizer_class="Tok"),
                "base/tokenizer_config.json: auto_map",
            ),
            "custom-generate": (_custom_generate, "base/generation_config.json: custom_generate"),
            "custom-pipelines": (
                _settings("base", "config.json", custom_pipelines={"text-generation": {"impl": "trap.Config"}}),
                "base/config.json: custom_pipelines",
            ),
            "kernels-of-the-hub": (
                _settings("base", "config.json", attn_implementation="someone/kernels"),
                "base/config.json: attn_implementation",
            ),
            "tokenizer-class-of-a-module": (
                _settings("base", "tokenizer_config.json", tokenizer_class="trap.Tok"),
                "base/tokenizer_config.json: tokenizer_class",
            ),
            "an-adapter": (
                _settings("base", "adapter_config.json", base_model_name_or_path="someone/else", peft_type="LORA"),
                "base/adapter_config.json",
            ),
            "pickled-weights": (_pickled_weights, "pytorch_model.bin is a pickle"),
            "an-index-of-pickles": (
                _index('{"weight_map": {"model.embed_tokens.weight": "pytorch_model.bin"}}'),
                "must be a .safetensors file",
            ),
            "a-billion-layers": (_settings("base", "config.json", num_hidden_layers=10**9), "num_hidden_layers"),
            "a-trillion-tokens": (_settings("base", "config.json", vocab_size=10**12), "vocab_size"),
            "more-layers-than-weights": (_settings("base", "config.json", num_hidden_layers=900), "num_hidden_layers"),
            "more-tokens-than-weights": (_settings("base", "config.json", vocab_size=4000000), "vocab_size"),
            "wider-than-weights": (_settings("base", "config.json", intermediate_size=1000000), "intermediate_size"),
            "less-than-nothing": (_settings("base", "config.json", hidden_size=-32), "hidden_size"),
            "a-broken-number": (_settings("base", "config.json", num_attention_heads=4.0), "num_attention_heads"),
            "a-number-as-a-text": (_settings("base", "config.json", num_key_value_heads="2"), "num_key_value_heads"),
            "a-switch-for-a-number": (_settings("base", "config.json", num_hidden_layers=True), "num_hidden_layers"),
            "not-a-number": (_raw_field("base", "hidden_size", "NaN"), "hidden_size"),
            "endless-positions": (_settings("base", "config.json", max_position_embeddings=10**15), "max_position"),
            "a-number-of-a-million-digits": (_raw_field("base", "vocab_size", "9" * 10**6), "config.json"),
            "deep-config": (content("base/config.json", deep_json()), "base/config.json"),
            "config-of-another-encoding": (content("base/config.json", b'{"model_type": "gr\xfc\xdfe"}'), "not UTF-8"),
            "config-with-a-key-twice": (
                content("base/config.json", '{"vocab_size": 1, "vocab_size": 2}'),
                "occurs twice",
            ),
            "config-as-a-pipe": (instead("base/config.json", os.mkfifo), "it is a pipe"),
            "config-as-a-folder": (instead("base/config.json", Path.mkdir), "it is a folder"),
            "config-in-a-circle": (instead("base/config.json", in_a_circle), "base/config.json"),
            "config-without-end": (instead("base/config.json", without_end), "it is a device"),
            "config-of-a-gigabyte": (instead("base/config.json", sparse(1 << 30)), "1024 MiB"),
            "tokenizer-of-a-gigabyte": (instead("base/tokenizer.json", sparse(1 << 30)), "1024 MiB"),
            "tokenizer-without-end": (instead("base/tokenizer.json", without_end), "it is a device"),
            "deep-tokenizer": (content("base/tokenizer.json", f'{{"model": {deep_json()}}}'), "base"),
            "weights-as-a-pipe": (instead("base/model.safetensors", os.mkfifo), "it is a pipe"),
            "a-header-of-terabytes": (_header(b"{}", 1 << 40), "base/model.safetensors"),
            "a-deep-header": (_header(deep_json().encode()), "damaged header"),
            "a-shape-of-a-million-sizes": (
                _header(
                    json.dumps({"x": {"dtype": "F32", "shape": [2**60] * 10**6, "data_offsets": [0, 4]}}).encode()
                    + b" " * 8
                ),
                "damaged entry",
            ),
            "an-index-that-leads-out": (_index('{"weight_map": {"x": "../prompts.safetensors"}}'), "in this folder"),
            "a-deep-index": (_index(deep_json()), "index.json"),
            "a-long-text": (_template("{{ 'x' * 10**9 }}"), "chat"),
            "a-wide-text": (_template("{{ 'x'|center(10**10) }}"), "chat"),
            "a-text-that-doubles": (
                _template(
                    "{% set n = namespace(s='x') %}"
                    "{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}"
                ),
                "chat",
            ),
            "a-text-again-and-again": (
                _template("{% for i in range(99999) %}{{ messages|tojson }}{% endfor %}"),
                "writes more",
            ),
            "a-recursion": (_template("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}"), "recurses"),
            "a-way-out": (_template("{{ cycler.__init__.__globals__.os.system('touch TRAP') }}"), "unsafe"),
            "a-deep-template": (_template("{% if 1 %}" * DEEP + "{% endif %}" * DEEP), "chat"),
            "a-template-of-megabytes": (_template("x" * 2000000), "characters"),
        },
    ),
    *cases(
        OF_BASE,
        {
            "a-tokenizer-that-grows": (_growing("normalizer"), "base/tokenizer.json"),
            "a-tokenizer-that-grows-as-it-reads": (_growing("decoder"), "base/tokenizer.json"),
            "a-loop": (
                _template("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"),
                "not rendered within",
            ),
            "a-power": (_template("{{ (10 ** (10 ** 9)) > 1 }}"), "chat"),
            "a-recursion-that-forks": (
                _template("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"),
                "not rendered within",
            ),
        },
        slow=True,
    ),
    *cases(
        OF_TEACHER,
        {
            "auto-map-of-a-teacher": (
                _settings("teacher", "tokenizer_config.json", auto_map={"AutoTokenizer": ["trap.Tok", None]}),
                "teacher/tokenizer_config.json: auto_map",
            ),
            "experts-without-end": (_settings("teacher", "config.json", n_routed_experts=65536), "n_routed_experts"),
            "a-teacher-of-many-layers": (_settings("teacher", "config.json", num_hidden_layers=10**9), "num_hidden"),
            "tokenizer-as-a-pipe": (instead("teacher/tokenizer.json", os.mkfifo), "it is a pipe"),
        },
    ),
]
