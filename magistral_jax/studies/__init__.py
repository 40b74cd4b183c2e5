"""Reports and plots over the folder of a run."""
