"""The checks before money is spent: what can be seen to be wrong with a student before a step is trained.

Each check is named and says in one line what it found. `train_student` runs them and stops at the first error;
`potstill doctor` prints them all. They come from what is known to go wrong silently: EOS masked because padding is the
same token, another end of turn in the template than in the tokenizer, reasoning that the template deletes, `<think>`
prefilled on one side alone, examples cut at `max_length`, token ids past the embedding, positions past the rope.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer as RawTokenizer
from transformers import PreTrainedConfig, PreTrainedTokenizerBase as Tokenizer

from distill.errors import CheckpointError, DataError, UserInputError
from distill.findings import Finding
from distill.progress import silent
from distill.prompt_text import describe_prompt
from distill.reasoning import END_OF_THINKING, THINK, THINK_LINE
from distill.recipe import UNINSTRUCTED, Instruction, SFTConfig, StudentConfig
from students import bases
from students.base_licence import check_licence
from students.bases import Method
from students.tokens import Fault, TokenCounts, render, render_prompt, write_tokens

PROBE_TEXT = "What is 12 * 34?\n 7 mod 3 = 1\n\nBase-16: ff, x^2 + 5 = 41 \\boxed{6}"
PROBE_QUESTION = "What is 2 + 3?"
PROBE = {"distilled": f"{THINK_LINE}2 + 3 = 5\n</think>\n\n\\boxed{{5}}", "direct": "\\boxed{5}"}


def preflight(
    student: StudentConfig,
    method: Method,
    examples_path: Path | None = None,
    instruction: Instruction = UNINSTRUCTED,
) -> list[Finding]:
    """All checks of one student, for `potstill doctor`: errors are findings here, but a base that is broken raises.

    `instruction` is what it learns its questions with.
    """
    folder = bases.resolve_base(student)
    bases.check_folder(folder)
    config = bases.open_config(folder)
    tokenizer = bases.open_tokenizer(student, method, folder)
    findings = check_student(student, method, config, tokenizer, instruction)
    if examples_path is not None and all(finding.state == "ok" for finding in findings):
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "tokens.arrow"
            counts = write_tokens(examples_path, tokenizer, student.sft, out, silent())
        findings += check_counts(counts, student.sft)
    return findings


def check_student(
    student: StudentConfig,
    method: Method,
    config: PreTrainedConfig,
    tokenizer: Tokenizer,
    instruction: Instruction = UNINSTRUCTED,
) -> list[Finding]:
    """Findings about tokenizer, template and config, without examples."""
    findings = [check_licence(student, Path(str(tokenizer.name_or_path))), _architecture(student, config)]
    findings += [_tokenizer_identity(tokenizer), _padding(tokenizer)]
    findings.append(_chat_template(tokenizer, instruction))
    if findings[-1].state == "ok":
        findings += [
            _prompt(tokenizer, instruction),
            _think_prefill(tokenizer, method),
            _training_text(tokenizer, method),
        ]
    return [*findings, _vocabulary(student, config, tokenizer), _positions(student, config)]


def check_counts(counts: TokenCounts, sft: SFTConfig) -> list[Finding]:
    """Findings about the examples' tokens."""

    def finding(check: str, fault: Fault, what: str, fine: str) -> Finding:
        if not fault.count:
            return Finding(check, "ok", fine, DataError)
        text = f"{fault.count} of {num_given} examples {what} (first: {fault.first})"
        return Finding(check, "error", text, DataError)

    num_given = counts.num_examples + counts.unfitting.count
    if sft.too_long == "drop":
        num_given += counts.too_long.count
    present = Finding("examples", "ok", f"{counts.num_examples} examples, {counts.num_tokens} tokens", DataError)
    if not num_given:
        present = Finding("examples", "error", "no examples to train on", DataError)
    return [
        present,
        finding("template_fit", counts.unfitting, "do not fit the chat template", "every completion fits it"),
        _truncation(counts, sft, num_given),
        finding("empty_text", counts.empty, "are empty", "no empty question or completion"),
        finding(
            "special_tokens", counts.special, "have special tokens in their text", "none that count as special tokens"
        ),
        finding(
            "unknown_text", counts.unknown, "cannot be written by the tokenizer", "all text comes back from its tokens"
        ),
    ]


def _truncation(counts: TokenCounts, sft: SFTConfig, num_given: int) -> Finding:
    long = counts.too_long
    if not long.count:
        text = f"longest {counts.longest} of {sft.max_length} tokens"
        return Finding("truncation", "ok", text, DataError)
    text = f"{long.count} of {num_given} examples are longer than sft.max_length={sft.max_length}"
    first = f"(first: {long.first})"
    if sft.too_long == "error":
        return Finding("truncation", "error", f"{text}; raise it, or set sft.too_long=drop {first}", DataError)
    if not counts.num_examples:
        return Finding("truncation", "error", f"{text}: none is left {first}", DataError)
    return Finding("truncation", "warning", f"{text}: dropped, {long.num_tokens} tokens {first}", DataError)


def stop_on_error(findings: Iterable[Finding], *, base: Path, examples_path: Path) -> None:
    """Raise the first error: CheckpointError naming the base, or DataError naming the file of examples."""
    for finding in findings:
        if finding.state == "error":
            of_examples = finding.fault is DataError
            kind: type[UserInputError] = DataError if of_examples else CheckpointError
            where = examples_path if of_examples else base
            raise kind(finding.text, where=where, field=finding.check)


