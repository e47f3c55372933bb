"""Repositories of restic and borg with one backup of the mixed image, for those who read them."""

from __future__ import annotations

from bench.ground import Ground
from bench.measure import once


def peers_of(ground: Ground) -> tuple[dict[str, str], dict[str, str], str]:
    """Make both; returns restic's environment, borg's, and borg's repository (archive `a`)."""
    restic_env = {
        "RESTIC_PASSWORD": "bench",
        "RESTIC_REPOSITORY": str(ground.folder / "restic"),
        "RESTIC_CACHE_DIR": str(ground.folder / "restic-cache"),
    }
    once(["restic", "init"], restic_env)
    once(["restic", "backup", "--compression", "auto", str(ground.image)], restic_env)
    borg_env = {
        "BORG_BASE_DIR": str(ground.folder / "borg-base"),
        "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
    }
    repo = str(ground.folder / "borg")
    once(["borg", "init", "-e", "none", repo], borg_env)
    once(["borg", "create", "-C", "zstd,1", f"{repo}::a", str(ground.image)], borg_env)
    return restic_env, borg_env, repo
