"""`mope-bb chat`: one question, several preferences side by side, or a conversation."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from mope_bb.cli.spending import usage_shown
from mope_bb.errors import ConfigError, MopeError
from mope_bb.types import SamplingOptions

if TYPE_CHECKING:
    from mope_bb.cli.recording import Recorder
    from mope_bb.config import Config
    from mope_bb.session import Session
    from mope_bb.streams import AnswerStream
    from mope_bb.types import Answer, Token


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What holds for every answer of one run."""

    merge: str | None
    system: str | None
    sampling: dict[str, Any]
    as_json: bool


@click.command()
@click.option(
    "-p",
    "--pref",
    "preferences",
    multiple=True,
    metavar="PREF",
    help='Names ("concise,friendly"), weights ("concise=0.7,friendly=0.3"), a preset or a sentence. '
    "Several with --once stand side by side.",
)
@click.option("-c", "--config", "config_path", type=click.Path(), help="A mope.toml. Without it: the embedded zoo.")
@click.option("--pcm", "pcm_path", type=click.Path(), help="A trained PCM folder, instead of the configuration's.")
@click.option(
    "--merge",
    type=click.Choice(["linear", "geometric", "product"]),
    help="The merge rule; default the one that the PCM was trained for, else linear.",
)
@click.option(
    "--decoding",
    type=click.Choice(["auto", "lockstep", "lookahead", "draft"]),
    help="How far experts are asked ahead; the distribution is the same. Default: the configuration's, else auto.",
)
@click.option("--once", metavar="TEXT", help="Answer this and end. Standard input is read if it is piped.")
@click.option("--seed", type=int, help="Equal seeds draw equal answers; nothing is then drafted by an endpoint.")
@click.option("--temperature", type=float, default=1.0, show_default=True, help="0 takes the most probable piece.")
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--max-tokens", type=int, default=256, show_default=True)
@click.option("--system", metavar="TEXT", help="A system message.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per token.")
@click.option("--no-log", is_flag=True, help="Keep nothing of this for `mope-bb logs`.")
def chat(
    *,
    preferences: tuple[str, ...],
    config_path: str | None,
    pcm_path: str | None,
    merge: str | None,
    decoding: str | None,
    once: str | None,
    system: str | None,
    as_json: bool,
    no_log: bool,
    **sampling: Any,
) -> None:
    """Ask merged experts, once or in a conversation.

    Without --config the embedded zoo is used, built on first use and served by llama.cpp on this machine.
    """
    options = ChatOptions(merge, system, sampling, as_json)
    question = once if once is not None else read_piped_question()
    if question is not None and not question.strip():
        raise ConfigError("the prompt is empty", hint="Pass a question to --once, or pipe one in.")
    if len(preferences) > 1 and (question is None or as_json):
        raise ConfigError("several --pref stand side by side only with --once or piped input, and without --json")
    check_flags(sampling)
    with open_config(config_path) as config, asyncio.Runner() as runner:
        from mope_bb.cli.recording import recording
        from mope_bb.session import build_session

        chosen = changed(config, pcm_path, decoding)
        session = build_session(chosen)
        try:
            with (
                recording(chosen, config_path, session.account, is_off=no_log) as recorder,
                usage_shown(session.account, lambda: session.cache_hits),
            ):
                preference = preferences[0] if preferences else None
                if question is None:
                    from mope_bb.cli.interactive import Conversation

                    Conversation(runner, session, options, preference, recorder).run()
                elif len(preferences) > 1:
                    runner.run(compare(session, options, question, preferences, recorder))
                else:
                    runner.run(answer_once(session, options, question, preference, recorder))
        finally:
            runner.run(session.aclose())


def changed(config: Config, pcm_path: str | None, decoding: str | None) -> Config:
    """The configuration with another PCM, or another mode of decoding, where one is given."""
    pcm = config.pcm if pcm_path is None else config.pcm.model_copy(update={"path": pcm_path})
    mode = config.decoding if decoding is None else config.decoding.model_copy(update={"mode": decoding})
    return config.model_copy(update={"pcm": pcm, "decoding": mode})


def read_piped_question() -> str | None:
    """All of standard input; None if it is a terminal, where a conversation begins."""
    if sys.stdin is None or sys.stdin.isatty():
        return None if sys.stdin else ""
    try:
        return sys.stdin.buffer.read().decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input is not UTF-8: {error}", hint="Convert it, for example with iconv.") from None


def check_flags(sampling: Mapping[str, Any]) -> None:
    """Refuse wrong flags before a zoo is built or a server asked."""
    from mope_bb.pcm.sampling import check_sampling

    check_sampling(SamplingOptions(**sampling))


@contextlib.contextmanager
def open_config(path: str | None) -> Iterator[Config]:
    """The user's configuration, or the zoo's while it is being served."""
    if path is not None:
        from mope_bb.config import load_config

        yield load_config(path)
        return
    from mope_bb import zoo

    with zoo.serve() as server:
        yield server.config()


