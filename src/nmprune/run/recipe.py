"""A recipe says *what* is done: YAML <-> dataclasses, every fault reported at once. Machine flags are not part of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from nmprune.errors import InputError, near_matches
from nmprune.methods import Method, create, find
from nmprune.methods.base import WholeModel
from nmprune.pattern import Pattern
from nmprune.prepare.choices import Choice
from nmprune.refine import Polish, Reconstruct
from nmprune.run.allocate_recipe import NOT_MIXED, AllocateRecipe
from nmprune.run.loss_aware import LossAware
from nmprune.run.permute_recipe import kinds_of, permute_faults
from nmprune.run.pruner import learner_faults, pruner_of
from nmprune.run.train_recipe import train_faults, train_of, train_words
from nmprune.stats import GRADIENTS
from nmprune.train.finetune_settings import FinetuneRecipe
from nmprune.train.settings import TrainRecipe

DTYPES = ("auto", "float32", "bfloat16", "float16")
PROPAGATE = ("pruned", "dense")
OPTIONAL = {"polish": Polish, "reconstruct": Reconstruct, "loss_aware": LossAware}  # absent, or with their settings


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class CalibrationRecipe:
    """The text that calibrates."""

    source: str = _option("builtin", "builtin, wikitext2, c4, hf:DATASET, or a .txt, .jsonl or .parquet file")
    n_sequences: int = _option(32, "token windows")
    seq_len: int = _option(512, "tokens per window")
    n_held_out: int = _option(
        0, "of these, windows that reconstruct judges by and does not solve on; 0 = one in 16, at least 1"
    )


@dataclass(frozen=True)
class StreamRecipe:
    """How hidden states flow; it can change the masks, so it belongs to the recipe."""

    propagate: str = _option("pruned", "which layer feeds the next: pruned or dense")
    true_sequential: bool = _option(
        False, "inside a layer, observe each input only after the linears before it are pruned"
    )
    batch_size: int = _option(0, "sequences per forward; 0 = about 2048 tokens")
    min_expert_tokens: int = _option(
        32, "an expert that saw fewer tokens is pruned by magnitude, and the record says so"
    )
    sum_segments: int = _option(
        8, "statistics are added up over so many segments of the text: as many processes can share the run"
    )


@dataclass(frozen=True)
class Recipe:
    """One pruning run, whole.

    Attributes hold exactly what recipe.yaml holds. `method` is the method with its hyper-parameters.

    Raises:
        InputError: the method does not support the pattern, or a number is out of range; all faults at once.
    """

    model: str
    method: Method
    pattern: Pattern
    exclude: tuple[str, ...] = ()
    calibration: CalibrationRecipe = CalibrationRecipe()
    seed: int = 0
    stream: StreamRecipe = StreamRecipe()
    dtype: str = "auto"
    trust_remote_code: bool = False
    allow_sparse: bool = False
    allocate: AllocateRecipe = NOT_MIXED
    permute: tuple[str, ...] = ()
    polish: Polish | None = None
    reconstruct: Reconstruct | None = None
    loss_aware: LossAware | None = None
    finetune: FinetuneRecipe | None = None
    train: TrainRecipe = field(default_factory=TrainRecipe)

    @property
    def pruner(self) -> Method:
        """The method, and what follows it."""
        return pruner_of(self.method, self.polish, self.reconstruct)

    @property
    def gradient_pass(self) -> bool:
        """Whether the loss is differentiated before the stream: for the method, or to weight tokens."""
        return bool(self.pruner.needs & GRADIENTS) or self.loss_aware is not None

    @property
    def token_blocks(self) -> int:
        """Blocks of output rows of loss-aware token weights; 0 = tokens count the same."""
        return 0 if self.loss_aware is None else self.loss_aware.blocks

    @property
    def n_held_out(self) -> int:
        """Sequences that are held out, where something asks for it."""
        return self.calibration.n_held_out or max(1, self.calibration.n_sequences // 16)

    @property
    def choices(self) -> tuple[Choice, ...]:
        """What a linear may get where patterns are mixed, sparsest first; empty where all get `pattern`."""
        return self.allocate.choices

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """Every pattern that a linear may get."""
        return tuple(choice for choice in self.choices if choice is not None) or (self.pattern,)

    @property
    def density(self) -> float:
        """Share of the prunable linears' weights that may be kept, 0..1."""
        return (self.allocate.density or self.pattern.density) if self.choices else self.pattern.density

    @property
    def pattern_words(self) -> str:
        """What the linears get, in words."""
        if not self.choices:
            return self.pattern.words
        rest = ", or dense" if None in self.choices else ""
        return f"mixed: {', '.join(one.words for one in self.patterns)}{rest}, {self.density:.2%} kept in all"

    @property
    def calibrated(self) -> bool:
        """Whether calibration tokens are needed: by the method, or to allocate patterns."""
        whole = isinstance(self.method, WholeModel)
        return bool(self.pruner.needs or self.pruner.runs_layers or self.choices or whole)

    def __post_init__(self) -> None:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        _raise_all(_contradictions(values))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, every default written out, in the order of the YAML."""
        return {
            "model": self.model,
            "method": {"name": self.method.name, **self.method.hyper_parameters()},
            "pattern": str(self.pattern),
            "exclude": list(self.exclude),
            "calibration": dataclasses.asdict(self.calibration),
            "seed": self.seed,
            "stream": dataclasses.asdict(self.stream),
            "dtype": self.dtype,
            "trust_remote_code": self.trust_remote_code,
            "allow_sparse": self.allow_sparse,
            "allocate": {**dataclasses.asdict(self.allocate), "patterns": list(self.allocate.patterns)},
            "permute": list(self.permute),
            **{key: None if (one := getattr(self, key)) is None else dataclasses.asdict(one) for key in OPTIONAL},
            **train_words(self.method, self.train),
            **({} if self.finetune is None else {"finetune": self.finetune.to_dict()}),
        }

    def to_yaml(self) -> str:
        """The text of recipe.yaml."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Build a recipe from plain data (values may be text); what is not given has its default.

        Raises:
            InputError: listing every fault: unknown keys with near matches, wrong types, missing model or method.
        """
        faults: list[str] = []
        defaults = {f.name: f.default for f in dataclasses.fields(cls)}
        faults += [f"unknown key {key!r}. {near_matches(str(key), defaults)}" for key in raw if key not in defaults]
        values: dict[str, Any] = {
            "model": _collect(faults, lambda: _model(raw.get("model"))),
            "method": _method(faults, raw.get("method")),
            "pattern": _collect(faults, lambda: Pattern.parse(str(raw.get("pattern", "2:4")))),
            "exclude": _collect(faults, lambda: _exclude(raw.get("exclude") or ())),
            "permute": kinds_of(_collect(faults, lambda: _typed("permute", raw.get("permute") or (), ())) or ()),
        }
        for key in ("calibration", "stream", "allocate"):
            values[key] = section(faults, key, type(defaults[key]), raw.get(key) or {})
        for key, step in OPTIONAL.items():
            values[key] = _optional(faults, key, step, raw.get(key))
        values["train"] = train_of(
            values["method"], raw.get("method"), raw.get("train"), partial(section, faults, "train", TrainRecipe)
        )
        values["finetune"] = _optional(faults, "finetune", FinetuneRecipe, raw.get("finetune"))
        values |= {
            key: _collect(faults, lambda key=key: _typed(key, raw.get(key, defaults[key]), defaults[key]))
            for key in ("seed", "dtype", "trust_remote_code", "allow_sparse")
        }
        _raise_all([*faults, *_contradictions(values)], where)
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: Path, settings: Sequence[str] = ()) -> Recipe:
        """Read a recipe file and apply `settings` such as "method.damping=0.05" on top.

        Raises:
            InputError: the file cannot be read, is not YAML, or the recipe has faults.
        """
        try:
            # Everything as text: YAML 1.1 would read the pattern 2:4 as the sexagesimal number 124.
            raw = yaml.load(path.read_text(), Loader=yaml.BaseLoader)
        except OSError as error:
            raise InputError(f"recipe {path}: {error.strerror}.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"recipe {path} is not YAML: {error}") from error
        if not isinstance(raw, dict):
            raise InputError(f"recipe {path} holds no keys; expected model:, method:, pattern: and so on.")
        return cls.from_dict(with_settings(raw, settings), f"recipe {path}")


def with_settings(raw: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """`raw` with "a.b=value" settings put in; "method=wanda" names the method and drops another one's settings,
    and so does "method.preset=best" with those that were given before it.

    Raises:
        InputError: a setting without "=".
    """
    result: dict[str, Any] = {key: dict(value) if isinstance(value, Mapping) else value for key, value in raw.items()}
    for setting in settings:
        path, separator, value = setting.partition("=")
        if not separator or not path:
            raise InputError(f"--set {setting!r}: expected KEY=VALUE, such as method.damping=0.05.")
        head, _, key = path.strip().partition(".")
        if not key:
            kept = head in OPTIONAL and value.lower() == "true" and isinstance(result.get(head), Mapping)
            result[head] = result[head] if kept else value  # a step that is there keeps its settings
            if head == "method":
                result.pop("train", None)  # what another method started it from
            continue
        current = result.get(head) or {}
        if head in OPTIONAL and not isinstance(current, Mapping):  # "true", as of --reconstruct, or an absent step
            current = {}
        if isinstance(current, str):
            current = {"name": current}
        if not isinstance(current, Mapping):
            raise InputError(f"--set {setting!r}: {head} is {current!r} and has no keys. Write {head}=VALUE.")
        if (head, key) == ("method", "preset"):  # it stands for all settings; those that follow it are on top
            current = {"name": current.get("name")}
            result.pop("train", None)
        result[head] = {**current, key: value}
    return result


def section(faults: list[str], name: str, kind: type, raw: Any) -> Any:
    """The dataclass `kind` from the keys under `name`; what is wrong with them is added to `faults`.

    Returns:
        A `kind`, with the default where a value is absent or cannot be used.
    """
    known = {f.name: f.default for f in dataclasses.fields(kind)}
    if not isinstance(raw, Mapping):
        faults.append(f"{name} is {raw!r}; expected keys under it: {', '.join(known)}.")
        return kind()
    faults += [f"unknown key {name}.{key}. {near_matches(str(key), known)}" for key in raw if key not in known]
    values = {
        key: _collect(faults, lambda key=key: _typed(f"{name}.{key}", raw[key], known[key]))
        for key in raw
        if key in known
    }
    return kind(**{key: value for key, value in values.items() if value is not None})


def _optional(faults: list[str], name: str, kind: type, raw: Any) -> Any:
    """A part that may be left out: None where it is absent or "false", with its defaults where it is "true"."""
    text = str(raw).lower()
    if raw is None or text in ("false", "none", "null", ""):
        return None
    return _collect(faults, lambda: section(faults, name, kind, {} if text == "true" else raw)) or kind()


def _contradictions(values: Mapping[str, Any]) -> list[str]:
    """Faults that single values of the right type can still have; a value that is None could not be read."""
    faults = []
    method, pattern, calibration, stream = (values[key] for key in ("method", "pattern", "calibration", "stream"))
    allocate_faults = values["allocate"].faults(pattern)
    chosen_from = () if allocate_faults else tuple(choice for choice in values["allocate"].choices if choice)
    faults += [
        f"method {method.name} cannot do {one}: {reason}"
        for one in chosen_from or (pattern,)
        if method is not None and one is not None and (reason := method.why_not(one)) is not None
    ]
    faults += [*allocate_faults, *permute_faults(values["permute"], values["trust_remote_code"])]
    if stream.true_sequential and stream.propagate == "dense":
        faults.append("stream.true_sequential observes pruned inputs inside a layer: it needs stream.propagate pruned.")
    faults += _step_faults(values)
    faults += train_faults(values, calibration.n_held_out or max(1, calibration.n_sequences // 16))
    faults += [] if values["finetune"] is None else [f"finetune.{fault}" for fault in values["finetune"].faults()]
    numbers = (
        ("calibration.n_sequences", calibration.n_sequences, 1),
        ("calibration.seq_len", calibration.seq_len, 2),
        ("calibration.n_held_out", calibration.n_held_out, 0),
        ("stream.batch_size", stream.batch_size, 0),
        ("stream.min_expert_tokens", stream.min_expert_tokens, 0),
        ("stream.sum_segments", stream.sum_segments, 1),
        ("seed", values["seed"], 0),
    )
    words = (("dtype", values["dtype"], DTYPES), ("stream.propagate", stream.propagate, PROPAGATE))
    faults += [
        f"{name} is {value}; expected at least {least}."
        for name, value, least in numbers
        if value is not None and value < least
    ]
    faults += [
        f"{name} is {value!r}. {near_matches(value, known)}"
        for name, value, known in words
        if value is not None and value not in known
    ]
    return faults


def _step_faults(values: Mapping[str, Any]) -> list[str]:
    """What the method and its steps ask of each other and of the stream."""
    method, calibration, stream = values["method"], values["calibration"], values["stream"]
    if method is None:
        return []
    try:
        pruner = pruner_of(method, values["polish"], values["reconstruct"])
    except InputError as error:
        return [str(error)]
    faults = learner_faults(pruner, values)
    if pruner.follows_dense and (stream.propagate == "dense" or stream.true_sequential):
        faults.append(
            f"{pruner.name} compares with the dense model's outputs, which needs stream.propagate pruned and no "
            "stream.true_sequential. Set its target to 0 to do without."
        )
    if values["loss_aware"] is not None and not pruner.needs - GRADIENTS:
        faults.append(
            f"loss_aware weights tokens in the statistics of inputs, and {pruner.name} reads none. Leave it out."
        )
    n_held_out = calibration.n_held_out or 1
    if "held_out_gram" in pruner.needs and n_held_out >= calibration.n_sequences >= 1:
        faults.append(
            f"{pruner.name} holds {n_held_out} of calibration.n_sequences {calibration.n_sequences} out: nothing is left to "
            "solve on. Give more sequences."
        )
    return faults


def _model(raw: Any) -> str:
    if not raw:
        raise InputError("model is missing: an HF folder, a hub id, a .gguf file, or smollm2-135m.")
    if isinstance(raw, Mapping | list | tuple):
        raise InputError(f"model is {raw!r}; expected one name or path.")
    return str(raw)


def _exclude(raw: Any) -> tuple[str, ...]:
    if isinstance(raw, str):
        return (raw,)
    if not isinstance(raw, Sequence) or not all(isinstance(one, str) for one in raw):
        raise InputError(f"exclude is {raw!r}; expected a list of shell patterns, such as ['*.down_proj'].")
    return tuple(raw)


def _method(faults: list[str], raw: Any) -> Method | None:
    if not raw:
        faults.append("method is missing: name one of `nmprune list`.")
        return None
    settings = dict(raw) if isinstance(raw, Mapping) else {"name": raw}
    name = settings.pop("name", None)
    if not isinstance(name, str):
        faults.append(f"method is {raw!r}; expected a name, or keys under it of which one is name.")
        return None
    if _collect(faults, lambda: find(name)) is None:
        return None
    try:
        return create(name, settings)  # together: a value may need another one beside it
    except InputError as error:
        whole = str(error)
    before = len(faults)
    for key, value in settings.items():  # one at a time, so that each fault is found
        _collect(faults, lambda key=key, value=value: create(name, {key: value}))
    faults += [whole] if len(faults) == before else []
    return None


def _typed(name: str, given: Any, default: Any) -> Any:
    kind = type(default)
    text = str(given).strip()
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind is int:
        try:
            return int(text)
        except ValueError:
            pass
    if kind is float:
        try:
            if math.isfinite(float(text)):
                return float(text)
        except ValueError:
            pass
    if kind is str and not isinstance(given, Mapping | list):
        return text
    if kind is tuple and not isinstance(given, Mapping):
        parts = map(str, given) if isinstance(given, list | tuple) else text.split(",")
        return tuple(part.strip() for part in parts if part.strip())
    words = {bool: "true or false", tuple: "a list"}.get(kind, kind.__name__)
    raise InputError(f"{name} is {given!r}; expected {words}, such as {default!r}.")


def _collect(faults: list[str], make: Any) -> Any:
    try:
        return make()
    except InputError as error:
        faults.append(str(error))
        return None


def _raise_all(faults: Sequence[str], where: str = "") -> None:
    if not faults:
        return
    lead = f"{where}: " if where else ""
    if len(faults) == 1:
        raise InputError(lead + faults[0])
    raise InputError(f"{lead}{len(faults)} faults:\n" + "\n".join(f"  - {fault}" for fault in faults))
