"""How long calls take on a vCenter that has something to do.

Orders of magnitude from public write-ups of storage and backup vendors, and our own guesses;
nothing of it was measured on a real one. For figures that say "with realistic latencies".
"""

from __future__ import annotations

REALISTIC: dict[str, float] = {  # seconds by method; of a task: until it has ended
    "Login": 0.15,
    "RetrievePropertiesEx": 0.01,
    "HTTP GET": 0.05,
    "HTTP PUT": 0.1,
    "CreateSnapshot_Task": 2.0,  # quiesced; a busy guest takes longer
    "CreateSnapshotEx_Task": 2.0,
    "RemoveSnapshot_Task": 1.5,  # of a delta that is seconds old
    "RevertToSnapshot_Task": 1.0,
    "AddInternetScsiStaticTargets": 0.3,
    "RemoveInternetScsiStaticTargets": 0.3,
    "RescanAllHba": 4.0,
    "RescanHba": 3.0,
    "RescanVmfs": 2.0,
    "QueryUnresolvedVmfsVolume": 1.0,
    "QueryUnresolvedVmfsVolumes": 1.0,
    "ResignatureUnresolvedVmfsVolume_Task": 4.0,
    "UnmountVmfsVolume": 1.5,
    "DetachScsiLun": 0.5,
    "DeleteScsiLunState": 0.1,
    "DeleteVmfsVolumeState": 0.1,
    "SearchDatastoreSubFolders_Task": 0.5,
    "RegisterVM_Task": 0.8,
    "ReconfigVM_Task": 0.5,
    "UnregisterVM": 0.3,
}
