"""BiBench's six tracks on this machine: which binarisation suits which task, network and processor."""
