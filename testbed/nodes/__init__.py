"""What is put on a lab's machines: routing, etcd, flannel, pods."""
