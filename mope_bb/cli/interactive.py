"""The conversation of `mope-bb chat`: history, commands, and which expert carried which token."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from mope_bb.cli.chat import ChatOptions, print_stream, recorded, start, summary
from mope_bb.cli.main import show_error
from mope_bb.errors import ConfigError, ContextLengthError, MopeError
from mope_bb.logs import new_conversation

if TYPE_CHECKING:
    from mope_bb.cli.recording import Recorder
    from mope_bb.session import Session
    from mope_bb.streams import AnswerStream

HELP = """\
/pref PREF    change the preference from here on; without PREF show it
/merge RULE   change the merge rule (linear, geometric, product); without RULE show it
/why          the last answer, coloured by the expert that carried each token
/new          forget the conversation
/help         this list
/quit         end (so does Ctrl-D); Ctrl-C stops an answer"""


class Conversation:
    """A loop of questions and answers with one history."""

    def __init__(
        self,
        runner: asyncio.Runner,
        session: Session,
        options: ChatOptions,
        preference: str | None,
        recorder: Recorder,
    ) -> None:
        self._runner = runner
        self._session = session
        self._options = options
        self._preference = preference
        self._recorder = recorder
        self._messages: list[dict[str, str]] = []
        self._last: AnswerStream | None = None
        # A wrong preference or rule is told before the first question.
        session.plan(preference, merge=options.merge)

    def run(self) -> None:
        """Read lines until the end of input or /quit."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # line editing and recall for input()
        click.echo(f"Preference: {self._preference or 'all dimensions alike'}. /help lists the commands.", err=True)
        while True:
            try:
                line = input("> ").strip()
                if line in ("/quit", "/exit"):
                    return
                self._handle(line)
            except EOFError:
                click.echo()
                return
            except KeyboardInterrupt:
                click.echo("\n(Ctrl-D or /quit ends.)", err=True)
            except UnicodeDecodeError:
                show_error(ConfigError("the line is not UTF-8", hint="Check the terminal's encoding."), debug=False)
            except MopeError as error:
                show_error(error, debug=False)

    def _handle(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        if not line.startswith("/"):
            self._answer(line)
        elif command == "/pref":
            self._change_preference(argument)
        elif command == "/merge":
            self._change_merge(argument)
        elif command == "/why":
            self._why()
        elif command == "/new":
            self._messages.clear()
            self._recorder.conversation = new_conversation()
            click.echo("The conversation is forgotten.", err=True)
        elif command == "/help":
            click.echo(HELP)
        else:
            raise ConfigError(f"unknown command {command!r}", hint="/help lists the commands.")

    def _answer(self, question: str) -> None:
        if not question:
            return
        messages = [*self._messages, {"role": "user", "content": question}]
        stream = start(self._session, self._options, messages, self._preference)
        is_stopped = False
        try:
            with recorded(self._recorder, stream, self._options, messages, self._preference):
                self._runner.run(print_stream(stream, as_json=self._options.as_json))
        except KeyboardInterrupt:
            is_stopped = True
        except ContextLengthError as error:
            if self._messages:
                error.hint = "The conversation has become too long; /new forgets it."
            raise
        # Only now: a question whose answer failed, or was stopped before it began, is not part of the history.
        if stream.text:
            self._last = stream
            self._messages = [*messages, {"role": "assistant", "content": stream.text}]
        click.echo(click.style(summary(stream.answer, is_stopped=is_stopped), dim=True), err=True)

    def _change_preference(self, text: str) -> None:
        if text:
            self._session.plan(text, merge=self._options.merge)
            self._preference = text
        plan = self._session.plan(self._preference, merge=self._options.merge)
        shares = ", ".join(f"{name} {value:.0%}" for name, value in zip(plan.experts, plan.lambdas, strict=True))
        click.echo(f"Preference: {self._preference or 'all dimensions alike'} ({shares}).", err=True)

    def _change_merge(self, rule: str) -> None:
        plan = self._session.plan(self._preference, merge=rule or self._options.merge)
        self._options = replace(self._options, merge=plan.rule.name)
        click.echo(f"Merge rule: {plan.rule.name}.", err=True)

    def _why(self) -> None:
        if self._last is None or not self._last.answer.steps:
            raise ConfigError("there is no answer yet", hint="Ask something first.")
        from mope_bb.cli.why import print_why

        print_why(self._last.answer, self._last.plan)
