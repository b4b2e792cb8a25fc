"""`mope-bb serve`: merged experts behind an OpenAI-compatible endpoint, with a page to talk to them."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mope_bb.cli.chat import changed, open_config
from mope_bb.errors import ConfigError
from mope_bb.keys import Key

if TYPE_CHECKING:
    import socket

    from mope_bb.config import Config, ServerConfig
    from mope_bb.server.run import RunFolder


@click.command()
@click.option("-c", "--config", "config_path", type=click.Path(), help="A mope.toml. Without it: the embedded zoo.")
@click.option("--pcm", "pcm_path", type=click.Path(), help="A trained PCM folder, instead of the configuration's.")
@click.option(
    "--decoding",
    type=click.Choice(["auto", "lockstep", "lookahead", "draft"]),
    help="How far experts are asked ahead; the distribution is the same. Default: the configuration's, else auto.",
)
@click.option("--host", help="An address of this machine; beyond loopback a key is needed. Default: 127.0.0.1.")
@click.option("--port", type=click.IntRange(0, 65535), help="0 takes a free one. Default: 8000.")
@click.option("--api-key-env", metavar="NAME", help="The environment variable that holds the key for clients.")
@click.option("--run", "run_path", type=click.Path(), help="Show this training run, and its report, on the page.")
@click.option("--no-log", is_flag=True, help="Keep no record of the chats.")
def serve(
    *,
    config_path: str | None,
    pcm_path: str | None,
    decoding: str | None,
    host: str | None,
    port: int | None,
    api_key_env: str | None,
    run_path: str | None,
    no_log: bool,
) -> None:
    """Serve merged experts as one OpenAI-compatible model, with a page to talk to them.

    Without --config the embedded zoo is used, built on first use and served by llama.cpp on this machine.
    """
    from mope_bb.config import ServerConfig, load_config

    try:
        from mope_bb.server.listening import bind
        from mope_bb.server.run import RunFolder
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"serving needs {error.name!r}", hint='Install the server: pip install "mope-bb[server]".'
        ) from None
    settings = load_config(config_path).server if config_path is not None else ServerConfig()
    given = {"host": host, "port": port, "api_key_env": api_key_env}
    settings = settings.model_copy(update={name: value for name, value in given.items() if value is not None})
    key = read_server_key(settings)
    run = None if run_path is None else RunFolder(Path(run_path))
    if run is not None:
        run.check()
    with bind(settings.host, settings.port) as listener, open_config(config_path) as opened:
        logs = opened.logs.model_copy(update={"enabled": opened.logs.enabled and not no_log})
        config = changed(opened, pcm_path, decoding).model_copy(update={"server": settings, "logs": logs})
        asyncio.run(run_server(config, listener, key, run))


def read_server_key(settings: ServerConfig) -> Key | None:
    """The key that clients must send. Raises ConfigError where one is needed and there is none."""
    from mope_bb.server.guard import is_loopback

    name = settings.api_key_env
    try:
        key = None if name is None else Key.of_variable(name)
    except ValueError as error:
        raise ConfigError(f"the environment variable {name!r} holds no key: {error}") from None
    if name is not None and key is None:
        raise ConfigError(f"the environment variable {name!r} is not set", hint="Put the key for clients there.")
    if key is None and not is_loopback(settings.host):
        raise ConfigError(
            f"others can reach {settings.host!r}, and there is no key",
            hint="Put a key into an environment variable and give its name to --api-key-env.",
        )
    return key


async def run_server(config: Config, listener: socket.socket, key: Key | None, run: RunFolder | None) -> None:
    """Open the session and serve it until a signal comes."""
    from mope_bb.logs import log_path, open_log
    from mope_bb.server.app import Surroundings, build_app
    from mope_bb.server.listening import address_of, listen
    from mope_bb.session import open_session

    log = open_log(log_path(config.logs.path)) if config.logs.enabled else None
    try:
        async with open_session(config) as session:
            app, open_answers = build_app(session, Surroundings(config.server, key, run, log), host=config.server.host)
            # What is here now stays. Full garbage collections would look through it again and again, a tenth of a
            # second and more each time, in which no open answer gets a token.
            gc.collect()
            gc.freeze()
            await listen(
                app,
                listener,
                open_answers,
                shutdown_timeout_s=config.server.shutdown_timeout_s,
                on_ready=lambda _: tell_ready(address_of(listener), config.server.api_key_env),
            )
    finally:
        if log is not None:
            log.close()


def tell_ready(address: str, key_name: str | None) -> None:
    """Where it is, and how to ask."""
    header = f' -H "Authorization: Bearer ${key_name}"' if key_name else ""
    body = '{"model": "mope:concise,friendly", "messages": [{"role": "user", "content": "How do I fix a bike?"}]}'
    click.echo(f"Page: {address}/")
    click.echo(f"Endpoint: {address}/v1")
    click.echo(f"Try: curl {address}/v1/chat/completions{header} -H 'Content-Type: application/json' -d '{body}'")
