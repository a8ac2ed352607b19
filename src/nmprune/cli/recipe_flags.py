"""The flags that say what a run does -> a `Recipe`: of a model, or on top of a recipe file.

Every flag is None where it was not given, so that only given ones override a recipe. A new flag is a type and a field of
`RecipeFlags`: `spread` gives it to all commands.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nmprune.errors import InputError

if TYPE_CHECKING:
    from nmprune.run import Recipe

RECIPE_SUFFIXES = (".yaml", ".yml")
DEFAULT_PATTERN = "2:4"
EFFORTS, DEFAULT_EFFORT = ("fast", "good", "best"), "good"  # run.effort has the recipes; it is not imported for --help

_CALIBRATION, _STREAM, _MIXED = "Calibration text", "How hidden states flow", "Mixed patterns"
_STEPS = "After the method"

ModelOrRecipe = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|RECIPE.yaml",
        help="An HF folder, a .gguf file, a hub id (OWNER/NAME), smollm2-135m, or a recipe.",
        show_default=False,
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        help="See `nmprune list methods`. Over a recipe: its hyper-parameters are defaults again.",
        show_default="what --effort picks",
    ),
]
EffortFlag = Annotated[
    str | None,
    typer.Option(
        "--effort",
        help="Instead of a method: fast, good or best pick a recipe that was measured (docs/effort.md).",
        metavar="|".join(EFFORTS),
        show_default=f"{DEFAULT_EFFORT}, where no method is given",
    ),
]
PresetFlag = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help="The method's settings by name, such as best for maskllm; `nmprune list methods` has them.",
        show_default=False,
    ),
]
PatternFlag = Annotated[
    str | None,
    typer.Option(
        "--pattern",
        help="N:M keeps N of every M weights: 1:4 is 75 % sparse.",
        metavar="N:M",
        show_default=DEFAULT_PATTERN,
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        help="builtin, wikitext2, c4, hf:DATASET, or a .txt, .jsonl or .parquet file.",
        metavar="TEXT",
        show_default="builtin",
        rich_help_panel=_CALIBRATION,
    ),
]
NSequences = Annotated[int | None, typer.Option(help="Token windows.", show_default="32", rich_help_panel=_CALIBRATION)]
SeqLen = Annotated[
    int | None, typer.Option(help="Tokens per window.", show_default="512", rich_help_panel=_CALIBRATION)
]
Seed = Annotated[int | None, typer.Option(help="Chooses the windows.", show_default="0", rich_help_panel=_CALIBRATION)]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        help="Linears that stay dense, such as '*.down_proj'. Repeatable.", metavar="GLOB", show_default=False
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Any other setting: method.damping=0.05, stream.batch_size=4. Repeatable.",
        metavar="KEY=VALUE",
        show_default=False,
    ),
]
PolishFlag = Annotated[
    bool | None,
    typer.Option(
        "--polish/--no-polish",
        help="After the method: descent over groups from its mask. Settings: --set polish.shrinkage=0.5.",
        show_default="no",
        rich_help_panel=_STEPS,
    ),
]
ReconstructFlag = Annotated[
    bool | None,
    typer.Option(
        "--reconstruct/--no-reconstruct",
        help="After the method: the kept weights that bring the outputs back, guarded by held-out text.",
        show_default="no",
        rich_help_panel=_STEPS,
    ),
]
LossAwareFlag = Annotated[
    bool | None,
    typer.Option(
        "--loss-aware/--no-loss-aware",
        help="Tokens count by what the loss feels of them: one backward through the model first.",
        show_default="no",
        rich_help_panel=_CALIBRATION,
    ),
]
Propagate = Annotated[
    str | None,
    typer.Option(help="Which layer feeds the next: pruned or dense.", show_default="pruned", rich_help_panel=_STREAM),
]
TrueSequential = Annotated[
    bool | None,
    typer.Option(
        "--true-sequential/--no-true-sequential",
        help="Inside a layer, observe each input only after the linears before it are pruned.",
        show_default="no",
        rich_help_panel=_STREAM,
    ),
]
DType = Annotated[
    str | None,
    typer.Option(
        help="Compute dtype: auto (fp32 on a CPU, else the model's), float32, bfloat16, float16. Files keep theirs.",
        show_default="auto",
    ),
]
TrustCode = Annotated[
    bool | None,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code from the model's folder. Never done without this flag.",
        show_default=False,
    ),
]

AllowSparse = Annotated[
    bool | None,
    typer.Option("--allow-sparse", help="Take a model that is sparse already.", show_default=False),
]

Allocate = Annotated[
    str | None,
    typer.Option(
        help="Mix patterns under one budget: which linear gets which is chosen from measured errors.",
        metavar="N:M,N:M,...",
        show_default=False,
        rich_help_panel=_MIXED,
    ),
]
Permute = Annotated[
    str | None,
    typer.Option(
        help="Reorder channels first, so that N:M costs less; the model computes the same. ffn, heads, residual, or all.",
        metavar="KIND,...",
        show_default=False,
    ),
]
Density = Annotated[
    float | None,
    typer.Option(
        help="The budget: share of the prunable linears' weights that is kept.",
        show_default="the pattern's",
        rich_help_panel=_MIXED,
    ),
]
AllocateRule = Annotated[
    str | None,
    typer.Option(
        help="error: least output error; owl: layers with more outliers keep more.",
        show_default="error",
        rich_help_panel=_MIXED,
    ),
]


@dataclasses.dataclass(frozen=True)
class RecipeFlags:
    """The flags as they were given, in the order of --help; None = not given."""

    method: Method = None
    preset: PresetFlag = None
    effort: EffortFlag = None
    pattern: PatternFlag = None
    permute: Permute = None
    exclude: Exclude = None
    settings: Set = None
    dtype: DType = None
    trust_remote_code: TrustCode = None
    allow_sparse: AllowSparse = None
    polish: PolishFlag = None
    reconstruct: ReconstructFlag = None
    calibration: Calibration = None
    n_sequences: NSequences = None
    seq_len: SeqLen = None
    seed: Seed = None
    loss_aware: LossAwareFlag = None
    propagate: Propagate = None
    true_sequential: TrueSequential = None
    allocate: Allocate = None
    density: Density = None
    allocate_rule: AllocateRule = None

    @property
    def names_method(self) -> bool:
        """Whether --method or --set method=... is given; --set method.KEY=... belongs to any method."""
        return any(setting.partition("=")[0].strip() in ("method", "method.name") for setting in self.as_settings())

    def as_settings(self) -> list[str]:
        """ "key=value" for every given flag but --exclude and --effort; --set comes last and wins."""
        given = {
            "method": self.method,
            "method.preset": self.preset,
            "pattern": self.pattern,
            "calibration.source": self.calibration,
            "calibration.n_sequences": self.n_sequences,
            "calibration.seq_len": self.seq_len,
            "seed": self.seed,
            "polish": self.polish,
            "reconstruct": self.reconstruct,
            "loss_aware": self.loss_aware,
            "stream.propagate": self.propagate,
            "stream.true_sequential": self.true_sequential,
            "dtype": self.dtype,
            "trust_remote_code": self.trust_remote_code,
            "allow_sparse": self.allow_sparse,
            "permute": self.permute,
            "allocate.patterns": self.allocate,
            "allocate.density": self.density,
            "allocate.rule": self.allocate_rule,
        }
        return [f"{key}={value}" for key, value in given.items() if value is not None] + list(self.settings or ())


def is_recipe(model: str) -> bool:
    """Whether MODEL is a recipe file."""
    return model.lower().endswith(RECIPE_SUFFIXES)


def chosen_effort(model: str, flags: RecipeFlags) -> str | None:
    """The effort that picks the recipe: the one asked for, else the default one; None where a method or a recipe is given.

    Raises:
        InputError: both an effort and a method or a recipe.
    """
    there = "a recipe, which names its method" if is_recipe(model) else "a method" if flags.names_method else None
    if there is None:
        return flags.effort or DEFAULT_EFFORT
    if flags.effort is not None:
        raise InputError(
            f"--effort {flags.effort} picks a method and its steps, and there is {there}, too. Leave one of them out; "
            "`nmprune plan MODEL --effort ...` shows what an effort would do."
        )
    return None


def read_recipe(model: str, flags: RecipeFlags) -> Recipe:
    """The recipe that a command line means.

    Raises:
        InputError: no such recipe file or effort (near matches are named), an effort beside a method, or faults in the
            recipe or in the flags, all at once.
    """
    from nmprune.run.effort import recipe_of
    from nmprune.run.recipe import Recipe, with_settings

    effort = chosen_effort(model, flags)
    if is_recipe(model):
        check_recipe_file(Path(model))
        recipe = Recipe.from_yaml(Path(model), flags.as_settings())
        return recipe if flags.exclude is None else dataclasses.replace(recipe, exclude=tuple(flags.exclude))
    picked = {} if effort is None else recipe_of(effort)
    raw = {"model": model, "pattern": DEFAULT_PATTERN, "exclude": list(flags.exclude or ()), **picked}
    return Recipe.from_dict(with_settings(raw, flags.as_settings()), "")


def check_recipe_file(path: Path) -> None:
    """Raise InputError with near matches where there is no such file."""
    if not path.exists():
        from nmprune.run.find_model import near_paths

        close = near_paths(path, lambda entry: entry.suffix in RECIPE_SUFFIXES)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else " Give the path of a recipe."
        raise InputError(f"recipe {path}: no such file.{hint}")


def default_out(recipe: Recipe) -> Path:
    """runs/<model>_<method>_<pattern>, where --out is not given; of mixed patterns "mixed" and the density in percent."""
    from nmprune.checkpoint import display_name

    model = display_name(recipe.model).rpartition("/")[2]
    pattern = f"mixed{100 * recipe.density:g}" if recipe.choices else f"{recipe.pattern.kept}x{recipe.pattern.group}"
    return Path("runs", f"{model}_{recipe.pruner.name}_{pattern}")
