"""What `mope-bb chat` writes into the log."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mope_bb.logs import ChatLog, build_entry, log_path, new_conversation, open_log

if TYPE_CHECKING:
    from mope_bb.config import Config
    from mope_bb.streams import AnswerStream
    from mope_bb.usage import Account


@dataclass
class Recorder:
    """Records the answers of one run of `chat`."""

    log: ChatLog | None
    """None: nothing is recorded."""
    model: str
    pcm: str | None
    account: Account
    conversation: str = field(default_factory=new_conversation)
    """That the next answers belong to."""

    @contextlib.contextmanager
    def recorded(
        self,
        stream: AnswerStream,
        messages: Sequence[Mapping[str, Any]],
        preference: str | None,
        options: Mapping[str, Any],
        *,
        is_alone: bool = True,
    ) -> Iterator[None]:
        """Record the answer that is drawn inside, however it ends; `is_alone`: what is paid meanwhile is its cost."""
        if self.log is None:
            yield
            return
        started_at, paid_before = datetime.now(UTC), self.account.total.cost
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:
            error = caught
            raise
        finally:
            knows_cost = is_alone and self.account.has_prices
            self.log.record(
                build_entry(
                    stream,
                    source="chat",
                    conversation=self.conversation,
                    started_at=started_at,
                    model=self.model,
                    messages=messages,
                    preference=preference,
                    options=options,
                    pcm=self.pcm,
                    error=error,
                    cost=self.account.total.cost - paid_before if knows_cost else None,
                )
            )


@contextlib.contextmanager
def recording(config: Config, config_path: str | None, account: Account, *, is_off: bool) -> Iterator[Recorder]:
    """The recorder of a run with `config`, read from `config_path` (None: the zoo's), into the log that it names."""
    log = None if is_off or not config.logs.enabled else open_log(log_path(config.logs.path))
    model = "zoo" if config_path is None else str(Path(config_path).absolute())
    try:
        yield Recorder(log, model, config.pcm.path, account)
    finally:
        if log is not None:
            log.close()
