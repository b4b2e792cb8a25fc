"""What clients may send: OpenAI's bodies and our extensions, checked.

Fields that change nothing here are ignored. One that would change what is said, and that is not supported, is refused:
an answer from another distribution than the one asked for is worse than none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mope_bb.config import ServerConfig
from mope_bb.server.failures import RefusalError, malformed

MODEL: Final = "mope"
MAX_TOP: Final = 256
"""Of `top_logprobs`. OpenAI's own limit is 20; a mixture of mixtures wants all that the inner one knows."""
_CONVERSATION: Final = re.compile(r"[\w.-]{1,64}")
Trace = Literal["weights", "experts"]
PreferenceBody = str | dict[str, float]


class Body(BaseModel):
    """A JSON object; what it does not know it ignores."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class CalledFunction(Body):
    """The function of a past call."""

    name: str
    arguments: str
    """A JSON object as text."""


class PastCall(Body):
    """A tool call in a past message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    tool_calls: Annotated[list[PastCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None


class StreamOptions(Body):
    """How a stream is sent."""

    include_usage: bool | None = None


class Sampling(Body):
    """What chat and text requests share."""

    model: Annotated[
        str,
        # Only described, not checked: another name is 404, as it is at OpenAI.
        Field(description="`mope`, or `mope:PREFERENCE`.", json_schema_extra={"pattern": "^mope(:.+)?$"}),
    ]
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16, fail_fast=True)]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    preference: Annotated[
        PreferenceBody | None,
        Field(description="Names, weights, a preset or a sentence; or an object of weights by name."),
    ] = None
    merge: Annotated[str | None, Field(description="The merge rule: linear, geometric or product.")] = None
    trace: Annotated[Trace | None, Field(description="What each token tells of the experts.")] = None
    metadata: Annotated[
        dict[str, Any] | None,
        Field(description="`conversation`, a short name, groups the turns of one conversation in the log."),
    ] = None

    @property
    def conversation_name(self) -> str | None:
        """Under which the log groups this request with others."""
        name = (self.metadata or {}).get("conversation")
        return name if isinstance(name, str) and _CONVERSATION.fullmatch(name) else None

    @property
    def length(self) -> int | None:
        """The longest answer that is asked for, in tokens."""
        return self.max_tokens

    @property
    def asked_preference(self) -> PreferenceBody | None:
        """The preference, from its field or from the model's name. Raises RefusalError."""
        preference = preference_in(self.model)
        if preference is None:
            return self.preference
        if self.preference is not None:
            raise RefusalError(
                400,
                "two_preferences",
                "the model's name and `preference` both say what to prefer",
                hint="Leave one of them out.",
                param="preference",
            )
        return preference


def preference_in(model: str) -> str | None:
    """What stands behind the colon of a model's name. Raises RefusalError for what is no model here."""
    name, colon, preference = model.partition(":")
    if name != MODEL or (colon and not preference):
        raise RefusalError(
            404,
            "model_not_found",
            f"there is no model {model!r}",
            hint="The models are 'mope' and 'mope:PREFERENCE'; GET /v1/models lists the presets.",
            param="model",
        )
    return preference if colon else None


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: Annotated[
        bool | None, Field(description="Whether an answer may hold several calls; not, where this is not given.")
    ] = None
    response_format: dict[str, Any] | None = None
    continue_final_message: Annotated[
        bool | None, Field(description="The last message, of the assistant, is the beginning of the answer.")
    ] = None

    @property
    def length(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def top(self) -> int | None:
        """How many other pieces are told beside each one; None = no logprobs. Raises RefusalError."""
        if not self.logprobs:
            if self.top_logprobs:
                raise RefusalError(
                    400,
                    "invalid_value",
                    "`top_logprobs` is given without `logprobs`",
                    hint="Set logprobs to true.",
                    param="top_logprobs",
                )
            return None
        return self.top_logprobs or 0

    def conversation(self) -> tuple[list[dict[str, Any]], str]:
        """The messages, and how the answer begins. Raises RefusalError."""
        messages = [message.model_dump(exclude_none=True) for message in self.messages]
        if not self.continue_final_message:
            return messages, ""
        last = self.messages[-1]
        if last.role != "assistant" or last.tool_calls or not last.content:
            raise RefusalError(
                400,
                "invalid_value",
                "`continue_final_message` needs a last message of the assistant, with text",
                param="continue_final_message",
            )
        content = last.content
        return messages[:-1], content if isinstance(content, str) else "".join(part.text for part in content)


class TextRequest(Sampling):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1, fail_fast=True)]
    logprobs: Annotated[int, Field(ge=0)] | None = None

    @property
    def top(self) -> int | None:
        """As of `ChatRequest`."""
        return self.logprobs

    @property
    def prompts(self) -> list[str]:
        """One or more."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class SteerRequest(Body):
    """POST /v1/chat/completions/{id}/preference."""

    preference: PreferenceBody
    index: Annotated[int, Field(ge=0, description="Which choice.")] = 0


_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "repeat_penalty": (1,),
    "logit_bias": ({},),
    "top_k": (0, -1),
    "min_p": (0,),
    "typical_p": (1,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "modalities": (["text"],),
    "audio": (),
    "functions": ([],),
    "function_call": ("none",),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "grammar": ("",),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
}
"""Parameters that would change what is said -> the values with which they do not; null is always one."""
_INSTEAD: Final[Mapping[str, str]] = {
    "functions": "Use `tools`.",
    "function_call": "Use `tool_choice`.",
    "guided_json": "Use `response_format`.",
    "structured_outputs": "Use `response_format`.",
    "verbosity": "Use `preference`.",
}


B = TypeVar("B", bound=Body)


def parse_body(kind: type[B], data: Any) -> B:
    """`data` as a body of this kind. Raises RefusalError."""
    if isinstance(data, dict):
        for name, neutral in _NEUTRAL.items():
            value = data.get(name)
            if value is not None and value not in neutral:
                raise RefusalError(
                    400,
                    "unsupported_parameter",
                    f"`{name}` is not supported here, and would change the answer",
                    hint=_INSTEAD.get(name, "Leave it out."),
                    param=name,
                )
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise malformed(error) from None


def check_limits(request: ChatRequest | TextRequest, limits: ServerConfig, *, num_prompts: int = 1) -> None:
    """Raise RefusalError for more than this server gives."""
    asked = (
        ("max_tokens", request.length or 0, limits.max_tokens),
        ("n", request.n or 1, limits.max_n),
        ("prompt", num_prompts * (request.n or 1), limits.max_open_answers),
        ("top_logprobs", request.top or 0, MAX_TOP),
        ("messages", len(request.messages) if isinstance(request, ChatRequest) else 0, limits.max_messages),
    )
    for param, found, most in asked:
        if found > most:
            raise RefusalError(
                400,
                "limit_exceeded",
                f"`{param}` is {found}, at most {most} is allowed here",
                hint="Ask for less. The [server] table of the server's mope.toml has the limits.",
                param=param,
            )
