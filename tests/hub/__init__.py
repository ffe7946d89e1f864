"""A hub on loopback: the protocol of the Hugging Face hub, over folders on disk, with faults on order."""
