"""VMFS 5 and 6, read straight from a LUN: the disks of VMs without an ESXi host.

The layout is not published by VMware. What is read here follows the documentation of dissect.vmfs
(https://docs.dissect.tools, a reader by Fox-IT) and of vmfs-tools; docs/design/vmfs.md says what of
it is proven, and on which images. A LUN is not trusted: whatever it says is bounded and checked,
and a wrong one is an IntegrityError.
"""
