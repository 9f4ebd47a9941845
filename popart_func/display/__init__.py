"""Display: tables and progress bars on a terminal, and the canvas of all figures."""

__all__: list[str] = []
