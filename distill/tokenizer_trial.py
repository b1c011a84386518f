"""Tries a tokenizer of others where it can do no harm: `python -I -S tokenizer_trial.py TOKENIZER_JSON IMPORT_FOLDER`

A tokenizer.json may make a million characters of one (a chain of replacements), while it is loaded or when it is used.
So this process, which the kernel bounds, loads it first, and writes and reads a line with it. What it does on other
lines is not known by that: this finds what is broken or absurd, not what waits for one question.

Ends with 0, or with the fault on standard error; by SIGXCPU where it takes too long.
"""

from __future__ import annotations

import resource
import sys

LINE = "What is 12 * 34?\n 7 mod 3 = 1\n\nBase-16: ff, x^2 + 5 = 41 \\boxed{6} ü \U0001f600"
# Bytes as tokens are four a character at the most, special tokens a few more.
MOST = 16 * len(LINE)
# Qwen2.5's, of 151,665 tokens, takes 0.3 s and 0.15 GB.
CPU_S, MEMORY_BYTES = 4, 3 << 29


def main() -> str | None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.path.append(sys.argv[2])
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(sys.argv[1])
    # Whoever uses it asks for neither; a file may ask for a million tokens of padding.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ids = tokenizer.encode(LINE).ids
    if len(ids) > MOST:
        return f"makes {len(ids)} tokens of {len(LINE)} characters"
    text = tokenizer.decode(ids, skip_special_tokens=False)
    return f"makes {len(text)} characters of {len(ids)} tokens" if len(text) > MOST else None


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception as exc:  # noqa: BLE001  `tokenizers` raises nothing more precise
        sys.exit(str(exc))
