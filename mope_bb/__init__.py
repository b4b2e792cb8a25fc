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
    from mope_bb.session import Session, SyncSession, open_session, open_session_sync
    from mope_bb.types import Answer, Message, Token

__version__ = "0.1.0"

_LAZY = {
    "Answer": "mope_bb.types",
    "Config": "mope_bb.config",
    "Message": "mope_bb.types",
    "Session": "mope_bb.session",
    "SyncSession": "mope_bb.session",
    "Token": "mope_bb.types",
    "load_config": "mope_bb.config",
    "open_session": "mope_bb.session",
    "open_session_sync": "mope_bb.session",
}

__all__ = [
    "AlignmentError",
    "Answer",
    "AuthenticationError",
    "CheckpointError",
    "Config",
    "ConfigError",
    "ContextLengthError",
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
    "Token",
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
