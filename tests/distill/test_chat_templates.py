"""Chat templates: the texts of transformers to the letter, and templates that would never end or fill the memory."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distill.chat_templates import TemplateRefusal, render, render_all
from distill.errors import CheckpointError, DataError
from tests.repository import REPOSITORY
from tests.students.tiny_bases import make_tokenizer

MODELS = Path(os.environ.get("POTSTILL_MODELS", REPOSITORY / "models"))
TEMPLATES = sorted((REPOSITORY / "students/templates").glob("*.jinja"))
BUNDLED = sorted(path.parent for path in REPOSITORY.glob("*/pico/**/tokenizer.json"))
FETCHED = sorted(path.parent for path in MODELS.glob("*/tokenizer.json"))

QUESTION = {"role": "user", "content": 'What is "2 + 3"?\n<b>ü</b> \U0001f600'}
CHATS = [
    [QUESTION],
    [QUESTION, {"role": "assistant", "content": "<think>\n2 + 3 = 5\n</think>\n\n\\boxed{5}"}],
    [QUESTION, {"role": "assistant", "content": "5"}, {"role": "user", "content": "  and more?  "}],
    [{"role": "system", "content": "Be brief."}, QUESTION],
]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds <two> numbers & says so",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]},
    },
}
# Qwen2.5's way with tools, and what else real templates use: loop controls, generation blocks, macros, namespaces.
RICH = """
{%- macro turn(role, text) %}<|im_start|>{{ role }}
{{ text | trim }}<|im_end|>
{% endmacro -%}
{%- set seen = namespace(system=false) %}
{%- if tools %}
    {{- turn('system', 'Tools:\n' ~ (tools | map('tojson') | join('\n'))) }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% set seen.system = true %}{% continue %}{% endif %}
    {%- if message.role == 'assistant' %}{% generation %}{{ turn('assistant', message['content'][-9:]) }}
    {%- endgeneration %}
    {%- elif message.role == 'user' %}{{ turn('user', message.content) }}
    {%- else %}{{ raise_exception('no role ' + message.role) }}{% endif %}
    {%- if loop.last and not add_generation_prompt %}{{ eos_token }}{% break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>{% endif %}{% endif %}
{{- messages | tojson(indent=2) }}{{ strftime_now('%d %B %Y') }}"""

MESSAGE = [{"role": "user", "content": "hi"}]
ENDLESS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops over characters": "{% for m in messages %}{% for a in m.content * 999 %}{% for b in m.content * 9999 %}"
    "{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}{% endfor %}",
    "a macro that forks": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a power": "{{ (10 ** (10 ** 8 + messages | length)) > 1 }}",
}
HUGE = {
    "a constant": "{{ 'x' * 10**10 }}",
    "a product": "{% set n = messages | length * 10**9 %}{{ 'x' * n }}",
    "center": "{{ 'x' | center(10**10) }}",
    "join": "{{ range(99999) | join('x' * 99999) }}",
    "replace": "{{ ('x' * 99999) | replace('x', 'y' * 99999) }}",
    "a format": "{{ '%1000000000d' % 1 }}",
    "another format": "{{ '{:>9999999999}'.format(1) }}",
    "batch": "{{ range(9) | batch(10**10, 'x') | list }}",
    "indent": "{{ 'a\nb' | indent(10**10) }}",
    "a text that doubles": "{% set n = namespace(s='x') %}"
    "{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
}
LONG = {
    "tojson": "{% for i in range(99999) %}{{ messages | tojson }}{% endfor %}",
    "cycler": "{% set c = cycler('a' * 99, 'b' * 99) %}{% for i in range(9999) %}"
    "{% for j in range(9999) %}{{ c.next() }}{% endfor %}{% endfor %}",
}
BROKEN = {
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}": "recurses",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}": "recurses",
    "{% for %}": "TemplateSyntaxError",
    "{{ a.b.c }}": "UndefinedError",
    "{{ ''.__class__.__mro__ }}": "SecurityError",
    "{{ messages.append(1) }}": "SecurityError",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "x" * 2_000_000: "2000000 characters",
}


class Owner:
    """What has no more than a template."""

    def __init__(self, template: str) -> None:
        self.template, self.name_or_path = template, "owner"
        self.special_tokens_map: dict[str, str] = {}

    def get_chat_template(self, chat_template: str | None = None, tools: object = None) -> str:
        return self.template


def by_transformers(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]], **given: object) -> str | None:
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, **given))
    except Exception:  # noqa: BLE001  whatever transformers raises, we must refuse too
        return None


def by_us(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]], **given: object) -> str | None:
    try:
        return render(tokenizer, chat, **given)  # type: ignore[arg-type]
    except (CheckpointError, DataError):
        return None


@pytest.mark.parametrize("source", [*TEMPLATES, RICH], ids=[*(path.stem for path in TEMPLATES), "rich"])
def test_texts_are_those_of_transformers(source: Path | str) -> None:
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = source.read_text() if isinstance(source, Path) else source
    assert_same(tokenizer)


@pytest.mark.parametrize("folder", [*BUNDLED, *FETCHED], ids=lambda folder: folder.name)
def test_texts_of_real_models_are_those_of_transformers(folder: Path) -> None:
    assert_same(PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False))


def assert_same(tokenizer: PreTrainedTokenizerBase) -> None:
    num_texts = 0
    for chat in CHATS:
        for add in (True, False):
            for more in ({}, {"tools": [TOOL]}, {"enable_thinking": False}):
                ours = by_us(tokenizer, chat, add_generation_prompt=add, **more)
                assert ours == by_transformers(tokenizer, chat, add_generation_prompt=add, **more)
                num_texts += ours is not None
    assert num_texts


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.text(), min_size=1, max_size=4))
def test_any_text_is_rendered_as_by_transformers(texts: list[str]) -> None:
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = RICH
    chat = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]
    assert render(tokenizer, chat) == tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def test_of_several_templates_the_one_for_tools_is_taken() -> None:
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = {"default": "plain", "tool_use": "{{ tools[0].function.name }}"}
    assert render(tokenizer, MESSAGE) == "plain"
    assert render(tokenizer, MESSAGE, tools=[TOOL]) == "add"


def test_many_conversations_are_rendered_in_their_order() -> None:
    owner = Owner("{{ messages[0].content }}")
    questions = [f"{number}?" for number in range(1_000)]
    assert render_all(owner, ([{"role": "user", "content": text}] for text in questions)) == questions


def test_what_the_template_refuses_is_told_in_its_words() -> None:
    with pytest.raises(TemplateRefusal) as caught:
        render(Owner("{{ raise_exception('only users, please') }}"), MESSAGE)
    assert str(caught.value) == "only users, please"


@pytest.mark.parametrize("template", BROKEN, ids=BROKEN.values())
def test_a_broken_template_is_one_line(template: str) -> None:
    with pytest.raises(CheckpointError, match=f"owner: chat template: .*{BROKEN[template]}"):
        render(Owner(template), MESSAGE)


@pytest.mark.parametrize("template", HUGE.values(), ids=HUGE)
def test_a_template_that_fills_the_memory_is_refused(template: str) -> None:
    with pytest.raises(CheckpointError, match=r"takes more memory|writes more"):
        render(Owner(template), MESSAGE)


@pytest.mark.parametrize("template", LONG.values(), ids=LONG)
def test_a_template_that_writes_without_end_is_refused(template: str) -> None:
    with pytest.raises(CheckpointError, match="writes more than"):
        render(Owner(template), MESSAGE)


@pytest.mark.slow
@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
def test_a_template_that_does_not_end_is_ended(template: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    with pytest.raises(CheckpointError, match="is not rendered within 2 s"):
        render(Owner(template), MESSAGE)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < 1
    assert render(Owner("{{ messages[0].content }}"), MESSAGE) == "hi"


@pytest.mark.slow
def test_one_that_loops_on_one_question_alone_leaves_the_others_and_this_process_alone() -> None:
    owner = Owner(f"{{% if messages[0].content == 'loop' %}}{ENDLESS['nested loops']}{{% endif %}}fine")
    assert render(owner, MESSAGE) == "fine"
    faults: list[CheckpointError] = []

    def ask() -> None:
        try:
            render(owner, [{"role": "user", "content": "loop"}])
        except CheckpointError as exc:
            faults.append(exc)

    thread = threading.Thread(target=ask)
    thread.start()
    longest, last = 0.0, time.monotonic()
    while thread.is_alive():  # Python's lock is free meanwhile, as an event loop needs it
        time.sleep(0.01)
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
    assert len(faults) == 1
    assert longest < 1
    assert render(owner, MESSAGE) == "fine"


def test_a_child_that_was_killed_is_replaced() -> None:
    owner = Owner("{{ messages[0].content }}")
    render(owner, MESSAGE)
    (child,) = children()
    os.kill(child, 9)
    while Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    assert render(owner, MESSAGE) == "hi"


def test_more_templates_than_a_child_keeps() -> None:
    assert [render(Owner(f"{number}"), MESSAGE) for number in range(80)] == [str(number) for number in range(80)]
    assert len(children()) == 1


def test_a_fork_has_a_child_of_its_own() -> None:
    owner = Owner("{{ messages[0].content }}")
    render(owner, MESSAGE)
    readable, writable = os.pipe()
    fork = os.fork()
    if fork == 0:
        os.write(writable, render(owner, [{"role": "user", "content": "fork"}]).encode())
        os._exit(0)
    assert os.waitpid(fork, 0)[1] == 0
    assert os.read(readable, 10) == b"fork"
    assert render(owner, MESSAGE) == "hi"


def test_the_child_ends_with_whoever_started_it() -> None:
    """However that went: killed in the middle of a rendering, it is ended by its own clock and the end of its input."""
    program = (
        "import os; from distill.chat_templates import room; room = room.Room();"
        "print(room.render('x', '{}', ['[]'], where='x'), room._child.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ran.returncode == -9
    child = Path(f"/proc/{ran.stdout.split()[1]}/cmdline")
    deadline = time.monotonic() + 60
    while child.exists() and "worker.py" in child.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_is_no_json_is_refused() -> None:
    for content in (object(), {1, 2}):
        with pytest.raises(DataError, match="messages: is not plain JSON"):
            render(Owner("x"), [{"role": "user", "content": content}])


def children() -> list[int]:
    """This process's children that render."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                command = (entry / "cmdline").read_text()
            except OSError:
                continue
            if parent == os.getpid() and "chat_templates/worker.py" in command:
                found.append(int(entry.name))
    return found
