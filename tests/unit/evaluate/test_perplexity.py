from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nmprune.calibration import Text
from nmprune.errors import InputError
from nmprune.evaluate import perplexity as module
from nmprune.evaluate.perplexity import perplexity, score_windows, summarise

TEXT = Text("toy", "test", ("x",))


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=40,
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def _windows(n, seq_len, vocabulary=40):
    return torch.randint(vocabulary, (n, seq_len), generator=torch.Generator().manual_seed(1))


class TestScoreWindows:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_uniform_logits_give_the_vocabulary_size(self, dtype):
        nlls = score_windows(lambda ids: torch.zeros(*ids.shape, 40, dtype=dtype), _windows(3, 8))
        assert summarise(nlls, TEXT, 8).value == pytest.approx(40, rel=1e-6)

    def test_a_bigram_model_has_the_cross_entropy_of_its_table(self):
        # after 0: 0 with 3/4, 1 with 1/4; after 1: 0 with 1/2, 1 with 1/2
        table = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log()
        nlls = score_windows(lambda ids: table[ids], torch.tensor([[0, 0, 1, 0], [1, 1, 1, 1]]))
        assert nlls.tolist() == pytest.approx([-math.log(0.75 * 0.25 * 0.5) / 3, math.log(2)])
        assert nlls.dtype == torch.float64

    def test_batches_and_chunks_change_nothing(self, monkeypatch):
        logits = torch.randn(5, 9, 40, generator=torch.Generator().manual_seed(2))
        windows = _windows(5, 9)

        def logits_of(ids):
            rows = [int((windows == row).all(1).nonzero()[0]) for row in ids]
            return logits[rows]

        expected = torch.stack(
            [torch.nn.functional.cross_entropy(logits[i, :-1], windows[i, 1:]) for i in range(5)]
        ).double()
        for batch_size, chunk in ((1, 1 << 24), (2, 1 << 24), (5, 3 * 40), (5, 1)):
            monkeypatch.setattr(module, "_CHUNK", chunk)
            torch.testing.assert_close(score_windows(logits_of, windows, batch_size), expected, rtol=1e-6, atol=0)

    def test_fp32_copies_stay_small(self, monkeypatch):
        sizes = []
        cross_entropy = torch.nn.functional.cross_entropy

        def recording(logits, *given, **options):
            sizes.append(logits.numel())
            assert logits.dtype == torch.float32
            return cross_entropy(logits, *given, **options)

        monkeypatch.setattr(module, "_CHUNK", 100)
        monkeypatch.setattr(torch.nn.functional, "cross_entropy", recording)
        score_windows(lambda ids: torch.zeros(*ids.shape, 40, dtype=torch.float16), _windows(1, 8))
        assert sizes == [80, 80, 80, 40]

    def test_progress_counts_windows(self):
        seen = []
        score_windows(
            lambda ids: torch.zeros(*ids.shape, 40), _windows(5, 4), 2, lambda done, total: seen.append((done, total))
        )
        assert seen == [(2, 5), (4, 5), (5, 5)]

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_logits_that_are_not_finite_are_an_error(self, bad):
        def logits_of(ids):
            logits = torch.zeros(*ids.shape, 40)
            logits[(ids == 39).any(1), :, 3] = bad
            return logits

        windows = torch.zeros(3, 4, dtype=torch.int64)
        windows[1, 2] = 39
        with pytest.raises(InputError, match=r"window 2 of 3: the cross-entropy is (nan|inf)\. .*--dtype float32"):
            score_windows(logits_of, windows, batch_size=3)

    def test_logits_of_the_wrong_shape_are_a_fault_of_the_caller(self):
        with pytest.raises(ValueError, match=r"logits_of gave \(2, 40\)"):
            score_windows(lambda ids: torch.zeros(2, 40), _windows(2, 4), 2)

    @pytest.mark.parametrize("shape", [(0, 4), (3, 1), (4,)])
    def test_windows_that_predict_nothing(self, shape):
        with pytest.raises(InputError, match=r"expected \(n, seq_len\) with n >= 1 and seq_len >= 2"):
            score_windows(lambda ids: torch.zeros(*ids.shape, 40), torch.zeros(shape, dtype=torch.int64))


class TestPerplexity:
    def test_equals_the_loss_of_transformers(self, llama):
        windows = _windows(4, 12)
        with torch.no_grad():
            losses = [llama(window[None], labels=window[None]).loss.item() for window in windows]
        assert perplexity(llama, windows, batch_size=3).tolist() == pytest.approx(losses, rel=1e-6)

    @pytest.mark.parametrize("training", [True, False])
    def test_the_mode_of_the_model_is_kept(self, llama, training):
        llama.train(training)
        perplexity(llama, _windows(1, 4))
        assert llama.training == training

    def test_more_tokens_than_positions(self, llama):
        with pytest.raises(InputError, match="seq_len 33 is more than the model's 32 positions"):
            perplexity(llama, _windows(1, 33))

    def test_ids_of_another_tokenizer(self, llama):
        with pytest.raises(InputError, match="token id 40 is not in the model's vocabulary of 40"):
            perplexity(llama, torch.full((1, 4), 40))


class TestSummarise:
    def test_everything_is_said(self):
        found = summarise(torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64), TEXT, 512)
        assert (found.text, found.split, found.kind) == ("toy", "test", "token")
        assert (found.seq_len, found.n_windows, found.n_tokens) == (512, 4, 4 * 511)
        assert found.mean_nll == 3.0
        # squared deviations 4 + 1 + 0 + 9 = 14; variance 14 / 3; of the mean 14 / 12
        assert found.standard_error == pytest.approx(math.sqrt(14 / 12))
        assert found.value == pytest.approx(math.exp(3))
        assert found.value_error == pytest.approx(math.exp(3) * math.sqrt(14 / 12))

    def test_one_window_has_no_error(self):
        found = summarise(torch.tensor([1.0], dtype=torch.float64), TEXT, 8)
        assert found.standard_error is None
        assert found.value_error is None

    def test_a_perplexity_beyond_floats_is_infinite(self):
        assert summarise(torch.tensor([800.0], dtype=torch.float64), TEXT, 8).value == math.inf

    def test_no_windows(self):
        with pytest.raises(InputError, match=r"text toy \(test\): no window was scored"):
            summarise(torch.empty(0, dtype=torch.float64), TEXT, 8)
