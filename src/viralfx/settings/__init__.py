"""The configuration of a process: its settings, and how they are read."""

from viralfx.settings.dsn import DatabaseAddress
from viralfx.settings.groups import (
    DatabaseSettings,
    HttpSettings,
    JobSettings,
    RedisSettings,
    Secret,
    WebhookSettings,
    milliseconds,
)
from viralfx.settings.loader import (
    Field,
    fields,
    given,
    prefixed,
    read_settings,
    sources,
    typing_errors,
)
from viralfx.settings.model import Exposure, Settings, show
from viralfx.settings.rotation import (
    CredentialsCallable,
    CredentialsError,
    RotatingSecret,
)

__all__ = [
    "CredentialsCallable",
    "CredentialsError",
    "DatabaseAddress",
    "DatabaseSettings",
    "Exposure",
    "Field",
    "HttpSettings",
    "JobSettings",
    "RedisSettings",
    "RotatingSecret",
    "Secret",
    "Settings",
    "WebhookSettings",
    "fields",
    "given",
    "milliseconds",
    "prefixed",
    "read_settings",
    "show",
    "sources",
    "typing_errors",
]
