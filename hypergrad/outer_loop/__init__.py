"""The parts of `hypergrad.minimize`: one step, blocks of steps, and whole runs."""