def with_system(options: ChatOptions, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The messages as they are sent."""
    system = [{"role": "system", "content": options.system}] if options.system else []
    return [*system, *messages]


def recorded(
    recorder: Recorder,
    stream: AnswerStream,
    options: ChatOptions,
    messages: list[dict[str, str]],
    preference: str | None,
    *,
    is_alone: bool = True,
) -> contextlib.AbstractContextManager[None]:
    """Record the answer that is drawn inside."""
    asked = with_system(options, messages)
    return recorder.recorded(stream, asked, preference, options.sampling, is_alone=is_alone)


def start(
    session: Session, options: ChatOptions, messages: list[dict[str, str]], preference: str | None
) -> AnswerStream:
    """Begin an answer with the options of this run."""
    conversation = with_system(options, messages)
    # Bytes of the command line that are no UTF-8 arrive as lone surrogates.
    for message in conversation:
        try:
            message["content"].encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"the {message['role']} message is not UTF-8", hint="Check the encoding of your terminal or script."
            ) from None
    return session.stream(conversation, preference=preference, merge=options.merge, **options.sampling)


async def answer_once(
    session: Session, options: ChatOptions, question: str, preference: str | None, recorder: Recorder
) -> None:
    """Stream one answer to standard output."""
    messages = [{"role": "user", "content": question}]
    stream = start(session, options, messages, preference)
    with recorded(recorder, stream, options, messages, preference):
        await print_stream(stream, as_json=options.as_json)
    if not options.as_json:
        click.echo(summary(stream.answer), err=True)


async def print_stream(stream: AnswerStream, *, as_json: bool) -> None:
    """Write the tokens as they come. What follows, an error too, begins on a new line."""
    try:
        async for token in stream:
            click.echo(json_line(token) if as_json else token.text, nl=as_json)
    finally:
        if not as_json and stream.text:
            click.echo()


async def compare(
    session: Session, options: ChatOptions, question: str, preferences: tuple[str, ...], recorder: Recorder
) -> None:
    """The answers for several preferences, drawn at the same time, side by side."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    messages = [{"role": "user", "content": question}]
    streams = [start(session, options, messages, text) for text in preferences]

    async def finish(stream: AnswerStream, preference: str) -> Answer:
        with recorded(recorder, stream, options, messages, preference, is_alone=False):
            async for _ in stream:
                pass
        return stream.answer

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(finish(*each)) for each in zip(streams, preferences, strict=True)]
    except BaseExceptionGroup as error:
        ours = [inner for inner in error.exceptions if isinstance(inner, MopeError)]
        raise (ours or error.exceptions)[0] from None
    # What a user or a model wrote is data, hence `Text`: no markup is read in it.
    table = Table(title=Text(question), expand=True)
    for preference in preferences:
        table.add_column(Text(preference.replace(",", ", ")), ratio=1)
    answers = [task.result() for task in tasks]
    table.add_row(*(Text(answer.text) for answer in answers))
    table.add_row(*(Text(summary(answer), style="dim") for answer in answers))
    Console().print(table)


def json_line(token: Token) -> str:
    """One token as a line of JSON."""
    return json.dumps(
        {
            "text": token.text,
            "token_id": token.step.piece.token_id,
            "bytes": list(token.step.piece.data),
            "logprob": None if math.isnan(token.step.logprob) else token.step.logprob,
            "weights": token.weights,
            "expert_logprobs": token.expert_logprobs,
            "missed_mass": token.missed_mass,
            "floor_mass": token.step.floor_mass,
            "drawn_by": token.step.drawn_by,
            "finish_reason": token.finish_reason,
        },
        ensure_ascii=False,
    )


def summary(answer: Answer, *, is_stopped: bool = False) -> str:
    """One line about an answer: its length, what the lists could not show, how to get it again."""
    parts = [f"{len(answer.steps)} tokens", answer.merge]
    if answer.missed_mass_mean is not None and answer.missed_mass_max is not None:
        parts.append(f"missed mass mean {answer.missed_mass_mean:.3f} max {answer.missed_mass_max:.3f}")
    elif answer.steps:
        floor = sum(step.floor_mass for step in answer.steps) / len(answer.steps)
        parts.append(f"mass on unlisted values {floor:.3f}")
    if answer.steps and answer.effort.num_round_trips:
        waits, drawn = (
            count / len(answer.steps) for count in (answer.effort.num_round_trips, answer.effort.num_generated)
        )
        parts.append(f"{waits:.2f} round trips and {drawn:.1f} generated a token")
    if drawn_by := sorted({step.drawn_by for step in answer.steps if step.drawn_by is not None}):
        parts.append(f"experts drawn one at a time, without logprobs ({', '.join(drawn_by)})")
    if answer.dropped:
        parts.append(f"without {', '.join(answer.dropped)}, whose endpoint failed")
    if is_stopped:
        parts.append("stopped")
    elif answer.finish_reason == "length":
        parts.append("cut at the length limit")
    return " · ".join([*parts, *([] if answer.seed is None else [f"seed {answer.seed}"])])
