"""Mixture of Preference Experts for black-box language models (MoPE, arXiv 2407.04181).

Importing this package is quick: what needs torch is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mope_bb.errors import (
    AlignmentError,
    AuthenticationError,
    CheckpointError,
    ConfigError,
    ConstraintError,
    ContextLengthError,
    LogprobsUnavailableError,
    MalformedResponseError,
    MopeError,
    PcmError,
    PreferenceError,
    ProviderConnectionError,
    ProviderError,
    ProviderTimeoutError,
    RateLimitError,
    RequestError,
    ServerError,
)
from mope_bb.preferences import Preference

if TYPE_CHECKING:
    from mope_bb.config import Config, load_config
    from mope_bb.events import Finished, TextDelta, ToolCallDelta
    from mope_bb.session import Session, SyncSession, open_session, open_session_sync
    from mope_bb.streams import AnswerStream
    from mope_bb.types import Answer, Message, Token, ToolCall

__version__ = "0.1.0"

_LAZY = {
    "Answer": "mope_bb.types",
    "AnswerStream": "mope_bb.streams",
    "Config": "mope_bb.config",
    "Finished": "mope_bb.events",
    "Message": "mope_bb.types",
    "Session": "mope_bb.session",
    "SyncSession": "mope_bb.session",
    "TextDelta": "mope_bb.events",
    "Token": "mope_bb.types",
    "ToolCall": "mope_bb.types",
    "ToolCallDelta": "mope_bb.events",
    "load_config": "mope_bb.config",
    "open_session": "mope_bb.session",
    "open_session_sync": "mope_bb.session",
}

__all__ = [
    "AlignmentError",
    "Answer",
    "AnswerStream",
    "AuthenticationError",
    "CheckpointError",
    "Config",
    "ConfigError",
    "ConstraintError",
    "ContextLengthError",
    "Finished",
    "LogprobsUnavailableError",
    "MalformedResponseError",
    "Message",
    "MopeError",
    "PcmError",
    "Preference",
    "PreferenceError",
    "ProviderConnectionError",
    "ProviderError",
    "ProviderTimeoutError",
    "RateLimitError",
    "RequestError",
    "ServerError",
    "Session",
    "SyncSession",
    "TextDelta",
    "Token",
    "ToolCall",
    "ToolCallDelta",
    "__version__",
    "load_config",
    "open_session",
    "open_session_sync",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'mope_bb' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
