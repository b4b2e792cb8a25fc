"""What can be wrong with a reply that is JSON: each fault changes a good reply in place, or gives another one.

A reply's lists are found by their names, so that one fault speaks every dialect. A list is a list of entries, or in
OpenAI's first shape a dictionary from token to logprob.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

Entries = list[Any] | dict[str, Any]
"""The K entries of one position."""
Damage = Callable[[Any, random.Random], Any]
"""From a good reply, which may be changed, to a bad one."""

LIST_NAMES: Final = frozenset(("top_logprobs", "output_top_logprobs", "input_top_logprobs", "top_tokens"))
LENGTH_NAMES: Final = ("n_probs", "logprobs", "top_logprobs", "top_logprobs_num", "top_n_tokens")
"""Where a request says how long a list shall be."""
PROMPT_LENGTH_NAMES: Final = frozenset(("tokens_evaluated", "prompt_tokens"))


def find_lists(data: Any) -> list[Entries]:
    """All lists of a reply, in its order."""
    if isinstance(data, list):
        return [found for one in data for found in find_lists(one)]
    if not isinstance(data, dict):
        return []
    found: list[Entries] = []
    for name, value in data.items():
        if name in LIST_NAMES and isinstance(value, list):
            is_one = all(isinstance(entry, dict) and "logprob" in entry for entry in value)
            found += [value] if is_one else [one for one in value if one]
        else:
            found += find_lists(value)
    return [one for one in found if one]


def is_batch(data: Any) -> bool:
    """Whether a reply answers several prompts and says which is which."""
    return len(replies_of(data)) > 1 and all("index" in one for one in replies_of(data))


def replies_of(data: Any) -> list[Any]:
    """The replies to several prompts, as the list that holds them; [] where there is none."""
    found = data.get("choices") if isinstance(data, dict) else data
    return found if isinstance(found, list) else []


def features_of(data: Any) -> frozenset[str]:
    """What a reply has that a fault may need: lists, entries of their own, two of them, ids with bytes, a batch."""
    lists = find_lists(data)
    names = ["lists"] if lists else []
    if lists and isinstance(lists[0], list):
        names.append("entries")
        if all(isinstance(entry, dict) and {"id", "bytes"} <= entry.keys() for entry in lists[0]):
            names.append("bytes")
    if lists and min(map(len, lists)) > 1:
        names.append("several")
    if is_batch(data):
        names.append("batch")
    if any(f'"{name}":' in json.dumps(data, separators=(",", ":")) for name in PROMPT_LENGTH_NAMES):
        names.append("lengths")
    return frozenset(names)


def ids_of(data: Any) -> frozenset[int]:
    """The ids on the lists of a reply that shows their bytes as well."""
    found = [entry for entries in find_lists(data) if isinstance(entries, list) for entry in entries]
    return frozenset(one["id"] for one in found if isinstance(one, dict) and {"id", "bytes"} <= one.keys())


def ask_for_more(body: Any, num_more: int) -> Any:
    """The same request for lists that are longer."""
    if not isinstance(body, dict):
        return body
    return {
        name: value + num_more if name in LENGTH_NAMES and type(value) is int else ask_for_more(value, num_more)
        for name, value in body.items()
    }


def set_logprob(entries: Entries, place: int, value: Any) -> None:
    """Write another number into one entry."""
    if isinstance(entries, dict):
        entries[list(entries)[place]] = value
    elif isinstance(entries[place], dict):
        entries[place]["logprob"] = value
    else:
        entries[place][0] = value


def logprob_of(entries: Entries, place: int) -> Any:
    """The number of one entry."""
    if isinstance(entries, dict):
        return list(entries.values())[place]
    return entries[place]["logprob"] if isinstance(entries[place], dict) else entries[place][0]


def remove(entries: Entries, place: int) -> None:
    """Take one entry out."""
    if isinstance(entries, dict):
        del entries[list(entries)[place]]
    else:
        del entries[place]


def fewer_entries(data: Any, rng: random.Random) -> Any:
    """Each list ends early, with one entry at least."""
    for entries in find_lists(data):
        for _ in range(len(entries) - rng.randint(1, len(entries) - 1)):
            remove(entries, len(entries) - 1)
    return data


def no_entries(data: Any, rng: random.Random) -> Any:
    """Lists without anything on them."""
    for entries in find_lists(data):
        entries.clear()
    return data


def missing_token(data: Any, rng: random.Random) -> Any:
    """One entry of each list is left out, any but the last."""
    for entries in find_lists(data):
        remove(entries, rng.randrange(len(entries) - 1))
    return data


def duplicate_token(data: Any, rng: random.Random) -> Any:
    """One entry of each list stands twice, in the place of another."""
    for entries in find_lists(data):
        assert isinstance(entries, list)
        place, other = rng.sample(range(len(entries)), 2)
        entries[other] = json.loads(json.dumps(entries[place]))
    return data


def one_number(*values: Any) -> Damage:
    """One number of each list is one of `values` instead."""

    def damage(data: Any, rng: random.Random) -> Any:
        for entries in find_lists(data):
            set_logprob(entries, rng.randrange(len(entries)), rng.choice(values))
        return data

    return damage


def all_numbers(*values: Any) -> Damage:
    """Every number of each list is one of `values` instead."""

    def damage(data: Any, rng: random.Random) -> Any:
        value = rng.choice(values)
        for entries in find_lists(data):
            for place in range(len(entries)):
                set_logprob(entries, place, value)
        return data

    return damage


def numbers_as_text(data: Any, rng: random.Random) -> Any:
    """Numbers in quotation marks."""
    for entries in find_lists(data):
        for place in range(len(entries)):
            set_logprob(entries, place, str(logprob_of(entries, place)))
    return data


def other_numbers(data: Any, rng: random.Random) -> Any:
    """A list that was never the model's: each token has the number of another one."""
    for entries in find_lists(data):
        values = [logprob_of(entries, place) for place in range(len(entries))]
        for place, value in enumerate(reversed(values)):
            set_logprob(entries, place, value)
    return data


