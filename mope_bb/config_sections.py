"""The tables of `mope.toml`, each a pydantic model; `mope_bb.config` makes the whole of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mope_bb.keys import keep_password, redacted

MergeRuleName = Literal["linear", "geometric", "product"]
Name = Annotated[str, Field(pattern=r"^[\w.:/-]+$")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def __repr__(self) -> str:
        return redacted(super().__repr__())


class ExpertConfig(Section):
    """One `[[experts]]` table."""

    name: Name
    provider: str
    """What serves it: vllm, sglang, llamacpp, openai ...; `mope_bb.providers.registry` has them all."""
    dimension: Name | None = None
    base: bool = False
    """The base model of the product rule; it takes part in other rules only when a preference names it."""
    base_url: str | tuple[str, ...] | None = None
    """One address, or those of several servers that serve the same: a question goes to the one with the least to do,
    and to another one where that fails."""
    model: str | None = None
    """A served name, or a folder for `local`."""
    system: str | None = None
    """The expert's own system prompt, put before the conversation's."""
    api_key_env: str | None = None
    """The name of the environment variable that holds the key, never the key."""
    tokenizer: str | None = None
    """A Hugging Face folder or hub name; without it the endpoint's own tokenize and template routes are used."""
    top_k: Annotated[int, Field(ge=1)] = 20
    logprobs: bool = True
    """false = the endpoint gives no logprobs: the expert is drawn with its weight, and then draws a token itself. It
    takes part in chat under the linear rule, at temperature and top_p 1; training and evaluation refuse it."""
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Deadline of one question to this expert, retries included."""
    attempt_timeout_s: Annotated[float, Field(gt=0)] = 20.0
    """Deadline of each try: after it a question that was swallowed is asked again."""
    max_retries: Annotated[int, Field(ge=0)] = 4
    max_in_flight: Annotated[int, Field(ge=1)] = 256
    """Requests, and connections, to one address at a time. A 429 lowers it for a while; what comes on top waits."""
    max_prompts: Annotated[int, Field(ge=1)] = 32
    """Prompts in one request, where the endpoint takes lists; 1 sends every question on its own, at once."""
    api_version: str | None = None
    """`azure` only: the version of its API."""
    extra_body: dict[str, Any] = {}
    """`chat` and its dialects: more fields of each request, such as OpenRouter's choice of a provider."""
    input_price: Annotated[float, Field(ge=0)] = 0.0
    """Of a million tokens read, in any currency; `mope-bb train --dry-run` adds it up."""
    output_price: Annotated[float, Field(ge=0)] = 0.0
    """Of a million tokens generated."""
    identity: str | None = None
    """What stands for this model in the cache instead of its address, such as a hash of its weights."""
    device: str = "auto"
    """`local` only: auto, cpu, cuda or mps."""
    script: tuple[dict[str, float], ...] = ()
    """`scripted` only: at each position text = probability; "<end>" ends the answer."""

    @model_validator(mode="after")
    def _check_addresses(self) -> Self:
        for url in self.addresses:
            keep_password(url)
        if self.base_url == ():
            raise ValueError("`base_url` is an empty list")
        if len({url.rstrip("/") for url in self.addresses}) < len(self.addresses):
            raise ValueError("`base_url` names an address twice")
        return self

    @property
    def addresses(self) -> tuple[str, ...]:
        """`base_url` as a tuple: one address, several or none."""
        if self.base_url is None:
            return ()
        return (self.base_url,) if isinstance(self.base_url, str) else self.base_url

    def replicas(self) -> tuple[Self, ...]:
        """This expert at each of its addresses; without a list of them itself."""
        if self.base_url is None or isinstance(self.base_url, str):
            return (self,)
        # What one of them has answered counts for all: they share a place in the cache.
        identity = self.identity or f"{self.base_url[0]} {self.model or ''}"
        return tuple(self.model_copy(update={"base_url": url, "identity": identity}) for url in self.base_url)


