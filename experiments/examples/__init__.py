"""Scripts to read from top to bottom; each cell (``# %%``) runs in a notebook, too."""
