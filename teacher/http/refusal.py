"""A request that is answered with an error, in OpenAI's shape."""

from __future__ import annotations

from starlette.responses import JSONResponse, Response

from distill.errors import PotstillError, UserInputError
from teacher.admission.refusals import Refused
from teacher.live import PromptTooLong

RETRY_AFTER_S = 1


class APIError(Refused):
    @classmethod
    def because_of(cls, fault: PotstillError) -> APIError:
        """`param` is the request's own field, where it is that which is wrong."""
        if isinstance(fault, PromptTooLong):
            message = (
                f"This model's maximum context length is {fault.limit} tokens. However, your messages resulted in "
                f"{fault.num_tokens} tokens. Please reduce the length of the messages."
            )
            return cls(400, message, code="context_length_exceeded")
        if not isinstance(fault, UserInputError):
            return cls(500, str(fault))
        if fault.where is not None or fault.field is None:
            return cls(400, str(fault))
        message = f"Invalid '{fault.field}': {str(fault).removeprefix(f'{fault.field}: ')}."
        return cls(400, message, param=fault.field, code="invalid_value")


def refusal_response(refused: Refused) -> Response:
    headers = {"retry-after": str(RETRY_AFTER_S)} if refused.status in (429, 503) else None
    return JSONResponse(refused.body, refused.status, headers)
