"""A reward source behind an HTTP endpoint: it sends prompts, completions and columns in JSON batches and receives scores. N completions.

    openrlhf    {query, prompts, labels, ...}  -> {rewards} (or {scores})     OpenRLHF's remote reward model, and `stages serve`
    classify    {model, input}                 -> {data: [{probs}]}           vLLM, SGLang: one class of a classifier
    pooling     {model, input}                 -> {data: [{data}]}            vLLM: the last number that a reward model gives
    score       {model, text_1, text_2}        -> {data: [{score}]}           vLLM: a cross-encoder of prompt and completion

An error, a time-out, and a missing or non-finite score are never replaced by a number. After all retries the run ends, or it waits for the
server (on_failure).

`stages serve` sends the digest of its model with each answer. Stored scores of another model are not used, and a model that changes while a
step runs ends the step.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch

from stages.corpora.conversations.messages import Prompt, columns_beside, transcript
from stages.errors import TrainingError
from stages.json_types import JsonObject, is_finite_number
from stages.process.remote import AnswerCache, GaveUp, JsonClient, Refused
from stages.rewards.background import RemoteSource
from stages.rewards.config import RewardInput
from stages.rewards.details import NOTHING, Details, Judgement
from stages.rewards.texts import conversation, full_text

logger = logging.getLogger(__name__)
BETWEEN_ROUNDS = 30.0  # seconds between two rounds of attempts, for on_failure: wait


class Item(TypedDict):
    """The request data of one completion. ``query``: the full text to score; ``beside``: the columns that belong to its prompt, if any."""

    prompt: str
    completion: str
    messages: list[JsonObject]
    query: str
    columns: JsonObject
    beside: NotRequired[JsonObject]


Question = tuple[str, Item]
"""(key, item)."""


class EndpointSource(RemoteSource[Item, float]):
    """Scores from a server. Answers are stored on disk by request content, so a resumed run does not repeat a request."""

    def __init__(
        self, source: RewardInput, *, key: str | None, cache: AnswerCache | None = None, sleep: Callable[[float], None] | None = None
    ) -> None:
        assert source.endpoint is not None
        self.name, self.source, self.cache = source.shown_name, source, cache
        self._sleep = sleep if sleep is not None else time.sleep
        self._knows_model = False  # whether the server has answered this process
        self._digest: str | None = None  # of the server's model, from its first answer; None if it names no model
        self._warned = False  # of scores on disk that another model gave
        self._lock = threading.Lock()
        client = JsonClient(
            key=key,
            timeout=source.timeout_seconds,
            retries=4 if source.retries is None else source.retries,
            backoff_seconds=source.backoff_seconds,
            jitter=0.5,
            sleep=sleep,
        )
        super().__init__(client, batch_size=source.batch_size, concurrency=source.concurrency)

    def judge(self, prompts: Sequence[Prompt], completions: Sequence[str], details: Details = NOTHING) -> Judgement:
        """One score per completion [N].

        Raises TrainingError if the server refuses the request, or, with ``on_failure: stop``, if it gives no score after all retries.
        """
        items = self._items(prompts, completions, details)
        keys = [self._key_of(item) for item in items]
        scores: dict[str, float] = {}
        while (failure := self._collect(dict(zip(keys, items, strict=True)), scores)) is not None:
            missing = sum(key not in scores for key in keys)
            what = f"{self.source.endpoint} gave no score for {missing} of {len(keys)} completions: {failure}"
            message = f"reward {self.name!r}: {what}"
            if isinstance(failure, Refused) or self.source.on_failure == "stop":
                raise TrainingError(
                    f"{message}. The scores received so far are stored. Check the server, endpoint, protocol and api_key_variable"
                )
            logger.warning("%s; asking again in %g s (on_failure: wait)", message, BETWEEN_ROUNDS)
            self._sleep(BETWEEN_ROUNDS)
        return Judgement(torch.tensor([scores[key] for key in keys], dtype=torch.float32))

    def begin(self, prompts: Sequence[Prompt], completions: Sequence[str], details: Details = NOTHING) -> None:
        """Request the scores of these completions and return immediately. ``judge`` collects the answers and raises the errors."""
        self._add({self._key_of(item): item for item in self._items(prompts, completions, details)})

    def ask(self, batch: list[Question]) -> list[float]:
        """Request the scores of a batch and store them on disk. Raises GaveUp or Refused, and TrainingError if the model has changed."""
        items = [item for _, item in batch]

        def read(answer: object) -> tuple[list[float], str | None]:
            return self._scores_in(answer, len(items)), _digest_in(answer)

        scores, digest = self._client.post(str(self.source.endpoint), self._body(items), read)
        self._check_model(digest)
        if self.cache is not None:
            for (key, _), score in zip(batch, scores, strict=True):
                self.cache.put(key, json.dumps(score if digest is None else [score, digest]))
        return scores

    def _check_model(self, digest: str | None) -> None:
        """Raise TrainingError if the server's model is not the one of its first answer."""
        with self._lock:
            if not self._knows_model:
                self._knows_model, self._digest = True, digest
            if digest != self._digest:
                raise TrainingError(
                    f"reward {self.name!r}: {self.source.endpoint} now serves another model ({_short(digest)}) than at the start of this "
                    f"run ({_short(self._digest)}). Serve that one again and continue, or change the step to start it over"
                )

    # Requests

    def _columns(self, details: Details, number: int) -> list[JsonObject]:
        named = [*self.source.columns, *([self.source.label_column] if self.source.label_column is not None else [])]
        return [{name: details.columns[name][row] for name in named} for row in range(number)]

    def _items(self, prompts: Sequence[Prompt], completions: Sequence[str], details: Details) -> list[Item]:
        return [self._item(*one) for one in zip(prompts, completions, self._columns(details, len(completions)), strict=True)]

    def _item(self, prompt: Prompt, completion: str, columns: JsonObject) -> Item:
        query = completion if self.source.reads == "completion" else full_text(prompt, completion)
        item: Item = {
            "prompt": transcript(prompt),
            "messages": conversation(prompt),
            "completion": completion,
            "query": query,
            "columns": columns,
        }
        return {**item, "beside": beside} if (beside := columns_beside(prompt)) else item

    def _body(self, items: Sequence[Item]) -> JsonObject:
        source = self.source
        named = {"model": source.served_model} if source.served_model is not None else {}
        if source.protocol == "openrlhf":
            label, beside = source.label_column, [item.get("beside", {}) for item in items]
            return {
                **named,
                "query": [item["query"] for item in items],
                "prompts": [item["prompt"] for item in items],
                "labels": [item["columns"][label] for item in items] if label is not None else None,
                "completions": [item["completion"] for item in items],
                "messages": [item["messages"] for item in items],
                "columns": {name: [item["columns"][name] for item in items] for name in source.columns},
                **{name: [row.get(name) for row in beside] for name in sorted({name for row in beside for name in row})},
            }
        if source.protocol == "score":
            return {**named, "text_1": [item["prompt"] for item in items], "text_2": [item["completion"] for item in items]}
        return {**named, "input": [item["query"] for item in items]}

    def _key_of(self, item: Item) -> str:
        source = self.source
        asked = [source.endpoint, source.protocol, source.served_model, source.label, source.output, item]
        return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()

    # Answers

    def _add(self, items: dict[str, Item]) -> None:
        """Request the scores of the items that are neither on disk nor already requested."""
        requests = self.begun()
        for key, score in self._kept({key: item for key, item in items.items() if key not in requests}).items():
            requests.know(key, score)
        requests.add(items)

    def _collect(self, items: dict[str, Item], scores: dict[str, float]) -> GaveUp | Refused | None:
        """Add the scores of ``items`` to ``scores``, by key; returns the first failure, or None.

        A score comes from disk, from a request that was begun earlier, or from a new request.
        """
        failure: GaveUp | Refused | None = None
        with self.taken() as requests:
            missing = {key: item for key, item in items.items() if key not in scores}
            self._add(missing)
            for key in missing:
                try:
                    scores[key] = requests.answer(key)
                except (GaveUp, Refused) as error:
                    failure = failure or error
        return failure

    def _scores_in(self, answer: object, number: int) -> list[float]:
        """The scores in an answer. Raises GaveUp if a score is missing or is not a finite number."""
        scores = self._numbers(answer, number)
        if len(scores) != number:
            raise GaveUp(f"the answer has {len(scores)} scores for {number} completions")
        checked = []
        for score in scores:
            if not is_finite_number(score):
                raise GaveUp(f"the answer contains {score!r:.40} as a score")
            checked.append(float(score))
        return checked

    def _numbers(self, answer: Any, number: int) -> list[object]:
        """The scores in an answer, without a check of their values. Raises GaveUp if the answer does not follow the protocol."""
        source = self.source
        try:
            if source.protocol == "openrlhf":
                scores = answer["rewards"] if "rewards" in answer else answer["scores"]
                return [score[0] if isinstance(score, list) and len(score) == 1 else score for score in scores]
            rows = sorted(answer["data"], key=lambda row: row["index"])
            if [row["index"] for row in rows] != list(range(number)):
                raise GaveUp(f"the answer has the indices {[row['index'] for row in rows]!r:.60}; expected 0 to {number - 1}")
            if source.protocol == "score":
                return [row["score"] for row in rows]
            if source.protocol == "pooling":
                return [_last_number(row["data"]) for row in rows]
            probabilities = [row["probs"][source.label] for row in rows]
            return [math.log(score) for score in probabilities] if source.output == "logprob" else probabilities
        except (KeyError, IndexError, TypeError, ValueError) as error:
            kind = f"{type(error).__name__}: {error}"
            raise GaveUp(f"the answer does not follow protocol: {source.protocol} ({kind})") from error

    # Cache

    def _kept(self, items: dict[str, Item]) -> dict[str, float]:
        """The stored scores of the items, without those of another model than the one that is served now.

        If the server does not answer, those of a server that named no model are used, because nothing speaks against them.
        """
        texts = {key: self.cache.get(key) for key in items} if self.cache is not None else {}
        entries = {key: json.loads(text) for key, text in texts.items() if text is not None}
        stored = {key: entry if isinstance(entry, list) else [entry, None] for key, entry in entries.items()}  # None: named no model
        asked: dict[str, float] = {}
        if stored and not self._knows_model:
            key = next(iter(stored))
            with suppress(GaveUp, Refused):  # the next request reports it
                asked[key] = self.ask([(key, items[key])])[0]  # to learn which model is served
        others = [digest for _, digest in stored.values() if digest != self._digest]
        if others and self._knows_model and not self._warned:
            self._warned = True
            logger.warning(
                "reward %r: %s serves another model (%s) than when some of these scores were stored (%s); they are requested again",
                self.name,
                self.source.endpoint,
                _short(self._digest),
                _short(others[0]),
            )
        return {**{key: float(score) for key, (score, digest) in stored.items() if digest == self._digest}, **asked}


def _digest_in(answer: Any) -> str | None:
    """The digest of the model in an answer of `stages serve`; None for other servers."""
    digest = answer.get("digest") if isinstance(answer, dict) else None
    return digest if isinstance(digest, str) else None


def _short(digest: str | None) -> str:
    return digest[:19] if digest is not None else "without a digest"


def _last_number(data: object) -> object:
    """The score in a pooling answer: the last number of a number, a list with one number per token, or rows of one number."""
    while isinstance(data, list):
        data = data[-1]
    return data


def open_cache(folder: Path | None, source: RewardInput) -> AnswerCache | None:
    """The cache for the answers of a source in ``folder``; None if the source must not store answers or ``folder`` is None."""
    return AnswerCache(folder / "rewards.sqlite3", "the cache of rewards") if folder is not None and source.cache else None
