"""Record the replies in tests/unit/bodies from llama.cpp's own server: see the README there.

MOPE_BB_HOME=/tmp/mope-home python tests/unit/record_bodies.py
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from mope_bb import zoo
from mope_bb.providers.endpoint import Ask
from mope_bb.providers.llamacpp_wire import FORCE_BIAS, build_own_request, build_request, build_score_request

BODIES = Path(__file__).parent / "bodies"
MESSAGES = [{"role": "user", "content": "Where does the key hang?"}]


def post(url: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Status and decoded body of one POST."""
    request = urllib.request.Request(
        url + path, data=json.dumps(body).encode(), headers={"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def tokenize(url: str, text: str, *, parse_special: bool = False) -> list[int]:
    """Ids of `text`."""
    _, data = post(url, "/tokenize", {"content": text, "add_special": False, "parse_special": parse_special})
    return [int(token) for token in data["tokens"]]


def record(name: str, *, sent: dict[str, Any], status: int, reply: Any, **facts: Any) -> None:
    """Write one request with its reply and what a test must know of it."""
    # Folders of this machine and the times of this run say nothing about the protocol.
    if isinstance(reply, dict):
        reply.pop("timings", None)
        if "model" in reply:
            reply["model"] = "concise"
    document = {"facts": facts, "sent": sent, "status": status, "reply": reply}
    (BODIES / f"{name}.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Ask one server of a nano zoo."""
    with zoo.serve(size="nano") as served:
        url = served.base_urls["concise"]
        _, rendered = post(url, "/apply-template", {"messages": MESSAGES})
        prompt = tokenize(url, rendered["prompt"], parse_special=True)
        forced, end_id = tokenize(url, "a")[-1], end_of(url)
        _, everything = post(url, "/completion", build_request([prompt], top_k=100_000, forced_id=forced))
        entries = everything["completion_probabilities"][0]["top_logprobs"]
        half = next(entry["id"] for entry in entries if is_half(bytes(entry["bytes"])))
        rank = 1 + next(i for i, entry in enumerate(entries) if entry["id"] == end_id)
        facts = {"num_ids": len(prompt), "forced_id": forced, "end_id": end_id, "half_id": half, "vocab": len(entries)}

        sent = build_request([prompt], top_k=20, forced_id=forced)
        status, reply = post(url, "/completion", sent)
        record("normal", sent=sent, status=status, reply=reply, **facts)

        # Without the cure: what is sampled is a token whose bytes are the beginning of a character.
        sent = {**build_request([prompt], top_k=20, forced_id=forced), "logit_bias": [[half, FORCE_BIAS]]}
        status, reply = post(url, "/completion", sent)
        record("half_character", sent=sent, status=status, reply=reply, **facts)

        # The end of the answer is the last entry of the list; it was not sampled.
        sent = build_request([prompt], top_k=rank, forced_id=forced)
        status, reply = post(url, "/completion", sent)
        record("with_end", sent=sent, status=status, reply=reply, **facts)

        # Without the cure: the end is what is sampled.
        sent = {**build_request([prompt], top_k=20, forced_id=forced), "logit_bias": [[end_id, FORCE_BIAS]]}
        status, reply = post(url, "/completion", sent)
        record("end_sampled", sent=sent, status=status, reply=reply, **facts)

        sent = build_own_request([prompt], Ask(3, num_tokens=8, temperature=1.0, seed=2))
        status, reply = post(url, "/completion", sent)
        record("draft", sent=sent, status=status, reply=reply, **facts)

        # A draft in which a token that ends inside a character has no list: the third one.
        seed = next(seed for seed in range(10_000) if lost_position(url, prompt, seed) == 2)
        sent = build_own_request([prompt], wild_ask(seed))
        status, reply = post(url, "/completion", sent)
        record("draft_half", sent=sent, status=status, reply=reply, **facts)

        drafted = load("draft")["reply"]["tokens"][:4]
        sent = build_score_request(prompt, [*drafted, forced], top_k=3)
        status, reply = post(url, "/completion", sent)
        record("scored", sent=sent, status=status, reply=reply, **facts)

        sent = build_request([[forced] * 5000], top_k=20, forced_id=forced)
        status, reply = post(url, "/completion", sent)
        record("context", sent={**sent, "prompt": "5000 ids"}, status=status, reply=reply, **facts)


def wild_ask(seed: int) -> Ask:
    """So hot that half characters are drawn."""
    return Ask(3, num_tokens=6, temperature=4.0, seed=seed)


def lost_position(url: str, prompt: list[int], seed: int) -> int | None:
    """The first position of a draft whose list the server leaves out."""
    _, reply = post(url, "/completion", build_own_request([prompt], wild_ask(seed)))
    listed = [position["id"] for position in reply.get("completion_probabilities", ())]
    if len(listed) == len(reply["tokens"]):
        return None
    return next((n for n, pair in enumerate(zip(listed, reply["tokens"], strict=False)) if pair[0] != pair[1]), None)


def load(name: str) -> Any:
    """A body that was recorded."""
    return json.loads((BODIES / f"{name}.json").read_text(encoding="utf-8"))


def is_half(data: bytes) -> bool:
    """Whether these bytes are the beginning of a character."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False


def end_of(url: str) -> int:
    """The id of the end token that the server names."""
    with urllib.request.urlopen(url + "/props", timeout=60) as response:
        name = json.load(response)["eos_token"]
    (found,) = tokenize(url, name, parse_special=True)
    return found


if __name__ == "__main__":
    main()
