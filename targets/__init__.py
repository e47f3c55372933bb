"""The servers that present TimeViews, behind the protocol of offload.target."""
