"""libvirt with KVM."""
