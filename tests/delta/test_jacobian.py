"""The response learned by Delta-STN against the exact Jacobian of the best response.

The problem is a small tanh network in float64, at the optimum of a training loss with three ridge penalties. Each
parameter entry has a separate gate, so that the response can be exact. By the implicit function theorem the Jacobian is
`dw*/dlambda = -H^-1 d2L_T/dw dlambda`, with the full Hessian `H`.

The training loss also has a damping term `DAMPING/2 |w - w*|^2`, which keeps the optimum and adds `DAMPING` to the
diagonal of `H`. The linearised prediction uses only the Gauss-Newton part of `H`; with damping the two parts nearly
agree, and without it the linearised response would miss the thresholds below.

The hypergradient is compared with central differences of the validation loss at retrained solutions, which are exact to
rounding.

STN trains base weights and response together, at perturbed hyperparameters. `pytest -s -k jacobian -m ''` prints the
cosines of both methods.
"""

from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from science.oracles import minimize
from torch import Tensor, nn

from lightning_stn import STN, Float, HyperparameterSet, dual
from lightning_stn.binding import attach_all, bind, bind_weight_phase, unbind
from lightning_stn.convert import convert
from lightning_stn.methods.base import recentre
from lightning_stn.methods.delta import response_pass, shared_pass
from lightning_stn.regularizers import ActivationPenalty, L2Penalty
from lightning_stn.specifications import ResponseForm

EXAMPLES, HELD_OUT, UNITS, SCALE, LR, STEPS = 30, 40, 4, 0.1, 0.02, 1000
DAMPING = 0.1
PENALTIES = ("inner", "outer", "activity")


class Readout(nn.Module):
    """A weighted sum with a gate for each weight."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(units) / units**0.5)

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight


class Net(nn.Module):
    """A network on scalars; it also returns its hidden units, whose activity is penalised."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.readout = nn.Linear(1, UNITS), Readout(UNITS)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(input).tanh()
        return self.readout(hidden), hidden


class Problem(NamedTuple):
    """Training points, validation points, the logarithms of the three penalties, and the centre of the damping."""

    inputs: Tensor
    targets: Tensor
    held_inputs: Tensor
    held_targets: Tensor
    logs: Tensor
    reference: Tensor | None = None

    @classmethod
    def draw(cls, seed: int) -> "Problem":
        generator = torch.Generator().manual_seed(seed)
        inputs = 4 * torch.rand(EXAMPLES + HELD_OUT, 1, generator=generator, dtype=torch.float64) - 2
        noise = torch.randn(EXAMPLES + HELD_OUT, generator=generator, dtype=torch.float64)
        targets = (2 * inputs[:, 0]).sin() + 0.1 * noise
        logs = torch.tensor([3e-3, 3e-3, 3e-3], dtype=torch.float64).log()
        return cls(inputs[:EXAMPLES], targets[:EXAMPLES], inputs[EXAMPLES:], targets[EXAMPLES:], logs)

    def plain_loss(self, flat: Tensor, logs: Tensor) -> Tensor:
        """`L_T` as a function of all parameters in one vector, written without the package."""
        parameters = unpack(flat)
        hidden = (self.inputs @ parameters["hidden.weight"].T + parameters["hidden.bias"]).tanh()
        output, penalties = hidden @ parameters["readout.weight"], logs.exp()
        inner = parameters["hidden.weight"].square().sum() + parameters["hidden.bias"].square().sum()
        outer, activity = parameters["readout.weight"].square().sum(), hidden.square().mean()
        costs = torch.stack([inner / 2, outer / 2, activity])
        return (output - self.targets).square().mean() + penalties @ costs + self.damped(flat)

    def damped(self, flat: Tensor) -> Tensor:
        """The damping term; zero before the optimum is known."""
        return flat.new_zeros(()) if self.reference is None else DAMPING / 2 * (flat - self.reference).square().sum()

    def validation_loss(self, flat: Tensor) -> Tensor:
        parameters = unpack(flat)
        hidden = (self.held_inputs @ parameters["hidden.weight"].T + parameters["hidden.bias"]).tanh()
        return (hidden @ parameters["readout.weight"] - self.held_targets).square().mean()

    @property
    def optimum(self) -> Tensor:
        """The parameters where the gradient of `L_T` is zero, with damping and without."""
        assert self.reference is not None
        return self.reference

    def solve(self, flat: Tensor, logs: Tensor) -> Tensor:
        """The optimum by Newton's method from a nearby point; the gradient is zero to rounding."""
        for _ in range(20):
            leaf = flat.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(self.plain_loss(leaf, logs), leaf)
            hessian = torch.autograd.functional.hessian(lambda w: self.plain_loss(w, logs), flat)
            flat = flat - torch.linalg.solve(hessian, gradient)
        leaf = flat.clone().requires_grad_()
        assert torch.autograd.grad(self.plain_loss(leaf, logs), leaf)[0].norm() < 1e-12
        assert torch.linalg.eigvalsh(hessian).min() > 0
        return flat

    def exact_jacobian(self) -> Tensor:
        """`-H^-1 d2L_T/dw dlambda`, `[w, h]`."""
        (hessian, mixed), _ = torch.autograd.functional.hessian(self.plain_loss, (self.optimum, self.logs))
        return -torch.linalg.solve(hessian, mixed)

    def retrained_hypergradient(self, step: float = 1e-4) -> Tensor:
        """Central differences of the validation loss at retrained solutions, `[h]`."""
        shifts = step * torch.eye(len(PENALTIES), dtype=torch.float64)
        ends = [
            [self.validation_loss(self.solve(self.optimum, self.logs + s * shift)) for s in (1, -1)] for shift in shifts
        ]
        return torch.stack([(above - below) / (2 * step) for above, below in ends])


