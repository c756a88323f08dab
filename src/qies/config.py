"""Configuration as data: frozen dataclasses, strict YAML in and out, a content hash. Imports no torch.

A key or a value that is not known is an error that names the nearest right one; nothing is ignored.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from qies import plugins as extensions
from qies import storage, strict_yaml
from qies.errors import UserError, unknown

C = TypeVar("C")

INDUCTION_ONSET = 0.5  # nats per token gained on a repeated random segment: in-context copying has set in from here on

TERMS = ("far_future", "entropy_floor", "long_context", "multi_token")  # of the objective, beside the cross-entropy

BRANCHES_ANNEAL = "left out where there are branches: its weights fall with the fraction of a budget"

COUNT = {"count": True}  # tokens: 1m is 1_000_000 there
LATER = {"later": True}  # a field that earlier configurations lack: at its default it leaves `content_hash` as it was
WHERE = {"where": True}  # where code is found, which `content_hash` does not cover, as it does not cover this package's


def _require(ok: bool, name: str, value: Any, wanted: str) -> None:
    if not ok:
        raise UserError(f"{name} is {value!r}; it must be {wanted}.")


def _choice(name: str, value: str, options: Collection[str]) -> None:
    if value not in options:
        raise unknown("value", value, options, where=f"for {name}")


@dataclass(frozen=True)
class DataConfig:
    """What text a model sees. `source`: "builtin", "builtin-stories", "registry", "registry-dedup", "hub:..." or a path
    to a file, folder or glob.

    `hash` identifies what is at a path (see `qies.data.locate`). Where it is known the path is no part of a run's
    identity: the same text found elsewhere is the same run.
    """

    source: str = "builtin"
    vocab_size: int = 4096
    val_fraction: float = 0.03
    seed: int = 0
    hash: str = field(default="", metadata=LATER)

    def __post_init__(self) -> None:
        if not self.source.strip():
            raise UserError('data.source is empty; give "builtin", "registry", "hub:OWNER/NAME" or a path.')
        _require(256 < self.vocab_size <= 2**31, "data.vocab_size", self.vocab_size, "an integer above 256")
        _require(0 < self.val_fraction < 0.5, "data.val_fraction", self.val_fraction, "a number in (0, 0.5)")


@dataclass(frozen=True)
class TrainConfig:
    """How one run is trained. The learning rates multiply those that `presets.hyperparameters` gives for a size."""

    seq_len: int = 512
    batch_size: int = 8  # sequences a step
    lr_scale: float = 1.0
    weight_decay: float = 0.01
    warmup: float = 0.02  # fraction of the steps
    decay: float = 0.4  # fraction of the steps, at the end, down to zero
    clip_norm: float = 1.0
    max_skipped: int = 10  # non-finite steps left out before the run counts as diverged
    eval_tokens: int = field(default=262_144, metadata=COUNT)  # of the held-out text, at the end; 0 means all of it
    precision: str = "auto"  # auto: bf16 autocast where the processor has bf16 matrix units, else fp32
    save_every: int = 200  # steps between resumable checkpoints
    keep: int = field(default=2, metadata=LATER)  # newest checkpoints that stay
    milestones: tuple[int, ...] = field(default=(), metadata=LATER)  # steps whose checkpoints stay for good
    branches: tuple[int, ...] = field(default=(), metadata=LATER | COUNT)  # token budgets of runs that branch off
    warmup_tokens: int = field(default=0, metadata=LATER | COUNT)  # free of the budget; 0: the fraction `warmup`
    accumulate: int = field(default=1, metadata=LATER)  # micro-batches a step, on every process
    muon_precision: str = field(default="bf16", metadata=LATER)  # of the Newton-Schulz products: bf16 or fp32
    recompute: bool = field(default=False, metadata=LATER)  # activation checkpointing: less memory, a forward more

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch_size", "max_skipped", "save_every", "keep", "accumulate"):
            _require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "an integer of at least 1")
        _require(self.lr_scale > 0, "train.lr_scale", self.lr_scale, "a positive number")
        _require(self.clip_norm > 0, "train.clip_norm", self.clip_norm, "a positive number")
        for name in ("milestones", "branches"):
            values = getattr(self, name)
            _require(all(v >= 1 for v in values), f"train.{name}", list(values), "a list of integers of at least 1")
        _require(self.warmup_tokens >= 0, "train.warmup_tokens", self.warmup_tokens, "0 or a positive integer")
        _require(self.batch_size % self.accumulate == 0, "train.accumulate", self.accumulate, "a divisor of batch_size")
        _require(self.eval_tokens >= 0, "train.eval_tokens", self.eval_tokens, "0 (all) or a positive integer")
        for name in ("warmup", "decay"):
            _require(0 <= getattr(self, name) <= 1, f"train.{name}", getattr(self, name), "a fraction in [0, 1]")
        _require(self.warmup + self.decay <= 1, "train.warmup + train.decay", self.warmup + self.decay, "at most 1")
        _choice("train.muon_precision", self.muon_precision, ("bf16", "fp32"))
        _choice("train.precision", self.precision, ("auto", "bf16", "fp32"))


@dataclass(frozen=True)
class ObjectiveConfig:
    """The weights of the terms beside the cross-entropy, 0 for none, and their settings (docs/objective.md)."""

    far_future: float = 0.0  # the bag of distant tokens, from the state's read-outs alone
    far_future_gap: int = 8  # tokens left out
    far_future_window: int = 64  # tokens of the bag, after the gap
    far_future_rank: int = 32  # of the head
    far_future_stride: int = 8  # tokens from one predicted bag to the next
    entropy_floor: float = 0.0  # relu(S_min - S2)^2 of the states at the ends of chunks
    entropy_floor_level: float = 0.5  # S_min, as a fraction of log min(m, V)
    entropy_floor_chunk: int = 128  # tokens
    long_context: float = 0.0  # LongCE: at 1 each token weighs exp(what distant content gains), clipped
    long_context_window: int = 64  # tokens; a short context has up to twice as many
    long_context_clip: float = 5.0  # the largest weight
    multi_token: float = 0.0  # cross-entropy of the tokens after the next
    multi_token_ahead: int = 1  # how many of them
    until: float = 2 / 3  # fraction of training at which the weights, falling linearly, reach zero

    def __post_init__(self) -> None:
        for name in TERMS:
            value = getattr(self, name)
            _require(0 <= value < math.inf, f"objective.{name}", value, "0 (off) or a positive number")
        for name in ("window", "rank", "stride"):
            key, value = f"objective.far_future_{name}", getattr(self, f"far_future_{name}")
            _require(value >= 1, key, value, "an integer of at least 1")
        for name in ("entropy_floor_chunk", "long_context_window", "multi_token_ahead"):
            _require(getattr(self, name) >= 1, f"objective.{name}", getattr(self, name), "an integer of at least 1")
        _require(self.far_future_gap >= 0, "objective.far_future_gap", self.far_future_gap, "0 or a positive integer")
        _require(1 <= self.long_context_clip < math.inf, "objective.long_context_clip", self.long_context_clip,
                 "a number of at least 1")  # fmt: skip
        for name in ("entropy_floor_level", "until"):
            _require(0 < getattr(self, name) <= 1, f"objective.{name}", getattr(self, name), "a fraction in (0, 1]")

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of the terms with a weight."""
        return tuple(name for name in TERMS if getattr(self, name))

    def factor(self, progress: float) -> float:
        """What all weights are multiplied by after the fraction `progress` of training."""
        return max(0.0, 1 - progress / self.until)

    def context(self) -> dict[str, int]:
        """The fewest tokens of a sequence in which each term has something to compute, by the setting to lower."""
        least = {
            "far_future": ("far_future_window", self.far_future_gap + self.far_future_window),
            "long_context": ("long_context_window", 2 * self.long_context_window + 1),
            "multi_token": ("multi_token_ahead", self.multi_token_ahead + 1),
        }
        return {f"objective.{least[t][0]}": least[t][1] for t in self.terms if t in least}


