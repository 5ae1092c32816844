"""When an activation is massive: Sun et al., arXiv 2402.17762, section 2."""

MIN_MAGNITUDE = 100.0  # |x| is at least this,
MIN_RATIO = 1000.0  # and at least so many times the median of |x| in its layer and sequence
