"""Engines that sample outside of this process, behind the interface of sampling/sampler.py."""
