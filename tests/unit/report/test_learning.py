from __future__ import annotations

from dataclasses import replace

from nmprune.report import learning_table, pruning_tables
from nmprune.results import LearnedLayerResult, LearningResult, LinearResult, Results
from nmprune.run import Recipe
from nmprune.run.card import model_card

RESULTS = Results(
    model="models/m",
    model_fingerprint="f",
    method={"name": "maskllm"},
    pattern="2:4",
    pattern_words="2 kept of 4",
    updates_weights=False,
    calibration={"source": "c4", "split": "train", "n_sequences": 8, "seq_len": 32, "seed": 3, "n_tokens": 256},
    weights_in_linears=64,
    weights_kept=32,
    parameters=128,
    global_sparsity=0.25,
    mask_checksum="c",
    seconds={"learn": 75.0, "write": 0.5},
    sessions=1,
    peak_memory=None,
    device_peak_memory=None,
    machine={"device": "cpu", "processor": "p"},
    linears=(LinearResult("up", 0, "up", "up.weight", (8, 8), 0.5, 64, 1.5, 0.1),),
    dense=(),
)
WHOLE = LearningResult("kl", 500, 1_024_000, 2.5, 4096, 1.25, 1.0, 400, 1.0, 0.123, 1.1, 0.2, guarded=False)
HELD_OUT = "held-out loss (KL from the dense model, nats per token)"


def rows(results: Results) -> dict[str, str]:
    table = learning_table(results)
    assert table is not None
    return dict(table.rows)


def test_methods_that_learn_nothing_have_no_such_table():
    assert learning_table(RESULTS) is None and len(pruning_tables(RESULTS)) == 2


def test_through_the_whole_model():
    assert rows(replace(RESULTS, learning=WHOLE)) == {
        "masks taken": "the learned ones after step 400",
        HELD_OUT: "1.2500 with the prior's masks, 1.0000 learned (-20.0%), 1.0000 with those taken",
        "groups with another mask than the prior's": "12.3% of the best masks, 20.0% after the last step",
        "learned from": "1,024,000 tokens in 500 steps, 2.50 epochs; judged on 4,096 held-out tokens",
        "time of learning": "1 min 15 s",
    }
    guarded = rows(replace(RESULTS, learning=replace(WHOLE, best_loss=1.5, held_out_loss=1.25, guarded=True)))
    assert guarded["masks taken"] == "the prior's: no learned ones were better (the guard)"
    assert "1.5000 learned (+20.0%), 1.2500 with those taken" in guarded[HELD_OUT]


TAKEN = LearnedLayerResult(0, 6, 0.5, 0.4, flips=0.2, accepted=True)
REFUSED = LearnedLayerResult(1, 6, 0.5, 0.5, flips=0.0, accepted=False)


def test_layer_by_layer():
    found = rows(replace(RESULTS, learned_layers=(TAKEN, REFUSED)))
    assert found == {
        "masks taken": "the learned ones in 1 of 2 decoder layers, the prior's in the others (the guard)",
        "held-out loss, learned / prior's": "0.900, mean over decoder layers (0.800 to 1.000)",
        "groups with another mask than the prior's": "10.0%, mean over decoder layers",
        "learned in": "12 steps in 2 decoder layers (6 each) on 8 x 32 calibration tokens, those that judge among them",
        "time of learning": "1 min 15 s",
    }
    refined = replace(RESULTS, learned_layers=(replace(TAKEN, steps=9, final_loss=0.25), REFUSED), calibration=None)
    found = rows(refined)
    assert found["the same after the steps that follow"] == "0.500, mean over decoder layers (0.500 to 0.500)"
    assert found["learned in"] == "15 steps in 2 decoder layers (6 to 9 each)"
    unjudged = rows(replace(RESULTS, learned_layers=(LearnedLayerResult(0, 6, accepted=True),)))
    assert unjudged["masks taken"] == "the learned ones; nothing was held out, so they were not judged"
    assert not any(name.startswith("held-out loss") for name in unjudged)


def test_the_model_card_and_the_terminal_say_it():
    recipe = Recipe.from_dict({"model": "m", "method": "maskllm", "pattern": "2:4"})
    learned = replace(RESULTS, learning=WHOLE)
    card = model_card(recipe, learned)
    assert "## Learning\n\n|  |  |\n| --- | --- |\n| masks taken | the learned ones after step 400 |\n" in card
    assert "|\n\n## Dense on purpose" in card
    assert "## Learning" not in model_card(recipe, RESULTS)
    assert [table.title for table in pruning_tables(learned)][1:] == ["learning", ""]
