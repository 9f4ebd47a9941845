"""What a person sees of a run: the progress bar, the tables on a terminal, the canvas of the figures."""

__all__: list[str] = []
