"""The named models, a file for each family: each reads as its diagram."""

from nestling.models.zoo import atlas, baselines, exponential, hope, miras, titans

__all__ = ["atlas", "baselines", "exponential", "hope", "miras", "titans"]
