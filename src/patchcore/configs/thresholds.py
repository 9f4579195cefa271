"""How a threshold is chosen; part of the run that chooses it and of the model that carries it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from patchcore.configs.checks import require_choice
from patchcore.errors import ConfigurationError

THRESHOLD_STDS = 3.0
MEAN_3_STD, QUANTILE, F1 = "mean3std", "quantile", "f1"
THRESHOLD_RULES = (MEAN_3_STD, QUANTILE, F1)


@dataclass(frozen=True)
class ThresholdRule:
    """Where normal ends.

    Attributes:
        name: "mean3std" (mean plus three standard deviations of normal scores), "quantile" (a conformal quantile of
            them) or "f1" (the highest F1 on labelled validation images), one of THRESHOLD_RULES.
        quantile: Share of normal images that are to stay at or below the threshold, in (0, 1); None unless `name` is
            "quantile".
    """

    name: str = MEAN_3_STD
    quantile: float | None = None

    def __post_init__(self) -> None:
        require_choice("threshold rule", self.name, THRESHOLD_RULES)
        if self.name != QUANTILE and self.quantile is not None:
            raise ConfigurationError(
                f"threshold rule {self.name!r} takes no number, found {self.quantile}: leave it out"
            )
        if self.name == QUANTILE and not (self.quantile is not None and 0 < self.quantile < 1):
            found = "no number" if self.quantile is None else str(self.quantile)
            raise ConfigurationError(
                f"threshold rule {QUANTILE!r} needs a share of normal images between 0 and 1, found {found}: "
                f"{QUANTILE}:0.95 lets one good image in twenty raise an alarm"
            )

    @classmethod
    def parse(cls, text: str) -> ThresholdRule:
        """Read `mean3std`, `quantile:Q` or `f1`.

        Raises:
            ConfigurationError: It is none of them; the message says what is expected.
        """
        name, colon, number = text.partition(":")
        if name not in THRESHOLD_RULES:
            expected = f"{MEAN_3_STD}, {QUANTILE}:Q or {F1}"
            raise ConfigurationError(f"--threshold_rule {text!r} is unknown, expected {expected}")
        try:
            return cls(name, float(number) if colon else None)
        except ValueError as error:
            reason = str(error) if isinstance(error, ConfigurationError) else f"{number!r} is no number"
            raise ConfigurationError(f"--threshold_rule {text}: {reason}") from error

    def __str__(self) -> str:
        return self.name if self.quantile is None else f"{self.name}:{self.quantile}"

    @property
    def aimed_rate(self) -> float | None:
        """Share of normal images that the rule lets raise an alarm; None for "f1", which aims at none.

        "quantile" keeps its promise whatever the distribution, if images and scores are exchangeable. That of
        "mean3std" is the tail of a Gaussian, 0.135 %, and holds as far as normal scores are Gaussian.
        """
        if self.name == MEAN_3_STD:
            return 0.5 * math.erfc(THRESHOLD_STDS / math.sqrt(2))
        return None if self.quantile is None else float(1 - exact_share(self.quantile))


def exact_share(quantile: float) -> Fraction:
    """Return the decimal number that was typed: 0.95 as 19/20, so that 20 * 0.95 is 19 and not a little more."""
    return Fraction(repr(quantile))
