"""Every benchmark command runs, with settings so small that its numbers mean nothing; what it writes is checked."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny_models
from nmprune.run import Recipe, prune_run

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
PEERS = ROOT / ".venv-peers" / "bin" / "python"
TINY_LAYERS = ["--hidden", 32, "--ffn", 64, "--heads", 4]

needs_peers = pytest.mark.skipif(not PEERS.is_file(), reason=".venv-peers is absent (make peers)")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A 2-layer Llama with random weights and one token per byte."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tiny_models.save("llama", folder, vocab_size=len(alphabet))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """Run a command with one thread; its rows, the Markdown, and what it printed."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()

    def run(name, *arguments, result=None):
        words = [*map(str, arguments), "--threads", "1", "--results", str(tmp_path / "results")]
        monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / f"{name}.py"), *words])
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
        written = tmp_path / "results" / (result or name)
        rows = json.loads(written.with_suffix(".json").read_text())["rows"]
        return rows, written.with_suffix(".md").read_text(), capsys.readouterr().out

    yield run
    torch.set_num_threads(threads)


def check_origin(rows, markdown):
    for row in rows:
        assert row["key"]["threads"] == 1 and row["key"]["processor"] == row["measured"]["processor"] != ""
        assert set(row["measured"]) >= {"date", "commit", "dirty", "command", "cores"}
        assert row["measured"]["versions"]["torch"] == torch.__version__
    assert rows[0]["measured"]["commit"] in markdown and rows[0]["measured"]["command"] in markdown


def test_layer_loop_counts_passes_and_keeps_rows(bench, model_folder):
    arguments = ["--model", model_folder, "--n-sequences", 3, "--seq-len", 16, "--calibration", "random"]
    rows, markdown, printed = bench("layer_loop", *arguments)
    check_origin(rows, markdown)
    assert [row["key"]["method"] for row in rows] == ["wanda", "sparsegpt"]
    for row in rows:
        values = row["values"]
        assert values["passes"] == 3 and [one["passes"] for one in values["layers"]] == [2, 1]  # 2L - 1
        assert 0 < sum(values["phases"].values()) <= values["loop_seconds"]
        assert values["plain_seconds"] > 0 and values["phases"]["solve"] > 0
    assert "kept:" not in printed

    again, _, printed = bench("layer_loop", *arguments)
    assert again == rows and printed.count("kept:") == 2
    fresh, _, printed = bench("layer_loop", *arguments, "--methods", "wanda", "--fresh")
    assert "kept:" not in printed and len(fresh) == 2
    assert rows[1] in fresh and rows[0] not in fresh


def test_depth_memory(bench):
    arguments = ["--layers", 1, 2, "--method", "wanda", *TINY_LAYERS, "--n-sequences", 2, "--seq-len", 8]
    rows, markdown, _ = bench("depth_memory", *arguments)
    check_origin(rows, markdown)
    assert [row["key"]["layers"] for row in rows] == [1, 2]
    peaks = [row["values"]["peak_memory"] for row in rows]
    assert all(0 < peak < 200 << 20 for peak in peaks)
    assert f"{(max(peaks) - min(peaks)) / min(peaks):.1%}" in markdown


def test_quality(bench, model_folder):
    settings = ["--model", model_folder, "--methods", "wanda", "--n-sequences", 2, "--seq-len", 16, "--max-windows", 2]
    rows, markdown, _ = bench("quality", *settings, "--texts", "builtin", "--calibration", "builtin")
    check_origin(rows, markdown)
    dense, pruned = rows
    assert (dense["key"]["method"], pruned["key"]["method"]) == ("dense", "wanda")
    assert dense["key"]["texts"] == pruned["key"]["texts"] == "builtin" and pruned["key"]["calibration"] == "builtin"
    values = [row["values"]["perplexity"]["builtin"]["value"] for row in rows]
    assert values[0] != values[1] and min(values) > 1
    assert all(f"{value:,.1f}" in markdown for value in values)
    assert "builtin, 2 x 16" in markdown and f"{pruned['values']['run']['global_sparsity']:.1%}" in markdown

    # another calibration is another pruned row beside the same dense one; other texts are other rows throughout
    more, _, printed = bench("quality", *settings, "--texts", "builtin", "--calibration", "random")
    assert printed.count("kept:") == 1 and len(more) == 3 and more[:2] == rows
    text = model_folder.parent / "text.txt"
    text.write_text("Some words of another text. " * 8)
    more, _, printed = bench("quality", *settings, "--texts", text, "--calibration", "builtin")
    assert "kept:" not in printed and len(more) == 5


