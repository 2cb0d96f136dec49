"""Why a webhook did not arrive, sorted by what that means for trying again.

No message holds more of a URL than its host: paths and queries carry secrets.
"""

from viralfx.domain.errors import ViralFXError


class WebhookError(ViralFXError):
    """A webhook was not taken by its receiver."""


class WebhookRefusedError(WebhookError):
    """It was not sent: it may not go there, or not so. Trying again changes nothing."""


class WebhookRejectedError(WebhookError):
    """The receiver answered that it will not have it. Trying again changes nothing."""

    def __init__(self, message: str, status: int) -> None:
        self.status = status
        super().__init__(message)


class WebhookUnavailableError(WebhookError):
    """The receiver cannot take it now; it may have taken it without saying so.

    ``retry_after`` is the seconds that it asked for, None where it did not.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        self.retry_after = retry_after
        super().__init__(message)
