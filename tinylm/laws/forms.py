"""The shapes a law may take, one a class: loss in nats, params and tokens and FLOPs as counts.

A law's coordinates `theta` follow its fields: E, the exponents and a ceiling as they are, scales
(A, B) and shapes (k, R_D, R_N) by their logs. `evaluate` gives loss and Jacobian from them.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from typing import ClassVar

import numpy as np

from tinylm.config import BadInput

LOGGED = ("A", "B", "k", "R_D", "R_N")
FOUR = "add runs with 4 times more and 4 times fewer tokens a parameter at three or more budgets"
Term = tuple[str, int, str]  # scale, column, exponent


@dataclass(frozen=True)
class Law(ABC):
    """What all laws share: the loss at counts, and the way from and to coordinates."""

    columns: ClassVar[tuple[str, ...]] = ("params", "tokens")  # of Runs
    terms: ClassVar[tuple[Term, ...]] = (("A", 0, "alpha"), ("B", 1, "beta"))
    shapes: ClassVar[dict[str, tuple[float, ...]]] = {}  # where a search starts
    needs: ClassVar[str] = FOUR  # the runs that would identify it

    def loss(self, *counts):
        """Give the loss in nats at numbers or arrays of the law's columns."""
        logs = np.log(np.stack(np.broadcast_arrays(*counts)).astype(float))
        found = self.evaluate(self.theta(), logs.reshape(len(logs), -1))[0]
        return found.reshape(logs.shape[1:])[()]

    def theta(self) -> np.ndarray:
        """Give the coordinates, in the order of the fields."""
        with np.errstate(divide="ignore"):  # a scale of 0 is a term that is not there
            return np.array([np.log(v) if k in LOGGED else v for k, v in asdict(self).items()])

    @classmethod
    def names(cls) -> list[str]:
        """Give the names of the constants, in the order of theta."""
        return [f.name for f in fields(cls)]

    @classmethod
    @abstractmethod
    def evaluate(cls, theta, x) -> tuple[np.ndarray, np.ndarray]:
        """Give loss (..., runs) and d loss / d theta (..., K, runs).

        theta (..., K) coordinates; x (columns, runs) natural logs of the columns.
        """


@dataclass(frozen=True)
class Surface(Law):
    """L = E + A / params^alpha + B / tokens^beta (Hoffmann et al., arXiv 2203.15556)."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    @classmethod
    def evaluate(cls, theta, x):
        E, a, b, alpha, beta = _split(theta)
        P, Q = np.exp(a - alpha * x[0]), np.exp(b - beta * x[1])
        return E + P + Q, _stack(1, P, Q, -P * x[0], -Q * x[1])

    def optimum(self, flops: float, kappa: float = 6.0) -> tuple[float, float, float]:
        """Give (params, tokens, loss) of least loss where flops = kappa params tokens.

        `kappa`, FLOPs a parameter and token, is above 6 where attention counts.
        """
        both = self.alpha + self.beta
        if min(self.A, self.B, self.alpha, self.beta) <= 0:
            raise BadInput("a surface that does not fall with both sizes has no best size; these "
                           "runs do not show one")
        ratio = np.log(self.alpha * self.A) - np.log(self.beta * self.B)
        log_params = (ratio + self.beta * np.log(flops / kappa)) / both
        if not abs(log_params) < 700:
            raise BadInput("a surface this flat has its best size beyond all numbers; these runs "
                           "do not show one")
        params = float(np.exp(log_params))
        tokens = flops / kappa / params
        return params, tokens, float(self.loss(params, tokens))


@dataclass(frozen=True)
class Coupled(Law):
    """L = E + ((A / params^alpha)^k + (B / tokens^beta)^k)^(1/k); k = 1 is the Surface."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    k: float
    shapes: ClassVar = {"k": (0.5, 1.0, 2.0)}

    @classmethod
    def evaluate(cls, theta, x):
        E, a, b, alpha, beta, k = _split(theta)
        R, P, Q, along = _norm(a - alpha * x[0], b - beta * x[1], np.exp(k))
        return E + R, _stack(1, P, Q, -P * x[0], -Q * x[1], along)


@dataclass(frozen=True)
class Kaplan(Law):
    """L = ((N_c / params)^(alpha/beta) + D_c / tokens)^beta (Kaplan et al., arXiv 2001.08361).

    A = N_c^alpha and B = D_c^beta: the Coupled law without floor at k = 1 / beta.
    """

    A: float
    B: float
    alpha: float
    beta: float

    @classmethod
    def evaluate(cls, theta, x):
        a, b, alpha, beta = _split(theta)
        R, P, Q, along = _norm(a - alpha * x[0], b - beta * x[1], 1 / beta)
        return R, _stack(P, Q, -P * x[0], -Q * x[1] - along / beta)


