"""Serve a reward model or a classifier over HTTP, with the protocols that ``reward: [{endpoint: ...}]`` uses.

    POST /get_reward    {query, prompts, completions, messages} -> {rewards, scores}    (OpenRLHF's remote reward model)
    POST /pooling       {input} -> {data: [{index, data}]}                              (vLLM)
    POST /classify      {input} -> {data: [{index, label, probs, num_classes}]}         (vLLM; classifiers only)
    POST /score         {text_1, text_2} -> {data: [{index, score}]}                    (vLLM)
    GET  /health, /v1/models

Requests with separate prompts may have ``tools``, a list with one entry for each prompt, and ``chat_template_kwargs`` for the chat template
of a reward model: one object for all prompts, or a list with one entry for each prompt.

Every response has ``model`` and ``digest`` (of the model's content), so that each score can be traced to the weights that gave it. ``cut``
says for each text whether it was too long for the model, so that its beginning was cut.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from stages.corpora.conversations.messages import ARGUMENTS, columns_beside, messages_of, text_prompt
from stages.corpora.rows import Row
from stages.corpora.tables.formats import check_characters
from stages.errors import DataError, LaunchError, StagesError
from stages.json_types import JsonObject
from stages.rewards.classifier import ClassifierSource
from stages.rewards.generative import GenerativeSource
from stages.rewards.learned import RewardModelSource
from stages.rewards.source import judge
from stages.tokens.template_arguments import unknown_arguments

if TYPE_CHECKING:
    from starlette.requests import Request

    from stages.corpora.conversations.messages import Prompt
    from stages.registry.references import ResolvedModel
    from stages.rewards.details import Judgement

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LONGEST_REQUEST = 64 * 2**20  # bytes
CLIENT_LEFT = 499  # status of a request whose client has closed the connection; nobody receives it


class BadRequest(Exception):
    """An invalid request. The message says what is wrong. HTTP status 400."""


class Scorer:
    """Answers requests with one reward source. Call it from one thread at a time: the source makes its own batches."""

    def __init__(self, source: RewardModelSource | ClassifierSource | GenerativeSource, model: ResolvedModel) -> None:
        self.source = source
        self.signature = {"model": model.ref, "digest": model.digest}

    def get_reward(self, body: Mapping[str, object]) -> JsonObject:
        """Scores of prompts and completions. Without ``completions``, the texts to score are in ``query``.

        OpenRLHF sends no completions, and it has already applied a chat template to its prompts and queries. So a reward model with a chat
        template reads such a query unchanged and does not apply its template again.
        """
        self._check_arguments(body, renders="completions" in body)
        prompts, completions = _pairs(body)
        if "completions" not in body and isinstance(self.source, RewardModelSource) and self.source.tokenizer.chat_template:
            prompts, completions = None, _texts(body, "query")
        judgement = judge(self.source, prompts, completions) if prompts is not None else self._judge_texts(completions)
        scores = judgement.scores.tolist()
        return {"rewards": scores, "scores": scores, "cut": _cut(judgement), "extra_logs": {}}

    def pooling(self, body: Mapping[str, object]) -> JsonObject:
        """The score of each complete text."""
        self._check_arguments(body, renders=False)
        judgement = self._judge_texts(_texts(body, "input"))
        return _listed({"data": [score], "object": "pooling", "cut": cut} for score, cut in _rows(judgement))

    def score(self, body: Mapping[str, object]) -> JsonObject:
        """The score of each pair of prompt and completion. A single text_1 is used with every text_2."""
        self._check_arguments(body, renders=True)
        first, second = _texts(body, "text_1"), _texts(body, "text_2")
        if len(first) == 1:
            first = first * len(second)
        if len(first) != len(second):
            raise BadRequest(f"text_1 has {len(first)} texts and text_2 {len(second)}; expected one, or as many")
        judgement = judge(self.source, _prompts(body, "prompts", first), second)
        return _listed({"score": score, "object": "score", "cut": cut} for score, cut in _rows(judgement))

    def classify(self, body: Mapping[str, object]) -> JsonObject:
        """The probabilities of all labels for each complete text."""
        if not isinstance(self.source, ClassifierSource):
            raise BadRequest("a reward model has no classes; use /pooling, /score or /get_reward")
        self._check_arguments(body, renders=False)
        rows, cut = self.source.probabilities(_texts(body, "input"))
        names = self.source.names
        return _listed(
            {"label": names[max(range(len(row)), key=row.__getitem__)], "probs": row, "num_classes": len(row), "cut": was_cut}
            for row, was_cut in zip(rows, cut.tolist(), strict=True)
        )

    def _check_arguments(self, body: Mapping[str, object], *, renders: bool) -> None:
        """Raise BadRequest for template arguments that nothing would use. ``renders``: whether prompts and completions are separate.

        Arguments of single rows may be those of other models, which also read these rows. Only the log names those that are not used.
        """
        arguments = body.get(ARGUMENTS)
        if not arguments:
            return
        if not renders:
            raise BadRequest(f"{ARGUMENTS}: no chat template is applied to complete texts. Send prompts and completions to /get_reward")
        if isinstance(arguments, dict):
            unused = f"{self.signature['model']} reads plain texts, without a chat template"
            if isinstance(self.source, RewardModelSource):
                unused = unknown_arguments(self.source.tokenizer, arguments)
            if unused:
                raise BadRequest(f"{ARGUMENTS}: {unused}")

    def _judge_texts(self, texts: Sequence[str]) -> Judgement:
        if isinstance(self.source, GenerativeSource):
            raise BadRequest(
                "this model reads a prompt and its completion separately, but these texts do not show where the completion begins. Send "
                "prompts and completions to /get_reward, or use /score"
            )
        return self.source.judge_texts(texts)


def _cut(judgement: Judgement) -> list[bool]:
    """Which texts were cut, one entry for each."""
    return judgement.cut.tolist() if judgement.cut is not None else [False] * len(judgement.scores)


def _rows(judgement: Judgement) -> Iterable[tuple[float, bool]]:
    """(score, whether the text was cut) of every text."""
    return zip(judgement.scores.tolist(), _cut(judgement), strict=True)


def _pairs(body: Mapping[str, object]) -> tuple[list[Prompt] | None, list[str]]:
    """(prompts, completions) of a request, or (None, complete texts) if the request does not separate them. Raises BadRequest."""
    if "completions" not in body:
        queries = _texts(body, "query")
        prompts = _texts(body, "prompts") if body.get("prompts") else None
        if prompts is not None and len(prompts) != len(queries):
            raise BadRequest(f"prompts has {len(prompts)} texts and query {len(queries)}")
        if prompts is None or not all(query.startswith(prompt) for query, prompt in zip(queries, prompts, strict=True)):
            return None, queries
        return list(prompts), [query[len(prompt) :] for query, prompt in zip(queries, prompts, strict=True)]
    completions = _texts(body, "completions")
    column = "messages" if body.get("messages") else "prompts"
    given = body.get(column)
    if not isinstance(given, list) or len(given) != len(completions):
        raise BadRequest(f"{column} must be a list with one entry for each of the {len(completions)} completions")
    return _prompts(body, column, _texts(body, column) if column == "prompts" else given), completions


def _prompts(body: Mapping[str, object], column: str, given: Sequence[object]) -> list[Prompt]:
    """The prompts of a request with its tools and template arguments. ``given``: the values of ``column``, texts or messages.

    Raises BadRequest, and DataError for an entry that is not valid.
    """
    columns = {column: given}
    for name in ("tools", ARGUMENTS):
        value = body.get(name) or [None] * len(given)
        values = [value] * len(given) if name == ARGUMENTS and isinstance(value, dict) else value
        if not isinstance(values, list) or len(values) != len(given):
            raise BadRequest(f"{name} is {value!r:.60}; expected a list with one entry for each of the {len(given)} prompts")
        columns[name] = values
    rows = [Row(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [_prompt(row, number) for number, row in enumerate(rows, 1)]


def _prompt(row: Row, number: int) -> Prompt:
    """The prompt of entry ``number``: a text if it is a single user turn of text without tools and arguments. Raises DataError."""
    row.location = f"entry {number}"
    if "messages" not in row:
        return text_prompt(row, row["prompts"])
    prompt = messages_of(row, "messages")
    if prompt[-1]["role"] == "assistant":
        raise DataError(f"{row.location}: messages ends with an assistant turn; send the last reply in completions")
    first = prompt[0]
    plain = len(prompt) == 1 and set(first) == {"role", "content"} and first["role"] == "user" and isinstance(first["content"], str)
    return first["content"] if plain and not columns_beside(prompt) else prompt


def _texts(body: Mapping[str, object], name: str) -> list[str]:
    """The texts of a field: a list of strings, or one string. Raises BadRequest."""
    value = body.get(name)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadRequest(f"{name} is {value!r:.60}; expected a list of texts")
    return texts


def _listed(rows: Iterable[Mapping[str, object]]) -> JsonObject:
    return {"object": "list", "data": [{"index": index, **row} for index, row in enumerate(rows)]}


def make_app(scorer: Scorer, *, key: str | None = None) -> Starlette:
    """The ASGI application. With a ``key``, every request except /health must send it as a bearer token."""

    def denied(request: Request) -> Response | None:
        sent = request.headers.get("authorization", "")
        if key is None or hmac.compare_digest(sent.encode(), f"Bearer {key}".encode()):
            return None
        return JSONResponse({"error": "this server requires its key as a bearer token", **scorer.signature}, status_code=401)

    computing = asyncio.Lock()

    def answering(work: Callable[[JsonObject], JsonObject]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            if (refusal := denied(request)) is not None:
                return refusal
            try:
                body = await _body(request)
                async with computing:
                    if await request.is_disconnected():  # it has stopped waiting, or will send the request again
                        return Response(status_code=CLIENT_LEFT)
                    answered = await run_in_threadpool(work, body)
                return JSONResponse({**answered, **scorer.signature})
            except ClientDisconnect:
                return Response(status_code=CLIENT_LEFT)
            except (BadRequest, StagesError) as error:
                status = 400 if isinstance(error, BadRequest | DataError) else 500
                return JSONResponse({"error": str(error), **scorer.signature}, status_code=status)

        return answer

    async def failed(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": f"the server failed ({type(error).__name__}: {error})", **scorer.signature}, status_code=500)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", **scorer.signature})

    async def models(request: Request) -> Response:
        listed = {"id": scorer.signature["model"], "object": "model", **scorer.signature}
        return denied(request) or JSONResponse({"object": "list", "data": [listed]})

    calls = {"/get_reward": scorer.get_reward, "/pooling": scorer.pooling, "/classify": scorer.classify, "/score": scorer.score}
    routes = [Route(path, answering(work), methods=["POST"]) for path, work in calls.items()]
    handlers = {Exception: failed}  # the traceback is logged as well
    return Starlette(routes=[*routes, Route("/health", health), Route("/v1/models", models)], exception_handlers=handlers)


async def _body(request: Request) -> JsonObject:
    """The JSON object of a request. Raises BadRequest, also for a body that is too long, with or without a content-length."""
    content = bytearray()
    async for part in request.stream():
        content += part
        if max(len(content), int(request.headers.get("content-length") or 0)) > LONGEST_REQUEST:
            raise BadRequest(f"the request is longer than {LONGEST_REQUEST} bytes; send smaller batches")
    try:
        body = json.loads(content)
        check_characters(body, "the request")
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the request is not valid JSON ({error})") from error
    if not isinstance(body, dict):
        raise BadRequest("expected a JSON object")
    return body


def serve(scorer: Scorer, *, host: str, port: int, key: str | None, say: Callable[[str], None]) -> None:
    """Answer requests until the process is stopped.

    Raises LaunchError if other machines can reach the address and there is no key, or if the port is not available.
    """
    if host not in LOOPBACK and key is None:
        raise LaunchError(f"--host {host} lets other machines send requests. Name the variable with the API key: --api-key-variable NAME")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise LaunchError(f"cannot listen on {host}:{port} ({error.strerror}); choose another --port, or 0 for any free port") from error
    address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    say(f"{scorer.signature['model']} ({scorer.signature['digest']}) answers at {address}/get_reward, /pooling, /classify and /score")
    uvicorn.Server(uvicorn.Config(make_app(scorer, key=key), log_level="warning")).run(sockets=[listener])
