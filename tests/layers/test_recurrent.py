"""The recurrent response layers against a naive float64 loop that builds each example's own weights."""

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support import random_gates
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lightning_stn import Float, HyperparameterSet, dual
from lightning_stn.binding import bind, bind_weight_phase, unbind
from lightning_stn.convert import convert
from lightning_stn.layers import ResponseLayer, response_type
from lightning_stn.layers.recurrent import ResponseGRU, ResponseLSTM
from lightning_stn.methods.base import recentre
from lightning_stn.methods.delta import response_pass

H, N, I, O = 2, 4, 5, 3  # noqa: E741


@dataclass(frozen=True)
class Case:
    plain: type[nn.RNNBase]
    options: dict[str, Any] = field(default_factory=dict)
    t: int = 6
    initial: bool = False

    def __str__(self) -> str:
        words = [name if value is True else f"{name}={value}" for name, value in self.options.items()]
        return "-".join([self.plain.__name__, *words, f"t={self.t}"] + ["initial"] * self.initial)

    def build(self, **options: Any) -> nn.RNNBase:
        return self.plain(I, O, dtype=torch.float64, **{**self.options, **options})

    def input(self, n: int = N) -> Tensor:
        shape = (n, self.t, I) if self.options.get("batch_first") else (self.t, n, I)
        return torch.randn(shape, dtype=torch.float64)

    def states(self, n: int = N) -> Any:
        """Initial states in torch's own structure, or None."""
        if not self.initial:
            return None
        layers = self.options.get("num_layers", 1) * (1 + self.options.get("bidirectional", False))
        h = torch.randn(layers, n, self.options.get("proj_size", O), dtype=torch.float64)
        return (h, torch.randn(layers, n, O, dtype=torch.float64)) if self.plain is nn.LSTM else h


