"""The README.md of a finetuned run: what it started from, what was trained, how to check it and do it again."""

from __future__ import annotations

from nmprune.report.finetune import perplexity
from nmprune.report.quantities import duration
from nmprune.results import Results
from nmprune.run.recipe import Recipe


def finetune_card(recipe: Recipe, results: Results) -> str:
    """Markdown: parent, settings, losses before and after, how to load, verify and reproduce."""
    settings, found = recipe.finetune, results.finetune
    assert settings is not None and found is not None
    what = "all kept weights of the pruned linears"
    if settings.lora:
        what = f"masked low-rank deltas of rank {settings.lora} on the pruned linears, merged"
    beside = f", and {len(found.tensors)} tensors beside them ({', '.join(settings.also)})" if found.tensors else ""
    dense = "\n".join(f"- `{one.name}`: {one.reason}" for one in results.dense[:12])
    more = f"\n- and {len(results.dense) - 12} more, in `results.json`" if len(results.dense) > 12 else ""
    loss = "KL from the dense model" if found.loss == "kl" else "language model"
    return f"""# {recipe.model}, {results.pattern} ({results.pattern_words}) by {results.method["name"]}, finetuned

| | |
|---|---|
| started from | `{found.parent}` |
| masks | the parent's, byte for byte (sha256 {results.mask_checksum[:12]}) |
| trained | {what}{beside} |
| loss | {loss}, learning rate {settings.lr:g} of a tensor's root mean square, forwards in {found.compute} |
| text | {found.text} ({found.split}): {found.n_tokens:,} tokens, {found.epochs:.2f} epochs |
| steps | {found.steps}, the best after {found.best_step}, {duration(found.seconds)} on {results.machine["processor"]} |
| held-out loss | {found.held_out_before["loss"]:.4f} before, {found.held_out_after["loss"]:.4f} after |
| held-out token perplexity | {perplexity(found.held_out_before["nll"])} before, {perplexity(found.held_out_after["nll"])} after |

Held-out windows are of the text that was trained on, not an evaluation split: measure with `nmprune evaluate`.

`model/` is a plain Hugging Face folder with exact zeros: it loads in transformers as it is. Zeros alone do not make it faster.

    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("model")

Check it, measure it, make it again (from the folder that holds this one):

    nmprune verify RUN
    nmprune evaluate RUN --text wikitext2
    nmprune finetune RUN/recipe.yaml --out AGAIN

## Dense on purpose

{dense}{more}

Made by nmprune. `recipe.yaml` holds every setting, of the pruning, too; `metrics.jsonl` the losses step by step;
`masks.safetensors` the masks; `results.json` the numbers.
"""
