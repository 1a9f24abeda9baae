"""Turn budgets into the cells of an isoFLOP sweep: which size, how many tokens, which cost."""

import math
from typing import NamedTuple

import numpy as np

from tinylm.config import BadInput, require
from tinylm.laws.accounting import Bill, Device, Shape, bill, flops_per_token, parameters, six_nd
from tinylm.laws.fit import fit_law
from tinylm.laws.forms import Coupled, Saturating, Surface
from tinylm.laws.runs import Runs

LEAST_SIZES = 4  # fewer cannot show a minimum with a residual


class Cell(NamedTuple):
    """One run of a sweep."""

    flops: float  # exact training FLOPs of the whole steps, attention's causal half counted
    shape: Shape
    tokens: int
    steps: int
    params: int  # body and head
    budget: float  # FLOPs asked for: the label to group by


class Expected(NamedTuple):
    """What a sweep will say of a larger run by a surface fitted with least squares, in nats."""

    loss: float  # if the assumed law is true
    stderr: float  # from the runs' noise
    biases: dict[str, float]  # of the fitted surface, if the truth couples or saturates instead

    @property
    def form_risk(self) -> float:
        """Give the largest bias either way, nats."""
        return max(map(abs, self.biases.values()))


class Proposal(NamedTuple):
    """A sweep and the larger run it forecasts, with what is known of the forecast beforehand."""

    cells: list[Cell]
    target: Cell
    expected: Expected
    sweep: Bill
    run: Bill


COUPLINGS = (0.7, 1.4)  # k of other truths; the Surface is 1
# our pilot's 27 grid runs (1e11-6.4e12 FLOPs on the default corpus) by Huber: a first guess
PILOT = Surface(E=2.1915, A=32.247, B=41.001, alpha=0.33045, beta=0.28205)
SWEEP_SHARE = 0.6  # of the compute; the rest is the larger run


def propose(flops: float, shapes: list[Shape], device: Device, per_budget: int = 7,
            spread: float = 4.0, batch_tokens: int = 512, noise: float = 0.003,
            dollars_per_hour: float = 0.0, utilisation: float = 0.4) -> Proposal:
    """Split training FLOPs into 5 budgets over 100 times and one larger run, and bill both.

    The last budget is a seventh of the larger run's. Losses are assumed to follow PILOT; `noise`
    is a run's standard deviation as a share of the loss.
    """
    require("per_budget", per_budget, 1, 1e6)
    require("noise", noise, 0, 1e6)
    require("dollars_per_hour", dollars_per_hour, 0, 1e12)
    steps = np.geomspace(0.01, 1.0, 5)
    top = SWEEP_SHARE * flops / per_budget / steps.sum()
    cells = isoflop_grid((top * steps).tolist(), shapes, per_budget, spread, batch_tokens)
    aim = (1 - SWEEP_SHARE) * flops
    best = min(shapes, key=lambda s: abs(math.log(parameters(s).law / centre(aim))))
    target = cell(aim, best, batch_tokens)
    params, tokens = (np.array([getattr(c, k) for c in cells], float) for k in ("params", "tokens"))
    told = expected(params, tokens, (target.params, target.tokens), PILOT,
                    noise * float(PILOT.loss(target.params, target.tokens)), math.log(best.V))
    bills = [bill(max(c.params for c in part), sum(c.tokens for c in part), device,
                  dollars_per_hour, utilisation, sum(c.flops for c in part))
             for part in (cells, [target])]
    return Proposal(cells, target, told, *bills)


def expected(params: np.ndarray, tokens: np.ndarray, target: tuple[float, float], law: Surface,
             sigma: float, ceiling: float) -> Expected:
    """Give the precision to expect at a target (params, tokens) of a sweep of those runs.

    `sigma` is the runs' noise and `ceiling` the loss of a model that knows nothing, nats; `law`
    is what the losses are assumed to follow, say that of a pilot. A design that cannot identify
    a surface raises BadInput.
    """
    def bias(truth):
        flops = six_nd(params, tokens)
        runs = Runs(params, tokens, flops, truth.loss(params, tokens))
        fitted = fit_law(runs, Surface, "ls").law
        return float(fitted.loss(*target) - truth.loss(*target))

    jacobian = law.evaluate(law.theta(), np.log([params, tokens]))[1]
    toward = law.evaluate(law.theta(), np.log([[n] for n in target]))[1][:, 0]
    covariance = sigma**2 * np.linalg.inv(jacobian @ jacobian.T)
    same = vars(law).values()
    others = {f"coupled, k = {k:g}": Coupled(*same, k) for k in COUPLINGS}
    others["saturating"] = Saturating(*same, ceiling)
    return Expected(float(law.loss(*target)), math.sqrt(toward @ covariance @ toward),
                    {name: bias(truth) for name, truth in others.items()})


def centre(flops: float) -> float:
    """Give the params (body and head) of least loss to expect at a budget.

    113k (flops / 1e12)^.489 from our pilot of 1e11-6.4e12 FLOPs on the default corpus; elsewhere
    it is only where to start looking.
    """
    return 113e3 * (flops / 1e12) ** 0.489


def isoflop_grid(budgets: list[float], shapes: list[Shape], per_budget: int, spread: float,
                 batch_tokens: int) -> list[Cell]:
    """Choose `per_budget` shapes a budget, evenly in log params within `spread` of its `centre`.

    Fewer are taken where fewer fit; under 4 raise BadInput. Tokens are whole steps.
    """
    require("spread", spread, 1.0001, 1e6)
    require("budgets given", len(budgets), 1, 1000)
    for budget in budgets:
        require("budget", budget, 1e6, 1e30)
    return [cell for budget in budgets
            for cell in _row(budget, shapes, per_budget, spread, batch_tokens, centre(budget))]


def cell(budget: float, shape: Shape, batch_tokens: int) -> Cell:
    """Give the run of one shape that comes closest to a budget in whole steps."""
    require("batch", batch_tokens, 1, 1e12)
    each = flops_per_token(shape)
    steps = round(budget / each / batch_tokens)
    if steps < 1:
        raise BadInput(f"{budget:.3g} FLOPs are under half a step of {each * batch_tokens:.3g}; "
                       "lower batch_tokens or raise the budget")
    tokens = steps * batch_tokens
    return Cell(each * tokens, shape, tokens, steps, parameters(shape).law, budget)


def _row(budget, shapes, per_budget, spread, batch_tokens, middle):
    fitting = {s: math.log(parameters(s).law / middle) for s in shapes}
    fitting = {s: off for s, off in fitting.items() if abs(off) <= math.log(spread)}
    if len(fitting) < LEAST_SIZES or per_budget < LEAST_SIZES:
        raise BadInput(f"{min(len(fitting), per_budget)} sizes at {budget:.3g} FLOPs within "
                       f"{spread:g} times of {middle:.3g} params, {LEAST_SIZES} are needed; "
                       "raise the FLOPs, add shapes, widen the spread or ask for more")
    chosen = []
    for i in range(min(per_budget, len(fitting))):
        aim = math.log(spread) * (2 * i / (per_budget - 1) - 1)
        chosen.append(min(fitting, key=lambda s: abs(fitting[s] - aim)))
        del fitting[chosen[-1]]
    return sorted((cell(budget, s, batch_tokens) for s in chosen), key=lambda c: c.params)
