"""The HTTP server of ``stages label``: a page for annotators, a page for the leader, and the JSON interface of both.

    GET  /  /progress  /static/...     the pages; they contain no data
    GET  /api/session                  the annotator, the questions, the instructions
    GET  /api/task[?id=|?wish=]        the next task, or the task ``id`` with the annotator's answer
    GET  /api/answers                  the annotator's most recent answers
    POST /api/answer                   store an answer; status 200 means that it is flushed to disk
    GET  /api/progress                 the values of the report (leader)
    POST /api/invite                   a link for another annotator (leader)
    POST /api/login                    send the password, if one is set

The server reads tokens from the header ``Authorization: Bearer``, never from a cookie. So a page of another site cannot use them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import NoReturn

import uvicorn
from anyio.to_thread import run_sync
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from stages.corpora.conversations.messages import completion_text
from stages.corpora.labels import LabelAnswer, LabelTask
from stages.errors import DataError, LaunchError, StorageError
from stages.json_types import JsonObject
from stages.labelling.access import Access, check_annotator, link
from stages.labelling.markdown import render
from stages.labelling.questions import AnswerError
from stages.labelling.report import Quality, quality
from stages.labelling.store import Store

logger = logging.getLogger(__name__)
PAGE = Path(__file__).parent / "page"
FILES = {"label.html", "progress.html", "label.js", "answers.js", "board.js", "server.js", "progress.js", "style.css"}
LONGEST_BODY = 256 * 1024
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
COOKIE = "stages_label"
PROGRESS_SECONDS = 3.0  # minimum time between two computations of the report


class Refused(Exception):
    """A request that gets an error response."""

    def __init__(self, status: int, message: str, **fields: object) -> None:
        super().__init__(message)
        self.status, self.content = status, {"error": message, **fields}


class LabelServer:
    """The pages and the JSON interface of one store."""

    def __init__(self, store: Store, access: Access, base: str = "", *, say: Callable[[str], None] = logger.info) -> None:
        self.store, self.access, self.base, self._say = store, access, base, say
        self._read_settings()
        self._notice = ""
        self._quality: tuple[float, Quality] | None = None  # the time, and the report of that time
        self._counting = threading.Lock()

    def app(self) -> Starlette:
        """The ASGI application."""
        return Starlette(
            routes=[
                Route("/", partial(self._page, "label.html")),
                Route("/progress", partial(self._page, "progress.html")),
                Route("/static/{name}", self._static),
                Route("/api/session", self._guarded(self._session)),
                Route("/api/task", self._guarded(self._task)),
                Route("/api/answers", self._guarded(self._answers)),
                Route("/api/answer", self._guarded(self._answer), methods=["POST"]),
                Route("/api/progress", self._guarded(self._progress)),
                Route("/api/invite", self._guarded(self._invite), methods=["POST"]),
                Route("/api/login", self._guarded(self._login), methods=["POST"]),
            ]
        )

    # Files

    async def _page(self, name: str, request: Request) -> Response:
        return FileResponse(PAGE / name, headers=HEADERS)

    async def _static(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in FILES:
            return JSONResponse({"error": "no such file"}, 404, headers=HEADERS)
        return FileResponse(PAGE / name, headers=HEADERS)

    # Settings

    def _read_settings(self) -> None:
        """Prepare what the page shows from the settings. ``_version`` lets the page detect that the questions changed."""
        settings = self.store.settings
        self._instructions = render(settings.instructions)
        asked = json.dumps([settings.questions.model_dump(mode="json"), settings.instructions], sort_keys=True)
        self._version = hashlib.sha256(asked.encode()).hexdigest()[:16]

    def _refresh(self) -> None:
        """Load settings that `stages run` or `stages label` changed, and report the change on the console and the leader's page."""
        try:
            changed = self.store.refresh()
        except DataError as error:
            if str(error) != self._notice:
                self._notice = str(error)
                self._say(self._notice)
            return
        if changed:
            self._read_settings()
            self._quality = None
            self._notice = f"{datetime.now().astimezone():%H:%M}: these settings changed and now apply: {', '.join(changed)}"
            self._say(self._notice)

    # Authentication

    def _guarded(self, answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            self._refresh()
            try:
                response = await answer(request)
            except Refused as refused:
                response = JSONResponse(refused.content, refused.status)
            except (AnswerError, DataError) as error:
                response = JSONResponse({"error": str(error), "version": self._version}, 400)
            except StorageError as error:
                response = JSONResponse({"error": str(error)}, 503)
            response.headers.update(HEADERS)
            return response

        return guarded

    def _token(self, request: Request) -> str:
        if not self.access.has_session(request.cookies.get(COOKIE, "")):
            raise Refused(401, "the password is required", needs="password")
        return request.headers.get("authorization", "").removeprefix("Bearer ")

    def _annotator(self, request: Request) -> str:
        token, name = self._token(request), request.query_params.get("annotator", "")
        if not self.access.is_annotator(name, token):
            raise Refused(403, "this link is not valid; ask the person who sent it for a new one")
        return name

    def _check_lead(self, request: Request) -> None:
        if not self.access.is_lead(self._token(request)):
            raise Refused(403, "this link is not valid; `stages label` prints the right one")

    async def _body(self, request: Request) -> object:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > LONGEST_BODY:
                raise Refused(413, f"the request is longer than {LONGEST_BODY} bytes")
        try:
            return json.loads(body, parse_constant=_refused_constant)
        except (ValueError, RecursionError) as error:
            raise Refused(400, "the request is not valid JSON") from error

    # Requests of the annotator's page

    async def _session(self, request: Request) -> Response:
        annotator = self._annotator(request)
        settings = self.store.settings
        return JSONResponse(
            {
                "annotator": annotator,
                "name": settings.name,
                "questions": settings.questions.model_dump(mode="json"),
                "instructions": self._instructions,
                "version": self._version,
                "counts": self.store.counts(annotator),
            }
        )

    async def _task(self, request: Request) -> Response:
        annotator = self._annotator(request)
        given = request.query_params.get("id")
        if given is not None:
            task, answer = self.store.task(given), self.store.answer_of(annotator, given)
            if task is None or answer is None or task.gold is not None:
                raise Refused(404, "you have no such answer")
            return JSONResponse({"task": self._shown(task, annotator), "answer": asdict(answer) | {"digests": None}})
        next_task = self.store.next_task(annotator, request.query_params.get("wish"))
        content: JsonObject = {"counts": self.store.counts(annotator), "task": None, "version": self._version}
        if self.store.gold:
            screening = self.store.screening(annotator)
            content["screening"] = {"answered": screening.answered, "of": screening.of, "passed": screening.passed}
        if next_task is not None:
            content["task"] = self._shown(next_task, annotator)
        return JSONResponse(content)

    def _shown(self, task: LabelTask, annotator: str) -> JsonObject:
        """The parts of a task that an annotator may see: no authors, no digests, no gold answer."""
        order = self.store.order(task, annotator)
        texts = task.texts
        return {"id": task.id, "prompt": _turns(task), "order": order, "completions": [texts[index] for index in order]}

    async def _answers(self, request: Request) -> Response:
        return JSONResponse(
            {"answers": [_line(answer, self.store.tasks[answer.task]) for answer in self.store.history(self._annotator(request))]}
        )

    async def _answer(self, request: Request) -> Response:
        annotator = self._annotator(request)
        content = await self._body(request)
        answer = await run_sync(self.store.record, annotator, content)
        return JSONResponse({"id": answer.id, "counts": self.store.counts(annotator)})

    # Requests of the leader's page

    async def _progress(self, request: Request) -> Response:
        self._check_lead(request)
        return JSONResponse({**await run_sync(self._numbers), "notice": self._notice})

    def _numbers(self) -> Quality:
        with self._counting:
            if self._quality is None or time.monotonic() - self._quality[0] > PROGRESS_SECONDS:
                content = quality(self.store.labels())
                self._quality = (time.monotonic(), content)
            return self._quality[1]

    async def _invite(self, request: Request) -> Response:
        self._check_lead(request)
        content = await self._body(request)
        name = check_annotator(str(content.get("annotator", "")) if isinstance(content, dict) else "")
        base = f"{request.url.scheme}://{request.headers.get('host', '')}"
        return JSONResponse({"annotator": name, "link": link(base, self.access, name)})

    async def _login(self, request: Request) -> Response:
        content = await self._body(request)
        is_right = self.access.gives_password(str(content.get("password", "")) if isinstance(content, dict) else "")
        if is_right is None:
            raise Refused(429, "too many wrong passwords; wait a minute", needs="password")
        if not is_right:
            raise Refused(401, "wrong password", needs="password")
        response = JSONResponse({})
        response.set_cookie(COOKIE, self.access.session, httponly=True, samesite="strict")
        return response


def _turns(task: LabelTask) -> str | list[dict[str, str]]:
    """The prompt as a string, or as a list of turns, each with a role and a text."""
    if isinstance(task.prompt, str):
        return task.prompt
    tools = [{"role": "tools", "content": json.dumps(task.tools, ensure_ascii=False)}] if task.tools else []
    return tools + [{"role": str(message["role"]), "content": completion_text([message])} for message in task.prompt]


def _refused_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a valid JSON number")


def _line(answer: LabelAnswer, task: LabelTask) -> dict[str, str]:
    prompt = task.prompt if isinstance(task.prompt, str) else completion_text(task.prompt[-1:])
    state = "skipped" if answer.skipped is not None else "flagged" if answer.flagged is not None else "ranked"
    return {"task": answer.task, "time": answer.time, "state": state, "prompt": prompt[:120]}


# Starting


def listen(host: str, port: int | None) -> socket.socket:
    """A listening socket on ``port``, or on the first free port from 8770 if it is None. Raises LaunchError if no port is available."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for number in [port] if port is not None else range(8770, 8790):
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sets TCP_NODELAY only if it is given
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, number))
            listening.listen(128)
            return listening
        except (OSError, OverflowError) as error:
            listening.close()
            reason: Exception = error
    where = f"port {port}" if port is not None else "a port from 8770 to 8789"
    raise LaunchError(f"cannot listen on {host}, {where} ({reason}); name another with --port or --host")


def base_url(bound: socket.socket, host: str) -> str:
    """The base URL of the server's pages. A wildcard address is replaced by this machine's name."""
    shown = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{shown}:{bound.getsockname()[1]}"


def make_server(server: LabelServer) -> uvicorn.Server:
    """A uvicorn server for the application. It does not log URLs, because they contain tokens."""
    config = uvicorn.Config(
        server.app(),
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    return uvicorn.Server(config)


class Served:
    """Context manager that serves a store on the loopback address in a thread.

    Use it as ``with Served(folder) as served: ... served.base``.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Served:
        self.store = Store(self._folder)
        try:
            self.access = Access.of(self._folder)
            self._socket = listen("127.0.0.1", 0)
        except BaseException:
            self.store.close()
            raise
        self.base = base_url(self._socket, "127.0.0.1")
        self._server = make_server(LabelServer(self.store, self.access, self.base))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, name="label server", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=10)
        self._socket.close()
        self.store.close()
