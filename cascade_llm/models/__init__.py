"""One decoder, architectures as stated differences."""
