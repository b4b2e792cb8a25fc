"""The configuration, `mope.toml`, as a whole. An unknown key is an error that names the nearest known one."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from mope_bb.config_sections import (
    BudgetConfig,
    CacheConfig,
    DecodingConfig,
    DimensionConfig,
    ExpertConfig,
    LogsConfig,
    MergeConfig,
    MergeRuleName,
    Name,
    PcmConfig,
    PreferenceMixConfig,
    RewardConfig,
    Section,
    ServerConfig,
    TrainConfig,
)
from mope_bb.errors import ConfigError
from mope_bb.preferences import Roster

__all__ = [
    "BudgetConfig",
    "CacheConfig",
    "Config",
    "DecodingConfig",
    "DimensionConfig",
    "ExpertConfig",
    "LogsConfig",
    "MergeConfig",
    "MergeRuleName",
    "PcmConfig",
    "PreferenceMixConfig",
    "RewardConfig",
    "ServerConfig",
    "TrainConfig",
    "load_config",
    "parse_config",
    "resolve_home",
]


class Config(Section):
    """A whole `mope.toml`."""

    experts: Annotated[tuple[ExpertConfig, ...], Field(min_length=1)]
    dimensions: dict[Name, DimensionConfig] = Field(default={})
    pcm: PcmConfig = PcmConfig()
    merge: MergeConfig = MergeConfig()
    decoding: DecodingConfig = DecodingConfig()
    budget: BudgetConfig = BudgetConfig()
    cache: CacheConfig = CacheConfig()
    train: TrainConfig = TrainConfig()
    server: ServerConfig = ServerConfig()
    logs: LogsConfig = LogsConfig()
    presets: dict[Name, dict[Name, float]] = Field(default={})

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [expert.name for expert in self.experts]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two experts have the name {twice[0]!r}")
        if len(bases := [expert.name for expert in self.experts if expert.base]) > 1:
            raise ValueError(f"only one expert can be the base, found {bases}")
        roster = self.roster()
        for preset, weights in self.presets.items():
            for name in weights:
                if name not in {*roster.names(), *roster.dimensions}:
                    raise ValueError(f"preset {preset!r} names {name!r}, which no expert serves")
        return self

    def roster(self) -> Roster:
        """Who serves what."""
        served = (expert.dimension for expert in self.experts if expert.dimension is not None)
        return Roster(
            dimension_of={expert.name: expert.dimension for expert in self.experts},
            base=next((expert.name for expert in self.experts if expert.base), None),
            presets=self.presets,
            dimensions=tuple(dict.fromkeys([*served, *self.dimensions])),
        )

    def dimension_texts(self) -> dict[str, str]:
        """Dimension -> the sentence by which the PCM reads it, where one is configured."""
        return {name: section.text for name, section in self.dimensions.items() if section.text}


def load_config(path: str | os.PathLike[str]) -> Config:
    """Read a `mope.toml`; relative paths in it are relative to the file. Raises ConfigError."""
    file = Path(path)
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"there is no configuration file {str(path)!r}",
            hint="Check the path, or leave --config out to use the zoo.",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration file {str(path)!r} cannot be read: {error}") from None
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:  # also numbers of thousands of digits
        raise ConfigError(f"{str(path)!r} is not valid TOML: {error}", hint="Look at the line named above.") from None
    return parse_config(data, source=str(path), directory=file.resolve().parent)


def parse_config(data: Mapping[str, Any], *, source: str = "configuration", directory: Path | None = None) -> Config:
    """Validate `data`, the content of a `mope.toml`. Raises ConfigError with the first thing that is wrong."""
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        raise _explain(error, source) from None
    return config if directory is None else _anchor(config, directory)


def _anchor(config: Config, directory: Path) -> Config:
    """Make the relative paths of `config` absolute."""

    def anchored(path: str | None) -> str | None:
        # A name without a file beside the configuration may be a hub name: leave it as it is.
        if path is None or not (directory / Path(path).expanduser()).exists():
            return path
        return str((directory / Path(path).expanduser()).resolve())

    experts = tuple(
        expert.model_copy(
            update={
                "tokenizer": anchored(expert.tokenizer),
                "model": anchored(expert.model) if expert.provider == "local" else expert.model,
            }
        )
        for expert in config.experts
    )
    dimensions = {
        name: section
        if section.reward is None
        else section.model_copy(
            update={
                "reward": section.reward.model_copy(
                    update={
                        "path": anchored(section.reward.path),
                        "tokenizer": anchored(section.reward.tokenizer),
                    }
                )
            }
        )
        for name, section in config.dimensions.items()
    }

    def placed(path: str | None) -> str | None:
        return None if path is None else str(directory / Path(path).expanduser())

    return config.model_copy(
        update={
            "experts": experts,
            "dimensions": dimensions,
            "pcm": config.pcm.model_copy(
                update={"path": anchored(config.pcm.path), "backbone": anchored(config.pcm.backbone)}
            ),
            "cache": config.cache.model_copy(update={"path": placed(config.cache.path)}),
            "logs": config.logs.model_copy(update={"path": placed(config.logs.path)}),
            "train": config.train.model_copy(
                update={"prompts": placed(config.train.prompts), "output_dir": placed(config.train.output_dir)}
            ),
        }
    )


def _explain(error: ValidationError, source: str) -> ConfigError:
    found_errors = error.errors()
    # A misspelt key is also a missing one: the spelling is what helps.
    first = next((one for one in found_errors if one["type"] == "extra_forbidden"), found_errors[0])
    where = ".".join(str(part) for part in first["loc"]) or "the file"
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        nearest = difflib.get_close_matches(key, _known_keys(first["loc"][:-1]), n=1, cutoff=0.5)
        return ConfigError(
            f"{source}: unknown key {where!r}", hint=f"Did you mean {nearest[0]!r}?" if nearest else None
        )
    if first["type"] == "missing":
        return ConfigError(f"{source}: {where!r} is missing")
    message = first["msg"].removeprefix("Value error, ")
    found = first.get("input")
    shown = f" (found {found!r})" if isinstance(found, str | int | float | bool) else ""
    return ConfigError(f"{source}: {where}: {message[:1].lower()}{message[1:]}{shown}")


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    if location[:1] == ("dimensions",) and location[2:] == ("reward",):
        return list(RewardConfig.model_fields)
    sections: dict[str, type[BaseModel]] = {
        "experts": ExpertConfig,
        "dimensions": DimensionConfig,
        "pcm": PcmConfig,
        "merge": MergeConfig,
        "decoding": DecodingConfig,
        "budget": BudgetConfig,
        "cache": CacheConfig,
        "train": TrainConfig,
        "server": ServerConfig,
        "logs": LogsConfig,
    }
    model = sections.get(str(location[0]), Config) if location else Config
    return list(model.model_fields)


def resolve_home() -> Path:
    """The folder of everything mope-bb keeps for this user: `MOPE_BB_HOME`, else the user's cache folder."""
    if chosen := os.environ.get("MOPE_BB_HOME"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mope-bb"
