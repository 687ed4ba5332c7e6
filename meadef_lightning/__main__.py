"""``python -m meadef_lightning`` is ``meadef``."""

from meadef_lightning.cli import main

if __name__ == "__main__":
    main()
