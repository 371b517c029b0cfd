"""Methods × learning rates × seeds (× orders of tasks) as a grid of run folders, and what came of it in one file."""
