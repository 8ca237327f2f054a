"""The list of wrong labels: found without training, looked at, corrected."""
