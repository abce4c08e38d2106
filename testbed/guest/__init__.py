"""The guest kernel: one that has everything, run as an ordinary program, without KVM, root or an image."""