def other_bytes(data: Any, rng: random.Random) -> Any:
    """The tokenizer is another one: the same ids stand for the bytes of other tokens."""
    for entries in find_lists(data):
        assert isinstance(entries, list)
        texts = [entry["bytes"] for entry in entries]
        for entry, text in zip(entries, [*texts[1:], texts[0]], strict=True):
            entry["bytes"] = text
    return data


def other_length(data: Any, rng: random.Random) -> Any:
    """It says that it read one token less than was sent, as servers do that cut a prompt."""
    if isinstance(data, list):
        return [other_length(one, rng) for one in data]
    if not isinstance(data, dict):
        return data
    return {
        name: value - 1 if name in PROMPT_LENGTH_NAMES and type(value) is int else other_length(value, rng)
        for name, value in data.items()
    }


def shuffled_batch(data: Any, rng: random.Random) -> Any:
    """The replies to several prompts in another order, each with its own index."""
    replies_of(data).reverse()
    return data


def missing_index(data: Any, rng: random.Random) -> Any:
    """One of several replies is not there."""
    replies = replies_of(data)
    del replies[rng.randrange(len(replies))]
    return data


def doubled_index(data: Any, rng: random.Random) -> Any:
    """Two replies have one index, and another index has none."""
    replies = replies_of(data)
    place, other = rng.sample(range(len(replies)), 2)
    replies[place]["index"] = replies[other]["index"]
    return data


def one_reply_more(data: Any, rng: random.Random) -> Any:
    """Another reply comes after all the others, with an index that was there before."""
    replies = replies_of(data)
    place, other = rng.sample(range(len(replies)), 2)
    replies.append({**replies[place], "index": replies[other]["index"]})
    return data


def no_lists(data: Any, rng: random.Random) -> Any:
    """No logprobs at all, as where nobody had asked for them."""
    names = {"completion_probabilities", "logprobs", "output_top_logprobs", "input_top_logprobs", "top_tokens"}
    if isinstance(data, list):
        return [no_lists(one, rng) for one in data]
    if not isinstance(data, dict):
        return data
    return {name: None if name in names else no_lists(value, rng) for name, value in data.items()}


def another_shape(data: Any, rng: random.Random) -> Any:
    """JSON, and nothing that was asked for."""
    return rng.choice([None, [], {}, 17, "ok", [[[]]], {"error": "busy"}, {"choices": []}, {"detail": [data]}])


DAMAGES: Final[Mapping[str, tuple[Damage, Sequence[str], str]]] = {
    "fewer entries": (fewer_entries, ("several",), "short"),
    "no entries": (no_entries, ("lists",), "short refused"),
    "missing token": (missing_token, ("several",), "right short"),
    "duplicate token": (duplicate_token, ("several", "entries"), "refused"),
    # JSON has neither of them, but Python writes them: not even JSON, so it is asked for again.
    "nan": (one_number(float("nan")), ("lists",), "retried"),
    "infinite": (one_number(float("inf"), float("-inf")), ("lists",), "retried"),
    "positive": (one_number(0.01, 0.5, 3.0, 1e300), ("lists",), "refused"),
    "sentinel": (one_number(-9999.0, -3.4028234663852886e38, None), ("several",), "right short"),
    "nothing but sentinels": (all_numbers(-9999.0, -3.4028234663852886e38, None), ("lists",), "refused"),
    "numbers as text": (numbers_as_text, ("lists",), "refused"),
    "no lists": (no_lists, ("lists",), "refused"),
    "other length": (other_length, ("lists", "lengths"), "right refused"),
    # Of an id that was never shown before nobody can tell that its bytes are others than before.
    "tokenizer changes": (other_bytes, ("several", "bytes", "shown"), "right refused"),
    "another shape": (another_shape, ("lists",), "refused"),
    "shuffled batch": (shuffled_batch, ("batch",), "right"),
    "missing index": (missing_index, ("batch",), "refused"),
    "doubled index": (doubled_index, ("batch",), "refused"),
    "one reply more": (one_reply_more, ("batch",), "refused"),
}
"""Name -> what it does, what a reply must have for it (`features_of`), and what may come of it (`faults.Outcome`)."""
