"""Errors in the envelope of OpenAI's API: `{"error": {"message", "type", "param", "code"}}`."""

from typing import Any


class Refusal(Exception):
    """A request that is not answered, and why."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        """status: of HTTP. param: the field that is wrong. retry_after: in seconds."""
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The envelope."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            "message": str(self),
            "type": kinds.get(self.status, default),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """Headers of the answer, beside its type and length."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


def bad(message: str, param: str | None = None) -> Refusal:
    """A request whose field `param` means nothing."""
    return Refusal(400, message, param=param)
