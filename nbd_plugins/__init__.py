"""What runs inside nbdkit: one small script a kind of image that its C plugins can't serve."""
