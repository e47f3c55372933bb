"""The store format: packs, pages, manifests, keys. See docs/store-format.md."""
