"""Passes over the whole model before the stream: what they find steers how its linears are pruned."""
