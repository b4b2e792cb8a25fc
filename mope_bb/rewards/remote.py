"""Rewards of a model with one label behind HTTP: vLLM, SGLang or Hugging Face's text-embeddings-inference (TEI).

Each conversation is a request of its own, so that one that is refused costs no other; the servers batch them. All of
these servers squash the score with a sigmoid unless they are told not to, and one that does not know this setting does
so silently. That is found out by asking once in both ways, see `is_raw`. What cannot be found out: SGLang has no such
setting, so that its scores are taken as they are; a first answer around 0.66 tells nothing, and the next one is tried;
nor can it be seen whether a server applies the right chat template, or cuts a conversation that is too long.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from mope_bb.chat_tokenizer import as_openai
from mope_bb.config import RewardConfig
from mope_bb.errors import RewardError
from mope_bb.failures import shown
from mope_bb.keys import Key
from mope_bb.rewards.asking import ask_all, failed, read_key
from mope_bb.rewards.base import Conversation, RewardModel, checked_score, win_probability
from mope_bb.rewards.rendering import ChatRenderer, open_renderer
from mope_bb.transport import HttpClient
from mope_bb.usage import Meter

SAME: Final = 0.01
"""Two replies to one question may differ by this much, as batches are computed in half precision."""
_LABELS_HINT: Final = "Serve a sequence classifier that was trained with one label."
_HEAD_HINT: Final = "Start the server so that it runs the model's classification head, not as an embedding model."


def build_vllm_classify(conversation: Conversation, model: str | None, *, raw: bool = True) -> dict[str, Any]:
    """The body of POST /classify of vLLM, which renders the chat itself; `raw` = without the activation."""
    return {
        **({} if model is None else {"model": model}),
        "messages": [as_openai(message) for message in conversation],
        "add_generation_prompt": False,
        "use_activation": not raw,
    }


def build_vllm_pooling(conversation: Conversation, model: str | None, *, raw: bool = True) -> dict[str, Any]:
    """The body of POST /pooling of vLLM."""
    return {**build_vllm_classify(conversation, model, raw=raw), "task": "classify"}


def build_sglang(text: str) -> dict[str, Any]:
    """The body of POST /classify of SGLang, for a rendered chat."""
    return {"text": [text]}


def build_tei(text: str, *, raw: bool = True) -> dict[str, Any]:
    """The body of POST /predict of TEI, for a rendered chat; one that is too long is refused, not cut."""
    return {"inputs": text, "raw_scores": raw, "truncate": False}


def parse_vllm_classify(reply: Any) -> float:
    """The score in {"data": [{"index": 0, "label": ..., "probs": [3.81], "num_classes": 1}]}. Raises RewardError."""
    entry = _only(_field(reply, "data", "the reply"), "data")
    probs = _field(entry, "probs", "data[0]")
    if (found := entry.get("num_classes")) != 1 or isinstance(found, bool):
        raise RewardError(f"the served model has num_classes = {shown(found)}, a reward model has 1", hint=_LABELS_HINT)
    return _number(_only(probs, "probs", hint=_LABELS_HINT), "probs[0]")


def parse_vllm_pooling(reply: Any) -> float:
    """The score in {"data": [{"index": 0, "object": "pooling", "data": [3.81]}]}. Raises RewardError."""
    entry = _only(_field(reply, "data", "the reply"), "data")
    return _number(_only(_field(entry, "data", "data[0]"), "data[0].data", hint=_HEAD_HINT), "data[0].data[0]")


def parse_sglang(reply: Any) -> float:
    """The score in [{"embedding": [3.81], "meta_info": {...}}]. Raises RewardError."""
    scores = _field(_only(reply, "the reply"), "embedding", "the reply's entry")
    return _number(_only(scores, "embedding", hint=_HEAD_HINT), "embedding[0]")


def parse_tei(reply: Any) -> float:
    """The score in [{"score": 3.81, "label": "LABEL_0"}]. Raises RewardError."""
    return _number(_field(_only(reply, "the reply", hint=_LABELS_HINT), "score", "the reply's entry"), "score")


def is_raw(raw: float, activated: float) -> bool | None:
    """Whether a server that gave `raw` gives raw scores, when it gave `activated` to the same, asked to squash it.

    None if it cannot be told, around 0.66, which is its own sigmoid. Two like numbers outside [0, 1] are those of a
    model without an activation; inside [0, 1] they are taken for squashed, for what else would hide there?
    """
    is_same = math.isclose(raw, activated, rel_tol=SAME, abs_tol=SAME)
    if not is_same:
        return True
    if math.isclose(win_probability(raw, 0.0), activated, abs_tol=SAME):
        return None
    return not -SAME <= raw <= 1 + SAME


@dataclass(frozen=True, slots=True)
class _Server:
    """What one kind of server is asked, and how its reply is read."""

    path: str
    build: Callable[[Any, str | None, bool], Mapping[str, Any]]
    """From a conversation or its rendered text, a served name, and whether the raw score is wanted."""
    parse: Callable[[Any], float]
    reads_text: bool
    is_told_raw: bool
    """Whether it has a setting for the raw score."""


_SERVERS: Final[dict[str, _Server]] = {
    "vllm": _Server(
        "/classify",
        lambda shown, model, raw: build_vllm_classify(shown, model, raw=raw),
        parse_vllm_classify,
        reads_text=False,
        is_told_raw=True,
    ),
    "vllm-pooling": _Server(
        "/pooling",
        lambda shown, model, raw: build_vllm_pooling(shown, model, raw=raw),
        parse_vllm_pooling,
        reads_text=False,
        is_told_raw=True,
    ),
    # Never /v1/classify, whose softmax over one score is always 1.
    "sglang": _Server(
        "/classify", lambda shown, model, raw: build_sglang(shown), parse_sglang, reads_text=True, is_told_raw=False
    ),
    "tei": _Server(
        "/predict", lambda shown, model, raw: build_tei(shown, raw=raw), parse_tei, reads_text=True, is_told_raw=True
    ),
}


@dataclass(eq=False, slots=True)
class _Trial:
    """Whether the server gives raw scores, found out within one call."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    error: RewardError | None = None


