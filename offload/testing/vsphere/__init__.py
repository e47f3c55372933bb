"""A vSphere simulator: no ESXi runs here.

It speaks the real protocol (SOAP over TLS, with pyVmomi's own types and serialisers) and models
what a quiesced VM snapshot meets: sessions, the property collector, tasks, VMware Tools, deltas and
their consolidation, faults on demand. Each rule of vSphere that it models has its source beside it.
What it has not been told of, it does not know: it proves that our calls are well-formed and in
order, not that a real vCenter answers them so.
"""
