from __future__ import annotations

import itertools
import re

import pytest
import torch

from nmprune.calibration import Text, consecutive_windows, from_token_ids, random_windows
from nmprune.errors import InputError

NUMBERS = Text("numbers", "all", tuple(f"document{i:04d};" for i in range(200)))  # 13 bytes each, 15 with the joiner


def _read(tokenizer, window):
    return tokenizer.decode(window, clean_up_tokenization_spaces=False)


class Counting:
    """The tokenizer, counting the characters it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.n_characters = tokenizer, 0

    def __call__(self, text, **options):
        self.n_characters += len(text)
        return self.tokenizer(text, **options)


class TestRandom:
    def test_shape_type_and_seed(self, byte_tokenizer):
        windows = random_windows(NUMBERS, byte_tokenizer, 8, 40, seed=0)
        assert windows.shape == (8, 40)
        assert windows.dtype == torch.int64
        assert torch.equal(windows, random_windows(NUMBERS, byte_tokenizer, 8, 40, seed=0))
        assert not torch.equal(windows, random_windows(NUMBERS, byte_tokenizer, 8, 40, seed=1))

    def test_windows_are_running_text_without_special_tokens(self, byte_tokenizer):
        windows = random_windows(NUMBERS, byte_tokenizer, 8, 40, seed=0)
        assert not (windows == byte_tokenizer.bos_token_id).any()
        for window in windows:
            text = _read(byte_tokenizer, window)
            whole = [piece for piece in text.split("\n\n") if len(piece) == 13]
            assert whole  # a window crosses from document to document
            assert set(whole) <= set(NUMBERS.documents)

    def test_windows_do_not_overlap(self, byte_tokenizer):
        distinct = Text("distinct", "all", ("".join(chr(0x4E00 + i) for i in range(300)),))  # 3 tokens a character
        for seed in range(5):
            windows = random_windows(distinct, byte_tokenizer, 9, 99, seed)
            stream = byte_tokenizer(distinct.joined, add_special_tokens=False)["input_ids"]
            pieces = torch.tensor(stream).unfold(0, 99, 1)
            starts = sorted(int((pieces == window).all(1).nonzero()[0]) for window in windows)
            assert all(b - a >= 99 for a, b in itertools.pairwise(starts))

    def test_all_of_a_text_can_be_used(self, byte_tokenizer):
        text = Text("t", "all", ("abcdefgh",))
        windows = random_windows(text, byte_tokenizer, 4, 2, seed=3)
        assert sorted(_read(byte_tokenizer, window) for window in windows) == ["ab", "cd", "ef", "gh"]

    def test_order_and_places_depend_on_the_seed(self, byte_tokenizer):
        text = Text("t", "all", ("abcdefghijklmnop",))
        firsts = {_read(byte_tokenizer, random_windows(text, byte_tokenizer, 2, 4, seed)[0]) for seed in range(30)}
        assert len(firsts) > 8  # of 13 places

    def test_documents_come_from_all_of_the_text(self, byte_tokenizer):
        windows = torch.cat([random_windows(NUMBERS, byte_tokenizer, 2, 40, seed) for seed in range(20)])
        numbers = {int(n) for window in windows for n in re.findall(r"document(\d{4});", _read(byte_tokenizer, window))}
        assert min(numbers) < 50
        assert max(numbers) > 150

    def test_windows_of_one_document_are_in_random_order(self, byte_tokenizer):
        text = Text("t", "all", ("abcdefgh",))
        firsts = {_read(byte_tokenizer, random_windows(text, byte_tokenizer, 4, 2, seed)[0]) for seed in range(30)}
        assert firsts == {"ab", "cd", "ef", "gh"}

    def test_no_more_is_tokenised_than_needed(self, byte_tokenizer):
        counting = Counting(byte_tokenizer)
        random_windows(NUMBERS, counting, 2, 20, seed=0)
        assert counting.n_characters < len(NUMBERS.joined) / 4

    def test_text_with_many_characters_a_token_is_tokenised_further(self):
        class Halves:
            def __call__(self, text, **_):
                return {"input_ids": list(range(len(text) // 16))}

        assert random_windows(NUMBERS, Halves(), 4, 40, seed=0).shape == (4, 40)

    def test_too_short(self, byte_tokenizer):
        text = Text("t", "train", ("x" * 1000,))
        with pytest.raises(InputError) as caught:
            random_windows(text, byte_tokenizer, 4, 300, seed=0)
        assert str(caught.value) == (
            "text t (train) has 1,000 tokens with this tokenizer; 4 x 300 needs 1,200. "
            "Ways out: at most 3 sequences of 300 tokens, or a seq_len of at most 250, or a longer text."
        )

    def test_far_too_short(self, byte_tokenizer):
        with pytest.raises(InputError, match=r"has 1 tokens .*needs 1,200\. Ways out: a longer text\."):
            random_windows(Text("t", "all", ("x",)), byte_tokenizer, 4, 300, seed=0)

    @pytest.mark.parametrize(("n", "seq_len", "message"), [(0, 8, "n_sequences is 0"), (2, 1, "seq_len is 1")])
    def test_numbers_that_make_no_sense(self, byte_tokenizer, n, seq_len, message):
        with pytest.raises(InputError, match=message):
            random_windows(NUMBERS, byte_tokenizer, n, seq_len, seed=0)

    def test_no_warning_about_the_models_maximum(self, byte_tokenizer, capfd, caplog):
        byte_tokenizer.deprecation_warnings = {}
        random_windows(NUMBERS, byte_tokenizer, 2, 40, seed=0)
        assert "longer than" not in caplog.text + capfd.readouterr().err


class TestConsecutive:
    def test_the_joined_text_is_cut_from_its_start_and_the_tail_dropped(self, byte_tokenizer):
        text = Text("t", "all", ("abcde", "fghij", "k"))
        windows = consecutive_windows(text, byte_tokenizer, 4)
        assert [_read(byte_tokenizer, window) for window in windows] == ["abcd", "e\n\nf", "ghij"]

    def test_the_first_windows_are_those_of_the_whole_text(self, byte_tokenizer):
        every = consecutive_windows(NUMBERS, byte_tokenizer, 20)
        counting = Counting(byte_tokenizer)
        first = consecutive_windows(NUMBERS, counting, 20, max_windows=3)
        assert torch.equal(first, every[:3])
        assert counting.n_characters < len(NUMBERS.joined)

    def test_the_end_of_what_was_tokenised_is_not_used(self):
        class EndDiffers:
            """The last tokens of an input depend on where it ends, as a merge across the cut would make them."""

            def __call__(self, text, **_):
                return {"input_ids": [ord(c) for c in text[:-8]] + [0] * 8}

        every = consecutive_windows(NUMBERS, EndDiffers(), 20)
        for n in range(1, 30):
            assert torch.equal(consecutive_windows(NUMBERS, EndDiffers(), 20, max_windows=n), every[:n])

    def test_fewer_windows_than_asked_for_is_what_there_is(self, byte_tokenizer):
        assert consecutive_windows(Text("t", "all", ("abcdefghi",)), byte_tokenizer, 4, max_windows=10).shape == (2, 4)

    def test_too_short(self, byte_tokenizer):
        with pytest.raises(InputError, match=r"has 3 tokens .*1 x 4 needs 4\. Ways out: a seq_len of at most 3"):
            consecutive_windows(Text("t", "all", ("abc",)), byte_tokenizer, 4)

    def test_numbers_that_make_no_sense(self, byte_tokenizer):
        with pytest.raises(InputError, match="max_windows is 0"):
            consecutive_windows(NUMBERS, byte_tokenizer, 4, max_windows=0)


class TestFromTokenIds:
    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
    def test_integers_become_int64(self, dtype):
        ids = from_token_ids(torch.tensor([[0, 5, 9], [1, 2, 3]], dtype=dtype), vocabulary=10)
        assert ids.dtype == torch.int64
        assert ids.tolist() == [[0, 5, 9], [1, 2, 3]]

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            ([[1, 2]], "token ids are a list; expected a torch tensor"),
            (torch.zeros(2, 3), "token ids are torch.float32; expected integers"),
            (torch.zeros(2, 3, dtype=torch.bool), "token ids are torch.bool"),
            (torch.zeros(3, dtype=torch.int64), r"shape \(3,\).*write ids\[None\]"),
            (torch.zeros(0, 3, dtype=torch.int64), r"shape \(0, 3\)"),
            (torch.zeros(3, 1, dtype=torch.int64), "seq_len of at least 2"),
            (torch.tensor([[1, 10]]), r"token id 10 is not in the vocabulary \(0 to 9\)"),
            (torch.tensor([[1, -100]]), "token id -100 is not in the vocabulary"),
        ],
    )
    def test_refused(self, ids, message):
        with pytest.raises(InputError, match=message):
            from_token_ids(ids, vocabulary=10)
