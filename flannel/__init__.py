"""flanneld and the flannel CNI plugin in Python: standard library only."""

__version__ = "0.1.0"
