"""``python -m stages``, and so ``accelerate launch -m stages run RECIPE``."""

from stages.cli import main

if __name__ == "__main__":
    main()
