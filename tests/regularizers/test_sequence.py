"""Dropouts for sequences: what is dropped together, at each example's own rate."""

import math

import pytest
import torch
from torch import Tensor

from lightning_stn import Float, HyperparameterSet
from lightning_stn.binding import Regularizer, attach, bind_weight_phase, unbind
from lightning_stn.regularizers import EmbeddingDropout, LockedDropout

LOGITS = torch.tensor([[-3.0], [0.0], [1.0], [3.0]])
RATES = torch.sigmoid(LOGITS[:, 0]).tolist()


def bound(module: Regularizer, sample: Tensor = LOGITS) -> HyperparameterSet:
    hyperparameters = HyperparameterSet({"rate": Float(0.0, 1.0, init=0.5)})
    attach(module, hyperparameters)
    bind_weight_phase(hyperparameters, sample)
    return hyperparameters


def assert_kept(kept: Tensor, rate: float) -> None:
    """Six binomial standard deviations: a false alarm in fewer than one of 10^8 runs."""
    assert abs(kept.double().mean().item() - (1 - rate)) < 6 * math.sqrt(rate * (1 - rate) / kept.numel())


def test_locked_dropout_has_one_mask_over_time_and_each_example_s_rate() -> None:
    torch.manual_seed(0)
    module = LockedDropout("rate")
    bound(module)
    output = module(torch.ones(4, 3, 5000))
    assert torch.equal(output[:, :1].expand_as(output), output)
    for row, rate in zip(output[:, 0], RATES, strict=True):
        assert_kept(row > 0, rate)
        torch.testing.assert_close(row[row > 0], torch.full_like(row[row > 0], 1 / (1 - rate)))


def test_locked_dropout_with_time_first_is_the_same_transposed() -> None:
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


def test_embedding_dropout_drops_a_word_everywhere_in_an_example_or_nowhere() -> None:
    torch.manual_seed(0)
    module = EmbeddingDropout("rate")
    bound(module)
    words = torch.randint(0, 3000, (4, 20_000)) * 7  # words that do not occur take no draw
    output = module(torch.ones(4, 20_000, 2), words)
    assert torch.equal(output[..., 0], output[..., 1])
    for n, rate in enumerate(RATES):
        seen = torch.full((21_000,), -1.0)
        seen[words[n]] = output[n, :, 0]
        assert torch.equal(output[n, :, 0], seen[words[n]])
        factors = seen[seen >= 0]
        assert_kept(factors > 0, rate)
        torch.testing.assert_close(factors[factors > 0], torch.full_like(factors[factors > 0], 1 / (1 - rate)))


def test_examples_drop_different_words() -> None:
    torch.manual_seed(0)
    output = EmbeddingDropout(0.5)(torch.ones(2, 1000, 1), torch.arange(1000).repeat(2, 1))
    assert 400 < (output[0] != output[1]).sum() < 600


def test_embedding_dropout_with_time_first_is_the_same_transposed() -> None:
    words, embedded, outputs = torch.randint(0, 9, (4, 30)), torch.randn(4, 30, 2), []
    for module, order in ((EmbeddingDropout("rate"), (0, 1)), (EmbeddingDropout("rate", batch_first=False), (1, 0))):
        bound(module)
        torch.manual_seed(0)
        outputs.append(module(embedded.permute(*order, 2), words.permute(*order)))
    assert torch.equal(outputs[0], outputs[1].transpose(0, 1))


@pytest.mark.parametrize("module", [LockedDropout("rate"), EmbeddingDropout("rate")], ids=str)
def test_inert_outside_the_weight_phase(module: Regularizer) -> None:
    hyperparameters = bound(module)
    input, words = torch.randn(4, 3, 5), torch.randint(0, 9, (4, 3))
    more = (words,) if isinstance(module, EmbeddingDropout) else ()
    assert not torch.equal(module(input, *more), input)
    assert module.eval()(input, *more) is input
    module.train()
    unbind(hyperparameters)
    assert module(input, *more) is input


@pytest.mark.parametrize("kind", [LockedDropout, EmbeddingDropout])
def test_bad_input(kind: type[LockedDropout] | type[EmbeddingDropout]) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__}: expected p to be a name or a rate in \[0, 1\], got 1.5"):
        kind(1.5)
    module = kind("rate")
    bound(module)
    with pytest.raises(ValueError, match=r"one row per example, got 4 rows"):
        module(*[torch.ones(3, 2, 2), torch.ones(3, 2, dtype=torch.long)][: 1 + (kind is EmbeddingDropout)])


def test_shapes_that_do_not_belong_together() -> None:
    with pytest.raises(ValueError, match=r"expected a batch of sequences \[n, t, ...\], got shape \[3\]"):
        LockedDropout(0.1)(torch.ones(3))
    with pytest.raises(ValueError, match=r"got shapes \[3, 2, 5\] and \[2, 3\]"):
        EmbeddingDropout(0.1)(torch.ones(3, 2, 5), torch.ones(2, 3, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtype_stays(dtype: torch.dtype) -> None:
    assert LockedDropout(0.5)(torch.ones(2, 3, 4, dtype=dtype)).dtype == dtype
    assert EmbeddingDropout(0.5)(torch.ones(2, 3, 4, dtype=dtype), torch.zeros(2, 3, dtype=torch.long)).dtype == dtype
