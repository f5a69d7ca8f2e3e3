"""Who reads a responding parameter during a pass: parents, other methods, traced graphs, checkpoints, backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from support import LitSmall, fit, random_gates
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_stn import STN, Float, HyperparameterSet, STNCallback, convert, export
from lightning_stn.binding import bind, bind_weight_phase, cache_effective_parameters, unbind

X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Base(nn.Module):
    """Two layers and a parameter; subclasses differ in how they read them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).tanh()) * self.gain
        return out


class ReadsChildren(Base):
    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.first.weight, self.first.bias).tanh()
        return F.linear(hidden, self.second.weight, self.second.bias) * self.gain


class OtherMethod(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x) * self.gain

    def encode(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.second(self.first(x).tanh())
        return hidden


class Recursive(Base):
    def forward(self, x: Tensor, depth: int = 1) -> Tensor:
        x = self.first(x).tanh() if depth else self.second(x) * self.gain
        return self(x, depth - 1) if depth else x


class Checkpointed(Base):
    def forward(self, x: Tensor) -> Tensor:
        inner = lambda x: self.second(self.first(x).tanh()) * self.gain  # noqa: E731
        out: Tensor = checkpoint(inner, x, use_reentrant=False)
        return out


class ReadsInCheckpoint(Base):
    """The second reading in the checkpoint finds what the first has built, in forward and again in backward."""

    def forward(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return F.linear(self.first(x).tanh(), self.second.weight, self.second.bias) * (self.gain * 2 - self.gain)

        out: Tensor = checkpoint(inner, x, use_reentrant=False)
        return out


class Recomputes(torch.autograd.Function):
    """Keeps the input alone, and computes again in backward, as reversible networks do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], *parameters: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            torch.autograd.backward(ctx.function(x), grad)
        return x.grad, None, *[None for _ in ctx.needs_input_grad[2:]]


class Reversible(Base):
    def forward(self, x: Tensor) -> Tensor:
        inner = lambda x: self.second(self.first(x).tanh()) * self.gain  # noqa: E731
        out: Tensor = Recomputes.apply(x, inner, *self.parameters())
        return out


def traced() -> nn.Module:
    return torch.fx.symbolic_trace(Base())


def replaced() -> nn.Module:
    net = Base()
    net.forward = lambda x: F.linear(net.first(x).tanh(), net.second.weight, net.second.bias) * net.gain  # type: ignore[method-assign]
    return net


KINDS: dict[str, Callable[[], nn.Module]] = {
    **{kind.__name__: kind for kind in (ReadsChildren, OtherMethod, Recursive, Checkpointed, ReadsInCheckpoint)},
    "Reversible": Reversible,
    "traced": traced,
    "replaced forward": replaced,
}


def converted(build: Callable[[], nn.Module], centred: bool) -> tuple[Any, HyperparameterSet]:
    torch.manual_seed(0)
    specifications = {"a": Float(0.0, 1.0, init=0.3), "b": Float(0.0, 1.0, init=0.6)}
    hyperparameters = HyperparameterSet(specifications)
    net = random_gates(convert(build().double(), hyperparameters), 0.4)
    STN(centred=centred).prepare(net, hyperparameters)
    return net, hyperparameters


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_reader_gets_the_effective_parameters(kind: str, centred: bool) -> None:
    """Outputs and gradients of a weight step equal those of the network that calls its layers."""
    net, hyperparameters = converted(KINDS[kind], centred)
    usual, others = converted(Base, centred)
    sample = hyperparameters.sample(1, torch.Generator().manual_seed(1))
    found = []
    for network, own in ((net, hyperparameters), (usual, others)):
        bind_weight_phase(own, sample)
        output = network(X.clone().requires_grad_())
        output.square().sum().backward()
        unbind(own)
        gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
        found.append((output.detach(), gradients))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("kind", KINDS)
def test_hypergradient_goes_through_every_reader(kind: str) -> None:
    net, hyperparameters = converted(KINDS[kind], True)
    usual, others = converted(Base, True)
    found = []
    for network, own in ((net, hyperparameters), (usual, others)):
        leaf = own.unconstrained.double().requires_grad_()
        frozen = kind != "Reversible"  # which also differentiates the weights
        with bind(own, leaf.unsqueeze(0), frozen=frozen):
            network(X.clone().requires_grad_()).square().sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", ["ReadsChildren", "OtherMethod", "Recursive", "replaced forward"])
def test_evaluation_of_an_uncentred_response_reads_effective_parameters_too(kind: str) -> None:
    net, hyperparameters = converted(KINDS[kind], False)
    net.eval()
    cache_effective_parameters(hyperparameters, True)
    with torch.no_grad():
        first, second = net(X), net(X)
    assert torch.equal(first, second)
    expected = export(converted(Base, False)[0])(X)
    torch.testing.assert_close(first, expected)
    with torch.no_grad():
        net.first.base_parameter("weight").mul_(2)
        assert not torch.equal(net(X), first)
        net.load_state_dict(converted(KINDS[kind], False)[0].state_dict())
        torch.testing.assert_close(net(X), expected)
    unbind(hyperparameters)


def test_between_forward_and_step_and_outside_passes_a_parameter_is_itself() -> None:
    seen = []

    class Reads(LitSmall):
        def on_after_backward(self) -> None:
            weight = self.net[0].weight  # type: ignore[index, union-attr]
            seen.append(isinstance(weight, nn.Parameter) and weight.grad is not None)

    fit(Reads(), STNCallback(1, 1, warmup=0, perturb="batch"))
    fit(Reads(), STNCallback(1, 1, warmup=0, perturb="example"))
    assert seen
    assert all(seen)


def test_cache_follows_a_backward_pass() -> None:
    """A pass with two backward passes builds twice, and both have the right gradient."""
    net, hyperparameters = converted(ReadsChildren, True)
    sample = hyperparameters.sample(1, torch.Generator().manual_seed(1))
    bind_weight_phase(hyperparameters, sample)
    gradients = []
    for _ in range(2):
        net.zero_grad()
        net(X).square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in net.named_parameters()})
    unbind(hyperparameters)
    torch.testing.assert_close(*gradients)


class Clamped(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.gain.clamp_(-0.1, 0.1)
        return x * self.gain


def test_parameter_that_the_network_modifies_in_place_is_refused_with_the_way_out() -> None:
    net, hyperparameters = converted(Clamped, True)
    with (
        bind(hyperparameters, hyperparameters.sample(1)),
        pytest.raises(RuntimeError, match=r"'gain' of Clamped was modified in place .* in on_train_batch_end"),
    ):
        net(X)


class Hidden(nn.Module):
    """Reads its parameter past the attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x * self._parameters["gain"]
        return out


def test_parameters_that_train_but_do_not_respond_are_named_once() -> None:
    module = LitSmall()
    module.extra = module.convert(Hidden())  # type: ignore[assignment]
    forward = module.net.forward
    module.net.forward = lambda x: module.extra(forward(x))  # type: ignore[operator, method-assign]
    with pytest.warns(UserWarning, match=r"train but do not respond: \['extra.gain'\]") as caught:
        fit(module, STNCallback(1, 1, warmup=0, perturb="batch"))
    assert sum("do not respond" in str(one.message) for one in caught) == 1


def test_parametrization_after_conversion_is_refused_before_the_first_step() -> None:
    module = LitSmall()
    torch.nn.utils.parametrizations.weight_norm(module.net[0])  # type: ignore[index, arg-type]
    with pytest.raises(ValueError, match=r"replaced since the conversion: \['net.0.weight'\]"):
        fit(module, STNCallback(1, 1, warmup=0))


class Renamed(nn.LayerNorm):
    """Computes what its base class does."""


class RenamedLSTM(nn.LSTM):
    def extra_repr(self) -> str:
        return "own"


class Other(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def test_subclass_that_computes_what_its_base_class_does_responds_as_that_one() -> None:
    hyperparameters = HyperparameterSet({"a": Float(0.0, 1.0, init=0.3)})
    net = convert(nn.Sequential(Renamed(4), Other(4)), hyperparameters).double()
    assert [layer.per_example for layer in net] == [True, False]  # type: ignore[union-attr]
    random_gates(net, 0.3)
    usual = convert(nn.LayerNorm(4), HyperparameterSet({"a": Float(0.0, 1.0, init=0.3)})).double()
    usual.load_state_dict(net[0].state_dict())  # type: ignore[index, union-attr]
    samples = hyperparameters.sample(6, torch.Generator().manual_seed(1))
    with bind(hyperparameters, samples), bind(usual.hyperparameters, samples):  # type: ignore[arg-type]
        torch.testing.assert_close(net[0](X), usual(X))  # type: ignore[index, operator]
    lstm = convert(RenamedLSTM(4, 3), HyperparameterSet({"a": Float(0.0, 1.0, init=0.3)}))
    assert isinstance(lstm, RenamedLSTM)
    assert type(export(lstm)) is RenamedLSTM


def test_copies_and_pickles_of_a_renamed_layer_compute_the_same(tmp_path: Any) -> None:
    net = random_gates(convert(Renamed(4), HyperparameterSet({"a": Float(0.0, 1.0, init=0.3)})).double(), 0.3)
    torch.save(net, tmp_path / "net.pt")
    again = torch.load(tmp_path / "net.pt", weights_only=False)
    assert torch.equal(again(X), net(X))