def test_finetune(bench, model_folder):
    settings = ["--model", model_folder, "--method", "wanda", "--n-sequences", 2, "--seq-len", 16, "--max-windows", 2]
    settings += ["--texts", "builtin", "--calibration", "builtin", "--minutes", 0, "--steps", 2]
    rows, markdown, _ = bench("finetune", *settings, "--variants", "kl", "kl+lora16")
    check_origin(rows, markdown)
    assert [row["key"]["what"] for row in rows] == ["dense", "start", "kl", "kl+lora16"]
    for row in rows[2:]:
        values = row["values"]
        assert values["masks_intact"] and values["steps"] == 2 and values["n_tokens"] == 2 * 2 * 16
        assert values["curve"][0]["step"] == 0 and values["held_out_after"]["loss"] > 0
        ratio = values["perplexity"]["builtin"]["value"] / rows[0]["values"]["perplexity"]["builtin"]["value"]
        assert f"{ratio:.2f} x" in markdown

    # a run that is there is a start, too
    run = model_folder.parent / "start"
    prune_run(Recipe.from_dict({"model": str(model_folder), "method": "magnitude", "pattern": "2:4"}), run)
    more, _, printed = bench("finetune", *settings, "--variants", "lm", "--start", run)
    assert printed.count("kept:") == 1 and [row["key"]["what"] for row in more[4:]] == ["start", "lm"]


