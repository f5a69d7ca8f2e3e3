"""Input dropout on linear regression with orthogonal features: the best response shrinks least squares by `1 - p`.

Inverted dropout feeds `x m / (1 - p)`, so the expected squared error is least squares with a ridge,
`(X'X + p/(1-p) diag(X'X)) w = X'y`, and for orthogonal columns `w*(p) = (1 - p) w_ls`. All masks are enumerated here,
which gives the expectation without that algebra.
"""

import pytest
import torch
from science.oracles import Response, double, gauss_hermite, minimize, respond, train
from torch import Tensor, nn

from lightning_stn import Float, HyperparameterSet, convert
from lightning_stn.binding import bind

EXAMPLES, FEATURES = 16, 4
RATE = 0.3
RATES = (0.05, RATE, 0.8)
LOGIT = double(RATE).logit()
MASKS = torch.cartesian_prod(*[double(0, 1)] * FEATURES)
"""Every mask, `[m, i]`."""


def make_data(*, orthogonal: bool = True) -> tuple[Tensor, Tensor]:
    """Inputs `[n, i]` with columns of different norms, and noisy targets `[n]`."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(EXAMPLES, FEATURES, generator=generator, dtype=torch.float64)
    if orthogonal:
        inputs = torch.linalg.qr(inputs)[0] * double(3, 4, 5, 6)
    noise = torch.randn(EXAMPLES, generator=generator, dtype=torch.float64)
    return inputs, inputs @ double(1.0, -2.0, 1.5, -0.5) + 0.3 * noise


def chances(rate: Tensor) -> Tensor:
    """Probability of every mask, `[..., m]`, at rates `[...]`."""
    rate = rate[..., None, None]
    return torch.where(MASKS.bool(), 1 - rate, rate).prod(-1)


def solve_over_masks(inputs: Tensor, targets: Tensor, rate: float, *, inverted: bool) -> Tensor:
    """Minimiser of the expected squared error, from the normal equations summed over every mask."""
    masked = inputs * MASKS[:, None, :] / ((1 - rate) if inverted else 1)
    weights = chances(torch.tensor(rate, dtype=torch.float64))
    normal = torch.einsum("m,mni,mnj->ij", weights, masked, masked)
    return torch.linalg.solve(normal, torch.einsum("m,mni,n->i", weights, masked, targets))


def least_squares(inputs: Tensor, targets: Tensor) -> Tensor:
    return torch.linalg.lstsq(inputs, targets[:, None]).solution[:, 0]


def shrunken() -> Response:
    """`w*` and its derivative in the logit `u` of the rate, `dp/du = p (1 - p)`; `[i]` each."""
    solution = least_squares(*make_data())
    return Response((1 - RATE) * solution, -RATE * (1 - RATE) * solution)


def make_net(sigma: float) -> tuple[nn.Module, HyperparameterSet]:
    torch.manual_seed(0)
    hyperparameters = HyperparameterSet({"rate": Float(0.0, 1.0, init=RATE, scale=sigma)})
    net = nn.Sequential(nn.Dropout(), nn.Linear(FEATURES, 1, bias=False))
    return convert(net, hyperparameters, dropout="rate"), hyperparameters


def errors_of_the_exact_fit(sigma: float) -> list[float]:
    """Every combination of node, mask and example is one row: `[q, m, n]`, flattened."""
    inputs, targets = make_data()
    net, hyperparameters = make_net(sigma)
    net.double()
    nodes, mass = gauss_hermite(LOGIT, double(sigma), order=7)
    rates = nodes.sigmoid()[:, 0]
    masked = (inputs * MASKS[:, None, :] / (1 - rates)[:, None, None, None]).flatten(0, 2)
    weights = (mass[:, None] * chances(rates)).flatten().repeat_interleave(EXAMPLES) / EXAMPLES
    wanted = targets.repeat(len(nodes) * len(MASKS))
    sample = nodes.repeat_interleave(EXAMPLES * len(MASKS), 0)

    def expected_loss() -> Tensor:
        with bind(hyperparameters, sample):
            return (weights * (net(masked)[:, 0] - wanted) ** 2).sum()

    minimize(net, expected_loss)
    found = respond(net, hyperparameters, torch.eye(FEATURES, dtype=torch.float64), LOGIT)
    return found.relative_errors(shrunken())


@pytest.mark.parametrize("rate", RATES)
def test_shrunken_least_squares_is_the_exact_solution_over_all_masks(rate):
    data = make_data()
    exact = solve_over_masks(*data, rate, inverted=True)
    torch.testing.assert_close((1 - rate) * least_squares(*data), exact, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("rate", RATES)
def test_dropout_without_rescaling_keeps_least_squares_as_the_exact_solution_over_all_masks(rate):
    data = make_data()
    exact = solve_over_masks(*data, rate, inverted=False)
    torch.testing.assert_close(least_squares(*data), exact, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("rate", RATES)
def test_ridge_on_the_diagonal_is_the_exact_solution_over_all_masks_for_correlated_features(rate):
    inputs, targets = make_data(orthogonal=False)
    gram = inputs.T @ inputs
    ridge = torch.linalg.solve(gram + rate / (1 - rate) * gram.diag().diag(), inputs.T @ targets)
    torch.testing.assert_close(ridge, solve_over_masks(inputs, targets, rate, inverted=True), atol=1e-10, rtol=1e-10)


def test_exact_fit_over_all_masks_follows_closed_form_shrinkage_up_to_sigma_squared():
    """The rate is a sigmoid of the affine response's input: value and derivative have errors of `O(sigma^2)`."""
    coarse, fine = errors_of_the_exact_fit(0.1), errors_of_the_exact_fit(0.05)
    assert max(fine) < 0.01
    assert [a / b for a, b in zip(coarse, fine, strict=True)] == pytest.approx([4, 4], rel=0.1)


def test_stochastic_training_with_tuned_dropout_follows_closed_form_shrinkage_within_five_percent():
    copies = 64
    inputs, targets = (tensor.float() for tensor in make_data())
    inputs, targets = inputs.repeat(copies, 1), targets.repeat(copies)
    net, hyperparameters = make_net(0.3)
    generator = torch.Generator().manual_seed(6)
    train(
        net,
        hyperparameters,
        (hyperparameters.sample(len(inputs), generator) for _ in range(800)),
        lambda: (net(inputs)[:, 0] - targets).square().mean(),
        lr=0.05,
    )
    found = respond(net, hyperparameters, torch.eye(FEATURES), LOGIT.float())
    assert max(found.relative_errors(shrunken())) < 0.05
