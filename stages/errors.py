"""The errors a user can act on. Each message names the value, what was expected and the next move; the command exits with status 2.

    StagesError
    |- RecipeError      the recipe file, or an override on the command line
    |- DataError        a data file, a row of it, or a missing column
    |- ModelError       a model, a tokenizer, a head or an adapter that cannot be used as asked
    |- RegistryError    the registry: a reference that does not resolve, a damaged version, a refused removal
    '- TrainingError    a run that must not go on (NaN, a reward function that returns nonsense)
"""


class StagesError(Exception):
    """Base of every error that is the user's to mend; anything else is a bug of ours and keeps its traceback."""

    exit_status = 2


class RecipeError(StagesError):
    """The recipe is wrong; the message begins with ``file:line:`` where the file is known."""


class DataError(StagesError):
    """The data cannot be used; the message names file, line and column."""


class ModelError(StagesError):
    """A model cannot play the role the recipe gives it."""


class RegistryError(StagesError):
    """The registry cannot do what was asked; nothing in it was changed."""


class TrainingError(StagesError):
    """Training was stopped on purpose; what was made before is kept."""
