"""The recurrent response layers against a naive float64 loop that builds the effective weights of each example."""

from typing import Any

import pytest
import torch
from layers.recurrent_cases import (
    CASES,
    LENGTHS,
    Case,
    H,
    I,
    N,
    O,
    assert_close,
    assert_equal,
    at,
    every_case,
    every_kind,
    example,
    naive,
    respond,
    rows,
    tensors,
)
from support import random_gates
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_stn import Float, HyperparameterSet, dual
from lightning_stn.binding import bind, bind_weight_phase, unbind
from lightning_stn.convert import convert
from lightning_stn.methods.base import recentre
from lightning_stn.methods.delta import response_pass


@every_case
def test_row_per_example_equals_the_naive_loop(case: Case) -> None:
    plain = case.build()
    layer, sample, input, states = respond(plain), rows(N), case.input(), case.states()
    assert_close(at(layer, sample, input, states), naive(layer, plain, sample, input, states))


@every_case
def test_shared_row_equals_the_naive_loop(case: Case) -> None:
    plain = case.build()
    layer, sample, input, states = respond(plain), rows(1), case.input(), case.states()
    assert_close(at(layer, sample, input, states), naive(layer, plain, sample.expand(N, H), input, states))


@every_case
def test_shared_row_equals_the_same_row_for_each_example(case: Case) -> None:
    layer, sample, input, states = respond(case.build()), rows(1), case.input(), case.states()
    assert_close(at(layer, sample, input, states), at(layer, sample.repeat(N, 1), input, states))


@every_case
@pytest.mark.parametrize("shared", [True, False])
def test_gradients_equal_those_of_the_naive_loop(case: Case, shared: bool) -> None:
    plain = case.build()
    layer, sample, input, states = respond(plain), rows(1 if shared else N), case.input(), case.states()
    leaves = [sample, input, *([] if states is None else tensors(states))]
    wanted = [leaf.requires_grad_() for leaf in leaves] + list(layer.parameters())

    def gradients(result: Any) -> tuple[Tensor, ...]:
        loss = sum((i + 1) * part.sin().sum() for i, part in enumerate(tensors(result)))
        return torch.autograd.grad(loss, wanted)  # type: ignore[arg-type]

    expected = gradients(naive(layer, plain, sample.expand(N, H), input, states))
    assert_close(gradients(at(layer, sample, input, states)), expected)


@every_case
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_shared_row_are_close_to_those_of_the_same_row_for_each_example_in_float32(
    case: Case, training: bool
) -> None:
    """Torch runs other kernels in float32 than in float64."""
    layer, sample, input = respond(case.build()).float().train(training), rows(1), case.input().float()
    gradients = [
        torch.autograd.grad(sum(part.sin().sum() for part in tensors(at(layer, each, input))), list(layer.parameters()))  # type: ignore[arg-type]
        for each in (sample, sample.repeat(N, 1))
    ]
    for shared, per_example in zip(*gradients, strict=True):
        torch.testing.assert_close(shared, per_example, rtol=1e-3, atol=1e-4)


@every_kind
@pytest.mark.parametrize("n", [1, 2], ids=["shared", "per-example"])
def test_gradients_pass_gradcheck(case: Case, n: int) -> None:
    layer, input, states = respond(case.build()), case.input(2).requires_grad_(), case.states(2)
    sample = rows(n).requires_grad_()

    def run(sample: Tensor, input: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors(at(layer, sample, input, states)))

    assert torch.autograd.gradcheck(run, (sample, input, *layer.parameters()), fast_mode=True)


def linearised(layer: Any, sample: Tensor, *arguments: Any) -> list[Tensor]:
    """First-order prediction of the layer around `lambda = 0`."""
    bind_weight_phase(layer.hyperparameters, sample)
    try:
        with response_pass(layer, layer.hyperparameters, linear=True):
            return [dual.linear_prediction(part) for part in tensors(layer(*arguments))]
    finally:
        unbind(layer.hyperparameters)


