"""One file per claim about speed; results as JSON beside it. `make bench` runs them all."""
