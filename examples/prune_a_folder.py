"""Prune a model on disk into a run folder, one decoder layer in memory at a time.

    python examples/prune_a_folder.py [MODEL] [OUT]

MODEL is an HF folder, a hub id, a .gguf file, or smollm2-135m. Stopped half-way, the same command goes on.
"""

import sys

import nmprune


def main(model: str = "smollm2-135m", out: str = "runs/example") -> nmprune.PruneResult:
    done = nmprune.prune(
        model,
        method=nmprune.create("sparsegpt", {"damping": 0.02}),  # or just "wanda"
        pattern="2:4",  # keep 2 of every 4 weights
        calibration="builtin",
        n_sequences=8,
        out=out,
        exclude=["*.down_proj"],  # stays dense, and is listed as such
        report=lambda progress: print(progress.text) if progress.text else None,
    )
    worst = max(done.linears, key=lambda linear: linear.output_error or 0.0)
    print(f"{len(done.linears)} linears pruned; the output of {worst.name} changed most: {worst.output_error:.3f}")
    print(f"the model, which plain transformers loads: {done.out}/model")
    return done


if __name__ == "__main__":
    main(*sys.argv[1:])
