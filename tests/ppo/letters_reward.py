"""Reward functions that the PPO tests name in their recipes."""

import random


def letters(prompts: list[str], completions: list[str]) -> list[float]:
    """Different for different texts: depends on the share of the letter e and on the length."""
    return [text.count("e") / (len(text) + 1) + 0.05 * len(text) for text in completions]


def vowels(prompts: list[str], completions: list[str]) -> list[float]:
    """The share of vowels."""
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in completions]


def each_e(prompts: list[str], completions: list[str]) -> list[list[tuple[int, float]]]:
    """A score of 1 at the position of every e."""
    return [[(position, 1.0) for position, letter in enumerate(text) if letter == "e"] for text in completions]


def noisy(prompts: list[str], completions: list[str]) -> list[float]:
    """Like ``letters``, with noise from the random stream of the process."""
    return [score + 0.1 * random.random() for score in letters(prompts, completions)]


def arms(prompts: list[str], completions: list[str]) -> list[float]:
    """The rewards of a bandit's arms: 0 for arm0, the highest for arm9, and a negative reward for any other text."""
    return [int(text[3:]) / 6 if text.startswith("arm") else -0.5 for text in completions]
