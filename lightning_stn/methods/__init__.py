"""Methods: how a response is fitted and how hyperparameters step. Nothing here knows Lightning.

Algorithm 1 of MacKay et al. (2019), arXiv:1903.03088, in a plain loop; `net` is a converted network:

```python
method = STN()
method.prepare(net, hyperparameters)
optimizer = HyperparameterOptimizer(hyperparameters, SharedAdam, lr=0.05)
for train, valid in batches:
    bind_weight_phase(hyperparameters, hyperparameters.sample())
    _, objective = method.objective(net, hyperparameters, lambda: F.cross_entropy(net(train.x), train.y))
    objective.backward()
    weights.step()
    weights.zero_grad()
    unbind(hyperparameters)
    net.eval()
    _, hypergradient = optimizer.differentiate(lambda: F.cross_entropy(net(valid.x), valid.y), noise=None)
    optimizer.receive(hypergradient)
    before = hyperparameters.unconstrained.clone()
    optimizer.step()
    method.follow(net, hyperparameters, hyperparameters.unconstrained - before)
    net.train()
```
"""

from lightning_stn.methods.base import Method, Rates, resolve_method
from lightning_stn.methods.delta import DeltaSTN
from lightning_stn.methods.hypergradient import HyperparameterOptimizer, Scales
from lightning_stn.methods.optimizers import OptimizerFactory
from lightning_stn.methods.parameter_groups import parameter_groups
from lightning_stn.methods.shared_adam import SharedAdam
from lightning_stn.methods.stn import STN

__all__ = [
    "STN",
    "DeltaSTN",
    "HyperparameterOptimizer",
    "Method",
    "OptimizerFactory",
    "Rates",
    "Scales",
    "SharedAdam",
    "parameter_groups",
    "resolve_method",
]
