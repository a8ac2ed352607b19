"""Call a method on one weight matrix and the statistics of its input: no model, no file, no run folder.

python examples/bring_your_own_loop.py
"""

from dataclasses import replace

import torch

import nmprune


def main() -> dict[str, float]:
    pattern = nmprune.Pattern.parse("2:4")
    generator = torch.Generator().manual_seed(0)
    # Your model's weight (out, in), and the batches that reach this linear: here 64 features out of only 24 directions.
    weight = torch.randn(32, 64, generator=generator)
    mix = torch.randn(24, 64, generator=generator)
    batches = [torch.randn(16, 24, generator=generator) @ mix for _ in range(8)]

    # What the gradient methods read: dL/dW of each sequence by itself, from your own backward. Any loss will do here.
    parameter = torch.nn.Parameter(weight.clone())
    absolute, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for batch in batches:
        (gradient,) = torch.autograd.grad((batch @ parameter.T).tanh().square().mean(), parameter)
        absolute += gradient.abs()
        square += gradient.square()
    gradients = {"weight_grad_abs": absolute, "weight_grad_sq": square, "n_grad_sequences": len(batches)}

    inputs = torch.cat(batches)
    errors = {}
    for name, method_class in nmprune.METHODS.items():
        if not issubclass(method_class, nmprune.PerLinear):
            continue  # learners see a decoder layer, or the whole model
        accumulator = nmprune.StatsAccumulator(in_features=64, needs=method_class.needs)
        for batch in batches:
            accumulator.add(batch)
        stats = replace(accumulator.result(), **gradients)
        pruned = nmprune.create(name).prune(weight, stats, pattern)

        # The mask says what is kept. Frozen-weight methods give no weight: theirs is the dense one, masked.
        new = pruned.weight if pruned.weight is not None else torch.where(pruned.mask, weight, 0.0)
        error = (inputs @ (new - weight).T).square().sum() / (inputs @ weight.T).square().sum()
        errors[name] = error.item()
        print(f"{name:12} keeps {pruned.mask.float().mean():.0%}, relative output error {error:.4f}")
    return errors


if __name__ == "__main__":
    main()
