"""Litestar applications of many kinds, each with requests whose answers can be compared."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
from litestar import (
    Controller,
    Litestar,
    MediaType,
    Request,
    Response,
    Router,
    WebSocket,
    asgi,
    delete,
    get,
    patch,
    post,
    put,
    route,
    websocket,
    websocket_listener,
)
from litestar.background_tasks import BackgroundTask
from litestar.config.allowed_hosts import AllowedHostsConfig
from litestar.config.compression import CompressionConfig
from litestar.config.cors import CORSConfig
from litestar.config.csrf import CSRFConfig
from litestar.connection import ASGIConnection
from litestar.datastructures import (
    CacheControlHeader,
    Cookie,
    ETag,
    ImmutableState,
    ResponseHeader,
    State,
    UploadFile,
)
from litestar.di import NamedDependency, Provide
from litestar.dto import DTOConfig, MsgspecDTO
from litestar.events import listener
from litestar.exceptions import (
    HTTPException,
    NotAuthorizedException,
    PermissionDeniedException,
    ValidationException,
    WebSocketException,
)
from litestar.handlers import BaseRouteHandler, HTTPRouteHandler, WebsocketListener
from litestar.middleware import ASGIMiddleware, DefineMiddleware
from litestar.middleware.authentication import (
    AbstractAuthenticationMiddleware,
    AuthenticationResult,
)
from litestar.middleware.rate_limit import RateLimitConfig
from litestar.middleware.session.server_side import ServerSideSessionConfig
from litestar.openapi import OpenAPIConfig
from litestar.params import FromPath, FromQuery, JSONBody, MultipartBody, URLEncodedBody
from litestar.plugins import InitPluginProtocol
from litestar.response import File, Redirect, ServerSentEvent, Stream
from litestar.response.sse import ServerSentEventMessage
from litestar.static_files import create_static_files_router
from litestar.stores.memory import MemoryStore
from litestar.types import ASGIApp, Message, Receive, Scope, Send
from tests.web.observing import CASES, Build, Made, call, calls, case, talk

__all__ = ["CASES"]

AnyRequest: TypeAlias = Request[Any, Any, Any]
AnySocket: TypeAlias = WebSocket[Any, Any, Any]
Connection: TypeAlias = ASGIConnection[Any, Any, Any, Any]
_FOLDER = Path(__file__).parent


def refuse(_connection: Connection, _handler: BaseRouteHandler) -> None:
    """Guard a route by refusing each request."""
    raise PermissionDeniedException


def serving(path: str) -> HTTPRouteHandler:
    """Return a handler of a path."""

    @get(path)
    async def handler() -> str:
        return "served"

    return handler


# -- state -----------------------------------------------------------------------------------------


class OwnState(State):
    """A state with a method."""

    def twice(self) -> int:
        """Return the count, twice."""
        return 2 * int(self.count)


@case
def each_form_of_the_state(build: Build) -> Made:
    """Handlers read, copy, count, encode and change the state."""

    @get("/frozen")
    async def frozen(state: ImmutableState) -> dict[str, Any]:
        return state.dict()

    @get("/shared")
    async def shared(state: State) -> dict[str, Any]:
        state.count += 1
        return {"all": state.dict(), "count": len(state), "keys": list(state)}

    @get("/own")
    async def own(state: OwnState) -> int:
        return state.twice()

    @get("/copied")
    async def copied(state: State) -> dict[str, Any]:
        return (
            state.copy().dict()
            | state.mutable_copy().dict()
            | {"frozen": len(state.immutable_copy())}
        )

    @get("/request")
    async def of_the_request(request: AnyRequest) -> dict[str, Any]:
        request.app.state.operations = request.app.state.get("operations", 0) + 1
        return {"has": "operations" in request.app.state, "all": request.app.state.dict()}

    @get("/request-state")
    async def of_one_request(request: AnyRequest) -> dict[str, Any]:
        request.state.seen = True
        return {"all": request.state.dict()}

    handlers = (frozen, shared, own, copied, of_the_request, of_one_request)
    state = State({"count": 1, "operations": 1, "jobs_api": "own", "operations_endpoints": [1]})
    paths = ("/frozen", "/shared", "/shared", "/own", "/copied", "/request", "/frozen")
    return build(*handlers, state=state), calls(*paths, "/request-state")


@case
def state_outside_of_handlers(build: Build) -> Made:
    """Hooks, guards, dependencies, middleware and lifespans use the state."""

    @asynccontextmanager
    async def lifespan(app: Litestar) -> AsyncIterator[None]:
        build.note(app.state.dict())
        app.state.operations = "set by the lifespan"
        yield
        build.note(app.state.dict())

    async def starts(app: Litestar) -> None:
        app.state.jobs_api = ["set at the start"]

    def guard(connection: Connection, _: BaseRouteHandler) -> None:
        if connection.app.state.get("closed"):
            raise PermissionDeniedException

    async def provide(state: ImmutableState) -> list[str]:
        return sorted(state)

    class Marks(ASGIMiddleware):
        async def handle(
            self, scope: Scope, receive: Receive, send: Send, next_app: ASGIApp
        ) -> None:
            build.note(len(scope["litestar_app"].state))
            await next_app(scope, receive, send)

    @get("/", dependencies={"names": Provide(provide)}, guards=[guard])
    async def names(names: NamedDependency[list[str]], state: State) -> dict[str, Any]:
        state.closed = True
        return {"names": names, **state.dict()}

    app = build(names, lifespan=[lifespan], on_startup=[starts], middleware=[Marks()])
    return app, calls("/", "/")


@case
def the_state_of_a_websocket(build: Build) -> Made:
    """Pass the state to the handler of a WebSocket."""

    @websocket("/")
    async def handler(socket: AnySocket, state: ImmutableState) -> None:
        await socket.accept()
        await socket.send_json(state.dict())
        await socket.close()

    return build(handler, state=State({"jobs_api": 1})), [talk("/")]


# -- parameters, data and dependencies -------------------------------------------------------------


@case
def dependencies_of_each_layer(build: Build) -> Made:
    """Nested ones, generators with an end, cached ones, and those that override another."""

    async def opened() -> AsyncIterator[str]:
        build.note("open")
        yield "opened"
        build.note("closed")

    def first() -> Iterator[int]:
        try:
            yield 1
        except ValueError as error:
            build.note(str(error))
            raise

    async def both(opened: NamedDependency[str], first: NamedDependency[int]) -> str:
        return f"{opened} {first}"

    class Own(Controller):
        path = "/own"
        dependencies = {"first": Provide(lambda: 7, sync_to_thread=False)}  # noqa: RUF012

        @get("/")
        async def read(self, both: NamedDependency[str]) -> str:
            return both

    @get("/fails")
    async def fails(first: NamedDependency[int]) -> None:
        raise ValueError(f"after {first}")

    providers = {
        "opened": Provide(opened),
        "first": Provide(first),
        "both": Provide(both),
    }
    return build(Own, fails, dependencies=providers), calls("/own", "/fails", "/own")


class Person(msgspec.Struct):
    """Data of a request."""

    name: str
    age: int
    secret: str = "hidden"


@case
def data_and_parameters(build: Build) -> Made:
    """Bodies of several types, parameters, conversion errors, and data transfer objects."""

    class Public(MsgspecDTO[Person]):
        config = DTOConfig(exclude={"secret"}, rename_strategy="upper")

    @post("/dto", dto=Public, return_dto=Public)
    async def of_dto(data: JSONBody[Person]) -> Person:
        return data

    @post("/json")
    async def of_json(data: JSONBody[Person]) -> Person:
        return data

    @post("/form")
    async def of_form(
        data: URLEncodedBody[Person],
    ) -> Person:
        return data

    @post("/upload", status_code=200)
    async def of_upload(
        data: MultipartBody[UploadFile],
    ) -> dict[str, str]:
        return {"name": data.filename, "text": (await data.read()).decode()}

    @post("/raw", request_max_body_size=8)
    async def of_raw(request: AnyRequest) -> bytes:
        return b"".join([part async for part in request.stream()])

    @get("/{number:int}/{rest:path}")
    async def of_path(
        number: FromPath[int], rest: FromPath[Path], wanted: FromQuery[list[int]]
    ) -> str:
        return f"{number} {rest} {wanted}"

    @patch("/operations/{operations:str}")
    async def of_names(operations: FromPath[str]) -> str:
        return operations

    handlers = (of_dto, of_json, of_form, of_upload, of_raw, of_path, of_names)
    person, form = {"name": "Ann", "age": 3}, {"name": "Ann", "age": "3"}
    return build(*handlers), [
        call("POST", "/dto", json={"NAME": "Ann", "AGE": 3}),
        call("POST", "/json", json=person),
        call("POST", "/json", json={"name": "Ann"}),
        call("POST", "/json", content=b"{"),
        call("POST", "/form", data=form),
        call("POST", "/upload", files={"file": ("a.txt", b"text")}),
        call("PATCH", "/operations/jobs"),
        call("POST", "/raw", content=b"12345678"),
        call("POST", "/raw", content=b"123456789"),
        *calls("/3/a/b?wanted=1&wanted=2", "/3/a?wanted=x", "/x/a", "/3/a"),
    ]


# -- routing and responses -------------------------------------------------------------------------


@case
def routes_below_paths(build: Build) -> Made:
    """Routers in routers, controllers, methods, and paths that do not exist."""

    class Items(Controller):
        path = "/items"
        tags = ["items"]  # noqa: RUF012

        @get(["/", "/all"])
        async def read(self, request: AnyRequest) -> dict[str, Any]:
            return {
                "path": request.url.path,
                "url": request.url_for("one", number=3),
                "opt": sorted(request.route_handler.opt),
            }

        @get("/{number:int}", name="one", opt={"own": 1})
        async def one(self, number: FromPath[int], request: AnyRequest) -> dict[str, Any]:
            return {"number": number, "opt": request.route_handler.opt}

        @put("/{number:int}")
        async def change(self, number: FromPath[int]) -> int:
            return number

        @delete("/{number:int}")
        async def remove(self, number: FromPath[int]) -> None:
            build.note(number)

    @route("/any", http_method=["GET", "POST"])
    async def both(request: AnyRequest) -> str:
        return str(request.method)

    inner = Router("/inner", route_handlers=[Items, both])
    app = build(Router("/api", route_handlers=[inner]), both, path="/base", opt={"app": 1})
    paths = ("/items", "/items/all", "/items/", "/items/3", "/items/x", "/any", "/nothing")
    below = [f"/base/api/inner{path}" for path in paths]
    return app, [
        *calls(*below, "/any", "/base/any", "/", "/base", "/health-of-mine"),
        *(call(method, below[3]) for method in ("PUT", "DELETE", "POST", "OPTIONS", "HEAD")),
        call("POST", "/base/any"),
    ]


@case
def responses_in_parts(build: Build) -> Made:
    """Send streams, events and files."""

    async def parts() -> AsyncIterator[bytes]:
        for number in range(3):
            yield b"%d" % number
            await asyncio.sleep(0)

    async def events() -> AsyncIterator[ServerSentEventMessage | str]:
        yield "one"
        yield ServerSentEventMessage(event="two", data="2", id="b", retry=5)

    @get("/stream")
    async def stream() -> Stream:
        return Stream(parts(), headers={"x-own": "a"})

    @get("/events")
    async def of_events() -> ServerSentEvent:
        return ServerSentEvent(events())

    @get("/file")
    async def file() -> File:
        return File(_FOLDER / "conftest.py", etag=ETag(value="own"))

    return build(stream, of_events, file), [
        *calls("/stream", "/events", "/file"),
        call("GET", "/events", headers={"accept": "text/event-stream"}),
        call("HEAD", "/file"),
    ]


@case
def responses_of_each_kind(build: Build) -> Made:
    """Send redirects, cookies, headers and types, cache a response, and work after it."""

    async def noted(value: str) -> None:
        build.note(value)

    @get("/away")
    async def away() -> Redirect:
        return Redirect("/dressed?a=b")

    @get(
        "/dressed",
        response_headers=[ResponseHeader(name="x-route", value="r")],
        response_cookies=[Cookie(key="seen", value="yes", max_age=3)],
        cache_control=CacheControlHeader(max_age=5),
        etag=ETag(value="tag"),
    )
    async def dressed() -> Response[str]:
        response = Response(
            "text", status_code=203, headers={"x-own": "a"}, media_type="text/plain"
        )
        response.set_cookie("more", "1")
        return response

    @get("/later")
    async def later() -> Response[None]:
        return Response(None, background=BackgroundTask(noted, "after the response"))

    @get("/html", media_type=MediaType.HTML, sync_to_thread=True)
    def html() -> str:
        return "<p>text</p>"

    @get("/pack", media_type=MediaType.MESSAGEPACK)
    async def pack() -> dict[str, int]:
        return {"a": 1}

    @get("/empty", status_code=204)
    async def empty() -> None:
        pass

    @get("/cached", cache=True)
    async def cached() -> int:
        build.note("computed")
        return 1

    paths = ("/away", "/dressed", "/later", "/html", "/pack", "/empty", "/cached", "/cached")
    return build(away, dressed, later, html, pack, empty, cached), calls(*paths)


@case
def errors_of_each_kind(build: Build) -> Made:
    """Handlers by type and status, on several layers, hooks, and errors without a handler."""

    def teapot(_: AnyRequest, error: Exception) -> Response[str]:
        return Response(f"own: {error}", status_code=418, media_type="text/plain")

    async def hook(error: Exception, scope: Scope) -> None:
        build.note((type(error), scope["path"]))

    def raising(path: str, error: Exception, **options: Any) -> Any:
        @get(path, **options)
        async def handler() -> None:
            raise error

        return handler

    handlers = (
        raising("/http", HTTPException("gone", status_code=410, headers={"x-why": "age"})),
        raising("/key", KeyError("k")),
        raising("/value", ValueError("v"), exception_handlers={ValueError: teapot}),
        raising("/other", RuntimeError("r")),
        raising("/invalid", ValidationException("no", extra=[{"key": "a"}])),
        raising("/login", NotAuthorizedException()),
    )
    paths = ("/http", "/key", "/value", "/other", "/invalid", "/login", "/nothing")
    app = build(
        *handlers, exception_handlers={LookupError: teapot, 401: teapot}, after_exception=[hook]
    )
    return app, [*calls(*paths), call("POST", "/http")]


@case
def errors_in_debug_mode(build: Build) -> Made:
    """Show the page with a traceback."""

    @get("/")
    async def fails() -> None:
        raise RuntimeError("planted")

    return build(fails, debug=True), calls("/", "/nothing")


# -- what surrounds handlers -----------------------------------------------------------------------


@case
def hooks_in_their_order(build: Build) -> Made:
    """Before and after requests, before each message is sent, and at start and stop."""

    def before(request: AnyRequest) -> str | None:
        build.note("before")
        return "early" if "early" in request.query_params else None

    async def after(response: Response[Any]) -> Response[Any]:
        build.note("after")
        response.headers["x-after"] = "a"
        return response

    async def after_response(request: AnyRequest) -> None:
        build.note(f"after the response to {request.url.path}")

    async def before_send(message: Message, scope: Scope) -> None:
        build.note((message["type"], sorted(message), scope["path"]))

    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        build.note("enter")
        yield
        build.note("exit")

    class Grows(InitPluginProtocol):
        def on_app_init(self, app_config: Any) -> Any:
            app_config.on_startup.append(lambda: build.note("start"))
            app_config.on_shutdown.append(lambda: build.note("stop"))
            return app_config

    app = build(
        serving("/"),
        before_request=before,
        after_request=after,
        after_response=after_response,
        before_send=[before_send],
        lifespan=[lifespan],
        plugins=[Grows()],
    )
    return app, calls("/", "/?early=1", "/nothing")


@case
def middleware_of_each_kind(build: Build) -> Made:
    """Classes, functions and factories, those that answer themselves, and excluded paths."""

    class Adds(ASGIMiddleware):
        exclude_path_pattern = ("^/plain",)

        async def handle(
            self, scope: Scope, receive: Receive, send: Send, next_app: ASGIApp
        ) -> None:
            async def dressed(message: Message) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (b"x-added", b"1")]
                await send(message)

            await next_app(scope, receive, dressed)

    class Counts:
        def __init__(self, app: ASGIApp, *, start: int) -> None:
            self.app, self.count = app, start

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            self.count += 1
            build.note((scope["type"], self.count))
            await self.app(scope, receive, send)

    def answers(app: ASGIApp) -> ASGIApp:
        async def served(scope: Scope, receive: Receive, send: Send) -> None:
            if b"own" in scope.get("query_string", b""):
                await send(
                    {"type": "http.response.start", "status": 202, "headers": iter([(b"x", b"1")])}
                )
                await send({"type": "http.response.body", "body": b"own", "more_body": False})
            else:
                await app(scope, receive, send)

        return served

    middleware = [Adds(), DefineMiddleware(Counts, start=5), answers]
    app = build(serving("/"), serving("/plain"), middleware=middleware)
    return app, calls("/", "/plain", "/?own", "/nothing")


@case
def guards_and_authentication(build: Build) -> Made:
    """Users, tokens, and guards on two layers."""

    class Tokens(AbstractAuthenticationMiddleware):
        async def authenticate_request(self, connection: Connection) -> AuthenticationResult:
            token = connection.headers.get("authorization")
            if token is None:
                raise NotAuthorizedException
            return AuthenticationResult(user=token.removeprefix("Bearer "), auth=token)

    def admin(connection: Connection, handler: BaseRouteHandler) -> None:
        if handler.opt.get("admin") and connection.user != "ann":
            raise PermissionDeniedException(f"not {connection.user}")

    @get("/me", guards=[admin])
    async def me(request: AnyRequest) -> str:
        return str(request.user)

    @get("/admin", opt={"admin": True})
    async def of_admin(request: AnyRequest) -> str:
        return str(request.auth)

    app = build(
        me, of_admin, middleware=[DefineMiddleware(Tokens, exclude="^/open")], guards=[admin]
    )
    users = [{}, {"authorization": "Bearer ann"}, {"authorization": "Bearer bob"}]
    return app, [call("GET", path, headers=h) for path in ("/me", "/admin") for h in users]


@case
def built_in_middleware(build: Build) -> Made:
    """Compression, other origins, hosts, forged requests, and limits of rates."""

    @get("/")
    async def read() -> str:
        return "text " * 500

    @post("/")
    async def write() -> str:
        return "written"

    limited = RateLimitConfig(("hour", 6), set_rate_limit_headers=False)
    app = build(
        read,
        write,
        cors_config=CORSConfig(allow_origins=["https://shop.example"], max_age=5),
        compression_config=CompressionConfig("gzip", gzip_compress_level=1),
        csrf_config=CSRFConfig("a-secret-of-the-application"),
        allowed_hosts=AllowedHostsConfig(["testserver.local"]),
        middleware=[limited.middleware],
        stores={"rate_limit": MemoryStore()},
    )
    # Litestar leaves a gzip stream open, which Python reports, where it compresses nothing.
    plain = {"accept-encoding": "identity"}
    origin = plain | {"origin": "https://shop.example"}
    preflight = origin | {"access-control-request-method": "POST"}
    return app, [
        call("GET", "/", headers=origin | {"accept-encoding": "gzip"}),
        call("OPTIONS", "/", headers=preflight),
        call("OPTIONS", "/", headers=preflight | {"origin": "https://evil.example"}),
        call("POST", "/", headers=plain),
        call("GET", "/", headers=plain | {"host": "evil.example"}),
        *[call("GET", "/", headers=plain) for _ in range(5)],
    ]


@case
def sessions_and_stores(build: Build) -> Made:
    """Keep a session in a store, and values in another."""

    @get("/count")
    async def count(request: AnyRequest) -> dict[str, Any]:
        request.session["count"] = request.session.get("count", 0) + 1
        await request.app.stores.get("own").set("last", str(request.session["count"]), 60)
        return dict(request.session)

    @get("/last")
    async def last(request: AnyRequest) -> bytes | None:
        return await request.app.stores.get("own").get("last")

    @delete("/session")
    async def end(request: AnyRequest) -> None:
        request.clear_session()

    stores = {"sessions": MemoryStore(), "own": MemoryStore()}
    app = build(count, last, end, middleware=[ServerSideSessionConfig().middleware], stores=stores)
    return app, [*calls("/count", "/count", "/last"), call("DELETE", "/session"), *calls("/count")]


@case
def events_of_the_application(build: Build) -> Made:
    """Listen to one event, and to several."""

    @listener("sent")
    async def on_sent(number: int) -> None:
        build.note(("sent", number))

    @listener("sent", "lost")
    def on_both(number: int) -> None:
        build.note(("sent or lost", number))

    @get("/{event:str}")
    async def emit(event: FromPath[str], request: AnyRequest) -> None:
        request.app.emit(event, number=len(event))

    app = build(emit, listeners=[on_sent, on_both])
    return app, calls("/lost")


# -- mounts, files, documents ----------------------------------------------------------------------


@case
def mounted_applications(build: Build) -> Made:
    """Another ASGI application below a path, and one in Litestar's own form."""

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept", "headers": [(b"x-own", b"1")]})
            await send({"type": "websocket.close", "code": 4001, "reason": "done"})
            return
        message = await receive()
        body = (
            f"{scope['path']} {scope.get('root_path')} {message.get('body', b'').decode()}".encode()
        )
        headers = ((name, value) for name, value in [(b"content-length", b"%d" % len(body))])
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    @asgi("/exact", copy_scope=True)
    async def exact(scope: Scope, receive: Receive, send: Send) -> None:
        await inner(scope, receive, send)

    mounted = asgi("/mounted", is_mount=True, copy_scope=True)(inner)
    return build(exact, mounted), [
        *calls("/exact", "/exact/below", "/mounted", "/mounted/a/b", "/mounted/"),
        call("POST", "/mounted/a", content=b"text"),
        call("HEAD", "/mounted/a"),
        talk("/mounted/a"),
    ]


