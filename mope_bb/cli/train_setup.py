"""What `mope-bb train` opens before it trains, and what it says where it is not to train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mope_bb.errors import ConfigError

if TYPE_CHECKING:
    from mope_bb.config import Config
    from mope_bb.pcm.mixture import MergeRule
    from mope_bb.pcm.model import PreferenceControlModel
    from mope_bb.training.runs import Prompts, TrainingSetup
    from mope_bb.training.team import Team


@contextmanager
def open_setup(
    config: Config,
    merge: str | None,
    folder: Path,
    *,
    ablation: str | None,
    is_zoo: bool,
    team: Team | None = None,
) -> Iterator[TrainingSetup]:
    """Open everything that a run needs; what is wrong is told before anything is sampled. Raises ConfigError."""
    from mope_bb.pcm.bench import ExpertBench
    from mope_bb.rewards.registry import open_reward_panel
    from mope_bb.training.runs import Ablation, TrainingSetup
    from mope_bb.training.tasks import reference_expert, served_dimensions
    from mope_bb.training.team import Team
    from mope_bb.usage import Account

    rule, base = choose_rule(config, merge), config.roster().base
    reference, dimensions = reference_expert(config), served_dimensions(config)
    loaded = find_prompts(config, is_zoo=is_zoo)
    account = Account.of(config)
    panel = open_reward_panel(config, dimensions, account)
    try:
        pcm = open_pcm(config)
        names = {*styled_experts(config), reference, *((base,) if base is not None else ())}
        with ExpertBench(config, names, account) as bench:
            yield TrainingSetup(
                config,
                rule,
                pcm,
                bench,
                panel,
                loaded,
                Path(folder),
                Ablation(
                    shuffles_rewards=ablation == "shuffled-rewards",
                    is_context_free=ablation == "context-free",
                    uses_features=ablation not in ("no-features", "context-free"),
                ),
                team or Team(),
                account,
            )
    finally:
        panel.close()


def learn_along(team: Team, config: Config, merge: str | None, *, is_zoo: bool) -> None:
    """Be one of the other learner processes: neither ask experts nor write anything."""
    from mope_bb.training.followers import follow
    from mope_bb.training.tasks import open_tasks

    rule = choose_rule(config, merge)
    follow(team, open_pcm(config), config.train, rule, open_tasks(config, rule, find_prompts(config, is_zoo=is_zoo)))


def choose_rule(config: Config, merge: str | None) -> MergeRule:
    """The rule to train for: the flag's, else the configuration's, else the product. Raises ConfigError."""
    from mope_bb.pcm.plans import configured_rule

    rule = configured_rule(config, merge, trained="product")
    if rule.needs_base and config.roster().base is None:
        raise ConfigError(
            f"the merge rule {rule.name!r} needs a base expert and none is configured",
            hint="Add `base = true` to the expert that the others were fine-tuned from, or pass --merge linear.",
        )
    return rule


def find_prompts(config: Config, *, is_zoo: bool) -> Prompts:
    """The prompts to train on. Raises ConfigError."""
    from mope_bb.training.tasks import load_prompts

    if config.train.prompts is not None:
        return load_prompts(Path(config.train.prompts))
    if is_zoo:
        from mope_bb.zoo.judging import zoo_prompts

        return zoo_prompts(held_out=False)
    raise ConfigError("there are no prompts to train on", hint="Set `prompts` in [train], or pass --prompts.")


def open_pcm(config: Config) -> PreferenceControlModel:
    """The PCM to train: the configured one, or a new one on the configured backbone. Raises ConfigError."""
    from mope_bb.inference import choose_device
    from mope_bb.pcm.model import build_pcm, load_pcm

    device = choose_device(config.pcm.device)
    if config.pcm.path is not None:
        return load_pcm(config.pcm.path, device=device)
    if config.pcm.backbone is not None:
        return build_pcm(config.pcm.backbone, styled_experts(config), device=device)
    raise ConfigError("there is no PCM to train", hint="Set `backbone` (or `path`) in [pcm].")


def styled_experts(config: Config) -> list[str]:
    """All experts but the base."""
    return [expert.name for expert in config.experts if not expert.base]


def show_estimate(config: Config, merge: str | None, *, is_zoo: bool) -> None:
    """Print what the run would ask for. Raises ConfigError; asks nobody."""
    from mope_bb.pcm.bench import check_logprobs
    from mope_bb.training.estimate import estimate_run
    from mope_bb.training.tasks import open_tasks, reference_expert

    check_logprobs(config.experts)
    prompts, options = find_prompts(config, is_zoo=is_zoo), config.train
    source, tokenizer = open_tasks(config, choose_rule(config, merge), prompts), open_pcm(config).tokenizer
    outline = estimate_run(
        config,
        source,
        prompts,
        reference=reference_expert(config),
        count_tokens=lambda messages: len(tokenizer.encode_chat(messages)),
        lengths=sorted({max(1, options.max_tokens // part) for part in (4, 2, 1)}),
    )
    click.echo(
        f"{options.max_steps} batches of {options.batch_size} pairs: {outline.num_answers:,} answers, at most"
        f" {outline.num_references:,} reference answers; prompts of {outline.prompt_tokens:.0f} tokens."
    )
    asked = ", ".join(f"{name} {share:.0%}" for name, share in outline.share_asked.items())
    click.echo(f"Asked for an answer: {asked}.")
    for one in outline.estimates:
        questions, read = sum(one.questions.values()), sum(one.tokens_read.values())
        cost = f", cost {one.cost:,.2f}" if one.cost else ""
        click.echo(
            f"Answers of {one.num_tokens} tokens: {questions:,.0f} next-token questions, {read:,.0f} tokens read{cost}."
        )
    if not any(one.cost for one in outline.estimates):
        click.echo("No cost: no expert has `input_price` or `output_price`.")
