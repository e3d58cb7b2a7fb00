"""Reward functions that the PPO tests name in their recipes."""

import random


def letters(prompts: list[str], completions: list[str]) -> list[float]:
    """Varies from text to text: the share of the letter e, and the length."""
    return [text.count("e") / (len(text) + 1) + 0.05 * len(text) for text in completions]


def vowels(prompts: list[str], completions: list[str]) -> list[float]:
    """The share of vowels."""
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in completions]


def each_e(prompts: list[str], completions: list[str]) -> list[list[tuple[int, float]]]:
    """A score of 1 at the position of every e."""
    return [[(position, 1.0) for position, letter in enumerate(text) if letter == "e"] for text in completions]


def noisy(prompts: list[str], completions: list[str]) -> list[float]:
    """As ``letters``, with noise from the process's own random stream."""
    return [score + 0.1 * random.random() for score in letters(prompts, completions)]


def arms(prompts: list[str], completions: list[str]) -> list[float]:
    """The rewards of a bandit's arms: arm0 gives nothing, arm9 the most; any other text gives a negative reward."""
    return [int(text[3:]) / 6 if text.startswith("arm") else -0.5 for text in completions]
