"""Every error that mope-bb raises on purpose.

    MopeError
    +-- ConfigError(ValueError)            bad file, flag or name
    |   +-- PreferenceError                a preference that cannot be understood
    +-- ProviderError                      an expert's endpoint failed
    |   +-- ProviderConnectionError        no connection, or it broke              (retryable)
    |   +-- ProviderTimeoutError           no answer within the deadline           (retryable)
    |   +-- RateLimitError                 429                                     (retryable)
    |   +-- ServerError                    5xx                                     (retryable)
    |   +-- AuthenticationError            401, 403
    |   +-- RequestError                   the endpoint refused the request
    |   |   +-- ContextLengthError         prompt and answer exceed the context
    |   |   +-- TopKError                  a longer list than the endpoint gives
    |   |   +-- PrefillError               the endpoint does not continue a partial answer
    |   |   +-- ModelNotFoundError         no model of this name is served there
    |   +-- MalformedResponseError         a reply that is not what the protocol says
    |   |   +-- BrokenReplyError           not even JSON                           (retryable)
    |   +-- LogprobsUnavailableError       the endpoint answers, but without logprobs
    +-- BudgetError                        what may be spent is spent
    +-- AlignmentError(ValueError)         distributions that cannot be merged
    +-- ConstraintError                    an answer that cannot go on in the form that was asked for
    +-- PcmError(RuntimeError)             the Preference Control Model failed
    |   +-- CheckpointError                a PCM folder that cannot be loaded
    +-- RewardError(RuntimeError)          a reward model that cannot score
    +-- TrainingError(RuntimeError)        a run that cannot go on
        +-- AllRolloutsFailedError         no pair of a batch could be scored
        +-- StalledError                   no progress for too long

Messages name the thing, the value found and the value expected; `hint` says what to do. `retryable` is a fact of the
class, so that the retry layer asks the error and keeps no list of its own.
"""

from __future__ import annotations

from typing import ClassVar, Final

from mope_bb.keys import redacted

MAX_MESSAGE: Final = 1_000
"""Characters: messages quote what others wrote, which may be of any length."""


class MopeError(Exception):
    """Base of every error that mope-bb raises on purpose."""

    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1
    default_hint: ClassVar[str | None] = None

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = _readable(redacted(message))
        super().__init__(self.message)
        self.hint = self.default_hint if hint is None else _readable(redacted(hint))

    def __str__(self) -> str:
        return self.message

    @property
    def in_words(self) -> str:
        """The message and what to do, as sentences."""
        return f"{str(self).removesuffix('.')}." + (f" {self.hint}" if self.hint else "")


def _readable(text: str) -> str:
    """`text` cut off where it is very long, without what a terminal would obey instead of showing it."""
    if len(text) > MAX_MESSAGE:
        text = f"{text[:MAX_MESSAGE]} ..."
    return "".join(char if char.isprintable() or char == "\n" else "\ufffd" for char in text)


class ConfigError(MopeError, ValueError):
    """A configuration file, a flag or a name is wrong."""

    exit_code = 2


class PreferenceError(ConfigError):
    """A preference that cannot be understood or served."""

    default_hint = 'Write names ("concise,friendly"), weights ("concise=0.7,friendly=0.3"), a preset or a sentence.'


class ProviderError(MopeError):
    """An expert's endpoint failed; the attributes say which one and how."""

    exit_code = 3

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        provider: str | None = None,
        expert: str | None = None,
        status_code: int | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.provider = provider
        self.expert = expert
        self.status_code = status_code
        self.request_id = request_id
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"expert {self.expert!r}: {self.message}" if self.expert else self.message


class ProviderConnectionError(ProviderError):
    """The connection could not be made, or it broke before the whole reply had come."""

    retryable = True
    default_hint = "Is the server running at this address? Check `base_url`."


class ProviderTimeoutError(ProviderError):
    """No complete reply within the deadline."""

    retryable = True
    default_hint = "Is the server overloaded? Raise `timeout_s` for a slow one."


class RateLimitError(ProviderError):
    """The endpoint asked for fewer requests (429)."""

    retryable = True
    default_hint = "Ask less often, or raise the quota of this key."


class ServerError(ProviderError):
    """The endpoint failed (5xx)."""

    retryable = True
    default_hint = "Look at the server's own log."


class AuthenticationError(ProviderError):
    """The key is missing, wrong or not allowed to do this (401, 403)."""

    default_hint = "Set the environment variable that `api_key_env` names."


class RequestError(ProviderError):
    """The endpoint refused the request; sending it again would not help."""


class ContextLengthError(RequestError):
    """Prompt and answer do not fit into the model's context."""

    default_hint = "Shorten the conversation, or serve the model with a longer context."


class TopKError(RequestError):
    """The endpoint gives shorter lists than `top_k`."""

    default_hint = "Lower `top_k`, or raise the server's own limit."


class PrefillError(RequestError):
    """The endpoint does not continue a partial answer, so only the first token of an answer can be asked for."""

    default_hint = "Serve this model where an answer can be continued (vLLM, SGLang, llama.cpp), or use it as a judge."


class ModelNotFoundError(RequestError):
    """The endpoint serves no model of this name."""

    default_hint = "Set `model` to a name that GET /v1/models lists."


class MalformedResponseError(ProviderError):
    """The reply is not what the endpoint's protocol says."""

    default_hint = "Does `provider` name the software that serves this address?"


class BrokenReplyError(MalformedResponseError):
    """The reply is not even JSON: cut off or garbled on its way."""

    retryable = True


class LogprobsUnavailableError(ProviderError):
    """The endpoint answers, but gives no next-token logprobs, so it cannot be merged."""

    default_hint = "Serve this model with an engine that returns logprobs, such as llama.cpp, vLLM or SGLang."


class BudgetError(MopeError):
    """A limit in `[budget]` is reached: nothing more is asked."""

    default_hint = "What was made is kept. Raise the limit in [budget] to go on."


class AlignmentError(MopeError, ValueError):
    """Distributions that cannot be merged: empty, not finite, above 0, or of different tokenizers."""


class ConstraintError(MopeError):
    """The answer must have a form (a JSON schema, a tool call), and no expert says anything that fits it."""

    default_hint = "Raise `top_k`, or serve the experts where tokens can be asked for by name (vLLM) or lists are long."


class PcmError(MopeError, RuntimeError):
    """The Preference Control Model failed."""


class CheckpointError(PcmError):
    """A PCM folder that cannot be loaded."""

    exit_code = 2


class RewardError(MopeError, RuntimeError):
    """A reward model could not be loaded, or could not score an answer."""


class TrainingError(MopeError, RuntimeError):
    """A training run cannot begin or go on."""


class AllRolloutsFailedError(TrainingError):
    """Not one pair of a batch could be sampled and scored."""


class StalledError(TrainingError):
    """A run has made no progress for too long; the message names what it waits for."""

    default_hint = "What was finished is kept: when that works again, go on with --resume."
