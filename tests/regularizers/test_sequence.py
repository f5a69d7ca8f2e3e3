"""Dropouts for sequences: which entries share a draw, and the rate of each example."""

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_stn import Float, HyperparameterSet, convert, export
from lightning_stn.binding import attach_all, bind_weight_phase, unbind
from lightning_stn.regularizers import EmbeddingDropout, LockedDropout, Regularizer

LOGITS = torch.tensor([[-3.0], [0.0], [1.0], [3.0]])
RATES = torch.sigmoid(LOGITS[:, 0]).tolist()


def bound(module: Regularizer, sample: Tensor = LOGITS) -> HyperparameterSet:
    hyperparameters = HyperparameterSet({"rate": Float(0.0, 1.0, init=0.5)})
    attach_all(module, hyperparameters)
    bind_weight_phase(hyperparameters, sample)
    return hyperparameters


def assert_kept(kept: Tensor, rate: float) -> None:
    """Six binomial standard deviations: a false alarm in fewer than one of 10^8 runs."""
    assert abs(kept.double().mean().item() - (1 - rate)) < 6 * math.sqrt(rate * (1 - rate) / kept.numel())


def test_locked_dropout_has_one_mask_over_time_and_the_rate_of_each_example() -> None:
    torch.manual_seed(0)
    module = LockedDropout("rate")
    bound(module)
    output = module(torch.ones(4, 3, 5000))
    assert torch.equal(output[:, :1].expand_as(output), output)
    for row, rate in zip(output[:, 0], RATES, strict=True):
        assert_kept(row > 0, rate)
        torch.testing.assert_close(row[row > 0], torch.full_like(row[row > 0], 1 / (1 - rate)))


def test_locked_dropout_with_time_first_equals_batch_first_transposed() -> None:
    input = torch.randn(4, 3, 50)
    outputs = []
    for module, x in (
        (LockedDropout("rate"), input),
        (LockedDropout("rate", batch_first=False), input.transpose(0, 1)),
    ):
        bound(module)
        torch.manual_seed(0)
        outputs.append(module(x))
    assert torch.equal(outputs[0], outputs[1].transpose(0, 1))


class Ones(nn.Module):
    """Embedding of every word as two ones."""

    def forward(self, words: Tensor) -> Tensor:
        return torch.ones(*words.shape, 2)


def test_embedding_dropout_drops_every_occurrence_of_a_word_in_an_example_or_none() -> None:
    torch.manual_seed(0)
    module = EmbeddingDropout(Ones(), "rate")
    bound(module)
    words = torch.randint(0, 3000, (4, 20_000)) * 7  # with gaps, since absent words take no draw
    output = module(words)
    assert torch.equal(output[..., 0], output[..., 1])
    for n, rate in enumerate(RATES):
        seen = torch.full((21_000,), -1.0)
        seen[words[n]] = output[n, :, 0]
        assert torch.equal(output[n, :, 0], seen[words[n]])
        factors = seen[seen >= 0]
        assert_kept(factors > 0, rate)
        torch.testing.assert_close(factors[factors > 0], torch.full_like(factors[factors > 0], 1 / (1 - rate)))


def test_embedding_dropout_drops_different_words_in_each_example() -> None:
    torch.manual_seed(0)
    output = EmbeddingDropout(Ones(), 0.5)(torch.arange(1000).repeat(2, 1))
    assert 400 < (output[0] != output[1]).any(1).sum() < 600


def test_embedding_dropout_with_time_first_equals_batch_first_transposed() -> None:
    words, embedding, outputs = torch.randint(0, 9, (4, 30)), nn.Embedding(9, 2), []
    for batch_first, order in ((True, (0, 1)), (False, (1, 0))):
        module = EmbeddingDropout(embedding, "rate", batch_first=batch_first)
        bound(module)
        torch.manual_seed(0)
        outputs.append(module(words.permute(*order)))
    assert torch.equal(outputs[0], outputs[1].transpose(0, 1))


def test_embedding_dropout_is_the_plain_embedding_outside_the_weight_phase() -> None:
    module, words = EmbeddingDropout(nn.Embedding(9, 2), "rate"), torch.randint(0, 9, (4, 30))
    hyperparameters = bound(module)
    assert not torch.equal(module(words), module.embedding(words))
    assert torch.equal(module.eval()(words), module.embedding(words))
    module.train()
    unbind(hyperparameters)
    assert torch.equal(module(words), module.embedding(words))


def test_export_replaces_embedding_dropout_by_its_embedding() -> None:
    net = nn.Sequential(EmbeddingDropout(nn.Embedding(9, 2), 0.1), LockedDropout(0.1))
    exported = export(convert(net, HyperparameterSet({"rate": Float(0.0, 1.0, init=0.5)})))
    assert [type(module) for module in exported] == [nn.Embedding, nn.Identity]  # type: ignore[attr-defined]


def test_locked_dropout_is_the_identity_outside_the_weight_phase() -> None:
    module, input = LockedDropout("rate"), torch.randn(4, 3, 5)
    hyperparameters = bound(module)
    assert not torch.equal(module(input), input)
    assert module.eval()(input) is input
    module.train()
    unbind(hyperparameters)
    assert module(input) is input


def test_sequence_dropouts_refuse_rates_out_of_range_and_inputs_of_wrong_shape() -> None:
    message = r"expected p to be a hyperparameter's name or a number in \[0, 1\], got 1.5"
    with pytest.raises(ValueError, match=f"LockedDropout: {message}"):
        LockedDropout(1.5)
    with pytest.raises(ValueError, match=f"EmbeddingDropout: {message}"):
        EmbeddingDropout(nn.Embedding(9, 2), 1.5)
    locked, embedding = LockedDropout("rate"), EmbeddingDropout(nn.Embedding(9, 2), "rate")
    bound(locked)
    bound(embedding)
    with pytest.raises(ValueError, match="one row per example, got 4 rows"):
        locked(torch.ones(3, 2, 2))
    with pytest.raises(ValueError, match="one row per example, got 4 rows"):
        embedding(torch.ones(3, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"expected a batch of sequences \[n, t, ...\], got shape \[3\]"):
        locked(torch.ones(3))
    with pytest.raises(ValueError, match=r"expected words \[n, t\], got shape \[3\]"):
        embedding(torch.ones(3, dtype=torch.long))


def test_attach_refuses_a_hyperparameter_beyond_the_range_of_a_rate_and_attaches_nothing() -> None:
    module = LockedDropout("rate")
    with pytest.raises(ValueError, match=r"LockedDropout: expected p in \[0, 1\], but the hyperparameter 'rate' is"):
        attach_all(module, HyperparameterSet({"rate": Float(0.0, None, init=0.5)}))
    assert module.hyperparameters is None
    bound(module)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_sequence_dropouts_keep_the_dtype(dtype: torch.dtype) -> None:
    assert LockedDropout(0.5)(torch.ones(2, 3, 4, dtype=dtype)).dtype == dtype
    embedding = EmbeddingDropout(nn.Embedding(9, 2, dtype=dtype), 0.5)
    assert embedding(torch.zeros(2, 3, dtype=torch.long)).dtype == dtype
