"""A request that is answered with an error, in OpenAI's shape."""

from __future__ import annotations

from starlette.responses import JSONResponse, Response

from distill.errors import PotstillError, UserInputError
from teacher.admission.refusals import Refused

RETRY_AFTER_S = 1


class APIError(Refused):
    @classmethod
    def because_of(cls, fault: PotstillError) -> APIError:
        """`param` is the request's own field, where it is that which is wrong."""
        param = fault.field if fault.where is None else None
        return cls(400 if isinstance(fault, UserInputError) else 500, str(fault), param=param)


def refusal_response(refused: Refused) -> Response:
    headers = {"retry-after": str(RETRY_AFTER_S)} if refused.status in (429, 503) else None
    return JSONResponse(refused.body, refused.status, headers)
