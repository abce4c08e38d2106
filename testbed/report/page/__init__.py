"""The page of a run: one file of HTML, made from what `checks.json` holds and nothing else."""
