"""vSphere: a vCenter server or one ESXi host."""
