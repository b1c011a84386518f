"""Licences of models and data sets, by the identifiers that the Hugging Face Hub gives them.

A licence that the Hub has no identifier for is `other:NAME`, which a model card writes as `license: other` and
`license_name: NAME` (Qwen2.5-3B: `other:qwen-research`).
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated

from pydantic import AfterValidator

OTHER = "other:"
# https://huggingface.co/docs/hub/repositories-licenses
_TABLE = """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
    eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research
    intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit
    mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 pddl postgresql unknown unlicense
    wtfpl zlib
"""
IDENTIFIERS = frozenset(_TABLE.split())
_NAME = re.compile(r"[a-z0-9][a-z0-9._+-]*")


def checked(licence: str) -> str:
    """`licence` in lower case. Raises ValueError unless it is one of the identifiers or `other:NAME`."""
    known = licence.lower()
    if known in IDENTIFIERS or (known.startswith(OTHER) and _NAME.fullmatch(known.removeprefix(OTHER))):
        return known
    close = difflib.get_close_matches(known, IDENTIFIERS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "one that the Hub has no identifier for is other:NAME"
    raise ValueError(f"not a licence identifier of the Hub: {licence!r}; {hint}")


Licence = Annotated[str, AfterValidator(checked)]


def of_card(license_: object, name: object = None) -> str | None:
    """The licence that a card's `license` and `license_name` state; None where they state none that can be compared."""
    stated = license_[0] if isinstance(license_, list) and len(license_) == 1 else license_
    if not isinstance(stated, str) or stated.lower() == "unknown":
        return None
    if stated.lower() != "other":
        return stated.lower()
    return f"{OTHER}{name.lower()}" if isinstance(name, str) else None


def card_fields(licence: str) -> dict[str, str]:
    """Fields of a card's front matter for `licence`."""
    if not licence.startswith(OTHER):
        return {"license": licence}
    return {"license": "other", "license_name": licence.removeprefix(OTHER), "license_link": "LICENSE"}
