"""Conversations as the text that a reward model reads, where its server does not apply the chat template."""

from __future__ import annotations

from typing import Any

from mope_bb.chat_tokenizer import ChatTokenizer, as_openai
from mope_bb.errors import ConfigError, RequestError, RewardError
from mope_bb.rewards.base import Conversation


class ChatRenderer:
    """The chat template of a reward model, and the control tokens that no message may spell out."""

    def __init__(self, tokenizer: Any, *, source: str) -> None:
        """`tokenizer` is the transformers tokenizer of `source`. Raises ConfigError without a chat template."""
        self._tokenizer = tokenizer
        self._controls = ChatTokenizer(tokenizer, source=source)
        self._source = source

    def check(self, conversation: Conversation) -> None:
        """Raise RewardError for a message that holds a control token: it could rewrite the conversation."""
        try:
            token = self._controls.control_token_in_chat(conversation, is_answered=True)
        except RequestError as error:
            raise RewardError(error.message) from None
        if token is not None:
            raise RewardError(f"a message holds {token!r}, one of the model's control tokens")

    def render(self, conversation: Conversation) -> str:
        """The whole conversation, ready for a server that tokenizes it. Raises RewardError, also as `check` does."""
        self.check(conversation)
        try:
            text: str = self._tokenizer.apply_chat_template(
                [as_openai(message) for message in conversation], tokenize=False, add_generation_prompt=False
            )
        except Exception as error:  # noqa: BLE001  # templates raise what they like, such as "no system role"
            raise RewardError(f"the chat template of {self._source!r} refuses this conversation: {error}") from None
        return self._without_second_start(text)

    def _without_second_start(self, text: str) -> str:
        """`text` without the start token of the template, where the server's tokenizer will put one there itself."""
        start = self._tokenizer.bos_token
        if not start or not text.startswith(start):
            return text
        ids = self._tokenizer.encode(text, add_special_tokens=True, verbose=False)
        return text.removeprefix(start) if ids[:2] == [self._tokenizer.bos_token_id] * 2 else text


def open_renderer(path: str) -> ChatRenderer:
    """Load the tokenizer folder or hub name `path`. Raises ConfigError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  # transformers raises whatever its parsers raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"the tokenizer {path!r} cannot be loaded: {reason}") from None
    return ChatRenderer(tokenizer, source=path)
