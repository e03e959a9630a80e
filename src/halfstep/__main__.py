"""``python -m halfstep``: the command ``halfstep``, for launchers that start modules (torchrun)."""

from halfstep.cli import main

if __name__ == "__main__":
    main()
