"""`hypergrad.OuterLoop` and its parts: one step, blocks of steps, and whole runs."""