@dataclass(frozen=True)
class RunConfig:
    """One run: everything that decides its result. `model` overrides fields of the arm's `QiesConfig`.

    `size` becomes its shortest spelling, so that 50K and 0.05m are the run of 50k.
    """

    arm: str = "qies"
    size: str = "100k"
    tokens: int = field(default=1_000_000, metadata=COUNT)
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    model: dict[str, Any] = field(default_factory=dict)
    plugins: tuple[str, ...] = field(default=(), metadata=WHERE)  # modules that register the arm and its mixers
    objective: ObjectiveConfig = field(default=ObjectiveConfig(), metadata=LATER)

    def __post_init__(self) -> None:
        from qies import presets

        extensions.load(self.plugins)
        presets.find_arm(self.arm)
        object.__setattr__(self, "size", presets.size_name(presets.parse_size(self.size)))
        least = self.train.seq_len * self.train.batch_size
        _require(-(2**63) <= self.seed < 2**63, "seed", self.seed, "an integer of 64 bits")
        _require(self.tokens >= least, "tokens", self.tokens, f"at least one batch ({least})")
        _require(
            self.warmup_steps <= self.decay_start, "train.warmup_tokens", self.train.warmup_tokens,
            f"at most the {self.decay_start * least:,} tokens before the decay",
        )  # fmt: skip
        for key, tokens in self.objective.context().items():
            if tokens > self.train.seq_len:
                raise UserError(
                    f"train.seq_len is {self.train.seq_len}, but the objective needs {tokens} tokens; lower {key}."
                )
        if self.train.branches:
            _require(not self.objective.terms, "objective", "set", BRANCHES_ANNEAL)
            _require(self.train.warmup_tokens > 0, "train.warmup_tokens", 0, "set where there are branches")
            for tokens in self.train.branches:
                branch = dataclasses.replace(self, tokens=tokens, train=dataclasses.replace(self.train, branches=()))
                _require(
                    branch.decay_start <= self.decay_start, "train.branches", list(self.train.branches),
                    f"budgets of which the decay starts before that of this run (step {self.decay_start})",
                )  # fmt: skip

    def settings(self, vocab_size: int) -> dict[str, Any]:
        """The fields of the model's `QiesConfig`; `objective` is one of them where it has terms."""
        from qies import presets

        values = presets.settings(self.arm, self.size, vocab_size, **self.model)
        return values | {"objective": dataclasses.asdict(self.objective)} if self.objective.terms else values

    def __reduce__(self) -> tuple[Any, ...]:
        return from_dict, (RunConfig, to_dict(self))  # so that a process that unpickles it imports its plugins

    @property
    def steps(self) -> int:
        return self.tokens // (self.train.seq_len * self.train.batch_size)

    @property
    def warmup_steps(self) -> int:
        if self.train.warmup_tokens:
            return round(self.train.warmup_tokens / (self.train.seq_len * self.train.batch_size))
        return round(self.train.warmup * self.steps)

    @property
    def decay_steps(self) -> int:
        return round(self.train.decay * self.steps)

    @property
    def decay_start(self) -> int:
        return self.steps - self.decay_steps

    @property
    def milestones(self) -> set[int]:
        """Steps whose checkpoints stay: the chosen ones, and where the decay of each branch starts."""
        plain = dataclasses.replace(self.train, branches=())
        starts = (dataclasses.replace(self, tokens=t, train=plain).decay_start for t in self.train.branches)
        return {*self.train.milestones, *starts}


