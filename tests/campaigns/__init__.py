"""Long campaigns of hostile inputs: thousands of tries, each a whole command. tests/README.md tells how to run them."""
