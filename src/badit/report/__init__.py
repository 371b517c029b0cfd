"""From runs and their tables to figures and one self-contained page."""
