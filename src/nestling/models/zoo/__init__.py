"""The named models, a file for each family: each reads as its diagram."""

from nestling.models.zoo import atlas, baselines, hope, miras, slots, titans, tnt

__all__ = ["atlas", "baselines", "hope", "miras", "slots", "titans", "tnt"]
