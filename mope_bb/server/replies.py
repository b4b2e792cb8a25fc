"""Replies in OpenAI's shapes, whole and in chunks, for chat and for text."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field
from typing import Any, Final

from mope_bb import __version__
from mope_bb.events import TextDelta, ToolCallDelta
from mope_bb.pcm.merging import Plan
from mope_bb.server.token_details import Details
from mope_bb.types import Answer, Effort

FINGERPRINT: Final = f"mope-bb {__version__}"
Delta = TextDelta | ToolCallDelta


@dataclass(slots=True)
class Choice:
    """One answer of a reply, as far as it came."""

    details: list[Details] = field(default_factory=list)
    """One for each token, where a request wants any."""
    answer: Answer | None = None
    error: BaseException | None = None
    """What ended it before its end."""


class Writer(ABC):
    """Writes the replies of one request."""

    object_name: str
    chunk_name: str

    def __init__(self, answer_id: str, model: str, *, told_seed: int | None, tells_usage: bool, plan: Plan) -> None:
        """`told_seed` is the one that the client gave."""
        self._seed = told_seed
        self._begun = {"answer_id": answer_id, "merge": plan.rule.name, "weights": weights_of(plan)}
        self._head: dict[str, Any] = {
            "id": answer_id,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }
        self._chunk_head = {**self._head, "object": self.chunk_name} | ({"usage": None} if tells_usage else {})

    def opening(self, index: int) -> dict[str, Any]:
        """The chunk before the first token of a choice."""
        return {**self._chunk_head, "choices": [self._opened(index)], "mope": self._begun}

    def chunk(self, index: int, event: Delta, details: Details) -> dict[str, Any]:
        """The chunk of one token."""
        choice = self._grown(index, event, details)
        choice["finish_reason"] = event.token.finish_reason
        if details.trace is not None:
            choice["trace"] = [details.trace]
        return {**self._chunk_head, "choices": [choice]}

    def closing(self, answers: Sequence[Answer], num_prompts: int) -> dict[str, Any]:
        """The chunk that tells what it cost."""
        return {**self._chunk_head, "choices": [], **self._summary(answers, num_prompts)}

    def whole(self, choices: Sequence[Choice], num_prompts: int, *, tells_trace: bool) -> dict[str, Any]:
        """The whole reply."""
        told: list[dict[str, Any]] = []
        answers: list[Answer] = []
        for index, choice in enumerate(choices):
            assert choice.answer is not None
            answers.append(choice.answer)
            one = {"index": index, **self._told(choice.answer, choice.details)}
            one["finish_reason"] = choice.answer.finish_reason
            if tells_trace:
                one["trace"] = [details.trace for details in choice.details]
            told.append(one)
        return {**self._head, "object": self.object_name, "choices": told, **self._summary(answers, num_prompts)}

    def _summary(self, answers: Sequence[Answer], num_prompts: int) -> dict[str, Any]:
        # The n answers to one prompt have read it once, as OpenAI counts.
        per_prompt = len(answers) // num_prompts
        read = sum(answer.num_prompt_tokens for answer in answers[::per_prompt])
        drawn = sum(answer.num_completion_tokens for answer in answers)
        first = answers[0]
        return {
            "usage": {"prompt_tokens": read, "completion_tokens": drawn, "total_tokens": read + drawn},
            "mope": {
                "merge": first.merge,
                "weights": self._begun["weights"],
                # Of several answers each has a seed of its own: that of the client, and those that follow it.
                "seed": first.seed if len(answers) == 1 or self._seed is not None else None,
                "dropped": list(dict.fromkeys(name for answer in answers for name in answer.dropped)),
                "effort": asdict(_total(answers)),
            },
        }

    @abstractmethod
    def _opened(self, index: int) -> dict[str, Any]: ...

    @abstractmethod
    def _grown(self, index: int, event: Delta, details: Details) -> dict[str, Any]: ...

    @abstractmethod
    def _told(self, answer: Answer, details: Sequence[Details]) -> dict[str, Any]: ...


class ChatWriter(Writer):
    """Chat completions."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def _opened(self, index: int) -> dict[str, Any]:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def _grown(self, index: int, event: Delta, details: Details) -> dict[str, Any]:
        if isinstance(event, TextDelta):
            delta: dict[str, Any] = {"content": event.text} if event.text or not event.token.finish_reason else {}
        else:
            delta = _call_delta(event)
        logprobs = None if details.logprob is None else {"content": [details.logprob], "refusal": None}
        return {"index": index, "delta": delta, "logprobs": logprobs}

    def _told(self, answer: Answer, details: Sequence[Details]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.tool_calls:
            message["content"] = None
            message["tool_calls"] = [
                {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in answer.tool_calls
            ]
        content = [one.logprob for one in details if one.logprob is not None]
        return {"message": message, "logprobs": {"content": content, "refusal": None} if content else None}


class TextWriter(Writer):
    """Completions of raw text."""

    object_name = chunk_name = "text_completion"

    def _opened(self, index: int) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": None}

    def _grown(self, index: int, event: Delta, details: Details) -> dict[str, Any]:
        assert isinstance(event, TextDelta)
        return {"index": index, "text": event.text, "logprobs": _old_logprobs([details])}

    def _told(self, answer: Answer, details: Sequence[Details]) -> dict[str, Any]:
        return {"text": answer.text, "logprobs": _old_logprobs(details)}


def weights_of(plan: Plan) -> dict[str, float]:
    """Lambda by name."""
    return dict(zip(plan.experts, plan.lambdas, strict=True))


def _call_delta(event: ToolCallDelta) -> dict[str, Any]:
    if event.name is not None:
        function = {"name": event.name, "arguments": event.arguments}
        return {"tool_calls": [{"index": event.index, "id": event.call_id, "type": "function", "function": function}]}
    if event.arguments:
        return {"tool_calls": [{"index": event.index, "function": {"arguments": event.arguments}}]}
    return {}


def _old_logprobs(details: Sequence[Details]) -> dict[str, Any] | None:
    """The shape of OpenAI's older API."""
    entries = [one.logprob for one in details if one.logprob is not None]
    if not entries:
        return None
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries],
    }


def _total(answers: Sequence[Answer]) -> Effort:
    efforts = (astuple(answer.effort) for answer in answers)
    return Effort(*(sum(counts) for counts in zip(*efforts, strict=True)))


def model_entry(name: str, created: int) -> dict[str, Any]:
    """A model as GET /v1/models shows it; `created` in seconds since 1970."""
    return {"id": name, "object": "model", "created": created, "owned_by": "mope-bb"}
