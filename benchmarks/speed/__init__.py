"""The contestants of the speed benchmarks, and the arena in which they run."""
