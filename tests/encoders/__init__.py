"""Tests of mmkit.encoders; a package, so that equal file names in other test folders do not clash."""
