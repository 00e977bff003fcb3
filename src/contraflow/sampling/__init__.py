"""Boltzmann sampling without reinforcement learning: flows for unnormalised densities (docs/start/sampling.md)."""
