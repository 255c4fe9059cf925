"""The random networks of ``utils.random_networks``, under the name that programs here used."""

from utils.random_networks import calibrated, random_images, spread_statistics

__all__ = ["calibrated", "random_images", "spread_statistics"]