def test_random_llama_is_one_shard_per_layer(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import random_llama

    from nmprune.stream import DecoderModel

    shape = random_llama.Shape(32, 64, 4, 16)
    folder = random_llama.write(tmp_path / "model", shape, 3)
    assert len(list(folder.glob("*.safetensors"))) == 4
    model = DecoderModel.open(folder)
    assert model.n_layers == 3 and not model.unused_tensors
    with model.layer(2) as layer:
        assert sum(p.nbytes for p in layer.parameters() if p.dim() == 2) == shape.layer_bytes
    with pytest.raises(SystemExit, match="GB free"):
        random_llama.check_space(tmp_path, random_llama.Shape(), 10**9)


def test_plan_accuracy(bench, model_folder):
    arguments = ["--model", model_folder, "--cases", "wanda:2x16", "--random-layers", 0, "--calibration", "random"]
    rows, markdown, _ = bench("plan_accuracy", *arguments)
    check_origin(rows, markdown)
    values = rows[0]["values"]
    assert values["measured"]["peak_memory"] > 0 and values["measured"]["weights_kept"] > 0
    error = values["planned"]["peak_memory"] / values["measured"]["peak_memory"] - 1
    assert f"{error:+.1%}" in markdown and "MISSED" in markdown  # 20 MiB of library code against kilobytes


def test_solver_speed(bench):
    rows, markdown, _ = bench("solver_speed", "--shapes", "8x32", "--repeats", 2)
    check_origin(rows, markdown)
    assert [row["key"]["solver"] for row in rows] == ["sparsegpt", "alps", "descent", "reconstruct"]
    for row in rows:
        values = row["values"]
        assert len(values["seconds"]) == len(values["seconds_again"]) == 2
        assert min(*values["seconds"], *values["seconds_again"]) > 0 and values["torch_threads"] == 1
        assert 0.9 < sum(values["shares"].values()) < 1.1 and values["shares"]["products"] > 0
    factoring = [row["values"]["shares"].get("factorising", 0) > 0 for row in rows]
    assert factoring == [True, True, False, False]
    seconds = sorted(rows[0]["values"]["seconds"])
    assert f"{sum(seconds) / 2 / (8 * 32 * 32 / 1e9):.3f}" in markdown


def test_maskpro_variance(bench, model_folder):
    settings = ["--model", model_folder, "--flip-shares", 0.1, "--batch-sizes", 2, "--draws", 8, "--run-in", 2]
    rows, markdown, _ = bench("maskpro_variance", *settings, "--n-sequences", 4, "--seq-len", 8)
    check_origin(rows, markdown)
    (values,) = (row["values"] for row in rows)
    variance = values["variance"]
    assert values["draws"] == 8 and 0.05 < values["flips"] < 0.15
    assert variance["vanilla"] > variance["residual"] > 0
    assert f"{variance['vanilla'] / variance['residual']:,.1f}" in markdown


def test_learners(bench, model_folder):
    settings = ["--model", model_folder, "--texts", "own", "--windows", 4, "--seq-len", 16, "--tokens", 96]
    settings += ["--steps", 2, "--eval-every", 1, "--batch-size", 2, "--one-shot"]
    chosen = ["--methods", "maskpro", "--set", "maskpro.flip_share=0.3", "all.train.loss=kl"]
    rows, markdown, _ = bench("learners", *settings, *chosen)
    check_origin(rows, markdown)
    assert [row["key"]["what"] for row in rows] == ["dense", "prior", "maskpro"]
    assert all(len(row["values"]["nlls"]["own"]) == 4 for row in rows)
    values = rows[2]["values"]
    assert values["learning"]["steps"] == 2 and values["learning"]["loss"] == "kl"
    assert not values["learning"]["guarded"] and [one["step"] for one in values["curve"]] == [1, 2]
    assert values["recipe"]["method"]["prior"] == rows[2]["key"]["prior"] == "wanda"
    assert values["recipe"]["method"]["flip_share"] == 0.3
    assert f"{values['learning']['best_loss']:.3f}" in markdown

    _, _, printed = bench("learners", *settings, *chosen)
    assert printed.count("kept:") == 3 and "measuring" not in printed
    with pytest.raises(SystemExit):
        bench("learners", *settings, "--methods", "maskproo")
    with pytest.raises(SystemExit):
        bench("learners", *settings, "--prior", "wandaa")


def test_a_model_writes_its_own_text(monkeypatch, model_folder):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import own_text

    windows, origin = own_text.windows_of(model_folder, "own", "calibration", 3, 12, seed=1)
    assert windows.shape == (3, 12) and (windows[:, 0] == 1).all() and "own text" in origin
    assert torch.equal(windows, own_text.windows_of(model_folder, "own", "calibration", 3, 12, seed=1)[0])
    for other in (("evaluation", 1), ("calibration", 2)):
        assert not torch.equal(windows, own_text.windows_of(model_folder, "own", other[0], 3, 12, seed=other[1])[0])


@needs_peers
def test_peer_makes_the_same_masks(bench, model_folder):
    arguments = [
        "--model",
        model_folder,
        "--n-sequences",
        3,
        "--seq-len",
        16,
        "--methods",
        "wanda",
        "--calibration",
        "random",
    ]
    rows, markdown, _ = bench("peer_llmcompressor", *arguments)
    check_origin(rows, markdown)
    values = rows[0]["values"]
    comparison = values["comparison"]
    assert comparison["linears"] == 14 and comparison["peer_groups_over_pattern"] == 0
    assert comparison["non_zero"] == {"nmprune": 0.5, "llmcompressor": 0.5}
    assert comparison["groups_equal"] > 0.99
    for side in ("nmprune", "llmcompressor"):
        parts = ("import_seconds", "load_seconds", "prune_seconds", "save_seconds")
        assert 0 < sum(values[side][part] for part in parts) < values[side]["wall_seconds"]
        assert values[side]["peak_memory"] > 0
    assert values["llmcompressor"]["versions"]["llmcompressor"] in markdown


@needs_peers
def test_peer_solver_finds_the_same_weights(bench):
    arguments = ["--solver", "--shapes", "16x32", "--solver-repeats", 5, "--solver-threads", 1]
    rows, markdown, _ = bench("peer_llmcompressor", *arguments, result="peer_llmcompressor_solver")
    check_origin(rows, markdown)
    values = rows[0]["values"]
    assert all(len(seconds) == 5 and min(seconds) > 0 for seconds in values["seconds"].values())
    assert values["groups_equal"] > 0.98
    assert values["output_error"]["nmprune"] == pytest.approx(values["output_error"]["llmcompressor"], rel=0.02)


def test_peer_says_how_to_get_the_peers(bench, tmp_path):
    with pytest.raises(SystemExit, match="make peers"):
        bench("peer_llmcompressor", "--peers-python", tmp_path / "none")