SHAPES = {"hidden.weight": (UNITS, 1), "hidden.bias": (UNITS,), "readout.weight": (UNITS,)}


def unpack(flat: Tensor) -> dict[str, Tensor]:
    sizes = [torch.Size(shape).numel() for shape in SHAPES.values()]
    return {name: part.reshape(shape) for (name, shape), part in zip(SHAPES.items(), flat.split(sizes), strict=True)}


class Tuned(nn.Module):
    """The network with its penalties, and base weights at the optimum; its response is centred or not."""

    def __init__(self, problem: Problem, optimum: Tensor, centred: bool, response: ResponseForm) -> None:
        super().__init__()
        torch.manual_seed(0)
        starts = dict(zip(PENALTIES, problem.logs.exp().tolist(), strict=True))
        self.problem = problem
        self.hyperparameters = HyperparameterSet(
            {name: Float(0.0, None, init=start, log=True, scale=SCALE) for name, start in starts.items()},
            response=response,
        )
        self.net = convert(Net(), self.hyperparameters).double()
        with torch.no_grad():
            for name, value in unpack(optimum).items():
                self.net.get_parameter(name).copy_(value)
        self.inner = L2Penalty("inner", ["hidden.weight", "hidden.bias"])
        self.outer = L2Penalty("outer", ["readout.weight"])
        self.activity = ActivationPenalty("activity")
        attach_all(self, self.hyperparameters)
        recentre(self.net, self.hyperparameters, centred)

    def forward(self) -> Tensor:
        """`L_T` at the bound sample."""
        output, hidden = self.net(self.problem.inputs)
        penalties = self.inner(self.net) + self.outer(self.net) + self.activity(hidden)
        damping = self.problem.damped(dual.linear_prediction(self.effective()))
        return F.mse_loss(output, self.problem.targets) + penalties + damping

    def effective(self) -> Tensor:
        """All effective parameters in one vector, at the bound sample."""
        sample = self.hyperparameters.bound_sample()
        parts = [layer.effective_parameters(sample) for layer in (self.net.hidden, self.net.readout)]
        return torch.cat([tensor.flatten() for part in parts for tensor in part.values()])

    def responded(self, h: Tensor) -> Tensor:
        """All effective parameters in one vector, at hyperparameters `[h]`."""
        with bind(self.hyperparameters, h.unsqueeze(0)):
            return self.effective()