class RewardConfig(Section):
    """The `reward` of one `[dimensions.NAME]` table: who scores answers in this dimension."""

    kind: Literal["classifier", "function", "remote", "judge"]
    path: str | None = None
    """`classifier`: the folder or hub name of a Hugging Face sequence classifier with one label."""
    device: str = "auto"
    """`classifier`: auto, cpu, cuda or mps."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """`classifier`: conversations in one forward."""
    function: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None
    """`function`: the import path of a Python function, "package.module:name"."""
    provider: Literal["vllm", "vllm-pooling", "sglang", "tei"] | None = None
    """`remote`: the software that serves the reward model."""
    # What is excluded is left out of the dumps by which a run is recognised: servers may move and get other limits.
    base_url: Annotated[str | None, Field(exclude=True)] = None
    """`remote`: the server's address; `judge`: the same up to the API's version, by default OpenAI's."""
    model: str | None = None
    """`remote` (vLLM) and `judge`: the served name; with Azure the name of the deployment."""
    api_key_env: Annotated[str | None, Field(exclude=True)] = None
    """`remote` and `judge`: the name of the environment variable that holds the key, never the key."""
    tokenizer: str | None = None
    """`remote`: the model's tokenizer, a folder or hub name, where we render the chat (sglang, tei); with vLLM, if
    given, its control tokens are refused in messages."""
    mode: Literal["pairwise", "graded"] = "pairwise"
    """`judge`: compares an answer with the reference answer, twice; or grades each answer from 1 to 10."""
    criterion: str | None = None
    """`judge`: what it judges by; default the dimension's `text`."""
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """`judge`, graded: nats of Bradley-Terry that one grade is worth."""
    api_version: Annotated[str | None, Field(exclude=True)] = None
    """`judge`: the version of Azure's API; with it `base_url` is an Azure resource."""
    timeout_s: Annotated[float, Field(gt=0, exclude=True)] = 120.0
    """`remote` and `judge`: deadline of one question, retries included,"""
    attempt_timeout_s: Annotated[float, Field(gt=0, exclude=True)] = 60.0
    """of each try,"""
    max_retries: Annotated[int, Field(ge=0, exclude=True)] = 4
    """and how often it is asked again."""
    max_in_flight: Annotated[int, Field(ge=1, exclude=True)] = 16
    """`remote` and `judge`: questions under way at a time."""
    input_price: Annotated[float, Field(ge=0, exclude=True)] = 0.0
    """`remote` and `judge`: of a million tokens read, in any currency,"""
    output_price: Annotated[float, Field(ge=0, exclude=True)] = 0.0
    """and of a million tokens generated."""

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        keep_password(self.base_url or "")
        known = _REWARD_SETTINGS[self.kind]
        if missing := [name for name, is_needed in known.items() if is_needed and getattr(self, name) is None]:
            raise ValueError(f"a reward of kind {self.kind!r} needs `{missing[0]}`")
        for name, field in type(self).model_fields.items():
            if name not in known and name != "kind" and getattr(self, name) != field.default:
                raise ValueError(f"a reward of kind {self.kind!r} has no `{name}`")
        if self.provider in ("sglang", "tei") and self.tokenizer is None:
            raise ValueError(f"a reward model served by {self.provider!r} needs `tokenizer`, to render the chat")
        if self.scale != 1 and self.mode == "pairwise":
            raise ValueError("a pairwise judge has no `scale`: it gives no grades")
        if self.api_version is not None and self.base_url is None:
            raise ValueError("`api_version` is Azure's: it needs `base_url`, the address of your resource")
        return self


_ASKING = dict.fromkeys(
    (
        *("model", "base_url", "api_key_env", "timeout_s", "attempt_timeout_s", "max_retries", "max_in_flight"),
        *("input_price", "output_price"),
    ),
    False,
)
_REWARD_SETTINGS: dict[str, dict[str, bool]] = {
    "classifier": {"path": True, "device": False, "batch_size": False},
    "function": {"function": True},
    "remote": {**_ASKING, "provider": True, "base_url": True, "tokenizer": False},
    "judge": {**_ASKING, "model": True, "mode": False, "criterion": False, "scale": False, "api_version": False},
}
"""Kind of reward -> its settings, and whether it needs them."""


class DimensionConfig(Section):
    """One `[dimensions.NAME]` table."""

    text: str | None = None
    """The sentence by which the PCM reads this dimension."""
    wordings: tuple[str, ...] = ()
    """Sentences in which users ask for it; training draws preferences in words from them."""
    reward: RewardConfig | None = None
    """Who scores answers in this dimension; training and evaluation need it."""

    @model_validator(mode="after")
    def _check_criterion(self) -> Self:
        if self.reward is not None and self.reward.kind == "judge" and not (self.reward.criterion or self.text):
            raise ValueError("a judge needs a `criterion`, or the dimension a `text`")
        return self


