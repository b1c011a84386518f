"""The tokenizer in a GGUF file as tokenizer.json: vocabulary, merges, the way that text is split, special tokens.

A GGUF file names how its model splits text (`tokenizer.ggml.pre`); the splits are in llama.cpp's code, and here in the
words of `tokenizers`, as the models' own tokenizer.json has them. A name that is not known is refused: with a wrong
split every answer is a little worse and nothing says so. Two kinds of vocabulary occur: byte-level BPE (`gpt2`), and
SentencePiece's BPE (`llama`: Llama 2, Mistral, TinyLlama), whose merges follow from the scores of its pieces.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from distill.errors import nearest
from distill.gguf.header import GgufFile

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_SPLITS = {
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3),
    **dict.fromkeys(("smollm", "gpt-2"), None),  # byte-level's own
}
_SINGLE_DIGITS = ("smollm",)
_WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "llama-v3")  # a word of the vocabulary is taken without merging
_NFC = ("qwen2", "deepseek-r1-qwen")
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = range(1, 6)  # of llama.cpp's llama_token_type


def build_tokenizer(file: GgufFile, vocab_size: int) -> Tokenizer:
    """The file's tokenizer. Raises CheckpointError for one that is missing, unknown or larger than `vocab_size`."""
    kind = file.text("tokenizer.ggml.model")
    tokens = file.texts("tokenizer.ggml.tokens")
    if not 0 < len(tokens) <= vocab_size:
        raise file.fault(f"has {len(tokens)} tokens for {vocab_size} rows of embeddings", "tokenizer.ggml.tokens")
    kinds = _token_kinds(file, len(tokens))
    while tokens and kinds[len(tokens) - 1] == _UNUSED:  # rows that pad the embeddings
        tokens = tokens[:-1]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocabulary[token] != index)
        raise file.fault(f"has {twice[:40]!r} twice", "tokenizer.ggml.tokens")
    if kind == "gpt2":
        tokenizer = _byte_level(file, vocabulary)
    elif kind == "llama":
        tokenizer = _sentence_piece(file, vocabulary, kinds)
    else:
        message = f"no tokenizer that is read: {kind!r}; {nearest(kind, ('gpt2', 'llama'))}"
        raise file.fault(message, "tokenizer.ggml.model")
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kinds[index] != _USER_DEFINED, normalized=False)
            for token, index in vocabulary.items()
            if kinds[index] in (_CONTROL, _USER_DEFINED) or (kind == "llama" and kinds[index] == _UNKNOWN)
        ]
    )
    _add_ends(file, tokenizer, len(tokens), kind)
    return tokenizer


def special_tokens(file: GgufFile, tokenizer: Tokenizer) -> dict[str, int | None]:
    """Ids of `bos`, `eos`, `pad` and `unk`, and of `eot` and `eom`, which end a turn, where the file has them."""
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown", "eot": "eot", "eom": "eom"}
    return {name: _token_id(file, key, tokenizer.get_vocab_size()) for name, key in names.items()}


def _token_kinds(file: GgufFile, count: int) -> list[int]:
    kinds = file.numbers("tokenizer.ggml.token_type", count)
    return [_NORMAL] * count if kinds is None else [int(kind) for kind in kinds]


def _token_id(file: GgufFile, name: str, count: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    return file.integer(key, most=count - 1) if key in file.metadata else None


def _byte_level(file: GgufFile, vocabulary: dict[str, int]) -> Tokenizer:
    split = _split_name(file)
    merges = [_pair(file, index, merge, vocabulary) for index, merge in enumerate(file.texts("tokenizer.ggml.merges"))]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=split in _WHOLE_WORDS_FIRST))
    pattern = _SPLITS[split]
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split in _SINGLE_DIGITS else []
    if pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    if split in _NFC:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _split_name(file: GgufFile) -> str:
    """The name of the split; files from before there were names hold Qwen's only one, or are refused."""
    family, key = file.text("general.architecture"), "tokenizer.ggml.pre"
    name = file.text(key, "default")
    if name == "default" and family in ("qwen2", "qwen3"):
        return "qwen2"
    if name not in _SPLITS:
        raise file.fault(f"no way to split text that is known: {name!r}; {nearest(name, _SPLITS)}", key)
    return name


def _pair(file: GgufFile, index: int, merge: str, vocabulary: dict[str, int]) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not {left, right, left + right} <= vocabulary.keys():
        message = f"merges what is not in the vocabulary: {merge[:40]!r}"
        raise file.fault(message, f"tokenizer.ggml.merges[{index}]")
    return left, right


def _sentence_piece(file: GgufFile, vocabulary: dict[str, int], kinds: list[int]) -> Tokenizer:
    scores = file.numbers("tokenizer.ggml.scores", len(file.texts("tokenizer.ggml.tokens")))
    if scores is None:
        raise file.fault("required, but not given", "tokenizer.ggml.scores")
    plain = {token: index for token, index in vocabulary.items() if kinds[index] in (_NORMAL, _USER_DEFINED)}
    found: list[tuple[float, int, int, str, str]] = []
    for token, index in plain.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in plain and right in plain:
                found.append((-float(scores[index]), plain[left], plain[right], left, right))
    merges = [(left, right) for *_, left, right in sorted(found)]
    unknown = next((token for token, index in vocabulary.items() if kinds[index] == _UNKNOWN), None)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefixed = file.switch("tokenizer.ggml.add_space_prefix", True)
    prepend = [normalizers.Prepend("▁")] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _add_ends(file: GgufFile, tokenizer: Tokenizer, count: int, kind: str) -> None:
    """The tokens that the file puts around a text which no chat template has written, by llama.cpp's defaults."""
    first = kind == "llama" or file.metadata.get("tokenizer.ggml.pre") in _WHOLE_WORDS_FIRST
    around = {}
    for name, default in (("bos", first), ("eos", False)):
        token = _token_id(file, name, count)
        if file.switch(f"tokenizer.ggml.add_{name}_token", default and token is not None):
            if token is None:
                raise file.fault("required, but not given", f"tokenizer.ggml.{name}_token_id")
            around[name] = (tokenizer.id_to_token(token), token)
    if around:
        begin, end = ([f"{around[name][0]}:0"] if name in around else [] for name in ("bos", "eos"))
        single = [*begin, "$A:0", *end]
        pair = [*single, *(part.replace(":0", ":1") if part != "$A:0" else "$B:1" for part in single)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=list(around.values())
        )
