"""A vSphere simulator: a vCenter with hosts, in Python, on pyVmomi's own types and serialisers.

`python -m tests.vsphere_sim --help` starts one for a person; README.md says what it models and what
it does not. Nothing here was tried on a real ESXi: it proves that calls are well-formed and in
order, and that the LUNs which are exported to its hosts are what they should be.
"""