@every_case
@pytest.mark.parametrize("n", [1, N], ids=["shared", "per-example"])
def test_linearised_pass_equals_the_jvp_of_the_naive_loop(case: Case, n: int) -> None:
    plain = case.build()
    layer, sample, input, states = respond(plain), rows(n), case.input(), case.states()

    def predict(t: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors(naive(layer, plain, t * sample.expand(N, H), input, states)))

    primal, tangent = torch.autograd.functional.jvp(predict, torch.zeros(()).double(), torch.ones(()).double())
    expected = [a + b for a, b in zip(primal, tangent, strict=True)]
    assert_close(linearised(layer, sample, input, states), expected)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(expected, primal, strict=True))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "frozen", [("weight",), ("weight_hh", "bias_hh"), ("weight_ih", "bias_ih"), ("weight", "bias")]
)
def test_linearised_pass_equals_finite_differences_where_some_parameters_do_not_respond(
    kind: Any, frozen: tuple[str, ...]
) -> None:
    """The inputs have a tangent, since they come from a layer that responds."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 3), kind(3, 4, batch_first=True))
    for name, parameter in plain[1].named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    hyperparameters = HyperparameterSet({f"h{i}": Float(0.0, 1.0, init=0.5) for i in range(H)})
    net = random_gates(convert(plain, hyperparameters).double(), 0.5)
    recentre(net, hyperparameters, True)
    x, step = torch.randn(N, 5, 3).double(), torch.randn(N, H).double()

    def at(t: float) -> Tensor:
        with bind(hyperparameters, hyperparameters.current() + t * step), torch.no_grad():
            return net(x)[0]  # type: ignore[no-any-return]

    expected = at(0.0) + (at(1e-5) - at(-1e-5)) / 2e-5
    bind_weight_phase(hyperparameters, hyperparameters.current() + step)
    with response_pass(net, hyperparameters, linear=True):
        found = net(x)[0]
    unbind(hyperparameters)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)
    assert (found - at(0.0)).abs().max() > 1e-3


@every_case
@pytest.mark.parametrize("n", [1, N], ids=["shared", "per-example"])
def test_gradients_of_linearised_pass_pass_gradcheck(case: Case, n: int) -> None:
    layer, sample, input, states = respond(case.build()), rows(n), case.input(), case.states()
    response = layer.response_parameters()

    def run(*_: Tensor) -> tuple[Tensor, ...]:
        return tuple(linearised(layer, sample, input, states))

    assert torch.autograd.gradcheck(run, response, fast_mode=True)


@every_kind
@pytest.mark.parametrize("lengths", [[5, 3, 4, 6], [1, 6, 6, 2]], ids=str)
def test_linearised_pass_of_packed_sequences_equals_each_sequence_alone(case: Case, lengths: list[int]) -> None:
    layer, sample, input = respond(case.build()), rows(N), case.input()
    dim = 0 if layer.batch_first else 1
    packed = pack_padded_sequence(input, torch.tensor(lengths), layer.batch_first, enforce_sorted=False)
    data, *states = linearised(layer, sample, packed)
    output, _ = pad_packed_sequence(packed._replace(data=data), layer.batch_first)
    for n, length in enumerate(lengths):
        alone = linearised(layer, sample[n : n + 1], input.narrow(dim, n, 1).narrow(1 - dim, 0, length))
        found = [output.narrow(dim, n, 1).narrow(1 - dim, 0, length), *(part[:, n : n + 1] for part in states)]
        assert_close(found, alone)


@every_kind
def test_row_per_example_refuses_a_second_derivative(case: Case) -> None:
    layer, input = respond(case.build()), case.input().requires_grad_()
    output, _ = at(layer, rows(N), input)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(output.sum(), input, create_graph=True)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@every_case
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_layer_with_zero_gates_equals_the_torch_layer_bit_for_bit(
    case: Case, training: bool, grad: bool, dtype: torch.dtype
) -> None:
    plain = case.build().to(dtype).train(training)
    layer, input = respond(plain, gates=False), case.input().to(dtype)
    states = None if case.initial is False else case.states()
    states = states.to(dtype) if isinstance(states, Tensor) else states and tuple(each.to(dtype) for each in states)
    with torch.set_grad_enabled(grad):
        expected = plain(input, states)
        assert_equal(layer(input, states), expected)
        assert_equal(at(layer, rows(1), input, states), expected)
        for one, other in zip(tensors(at(layer, rows(N), input, states)), tensors(expected), strict=True):
            torch.testing.assert_close(one, other)


@every_case
def test_layer_without_a_set_equals_the_torch_layer_bit_for_bit(case: Case) -> None:
    plain = case.build()
    layer, input, states = respond(plain), case.input(), case.states()
    layer.__dict__["_hyperparameters"] = None
    assert_equal(layer(input, states), plain(input, states))


@pytest.mark.parametrize("lengths", LENGTHS, ids=["sorted", "unsorted"])
@pytest.mark.parametrize("case", [case for case in CASES if case.t == 6 or case.options.get("num_layers")], ids=str)
def test_packed_sequences_equal_the_naive_loop_on_each_sequence(case: Case, lengths: list[int]) -> None:
    case = Case(case.plain, case.options, 6, case.initial)
    plain = case.build()
    layer, sample, input, states = respond(plain), rows(N), case.input(), case.states()
    batch_first = plain.batch_first
    packed = pack_padded_sequence(input, torch.tensor(lengths), batch_first, enforce_sorted=lengths == LENGTHS[0])
    shared = at(layer, sample[:1], packed, states)
    output, state = at(layer, sample, packed, states)
    for result in (output, shared[0]):
        assert torch.equal(result.batch_sizes, packed.batch_sizes)
        for name in ("sorted_indices", "unsorted_indices"):
            one, other = getattr(result, name), getattr(packed, name)
            assert one is other is None or torch.equal(one, other)
    padded, _ = pad_packed_sequence(output, batch_first)
    first, _ = pad_packed_sequence(shared[0], batch_first)
    for n, length in enumerate(lengths):
        dim = 0 if batch_first else 1
        alone = input.narrow(dim, n, 1).narrow(1 - dim, 0, length)
        for results, states_after, row in [(padded, state, n), (first, shared[1], 0)]:
            expected = naive(layer, plain, sample[row : row + 1], alone, example(states, n))
            found = results.narrow(dim, n, 1).narrow(1 - dim, 0, length)
            assert_close((found, example(states_after, n)), expected)


@every_kind
@pytest.mark.parametrize("pack", [False, True], ids=["padded", "packed"])
def test_row_affects_only_its_example(case: Case, pack: bool) -> None:
    layer, sample, input = respond(case.build()), rows(N), case.input()

    def run() -> Tensor:
        if not pack:
            return at(layer, sample, input)[0]
        packed = pack_padded_sequence(input, torch.tensor(LENGTHS[1]), batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(at(layer, sample, packed)[0], batch_first=True)[0]

    before = run()
    sample[1] += 1
    assert (run() != before).flatten(1).any(1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("plain", [nn.LSTM, nn.GRU, nn.RNN])
def test_shared_row_draws_the_dropout_between_layers_as_torch_does(plain: type[nn.RNNBase], training: bool) -> None:
    reference = plain(I, O, num_layers=3, dropout=0.4).train(training)
    layer, input, sample = respond(reference, gates=False), torch.randn(7, N, I), rows(1)
    torch.manual_seed(1)
    expected = reference(input)
    torch.manual_seed(1)
    assert_equal(at(layer, sample, input), expected)


@pytest.mark.parametrize("plain", [nn.LSTM, nn.GRU, nn.RNN])
def test_row_per_example_has_dropout_between_layers_in_training_mode_only(plain: type[nn.RNNBase]) -> None:
    """Dropout acts on the inputs of all layers except the first, with the given rate."""
    reference = plain(I, 40, num_layers=2, dropout=0.25)
    layer, input, sample = respond(reference), torch.randn(50, N, I), rows(N)
    seen = []
    scan = layer._scan
    layer.__dict__["_scan"] = lambda place, sample, input, *rest: (
        seen.append(input),
        scan(place, sample, input, *rest),
    )[1]
    output, _ = at(layer, sample, input)
    first, second = seen
    assert torch.equal(first, input)
    assert (output != 0).all()
    assert (second == 0).double().mean() == pytest.approx(0.25, abs=0.025)  # 8,000 draws: 5 standard deviations
    layer.eval()
    assert torch.equal(at(layer, sample, input)[0], at(layer, sample, input)[0])
