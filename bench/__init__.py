"""`make bench`: how fast the spine is, each figure against a reference measured in the same run."""
