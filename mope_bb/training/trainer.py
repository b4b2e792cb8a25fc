"""The training loop: pairs are sampled, scored and learned from, all at once; nothing finished is ever lost.

    tasks -> (admission) -> two rollouts each, reference answer, rewards -> ledger
                                  |                                           |
                     actor: a copy of the PCM  <-- weights, version + 1 --  learner: REBEL, checkpoint

One coroutine owns all state: it begins what may begin, waits until anything ends, and looks again. So there are no
queues to fill up, one wait with one deadline, and one place that knows what a stalled run is waiting for.

Deterministic mode samples batch t in one piece, with the weights of version t - max_staleness exactly; otherwise pairs
begin when there is room and take the newest weights there are.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from torch import Tensor

from mope_bb.config import TrainConfig
from mope_bb.errors import (
    AllRolloutsFailedError,
    CheckpointError,
    ConfigError,
    MopeError,
    StalledError,
    TrainingError,
)
from mope_bb.pcm.actors import Actor
from mope_bb.pcm.model import PolicyWeights
from mope_bb.pcm.rollouts import Progress
from mope_bb.threads import in_thread
from mope_bb.training.admission import Staleness
from mope_bb.training.board import open_board
from mope_bb.training.checkpoints import LAST, TrainerState, load_state, save_checkpoint
from mope_bb.training.followers import END_MESSAGE, begin_message, lesson_message
from mope_bb.training.learner import Learner, LearnerReport, LessonPlan, Pair, defaults_of, open_learner, prepare_pcm
from mope_bb.training.ledger import Dispatch, Ended, Ledger
from mope_bb.training.metrics import Course, StepMetrics, measure_step, row_of
from mope_bb.training.pairs import PairGroup, PairMaker, describe_groups
from mope_bb.training.rebel import choose_eta
from mope_bb.training.records import decode_rollout
from mope_bb.training.runs import TrainingSetup, check_same_run, describe_run, holds_run, keep_rows, write_run_file
from mope_bb.training.scoring import ReferenceDesk, prompt_key
from mope_bb.training.tasks import open_tasks, reference_expert

METRICS: Final = "metrics.jsonl"
LEARNER_ENDS_WITHIN_S: Final = 120.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A pair that has ended and waits for its batch."""

    version: int
    """Of the policy that began it."""
    result: Pair | MopeError


