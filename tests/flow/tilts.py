"""A Gaussian tilted by a quadratic value, in one dimension: what adjoint matching is compared with."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tilt:
    """N(mean, std^2) exp(tau Q) with Q = -curve (a - goal)^2 / 2."""

    mean: float = 0.3
    std: float = 0.5
    goal: float = 0.8
    curve: float = 1.0
    tau: float = 1.0

    @property
    def tilted(self) -> tuple[float, float]:
        """Its mean and standard deviation."""
        precision = 1 / self.std**2 + self.tau * self.curve
        return (self.mean / self.std**2 + self.tau * self.curve * self.goal) / precision, precision**-0.5

    @property
    def kl(self) -> float:
        """Its relative entropy to the Gaussian."""
        mean, std = self.tilted
        return float(np.log(self.std / std) + (std**2 + (mean - self.mean) ** 2) / (2 * self.std**2) - 0.5)

    def fixed_point(self, steps: int, released: bool = False) -> tuple[float, float, float]:
        """Mean and std of the ends of Euler's method on the fixed point of adjoint matching with so many steps, and the
        relative entropy of its paths, all exact.

        E[x_K | x_i] = gain x_i + shift and the adjoint pull tau curve (x_K - goal) are carried backwards; then
        v_i = v_b - sigma^2 / 2 E[a | x_i] is one linear equation, as x_{i+1} depends on v_i.
        """
        h, fields = 1 / steps, []
        weight = self.tau * self.curve
        slope, bias = affine(1 - h, self.mean, self.std)
        gain, shift, pull = 1 + h * slope, h * bias, 1.0
        for i in reversed(range(steps)):
            t = i * h
            slope, bias = affine(t, self.mean, self.std)
            if released:  # the base one step later, its last step one of the process, and u_i matched to a_i
                late = affine(min(t + h, 1 - 1e-9), self.mean, self.std)[0]
                pull *= 1 + h * (2 * late - 1 / (t + h))
            half = (1 - t + h) / (t + h)  # sigma^2 / 2
            q = half * pull * weight
            part = 1.0 if i == steps - 1 else 1 + 2 * q * gain * h  # v has no part in the last step
            own = 0.0 if i == steps - 1 else h / (t + h)
            a, b = (slope - q * gain * (1 - own)) / part, (bias - q * (shift - self.goal)) / part
            fields.append((a, b, a - slope, b - bias, half))
            if i < steps - 1:
                moved, pushed = 1 + h * (2 * a - 1 / (t + h)), 2 * h * b
                gain, shift = gain * moved, gain * pushed + shift
            if not released:
                pull *= 1 + h * slope if i == steps - 1 else 1 + h * (2 * slope - 1 / (t + h))
        mean, std, m, var, kl = 0.0, 1.0, 0.0, 1.0, 0.0
        for i, (a, b, da, db, half) in enumerate(reversed(fields)):
            kl += h / half * ((da * m + db) ** 2 + da**2 * var)  # h / 2 E u^2, u = 2 (v - v_b) / sigma
            moved = 1 + h * (2 * a - 1 / (i * h + h))
            m, var = moved * m + 2 * h * b, moved**2 * var + 2 * h * half
            mean, std = mean + h * (a * mean + b), std * abs(1 + h * a)
        return mean, std, kl


def affine(t, mean, std):
    """(a, b) of the velocity a x + b of N(mean, std^2) on the linear path."""
    gain = t * std**2 / (t**2 * std**2 + (1 - t) ** 2)
    return (gain - 1) / (1 - t), mean * (1 - gain * t) / (1 - t)
