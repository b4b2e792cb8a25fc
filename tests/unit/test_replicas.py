"""One expert at several addresses: who is asked, and who else where that fails."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import tenacity

from mope_bb import transport
from mope_bb.config import parse_config
from mope_bb.errors import (
    AlignmentError,
    ContextLengthError,
    MopeError,
    ProviderConnectionError,
    ProviderTimeoutError,
    RateLimitError,
    ServerError,
)
from mope_bb.providers.base import Capabilities, Expert
from mope_bb.providers.registry import open_expert
from mope_bb.providers.replicas import AVOIDED_S, SLACK, Balancer, ReplicatedExpert
from mope_bb.types import END, Context, Message, TokenDistribution
from mope_bb.zoo.serving import ZooServer
from tests.unit.test_limits import Clock


def test_conversations_are_shared_out_and_stay_where_they_are() -> None:
    """A new one goes to the replica with the least to do, of equals to the one asked least; its next question too."""
    balancer = Balancer(3)
    homes = []
    for conversation in range(6):
        replica = balancer.choose(conversation)
        with balancer.asking(replica):
            homes.append(replica)
    assert sorted(homes) == [0, 0, 1, 1, 2, 2]
    assert [balancer.choose(conversation) for conversation in range(6)] == homes


def test_a_busy_replica_is_left_only_where_another_has_clearly_less_to_do() -> None:
    """Up to some more questions than twice as many; when it is free again the conversation is back."""
    balancer = Balancer(2)
    home = balancer.choose(7)
    with ExitStack() as unanswered:
        for replica, count in ((1 - home, 3), (home, 2 * 3 + SLACK)):
            for _ in range(count):
                unanswered.enter_context(balancer.asking(replica))
        assert balancer.choose(7) == home
        with balancer.asking(home):
            assert balancer.choose(7) == 1 - home
        assert balancer.choose(7) == home


def test_a_replica_that_could_not_be_reached_is_avoided_for_a_while() -> None:
    """Its conversations move, unless there is no other; later it is asked again."""
    clock = Clock()
    balancer = Balancer(2, clock=clock)
    home = balancer.choose(7)
    with pytest.raises(ProviderConnectionError), balancer.asking(home):
        raise ProviderConnectionError("refused")
    assert balancer.choose(7) == 1 - home
    assert balancer.choose(7, tried=[1 - home]) == home
    with balancer.asking(1 - home):
        assert balancer.choose(8) == 1 - home
        clock.now += AVOIDED_S
        assert balancer.choose(9) == home


def test_other_failures_do_not_make_a_replica_avoided() -> None:
    """A 5xx tells of one question."""
    balancer = Balancer(2)
    home = balancer.choose(7)
    with pytest.raises(ServerError), balancer.asking(home):
        raise ServerError("busy")
    assert balancer.choose(7) == home
    assert balancer.choose(7, tried=[home]) == 1 - home


FOUND = TokenDistribution((END,), (0.0,), None)


class Replica(Expert):
    """Fails in the ways that it is given, then answers."""

    capabilities = Capabilities()

    def __init__(self, *failures: MopeError, tokenizer: str = "t") -> None:
        self.name = "short"
        self.failures = list(failures)
        self.tokenizer = tokenizer
        self.num_asked = 0

    async def next_tokens(self, context: Context, *, top_k: int) -> TokenDistribution:
        self.num_asked += 1
        if self.failures:
            raise self.failures.pop(0)
        return FOUND

    async def fingerprint(self) -> str:
        if self.failures:
            raise self.failures.pop(0)
        return self.tokenizer

    async def aclose(self) -> None:
        """Nothing to close."""


def ask(replicas: Sequence[Replica], **options: Any) -> list[int]:
    """Ask one question; how often each replica was asked. Raises what the expert raised."""
    expert = ReplicatedExpert(replicas, **{"timeout_s": 20.0, "max_retries": 4, **options})
    context = Context((Message("user", "hello"),))
    assert asyncio.run(expert.next_tokens(context, top_k=1)) is FOUND
    return [one.num_asked for one in replicas]


@pytest.mark.parametrize("kind", [ProviderConnectionError, ServerError, RateLimitError, ProviderTimeoutError])
def test_what_one_replica_fails_to_answer_the_next_one_is_asked_at_once(
    monkeypatch: pytest.MonkeyPatch, kind: type[MopeError]
) -> None:
    """Without a wait while there is one that was not tried; then with our backoff, among all."""
    waits: list[int] = []

    def backoff(state: tenacity.RetryCallState) -> float:
        waits.append(state.attempt_number)
        return 0.0

    monkeypatch.setattr(transport, "_backoff", backoff)
    assert ask([Replica(kind("no")), Replica()]) == [1, 1]
    assert waits == []
    assert sum(ask([Replica(kind("no")), Replica(kind("no"))])) == 3
    assert waits == [2]


def test_retries_end() -> None:
    """After so many more questions as are allowed, the last failure is raised."""
    replicas = [Replica(*(ProviderConnectionError(f"{name} {n}") for n in range(3))) for name in ("a", "b")]
    with pytest.raises(ProviderConnectionError):
        ask(replicas, max_retries=1)
    assert [one.num_asked for one in replicas] == [1, 1]


def test_what_would_fail_anywhere_is_asked_once() -> None:
    """A context that is too long is too long for all."""
    replicas = [Replica(ContextLengthError("too long")), Replica()]
    with pytest.raises(ContextLengthError):
        ask(replicas)
    assert [one.num_asked for one in replicas] == [1, 0]


def test_the_deadline_covers_all_replicas() -> None:
    """Waiting for a retry ends there, and the message tells why there was one."""
    replicas = [Replica(RateLimitError("slow down", retry_after_s=100.0)) for _ in range(2)]
    with pytest.raises(ProviderTimeoutError, match=r"within 0.2 s; the last failure was: slow down"):
        ask(replicas, timeout_s=0.2)


def test_replicas_have_one_tokenizer() -> None:
    """Different ones are refused; a replica that cannot be reached does not stand in the way."""

    def fingerprint(*replicas: Replica) -> str:
        return asyncio.run(ReplicatedExpert(replicas, timeout_s=1.0, max_retries=0).fingerprint())

    assert fingerprint(Replica(), Replica(ProviderConnectionError("refused"))) == "t"
    with pytest.raises(AlignmentError, match="different tokenizers"):
        fingerprint(Replica(), Replica(tokenizer="other"))
    with pytest.raises(ProviderConnectionError):
        fingerprint(Replica(ProviderConnectionError("refused")), Replica(ProviderConnectionError("refused")))
    with pytest.raises(ContextLengthError):
        fingerprint(Replica(), Replica(ContextLengthError("too long")))


def test_everything_of_an_expert_is_passed_on() -> None:
    """A method that is added to experts must not end at the wrapper, with the default of the base class."""
    public = {name for name in vars(Expert) if not name.startswith("_")}
    assert public <= vars(ReplicatedExpert).keys()


def test_a_dead_address_costs_nothing_but_a_try(nano_experts: ZooServer) -> None:
    """The real engine at one address, nobody at the other: all questions are answered, as without the dead one."""

    def distributions(base_url: Any) -> list[TokenDistribution]:
        table = {"name": "e", "provider": "llamacpp", "base_url": base_url, "model": "concise"}
        expert = open_expert(parse_config({"experts": [table]}).experts[0], None)

        async def run() -> list[TokenDistribution]:
            contexts = [Context((Message("user", f"What is {n}?"),)) for n in range(6)]
            try:
                assert await expert.fingerprint()
                return await asyncio.gather(*(expert.next_tokens(one, top_k=5) for one in contexts))
            finally:
                await expert.aclose()

        return asyncio.run(run())

    url = nano_experts.base_urls["concise"]
    for one, other in zip(distributions(url), distributions(["http://127.0.0.1:9", url]), strict=True):
        assert one.pieces == other.pieces
        assert one.logprobs == pytest.approx(other.logprobs, abs=0.02)