class PcmConfig(Section):
    """The `[pcm]` table. Without a path the user's own weights act, untrained."""

    path: str | None = None
    backbone: str | None = None
    """A causal Hugging Face model on which `train` builds a new PCM where there is no path."""
    device: str = "auto"
    reads_names: bool = False
    """Whether the PCM also reads a preference that is given as names or weights, as in the paper; the same in training
    and use. Then it learns combinations by heart, and does worse on those it was not trained on."""


class MergeConfig(Section):
    """The `[merge]` table."""

    rule: MergeRuleName | None = None
    """Default: the rule that the PCM was trained for, else linear."""
    product_scale: Annotated[float, Field(ge=0)] = 1.5
    """c in beta_i = n lambda_i exp(c tanh s_i)."""
    plausibility: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The product leaves out pieces below this share of the most probable one under the even mixture; 0 = none."""


class DecodingConfig(Section):
    """The `[decoding]` table: how far experts are asked ahead. What is sampled has one distribution in every mode."""

    mode: Literal["auto", "lockstep", "lookahead", "draft"] = "auto"
    """`lockstep`: a question to each expert for each token. `lookahead`: experts go on by themselves, and their lists
    are used while the answer goes the same way. `draft`: one expert writes ahead, the others score what it wrote.
    `auto`: what is fastest by what was measured, and where prices are set not dearer than lockstep."""
    max_ahead: Annotated[int, Field(ge=1)] = 24
    """Longest draft, in tokens."""
    max_generated: Annotated[float, Field(ge=1)] = 2.0
    """Tokens that one expert may generate for each token that is kept, on average over an answer."""
    on_expert_failure: Literal["end", "drop"] = "end"
    """What it means in chat that an endpoint cannot be reached, or keeps failing: the answer ends with its error, or
    goes on without that expert, with a warning. The base of a rule is never left out. In training the pair fails."""
    tool_messages: Literal["plain", "template"] = "plain"
    """How experts are told of calls and results in past messages: in words, or by their own chat templates."""


class BudgetConfig(Section):
    """The `[budget]` table: what one chat, evaluation or training run may spend; nothing more is asked then."""

    max_calls: Annotated[int, Field(ge=1)] | None = None
    """Requests to experts, reward models and judges, retries among them."""
    max_tokens_billed: Annotated[int, Field(ge=1)] | None = None
    """Tokens read and generated, as the endpoints report them."""
    max_cost: Annotated[float, Field(gt=0)] | None = None
    """By `input_price` and `output_price`, in their currency."""


class CacheConfig(Section):
    """The `[cache]` table: distributions on disk."""

    enabled: bool = True
    path: str | None = None
    max_bytes: Annotated[int, Field(ge=0)] = 2 * 2**30
    """When the cache is this large nothing more is written; nothing is ever deleted silently."""


Share = Annotated[float, Field(ge=0)]


class PreferenceMixConfig(Section):
    """The `[train.preferences]` table: which preferences a run draws."""

    axes: tuple[tuple[Name, ...], ...] = ()
    """Dimensions of which a preference takes at most one, such as ["simple", "technical"]; default: each its own."""
    leave_out: tuple[tuple[Name, ...], ...] = ()
    """Combinations that are never drawn, to be tested on later."""
    opposites: Share = 0.1
    """Share of preferences for two dimensions of one axis, weighted: the positions of a slider. Of the others:"""
    sizes: tuple[Share, Share, Share] = (0.1, 0.6, 0.3)
    """shares of one, two and three dimensions. Pairs teach what triples are made of, also those never trained on."""
    names: Share = 0.5
    """Share of preferences given as names of equal weight,"""
    weights: Share = 0.25
    """as names with random weights,"""
    sentences: Share = 0.25
    """and in words."""

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if sum(self.sizes) <= 0 or self.names + self.weights + self.sentences <= 0:
            raise ValueError("the shares are all 0")
        return self


class TrainConfig(Section):
    """The `[train]` table; names as in Hugging Face's TrainingArguments where the thing is the same."""

    prompts: str | None = None
    """A text file with a prompt a line, or JSONL."""
    output_dir: str | None = None
    reference: Name | None = None
    """The expert whose answer each reward is measured against; default the base."""
    preferences: PreferenceMixConfig = PreferenceMixConfig()
    max_steps: Annotated[int, Field(ge=1)] = 60
    max_minutes: Annotated[float, Field(gt=0)] | None = None
    """A limit on time: the schedule ends with whichever comes first."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Pairs sampled for one batch."""
    per_device_train_batch_size: Annotated[int, Field(ge=1)] = 32
    """Pairs of one optimiser step."""
    num_train_epochs: Annotated[int, Field(ge=1)] = 2
    """Passes over the window at each batch."""
    window: Annotated[int, Field(ge=1)] = 1
    """Batches that are learned from at a time: the newest and those before it."""
    eta: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    target_log_ratio: Annotated[float, Field(gt=0)] | None = None
    """What `eta = "auto"` asks of a typical pair, in nats; default 2 for the product, 5 for the other rules."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Default 1e-3 for the product, 3e-3 for the other rules."""
    feature_learning_rate: Annotated[float, Field(ge=0)] | None = None
    """Of the experts' features; default 50 times `learning_rate`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    warmup_steps: Annotated[int, Field(ge=0)] = 3
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    lora_rank: Annotated[int, Field(ge=0)] = 0
    """Train a LoRA adapter of this rank on the backbone; 0 trains all of it."""
    max_tokens: Annotated[int, Field(ge=1)] = 256
    """Longest answer that is sampled."""
    seed: int = 0
    max_staleness: Annotated[int, Field(ge=0)] = 2
    """How many versions older than the weights that learn from it the policy may be that began a pair; 0 = none, so
    that sampling and learning take turns."""
    max_in_flight: Annotated[int, Field(ge=1)] = 16
    """Answers under way at a time, where the experts are not all `local`."""
    deterministic: bool | None = None
    """Equal seeds train equally, also when the run is killed and resumed; needs `local` experts, for which it is the
    default."""
    save_steps: Annotated[int, Field(ge=1)] = 10
    """Batches between two checkpoints."""
    save_total_limit: Annotated[int, Field(ge=1)] = 2
    """Checkpoints that are kept."""
    rollout_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Longest duration of an answer, where the experts are not all `local`; one that takes longer has failed."""
    stall_timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """A run in which nothing ends for so long ends with an error that names what it waits for."""