def log_entry(finding: Finding) -> dict[str, str]:
    """A finding as the training log keeps it, with whose fault an error would be."""
    about = "examples" if finding.fault is DataError else "checkpoint"
    return {"check": finding.check, "state": finding.state, "text": finding.text, "about": about}


def _architecture(student: StudentConfig, config: PreTrainedConfig) -> Finding:
    if config.model_type != student.architecture:
        text = f"the student says {student.architecture}, config.json says {config.model_type}"
        return Finding("architecture", "error", text)
    return Finding("architecture", "ok", str(config.model_type))


def _tokenizer_identity(tokenizer: Tokenizer) -> Finding:
    """transformers makes a Qwen2Tokenizer, with Qwen's pre-tokenizer, of whatever lies beside a `qwen2` config."""
    file = Path(str(tokenizer.name_or_path)) / "tokenizer.json"
    if not file.is_file():
        return Finding("tokenizer_identity", "ok", "no tokenizer.json to compare with")
    raw = RawTokenizer.from_file(str(file))
    raw.no_padding()  # a file may ask for a million tokens of it; the tokenizer that is used ignores that too
    raw.no_truncation()
    by_file = raw.encode(PROBE_TEXT, add_special_tokens=False).ids
    if tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"] != by_file:
        text = f"AutoTokenizer reads tokenizer.json as a {type(tokenizer).__name__}, which splits text another way"
        return Finding("tokenizer_identity", "error", text)
    return Finding("tokenizer_identity", "ok", f"{type(tokenizer).__name__} splits text as tokenizer.json does")


def _padding(tokenizer: Tokenizer) -> Finding:
    if tokenizer.eos_token_id is None:
        return Finding("padding", "error", "the tokenizer has no EOS token; name one with eos_token")
    if tokenizer.pad_token_id is None:
        text = f"the tokenizer has no padding token, and none of the reserved ones; `pad_token: {bases.ADD}` adds one"
        return Finding("padding", "error", text)
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        text = f"padding is the EOS token {tokenizer.eos_token!r}: masking one masks the other, generation never stops"
        return Finding("padding", "error", text)
    return Finding("padding", "ok", f"pad {tokenizer.pad_token!r} is not EOS {tokenizer.eos_token!r}")


def _chat_template(tokenizer: Tokenizer, instruction: Instruction) -> Finding:
    if tokenizer.chat_template is None:
        return Finding("chat_template", "error", "the base has no chat template and the student names none")
    try:
        render_prompt(tokenizer, PROBE_QUESTION, instruction)
    except UserInputError as exc:
        return Finding("chat_template", "error", f"renders no prompt ({exc})")
    return Finding("chat_template", "ok", "renders a generation prompt")


def _prompt(tokenizer: Tokenizer, instruction: Instruction) -> Finding:
    prompt = render_prompt(tokenizer, PROBE_QUESTION, instruction)
    return Finding("prompt", "ok", describe_prompt(prompt, PROBE_QUESTION, instruction.system_prompt))


def _think_prefill(tokenizer: Tokenizer, method: Method) -> Finding:
    prompt = render_prompt(tokenizer, PROBE_QUESTION)
    prefilled = prompt.endswith(THINK_LINE)
    if method == "distilled" and not prefilled:
        if "enable_thinking" in tokenizer.chat_template:
            return Finding("think_prefill", "ok", "enable_thinking is on: the student opens <think> itself")
        text = "the generation prompt does not open <think>: the student would answer without reasoning"
        return Finding("think_prefill", "error", text)
    if method == "direct" and THINK in prompt.rpartition(END_OF_THINKING)[2]:
        text = "the base's template opens <think>, but the bare answers have no reasoning to close"
        return Finding("think_prefill", "error", text)
    return Finding("think_prefill", "ok", "opens <think>" if prefilled else "plain")


def _training_text(tokenizer: Tokenizer, method: Method) -> Finding:
    try:
        render(tokenizer, PROBE_QUESTION, PROBE[method])
    except UserInputError as exc:
        return Finding("training_text", "error", str(exc))
    return Finding("training_text", "ok", f"inference prompt is a prefix, ends with {tokenizer.eos_token!r}")


def _vocabulary(student: StudentConfig, config: PreTrainedConfig, tokenizer: Tokenizer) -> Finding:
    highest = max(tokenizer.get_vocab().values())
    num_rows = config.vocab_size + bases.grows_by_padding(student, tokenizer, config.vocab_size)
    if highest >= num_rows:
        text = f"the tokenizer's highest token is {highest}, the embedding has {num_rows} rows"
        return Finding("vocabulary", "error", text)
    return Finding("vocabulary", "ok", f"{highest + 1} tokens in {num_rows} rows")


def _positions(student: StudentConfig, config: PreTrainedConfig) -> Finding:
    positions, length = config.max_position_embeddings, student.sft.max_length
    if length > positions and student.sft.rope_theta is None:
        text = f"sft.max_length={length} is past the base's {positions} positions; set sft.rope_theta or shorten it"
        return Finding("positions", "error", text)
    if length > positions:
        return Finding("positions", "ok", f"{positions} raised to {length} with rope theta {student.sft.rope_theta:g}")
    return Finding("positions", "ok", f"{length} of {positions}")
