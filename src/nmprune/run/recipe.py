"""A recipe says *what* is done: YAML <-> dataclasses, every fault reported at once. Machine flags are not part of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nmprune.errors import InputError, near_matches
from nmprune.methods import PerLinear, create, find
from nmprune.pattern import Pattern

DTYPES = ("auto", "float32", "bfloat16", "float16")
PROPAGATE = ("pruned", "dense")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class CalibrationRecipe:
    """The text that calibrates."""

    source: str = _option("builtin", "builtin, wikitext2, c4, hf:DATASET, or a .txt, .jsonl or .parquet file")
    n_sequences: int = _option(32, "token windows")
    seq_len: int = _option(512, "tokens per window")


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


@dataclass(frozen=True)
class Recipe:
    """One pruning run, whole.

    Attributes hold exactly what recipe.yaml holds. `method` is the method with its hyper-parameters.

    Raises:
        InputError: the method does not support the pattern, or a number is out of range; all faults at once.
    """

    model: str
    method: PerLinear
    pattern: Pattern
    exclude: tuple[str, ...] = ()
    calibration: CalibrationRecipe = CalibrationRecipe()
    seed: int = 0
    stream: StreamRecipe = StreamRecipe()
    dtype: str = "auto"
    trust_remote_code: bool = False
    allow_sparse: bool = False

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
        }
        for key in ("calibration", "stream"):
            values[key] = section(faults, key, type(defaults[key]), raw.get(key) or {})
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
    """`raw` with "a.b=value" settings put in; "method=wanda" names the method and drops another one's settings.

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
            result[head] = value
            continue
        current = result.get(head) or {}
        if isinstance(current, str):
            current = {"name": current}
        if not isinstance(current, Mapping):
            raise InputError(f"--set {setting!r}: {head} is {current!r} and has no keys. Write {head}=VALUE.")
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


def _contradictions(values: Mapping[str, Any]) -> list[str]:
    """Faults that single values of the right type can still have; a value that is None could not be read."""
    faults = []
    method, pattern, calibration, stream = (values[key] for key in ("method", "pattern", "calibration", "stream"))
    if method is not None and pattern is not None and (reason := method.why_not(pattern)) is not None:
        faults.append(f"method {method.name} cannot do {pattern}: {reason}")
    if stream.true_sequential and stream.propagate == "dense":
        faults.append("stream.true_sequential observes pruned inputs inside a layer: it needs stream.propagate pruned.")
    numbers = (
        ("calibration.n_sequences", calibration.n_sequences, 1),
        ("calibration.seq_len", calibration.seq_len, 2),
        ("stream.batch_size", stream.batch_size, 0),
        ("stream.min_expert_tokens", stream.min_expert_tokens, 0),
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


def _method(faults: list[str], raw: Any) -> PerLinear | None:
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
    before = len(faults)
    for key, value in settings.items():  # one at a time, so that each fault is found
        _collect(faults, lambda key=key, value=value: create(name, {key: value}))
    return create(name, settings) if len(faults) == before else None


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
    if kind is str and not isinstance(given, Mapping | list):
        return text
    raise InputError(
        f"{name} is {given!r}; expected {'true or false' if kind is bool else kind.__name__}, such as {default!r}."
    )


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