@dataclass(frozen=True)
class StudyConfig:
    """A grid of runs (arms x sizes x seeds) on one corpus, and what is reported about it.

    With `variants` a sweep: every run of the grid once for each of them, a mapping of dotted keys of a run to values,
    such as {"train.lr_scale": 0.5} or {"model.position": "rope", "model.rope_theta": 1e6}. `{}` is the run as it is.
    """

    name: str = "study"
    arms: tuple[str, ...] = ("transformer", "qies", "no_phase")
    sizes: tuple[str, ...] = ("50k", "100k", "200k", "400k")
    seeds: tuple[int, ...] = (0,)
    tokens_per_parameter: float | tuple[float, ...] = 6.0  # a list: several budgets a size
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    model: dict[str, Any] = field(default_factory=dict)
    variants: tuple[dict[str, Any], ...] = field(default=(), metadata=LATER)  # each: keys of a run and their values
    plugins: tuple[str, ...] = field(default=(), metadata=WHERE)  # as of every run
    objective: ObjectiveConfig = field(default=ObjectiveConfig(), metadata=LATER)
    workers: int = 0  # runs side by side; 0: one a core, each with one thread
    prompts: tuple[str, ...] = (
        "The people of the United States",
        "And the king said unto him,",
        "Returns the value of",
    )
    analyses: tuple[str, ...] = field(default=("builtin",), metadata=LATER)  # in the order of the page (qies.analyses)

    def __post_init__(self) -> None:
        from qies import presets

        extensions.load(self.plugins)
        for arm in self.arms:
            presets.find_arm(arm)
        object.__setattr__(self, "sizes", tuple(presets.size_name(presets.parse_size(s)) for s in self.sizes))
        for name, values in {**{k: getattr(self, k) for k in ("arms", "sizes", "seeds")},
                             "tokens_per_parameter": self.budgets}.items():  # fmt: skip
            _require(len(values) > 0, name, values, "a list of at least one")
            _require(len(set(values)) == len(values), name, list(values), "a list without repeats")
        for budget in self.budgets:
            _require(budget > 0, "tokens_per_parameter", budget, "a positive number")
        _require(self.workers >= 0, "workers", self.workers, "0 (one a core) or a positive integer")
        _require(
            bool(self.name) and self.name.replace("-", "").replace("_", "").isalnum(),
            "name",
            self.name,
            "letters, digits, - and _ only",
        )
        self._check_variants()

    def _check_variants(self) -> None:
        """Raise UserError where a variant sets what the grid sets, or makes the runs of another one."""
        seen: list[tuple[dict[str, Any], RunConfig]] = []
        for variant in self.variants:
            for key in variant:
                if key in ("arm", "size", "seed", "tokens"):
                    raise UserError(f"A variant cannot set '{key}': it is an axis of the grid; list its values there.")
                if key in ("train", "model", "objective"):
                    raise UserError(f"A variant sets '{key}' as a whole; name single keys, such as '{key}.KEY'.")
                if key.partition(".")[0] == "data":
                    raise UserError(
                        f"A variant cannot set '{key}': a ladder trains on one corpus; make a ladder for each corpus, "
                        "and give qies ladder sweep the folder that holds them."
                    )
            plain = RunConfig(
                tokens=2**62, data=self.data, train=self.train, model=dict(self.model), plugins=self.plugins,
                objective=self.objective,
            )  # fmt: skip
            run = override(plain, variant)
            for other, same in seen:
                if same == run:
                    raise UserError(f"The variants {other} and {variant} are the same runs; keep one of them.")
            seen.append((variant, run))

    @property
    def budgets(self) -> tuple[float, ...]:
        """Tokens a parameter, one number a budget."""
        given = self.tokens_per_parameter
        return given if isinstance(given, tuple) else (given,)

    def runs(self) -> list[RunConfig]:
        """Every run of the grid, by size, budget, seed and arm."""
        from qies import presets

        step = self.train.seq_len * self.train.batch_size
        out = []
        for size in sorted(self.sizes, key=presets.parse_size):
            budgets = [max(1, round(presets.parse_size(size) * b / step)) * step for b in self.budgets]
            _require(len(set(budgets)) == len(budgets), f"tokens of size {size}", budgets, "different for each budget")
            for tokens, seed, arm in itertools.product(budgets, self.seeds, self.arms):
                run = RunConfig(
                    arm, size, tokens, seed, self.data, self.train, dict(self.model), self.plugins, self.objective
                )
                out += [override(run, variant) for variant in self.variants or ({},)]
        return out


