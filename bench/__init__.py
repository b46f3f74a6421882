"""`make bench`: performance of the main paths, against references measured in the same run."""
