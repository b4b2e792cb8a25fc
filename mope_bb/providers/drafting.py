"""From what an endpoint wrote by itself to the steps of a draft, exact enough to draft and score with.

Two things would bias what is sampled with the help of a draft: a list that depends on which piece was drawn, and a q
that is not the distribution that this piece comes from. Both are settled here, on the entries as the wire had them,
before the end tokens are joined. Dimension letters: K entries of one position's list.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from mope_bb.providers.base import SENTINEL_LOGPROB, build_distribution
from mope_bb.providers.wire import Entry, Position, Reply, is_whole_text
from mope_bb.types import END, DraftStep, TokenDistribution


def build_steps(
    positions: Sequence[Position],
    *,
    num_asked: int,
    top_k: int,
    temperature: float,
    vocab_size: int | None,
    expert: str,
) -> tuple[DraftStep, ...]:
    """The steps of a draft, up to END and up to a piece that the wire does not tell.

    `num_asked` is how many entries each list was asked for, `temperature` the one of the draft. Raises what
    `build_distribution` raises.
    """
    steps = []
    for position in positions:
        entries = undrawn_entries(position, num_asked)
        distribution = build_distribution(
            entries, top_k=top_k, end_ids=(END.token_id,), vocab_size=vocab_size, expert=expert
        )
        steps.append(build_step(position, entries, distribution, temperature))
        if position.drawn is None or position.drawn == END:
            break
    return tuple(steps)


def undrawn_entries(position: Position, num_asked: int) -> list[Entry]:
    """The list as it would be whatever was drawn: without a drawn piece that only stands on it because it was drawn.

    Some endpoints add it as one entry more than was asked for; it is then the least probable one.
    """
    entries = list(position.entries)
    least = min((value for _, value in entries if value is not None), default=None)
    is_longer = len(entries) + position.num_unreadable > num_asked
    for place, entry in enumerate(entries):
        if is_longer and entry == (position.drawn, position.drawn_logprob) and entry[1] == least:
            del entries[place]
            break
    return entries


def build_step(
    position: Position, entries: Sequence[Entry], distribution: TokenDistribution, temperature: float
) -> DraftStep:
    """What was drawn at `position`; `distribution` was made of `entries`.

    A piece that the wire does not tell is stood for by the best one, with no place on the list.
    """
    index = _index_of_drawn(position, entries, distribution)
    if temperature == 0.0:
        log_q = tuple(0.0 if place == index else -math.inf for place in range(len(distribution.pieces)))
    else:
        log_q = _tempered(entries, distribution, temperature)
    return DraftStep(distribution, position.drawn or distribution.pieces[0], index, log_q)


def _index_of_drawn(position: Position, entries: Sequence[Entry], distribution: TokenDistribution) -> int | None:
    if position.drawn is None:
        return None
    key = position.drawn.key
    listed = [value for piece, value in entries if piece.key == key]
    # END may stand for several tokens, not all of them on the list: the logprob tells whether the drawn one is.
    if position.drawn == END and position.drawn_logprob not in listed:
        return None
    return next((place for place, piece in enumerate(distribution.pieces) if piece.key == key), None)


def _tempered(entries: Sequence[Entry], distribution: TokenDistribution, temperature: float) -> tuple[float, ...]:
    """log q (K): each token's p^(1/T), those of the end added up, normalised over the pieces on the list."""
    if temperature == 1.0:  # the end's tokens are added up already
        best = distribution.logprobs[0]  # which may be so small that its probability is 0
        log_total = best + math.log(math.fsum(math.exp(logprob - best) for logprob in distribution.logprobs))
        return tuple(logprob - log_total for logprob in distribution.logprobs)
    listed: dict[int | bytes, list[float]] = {piece.key: [] for piece in distribution.pieces}
    for piece, logprob in entries:
        if piece.key in listed and logprob is not None and logprob > SENTINEL_LOGPROB:
            listed[piece.key].append(min(logprob, 0.0) / temperature)
    best = max(max(powers) for powers in listed.values())
    masses = [math.fsum(math.exp(power - best) for power in powers) for powers in listed.values()]
    log_total = math.log(math.fsum(masses))
    return tuple(math.log(mass) - log_total if mass > 0.0 else -math.inf for mass in masses)


def certain_positions(reply: Reply, *, whole_characters: bool) -> list[Position]:
    """The positions of a reply that follow each other from the first one on, without a gap and each with a list.

    Endpoints that leave out what ends inside a character do not say where: so the drawn pieces must spell the text.
    `whole_characters`: see `build_from_reply`.
    """
    text = None if reply.text is None else reply.text.encode("utf-8", "surrogatepass")
    spelled = b""
    found: list[Position] = []
    for position in reply.positions:
        data = b"" if position.drawn is None else position.drawn.data
        spelled += data
        # A piece without text, as the end, could stand anywhere: after all text it is where it belongs.
        if text is not None and not (text.startswith(spelled) if data else position.drawn == END and text == spelled):
            break
        entries = whole_entries(position.entries) if whole_characters else position.entries
        if not entries:
            break
        num_unreadable = position.num_unreadable + len(position.entries) - len(entries)
        found.append(replace(position, entries=entries, num_unreadable=num_unreadable))
    return found


def whole_entries(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """Those that add whole characters, and the end: what an endpoint that takes text can continue."""
    return tuple(entry for entry in entries if entry[0] == END or is_whole_text(entry[0].data))