class ServerConfig(Section):
    """The `[server]` table: where `mope-bb serve` listens, and the most that one request may ask for."""

    host: str = "127.0.0.1"
    """An address of this machine. Beyond loopback (127.0.0.1, ::1, localhost) a key is needed."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """0 takes a free one."""
    api_key_env: str | None = None
    """The name of the environment variable that holds the key that clients send, never the key."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 2**20
    max_messages: Annotated[int, Field(ge=1)] = 256
    max_n: Annotated[int, Field(ge=1)] = 8
    """Answers to one request."""
    max_tokens: Annotated[int, Field(ge=1)] = 2048
    """Longest answer that a request may ask for,"""
    default_max_tokens: Annotated[int, Field(ge=1)] = 512
    """and the length of one that does not say; never more than `max_tokens`."""
    max_open_answers: Annotated[int, Field(ge=1)] = 64
    """Answers under way at a time; what comes on top is told to try again (429)."""
    cors_origins: tuple[Annotated[str, Field(pattern=r"^https?://[^/*\s]+$")], ...] = ()
    """Other web pages that may use this server from a browser, such as "https://app.example.org"; none by default."""
    shutdown_timeout_s: Annotated[float, Field(ge=0, le=3600)] = 30.0
    """How long open answers may go on after Ctrl-C or SIGTERM."""

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        if self.max_n > self.max_open_answers:
            raise ValueError("`max_n` is more than `max_open_answers`, so that such a request could never be answered")
        return self


class LogsConfig(Section):
    """The `[logs]` table: chats that are kept on disk, to look at and to learn from."""

    enabled: bool = True
    path: str | None = None
    """The file; by default `logs.db` in the folder that mope-bb keeps for this user."""
