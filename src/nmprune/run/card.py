"""The run folder's README.md: a model card that says what was done and how to do it again."""

from __future__ import annotations

import dataclasses

from nmprune.report.allocation import allocation_words
from nmprune.report.learning import learning_table
from nmprune.report.permutation import permutation_words
from nmprune.report.quantities import mean, settings
from nmprune.results import Results
from nmprune.run.recipe import Recipe
from nmprune.run.tokens import given_from_python


def model_card(recipe: Recipe, results: Results) -> str:
    """Markdown: method, recipe, numbers, how to load, verify and reproduce."""
    given = ", ".join(settings({key: value for key, value in results.method.items() if key != "name"})) or "none"
    dense = "\n".join(f"- `{one.name}`: {one.reason}" for one in results.dense[:12])
    more = f"\n- and {len(results.dense) - 12} more, in `results.json`" if len(results.dense) > 12 else ""
    calibration = "none needed"
    if results.calibration:
        c = results.calibration
        calibration = f"{c['source']} ({c['split']}), {c['n_sequences']} x {c['seq_len']} tokens, seed {c['seed']}"
    again = "nmprune prune RUN/recipe.yaml --out AGAIN"
    if given_from_python(recipe.calibration.source):
        again += " --set calibration.source=RUN/calibration.safetensors"
    errors = {
        "calibration": mean(one.output_error for one in results.linears),
        "held-out": mean(one.held_out_error for one in results.linears),
    }
    error_line = "".join(
        f"| mean relative output error of a linear ({tokens} tokens) | {value:.4f} |\n"
        for tokens, value in errors.items()
        if value is not None
    )
    mixed_line = f"| mixed patterns | {allocation_words(results.allocation)} |\n" if results.allocation else ""
    permuted_line = (
        f"| channels reordered first | {permutation_words(results.permutation)} |\n" if results.permutation else ""
    )
    learned = learning_table(results)
    learning = f"## Learning\n\n{dataclasses.replace(learned, title='').markdown()}\n" if learned else ""
    lines = mixed_line + permuted_line + error_line
    return f"""# {recipe.model}, pruned to {results.pattern} ({results.pattern_words}) by {results.method["name"]}

| | |
|---|---|
| method | {results.method["name"]} (hyper-parameters: {given}) |
| weights | {"moved" if results.updates_weights else "frozen: every kept weight is the dense model's, bit for bit"} |
| calibration | {calibration} |
| pruned linears | {len(results.linears)}, {results.weights_in_linears:,} weights, {results.weights_kept:,} kept |
| global sparsity | {results.global_sparsity:.1%} of all {results.parameters:,} parameters |
{lines}| time | {sum(results.seconds.values()):.0f} s on {results.machine["device"]} ({results.machine["processor"]}) |

`model/` is a plain Hugging Face folder with exact zeros: it loads in transformers as it is. Zeros alone do not make it faster.

    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("model")

Check it, measure it, make it again (from the folder that holds this one):

    nmprune verify RUN
    nmprune evaluate RUN --text wikitext2
    {again}

{learning}## Dense on purpose

{dense}{more}

Made by nmprune. `recipe.yaml` holds every setting, `calibration.safetensors` the token ids, `masks.safetensors` the masks,
`results.json` every linear's numbers.
"""
