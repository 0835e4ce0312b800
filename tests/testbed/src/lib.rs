//! The testbed: a real Postgres, a real kube-apiserver with etcd, and a KubeVirt to run desktops on.
