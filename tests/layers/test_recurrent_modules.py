"""The recurrent response layers as modules: calls, refusals, copies, precisions, checkpoints, export."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers.recurrent_cases import (
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
    hyperparameters,
    respond,
    rows,
    tensors,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_stn.binding import bind
from lightning_stn.layers.recurrent import ResponseGRU, ResponseLSTM, ResponseRNN


@every_kind
def test_result_has_the_structure_of_the_torch_result(case: Case) -> None:
    plain = case.build()
    layer, input = respond(plain), case.input()
    for n in (1, N):
        result = at(layer, rows(n), input)
        assert isinstance(result, tuple)
        assert isinstance(result[1], tuple) is (case.plain is nn.LSTM)
        assert [each.shape for each in tensors(result)] == [each.shape for each in tensors(plain(input))]


@every_kind
@pytest.mark.parametrize("n", [1, N], ids=["shared", "per-example"])
def test_initial_states_may_be_a_keyword_argument(case: Case, n: int) -> None:
    layer, sample, input, states = respond(case.build()), rows(n), case.input(), case.states()
    with bind(layer.hyperparameters, sample):
        assert_equal(layer(input, hx=states), layer(input, states))


@every_kind
def test_input_without_a_batch_dimension_needs_one_row(case: Case) -> None:
    plain = case.build()
    layer, input = respond(plain, gates=False), torch.randn(N, I, dtype=torch.float64)
    assert_equal(at(layer, rows(1), input), plain(input))
    with pytest.raises(ValueError, match=r"4 rows.*as dimension 0.*got shape \[4, 5\].*perturb='batch'"):
        at(layer, rows(N), input)


@every_kind
@pytest.mark.parametrize("batch_first", [True, False])
def test_layer_refuses_rows_that_do_not_match_the_batch(case: Case, batch_first: bool) -> None:
    layer = respond(case.build(batch_first=batch_first))
    expected = rf"Response(LSTM|GRU|RNN): expected.*6 rows, as dimension {0 if batch_first else 1}"
    # The number of steps matches the rows, the batch does not.
    input = torch.randn(N, 6, I) if batch_first else torch.randn(6, N, I)
    with pytest.raises(ValueError, match=expected + r".*got shape.*perturb='batch'"):
        at(layer, rows(6), input.double())
    packed = pack_padded_sequence(input.double(), torch.tensor([6, 5, 4, 3]), batch_first)
    with pytest.raises(ValueError, match=expected + ".*got 4 packed sequences.*perturb='batch'"):
        at(layer, rows(6), packed)


@every_kind
@pytest.mark.parametrize("n", [1, N], ids=["shared", "per-example"])
def test_layer_refuses_wrong_shapes_with_the_errors_of_torch(case: Case, n: int) -> None:
    layer, sample, states = respond(case.build()), rows(n), case.states(N - 1)
    with pytest.raises(RuntimeError, match=r"Expected hidden.*size \(4, 4, 3\), got \[4, 3, 3\]"):
        at(layer, sample, case.input(), states)
    with pytest.raises(RuntimeError, match="Expected 5, got 6"):
        at(layer, sample, torch.randn(N, 6, I + 1, dtype=torch.float64))
    # The fused path restores the parameters after an error.
    assert layer._flat_weights[0] is layer.weight_ih_l0


@every_kind
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("n", [1, N], ids=["shared", "per-example"])
def test_copy_computes_the_same_and_is_independent(case: Case, clone: Callable[[Any], Any], n: int) -> None:
    layer, sample, input = respond(case.build()), rows(n), case.input()
    before = at(layer, sample, input)
    other = clone(layer)
    assert_equal(at(other, sample, input), before)
    other.weight_hh_l0.data.add_(1)
    assert not torch.equal(at(other, sample, input)[0], before[0])
    assert_equal(at(layer, sample, input), before)
    assert all(
        one is parameter
        for one, parameter in zip(
            other._flat_weights, [parameter for weights in other.all_weights for parameter in weights], strict=True
        )
    )


def has_kernel(plain: nn.RNNBase, input: Tensor) -> bool:
    """Whether torch has a kernel for this layer; oneDNN has no bfloat16 LSTM on some CPUs."""
    try:
        plain(input)
    except RuntimeError as error:
        return "primitive" not in str(error)
    return True


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_output_in_lower_precision_is_close_to_float64(case: Case, dtype: torch.dtype) -> None:
    layer, input = respond(case.build()).to(dtype), case.input()
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    reference = copy.deepcopy(layer).double()
    for n in (1, N):
        if n == 1 and not has_kernel(case.build().to(dtype), input.to(dtype)):
            continue
        sample = rows(n)
        output, _ = at(layer, sample, input.to(dtype))
        assert output.dtype == dtype
        torch.testing.assert_close(output.double(), at(reference, sample, input)[0], rtol=0, atol=0.05)


@every_kind
@pytest.mark.parametrize("n", [1, N], ids=["shared", "per-example"])
def test_output_under_autocast_is_close_to_float32(case: Case, n: int) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if n == 1 and not has_kernel(case.build().float(), case.input().float()):
            pytest.skip("the torch layer has no such kernel on this CPU")
    layer, sample, input = respond(case.build()).float(), rows(n), case.input().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = at(layer, sample, input)
    output.float().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    torch.testing.assert_close(output.float(), at(layer, sample, input)[0], rtol=0, atol=0.05)


@every_case
def test_plain_checkpoint_lacks_only_the_response_keys(case: Case) -> None:
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


@every_kind
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("n", [1, N], ids=["shared", "per-example"])
def test_state_dict_round_trip_keeps_the_results(case: Case, assign: bool, n: int) -> None:
    layer, other, sample, input = respond(case.build()), respond(case.build(), gates=False), rows(n), case.input()
    other.load_state_dict(layer.state_dict(), assign=assign)
    assert_equal(at(other, sample, input), at(layer, sample, input))


@every_kind
@pytest.mark.parametrize("n", [1, N], ids=["shared", "per-example"])
def test_functional_call_uses_the_given_parameters(case: Case, n: int) -> None:
    layer, other, sample, input = respond(case.build()), respond(case.build()), rows(n), case.input()
    before = at(layer, sample, input)
    with bind(layer.hyperparameters, sample):
        given = functional_call(layer, dict(other.named_parameters()), (input,))
    assert_equal(given, at(other, sample, input))
    assert_equal(at(layer, sample, input), before)


@every_case
def test_response_has_the_size_of_the_layer_and_its_gates(case: Case) -> None:
    """`R` and `r` have the size of the layer; `V` and `C` have `h` entries for each output unit of a parameter."""
    plain = case.build()
    size = sum(p.numel() for p in plain.parameters())
    gates = H * sum(p.shape[0] for p in plain.parameters())
    assert sum(p.numel() for p in respond(plain).response_parameters()) == size + gates


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_resets_redraw_their_parameters_as_torch_does_and_keep_all_others(kind: Any) -> None:
    """Base parameters and `R` are uniform in +-1/sqrt(hidden_size); gates are not redrawn."""
    layer = respond(kind(I, 120))
    gates = {name: p.detach().clone() for name, p in layer.named_parameters() if name.endswith("_gate")}
    layer.reset_response()
    responses = {name: p.detach().clone() for name, p in layer.named_parameters() if name.startswith("response_")}
    torch.manual_seed(0)
    layer.reset_parameters()
    torch.manual_seed(0)
    plain = kind(I, 120).state_dict()
    state = layer.state_dict()
    assert all(torch.equal(state[name], value) for name, value in {**gates, **responses, **plain}.items())
    for drawn in responses.values():
        assert 0.9 * 120**-0.5 < drawn.abs().max() <= 120**-0.5  # the largest of 120 draws or more


@pytest.mark.parametrize("frozen", [["weight_hh_l0"], ["bias_ih_l1_reverse", "weight_ih_l0"]], ids=str)
@pytest.mark.parametrize("n", [1, N], ids=["shared", "per-example"])
@every_kind
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
def test_make_plain_gives_the_torch_layer_at_the_current_hyperparameters(
    case: Case, context: Any, training: bool
) -> None:
    layer, input, states = respond(case.build()).train(training), case.input(), case.states()
    plain = copy.deepcopy(layer)
    plain.make_plain()
    assert type(plain) is case.plain
    with context():
        # Inference mode makes the effective parameters inference tensors, on which torch's CPU kernels sum in another
        # order.
        check = assert_close if context is torch.inference_mode else assert_equal
        check(plain(input, states), layer(input, states))
    assert all(one is parameter for one, parameter in zip(plain._flat_weights, plain.parameters(), strict=True))


def test_refusal_names_weights_that_a_hook_computes() -> None:
    layer = nn.LSTM(I, O)
    assert ResponseLSTM.refusal(layer) is None
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(layer, "weight_hh_l0")
    assert "computed from other parameters" in str(ResponseLSTM.refusal(layer))


@pytest.mark.parametrize(("response", "chunks"), [(ResponseLSTM, 4), (ResponseGRU, 3), (ResponseRNN, 1)])
def test_response_layer_takes_the_arguments_of_torch(response: Any, chunks: int) -> None:
    layer = response(I, O, 2, bias=False, dtype=torch.float64, hyperparameters=hyperparameters())
    assert isinstance(layer, response.plain_type)
    assert layer.weight_hh_l1_gate.shape == (chunks * O, H)
    assert not layer.weight_hh_l1_gate.any()
    assert not hasattr(layer, "response_bias_ih_l0")
    assert layer(torch.randn(2, 1, I, dtype=torch.float64))[0].shape == (2, 1, O)


def test_empty_batch_gives_empty_results() -> None:
    layer = respond(nn.LSTM(I, O))
    output, (h, c) = at(layer, torch.randn(0, H), torch.randn(6, 0, I))
    assert output.shape == (6, 0, O)
    assert h.shape == c.shape == (1, 0, O)


@every_kind
@pytest.mark.parametrize("n", [1, N], ids=["shared", "per-example"])
@pytest.mark.filterwarnings("default")  # dynamo warns that it breaks graphs around torch's RNNs
def test_compiled_layer_equals_the_eager_layer(case: Case, n: int) -> None:
    layer, sample, input = respond(case.build()), rows(n), case.input()
    compiled = torch.compile(layer, backend="eager")
    with bind(layer.hyperparameters, sample):
        assert_close(compiled(input), layer(input))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")
@every_kind
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("n", [1, N], ids=["shared", "per-example"])
def test_gpu_equals_the_cpu_in_training_and_evaluation_mode(case: Case, training: bool, n: int) -> None:
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