class Trainer:
    """Trains a PCM. `run` saves what was learned however it ends, by an error or by Ctrl-C."""

    def __init__(self, setup: TrainingSetup) -> None:
        """Raises ConfigError for what cannot be trained."""
        self._setup = setup
        self._options: TrainConfig = setup.config.train
        options = self._options
        self._source = open_tasks(setup.config, setup.rule, setup.prompts)
        self._reference = reference_expert(setup.config)
        # What is left for the first lesson of a pair: the window then holds it for window - 1 versions more.
        self._staleness = Staleness(options.max_staleness - (options.window - 1), options.batch_size)
        is_local = bool(setup.bench.models)
        self._is_deterministic = is_local if options.deterministic is None else options.deterministic
        if self._is_deterministic and not is_local:
            raise ConfigError(
                "`deterministic` needs `local` experts, and some expert is not",
                hint="Endpoints answer in no fixed order and with noise; leave it out.",
            )
        if options.window > options.max_staleness + 1:
            raise ConfigError(
                f"`window` is {options.window}, but no pair older than {options.max_staleness} versions"
                " (`max_staleness`) is learned from",
                hint=f"Set `max_staleness` to {options.window - 1} or more.",
            )
        prepare_pcm(setup.pcm, options, setup.rule)
        self._first_version = setup.pcm.policy_version
        self._num_steps = 0
        self._learner: Learner | None = None
        self._window: list[list[Pair]] = []
        self._snapshots: dict[int, PolicyWeights] = {}
        self._waiting: dict[int, _Waiting] = {}
        self._backlog: list[int] = []
        self._num_dispatched = 0
        self._num_ended = 0
        self._running: dict[asyncio.Task[None], PairGroup] = {}
        self._learning: asyncio.Task[None] | None = None
        self._started = time.monotonic()
        self._idle_since: dict[str, float] = {}
        self._idle_s = {"learner": 0.0, "rollouts": 0.0}
        self._num_requests = self._cache_hits = 0
        self._last_step = time.monotonic()
        self._unfinished: frozenset[int] = frozenset()
        self._is_torn = False
        self._num_saved = 0
        self._on_step: Callable[[StepMetrics, float], None] | None = None
        self._on_answers: Progress | None = None

    @property
    def num_steps(self) -> int:
        """Batches learned from, those of earlier processes among them."""
        return self._num_steps

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self._setup.output_dir / "checkpoints"

    @property
    def share_done(self) -> float:
        """How much of the run lies behind: by steps, or by time if that ends it sooner."""
        by_steps = self._num_steps / self._options.max_steps
        limit = self._options.max_minutes
        return by_steps if limit is None else max(by_steps, (time.monotonic() - self._started) / (60 * limit))

    def run(
        self,
        on_step: Callable[[StepMetrics, float], None] | None = None,
        *,
        on_answers: Progress | None = None,
        resume: bool = False,
    ) -> None:
        """Train to the end, from where the run in `output_dir` stands if `resume` and there is one.

        `on_step` is told each row of metrics and the share that is done; `on_answers`, while a batch is sampled, how
        many of its answers there are, of how many. Raises TrainingError, ProviderError, RewardError, BudgetError and
        ConfigError.
        """
        self._on_step, self._on_answers = on_step, on_answers
        try:
            self._setup.bench.run(self._run(resume=resume))
        finally:
            self._setup.team.tell(END_MESSAGE)

    async def _run(self, *, resume: bool) -> None:
        setup, options = self._setup, self._options
        self._tokenizer = await setup.bench.open()
        with Ledger(setup.output_dir) as self._ledger:
            self._begin_run(resume=resume)
            self._actor = setup.bench.actor(
                setup.pcm,
                max_in_flight=options.max_in_flight,
                is_context_free=setup.ablation.is_context_free,
            )
            plain = setup.bench.actor(max_in_flight=options.max_in_flight)
            references = ReferenceDesk(self._ledger, plain, expert=self._reference, seed=options.seed)
            self._maker = PairMaker(
                setup,
                self._ledger,
                self._actor,
                references,
                unfinished=self._unfinished,
                first_version=self._first_version,
                on_answers=self._on_answers,
            )
            self._board = open_board(setup.output_dir)
            self._mark_idle("learner", "rollouts")
            self._last_step = time.monotonic()
            try:
                while self.share_done < 1.0:
                    self._begin_pairs()
                    self._begin_step()
                    await self._wait()
            except BaseException:
                await self._stop(self._actor, plain)
                with suppress(TrainingError):
                    self._ledger.put_usage(setup.account.by_name)
                if self._num_steps and not self._is_torn:
                    # What stopped the run is what is told; the last checkpoint and the ledger hold the rest.
                    with suppress(TrainingError):
                        self._save()
                raise
            await self._stop(self._actor, plain)
            self._save()

    def _begin_run(self, *, resume: bool) -> None:
        """Take up the run of the folder, or begin a new one."""
        setup = self._setup
        document = describe_run(
            setup.config,
            rule=setup.rule.name,
            reference=self._reference,
            ablation=asdict(setup.ablation),
            prompts=setup.prompts,
        ) | {"tokenizer": self._tokenizer}
        if resume and holds_run(setup.output_dir):
            check_same_run(setup.output_dir, document)
            self._restore()
        else:
            write_run_file(setup.output_dir, document)
            self._started = time.monotonic()
        if self._is_deterministic:
            self._snapshots[self._num_steps] = PolicyWeights.of(setup.pcm)

    # ------------------------------------------------------------------ pairs

    def _begin_pairs(self) -> None:
        while (group := self._next_group()) is not None:
            self._ledger.dispatch(
                [
                    Dispatch(task.pair_id, group.version, task.style.label, prompt_key(task.messages))
                    for task in group.tasks
                ]
            )
            self._count_idle("rollouts")
            self._running[asyncio.create_task(self._make_pairs(group))] = group

    def _next_group(self) -> PairGroup | None:
        """What may begin now."""
        options = self._options
        num_running = sum(len(group.tasks) for group in self._running.values())
        if self._actor.samples_in_step:
            size = 0 if self._running else options.batch_size
        else:
            size = 1 if 2 * num_running < options.max_in_flight else 0
        room = self._staleness.room(version=self._num_steps, num_ended=self._num_ended, num_running=num_running)
        if size == 0 or room < size:
            return None
        fresh = range(self._num_dispatched, options.max_steps * options.batch_size)
        ids = [*self._backlog, *fresh[:size]][:size]
        if not ids:
            return None
        self._backlog = self._backlog[size:]
        self._num_dispatched = max(self._num_dispatched, ids[-1] + 1)
        version = self._num_steps
        if self._is_deterministic:
            version = max(0, ids[0] // options.batch_size - self._staleness.max_staleness)
        return PairGroup(tuple(map(self._source.task, ids)), version)

    async def _make_pairs(self, group: PairGroup) -> None:
        """Make the pairs of a group and record how they ended."""
        weights = self._snapshots[group.version] if self._is_deterministic else None
        made, reference_scores = await self._maker.make(group, weights)
        ended = []
        for pair_id, (version, result) in made.items():
            rewards, error = (None, str(result)) if isinstance(result, MopeError) else (result.rewards, None)
            ended.append(Ended(pair_id, version, rewards, error))
        self._ledger.end(ended, reference_scores)
        self._ledger.put_usage(self._setup.account.by_name)
        self._waiting |= {pair_id: _Waiting(version, result) for pair_id, (version, result) in made.items()}
        self._num_ended += len(ended)

    # ---------------------------------------------------------------- batches

    def _begin_step(self) -> None:
        ids = None if self._learning is not None else self._choose_batch()
        if ids is not None:
            batch = [self._waiting.pop(pair_id) for pair_id in ids]
            self._ledger.lease(ids, self._num_steps + 1)
            self._count_idle("learner")
            self._learning = asyncio.create_task(self._learn(batch))

    def _choose_batch(self) -> Sequence[int] | None:
        size = self._options.batch_size
        if self._is_deterministic:
            ids = range(self._num_steps * size, (self._num_steps + 1) * size)
            return ids if all(pair_id in self._waiting for pair_id in ids) else None
        ended = [(waiting.version, pair_id) for pair_id, waiting in self._waiting.items()]
        running = [group.version for group in self._running.values() for _ in group.tasks]
        return self._staleness.choose(ended, running, version=self._num_steps)

    async def _learn(self, batch: Sequence[_Waiting]) -> None:
        """Learn from a batch, hand the new weights on, tell and save."""
        options, version = self._options, self._num_steps
        pairs = [one.result for one in batch if isinstance(one.result, Pair)]
        if not pairs:
            last = next(one.result for one in reversed(batch) if isinstance(one.result, MopeError))
            raise AllRolloutsFailedError(
                f"none of the {len(batch)} pairs of batch {version} could be used; the last reason: {last}",
                hint=last.hint,
            )
        rng = random.Random(f"{options.seed} step {version}")
        if self._setup.ablation.shuffles_rewards:
            pairs = shuffle_rewards(pairs, rng)
        learner = self._learner = self._learner or self._open_learner(self._choose_eta(pairs))
        self._window = [*self._window, pairs][-options.window :]
        lesson = [pair for older in self._window for pair in older]
        seed, share = rng.randrange(2**31), min(self.share_done, 1.0)
        self._is_torn = True
        report = await in_thread(lambda: self._teach(learner, lesson, seed, share), name="learner")
        self._is_torn = False
        self._num_steps = version + 1
        await self._publish()
        self._maker.num_answers -= 2 * len(batch)
        course = Course(
            step=self._num_steps,
            # After a resume a pair may be younger than the weights' number: the policy that began it was lost.
            staleness=[max(0, version - one.version) for one in batch if isinstance(one.result, Pair)],
            num_dropped=len(batch) - len(pairs),
            num_requests=self._setup.bench.num_requests - self._num_requests,
            cache_hits=self._setup.bench.cache_hits - self._cache_hits,
            step_s=time.monotonic() - self._last_step,
            learner_idle_s=self._idle_s.pop("learner", 0.0),
            rollouts_idle_s=self._idle_s.pop("rollouts", 0.0),
            seconds=time.monotonic() - self._started,
        )
        self._num_requests += course.num_requests
        self._cache_hits += course.cache_hits
        self._last_step = time.monotonic()
        metrics = measure_step(pairs, report, learner.eta, course)
        with (self._setup.output_dir / METRICS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row_of(metrics), allow_nan=False) + "\n")
        if self._num_steps % options.save_steps == 0:
            await self._save_in_passing()
        self._board(metrics)
        if self._on_step is not None:
            self._on_step(metrics, self.share_done)

    def _teach(self, learner: Learner, pairs: Sequence[Pair], seed: int, share: float) -> LearnerReport:
        """One batch, with all processes of the team."""
        if self._setup.team.size > 1:
            self._setup.team.tell(lesson_message(pairs, seed=seed, share_done=share))
        return learner.step(pairs, seed=seed, share_done=share)

    async def _publish(self) -> None:
        """Hand the newest weights to who samples; deterministic sampling takes those of its version itself."""
        weights = PolicyWeights.of(self._setup.pcm)
        if not self._is_deterministic:
            await self._actor.load(weights)
            return
        self._snapshots[self._num_steps] = weights
        oldest = self._num_steps - self._staleness.max_staleness
        self._snapshots = {version: one for version, one in self._snapshots.items() if version >= oldest}

    def _choose_eta(self, pairs: Sequence[Pair]) -> float:
        options = self._options
        target = options.target_log_ratio or defaults_of(self._setup.rule.name)["target_log_ratio"]
        differences = [pair.rewards[0] - pair.rewards[1] for pair in pairs]
        return choose_eta(differences, target=target) if options.eta == "auto" else options.eta

    def _open_learner(self, eta: float, optimizer: Mapping[str, Tensor] | None = None) -> Learner:
        """The learner, opened when the first rewards are there to choose eta by, or with an earlier one's memory."""
        setup = self._setup
        how = LessonPlan(
            eta,
            setup.bench.reads_expert_ids(setup.pcm),
            is_context_free=setup.ablation.is_context_free,
            uses_features=setup.ablation.uses_features,
        )
        learner = open_learner(setup.pcm, self._options, how, team=setup.team)
        if optimizer is not None:
            learner.load_state(optimizer, num_steps=self._num_steps)
        if setup.team.size > 1:
            setup.team.tell(begin_message(how, learner, PolicyWeights.of(setup.pcm), num_steps=self._num_steps))
        return learner

    # ---------------------------------------------------------------- waiting

    async def _wait(self) -> None:
        """Wait until something ends. Raises what it ended with, and StalledError."""
        learning = self._learning
        under_way = {*self._running, *(() if learning is None else (learning,))}
        limit = self._options.stall_timeout_s
        done, _ = await asyncio.wait(under_way, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            names = [*describe_groups(self._running.values()), *(() if learning is None else ("the learner",))]
            raise StalledError(f"nothing has ended for {limit:g} s; the run waits for {', '.join(names)}")
        for task in done:
            if task is learning:
                self._learning = None
                self._mark_idle("learner")
            else:
                del self._running[task]
            task.result()
        if not self._running:
            self._mark_idle("rollouts")

    async def _stop(self, *actors: Actor) -> None:
        """End what is under way. A batch that is being learned from ends first: half of it would tear the weights."""
        for task in self._running:
            task.cancel()
        if self._learning is not None:
            await asyncio.wait({self._learning}, timeout=LEARNER_ENDS_WITHIN_S)
        for actor in actors:
            await actor.aclose()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _mark_idle(self, *names: str) -> None:
        for name in names:
            self._idle_since.setdefault(name, time.monotonic())

    def _count_idle(self, name: str) -> None:
        since = self._idle_since.pop(name, None)
        if since is not None:
            self._idle_s[name] = self._idle_s.get(name, 0.0) + time.monotonic() - since

    # ------------------------------------------------------- saving, resuming

    def _save(self) -> None:
        """Write the checkpoint of the present step. Raises TrainingError."""
        self._write_checkpoint()
        self._forget_rollouts()

    async def _save_in_passing(self) -> None:
        """The same between two batches; what fails is told, and tried again later."""
        try:
            await in_thread(self._write_checkpoint, name="checkpoint")
        except TrainingError as error:
            _log.warning("%s; the run goes on", error)
        else:
            self._forget_rollouts()

    def _write_checkpoint(self) -> None:
        if self._learner is None or self._num_saved == self._num_steps:
            return
        weights = PolicyWeights.of(self._setup.pcm)
        tensors = {f"optimizer.{name}": value for name, value in self._learner.state().items()}
        for name, one in (("policy", weights), *((f"snapshot.{v}", w) for v, w in self._snapshots.items())):
            tensors |= {f"{name}.{key}": value for key, value in one.tensors.items()}
            tensors[f"{name}/features"] = one.feature_weights
        facts = {
            "num_steps": self._num_steps,
            "first_version": self._first_version,
            "eta": self._learner.eta,
            "seconds": time.monotonic() - self._started,
            "snapshots": sorted(self._snapshots),
        }
        save_checkpoint(
            self._setup.pcm,
            self.checkpoints,
            step=self._num_steps,
            state=TrainerState(tensors, facts),
            num_kept=self._options.save_total_limit,
        )
        self._num_saved = self._num_steps

    def _forget_rollouts(self) -> None:
        # A resumed run fills its window from the batches before the checkpoint.
        self._ledger.forget_rollouts(self._num_steps - (self._options.window - 1))

    def _restore(self) -> None:
        """Go on from the last checkpoint and the ledger."""
        for name, usage in self._ledger.usage().items():
            self._setup.account.add(name, usage)
        last = self.checkpoints / LAST
        if last.exists():
            state = load_state(last)
            try:
                facts = state.facts
                self._num_steps = self._num_saved = int(facts["num_steps"])
                self._first_version = int(facts["first_version"])
                self._started = time.monotonic() - float(facts["seconds"])
                self._weights_of(state, "policy", self._num_steps).load_into(self._setup.pcm)
                self._snapshots = {v: self._weights_of(state, f"snapshot.{v}", v) for v in map(int, facts["snapshots"])}
                optimizer = {
                    name.removeprefix("optimizer."): value
                    for name, value in state.tensors.items()
                    if name.startswith("optimizer.")
                }
                self._learner = self._open_learner(float(facts["eta"]), optimizer)
            except MopeError:
                raise
            except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
                raise CheckpointError(f"the run cannot go on from {str(last)!r}: {error!r:.200}") from None
        in_step = bool(self._setup.bench.models)
        restored = self._ledger.restore(self._num_steps, group_size=self._options.batch_size if in_step else 1)
        self._waiting = {one.pair_id: self._waiting_again(one) for one in restored.ended}
        self._backlog = sorted(restored.unfinished)
        self._unfinished = frozenset(restored.unfinished)
        self._num_dispatched = restored.num_dispatched
        self._num_ended = restored.num_trained + len(restored.ended)
        for step in range(max(1, self._num_steps - self._options.window + 2), self._num_steps + 1):
            batch = [self._waiting_again(one).result for one in self._ledger.pairs_of_step(step)]
            self._window.append([result for result in batch if isinstance(result, Pair)])
        keep_rows(self._setup.output_dir / METRICS, self._num_steps)

    def _weights_of(self, state: TrainerState, name: str, version: int) -> PolicyWeights:
        prefix = f"{name}."
        tensors = {key.removeprefix(prefix): one for key, one in state.tensors.items() if key.startswith(prefix)}
        return PolicyWeights(tensors, state.tensors[f"{name}/features"], self._first_version + version)

    def _waiting_again(self, one: Ended) -> _Waiting:
        """An ended pair of an earlier process."""
        if one.rewards is None:
            return _Waiting(one.version, TrainingError(one.error or "unknown"))
        task, data = self._source.task(one.pair_id), self._ledger.rollouts(one.pair_id)
        if len(data) < len(task.requests):
            raise TrainingError(f"the ledger lacks the answers of pair {one.pair_id}, which was not trained yet")
        first, second = (decode_rollout(data[place], request) for place, request in enumerate(task.requests))
        return _Waiting(one.version, Pair(first, second, one.rewards, one.pair_id))


def shuffle_rewards(pairs: Sequence[Pair], rng: random.Random) -> list[Pair]:
    """The same pairs with the batch's rewards dealt out at random."""
    rewards = [reward for pair in pairs for reward in pair.rewards]
    rng.shuffle(rewards)
    return [replace(pair, rewards=(rewards[2 * i], rewards[2 * i + 1])) for i, pair in enumerate(pairs)]