@case
def static_files(build: Build) -> Made:
    """Files of a folder, one that is missing, and a path that leads out of it."""
    router = create_static_files_router(
        "/static",
        [_FOLDER],
        cache_control=CacheControlHeader(max_age=3),
    )
    paths = ("/static/conftest.py", "/static/missing", "/static/../README.md", "/static")
    return build(router), [*calls(*paths), call("HEAD", paths[0]), call("POST", paths[0])]


@case
def the_openapi_document(build: Build) -> Made:
    """Serve the document and its pages."""

    @get("/people/{name:str}", tags=["people"], summary="Read a person")
    async def read(name: FromPath[str], operations: FromQuery[int] = 0) -> Person:
        return Person(name, operations)

    @post("/people")
    async def write(data: JSONBody[Person]) -> Person:
        return data

    config = OpenAPIConfig("Shop", "1", create_examples=False)
    paths = ("/schema/openapi.json", "/schema/openapi.yaml", "/schema", "/schema/nothing")
    return build(read, write, openapi_config=config), calls(*paths)


# -- WebSockets ------------------------------------------------------------------------------------


@case
def websocket_handlers(build: Build) -> Made:
    """Accept with headers, reject, close with codes, and fail."""

    @websocket("/plain")
    async def plain(socket: AnySocket) -> None:
        await socket.accept(subprotocols="b", headers={"x-own": "1"})
        async for text in socket.iter_data("text"):
            await socket.send_json({"got": text})
            if text == "end":
                await socket.close(4000, "asked")
                break

    @websocket("/rejects")
    async def rejects(socket: AnySocket) -> None:
        await socket.close(4003, "not today")

    @websocket("/fails/{accepts:int}")
    async def fails(socket: AnySocket, accepts: FromPath[int]) -> None:
        if accepts:
            await socket.accept()
        raise WebSocketException(detail="planted", code=4123)

    @websocket("/guarded", guards=[refuse])
    async def guarded(socket: AnySocket) -> None:
        await socket.accept()

    return build(plain, rejects, fails, guarded), [
        talk("/plain", "a", "end", subprotocols=["a", "b"]),
        *map(talk, ("/rejects", "/fails/0", "/fails/1", "/guarded", "/nothing")),
        call("GET", "/plain"),
    ]


@case
def websocket_listeners(build: Build) -> Made:
    """Listen by a function and by a class, with the state and hooks."""

    @websocket_listener("/listens", receive_mode="text")
    async def listens(data: str, state: State) -> str:
        if data == "end":
            raise WebSocketException(detail="ended", code=4002)
        return f"{data} {len(state)}"

    class Listens(WebsocketListener):
        path = "/class"

        async def on_accept(self, socket: AnySocket) -> None:
            build.note(sorted(socket.query_params))

        async def on_disconnect(self, socket: AnySocket) -> None:
            build.note(socket.url.path)

        async def on_receive(self, data: str) -> str:
            if data == "end":
                raise ValueError("planted")
            return data.upper()

    asks = [talk("/listens", "a", "b", "end"), talk("/class?a=1", "a", "end")]
    return build(listens, Listens), asks