class RemoteReward(RewardModel):
    """Asks a reward model server for each conversation."""

    def __init__(
        self, dimension: str, config: RewardConfig, *, api_key: Key | None = None, renderer: ChatRenderer | None = None
    ) -> None:
        """`config` is of kind "remote"; its server is first asked when needed. SGLang and TEI need a `renderer`."""
        self.dimension = dimension
        self._config = config
        self._server = _SERVERS[str(config.provider)]
        self._api_key = api_key
        self._renderer = renderer
        assert renderer is not None or not self._server.reads_text
        self._is_known_raw = not self._server.is_told_raw
        self._is_closed = False
        self._meter: Meter | None = None

    def score(self, conversations: Sequence[Conversation]) -> list[float | RewardError]:
        if self._is_closed:
            return [failed(self.dimension, "it is closed") for _ in conversations]
        shown = [self._show(conversation) for conversation in conversations]
        trial = _Trial()

        async def ask(client: HttpClient, question: Any) -> float:
            return await self._ask(client, question, trial)

        asked = [one for one in shown if not isinstance(one, RewardError)]
        found = iter(
            ask_all(self._open_client, ask, asked, dimension=self.dimension, max_in_flight=self._config.max_in_flight)
        )
        return [one if isinstance(one, RewardError) else next(found) for one in shown]

    def charge(self, meter: Meter) -> None:
        self._meter = meter

    def close(self) -> None:
        self._is_closed = True

    def _show(self, conversation: Conversation) -> Any:
        """What the server is shown: the conversation, or its text, or the RewardError why there is none."""
        try:
            if self._renderer is not None and self._server.reads_text:
                return self._renderer.render(conversation)
            if self._renderer is not None:
                self._renderer.check(conversation)
        except RewardError as error:
            return failed(self.dimension, error.message)
        return conversation

    def _open_client(self) -> HttpClient:
        config = self._config
        client = HttpClient(
            # "/v1" belongs to other routes of these servers.
            str(config.base_url).rstrip("/").removesuffix("/v1"),
            provider=str(config.provider),
            expert=self.dimension,
            api_key=self._api_key,
            timeout_s=config.timeout_s,
            attempt_timeout_s=config.attempt_timeout_s,
            max_retries=config.max_retries,
        )
        if self._meter is not None:
            client.charge(self._meter)
        return client

    async def _ask(self, client: HttpClient, shown: Any, trial: _Trial) -> float:
        score = await self._question(client, shown, raw=True)
        async with trial.lock:
            if trial.error is None and not self._is_known_raw:
                verdict = is_raw(score, await self._question(client, shown, raw=False))
                self._is_known_raw = verdict is True
                if verdict is False:
                    trial.error = RewardError(
                        f"{self._config.base_url!r} gives {score:.4g} whether it is asked for a raw score or not: it "
                        "seems to squash its scores",
                        hint="Use a version of the server that knows `use_activation` (vLLM) or `raw_scores` (TEI).",
                    )
        if trial.error is not None:
            raise trial.error
        return score

    async def _question(self, client: HttpClient, shown: Any, *, raw: bool) -> float:
        reply = await client.post_json(self._server.path, self._server.build(shown, self._config.model, raw))
        score = checked_score(self._server.parse(reply), self.dimension)
        if isinstance(score, RewardError):
            raise score
        return score


def open_remote(dimension: str, config: RewardConfig) -> RemoteReward:
    """Make the reward model of `config`, whose server is first asked when needed. Raises ConfigError."""
    renderer = None if config.tokenizer is None else open_renderer(config.tokenizer)
    return RemoteReward(dimension, config, api_key=read_key(dimension, config), renderer=renderer)


def _field(data: Any, name: str, where: str) -> Any:
    if not isinstance(data, dict) or name not in data:
        raise RewardError(
            f"{where} has no {name!r}: {shown(data)}", hint="Does `provider` name the software behind `base_url`?"
        )
    return data[name]


def _only(data: Any, where: str, *, hint: str | None = None) -> Any:
    """The entry of a list of one."""
    if not isinstance(data, list) or len(data) != 1:
        found = f"{len(data)} entries" if isinstance(data, list) else shown(data)
        raise RewardError(f"{where} has {found}, expected a list of one", hint=hint)
    return data[0]


def _number(value: Any, where: str) -> float:
    if type(value) is not float and (type(value) is not int or abs(value) > 2**53):
        raise RewardError(f"{where} is {shown(value)}, expected a number")
    return float(value)
