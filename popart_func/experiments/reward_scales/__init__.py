"""bsuite's scale experiments: agents at every scale of the rewards. `play` runs them."""
