"""Prune a model that is in memory and compare its perplexity before and after.

    python examples/prune_in_memory.py [MODEL]

The perplexity is measured on the part of the built-in text that calibration does not see.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import nmprune
from nmprune.calibration import consecutive_windows, load_text
from nmprune.checkpoint import locate
from nmprune.evaluate.perplexity import perplexity, summarise


def main(model_name: str = "smollm2-135m", seq_len: int = 256) -> tuple[float, float]:
    folder = locate(model_name)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = load_text("builtin", "evaluation")
    windows = consecutive_windows(text, tokenizer, seq_len, max_windows=4)

    before = summarise(perplexity(model, windows), text, seq_len)
    done = nmprune.prune(model, "wanda", "2:4", tokenizer=tokenizer, n_sequences=8, seq_len=seq_len)
    after = summarise(perplexity(model, windows), text, seq_len)

    print(f"{len(done.masks)} masks; token perplexity on {text.label}, {before.n_windows} windows of {seq_len}:")
    print(f"dense {before.value:.1f}, wanda 2:4 {after.value:.1f}")
    return before.value, after.value


if __name__ == "__main__":
    main(*sys.argv[1:])
