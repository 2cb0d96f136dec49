"""An application of Django, which has neither a lifespan nor WebSockets."""

from collections.abc import Awaitable, Callable
from typing import Any

import django
from asgiref.sync import markcoroutinefunction
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import HttpRequest, HttpResponse
from django.urls import path
from tests.frameworks.scene import config, hold

from viralfx.asgi import OperationsMiddleware
from viralfx.server.interface import ASGIApp

Next = Callable[[HttpRequest], Awaitable[HttpResponse]]


async def held(_request: HttpRequest) -> HttpResponse:
    """Wait until the test goes on."""
    return HttpResponse(await hold())


async def item(_request: HttpRequest, item: str) -> HttpResponse:
    """Return the id."""
    return HttpResponse(item)


async def submit(_request: HttpRequest) -> HttpResponse:
    """Submit a job."""
    return HttpResponse((await app.jobs.submit("scene.note", "written")).job.id)


class RouteNames:
    """Middleware that tells the operations layer the route of each request."""

    sync_capable, async_capable = False, True

    def __init__(self, get_response: Next) -> None:
        self.get_response = get_response
        markcoroutinefunction(self)  # as Django asks

    async def __call__(self, request: HttpRequest) -> HttpResponse:
        """Handle the request."""
        response = await self.get_response(request)
        if (match := request.resolver_match) is not None:
            scope: dict[str, Any] = request.scope
            scope["viralfx.route"] = f"/{match.route}"
        return response


urlpatterns = [path("hold", held), path("items/<str:item>", item), path("jobs", submit)]
settings.configure(
    SECRET_KEY="of a test",
    ROOT_URLCONF=__name__,
    ALLOWED_HOSTS=["*"],
    MIDDLEWARE=[f"{__name__}.RouteNames"],
    LOGGING_CONFIG=None,
)
django.setup()
served: ASGIApp = get_asgi_application()
app = OperationsMiddleware(served, config())
