"""A request that is answered with an error, in OpenAI's shape."""

from __future__ import annotations

from starlette.responses import JSONResponse, Response

from distill.errors import PotstillError, UserInputError
from teacher.http.form import error_body
from teacher.live import PromptTooLong

RETRY_AFTER_S = 1


class APIError(Exception):
    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
        self.status = status
        self.body = error_body(message, kind=kind, param=param, code=code)

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

    @property
    def response(self) -> Response:
        headers = {"retry-after": str(RETRY_AFTER_S)} if self.status == 429 else None
        return JSONResponse(self.body, self.status, headers)