DEEP = {"num_layers": 2, "bidirectional": True, "batch_first": True}
CASES = [
    *(
        Case(plain, options, t, initial)
        for plain in (nn.LSTM, nn.GRU)
        for options, t, initial in [
            ({}, 6, False),
            ({}, N, True),  # time as long as the batch
            ({"batch_first": True}, N, False),
            ({"batch_first": True, "bias": False}, 6, True),
            ({"bidirectional": True}, 6, True),
            ({"num_layers": 2}, 1, False),
            (DEEP, N, True),
        ]
    ),
    Case(nn.LSTM, {"proj_size": 2}),
    Case(nn.LSTM, {"proj_size": 2, "bias": False, **DEEP}, N, True),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
both = pytest.mark.parametrize("case", [Case(nn.LSTM, DEEP, initial=True), Case(nn.GRU, DEEP, initial=True)], ids=str)


def hyperparameters() -> HyperparameterSet:
    return HyperparameterSet({name: Float(0.0, 1.0, init=0.5) for name in "ab"})


def respond(plain: nn.RNNBase, gates: bool = True) -> Any:
    layer = copy.deepcopy(plain)
    response = response_type(type(plain))
    assert response is not None
    response.adopt(layer, hyperparameters())
    return random_gates(layer, std=0.5) if gates else layer


def at(layer: Any, sample: Tensor, *arguments: Any) -> Any:
    with bind(layer.hyperparameters, sample):
        return layer(*arguments)


def tensors(result: Any) -> Iterator[Tensor]:
    """All tensors of whatever an RNN returns."""
    if isinstance(result, PackedSequence):
        yield result.data
    elif isinstance(result, Tensor):
        yield result
    else:
        for part in result:
            yield from tensors(part)


def assert_close(actual: Any, expected: Any) -> None:
    for one, other in zip(tensors(actual), tensors(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def assert_equal(actual: Any, expected: Any) -> None:
    assert all(torch.equal(one, other) for one, other in zip(tensors(actual), tensors(expected), strict=True))


def example(states: Any, n: int) -> Any:
    """The initial states of one example."""
    if states is None or isinstance(states, Tensor):
        return states if states is None else states[:, n : n + 1]
    return tuple(part[:, n : n + 1] for part in states)


def own_parameters(layer: ResponseLayer, names: list[str], row: Tensor) -> dict[str, Tensor]:
    """Entry by entry: `W[o] + sum_h V[o, h] h[h] R[o]`."""
    effective = {}
    for name in names:
        base, response, gates = (getattr(layer, each) for each in (name, f"response_{name}", f"{name}_gate"))
        units = []
        for o in range(base.shape[0]):
            gate = sum(gates[o, h] * row[h] for h in range(H))
            units.append(base[o] + gate * response[o])
        effective[name] = torch.stack(units)
    return effective


def naive(layer: Any, plain: nn.RNNBase, sample: Tensor, input: Tensor, states: Any) -> Any:
    """Each example alone, through the plain layer with its own parameters."""
    names = [name for name, _ in plain.named_parameters()]
    dim = 0 if plain.batch_first else 1
    results = [
        functional_call(
            plain, own_parameters(layer, names, sample[n]), (input.narrow(dim, n, 1), example(states, n)), strict=True
        )
        for n in range(input.shape[dim])
    ]
    output = torch.cat([each for each, _ in results], dim)
    if isinstance(plain, nn.GRU):
        return output, torch.cat([h for _, h in results], 1)
    return output, (torch.cat([h for _, (h, _) in results], 1), torch.cat([c for _, (_, c) in results], 1))


def rows(n: int) -> Tensor:
    return torch.randn(n, H, dtype=torch.float64)


@every_case
def test_per_example_path_equals_the_naive_loop(case: Case) -> None:
    plain = case.build()
    layer, sample, input, states = respond(plain), rows(N), case.input(), case.states()
    assert_close(at(layer, sample, input, states), naive(layer, plain, sample, input, states))


@every_case
def test_merged_path_equals_the_naive_loop(case: Case) -> None:
    plain = case.build()
    layer, sample, input, states = respond(plain), rows(1), case.input(), case.states()
    assert_close(at(layer, sample, input, states), naive(layer, plain, sample.expand(N, H), input, states))


@every_case
def test_merged_path_equals_per_example_path_with_equal_rows(case: Case) -> None:
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
def test_gradients_of_both_paths_agree_in_single_precision_where_other_kernels_run(case: Case, training: bool) -> None:
    layer, sample, input = respond(case.build()).float().train(training), rows(1), case.input().float()
    both = [
        torch.autograd.grad(sum(part.sin().sum() for part in tensors(at(layer, each, input))), list(layer.parameters()))  # type: ignore[arg-type]
        for each in (sample, sample.repeat(N, 1))
    ]
    for merged, unrolled in zip(*both, strict=True):
        torch.testing.assert_close(merged, unrolled, rtol=1e-3, atol=1e-4)


@both
@pytest.mark.parametrize("n", [1, 2], ids=["shared", "per-example"])
def test_gradcheck(case: Case, n: int) -> None:
    layer, input, states = respond(case.build()), case.input(2).requires_grad_(), case.states(2)
    sample = rows(n).requires_grad_()

    def run(sample: Tensor, input: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors(at(layer, sample, input, states)))

    assert torch.autograd.gradcheck(run, (sample, input, *layer.parameters()), fast_mode=True)


def linearised(layer: Any, sample: Tensor, *arguments: Any) -> list[Tensor]:
    """The first-order prediction from `lambda = 0`, by the library."""
    bind_weight_phase(layer.hyperparameters, sample)
    try:
        with response_pass(layer, layer.hyperparameters, linear=True):
            return [dual.linear_prediction(part) for part in tensors(layer(*arguments))]
    finally:
        unbind(layer.hyperparameters)


@every_case
@pytest.mark.parametrize("n", [1, N], ids=["shared", "per-example"])
def test_linearised_it_equals_the_naive_loop(case: Case, n: int) -> None:
    plain = case.build()
    layer, sample, input, states = respond(plain), rows(n), case.input(), case.states()

    def predict(t: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors(naive(layer, plain, t * sample.expand(N, H), input, states)))

    primal, tangent = torch.autograd.functional.jvp(predict, torch.zeros(()).double(), torch.ones(()).double())
    expected = [a + b for a, b in zip(primal, tangent, strict=True)]
    assert_close(linearised(layer, sample, input, states), expected)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(expected, primal, strict=True))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize(
    "frozen", [("weight",), ("weight_hh", "bias_hh"), ("weight_ih", "bias_ih"), ("weight", "bias")]
)
def test_linearised_with_parameters_that_do_not_respond(kind: Any, frozen: tuple[str, ...]) -> None:
    """Against finite differences, behind a layer that responds."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 3), kind(3, 4, batch_first=True))
    for name, parameter in plain[1].named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    hyperparameters = HyperparameterSet({f"h{i}": Float(0.0, 1.0, init=0.5) for i in range(H)})
    net = random_gates(convert(plain, hyperparameters).double(), 0.5)
    recentre(net, hyperparameters, True)
    x, moved = torch.randn(N, 5, 3).double(), torch.randn(N, H).double()

    def at(t: float) -> Tensor:
        with bind(hyperparameters, hyperparameters.current() + t * moved), torch.no_grad():
            return net(x)[0]  # type: ignore[no-any-return]

    expected = at(0.0) + (at(1e-5) - at(-1e-5)) / 2e-5
    bind_weight_phase(hyperparameters, hyperparameters.current() + moved)
    with response_pass(net, hyperparameters, linear=True):
        found = net(x)[0]
    unbind(hyperparameters)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)
    assert (found - at(0.0)).abs().max() > 1e-3


@every_case
@pytest.mark.parametrize("n", [1, N], ids=["shared", "per-example"])
def test_gradcheck_of_the_linearised(case: Case, n: int) -> None:
    layer, sample, input, states = respond(case.build()), rows(n), case.input(), case.states()
    response = layer.response_parameters()

    def run(*_: Tensor) -> tuple[Tensor, ...]:
        return tuple(linearised(layer, sample, input, states))

    assert torch.autograd.gradcheck(run, response, fast_mode=True)


@both
@pytest.mark.parametrize("lengths", [[5, 3, 4, 6], [1, 6, 6, 2]], ids=str)
def test_linearised_packed_sequences_equal_each_sequence_alone(case: Case, lengths: list[int]) -> None:
    layer, sample, input = respond(case.build()), rows(N), case.input()
    dim = 0 if layer.batch_first else 1
    packed = pack_padded_sequence(input, torch.tensor(lengths), layer.batch_first, enforce_sorted=False)
    data, *states = linearised(layer, sample, packed)
    output, _ = pad_packed_sequence(packed._replace(data=data), layer.batch_first)
    for n, length in enumerate(lengths):
        alone = linearised(layer, sample[n : n + 1], input.narrow(dim, n, 1).narrow(1 - dim, 0, length))
        found = [output.narrow(dim, n, 1).narrow(1 - dim, 0, length), *(part[:, n : n + 1] for part in states)]
        assert_close(found, alone)


@both
def test_a_second_derivative_is_refused_with_a_row_per_example(case: Case) -> None:
    layer, input = respond(case.build()), case.input().requires_grad_()
    output, _ = at(layer, rows(N), input)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(output.sum(), input, create_graph=True)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@every_case
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_with_zero_gates_it_equals_the_torch_layer_bit_for_bit(
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
def test_unattached_it_equals_the_torch_layer_bit_for_bit(case: Case) -> None:
    plain = case.build()
    layer, input, states = respond(plain), case.input(), case.states()
    layer.__dict__["_hyperparameters"] = None
    assert_equal(layer(input, states), plain(input, states))


@both
def test_structure_of_the_result(case: Case) -> None:
    plain = case.build()
    layer, input = respond(plain), case.input()
    for n in (1, N):
        result = at(layer, rows(n), input)
        assert isinstance(result, tuple)
        assert isinstance(result[1], tuple) is (case.plain is nn.LSTM)
        assert [each.shape for each in tensors(result)] == [each.shape for each in tensors(plain(input))]


@both
@pytest.mark.parametrize("n", [1, N], ids=["shared", "per-example"])
def test_the_initial_states_may_be_a_keyword(case: Case, n: int) -> None:
    layer, sample, input, states = respond(case.build()), rows(n), case.input(), case.states()
    with bind(layer.hyperparameters, sample):
        assert_equal(layer(input, hx=states), layer(input, states))


LENGTHS = [[6, 4, 4, 1], [2, 6, 1, 5]]  # the second is not sorted


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
    for mine, torch_s in [(output, packed), (shared[0], packed)]:
        assert torch.equal(mine.batch_sizes, torch_s.batch_sizes)
        for name in ("sorted_indices", "unsorted_indices"):
            one, other = getattr(mine, name), getattr(torch_s, name)
            assert one is other is None or torch.equal(one, other)
    padded, _ = pad_packed_sequence(output, batch_first)
    first, _ = pad_packed_sequence(shared[0], batch_first)
    for n, length in enumerate(lengths):
        dim = 0 if batch_first else 1
        alone = input.narrow(dim, n, 1).narrow(1 - dim, 0, length)
        for results, states_after, row in [(padded, state, n), (first, shared[1], 0)]:
            expected = naive(layer, plain, sample[row : row + 1], alone, example(states, n))
            mine_alone = results.narrow(dim, n, 1).narrow(1 - dim, 0, length)
            assert_close((mine_alone, example(states_after, n)), expected)


@both
@pytest.mark.parametrize("pack", [False, True], ids=["padded", "packed"])
def test_a_row_reaches_its_own_example_only(case: Case, pack: bool) -> None:
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
@pytest.mark.parametrize("plain", [nn.LSTM, nn.GRU])
def test_dropout_between_layers_in_merged_mode_is_torch_s_own(plain: type[nn.RNNBase], training: bool) -> None:
    reference = plain(I, O, num_layers=3, dropout=0.4).train(training)
    layer, input, sample = respond(reference, gates=False), torch.randn(7, N, I), rows(1)
    torch.manual_seed(1)
    expected = reference(input)
    torch.manual_seed(1)
    assert_equal(at(layer, sample, input), expected)


@pytest.mark.parametrize("plain", [nn.LSTM, nn.GRU])
def test_dropout_between_layers_with_a_row_per_example(plain: type[nn.RNNBase]) -> None:
    """Only the layers below the last drop out, at the rate given, and only in training mode."""
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


@both
def test_an_input_without_a_batch_takes_one_row_only(case: Case) -> None:
    plain = case.build()
    layer, input = respond(plain, gates=False), torch.randn(N, I, dtype=torch.float64)
    assert_equal(at(layer, rows(1), input), plain(input))
    with pytest.raises(ValueError, match=r"4 rows.*as dimension 0.*got shape \[4, 5\].*perturb='batch'"):
        at(layer, rows(N), input)


@both
@pytest.mark.parametrize("batch_first", [True, False])
def test_rows_that_do_not_fit_the_batch_are_refused(case: Case, batch_first: bool) -> None:
    layer = respond(case.build(batch_first=batch_first))
    wanted = rf"Response(LSTM|GRU): expected.*6 rows, as dimension {0 if batch_first else 1}"
    input = torch.randn(N, 6, I) if batch_first else torch.randn(6, N, I)  # time fits, the batch does not
    with pytest.raises(ValueError, match=wanted + r".*got shape.*perturb='batch'"):
        at(layer, rows(6), input.double())
    packed = pack_padded_sequence(input.double(), torch.tensor([6, 5, 4, 3]), batch_first)
    with pytest.raises(ValueError, match=wanted + ".*got 4 packed sequences.*perturb='batch'"):
        at(layer, rows(6), packed)


@both
@pytest.mark.parametrize("n", [1, N], ids=["shared", "per-example"])
def test_inputs_that_torch_refuses_are_refused_alike(case: Case, n: int) -> None:
    layer, sample, states = respond(case.build()), rows(n), case.states(N - 1)
    with pytest.raises(RuntimeError, match=r"Expected hidden.*size \(4, 4, 3\), got \[4, 3, 3\]"):
        at(layer, sample, case.input(), states)
    with pytest.raises(RuntimeError, match="Expected 5, got 6"):
        at(layer, sample, torch.randn(N, 6, I + 1, dtype=torch.float64))
    # The merged path has put the parameters back.
    assert layer._flat_weights[0] is layer.weight_ih_l0


@both
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("n", [1, N], ids=["shared", "per-example"])
def test_copies_compute_the_same_and_are_independent(case: Case, clone: Callable[[Any], Any], n: int) -> None:
    layer, sample, input = respond(case.build()), rows(n), case.input()
    before = at(layer, sample, input)
    other = clone(layer)
    assert_equal(at(other, sample, input), before)
    other.weight_hh_l0.data.add_(1)
    assert not torch.equal(at(other, sample, input)[0], before[0])
    assert_equal(at(layer, sample, input), before)
    assert all(
        mine is own
        for mine, own in zip(
            other._flat_weights, [own for weights in other.all_weights for own in weights], strict=True
        )
    )


def runs(plain: nn.RNNBase, input: Tensor) -> bool:
    """Whether torch has a kernel; oneDNN has no bfloat16 LSTM on some CPUs."""
    try:
        plain(input)
    except RuntimeError as error:
        return "primitive" not in str(error)
    return True


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_other_precisions(case: Case, dtype: torch.dtype) -> None:
    layer, input = respond(case.build()).to(dtype), case.input()
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    reference = copy.deepcopy(layer).double()
    for n in (1, N):
        if n == 1 and not runs(case.build().to(dtype), input.to(dtype)):
            continue
        sample = rows(n)
        output, _ = at(layer, sample, input.to(dtype))
        assert output.dtype == dtype
        torch.testing.assert_close(output.double(), at(reference, sample, input)[0], rtol=0, atol=0.05)


@both
@pytest.mark.parametrize("n", [1, N], ids=["shared", "per-example"])
def test_autocast(case: Case, n: int) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if n == 1 and not runs(case.build().float(), case.input().float()):
            pytest.skip("torch's own layer has no such kernel on this CPU")
    layer, sample, input = respond(case.build()).float(), rows(n), case.input().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = at(layer, sample, input)
    output.float().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    torch.testing.assert_close(output.float(), at(layer, sample, input)[0], rtol=0, atol=0.05)


@every_case
def test_a_plain_checkpoint_loads_and_only_response_keys_are_missing(case: Case) -> None:
    layer, plain = respond(case.build()), case.build()
    keys = layer.load_state_dict(plain.state_dict(), strict=False)
    assert not keys.unexpected_keys
    assert set(layer.state_dict()) - set(keys.missing_keys) == set(plain.state_dict())
    assert set(keys.missing_keys) == {
        key for name in plain.state_dict() for key in (f"response_{name}", f"{name}_gate")
    }
    layer.__dict__["_hyperparameters"] = None
    input = case.input()
    assert_equal(layer(input), plain(input))


@both
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("n", [1, N], ids=["shared", "per-example"])
def test_state_dict_round_trip(case: Case, assign: bool, n: int) -> None:
    layer, other, sample, input = respond(case.build()), respond(case.build(), gates=False), rows(n), case.input()
    other.load_state_dict(layer.state_dict(), assign=assign)
    assert_equal(at(other, sample, input), at(layer, sample, input))


@both
@pytest.mark.parametrize("n", [1, N], ids=["shared", "per-example"])
def test_parameters_given_by_functional_call_are_the_ones_used(case: Case, n: int) -> None:
    layer, other, sample, input = respond(case.build()), respond(case.build()), rows(n), case.input()
    before = at(layer, sample, input)
    with bind(layer.hyperparameters, sample):
        given = functional_call(layer, dict(other.named_parameters()), (input,))
    assert_equal(given, at(other, sample, input))
    assert_equal(at(layer, sample, input), before)


@every_case
def test_size_of_the_response(case: Case) -> None:
    """`R, r` as large as the layer; `V, C` a row of `h` for each output unit and parameter."""
    plain = case.build()
    own = sum(p.numel() for p in plain.parameters())
    gates = H * sum(p.shape[0] for p in plain.parameters())
    assert sum(p.numel() for p in respond(plain).response_parameters()) == own + gates


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_resetting_redraws_what_it_names(kind: Any) -> None:
    """All uniform in +-1/sqrt(hidden_size), as torch's own; the gates stay."""
    layer = respond(kind(I, 40))
    gates = {name: p.detach().clone() for name, p in layer.named_parameters() if name.endswith("_gate")}
    layer.reset_response()
    responses = {name: p.detach().clone() for name, p in layer.named_parameters() if name.startswith("response_")}
    torch.manual_seed(0)
    layer.reset_parameters()
    torch.manual_seed(0)
    own = kind(I, 40).state_dict()
    state = layer.state_dict()
    assert all(torch.equal(state[name], value) for name, value in {**gates, **responses, **own}.items())
    for drawn in responses.values():
        assert 0.9 * 40**-0.5 < drawn.abs().max() <= 40**-0.5  # of 120 or more


@pytest.mark.parametrize("frozen", [["weight_hh_l0"], ["bias_ih_l1_reverse", "weight_ih_l0"]], ids=str)
@pytest.mark.parametrize("n", [1, N], ids=["shared", "per-example"])
@both
def test_frozen_parameters_do_not_respond(case: Case, n: int, frozen: list[str]) -> None:
    plain = case.build()
    for name in frozen:
        getattr(plain, name).requires_grad_(False)
    layer, whole = respond(plain), respond(case.build())
    whole.load_state_dict(layer.state_dict(), strict=False)
    for name in frozen:
        assert getattr(layer, f"response_{name}") is None
        getattr(whole, f"{name}_gate").data.zero_()
    sample, input, states = rows(n), case.input(), case.states()
    assert_close(at(layer, sample, input, states), at(whole, sample, input, states))
    with torch.no_grad():
        assert_close(at(layer, sample, input, states), at(whole, sample, input, states))


@every_case
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_export_gives_the_plain_layer_at_the_current_hyperparameters(case: Case, context: Any, training: bool) -> None:
    layer, input, states = respond(case.build()).train(training), case.input(), case.states()
    plain = copy.deepcopy(layer)
    plain.make_plain()
    assert type(plain) is case.plain
    with context():
        # Torch's CPU kernels add up in another order on inference tensors, which the effective parameters are then.
        check = assert_close if context is torch.inference_mode else assert_equal
        check(plain(input, states), layer(input, states))
    assert all(mine is own for mine, own in zip(plain._flat_weights, plain.parameters(), strict=True))


def test_weights_that_a_hook_computes_are_refused() -> None:
    layer = nn.LSTM(I, O)
    assert ResponseLSTM.refusal(layer) is None
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(layer, "weight_hh_l0")
    assert "computed from other parameters" in str(ResponseLSTM.refusal(layer))


@pytest.mark.parametrize(("response", "chunks"), [(ResponseLSTM, 4), (ResponseGRU, 3)])
def test_built_directly_it_keeps_the_torch_constructor(response: Any, chunks: int) -> None:
    layer = response(I, O, 2, bias=False, dtype=torch.float64, hyperparameters=hyperparameters())
    assert isinstance(layer, response.plain)
    assert layer.weight_hh_l1_gate.shape == (chunks * O, H)
    assert not layer.weight_hh_l1_gate.any()
    assert not hasattr(layer, "response_bias_ih_l0")
    assert layer(torch.randn(2, 1, I, dtype=torch.float64))[0].shape == (2, 1, O)


def test_an_empty_batch() -> None:
    layer = respond(nn.LSTM(I, O))
    output, (h, c) = at(layer, torch.randn(0, H), torch.randn(6, 0, I))
    assert output.shape == (6, 0, O)
    assert h.shape == c.shape == (1, 0, O)


@both
@pytest.mark.parametrize("n", [1, N], ids=["shared", "per-example"])
@pytest.mark.filterwarnings("default")  # dynamo's own, about the graphs that it breaks around torch's RNNs
def test_it_compiles(case: Case, n: int) -> None:
    layer, sample, input = respond(case.build()), rows(n), case.input()
    compiled = torch.compile(layer, backend="eager")
    with bind(layer.hyperparameters, sample):
        assert_close(compiled(input), layer(input))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")
@both
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("n", [1, N], ids=["shared", "per-example"])
def test_on_a_gpu_it_equals_the_cpu_in_either_mode(case: Case, training: bool, n: int) -> None:
    layer = respond(case.build()).train(training)
    sample, input = rows(n).requires_grad_(), case.input()
    other, there = copy.deepcopy(layer).cuda(), sample.detach().cuda().requires_grad_()
    output, output_there = at(layer, sample, input)[0], at(other, there, input.cuda())[0]
    output.sin().sum().backward()
    output_there.sin().sum().backward()
    assert sample.grad is not None
    assert there.grad is not None
    torch.testing.assert_close(output_there.cpu(), output)
    torch.testing.assert_close(there.grad.cpu(), sample.grad)
