"""What the screen shows people; `--json` gives the same to machines."""
