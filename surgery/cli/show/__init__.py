"""What the screen shows: results on standard output, progress and complaints on standard error."""