def override(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The run with the values of some dotted keys replaced. Raises UserError as `from_dict` does."""
    plain = to_dict(config)
    for key, value in values.items():
        _set(plain, key, value)
    return from_dict(RunConfig, plain)


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain JSON/YAML data."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def content_hash(config: Any) -> str:
    """Sixteen hex digits that identify a configuration's content (order of keys does not matter)."""
    text = json.dumps(_hashed(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _hashed(config: Any) -> Any:
    """The values that `content_hash` covers: not later fields at their defaults, nor where code is found, nor paths to
    text of known hash."""
    if not dataclasses.is_dataclass(config):
        return config
    fields = dataclasses.fields(config)
    values = {f.name: getattr(config, f.name) for f in fields}
    as_before = {f.name for f in fields if f.metadata.get("later") and values[f.name] == f.default}
    as_before |= {f.name for f in fields if f.metadata.get("where")}
    if isinstance(config, DataConfig) and config.hash:
        as_before.add("source")
    return {name: _hashed(value) for name, value in values.items() if name not in as_before}


def from_dict(cls: type[C], values: Mapping[str, Any], where: str = "") -> C:
    """Build the dataclass `cls` from plain data, strictly.

    Raises UserError for an unknown key (with the nearest known one) or a value of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where or 'the configuration'} must be a mapping, not {type(values).__name__}.")
    hints = typing.get_type_hints(cls)
    counts = {f.name for f in dataclasses.fields(cls) if f.metadata.get("count")}  # type: ignore[arg-type]
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in known:
            raise unknown("key", key, known, where=f"in {where}" if where else "")
    values = {k: _counted(v, f"{prefix}{k}") if k in counts else v for k, v in values.items()}
    return cls(**{k: _convert(hints[k], v, f"{prefix}{k}") for k, v in values.items()})


def _counted(value: Any, where: str) -> Any:
    """A number of tokens, or a list of them, with text such as 1m as a number."""
    from qies import presets

    if isinstance(value, list):
        return [_counted(v, where) for v in value]
    return presets.parse_count(value, where) if isinstance(value, str) else value


def load(cls: type[C], path: str | Path, overrides: Sequence[str] = (), options: Mapping[str, Any] | None = None) -> C:
    """Read a YAML file, whose `data.source` is relative to its folder, and `merge` overrides and options into it."""
    path = Path(os.path.expanduser(path))
    values = read(path)
    data = values.get("data")
    data = data if isinstance(data, dict) else {}
    source = data.get("source")
    if isinstance(source, str) and source and is_path(source):
        values["data"] = {**data, "source": str(path.absolute().parent / os.path.expanduser(source))}
    return from_dict(cls, merge(values, overrides, options))


def is_path(source: str) -> bool:
    """Whether the source of a text is a path, and no name."""
    return source.partition(":")[0] not in ("builtin", "builtin-stories", "registry", "registry-dedup", "hub")


def recorded(config: RunConfig) -> dict[str, Any]:
    """The run as plain data for its record: text known by its hash is named without the folder where it was found."""
    out = to_dict(config)
    if config.data.hash:
        kind, colon, rest = config.data.source.partition(":")
        named = kind == "hub" and bool(colon)  # hub:PATH or hub:PATH:NAME, a folder laid out as the hub's are
        path, more, name = rest.partition(":") if named else (config.data.source, "", "")
        out["data"]["source"] = f"{'hub:' if named else ''}{os.path.basename(path.rstrip('/'))}{more}{name}"
    return out


def read(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file. Raises UserError where it holds none."""
    if not path.is_file():
        raise UserError(f"No configuration file at {path}. Give the path of a YAML file.")
    if path.stat().st_size > 1_000_000:
        raise UserError(f"{path} is larger than 1 MB, which no configuration is.")
    try:
        values = strict_yaml.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:  # UnicodeDecodeError is one
        raise UserError(f"{path} is not valid YAML: {e}") from None
    if not values and not isinstance(values, list):
        raise UserError(f"{path} is empty; write at least one key and its value into it.")
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys and values, not a {type(values).__name__}.")
    return values


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Command-line words as (files, overrides): an override is `key.sub=value`, unless a file has that name."""
    files = [w for w in words if not re.match(r"[A-Za-z_][\w.]*=", w) or os.path.isfile(os.path.expanduser(w))]
    return files, [w for w in words if w not in files]


def merge(
    values: Mapping[str, Any], overrides: Sequence[str], options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Apply dotted overrides such as `train.seq_len=256`, whose values are read as YAML, to plain data.

    `options` are keys that command-line options have set already, as --data sets data.source. Raises UserError for an
    override of another form, without a value, or of a key that an option or another override sets.
    """
    out: dict[str, Any] = copy.deepcopy(dict(values))
    by = {key: f"--{key.partition('.')[0]}" for key in options or {}}
    for key, value in (options or {}).items():
        _set(out, key, value)
    for item in overrides:
        key, eq, text = item.partition("=")
        if not eq or not key:
            raise UserError(f"Override '{item}' is not of the form key.sub=value.")
        if not text.strip():
            raise UserError(f"Override '{item}' has no value; write {key}=VALUE or leave it out.")
        for other, what in by.items():
            if f"{other}.".startswith(f"{key}.") or f"{key}.".startswith(f"{other}."):
                raise UserError(f"{what} and the override '{item}' set the same key; give one of them.")
        try:
            value = strict_yaml.loads(text)
        except ValueError:
            raise UserError(f"Override '{item}' has a value that is not valid YAML.") from None
        by[key] = f"The override '{item}'"
        _set(out, key, value)
    return out


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted `key` of nested plain data."""
    *parents, last = key.split(".")
    for part in parents:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise UserError(f"'{key}={value}' goes below '{part}', which holds a plain value.")
    values[last] = value


def to_yaml(config: Any) -> str:
    """A configuration as YAML."""
    return strict_yaml.dumps(to_dict(config))


def save(config: Any, path: Path) -> None:
    """Write a configuration as YAML, atomically."""
    storage.write_text(path, to_yaml(config))


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The `differences` of two runs or studies.

    Their text is compared by its hash where both have one, and else by its path, of which a record with a hash holds
    only the last part.
    """
    pair = [dict(values) for values in (old, new)]
    data = [dict(values["data"]) if isinstance(values.get("data"), Mapping) else {} for values in pair]
    known = all(part.get("hash") for part in data)
    name_only = bool(data[0].get("hash")) and not known
    for values, part in zip(pair, data, strict=True):
        source = part.get("source", "")
        part.pop("source" if known else "hash", None)
        if not known and isinstance(source, str) and is_path(source):
            path = os.path.abspath(os.path.expanduser(source))
            part["source"] = os.path.basename(path) if name_only else path
        values["data"] = part
    return differences(pair[0], pair[1])


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines `key: old -> new` for every leaf in which two plain configurations differ."""
    out: list[str] = []
    for key in sorted({*old, *new}):
        a, b = old.get(key, "absent"), new.get(key, "absent")
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            out.append(f"{prefix}{key}: {a} -> {b}")
    return out


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return from_dict(kind, value, where)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise UserError(f"{where} must be a list, not {value!r}.")
        return tuple(_convert(typing.get_args(kind)[0], v, where) for v in value)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(kind)
        if value is None and type(None) in options:
            return None
        listed = isinstance(value, Sequence) and not isinstance(value, str)
        wanted = [o for o in options if o is not type(None)]
        return _convert(next((o for o in wanted if listed == (typing.get_origin(o) is tuple)), wanted[0]), value, where)
    if origin is dict or kind is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{where} must be a mapping, not {value!r}.")
        return dict(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        hint = f" Write '{value}' in quotes." if kind is str and value is not None else ""
        raise UserError(f"{where} must be of type {kind.__name__}, not {value!r}.{hint}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{where} must be a finite number, not {value}.")
    return value
