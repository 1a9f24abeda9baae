"""The shapes a law may take, one a class: loss in nats, params and tokens and FLOPs as counts."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Surface:
    """L = E + A / params^alpha + B / tokens^beta (Hoffmann et al., arXiv 2203.15556)."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, params, tokens):
        """Give the loss in nats at numbers or arrays of params and tokens."""
        n, d = np.log(params), np.log(tokens)
        return self.E + _power(self.A, self.alpha, n) + _power(self.B, self.beta, d)

    def optimum(self, flops: float, kappa: float = 6.0) -> tuple[float, float, float]:
        """Give (params, tokens, loss) of least loss where flops = kappa params tokens.

        `kappa`, FLOPs a parameter and token, is above 6 where attention counts.
        """
        both = self.alpha + self.beta
        ratio = np.log(self.alpha * self.A) - np.log(self.beta * self.B)
        log_params = (ratio + self.beta * np.log(flops / kappa)) / both
        params = float(np.exp(log_params))
        tokens = flops / kappa / params
        return params, tokens, float(self.loss(params, tokens))


@dataclass(frozen=True)
class Frontier:
    """L = E + A flops^-gamma: the best loss at a budget; E = 0 is a plain power law."""

    E: float
    A: float
    gamma: float

    def loss(self, flops):
        """Give the loss in nats at a number or array of FLOPs."""
        return self.E + _power(self.A, self.gamma, np.log(flops))

    def flops_at(self, loss: float) -> float:
        """Give the budget whose best loss this is; infinity for a loss at or below the floor."""
        if loss <= self.E or self.A <= 0 or self.gamma <= 0:
            return float("inf")
        return float(np.exp((np.log(self.A) - np.log(loss - self.E)) / self.gamma))


def _power(scale, exponent, log_x):
    return np.exp(np.log(scale) - exponent * log_x) if scale > 0 else 0.0 * log_x
