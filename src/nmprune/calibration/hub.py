"""Source `hf:DATASET`: a text data set from the Hugging Face cache, else from the hub. Runs no code from the hub.

`datasets` is optional (`pip install 'nmprune[data]'`) and slow to import, so it is imported on use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from nmprune.calibration.columns import text_column
from nmprune.calibration.text import Purpose, Text
from nmprune.errors import InputError, near_matches

HUB_TIMEOUT = 5.0  # seconds for the hub's first answer
MAX_DOWNLOAD = 4 << 30  # bytes: enough for any calibration, and it stops `hf:allenai/c4:en` at 300 GB

_WAY_OUT = "Load it once where there is network and copy the cache ($HF_HOME), or give a text file, or use `builtin`."
_SPLITS = ("train", "validation", "valid", "dev", "test")
_SPLIT_FOR: dict[Purpose, tuple[str, ...]] = {
    "calibration": ("train",),
    "choose": ("validation", "valid", "dev"),
    "evaluation": ("test", "validation", "valid", "dev"),
}


def load(argument: str, purpose: Purpose) -> Text:
    """`DATASET[:CONFIG][:SPLIT][#COLUMN]`. One part alone is a split if it is called like one, else a config.

    Without a split: train to calibrate, test (else validation) to evaluate, validation to choose.

    Raises:
        InputError: badly written, not found, unreachable, no such config, split or column, or nothing but blank rows.
    """
    place = f"hf:{argument}"
    spec, _, column = argument.partition("#")
    dataset, *parts = spec.split(":")
    if not dataset or len(parts) > 2:
        raise InputError(
            f"text source {place}: expected hf:DATASET[:CONFIG][:SPLIT], "
            "for example hf:Salesforce/wikitext:wikitext-2-raw-v1:test."
        )
    if len(parts) == 1 and parts[0] in _SPLITS:
        parts.insert(0, "")
    config, split = [part or None for part in (*parts, "", "")[:2]]
    rows, found = fetch(dataset, config, (split,) if split else _SPLIT_FOR[purpose])
    strings = [
        name for name, feature in rows.features.items() if getattr(feature, "dtype", "") in ("string", "large_string")
    ]
    wanted = text_column(place.partition("#")[0], column or None, rows.column_names, strings)
    documents = tuple(document for document in rows[wanted] if document and document.strip())
    if not documents:
        raise InputError(f"{place}: column {wanted!r} of split {found!r} holds no text. Name another column or split.")
    return Text(dataset if config is None else f"{dataset}:{config}", found, documents)


def fetch(
    dataset: str,
    config: str | None,
    splits: Sequence[str],
    *,
    way_out: str = _WAY_OUT,
) -> tuple[Any, str]:
    """The first of `splits` that the data set has, as a `datasets.Dataset`, and its name. Cache first, then the hub.

    `way_out` ends the message where the data set is neither in the cache nor to be had.

    Raises:
        InputError: `datasets` is not installed, or the data set cannot be had; within seconds without a network.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"data set {dataset} needs the package `datasets`: pip install 'nmprune[data]'. {way_out}"
        ) from error
    parts, why_not_cached = _from_cache(datasets, dataset, config)
    if parts is None:
        _check_reachable(dataset, f"not in the Hugging Face cache ({why_not_cached})", way_out)
        parts = _from_hub(datasets, dataset, config)
    for split in splits:
        if split in parts:
            return parts[split], split
    wanted = " or ".join(repr(split) for split in splits)
    raise InputError(
        f"data set {dataset}: no split {wanted}. {near_matches(splits[0], parts)} "
        f"Name one: hf:{dataset}:{config or ''}:SPLIT."
    )


def _from_cache(datasets: ModuleType, dataset: str, config: str | None) -> tuple[Any | None, str]:
    """All splits, or None and why not. Offline mode keeps `datasets` from asking the hub (23 s of retries) first."""
    with _offline(datasets):
        try:
            return datasets.load_dataset(dataset, config), ""
        except Exception as error:  # the library raises a dozen types here; each means: not in the cache
            return None, _first_line(error)


@contextmanager
def _offline(datasets: ModuleType) -> Iterator[None]:
    """`datasets` in offline mode and silent about it. It reads this flag at each call and offers no argument for it."""
    offline, verbosity = datasets.config.HF_HUB_OFFLINE, datasets.logging.get_verbosity()
    datasets.config.HF_HUB_OFFLINE = True
    datasets.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
        datasets.logging.set_verbosity(verbosity)


def _check_reachable(dataset: str, not_cached: str, way_out: str) -> None:
    """One question with a time limit: `load_dataset` itself would retry for most of a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        HfApi().dataset_info(dataset, timeout=HUB_TIMEOUT)
    except RepositoryNotFoundError as error:
        raise InputError(
            f"data set {dataset}: not on the hub, or not open to you ({_first_line(error)}). "
            "Check the name; for a gated one run `hf auth login`."
        ) from error
    except Exception as error:  # no network shows as errors of httpx, ssl, socket or the hub's own client
        raise InputError(
            f"data set {dataset}: {not_cached}, and the hub cannot be reached "
            f"({type(error).__name__}: {_first_line(error)}). {way_out}"
        ) from error


def _from_hub(datasets: ModuleType, dataset: str, config: str | None) -> Any:
    try:
        size = datasets.load_dataset_builder(dataset, config).info.download_size or 0
        if size <= MAX_DOWNLOAD:
            return datasets.load_dataset(dataset, config)
    except Exception as error:  # unknown config, a script data set, a broken download: all are the library's own types
        raise InputError(
            f"data set {dataset}: could not be loaded ({type(error).__name__}: {_first_line(error)})."
        ) from error
    raise InputError(
        f"data set {dataset}: the download is {size / 2**30:.0f} GiB; the limit is {MAX_DOWNLOAD >> 30} GiB. "
        "Choose a smaller config, or download one file of it and give that file."
    )


def fetch_file(dataset: str, file: str, way_out: str) -> Path:
    """One file of a data set, from the hub's cache, else from the hub. Needs no `datasets`.

    Raises:
        InputError: it cannot be had; the message ends with `way_out`.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(dataset, file, repo_type="dataset", local_files_only=True))
    except LocalEntryNotFoundError:
        _check_reachable(dataset, f"{file} is not in the Hugging Face cache", way_out)
    try:
        return Path(hf_hub_download(dataset, file, repo_type="dataset"))
    except Exception as error:  # a download broken off, a full disk, a file that is gone: the library's own types
        raise InputError(
            f"data set {dataset}: {file} could not be loaded ({type(error).__name__}: {_first_line(error)}). {way_out}"
        ) from error


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
