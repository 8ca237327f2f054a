"""The list of wrong labels, from the features of a frozen network and without training."""