class Agreement(NamedTuple):
    """Cosines between learned and exact Jacobian, and between learned and exact hypergradient."""

    jacobian: float
    hypergradient: float


def learn(
    problem: Problem,
    *,
    method: str,
    linearize: bool = True,
    shared: bool = False,
    centred: bool = True,
    response: ResponseForm = "full",
    steps: int = STEPS,
) -> Agreement:
    """Start at the optimum, learn the response with one perturbation for each batch, and compare."""
    tuned = Tuned(problem, problem.optimum, centred, response)
    hyperparameters = tuned.hyperparameters
    if method == "stn":
        STN(centred=centred).prepare(tuned.net, hyperparameters)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(tuned.parameters(), lr=LR)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        bind_weight_phase(hyperparameters, hyperparameters.sample(1, generator))
        delta = method == "delta-stn"
        alone = response_pass(tuned, hyperparameters, linear=linearize) if delta else nullcontext()
        with shared_pass(hyperparameters) if shared else alone:
            loss = tuned()
        unbind(hyperparameters)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    centre = hyperparameters.unconstrained.double()
    jacobian = torch.autograd.functional.jacobian(tuned.responded, centre)
    leaf = tuned.responded(centre).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(problem.validation_loss(leaf), leaf)
    exact, retrained = problem.exact_jacobian(), problem.retrained_hypergradient()
    pairs = ((jacobian, exact), (gradient @ jacobian, retrained))
    return Agreement(*(F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item() for a, b in pairs))


SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]


@pytest.fixture(scope="module", params=SEEDS)
def problem(request: pytest.FixtureRequest) -> Problem:
    """A problem with its optimum."""
    free = Problem.draw(request.param)
    torch.manual_seed(0)
    start = nn.ParameterList([torch.cat([p.detach().flatten() for p in Net().parameters()]).double()])
    minimize(start, lambda: free.plain_loss(start[0], free.logs))
    return free._replace(reference=free.solve(start[0].detach(), free.logs))


def test_exact_jacobian_gives_the_hypergradient_of_retrained_solutions(problem: Problem) -> None:
    """Both references agree: the validation gradient times the Jacobian is the retrained hypergradient."""
    leaf = problem.optimum.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(problem.validation_loss(leaf), leaf)
    found = gradient @ problem.exact_jacobian()
    torch.testing.assert_close(found, problem.retrained_hypergradient(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("linearize", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_delta_stn_learns_the_jacobian_of_the_best_response(problem: Problem, linearize: bool) -> None:
    found = learn(problem, method="delta-stn", linearize=linearize)
    print(f"\nDelta-STN, linearize={linearize}: {found}")
    assert min(found) > 0.99


@pytest.mark.slow
def test_shared_pass_comes_near_the_jacobian_in_more_steps(problem: Problem) -> None:
    """Base weights that train in the same pass add noise to the response, so the threshold is lower."""
    few = learn(problem, method="delta-stn", shared=True)
    many = learn(problem, method="delta-stn", shared=True, steps=4 * STEPS)
    print(f"\nDelta-STN, passes=1: {few}, with four times the steps {many}")
    assert min(many) > 0.95


def test_stn_does_not_learn_the_jacobian(problem: Problem) -> None:
    found = learn(problem, method="stn", centred=False)
    print(f"\nSTN: {found}")
    assert found.jacobian < 0.9


@pytest.mark.slow
@pytest.mark.parametrize(("response", "least"), [("full", 0.9), ("gates", 0.99)])
def test_centred_stn_learns_the_jacobian(problem: Problem, response: ResponseForm, least: float) -> None:
    """Gates alone come as near as Delta-STN; the product of gate and response weights does not."""
    found = learn(problem, method="stn", response=response)
    print(f"\nCentred STN, response={response}: {found}")
    assert min(found) > least
