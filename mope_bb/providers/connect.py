"""From an expert's table in the configuration to a connection: address, key, deadlines."""

from __future__ import annotations

import asyncio
import ipaddress

import httpx

from mope_bb.chat_tokenizer import ChatTokenizer, load_chat_tokenizer
from mope_bb.config import ExpertConfig
from mope_bb.errors import AuthenticationError, ConfigError
from mope_bb.keys import Key
from mope_bb.transport import HttpClient


def required_url(config: ExpertConfig, default: str | None = None) -> str:
    """The address, of several the first, without a slash at its end. Raises ConfigError where there is none."""
    url = next(iter(config.addresses), default)
    if not url:
        raise ConfigError(f"expert {config.name!r}: `base_url` is missing", hint='Expected "http://host:port".')
    return url.rstrip("/")


def required_model(config: ExpertConfig) -> str:
    """The served name. Raises ConfigError where there is none."""
    if config.model is None:
        raise ConfigError(f"expert {config.name!r}: `model` is missing", hint="Name the model as the endpoint does.")
    return config.model


def read_key(config: ExpertConfig) -> Key | None:
    """The key in the variable that `api_key_env` names. Raises AuthenticationError where it is not set, or no key."""
    if config.api_key_env is None:
        return None
    what = f"the environment variable {config.api_key_env!r}"
    try:
        key = Key.of_variable(config.api_key_env)
    except ValueError as error:
        raise AuthenticationError(f"{what} holds no key: {error}", expert=config.name) from None
    if key is None:
        raise AuthenticationError(f"{what} is not set", expert=config.name)
    return key


def open_client(config: ExpertConfig, base_url: str, *, key_header: str | None = None) -> HttpClient:
    """A client for `base_url` with the expert's key and limits. Raises ConfigError or AuthenticationError."""
    return HttpClient(
        base_url,
        provider=config.provider,
        expert=config.name,
        api_key=read_key(config),
        key_header=key_header,
        timeout_s=config.timeout_s,
        attempt_timeout_s=config.attempt_timeout_s,
        max_retries=config.max_retries,
        max_in_flight=config.max_in_flight,
    )


async def load_served_tokenizer(path: str, *, expert: str) -> ChatTokenizer:
    """The tokenizer from where a server says that it has its own. Raises ConfigError."""
    try:
        return await asyncio.to_thread(load_chat_tokenizer, path)
    except ConfigError as error:
        raise ConfigError(
            f"expert {expert!r}: {error.message}",
            hint="The server names it as its own. Set `tokenizer` to where it is from here.",
        ) from None


def connection_warnings(config: ExpertConfig) -> list[str]:
    """What is unwise about how these addresses are reached: a key over plain HTTP, a secret in the address."""
    found = []
    for url in map(httpx.URL, config.addresses):
        if config.api_key_env and url.scheme == "http" and not _is_local(url.host):
            found.append(f"The key in {config.api_key_env} travels unencrypted: use https for {url.host}.")
        if url.userinfo or url.query:
            found.append(
                "`base_url` holds a user name or a query: name the variable with the key in `api_key_env` instead."
            )
        if url.path.rstrip("/").endswith("/completions"):
            found.append("`base_url` ends with a route: leave /completions or /chat/completions out.")
    return list(dict.fromkeys(found))


def _is_local(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or "." not in host
    return address.is_loopback or address.is_private
