"""Reward functions that the PPO tests name in their recipes."""

import random


def letters(prompts: list[str], completions: list[str]) -> list[float]:
    """Varies from text to text: the share of the letter e, and the length."""
    return [text.count("e") / (len(text) + 1) + 0.05 * len(text) for text in completions]


def vowels(prompts: list[str], completions: list[str]) -> list[float]:
    """The share of vowels: what the sign canary has to raise."""
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in completions]


def each_e(prompts: list[str], completions: list[str]) -> list[list[tuple[int, float]]]:
    """One for every e, where it stands."""
    return [[(position, 1.0) for position, letter in enumerate(text) if letter == "e"] for text in completions]


def noisy(prompts: list[str], completions: list[str]) -> list[float]:
    """As ``letters``, with noise from the process's own random stream."""
    return [score + 0.1 * random.random() for score in letters(prompts, completions)]


def arms(prompts: list[str], completions: list[str]) -> list[float]:
    """What the arms of a bandit pay: arm0 nothing, arm9 most; anything else costs."""
    return [int(text[3:]) / 6 if text.startswith("arm") else -0.5 for text in completions]
