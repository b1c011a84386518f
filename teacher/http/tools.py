"""The tools that a chat request offers, and which of them it wants called."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ModelWrapValidatorHandler, PrivateAttr, model_validator

from teacher.admission.fields import Body

MAX_TOOLS = 128
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class FunctionDefinition(Body):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A function. `given` is the object as it came: templates print it, in its order and with its nulls."""

    type: Literal["function"]
    function: FunctionDefinition
    _given: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def given(self) -> dict[str, Any]:
        return self._given

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, given: Any, read: ModelWrapValidatorHandler[Tool]) -> Tool:
        tool = read(given)
        tool._given = given
        return tool


class NamedFunction(Body):
    name: FunctionName


class NamedTool(Body):
    """The function that is to be called."""

    type: Literal["function"]
    function: NamedFunction
