"""The version of surgery; here, so that a copy that was never installed knows it too."""

VERSION = "0.2.0"
