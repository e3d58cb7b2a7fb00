"""Engines that sample outside this process. They implement the interface of sampling/sampler.py."""
