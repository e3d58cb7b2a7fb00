"""``python -m stages``, also for ``accelerate launch -m stages run RECIPE``."""

from stages.cli import main

if __name__ == "__main__":
    main()