@dataclass(frozen=True)
class Saturating(Law):
    """1 / (L - E) = 1 / (A / params^alpha + B / tokens^beta) + 1 / (ceiling - E).

    A Surface that levels off at `ceiling`, the loss of a model that knows nothing (ln V), which
    is given and not fitted. The form is ours.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    ceiling: float

    @classmethod
    def evaluate(cls, theta, x):
        E, a, b, alpha, beta, ceiling = _split(theta)
        P, Q = np.exp(a - alpha * x[0]), np.exp(b - beta * x[1])
        room = ceiling - E
        share = room / (P + Q + room)
        by_R, by_room = share**2, (1 - share) ** 2
        P, R, Q = by_R * P, (P + Q) * share, by_R * Q
        return E + R, _stack(1 - by_room, P, Q, -P * x[0], -Q * x[1], by_room)


@dataclass(frozen=True)
class OverTraining(Law):
    """L = E + A / params^alpha + B / tokens^alpha: one exponent for both (arXiv 2403.08540).

    Gadre et al. write it in FLOPs C and tokens a parameter M: E + (a M^e + b M^-e) C^-e with
    e = alpha / 2, a = A 6^e and b = B 6^e, so that models trained far past the optimum keep e.
    """

    E: float
    A: float
    B: float
    alpha: float
    terms: ClassVar = (("A", 0, "alpha"), ("B", 1, "alpha"))

    @classmethod
    def evaluate(cls, theta, x):
        E, a, b, alpha = _split(theta)
        P, Q = np.exp(a - alpha * x[0]), np.exp(b - alpha * x[1])
        return E + P + Q, _stack(1, P, Q, -P * x[0] - Q * x[1])


@dataclass(frozen=True)
class DataConstrained(Law):
    """The Surface of effective params and tokens where data repeat (Muennighoff, 2305.16264).

    With U unique tokens, tokens = U (1 + r) count as U (1 + R_D (1 - exp(-r / R_D))); params
    beyond the optimum for U tokens count less in the same way, by R_N.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    R_D: float
    R_N: float
    columns: ClassVar = ("params", "tokens", "unique")
    shapes: ClassVar = {"R_D": (3.0, 15.0), "R_N": (1.0, 5.0)}
    needs: ClassVar = ("add runs of 4 or more epochs, and some that repeat with 4 times the params "
                       "that suit their unique tokens")

    @classmethod
    def evaluate(cls, theta, x):
        E, a, b, alpha, beta, log_RD, log_RN = _split(theta)
        n, d, u = x
        best = (np.log(alpha / beta) + a - b + beta * u) / alpha  # ln params that suit U tokens
        tokens, _, by_RD = _effective(d, u, np.exp(log_RD))
        params, by_best, by_RN = _effective(n, best, np.exp(log_RN))
        P, Q = np.exp(a - alpha * params), np.exp(b - beta * tokens)
        drag = -P * by_best  # of P along alpha * best
        by_alpha = -P * params + drag * (1 / alpha - best)
        by_beta = -Q * tokens + drag * (u - 1 / beta)
        return E + P + Q, _stack(1, P + drag, Q - drag, by_alpha, by_beta, -beta * Q * by_RD,
                                 -alpha * P * by_RN)


@dataclass(frozen=True)
class Frontier(Law):
    """L = E + A flops^-gamma: the best loss at a budget; E = 0 is a plain power law."""

    E: float
    A: float
    gamma: float
    columns: ClassVar = ("flops",)
    terms: ClassVar = (("A", 0, "gamma"),)
    needs: ClassVar = "add budgets 10 times above or below those you have"

    @classmethod
    def evaluate(cls, theta, x):
        E, a, gamma = _split(theta)
        P = np.exp(a - gamma * x[0])
        return E + P, _stack(1, P, -P * x[0])

    def flops_at(self, loss: float) -> float:
        """Give the budget whose best loss this is; infinity for a loss at or below the floor."""
        if loss <= self.E or self.A <= 0 or self.gamma <= 0:
            return float("inf")
        return float(np.exp((np.log(self.A) - np.log(loss - self.E)) / self.gamma))


def _split(theta):
    """Give each coordinate as (..., 1), ready to meet (runs,)."""
    return np.moveaxis(np.asarray(theta, float)[..., None], -2, 0)


def _stack(*parts):
    return np.stack(np.broadcast_arrays(*parts), axis=-2)


def _norm(p, q, k):
    """Give R = (e^kp + e^kq)^(1/k) and its derivatives in p, q and ln k."""
    top = np.maximum(p, q)
    log_R = top + np.log(np.exp(k * (p - top)) + np.exp(k * (q - top))) / k
    R, share = np.exp(log_R), np.exp(k * (p - log_R))
    return R, R * share, R * (1 - share), R * (share * p + (1 - share) * q - log_R)


def _effective(log_x, log_unit, ratio):
    """Give the log of the effective count and its derivatives in log_unit and ln ratio.

    Up to one unit a count is itself; beyond it, repeats r count ratio (1 - exp(-r / ratio)).
    """
    repeats = np.expm1(np.clip(log_x - log_unit, 0.0, 30.0))
    left = np.exp(-repeats / ratio)
    units = 1 + ratio * (1 - left)
    log_effective = np.minimum(log_x, log_unit) + np.log(units)
    by_unit = np.where(repeats > 0, 1 - left * (1 + repeats) / units, 0.0)
    return log_effective, by_unit, (ratio * (1 - left) - repeats * left) / units
