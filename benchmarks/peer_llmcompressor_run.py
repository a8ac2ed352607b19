"""llmcompressor's side of the measured child processes: prune a model by `oneshot`, or solve one matrix again and again.

Runs in the peers' virtual environment (`make peers`), which has no nmprune.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight
from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
from measurement import Peak, answer, since_started, versions
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

MODIFIERS: dict[str, Any] = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}
BLOCK_SIZE, DAMPING = 128, 0.01  # the modifier's defaults, and ours


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("what", choices=("prune", "solver"))
    made.add_argument("--model", type=Path, help="HF folder")
    made.add_argument("--method", choices=sorted(MODIFIERS), default="wanda")
    made.add_argument("--tokens", type=Path, help="calibration.safetensors")
    made.add_argument("--batch-size", type=int, default=1)
    made.add_argument("--out", type=Path, help="folder for the pruned model, or the file of solver results")
    made.add_argument("--matrices", type=Path, help="weight and gram for the solver")
    made.add_argument("--report", type=Path, help="where the numbers go")
    made.add_argument("--threads", type=int, default=0)
    arguments = made.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.what == "solver":
        answer_solver(arguments)
    else:
        arguments.report.write_text(json.dumps({**run_prune(arguments), "versions": versions()}))


def run_prune(arguments: argparse.Namespace) -> dict[str, object]:
    # transformers loads a family's code at first use: that is an import, too
    for name in json.loads((arguments.model / "config.json").read_text()).get("architectures") or ():
        getattr(transformers, name)
    import_seconds = since_started()
    peak = Peak()
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    loaded = time.perf_counter()
    windows = load_file(arguments.tokens)["token_ids"].tolist()
    dataset = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(window) for window in windows]})
    oneshot(
        model=model,
        processor=tokenizer,
        recipe=MODIFIERS[arguments.method](sparsity=0.5, mask_structure="2:4", ignore=["re:.*lm_head"]),
        dataset=dataset,
        num_calibration_samples=len(windows),
        max_seq_length=len(windows[0]),
        batch_size=arguments.batch_size,
        shuffle_calibration_samples=False,
        pipeline="sequential",
    )
    pruned = time.perf_counter()
    model.save_pretrained(arguments.out, save_compressed=False)
    tokenizer.save_pretrained(arguments.out)
    saved = time.perf_counter()
    return {
        "import_seconds": import_seconds,
        "load_seconds": loaded - start,
        "prune_seconds": pruned - loaded,
        "save_seconds": saved - pruned,
        "run_seconds": saved - start,
        "peak_memory": peak.bytes(),
    }


@torch.no_grad()
def answer_solver(arguments: argparse.Namespace) -> None:
    """Solve once per line of input; "save" writes the last result."""
    matrices = load_file(arguments.matrices)
    weight, gram = matrices["weight"], matrices["gram"]
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.copy_(weight)
    solved = None
    for line in sys.stdin:
        if line.strip() == "save":
            assert solved is not None
            save_file({"weight": solved.contiguous()}, arguments.out)
            answer(versions())
            continue
        hessians = {linear: gram.clone()}  # used up by the solver
        start = time.perf_counter()
        _, solved = sparsify_weight(
            module=linear,
            hessians_dict=hessians,
            sparsity=0.5,
            prune_n=2,
            prune_m=4,
            block_size=BLOCK_SIZE,
            dampening_frac=DAMPING,
            preserve_sparsity_mask=False,
        )
        answer({"seconds": time.perf_counter() - start})


if __name__ == "__main__":
    main()
