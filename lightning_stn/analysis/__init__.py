"""What a trained `STNModule` can be asked about its hyperparameters. Nothing here needs a Trainer.

```python
curves = sweep(module, valid_loader)                            # validation loss around each current value
print(curves)
figure, panels = curves.plot()
pandas.DataFrame(curves.table())

sweep_pair(module, valid_loader, ("dropout", "noise")).plot()   # both together
importance(module, valid_loader).plot()                         # how much each one matters
response_fit(module, train_loader, valid_loader).plot()         # whether to believe the response
```

All but `response_fit` read the loss through the response, and so are as good as the response is: within about two
perturbation scales of the current value, and after a training that was long enough to fit it.
"""

from lightning_stn.analysis.importance import Importance, importance
from lightning_stn.analysis.positions import Swept
from lightning_stn.analysis.response_fit import ResponseFit, response_fit
from lightning_stn.analysis.sweep import Sweep, sweep
from lightning_stn.analysis.sweep_pair import PairSweep, sweep_pair

__all__ = [
    "Importance",
    "PairSweep",
    "ResponseFit",
    "Sweep",
    "Swept",
    "importance",
    "response_fit",
    "sweep",
    "sweep_pair",
]
