"""`mope-bb init`: a commented mope.toml from the endpoints at some addresses."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from mope_bb.errors import AuthenticationError, ConfigError, MopeError, ProviderConnectionError
from mope_bb.keys import Key

if TYPE_CHECKING:
    from mope_bb.providers.discover import Found

STYLES: Final = {
    "concise": "Generate a response that is concise and to the point, without being verbose.",
    "informative": "Generate a response that is very informative, without missing any background information.",
    "friendly": "Generate a response that is friendly, witty, funny, and humorous, like a close friend.",
}
"""System prompts that make three experts of one model, where no more is served: P-SOUPS's P2A, P2B and P3A."""
HEAD: Final = """\
# Written by `mope-bb init`. Look it through, then ask the endpoints themselves: mope-bb doctor -c {name}
#
# Each expert is a model that is good at one dimension of style. `name` and `dimension` are the served names: call a
# dimension what your users would call it. All experts must share one tokenizer.
"""
TAIL: Final = """
# Who scores answers in a dimension; only training and evaluation need it. One table for each dimension:
# [dimensions.NAME]
# text = "Generate a response that is ..."                      # how the PCM, and a judge, read this dimension
# reward = {{ kind = "classifier", path = "FOLDER or hub name" }} # one label, in this process
# reward = {{ kind = "remote", provider = "vllm", base_url = "http://...", model = "NAME" }}
# reward = {{ kind = "judge", base_url = "https://...", model = "NAME", api_key_env = "VARIABLE" }}

# [pcm]
# backbone = "FOLDER or hub name"  # a small causal model on which `mope-bb train` builds the PCM
# path = "FOLDER"                  # a trained PCM; without it the user's own weights act

# [presets.executive]
# {first} = 1.0
"""


@click.command()
@click.argument("urls", nargs=-1, required=True, metavar="URL...")
@click.option("-o", "--output", type=click.Path(), default="mope.toml", show_default=True, help="Where to write.")
@click.option("--api-key-env", metavar="NAME", help="The environment variable with the key of these endpoints.")
@click.option("--force", is_flag=True, help="Replace a file that is there.")
def init(urls: tuple[str, ...], output: str, api_key_env: str | None, force: bool) -> None:
    """Write a mope.toml from the endpoints at URL...

    Says which software answers at each address and lists what it serves; asks for no token, so it costs nothing. A
    single model becomes three experts with a system prompt each.
    """
    path = Path(output)
    if path.exists() and not force:
        raise ConfigError(f"{output!r} is there already", hint="Name another with --output, or replace it: --force.")
    key = None
    if api_key_env is not None:
        try:
            key = Key.of_variable(api_key_env)
        except ValueError as reason:
            raise AuthenticationError(f"the environment variable {api_key_env!r} holds no key: {reason}") from None
        if key is None:
            raise AuthenticationError(f"the environment variable {api_key_env!r} is not set")
    found, failures = asyncio.run(look(urls, key))
    for url, error in failures:
        click.echo(f"{url}: {error}", err=True)
    if not found:
        raise ProviderConnectionError(
            f"no server was found at {', '.join(urls)}", hint="Are they running, and is the address right?"
        )
    for one in found:
        kind = "reward models" if one.scores else "models"
        click.echo(f"{one.base_url}: {one.provider}, {kind} {', '.join(one.models) or '(not listed)'}", err=True)
    text = build_toml(found, file_name=path.name, api_key_env=api_key_env)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{output!r} cannot be written: {error}") from None
    click.echo(f"wrote {output}\nnext: mope-bb doctor -c {output}")


async def look(urls: Sequence[str], api_key: Key | None) -> tuple[list[Found], list[tuple[str, MopeError]]]:
    """What answers at each address, and where nothing known does."""
    from mope_bb.providers.discover import discover

    found, failures = [], []
    for url in urls:
        try:
            found.append(await discover(url, api_key=api_key))
        except MopeError as error:
            failures.append((url, error))
    return found, failures


def build_toml(found: Sequence[Found], *, file_name: str, api_key_env: str | None) -> str:
    """The text of a mope.toml: an expert for each served model, a reward for each model that scores."""
    writers = [one for one in found if not one.scores]
    served = [(one, model) for one in writers for model in one.models or ("NAME",)]
    parts = [HEAD.format(name=file_name)]
    names: list[str] = []
    if len(served) == 1:
        one, model = served[0]
        for style, system in STYLES.items():
            parts.append(_expert(one, model, style, api_key_env, system=system))
            names.append(style)
    else:
        for one, model in served:
            name = _unique(model, names)
            is_base = model in one.parents.values() or name == "base"
            parts.append(_expert(one, model, name, api_key_env, is_base=is_base))
            names.append(name)
    for one in (one for one in found if one.scores):
        provider = "tei" if one.provider == "tei" else one.provider
        for model in one.models:
            name = _unique(model.removeprefix("rm-"), [])
            reward = (
                f'kind = "remote", provider = "{provider}", base_url = {_text(one.base_url)}, model = {_text(model)}'
            )
            # SGLang and TEI score a text as it is: the chat template is then ours to apply.
            needs = "" if provider == "vllm" else ', tokenizer = "FOLDER or hub name"'
            parts.append(f"[dimensions.{_text(name)}]\nreward = {{ {reward}{needs} }}\n")
    first = next((name for name in names if name != "base"), "concise")
    return "\n".join(parts) + TAIL.format(first=_text(first))


def _expert(
    one: Found, model: str, name: str, api_key_env: str | None, *, is_base: bool = False, system: str | None = None
) -> str:
    lines = ["[[experts]]", f"name = {_text(name)}"]
    if is_base:
        lines.append("base = true  # what the product rule measures the others against; asked by it only")
    else:
        lines.append(f"dimension = {_text(name)}")
    note = f"  # {one.note}" if one.note else ""
    lines += [f'provider = "{one.provider}"{note}', f"base_url = {_text(one.base_url)}", f"model = {_text(model)}"]
    if system:
        lines.append(f"system = {_text(system)}")
    key = f"api_key_env = {_text(api_key_env)}" if api_key_env else '# api_key_env = "VARIABLE"'
    lines += [
        f"{key}  # the name of the variable with the key, never the key",
        '# tokenizer = "FOLDER or hub name"  # where the endpoint does not tell it',
        "# top_k = 20  # pieces of each distribution; more see more, and take longer",
    ]
    return "\n".join(lines) + "\n"


def _unique(model: str, taken: Sequence[str]) -> str:
    """A name for an expert from a served name."""
    name = re.sub(r"[^\w.:-]+", "-", model.rstrip("/").rsplit("/", 1)[-1]).strip("-") or "expert"
    number = 2
    chosen = name
    while chosen in taken:
        chosen, number = f"{name}-{number}", number + 1
    return chosen


def _text(value: str) -> str:
    # A JSON string is a TOML one.
    return json.dumps(value, ensure_ascii=False)
