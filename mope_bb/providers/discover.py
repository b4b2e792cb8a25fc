"""Which software answers at an address, and which models it serves: what `mope-bb init` writes down.

Each kind of server has a route of its own that tells. Nothing is generated, so nothing is paid.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import httpx

from mope_bb.errors import AuthenticationError, MopeError, ProviderConnectionError, ProviderTimeoutError
from mope_bb.failures import shown
from mope_bb.keys import Key
from mope_bb.providers.dialects import CHAT, COMPLETIONS, NATIVE
from mope_bb.transport import HttpClient

TIMEOUT_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Found:
    """What answers at one address."""

    base_url: str
    provider: str
    models: Sequence[str]
    parents: Mapping[str, str]
    """LoRA adapter -> the served model that it belongs to."""
    scores: bool = False
    """It serves a reward model: one that scores texts and writes none."""
    note: str = ""


async def discover(url: str, *, api_key: Key | None = None) -> Found:
    """Ask the server at `url`. Raises ProviderError where nobody answers, or nobody that is known."""
    if (hosted := _hosted(url)) is not None:
        return Found(url.rstrip("/"), hosted, (), {}, note="a hosted API: name the model yourself")
    root = url.rstrip("/").removesuffix("/v1")
    async with HttpClient(
        root, provider="init", expert=url, api_key=api_key, timeout_s=TIMEOUT_S, max_retries=0
    ) as client:
        looks: Sequence[Callable[[HttpClient, str], Awaitable[Found | None]]] = (
            _sglang,
            _llamacpp,
            _tgi,
            _ollama,
            _openai,
        )
        failure: MopeError | None = None
        for look in looks:
            try:
                found = await look(client, root)
            except (AuthenticationError, ProviderConnectionError, ProviderTimeoutError):
                raise
            except MopeError as error:
                failure = error
                continue
            if found is not None:
                return found
    raise failure or ProviderConnectionError(f"no known server answers at {url}")


def _hosted(url: str) -> str | None:
    host = httpx.URL(url).host
    for table in (CHAT, COMPLETIONS, NATIVE):
        for name, dialect in table.items():
            if dialect.base_url and httpx.URL(dialect.base_url).host == host:
                return name
    return "azure" if host.endswith(".openai.azure.com") else None


def _text(value: object) -> str:
    return value if isinstance(value, str) else shown(value)


async def _get(client: HttpClient, path: str) -> Any:
    data = await client.get_json(path)
    return data if isinstance(data, dict) else {}


async def _sglang(client: HttpClient, root: str) -> Found | None:
    info = await _get(client, "/model_info")
    if "tokenizer_path" not in info:
        return None
    models, parents = await _models(client)
    return Found(root, "sglang", models, parents, scores=info.get("is_generation") is False)


async def _llamacpp(client: HttpClient, root: str) -> Found | None:
    if "default_generation_settings" not in await _get(client, "/props"):
        return None
    models, parents = await _models(client)
    return Found(root, "llamacpp", models, parents)


async def _tgi(client: HttpClient, root: str) -> Found | None:
    info = await _get(client, "/info")
    if "model_id" not in info:
        return None
    kind = info.get("model_type")
    if isinstance(kind, dict):
        return Found(root, "tei", (_text(info["model_id"]),), {}, scores="classifier" in kind)
    return Found(root, "tgi", (_text(info["model_id"]),), {}, note="lists of at most 5: see `mope-bb doctor`")


async def _ollama(client: HttpClient, root: str) -> Found | None:
    tags = await _get(client, "/api/tags")
    if not isinstance(tags.get("models"), list):
        return None
    names = [_text(one.get("name")) for one in tags["models"] if isinstance(one, dict)]
    return Found(root, "ollama", names, {}, note="the end of an answer is hidden: llama.cpp serves such models better")


async def _openai(client: HttpClient, root: str) -> Found | None:
    data = await _get(client, "/v1/models")
    if not isinstance(data.get("data"), list):
        return None
    models, parents = _cards(data)
    if any(isinstance(card, dict) and card.get("owned_by") == "vllm" for card in data["data"]):
        return Found(f"{root}/v1", "vllm", models, parents, scores=await _only_pools(client))
    if any(isinstance(card, dict) and card.get("owned_by") == "mope-bb" for card in data["data"]):
        return Found(f"{root}/v1", "mope", models, parents, note="add extra_body = {preference = ...}")
    return Found(f"{root}/v1", "chat", models, parents, note="an OpenAI-compatible server of unknown kind")


async def _only_pools(client: HttpClient) -> bool:
    """Whether this vLLM was started with `--runner pooling`: then it has no route that writes text."""
    try:
        paths = (await _get(client, "/openapi.json")).get("paths")
    except MopeError:
        return False
    return isinstance(paths, dict) and "/classify" in paths and "/v1/completions" not in paths


async def _models(client: HttpClient) -> tuple[list[str], dict[str, str]]:
    return _cards(await _get(client, "/v1/models"))


def _cards(data: Mapping[str, Any]) -> tuple[list[str], dict[str, str]]:
    listed = data.get("data")
    cards = [
        card
        for card in (listed if isinstance(listed, list) else ())
        if isinstance(card, dict) and isinstance(card.get("id"), str)
    ]
    names = [card["id"] for card in cards]
    return names, {card["id"]: card["parent"] for card in cards if card.get("parent") in names}
